"""A collection in Milvus in the place of an index on this machine: `--index milvus:URI/COLLECTION`,
or `milvus:folder.db/COLLECTION` for Milvus Lite, which is embedded.

A row's key is the hash of its document's id and the number of its chunk, so that writing a row
twice changes nothing and a killed run goes on. The first chunk of a document, which carries the
hash of its content, is written last: as long as it is missing or old, the document is written
again. How the embeddings were made is kept in the collection's properties.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from common import cli
from common.errors import Interrupted, UserError, one_line
from common.search import display, search_flags
from common.search.builder import (
    Counts,
    Plan,
    check_unchanged,
    hashes_of,
    make_plan,
    progress_bar,
    repeated_rows,
    settings_of,
)
from common.search.display import say_notes
from common.search.encoder import (
    Chunk,
    Encoder,
    chunk_size,
    load_index_encoder,
    load_reranker,
    split_into_chunks,
)
from common.search.kernel import Ranking, exact_scores
from common.search.manifest import (
    MILVUS_INSTALL,
    Settings,
    Target,
    check_settings,
    check_values,
    parse_target,
)
from common.search.ranker import FUSED, RRF_K
from common.search.screen import Screen
from common.search.search_checks import check_known
from common.search.searcher import HitRange, Searcher
from common.search.segments import CHUNK, HASH, ID, NUM_CHUNKS, START, TEXT, VECTOR, exported_names
from common.search.texts import Collection, RowTable, digest, ids_of

if TYPE_CHECKING:
    from pymilvus import MilvusClient

    from common.runtime import Runtime

SETTINGS, COLUMNS = "embed_search.settings", "embed_search.columns"  # properties of a collection
KEY, WORDS = "_index_key", "_index_words"  # the primary key; the words that Milvus' BM25 counts
LONGEST_TEXT = 65_535  # bytes of a text in Milvus
LONGEST_RESULT = 16_384  # rows that Milvus returns for a query
MORE = 10  # rows looked at beyond those wanted: their exact scores may change places
ASKED = 1_000  # keys asked for, or deleted, at once
NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")


@contextlib.contextmanager
def connected(target: Target) -> Iterator[MilvusClient]:
    """Yield a client; what Milvus refuses within the block becomes a UserError with its words."""
    # a condition over an index forks, after which gRPC would start its threads anew in the parent
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    try:
        from pymilvus import MilvusClient, MilvusException
    except ImportError as error:
        problem = "this needs Milvus' client"
        raise UserError(f"--index {target.name}: {problem}; run: {MILVUS_INSTALL}") from error
    for library in ("pymilvus", "milvus_lite"):  # they log what they raise
        logging.getLogger(library).setLevel(logging.CRITICAL + 1)
    try:
        client = MilvusClient(target.uri, token=os.environ.get("MILVUS_TOKEN", ""))
        try:
            yield client
        finally:
            client.close()
    except (MilvusException, OSError) as error:
        advice = "check the address, the server and MILVUS_TOKEN"
        if target.is_file:
            advice = "check that it is Milvus Lite's, and that no other process has it open"
        problem = f"Milvus says: {one_line(error)}"
        raise UserError(f"--index {target.name}: {problem}; {advice}") from error


class MilvusCollection:
    """An open collection: its settings, the columns of its texts (name -> type of Milvus), and the
    rows that searches have found, which have numbers as those of an index have.
    """

    def __init__(
        self, client: MilvusClient, target: Target, settings: Settings, columns: dict[str, str]
    ) -> None:
        self.client, self.target, self.settings, self.columns = client, target, settings, columns
        self.found: list[dict[str, Any]] = []
        self.number_of: dict[str, int] = {}  # key -> position in `found`

    @property
    def folder(self) -> str:
        """Its name for a person."""
        return self.target.name

    @property
    def width(self) -> int:
        """The number of dimensions of a vector."""
        return self.settings["width"]

    def count(self, condition: str = "") -> int:
        """Return the number of rows where a condition of Milvus holds."""
        [answer] = self.query(condition, ["count(*)"])
        return int(answer["count(*)"])

    def query(self, condition: str, fields: list[str], **limits: int) -> list[dict[str, Any]]:
        """Return fields of the rows where a condition holds; `limits`: an offset and a limit."""
        name = self.target.collection
        options: dict[str, Any] = {"consistency_level": "Strong", **limits}
        return list(self.client.query(name, filter=condition, output_fields=fields, **options))

    def stored(self, keys: Sequence[str], fields: list[str]) -> dict[str, dict[str, Any]]:
        """Return key -> fields of the rows that are there."""
        rows: dict[str, dict[str, Any]] = {}
        for start in range(0, len(keys), ASKED):
            listed = json.dumps(list(keys[start : start + ASKED]))
            for row in self.query(f"{KEY} in {listed}", [KEY, *fields]):
                rows[row[KEY]] = row
        return rows

    def remember(self, entity: dict[str, Any]) -> int:
        """Return the number of a row that was found."""
        number = self.number_of.setdefault(entity[KEY], len(self.found))
        if number == len(self.found):
            self.found.append(entity)
        return number

    def take(self, rows: np.ndarray | Sequence[int], columns: list[str] | None = None) -> list[dict]:
        """Return some of the rows that were found, as an index does."""
        names = columns or [ID, HASH, CHUNK, NUM_CHUNKS, START, TEXT, *self.columns]
        return [{name: self.found[int(row)].get(name) for name in names} for row in rows]

    def parts(self, condition: str) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Yield all rows where a condition holds and their vectors, as an index exports them."""
        names = exported_names(self.settings, list(self.columns))
        types = {
            TEXT: pa.large_string(),
            ID: pa.string(),
            **dict.fromkeys((CHUNK, NUM_CHUNKS, START), pa.int32()),
        }
        types |= {name: ARROW_TYPES[kind] for name, kind in self.columns.items()}
        for batch in _all_rows(self, condition, [*names, VECTOR]):
            arrays = [pa.array([row.get(name) for row in batch], types[name]) for name in names]
            vectors = np.array([row[VECTOR] for row in batch], np.float32)
            yield pa.Table.from_arrays(arrays, [*names.values()]), vectors


