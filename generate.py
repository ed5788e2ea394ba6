#!/usr/bin/env python
"""Generate text with a causal language model, token for token as `model.generate` does.

The loop is `decode`: prefill once; then, for each token, sampler, stop, step. Its parts are in
common/generation: decoding.py (prefill, step), sampling.py (filters, draw), completion.py (from
tokens to text). Left out on purpose: encoder-decoder models.

  python generate.py --prompt "Natural Language Processing is"  # greedy, SmolLM2-135M-Instruct
  python generate.py --prompt "Natural Language Processing is" --top-k 50 --seed 1
  python generate.py --prompt "Natural Language Processing is" --top-k 50 --check
  python generate.py --chat --prompt "Why is the sky blue?" --system "Answer in one sentence."
  python generate.py --interactive  # a conversation
  python generate.py --serve  # OpenAI's protocol, at http://127.0.0.1:8000/v1
  python generate.py --prompts-file prompts.txt --output texts.jsonl --batch-size 16
  torchrun --nproc-per-node 2 generate.py --prompts-file prompts.txt --output texts.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from common import bundled, cli, terminal
from common.columns import KeptColumns
from common.errors import Interrupted, UserError, outcome
from common.generation import generation_flags, output
from common.generation.generation_flags import (
    DEFAULT_WINDOW,
    DRAWING,
    EARLY_STOPPING,
    RECORDED,
    is_drawing,
    prompt_config,
)
from common.generation.messages import as_conversation
from common.generation.prompts import GivenPrompt, read_prompts

if TYPE_CHECKING:
    from common.generation.chat import ChatFormat
    from common.generation.conversation import Chat
    from common.generation.messages import Message

T = TypeVar("T")


def make_parser() -> cli.Parser:
    """Return the parser of all flags, which common/generation/generation_flags.py lists."""
    return generation_flags.make_parser(__doc__)


if __name__ == "__main__":
    # before the libraries are imported, which takes seconds: help and mistakes are answered at once
    ARGS = cli.parse(make_parser())
    bundled.verify_ahead(ARGS.model, ARGS.cache_dir)  # by another thread, while this one imports PyTorch

import torch
from tqdm import tqdm

from common import reading
from common.generation import beams, language_model, sampling
from common.generation.beams import Beams
from common.generation.completion import Completion, Options, Prompt, Run, memory_advice
from common.generation.decoding import Batch, Step, fetch_ids, prefill, step
from common.generation.fast_sampling import make_sampler  # the plain version: sampling.make_sampler
from common.generation.language_model import LanguageModel, Loading
from common.generation.lookup import PromptLookup
from common.generation.sampling import Constraint, Sampler, Settings
from common.runtime import Runtime, explain_out_of_memory, free_memory_bytes, start_runtime, stop_runtime

# From prompts to texts ----------------------------------------------------------------------------


@torch.inference_mode()
def decode(model: LanguageModel, batch: Batch, sampler: Sampler, settings: Settings) -> Iterator[Step]:
    """Yield one Step per token until every row has ended or has `max_new_tokens` tokens.

    A row ends at an end token, or when the caller marks it in `batch.ended`: `complete` does so at stop
    strings, which only a row's text shows. Rows that have ended get padding and keep drawing random
    numbers, as in `generate`. Raises UserError when the model's logits are not numbers. Shapes: B rows
    (texts), V tokens in the vocabulary.
    """
    logits = prefill(model, batch)  # (B, V)
    for number in range(1, settings.max_new_tokens + 1):
        chosen = sampler(logits, batch.tokens)  # (B)
        ids = fetch_ids(chosen, logits, model)  # B ids; refuses logits that are not numbers
        tokens = [model.pad_id if ended else token for token, ended in zip(ids, batch.ended)]
        yield Step(tokens, logits)  # meanwhile, complete() marks rows with a stop string in batch.ended
        for row, token in enumerate(tokens):
            batch.ended[row] |= token in settings.end_ids
        if all(batch.ended) or number == settings.max_new_tokens:
            return
        logits = step(model, batch, tokens)  # (B, V)


def complete(run: Run, rows: list[Completion], batch: Batch | None = None, *, seed: int) -> Iterator[str]:
    """Generate the texts of completions; yield what each token adds to the first text, to show it.

    `batch` holds their prompts; None makes one with an empty cache. `seed` is the seed of this
    batch, for the exact sampler.
    """
    if not rows:
        return
    options, settings = run.options, run.options.settings
    if options.beams is not None:
        with explain_out_of_memory(memory_advice(len(rows) * options.beams.size)):
            yield from beams.complete(run, rows, options.beams)
        return
    batch = batch or run.left_pad(rows)
    lookup = PromptLookup(options.lookup) if options.lookup else None
    if lookup:
        steps = lookup.decode(run.language_model, batch, settings)
    else:
        seeds, starts = run.sampler_seed(rows, seed), batch.starts
        sampler = make_sampler(settings, prompt_length=batch.length, starts=starts, seed=seeds)
        steps = decode(run.language_model, batch, sampler, settings)
    run.timing.start(batch)
    num_shown = 0  # characters of the first text that have been yielded
    with explain_out_of_memory(memory_advice(len(rows))):
        for current in steps:
            run.timing.note_token()
            run.add_step(rows, current, batch)  # also marks the rows that stop strings end
            yield rows[0].text[num_shown:]
            num_shown = len(rows[0].text)
    for row in rows:
        row.mark_whole(settings)
        row.finish()
    run.timing.end(rows, lookup)
    yield rows[0].text[num_shown:]


# Modes --------------------------------------------------------------------------------------------


def generate_texts(args: argparse.Namespace) -> None:
    """Generate all texts; show or write them, score them, and print how fast it was."""
    with output.open_file(args.output, resume=args.resume) as file:
        run, prompts, references, runtime = load_all(args)
        batches = split_batches(args, prompts)
        try:
            texts = generate_batches(args, run, batches, file, runtime)
        except (KeyboardInterrupt, Interrupted):
            # the signal can come while a batch is being written: only the file knows what it holds
            if file:
                num_texts = len(prompts) * args.num_samples
                held = f"{args.output} holds {file.num_lines():,} of {num_texts:,} texts"
                print(f"{held}; continue after them with --resume", file=sys.stderr)
            raise
    output.show_summary(run, runtime)
    if references is not None and runtime.is_main:
        from common.generation import scoring

        scoring.show_rouge(texts, references)
    stop_runtime()


def generate_batches(
    args: argparse.Namespace,
    run: Run,
    batches: list[list[Prompt]],
    file: output.OutputFile | None,
    runtime: Runtime,
) -> list[str]:
    """Generate the texts of all batches, a batch on each process at a time, and show or write them;
    with --resume, go on after those in the file. Return all texts for --references.
    """
    make_line = functools.partial(output.make_line, seed=args.seed, settings=recorded_settings(args, run))
    first_batch = 0
    if args.resume:  # the file has other batch seeds, which are not compared
        expected = (make_line(row, batch_seed=0) for batch in batches for row in run.rows(batch))
        first_batch = find_first_batch(run, batches, expected, file, runtime)
    texts = [line["text"] for line in file.lines] if file else []
    wants_stream = sys.stdout.isatty() if args.stream is None else args.stream
    streams = wants_stream and not args.output and runtime.world_size == 1
    has_several = sum(map(len, batches)) * args.num_samples > 1
    rounds = range(first_batch, len(batches), runtime.world_size)
    with progress_bar(run, len(rounds), shown=file is not None) as bar:
        for first in rounds:
            number = first + runtime.rank
            rows = run.rows(batches[number]) if number < len(batches) else []
            usable = [row for row in rows if not row.prompt.problem]
            seed = sampling.batch_seed(args.seed, number)
            if streams and usable and has_several:
                show(output.heading(usable[0].prompt.number + 1, 1, usable[0].prompt.text))
            generate_batch(run, usable, seed=seed, streams=streams, bar=bar)
            lines = output.gather([make_line(row, batch_seed=seed) for row in rows], runtime)
            if args.references is not None:
                texts += [line["text"] for line in lines]
            if file:
                file.write(lines)
            elif not args.output and runtime.is_main:
                shown = [line for line in lines if line["finish_reason"] != "refused"]
                output.show_lines(shown, with_headings=has_several, first_is_shown=streams)
    return texts


def generate_batch(run: Run, rows: list[Completion], *, seed: int, streams: bool, bar: tqdm) -> None:
    """Generate the texts of one batch; `streams` shows the first one while it grows."""
    most = run.options.settings.max_new_tokens
    end = bar.n + most
    for count, new_text in enumerate(complete(run, rows, seed=seed), start=1):
        if count <= most:  # the last piece of a text comes after its last token
            bar.update()
        if streams:
            show(new_text)
    bar.update(end - bar.n)  # the tokens that were not needed, because all texts ended early


def find_first_batch(
    run: Run,
    batches: list[list[Prompt]],
    expected: Iterator[dict],
    file: output.OutputFile | None,
    runtime: Runtime,
) -> int:
    """Return the number of the first batch that the output file does not hold yet, given the lines
    that it is expected to hold.

    `file` is None on all processes but the main one, which may be the only one that sees the file.
    """
    num_samples = run.options.num_samples
    texts_per_batch = len(batches[0]) * num_samples

    def count_finished() -> int:
        assert file is not None
        file.resume(expected, texts_per_batch=texts_per_batch)
        return len(file.lines)

    num_finished = runtime.broadcast_from_main(count_finished)
    if num_finished and file is not None:
        held = f"{num_finished:,} of {sum(map(len, batches)) * num_samples:,} texts"
        print(f"{file.path}: it already holds {held}", flush=True)
    return math.ceil(num_finished / texts_per_batch)


def progress_bar(run: Run, num_batches: int, *, shown: bool) -> tqdm:
    """Return a bar that counts the tokens of the first text of each batch, and shows how long the
    rest will take; it vanishes at its end.
    """
    total = num_batches * run.options.settings.max_new_tokens
    # a bar only while a file is written: otherwise, the screen shows the texts
    hidden = None if shown else True  # None: where stderr is not a terminal
    return tqdm(total=total, unit="token", leave=False, dynamic_ncols=True, disable=hidden)


def recorded_settings(args: argparse.Namespace, run: Run) -> dict:
    """Return the settings that a text depends on, as the output file names them; of the flags, only those
    that are given.
    """
    values = ((name, getattr(args, name)) for name in (*DRAWING, *RECORDED.split()))
    given = {name: value for name, value in values if not (value is None or value is False)}
    if args.adapter is not None:
        given["adapter"] = reading.full_name(args.adapter)
    if args.template_option is not None:
        given["template_option"] = dict(args.template_option)  # JSON has no tuples
    model = run.language_model
    return {
        "model": reading.full_name(args.model),
        "precision": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        **given,
        "end_ids": list(run.options.settings.end_ids),
    }


def show(text: str) -> None:
    """Show a piece of text at once."""
    print(text, end="", flush=True)


def check_tokens(args: argparse.Namespace) -> None:
    """Generate each batch here and by model.generate; exit with 1 at the first difference."""
    from common.generation import explain

    run, all_prompts, _, runtime = load_all(args)
    check = explain.LibraryCheck(run)
    for number, prompts in enumerate(split_batches(args, all_prompts)):
        rows, seed = run.rows(prompts), sampling.batch_seed(args.seed, number)
        list(complete(run, rows, seed=seed))
        if not check.is_equal(prompts, rows, seed=seed):
            sys.exit(1)
    print(f"equal: {check.num_equal:,} of {check.num_equal:,} tokens")
    output.show_summary(run, runtime)


def explain_tokens(args: argparse.Namespace) -> None:
    """Print a table for each token of one text, then the text."""
    from common.generation import explain

    run, prompts, _, _ = load_all(args)
    [row], settings = run.rows(prompts), run.options.settings
    batch, seed = run.left_pad([row]), run.sampler_seed([row], args.seed)
    sampler = make_sampler(settings, prompt_length=batch.length, starts=batch.starts, seed=seed)
    steps = decode(run.language_model, batch, sampler, settings)
    explain.show_steps(steps, run, row, batch, seed=seed)


def compare_choices(args: argparse.Namespace) -> None:
    """Print one prompt's greedy, top-k and top-p texts side by side."""
    from common.generation import explain

    run, prompts, _, _ = load_all(args)
    columns = {}
    for name, settings in explain.compared_settings(run.options.settings).items():
        other = Run(run.language_model, dataclasses.replace(run.options, settings=settings))
        [row] = other.rows(prompts)
        list(complete(other, [row], seed=args.seed))
        columns[name] = row.text
    explain.show_side_by_side(columns)


