"""embed_search.py as a user calls it: the tutorial's figures, an index over its life, searches
against brute force.
"""

import csv
import io
import json
import random
import re
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, spearmanr
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

import embed_search
from common import bundled
from common.errors import UserError
from common.runtime import Runtime
from common.search.encoder import EncoderConfig, load_encoder
from common.search.index import open_snapshot
from common.search.segments import ID, TEXT
from conftest import heavy, make_sentences, rows_by_id, write_lines

BUNDLED = "bundled/all-MiniLM-L6-v2"
SENTENCES = [
    "Natural language processing is a fascinating field of study.",
    "NLP combines computer science and linguistics to understand human language.",
    "Machine learning models can process and analyze text data effectively.",
    "The weather is sunny today.",
    "I love eating pizza for dinner.",
    "Deep learning has revolutionized artificial intelligence.",
]
DOCUMENTS = [
    "Python is a popular programming language for data science and machine learning.",
    "The stock market experienced significant volatility this week.",
    "Climate change is affecting weather patterns around the world.",
    "Deep learning models require large amounts of training data.",
    "The new restaurant downtown serves excellent Italian cuisine.",
    "Artificial neural networks are inspired by biological neural networks.",
    "Solar energy is becoming more cost-effective than fossil fuels.",
]


def test_the_tutorials_similarities_to_the_printed_digit(ok, tmp_path):
    path, query = (
        write_lines(tmp_path / "s.txt", SENTENCES),
        "Artificial intelligence and machine learning are transforming technology.",
    )
    flags = ("similarity", path, "--query", query, "--model", BUNDLED)
    found = ok(*flags, "--json")
    assert found["matrix"][0] == [1.0, 0.543, 0.493, -0.031, 0.139, 0.367] and found["matrix"][3][5] == -0.104
    assert [
        (pair["first"]["row"], pair["second"]["row"], round(pair["similarity"], 3)) for pair in found["pairs"]
    ] == [(1, 2, 0.543), (2, 3, 0.493), (1, 3, 0.493)]
    similarities = found["queries"][0]["similarities"]
    assert [round(entry["similarity"], 3) for entry in similarities] == [
        0.297,
        0.381,
        0.422,
        -0.017,
        0.022,
        0.618,
    ]
    assert [entry["level"] for entry in similarities] == ["low", "low", "moderate", "low", "low", "moderate"]
    shown = ok(*flags, "--figure", tmp_path / "map.png")
    assert re.search(r"1 +1\.000 +0\.543 +0\.493 +-0\.031 +0\.139 +0\.367", shown) and (
        tmp_path / "map.png"
    ).read_bytes().startswith(b"\x89PNG")


def test_the_tutorials_search(ok, tmp_path):
    ok("index", write_lines(tmp_path / "d.txt", DOCUMENTS), "--index", tmp_path / "docs", "--model", BUNDLED)
    found = ok(
        "search",
        "--index",
        tmp_path / "docs",
        "What programming languages are good for AI?",
        "--top-k",
        3,
        "--json",
    )["queries"][0]["hits"]
    assert [(round(hit["score"], 3), hit["text"]) for hit in found] == [
        (0.491, DOCUMENTS[0]),
        (0.366, DOCUMENTS[5]),
        (0.214, DOCUMENTS[3]),
    ]


def test_an_index_over_its_life(ok, embed, sentences, tmp_path):
    index = ("--index", tmp_path / "ix")
    first = ok("index", sentences, *index, "--id-column", "id", "--block", 16, "--json")
    assert (first["rows"], first["counts"]["added"], first["files"]) == (60, 60, 4)
    again = ok("index", sentences, *index, "--json")
    assert again["counts"]["unchanged"] == 60 and again["counts"]["encoded"] == 0 and again["files"] == 4
    changed = sentences.read_text().replace("s3,", "s3,new ").replace("s60", "s60") + "s60,good film,pos,60\n"
    sentences.write_text(changed)
    code, _, stderr = embed("index", sentences, *index)
    assert code == 2 and "row 4" in stderr and "'s3'" in stderr and "--update" in stderr
    updated = ok("index", sentences, *index, "--update", "--json")
    assert (
        updated["counts"]["added"],
        updated["counts"]["updated"],
        updated["counts"]["encoded"],
        updated["deleted_rows"],
    ) == (1, 1, 2, 1)
    assert ok("delete", *index, "s5", "s6", "--json")["rows"] == 59
    assert "deleted  0 rows; 2 ids are not in the index" in ok("delete", *index, "s5", "s6", "--skip-bad")
    assert ok("delete", *index, "--where", "n between 10 and 19", "--json")["rows"] == 49
    compacted = ok("compact", *index, "--json")
    assert (compacted["rows"], compacted["deleted_rows"], compacted["files"]) == (49, 0, 1)
    assert "s3" in {
        hit["id"] for hit in ok("search", *index, "new", "--top-k", 49, "--json")["queries"][0]["hits"]
    }


def test_vectors_in_the_index_are_sentence_transformers(ok, sentences, tiny_embedder, tmp_path):
    ok("index", sentences, "--index", tmp_path / "ix", "--id-column", "id")
    snapshot = open_snapshot(tmp_path / "ix")
    texts = [row[TEXT] for row in snapshot.take(range(60))]
    assert (
        np.abs(
            snapshot.vectors_of(range(60))
            - SentenceTransformer(str(tiny_embedder), device="cpu").encode(texts)
        ).max()
        < 1e-5
    )


