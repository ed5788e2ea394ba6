"""Prompts in, texts out: runs a batch through the decoder and turns each row's tokens into text,
log-probabilities and a finish reason.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from common.generation import decoding, lookup
from common.generation.language_model import LanguageModel
from common.generation.sampling import Settings
from common.generation.textstream import TextStream


@dataclass(frozen=True)
class Prompt:
    """One prompt: its number among all prompts, its text as given, and its token ids."""

    number: int
    text: str
    ids: list[int]


@dataclass
class Completion:
    """One generated text. `finish_reason`: end (an end token), stop (a stop string) or length (the
    most tokens).
    """

    prompt: Prompt
    sample: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass
class Timing:
    """What the summary line is made of: tokens, seconds, and how many guessed tokens were
    right.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    # new_tokens without the first one of each text, which the prefill gives
    decode_tokens: int = 0
    first_token_seconds: float = 0.0  # of the first batch
    guesses: lookup.Guesses = field(default_factory=lookup.Guesses)

    def add(
        self, rows: list[Completion], *, prompt_tokens: int, prefill_seconds: float, decode_seconds: float
    ):
        """Take note of a finished batch; `prompt_tokens`: those that were read, and not in the
        cache before.
        """
        if self.new_tokens == 0:
            self.first_token_seconds = prefill_seconds
        new_tokens = sum(len(row.token_ids) for row in rows)
        self.prompt_tokens += prompt_tokens
        self.new_tokens += new_tokens
        self.decode_tokens += new_tokens - len(rows)
        self.prefill_seconds += prefill_seconds
        self.decode_seconds += decode_seconds


@dataclass(frozen=True)
class Options:
    """How prompts become texts, beyond the choice of tokens."""

    settings: Settings
    seed: int = 0
    fast: bool = False  # the fast sampler instead of the exact one
    num_samples: int = 1
    stops: tuple[str, ...] = ()
    num_logprobs: int | None = None
    lookup: int = 0  # guess so many tokens ahead from what was written before


class Generator:
    """A model with options that turns batches of prompts into texts, and the timing of all of
    them.
    """

    def __init__(self, language_model: LanguageModel, options: Options):
        self.language_model, self.options, self.timing = language_model, options, Timing()

    def complete(
        self, prompts: list[Prompt], *, seed: int, show: Callable[[str], None] | None = None
    ) -> list[Completion]:
        """Return the texts of one batch, in the order (prompt, sample). `show` gets the chunks of
        the first one as they come.

        `seed`: of this batch, for the exact sampler. Raises UserError when the model gives no
        numbers.
        """
        rows = self.rows(prompts)
        batch = decoding.left_pad(
            [row.prompt.ids for row in rows], self.language_model, room=self.options.settings.max_new_tokens
        )
        self.fill(rows, batch, seed=seed, show=show)
        return rows

    def rows(self, prompts: list[Prompt]) -> list[Completion]:
        """Return an empty text for each prompt and sample."""
        return [
            Completion(prompt, sample) for prompt in prompts for sample in range(self.options.num_samples)
        ]

    def fill(
        self, rows: list[Completion], batch: decoding.Batch, *, seed: int, show: Callable[[str], None] | None
    ):
        """Decode a batch and fill its rows in."""
        streams = [TextStream(self.language_model.tokenizer, self.options.stops) for _ in rows]
        read = batch.length - batch.cache.get_seq_length()  # columns that are not in the cache
        started, first = time.perf_counter(), None
        for step in self.steps(batch, rows, seed):
            first = first or time.perf_counter()  # the first token is there: the prefill is over
            self.take(step, rows, streams, show)
        ended = time.perf_counter()
        for row, stream in zip(rows, streams):
            chunk = stream.finish()
            row.text = stream.text
            if show and row is rows[0] and chunk:
                show(chunk)
        prompt_tokens = sum(min(len(row.prompt.ids), read) for row in rows)
        self.timing.add(
            rows, prompt_tokens=prompt_tokens, prefill_seconds=first - started, decode_seconds=ended - first
        )

    def steps(self, batch: decoding.Batch, rows: list[Completion], seed: int) -> Iterator[decoding.Step]:
        """Return the iterator of steps that the options ask for."""
        options, settings = self.options, self.options.settings
        if options.lookup:
            return lookup.decode(
                self.language_model, batch, settings, ahead=options.lookup, guesses=self.timing.guesses
            )
        if options.fast:
            choose = decoding.fast_sampler(
                settings, batch, options.seed, [(row.prompt.number, row.sample) for row in rows]
            )
        else:
            choose = decoding.exact_sampler(settings, batch, seed)
        return decoding.decode(self.language_model, batch, choose, settings)

    def take(
        self,
        step: decoding.Step,
        rows: list[Completion],
        streams: list[TextStream],
        show: Callable[[str], None] | None,
    ):
        """Give one step's tokens to the rows that are still growing; end a row whose text holds a
        stop string.
        """
        wanted = self.options.num_logprobs
        details = logprobs(step, wanted, self.language_model.tokenizer) if wanted is not None else None
        for number, (row, stream, token) in enumerate(zip(rows, streams, step.tokens)):
            if not step.live[number]:
                continue
            row.token_ids.append(token)
            if details is not None:
                row.logprobs.append(details[number])
            if token in self.options.settings.end_ids:
                row.finish_reason = "end"  # the end token is no part of the text
                continue
            chunk = stream.add(token)
            if show and number == 0 and chunk:
                show(chunk)
            if stream.stopped:
                row.finish_reason, step.ended[number] = "stop", True

    def summary(self, peak_memory_bytes: int) -> str:
        """Return one line for a person: tokens a second, time to the first token, memory, and with
        guesses how many were right.
        """
        timing, guesses = self.timing, self.timing.guesses
        parts = [
            f"prompt {timing.prompt_tokens:,} tokens, {_rate(timing.prompt_tokens, timing.prefill_seconds)}",
            f"text {timing.new_tokens:,} tokens, {_rate(timing.decode_tokens, timing.decode_seconds)}",
            f"first token after {timing.first_token_seconds:.2f} s",
            f"peak memory {peak_memory_bytes / 1e6:,.0f} MB",
        ]
        if self.options.lookup:
            share = guesses.right / max(guesses.offered, 1)
            parts.append(
                f"lookup: {guesses.right:,} of {guesses.offered:,} guessed tokens accepted ({share:.0%})"
            )
        return "; ".join(parts)


def logprobs(step: decoding.Step, count: int, tokenizer) -> list[dict]:
    """Return for each row its token's log-probability under the model, before any filter, and the
    `count` likeliest tokens with theirs.
    """
    scores = step.logits.log_softmax(-1)  # (B, V), natural logarithms
    best = scores.topk(min(count, scores.shape[-1]))
    own = scores.gather(-1, torch.tensor(step.tokens, device=scores.device)[:, None])[:, 0].tolist()
    return [
        {**entry(token, value, tokenizer), "top": [entry(*pair, tokenizer) for pair in zip(ids, values)]}
        for token, value, ids, values in zip(step.tokens, own, best.indices.tolist(), best.values.tolist())
    ]


def entry(token: int, value: float, tokenizer) -> dict:
    """Return one token with its log-probability."""
    return {"id": token, "token": tokenizer.decode([token]), "logprob": round(value, 6)}


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.1f} tokens/s" if tokens and seconds > 0 else "no rate"