# Opening and making a collection ------------------------------------------------------------------

WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
MILVUS_TYPES = {
    **{"string": "VARCHAR", "large_string": "VARCHAR", "bool": "BOOL"},
    **dict.fromkeys(WHOLE, "INT64"),
    **dict.fromkeys(("halffloat", "float", "double"), "DOUBLE"),
}
ARROW_TYPES = {"VARCHAR": pa.string(), "BOOL": pa.bool_(), "INT64": pa.int64(), "DOUBLE": pa.float64()}


def open_collection(client: MilvusClient, target: Target) -> MilvusCollection | None:
    """Return a collection that was made here, None where there is none. Raises UserError for one
    that another program made, or whose properties are damaged.
    """
    if not client.has_collection(target.collection):
        return None
    description: Any = client.describe_collection(target.collection)
    properties = description.get("properties") or {}
    try:
        settings, columns = json.loads(properties[SETTINGS]), json.loads(properties[COLUMNS])
        check_values(settings)
        if not set(columns.values()) <= set(ARROW_TYPES):
            raise ValueError("its columns have other types")
        present = {entry["name"] for entry in description["fields"]}
        if not {*columns, KEY, ID, HASH, TEXT, VECTOR, CHUNK, NUM_CHUNKS, START, WORDS} <= present:
            raise ValueError("fields are missing")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        problem = f"not a collection that embed_search.py made ({one_line(error)})"
        raise UserError(f"--index {target.name}: {problem}; name another collection") from error
    client.load_collection(target.collection)
    return MilvusCollection(client, target, settings, columns)


@contextlib.contextmanager
def opened(name: str) -> Iterator[MilvusCollection]:
    """Yield the collection that --index names. Raises UserError where there is none."""
    target = parse_target(name)
    with connected(target) as client:
        yield existing_collection(client, target)


def existing_collection(client: MilvusClient, target: Target) -> MilvusCollection:
    """Return a collection that is there. Raises UserError where there is none."""
    collection = open_collection(client, target)
    if collection is None:
        command = f"embed_search.py index TEXTS --index {target.name}"
        raise UserError(f"--index {target.name}: no such collection; make one with: {command}")
    return collection


def columns_of(collection: Collection) -> dict[str, str]:
    """Return the columns of texts with their types in Milvus; refuse what it can't keep."""
    columns = {}
    for column in collection.rows.schema:
        if column.name == TEXT:
            continue
        kind = "VARCHAR" if pa.types.is_null(column.type) else MILVUS_TYPES.get(str(column.type))
        if not NAME.fullmatch(column.name) or kind is None:
            advice = "rename it with letters and digits, write it as text, or leave it out"
            problem = f"Milvus can't keep the column {column.name!r} of {column.type}"
            raise UserError(f"{collection.name}: {problem}; {advice}")
        columns[column.name] = kind
    return columns