def test_search_is_brute_force_with_filters(ok, sentences, tiny_embedder, tmp_path):
    ok("index", sentences, "--index", tmp_path / "ix", "--id-column", "id", "--block", 7)
    ok("delete", "--index", tmp_path / "ix", "s2")
    model = SentenceTransformer(str(tiny_embedder), device="cpu")
    rows = [
        row
        for row in csv.DictReader(io.StringIO(sentences.read_text()))
        if row["id"] != "s2" and row["label"] == "pos" and int(row["n"]) > 9
    ]
    scores = model.encode([row["text"] for row in rows]) @ model.encode("very good film")
    expected = [rows[place]["id"] for place in np.argsort(-scores, kind="stable")]
    flags = (
        "search",
        "--index",
        tmp_path / "ix",
        "very good film",
        "--where",
        "label = 'pos' AND n > 9",
        "--json",
        "--top-k",
        100,
    )
    assert [hit["id"] for hit in ok(*flags)["queries"][0]["hits"]] == expected
    assert {hit["id"] for hit in ok(*flags, "--approximate")["queries"][0]["hits"]} == set(expected)
    hybrid = ok(*flags, "--hybrid")["queries"][0]["hits"]
    assert {hit["id"] for hit in hybrid} == set(expected) and [hit["id"] for hit in hybrid] != expected


def test_columns_with_the_names_of_ours_shadow_nothing(ok, tmp_path):
    """A column called score or id was shown for the hit's own; one called _row decided which rows
    were deleted.
    """
    names = ["id", "score", "text", "chunk", "_row", "row", "_number", "similarity", "level"]
    rows = [
        {**{name: 10 * number for name in names}, "text": f"the film was n{number}", "key": f"k{number}"}
        for number in range(6)
    ]
    write_lines(tmp_path / "t.jsonl", [json.dumps(row) for row in rows])
    ok(
        "index",
        tmp_path / "t.jsonl",
        "--index",
        tmp_path / "ix",
        "--id-column",
        "key",
        "--text-column",
        "text",
    )
    hit = ok("search", "--index", tmp_path / "ix", "the film was n3", "--top-k", 1, "--json")["queries"][0][
        "hits"
    ][0]
    assert (hit["id"], hit["text"], hit["score"]) == ("k3", "the film was n3", pytest.approx(1, abs=1e-5))
    assert (
        hit["columns"] == {name: value for name, value in rows[3].items() if name != "text"}
        and "chunk" not in hit
    )
    for condition, left in (
        ("_row = 20", {"k0", "k1", "k3", "k4", "k5"}),
        ("row = 40 OR _index_id = 'k0'", {"k1", "k3", "k5"}),
    ):
        ok("delete", "--index", tmp_path / "ix", "--where", condition)
        assert {key for key in rows_by_id(tmp_path / "ix")} == left
    found = ok(
        "similarity",
        tmp_path / "t.jsonl",
        "--query",
        "the film was n0",
        "--where",
        "_number = 20 OR level = 0",
        "--json",
    )
    assert [entry["row"] for entry in found["queries"][0]["similarities"]] == [1, 3]
    assert found["queries"][0]["similarities"][0]["similarity"] == pytest.approx(1, abs=1e-5)


def test_hybrid_is_reciprocal_rank_fusion_of_both(ok, tmp_path):
    ok("index", write_lines(tmp_path / "d.txt", DOCUMENTS), "--index", tmp_path / "ix")
    dense = [
        hit["text"]
        for hit in ok("search", "--index", tmp_path / "ix", "neural networks", "--top-k", 7, "--json")[
            "queries"
        ][0]["hits"]
    ]
    found = ok("search", "--index", tmp_path / "ix", "neural networks", "--hybrid", "--top-k", 7, "--json")[
        "queries"
    ][0]["hits"]
    sparse = [DOCUMENTS[5]]  # the only text with one of the words
    scores = {text: 1 / (61 + dense.index(text)) + (1 / 61 if text in sparse else 0) for text in DOCUMENTS}
    assert [hit["text"] for hit in found] == sorted(DOCUMENTS, key=lambda text: -scores[text])
    assert found[0]["score"] == pytest.approx(scores[found[0]["text"]])


def test_hybrid_fuses_several_keyword_hits_by_their_ranks(ok, tmp_path):
    """Of texts of equal length BM25 puts those first that have the word more often."""
    texts = [
        "film film film the",
        "film film was the",
        "film was and the",
        "story was and the",
        "actors was and the",
    ]
    ok("index", write_lines(tmp_path / "t.txt", texts), "--index", tmp_path / "ix")
    dense = [
        hit["text"]
        for hit in ok("search", "--index", tmp_path / "ix", "film", "--json")["queries"][0]["hits"]
    ]
    found = ok("search", "--index", tmp_path / "ix", "film", "--hybrid", "--json")["queries"][0]["hits"]
    scores = {
        text: 1 / (61 + dense.index(text)) + (1 / (61 + rank) if rank < 3 else 0)
        for rank, text in enumerate(texts)
    }
    assert [hit["text"] for hit in found] == sorted(
        texts, key=lambda text: (-scores[text], texts.index(text))
    )
    assert [hit["score"] for hit in found] == pytest.approx(sorted(scores.values(), reverse=True))


