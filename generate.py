#!/usr/bin/env python
"""Generate text with a causal language model, token for token as `model.generate` does.

The loop is `decode`, below the flags: prefill, sampler, stop, step. Its parts are in
common/generation: decoding.py (prefill, step), sampling.py (filters, draw), completion.py (from
tokens to text). Left out on purpose: encoder-decoder models.

  python generate.py --prompt "Natural Language Processing is"  # greedy, bundled SmolLM2-135M-Instruct
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
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from common import cli, sources
from common.cli import (
    finite_float,
    fraction,
    non_negative_float,
    non_negative_int,
    penalty,
    positive_duration,
    positive_float,
    positive_int,
    probability,
)
from common.errors import Interrupted, UserError, outcome, shorten
from common.generation import output
from common.sources import FileOptions

if TYPE_CHECKING:
    from common.generation.chat import ChatFormat, Message
    from common.generation.conversation import Chat

# --- Flags


def make_parser() -> cli.Parser:
    """Return the parser of all flags."""
    parser = cli.Parser(prog="generate.py", description=__doc__, check=check_flags)
    cli.add_shared_flags(parser, model="bundled/SmolLM2-135M-Instruct")
    add = parser.add_argument_group("how a CPU computes").add_argument
    help_text = "auto: as the model's file stores them (GGUF: 4 or 8 bits), where the step in C covers it"
    add("--weights", choices=["auto", "file", "fp32", "bf16"], default="auto", help=help_text)
    help_text = "no step in C: each token by the library's forward, bit for bit as model.generate computes it"
    add("--plain-step", action="store_true", help=help_text)

    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", metavar="TEXT", help="a text to continue; repeat it for more")
    add("--prompts-file", metavar="FILE", help="one prompt per line (-: standard input), or a data file")
    add("--text-column", default="text", help="column of the prompts in a data file")
    help_text = "leave out prompts that do not fit, or that the template refuses, and say so in the output"
    add("--skip-bad", action="store_true", help=help_text)
    add("--chat", action="store_true", help="prompts are questions, in the model's chat template")
    add("--system", metavar="TEXT", help="system message of a chat")
    add("--prefill", metavar="TEXT", help="how each answer of a chat begins")
    help_text = "another template: one of several that the model has, or a file in Jinja"
    add("--chat-template", metavar="NAME|FILE", type=cli.name, help=help_text)
    help_text = "what the template reads, such as enable_thinking=false; repeat it for more"
    add("--template-option", action="append", metavar="NAME=VALUE", type=template_option, help=help_text)

    title = "choice of tokens (greedy unless a flag from --temperature to --xtc-probability is given)"
    add = parser.add_argument_group(title).add_argument
    help_text = "what generation_config.json says, for each flag below that is not given"
    add("--use-model-defaults", action="store_true", help=help_text)
    add("--temperature", type=non_negative_float, help="below 1 sharpens, above 1 flattens; 0: greedy")
    add("--top-k", type=non_negative_int, help="keep the k most likely tokens; 0: off")
    add("--top-p", type=probability, help="keep the fewest tokens that together reach this probability")
    add("--min-p", type=fraction, help="keep tokens at least this likely, relative to the best one")
    add("--typical-p", type=probability, help="keep the most typical tokens up to this probability")
    add("--epsilon-cutoff", type=fraction, help="keep tokens that are at least this likely")
    help_text = "as --epsilon-cutoff, but lower where the distribution is flat"
    add("--eta-cutoff", type=fraction, help=help_text)
    help_text = "keep tokens at most so many standard deviations of all logits below the highest"
    add("--top-n-sigma", type=non_negative_float, metavar="N", help=help_text)
    help_text = "so often, leave out all tokens above --xtc-threshold but the least likely of them"
    add("--xtc-probability", type=probability, help=help_text)
    add("--xtc-threshold", type=probability, default=0.1, help="how likely a token is that XTC leaves out")
    add("--repetition-penalty", type=positive_float, help="above 1 discourages repetition; 1: off")
    help_text = "subtract this from the logit of each token that the text has already"
    add("--presence-penalty", type=penalty, default=0.0, help=help_text)
    help_text = "subtract this from the logit of each token, times how often the text has it"
    add("--frequency-penalty", type=penalty, default=0.0, help=help_text)
    help_text = "add a number to the logit of a token, or of the token with this id; repeat it for more"
    add("--logit-bias", action="append", metavar="TOKEN=NUMBER", type=token_and_number, help=help_text)
    help_text = r"words, separated by commas, whose tokens may not be generated; \, is a comma"
    add("--ban-words", action="extend", metavar="WORD,...", type=listed, help=help_text)
    help_text = "no sequence of this many tokens occurs twice; 0: off"
    add("--no-repeat-ngram-size", type=non_negative_int, help=help_text)
    help_text = (
        "exact: the random numbers of model.generate, in each batch from its batch_seed; "
        "independent: each text has its own random numbers and does not depend on its batch"
    )
    add("--sampler", choices=["exact", "independent"], default="exact", help=help_text)
    help_text = "greedy only: guess up to N tokens ahead from the text so far"
    add("--lookup", type=positive_int, metavar="N", help=help_text)
    help_text = "search for the likeliest text with N beams; --num-samples shows more than the best one"
    add("--num-beams", type=positive_int, metavar="N", help=help_text)
    help_text = "above 0 prefers longer texts, below 0 shorter ones"
    add("--length-penalty", type=finite_float, default=1.0, help=help_text)
    help_text = "true: end with the Nth text that ends; false: when no better one is likely; never: possible"
    add("--early-stopping", choices=list(EARLY_STOPPING), default="false", help=help_text)

    add = parser.add_argument_group("form of a text").add_argument
    help_text = r"the text is exactly one of these, separated by commas; \, is a comma, \n a line break"
    add("--choices", action="extend", metavar="TEXT,...", type=listed, help=help_text)
    add("--regex", metavar="PATTERN", help="the text matches this regular expression as a whole")

    add = parser.add_argument_group("end of a text").add_argument
    add("--max-new-tokens", type=positive_int, default=200, help="the most tokens of a text")
    help_text = "no end token before this many tokens; a stop string still ends the text"
    add("--min-new-tokens", type=non_negative_int, default=0, help=help_text)
    help_text = r"end before this text; \n is a line break, \t a tab, \\ a backslash; repeat it for more"
    add("--stop", action="append", metavar="TEXT", type=unescape, help=help_text)
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

    title = "how the files of prompts, references and texts to score are written"
    cli.add_file_flags(parser.add_argument_group(title))

    group = parser.add_argument_group("instead of plain generation")
    add = group.add_mutually_exclusive_group().add_argument
    help_text = "a server on this machine that speaks OpenAI's protocol (GENERATE_API_KEY: its key)"
    add("--serve", action="store_true", help=help_text)
    add("--interactive", action="store_true", help="a conversation; /help lists its commands")
    help_text = "compare each token with model.generate's; exit code 1 if one differs"
    add("--check", action="store_true", help=help_text)
    add("--explain", action="store_true", help="show for each token what every filter does")
    add("--compare", action="store_true", help="show greedy, top-k and top-p side by side")
    add("--perplexity", metavar="FILE", help="the model's perplexity on a file (-: standard input)")
    help_text = (
        "how likely given texts are: JSONL with prompt, choices and perhaps answer (-: standard input)"
    )
    add("--score-continuations", metavar="FILE", help=help_text)
    add("--score", metavar="FILE", help="ROUGE of a file's texts against --references; no model")
    help_text = f"tokens per pass of --perplexity (default: {DEFAULT_WINDOW}, if they fit)"
    group.add_argument("--window", type=positive_int, help=help_text)
    help_text = "tokens from one window to the next (default: half a window)"
    group.add_argument("--stride", type=positive_int, help=help_text)

    add = parser.add_argument_group("limits of --serve").add_argument
    add("--port", type=port, default=8000, help="of 127.0.0.1; 0: any free one")
    help_text = "texts that wait for their turn; more are refused (429)"
    add("--max-waiting", type=positive_int, default=64, help=help_text)
    help_text = "seconds from a request to the end of its answer"
    add("--request-seconds", type=positive_duration, default=600.0, help=help_text)
    return parser


ESCAPED = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}  # what nobody can type into a command line as it is


def unescape(text: str) -> str:
    """Return a text from the command line with the characters that its escapes stand for."""
    return re.sub(r"\\[nt\\]", lambda match: ESCAPED[match[0]], text)


EARLY_STOPPING: dict[str, Any] = {"true": True, "false": False, "never": "never"}


def port(text: str) -> int:
    """Parse the number of a port."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{shorten(text, 60)!r} is not a number from 0 to 65535")
    return int(text)


