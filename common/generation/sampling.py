"""From the model's logits to the distribution of the next token: pure tensor functions, in the
order in which `model.generate` applies them.

Shapes: logits (B, V) in fp32, ids (B, T), the tokens so far. B rows are independent texts, V is
the vocabulary. A filter returns new logits with -inf where a token is out. fast_sampling.py takes the
token.

The order is: repetition penalty, no repeated n-grams, no end before min_new_tokens; and when
sampling: temperature, top-k, top-p, min-p, typical.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen; each neutral value leaves its filter out."""

    max_new_tokens: int = 200
    min_new_tokens: int = 0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    end_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Filter:
    """One named stage between the model's logits and the draw: `apply(logits, ids)` returns new
    logits.
    """

    name: str
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def scale_by_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return logits / temperature: below 1 sharpens, above 1 flattens. 0 is not a scale; it means
    greedy, before this function.
    """
    return logits / temperature


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k likeliest tokens and all that tie with the last of them (Fan et al. 2018); all
    where k is above V.
    """
    kth = logits.topk(min(k, logits.shape[-1])).values[..., -1, None]  # (B, 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probabilities reach p, one at least
    (Holtzman et al. 2020).

    It sums from the unlikely end over the whole vocabulary, as `generate` does, so that every
    rounding is the same; which of several tokens that tie at the limit are in, the sort decides.
    """
    ascending, order = logits.sort(descending=False)
    # (B, V), in sorted order: a run at the beginning
    out = ascending.softmax(-1).cumsum(-1) <= 1 - p
    out[..., -1] = False
    return logits.masked_fill(out.scatter(-1, order, out), -torch.inf)


def keep_min_p(logits: torch.Tensor, share: float) -> torch.Tensor:
    """Keep tokens at least `share` times as likely as the likeliest (Nguyen et al. 2024)."""
    probabilities = logits.softmax(-1)
    likeliest = probabilities.amax(-1, keepdim=True)
    out = probabilities < share * likeliest
    out.scatter_(-1, probabilities.topk(1).indices, False)
    return logits.masked_fill(out, -torch.inf)


def keep_typical(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """Keep the tokens whose surprise is nearest to the expected one until their probabilities
    reach `mass` (Meister et al. 2023).
    """
    log_probabilities = logits.log_softmax(-1)
    # nansum: 0 times -inf counts as 0
    entropy = -(log_probabilities * log_probabilities.exp()).nansum(-1, keepdim=True)
    distance, order = (-log_probabilities - entropy).abs().sort(descending=False)
    # (B, 1)
    reached = (logits.gather(-1, order).softmax(-1).cumsum(-1) < mass).sum(-1, keepdim=True)
    out = distance > distance.gather(-1, reached.clamp(max=logits.shape[-1] - 1))
    out[..., 0] = False
    return logits.masked_fill(out.scatter(-1, order, out), -torch.inf)


def penalize_repetition(
    logits: torch.Tensor, ids: torch.Tensor, penalty: float, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Make each token that occurs in ids less likely, once however often it occurs (Keskar et al.
    2019).

    Positive logits are divided by the penalty, negative ones multiplied. `starts` (B): where each
    row's text begins; padding before it is no text.
    """
    if starts is not None:
        padded = torch.arange(ids.shape[-1], device=ids.device) < starts[:, None]
        # the row's first token occurs anyway
        ids = torch.where(padded, ids.gather(-1, starts[:, None]), ids)
    seen = logits.gather(-1, ids)
    return logits.scatter(-1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def forbid_repeated_ngrams(
    logits: torch.Tensor, ids: torch.Tensor, size: int, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Forbid each token that would complete an n-gram of `size` that occurs in ids; `starts` as
    above, None counts padding as text.
    """
    length, vocabulary = ids.shape[-1], logits.shape[-1]
    if length < size:
        return logits
    windows = ids.unfold(-1, size, 1)  # (B, length - size + 1, size)
    matches = (windows[..., :-1] == ids[:, None, length + 1 - size :]).all(-1)
    if starts is not None:
        matches &= torch.arange(windows.shape[1], device=ids.device) >= starts[:, None]
    # the last column takes what does not match
    out = logits.new_zeros((logits.shape[0], vocabulary + 1), dtype=torch.bool)
    out.scatter_(-1, torch.where(matches, windows[..., -1], vocabulary), True)
    return logits.masked_fill(out[:, :vocabulary], -torch.inf)


def forbid(logits: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
    """Forbid some tokens: the end ids, while a text is shorter than its minimum."""
    return logits.index_fill(-1, torch.tensor(ids, dtype=torch.long, device=logits.device), -torch.inf)


def history_filters(
    settings: Settings, *, prompt_length: int, starts: torch.Tensor | None, padding_is_text: bool
) -> list[Filter]:
    """Return the filters that look at the tokens so far; `padding_is_text` lets n-grams reach into
    padding, as `generate` does.
    """
    found, size = [], settings.no_repeat_ngram_size
    if settings.repetition_penalty != 1.0:
        found.append(
            Filter(
                f"repetition penalty {settings.repetition_penalty:g}",
                lambda logits, ids: penalize_repetition(logits, ids, settings.repetition_penalty, starts),
            )
        )
    if size > 0:
        counted = None if padding_is_text else starts
        found.append(
            Filter(
                f"no repeated {size}-gram",
                lambda logits, ids: forbid_repeated_ngrams(logits, ids, size, counted),
            )
        )
    if settings.min_new_tokens > 0 and settings.end_ids:
        found.append(
            Filter(
                f"min {settings.min_new_tokens} new tokens",
                lambda logits, ids: (
                    forbid(logits, settings.end_ids)
                    if ids.shape[-1] - prompt_length < settings.min_new_tokens
                    else logits
                ),
            )
        )
    return found


def distribution_filters(settings: Settings) -> list[Filter]:
    """Return the filters that shape the distribution to draw from; none when greedy."""
    known = (
        ("temperature", scale_by_temperature, settings.temperature, settings.temperature != 1.0),
        ("top-k", keep_top_k, settings.top_k, settings.top_k > 0),
        ("top-p", keep_top_p, settings.top_p, settings.top_p < 1.0),
        ("min-p", keep_min_p, settings.min_p, settings.min_p > 0),
        ("typical", keep_typical, settings.typical_p, settings.typical_p < 1.0),
    )
    return [
        Filter(f"{name} {value:g}", lambda logits, ids, apply=apply, value=value: apply(logits, value))
        for name, apply, value, wanted in known
        if wanted and settings.sample
    ]


def distribution(logits: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Return the probabilities (B, V) to draw from, after all filters of the distribution."""
    for stage in distribution_filters(settings):
        logits = stage.apply(logits, logits)
    return logits.softmax(-1)
