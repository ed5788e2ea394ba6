"""A collection -> rows of an index: texts are compared with the index, new ones are split into
chunks and encoded, and each block is committed before the next begins.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from common import cli, delimited
from common.errors import UserError, reading
from common.reading import evenly_spaced
from common.runtime import Runtime
from common.search.display import say_notes
from common.search.encoder import Chunk, Encoder, split_into_chunks
from common.search.index import ROWS_AT_ONCE, Snapshot, Store, open_store, whole_documents
from common.search.manifest import Settings, store_of
from common.search.segments import (
    CHUNK,
    HASH,
    ID,
    NUM_CHUNKS,
    ROW,
    START,
    TEXT,
    VECTOR,
    number_array,
    pack,
    text_array,
    vector_array,
    wider,
)
from common.search.texts import Collection, RowTable, digest, ids_of

COMPARED = 8  # given vectors that are compared with the model's own
NORM_TOLERANCE = 1e-6  # of a vector in fp32 whose norm is 1


def settings_of(
    encoder: Encoder, *, id_column: str | None, chunk_overlap: int | None, store: str | None = None
) -> Settings:
    """Return the settings of an index that an encoder fills; `chunk_overlap` is None for whole
    texts, `store` for vectors in fp32.
    """
    own: Settings = {**encoder.identity(), "id_column": id_column, "chunk_overlap": chunk_overlap}
    prompt, kept = encoder.prompts.get("query"), store if store != "fp32" else None
    return {**own, "query_prompt": prompt, "store": kept}


def hashes_of(table: pa.Table) -> list[bytes]:
    """Return for each row the hash of its text (16 bytes) and of its columns (16 bytes)."""
    texts, rows = table[TEXT].to_pylist(), table.drop_columns([TEXT]).to_pylist()
    columns = (json.dumps(_plain(row), default=str, sort_keys=True) for row in rows)
    return [digest(text) + digest(others) for text, others in zip(texts, columns)]


@dataclass
class Counts:
    """What became of the texts of a run."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    repeated: int = 0
    bad: int = 0  # skipped
    deleted: int = 0  # gone from the source, which sync follows
    encoded: int = 0  # different texts, or chunks, that went through the model
    cut: int = 0  # of these, the ones whose end was cut off

    @property
    def committed(self) -> int:
        """The number of texts that were written."""
        return self.added + self.updated

    def add(self, plan: "Plan", written: np.ndarray) -> None:
        """Count a block of which some rows (n) were `written`; the others that should be are bad."""
        self.added += int(plan.new[written].sum())
        self.updated += int(plan.changed[written].sum())
        self.unchanged += int(plan.unchanged.sum())
        self.repeated += int(plan.repeated.sum())
        self.bad += len(plan.to_write) - len(written)


@dataclass(frozen=True)
class Plan:
    """What to do with each row of a block, as masks: of rows with the same id the first counts, and
    the index may have its document already.
    """

    ids: list[str]
    hashes: list[bytes]  # of the text (16 bytes) and of the metadata (16 bytes)
    new: np.ndarray  # the index has no document with this id
    changed: np.ndarray  # it has one with another hash
    unchanged: np.ndarray  # it has one with this hash
    repeated: np.ndarray  # the id occurred before, in this run; none of the others

    @property
    def to_write(self) -> np.ndarray:
        """The numbers of the rows that are new or changed."""
        return np.flatnonzero(self.new | self.changed)


def make_plan(
    ids: list[str], hashes: list[bytes], *, known: np.ndarray, same: np.ndarray, seen: RowTable
) -> Plan:
    """Return the plan of a block: which of its rows (n) are `known` to the index by their ids, and
    which of these have the `same` hash there; to the ids `seen` before theirs are added.
    """
    repeated = repeated_rows(ids, seen)
    return Plan(
        ids,
        hashes,
        new=~known & ~repeated,
        changed=known & ~same & ~repeated,
        unchanged=same & ~repeated,
        repeated=repeated,
    )


