"""The flags of generate.py, and what they and the files that they name show at once.

Importing it is quick: mistakes are reported before PyTorch is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from typing import Any

from common import cli, reading, sources
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
from common.columns import KeptColumns, add_kept_flags
from common.errors import UserError, shorten
from common.generation import output, prompts
from common.generation.prompts import TEMPLATE_FLAG, PromptConfig, parse_template


def make_parser(description: str | None = None) -> cli.Parser:
    """Return the parser of all flags."""
    example = '--prompt "Once upon a time"'
    parser = cli.Parser(prog="generate.py", description=description, check=check_flags, example=example)
    cli.add_shared_flags(parser, model="bundled/SmolLM2-135M-Instruct")
    for add_flags in (
        add_model_flags,
        add_prompt_flags,
        add_sampling_flags,
        add_search_flags,
        add_end_flags,
        add_output_flags,
        add_other_work_flags,
    ):
        add_flags(parser)
    return parser


def add_model_flags(parser: cli.Parser) -> None:
    """Add the flags that say how the model computes, and with which adapter."""
    add = parser.add_argument_group("how a CPU computes").add_argument
    help_text = "auto: as the file stores them (GGUF: 4 or 8 bits), where the step in C covers it"
    add("--weights", choices=["auto", "file", "fp32", "bf16"], default="auto", help=help_text)
    help_text = "no step in C: each token by the library's forward, bit for bit as model.generate"
    add("--plain-step", action="store_true", help=help_text)

    help_text = "a LoRA adapter of peft, in a folder or on the Hub, merged into the model's weights"
    add = parser.add_argument_group("adapter").add_argument
    add("--adapter", type=cli.path, metavar="FOLDER|NAME", help=help_text)


def add_prompt_flags(parser: cli.Parser) -> None:
    """Add the flags that say what is to be continued."""
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", metavar="TEXT", help="a text to continue; repeat it for more")
    help_text = "one prompt per line (-: standard input), or a data file"
    add("--prompts-file", type=cli.path, metavar="FILE", help=help_text)
    add("--text-column", default="text", help="column of the prompts in a data file")
    help_text = "makes the prompts of a data file, such as 'Summarise: {review}'; {{ is a brace"
    add("--prompt-template", metavar="TEXT", type=unescape, help=help_text)
    help_text = (
        "leave out prompts that are empty, do not fit, or that the template refuses; the output says so"
    )
    add("--skip-bad", action="store_true", help=help_text)
    add("--chat", action="store_true", help="prompts are questions, in the model's chat template")
    add("--system", metavar="TEXT", help="system message of a chat")
    add("--prefill", metavar="TEXT", help="how each answer of a chat begins")
    help_text = "another template: one of several that the model has, or a file in Jinja"
    add("--chat-template", metavar="NAME|FILE", type=cli.path, help=help_text)
    help_text = "what the template reads, such as enable_thinking=false; repeat it for more"
    option = {"action": "append", "metavar": "NAME=VALUE", "type": template_option}
    add("--template-option", **option, help=help_text)


def add_sampling_flags(parser: cli.Parser) -> None:
    """Add the flags of the sampler's filters."""
    title = "choice of tokens (greedy without a flag from --temperature to --xtc-probability)"
    add = parser.add_argument_group(title).add_argument
    help_text = "what generation_config.json says, for each flag below that is not given"
    add("--use-model-defaults", action="store_true", help=help_text)
    add("--temperature", type=non_negative_float, help="sharpens below 1, flattens above; 0: greedy")
    add("--top-k", type=non_negative_int, help="keep the k most likely tokens; 0: off")
    add("--top-p", type=probability, help="keep the fewest tokens that reach this probability")
    add("--min-p", type=fraction, help="keep tokens at least this likely, relative to the best one")
    add("--typical-p", type=probability, help="keep the most typical tokens up to this probability")
    add("--epsilon-cutoff", type=fraction, help="keep tokens that are at least this likely")
    help_text = "as --epsilon-cutoff, but lower where the distribution is flat"
    add("--eta-cutoff", type=fraction, help=help_text)
    help_text = "keep tokens whose logit is at most this many standard deviations below the highest"
    add("--top-n-sigma", type=non_negative_float, metavar="N", help=help_text)
    help_text = "so often, leave out all tokens above --xtc-threshold but the least likely of them"
    add("--xtc-probability", type=probability, help=help_text)
    help_text = "how likely a token is that XTC leaves out"
    add("--xtc-threshold", type=probability, default=0.1, help=help_text)
    add("--repetition-penalty", type=positive_float, help="above 1 discourages repetition; 1: off")
    help_text = "subtract this from the logit of each token that the text has already"
    add("--presence-penalty", type=penalty, default=0.0, help=help_text)
    help_text = "subtract this from the logit of each token, times how often the text has it"
    add("--frequency-penalty", type=penalty, default=0.0, help=help_text)
    help_text = "add a number to the logit of a token, or of that with this id; repeat it for more"
    option = {"action": "append", "metavar": "TOKEN=NUMBER", "type": token_and_number}
    add("--logit-bias", **option, help=help_text)
    help_text = r"words, separated by commas, whose tokens may not be generated; \, is a comma"
    add("--ban-words", action="extend", metavar="WORD,...", type=split_at_commas, help=help_text)
    help_text = "no sequence of this many tokens occurs twice; 0: off"
    add("--no-repeat-ngram-size", type=non_negative_int, help=help_text)