def template_option(text: str) -> tuple[str, object]:
    """Parse a NAME=VALUE, whose value is one of JSON, or else a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{shorten(text, 60)!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def listed(text: str) -> list[str]:
    r"""Parse texts that are separated by commas; \, is a comma within one."""
    return [unescape(part.replace(r"\,", ",")) for part in re.split(r"(?<!\\),", text)]


def token_and_number(text: str) -> str:
    """Check a value of --logit-bias, TOKEN=NUMBER; the model's vocabulary is not known yet."""
    token, _, number = text.rpartition("=")
    if not token or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number) or abs(float(number)) > MOST_BIAS:
        wanted = f"TOKEN=NUMBER with a number from -{MOST_BIAS} to {MOST_BIAS}"
        raise argparse.ArgumentTypeError(f"{shorten(text, 60)!r} is not {wanted}")
    return text


DRAWING = (  # any of them given: not greedy
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_n_sigma",
    "xtc_probability",
)
DRAWING_FLAGS = tuple("--" + name.replace("_", "-") for name in DRAWING)
NO_PROMPT = ("--serve", "--interactive", "--perplexity", "--score", "--score-continuations")
ONE_PROMPT = ("--explain", "--compare")
NO_SCORE = ("--check", *ONE_PROMPT, "--serve", "--interactive", "--perplexity", "--score-continuations")
NO_TEXTS = ("--perplexity", "--score", "--score-continuations")
FORMS = ("--choices", "--regex")
FORMLESS = ("--min-new-tokens", "--no-repeat-ngram-size", "--ban-words")
TABLES = ("--prompts-file", "--references", "--score")  # flags whose file may be a table
MODES = ("--check", *ONE_PROMPT, *NO_PROMPT)
CHATS = ("--chat", "--interactive")
NEEDS = {  # a flag, and the flags of which it needs one
    **dict.fromkeys(("--system", "--prefill"), CHATS),
    **dict.fromkeys(("--chat-template", "--template-option"), (*CHATS, "--serve")),
    **dict.fromkeys(("--port", "--max-waiting", "--request-seconds"), ("--serve",)),
    "--skip-bad": ("--prompts-file",),
    "--window": ("--perplexity",),
    "--stride": ("--perplexity",),
    "--resume": ("--output",),
    "--logprobs": ("--output",),
    "--score": ("--references",),
    **dict.fromkeys(("--columns", "--delimiter", "--quoting"), TABLES),
    "--encoding": (*TABLES, "--perplexity", "--score-continuations"),
    "--xtc-threshold": ("--xtc-probability",),
    "--length-penalty": ("--num-beams",),
    "--early-stopping": ("--num-beams",),
    # greedy gives the same text each time
    "--num-samples": (*DRAWING_FLAGS, "--num-beams", "--use-model-defaults"),
}
CONFLICTS = (  # flags that cannot be used together, and why; torchrun counts as one
    ("--prompt", NO_PROMPT, "this mode takes no prompts"),
    ("--prompts-file", NO_PROMPT, "this mode takes no prompts"),
    ("--references", NO_SCORE, "this mode scores nothing"),
    (
        "--output",
        tuple(mode for mode in MODES if mode != "--score-continuations"),
        "this mode writes no texts",
    ),
    ("--resume", ("--score-continuations",), "its file is written at once"),
    ("--logprobs", ("--score-continuations",), "it writes those of whole texts"),
    ("--chat", ("--score-continuations",), "its prompts go on as they are"),
    ("--stop", ("--perplexity", "--score-continuations"), "no text is generated that could stop"),
    ("--stream", ("--output",), "the texts go to a file, not to the screen"),
    ("--lookup", (*DRAWING_FLAGS, "--use-model-defaults"), "prompt lookup is for greedy decoding"),
    (
        "--serve",
        ("--chat", "--lookup", "--sampler", *FORMS),
        "each request says what it is, and is decoded as if alone",
    ),
    ("--skip-bad", MODES, "this mode leaves out no prompts"),
    ("--use-model-defaults", NO_TEXTS, "no text is generated"),
    ("--lookup", ONE_PROMPT, "this mode uses no prompt lookup"),
    ("--num-beams", DRAWING_FLAGS, "a beam search draws nothing"),
    ("--num-beams", ("--use-model-defaults",), "the model's settings choose token by token"),
    ("--num-beams", ("--lookup",), "a beam search has several texts to guess"),
    ("--num-beams", ("--stop",), "beams end at end tokens only"),
    ("--num-beams", ("--logprobs",), "the logits of a beam are not kept"),
    ("--num-beams", (*ONE_PROMPT, *NO_PROMPT), "this mode chooses token by token"),
    ("--choices", ("--regex",), "a text has one form"),
    *((flag, FORMLESS, "it could forbid what the form needs") for flag in FORMS),
    *((flag, ("--stop",), "the text ends where its form does") for flag in FORMS),
    *((flag, ("--num-beams",), "a beam search knows no form") for flag in FORMS),
    *((flag, NO_TEXTS, "this mode generates no texts") for flag in FORMS),
    ("--num-samples", (*ONE_PROMPT, *NO_PROMPT), "this mode takes one text per prompt"),
    ("--num-samples", ("--references",), "one text per prompt is scored"),
    ("--check", ("--sampler",), "only --sampler exact draws the random numbers of model.generate"),
    ("torchrun", MODES, "this mode runs in one process"),
    ("torchrun", ("--stream",), "several processes cannot share one screen"),
    ("--references -", ("--prompts-file -",), "standard input can be read only once (name a file)"),
    ("--prompts-file -", ("torchrun",), "only one process can read standard input (name a file)"),
    ("--references -", ("torchrun",), "only one process can read standard input (name a file)"),
)
# logits divided by less can leave the range of fp32
LOWEST_TEMPERATURE, LOWEST_PENALTY = 1e-6, 1e-3
MOST_BIAS = 1000  # of a logit
MOST_THRESHOLD = 0.5  # of XTC: no two tokens are likelier
DEFAULT_WINDOW = 1024  # tokens


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other, and for texts and files that can't be
    used as far as the file system shows: before any library is loaded.
    """
    check_combinations(given_flags(args))
    check_ranges(args)
    if args.min_new_tokens > args.max_new_tokens:
        low, high = args.min_new_tokens, args.max_new_tokens
        raise UserError(f"--min-new-tokens {low}: lower it, or raise --max-new-tokens {high}")
    if args.num_beams == 1:
        raise UserError("--num-beams 1: that is greedy decoding; use at least 2, or leave it out")
    if args.num_beams is not None and args.num_samples > args.num_beams:
        raise UserError(f"--num-samples {args.num_samples}: --num-beams {args.num_beams} has no more texts")
    check_given_texts(args)
    if args.score is None:
        sources.check_model(args.model, kind="language model")
    for name in (args.prompts_file, args.references, args.score):
        if name is not None:
            sources.check_texts(name, any_suffix=file_options(args).is_table)
    for name in (args.perplexity, args.score_continuations):
        if name is not None:
            sources.check_text_file(name)
    if args.chat_template is not None:
        check_template(args.chat_template)
    if args.output is not None:
        output.check_path(args.output, resume=args.resume)


def check_ranges(args: argparse.Namespace) -> None:
    """Raise UserError for a number with which logits would leave the range of fp32."""
    if 0 < (args.temperature or 0) < LOWEST_TEMPERATURE:
        lowest = f"at least {LOWEST_TEMPERATURE:g}, or 0 for greedy"
        raise UserError(f"--temperature {args.temperature}: use {lowest}")
    if not LOWEST_PENALTY <= (args.repetition_penalty or 1.0) <= 1 / LOWEST_PENALTY:
        limits = f"from {LOWEST_PENALTY:g} to {1 / LOWEST_PENALTY:g}"
        raise UserError(f"--repetition-penalty {args.repetition_penalty}: use a number {limits}")
    if args.xtc_threshold > MOST_THRESHOLD:
        reason = f"no two tokens are so likely that XTC could leave one out; use at most {MOST_THRESHOLD}"
        raise UserError(f"--xtc-threshold {args.xtc_threshold}: {reason}")


def check_template(name: str) -> None:
    """Raise UserError for a --chat-template that is the path of a file, and can't be read."""
    is_path = os.sep in name or name.endswith(".jinja")
    if is_path and sources.kind_of_path(name) == "nothing":
        raise UserError(f"--chat-template {name}: no such file; check the path")
    if sources.kind_of_path(name) == "file":
        sources.check_text_file(name)


