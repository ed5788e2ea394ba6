"""The faster twins of the two draws in sampling.py, switched on by one line in generate.py.

`draw_exactly` is kept because it makes 16 texts in bf16 1.3 times as fast as `model.generate`,
token for token: `generate` spends most of a draw on tokens that cannot win. `draw_independently`
is kept because it avoids a full sort and needs only one random number for each row.

Both look at the most likely tokens first, the candidates, and at the whole vocabulary only for the
few rows where that could change the result. Shapes: logits (B, V) in fp32, after the filters that
depend on the tokens so far; candidates (B, C), most likely first; tokens (B).
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.generation import sampling
from common.generation.sampling import Settings

CANDIDATES = 1024  # their number without top-k; with it, k + TIES
# bf16 logits tie at the k-th place in three of four rows, and top-k keeps all that tie
TIES = 64
# the relative difference that another order of summation can make to a sum of 50,000 fp32
# probabilities, with a margin
ROUNDING = 1e-5


def draw_exactly(logits: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """Return the tokens (B) of `sampling.draw_exactly`, and leave the generator in the same state.

    The noise is computed only for the candidates, from the same random bits. Rows where a rounding
    error or the order of equal logits could decide are drawn again in the plain way.
    """
    if not noise_is_known(logits.device.type):
        return sampling.draw_exactly(logits, settings, generator)
    bits = random_bits(logits.shape, generator)  # (B, V)
    tokens, certain = draw_among_candidates(logits, settings, bits)
    uncertain_rows = (~certain).nonzero()[:, 0]
    if len(uncertain_rows):
        probabilities = sampling.distribution(logits[uncertain_rows], settings)
        quotients = probabilities / noise(bits[uncertain_rows])
        tokens[uncertain_rows] = quotients.argmax(-1)
    return tokens


def draw_among_candidates(logits: Tensor, settings: Settings, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens (B) drawn among the candidates, and for which rows (B) they are certain: a draw
    from the whole vocabulary gives the same token.

    A row is uncertain in three cases. The candidates do not include everything that the filters
    keep. A rounding error could move the border of what is kept, or swap the two largest quotients.
    Or the limit of top-p separates tokens of equal logits and one of them wins: which of them are
    kept, only the full sort of the plain draw tells.
    """
    keeps_everything = settings.top_k == 0 and settings.top_p == 1 and settings.min_p == 0
    if keeps_everything or settings.typical_p < 1:  # typical need not keep the most likely tokens
        placeholders = torch.zeros(len(logits), dtype=torch.long)
        return placeholders, torch.zeros(len(logits), dtype=torch.bool)
    scaled, candidate_logits, ids = find_candidates(logits, settings)
    border = find_border(scaled, candidate_logits, settings)
    certain = border.certain  # (B, 1)
    if candidate_logits.shape[-1] < scaled.shape[-1]:
        # where the last candidate is removed, no token outside the candidates is kept
        certain &= candidate_logits[:, -1:] < border.lowest_kept
    weights = border.weights.masked_fill(candidate_logits < border.lowest_kept, 0.0)
    quotients = weights / noise(bits.gather(-1, ids))  # (B, C)
    best = quotients.topk(min(2, quotients.shape[-1]))
    winner = best.indices[:, :1]  # (B, 1), a column of the candidates
    largest, second = best.values[:, :1], best.values[:, 1:]  # second: (B, 0) if C is 1
    certain &= (second < largest * (1 - ROUNDING)).all(-1, keepdim=True)
    wins_at_border = candidate_logits.gather(-1, winner) == border.lowest_kept  # (B, 1)
    certain &= ~(border.splits_ties & wins_at_border)
    return ids.gather(-1, winner)[:, 0], certain[:, 0]


@dataclass(frozen=True)
class Border:
    """Where top-k, top-p and min-p cut off the candidates of each row."""

    weights: Tensor  # (B, C): the probabilities, up to a factor that all tokens of a row share
    lowest_kept: Tensor  # (B, 1): the lowest logit that is kept
    certain: Tensor  # (B, 1): whether no rounding error can move the border
    splits_ties: Tensor  # (B, 1): whether top-p keeps only some of those that tie at the border


def find_border(scaled: Tensor, candidate_logits: Tensor, settings: Settings) -> Border:
    """Return the border among the candidates' logits (B, C), which are the highest of `scaled`
    (B, V), all logits after the temperature.
    """
    k, p, share = settings.top_k, settings.top_p, settings.min_p
    highest = candidate_logits[:, :1]  # (B, 1)
    weights = (candidate_logits - highest).exp()  # (B, C)
    certain = torch.ones_like(highest, dtype=torch.bool)
    splits_ties = torch.zeros_like(certain)
    lowest_kept = torch.full_like(highest, -torch.inf)
    if k:
        kth = min(k, candidate_logits.shape[-1]) - 1
        lowest_kept = candidate_logits[:, kth, None]
    if p < 1:
        weights = weights.masked_fill(candidate_logits < lowest_kept, 0.0)
        # without top-k, tokens that are not candidates have a share of the total too
        kept_by_top_k = weights if k else (scaled - highest).exp()
        total = kept_by_top_k.sum(-1, keepdim=True)
        # (B, C): the probability of all candidates before each one
        before = (weights.cumsum(-1) - weights) / total
        kept = (before < p) & (candidate_logits >= lowest_kept)
        last_kept = kept.sum(-1, keepdim=True) - 1  # (B, 1), a column of the candidates
        lowest_kept = candidate_logits.gather(-1, last_kept)
        splits_ties = ((candidate_logits == lowest_kept) & ~kept).any(-1, keepdim=True)
        certain &= ((before - p).abs() > ROUNDING).all(-1, keepdim=True)
    if share > 0:
        certain &= ((weights / share - 1).abs() > ROUNDING).all(-1, keepdim=True)
        kept_logits = candidate_logits.masked_fill(weights < share, torch.inf)
        lowest_kept = torch.maximum(lowest_kept, kept_logits.amin(-1, keepdim=True))
    return Border(weights, lowest_kept, certain, splits_ties)


def find_candidates(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits (B, V) after the temperature, and the candidates' logits and ids (B, C).

    Sorting 50,000 logits takes 4 ms on one core, finding the 1,024 highest 0.1 ms.
    """
    scaled = logits
    if settings.temperature != 1.0:
        scaled = sampling.scale_by_temperature(logits, settings.temperature)
    count = settings.top_k + TIES if settings.top_k else CANDIDATES
    candidate_logits, ids = scaled.topk(min(count, scaled.shape[-1]))
    return scaled, candidate_logits, ids


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
        before = probabilities.cumsum(-1) - probabilities
        candidate_logits = candidate_logits.masked_fill(before >= p, -torch.inf)
        remaining = replace(remaining, top_p=1.0)
    elif share > 0:
        complete |= last < candidate_logits[:, 0] + math.log(share)
    return sampling.distribution(candidate_logits, remaining), ids, complete