def repeated_rows(ids: list[str], seen: RowTable) -> np.ndarray:
    """Return a mask of the ids that occur above or were `seen` before; all of them are added there."""
    keys, firsts = [digest(key) for key in ids], dict[bytes, int]()
    for row, key in enumerate(keys):
        firsts.setdefault(key, row)
    repeated_here = np.array([firsts[key] != row for row, key in enumerate(keys)], bool)
    repeated = (seen.find(keys) >= 0) | repeated_here
    seen.add(keys, range(len(keys)))  # only the keys are asked for
    return repeated


def check_unchanged(
    collection: Collection, plan_of: Callable[[pa.Table, RowTable], Plan], *, block: int
) -> None:
    """Raise UserError, before anything is written, when a row of a collection has changed."""
    seen = RowTable()
    for numbers, table in collection.blocks(block):
        plan = plan_of(table, seen)
        for row in np.flatnonzero(plan.changed)[:1]:
            location = collection.location(numbers[row])
            problem = f"the index has id {plan.ids[row]!r} with another text or other columns"
            raise UserError(f"{location}: {problem}; give --update to replace it")


class Builder:
    """Writes the texts of a collection to a store. `role` decides which prompt of the model is put
    before each text.
    """

    def __init__(
        self,
        store: Store,
        encoder: Encoder,
        *,
        update: bool = False,
        skip_bad: bool = False,
        role: str | None = "document",
        given: np.ndarray | None = None,
    ) -> None:
        self.store, self.encoder, self.counts = store, encoder, Counts()
        self.update, self.skip_bad, self.role = update, skip_bad, role
        self.given = given  # vectors of the collection's rows: nothing is encoded
        self.id_column = store.snapshot.settings["id_column"]
        self.chunk_overlap = store.snapshot.settings["chunk_overlap"]
        self.documents = RowTable()  # id of a document -> its first row in the index
        self.chunks = RowTable()  # text of a chunk -> a row in the index that has its embedding
        self.seen = RowTable()  # the ids of this run
        rows = np.flatnonzero(store.snapshot.is_live())
        for start in range(0, len(rows), ROWS_AT_ONCE):
            here = rows[start : start + ROWS_AT_ONCE]
            entries = store.snapshot.take(here, [ID, CHUNK, TEXT])
            self.chunks.add([digest(entry[TEXT]) for entry in entries], here)
            firsts = [number for number, entry in enumerate(entries) if entry[CHUNK] == 0]
            self.documents.add([digest(entries[number][ID]) for number in firsts], here[firsts])

    def check(self, collection: Collection) -> None:
        """Raise UserError, before anything is written, when a column of the collection holds what
        that of the index can't, or when rows have changed without `update`.
        """
        if not self.store.snapshot.num_rows:
            return
        columns = self.store.snapshot.columns
        made = self.store.snapshot.manifest["clusters"]
        own = next((name for name in collection.rows.column_names if name in made), None)
        if own is not None:
            problem = f"column {own!r}: the index has one of this name that cluster made"
            advice = "rename the column, or use another --index"
            raise UserError(f"{collection.name}: {problem}; {advice}")
        for name in sorted(set(collection.rows.column_names) & set(columns)):
            here, there = collection.rows.schema.field(name).type, columns[name]
            if _fitting(here, there) is None:
                problem = f"column {name!r} is {here}, in the index it is {there}"
                advice = "make the columns equal, or use another --index"
                if pa.types.is_string(here) and delimited.has_decimal_commas(collection.rows[name]):
                    advice = "give --decimal , as for the texts before"
                raise UserError(f"{collection.name}: {problem}; {advice}")
        if not self.update:
            check_unchanged(collection, self._plan, block=ROWS_AT_ONCE)

    def add(self, numbers: np.ndarray, table: pa.Table, collection: Collection) -> None:
        """Encode what is new in a block of the collection, whose rows have these numbers, and
        commit it; changed documents are replaced in the same commit.
        """
        plan = self._plan(table, self.seen)
        chosen = plan.to_write  # rows of `table`
        chosen_texts = table[TEXT].take(number_array(chosen)).to_pylist()
        chunks = split_into_chunks(chosen_texts, self.encoder, overlap=self.chunk_overlap)
        # for each chunk the position in `chosen` of its text
        owners = np.repeat(np.arange(len(chunks)), [len(parts) for parts in chunks])
        if self.given is None:
            vectors = self._vectors([chunk.text for parts in chunks for chunk in parts])
        else:
            vectors = normalize(self.given[numbers[chosen]])
        unusable = np.unique(owners[~np.isfinite(vectors).all(1)])
        if len(unusable) and not self.skip_bad:
            location = collection.location(numbers[chosen[unusable[0]]])
            problem = "the embedding of this text has norm zero, NaN or infinity"
            committed = f"{self.counts.committed:,} texts of earlier blocks were committed"
            advice = "remove the row, skip it with --skip-bad, or try --precision fp32"
            raise UserError(f"{location}: {problem}; {committed}; {advice}")
        kept = np.setdiff1d(np.arange(len(chosen)), unusable)
        chosen, chunks = chosen[kept], [chunks[position] for position in kept]
        vectors = vectors[np.isin(owners, kept)]
        if len(chosen):
            self._commit(table, plan, chosen, chunks, vectors)
        self.counts.add(plan, chosen)
        self.counts.encoded, self.counts.cut = self.encoder.num_encoded, self.encoder.num_cut

    def remove_unseen(self) -> None:
        """Delete the documents that this run has not met, in one commit."""
        rows, gone = np.flatnonzero(self.store.snapshot.is_live()), []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            here = rows[start : start + ROWS_AT_ONCE]
            ids = [entry[ID] for entry in self.store.snapshot.take(here, [ID])]
            gone.append(here[self.seen.find([digest(key) for key in ids]) < 0])
        deleted = np.concatenate([np.zeros(0, np.int64), *gone])
        if len(deleted):
            numbers = self.store.snapshot.take(deleted, [CHUNK])
            self.counts.deleted = sum(entry[CHUNK] == 0 for entry in numbers)
            self.store.commit(None, deleted)

    def _fitted(self, table: pa.Table) -> pa.Table:
        """Return rows whose numbers are texts where the index has texts in their column."""
        for name, there in self.store.snapshot.columns.items():
            if name in table.column_names:
                kind = _fitting(table.schema.field(name).type, there)
                if kind is not None and pa.types.is_string(kind):
                    place = table.column_names.index(name)
                    table = table.set_column(place, name, table[name].cast(kind))
        return table

    def _plan(self, table: pa.Table, seen: RowTable) -> Plan:
        """Compare a block's rows with the index, and with the rows `seen` before, to which they are
        added.
        """
        table = self._fitted(table)
        hashes = hashes_of(table)
        ids = ids_of(table, self.id_column)
        first_rows = self._first_rows(ids)
        known = first_rows >= 0
        entries = self.store.snapshot.take(first_rows[known], [HASH])
        same = known.copy()
        same[known] = [entry[HASH] == hashes[row] for entry, row in zip(entries, np.flatnonzero(known))]
        return make_plan(ids, hashes, known=known, same=same, seen=seen)

    def _first_rows(self, ids: list[str]) -> np.ndarray:
        """Return the first row in the index of each document, -1 for one that it does not have."""
        return self.documents.find([digest(key) for key in ids])

    def _commit(
        self, table: pa.Table, plan: Plan, chosen: np.ndarray, chunks: list[list[Chunk]], vectors: np.ndarray
    ) -> None:
        """Write one row per chunk of the chosen texts; delete the documents that they replace."""
        flat = [chunk for parts in chunks for chunk in parts]
        sizes = np.array([len(parts) for parts in chunks])
        # for each chunk its number within its text, and the row of `table` that it comes from
        numbers = np.concatenate([np.arange(size) for size in sizes])
        origins = np.repeat(chosen, sizes)
        hashes = b"".join(plan.hashes[row] for row in origins)
        columns = {
            ID: text_array([plan.ids[row] for row in origins]).cast(pa.string()),
            HASH: pa.Array.from_buffers(pa.binary(32), len(origins), [None, pa.py_buffer(hashes)]),
            CHUNK: number_array(numbers.astype(np.int32)),
            NUM_CHUNKS: number_array(np.repeat(sizes, sizes).astype(np.int32)),
            START: number_array(np.array([chunk.start for chunk in flat], np.int32)),
            TEXT: text_array([chunk.text for chunk in flat]),
        }
        metadata = self._fitted(table).drop_columns([TEXT]).take(number_array(origins))
        columns |= {name: metadata[name] for name in metadata.column_names}
        columns[VECTOR] = vector_array(pack(vectors, store_of(self.store.snapshot.settings)))
        replaced = self._first_rows([plan.ids[row] for row in chosen[plan.changed[chosen]]])
        first_row = self.store.snapshot.num_rows
        self.store.commit(pa.table(columns), whole_documents(self.store.snapshot, replaced))
        new_rows = first_row + np.arange(len(flat))
        self.chunks.add([digest(chunk.text) for chunk in flat], new_rows)
        self.documents.add([digest(plan.ids[row]) for row in chosen], new_rows[numbers == 0])

    def _vectors(self, texts: list[str]) -> np.ndarray:
        """Return the embedding (texts, width), normalized, of each text: from the index if it has the
        text already, else from the model.
        """
        known = self.chunks.find([digest(text) for text in texts])
        vectors = np.empty((len(texts), self.encoder.width), np.float32)
        vectors[known >= 0] = self.store.snapshot.vectors_of(known[known >= 0])
        new = np.flatnonzero(known < 0)
        if len(new):
            new_texts = [texts[number] for number in new]
            vectors[new] = self.encoder.encode_normalized(new_texts, role=self.role)
        return vectors


