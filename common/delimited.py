"""Tables with a delimiter, such as CSV, and lines that begin with their label -> an Arrow table.

Tables have two readers. `read_rows` is the plain one: Python's csv module, strict, with the number of
each line. `read_fast` is Arrow's: ten times as fast, but it forgives what the plain one refuses.
`is_well_formed` tells where both give the same rows.
"""

import codecs
import contextlib
import csv
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from common import dialects
from common.columns import ROW
from common.dialects import Dialect, read_cells
from common.errors import NOT_UTF8, UserError, counted, note, one_line, shorten
from common.plain_files import DataFile
from common.sources import EVERY_COLUMN, FASTTEXT_LABEL, suffix
from common.tables import BLOCK_ROWS, arrow_map, gather, is_utf8, parse_lines

MOST_RESTARTS = 20  # after quotation marks that are never closed
BLOCK_BYTES = 4 << 20  # of a file that Arrow reads at once
MANY_LINES = 20  # in one cell: more often a quotation mark that was never closed than a text
# A column of a table with a delimiter holds numbers if all of its cells are written in one of these
# ways: 007 is a name. More digits than these would be lost.
WHOLE, DECIMAL = r"^-?(0|[1-9]\d{0,17})$", r"^-?(0|[1-9]\d{0,14})(\.\d+)?([eE][+-]?\d{1,3})?$"
BOOLEAN = "^(true|false|True|False|TRUE|FALSE)$"


def read(data: DataFile) -> pa.Table:
    """Return a table whose cells are separated by a character.

    The columns `as_text` stay as they are written; others become numbers where all of their cells
    are numbers. Raises UserError, naming the line, for a row with more or fewer cells than there
    are columns, and for a quotation mark that is not closed.
    """
    dialect = find_dialect(data)
    content = np.frombuffer(data.mapped(), np.uint8)
    quotes = _positions(content, b'"') if dialect.quoted else np.empty(0, np.int64)
    table = None
    if data.faults is not None:
        rows = _blocks_of_rows(read_sound_rows(data, dialect), [*dialect.names, ROW])
        table = gather(rows, data.folder)
    elif dialect.delimiter.isascii() and is_well_formed(content, quotes, dialect.delimiter):
        _warn_of_long_cells(content, quotes, data.name, dialect)
        # what it can't read, the plain reader reads, or says on which line the fault is
        with contextlib.suppress(pa.ArrowInvalid):
            table = gather(read_fast(arrow_map(data.file), dialect), data.folder)
    if table is None:
        table = gather(_blocks_of_rows(read_rows(data, dialect), dialect.names), data.folder)
    return _with_numbers(table, data.as_text, data.options.decimal)


def find_dialect(data: DataFile) -> Dialect:
    """Return how a table is written: as the flags say, else as its beginning shows."""
    options, delimiter = data.options, dialects.choose_delimiter(data)
    if options.delimiter is None and suffix(data.name) and delimiter != dialects.default_delimiter(data):
        cells = f"its cells are separated by {dialects.DELIMITERS[delimiter]}"
        note(f"{data.name}: {cells} (--delimiter says otherwise)")
    quoted = options.quoting == "csv"
    if options.quoting == "auto":
        quoted = delimiter != "\t" or is_quoted(data)
    names = dialects.find_names(data, delimiter, quoted=quoted)
    return Dialect(delimiter, quoted, names, has_header=options.columns is None)


def is_quoted(data: DataFile) -> bool:
    """Return whether quotation marks around the cells of a table with tabs are no part of them.

    Such a file may be written either way. They are part of the text if every line has the same
    number of tabs, and some cell begins with a mark that is not closed at the cell's end.
    """
    content = np.frombuffer(data.mapped(), np.uint8)
    quotes = _positions(content, b'"')
    if is_well_formed(content, quotes, "\t") and not _line_spans(content, quotes)[1].any():
        return True  # as the lines say, too, but in a tenth of the time
    unclosed = re.compile(r'(?:^|\t)"(?!(?:[^"\t]|"")*"(?:\t|$))')
    widths, is_plain = set(), False
    for line in data.text(errors="replace"):  # what is not UTF-8 is reported when it is read
        line = line.rstrip("\r\n")
        if line:
            widths.add(line.count("\t"))
            is_plain = is_plain or ('"' in line and unclosed.search(line) is not None)
    return len(widths) > 1 or not is_plain


