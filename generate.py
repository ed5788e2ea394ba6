#!/usr/bin/env python
"""Generate text with a causal language model, token for token as `model.generate` does.

The loop is `decode` in this file: prefill, sampler, stop, step. Its parts are in common/generation:
decoding.py (prefill, step), sampling.py (filters, draw), completion.py (from tokens to text). Left
out on purpose: beam search, encoder-decoder models, quantised weights, serving.

  python generate.py --prompt "Natural Language Processing is"  # greedy, bundled SmolLM2-135M-Instruct
  python generate.py --prompt "Natural Language Processing is" --top-k 50 --seed 1
  python generate.py --prompt "Natural Language Processing is" --top-k 50 --check
  python generate.py --chat --prompt "Why is the sky blue?" --system "Answer in one sentence."
  python generate.py --interactive  # a conversation
  python generate.py --prompts-file prompts.txt --output texts.jsonl --batch-size 16
  torchrun --nproc-per-node 2 generate.py --prompts-file prompts.txt --output texts.jsonl
"""

import argparse
import dataclasses
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import torch
from tqdm import tqdm

from common import cli, reading
from common.cli import (
    fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    probability,
)
from common.errors import Interrupted, UserError, shorten
from common.generation import explain, fast_sampling, language_model, output, sampling, scoring
from common.generation.completion import Chat, Completion, Options, Prompt, Run, Stopwatch
from common.generation.decoding import Batch, PromptLookup, Step, fetch_ids, prefill, step
from common.generation.language_model import LanguageModel
from common.generation.sampling import Sampler, Settings
from common.runtime import Runtime, start_runtime, stop_runtime

# --- From prompts to texts


@torch.inference_mode()
def decode(model: LanguageModel, batch: Batch, sampler: Sampler, settings: Settings) -> Iterator[Step]:
    """Yield one Step per token until every row has ended or has `max_new_tokens` tokens.

    Rows that have ended get padding and keep drawing random numbers, as in `generate`. While a Step
    is out, the caller may end a row in `batch.ended`, because of a stop string. Raises UserError
    when the model's logits are not numbers. Shapes: B rows (texts), V tokens in the vocabulary.
    """
    logits = prefill(model, batch)  # (B, V)
    for number in range(1, settings.max_new_tokens + 1):
        chosen = sampler(logits, batch.tokens)  # (B)
        ids = fetch_ids(chosen, logits, model)  # B ids; refuses logits that are not numbers
        tokens = [model.pad_id if ended else token for token, ended in zip(ids, batch.ended)]
        yield Step(tokens, logits)
        for row, token in enumerate(tokens):
            batch.ended[row] |= token in settings.end_ids
        if all(batch.ended) or number == settings.max_new_tokens:
            return
        logits = step(model, batch, tokens)  # (B, V)


def make_sampler(options: Options, batch: Batch, rows: list[Completion], seed: int) -> Sampler:
    """Return the sampler that the options name, for a batch before its prefill."""
    draws = fast_sampling  # the plain version is `draws = sampling`
    settings = options.settings
    if options.sampler == "exact":
        return sampling.exact_sampler(
            settings, prompt_length=batch.length, starts=batch.starts, seed=seed, draw=draws.draw_exactly
        )
    names = [(row.prompt.number, row.sample) for row in rows]
    uniforms = sampling.row_uniforms(options.seed, names, settings.max_new_tokens)
    return sampling.independent_sampler(
        settings,
        prompt_length=batch.length,
        starts=batch.starts,
        uniforms=uniforms.to(batch.ids.device),
        draw=draws.draw_independently,
    )


def complete(run: Run, rows: list[Completion], batch: Batch | None = None, *, seed: int) -> Iterator[str]:
    """Generate the texts of completions; yield what each token adds to the first text, to show it.

    `batch` holds their prompts; None makes one with an empty cache. `seed` is the seed of this
    batch, for the exact sampler.
    """
    if not rows:
        return
    batch = batch or run.left_pad(rows)
    options, settings = run.options, run.options.settings
    lookup = PromptLookup(options.lookup) if options.lookup else None
    if lookup:
        steps = lookup.decode(run.language_model, batch, settings)
    else:
        sampler = make_sampler(options, batch, rows, seed)
        steps = decode(run.language_model, batch, sampler, settings)
    stopwatch = Stopwatch(batch)
    num_shown = 0  # characters of the first text that have been yielded
    for current in steps:
        stopwatch.token()
        run.add_step(rows, current, batch)
        yield rows[0].text[num_shown:]
        num_shown = len(rows[0].text)
    run.timing.add(rows, stopwatch, lookup)
    for row in rows:
        row.finish()
    yield rows[0].text[num_shown:]


