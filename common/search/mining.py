"""Pairs, groups and clusters of similar texts.

Every pair is compared once, on the triangle, block against block: of n rows and a block of b at
most a few matrices of b x b are in memory. Scores are fp32 products first; what is near a threshold
is computed again in float64, so that pairs and groups are those of float64 brute force.

Under torchrun every process runs the same command over the same rows, and computes its share of the
blocks. What they find is gathered on all of them, in the order that one process finds it in.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator

import numpy as np
import torch

from common.reading import evenly_spaced
from common.search.kernel import LOWEST, exact_scores
from common.search.selection import Selection

RESCORED = 4_096  # pairs computed in float64 at once
PENDING = 1_000_000  # pairs after which groups are joined, and candidates thinned out
STARTS = 4  # k-means from this many random starts; the clusters of the lowest inertia are kept
SEEDING = 20_000  # rows that k-means++ chooses its first centres among
ITERATIONS = 300  # of k-means, at most
CANDIDATES = 256  # rows whose neighbours are looked up at once
READ_FOR_WORDS = 20_000  # texts that the words of clusters come from
MAPPED = 2_000  # texts on the map
MOST_CLUSTERS, SILHOUETTE_ROWS = 20, 2_000  # tried, and looked at, to choose their number
NO_CLUSTER = -1  # the label of a text in no cluster

Pair = tuple[int, int, float]  # two positions and their cosine


def triangle_blocks(count: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield (first position of the rows, of the columns) of each block of the triangle of all
    pairs, rows before columns, one row of blocks after the other.
    """
    return itertools.combinations_with_replacement(range(0, count, block), 2)


def triangle(selection: Selection, block: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (first position of the rows, of the columns, fp32 scores (b, b)) for
    this process's share of the blocks.

    The score is -inf where i >= j, and for two chunks of one document: they are similar because
    they overlap.
    """
    documents = None if selection.documents is None else torch.from_numpy(selection.documents)
    own = selection.runtime.share(triangle_blocks(len(selection), block))
    for first, row_of_blocks in itertools.groupby(own, key=operator.itemgetter(0)):
        left = selection.block(first, block)
        for _, second in row_of_blocks:
            right = left if second == first else selection.block(second, block)
            scores = left @ right.T
            if second == first:
                scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
            if documents is not None and documents[second] <= documents[first + len(left) - 1]:
                rows = documents[first : first + len(left), None]
                same = rows == documents[second : second + len(right)]
                scores.masked_fill_(same.to(scores.device), -torch.inf)
            yield first, second, scores


def exact_pairs(selection: Selection, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the float64 cosines of pairs of positions."""
    scores = [np.zeros(0)]
    for at in range(0, len(left), RESCORED):
        part = slice(at, at + RESCORED)
        scores.append(exact_scores(selection.vectors(left[part]), selection.vectors(right[part])))
    return np.concatenate(scores)


def best_pairs(selection: Selection, k: int, *, block: int) -> list[Pair]:
    """Return the k most similar pairs as (position, higher position, cosine), best first; equal
    ones are ordered by position.
    """
    pairs = selection.runtime.gather_rows(lambda: _best_of_share(selection, k, block=block))
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -pairs[:, 2]))[:k]
    return [(int(left), int(right), score) for left, right, score in pairs[order].tolist()]


def _best_of_share(selection: Selection, k: int, *, block: int) -> np.ndarray:
    """Return the k best pairs of this process's share of the triangle, as rows of two positions and
    their cosine.
    """
    best, left, right = np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)  # exact scores
    bound = -np.inf
    for first, second, scores in triangle(selection, block):
        if float(scores.max()) < bound:
            continue
        here = scores.flatten().topk(min(k, scores.numel())).values
        bound_here = float(here[-1]) - 2 * selection.margin if len(here) == k else -np.inf
        pairs = (scores >= max(bound, bound_here, LOWEST)).nonzero().cpu().numpy()
        new_left, new_right = pairs[:, 0] + first, pairs[:, 1] + second
        best = np.concatenate([best, exact_pairs(selection, new_left, new_right)])
        left, right = np.concatenate([left, new_left]), np.concatenate([right, new_right])
        order = np.lexsort((right, left, -best))[:k]
        best, left, right = best[order], left[order], right[order]
        bound = best[-1] - selection.margin if len(best) == k else -np.inf
    return np.column_stack([left, right, best])