def make_collection(
    client: MilvusClient, target: Target, settings: Settings, columns: dict[str, str]
) -> None:
    """Make a collection: exact search by inner product, which is the cosine of unit vectors, and
    Milvus' own BM25 over the texts.
    """
    from pymilvus import DataType, Function, FunctionType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field(KEY, DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field(TEXT, DataType.VARCHAR, max_length=LONGEST_TEXT, enable_analyzer=True)
    for name in (ID, HASH):
        schema.add_field(name, DataType.VARCHAR, max_length=LONGEST_TEXT)
    for name in (CHUNK, NUM_CHUNKS, START):
        schema.add_field(name, DataType.INT64)
    for name, kind in columns.items():
        length = {"max_length": LONGEST_TEXT} if kind == "VARCHAR" else {}
        schema.add_field(name, DataType[kind], nullable=True, **length)
    schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=settings["width"])
    schema.add_field(WORDS, DataType.SPARSE_FLOAT_VECTOR)
    bm25 = Function("bm25", FunctionType.BM25, input_field_names=[TEXT], output_field_names=[WORDS])
    schema.add_function(bm25)
    indexes = client.prepare_index_params()
    indexes.add_index(VECTOR, index_type="FLAT", metric_type="IP")
    indexes.add_index(WORDS, index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    client.create_collection(
        target.collection,
        schema=schema,
        index_params=indexes,
        consistency_level="Strong",
        properties={SETTINGS: json.dumps(settings), COLUMNS: json.dumps(columns)},
    )


# Writing ------------------------------------------------------------------------------------------


def primary_key(document: str, chunk: int) -> str:
    """Return the primary key of a chunk of a document with this id."""
    return f"{digest(document).hex()}-{chunk:08d}"


@dataclass
class Writer:
    """Writes the blocks of a collection of texts that are its share: every `world_size`-th."""

    store: MilvusCollection
    encoder: Encoder
    update: bool = False
    skip_bad: bool = False
    rank: int = 0
    world_size: int = 1
    counts: Counts = field(default_factory=Counts)
    seen: RowTable = field(default_factory=RowTable)  # the ids of this run

    def check(self, collection: Collection, block: int) -> None:
        """Raise UserError, before anything is written, when the texts have a column that the
        collection lacks, or changed rows without `update`.
        """
        for name, kind in columns_of(collection).items():
            there = self.store.columns.get(name)
            if there != kind and not (there == "DOUBLE" and kind == "INT64"):
                problem = f"column {name!r} is {kind}, in the collection it is {there or 'missing'}"
                advice = "make the columns equal, or name another collection"
                raise UserError(f"{collection.name}: {problem}; {advice}")
        if not self.update:
            check_unchanged(collection, self._plan, block=block)

    def fill(self, collection: Collection, *, block: int) -> None:
        """Write the share of this process, `block` texts at a time."""
        self.counts.bad = len(collection.bad) if self.rank == 0 else 0
        with progress_bar(len(collection)) as bar:
            for number, (numbers, table) in enumerate(collection.blocks(block)):
                if number % self.world_size == self.rank:
                    self._add(numbers, table, collection)
                else:  # another process writes them, and none of them again
                    repeated_rows(ids_of(table, self.store.settings["id_column"]), self.seen)
                bar.update(len(table))

    def _plan(self, table: pa.Table, seen: RowTable) -> Plan:
        """Compare a block's rows with those that the collection has, and with the ids `seen` before,
        to which they are added.
        """
        ids, hashes = ids_of(table, self.store.settings["id_column"]), hashes_of(table)
        there = self.store.stored([primary_key(key, 0) for key in ids], [HASH])
        rows = [there.get(primary_key(key, 0)) for key in ids]
        known = np.array([row is not None for row in rows], bool)
        same = np.array([row is not None and row[HASH] == own.hex() for row, own in zip(rows, hashes)], bool)
        return make_plan(ids, hashes, known=known, same=same, seen=seen)

    def _add(self, numbers: np.ndarray, table: pa.Table, collection: Collection) -> None:
        plan = self._plan(table, self.seen)
        chosen = plan.to_write
        texts = [table[TEXT][int(row)].as_py() for row in chosen]
        overlap = self.store.settings["chunk_overlap"]
        chunks = split_into_chunks(texts, self.encoder, overlap=overlap)
        flat = [chunk.text for parts in chunks for chunk in parts]
        vectors = self.encoder.encode_normalized(flat, role="document")
        ends = np.cumsum([len(parts) for parts in chunks])
        rows: list[dict[str, Any]] = []
        surplus: list[str] = []
        metadata = table.drop_columns([TEXT]).to_pylist()
        replaced = [primary_key(plan.ids[row], 0) for row in np.flatnonzero(plan.changed)]
        there = self.store.stored(replaced, [NUM_CHUNKS])
        written: list[int] = []
        for row, parts, end in zip(chosen, chunks, ends):
            own = vectors[end - len(parts) : end]
            reason = refusal(plan.ids[row], parts, own)
            if reason and not self.skip_bad:
                location = collection.location(numbers[row])
                raise UserError(f"{location}: {reason}; remove the row, or skip it with --skip-bad")
            if reason:
                continue
            written.append(row)
            shared = {ID: plan.ids[row], HASH: plan.hashes[row].hex(), NUM_CHUNKS: len(parts)}
            shared |= metadata[row]
            for number, (chunk, vector) in enumerate(zip(parts, own)):
                place = {KEY: primary_key(plan.ids[row], number), CHUNK: number, START: chunk.start}
                rows.append({**shared, **place, TEXT: chunk.text, VECTOR: vector.tolist()})
            size = there[primary_key(plan.ids[row], 0)][NUM_CHUNKS] if plan.changed[row] else 0
            surplus += [primary_key(plan.ids[row], number) for number in range(len(parts), size)]
        self._write(rows, surplus)
        self.counts.add(plan, np.array(written, np.int64))
        self.counts.encoded, self.counts.cut = self.encoder.num_encoded, self.encoder.num_cut

    def _write(self, rows: list[dict[str, Any]], surplus: list[str]) -> None:
        """Write the later chunks of documents, delete those that are too many, and then write the
        first chunks: without these, or with old ones, a document counts as not yet written.
        """
        missing = [name for name in self.store.columns if rows and name not in rows[0]]
        rows = [{**row, **dict.fromkeys(missing)} for row in rows]
        name = self.store.target.collection
        for first in (False, True):
            part = [row for row in rows if (row[CHUNK] == 0) == first]
            for start in range(0, len(part), ASKED):
                self.store.client.upsert(name, part[start : start + ASKED])
            if not first:
                for start in range(0, len(surplus), ASKED):
                    self.store.client.delete(name, ids=surplus[start : start + ASKED])


def refusal(document: str, chunks: list[Chunk], vectors: np.ndarray) -> str | None:
    """Return why a document with this id can't be written, None if it can."""
    if not np.isfinite(vectors).all():
        return "the embedding of this text has norm zero, NaN or infinity"
    if any(len(text.encode()) > LONGEST_TEXT for text in [document, *(chunk.text for chunk in chunks)]):
        return f"Milvus keeps at most {LONGEST_TEXT:,} bytes of a text; --chunk splits long ones"
    return None


def settings_there(target: Target) -> Settings | None:
    """Return the settings of a collection, None where there is none yet."""
    with connected(target) as client:
        store = open_collection(client, target)
        return store.settings if store else None


def shares_writing(runtime: Runtime, target: Target) -> bool:
    """Return whether each process encodes and writes some of the blocks: one alone can have a file open."""
    return runtime.world_size > 1 and not target.is_file


def index_texts(
    args: argparse.Namespace,
    collection: Collection,
    encoder: Encoder,
    options: search_flags.IndexOptions,
    screen: Screen,
) -> None:
    """Write texts to a collection, which is made if it is not there. Raises UserError
    when it was made with other settings.
    """
    settings, started = settings_of(encoder, **options), time.perf_counter()
    if settings["chunk_overlap"] is not None:
        chunk_size(encoder, settings["chunk_overlap"])  # refuses one that is too large, before any writing
    target, runtime = parse_target(args.index), encoder.runtime
    shares = shares_writing(runtime, target)

    def prepare() -> None:
        store = open_collection(client, target)
        if store is None:
            make_collection(client, target, settings, columns_of(collection))
            store = existing_collection(client, target)
        check_settings(target.name, settings, store.settings)
        Writer(store, encoder, update=args.update).check(collection, args.block)

    with connected(target) as client:
        if shares:
            runtime.broadcast_from_main(prepare)  # the others wait
            encoder = dataclasses.replace(encoder, runtime=runtime.alone)
        else:
            prepare()
        store = existing_collection(client, target)
        writer = Writer(store, encoder, update=args.update, skip_bad=args.skip_bad)
        if shares:
            writer.rank, writer.world_size = runtime.rank, runtime.world_size
        writer.fill(collection, block=args.block)
        counts = writer.counts
        if shares:
            own = torch.tensor(list(vars(counts).values()), device=runtime.device)
            total = runtime.all_reduce_sum(own)
            counts = Counts(*total.tolist())
        if runtime.is_main:
            display.say_counts(screen, collection, counts)
            say_notes(screen.say, collection, counts.cut, store.settings["max_length"])
            seconds = time.perf_counter() - started
            show_collection(screen, store, counts=vars(counts) | {"seconds": seconds})


def show_collection(screen: Screen, store: MilvusCollection, **more: Any) -> None:
    """Say what is in a collection."""
    rows, model = store.count(), store.settings["model"]
    screen.say(f"index    {store.folder}: {rows:,} rows, {store.width} dimensions, {model}")
    screen.document({"index": store.folder, "rows": rows, "settings": store.settings, **more})


def unknown_ids(store: MilvusCollection, ids: list[str]) -> list[str]:
    """Return the ids of documents that are not there."""
    there = store.stored([primary_key(key, 0) for key in ids], [ID])
    return [key for key in ids if primary_key(key, 0) not in there]


def delete_rows(store: MilvusCollection, ids: list[str], condition: str | None) -> int:
    """Delete whole documents, by their ids or where a condition of Milvus holds for one of their
    chunks; return the number of rows.
    """
    before = store.count()
    if condition is not None:  # of a document in chunks, the others go too
        ids = sorted({row[ID] for part in _all_rows(store, condition, [ID]) for row in part})
    for start in range(0, len(ids), ASKED):
        listed = json.dumps(ids[start : start + ASKED], ensure_ascii=False)
        store.client.delete(store.target.collection, filter=f"{ID} in {listed}")
    return before - store.count()


def listed(
    store: MilvusCollection, condition: str | None, *, offset: int, count: int
) -> tuple[int, list[dict[str, Any]]]:
    """Return how many documents there are where a condition holds for their first chunk, and some
    of them, in the order that Milvus gives.
    """
    if offset + count > LONGEST_RESULT:
        problem = f"Milvus lists {LONGEST_RESULT:,} texts"
        raise UserError(f"--offset {offset}: {problem}; narrow them with --where")
    first = f"{CHUNK} == 0" + (f" and ({condition})" if condition else "")
    rows = store.query(first, [ID, TEXT, *store.columns], offset=offset, limit=count)
    return store.count(first), [dict(row) for row in rows]


def _all_rows(store: MilvusCollection, condition: str, fields: list[str]) -> Iterator[list[dict[str, Any]]]:
    rows = store.client.query_iterator(
        store.target.collection,
        filter=condition,
        batch_size=ASKED,
        output_fields=fields,
        consistency_level="Strong",
    )
    while batch := rows.next():
        yield batch


# Searching ----------------------------------------------------------------------------------------


@dataclass
class MilvusRanker:
    """The rows of a collection where a condition of Milvus holds, in the order of their scores, as
    Milvus ranks them. `allowed` has a True for each, at most as many as Milvus returns.
    """

    snapshot: Any  # a MilvusCollection, which has what a searcher needs from an index
    condition: str
    allowed: np.ndarray
    hybrid: bool = False

    def prepare(self, queries: list[str]) -> None:
        """Do nothing: Milvus keeps its own indexes, and decides which words count."""

    def rank_rows(self, queries: list[str], vectors: np.ndarray, depth: int) -> list[Ranking]:
        """Return the best rows of each query, at most as many as Milvus returns."""
        store, condition = self.snapshot, self.condition
        if self.hybrid:
            return [_rank_hybrid(store, condition, *pair, depth) for pair in zip(queries, vectors)]
        return _rank_by_cosine(store, condition, vectors, depth)


def _rank_by_cosine(
    store: MilvusCollection, condition: str, vectors: np.ndarray, depth: int
) -> list[Ranking]:
    """Return the rows that Milvus finds by their exact scores, equal ones by id."""
    answers = store.client.search(
        store.target.collection,
        data=[vector.tolist() for vector in vectors],
        anns_field=VECTOR,
        filter=condition,
        limit=min(depth + MORE, LONGEST_RESULT),
        output_fields=_fields(store, VECTOR),
        consistency_level="Strong",
    )
    rankings = []
    for vector, hits in zip(vectors, answers):
        entities = [dict(hit["entity"]) for hit in hits]
        vectors_found = np.array([entity[VECTOR] for entity in entities], np.float32)
        found = vectors_found.reshape(-1, store.width)
        scores = exact_scores(found, vector)
        order = sorted(range(len(found)), key=lambda n: (-scores[n], entities[n][KEY]))[:depth]
        rows = np.array([store.remember(entities[n]) for n in order], np.int64)
        rankings.append((rows, scores[order]))
    return rankings


def _rank_hybrid(
    store: MilvusCollection, condition: str, query: str, vector: np.ndarray, depth: int
) -> Ranking:
    """Return the rows that Milvus' ranker makes of the cosine and of its BM25."""
    from pymilvus import AnnSearchRequest, RRFRanker

    limit = min(max(depth, FUSED), LONGEST_RESULT)
    options = {"limit": limit, "expr": condition or None}
    requests = [
        AnnSearchRequest([vector.tolist()], VECTOR, {}, **options),
        AnnSearchRequest([query], WORDS, {}, **options),
    ]
    [hits] = store.client.hybrid_search(
        store.target.collection,
        requests,
        RRFRanker(RRF_K),
        limit=limit,
        output_fields=_fields(store),
        consistency_level="Strong",
    )
    ranked = sorted(hits, key=lambda hit: (-hit["distance"], hit["entity"][KEY]))
    rows = np.array([store.remember(dict(hit["entity"])) for hit in ranked], np.int64)
    return rows, np.array([hit["distance"] for hit in ranked])


def _fields(store: MilvusCollection, *more: str) -> list[str]:
    return [KEY, ID, TEXT, CHUNK, NUM_CHUNKS, START, *store.columns, *more]


# Conditions ---------------------------------------------------------------------------------------

COMPARISONS = {
    "COMPARE_EQUAL": "==",
    "COMPARE_NOTEQUAL": "!=",
    "COMPARE_LESSTHAN": "<",
    "COMPARE_GREATERTHAN": ">",
    "COMPARE_LESSTHANOREQUALTO": "<=",
    "COMPARE_GREATERTHANOREQUALTO": ">=",
}
MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "==": "==", "!=": "!="}


