"""Intervals and tests of differences, against statsmodels and SciPy; the scores of resamples,
against scikit-learn on the texts of each resample.
"""

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from common import intervals
from common.training.resampling import Answers, score_intervals

NUM_ROWS = 60


@pytest.mark.parametrize("successes, count", [(0, 1), (1, 1), (0, 20), (209, 213), (213, 213), (50, 100)])
def test_the_interval_of_a_share_is_wilsons(successes, count):
    expected = proportion_confint(successes, count, method="wilson")
    assert intervals.wilson(successes, count) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("first, second", [(0, 0), (1, 0), (3, 9), (25, 25), (40, 2)])
def test_the_paired_test_is_mcnemars_exact_one(first, second):
    expected = mcnemar([[100, first], [second, 7]], exact=True).pvalue
    assert intervals.mcnemar(first, second) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("p_values", [[0.04], [0.04, 0.01, 0.03], [0.5, 0.5, 0.9, 0.001]])
def test_p_values_are_adjusted_by_holms_method(p_values):
    assert intervals.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)


def test_the_interval_of_a_mean_is_students():
    values = [0.91, 0.93, 0.925, 0.94]
    found = intervals.spread(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found.interval == pytest.approx(expected) and found.deviation == pytest.approx(
        np.std(values, ddof=1)
    )
    assert intervals.spread([0.5]) == intervals.Spread(1, 0.5, None, None)


def test_a_bootstrap_of_a_mean_agrees_with_scipys_and_always_says_the_same():
    values = np.random.default_rng(3).exponential(size=200)
    found = [
        intervals.percentiles(intervals.bootstrap(lambda w: {"m": intervals.means(w, values)}, 200)["m"])
        for _ in range(2)
    ]
    theirs = stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=1)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)


@pytest.mark.parametrize("count", [1, 2, 5, 12, 80])
def test_a_randomization_test_of_a_mean_is_scipys(count):
    """SciPy's is exact up to 12 rows; of one row no difference is significant."""
    gains = np.random.default_rng(count).normal(0.6, 1, count)
    both = np.concatenate([np.zeros(count), gains])
    found = intervals.randomization(
        lambda weights: {"gain": weights @ both / count}, np.ones(count, dtype=int)
    )
    assert found["gain"] == 1 or count > 1
    if count > 1:  # of one, SciPy draws nothing
        theirs = stats.permutation_test((gains,), np.mean, permutation_type="samples", rng=0)
        assert found["gain"] == pytest.approx(theirs.pvalue, abs=0.04)


def with_ties(generator, *shape) -> np.ndarray:
    return generator.integers(0, 9, size=shape) / 10


def single(generator, count: int) -> tuple[Answers, dict]:
    """Return answers of `count` classes, and scikit-learn's scores of some of their rows."""
    truth, guesses = generator.integers(count, size=NUM_ROWS), with_ties(generator, NUM_ROWS, count)
    guesses[np.arange(NUM_ROWS), truth] += 0.3
    losses = generator.random(NUM_ROWS)
    answers = Answers("single", truth, guesses.argmax(1), count, guesses, losses)

    def scores(rows):
        true, said = truth[rows], answers.predicted[rows]
        columns = [1] if count == 2 else [c for c in range(count) if c in true]
        areas = {
            name: np.mean([measure(true == c, guesses[rows, c]) for c in columns])
            for name, measure in (
                ("roc_auc", metrics.roc_auc_score),
                ("average_precision", metrics.average_precision_score),
            )
        }
        f1 = {
            f"{average}_f1": metrics.f1_score(true, said, average=average, zero_division=0)
            for average in ("micro", "macro", "weighted", *(["binary"] if count == 2 else []))
        }
        matthews = metrics.matthews_corrcoef(true, said)
        return (
            {"accuracy": (true == said).mean(), "loss": losses[rows].mean(), "matthews": matthews}
            | f1
            | areas
        )

    return answers, scores


