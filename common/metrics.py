"""`evaluate.Metric` subclasses over scikit-learn and rouge_score.

`evaluate.load("accuracy")` downloads a Python script and runs it; these are the same interface
without network and without foreign code. Make them with `keep_in_memory=True`: nothing is then
written to the metrics cache.
"""

import statistics

import datasets
import evaluate
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
STRINGS = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
INTEGERS = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})


def _info(description: str, features: datasets.Features = INTEGERS) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(description=description, citation="", inputs_description="", features=features)


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their reference."""

    def _info(self):
        return _info(self.__doc__)

    def _compute(self, predictions, references):
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(evaluate.Metric):
    """The unweighted mean of the F1 of the classes that occur in the references or the
    predictions.
    """

    def _info(self):
        return _info(self.__doc__)

    def _compute(self, predictions, references):
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


class PerClass(evaluate.Metric):
    """Precision, recall, F1 and number of references of each of `num_classes` classes; 0 where
    undefined.
    """

    def _info(self):
        return _info(self.__doc__)

    def _compute(self, predictions, references, num_classes):
        scores = precision_recall_fscore_support(
            references, predictions, labels=range(num_classes), zero_division=0
        )
        return {
            name: values.tolist() for name, values in zip(("precision", "recall", "f1", "support"), scores)
        }


class Rouge(evaluate.Metric):
    """The mean F1 over all texts of the overlap with their references: words, pairs of words,
    longest common subsequence (Lin 2004).

    ROUGE-Lsum takes the subsequence of each line of a text by itself. `evaluate.load("rouge")`
    draws samples of the texts around the same mean.
    """

    def _info(self):
        return _info(self.__doc__, STRINGS)

    def _compute(self, predictions, references):
        scorer = RougeScorer(ROUGE_TYPES)
        scores = [
            scorer.score(reference, prediction) for prediction, reference in zip(predictions, references)
        ]
        return {name: statistics.fmean(score[name].fmeasure for score in scores) for name in ROUGE_TYPES}


def classification_scores(logits: torch.Tensor, labels: torch.Tensor) -> dict:
    """Return loss, accuracy, macro_f1, per_class and confusion of logits (N, C) against labels
    (N).

    `loss` is the mean cross-entropy; `per_class` holds four lists of length C; `confusion` is C x
    C, rows are the true classes.
    """
    predictions, num_classes = logits.argmax(-1), logits.shape[1]
    pair = {"predictions": predictions.tolist(), "references": labels.tolist()}
    overall = evaluate.combine([Accuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)])
    return {
        "loss": torch.nn.functional.cross_entropy(logits.double(), labels).item(),
        **overall.compute(**pair),
        "per_class": PerClass(keep_in_memory=True).compute(**pair, num_classes=num_classes),
        "confusion": confusion_matrix(labels, predictions, labels=range(num_classes)).tolist(),
    }
