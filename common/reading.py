"""Read texts from a bundled set, a file, a folder or the Hub, and check that each one can be used.

The lines of a text file need no library: `datasets` and Arrow, which take a second to import, are
imported by the functions that need them, as are the readers of data files: `common/delimited.py`,
`common/json_rows.py`, `common/tables.py`.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from common import bundled, dialects, hub, json_objects, sources
from common.columns import named_columns, possible_columns, require_column
from common.errors import Fault, UserError, first_repeated, listed, note, outcome, shorten
from common.plain_files import (
    SAMPLE,
    DataFile,
    decode_utf8,
    not_encoded,
    open_plain,
    refuse_utf16,
    source_name,
)
from common.sources import DATA_SUFFIXES, JSON_SUFFIXES, FileOptions

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow as pa

SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")  # as in train-00000-of-00002.parquet
TEXT_SUFFIXES = (".txt", ".md")  # of the files in folders of texts
UNLABELLED = ("unsup", "unlabeled", "unlabelled")  # no class: IMDb's texts without labels
TEXT_KINDS = ("string", "large_string")
READ_AT_ONCE = 8 << 20  # bytes of JSON that are looked at before the libraries are loaded
LONGEST_TEXT = 10_000_000  # characters; more is no text but a file in a single line
T = TypeVar("T")
AS_FOUND = FileOptions()  # nothing but what name and content of a file show


@functools.cache
def _keep_library_quiet() -> None:
    import datasets

    if not sys.stderr.isatty():  # its bars are meant for a terminal
        datasets.disable_progress_bars()
    # what it logs about a broken file is in the exception that it raises
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


# Data sets ----------------------------------------------------------------------------------------


def read(
    name: str,
    *,
    as_text: Sequence[str] = (),
    options: FileOptions = AS_FOUND,
    config: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    faults: list[Fault] | None = None,
) -> datasets.DatasetDict:
    """Return a data set unchanged: every split, every column.

    `name`: a bundled name; a data file (one split, `train`); a folder with one folder of text files
    per class, or with `train`, `validation`, `test` folders of such folders; a folder of data files
    named after their splits; a Hub id, with `config` where it has several configurations, of a
    `revision` (a commit, branch or tag). `as_text` are the columns of texts and labels, which stay
    as they are written; "a.b" is the field b of column a. With a list `faults`, rows that can't be
    read are added to it and left out, and the others of a local file have their number in a column
    ROW. Raises UserError when the data can't be found, reached or read.
    """
    import datasets

    _keep_library_quiet()
    sources.check_data(name, any_suffix=options.is_table)
    path = Path(name)
    if bundled.is_bundled(name):
        return datasets.DatasetDict({"train": bundled.DATASETS[name]()})
    read_one = functools.partial(
        read_file, as_text=as_text, options=options, cache_dir=cache_dir, faults=faults
    )
    kind = sources.kind_of_path(path)
    if kind in ("file", "pipe"):
        return datasets.DatasetDict({"train": read_one(path)})
    if kind == "folder":
        return _read_folder(path, read_one, encoding=options.encoding, faults=faults)
    splits = hub.read_dataset(name, config, revision, cache_dir)
    for split, rows in splits.items():
        splits[split] = _with_fields(rows, as_text)
    return splits


def full_name(name: str) -> str:
    """Return the name of a model or data set as seen from any folder: the absolute path of a local one,
    else the name.
    """
    return str(Path(name).resolve()) if Path(name).exists() else name


def read_file(
    path: Path,
    *,
    as_text: Sequence[str] = (),
    options: FileOptions = AS_FOUND,
    cache_dir: str | None = None,
    faults: list[Fault] | None = None,
) -> datasets.Dataset:
    """Return all columns of one data file; the columns `as_text` stay as they are written.

    Raises UserError for an unknown extension and for an empty, unreadable or malformed file.
    """
    sources.check_data_file(path, any_suffix=options.is_table)
    with open_plain(str(path), encoding=options.encoding, folder=cache_dir) as file:
        return read_table(
            file, str(path), as_text=as_text, options=options, cache_dir=cache_dir, faults=faults
        )


def read_table(
    file: BinaryIO,
    name: str,
    *,
    as_text: Sequence[str],
    options: FileOptions,
    cache_dir: str | None,
    faults: list[Fault] | None = None,
) -> datasets.Dataset:
    """Return the rows of a data file that is open and plain; messages call it `name`."""
    data = DataFile(file, name, options, tuple(as_text), cache_dir, faults)
    rows = _as_dataset(_read_rows(data), name, as_text)
    if len(rows) == 0 and faults:
        problem = f"none of its rows can be read: {faults[0].problem}"
        raise UserError(f"{name}: {problem}; correct the file, or name its --encoding")
    if len(rows) == 0:
        raise UserError(f"{name}: the file has no rows; name one that has rows")
    return _with_fields(rows, as_text)


def or_advise_to_skip(read: Callable[..., T], faults: list[Fault] | None) -> T:
    """Return what `read` makes of a file with these `faults`, as `read_table` takes them. Where it fails
    because of rows that it would leave out with a list of faults, the error names --skip-bad.
    """
    try:
        return read(faults=faults)
    except UserError as error:
        left_out: list[Fault] = []
        if faults is not None or isinstance(outcome(read, faults=left_out), UserError) or not left_out:
            raise
        raise UserError(f"{error}, or leave such rows out with --skip-bad") from error


def _read_rows(data: DataFile) -> pa.Table:
    """Return the table of a data file: read as its ending says, and without one as its options say
    or its content shows.
    """
    from common import delimited, json_rows, tables

    ending, options = sources.suffix(data.name), data.options
    if ending == ".parquet":
        return tables.read_parquet(data)
    if ending in JSON_SUFFIXES:
        return json_rows.read(data)
    if options.delimiter is not None and (options.delimiter == " " or len(options.delimiter) > 1):
        return delimited.read_split_lines(data, options.delimiter)
    if ending in DATA_SUFFIXES or options.is_table:
        return delimited.read(data)
    if data.head().startswith(sources.FASTTEXT_LABEL):
        return delimited.read_fasttext(data)
    return json_rows.read(data)


def _as_dataset(table: pa.Table, name: str, as_text: Sequence[str]) -> datasets.Dataset:
    """Return a table as a data set, without the columns whose kind the library does not know."""
    import datasets
    import pyarrow as pa

    _keep_library_quiet()
    twice = first_repeated(table.column_names)
    if twice is not None:
        raise UserError(f"{name}: two columns have the name {twice!r}; rename one of them")
    unusable = []
    for field in table.schema:
        problem = f"column {field.name!r} holds {shorten(str(field.type), 60)}, which can't be used"
        try:
            # it has limits that show only when it writes the type: how deep it is nested
            features = datasets.Features.from_arrow_schema(pa.schema([field]))
            if list(features.arrow_schema.names) == [field.name]:
                continue
            problem = f"the name of column {field.name!r} holds a null character, and can't be used"
        except (ValueError, NotImplementedError, RecursionError) as error:
            if field.name in as_text:
                raise UserError(f"{name}: {problem}; convert it") from error
        unusable.append(field.name)
        note(f"{name}: {problem}; it is left out")
    table = table.drop_columns(unusable)
    # without a fingerprint the library would make one of the whole content, and nothing needs it
    fingerprint = datasets.fingerprint.generate_random_fingerprint()
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=fingerprint)


def _with_fields(rows: datasets.Dataset, wanted: Sequence[str]) -> datasets.Dataset:
    """Return rows with a column "a.b" for the field b of column a, if one that is wanted is named
    like this.
    """
    missing = [name for name in wanted if name not in rows.column_names]
    if any(name.split(".")[0] in rows.column_names for name in missing if "." in name):
        rows = rows.flatten()
        twice = first_repeated(rows.data.column_names)
        if twice is not None:
            problem = f"a column and a field of a column have the name {twice!r}"
            raise UserError(f"{problem}; rename one of them")
    return rows


# Lines and texts ----------------------------------------------------------------------------------


def read_lines(name: str, *, encoding: str | None = None) -> list[str]:
    """Return the lines of a UTF-8 text file, or of standard input for "-".

    Raises UserError, naming file and line, for a file that can't be read, is empty or is not
    UTF-8.
    """
    sources.check_text_file(name)
    with open_plain(name, encoding=encoding) as file:
        return list(lines_of(file, source_name(name)))


def lines_of(file: BinaryIO, source: str) -> Iterator[str]:
    """Yield the lines of a text file that is open and plain. Raises UserError, naming `source` and
    the line, for one that is not UTF-8.
    """
    # str.splitlines also splits at form feeds and U+2028
    for number, line in enumerate(raw_lines(file), start=1):
        yield decode_utf8(line, f"{source}, line {number}")


def raw_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file without their ends. They end at a line feed, with or without a
    carriage return, or in a file without any at a carriage return, as on the first Macs.
    """
    file.seek(0)
    head = file.read(LONGEST_TEXT)
    file.seek(0)
    if b"\n" not in head and b"\r" in head:
        yield from file.read().removesuffix(b"\r").split(b"\r")
        return
    for line in file:
        yield line.removesuffix(b"\n").removesuffix(b"\r")


