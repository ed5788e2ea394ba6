"""What embed_search.py shows and writes: the tables and JSON of each command, pictures, an index in
TensorBoard's projector.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from common import sources
from common.cli import json_text
from common.columns import unused_name
from common.errors import UserError, printable, shorten
from common.files import check_new, named_in_errors, only_writer, whole_file
from common.search.index import ROWS_AT_ONCE, Snapshot
from common.search.manifest import PAIR_COLUMNS
from common.search.model_scores import ModelScores, differences
from common.search.screen import Screen
from common.search.segments import CHUNK, EXPORTED, ID, NUM_CHUNKS, OWN_NAMES, ROW, START, TEXT, vector_array
from common.terminal import cut, room

if TYPE_CHECKING:  # a command shows only what it has loaded itself
    from matplotlib.figure import Figure

    from common.search.builder import Builder, Counts
    from common.search.mining import Groups, Pair
    from common.search.relevance import Task
    from common.search.search_flags import Queries
    from common.search.searcher import Hit, HitRange, Searcher
    from common.search.selection import Selection
    from common.search.texts import Collection

HIGH, MODERATE = 0.7, 0.4  # the tutorial's thresholds of similarity
TEXT_WIDTH, CENTRAL_WIDTH = 76, 60  # columns of the screen for a text in a table
CELL_WIDTH = 24  # columns of the screen for a column of an index
FIRST_NUMBERS = 10  # of an embedding, as the tutorial prints them
SIGNIFICANT = 0.05
NUM_WORDS, NUM_CENTRAL = 6, 3  # of a cluster: its typical words, the texts nearest to its centre
MATRIX_COLUMNS = 20  # of a matrix that still fits a screen
PAIRS_IN_JSON = 1_000_000


def level(similarity: float) -> str:
    """Return a word for a similarity: high above 0.7, moderate from 0.4 on, else low."""
    if similarity > HIGH:
        return "high"
    return "moderate" if similarity >= MODERATE else "low"


def id_name(snapshot: Snapshot) -> str:
    """Return what an id is called: "row" where it is only the number of a text."""
    return "row" if snapshot.settings["id_column"] == ROW else "id"


def own_id(snapshot: Snapshot, key: str) -> int | str:
    """Return an id as JSON has it."""
    return int(key) if id_name(snapshot) == "row" else key


def short_id(document: dict[str, Any]) -> str:
    """Return the id in a document of JSON; of a long one, such as a hash of the text, only the beginning."""
    return cut(str(document.get("id", document.get("row"))), 16, 10)


def texts_at(
    selection: Selection, positions: Iterable[int], kept: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Return id and text at some positions, and under `columns` those that are `kept`."""
    rows, names = selection.rows[np.fromiter(positions, np.int64)], list(kept or ())
    snapshot, texts = selection.snapshot, []
    for row in snapshot.take(rows, [ID, TEXT, *names]):
        columns = {} if kept is None else {"columns": {name: row[name] for name in names}}
        texts.append({id_name(snapshot): own_id(snapshot, row[ID]), "text": row[TEXT], **columns})
    return texts


def label_of(row: dict[str, Any], width: int = TEXT_WIDTH) -> str:
    """Return id and text in one line."""
    return f"{short_id(row)}: {cut(row['text'], room(width))}"


def show_similarity(
    screen: Screen,
    selection: Selection,
    matrix: np.ndarray,
    pairs: list[Pair],
    queries: list[tuple[str, np.ndarray]],
) -> None:
    """Show a matrix of cosines, the most similar pairs, and for each query its similarity to all
    texts.
    """
    texts = texts_at(selection, range(len(selection)))
    names = [short_id(text) for text in texts]
    if len(names) <= MATRIX_COLUMNS:
        rows = [[name, *values] for name, values in zip(names, matrix)]
        screen.table(rows, ["", *names], title="cosine similarity")
    else:
        size = f"{len(names):,} x {len(names):,}"
        screen.say(f"the matrix of {size} is too wide here: --json prints it, --figure draws it")
    pair_documents = _show_pairs(screen, selection, pairs)
    query_documents = []
    for query, scores in queries:
        lines, rows = [], []
        for name, text, score in zip(names, texts, scores.tolist()):
            lines.append({**text, "similarity": score, "level": level(score)})
            rows.append([name, score, level(score), cut(text["text"], room(TEXT_WIDTH))])
        query_documents.append({"query": query, "similarities": lines})
        headers = ["", "similarity", "level", "text"]
        screen.table(rows, headers, title=f"query: {query}", texts=[3])
    screen.document(
        {
            "texts": texts,
            "matrix": matrix.round(3).tolist(),
            "pairs": pair_documents,
            "queries": query_documents,
        }
    )