def test_texts_without_words_and_filters_that_leave_few_rows(ok, sentences, tmp_path):
    ok("index", write_lines(tmp_path / "d.txt", ["a", "the", "!!!"]), "--index", tmp_path / "words")
    assert (
        len(ok("search", "--index", tmp_path / "words", "the", "--hybrid", "--json")["queries"][0]["hits"])
        == 3
    )
    ok("index", sentences, "--index", tmp_path / "ix", "--id-column", "id")
    for number in (0, 31, 59):
        flags = (
            "search",
            "--index",
            tmp_path / "ix",
            "bad film",
            "--approximate",
            "--where",
            f"n = {number}",
            "--json",
        )
        assert [hit["id"] for hit in ok(*flags)["queries"][0]["hits"]] == [f"s{number}"]


def test_a_stale_or_damaged_cache_is_made_anew(ok, sentences, tmp_path):
    index = ("--index", tmp_path / "ix")
    ok("index", sentences, *index, "--id-column", "id")
    flags = ("search", *index, "good film", "--approximate", "--top-k", 3, "--json")
    first = ok(*flags)
    codes = tmp_path / "ix" / "cache-faiss" / "codes.faiss"
    whole = codes.read_bytes()
    codes.write_bytes(b"\0" * len(whole))
    assert ok(*flags) == first and codes.read_bytes() == whole  # damaged
    ok("delete", *index, first["queries"][0]["hits"][0]["id"])
    second = ok(*flags)["queries"][0]["hits"]
    # stale
    assert [hit["id"] for hit in second][:2] == [hit["id"] for hit in first["queries"][0]["hits"]][1:]


def test_reranking_orders_the_best_by_the_cross_encoder(ok, sentences, tiny_reranker, tmp_path):
    ok("index", sentences, "--index", tmp_path / "ix", "--id-column", "id")
    flags = ("search", "--index", tmp_path / "ix", "very good film", "--json", "--top-k")
    best = ok(*flags, 20)["queries"][0]["hits"]
    scores = CrossEncoder(str(tiny_reranker), device="cpu").predict(
        [("very good film", hit["text"]) for hit in best]
    )
    found = ok(*flags, 5, "--rerank", tiny_reranker, "--rerank-depth", 20)["queries"][0]["hits"]
    score_of = {hit["id"]: score for hit, score in zip(best, scores)}
    # by scores, because two of them can be equal but for rounding
    assert np.allclose([score_of[hit["id"]] for hit in found], -np.sort(-scores)[:5], rtol=0, atol=1e-6)
    assert np.allclose([hit["score"] for hit in found], sorted(scores, reverse=True)[:5], atol=1e-5)


def test_chunks_are_found_with_their_document(ok, tmp_path):
    long = " ".join(f"the film was very n{number}" for number in range(60))
    rows = [
        {"id": "long", "text": f"{long} lovely great lovely great {long}"},
        {"id": "short", "text": "bad awful poor"},
    ]
    write_lines(tmp_path / "t.jsonl", [json.dumps(row) for row in rows])
    plain = ok("index", tmp_path / "t.jsonl", "--index", tmp_path / "plain", "--id-column", "id")
    assert "1 are longer than 64 tokens" in plain and "--chunk" in plain
    ok(
        "index",
        tmp_path / "t.jsonl",
        "--index",
        tmp_path / "ix",
        "--id-column",
        "id",
        "--chunk",
        "--chunk-overlap",
        8,
    )
    hits = ok("search", "--index", tmp_path / "ix", "lovely great lovely great", "--top-k", 5, "--json")[
        "queries"
    ][0]["hits"]
    # each document once, though it has many chunks
    assert sorted(hit["id"] for hit in hits) == ["long", "short"]
    found = next(hit for hit in hits if hit["id"] == "long")
    snapshot = open_snapshot(tmp_path / "ix")
    chunks = [row for row in snapshot.take(range(snapshot.num_rows)) if row[ID] == "long"]
    assert found["chunk"]["of"] == len(chunks) > 5
    start = found["chunk"]["first_character"]
    assert rows[0]["text"][start : start + len(found["text"])] == found["text"]
    assert ok("delete", "--index", tmp_path / "ix", "long", "--json")["rows"] == 1


def test_chunks_of_one_document_are_no_pair_of_texts(ok, tmp_path):
    long = " ".join(["the film was very good"] * 60)
    rows = [
        {"id": "one", "text": long},
        {"id": "two", "text": long + " on monday"},
        {"id": "short", "text": "bad awful poor"},
    ]
    write_lines(tmp_path / "t.jsonl", [json.dumps(row) for row in rows])
    ok(
        "index",
        tmp_path / "t.jsonl",
        "--index",
        tmp_path / "ix",
        "--id-column",
        "id",
        "--chunk",
        "--chunk-overlap",
        8,
    )
    pairs = ok("pairs", "--index", tmp_path / "ix", "--top-k", 50, "--json")["pairs"]
    assert pairs and all(pair["first"]["id"] != pair["second"]["id"] for pair in pairs)
    found = ok("duplicates", "--index", tmp_path / "ix", "--threshold", 0.9, "--json")
    assert [[row["id"] for row in group] for group in found["groups"]] == [["one", "two"]]
    shown = ok("duplicates", "--index", tmp_path / "ix", "--threshold", 0.9)
    assert "1 groups of 2 texts" in shown and "pairs of chunks" in shown
    clusters = ok("cluster", "--index", tmp_path / "ix", "--num-clusters", 1, "--json")["clusters"]
    assert sorted(clusters[0]["ids"]) == ["one", "short", "two"] and clusters[0]["size"] > 3


