"""From tokens to texts: streamed text, completions with their log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from common.errors import UserError
from common.generation import decoding
from common.generation.decoding import Batch, Step
from common.generation.language_model import LanguageModel
from common.generation.lookup import PromptLookup
from common.generation.sampling import Settings

if TYPE_CHECKING:  # importing it takes a second
    from transformers import PreTrainedTokenizerBase

    from common.generation.beams import Beams
    from common.generation.chat import ChatFormat
    from common.generation.decoding import Cache
    from common.generation.messages import Message
    from common.tokenizer import Tokenizer

LOGPROB_BYTES = 300  # of an entry of --logprobs, until its batch is written
REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are not (yet) a whole character


class TextStream:
    """Turns one text's tokens into pieces of text that can be shown at once.

    Call `add` for each token and `finish` once at the end. All pieces joined are what the tokens
    add to the text of `before`, the tokens of the prompt: decoded without them, a text of
    SentencePiece would lose the space that it begins with. A character can take several tokens, and
    a stop string can lie across tokens: both are held back until they are whole. The search for
    stop strings looks at the new text only, never at the prompt (transformers #31435).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | Tokenizer,
        stops: tuple[str, ...] = (),
        before: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids = [*before]
        self.decoded = len(self.ids)  # ids[:decoded] are decoded
        # ids[overlap_start:decoded] are decoded again with what follows, because some decoders
        # treat the first token of a text differently
        self.overlap_start = 0
        self.held = ""  # decoded but not shown: it may be the beginning of a stop string
        self.text = ""  # everything shown so far
        # a stop string has been found; neither it nor what follows is part of the text
        self.stopped = False

    def add(self, token: int) -> str:
        """Add one token; return the text that can be shown now, which is often ""."""
        self.ids.append(token)
        return self._show(self._decode_new(whole_characters=True))

    def finish(self) -> str:
        """Return what was held back: at the end of the text, it can no longer become a stop string
        or a whole character.
        """
        shown = self._show(self._decode_new(whole_characters=False))
        rest, self.held = self.held, ""
        self.text += rest
        return shown + rest

    def _decode_new(self, *, whole_characters: bool) -> str:
        before = self._decode(self.overlap_start, self.decoded)
        after = self._decode(self.overlap_start, len(self.ids))
        must_wait = whole_characters and after.endswith(REPLACEMENT)
        if len(after) <= len(before) or must_wait:
            return ""
        self.overlap_start, self.decoded = self.decoded, len(self.ids)
        return after[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        ids = self.ids[start:end]
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(ids, **options))

    def _show(self, new: str) -> str:
        if self.stopped:
            return ""
        self.held += new
        stop_indices = [self.held.index(stop) for stop in self.stops if stop in self.held]
        if stop_indices:
            self.stopped = True
            shown, self.held = self.held[: min(stop_indices)], ""
        else:
            end = len(self.held) - self._num_uncertain()
            shown, self.held = self.held[:end], self.held[end:]
        self.text += shown
        return shown

    def _num_uncertain(self) -> int:
        """Return how many characters at the end of `held`, which contains no stop string, could be
        the beginning of one.
        """
        longest = max(map(len, self.stops), default=0)
        for length in range(min(longest, len(self.held)), 0, -1):
            ending = self.held[-length:]
            if any(stop.startswith(ending) for stop in self.stops):
                return length
        return 0


@dataclass(frozen=True)
class Prompt:
    """One prompt: its number among all prompts (from 0), its text as given, and its token ids.

    Of a conversation, the text is the last question, and `messages` is all of it. With a `problem`
    no text is generated.
    """

    number: int
    text: str
    ids: list[int]
    messages: list[Message] | None = None
    problem: str = ""
    cells: dict[str, Any] = field(default_factory=dict)  # of the columns that are kept with its texts


@dataclass
class Completion:
    """One generated text.

    `finish_reason` is "end" (an end token), "stop" (a stop string), "length" (`max_new_tokens` reached) or
    "refused" (a prompt that can't be used).
    """

    prompt: Prompt
    sample: int  # from 0
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)
    finish_reason: str = "length"

    @property
    def text(self) -> str:
        """The text so far; all of it after `finish`."""
        return self.stream.text

    def add(self, token: int, end_ids: tuple[int, ...]) -> bool:
        """Add one token; return whether the text ends with it."""
        self.token_ids.append(token)
        if token in end_ids:
            self.finish_reason = "end"  # the end token is not part of the text
            return True
        self.stream.add(token)
        if self.stream.stopped:
            self.finish_reason = "stop"
        return self.stream.stopped

    def mark_whole(self, settings: Settings) -> None:
        """Let the text count as ended if it has reached `max_new_tokens` and satisfies its constraint: only
        its end token is missing.
        """
        if settings.constraint is None or self.finish_reason != "length":
            return
        may_follow = settings.constraint.start()(self.token_ids)  # (V)
        if may_follow[settings.end_ids[0]]:
            self.finish_reason = "end"

    def finish(self) -> None:
        """Add to the text what was held back."""
        self.stream.finish()