def show_pairs(screen: Screen, selection: Selection, pairs: list[Pair], kept: Sequence[str] | None) -> None:
    """Show pairs of positions with their cosines, best first, and the columns that are `kept`."""
    screen.document({"pairs": _show_pairs(screen, selection, pairs, kept)})


def _show_pairs(
    screen: Screen, selection: Selection, pairs: list[Pair], kept: Sequence[str] | None = None
) -> list[dict]:
    firsts = texts_at(selection, (first for first, _, _ in pairs), kept)
    seconds = texts_at(selection, (second for _, second, _ in pairs), kept)
    names = list(kept or ())
    documents = [
        {"similarity": score, "first": first, "second": second}
        for first, second, (_, _, score) in zip(firsts, seconds, pairs)
    ]
    rows = []
    for number, pair in enumerate(documents, start=1):
        both = f"{label_of(pair['first'])}\n{label_of(pair['second'])}"
        cells = (_cells_of(pair[one].get("columns", {}), names) for one in ("first", "second"))
        rows.append([number, pair["similarity"], both, *map("\n".join, zip(*cells))])
    headers = ["", "similarity", selection.unit, *(cut(name, CELL_WIDTH) for name in names)]
    screen.table(rows, headers, title="the most similar pairs", texts=[2])
    return documents


def show_build(screen: Screen, builder: Builder, collection: Collection, *, seconds: float) -> None:
    """Say what became of the texts."""
    counts, snapshot = builder.counts, builder.store.snapshot
    say_counts(screen, collection, counts)
    if counts.deleted:
        screen.say(f"         {counts.deleted:,} deleted, which are gone from there")
    if counts.encoded and builder.given is None:
        speed = f"{counts.encoded / seconds:,.1f} texts/s on {builder.encoder.runtime.describe()}"
        screen.say(f"         {counts.encoded:,} different texts encoded, {speed}")
    say_notes(screen.say, collection, counts.cut, snapshot.settings["max_length"])
    _say_index(screen, snapshot)
    screen.document({**_index_document(snapshot), "counts": vars(counts) | {"seconds": seconds}})


def say_counts(screen: Screen, collection: Collection, counts: Counts) -> None:
    """Say how many texts were added, and how many were not, and why."""
    screen.say(
        f"texts    {collection.name}: {counts.added:,} added, {counts.updated:,} updated,"
        f" {counts.unchanged:,} unchanged, {counts.repeated:,} repeated, {counts.bad:,} skipped"
    )


def say_notes(say: Callable[[str], None], collection: Collection, num_cut: int, max_length: int) -> None:
    """Say how many texts were skipped, and how many were cut, if any were."""
    if collection.bad:
        row, reason = min(collection.bad.items())
        first = f"{collection.location(row)}: {reason}"
        say(f"         {len(collection.bad):,} skipped; the first: {first}")
    if num_cut:
        cut = f"{num_cut:,} are longer than {max_length} tokens and were cut there"
        say(f"         {cut}; index --chunk reads them whole")


def show_index(screen: Screen, snapshot: Snapshot, *, verified: bool = False) -> None:
    """Say what is in an index, and that its files were verified."""
    _say_index(screen, snapshot)
    document = _index_document(snapshot)
    if verified:
        screen.say("verified every file has its SHA-256")
        document["verified"] = True
    screen.document(document)


def show_deletion(screen: Screen, snapshot: Snapshot, *, deleted: int, unknown: int) -> None:
    """Say how many rows were deleted, and how many ids were not in the index."""
    say_deleted(screen, deleted, unknown)
    _say_index(screen, snapshot)
    screen.document({**_index_document(snapshot), "deleted": deleted, "unknown": unknown})


