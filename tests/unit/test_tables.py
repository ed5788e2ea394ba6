"""One data file -> one table: what each way of writing it gives, what is refused with its line, and
that nothing is silently another text, label or id.
"""

import bz2
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import re
import tempfile
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common import delimited, json_rows, reading, tables
from common.columns import ROW
from common.errors import UserError
from common.plain_files import DataFile
from common.sources import FileOptions

AS_TEXT = ("text", "label", "id")
NO_SURROGATES = st.characters(exclude_categories=["Cs"])


def read(path, content: str | bytes, **options) -> dict:
    """Write a file and return its columns."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return reading.read_file(path, as_text=AS_TEXT, options=FileOptions(**options))[:]


# name: (file's name, content, flags, the columns)
READ = {
    "labels with zeros": (
        "t.csv",
        "text,label\na,007\nb,7\n",
        {},
        {"text": ["a", "b"], "label": ["007", "7"]},
    ),
    "labels with decimals": ("t.csv", "text,label\na,1.10\nb,1.1\n", {}, {"label": ["1.10", "1.1"]}),
    "labels 1 and 01": ("t.csv", "text,label\na,1\nb,01\n", {}, {"label": ["1", "01"]}),
    "a label with an exponent": ("t.csv", "text,label\na,1e3\nb,2\n", {}, {"label": ["1e3", "2"]}),
    "ids with zeros": ("t.csv", "text,id\na,0012\nb,0013\n", {}, {"id": ["0012", "0013"]}),
    "long ids": ("t.csv", "text,id\na,12345678901234567890123\n", {}, {"id": ["12345678901234567890123"]}),
    "texts that are numbers": ("t.csv", "text,label\n1984,x\n1.50,y\n", {}, {"text": ["1984", "1.50"]}),
    "texts that mean nothing elsewhere": (
        "t.csv",
        "text,label\nNA,nan\nnull,None\nTRUE,inf\n",
        {},
        {"text": ["NA", "null", "TRUE"], "label": ["nan", "None", "inf"]},
    ),
    "dates": (
        "t.csv",
        "text,label\n2020-01-01,x\n2021-01-01,y\n",
        {},
        {"text": ["2020-01-01", "2021-01-01"]},
    ),
    "numbers beside them": (
        "t.csv",
        "text,n,share,zip,when,yes\na,1,0.5,01234,2020-01-01,true\nb,,2e3,9999,2021-02-01,false\n",
        {},
        {
            "n": [1, None],
            "share": [0.5, 2000.0],
            "zip": ["01234", "9999"],
            "when": ["2020-01-01", "2021-02-01"],
            "yes": [True, False],
        },
    ),
    "numbers too long for a float": (
        "t.csv",
        "text,n\na,12345678901234567890\n",
        {},
        {"n": ["12345678901234567890"]},
    ),
    "spaces": (
        "t.csv",
        "text,label\n a ,Rain\nb, rain \n",
        {},
        {"text": [" a ", "b"], "label": ["Rain", " rain "]},
    ),
    "an index of pandas": (
        "t.csv",
        ",text,label\n0,a,x\n1,b,y\n",
        {},
        {"Unnamed: 0": [0, 1], "text": ["a", "b"]},
    ),
    "blank lines": ("t.csv", "\ntext,label\n\na,x\n\n\nb,y\n\n", {}, {"text": ["a", "b"]}),
    "quoted": (
        "t.csv",
        'text,label\n"a, b",x\n"say ""hi""",y\n"two\nlines",x\n"",y\n',
        {},
        {"text": ["a, b", 'say "hi"', "two\nlines", ""]},
    ),
    "a quotation mark within a cell": (
        "t.csv",
        'text,label\n5" disk,x\n6"" disk,y\n',
        {},
        {"text": ['5" disk', '6"" disk']},
    ),
    "Windows": ("t.csv", "text,label\r\na,x\r\nb,y\r\n", {}, {"text": ["a", "b"], "label": ["x", "y"]}),
    "first Macs": ("t.csv", "text,label\ra,x\rb,y\r", {}, {"text": ["a", "b"], "label": ["x", "y"]}),
    "first Macs with tabs": (
        "t.tsv",
        "text\tlabel\ra\tx\rb\ty",
        {},
        {"text": ["a", "b"], "label": ["x", "y"]},
    ),
    "first Macs in JSON": ("t.jsonl", '{"text": "a"}\r{"text": "b"}\r', {}, {"text": ["a", "b"]}),
    "no line end": ("t.csv", "text,label\na,x", {}, {"text": ["a"], "label": ["x"]}),
    "a mark of UTF-8": ("t.csv", b'\xef\xbb\xbf"text",label\n"a",x\n', {}, {"text": ["a"], "label": ["x"]}),
    "capital ending": ("T.CSV", "text,label\na,x\n", {}, {"text": ["a"]}),
    "name with colons": ("zip::t.csv", "text,label\na,x\n", {}, {"text": ["a"]}),
    "zeros": ("t.csv", b"text,label\na\0b,x\n", {}, {"text": ["a\0b"]}),
    "semicolons": ("t.csv", "text;label\na, b;x\nc;y\n", {}, {"text": ["a, b", "c"], "label": ["x", "y"]}),
    "semicolons and a comma in the header": (
        "t.csv",
        'id;text;"x, y"\n1;a;b\n',
        {},
        {"id": ["1"], "text": ["a"]},
    ),
    "bars": ("t.csv", "text|label\na;b|x\n", {}, {"text": ["a;b"], "label": ["x"]}),
    "tabs in .csv": ("t.csv", "text\tlabel\na, b\tx\n", {}, {"text": ["a, b"], "label": ["x"]}),
    "commas in .tsv": ("t.tsv", "text,label\na\tb,x\n", {}, {"text": ["a\tb"], "label": ["x"]}),
    "a delimiter by its flag": (
        "t.csv",
        "text~label\na,b~x\n",
        {"delimiter": "~"},
        {"text": ["a,b"], "label": ["x"]},
    ),
    "a delimiter beyond ASCII": (
        "t.csv",
        "text¦label\na,b¦x\n",
        {"delimiter": "¦"},
        {"text": ["a,b"], "label": ["x"]},
    ),
    "one column": ("t.csv", 'text\na\n\n"b, c"\n""\n', {}, {"text": ["a", "b, c", ""]}),
    "tabs, marks are text": (
        "t.tsv",
        'text\tlabel\n"Well, he said\tx\nno" more\ty\n"a" or "b"\tx\n',
        {},
        {"text": ['"Well, he said', 'no" more', '"a" or "b"']},
    ),
    "tabs, marks are quotation": (
        "t.tsv",
        'text\tlabel\n"say ""hi"""\tx\n"a\tb"\ty\n"two\nlines"\tx\n',
        {},
        {"text": ['say "hi"', "a\tb", "two\nlines"]},
    ),
    "tabs, --quoting none": ("t.tsv", 'text\tlabel\n"a"\tx\n', {"quoting": "none"}, {"text": ['"a"']}),
    "commas, --quoting none": (
        "t.csv",
        'text,label\n"a" b,x\n"c,y\n',
        {"quoting": "none"},
        {"text": ['"a" b', '"c']},
    ),
    "tabs, --quoting csv": ("t.tsv", 'text\tlabel\n"a"\tx\n', {"quoting": "csv"}, {"text": ["a"]}),
    "no header": (
        "t.csv",
        '"3","Fears","a ""b"" c"\n"4","The","d"\n',
        {"columns": ("label", "title", "text")},
        {"label": ["3", "4"], "title": ["Fears", "The"], "text": ['a "b" c', "d"]},
    ),
    "no header, no ending": (
        "Spam",
        'ham\tGo "on\nspam\t"x\n',
        {"columns": ("label", "text")},
        {"text": ['Go "on', '"x']},
    ),
    "label first": (
        "t.label",
        "ham a b\nspam c\n",
        {"columns": ("label", "text"), "delimiter": " "},
        {"text": ["a b", "c"]},
    ),
    "two labels first": (
        "t.label",
        "DESC:manner How : did\nENTY:x What ?\n",
        {"columns": ("label", "fine", "text"), "delimiter": ": "},
        {"label": ["DESC", "ENTY"], "fine": ["manner", "x"], "text": ["How : did", "What ?"]},
    ),
    "fastText": (
        "t.train",
        "__label__a x y\n\n__label__b z\n",
        {},
        {"label": ["a", "b"], "text": ["x y", "z"]},
    ),
    "fastText with several labels": (
        "t.train",
        "__label__a x y\n__label__b __label__c-d z\n",
        {},
        {"label": [["a"], ["b", "c-d"]], "text": ["x y", "z"]},
    ),
    "UTF-16": (
        "t.csv",
        "text,label\nschön,x\n".encode("utf-16"),
        {"encoding": "utf-16"},
        {"text": ["schön"]},
    ),
    "UTF-16 without a mark": (
        "t.csv",
        "text,label\nä,x\n".encode("utf-16-be"),
        {"encoding": "utf-16-be"},
        {"text": ["ä"]},
    ),
    "Latin-1": (
        "t.csv",
        "text,label\nschön,x\n".encode("latin-1"),
        {"encoding": "latin-1"},
        {"text": ["schön"]},
    ),
    "JSON in Latin-1": (
        "t.jsonl",
        '{"text": "schön"}\n'.encode("cp1252"),
        {"encoding": "cp1252"},
        {"text": ["schön"]},
    ),
    "JSON list": (
        "t.json",
        '[{"text": "a", "label": "x"},\n {"text": "b", "label": "y"}]',
        {},
        {"text": ["a", "b"]},
    ),
    "JSON over lines": ("t.json", '{\n"text": "a"\n}\n{"text":\n"b"}', {}, {"text": ["a", "b"]}),
    "ndjson": ("t.ndjson", '{"text": "a"}\n\n{"text": "b"}\n', {}, {"text": ["a", "b"]}),
    "JSON with a key missing": (
        "t.jsonl",
        '{"text": "a"}\n{"label": 1, "text": "b"}\n',
        {},
        {"label": [None, 1]},
    ),
    "JSON dates": (
        "t.jsonl",
        '{"text": "2020-01-01", "label": "2020-01-01"}\n',
        {},
        {"text": ["2020-01-01"]},
    ),
    "JSON numbers and texts": (
        "t.jsonl",
        '{"label": 1, "text": "a"}\n{"label": "b", "text": "a"}\n',
        {},
        {"label": ["1", "b"]},
    ),
    "JSON of all kinds": (
        "t.jsonl",
        '{"text": "a", "m": [1]}\n{"text": "b", "m": {"x": "é"}}\n{"text": "c", "m": null}\n',
        {},
        {"m": ["[1]", '{"x": "é"}', None]},
    ),
    "JSON numbers beyond 64 bits": (
        "t.jsonl",
        '{"text": "a", "n": 123456789012345678901234}\n',
        {},
        {"n": ["123456789012345678901234"]},
    ),
    "gzip": ("t.csv.gz", gzip.compress(b"text,label\na,x\n"), {}, {"text": ["a"]}),
    "gzip in two parts": (
        "t.csv.gz",
        gzip.compress(b"text,label\na,x\n") + gzip.compress(b"b,y\n"),
        {},
        {"text": ["a", "b"]},
    ),
    "bzip2": ("t.tsv.bz2", bz2.compress(b"text\tlabel\na\tx\n"), {}, {"text": ["a"]}),
    "xz": ("t.jsonl.XZ", lzma.compress(b'{"text": "a"}\n'), {}, {"text": ["a"]}),
    "Zstandard": (
        "t.csv.zst",
        pa.compress(b"text,label\na,x\n", codec="zstd", asbytes=True),
        {},
        {"text": ["a"]},
    ),
    "gzip and UTF-16": (
        "t.csv.gz",
        gzip.compress("text\nä\n".encode("utf-16")),
        {"encoding": "utf-16"},
        {"text": ["ä"]},
    ),
}


