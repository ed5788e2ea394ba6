"""Pairs, groups and clusters against brute force over the full matrix in float64, with planted
ties and every size of block.
"""

import dataclasses
import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from test_kernel import unit

from common.search import mining
from common.search.builder import Builder, fill, settings_of
from common.search.display import level
from common.search.index import open_snapshot, open_store
from common.search.segments import CHUNK, HASH, ID, NUM_CHUNKS, START, TEXT, VECTOR, vector_array
from common.search.selection import Selection, one_process
from conftest import heavy
from index_rows import collection, numbered


@pytest.fixture(scope="module", params=[0, heavy(1), heavy(2)])
def made(request, tmp_path_factory):
    """The folder of an index with rows around a few centres, some of them equal, some deleted; the
    numbers of the others, and their matrix of exactly rounded cosines.
    """
    folder, generator = tmp_path_factory.mktemp("made") / "index", np.random.default_rng(request.param)
    centres = generator.standard_normal((5, 24))
    vectors = unit(centres[generator.integers(0, 5, 160)] + 0.5 * generator.standard_normal((160, 24)))
    vectors[[30, 77, 150]] = vectors[3]
    vectors[[31, 78]] = vectors[4]

    class Given:
        name, width, max_length, num_encoded, num_cut, runtime = "given", 24, 16, 0, 0, None
        prompts: dict[str, str] = {}

        def identity(self):
            return {
                "model": "given",
                "fingerprint": "given",
                "width": 24,
                "pooling": "none",
                "max_length": 16,
                "document_prompt": None,
            }

        def encode_normalized(self, texts, *, role=None):
            return np.array([vectors[int(text.split()[1])] for text in texts])

    settings = settings_of(Given(), id_column="key", chunk_overlap=None)
    with open_store(folder, settings=settings) as opened:
        fill(Builder(opened, Given()), collection(numbered(0, 160)), block=37)
        opened.commit(None, [5, 6, 100])
        rows = np.flatnonzero(opened.snapshot.is_live())
    kept = vectors[rows].astype(np.float64)
    exact = np.array([[math.fsum((left * right).tolist()) for right in kept] for left in kept])
    return folder, rows, exact


@pytest.fixture
def live(made):
    """The rows of that index, opened anew, and the matrix of their cosines."""
    folder, rows, exact = made
    return Selection(open_snapshot(folder), rows), exact


@pytest.mark.parametrize("block", [7, 64, 1000])
@pytest.mark.parametrize("k", [1, 10, 500])
def test_the_best_pairs(live, block, k):
    rows, exact = live
    pairs = [(left, right) for left in range(len(rows)) for right in range(left + 1, len(rows))]
    expected = sorted(pairs, key=lambda pair: (-exact[pair], pair))[:k]
    assert [pair[:2] for pair in mining.best_pairs(rows, k, block=block)] == expected


@pytest.mark.parametrize("block", [7, 64, 1000])
@pytest.mark.parametrize("threshold", [0.6, 0.9, 1.0 - 1e-7])
def test_pairs_above_a_threshold_and_their_groups(live, block, threshold):
    rows, exact = live
    expected = {
        (left, right)
        for left in range(len(rows))
        for right in range(left + 1, len(rows))
        if exact[left, right] >= threshold
    }
    groups, found = mining.Groups(len(rows)), []
    for left, right, scores in mining.similar_pairs(rows, threshold, block=block):
        found += zip(left.tolist(), right.tolist())
        assert np.allclose(scores, exact[left, right], atol=1e-12)
        groups.join(left, right)
    assert len(found) == len(set(found)) and set(found) == expected  # each pair once
    assert [group.tolist() for group in groups.lists()] == components(len(rows), expected)


def components(count: int, pairs: set) -> list[list[int]]:
    neighbours = {place: set() for place in range(count)}
    for left, right in pairs:
        neighbours[left].add(right)
        neighbours[right].add(left)
    found, seen = [], set()
    for place in range(count):
        members, stack = set(), [place] if place not in seen else []
        while stack:
            members.add(now := stack.pop())
            stack += neighbours[now] - members
        seen |= members
        found += [sorted(members)] if len(members) > 1 else []
    return sorted(found, key=lambda group: (-len(group), group[0]))