def add_search_flags(parser: cli.Parser) -> None:
    """Add the flags that say from which random numbers a token is drawn, or how it is searched."""
    add = parser.add_argument_group("draw or search").add_argument
    help_text = (
        "exact: the random numbers of model.generate, in each batch from its batch_seed; "
        "independent: each text has its own random numbers and does not depend on its batch"
    )
    add("--sampler", choices=["exact", "independent"], default="exact", help=help_text)
    help_text = "greedy only: guess up to N tokens ahead from the text so far"
    add("--lookup", type=positive_int, metavar="N", help=help_text)
    help_text = "search for the likeliest text with N beams; --num-samples shows more than the best"
    add("--num-beams", type=positive_int, metavar="N", help=help_text)
    help_text = "above 0 prefers longer texts, below 0 shorter ones"
    add("--length-penalty", type=finite_float, default=1.0, help=help_text)
    help_text = "true: after N ended texts; false: when no better one is likely; never: possible"
    add("--early-stopping", choices=list(EARLY_STOPPING), default="false", help=help_text)


def add_end_flags(parser: cli.Parser) -> None:
    """Add the flags of a text's form and end."""
    add = parser.add_argument_group("form of a text").add_argument
    help_text = r"the text is exactly one of these, separated by commas; \, is a comma, \n a new line"
    add("--choices", action="extend", metavar="TEXT,...", type=split_at_commas, help=help_text)
    add("--regex", metavar="PATTERN", help="the text matches this regular expression as a whole")

    add = parser.add_argument_group("end of a text").add_argument
    add("--max-new-tokens", type=positive_int, default=200, help="the maximum number of new tokens of a text")
    help_text = "no end token before this many tokens; a stop string still ends the text"
    add("--min-new-tokens", type=non_negative_int, default=0, help=help_text)
    help_text = r"end before this text; \n is a line break, \t a tab, \\ a backslash; may be repeated"
    add("--stop", action="append", metavar="TEXT", type=unescape, help=help_text)
    help_text = "another token that ends a text, such as '<|endoftext|>'"
    add("--end-token", action="append", metavar="TOKEN", help=help_text)


