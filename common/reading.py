"""Read texts from a bundled set, a file, a folder or the Hub, and check that each one can
be used.

The lines of a text file need no library: `datasets` and Arrow, which take a second to import, are
imported by the functions that need them.
"""

from __future__ import annotations

import functools
import glob
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import bundled, sources
from common.errors import UserError, one_line

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

# pandas would read the texts "NA", "None" and "null" as missing; only a missing cell is missing
# here.
CSV_OPTIONS: dict[str, Any] = {"keep_default_na": False}
# file name extension -> builder of `datasets`, options
FILE_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", CSV_OPTIONS),
    ".tsv": ("csv", {**CSV_OPTIONS, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # as in train-00000-of-00002.parquet
TEXT_KINDS = ("string", "large_string")


@functools.cache
def _keep_library_quiet() -> None:
    import datasets

    if not sys.stderr.isatty():  # its bars are meant for a terminal
        datasets.disable_progress_bars()
    # what it logs about a broken file is in the exception that it raises
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


def read(name: str, *, config: str | None = None, cache_dir: str | None = None) -> datasets.DatasetDict:
    """Return a data set unchanged: every split, every column.

    `name`: a bundled name; a CSV, TSV, JSON, JSONL or Parquet file (one split, `train`); a folder
    with one folder of .txt files per class, or with `train`, `validation`, `test` folders of such
    folders; a folder of data files named after their splits; a Hub id, with `config` where it has
    several configurations. Raises UserError when it can't be found, reached or read.
    """
    import datasets

    _keep_library_quiet()
    sources.check_data(name)
    path = Path(name)
    if bundled.is_bundled(name):
        return datasets.DatasetDict({"train": bundled.DATASETS[name]()})
    if path.is_file():
        return datasets.DatasetDict({"train": read_file(path, cache_dir=cache_dir)})
    if path.is_dir():
        return _read_folder(path, cache_dir)
    return _read_hub(name, config, cache_dir)


def full_name(name: str) -> str:
    """Return a data set's name as seen from any folder: the absolute path of a local one, else the
    name.
    """
    return str(Path(name).resolve()) if Path(name).exists() else name


def read_file(path: Path, *, cache_dir: str | None = None) -> datasets.Dataset:
    """Return all columns of one data file, by its file name extension.

    Raises UserError for an unknown extension and for an empty, unreadable or malformed file.
    """
    import datasets
    import pyarrow as pa

    _keep_library_quiet()
    sources.check_data_file(path)
    builder, options = FILE_READERS[path.suffix.lower()]
    if builder != "parquet":
        _check_utf8(path)
    try:
        pattern = glob.escape(str(path))
        rows = datasets.load_dataset(
            builder, data_files=pattern, split="train", cache_dir=cache_dir, **options
        )
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid) as error:
        # the cache can't be written: not the file's fault
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        reason = one_line(error.__cause__ or error).rstrip(".")
        raise UserError(f"{path}: not readable as {builder}: {reason}; correct the file") from error
    except ValueError as error:
        if "no data" not in str(error):  # the library's words for a header without rows
            raise
        rows = None
    if rows is None or len(rows) == 0:
        raise UserError(f"{path}: the file has no rows; name one that has rows")
    return rows


def read_lines(name: str) -> list[str]:
    """Return the lines of a UTF-8 text file, or of standard input for "-".

    Raises UserError, naming file and line, for a file that can't be read, is empty or is not
    UTF-8.
    """
    source = _source(name)
    sources.check_text_file(name)
    content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    if not content:
        raise UserError(f"{source}: it is empty; write one text on each line")
    # str.splitlines also splits at form feeds and U+2028
    lines = content.removesuffix(b"\n").split(b"\n")
    return [
        decode_utf8(line, f"{source}, line {number}").removesuffix("\r")
        for number, line in enumerate(lines, start=1)
    ]


def decode_utf8(content: bytes, source: str) -> str:
    """Return UTF-8 bytes as text, without a byte order mark. Raises UserError, naming `source`,
    for other bytes.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x} at {error.start + 1}"
        raise UserError(f"{source}: not UTF-8 (byte {byte}); convert it to UTF-8 first") from error


def read_texts(
    name: str, *, column: str, cache_dir: str | None, allow_empty: bool = False, flag: str = "--text-column"
) -> list[str]:
    """Return the texts of a data file's column, or the lines of any other file or of standard
    input ("-").

    Raises UserError, naming the row or line, for a missing or empty text, unless `allow_empty`: a
    missing one is then "". `flag` is the flag that names the column.
    """
    sources.check_texts(name)
    if Path(name).suffix.lower() in FILE_READERS:
        rows = read_file(Path(name), cache_dir=cache_dir)
        require_column(rows.column_names, column, source=name, flag=flag)
        check_kind(rows, column, source=name, flag=flag)
        if not allow_empty:
            check_texts(rows, column, source=name)
        return [text or "" for text in rows[column][:]]
    lines = read_lines(name)
    for number, line in enumerate(lines, start=1):
        if not allow_empty and not line.strip():
            raise UserError(f"{_source(name)}, line {number}: the text is empty; remove the line")
    return lines


def require_column(names: Iterable[str], column: str, *, source: str, flag: str) -> None:
    """Raise UserError, naming `source` and the `flag` that names the column, unless `column` is
    one of `names`.
    """
    if column not in (names := list(names)):
        columns = ", ".join(names)
        raise UserError(f"{source}: no column {column!r} among {columns}; name the right one with {flag}")


def check_texts(rows: datasets.Dataset, column: str, *, source: str) -> None:
    """Raise UserError, naming `source` and the row, unless a column holds texts and none is
    missing or blank.
    """
    import pyarrow.compute as pc

    check_kind(rows, column, source=source)
    for start, block in _blocks(rows, column):
        blank = pc.equal(pc.utf8_trim_whitespace(block), "").fill_null(True)
        row = pc.index(blank, True).as_py()
        if row >= 0:
            state = "empty" if block[row].is_valid else "missing"
            row_source = f"{source}, row {start + row + 1}"
            raise UserError(
                f"{row_source}: the text in column {column!r} is {state}; remove the row or fill it in"
            )


def check_kind(rows: datasets.Dataset, column: str, *, source: str, flag: str = "--text-column") -> None:
    """Raise UserError, naming `source`, unless a column holds texts."""
    actual = kind(rows, column)
    if actual not in TEXT_KINDS:
        raise UserError(
            f"{source}: column {column!r} holds {actual}, not texts; name the right one with {flag}"
        )


def kind(rows: datasets.Dataset, column: str) -> str:
    """Return in one word what a column holds, such as string, int64 or List."""
    feature = rows.features[column]
    return getattr(feature, "dtype", type(feature).__name__)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Return the indices (n) of a sample of at most `most` of `count` items, spread evenly; all if
    there are fewer.
    """
    size = min(count, most)
    return np.arange(size) * count // max(size, 1)  # 1: no division by 0 for an empty sample


def _source(name: str) -> str:
    return "standard input" if name == "-" else name


def _check_utf8(path: Path) -> None:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            decode_utf8(line, f"{path}, line {number}")


def _blocks(rows: datasets.Dataset, column: str) -> Iterator[tuple[int, pa.ChunkedArray]]:
    """Yield a column in blocks of at most 10,000 rows, each with the number of rows before it."""
    start = 0
    tables: Any = rows.select_columns([column]).with_format("arrow")
    for table in tables.iter(batch_size=10_000):
        yield start, table[column]
        start += len(table)


def _read_folder(root: Path, cache_dir: str | None) -> datasets.DatasetDict:
    import datasets

    if any(root.glob("*/*.txt")):
        return datasets.DatasetDict({"train": _read_class_folders(root)})
    splits = [path for path in sorted(root.iterdir()) if any(path.glob("*/*.txt"))]
    if splits:  # as in the IMDb archive: train/pos, train/neg, test/pos, test/neg
        return _as_splits({path.name: _read_class_folders(path) for path in splits})
    shards: dict[str, list[datasets.Dataset]] = {}
    for file in sorted(root.iterdir()):
        if file.suffix.lower() in FILE_READERS and not file.name.startswith("."):
            shards.setdefault(SHARD.sub("", file.stem), []).append(read_file(file, cache_dir=cache_dir))
    if not shards:
        known = ", ".join(FILE_READERS)
        raise UserError(
            f"--dataset {root}: it has neither class folders of .txt files nor data files ({known}); name a"
            " folder that has them"
        )
    return _as_splits({split: datasets.concatenate_datasets(parts) for split, parts in shards.items()})


def _as_splits(parts: dict[str, datasets.Dataset]) -> datasets.DatasetDict:
    import datasets

    splits = datasets.DatasetDict()
    splits.update(parts)
    return splits


def _read_class_folders(root: Path) -> datasets.Dataset:
    import datasets

    texts, labels = [], []
    for file in sorted(root.glob("*/*.txt")):
        if file.name.startswith(".") or file.parent.name.startswith("."):
            continue
        text = decode_utf8(file.read_bytes(), str(file))
        if not text.strip():
            raise UserError(f"{file}: the text is empty; remove the file")
        texts.append(text)
        labels.append(file.parent.name)
    return datasets.Dataset.from_dict({"text": texts, "label": labels})


def _read_hub(name: str, config: str | None, cache_dir: str | None) -> datasets.DatasetDict:
    import datasets
    import httpx2
    import huggingface_hub.errors

    # if not, cached data is still used, and anything else fails at once
    reachable = sources.is_reachable()
    local = ", ".join(bundled.DATASETS)
    try:
        with sources.downloads_in(cache_dir):
            splits = datasets.load_dataset(name, config, cache_dir=cache_dir)
    except (
        datasets.exceptions.DatasetNotFoundError,
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.HFValidationError,
    ) as error:
        raise UserError(
            f"--dataset {name}: neither a local file or folder nor a data set on the Hub"
            f" ({one_line(error).rstrip('.')}); check the name (a private one needs `hf auth login`), or use"
            f" {local}"
        ) from error
    except (
        datasets.data_files.EmptyDatasetError,
        datasets.exceptions.DataFilesNotFoundError,
        datasets.exceptions.DatasetGenerationError,
    ) as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(
            f"--dataset {name}: it has no data files on the Hub that can be read: {reason}"
        ) from error
    except (ConnectionError, httpx2.TransportError) as error:
        raise UserError(
            f"--dataset {name}: no such file or folder, and the Hub can't be reached ({one_line(error)});"
            f" without a network, use a local file or {local}"
        ) from error
    except ValueError as error:
        if "config" not in str(error).lower():  # not about the choice of a configuration: a bug
            raise
        raise UserError(f"--dataset {name}: choose with --dataset-config: {one_line(error)}") from error
    except RuntimeError as error:
        if "script" not in str(error).lower():
            raise
        hint = "use a Parquet version of it"
        raise UserError(f"--dataset {name}: it needs remote code, which is never run here; {hint}") from error
    if not reachable:
        sources.say_cached(f"--dataset {name}")
    return splits
