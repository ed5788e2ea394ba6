"""The command line: flags that all scripts share, number types, and how a script begins and ends.

A script reads its flags before it imports PyTorch and the other libraries, which takes seconds:
--help and a mistake that the flags and the file system show are answered at once.
"""

import argparse
import contextlib
import errno
import functools
import gc
import io
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from common import terminal
from common.errors import (
    SYSTEM_ADVICE,
    Interrupted,
    UserError,
    fault_of_system,
    first_repeated,
    printable,
    shorten,
)
from common.sources import FileOptions

# All processes of a job find the same mistake. Rank 0 reports it at once; when it has ended,
# torchrun ends the others before they report it too.
SECONDS_FOR_RANK_0 = 5.0
# After each of PyTorch's loops its threads (GNU OpenMP's) wait for the next one without giving up
# their cores, by default for milliseconds. The threads of the decoding step in C and of an exact search
# need these cores: so they wait for some 100 microseconds (docs/benchmarks.md).
GOMP_SPINS = "10000"
LOADING, ERASE_LINE = "loading PyTorch", "\r\x1b[K"
LOST_PEER = (  # what gloo and NCCL say when another process has ended
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL communicator was aborted",
)
LONGEST_WAIT = 1e6  # seconds: poll() counts milliseconds in 32 bits
FEW_PROCESSES = 4096  # a limit of processes below this is tried out before the libraries are loaded
NEEDED_ADDRESSES = 3 << 30  # bytes that loading the libraries reserves, most of them never used
TORCHRUN = "TORCHELASTIC_RUN_ID"  # set in every process that torchrun starts

DELIMITERS = {"comma": ",", "tab": "\t", "\\t": "\t", "semicolon": ";", "pipe": "|", "space": " "}

Check = Callable[[argparse.Namespace], None]
Complete = Callable[["Parser", Sequence[str]], list[str]]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviated flags, which reports mistakes as UserError.

    `check` looks at all flags together, and at the files that they name; it raises UserError. `complete`
    returns flags that hold where those that are given say nothing else. `example` is a flag with its value,
    for users who write a value alone.
    """

    def __init__(
        self,
        *,
        check: Check | None = None,
        complete: Complete | None = None,
        example: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.check, self.complete, self.example = check, complete, example
        # absent unless given: it is no setting of a run
        traces = "show where in the code a mistake was found"
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=traces)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the flags, checked."""
        given = sys.argv[1:] if args is None else args
        # argparse would drop the "--" of --model=-- and give an empty list in its place
        lost = next((text for text in given if re.fullmatch("--[a-z-]+=--", text)), None)
        if lost is not None:
            self.error(f"argument {lost.removesuffix('=--')}: '--' is no value; name something")
        if self.complete is not None:
            given = [*self.complete(self, given), *given]
        flags = self._parse(given, namespace)
        if self.check is not None:
            self.check(flags)
        return flags

    def _parse(self, given: Sequence[str], namespace: Any) -> argparse.Namespace:
        flags, unknown = self.parse_known_args(given, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._advice(unknown[0], flags)}")
        return flags

    def _advice(self, unknown: str, flags: argparse.Namespace) -> str:
        """Return what may have been meant by an argument that is not known, "" if nothing is near."""
        if not unknown.startswith("-"):
            return f"; a value follows its flag: {self.example}" if self.example else ""
        known = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                known |= set(action.choices[flags.command]._option_string_actions)
        import difflib  # for a mistake alone: each library costs some milliseconds of every start

        near = difflib.get_close_matches(unknown.partition("=")[0], sorted(known), n=1, cutoff=0.75)
        return f"; did you mean {near[0]}?" if near else ""

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the values of the flags in `argv`, without those that have only a default."""
        absent = object()
        # a flag that may be repeated adds to a list
        once = [action for action in self._actions if not isinstance(action, argparse._AppendAction)]
        values = argparse.Namespace(**{action.dest: absent for action in once})
        found = self._parse(argv, values)
        return {name: value for name, value in vars(found).items() if value not in (absent, None)}

    def as_flags(self, values: Mapping[str, Any]) -> list[str]:
        """Return values, by their names after parsing, as they are written on a command line."""
        flags, left = [], dict(values)
        for action in self._actions:
            value = left.pop(action.dest, None)  # of two flags with one name the first is written
            name = next(iter(action.option_strings), "")
            if value is None or value is False:
                continue
            if action.nargs == 0:
                flags.append(name)
            elif isinstance(action, argparse._AppendAction):
                flags += [f"{name}={one}" for one in value]
            elif action.nargs is None or not isinstance(value, list | tuple):
                joined = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
                flags.append(f"{name}={joined}")
            else:
                flags += [name, *map(str, value)]
        return flags

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring, and shows defaults but for None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        """Show what must be given alone: all other flags are listed below, each with its help."""
        others = argparse.Action([], "flags", metavar="[flags]")
        needed = [action for action in actions if action.required or not action.option_strings]
        super().add_usage(usage, [others, *needed], (), prefix)


def _number_type(
    convert: Callable[[str], Any], accept: Callable[[Any], bool], wanted: str
) -> Callable[[str], Any]:
    """Return a type of flags that takes the numbers that are accepted; `wanted` says which."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not accept(value):  # NaN fails every comparison, so it is refused here too
            raise argparse.ArgumentTypeError(f"{shorten(text, 60)!r} is not {wanted}")
        return value

    return parse


