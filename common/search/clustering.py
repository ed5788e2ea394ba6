"""Clusters of texts: k-means with K of them, or communities above a threshold; the texts at their
centres and the words that mark them.
"""

import numpy as np
import scipy.sparse
import torch
from sklearn.cluster import kmeans_plusplus
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.manifold import TSNE

from common.search.kernel import exact_scores
from common.search.mining import RESCORED, Live, exact_pairs, triangle

STARTS = 4  # k-means from this many random starts; the tightest clusters are kept
SEEDING = 20_000  # rows that k-means++ chooses its first centres among
STEPS = 300
CANDIDATES = 256  # rows whose neighbours are looked up at once
READ_FOR_WORDS = 20_000  # texts that the marking words come from
MAPPED = 2_000  # texts on the map
NONE = -1  # the label of a text in no cluster


def k_means(live: Live, num_clusters: int, *, block: int, seed: int) -> np.ndarray:
    """Return a cluster number (n) for each row by Lloyd's algorithm from k-means++ starts; cluster
    0 is the largest. Memory: a block.

    scikit-learn's KMeans, from the same start, gives the same clusters, but wants all vectors in
    memory.
    """
    sample = live.vectors(
        np.unique(np.linspace(0, len(live) - 1, min(max(SEEDING, num_clusters), len(live))).astype(np.int64))
    )
    runs = []
    for start in range(STARTS):
        centres, _ = kmeans_plusplus(sample, num_clusters, random_state=seed + start)
        runs.append(lloyd(live, centres, block=block))
    labels, _ = min(runs, key=lambda run: run[1])  # the first of equals
    return by_size(labels)


def lloyd(live: Live, centres: np.ndarray, *, block: int) -> tuple[np.ndarray, float]:
    """Return (labels (n), sum of squared distances) of k-means from given centres (k, width), run
    until no row changes its cluster.
    """
    labels, centres = np.full(len(live), NONE), torch.from_numpy(np.asarray(centres, np.float64))
    for _ in range(STEPS):
        before, inertia = labels.copy(), 0.0
        sums, counts = torch.zeros_like(centres), torch.zeros(len(centres), dtype=torch.float64)
        for start, vectors in live.blocks(block):
            vectors = vectors.double()
            # + |x|^2, which is the same for all centres
            distances = centres.square().sum(1) - 2 * vectors @ centres.T
            nearest, chosen = distances.min(1)
            inertia += float((nearest + vectors.square().sum(1)).sum())
            labels[start : start + len(vectors)] = chosen.numpy()
            sums.index_add_(0, chosen, vectors)
            counts += torch.bincount(chosen, minlength=len(centres))
        if (labels == before).all():
            break
        # an empty cluster keeps its centre
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    return labels, inertia


def communities(live: Live, threshold: float, *, min_size: int, block: int) -> np.ndarray:
    """Return a cluster number (n) for each row, -1 where it is in none; cluster 0 is the largest.

    Rows are taken by their number of neighbours (cosine of at least `threshold`), most first,
    equal ones by row: a row that is in no cluster yet is the centre of a new one, with its
    neighbours that are in none. Clusters of fewer than `min_size` rows, or documents, are dropped.
    """
    order = np.lexsort((np.arange(len(live)), -num_neighbours(live, threshold, block=block)))
    labels, free = np.full(len(live), NONE), np.ones(len(live), bool)
    found = 0
    for start in range(0, len(order), CANDIDATES):
        batch = order[start : start + CANDIDATES]
        batch = batch[free[batch]]
        for centre, members in zip(batch, neighbours(live, batch, threshold, block=block)):
            if free[centre]:
                members = members[free[members]]
                free[members] = False
                if len(members if live.documents is None else np.unique(live.documents[members])) >= min_size:
                    labels[members] = found
                    found += 1
    return by_size(labels)


def num_neighbours(live: Live, threshold: float, *, block: int) -> np.ndarray:
    """Return how many rows (n), of other documents where rows are passages, each row has a cosine
    of at least `threshold` with.
    """
    counts = np.zeros(len(live), np.int64)
    for first, second, scores in triangle(live, block):
        near = scores >= threshold - live.margin
        unsure = (near & (scores < threshold + live.margin)).nonzero().numpy()
        near[tuple(unsure[~_reaches(live, unsure[:, 0] + first, unsure[:, 1] + second, threshold)].T)] = False
        counts[first : first + len(near)] += near.sum(1).numpy()
        counts[second : second + near.shape[1]] += near.sum(0).numpy()
    return counts


