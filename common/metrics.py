"""`evaluate.Metric` subclasses over scikit-learn and rouge_score.

`evaluate.load("accuracy")` downloads a Python script and runs it; these are the same interface
without network and without foreign code. Make them with `keep_in_memory=True`: nothing is then
written to the metrics cache.
"""

import statistics

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
STRINGS = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
INTEGERS = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})


def _info(description: str, features: datasets.Features = INTEGERS) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(description=description, citation="", inputs_description="", features=features)


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