def converse(args: argparse.Namespace) -> None:
    """Hold a conversation until the input ends; Ctrl-C ends an answer, not the conversation."""
    from common.generation import conversation

    run, runtime = load(args)
    chat = conversation.Chat(run, system=args.system)
    if args.system:
        chat.format.note_system()
    for text in conversation.typed_messages(chat):
        try:
            answer(chat, text, runtime)
        except KeyboardInterrupt:
            conversation.after_interruption(chat)
        except UserError as error:
            print(f"generate.py: {error}", file=sys.stderr)


def serve(args: argparse.Namespace) -> None:
    """Serve the model to programs that speak OpenAI's protocol, until a signal comes."""
    from common import local_server
    from common.generation import server

    key, listener = server.key_from_environment(), local_server.bind(args.port)
    run, _ = load(args)
    if run.chat is not None:
        run.chat.note_system()
    limits = server.Limits(args.batch_size, args.max_waiting, args.request_seconds, key)
    number = server.serve(run, limits, listener)
    raise Interrupted(f"stopped by {signal.Signals(number).name}", 128 + number)


def answer(chat: Chat, text: str, runtime: Runtime) -> None:
    """Show the answer to a message as it grows, and add both to the conversation."""
    turn = chat.begin_turn(text)
    show(chat.format.prefill)
    for new_text in complete(turn.run, [turn.answer], turn.batch, seed=turn.seed):
        show(new_text)
    chat.end_turn(turn)
    print(flush=True)
    output.show_summary(turn.run, runtime)