def translate(condition: str | None, columns: dict[str, str]) -> str | None:
    """Return an SQL condition as an expression of Milvus; None stays None.

    DuckDB parses it, without evaluating anything. Raises UserError for what is no condition over the columns,
    and, naming it, for anything that Milvus can't express.
    """
    if condition is None:
        return None
    import duckdb

    names = {name.lower(): name for name in (ID, TEXT, *columns)}
    types = {ID: "VARCHAR", TEXT: "VARCHAR", **columns}
    with duckdb.connect() as connection:
        question = "SELECT json_serialize_sql(?)"
        selected = [f"SELECT 1 FROM rows WHERE {condition}"]
        [answer] = connection.execute(question, selected).fetchone() or [""]
    parsed = json.loads(answer)
    try:
        if parsed["error"]:
            raise ValueError(parsed["error_message"])
        [statement] = parsed["statements"]
        node = statement["node"]
        extra = ("group_expressions", "group_sets", "having", "qualify", "sample", "modifiers")
        if node["type"] != "SELECT_NODE" or any(node.get(part) for part in extra):
            raise ValueError("it is more than one condition")
        return _words(node["where_clause"], names, types)
    except (ValueError, RecursionError) as error:
        columns_known = ", ".join(names.values())
        advice = f"write a condition over {columns_known} with =, <, IN, LIKE, IS NULL, AND, OR, NOT"
        raise UserError(f"--where {condition!r}: {one_line(error)}; {advice}") from error