def similar_pairs(
    selection: Selection, threshold: float, *, block: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (positions, higher positions, cosines) of all pairs with a cosine of at least
    `threshold`, each pair once, a part at a time, in the order of the blocks.
    """
    own = triangle(selection, block)

    def next_block() -> np.ndarray:
        found = [np.zeros((0, 3))]
        for first, second, scores in itertools.islice(own, 1):
            pairs = (scores >= threshold - selection.margin).nonzero().cpu().numpy()
            for at in range(0, len(pairs), PENDING):
                left, right = (pairs[at : at + PENDING] + (first, second)).T
                exact = exact_pairs(selection, left, right)
                found.append(np.column_stack([left, right, exact])[exact >= threshold])
        return np.concatenate(found)

    starts = -(-len(selection) // block)
    rounds = -(-(starts * (starts + 1) // 2) // selection.runtime.world_size)
    for _ in range(rounds):  # one block of every process at a time, which bounds memory
        pairs = selection.runtime.gather_rows(next_block)
        if len(pairs):
            yield pairs[:, 0].astype(np.int64), pairs[:, 1].astype(np.int64), pairs[:, 2]


class Groups:
    """Positions joined by pairs: the connected components, in memory of the number of positions,
    not of pairs.
    """

    def __init__(self, size: int) -> None:
        self.label = np.arange(size)
        self.num_pairs = 0
        self.left: list[np.ndarray] = []
        self.right: list[np.ndarray] = []

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Take in pairs of positions."""
        self.num_pairs += len(left)
        self.left.append(left)
        self.right.append(right)
        if sum(map(len, self.left)) >= PENDING:
            self._settle()

    def _settle(self) -> None:
        import scipy.sparse
        from scipy.sparse.csgraph import connected_components

        size = len(self.label)
        left = np.concatenate([np.arange(size), *self.left])
        right = np.concatenate([self.label, *self.right])
        edges = (np.ones(len(left), bool), (left, right))
        graph = scipy.sparse.coo_array(edges, shape=(size, size))
        _, components = connected_components(graph, directed=False)
        _, first = np.unique(components, return_index=True)
        self.label = first[components]  # the lowest position of a group names it
        self.left, self.right = [], []

    def lists(self) -> list[np.ndarray]:
        """Return the groups of at least two positions, each ascending, the largest group first,
        equal ones by their lowest position.
        """
        self._settle()
        order = np.argsort(self.label, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(self.label[order])) + 1)
        groups = [part for part in parts if len(part) > 1]
        return sorted(groups, key=lambda group: (-len(group), group[0]))


def one_of_each(selection: Selection, groups: Groups, keep: str) -> np.ndarray:
    """Return the positions, ascending, without all but one of each group: the first, the last, or
    the one with the longest text, the first of equals.
    """
    kept = np.ones(len(selection), bool)
    for members in groups.lists():
        chosen = members[-1 if keep == "last" else 0]
        if keep == "longest":
            texts = selection.snapshot.texts(selection.rows[members])
            chosen = members[int(np.argmax([len(text) for text in texts]))]
        kept[members] = False
        kept[chosen] = True
    return np.flatnonzero(kept)


def k_means(selection: Selection, num_clusters: int, *, block: int, seed: int) -> np.ndarray:
    """Return a cluster number (n) for each row by Lloyd's algorithm from several k-means++ starts;
    cluster 0 is the largest.
    """
    from sklearn.cluster import kmeans_plusplus

    sample = selection.vectors(evenly_spaced(len(selection), max(SEEDING, num_clusters)))
    runs = []
    for start in range(STARTS):
        centres, _ = kmeans_plusplus(sample, num_clusters, random_state=seed + start)
        runs.append(lloyd(selection, centres, block=block))
    labels, _ = min(runs, key=lambda run: run[1])  # the first of equals
    return by_size(labels)


def choose_clusters(selection: Selection, *, block: int, seed: int) -> tuple[np.ndarray, dict[int, float]]:
    """Return the clusters (n) of k-means for the k, from 2 to 20, with the highest mean silhouette
    (Rousseeuw 1987), by the cosine, of at most 2,000 rows; and the silhouette of each k.
    """
    from sklearn.metrics import silhouette_score

    sample = evenly_spaced(len(selection), SILHOUETTE_ROWS)
    vectors = selection.vectors(sample)
    best, silhouettes = np.zeros(len(selection), np.int64), {}
    for count in range(2, min(MOST_CLUSTERS, len(selection) - 1) + 1):
        labels = k_means(selection, count, block=block, seed=seed)
        if not 2 <= len(np.unique(labels[sample])) < len(sample):
            continue  # too few different embeddings, for which no silhouette is defined
        value = float(silhouette_score(vectors, labels[sample], metric="cosine"))
        if value > max(silhouettes.values(), default=-np.inf):
            best = labels
        silhouettes[count] = value
    return best, silhouettes


def density_clusters(selection: Selection, *, min_size: int) -> np.ndarray:
    """Return a cluster number (n) for each row by HDBSCAN (Campello, Moulavi, Sander 2013), -1
    where it is in none; cluster 0 is the largest. All vectors are held in memory.
    """
    from sklearn.cluster import HDBSCAN  # pyrefly: ignore [missing-module-attribute]  (found at run time)

    # on unit vectors the distance orders pairs as the cosine does
    vectors = selection.vectors(slice(None)).astype(np.float64)
    return by_size(HDBSCAN(min_cluster_size=min_size, copy=False).fit_predict(vectors))


