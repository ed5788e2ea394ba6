"""How sure a number is: intervals around a score, and tests of a difference between two.

All of them are of 95 %. A bootstrap draws the rows of a split again with replacement, always with
the same seed, so that a report says the same when it is made again. A resample is a row of whole
numbers (N): how often it has each of the N rows; R resamples are an array (R, N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES, SEED = 1000, 0
BLOCK_BYTES = 2**26  # of resamples at a time
Interval = tuple[float, float]


def wilson(successes: int, count: int) -> Interval:
    """Return Wilson's interval of a share, `successes` of `count`: it also holds near 0 and 1."""
    from scipy.stats import binomtest

    interval = binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Spread:
    """The mean of some values, their standard deviation, and the interval of the mean by Student's
    t; of one value there is no spread (None).
    """

    count: int
    mean: float
    deviation: float | None
    interval: Interval | None


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of values, such as the scores of several seeds."""
    from scipy.stats import t

    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Spread(count, mean, None, None)
    deviation = float(np.std(values, ddof=1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return Spread(count, mean, deviation, (mean - half, mean + half))


def resamples(num_rows: int) -> Iterator[np.ndarray]:
    """Yield the resamples of `num_rows` rows in blocks (R, N)."""
    generator = np.random.default_rng(SEED)
    for number in _block_sizes(num_rows):
        rows = generator.integers(num_rows, size=(number, num_rows))
        rows += num_rows * np.arange(number)[:, None]  # each resample counts on its own
        yield np.bincount(rows.ravel(), minlength=number * num_rows).reshape(number, num_rows)


def _block_sizes(num_rows: int) -> Iterator[int]:
    size = max(1, min(RESAMPLES, BLOCK_BYTES // (8 * num_rows)))
    for start in range(0, RESAMPLES, size):
        yield min(size, RESAMPLES - start)


def bootstrap(
    statistics: Callable[[np.ndarray], dict[str, np.ndarray]], num_rows: int
) -> dict[str, np.ndarray]:
    """Return the statistics (R) of resamples; `statistics` computes those of a block."""
    blocks = [statistics(block) for block in resamples(num_rows)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def percentiles(values: np.ndarray) -> Interval | None:
    """Return the interval of bootstrapped values (R), None if most of them are undefined (NaN).

    None too where it has no width, as where all answers are right: every resample of them is, and so
    they don't tell how many of other texts would be wrong.
    """
    defined = values[np.isfinite(values)]
    if len(defined) < len(values) / 2:
        return None
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return None if math.isclose(low, high, abs_tol=1e-12) else (float(low), float(high))


# Differences --------------------------------------------------------------------------------------


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value of McNemar's exact test for two systems on the same rows, of which
    `only_first` were right by the first alone and `only_second` by the second alone.
    """
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return 1.0 if discordant == 0 else float(binomtest(only_first, discordant, 0.5).pvalue)


def randomization(
    scores: Callable[[np.ndarray], dict[str, np.ndarray]], counts: np.ndarray
) -> dict[str, float]:
    """Return the two-sided p-values of the differences between two systems by approximate randomization:
    how often they are as large when answers are exchanged at random (Noreen 1989; Yeh 2000, "More
    accurate tests for the statistical significance of result differences").

    `counts` are the numbers of equal rows (N). `scores` returns those (R) of systems that give the
    answers of both, the first one's before the other's, as often as a block (R, 2 N) says. Of few rows
    it is as careful as McNemar's test, where a bootstrap would call chance significant.
    """

    def differences(exchanged: np.ndarray) -> dict[str, np.ndarray]:
        kept = counts - exchanged
        before, after = scores(np.hstack([kept, exchanged])), scores(np.hstack([exchanged, kept]))
        return {name: after[name] - before[name] for name in before}

    generator = np.random.default_rng(SEED)
    blocks = [
        differences(generator.binomial(counts, 0.5, size=(size, len(counts))))
        for size in _block_sizes(2 * len(counts))
    ]
    p_values = {}
    for name, (observed,) in differences(np.zeros((1, len(counts)), dtype=int)).items():
        drawn = np.concatenate([block[name] for block in blocks])
        is_smaller = abs(drawn) < abs(observed) - 1e-12  # what is undefined is not
        p_values[name] = (int((~is_smaller).sum()) + 1) / (len(drawn) + 1)
    return p_values


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's method."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = highest
    return adjusted


# Statistics of resamples, in training and in search ----------------------------------------------


def means(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean (R) of values (N) in each resample (R, N)."""
    return weights @ values / weights.sum(axis=1)


def correlations(weights: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation (R) of values (N) or (R, N) in each resample
    (R, N), NaN where it is not defined.
    """
    total = weights.sum(axis=1, keepdims=True)
    deviations = [
        part - np.sum(weights * part, axis=1, keepdims=True) / total for part in (first, second)
    ]  # (R, N)
    covariance, *variances = (
        np.sum(weights * one * other, axis=1)
        for one, other in (deviations, [deviations[0]] * 2, [deviations[1]] * 2)
    )
    scale = np.sqrt(variances[0] * variances[1])
    return np.divide(covariance, scale, out=np.full(len(scale), np.nan), where=scale > 1e-300)


def ranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the rank (R, N) of values (N) within each resample (R, N): equal ones have their mean
    rank, so that Spearman's correlation is Pearson's of the ranks.
    """
    _, group = np.unique(values, return_inverse=True)  # (N), in the order of the values
    counts = np.zeros((len(weights), group.max() + 1))
    for row in range(len(weights)):
        counts[row] = np.bincount(group, weights[row], minlength=counts.shape[1])
    last = counts.cumsum(axis=1)
    return (last - (counts - 1) / 2)[:, group]
