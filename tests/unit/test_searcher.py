"""Approximate search beside the exact one, fusion by hand, the order of reranking, and the caches
of an index.
"""

import os
import time

import numpy as np
import pytest
import torch
from test_kernel import unit

from common.errors import UserError
from common.runtime import Runtime
from common.search import index
from common.search.builder import Builder, fill, settings_of
from common.search.index import open_store
from common.search.ranker import Ranker, cached, fuse
from common.search.searcher import Searcher
from index_rows import collection, numbered


class Given:
    """Stands for an encoder: the vector of "text 7 0" is the seventh, that of any query is
    `query`.
    """

    name, width, max_length, num_encoded, num_cut = "given", 16, 16, 0, 0
    runtime = Runtime(torch.device("cpu"), "fp32")
    prompts: dict[str, str] = {}

    def __init__(self, vectors, query=None):
        self.vectors, self.query = vectors, query

    def identity(self):
        return {
            "model": "given",
            "fingerprint": "given",
            "width": self.width,
            "pooling": "none",
            "max_length": 16,
            "document_prompt": None,
        }

    def encode_normalized(self, texts, *, role=None):
        return np.array(
            [self.query if role == "query" else self.vectors[int(text.split()[1])] for text in texts],
            np.float32,
        )


def searcher(folder, vectors, query, *, allowed=None, **options):
    encoder = Given(vectors, query)
    with open_store(folder, settings=settings_of(encoder, id_column="key", chunk_overlap=None)) as opened:
        fill(Builder(opened, encoder), collection(numbered(0, len(vectors))), block=700)
        snapshot = opened.snapshot
    allowed = snapshot.is_live() if allowed is None else allowed
    return Searcher(Ranker(snapshot, allowed, say=lambda line: None, **options), encoder)


def rows(found):
    return [hit.row for hit in found[0]]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.11, 0.5, 1])
def test_a_filter_takes_little_from_approximate_search(share, tmp_path):
    generator = np.random.default_rng(0)
    vectors, allowed = unit(generator.standard_normal((4000, 16))), generator.random(4000) < share
    exact = searcher(tmp_path / "index", vectors, vectors[7], allowed=allowed)
    near = exact.ranked(approximate=True)
    assert len(set(rows(exact.search(["x"], 20))) & set(rows(near.search(["x"], 20)))) >= (
        20 if share < 0.1 else 19
    )


def test_equal_vectors_hide_nothing_from_approximate_search(tmp_path):
    """FAISS found 14 of the best 20 among 1,000 of which 700 are equal."""
    generator = np.random.default_rng(0)
    vectors = unit(generator.standard_normal((1000, 16)))
    vectors[generator.permutation(1000)[:700]] = vectors[3]
    for query in (vectors[3], unit(generator.standard_normal((1, 16)))[0]):
        exact = searcher(tmp_path / f"index-{query[0]}", vectors, query)
        near = exact.ranked(approximate=True)
        assert rows(near.search(["x"], 20)) == rows(exact.search(["x"], 20))
        assert rows(near.search(["x"], 1000)) == rows(exact.search(["x"], 1000))


def test_reranking_stops_at_its_depth_and_the_rest_stays_behind(tmp_path):
    class Backwards:
        activation_fn = torch.nn.Sigmoid()

        def predict(self, pairs, **_):
            # a sigmoid makes 1 of all of them
            return torch.tensor([100 + float(text.split()[1]) for _, text in pairs])

    # row 0 is the nearest, row 8 the farthest
    vectors = unit(np.stack([np.r_[1, number / 10, np.zeros(14)] for number in range(9)]))
    plain = searcher(tmp_path / "index", vectors, vectors[0])
    reranked = Searcher(plain.ranker, plain.encoder, reranker=Backwards(), rerank_depth=4)
    assert rows(plain.search(["x"], 7)) == [0, 1, 2, 3, 4, 5, 6]
    assert rows(reranked.search(["x"], 7)) == [3, 2, 1, 0, 4, 5, 6]
    assert rows(reranked.search(["x"], 2)) == [3, 2]


def test_a_query_whose_embedding_has_norm_zero_is_refused(tmp_path):
    with pytest.raises(UserError, match="query 'x'.*norm zero"):
        searcher(tmp_path / "index", unit(np.eye(16)), np.full(16, np.nan)).search(["x"], 3)


def test_fusion_by_hand():
    """Row 5 is second and first, 2 first and third, 9 in one only; 1 and 7 have equal sums."""
    found, scores = fuse([np.array([2, 5, 9, 1, 7]), np.array([5, 8, 2, 7, 1])])
    expected = {
        5: 1 / 62 + 1 / 61,
        2: 1 / 61 + 1 / 63,
        8: 1 / 62,
        9: 1 / 63,
        1: 1 / 64 + 1 / 65,
        7: 1 / 65 + 1 / 64,
    }
    assert found.tolist() == [5, 2, 1, 7, 8, 9]
    assert scores.tolist() == pytest.approx([expected[row] for row in found])


def test_caches_of_older_states_and_of_killed_processes_go(tmp_path):
    vectors = unit(np.random.default_rng(0).standard_normal((40, 16)))
    near = searcher(tmp_path / "index", vectors, vectors[0], approximate=True)
    near.search(["x"], 3)
    killed, working = tmp_path / "index" / "cache-faiss.killed", tmp_path / "index" / "cache-faiss.working"
    killed.mkdir()
    working.mkdir()
    os.utime(killed, (time.time() - 2 * index.ABANDONED,) * 2)
    assert (tmp_path / "index" / "cache-faiss").is_dir()
    with open_store(tmp_path / "index") as opened:
        assert (tmp_path / "index" / "cache-faiss").is_dir() and not killed.exists() and working.exists()
        opened.commit(None, [3])  # its vector must not outlive it
    assert not (tmp_path / "index" / "cache-faiss").exists() and working.exists()


def test_a_build_that_fails_leaves_nothing_and_one_that_is_overtaken_counts(tmp_path):
    snapshot = searcher(tmp_path / "index", unit(np.eye(16)), None).snapshot
    with pytest.raises(ZeroDivisionError):
        cached(snapshot, "x", build=lambda folder: 1 / 0, load=str)
    assert not list((tmp_path / "index").glob("cache-*"))
    with pytest.raises(UserError, match="cache-x: the cache can't be written: Read-only file system"):
        cached(
            snapshot, "x", build=lambda folder: (_ for _ in ()).throw(OSError(30, os.strerror(30))), load=str
        )

    def read(folder):
        return (folder / "content").read_text()

    def build(folder):
        (folder / "content").write_text("mine")
        # another process makes the same in the meantime
        if not (tmp_path / "index" / "cache-x").exists():
            cached(snapshot, "x", build=lambda other: (other / "content").write_text("theirs"), load=read)

    assert cached(snapshot, "x", build=build, load=read) == "mine"
    assert (
        cached(snapshot, "x", build=None, load=read) == "mine"
        and len(list((tmp_path / "index").glob("cache-*"))) == 1
    )