def read_texts(
    name: str,
    *,
    column: str,
    cache_dir: str | None,
    flag: str = "--text-column",
    options: FileOptions = AS_FOUND,
) -> list[str]:
    """Return the texts of a data file's column, or the lines of any other file or of standard
    input ("-"), which may be JSON too; a missing text is "".

    Raises UserError, naming the row or line, for one that is not UTF-8. `flag` is the flag that names
    the column.
    """
    sources.check_texts(name, any_suffix=options.is_table)
    source = source_name(name)
    with open_plain(name, encoding=options.encoding, folder=cache_dir) as file:
        if not is_table(file, name, options):
            lines = list(lines_of(file, source))
            for number, line in enumerate(lines, start=1):
                check_length(line, f"{source}, line {number}")
            return lines
        rows = read_table(file, source, as_text=[column], options=options, cache_dir=cache_dir)
    require_column(rows.column_names, column, source=source, flag=flag)
    check_kind(rows, column, source=source, flag=flag)
    check_characters(rows.data.column(column), f"{source}, row", first=1)
    return [text or "" for text in rows[column][:]]


def join_cells(cells: list[list[str | None]], join_with: str) -> list[str]:
    """Return one text for each row of several columns (columns x N), without blank cells."""
    return [
        join_with.join(cell for cell in row if cell is not None and not sources.is_blank(cell))
        for row in zip(*cells)
    ]