def assigned(selection: Selection, labels: np.ndarray, *, block: int) -> np.ndarray:
    """Return labels (n) in which a row in no cluster has the one whose mean is nearest by the
    cosine; of equal ones the first.
    """
    count = int(labels.max(initial=NO_CLUSTER)) + 1
    if not count:
        return labels
    means = torch.zeros(count, selection.snapshot.width, dtype=torch.float64)
    for start, vectors in selection.blocks(block):
        own = torch.from_numpy(labels[start : start + len(vectors)])
        means.index_add_(0, own[own != NO_CLUSTER], vectors[own != NO_CLUSTER].double())
    means /= means.norm(dim=1, keepdim=True).clamp_min(1e-12)
    found = labels.copy()
    for start, vectors in selection.blocks(block):
        nearest = (vectors.double() @ means.T).argmax(1).numpy()
        here = found[start : start + len(vectors)]
        here[:] = np.where(here == NO_CLUSTER, nearest, here)
    return found


def lloyd(selection: Selection, centres: np.ndarray, *, block: int) -> tuple[np.ndarray, float]:
    """Return (labels (n), sum of squared distances) of k-means from given centres (k, width), run
    until no row changes its cluster.

    Written out because scikit-learn's KMeans, which gives the same clusters from the same start,
    holds all vectors in memory; this one reads the mapped index block by block.
    """
    labels, inertia = np.full(len(selection), NO_CLUSTER), 0.0
    means = torch.from_numpy(np.asarray(centres, np.float64))
    for _ in range(ITERATIONS):
        before, inertia = labels.copy(), 0.0
        sums, counts = torch.zeros_like(means), torch.zeros(len(means), dtype=torch.float64)
        for start, vectors in selection.blocks(block):
            vectors = vectors.double()
            # without |x|^2, which is the same for all centres
            distances = means.square().sum(1) - 2 * vectors @ means.T  # (b, k)
            nearest, chosen = distances.min(1)
            inertia += float((nearest + vectors.square().sum(1)).sum())
            labels[start : start + len(vectors)] = chosen.numpy()
            sums.index_add_(0, chosen, vectors)
            counts += torch.bincount(chosen, minlength=len(means))
        if (labels == before).all():
            break
        # an empty cluster keeps its centre
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], means)
    return labels, inertia


def communities(selection: Selection, threshold: float, *, min_size: int, block: int) -> np.ndarray:
    """Return a cluster number (n) for each row, -1 where it is in none; cluster 0 is the largest.

    Rows are visited by their number of neighbours (cosine of at least `threshold`), most first,
    equal ones by row: a row that is in no cluster yet becomes the centre of a new one, with its
    neighbours that are in none. Clusters of fewer than `min_size` rows, or documents, are dropped.
    """
    counts = num_neighbours(selection, threshold, block=block)
    order = np.lexsort((np.arange(len(selection)), -counts))
    labels, free = np.full(len(selection), NO_CLUSTER), np.ones(len(selection), bool)
    num_clusters, documents = 0, selection.documents
    for start in range(0, len(order), CANDIDATES):
        centres = order[start : start + CANDIDATES]
        centres = centres[free[centres]]
        for centre, members in zip(centres, neighbours(selection, centres, threshold, block=block)):
            if not free[centre]:
                continue
            members = members[free[members]]
            free[members] = False
            counted = members if documents is None else np.unique(documents[members])
            if len(counted) >= min_size:
                labels[members] = num_clusters
                num_clusters += 1
    return by_size(labels)


def num_neighbours(selection: Selection, threshold: float, *, block: int) -> np.ndarray:
    """Return how many rows (n), of other documents where rows are chunks, have a cosine of at least
    `threshold` with each row.
    """
    counts = np.zeros(len(selection), np.int64)
    with selection.runtime.raised_on_all():
        for first, second, scores in triangle(selection, block):
            near = scores >= threshold - selection.margin
            unsure = (near & (scores < threshold + selection.margin)).nonzero().cpu().numpy()
            exact = exact_pairs(selection, unsure[:, 0] + first, unsure[:, 1] + second)
            near[tuple(unsure[exact < threshold].T)] = False
            counts[first : first + len(near)] += near.sum(1).cpu().numpy()
            counts[second : second + near.shape[1]] += near.sum(0).cpu().numpy()
    return selection.runtime.all_reduce_sum(torch.from_numpy(counts)).numpy()


