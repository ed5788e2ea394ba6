"""One data file -> one Arrow table: CSV and its relatives, JSON, Parquet, and lines that begin with
their label.

The readers get a file that `common/reading.py` has made plain: decompressed, and text in UTF-8.
They yield blocks of rows; `gather` makes one table of these. A reader that meets something that it
can't read raises UserError with the file, the line and what helps. Nothing is kept from one run to
the next, so that a file that has changed is never taken for what it was.

Tables with a delimiter have two readers. `read_rows` is the plain one: Python's csv module, strict,
with the number of each line. `read_fast` is Arrow's: ten times as fast, but it forgives what the
plain one refuses. `is_well_formed` tells where both give the same rows.
"""

import codecs
import contextlib
import csv
import errno
import io
import itertools
import json
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from common.errors import Fault, UserError, first_repeated, note, one_line, shorten
from common.reading import ROW, decode_utf8, temporary_file
from common.sources import DATA_SUFFIXES, EVERY_COLUMN, FASTTEXT_LABEL, JSON_SUFFIXES, FileOptions, suffix

BLOCK_ROWS = 10_000
MOST_RESTARTS = 20  # after quotation marks that are never closed
BLOCK_OBJECTS = 2_000  # few, because Python's garbage collector goes through them again and again
BLOCK_BYTES = 4 << 20  # of a file that Arrow reads at once
IN_MEMORY = 64 << 20  # bytes of a table that stay in memory; a larger one lies in a temporary file
SAMPLE = 256 << 10  # bytes at the beginning of a file from which its delimiter is found out
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars", " ": "spaces"}
MANY_LINES = 20  # in one cell: more often a quotation mark that was never closed than a text
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
# A column of a table with a delimiter holds numbers if all of its cells are written in one of these
# ways: 007 is a name. More digits than these would be lost.
WHOLE, DECIMAL = r"^-?(0|[1-9]\d{0,17})$", r"^-?(0|[1-9]\d{0,14})(\.\d+)?([eE][+-]?\d{1,3})?$"
BOOLEAN = "^(true|false|True|False|TRUE|FALSE)$"

# Arrow's types for which many of its functions, or DuckDB's, are not written
UNUSUAL = {
    pa.string_view(): pa.large_string(),
    pa.binary_view(): pa.large_binary(),
    pa.float16(): pa.float32(),
}

T = TypeVar("T")

csv.field_size_limit(sys.maxsize)


@dataclass(frozen=True)
class DataFile:
    """A file that is to be read as a table, made plain, and what is known about it."""

    file: BinaryIO  # text is UTF-8
    name: str
    options: FileOptions
    as_text: tuple[str, ...]  # columns whose cells stay as they are written
    folder: str | None  # of temporary files
    # where rows that can't be read are noted; the others get the column ROW. None: the first ends
    # the reading
    faults: list[Fault] | None = None

    def note(self, row: int, problem: str, content: str) -> None:
        """Note a row that can't be read."""
        assert self.faults is not None
        readable = content.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        self.faults.append(Fault(self.name, row, problem, readable))


@dataclass(frozen=True)
class Dialect:
    """How a table with a delimiter is written."""

    delimiter: str
    quoted: bool  # whether a cell may stand in quotation marks
    names: list[str]  # of the columns
    has_header: bool


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


def read(data: DataFile) -> pa.Table:
    """Return the table of a data file: read as its ending says, and without one as its options say
    or its content shows.
    """
    ending, options = suffix(data.name), data.options
    if ending == ".parquet":
        return read_parquet(data)
    if ending in JSON_SUFFIXES:
        return read_json(data)
    separators = options.delimiter or ""
    if separators == " " or len(separators) > 1:
        if options.columns is None:
            advice = "name the columns of a line with --columns"
            raise UserError(f"--delimiter {separators!r}: {advice}")
        return read_split_lines(data, options.columns, separators)
    if ending in DATA_SUFFIXES or options.is_table:
        return read_delimited(data)
    if _head(data.file).startswith(FASTTEXT_LABEL):
        return read_fasttext(data)
    return read_json(data)


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
        content = pa.py_buffer(_mapped(file))
    return [pa.ipc.open_stream(content.slice(start)).read_all() for start in starts]


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
    try:
        return pa.concat_tables(parts, promote_options="permissive")[name]
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        values = [_as_text(part[name].to_pylist()) for part in parts]
        return pa.chunked_array(values, pa.string())


