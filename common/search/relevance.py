"""How good a search is: queries and relevance judgements in, nDCG, MRR and recall out; and
Spearman's rank correlation for sentence pairs.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytrec_eval
from scipy.stats import spearmanr

from common import bundled, reading
from common.errors import UserError
from common.search import texts
from common.search.builder import rows_with_ids
from common.search.index import ID, TEXT, Snapshot
from common.search.kernel import exact_scores
from common.search.searcher import Searcher

DEPTH = 100  # documents looked at for recall@100
MEASURES = {
    "nDCG@10": "ndcg_cut_10",
    "MRR@10": "recip_rank",
    "recall@1": "recall_1",
    "recall@10": "recall_10",
    "recall@100": "recall_100",
}
BUNDLED_IDS = "id"  # the column of the ids of the bundled task
MODES = {"exact": {}, "approximate": {"approximate": True}, "hybrid": {"hybrid": True}}


@dataclass(frozen=True)
class Task:
    """`queries`: id -> text; `judgements`: query id -> document id -> relevance (0: not
    relevant).
    """

    name: str
    queries: dict[str, str]
    judgements: dict[str, dict[str, int]]


def retrieval_scores(judgements: dict[str, dict[str, int]], found: dict[str, list[str]]) -> dict[str, float]:
    """Return the mean of each measure over the judged queries, by trec_eval; a query without an
    answer counts 0.

    `found`: query id -> document ids, best first. MRR looks at the first ten.
    """
    wanted = {query: found.get(query, []) for query in judgements}
    # no ties to break
    ranked = {
        query: {document: float(-rank) for rank, document in enumerate(documents)}
        for query, documents in wanted.items()
    }
    first_ten = {query: dict(list(documents.items())[:10]) for query, documents in ranked.items()}
    whole = pytrec_eval.RelevanceEvaluator(judgements, {"ndcg_cut.10", "recall.1,10,100"}).evaluate(ranked)
    short = pytrec_eval.RelevanceEvaluator(judgements, {"recip_rank"}).evaluate(first_ten)
    merged = [{**whole.get(query, {}), **short.get(query, {})} for query in judgements]
    return {
        name: float(np.mean([scores.get(key, 0.0) for scores in merged])) for name, key in MEASURES.items()
    }


def score_modes(searcher: Searcher, task: Task, *, reranker=None) -> dict[str, dict[str, float]]:
    """Return the measures of exact, approximate and hybrid search, and of what a cross-encoder
    makes of the exact one.
    """
    modes = {**MODES, **({"reranked": {"reranker": reranker}} if reranker else {})}
    return {name: score_mode(searcher, task, options) for name, options in modes.items()}


def score_mode(searcher: Searcher, task: Task, options: dict) -> dict[str, float]:
    """Return the measures of one way of searching."""
    mode = Searcher(
        searcher.snapshot,
        searcher.encoder,
        searcher.allowed,
        rerank_depth=searcher.rerank_depth,
        say=searcher.say,
        **options,
    )
    hits = mode.search([task.queries[query] for query in task.judgements], DEPTH)
    ids = {
        query: [row[ID] for row in searcher.snapshot.take([hit.row for hit in best], [ID])]
        for query, best in zip(task.judgements, hits)
    }
    return retrieval_scores(task.judgements, ids)


def bundled_task(name: str) -> tuple[Task, texts.Collection]:
    """Return the task to find each article of a bundled set of news by its headline, and the
    articles without their headlines, keyed by row.
    """
    if name not in bundled.DATASETS:
        raise UserError(f"{name}: no such bundled data set; there is {', '.join(bundled.DATASETS)}")
    articles, queries, judgements = [], {}, {}
    for row, text in enumerate(bundled.DATASETS[name]()["text"][:]):
        headline, _, article = text.partition("\n")
        if headline.strip() and article.strip():
            queries[f"q{row}"], judgements[f"q{row}"] = headline.strip(), {str(row): 1}
            articles.append({BUNDLED_IDS: str(row), TEXT: article.strip()})
    rows = pa.Table.from_pylist(articles, pa.schema({BUNDLED_IDS: pa.string(), TEXT: pa.large_string()}))
    return Task(
        f"{name}: headlines as queries, the articles without them as texts", queries, judgements
    ), texts.Collection(name, rows, "row", {})


def read_task(queries_file: str, judgements_file: str) -> Task:
    """Read queries (JSONL with `id` or `_id`, and `text`) and judgements (TREC qrels: query, 0,
    document, relevance).

    Raises UserError, naming file and line.
    """
    queries = {}
    for number, line in enumerate(reading.read_lines(queries_file), start=1):
        place = f"{queries_file}, line {number}"
        try:
            entry = json.loads(line)
            key, text = str(entry.get("id", entry.get("_id", ""))), entry["text"]
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f'{place}: not a query; write one JSON object a line: {{"id": "q1", "text": "..."}}'
            ) from error
        if not key or key in queries or not isinstance(text, str):
            raise UserError(
                f"{place}: {'the id stands above too' if key in queries else 'it needs an id and a text'};"
                " mend the line"
            )
        texts.check_query(text, place)
        queries[key] = text
    return Task(Path(queries_file).name, queries, _read_judgements(judgements_file, queries))


def check_documents(task: Task, snapshot: Snapshot, say):
    """Say how many of the documents that are judged relevant are not there to be found; raise
    UserError when none is.
    """
    wanted = list(
        {
            document
            for judged in task.judgements.values()
            for document, relevance in judged.items()
            if relevance > 0
        }
    )
    _, missing = rows_with_ids(snapshot, wanted)
    if len(missing) == len(wanted):
        raise UserError(
            f"{task.name}: none of the {len(wanted):,} documents that are judged relevant is"
            f" there{f', such as {missing[0]!r}' if missing else ''}; name their texts or index, keyed by the"
            " ids of the judgements"
        )
    if missing:
        say(
            f"judged   {len(missing):,} of {len(wanted):,} documents that are judged relevant are not there,"
            f" such as {missing[0]!r}: they count as not found"
        )


def _read_judgements(file: str, queries: dict[str, str]) -> dict[str, dict[str, int]]:
    judgements: dict[str, dict[str, int]] = {}
    for number, line in enumerate(reading.read_lines(file), start=1):
        fields = line.split()
        if len(fields) != 4 or not re.fullmatch("-?[0-9]{1,9}", fields[3]):
            raise UserError(
                f"{file}, line {number}: not a TREC judgement; write: query 0 document relevance, the"
                " relevance a whole number"
            )
        if fields[0] not in queries:
            raise UserError(
                f"{file}, line {number}: no query {fields[0]!r} in the file of queries; add it or remove the"
                " line"
            )
        judgements.setdefault(fields[0], {})[fields[2]] = int(fields[3])
    return judgements


def sts_score(encoder, file: str, columns: list[str], *, block: int, cache_dir: str | None) -> dict:
    """Return Spearman's correlation of the cosine of two texts with a human score; `columns` names
    both texts and the score in a data file.
    """
    rows = reading.read_file(Path(file), cache_dir=cache_dir)
    for column in columns:
        if column not in rows.column_names:
            raise UserError(
                f"{file}: no column {column!r}; there is {', '.join(rows.column_names)}; name two texts and a"
                " score with --columns"
            )
    for column in columns[:2]:
        reading.check_texts(rows, column, source=file)
    try:
        human = np.array(rows[columns[2]][:], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{file}: column {columns[2]!r} holds something else than numbers; name two texts and a score"
            " with --columns"
        ) from error
    if not np.isfinite(human).all():
        raise UserError(
            f"{file}, row {int(np.flatnonzero(~np.isfinite(human))[0]) + 1}: the score in column"
            f" {columns[2]!r} is missing; fill it in"
        )
    cosines = []
    for start in range(0, len(human), block):
        left, right = (encoder.encode_unit(rows[start : start + block][column]) for column in columns[:2])
        cosines.append(exact_scores(left, right))
    return {"pairs": len(human), "spearman": _spearman(np.concatenate(cosines), human, file)}


def _spearman(cosines: np.ndarray, human: np.ndarray, file: str) -> float:
    """Return the correlation. Raises UserError where there is none: equal numbers have no
    ranks.
    """
    for values, what in ((human, "human scores"), (cosines, "cosines")):
        if not np.isfinite(values).all() or np.ptp(values) == 0:
            raise UserError(
                f"{file}: the {what} of its {len(values)} pairs are all equal or not numbers: they have no"
                " correlation; name pairs that differ"
            )
    return float(spearmanr(cosines, human).statistic)
