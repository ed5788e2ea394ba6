"""A collection of texts from any source: lines, a data file, a folder of .txt files, a bundled set.

Wherever its texts come from, a collection is an Arrow table over memory-mapped files, never held in
memory as a whole: the column `_text`, and the columns that came with it. Texts and ids are checked
when they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import re
import secrets
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common import bundled, reading
from common.errors import UserError
from common.search.index import RESERVED_COLUMNS, TEXT, number_array
from common.search.manifest import DEFAULT_LIMITS, EncoderConfig, Limits

if TYPE_CHECKING:
    import datasets

JSON = (".json", ".jsonl")
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
# also what Python's "surrogateescape" puts in place of a byte that is not UTF-8
SURROGATE = re.compile("[\ud800-\udfff]")
BATCH = 10_000  # rows checked, or written, at once
MERGED_AT_LEAST = 65_536  # entries that a RowTable collects before it sorts them in
NOT_UTF8 = "the row is not UTF-8"


@dataclass(frozen=True)
class Collection:
    """Texts and where they come from. `rows` is an Arrow table: `_text` and the other columns, the
    metadata. `bad`: row -> why it is skipped.
    """

    name: str
    rows: pa.Table
    unit: str  # what a row is in the source: "line", "row" or "file"
    bad: dict[int, str]

    def location(self, row: int) -> str:
        """Return where a row is in the source, for a person."""
        if self.unit == "file":
            return str(Path(self.name) / self.rows["file"][row].as_py())
        return f"{self.name}, {self.unit} {row + 1}"

    def blocks(self, size: int) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Yield (row numbers, table) of the rows that are not bad, at most `size` at a time."""
        good = np.ones(len(self.rows), bool)
        good[list(self.bad)] = False
        for start in range(0, len(self.rows), size):
            good_here = good[start : start + size]
            if good_here.any():
                table = self.rows.slice(start, size).take(number_array(np.flatnonzero(good_here)))
                yield start + np.flatnonzero(good_here), table

    def __len__(self) -> int:
        return len(self.rows) - len(self.bad)


@dataclass
class BadRows:
    """The rows that can't be used, and why. Without `skip` the first one is an error."""

    skip: bool
    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, row: int, reason: str, *, error: str) -> None:
        """Note a bad row and why it is bad. Without `skip`, raise UserError(`error`) instead."""
        if not self.skip:
            raise UserError(f"{error}, or skip it with --skip-bad")
        self.reasons[row] = reason


@dataclass(frozen=True)
class Source:
    """What a command reads: texts, or the rows of an index where a condition holds; and how texts
    are encoded.
    """

    encoder: EncoderConfig
    texts: str | None
    index: str | None
    where: str | None
    text_column: str
    skip_bad: bool
    block: int  # texts encoded and committed at once
    limits: Limits = DEFAULT_LIMITS  # of `where`

    def read(self, id_column: str | None = None) -> Collection:
        """Return the texts; not for a command that reads an index."""
        assert self.texts is not None
        return read(
            self.texts,
            text_column=self.text_column,
            id_column=id_column,
            skip_bad=self.skip_bad,
            cache_dir=self.encoder.cache_dir,
        )


def read(
    name: str,
    *,
    text_column: str,
    id_column: str | None = None,
    skip_bad: bool = False,
    cache_dir: str | None = None,
) -> Collection:
    """Read and check a collection: a text file or "-" (one text per line), a data file, a folder of
    .txt files, a bundled name.

    Raises UserError, naming file and row, for a text that is missing, empty or not UTF-8, and for
    an id that is missing or not unique; with `skip_bad` these rows are skipped.
    """
    bad = BadRows(skip_bad)
    rows, unit = _read_rows(name, text_column, bad=bad, cache_dir=cache_dir)
    collection = Collection(_source(name), rows, unit, bad.reasons)
    if id_column is not None:
        columns = [column for column in rows.column_names if column != TEXT]
        reading.require_column(columns, id_column, source=collection.name, flag="--id-column")
    _check_rows(collection, id_column, bad)
    if len(collection) == 0:
        raise UserError(f"{collection.name}: none of its texts can be used; name another source")
    return collection