def test_no_more_than_a_block_of_vectors_is_read_at_once(live, monkeypatch):
    rows, _ = live
    sizes, read = [], rows.snapshot.vectors_of
    monkeypatch.setattr(mining, "RESCORED", 16)
    rows.snapshot.__dict__["vectors_of"] = lambda wanted: (sizes.append(len(wanted)), read(wanted))[1]
    mining.best_pairs(rows, 50, block=16)
    assert sum(len(left) for left, _, _ in mining.similar_pairs(rows, 0.5, block=16)) > 500
    mining.num_neighbours(rows, 0.5, block=16)
    assert max(sizes) == 16 and sum(sizes) > 10 * len(rows)


@pytest.mark.parametrize(
    "similarity, word",
    [
        (0.7, "moderate"),
        (np.nextafter(0.7, 1), "high"),
        (0.4, "moderate"),
        (np.nextafter(0.4, 0), "low"),
        (-1, "low"),
    ],
)
def test_the_words_for_similarity_change_at_0_7_and_0_4(similarity, word):
    assert level(similarity) == word


@pytest.mark.parametrize("step", [0, 1])
def test_a_border_case_is_decided_in_float64(live, step):
    rows, exact = live
    cosines = exact[np.triu_indices(len(exact), 1)]
    # the cosine of a pair, and more than it by less than fp32 can tell
    threshold = float(np.sort(cosines)[-200]) + step * 1e-9
    count = sum(len(left) for left, _, _ in mining.similar_pairs(rows, threshold, block=50))
    assert count == (cosines >= threshold).sum()
    near = exact >= threshold
    assert (
        mining.num_neighbours(rows, threshold, block=50).tolist() == (near.sum(1) - near.diagonal()).tolist()
    )


@pytest.mark.parametrize("block", [7, 1000])
@pytest.mark.parametrize("threshold, min_size", [(0.6, 2), (0.8, 2), (0.7, 5)])
def test_communities(live, block, threshold, min_size):
    rows, exact = live
    near = exact >= threshold
    np.fill_diagonal(near, True)
    labels, free = np.full(len(rows), -1), set(range(len(rows)))
    found = []
    for centre in sorted(range(len(rows)), key=lambda place: (-near[place].sum(), place)):
        if centre in free:
            members = [place for place in range(len(rows)) if near[centre, place] and place in free]
            free -= set(members)
            found += [members] if len(members) >= min_size else []
    for number, members in enumerate(sorted(found, key=lambda group: (-len(group), group[0]))):
        labels[members] = number
    assert mining.communities(rows, threshold, min_size=min_size, block=block).tolist() == labels.tolist()


@pytest.mark.parametrize("block", [7, 1000])
def test_k_means_is_scikit_learns_from_the_same_start(live, block):
    rows, _ = live
    vectors = rows.vectors(slice(None)).astype(np.float64)
    start = vectors[[0, 9, 40, 80, 120]]
    oracle = KMeans(5, init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(vectors)
    labels, inertia = mining.lloyd(rows, start, block=block)
    assert labels.tolist() == oracle.labels_.tolist() and inertia == pytest.approx(oracle.inertia_, rel=1e-6)


def test_k_means_is_repeatable_and_its_first_cluster_the_largest(live):
    rows, _ = live
    labels = mining.k_means(rows, 4, block=50, seed=0)
    assert (labels == mining.k_means(rows, 4, block=50, seed=0)).all()
    assert (
        np.bincount(labels).tolist() == sorted(np.bincount(labels), reverse=True)
        and len(np.bincount(labels)) == 4
    )


def test_as_many_clusters_as_different_rows(live):
    rows = Selection(live[0].snapshot, live[0].rows[:4])
    assert sorted(mining.k_means(rows, 4, block=2, seed=0).tolist()) == [0, 1, 2, 3]


@pytest.fixture
def chunks_of_documents(tmp_path):
    """Documents of one to four chunks, whose vectors are those of their numbers' group; the
    exact cosines, and the document of each.
    """
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 5, 40)
    documents = np.repeat(np.arange(40), sizes)
    vectors = unit(
        generator.standard_normal((8, 24))[documents % 8]
        + 0.4 * generator.standard_normal((len(documents), 24))
    )
    own = np.concatenate([np.arange(size) for size in sizes])
    table = pa.table(
        {
            ID: [f"d{document}" for document in documents],
            HASH: pa.array([b"0" * 32] * len(own), pa.binary(32)),
            CHUNK: pa.array(own, pa.int32()),
            NUM_CHUNKS: pa.array(sizes[documents], pa.int32()),
            START: pa.array(own, pa.int32()),
            TEXT: pa.array([f"text {row}" for row in range(len(own))], pa.large_string()),
            VECTOR: vector_array(vectors),
        }
    )
    settings = {
        "model": "given",
        "fingerprint": "given",
        "width": 24,
        "pooling": "none",
        "max_length": 16,
        "document_prompt": None,
        "query_prompt": None,
        "store": None,
        "id_column": None,
        "chunk_overlap": 1,
    }
    with open_store(tmp_path / "index", settings=settings) as opened:
        opened.commit(table)
        opened.commit(None, np.flatnonzero(documents == 3))
        snapshot = opened.snapshot
    rows = np.flatnonzero(snapshot.is_live())
    kept = vectors[rows].astype(np.float64)
    return Selection(snapshot, rows), kept @ kept.T, documents[rows]