def _as_text(values: list) -> pa.Array:
    """Return values of several types as strings: what is none already, as JSON writes it."""
    texts = [
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for value in values
    ]
    return pa.array(texts, pa.string())


# Tables with a delimiter --------------------------------------------------------------------------


def read_delimited(data: DataFile) -> pa.Table:
    """Return a table whose cells are separated by a character.

    The columns `as_text` stay as they are written; others become numbers where all of their cells
    are numbers. Raises UserError, naming the line, for a row with more or fewer cells than there
    are columns, and for a quotation mark that is not closed.
    """
    dialect = find_dialect(data)
    content = np.frombuffer(_mapped(data.file), np.uint8)
    quotes = _positions(content, b'"') if dialect.quoted else np.empty(0, np.int64)
    table = None
    if data.faults is not None:
        rows = _blocks_of_rows(read_sound_rows(data, dialect), [*dialect.names, ROW])
        table = gather(rows, data.folder)
    elif dialect.delimiter.isascii() and is_well_formed(content, quotes, dialect.delimiter):
        _warn_of_long_cells(content, quotes, data.name, dialect)
        # what it can't read, the plain reader reads, or says on which line the fault is
        with contextlib.suppress(pa.ArrowInvalid):
            table = gather(read_fast(content, dialect), data.folder)
    if table is None:
        table = gather(_blocks_of_rows(read_rows(data, dialect), dialect.names), data.folder)
    return _with_numbers(table, data.as_text)


def find_dialect(data: DataFile) -> Dialect:
    """Return how a table is written: as the flags say, else as its beginning shows."""
    options, head = data.options, _head(data.file)
    default = "\t" if suffix(data.name) == ".tsv" else ","
    delimiter = options.delimiter
    if delimiter is None:
        delimiter = find_delimiter(head, default, columns=options.columns, as_text=data.as_text)
        if delimiter != default and suffix(data.name):
            cells = f"its cells are separated by {DELIMITERS[delimiter]}"
            note(f"{data.name}: {cells} (--delimiter says otherwise)")
    quoted = options.quoting == "csv"
    if options.quoting == "auto":
        quoted = delimiter != "\t" or is_quoted(data.file)
    if options.columns is not None:
        return Dialect(delimiter, quoted, list(options.columns), has_header=False)
    names = _column_names(data.name, _first_row(head, delimiter, quoted=quoted))
    return Dialect(delimiter, quoted, names, has_header=True)


def find_delimiter(head: str, default: str, *, columns: Sequence[str] | None, as_text: Sequence[str]) -> str:
    """Return the delimiter of a table from its beginning: the `default`, unless only another one
    gives the columns that are wanted, or more than one.
    """
    candidates = [default, *(other for other in ",\t;|" if other != default)]
    rows = {one: _first_row(head, one, quoted=one != "\t") for one in candidates}
    if columns is not None:
        return next((one for one in candidates if len(rows[one]) == len(columns)), default)
    # the first of those with most of the wanted columns, then of those with more than one column
    return max(candidates, key=lambda one: (len({*as_text} & {*rows[one]}), len(rows[one]) > 1))


def is_quoted(file: BinaryIO) -> bool:
    """Return whether quotation marks around the cells of a table with tabs are no part of them.

    Such a file may be written either way. They are part of the text if every line has the same
    number of tabs, and some cell begins with a mark that is not closed at the cell's end.
    """
    content = np.frombuffer(_mapped(file), np.uint8)
    quotes = _positions(content, b'"')
    if is_well_formed(content, quotes, "\t") and not _line_spans(content, quotes)[1].any():
        return True  # as the lines say, too, but in a tenth of the time
    unclosed = re.compile(r'(?:^|\t)"(?!(?:[^"\t]|"")*"(?:\t|$))')
    widths, is_plain = set(), False
    for line in _text(file, errors="replace"):  # what is not UTF-8 is said when it is read
        line = line.rstrip("\r\n")
        if line:
            widths.add(line.count("\t"))
            is_plain = is_plain or ('"' in line and unclosed.search(line) is not None)
    return len(widths) > 1 or not is_plain


