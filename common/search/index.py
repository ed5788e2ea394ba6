"""An index on disk, as it is read: a `Snapshot` is one committed state of it.

The folder of an index holds `manifest.json` and the immutable Arrow files that the manifest names,
each with its checksums; any Arrow reader can read them. A block of a file is checked before a
process first uses it. Readers need no lock: a writer adds files first and then renames a new
manifest into place, so that a reader always has one complete state.
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

from common.errors import UserError, one_line
from common.search.manifest import (
    ADVICE,
    MANIFEST,
    FileEntry,
    Manifest,
    Settings,
    damaged,
    entries_of,
    read_manifest,
)

CACHE_PREFIX = "cache-"  # of the folder of a cache
CACHE_STAMP = "stamp"  # the file of a cache that says which state of the index it was made of
ID, HASH, TEXT, VECTOR = "_id", "_hash", "_text", "_vector"
# a chunk's number in its document, the document's number of chunks (both under the names of older
# indexes), and the chunk's first character in the document
CHUNK, NUM_CHUNKS, START = "_passage", "_passages", "_start"
ROW_COLUMNS = (ID, HASH, CHUNK, NUM_CHUNKS, START, TEXT)  # before the metadata; the vector is last
RESERVED_COLUMNS = (*ROW_COLUMNS, VECTOR)
# a smaller file (bytes) is read, not mapped: a map holds a descriptor, and a process may have
# only 256
MAPPED = 65_536
CHECKED = 1 << 18  # bytes of a file that have a checksum of their own: a part of the format
# DuckDB gets no access to files, network or extensions
SAFE_SETTINGS: dict[str, bool | float | int | list[str] | str] = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
}


@dataclass
class CheckedFile:
    """A file of an index whose blocks of bytes are checked before they are first used."""

    path: Path
    entry: FileEntry
    content: mmap.mmap | bytearray

    def __post_init__(self) -> None:
        self.expected = np.frombuffer(bytes.fromhex(self.entry.get("checksums", "")), ">u8")
        self.unchecked = np.ones(len(self.expected), bool)

    def check_frame(self) -> None:
        """Check what lies around the columns: what Arrow reads in order to find them.

        The whole file is checked if it has no columns, or is of an earlier version without
        checksums. Raises UserError when it is damaged, or not as long as it was.
        """
        size = len(self.content)
        if "checksums" not in self.entry:
            self.check_whole()
        elif len(self.expected) != -(-size // CHECKED):
            raise damaged(self.path, f"its size is not the one in {MANIFEST}")
        else:
            start, end = self.entry.get("body", (size, size))
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

    def check_whole(self) -> None:
        """Raise UserError unless the file has the SHA-256 of the manifest."""
        if hashlib.sha256(self.content).hexdigest() != self.entry["sha256"]:
            raise damaged(self.path, f"its SHA-256 is not the one in {MANIFEST}")


def checksums(content: mmap.mmap | bytearray) -> str:
    """Return the XXH3 checksum (16 hexadecimal digits) of each block of a file, one after the other.

    They reveal damage, at the speed of memory. They are no proof against an attacker, who could
    write a new manifest as well.
    """
    blocks = (memoryview(content)[start : start + CHECKED] for start in range(0, len(content), CHECKED))
    return "".join(xxhash.xxh3_64_hexdigest(block) for block in blocks)


class Segment:
    """An immutable file of rows: its `entry` in the manifest, and `alive` (rows), False where
    deleted. Whatever is read from it is checked before.
    """

    def __init__(self, file: CheckedFile, columns: list[str]) -> None:
        self.file, self.entry = file, file.entry
        table = read_arrow(file.content)
        lists = table.column(VECTOR).chunk(0)  # one list of floats per row
        count, self.width = len(lists), lists.type.list_size
        # an array over the content itself: Arrow's own view is read-only, about which torch warns
        _, floats = lists.values.buffers()  # the first buffer marks missing values
        self.first_byte = floats.address - self._base
        vectors = np.frombuffer(file.content, np.float32, count=count * self.width, offset=self.first_byte)
        self._vectors = vectors.reshape(count, self.width)
        # metadata in the order of the index
        self._table = table.select([*ROW_COLUMNS, *columns])
        self.alive = np.ones(count, bool)

    def with_alive(self, entry: FileEntry, alive: np.ndarray) -> "Segment":
        """Return the segment with other live rows, and the entry that says so."""
        segment = copy.copy(self)
        segment.entry, segment.alive = entry, alive
        return segment

    def __len__(self) -> int:
        return len(self.alive)

    @property
    def num_bytes(self) -> int:
        """The space that its rows take."""
        return self._table.nbytes + self._vectors.nbytes

    def vectors(self, first: int, last: int) -> np.ndarray:
        """Return the vectors of the rows from `first` up to `last`, as a view into the file."""
        self._check_vectors(np.array([first]), last - first)
        return self._vectors[first:last]

    def vectors_of(self, rows: np.ndarray) -> np.ndarray:
        """Return a copy of the vectors of some rows."""
        self._check_vectors(rows, 1)
        return self._vectors[rows]

    def _check_vectors(self, rows: np.ndarray, count: int) -> None:
        """Check `count` vectors from each of some rows on."""
        starts = self.first_byte + 4 * self.width * rows
        self.file.check(starts, starts + 4 * self.width * count)

    def rows(self, columns: list[str] | None = None, numbers: np.ndarray | None = None) -> pa.Table:
        """Return some rows (default: all) as a table, without the vectors; all columns or those
        named.
        """
        table = self._table if columns is None else self._table.select(columns)
        for column in table.columns:
            self._check_column(column.chunk(0), numbers)
        return table if numbers is None else table.take(number_array(numbers))

    def _check_column(self, column: pa.Array, rows: np.ndarray | None) -> None:
        """Check a column; of texts only those of some rows, if they are given."""
        is_large, buffers = pa.types.is_large_string(column.type), column.buffers()
        if rows is None or not (is_large or pa.types.is_string(column.type)):
            self._check_buffers(buffers)
            return
        _, positions, content = buffers  # the first marks missing texts
        self._check_buffers(buffers[:-1])
        if content:
            ends = np.frombuffer(positions, np.int64 if is_large else np.int32)
            start = content.address - self._base
            self.file.check(start + ends[rows], start + ends[rows + 1])

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


class Snapshot:
    """One committed state of an index. Rows are numbered from 0, deleted ones included."""

    def __init__(self, folder: Path, manifest: Manifest, segments: list[Segment]) -> None:
        self.folder, self.manifest, self.segments = folder, manifest, segments
        # the first row of each segment, and the number of rows
        self.starts = np.cumsum([0, *map(len, segments)])

    @property
    def settings(self) -> Settings:
        """How the embeddings were made."""
        return self.manifest["settings"]

    @property
    def width(self) -> int:
        """The number of dimensions of a vector."""
        return self.settings["width"]

    @property
    def num_rows(self) -> int:
        """The number of rows, deleted ones included."""
        return int(self.starts[-1])

    @property
    def stamp(self) -> str:
        """The hash of this state, which a cache of it carries."""
        return str(self.manifest["sha256"])

    def alive(self) -> np.ndarray:
        """Return a mask (num_rows): False for deleted rows."""
        return np.concatenate([np.zeros(0, bool), *(segment.alive for segment in self.segments)])

    def vector_blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, vectors (at most `size`, width)) over all rows, as views into the
        files.
        """
        for start, segment in zip(self.starts, self.segments):
            for offset in range(0, len(segment), size):
                yield int(start) + offset, segment.vectors(offset, min(offset + size, len(segment)))

    def vectors_of(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return a copy (rows, width) of the vectors of some rows."""
        rows = np.asarray(rows, dtype=np.int64)
        vectors = np.empty((len(rows), self.width), np.float32)
        for segment, here, offsets in self.by_segment(rows):
            vectors[here] = segment.vectors_of(offsets)
        return vectors

    def take(self, rows: np.ndarray | Sequence[int], columns: list[str] | None = None) -> list[dict]:
        """Return some rows as dicts, in the given order; all columns but the vectors, or those
        named.
        """
        rows = np.asarray(rows, dtype=np.int64)
        taken: list[dict] = [{}] * len(rows)
        for segment, here, offsets in self.by_segment(rows):
            entries = segment.rows(columns, offsets).to_pylist()
            for position, row in zip(np.flatnonzero(here), entries):
                taken[position] = row
        return taken

    def texts(self, rows: np.ndarray | None = None, *, size: int = 10_000) -> Iterator[str]:
        """Yield the texts of some rows (default: the live ones), reading `size` at a time."""
        rows = np.flatnonzero(self.alive()) if rows is None else rows
        for start in range(0, len(rows), size):
            yield from (row[TEXT] for row in self.take(rows[start : start + size], [TEXT]))

    def by_segment(self, rows: np.ndarray) -> Iterator[tuple[Segment, np.ndarray, np.ndarray]]:
        """Yield (segment, mask of the `rows` that lie in it, their offsets there)."""
        numbers = self.segment_numbers(rows)
        for number in np.unique(numbers):
            here = numbers == number
            yield self.segments[number], here, rows[here] - self.starts[number]

    def segment_numbers(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of the segment that each row lies in."""
        return np.searchsorted(self.starts, rows, side="right") - 1


def open_snapshot(folder: str | Path) -> Snapshot:
    """Return the last committed state of an index. Raises UserError when the folder is not an
    index, or a file is missing or damaged; damage within a column is found when that is read.
    """
    manifest, files = _open_files(Path(folder))
    for file in files.values():
        file.check_frame()
    segments = []
    for entry in manifest["segments"]:
        segment = Segment(files[entry["file"]], list(manifest["columns"]))
        if deleted := entry.get("deleted"):
            rows = read_arrow(files[deleted["file"]].content).column("row").to_numpy()
            segment.alive[rows] = False
        segments.append(segment)
    return Snapshot(Path(folder), manifest, segments)


def verify(folder: str | Path) -> Snapshot:
    """Return the last committed state of an index after comparing all of its files with their
    SHA-256. Raises UserError with the names of all that are damaged.
    """
    _, files = _open_files(Path(folder))
    problems = []
    for file in files.values():
        try:
            file.check_whole()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return open_snapshot(folder)


def _open_files(folder: Path) -> tuple[Manifest, dict[str, CheckedFile]]:
    """Return the manifest of an index and all of its files. Files that are open stay readable when
    a writer commits and removes them meanwhile.
    """
    while True:
        manifest = read_manifest(folder)
        try:
            files = {}
            for name, entry in entries_of(manifest).items():
                files[name] = CheckedFile(folder / name, entry, map_file(folder / name))
            return manifest, files
        except FileNotFoundError as error:
            if read_manifest(folder)["sha256"] == manifest["sha256"]:
                raise UserError(f"{error.filename}: a file of the index is missing; {ADVICE}") from error
            # a writer has committed meanwhile: read its state


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


def rows_with_ids(snapshot: Snapshot, ids: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return the live rows of some documents, and the ids that the index does not have."""
    rows, wanted, known = [np.zeros(0, np.int64)], set(ids), set()
    for start, segment in zip(snapshot.starts, snapshot.segments):
        keys = segment.rows([ID])[ID].to_pylist()
        here = [row for row in np.flatnonzero(segment.alive) if keys[row] in wanted]
        rows.append(np.array(here, np.int64) + start)
        known.update(keys[row] for row in here)
    return np.concatenate(rows), [key for key in ids if key not in known]


def whole_documents(snapshot: Snapshot, rows: np.ndarray) -> np.ndarray:
    """Return the rows of all chunks of the documents that some rows belong to."""
    entries = snapshot.take(rows, [CHUNK, NUM_CHUNKS])
    # first row of a document -> its number of chunks, which are consecutive rows
    sizes = {int(row) - entry[CHUNK]: entry[NUM_CHUNKS] for row, entry in zip(rows, entries)}
    all_rows = [first + number for first in sorted(sizes) for number in range(sizes[first])]
    return np.array(all_rows, dtype=np.int64)


def matching(snapshot: Snapshot, condition: str | None) -> np.ndarray:
    """Return a mask (rows) of the live rows for which an SQL condition such as "label = 'tech' AND
    year > 2004" holds; None: of all live rows.

    DuckDB parses the condition as one expression over the columns of the rows, so that it can read
    but change nothing. Raises UserError when it is not a condition over the columns of the index.
    """
    mask = snapshot.alive()
    if condition is None:
        return mask
    import duckdb

    columns = [ID, TEXT, *snapshot.manifest["columns"]]
    lowered = [name.lower() for name in columns]
    ambiguous = [name for name in columns if lowered.count(name.lower()) > 1]
    used = ", ".join(name for name in ambiguous if name.lower() in condition.lower())
    if used:
        advice = "rename one and index the texts again, or write a condition without them"
        problem = f"columns {used} differ only in case, which SQL ignores"
        raise UserError(f"--where {condition!r}: {problem}; {advice}")
    number = unused_name("_row", [*columns, *RESERVED_COLUMNS])
    try:
        with duckdb.connect(config=SAFE_SETTINGS) as connection:
            connection.execute("SET lock_configuration = true")
            for start, segment in zip(snapshot.starts, snapshot.segments):
                size = len(segment)
                table = segment.rows().drop_columns([HASH])
                table = table.append_column(number, number_array(np.arange(size)))
                matches = connection.from_arrow(table).filter(condition).project(number)
                rows = matches.fetchnumpy()[number]
                here = np.zeros(size, bool)
                here[np.asarray(rows, np.int64)] = True
                mask[start : start + size] &= here
    except duckdb.Error as error:
        advice = f"write a condition over {', '.join(columns)}, with texts in single quotes"
        raise UserError(f"--where {condition!r}: {one_line(error)}; {advice}") from error
    return mask


def unused_name(wanted: str, taken: list[str]) -> str:
    """Return the wanted column name, with "_" added until it is none of `taken`. SQL ignores case,
    and so does this.
    """
    lowered = [name.lower() for name in taken]
    while wanted.lower() in lowered:
        wanted += "_"
    return wanted


def cache_stamp(folder: Path) -> str | None:
    """Return the state of the index that a cache was made of, None if it can't be read."""
    try:
        return (folder / CACHE_STAMP).read_text("utf-8")
    except (OSError, ValueError):
        return None