def test_ids_that_look_like_formulas_are_drawn_as_they_are(ok, tmp_path):
    write_lines(tmp_path / "t.csv", ["id,text", "$x_{$,good film", "a$\\frac$,bad film"])
    ok("index", tmp_path / "t.csv", "--index", tmp_path / "ix", "--id-column", "id")
    ok("similarity", "--index", tmp_path / "ix", "--figure", tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_the_same_text_has_the_cosine_1_with_itself_whatever_the_prompts(ok, tiny_model, tmp_path):
    modules = [Transformer(str(tiny_model), max_seq_length=64), Pooling(32)]
    SentenceTransformer(
        modules=modules, device="cpu", prompts={"query": "what: ", "document": "story: "}
    ).save(str(tmp_path / "model"))
    write_lines(tmp_path / "t.txt", ["good film", "bad story"])
    ok("index", tmp_path / "t.txt", "--index", tmp_path / "ix", "--model", tmp_path / "model")
    for source in ((tmp_path / "t.txt",), ("--index", tmp_path / "ix")):
        found = ok("similarity", *source, "--model", tmp_path / "model", "--query", "good film", "--json")
        assert found["queries"][0]["similarities"][0]["similarity"] == pytest.approx(1, abs=1e-6)


def test_fewer_clusters_than_asked_for_are_said(ok, tmp_path):
    shown = ok("cluster", write_lines(tmp_path / "t.txt", ["good film"] * 4), "--num-clusters", 3)
    assert "only 1 clusters, not 3" in shown


def test_columns_stay_beside_hits(ok, embed, tmp_path):
    """On the screen those that are named, as they are; in JSON those alone."""
    path, folder = tmp_path / "t.csv", tmp_path / "ix"
    path.write_text("id,text,price,label,note\na,a good film,1250000,pos,\nb,a bad film,2.5,neg,x\n")
    ok("index", path, "--index", folder, "--id-column", "id")
    flags, named = ("search", "--index", folder, "film"), ("--keep-columns", "price,note")
    shown = embed(*flags, *named)[1].split("\n")
    assert shown[2].split() == ["score", "id", "text", "price", "note"]
    cells = {line.split()[2]: line.split()[6:] for line in shown[4:6]}
    assert cells == {"a": ["1250000.0"], "b": ["2.5", "x"]}
    [found] = ok(*flags, *named, "--json")["queries"]
    assert {hit["id"]: hit["columns"] for hit in found["hits"]} == {
        "a": {"price": 1250000.0, "note": None},
        "b": {"price": 2.5, "note": "x"},
    }
    every = embed(*flags, "--keep-columns", "all")[1].split("\n")[2].split()
    assert every == ["score", "id", "text", "id", "price", "label", "note"]
    assert set(ok(*flags, "--json")["queries"][0]["hits"][0]["columns"]) == {"id", "price", "label", "note"}
    assert "price" not in embed(*flags)[1]
    liked = embed("like", "a", "--index", folder, *named)[1]
    assert "price" in liked and "2.5" in liked
    of_texts = embed("search", path, "--query", "film", *named)[1]
    assert "1250000.0" in of_texts and "note" in of_texts


def test_decimal_commas_are_numbers(ok, tmp_path):
    path, folder = tmp_path / "t.csv", tmp_path / "ix"
    path.write_text('id,text,price,point,n\na,good,"1,5",1.5,2\nb,bad,"12,25",2.5,3\nc,rain,"3",3.5,\n')
    ok("index", path, "--index", folder, "--id-column", "id", "--decimal", ",")
    found = ok("search", "--index", folder, "film", "--where", "price > 2 AND n = 3", "--json")
    [hit] = found["queries"][0]["hits"]
    assert hit["columns"] == {"id": "b", "price": 12.25, "point": "2.5", "n": 3}


def test_columns_stay_beside_the_texts_of_pairs(ok, embed, tmp_path):
    path, folder = tmp_path / "t.csv", tmp_path / "ix"
    path.write_text("id,text,price\na,a good film,2.5\nb,a good film,1250000\nc,rain,\n")
    ok("index", path, "--index", folder, "--id-column", "id")
    for source in ([path], ["--index", folder]):
        flags = ("pairs", *source, "--top-k", 1, "--keep-columns", "price")
        [pair] = ok(*flags, "--json")["pairs"]
        assert {pair[one]["columns"]["price"] for one in ("first", "second")} == {2.5, 1250000.0}
        shown = [line.split() for line in ok(*flags).partition("pairs\n")[2].split("\n")]
        assert shown[0][-1] == "price" and {shown[2][-1], shown[3][-1]} == {"2.5", "1250000.0"}
        assert "columns" not in ok(*flags[:-2], "--json")["pairs"][0]["first"]
    code, _, stderr = embed("pairs", path, "--keep-columns", "nope")
    assert code == 2 and "no column 'nope'" in stderr and "--keep-columns" in stderr


def test_the_ids_of_texts_without_an_index_are_those_of_their_column(ok, embed, sentences, tmp_path):
    """Or else the numbers of their rows, which are called so."""
    ids = {"key": "id", "numbers": "row"}
    for name, flags in {"numbers": (), "key": ("--id-column", "id")}.items():

        def keys(documents: list[dict], name: str = name) -> list:
            found = [document[ids[name]] for document in documents]
            assert all(("id" in document) + ("row" in document) == 1 for document in documents)
            return found if name == "key" else [f"s{number - 1}" for number in found]

        hits = ok("search", sentences, "--query", "good", *flags, "--json")["queries"][0]["hits"]
        rows = {row["id"]: row for row in csv.DictReader(io.StringIO(sentences.read_text()))}
        assert [rows[key]["text"] for key in keys(hits)] == [hit["text"] for hit in hits]
        assert set(hits[0]["columns"]) == {"id", "label", "n"}
        assert ids[name] in ok("search", sentences, "--query", "good", *flags)
        [group, *_] = ok("duplicates", sentences, "--threshold", 0.9, *flags, "--json")["groups"]
        assert [rows[key]["text"] for key in keys(group)] == [text["text"] for text in group]
        output = tmp_path / f"{name}.csv"
        found = ok("cluster", sentences, "--num-clusters", 2, *flags, "--output", output, "--json")
        assert sum(len(one[f"{ids[name]}s"]) for one in found["clusters"]) == 60
        header, first, *_ = output.read_text().splitlines()
        assert header == f"{ids[name]},cluster" and first.startswith("s0," if name == "key" else "1,")
    code, _, stderr = embed("pairs", sentences, "--id-column", "nope")
    assert code == 2 and "no column 'nope'" in stderr and "--id-column" in stderr
    lines = write_lines(tmp_path / "lines.txt", ["good", "bad"])
    code, _, stderr = embed("pairs", lines, "--id-column", "id")
    assert code == 2 and "lines.txt: no column 'id' but texts alone" in stderr, stderr
    ok("index", sentences, "--index", tmp_path / "ix", "--id-column", "id")
    code, _, stderr = embed("pairs", "--index", tmp_path / "ix", "--id-column", "id")
    assert code == 2 and "--id-column id" in stderr and "leave it out" in stderr


def test_the_prompt_answers_line_by_line(ok, sentences, tmp_path, monkeypatch):
    ok("index", sentences, "--index", tmp_path / "ix", "--id-column", "id")
    monkeypatch.setattr(sys, "stdin", io.StringIO("good film\nbad film\n\n"))
    shown = ok("search", "--index", tmp_path / "ix", "--top-k", 2)
    assert shown.index("query: good film") < shown.index("query: bad film")


def test_pairs_duplicates_and_clusters_through_the_command_line(ok, sentences, tmp_path):
    sentences.write_text(
        sentences.read_text() + sentences.read_text().splitlines()[1].replace("s0,", "copy,") + "\n"
    )
    best = ok("pairs", sentences, "--top-k", 2, "--json")["pairs"]
    assert (best[0]["first"]["row"], best[0]["second"]["row"]) == (1, 61)
    assert best[0]["similarity"] == pytest.approx(1)
    ok("index", sentences, "--index", tmp_path / "ix", "--id-column", "id")
    found = ok("duplicates", "--index", tmp_path / "ix", "--threshold", 0.9999, "--json")
    assert [[row["id"] for row in group] for group in found["groups"]] == [["s0", "copy"]] and found[
        "num_pairs"
    ] == 1
    ok("duplicates", "--index", tmp_path / "ix", "--threshold", 0.5, "--pairs-file", tmp_path / "pairs.csv")
    pairs = [frozenset(row[:2]) for row in csv.reader(io.StringIO((tmp_path / "pairs.csv").read_text()))][1:]
    assert (
        len(pairs)
        == len(set(pairs))
        == ok("duplicates", "--index", tmp_path / "ix", "--threshold", 0.5, "--json")["num_pairs"]
    )
    clusters = ok("cluster", "--index", tmp_path / "ix", "--num-clusters", 3, "--json")["clusters"]
    assert sum(cluster["size"] for cluster in clusters) == 61 and all(
        len(cluster["nearest_to_centre"]) == 3 for cluster in clusters
    )
    ok(
        "cluster",
        "--index",
        tmp_path / "ix",
        "--threshold",
        0.8,
        "--where",
        "label = 'pos'",
        "--figure",
        tmp_path / "map.png",
    )
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_with_judgements_of_ones_own(ok, sentences, tiny_reranker, tmp_path):
    rows = list(csv.DictReader(io.StringIO(sentences.read_text())))[:6]
    write_lines(
        tmp_path / "q.jsonl", [json.dumps({"id": f"q{row['id']}", "text": row["text"]}) for row in rows]
    )
    write_lines(
        tmp_path / "qrels",
        [f"q{row['id']} 0 {row['id']} 1" for row in rows[:5]] + [f"q{rows[5]['id']} 0 nowhere 1"],
    )
    task = ("--queries", tmp_path / "q.jsonl", "--qrels", tmp_path / "qrels", "--json")
    found = ok("evaluate", "--texts", sentences, *task, "--rerank", tiny_reranker)["scores"]
    assert list(found) == ["exact", "approximate", "hybrid", "reranked"]
    # each text finds itself first, and one is not there
    for name in ("nDCG@10", "MRR@10", "recall@1", "recall@100"):
        assert found["exact"][name] == found["approximate"][name] == pytest.approx(5 / 6)
    ok("index", sentences, "--index", tmp_path / "ix", "--id-column", "id")
    assert ok("evaluate", "--index", tmp_path / "ix", *task)["scores"]["exact"] == found["exact"]


def test_evaluate_reads_ids_from_the_named_column_and_says_what_is_not_there(ok, tmp_path, embed):
    """Graded relevance and a first hit that is not relevant, against the definitions
    written out.
    """
    texts = ["good film", "great story", "bad film", "awful story"]
    write_lines(tmp_path / "t.csv", ["key,text", *(f"d{number},{text}" for number, text in enumerate(texts))])
    ok("index", tmp_path / "t.csv", "--index", tmp_path / "ix", "--id-column", "key")
    order = [
        hit["id"]
        for hit in ok("search", "--index", tmp_path / "ix", "good film", "--json")["queries"][0]["hits"]
    ]
    relevance = {order[1]: 3, order[3]: 1, "elsewhere": 2, order[0]: 0}
    write_lines(tmp_path / "q.jsonl", ['{"id": "a", "text": "good film"}'])
    write_lines(tmp_path / "qrels", [f"a 0 {document} {grade}" for document, grade in relevance.items()])
    task = ("--queries", tmp_path / "q.jsonl", "--qrels", tmp_path / "qrels", "--json")
    code, stdout, stderr = embed("evaluate", "--texts", tmp_path / "t.csv", "--id-column", "key", *task)
    assert (
        code == 0 and "1 of 3 documents that are judged relevant are missing, such as 'elsewhere'" in stderr
    ), stderr
    found = json.loads(stdout)["scores"]["exact"]
    gain = 3 / np.log2(3) + 1 / np.log2(5)
    assert found["nDCG@10"] == pytest.approx(gain / (3 + 2 / np.log2(3) + 1 / np.log2(4)))
    assert (found["MRR@10"], found["recall@1"], found["recall@10"]) == (0.5, 0, pytest.approx(2 / 3))
    assert ok("evaluate", "--index", tmp_path / "ix", *task)["scores"]["exact"] == found


def test_the_bundled_task_finds_articles_by_their_headlines(ok, tiny_embedder, monkeypatch):
    """On its first 50 articles: with one relevant text a query, each measure is a function of its
    rank.
    """
    news = bundled.bbc_news().select(range(50))
    monkeypatch.setitem(bundled.DATASETS, "bundled/bbc-news", lambda: news)
    found = ok("evaluate", "--json")
    headlines, articles = zip(*(map(str.strip, text.split("\n", 1)) for text in news["text"]))
    model = SentenceTransformer(str(tiny_embedder), device="cpu")
    scores = model.encode(headlines, batch_size=1) @ model.encode(articles, batch_size=1).T
    ahead = scores - scores.diagonal()[:, None]

    def measures(ranks):
        each = {
            "nDCG@10": np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0),
            "MRR@10": np.where(ranks <= 10, 1 / ranks, 0),
            "MAP@100": 1 / ranks,
            "P@10": (ranks <= 10) / 10,
            "recall@1": ranks <= 1,
            "recall@10": ranks <= 10,
            "recall@100": ranks <= 100,
        }
        return {name: float(values.mean()) for name, values in each.items()}

    # Processors round differently: two scores (4e-6 apart were seen) may then change places. Every
    # measure falls with the rank, so that the best and the worst ranks bound it.
    best, worst = ((1 + (ahead > gap).sum(1)) for gap in (2e-5, -2e-5))
    worst -= 1  # an article is not ahead of itself
    assert (worst - best).sum() <= 5
    assert found["queries"] == 50 and list(found["scores"]) == ["exact", "approximate", "hybrid"]
    exact, highest, lowest = found["scores"]["exact"], measures(best), measures(worst)
    assert exact.keys() == highest.keys()
    for name, value in exact.items():
        assert lowest[name] - 1e-9 <= value <= highest[name] + 1e-9, name
    assert 0 < found["scores"]["exact"]["recall@10"] < 1


