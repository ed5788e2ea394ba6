"""The pictures of a report, drawn without a display."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)
import numpy as np  # noqa: E402


def confusion_matrix(counts: list[list[int]], names: list[str], *, title: str):
    """Return a figure of a confusion matrix (C x C, rows are the true classes): colour is the share of its row, text the count."""
    counts = np.asarray(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.5, 0.7 * len(names) + 2)
    figure, axes = plt.subplots(figsize=(side, side * 0.88), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    if len(names) <= 25:  # beyond that the numbers would overlap
        for (row, column), count in np.ndenumerate(counts):
            if count:
                axes.text(column, row, str(count), ha="center", va="center", color="white" if shares[row, column] > 0.5 else "black")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    return figure


def learning_curve(epochs: list[dict], best_epoch: int):
    """Return a figure with the losses (left) and the validation scores (right) of each epoch; a line marks the best epoch.

    Each epoch is a dict with `epoch`, `train_loss`, `loss`, `accuracy` and `macro_f1`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    numbers = [epoch["epoch"] for epoch in epochs]
    for axes, curves, label in ((left, {"train_loss": "training", "loss": "validation"}, "loss (nats)"),
                                (right, {"accuracy": "accuracy", "macro_f1": "macro-F1"}, "validation score")):
        for key, name in curves.items():
            axes.plot(numbers, [epoch[key] for epoch in epochs], marker="o", label=name)
        axes.axvline(best_epoch, color="grey", linestyle=":", label="best epoch")
        axes.set(xlabel="epoch", ylabel=label, xticks=numbers if len(numbers) <= 20 else axes.get_xticks())
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def save(figure, path):
    """Write a figure as PNG and free it."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
