"""What each subcommand of embed_search.py shows, as tables and as one JSON document."""

import contextlib
import csv
import itertools
import sys
from pathlib import Path

import numpy as np

from common import figures
from common.errors import UserError
from common.search import texts
from common.search.builder import Builder
from common.search.clustering import NONE, nearest_to_centre
from common.search.index import ID, OWN_COLUMNS, PASSAGE, PASSAGES, START, TEXT, Snapshot
from common.search.mining import Groups, Live
from common.search.screen import Screen, level, short
from common.search.searcher import Hit, Searcher

WORDS, NEAREST = 6, 3  # of a cluster: its marking words, the texts nearest to its centre
MATRIX_COLUMNS = 20  # of a matrix that still fits a screen
PAIRS_IN_JSON = 1_000_000


def labels(live: Live) -> list[str]:
    """Return the ids of rows, which for texts without an index are their numbers from 1."""
    return [row[ID] for row in live.snapshot.take(live.rows, [ID])]


def brief(key: str) -> str:
    """Return an id as it fits a table: of a long one, such as a hash of the text, the beginning;
    --json has it whole.
    """
    return key if len(key) <= 16 else f"{key[:10]}..."


def texts_of(live: Live, places) -> list[dict]:
    """Return id and text of some places."""
    return [
        {"id": row[ID], "text": row[TEXT]}
        for row in live.snapshot.take(live.rows[np.asarray(places, np.int64)], [ID, TEXT])
    ]


def one_a_document(live: Live, places) -> list[dict]:
    """Return id and text of some places, of passages of one document only the first."""
    found: dict[str, dict] = {}
    for row in texts_of(live, places):
        found.setdefault(row["id"], row)
    return list(found.values())


def say_counts(screen: Screen, collection: texts.Collection, encoder):
    """Say what is in a collection, and what of it was passed over or cut."""
    screen.say(f"texts    {collection.name}: {len(collection):,}")
    say_bad(screen, collection)
    say_cut(screen, encoder.num_cut, encoder.max_length)


def say_bad(screen: Screen, collection: texts.Collection):
    """Say how many rows were passed over, and which was the first."""
    if collection.bad:
        row, reason = min(collection.bad.items())
        screen.say(
            f"         {len(collection.bad):,} passed over; the first: {collection.place(row)}: {reason}"
        )


def say_cut(screen: Screen, cut: int, max_length: int):
    """Say how many texts the model did not read to their end."""
    if cut:
        screen.say(
            f"         {cut:,} are longer than {max_length} tokens and were read without their end; index"
            " --chunk reads all of them"
        )


def show_similarity(screen: Screen, live: Live, matrix: np.ndarray, pairs: list, queries: list):
    """Show a matrix of cosines, the most similar pairs, and for each query its similarity to all
    texts.
    """
    names, rows = labels(live), texts_of(live, range(len(live)))
    if len(names) <= MATRIX_COLUMNS:
        screen.table(
            [[brief(name), *values] for name, values in zip(names, matrix)],
            ["", *map(brief, names)],
            title="cosine similarity",
        )
    else:
        screen.say(
            f"the matrix of {len(names):,} x {len(names):,} is too wide for a screen: --json prints it,"
            " --figure draws it"
        )
    pair_documents = show_pairs(screen, live, pairs, alone=False)
    found = []
    for query, scores in queries:
        lines = [
            {**row, "similarity": float(score), "level": level(score)} for row, score in zip(rows, scores)
        ]
        screen.table(
            [[brief(line["id"]), line["similarity"], line["level"], short(line["text"])] for line in lines],
            ["", "similarity", "level", "text"],
            title=f"query: {query}",
        )
        found.append({"query": query, "similarities": lines})
    screen.document(
        {"texts": rows, "matrix": matrix.round(3).tolist(), "pairs": pair_documents, "queries": found}
    )


def show_pairs(
    screen: Screen, live: Live, pairs: list[tuple[int, int, float]], *, alone: bool = True
) -> list[dict]:
    """Show pairs of places with their cosines, best first; return them as documents."""
    firsts, seconds = (texts_of(live, [pair[side] for pair in pairs]) for side in (0, 1))
    screen.table(
        [
            [
                number,
                score,
                (
                    f"{brief(first['id'])}: {short(first['text'])}\n{brief(second['id'])}:"
                    f" {short(second['text'])}"
                ),
            ]
            for number, (first, second, (*_, score)) in enumerate(zip(firsts, seconds, pairs), start=1)
        ],
        ["", "similarity", live.unit],
        title="the most similar pairs",
    )
    documents = [
        {"similarity": score, "first": first, "second": second}
        for first, second, (*_, score) in zip(firsts, seconds, pairs)
    ]
    if alone:
        screen.document({"pairs": documents})
    return documents