def _words(node: dict[str, Any], names: dict[str, str], types: dict[str, str]) -> str:
    """Return a part of a condition as an expression of Milvus."""
    kind, children = node["type"], node.get("children", [])

    def inner(child: dict[str, Any]) -> str:
        return _words(child, names, types)

    if kind in ("CONJUNCTION_AND", "CONJUNCTION_OR"):
        return f" {kind.removeprefix('CONJUNCTION_').lower()} ".join(
            f"({inner(child)})" for child in children
        )
    if kind == "OPERATOR_NOT":
        return f"not ({inner(children[0])})"
    if kind in ("OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL"):
        return f"{_column(children[0], names)} is {'not ' if 'NOT' in kind else ''}null"
    if kind in ("COMPARE_IN", "COMPARE_NOT_IN"):
        # not by Milvus' `in`, which is false where the cell is NULL, so that `not in` is true there
        column, is_not = _column(children[0], names), "NOT" in kind
        values = [_value(child, types[column]) for child in children[1:]]
        parts = [f"{column} {'!=' if is_not else '=='} {value}" for value in values]
        return f"({(' and ' if is_not else ' or ').join(parts)})"
    if kind == "COMPARE_BETWEEN":
        column = _column(node["input"], names)
        lower, upper = (_value(node[side], types[column]) for side in ("lower", "upper"))
        return f"({column} >= {lower} and {column} <= {upper})"
    if kind in COMPARISONS:
        left, right, sign = node["left"], node["right"], COMPARISONS[kind]
        if left["type"] != "COLUMN_REF":
            left, right, sign = right, left, MIRRORED[sign]
        column = _column(left, names)
        return f"{column} {sign} {_value(right, types[column])}"
    if kind == "FUNCTION" and node["function_name"] in ("~~", "!~~"):
        column, pattern = (argument["expression"] for argument in node["arguments"])
        column, text = _column(column, names), _value(pattern, "VARCHAR")
        if types[column] != "VARCHAR" or {"_", "\\"} & {*pattern["literal"]["text"]}:
            raise ValueError("LIKE is translated for columns of texts, with % alone as wildcard")
        return f"{'not ' if node['function_name'] == '!~~' else ''}({column} like {text})"
    if kind == "COLUMN_REF" and types[_column(node, names)] == "BOOL":
        return f"{_column(node, names)} == true"
    lacking = node.get("function_name") or kind.lower().replace("_", " ")
    raise ValueError(f"Milvus has nothing for {lacking}")