# --- Modes


def generate_texts(args: argparse.Namespace, texts: list[str], references: list[str] | None) -> None:
    """Generate all texts; show or write them, score them, and print how fast it was."""
    run, prompts, runtime = load_all(args, texts)
    batches = split_batches(args, prompts)
    total = len(prompts) * args.num_samples  # texts
    texts_per_batch = len(batches[0]) * args.num_samples
    record = output.Record(args.seed, recorded_settings(args, run))
    all_rows = run.rows(prompts)
    earlier = []
    if args.resume:
        earlier = output.finished_lines(args.output, all_rows, record, texts_per_batch=texts_per_batch)
    if earlier:
        runtime.say(f"{args.output}: it already holds {len(earlier):,} of {total:,} texts")
    # the other processes may not see the main process's file
    first_batch = runtime.broadcast_int(math.ceil(len(earlier) / texts_per_batch))
    writes = bool(args.output) and runtime.is_main
    file = output.OutputFile(args.output, keep_lines=len(earlier)) if writes else None
    generated = [line["text"] for line in earlier]
    stream_wanted = sys.stdout.isatty() if args.stream is None else args.stream
    is_streaming = stream_wanted and not args.output and runtime.world_size == 1
    # in each round, every process takes one batch
    rounds = range(first_batch, len(batches), runtime.world_size)
    # a progress bar only while a file is written: otherwise, the screen shows the texts
    hides_bar = None if file else True  # None: where stderr is not a terminal
    try:
        for first in tqdm(rounds, unit="batch", leave=False, disable=hides_bar):
            number = first + runtime.rank
            rows = run.rows(batches[number]) if number < len(batches) else []
            if is_streaming and total > 1:
                show(output.heading(rows[0].prompt.number + 1, 1, rows[0].prompt.text))
            seed = sampling.batch_seed(args.seed, number)
            for new_text in complete(run, rows, seed=seed):
                if is_streaming:
                    show(new_text)
            lines = output.gather([record.line(row, batch_seed=seed) for row in rows], runtime)
            if references is not None:
                generated += [line["text"] for line in lines]
            if file:
                file.write(lines)
            elif runtime.is_main and not args.output:
                output.show_lines(lines, with_headings=total > 1, first_is_shown=is_streaming)
    except (KeyboardInterrupt, Interrupted):
        # the signal can come while a batch is being written: only the file knows what it holds
        if file:
            num_held = file.close()
            held = f"{args.output} holds {num_held:,} of {total:,} texts"
            print(f"\n{held}; continue after them with --resume", file=sys.stderr)
        raise
    output.show_summary(run, runtime)
    if references is not None and runtime.is_main:
        scoring.show_rouge(generated, references)
    stop_runtime()


def recorded_settings(args: argparse.Namespace, run: Run) -> dict:
    """Return what a text depends on, as the output file names it."""
    flags = "chat system temperature top_k top_p min_p typical_p repetition_penalty"
    flags += " no_repeat_ngram_size sampler lookup max_new_tokens min_new_tokens stop end_token"
    flags += " num_samples batch_size logprobs"
    model = run.language_model
    return {
        "model": reading.full_name(args.model),
        "precision": str(model.model.dtype).removeprefix("torch."),
        **{name: getattr(args, name) for name in flags.split()},
        "device": model.device.type,
        "end_ids": list(run.options.settings.end_ids),
    }


def show(text: str) -> None:
    """Show a piece of text at once."""
    print(text, end="", flush=True)


