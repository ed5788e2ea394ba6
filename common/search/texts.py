"""A collection of texts from any source: lines, a data file, a folder of .txt files, a bundled set.

Wherever its texts come from, a collection is an Arrow table over memory-mapped files, never held in
memory as a whole: the column TEXT, and the columns that came with it. Texts and ids are checked
when they are read.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common import bundled, plain_files, reading, sources
from common.columns import ROW, named_columns, possible_columns, require_column
from common.errors import Fault, UserError, note
from common.search.segments import EXPORTED, OWN_NAMES, TEXT, number_array, text_array

if TYPE_CHECKING:
    import datasets

BATCH = 10_000  # rows checked, or written, at once
MERGED_AT_LEAST = 65_536  # entries that a RowTable collects before it sorts them in
MARKDOWN = ".md"  # such a file is one text, as in a folder; a .txt file alone has one in each line
USUAL_IDS = ("id", "_id")  # the second is that of BEIR and Mongo
ANY_ID = "id or _id"  # stands for the first of them that is there


class Part(NamedTuple):
    """One of the sources of a collection. `unit` is what a row is there: "line", "row", "file" of a
    folder, or "text": all of it. `text_column`: as in Collection.
    """

    first_row: int
    name: str
    unit: str
    text_column: str | None = None


@dataclass(frozen=True)
class Collection:
    """Texts and where they come from. `rows` is an Arrow table: the texts in the column TEXT, and
    the other columns, the metadata. `bad`: row -> why it is skipped. `text_column`: the name of the
    column that had the texts, None for those of no table.
    """

    name: str
    rows: pa.Table
    unit: str  # as in Part
    bad: dict[int, str]
    id_column: str | None = None
    parts: tuple[Part, ...] = ()  # one for each of several sources
    text_column: str | None = None

    def location(self, row: int) -> str:
        """Return where a row is in its source, for a person."""
        parts = [part for part in self.parts if part.first_row <= row]
        first, name, unit, _ = parts[-1] if parts else Part(0, self.name, self.unit)
        if unit == "text":
            return name
        if unit == "file":
            return str(Path(name) / self.rows["file"][row].as_py())
        return f"{name}, {unit} {row - first + 1}"

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
class TextSource:
    """Which texts to read, and how. `as_text`: columns whose cells stay as they are written."""

    name: str
    text_column: str
    id_column: str | None
    options: sources.FileOptions
    cache_dir: str | None
    as_text: tuple[str, ...] = ()

    @property
    def is_json(self) -> bool:
        """Whether a data file of this name is JSON."""
        is_table = self.options.is_table
        is_json_stream = self.name == "-" and not is_table
        return is_json_stream or sources.suffix(self.name) in sources.JSON_SUFFIXES


def read(
    names: str | Sequence[str],
    *,
    text_column: str,
    id_column: str | None = None,
    as_text: Sequence[str] = (),
    skip_bad: bool = False,
    options: sources.FileOptions = reading.AS_FOUND,
    cache_dir: str | None = None,
) -> Collection:
    """Read and check a collection from one or several sources: a text file or "-" (one text per
    line, or JSON or CSV), a data file, a Markdown file, a folder of text files, a bundled name.

    `text_column`: the name of a column, or several with commas between them, which are joined; the
    text is in the place of the last. `id_column` may be ANY_ID. `as_text`: columns that hold texts,
    also where all of them are written as numbers.

    Raises UserError, naming file and row, for a text that is missing, empty or not UTF-8, and for
    an id that is missing or not unique; with `skip_bad` these rows are skipped.
    """
    names, bad = [names] if isinstance(names, str) else list(names), BadRows(skip_bad)
    all_sources = [
        TextSource(name, text_column, id_column, options, cache_dir, tuple(as_text)) for name in names
    ]
    parts, tables = _read_parts(all_sources, bad)
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    shown = f"{plain_files.source_name(names[0])}{more}"
    rows = tables[0] if len(tables) == 1 else _concat_tables(tables)
    columns = [column for column in rows.column_names if column != TEXT]
    if id_column == ANY_ID:
        id_column = next((name for name in USUAL_IDS if name in columns), USUAL_IDS[0])
    named = next((part.text_column for part in parts if part.text_column is not None), None)
    collection = Collection(shown, rows, parts[0].unit, bad.reasons, id_column, parts, named)
    if id_column is not None:
        require_column(columns, id_column, source=collection.name, flag="--id-column")
    _check_rows(collection, id_column, bad)
    if len(collection) == 0:
        raise UserError(f"{collection.name}: none of its texts can be used; name another source")
    return collection


def _read_parts(all_sources: list[TextSource], bad: BadRows) -> tuple[tuple[Part, ...], list[pa.Table]]:
    """Return what is known of each source, and its rows. A column that holds texts in one of them is read as
    texts from all: 007 and 12 are codes too where A12 is one.
    """
    while True:
        bad.reasons.clear()
        parts, tables, first = [], [], 0
        for source in all_sources:
            own = BadRows(bad.skip)
            rows, column, unit = _read_rows(source, own)
            bad.reasons |= {first + row: reason for row, reason in own.reasons.items()}
            parts.append(Part(first, plain_files.source_name(source.name), unit, column))
            tables.append(rows)
            first += len(rows)
        fields = [field for rows in tables for field in rows.schema]
        texts = {field.name for field in fields if pa.types.is_string(field.type)}
        mixed = {name for name in texts if any(_has_numbers(rows, name) for rows in tables)}
        again = mixed - set(all_sources[0].as_text)
        if not again:
            return tuple(parts), tables
        all_sources = [
            dataclasses.replace(source, as_text=(*source.as_text, *again)) for source in all_sources
        ]


def _concat_tables(tables: list[pa.Table]) -> pa.Table:
    from common.tables import joined  # it loads what only data files need

    return joined(tables)


def _has_numbers(rows: pa.Table, name: str) -> bool:
    kind = rows.schema.field(name).type if name in rows.column_names else pa.null()
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


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
        good = np.array([row for row in range(len(block)) if start + row not in bad.reasons], np.int64)
        problems = _text_problems(block, good)
        if id_column is not None:
            good = np.setdiff1d(good, list(problems))
            problems |= _id_problems(block, id_column, good, known_ids)
        for row, reason in sorted(problems.items()):
            location = collection.location(start + row)
            bad.add(start + row, reason, error=f"{location}: {reason}; correct or remove it")


def _check_id_type(collection: Collection, id_column: str) -> None:
    kind = collection.rows.schema.field(id_column).type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
    if not any(is_kind(kind) for is_kind in kinds):
        advice = "name a column of texts or whole numbers with --id-column"
        raise UserError(f"{collection.name}: column {id_column!r} holds {kind}, not ids; {advice}")


def _values(column: pa.ChunkedArray, rows: np.ndarray) -> list:
    """Return some of the values of a column."""
    return column.take(number_array(rows)).to_pylist()


def _text_problems(block: pa.Table, good: np.ndarray) -> dict[int, str]:
    """Return row -> what is wrong with its text, for those of the rows that are `good`."""
    problems = {}
    for row, text in zip(good.tolist(), _values(block[TEXT], good)):
        if problem := reading.text_problem(text):
            problems[row] = problem
    return problems


def _id_problems(block: pa.Table, id_column: str, good: np.ndarray, known_ids: RowTable) -> dict[int, str]:
    """Return row -> what is wrong with its id, for those of the rows that are `good`; good ids are
    added to `known_ids`.
    """
    keys = _values(block[id_column], good)
    digests = [digest(str(key)) for key in keys]
    problems: dict[int, str] = {}
    here: dict[bytes, int] = {}  # the good ids of this block
    for row, key, own, before in zip(good.tolist(), keys, digests, known_ids.find(digests)):
        if key is None or sources.is_blank(str(key)):
            problems[row] = f"the id in column {id_column!r} is missing"
        elif before >= 0 or own in here:
            problems[row] = f"the id {key!r} in column {id_column!r} is not unique: it occurs above"
        else:
            here[own] = row
    known_ids.add(here, here.values())
    return problems


def _read_rows(source: TextSource, bad: BadRows) -> tuple[pa.Table, str | None, str]:
    """Return the rows of a source (TEXT, and the columns that came with it), the name that the column
    TEXT has there, None in lines and files of text, and what a row is called. Rows that are not UTF-8
    are added to `bad`; their values mean nothing.
    """
    name, options = source.name, source.options
    if bundled.is_bundled(name):
        if name not in bundled.DATASETS:
            names = ", ".join(bundled.DATASETS)
            raise UserError(f"{name}: no such bundled data set; there is {names}")
        return *_to_table(bundled.DATASETS[name](), source, name), "row"
    if name and name != "-" and sources.kind_of_path(name) == "folder":
        return _gather(_folder_rows(Path(name), options.encoding, bad), source.cache_dir), None, "file"
    sources.check_texts(name, any_suffix=options.is_table)
    with plain_files.open_plain(name, encoding=options.encoding, folder=source.cache_dir) as file:
        if name == "-":
            options = _options_of_stream(file, options, possible_columns(source.text_column))
            source = dataclasses.replace(source, options=options)
        if sources.suffix(name) == MARKDOWN and not options.is_table:
            content = file.read().rstrip(b"\r\n")  # as in a folder
            row = {TEXT: _decode(content, name, 0, bad), "file": Path(name).name}
            return _gather(iter([row]), source.cache_dir), None, "text"
        if not reading.is_table(file, name, options):
            return _gather(_line_rows(file, name, bad), source.cache_dir), None, "line"
        faults: list[Fault] | None = [] if bad.skip else None
        read = functools.partial(_read_table, file, source)
        rows, text_column = reading.or_advise_to_skip(read, faults)
        if faults is not None:
            rows = _with_left_out(rows, faults, bad, source.cache_dir)
        if sources.suffix(name) == ".parquet":
            rows = _without_exported_vectors(rows, file, name)
        _check_utf8(rows, name, bad)
        return rows, text_column, "row"


def _options_of_stream(
    file: BinaryIO, options: sources.FileOptions, columns: Sequence[str]
) -> sources.FileOptions:
    """Return the options of what has come through standard input: with the delimiter of a table if
    its first line names one of the `columns` of texts, among others.
    """
    if options.is_table:
        return options
    file.seek(0)
    line = file.readline(plain_files.SAMPLE).removeprefix(codecs.BOM_UTF8)
    head = line.decode("utf-8", "replace").strip()
    file.seek(0)
    for delimiter in ",\t;|":
        cells = next(csv.reader([head], delimiter=delimiter), [])
        if len(cells) > 1 and set(columns) & set(cells):
            names = ", ".join(cells)
            note(f"standard input: read as a table, because its first line names {names}")
            return dataclasses.replace(options, delimiter=delimiter)
    return options


def _read_table(file: BinaryIO, source: TextSource, *, faults: list[Fault] | None) -> tuple[pa.Table, str]:
    """Return the rows of a data file that is open and plain, and the name of the column TEXT there. With
    a list `faults`, rows that can't be read are added to it, and the others have the column ROW.
    """
    ids = USUAL_IDS if source.id_column == ANY_ID else (source.id_column or source.text_column,)
    columns = list(dict.fromkeys([*possible_columns(source.text_column), *ids]))
    # in JSON a text is one by its quotation marks
    codes = [] if source.is_json else [name for name in source.as_text if name not in columns]
    shown_name = plain_files.source_name(source.name)
    as_text, options, cache_dir = [*columns, *codes], source.options, source.cache_dir
    rows = reading.read_table(
        file, shown_name, as_text=as_text, options=options, cache_dir=cache_dir, faults=faults
    )
    table, text_column = _to_table(rows, source, shown_name)
    for place, name in enumerate(table.column_names):
        if name in codes and pa.types.is_string(table.schema.field(name).type):
            # as in all other columns, a cell without anything in it is missing
            column = pc.if_else(pc.equal(table[name], ""), None, table[name])
            table = table.set_column(place, name, column)
    return table, text_column


def _to_table(rows: datasets.Dataset, source: TextSource, shown_name: str) -> tuple[pa.Table, str]:
    """Return a data set as a table whose text column is TEXT, with the names of classes in place of
    their numbers; and the name that this column had.
    """
    import datasets

    table = cast(pa.Table, rows.with_format("arrow")[:])
    names = named_columns(source.text_column, table.column_names, flag="--text-column")
    for name in names:
        require_column(table.column_names, name, source=shown_name, flag="--text-column")
        reading.check_kind(rows, name, source=shown_name)
    text_column = names[-1]
    taken = next((name for name in table.column_names if name.lower() in OWN_NAMES), None)
    if taken:
        raise UserError(f"{shown_name}: the column name {taken!r} is reserved; rename the column")
    for number, name in enumerate(table.column_names):
        column, feature = table[name], rows.features[name]
        if isinstance(feature, datasets.ClassLabel):
            classes = pa.array(feature.names)
            column = pa.chunked_array([classes.take(part) for part in column.chunks], pa.string())
        # readers give strings one of two Arrow types; all files of an index must have the same
        elif name == text_column:
            column = _joined_texts([table[part] for part in names])
        elif pa.types.is_large_string(column.type):
            column = column.cast(pa.string())
        table = table.set_column(number, name, column)
    names = [TEXT if name == text_column else name for name in table.column_names]
    return table.rename_columns(names), text_column


def _joined_texts(columns: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    """Return the texts of several columns with a space between them, as BEIR joins a title and a
    text; what is missing or empty is left out.
    """
    columns = [column.cast(pa.large_string()) for column in columns]
    if len(columns) == 1:
        return columns[0]
    blank = [pc.match_substring_regex(column, sources.BLANK) for column in columns]
    filled = [pc.if_else(is_blank, None, column) for is_blank, column in zip(blank, columns)]
    space = pa.scalar(" ", pa.large_string())
    return pc.binary_join_element_wise(*filled, space, null_handling="skip")


def _without_exported_vectors(rows: pa.Table, file: BinaryIO, name: str) -> pa.Table:
    """Return the rows of a Parquet file without the embeddings that an export wrote beside them, and
    say so: the texts get embeddings of their own, or those of --vectors.
    """
    from pyarrow import parquet

    file.seek(0)
    marks = {field.name: field.metadata or {} for field in parquet.read_schema(file)}
    own = [column for column, mark in marks.items() if mark.items() >= EXPORTED.items()]
    for column in own:
        note(f"{name}: its column {column!r}, the embeddings of an export, is left out")
    return rows.drop_columns(own)


def _with_left_out(rows: pa.Table, faults: Sequence[Fault], bad: BadRows, folder: str | None) -> pa.Table:
    """Return the rows of a file, which have their numbers in the column ROW, without it, and with empty
    rows in the places of those that could not be read, which are added to `bad`.
    """
    from common import tables

    if ROW not in rows.column_names:
        return rows
    places, rows = rows[ROW].to_numpy() - 1, rows.drop_columns([ROW])
    if not faults:
        return rows
    for fault in faults:
        bad.add(fault.row - 1, fault.problem, error=fault.problem)
    order = np.full(max(places[-1] + 1, *(fault.row for fault in faults)), -1)
    order[places] = np.arange(len(places))
    parts = (order[start : start + BATCH] for start in range(0, len(order), BATCH))
    return tables.gather((rows.take(pa.array(part, mask=part < 0)) for part in parts), folder)


def _check_utf8(rows: pa.Table, name: str, bad: BadRows) -> None:
    """Add the rows with bytes that are not UTF-8 to `bad`: Arrow doesn't check them."""
    for start in range(0, len(rows), BATCH):
        block = rows.slice(start, BATCH).combine_chunks()
        if _is_valid(block):
            continue
        for row in range(len(block)):
            if not _is_valid(block.take(pa.array([row]))):
                error = f"{name}, row {start + row + 1}: not UTF-8; correct the row"
                bad.add(start + row, "not UTF-8", error=error)