def _column(node: dict[str, Any], names: dict[str, str]) -> str:
    if node["type"] != "COLUMN_REF":
        found = node.get("function_name") or node["type"]
        raise ValueError(f"Milvus compares a column with a value, not {found}")
    name = node["column_names"][-1]
    if len(node["column_names"]) > 1 or name.lower() not in names:
        raise ValueError(f"there is no column {'.'.join(node['column_names'])!r}")
    return names[name.lower()]


def _value(node: dict[str, Any], kind: str) -> str:
    """Return a constant as Milvus writes it, which must be of the column's type."""
    if node.get("function_name") == "+" and len(node["arguments"]) == 1:  # +2
        node = node["arguments"][0]["expression"]
    literal = node.get("literal", {})
    if literal.get("kind") == "NULL_LITERAL":
        raise ValueError("nothing compares with NULL; write IS NULL or IS NOT NULL")
    wanted = {"VARCHAR": ("STRING",), "BOOL": ("BOOLEAN",)}.get(kind, ("INTEGER", "NUMERIC"))
    if node["type"] != "VALUE_CONSTANT" or literal.get("kind") not in wanted:
        shown = literal.get("text") or node.get("function_name") or node["type"].lower()
        problem = f"{shown!r} is compared with a column of type {kind}"
        raise ValueError(f"{problem}; Milvus converts nothing")
    text = literal["text"]
    if literal["kind"] == "INTEGER" and not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text} has more than 64 bits, and Milvus' whole numbers have that many")
    return json.dumps(text, ensure_ascii=False) if kind == "VARCHAR" else text