def ids_of(table: pa.Table, id_column: str | None) -> list[str]:
    """Return the id of each row; without a column of ids, a hash of its text."""
    if id_column is None:
        return [digest(text).hex() for text in table[TEXT].to_pylist()]
    return [str(value) for value in table[id_column].to_pylist()]


def digest(text: str) -> bytes:
    """Return the hash (16 bytes) by which texts, ids and metadata are compared."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class RowTable:
    """A map from the digest (16 bytes) of a text or id to its row. Sorted arrays take 24 bytes per
    entry, a dict ten times as much; only recent entries are in a dict.
    """

    def __init__(self) -> None:
        self.keys, self.rows = np.empty(0, "S16"), np.empty(0, np.int64)  # sorted by key
        self.recent: dict[bytes, int] = {}  # added since the arrays were last merged

    def find(self, digests: list[bytes]) -> np.ndarray:
        """Return the row of each digest, -1 for one that was never added."""
        wanted = np.array(digests, dtype="S16")
        rows = np.full(len(wanted), -1)
        if len(self.keys):
            positions = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
            rows = np.where(self.keys[positions] == wanted, self.rows[positions], -1)
        rows = [self.recent.get(key, row) for key, row in zip(digests, rows)]
        return np.array(rows, dtype=np.int64)

    def add(self, digests: Iterable[bytes], rows: Iterable[int]) -> None:
        """Add entries; a digest that is known already gets the new row."""
        self.recent.update(zip(digests, map(int, rows)))
        # a limit that grows with the table: all entries are seldom sorted again
        if len(self.recent) > max(MERGED_AT_LEAST, len(self.keys) // 8):
            fresh = np.array(list(self.recent), dtype="S16")
            kept = ~np.isin(self.keys, fresh)
            keys = np.concatenate([self.keys[kept], fresh])
            merged = np.concatenate([self.rows[kept], np.array(list(self.recent.values()))])
            order = np.argsort(keys)
            self.keys, self.rows, self.recent = keys[order], merged[order], {}


def _check_rows(collection: Collection, id_column: str | None, bad: BadRows) -> None:
    """Add the rows whose text or id can't be used to `bad`."""
    rows, known_ids = collection.rows, RowTable()
    if id_column is not None:
        _check_id_type(collection, id_column)
    for start in range(0, len(rows), BATCH):
        block = rows.slice(start, BATCH)
        # rows that could not be decoded are bad already, and their values mean nothing
        good = np.array([start + row not in bad.reasons for row in range(len(block))])
        problems = _text_problems(block, good)
        if id_column is not None:
            problems |= _id_problems(block, id_column, good, problems, known_ids)
        for row, reason in sorted(problems.items()):
            location = collection.location(start + row)
            bad.add(start + row, reason, error=f"{location}: {reason}; correct or remove it")


