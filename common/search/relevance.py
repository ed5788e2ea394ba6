"""How good a search is: queries and relevance judgements in, nDCG, MRR and recall out; and how well
an encoder agrees with human scores of sentence pairs (Spearman's rank correlation).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import bundled, reading, sources
from common.columns import require_column
from common.errors import UserError
from common.search.encoder import Encoder
from common.search.index import Snapshot
from common.search.kernel import exact_scores
from common.search.manifest import bytes_of_vector, store_of
from common.search.searcher import Searcher
from common.search.segments import ID, TEXT
from common.search.texts import Collection

DEPTH = 100  # documents looked at for each query, or more for a measure that stops later
QRELS_HEADERS = ("score", "relevance", "rel", "label")  # of the last column
Judgements = dict[str, dict[str, int]]  # query id -> document id -> relevance (0: not relevant)


@dataclass(frozen=True)
class Measures:
    """The ranks at which nDCG, MRR and precision stop, and those of recall."""

    cuts: tuple[int, ...] = (10,)
    recall_cuts: tuple[int, ...] = (1, 10, 100)

    @property
    def depth(self) -> int:
        """How many documents are looked at."""
        return max(DEPTH, *self.cuts, *self.recall_cuts)

    @property
    def keys(self) -> dict[str, str]:
        """The name of each measure, and that which trec_eval gives it."""
        keys = {f"nDCG@{cut}": f"ndcg_cut_{cut}" for cut in self.cuts}
        keys |= {f"MRR@{cut}": f"recip_rank_{cut}" for cut in self.cuts}
        keys |= {f"MAP@{self.depth}": "map"} | {f"P@{cut}": f"P_{cut}" for cut in self.cuts}
        return keys | {f"recall@{cut}": f"recall_{cut}" for cut in self.recall_cuts}


USUAL = Measures()


def measures_at(cuts: list[int] | None) -> Measures:
    """Return the measures that stop at some ranks, by default the usual ones."""
    chosen = tuple(sorted(set(cuts or ())))
    return Measures(chosen, chosen) if chosen else USUAL


@dataclass(frozen=True)
class Task:
    """What a search is scored on. `queries`: id -> text."""

    name: str
    queries: dict[str, str]
    judgements: Judgements


def query_scores(
    judgements: Judgements, hits: dict[str, list[str]], measures: Measures = USUAL
) -> dict[str, list[float]]:
    """Return each measure of all judged queries, in their order, by trec_eval; a query without hits
    counts 0. `hits`: query id -> document ids, best first.
    """
    import pytrec_eval

    ranked = {query: _ranked(hits.get(query, [])) for query in judgements}
    all_cuts = (measures.cuts, measures.recall_cuts)
    cuts, recalls = (",".join(map(str, numbers)) for numbers in all_cuts)
    wanted = {f"ndcg_cut.{cuts}", f"P.{cuts}", f"recall.{recalls}", "map"}
    found = pytrec_eval.RelevanceEvaluator(judgements, wanted).evaluate(ranked)
    for cut in measures.cuts:  # trec_eval's reciprocal rank has none
        first = {query: _ranked(hits.get(query, [])[:cut]) for query in judgements}
        short = pytrec_eval.RelevanceEvaluator(judgements, {"recip_rank"}).evaluate(first)
        for query, scores in short.items():
            found.setdefault(query, {})[f"recip_rank_{cut}"] = scores["recip_rank"]
    return {
        name: [found.get(query, {}).get(key, 0.0) for query in judgements]
        for name, key in measures.keys.items()
    }


def _ranked(documents: list[str]) -> dict[str, float]:
    """Return scores that never tie: minus the rank."""
    return {document: float(-rank) for rank, document in enumerate(documents)}


def score_all(
    searcher: Searcher, task: Task, measures: Measures, *, ways: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Return the measures of each query for exact search, for other ways, such as "hybrid", and for
    exact search that is reranked, if there is a reranker.
    """
    plain = dataclasses.replace(searcher, reranker=None)
    searchers = {"exact": plain} | {way: plain.ranked(**{way: True}) for way in ways}
    if searcher.reranker:
        searchers["reranked"] = searcher
    hits = {name: find(own, task, measures.depth) for name, own in searchers.items()}
    return {name: query_scores(task.judgements, found, measures) for name, found in hits.items()}


