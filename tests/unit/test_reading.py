"""Reading: every kind of file gives the same rows, texts come out as they went in, and a broken
source is named.
"""

import bz2
import contextlib
import csv
import gzip
import io
import json
import logging
import lzma
import os
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import hub, plain_files, reading
from common.columns import ROW, require_column
from common.errors import UserError
from common.sources import FileOptions

KINDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
TEXTS = [
    "plain",
    "a, comma",
    'a "quoted" word',
    "two\nlines",
    "a\ttab",
    "emoji 🎉 ünï £5",
    "NA",
    "None",
    "null",
    "nan",
    " spaces around ",
    "1e5",
    "\u2028 separator",
]
LABELS = ["pos", "neg", "NA"] * 4 + ["pos"]


def xz(content: bytes) -> bytes:
    """Compress bytes in a tenth of the time that the library takes by default."""
    return lzma.compress(content, preset=0)


def write(path: Path, texts: list[str], labels: list) -> Path:
    """Write texts and labels as a data file of the kind that the path's ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels)]
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.table({"text": texts, "label": labels}), path)
    return path


@pytest.mark.parametrize("ending", KINDS)
def test_every_kind_of_file_gives_the_rows_that_were_written(ending, tmp_path, cache_dir):
    path = write(tmp_path / f"rows{ending}", TEXTS, LABELS)
    found = reading.read(str(path), cache_dir=cache_dir)
    assert list(found) == ["train"]
    assert found["train"][:] == {"text": TEXTS, "label": LABELS}


@pytest.mark.parametrize("ending", KINDS)
@settings(max_examples=12)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=6))
def test_any_text_comes_out_as_it_went_in(ending, texts):
    # a column of digits only would be a column of numbers
    texts = ["a text, not a number", *texts]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / f"rows{ending}", texts, ["x"] * len(texts))
        assert reading.read_file(path, cache_dir=folder)["text"][:] == texts


@pytest.mark.parametrize(
    "name", ["reviews[1].csv", "what?.csv", "all *.csv", "UPPER.CSV", ".hidden.csv", "with space.csv"]
)
def test_a_name_is_a_name_and_no_pattern(name, tmp_path, cache_dir):
    write(tmp_path / "odd [folder]" / name.lower(), ["a"], ["x"]).rename(tmp_path / "odd [folder]" / name)
    write(tmp_path / "odd [folder]" / "reviews1.csv", ["not this one"], ["x"])
    assert reading.read(str(tmp_path / "odd [folder]" / name), cache_dir=cache_dir)["train"]["text"][:] == [
        "a"
    ]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_file(ending, tmp_path, cache_dir):
    path = write(tmp_path / f"rows{ending}", ["a", "b"], ["x", "y"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert reading.read_file(path, cache_dir=cache_dir)[:] == {"text": ["a", "b"], "label": ["x", "y"]}


def test_a_file_that_changed_is_read_again(tmp_path, cache_dir):
    """The library keeps what it read; its key must change with the file."""
    path = write(tmp_path / "rows.csv", ["old"], ["x"])
    assert reading.read_file(path, cache_dir=cache_dir)["text"][:] == ["old"]
    write(path, ["new", "newer"], ["x", "y"])
    assert reading.read_file(path, cache_dir=cache_dir)["text"][:] == ["new", "newer"]


def make_class_folders(root: Path, **texts: list[str]) -> Path:
    for name, contents in texts.items():
        (root / name).mkdir(parents=True)
        for number, text in enumerate(contents):
            (root / name / f"{number}.txt").write_text(text, encoding="utf-8")
    return root


def test_class_folders_give_their_names_as_labels_in_sorted_order(tmp_path):
    root = make_class_folders(tmp_path / "news", sport=["goal\nkick", "£5"], arts=["paint"])
    (root / "README.txt").write_text("no class")
    (root / "arts" / ".hidden.txt").write_text("no text")
    assert {split: rows[:] for split, rows in reading.read(str(root)).items()} == {
        "train": {"text": ["paint", "goal\nkick", "£5"], "label": ["arts", "sport", "sport"]}
    }


@pytest.mark.parametrize("encoding", [None, "utf-16", "latin-1"])
def test_line_breaks_at_the_end_of_a_file_are_no_part_of_its_text(tmp_path, encoding):
    """So that a folder holds the texts that a CSV of them holds."""
    for name, text in {"a": "café\n", "b": "\n one\r\n\r\ntwo \t\r\n\n", "c": "no end"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_bytes(text.encode(encoding or "utf-8-sig"))
    rows = reading.read(str(tmp_path), options=FileOptions(encoding=encoding))["train"]
    assert rows["text"][:] == ["café", "\n one\r\n\r\ntwo \t", "no end"]


def test_class_folders_under_split_folders(tmp_path):
    for split in ("train", "test"):
        make_class_folders(tmp_path / split, pos=[f"{split} good"], neg=[f"{split} bad"])
    assert {split: rows[:] for split, rows in reading.read(str(tmp_path)).items()} == {
        split: {"text": [f"{split} bad", f"{split} good"], "label": ["neg", "pos"]}
        for split in ("train", "test")
    }


def test_a_folder_of_data_files_has_a_split_for_each_name(tmp_path, cache_dir):
    write(tmp_path / "train-00000-of-00002.parquet", ["a"], ["x"])
    write(tmp_path / "train-00001-of-00002.parquet", ["b"], ["y"])
    write(tmp_path / "dev.csv", TEXTS, LABELS)
    write(tmp_path / "odd_ones.jsonl", ["c"], ["x"])
    (tmp_path / "README.md").write_text("about them")
    found = reading.read(str(tmp_path), cache_dir=cache_dir)
    assert {split: rows["text"][:] for split, rows in found.items()} == {
        "dev": TEXTS,
        "odd_ones": ["c"],
        "train": ["a", "b"],
    }


def test_a_folder_with_nothing_to_read_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(UserError, match="neither class folders of .txt files nor data files"):
        reading.read(str(tmp_path))


@pytest.mark.parametrize(
    "content, line", [(b"text,label\na,x\nsch\xf6n,y\n", 3), ("text,label\na,x\n".encode("utf-16"), 1)]
)
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl"])
def test_a_file_that_is_not_utf8_is_refused_with_its_line(ending, content, line, tmp_path):
    """The library takes Latin-1 in JSON lines and fails only when the text is used."""
    path = tmp_path / f"rows{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"rows{ending}, line {line}: not UTF-8 .* convert"):
        reading.read_file(path)


def test_a_cell_of_a_text_file_that_is_no_utf8_is_refused_in_class_folders(tmp_path):
    make_class_folders(tmp_path, pos=["good"], neg=["bad"])
    (tmp_path / "neg" / "1.txt").write_bytes(b"\xa35")
    with pytest.raises(UserError, match="neg/1.txt: not UTF-8 "):
        reading.read(str(tmp_path))


@pytest.mark.parametrize(
    "content, lines",
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo", ["one", "two"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (b"\n", [""]),
        (b"one\n\n", ["one", ""]),
        (b"one\rline\n", ["one\rline"]),
        (b"one\rline", ["one", "line"]),  # of the first Macs, as a whole
        (b"one\r\rline\r", ["one", "", "line"]),
        (
            "form\ffeed, separator\u2028and next line\x85stay\n".encode(),
            ["form\ffeed, separator\u2028and next line\x85stay"],
        ),
    ],
)
def test_lines_end_at_a_line_feed_only(content, lines, tmp_path, monkeypatch):
    (tmp_path / "lines.txt").write_bytes(content)
    assert reading.read_lines(str(tmp_path / "lines.txt")) == lines
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert reading.read_lines("-") == lines


@pytest.mark.parametrize(
    "content, message",
    [(b"", "lines.txt: it is empty"), (b"a\nb\xff", r"lines.txt, line 2: not UTF-8 \(byte 0xff at 2\)")],
)
def test_lines_of_texts_are_checked(content, message, tmp_path):
    (tmp_path / "lines.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        reading.read_texts(str(tmp_path / "lines.txt"), column="text", cache_dir=None)


@pytest.mark.parametrize("ending", KINDS)
def test_texts_come_from_a_column_of_a_data_file(ending, tmp_path, cache_dir):
    path = write(tmp_path / f"rows{ending}", TEXTS, LABELS)
    assert reading.read_texts(str(path), column="text", cache_dir=cache_dir) == TEXTS
    with pytest.raises(UserError, match="no column 'review' .*text, label.*--text-column"):
        reading.read_texts(str(path), column="review", cache_dir=cache_dir)


@pytest.mark.parametrize("bad_row", [1, 9_999, 10_000, 10_001, 20_003])
@pytest.mark.parametrize("value, state", [(None, "missing"), ("", "empty"), (" \t\u00a0\n", "empty")])
def test_the_row_of_a_bad_text_is_right_in_every_block(bad_row, value, state):
    texts = ["text"] * 20_003
    texts[bad_row - 1] = value
    with pytest.raises(UserError, match=f"^here, row {bad_row}: the text in column 'text' is {state}"):
        reading.check_texts(datasets.Dataset.from_dict({"text": texts}), "text", source="here")


def test_the_first_bad_row_is_named_after_a_selection_of_rows():
    """A selection keeps the whole table below it; the row must be counted in what was selected."""
    rows = datasets.Dataset.from_dict({"text": ["", "a", "b", "", "c"]}).select([2, 4, 3])
    with pytest.raises(UserError, match="row 3"):
        reading.check_texts(rows, "text", source="here")


@pytest.mark.parametrize(
    "values, kind",
    [
        ([1, 2], "int64"),
        ([1.5], "float64"),
        ([["a"]], "List"),
        ([{"a": 1}], "dict"),
        ([None], "null"),
        ([True], "bool"),
    ],
)
def test_a_column_that_holds_no_texts_is_refused_with_what_it_holds(values, kind):
    with pytest.raises(UserError, match=f"here: column 'text' holds {kind}, not texts; .*--text-column"):
        reading.check_texts(datasets.Dataset.from_dict({"text": values}), "text", source="here")


def test_large_strings_are_texts(tmp_path, cache_dir):
    pq.write_table(pa.table({"text": pa.array(["a", "b"], pa.large_string())}), tmp_path / "rows.parquet")
    rows = reading.read_file(tmp_path / "rows.parquet", cache_dir=cache_dir)
    assert reading.kind(rows, "text") == "large_string"
    reading.check_texts(rows, "text", source="here")


def test_a_local_data_set_has_one_full_name_from_everywhere(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.csv", ["a"], ["x"])
    monkeypatch.chdir(tmp_path)
    assert {
        reading.full_name(name)
        for name in ("rows.csv", "./rows.csv", str(path), "../" + tmp_path.name + "/rows.csv")
    } == {str(path.resolve())}
    assert reading.full_name("bundled/bbc-news") == "bundled/bbc-news"


def test_a_mistake_leaves_the_library_quiet(tmp_path, cache_dir, monkeypatch):
    """It logs a broken file on stderr by itself; ours is to be the only line there."""
    logged = []
    monkeypatch.setattr(logging.Logger, "callHandlers", lambda logger, record: logged.append(record))
    (tmp_path / "rows.csv").write_text("text,label\na,b\nc,d,e,f\n")
    with pytest.raises(UserError, match=r"rows\.csv, line 3: 4 cells, but 2 columns"):
        reading.read_file(tmp_path / "rows.csv", cache_dir=cache_dir)
    assert logged == []


# Places -------------------------------------------------------------------------------------------


def make_place(kind: str, folder: Path) -> Path:
    """Make something that is no usable file, and return its path."""
    path = folder / f"{kind.replace(' ', '-')}.csv"
    if kind == "a pipe without a writer":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "a link in a circle":
        path.symlink_to(path)
    elif kind == "a link to nothing":
        path.symlink_to(folder / "gone.csv")
    elif kind == "a name too long":
        path = folder / ("x" * 300 + ".csv")
    elif kind == "a device":
        path = Path("/dev/zero")
    elif kind == "a file as a folder":
        (folder / "file").write_text("text\n")
        path = folder / "file" / "rows.csv"
    elif kind == "a folder for a file":
        path.mkdir()
    return path


# kind: one of what the line may hold, for each of the three ways of reading
PLACES = {
    "a pipe without a writer": ("this pipe",),
    "a socket": ("a socket",),
    "a link in a circle": ("symbolic links",),
    "a link to nothing": ("gone.csv, which is not there",),
    "a name too long": ("File name too long",),
    "a device": ("a device",),
    "a file as a folder": ("no such file", "Not a directory"),
    "a folder for a file": ("this is a folder", "Is a directory", "neither class folders"),
}


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(
    "read",
    [
        lambda name: reading.read(name, options=FileOptions(columns=("text",))),
        lambda name: reading.read_texts(name, column="text", cache_dir=None),
        reading.read_lines,
    ],
    ids=["data", "texts", "lines"],
)
def test_what_is_no_file_is_refused_at_once(kind, read, tmp_path, monkeypatch):
    monkeypatch.setattr(plain_files, "SECONDS_FOR_A_PIPE", 0.1)
    with pytest.raises(UserError) as caught:
        read(str(make_place(kind, tmp_path)))
    message = str(caught.value)
    assert any(part in message for part in PLACES[kind]), message
    assert "\n" not in message and len(message) < 500


def test_a_pipe_with_a_writer_is_read(tmp_path):
    """As the shell's <(command)."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("one\ntwo\n"))
    writer.start()
    assert reading.read_texts(str(tmp_path / "pipe"), column="text", cache_dir=None) == ["one", "two"]
    writer.join()