def measure_perplexity(args: argparse.Namespace) -> None:
    """Print the model's perplexity on a whole text file."""
    from common.generation import scoring

    name = args.perplexity
    read = functools.partial(reading.read_lines, name, encoding=args.encoding)
    lines, run, _ = read_and_load(args, read, from_stdin=name == "-")
    window = scoring.choose_window(run.language_model, args.window, args.stride, most=DEFAULT_WINDOW)
    scoring.show_perplexity(run.language_model, "\n".join(lines), window, name=name)


def score_continuations(args: argparse.Namespace) -> None:
    """Show or write how likely given continuations of prompts are, and which is the likeliest."""
    from common.generation import continuations

    name, kept = args.score_continuations, KeptColumns(args.id_column, args.keep_columns)
    read = functools.partial(continuations.read_file, name, encoding=args.encoding, kept=kept)
    with output.open_file(args.output, resume=False) as file:
        questions, run, _ = read_and_load(args, read, from_stdin=name == "-")
        written = continuations.write_prompts(questions, run.chat, args.system)
        scored = continuations.score(
            questions, run.language_model, batch_size=args.batch_size, written=written
        )
        if file:
            file.write(continuations.lines(questions, scored))
        else:
            print(continuations.tables(questions, scored))
    if questions[0].answer is not None:
        terminal.say(continuations.accuracy(questions, scored))


