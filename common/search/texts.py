"""A collection of texts: one a line, a column of a data file, a folder of .txt files, or a bundled set. Read, checked, never held in memory.

Whatever it comes from, a collection is an Arrow table over memory-mapped files: column `_text` and the columns that came with it.
"""

import contextlib
import json
import mmap
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common import assets, data
from common.errors import UserError
from common.search.lookup import Lookup, digest
from common.search.snapshot import OWN_COLUMNS, TEXT

REPLACED = "\ufffd"  # what stands for bytes that are no UTF-8 when --skip-bad goes on
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
BATCH = 10_000


@dataclass(frozen=True)
class Collection:
    """`rows`: an Arrow table with `_text` and metadata; `files`: whether a row is a file. `bad`: row -> why it was passed over."""

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


def read(name: str, *, text_column: str, id_column: str | None = None, skip_bad: bool = False, cache_dir: str | None = None) -> Collection:
    """Read and check a collection: a text file or "-" (one text a line), a data file, a folder of .txt files, a bundled name.

    Raises UserError, naming file and row, for a text that is missing, empty or no UTF-8, and for an id that is missing or stands twice; with
    `skip_bad` these rows are passed over.
    """
    path = Path(name)
    if assets.is_bundled(name):
        if name not in assets.DATASETS:
            raise UserError(f"{name}: no such bundled data set; there is {', '.join(assets.DATASETS)}")
        rows, unit = _own_names(assets.DATASETS[name](), "text", name), "row"
    elif path.is_dir():
        rows, unit = _spool(_folder_rows(path, skip_bad)), "file"
    elif path.suffix.lower() in data.FILE_READERS:
        rows, unit = _data_file(path, text_column, skip_bad, cache_dir), "row"
    else:
        rows, unit = _spool(_lines(name, skip_bad)), "line"
    collection = Collection({"-": "standard input"}.get(name, name), rows, unit, {})
    if id_column is not None and id_column not in rows.column_names:
        raise UserError(f"{collection.name}: no column {id_column!r}; there is {', '.join(c for c in rows.column_names if c != TEXT) or 'none'}; "
                        "name the right one with --id-column")
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
    """Raise UserError, naming `place`, unless a text from the command line or a prompt can be encoded."""
    if not text.strip():
        raise UserError(f"{place}: the text is empty; write something in it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: not UTF-8 (character {error.start + 1}); convert it to UTF-8 first") from error


def _check(collection: Collection, id_column: str | None, skip_bad: bool):
    """Find the rows that can't be used: raise UserError for the first, or note each in collection.bad."""
    seen = Lookup()
    if id_column is not None and not _is_key(collection.rows.schema.field(id_column).type):
        raise UserError(f"{collection.name}: column {id_column!r} holds {collection.rows.schema.field(id_column).type}, not ids; "
                        "name a column of texts or whole numbers with --id-column")
    for start in range(0, len(collection.rows), BATCH):
        block = collection.rows.slice(start, BATCH)
        missing = block[TEXT].is_null().to_numpy()
        blank = pc.equal(pc.utf8_trim_whitespace(block[TEXT]), "").fill_null(True).to_numpy()
        reasons = {int(row): "the text is missing" if missing[row] else "the text is empty" for row in np.flatnonzero(blank)}
        replaced = pc.match_substring(block[TEXT], REPLACED + REPLACED).fill_null(False).to_numpy() if skip_bad else np.zeros(0, bool)
        reasons |= {int(row): "the text is not UTF-8" for row in np.flatnonzero(replaced)}
        keys = block[id_column].to_pylist() if id_column else []
        digests, here = [digest(str(key)) for key in keys], {}
        for row, (key, before) in enumerate(zip(keys, seen.find(digests))):
            if key is None or key == "":
                reasons.setdefault(row, f"the id in column {id_column!r} is missing")
            elif before >= 0 or digests[row] in here:
                reasons.setdefault(row, f"the id {key!r} in column {id_column!r} stands above too")
            elif row not in reasons:
                here[digests[row]] = start + row
        seen.add(here, here.values())
        for row, reason in sorted(reasons.items()):
            if not skip_bad:
                raise UserError(f"{collection.place(start + row)}: {reason}; mend or remove it, or pass it over with --skip-bad")
            collection.bad[start + row] = reason


def _is_key(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)


