"""How a table with a delimiter is written, and the names of its columns, as its beginning shows.

Importing it is quick: a missing column is reported before any library is loaded.
"""

import csv
import io
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError, first_repeated
from common.plain_files import DataFile
from common.sources import suffix

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars", " ": "spaces"}

FOR_EXCEL = re.compile(r'"?sep=[^\r\n]"?(?=\r?\n)', re.IGNORECASE)

csv.field_size_limit(sys.maxsize)


@dataclass(frozen=True)
class Dialect:
    """How a table with a delimiter is written."""

    delimiter: str
    quoted: bool  # whether a cell may stand in quotation marks
    names: list[str]  # of the columns
    has_header: bool


def default_delimiter(data: DataFile) -> str:
    """Return what separates the cells of a table as its ending says."""
    return "\t" if suffix(data.name) == ".tsv" else ","


def choose_delimiter(data: DataFile) -> str:
    """Return what separates the cells of a table: as the flags say, else as its beginning shows.
    Raises UserError for a first line that tells it to Excel alone.
    """
    if (line := FOR_EXCEL.match(data.head())) is not None:
        problem = f"{line[0]!r} tells Excel what separates cells, and is no row"
        raise UserError(f"{data.name}, line 1: {problem}; remove this line")
    if data.options.delimiter is not None:
        return data.options.delimiter
    columns = data.options.columns
    return find_delimiter(data.head(), default_delimiter(data), columns=columns, as_text=data.as_text)


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


def find_names(data: DataFile, delimiter: str, *, quoted: bool) -> list[str]:
    """Return the names of a table's columns: as the flags say, else from its header.

    Raises UserError for a name that two columns have.
    """
    if data.options.columns is not None:
        return list(data.options.columns)
    header = _first_row(data.head(), delimiter, quoted=quoted)
    # an empty name is that of the index which pandas writes beside a table
    names = [column or f"Unnamed: {number}" for number, column in enumerate(header)]
    twice = first_repeated(names)
    if twice is not None:
        raise UserError(f"{data.name}: two columns have the name {twice!r}; rename one of them")
    return names


def _first_row(head: str, delimiter: str, *, quoted: bool) -> list[str]:
    """Return the cells of the first line that is not blank, as far as they can be read."""
    rows = read_cells(io.StringIO(head, newline=""), delimiter, quoted=quoted, strict=False)
    return next((row for row in rows if row), [])


def read_cells(lines: Iterable[str], delimiter: str, *, quoted: bool, strict: bool = True) -> Any:
    """Return Python's reader of rows; `strict`: it refuses what is not well formed."""
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=strict)