def file_options(args: argparse.Namespace) -> FileOptions:
    """Return how the flags say that data files are written."""
    names = [field.name for field in dataclasses.fields(FileOptions)]
    return FileOptions(**{name: getattr(args, name) for name in names})


def check_combinations(given: dict[str, str]) -> None:
    """Raise UserError for flags that contradict each other, or that need another one."""
    if not given.keys() & {"--prompt", "--prompts-file", *NO_PROMPT}:
        raise UserError("no prompt: give --prompt TEXT, --prompts-file FILE, --interactive or --serve")
    for flag, needed in NEEDS.items():
        if flag in given and not given.keys() & set(needed):
            others = " or ".join(needed)
            raise UserError(f"{given[flag]}: it works only with {others}; add that, or leave it out")
    for flag, others, reason in CONFLICTS:
        for other in others:
            if flag in given and other in given:
                both = f"{given[flag]} and {given[other]}"
                raise UserError(f"{both}: {reason}; leave one of the two out")


def check_given_texts(args: argparse.Namespace) -> None:
    """Raise UserError for a text on the command line that is empty or not UTF-8."""
    for number, text in enumerate(args.prompt or [], start=1):
        if not text.strip():
            raise UserError(f"--prompt {number}: the prompt is empty; write something to continue")
    if "" in (args.stop or []):
        raise UserError("--stop '': every text contains the empty string; leave it out")
    if args.prefill is not None and not args.prefill.strip():
        raise UserError("--prefill: the text is empty; write how the answer begins, or leave it out")
    if any(not word.strip() for word in args.ban_words or []):
        raise UserError("--ban-words: a word is empty; name words between the commas")
    if "" in (args.choices or []):
        raise UserError("--choices: one of them is empty; write texts between the commas")
    for name in ("prompt", "stop", "end_token", "logit_bias", "ban_words", "choices"):
        for text in getattr(args, name) or []:
            cli.check_encoding(text, "--" + name.replace("_", "-"))
    for name in ("system", "prefill", "regex"):
        cli.check_encoding(getattr(args, name) or "", f"--{name}")


