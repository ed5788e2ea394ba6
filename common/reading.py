"""Texts from a bundled set, a file, a folder or the Hub, as they are; and the check that each is a
text with something in it.
"""

import glob
import os
import re
import sys
from pathlib import Path

import datasets
import httpx2
import huggingface_hub.errors
import huggingface_hub.utils
import pyarrow
import pyarrow.compute

from common import bundled, hub
from common.errors import UserError, one_line

# pandas would read the texts "NA", "None" and "null" as missing; only a missing cell is missing
# here.
CSV_OPTIONS = {"keep_default_na": False}
FILE_READERS = {
    ".csv": ("csv", CSV_OPTIONS),
    ".tsv": ("csv", {**CSV_OPTIONS, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}

SHARD = r"-\d{5}-of-\d{5}$"  # as in train-00000-of-00002.parquet

# the libraries' bars for downloads and tokenisation are for a person who waits
if not sys.stderr.isatty():
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
# what it logs of a broken file is in the exception that it raises
datasets.logging.set_verbosity(datasets.logging.CRITICAL)


def read(name: str, *, config: str | None = None, cache_dir: str | None = None) -> datasets.DatasetDict:
    """Read a data set as it is: every split, every column.

    `name`: a bundled name; a CSV, TSV, JSON, JSONL or Parquet file (one split, `train`); a folder
    with one folder of .txt files per class, or with `train`, `validation`, `test` folders of such
    folders; a folder of data files named after their splits; a Hub id, with `config` where it has
    several. Raises UserError when it can't be found, reached or read.
    """
    path = Path(name)
    if bundled.is_bundled(name):
        if name not in bundled.DATASETS:
            raise UserError(
                f"--dataset {name}: no such bundled data set; there is {', '.join(bundled.DATASETS)}"
            )
        return datasets.DatasetDict(train=bundled.DATASETS[name]())
    if path.is_file():
        return datasets.DatasetDict(train=read_file(path, cache_dir=cache_dir))
    if path.is_dir():
        return _read_folder(path, cache_dir)
    if path.suffix in FILE_READERS or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"--dataset {name}: no such file or folder; check the path")
    return _read_hub(name, config, cache_dir)


def full_name(name: str) -> str:
    """Return the name under which a data set is the same from any folder: of a local one the whole
    path, of others the name.
    """
    return str(Path(name).resolve()) if Path(name).exists() else name


def read_file(path: Path, *, cache_dir: str | None = None) -> datasets.Dataset:
    """Read one data file by its ending, all columns. Raises UserError for an unknown ending, an
    empty or a broken file.
    """
    if path.suffix.lower() not in FILE_READERS:
        raise UserError(
            f"{path}: the ending {path.suffix!r} is not one of {', '.join(FILE_READERS)}; save it as one of"
            " these"
        )
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no right to read it; ask for it with chmod or name another file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; name one that has rows")
    builder, options = FILE_READERS[path.suffix.lower()]
    if builder != "parquet":
        _check_utf8(path)
    try:
        rows = datasets.load_dataset(
            builder, data_files=glob.escape(str(path)), split="train", cache_dir=cache_dir, **options
        )
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        # the cache can't be written: not the file's fault
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise UserError(
            f"{path}: not readable as {builder}: {one_line(error.__cause__ or error).rstrip('.')}; correct"
            " the file"
        ) from error
    except ValueError as error:
        if "no data" not in str(error):  # what the library says of a header without rows
            raise
        rows = []
    if len(rows) == 0:
        raise UserError(f"{path}: the file has no rows; name one that has rows")
    return rows


def read_lines(name: str) -> list[str]:
    """Return the lines of a UTF-8 text file, or of standard input for "-". Raises UserError with
    the file and the line.
    """
    place = {"-": "standard input", "": "the empty name"}.get(name, name)
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UserError(
            f"{place}: can't be read: {error.strerror}; name a text file, or - for standard input"
        ) from error
    if not content:
        raise UserError(f"{place}: it is empty; write one text on each line")
    # str.splitlines would also part a text at a form feed or U+2028
    lines = content.removesuffix(b"\n").split(b"\n")
    return [
        _decode(line, f"{place}, line {number}").removesuffix("\r")
        for number, line in enumerate(lines, start=1)
    ]


def _decode(content: bytes, place: str) -> str:
    try:
        # some programs write a byte order mark: it is no part of the text
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{place}: not UTF-8 (byte {byte:#04x} at {error.start + 1}); convert the file to UTF-8 first"
        ) from error


def _check_utf8(path: Path):
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            _decode(line, f"{path}, line {number}")


def read_texts(
    name: str, *, column: str, cache_dir: str | None, allow_empty: bool = False, flag: str = "--text-column"
) -> list[str]:
    """Return the texts of a data file's column, or the lines of any other file or of standard
    input ("-"), after checking each.

    Raises UserError, naming the row or line, for one that is missing or empty, unless
    `allow_empty`: a missing one is then "". `flag` names the column.
    """
    if Path(name).suffix.lower() in FILE_READERS:
        if not Path(name).is_file():
            raise UserError(f"{name}: no such file; check the path")
        rows = read_file(Path(name), cache_dir=cache_dir)
        if column not in rows.features:
            raise UserError(
                f"{name}: no column {column!r}; there is {', '.join(rows.column_names)}; name the right one"
                f" with {flag}"
            )
        check_kind(rows, column, place=name, flag=flag)
        if not allow_empty:
            check_texts(rows, column, place=name)
        return [text or "" for text in rows[column][:]]
    lines = read_lines(name)
    for number, line in enumerate(lines, start=1):
        if not allow_empty and not line.strip():
            raise UserError(
                f"{'standard input' if name == '-' else name}, line {number}: the text is empty; remove the"
                " line"
            )
    return lines


def _read_folder(root: Path, cache_dir: str | None) -> datasets.DatasetDict:
    if any(root.glob("*/*.txt")):
        return datasets.DatasetDict(train=_read_class_folders(root))
    splits = [path for path in sorted(root.iterdir()) if any(path.glob("*/*.txt"))]
    if splits:  # as in the IMDb archive: train/pos, train/neg, test/pos, test/neg
        return datasets.DatasetDict({path.name: _read_class_folders(path) for path in splits})
    parts: dict[str, list] = {}
    for file in sorted(
        path
        for path in root.iterdir()
        if path.suffix.lower() in FILE_READERS and not path.name.startswith(".")
    ):
        parts.setdefault(re.sub(SHARD, "", file.stem), []).append(read_file(file, cache_dir=cache_dir))
    if not parts:
        raise UserError(
            f"--dataset {root}: neither class folders of .txt files nor data files"
            f" ({', '.join(FILE_READERS)}) in it; name a folder that has them"
        )
    return datasets.DatasetDict(
        {split: datasets.concatenate_datasets(files) for split, files in parts.items()}
    )


def _read_class_folders(root: Path) -> datasets.Dataset:
    files = sorted(
        path
        for path in root.glob("*/*.txt")
        if not path.name.startswith(".") and not path.parent.name.startswith(".")
    )
    texts = []
    for file in files:
        texts.append(_decode(file.read_bytes(), str(file)))
        if not texts[-1].strip():
            raise UserError(f"{file}: the text is empty; remove the file")
    return datasets.Dataset.from_dict({"text": texts, "label": [file.parent.name for file in files]})


def _read_hub(name: str, config: str | None, cache_dir: str | None) -> datasets.DatasetDict:
    # if not, what is cached is still used, and what is not fails at once
    reachable = hub.is_reachable()
    try:
        with hub.downloads_in(cache_dir):
            found = datasets.load_dataset(name, config, cache_dir=cache_dir)
    except (
        datasets.exceptions.DatasetNotFoundError,
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.HFValidationError,
    ) as error:
        raise UserError(
            f"--dataset {name}: neither a local file or folder nor a data set on the Hub:"
            f" {one_line(error).rstrip('.')}; check the name (a private one needs `hf auth login`), or use"
            f" {', '.join(bundled.DATASETS)}"
        ) from error
    except (
        datasets.data_files.EmptyDatasetError,
        datasets.exceptions.DataFilesNotFoundError,
        datasets.exceptions.DatasetGenerationError,
    ) as error:
        raise UserError(
            f"--dataset {name}: the Hub has it, but no data files that can be read:"
            f" {one_line(error.__cause__ or error)}"
        ) from error
    except (ConnectionError, httpx2.TransportError) as error:
        raise UserError(
            f"--dataset {name}: no such local file or folder, and the Hub can't be reached:"
            f" {one_line(error)}; without a network use a local file or {', '.join(bundled.DATASETS)}"
        ) from error
    except ValueError as error:
        if "config" not in str(error).lower():  # not about the choice of a configuration: a bug
            raise
        raise UserError(f"--dataset {name}: choose with --dataset-config: {one_line(error)}") from error
    except RuntimeError as error:
        if "script" not in str(error).lower():
            raise
        raise UserError(
            f"--dataset {name}: it needs remote code, which is never run here; use a Parquet version of it"
        ) from error
    if not reachable:
        hub.say_cached(f"--dataset {name}")
    return found


def check_texts(rows: datasets.Dataset, column: str, *, place: str):
    """Raise UserError, naming `place` and the row, unless each value of a column is a text with
    something in it.
    """
    check_kind(rows, column, place=place)
    for start, block in _blocks(rows, column):
        blank = pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(block), "").fill_null(True)
        row = pyarrow.compute.index(blank, True).as_py()
        if row >= 0:
            state = "missing" if not block[row].is_valid else "empty"
            raise UserError(
                f"{place}, row {start + row + 1}: the text in column {column!r} is {state}; remove the row or"
                " fill it in"
            )


def check_kind(rows: datasets.Dataset, column: str, *, place: str, flag: str = "--text-column"):
    """Raise UserError, naming `place`, unless a column holds texts."""
    if kind(rows, column) not in ("string", "large_string"):
        raise UserError(
            f"{place}: column {column!r} holds {kind(rows, column)}, not texts; name the right one with"
            f" {flag}"
        )


def kind(rows: datasets.Dataset, column: str) -> str:
    """Return in one word what a column holds, such as string, int64 or List."""
    feature = rows.features[column]
    return getattr(feature, "dtype", type(feature).__name__)


def _blocks(rows: datasets.Dataset, column: str):
    start = 0
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        yield start, table[column]
        start += len(table)