class Endless(io.RawIOBase):
    """A stream without an end."""

    def read(self, size=-1):
        return b"y\n" * (size // 2)


@pytest.mark.parametrize("limit, value", [("STREAM_LINES", 1_000_000), ("STREAM_BYTES", 3 << 20)])
def test_a_stream_without_an_end_is_left(limit, value, monkeypatch):
    monkeypatch.setattr(plain_files, limit, value)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Endless()))
    with pytest.raises(UserError, match="standard input: more than .* have come"):
        reading.read_texts("-", column="text", cache_dir=None)


@pytest.mark.parametrize(
    "name, content", [("t.txt", "%s\n"), ("t.csv", "text\n%s\n"), ("t.jsonl", '{"text": "%s"}\n')]
)
def test_a_line_of_20_mb_is_no_text(name, content, tmp_path):
    (tmp_path / name).write_text(content % ("word " * (4 << 20)))
    with pytest.raises(UserError, match="1: the text has 20,971,520 characters, more than 10,000,000"):
        if name == "t.txt":
            reading.read_texts(str(tmp_path / name), column="text", cache_dir=None)
        else:
            reading.check_texts(reading.read_file(tmp_path / name), "text", source=name)


@pytest.mark.parametrize(
    "content, encoding, problem",
    [
        (b"one\ntwo\n" * 5_000 + b"sch\xf6n\n", "ascii", "line 10001: not ascii .byte 0xf6."),
        (b"one\r\n\x81\n", "cp1252", "line 2: not cp1252 .byte 0x81."),
        (b"one\ntwo\n", "utf-16", "not utf-16 .*BOM."),
    ],
)
def test_a_wrong_encoding_is_one_line_with_its_place(content, encoding, problem, tmp_path):
    (tmp_path / "t.txt").write_bytes(content)
    options = FileOptions(encoding=encoding)
    with pytest.raises(UserError, match=f"t.txt.*{problem}; name another --encoding"):
        reading.read_texts(str(tmp_path / "t.txt"), column="text", cache_dir=None, options=options)


