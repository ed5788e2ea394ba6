"""What a user can see of the sampler: a proof against `model.generate`, a table of what each filter
does, and greedy, top-k and top-p side by side.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common import terminal
from common.generation import decoding, sampling
from common.generation.completion import Completion, Options, Prompt, Run
from common.generation.decoding import Batch, Step
from common.generation.generation_flags import LIBRARY_DRAWING
from common.generation.language_model import LanguageModel
from common.generation.sampling import Filter, Settings

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

    from common.tokenizer import Tokenizer

CONTINUATION_TOKENS = 12  # shown of each continuation, from the first difference on
CANDIDATES = 8  # shown for each token
BAR_WIDTH = 8  # characters of a bar for 100 %
BLOCKS = " ▏▎▍▌▋▊▉█"
# from the blog post that the tutorial follows, huggingface.co/blog/how-to-generate
COMPARED_TOP_K, COMPARED_TOP_P = 50, 0.92


# --check: the same prompts through model.generate, compared token by token ------------------------


@dataclass(frozen=True)
class Difference:
    """Where a row's tokens first differ from those of `generate`; a token is None where its text
    has ended.
    """

    row: Completion
    index: int
    ours: int | None
    theirs: int | None
    their_ids: list[int]


def generation_config(options: Options, language_model: LanguageModel) -> GenerationConfig:
    """Return our options in the terms of `generate`."""
    from transformers import GenerationConfig

    settings = options.settings
    drawing = {}
    if settings.sample:
        drawing = {name: getattr(settings, name) for name in LIBRARY_DRAWING}
        if own_filters(settings):  # they have their own place among the library's
            drawing = {"top_k": 0}
    searching: dict[str, Any] = {"num_beams": 1}
    if options.beams is not None:
        beams = options.beams
        searching = {"num_beams": beams.size, "early_stopping": beams.early_stopping}
        searching["length_penalty"] = beams.length_penalty
    return GenerationConfig(
        do_sample=settings.sample,
        **searching,
        num_return_sequences=options.num_samples,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        sequence_bias=[[[number], value] for number, value in settings.logit_bias] or None,
        bad_words_ids=[list(run) for run in settings.banned] or None,
        eos_token_id=list(settings.end_ids) or None,
        pad_token_id=language_model.pad_id,
        stop_strings=list(options.stops) or None,
        **drawing,
    )


def own_filters(settings: Settings) -> bool:
    """Return whether tokens are drawn with a filter that the library does not have."""
    return settings.sample and (settings.top_n_sigma > 0 or settings.xtc_probability > 0)


def library_processors(
    settings: Settings, *, prompt_length: int, num_rows: int, seed: int
) -> LogitsProcessorList:
    """Return what `generate` must be given for filters that the library does not have: ours, which
    then run inside `generate`; with one that shapes the distribution, all of those, in our order.
    """
    from transformers import LogitsProcessorList

    own = replace(  # of the filters that depend on the tokens so far, these are not the library's
        Settings(),
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        constraint=settings.constraint,
    )
    filters = sampling.history_filters(own, prompt_length=prompt_length, starts=None, padding_is_text=True)
    if own_filters(settings):
        filters += sampling.distribution_filters(settings, sampling.name_rows(seed, num_rows))

    def apply(ids: Tensor, logits: Tensor) -> Tensor:
        return sampling.apply_filters(filters, logits, ids)

    return LogitsProcessorList([apply])  # pyrefly: ignore[bad-argument-type]  (a function will do)


def library_model(language_model: LanguageModel) -> PreTrainedModel:
    """Return the model of transformers: for one that the step in C computes, the library's over the same
    weights, widened to fp32; in fp32, with an adapter that is not merged, as peft computes it.
    """
    from common.generation import library

    model, adapter = language_model.model, language_model.adapter
    name, folder = language_model.name, language_model.folder
    if not isinstance(model, library.TransformersModel):
        plain = library.over_folder(folder, language_model.weights, name=name)
    elif adapter is None or model.dtype != torch.float32:
        return model.module  # in 16 bits, what is merged is rounded, and no longer comparable
    else:
        plain = library.load(folder, torch.float32, model.device, name=name)
    if adapter is not None:
        from common.generation import adapters

        adapters.attach(plain, adapter, name=name)
    return plain


@torch.inference_mode()
def library_tokens(
    language_model: LanguageModel,
    model: PreTrainedModel,
    prompts: list[Prompt],
    options: Options,
    *,
    seed: int,
) -> list[list[int]]:
    """Return the new tokens that `model.generate` gives for a batch; `model` is `library_model`'s.

    There is one list for each prompt and sample, with the padding that `generate` adds after the
    end of a text. What a call leaves open, `generate` takes from the model's own generation
    config: for this call that config is empty, so that the flags alone decide.
    """
    batch = decoding.left_pad([prompt.ids for prompt in prompts], language_model, room=0)
    mask = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
    torch.manual_seed(seed)
    own_config = model.generation_config
    try:
        model.generation_config = type(own_config)()
        output = model.generate(  # pyrefly: ignore[not-callable]  (load refuses models without it)
            batch.ids,
            attention_mask=mask,
            generation_config=generation_config(options, language_model),
            logits_processor=library_processors(
                options.settings,
                prompt_length=batch.length,
                num_rows=len(prompts) * options.num_samples,
                seed=seed,
            ),
            tokenizer=library_tokenizer(language_model) if options.stops else None,
        )
    finally:
        model.generation_config = own_config
    rows = output[:, batch.length :].tolist()
    # after a beam search it pads with what may be an end token
    return [_until_end(row, options.settings.end_ids) for row in rows] if options.beams else rows


def _until_end(row: list[int], end_ids: tuple[int, ...]) -> list[int]:
    """Return the tokens of a row up to its first end token."""
    lengths = [index + 1 for index, token in enumerate(row) if token in end_ids]
    return row[: min(lengths, default=len(row))]


def library_tokenizer(language_model: LanguageModel) -> PreTrainedTokenizerBase:
    """Return the tokenizer of transformers, in which `generate` looks for stop strings."""
    from common import models
    from common.tokenizer import Tokenizer

    if isinstance(language_model.tokenizer, Tokenizer):
        return models.load_tokenizer(language_model.folder, name=language_model.name)
    return language_model.tokenizer


def first_difference(row: Completion, theirs: list[int], *, pad_id: int | None) -> Difference | None:
    """Return where a row first differs from the tokens of `generate`, None if it does not.

    What follows the end of a row must be `pad_id`. None: no token ends a text, so `generate` adds
    no padding.
    """
    ours = row.token_ids
    for index, (our_token, their_token) in enumerate(zip(ours, theirs)):
        if our_token != their_token:
            return Difference(row, index, our_token, their_token, theirs)
    if len(ours) > len(theirs):
        return Difference(row, len(theirs), ours[len(theirs)], None, theirs)
    if pad_id is None:
        return None
    for index in range(len(ours), len(theirs)):
        if theirs[index] != pad_id:
            return Difference(row, index, None, theirs[index], theirs)
    return None


@torch.inference_mode()
def describe_difference(difference: Difference, language_model: LanguageModel) -> str:
    """Return the first difference in words: both tokens with their logits after the tokens that
    they share, and both continuations.
    """
    row, index = difference.row, difference.index
    batch = decoding.left_pad([row.prompt.ids + row.token_ids[:index]], language_model, room=0)
    logits = decoding.prefill(language_model, batch)[0]  # (V)
    decode = language_model.tokenizer.decode

    def describe(token: int | None, ids: list[int]) -> str:
        if token is None:
            return "has ended here"
        continuation = decode(ids[index : index + CONTINUATION_TOKENS])
        logit = f"logit {logits[token].item():.6f}"
        return f"{decode([token])!r} (id {token}), {logit}, continues: {continuation!r}"

    place = f"prompt {row.prompt.number + 1}, sample {row.sample + 1}, token {index + 1}"
    lines = [
        f"different: {place}; the {index} before it are equal",
        f"{'ours':<9} {describe(difference.ours, row.token_ids)}",
        f"{'generate':<9} {describe(difference.theirs, difference.their_ids)}",
    ]
    if language_model.model.is_compiled:
        lines.append("the step in C rounds sums in another order; --plain-step is as generate")
    return "\n".join(lines)


class LibraryCheck:
    """Compares the texts of a run with those of `model.generate`, batch by batch."""

    def __init__(self, run: Run) -> None:
        self.run, self.library = run, library_model(run.language_model)
        self.num_equal = 0  # tokens

    def is_equal(self, prompts: list[Prompt], rows: list[Completion], *, seed: int) -> bool:
        """Return whether the completions of a batch are those of `generate`; print the first
        difference.
        """
        model, options = self.run.language_model, self.run.options
        pad_id = model.pad_id if options.settings.end_ids else None
        for row, theirs in zip(rows, library_tokens(model, self.library, prompts, options, seed=seed)):
            difference = first_difference(row, theirs, pad_id=pad_id)
            if difference:
                print(describe_difference(difference, model))
                return False
            self.num_equal += len(row.token_ids)
        return True


# --explain: what every filter does to the candidates for a token ----------------------------------


@dataclass(frozen=True)
class Stage:
    """The distribution of the next token after a filter, or the model's own."""

    name: str
    probabilities: Tensor  # (V)