def given_flags(args: argparse.Namespace) -> dict[str, str]:
    """Return the flags that are not at their default, each as a message shows it."""
    given, parser = {}, make_parser()
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        is_unused = flag in (*DRAWING_FLAGS, "--sampler") and not is_drawing(args)
        if value == parser.get_default(name) or value is False or is_unused:
            continue
        first = value[0] if isinstance(value, list) else value
        first = "=".join(map(str, first)) if isinstance(first, tuple) else first
        given[flag] = flag if value is True else f"{flag} {shorten(repr(first), 60)}"
        if value == "-":  # standard input
            given[f"{flag} -"] = f"{flag} -"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        given["torchrun"] = "torchrun"
    return given


def is_drawing(args: argparse.Namespace) -> bool:
    """Return whether tokens are drawn: a flag of drawing is given, and the temperature is not 0."""
    return args.temperature != 0 and any(getattr(args, name) is not None for name in DRAWING)


if __name__ == "__main__":
    # before the libraries are imported, which takes seconds: help and mistakes are answered at once
    ARGS = cli.parse(make_parser())

import torch
from tqdm import tqdm

from common import reading
from common.generation import beams, fast_sampling, language_model, sampling
from common.generation.beams import Beams
from common.generation.completion import Completion, Options, Prompt, Run, Stopwatch
from common.generation.decoding import Batch, PromptLookup, Step, fetch_ids, prefill, step
from common.generation.language_model import LanguageModel, Loading
from common.generation.sampling import Constraint, Sampler, Settings
from common.runtime import Runtime, free_memory_bytes, start_runtime, stop_runtime

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
    coins = sampling.xtc_coins(settings, options.seed, names)
    return sampling.independent_sampler(
        settings,
        prompt_length=batch.length,
        starts=batch.starts,
        uniforms=uniforms.to(batch.ids.device),
        coins=coins,
        draw=draws.draw_independently,
    )