def check_tokens(args: argparse.Namespace, texts: list[str]) -> None:
    """Generate each batch here and by model.generate; exit with 1 at the first difference."""
    run, all_prompts, runtime = load_all(args, texts)
    model, options, num_equal = run.language_model, run.options, 0
    pad_id = model.pad_id if options.settings.end_ids else None
    for number, prompts in enumerate(split_batches(args, all_prompts)):
        rows, seed = run.rows(prompts), sampling.batch_seed(args.seed, number)
        list(complete(run, rows, seed=seed))
        for row, theirs in zip(rows, explain.library_tokens(model, prompts, options, seed=seed)):
            difference = explain.first_difference(row, theirs, pad_id=pad_id)
            if difference:
                print(explain.describe_difference(difference, model))
                sys.exit(1)
            num_equal += len(row.token_ids)
    print(f"equal: {num_equal:,} of {num_equal:,} tokens")
    output.show_summary(run, runtime)


def explain_tokens(args: argparse.Namespace, texts: list[str]) -> None:
    """Print a table for each token of one text, then the text."""
    run, prompts, _ = load_all(args, texts)
    rows, settings = run.rows(prompts), run.options.settings
    batch = run.left_pad(rows)
    sampler = make_sampler(run.options, batch, rows, args.seed)
    for current in decode(run.language_model, batch, sampler, settings):
        print(explain.step_table(current, batch.tokens, settings, rows[0]), flush=True)
        run.add_step(rows, current, batch)
    rows[0].finish()
    print(rows[0].text)


def compare_choices(args: argparse.Namespace, texts: list[str]) -> None:
    """Print one prompt's greedy, top-k and top-p texts side by side."""
    run, prompts, _ = load_all(args, texts)
    columns = {}
    for name, settings in explain.compared_settings(run.options.settings).items():
        other = Run(run.language_model, dataclasses.replace(run.options, settings=settings))
        [row] = other.rows(prompts)
        list(complete(other, [row], seed=args.seed))
        columns[name] = row.text
    print(explain.side_by_side(columns, shutil.get_terminal_size((120, 24)).columns))


def converse(args: argparse.Namespace) -> None:
    """Hold a conversation until the input ends; Ctrl-C ends an answer, not the conversation."""
    run, runtime = load(args)
    chat = Chat(run, system=args.system)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            problem = f"standard input: not UTF-8 (byte {byte:#04x})"
            raise UserError(f"{problem}; convert it to UTF-8") from error
        language_model.check_encoding(text, "standard input")
        if text.strip() == "/reset":
            chat.reset()
        elif text.strip():
            try:
                answer(chat, text, runtime)
            except KeyboardInterrupt:
                print("\n(interrupted; the model has forgotten this turn)", file=sys.stderr)
            except UserError as error:
                print(f"generate.py: {error}", file=sys.stderr)


def answer(chat: Chat, text: str, runtime: Runtime) -> None:
    """Show the answer to a message as it grows, and add both to the conversation."""
    turn = chat.begin_turn(text)
    for new_text in complete(turn.run, [turn.answer], turn.batch, seed=turn.seed):
        show(new_text)
    chat.end_turn(turn)
    print(flush=True)
    output.show_summary(turn.run, runtime)


def measure_perplexity(args: argparse.Namespace) -> None:
    """Print the model's perplexity on a whole text file."""
    text = "\n".join(reading.read_lines(args.perplexity))
    run, _ = load(args)
    window = scoring.choose_window(run.language_model, args.window, args.stride)
    result = scoring.text_likelihood(run.language_model, text, window, name=args.perplexity)
    passes = f"window {window.size:,}, stride {window.stride:,}"
    print(
        f"perplexity {result.perplexity:.4f} over {result.num_tokens:,} tokens ({passes}); "
        f"{result.bits_per_byte:.4f} bits per byte"
    )


def score_file(args: argparse.Namespace) -> None:
    """Print the ROUGE of a file's texts against the references, without a model."""
    column, cache_dir = args.text_column, args.cache_dir
    texts = reading.read_texts(args.score, column=column, cache_dir=cache_dir, allow_empty=True)
    scoring.show_rouge(texts, read_references(args, len(texts)) or [])


# --- Flags


