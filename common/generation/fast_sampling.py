"""The fast version of the sampler in sampling.py, switched on where `make_sampler` is imported.

The exact draw takes a tenth of the time of the plain one, token for token: `generate` spends most
of a draw on tokens that cannot win. The independent draw avoids a full sort; it draws
from the same probabilities as the plain one, but other tokens.

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
from common.generation.sampling import Sampler, Settings

# Without top-k, the exact draw looks at about TRIES[0] tokens, at TRIES[1] if these do not suffice, and then
# at the whole vocabulary.
TRIES = (128, 1024)
GROUP = 32  # tokens in a group whose maximum tells whether any of them can be a candidate
# The independent draw: the number of candidates without top-k; with it, k + TIES
CANDIDATES = 1024
# bf16 logits tie at the k-th place in three of four rows, and top-k keeps all that tie
TIES = 64
UNDECIDED = -1  # in the place of a token: the whole vocabulary decides
# the relative difference that another order of summation can make to a sum of 50,000 fp32
# probabilities, with a margin
ROUNDING = 1e-5


def make_sampler(settings: Settings, *, prompt_length: int, starts: Tensor, seed: int | list[str]) -> Sampler:
    """Return the sampler of `sampling.make_sampler`, which takes less time.

    Rows for which the candidates do not suffice are drawn in the plain way, and so are those in
    which XTC is active; each by itself: whether one row needs it must not change the token of
    another.
    """
    is_exact, device = isinstance(seed, int), starts.device
    if not settings.sample or (is_exact and not noise_is_known(device.type)):
        return sampling.make_sampler(settings, prompt_length=prompt_length, starts=starts, seed=seed)
    history = sampling.history_filters(
        settings, prompt_length=prompt_length, starts=starts, padding_is_text=is_exact
    )
    names = sampling.name_rows(seed, len(starts))
    generator = torch.Generator(device).manual_seed(seed) if isinstance(seed, int) else None
    uniforms = sampling.uniform_steps(settings, names, device)
    xtc = sampling.xtc_steps(settings, names) if settings.xtc_probability > 0 else None
    others = replace(settings, xtc_probability=0.0)  # all filters but XTC
    shaping = sampling.distribution_filters(others)

    def draw_plainly(probabilities: Tensor, numbers: Tensor) -> Tensor:
        if generator is None:
            return sampling.draw_independently(probabilities, numbers)
        return (probabilities / noise(numbers)).argmax(-1)

    def sample(logits: Tensor, ids: Tensor) -> Tensor:
        logits = sampling.apply_filters(history, logits, ids)
        if generator is None:
            numbers = next(uniforms)  # (B)
            tokens = draw_independently(logits, others, numbers)
        else:
            numbers = random_bits(logits.shape, generator)  # (B, V)
            tokens = draw_exactly(logits, others, numbers)
        active = None if xtc is None else next(xtc).to(device)
        is_plain = tokens == UNDECIDED if active is None else (tokens == UNDECIDED) | active
        rows = is_plain.nonzero()[:, 0]
        if len(rows):
            own = sampling.apply_filters(shaping, logits[rows], ids[rows])
            if active is not None:
                own = sampling.exclude_top_choices(own, settings.xtc_threshold, active[rows])
            tokens[rows] = draw_plainly(own.softmax(-1), numbers[rows])
        return tokens

    return sample


# The exact draw -----------------------------------------------------------------------------------


def draw_exactly(logits: Tensor, settings: Settings, bits: Tensor) -> Tensor:
    """Return for each row the token (B) that `sampling.draw_exactly` draws with the noise of the
    same random bits (B, V), found among its candidates; UNDECIDED where a draw from the whole
    vocabulary could give another one.
    """
    removes_some = settings.top_p < 1 or settings.min_p > 0 or settings.top_n_sigma > 0
    removes_some = removes_some or settings.epsilon_cutoff > 0 or settings.eta_cutoff > 0
    # typical need not keep the most likely tokens
    if not (settings.top_k or removes_some) or settings.typical_p < 1:
        return torch.full((len(logits),), UNDECIDED)
    if settings.temperature != 1.0:
        logits = sampling.scale_by_temperature(logits, settings.temperature)
    # NumPy, because each of its calls on a few numbers takes a third of the time of PyTorch's
    return torch.tensor([draw_row(*row, settings) for row in zip(logits.numpy(), bits.numpy())])


class TooClose(Exception):
    """A rounding error could change which token is drawn."""


def draw_row(logits: np.ndarray, bits: np.ndarray, settings: Settings) -> int:
    """Return the token that is drawn among the candidates of one row, from its logits (V) after the
    temperature and its random bits (V); UNDECIDED where that is not certain.
    """
    for count in (settings.top_k,) if settings.top_k else TRIES:
        ids = find_most_likely(logits, count)
        candidate_logits = logits[ids]  # (C)
        if not len(ids) or not np.isfinite(candidate_logits[0]):
            return UNDECIDED  # the logits are not numbers
        weights = np.exp(candidate_logits.astype(np.float64) - candidate_logits[0])
        try:
            num_kept = count_kept(logits, candidate_logits, weights, settings)
            # If a candidate is removed, no token outside the candidates is kept. All that top-k
            # keeps are candidates.
            if num_kept < len(ids) or settings.top_k or len(ids) == len(logits):
                return draw_kept(ids, candidate_logits, weights, bits, num_kept)
        except TooClose:
            return UNDECIDED
    return UNDECIDED


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
) -> int:
    """Return how many of the candidates are kept by all filters but typical and XTC.

    `weights` (C) are the candidates' probabilities, up to a factor. Tokens of equal logits are
    counted as if top-p kept the first of them. Raises TooClose.
    """
    k, p, share = settings.top_k, settings.top_p, settings.min_p
    num_kept, best = len(weights), candidate_logits[0]
    is_whole = k > 0 or len(weights) == len(logits)  # no other token is kept
    if settings.top_n_sigma > 0:
        below = settings.top_n_sigma * logits[logits > -np.inf].std(ddof=1, dtype=np.float64)
        num_kept = count_from(candidate_logits - best, -below, ROUNDING * below)
        logits = logits[logits >= best - below]
    if 0 < k < num_kept:
        # those as likely as the k-th one tie with it
        num_kept = int(np.count_nonzero(candidate_logits[:num_kept] >= candidate_logits[k - 1]))

    def kept() -> np.ndarray:
        # tokens that are not candidates have a share of the total too
        return weights[:num_kept] if is_whole or num_kept < len(weights) else np.exp(logits - best)

    if p < 1:
        # (C): the probability of all candidates before each one
        before = (weights[:num_kept].cumsum() - weights[:num_kept]) / kept().sum()
        num_kept = max(1, count_from(-before, -p, ROUNDING))
    if share > 0:
        num_kept = count_from(weights[:num_kept], share, ROUNDING * share)
    if num_kept == len(weights) and not is_whole and (p < 1 or share > 0):
        return num_kept  # some more are kept, and how many is not known
    if settings.epsilon_cutoff > 0:
        limit = settings.epsilon_cutoff * kept().sum()
        num_kept = max(1, count_from(weights[:num_kept], limit, ROUNDING * limit))
        if num_kept == len(weights) and not is_whole:
            return num_kept
    if settings.eta_cutoff > 0:
        limit = compute_eta(kept(), settings.eta_cutoff) * kept().sum()
        num_kept = max(1, count_from(weights[:num_kept], limit, 10 * ROUNDING * limit))
    return num_kept


def count_from(numbers: np.ndarray, limit: float, tolerance: float) -> int:
    """Return how many of some descending numbers are at least `limit`. Raises TooClose for one that
    is nearer to it than a tolerance.
    """
    if (np.abs(numbers - limit) <= tolerance).any():
        raise TooClose
    return int(np.count_nonzero(numbers >= limit))


def compute_eta(weights: np.ndarray, epsilon: float) -> float:
    """Return the least probability that eta keeps, from the probabilities up to a factor."""
    probabilities = weights[weights > 0] / weights.sum()
    entropy = -(probabilities * np.log(probabilities)).sum()
    return min(epsilon, math.sqrt(epsilon) * math.exp(-entropy))


def draw_kept(
    ids: np.ndarray, candidate_logits: np.ndarray, weights: np.ndarray, bits: np.ndarray, num_kept: int
) -> int:
    """Return the token with the largest quotient of probability and noise among the first
    candidates.

    Raises TooClose in two cases: a rounding error could swap the two largest quotients, or the
    border separates tokens of equal logits and one of them wins. Which of these are kept, only the
    full sort of the plain draw tells.
    """
    border = candidate_logits[num_kept - 1]
    num_tied = int(np.count_nonzero(candidate_logits >= border))  # with all that tie at the border
    quotients = weights[:num_tied] / noise(torch.from_numpy(bits[ids[:num_tied]])).numpy()
    winner = quotients.argmax()
    largest = quotients[winner]
    quotients[winner] = 0
    if quotients.max() >= largest * (1 - ROUNDING):
        raise TooClose
    if num_tied > num_kept and candidate_logits[winner] == border:
        raise TooClose
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
    """Return for each row a token (B) from the distribution that `sampling.draw_independently` draws
    from; UNDECIDED in rows that need the whole vocabulary.

    The probabilities are the same, but the tokens differ: the cumulative sum runs over the
    candidates, most likely first, instead of over the vocabulary.
    """
    probabilities, ids, complete = candidate_distribution(logits, settings)
    columns = sampling.draw_independently(probabilities, uniforms)  # (B)
    return ids.gather(-1, columns[:, None])[:, 0].where(complete, UNDECIDED)


def candidate_distribution(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return the candidates' probabilities after all filters and their ids, both (B, C), and for
    which rows (B) they are complete: no other token can be drawn.
    """
    k, p, share = settings.top_k, settings.top_p, settings.min_p
    scaled, candidate_logits, ids = find_candidates(logits, settings)
    last = candidate_logits[:, -1]  # (B): the logit of the least likely candidate
    num_candidates = candidate_logits.shape[-1]
    # the filters that are still to be applied
    remaining = replace(settings, temperature=1.0, top_n_sigma=0.0)
    complete = torch.full_like(last, num_candidates == scaled.shape[-1], dtype=torch.bool)
    complete |= last == -torch.inf  # all others are removed already
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
    filters = sampling.distribution_filters(remaining)
    kept = sampling.apply_filters(filters, candidate_logits, ids)
    return kept.softmax(-1), ids, complete


def find_candidates(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits (B, V) after top-n-sigma and the temperature, and the candidates' logits
    and ids (B, C).

    Sorting 50,000 logits takes 4 ms on one core, finding the 1,024 highest 0.8 ms.
    """
    scaled = logits
    if settings.top_n_sigma > 0:  # its deviation is that of all tokens
        scaled = sampling.keep_top_n_sigma(scaled, settings.top_n_sigma)
    if settings.temperature != 1.0:
        scaled = sampling.scale_by_temperature(scaled, settings.temperature)
    count = settings.top_k + TIES if settings.top_k else CANDIDATES
    candidate_logits, ids = scaled.topk(min(count, scaled.shape[-1]))
    return scaled, candidate_logits, ids