def _first_row(head: str, delimiter: str, *, quoted: bool) -> list[str]:
    """Return the cells of the first line that is not blank, as far as they can be read."""
    rows = _cells(io.StringIO(head, newline=""), delimiter, quoted=quoted, strict=False)
    return next((row for row in rows if row), [])


def read_rows(data: DataFile, dialect: Dialect) -> Iterator[list[str]]:
    """Yield the cells of each row, without the header and without blank lines: the plain reader.

    Raises UserError for a row that does not have as many cells as there are columns.
    """
    width, longest = len(dialect.names), (0, 0)  # lines of the longest row, and where it begins
    rows = _cells(_text(data.file), dialect.delimiter, quoted=dialect.quoted)
    is_header = dialect.has_header
    while True:
        first_line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            what = "a quotation mark is opened and never closed"
            if "end of data" not in str(error):
                what = f"not readable as csv: {one_line(error)}"
            help = "correct the row, or read quotation marks as text with --quoting none"
            raise UserError(f"{data.name}, line {first_line}: {what}; {help}") from error
        except UnicodeDecodeError as error:
            raise _not_utf8(data) from error
        if not row:
            continue
        if is_header:
            is_header = False
            continue
        if len(row) != width:
            raise _ragged(data.name, first_line, row, dialect)
        longest = max(longest, (rows.line_num - first_line, first_line))
        yield row
    if longest[0] >= MANY_LINES:
        _warn_of_long_cell(data.name, longest[1], longest[0] + 1)


def read_sound_rows(data: DataFile, dialect: Dialect) -> Iterator[list[str]]:
    """Yield the rows of `read_rows`, and behind the cells of each its number; note
    those that it would refuse as faults.

    A quotation mark that is never closed costs its own line only.
    """
    width, number, skipped, is_header = len(dialect.names), 0, 0, dialect.has_header
    for _ in range(MOST_RESTARTS):
        lines = itertools.islice(_text(data.file, errors="surrogateescape"), skipped, None)
        rows = _cells(lines, dialect.delimiter, quoted=dialect.quoted)
        while True:
            first_line = rows.line_num
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                number += 1
                if "end of data" in str(error):
                    data.note(number, "a quotation mark is opened and never closed", "")
                    skipped += first_line + 1
                    break
                data.note(number, f"not readable as csv: {one_line(error)}", "")
                continue
            number += 1
            if is_header or not row:
                is_header = is_header and not row
                continue
            content = dialect.delimiter.join(row)
            if len(row) != width:
                data.note(number, f"not as many cells as columns ({len(row)} for {width})", content)
            elif not _is_utf8(content):
                data.note(number, "not UTF-8", content)
            else:
                yield [*row, str(number)]


def _ragged(name: str, line: int, row: list[str], dialect: Dialect) -> UserError:
    names = ", ".join(dialect.names[:10]) + (", ..." if len(dialect.names) > 10 else "")
    source = "header" if dialect.has_header else "--columns"
    cells = "1 cell" if len(row) == 1 else f"{len(row)} cells"
    help = "correct the row"
    if dialect.quoted and len(row) > len(dialect.names):
        help = f"put a cell that holds {dialect.delimiter!r} into quotation marks"
    problem = f"{cells}, but {len(dialect.names)} columns in the {source} ({names})"
    return UserError(f"{name}, line {line}: {problem}; {help}")


def is_well_formed(content: np.ndarray, quotes: np.ndarray, delimiter: str) -> bool:
    """Return whether the quotation marks at the positions `quotes` of a file's bytes are where they
    belong: the first of each two at the beginning of a cell, the second at its end, and doubled in
    between.
    """
    if len(quotes) % 2:
        return False
    opening, closing = quotes[::2], quotes[1::2]
    is_end = np.zeros(256, bool)
    is_end[np.frombuffer(f"{delimiter}\r\n".encode(), np.uint8)] = True
    # a doubled mark closes and opens again
    is_doubled = closing[:-1] + 1 == opening[1:]
    starts = opening == (3 if content[:3].tobytes() == codecs.BOM_UTF8 else 0)
    starts |= is_end[content[np.maximum(opening - 1, 0)]]
    starts[1:] |= is_doubled
    ends = closing == len(content) - 1
    ends |= is_end[content[np.minimum(closing + 1, len(content) - 1)]]
    ends[:-1] |= is_doubled
    return bool(starts.all() and ends.all())