def read_rows(data: DataFile, dialect: Dialect) -> Iterator[list[str]]:
    """Yield the cells of each row, without the header and without blank lines: the plain reader.

    Raises UserError for a row that does not have as many cells as there are columns.
    """
    width, longest = len(dialect.names), (0, 0)  # lines of the longest row, and where it begins
    rows = read_cells(data.text(), dialect.delimiter, quoted=dialect.quoted)
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
            raise data.not_utf8() from error
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
    """Yield the rows of `read_rows`, and behind the cells of each its number (a header has none); note
    those that it would refuse as faults.

    A quotation mark that is never closed costs its own line only.
    """
    width, number, skipped, is_header = len(dialect.names), 0, 0, dialect.has_header
    for _ in range(MOST_RESTARTS):
        lines = itertools.islice(data.text(errors="surrogateescape"), skipped, None)
        rows = read_cells(lines, dialect.delimiter, quoted=dialect.quoted)
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
            if is_header or not row:
                is_header = is_header and not row
                continue
            number += 1
            content = dialect.delimiter.join(row)
            if len(row) != width:
                data.note(number, f"not as many cells as columns ({len(row)} for {width})", content)
            elif not is_utf8(content):
                data.note(number, NOT_UTF8, content)
            else:
                yield [*row, str(number)]


def _ragged(name: str, line: int, row: list[str], dialect: Dialect) -> UserError:
    names = ", ".join(dialect.names[:10]) + (", ..." if len(dialect.names) > 10 else "")
    source = "header" if dialect.has_header else "--columns"
    help = "correct the row"
    if dialect.quoted and len(row) > len(dialect.names):
        help = f"put a cell that holds {dialect.delimiter!r} into quotation marks"
    columns = counted(len(dialect.names), "column")
    problem = f"{counted(len(row), 'cell')}, but {columns} in the {source} ({names})"
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


def read_fast(content: pa.NativeFile, dialect: Dialect) -> Iterator[pa.Table]:
    """Yield the rows of `read_rows` in blocks, for a file that is well formed: the fast version."""
    keys = [str(number) for number in range(len(dialect.names))]
    types = dict.fromkeys(keys, pa.string())
    reader = pyarrow.csv.open_csv(
        content,
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


def _with_numbers(table: pa.Table, as_text: Sequence[str], decimal: str) -> pa.Table:
    """Return a table of strings with numbers and booleans where a column holds nothing else. A cell
    with nothing in it is missing.
    """
    columns = [
        column
        if name != ROW and not {name, EVERY_COLUMN}.isdisjoint(as_text)
        else _as_numbers(column, decimal)
        for name, column in zip(table.column_names, table.columns)
    ]
    return pa.table(columns, names=table.column_names)


def _as_numbers(column: pa.ChunkedArray, decimal: str) -> pa.ChunkedArray:
    cells = pc.if_else(pc.equal(column, ""), None, column)
    if cells.null_count == len(cells):
        return pa.chunked_array([pa.nulls(len(cells))])
    block = next(block for block in cells.chunks if block.null_count < len(block))
    head = block.drop_null().slice(0, 100)
    fractions = _fractions(decimal)
    for pattern, kind in ((WHOLE, pa.int64()), (fractions, pa.float64()), (BOOLEAN, pa.bool_())):
        # most columns of texts are none of these in their first cells already
        if _all_match(head, pattern) and _all_match(cells, pattern):
            points = cells if decimal == "." else pc.replace_substring(cells, decimal, ".")
            numbers = points.cast(kind)
            is_finite = kind != pa.float64() or pc.all(pc.is_finite(numbers)).as_py()
            return numbers if is_finite else cells  # 1e400 would be infinite
    return cells


def has_decimal_commas(texts: pa.ChunkedArray) -> bool:
    """Return whether `--decimal ,`, and nothing else, makes numbers of a column of texts."""
    cells = texts.filter(pc.not_equal(texts, ""))  # none that is missing either
    return _all_match(cells, _fractions(",")) and not _all_match(cells, DECIMAL)


def _fractions(decimal: str) -> str:
    """Return the pattern of numbers with this character before their decimals."""
    return DECIMAL.replace(r"\.", re.escape(decimal))


def _all_match(cells: pa.ChunkedArray | pa.Array, pattern: str) -> bool:
    """Return whether every cell that is not missing matches, and one is there."""
    return cells.null_count < len(cells) and pc.all(pc.match_substring_regex(cells, pattern)).as_py()


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


# Lines that begin with their label ----------------------------------------------------------------


def read_split_lines(data: DataFile, separators: str) -> pa.Table:
    """Return a table with the columns of each line that are named, of which the last is the rest of
    the line.

    `separators`: the character between each two columns, or one for all. Raises UserError, naming
    the line, where one is missing.
    """
    columns = data.options.columns
    if columns is None:
        raise UserError(f"--delimiter {separators!r}: name the columns of a line with --columns")
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
    lines = parse_lines(data, parse)
    if data.faults is None:
        blocks = _blocks_of_rows((cells for _, cells in lines), columns)
    else:
        blocks = _blocks_of_rows(([*cells, str(number)] for number, cells in lines), [*columns, ROW])
    return _with_numbers(gather(blocks, data.folder), columns, ".")
