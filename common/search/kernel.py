"""Exact nearest neighbours: the rows with the highest cosine similarity to a query, in an order
that never depends on chance.

`rank_plainly` is the plain version and the oracle: float64 scores of every row, sorted. `nearest_rows` gives
the same answer faster. It streams the vectors through fp32 matrix products and keeps as candidates the rows
whose scores lie within the rounding error of the k-th best; only these are ranked in float64. Equal scores:
the lower row comes first.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

BLOCK = 65_536  # rows that are read at once
# scores filtered at once: at 64 queries those of 16,384 rows, in 4 MB
SCORES = 1_048_576
ROWS_OF_THREAD = 4_096  # rows that a thread takes at a time: for fewer, waking a thread does not pay
PAIRS = 4_096  # vectors scored in float64 at once
# when all queries together have more candidates, only the k best of each query are kept: in an
# index full of equal vectors every row would stay a candidate
MAX_CANDIDATES = 1_000_000
# rows in a group, of which at first only the highest score is compared: topk over all scores would
# take longer than the product
GROUP = 64
LOWEST = np.finfo(np.float32).min  # below every cosine, above the -inf of excluded rows

Ranking = tuple[np.ndarray, np.ndarray]  # rows and their scores, best first
VectorsOf = Callable[[np.ndarray], np.ndarray]  # row numbers (n) -> vectors (n, width)


def exact_scores(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the float64 dot products (n) of vectors (n, width) with one query (width), or of each
    vector with a query of its own (n, width).

    A matrix product of BLAS adds up the terms of a row in an order that depends on the row's
    position, so that the scores of equal rows could differ in the last digit.
    """
    return (vectors.astype(np.float64) * queries.astype(np.float64)).sum(-1)


def rank_plainly(rows: np.ndarray, query: np.ndarray, k: int, vectors_of: VectorsOf) -> Ranking:
    """Return the k of `rows` with the highest float64 cosine to a query, best first, and these
    cosines. Equal scores are ordered by row.
    """
    scores = [np.zeros(0)]  # np.concatenate refuses an empty list
    for start in range(0, len(rows), PAIRS):
        scores.append(exact_scores(vectors_of(rows[start : start + PAIRS]), query))
    scores = np.concatenate(scores)
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]


def nearest_rows(
    blocks: Iterable[tuple[int, np.ndarray]],
    queries: np.ndarray,
    k: int,
    *,
    vectors_of: VectorsOf,
    allowed: np.ndarray | None = None,
) -> list[Ranking]:
    """Return what `rank_plainly` returns for each query over all rows; fewer than k where there are fewer.

    `blocks` yields (first row, unit vectors (n, width) in fp32), one block after the other;
    `queries` (q, width) are unit vectors; `allowed` (rows) is False for rows that are left out.
    """
    candidates = Candidates(len(queries), k, margin=2 * rounding_error(queries.shape[1]))
    for first, scores in _scores(blocks, queries, allowed):
        candidates.add(scores, first)
        if candidates.count > MAX_CANDIDATES + 2 * k * len(queries):
            candidates.replace(_rank_candidates(candidates, queries, vectors_of))
    return _rank_candidates(candidates, queries, vectors_of)


