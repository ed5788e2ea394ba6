"""Vectors that are kept in 16, 8 or 1 bits a number: searches are exact over what is kept, files
are as small as they can be, rewriting changes nothing; and `evaluate --store`.
"""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.runtime import Runtime
from common.search.encoder import EncoderConfig, load_encoder
from common.search.manifest import bytes_of_vector
from common.search.segments import STORED_TYPES, VECTOR, pack, unpack
from conftest import make_sentences, rows_by_id, write_lines

LOSSY = ("fp16", "int8", "binary")


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@given(st.integers(0, 999), st.integers(1, 70), st.sampled_from(LOSSY))
def test_what_is_kept_is_the_nearest_and_packing_it_again_changes_nothing(seed, width, store):
    vectors = unit(np.random.default_rng(seed).normal(size=(5, width)))
    kept = pack(vectors, store)
    assert kept.nbytes == 5 * bytes_of_vector(store, width) and kept.dtype == STORED_TYPES[store]
    back = unpack(kept, store, width)
    assert np.array_equal(pack(back, store), kept)
    assert np.abs(np.linalg.norm(back, axis=1) - 1).max() < 1e-3
    for row in range(5):  # one at a time as among others
        assert np.array_equal(unpack(kept[row : row + 1], store, width)[0], back[row])
    if store == "binary":
        assert np.array_equal(back > 0, vectors > 0)
    else:
        largest = np.abs(vectors).max(1, keepdims=True)
        step = 2.0**-10 if store == "fp16" else largest / 127
        assert (np.abs(back - vectors) <= step).all()


@pytest.mark.parametrize("store", LOSSY)
def test_an_index_over_its_life(store, ok, embed, tiny_embedder, sentences, tmp_path):
    ix = tmp_path / "ix"
    ok("index", sentences, "--index", ix, "--id-column", "id", "--block", 7, "--store", store)
    theirs = load_encoder(EncoderConfig(str(tiny_embedder)), Runtime(torch.device("cpu"), "fp32"))
    texts = [text for text, _ in make_sentences(60)]
    kept = unpack(pack(theirs.encode_normalized(texts), store), store, 32).astype(np.float64)
    found = ok("search", "--index", ix, "good film", "--top-k", 60, "--json")["queries"][0]["hits"]
    scores = kept @ theirs.encode_normalized(["good film"])[0].astype(np.float64)
    expected = [f"s{row}" for row in np.lexsort((np.arange(60), -scores))]
    assert [hit["id"] for hit in found] == expected
    assert np.abs(np.array([hit["score"] for hit in found]) - np.sort(scores)[::-1]).max() < 1e-5
    before = rows_by_id(ix)
    for command in (("compact",), ("verify",)):
        ok(*command, "--index", ix)
    assert rows_by_id(ix) == before
    [file] = ix.glob("segment-*.arrow")
    table = pa.ipc.open_file(file).read_all()
    assert table.column(VECTOR).nbytes == 60 * bytes_of_vector(store, 32)
    more = write_lines(tmp_path / "more.csv", ["id,text,label,n", "new,good film,pos,99"])
    ok("index", more, "--index", ix)  # in the same way
    assert len(rows_by_id(ix)) == 61
    code, _, stderr = embed("index", more, "--index", ix, "--store", "fp32")
    assert code == 2 and "--store" in stderr and store in stderr
    for command in ("pairs", "duplicates"):
        ok(command, "--index", ix)
    code, _, stderr = embed("evaluate", "--index", ix, "--store", "int8", *judged(tmp_path))
    assert code == 2 and f"keeps {store}" in stderr


def judged(folder):
    queries = [json.dumps({"id": f"q{n}", "text": text}) for n, (text, _) in enumerate(make_sentences(6))]
    return (
        *("--queries", write_lines(folder / "queries.jsonl", queries)),
        *("--qrels", write_lines(folder / "qrels.txt", [f"q{n} 0 s{n} 1" for n in range(6)])),
    )


def test_evaluate_shows_recall_and_bytes_of_each_store(ok, sentences, tmp_path):
    ix = tmp_path / "ix"
    ok("index", sentences, "--index", ix, "--id-column", "id")
    flags = [part for store in ("fp32", *LOSSY) for part in ("--store", store)]
    stores = ok("evaluate", "--index", ix, *flags, *judged(tmp_path), "--json")["stores"]
    assert [line["bytes"] for line in stores.values()] == [128, 64, 32, 4]
    shares = [line["top 10 of fp32"] for line in stores.values()]
    assert shares[0] == 1 and min(shares[1:3]) >= 0.8 and shares[3] < 1
    for store in LOSSY:  # what an index of this kind comes to
        other = tmp_path / store
        ok("index", sentences, "--index", other, "--id-column", "id", "--store", store)
        exact = ok("evaluate", "--index", other, *judged(tmp_path), "--json")["scores"]["exact"]
        assert exact == {name: stores[store][name] for name in exact}
    shown = ok("evaluate", "--index", ix, "--store", "binary", *judged(tmp_path))
    assert "top 10 of fp32" in shown and "bytes" in shown


def test_rows_of_another_store_are_refused(ok, embed, sentences, tmp_path):
    """As an index is opened, whatever its manifest says."""
    ok("index", sentences, "--index", tmp_path / "ix", "--store", "int8")
    from common.files import seal

    path = tmp_path / "ix" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["store"] = "binary"
    path.write_text(json.dumps({**manifest, "sha256": seal({**manifest, "sha256": None})}))
    code, _, stderr = embed("search", "--index", tmp_path / "ix", "x")
    assert code == 2 and "not 4 of uint8" in stderr


@pytest.mark.parametrize("store", LOSSY)
def test_cluster_numbers_as_a_column_change_no_vector(store, ok, sentences, tmp_path):
    ix = tmp_path / "ix"
    ok("index", sentences, "--index", ix, "--id-column", "id", "--block", 16, "--store", store)
    before = rows_by_id(ix)
    found = ok("cluster", "--index", ix, "--clusters", 3, "--column", "topic", "--json")["clusters"]
    ok("verify", "--index", ix)
    assert rows_by_id(ix) == before and len(found) == 3
    for cluster in found:
        flags = ("--where", f"topic = {cluster['cluster']}", "--top-k", 60, "--json")
        listed = ok("list", "--index", ix, *flags)["texts"]
        assert sorted(text["id"] for text in listed) == sorted(cluster["ids"])
    again = ok("index", sentences, "--index", ix, "--store", store, "--json")["counts"]
    assert (again["unchanged"], again["encoded"]) == (60, 0)
