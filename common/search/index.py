"""One committed state of an index, read-only: its manifest, its rows, its vectors as views into
memory-mapped Arrow files.

An index folder holds `manifest.json` and the immutable Arrow files that it names, each with its
SHA-256. A writer adds files first and then replaces the manifest, so whoever has read a manifest
has one whole state, whatever happens after. Every file is checked when a snapshot is opened. Any
Arrow reader can read the files; common/search/store.py writes them.
"""

import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from common.errors import UserError

FORMAT = "embed_search index 1"
MANIFEST = "manifest.json"
LOCK = ".lock"
ID, HASH, PASSAGE, PASSAGES, START, TEXT, VECTOR = (
    "_id",
    "_hash",
    "_passage",
    "_passages",
    "_start",
    "_text",
    "_vector",
)
OWN_COLUMNS = (ID, HASH, PASSAGE, PASSAGES, START, TEXT, VECTOR)  # those that every index has
# bytes from which on a file is mapped: a map holds a descriptor, of which a process may have 256
# only
MAPPED = 65_536


@dataclass(frozen=True)
class Segment:
    """An immutable file of rows: `table` without the vectors, `vectors` (rows, width) in float32,
    `alive` (rows) False where deleted.
    """

    table: pa.Table
    vectors: np.ndarray
    alive: np.ndarray

    @property
    def num_bytes(self) -> int:
        """The space that its rows take."""
        return self.table.nbytes + self.vectors.nbytes


class Snapshot:
    """The rows of an index as one manifest names them; a row's number is its place, deleted rows
    included.
    """

    def __init__(self, folder: Path, manifest: dict, segments: list[Segment]):
        self.folder, self.manifest, self.segments = folder, manifest, segments
        # the first row of each segment, and the number of rows
        self.starts = np.cumsum([0, *(len(segment.alive) for segment in segments)])

    @property
    def settings(self) -> dict:
        """What the index was made with: the encoder's identity, the columns' names, how texts are
        split.
        """
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
        """A hash of this state: what a cache of it must carry."""
        return self.manifest["sha256"]

    def alive(self) -> np.ndarray:
        """Return a mask (num_rows): False for deleted rows."""
        return np.concatenate([np.zeros(0, bool), *(segment.alive for segment in self.segments)])

    def vector_blocks(self, size: int):
        """Yield (first row, vectors (at most `size`, width)) over all rows; the vectors are views
        into the files.
        """
        for start, segment in zip(self.starts, self.segments):
            for offset in range(0, len(segment.vectors), size):
                yield int(start) + offset, segment.vectors[offset : offset + size]

    def vectors_of(self, rows) -> np.ndarray:
        """Return a copy (rows, width) of the vectors of some rows."""
        rows = np.asarray(rows, dtype=np.int64)
        found = np.empty((len(rows), self.width), np.float32)
        for number, here, places in self._by_segment(rows):
            found[here] = self.segments[number].vectors[places]
        return found

    def take(self, rows, columns: list[str] | None = None) -> list[dict]:
        """Return some rows as dicts, in their order; without the vectors, and without the columns
        that are not named.
        """
        rows = np.asarray(rows, dtype=np.int64)
        found: list[dict] = [{}] * len(rows)
        for number, here, places in self._by_segment(rows):
            table = self.segments[number].table
            for place, row in zip(
                np.flatnonzero(here),
                table.select(columns or table.column_names).take(pa.array(places)).to_pylist(),
            ):
                found[place] = row
        return found

    def texts(self, rows=None, *, size: int = 10_000):
        """Yield the texts of some rows (default: the live ones), reading `size` at a time."""
        rows = np.flatnonzero(self.alive()) if rows is None else np.asarray(rows)
        for start in range(0, len(rows), size):
            yield from (row[TEXT] for row in self.take(rows[start : start + size], [TEXT]))

    def metadata_columns(self) -> list[str]:
        """Return the names of the columns that came with the texts."""
        return list(self.manifest["columns"])

    def _by_segment(self, rows: np.ndarray):
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(numbers):
            here = numbers == number
            yield number, here, rows[here] - self.starts[number]