def read_fast(content: np.ndarray, dialect: Dialect) -> Iterator[pa.Table]:
    """Yield the rows of `read_rows` in blocks, for a file that is well formed: the fast version."""
    keys = [str(number) for number in range(len(dialect.names))]
    types = dict.fromkeys(keys, pa.string())
    reader = pyarrow.csv.open_csv(
        pa.BufferReader(pa.py_buffer(content)),
        pyarrow.csv.ReadOptions(column_names=keys, block_size=BLOCK_BYTES, use_threads=False),
        pyarrow.csv.ParseOptions(
            delimiter=dialect.delimiter,
            quote_char='"' if dialect.quoted else False,
            newlines_in_values=dialect.quoted,
        ),
        pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False),
    )
    is_header = dialect.has_header
    for batch in reader:
        table = pa.Table.from_batches([batch]).rename_columns(dialect.names)
        yield table.slice(1) if is_header else table
        is_header = False


def _blocks_of_rows(rows: Iterator[list[str]], names: list[str]) -> Iterator[pa.Table]:
    while block := list(itertools.islice(rows, BLOCK_ROWS)):
        yield pa.table([pa.array(cells, pa.string()) for cells in zip(*block)], names=names)


def _with_numbers(table: pa.Table, as_text: Sequence[str]) -> pa.Table:
    """Return a table of strings with numbers and booleans where a column holds nothing else. A cell
    with nothing in it is missing.
    """
    columns = [
        column if name in as_text or EVERY_COLUMN in as_text else _as_numbers(column)
        for name, column in zip(table.column_names, table.columns)
    ]
    return pa.table(columns, names=table.column_names)


def _as_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    cells = pc.if_else(pc.equal(column, ""), None, column)
    if cells.null_count == len(cells):
        return pa.chunked_array([pa.nulls(len(cells))])
    head = cells.slice(0, 100)
    for pattern, kind in ((WHOLE, pa.int64()), (DECIMAL, pa.float64()), (BOOLEAN, pa.bool_())):
        # most columns of texts are none of these in their first rows already
        if _all_match(head, pattern) and _all_match(cells, pattern):
            numbers = cells.cast(kind)
            is_finite = kind != pa.float64() or pc.all(pc.is_finite(numbers)).as_py()
            return numbers if is_finite else cells  # 1e400 would be infinite
    return cells


def _all_match(cells: pa.ChunkedArray, pattern: str) -> bool:
    """Return whether every cell that is not missing matches, and one is there."""
    return cells.null_count < len(cells) and pc.all(pc.match_substring_regex(cells, pattern)).as_py()


def _column_names(name: str, header: list[str]) -> list[str]:
    # an empty name is that of the index which pandas writes beside a table
    names = [column or f"Unnamed: {number}" for number, column in enumerate(header)]
    twice = first_repeated(names)
    if twice is not None:
        raise UserError(f"{name}: two columns have the name {twice!r}; rename one of them")
    return names


def _line_spans(content: np.ndarray, quotes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each pair of quotation marks the number of lines before it, and of the line ends
    between the two.
    """
    newlines = _positions(content, b"\n")
    first = np.searchsorted(newlines, quotes[::2])
    return first, np.searchsorted(newlines, quotes[1::2]) - first


def _warn_of_long_cells(content: np.ndarray, quotes: np.ndarray, name: str, dialect: Dialect) -> None:
    """Warn of the longest cell that spans lines, if it may be rows that a mark has swallowed."""
    if not len(quotes):
        return
    lines, spans = _line_spans(content, quotes)
    longest = int(spans.argmax())
    inner = content[quotes[2 * longest] : quotes[2 * longest + 1]].tobytes().split(b"\n")[1:-1]
    delimiter, separators = dialect.delimiter.encode(), len(dialect.names) - 1
    like_rows = separators > 0 and len(inner) > 0
    like_rows = like_rows and all(line.count(delimiter) == separators for line in inner)
    if spans[longest] >= MANY_LINES or like_rows:
        _warn_of_long_cell(name, int(lines[longest]) + 1, int(spans[longest]) + 1)


def _warn_of_long_cell(name: str, line: int, count: int) -> None:
    note(
        f"{name}, line {line}: a cell in quotation marks spans {count} lines; if its mark is one"
        " that was never closed, close it or use --quoting none"
    )


def _positions(content: np.ndarray, byte: bytes) -> np.ndarray:
    """Return where a byte occurs, found block by block, because a comparison takes as much memory
    as what is compared.
    """
    size = 16 << 20
    found = [
        start + np.flatnonzero(content[start : start + size] == byte[0])
        for start in range(0, len(content), size)
    ]
    return np.concatenate(found)


def _cells(lines: Iterable[str], delimiter: str, *, quoted: bool, strict: bool = True) -> Any:
    """Return Python's reader of rows; `strict`: it refuses what is not well formed."""
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=strict)