@pytest.mark.parametrize("name, content, options, columns", READ.values(), ids=READ)
def test_what_is_written_is_what_is_read(name, content, options, columns, tmp_path):
    found = read(tmp_path / name, content, **options)
    assert {column: found[column] for column in columns} == columns


def parquet(**columns) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


# name: (file's name, content, flags, what the line must hold)
REFUSED = {
    "commas without marks": (
        "t.csv",
        "text,label\nI waited, said the judge,rain\n",
        {},
        ("line 2", "3 cells", "2 columns"),
    ),
    "commas without marks in every row": (
        "t.csv",
        "text,label\na,b,x\nc,d,y\n",
        {},
        ("line 2", "3 cells", "text, label"),
    ),
    "a surplus cell": ("t.csv", "text,label\na,x\nb,y,z\n", {}, ("line 3", "3 cells")),
    "a missing cell": ("t.csv", "text,label\na,x\nb\nc,y\n", {}, ("line 3", "1 cell,")),
    "a missing cell after a text of two lines": (
        "t.csv",
        'text,label\n"a\nb",x\nc\n',
        {},
        ("line 4", "1 cell,"),
    ),
    "a surplus cell without a header": (
        "t.csv",
        "a,x\nb,y,z\n",
        {"columns": ("text", "label")},
        ("line 2", "--columns"),
    ),
    "an open mark": (
        "t.csv",
        'text,label\na,x\n"b,y\nc,x\n',
        {},
        ("line 3", "never closed", "--quoting none"),
    ),
    "an open mark with tabs": (
        "t.tsv",
        'text\tlabel\n"b\ty\n',
        {"quoting": "csv"},
        ("line 2", "never closed"),
    ),
    "a mark closed too early": ("t.csv", 'text,label\na,x\n"b" c,y\n', {}, ("line 3", "--quoting none")),
    "two columns of one name": ("t.csv", "text,text,label\na,b,x\n", {}, ("'text'", "two columns")),
    "two columns of one name in Parquet": ("t.parquet", None, {}, ("'text'", "two columns")),
    "no rows": ("t.csv", "text,label\n", {}, ("no rows", "name one")),
    "blank lines only": ("t.csv", "\n\n", {}, ("no rows",)),
    "an empty list": ("t.json", "[]", {}, ("no rows",)),
    "nothing": ("t.csv", "", {}, ("is empty",)),
    "UTF-16": ("t.csv", "text,label\na,x\n".encode("utf-16"), {}, ("UTF-16", "--encoding utf-16")),
    "UTF-16 without a mark": (
        "t.csv",
        "text,label\na,x\n".encode("utf-16-le"),
        {},
        ("UTF-16", "--encoding utf-16-le"),
    ),
    "UTF-16 the other way": (
        "t.tsv",
        "text\tlabel\na\tx\n".encode("utf-16-be"),
        {},
        ("--encoding utf-16-be",),
    ),
    "UTF-32": ("t.jsonl", '{"text": "a"}'.encode("utf-32"), {}, ("UTF-32", "--encoding utf-32")),
    "UTF-16 of Chinese without a mark": (
        "t.csv",
        "text,label\n好电影,x\n坏电影,y\n".encode("utf-16-le"),
        {},
        ("--encoding utf-16-le",),
    ),
    "UTF-32 without a mark": (
        "t.csv",
        "text,label\na,x\n".encode("utf-32-le"),
        {},
        ("--encoding utf-32-le",),
    ),
    "UTF-32 the other way": ("t.csv", "text,label\na,x\n".encode("utf-32-be"), {}, ("--encoding utf-32-be",)),
    "a label twice in a row": (
        "t.jsonl",
        '{"text": "a", "label": "x"}\n{"text": "b", "label": "x", "label": "y"}\n',
        {},
        ("line 2", "'label'", "'x' and 'y'", "remove"),
    ),
    "a text twice in a list": (
        "t.json",
        '[{"text": "a", "text": "b", "label": "x"}]',
        {},
        ("'text'", "'a' and 'b'", "remove"),
    ),
    "a text twice in an object of several lines": (
        "t.json",
        '{"text": "a",\n"text": "b", "label": "x"}',
        {},
        ("'text'", "'a' and 'b'", "remove"),
    ),
    "a key that is no text": (
        "t.jsonl",
        '{"text": "a", "label": "x"}\n{"text": "b", "label": "x", "\\ud800": 1}\n',
        {},
        ("line 2", "\\ud800", "correct"),
    ),
    "UTF-16 that is compressed": (
        "t.csv.gz",
        gzip.compress("text\na\n".encode("utf-16-le")),
        {},
        ("UTF-16",),
    ),
    "Latin-1": (
        "t.csv",
        "text,label\na,x\nschön,y\n".encode("latin-1"),
        {},
        ("line 3", "0xf6 at 4", "--encoding"),
    ),
    "Latin-1 in JSON": (
        "t.jsonl",
        '{"text": "a"}\n{"text": "ö"}\n'.encode("latin-1"),
        {},
        ("line 2", "0xf6"),
    ),
    "Latin-1 in fastText": ("t.ft", "__label__a ö\n".encode("latin-1"), {}, ("line 1", "0xf6")),
    "the wrong encoding": (
        "t.csv",
        "text,label\na,x\nö,y\n".encode(),
        {"encoding": "ascii"},
        ("line 3", "ascii", "0xc3"),
    ),
    "no label": ("t.ft", "__label__a x\nno label\n", {}, ("line 2", "__label__")),
    "no separator": (
        "t.label",
        "DESC:x How\nENTY What\n",
        {"columns": ("a", "b", "text"), "delimiter": ": "},
        ("line 2", "':'"),
    ),
    "separators and columns": (
        "t.label",
        "a b\n",
        {"columns": ("label", "text"), "delimiter": ": ;"},
        ("--delimiter", "3"),
    ),
    "separators without columns": ("t.label", "a b\n", {"delimiter": " "}, ("--delimiter", "--columns")),
    "unknown ending": ("t.xlsx", "PK", {}, ("'.xlsx'", "save its table as .csv")),
    "JSONL broken at line 1,000": (
        "t.jsonl",
        '{"text": "a"}\n' * 999 + '{"text": \n{"text": "b"}\n',
        {},
        ("line 1000", "json"),
    ),
    "JSONL broken at line 12,000": (
        "t.jsonl",
        '{"text": "a"}\n' * 11_999 + "x\n",
        {},
        ("line 12000", "json"),
    ),
    "JSON cut off": ("t.json", '[{"text": "a"},\n{"text": "b"', {}, ("line 2", "json")),
    "a number for an object": ("t.jsonl", '{"text": "a"}\n3\n', {}, ("line 2", "object")),
    "a list of numbers": ("t.json", '[{"text": "a"}, 3]', {}, ("row 2", "object")),
    "a lone surrogate": (
        "t.jsonl",
        '{"text": "a"}\n{"text": "a", "m": {"n": "\\ud800"}}\n',
        {},
        ("line 2", "surrogate"),
    ),
    "JSON nested too deep": ("t.json", "[" * 100_000, {}, ("t.json", "deep")),
    "JSON lines nested too deep": (
        "t.jsonl",
        '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
        {},
        ("t.jsonl", "deep"),
    ),
    "a list among texts": ("t.jsonl", '{"text": "a"}\n{"text": ["b"]}\n', {}, ("line 2", "'text'", "list")),
    "no Parquet": ("t.parquet", "PAR1 and no more", {}, ("t.parquet", "not readable as parquet")),
    "an encrypted Parquet file": (
        "t.parquet",
        b"PARE" + b"\0" * 40 + b"PARE",
        {},
        ("not readable as parquet",),
    ),
    "half of a Parquet file": (
        "t.parquet",
        parquet(text=["a"] * 100)[:200],
        {},
        ("not readable as parquet",),
    ),
    "no gzip": ("t.csv.gz", "text,label\n", {}, ("not readable as gz",)),
    "half of a gzip file": (
        "t.csv.gz",
        gzip.compress(b"text,label\na,x\n")[:-9],
        {},
        ("not readable as gz",),
    ),
    "no bzip2": ("t.csv.bz2", "text,label\n", {}, ("not readable as bz2",)),
    "no xz": ("t.csv.xz", "text,label\n", {}, ("not readable as xz",)),
    "no Zstandard": ("t.csv.zst", "text,label\n", {}, ("not readable as zst",)),
}


