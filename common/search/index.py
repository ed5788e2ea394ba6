"""An index on disk: `Snapshot` reads one committed state of it, `Store` writes the next.

The folder of an index holds `manifest.json` and the immutable Arrow files that the manifest names,
each with its SHA-256. A writer adds files first and then renames a new manifest into place, so a
reader always has one complete state. A crash at any moment leaves the last committed manifest and
all of its files: each file, the manifest and the folder are fsynced in that order. Every file is
verified when an index is opened; any Arrow reader can read it. As an index grows, small files are
merged, because each takes a file descriptor. One writer at a time holds a lock, which ends with its
process; readers need none.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import mmap
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import filelock
import numpy as np
import pyarrow as pa

from common.errors import UserError
from common.files import replace_file, seal, sha256, sync_file
from common.search.encoder import Identity

FORMAT = "embed_search index 1"
MANIFEST, LOCK = "manifest.json", ".lock"
CACHE_PREFIX = "cache-"  # of the folder of a cache
CACHE_STAMP = "stamp"  # the file of a cache that says which state of the index it was made of
ABANDONED = 86_400  # seconds after which an unfinished cache must be that of a killed process
ID, HASH, TEXT, VECTOR = "_id", "_hash", "_text", "_vector"
# a chunk's number in its document, the document's number of chunks (both under the names of older
# indexes), and the chunk's first character in the document
CHUNK, NUM_CHUNKS, START = "_passage", "_passages", "_start"
ROW_COLUMNS = (ID, HASH, CHUNK, NUM_CHUNKS, START, TEXT)  # before the metadata; the vector is last
RESERVED_COLUMNS = (*ROW_COLUMNS, VECTOR)
# a smaller file (bytes) is read, not mapped: a map holds a descriptor, and a process may have
# only 256
MAPPED = 65_536
# the limits of a merged file, which is put together in memory: 65,536 rows, 64 MiB
SEGMENT_ROWS, SEGMENT_BYTES = 65_536, 64 << 20
MERGED = 32  # this many small files in a row are merged
# A file with fewer rows is small. Files below the first size are merged first, then those below
# the next, so that no row is rewritten often.
SIZES = (32, 1_024, SEGMENT_ROWS)


class Settings(Identity):
    """How an index is made; `chunk_overlap` is None for whole texts."""

    id_column: str | None
    chunk_overlap: int | None


class FileEntry(TypedDict):
    """A file that a manifest names: a segment, or the numbers of the rows deleted from one."""

    file: str
    rows: int
    sha256: str
    deleted: NotRequired["FileEntry | None"]  # in the entry of a segment


class Manifest(TypedDict):
    """The state of an index. `columns`: metadata column -> Arrow type; `sha256` is the hash of all
    the rest, None while that is computed.
    """

    format: str
    generation: int  # the number of the state, one higher with each commit
    settings: Settings
    columns: dict[str, str]
    segments: list[FileEntry]
    sha256: str | None


@dataclass(frozen=True)
class Segment:
    """An immutable file of rows: its `entry` in the manifest, `table` without the vectors,
    `vectors` (rows, width) in float32, `alive` (rows) False where deleted.
    """

    entry: FileEntry
    table: pa.Table
    vectors: np.ndarray
    alive: np.ndarray

    @property
    def num_bytes(self) -> int:
        """The space that its rows take."""
        return self.table.nbytes + self.vectors.nbytes


class Snapshot:
    """One committed state of an index. Rows are numbered from 0, deleted ones included."""

    def __init__(self, folder: Path, manifest: Manifest, segments: list[Segment]) -> None:
        self.folder, self.manifest, self.segments = folder, manifest, segments
        # the first row of each segment, and the number of rows
        self.starts = np.cumsum([0, *(len(segment.alive) for segment in segments)])

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
            for offset in range(0, len(segment.vectors), size):
                yield int(start) + offset, segment.vectors[offset : offset + size]

    def vectors_of(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return a copy (rows, width) of the vectors of some rows."""
        rows = np.asarray(rows, dtype=np.int64)
        vectors = np.empty((len(rows), self.width), np.float32)
        for segment, here, offsets in self.by_segment(rows):
            vectors[here] = segment.vectors[offsets]
        return vectors

    def take(self, rows: np.ndarray | Sequence[int], columns: list[str] | None = None) -> list[dict]:
        """Return some rows as dicts, in the given order; all columns but the vectors, or those
        named.
        """
        rows = np.asarray(rows, dtype=np.int64)
        taken: list[dict] = [{}] * len(rows)
        for segment, here, offsets in self.by_segment(rows):
            table = segment.table if columns is None else segment.table.select(columns)
            entries = table.take(pa.array(offsets)).to_pylist()
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
    index, or a file is missing or damaged.
    """
    folder = Path(folder)
    while True:
        manifest = read_manifest(folder)
        # All files are opened before any is verified, because that takes long: files that are open
        # stay readable when a writer commits and removes them meanwhile.
        try:
            contents = {name: map_file(folder / name) for name in hashes_of(manifest)}
            break
        except FileNotFoundError as error:
            if read_manifest(folder)["sha256"] == manifest["sha256"]:
                advice = "restore it from a copy, or index the texts into a new folder"
                problem = "a file of the index is missing"
                raise UserError(f"{error.filename}: {problem}; {advice}") from error
            # a writer has committed meanwhile: read its state
    for name, expected in hashes_of(manifest).items():
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise _damaged(folder / name, f"its SHA-256 is not the one in {MANIFEST}")
    columns, segments = list(manifest["columns"]), []
    for entry in manifest["segments"]:
        segment = make_segment(entry, contents[entry["file"]], columns)
        if deleted := entry.get("deleted"):
            rows = _read_arrow(contents[deleted["file"]]).column("row").to_numpy()
            segment.alive[rows] = False
        segments.append(segment)
    return Snapshot(folder, manifest, segments)


def hashes_of(manifest: Manifest) -> dict[str, str]:
    """Return the files that a manifest names, each with its SHA-256."""
    hashes = {}
    for entry in manifest["segments"]:
        hashes[entry["file"]] = entry["sha256"]
        if deleted := entry.get("deleted"):
            hashes[deleted["file"]] = deleted["sha256"]
    return hashes


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of an index. Raises UserError when it is missing or damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        what = "not an index (it has no manifest.json)" if folder.exists() else "no such folder"
        raise UserError(
            f"--index {folder}: {what}; make one with: embed_search.py index TEXTS --index {folder}"
        )
    try:
        manifest = json.loads(path.read_bytes())
        is_index = manifest.get("format") == FORMAT
        if is_index and manifest["sha256"] != seal({**manifest, "sha256": None}):
            raise ValueError("the seal is broken")
    except (ValueError, AttributeError, KeyError) as error:
        raise _damaged(path, "its SHA-256 does not match its content") from error
    if not is_index:
        raise UserError(f"--index {folder}: its manifest.json is not {FORMAT!r}; name another folder")
    return manifest


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: damaged ({reason}); restore it from a copy, or index the texts into a new folder"
    )


def map_file(path: Path) -> mmap.mmap | bytearray:
    """Return the content of a file: memory-mapped, or a copy if it is small."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < MAPPED:
            return bytearray(file.read())
        # copy-on-write: torch wants writable memory, and the file stays as it is
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _read_arrow(content: mmap.mmap | bytearray) -> pa.Table:
    return pa.ipc.open_file(pa.py_buffer(content)).read_all()


