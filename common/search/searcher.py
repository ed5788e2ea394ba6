"""Queries -> the best documents of an index: embeddings of the queries, ranked rows, the best row of
each document, reranked by a cross-encoder.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.errors import UserError
from common.search.index import Snapshot
from common.search.kernel import Ranking
from common.search.ranker import Ranker
from common.search.segments import ID, TEXT

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

    from common.search.encoder import Encoder
    from common.search.milvus import MilvusRanker

QUERIES = 64  # searched at once
CHUNKS_PER_DOCUMENT = 4  # rows ranked at first for each document wanted, if texts are in chunks


@dataclass(frozen=True)
class Hit:
    """A document that was found: the row of its best chunk, and the score by which it is ranked."""

    row: int
    score: float


@dataclass(frozen=True)
class HitRange:
    """Which of the best documents are shown: `count`, after the first `offset`, of those that have
    a score of at least `min_score`.
    """

    count: int
    offset: int = 0
    min_score: float | None = None

    @property
    def depth(self) -> int:
        """How many documents have to be found."""
        return self.offset + self.count

    def select(self, hits: list[Hit]) -> list[Hit]:
        """Return the hits that are shown."""
        lowest, shown = self.min_score, hits[self.offset : self.depth]
        return [hit for hit in shown if lowest is None or hit.score >= lowest]


@dataclass
class Searcher:
    """How documents are searched for: what encodes the queries, what ranks the rows, and what
    reranks the best of them.
    """

    ranker: Ranker | MilvusRanker
    encoder: Encoder | None = None  # None where only vectors are searched for
    reranker: CrossEncoder | None = None
    rerank_depth: int = 100

    @property
    def snapshot(self) -> Snapshot:
        """What is searched."""
        return self.ranker.snapshot

    def ranked(self, **changes: Any) -> Searcher:
        """Return a searcher whose rows are ranked in another way, such as `hybrid=True`."""
        return dataclasses.replace(self, ranker=dataclasses.replace(self.ranker, **changes))

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Return the k best documents for each query, best first, or all if there are fewer; of
        equal ones the lower row comes first.

        With a reranker the best `rerank_depth` come in its order and with its scores; the others
        follow in their own order. Raises UserError for a query without a usable embedding.
        """
        assert self.encoder is not None
        if self.encoder.runtime.world_size > 1:
            return self._search_together(self.encoder, queries, k)
        hits: list[list[Hit]] = []
        self.ranker.prepare(queries)
        for start in range(0, len(queries), QUERIES):
            block = queries[start : start + QUERIES]
            vectors = self.encoder.encode_normalized(block, role="query")
            for number in np.flatnonzero(~np.isfinite(vectors).all(1)):
                problem = "its embedding has norm zero, NaN or infinity"
                advice = "reword it, or try --precision fp32"
                raise UserError(f"query {block[number]!r}: {problem}; {advice}")
            hits += self._best_documents(block, vectors, k)
        return hits

    def _search_together(self, encoder: Encoder, queries: list[str], k: int) -> list[list[Hit]]:
        """Return what one process would find, on every process of torchrun, all of which have the
        same queries: each searches for its share of the blocks that one process goes through.
        """
        runtime = encoder.runtime
        with runtime.local_main_first():
            self.ranker.prepare(queries)
        model = dataclasses.replace(encoder, runtime=runtime.alone, num_encoded=0, num_cut=0)
        assert isinstance(self.ranker, Ranker)  # Milvus is searched by one process
        ranker = copy.copy(self.ranker)  # with the caches that it has loaded
        ranker.say = lambda line: None
        alone = dataclasses.replace(self, ranker=ranker, encoder=model)
        blocks = runtime.share(range(0, len(queries), QUERIES))
        all_numbers = range(len(queries))
        numbers = [number for start in blocks for number in all_numbers[start : start + QUERIES]]

        def own_hits() -> np.ndarray:
            found = zip(numbers, alone.search([queries[number] for number in numbers], k))
            rows = [(number, hit.row, hit.score) for number, hits in found for hit in hits]
            return np.array(rows, np.float64).reshape(-1, 3)

        hits: list[list[Hit]] = [[] for _ in queries]
        for number, row, score in runtime.gather_rows(own_hits).tolist():
            hits[int(number)].append(Hit(int(row), score))
        counts = torch.tensor([model.num_encoded, model.num_cut])
        num_encoded, num_cut = runtime.all_reduce_sum(counts).tolist()
        encoder.num_encoded += num_encoded
        encoder.num_cut += num_cut
        return hits

    def nearest(self, vector: np.ndarray, k: int) -> list[Hit]:
        """Return the k documents with the highest cosine to a vector (width) of norm 1."""
        return self._best_documents([""], vector[None], k)[0]

    def _best_documents(self, queries: list[str], vectors: np.ndarray, k: int) -> list[list[Hit]]:
        """Rank rows and keep the best row of each document; rank more rows until there are k
        documents.
        """
        num_rows = len(self.ranker.allowed)  # more are never found, and each takes memory
        wanted = min(max(k, self.rerank_depth if self.reranker else 0), num_rows)
        depth = CHUNKS_PER_DOCUMENT * wanted if self._has_chunks else wanted
        while True:
            rankings = self.ranker.rank_rows(queries, vectors, depth)
            answers = [self._one_per_document(ranking)[:wanted] for ranking in rankings]
            # too few documents, although there may be more rows to rank
            unfinished = [
                len(hits) < wanted and len(rows) >= depth for hits, (rows, _) in zip(answers, rankings)
            ]
            if depth >= num_rows or not any(unfinished):
                break
            depth *= CHUNKS_PER_DOCUMENT
        if self.reranker:
            for number, (query, hits) in enumerate(zip(queries, answers)):
                best, rest = hits[: self.rerank_depth], hits[self.rerank_depth :]
                answers[number] = self._rerank(self.reranker, query, best) + rest
        return [hits[:k] for hits in answers]

    def _one_per_document(self, ranking: Ranking) -> list[Hit]:
        """Return a ranking of rows as hits, with only the first row of each document."""
        rows, scores = ranking
        hits = [Hit(row, score) for row, score in zip(rows.tolist(), scores.tolist())]
        if not self._has_chunks:
            return hits
        best: dict[str, Hit] = {}
        for hit, entry in zip(hits, self.snapshot.take(rows, [ID])):
            best.setdefault(entry[ID], hit)
        return list(best.values())

    @property
    def _has_chunks(self) -> bool:
        return self.snapshot.settings["chunk_overlap"] is not None

    def _rerank(self, reranker: CrossEncoder, query: str, hits: list[Hit]) -> list[Hit]:
        """Order hits by the cross-encoder's score of the query and their text; equal ones keep
        their order.

        The order is that of the logits: in 16 bits a sigmoid is 1 from 6 on, and the best documents
        would tie.
        """
        if not hits:
            return hits
        texts = [entry[TEXT] for entry in self.snapshot.take([hit.row for hit in hits], [TEXT])]
        assert self.encoder is not None
        with self.encoder.runtime.autocast():
            logits = reranker.predict(
                [(query, text) for text in texts],
                activation_fn=torch.nn.Identity(),
                convert_to_tensor=True,
                show_progress_bar=False,
            )
        logits = logits.float().cpu()
        assert reranker.activation_fn is not None
        scores = reranker.activation_fn(logits).tolist()
        order = logits.argsort(descending=True, stable=True).tolist()
        return [Hit(hits[number].row, scores[number]) for number in order]


def liked_vector(snapshot: Snapshot, liked: list[np.ndarray], unliked: list[np.ndarray]) -> np.ndarray:
    """Return the vector (width), normalized, that is near to liked documents and far from others, each
    given by its rows: twice the mean of the liked ones less the mean of the others, after Rocchio
    (1971), with the weights that Qdrant gives them. A document is the mean of its chunks.

    Raises UserError when they cancel each other out.
    """
    means = []
    for documents in (liked, unliked):
        vectors = [snapshot.vectors_of(rows).mean(0, dtype=np.float64) for rows in documents]
        units = [vector / max(np.linalg.norm(vector), 1e-12) for vector in vectors]
        means.append(np.mean(units, axis=0))
        if not unliked:
            break
    vector = 2 * means[0] - means[1] if unliked else means[0]
    norm = float(np.linalg.norm(vector))
    if norm < 1e-6:
        raise UserError("like: these texts cancel each other out; name others")
    return (vector / norm).astype(np.float32)