@pytest.mark.parametrize("name, content, options, parts", REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_read_is_refused_with_its_line(name, content, options, parts, tmp_path):
    if content is None:
        content = twice_named()
    with pytest.raises(UserError) as caught:
        read(tmp_path / name, content, **options)
    message = str(caught.value)
    assert "\n" not in message and [part for part in parts if part not in message] == [], message


def twice_named() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), sink)
    return sink.getvalue()


NOTES = {  # what is found out is said
    "semicolons": ("t.csv", "text;label\na;x\n", "semicolons"),
    "a swallowed row": ("t.csv", 'text,label\n"a,x\nb,y\nc",z\n', "line 2"),
    "many swallowed lines": ("t.csv", "text,label\na,x\n" + '"' + "line\n" * 30 + '",x\n', "line 3"),
    "many swallowed lines beside a stray mark": (
        "t.csv",
        'text,label\na"b,x\n"' + "line\n" * 30 + '",x\n',
        "line 3",
    ),
}


@pytest.mark.parametrize("name, content, part", NOTES.values(), ids=NOTES)
def test_what_is_doubtful_is_said(name, content, part, tmp_path, capsys):
    read(tmp_path / name, content)
    printed = capsys.readouterr().err
    assert name in printed and part in printed and printed.count("\n") == 1


