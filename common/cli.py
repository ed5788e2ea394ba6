"""What the command lines share: flags that mean the same in every script, and how a script
ends.
"""

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import Interrupted, UserError

# what every process finds wrong is said once: when rank 0 has ended, torchrun ends the others,
# before they
# speak
SECONDS_FOR_RANK_0 = 5.0
# of gloo and NCCL
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL communicator was aborted",
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations, shows each default, and reports a mistake as
    a UserError.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring and adds the defaults that say something to
    the flags.
    """

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def positive_int(text: str) -> int:
    """Parse a whole number above 0."""
    return _number(text, int, lambda value: value >= 1, "a whole number above 0")


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def non_negative_float(text: str) -> float:
    """Parse a finite number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def non_negative_int(text: str) -> int:
    """Parse a whole number of at least 0 that a random seed can take."""
    return _number(text, int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")


def fraction(text: str) -> float:
    """Parse a number from 0 up to, not including, 1."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1")


def probability(text: str) -> float:
    """Parse a number above 0 up to 1."""
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def folder(text: str) -> str:
    """Take the path of a folder that is there or can be made."""
    there = next(path for path in (Path(text), *Path(text).absolute().parents) if path.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text}: no right to write in {there}; name another folder")
    return text


def _number(text: str, convert: Callable, accept: Callable, wanted: str):
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not accept(value):  # NaN fails every comparison, so it is refused here too
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def add_shared_flags(parser: argparse.ArgumentParser, *, model: str):
    """Add the flags that every script has; `model` is the script's default model."""
    group = parser.add_argument_group("model and machine")
    group.add_argument("--model", default=model, help="a bundled name, a local folder or a Hub id")
    group.add_argument(
        "--cache-dir",
        type=folder,
        help="where downloads and tokenised texts are kept (default: the Hugging Face cache)",
    )
    group.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="auto: cuda, else mps, else cpu",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto: bf16 where the processor has it, fp16 on older GPUs, else fp32",
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="for every random choice of the run")


def run(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None = None,
):
    """Parse `argv` (the process's own when None) and call `main`; a UserError ends in one line on
    stderr and exit code 2.
    """
    try:
        main(parser.parse_args(argv))
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SECONDS_FOR_RANK_0)
        _end(f"{parser.prog}: error: {' '.join(str(error).splitlines())}", 2)
    except Interrupted as interrupted:
        _end(f"{parser.prog}: {interrupted}" if os.environ.get("RANK", "0") == "0" else "", interrupted.code)
    except KeyboardInterrupt:
        _end(f"{parser.prog}: interrupted", 130)
    except BrokenPipeError:  # the reader of our stdout left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if "RANK" in os.environ and any(words in str(error) for words in LOST_PEER):
            _end(
                f"{parser.prog}: error: process {os.environ['RANK']} lost another process of the job, whose"
                " own message says why",
                1,
            )
        full = _full_disk(error)
        if full is None:
            raise
        _end(
            f"{parser.prog}: error: {full}; free some space, or name folders on another disk with"
            " --output-dir and --cache-dir",
            2,
        )


def _full_disk(error: BaseException | None) -> str | None:
    """Return the words of an exception for a full disk or quota if it came of one: libraries wrap
    it, Rust's and `datasets`' have no errno.
    """
    while error is not None:
        for words in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "Not enough disk space"):
            if words in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None


def _end(message: str, code: int):
    sys.stdout.flush()
    if message:
        print(message, file=sys.stderr, flush=True)
    # the others wait for this process's end, and Python takes seconds to take its modules apart
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)