# Lines that begin with their label ----------------------------------------------------------------


def read_split_lines(data: DataFile, columns: Sequence[str], separators: str) -> pa.Table:
    """Return a table with the `columns` of each line, of which the last is the rest of the line.

    `separators`: the character between each two columns, or one for all. Raises UserError, naming
    the line, where one is missing.
    """
    between = separators if len(separators) > 1 else separators * (len(columns) - 1)
    if len(between) != len(columns) - 1:
        raise UserError(
            f"--delimiter {separators!r}: {len(separators)} separators between the {len(columns)}"
            f" columns {', '.join(columns)}; give one for all, or one between each two"
        )

    def parse(line: str) -> list[str]:
        cells, rest = [], line
        for separator in between:
            cell, found, rest = rest.partition(separator)
            if not found:
                raise UserError(f"no {separator!r} after {shorten(cell, 40)!r}; correct it")
            cells.append(cell)
        return [*cells, rest]

    return _parsed_lines(data, parse, list(columns))


def read_fasttext(data: DataFile) -> pa.Table:
    """Return a table of a file of fastText, whose lines are "__label__sports The match ...", with
    the columns `label` and `text`. If any line has several labels, each cell is a list of them.

    Raises UserError, naming the line, for a line that has no label.
    """

    def parse(line: str) -> list[str]:
        labels, text = [], line
        while text.startswith(FASTTEXT_LABEL):
            label, _, text = text.partition(" ")
            labels.append(label.removeprefix(FASTTEXT_LABEL))
        if not labels or "" in labels:
            raise UserError(f"it does not begin with {FASTTEXT_LABEL} and a label; correct it")
        return [" ".join(labels), text]

    table = _parsed_lines(data, parse, ["label", "text"])
    if pc.any(pc.match_substring(table["label"], " ")).as_py():
        lists = pc.split_pattern(table["label"], " ")
        table = table.set_column(table.column_names.index("label"), "label", lists)
    return table


def _parsed_lines(data: DataFile, parse: Callable[[str], list[str]], columns: list[str]) -> pa.Table:
    """Return the table of the cells that `parse` makes of each line."""
    lines = _parse_lines(data, parse)
    if data.faults is None:
        blocks = _blocks_of_rows((cells for _, cells in lines), columns)
    else:
        blocks = _blocks_of_rows(([*cells, str(number)] for number, cells in lines), [*columns, ROW])
    return gather(blocks, data.folder)


def _parse_lines(data: DataFile, parse: Callable[[str], T]) -> Iterator[tuple[int, T]]:
    """Yield the number of each line that is not blank, and what `parse` makes of it. What it raises
    names the line, or is noted.
    """
    errors = "strict" if data.faults is None else "surrogateescape"
    try:
        for number, line in enumerate(_text(data.file, errors=errors), start=1):
            line = line.rstrip("\r\n")
            if not line.strip():
                continue
            try:
                if not _is_utf8(line):
                    raise UserError("not UTF-8")
                yield number, parse(line)
            except UserError as error:
                if data.faults is None:
                    raise UserError(f"{data.name}, line {number}: {error}") from error
                data.note(number, str(error).partition(";")[0], line)
    except UnicodeDecodeError as error:
        raise _not_utf8(data) from error


# JSON and Parquet ---------------------------------------------------------------------------------