def make_segment(entry: FileEntry, content: mmap.mmap | bytearray, columns: list[str]) -> Segment:
    """Return the content of an Arrow file as a segment whose rows are all live, with its metadata
    in the order of `columns`.
    """
    table = _read_arrow(content)
    lists = table.column(VECTOR).chunk(0)  # one list of floats per row
    count, width = len(lists), lists.type.list_size
    # an array over the content itself: Arrow's own view is read-only, about which torch warns
    _, floats = lists.values.buffers()  # the first buffer marks missing values
    offset = floats.address - pa.py_buffer(content).address
    vectors = np.frombuffer(content, np.float32, count=count * width, offset=offset)
    table = table.select([*ROW_COLUMNS, *columns])
    return Segment(entry, table, vectors.reshape(count, width), np.ones(count, bool))


class Store:
    """An index that is open for writing: `snapshot` is its committed state, which every commit
    replaces.
    """

    def __init__(self, folder: Path, snapshot: Snapshot) -> None:
        self.folder, self.snapshot = folder, snapshot

    def commit(self, added: pa.Table | None, deleted_rows: np.ndarray | Sequence[int] = ()) -> None:
        """Add rows (None: no rows) and delete others, both or neither; when this returns, they are
        on disk. The other rows keep their numbers.
        """
        columns, segments = self.snapshot.manifest["columns"], list(self.snapshot.segments)
        rows = np.asarray(deleted_rows, dtype=np.int64)
        numbers = self.snapshot.segment_numbers(rows)
        for number in np.unique(numbers):
            alive = segments[number].alive.copy()
            alive[rows[numbers == number] - self.snapshot.starts[number]] = False
            segments[number] = self._with_deleted(segments[number], number, alive)
        if added is not None and len(added):
            if not self.snapshot.num_rows:  # the first rows define the metadata
                names = [name for name in added.column_names if name not in RESERVED_COLUMNS]
                columns = {name: str(added.schema.field(name).type) for name in names}
            segments.append(self._write_segment(added, len(segments), columns))
        self._publish(segments, columns)
        # merge the small files at the end, if there are enough of them
        first = self._first_small_segment()
        if first < len(segments):
            self._rewrite(first, np.arange(self.snapshot.starts[first], self.snapshot.num_rows))

    def compact(self) -> None:
        """Rewrite the live rows, in their order, into few large files without deleted rows."""
        self._rewrite(0, np.flatnonzero(self.snapshot.alive()))

    def _first_small_segment(self) -> int:
        """Return the number of the first of the small files at the end, if there are enough to be
        merged; otherwise the number of all files.
        """
        segments = self.snapshot.segments
        light = [segment.num_bytes < SEGMENT_BYTES // 2 for segment in segments]
        for rows in SIZES:
            first = len(segments)
            while first and light[first - 1] and len(segments[first - 1].alive) < rows:
                first -= 1
            if len(segments) - first >= MERGED:
                return first
        return len(segments)

    def _rewrite(self, first: int, rows: np.ndarray) -> None:
        """Replace all files from number `first` on by `rows` (ascending), in as few files as the
        limits allow; deleted rows among them stay deleted.
        """
        snapshot, columns = self.snapshot, self.snapshot.manifest["columns"]
        segments, alive = snapshot.segments[:first], snapshot.alive()
        row_bytes = np.array([part.num_bytes / max(len(part.alive), 1) for part in snapshot.segments])
        # the share of a full file that each row takes; the shares before a row tell its file
        shares = np.maximum(1 / SEGMENT_ROWS, row_bytes / SEGMENT_BYTES)[snapshot.segment_numbers(rows)]
        file_numbers = np.floor(np.cumsum(shares) - shares)
        file_starts = np.flatnonzero(np.diff(file_numbers)) + 1
        for part in np.split(rows, file_starts):
            if len(part):
                segment = self._write_segment(self._table(part), len(segments), columns)
                segments.append(self._with_deleted(segment, len(segments), alive[part]))
        self._publish(segments, columns)

    def _table(self, rows: np.ndarray) -> pa.Table:
        """Return some rows (ascending) with their vectors."""
        parts = self.snapshot.by_segment(rows)
        tables = [segment.table.take(pa.array(offsets)) for segment, _, offsets in parts]
        table = pa.concat_tables(tables)
        return table.append_column(VECTOR, vector_array(self.snapshot.vectors_of(rows)))

    @property
    def _generation(self) -> int:
        """The number of the next state."""
        return self.snapshot.manifest["generation"] + 1

    def _write_segment(self, rows: pa.Table, number: int, columns: dict[str, str]) -> Segment:
        """Write rows to a new file, their metadata in the order of `columns`."""
        path = self.folder / f"segment-{self._generation:08d}-{number:04d}.arrow"
        _write_arrow(path, rows.select([*ROW_COLUMNS, *columns, VECTOR]))
        content = map_file(path)
        digest = hashlib.sha256(content).hexdigest()
        entry = FileEntry(file=path.name, rows=len(rows), sha256=digest, deleted=None)
        return make_segment(entry, content, list(columns))

    def _with_deleted(self, segment: Segment, number: int, alive: np.ndarray) -> Segment:
        """Return a segment with other live rows, after writing the file of its deleted ones."""
        if alive.all():
            return segment
        table = pa.table({"row": np.flatnonzero(~alive).astype(np.uint32)})
        path = self.folder / f"deleted-{self._generation:08d}-{number:04d}.arrow"
        _write_arrow(path, table)
        deleted = FileEntry(file=path.name, rows=len(table), sha256=sha256(path))
        entry: FileEntry = {**segment.entry, "deleted": deleted}
        return dataclasses.replace(segment, entry=entry, alive=alive)

    def _publish(self, segments: list[Segment], columns: dict[str, str]) -> None:
        """Commit: from the rename on, readers see the new state. Then remove the old files."""
        manifest: Manifest = {**self.snapshot.manifest, "generation": self._generation}
        manifest["columns"] = columns
        manifest["segments"] = [segment.entry for segment in segments]
        manifest["sha256"] = seal({**manifest, "sha256": None})
        replace_file(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        self.snapshot = Snapshot(self.folder, manifest, segments)
        self.clean()

    def clean(self) -> None:
        """Remove the files and caches of older states and of crashed writers: also old caches,
        because they hold deleted texts. A reader that has a file open can still read it.
        """
        named = hashes_of(self.snapshot.manifest)
        for path in self.folder.iterdir():
            if path.name.startswith(("segment-", "deleted-", f"{MANIFEST}.")) and path.name not in named:
                path.unlink()
        for path in self.folder.glob(f"{CACHE_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                if "." in path.name:  # unfinished
                    stale = time.time() - path.stat().st_mtime > ABANDONED
                else:
                    stale = cache_stamp(path) != self.snapshot.stamp
                if stale:
                    shutil.rmtree(path, ignore_errors=True)


def cache_stamp(folder: Path) -> str | None:
    """Return the state of the index that a cache was made of, None if it can't be read."""
    try:
        return (folder / CACHE_STAMP).read_text("utf-8")
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def open_store(folder: str | Path, *, settings: Settings | None = None, wait: float = 0.0) -> Iterator[Store]:
    """Open an index as its only writer. With `settings`, a folder that is missing or empty becomes
    a new index.

    Raises UserError when the folder is something else, when one of its files is damaged, or when
    another writer holds the lock for longer than `wait` seconds.
    """
    folder = Path(folder)
    check_folder(folder, new=settings is not None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder, wait)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--index {folder}: can't be written: {reason}; name another folder") from error
    try:
        if settings is not None and not (folder / MANIFEST).is_file():
            empty = Manifest(
                format=FORMAT, generation=0, settings=settings, columns={}, segments=[], sha256=None
            )
            replace_file(folder / MANIFEST, json.dumps({**empty, "sha256": seal(empty)}, indent=1))
        store = Store(folder, open_snapshot(folder))
        store.clean()
        yield store
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = "free some space and run the same command again"
        problem = f"{error.strerror}: what was committed stays"
        raise UserError(f"--index {folder}: {problem}; {advice}") from error
    finally:
        lock.release()


def check_folder(folder: Path, *, new: bool) -> None:
    """Raise UserError unless a folder is an index or, with `new`, can become one: it is missing or
    empty.
    """
    if new and (not folder.exists() or _is_empty(folder)):
        return
    if folder.exists() and not (folder / MANIFEST).is_file():
        what = "holds other files but no index" if folder.is_dir() else "is a file"
        raise UserError(
            f"--index {folder}: it {what}; name a new folder or one made by: embed_search.py index"
        )
    read_manifest(folder)  # a missing or damaged index is reported before a lock is made


def _is_empty(folder: Path) -> bool:
    """Tell whether a folder has at most the files of a writer that never wrote its manifest."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    return all(name == LOCK or name.startswith(f"{MANIFEST}.") for name in names)


def _lock(folder: Path, wait: float) -> filelock.BaseFileLock:
    """Return the lock of an index, acquired. Waits for another writer, and says so."""
    lock = filelock.FileLock(folder / LOCK)
    other = f"--index {folder}: another process is"
    with contextlib.suppress(filelock.Timeout):
        lock.acquire(timeout=0)
        return lock
    if wait:
        print(f"{other} writing to it; waiting {wait:g} s", file=sys.stderr, flush=True)
    try:
        lock.acquire(timeout=wait)
    except filelock.Timeout:
        raise UserError(f"{other} still writing to it; try again later, or raise --wait") from None
    return lock


def vector_array(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """Return vectors (rows, width) as an Arrow array, without a copy."""
    values = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])


def _write_arrow(path: Path, table: pa.Table) -> None:
    """Write a table as one record batch of an Arrow IPC file, and fsync it."""
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(len(table), 1))
    sync_file(path)
