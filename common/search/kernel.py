"""Exact nearest neighbours: the rows with the highest cosine similarity to a query, in an order
that never depends on chance.

`rank` is the plain version and the oracle: float64 scores of every row, sorted. `search` gives the
same answer faster. It streams the vectors through fp32 matrix products and keeps as candidates the
rows whose scores lie within the rounding error of the k-th best; only these are ranked in float64.
Equal scores: the lower row comes first.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

BLOCK = 16_384  # rows whose scores are filtered at once
# rows per matrix product: at 384 dimensions they stay in a core's cache while 64 queries use them
PRODUCT = 2_048
# when all queries together have more candidates, only the k best of each query are kept: in an
# index full of equal vectors every row would stay a candidate
MAX_CANDIDATES = 1_000_000
# of so many rows only the highest score is compared at first: topk over all scores would take
# longer than the product
GROUP = 64
LOWEST = torch.finfo(torch.float32).min  # below every cosine, above the -inf of excluded rows

Ranking = tuple[np.ndarray, np.ndarray]  # rows and their scores, best first
VectorsOf = Callable[[np.ndarray], np.ndarray]  # row numbers (n) -> vectors (n, width)


def exact_scores(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the float64 dot products (n) of vectors (n, width) with one query (width), or of each
    vector with a query of its own (n, width).

    A matrix product would add up the terms of a row in an order that depends on the row's position,
    so that the scores of equal rows could differ in the last digit.
    """
    return (vectors.astype(np.float64) * queries.astype(np.float64)).sum(-1)


def rank(rows: np.ndarray, query: np.ndarray, k: int, vectors_of: VectorsOf) -> Ranking:
    """Return the k of `rows` with the highest float64 cosine to a query, best first, and these
    cosines. Equal scores are ordered by row.
    """
    parts = [np.zeros(0)]
    for start in range(0, len(rows), BLOCK):
        parts.append(exact_scores(vectors_of(rows[start : start + BLOCK]), query))
    scores = np.concatenate(parts)
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]


def search(
    blocks: Iterable[tuple[int, np.ndarray]],
    queries: np.ndarray,
    k: int,
    *,
    vectors_of: VectorsOf,
    allowed: np.ndarray | None = None,
) -> list[Ranking]:
    """Return what `rank` returns for each query over all rows; fewer than k where there are fewer.

    `blocks` yields (first row, unit vectors (n, width) in fp32) of at most BLOCK rows; `queries`
    (q, width) are unit vectors; `allowed` (rows) is False for rows that are left out.
    """
    columns = torch.from_numpy(np.ascontiguousarray(queries.T, np.float32))  # (width, q)
    candidates = Candidates(len(queries), k, margin=2 * rounding_error(queries.shape[1]))
    buffer = torch.empty(BLOCK, len(queries))
    for first, vectors in blocks:
        allowed_here = None if allowed is None else allowed[first : first + len(vectors)]
        if allowed_here is not None and not allowed_here.any():
            continue
        scores = buffer[: len(vectors)]  # (n, q)
        for start in range(0, len(vectors), PRODUCT):
            part = torch.from_numpy(vectors[start : start + PRODUCT])
            torch.mm(part, columns, out=scores[start : start + PRODUCT])
        if allowed_here is not None and not allowed_here.all():
            scores[torch.from_numpy(~allowed_here)] = -torch.inf
        candidates.add(scores, first)
        if candidates.count > MAX_CANDIDATES + 2 * k * len(queries):
            candidates.replace([rows for rows, _ in _rank_all(candidates, queries, vectors_of)])
    return _rank_all(candidates, queries, vectors_of)


def _rank_all(candidates: "Candidates", queries: np.ndarray, vectors_of: VectorsOf) -> list[Ranking]:
    pairs = zip(candidates.rows_by_query(), queries)
    return [rank(rows, query, candidates.k, vectors_of) for rows, query in pairs]


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
        # k scores of real rows per query: the last is a lower bound of the k-th best score
        self.best = torch.full((self.num_queries, self.k), -torch.inf)

    def add(self, scores: torch.Tensor, first: int) -> None:
        """Take in the scores (rows, queries) of the rows from `first` on; excluded rows have -inf.

        Scores are compared in groups: most groups are ruled out by their highest score alone.
        """
        size = scores.shape[0]
        group = GROUP if size % GROUP == 0 and size // GROUP >= self.k else 1
        grouped = scores.view(size // group, group, self.num_queries)
        peaks = grouped.amax(1).T.contiguous()  # (queries, groups)
        query, number = (peaks >= self._bound()[:, None]).nonzero(as_tuple=True)
        if len(query) == 0:
            return
        best_here = peaks.topk(min(self.k, peaks.shape[1]), sorted=False).values
        self.best = torch.cat([self.best, best_here], 1).topk(self.k).values
        bound = self._bound()  # higher now
        kept = peaks[query, number] >= bound[query]
        query, number = query[kept], number[kept]
        members = grouped[number, :, query]  # (kept groups, group)
        hit, member = (members >= bound[query, None]).nonzero(as_tuple=True)
        rows = first + number[hit] * group + member
        self.blocks.append((query[hit].numpy(), rows.numpy(), members[hit, member].numpy()))
        self.count += len(hit)

    def _bound(self) -> torch.Tensor:
        """Return the fp32 score (queries) below which a row can't be among the k best."""
        return (self.best[:, -1] - self.margin).clamp_min(LOWEST)

    def rows_by_query(self) -> list[np.ndarray]:
        """Return the candidate rows of each query, ascending."""
        if not self.blocks:
            return [np.zeros(0, np.int64)] * self.num_queries
        query, row, score = (np.concatenate(parts) for parts in zip(*self.blocks))
        possible = score >= self._bound().numpy()[query]
        query, row = query[possible], row[possible]
        order = np.lexsort((row, query))
        return np.split(row[order], np.searchsorted(query[order], np.arange(1, self.num_queries)))

    def replace(self, rows: list[np.ndarray]) -> None:
        """Keep only these rows of each query: the best of all that were added so far."""
        sizes = [len(rows_of_query) for rows_of_query in rows]
        self.count = sum(sizes)
        query = np.repeat(np.arange(len(rows)), sizes)
        score = np.full(self.count, np.inf, np.float32)  # above every bound: they stay
        self.blocks = [(query, np.concatenate(rows), score)]
