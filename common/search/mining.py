"""Pairs and groups of similar texts: every pair is looked at once, on the triangle, block against
block.

Of n rows and a block of b at most a few matrices of b x b are in memory. Scores are fp32 products
first; what is near a border is computed again in float64, so that pairs and groups are those of
float64 brute force.
"""

import functools
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.csgraph import connected_components

from common.search.index import PASSAGE, Snapshot
from common.search.kernel import exact_scores, rounding_error

RESCORED = 4_096  # pairs computed in float64 at once
PENDING = 1_000_000  # pairs after which groups are joined, and candidates thinned out


@dataclass(frozen=True)
class Live:
    """The rows that count, numbered from 0: `rows` (n) are their numbers in the index,
    ascending.
    """

    snapshot: Snapshot
    rows: np.ndarray

    @functools.cached_property
    def documents(self) -> np.ndarray | None:
        """The first row (n) of the document that each row is a passage of, ascending; None in an
        index of whole texts.
        """
        if self.snapshot.settings["chunk_overlap"] is None:
            return None
        return (
            self.rows
            - np.concatenate([segment.table[PASSAGE].to_numpy() for segment in self.snapshot.segments])[
                self.rows
            ]
        )

    @property
    def unit(self) -> str:
        """What a row is, for a person."""
        return "texts" if self.documents is None else "passages"

    def __len__(self) -> int:
        return len(self.rows)

    def vectors(self, places) -> np.ndarray:
        """Return the vectors (places, width) of some of the rows: an array or a slice of
        places.
        """
        return self.snapshot.vectors_of(self.rows[places])

    def blocks(self, size: int):
        """Yield (first place, vectors (at most `size`, width))."""
        for start in range(0, len(self), size):
            yield start, torch.from_numpy(self.vectors(slice(start, start + size)))

    @property
    def margin(self) -> float:
        """What a fp32 score may differ from the true one."""
        return rounding_error(self.snapshot.width)


def triangle(live: Live, block: int):
    """Yield (first place of the rows, of the columns, fp32 scores) for all pairs of blocks, rows
    before columns.

    The score is -inf where i >= j, and of two passages of one document: they are alike because
    they overlap.
    """
    documents = None if live.documents is None else torch.from_numpy(live.documents)
    for first, left in live.blocks(block):
        for second in range(first, len(live), block):
            right = left if second == first else torch.from_numpy(live.vectors(slice(second, second + block)))
            scores = left @ right.T  # (b, b)
            if second == first:
                scores.masked_fill_(torch.ones(scores.shape, dtype=torch.bool).tril(), -torch.inf)
            if documents is not None and documents[second] <= documents[first + len(left) - 1]:
                scores.masked_fill_(
                    documents[first : first + len(left), None] == documents[second : second + len(right)],
                    -torch.inf,
                )
            yield first, second, scores


def exact_pairs(live: Live, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the float64 cosines of pairs of places."""
    parts = [
        exact_scores(live.vectors(left[at : at + RESCORED]), live.vectors(right[at : at + RESCORED]))
        for at in range(0, len(left), RESCORED)
    ]
    return np.concatenate([np.zeros(0), *parts])


def best_pairs(live: Live, k: int, *, block: int) -> list[tuple[int, int, float]]:
    """Return the k most similar pairs as (place, higher place, cosine), best first; equal ones by
    place.
    """
    # what is kept has exact scores
    best, left, right = np.full(0, -np.inf), np.zeros(0, np.int64), np.zeros(0, np.int64)
    floor = -np.inf
    for first, second, scores in triangle(live, block):
        if float(scores.max()) < floor:
            continue
        here = scores.flatten().topk(min(k, scores.numel())).values
        lowest = max(
            floor,
            float(here[-1]) - 2 * live.margin if len(here) == k else -np.inf,
            torch.finfo(torch.float32).min,
        )
        hit = (scores >= lowest).nonzero().numpy()
        new_left, new_right = hit[:, 0] + first, hit[:, 1] + second
        best = np.concatenate([best, exact_pairs(live, new_left, new_right)])
        left, right = np.concatenate([left, new_left]), np.concatenate([right, new_right])
        order = np.lexsort((right, left, -best))[:k]
        best, left, right = best[order], left[order], right[order]
        floor = best[-1] - live.margin if len(best) == k else -np.inf
    return list(zip(left.tolist(), right.tolist(), best.tolist()))


def similar_pairs(live: Live, threshold: float, *, block: int):
    """Yield (places, higher places, cosines) of all pairs with a cosine of at least `threshold`,
    each pair once, a part at a time.
    """
    for first, second, scores in triangle(live, block):
        hit = (scores >= threshold - live.margin).nonzero().numpy()
        for at in range(0, len(hit), PENDING):
            left, right = hit[at : at + PENDING, 0] + first, hit[at : at + PENDING, 1] + second
            exact = exact_pairs(live, left, right)
            kept = exact >= threshold
            if kept.any():
                yield left[kept], right[kept], exact[kept]


class Groups:
    """Places joined by pairs: the connected components, in memory of the number of places, not of
    pairs.
    """

    def __init__(self, size: int):
        self.label = np.arange(size)
        self.num_pairs = 0
        self.left, self.right = [], []

    def join(self, left: np.ndarray, right: np.ndarray):
        """Take in pairs of places."""
        self.num_pairs += len(left)
        self.left.append(left)
        self.right.append(right)
        if sum(map(len, self.left)) >= PENDING:
            self._settle()

    def _settle(self):
        size = len(self.label)
        left, right = np.concatenate([np.arange(size), *self.left]), np.concatenate([self.label, *self.right])
        graph = scipy.sparse.coo_array((np.ones(len(left), bool), (left, right)), shape=(size, size))
        _, components = connected_components(graph, directed=False)
        _, first = np.unique(components, return_index=True)
        self.label = first[components]  # the lowest place of a group names it
        self.left, self.right = [], []

    def lists(self) -> list[np.ndarray]:
        """Return the groups of at least two places, each in ascending order, the largest group
        first, equal ones by their lowest place.
        """
        self._settle()
        order = np.argsort(self.label, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(self.label[order])) + 1)
        return sorted((part for part in parts if len(part) > 1), key=lambda part: (-len(part), part[0]))