def test_sts_is_spearmans_correlation(ok, tiny_embedder, tmp_path):
    texts, generator = [text for text, _ in make_sentences(24)], random.Random(0)
    pairs = [
        (generator.choice(texts), generator.choice(texts), round(generator.random() * 5, 1))
        for _ in range(20)
    ]
    with open(tmp_path / "sts.csv", "w", newline="") as file:
        csv.writer(file).writerows([("a", "b", "human"), *pairs])
    model = SentenceTransformer(str(tiny_embedder), device="cpu")
    left, right = (model.encode([pair[side] for pair in pairs]).astype(np.float64) for side in (0, 1))
    found = ok("evaluate", "--sts", tmp_path / "sts.csv", "--sts-columns", "a", "b", "human", "--json")
    assert found["spearman"] == pytest.approx(
        spearmanr((left * right).sum(1), [pair[2] for pair in pairs]).statistic, abs=1e-4
    )


def test_sts_reads_its_file_as_the_flags_say(ok, tiny_embedder, tmp_path):
    texts = [text for text, _ in make_sentences(24)]
    rows = [(texts[n], texts[23 - n], n % 5 + n / 10) for n in range(9)]
    with open(tmp_path / "usual.csv", "w", newline="") as file:
        csv.writer(file).writerows([("sentence1", "sentence2", "score"), *rows])
    lines = [f"{one};{other};{score:.1f}".replace(".", ",") for one, other, score in rows]
    (tmp_path / "other.csv").write_text("\n".join(["süß;übel;mäßig", *lines]), encoding="latin-1")
    options = ("--encoding", "latin-1", "--delimiter", ";", "--decimal", ",", "--json")
    columns = ("--sts-columns", "süß", "übel", "mäßig")
    expected = ok("evaluate", "--sts", tmp_path / "usual.csv", "--json")
    found = ok("evaluate", "--sts", tmp_path / "other.csv", *columns, *options)
    assert found["spearman"] == pytest.approx(expected["spearman"], abs=1e-9) and found["pairs"] == 9
    found = ok("compare-models", tiny_embedder, "--sts", tmp_path / "other.csv", *columns, *options)
    assert found["models"][0]["spearman"] == pytest.approx(expected["spearman"], abs=1e-9)


