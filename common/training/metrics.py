"""The metrics of classes, labels and numbers.

They are those of scikit-learn and scipy. Accuracy and macro-F1 are metrics of the `evaluate`
library, which adds up batches and combines metrics. They are defined here because
`evaluate.load("accuracy")` downloads a Python script and runs it.

A score that is not defined, such as the area under a curve for a class that no text has, is left
out. In the letters of the shapes: N texts, C classes, labels or numbers.
"""

import tempfile
import warnings
from collections.abc import Callable
from typing import Any, Literal

import datasets
import evaluate as evaluate_library
import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn import metrics as sklearn_metrics
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    r2_score,
)

from common.training.run import MULTI, SINGLE
from common.training.task import Scoring, Task

NUMBER = datasets.Value("int64")
FEATURES = datasets.Features({"predictions": NUMBER, "references": NUMBER})


class Accuracy(evaluate_library.Metric):
    """The share of predictions that equal their reference."""

    def _info(self) -> evaluate_library.MetricInfo:
        return _metric_info(self.__doc__)

    # pyrefly: ignore [bad-override]  (the library calls it with just these two)
    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(evaluate_library.Metric):
    """The unweighted mean F1 of all classes that occur in the references or the predictions."""

    def _info(self) -> evaluate_library.MetricInfo:
        return _metric_info(self.__doc__)

    # pyrefly: ignore [bad-override]  (the library calls it with just these two)
    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


def _metric_info(description: str | None) -> evaluate_library.MetricInfo:
    return evaluate_library.MetricInfo(
        description=description or "", citation="", inputs_description="", features=FEATURES
    )


def compute_scores(task: Task, logits: torch.Tensor, targets: torch.Tensor, scoring: Scoring) -> dict:
    """Return all scores of logits (N, C) against targets (N) or (N, C), by the names of
    `common.training.run.SCORES`, and what is known of each class, label or number.
    """
    logits = logits.double()
    if task.kind == SINGLE:
        return class_scores(logits, targets, task.names, scoring.positive_class)
    if task.kind == MULTI:
        return label_scores(logits, targets.double(), scoring.threshold)
    return number_scores(logits, targets.double())


# One class of several -----------------------------------------------------------------------------


def class_scores(
    logits: torch.Tensor, labels: torch.Tensor, names: tuple[str, ...], positive_class: str | None = None
) -> dict:
    """Return the scores of logits (N, C) against the numbers of
    classes (N), `per_class`, `confusion`.

    `loss` is the mean cross-entropy. Of two classes, `binary_f1`, `roc_auc` and
    `average_precision` are those of the positive class; of more, the latter two are means over the
    classes, each against the rest. `per_class` holds lists of length C: precision, recall, f1 and
    support (the number of labels); a score that is undefined there is 0. `confusion` is C x C, its
    rows are the true classes.
    """
    predictions, references = logits.argmax(-1).tolist(), labels.tolist()
    classes = range(logits.shape[1])
    # in memory; the library makes a folder all the same, in a home that may not be writable
    with tempfile.TemporaryDirectory() as folder:
        own = [metric(keep_in_memory=True, cache_dir=folder) for metric in (Accuracy, MacroF1)]
        overall = evaluate_library.combine(own).compute(predictions=predictions, references=references)
    for average in ("micro", "weighted"):
        overall[f"{average}_f1"] = float(f1_score(references, predictions, average=average, zero_division=0))
    measures = precision_recall_fscore_support(references, predictions, labels=classes, zero_division=0)
    per_class = {
        name: np.asarray(values).tolist()
        for name, values in zip(("precision", "recall", "f1", "support"), measures)
    }
    positive = names.index(positive_class) if positive_class is not None else 1
    if positive_class is not None or len(classes) == 2:
        overall["binary_f1"] = per_class["f1"][positive]
    with warnings.catch_warnings(action="ignore"):  # that all are of one class: it is 0 then
        overall["matthews"] = float(sklearn_metrics.matthews_corrcoef(references, predictions))
    probabilities = logits.softmax(-1).numpy()
    has_class = np.asarray(references)[:, None] == np.asarray(classes)  # (N, C)
    chosen = [positive] if len(classes) == 2 else list(classes)
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        **overall,
        **areas(probabilities[:, chosen], has_class[:, chosen]),
        "per_class": per_class,
        "confusion": confusion_matrix(references, predictions, labels=classes).tolist(),
    }


def areas(probabilities: np.ndarray, is_true: np.ndarray) -> dict[str, float]:
    """Return the areas under the ROC curve, `roc_auc`, and under precision over recall,
    `average_precision`: means over those columns of (N, C) in which both yes and no occur, {} if
    there are none, or if the model's answers are not numbers, of which the loss tells.
    """
    if not np.isfinite(probabilities).all():
        return {}
    share = is_true.mean(axis=0)
    defined = (share > 0) & (share < 1)
    if not defined.any():
        return {}
    truth, scores = is_true[:, defined], probabilities[:, defined]
    return {
        "roc_auc": float(sklearn_metrics.roc_auc_score(truth, scores, average="macro")),
        "average_precision": float(sklearn_metrics.average_precision_score(truth, scores, average="macro")),
    }


# Several labels -----------------------------------------------------------------------------------