def read_vectors(
    path: str, collection: Collection, encoder: Encoder, *, skip_bad: bool, say: Callable[[str], None]
) -> np.ndarray:
    """Return vectors that were made elsewhere, one for each row of a collection, as
    they lie in a .npy file; and say how far some of them are from the encoder's
    own, with which they will be searched.

    Raises UserError when they have another width or number, or when one has no direction.
    """
    advice = "write one vector of 16, 32 or 64 bits a number for each row with numpy.save"
    with reading(f"--vectors {path}: not an array of NumPy", advice):
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        found = f"{vectors.shape}, of {vectors.dtype}"
        raise UserError(f"--vectors {path}: its shape is {found}; {advice}")
    wanted = (len(collection.rows), encoder.width)
    if vectors.shape != wanted:
        count, width = vectors.shape
        problem = f"it has {count:,} vectors of {width} numbers, not {wanted[0]:,} of {wanted[1]}"
        whose = f"as {collection.name} and {encoder.name} have"
        advice = "name the file of these texts and this model"
        raise UserError(f"--vectors {path}: {problem}, {whose}; {advice}")
    lowest, highest = _norms(path, vectors, collection, skip_bad=skip_bad)
    numbers, table = next(collection.blocks(ROWS_AT_ONCE))
    sample = evenly_spaced(len(table), COMPARED)
    own = encoder.encode_normalized(table[TEXT].take(number_array(sample)).to_pylist(), role="document")
    cosines = (normalize(vectors[numbers[sample]]) * own).sum(1)
    say(f"vectors  {path}: norms from {lowest:.3f} to {highest:.3f}, which become 1")
    least = f"the lowest cosine is {np.nanmin(cosines):.3f}"
    say(f"         {len(sample)} of them beside the model's own: {least}")
    return vectors


