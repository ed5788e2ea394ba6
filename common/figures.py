"""The pictures of a report, drawn without a display."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# where the home folder can't be written, it says in many words that it lists the fonts anew
logging.getLogger("matplotlib").setLevel(logging.ERROR)

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of the backend)
import numpy as np  # noqa: E402
import wcwidth  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from numpy.typing import ArrayLike  # noqa: E402

from common.errors import shorten  # noqa: E402
from common.files import whole_file  # noqa: E402
from common.intervals import wilson  # noqa: E402

# rows of a confusion matrix: more would be neither readable nor small
MAX_CLASSES, NAME_CHARACTERS = 20, 30
# rows of a similarity matrix, for the same reason
MAX_SIMILARITY_NUMBERS, MAX_SIMILARITY_NAMES = 12, 40
MAX_LEGEND = 24  # clusters; a longer legend would hide the map
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "o^sDvPX*<>"
MAX_PANELS = 6
INCHES_PER_COLUMN = 0.085  # of a name beside an axis; wide characters have two columns

# a character that the font lacks is drawn as a box; nobody can do anything about it
warnings.filterwarnings("ignore", message="Glyph [0-9]+ .*missing from")


def confusion_matrix(counts: list[list[int]], names: list[str], *, title: str) -> Figure:
    """Return a figure of a confusion matrix (C, C): rows are the true classes, colour is the share
    of the row. Of more than 20 classes it shows the 20 that are most often confused.
    """
    table = np.asarray(counts)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    shown = most_confused(table, MAX_CLASSES)
    if len(shown) < len(table):
        title = f"{title}: the {len(shown)} most confused of {len(table):,} classes"
    table, shares = table[np.ix_(shown, shown)], shares[np.ix_(shown, shown)]
    names = [shorten(names[number], NAME_CHARACTERS) for number in shown]
    side = max(2.5, 0.6 * len(shown))
    figure, [[axes]] = _panels(1, 1, side, side, Margins.for_names(names))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="predicted class", ylabel="true class (colour: share of it)")
    _name_rows_and_columns(axes, names)
    for (row, column), count in np.ndenumerate(table):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
    return figure


def most_confused(counts: ArrayLike, most: int) -> np.ndarray:
    """Return the numbers, ascending, of at most `most` classes of a confusion matrix (C, C): those
    with the most texts that were taken for another class, or another for them.
    """
    table = np.asarray(counts)
    confused = table.sum(0) + table.sum(1) - 2 * table.diagonal()  # (C)
    return np.sort(np.argsort(-confused, kind="stable")[:most])


def label_bars(per_label: dict[str, list[Any]], names: list[str], *, title: str) -> Figure:
    """Return a figure with a bar for each label: the texts that have it and were found, those that
    were missed, and those that were reported and don't have it. Of more than 20 labels it shows the
    20 with the most mistakes.

    `per_label` has lists (C) `support`, `missed` and `false_alarms`.
    """
    missed, false_alarms = np.asarray(per_label["missed"]), np.asarray(per_label["false_alarms"])
    found = np.asarray(per_label["support"]) - missed
    shown = np.sort(np.argsort(-(missed + false_alarms), kind="stable")[:MAX_CLASSES])
    if len(shown) < len(names):
        title = f"{title}: the {len(shown)} of {len(names):,} labels with the most mistakes"
    labels = [shorten(names[number], NAME_CHARACTERS) for number in shown]
    margins = Margins(left=0.3 + _width(labels))
    figure, [[axes]] = _panels(1, 1, 5.5, max(1.5, 0.35 * len(shown)), margins)
    rows, left = np.arange(len(shown)), np.zeros(len(shown))
    parts = {"found": (found, "tab:blue"), "missed": (missed, "tab:orange")}
    for name, (counts, colour) in {**parts, "false alarms": (false_alarms, "tab:red")}.items():
        axes.barh(rows, counts[shown], left=left, label=name, color=colour)
        left = left + counts[shown]
    axes.set_yticks(rows, labels, parse_math=False)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="texts")
    axes.legend()
    return figure


def scatter(true: ArrayLike, predicted: ArrayLike, names: list[str], *, title: str) -> Figure:
    """Return a figure with predicted over true numbers, both (N, C): a panel for each of the first
    6 numbers, and in it a line on which all points would lie if all were right.
    """
    truth, answers = np.asarray(true), np.asarray(predicted)
    shown = range(min(len(names), MAX_PANELS))
    if len(shown) < len(names):
        title = f"{title}: {len(shown)} of {len(names):,} numbers"
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    figure, panels = _panels(lines, columns, 3.4, 3.2, Margins(top=0.6))
    figure.suptitle(title)
    for panel in panels.flat[len(shown) :]:
        panel.remove()
    for number, axes in zip(shown, panels.flat):
        both = np.concatenate([truth[:, number], answers[:, number]])
        ends = [both.min(), both.max()]
        axes.plot(ends, ends, color="grey", linestyle=":")
        axes.scatter(truth[:, number], answers[:, number], s=10, alpha=0.6)
        axes.set_xlabel(f"true {shorten(names[number], NAME_CHARACTERS)}", parse_math=False)
        axes.set_ylabel("predicted")
        axes.grid(alpha=0.3)
    return figure


def learning_curve(
    epochs: list[dict[str, Any]], best_epoch: float, scores: dict[str, str], *, least: float = 0.0
) -> Figure:
    """Return a figure of the losses (left) and the validation scores (right) of each epoch.

    A line marks the best epoch. Each epoch is a dict with `epoch`, `train_loss`, `loss`,
    and the scores that `scores` gives names for the legend; one that is undefined is
    left out. The axis of the scores spans at least `least`, so that a difference of a
    single text does not look like much.
    """
    figure, [(left, right)] = _panels(1, 2, 3.6, 2.7, Margins(top=0.15))
    numbers = [epoch["epoch"] for epoch in epochs]
    losses = {"train_loss": "training", "loss": "validation"}
    for axes, curves, label in ((left, losses, "loss"), (right, scores, "validation score")):
        for key, name in curves.items():
            axes.plot(numbers, [epoch.get(key, np.nan) for epoch in epochs], marker="o", label=name)
        axes.axvline(best_epoch, color="grey", linestyle=":", label="best epoch")
        ticks = numbers if len(numbers) <= 20 else axes.get_xticks()
        axes.set(xlabel="epoch", ylabel=label, xticks=ticks)
        axes.legend()
        axes.grid(alpha=0.3)
    low, high = right.get_ylim()
    if high - low < least:
        # around the curves, and not beyond the highest score but for the margin that there is
        middle = min((low + high) / 2, max(1.0, high) - least / 2)
        right.set_ylim(middle - least / 2, middle + least / 2)
    return figure


def reliability(bins: Sequence[tuple[float, float, int]], *, called: tuple[str, str]) -> Figure:
    """Return a figure of how often decisions are right (above) and how many there
    are (below), by their probability.

    A bin has its mean probability, the share that is right, and its size; `called` names the two.
    The vertical lines are 95 % intervals of the shares: of few decisions, a share says little.
    """
    margins = Margins(top=0.15, between=0.15)
    figure, [[upper], [lower]] = _panels(2, 1, 4.0, 2.2, margins, height_ratios=(3, 1), sharex=True)
    probabilities, shares, counts = zip(*bins)
    upper.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    intervals = np.array([wilson(round(share * count), count) for _, share, count in bins])
    below_and_above = np.abs(intervals.T - shares)
    options = {"fmt": "o", "capsize": 3, "label": "test split, 95 %"}
    upper.errorbar(probabilities, shares, below_and_above, **options)
    upper.set(ylabel=called[1], ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
    upper.legend()
    lower.bar(probabilities, counts, width=0.03)
    lower.set(xlabel=called[0], ylabel="decisions")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure


def similarity_map(matrix: ArrayLike, names: list[str]) -> Figure:
    """Return a figure of a matrix of cosines (N, N): colour is the cosine, with its number where
    there is room.
    """
    cosines = np.asarray(matrix)
    shown = [shorten(name, NAME_CHARACTERS) for name in names if len(names) <= MAX_SIMILARITY_NAMES]
    side = min(max(3.0, 0.55 * len(names)), 10)
    figure, [[axes]] = _panels(1, 1, side, side, Margins.for_names(shown, right=1.2))
    image = axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set(title="cosine similarity")
    if shown:
        _name_rows_and_columns(axes, shown)
    if len(names) <= MAX_SIMILARITY_NUMBERS:
        for (row, column), value in np.ndenumerate(cosines):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    width = figure.get_figwidth()
    bar = figure.add_axes((1 - 1.1 / width, axes.get_position().y0, 0.15 / width, 0.3))
    figure.colorbar(image, cax=bar, label="cosine")
    return figure


def cluster_map(points: ArrayLike, labels: ArrayLike, names: list[str]) -> Figure:
    """Return a figure of points (N, 2) coloured by their cluster (N), -1 for none; `names` are the
    clusters'.
    """
    positions, clusters = np.asarray(points), np.asarray(labels)
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    axes.scatter(*positions[clusters < 0].T, s=8, color="lightgrey")
    for number in np.unique(clusters[clusters >= 0]):
        legend = names[number] if number < MAX_LEGEND else None
        colour, marker = cluster_style(int(number))
        own = positions[clusters == number]
        axes.scatter(*own.T, s=14, color=colour, marker=marker, label=legend)
        outline = {"boxstyle": "circle,pad=0.15", "edgecolor": colour}
        outline |= {"facecolor": "white", "alpha": 0.8}
        x, y = np.median(own, axis=0)
        axes.text(x, y, str(number + 1), fontsize=7, ha="center", va="center", bbox=outline)
    axes.set(xticks=[], yticks=[], title="texts by similarity, coloured by cluster")
    if (clusters >= 0).any():
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def cluster_style(number: int) -> tuple[str, str]:
    """Return the colour and the marker of a cluster: the colours can be told apart also by the
    colour-blind (Okabe and Ito 2008), and the next ones have another marker.
    """
    return COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]


def save(figure: Figure, path: Path | str) -> None:
    """Write a figure, whole or not at all, in the format of the path's ending; free its memory."""
    try:
        with whole_file(Path(path)) as new:
            figure.savefig(new, dpi=110)
    finally:
        plt.close(figure)


