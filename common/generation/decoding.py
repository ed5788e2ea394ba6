"""Model and sampler -> tokens: prefill, step, and the loop around them.

Three things go wrong in batched decoding, and each has a name here: the attention mask hides the
padding, positions count a row's own tokens (transformers #18478, #29419), and the cache holds what
was computed before. `prefill` reads all prompts at once and `step` one token a row: a faster step
(compiled, quantised) fits behind the same two functions.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from common.errors import UserError
from common.generation import fast_sampling, sampling
from common.generation.language_model import LanguageModel
from common.generation.sampling import Settings


@dataclass
class Batch:
    """The texts so far, left-padded so that all of them end at the same column, and what the model
    remembers of them.
    """

    ids: torch.Tensor  # (B, T + room for all new tokens)
    # the same shape, 1 for a token and 0 for padding; None where nothing is padded
    mask: torch.Tensor | None
    starts: torch.Tensor  # (B): the column where each row's text begins
    length: int  # columns in use
    cache: DynamicCache

    @property
    def tokens(self) -> torch.Tensor:
        """All tokens so far, (B, length)."""
        return self.ids[:, : self.length]


@dataclass
class Step:
    """What one pass gave: a token for each row, and the logits that it was chosen from."""

    tokens: list[int]  # (B); the padding id in rows that had ended
    live: list[bool]  # (B): whether the row had not ended before this token
    logits: torch.Tensor  # (B, V), fp32, before any filter
    # (B): shared by all steps; who reads the text may end a row by a stop string
    ended: list[bool] = field(default_factory=list)


def left_pad(
    prompts: list[list[int]], language_model: LanguageModel, *, room: int, cache: DynamicCache | None = None
) -> Batch:
    """Return prompts as a batch with `room` more columns for new tokens, and an empty cache or one
    that holds their first columns.
    """
    length, device = max(map(len, prompts)), language_model.device
    ids = torch.full((len(prompts), length + room), language_model.pad_id, dtype=torch.long)
    mask = torch.ones_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) : length] = torch.tensor(prompt)
        mask[row, : length - len(prompt)] = 0
    starts = torch.tensor([length - len(prompt) for prompt in prompts], device=device)
    padded = any(len(prompt) < length for prompt in prompts)
    return Batch(
        ids.to(device),
        mask.to(device) if padded else None,
        starts,
        length,
        new_cache(language_model) if cache is None else cache,
    )


def new_cache(language_model: LanguageModel) -> DynamicCache:
    """Return an empty cache that forgets what a sliding window can't see."""
    return DynamicCache(config=language_model.model.config.get_text_config(decoder=True))


def prefill(language_model: LanguageModel, batch: Batch) -> torch.Tensor:
    """Read all tokens that the cache does not hold yet; return the logits (B, V) that follow each
    row, fp32.
    """
    return forward(language_model, batch, first=batch.cache.get_seq_length())[:, -1].float()


