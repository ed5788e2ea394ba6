"""Exact search against brute force: exactly rounded sums (math.fsum), sorted; equal scores by the
lower row.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.search import kernel


def unit(vectors):
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(vectors, query, k, alive=None):
    scores = [math.fsum((row.astype(np.float64) * query.astype(np.float64)).tolist()) for row in vectors]
    rows = [row for row in range(len(vectors)) if alive is None or alive[row]]
    return sorted(rows, key=lambda row: (-scores[row], row))[:k]


def blocks(vectors, size):
    for start in range(0, len(vectors), size):
        yield start, vectors[start : start + size]


def search(vectors, queries, k, *, size=kernel.BLOCK, alive=None):
    return kernel.nearest_rows(
        blocks(vectors, size), queries, k, vectors_of=lambda rows: vectors[rows], allowed=alive
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", [1024, 1000])  # whole groups of rows, and a rest
def test_ids_and_order_are_those_of_float64_brute_force(seed, size):
    generator = np.random.default_rng(seed)
    vectors = unit(generator.standard_normal((3000, 96)))
    vectors[generator.choice(3000, 60, replace=False)] = vectors[17]  # planted ties: more than k
    vectors[2000:2040] = vectors[100:140]
    queries = np.concatenate(
        [vectors[[17, 110]], unit(vectors[[17, 500]] + 0.1 * generator.standard_normal((2, 96)))]
    ).astype(np.float32)
    for k in (1, 10, 70):
        for query, (rows, scores) in zip(queries, search(vectors, queries, k, size=size)):
            assert rows.tolist() == brute_force(vectors, query, k)
            plain_rows, plain_scores = kernel.rank_plainly(
                np.arange(3000), query, k, lambda rows: vectors[rows]
            )
            assert (rows == plain_rows).all() and (scores == plain_scores).all()
            assert np.all(np.diff(scores) <= 0)


@pytest.mark.parametrize("threads", [1, 3])
def test_one_query_is_shared_out_among_threads(threads, monkeypatch):
    generator = np.random.default_rng(0)
    vectors, alive = unit(generator.standard_normal((3000, 24))), generator.random(3000) < 0.9
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(kernel, "ROWS_OF_THREAD", 100)
    monkeypatch.setattr(kernel, "SCORES", 1000)  # borders of blocks, of scores and of threads differ
    for query in unit(generator.standard_normal((5, 24))):
        [(rows, scores)] = search(vectors, query[None], 10, size=700, alive=alive)
        assert rows.tolist() == brute_force(vectors, query, 10, alive)
        assert (scores == kernel.rank_plainly(rows, query, 10, lambda rows: vectors[rows])[1]).all()


@pytest.mark.parametrize("size", [1024, 1000])
def test_scores_that_fp32_can_not_tell_apart_are_ordered_by_float64(size):
    generator = np.random.default_rng(0)
    base = unit(generator.standard_normal((1, 384)))
    # scores differ by less than fp32's last digit at 1
    vectors = (base + 2e-8 * generator.standard_normal((2048, 384))).astype(np.float32)
    rows, _ = search(vectors, base, 20, size=size)[0]
    assert rows.tolist() == brute_force(vectors, base[0], 20)


def test_rows_that_do_not_count_are_never_found():
    generator = np.random.default_rng(3)
    vectors, alive = unit(generator.standard_normal((500, 16))), generator.random(500) < 0.1
    alive[:128] = False  # whole blocks without a row that counts
    queries = unit(generator.standard_normal((3, 16)))
    for query, (rows, _) in zip(queries, search(vectors, queries, 1000, size=128, alive=alive)):
        assert rows.tolist() == brute_force(vectors, query, 1000, alive)
    assert all(len(rows) == 0 for rows, _ in search(vectors, queries, 3, alive=np.zeros(500, bool)))


@settings(max_examples=60)
@given(st.data())
def test_small_collections_full_of_ties(data):
    width, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    numbers = st.lists(st.integers(-1, 1), min_size=width, max_size=width).filter(any)
    vectors = unit(data.draw(st.lists(numbers, min_size=count, max_size=count)))
    queries = unit(data.draw(st.lists(numbers, min_size=1, max_size=3)))
    k, size = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))
    for query, (rows, _) in zip(queries, search(vectors, queries, k, size=size)):
        assert rows.tolist() == brute_force(vectors, query, k)


def test_equal_vectors_without_end_are_not_all_held(monkeypatch):
    generator = np.random.default_rng(0)
    vectors = np.repeat(unit(generator.standard_normal((2, 16))), 5000, axis=0)[generator.permutation(10_000)]
    queries = unit(vectors[:3] + 0.1 * generator.standard_normal((3, 16)))
    monkeypatch.setattr(kernel, "MAX_CANDIDATES", 500)
    monkeypatch.setattr(kernel, "SCORES", 3 * 256)
    held, add = [], kernel.Candidates.add
    monkeypatch.setattr(
        kernel.Candidates,
        "add",
        lambda self, scores, start: (add(self, scores, start), held.append(self.count)),
    )
    for query, (rows, _) in zip(queries, search(vectors, queries, 10, size=300)):
        assert rows.tolist() == brute_force(vectors, query, 10)
    assert max(held) <= 500 + 60 + 3 * 256  # what is allowed, and the last scores


def test_the_margin_holds_the_error_of_fp32():
    generator = np.random.default_rng(0)
    # no terms cancel: the worst case for rounding
    vectors = unit(np.abs(generator.standard_normal((2000, 1024))))
    exact = vectors.astype(np.float64) @ vectors[0].astype(np.float64)
    single = (torch.from_numpy(vectors) @ torch.from_numpy(vectors[0])).numpy()
    assert np.abs(single - exact).max() < kernel.rounding_error(1024)
