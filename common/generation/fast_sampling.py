"""The faster twins of the two draws in sampling.py, switched on by one line in generate.py.

`draw_exactly` is kept because it takes a tenth of the time of the plain draw, token for token:
`generate` spends most of a draw on tokens that cannot win. `draw_independently` is kept because it
avoids a full sort and needs only one random number for each row.

Both look at the most likely tokens first, the candidates, and at the whole vocabulary only for the
few rows where that could change the result. Shapes: logits (B, V) in fp32, after the filters that
depend on the tokens so far; candidates (B, C) or (C), most likely first; tokens (B).
"""

import functools
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from common.generation import sampling
from common.generation.sampling import Settings

# The exact draw, without top-k: it looks at about so many tokens, and then at more.
TRIES = (128, 1024)
GROUP = 32  # tokens in a group whose maximum tells whether any of them can be a candidate
# The independent draw: the number of candidates without top-k; with it, k + TIES
CANDIDATES = 1024
# bf16 logits tie at the k-th place in three of four rows, and top-k keeps all that tie
TIES = 64
# the relative difference that another order of summation can make to a sum of 50,000 fp32
# probabilities, with a margin
ROUNDING = 1e-5


# The exact draw -----------------------------------------------------------------------------------


def draw_exactly(logits: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """Return the tokens (B) of `sampling.draw_exactly`, and leave the generator in the same state.

    The noise is computed only for the candidates, from the same random bits. Rows where a rounding
    error or the order of equal logits could decide are drawn again in the plain way.
    """
    if not noise_is_known(logits.device.type):
        return sampling.draw_exactly(logits, settings, generator)
    bits = random_bits(logits.shape, generator)  # (B, V)
    tokens = draw_among_candidates(logits, settings, bits)
    uncertain_rows = [row for row, token in enumerate(tokens) if token is None]
    if uncertain_rows:
        probabilities = sampling.distribution(logits[uncertain_rows], settings)
        quotients = probabilities / noise(bits[uncertain_rows])
        for row, token in zip(uncertain_rows, quotients.argmax(-1).tolist()):
            tokens[row] = token
    return torch.tensor(tokens)


def draw_among_candidates(logits: Tensor, settings: Settings, bits: Tensor) -> list[int | None]:
    """Return for each row the token that is drawn among its candidates; None where a draw from the
    whole vocabulary could give another one.
    """
    keeps_everything = settings.top_k == 0 and settings.top_p == 1 and settings.min_p == 0
    if keeps_everything or settings.typical_p < 1:  # typical need not keep the most likely tokens
        return [None] * len(logits)
    if settings.temperature != 1.0:
        logits = sampling.scale_by_temperature(logits, settings.temperature)
    # NumPy, because each of its calls on a few numbers takes a third of the time of PyTorch's
    return [draw_row(*row, settings) for row in zip(logits.numpy(), bits.numpy())]


def draw_row(logits: np.ndarray, bits: np.ndarray, settings: Settings) -> int | None:
    """Return the token that is drawn among the candidates of one row, from its logits (V) after the
    temperature and its random bits (V); None where that is not certain.
    """
    for count in (settings.top_k,) if settings.top_k else TRIES:
        ids = find_most_likely(logits, count)
        candidate_logits = logits[ids]  # (C)
        if not len(ids) or not np.isfinite(candidate_logits[0]):
            return None  # the logits are not numbers
        weights = np.exp(candidate_logits.astype(np.float64) - candidate_logits[0])
        num_kept = count_kept(logits, candidate_logits, weights, settings)
        if num_kept is None:
            return None
        # If a candidate is removed, no token outside the candidates is kept. All that top-k keeps
        # are candidates.
        if num_kept < len(ids) or settings.top_k or len(ids) == len(logits):
            return draw_kept(ids, candidate_logits, weights, bits, num_kept)
    return None


def find_most_likely(logits: np.ndarray, count: int) -> np.ndarray:
    """Return the ids of the `count` highest of V logits, and of some more, the highest first.

    All logits that are as high as the lowest of them are among them. Where `count` groups have a
    maximum of at least x, `count` logits are at least x: so only the maxima are sorted.
    """
    num_groups = len(logits) // GROUP
    if count >= num_groups:
        return np.argsort(-logits, kind="stable")
    maxima = logits[: num_groups * GROUP].reshape(GROUP, num_groups).max(axis=0)
    lowest = np.partition(maxima, num_groups - count)[num_groups - count]
    ids = np.flatnonzero(logits >= lowest)
    return ids[np.argsort(-logits[ids], kind="stable")]


def count_kept(
    logits: np.ndarray, candidate_logits: np.ndarray, weights: np.ndarray, settings: Settings
) -> int | None:
    """Return how many of the candidates top-k, top-p and min-p keep; None where a rounding error
    could move the border.

    `weights` (C) are the candidates' probabilities, up to a factor. Tokens of equal logits are
    counted as if top-p kept the first of them.
    """
    k, p, share = settings.top_k, settings.top_p, settings.min_p
    num_kept = len(weights)
    if 0 < k < num_kept:
        # those as likely as the k-th one tie with it
        num_kept = int(np.count_nonzero(candidate_logits >= candidate_logits[k - 1]))
    if p < 1:
        # without top-k, tokens that are not candidates have a share of the total too
        total = weights[:num_kept].sum() if k else np.exp(logits - candidate_logits[0]).sum()
        # (C): the probability of all candidates before each one
        before = (weights[:num_kept].cumsum() - weights[:num_kept]) / total
        if (np.abs(before - p) <= ROUNDING).any():
            return None
        num_kept = max(1, int(np.count_nonzero(before < p)))
    if share > 0:
        if (np.abs(weights[:num_kept] - share) <= ROUNDING * share).any():
            return None
        num_kept = int(np.count_nonzero(weights[:num_kept] >= share))
    return num_kept


def draw_kept(
    ids: np.ndarray, candidate_logits: np.ndarray, weights: np.ndarray, bits: np.ndarray, num_kept: int
) -> int | None:
    """Return the token with the largest quotient of probability and noise among the first candidates.

    None in two cases: a rounding error could swap the two largest quotients, or the border separates
    tokens of equal logits and one of them wins. Which of these are kept, only the full sort of the
    plain draw tells.
    """
    border = candidate_logits[num_kept - 1]
    num_tied = int(np.count_nonzero(candidate_logits >= border))  # with all that tie at the border
    quotients = weights[:num_tied] / noise(torch.from_numpy(bits[ids[:num_tied]])).numpy()
    winner = quotients.argmax()
    largest = quotients[winner]
    quotients[winner] = 0
    if quotients.max() >= largest * (1 - ROUNDING):
        return None
    if num_tied > num_kept and candidate_logits[winner] == border:
        return None
    return int(ids[winner])


def random_bits(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return the 64 random bits that `exponential_` would take for each number, and leave the
    generator in the same state as it would.
    """
    lowest = -(2**63)  # and no upper limit (None): all values of an int64
    return torch.empty(shape, dtype=torch.int64).random_(lowest, None, generator=generator)


def noise(bits: Tensor) -> Tensor:
    """Return the fp32 numbers that `exponential_` makes from the same bits.

    They are -log(1 - u), computed in fp64, where u is the lowest 53 bits as a number in [0, 1).
    """
    lowest_bits = bits & (2**53 - 1)
    minus_u = lowest_bits.double().mul_(-(2.0**-53))
    return minus_u.log1p_().neg_().float()


@functools.cache
def noise_is_known(device: str) -> bool:
    """Return whether `noise` is what `exponential_` draws on this type of device.

    It is so on CPUs, as long as PyTorch does not change its method; tested once per process.
    """
    if device != "cpu":
        return False
    ours, theirs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    expected = torch.empty(2, 4096).exponential_(1, generator=theirs)
    same_noise = torch.equal(noise(random_bits(expected.shape, ours)), expected)
    return same_noise and torch.equal(ours.get_state(), theirs.get_state())


# The independent draw -----------------------------------------------------------------------------


def draw_independently(logits: Tensor, settings: Settings, uniforms: Tensor) -> Tensor:
    """Return tokens (B) from the distribution that `sampling.draw_independently` draws from.

    The probabilities are the same, but the tokens differ: the cumulative sum runs over the
    candidates, most likely first, instead of over the vocabulary. Rows that need the whole
    vocabulary are drawn in the plain way, each by itself: whether one row needs it must not change
    the token of another.
    """
    probabilities, ids, complete = candidate_distribution(logits, settings)
    columns = sampling.invert_cumulative(probabilities, uniforms)  # (B)
    tokens = ids.gather(-1, columns[:, None])[:, 0]
    rows = (~complete).nonzero()[:, 0]  # that need the whole vocabulary
    if len(rows):
        tokens[rows] = sampling.draw_independently(logits[rows], settings, uniforms[rows])
    return tokens


def candidate_distribution(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return the candidates' probabilities after all filters and their ids, both (B, C), and for
    which rows (B) they are complete: no other token can be drawn.
    """
    k, p, share = settings.top_k, settings.top_p, settings.min_p
    scaled, candidate_logits, ids = find_candidates(logits, settings)
    last = candidate_logits[:, -1]  # (B): the logit of the least likely candidate
    num_candidates = candidate_logits.shape[-1]
    remaining = replace(settings, temperature=1.0)  # the filters that are still to be applied
    complete = torch.full_like(last, num_candidates == scaled.shape[-1], dtype=torch.bool)
    if k:
        complete |= last < candidate_logits[:, min(k, num_candidates) - 1]
    elif p < 1:
        probabilities = (candidate_logits - scaled.logsumexp(-1, keepdim=True)).exp()
        complete |= probabilities.sum(-1) > p
        removed = probabilities.cumsum(-1) - probabilities >= p
        removed[:, 0] = False  # the most likely token is kept in any case
        candidate_logits = candidate_logits.masked_fill(removed, -torch.inf)
        remaining = replace(remaining, top_p=1.0)
    elif share > 0:
        complete |= last < candidate_logits[:, 0] + math.log(share)
    return sampling.distribution(candidate_logits, remaining), ids, complete


def find_candidates(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits (B, V) after the temperature, and the candidates' logits and ids (B, C).

    Sorting 50,000 logits takes 4 ms on one core, finding the 1,024 highest 0.8 ms.
    """
    scaled = logits
    if settings.temperature != 1.0:
        scaled = sampling.scale_by_temperature(logits, settings.temperature)
    count = settings.top_k + TIES if settings.top_k else CANDIDATES
    candidate_logits, ids = scaled.topk(min(count, scaled.shape[-1]))
    return scaled, candidate_logits, ids
