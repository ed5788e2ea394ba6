"""The files of an index: a segment holds rows, and never changes.

A block of a file is checked before a process first uses it; what a library reads is checked too,
because a file of another program can have the checksums that a manifest names.
"""

import copy
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from common.columns import unused_name
from common.errors import reading
from common.files import sync_file
from common.search.manifest import (
    ADVICE,
    MANIFEST,
    FileEntry,
    Manifest,
    Settings,
    bytes_of_vector,
    damaged,
    store_of,
)

# our own columns, under names that no data set has: BEIR and Mongo have an _id, others a _vector
ID, HASH, TEXT, VECTOR = "_index_id", "_index_hash", "_index_text", "_index_vector"
EXPORTED = {b"embed_search": b"vector"}  # says of a column of Parquet that an export wrote it
# a chunk's number in its document, the document's number of chunks, and the chunk's first character
# in the document
CHUNK, NUM_CHUNKS, START = "_index_chunk", "_index_chunks", "_index_start"
ROW_COLUMNS = (ID, HASH, CHUNK, NUM_CHUNKS, START, TEXT)  # before the metadata; the vector is last
RESERVED_COLUMNS = (*ROW_COLUMNS, VECTOR)
# the ids of texts that are looked at without an index, where no column has any: their numbers from 1
ROW = "_index_row"
OWN_NAMES = (*RESERVED_COLUMNS, ROW)  # which no column of a source may have
# a smaller file (bytes) is read, not mapped: a map holds a descriptor, and a process may have
# only 256
MAPPED = 65_536
CHECKED = 1 << 18  # bytes of a file that have a checksum of their own: a part of the format
UNREAD = 2_048  # rows whose vectors are read at once for the first time
# the columns of every index, as Arrow names their types
ROW_TYPES = {
    ID: "string",
    HASH: "fixed_size_binary[32]",
    CHUNK: "int32",
    NUM_CHUNKS: "int32",
    START: "int32",
    TEXT: "large_string",
}
SQUARE_TOLERANCE = 0.01  # how far the square of a norm may be from 1
ColumnTypes = dict[str, pa.DataType]
# of each way to keep vectors, the type of what lies on the disk
STORED_TYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8, "binary": np.uint8}
FEW = 100  # rows that are taken one by one
UNPACKED = 8_192  # rows whose vectors are made of what is kept at once


def pack(vectors: np.ndarray, store: str) -> np.ndarray:
    """Return what is kept of unit vectors (n, width): numbers of 32 or 16 bits, of 8 bits as parts
    of the largest of each vector, or the sign of each number, eight to a byte. To pack what was
    unpacked changes nothing. In fp32 the vectors themselves come back, not a copy.
    """
    if store == "binary":
        return np.packbits(vectors > 0, axis=1)
    if store == "int8":
        largest = np.abs(vectors).max(1, keepdims=True, initial=np.finfo(np.float32).tiny)
        return np.rint(vectors / largest * 127).astype(np.int8)
    return vectors.astype(STORED_TYPES[store], copy=False)


def unpack(stored: np.ndarray, store: str, width: int) -> np.ndarray:
    """Return fp32 vectors (n, width) from what is kept of them: of norm 1, in 16 bits nearly."""
    if store == "binary":
        signs = np.unpackbits(stored, axis=1, count=width).astype(np.float32)
        return (2 * signs - 1) / np.float32(width**0.5)
    if store == "int8":
        numbers = stored.astype(np.float32)
        squares = np.einsum("ij,ij->i", numbers, numbers)  # whole numbers, and so exact
        with np.errstate(invalid="ignore"):  # zeros become NaN, which _check_norms finds
            return numbers / np.sqrt(squares)[:, None]
    return stored if store == "fp32" else stored.astype(np.float32)


