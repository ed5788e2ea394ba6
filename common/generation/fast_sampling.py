"""From the distribution to the token: the exact sampler, whose tokens are `model.generate`'s, and
the fast one.

Shapes: logits (B, V) in fp32, in which the filters of sampling.py that look at the tokens so far
have had their say; tokens (B).

`generate` draws by `multinomial`: it divides each probability by a random number of exponential
distribution, V numbers a row, and takes the largest quotient. It spends most of its time on tokens
that can't win: sorting all of them for top-p, and one logarithm for each. The exact sampler takes
the same bits from the generator, computes both for the likeliest tokens only, and does all of it,
in the library's own way, for the few rows in which a rounding or the order of equal logits could
decide. The fast sampler takes one random number a row, from a generator of that row.
"""

import functools
import hashlib
import math
from dataclasses import replace

import torch

from common.generation import sampling
from common.generation.sampling import Settings

CANDIDATES = 1024  # how many of the likeliest tokens are looked at first where no top-k says it
# and how many beyond top-k: bf16 logits tie at the k-th place in three of four rows, and top-k
# keeps all that
# tie
TIES = 64
ROUNDING = 1e-5  # what the order of a sum over 50,000 probabilities in fp32 can change, with room


def draw_exactly(logits: torch.Tensor, settings: Settings, generator: torch.Generator) -> torch.Tensor:
    """Return the tokens (B) that `generate` draws from the same state of its generator: V random
    numbers a row, finished rows too.
    """
    if not knows_noise(logits.device.type):
        # multinomial's own steps; it would end a GPU's process over NaN, which decode reports
        probabilities = sampling.distribution(logits, settings)
        return (probabilities / torch.empty_like(probabilities).exponential_(1, generator=generator)).argmax(
            -1
        )
    bits = random_bits(logits.shape, generator)
    tokens, certain = draw_among_likeliest(logits, settings, bits)
    rows = (~certain).nonzero()[:, 0]
    if len(rows):
        tokens[rows] = (sampling.distribution(logits[rows], settings) / noise(bits[rows])).argmax(-1)
    return tokens


