"""Calibration against scikit-learn: its temperature, and its curve of how often probabilities are
right; and the axis of validation scores.
"""

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.calibration import _TemperatureScaling, calibration_curve
from statsmodels.stats.proportion import proportion_confint

from common import figures
from common.training import calibration
from common.training.resampling import Answers


def too_sure(generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits (500, C) three times as large as those by which the classes (500) were drawn."""
    logits = generator.normal(0, 1.5, size=(500, count))
    truth = (logits + generator.gumbel(size=logits.shape)).argmax(1)
    return 3 * logits, truth


@pytest.mark.parametrize("count", [2, 5])
def test_the_temperature_of_classes_is_scikit_learns_and_gives_back_the_one_that_was_hidden(count):
    logits, truth = too_sure(np.random.default_rng(count), count)
    found = calibration.fit_temperature(logits, truth, "single")
    theirs = 1 / _TemperatureScaling().fit(logits, truth).beta_
    assert found == pytest.approx(theirs, rel=1e-3) and 2.2 < found < 4.2


def test_the_temperature_of_labels_is_least_in_loss_and_leaves_decisions_as_they_were():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, size=(400, 3))
    truth = (generator.random(logits.shape) < expit(logits / 2)).astype(float)
    found = calibration.fit_temperature(logits, truth, "multi")

    def loss(temperature):
        return -np.mean(
            truth * np.log(expit(logits / temperature)) + (1 - truth) * np.log(expit(-logits / temperature))
        )

    assert loss(found) < min(loss(found * 1.01), loss(found / 1.01), loss(1.0))
    thresholds = [0.2, 0.5, 0.0]
    moved = calibration.moved_thresholds(thresholds, found)
    assert moved[1:] == [0.5, 0.0]
    assert np.array_equal(expit(logits / found) >= moved, expit(logits) >= thresholds)


def test_the_bins_are_those_of_scikit_learn_and_the_error_is_their_mean():
    logits, truth = too_sure(np.random.default_rng(7), 3)
    probabilities = softmax(logits, axis=1)
    answers = Answers("single", truth, logits.argmax(1), 3, probabilities)
    confidence, is_right = calibration.decisions(answers)
    assert np.array_equal(confidence, probabilities.max(1)) and np.array_equal(
        is_right, logits.argmax(1) == truth
    )
    bins = calibration.reliability(confidence, is_right)
    shares, means = calibration_curve(is_right, confidence, n_bins=15)
    assert [one.share for one in bins] == pytest.approx(shares.tolist())
    assert [one.probability for one in bins] == pytest.approx(means.tolist())
    assert sum(one.num_decisions for one in bins) == 500
    error = sum(one.num_decisions * abs(one.share - one.probability) for one in bins) / 500
    assert calibration.calibration_error(bins) == pytest.approx(error) and error > 0.1
    truth = probabilities > 0.5
    labels = calibration.decisions(Answers("multi", truth, truth, 3, probabilities))
    assert [len(part) for part in labels] == [1500, 1500]
    assert calibration.reliability(np.array([0.0, 1.0]), np.array([False, True]))[-1].num_decisions == 1


def test_the_picture_shows_how_little_the_share_of_few_decisions_says():
    bins = [(0.7, 2 / 3, 3), (0.9, 0.0, 1), (0.95, 190 / 200, 200)]
    figure = figures.reliability(bins, called=("confidence", "share"))
    (lines,) = figure.axes[0].containers[0].lines[2]
    ends = [(low, high) for (_, low), (_, high) in lines.get_segments()]
    expected = [
        proportion_confint(right, count, method="wilson") for right, count in ((2, 3), (0, 1), (190, 200))
    ]
    assert np.allclose(ends, expected)
    figures.plt.close(figure)


@pytest.mark.parametrize(
    "values, least, is_wide",
    [([0.97, 0.975, 0.97], 20 / 213, True), ([0.4, 0.9], 20 / 213, False), ([0.9], 1.0, True)],
)
def test_the_axis_of_scores_does_not_magnify_a_single_text(values, least, is_wide):
    epochs = [
        {"epoch": number, "train_loss": 1.0, "loss": 1.0, "accuracy": value}
        for number, value in enumerate(values, start=1)
    ]
    figure = figures.learning_curve(epochs, 1, {"accuracy": "accuracy"}, least=least)
    low, high = figure.axes[1].get_ylim()
    figures.plt.close(figure)
    assert low <= min(values) and high >= max(values)
    if is_wide:
        assert high - low == pytest.approx(least) and high <= max(1.0, max(values) + 0.05)
    else:
        assert high - low > least
