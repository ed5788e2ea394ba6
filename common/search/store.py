"""How an index is written: immutable files first, then one manifest that names them, renamed into place.

A crash at any moment leaves the last committed manifest and all files that it names. Each file, the manifest and the folder are fsynced in
that order. One writer at a time holds a lock on the folder (a lock of the operating system: it ends with its process); readers need none.
"""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa

from common.durable import sync_folder
from common.errors import UserError
from common.search.snapshot import FORMAT, LOCK, MANIFEST, OWN_COLUMNS, VECTOR, Snapshot, open_snapshot, read_manifest, read_segment, seal

SEGMENT_ROWS = 65_536  # rows a file after compact: of 384 dimensions it is 100 MB


class Store:
    """An index open for writing: `snapshot` is its committed state, and each commit() replaces it."""

    def __init__(self, folder: Path, snapshot: Snapshot):
        self.folder, self.snapshot = folder, snapshot

    def commit(self, added: pa.Table | None, deleted_rows=()):
        """Add rows (None: no rows) and delete others, both or neither; when this returns, it is on disk."""
        manifest = {**self.snapshot.manifest, "generation": self.snapshot.manifest["generation"] + 1}
        manifest["segments"] = self._with_deleted(manifest, np.asarray(deleted_rows, dtype=np.int64))
        if added is not None and len(added):
            manifest["segments"].append(self._write_segment(manifest, 0, added))
            manifest["columns"] = {name: str(added.schema.field(name).type) for name in added.column_names if name not in OWN_COLUMNS}
        self._replace(manifest)

    def compact(self):
        """Write all live rows anew, in their order, in few large files without deleted rows."""
        manifest = {**self.snapshot.manifest, "generation": self.snapshot.manifest["generation"] + 1, "segments": []}
        rows = np.flatnonzero(self.snapshot.alive())
        for start in range(0, len(rows), SEGMENT_ROWS):
            manifest["segments"].append(self._write_segment(manifest, len(manifest["segments"]), self._table(rows[start : start + SEGMENT_ROWS])))
        self._replace(manifest)

    def _table(self, rows: np.ndarray) -> pa.Table:
        """Return some rows (in ascending order) with their vectors."""
        numbers = np.searchsorted(self.snapshot.starts, rows, side="right") - 1
        parts = [self.snapshot.segments[number].table.take(pa.array(rows[numbers == number] - self.snapshot.starts[number])) for number in np.unique(numbers)]
        return pa.concat_tables(parts).append_column(VECTOR, vector_array(self.snapshot.vectors_of(rows)))

    def _with_deleted(self, manifest: dict, rows: np.ndarray) -> list[dict]:
        """Return the segments' entries, with a new file of deleted rows where there are more of them."""
        entries, numbers = list(manifest["segments"]), np.searchsorted(self.snapshot.starts, rows, side="right") - 1
        for number in np.unique(numbers):
            alive = self.snapshot.segments[number].alive.copy()
            alive[rows[numbers == number] - self.snapshot.starts[number]] = False
            name = f"deleted-{manifest['generation']:08d}-{number:04d}.arrow"
            table = pa.table({"row": np.flatnonzero(~alive).astype(np.uint32)})
            entries[number] = {**entries[number], "deleted": {"file": name, "rows": len(table), "sha256": _write_arrow(self.folder / name, table)}}
        return entries

    def _write_segment(self, manifest: dict, number: int, rows: pa.Table) -> dict:
        name = f"segment-{manifest['generation']:08d}-{number:04d}.arrow"
        return {"file": name, "rows": len(rows), "sha256": _write_arrow(self.folder / name, rows), "deleted": None}

    def _replace(self, manifest: dict):
        """Commit: from the rename on, the new state is the one that is read. Then drop what no manifest names."""
        manifest["sha256"] = seal(manifest)
        _write_manifest(self.folder, manifest)
        known = {json.dumps(entry): segment for entry, segment in zip(self.snapshot.manifest["segments"], self.snapshot.segments)}
        self.snapshot = Snapshot(self.folder, manifest, [known.get(json.dumps(entry)) or read_segment(self.folder, entry) for entry in manifest["segments"]])
        self.clean()

    def clean(self):
        """Remove the files of older states and of crashed writers. A reader that has them open keeps them."""
        named = {entry["file"] for entry in self.snapshot.manifest["segments"]}
        named |= {entry["deleted"]["file"] for entry in self.snapshot.manifest["segments"] if entry["deleted"]}
        for path in self.folder.iterdir():
            if path.name.startswith(("segment-", "deleted-", f"{MANIFEST}.")) and path.name not in named:
                path.unlink()


@contextlib.contextmanager
def writing(folder: str | Path, *, settings: dict | None = None, wait: float = 0.0):
    """Open an index for writing, alone; with `settings`, a folder that is missing or empty becomes a new index.

    Raises UserError when the folder is something else, when a file of it is damaged, or when another writer has it for longer than `wait` seconds.
    """
    folder = Path(folder)
    others = [path.name for path in folder.iterdir() if path.name != LOCK and not path.name.startswith(f"{MANIFEST}.")] if folder.is_dir() else []
    new = settings is not None and not others and (folder.is_dir() or not folder.exists())
    if not new:
        _check_is_index(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder, wait)
    except OSError as error:
        raise UserError(f"--index {folder}: can't be written: {error.strerror or error}; name another folder") from error
    try:
        if not (folder / MANIFEST).is_file():
            manifest = {"format": FORMAT, "generation": 0, "settings": settings, "columns": {}, "segments": []}
            _write_manifest(folder, {**manifest, "sha256": seal(manifest)})
        store = Store(folder, open_snapshot(folder))
        store.clean()
        yield store
    finally:
        lock.release()


def _check_is_index(folder: Path):
    if folder.exists() and not (folder / MANIFEST).is_file():
        what = "is a file" if not folder.is_dir() else "holds other files and no index"
        raise UserError(f"--index {folder}: it {what}; name a new folder or one that was made by: embed_search.py index")
    read_manifest(folder)  # missing, damaged or of another format: said before a lock is made


def _lock(folder: Path, wait: float) -> filelock.BaseFileLock:
    lock = filelock.FileLock(folder / LOCK)
    try:
        return lock.acquire(timeout=0).lock
    except filelock.Timeout:
        if wait:
            print(f"--index {folder}: another process is writing to it; waiting {wait:g} s", file=sys.stderr, flush=True)
        try:
            return lock.acquire(timeout=wait).lock
        except filelock.Timeout:
            raise UserError(f"--index {folder}: another process is still writing to it; run this again when it is done, or raise --wait") from None


def vector_array(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """Return vectors (rows, width) as an Arrow array, without a copy."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1)), vectors.shape[1])


class _HashedFile:
    """A file that counts its SHA-256 as it is written."""

    closed = False

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def _write_arrow(path: Path, table: pa.Table) -> str:
    """Write a table as one record batch of an Arrow IPC file, down to the disk; return its SHA-256."""
    with open(path, "wb") as file:
        hashed = _HashedFile(file)
        with pa.ipc.new_file(hashed, table.schema) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=max(len(table), 1))
        file.flush()
        os.fsync(file.fileno())
    return hashed.digest.hexdigest()


def _write_manifest(folder: Path, manifest: dict):
    fresh = folder / f"{MANIFEST}.{os.getpid()}"
    with open(fresh, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)  # the files that it names stand in the folder before the manifest does
    fresh.rename(folder / MANIFEST)
    sync_folder(folder)
