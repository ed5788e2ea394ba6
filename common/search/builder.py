"""Texts -> an index: what is new is encoded block by block, and each block is committed before the
next begins.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from common.errors import UserError
from common.search import passages
from common.search.encoder import Encoder
from common.search.filters import free_name
from common.search.index import HASH, ID, PASSAGE, PASSAGES, START, TEXT, VECTOR, Snapshot
from common.search.lookup import Lookup, digest
from common.search.store import Store, vector_array, writing
from common.search.texts import Collection, ids_of

# what a row is to the index; of rows with the same text and no ids the first counts
NEW, SAME, CHANGED, REPEATED = range(4)
SCAN = 10_000  # rows looked at in one go
CHECKED = {
    "fingerprint": "--model",
    "width": "--model",
    "pooling": "--model",
    "max_length": "--max-length",
    "id_column": "--id-column",
    # settings of an index, and the flag that must agree with each
    "chunk_overlap": "--chunk and --chunk-overlap",
}


@dataclass
class Counts:
    """What became of the texts; `encoded` counts the different ones that went through the model,
    `cut` those that lost their end there.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    repeated: int = 0
    bad: int = 0
    encoded: int = 0
    cut: int = 0

    @property
    def committed(self) -> int:
        """The texts that were written."""
        return self.added + self.updated


def settings_of(encoder: Encoder, *, id_column: str | None, chunk_overlap: int | None) -> dict:
    """Return what an index remembers of how it is made; `chunk_overlap` is None for whole
    texts.
    """
    return {**encoder.identity(), "id_column": id_column, "chunk_overlap": chunk_overlap}


def check_settings(index: str, wanted: dict, settings: dict):
    """Raise UserError when an index was made in another way than is wanted now."""
    for name, flag in CHECKED.items():
        if name in wanted and wanted[name] != settings[name]:
            was, now = (_in_words(name, one) for one in (settings, wanted))
            raise UserError(
                f"--index {index}: it was made {was}, not {now}: their vectors or rows can't be compared; "
                f"give the same {flag}, or another --index"
            )


def _in_words(name: str, settings: dict) -> str:
    """Return a setting as it stands in "it was made ..."; None is that of an index of whole texts,
    or of texts without ids.
    """
    value = f"{settings['model']} ({settings[name][:12]})" if name == "fingerprint" else settings[name]
    return f"without {CHECKED[name].split()[0]}" if value is None else f"with {name} {value}"


@dataclass(frozen=True)
class Plan:
    """What a block's rows are to the index: `known` is the first row of the document that is
    there, -1 for none.
    """

    ids: list[str]
    hashes: list[bytes]  # of the text (16 bytes) and of the metadata (16 bytes)
    known: np.ndarray
    state: np.ndarray