def complete(run: Run, rows: list[Completion], batch: Batch | None = None, *, seed: int) -> Iterator[str]:
    """Generate the texts of completions; yield what each token adds to the first text, to show it.

    `batch` holds their prompts; None makes one with an empty cache. `seed` is the seed of this
    batch, for the exact sampler.
    """
    if not rows:
        return
    options, settings = run.options, run.options.settings
    if options.beams is not None:
        with run.told_if_out_of_memory(len(rows) * options.beams.size):
            yield from beams.complete(run, rows, options.beams)
        return
    batch = batch or run.left_pad(rows)
    lookup = PromptLookup(options.lookup) if options.lookup else None
    if lookup:
        steps = lookup.decode(run.language_model, batch, settings)
    else:
        sampler = make_sampler(options, batch, rows, seed)
        steps = decode(run.language_model, batch, sampler, settings)
    stopwatch = Stopwatch(batch)
    num_shown = 0  # characters of the first text that have been yielded
    with run.told_if_out_of_memory(len(rows)):
        for current in steps:
            stopwatch.token()
            run.add_step(rows, current, batch)
            yield rows[0].text[num_shown:]
            num_shown = len(rows[0].text)
    run.mark_whole(rows)
    run.timing.add(rows, stopwatch, lookup)
    for row in rows:
        row.finish()
    yield rows[0].text[num_shown:]


# --- Modes


@dataclass(frozen=True)
class Job:
    """All texts of a run, in batches; in each round, every process generates one batch."""

    run: Run
    batches: list[list[Prompt]]
    record: output.Record
    runtime: Runtime

    @property
    def num_texts(self) -> int:
        """How many texts there will be."""
        return sum(map(len, self.batches)) * self.run.options.num_samples


def generate_texts(args: argparse.Namespace) -> None:
    """Generate all texts; show or write them, score them, and print how fast it was."""
    with output.open_file(args.output, resume=args.resume) as file:
        run, prompts, references, runtime = load_all(args)
        record = output.Record(args.seed, recorded_settings(args, run))
        job = Job(run, split_batches(args, prompts), record, runtime)
        first_batch = find_first_batch(job, file) if args.resume else 0
        try:
            generated = generate_batches(args, job, first_batch, file)
        except (KeyboardInterrupt, Interrupted):
            # the signal can come while a batch is being written: only the file knows what it holds
            if file:
                held = f"{args.output} holds {file.num_lines():,} of {job.num_texts:,} texts"
                print(f"{held}; continue after them with --resume", file=sys.stderr)
            raise
    output.show_summary(run, runtime)
    if references is not None and runtime.is_main:
        from common.generation import scoring

        scoring.show_rouge(generated, references)
    stop_runtime()


def generate_batches(
    args: argparse.Namespace, job: Job, first_batch: int, file: output.OutputFile | None
) -> list[str]:
    """Generate the texts from batch `first_batch` on, and show or write them; return all texts for
    --references, those before it included.
    """
    wants_stream = sys.stdout.isatty() if args.stream is None else args.stream
    streams = wants_stream and not args.output and job.runtime.world_size == 1
    generated = [line["text"] for line in file.lines] if file else []
    rounds = range(first_batch, len(job.batches), job.runtime.world_size)
    with progress_bar(job, rounds, shown=file is not None) as bar:
        for first in rounds:
            lines = generate_round(job, first, streams=streams, bar=bar)
            if args.references is not None:
                generated += [line["text"] for line in lines]
            if file:
                file.write(lines)
            elif not args.output and job.runtime.is_main:
                shown = [line for line in lines if line["finish_reason"] != "refused"]
                output.show_lines(shown, with_headings=job.num_texts > 1, first_is_shown=streams)
    return generated


def find_first_batch(job: Job, file: output.OutputFile | None) -> int:
    """Return the number of the first batch that the output file does not hold yet.

    `file` is None on all processes but the main one, which may be the only one that sees the file.
    """
    texts_per_batch = len(job.batches[0]) * job.run.options.num_samples

    def count_finished() -> int:
        assert file is not None
        rows = (row for prompts in job.batches for row in job.run.rows(prompts))
        file.resume(rows, job.record, texts_per_batch=texts_per_batch)
        return len(file.lines)

    num_finished = job.runtime.broadcast_from_main(count_finished)
    if num_finished and file is not None:
        print(f"{file.path}: it already holds {num_finished:,} of {job.num_texts:,} texts", flush=True)
    return math.ceil(num_finished / texts_per_batch)


def progress_bar(job: Job, rounds: range, *, shown: bool) -> tqdm:
    """Return a bar that counts the tokens of the first text of each batch, and shows how long the
    rest will take; it vanishes at its end.
    """
    total = len(rounds) * job.run.options.settings.max_new_tokens
    # a bar only while a file is written: otherwise, the screen shows the texts
    hidden = None if shown else True  # None: where stderr is not a terminal
    return tqdm(total=total, unit="token", leave=False, dynamic_ncols=True, disable=hidden)