# 32 bits hold the first, as libraries want it; the second ends with the largest seed of NumPy
positive_int = _number_type(int, lambda n: 1 <= n < 2**31, "a whole number above 0 and below 2**31")
non_negative_int = _number_type(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")
finite_float = _number_type(float, lambda x: abs(x) < float("inf"), "a number")
positive_float = _number_type(float, lambda x: 0 < x < float("inf"), "a number above 0")
non_negative_float = _number_type(float, lambda x: 0 <= x < float("inf"), "a number of at least 0")
fraction = _number_type(float, lambda x: 0 <= x < 1, "a number from 0 up to, not including, 1")
probability = _number_type(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
penalty = _number_type(float, lambda x: -2 <= x <= 2, "a number from -2 to 2")  # as in OpenAI's API
# seconds or minutes to wait, which no clock of the system overflows
duration = _number_type(float, lambda x: 0 <= x <= LONGEST_WAIT, "a number from 0 to 1e6")
positive_duration = _number_type(float, lambda x: 0 < x <= LONGEST_WAIT, "a number above 0 and at most 1e6")


def port(text: str) -> int:
    """Parse the number of a port."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{shorten(text, 60)!r} is not a number from 0 to 65535")
    return int(text)


def name(text: str) -> str:
    """Parse a name that is not empty, as that of an unset variable of the shell is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; leave the flag out, or name something")
    return text


def path(text: str) -> str:
    """Parse a path, or a name that may be one. A "~" at its beginning is the home folder: a shell
    leaves it as it is in --flag=~/file.
    """
    return os.path.expanduser(name(text))


def folder(text: str) -> str:
    """Parse the path of a folder that exists or can be made."""
    text = path(text)
    nearest = next(path for path in (Path(text), *Path(text).absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        problem = f"no permission to write in {nearest}"
        raise argparse.ArgumentTypeError(f"{text}: {problem}; name another folder")
    return text


def file(text: str) -> str:
    """Parse the path of a file, or of a pipe, as the shell's <(command) makes one."""
    text = os.path.expanduser(text)
    if os.path.isdir(text) or not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text or 'the empty name'}: no such file; check the path")
    return text


def columns(text: str) -> tuple[str, ...]:
    """Parse the names of columns, separated by commas."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; write label,title,text")
    twice = first_repeated(names)
    if twice is not None:
        raise argparse.ArgumentTypeError(f"{text!r} has {twice!r} twice; give each column its own name")
    return names


def delimiter(text: str) -> str:
    """Parse a delimiter: a character or its name, or several characters for lines of parts."""
    text = DELIMITERS.get(text, text)
    if not text or any(character in '\r\n"' or ord(character) > 0xFFFF for character in text):
        advice = f"give a character, or one of {', '.join(DELIMITERS)}"
        raise argparse.ArgumentTypeError(f"{text!r} is no delimiter; {advice}")
    return text


def encoding(text: str) -> str:
    """Parse the name of an encoding of text that Python knows."""
    try:
        if "é".encode().decode(text, "replace"):
            return text
    except (LookupError, UnicodeError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no encoding; try utf-16, latin-1 or cp1252")


def check_encoding(text: str, name: str) -> None:
    """Raise UserError for a text from the command line or a terminal with a byte that is not UTF-8,
    which Python hides in a surrogate.
    """
    hidden = next((char for char in text if "\udc80" <= char <= "\udcff"), None)
    if hidden:
        raise UserError(
            f"{name}: not UTF-8 (byte {ord(hidden) - 0xDC00:#04x}); set the terminal to UTF-8, or "
            "write the text into a file"
        )


def add_file_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flags that say how data files are written, the fields of `sources.FileOptions`."""
    flag = parser.add_argument
    names = "the columns of a file without a header, such as label,title,text"
    flag("--columns", type=columns, metavar="NAMES", help=names)
    between = (
        "what separates the cells of a data file: a character or tab, comma, semicolon, pipe, space"
        " (default: found out); after spaces or several characters the last column takes the rest"
    )
    flag("--delimiter", type=delimiter, metavar="CHARACTER", help=between)
    marks = "csv: cells may have quotation marks; none: these are text; auto: csv, with tabs found out"
    flag("--quoting", choices=["auto", "csv", "none"], default="auto", help=marks)
    written = "of text and data files, such as latin-1 (default: UTF-8)"
    flag("--encoding", type=encoding, help=written)


def file_options(args: argparse.Namespace) -> FileOptions:
    """Return how the flags say that data files are written."""
    return FileOptions(args.columns, args.delimiter, args.quoting, args.encoding)


def refuse_unused(
    args: argparse.Namespace, names: Iterable[str], default_of: Callable[[str], Any], reason: str
) -> None:
    """Raise UserError for the first of some flags that is given, if the command has it: it would do
    nothing, for a `reason`. `names` and `default_of` are of the values after parsing.
    """
    for name in names:
        value = getattr(args, name, None)
        if hasattr(args, name) and value != default_of(name):
            between = "," if isinstance(value, tuple) else " "
            shown = between.join(map(str, value)) if isinstance(value, list | tuple) else value
            flag = f"--{name.replace('_', '-')}{'' if value is True else f' {shown}'}"
            raise UserError(f"{flag}: {reason}; leave it out")


def add_shared_flags(parser: argparse.ArgumentParser, *, model: str | None) -> None:
    """Add the flags that every script has; `model` is the script's default model."""
    group = parser.add_argument_group("model and machine")
    group.add_argument("--model", type=path, default=model, help="a bundled name, a local folder or a Hub id")
    help_text = "folder for downloads and tokenised texts (default: the Hugging Face cache)"
    group.add_argument("--cache-dir", type=folder, help=help_text)
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


def parse(
    parser: Parser,
    argv: Sequence[str] | None = None,
    *,
    then: Callable[[argparse.Namespace], str | None] | None = None,
) -> argparse.Namespace:
    """Return the flags in `argv` (the process's own when None), for a script that imports its
    libraries next; `then` tells what it will read after them, None if it needs no libraries.

    Help and mistakes end the process here, as does a limit of the system that the libraries exceed.
    """
    _open_streams()
    debug = "--debug" in (sys.argv if argv is None else argv)
    with _endings(parser.prog, debug=debug):
        check_job()
        args = parser.parse_args(argv)
        _check_limits()
    # that of a notebook may need packages that a script has no use for
    os.environ["MPLBACKEND"] = "Agg"
    os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINS)
    if not debug:
        sys.excepthook = functools.partial(_explain_import, parser.prog)
    read = "" if then is None else then(args)
    if read is not None:
        loading(f"{LOADING}, then {read}" if read else LOADING)
    return args


def loading(line: str = LOADING) -> None:
    """Begin to wait for libraries: until `loaded`, Ctrl-C ends the process without a word, and a
    terminal shows what it waits for.
    """
    if "torch" not in sys.modules:
        gc.disable()  # searching for garbage where there is none took a sixth of the start
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    if sys.stderr.isatty() and is_rank_0():
        room = (terminal.width(sys.stderr) or 80) - len(" ...") - 1  # in one line, to be erased
        print(shorten(line, room) + " ...", end="", file=sys.stderr, flush=True)


def loaded() -> None:
    """End what `loading` began; the line that it showed is erased."""
    if not gc.isenabled():
        gc.freeze()  # what was loaded stays, and need not be searched later either, nor at the end
        gc.enable()
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stderr.isatty() and is_rank_0():
        print(ERASE_LINE, end="", file=sys.stderr, flush=True)


def run_main(main: Callable[[argparse.Namespace], None], args: argparse.Namespace, *, prog: str) -> None:
    """Call `main` with the flags that `parse` has returned.

    A UserError ends the process with one line on stderr and exit code 2, as do a full disk, a
    missing permission and other faults of the system; a signal ends it with 128 and its number. A
    bug shows its traceback.
    """
    sys.excepthook = sys.__excepthook__
    loaded()
    threading.excepthook = _explain_thread
    with _endings(prog, debug=getattr(args, "debug", False)):
        main(args)
        sys.stdout.flush()


def run(
    parser: Parser, main: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None
) -> None:
    """Parse `argv` (None: the process's own) and call `main`, which imports its libraries itself, with
    the endings of `run_main`.
    """
    run_main(main, parse(parser, argv, then=lambda _: None), prog=parser.prog)


# What surrounds a process -------------------------------------------------------------------------


def is_rank_0() -> bool:
    """Tell whether this is the process of a job that prints and writes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def check_job() -> None:
    """Raise UserError for variables of torchrun that are broken, or left over from a job."""
    numbers = {}
    for variable, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        text = os.environ.get(variable, default)
        if not re.fullmatch("[0-9]{1,9}", text):
            advice = "unset it (torchrun sets its own)"
            raise UserError(f"{variable}={text}: not a whole number; {advice}")
        numbers[variable] = int(text)
    rank, world_size = numbers["RANK"], numbers["WORLD_SIZE"]
    job = f"RANK={rank} WORLD_SIZE={world_size}"
    if rank >= world_size:
        raise UserError(f"{job}: there is no such process; unset both (torchrun sets its own)")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and (TORCHRUN not in os.environ or missing):
        raise UserError(
            f"{job}: left over from a job, because torchrun did not start this process; unset both,"
            " or start all processes with torchrun"
        )


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask a process to save its work and stop.

    A closed terminal sends SIGHUP; nohup has it ignored, and it stays so.
    """
    hang_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hang_up]


def warn_of_stop(line: str = "") -> None:
    """Write a line to stderr within the handler of a signal, where print may not be called.

    After SIGHUP the terminal is gone, and each write to it would be an error: from then on what is
    written goes nowhere, so that the work can still be saved.
    """
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    with contextlib.suppress(OSError):
        os.write(2, line.encode())


def limit_memory(more: int) -> None:
    """Limit this process to `more` bytes beyond what it has now; only Linux tells how much that is."""
    if sys.platform != "linux":
        return
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = size + more if hard == resource.RLIM_INFINITY else min(size + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def exit_at_signals() -> None:
    """Let a signal that asks to stop end the process from now on, with SystemExit of 128 and its
    number; what is committed stays. Later signals are ignored: torchrun sends two.
    """
    for number in stop_signals():
        signal.signal(number, _exit_at_signal)


def _exit_at_signal(number: int, _: FrameType | None) -> NoReturn:
    for other in stop_signals():
        signal.signal(other, signal.SIG_IGN)
    warn_of_stop()
    sys.exit(128 + number)


def json_text(value: object) -> str:
    """Return a value's JSON on one line; NaN and infinity, which JSON lacks, are null."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        value = json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)
        return json.dumps(value, ensure_ascii=False)


def json_line(value: object) -> str:
    """Return what `json_text` returns; what stdout's encoding does not have is escaped."""
    text = json_text(value)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:
        text = json.dumps(json.loads(text))
    return text


def _open_streams() -> None:
    """Let all three standard streams be open, and stdout print any character.

    A closed one becomes the null device: else the next file that is opened would take its number,
    and what a library prints would go into that file.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # an ASCII terminal shows ? for an accent
        sys.stdout.reconfigure(errors="replace")


def _check_limits() -> None:
    """Raise UserError when a limit of the system is too low to load the libraries.

    Beyond it they end the process with lines of their own, or without any.
    """
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY and addresses < NEEDED_ADDRESSES:
        have, need = addresses >> 20, NEEDED_ADDRESSES >> 20
        problem = f"{have:,} MiB of addresses, the libraries need {need:,}"
        raise UserError(f"ulimit -v: {problem}; raise it")
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if processes != resource.RLIM_INFINITY and processes < FEW_PROCESSES:
        _try_threads(4 * (os.cpu_count() or 1) + 8)


def _try_threads(count: int) -> None:
    """Raise UserError unless this process can have `count` threads at a time."""
    done, threads = threading.Event(), []
    try:
        for _ in range(count):
            threads.append(threading.Thread(target=done.wait, daemon=True))
            threads[-1].start()
    except RuntimeError as error:
        problem = f"thread {len(threads)} of {count} can't be started"
        raise UserError(f"{problem}; {SYSTEM_ADVICE[errno.EAGAIN]}") from error
    finally:
        done.set()


# How a process ends -------------------------------------------------------------------------------


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)


def _explain_import(
    prog: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Stand for sys.excepthook while the libraries are imported."""
    reason = fault_of_system(error)
    if reason is None:
        sys.__excepthook__(kind, error, trace)
        return
    _report(f"\n{prog}: error: {reason}" if sys.stderr.isatty() else f"{prog}: error: {reason}")
    os._exit(2)


def _explain_thread(arguments: threading.ExceptHookArgs) -> None:
    """Stand for threading.excepthook: a fault of the system is reported by the main thread, which meets it
    too, such as the full disk of TensorBoard's writer.
    """
    if fault_of_system(arguments.exc_value) is None:
        threading.__excepthook__(arguments)


@contextlib.contextmanager
def _endings(prog: str, *, debug: bool) -> Iterator[None]:
    """Turn an exception within the block into the end of the process that it stands for."""
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()  # here, where a reader that has left is known
            raise
    except UserError as error:
        if debug:
            import traceback

            traceback.print_exc()
        if not is_rank_0() and TORCHRUN in os.environ:
            time.sleep(SECONDS_FOR_RANK_0)
        _exit(f"{prog}: error: {' '.join(str(error).splitlines())}", 2)
    except Interrupted as interrupted:
        _exit(f"{prog}: {interrupted}" if is_rank_0() else "", interrupted.code)
    except KeyboardInterrupt:
        _exit(f"{prog}: interrupted" if is_rank_0() else "", 130)
    except BrokenPipeError:  # the reader of stdout has left, as in `... | head`
        _drop(1)
        _exit("", 141)
    except Exception as error:
        if "RANK" in os.environ and any(words in str(error) for words in LOST_PEER):
            rank = os.environ["RANK"]
            lost = f"process {rank} lost another process of the job; see its message"
            _exit(f"{prog}: error: {lost}", 1)
        reason = fault_of_system(error)
        if reason is None or debug:
            import traceback

            _tell_torchrun(traceback.format_exc())
            raise
        _exit(f"{prog}: error: {reason}", 2)


def _drop(descriptor: int) -> None:
    """Discard what is still printed there, also while Python itself ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _report(message: str) -> None:
    """Print a line on stderr, which may be closed or full."""
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _drop(2)  # else Python fails to write it again at its end, and ends with code 120


def _tell_torchrun(message: str) -> None:
    """Write the file from which torchrun repeats a process's last words at the end of its own.

    The format is that of torch.distributed.elastic.multiprocessing.errors.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and message:
        more = {"py_callstack": message, "timestamp": str(int(time.time()))}
        content = {"message": {"message": message, "extraInfo": more}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)


def _exit(message: str, code: int) -> NoReturn:
    loaded()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _drop(1)
    if message:
        _report(message)
    _tell_torchrun(message)
    # the other processes wait for this one, and Python's own exit takes seconds
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)
