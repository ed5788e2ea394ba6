"""Reading: every kind of file gives the same rows, texts come out as they went in, and a broken
source is named.
"""

import csv
import io
import json
import logging
import sys
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import reading
from common.errors import UserError

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
@settings(max_examples=12, deadline=None)
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
    [
        (b"", "lines.txt: it is empty"),
        (b"a\nb\n\n", "lines.txt, line 3: the text is empty"),
        (b"a\n \t\nb", "lines.txt, line 2: the text is empty"),
        (b"a\nb\xff", r"lines.txt, line 2: not UTF-8 \(byte 0xff at 2\)"),
    ],
)
def test_texts_to_predict_are_checked_line_by_line(content, message, tmp_path):
    (tmp_path / "lines.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        reading.read_texts(str(tmp_path / "lines.txt"), column="text", cache_dir=None)


@pytest.mark.parametrize("ending", KINDS)
def test_texts_to_predict_come_from_a_column_of_a_data_file(ending, tmp_path, cache_dir):
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