def multi(generator) -> tuple[Answers, dict]:
    guesses = with_ties(generator, NUM_ROWS, 3)
    truth = guesses + generator.normal(0, 0.3, size=guesses.shape) > 0.5
    answers = Answers("multi", truth, guesses >= 0.5, 3, guesses, generator.random(NUM_ROWS))

    def scores(rows):
        true, said = truth[rows], answers.predicted[rows]
        f1 = {
            f"{average}_f1": metrics.f1_score(true, said, average=average, zero_division=0)
            for average in ("micro", "macro", "weighted")
        }
        return f1 | {
            "subset_accuracy": metrics.accuracy_score(true, said),
            "label_accuracy": (true == said).mean(),
            "loss": answers.losses[rows].mean(),
            "roc_auc": metrics.roc_auc_score(true, guesses[rows], average="macro"),
            "average_precision": metrics.average_precision_score(true, guesses[rows], average="macro"),
        }

    return answers, scores


def regression(generator) -> tuple[Answers, dict]:
    truth = with_ties(generator, NUM_ROWS, 2)
    guesses = truth + with_ties(generator, NUM_ROWS, 2)
    answers = Answers("regression", truth, guesses, 2)

    def scores(rows):
        true, said = truth[rows], guesses[rows]
        pairs = list(zip(true.T, said.T))
        return {
            "loss": metrics.mean_squared_error(true, said),
            "mae": metrics.mean_absolute_error(true, said),
            "rmse": np.mean([metrics.root_mean_squared_error(*pair) for pair in pairs]),
            "pearson": np.mean([stats.pearsonr(*pair).statistic for pair in pairs]),
            "spearman": np.mean([stats.spearmanr(*pair).statistic for pair in pairs]),
            "r2": metrics.r2_score(true, said),
        }

    return answers, scores


TASKS = {
    "two classes": lambda generator: single(generator, 2),
    "five classes": lambda generator: single(generator, 5),
    "labels": multi,
    "numbers": regression,
}


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_the_scores_of_a_resample_are_those_of_its_texts(make):
    answers, scores = make(np.random.default_rng(0))
    weights = next(intervals.resamples(NUM_ROWS))[:20]
    found = answers.statistics()(weights)
    for number, counts in enumerate(weights):
        with warnings.catch_warnings(action="ignore"):
            expected = scores(np.repeat(np.arange(NUM_ROWS), counts))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name][number] == pytest.approx(value, abs=1e-9), (name, number)


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_an_interval_holds_the_score_and_that_of_a_share_is_wilsons(make):
    answers, scores = make(np.random.default_rng(1))
    found, whole = score_intervals(answers), scores(np.arange(NUM_ROWS))
    assert found.keys() == whole.keys()
    assert all(low < whole[name] < high for name, (low, high) in found.items())
    share = {"single": "accuracy", "multi": "subset_accuracy"}.get(answers.kind)
    if share is not None:
        right = int(answers.is_right().sum())
        assert found[share] == pytest.approx(proportion_confint(right, NUM_ROWS, method="wilson"))


def test_a_score_that_is_undefined_has_no_interval():
    """One class occurs in the truth: no curve; all numbers are equal: no correlation."""
    ones, half = np.ones(9, int), np.full((9, 2), 0.5)
    found = score_intervals(Answers("single", ones, ones, 2, half))
    assert "roc_auc" not in found
    found = score_intervals(Answers("regression", half, np.arange(18.0).reshape(9, 2), 2))
    assert "pearson" not in found and "rmse" in found


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_no_interval_is_without_width_where_all_answers_are_right(kind):
    """Twelve right answers say that the accuracy is high, and not that it is 1."""
    labels = np.arange(12) % 2
    flags = np.stack([1 - labels, labels], axis=1)
    truth = labels if kind == "single" else flags == 1
    guesses = np.where(flags == 1, 0.9, 0.2)
    found = score_intervals(Answers(kind, truth, truth, 2, guesses, np.linspace(0.1, 0.2, 12)))
    share = "accuracy" if kind == "single" else "subset_accuracy"
    assert found.keys() == {"loss", share, *(["micro_f1"] if kind == "single" else [])}
    assert found[share] == pytest.approx(proportion_confint(12, 12, method="wilson"))
    assert intervals.percentiles(np.full(1000, 0.1) + np.resize([0, 1e-17], 1000)) is None