# standard input: content, flags, the texts
STREAMS = {
    "lines": ("one\ntwo\n", {}, ["one", "two"]),
    "JSON lines": ('{"text": "one"}\n{"text": "two"}\n', {}, ["one", "two"]),
    "JSON list": ('[{"text": "one"},\n {"text": "two"}]', {}, ["one", "two"]),
    "JSON list over lines": ('[\n {\n "text": "one"}]', {}, ["one"]),
    "lines that begin like JSON": ("[1] one\n{two}\n", {}, ["[1] one", "{two}"]),
    "a table": ("a,one\nb,two\n", {"columns": ("label", "text")}, ["one", "two"]),
    "a table with a header": ("text;n\none;1\n", {"delimiter": ";"}, ["one"]),
    "Latin-1": ("schön\n".encode("latin-1"), {"encoding": "latin-1"}, ["schön"]),
    "UTF-16": ("schön\n".encode("utf-16"), {"encoding": "utf-16"}, ["schön"]),
}


@pytest.mark.parametrize("content, options, texts", STREAMS.values(), ids=STREAMS)
def test_standard_input_as_it_comes(content, options, texts, monkeypatch):
    content = content if isinstance(content, bytes) else content.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    options = FileOptions(**options)
    assert reading.read_texts("-", column="text", cache_dir=None, options=options) == texts