# The commands over a collection -------------------------------------------------------------------


def run_index(args: argparse.Namespace, screen: Screen) -> None:
    """Write texts to a collection. Under torchrun each process encodes and writes its share; a file
    of Milvus Lite is written by the main process, and all encode.
    """
    runtime = search_flags.start(args)
    target, config = parse_target(args.index), search_flags.encoder_config(args)
    existing = runtime.broadcast_from_main(lambda: settings_there(target))
    options = search_flags.index_options(args, existing)
    shares, collection = shares_writing(runtime, target), None
    with runtime.raised_on_all():  # mistakes in the texts are reported before the model is loaded
        if shares or runtime.is_main:
            collection = search_flags.read_texts(args, options["id_column"])
    encoder = load_index_encoder(config, runtime, args.index, existing)
    if collection is None:
        encoder.run_worker()
        return
    cli.exit_at_signals()
    try:
        with contextlib.nullcontext() if shares else encoder.workers():
            index_texts(args, collection, encoder, options, screen)
    except SystemExit as stopped:
        message = f"stopped; what was written is in {args.index}, and the same command continues"
        raise Interrupted(message, int(stopped.code or 0)) from None


def run_delete(args: argparse.Namespace, screen: Screen) -> None:
    """Delete documents, by their ids or by a condition."""
    with opened(args.index) as store:
        condition = translate(args.where, store.columns)
        unknown = unknown_ids(store, args.ids)
        check_known(args, unknown)
        deleted = delete_rows(store, args.ids, condition)
        display.say_deleted(screen, deleted, len(unknown))
        show_collection(screen, store, deleted=deleted, unknown=len(unknown))