def find(searcher: Searcher, task: Task, depth: int = DEPTH) -> dict[str, list[str]]:
    """Return the ids of the documents that a search finds for each judged query, best first."""
    hits = searcher.search([task.queries[query] for query in task.judgements], depth)
    ids = {}
    for query, best in zip(task.judgements, hits):
        ids[query] = [row[ID] for row in searcher.snapshot.take([hit.row for hit in best], [ID])]
    return ids


def score_stores(
    searcher: Searcher, task: Task, measures: Measures, *, stores: list[str]
) -> dict[str, dict[str, float]]:
    """Return for each way to keep vectors the measures of exact search over what is kept, the share
    of the ten best documents of fp32 that are among its ten best, and the bytes of a vector.

    Raises UserError when the index itself keeps less.
    """
    if not stores:
        return {}
    searcher, snapshot = dataclasses.replace(searcher, reranker=None), searcher.snapshot
    kept = store_of(snapshot.settings)
    if kept != "fp32":
        advice = "name the texts with --texts, or an index in fp32"
        raise UserError(
            f"--store {stores[0]}: the index keeps {kept}, and nothing to compare it with; {advice}"
        )
    whole, lines = find(searcher, task), {}
    for store in stores:
        segments = [segment.repacked(store) for segment in snapshot.segments]
        repacked = Snapshot(snapshot.folder, snapshot.manifest, segments)
        hits = find(searcher.ranked(snapshot=repacked), task, measures.depth)
        shared = []
        for query, best in whole.items():
            shared.append(len(set(hits[query][:10]) & set(best[:10])) / len(best[:10]))
        scores = query_scores(task.judgements, hits, measures)
        lines[store] = {name: float(np.mean(values)) for name, values in scores.items()}
        lines[store]["top 10 of fp32"] = float(np.mean(shared))
        lines[store]["bytes"] = bytes_of_vector(store, snapshot.width)
    return lines


def bundled_task() -> tuple[Task, Collection]:
    """Return the task of finding each article of the bundled news by its headline, and the articles
    without their headlines, whose ids are their rows.
    """
    name = "bundled/bbc-news"
    articles, queries, judgements = [], {}, {}
    for row, text in enumerate(bundled.DATASETS[name]()["text"][:]):
        headline, _, article = text.partition("\n")
        if headline.strip() and article.strip():
            queries[f"q{row}"], judgements[f"q{row}"] = headline.strip(), {str(row): 1}
            articles.append({"id": str(row), TEXT: article.strip()})
    schema = pa.schema({"id": pa.string(), TEXT: pa.large_string()})
    rows = pa.Table.from_pylist(articles, schema)
    title = f"{name}: headlines as queries, the articles without them as texts"
    task = Task(title, queries, judgements)
    return task, Collection(name, rows, "row", {}, "id")


def read_task(queries_file: str, judgements_file: str, encoding: str | None = None) -> Task:
    """Return the task of two files: queries (JSONL with `id` or `_id`, and `text`) and judgements
    (TREC's qrels: query, 0, document, relevance; or without the 0, as in BEIR, whose first line
    names the columns).

    Raises UserError, naming file and line.
    """
    queries: dict[str, str] = {}
    for number, line in enumerate(reading.read_lines(queries_file, encoding=encoding), start=1):
        location = f"{queries_file}, line {number}"
        try:
            entry = json.loads(line)
            key, text = str(entry.get("id", entry.get("_id", ""))), entry["text"]
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            example = '{"id": "q1", "text": "..."}'
            problem = "not a query; write one JSON object per line"
            raise UserError(f"{location}: {problem}: {example}") from error
        if key in queries:
            raise UserError(f"{location}: the id {key!r} is not unique: it occurs above; change it")
        if not key or not isinstance(text, str):
            raise UserError(f"{location}: a query needs an id and a text; correct the line")
        sources.check_query(text, location)
        queries[key] = text
    judgements = _read_judgements(judgements_file, queries, encoding)
    return Task(Path(queries_file).name, queries, judgements)