def all_filters(settings: Settings, *, prompt_length: int, seed: int | list[str]) -> list[Filter]:
    """Return all filters of one text, with the random numbers of a sampler of this seed."""
    filters = sampling.history_filters(
        settings, prompt_length=prompt_length, starts=None, padding_is_text=True
    )
    return filters + sampling.distribution_filters(settings, sampling.name_rows(seed, 1))


def stages(logits: Tensor, ids: Tensor, filters: list[Filter]) -> list[Stage]:
    """Return the model's own distribution and the one after each filter, for the next token of one
    text: logits (1, V), tokens so far (1, T).
    """
    result = [Stage("model", logits[0].softmax(-1))]
    for stage in filters:
        logits = stage.apply(logits, ids)
        result.append(Stage(stage.name, logits[0].softmax(-1)))
    return result


def show_steps(
    steps: Iterable[Step], run: Run, row: Completion, batch: Batch, *, seed: int | list[str]
) -> None:
    """Print a table for each token of a text, the only one of its batch, then the text. `seed` is
    that of its sampler.
    """
    filters = all_filters(run.options.settings, prompt_length=batch.length, seed=seed)
    for step in steps:
        shown = stages(step.logits, batch.tokens, filters)
        number = len(row.token_ids) + 1
        print(token_table(number, step.tokens[0], shown, row.stream.tokenizer), flush=True)
        run.add_step([row], step, batch)
    row.finish()
    print(row.text)


