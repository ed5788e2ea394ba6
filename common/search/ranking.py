"""Queries -> the best documents of an index: exact or approximate cosine, fused with BM25, reranked by a cross-encoder."""

from dataclasses import dataclass, field

import bm25s
import faiss
import numpy as np

from common.search import kernel, sidecar
from common.search.encoding import Encoder
from common.search.snapshot import ID, TEXT, Snapshot

QUERIES = 64  # searched at once
FUSED = 100  # the rows of each ranking that are fused
RRF_K = 60  # Cormack, Clarke, Buettcher (SIGIR 2009)
PASSAGES = 4  # passages looked at for each document wanted, at first
WORDLESS = "no-words"  # a file in the cache of texts without any word that BM25 counts
LINKS, BUILD_BREADTH, SEARCH_BREADTH = 32, 200, 200  # of FAISS's HNSW graph: 0.99 of the exact neighbours and more, see README


@dataclass(frozen=True)
class Hit:
    """A document found: the row of its best passage, and the score that it was ordered by."""

    row: int
    score: float


@dataclass
class Searcher:
    """An index and the ways in which it is searched. `allowed` (rows) is False for rows that may not be found."""

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
        """Return the k best documents for each query, best first; of equal ones that with the lower row. Fewer where there are fewer."""
        found = []
        for start in range(0, len(queries), QUERIES):
            block = queries[start : start + QUERIES]
            found += self._documents(block, self.encoder.encode_unit(block, role="query"), k)
        return found

    def _documents(self, queries: list[str], vectors: np.ndarray, k: int) -> list[list[Hit]]:
        """Rank rows, and of the rows of one document keep the best; look deeper until there are k documents."""
        wanted = max(k, self.rerank_depth if self.reranker else 0)
        depth = wanted if self.snapshot.settings["chunk_overlap"] is None else PASSAGES * wanted
        while True:
            rankings = self._rank(queries, vectors, depth)
            found = [self._best_passages(rows, scores)[:wanted] for rows, scores in rankings]
            if depth >= len(self.allowed) or all(len(hits) >= wanted or len(rows) < depth for hits, (rows, _) in zip(found, rankings)):
                break
            depth *= PASSAGES
        if self.reranker:
            found = [self._rerank(query, hits) for query, hits in zip(queries, found)]
        return [hits[:k] for hits in found]

    def _rank(self, queries: list[str], vectors: np.ndarray, depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (rows, scores) for each query, at most `depth` of them, best first."""
        if not self.hybrid:
            return self._nearest(vectors, depth)
        depth = max(depth, FUSED)
        return [fuse([dense[0], sparse[0]]) for dense, sparse in zip(self._nearest(vectors, depth), self._keywords(queries, depth))]

    def _nearest(self, vectors: np.ndarray, depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
        if not self.approximate:
            return self._exact(vectors, depth)
        live = np.flatnonzero(self.snapshot.alive())
        chosen = np.flatnonzero(self.allowed[live])
        options = faiss.SearchParametersHNSW(efSearch=max(SEARCH_BREADTH, 2 * depth))
        if len(chosen) < len(live):
            selector = faiss.IDSelectorBatch(chosen)  # kept in a name: FAISS holds no reference to it
            options.sel = selector
        _, places = self._cache("faiss", self._build_graph, _load_graph).search(vectors, min(depth, max(len(chosen), 1)), params=options)
        if len(chosen) and (places < 0).any():  # few rows are allowed, and the graph's paths to them lead through others
            self.say(f"search   --where leaves {len(chosen):,} rows, too few for the graph: searched exactly")
            return self._exact(vectors, depth)
        return [kernel.ranked(np.sort(live[row[row >= 0]]), vector, self.snapshot.vectors_of, depth) for row, vector in zip(places, vectors)]

    def _exact(self, vectors: np.ndarray, depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
        blocks = self.snapshot.vector_blocks(kernel.BLOCK)
        return kernel.search(blocks, vectors, depth, vectors_of=self.snapshot.vectors_of, alive=self.allowed)

    def _build_graph(self, folder):
        graph = faiss.IndexHNSWFlat(self.snapshot.width, LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = BUILD_BREADTH
        alive = self.snapshot.alive()
        for start, vectors in self.snapshot.vector_blocks(kernel.BLOCK):
            graph.add(np.ascontiguousarray(vectors[alive[start : start + len(vectors)]]))
        faiss.write_index(graph, str(folder / "graph.faiss"))

    def _keywords(self, queries: list[str], depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (rows, BM25 scores) of the rows that share a word with each query, best first, equal ones by row."""
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
        """Order hits by what a cross-encoder thinks of the query and their text, equal ones by row."""
        if not hits:
            return hits
        texts = [entry[TEXT] for entry in self.snapshot.take([hit.row for hit in hits], [TEXT])]
        with self.encoder.machine.autocast():
            scores = self.reranker.predict([(query, text) for text in texts], show_progress_bar=False)
        return sorted((Hit(hit.row, float(score)) for hit, score in zip(hits, scores)), key=lambda hit: (-hit.score, hit.row))


def fuse(rankings: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, scores) of several rankings of rows as one: each gives a row 1 / (60 + its rank); equal sums go to the lower row."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking.tolist(), start=1):
            scores[row] = scores.get(row, 0.0) + 1 / (RRF_K + rank)
    order = sorted(scores, key=lambda row: (-scores[row], row))
    return np.array(order, dtype=np.int64), np.array([scores[row] for row in order])


def _load_graph(folder):
    return faiss.read_index(str(folder / "graph.faiss"))


def _load_keywords(folder):
    return None if (folder / WORDLESS).exists() else bm25s.BM25.load(folder)
