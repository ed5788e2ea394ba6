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

CANDIDATES = 1024  # number of candidates where top-k does not say it
# candidates beyond top-k: in three of four rows, bf16 logits tie at the k-th place, and top-k
# keeps all that tie
TIES = 64
# how much the order of a sum over 50,000 fp32 probabilities can change it (relative), with a margin
ROUNDING = 1e-5


def draw_exactly(logits: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """Return the tokens (B) of `sampling.draw_exactly`, and leave the generator in the same state.

    The noise is made only for the candidates, from the same random bits. Rows where a rounding
    error or the order of equal logits could decide are drawn again in the plain way.
    """
    if not noise_is_known(logits.device.type):
        return sampling.draw_exactly(logits, settings, generator)
    bits = random_bits(logits.shape, generator)  # (B, V)
    tokens, certain = draw_among_likeliest(logits, settings, bits)
    rows = (~certain).nonzero()[:, 0]
    if len(rows):
        probabilities = sampling.distribution(logits[rows], settings)
        tokens[rows] = (probabilities / noise(bits[rows])).argmax(-1)
    return tokens


def draw_among_likeliest(logits: Tensor, settings: Settings, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens (B) drawn among the candidates, and whether each is certainly the token (B) of
    a draw from the whole vocabulary.

    A row is uncertain where the candidates do not include everything that the filters keep; where
    a sum is as close to its limit, or the two best quotients are as close to each other, as
    rounding errors are large; and where the limit of top-p separates tokens of equal logits and
    one of them wins, because only the same sort tells which of them are kept.
    """
    keeps_everything = settings.top_k == 0 and settings.top_p == 1 and settings.min_p == 0
    if keeps_everything or settings.typical_p < 1:  # typical need not keep the most likely tokens
        certain = torch.zeros(len(logits), dtype=torch.bool)
        return torch.zeros(len(logits), dtype=torch.long), certain
    scaled, values, ids = candidates(logits, settings)
    border = find_border(scaled, values, settings)
    certain = border.certain  # (B, 1)
    if values.shape[-1] < scaled.shape[-1]:
        certain &= values[:, -1:] < border.least
    weights = border.weights.masked_fill(values < border.least, 0.0)
    quotients = weights / noise(bits.gather(-1, ids))  # (B, C)
    best = quotients.topk(min(2, quotients.shape[-1]))
    winner = best.indices[:, :1]  # (B, 1)
    certain &= (best.values[:, 1:] < best.values[:, :1] * (1 - ROUNDING)).all(-1, keepdim=True)
    certain &= ~(border.splits_ties & (values.gather(-1, winner) == border.least))
    return ids.gather(-1, winner)[:, 0], certain[:, 0]


@dataclass(frozen=True)
class Border:
    """Where top-k, top-p and min-p cut off the candidates of each row."""

    weights: Tensor  # (B, C): the probabilities, up to a factor that all tokens of a row share
    least: Tensor  # (B, 1): the lowest logit that is kept
    certain: Tensor  # (B, 1): whether no rounding error can move the border
    splits_ties: Tensor  # (B, 1): whether top-p keeps only some of those that tie at the border


def find_border(scaled: Tensor, values: Tensor, settings: Settings) -> Border:
    """Return the border among candidates with logits `values` (B, C) out of `scaled` (B, V)."""
    k, p, share = settings.top_k, settings.top_p, settings.min_p
    weights = (values - values[:, :1]).exp()  # (B, C)
    certain = torch.ones_like(values[:, :1], dtype=torch.bool)  # (B, 1)
    splits_ties = torch.zeros_like(certain)
    least = torch.full_like(values[:, :1], -torch.inf)
    if k:
        least = values[:, min(k, values.shape[-1]) - 1, None]
    if p < 1:
        weights = weights.masked_fill(values < least, 0.0)
        kept_by_top_k = weights if k else (scaled - values[:, :1]).exp()
        total = kept_by_top_k.sum(-1, keepdim=True)
        before = (weights.cumsum(-1) - weights) / total  # (B, C): the mass of all likelier tokens
        inside = (before < p) & (values >= least)
        least = values.gather(-1, inside.sum(-1, keepdim=True) - 1)
        splits_ties = ((values == least) & ~inside).any(-1, keepdim=True)
        certain &= ((before - p).abs() > ROUNDING).all(-1, keepdim=True)
    if share > 0:
        certain &= ((weights / share - 1).abs() > ROUNDING).all(-1, keepdim=True)
        lowest = values.masked_fill(weights < share, torch.inf).amin(-1, keepdim=True)
        least = torch.maximum(least, lowest)
    return Border(weights, least, certain, splits_ties)


def candidates(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits (B, V) after the temperature, and the candidates' logits and ids (B, C).

    Sorting 50,000 logits takes 4 ms on one core, finding the 1,024 highest 0.1 ms.
    """
    scaled = logits
    if settings.temperature != 1.0:
        scaled = sampling.scale_by_temperature(logits, settings.temperature)
    count = settings.top_k + TIES if settings.top_k else CANDIDATES
    values, ids = scaled.topk(min(count, scaled.shape[-1]))
    return scaled, values, ids


def random_bits(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return 64 random bits for each number of `exponential_`, which leave the generator in the
    same state.
    """
    return torch.empty(shape, dtype=torch.int64).random_(-(2**63), None, generator=generator)


def noise(bits: Tensor) -> Tensor:
    """Return the fp32 numbers that `exponential_` makes from the same bits.

    They are -log(1 - u), computed in fp64, where u is the lowest 53 bits as a number in [0, 1).
    """
    return (bits & (2**53 - 1)).double().mul_(-(2.0**-53)).log1p_().neg_().float()


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
    rows = (~complete).nonzero()[:, 0]
    if len(rows):
        tokens[rows] = sampling.draw_independently(logits[rows], settings, uniforms[rows])
    return tokens


def candidate_distribution(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return the candidates' probabilities after all filters and their ids, both (B, C), and for
    which rows (B) they are complete: no other token can be drawn.
    """
    k, p, share = settings.top_k, settings.top_p, settings.min_p
    scaled, values, ids = candidates(logits, settings)
    remaining = replace(settings, temperature=1.0)  # the filters that are still to be applied
    complete = torch.full_like(values[:, 0], values.shape[-1] == scaled.shape[-1], dtype=torch.bool)
    if k:
        complete |= values[:, -1] < values[:, min(k, values.shape[-1]) - 1]
    elif p < 1:
        probabilities = (values - scaled.logsumexp(-1, keepdim=True)).exp()
        complete |= probabilities.sum(-1) > p
        values = values.masked_fill(probabilities.cumsum(-1) - probabilities >= p, -torch.inf)
        remaining = replace(remaining, top_p=1.0)
    elif share > 0:
        complete |= values[:, -1] < values[:, 0] + math.log(share)
    return sampling.distribution(values, remaining), ids, complete
