"""How an index is written: immutable files first, then one manifest that names them, renamed into
place.

A crash at any moment leaves the last committed manifest and all files that it names. Each file,
the manifest and the folder are fsynced in that order. As an index grows, small files in a row are
joined to larger ones: each takes a descriptor and a line of the manifest. One writer at a time
holds a lock on the folder (a lock of the operating system: it ends with its process); readers need
none.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import sys
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa

from common.errors import UserError
from common.files import replace_file, sha256, sync_file
from common.search import sidecar
from common.search.index import (
    FORMAT,
    LOCK,
    MANIFEST,
    OWN_COLUMNS,
    VECTOR,
    Segment,
    Snapshot,
    files,
    make_segment,
    map_file,
    open_snapshot,
    read_manifest,
    seal,
)

# of a file at most, when files are joined: as much is copied in memory
SEGMENT_ROWS, SEGMENT_BYTES = 65_536, 64 << 20
JOINED = 32  # so many small files in a row become one
# rows below which a file is small: first those of the smallest are joined, so that no row is
# written often
SIZES = (32, 1_024, SEGMENT_ROWS)


class Store:
    """An index open for writing: `snapshot` is its committed state, and each commit()
    replaces it.
    """

    def __init__(self, folder: Path, snapshot: Snapshot):
        self.folder, self.snapshot = folder, snapshot

    def commit(self, added: pa.Table | None, deleted_rows=()):
        """Add rows (None: no rows) and delete others, both or neither; when this returns, it is on
        disk. The numbers of the other rows stay.
        """
        manifest, segments = self._next(), list(self.snapshot.segments)
        self._delete(manifest, segments, np.asarray(deleted_rows, dtype=np.int64))
        if added is not None and len(added):
            if not self.snapshot.num_rows:
                manifest["columns"] = {
                    name: str(added.schema.field(name).type)
                    for name in added.column_names
                    if name not in OWN_COLUMNS
                }
            segments.append(self._write_segment(manifest, added))
        self._replace(manifest, segments)
        first = self._first_small()
        if first < len(segments):
            self._rewrite(first, np.arange(self.snapshot.starts[first], self.snapshot.num_rows))

    def compact(self):
        """Write all live rows anew, in their order, in few large files without deleted rows."""
        self._rewrite(0, np.flatnonzero(self.snapshot.alive()))

    def _next(self) -> dict:
        manifest = self.snapshot.manifest
        return {**manifest, "generation": manifest["generation"] + 1, "segments": list(manifest["segments"])}

    def _first_small(self) -> int:
        """Return the first of at least JOINED small files in a row at the end, or the number of
        files.
        """
        segments = self.snapshot.segments
        for rows in SIZES:
            first = len(segments)
            while (
                first
                and len(segments[first - 1].alive) < rows
                and segments[first - 1].num_bytes < SEGMENT_BYTES // 2
            ):
                first -= 1
            if len(segments) - first >= JOINED:
                return first
        return len(segments)

    def _rewrite(self, first: int, rows: np.ndarray):
        """Put `rows` (ascending), in as few files as their size allows, in the place of all files
        from `first` on; deleted ones stay deleted.
        """
        manifest, segments, alive = self._next(), self.snapshot.segments[:first], self.snapshot.alive()
        manifest["segments"] = manifest["segments"][:first]
        costs = np.array(
            [
                max(1 / SEGMENT_ROWS, segment.num_bytes / max(len(segment.alive), 1) / SEGMENT_BYTES)
                for segment in self.snapshot.segments
            ]
        )
        # the part of a file that a row fills
        cost = costs[self._segment_of(rows)] if len(rows) else np.zeros(0)
        for part in np.split(rows, np.flatnonzero(np.diff(np.floor(np.cumsum(cost) - cost))) + 1):
            if len(part):
                segments.append(self._write_segment(manifest, self._table(part)))
                self._write_deleted(manifest, segments, len(segments) - 1, alive[part])
        self._replace(manifest, segments)

    def _segment_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.snapshot.starts, rows, side="right") - 1

    def _table(self, rows: np.ndarray) -> pa.Table:
        """Return some rows (in ascending order) with their vectors."""
        numbers = self._segment_of(rows)
        parts = [
            self.snapshot.segments[number].table.take(
                pa.array(rows[numbers == number] - self.snapshot.starts[number])
            )
            for number in np.unique(numbers)
        ]
        return pa.concat_tables(parts).append_column(VECTOR, vector_array(self.snapshot.vectors_of(rows)))

    def _delete(self, manifest: dict, segments: list[Segment], rows: np.ndarray):
        """Write a new file of deleted rows for each segment that has more of them."""
        numbers = self._segment_of(rows)
        for number in np.unique(numbers):
            alive = segments[number].alive.copy()
            alive[rows[numbers == number] - self.snapshot.starts[number]] = False
            self._write_deleted(manifest, segments, number, alive)

    def _write_deleted(self, manifest: dict, segments: list[Segment], number: int, alive: np.ndarray):
        if not alive.all():
            table = pa.table({"row": np.flatnonzero(~alive).astype(np.uint32)})
            path = self.folder / f"deleted-{manifest['generation']:08d}-{number:04d}.arrow"
            _write_arrow(path, table)
            manifest["segments"][number] = {
                **manifest["segments"][number],
                "deleted": {"file": path.name, "rows": len(table), "sha256": sha256(path)},
            }
            segments[number] = dataclasses.replace(segments[number], alive=alive)

    def _write_segment(self, manifest: dict, rows: pa.Table) -> Segment:
        """Write rows, their columns in the manifest's order, and enter the file into the
        manifest.
        """
        path = self.folder / f"segment-{manifest['generation']:08d}-{len(manifest['segments']):04d}.arrow"
        _write_arrow(
            path,
            rows.select([*(name for name in OWN_COLUMNS if name != VECTOR), *manifest["columns"], VECTOR]),
        )
        content = map_file(path)
        manifest["segments"].append(
            {
                "file": path.name,
                "rows": len(rows),
                "sha256": hashlib.sha256(content).hexdigest(),
                "deleted": None,
            }
        )
        return make_segment(content, list(manifest["columns"]))

    def _replace(self, manifest: dict, segments: list[Segment]):
        """Commit: from the rename on, the new state is the one that is read. Then drop what no
        manifest names.
        """
        manifest["sha256"] = seal(manifest)
        replace_file(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        self.snapshot = Snapshot(self.folder, manifest, segments)
        self.clean()

    def clean(self):
        """Remove the files and caches of older states and of crashed writers. A reader that has
        them open keeps them.
        """
        named = files(self.snapshot.manifest)
        for path in self.folder.iterdir():
            if path.name.startswith(("segment-", "deleted-", f"{MANIFEST}.")) and path.name not in named:
                path.unlink()
        sidecar.remove_stale(self.folder, self.snapshot.stamp)


@contextlib.contextmanager
def writing(folder: str | Path, *, settings: dict | None = None, wait: float = 0.0):
    """Open an index for writing, alone; with `settings`, a folder that is missing or empty becomes
    a new index.

    Raises UserError when the folder is something else, when a file of it is damaged, or when
    another writer has it for longer than `wait` seconds.
    """
    folder = Path(folder)
    check_place(folder, new=settings is not None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder, wait)
    except OSError as error:
        raise UserError(
            f"--index {folder}: can't be written: {error.strerror or error}; name another folder"
        ) from error
    try:
        if not (folder / MANIFEST).is_file():
            manifest = {
                "format": FORMAT,
                "generation": 0,
                "settings": settings,
                "columns": {},
                "segments": [],
            }
            replace_file(folder / MANIFEST, json.dumps({**manifest, "sha256": seal(manifest)}, indent=1))
        store = Store(folder, open_snapshot(folder))
        store.clean()
        yield store
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"--index {folder}: {error.strerror}: what was committed stays; free some space and run the same"
            " command again"
        ) from error
    finally:
        lock.release()


def check_place(folder: Path, *, new: bool):
    """Raise UserError unless a folder is an index, or, with `new`, can become one: because it is
    missing or empty.
    """
    if new and (
        not folder.exists()
        or folder.is_dir()
        and all(path.name == LOCK or path.name.startswith(f"{MANIFEST}.") for path in folder.iterdir())
    ):
        return
    if folder.exists() and not (folder / MANIFEST).is_file():
        what = "is a file" if not folder.is_dir() else "holds other files and no index"
        raise UserError(
            f"--index {folder}: it {what}; name a new folder or one that was made by: embed_search.py index"
        )
    read_manifest(folder)  # missing, damaged or of another format: said before a lock is made


def _lock(folder: Path, wait: float) -> filelock.BaseFileLock:
    lock = filelock.FileLock(folder / LOCK)
    try:
        return lock.acquire(timeout=0).lock
    except filelock.Timeout:
        if wait:
            print(
                f"--index {folder}: another process is writing to it; waiting {wait:g} s",
                file=sys.stderr,
                flush=True,
            )
        try:
            return lock.acquire(timeout=wait).lock
        except filelock.Timeout:
            raise UserError(
                f"--index {folder}: another process is still writing to it; run this again when it is done,"
                " or raise --wait"
            ) from None


def vector_array(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """Return vectors (rows, width) as an Arrow array, without a copy."""
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1)), vectors.shape[1]
    )


def _write_arrow(path: Path, table: pa.Table):
    """Write a table as one record batch of an Arrow IPC file, down to the disk."""
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(len(table), 1))
    sync_file(path)