def token_table(
    number: int, token: int, stages: list[Stage], tokenizer: PreTrainedTokenizerBase | Tokenizer
) -> str:
    """Return the table of one token: the most likely candidates, each with its probability before
    and after every filter. `number` counts the new tokens from 1.
    """
    first, last = stages[0].probabilities, stages[-1].probabilities
    num_kept = int((last > 0).sum())
    shown = _candidates(first, last)
    if token not in shown:
        shown.append(token)
    lines = []
    for candidate in shown:
        mark, text = ">" if candidate == token else "", repr(tokenizer.decode([candidate]))
        values = [_cell(stage.probabilities[candidate].item()) for stage in stages]
        lines.append([mark, text, *values])
    columns = torch.tensor(shown, device=first.device)
    others = [stage.probabilities.index_fill(0, columns, 0.0).sum().item() for stage in stages]
    lines.append(["", "all others", *(_cell(value) for value in others)])
    text = repr(tokenizer.decode([token]))
    head = f"token {number}: {text}, one of {num_kept:,} kept of {len(last):,}"
    names = ["", "candidate", *(stage.name for stage in stages)]
    shown = terminal.table(lines, names, keys=2, style="plain", disable_numparse=True)
    return f"{head}\n{shown}\n"


def _candidates(first: Tensor, last: Tensor) -> list[int]:
    """Return the most likely tokens of the last distribution (V); where it keeps fewer than shown,
    the model's most likely ones follow.
    """
    top = last.topk(min(CANDIDATES, len(last))).indices.tolist()
    kept = [token for token in top if last[token] > 0]
    unfiltered = first.topk(min(2 * CANDIDATES, len(first))).indices.tolist()
    return list(dict.fromkeys([*kept, *unfiltered]))[:CANDIDATES]


def _cell(probability: float) -> str:
    if probability == 0:
        return f"{'-':>6} {bar(0)}"
    return f"{probability:6.1%} {bar(probability)}"


def bar(share: float) -> str:
    """Return a bar of BAR_WIDTH characters for a share from 0 to 1, in eighths of a character."""
    eighths = round(min(share, 1.0) * BAR_WIDTH * 8)
    partial = BLOCKS[eighths % 8] if eighths % 8 else ""
    return ("█" * (eighths // 8) + partial).ljust(BAR_WIDTH)


# --compare: greedy, top-k and top-p side by side --------------------------------------------------


def compared_settings(settings: Settings) -> dict[str, Settings]:
    """Return the three settings to compare, by name.

    Each keeps what the user asked for; k and p are the tutorial's where no others were given.
    """
    k = settings.top_k or COMPARED_TOP_K
    p = settings.top_p if settings.top_p < 1 else COMPARED_TOP_P
    plain = replace(settings, top_k=0, top_p=1.0, sample=True)
    return {
        "greedy": replace(plain, sample=False),
        f"top-k {k}": replace(plain, top_k=k),
        f"top-p {p:g}": replace(plain, top_p=p),
    }


def show_side_by_side(texts: dict[str, str]) -> None:
    """Print texts as columns under their names, over the whole width of the terminal."""
    print(side_by_side(texts, shutil.get_terminal_size((120, 24)).columns))  # $COLUMNS, if it is set


def side_by_side(texts: dict[str, str], width: int) -> str:
    """Return texts as columns under their names, all together `width` columns wide.

    What cannot be shown, such as a control character, becomes a space.
    """
    import wcwidth

    column_width = max(20, (width - 2 * (len(texts) - 1)) // len(texts))
    columns = []
    for name, text in texts.items():
        lines = [name, "-" * column_width]
        for paragraph in text.strip("\n").split("\n"):
            printable = "".join(char if char.isprintable() else " " for char in paragraph)
            lines += wcwidth.wrap(printable, column_width) or [""]
        columns.append(lines)
    rows = itertools.zip_longest(*columns, fillvalue="")
    padded = ([wcwidth.ljust(cell, column_width) for cell in row] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)