def test_what_is_certain_is_not_said(tmp_path, capsys):
    read(tmp_path / "t.csv", 'text,label\n"two\nlines",x\n"a, b",y\n')
    read(tmp_path / "t.tsv", "text\tlabel\na\tx\n")
    assert capsys.readouterr().err == ""


# Fuzzing: Python's csv and json as oracles --------------------------------------------------------


def table_of(name: str, content: str, **options) -> dict:
    """Return the columns of a file that is not on the disk."""
    with tempfile.TemporaryFile() as file:
        file.write(content.encode())
        file.flush()
        return reading._read_rows(DataFile(file, name, FileOptions(**options), AS_TEXT, None)).to_pydict()


def oracle(content: str, delimiter: str) -> list[list[str]] | None:
    """Return the rows below the header as Python's strict reader gives them, None where it or the
    width of a row refuses them.
    """
    lines = io.StringIO(content, newline="")
    try:
        header, *rows = [row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row]
    except (csv.Error, ValueError):
        return None
    return rows if all(len(row) == len(header) for row in rows) else None


PIECES = st.sampled_from(['"', '""', ",", "\n", "\r\n", "\r", "a", "b c", " ", "é", "\t", ";", "\0", "1"])


@settings(max_examples=300)
@given(cells=st.lists(PIECES, max_size=40), width=st.integers(1, 3))
def test_any_csv_gives_the_rows_of_the_csv_module(cells, width):
    content = ",".join(["text", "label", "id"][:width]) + "\n" + "".join(cells)
    expected = oracle(content, ",")
    try:
        columns = table_of("t.csv", content, delimiter=",")
    except UserError as error:
        assert expected is None, error
    else:
        assert [list(row) for row in zip(*columns.values())] == expected