def _own_names(rows: datasets.Dataset, text_column: str, place: str) -> pa.Table:
    """Return a data set as a table whose text column is called `_text`, and whose classes are their names."""
    names = {name: feature.names for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)}
    table = rows.with_format("arrow")[:]
    if text_column not in table.column_names:
        raise UserError(f"{place}: no column {text_column!r}; there is {', '.join(table.column_names)}; name the right one with --text-column")
    if data.kind(rows, text_column) not in ("string", "large_string"):
        raise UserError(f"{place}: column {text_column!r} holds {data.kind(rows, text_column)}, not texts; name the right one with --text-column")
    taken = next((name for name in table.column_names if name.lower() in OWN_COLUMNS), None)
    if taken:
        raise UserError(f"{place}: a column can't be called {taken!r}, for the index has its own; rename it")
    for name, classes in names.items():
        column = pa.chunked_array([pa.array(classes).take(chunk) for chunk in table[name].chunks])
        table = table.set_column(table.column_names.index(name), name, column)
    for place, field in enumerate(table.schema):  # readers differ in how they hold strings: in one index they must not
        kind = pa.large_string() if field.name == text_column else pa.string() if pa.types.is_large_string(field.type) else field.type
        table = table.set_column(place, field.name, table[field.name].cast(kind)) if kind != field.type else table
    return table.rename_columns([TEXT if name == text_column else name for name in table.column_names])


def _data_file(path: Path, text_column: str, skip_bad: bool, cache_dir: str | None) -> pa.Table:
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    if path.suffix.lower() == ".parquet":
        return _own_names(data.read_file(path, cache_dir=cache_dir), text_column, str(path))
    mended = _mended(path, skip_bad)
    if mended is None:
        return _own_names(data.read_file(path, cache_dir=cache_dir), text_column, str(path))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(mended)
        return _own_names(data.read_file(copy, cache_dir=cache_dir), text_column, str(path))


def _mended(path: Path, skip_bad: bool) -> bytes | None:
    """Return the content of a file with REPLACED twice for each fault of encoding, None when there is none; raise UserError if not `skip_bad`."""
    lines, faults = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            fault = _fault(line)
            if fault and not skip_bad:
                raise UserError(f"{path}, line {number}: {fault}; mend it, or pass the row over with --skip-bad")
            if fault:
                faults += 1
            if faults or skip_bad:
                lines.append(_mend(line) if fault else line)
    return b"".join(lines) if faults else None


def _fault(line: bytes) -> str | None:
    """Return what is wrong with the encoding of a line: bytes that are no UTF-8, or a JSON escape for half a character."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {line[error.start]:#04x} at {error.start + 1})"
    if SURROGATE.search(line):
        try:
            json.dumps(json.loads(line), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "a lone surrogate (half a character, \\ud800 to \\udfff)"
        except ValueError:  # not JSON on this line: its reader will say so
            return None
    return None


def _mend(line: bytes) -> bytes:
    with contextlib.suppress(ValueError):  # not JSON: then the bytes alone are at fault
        line = json.dumps(json.loads(line), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    return line.decode("utf-8", "replace").replace(REPLACED, REPLACED + REPLACED).encode()


def _lines(name: str, skip_bad: bool):
    """Yield a row for each line; with `skip_bad` the text of a line that is no UTF-8 is REPLACED twice."""
    place = {"-": "standard input", "": "the empty name"}.get(name, name)
    try:
        file = sys.stdin.buffer if name == "-" else open(name, "rb")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise UserError(f"{place}: can't be read: {error.strerror}; name a text file, a data file, a folder, or - for standard input") from error
    with file:
        number = 0
        for number, line in enumerate(file, start=1):
            yield {TEXT: _decoded(line.removesuffix(b"\n").removesuffix(b"\r"), f"{place}, line {number}", skip_bad)}
    if number == 0:
        raise UserError(f"{place}: it is empty; write one text on each line")


def _folder_rows(root: Path, skip_bad: bool):
    files = sorted(path.relative_to(root) for path in root.rglob("*.txt") if not any(part.startswith(".") for part in path.relative_to(root).parts))
    if not files:
        raise UserError(f"{root}: no .txt files in it; name a folder that has them, or a data file")
    classes = all(len(file.parts) == 2 for file in files)  # a folder of class folders
    for file in files:
        yield {TEXT: _decoded((root / file).read_bytes(), str(root / file), skip_bad), "file": str(file), **({"label": file.parts[0]} if classes else {})}


def _decoded(content: bytes, place: str, skip_bad: bool) -> str:
    try:
        return content.decode("utf-8-sig")  # some programs write a byte order mark: it is no part of the text
    except UnicodeDecodeError as error:
        if skip_bad:
            return REPLACED + REPLACED
        raise UserError(f"{place}: not UTF-8 (byte {content[error.start]:#04x} at {error.start + 1}); "
                        "convert it to UTF-8 first, or pass it over with --skip-bad") from error


def _spool(rows) -> pa.Table:
    """Write rows (dicts of texts) to a nameless temporary file as they come; return them as a table that is mapped from it."""
    with tempfile.TemporaryFile() as file:
        writer, batch = None, []
        for row in rows:
            batch.append(row)
            if writer is None:
                schema = pa.schema([(name, pa.large_string() if name == TEXT else pa.string()) for name in row])
                writer = pa.ipc.new_file(file, schema)
            if len(batch) == BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch = []
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
        writer.close()
        file.flush()
        return pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))).read_all()