def draw_among_likeliest(
    logits: torch.Tensor, settings: Settings, bits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens (B) drawn among the likeliest ones, and for which rows (B) they are certainly
    those that a draw among all gives.

    Uncertain: the candidates don't hold all that the filters keep; a sum is as near to its limit,
    or the two best quotients to each other, as rounding is large; the limit of top-p parts tokens
    of equal logits, and one of them wins. Only the same sort knows which of them are in.
    """
    k, p, share = settings.top_k, settings.top_p, settings.min_p
    # what is kept need not be the likeliest, or is everything
    if settings.typical_p < 1 or (k == 0 and p == 1 and share == 0):
        return torch.zeros(len(logits), dtype=torch.long), torch.zeros(len(logits), dtype=torch.bool)
    scaled = (
        sampling.scale_by_temperature(logits, settings.temperature) if settings.temperature != 1.0 else logits
    )
    # (B, C), falling
    values, ids = scaled.topk(min(k + TIES if k else CANDIDATES, scaled.shape[-1]))
    # the probabilities, but for a factor that a row's tokens share
    weights = (values - values[:, :1]).exp()
    # (B, 1): the lowest logit kept so far
    least = values[:, min(k, values.shape[-1]) - 1, None] if k else torch.full_like(values[:, :1], -torch.inf)
    certain, parted = torch.ones_like(least, dtype=torch.bool), torch.zeros_like(least, dtype=torch.bool)
    if p < 1:
        weights = weights.masked_fill(values < least, 0.0)
        total = weights.sum(-1, keepdim=True) if k else (scaled - values[:, :1]).exp().sum(-1, keepdim=True)
        # (B, C): what the likelier ones hold together
        before = (weights.cumsum(-1) - weights) / total
        inside = (before < p) & (values >= least)
        least = values.gather(-1, inside.sum(-1, keepdim=True) - 1)
        parted = ((values == least) & ~inside).any(-1, keepdim=True)
        certain &= ((before - p).abs() > ROUNDING).all(-1, keepdim=True)
    if share > 0:
        certain &= ((weights / share - 1).abs() > ROUNDING).all(-1, keepdim=True)
        least = torch.maximum(least, values.masked_fill(weights < share, torch.inf).amin(-1, keepdim=True))
    if values.shape[-1] < scaled.shape[-1]:
        certain &= values[:, -1:] < least
    quotients = weights.masked_fill(values < least, 0.0) / noise(bits.gather(-1, ids))
    best = quotients.topk(min(2, quotients.shape[-1]))
    winner = best.indices[:, :1]
    certain &= (best.values[:, 1:] < best.values[:, :1] * (1 - ROUNDING)).all(-1, keepdim=True)
    certain &= ~(parted & (values.gather(-1, winner) == least))
    return ids.gather(-1, winner)[:, 0], certain[:, 0]


def random_bits(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return 64 random bits for each number of `exponential_`, which leave the generator in the
    same state.
    """
    return torch.empty(shape, dtype=torch.int64).random_(-(2**63), None, generator=generator)


def noise(bits: torch.Tensor) -> torch.Tensor:
    """Return the numbers, fp32, that `exponential_` makes of the same bits: -log(1 - u) in fp64, u
    the lowest 53 bits as a number in [0, 1).
    """
    return (bits & (2**53 - 1)).double().mul_(-(2.0**-53)).log1p_().neg_().float()


@functools.cache
def knows_noise(device: str) -> bool:
    """Tell whether `noise` is what `exponential_` draws: only on a CPU, and only as long as
    PyTorch makes it so; tried once, not believed.
    """
    if device != "cpu":
        return False
    ours, theirs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    expected = torch.empty(2, 4096).exponential_(1, generator=theirs)
    return torch.equal(noise(random_bits(expected.shape, ours)), expected) and torch.equal(
        ours.get_state(), theirs.get_state()
    )


def draw_fast(logits: torch.Tensor, settings: Settings, uniforms: torch.Tensor) -> torch.Tensor:
    """Return tokens (B) drawn from the distribution of the same filters, by one uniform number (B)
    in [0, 1) a row, in fp64.
    """
    probabilities, ids, complete = likeliest_distribution(logits, settings)
    tokens = ids.gather(-1, _place(probabilities, uniforms)[:, None])[:, 0]
    # row by row, and not for all rows when it must be for one: a text does not depend on its
    # neighbours
    rows = (~complete).nonzero()[:, 0]
    if len(rows):
        tokens[rows] = _place(sampling.distribution(logits[rows], settings), uniforms[rows])
    return tokens


def _place(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    cumulative = probabilities.double().cumsum(-1)  # (B, C)
    # at most 1 - 2**-53 times the total: below it, rounded too
    return (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(-1)


def likeliest_distribution(
    logits: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the probabilities (B, C) of the likeliest tokens after all filters, their ids (B, C),
    and for which rows (B) no other token can be drawn.

    A full sort of 50,000 logits takes 4 ms on a core, the 1,024 likeliest 0.1 ms.
    """
    k, p, share, vocabulary = settings.top_k, settings.top_p, settings.min_p, logits.shape[-1]
    scaled = (
        sampling.scale_by_temperature(logits, settings.temperature) if settings.temperature != 1.0 else logits
    )
    values, ids = scaled.topk(min(k + TIES if k else CANDIDATES, vocabulary))
    rest = replace(settings, temperature=1.0)  # the filters that are still to come
    complete = torch.full_like(values[:, 0], values.shape[-1] == vocabulary, dtype=torch.bool)
    if k:
        complete |= values[:, -1] < values[:, min(k, values.shape[-1]) - 1]
    elif p < 1:
        probabilities = (values - scaled.logsumexp(-1, keepdim=True)).exp()
        complete |= probabilities.sum(-1) > p
        values, rest = (
            values.masked_fill(probabilities.cumsum(-1) - probabilities >= p, -torch.inf),
            replace(rest, top_p=1.0),
        )
    elif share > 0:
        complete |= values[:, -1] < values[:, 0] + math.log(share)
    for stage in sampling.distribution_filters(rest):
        values = stage.apply(values, values)
    return values.softmax(-1), ids, complete


def batch_seed(seed: int, number: int) -> int:
    """Return the seed of a run's batch: the first batch has the run's own, the others follow from
    it, so that runs of neighbouring seeds share none.
    """
    return (
        seed
        if number == 0
        else int.from_bytes(hashlib.sha256(f"{seed}/batch {number}".encode()).digest()[:4])
    )


def row_uniforms(seed: int, rows: list[tuple[int, int]], count: int) -> torch.Tensor:
    """Return uniform numbers (rows, count) in fp64 for texts named by (prompt, sample): each row
    from its own generator, whatever stands beside it.
    """
    found = []
    for prompt, sample in rows:
        digest = hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()
        own = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        found.append(torch.rand(count, generator=own, dtype=torch.float64))
    return torch.stack(found)
