"""The columns of an index that come and go and grow wider, and files as others write them: against
a dictionary, brute force, and the values as they stand in the files.
"""

import csv
import io
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.search import texts
from common.search.builder import Builder, fill, settings_of
from common.search.encoder import Encoder
from common.search.index import open_snapshot, open_store
from common.search.segments import ID, TEXT, wider
from common.search.selection import matching
from conftest import StubEncoder, write_lines

NAMES = ("n", "code", "more")
VALUES = {
    "n": st.none() | st.integers(-3, 3) | st.sampled_from([0.5, 2.0]),
    "code": st.none() | st.sampled_from(["a", "7", "é"]),
    "more": st.none() | st.booleans(),
}


def put(folder: Path, rows: list[dict], *, update: bool) -> None:
    """Write rows of JSON to an index."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    text = table["text"].cast(pa.large_string())
    table = table.drop_columns(["text"]).append_column(TEXT, text)
    encoder = StubEncoder()
    with open_store(folder, settings=settings_of(encoder, id_column="key", chunk_overlap=None)) as opened:
        fill(Builder(opened, encoder, update=update), texts.Collection("rows", table, "row", {}), block=3)


class Columns(RuleBasedStateMachine):
    """Does to an index and to a dictionary the same, with columns that some rows lack."""

    @initialize()
    def start(self):
        self.folder, self.expected = Path(tempfile.mkdtemp()) / "index", {}

    def teardown(self):
        shutil.rmtree(self.folder.parent)

    keys = st.lists(st.integers(0, 9).map(str), unique=True, min_size=1, max_size=6)

    @rule(keys=keys, names=st.sets(st.sampled_from(NAMES)), data=st.data())
    def add(self, keys, names, data):
        rows = [{"key": key, **{name: data.draw(VALUES[name]) for name in sorted(names)}} for key in keys]
        put(self.folder, [{**row, "text": f"text {row['key']}"} for row in rows], update=True)
        put(self.folder, [{**row, "text": f"text {row['key']}"} for row in rows], update=False)  # unchanged
        self.expected |= {row["key"]: row for row in rows}

    @rule()
    def compact(self):
        if self.expected:
            with open_store(self.folder) as opened:
                opened.compact()

    @invariant()
    def is_the_dictionary(self):
        if not self.expected:
            return
        snapshot = open_snapshot(self.folder)
        rows = np.flatnonzero(snapshot.is_live())
        found = {row[ID]: row for row in snapshot.take(rows)}
        assert found.keys() == self.expected.keys()
        for key, row in self.expected.items():
            assert {name: found[key].get(name) for name in NAMES} == {name: row.get(name) for name in NAMES}


Columns.TestCase.settings = settings(max_examples=20, stateful_step_count=8)
test_columns_are_a_dictionary = Columns.TestCase


def values(folder: Path, name: str) -> list:
    snapshot = open_snapshot(folder)
    found = {row[ID]: row[name] for row in snapshot.take(np.flatnonzero(snapshot.is_live()))}
    return [found[key] for key in sorted(found)]


def where(folder: Path, condition: str) -> set[str]:
    snapshot = open_snapshot(folder)
    return {row[ID] for row in snapshot.take(np.flatnonzero(matching(snapshot, condition)), [ID])}


FILES = [  # one after the other into one index: (name, content)
    ("a.csv", "id,text,year,code,blank\na1,one,2003,A12,\na2,two,,007,\n"),
    ("b.csv", "id,text,year,code,blank\nb1,three,2004.5,12,\n"),
    ("c.csv", "id,text,code,new\nc1,four,1.50,7\n"),
    ("d.jsonl", '{"id": "d1", "text": "five", "year": 2007, "code": 99}\n'),
    ("e.csv", "id,text,year,code,blank\ne1,six,,,now\n"),
]


def test_files_one_after_the_other_fill_widen_and_keep_what_is_written(ok, embed, tmp_path):
    index = ("--index", tmp_path / "ix")
    for name, content in FILES:
        (tmp_path / name).write_text(content)
        ok("index", tmp_path / name, *index, "--id-column", "id")
    for name, content in FILES:  # nothing has changed, although its columns are others now
        counts = ok("index", tmp_path / name, *index, "--json")["counts"]
        assert (counts["unchanged"], counts["added"]) == (content.count("\n") - (".csv" in name), 0)
    ix = tmp_path / "ix"
    assert values(ix, "year") == [2003, None, 2004.5, None, 2007, None]
    assert values(ix, "code") == ["A12", "007", "12", "1.50", "99", None]
    assert values(ix, "new") == [None, None, None, 7, None, None]
    assert values(ix, "blank") == [None] * 5 + ["now"]
    assert where(ix, "year > 2003") == {"b1", "d1"} and where(ix, "year IS NULL") == {"a2", "c1", "e1"}
    assert where(ix, "blank IS NOT NULL") == {"e1"} and where(ix, "code = '007'") == {"a2"}
    ok("compact", *index)
    assert values(ix, "year") == [2003, None, 2004.5, None, 2007, None] and where(ix, "new = 7") == {"c1"}
    (tmp_path / "f.csv").write_text("id,text,year\nf1,seven,soon\n")
    code, _, stderr = embed("index", tmp_path / "f.csv", *index)
    assert code == 2 and "'year' is string, in the index it is double" in stderr
    # all of them in one command are the same rows
    ok("index", *(tmp_path / name for name, _ in FILES), "--index", tmp_path / "at-once", "--id-column", "id")
    for name in ("year", "code", "new", "blank"):
        assert values(tmp_path / "at-once", name) == values(ix, name)


@pytest.fixture
def prices(tmp_path):
    """A file whose numbers have a comma before their decimals, and codes that may look so too."""
    path = tmp_path / "prices.csv"
    path.write_text('id,text,price,code\na,good,"1,5",A12\nb,bad,"12,25","1,5"\nc,rain,3,\n')
    return path


def test_an_index_with_decimal_commas_as_texts_says_that_they_stay_so(ok, embed, prices, tmp_path):
    """As following the advice with --update would change nothing."""
    index, folder = ("--index", tmp_path / "ix", "--id-column", "id"), tmp_path / "ix"
    ok("index", prices, *index)
    advice = "index them with --decimal , into a new --index, or write CAST("
    code, _, stderr = embed("search", "--index", folder, "film", "--where", "price > 2")
    assert code == 2 and advice in stderr, stderr
    for command in (("index", prices, *index, "--update"), ("sync", prices, *index)):
        code, _, stderr = embed(*command, "--decimal", ",")
        assert code == 2 and stderr.count("\n") == 1
        assert "--decimal ,: the index holds the numbers of column 'price' as texts" in stderr
        assert "into a new --index" in stderr
    ok("index", prices, "--index", tmp_path / "new", "--id-column", "id", "--decimal", ",")
    assert where(tmp_path / "new", "price > 2") == {"b", "c"}
    # codes are texts, with the flag too
    few = write_lines(tmp_path / "few.csv", ["id,text,code", 'd,snow,"2,5"'])
    ok("index", few, "--index", tmp_path / "new", "--decimal", ",")
    assert values(tmp_path / "new", "code") == ["A12", "1,5", None, "2,5"]


def test_decimal_commas_without_the_flag_of_the_index_name_it(ok, embed, prices, tmp_path):
    ok("index", prices, "--index", tmp_path / "ix", "--id-column", "id", "--decimal", ",")
    code, _, stderr = embed("index", prices, "--index", tmp_path / "ix")
    assert code == 2 and "'price' is string, in the index it is double; give --decimal ," in stderr
    again = ok("index", prices, "--index", tmp_path / "ix", "--decimal", ",", "--json")
    assert again["counts"]["unchanged"] == 3


def test_a_column_that_is_empty_at_first_takes_any_type(ok, tmp_path):
    (tmp_path / "a.csv").write_text("id,text,x\na,one,\n")
    (tmp_path / "b.csv").write_text("id,text,x\nb,two,5\n")
    for name in ("a.csv", "b.csv"):
        ok("index", tmp_path / name, "--index", tmp_path / "ix", "--id-column", "id")
        assert where(tmp_path / "ix", "x IS NULL") == {"a"}
    assert values(tmp_path / "ix", "x") == [None, 5]


def test_the_wider_of_two_types():
    whole, half, text, flag = pa.int64(), pa.float64(), pa.string(), pa.bool_()
    for one, other, expected in [
        (whole, half, half),
        (half, pa.int32(), half),
        (pa.float32(), whole, half),
        (pa.int32(), whole, whole),
        (pa.null(), text, text),
        (text, whole, None),
        (text, pa.binary(), None),
        (whole, flag, None),
        (pa.list_(pa.null()), pa.list_(text), pa.list_(text)),
    ]:
        assert (wider(one, other), wider(other, one)) == (expected, expected), (one, other)


def test_a_first_index_that_fails_binds_the_folder_to_nothing(ok, embed, tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("key,text\na,one\nb,two\n")
    flags = ("index", tmp_path / "t.csv", "--index", tmp_path / "ix")
    with monkeypatch.context() as patched:
        patched.setattr(Encoder, "encode", lambda self, texts, role=None: np.full((len(texts), 32), np.nan))
        code, _, stderr = embed(*flags, "--id-column", "key", "--chunk")
        assert code == 2 and "NaN" in stderr
    assert not (tmp_path / "ix" / "manifest.json").exists()
    assert ok(*flags, "--json")["settings"]["id_column"] is None  # another id column, whole texts


def test_an_index_belongs_to_its_model_wherever_that_lies(ok, embed, tiny_embedder, tmp_path):
    write_lines(tmp_path / "t.txt", ["good film", "bad film"])
    shutil.copytree(tiny_embedder, tmp_path / "old")
    index = ("--index", tmp_path / "ix")
    ok("index", tmp_path / "t.txt", *index, "--model", tmp_path / "old")
    expected = ok("search", *index, "film", "--json")
    (tmp_path / "old").rename(tmp_path / "new")
    code, _, stderr = embed("search", *index, "film")
    assert code == 2 and re.search(r"fingerprint begins with [0-9a-f]{12}.*old.*--model", stderr), stderr
    assert ok("search", *index, "film", "--model", tmp_path / "new", "--json") == expected
    ok("index", tmp_path / "t.txt", *index, "--model", tmp_path / "new")
    assert ok("search", *index, "film", "--json") == expected  # it has been told


# Files as others write them -----------------------------------------------------------------------


CORPUS = [
    {"_id": "d1", "title": "Wings", "text": "the film was good", "metadata": {}},
    {"_id": "d2", "title": "", "text": "a lovely story", "metadata": {}},
    {"_id": "d3", "title": "Awful", "text": "bad actors on monday", "metadata": {}},
]


@pytest.fixture
def beir(tmp_path) -> Path:
    """A task as BEIR writes it, with graded judgements and a query that has none."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write_lines(folder / "corpus.jsonl", [json.dumps(row) for row in CORPUS])
    queries = [("q1", "good film"), ("q2", "lovely story"), ("q3", "monday")]
    lines = [json.dumps({"_id": key, "text": text, "metadata": {}}) for key, text in queries]
    write_lines(folder / "queries.jsonl", lines)
    write_lines(
        folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td3\t1", "q2\td2\t1"]
    )
    return folder