def read_json(data: DataFile) -> pa.Table:
    """Return the table of a list of objects, or of one object per line.

    A key that a row lacks is null there. A column whose values have several types becomes text, but
    a column `as_text` may mix only texts and whole numbers. Raises UserError, naming the line.
    """
    with explained(data.name, "json"):
        try:
            return gather(_blocks_of_objects(data), data.folder)
        except UnicodeDecodeError as error:
            raise _not_utf8(data) from error


Row = tuple[str, int, dict]  # where it is: "line" or "row", and its number


def _sound_objects(data: DataFile) -> Iterator[Row]:
    """Yield the objects of a file with one on each line, with their number in the column ROW, and
    note other lines as faults. A list of objects can be read only as a whole.
    """
    head = _head(data.file).lstrip()
    if head.startswith("[") or not head.split("\n", 1)[0].rstrip().endswith("}"):
        for unit, number, row in _objects(data):
            yield unit, number, {**row, ROW: number}
        return

    def parse(line: str) -> dict:
        try:
            row = json.loads(line, object_pairs_hook=_require_once(data, "the object"))
        except (ValueError, RecursionError) as error:
            raise UserError("not readable as json") from error
        if not isinstance(row, dict):
            raise UserError("not a JSON object")
        return row

    for number, row in _parse_lines(data, parse):
        yield "line", number, {**row, ROW: number}


def _objects(data: DataFile) -> Iterator[Row]:
    file, name = data.file, data.name
    keys = [f'"{column}"' for column in data.as_text]
    decoder, is_first = json.JSONDecoder(), True
    scan = decoder.scan_once  # pyrefly: ignore [missing-attribute]  (its types lack it)
    for number, line in enumerate(_text(file, newline=None), start=1):
        try:
            # decode() looks for white space around the value too, which takes as long again
            row, end = scan(line, 0)
            is_whole = end == len(line) - 1
        except (StopIteration, ValueError):
            row, is_whole = None, False
        if not is_whole:
            if not line.strip():
                continue
            if is_first and line.lstrip()[0] == "[":
                yield from _objects_in(_text(file, newline=None).read(), data)
                return
            try:
                row = decoder.decode(line)
            except ValueError as error:
                if is_first:  # objects may be spread over several lines
                    yield from _objects_in(_text(file, newline=None).read(), data)
                    return
                raise _not_json(name, number, error) from error
        if not isinstance(row, dict):
            raise UserError(f"{name}, line {number}: not a JSON object; write {{...}} on each line")
        # the decoder keeps the last value of a key; its words are counted, because a hook would
        # take as long as all the rest
        if any(line.count(key) > 1 for key in keys):
            json.loads(line, object_pairs_hook=_require_once(data, f"{name}, line {number}"))
        is_first = False
        yield "line", number, row


def _require_once(data: DataFile, location: str) -> Callable[[list[tuple[str, Any]]], dict]:
    """Return a hook of the JSON decoder that raises UserError, naming `location`, for an object
    with two values of a column `as_text`.
    """

    def to_row(pairs: list[tuple[str, Any]]) -> dict:
        row = dict(pairs)
        if len(row) != len(pairs):
            twice = first_repeated(key for key, _ in pairs if key in data.as_text)
            if twice is not None:
                values = [shorten(str(value), 40) for key, value in pairs if key == twice]
                first, second, *_ = values
                problem = f"{twice!r} has two values, {first!r} and {second!r}"
                raise UserError(f"{location}: {problem}; remove one of them")
        return row

    return to_row


def _objects_in(text: str, data: DataFile) -> Iterator[Row]:
    """Yield the objects of a list, or those that follow each other in a text."""
    hook, is_list = _require_once(data, data.name), text.lstrip().startswith("[")
    advice = "the list must hold objects only" if is_list else "write a list of objects"
    try:
        rows = json.loads(text, object_pairs_hook=hook) if is_list else _values_in(text, hook)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise UserError(f"{data.name}, row {number}: not a JSON object; {advice}")
            yield "row", number, row
    except json.JSONDecodeError as error:
        raise _not_json(data.name, error.lineno, error) from error


def _values_in(text: str, hook: Callable[[list[tuple[str, Any]]], dict]) -> Iterator[Any]:
    decoder, ink, position = json.JSONDecoder(object_pairs_hook=hook), re.compile(r"\S"), 0
    while start := ink.search(text, position):
        value, position = decoder.raw_decode(text, start.start())
        yield value