def label_scores(
    logits: torch.Tensor, targets: torch.Tensor, threshold: float | tuple[float, ...] | Literal["auto"] = 0.5
) -> dict:
    """Return the scores of logits (N, C) against targets (N, C), 1 for each label that a text has.

    `loss` is the mean binary cross-entropy. `subset_accuracy` is the share of texts whose labels
    are all right, `label_accuracy` that of single decisions. `per_class` holds lists of length C:
    threshold, precision, recall, f1, accuracy, average_precision (None where undefined), support
    (texts with the label), missed and false_alarms (texts).
    """
    probabilities, truth = logits.sigmoid().numpy(), targets.numpy() > 0.5
    thresholds = chosen_thresholds(threshold, probabilities, truth)
    predicted = probabilities >= thresholds
    hits, support = (truth & predicted).sum(axis=0), truth.sum(axis=0)  # (C)
    false_alarms = (predicted & ~truth).sum(axis=0)
    f1 = _share(2 * hits, support + hits + false_alarms)
    each = [areas(probabilities[:, [label]], truth[:, [label]]) for label in range(truth.shape[1])]
    per_class = {
        "threshold": thresholds,
        "precision": _share(hits, hits + false_alarms),
        "recall": _share(hits, support),
        "f1": f1,
        "accuracy": (predicted == truth).mean(axis=0),
        "support": support,
        "missed": support - hits,
        "false_alarms": false_alarms,
    }
    return {
        "loss": F.binary_cross_entropy_with_logits(logits, targets).item(),
        "subset_accuracy": float((predicted == truth).all(axis=1).mean()),
        "label_accuracy": float((predicted == truth).mean()),
        "micro_f1": float(_share(2 * hits.sum(), support.sum() + hits.sum() + false_alarms.sum())),
        "macro_f1": float(f1.mean()),
        "weighted_f1": float(_share((f1 * support).sum(), support.sum())),
        **areas(probabilities, truth),
        "per_class": {
            **{name: values.tolist() for name, values in per_class.items()},
            "average_precision": [area.get("average_precision") for area in each],
        },
    }


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, 0 where there is nothing of which it could be a part."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def chosen_thresholds(
    threshold: float | tuple[float, ...] | Literal["auto"], probabilities: np.ndarray, truth: np.ndarray
) -> np.ndarray:
    """Return the threshold of each label (C): one for all, one of each, or the best ones."""
    if threshold == "auto":
        return best_thresholds(probabilities, truth)
    return np.broadcast_to(np.asarray(threshold, float), truth.shape[1:])


def best_thresholds(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return for each label the threshold (C) of the highest F1 on texts with probabilities and
    truth (N, C): in the middle between two probabilities; of equally good ones the nearest to 0.5,
    which it is too for a label that all or no texts have.
    """
    return np.array([_best_threshold(column, true) for column, true in zip(probabilities.T, truth.T)])


def _best_threshold(probabilities: np.ndarray, truth: np.ndarray) -> float:
    if truth.all() or not truth.any():
        return 0.5
    order = np.argsort(-probabilities, kind="stable")
    ranked = probabilities[order]
    hits = np.cumsum(truth[order])  # if all texts up to this one have the label
    # only between different probabilities can a threshold lie
    ends = np.flatnonzero(np.append(ranked[:-1] > ranked[1:], True))
    f1 = 2 * hits[ends] / (ends + 1 + truth.sum())
    best = ends[np.isclose(f1, f1.max(), rtol=1e-12, atol=0)]
    above, below = ranked[best], np.append(ranked, 0.0)[best + 1]
    middle = np.where((above + below) / 2 > below, (above + below) / 2, above)
    # 0.5 itself, where it lies between the two
    candidates = np.where((below < 0.5) & (above >= 0.5), 0.5, middle)
    return float(candidates[np.argmin(abs(candidates - 0.5))])


# Numbers ------------------------------------------------------------------------------------------


def number_scores(outputs: torch.Tensor, targets: torch.Tensor) -> dict:
    """Return the scores of outputs (N, C) against targets (N, C): means over the C numbers, and
    `per_number`, lists of length C.

    `loss` is the mean squared error, `rmse` the root of that of each number, `mae` the mean
    absolute error; `pearson` and `spearman` are correlations, which are undefined (None) where all
    outputs or all targets are equal; `r2` is the coefficient of determination, undefined where all
    targets are equal.
    """
    answers, truth = outputs.numpy(), targets.numpy()
    errors = answers - truth
    columns = list(zip(answers.T, truth.T))
    per_number = {
        "rmse": np.sqrt((errors**2).mean(axis=0)).tolist(),
        "mae": abs(errors).mean(axis=0).tolist(),
        "pearson": [_correlation(stats.pearsonr, *column) for column in columns],
        "spearman": [_correlation(stats.spearmanr, *column) for column in columns],
        "r2": [_determination(*column) for column in columns],
    }
    defined = {name: [value for value in values if value is not None] for name, values in per_number.items()}
    return {
        "loss": float((errors**2).mean()),
        **{name: float(np.mean(values)) for name, values in defined.items() if values},
        "per_number": per_number,
    }


def _correlation(measure: Callable[..., Any], answers: np.ndarray, truth: np.ndarray) -> float | None:
    if len(truth) < 2 or np.ptp(answers) == 0 or np.ptp(truth) == 0:
        return None
    with warnings.catch_warnings(action="ignore"):  # that numbers are nearly equal
        value = float(measure(answers, truth)[0])
    return value if np.isfinite(value) else None


def _determination(answers: np.ndarray, truth: np.ndarray) -> float | None:
    return float(r2_score(truth, answers)) if np.ptp(truth) > 0 else None