def test_a_task_of_beir_is_read_as_it_is(ok, beir, tmp_path):
    task = ("--queries", beir / "queries.jsonl", "--qrels", beir / "qrels" / "test.tsv", "--json")
    corpus = ("--texts", beir / "corpus.jsonl", "--text-column", "title,text")
    found = ok("evaluate", *corpus, *task)
    assert found["queries"] == 2
    write_lines(tmp_path / "qrels", ["q1 0 d1 2", "q1 0 d3 1", "q2 0 d2 1"])
    assert ok("evaluate", *corpus, *task[:3], tmp_path / "qrels", "--json")["scores"] == found["scores"]
    ok("index", *corpus[1:], "--index", tmp_path / "ix", "--id-column", "_id")
    assert ok("evaluate", "--index", tmp_path / "ix", *task)["scores"] == found["scores"]
    assert values(tmp_path / "ix", TEXT) == [
        "Wings the film was good",
        CORPUS[1]["text"],
        "Awful bad actors on monday",
    ]
    assert values(tmp_path / "ix", "title") == ["Wings", "", "Awful"]
    assert where(tmp_path / "ix", "_id = 'd2' AND title = ''") == {"d2"}


def test_a_task_is_scored_at_chosen_ranks_query_by_query(ok, embed, beir, tmp_path):
    task = ("--queries", beir / "queries.jsonl", "--qrels", beir / "qrels" / "test.tsv")
    corpus = ("--texts", beir / "corpus.jsonl", "--text-column", "title,text")
    flags = ("evaluate", *corpus, *task, "--at", 1, 3, "--per-query", tmp_path / "scores.csv")
    found = ok(*flags, "--json")
    names = ["nDCG@1", "nDCG@3", "MRR@1", "MRR@3", "MAP@100", "P@1", "P@3", "recall@1", "recall@3"]
    assert list(found["scores"]["exact"]) == names
    lines = list(csv.DictReader(io.StringIO((tmp_path / "scores.csv").read_text())))
    assert [(line["search"], line["query"]) for line in lines] == [
        (search, query) for search in ("exact", "approximate", "hybrid") for query in ("q1", "q2")
    ]
    for search, scores in found["scores"].items():
        own = [line for line in lines if line["search"] == search]
        means = {name: sum(float(line[name]) for line in own) / 2 for name in names}
        assert means == pytest.approx(scores) and set(found["intervals"][search]) == set(names)
    assert {one["model"] for one in found["differences"]} == {"approximate", "hybrid"}
    code, _, stderr = embed(*flags)
    assert code == 2 and "it exists" in stderr
    shown = ok(*flags[:-2])
    assert "minus exact" in shown and "p < 0.05" in shown and "recall@3" in shown