def neighbours(live: Live, centres: np.ndarray, threshold: float, *, block: int) -> list[np.ndarray]:
    """Return for each centre the rows, itself included, with a cosine of at least `threshold` with
    it.
    """
    wanted, found = torch.from_numpy(live.vectors(centres)), [[] for _ in centres]
    for start, vectors in live.blocks(block) if len(centres) else ():
        scores = wanted @ vectors.T
        near = (scores >= threshold - live.margin).nonzero().numpy()
        near = near[
            _reaches(live, centres[near[:, 0]], near[:, 1] + start, threshold)
            | (centres[near[:, 0]] == near[:, 1] + start)
        ]
        for place in np.unique(near[:, 0]):
            found[place].append(near[near[:, 0] == place, 1] + start)
    return [
        np.union1d(np.concatenate([np.zeros(0, np.int64), *parts]), [centre]).astype(np.int64)
        for parts, centre in zip(found, centres)
    ]


def _reaches(live: Live, left: np.ndarray, right: np.ndarray, threshold: float) -> np.ndarray:
    return exact_pairs(live, left, right) >= threshold


def by_size(labels: np.ndarray) -> np.ndarray:
    """Return labels numbered anew: 0 is the largest cluster, equal ones by their lowest row; -1
    stays.
    """
    names, first, counts = np.unique(labels[labels != NONE], return_index=True, return_counts=True)
    new = {int(name): number for number, name in enumerate(names[np.lexsort((first, -counts))])}
    return np.array([new.get(int(label), NONE) for label in labels], dtype=np.int64)


def nearest_to_centre(live: Live, members: np.ndarray, count: int) -> list[tuple[int, float]]:
    """Return the `count` members (places) with the highest cosine with their mean, best first, as
    (place, cosine).
    """
    centre = sum(
        live.vectors(members[at : at + RESCORED]).sum(0, dtype=np.float64)
        for at in range(0, len(members), RESCORED)
    )
    centre /= max(np.linalg.norm(centre), 1e-12)
    scores = np.concatenate(
        [
            exact_scores(live.vectors(members[at : at + RESCORED]), centre)
            for at in range(0, len(members), RESCORED)
        ]
    )
    return [(int(members[place]), float(scores[place])) for place in np.lexsort((members, -scores))[:count]]


def marking_words(live: Live, labels: np.ndarray, count: int) -> list[list[str]]:
    """Return for each cluster the words that are frequent in it and not elsewhere, by class-based
    TF-IDF (Grootendorst 2022, with BERTopic's reduction of frequent words).

    They come from at most 20,000 texts, evenly spread.
    """
    sample = np.unique(np.linspace(0, len(live) - 1, min(READ_FOR_WORDS, len(live))).astype(np.int64))
    sample = sample[labels[sample] != NONE]
    num_clusters = labels.max(initial=-1) + 1
    counter = CountVectorizer(stop_words="english", token_pattern=r"(?u)\b[^\W\d_]{3,}\b")
    try:
        counts = counter.fit_transform(live.snapshot.texts(live.rows[sample]))
    except ValueError:  # no words at all, as in texts of numbers
        return [[] for _ in range(num_clusters)]
    members = scipy.sparse.csr_array(
        (np.ones(len(sample)), (labels[sample], np.arange(len(sample)))), shape=(num_clusters, len(sample))
    )
    # (clusters, words)
    totals, words = scipy.sparse.csr_array(members @ counts), counter.get_feature_names_out()
    rarity = np.log1p(totals.sum() / num_clusters / totals.sum(0))
    found = []
    for cluster in range(num_clusters):
        own = slice(totals.indptr[cluster], totals.indptr[cluster + 1])
        here, times = words[totals.indices[own]], totals.data[own]
        # the root: else "said" marks every cluster of news
        weights = np.sqrt(times / max(times.sum(), 1)) * rarity[totals.indices[own]]
        found.append([str(here[place]) for place in np.lexsort((here, -weights))[:count]])
    return found


def map_places(live: Live, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (places (m), points (m, 2)) of at most 2,000 rows, evenly spread, laid out by t-SNE,
    by PCA where they are few.
    """
    places = np.unique(np.linspace(0, len(live) - 1, min(MAPPED, len(live))).astype(np.int64))
    vectors = live.vectors(places)
    if len(places) < 10:
        points = PCA(n_components=min(2, len(places)), random_state=seed).fit_transform(vectors)
        return places, np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    return places, TSNE(
        init="pca", perplexity=min(30, (len(places) - 1) / 3), random_state=seed
    ).fit_transform(vectors)