class Builder:
    """Brings a collection's texts into a store."""

    def __init__(
        self,
        store: Store,
        encoder: Encoder,
        *,
        update: bool = False,
        skip_bad: bool = False,
        role: str | None = "document",
    ):
        self.store, self.encoder, self.update, self.skip_bad, self.role = (
            store,
            encoder,
            update,
            skip_bad,
            role,
        )
        self.id_column, self.chunk_overlap = (
            store.snapshot.settings[name] for name in ("id_column", "chunk_overlap")
        )
        self.documents, self.passages, self.seen, self.counts = Lookup(), Lookup(), Lookup(), Counts()
        self._scan(store.snapshot)

    def check(self, collection: Collection):
        """Raise UserError, before anything is written, when the collection has other columns than
        the index, or changed rows without `update`.
        """
        columns = self.store.snapshot.manifest["columns"]
        given = {field.name: str(field.type) for field in collection.rows.schema if field.name != TEXT}
        if self.store.snapshot.num_rows and columns != given:
            differing = sorted(dict(columns.items() ^ given.items()))[0]
            raise UserError(
                f"{collection.name}: column {differing!r} is {given.get(differing, 'not there')}, in the"
                f" index it is {columns.get(differing, 'not there')}; bring the columns in line, or use"
                " another --index"
            )
        seen = Lookup()
        for numbers, table in (
            collection.blocks(SCAN) if not self.update and self.store.snapshot.num_rows else ()
        ):
            plan = self._plan(table, seen)
            for place in np.flatnonzero(plan.state == CHANGED)[:1]:
                raise UserError(
                    f"{collection.place(numbers[place])}: the index has id {plan.ids[place]!r} with another"
                    " text or other columns; give --update to replace it"
                )

    def add(self, numbers: np.ndarray, table: pa.Table, collection: Collection):
        """Encode what is new in a block of the collection, whose rows have these numbers, and
        commit it; what changed is replaced in the same commit.
        """
        plan = self._plan(table, self.seen)
        chosen = np.flatnonzero((plan.state == NEW) | (plan.state == CHANGED))
        rows, chosen = self._encode(numbers, table, chosen, plan, collection)
        changed = plan.known[chosen][plan.state[chosen] == CHANGED]
        replaced = [
            row + number
            for row, first in zip(changed, self.store.snapshot.take(changed, [PASSAGES]))
            for number in range(first[PASSAGES])
        ]
        if rows is not None:
            before = self.store.snapshot.num_rows
            self.store.commit(rows, replaced)
            places = before + np.arange(len(rows))
            self.passages.add([digest(text) for text in rows[TEXT].to_pylist()], places)
            self.documents.add(
                [digest(plan.ids[place]) for place in chosen], places[rows[PASSAGE].to_numpy() == 0]
            )
        self._count(plan, chosen)

    def _scan(self, snapshot: Snapshot):
        """Take in the documents and passages that are there."""
        rows = np.flatnonzero(snapshot.alive())
        for start in range(0, len(rows), SCAN):
            here = rows[start : start + SCAN]
            found = snapshot.take(here, [ID, PASSAGE, TEXT])
            self.passages.add([digest(row[TEXT]) for row in found], here)
            firsts = [place for place, row in enumerate(found) if row[PASSAGE] == 0]
            self.documents.add([digest(found[place][ID]) for place in firsts], here[firsts])

    def _plan(self, table: pa.Table, seen: Lookup) -> Plan:
        """Compare a block's rows with the store, and with the rows `seen` before, to which they
        are added.
        """
        metadata = table.drop_columns([TEXT]).to_pylist()
        hashes = [
            digest(text) + digest(json.dumps(values, default=str, sort_keys=True))
            for text, values in zip(table[TEXT].to_pylist(), metadata)
        ]
        ids = ids_of(table, self.id_column)
        keys = [digest(key) for key in ids]
        known = self.documents.find(keys)
        state, there = np.full(len(ids), NEW), np.flatnonzero(known >= 0)
        state[there] = [
            SAME if row[HASH] == hashes[place] else CHANGED
            for row, place in zip(self.store.snapshot.take(known[there], [HASH]), there)
        ]
        firsts = {key: place for place, key in reversed(list(enumerate(keys)))}
        state[(seen.find(keys) >= 0) | np.array([firsts[key] != place for place, key in enumerate(keys)])] = (
            REPEATED
        )
        seen.add(keys, range(len(keys)))
        return Plan(ids, hashes, known, state)

    def _encode(
        self, numbers: np.ndarray, table: pa.Table, chosen: np.ndarray, plan: Plan, collection: Collection
    ) -> tuple[pa.Table | None, np.ndarray]:
        """Return the rows to store, one a passage, of the chosen texts, and which texts these are:
        with `skip_bad`, those that have a vector.
        """
        texts = table[TEXT].take(pa.array(chosen)).to_pylist()
        parts = (
            [[(0, text)] for text in texts]
            if self.chunk_overlap is None
            else passages.split(texts, self.encoder, overlap=self.chunk_overlap)
        )
        cuts = [
            (owner, number, *cut)
            for owner, cut_texts in enumerate(parts)
            for number, cut in enumerate(cut_texts)
        ]
        owners = np.array([cut[0] for cut in cuts], dtype=np.int64)
        vectors = self._vectors([cut[3] for cut in cuts])
        ruined = np.unique(owners[~np.isfinite(vectors).all(1)])
        if len(ruined) and not self.skip_bad:
            place = collection.place(numbers[chosen[ruined[0]]])
            raise UserError(
                f"{place}: the model gives no direction (NaN, infinity or zeros) for this text;"
                f" {self.counts.committed:,} texts of earlier blocks were committed; remove the row, pass it"
                " over with --skip-bad, or try --precision fp32"
            )
        kept = ~np.isin(owners, ruined)
        if not kept.any():
            return None, chosen[:0]
        cuts, owners, sizes = (
            [cut for cut, good in zip(cuts, kept) if good],
            owners[kept],
            np.bincount(owners),
        )
        metadata = table.drop_columns([TEXT]).take(pa.array(chosen[owners]))
        own = {
            ID: pa.array([plan.ids[chosen[owner]] for owner in owners]),
            HASH: pa.array([plan.hashes[chosen[owner]] for owner in owners], pa.binary(32)),
            PASSAGE: pa.array([cut[1] for cut in cuts], pa.int32()),
            PASSAGES: pa.array(sizes[owners], pa.int32()),
            START: pa.array([cut[2] for cut in cuts], pa.int32()),
            TEXT: pa.array([cut[3] for cut in cuts], pa.large_string()),
        }
        columns = {
            **own,
            **{name: metadata[name] for name in metadata.column_names},
            VECTOR: vector_array(vectors[kept]),
        }
        return pa.table(columns), chosen[np.unique(owners)]

    def _vectors(self, texts: list[str]) -> np.ndarray:
        """Return a unit vector (texts, width) for each text: from the store where it has the text
        already, else from the model.
        """
        known = self.passages.find([digest(text) for text in texts])
        vectors, fresh = np.empty((len(texts), self.encoder.width), np.float32), np.flatnonzero(known < 0)
        vectors[known >= 0] = self.store.snapshot.vectors_of(known[known >= 0])
        if len(fresh):
            vectors[fresh] = self.encoder.encode_unit([texts[place] for place in fresh], role=self.role)
        return vectors

    def _count(self, plan: Plan, chosen: np.ndarray):
        counts = self.counts
        counts.added += int((plan.state[chosen] == NEW).sum())
        counts.updated += int((plan.state[chosen] == CHANGED).sum())
        counts.unchanged += int((plan.state == SAME).sum())
        counts.repeated += int((plan.state == REPEATED).sum())
        counts.bad += int(np.isin(plan.state, (NEW, CHANGED)).sum()) - len(chosen)
        counts.encoded, counts.cut = self.encoder.num_encoded, self.encoder.num_cut