def say_deleted(screen: Screen, deleted: int, unknown: int) -> None:
    """Say how many rows were deleted, and how many ids were not in the index."""
    more = f"; {unknown:,} ids are not in the index" if unknown else ""
    screen.say(f"deleted  {deleted:,} rows{more}")


def _say_index(screen: Screen, snapshot: Snapshot) -> None:
    """Say how many rows an index has, and of what kind."""
    live = int(snapshot.is_live().sum())
    deleted, files = snapshot.num_rows - live, len(snapshot.segments)
    screen.say(
        f"index    {snapshot.folder}: {live:,} rows, {deleted:,} deleted rows, {files:,} files,"
        f" {snapshot.width} dimensions, {snapshot.settings['model']}"
    )


def _index_document(snapshot: Snapshot) -> dict[str, object]:
    """Return what `_say_index` says, for JSON and with all settings."""
    live = int(snapshot.is_live().sum())
    return {
        "index": str(snapshot.folder),
        "rows": live,
        "deleted_rows": snapshot.num_rows - live,
        "files": len(snapshot.segments),
        "settings": snapshot.settings,
    }


def show_hits(
    screen: Screen,
    snapshot: Snapshot,
    queries: list[str],
    answers: list[list[Hit]],
    hit_range: HitRange,
    *,
    kept: Sequence[str] | None = None,
    heading: str = "query: ",
    skipped: Sequence[int] = (),
) -> None:
    """Show the hits of each query within a range, best first, with the columns that are `kept`; None: with
    none on the screen and all in JSON. The queries at the positions `skipped` are only in JSON.
    """
    documents, names = [], list(kept or ())
    for position, (query, answer) in enumerate(zip(queries, answers)):
        found = hit_documents(snapshot, hit_range.select(answer), kept)
        documents.append({"query": query, "hits": found})
        if position in skipped:
            continue
        lines = []
        for number, document in enumerate(found, start=hit_range.offset + 1):
            text = cut(document["text"], room(TEXT_WIDTH))
            if chunk := document.get("chunk"):
                text = f"[chunk {chunk['number']} of {chunk['of']}] {text}"
            cells = _cells_of(document["columns"], names)
            lines.append([number, document["score"], short_id(document), text, *cells])
        headers = ["", "score", id_name(snapshot), "text", *(cut(name, CELL_WIDTH) for name in names)]
        screen.table(lines, headers, title=f"{heading}{query}", texts=[3])
    screen.document({"queries": documents})


def _cells_of(row: dict, names: Sequence[str]) -> list[str]:
    """Return some columns of a row as a table shows them."""
    return ["" if row[name] is None else cut(str(row[name]), CELL_WIDTH) for name in names]


def hit_documents(snapshot: Snapshot, hits: list[Hit], kept: Sequence[str] | None = None) -> list[dict]:
    """Return hits as `--json` and the page have them, with the columns that are `kept`, None for all."""
    names = snapshot.columns if kept is None else kept
    columns = [ID, TEXT, CHUNK, NUM_CHUNKS, START, *names]
    rows = snapshot.take([hit.row for hit in hits], columns)
    return [_hit_document(snapshot, row, hit) for row, hit in zip(rows, hits)]


def _hit_document(snapshot: Snapshot, row: dict, hit: Hit) -> dict:
    """Return a hit for JSON: id, score, text, in `columns` its metadata, and in `chunk`, if the
    document has several, which one this is.
    """
    columns = {name: value for name, value in row.items() if name not in OWN_NAMES}
    key = {id_name(snapshot): own_id(snapshot, row[ID])}
    document = {**key, "score": hit.score, "text": row[TEXT], "columns": columns}
    if row[NUM_CHUNKS] > 1:
        document["chunk"] = {"number": row[CHUNK] + 1, "of": row[NUM_CHUNKS]}
        document["chunk"]["first_character"] = row[START]
    return document