def is_table(file: BinaryIO, name: str, options: FileOptions) -> bool:
    """Return whether an open file holds rows with columns, and not a text on each line: by its
    ending, by the flags, as fastText's labels show, or for standard input if it begins as JSON.
    """
    if sources.suffix(name) in DATA_SUFFIXES or options.is_table:
        return True
    file.seek(0)
    head = file.read(SAMPLE).removeprefix(codecs.BOM_UTF8)
    if name != "-":
        return head.startswith(sources.FASTTEXT_LABEL.encode())
    return re.match(rb'\s*(\[\s*)?\{\s*"', head) is not None


def text_problem(text: str | None) -> str:
    """Return what is wrong with a text, "" if nothing is."""
    if text is None:
        return "the text is missing"
    if sources.is_blank(text):
        return "the text is empty"
    if len(text) > LONGEST_TEXT:
        return f"the text has more than {LONGEST_TEXT:,} characters"
    return ""


def check_length(text: str, location: str) -> None:
    """Raise UserError, naming `location`, for a text that is too long to be one."""
    if len(text) > LONGEST_TEXT:
        problem = f"the text has {len(text):,} characters, more than {LONGEST_TEXT:,}"
        raise UserError(f"{location}: {problem}; cut it up")


# What a file's beginning shows -----------------------------------------------------------------


def check_columns(
    name: str,
    wanted: Mapping[str, str],
    *,
    several: Mapping[str, str] | None = None,
    options: FileOptions,
    source: str = "",
) -> None:
    """Raise UserError for a file that is no text, and for a column that it lacks, as far as this shows
    before any library is loaded: for local files, neither compressed nor in another encoding.

    `wanted` are columns with the flags that name them, `several` values of flags that may name more than
    one, with these flags; messages call the file `source`.
    """
    with open_if_plain(name, options) as file:
        if file is not None:
            check_header(file, name, wanted, several=several, options=options, source=source)


def names_at_once(name: str, wanted: Sequence[str], *, options: FileOptions) -> list[str]:
    """Return the names of a file's columns, or none where `check_columns` can't see them. `wanted` are
    values of flags that may name several.
    """
    with open_if_plain(name, options) as file:
        if file is None or not is_table(file, name, options):
            return []
        return _names_at_once(file, name, wanted, options)


