"""From the model's logits to the next token: filters, distribution, draw.

Pure tensor functions, in the order in which `model.generate` applies them; `make_sampler` puts them
together. Shapes: logits (B, V) in fp32; ids (B, T), the tokens so far; tokens (B), the next token
of each row. The B rows are independent texts, and V is the size of the vocabulary. A filter
returns new logits, with -inf for each token that it removes.

Order of the filters: logit bias, repetition penalty, no repeated n-grams, banned words, minimum
length, presence and frequency penalty, choices or regex; then, only when sampling: top-n-sigma,
temperature, top-k, top-p, min-p, typical, epsilon, eta, XTC.

This is the plain version, and the oracle of the tests for its fast version, fast_sampling.py.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Constraint(Protocol):
    """What texts must be, such as one of several choices; constraints.py has two kinds."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    def start(self) -> Callable[[list[int]], Tensor]:
        """Return a function for one text: its new tokens -> a mask (V) of the tokens that may follow."""
        ...


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen. With its neutral value, a filter is left out."""

    max_new_tokens: int = 200
    min_new_tokens: int = 0
    sample: bool = False  # False: greedy
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit)
    banned: tuple[tuple[int, ...], ...] = ()  # sequences of ids that no text may contain
    end_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Filter:
    """A named stage between the model's logits and the draw: `apply(logits, ids)` -> logits."""

    name: str
    apply: Callable[[Tensor, Tensor], Tensor]


# (logits (B, V), tokens so far (B, T)) -> next tokens (B)
Sampler = Callable[[Tensor, Tensor], Tensor]


# Filters of the distribution, used only when sampling ---------------------------------------------


def scale_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature: below 1 sharpens the distribution, above 1 flattens it.

    A temperature of 0 means greedy decoding and never reaches this function.
    """
    return logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k most likely tokens and all that tie with the last of them (Fan et al. 2018).

    Keep all tokens where k is larger than V.
    """
    highest = logits.topk(min(k, logits.shape[-1])).values  # (B, k), in descending order
    kth = highest[..., -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities reach p (Holtzman et al. 2020).

    At least one token is kept. The sum starts at the unlikely end and covers the whole vocabulary,
    as in `generate`, so that all rounding is the same. Where tokens tie at the limit, the order of
    the sort decides which of them are kept.
    """
    ascending, order = logits.sort(descending=False)
    cumulative = ascending.softmax(-1).cumsum(-1)  # (B, V), from the least likely token on
    removed = cumulative <= 1 - p
    removed[..., -1] = False  # the most likely token is kept in any case
    removed = removed.scatter(-1, order, removed)  # from sorted order to that of the vocabulary
    return logits.masked_fill(removed, -torch.inf)


def keep_min_p(logits: Tensor, share: float) -> Tensor:
    """Keep tokens at least `share` times as likely as the most likely one (Nguyen et al. 2024)."""
    probabilities = logits.softmax(-1)
    highest = probabilities.amax(-1, keepdim=True)  # (B, 1)
    return logits.masked_fill(probabilities < share * highest, -torch.inf)


def keep_typical(logits: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose surprise is closest to the expected surprise (Meister et al. 2023).

    Tokens are kept, closest first, until their probabilities reach `mass`.
    """
    log_probabilities = logits.log_softmax(-1)
    # nansum: 0 * -inf counts as 0
    entropy = -(log_probabilities * log_probabilities.exp()).nansum(-1, keepdim=True)  # (B, 1)
    distance, order = (-log_probabilities - entropy).abs().sort(descending=False)
    cumulative = logits.gather(-1, order).softmax(-1).cumsum(-1)
    last = (cumulative < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)  # (B, 1)
    removed = distance > distance.gather(-1, last)
    return logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def keep_above_epsilon(logits: Tensor, epsilon: float) -> Tensor:
    """Keep tokens at least `epsilon` likely, and the most likely one (Hewitt et al. 2022)."""
    removed = logits.softmax(-1) < epsilon
    return logits.masked_fill(removed & (logits < logits.amax(-1, keepdim=True)), -torch.inf)


def keep_above_eta(logits: Tensor, epsilon: float) -> Tensor:
    """Keep the tokens that are at least `epsilon` likely; where the distribution is flat, also less
    likely ones: down to sqrt(epsilon) * exp(-its entropy) (Hewitt et al. 2022).
    """
    log_probabilities = logits - logits.logsumexp(-1, keepdim=True)
    lowest = torch.finfo(logits.dtype).min  # 0 * -inf would be NaN
    entropy = -(log_probabilities.clamp(min=lowest) * log_probabilities.softmax(-1)).sum(-1)  # (B)
    limit = torch.tensor(epsilon, device=logits.device)
    eta = torch.min(limit, limit.sqrt() * torch.exp(-entropy))[:, None]  # (B, 1)
    removed = logits.softmax(-1) < eta
    return logits.masked_fill(removed & (logits < logits.amax(-1, keepdim=True)), -torch.inf)


def keep_top_n_sigma(logits: Tensor, n: float) -> Tensor:
    """Keep the logits that are at most n standard deviations below the highest (Tang et al. 2024).

    It keeps the same tokens at any temperature. Tokens that are removed already do not count.
    """
    is_left = logits > -torch.inf
    count = is_left.sum(-1, keepdim=True)  # (B, 1)
    mean = logits.where(is_left, 0).sum(-1, keepdim=True) / count
    squares = (logits - mean).where(is_left, 0).square().sum(-1, keepdim=True)
    sigma = (squares / (count - 1).clamp(min=1)).sqrt()
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) - n * sigma, -torch.inf)