def open_snapshot(folder: str | Path) -> Snapshot:
    """Return the last committed state of an index. Raises UserError when the folder is no index,
    or a file of it is damaged.
    """
    folder = Path(folder)
    while True:
        manifest = read_manifest(folder)
        # all are held before any is checked, which takes long: a writer that replaces the state
        # meanwhile
        # doesn't take them away
        try:
            contents = {name: map_file(folder / name) for name in files(manifest)}
            break
        except FileNotFoundError as error:
            # else a writer was faster: look at its state
            if read_manifest(folder)["sha256"] == manifest["sha256"]:
                raise UserError(
                    f"{error.filename}: a file of the index is missing; restore it from a copy, or index the"
                    " texts into a new folder"
                ) from error
    for name, expected in files(manifest).items():
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise UserError(
                f"{folder / name}: damaged (its SHA-256 is not what {MANIFEST} says); restore it from a copy,"
                " or index the texts into a new folder"
            )
    return Snapshot(
        folder,
        manifest,
        [_segment(contents, entry, list(manifest["columns"])) for entry in manifest["segments"]],
    )


def files(manifest: dict) -> dict[str, str]:
    """Return the files that a manifest names, each with its SHA-256."""
    entries = [part for entry in manifest["segments"] for part in (entry, entry["deleted"]) if part]
    return {entry["file"]: entry["sha256"] for entry in entries}


def read_manifest(folder: Path) -> dict:
    """Return the manifest of an index. Raises UserError when there is none or it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        what = "no such folder" if not folder.exists() else "not an index (it has no manifest.json)"
        raise UserError(
            f"--index {folder}: {what}; make one with: embed_search.py index TEXTS --index {folder}"
        )
    try:
        manifest = json.loads(path.read_bytes())
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"--index {folder}: its manifest.json is not one of {FORMAT!r}; name another folder"
            )
        whole = manifest["sha256"] == seal(manifest)
    except (ValueError, AttributeError, KeyError):
        whole = False
    if not whole:
        raise UserError(
            f"{path}: damaged (its SHA-256 is not what it says); restore it from a copy, or index the texts"
            " into a new folder"
        )
    return manifest


def seal(manifest: dict) -> str:
    """Return the SHA-256 of a manifest without its own."""
    return hashlib.sha256(json.dumps({**manifest, "sha256": None}, sort_keys=True).encode()).hexdigest()


def map_file(path: Path) -> mmap.mmap | bytearray:
    """Return the content of a file: mapped, of a small one a copy."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < MAPPED:
            return bytearray(file.read())
        # private: torch wants it writable, the file can't be changed by it
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def make_segment(
    content: mmap.mmap | bytearray, columns: list[str], alive: np.ndarray | None = None
) -> Segment:
    """Return the content of an Arrow file as a segment, its metadata in the order of `columns`;
    `alive` None: all rows.
    """
    table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
    vectors = table.column(VECTOR).chunk(0)
    offset = vectors.values.buffers()[1].address - pa.py_buffer(content).address
    # as an array over the content itself: Arrow's own view is read-only, of which torch warns
    width = vectors.type.list_size
    array = np.frombuffer(content, np.float32, count=len(vectors) * width, offset=offset).reshape(
        len(vectors), width
    )
    return Segment(
        table.select([name for name in OWN_COLUMNS if name != VECTOR] + columns),
        array,
        np.ones(len(table), bool) if alive is None else alive,
    )


def _segment(contents: dict, entry: dict, columns: list[str]) -> Segment:
    segment = make_segment(contents[entry["file"]], columns)
    if entry["deleted"]:
        segment.alive[
            pa.ipc.open_file(pa.py_buffer(contents[entry["deleted"]["file"]]))
            .read_all()
            .column("row")
            .to_numpy()
        ] = False
    return segment
