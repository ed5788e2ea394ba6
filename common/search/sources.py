"""Where texts come from: lines, data files, folders of .txt files, bundled sets -> an Arrow table
over mapped files, and the rows that are no UTF-8.
"""

import contextlib
import json
import mmap
import re
import secrets
import sys
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa

from common import bundled, reading
from common.errors import UserError
from common.search.index import OWN_COLUMNS, TEXT

JSON = (".json", ".jsonl")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
HALF = re.compile("[\ud800-\udfff]")  # as which Python reads a byte that is no UTF-8
BATCH = 10_000
NOT_UTF8 = "the row is not UTF-8"


def read(
    name: str, *, text_column: str, skip_bad: bool, cache_dir: str | None
) -> tuple[pa.Table, str, dict[int, str]]:
    """Return the rows of a source (`_text`, and the columns that came with it), what one is called
    there, and row -> why it can't be used.

    Raises UserError when it can't be read or holds bytes that are no UTF-8; with `skip_bad` these
    rows are noted instead, and their values mean nothing.
    """
    path, bad = Path(name), {}
    if bundled.is_bundled(name):
        if name not in bundled.DATASETS:
            raise UserError(f"{name}: no such bundled data set; there is {', '.join(bundled.DATASETS)}")
        return _own_names(bundled.DATASETS[name](), "text", name), "row", bad
    if path.is_dir():
        return _spool(_folder_rows(path, skip_bad, bad)), "file", bad
    if path.suffix.lower() not in reading.FILE_READERS:
        return _spool(_lines(name, skip_bad, bad)), "line", bad
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    if path.suffix.lower() == ".parquet":
        rows = _own_names(reading.read_file(path, cache_dir=cache_dir), text_column, str(path))
        _check_parquet(rows, path, skip_bad, bad)
    elif _has_faults(path, skip_bad):
        rows = _mended(path, text_column, bad)
    else:
        rows = _own_names(reading.read_file(path, cache_dir=cache_dir), text_column, str(path))
    return rows, "row", bad


