"""Messages to the user: the exceptions that end a script with one line, what the system lacked when
one was raised, notes on stderr, and how long texts are shortened to one line.
"""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
LONG_NAME = 60  # characters of a name in a list
LONG_MESSAGE = 300  # characters of what a library says
NOT_UTF8 = "not UTF-8"  # how the problem of a row begins that another encoding of its file may solve
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
# What ends a process without being its fault, and what helps. Rust's and Arrow's messages hold the
# number of the error: "(os error 28)", "[errno 28]".
OS_ERROR = re.compile(r"\((?:os )?error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
MORE_DISK = "free some space, or write to another disk (--output, --output-dir, --cache-dir)"
OTHER_PLACE = "change the permissions, or write elsewhere (--output, --output-dir, --cache-dir)"
SYSTEM_ADVICE = {
    errno.ENOSPC: MORE_DISK,
    errno.EDQUOT: MORE_DISK,
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EACCES: OTHER_PLACE,
    errno.EPERM: OTHER_PLACE,
    errno.EROFS: OTHER_PLACE,
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "free memory, or raise its limit (ulimit -v)",
    errno.EIO: "check the disk or the terminal",
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u)",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "name the file itself, not a link",
    errno.ENOTDIR: "name a folder",
    errno.EISDIR: "name a file",
}
# Words of libraries whose errors have no number, and the number that they mean
WORDS = {
    "Not enough disk space": errno.ENOSPC,
    "can't start new thread": errno.EAGAIN,
    "can't allocate memory": errno.ENOMEM,
    "not enough memory": errno.ENOMEM,
    **{os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)},
}
# all that is left of oneDNN's status where it has no memory for a kernel (seen with bf16)
ONEDNN_LACKS_MEMORY = "could not create a primitive"


class UserError(Exception):
    """A mistake that the user can correct; the message is one line with the value, its source and
    what to do.

    `common.cli.run` prints it without a traceback and exits with code 2. Any other exception is a
    bug.
    """


def outcome(call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T | UserError:
    """Return what a call returns, or the UserError that it raises: for a list of which one part may
    be wrong.
    """
    try:
        return call(*args, **named)
    except UserError as error:
        return error


def without_errors(outcomes: Iterable[T | UserError]) -> list[T]:
    """Return outcomes of which none is a UserError; raise the first one that is."""
    results = []
    for one in outcomes:
        if isinstance(one, UserError):
            raise one
        results.append(one)
    return results


@dataclass(frozen=True)
class Fault:
    """A row of a source that can't be used, where such rows are collected and not the end."""

    source: str  # the file, or the split of a data set
    row: int  # from 1, the header of a table not counted
    problem: str  # the same words for every row with this problem
    content: str  # what is in the row, or in the cell


def about_encoding(faults: Iterable[Fault]) -> str:
    """Return how many rows are not UTF-8, and the flag that may read them; "" where there are none."""
    count = sum(fault.problem.startswith(NOT_UTF8) for fault in faults)
    if count == 0:
        return ""
    are = f"{counted(count, 'row')} {'is' if count == 1 else 'are'} {NOT_UTF8}"
    return f"{are}: if the file has another encoding, name it, such as --encoding cp1252"


class Interrupted(Exception):
    """A run that a signal ended after its work was saved.

    `common.cli.run` prints the message and exits with `code`.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def printable(text: str) -> str:
    """Return a text with a replacement for each control character but the line feed: in a text or
    a name from elsewhere it could command the terminal.
    """
    return CONTROL.sub("\ufffd", text)


class NotSupported(Exception):
    """A model, or a use of it, that the code of this project does not cover; the message says why.

    The caller then uses the library, which covers it or says what is wrong.
    """


def shorten(text: str, width: int) -> str:
    """Return a text as one line of at most `width` characters; a shortened one ends with "..."."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 3] + "..."


def quoted(text: str, most: int = LONG_NAME) -> str:
    """Return a text of at most `most` characters, as it is, in quotation marks as Python writes it; a
    shortened one ends with "...".
    """
    return repr(text if len(text) <= most else text[: most - 3] + "...")


def listed(names: Iterable[str], most: int = 20) -> str:
    """Return names in one line, without the last ones of many; one that could be misread, such as
    one with spaces at its ends, is in quotation marks.
    """

    def shown(name: str) -> str:
        if len(name) > LONG_NAME:
            return shorten(name, LONG_NAME)
        return name if name.isprintable() and name == shorten(name, LONG_NAME) else repr(name)

    names = list(names)
    rest = f", ... ({len(names):,} in all)" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + rest


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return how many of something there are, such as "1 row" or "2,000 rows"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def first_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that occurs a second time, None if each occurs once."""
    seen: set[str] = set()
    # set.add returns None
    return next((name for name in names if name in seen or seen.add(name)), None)


def one_line(error: BaseException) -> str:
    """Return the message of a library's exception as one line, without the end of a long one."""
    return shorten(str(error), LONG_MESSAGE) or type(error).__name__


def note(message: str) -> None:
    """Say on stderr, once in a job of several processes, what was found out about a source.

    On stderr, because stdout may be another program's input.
    """
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def reading(what: str, advice: str) -> Iterator[None]:
    """Turn whatever a library raises within the block into a UserError: what was read, the
    library's own reason, and what to do.

    For blocks in which a library reads a foreign file and nothing else happens: a bug of ours in
    it would look like a mistake of the user. `--debug` shows the traceback of each.
    """
    try:
        yield
    except (UserError, Interrupted, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raise UserError(f"{what}: {one_line(error)}; {advice}") from error


def lacks_memory(error: BaseException) -> bool:
    """Return whether an exception stands for a lack of memory."""
    fault = fault_of_system(error)
    return fault is not None and fault.endswith(SYSTEM_ADVICE[errno.ENOMEM])


def missing_package(error: BaseException | None) -> str | None:
    """Return the message that a package is not installed, and what helps, if that caused an exception, else
    None.
    """
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    package = (name or "").partition(".")[0]
    if not package or package in (*sys.stdlib_module_names, "common") or find_spec(package) is not None:
        return None
    return f"the package {package} is not installed; pip install -r requirements.txt installs all"


def fault_of_system(error: BaseException | None) -> str | None:
    """Return what the system lacks, and what helps, if that caused an exception, else None: a full
    disk, a missing permission, a limit, no memory, a package.

    Libraries wrap such errors, and those of Rust, Arrow and `datasets` have no errno: their words
    are compared too.
    """
    if missing := missing_package(error):
        return missing
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        number = error.errno if isinstance(error, OSError) else None
        if number not in SYSTEM_ADVICE and (match := OS_ERROR.search(str(error))):
            number = int(match[1] or match[2])
        if number not in SYSTEM_ADVICE:
            number = next((number for words, number in WORDS.items() if words in str(error)), None)
        if isinstance(error, MemoryError) or str(error) == ONEDNN_LACKS_MEMORY:
            number = errno.ENOMEM
        if number in SYSTEM_ADVICE:
            named = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            return f"{named}{os.strerror(number)}; {SYSTEM_ADVICE[number]}"
        error = error.__cause__ or error.__context__
    return None