def test_compare_models_shows_quality_speed_and_size(ok, sentences, tiny_embedder, tiny_model, tmp_path):
    rows = list(csv.DictReader(io.StringIO(sentences.read_text())))[:6]
    write_lines(tmp_path / "q.jsonl", [json.dumps({"id": row["id"], "text": row["text"]}) for row in rows])
    write_lines(tmp_path / "qrels", [f"{row['id']} 0 {row['id']} 1" for row in rows])
    found = ok(
        "compare-models",
        tiny_embedder,
        tiny_model,
        "--texts",
        sentences,
        "--queries",
        tmp_path / "q.jsonl",
        "--qrels",
        tmp_path / "qrels",
        "--json",
    )
    assert [line["bytes_a_vector"] for line in found["models"]] == [128, 128] and all(
        line["texts_per_second"] > 0 for line in found["models"]
    )
    assert found["models"][0]["nDCG@10"] == pytest.approx(1)


@pytest.fixture
def task(sentences, tmp_path) -> list:
    """The flags of a task of 20 queries: the first words of 20 texts, to find these."""
    rows = list(csv.DictReader(io.StringIO(sentences.read_text())))[:20]
    queries = [json.dumps({"id": row["id"], "text": " ".join(row["text"].split()[:3])}) for row in rows]
    write_lines(tmp_path / "q.jsonl", queries)
    write_lines(tmp_path / "qrels", [f"{row['id']} 0 {row['id']} 1" for row in rows])
    return ["--texts", sentences, "--queries", tmp_path / "q.jsonl", "--qrels", tmp_path / "qrels"]


