"""The scores of a split that is drawn again and again: what their intervals, and the tests of a
difference between two runs, are made of.

A resample is a row of whole numbers (N), how often it has each text, and all scores are computed
for many of them at once. They are those of common/training/metrics.py on the texts of the resample.
NumPy and SciPy are all that this takes, so that runs are compared without PyTorch.

In the letters of the shapes: R resamples, N texts, C classes, labels or numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from common.intervals import Interval, bootstrap, correlations, means, percentiles, ranks, wilson
from common.training.run import MULTI, SINGLE, Kind

# numbers of a split up to which the areas under curves, which sort all of them, get intervals
MOST_NUMBERS = 500_000
Statistics: TypeAlias = "Callable[[np.ndarray], dict[str, np.ndarray]]"  # (R, N) -> name -> (R)


@dataclass(frozen=True)
class Answers:
    """What is true of the texts of a split, and what a model says.

    `truth` and `predicted` are numbers of classes (N), or for each label whether a
    text has it (N, C), or numbers (N, C). `probabilities` (N, C) and `losses` (N) are
    None where nothing is known of them.
    """

    kind: Kind
    truth: np.ndarray
    predicted: np.ndarray
    num_classes: int
    probabilities: np.ndarray | None = None
    losses: np.ndarray | None = None
    positive: int | None = None  # the class of binary_f1

    def __len__(self) -> int:
        return len(self.truth)

    def is_right(self) -> np.ndarray:
        """Return for each text (N) whether all that is predicted is true."""
        same = self.predicted == self.truth
        return same if same.ndim == 1 else same.all(axis=1)

    def statistics(self) -> Statistics:
        """Return a function that computes the scores of resamples."""
        if self.kind == SINGLE:
            return class_statistics(self)
        return label_statistics(self) if self.kind == MULTI else number_statistics(self)


def score_intervals(answers: Answers) -> dict[str, Interval]:
    """Return the interval of each score: Wilson's for shares of texts, else that of a bootstrap.

    A score that is undefined in most resamples, or the same in all, has none.
    """
    bootstrapped = bootstrap(answers.statistics(), len(answers))
    found = {name: percentiles(values) for name, values in bootstrapped.items()}
    share = wilson(int(answers.is_right().sum()), len(answers))
    # of one class per text, micro-F1 is the accuracy
    same = {SINGLE: ("accuracy", "micro_f1"), MULTI: ("subset_accuracy",)}
    for name in same.get(answers.kind, ()):
        found[name] = share
    return {name: interval for name, interval in found.items() if interval is not None}


def class_statistics(answers: Answers) -> Statistics:
    """Return the scores of one class per text."""
    labels, predicted, count = answers.truth, answers.predicted, answers.num_classes
    is_right = labels == predicted
    true, said = (_one_hot(numbers, count) for numbers in (labels, predicted))  # (N, C)
    hits = _one_hot(labels, count, is_right)
    positive = 1 if answers.positive is None and count == 2 else answers.positive
    curves = np.arange(count) if count != 2 else np.array([positive])
    has_class = labels[:, None] == curves if _has_curves(answers) else None  # (N, columns)

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        right, having, given = (weights @ matrix for matrix in (hits, true, said))  # (R, C)
        f1, total = _f1(right, having, given), weights.sum(axis=1)
        scores = {
            "accuracy": right.sum(axis=1) / total,
            "micro_f1": right.sum(axis=1) / total,
            # over the classes that occur
            "macro_f1": f1.sum(axis=1) / ((having + given) > 0).sum(axis=1),
            "weighted_f1": (f1 * having).sum(axis=1) / total,
            "matthews": _matthews(right, having, given),
        }
        if positive is not None:
            scores["binary_f1"] = f1[:, positive]
        if answers.losses is not None:
            scores["loss"] = means(weights, answers.losses)
        if has_class is not None:
            assert answers.probabilities is not None
            scores |= area_statistics(weights, answers.probabilities[:, curves], has_class)
        return scores

    return statistics


def label_statistics(answers: Answers) -> Statistics:
    """Return the scores of several labels per text."""
    truth, predicted = answers.truth, answers.predicted
    hits = (truth & predicted).astype(float)
    same = predicted == truth

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        right, having, given = (weights @ matrix for matrix in (hits, truth * 1.0, predicted * 1.0))
        f1, total = _f1(right, having, given), having.sum(axis=1)
        whole = _f1(*(part.sum(axis=1) for part in (right, having, given)))
        sums, zeros = (f1 * having).sum(axis=1), np.zeros(len(total))
        weighted = np.divide(sums, total, out=zeros, where=total > 0)
        scores = {
            "subset_accuracy": means(weights, same.all(axis=1)),
            "label_accuracy": means(weights, same.mean(axis=1)),
            "micro_f1": whole,
            "macro_f1": f1.mean(axis=1),
            "weighted_f1": weighted,
        }
        if answers.losses is not None:
            scores["loss"] = means(weights, answers.losses)
        if _has_curves(answers):
            assert answers.probabilities is not None
            scores |= area_statistics(weights, answers.probabilities, truth)
        return scores

    return statistics


def number_statistics(answers: Answers) -> Statistics:
    """Return the scores of numbers, means over the C of them."""
    truth, predicted = answers.truth, answers.predicted
    errors = predicted - truth  # (N, C)

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        squares = [means(weights, column**2) for column in errors.T]
        r2 = [_determination(weights, *pair) for pair in zip(squares, truth.T)]
        columns = list(zip(predicted.T, truth.T))
        pearson = [correlations(weights, *pair) for pair in columns]
        ranked = [[ranks(weights, part) for part in pair] for pair in columns]
        spearman = [correlations(weights, *pair) for pair in ranked]
        return {
            "loss": np.mean(squares, axis=0),
            "rmse": np.mean(np.sqrt(squares), axis=0),
            "mae": means(weights, abs(errors).mean(axis=1)),
            "pearson": _mean_of_defined(pearson),
            "spearman": _mean_of_defined(spearman),
            "r2": _mean_of_defined(r2),
        }

    return statistics


def _determination(weights: np.ndarray, squares: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return R2 (R) of mean squared errors (R) against true numbers (N), NaN where these are equal."""
    centred = truth - truth.mean()  # for the sake of the digits
    square = means(weights, centred**2)
    variance = square - means(weights, centred) ** 2
    varies = variance > 1e-12 * square
    return 1 - np.divide(squares, variance, out=np.full(len(squares), np.nan), where=varies)


