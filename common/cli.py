"""The command line: flags that all scripts share, number types, and how a script begins and ends.

A script reads its flags before it imports PyTorch and the other libraries, which takes seconds:
--help and a mistake that the flags and the file system show are answered at once.
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from common.errors import Interrupted, UserError

# All processes of a job find the same mistake. Rank 0 reports it at once; when it has ended,
# torchrun ends the others before they report it too.
SECONDS_FOR_RANK_0 = 5.0
LOADING, ERASE_LINE = "loading PyTorch ...", "\r\x1b[K"
LOST_PEER = (  # what gloo and NCCL say when another process has ended
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL communicator was aborted",
)


Check = Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviated flags, which reports mistakes as UserError.

    `check` looks at all flags together, and at the files that they name; it raises UserError.
    """

    def __init__(self, *, check: Check | None = None, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.check = check

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the flags, checked."""
        flags = super().parse_args(args, namespace)
        if self.check is not None:
            self.check(flags)
        return flags

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring, and shows defaults but for None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def positive_int(text: str) -> int:
    """Parse a whole number above 0."""
    return _number(text, int, lambda value: value >= 1, "a whole number above 0")


def non_negative_int(text: str) -> int:
    """Parse a whole number from 0 to 2**32 - 1, the largest seed of NumPy."""
    return _number(text, int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def non_negative_float(text: str) -> float:
    """Parse a finite number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def fraction(text: str) -> float:
    """Parse a number from 0 up to, not including, 1."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1")


def probability(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def _number(text: str, convert: Callable[[str], Any], accept: Callable[[Any], bool], wanted: str) -> Any:
    """Return the converted text if it is accepted, else report that it is not what is `wanted`."""
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not accept(value):  # NaN fails every comparison, so it is refused here too
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def folder(text: str) -> str:
    """Parse the path of a folder that exists or can be made."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; name a folder")
    nearest = next(path for path in (Path(text), *Path(text).absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text}: no permission to write in {nearest}; name another folder")
    return text


def add_shared_flags(parser: argparse.ArgumentParser, *, model: str | None) -> None:
    """Add the flags that every script has; `model` is the script's default model."""
    group = parser.add_argument_group("model and machine")
    group.add_argument("--model", default=model, help="a bundled name, a local folder or a Hub id")
    group.add_argument(
        "--cache-dir",
        type=folder,
        help="folder for downloads and tokenised texts (default: the Hugging Face cache)",
    )
    group.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="auto: cuda if available, else mps, else cpu",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto: bf16 where the processor has it, fp16 on older GPUs, else fp32",
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="seed of every random choice")


def parse(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags in `argv` (the process's own when None), for a script that imports its
    libraries next. Help and mistakes end the process here.
    """
    with _endings(parser.prog):
        args = parser.parse_args(argv)
    loading()
    return args


def loading() -> None:
    """Begin to wait for libraries: until `loaded`, Ctrl-C ends the process without a word, and a
    terminal shows what it waits for.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    if sys.stderr.isatty() and _is_rank_0():
        print(LOADING, end="", file=sys.stderr, flush=True)


def loaded() -> None:
    """End what `loading` began; the line that it showed is erased."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stderr.isatty() and _is_rank_0():
        print(ERASE_LINE, end="", file=sys.stderr, flush=True)


def run_main(main: Callable[[argparse.Namespace], None], args: argparse.Namespace, *, prog: str) -> None:
    """Call `main` with the flags that `parse` has returned.

    A UserError ends the process with one line on stderr and exit code 2, a signal with 130 or 143;
    a bug shows its traceback.
    """
    loaded()
    with _endings(prog):
        main(args)
        sys.stdout.flush()


def run(
    parser: Parser, main: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None
) -> None:
    """Parse `argv` (the process's own when None) and call `main`, with the endings of `run_main`."""
    run_main(main, parse(parser, argv), prog=parser.prog)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)


@contextlib.contextmanager
def _endings(prog: str) -> Iterator[None]:
    """Turn an exception within the block into the end of the process that it stands for."""
    try:
        yield
    except UserError as error:
        if not _is_rank_0():
            time.sleep(SECONDS_FOR_RANK_0)
        _exit(f"{prog}: error: {' '.join(str(error).splitlines())}", 2)
    except Interrupted as interrupted:
        _exit(f"{prog}: {interrupted}" if _is_rank_0() else "", interrupted.code)
    except KeyboardInterrupt:
        _exit(f"{prog}: interrupted", 130)
    except BrokenPipeError:  # the reader of stdout has left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if "RANK" in os.environ and any(words in str(error) for words in LOST_PEER):
            rank = os.environ["RANK"]
            _exit(f"{prog}: error: process {rank} lost another process of the job; see its message", 1)
        reason = _full_disk(error)
        if reason is None:
            raise
        hint = "free some space, or name folders on another disk with --output-dir and --cache-dir"
        _exit(f"{prog}: error: {reason}; {hint}", 2)


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _full_disk(error: BaseException | None) -> str | None:
    """Return the operating system's words for a full disk or quota if that caused an exception,
    else None.

    Compared by words because libraries wrap the error, and those of Rust and `datasets` have no
    errno.
    """
    while error is not None:
        for words in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "Not enough disk space"):
            if words in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None


def _exit(message: str, code: int) -> NoReturn:
    loaded()
    sys.stdout.flush()
    if message:
        print(message, file=sys.stderr, flush=True)
    # the other processes wait for this one, and Python's own exit takes seconds
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)
