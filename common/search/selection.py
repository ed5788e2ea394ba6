"""The rows of an index that a command looks at: those where a condition holds.

A condition is one SQL expression, which DuckDB evaluates over the rows in a child process without
access to anything else. PyTorch, which takes seconds to import, is imported by the functions that
need it: a condition does not.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.cli import limit_memory
from common.columns import unused_name
from common.errors import UserError, one_line
from common.search.index import Snapshot
from common.search.manifest import DEFAULT_LIMITS, Limits
from common.search.segments import CHUNK, HASH, ID, RESERVED_COLUMNS, TEXT, number_array

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import torch

    from common.runtime import Runtime

# DuckDB gets no access to files, network or extensions
SAFE_SETTINGS: dict[str, bool | float | int | list[str] | str] = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "temp_directory": "",  # nor does it write what does not fit into memory
}
# kinds of answers of the process that evaluates a condition; with them come, except for the last, the mask,
# the library's message, that of a damaged file, a traceback
MASK, NO_CONDITION, DAMAGE = b"mask", b"no condition", b"damage"
BUG, NO_MEMORY = b"bug", b"no memory"
ADDRESSES_OF_THREAD = 128 << 20  # bytes of glibc's arena and of the stack


# The rows -----------------------------------------------------------------------------------------


@functools.cache
def one_process() -> Runtime:
    """Return the runtime of a command that one process runs on a CPU."""
    import torch

    from common.runtime import Runtime

    return Runtime(torch.device("cpu"), "fp32")


@dataclass(frozen=True)
class Selection:
    """The rows of an index that a command looks at, by their position from 0: `rows` (n) are their
    numbers in the index, ascending. The processes of `runtime` look at them together.
    """

    snapshot: Snapshot
    rows: np.ndarray
    runtime: Runtime = dataclasses.field(default_factory=one_process)

    @functools.cached_property
    def documents(self) -> np.ndarray | None:
        """The first row (n) of the document that each row is a chunk of, ascending; None in an
        index of whole texts.
        """
        if self.snapshot.settings["chunk_overlap"] is None:
            return None
        numbers = [segment.rows([CHUNK])[CHUNK].to_numpy() for segment in self.snapshot.segments]
        return self.rows - np.concatenate(numbers)[self.rows]

    @property
    def mask(self) -> np.ndarray:
        """A mask over all rows of the index: True for these."""
        mask = np.zeros(self.snapshot.num_rows, bool)
        mask[self.rows] = True
        return mask

    @property
    def unit(self) -> str:
        """What a row is, for a person."""
        return "texts" if self.documents is None else "chunks"

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self) -> list[str]:
        """Return the id of each row, for texts without an index its number from 1."""
        return [row[ID] for row in self.snapshot.take(self.rows, [ID])]

    def vectors(self, positions: np.ndarray | slice) -> np.ndarray:
        """Return the vectors (positions, width) of some of the rows."""
        return self.snapshot.vectors_of(self.rows[positions])

    def blocks(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first position, vectors (at most `size`, width))."""
        import torch

        for start in range(0, len(self), size):
            yield start, torch.from_numpy(self.vectors(slice(start, start + size)))

    def block(self, start: int, size: int) -> torch.Tensor:
        """Return at most `size` vectors (n, width) from a position on, on a GPU if there is one."""
        import torch

        vectors = torch.from_numpy(self.vectors(slice(start, start + size)))
        return vectors.to(self.runtime.device) if self.runtime.device.type == "cuda" else vectors

    @property
    def margin(self) -> float:
        """The largest error of an fp32 score."""
        from common.search.kernel import rounding_error

        return rounding_error(self.snapshot.width)


def shared(selection: Selection, runtime: Runtime) -> Selection:
    """Return rows that all processes share; raise UserError unless they have the same."""
    state = f"{selection.snapshot.sha256} {hashlib.sha256(selection.rows.tobytes()).hexdigest()}"
    cause = "another program has written to the index meanwhile, or --where is true by chance"
    problem = f"sees other rows than process 0: {cause}"
    runtime.require_same(state, f"{problem}; run the same command again")
    return dataclasses.replace(selection, runtime=runtime)


def select(
    snapshot: Snapshot,
    where: str | None,
    *,
    limits: Limits = DEFAULT_LIMITS,
    least: int = 1,
    name: str | None = None,
) -> Selection:
    """Return the live rows where a condition holds. Raises UserError when these are too few."""
    rows = np.flatnonzero(matching(snapshot, where, limits))
    if len(rows) < least:
        advice = "widen --where" if where else "add more texts"
        problem = f"{len(rows)} texts, at least {least} needed"
        raise UserError(f"{name or snapshot.folder}: {problem}; {advice}")
    return Selection(snapshot, rows)


# Conditions ---------------------------------------------------------------------------------------