def show_index(screen: Screen, builder: Builder, collection: texts.Collection, *, seconds: float):
    """Say what became of the texts."""
    counts, snapshot = builder.counts, builder.store.snapshot
    screen.say(
        f"texts    {collection.name}: {counts.added:,} added, {counts.updated:,} updated,"
        f" {counts.unchanged:,} unchanged, {counts.repeated:,} with the same text as another, {counts.bad:,}"
        " passed over"
    )
    say_bad(screen, collection)
    if counts.encoded:
        screen.say(
            f"         {counts.encoded:,} different ones encoded, {counts.encoded / seconds:,.1f} texts/s on"
            f" {builder.encoder.runtime.describe()}"
        )
    say_cut(screen, counts.cut, snapshot.settings["max_length"])
    show_state(screen, snapshot, counts=vars(counts) | {"seconds": seconds})


def show_state(screen: Screen, snapshot: Snapshot, **more):
    """Say what is in an index."""
    live = int(snapshot.alive().sum())
    if "deleted" in more:
        screen.say(
            f"deleted  {more['deleted']:,} rows"
            + (f"; {more['unknown']:,} ids are not there" if more["unknown"] else "")
        )
    screen.say(
        f"index    {snapshot.folder}: {live:,} rows, {snapshot.num_rows - live:,} deleted ones,"
        f" {len(snapshot.segments):,} files, {snapshot.width} dimensions, {snapshot.settings['model']}"
    )
    screen.document(
        {
            "index": str(snapshot.folder),
            "rows": live,
            "deleted_rows": snapshot.num_rows - live,
            "files": len(snapshot.segments),
            "settings": snapshot.settings,
            **more,
        }
    )


def hit_document(row: dict, hit: Hit) -> dict:
    """Return a hit as it stands in JSON: score, id, text, and in `columns` its metadata; of a
    document in passages the best one and its place.
    """
    found = {
        "id": row[ID],
        "score": hit.score,
        "text": row[TEXT],
        "columns": {name: value for name, value in row.items() if name not in OWN_COLUMNS},
    }
    if row[PASSAGES] > 1:
        found["passage"] = {"number": row[PASSAGE] + 1, "of": row[PASSAGES], "first_character": row[START]}
    return found


def show_hits(screen: Screen, searcher: Searcher, queries: list[str], answers: list[list[Hit]]):
    """Show what was found for each query, best first."""
    documents = []
    for query, hits in zip(queries, answers):
        found = [
            hit_document(row, hit)
            for row, hit in zip(searcher.snapshot.take([hit.row for hit in hits]), hits)
        ]
        documents.append({"query": query, "hits": found})
        lines = [
            [rank, hit["score"], brief(hit["id"]), passage_note(hit) + short(hit["text"])]
            for rank, hit in enumerate(found, start=1)
        ]
        screen.table(lines, ["", "score", "id", "text"], title=f"query: {query}")
    screen.document({"queries": documents})


def passage_note(hit: dict) -> str:
    """Return which passage of a document was the best one, "" for a document in one piece."""
    return f"[passage {hit['passage']['number']} of {hit['passage']['of']}] " if "passage" in hit else ""


def prompt(screen: Screen, searcher: Searcher, top_k: int):
    """Answer queries from standard input until it ends or an empty line comes; with --json one
    document a query.
    """
    screen.say(f"{int(searcher.allowed.sum()):,} texts; an empty line ends")
    for number in itertools.count(1):
        if sys.stdin.isatty():
            print("query> ", end="", file=sys.stderr, flush=True)
        query = sys.stdin.readline()
        if not query.strip():
            return
        try:
            texts.check_query(query, f"query {number}")
            show_hits(screen, searcher, [query.strip()], searcher.search([query.strip()], top_k))
        except UserError as error:  # a slip at a prompt is no reason to load everything again
            print(error, file=sys.stderr)


def open_output(path: str | None):
    """Open a CSV file to write to; None stays None."""
    if path is None:
        return contextlib.nullcontext()
    return open(path, "w", encoding="utf-8", newline="")  # its user closes it


