"""export and index --vectors: what other programs read and write."""

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from common.search.index import open_snapshot
from conftest import rows_by_id


def test_every_format_holds_the_same_rows_in_the_same_order(ok, embed, sentences, tmp_path):
    ix = tmp_path / "ix"
    ok("index", sentences, "--index", ix, "--id-column", "id", "--block", 25)
    ok("delete", "--index", ix, "s3")
    files = {suffix: tmp_path / f"rows.{suffix}" for suffix in ("parquet", "npy", "faiss")}
    to = [part for file in files.values() for part in ("--to", file)]
    assert ok("export", "--index", ix, *to, "--where", "n < 40", "--json")["rows"] == 39
    table, vectors = pq.read_table(files["parquet"]), np.load(files["npy"])
    assert table.column_names == ["text", "id", "label", "n", "vector"]
    assert table["n"].to_pylist() == [n for n in range(40) if n != 3]
    known = rows_by_id(ix)
    for row, vector in zip(table.to_pylist(), vectors):
        assert known[row["id"]] == (row["text"], vector.tobytes())
        assert np.array_equal(np.float32(row["vector"]), vector)
    index = faiss.read_index(str(files["faiss"]))
    assert np.array_equal(index.reconstruct_n(0, 39), vectors)
    hits = ok("search", "--index", ix, "good film", "--where", "n < 40", "--top-k", 4, "--json")
    code, _, stderr = embed("export", "--index", ix, "--to", files["npy"])
    assert code == 2 and "rows.npy" in stderr
    code, _, stderr = embed("export", "--index", ix, "--to", tmp_path / "x.npy", "--where", "n > 99")
    assert code == 2 and not (tmp_path / "x.npy").exists()
    # and back: the same index, to the bit, without a text encoded
    back = ("index", files["parquet"], "--index", tmp_path / "back", "--id-column", "id")
    assert "encoded" not in ok(*back[:3], tmp_path / "once", *back[4:], "--vectors", files["npy"])
    built = ok(*back, "--vectors", files["npy"], "--json")
    assert built["counts"]["encoded"] <= 8  # those that are compared
    assert rows_by_id(tmp_path / "back") == {key: known[key] for key in table["id"].to_pylist()}
    code, _, stderr = embed(*back)  # the vectors beside the texts are none of their columns
    assert code == 0 and "rows.parquet: its column 'vector'" in stderr
    assert list(open_snapshot(tmp_path / "back").columns) == ["id", "label", "n"]
    assert ok("index", files["parquet"], "--index", ix, "--json")["counts"]["unchanged"] == 39
    # those of another program are
    table.replace_schema_metadata().to_pandas().to_parquet(tmp_path / "other.parquet")
    ok("index", tmp_path / "other.parquet", "--index", tmp_path / "other", "--id-column", "id")
    assert "vector" in open_snapshot(tmp_path / "other").columns
    more = ("--where", "n < 40", "--top-k", 4, "--json")
    assert ok("search", "--index", tmp_path / "back", "good film", *more) != {}
    assert [hit["id"] for hit in hits["queries"][0]["hits"]] == [
        hit["id"]
        for hit in ok("search", "--index", tmp_path / "back", "good film", *more)["queries"][0]["hits"]
    ]


def test_vectors_that_do_not_fit_are_refused_before_anything_is_written(ok, embed, sentences, tmp_path):
    good = np.random.default_rng(0).normal(size=(60, 32)) * 7
    broken = good.copy()
    broken[4, 4] = np.nan
    wrong = {
        "short": (good[:59], "59 vectors"),
        "narrow": (good[:, :31], "of 31 numbers"),
        "flat": (good[0], "shape"),
        "whole": (good.astype(int), "int64"),
        "broken": (broken, "row 5"),
        "objects": (np.array([{}] * 60), "not an array"),
    }
    command = ("index", sentences, "--index", tmp_path / "ix", "--id-column", "id", "--vectors")
    for name, (array, message) in wrong.items():
        np.save(tmp_path / f"{name}.npy", array)
        code, _, stderr = embed(*command, tmp_path / f"{name}.npy")
        assert code == 2 and message in stderr and f"{name}.npy" in stderr, stderr
    for flags in ((sentences,), (tmp_path / "short.npy", "--chunk"), (tmp_path / "none.npy",)):
        assert embed(*command, *flags)[0] == 2
    said = ok(*command, tmp_path / "broken.npy", "--skip-bad")
    assert "59 added" in said and "lowest cosine" in said
    vectors = open_snapshot(tmp_path / "ix").vectors_of(np.arange(59))
    kept = np.delete(good, 4, axis=0)
    assert np.abs(vectors - kept / np.linalg.norm(kept, axis=1, keepdims=True)).max() < 1e-6


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_export_that_fails_leaves_nothing(dtype, ok, embed, sentences, tmp_path, monkeypatch):
    """Vectors of any precision come in; and a file is complete or not there."""
    vectors = np.random.default_rng(0).normal(size=(60, 32)).astype(dtype)
    np.save(tmp_path / "given.npy", vectors)
    ok("index", sentences, "--index", tmp_path / "ix", "--vectors", tmp_path / "given.npy")
    monkeypatch.setattr(faiss, "write_index", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    before, to = set(tmp_path.iterdir()), ("--to", tmp_path / "a.npy", "--to", tmp_path / "b.faiss")
    code, _, _ = embed("export", "--index", tmp_path / "ix", *to)
    assert code != 0 and set(tmp_path.iterdir()) == before