@settings(max_examples=150)
@given(
    rows=st.lists(
        st.lists(st.text(NO_SURROGATES, max_size=8), min_size=2, max_size=2), min_size=1, max_size=20
    ),
    delimiter=st.sampled_from([",", "\t", ";"]),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_both_readers_of_a_table_give_what_was_written(rows, delimiter, line_end):
    target = io.StringIO(newline="")
    # the writer leaves a character that ends lines without marks unless it ends its own lines with
    # it
    quoting = csv.QUOTE_MINIMAL if line_end == "\r\n" else csv.QUOTE_ALL
    writer = csv.writer(target, delimiter=delimiter, lineterminator=line_end, quoting=quoting)
    writer.writerows([["text", "label"], *rows])
    with tempfile.TemporaryFile() as file:
        file.write(target.getvalue().encode())
        file.flush()
        dialect = delimited.Dialect(delimiter, True, ["text", "label"], has_header=True)
        data = DataFile(file, "t", FileOptions(), (), None)
        assert list(delimited.read_rows(data, dialect)) == rows
        content = np.frombuffer(target.getvalue().encode(), np.uint8)
        quotes = np.flatnonzero(content == ord('"'))
        assert delimited.is_well_formed(content, quotes, delimiter)
        found = pa.concat_tables(delimited.read_fast(tables.arrow_map(file), dialect)).to_pylist()
        assert [[row["text"], row["label"]] for row in found] == rows


def test_the_fast_reader_is_taken_for_what_csv_writers_write(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "read_rows", lambda *_: pytest.fail("the plain reader was taken"))
    text = "".join(f'"a ""b"", {number}\nc",x\n' for number in range(30_000))
    assert len(read(tmp_path / "t.csv", "text,label\n" + text)["text"]) == 30_000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(NO_SURROGATES, max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=100)
@given(
    texts=st.lists(st.text(NO_SURROGATES, max_size=10) | st.none(), min_size=1, max_size=8),
    extras=st.lists(VALUES, min_size=8, max_size=8),
    is_list=st.booleans(),
)
def test_any_json_gives_what_the_json_module_reads(texts, extras, is_list):
    rows = [{"text": text, "extra": extra} for text, extra in zip(texts, extras)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    content = f"[{','.join(lines)}]" if is_list else "\n".join(lines)
    found = table_of("t.json", content)
    assert found["text"] == texts
    for value, expected in zip(found["extra"], [row["extra"] for row in rows]):
        assert same(value, expected), (value, expected)


def same(found, expected) -> bool:
    """Tell whether a value is the expected one, or its JSON, or has nulls for keys that it lacks."""
    if isinstance(found, str) and not isinstance(expected, str):
        return json.loads(found) == expected
    if isinstance(expected, dict) and isinstance(found, dict):
        return all(same(value, expected.get(key)) for key, value in found.items())
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


@settings(max_examples=100)
@given(
    lines=st.lists(
        st.builds(lambda text: json.dumps({"text": text}), st.text(NO_SURROGATES, max_size=5))
        | st.text(st.sampled_from("{}[],:1 "), max_size=12),
        min_size=1,
        max_size=8,
    )
)
@example(lines=["{}1"])  # the last line, without an end: its last character was lost
def test_the_first_line_that_is_no_json_is_named(lines):
    lines = ['{"text": "a"}', *lines]
    bad = next((number for number, line in enumerate(lines, 1) if line.strip() and not is_object(line)), None)
    try:
        table_of("t.jsonl", "\n".join(lines))
    except UserError as error:
        assert f"line {bad}:" in str(error)
    else:
        assert bad is None


def is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


# Tables of several blocks -------------------------------------------------------------------------


def test_a_large_table_lies_on_the_disk_and_is_the_same(tmp_path, monkeypatch):
    rows = [{"text": f"text {number}", "n": number} for number in range(25_000)]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    in_memory = read(tmp_path / "t.jsonl", content)
    monkeypatch.setattr(tables, "IN_MEMORY", 1000)
    allocated = pa.total_allocated_bytes()
    found = reading.read_file(tmp_path / "t.jsonl", as_text=AS_TEXT)
    assert pa.total_allocated_bytes() - allocated < 1000
    assert found[:] == in_memory == {"text": [row["text"] for row in rows], "n": list(range(25_000))}


@pytest.mark.parametrize(
    "first, second, expected",
    [
        (1, 2.5, [1.0, 2.5]),
        (None, "x", [None, "x"]),
        (1, "x", ["1", "x"]),
        ([1], {"a": 1}, ["[1]", '{"a": 1}']),
        ({"a": 1}, {"b": 2}, [{"a": 1, "b": None}, {"a": None, "b": 2}]),
        (True, 1, ["true", "1"]),
    ],
)
def test_blocks_of_different_types_become_one_column(first, second, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "BLOCK_OBJECTS", 1)
    lines = "".join(json.dumps({"text": "a", "m": value}) + "\n" for value in (first, second))
    assert read(tmp_path / "t.jsonl", lines)["m"] == expected


def test_a_column_that_only_later_rows_have(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "BLOCK_OBJECTS", 1)
    assert read(tmp_path / "t.jsonl", '{"text": "a"}\n{"text": "b", "label": "x"}\n')["label"] == [None, "x"]


def test_categories_are_the_values_that_they_stand_for(tmp_path):
    content = parquet(text=["a", "b"], label=pa.array(["x", "y"]).dictionary_encode())
    assert read(tmp_path / "t.parquet", content)["label"] == ["x", "y"]


@pytest.mark.parametrize(
    "kind, values", [(pa.string_view(), ["x", "y"]), (pa.float16(), [1.5, 2.0])], ids=["view", "float16"]
)
def test_a_type_that_few_functions_know_becomes_the_usual_one(kind, values, tmp_path):
    odd = pa.array(values, pa.float32() if kind == pa.float16() else None).cast(kind)
    (tmp_path / "t.parquet").write_bytes(parquet(text=["a", "b"], odd=odd))
    rows = reading.read_file(tmp_path / "t.parquet", as_text=AS_TEXT)
    assert rows["odd"][:] == values and rows.data.table["odd"].type != kind


@pytest.mark.parametrize(
    "row, odd",
    [
        ('{"text": "a", "o\\u0000d": 1}', r"o\x00d"),
        ('{"text": "a", "odd": ' + "[" * 200 + "]" * 200 + "}", "odd"),
        ('{"text": "a", "odd": ' + '{"a":' * 200 + "1" + "}" * 200 + "}", "odd"),
    ],
    ids=["name", "lists", "objects"],
)
def test_a_column_that_no_library_can_hold_is_left_out_and_said(row, odd, tmp_path, capsys):
    assert read(tmp_path / "t.jsonl", row) == {"text": ["a"]}
    assert re.fullmatch(r"[^\n]*'" + re.escape(odd) + r"'[^\n]*left out\n", capsys.readouterr().err)


def test_a_table_of_many_columns_takes_no_time(tmp_path):
    names = [f"c{number}" for number in range(2000)]
    started = time.process_time()
    found = read(tmp_path / "t.csv", ",".join(["text", *names]) + "\n" + ",".join(["a", *["1"] * 2000]))
    assert len(found) == 2001 and time.process_time() - started < 5


def test_a_number_that_would_be_infinite_stays_text(tmp_path):
    assert read(tmp_path / "t.csv", "text,n\na,1e400\nb,2\n")["n"] == ["1e400", "2"]


@pytest.mark.parametrize(
    "written, value", [("7", 7), ("-2.5", -2.5), ("true", True), ("007", "007"), ("x", "x")]
)
def test_a_type_is_found_from_all_rows(written, value, tmp_path):
    """Also where the first hundreds of cells are empty."""
    rows = [f"a{number}," for number in range(300)]
    found = read(tmp_path / "t.csv", "\n".join(["text,n", *rows, f"b,{written}"]) + "\n")["n"]
    assert found == [None] * 300 + [value] and type(found[-1]) is type(value)


def test_what_no_library_knows_is_left_out_and_said(tmp_path, capsys):
    odd = pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))
    found = read(tmp_path / "t.parquet", parquet(text=["a"], odd=odd))
    assert found == {"text": ["a"]} and "'odd'" in capsys.readouterr().err
    with pytest.raises(UserError, match="'text' holds map"):
        read(tmp_path / "t.parquet", parquet(text=odd))