def generate_round(job: Job, first: int, *, streams: bool, bar: tqdm) -> list[dict]:
    """Generate one batch on every process, from batch `first` on; return the lines of all."""
    number = first + job.runtime.rank
    all_rows = job.run.rows(job.batches[number]) if number < len(job.batches) else []
    rows = [row for row in all_rows if not row.prompt.problem]
    if streams and rows and job.num_texts > 1:
        show(output.heading(rows[0].prompt.number + 1, 1, rows[0].prompt.text))
    seed = sampling.batch_seed(job.record.seed, number)
    most = job.run.options.settings.max_new_tokens
    for count, new_text in enumerate(complete(job.run, rows, seed=seed), start=1):
        bar.update(count <= most)  # the last piece of a text comes after its last token
        if streams:
            show(new_text)
    bar.update(-bar.n % most)  # what a batch that ended early has left out
    return output.gather([job.record.line(row, batch_seed=seed) for row in all_rows], job.runtime)


def recorded_settings(args: argparse.Namespace, run: Run) -> dict:
    """Return what a text depends on, as the output file names it."""
    flags = "chat system temperature top_k top_p min_p typical_p sampler lookup max_new_tokens"
    flags += " min_new_tokens stop end_token num_samples batch_size logprobs weights plain_step"
    # only where they are given, so that files of earlier versions can be continued
    newer = "epsilon_cutoff eta_cutoff top_n_sigma xtc_probability presence_penalty frequency_penalty"
    newer += " logit_bias ban_words choices regex chat_template prefill use_model_defaults"
    given = {name: getattr(args, name) for name in newer.split() if getattr(args, name)}
    if args.xtc_probability:
        given["xtc_threshold"] = args.xtc_threshold
    if args.template_option:
        given["template_option"] = dict(args.template_option)
    if args.num_beams:
        names = ("num_beams", "length_penalty", "early_stopping")
        given |= {name: getattr(args, name) for name in names}
    model, settings = run.language_model, run.options.settings
    return {
        "model": reading.full_name(args.model),
        "precision": str(model.dtype).removeprefix("torch."),
        **{name: getattr(args, name) for name in flags.split()},
        "repetition_penalty": settings.repetition_penalty,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        **given,
        "device": model.device.type,
        "end_ids": list(settings.end_ids),
    }


def show(text: str) -> None:
    """Show a piece of text at once."""
    print(text, end="", flush=True)


def check_tokens(args: argparse.Namespace) -> None:
    """Generate each batch here and by model.generate; exit with 1 at the first difference."""
    from common.generation import explain

    run, all_prompts, _, runtime = load_all(args)
    model, options, num_equal = run.language_model, run.options, 0
    pad_id = model.pad_id if options.settings.end_ids else None
    library = explain.library_model(model)
    for number, prompts in enumerate(split_batches(args, all_prompts)):
        rows, seed = run.rows(prompts), sampling.batch_seed(args.seed, number)
        list(complete(run, rows, seed=seed))
        for row, theirs in zip(rows, explain.library_tokens(model, library, prompts, options, seed=seed)):
            difference = explain.first_difference(row, theirs, pad_id=pad_id)
            if difference:
                print(explain.describe_difference(difference, model))
                sys.exit(1)
            num_equal += len(row.token_ids)
    print(f"equal: {num_equal:,} of {num_equal:,} tokens")
    output.show_summary(run, runtime)


def explain_tokens(args: argparse.Namespace) -> None:
    """Print a table for each token of one text, then the text."""
    from common.generation import explain

    run, prompts, _, _ = load_all(args)
    rows, settings = run.rows(prompts), run.options.settings
    batch = run.left_pad(rows)
    sampler = make_sampler(run.options, batch, rows, args.seed)
    coins = sampling.xtc_coins(settings, args.seed, [(0, 0)])  # the same for both samplers
    for current in decode(run.language_model, batch, sampler, settings):
        strikes = None if coins is None else coins[:, len(rows[0].token_ids)]
        print(explain.step_table(current, batch.tokens, settings, rows[0], strikes), flush=True)
        run.add_step(rows, current, batch)
    rows[0].finish()
    print(rows[0].text)


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
    print(explain.side_by_side(columns, shutil.get_terminal_size((120, 24)).columns))


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
    from common.generation import server

    key, listener = server.key_from_environment(), server.bind(args.port)
    run, _ = load(args)
    if run.chat is not None:
        run.chat.note_system()
    limits = server.Limits(args.batch_size, args.max_waiting, args.request_seconds, key)
    number = server.serve(run, decode, limits, listener)
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

    uses_stdin = args.perplexity == "-"
    lines = [] if uses_stdin else reading.read_lines(args.perplexity, encoding=args.encoding)
    run, _ = load(args)
    if uses_stdin:  # nothing reads it before the model is loaded
        lines = reading.read_lines(args.perplexity, encoding=args.encoding)
    window = scoring.choose_window(run.language_model, args.window, args.stride, most=DEFAULT_WINDOW)
    result = scoring.text_likelihood(run.language_model, "\n".join(lines), window, name=args.perplexity)
    passes = f"window {window.size:,}, stride {window.stride:,}"
    print(
        f"perplexity {result.perplexity:.4f} over {result.num_tokens:,} tokens ({passes}); "
        f"{result.bits_per_byte:.4f} bits per byte"
    )