def logprobs(step: Step, count: int, tokenizer: PreTrainedTokenizerBase | Tokenizer) -> list[dict]:
    """Return for each row its token's log-probability, and the `count` most likely tokens.

    They are the model's natural logarithms, before any filter.
    """
    scores = step.logits.log_softmax(-1)  # (B, V)
    tokens = torch.tensor(step.tokens, device=scores.device)
    own = scores.gather(-1, tokens[:, None])[:, 0].tolist()
    best = scores.topk(min(count, scores.shape[-1]))

    def entry(token: int, value: float) -> dict:
        return {"id": token, "token": tokenizer.decode([token]), "logprob": round(value, 6)}

    rows = zip(step.tokens, own, best.indices.tolist(), best.values.tolist())
    return [
        {**entry(token, value), "top": [entry(*pair) for pair in zip(ids, values)]}
        for token, value, ids, values in rows
    ]


@dataclass
class Timing:
    """Tokens and seconds of a run, for the summary line. For each batch: `start` before its prefill,
    `note_token` for each token, `end` after the last one.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0  # new_tokens without the first of each text, which belongs to the prefill
    first_token_seconds: float = 0.0  # in the first batch
    num_texts: int = 0
    num_cut: int = 0  # texts that ended because they reached `max_new_tokens`
    num_guessed: int = 0  # by prompt lookup
    num_accepted: int = 0
    # of the batch that is being generated
    num_columns: int = 0  # that its prefill reads
    started: float = 0.0
    first_token: float | None = None

    def start(self, batch: Batch) -> None:
        """Begin with a batch, before its prefill."""
        self.num_columns = batch.length - batch.cache.get_seq_length()
        self.started, self.first_token = time.perf_counter(), None

    def note_token(self) -> None:
        """Note that a token has arrived: with the first one, the prefill is over."""
        if self.first_token is None:
            self.first_token = time.perf_counter()

    def end(self, rows: list[Completion], lookup: PromptLookup | None) -> None:
        """Count a batch whose last token has just arrived.

        Of the prompts, only what the prefill read is counted, not what was in the cache before.
        """
        ended, first_token = time.perf_counter(), self.first_token or self.started
        if self.new_tokens == 0:
            self.first_token_seconds = first_token - self.started
        new_tokens = sum(len(row.token_ids) for row in rows)
        self.prompt_tokens += sum(min(len(row.prompt.ids), self.num_columns) for row in rows)
        self.new_tokens += new_tokens
        self.decode_tokens += new_tokens - len(rows)
        self.num_texts += len(rows)
        self.num_cut += sum(row.finish_reason == "length" for row in rows)
        self.prefill_seconds += first_token - self.started
        self.decode_seconds += ended - first_token
        if lookup is not None:
            self.num_guessed += lookup.num_guessed
            self.num_accepted += lookup.num_accepted


@dataclass(frozen=True)
class Options:
    """Generation options: those of a token, and those of a text."""

    settings: Settings
    seed: int = 0
    sampler: str = "exact"  # or "independent"
    num_samples: int = 1
    stops: tuple[str, ...] = ()
    num_logprobs: int | None = None
    lookup: int = 0  # the maximum number of tokens to guess at once; 0: no prompt lookup
    beams: Beams | None = None  # search for the likeliest texts


@dataclass(frozen=True)
class Run:
    """A loaded model with the options of a run, and its timing for the summary line."""

    language_model: LanguageModel
    options: Options
    timing: Timing = field(default_factory=Timing)
    chat: ChatFormat | None = None  # how conversations are written, where there are any

    def rows(self, prompts: list[Prompt]) -> list[Completion]:
        """Return an empty completion for each prompt and sample, in this order."""
        tokenizer, stops = self.language_model.tokenizer, self.options.stops
        return [
            Completion(
                prompt,
                sample,
                TextStream(tokenizer, stops, prompt.ids),
                finish_reason="refused" if prompt.problem else "length",
            )
            for prompt in prompts
            for sample in range(self.options.num_samples)
        ]

    def check_memory(self, prompts: list[Prompt], free_bytes: int | None) -> None:
        """Raise UserError if a batch of these prompts needs more memory than there is free."""
        num_rows = len(prompts) * self.options.num_samples
        if self.options.beams is not None:
            num_rows = len(prompts) * self.options.beams.size
        longest = max(len(prompt.ids) for prompt in prompts)
        num_columns = longest + self.options.settings.max_new_tokens
        needed = num_rows * self.bytes_per_row(num_columns)
        if free_bytes is not None and needed > free_bytes:
            raise UserError(
                f"--num-samples {self.options.num_samples}: a batch of {num_rows:,} texts of up to"
                f" {num_columns:,} tokens needs about {needed / 1e9:,.1f} GB, and"
                f" {free_bytes / 1e9:,.1f} GB are free; lower it, --batch-size, --max-new-tokens or"
                " --logprobs"
            )

    def bytes_per_row(self, num_columns: int) -> int:
        """Return about how much memory a text takes: its cache, ids and mask; its logits and their
        copies in the sampler; its log-probabilities.
        """
        vocabulary, cache = self.language_model.vocabulary, self.language_model.model.cache_bytes
        entries = 0
        if self.options.num_logprobs is not None:
            best = min(self.options.num_logprobs, vocabulary)
            entries = self.options.settings.max_new_tokens * (1 + best)
        return num_columns * (cache + 16) + vocabulary * 16 + entries * LOGPROB_BYTES

    def left_pad(self, rows: list[Completion], cache: Cache | None = None) -> Batch:
        """Return the prompts of some completions as a batch with room for all new tokens."""
        return decoding.left_pad(
            [row.prompt.ids for row in rows],
            self.language_model,
            room=self.options.settings.max_new_tokens,
            cache=cache,
        )

    def sampler_seed(self, rows: list[Completion], batch_seed: int) -> int | list[str]:
        """Return the seed for `make_sampler`: the batch's for the exact sampler, a name of each text
        for the independent one.
        """
        if self.options.sampler == "exact":
            return batch_seed
        return [f"{self.options.seed}/{row.prompt.number}/{row.sample}" for row in rows]

    def add_step(self, rows: list[Completion], step: Step, batch: Batch) -> None:
        """Add one token to each text that has not ended, and end the rows of those with a stop string;
        at end tokens, the decoding loop ends them.
        """
        row_logprobs = None
        if self.options.num_logprobs is not None:
            row_logprobs = logprobs(step, self.options.num_logprobs, self.language_model.tokenizer)
        for index, (row, token) in enumerate(zip(rows, step.tokens)):
            if batch.ended[index]:
                continue
            row.add(token, self.options.settings.end_ids)
            batch.ended[index] = row.stream.stopped
            if row_logprobs is not None:
                row.logprobs.append(row_logprobs[index])

    def summary(self, peak_memory_bytes: int) -> str:
        """Return one line for a person: tokens per second, time to the first token, memory, how
        many texts were cut, and with prompt lookup how many guesses were accepted.
        """
        timing = self.timing
        parts = [
            f"prompt {_counted(timing.prompt_tokens, timing.prompt_tokens, timing.prefill_seconds)}",
            f"text {_counted(timing.new_tokens, timing.decode_tokens, timing.decode_seconds)}",
            f"first token after {timing.first_token_seconds:.2f} s",
            f"peak memory {peak_memory_bytes / 1e6:,.0f} MB",
            f"step in {self.language_model.backend}",
        ]
        if self.language_model.model.is_compiled and self.options.settings.sample:
            reason = "rounding can change a drawn token; --plain-step draws as model.generate"
            parts[-1] += f" ({reason})"
        if timing.num_cut:
            cut = f"cut at {self.options.settings.max_new_tokens:,} tokens"
            constraint = self.options.settings.constraint
            cut += f", before the end of its {constraint.name}" if constraint else ""
            several = f"{timing.num_cut:,} of {timing.num_texts:,} "
            parts.append(cut if timing.num_texts == 1 else several + cut)
        if self.options.lookup:
            guessed, accepted = timing.num_guessed, timing.num_accepted
            share = accepted / max(guessed, 1)
            guesses = f"{accepted:,} of {guessed:,} guessed tokens accepted"
            parts.append(f"lookup: {guesses} ({share:.0%})")
        return "; ".join(parts)


def memory_advice(num_rows: int) -> str:
    """Return what to say where memory runs out while `num_rows` texts are generated together."""
    if num_rows == 1:
        texts, helps = "the text", "--max-new-tokens, or name a smaller model"
    else:
        texts = f"{num_rows:,} texts"
        helps = "--batch-size, --num-samples or --max-new-tokens, or name a smaller model"
    return f"there is too little memory to generate {texts}; lower {helps}"


def _counted(tokens: int, timed_tokens: int, seconds: float) -> str:
    """Return a number of tokens, and the speed of those that were timed."""
    is_known = timed_tokens > 0 and seconds > 0
    speed = f"{timed_tokens / seconds:,.1f} tokens/s" if is_known else "no rate"
    return f"{tokens:,} tokens, {speed}"