def test_compare_models_keeps_the_scores_of_each_query_and_tests_what_differs(
    ok, embed, task, tiny_embedder, tiny_model, tmp_path, monkeypatch
):
    """Oracle of the scores: their means; of the test: SciPy's bootstrap of the paired differences."""
    file = tmp_path / "scores.csv"
    first = ok("compare-models", tiny_embedder, *task, "--per-query", file, "--json")
    before = file.read_bytes()
    # a model that can't be loaded ends the command before any is scored
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"x")
    code, stdout, stderr = embed("compare-models", tiny_model, broken, *task, "--per-query", file)
    assert code == 2 and str(broken) in stderr and stdout == "" and file.read_bytes() == before

    def fail(*_):
        raise UserError("the disk is full")

    # and so do ids that can't be used, before any is loaded
    with open(task[1], "a") as texts:
        texts.write("s1,another text,x,1\n")
    with monkeypatch.context() as patch:
        patch.setattr("common.search.encoder.load_encoder", fail)
        code, _, stderr = embed("compare-models", tiny_model, *task, "--per-query", file)
    assert code == 2 and "'s1'" in stderr and "not unique" in stderr, stderr
    task[1].write_text(task[1].read_text().replace("s1,another text,x,1\n", ""))
    # a model that fails later leaves the ones before it
    score_model = embed_search.score_model

    monkeypatch.setattr(embed_search, "score_model", fail)
    code, stdout, _ = embed("compare-models", tiny_embedder, tiny_model, *task, "--per-query", file, "--json")
    assert code == 2 and json.loads(stdout)["models"] == first["models"] and file.read_bytes() == before
    monkeypatch.setattr(embed_search, "score_model", score_model)
    both = ok("compare-models", tiny_embedder, tiny_model, *task, "--per-query", file, "--json")
    assert both["models"][0] == first["models"][0], "not scored again: the speed would differ"
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    values = {
        name: np.array([float(row["nDCG@10"]) for row in rows if row["model"] == str(name)])
        for name in (tiny_embedder, tiny_model)
    }
    assert [len(of_model) for of_model in values.values()] == [20, 20]
    for line, of_model in zip(both["models"], values.values()):
        assert line["nDCG@10"] == pytest.approx(of_model.mean())
    gains = values[tiny_model] - values[tiny_embedder]
    (found,) = [one for one in both["differences"] if one["measure"] == "nDCG@10"]
    assert found["difference"] == pytest.approx(gains.mean()) and found["p_holm"] == found["p"]
    theirs = bootstrap((gains,), np.mean, n_resamples=5000, method="percentile", rng=0).confidence_interval
    if theirs.low == theirs.high:  # the two models rank alike here, which leaves no interval
        assert found["interval"] is None and found["difference"] == 0
    else:
        assert found["interval"] == pytest.approx(list(theirs), abs=0.03)
    # another task: nothing of the file is taken for it, and nothing in it is lost
    ok("compare-models", tiny_embedder, *task, "--max-length", 9, "--per-query", file)
    assert len(file.read_text().splitlines()) == 1 + 3 * 20
    ok("compare-models", tiny_embedder, *task, "--query-prompt", "q: ", "--per-query", file)
    assert len(file.read_text().splitlines()) == 1 + 4 * 20