@contextlib.contextmanager
def open_if_plain(name: str, options: FileOptions) -> Iterator[BinaryIO | None]:
    """Yield a local file if it can be read as it is, else None. Raises UserError where it is no text."""
    is_utf8 = options.encoding is None or codecs.lookup(options.encoding).name == "utf-8"
    is_compressed = Path(name).suffix.lower() in sources.COMPRESSED_SUFFIXES
    if name == "-" or is_compressed or not is_utf8 or sources.kind_of_path(name) != "file":
        yield None
        return
    with open_plain(name) as file:
        yield file


def check_header(
    file: BinaryIO,
    name: str,
    wanted: Mapping[str, str],
    *,
    several: Mapping[str, str] | None = None,
    options: FileOptions,
    source: str = "",
) -> None:
    """Raise UserError for a column that an open file lacks, as `check_columns` does."""
    several = several or {}
    if not (wanted or several) or not is_table(file, name, options):
        return
    names = _names_at_once(file, name, [*wanted, *several], options)
    if not names:
        return
    parts = [(part, flag) for text, flag in several.items() for part in named_columns(text, names, flag=flag)]
    for column, flag in [*wanted.items(), *parts]:
        if column in names:
            continue
        outer, inner = column.partition(".")[0], _inner_rows(file, name, options)
        if inner is not None and (outer == inner or outer not in names):
            problem = f"no column {column!r} among {listed(names)}, the keys of its only object"
            advice = f"if its rows are the list {inner!r}, save this list as a file"
            raise UserError(f"{source or name}: {problem}; {advice}, such as with jq {_jq_filter(inner)}")
        if outer not in names:  # "a.b" may be a field of column a
            require_column(names, column, source=source or name, flag=flag)


def _inner_rows(file: BinaryIO, name: str, options: FileOptions) -> str | None:
    """Return the key of the only list of objects in a file of JSON that is one object, as services on
    the web send their rows: None if it is another file, or has several.
    """
    if sources.suffix(name) not in JSON_SUFFIXES:
        return None
    rows = json_objects.read_objects(DataFile(file, name, options, (), None))
    (_, _, first), *others = itertools.islice(rows, 2)
    inner = [key for key, value in first.items() if isinstance(value, list) and _are_objects(value)]
    return inner[0] if len(inner) == 1 and not others else None


def _jq_filter(key: str) -> str:
    """Return what a shell must hand to jq for the value of a key."""
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key)
    return f"'.{key}'" if plain else shlex.quote(f".[{json.dumps(key, ensure_ascii=False)}]")


def _are_objects(values: list) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _names_at_once(file: BinaryIO, name: str, wanted: Sequence[str], options: FileOptions) -> list[str]:
    """Return the names of a file's columns, or none where it takes a library to find them, or where
    the reader will say what is wrong with it. Of JSON, those of the first rows that have all `wanted`,
    each under its whole name.
    """
    ending = sources.suffix(name)
    as_text = tuple(column for text in wanted for column in possible_columns(text))
    data = DataFile(file, name, options, as_text, None)
    if ending in JSON_SUFFIXES:
        names: dict[str, None] = {}
        if os.fstat(file.fileno()).st_size > READ_AT_ONCE:
            return []
        try:
            for _, _, row in json_objects.read_objects(data):
                names |= dict.fromkeys(row)
                if names.keys() >= {*wanted}:
                    break
        except (UserError, UnicodeDecodeError, RecursionError):
            return []
        return list(names)
    if ending == ".parquet" or not (ending in DATA_SUFFIXES or options.is_table):
        return []
    if options.columns is not None:
        return list(options.columns)
    delimiter = dialects.choose_delimiter(data)
    if delimiter == " " or len(delimiter) > 1:
        return []
    is_uncertain = delimiter == "\t" and options.quoting == "auto"  # only all of the file tells
    quoted = options.quoting != "none" and not is_uncertain
    header = dialects.find_names(data, delimiter, quoted=quoted)
    is_uncertain = is_uncertain and any('"' in name for name in header)
    return [] if is_uncertain or "\ufffd" in "".join(header) else header


# Checks -------------------------------------------------------------------------------------------