def _is_valid(rows: pa.Table) -> bool:
    try:
        rows.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _line_rows(file: BinaryIO, name: str, bad: BadRows) -> Iterator[dict[str, str | None]]:
    """Yield a row for each line of a text file."""
    source = plain_files.source_name(name)
    for row, content in enumerate(reading.raw_lines(file)):
        yield {TEXT: _decode(content, f"{source}, line {row + 1}", row, bad)}


def _folder_rows(root: Path, encoding: str | None, bad: BadRows) -> Iterator[dict[str, str | None]]:
    """Yield a row for each text file below a folder."""
    paths = list(_files_below(root))
    files = [path for path in paths if path.suffix.lower() in reading.TEXT_SUFFIXES]
    if not files:
        problem = "no .txt or .md files in it"
        raise UserError(f"{root}: {problem}; name a folder that has them, or a data file")
    if len(files) < len(paths):
        other = next(path for path in paths if path not in files)
        count = len(paths) - len(files)
        problem = f"{count:,} of its files are no .txt or .md and not read"
        note(f"{root}: {problem}, such as {other.name}")
    files = sorted(path.relative_to(root) for path in files)
    has_classes = all(len(file.parts) == 2 for file in files)  # a folder of class folders
    for row, file in enumerate(files):
        text = None
        try:
            text = reading.read_text(root / file, encoding)
        except UserError as error:
            bad.add(row, "the file can't be read as text", error=str(error))
        label = {"label": file.parts[0]} if has_classes else {}
        yield {TEXT: text, "file": str(file), **label}