def show_list(screen: Screen, selection: Selection, *, offset: int, count: int) -> None:
    """Show texts in the order of rows, with their columns; the first chunk of each document."""
    rows, documents = selection.rows, selection.documents
    if documents is not None:
        rows = rows[np.unique(documents, return_index=True)[1]]
    snapshot, shown = selection.snapshot, rows[offset : offset + count]
    names = list(snapshot.columns)
    entries = snapshot.take(shown, [ID, TEXT, *names])
    id_column = snapshot.settings["id_column"]
    show_entries(
        screen, str(snapshot.folder), names, entries, id_column=id_column, offset=offset, total=len(rows)
    )


def show_entries(
    screen: Screen,
    index: str,
    names: list[str],
    entries: list[dict],
    *,
    id_column: str | None,
    offset: int,
    total: int,
) -> None:
    """Show some of the `total` texts of an index, with the columns that are named; in the table the
    column of the ids stands once.
    """
    others = [name for name in names if name != id_column]
    texts = [
        {"id": entry[ID], "text": entry[TEXT], "columns": {name: entry[name] for name in names}}
        for entry in entries
    ]
    lines = []
    for text in texts:
        start = cut(text["text"], room(CENTRAL_WIDTH))
        lines.append([short_id(text), start, *_cells_of(text["columns"], others)])
    first = min(offset + 1, total)
    title = f"{index}: {first:,} to {offset + len(entries):,} of {total:,} texts"
    headers = ["id", "text", *(cut(name, CELL_WIDTH) for name in others)]
    screen.table(lines, headers, title=title, texts=[1])
    screen.document({"index": index, "of": total, "texts": texts})


def show_texts(screen: Screen, snapshot: Snapshot, documents: list[np.ndarray], *, vector: bool) -> None:
    """Show documents, given by their rows, whole: id, columns, the text or its chunks, and with
    `vector` the embedding of each.
    """
    names, found = list(snapshot.columns), []
    for rows in documents:
        entries = snapshot.take(rows, [ID, TEXT, START, *names])
        columns = {name: entries[0][name] for name in names}
        screen.say(f"id       {printable(entries[0][ID])}")
        for name, value in columns.items():
            if name != snapshot.settings["id_column"]:
                screen.say(f"{cut(name, 8):<8} {cut(str(value), room(TEXT_WIDTH + 9) - 9)}")
        chunks = []
        for number, (entry, numbers) in enumerate(zip(entries, snapshot.vectors_of(rows)), start=1):
            chunk = {"text": entry[TEXT], "first_character": entry[START]}
            label = f"chunk {number} of {len(rows)}" if len(rows) > 1 else "text"
            screen.say(f"{label:<8} {printable(entry[TEXT])}")
            if vector:
                chunk["vector"] = [float(value) for value in numbers]
                first = " ".join(f"{value:.6f}" for value in numbers[:FIRST_NUMBERS])
                screen.say(f"vector   {len(numbers)} numbers, the first {FIRST_NUMBERS}: {first}")
            chunks.append(chunk)
        screen.say()
        found.append({"id": entries[0][ID], "columns": columns, "chunks": chunks})
    screen.document({"texts": found})


def search_and_show(
    screen: Screen, searcher: Searcher, queries: Queries, hit_range: HitRange, *, kept: Sequence[str] | None
) -> None:
    """Search for queries, or for those typed at a prompt if there are none, and show their hits; say how
    many queries were left out, and how many were longer than the model reads. One function does both,
    because at a prompt they alternate.
    """
    if not queries.texts:
        answer_prompt(screen, searcher, hit_range, kept=kept)
        return
    if queries.bad:
        screen.say(f"queries  {len(queries.bad):,} skipped; the first: {queries.why}")
    encoder = searcher.encoder
    assert encoder is not None
    num_cut = encoder.num_cut  # of the texts, which have been reported already
    hits = queries.with_empty(searcher.search(queries.good, hit_range.depth))
    show_hits(screen, searcher.snapshot, queries.texts, hits, hit_range, kept=kept, skipped=queries.bad)
    if num_cut := encoder.num_cut - num_cut:
        longer = f"longer than {encoder.max_length} tokens and were cut there"
        screen.say(f"{num_cut:,} queries are {longer}")