@pytest.mark.parametrize("block", [3, 17, 1000])
def test_a_document_is_no_duplicate_of_itself(chunks_of_documents, block):
    rows, exact, documents = chunks_of_documents
    other = {
        (left, right)
        for left in range(len(rows))
        for right in range(left + 1, len(rows))
        if documents[left] != documents[right]
    }
    found = {
        pair
        for left, right, _ in mining.similar_pairs(rows, 0.7, block=block)
        for pair in zip(left.tolist(), right.tolist())
    }
    assert found == {pair for pair in other if exact[pair] >= 0.7} and len(found) > 50
    best = sorted(other, key=lambda pair: -exact[pair])[:20]
    assert [pair[:2] for pair in mining.best_pairs(rows, 20, block=block)] == best
    labels = mining.communities(rows, 0.8, min_size=2, block=block)
    assert (
        all(len(set(documents[labels == label])) >= 2 for label in range(labels.max() + 1))
        and labels.max() > 3
    )


def test_more_clusters_than_rows_that_seed_them(live, monkeypatch):
    monkeypatch.setattr(mining, "SEEDING", 5)
    assert mining.k_means(live[0], 9, block=50, seed=0).max() == 8


def test_typical_words_are_those_of_dense_matrices(live):
    rows, _ = live
    generator = np.random.default_rng(0)
    labels, vocabulary = (
        generator.integers(-1, 4, len(rows)),
        np.array(["film", "story", "rates", "goal", "vote", "screen"]),
    )
    texts = [
        " ".join(generator.choice(vocabulary, 9, p=np.roll([0.4, 0.3, 0.1, 0.1, 0.05, 0.05], label)))
        for label in labels
    ]
    rows.snapshot.__dict__["texts"] = lambda wanted: (
        texts[place] for place in np.searchsorted(rows.rows, wanted)
    )
    totals = np.array(
        [
            [
                sum(text.split().count(word) for text, own in zip(texts, labels) if own == label)
                for word in vocabulary
            ]
            for label in range(4)
        ]
    )
    weights = np.sqrt(totals / totals.sum(1, keepdims=True)) * np.log(1 + totals.sum() / 4 / totals.sum(0))
    expected = [
        [
            vocabulary[place]
            for place in sorted(range(6), key=lambda place: (-row[place], vocabulary[place]))[:3]
        ]
        for row in weights
    ]
    assert mining.typical_words(rows, labels, 3) == expected


def test_the_texts_nearest_to_a_centre(live):
    rows, _ = live
    members = np.arange(0, len(rows), 2)
    vectors = rows.vectors(members).astype(np.float64)
    centre = vectors.mean(0) / np.linalg.norm(vectors.mean(0))
    expected = sorted(range(len(members)), key=lambda place: (-(vectors[place] @ centre).round(14), place))[
        :3
    ]
    assert [place for place, _ in mining.nearest_to_centre(rows, members, count=3)] == members[
        expected
    ].tolist()


@given(st.integers(0, 30), st.integers(1, 12), st.integers(1, 9))
def test_the_shares_of_the_triangle_have_each_pair_once(count, block, world):
    """Also where there are more processes than blocks; no process has two blocks more than another."""
    own = [dataclasses.replace(one_process(), rank=rank, world_size=world) for rank in range(world)]
    shares = [list(runtime.share(mining.triangle_blocks(count, block))) for runtime in own]
    pairs = [
        (left, right)
        for share in shares
        for first, second in share
        for left in range(first, min(first + block, count))
        for right in range(max(second, left + 1), min(second + block, count))
    ]
    assert sorted(pairs) == list(itertools.combinations(range(count), 2))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
