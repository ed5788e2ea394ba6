"""Whether a model is as sure as it is right: the expected calibration error, and one
temperature that makes up for a model that is too sure or too modest (Guo et al. 2017, "On
Calibration of Modern Neural Networks").

The probability of what is predicted is compared with how often that is right; of several labels,
the probability of each label with how often texts have it. In the letters of the shapes: M
decisions, N texts, C classes or labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from common.training.resampling import Answers
from common.training.run import SINGLE, Kind

NUM_BINS = 15
LARGEST_TEMPERATURE = 50.0  # its inverse is the smallest: beyond, all answers are guesses, or sure


class Bin(NamedTuple):
    """The decisions whose probability lies in a part of 0 to 1: their mean probability, the share
    of them that is right, and how many they are.
    """

    probability: float
    share: float
    num_decisions: int


def decisions(answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of each decision (M), and whether it is right (M)."""
    assert answers.probabilities is not None
    if answers.kind == SINGLE:
        return answers.probabilities.max(axis=1), answers.is_right()
    return answers.probabilities.ravel(), answers.truth.ravel()


def reliability(probabilities: np.ndarray, is_right: np.ndarray) -> list[Bin]:
    """Return the bins, of the same width, that are not empty, from low to high probability (M)."""
    numbers = np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1)
    chosen = (numbers == number for number in range(NUM_BINS))
    return [
        Bin(float(probabilities[own].mean()), float(is_right[own].mean()), int(own.sum()))
        for own in chosen
        if own.any()
    ]


def calibration_error(bins: list[Bin]) -> float:
    """Return the expected calibration error: by how much probability and share differ in a bin, on
    average over all decisions.
    """
    total = sum(one.num_decisions for one in bins)
    return sum(one.num_decisions * abs(one.probability - one.share) for one in bins) / total


def fit_temperature(logits: np.ndarray, truth: np.ndarray, kind: Kind) -> float:
    """Return the temperature by which logits (N, C) are divided so that their loss against the
    classes (N) or labels (N, C) of the same texts is least.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        if kind == SINGLE:
            return -log_softmax(scaled, axis=1)[np.arange(len(truth)), truth].mean()
        return (np.logaddexp(0, scaled) - truth * scaled).mean()

    limit = np.log(LARGEST_TEMPERATURE)
    found = minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def moved_thresholds(thresholds: list[float], temperature: float) -> list[float]:
    """Return the thresholds (C) at which the same texts have a label when logits are divided by a
    temperature.
    """
    from scipy.special import expit, logit

    return expit(logit(np.asarray(thresholds)) / temperature).tolist()
