"""An index on disk: a `Snapshot` is one committed state of it, a `Store` makes the next.

The folder of an index holds `manifest.json` and the immutable Arrow files that the manifest names,
each with its checksums; any Arrow reader can read them. Readers need no lock: a writer adds files
first and then renames a new manifest into place, so that a reader always has one complete state.

A crash at any moment leaves the last committed manifest and all of its files: each file, the
manifest and the folder are fsynced in that order. As an index grows, small files are merged,
because each takes a file descriptor. One writer at a time holds a lock, which ends with its
process.
"""

import contextlib
import errno
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.errors import UserError, one_line, reading
from common.files import member, only_writer, replace_file, seal
from common.search.manifest import (
    ADVICE,
    FORMAT,
    MANIFEST,
    FileEntry,
    Manifest,
    Settings,
    check_folder,
    damaged,
    entries_of,
    read_manifest,
    store_of,
)
from common.search.segments import (
    CHUNK,
    ID,
    NUM_CHUNKS,
    ROW_COLUMNS,
    TEXT,
    VECTOR,
    CheckedFile,
    ColumnTypes,
    Segment,
    check_table,
    column_types,
    deleted_rows,
    exported_names,
    map_file,
    new_file,
    number_array,
    pack,
    read_arrow,
    vector_array,
    with_columns_of,
    write_arrow,
)

ROWS_AT_ONCE = 10_000  # rows that are in memory at once
CACHE_PREFIX = "cache-"  # of the folder of a cache
CACHE_STAMP = "stamp"  # the file of a cache that says which state of the index it was made of
ABANDONED = 86_400  # seconds after which an unfinished cache must be that of a killed process
# the limits of a merged file, which is put together in memory: 65,536 rows, 64 MiB
SEGMENT_ROWS, SEGMENT_BYTES = 65_536, 64 << 20
MERGED = 32  # this many small files in a row are merged
# A file with fewer rows is small. Files below the first size are merged first, then those below
# the next, so that no row is rewritten often.
SIZES = (32, 1_024, SEGMENT_ROWS)


class Snapshot:
    """One committed state of an index. Rows are numbered from 0, deleted ones included."""

    def __init__(self, folder: Path, manifest: Manifest, segments: list[Segment]) -> None:
        self.folder, self.manifest, self.segments = folder, manifest, segments
        self.columns: ColumnTypes = segments[0].columns if segments else {}  # of the metadata
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
    def sha256(self) -> str:
        """The hash of this state, which a cache of it carries."""
        return str(self.manifest["sha256"])

    def is_live(self) -> np.ndarray:
        """Return a mask (num_rows): False for deleted rows."""
        return np.concatenate([np.zeros(0, bool), *(segment.is_live for segment in self.segments)])

    def vector_blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, vectors (at most `size`, width)) over all rows, as views into the
        files.
        """
        for start, segment in zip(self.starts, self.segments):
            for offset, vectors in segment.blocks(size):
                yield int(start) + offset, vectors

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
            with reading(f"{segment.file.path}: damaged", ADVICE):  # a text may be none
                entries = segment.rows(columns, offsets).to_pylist()
            for position, row in zip(np.flatnonzero(here), entries):
                taken[position] = row
        return taken

    def parts(self, rows: np.ndarray) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Yield some rows (ascending), few at a time, under names for other programs,
        and their vectors (rows, width).
        """
        names = exported_names(self.settings, list(self.manifest["columns"]))
        for start in range(0, len(rows), ROWS_AT_ONCE):
            here = rows[start : start + ROWS_AT_ONCE]
            here_by_segment = self.by_segment(here)
            tables = [part.rows([*names], offsets) for part, _, offsets in here_by_segment]
            yield pa.concat_tables(tables).rename_columns([*names.values()]), self.vectors_of(here)

    def texts(self, rows: np.ndarray | None = None) -> Iterator[str]:
        """Yield the texts of some rows (default: the live ones), reading few at a time."""
        rows = np.flatnonzero(self.is_live()) if rows is None else rows
        for start in range(0, len(rows), ROWS_AT_ONCE):
            yield from (row[TEXT] for row in self.take(rows[start : start + ROWS_AT_ONCE], [TEXT]))

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
    tables, segments = [], []
    for entry in manifest["segments"]:
        file = files[entry["file"]]
        with reading(f"{file.path}: not the rows of this index", ADVICE):
            tables.append(read_arrow(file.content))
            check_table(tables[-1], file.content, entry, manifest)
    with reading(f"{Path(folder) / MANIFEST}: its columns are not those of its files", ADVICE):
        columns = column_types(manifest["columns"], tables)
    for entry in manifest["segments"]:
        segment = Segment(files[entry["file"]], columns, manifest["settings"])
        if deleted := entry.get("deleted"):
            deleted_file = files[deleted["file"]]
            with reading(f"{deleted_file.path}: not the deleted rows of this index", ADVICE):
                table = read_arrow(deleted_file.content)
                rows = deleted_rows(table, deleted["rows"], len(segment))
            segment.is_live[rows] = False
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
                files[name] = CheckedFile(folder / name, entry, map_file(member(folder, name)))
            return manifest, files
        except FileNotFoundError as error:
            if read_manifest(folder)["sha256"] == manifest["sha256"]:
                problem = "a file of the index is missing"
                raise UserError(f"{error.filename}: {problem}; {ADVICE}") from error
            # a writer has committed meanwhile: read its state
        except (OSError, ValueError) as error:
            raise damaged(folder / MANIFEST, one_line(error)) from error


def cache_stamp(folder: Path) -> str | None:
    """Return the state of the index that a cache was made of, None if it can't be read."""
    try:
        return member(folder, CACHE_STAMP).read_text("utf-8")
    except (OSError, ValueError):
        return None


