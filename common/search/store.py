"""An index on disk, as it is written: a `Store` makes the next state of it.

A crash at any moment leaves the last committed manifest and all of its files: each file, the
manifest and the folder are fsynced in that order. As an index grows, small files are merged,
because each takes a file descriptor. One writer at a time holds a lock, which ends with its
process.
"""

import contextlib
import errno
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.errors import UserError
from common.files import only_writer, replace_file, seal, sync_file
from common.search.index import (
    CACHE_PREFIX,
    RESERVED_COLUMNS,
    ROW_COLUMNS,
    VECTOR,
    CheckedFile,
    ColumnTypes,
    Segment,
    Snapshot,
    cache_stamp,
    checksums,
    map_file,
    number_array,
    open_snapshot,
    pack,
    wider,
)
from common.search.manifest import (
    FORMAT,
    MANIFEST,
    FileEntry,
    Manifest,
    Settings,
    check_folder,
    entries_of,
    store_of,
)

ABANDONED = 86_400  # seconds after which an unfinished cache must be that of a killed process
# the limits of a merged file, which is put together in memory: 65,536 rows, 64 MiB
SEGMENT_ROWS, SEGMENT_BYTES = 65_536, 64 << 20
MERGED = 32  # this many small files in a row are merged
# A file with fewer rows is small. Files below the first size are merged first, then those below
# the next, so that no row is rewritten often.
SIZES = (32, 1_024, SEGMENT_ROWS)


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
        columns, segments = self.snapshot.columns, list(self.snapshot.segments)
        rows = np.asarray(deleted_rows, dtype=np.int64)
        numbers = self.snapshot.segment_numbers(rows)
        for number in np.unique(numbers):
            alive = segments[number].alive.copy()
            alive[rows[numbers == number] - self.snapshot.starts[number]] = False
            segments[number] = self._with_deleted(segments[number], number, alive)
        if added is not None and len(added):
            columns = with_columns_of(added.schema, columns if self.snapshot.num_rows else {})
            segments = [segment.with_columns(columns) for segment in segments]
            segments.append(self._write_segment(added, len(segments), columns))
        self._publish(segments, columns)
        # merge the small files at the end, if there are enough of them
        first = self._first_small_segment()
        if first < len(segments):
            self._rewrite(first, np.arange(self.snapshot.starts[first], self.snapshot.num_rows))

    def compact(self) -> None:
        """Rewrite the live rows, in their order, into few large files without deleted rows."""
        self._rewrite(0, np.flatnonzero(self.snapshot.alive()))

    def set_column(self, name: str, values: np.ndarray, known: np.ndarray) -> None:
        """Commit whole numbers (num_rows) as a column, null where `known` is False; the hashes stay
        those of the source, so that its rows count as unchanged.
        """
        numbers = [int(value) if here else None for value, here in zip(values, known)]
        column = pa.array(numbers, pa.int64())
        self._rewrite(0, np.arange(self.snapshot.num_rows), {name: column})

    def _first_small_segment(self) -> int:
        """Return the number of the first of the small files at the end, if there are enough to be
        merged; otherwise the number of all files.
        """
        segments = self.snapshot.segments
        light = [segment.num_bytes < SEGMENT_BYTES // 2 for segment in segments]
        for rows in SIZES:
            first = len(segments)
            while first and light[first - 1] and len(segments[first - 1]) < rows:
                first -= 1
            if len(segments) - first >= MERGED:
                return first
        return len(segments)

    def _rewrite(self, first: int, rows: np.ndarray, more: Mapping[str, pa.Array] | None = None) -> None:
        """Replace all files from number `first` on by `rows` (ascending), in as few files as the
        limits allow; deleted rows among them stay deleted. `more` (num_rows): columns in the place
        of those of the same name.
        """
        snapshot, more = self.snapshot, more or {}
        columns = {**snapshot.columns, **{name: values.type for name, values in more.items()}}
        segments, alive = snapshot.segments[:first], snapshot.alive()
        row_bytes = np.array([part.num_bytes / max(len(part), 1) for part in snapshot.segments])
        # the share of a full file that each row takes; the shares before a row tell its file
        share_of_row = np.maximum(1 / SEGMENT_ROWS, row_bytes / SEGMENT_BYTES)
        shares = share_of_row[snapshot.segment_numbers(rows)]
        file_numbers = np.floor(np.cumsum(shares) - shares)
        file_starts = np.flatnonzero(np.diff(file_numbers)) + 1
        for part in np.split(rows, file_starts):
            if len(part):
                # in one expression: the rows of one file are let go
                # before those of the next are read
                segment = self._write_segment(self._table(part, more), len(segments), columns)
                segments.append(self._with_deleted(segment, len(segments), alive[part]))
        self._publish(segments, columns)

    def _table(self, rows: np.ndarray, more: Mapping[str, pa.Array]) -> pa.Table:
        """Return some rows (ascending) with their vectors, and with the columns of `more`."""
        parts = self.snapshot.by_segment(rows)
        tables = [segment.rows(None, offsets) for segment, _, offsets in parts]
        table = pa.concat_tables(tables)
        for name, values in more.items():
            kept = [other for other in table.column_names if other != name]
            table = table.select(kept).append_column(name, values.take(number_array(rows)))
        vectors = pack(self.snapshot.vectors_of(rows), store_of(self.snapshot.settings))
        return table.append_column(VECTOR, vector_array(vectors))

    @property
    def _generation(self) -> int:
        """The number of the next state."""
        return self.snapshot.manifest["generation"] + 1

    def _write_segment(self, rows: pa.Table, number: int, columns: ColumnTypes) -> Segment:
        """Write rows to a new file, their metadata in the order of `columns`, without those that
        have no value at all.
        """
        path = self.folder / f"segment-{self._generation:08d}-{number:04d}.arrow"
        present = [name for name in columns if name in rows.column_names]
        present = [name for name in present if not pa.types.is_null(rows.schema.field(name).type)]
        _write_arrow(path, rows.select([*ROW_COLUMNS, *present, VECTOR]))
        file = _new_file(path, len(rows))
        segment = Segment(file, columns, self.snapshot.settings)
        segment.entry["body"], segment.entry["deleted"] = segment.body(), None
        return segment

    def _with_deleted(self, segment: Segment, number: int, alive: np.ndarray) -> Segment:
        """Return a segment with other live rows, after writing the file of its deleted ones."""
        if alive.all():
            return segment
        deleted = np.flatnonzero(~alive).astype(np.uint32)
        table = pa.Table.from_arrays([number_array(deleted)], ["row"])
        path = self.folder / f"deleted-{self._generation:08d}-{number:04d}.arrow"
        _write_arrow(path, table)
        entry: FileEntry = {**segment.entry, "deleted": _new_file(path, len(table)).entry}
        return segment.with_alive(entry, alive)

    def record_model(self, name: str) -> None:
        """Commit another name of the model, which is where it lies now."""
        settings: Settings = {**self.snapshot.settings, "model": name}
        self.snapshot.manifest = {**self.snapshot.manifest, "settings": settings}
        self._publish(self.snapshot.segments, self.snapshot.columns)

    def begin(self) -> None:
        """Commit an index without rows, if nothing was committed yet."""
        if not (self.folder / MANIFEST).is_file():
            self._publish([], {})

    def _publish(self, segments: list[Segment], columns: ColumnTypes) -> None:
        """Commit: from the rename on, readers see the new state. Then remove the old files."""
        manifest: Manifest = {**self.snapshot.manifest, "generation": self._generation}
        manifest["columns"] = {name: str(kind) for name, kind in columns.items()}
        manifest["segments"] = [segment.entry for segment in segments]
        manifest["sha256"] = seal({**manifest, "sha256": None})
        replace_file(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        self.snapshot = Snapshot(self.folder, manifest, segments)
        self.clean()

    def clean(self) -> None:
        """Remove the files and caches of older states and of crashed writers: also old caches,
        because they hold deleted texts. A reader that has a file open can still read it.
        """
        named = entries_of(self.snapshot.manifest)
        for path in self.folder.iterdir():
            is_ours = path.name.startswith(("segment-", "deleted-", f"{MANIFEST}."))
            if is_ours and path.name not in named:
                path.unlink()
        for path in self.folder.glob(f"{CACHE_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                if "." in path.name:  # unfinished
                    stale = time.time() - path.stat().st_mtime > ABANDONED
                else:
                    stale = not (cache_stamp(path) or "").startswith(self.snapshot.stamp)
                if stale:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def open_store(folder: str | Path, *, settings: Settings | None = None, wait: float = 0.0) -> Iterator[Store]:
    """Open an index as its only writer. With `settings`, a folder that is missing or empty becomes
    a new index: with the first commit, or else when the block ends well. What fails before that
    binds the folder to nothing.

    Raises UserError when the folder is something else, when one of its files is damaged, or when
    another writer holds the lock for longer than `wait` seconds.
    """
    folder = Path(folder)
    check_folder(folder, new=settings is not None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        problem = f"can't be written: {reason}"
        raise UserError(f"--index {folder}: {problem}; name another folder") from error
    with only_writer(folder, flag="--index", wait=wait), _full_disk_explained(folder):
        if settings is not None and not (folder / MANIFEST).is_file():
            empty = Manifest(
                format=FORMAT, generation=0, settings=settings, columns={}, segments=[], sha256=None
            )
            store = Store(folder, Snapshot(folder, empty, []))
        else:
            store = Store(folder, open_snapshot(folder))
        store.clean()
        yield store
        store.begin()


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


@contextlib.contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk within the block into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = "free some space and run the same command again"
        problem = f"{error.strerror}: what was committed stays"
        raise UserError(f"--index {folder}: {problem}; {advice}") from error


def vector_array(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """Return vectors (rows, numbers), or what is kept of them, as an Arrow array without a copy."""
    values = number_array(vectors.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])


def _write_arrow(path: Path, table: pa.Table) -> None:
    """Write a table as one record batch of an Arrow IPC file, and fsync it."""
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(len(table), 1))
    sync_file(path)


def _new_file(path: Path, rows: int) -> CheckedFile:
    """Return a file that was just written, with its entry."""
    content = map_file(path)
    digest = hashlib.sha256(content).hexdigest()
    entry = FileEntry(file=path.name, rows=rows, sha256=digest, checksums=checksums(content))
    return CheckedFile(path, entry, content)