def make_parser() -> cli.Parser:
    """Return the parser of all flags."""
    parser = cli.Parser(prog="generate.py", description=__doc__)
    cli.add_shared_flags(parser, model="bundled/SmolLM2-135M-Instruct")

    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", metavar="TEXT", help="a text to continue; repeat it for more")
    add("--prompts-file", metavar="FILE", help="one prompt per line (-: standard input), or a data file")
    add("--text-column", default="text", help="column of the prompts in a data file")
    add("--chat", action="store_true", help="prompts are questions, in the model's chat template")
    add("--system", metavar="TEXT", help="system message of a chat")

    title = "choice of tokens (greedy unless a flag from --temperature to --typical-p is given)"
    add = parser.add_argument_group(title).add_argument
    add("--temperature", type=non_negative_float, help="below 1 sharpens, above 1 flattens; 0: greedy")
    add("--top-k", type=non_negative_int, help="keep the k most likely tokens; 0: off")
    add("--top-p", type=probability, help="keep the fewest tokens that together reach this probability")
    add("--min-p", type=fraction, help="keep tokens at least this likely, relative to the best one")
    add("--typical-p", type=probability, help="keep the most typical tokens up to this probability")
    add("--repetition-penalty", type=positive_float, default=1.0, help="above 1 discourages repetition")
    help_text = "no sequence of this many tokens occurs twice; 0 is off"
    add("--no-repeat-ngram-size", type=non_negative_int, default=0, help=help_text)
    help_text = (
        "exact: the random numbers of model.generate, in each batch from its batch_seed; "
        "independent: each text has its own random numbers and does not depend on its batch"
    )
    add("--sampler", choices=["exact", "independent"], default="exact", help=help_text)
    help_text = "greedy only: guess up to N tokens ahead from the text so far"
    add("--lookup", type=positive_int, metavar="N", help=help_text)

    add = parser.add_argument_group("end of a text").add_argument
    add("--max-new-tokens", type=positive_int, default=200, help="the most tokens of a text")
    help_text = "no end token before this many tokens; a stop string still ends the text"
    add("--min-new-tokens", type=non_negative_int, default=0, help=help_text)
    add("--stop", action="append", metavar="TEXT", help="end before this text; repeat it for more")
    help_text = "another token that ends a text, such as '<|endoftext|>'"
    add("--end-token", action="append", metavar="TOKEN", help=help_text)

    add = parser.add_argument_group("output").add_argument
    add("--num-samples", type=positive_int, default=1, help="texts per prompt")
    add("--batch-size", type=positive_int, default=8, help="prompts per batch")
    help_text = "show the first text of each batch as it grows (default: on a terminal)"
    add("--stream", action=argparse.BooleanOptionalAction, help=help_text)
    add("--output", metavar="FILE", type=cli.name, help="write one JSON line per text instead of showing it")
    add("--resume", action="store_true", help="continue after the texts in the output file")
    help_text = "with --output: log-probabilities of each token and of the K most likely ones"
    add("--logprobs", type=non_negative_int, metavar="K", help=help_text)
    help_text = "ROUGE of the texts against these references: one per line, or a data file"
    add("--references", metavar="FILE", help=help_text)
    add("--reference-column", default="text", help="column of the references in a data file")

    group = parser.add_argument_group("instead of plain generation")
    add = group.add_mutually_exclusive_group().add_argument
    add("--interactive", action="store_true", help="a conversation; /reset starts over, Ctrl-D ends it")
    help_text = "compare each token with model.generate's; exit code 1 if one differs"
    add("--check", action="store_true", help=help_text)
    add("--explain", action="store_true", help="show for each token what every filter does")
    add("--compare", action="store_true", help="show greedy, top-k and top-p side by side")
    add("--perplexity", metavar="FILE", help="the model's perplexity on a file (-: standard input)")
    add("--score", metavar="FILE", help="ROUGE of a file's texts against --references; no model")
    help_text = f"tokens per pass of --perplexity (default: {scoring.DEFAULT_WINDOW}, if they fit)"
    group.add_argument("--window", type=positive_int, help=help_text)
    help_text = "tokens from one window to the next (default: half a window)"
    group.add_argument("--stride", type=positive_int, help=help_text)
    return parser


DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # any of them given: not greedy
DRAWING_FLAGS = tuple("--" + name.replace("_", "-") for name in DRAWING)
NO_PROMPT = ("--interactive", "--perplexity", "--score")
ONE_PROMPT = ("--explain", "--compare")
NO_SCORE = ("--check", *ONE_PROMPT, "--interactive", "--perplexity")
MODES = ("--check", *ONE_PROMPT, *NO_PROMPT)
NEEDS = {  # a flag, and the flags of which it needs one
    "--system": ("--chat", "--interactive"),
    "--window": ("--perplexity",),
    "--stride": ("--perplexity",),
    "--resume": ("--output",),
    "--logprobs": ("--output",),
    "--score": ("--references",),
    "--num-samples": DRAWING_FLAGS,  # greedy gives the same text each time
}
CONFLICTS = (  # flags that cannot be used together, and why; torchrun counts as one
    ("--prompt", NO_PROMPT, "this mode takes no prompts"),
    ("--prompts-file", NO_PROMPT, "this mode takes no prompts"),
    ("--references", NO_SCORE, "this mode scores nothing"),
    ("--output", MODES, "this mode writes no texts"),
    ("--stop", ("--perplexity",), "no text is generated that could stop"),
    ("--stream", ("--output",), "the texts go to a file, not to the screen"),
    ("--lookup", DRAWING_FLAGS, "prompt lookup is for greedy decoding"),
    ("--lookup", ONE_PROMPT, "this mode uses no prompt lookup"),
    ("--num-samples", (*ONE_PROMPT, *NO_PROMPT), "this mode takes one text per prompt"),
    ("--num-samples", ("--references",), "one text per prompt is scored"),
    ("--check", ("--sampler",), "only --sampler exact draws the random numbers of model.generate"),
    ("torchrun", MODES, "this mode runs in one process"),
    ("torchrun", ("--stream",), "several processes cannot share one screen"),
    ("--references -", ("--prompts-file -",), "standard input can be read only once (name a file)"),
    ("--prompts-file -", ("torchrun",), "only one process can read standard input (name a file)"),
    ("--references -", ("torchrun",), "only one process can read standard input (name a file)"),
)
LOWEST_TEMPERATURE = 1e-6  # logits divided by less can leave the range of fp32


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other, before anything is loaded."""
    given = given_flags(args)
    if not given.keys() & {"--prompt", "--prompts-file", *NO_PROMPT}:
        raise UserError("no prompt: give --prompt TEXT, --prompts-file FILE or --interactive")
    for flag, needed in NEEDS.items():
        if flag in given and not given.keys() & set(needed):
            others = " or ".join(needed)
            raise UserError(f"{given[flag]}: it works only with {others}; add that, or leave it out")
    for flag, others, reason in CONFLICTS:
        for other in others:
            if flag in given and other in given:
                both = f"{given[flag]} and {given[other]}"
                raise UserError(f"{both}: {reason}; leave one of the two out")
    if 0 < (args.temperature or 0) < LOWEST_TEMPERATURE:
        lowest = f"at least {LOWEST_TEMPERATURE:g}, or 0 for greedy"
        raise UserError(f"--temperature {args.temperature}: use {lowest}")
    if "" in (args.stop or []):
        raise UserError("--stop '': every text contains the empty string; leave it out")
    if args.min_new_tokens > args.max_new_tokens:
        low, high = args.min_new_tokens, args.max_new_tokens
        raise UserError(f"--min-new-tokens {low}: lower it, or raise --max-new-tokens {high}")
    for name in ("prompt", "stop", "end_token"):
        for text in getattr(args, name) or []:
            language_model.check_encoding(text, "--" + name.replace("_", "-"))
    language_model.check_encoding(args.system or "", "--system")


def given_flags(args: argparse.Namespace) -> dict[str, str]:
    """Return the flags that are not at their default, each as a message shows it."""
    given, defaults = {}, vars(make_parser().parse_args([]))
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        is_unused = flag in (*DRAWING_FLAGS, "--sampler") and not is_drawing(args)
        if value == defaults[name] or value is False or is_unused:
            continue
        first = value[0] if isinstance(value, list) else value
        given[flag] = flag if value is True else f"{flag} {shorten(repr(first), 60)}"
        if value == "-":  # standard input
            given[f"{flag} -"] = f"{flag} -"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        given["torchrun"] = "torchrun"
    return given


def is_drawing(args: argparse.Namespace) -> bool:
    """Return whether tokens are drawn: a flag of drawing is given, and the temperature is not 0."""
    return args.temperature != 0 and any(getattr(args, name) is not None for name in DRAWING)


def load(args: argparse.Namespace) -> tuple[Run, Runtime]:
    """Load the model, and return it with the options that the flags ask for.

    Raises UserError for an end token that the model does not have, a stop string that contains a
    special token, and a sampler that the device cannot run.
    """
    runtime = start_runtime(args.device, args.precision, args.seed)
    model = language_model.load(args.model, runtime, cache_dir=args.cache_dir)
    if args.sampler == "independent" and model.device.type == "mps":
        problem = "it draws in fp64, which Apple's GPUs do not have"
        raise UserError(f"--sampler independent: {problem}; use --sampler exact or --device cpu")
    language_model.check_stops(args.stop or [], model)
    end_ids = model.end_ids + language_model.end_token_ids(args.end_token or [], model)
    names = ["max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"]
    if is_drawing(args):
        names += [name for name in DRAWING if getattr(args, name) is not None]
    chosen = {name: getattr(args, name) for name in names}
    settings = Settings(sample=is_drawing(args), end_ids=tuple(dict.fromkeys(end_ids)), **chosen)
    options = Options(
        settings,
        seed=args.seed,
        sampler=args.sampler,
        num_samples=args.num_samples,
        stops=tuple(args.stop or ()),
        num_logprobs=args.logprobs,
        lookup=args.lookup or 0,
    )
    return Run(model, options), runtime


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts of the flags and of the file. Raises UserError for an empty one."""
    texts = list(args.prompt or [])
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"--prompt {number}: the prompt is empty; write something to continue")
    if args.prompts_file is not None:
        column, cache_dir = args.text_column, args.cache_dir
        texts += reading.read_texts(args.prompts_file, column=column, cache_dir=cache_dir)
    if len(texts) > 1 and (args.explain or args.compare):
        mode = "--explain" if args.explain else "--compare"
        raise UserError(f"{mode}: it shows one prompt, not {len(texts)}; give one --prompt")
    return texts