def neighbours(
    selection: Selection, centres: np.ndarray, threshold: float, *, block: int
) -> list[np.ndarray]:
    """Return for each centre the positions, itself included, with a cosine of at least `threshold`
    with it.
    """
    if not len(centres):
        return []

    def near_in_share() -> np.ndarray:
        vectors_of_centres, found = torch.from_numpy(selection.vectors(centres)), [np.zeros((0, 2))]
        for start in selection.runtime.share(range(0, len(selection), block)):
            vectors = selection.block(start, block)
            scores = vectors_of_centres.to(vectors.device) @ vectors.T  # (centres, b)
            pairs = (scores >= threshold - selection.margin).nonzero().cpu().numpy()
            kept = exact_pairs(selection, centres[pairs[:, 0]], pairs[:, 1] + start) >= threshold
            near = np.column_stack([pairs[kept, 0], pairs[kept, 1] + start])
            found.append(near.astype(np.float64))
        return np.concatenate(found)

    # number of a centre, position
    near = selection.runtime.gather_rows(near_in_share).astype(np.int64)
    near = near[np.argsort(near[:, 0], kind="stable")]
    parts = np.split(near[:, 1], np.searchsorted(near[:, 0], np.arange(1, len(centres))))
    return [np.union1d(centre, members) for centre, members in zip(centres, parts)]


def by_size(labels: np.ndarray) -> np.ndarray:
    """Return labels renumbered: 0 is the largest, equal ones by their lowest row; -1 stays."""
    used = labels[labels != NO_CLUSTER]
    names, first, counts = np.unique(used, return_index=True, return_counts=True)
    new = {int(name): number for number, name in enumerate(names[np.lexsort((first, -counts))])}
    return np.array([new.get(int(label), NO_CLUSTER) for label in labels], dtype=np.int64)


def nearest_to_centre(selection: Selection, members: np.ndarray, *, count: int) -> list[tuple[int, float]]:
    """Return the `count` members (positions) with the highest cosine with their mean, best first,
    as (position, cosine).
    """
    parts = [members[at : at + RESCORED] for at in range(0, len(members), RESCORED)]
    centre = np.zeros(selection.snapshot.width)
    for part in parts:
        centre += selection.vectors(part).sum(0, dtype=np.float64)
    centre /= max(float(np.linalg.norm(centre)), 1e-12)
    scores = np.concatenate([exact_scores(selection.vectors(part), centre) for part in parts])
    order = np.lexsort((members, -scores))[:count]
    return [(int(members[number]), float(scores[number])) for number in order]


def typical_words(
    selection: Selection, labels: np.ndarray, count: int, stop: frozenset[str] | None = None
) -> list[list[str]]:
    """Return for each cluster the words that are frequent in it and not elsewhere, by class-based
    TF-IDF (Grootendorst 2022, with BERTopic's reduction of frequent words), without stop words, by
    default those of English.

    They come from at most 20,000 texts, evenly spaced.
    """
    import scipy.sparse
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    from common.search.words import marking_words

    sample = evenly_spaced(len(selection), READ_FOR_WORDS)
    sample = sample[labels[sample] != NO_CLUSTER]
    num_clusters = int(labels.max(initial=-1)) + 1
    stop = ENGLISH_STOP_WORDS if stop is None else stop
    counter = CountVectorizer(analyzer=lambda text: marking_words(text, stop))
    try:
        texts = selection.snapshot.texts(selection.rows[sample])
        counts = counter.fit_transform(texts)  # (texts, words)
    except ValueError:  # no words at all, as in texts of numbers
        return [[] for _ in range(num_clusters)]
    entries = (np.ones(len(sample)), (labels[sample], np.arange(len(sample))))
    members = scipy.sparse.csr_array(entries, shape=(num_clusters, len(sample)))
    totals, words = scipy.sparse.csr_array(members @ counts), counter.get_feature_names_out()
    rarity = np.log1p(totals.sum() / num_clusters / totals.sum(0))
    typical = []
    for cluster in range(num_clusters):
        part = slice(totals.indptr[cluster], totals.indptr[cluster + 1])
        own, times = words[totals.indices[part]], totals.data[part]
        # the root: without it "said" would be typical of every cluster of news
        weights = np.sqrt(times / max(times.sum(), 1)) * rarity[totals.indices[part]]
        typical.append([str(own[number]) for number in np.lexsort((own, -weights))[:count]])
    return typical


def map_points(selection: Selection, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (positions (m), points (m, 2)) of at most 2,000 rows, evenly spaced, laid out by
    t-SNE, or by PCA where they are few.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    positions = evenly_spaced(len(selection), MAPPED)
    vectors = selection.vectors(positions)
    if len(positions) < 10:
        points = PCA(n_components=min(2, len(positions)), random_state=seed).fit_transform(vectors)
        return positions, np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    layout = TSNE(init="pca", perplexity=min(30, (len(positions) - 1) / 3), random_state=seed)
    return positions, layout.fit_transform(vectors)