def add_output_flags(parser: cli.Parser) -> None:
    """Add the flags of the output."""
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--num-samples", type=positive_int, default=1, help="texts per prompt")
    add("--batch-size", type=positive_int, default=8, help="prompts per batch")
    help_text = "show the first text of each batch as it grows (default: on a terminal)"
    add("--stream", action=argparse.BooleanOptionalAction, help=help_text)
    help_text = "write one JSON line per text instead of showing it"
    add("--output", metavar="FILE", type=cli.path, help=help_text)
    add("--resume", action="store_true", help="continue after the texts in the output file")
    add_kept_flags(group, needs="--output", beside="the texts of a data file's prompts, or scores")
    help_text = "with --output: log-probabilities of each token and of the K most likely ones"
    add("--logprobs", type=non_negative_int, metavar="K", help=help_text)
    help_text = "ROUGE of the texts against these references: one per line, or a data file"
    add("--references", type=cli.path, metavar="FILE", help=help_text)
    add("--reference-column", default="text", help="column of the references in a data file")

    title = "how the files of prompts, references and texts to score are written"
    cli.add_file_flags(parser.add_argument_group(title))


def add_other_work_flags(parser: cli.Parser) -> None:
    """Add the flags that do something else instead, and the limits of what they do."""
    group = parser.add_argument_group("instead of plain generation")
    add = group.add_mutually_exclusive_group().add_argument
    help_text = "a server on this machine that speaks OpenAI's protocol (GENERATE_API_KEY: its key)"
    add("--serve", action="store_true", help=help_text)
    add("--interactive", action="store_true", help="a conversation; /help lists its commands")
    help_text = "compare each token with model.generate's; exit code 1 if one differs"
    add("--check", action="store_true", help=help_text)
    add("--explain", action="store_true", help="show for each token what every filter does")
    add("--compare", action="store_true", help="show greedy, top-k and top-p side by side")
    help_text = "the model's perplexity on a file (-: standard input)"
    add("--perplexity", type=cli.path, metavar="FILE", help=help_text)
    help_text = "how likely texts are: JSONL with prompt, choices, perhaps answer (-: standard input)"
    add("--score-continuations", type=cli.path, metavar="FILE", help=help_text)
    help_text = "ROUGE of a file's texts against --references; no model"
    add("--score", type=cli.path, metavar="FILE", help=help_text)
    help_text = f"tokens per pass of --perplexity (default: {DEFAULT_WINDOW}, if they fit)"
    group.add_argument("--window", type=positive_int, help=help_text)
    help_text = "tokens from one window to the next (default: half a window)"
    group.add_argument("--stride", type=positive_int, help=help_text)

    add = parser.add_argument_group("limits of --serve").add_argument
    add("--port", type=cli.port, default=8000, help="of 127.0.0.1; 0: any free one")
    help_text = "texts that wait for their turn; more are refused (429)"
    add("--max-waiting", type=positive_int, default=64, help=help_text)
    help_text = "seconds from a request to the end of its answer"
    add("--request-seconds", type=positive_duration, default=600.0, help=help_text)


ESCAPED = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}  # characters that can't be typed as they are


def unescape(text: str) -> str:
    """Return a text from the command line with the characters that its escapes stand for."""
    return re.sub(r"\\[nt\\]", lambda match: ESCAPED[match[0]], text)


EARLY_STOPPING: dict[str, Any] = {"true": True, "false": False, "never": "never"}


def template_option(text: str) -> tuple[str, object]:
    """Parse a NAME=VALUE, whose value is one of JSON, or else a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{shorten(text, 60)!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def split_at_commas(text: str) -> list[str]:
    r"""Parse texts that are separated by commas; \, is a comma within one."""
    return [unescape(part.replace(r"\,", ",")) for part in re.split(r"(?<!\\),", text)]


def token_and_number(text: str) -> str:
    """Check a value of --logit-bias, TOKEN=NUMBER; the model's vocabulary is not known yet."""
    token, _, number = text.rpartition("=")
    is_number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number)
    if not token or not is_number or abs(float(number)) > MOST_BIAS:
        wanted = f"TOKEN=NUMBER with a number from -{MOST_BIAS} to {MOST_BIAS}"
        raise argparse.ArgumentTypeError(f"{shorten(text, 60)!r} is not {wanted}")
    return text