def run_search(args: argparse.Namespace, screen: Screen) -> None:
    """Find the texts that are nearest to queries; without a query, ask for them."""
    runtime = search_flags.start(args)
    queries = search_flags.read_queries(args)
    with opened(args.index) as store:  # before the model is loaded
        kept = search_flags.kept_columns(args, store.columns, f"--index {args.index}")
    with opened_searcher(args, runtime, hybrid=args.hybrid, where=args.where) as searcher:
        hit_range = HitRange(args.top_k, args.offset, args.min_score)
        display.search_and_show(screen, searcher, queries, hit_range, kept=kept)


def run_evaluate(args: argparse.Namespace, screen: Screen) -> None:
    """Score the ways to search a collection, with intervals and tests of what differs."""
    from common.search import model_scores, relevance

    runtime = search_flags.start(args)
    task = relevance.read_task(args.queries, args.qrels, args.encoding)
    with opened_searcher(args, runtime) as searcher:
        relevance.check_documents(task, lambda ids: unknown_ids(searcher.snapshot, ids), screen.say)
        values = relevance.score_all(searcher, task, relevance.measures_at(args.at), ways=["hybrid"])
        searches = model_scores.of_searches(list(task.judgements), values)
        display.show_scores(screen, task, searches, {})
        if args.per_query:
            display.write_query_scores(searches, args.per_query, screen)


@contextlib.contextmanager
def opened_searcher(
    args: argparse.Namespace, runtime: Runtime, *, hybrid: bool = False, where: str | None = None
) -> Iterator[Any]:
    """Yield how a collection is searched, until the connection ends."""
    reranker = load_reranker(args.rerank, runtime, cache_dir=args.cache_dir)
    with opened(args.index) as store:
        config = search_flags.encoder_config(args)
        encoder = load_index_encoder(config, runtime, args.index, store.settings)
        condition = translate(where, store.columns) or ""
        allowed = np.ones(min(store.count(condition), LONGEST_RESULT), bool)
        ranker = MilvusRanker(store, condition, allowed, hybrid=hybrid)
        yield Searcher(ranker, encoder, reranker=reranker, rerank_depth=args.rerank_depth)


def run_list(args: argparse.Namespace, screen: Screen) -> None:
    """List documents with their columns."""
    with opened(args.index) as store:
        condition = translate(args.where, store.columns)
        total, entries = listed(store, condition, offset=args.offset, count=args.top_k)
        columns = list(store.columns)
        id_column = store.settings["id_column"]
        display.show_entries(
            screen, args.index, columns, entries, id_column=id_column, offset=args.offset, total=total
        )


def run_export(args: argparse.Namespace, screen: Screen) -> None:
    """Write rows and vectors for other programs."""
    with opened(args.index) as store:
        condition = translate(args.where, store.columns) or ""
        count = store.count(condition)
        if not count:
            problem = "no rows to export"
            raise UserError(f"--index {args.index}: {problem}; widen --where or index some texts")
        display.write_export(screen, store.parts(condition), count, args.to)


COMMANDS = {  # those of search_checks.MILVUS_COMMANDS
    "index": run_index,
    "delete": run_delete,
    "list": run_list,
    "search": run_search,
    "evaluate": run_evaluate,
    "export": run_export,
}
