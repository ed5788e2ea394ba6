"""What searchers ask for, each against brute force or the rows as they stand in the file: search
without an index, recommendations, lists, one of each group, an index that follows its source.
"""

import csv
import datetime
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer

from common.search.index import open_snapshot
from common.search.segments import ID
from conftest import make_sentences, rows_by_id, write_lines


@pytest.fixture(scope="module")
def made(embed, tmp_path_factory):
    """An index of 40 texts with labels and numbers, never written to."""
    folder = tmp_path_factory.mktemp("made")
    rows = [f"s{n},{text},{label},{n}" for n, (text, label) in enumerate(make_sentences(40))]
    write_lines(folder / "t.csv", ["id,text,label,n", *rows])
    assert embed("index", folder / "t.csv", "--index", folder / "ix", "--id-column", "id")[0] == 0
    return folder


def vectors_of(folder) -> tuple[list[str], np.ndarray]:
    snapshot = open_snapshot(folder)
    rows = np.flatnonzero(snapshot.is_live())
    return [row[ID] for row in snapshot.take(rows)], snapshot.vectors_of(rows).astype(np.float64)


def hits(found: dict) -> list[tuple[str, float]]:
    [query] = found["queries"]
    return [(hit["id"], hit["score"]) for hit in query["hits"]]


def test_texts_are_searched_without_an_index_as_with_one(ok, made, tmp_path):
    index = hits(ok("search", "--index", made / "ix", "very good film", "--json"))
    plain = ("search", made / "t.csv", "--query", "very good film", "--json")
    found = ok(*plain)["queries"][0]["hits"]
    assert [(f"s{hit['row'] - 1}", pytest.approx(hit["score"])) for hit in found] == index
    found = hits(ok(*plain, "--id-column", "id"))
    assert [(key, pytest.approx(score)) for key, score in found] == index
    some = ok("search", made / "t.csv", "--query", "film", "--where", "label = 'pos'", "--hybrid", "--json")
    assert {hit["columns"]["label"] for hit in some["queries"][0]["hits"]} == {"pos"}
    write_lines(tmp_path / "q.txt", ["good", "bad"])
    assert len(ok("search", made / "t.csv", "--queries", tmp_path / "q.txt", "--json")["queries"]) == 2
    # a query by flag, beside those without, in an index
    both = ok("search", "--index", made / "ix", "good", "--query", "bad", "--json")["queries"]
    assert [query["query"] for query in both] == ["good", "bad"]


def test_pages_and_lowest_scores_cut_one_ranking(ok, made):
    flags = ("search", "--index", made / "ix", "very good film", "--json")
    whole = hits(ok(*flags, "--top-k", 40))
    assert hits(ok(*flags, "--top-k", 7, "--offset", 5)) == whole[5:12]
    assert hits(ok(*flags, "--top-k", 7, "--offset", 38)) == whole[38:]
    lowest = whole[9][1]
    assert hits(ok(*flags, "--top-k", 40, "--min-score", lowest)) == whole[:10]
    assert hits(ok(*flags, "--min-score", 2)) == []
    shown = ok(*flags[:-1], "--top-k", 2, "--offset", 5)
    assert "\n 6 " in shown and "\n 7 " in shown


def test_recommendations_are_brute_force(ok, made):
    ids, vectors = vectors_of(made / "ix")
    rows = {key: vector for key, vector in zip(ids, vectors)}
    for liked, unliked in [(["s3"], []), (["s1", "s5"], []), (["s1", "s5"], ["s2", "s8"])]:
        wanted = np.mean([rows[key] for key in liked], axis=0)
        if unliked:
            wanted = 2 * wanted - np.mean([rows[key] for key in unliked], axis=0)
        wanted /= np.linalg.norm(wanted)
        others = [key for key in ids if key not in liked + unliked]
        expected = sorted(others, key=lambda key: -float(rows[key] @ wanted))
        flags = ("--unlike", *unliked) if unliked else ()
        found = hits(ok("like", *liked, *flags, "--index", made / "ix", "--top-k", 40, "--json"))
        assert [key for key, _ in found] == expected
        assert [score for _, score in found] == pytest.approx(
            [float(rows[key] @ wanted) for key in expected], abs=1e-5
        )
    some = ok("like", "s3", "--index", made / "ix", "--where", "label = 'neg'", "--json")
    assert {hit["columns"]["label"] for hit in some["queries"][0]["hits"]} == {"neg"}


