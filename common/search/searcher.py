"""Queries -> the best documents of an index: exact or approximate cosine, fused with BM25,
reranked by a cross-encoder.
"""

import hashlib
from dataclasses import dataclass, field

import bm25s
import faiss
import numpy as np
import torch

from common.errors import UserError
from common.search import kernel, sidecar
from common.search.encoder import Encoder
from common.search.index import ID, TEXT, Snapshot

QUERIES = 64  # searched at once
FUSED = 100  # the rows of each ranking that are fused
RRF_K = 60  # Cormack, Clarke, Buettcher (SIGIR 2009)
PASSAGES = 4  # passages looked at for each document wanted, at first
WORDLESS = "no-words"  # a file in the cache of texts without any word that BM25 counts
# of the rows: when --where leaves fewer, the graph misses many of them, and an exact search is
# fast
FEW = 0.1
# of FAISS's HNSW graph: 0.99 of the exact neighbours and more, see README
LINKS, BUILD_BREADTH, SEARCH_BREADTH = 32, 200, 200


@dataclass(frozen=True)
class Hit:
    """A document found: the row of its best passage, and the score that it was ordered by."""

    row: int
    score: float


@dataclass
class Searcher:
    """An index and the ways in which it is searched. `allowed` (rows) is False for rows that may
    not be found.
    """

    snapshot: Snapshot
    encoder: Encoder
    allowed: np.ndarray
    approximate: bool = False
    hybrid: bool = False
    reranker: object = None  # a CrossEncoder
    rerank_depth: int = 100
    say: object = print
    caches: dict = field(default_factory=dict)

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Return the k best documents for each query, best first; of equal ones that with the
        lower row. Fewer where there are fewer.

        With a reranker the best `rerank_depth` come in its order and with its scores, the others
        behind them as they were. Raises UserError for a query without a direction.
        """
        found = []
        for start in range(0, len(queries), QUERIES):
            block = queries[start : start + QUERIES]
            vectors = self.encoder.encode_unit(block, role="query")
            for place in np.flatnonzero(~np.isfinite(vectors).all(1)):
                raise UserError(
                    f"query {block[place]!r}: the model gives no direction (NaN, infinity or zeros) for it;"
                    " word it otherwise, or try --precision fp32"
                )
            found += self._documents(block, vectors, k)
        return found

    def _documents(self, queries: list[str], vectors: np.ndarray, k: int) -> list[list[Hit]]:
        """Rank rows, and of the rows of one document keep the best; look deeper until there are k
        documents.
        """
        wanted = max(k, self.rerank_depth if self.reranker else 0)
        depth = wanted if self.snapshot.settings["chunk_overlap"] is None else PASSAGES * wanted
        while True:
            rankings = self._rank(queries, vectors, depth)
            found = [self._best_passages(rows, scores)[:wanted] for rows, scores in rankings]
            if depth >= len(self.allowed) or all(
                len(hits) >= wanted or len(rows) < depth for hits, (rows, _) in zip(found, rankings)
            ):
                break
            depth *= PASSAGES
        if self.reranker:
            found = [
                self._rerank(query, hits[: self.rerank_depth]) + hits[self.rerank_depth :]
                for query, hits in zip(queries, found)
            ]
        return [hits[:k] for hits in found]

    def _rank(
        self, queries: list[str], vectors: np.ndarray, depth: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (rows, scores) for each query, at most `depth` of them, best first."""
        if not self.hybrid:
            return self._nearest(vectors, depth)
        depth = max(depth, FUSED)
        return [
            fuse([dense[0], sparse[0]])
            for dense, sparse in zip(self._nearest(vectors, depth), self._keywords(queries, depth))
        ]

    def _nearest(self, vectors: np.ndarray, depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
        live = np.flatnonzero(self.snapshot.alive())
        chosen = np.flatnonzero(self.allowed[live])
        if not self.approximate or len(chosen) < FEW * len(live):
            return self._exact(vectors, depth)
        graph, node_of = self._cache("faiss", self._build_graph, _load_graph)
        options, wanted, num_nodes = (
            faiss.SearchParametersHNSW(efSearch=max(SEARCH_BREADTH, 2 * depth)),
            depth,
            graph.ntotal,
        )
        if len(chosen) < len(live):
            allowed = np.unique(node_of[chosen])
            wanted, num_nodes = min(depth, len(allowed)), len(allowed)
            # kept in a name: FAISS holds no reference to it
            selector = faiss.IDSelectorBatch(allowed)
            options.sel = selector
        _, nodes = graph.search(vectors, min(wanted, num_nodes), params=options)
        if (nodes < 0).any():  # the graph's paths to some of the rows lead through others
            self.say("search   the graph found fewer rows than are wanted: searched exactly")
            return self._exact(vectors, depth)
        found, near = [], np.zeros(graph.ntotal, bool)
        for own, vector in zip(nodes, vectors):
            near[:] = False
            near[own] = True
            found.append(
                kernel.ranked(live[chosen[near[node_of[chosen]]]], vector, self.snapshot.vectors_of, depth)
            )
        return found

    def _exact(self, vectors: np.ndarray, depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
        blocks = self.snapshot.vector_blocks(kernel.BLOCK)
        return kernel.search(blocks, vectors, depth, vectors_of=self.snapshot.vectors_of, alive=self.allowed)

    def _build_graph(self, folder):
        """Write a graph with one node for each different vector, and the node of each live row:
        among many equal ones FAISS finds no way on.
        """
        graph = faiss.IndexHNSWFlat(self.snapshot.width, LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = BUILD_BREADTH
        alive, node_of, known = self.snapshot.alive(), [], {}
        for start, vectors in self.snapshot.vector_blocks(kernel.BLOCK):
            vectors, before = vectors[alive[start : start + len(vectors)]], len(known)
            nodes = [
                known.setdefault(hashlib.blake2b(vector, digest_size=16).digest(), len(known))
                for vector in vectors
            ]
            _, firsts = np.unique(nodes, return_index=True)
            graph.add(np.ascontiguousarray(vectors[[place for place in firsts if nodes[place] >= before]]))
            node_of += nodes
        faiss.write_index(graph, str(folder / "graph.faiss"))
        np.save(folder / "nodes.npy", np.array(node_of, dtype=np.int64), allow_pickle=False)

    def _keywords(self, queries: list[str], depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (rows, BM25 scores) of the rows that share a word with each query, best first,
        equal ones by row.
        """
        live = np.flatnonzero(self.snapshot.alive())
        bm25, found = self._cache("bm25", self._build_keywords, _load_keywords), []
        for words in bm25s.tokenize(queries, return_ids=False, show_progress=False):
            known = [word for word in words if bm25 and word in bm25.vocab_dict]
            scores = bm25.get_scores(known) if known else np.zeros(len(live))
            places = np.flatnonzero((scores > 0) & self.allowed[live])
            order = np.lexsort((places, -scores[places]))[:depth]
            found.append((live[places[order]], scores[places[order]]))
        return found

    def _build_keywords(self, folder):
        words = bm25s.tokenize(list(self.snapshot.texts()), show_progress=False)
        if not any(words.vocab):  # stop words and signs only: bm25s can't count them
            (folder / WORDLESS).touch()
            return
        bm25 = bm25s.BM25()
        bm25.index(words, show_progress=False)
        bm25.save(folder, show_progress=False)

    def _cache(self, name: str, build, load):
        if name not in self.caches:
            self.caches[name] = sidecar.cached(self.snapshot, name, build=build, load=load, say=self.say)
        return self.caches[name]

    def _best_passages(self, rows: np.ndarray, scores: np.ndarray) -> list[Hit]:
        if self.snapshot.settings["chunk_overlap"] is None:
            return [Hit(int(row), float(score)) for row, score in zip(rows, scores)]
        best: dict[str, Hit] = {}
        for row, score, entry in zip(rows, scores, self.snapshot.take(rows, [ID])):
            best.setdefault(entry[ID], Hit(int(row), float(score)))
        return list(best.values())

    def _rerank(self, query: str, hits: list[Hit]) -> list[Hit]:
        """Order hits by what a cross-encoder thinks of the query and their text; equal ones stay
        in the order in which they were found.

        The order is that of the logits: in 16 bits a sigmoid is 1 from 6 on, and the best
        documents would tie.
        """
        if not hits:
            return hits
        texts = [entry[TEXT] for entry in self.snapshot.take([hit.row for hit in hits], [TEXT])]
        with self.encoder.runtime.autocast():
            logits = self.reranker.predict(
                [(query, text) for text in texts],
                activation_fn=torch.nn.Identity(),
                convert_to_tensor=True,
                show_progress_bar=False,
            )
        logits = logits.float().cpu()
        scores = self.reranker.activation_fn(logits).tolist()
        return [
            Hit(hits[place].row, scores[place])
            for place in logits.argsort(descending=True, stable=True).tolist()
        ]


def fuse(rankings: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, scores) of several rankings of rows as one: each gives a row 1 / (60 + its
    rank); equal sums go to the lower row.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking.tolist(), start=1):
            scores[row] = scores.get(row, 0.0) + 1 / (RRF_K + rank)
    order = sorted(scores, key=lambda row: (-scores[row], row))
    return np.array(order, dtype=np.int64), np.array([scores[row] for row in order])


def _load_graph(folder):
    return faiss.read_index(str(folder / "graph.faiss")), np.load(folder / "nodes.npy", allow_pickle=False)


def _load_keywords(folder):
    return None if (folder / WORDLESS).exists() else bm25s.BM25.load(folder)