@pytest.mark.parametrize("ending, pack", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", xz)])
def test_lines_that_are_compressed(ending, pack, tmp_path):
    (tmp_path / f"t.txt{ending}").write_bytes(pack(b"one\ntwo\n"))
    assert reading.read_lines(str(tmp_path / f"t.txt{ending}")) == ["one", "two"]


def zstandard(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def test_a_compressed_file_that_would_fill_the_disk_is_refused(tmp_path):
    """A megabyte, from which 10 GB would come."""
    bomb = tmp_path / "bomb.csv.zst"
    bomb.write_bytes(zstandard(b"text\n" * (4 << 20)) * 512)
    assert bomb.stat().st_size < 2 << 20
    started = time.monotonic()
    with (
        pytest.raises(
            UserError, match=r"bomb\.csv\.zst: decompressed, its [0-9,]+ bytes .* 256 MB; .* plain"
        ),
        plain_files.open_plain(str(bomb), folder=str(tmp_path)),
    ):
        pass
    assert time.monotonic() - started < 20


def zipped(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", content)


def in_sqlite(path, _):
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("create table a (text, label)")
        database.commit()


@pytest.mark.parametrize(
    "write, kind",
    [
        (zipped, "zip"),
        (in_sqlite, "SQLite"),
        (lambda path, _: pq.write_table(pa.table({"text": ["a"], "label": ["b"]}), path), "Parquet"),
        (lambda path, content: path.write_bytes(gzip.compress(content)), "gzip"),
        (lambda path, content: path.write_bytes(bz2.compress(content)), "bzip2"),
        (lambda path, content: path.write_bytes(lzma.compress(content)), "xz"),
        (lambda path, content: path.write_bytes(pa.compress(content, "zstd", asbytes=True)), "Zstandard"),
    ],
)
@pytest.mark.parametrize("name", ["rows.csv", "rows.txt"])
def test_a_file_that_is_no_text_is_refused_by_what_it_is(name, write, kind, tmp_path):
    """Its bytes are not read as a table, whatever its name and the flags say."""
    path = tmp_path / name
    write(path, b"text,label\na good film,pos\n")
    with pytest.raises(UserError, match=f"{name}: this is .*{kind}"), plain_files.open_plain(str(path)):
        pass


ROWS = [{"text": "good", "id": 1}, {"text": "bad", "id": 2, "more": "x"}]
# name of a file: (content, column, options, whether its beginning tells that the column is not there)
HEADERS = {
    "a.csv": (b"text,id\ngood,1\n", "no", {}, True),
    "b.csv": (b"text,id\ngood,b\n", "id", {}, False),
    "semicolons.csv": (b"text;id\ngood, and so on;1\n", "no", {}, True),
    "mark.csv": (b"\xef\xbb\xbftext,id\ngood,1\n", "no", {}, True),
    "quotes.csv": (b'\n"text, long","i""d"\r\ngood,1\r\n', "no", {}, True),
    "lines.csv": (b'"te\nxt",id\ngood,1\n', "no", {}, True),
    "index.csv": (b",text\n0,good\n", "no", {}, True),
    "twice.csv": (b"text,text\ngood,1\n", "no", {}, True),
    "latin.csv": ("Gr\xf6\xdfe,text\n1,good\n".encode("latin-1"), "Gr\xf6\xdfe", {}, False),
    "coded.csv": ("Gr\xf6\xdfe,text\n1,good\n".encode("latin-1"), "no", {"encoding": "latin-1"}, False),
    "field.csv": (b"a,text\n0,good\n", "a.b", {}, False),
    "named.csv": (b"good,1\n", "no", {"columns": ("text", "id")}, True),
    "pipes.csv": (b"text|id,x\ngood|1\n", "no", {"delimiter": "|"}, True),
    "none.csv": (b'"text",id\ngood,1\n', "text", {"quoting": "none"}, True),
    "words.csv": (b"text id\ngood 1\n", "no", {"delimiter": " "}, False),
    "t.tsv": (b"text\tid\ngood\t1\n", "no", {}, True),
    "q.tsv": (b'"text"\tid\n"good"\t1\n', "no", {}, False),
    "rows.label": (b"DESC:manner How did it\n", "no", {"columns": ("l", "t"), "delimiter": ":"}, True),
    "a.jsonl": ("\n".join(map(json.dumps, ROWS)).encode(), "no", {}, True),
    "later.jsonl": ("\n".join(map(json.dumps, ROWS)).encode(), "more", {}, False),
    "list.json": (json.dumps(ROWS).encode(), "no", {}, True),
    "line.json": (json.dumps(ROWS).encode() + b"\n", "no", {}, True),
    "wide.json": (json.dumps(ROWS[0], indent=1).encode(), "no", {}, True),
    "field.jsonl": (b'{"a": {"c": "good"}}', "a.b", {}, False),
    "broken.jsonl": (b'{"text": "good"}\n{"te', "no", {}, False),
    "values.jsonl": (b"1\n", "no", {}, False),
    "deep.json": (b"[" * 99999, "no", {}, False),
    "zip.csv": (b"PK\x03\x04, and so on", "no", {}, True),
    "wide.csv": ("text,id\ngood,1\n".encode("utf-16"), "no", {}, True),
    "packed.csv.gz": (gzip.compress(b"text,id\ngood,1\n"), "no", {}, False),
}


@pytest.mark.parametrize("name", HEADERS)
def test_the_beginning_of_a_file_tells_what_its_reader_would_tell(name, tmp_path, capsys):
    """Oracle: the line of the reader itself, which reads all of the file. What is said at once says
    nothing else on stderr, and nothing where the reader finds the column.
    """
    content, column, options, is_told = HEADERS[name]
    path, written = tmp_path / name, FileOptions(**options)
    path.write_bytes(content)
    flags = {column: "--text-column"}
    try:
        reading.check_columns(str(path), flags, options=written)
        at_once = None
    except UserError as error:
        at_once = str(error)
    assert (at_once is not None) == is_told and capsys.readouterr().err == ""
    try:
        reading.read_texts(str(path), column=column, cache_dir=None, options=written)
        assert at_once is None
    except UserError as error:
        assert at_once in (None, str(error))


def test_long_json_is_left_to_its_reader(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    monkeypatch.setattr(reading, "READ_AT_ONCE", 10)
    reading.check_columns(str(path), {"no": "--text-column"}, options=FileOptions())


def test_the_column_of_row_numbers_is_not_shown():
    with pytest.raises(UserError, match="no column 'text' among Review, sentiment; "):
        require_column(["Review", "sentiment", ROW], "text", source="", flag="--text-column")


@pytest.mark.parametrize(
    "ending, pack", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", xz), (".zst", zstandard)]
)
def test_how_far_a_compressed_file_may_expand(ending, pack, tmp_path, monkeypatch):
    monkeypatch.setattr(plain_files, "ANY_SIZE", 1 << 20)
    path = tmp_path / f"t.txt{ending}"
    for size, is_read in ((1 << 20, True), (2 << 20, False)):
        path.write_bytes(pack(b"text\n" * (size // 5)))
        try:
            with plain_files.open_plain(str(path), folder=str(tmp_path)) as file:
                found = os.fstat(file.fileno()).st_size == size // 5 * 5
        except UserError as error:
            found = not str(error).startswith(f"{path}: decompressed, its ")
        assert found == is_read
    noise = os.urandom(1 << 20)  # which can't be compressed: its own size many times is much more
    path.write_bytes(pack(noise.hex().encode()))
    with plain_files.open_plain(str(path), folder=str(tmp_path)) as file:
        assert os.fstat(file.fileno()).st_size == 2 << 20


def test_a_file_that_changed_with_the_same_size_and_time_is_read_again(tmp_path, cache_dir):
    path = write(tmp_path / "rows.csv", ["old"], ["x"])
    before = path.stat()
    assert reading.read_file(path, cache_dir=cache_dir)["text"][:] == ["old"]
    write(path, ["new"], ["x"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert reading.read_file(path, cache_dir=cache_dir)["text"][:] == ["new"]


# Folders ------------------------------------------------------------------------------------------


def test_folders_of_imdb(tmp_path, capsys):
    """Its train/ holds lists of addresses beside the classes, and texts without labels in unsup/."""
    root = tmp_path / "aclImdb"
    for split in ("train", "test"):
        make_class_folders(root / split, pos=[f"{split} good"], neg=[f"{split} bad"])
        (root / split / "urls_pos.txt").write_text("http://")
        (root / split / "labeledBow.feat").write_text("9 0:9")
    make_class_folders(root / "train", unsup=["who knows"])
    (root / "README").write_text("Large Movie Review Dataset")
    (root / "imdb.vocab").write_text("the\n")
    assert {split: rows[:] for split, rows in reading.read(str(root)).items()} == {
        split: {"text": [f"{split} bad", f"{split} good"], "label": ["neg", "pos"]}
        for split in ("test", "train")
    }
    assert "train/unsup" in capsys.readouterr().err


def test_texts_of_all_endings_and_what_is_left_out(tmp_path, capsys):
    make_class_folders(tmp_path, pos=["good"], neg=["bad"])
    (tmp_path / "pos" / "A.TXT").write_text("great")
    (tmp_path / "pos" / "b.md").write_text("fine")
    (tmp_path / "pos" / "c.pdf").write_text("PDF")
    assert reading.read(str(tmp_path))["train"]["text"][:] == ["bad", "good", "great", "fine"]
    assert "1 of its entries" in (printed := capsys.readouterr().err) and "c.pdf" in printed


def test_texts_without_endings(tmp_path):
    """As in 20 Newsgroups, in Latin-1."""
    for name in ("alt.atheism/49960", "sci.space/60820"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(f"From: {name} \xe9".encode("latin-1"))
    rows = reading.read(str(tmp_path), options=FileOptions(encoding="latin-1"))["train"]
    assert rows["label"][:] == ["alt.atheism", "sci.space"] and rows["text"][0].endswith("49960 é")


def test_a_class_folder_without_the_right_to_enter_is_refused(tmp_path, monkeypatch):
    make_class_folders(tmp_path, pos=["good"], neg=["bad"])
    usual = Path.iterdir

    def iterdir(self):
        if self.name == "neg":  # whoever runs the tests may have every right
            raise PermissionError(13, "Permission denied", str(self))
        return usual(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match="neg: can't be read: Permission denied"):
        reading.read(str(tmp_path))


def test_a_link_to_nothing_in_a_class_folder_is_refused(tmp_path):
    make_class_folders(tmp_path, pos=["good"], neg=["bad"])
    (tmp_path / "pos" / "2.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match="pos/2.txt: can't be read"):
        reading.read(str(tmp_path))


def test_shards_may_differ_in_their_types(tmp_path):
    (tmp_path / "train-00000-of-00002.csv").write_text("text,label,n\na,1,1\n")
    (tmp_path / "train-00001-of-00002.csv").write_text("text,label,n\nb,x,0.5\n")
    rows = reading.read(str(tmp_path), as_text=["text", "label"])["train"]
    assert rows[:] == {"text": ["a", "b"], "label": ["1", "x"], "n": [1.0, 0.5]}


# The Hub ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["half", "information"])
def test_a_damaged_copy_of_the_hub_is_made_anew_and_that_is_said(damage, tmp_path, capsys):
    """The library's cache, filled from a folder, which it treats as a data set of the Hub."""
    write(tmp_path / "repository" / "train.csv", TEXTS, LABELS)
    name, cache = str(tmp_path / "repository"), str(tmp_path / "cache")
    expected = hub._load_undamaged(name, None, None, cache)["train"][:]
    assert "is damaged" not in capsys.readouterr().err
    (table,) = (tmp_path / "cache").rglob("*.arrow")
    content = bytearray(table.read_bytes())
    if damage == "half":
        del content[len(content) // 2 :]
    table.write_bytes(content)
    if damage == "information":
        (information,) = (tmp_path / "cache").rglob("dataset_info.json")
        information.write_text("{")
    assert hub._load_undamaged(name, None, None, cache)["train"][:] == expected
    assert "is damaged" in capsys.readouterr().err