def test_lists_and_whole_texts(ok, made, tiny_embedder):
    rows = list(csv.DictReader(io.StringIO((made / "t.csv").read_text())))
    found = ok(
        "list", "--index", made / "ix", "--where", "label = 'pos'", "--offset", 3, "--top-k", 4, "--json"
    )
    expected = [row for row in rows if row["label"] == "pos"]
    assert found["of"] == len(expected)
    assert [text["id"] for text in found["texts"]] == [row["id"] for row in expected[3:7]]
    assert found["texts"][0]["columns"] == {
        "id": expected[3]["id"],
        "label": "pos",
        "n": int(expected[3]["n"]),
    }
    shown = ok("list", "--index", made / "ix")
    header = next(line for line in shown.splitlines() if line.startswith("id "))
    assert header.split() == ["id", "text", "label", "n"], "the ids stand once"
    assert "1 to 20 of 40 texts" in shown and "\ns19 " in shown and "\ns20 " not in shown
    assert "(none)" in ok("list", "--index", made / "ix", "--offset", 99)
    text = ok("show", "s7", "s2", "--index", made / "ix", "--vector", "--json")["texts"]
    assert [(one["id"], one["chunks"][0]["text"]) for one in text] == [
        ("s7", rows[7]["text"]),
        ("s2", rows[2]["text"]),
    ]
    vector = SentenceTransformer(str(tiny_embedder), device="cpu").encode(rows[7]["text"])
    assert text[0]["chunks"][0]["vector"] == pytest.approx(vector.tolist(), abs=1e-5)
    shown = ok("show", "s7", "--index", made / "ix", "--vector")
    assert sum(line.startswith("id ") for line in shown.splitlines()) == 1, shown
    assert rows[7]["text"] in shown and "32 numbers, the first 10" in shown
    assert shown.split("the first 10: ")[1].split() == [
        f"{value:.6f}" for value in text[0]["chunks"][0]["vector"][:10]
    ]


KEPT = [("first", "ade", "jsonl"), ("last", "cde", "csv"), ("longest", "bde", "parquet")]


@pytest.mark.parametrize("keep, kept, kind", KEPT)
def test_one_of_each_group_is_kept(keep, kept, kind, ok, tmp_path):
    texts = {"a": "good film", "b": "good  film ", "c": "good film", "d": "bad awful story", "e": "grim"}
    rows = [{"id": key, "body": text, "n": None} for key, text in texts.items()]
    write_lines(tmp_path / "t.jsonl", [json.dumps(row) for row in rows])
    path = tmp_path / f"out.{kind}"
    flags = ("dedupe", tmp_path / "t.jsonl", "--text-column", "body", "--threshold", 0.999)
    found = ok(*flags, "--keep", keep, "--output", path, "--json")
    assert (found["kept"], found["left_out"], found["groups"]) == (3, 2, 1)
    if kind == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    elif kind == "csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
    else:
        rows = pq.read_table(path).to_pylist()
    assert [row["id"] for row in rows] == list(kept) and {row["body"] for row in rows} <= {*texts.values()}
    assert set(rows[0]) == {"id", "body", "n"}
    assert [file.name for file in tmp_path.iterdir() if "out" in file.name] == [path.name]


@pytest.mark.parametrize("header, column", [("id,text,label", "text"), ('id,"good, text",x', "good, text")])
def test_dedupe_leaves_a_file_without_duplicates_as_it_is(header, column, ok, tmp_path):
    lines = [header, "7,the film was good,pos", "3,a grim story,neg"]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    flags = ("--text-column", column, "--threshold", 0.9999, "--output", tmp_path / "out.csv")
    ok("dedupe", tmp_path / "t.csv", *flags)
    assert (tmp_path / "out.csv").read_text().splitlines() == lines


def test_dedupe_calls_texts_that_no_column_had_as_it_is_told(ok, tmp_path):
    write_lines(tmp_path / "t.txt", ["the film was good"])
    ok("dedupe", tmp_path / "t.txt", "--text-column", "good, text", "--output", tmp_path / "out.csv")
    with open(tmp_path / "out.csv") as file:
        assert list(csv.reader(file)) == [["good, text"], ["the film was good"]]


