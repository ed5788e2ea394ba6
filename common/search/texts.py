"""A collection of texts: one a line, a column of a data file, a folder of .txt files, or a bundled
set. Read, checked, never held in memory.

Whatever it comes from, a collection is an Arrow table over memory-mapped files: column `_text` and
the columns that came with it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.errors import UserError
from common.search import sources
from common.search.index import TEXT
from common.search.lookup import Lookup, digest


@dataclass(frozen=True)
class Collection:
    """`rows`: an Arrow table with `_text` and metadata; `files`: whether a row is a file. `bad`:
    row -> why it was passed over.
    """

    name: str
    rows: pa.Table
    unit: str  # what a row is in the source: "line", "row" or "file"
    bad: dict[int, str]

    def place(self, row: int) -> str:
        """Return where a row stands in the source, for a person."""
        if self.unit == "file":
            return str(Path(self.name) / self.rows["file"][row].as_py())
        return f"{self.name}, {self.unit} {row + 1}"

    def blocks(self, size: int):
        """Yield (numbers, table) of the rows that are not bad, at most `size` at a time."""
        bad = np.zeros(len(self.rows), bool)
        bad[list(self.bad)] = True
        for start in range(0, len(self.rows), size):
            numbers = np.arange(start, min(start + size, len(self.rows)))
            good = ~bad[numbers]
            if good.any():
                yield numbers[good], self.rows.slice(start, size).filter(pa.array(good))

    def __len__(self) -> int:
        return len(self.rows) - len(self.bad)


def read(
    name: str,
    *,
    text_column: str,
    id_column: str | None = None,
    skip_bad: bool = False,
    cache_dir: str | None = None,
) -> Collection:
    """Read and check a collection: a text file or "-" (one text a line), a data file, a folder of
    .txt files, a bundled name.

    Raises UserError, naming file and row, for a text that is missing, empty or no UTF-8, and for
    an id that is missing or stands twice; with `skip_bad` these rows are passed over.
    """
    rows, unit, bad = sources.read(name, text_column=text_column, skip_bad=skip_bad, cache_dir=cache_dir)
    collection = Collection({"-": "standard input"}.get(name, name), rows, unit, bad)
    if id_column is not None and id_column not in rows.column_names:
        raise UserError(
            f"{collection.name}: no column {id_column!r}; there is"
            f" {', '.join(c for c in rows.column_names if c != TEXT) or 'none'}; name the right one with"
            " --id-column"
        )
    _check(collection, id_column, skip_bad)
    if len(collection) == 0:
        raise UserError(f"{collection.name}: no text in it can be used; name one that has texts")
    return collection


def ids_of(table: pa.Table, id_column: str | None) -> list[str]:
    """Return the key of each row: its id, else a hash of its text."""
    if id_column is None:
        return [digest(text).hex() for text in table[TEXT].to_pylist()]
    return [str(value) for value in table[id_column].to_pylist()]


def check_query(text: str, place: str):
    """Raise UserError, naming `place`, unless a text from the command line or a prompt can be
    encoded.
    """
    if not text.strip():
        raise UserError(f"{place}: the text is empty; write something in it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: not UTF-8 (character {error.start + 1}); convert it to UTF-8 first"
        ) from error


def _check(collection: Collection, id_column: str | None, skip_bad: bool):
    """Find the rows that can't be used: raise UserError for the first, or note each in
    collection.bad.
    """
    seen = Lookup()
    if id_column is not None and not _is_key(collection.rows.schema.field(id_column).type):
        raise UserError(
            f"{collection.name}: column {id_column!r} holds {collection.rows.schema.field(id_column).type},"
            " not ids; name a column of texts or whole numbers with --id-column"
        )
    for start in range(0, len(collection.rows), sources.BATCH):
        block = collection.rows.slice(start, sources.BATCH)
        # the values of the others mean nothing
        good = np.array([start + row not in collection.bad for row in range(len(block))])
        texts = pc.if_else(pa.array(good), block[TEXT], None)
        missing, blank = (
            texts.is_null().to_numpy(),
            pc.equal(pc.utf8_trim_whitespace(texts), "").fill_null(True).to_numpy(),
        )
        reasons = {
            int(row): "the text is missing" if missing[row] else "the text is empty"
            for row in np.flatnonzero(blank & good)
        }
        keys = pc.if_else(pa.array(good), block[id_column], None).to_pylist() if id_column else []
        digests, here = [digest(str(key)) for key in keys], {}
        for row, (key, before) in enumerate(zip(keys, seen.find(digests))):
            if not good[row]:
                continue
            if key is None or key == "":
                reasons.setdefault(row, f"the id in column {id_column!r} is missing")
            elif before >= 0 or digests[row] in here:
                reasons.setdefault(row, f"the id {key!r} in column {id_column!r} stands above too")
            elif row not in reasons:
                here[digests[row]] = start + row
        seen.add(here, here.values())
        for row, reason in sorted(reasons.items()):
            if not skip_bad:
                raise UserError(
                    f"{collection.place(start + row)}: {reason}; mend or remove it, or pass it over with"
                    " --skip-bad"
                )
            collection.bad[start + row] = reason


def _is_key(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)
