"""What every kind of data file becomes: blocks of rows, and of these one Arrow table.

`common/delimited.py` and `common/json_rows.py` read the rows; Parquet files hold tables already. They
get a file that `common/plain_files.py` has made plain: decompressed, and text in UTF-8. A reader that meets
something that it can't read raises UserError with the file, the line and what helps. Nothing is kept
from one run to the next, so that a file that has changed is never taken for what it was.
"""

import contextlib
import errno
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import NOT_UTF8, UserError, one_line
from common.plain_files import DataFile, temporary_file

BLOCK_ROWS = 10_000
IN_MEMORY = 64 << 20  # bytes of a table that stay in memory; a larger one lies in a temporary file
# What libraries raise about a file that they can't read; other exceptions are bugs.
FAULTS = (
    pa.ArrowException,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    UnicodeDecodeError,
)
# Arrow's types for which many of its functions, or DuckDB's, are not written
UNUSUAL = {
    pa.string_view(): pa.large_string(),
    pa.binary_view(): pa.large_binary(),
    pa.float16(): pa.float32(),
}

T = TypeVar("T")


@contextlib.contextmanager
def explained(name: str, kind: str) -> Iterator[None]:
    """Turn what a library raises about a file within the block into one line that names the file,
    what it was read as, and the library's reason.
    """
    try:
        yield
    except FAULTS as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the disk's fault
        reason = one_line(error).rstrip(".")
        if isinstance(error, RecursionError):
            reason = "it is nested too deep"
        raise UserError(f"{name}: not readable as {kind}: {reason}; correct the file") from error


# Blocks of rows -> a table ------------------------------------------------------------------------


def gather(blocks: Iterable[pa.Table], folder: str | None) -> pa.Table:
    """Return blocks of rows as one table with the columns of all of them.

    A large table lies in a temporary file in `folder` (None: the system's), which has no name and
    is gone with the process.
    """
    tables, size, rest = [], 0, iter(blocks)
    for table in rest:
        tables.append(table)
        size += table.nbytes
        if size > IN_MEMORY:
            tables = _on_disk(itertools.chain(tables, rest), folder)
            break
    return joined(tables)


def _on_disk(tables: Iterable[pa.Table], folder: str | None) -> list[pa.Table]:
    """Write tables to a temporary file as they come, and return them as they are mapped from it."""
    starts = []
    with temporary_file(folder) as file:
        for table in tables:
            starts.append(file.tell())
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        file.flush()
        content = arrow_map(file).read_buffer()
    return [pa.ipc.open_stream(content.slice(start)).read_all() for start in starts]


def arrow_map(file: BinaryIO) -> pa.MemoryMappedFile:
    """Return the content of an open file for Arrow, which maps it itself.

    A mapping of Python's could only be given back with Python's lock. A thread of Arrow that is the
    last to hold it, and waits for the lock when the process ends, aborts it.
    """
    return pa.memory_map(f"/dev/fd/{file.fileno()}")


def joined(tables: list[pa.Table]) -> pa.Table:
    """Return tables below each other; a column that one of them lacks is null there."""
    if not tables:
        return pa.table({})
    if all(table.schema.equals(tables[0].schema) for table in tables):
        return pa.concat_tables(tables)
    names = dict.fromkeys(name for table in tables for name in table.column_names)
    return pa.table({name: _joined_column(tables, name) for name in names})


def _joined_column(tables: list[pa.Table], name: str) -> pa.ChunkedArray:
    """Return one column of all tables: of the type that holds the values of all, or as text."""
    parts = []
    for table in tables:
        has_it = name in table.column_names
        parts.append(table.select([name]) if has_it else pa.table({name: pa.nulls(len(table))}))
    kinds = [part.schema.field(name).type for part in parts]
    has_texts = any(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds)
    has_bytes = any(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) for kind in kinds)
    if not (has_texts and has_bytes):  # Arrow would make bytes of the texts
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowTypeError):
            return pa.concat_tables(parts, promote_options="permissive")[name]
    values = [as_strings(part[name].to_pylist(), name) for part in parts]
    return pa.chunked_array(values, pa.string())


def as_strings(values: list, name: str) -> pa.Array:
    """Return values of several types in a column as strings: what is none already, as JSON writes it;
    what JSON has no form for, such as a date, as Python writes it. Raises UserError, naming the
    column, for bytes that are no text in UTF-8.
    """

    def other(value: Any) -> str:
        if not isinstance(value, bytes):
            return str(value)
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            problem = "holds bytes that are no text in UTF-8, and in another file or row texts"
            raise UserError(f"column {name!r} {problem}; convert it, or leave it out") from error

    def string(value: Any) -> str | None:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, bool | int | float | list | dict):
            return json.dumps(value, ensure_ascii=False, default=other)
        return other(value)

    return pa.array([string(value) for value in values], pa.string())


# Lines --------------------------------------------------------------------------------------------


def parse_lines(data: DataFile, parse: Callable[[str], T]) -> Iterator[tuple[int, T]]:
    """Yield for each line that is not blank what `parse` makes of it, and before that its number among
    these lines. What it raises names the line of the file, or is noted as a row.
    """
    errors = "strict" if data.faults is None else "surrogateescape"
    row = 0
    try:
        for number, line in enumerate(data.text(errors=errors), start=1):
            line = line.rstrip("\r\n")
            if not line.strip():
                continue
            row += 1
            try:
                if not is_utf8(line):
                    raise UserError(NOT_UTF8)
                yield row, parse(line)
            except UserError as error:
                if data.faults is None:
                    raise UserError(f"{data.name}, line {number}: {error}") from error
                data.note(row, str(error).partition(";")[0], line)
    except UnicodeDecodeError as error:
        raise data.not_utf8() from error


def is_utf8(text: str) -> bool:
    """Return whether a text has no surrogates, which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Parquet ------------------------------------------------------------------------------------------


def read_parquet(data: DataFile) -> pa.Table:
    """Return the table of a Parquet file; what was stored as categories, as the values that they
    stand for, and what was stored in a way that few functions of Arrow know, in the usual one.
    """
    with explained(data.name, "parquet"):
        source = pq.ParquetFile(arrow_map(data.file), page_checksum_verification=True)
        blocks = (pa.Table.from_batches([batch]) for batch in source.iter_batches(BLOCK_ROWS))
        table = gather(blocks, data.folder)
        for position, field in enumerate(table.schema):
            usual = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            usual = UNUSUAL.get(usual, usual)
            if usual != field.type:
                values = table[field.name].cast(usual)
                table = table.set_column(position, field.with_type(usual), values)
        return table