def test_compare_models_of_sentence_pairs(ok, sentences, tiny_embedder, tiny_model, tmp_path):
    texts = [row["text"] for row in csv.DictReader(io.StringIO(sentences.read_text()))]
    pairs = [(texts[n], texts[n + 20], n % 7) for n in range(20)]
    with open(tmp_path / "sts.csv", "w", newline="") as file:
        csv.writer(file).writerows([("sentence1", "sentence2", "score"), *pairs])
    flags = ["--sts", tmp_path / "sts.csv", "--json"]
    found = ok("compare-models", tiny_embedder, tiny_model, *flags, "--per-query", tmp_path / "scores.csv")
    alone = ok("evaluate", *flags)
    assert found["models"][0]["spearman"] == pytest.approx(alone["spearman"], abs=1e-9)
    (difference,) = found["differences"]
    assert difference["difference"] == pytest.approx(
        found["models"][1]["spearman"] - found["models"][0]["spearman"]
    )
    again = ok("compare-models", tiny_embedder, tiny_model, *flags, "--per-query", tmp_path / "scores.csv")
    assert again == found


def test_the_projector_reads_what_project_writes(ok, sentences, tmp_path):
    ok("index", sentences, "--index", tmp_path / "ix", "--id-column", "id")
    assert (
        ok(
            "project",
            "--index",
            tmp_path / "ix",
            "--output-dir",
            tmp_path / "board",
            "--max-points",
            50,
            "--json",
        )["texts"]
        == 50
    )
    vectors = np.loadtxt(next((tmp_path / "board").rglob("tensors.tsv")), delimiter="\t")
    metadata = [
        line.split("\t") for line in next((tmp_path / "board").rglob("metadata.tsv")).read_text().splitlines()
    ]
    assert vectors.shape == (50, 32) and len(metadata) == 51 and metadata[0] == [ID, TEXT, "id", "label", "n"]
    snapshot = open_snapshot(tmp_path / "ix")
    last = next(row for row in range(60) if snapshot.take([row])[0][ID] == metadata[-1][0])
    assert np.allclose(vectors[-1], snapshot.vectors_of([last])[0], atol=1e-6)


@pytest.mark.parametrize(
    "precision",
    ["fp32", heavy("bf16")],  # bf16 is emulated where the processor has none: slower, but as exact
)
def test_the_bundled_model(precision):
    texts = bundled.bbc_news()["text"][:300:60] + ["Interest rates rise", "x"]
    folder = bundled.model_folder("bundled/all-MiniLM-L6-v2", kind="encoder")
    oracle = SentenceTransformer(str(folder), device="cpu").encode(texts)
    encoder = load_encoder(EncoderConfig(), Runtime(torch.device("cpu"), precision))
    if precision == "fp32":
        assert np.abs(encoder.encode(texts) - oracle).max() < 1e-5
        return
    plain = encoder.encode_normalized(texts)
    assert (plain * oracle).sum(1).min() >= 0.9999
    # the weights are cast once
    assert (load_encoder(EncoderConfig(), encoder.runtime).encode_normalized(texts) == plain).all()


def test_more_hits_than_rows_are_all_rows_and_take_no_time(ok, sentences, tmp_path):
    """A place for each of a billion hits took 4 GB and minutes."""
    ok("index", sentences, "--index", tmp_path / "ix")
    for flags in ((), ("--hybrid",), ("--approximate",)):
        started = time.process_time()
        found = ok("search", "film", "--index", tmp_path / "ix", "--top-k", 10**9, "--json", *flags)
        assert len(found["queries"][0]["hits"]) == 60 and time.process_time() - started < 10


def test_json_of_rows_with_numbers_that_json_lacks(ok, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "good", "n": NaN}\n{"text": "bad", "n": Infinity}\n')
    ok("index", tmp_path / "t.jsonl", "--index", tmp_path / "ix")
    found = ok("search", "film", "--index", tmp_path / "ix", "--json")
    assert [hit["columns"] for hit in found["queries"][0]["hits"]] == [{"n": None}] * 2