def test_class_labels_of_parquet_stay(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "label": [1, 0]},
        features=datasets.Features(
            text=datasets.Value("string"), label=datasets.ClassLabel(names=["n", "p"])
        ),
    )
    rows.to_parquet(str(tmp_path / "t.parquet"))
    assert reading.read_file(tmp_path / "t.parquet").features["label"].names == ["n", "p"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_fields_of_a_column_by_their_path(ending, tmp_path):
    rows = [{"text": "a", "meta": {"by": {"name": "x"}}}, {"text": "b", "meta": {"by": {"name": "y"}}}]
    path = tmp_path / f"t.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = reading.read_file(path, as_text=["text", "meta.by.name"])
    assert found["meta.by.name"][:] == ["x", "y"]


def test_a_flipped_bit_of_a_parquet_file_with_checksums_is_refused(tmp_path):
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["some text"] * 99}), sink, write_page_checksum=True, compression="none")
    content = bytearray(sink.getvalue())
    content[content.index(b"some text")] ^= 1
    with pytest.raises(UserError, match="not readable as parquet: .*CRC"):
        read(tmp_path / "t.parquet", bytes(content))


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.csv", "\ntext,label\n\na,x\n\nb,y\nc,z\n"),
        ("rows.tsv", "text\tlabel\na\tx\nb\ty\nc\tz\n"),
        ("rows.jsonl", '{"text": "a"}\n\n{"text": "b"}\n{"text": "c"}\n'),
        ("rows.json", '[{"text": "a"},\n\n{"text": "b"}, {"text": "c"}]'),
        ("rows.txt", "__label__x a\n\n__label__y b\n__label__z c\n"),
    ],
)
def test_a_row_has_its_number_whether_or_not_bad_ones_are_left_out(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    strict = reading.read_file(tmp_path / name)
    for as_text in ([], ["*"]):  # all columns of the file, but not its numbers
        sound = reading.read_file(tmp_path / name, as_text=as_text, faults=[])
        assert strict["text"][:] == sound["text"][:] == ["a", "b", "c"]
        assert sound[ROW][:] == [1, 2, 3]


@pytest.mark.parametrize(
    "value, text",
    [
        (datetime.datetime(2024, 1, 1), "2024-01-01 00:00:00"),
        (datetime.date(2024, 1, 1), "2024-01-01"),
        (datetime.time(1, 2), "01:02:00"),
        (decimal.Decimal("1.50"), "1.50"),
        (b"bytes", "bytes"),
        (True, "true"),
        ({"day": datetime.date(2024, 1, 1)}, '{"day": "2024-01-01"}'),
    ],
)
def test_what_meets_texts_in_another_file_becomes_text(value, text):
    parts = [pa.table({"x": [value, None]}), pa.table({"x": ["a text"]})]
    assert tables.joined(parts)["x"].to_pylist() == [text, None, "a text"]


@pytest.mark.parametrize("value", [b"\xff", [b"\xff"]])
def test_bytes_that_are_no_text_do_not_meet_texts(value):
    with pytest.raises(UserError, match="column 'x' holds bytes that are no text in UTF-8.*; convert it"):
        tables.joined([pa.table({"x": [value]}), pa.table({"x": ["a text"]})])
