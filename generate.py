#!/usr/bin/env python
"""Generate text with a causal language model, through a hand-written sampler whose tokens are
`model.generate`'s.

From logits to text in four files: common/generation/sampling.py (filters), fast_sampling.py (the token),
decoding.py (prefill, step, the loop), textstream.py (whole characters, stop strings). Left out on
purpose: beam search, encoder-decoder models, quantised weights, serving.

  python generate.py --prompt "Natural Language Processing is"  # greedy, the bundled SmolLM2-135M-Instruct
  python generate.py --prompt "Natural Language Processing is" --top-k 50 --seed 1
  python generate.py --prompt "Natural Language Processing is" --top-k 50 --check
  python generate.py --chat --prompt "Why is the sky blue?" --system "Answer in one sentence."
  python generate.py --interactive                                                      # a conversation
  python generate.py --prompts-file prompts.txt --output texts.jsonl --batch-size 16
  torchrun --nproc-per-node 2 generate.py --prompts-file prompts.txt --output texts.jsonl
"""

import argparse
import dataclasses
import json
import math
import shutil
import signal
import sys

from tqdm import tqdm

from common import cli, reading
from common.errors import Interrupted, UserError
from common.generation import check, explain, fast_sampling, flags, output, perplexity, scoring
from common.generation import language_model as models
from common.generation.chat import Chat
from common.generation.completion import Generator, Prompt
from common.generation.textstream import TextStream
from common.runtime import peak_memory_bytes, start_runtime, stop_runtime


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="generate.py", description=__doc__)
    cli.add_shared_flags(parser, model="bundled/SmolLM2-135M-Instruct")

    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a text to go on from; repeat it for more"
    )
    group.add_argument(
        "--prompts-file",
        metavar="FILE",
        help="one prompt a line (- for standard input), or a data file with --text-column",
    )
    group.add_argument(
        "--text-column", default="text", help="where the prompts are in a CSV/TSV/JSON/JSONL/Parquet file"
    )
    group.add_argument(
        "--chat", action="store_true", help="each prompt is a question to the model, in its own chat template"
    )
    group.add_argument("--system", metavar="TEXT", help="what the model is told before a chat")

    group = parser.add_argument_group("choice of tokens (greedy unless one of the first five is given)")
    group.add_argument(
        "--temperature",
        type=cli.non_negative_float,
        help="below 1 sharpens the distribution, above 1 flattens it; 0 is greedy",
    )
    group.add_argument(
        "--top-k", type=cli.non_negative_int, help="draw from the k likeliest tokens; 0 is off"
    )
    group.add_argument(
        "--top-p",
        type=cli.probability,
        help="draw from the likeliest tokens that hold this probability together",
    )
    group.add_argument(
        "--min-p",
        type=cli.fraction,
        help="draw from tokens at least this many times as likely as the likeliest",
    )
    group.add_argument(
        "--typical-p",
        type=cli.probability,
        help="draw from the tokens of the most expected surprise that hold this probability",
    )
    group.add_argument(
        "--repetition-penalty",
        type=cli.positive_float,
        default=1.0,
        help="above 1 makes tokens that occurred less likely",
    )
    group.add_argument(
        "--no-repeat-ngram-size",
        type=cli.non_negative_int,
        default=0,
        help="no run of so many tokens occurs twice; 0 is off",
    )
    group.add_argument(
        "--sampler",
        choices=["exact", "fast"],
        default="exact",
        help=(
            "exact: model.generate's random numbers, from --seed for the first batch, from others that follow"
            " from it for the next ones (batch_seed in the output); fast: each text has its own, whatever"
            " stands beside it in a batch"
        ),
    )
    group.add_argument(
        "--lookup",
        type=cli.positive_int,
        metavar="N",
        help="greedy: guess up to N tokens ahead from the text so far, and keep the right ones",
    )

    group = parser.add_argument_group("where a text ends")
    group.add_argument(
        "--max-new-tokens", type=cli.positive_int, default=200, help="the most tokens of a text"
    )
    group.add_argument(
        "--min-new-tokens",
        type=cli.non_negative_int,
        default=0,
        help="no end token before so many tokens; a stop string still ends the text",
    )
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this string; repeat it for more"
    )
    group.add_argument(
        "--end-token",
        action="append",
        metavar="TOKEN",
        help="another token that ends a text, such as '<|endoftext|>'",
    )

    group = parser.add_argument_group("output")
    group.add_argument("--num-samples", type=cli.positive_int, default=1, help="texts a prompt")
    group.add_argument("--batch-size", type=cli.positive_int, default=8, help="prompts a pass")
    group.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show the first text of each batch as it grows (default: on a terminal)",
    )
    group.add_argument("--output", metavar="FILE", help="write one JSON line a text instead of showing it")
    group.add_argument(
        "--resume", action="store_true", help="go on after the texts that the output file holds"
    )
    group.add_argument(
        "--logprobs",
        type=cli.non_negative_int,
        metavar="K",
        help="with --output: log-probabilities of each token and of the K likeliest",
    )
    group.add_argument(
        "--references",
        metavar="FILE",
        help="score the texts against these, one a line or --reference-column of a data file: ROUGE",
    )
    group.add_argument("--reference-column", default="text", help="where the references are in a data file")

    group = parser.add_argument_group("instead of plain generation").add_mutually_exclusive_group()
    group.add_argument(
        "--interactive", action="store_true", help="a conversation: /reset begins a new one, Ctrl-D ends it"
    )
    group.add_argument(
        "--check",
        action="store_true",
        help="compare each token with model.generate's; exit code 1 when one differs",
    )
    group.add_argument(
        "--explain", action="store_true", help="show for each token what every filter does to the candidates"
    )
    group.add_argument("--compare", action="store_true", help="show greedy, top-k and top-p side by side")
    group.add_argument(
        "--perplexity", metavar="FILE", help="the model's perplexity on a text file (- for standard input)"
    )
    group.add_argument(
        "--score", metavar="FILE", help="score the texts of a file against --references; no model is loaded"
    )
    parser.add_argument(
        "--window",
        type=cli.positive_int,
        help=f"tokens a pass for --perplexity (default: {perplexity.DEFAULT_WINDOW} or the context)",
    )
    parser.add_argument(
        "--stride", type=cli.positive_int, help="tokens from one window to the next (default: half a window)"
    )
    return parser


