"""Exact nearest neighbours: which rows have the highest cosine with a query, in an order that
never depends on chance.

The vectors stream through in blocks of fp32 matrix products. What comes within the rounding error
of the k-th best is computed again in float64, always in the same way for a row, and ordered by
that score; equal scores go to the lower row. So the answer is that of float64 brute force.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

BLOCK = 16_384  # rows whose scores are looked through at once
# rows a matrix product: of 384 dimensions they stay in a core's cache while 64 queries use them
PRODUCT = 2_048
# candidates, of all queries together, after which they are thinned out: equal vectors without end
# would all
# be held
HELD = 1_000_000
# rows of which only the highest score is looked at first: topk over all scores would take longer
# than the
# product
GROUP = 64
# below every cosine, above the -inf of rows that don't count
LOWEST = torch.finfo(torch.float32).min


def rounding_error(width: int) -> float:
    """Return what an fp32 dot product of two unit vectors can be off by at most (Higham 2002,
    section 3.1), with their own rounding.
    """
    return (width + 8) * 2.0**-24


@dataclass
class Best:
    """The rows that may be among the k best of each query so far: (query, row, fp32 score) in
    pieces, and a floor under the k-th score.
    """

    num_queries: int
    k: int
    margin: float
    pieces: list = field(default_factory=list)

    def __post_init__(self):
        # k real scores a query: the last is a bound from below
        self.scores = torch.full((self.num_queries, self.k), -torch.inf)
        self.held = 0  # entries in the pieces

    def add(self, scores: torch.Tensor, start: int):
        """Take in the scores (rows, queries) of the rows from `start` on; -inf for rows that don't
        count.
        """
        size = scores.shape[0]
        group = GROUP if size % GROUP == 0 and size // GROUP >= self.k else 1
        grouped = scores.view(size // group, group, self.num_queries)
        peaks = grouped.amax(1).T.contiguous()  # (queries, groups)
        query, place = (peaks >= self._floor()[:, None]).nonzero(as_tuple=True)
        if len(query) == 0:
            return
        best_here = peaks.topk(min(self.k, peaks.shape[1]), sorted=False).values
        self.scores = torch.cat([self.scores, best_here], 1).topk(self.k).values
        floor = self._floor()  # higher now
        kept = peaks[query, place] >= floor[query]
        query, place = query[kept], place[kept]
        members = grouped[place, :, query]  # (hits, group)
        hit, member = (members >= floor[query, None]).nonzero(as_tuple=True)
        self.pieces.append(
            (query[hit].numpy(), (start + place[hit] * group + member).numpy(), members[hit, member].numpy())
        )
        self.held += len(hit)

    def _floor(self) -> torch.Tensor:
        """Return the fp32 score (queries) below which a row can't be among the k best."""
        return (self.scores[:, -1] - self.margin).clamp_min(LOWEST)

    def candidates(self) -> list[np.ndarray]:
        """Return for each query the rows that may be among its best, ascending."""
        if not self.pieces:
            return [np.zeros(0, np.int64)] * self.num_queries
        query, row, score = (np.concatenate(parts) for parts in zip(*self.pieces))
        possible = score >= (self.scores[:, -1].numpy() - self.margin)[query]
        query, row = query[possible], row[possible]
        order = np.lexsort((row, query))
        return np.split(row[order], np.searchsorted(query[order], np.arange(1, self.num_queries)))

    def keep(self, rows: list[np.ndarray]):
        """Hold these rows of each query, the best of all so far, and no others."""
        sizes = [len(own) for own in rows]
        self.held = sum(sizes)
        self.pieces = [
            (
                np.repeat(np.arange(len(rows)), sizes),
                np.concatenate(rows),
                np.full(self.held, np.inf, np.float32),
            )
        ]


def search(
    blocks, queries: np.ndarray, k: int, *, vectors_of, alive: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each query the rows of the k highest cosines, best first, and these cosines in
    float64; fewer where there are fewer rows.

    `blocks` yields (first row, unit vectors (n, width) in fp32) of at most BLOCK rows, `queries`
    (q, width) are unit vectors, `vectors_of` gives the vectors of row numbers, `alive` (rows) is
    False for rows that don't count. Equal cosines: the lower row comes first.
    """
    wanted, best = (
        torch.from_numpy(np.ascontiguousarray(queries.T, np.float32)),
        Best(len(queries), k, 2 * rounding_error(queries.shape[1])),
    )
    buffer = torch.empty(BLOCK, len(queries))
    for start, vectors in blocks:
        here = None if alive is None else alive[start : start + len(vectors)]
        if here is not None and not here.any():
            continue
        scores = buffer[: len(vectors)]
        for at in range(0, len(vectors), PRODUCT):
            torch.mm(torch.from_numpy(vectors[at : at + PRODUCT]), wanted, out=scores[at : at + PRODUCT])
        if here is not None and not here.all():
            scores[torch.from_numpy(~here)] = -torch.inf
        best.add(scores, start)
        if best.held > HELD + 2 * k * len(queries):
            best.keep([rows for rows, _ in answers(best, queries, vectors_of)])
    return answers(best, queries, vectors_of)


def answers(best: Best, queries: np.ndarray, vectors_of) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return what search() does, of the rows looked at so far."""
    return [ranked(rows, query, vectors_of, best.k) for rows, query in zip(best.candidates(), queries)]


def ranked(rows: np.ndarray, query: np.ndarray, vectors_of, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k of `rows` with the highest float64 cosine with a query, best first, equal ones
    by row, and the cosines.
    """
    scores = np.concatenate(
        [
            np.zeros(0),
            *(exact_scores(vectors_of(rows[at : at + BLOCK]), query) for at in range(0, len(rows), BLOCK)),
        ]
    )
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]


def exact_scores(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return float64 dot products (n) of vectors (n, width) with one vector, or row by row with
    (n, width).

    A matrix product would add up a row's terms in an order that depends on its place, and so part
    equal rows in the last digit.
    """
    return (vectors.astype(np.float64) * query.astype(np.float64)).sum(-1)