def answer_prompt(
    screen: Screen, searcher: Searcher, hit_range: HitRange, *, kept: Sequence[str] | None
) -> None:
    """Search for each query that comes from standard input, and show its hits, until the input ends or an
    empty line comes; with --json, one document per query.
    """
    screen.say(f"{int(searcher.ranker.allowed.sum()):,} texts; an empty line ends")
    for number in itertools.count(1):
        if sys.stdin.isatty():
            print("query> ", end="", file=sys.stderr, flush=True)
        try:
            query = sys.stdin.readline().strip()
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 (byte {error.object[error.start]:#04x})"
            raise UserError(f"standard input: {problem}; convert it to UTF-8") from error
        if not query:
            return
        try:
            sources.check_query(query, f"query {number}")
            hits = searcher.search([query], hit_range.depth)
            show_hits(screen, searcher.snapshot, [query], hits, hit_range, kept=kept)
        except UserError as error:  # a mistake at a prompt is no reason to load everything again
            print(error, file=sys.stderr)


@contextlib.contextmanager
def open_pairs(path: str | None) -> Iterator[Any]:
    """Yield the writer of the CSV file of --pairs-file, which has its header; None stays None."""
    if path is None:
        yield None
        return
    with (
        only_writer(Path(path), flag="--pairs-file"),
        named_in_errors(Path(path)),
        open(path, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(PAIR_COLUMNS)
        yield writer


def collect_groups(
    selection: Selection,
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    writer: Any,
    *,
    keep: bool,
) -> tuple[Groups, list[tuple[str, str, float]]]:
    """Join pairs into groups as they come. Give each pair to the `writer` of a CSV if there is one;
    else, with `keep`, return the pairs too (ids and cosine).
    """
    from common.search.mining import Groups

    groups, ids = Groups(len(selection)), selection.ids()
    kept: list[tuple[str, str, float]] = []
    for left, right, scores in parts:
        groups.join(left, right)
        rows = zip(left, right, scores.tolist())
        pairs = [(ids[one], ids[other], score) for one, other, score in rows]
        if writer:
            writer.writerows(pairs)
        elif keep and len(kept) <= PAIRS_IN_JSON:
            kept += pairs
    return groups, kept


def show_groups(
    screen: Screen,
    selection: Selection,
    groups: Groups,
    pairs: list[tuple[str, str, float]],
    *,
    threshold: float,
) -> None:
    """Show every group with all of its texts, of a document in chunks only the first."""
    if screen.as_json and len(pairs) > PAIRS_IN_JSON:
        problem = f"more than {PAIRS_IN_JSON:,} pairs, too many for one JSON document"
        raise UserError(f"duplicates: {problem}; give --pairs-file, or raise --threshold")
    lists, name = [], id_name(selection.snapshot)
    for members in groups.lists():
        unique: dict[int | str, dict[str, Any]] = {}
        for text in texts_at(selection, members):
            unique.setdefault(text[name], text)
        lists.append(list(unique.values()))
    kind = "pairs of chunks" if selection.unit == "chunks" else "pairs"
    joined = f"joined by {groups.num_pairs:,} {kind} with a cosine of at least {threshold}"
    screen.say(f"\n{len(lists):,} groups of {sum(map(len, lists)):,} texts, {joined}")
    lines = []
    for number, texts in enumerate(lists, start=1):
        for text in texts:
            lines.append([number, short_id(text), cut(text["text"], room(TEXT_WIDTH))])
    screen.table(lines, ["group", name, "text"], texts=[2])
    screen.document(
        {
            "threshold": threshold,
            "num_pairs": groups.num_pairs,
            "groups": lists,
            "pairs": [dict(zip(PAIR_COLUMNS, pair)) for pair in pairs],
        }
    )


def show_dedupe(
    screen: Screen, selection: Selection, groups: Groups, path: str, *, count: int, threshold: float
) -> None:
    """Say how many texts were kept, and where they are."""
    gone, num_groups = len(selection) - count, len(groups.lists())
    screen.say(f"kept     {count:,} of {len(selection):,} texts in {path}")
    why = f"cosines of at least {threshold}, or a chain of such, join each to the one kept of its group"
    screen.say(f"left out {gone:,} texts of {num_groups:,} groups: {why}")
    screen.document({"kept": count, "left_out": gone, "groups": num_groups, "file": path})


def write_rows(
    selection: Selection, positions: np.ndarray, path: str, *, text_column: str, order: Sequence[str]
) -> int:
    """Write the texts at some positions with their columns to a new JSONL, CSV or Parquet file,
    whole or not at all, and return how many they are. The texts are in `text_column`, unless another
    one has this name; `order` is that of the columns in their source, where TEXT stands for it.
    """
    snapshot = selection.snapshot
    columns = {name: kind for name, kind in snapshot.columns.items() if name != ROW}
    text = unused_name(text_column, list(columns))
    kinds = {**columns, TEXT: pa.large_string()}
    names = [name for name in dict.fromkeys([*order, *kinds]) if name in kinds]
    schema = pa.schema([(text if name == TEXT else name, kinds[name]) for name in names])
    rows = selection.rows[positions]

    def blocks() -> Iterator[list[dict]]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            entries = snapshot.take(rows[start : start + ROWS_AT_ONCE], names)
            yield [dict(zip(schema.names, (entry[name] for name in names))) for entry in entries]

    with _whole_file(path, "--output") as new:
        _write_blocks(new, schema, blocks())
    return len(rows)


def _write_blocks(path: Path, schema: pa.Schema, blocks: Iterator[list[dict]]) -> None:
    kind = path.suffix.lower()
    if kind == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetWriter(path, schema) as file:
            for rows in blocks:
                file.write_table(pa.Table.from_pylist(rows, schema))
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, schema.names) if kind == ".csv" else None
        if table:
            table.writeheader()
        for rows in blocks:
            if table:
                table.writerows(rows)
            else:
                file.writelines(f"{json_text(row)}\n" for row in rows)


def save_vectors(vectors: np.ndarray, path: str, screen: Screen) -> None:
    """Write vectors (N, width) for NumPy, and say so."""
    with _whole_file(path, "--output") as new, open(new, "wb") as file:
        np.save(file, vectors, allow_pickle=False)
    size = f"{len(vectors):,} of {vectors.shape[1]} numbers"
    screen.say(f"vectors  {path}: {size}, in the order of the texts")


@contextlib.contextmanager
def _whole_file(path: str, flag: str) -> Iterator[Path]:
    """Yield the path of a file to write, whole or not at all, as its only writer."""
    with only_writer(Path(path), flag=flag), named_in_errors(Path(path)), whole_file(Path(path)) as new:
        yield new


def show_clusters(screen: Screen, selection: Selection, labels: np.ndarray, words: list[list[str]]) -> None:
    """Show the size of each cluster, its typical words and its central texts."""
    from common.search.mining import NO_CLUSTER, nearest_to_centre

    snapshot, lines, documents = selection.snapshot, [], []
    ids = [own_id(snapshot, key) for key in selection.ids()]
    for number, own_words in enumerate(words):
        members = np.flatnonzero(labels == number)
        nearest = nearest_to_centre(selection, members, count=NUM_CENTRAL)
        texts = texts_at(selection, (position for position, _ in nearest))
        central = [{**text, "similarity": score} for text, (_, score) in zip(texts, nearest)]
        shown = "\n".join(label_of(text, CENTRAL_WIDTH) for text in texts)
        lines.append([number + 1, len(members), ", ".join(own_words), shown])
        documents.append(
            {
                "cluster": number + 1,
                "size": len(members),
                "words": own_words,
                "nearest_to_centre": central,
                f"{id_name(snapshot)}s": list(dict.fromkeys(ids[position] for position in members)),
            }
        )
    alone = [ids[position] for position in np.flatnonzero(labels == NO_CLUSTER)]
    title = f"{len(words):,} clusters, {len(alone):,} {selection.unit} in none"
    headers = ["cluster", selection.unit, "words", "nearest to its centre"]
    screen.table(lines, headers, title=title, folded=[2], texts=[3])
    screen.document({"clusters": documents, "in_none": list(dict.fromkeys(alone))})


def write_clusters(selection: Selection, labels: np.ndarray, path: str, screen: Screen) -> None:
    """Write each row's id and its cluster's number, empty for none, to a new CSV; say so."""
    with _whole_file(path, "--output") as new, open(new, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([id_name(selection.snapshot), "cluster"])
        for key, label in zip(selection.ids(), labels.tolist()):
            writer.writerow([key, "" if label < 0 else label + 1])
    screen.say(f"clusters {path}: the number of each {id_name(selection.snapshot)}")


def save_figure(figure: Figure, path: str, screen: Screen) -> None:
    """Write a picture and say so."""
    from common import figures

    with only_writer(Path(path), flag="--figure"), named_in_errors(Path(path)):
        figures.save(figure, path)
    screen.say(f"picture  {path}")


def show_scores(
    screen: Screen, task: Task, searches: list[ModelScores], stores: dict[str, dict[str, float]]
) -> None:
    """Show the measures of each way of searching, a star where one differs from the first, and how
    sure the first measure is; and the measures of each way to keep vectors.
    """
    found, scores = differences(searches), {one.model: one.scores() for one in searches}
    intervals = {one.model: one.intervals() for one in searches}
    against = {(one["model"], one["measure"]): one for one in found}
    first, measures = searches[0].model, list(searches[0].values)
    rows, lines = [], []
    for name, values in scores.items():
        stars = {one: "*" if _differs(against.get((name, one))) else "" for one in measures}
        rows.append([name, *(f"{values[one]:.3f}{stars[one]}" for one in measures)])
        interval = _range(intervals[name][measures[0]], "{:.3f}")
        lines.append([name, f"{values[measures[0]]:.3f}", interval])
        if one := against.get((name, measures[0])):
            interval = _range(one["interval"], "{:+.3f}")
            lines[-1] += [f"{one['difference']:+.3f}", interval, f"{one['p_holm']:.4f}"]
    queries = len(task.judgements)
    screen.table(rows, ["search", *measures], title=f"{task.name}: {queries:,} queries")
    test = "randomization over the queries, Holm"
    screen.say(f"* differs from {first}: p < {SIGNIFICANT} ({test})")
    interval = "95 % interval"
    headers = ["search", measures[0], interval, f"minus {first}", interval, "p (Holm)"]
    screen.table([line + [""] * (len(headers) - len(line)) for line in lines], headers)
    document = {"task": task.name, "queries": queries, "scores": scores}
    document |= {"intervals": intervals, "differences": found}
    if stores:
        rows = [[name, *values.values()] for name, values in stores.items()]
        headers = ["store", *next(iter(stores.values()))]
        screen.table(rows, headers, title="exact search over vectors that are kept in fewer bits")
        document["stores"] = stores
    screen.document(document)


def _differs(difference: dict | None) -> bool:
    return difference is not None and difference["p_holm"] < SIGNIFICANT


def _range(interval: tuple[float, float] | None, form: str) -> str:
    return "-" if interval is None else f"{form} to {form}".format(*interval)


def write_query_scores(searches: list[ModelScores], path: str, screen: Screen) -> None:
    """Write the measures of each query and way of searching to a new CSV file, and say so."""
    new_file = _whole_file(path, "--per-query")
    with new_file as new, open(new, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["search", "query", *searches[0].values])
        for one in searches:
            columns = [values.tolist() for values in one.values.values()]
            writer.writerows([one.model, *line] for line in zip(one.queries, *columns))
    screen.say(f"scores   {path}: those of each query")


def show_sts(screen: Screen, file: str, scores: dict[str, int | float]) -> None:
    """Show Spearman's correlation."""
    screen.table([[scores["pairs"], scores["spearman"]]], ["pairs", "Spearman"], title=file)
    screen.document({"file": file, **scores})


def show_models(screen: Screen, models: list[ModelScores]) -> None:
    """Show one line per model, and how each differs from the first one."""
    lines, found = [model.line() for model in models], differences(models)
    headers = [name.replace("_", " ") for name in lines[0]]
    screen.table([list(line.values()) for line in lines], headers)
    if found:
        rows = []
        for one in found:
            interval = _range(one["interval"], "{:+.3f}")
            values = [f"{one['difference']:+.3f}", interval]
            values += [f"{one[name]:.4f}" for name in ("p", "p_holm")]
            rows.append([one["model"], one["measure"], *values])
        headers = ["model", "measure", "difference", "95 % interval", "p", "p (Holm)"]
        title = f"against {lines[0]['model']}, query by query (randomization)"
        screen.table(rows, headers, title=title)
    screen.document({"models": lines, "differences": found})


def write_export(
    screen: Screen, parts: Iterable[tuple[pa.Table, np.ndarray]], total: int, paths: list[str]
) -> None:
    """Write `total` rows and their vectors to new files, each complete or not there at
    all: Parquet with a column `vector`, an array of NumPy, an index of FAISS (inner
    product, exact). All have the same order.
    """
    with contextlib.ExitStack() as whole:
        fresh = {path: whole.enter_context(whole_file(Path(path))) for path in dict.fromkeys(paths)}
        with contextlib.ExitStack() as files:  # all are closed before one gets its name
            add: dict[str, Callable[[pa.Table, np.ndarray], object]] = {}
            for table, vectors in parts:
                for path, new in fresh.items():
                    if path not in add:
                        files.enter_context(named_in_errors(Path(path)))
                        size = (total, vectors.shape[1])
                        add[path] = files.enter_context(_open_export(new, table.schema, size))
                    add[path](table, vectors)
    for path in fresh:
        screen.say(f"export   {path}: {total:,} rows")
    screen.document({"rows": total, "files": paths})


@contextlib.contextmanager
def _open_export(
    path: Path, schema: pa.Schema, size: tuple[int, int]
) -> Iterator[Callable[[pa.Table, np.ndarray], object]]:
    """Yield the function that adds rows and their vectors to a file, whose suffix is its format; it
    will hold rows of a schema and vectors of this size (rows, width).
    """
    if path.suffix == ".npy":
        with open(path, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": size}
            np.lib.format.write_array_header_1_0(file, header)
            yield lambda _, vectors: vectors.astype("<f4").tofile(file)
    elif path.suffix == ".faiss":
        import faiss

        index = faiss.IndexFlatIP(size[1])
        yield lambda _, vectors: index.add(np.ascontiguousarray(vectors))
        faiss.write_index(index, str(path))
    else:
        from pyarrow import parquet

        name = unused_name("vector", schema.names)
        field = pa.field(name, pa.list_(pa.float32(), size[1]), metadata=EXPORTED)
        with parquet.ParquetWriter(path, schema.append(field)) as file:
            yield lambda table, vectors: file.write_table(table.append_column(field, vector_array(vectors)))


def write_projection(screen: Screen, selection: Selection, folder: str, *, most: int) -> None:
    """Write at most `most` of the rows, evenly spaced, for TensorBoard's projector, and say how to
    look at them.
    """
    import torch
    from torch.utils.tensorboard import SummaryWriter

    from common.reading import evenly_spaced

    snapshot, total = selection.snapshot, len(selection)
    chosen = selection.rows[evenly_spaced(total, most)]
    columns = [ID, TEXT, *snapshot.columns]
    metadata = []
    for row in snapshot.take(chosen, columns):
        # in one line: a tab or a line end would split a cell
        metadata.append([shorten(str(row[name]), TEXT_WIDTH) or "-" for name in columns])
    vectors = torch.from_numpy(snapshot.vectors_of(chosen))
    header = [shorten(name, TEXT_WIDTH) or "-" for name in columns]  # in one line as well
    Path(folder).mkdir(parents=True, exist_ok=True)
    with only_writer(Path(folder), flag="--output-dir"), named_in_errors(Path(folder)):
        check_new(folder)  # again: another command may have been here before
        with SummaryWriter(folder) as writer:
            writer.add_embedding(vectors, metadata=metadata, metadata_header=header, tag="texts")
    note = "" if len(chosen) == total else f", evenly spaced among {total:,}"
    command = f"tensorboard --logdir {folder}"
    screen.say(f"{len(chosen):,} texts{note}; look at them with: {command}, tab PROJECTOR")
    screen.document({"texts": len(chosen), "of": total, "folder": str(Path(folder))})