def score_continuations(args: argparse.Namespace) -> None:
    """Show or write how likely the given continuations of prompts are, and which is the likeliest."""
    from common.generation import continuations

    name, uses_stdin = args.score_continuations, args.score_continuations == "-"

    def read() -> list[continuations.Question]:
        lines = reading.read_lines(name, encoding=args.encoding)
        return continuations.read_questions(lines, reading.source_name(name))

    questions = [] if uses_stdin else read()
    with output.open_file(args.output, resume=False) as file:
        run, _ = load(args)
        questions = questions or read()  # nothing reads standard input before the model is loaded
        scored = continuations.score(questions, run.language_model, batch_size=args.batch_size)
        numbered = list(zip(range(1, len(questions) + 1), questions, scored))
        if file:
            file.write([continuations.line(*row) for row in numbered])
        else:
            print("\n".join(continuations.table(*row) for row in numbered))
    if questions[0].answer is not None:
        print(continuations.accuracy(questions, scored))


def score_file(args: argparse.Namespace) -> None:
    """Print the ROUGE of a file's texts against the references, without a model."""
    from common.generation import scoring

    texts = reading.read_texts(
        args.score,
        column=args.text_column,
        cache_dir=args.cache_dir,
        allow_empty=True,
        options=file_options(args),
    )
    scoring.show_rouge(texts, read_references(args, len(texts)) or [])


# --- From flags to a run


def load(args: argparse.Namespace) -> tuple[Run, Runtime]:
    """Load the model, and return it with the options that the flags ask for.

    Raises UserError for an end token that the model does not have, a stop string that contains a
    special token, and a sampler that the device cannot run.
    """
    runtime = start_runtime(args.device, args.precision, args.seed)
    # --precision auto leaves it open how a step computes, so that the one in C may compute in fp32
    in_fp32 = args.precision == "auto" or runtime.precision == "fp32"
    loading = Loading(args.weights, in_fp32=in_fp32, uses_fast_step=not args.plain_step)
    model = language_model.load(args.model, runtime, cache_dir=args.cache_dir, loading=loading)
    if args.sampler == "independent" and model.device.type == "mps":
        problem = "it draws in fp64, which Apple's GPUs do not have"
        raise UserError(f"--sampler independent: {problem}; use --sampler exact or --device cpu")
    language_model.check_stops(args.stop or [], model)
    chat_format = load_format(args, model)
    is_chat = chat_format is not None and not args.serve  # a server also continues texts
    end_ids = chat_format.end_ids if is_chat else model.end_ids
    end_ids = tuple(dict.fromkeys(end_ids + language_model.end_token_ids(args.end_token or [], model)))
    if args.use_model_defaults:
        take_model_defaults(args, model)
    names = ["max_new_tokens", "min_new_tokens", "repetition_penalty", "presence_penalty"]
    names += ["frequency_penalty", "no_repeat_ngram_size", "xtc_threshold"]
    names += DRAWING if is_drawing(args) else ()
    settings = Settings(
        sample=is_drawing(args),
        end_ids=end_ids,
        constraint=chosen_form(args, model, end_ids),
        logit_bias=language_model.read_bias(args.logit_bias or [], model),
        banned=language_model.banned_runs(args.ban_words or [], model),
        **{name: getattr(args, name) for name in names if getattr(args, name) is not None},
    )
    options = Options(
        settings,
        seed=args.seed,
        sampler=args.sampler,
        num_samples=args.num_samples,
        stops=tuple(args.stop or ()),
        num_logprobs=args.logprobs,
        lookup=args.lookup or 0,
        beams=chosen_beams(args),
    )
    return Run(model, options, chat=chat_format), runtime


def load_format(args: argparse.Namespace, model: LanguageModel) -> ChatFormat | None:
    """Return how the conversations of a model are written, None where there are none."""
    is_asked_for = args.chat or args.interactive or args.chat_template is not None
    # a model without a template is served all the same: it continues texts
    if not is_asked_for and not (args.serve and model.tokenizer.chat_template):
        return None
    from common.generation import chat

    options = dict(args.template_option or [])
    return chat.read_format(model, wanted=args.chat_template, options=options, prefill=args.prefill or "")