def rows_with_ids(snapshot: Snapshot, ids: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return the live rows of some documents, and those ids that the index does not have."""
    rows, found = [], set()
    for start, segment in zip(snapshot.starts, snapshot.segments):
        here = np.flatnonzero(pc.is_in(segment.table[ID], value_set=pa.array(ids)).to_numpy() & segment.alive)
        rows.append(here + start)
        found.update(segment.table[ID].take(pa.array(here)).to_pylist())
    return np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64), [
        key for key in ids if key not in found
    ]


def whole_documents(snapshot: Snapshot, rows: np.ndarray) -> np.ndarray:
    """Return all passages of the documents that some rows belong to."""
    found = snapshot.take(rows, [PASSAGE, PASSAGES])
    return np.unique(
        [
            row - entry[PASSAGE] + number
            for row, entry in zip(rows, found)
            for number in range(entry[PASSAGES])
        ]
    ).astype(np.int64)


def fill(builder: Builder, collection: Collection, *, block: int):
    """Bring a collection into the builder's store, `block` texts a commit, with a bar on a
    terminal.
    """
    builder.counts.bad = len(collection.bad)
    builder.check(collection)
    with tqdm(
        total=len(collection),
        unit="text",
        desc="encoding",
        leave=False,
        file=sys.stderr,
        dynamic_ncols=True,
        disable=None,
    ) as bar:
        for numbers, table in collection.blocks(block):
            builder.add(numbers, table, collection)
            bar.update(len(table))


def temporary(
    collection: Collection,
    encoder: Encoder,
    folder: str,
    *,
    block: int,
    id_column: str | None = None,
    role: str | None = "document",
) -> Builder:
    """Make an index for the length of one command; without `id_column` the ids are the rows'
    numbers from 1, and equal texts stay rows of their own.
    """
    if id_column is None:
        id_column = free_name("_number", collection.rows.column_names)
        collection = dataclasses.replace(
            collection,
            rows=collection.rows.append_column(id_column, pa.array(np.arange(1, len(collection.rows) + 1))),
        )
    settings = settings_of(encoder, id_column=id_column, chunk_overlap=None)
    with writing(Path(folder) / "index", settings=settings) as store:
        builder = Builder(store, encoder, role=role)
        fill(builder, collection, block=block)
    return builder