def check_texts(
    rows: datasets.Dataset, column: str, *, source: str, advice: str = "remove the row or fill it in"
) -> None:
    """Raise UserError, naming `source` and the row, unless a column holds texts and none is
    missing or blank.
    """
    import pyarrow.compute as pc

    check_kind(rows, column, source=source)
    start = 0
    tables: Any = rows.select_columns([column]).with_format("arrow")
    for table in tables.iter(batch_size=10_000):
        block = table[column]
        check_characters(block, f"{source}, row", first=start + 1)
        blank = pc.match_substring_regex(block, sources.BLANK).fill_null(True)
        row = pc.index(blank, True).as_py()
        if row >= 0:
            state = "empty" if block[row].is_valid else "missing"
            problem = f"the text in column {column!r} is {state}; {advice}"
            raise UserError(f"{source}, row {start + row + 1}: {problem}")
        longest = pc.max(pc.utf8_length(block)).as_py()
        if longest > LONGEST_TEXT:
            row = pc.index(pc.utf8_length(block), longest).as_py()
            check_length(block[row].as_py(), f"{source}, row {start + row + 1}")
        start += len(block)


def check_characters(column: pa.ChunkedArray, source: str, *, first: int) -> None:
    """Raise UserError, naming `source` and the number of the row (the first being `first`), for a
    string that is not UTF-8: Arrow reads it unchecked from a Parquet file.
    """
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for number, value in enumerate(column, start=first):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise UserError(f"{source} {number}: not UTF-8; correct the row") from error
        raise


def check_kind(rows: datasets.Dataset, column: str, *, source: str, flag: str = "--text-column") -> None:
    """Raise UserError, naming `source`, unless a column holds texts."""
    actual = kind(rows, column)
    if actual not in TEXT_KINDS:
        problem = f"column {column!r} holds {actual}, not texts"
        raise UserError(f"{source}: {problem}; name the right one with {flag}")


def kind(rows: datasets.Dataset, column: str) -> str:
    """Return in one word what a column holds, such as string, int64 or List."""
    feature = rows.features[column]
    return getattr(feature, "dtype", type(feature).__name__)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Return the indices (n) of a sample of at most `most` of `count` items, spread evenly; all if
    there are fewer.
    """
    import numpy as np

    size = min(count, most)
    return np.arange(size) * count // max(size, 1)  # 1: no division by 0 for an empty sample


# Folders ------------------------------------------------------------------------------------------


def _read_folder(
    root: Path,
    read_one: Callable[[Path], datasets.Dataset],
    *,
    encoding: str | None,
    faults: list[Fault] | None,
) -> datasets.DatasetDict:
    """Return the splits of a folder, whose data files `read_one` reads; raise UserError where only
    a part of it would be read.
    """
    import datasets

    named_as_data = [path for path in entries_of(root) if sources.suffix(path) in DATA_SUFFIXES]
    files = [path for path in named_as_data if path.is_file()]
    classes = [folder for folder in _folders_in(root) if texts_in(folder)]
    splits = [folder for folder in _folders_in(root) if any(map(texts_in, _folders_in(folder)))]
    if files and (classes or splits):
        raise UserError(
            f"--dataset {root}: it has both data files ({files[0].name}) and folders of texts"
            f" ({(splits or classes)[0].name}); name one of them"
        )
    odd = next((path for path in named_as_data if path not in files), None)
    if files and odd is not None:
        raise UserError(f"--dataset {root}: {odd.name} is no file; move it, or name one of the files")
    if files:
        return _read_split_files(root, files, read_one)
    if splits:  # as in the IMDb archive: train/pos, train/neg, test/pos, test/neg
        lone = next((folder for folder in classes if folder not in splits), None)
        if lone is not None:
            raise UserError(
                f"--dataset {root}: {lone.name} holds texts, and {splits[0].name} holds folders of"
                " texts: are these classes or splits? Move one of them"
            )
        parts = datasets.DatasetDict()
        for path in splits:
            parts[path.name] = _read_class_folders(path, encoding, faults)
        return parts
    if classes:
        return datasets.DatasetDict({"train": _read_class_folders(root, encoding, faults)})
    problem = f"it has neither class folders of .txt files nor data files ({', '.join(DATA_SUFFIXES)})"
    raise UserError(f"--dataset {root}: {problem}; name a folder that has them")


def entries_of(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted, without what is hidden. Raises UserError where something
    can't be looked at.
    """
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        for path in entries:
            path.stat()
    except OSError as error:
        raise _unreadable(str(error.filename), error) from error
    return entries


def _unreadable(name: str, error: OSError) -> UserError:
    return UserError(f"{name}: can't be read: {error.strerror}; correct or remove it")