def test_dedupe_says_that_chains_join_and_writes_json_without_infinity(ok, tmp_path):
    table = pa.table({"text": ["a grim story", "a grim story", "good film ü"], "n": [np.inf, 1.0, np.nan]})
    pq.write_table(table, tmp_path / "t.parquet")
    said = ok("dedupe", tmp_path / "t.parquet", "--threshold", 0.9999, "--output", tmp_path / "out.jsonl")
    assert "left out 1 texts of 1 groups: cosines of at least 0.9999, or a chain of such, join each" in said
    lines = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    assert lines == ['{"text": "a grim story", "n": null}', '{"text": "good film ü", "n": null}']


def test_dates_of_one_file_meet_texts_of_another(ok, tmp_path):
    days = pa.table({"text": ["one cat"], "day": [datetime.datetime(2024, 1, 1)]})
    pq.write_table(days, tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("text,day\ntwo grim dogs,2024-01-02\n")
    files = (tmp_path / "a.parquet", tmp_path / "b.csv")
    ok("dedupe", *files, "--threshold", 0.9999, "--output", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["day"] for row in rows] == ["2024-01-01 00:00:00", "2024-01-02"]


def test_dedupe_of_an_index_writes_its_rows(ok, embed, made, tmp_path):
    found = ok(
        "dedupe", "--index", made / "ix", "--threshold", 0.9999, "--output", tmp_path / "out.csv", "--json"
    )
    assert found["kept"] == 40
    assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith("s0,")
    rows = [{"id": "a", "text": "the film was very " * 60}]
    write_lines(tmp_path / "long.jsonl", [json.dumps(row) for row in rows])
    ok("index", tmp_path / "long.jsonl", "--index", tmp_path / "chunks", "--chunk", "--id-column", "id")
    code, _, stderr = embed("dedupe", "--index", tmp_path / "chunks", "--output", tmp_path / "new.csv")
    assert code == 2 and "chunks" in stderr and not (tmp_path / "new.csv").exists()


@pytest.mark.parametrize("id_column", [("--id-column", "id"), ()])
def test_an_index_follows_its_source(id_column, ok, tmp_path):
    index, source = ("--index", tmp_path / "ix"), tmp_path / "t.csv"
    rows = {f"s{n}": text for n, (text, _) in enumerate(make_sentences(30))}

    def sync() -> dict:
        write_lines(source, ["id,text", *(f"{key},{text}" for key, text in rows.items())])
        return ok("sync", source, *index, *id_column, "--block", 7, "--json")

    assert sync()["counts"]["added"] == 30
    for key in ("s3", "s4", "s29"):
        del rows[key]
    rows["s5"], rows["new"] = "lovely changed", "a new story"
    counts = sync()["counts"]
    changed = {"added": 2, "updated": 0, "deleted": 4}  # a changed text is another one
    if id_column:
        changed = {"added": 1, "updated": 1, "deleted": 3}
    assert {name: counts[name] for name in changed} == changed
    found = rows_by_id(tmp_path / "ix")
    assert sorted(text for text, _ in found.values()) == sorted(rows.values())
    again = sync()["counts"]
    assert (again["added"], again["updated"], again["deleted"], again["unchanged"]) == (0, 0, 0, len(rows))


def test_sync_deletes_all_chunks_of_a_document(ok, tmp_path):
    rows = [{"id": name, "text": f"the film was very n{name} " * 60} for name in ("one", "two")]
    flags = ("sync", tmp_path / "t.jsonl", "--index", tmp_path / "ix", "--id-column", "id", "--chunk")
    write_lines(tmp_path / "t.jsonl", [json.dumps(row) for row in rows])
    many = ok(*flags, "--json")["rows"]
    write_lines(tmp_path / "t.jsonl", [json.dumps(rows[1])])
    found = ok(*flags, "--json")
    assert many > 4 and found["rows"] < many and found["counts"]["deleted"] == 1
    assert ok("list", "--index", tmp_path / "ix", "--json")["of"] == 1
    [text] = ok("show", "two", "--index", tmp_path / "ix", "--json")["texts"]
    assert len(text["chunks"]) == found["rows"]


def test_similarity_writes_the_vectors(ok, made, tiny_embedder, tmp_path):
    ok("similarity", made / "t.csv", "--output", tmp_path / "v.npy")
    found = np.load(tmp_path / "v.npy", allow_pickle=False)
    rows = list(csv.DictReader(io.StringIO((made / "t.csv").read_text())))
    expected = SentenceTransformer(str(tiny_embedder), device="cpu").encode([row["text"] for row in rows])
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-5