def collect_groups(live: Live, parts, file, *, keep: bool) -> tuple[Groups, list[tuple]]:
    """Join pairs into groups as they come; write each to a CSV `file`, or else keep it where that
    is wanted. Returns groups and kept pairs.
    """
    groups, names, kept = Groups(len(live)), labels(live), []
    writer = csv.writer(file) if file else None
    if writer:
        writer.writerow(["first", "second", "similarity"])
    for left, right, scores in parts:
        groups.join(left, right)
        pairs = [
            (names[first], names[second], score) for first, second, score in zip(left, right, scores.tolist())
        ]
        if writer:
            writer.writerows(pairs)
        elif keep and len(kept) <= PAIRS_IN_JSON:
            kept += pairs
    return groups, kept


def show_groups(screen: Screen, live: Live, groups: Groups, kept: list, *, threshold: float):
    """Show every group with all of its texts."""
    if screen.as_json and len(kept) > PAIRS_IN_JSON:
        raise UserError(
            f"duplicates: more than {PAIRS_IN_JSON:,} pairs, too many for one JSON document; write them with"
            " --pairs-file, or raise --threshold"
        )
    lists = [one_a_document(live, members) for members in groups.lists()]
    screen.say(
        f"\n{len(lists):,} groups of {sum(map(len, lists)):,} texts, joined by {groups.num_pairs:,} pairs "
        f"{'of passages ' if live.unit == 'passages' else ''}with a cosine of at least {threshold}"
    )
    lines = [
        [number, brief(row["id"]), short(row["text"])]
        for number, rows in enumerate(lists, start=1)
        for row in rows
    ]
    screen.table(lines, ["group", "id", "text"])
    pairs = [{"first": first, "second": second, "similarity": score} for first, second, score in kept]
    screen.document({"threshold": threshold, "num_pairs": groups.num_pairs, "groups": lists, "pairs": pairs})


def show_clusters(screen: Screen, live: Live, numbers: np.ndarray, words: list[list[str]]):
    """Show each cluster's size, words and central texts."""
    names, lines, documents = labels(live), [], []
    for number, own in enumerate(words):
        members = np.flatnonzero(numbers == number)
        nearest = nearest_to_centre(live, members, NEAREST)
        central = [
            {**row, "similarity": score}
            for row, (_, score) in zip(texts_of(live, [place for place, _ in nearest]), nearest)
        ]
        lines.append(
            [
                number + 1,
                len(members),
                ", ".join(own),
                "\n".join(f"{brief(row['id'])}: {short(row['text'], 60)}" for row in central),
            ]
        )
        documents.append(
            {
                "cluster": number + 1,
                "size": len(members),
                "words": own,
                "nearest_to_centre": central,
                "ids": list(dict.fromkeys(names[place] for place in members)),
            }
        )
    alone = [names[place] for place in np.flatnonzero(numbers == NONE)]
    screen.table(
        lines,
        ["cluster", live.unit, "words", "nearest to its centre"],
        title=f"{len(words):,} clusters, {len(alone):,} {live.unit} in none",
    )
    alone = list(dict.fromkeys(alone))
    screen.document({"clusters": documents, "in_none": alone})


def save_figure(figure, path: str, screen: Screen):
    """Write a picture and say so."""
    figures.save(figure, path)
    screen.say(f"picture  {path}")


def show_scores(screen: Screen, task, scores: dict[str, dict[str, float]]):
    """Show the measures of each way of searching."""
    screen.table(
        [[name, *values.values()] for name, values in scores.items()],
        ["search", *next(iter(scores.values()))],
        title=f"{task.name}: {len(task.judgements):,} queries",
    )
    screen.document({"task": task.name, "queries": len(task.judgements), "scores": scores})


def show_sts(screen: Screen, file: str, scores: dict):
    """Show Spearman's correlation."""
    screen.table([[scores["pairs"], scores["spearman"]]], ["pairs", "Spearman"], title=file)
    screen.document({"file": file, **scores})


def show_models(screen: Screen, lines: list[dict]):
    """Show one line a model."""
    screen.table([list(line.values()) for line in lines], [name.replace("_", " ") for name in lines[0]])
    screen.document({"models": lines})


def show_projection(screen: Screen, count: int, total: int, folder: str):
    """Say what was written, and how to look at it."""
    note = "" if count == total else f", evenly spread over {total:,}"
    screen.say(f"{count:,} texts{note}; look at them with: tensorboard --logdir {folder}, page PROJECTOR")
    screen.document({"texts": count, "of": total, "folder": str(Path(folder))})