def texts_in(folder: Path) -> list[Path]:
    """Return the files of a folder that hold texts: those that end with .txt or .md, or if there
    are none, those without an ending, as in 20 Newsgroups.
    """
    files = [path for path in entries_of(folder) if path.is_file()]
    texts = [path for path in files if path.suffix.lower() in TEXT_SUFFIXES]
    return texts or [path for path in files if not path.suffix]


def _folders_in(folder: Path) -> list[Path]:
    return [path for path in entries_of(folder) if path.is_dir()]


def _read_split_files(
    root: Path, files: list[Path], read_one: Callable[[Path], datasets.Dataset]
) -> datasets.DatasetDict:
    """Return the splits of a folder of data files, each of one file or of a complete set of
    shards.
    """
    import datasets

    from common import tables

    shards: dict[str, list[Path]] = {}
    for file in files:
        shards.setdefault(SHARD.sub("", _stem(file)), []).append(file)
    for split, parts in shards.items():
        _check_shards(root, split, parts)
    splits = datasets.DatasetDict()
    for split, parts in shards.items():
        rows = [read_one(part) for part in parts]
        if len(rows) > 1:
            rows = [_as_dataset(tables.joined([part.data.table for part in rows]), "", [])]
        splits[split] = rows[0]
    return splits


def _stem(file: Path) -> str:
    return file.name[: file.name.lower().rindex(sources.suffix(file))]


def _check_shards(root: Path, split: str, parts: list[Path]) -> None:
    numbers = [SHARD.search(_stem(part)) for part in parts]
    if len(parts) == 1 and numbers[0] is None:
        return
    if None in numbers or len({sources.suffix(part) for part in parts}) > 1:
        raise UserError(
            f"--dataset {root}: {parts[0].name} and {parts[1].name} are both the split {split!r};"
            " keep one of them, or name it with --train-file"
        )
    found = [(int(match[1]), int(match[2])) for match in numbers if match is not None]
    total = found[0][1]
    if sorted(found) != [(number, total) for number in range(total)]:
        problem = f"{len(found)} of {total} parts of the split {split!r} are there"
        raise UserError(f"--dataset {root}: {problem}; add the rest")


def _read_class_folders(root: Path, encoding: str | None, faults: list[Fault] | None) -> datasets.Dataset:
    import datasets

    texts, labels = [], []
    folders = [folder for folder in _folders_in(root) if texts_in(folder)]
    unlabelled = [folder for folder in folders if folder.name.lower() in UNLABELLED]
    if unlabelled and len(folders) > 2:
        note(f"{unlabelled[0]}: its texts have no label; they are left out")
        folders = [folder for folder in folders if folder not in unlabelled]
    _note_unread(root, [*folders, *unlabelled], what="class folders")
    for folder in folders:
        found = texts_in(folder)
        _note_unread(folder, found, what="texts")
        for file in found:
            try:
                text = read_text(file, encoding)
                if sources.is_blank(text):
                    raise UserError(f"{file}: the text is empty; remove the file")
                check_length(text, str(file))
            except UserError as error:
                if faults is None:
                    raise
                problem = str(error).removeprefix(f"{file}: ").partition(";")[0]
                faults.append(Fault(str(file), 1, problem, ""))
                continue
            texts.append(text)
            labels.append(folder.name)
    return datasets.Dataset.from_dict({"text": texts, "label": labels})


def _note_unread(folder: Path, found: list[Path], *, what: str) -> None:
    """Say what else is in a folder, except the files that describe it."""
    others = [path for path in entries_of(folder) if path not in found]
    others = [path for path in others if not path.name.lower().startswith(("readme", "licen"))]
    if others:
        problem = f"{len(others)} of its entries are no {what} and not read"
        note(f"{folder}: {problem}, such as {others[0].name}")


def read_text(file: Path, encoding: str | None) -> str:
    """Return the one text that a file of a folder holds, without the line breaks at its end, which most
    editors write: as a cell of a CSV holds it. Raises UserError for one that can't be read or decoded.
    """
    if sources.kind_of_path(file) != "file":
        raise UserError(f"{file}: this is no file; remove it")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _unreadable(str(file), error) from error
    if encoding is None:
        refuse_utf16(content, str(file))
        return decode_utf8(content, str(file)).rstrip("\r\n")
    try:
        return content.decode(encoding).removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise not_encoded(str(file), encoding, error) from error