def area_statistics(
    weights: np.ndarray, probabilities: np.ndarray, is_true: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the areas under the ROC curve and under precision over recall: means over those
    columns of (N, C) in which a resample has both yes and no.
    """
    columns = [_areas(weights, *pair) for pair in zip(probabilities.T, is_true.T)]
    roc, precision = zip(*columns)
    return {"roc_auc": _mean_of_defined(roc), "average_precision": _mean_of_defined(precision)}


def _areas(weights: np.ndarray, scores: np.ndarray, is_true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both areas (R) for scores (N) of what is true (N) or not; NaN where all or none is."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(scores[order]) != 0))  # of equal scores
    yes, no = (
        np.add.reduceat(weights[:, order] * part[order], starts, axis=1) for part in (is_true, ~is_true)
    )  # (R, groups), from the highest score to the lowest
    yes_so_far, no_so_far = yes.cumsum(axis=1), no.cumsum(axis=1)
    num_yes, num_no = yes_so_far[:, -1].astype(float), no_so_far[:, -1].astype(float)
    undefined = (num_yes == 0) | (num_no == 0)
    num_yes[undefined], num_no[undefined] = np.nan, np.nan
    above = (yes * (num_no[:, None] - no_so_far + no / 2)).sum(axis=1)
    precision = yes_so_far / np.maximum(yes_so_far + no_so_far, 1)
    return above / (num_yes * num_no), (yes * precision).sum(axis=1) / num_yes


def _has_curves(answers: Answers) -> bool:
    return answers.probabilities is not None and answers.probabilities.size <= MOST_NUMBERS


def _one_hot(numbers: np.ndarray, count: int, kept: np.ndarray | None = None):  # noqa: ANN202
    """Return a sparse matrix (N, C) of ones, in those rows that are kept."""
    from scipy.sparse import csr_array

    ones = np.ones(len(numbers)) if kept is None else kept.astype(float)
    return csr_array((ones, (np.arange(len(numbers)), numbers)), shape=(len(numbers), count))


def _f1(right: np.ndarray, having: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Return F1, 0 where it is undefined."""
    total = having + given
    return np.divide(2 * right, total, out=np.zeros(right.shape), where=total > 0)


def _matthews(right: np.ndarray, having: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Return the correlation of Matthews (R) of counts (R, C), 0 where it is undefined."""
    total = having.sum(axis=1)
    covariance = right.sum(axis=1) * total - (having * given).sum(axis=1)
    variances = [total**2 - (part**2).sum(axis=1) for part in (having, given)]
    scale = np.sqrt(variances[0] * variances[1])
    return np.divide(covariance, scale, out=np.zeros(len(scale)), where=scale > 0)


def _mean_of_defined(columns: object) -> np.ndarray:
    """Return the mean (R) of those columns that are defined, NaN where none is."""
    values = np.array(columns)  # (C, R)
    defined = np.isfinite(values)
    count = defined.sum(axis=0)
    total = np.where(defined, values, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
