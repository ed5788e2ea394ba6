"""The three kinds of tasks: one class of several, any number of labels, or numbers.

These are the three problems that transformers calls `single_label_classification`,
`multi_label_classification` and `regression`. Here is what differs between them in training:
the target that the loss compares with the logits, the loss, and its weights. The loop in
train_classifier.py is the same for all three; labels.py reads the labels of a file.

In the letters of the shapes: B texts in a batch, N in a split, C classes, labels or numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from common.training.run import MULTI, REGRESSION, SINGLE, Kind

if TYPE_CHECKING:
    import datasets

IGNORED_CLASS = -100  # the default ignore_index of cross_entropy
DESCRIPTIONS: dict[Kind, str] = {
    SINGLE: "one class for each text",
    MULTI: "any number of labels for each text",
    REGRESSION: "numbers for each text",
}
EXACT = ".9g"  # the format of a score in files: its digits tell any number in fp32 from all others
# what an answer is called, and several
NOUNS: dict[Kind, tuple[str, str]] = {
    SINGLE: ("class", "classes"),
    MULTI: ("label", "labels"),
    REGRESSION: ("number", "numbers"),
}
PROBLEM_TYPES: dict[Kind, str] = {
    SINGLE: "single_label_classification",
    MULTI: "multi_label_classification",
    REGRESSION: "regression",
}


@dataclass(frozen=True)
class Task:
    """What a model is asked, and the names of its answers in the order of the logits (C)."""

    kind: Kind
    names: tuple[str, ...]

    @property
    def problem_type(self) -> str:
        """What transformers calls it: by this name `pipeline` turns logits into scores."""
        return PROBLEM_TYPES[self.kind]

    def noun(self) -> str:
        """Return what its answers are called: "class" if there is one, else "classes"."""
        one, several = NOUNS[self.kind]
        return one if len(self.names) == 1 else several

    def counted(self) -> str:
        """Return how many answers there are, such as "5 classes"."""
        return f"{len(self.names):,} {self.noun()}"

    def feature(self) -> Any:
        """Return the type of a split's column `label`, from which `task_of_rows` reads the task."""
        import datasets

        if self.kind == REGRESSION:
            return dict.fromkeys(self.names, datasets.Value("float64"))
        classes = datasets.ClassLabel(names=list(self.names))
        return classes if self.kind == SINGLE else datasets.List(classes)

    def cells(self, labels: Sequence[Any]) -> list[Any]:
        """Return labels (N), whose names are known ones, as the column `label` holds them: the
        number of a class, those of several labels, or number by name.
        """
        if self.kind == REGRESSION:
            return [dict(zip(self.names, numbers)) for numbers in labels]
        index = {name: number for number, name in enumerate(self.names)}
        if self.kind == SINGLE:
            return [index[name] for name in labels]
        return [sorted({index[name] for name in names}) for names in labels]

    def target(self, cell: Any) -> int | list[float]:
        """Return what the loss compares with the logits of a text: the number of its class, or C
        numbers: 1 for each label that it has, else 0, or the numbers themselves.
        """
        if self.kind == SINGLE:
            return cell
        if self.kind == REGRESSION:
            return [cell[name] for name in self.names]
        return [float(number in cell) for number in range(len(self.names))]

    def no_target(self) -> int | list[float]:
        """Return the target of a text that only fills a batch: it counts nowhere."""
        return IGNORED_CLASS if self.kind == SINGLE else [math.nan] * len(self.names)

    def targets(self, cells: Iterable[Any]) -> torch.Tensor:
        """Return the targets of a column `label`: whole numbers (N), or fp64 (N, C)."""
        values = [self.target(cell) for cell in cells]
        return torch.tensor(values, dtype=torch.int64 if self.kind == SINGLE else torch.float64)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what logits (N, C) mean, as `pipeline` does: the probability of each class, that
        of each label (in double precision, in which thresholds are chosen), or the numbers
        themselves.
        """
        if self.kind == REGRESSION:
            return logits
        return logits.softmax(-1) if self.kind == SINGLE else logits.double().sigmoid()


@dataclass(frozen=True)
class Scoring:
    """What scores depend on besides logits and targets; the fields are named as their flags."""

    positive_class: str | None = None  # None: of two classes the second
    # from which probability on a text has a label: one number for all labels, one for each, or
    # "auto": those with the highest F1 on the texts that are scored
    threshold: float | tuple[float, ...] | Literal["auto"] = 0.5


def task_of_rows(rows: datasets.Dataset) -> Task:
    """Return the task of a labelled split: the type of its column `label` tells it."""
    import datasets

    feature = rows.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return Task(SINGLE, tuple(feature.names))
    if isinstance(feature, datasets.List):
        return Task(MULTI, tuple(feature.feature.names))
    return Task(REGRESSION, tuple(feature))


# The loss -----------------------------------------------------------------------------------------


def sum_losses(
    task: Task, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, smoothing: float
) -> torch.Tensor:
    """Return the sum of the losses of logits (B, C) against targets (B) or (B, C).

    The losses are those of transformers: cross-entropy of the classes, binary cross-entropy of each
    label, the squared error of each number. `weights` (C) are those of `balanced_weights`. Label
    smoothing spreads a share of each class over all classes, of each label over its yes and no.
    """
    if task.kind == SINGLE:
        options = {"reduction": "sum", "label_smoothing": smoothing}
        return F.cross_entropy(logits, targets, weight=weights, **options)
    is_filler = targets.isnan()
    targets = targets.nan_to_num()
    if task.kind == MULTI:
        targets = targets * (1 - smoothing) + smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
    else:
        losses = F.mse_loss(logits, targets, reduction="none")
    return losses.masked_fill(is_filler, 0.0).sum()


def count_targets(targets: torch.Tensor, class_weights: torch.Tensor | None) -> tuple[int, float]:
    """Return how many texts count among targets (B) or (B, C), and by what the sum of their losses
    is divided to be a mean.

    Of classes that is their number, or the sum of their weights (C). Of labels and numbers it is
    the number of texts times C, whatever the weights of the labels: as in PyTorch, these weigh the
    yes of each label against its no.
    """
    if targets.ndim == 2:
        targets = targets[~targets.isnan().any(dim=1)]
        return len(targets), float(targets.numel())
    targets = targets[targets != IGNORED_CLASS]
    if class_weights is None:
        return len(targets), float(len(targets))
    return len(targets), class_weights[targets].sum(dtype=torch.float64).item()


def balanced_weights(task: Task, targets: torch.Tensor) -> torch.Tensor:
    """Return weights (C), fp32, that make up for rare classes or labels, from targets (N) or (N,
    C).

    Of classes they are scikit-learn's "balanced" ones: the fewer rows a class has, the higher; 0
    without any. Of a label it is what its yes weighs against its no, the number of texts without
    it for each one with it; 1 for a label that no text has.
    """
    if task.kind == MULTI:
        having = targets.sum(dim=0)  # (C)
        return torch.where(having > 0, (len(targets) - having) / having.clamp(min=1), 1.0).float()
    from sklearn.utils.class_weight import compute_class_weight

    labels = targets.numpy()
    present = np.unique(labels)
    weights = torch.zeros(len(task.names))
    balanced = compute_class_weight("balanced", classes=present, y=labels)
    weights[torch.from_numpy(present)] = torch.from_numpy(balanced).float()
    return weights