@dataclass(frozen=True)
class Margins:
    """The room around panels, and between two of them, in inches."""

    left: float = 0.75
    right: float = 0.2
    top: float = 0.4
    bottom: float = 0.6
    between: float = 0.8

    @classmethod
    def for_names(cls, names: Sequence[str], *, right: float = 0.2) -> Margins:
        """Return margins with room for names beside the rows, and below the columns, where they are
        turned by 40 degrees.
        """
        width = _width(names) if names else 0.0
        return cls(left=cls.left + width, right=right, bottom=cls.bottom + 0.7 * width)


def _panels(
    lines: int, columns: int, width: float, height: float, margins: Margins, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its panels (lines, columns), each `width` x `height`; all in inches.

    Margins are counted, not measured: matplotlib's layouts draw every text several times, which
    took a third of the time of a small run.
    """
    whole_width = margins.left + columns * width + (columns - 1) * margins.between + margins.right
    whole_height = margins.bottom + lines * height + (lines - 1) * margins.between + margins.top
    grid = {
        "left": margins.left / whole_width,
        "right": 1 - margins.right / whole_width,
        "bottom": margins.bottom / whole_height,
        "top": 1 - margins.top / whole_height,
        "wspace": margins.between / width,
        "hspace": margins.between / height,
    }
    return plt.subplots(
        lines, columns, figsize=(whole_width, whole_height), squeeze=False, gridspec_kw=grid, **options
    )


def _width(names: Sequence[str]) -> float:
    """Return about how many inches the longest of some names takes."""
    return INCHES_PER_COLUMN * max(wcwidth.width(name) for name in names)


def _name_rows_and_columns(axes: Axes, names: list[str]) -> None:
    """Label both axes; parse_math=False shows a dollar sign in a name as it is."""
    plain, turned = {"parse_math": False}, {"rotation": 40, "rotation_mode": "anchor", "ha": "right"}
    axes.set_xticks(range(len(names)), names, **turned, **plain)
    axes.set_yticks(range(len(names)), names, **plain)