def score_file(args: argparse.Namespace) -> None:
    """Print the ROUGE of a file's texts against the references, without a model."""
    from common.generation import scoring

    texts = reading.read_texts(
        args.score, column=args.text_column, cache_dir=args.cache_dir, options=cli.file_options(args)
    )
    scoring.show_rouge(texts, read_references(args, len(texts)) or [])


# From flags to a run ------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> tuple[Run, Runtime]:
    """Load the model, and return it with the options that the flags ask for.

    Raises UserError for an end token that the model does not have, a stop string that contains a
    special token, and a sampler that the device cannot run.
    """
    runtime = start_runtime(args.device, args.precision, args.seed)
    # with --precision auto, the step in C may compute in fp32 even if the runtime's precision is bf16
    may_compute_in_fp32 = args.precision == "auto" or runtime.precision == "fp32"
    loading = Loading(
        args.weights, may_compute_in_fp32, may_compile=not args.plain_step, adapter=args.adapter
    )
    model = language_model.load(args.model, runtime, cache_dir=args.cache_dir, loading=loading)
    if args.sampler == "independent" and model.device.type == "mps":
        problem = "it draws in fp64, which Apple's GPUs do not have"
        raise UserError(f"--sampler independent: {problem}; use --sampler exact or --device cpu")
    language_model.check_stops(args.stop or [], model)
    chat_format = load_chat_format(args, model)
    end_ids = stop_token_ids(args, model, chat_format)
    if args.use_model_defaults:
        from common.generation import model_defaults

        model_defaults.set_flags(args, model.folder, name=model.name)
    beam_search = None
    if args.num_beams is not None:
        beam_search = Beams(args.num_beams, args.length_penalty, EARLY_STOPPING[args.early_stopping])
    options = Options(
        sampling_settings(args, model, end_ids),
        seed=args.seed,
        sampler=args.sampler,
        num_samples=args.num_samples,
        stops=tuple(args.stop or ()),
        num_logprobs=args.logprobs,
        lookup=args.lookup or 0,
        beams=beam_search,
    )
    return Run(model, options, chat=chat_format), runtime