def _read_judgements(file: str, queries: dict[str, str], encoding: str | None) -> Judgements:
    judgements: Judgements = {}
    for number, line in enumerate(reading.read_lines(file, encoding=encoding), start=1):
        fields = line.split()
        if number == 1 and len(fields) == 3 and fields[2] in QRELS_HEADERS:
            continue
        if len(fields) not in (3, 4) or not re.fullmatch("-?[0-9]{1,9}", fields[-1]):
            form = "query 0 document relevance, the relevance a whole number"
            advice = f"write: {form} (or leave the 0 out)"
            raise UserError(f"{file}, line {number}: not a judgement of TREC or BEIR; {advice}")
        if fields[0] not in queries:
            problem = f"no query {fields[0]!r} in the file of queries"
            raise UserError(f"{file}, line {number}: {problem}; add it or remove the line")
        query, document, relevance = fields[0], fields[-2], fields[-1]
        if judgements.setdefault(query, {}).setdefault(document, int(relevance)) != int(relevance):
            problem = f"{query!r} and {document!r} are judged above, with another relevance"
            raise UserError(f"{file}, line {number}: {problem}; remove one of the lines")
    return judgements


def check_documents(
    task: Task, missing_of: Callable[[list[str]], list[str]], say: Callable[[str], None]
) -> None:
    """Say how many of the documents that are judged relevant the index does not have; `missing_of`
    returns those of some ids. Raises UserError when it has none of them.
    """
    judged = [item for documents in task.judgements.values() for item in documents.items()]
    relevant = list({document for document, relevance in judged if relevance > 0})
    missing = missing_of(relevant)
    example = f", such as {missing[0]!r}" if missing else ""
    if len(missing) == len(relevant):
        raise UserError(
            f"{task.name}: none of the {len(relevant):,} documents that are judged relevant is"
            f" there{example}; name their texts or their index, with the ids of the judgements"
        )
    if missing:
        say(
            f"judged   {len(missing):,} of {len(relevant):,} documents that are judged relevant are"
            f" missing{example}: they count as not found"
        )


def sts_score(
    encoder: Encoder, file: str, columns: list[str], *, options: sources.FileOptions, block: int
) -> dict[str, int | float]:
    """Return Spearman's correlation of the cosine of two texts with a human score; `columns` names
    both texts and the score in a data file.
    """
    from scipy.stats import spearmanr

    cosines, human = sts_cosines(encoder, file, columns, options=options, block=block)
    return {"pairs": len(human), "spearman": float(spearmanr(cosines, human).statistic)}


def sts_cosines(
    encoder: Encoder, file: str, columns: list[str], *, options: sources.FileOptions, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosine and the human score (N) of each pair of texts. Raises UserError where they
    have no correlation: equal numbers have no ranks.
    """
    texts, folder = columns[:2], encoder.cache_dir
    rows = reading.read_file(Path(file), as_text=texts, options=options, cache_dir=folder)
    for column in columns:
        require_column(rows.column_names, column, source=file, flag="--sts-columns")
    for column in texts:
        reading.check_texts(rows, column, source=file)
    try:
        human = np.array(rows[columns[2]][:], dtype=np.float64)
    except (TypeError, ValueError) as error:
        problem = f"column {columns[2]!r} does not hold numbers"
        advice = "name two texts and a score with --sts-columns"
        cells = [str(cell) for cell in rows[columns[2]][:] if cell is not None]
        if all(re.fullmatch(r"\s*[-+]?(\d+,?\d*|,\d+)\s*", cell) for cell in cells):
            problem = f"{problem} with a point before the decimals"
            advice = "read a comma there with --decimal ,"
        raise UserError(f"{file}: {problem}; {advice}") from error
    if not np.isfinite(human).all():
        row = int(np.flatnonzero(~np.isfinite(human))[0]) + 1
        problem = f"the score in column {columns[2]!r} is missing"
        raise UserError(f"{file}, row {row}: {problem}; fill it in")
    cosines = []
    for start in range(0, len(human), block):
        part = rows[start : start + block]
        left, right = (encoder.encode_normalized(part[column]) for column in texts)
        cosines.append(exact_scores(left, right))
    found = np.concatenate(cosines)
    for values, what in ((human, "human scores"), (found, "cosines")):
        if not np.isfinite(values).all() or np.ptp(values) == 0:
            problem = f"the {what} of its {len(values)} pairs are all equal or not numbers"
            advice = "so they have no correlation; name pairs that differ"
            raise UserError(f"{file}: {problem}, {advice}")
    return found, human
