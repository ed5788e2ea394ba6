"""The metrics against scikit-learn and float64."""

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sklearn import metrics as sklearn_metrics

from common.training.metrics import Accuracy, MacroF1, class_scores


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    num_classes=st.integers(2, 6),
    count=st.integers(1, 50),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_scores_equal_scikit_learn(seed, num_classes, count, scale):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, count)
    logits = (generator.standard_normal((count, num_classes)) * scale).astype(np.float32)
    scores = class_scores(
        torch.tensor(logits).double(), torch.tensor(labels), tuple(map(str, range(num_classes)))
    )
    predicted, every_class = logits.argmax(1), list(range(num_classes))
    assert scores["accuracy"] == pytest.approx(np.mean(predicted == labels))
    assert scores["macro_f1"] == pytest.approx(
        sklearn_metrics.f1_score(labels, predicted, average="macro", zero_division=0)
    )
    wide = logits.astype(np.float64)
    assert scores["loss"] == pytest.approx(
        (logsumexp(wide, axis=1) - wide[np.arange(count), labels]).mean(), rel=1e-12
    )
    for name, function in (
        ("precision", sklearn_metrics.precision_score),
        ("recall", sklearn_metrics.recall_score),
    ):
        assert scores["per_class"][name] == pytest.approx(
            function(labels, predicted, labels=every_class, average=None, zero_division=0)
        )
    assert scores["per_class"]["support"] == np.bincount(labels, minlength=num_classes).tolist()
    assert (
        scores["confusion"]
        == sklearn_metrics.confusion_matrix(labels, predicted, labels=every_class).tolist()
    )


def test_they_are_evaluate_metrics_that_can_be_fed_in_batches_and_combined():
    metric = Accuracy(keep_in_memory=True)
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute() == {"accuracy": 2 / 3}
    both = evaluate.combine([Accuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)])
    assert both.compute(predictions=[0, 1, 1], references=[0, 1, 1]) == {"accuracy": 1.0, "macro_f1": 1.0}


def test_a_class_that_never_occurs_has_zeros_and_no_support():
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])
    scores = class_scores(logits, torch.tensor([0, 1]), ("a", "b", "c"))["per_class"]
    assert [scores[name] for name in ("precision", "recall", "f1", "support")] == [
        [1.0, 1.0, 0.0],
        [1.0, 1.0, 0.0],
        [1.0, 1.0, 0.0],
        [1, 1, 0],
    ]