def _files_below(root: Path) -> Iterator[Path]:
    """Yield every file below a folder but hidden ones. Links to folders are not followed: they may
    lead in a circle.
    """
    for path in reading.entries_of(root):
        if not path.is_dir():
            yield path
        elif not path.is_symlink():
            yield from _files_below(path)


def _decode(content: bytes, location: str, row: int, bad: BadRows) -> str | None:
    try:
        return plain_files.decode_utf8(content, location)
    except UserError as error:
        bad.add(row, "the text is not UTF-8", error=str(error))
        return None


def _gather(rows: Iterator[dict[str, str | None]], folder: str | None) -> pa.Table:
    """Return rows, at least one, as a table; a large one lies in a temporary file in `folder`."""
    from common import tables

    first = next(rows)  # names the columns
    rows = itertools.chain([first], rows)
    blocks = iter(lambda: list(itertools.islice(rows, BATCH)), [])
    return tables.gather((_to_block(block) for block in blocks), folder)


def _to_block(rows: list[dict[str, str | None]]) -> pa.Table:
    """Return some rows as a table."""
    columns = {name: text_array([row[name] for row in rows]) for name in rows[0]}
    strings = {name: values.cast(pa.string()) for name, values in columns.items() if name != TEXT}
    return pa.table({**columns, **strings})