@dataclass
class CheckedFile:
    """A file of an index whose blocks of bytes are checked before they are first used."""

    path: Path
    entry: FileEntry
    content: mmap.mmap | bytearray

    def __post_init__(self) -> None:
        self.expected = np.frombuffer(bytes.fromhex(self.entry["checksums"]), ">u8")
        self.unchecked = np.ones(len(self.expected), bool)

    def check_frame(self) -> None:
        """Check what lies around the columns: what Arrow reads in order to find them.

        The whole file is checked if it has no body. Raises UserError when it is damaged, or not as
        long as it was.
        """
        size = len(self.content)
        if len(self.expected) != -(-size // CHECKED):
            raise damaged(self.path, f"its size is not the one in {MANIFEST}")
        start, end = self.entry.get("body", (size, size))
        if end > size:
            raise damaged(self.path, f"its body is not where {MANIFEST} says")
        self.check(np.array([0, end]), np.array([start, size]))

    def check(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Check the blocks that hold the bytes from each of `starts` up to the one of `ends`.
        Raises UserError when one is damaged.
        """
        if not self.unchecked.any():
            return
        # 1 at the first block of each range, -1 behind its last: sums are the ranges over a block
        changes = np.zeros(len(self.unchecked) + 1, np.int64)
        np.add.at(changes, starts // CHECKED, 1)
        np.add.at(changes, -(-ends // CHECKED), -1)
        for number in np.flatnonzero((changes.cumsum()[:-1] > 0) & self.unchecked):
            block = memoryview(self.content)[number * CHECKED : (number + 1) * CHECKED]
            if xxhash.xxh3_64_intdigest(block) != self.expected[number]:
                raise damaged(self.path, f"a checksum is not the one in {MANIFEST}")
            self.unchecked[number] = False

    def release(self, start: int, end: int) -> None:
        """Give the memory of some bytes back to the system, which reads them again when they are
        used. Nothing writes to them.
        """
        if isinstance(self.content, mmap.mmap):
            first, last = (place // mmap.PAGESIZE * mmap.PAGESIZE for place in (start, end))
            if last > first:
                self.content.madvise(mmap.MADV_DONTNEED, first, last - first)

    def check_whole(self) -> None:
        """Raise UserError unless the file has the SHA-256 of the manifest."""
        if hashlib.sha256(self.content).hexdigest() != self.entry["sha256"]:
            raise damaged(self.path, f"its SHA-256 is not the one in {MANIFEST}")


def checksums(content: mmap.mmap | bytearray) -> str:
    """Return the XXH3 checksum (16 hexadecimal digits) of each block
    of a file, one after the other.

    They reveal damage, at the speed of memory. They are no proof against an attacker, who could
    write a new manifest as well.
    """
    whole = memoryview(content)
    blocks = (whole[start : start + CHECKED] for start in range(0, len(content), CHECKED))
    return "".join(xxhash.xxh3_64_hexdigest(block) for block in blocks)


class Segment:
    """An immutable file of rows: its `entry` in the manifest, and `is_live` (rows), False where
    deleted. Whatever is read from it is checked before.

    `columns` are those of the index, in their order: what the file lacks is null, and narrower
    numbers become what the index has.
    """

    def __init__(self, file: CheckedFile, columns: ColumnTypes, settings: Settings) -> None:
        self.file, self.entry, self.columns = file, file.entry, columns
        self.store, self.width = store_of(settings), settings["width"]
        table = read_arrow(file.content)
        lists = table.column(VECTOR).chunk(0)  # one list of numbers per row
        count, size = len(lists), lists.type.list_size
        # an array over the content itself: Arrow's own view is read-only, about which torch warns
        _, floats = lists.values.buffers()  # the first buffer marks missing values
        self.first_byte = floats.address - self._base
        kind = STORED_TYPES[self.store]
        stored = np.frombuffer(file.content, kind, count=count * size, offset=self.first_byte)
        self._stored = stored.reshape(count, size)  # unpacked when it is read
        self.row_bytes = size * stored.itemsize  # of a vector
        self._table = table.drop_columns([VECTOR])
        self.is_live = np.ones(count, bool)
        # what has been found valid: it can be nonsense although it has its checksum
        self._valid_vectors, self._valid_columns = np.zeros(count, bool), set()

    def with_live_rows(self, entry: FileEntry, is_live: np.ndarray) -> "Segment":
        """Return the segment with other live rows, and the entry that says so."""
        segment = copy.copy(self)
        segment.entry, segment.is_live = entry, is_live
        return segment

    def with_columns(self, columns: ColumnTypes) -> "Segment":
        """Return the segment in an index with more columns, or wider ones."""
        segment = copy.copy(self)
        segment.columns = columns
        return segment

    def repacked(self, store: str) -> "Segment":
        """Return the segment as if its vectors were kept in another way: in memory, as many bytes."""
        segment = copy.copy(self)
        segment.store, segment._stored = store, pack(self.vectors(0, len(self)), store)
        return segment

    def __len__(self) -> int:
        return len(self.is_live)

    @property
    def num_bytes(self) -> int:
        """The space that its rows take."""
        return self._table.nbytes + self._stored.nbytes

    def vectors(self, first: int, last: int) -> np.ndarray:
        """Return the vectors of rows `first` up to `last`: in fp32 a view into the file."""
        self._check_vectors(np.array([first]), last - first)
        vectors = unpack(self._stored[first:last], self.store, self.width)
        if not self._valid_vectors[first:last].all():
            self._check_norms(vectors, first + np.arange(last - first))
        return vectors

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, vectors (at most `size`, width)) over all rows, in fp32 as views into
        the file, else fewer at a time.

        Vectors that are read for the first time come in small blocks, which are checked while they
        are in the processor's cache, and whose memory is then given back: a process that goes
        through an index once never holds all of it. From the second time on it stays.
        """
        first, size = 0, size if self.store == "fp32" else min(size, UNPACKED)
        while first < len(self):
            is_read = self._valid_vectors[first : first + size].all()
            last = min(first + (size if is_read else min(size, UNREAD)), len(self))
            yield first, self.vectors(first, last)
            if not is_read:
                start = self.first_byte + self.row_bytes * first
                self.file.release(start, start + self.row_bytes * (last - first))
            first = last

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """Return a copy of the vectors of some rows."""
        self._check_vectors(rows, 1)
        vectors = unpack(self._stored[rows], self.store, self.width)
        if not self._valid_vectors[rows].all():
            self._check_norms(vectors, rows)
        return vectors

    def _check_vectors(self, rows: np.ndarray, count: int) -> None:
        """Check `count` vectors from each of some rows on."""
        starts = self.first_byte + self.row_bytes * rows
        self.file.check(starts, starts + self.row_bytes * count)

    def _check_norms(self, vectors: np.ndarray, rows: np.ndarray) -> None:
        """Raise UserError unless the vectors of some rows have norm 1, once for each row."""
        squares = np.einsum("ij,ij->i", vectors, vectors)
        # NaN and infinity fail this comparison too
        wrong = np.flatnonzero(~(np.abs(squares - 1) < SQUARE_TOLERANCE))
        if len(wrong):
            norm = float(squares[wrong[0]]) ** 0.5
            row = rows[wrong[0]] + 1
            raise damaged(self.file.path, f"the vector of row {row} has norm {norm:g}, not 1")
        self._valid_vectors[rows] = True

    def rows(self, columns: list[str] | None = None, numbers: np.ndarray | None = None) -> pa.Table:
        """Return some rows (default: all) as a table, without the vectors; all columns or those
        named.
        """
        names = [*ROW_COLUMNS, *self.columns] if columns is None else columns
        arrays = []
        for name in names:
            kind = self.columns.get(name)
            if name not in self._table.column_names:
                arrays.append(pa.nulls(len(self) if numbers is None else len(numbers), kind))
                continue
            column = self._table.column(name).chunk(0)
            self._check_column(name, column, numbers)
            column = column if numbers is None else taken(column, numbers)
            arrays.append(column if kind in (None, column.type) else column.cast(kind, safe=False))
        return pa.Table.from_arrays(arrays, names)

    def _check_column(self, name: str, column: pa.Array, rows: np.ndarray | None) -> None:
        """Check a column; of texts only those of some rows, if they are given."""
        is_large, buffers = pa.types.is_large_string(column.type), column.buffers()
        if rows is None or not (is_large or pa.types.is_string(column.type)):
            self._check_buffers(buffers)
            if name not in self._valid_columns:
                with reading(f"{self.file.path}: column {name!r} is damaged", ADVICE):
                    column.validate(full=True)
                self._valid_columns.add(name)
            return
        _, positions, content = buffers  # the first marks missing texts
        self._check_buffers(buffers[:-1])
        if content:
            ends = np.frombuffer(positions, np.int64 if is_large else np.int32)
            firsts, lasts = ends[rows], ends[rows + 1]
            if ((firsts < 0) | (firsts > lasts) | (lasts > content.size)).any():
                raise damaged(self.file.path, f"the texts of column {name!r} are not where it says")
            start = content.address - self._base
            self.file.check(start + firsts, start + lasts)

    def _check_buffers(self, buffers: list[pa.Buffer | None]) -> None:
        present = [buffer for buffer in buffers if buffer]  # neither missing nor empty
        starts = np.array([buffer.address for buffer in present], np.int64) - self._base
        self.file.check(starts, starts + np.array([buffer.size for buffer in present], np.int64))

    @property
    def _base(self) -> int:
        """The address of the file's first byte."""
        return pa.py_buffer(self.file.content).address

    def body(self) -> list[int]:
        """Return where the bytes of the columns begin and end in the file."""
        columns = read_arrow(self.file.content).columns
        buffers = [buffer for column in columns for buffer in column.chunk(0).buffers() if buffer]
        first = min(buffer.address for buffer in buffers)
        last = max(buffer.address + buffer.size for buffer in buffers)
        return [first - self._base, last - self._base]


def check_table(
    table: pa.Table, content: mmap.mmap | bytearray, entry: FileEntry, manifest: Manifest
) -> None:
    """Raise an error unless a table has the columns, types and rows that a store writes, in the
    file's own memory. A file of another program can have the SHA-256 that a manifest names.
    """
    table.validate()
    settings, columns = manifest["settings"], manifest["columns"]
    store, width = store_of(settings), settings["width"]
    number = pa.from_numpy_dtype(np.dtype(STORED_TYPES[store]))
    size = bytes_of_vector(store, width) * 8 // number.bit_width
    names = table.column_names
    known = {*RESERVED_COLUMNS, *columns}
    if len(set(names)) < len(names) or not set(RESERVED_COLUMNS) <= set(names) <= known:
        raise ValueError(f"its columns are {', '.join(names)}")
    if len(table) != entry["rows"] or any(column.num_chunks != 1 for column in table.columns):
        raise ValueError(f"it has {len(table):,} rows, not {entry['rows']:,} in one batch")
    for name, kind in ROW_TYPES.items():
        if str(table.schema.field(name).type) != kind:
            raise ValueError(f"column {name} is {table.schema.field(name).type}, not {kind}")
    lists = table.column(VECTOR).chunk(0)
    is_list = pa.types.is_fixed_size_list(lists.type)
    if not is_list or lists.type.value_type != number or lists.type.list_size != size:
        raise ValueError(f"column {VECTOR} is {lists.type}, not {size} of {number}")
    required = [table.column(name).chunk(0) for name in RESERVED_COLUMNS]
    if any(column.null_count or column.buffers()[0] for column in (*required, lists.values)):
        raise ValueError("values are missing")
    start = pa.py_buffer(content).address
    for column in table.columns:
        for buffer in filter(None, column.chunk(0).buffers()):
            if not start <= buffer.address <= buffer.address + buffer.size <= start + len(content):
                raise ValueError("it is compressed")  # so that its memory is another


def column_types(kinds: dict[str, str], tables: list[pa.Table]) -> ColumnTypes:
    """Return the types of the columns of an index, which a manifest names: one of its files has
    each. Raises ValueError where none has, or where one has a type that does not fit.
    """
    columns: ColumnTypes = {}
    for name, kind in kinds.items() if tables else ():
        found = {table.schema.field(name).type for table in tables if name in table.column_names}
        known = {str(one): one for one in [*found, pa.null()]}
        types = ", ".join(map(str, found)) or "missing"
        if kind not in known:
            raise ValueError(f"column {name} is {types}, not {kind}")
        if any(wider(one, known[kind]) != known[kind] for one in found):
            raise ValueError(f"column {name} is {types}, which {kind} does not hold")
        columns[name] = known[kind]
    return columns


def wider(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return the type that holds the values of two, such as that of 3 and of 3.5; None where there
    is none, as for numbers and texts.
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    is_text, is_binary = pa.types.is_string, pa.types.is_binary
    texts = (is_text, is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    if any(is_kind(one) or is_kind(other) for is_kind in texts):
        return None
    fields = [pa.schema([pa.field("column", kind)]) for kind in (one, other)]
    try:
        kind = pa.unify_schemas(fields, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return None
    has_integers = pa.types.is_integer(one) or pa.types.is_integer(other)
    return pa.float64() if has_integers and pa.types.is_floating(kind) else kind


def deleted_rows(table: pa.Table, count: int, num_rows: int) -> np.ndarray:
    """Return the numbers of the rows deleted from a segment. Raises an error for others than it
    has.
    """
    table.validate(full=True)
    if table.schema != pa.schema([("row", pa.uint32())]) or table.column("row").null_count:
        raise ValueError(f"its columns are {', '.join(table.column_names)}, not row numbers")
    wrong = ValueError(f"it does not name {count:,} of the {num_rows:,} rows")
    if len(table) != count or table.column("row").num_chunks != 1:
        raise wrong
    # Arrow's to_numpy() would import pandas
    rows = np.frombuffer(table.column("row").chunk(0).buffers()[1], np.uint32, count=count)
    rows = rows.astype(np.int64)
    if (np.diff(rows) <= 0).any() or rows[-1] >= num_rows:
        raise wrong
    return rows


def map_file(path: Path) -> mmap.mmap | bytearray:
    """Return the content of a file: memory-mapped, or a copy if it is small."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < MAPPED:
            return bytearray(file.read())
        # copy-on-write: torch wants writable memory, and the file stays as it is
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def read_arrow(content: mmap.mmap | bytearray) -> pa.Table:
    return pa.ipc.open_file(pa.py_buffer(content)).read_all()


def number_array(numbers: np.ndarray) -> pa.Array:
    """Return numbers as an Arrow array over the same memory.

    `pa.array`, given anything at all, imports pandas, which takes half a second.
    """
    numbers = np.ascontiguousarray(numbers)
    kind = pa.from_numpy_dtype(numbers.dtype)
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


def taken(column: pa.Array, rows: np.ndarray) -> pa.Array:
    """Return some rows of a column; few of them without Arrow's own `take`, which imports pyarrow.compute,
    8 MB that a search has no other use for.
    """
    if len(rows) > FEW:
        return column.take(number_array(rows))
    return pa.concat_arrays([column.slice(0, 0), *(column.slice(row, 1) for row in rows.tolist())])


def text_array(texts: Sequence[str | None]) -> pa.Array:
    """Return texts, None where one is missing, as an Arrow array of large strings, without
    `pa.array` as `number_array` does.
    """
    contents = [b"" if text is None else text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, contents)], dtype=np.int64)
    known = np.packbits(np.array([text is not None for text in texts], bool), bitorder="little")
    buffers = [pa.py_buffer(part) for part in (known, ends, b"".join(contents))]
    return pa.Array.from_buffers(pa.large_string(), len(texts), buffers)


def exported_names(settings: Settings, columns: list[str]) -> dict[str, str]:
    """Return the columns that are exported for other programs, each with its name there: `id` where
    no column of the texts holds the ids, `text`, with chunks the number of each in its document, and
    the `columns` of the texts, which keep their names.
    """
    own = {TEXT: "text"} if settings["id_column"] else {ID: "id", TEXT: "text"}
    if settings["chunk_overlap"] is not None:
        own |= {CHUNK: "chunk", NUM_CHUNKS: "chunks", START: "first_character"}
    names = {name: unused_name(wanted, columns) for name, wanted in own.items()}
    return names | {name: name for name in columns}


def with_columns_of(schema: pa.Schema, columns: ColumnTypes) -> ColumnTypes:
    """Return the columns of an index after rows of a schema were added: wider where they need to
    be. Each column must have a type that holds both.
    """
    merged = dict(columns)
    for name in schema.names:
        if name not in RESERVED_COLUMNS:
            kind = wider(columns.get(name, pa.null()), schema.field(name).type)
            assert kind is not None
            merged[name] = kind
    return merged


def vector_array(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """Return vectors (rows, numbers), or what is kept of them, as an Arrow array without a copy."""
    values = number_array(vectors.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write a table as one record batch of an Arrow IPC file, and fsync it."""
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(len(table), 1))
    sync_file(path)


def new_file(path: Path, rows: int) -> CheckedFile:
    """Return a file that was just written, with its entry."""
    content = map_file(path)
    digest = hashlib.sha256(content).hexdigest()
    entry = FileEntry(file=path.name, rows=rows, sha256=digest, checksums=checksums(content))
    return CheckedFile(path, entry, content)