def _own_names(rows: datasets.Dataset, text_column: str, place: str) -> pa.Table:
    """Return a data set as a table whose text column is called `_text`, and whose classes are
    their names.
    """
    names = {
        name: feature.names
        for name, feature in rows.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    table = rows.with_format("arrow")[:]
    if text_column not in table.column_names:
        raise UserError(
            f"{place}: no column {text_column!r}; there is {', '.join(table.column_names)}; name the right"
            " one with --text-column"
        )
    kind = reading.kind(rows, text_column)
    if kind not in ("string", "large_string"):
        raise UserError(
            f"{place}: column {text_column!r} holds {kind}, not texts; name the right one with --text-column"
        )
    taken = next((name for name in table.column_names if name.lower() in OWN_COLUMNS), None)
    if taken:
        raise UserError(f"{place}: a column can't be called {taken!r}, for the index has its own; rename it")
    for name, classes in names.items():
        column = pa.chunked_array([pa.array(classes).take(chunk) for chunk in table[name].chunks])
        table = table.set_column(table.column_names.index(name), name, column)
    # readers differ in how they hold strings: in one index they must not
    for place, field in enumerate(table.schema):
        kind = (
            pa.large_string()
            if field.name == text_column
            else pa.string()
            if pa.types.is_large_string(field.type)
            else field.type
        )
        table = (
            table.set_column(place, field.name, table[field.name].cast(kind)) if kind != field.type else table
        )
    return table.rename_columns([TEXT if name == text_column else name for name in table.column_names])


def _check_parquet(rows: pa.Table, path: Path, skip_bad: bool, bad: dict[int, str]):
    """Find the rows with bytes that are no UTF-8, which Arrow takes as they are."""
    for start in range(0, len(rows), BATCH):
        block = rows.slice(start, BATCH).combine_chunks()
        for row in range(len(block)) if not _is_valid(block) else ():
            if not _is_valid(block.take(pa.array([row]))):
                if not skip_bad:
                    raise UserError(
                        f"{path}, row {start + row + 1}: not UTF-8; mend it, or pass the row over with"
                        " --skip-bad"
                    )
                bad[start + row] = NOT_UTF8


def _is_valid(rows: pa.Table) -> bool:
    try:
        rows.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _has_faults(path: Path, skip_bad: bool) -> bool:
    """Tell whether a CSV or JSON file has lines with a fault of encoding; raise UserError for the
    first if not `skip_bad`.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            fault = _fault(line, path)
            if fault and not skip_bad:
                raise UserError(
                    f"{path}, line {number}: {fault}; mend it, or pass the row over with --skip-bad"
                )
            if fault:
                return True
    return False


def _fault(line: bytes, path: Path) -> str | None:
    """Return what is wrong with the encoding of a line: bytes that are no UTF-8, or in JSON an
    escape for half a character.
    """
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {line[error.start]:#04x} at {error.start + 1})"
    if path.suffix.lower() in JSON and SURROGATE.search(line):
        try:
            json.dumps(json.loads(line), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "a lone surrogate (half a character, \\ud800 to \\udfff)"
        except ValueError:  # not JSON on this line: its reader will say so
            return None
    return None


def _mended(path: Path, text_column: str, bad: dict[int, str]) -> pa.Table:
    """Return the rows of a CSV or JSON file with faults of encoding, after noting those that have
    one in any column.
    """
    # stands for a fault: by it the row is found again, for a line of the file need not be a row
    mark = f"\ufffd{secrets.token_hex(8)}"
    # also for the cache: its files stay mapped without their names
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / path.name
        with open(path, "rb") as file, open(copy, "wb") as fresh:
            fresh.writelines(_mend(line, path, mark) if _fault(line, path) else line for line in file)
        rows = _own_names(reading.read_file(copy, cache_dir=folder), text_column, str(path))
        for start in range(0, len(rows), BATCH):
            for row, values in enumerate(rows.slice(start, BATCH).to_pylist(), start=start):
                if any(mark in str(value) for value in values.values()):
                    bad[row] = NOT_UTF8
    return rows


def _mend(line: bytes, path: Path, mark: str) -> bytes:
    text = line.decode("utf-8", "surrogateescape")
    if path.suffix.lower() in JSON:
        # not JSON on this line: then the bytes alone are at fault
        with contextlib.suppress(ValueError):
            text = json.dumps(json.loads(text), ensure_ascii=False) + "\n"
    return HALF.sub(mark, text).encode()


def _lines(name: str, skip_bad: bool, bad: dict[int, str]):
    """Yield a row for each line."""
    place = {"-": "standard input", "": "the empty name"}.get(name, name)
    try:
        file = sys.stdin.buffer if name == "-" else open(name, "rb")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise UserError(
            f"{place}: can't be read: {error.strerror}; name a text file, a data file, a folder, or - for"
            " standard input"
        ) from error
    with file:
        row = -1
        for row, line in enumerate(file):
            yield {
                TEXT: _decoded(
                    line.removesuffix(b"\n").removesuffix(b"\r"),
                    f"{place}, line {row + 1}",
                    skip_bad,
                    row,
                    bad,
                )
            }
    if row < 0:
        raise UserError(f"{place}: it is empty; write one text on each line")


def _folder_rows(root: Path, skip_bad: bool, bad: dict[int, str]):
    files = sorted(
        path.relative_to(root)
        for path in root.rglob("*.txt")
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    if not files:
        raise UserError(f"{root}: no .txt files in it; name a folder that has them, or a data file")
    classes = all(len(file.parts) == 2 for file in files)  # a folder of class folders
    for row, file in enumerate(files):
        text = _decoded((root / file).read_bytes(), str(root / file), skip_bad, row, bad)
        yield {TEXT: text, "file": str(file), **({"label": file.parts[0]} if classes else {})}


def _decoded(content: bytes, place: str, skip_bad: bool, row: int, bad: dict[int, str]) -> str | None:
    try:
        # some programs write a byte order mark: it is no part of the text
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not skip_bad:
            raise UserError(
                f"{place}: not UTF-8 (byte {content[error.start]:#04x} at {error.start + 1}); "
                "convert it to UTF-8 first, or pass it over with --skip-bad"
            ) from error
        bad[row] = "the text is not UTF-8"
        return None


def _spool(rows) -> pa.Table:
    """Write rows (dicts of texts) to a nameless temporary file as they come; return them as a
    table that is mapped from it.
    """
    with tempfile.TemporaryFile() as file:
        writer, batch = None, []
        for row in rows:
            batch.append(row)
            if writer is None:
                schema = pa.schema(
                    [(name, pa.large_string() if name == TEXT else pa.string()) for name in row]
                )
                writer = pa.ipc.new_file(file, schema)
            if len(batch) == BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch = []
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
        writer.close()
        file.flush()
        return pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))).read_all()