def _not_json(name: str, line: int, error: ValueError) -> UserError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
    return UserError(f"{name}, line {line}: not readable as json: {reason}; correct the line")


def _blocks_of_objects(data: DataFile) -> Iterator[pa.Table]:
    rows = _objects(data) if data.faults is None else _sound_objects(data)
    while block := list(itertools.islice(rows, BLOCK_OBJECTS)):
        yield _block_of_objects(block, data)


def _block_of_objects(block: list[Row], data: DataFile) -> pa.Table:
    """Return objects as a table. One with a value that its column can't hold is left out and noted,
    or refused.
    """
    while True:
        objects = [row for _, _, row in block]
        columns = dict.fromkeys(itertools.chain.from_iterable(objects))
        for column in columns:
            if not _is_utf8(column):
                unit, number, _ = next(row for row in block if column in row[2])
                problem = f"the key {column!r} has a lone surrogate, which is no character"
                raise UserError(f"{data.name}, {unit} {number}: {problem}; correct it")
        try:
            return pa.table(
                {name: _json_column([row.get(name) for row in objects], name, data) for name in columns}
            )
        except _BadValue as bad:
            unit, number, row = block.pop(bad.position)
            if data.faults is None:
                raise UserError(f"{data.name}, {unit} {number}: {bad}; correct it") from bad
            row.pop(ROW)
            data.note(number, str(bad), json.dumps(row))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _BadValue(Exception):
    """A value that its column can't hold, and its position in the block."""

    def __init__(self, position: int, problem: str) -> None:
        super().__init__(problem)
        self.position = position


def _json_column(values: list, column: str, data: DataFile) -> pa.Array:
    """Return one column of a block.

    Raises _BadValue for half of a character, and for a value of a column `as_text` that is neither
    text nor a whole number beside values that are.
    """
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        for position, value in enumerate(values):
            if not _is_utf8(json.dumps(value, ensure_ascii=False)):
                problem = "a lone surrogate (\\ud800 to \\udfff) is no character"
                raise _BadValue(position, problem) from None
        for position, value in enumerate(values if column in data.as_text else ()):
            if value is not None and type(value) not in (str, int):
                problem = f"{column!r} holds a {type(value).__name__}, in other rows texts"
                raise _BadValue(position, problem) from None
        return _as_text(values)


def read_parquet(data: DataFile) -> pa.Table:
    """Return the table of a Parquet file; what was stored as categories, as the values that they
    stand for, and what was stored in a way that few functions of Arrow know, in the usual one.
    """
    with explained(data.name, "parquet"):
        content = pa.BufferReader(pa.py_buffer(_mapped(data.file)))
        source = pq.ParquetFile(content, page_checksum_verification=True)
        blocks = (pa.Table.from_batches([batch]) for batch in source.iter_batches(BLOCK_ROWS))
        table = gather(blocks, data.folder)
        for position, field in enumerate(table.schema):
            usual = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            usual = UNUSUAL.get(usual, usual)
            if usual != field.type:
                values = table[field.name].cast(usual)
                table = table.set_column(position, field.with_type(usual), values)
        return table


# The file -----------------------------------------------------------------------------------------


def _mapped(file: BinaryIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _text(file: BinaryIO, newline: str | None = "", errors: str = "strict") -> io.TextIOWrapper:
    """Return a file as text from its beginning; line ends stay as they are unless `newline` is
    None.
    """
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    return open(file.fileno(), encoding="utf-8-sig", newline=newline, errors=errors, closefd=False)


def _head(file: BinaryIO) -> str:
    """Return the beginning of a file."""
    head = os.pread(file.fileno(), SAMPLE, 0)
    return head.decode("utf-8-sig", "replace")


def _not_utf8(data: DataFile) -> UserError:
    """Return what is wrong with a file that is no UTF-8, with the line."""
    os.lseek(data.file.fileno(), 0, os.SEEK_SET)
    with open(data.file.fileno(), "rb", closefd=False) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                decode_utf8(line, f"{data.name}, line {number}")
            except UserError as error:
                return error
    raise AssertionError("every line is UTF-8")