def take_model_defaults(args: argparse.Namespace, model: LanguageModel) -> None:
    """Set each flag of the choice of tokens that is not given to what the model's
    generation_config.json says, and say in one line what that is.

    Raises UserError for a value that its flag would not take, and for several samples of a model
    that decodes greedily.
    """
    defaults = language_model.sampling_defaults(model)
    parser = make_parser()
    actions = {action.dest: action for action in parser._actions}
    is_default = {name: getattr(args, name, None) == parser.get_default(name) for name in defaults}
    known = [name for name in defaults if name in actions and name != "num_beams"]
    taken = {name: defaults[name] for name in known if is_default[name]}
    for name, value in taken.items():
        place = f"--use-model-defaults: {model.name}: generation_config.json: {name}"
        try:
            parsed = actions[name].type(str(value))  # pyrefly: ignore[not-callable]  (a number type)
        except argparse.ArgumentTypeError as error:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{place}: {error}; give {flag}") from error
        setattr(args, name, parsed)
    left_out = [name for name in defaults if name not in known]
    if args.num_samples > 1 and not is_drawing(args):
        raise UserError(
            f"--num-samples {args.num_samples}: {model.name} decodes greedily, which gives the same text "
            "each time; give --temperature"
        )
    check_ranges(args)
    settings = ", ".join(f"{name} {value}" for name, value in taken.items()) or "nothing"
    missing = f"; not taken: {', '.join(left_out)}" if left_out else ""
    kind = "drawn" if is_drawing(args) else "greedy"
    sources.note(f"note: the generation_config.json of {model.name}: {settings} ({kind}){missing}")


def chosen_form(
    args: argparse.Namespace, model: LanguageModel, end_ids: tuple[int, ...]
) -> Constraint | None:
    """Return the form that the flags ask for, None if they do not."""
    if args.choices is None and args.regex is None:
        return None
    from common.generation import constraints

    if args.choices is not None:
        return constraints.make_choices(args.choices, model, end_ids)
    return constraints.Regex(args.regex, model, end_ids)


def chosen_beams(args: argparse.Namespace) -> Beams | None:
    """Return how the flags ask for a beam search, None if they do not."""
    if args.num_beams is None:
        return None
    return Beams(args.num_beams, args.length_penalty, EARLY_STOPPING[args.early_stopping])


def load_all(args: argparse.Namespace) -> tuple[Run, list[Prompt], list[str] | None, Runtime]:
    """Read the prompts and references, load the model, and encode the prompts.

    Files are read first, so that a mistake in them is told at once. Standard input is read only
    when the model is loaded, so that no question of a library can take its answer from it. Raises
    UserError for a text that can't be used, and for prompts that do not fit into the model or the
    memory.
    """
    uses_stdin = "-" in (args.prompts_file, args.references)
    given, references = ([], None) if uses_stdin else read_texts(args)
    run, runtime = load(args)
    if uses_stdin:
        given, references = read_texts(args)
    prompts = encode_prompts(args, given, run)
    usable = [prompt for prompt in prompts if not prompt.problem]
    for prompt in prompts if runtime.is_main else ():
        if prompt.problem:
            print(f"generate.py: left out: {prompt.problem}", file=sys.stderr)
    if not usable:
        raise UserError("--skip-bad: no prompt is left; correct them")
    longest = max(usable, key=lambda prompt: len(prompt.ids))
    size = min(args.batch_size, len(usable))
    if args.sampler == "independent" and size > 1 and run.language_model.reads_padding:
        problem = f"{run.language_model.name} takes the padding of a batch for text"
        raise UserError(f"--sampler independent: {problem}; use --batch-size 1")
    run.check_memory([longest] * size, free_memory_bytes(runtime.device))
    return run, prompts, references, runtime


def encode_prompts(args: argparse.Namespace, given: list[str | list[Message]], run: Run) -> list[Prompt]:
    """Return the prompts, which are texts or conversations, with their tokens.

    Raises UserError for one that does not fit into the model, or that the template refuses; with
    --skip-bad it has a problem instead.
    """
    model, names = run.language_model, [f"prompt {number}" for number in range(1, len(given) + 1)]
    if run.chat is None:
        encode = functools.partial(language_model.encode_prompt, language_model=model)
        encoded = [outcome(encode, str(text), name=name) for text, name in zip(given, names)]
    else:
        from common.generation import chat

        conversations = [chat.as_conversation(item, args.system) for item in given]
        if any(messages[0]["role"] == "system" for messages in conversations):
            run.chat.note_system()
        encoded = run.chat.try_to_encode(conversations, names)
    prompts, check = [], functools.partial(language_model.check_length, language_model=model)
    for number, (item, ids, name) in enumerate(zip(given, encoded, names)):
        most = args.max_new_tokens
        problem = ids if isinstance(ids, UserError) else outcome(check, ids, most, name=name)
        if problem is not None and not args.skip_bad:
            raise problem
        text, messages = (item, None) if isinstance(item, str) else (item[-1]["content"], item)
        known = [] if isinstance(ids, UserError) else ids
        prompts.append(Prompt(number, text, known, messages, problem=str(problem or "")))
    return prompts


def read_texts(args: argparse.Namespace) -> tuple[list[str | list[Message]], list[str] | None]:
    """Return the texts or conversations of all prompts, and their references, None without
    --references.
    """
    given: list[str | list[Message]] = [*(args.prompt or [])]
    if args.prompts_file is not None:
        from common.generation import conversation

        column, cache_dir, options = args.text_column, args.cache_dir, file_options(args)
        given += conversation.read_prompts(
            args.prompts_file, column=column, cache_dir=cache_dir, options=options
        )
    if not args.chat and any(isinstance(item, list) for item in given):
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
        options=file_options(args),
    )


def stop(number: int, _frame: FrameType | None) -> None:
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
        signal.signal(number, stop)
    cli.run_main(main, ARGS, prog="generate.py")  # pyrefly: ignore[unbound-name]  (parsed above)