def rows_with_ids(snapshot: Snapshot, ids: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return the live rows of some documents, and the ids that the index does not have."""
    rows, wanted, known = [np.zeros(0, np.int64)], set(ids), set()
    for start, segment in zip(snapshot.starts, snapshot.segments):
        keys = segment.rows([ID])[ID].to_pylist()
        here = [row for row in np.flatnonzero(segment.is_live) if keys[row] in wanted]
        rows.append(np.array(here, np.int64) + start)
        known.update(keys[row] for row in here)
    return np.concatenate(rows), [key for key in ids if key not in known]


def known_rows(snapshot: Snapshot, key: str) -> np.ndarray:
    """Return the live rows of one document, in their order. Raises UserError when there is none."""
    rows, unknown = rows_with_ids(snapshot, [key])
    if unknown:
        command = f"embed_search.py list --index {snapshot.folder}"
        problem = f"no text with id {key!r}"
        raise UserError(f"--index {snapshot.folder}: {problem}; {command} shows the ids")
    return rows


def whole_documents(snapshot: Snapshot, rows: np.ndarray) -> np.ndarray:
    """Return the rows of all chunks of the documents that some rows belong to."""
    entries = snapshot.take(rows, [CHUNK, NUM_CHUNKS])
    # first row of a document -> its number of chunks, which are consecutive rows
    sizes = {int(row) - entry[CHUNK]: entry[NUM_CHUNKS] for row, entry in zip(rows, entries)}
    last = snapshot.num_rows
    if any(first < 0 or size < 1 or first + size > last for first, size in sizes.items()):
        problem = "the chunks of a document are not numbered one after the other"
        raise damaged(snapshot.folder, problem)
    all_rows = [first + number for first in sorted(sizes) for number in range(sizes[first])]
    return np.array(all_rows, dtype=np.int64)


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
            is_live = segments[number].is_live.copy()
            is_live[rows[numbers == number] - self.snapshot.starts[number]] = False
            segments[number] = self._with_deleted(segments[number], number, is_live)
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
        self._rewrite(0, np.flatnonzero(self.snapshot.is_live()))

    def set_column(self, name: str, rows: np.ndarray, numbers: np.ndarray) -> None:
        """Commit whole numbers (n) of some rows (n) as a column, null in the place of 0; other rows
        keep theirs. The hashes stay those of the source, so that its rows count as unchanged; the
        manifest remembers that the column is not of the source.
        """
        made = [*self.snapshot.manifest["clusters"], name]
        self.snapshot.manifest = {**self.snapshot.manifest, "clusters": list(dict.fromkeys(made))}
        all_rows = np.arange(self.snapshot.num_rows)
        values: list[int | None] = [None] * len(all_rows)
        if name in self.snapshot.columns:
            values = [row[name] for row in self.snapshot.take(all_rows, [name])]
        for row, number in zip(rows.tolist(), numbers.tolist()):
            values[row] = number or None
        self._rewrite(0, all_rows, {name: pa.array(values, pa.int64())})

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
        segments, is_live = snapshot.segments[:first], snapshot.is_live()
        row_bytes = np.array([part.num_bytes / max(len(part), 1) for part in snapshot.segments])
        # the share of a full file that each row takes; the shares before a row tell its file
        share_of_row = np.maximum(1 / SEGMENT_ROWS, row_bytes / SEGMENT_BYTES)
        shares = share_of_row[snapshot.segment_numbers(rows)]
        file_numbers = np.floor(np.cumsum(shares) - shares)
        file_starts = np.flatnonzero(np.diff(file_numbers)) + 1
        for part in np.split(rows, file_starts):
            if len(part):
                # in one expression: the rows of one file are released before those of the next are read
                segment = self._write_segment(self._table(part, more), len(segments), columns)
                segments.append(self._with_deleted(segment, len(segments), is_live[part]))
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
        write_arrow(path, rows.select([*ROW_COLUMNS, *present, VECTOR]))
        file = new_file(path, len(rows))
        segment = Segment(file, columns, self.snapshot.settings)
        segment.entry["body"], segment.entry["deleted"] = segment.body(), None
        return segment

    def _with_deleted(self, segment: Segment, number: int, is_live: np.ndarray) -> Segment:
        """Return a segment with other live rows, after writing the file of its deleted ones."""
        if is_live.all():
            return segment
        deleted = np.flatnonzero(~is_live).astype(np.uint32)
        table = pa.Table.from_arrays([number_array(deleted)], ["row"])
        path = self.folder / f"deleted-{self._generation:08d}-{number:04d}.arrow"
        write_arrow(path, table)
        entry: FileEntry = {**segment.entry, "deleted": new_file(path, len(table)).entry}
        return segment.with_live_rows(entry, is_live)

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
        made = manifest["clusters"] if segments else []  # an index without rows has no columns any more
        manifest["clusters"] = [name for name in made if name in columns]
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
                    stale = not (cache_stamp(path) or "").startswith(self.snapshot.sha256)
                if stale:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def open_store(folder: str | Path, *, settings: Settings | None = None, wait: float = 0.0) -> Iterator[Store]:
    """Open an index as its only writer. With `settings`, a folder that is missing or empty becomes a new
    index: with the first commit, or else when the block ends well. If something fails before that, the folder
    stays without an index.

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
                format=FORMAT,
                generation=0,
                settings=settings,
                columns={},
                clusters=[],
                segments=[],
                sha256=None,
            )
            store = Store(folder, Snapshot(folder, empty, []))
        else:
            store = Store(folder, open_snapshot(folder))
        store.clean()
        try:
            yield store
            store.begin()
        finally:
            if not (folder / MANIFEST).is_file():
                store.clean()  # or files of no index would stay, which the same command refuses


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
