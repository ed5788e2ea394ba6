"""The metrics of classification.

Accuracy and macro-F1 are metrics of the `evaluate` library, which adds up batches and combines
metrics. They are defined here because `evaluate.load("accuracy")` downloads a Python script and
runs it. Scores of single classes are plain scikit-learn.
"""

import tempfile

import datasets
import evaluate as evaluate_library
import numpy as np
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

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


def classification_scores(logits: torch.Tensor, labels: torch.Tensor) -> dict:
    """Return loss, accuracy, macro_f1, per_class and confusion of logits (N, C) against labels (N).

    `loss` is the mean cross-entropy. `per_class` holds four lists of length C: precision, recall,
    f1 and support (the number of labels); a score that is undefined is 0. `confusion` is C x C, its
    rows are the true classes.
    """
    predictions, references = logits.argmax(-1).tolist(), labels.tolist()
    classes = range(logits.shape[1])
    # in memory; the library makes a folder all the same, in a home that may not be writable
    with tempfile.TemporaryDirectory() as folder:
        own = [metric(keep_in_memory=True, cache_dir=folder) for metric in (Accuracy, MacroF1)]
        overall = evaluate_library.combine(own).compute(predictions=predictions, references=references)
    measures = precision_recall_fscore_support(references, predictions, labels=classes, zero_division=0)
    per_class = {
        name: np.asarray(values).tolist()
        for name, values in zip(("precision", "recall", "f1", "support"), measures)
    }
    return {
        "loss": torch.nn.functional.cross_entropy(logits.double(), labels).item(),
        **overall,
        "per_class": per_class,
        "confusion": confusion_matrix(references, predictions, labels=classes).tolist(),
    }
