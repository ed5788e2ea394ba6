"""The pictures of a report, drawn without a display."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)
import numpy as np  # noqa: E402


def confusion_matrix(counts: list[list[int]], names: list[str], *, title: str):
    """Return a figure of a confusion matrix (C x C, rows are the true classes): colour is the
    share of its row, text the count.
    """
    counts = np.asarray(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.5, 0.7 * len(names) + 2)
    figure, axes = plt.subplots(figsize=(side, side * 0.88), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    axes.set_xticks(
        range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", parse_math=False
    )
    axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(names) <= 25:  # beyond that the numbers would overlap
        for (row, column), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    column,
                    row,
                    str(count),
                    ha="center",
                    va="center",
                    color="white" if shares[row, column] > 0.5 else "black",
                )
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    return figure


def learning_curve(epochs: list[dict], best_epoch: int):
    """Return a figure with the losses (left) and the validation scores (right) of each epoch; a
    line marks the best epoch.

    Each epoch is a dict with `epoch`, `train_loss`, `loss`, `accuracy` and `macro_f1`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    numbers = [epoch["epoch"] for epoch in epochs]
    for axes, curves, label in (
        (left, {"train_loss": "training", "loss": "validation"}, "loss (nats)"),
        (right, {"accuracy": "accuracy", "macro_f1": "macro-F1"}, "validation score"),
    ):
        for key, name in curves.items():
            axes.plot(numbers, [epoch[key] for epoch in epochs], marker="o", label=name)
        axes.axvline(best_epoch, color="grey", linestyle=":", label="best epoch")
        axes.set(xlabel="epoch", ylabel=label, xticks=numbers if len(numbers) <= 20 else axes.get_xticks())
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def similarity_map(matrix, names: list[str]):
    """Return a figure of a matrix of cosines (N x N): colour is the cosine, and its number where
    there is room.
    """
    matrix, side = np.asarray(matrix), min(max(4.5, 0.55 * len(names) + 2), 12)
    figure, axes = plt.subplots(figsize=(side, side * 0.88), layout="constrained")
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set(title="cosine similarity")
    if len(names) <= 40:
        axes.set_xticks(
            range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", parse_math=False
        )
        axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(names) <= 12:  # beyond that the numbers would overlap
        for (row, column), value in np.ndenumerate(matrix):
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="white" if abs(value) > 0.6 else "black",
            )
    figure.colorbar(image, label="cosine", shrink=0.8)
    return figure


def cluster_map(points, labels, names: list[str]):
    """Return a figure of points (N x 2) coloured by their cluster's number (N), -1 for none;
    `names` are the clusters' in order.
    """
    points, labels = np.asarray(points), np.asarray(labels)
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    axes.scatter(*points[labels < 0].T, s=8, color="lightgrey")
    colours = plt.get_cmap("tab20").colors
    for number in np.unique(labels[labels >= 0]):
        legend = names[number] if number < 12 else None  # a longer legend would hide the map
        axes.scatter(*points[labels == number].T, s=12, color=colours[number % len(colours)], label=legend)
    axes.set(xticks=[], yticks=[], title="texts by similarity, coloured by cluster")
    if (labels >= 0).any():
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def save(figure, path):
    """Write a figure as PNG and free it."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