LIBRARY_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
DRAWING = (*LIBRARY_DRAWING, "top_n_sigma", "xtc_probability")  # any of them given: not greedy
RECORDED = (  # with DRAWING, what a text depends on besides its prompt, the model and the seed
    "xtc_threshold repetition_penalty presence_penalty frequency_penalty no_repeat_ngram_size"
    " logit_bias ban_words use_model_defaults sampler lookup num_beams length_penalty early_stopping"
    " choices regex max_new_tokens min_new_tokens stop end_token num_samples batch_size logprobs"
    " weights plain_step chat system prefill chat_template prompt_template"
)
DRAWING_FLAGS = tuple("--" + name.replace("_", "-") for name in DRAWING)
NO_PROMPT = ("--serve", "--interactive", "--perplexity", "--score", "--score-continuations")
ONE_PROMPT = ("--explain", "--compare")
NO_TEXTS = ("--perplexity", "--score", "--score-continuations")
CONSTRAINTS = ("--choices", "--regex")
OF_NEW_TEXTS = (  # flags of the choice, the number and the end of tokens
    *("--use-model-defaults", *DRAWING_FLAGS, "--repetition-penalty", "--presence-penalty"),
    *("--frequency-penalty", "--logit-bias", "--ban-words", "--no-repeat-ngram-size", "--lookup"),
    *("--num-beams", *CONSTRAINTS, "--max-new-tokens", "--min-new-tokens", "--stop", "--end-token"),
    *("--num-samples", "--stream"),
)
MAY_FORBID = ("--min-new-tokens", "--no-repeat-ngram-size", "--ban-words")
KEPT = ("--id-column", "--keep-columns")
TABLES = ("--prompts-file", "--references", "--score")  # flags whose file may be a table
MODES = ("--check", *ONE_PROMPT, *NO_PROMPT)
CHATS = ("--chat", "--interactive")
NEEDS = {  # a flag, and the flags of which it needs one
    **dict.fromkeys(("--system", "--prefill"), CHATS),
    **dict.fromkeys(("--chat-template", "--template-option"), (*CHATS, "--serve")),
    **dict.fromkeys(("--port", "--max-waiting", "--request-seconds"), ("--serve",)),
    **dict.fromkeys(("--skip-bad", "--prompt-template"), ("--prompts-file",)),
    "--window": ("--perplexity",),
    "--stride": ("--perplexity",),
    **dict.fromkeys(("--resume", "--logprobs", *KEPT), ("--output",)),
    "--score": ("--references",),
    **dict.fromkeys(("--columns", "--delimiter", "--quoting"), TABLES),
    "--encoding": (*TABLES, "--perplexity", "--score-continuations"),
    "--text-column": ("--prompts-file", "--score"),
    "--reference-column": ("--references",),
    "--xtc-threshold": ("--xtc-probability",),
    "--length-penalty": ("--num-beams",),
    "--early-stopping": ("--num-beams",),
    # greedy gives the same text each time
    "--num-samples": (*DRAWING_FLAGS, "--num-beams", "--use-model-defaults"),
}
CONFLICTS = (  # flags that cannot be used together, and why; torchrun counts as one
    ("--prompt", NO_PROMPT, "this mode takes no prompts"),
    ("--prompts-file", NO_PROMPT, "this mode takes no prompts"),
    ("--references", tuple(mode for mode in MODES if mode != "--score"), "this mode scores nothing"),
    (
        "--output",
        tuple(mode for mode in MODES if mode != "--score-continuations"),
        "this mode writes no texts",
    ),
    ("--resume", ("--score-continuations",), "its file is written at once"),
    ("--logprobs", ("--score-continuations",), "it writes those of whole texts"),
    *((flag, NO_TEXTS, "no text is generated") for flag in OF_NEW_TEXTS),
    ("--chat", ("--perplexity", "--score"), "a text is scored as it is"),
    ("--batch-size", ("--perplexity", "--score"), "this mode makes no batches of texts"),
    ("--stream", ("--output",), "the texts go to a file, not to the screen"),
    ("--lookup", (*DRAWING_FLAGS, "--use-model-defaults"), "prompt lookup is for greedy decoding"),
    (
        "--serve",
        ("--chat", "--lookup", "--sampler", *CONSTRAINTS),
        "each request says what it is, and is decoded as if alone",
    ),
    *((flag, ("--prompt",), "it names columns, which a text has not") for flag in (*KEPT, TEMPLATE_FLAG)),
    (TEMPLATE_FLAG, ("--text-column",), "the template names the columns"),
    ("--skip-bad", MODES, "this mode leaves out no prompts"),
    ("--adapter", ("--score",), "no model is loaded"),
    ("--lookup", ONE_PROMPT, "this mode uses no prompt lookup"),
    ("--num-beams", DRAWING_FLAGS, "a beam search draws nothing"),
    ("--num-beams", ("--use-model-defaults",), "the model's settings choose token by token"),
    ("--num-beams", ("--lookup",), "a beam search has several texts to guess"),
    ("--num-beams", ("--stop",), "beams end at end tokens only"),
    ("--num-beams", ("--logprobs",), "the logits of a beam are not kept"),
    ("--num-beams", (*ONE_PROMPT, "--serve", "--interactive"), "this mode chooses token by token"),
    ("--choices", ("--regex",), "a text has one form"),
    *((flag, MAY_FORBID, "it could forbid what the form needs") for flag in CONSTRAINTS),
    *((flag, ("--stop",), "the text ends where its form does") for flag in CONSTRAINTS),
    *((flag, ("--num-beams",), "a beam search knows no form") for flag in CONSTRAINTS),
    ("--num-samples", (*ONE_PROMPT, "--serve", "--interactive"), "this mode takes one text per prompt"),
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
    """Raise UserError for flags that contradict each other, and, as far as the file system shows, for texts
    and files that can't be used: before any library is loaded.
    """
    check_combinations(given_flags(args))
    check_ranges(args)
    if args.min_new_tokens > args.max_new_tokens:
        low, high = args.min_new_tokens, args.max_new_tokens
        raise UserError(f"--min-new-tokens {low}: lower it, or raise --max-new-tokens {high}")
    if args.num_beams == 1:
        raise UserError("--num-beams 1: that is greedy decoding; use at least 2, or leave it out")
    if args.num_beams is not None and args.num_samples > args.num_beams:
        both = f"--num-samples {args.num_samples}: --num-beams {args.num_beams}"
        raise UserError(f"{both} has no more texts")
    check_given_texts(args)
    if args.prompt_template is not None:
        parse_template(args.prompt_template)
    if args.score is None:
        sources.check_model(args.model, kind="language model")
    if args.adapter is not None:
        sources.check_adapter(args.adapter)
        if args.weights == "file":
            problem = "what it is merged into is no longer as in the file"
            raise UserError(
                f"--adapter {args.adapter} and --weights file: {problem}; leave one of the two out"
            )
    for name in (args.prompts_file, args.references, args.score):
        if name is not None:
            sources.check_texts(name, any_suffix=cli.file_options(args).is_table)
    for name in (args.perplexity, args.score_continuations):
        if name is not None:
            sources.check_text_file(name)
    if args.perplexity is not None and sources.suffix(args.perplexity) in sources.DATA_SUFFIXES:
        problem = "a text is scored as a whole, and this is a data file"
        advice = f"write the texts of its column to a .txt file, or score it raw: - < {args.perplexity}"
        raise UserError(f"--perplexity {args.perplexity}: {problem}; {advice}")
    if args.chat_template is not None:
        check_template(args.chat_template)
    if args.output is not None:
        output.check_path(args.output, resume=args.resume)
    check_files(args)


def check_files(args: argparse.Namespace) -> None:
    """Raise UserError for a file that is not text, and for a column that it lacks, as its beginning shows."""
    options = cli.file_options(args)
    if args.prompts_file is not None:
        prompts.check_columns(args.prompts_file, prompt_config(args))
    for name, column, flag in (
        (args.references, args.reference_column, "--reference-column"),
        (args.score, args.text_column, "--text-column"),
    ):
        if name is not None:
            reading.check_columns(name, {column: flag}, options=options)
    wanted, several = KeptColumns(args.id_column, args.keep_columns).flags()
    if args.perplexity is not None:
        reading.check_columns(args.perplexity, {}, options=options)
    if args.score_continuations is not None:
        reading.check_columns(args.score_continuations, wanted, several=several, options=options)


def prompt_config(args: argparse.Namespace) -> PromptConfig:
    """Return where the flags say that a file has its prompts."""
    template = args.prompt_template
    return PromptConfig(
        args.text_column,
        None if template is None else parse_template(template),
        KeptColumns(args.id_column, args.keep_columns),
        args.skip_bad,
        cli.file_options(args),
        args.cache_dir,
    )


def check_ranges(args: argparse.Namespace) -> None:
    """Raise UserError for a number with which logits would leave the range of fp32."""
    if 0 < (args.temperature or 0) < LOWEST_TEMPERATURE:
        lowest = f"at least {LOWEST_TEMPERATURE:g}, or 0 for greedy"
        raise UserError(f"--temperature {args.temperature}: use {lowest}")
    if not LOWEST_PENALTY <= (args.repetition_penalty or 1.0) <= 1 / LOWEST_PENALTY:
        limits = f"from {LOWEST_PENALTY:g} to {1 / LOWEST_PENALTY:g}"
        raise UserError(f"--repetition-penalty {args.repetition_penalty}: use a number {limits}")
    if args.compare and args.top_k == 0 and "--top-k" in given_flags(args):
        raise UserError("--top-k 0: --compare shows what is drawn with it; give a number above 0")
    if args.xtc_threshold > MOST_THRESHOLD:
        reason = f"no two tokens are so likely; use at most {MOST_THRESHOLD}"
        raise UserError(f"--xtc-threshold {args.xtc_threshold}: {reason}")


def check_template(name: str) -> None:
    """Raise UserError for a --chat-template that is the path of a file, and can't be read."""
    is_path = os.sep in name or name.endswith(".jinja")
    if is_path and sources.kind_of_path(name) == "nothing":
        raise UserError(f"--chat-template {name}: no such file; check the path")
    if sources.kind_of_path(name) == "file":
        sources.check_text_file(name)


def check_combinations(given: dict[str, str]) -> None:
    """Raise UserError for flags that contradict each other, or that need another one."""
    if not given.keys() & {"--prompt", "--prompts-file", *NO_PROMPT}:
        advice = "give --prompt TEXT, --prompts-file FILE, --interactive or --serve"
        raise UserError(f"no prompt: {advice}")
    for flag, needed in NEEDS.items():
        if flag in given and not given.keys() & set(needed):
            others = " or ".join(needed)
            problem = f"it works only with {others}"
            raise UserError(f"{given[flag]}: {problem}; add that, or leave it out")
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
        advice = "write how the answer begins, or leave it out"
        raise UserError(f"--prefill: the text is empty; {advice}")
    if any(not word.strip() for word in args.ban_words or []):
        raise UserError("--ban-words: a word is empty; name words between the commas")
    if "" in (args.choices or []):
        raise UserError("--choices: one of them is empty; write texts between the commas")
    for name in ("prompt", "stop", "end_token", "logit_bias", "ban_words", "choices"):
        for text in getattr(args, name) or []:
            cli.check_encoding(text, "--" + name.replace("_", "-"))
    for name in ("system", "prefill", "regex", "prompt_template"):
        cli.check_encoding(getattr(args, name) or "", "--" + name.replace("_", "-"))


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