def _scores(
    blocks: Iterable[tuple[int, np.ndarray]], queries: np.ndarray, allowed: np.ndarray | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, fp32 scores (n, q)) over all rows, in whole groups: rows that are left out,
    and those that only fill the last group, have -inf. Each yield overwrites the scores before. The
    blocks begin with row 0 and leave none out.
    """
    columns = np.ascontiguousarray(queries.T, np.float32)  # (width, q)
    size, end = max(SCORES // len(queries) // GROUP, 1) * GROUP, 0
    buffer = np.empty((size, len(queries)), np.float32)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start, vectors in _cut(blocks, size):
            end = start + len(vectors)
            scores = buffer[start % size :][: len(vectors)]
            wanted = None if allowed is None else allowed[start:end]
            if wanted is None or wanted.any():
                _multiply(vectors, columns, scores, pool)
            if wanted is not None and not wanted.all():
                scores[~wanted] = -np.inf
            if end % size == 0:
                yield end - size, buffer
    if rest := end % size:
        whole = math.ceil(rest / GROUP) * GROUP
        buffer[rest:whole] = -np.inf
        yield end - rest, buffer[:whole]


def _cut(blocks: Iterable[tuple[int, np.ndarray]], size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, vectors) of blocks, cut where a row is a multiple of `size`."""
    for first, vectors in blocks:
        inside = range((first // size + 1) * size, first + len(vectors), size)
        for start, end in itertools.pairwise([first, *inside, first + len(vectors)]):
            yield start, vectors[start - first : end - first]


def _multiply(vectors: np.ndarray, columns: np.ndarray, scores: np.ndarray, pool: ThreadPoolExecutor) -> None:
    """Write the dot products of vectors (n, width) and queries (width, q) to `scores` (n, q)."""
    if columns.shape[1] > 1:
        torch.mm(torch.from_numpy(vectors), torch.from_numpy(columns), out=torch.from_numpy(scores))
        return
    # One dot product after the other reads the vectors nearly at the speed of memory. The
    # libraries' product of a matrix and a vector takes half as long again. Whichever thread is free
    # takes the next rows: with equal shares, all wait for one that another program holds up.
    query, starts = columns[:, 0], iter(range(0, len(vectors), ROWS_OF_THREAD))

    def work() -> None:
        for start in starts:
            rows = slice(start, start + ROWS_OF_THREAD)
            np.vecdot(vectors[rows], query, scores[rows, 0])

    num_others = min(torch.get_num_threads(), len(vectors) // ROWS_OF_THREAD) - 1
    others = [pool.submit(work) for _ in range(num_others)]
    work()
    for other in others:
        other.result()


def _rank_candidates(candidates: "Candidates", queries: np.ndarray, vectors_of: VectorsOf) -> list[Ranking]:
    """Return what `rank_plainly` returns for the candidates of each query, for all queries at once."""
    query_of_pair, row_of_pair = candidates.pairs()
    scores = [np.zeros(0)]  # np.concatenate refuses an empty list
    for start in range(0, len(row_of_pair), PAIRS):
        part = slice(start, start + PAIRS)
        scores.append(exact_scores(vectors_of(row_of_pair[part]), queries[query_of_pair[part]]))
    score_of_pair = np.concatenate(scores)
    order = np.lexsort((row_of_pair, -score_of_pair, query_of_pair))
    ends = np.searchsorted(query_of_pair[order], np.arange(1, len(queries)))
    parts = [part[: candidates.k] for part in np.split(order, ends)]
    return [(row_of_pair[own], score_of_pair[own]) for own in parts]


def rounding_error(width: int) -> float:
    """Return the largest error of an fp32 dot product of two unit vectors, including the rounding
    of the vectors (Higham 2002, section 3.1).
    """
    return (width + 8) * 2.0**-24


@dataclass
class Candidates:
    """The rows that may be among the k best of each query so far, and the fp32 scores by which
    others are ruled out.

    `margin` is how far two fp32 scores can be apart whose float64 scores are equal.
    """

    num_queries: int
    k: int
    margin: float
    # (query, row, fp32 score) of each candidate, as three arrays per block
    blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    count: int = 0  # candidates in `blocks`

    def __post_init__(self) -> None:
        # k scores of real rows per query: the first is the lowest, a lower bound of the k-th best
        self.best = np.full((self.num_queries, self.k), -np.inf, np.float32)

    def add(self, scores: np.ndarray, first: int) -> None:
        """Take in the scores (rows, queries) of the rows from `first` on, in whole groups; excluded
        rows, and those that only fill the last group, have -inf.

        Scores are compared in groups: most groups are ruled out by their highest score alone.
        """
        size = scores.shape[0]
        # fewer groups than k have no k-th best peak: then each row is a group of its own
        group = GROUP if size // GROUP >= self.k else 1
        grouped = scores.reshape(size // group, group, self.num_queries)
        if self.num_queries == 1:  # too little to wake PyTorch's threads for
            peaks = grouped[:, :, 0].max(1)[None]
        else:
            peaks = torch.from_numpy(grouped).amax(1).numpy().T  # (queries, groups)
        query_of_peak, group_of_peak = np.nonzero(peaks >= self._bound()[:, None])
        if len(query_of_peak) == 0:
            return
        best = np.concatenate([self.best, peaks], 1)
        self.best = np.partition(best, -self.k)[:, -self.k :]
        bound = self._bound()  # higher now
        kept = peaks[query_of_peak, group_of_peak] >= bound[query_of_peak]
        query_of_peak, group_of_peak = query_of_peak[kept], group_of_peak[kept]
        members = grouped[group_of_peak, :, query_of_peak]  # (kept peaks, group)
        peak_of_hit, member_of_hit = np.nonzero(members >= bound[query_of_peak, None])
        row_of_hit = first + group_of_peak[peak_of_hit] * group + member_of_hit
        score_of_hit = members[peak_of_hit, member_of_hit]
        self.blocks.append((query_of_peak[peak_of_hit], row_of_hit, score_of_hit))
        self.count += len(row_of_hit)

    def _bound(self) -> np.ndarray:
        """Return the fp32 score (queries) below which a row can't be among the k best."""
        return np.maximum(self.best[:, 0] - self.margin, LOWEST)

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the query and the row of each candidate, as two arrays."""
        if not self.blocks:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        query_of_pair, row_of_pair, score_of_pair = map(np.concatenate, zip(*self.blocks))
        is_possible = score_of_pair >= self._bound()[query_of_pair]
        return query_of_pair[is_possible], row_of_pair[is_possible]

    def replace(self, rankings: list[Ranking]) -> None:
        """Keep only the rows of these rankings, the best of all that were added so far."""
        sizes = [len(rows) for rows, _ in rankings]
        self.count = sum(sizes)
        query_of_pair = np.repeat(np.arange(len(rankings)), sizes)
        row_of_pair = np.concatenate([rows for rows, _ in rankings])
        score_of_pair = np.full(self.count, np.inf, np.float32)  # above every bound: they stay
        self.blocks = [(query_of_pair, row_of_pair, score_of_pair)]