def stop_token_ids(
    args: argparse.Namespace, model: LanguageModel, chat_format: ChatFormat | None
) -> tuple[int, ...]:
    """Return the tokens that end a text: the model's or its chat template's, and the flags'."""
    is_chat = chat_format is not None and not args.serve  # a server also continues texts
    own = chat_format.end_ids if is_chat else model.end_ids
    return tuple(dict.fromkeys(own + language_model.end_token_ids(args.end_token or [], model)))


def sampling_settings(args: argparse.Namespace, model: LanguageModel, end_ids: tuple[int, ...]) -> Settings:
    """Return how tokens are chosen: as the flags say, where one is given."""
    names = ["max_new_tokens", "min_new_tokens", "repetition_penalty", "presence_penalty"]
    names += ["frequency_penalty", "no_repeat_ngram_size", "xtc_threshold"]
    names += DRAWING if is_drawing(args) else ()
    return Settings(
        sample=is_drawing(args),
        end_ids=end_ids,
        constraint=make_constraint(args, model, end_ids),
        logit_bias=language_model.read_bias(args.logit_bias or [], model),
        banned=language_model.tokens_of_words(args.ban_words or [], model),
        **{name: getattr(args, name) for name in names if getattr(args, name) is not None},
    )


def load_chat_format(args: argparse.Namespace, model: LanguageModel) -> ChatFormat | None:
    """Return how the conversations of a model are written, None where there are none."""
    is_asked_for = args.chat or args.interactive or args.chat_template is not None
    # a model without a template can still be served: it continues texts
    if not is_asked_for and not (args.serve and model.tokenizer.chat_template):
        return None
    from common.generation import chat

    options, prefill = dict(args.template_option or []), args.prefill or ""
    return chat.read_format(model, wanted=args.chat_template, options=options, prefill=prefill)


def make_constraint(
    args: argparse.Namespace, model: LanguageModel, end_ids: tuple[int, ...]
) -> Constraint | None:
    """Return the constraint of --choices or --regex, None without them."""
    if args.choices is None and args.regex is None:
        return None
    from common.generation.constraints import Constraints

    constraints = Constraints(model)
    if args.choices is not None:
        return constraints.choices(args.choices, end_ids)
    return constraints.regex(args.regex, end_ids)


def read_and_load(
    args: argparse.Namespace, read: Callable[[], T], *, from_stdin: bool
) -> tuple[T, Run, Runtime]:
    """Return what `read` returns, and what `load` does. A file is read first, so that mistakes in it are
    reported at once; standard input is read after the model is loaded, because loading may fail too.
    """
    if from_stdin:
        run, runtime = load(args)
        return read(), run, runtime
    return read(), *load(args)


def load_all(args: argparse.Namespace) -> tuple[Run, list[Prompt], list[str] | None, Runtime]:
    """Read the prompts and references, load the model, and encode the prompts.

    Raises UserError for a text that can't be used, and for prompts that do not fit into the model
    or the memory.
    """
    from_stdin = "-" in (args.prompts_file, args.references)
    read = functools.partial(read_texts, args)
    (given, references), run, runtime = read_and_load(args, read, from_stdin=from_stdin)
    prompts = encode_prompts(args, given, run)
    usable = [prompt for prompt in prompts if not prompt.problem]
    for prompt in prompts if runtime.is_main else ():
        if prompt.problem:
            print(f"generate.py: left out: {prompt.problem}", file=sys.stderr)
    if not usable:
        raise UserError("--skip-bad: no prompt is left; correct them")
    longest = max(usable, key=lambda prompt: len(prompt.ids))
    size = min(args.batch_size, len(usable))
    if args.sampler == "independent" and size > 1 and run.language_model.model.reads_padding:
        problem = f"{run.language_model.name} takes the padding of a batch for text"
        raise UserError(f"--sampler independent: {problem}; use --batch-size 1")
    run.check_memory([longest] * size, free_memory_bytes(runtime.device))
    return run, prompts, references, runtime