def matching(snapshot: Snapshot, condition: str | None, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Return a mask (rows) of the live rows for which an SQL condition such as "label = 'tech' AND
    year > 2004" holds; None: of all live rows.

    DuckDB parses the condition as one expression over the columns of the rows, so that it can read
    but change nothing. It does so in a child process, because nothing else ends
    "length(repeat('a', 4000000000)) > 1". Raises UserError when it is not a condition over the
    columns of the index, and when it takes more than the limits.
    """
    is_live = snapshot.is_live()
    if condition is None:
        return is_live
    columns = [ID, TEXT, *snapshot.manifest["columns"]]
    lowered = [name.lower() for name in columns]
    ambiguous = [name for name in columns if lowered.count(name.lower()) > 1]
    used = ", ".join(name for name in ambiguous if name.lower() in condition.lower())
    if used:
        advice = "rename one and index the texts again, or write a condition without them"
        problem = f"columns {used} differ only in case, which SQL ignores"
        raise UserError(f"--where {condition!r}: {problem}; {advice}")
    kind, answer = _ask_child(snapshot, condition, limits)
    if kind == DAMAGE:
        raise UserError(answer.decode())
    if kind == BUG:
        raise RuntimeError(answer.decode())
    if kind == NO_MEMORY:
        problem = f"it needs more than {limits.megabytes:,} MB"
        raise UserError(f"--where {condition!r}: {problem}; simplify it, or raise --where-megabytes")
    if kind == NO_CONDITION:
        advice = f"write a condition over {', '.join(columns)}, with texts in single quotes"
        if b"VARCHAR" in answer or b"DOUBLE" in answer:
            advice += _advice_on_numbers(snapshot, condition)
        raise UserError(f"--where {condition!r}: {answer.decode('utf-8')}; {advice}")
    return is_live & np.unpackbits(np.frombuffer(answer, np.uint8), count=len(is_live)).astype(bool)


def _advice_on_numbers(snapshot: Snapshot, condition: str) -> str:
    """Return how the first column of texts that a condition names is read as numbers."""
    columns = snapshot.manifest["columns"]
    used = (name for name in columns if name.lower() in condition.lower() and "string" in columns[name])
    name = next(used, None)
    if name is None:
        return ""
    quoted = name if name.isidentifier() else f'"{name}"'
    number = f"CAST(replace({quoted}, ',', '.') AS DOUBLE) > 3"
    again = "index them with --decimal , into a new --index"
    return f"; {quoted} holds texts: if these are numbers, {again}, or write {number}"


def _ask_child(snapshot: Snapshot, condition: str, limits: Limits) -> tuple[bytes, bytes]:
    """Return what a child process answers about a condition: the kind of the answer, and its
    content. Raises UserError when it takes too long.
    """
    import multiprocessing

    # the child has it then: importing is not safe in the child of a process with threads (of serve), and
    # without the package it would end as if it lacked memory
    import duckdb  # noqa: F401

    # forked, the child has the rows already
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_answer, args=(snapshot, condition, limits, sender), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(limits.seconds):
            problem = f"not done after {limits.seconds:g} seconds"
            raise UserError(f"--where {condition!r}: {problem}; simplify it, or raise --where-seconds")
        return receiver.recv_bytes(), receiver.recv_bytes()
    except EOFError:  # it has ended without an answer
        return NO_MEMORY, b""
    finally:
        child.kill()
        child.join()
        receiver.close()


def _answer(snapshot: Snapshot, condition: str, limits: Limits, sender: Connection) -> None:
    """Be the child process that evaluates a condition, and send what comes of it."""
    import duckdb

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets the signal too, and ends this process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C++ prints a message of its own where memory is lacking
    # each thread reserves addresses that it does not use
    limit_memory(limits.megabytes * 10**6 + (os.cpu_count() or 1) * ADDRESSES_OF_THREAD)
    try:
        kind, answer = MASK, np.packbits(_holds(snapshot, condition, limits)).tobytes()
    except (duckdb.OutOfMemoryException, MemoryError):
        kind, answer = NO_MEMORY, b""
    except UserError as error:
        kind, answer = DAMAGE, str(error).encode("utf-8", "replace")
    except duckdb.Error as error:
        kind, answer = NO_CONDITION, one_line(error).encode("utf-8", "replace")
    except Exception:
        kind, answer = BUG, traceback.format_exc().encode("utf-8", "replace")
    sender.send_bytes(kind)
    sender.send_bytes(answer)


def _holds(snapshot: Snapshot, condition: str, limits: Limits) -> np.ndarray:
    """Return a mask (rows) of all rows for which a condition holds, deleted ones included."""
    import duckdb

    columns = [ID, TEXT, *snapshot.manifest["columns"]]
    number = unused_name("_row", [*columns, *RESERVED_COLUMNS])
    mask = np.zeros(snapshot.num_rows, bool)
    settings = {**SAFE_SETTINGS, "memory_limit": f"{limits.megabytes}MB"}
    with duckdb.connect(config=settings) as connection:
        connection.execute("SET lock_configuration = true")
        for start, segment in zip(snapshot.starts, snapshot.segments):
            table = segment.rows().drop_columns([HASH])
            table = table.append_column(number, number_array(np.arange(len(segment))))
            matches = connection.from_arrow(table).filter(condition).project(number)
            mask[start + np.asarray(matches.fetchnumpy()[number], np.int64)] = True
    return mask