def _check_id_type(collection: Collection, id_column: str) -> None:
    kind = collection.rows.schema.field(id_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        advice = "name a column of texts or whole numbers with --id-column"
        raise UserError(f"{collection.name}: column {id_column!r} holds {kind}, not ids; {advice}")


def _text_problems(block: pa.Table, good: np.ndarray) -> dict[int, str]:
    """Return row -> what is wrong with its text."""
    texts = pc.if_else(pa.array(good.tolist()), block[TEXT], None)
    missing = texts.is_null().to_numpy()
    # true for missing texts too
    blank = pc.equal(pc.utf8_trim_whitespace(texts), "").fill_null(True).to_numpy()
    return {
        int(row): "the text is missing" if missing[row] else "the text is empty"
        for row in np.flatnonzero(blank & good)
    }


def _id_problems(
    block: pa.Table, id_column: str, good: np.ndarray, problems: dict[int, str], known_ids: RowTable
) -> dict[int, str]:
    """Return row -> what is wrong with its id. Rows with other `problems` are left out; good ids
    are added to `known_ids`.
    """
    keys = pc.if_else(pa.array(good.tolist()), block[id_column], None).to_pylist()
    digests = [digest(str(key)) for key in keys]
    new_problems: dict[int, str] = {}
    here: dict[bytes, int] = {}  # the good ids of this block
    for row, (key, before) in enumerate(zip(keys, known_ids.find(digests))):
        if not good[row] or row in problems:
            continue
        if key is None or key == "":
            new_problems[row] = f"the id in column {id_column!r} is missing"
        elif before >= 0 or digests[row] in here:
            new_problems[row] = f"the id {key!r} in column {id_column!r} is not unique: it occurs above"
        else:
            here[digests[row]] = row
    known_ids.add(here, here.values())
    return new_problems


def _read_rows(name: str, text_column: str, *, bad: BadRows, cache_dir: str | None) -> tuple[pa.Table, str]:
    """Return the rows of a source (`_text`, and the columns that came with it), and what a row is
    called there. Rows that are not UTF-8 are added to `bad`; their values mean nothing.
    """
    path = Path(name)
    if bundled.is_bundled(name):
        if name not in bundled.DATASETS:
            names = ", ".join(bundled.DATASETS)
            raise UserError(f"{name}: no such bundled data set; there is {names}")
        return _to_table(bundled.DATASETS[name](), "text", name), "row"
    if path.is_dir():
        return _spool(_folder_rows(path, bad)), "file"
    if path.suffix.lower() not in reading.FILE_READERS:
        return _spool(_line_rows(name, bad)), "line"
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    if path.suffix.lower() != ".parquet" and _has_faults(path, bad):
        return _read_repaired(path, text_column, bad), "row"
    rows = _to_table(reading.read_file(path, cache_dir=cache_dir), text_column, name)
    if path.suffix.lower() == ".parquet":
        _check_parquet(rows, path, bad)
    return rows, "row"


def _to_table(rows: datasets.Dataset, text_column: str, source: str) -> pa.Table:
    """Return a data set as a table whose text column is `_text`, with the names of classes in place
    of their numbers.
    """
    import datasets

    table = cast(pa.Table, rows.with_format("arrow")[:])
    reading.require_column(table.column_names, text_column, source=source, flag="--text-column")
    reading.check_kind(rows, text_column, source=source)
    taken = next((name for name in table.column_names if name.lower() in RESERVED_COLUMNS), None)
    if taken:
        raise UserError(f"{source}: the column name {taken!r} is reserved; rename the column")
    for number, name in enumerate(table.column_names):
        column, feature = table[name], rows.features[name]
        if isinstance(feature, datasets.ClassLabel):
            classes = pa.array(feature.names)
            column = pa.chunked_array([classes.take(part) for part in column.chunks], pa.string())
        # readers give strings one of two Arrow types; all files of an index must have the same
        elif name == text_column:
            column = column.cast(pa.large_string())
        elif pa.types.is_large_string(column.type):
            column = column.cast(pa.string())
        table = table.set_column(number, name, column)
    names = [TEXT if name == text_column else name for name in table.column_names]
    return table.rename_columns(names)


def _check_parquet(rows: pa.Table, path: Path, bad: BadRows) -> None:
    """Add the rows with bytes that are not UTF-8 to `bad`: Arrow doesn't check them."""
    for start in range(0, len(rows), BATCH):
        block = rows.slice(start, BATCH).combine_chunks()
        if _is_valid(block):
            continue
        for row in range(len(block)):
            if not _is_valid(block.take(pa.array([row]))):
                error = f"{path}, row {start + row + 1}: not UTF-8; correct the row"
                bad.add(start + row, NOT_UTF8, error=error)


def _is_valid(rows: pa.Table) -> bool:
    try:
        rows.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _has_faults(path: Path, bad: BadRows) -> bool:
    """Tell whether a CSV or JSON file has lines with a fault of encoding. Raises UserError for the
    first unless bad rows are skipped.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            fault = _fault(line, f"{path}, line {number}", is_json=path.suffix.lower() in JSON)
            if fault is None:
                continue
            if not bad.skip:
                raise UserError(f"{fault}, or skip the row with --skip-bad")
            return True
    return False


def _fault(line: bytes, location: str, *, is_json: bool) -> str | None:
    """Return what is wrong with the encoding of a line: bytes that are not UTF-8, or in JSON the
    escape of a lone surrogate.
    """
    try:
        reading.decode_utf8(line, location)
    except UserError as error:
        return str(error)
    if is_json and SURROGATE_ESCAPE.search(line):
        try:
            json.dumps(json.loads(line), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return f"{location}: a lone surrogate (\\ud800 to \\udfff) is no character; correct it"
        except ValueError:  # not JSON on this line: the reader will report it
            return None
    return None


def _read_repaired(path: Path, text_column: str, bad: BadRows) -> pa.Table:
    """Return the rows of a CSV or JSON file with faults of encoding, after adding the rows that
    have one in any column to `bad`.
    """
    # takes the place of each fault and is then looked for in the rows: a row may span several lines
    mark = f"\ufffd{secrets.token_hex(8)}"
    is_json = path.suffix.lower() in JSON
    # also holds the reader's cache, whose files stay mapped after they are deleted
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / path.name
        with open(path, "rb") as file, open(copy, "wb") as repaired:
            for line in file:
                if _fault(line, str(path), is_json=is_json):
                    line = _mark_faults(line, mark, is_json=is_json)
                repaired.write(line)
        rows = _to_table(reading.read_file(copy, cache_dir=folder), text_column, str(path))
        for start in range(0, len(rows), BATCH):
            for row, values in enumerate(rows.slice(start, BATCH).to_pylist(), start=start):
                if any(mark in str(value) for value in values.values()):
                    bad.add(row, NOT_UTF8, error=f"{path}: not UTF-8")
    return rows


def _mark_faults(line: bytes, mark: str, *, is_json: bool) -> bytes:
    """Return a line as UTF-8, with `mark` in place of each fault."""
    text = line.decode("utf-8", "surrogateescape")
    if is_json:
        # a line that is not JSON by itself can only have bad bytes
        with contextlib.suppress(ValueError):
            text = json.dumps(json.loads(text), ensure_ascii=False) + "\n"
    return SURROGATE.sub(mark, text).encode()


def _line_rows(name: str, bad: BadRows) -> Iterator[dict[str, str | None]]:
    """Yield a row for each line of a text file."""
    source = _source(name)
    try:
        file = sys.stdin.buffer if name == "-" else open(name, "rb")  # noqa: SIM115  (closed below)
    except OSError as error:
        advice = "name a text file, a data file, a folder, or - for standard input"
        raise UserError(f"{source}: can't be read: {error.strerror}; {advice}") from error
    with file:
        row = -1
        for row, line in enumerate(file):
            content = line.removesuffix(b"\n").removesuffix(b"\r")
            yield {TEXT: _decode(content, f"{source}, line {row + 1}", row, bad)}
    if row < 0:
        raise UserError(f"{source}: it is empty; write one text on each line")


def _source(name: str) -> str:
    """Return the name of a source as messages give it."""
    return "standard input" if name == "-" else name


def _folder_rows(root: Path, bad: BadRows) -> Iterator[dict[str, str | None]]:
    """Yield a row for each .txt file below a folder."""
    files = sorted(path.relative_to(root) for path in root.rglob("*.txt"))
    files = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    if not files:
        raise UserError(f"{root}: no .txt files in it; name a folder that has them, or a data file")
    has_classes = all(len(file.parts) == 2 for file in files)  # a folder of class folders
    for row, file in enumerate(files):
        text = _decode((root / file).read_bytes(), str(root / file), row, bad)
        label = {"label": file.parts[0]} if has_classes else {}
        yield {TEXT: text, "file": str(file), **label}


def _decode(content: bytes, location: str, row: int, bad: BadRows) -> str | None:
    try:
        return reading.decode_utf8(content, location)
    except UserError as error:
        bad.add(row, "the text is not UTF-8", error=str(error))
        return None


def _spool(rows: Iterator[dict[str, str | None]]) -> pa.Table:
    """Write rows (at least one) to a temporary file without a name, as they come; return them as a
    table that is mapped from it.
    """
    with tempfile.TemporaryFile() as file:
        first = next(rows)  # names the columns
        kinds = [(name, pa.large_string() if name == TEXT else pa.string()) for name in first]
        schema, batch = pa.schema(kinds), [first]
        writer = pa.ipc.new_file(file, schema)
        for row in rows:
            if len(batch) == BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch = []
            batch.append(row)
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
        writer.close()
        file.flush()
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return pa.ipc.open_file(pa.py_buffer(content)).read_all()