def step(language_model: LanguageModel, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """Add one token (B) to each row and return the logits (B, V) that follow, fp32."""
    batch.ids[:, batch.length] = tokens
    batch.length += 1
    return forward(language_model, batch, first=batch.length - 1)[:, -1].float()


def forward(language_model: LanguageModel, batch: Batch, *, first: int, keep: int = 1) -> torch.Tensor:
    """Run the model over the columns from `first` to the end; return the logits of the last `keep`
    columns, (B, keep, V), in the model's precision.
    """
    # padding stands below 0
    positions = torch.arange(first, batch.length, device=batch.ids.device) - batch.starts[:, None]
    inputs = {"position_ids": positions.clamp(min=0), "logits_to_keep": keep}
    accepted = accepted_inputs(type(language_model.model))
    inputs = {name: value for name, value in inputs.items() if name in accepted}
    mask = None if batch.mask is None else batch.mask[:, : batch.length]
    found = language_model.model(
        input_ids=batch.ids[:, first : batch.length],
        attention_mask=mask,
        past_key_values=batch.cache,
        use_cache=True,
        **inputs,
    )
    return found.logits[:, -keep:]


_ACCEPTED: dict[type, frozenset[str]] = {}


def accepted_inputs(model_class: type) -> frozenset[str]:
    """Return the names that a model's forward takes: Bloom has no positions, old models no
    logits_to_keep. Looked up once a class, not once a token.
    """
    if model_class not in _ACCEPTED:
        _ACCEPTED[model_class] = frozenset(inspect.signature(model_class.forward).parameters)
    return _ACCEPTED[model_class]


# (logits (B, V), batch, tokens made so far) -> tokens (B)
Choose = Callable[[torch.Tensor, Batch, int], torch.Tensor]


def exact_sampler(settings: Settings, batch: Batch, seed: int) -> Choose:
    """Return the chooser whose tokens are `generate`'s after `torch.manual_seed(seed)`: the same
    filters, sorts and random numbers.
    """
    generator = torch.Generator(batch.ids.device).manual_seed(seed)
    filters = sampling.history_filters(
        settings, prompt_length=batch.length, starts=batch.starts, padding_is_text=True
    )

    def choose(logits: torch.Tensor, batch: Batch, made: int) -> torch.Tensor:
        logits = apply(filters, logits, batch.tokens)
        return (
            fast_sampling.draw_exactly(logits, settings, generator) if settings.sample else logits.argmax(-1)
        )

    return choose


def fast_sampler(settings: Settings, batch: Batch, seed: int, rows: list[tuple[int, int]]) -> Choose:
    """Return the chooser in which each row, named by (prompt, sample), has random numbers of its
    own: its text does not depend on its neighbours.
    """
    uniforms = (
        fast_sampling.row_uniforms(seed, rows, settings.max_new_tokens).to(batch.ids.device)
        if settings.sample
        else None
    )
    filters = sampling.history_filters(
        settings, prompt_length=batch.length, starts=batch.starts, padding_is_text=False
    )

    def choose(logits: torch.Tensor, batch: Batch, made: int) -> torch.Tensor:
        logits = apply(filters, logits, batch.tokens)
        return (
            fast_sampling.draw_fast(logits, settings, uniforms[:, made])
            if settings.sample
            else logits.argmax(-1)
        )

    return choose


def apply(filters: list[sampling.Filter], logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, V) after all filters, which see the tokens (B, T) so far."""
    for stage in filters:
        logits = stage.apply(logits, tokens)
    return logits


@torch.inference_mode()
def decode(language_model: LanguageModel, batch: Batch, choose: Choose, settings: Settings) -> Iterator[Step]:
    """Yield one Step a token until every row has ended or has its most tokens. Raises UserError
    when the model's logits are not numbers.

    Rows that have ended get padding and keep drawing random numbers, as in `generate`. Whoever
    reads the steps may end a row in `ended`.
    """
    ends, ended = set(settings.end_ids), [False] * len(batch.ids)
    logits = prefill(language_model, batch)
    for made in range(settings.max_new_tokens):
        live = [not over for over in ended]
        chosen = fetch(choose(logits, batch, made), logits, language_model)
        tokens = [token if alive else language_model.pad_id for token, alive in zip(chosen, live)]
        for row, token in enumerate(tokens):
            ended[row] = ended[row] or token in ends
        yield Step(tokens, live, logits, ended)
        if all(ended) or made + 1 == settings.max_new_tokens:
            return
        logits = step(language_model, batch, torch.tensor(tokens, device=batch.ids.device))


def fetch(tokens: torch.Tensor, logits: torch.Tensor, language_model: LanguageModel) -> list[int]:
    """Return tokens (B) as Python's numbers. Raises UserError when a row of the logits (B, V)
    holds NaN or infinity: argmax would silently pick it.
    """
    broken = ~logits.amax(-1).isfinite().all()
    # the one sync with a GPU for each token, and deliberate: the text is shown as it grows
    *found, wrong = torch.cat([tokens, broken[None]]).tolist()
    if wrong:
        raise UserError(
            f"--model {language_model.name}: its logits are not numbers (NaN or infinite); use --precision"
            " fp32, or mend the model"
        )
    return found