def _norms(path: str, vectors: np.ndarray, collection: Collection, *, skip_bad: bool) -> tuple[float, float]:
    """Return the lowest and the highest norm. Raises UserError for a vector without a direction,
    unless such rows are skipped.
    """
    lowest, highest = np.inf, 0.0
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        norms = np.linalg.norm(vectors[start : start + ROWS_AT_ONCE].astype(np.float64), axis=1)
        usable = np.isfinite(norms) & (norms > 0)
        if not (usable.all() or skip_bad):
            row = start + int(np.flatnonzero(~usable)[0])
            problem = f"the vector of {collection.location(row)} is zero, NaN or infinite"
            raise UserError(f"--vectors {path}: {problem}; correct it, or skip it with --skip-bad")
        lowest, highest = (
            min(lowest, norms[usable].min(initial=np.inf)),
            max(highest, norms[usable].max(initial=0)),
        )
    return lowest, highest


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (n, width) at norm 1 in fp32; those that have it stay the same to the bit."""
    exact = vectors.astype(np.float64)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    return np.where(np.abs(norms - 1) < NORM_TOLERANCE, vectors, exact / norms).astype(np.float32)


def _fitting(here: pa.DataType, there: pa.DataType) -> pa.DataType | None:
    """Return the type of an index's column `there` after values of the type `here` were added, None
    if it can't hold them. A column of texts, such as codes, takes numbers as texts.
    """
    if pa.types.is_string(there) and (pa.types.is_integer(here) or pa.types.is_floating(here)):
        return there
    return wider(there, here)


def _plain(value: Any) -> Any:
    """Return a value of a row so that its hash stays when its column becomes wider: without what is
    null, and a whole number as such.
    """
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def progress_bar(num_texts: int) -> tqdm:
    """Return a bar of the texts that are done, which one process draws on a terminal."""
    hidden = None if cli.is_rank_0() else True  # None: where stderr is not a terminal
    options = {"unit": "text", "desc": "encoding", "leave": False, "dynamic_ncols": True}
    return tqdm(total=num_texts, disable=hidden, **options)


def check_decimal_commas(collection: Collection, snapshot: Snapshot) -> None:
    """Raise UserError where an index made without the flag `--decimal ,` has a column of texts that the flag
    would make numbers: new ones would stay texts too.
    """
    for name, kind in snapshot.columns.items():
        if not pa.types.is_string(kind) or name not in collection.rows.column_names:
            continue
        here, parts = collection.rows[name], snapshot.segments
        indexed = [part.rows([name], np.flatnonzero(part.is_live))[name] for part in parts]
        there = pa.chunked_array([block for column in indexed for block in column.chunks], kind)
        if pa.types.is_string(here.type) and all(map(delimited.has_decimal_commas, (here, there))):
            problem = f"the index holds the numbers of column {name!r} as texts, and they would stay so"
            advice = "leave the flag out, or index all texts with it into a new --index"
            raise UserError(f"--decimal ,: {problem}; {advice}")


def fill(builder: Builder, collection: Collection, *, block: int) -> None:
    """Write a collection to the builder's store, `block` texts per commit, with a progress bar on a
    terminal.
    """
    builder.counts.bad = len(collection.bad)
    builder.check(collection)
    with progress_bar(len(collection)) as bar:
        for numbers, table in collection.blocks(block):
            builder.add(numbers, table, collection)
            bar.update(len(table))


def build_temporary(
    collection: Collection,
    encoder: Encoder,
    folder: str,
    *,
    block: int,
    say: Callable[[str], None],
    role: str | None = "document",
) -> Snapshot:
    """Return an index of a collection that lasts for one command. Without a column of ids these
    are the rows' numbers from 1, and equal texts stay separate rows.
    """
    check_same_texts(collection, encoder.runtime)
    id_column = collection.id_column
    if id_column is None:
        id_column = ROW
        numbers = number_array(np.arange(1, len(collection.rows) + 1))
        rows = collection.rows.append_column(ROW, numbers)
        collection = dataclasses.replace(collection, rows=rows)
    settings = settings_of(encoder, id_column=id_column, chunk_overlap=None)
    with open_store(Path(folder) / "index", settings=settings) as store:
        fill(Builder(store, encoder, role=role), collection, block=block)
    say(f"texts    {collection.name}: {len(collection):,}")
    say_notes(say, collection, encoder.num_cut, encoder.max_length)
    return store.snapshot


def check_same_texts(collection: Collection, runtime: Runtime) -> None:
    """Raise UserError under torchrun unless all processes, which encode
    together, have read the same texts.
    """
    if runtime.world_size > 1:
        hashes = [digest for _, table in collection.blocks(ROWS_AT_ONCE) for digest in hashes_of(table)]
        problem = "has read other texts than process 0; name a file that all machines share"
        runtime.require_same(hashlib.sha256(b"".join(hashes)).hexdigest(), problem)