def encode_prompts(args: argparse.Namespace, given: list[GivenPrompt], run: Run) -> list[Prompt]:
    """Return the prompts with their tokens.

    Raises UserError for one that does not fit into the model, or that the template refuses; with --skip-bad,
    such a prompt gets a `problem` instead, as does one that could not be read.
    """
    model, prompts = run.language_model, []
    readable = [
        (prompt.content, f"prompt {number}")
        for number, prompt in enumerate(given, start=1)
        if not isinstance(prompt.content, UserError)
    ]
    encodings = iter(encode_readable(args, readable, run))
    for number, prompt in enumerate(given):
        item, cells = prompt.content, prompt.cells
        if isinstance(item, UserError):  # with --skip-bad
            prompts.append(Prompt(number, "", [], problem=str(item), cells=cells))
            continue
        ids, problem = next(encodings), None
        if isinstance(ids, UserError):
            ids, problem = [], ids
        else:
            name = f"prompt {number + 1}"
            problem = outcome(language_model.check_length, ids, args.max_new_tokens, model, name=name)
        if problem and not args.skip_bad:
            raise problem
        text, messages = (item, None) if isinstance(item, str) else (item[-1]["content"], item)
        prompts.append(Prompt(number, text, ids, messages, str(problem or ""), cells))
    return prompts


def encode_readable(
    args: argparse.Namespace, named: list[tuple[str | list[Message], str]], run: Run
) -> list[list[int] | UserError]:
    """Return for each text or conversation its token ids, or the UserError that says why there are none; each
    comes with its name for messages.
    """
    if run.chat is None:
        encode = functools.partial(language_model.encode_prompt, language_model=run.language_model)
        return [outcome(encode, str(text), name=name) for text, name in named]
    conversations = [as_conversation(item, args.system) for item, _ in named]
    if any(messages[0]["role"] == "system" for messages in conversations):
        run.chat.note_system()
    return run.chat.try_to_encode(conversations, [name for _, name in named])


def read_texts(args: argparse.Namespace) -> tuple[list[GivenPrompt], list[str] | None]:
    """Return the texts or conversations of all prompts, and their references, None without --references. With
    --skip-bad, a prompt that can't be read is the error that says why.
    """
    given = [GivenPrompt(text) for text in args.prompt or []]
    if args.prompts_file is not None:
        given += read_prompts(args.prompts_file, prompt_config(args))
    if not args.chat and any(isinstance(prompt.content, list) for prompt in given):
        raise UserError(f"--prompts-file {args.prompts_file}: it holds messages; add --chat")
    if len(given) > 1 and (args.explain or args.compare):
        mode = "--explain" if args.explain else "--compare"
        raise UserError(f"{mode}: it shows one prompt, not {len(given)}; give one --prompt")
    return given, read_references(args, len(given))


def split_batches(args: argparse.Namespace, prompts: list[Prompt]) -> list[list[Prompt]]:
    """Return the prompts in batches, in order; prompt lookup takes them one by one."""
    size = 1 if args.lookup else args.batch_size
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def read_references(args: argparse.Namespace, num_texts: int) -> list[str] | None:
    """Return one reference per text, None without --references."""
    if args.references is None:
        return None
    from common.generation import scoring

    return scoring.read_references(
        args.references,
        num_texts,
        column=args.reference_column,
        cache_dir=args.cache_dir,
        options=cli.file_options(args),
    )


def end_on_signal(number: int, _frame: FrameType | None) -> None:
    """End the run as Ctrl-C does, with the exit code of the signal."""
    cli.warn_of_stop()
    raise Interrupted("interrupted", 128 + number)


def main(args: argparse.Namespace) -> None:
    """Run the mode that the flags name."""
    if args.serve:
        serve(args)
    elif args.interactive:
        converse(args)
    elif args.perplexity is not None:
        measure_perplexity(args)
    elif args.score_continuations is not None:
        score_continuations(args)
    elif args.score is not None:
        score_file(args)
    elif args.check:
        check_tokens(args)
    elif args.explain:
        explain_tokens(args)
    elif args.compare:
        compare_choices(args)
    else:
        generate_texts(args)


if __name__ == "__main__":
    for number in cli.stop_signals()[1:]:  # Ctrl-C is Python's own exception
        signal.signal(number, end_on_signal)
    cli.run_main(main, ARGS, prog="generate.py")  # pyrefly: ignore[unbound-name]  (parsed above)