def exclude_top_choices(logits: Tensor, threshold: float, active: Tensor) -> Tensor:
    """Remove all tokens that are at least `threshold` likely, but for the least likely of them: XTC
    (exclude top choices, p-e-w 2024). Applied to the rows where `active` (B) is True.

    So a text leaves the beaten track where there are several good ways to go on, and only there.
    """
    probabilities = logits.softmax(-1)
    likely = probabilities.masked_fill(probabilities < threshold, torch.inf)
    least = likely.amin(-1, keepdim=True)  # (B, 1), infinity where no token is likely enough
    return logits.masked_fill((probabilities > least) & active[:, None], -torch.inf)


# Filters that depend on the tokens so far, used when sampling and in greedy decoding --------------


def add_bias(logits: Tensor, bias: tuple[tuple[int, float], ...]) -> Tensor:
    """Add a number to the logits of some tokens: (id, number) for each."""
    ids, numbers = zip(*bias)
    columns = torch.tensor(ids, device=logits.device)
    return logits.index_add(-1, columns, logits.new_tensor(numbers).expand(len(logits), -1))


def penalize_repetition(logits: Tensor, ids: Tensor, penalty: float, starts: Tensor | None = None) -> Tensor:
    """Make each token that occurs in ids less likely, however often it occurs (Keskar et al. 2019).

    Positive logits are divided by the penalty, negative ones are multiplied by it. `starts` (B) is
    the column where each row's text begins; the padding before it is not counted as text.
    """
    if starts is not None:
        is_padding = torch.arange(ids.shape[-1], device=ids.device) < starts[:, None]  # (B, T)
        # replace padding with the row's first token, which occurs anyway
        ids = torch.where(is_padding, ids.gather(-1, starts[:, None]), ids)
    seen = logits.gather(-1, ids)
    return logits.scatter(-1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def forbid_repeated_ngrams(logits: Tensor, ids: Tensor, size: int, starts: Tensor | None = None) -> Tensor:
    """Forbid each token that would complete an n-gram of `size` tokens that already occurs in ids.

    `starts` as in `penalize_repetition`; None counts padding as text.
    """
    length, vocabulary = ids.shape[-1], logits.shape[-1]
    if length < size:
        return logits
    ngrams = ids.unfold(-1, size, 1)  # (B, length - size + 1, size)
    matches = (ngrams[..., :-1] == ids[:, None, length + 1 - size :]).all(-1)
    if starts is not None:
        matches &= torch.arange(ngrams.shape[1], device=ids.device) >= starts[:, None]
    # one extra column takes the n-grams that do not match
    removed = logits.new_zeros((logits.shape[0], vocabulary + 1), dtype=torch.bool)
    removed.scatter_(-1, torch.where(matches, ngrams[..., -1], vocabulary), True)
    return logits.masked_fill(removed[:, :vocabulary], -torch.inf)


def forbid_sequences(logits: Tensor, ids: Tensor, sequences: tuple[tuple[int, ...], ...]) -> Tensor:
    """Forbid each token that would complete one of some sequences of tokens, such as a word's."""
    removed = torch.zeros_like(logits, dtype=torch.bool)
    for *before, last in sequences:
        if len(before) > ids.shape[-1]:
            continue
        start = torch.tensor(before, dtype=torch.long, device=ids.device)
        removed[:, last] |= (ids[:, ids.shape[-1] - len(before) :] == start).all(-1)
    return logits.masked_fill(removed, -torch.inf)


def penalize_presence(logits: Tensor, new_ids: Tensor, presence: float, frequency: float) -> Tensor:
    """Subtract from the logit of each token that was generated before `presence` once, and
    `frequency` as often as it occurs in `new_ids` (B, N): the two penalties of OpenAI's API.

    The prompt does not count. Negative penalties encourage repetition.
    """
    ones = torch.ones_like(new_ids, dtype=logits.dtype)
    counts = torch.zeros_like(logits).scatter_add(-1, new_ids, ones)
    return logits - frequency * counts - presence * (counts > 0)


def keep_allowed(logits: Tensor, new_ids: Tensor, matchers: list[Callable[[list[int]], Tensor]]) -> Tensor:
    """Keep the tokens that a constraint lets follow the new tokens (B, N); each row has a matcher."""
    allowed = torch.stack([match(new) for match, new in zip(matchers, new_ids.tolist())])  # (B, V)
    return logits.masked_fill(~allowed.to(logits.device), -torch.inf)


def forbid_tokens(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Forbid the given tokens: the end ids, while a text is shorter than its minimum."""
    columns = torch.tensor(ids, dtype=torch.long, device=logits.device)
    return logits.index_fill(-1, columns, -torch.inf)


# Which filters the settings ask for ---------------------------------------------------------------


def history_filters(
    settings: Settings, *, prompt_length: int, starts: Tensor | None, padding_is_text: bool
) -> list[Filter]:
    """Return the filters that depend on the tokens so far, in order; `padding_is_text` lets n-grams
    reach into the padding, as `generate` does.
    """
    penalty, size = settings.repetition_penalty, settings.no_repeat_ngram_size
    minimum, end_ids = settings.min_new_tokens, settings.end_ids
    presence, frequency = settings.presence_penalty, settings.frequency_penalty
    # not the end tokens: a text must be able to end
    banned = tuple(ids for ids in settings.banned if len(ids) > 1 or ids[0] not in end_ids)
    ngram_starts = None if padding_is_text else starts
    filters: list[Filter] = []

    def add(name: str, apply: Callable[[Tensor, Tensor], Tensor]) -> None:
        filters.append(Filter(name, apply))

    def forbid_early_end(logits: Tensor, ids: Tensor) -> Tensor:
        return forbid_tokens(logits, end_ids) if ids.shape[-1] - prompt_length < minimum else logits

    def penalize_new(logits: Tensor, ids: Tensor) -> Tensor:
        return penalize_presence(logits, ids[:, prompt_length:], presence, frequency)

    if settings.logit_bias:
        add("logit bias", lambda logits, _: add_bias(logits, settings.logit_bias))
    if penalty != 1.0:
        name = f"repetition penalty {penalty:g}"
        add(name, lambda logits, ids: penalize_repetition(logits, ids, penalty, starts))
    if size > 0:
        name = f"no repeated {size}-gram"
        add(name, lambda logits, ids: forbid_repeated_ngrams(logits, ids, size, ngram_starts))
    if banned:
        add("banned words", lambda logits, ids: forbid_sequences(logits, ids, banned))
    if minimum > 0 and end_ids:
        add(f"min {minimum} new tokens", forbid_early_end)
    if presence or frequency:
        add(f"presence {presence:g}, frequency {frequency:g}", penalize_new)
    if settings.constraint is not None:
        filters.append(constraint_filter(settings.constraint, prompt_length))
    return filters


def constraint_filter(constraint: Constraint, prompt_length: int) -> Filter:
    """Return the filter that keeps new tokens to a constraint; it remembers how far each row has
    come.
    """
    matchers: list[Callable[[list[int]], Tensor]] = []

    def keep_to_constraint(logits: Tensor, ids: Tensor) -> Tensor:
        matchers.extend(constraint.start() for _ in range(len(matchers), len(logits)))
        return keep_allowed(logits, ids[:, prompt_length:], matchers)

    return Filter(constraint.name, keep_to_constraint)


def distribution_filters(settings: Settings, row_names: Sequence[str] = ()) -> list[Filter]:
    """Return the filters that shape the distribution to draw from, in order; none when greedy.

    `row_names` (B), from `name_rows`, are needed for XTC's random numbers alone.
    """
    filters: list[Filter] = []

    def add(name: str, function: Callable[..., Tensor], value: float) -> None:
        filters.append(Filter(f"{name} {value:g}", lambda logits, _: function(logits, value)))

    if not settings.sample:
        return []
    if settings.top_n_sigma > 0:
        add("top-n-sigma", keep_top_n_sigma, settings.top_n_sigma)
    if settings.temperature != 1.0:
        add("temperature", scale_by_temperature, settings.temperature)
    if settings.top_k > 0:
        add("top-k", keep_top_k, settings.top_k)
    if settings.top_p < 1.0:
        add("top-p", keep_top_p, settings.top_p)
    if settings.min_p > 0:
        add("min-p", keep_min_p, settings.min_p)
    if settings.typical_p < 1.0:
        add("typical", keep_typical, settings.typical_p)
    if settings.epsilon_cutoff > 0:
        add("epsilon", keep_above_epsilon, settings.epsilon_cutoff)
    if settings.eta_cutoff > 0:
        add("eta", keep_above_eta, settings.eta_cutoff)
    if settings.xtc_probability > 0:
        filters.append(xtc_filter(settings, row_names))
    return filters


def xtc_filter(settings: Settings, row_names: Sequence[str]) -> Filter:
    """Return XTC as a filter to be applied once per new token; it keeps its own random numbers."""
    threshold, steps = settings.xtc_threshold, xtc_steps(settings, row_names)

    def exclude_at_random(logits: Tensor, _: Tensor) -> Tensor:
        return exclude_top_choices(logits, threshold, next(steps).to(logits.device))

    return Filter(f"XTC {threshold:g}", exclude_at_random)


def apply_filters(filters: list[Filter], logits: Tensor, ids: Tensor) -> Tensor:
    """Return the logits (B, V) after all filters, given the tokens so far, ids (B, T)."""
    for stage in filters:
        logits = stage.apply(logits, ids)
    return logits


# The draw -----------------------------------------------------------------------------------------


def draw_exactly(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Return the tokens (B) that `generate` draws from probabilities (B, V) with a random generator
    in the same state.

    These are the steps of `torch.multinomial` for one draw: divide each probability by a random
    number of the exponential distribution, and take the largest quotient. They use V random
    numbers for each row, also for rows that have ended. (On a GPU, `multinomial` itself would end
    the process over NaN, which `decoding.fetch_ids` reports.)
    """
    noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
    return (probabilities / noise).argmax(-1)


def draw_independently(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Return tokens (B) drawn from probabilities (B, V) with one uniform random number in [0, 1) for
    each row (B), fp64: the first token whose cumulative probability exceeds it.
    """
    cumulative = probabilities.double().cumsum(-1)  # (B, V)
    # a uniform is at most 1 - 2**-53, so that the product stays below the total, also when rounded
    return (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(-1)


def make_sampler(settings: Settings, *, prompt_length: int, starts: Tensor, seed: int | list[str]) -> Sampler:
    """Return the function that chooses each next token, for a batch before its prefill.

    With a number as seed, the sampler is exact: it uses the filters, sorts and random numbers of
    `generate` after `torch.manual_seed(seed)`. With a name for each row, it is independent: a row
    has random numbers of its own, and its text does not depend on the other texts of the batch.
    `starts` (B) is the column where each row's text begins.
    """
    is_exact, names = isinstance(seed, int), name_rows(seed, len(starts))
    filters = history_filters(settings, prompt_length=prompt_length, starts=starts, padding_is_text=is_exact)
    if not settings.sample:
        return lambda logits, ids: apply_filters(filters, logits, ids).argmax(-1)
    filters += distribution_filters(settings, names)
    generator = torch.Generator(starts.device).manual_seed(seed) if isinstance(seed, int) else None
    uniforms = uniform_steps(settings, names, starts.device)

    def sample(logits: Tensor, ids: Tensor) -> Tensor:
        probabilities = apply_filters(filters, logits, ids).softmax(-1)
        if generator is None:
            return draw_independently(probabilities, next(uniforms))
        return draw_exactly(probabilities, generator)

    return sample


# Seeds --------------------------------------------------------------------------------------------


def batch_seed(seed: int, number: int) -> int:
    """Return the seed of a run's batch, for the exact sampler.

    The first batch has the run's own seed. The others are derived from it, so that runs with
    neighbouring seeds share no batch seed.
    """
    if number == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/batch {number}".encode()).digest()
    return int.from_bytes(digest[:4])


def name_rows(seed: int | list[str], num_rows: int) -> list[str]:
    """Return the names of a batch's rows, from which their own random numbers come."""
    return [f"{seed}/{row}/0" for row in range(num_rows)] if isinstance(seed, int) else seed


def row_uniforms(names: Sequence[str], count: int, *, purpose: str = "") -> Tensor:
    """Return uniform random numbers in [0, 1), (rows, count) in fp64; each row has a generator of its
    own, which its name seeds, and another one for each purpose.
    """
    uniforms = []
    for name in names:
        digest = hashlib.sha256(f"{purpose}{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        uniforms.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(uniforms)


def uniform_steps(settings: Settings, names: Sequence[str], device: torch.device) -> Iterator[Tensor]:
    """Yield the random numbers (B) of the independent draw, for each new token."""
    yield from row_uniforms(names, settings.max_new_tokens).to(device).unbind(1)


def xtc_steps(settings: Settings, names: Sequence[str]) -> Iterator[Tensor]:
    """Yield the rows (B) in which XTC is active, for each new token.

    Its random numbers are its own, so that it takes none of those of `generate`.
    """
    uniforms = row_uniforms(names, settings.max_new_tokens, purpose="XTC ")
    yield from (uniforms < settings.xtc_probability).unbind(1)
