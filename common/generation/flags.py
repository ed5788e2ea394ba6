"""The command line's flags: which of them go together, and what they ask of the sampler and the
decoder.
"""

import os

from common import reading
from common.errors import UserError
from common.generation import language_model as models
from common.generation import perplexity
from common.generation.completion import Generator, Options, Prompt
from common.generation.language_model import LanguageModel
from common.generation.sampling import Settings

DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # any of them given means: draw
MODES = ("check", "explain", "compare", "perplexity", "score", "interactive")
NOT_SETTINGS = (
    "prompt",
    "prompts_file",
    "text_column",
    "output",
    "resume",
    "stream",
    "references",
    "reference_column",
    "cache_dir",
    "device",
    "model",
    # what a text does not depend on, or what is recorded in another form
    "window",
    "stride",
    "seed",
    *MODES,
)


LOWEST_TEMPERATURE = 1e-6  # logits divided by less can leave the range of fp32


def draws(args) -> bool:
    """Tell whether tokens are drawn: a flag of drawing is given, and the temperature is not 0."""
    return any(getattr(args, name) is not None for name in DRAWING) and args.temperature != 0


def check(args):
    """Raise UserError for flags that can't go together, before anything is loaded."""
    for name in ("prompt", "system", "stop", "end_token"):
        given = getattr(args, name) or []
        for text in [given] if isinstance(given, str) else given:
            check_encoding(text, f"--{name.replace('_', '-')}")
    mode = next((f"--{name}" for name in MODES if getattr(args, name) not in (None, False)), None)
    prompts = bool(args.prompt) or args.prompts_file is not None
    texts = mode in (None, "--check", "--explain", "--compare")
    problems = (
        (
            texts and not prompts,
            "no prompt: give --prompt TEXT, --prompts-file FILE (- for standard input) or --interactive",
        ),
        (not texts and prompts, f"{mode}: it takes no prompts; leave --prompt and --prompts-file out"),
        (
            mode == "--score" and args.references is None,
            "--score: name the references with --references FILE",
        ),
        (
            mode not in (None, "--score") and args.references is not None,
            f"--references: {mode} scores nothing; leave one of the two out",
        ),
        (
            mode is not None and args.output is not None,
            f"--output: {mode} writes no texts; leave one of the two out",
        ),
        (
            args.system is not None and not (args.chat or args.interactive),
            f"--system {args.system!r}: it needs --chat or --interactive",
        ),
        (
            mode == "--perplexity" and bool(args.stop),
            f"--stop {(args.stop or [''])[0]!r}: --perplexity makes no text that could stop; leave it out",
        ),
        (
            mode != "--perplexity" and args.window is not None,
            f"--window {args.window}: it is for --perplexity; leave it out",
        ),
        (
            mode != "--perplexity" and args.stride is not None,
            f"--stride {args.stride}: it is for --perplexity; leave it out",
        ),
        (
            0 < (args.temperature or 0) < LOWEST_TEMPERATURE,
            f"--temperature {args.temperature}: at least {LOWEST_TEMPERATURE:g}, or 0 for greedy",
        ),
        (
            bool(args.stream) and args.output is not None,
            "--stream: the texts go to --output FILE, not to the screen; leave one of the two out",
        ),
        (
            args.prompts_file == args.references == "-",
            "--references -: standard input holds the prompts already; name a file",
        ),
        (args.resume and args.output is None, "--resume: name the file to go on with by --output FILE"),
        (
            args.logprobs is not None and args.output is None,
            f"--logprobs {args.logprobs}: they are written to a file; name it with --output FILE",
        ),
        ("" in (args.stop or []), "--stop '': an empty string is everywhere; name one with something in it"),
        (
            args.min_new_tokens > args.max_new_tokens,
            (
                f"--min-new-tokens {args.min_new_tokens}: at most --max-new-tokens {args.max_new_tokens} are"
                " made; lower the first or raise the second"
            ),
        ),
        *_conflicts_of_samples(args, mode),
        *_conflicts_of_samplers(args, mode),
        *_conflicts_of_processes(args, mode),
    )
    for wrong, message in problems:
        if wrong:
            raise UserError(message)


def _conflicts_of_samples(args, mode):
    several = args.num_samples > 1
    yield (
        several and not draws(args),
        (
            f"--num-samples {args.num_samples}: greedy gives the same text each time; add --temperature,"
            " --top-k or --top-p"
        ),
    )
    yield (
        several and mode not in (None, "--check"),
        f"--num-samples {args.num_samples}: {mode} takes one; leave it out",
    )
    yield (
        several and args.references is not None,
        f"--num-samples {args.num_samples}: one text a prompt is scored; leave it out",
    )