def read_prompts(args) -> list[str]:
    """Return the prompts of the flags and of the file. Raises UserError, naming the place, for an
    empty one.
    """
    texts = list(args.prompt or [])
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"--prompt {number}: the prompt is empty; write something to go on from")
    if args.prompts_file is not None:
        texts += reading.read_texts(args.prompts_file, column=args.text_column, cache_dir=args.cache_dir)
    return texts


def load(args, texts: list[str]):
    """Return generator, prompts with their tokens, and the machine; every prompt is checked before
    the first one is generated.
    """
    runtime = start_runtime(args.device, args.precision, args.seed)
    language_model = models.load(args.model, runtime, cache_dir=args.cache_dir)
    generator = Generator(language_model, flags.options(args, language_model))
    prompts = [flags.encode(args, text, number, language_model) for number, text in enumerate(texts)]
    return generator, prompts, runtime


def batches_of(prompts: list[Prompt], args) -> list[list[Prompt]]:
    """Return the prompts in batches, in their order; guessing ahead takes them one by one."""
    size = 1 if args.lookup else args.batch_size
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def generate(args, texts: list[str], references: list[str] | None):
    """Generate all texts, show them or write them, score them, and say how fast it went."""
    if args.output:
        output.check_new(args.output, resume=args.resume)
    generator, prompts, runtime = load(args, texts)
    batches = batches_of(prompts, args)
    # texts of a batch, of all
    group, total = len(batches[0]) * args.num_samples, len(prompts) * args.num_samples
    done = resumed(args, generator, prompts, group) if args.resume else []
    file = output.Output(args.output, keep_lines=len(done)) if args.output and runtime.is_main else None
    if done:
        runtime.say(f"{args.output}: {len(done):,} of {total:,} texts are there")
    # the file may lie on the main process's machine only
    start, written = runtime.broadcast_int(-(-len(done) // group)), [line["text"] for line in done]
    try:
        for lines in run(generator, batches, start, args, runtime):
            if file:
                file.write(lines)
            written += [line["text"] for line in lines] if references is not None else []
    except (KeyboardInterrupt, Interrupted):
        # the signal can come while a batch is being written: what is there, the file knows
        if file:
            there = file.close()
            print(
                f"\n{args.output} holds {there:,} of {total:,} texts; --resume goes on after them",
                file=sys.stderr,
            )
        raise
    summarize(generator, runtime)
    if runtime.is_main and references is not None:
        scoring.show(written, references)
    stop_runtime()


def resumed(args, generator: Generator, prompts: list[Prompt], group: int) -> list[dict]:
    """Return the lines of the output file that this run goes on after."""
    settings = flags.record(args, generator)
    expected = [
        output.line(row, seed=args.seed, batch_seed=args.seed, settings=settings)
        for row in generator.rows(prompts)
    ]
    return output.finished(args.output, expected, group=group)


def run(generator: Generator, batches: list[list[Prompt]], start: int, args, runtime):
    """Yield the lines of each round of batches, one batch a process, in the order of the prompts;
    show texts that no file takes.
    """
    rounds, settings = range(start, len(batches), runtime.world_size), flags.record(args, generator)
    several = len(batches) * len(batches[0]) * args.num_samples > 1  # so that each has a heading
    streams = (
        bool(sys.stdout.isatty() if args.stream is None else args.stream)
        and not args.output
        and runtime.world_size == 1
    )
    for first in tqdm(
        rounds,
        unit="batch",
        leave=False,
        file=sys.stderr,
        disable=None if args.output and runtime.is_main else True,
    ):
        number = first + runtime.rank
        batch, seed = (
            batches[number] if number < len(batches) else [],
            fast_sampling.batch_seed(args.seed, number),
        )
        # the first text of a batch grows, those beside it follow when all are whole: what is drawn
        # does not
        # depend on the screen
        if streams:
            print(
                output.heading(batch[0].number + 1, 1, batch[0].text) if several else "", end="", flush=True
            )
        rows = generator.complete(batch, seed=seed, show=write_chunk if streams else None) if batch else []
        lines = [output.line(row, seed=args.seed, batch_seed=seed, settings=settings) for row in rows]
        if runtime.world_size > 1:
            lines = [
                line for share in runtime.all_gather_texts(json.dumps(lines)) for line in json.loads(share)
            ]
        if runtime.is_main and not args.output:
            for place, line in enumerate(lines):
                above = (
                    output.heading(line["prompt_number"], line["sample"], line["prompt"]) if several else ""
                )
                print("" if streams and place == 0 else above + line["text"], flush=True)
        yield lines


def write_chunk(chunk: str):
    """Show a piece of text at once."""
    print(chunk, end="", flush=True)


def summarize(generator: Generator, runtime):
    """Print the summary line on stderr, dim on a terminal."""
    if runtime.is_main and generator.timing.new_tokens:
        line = generator.summary(peak_memory_bytes(runtime.device)) + (
            " (process 0)" if runtime.world_size > 1 else ""
        )
        print(f"\x1b[2m{line}\x1b[0m" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


def compare_with_generate(args, texts: list[str]):
    """Generate each batch twice, here and by model.generate; print `equal` or the first difference
    and end with exit code 1.
    """
    generator, prompts, runtime = load(args, texts)
    language_model, options, equal = generator.language_model, generator.options, 0
    for number, batch in enumerate(batches_of(prompts, args)):
        seed = fast_sampling.batch_seed(args.seed, number)
        rows = generator.complete(batch, seed=seed)
        for row, theirs in zip(rows, check.generate(language_model, batch, options, seed=seed)):
            difference = check.first_difference(
                row, theirs, pad_id=language_model.pad_id if options.settings.end_ids else None
            )
            if difference:
                print(check.explain(difference, language_model))
                sys.exit(1)
            equal += len(row.token_ids)
    print(f"equal: {equal:,} of {equal:,} tokens")
    summarize(generator, runtime)


def explain_tokens(args, texts: list[str]):
    """Print a table for each token of one text, then the text."""
    generator, prompts, _ = load(args, texts)
    stream = TextStream(generator.language_model.tokenizer, generator.options.stops)
    for token, table in explain.explain(generator, prompts[0], args.seed):
        print(table, flush=True)
        if token not in generator.options.settings.end_ids:  # an end token is no part of the text
            stream.add(token)
        if stream.stopped:
            break
    stream.finish()
    print(stream.text)


def compare_choices(args, texts: list[str]):
    """Print one prompt's greedy, top-k and top-p texts side by side."""
    generator, prompts, _ = load(args, texts)
    found = {}
    for name, settings in explain.compared_settings(generator.options.settings).items():
        own = Generator(generator.language_model, dataclasses.replace(generator.options, settings=settings))
        found[name] = own.complete(prompts[:1], seed=args.seed)[0]
    print(explain.side_by_side(found, shutil.get_terminal_size((120, 24)).columns))


def converse(args):
    """Hold a conversation until the input ends."""
    generator, _, runtime = load(args, [])
    chat = Chat(generator, args.system)
    chat.check()
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(
                f"standard input: not UTF-8 (byte {error.object[error.start]:#04x}); convert it to UTF-8"
                " first"
            ) from error
        flags.check_encoding(text, "standard input")
        if text.strip() == "/reset":
            chat.reset()
        elif text.strip():
            answer(chat, text, runtime)


def answer(chat: Chat, text: str, runtime):
    """Show one answer as it grows; Ctrl-C ends the answer, not the conversation, and a full
    context is said in one line.
    """
    try:
        chat.reply(text, write_chunk)
        print(flush=True)
        summarize(chat.generator, runtime)
    except KeyboardInterrupt:
        print("\n(interrupted; the model has forgotten this turn)", file=sys.stderr)
    except UserError as error:
        print(f"generate.py: {error}", file=sys.stderr)


def measure_perplexity(args):
    """Print the model's perplexity on the whole of a text file."""
    text = "\n".join(reading.read_lines(args.perplexity))
    generator, _, _ = load(args, [])
    language_model = generator.language_model
    window, stride = flags.window(args, language_model)
    ids = language_model.tokenizer(text)["input_ids"]
    if len(ids) < 2:
        raise UserError(
            f"--perplexity {args.perplexity}: {len(ids)} tokens; a text needs two, for the first one is not"
            " predicted"
        )
    # the first token is not; it may be a special one
    scored = text.removeprefix(language_model.tokenizer.decode(ids[:1], skip_special_tokens=True))
    found = perplexity.likelihood(
        language_model,
        ids,
        window=window,
        stride=stride,
        progress=lambda items: tqdm(items, unit="window", leave=False, disable=None),
    )
    print(
        f"perplexity {found.perplexity:.4f} over {found.num_tokens:,} tokens ({window:,} a window, {stride:,}"
        f" from one to the next); {found.total / math.log(2) / len(scored.encode()):.4f} bits a byte"
    )


def stop(number: int, _frame):
    """End the run as Ctrl-C does, with the exit code of the signal."""
    raise Interrupted("interrupted", 128 + number)


def main(args):
    flags.check(args)
    if args.interactive:
        converse(args)
    elif args.perplexity is not None:
        measure_perplexity(args)
    elif args.score is not None:
        texts = scoring.read_texts(args.score, args.text_column, "--text-column", args)
        scoring.show(texts, scoring.read_references(args, len(texts)))
    else:
        texts = read_prompts(args)
        flags.check_count(args, len(texts))
        references = None if args.references is None else scoring.read_references(args, len(texts))
        if args.check:
            compare_with_generate(args, texts)
        elif args.explain:
            explain_tokens(args, texts)
        elif args.compare:
            compare_choices(args, texts)
        else:
            generate(args, texts, references)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    cli.run(make_parser(), main)