def test_columns_that_mongo_and_others_have(ok, tmp_path):
    rows = [
        {"_id": {"$oid": f"{number:024x}"}, "_vector": [0.5, 1], "_text": "x", "text": f"text {number}"}
        for number in range(3)
    ]
    write_lines(tmp_path / "t.ndjson", [json.dumps(row) for row in rows])
    ok("index", tmp_path / "t.ndjson", "--index", tmp_path / "ix")
    [hit] = ok("search", "--index", tmp_path / "ix", "text 1", "--top-k", 1, "--json")["queries"][0]["hits"]
    assert hit["text"] == "text 1"
    assert hit["columns"] == {name: value for name, value in rows[1].items() if name != "text"}


def test_several_files_patterns_and_markdown(ok, embed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "good", "n": 1}\n{"text": "fine", "n": null}\n')
    (tmp_path / "b.csv").write_text("text,label\nbad,x\n")
    (tmp_path / "notes.md").write_text("# Title\n\ntwo paragraphs,\n\none text\n")
    (tmp_path / "part-2.txt").write_text("three\nfour\n")
    (tmp_path / "part-1.txt").write_text("one\ntwo\n")
    found = ok("index", "a.jsonl", "b.csv", "notes.md", "part-*.txt", "--index", "ix", "--json")
    assert found["rows"] == 8 and found["counts"]["added"] == 8
    snapshot = open_snapshot(tmp_path / "ix")
    rows = snapshot.take(range(8))
    assert [row[TEXT].split()[0] for row in rows] == [
        "good",
        "fine",
        "bad",
        "#",
        "one",
        "two",
        "three",
        "four",
    ]
    assert rows[3]["file"] == "notes.md" and rows[3][TEXT].endswith(",\n\none text")
    assert [(row["n"], row["label"]) for row in rows[:3]] == [(1, None), (None, None), (None, "x")]
    (tmp_path / "part-2.txt").write_text("three\n \n")
    for flags, part in [
        (("a.jsonl", "part-*.txt"), "part-2.txt, line 2"),
        (("no-*.txt",), "no file has such a name"),
        (("a.jsonl", "a.json*"), "named twice"),
        (("a.jsonl", "-"), "standard input"),
    ]:
        code, _, stderr = embed("index", *flags, "--index", "new")
        assert code == 2 and part in stderr, stderr


COLUMNS = [{"id": "a"}, {"id": "b"}]
STREAMS = {  # name: (content, the other columns of its two rows, whether it is said to be a table)
    "CSV": ('id,text\na,"one, two"\nb,three\n', COLUMNS, True),
    "TSV": ("id\ttext\na\tone, two\nb\tthree\n", COLUMNS, True),
    "JSONL": ('{"id": "a", "text": "one, two"}\n{"id": "b", "text": "three"}\n', COLUMNS, False),
    "lines": ("one, two\nthree\n", [{}, {}], False),
}


@pytest.mark.parametrize("content, columns, said", STREAMS.values(), ids=STREAMS)
def test_tables_come_through_standard_input(content, columns, said, monkeypatch, cache_dir, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    found = texts.read("-", text_column="text", cache_dir=str(cache_dir))
    rows = [row for _, table in found.blocks(5) for row in table.to_pylist()]
    assert [row.pop(TEXT) for row in rows] == ["one, two", "three"] and rows == columns
    assert ("read as a table" in capsys.readouterr().err) == said