def _conflicts_of_samplers(args, mode):
    yield (
        bool(args.lookup) and draws(args),
        f"--lookup {args.lookup}: it is for greedy; leave --temperature, --top-k and the like out",
    )
    yield (
        bool(args.lookup) and mode in ("--explain", "--compare"),
        f"--lookup {args.lookup}: it has no part in {mode}; leave it out",
    )
    yield (
        args.sampler == "fast" and mode == "--check" and draws(args),
        (
            "--check: the fast sampler draws random numbers of its own, generate draws others; "
            "use --sampler exact"
        ),
    )


def _conflicts_of_processes(args, mode):
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    yield several and mode is not None, f"{mode}: it runs in one process; start it without torchrun"
    yield (
        several and bool(args.stream),
        "--stream: the texts of several processes can't grow on one screen; leave it out",
    )
    for flag, name in (("--prompts-file", args.prompts_file), ("--references", args.references)):
        yield (
            several and name == "-",
            (
                f"{flag} -: only one of torchrun's processes could read standard input; save it as a file and"
                " name that"
            ),
        )


def check_encoding(text: str, place: str):
    """Raise UserError, naming the place, for a text of the command line or a terminal with a byte
    that is not UTF-8: Python hides it in a surrogate.
    """
    broken = next((char for char in text if "\udc80" <= char <= "\udcff"), None)
    if broken:
        raise UserError(
            f"{place}: not UTF-8 (byte {ord(broken) - 0xDC00:#04x}); set the terminal to UTF-8, or write the"
            " text into a file"
        )


def check_count(args, count: int):
    """Raise UserError for several prompts where a mode shows one."""
    if count > 1 and (args.explain or args.compare):
        raise UserError(
            f"{'--explain' if args.explain else '--compare'}: it shows one prompt, not {count}; give one"
            " --prompt"
        )


def options(args, language_model: LanguageModel) -> Options:
    """Return what the flags ask for.

    Raises UserError for an end token that the model does not have, a stop string with a special
    token in it, and a sampler that the device can't run.
    """
    if args.sampler == "fast" and language_model.device.type == "mps":
        raise UserError(
            "--sampler fast: it draws in fp64, which Apple's GPUs don't have; use --sampler exact or"
            " --device cpu"
        )
    models.check_stops(args.stop or [], language_model)
    given = (
        {name: getattr(args, name) for name in DRAWING if getattr(args, name) is not None}
        if draws(args)
        else {}
    )
    ends = language_model.end_ids + models.end_token_ids(args.end_token or [], language_model)
    settings = Settings(
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        sample=draws(args),
        repetition_penalty=args.repetition_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        end_ids=tuple(dict.fromkeys(ends)),
        **given,
    )
    return Options(
        settings,
        seed=args.seed,
        fast=args.sampler == "fast",
        num_samples=args.num_samples,
        stops=tuple(args.stop or ()),
        num_logprobs=args.logprobs,
        lookup=args.lookup or 0,
    )


def encode(args, text: str, number: int, language_model: LanguageModel) -> Prompt:
    """Return a prompt with its tokens. Raises UserError when it does not fit into the model."""
    place = f"prompt {number + 1}"
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        ids = models.encode_chat([*system, {"role": "user", "content": text}], language_model)
    else:
        ids = models.encode_prompt(text, language_model, place=place)
    models.check_length(ids, args.max_new_tokens, language_model, place=place)
    return Prompt(number, text, ids)


def record(args, generator: Generator) -> dict:
    """Return the settings that a text depends on, as they are written beside it."""
    found = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    return {
        "model": reading.full_name(args.model),
        **found,
        "device": generator.language_model.device.type,
        "precision": str(generator.language_model.model.dtype).removeprefix("torch."),
        "end_ids": list(generator.options.settings.end_ids),
    }


def window(args, language_model: LanguageModel) -> tuple[int, int]:
    """Return tokens a window and from one window to the next. Raises UserError when they don't fit
    the model or each other.
    """
    context = language_model.context or perplexity.DEFAULT_WINDOW
    size = args.window or min(perplexity.DEFAULT_WINDOW, context)
    if size > context and language_model.context is not None:
        raise UserError(f"--window {size}: {language_model.name} holds {context:,} tokens; use at most that")
    if size < 2:
        raise UserError(f"--window {size}: a token is predicted from one before it; use at least 2")
    stride = args.stride or max(1, size // 2)
    if stride >= size:
        raise UserError(
            f"--stride {stride}: windows of {size} tokens must overlap, for the first token of each is not"
            f" predicted; use at most {size - 1}"
        )
    return size, stride
