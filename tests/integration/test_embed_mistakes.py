"""A user's mistake with embed_search.py ends in one line that names it and the way out, with exit
code 2 and the index untouched.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from common.search import index
from common.search.encoder import Encoder
from conftest import limited_file_size, make_sentences, write_lines
from hub_server import HubServer

GOOD = "id,text,label\n" + "".join(
    f"s{n},{text},{label}\n" for n, (text, label) in enumerate(make_sentences(12))
)


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder but the empty lock."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="session")
def made(embed, tmp_path_factory) -> Path:
    """An index of twelve texts, and its source beside it: never written to."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "good.csv").write_text(GOOD)
    assert embed("index", folder / "good.csv", "--index", folder / "ix", "--id-column", "id")[0] == 0
    return folder


@pytest.fixture
def home(made, tmp_path) -> Path:
    """A folder with a copy of the index, and its source."""
    shutil.copytree(made, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def refused(embed, home, capfd):
    """Return a function that runs a subcommand and checks that it is refused in one line with all
    of `parts`, and that no file changes.
    """

    def check(*flags, parts: tuple[str, ...]):
        before = fingerprint(home)
        code, stdout, stderr = embed(*(str(flag).replace("HOME", str(home)) for flag in flags))
        assert code == 2, stdout + stderr
        assert re.fullmatch(r"embed_search\.py(?: [a-z-]+)?: error: [^\n]+\n", stderr), stderr
        assert [part for part in parts if part.replace("HOME", str(home)) not in stderr] == [], stderr
        assert capfd.readouterr() == ("", "")  # nor does a library write past Python's streams
        assert fingerprint(home) == before

    return check


TEXTS = {  # name: (file, content, what the line must hold)
    "blank line": ("t.txt", b"good\n \n", ("t.txt, line 2", "empty", "--skip-bad")),
    "not UTF-8": ("t.txt", b"good\nsch\xf6n\n", ("t.txt, line 2", "0xf6", "convert")),
    "empty file": ("t.txt", b"", ("t.txt", "is empty")),
    "null": (
        "t.jsonl",
        b'{"id": "a", "text": "good"}\n{"id": "b", "text": null}\n',
        ("t.jsonl, row 2", "missing", "--skip-bad"),
    ),
    "empty text": ("t.csv", b'id,text,label\na,good,x\nb," ",x\n', ("t.csv, row 2", "empty", "--skip-bad")),
    "lone surrogate": (
        "t.jsonl",
        b'{"id": "a", "text": "\\udc00"}\n',
        ("t.jsonl, line 1", "lone surrogate", "correct it"),
    ),
    "duplicate id": (
        "t.csv",
        b"id,text,label\na,good,x\na,bad,x\n",
        ("t.csv, row 2", "'a'", "occurs above", "--skip-bad"),
    ),
    "missing id": (
        "t.jsonl",
        b'{"id": "a", "text": "good"}\n{"text": "bad"}\n',
        ("t.jsonl, row 2", "'id'", "missing"),
    ),
    "an id that can't be seen": (
        "t.csv",
        "id,text,label\na,good,x\n\u200b ,bad,x\n".encode(),
        ("t.csv, row 2", "'id'", "missing"),
    ),
    "a text that can't be seen": (
        "t.csv",
        "id,text,label\na,good,x\nb,\ufeff\u200b,x\n".encode(),
        ("t.csv, row 2", "empty", "--skip-bad"),
    ),
    "a text twice in a row": (
        "t.jsonl",
        b'{"id": "a", "text": "good", "text": "bad"}\n',
        ("t.jsonl, line 1", "'text'", "'good' and 'bad'"),
    ),
    "no text column": (
        "t.csv",
        b"id,review,label\na,good,x\n",
        ("t.csv", "'text'", "review", "--text-column"),
    ),
    "no id column": ("t.csv", b"key,text,label\na,good,x\n", ("t.csv", "'id'", "key", "--id-column")),
    "ids that are fractions": (
        "t.jsonl",
        b'{"id": 1.5, "text": "good", "label": "x"}\n',
        ("t.jsonl", "'id'", "double", "--id-column"),
    ),
    "numbers for texts": (
        "t.jsonl",
        b'{"id": "a", "text": 1, "label": "x"}\n',
        ("t.jsonl", "'text'", "int64", "--text-column"),
    ),
    "a column of another kind": (
        "t.jsonl",
        b'{"id": "a", "text": "good", "label": ["x"]}\n',
        ("t.jsonl", "'label'", "list", "string", "--index"),
    ),
    "the index's own column": (
        "t.csv",
        b"id,text,_index_vector\na,good,1\n",
        ("t.csv", "'_index_vector'", "rename"),
    ),
    "changed text": (
        "t.csv",
        b"id,text,label\nx,new,x\ns3,changed,neg\n",
        ("t.csv, row 2", "'s3'", "--update"),
    ),
    "unknown ending": ("t.xlsx", b"PK\xff\xff", ("t.xlsx", "0xff", "UTF-8")),
    "broken Parquet": ("t.parquet", b"PAR1 and no more", ("t.parquet", "not readable as parquet")),
    "ragged CSV": ("t.csv", b"id,text,label\na,good,x\nb,c,d,e,f\n", ("t.csv", "line 3")),
}


@pytest.mark.parametrize("name, content, parts", TEXTS.values(), ids=TEXTS)
def test_texts_that_can_not_be_indexed(name, content, parts, refused, home, tmp_path):
    (tmp_path / name).write_bytes(content)
    id_column = () if name.endswith(".txt") or name == "t.xlsx" else ("--id-column", "id")
    index = "HOME/ix" if id_column else "HOME/new"
    refused("index", tmp_path / name, "--index", index, *id_column, parts=parts)
    assert not (home / "new").exists()


FLAGS = {
    "seconds beyond any clock": (
        ["search", "x", "--index", "HOME/ix", "--where", "label = 'pos'", "--where-seconds", "1e300"],
        ("--where-seconds", "'1e300'", "at most 1e6"),
    ),
    "a wait beyond any clock": (
        ["index", "HOME/good.csv", "--index", "HOME/ix", "--wait", "1e300"],
        ("--wait", "'1e300'", "1e6"),
    ),
    "hits beyond any count": (
        ["search", "x", "--index", "HOME/ix", "--top-k", "9" * 400],
        ("--top-k", "below 2**31"),
    ),
    "no such texts": (["index", "nowhere.txt", "--index", "HOME/ix"], ("nowhere.txt", "can't be read")),
    "no such data file": (["index", "nowhere.csv", "--index", "HOME/ix"], ("nowhere.csv", "no such file")),
    "unknown bundled set": (
        ["index", "bundled/nope", "--index", "HOME/ix"],
        ("bundled/nope", "bundled/bbc-news"),
    ),
    "a folder that is something else": (
        ["index", "HOME/good.csv", "--index", "HOME"],
        ("HOME", "holds other files", "new folder"),
    ),
    "a file for an index": (
        ["index", "HOME/good.csv", "--index", "HOME/good.csv"],
        ("HOME/good.csv", "is a file"),
    ),
    "search in no index": (
        ["search", "--index", "HOME", "x"],
        ("HOME", "not an index", "embed_search.py index"),
    ),
    "search nowhere": (
        ["search", "--index", "HOME/nope", "x"],
        ("HOME/nope", "no such folder", "embed_search.py index"),
    ),
    "delete from no index": (["delete", "--index", "HOME/nope", "x"], ("HOME/nope", "no such folder")),
    "compact no index": (["compact", "--index", "HOME"], ("HOME", "no index")),
    "other ids": (
        ["index", "HOME/good.csv", "--index", "HOME/ix", "--id-column", "label", "--skip-bad"],
        ("HOME/ix", "id_column id", "label"),
    ),
    "chunks into whole texts": (
        ["index", "HOME/good.csv", "--index", "HOME/ix", "--chunk"],
        ("HOME/ix", "made without --chunk, not with chunk_overlap 32", "--chunk and"),
    ),
    "another length": (
        ["search", "--index", "HOME/ix", "x", "--max-length", "32"],
        ("HOME/ix", "max_length 64, not with max_length 32"),
    ),
    "another model": (
        ["search", "--index", "HOME/ix", "x", "--model", "bundled/all-MiniLM-L6-v2"],
        ("HOME/ix", "fingerprint", "tiny-embedder", "--model"),
    ),
    "no such model": (
        ["search", "--index", "HOME/ix", "x", "--model", "./nope"],
        ("--model ./nope", "no such folder"),
    ),
    "max length above the model": (
        ["index", "HOME/good.csv", "--index", "HOME/new", "--max-length", "65"],
        ("--max-length 65", "64"),
    ),
    "empty query": (["search", "--index", "HOME/ix", " "], ("query 1", "empty")),
    "surrogate query": (["search", "--index", "HOME/ix", "a\udc80"], ("query 1", "not UTF-8")),
    "no such column beside hits": (
        ["search", "--index", "HOME/ix", "x", "--keep-columns", "label,price"],
        ("--index HOME/ix", "no column 'price' among id, label", "--keep-columns"),
    ),
    "no such column beside what is liked": (
        ["like", "s1", "--index", "HOME/ix", "--keep-columns", "price"],
        ("no column 'price' among id, label", "--keep-columns"),
    ),
    "no such column of texts": (
        ["search", "HOME/good.csv", "--query", "x", "--keep-columns", "price"],
        ("HOME/good.csv", "no column 'price' among id, label", "--keep-columns"),
    ),
    "no such file of queries": (
        ["search", "--index", "HOME/ix", "--queries", "HOME/nope"],
        ("HOME/nope", "can't be read"),
    ),
    "queries twice": (
        ["search", "--index", "HOME/ix", "x", "--queries", "HOME/nope"],
        ("--queries", "either"),
    ),
    "where compares texts with a number": (
        ["search", "--index", "HOME/ix", "x", "--where", "label > 3"],
        ("VARCHAR", "label holds texts", "CAST(replace(label, ',', '.') AS DOUBLE) > 3"),
    ),
    "where on no column": (
        ["search", "--index", "HOME/ix", "x", "--where", "year = 1"],
        ("--where", "year", "label"),
    ),
    "where without sense": (
        ["search", "--index", "HOME/ix", "x", "--where", "label ="],
        ("--where", "label =", "condition"),
    ),
    "where that reads a file": (
        [
            "search",
            "--index",
            "HOME/ix",
            "x",
            "--where",
            "(select count(*) from read_text('/etc/passwd')) > 0",
        ],
        ("--where", "/etc/passwd"),
    ),
    "where that does something": (
        ["delete", "--index", "HOME/ix", "--where", "true; drop table x"],
        ("--where", "drop table"),
    ),
    "unknown id": (
        ["delete", "--index", "HOME/ix", "s1", "nope"],
        ("HOME/ix", "'nope'", "nothing is deleted"),
    ),
    "delete an id that is not UTF-8": (
        ["delete", "--index", "HOME/ix", "s1", "a\udc80"],
        ("id 2", "not UTF-8"),
    ),
    "where that is not UTF-8": (
        ["delete", "--index", "HOME/ix", "--where", "label = '\udc80'"],
        ("--where", "UTF-8", "write a condition over _index_id, _index_text"),
    ),
    "a model to compact": (["compact", "--index", "HOME/ix", "--model", "x"], ("--model x", "--help")),
    "a seed to delete": (["delete", "--index", "HOME/ix", "s1", "--seed", "1"], ("--seed 1", "--help")),
    "texts to search and no query there": (["search"], ("--index", "--query")),
    "a language without words": (
        ["search", "--index", "HOME/ix", "x", "--language", "de"],
        ("--language de", "--hybrid"),
    ),
    "no such language": (
        ["search", "--index", "HOME/ix", "x", "--hybrid", "--language", "xx"],
        ("--language", "'xx'", "de"),
    ),
    "a score that is none": (
        ["search", "--index", "HOME/ix", "x", "--min-score", "nan"],
        ("--min-score", "'nan'"),
    ),
    "show what is not there": (
        ["show", "nope", "--index", "HOME/ix"],
        ("HOME/ix", "'nope'", "embed_search.py list"),
    ),
    "like what is not there": (
        ["like", "s1", "nope", "--index", "HOME/ix"],
        ("HOME/ix", "'nope'", "embed_search.py list"),
    ),
    "like and dislike one": (
        ["like", "s1", "--unlike", "s1", "--index", "HOME/ix"],
        ("--unlike s1", "liked"),
    ),
    "dedupe into what is there": (
        ["dedupe", "HOME/good.csv", "--output", "HOME/good.csv"],
        ("--output", "HOME/good.csv", "it exists"),
    ),
    "dedupe into no format": (
        ["dedupe", "HOME/good.csv", "--output", "HOME/new.xlsx"],
        ("--output", "HOME/new.xlsx", ".jsonl, .csv, .parquet"),
    ),
    "vectors into no format": (
        ["similarity", "HOME/good.csv", "--output", "HOME/new.csv"],
        ("--output", "HOME/new.csv", ".npy"),
    ),
    "sync without its source": (
        ["sync", "HOME/nope.csv", "--index", "HOME/ix"],
        ("HOME/nope.csv", "no such file"),
    ),
    "a model to compare by flag": (
        ["compare-models", "x", "--model", "y"],
        ("--model y", "leave --model out"),
    ),
    "pairs and judgements": (
        ["evaluate", "--sts", "HOME/good.csv", "--index", "HOME/ix"],
        ("--sts", "--index", "leave"),
    ),
    "delete nothing": (["delete", "--index", "HOME/ix"], ("either ids or --where",)),
    "texts and index": (
        ["pairs", "HOME/good.csv", "--index", "HOME/ix"],
        ("either texts or --index", "both"),
    ),
    "neither texts nor index": (["pairs"], ("either texts or --index", "neither")),
    "too few texts": (
        ["pairs", "--index", "HOME/ix", "--where", "id = 's1'"],
        ("1 texts", "at least 2", "--where"),
    ),
    "too many clusters": (
        ["cluster", "--index", "HOME/ix", "--num-clusters", "13"],
        ("--num-clusters 13", "12 texts"),
    ),
    "a way to keep vectors, of sentence pairs": (
        ["evaluate", "--sts", "HOME/good.csv", "--store", "int8"],
        ("--store int8", "--sts HOME/good.csv", "leave it out"),
    ),
    "a language of sentence pairs": (
        ["evaluate", "--sts", "HOME/good.csv", "--language", "de"],
        ("--language de", "--sts HOME/good.csv", "leave it out"),
    ),
    "a depth of sentence pairs": (
        ["evaluate", "--sts", "HOME/good.csv", "--rerank-depth", "5"],
        ("--rerank-depth 5", "--sts HOME/good.csv", "leave it out"),
    ),
    "queries of sentence pairs": (
        ["compare-models", "HOME/nope", "--sts", "HOME/good.csv", "--queries", "HOME/good.csv"],
        ("--queries HOME/good.csv", "--sts HOME/good.csv", "leave it out"),
    ),
    "texts of sentence pairs": (
        ["compare-models", "HOME/nope", "--sts", "HOME/good.csv", "--texts", "HOME/good.csv", "a.txt"],
        ("--texts HOME/good.csv a.txt", "--sts HOME/good.csv", "leave it out"),
    ),
    "columns of no sentence pairs": (
        ["evaluate", "--sts-columns", "a", "b", "c"],
        ("--sts-columns a b c", "--sts FILE", "leave it out"),
    ),
    "a column that sentence pairs lack": (
        ["evaluate", "--sts", "HOME/good.csv", "--sts-columns", "text", "label", "score"],
        ("HOME/good.csv", "'score'", "--sts-columns"),
    ),
    "a depth of no reranker": (
        ["search", "--index", "HOME/ix", "x", "--rerank-depth", "5"],
        ("--rerank-depth 5", "--rerank", "leave it out"),
    ),
    "a column of texts of an index": (
        ["pairs", "--index", "HOME/ix", "--text-column", "body"],
        ("--text-column body", "TEXTS", "leave it out"),
    ),
    "columns of the texts of an index": (
        ["evaluate", "--index", "HOME/ix", "--queries", "HOME/good.csv", "--qrels", "HOME/good.csv"]
        + ["--columns", "id,text"],
        ("--columns id,text", "TEXTS", "leave it out"),
    ),
    "clusters in a column of texts": (
        ["cluster", "--index", "HOME/ix", "--num-clusters", "2", "--column", "label"],
        ("--column label", "HOME/ix", "'label'", "another --column"),
    ),
    "clusters in a column of our own": (
        ["cluster", "--index", "HOME/ix", "--num-clusters", "2", "--column", "_index_id"],
        ("--column _index_id", "our own"),
    ),
    "clusters in a column of no index": (
        ["cluster", "HOME/good.csv", "--num-clusters", "2", "--column", "topic"],
        ("--column topic", "--index", "--output"),
    ),
    "stop words of nowhere": (
        ["cluster", "--index", "HOME/ix", "--hdbscan", "--stop-words", "HOME/nope"],
        ("HOME/nope", "can't be read"),
    ),
    "stop words that nobody knows": (
        ["cluster", "--index", "HOME/ix", "--hdbscan", "--stop-words", "th"],
        ("no stop words of Thai", "name a file"),
    ),
    "a size that k-means has not": (
        ["cluster", "--index", "HOME/ix", "--num-clusters", "2", "--min-size", "3"],
        ("--min-size 3", "--hdbscan"),
    ),
    "measures that stop nowhere": (["evaluate", "--at", "0"], ("--at", "'0'")),
    "clusters of no kind": (["cluster", "--index", "HOME/ix"], ("--num-clusters", "--threshold", "required")),
    "threshold 2": (
        ["duplicates", "--index", "HOME/ix", "--threshold", "2"],
        ("--threshold", "'2'", "-1 to 1"),
    ),
    "threshold nan": (["duplicates", "--index", "HOME/ix", "--threshold", "nan"], ("--threshold", "'nan'")),
    "top-k 0": (["search", "--index", "HOME/ix", "x", "--top-k", "0"], ("--top-k", "'0'")),
    "figure nowhere": (
        ["similarity", "--index", "HOME/ix", "--figure", "HOME/no/x.png"],
        ("--figure", "HOME/no/x.png", "name one in a folder"),
    ),
    "figure of no kind": (
        ["similarity", "--index", "HOME/ix", "--figure", "HOME/x.txt"],
        ("--figure", "HOME/x.txt", "name a .png"),
    ),
    "pairs file nowhere": (
        ["duplicates", "--index", "HOME/ix", "--pairs-file", "HOME/no/x.csv"],
        ("--pairs-file", "HOME/no/x.csv"),
    ),
    "overlap without room": (
        ["index", "HOME/good.csv", "--index", "HOME/new", "--chunk-overlap", "62"],
        ("--chunk-overlap 62", "62 tokens"),
    ),
    "a file of pairs that holds something else": (
        ["duplicates", "--index", "HOME/ix", "--pairs-file", "HOME/good.csv"],
        ("--pairs-file", "HOME/good.csv", "something else", "new file"),
    ),
    "a device for the pairs": (
        ["duplicates", "--index", "HOME/ix", "--pairs-file", "/dev/full"],
        ("--pairs-file", "/dev/full", "device", "name a file"),
    ),
    "a column of pairs twice": (
        ["evaluate", "--sts", "HOME/good.csv", "--sts-columns", "text", "text", "id"],
        ("--sts-columns text text id", "twice"),
    ),
    "queries without judgements": (["evaluate", "--queries", "HOME/good.csv"], ("--queries and --qrels",)),
    "evaluate an index without a task": (
        ["evaluate", "--index", "HOME/ix"],
        ("--index HOME/ix", "--queries and --qrels", "bundled task"),
    ),
    "evaluate texts without a task": (
        ["evaluate", "--texts", "HOME/good.csv"],
        ("--texts HOME/good.csv", "--queries and --qrels"),
    ),
    "project nothing": (
        ["project", "--index", "HOME/ix", "--where", "id = 'no'", "--output-dir", "HOME/board"],
        ("0 texts", "at least 1", "--where"),
    ),
    "similarity of nothing": (
        ["similarity", "--index", "HOME/ix", "--where", "id = 'no'"],
        ("0 texts", "at least 1", "--where"),
    ),
    "project over files": (
        ["project", "--index", "HOME/ix", "--output-dir", "HOME"],
        ("HOME", "holds other files"),
    ),
    "no subcommand": (["look"], ("'look'", "similarity", "index")),
    "unknown flag": (["compact", "--index", "HOME/ix", "--fast"], ("--fast", "--help")),
    "reranker without a model": (
        ["search", "--index", "HOME/ix", "x", "--rerank", "./nope"],
        ("--rerank ./nope", "no such folder", "of the Hub, such as cross-encoder/ms-marco"),
    ),
    "a bundled encoder as a reranker": (
        ["search", "--index", "HOME/ix", "x", "--rerank", "bundled/all-MiniLM-L6-v2"],
        ("no such bundled cross-encoder", "such as cross-encoder/ms-marco"),
    ),
    "a reranker without a network": (
        ["search", "--index", "HOME/ix", "x", "--rerank", "nobody/nothing"],
        ("--rerank nobody/nothing", "Hub can't be reached", "use a local folder of a cross-encoder\n"),
    ),
}


@pytest.mark.parametrize("flags, parts", FLAGS.values(), ids=FLAGS)
def test_flags_that_can_not_be_used(flags, parts, refused):
    refused(*flags, parts=parts)


def test_a_matrix_that_is_too_large_is_refused_before_encoding(refused, tmp_path, monkeypatch):
    (tmp_path / "many.txt").write_text("text\n" * 5001)
    monkeypatch.setattr("common.search.encoder.load_encoder", None)
    refused("similarity", tmp_path / "many.txt", parts=("5,001 texts", "5,000", "use pairs"))


@pytest.mark.parametrize("pattern", ["segment-*", "manifest.json"])
def test_a_damaged_file_of_the_index(pattern, refused, home):
    path = next((home / "ix").glob(pattern))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for command in (["search", "x"], ["index", "HOME/good.csv"], ["delete", "s1"], ["compact"], ["pairs"]):
        refused(command[0], "--index", "HOME/ix", *command[1:], parts=(path.name, "damaged", "restore it"))


@pytest.mark.parametrize(
    "where, number, line, parts",
    [
        ("queries", 2, "not JSON", ("q.jsonl, line 2", "not a query")),
        ("queries", 2, '{"id": "a", "text": "x"}', ("q.jsonl, line 2", "occurs above")),
        ("queries", 2, '{"id": "b", "text": ""}', ("q.jsonl, line 2", "empty")),
        ("qrels", 1, "a s1", ("qrels, line 1", "TREC or BEIR")),
        ("qrels", 1, "a s1 high", ("qrels, line 1", "TREC or BEIR")),
        ("qrels", 1, "zz 0 s1 1", ("qrels, line 1", "'zz'")),
        ("qrels", 1, "a 0 s1 --5", ("qrels, line 1", "whole number")),
        ("qrels", 1, "a 0 s1 ²", ("qrels, line 1", "whole number")),
        ("qrels", 2, "a 0 s1 2", ("qrels, line 2", "'a' and 's1'", "another relevance", "remove")),
        ("qrels", 1, "a 0 nowhere 1", ("q.jsonl", "none of the 1", "'nowhere'")),
    ],
)
def test_queries_and_judgements_that_can_not_be_used(where, number, line, parts, refused, tmp_path):
    files = {"queries": ['{"id": "a", "text": "good"}', '{"id": "b", "text": "bad"}'], "qrels": ["a 0 s1 1"]}
    files[where][number - 1 : number] = [line]
    for name, file in (("queries", "q.jsonl"), ("qrels", "qrels")):
        (tmp_path / file).write_text("\n".join(files[name]) + "\n")
    refused(
        "evaluate",
        "--index",
        "HOME/ix",
        "--queries",
        tmp_path / "q.jsonl",
        "--qrels",
        tmp_path / "qrels",
        parts=parts,
    )


def test_a_vector_that_is_nan_is_named_or_passed_over(embed, refused, home, tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("id,text,label\na,fine,x\nb,ruined,x\nc,great,x\n")
    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder,
        "encode",
        lambda self, texts, role=None: np.where(
            np.array([["ruined" in text] for text in texts]),
            np.float32("nan"),
            encode(self, texts, role=role),
        ),
    )
    flags = ("index", tmp_path / "t.csv", "--index", home / "ix", "--id-column", "id")
    refused(*flags, parts=("t.csv, row 2", "NaN", "0 texts of earlier blocks", "--skip-bad"))
    code, stdout, stderr = embed(*flags, "--skip-bad", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["rows"] == 14 and json.loads(stdout)["counts"]["bad"] == 1
    code, _, stderr = embed("index", *flags[1:3], home / "new", *flags[4:], "--block", 1)
    assert code == 2 and "1 texts of earlier blocks were committed" in stderr


def test_a_full_disk_is_said_without_flags_that_are_not_there(refused, tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("id,text,label\na,fine,x\n")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(index, "write_arrow", lambda *_: (_ for _ in ()).throw(full))
    refused(
        "index",
        tmp_path / "t.csv",
        "--index",
        "HOME/ix",
        "--id-column",
        "id",
        parts=("--index HOME/ix", "No space left", "same command"),
    )


@pytest.mark.parametrize("largest", [2000, 20_000], ids=["rows", "manifest"])
def test_the_same_command_makes_a_new_index_after_a_disk_that_was_full(largest, embed, ok, tmp_path):
    """What was written before the first commit would be files of no index."""
    texts, ix = write_lines(tmp_path / "t.txt", ["good", "bad"]), tmp_path / "ix"
    flags = ("index", texts, "--index", ix, "--document-prompt", "x" * 30_000)  # which the manifest holds
    with limited_file_size(largest):
        code, _, stderr = embed(*flags)
    assert code == 2 and "ulimit -f" in stderr and not list(ix.iterdir())
    ok(*flags)
    before = sorted(ix.iterdir())
    with limited_file_size(largest):
        code, _, stderr = embed("delete", "--index", ix, "--where", "_index_text = 'bad'")
    assert code == 2 and not list(ix.glob("manifest.json.*"))
    ok("verify", "--index", ix)
    ok("delete", "--index", ix, "--where", "_index_text = 'bad'")  # which clears away what was left
    assert len(list(ix.iterdir())) == len(before) + 1


def test_a_folder_that_is_no_index_is_refused_before_anything_is_read(refused, monkeypatch):
    monkeypatch.setattr("common.search.encoder.load_encoder", None)
    refused("index", "HOME/nowhere.csv", "--index", "HOME", parts=("HOME", "holds other files"))


def test_skip_bad_goes_on_and_counts(embed, home, tmp_path):
    (tmp_path / "t.jsonl").write_bytes(
        b'{"id": "a", "text": "good", "label": "x"}\n{"id": "b", "text": " ", "label": "x"}\n{"id": "a",'
        b' "text": "z", "label": "x"}\n{"id": "c", "text": "\\ud800", "label": "x"}\n{"id": "d", "text":'
        b' "sch\xf6n", "label": "x"}\n'
    )
    code, stdout, stderr = embed(
        "index", tmp_path / "t.jsonl", "--index", home / "ix", "--id-column", "id", "--skip-bad", "--json"
    )
    assert code == 0, stderr
    found = json.loads(stdout)
    assert found["rows"] == 13 and (found["counts"]["added"], found["counts"]["bad"]) == (1, 4)
    assert "4 skipped" in stderr and "row 2: the text is empty" in stderr


def test_columns_that_differ_only_in_case(refused, home, embed, tmp_path):
    (tmp_path / "t.csv").write_text("text,Label,label\ngood,1,2\nbad,2,1\n")
    assert embed("index", tmp_path / "t.csv", "--index", home / "twins")[0] == 0
    refused(
        "delete", "--index", "HOME/twins", "--where", "label = 1", parts=("--where", "Label, label", "case")
    )
    assert embed("search", "--index", home / "twins", "good", "--where", "_index_text = 'good'")[0] == 0


@pytest.mark.parametrize(
    "rows, part", [("good,fine,1 bad,film,1", "human scores"), ("good,fine,1 good,fine,2", "cosines")]
)
def test_scores_without_a_correlation(rows, part, refused, tmp_path):
    (tmp_path / "sts.csv").write_text("\n".join(["sentence1,sentence2,score", *rows.split()]) + "\n")
    refused("evaluate", "--sts", tmp_path / "sts.csv", parts=("sts.csv", part, "all equal"))


def test_scores_with_a_comma_before_the_decimals(refused, embed, tmp_path):
    rows = ["sentence1 sentence2 score", "good fine 4,5", "bad film 1", "bad fine 2,5"]
    path = write_lines(tmp_path / "sts.tsv", [row.replace(" ", "\t") for row in rows])
    refused("evaluate", "--sts", path, parts=("'score' does not hold numbers", "--decimal ,"))
    assert embed("evaluate", "--sts", path, "--decimal", ",")[0] == 0
    path.write_text(path.read_text().replace("4,5", "much"))
    refused("evaluate", "--sts", path, parts=("'score' does not hold numbers;", "--sts-columns"))


def test_a_name_that_the_hub_lacks(refused, tmp_path, monkeypatch):
    (tmp_path / "hub" / "models").mkdir(parents=True)
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("common.hub.is_reachable", lambda: True)
        refused(
            "index",
            "HOME/good.csv",
            "--index",
            "HOME/new",
            "--model",
            "some/nope",
            parts=("--model some/nope", "Hub", "bundled/all-MiniLM-L6-v2"),
        )


def test_a_cross_encoder_with_several_outputs(refused, tiny_model):
    refused(
        "search",
        "--index",
        "HOME/ix",
        "x",
        "--rerank",
        tiny_model,
        parts=("--rerank", "2 scores", "cross-encoder/ms-marco-MiniLM-L6-v2"),
    )


def test_a_cross_encoder_is_no_sentence_encoder(refused, tiny_model, tmp_path):
    """Its mean pooling would give numbers, which mean nothing."""
    shutil.copytree(tiny_model, tmp_path / "ranker")
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (tmp_path / "ranker" / "config.json").write_text(json.dumps(config))
    refused(
        *("index", "HOME/good.csv", "--index", "HOME/new", "--model", tmp_path / "ranker"),
        parts=("ranker", "cross-encoder", "BertForSequenceClassification", "one label", "--rerank"),
    )


def test_a_prompt_that_is_not_utf8(refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"sch\xf6n\n"), encoding="utf-8"))
    refused("search", "--index", "HOME/ix", parts=("standard input", "0xf6", "convert"))


def test_queries_in_another_encoding(embed, home):
    """The line that refuses them names a flag, which then helps."""
    (home / "q.txt").write_text("schön\n", encoding="utf-16")
    flags = ("search", "--index", home / "ix", "--queries", home / "q.txt", "--json")
    code, _, stderr = embed(*flags)
    assert code == 2 and "--encoding utf-16" in stderr
    code, stdout, stderr = embed(*flags, "--encoding", "utf-16")
    assert (code, stderr) == (0, "") and json.loads(stdout)["queries"][0]["query"] == "schön"


@pytest.mark.parametrize(
    "command, flag, name",
    [
        (["duplicates", "--threshold", "0.1"], "--pairs-file", "pairs.csv"),
        (["similarity"], "--figure", "map.png"),
        (["project"], "--output-dir", "projection"),
    ],
)
def test_a_limit_of_file_size_names_the_file_and_a_picture_stays_whole(
    command, flag, name, embed, home, tmp_path
):
    path = tmp_path / name
    if name == "map.png":
        path.write_text("the picture before")
    with limited_file_size(200):
        code, _, stderr = embed(*command, "--index", home / "ix", flag, path)
    assert code == 2 and stderr.count("error:") == 1 and str(path) in stderr and "ulimit -f" in stderr
    if name == "map.png":
        assert path.read_text() == "the picture before"
        assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [name]


def test_a_query_that_is_left_out_has_no_hits(embed, refused, home, monkeypatch):
    """One blank line, and one that is not UTF-8, end nothing with --skip-bad."""
    content = b"good\n\nsch\xf6n\nbad\n"
    flags = ["search", "--index", "HOME/ix", "--top-k", "2", "--queries"]
    (home / "q.txt").write_bytes(content)
    refused(*flags, "HOME/q.txt", parts=("q.txt, line 2", "empty", "--skip-bad"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    refused(*flags, "-", parts=("standard input, line 2", "empty", "--skip-bad"))
    flags[2] = home / "ix"
    code, stdout, stderr = embed(*flags, home / "q.txt", "--skip-bad", "--json")
    found = json.loads(stdout)["queries"]
    assert code == 0 and [bool(one["hits"]) for one in found] == [True, False, False, True]
    assert "2 skipped" in stderr and "q.txt, line 2" in stderr
    shown = embed(*flags, home / "q.txt", "--skip-bad")[1]
    assert "(none)" not in shown and shown.count("query:") == 2
    [alone] = json.loads(embed("search", *flags[1:-1], "bad", "--json")[1])["queries"]
    assert [hit["id"] for hit in found[3]["hits"]] == [hit["id"] for hit in alone["hits"]]
    (home / "q.txt").write_bytes(b"\n \n")
    refused(
        "search",
        "--index",
        "HOME/ix",
        "--queries",
        "HOME/q.txt",
        "--skip-bad",
        parts=("none of its queries",),
    )


QUERY_FILES = {  # name: (content, flags)
    "q.csv": ("id,text\n7,good\n8,bad\n", []),
    "q.jsonl": ('{"_id": "7", "text": "good"}\n{"_id": "8", "text": "bad"}\n', []),
    "q.tsv": ("question\tid\ngood\t7\nbad\t8\n", ["--text-column", "question"]),
}


@pytest.mark.parametrize("name", QUERY_FILES)
def test_queries_come_from_a_column(name, embed, home, tmp_path):
    content, flags = QUERY_FILES[name]
    (tmp_path / name).write_text(content)
    found = embed("search", "--index", home / "ix", "--queries", tmp_path / name, *flags, "--json")
    assert found[0] == 0 and found[2] == "", found
    assert [one["query"] for one in json.loads(found[1])["queries"]] == ["good", "bad"]


def test_a_column_of_queries_that_can_not_be_used(refused, embed, home, tmp_path):
    (tmp_path / "q.csv").write_text("id,question\n7,good\n8,\n")
    (tmp_path / "t.csv").write_text("body\ngood film\n")
    index, queries = ("--index", "HOME/ix"), ("--queries", tmp_path / "q.csv")
    texts, problem = (tmp_path / "t.csv", "--text-column", "body"), "no column 'text' among id, question"
    refused("search", *index, *queries, parts=("q.csv", problem, "--text-column"))
    refused("search", *texts, *queries, parts=("q.csv", problem, "rename"))
    own = ("--text-column", "question")
    refused("search", *index, *queries, *own, parts=("q.csv, row 2", "empty", "--skip-bad"))
    flags = ("--index", home / "ix", *queries, *own, "--skip-bad", "--json")
    code, stdout, stderr = embed("search", *flags)
    assert code == 0 and "1 skipped" in stderr, stderr
    assert [bool(one["hits"]) for one in json.loads(stdout)["queries"]] == [True, False]