def load_all(args: argparse.Namespace, texts: list[str]) -> tuple[Run, list[Prompt], Runtime]:
    """Load the model and encode the prompts. Raises UserError for one that does not fit into it."""
    run, runtime = load(args)
    prompts = []
    for number, text in enumerate(texts):
        name = f"prompt {number + 1}"
        if args.chat:
            ids = language_model.encode_question(text, run.language_model, system=args.system)
        else:
            ids = language_model.encode_prompt(text, run.language_model, name=name)
        language_model.check_length(ids, args.max_new_tokens, run.language_model, name=name)
        prompts.append(Prompt(number, text, ids))
    return run, prompts, runtime


def split_batches(args: argparse.Namespace, prompts: list[Prompt]) -> list[list[Prompt]]:
    """Return the prompts in batches, in order; prompt lookup takes them one by one."""
    size = 1 if args.lookup else args.batch_size
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def read_references(args: argparse.Namespace, num_texts: int) -> list[str] | None:
    """Return one reference per text, None without --references."""
    if args.references is None:
        return None
    return scoring.read_references(
        args.references, num_texts, column=args.reference_column, cache_dir=args.cache_dir
    )


def stop(number: int, _frame: FrameType | None) -> None:
    """End the run as Ctrl-C does, with the exit code of the signal."""
    cli.warn_of_stop()
    raise Interrupted("interrupted", 128 + number)


def main(args: argparse.Namespace) -> None:
    """Check the flags and run the mode that they name."""
    check_flags(args)
    if args.interactive:
        converse(args)
    elif args.perplexity is not None:
        measure_perplexity(args)
    elif args.score is not None:
        score_file(args)
    else:
        texts = read_prompts(args)
        references = read_references(args, len(texts))
        if args.check:
            check_tokens(args, texts)
        elif args.explain:
            explain_tokens(args, texts)
        elif args.compare:
            compare_choices(args, texts)
        else:
            with output.only_run(args.output, resume=args.resume):
                generate_texts(args, texts, references)


if __name__ == "__main__":
    for number in cli.stop_signals()[1:]:  # Ctrl-C is Python's own exception
        signal.signal(number, stop)
    cli.run(make_parser(), main)
