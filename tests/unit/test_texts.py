"""Collections from every kind of source: the texts as they were written, the place of each bad
one, and what --skip-bad leaves.
"""

import functools
import gzip
import io
import json
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from common import sources
from common.errors import UserError
from common.runtime import Runtime
from common.search import texts
from common.search.encoder import EncoderConfig, load_encoder, split_into_chunks, token_spans
from common.search.segments import TEXT, text_array
from common.sources import FileOptions


def read(path, cache_dir, **options):
    return texts.read(str(path), **{"text_column": "text", "cache_dir": str(cache_dir), **options})


def rows_of(collection, size=2):
    return [row for _, table in collection.blocks(size) for row in table.to_pylist()]


ROWS = [
    {"text": 'a "quoted", text', "year": 2004},
    {"text": "two\nlines", "year": 2005},
    {"text": "naïve 中文 🎉", "year": 2006},
]


def test_data_files_give_the_same_texts(tmp_path, cache_dir):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.csv").write_text(
        'text,year\n"a ""quoted"", text",2004\n"two\nlines",2005\nnaïve 中文 🎉,2006\n', encoding="utf-8"
    )
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        found = rows_of(read(tmp_path / name, cache_dir))
        assert [(row[TEXT], row["year"]) for row in found] == [(row["text"], row["year"]) for row in ROWS]


@given(st.lists(st.none() | st.text(), max_size=20))
def test_texts_become_the_array_that_arrow_makes_of_them(values):
    expected = pa.array(values, pa.large_string())
    found = text_array(values)
    found.validate(full=True)
    assert found.equals(expected) and found.null_count == expected.null_count
    assert found.cast(pa.string()).to_pylist() == values


def test_lines_folders_standard_input_and_the_bundled_set(tmp_path, cache_dir, monkeypatch):
    (tmp_path / "lines.txt").write_bytes("\ufefffirst\r\nsecond\x0cpart\nthird".encode())
    assert [row[TEXT] for row in rows_of(read(tmp_path / "lines.txt", cache_dir))] == [
        "first",
        "second\x0cpart",
        "third",
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert [row[TEXT] for row in rows_of(read("-", cache_dir))] == ["one", "two"]
    for name, text in (("tech/b.txt", "bytes\n"), ("art/a.txt", "paint"), (".hidden/c.txt", "no")):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_text(text)
    found = rows_of(read(tmp_path / "files", cache_dir))
    assert [(row["file"], row["label"], row[TEXT]) for row in found] == [
        ("art/a.txt", "art", "paint"),
        ("tech/b.txt", "tech", "bytes"),
    ]
    (tmp_path / "note.md").write_bytes(b"# Title\r\n\r\ntext \r\n\n")
    assert [row[TEXT] for row in rows_of(read(tmp_path / "note.md", cache_dir))] == ["# Title\r\n\r\ntext "]
    news = read("bundled/bbc-news", cache_dir)
    assert len(news) == 2127 and rows_of(news)[0]["label"] == "business"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.text(st.characters(exclude_characters="\n\r\ufeff", exclude_categories=["Cs"]), min_size=1).filter(
            lambda text: not sources.is_blank(text)
        ),
        min_size=1,
        max_size=30,
    )
)
def test_any_lines_come_back(lines, tmp_path, cache_dir):
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8", newline="")
    assert [row[TEXT] for row in rows_of(read(tmp_path / "lines.txt", cache_dir), 7)] == lines


def test_python_and_arrow_agree_on_what_can_not_be_seen():
    characters = [chr(code) for code in range(0x3000)]
    found = pc.match_substring_regex(pa.array(characters), sources.BLANK).to_pylist()
    assert found == list(map(sources.is_blank, characters)) and 50 < sum(found) < 300


# name: (file, content, the row that is refused, what the line must hold, the texts that --skip-bad
# leaves)
BAD = {
    "blank line": ("t.txt", b"good\n  \nfine\n", ("t.txt, line 2", "empty"), ["good", "fine"]),
    "not UTF-8 line": ("t.txt", b"good\nsch\xf6n\nfine\n", ("t.txt, line 2", "0xf6 at 4"), ["good", "fine"]),
    "surrogate bytes": ("t.txt", b"good\n\xed\xa0\x80\n", ("t.txt, line 2", "0xed"), ["good"]),
    "null": ("t.jsonl", b'{"text": "good"}\n{"text": null}\n', ("t.jsonl, row 2", "missing"), ["good"]),
    "lone surrogate": (
        "t.jsonl",
        b'{"text": "good"}\n{"text": "a \\ud800 b"}\n{"text": "\\ud83c\\udf89"}\n',
        ("t.jsonl, line 2", "lone surrogate"),
        ["good", "🎉"],
    ),
    "not UTF-8 in CSV": (
        "t.csv",
        b"text,n\ngood,1\nsch\xf6n,2\nfine,3\n",
        ("t.csv, line 3", "0xf6"),
        ["good", "fine"],
    ),
    "a surplus cell in CSV": (
        "t.csv",
        b"text,n\ngood,1\nbad, worse,2\nfine,3\n",
        ("t.csv, line 3", "3 cells", "2 columns"),
        ["good", "fine"],
    ),
    "a broken line of JSON": (
        "t.jsonl",
        b'{"text": "good"}\n{"text": \n{"text": "fine"}\n',
        ("t.jsonl, line 2", "not readable as json"),
        ["good", "fine"],
    ),
    "empty in CSV": ("t.csv", b'text,n\ngood,1\n"",2\n', ("t.csv, row 2", "empty"), ["good"]),
    "missing in CSV": ("t.csv", b"text,n\ngood,1\n,2\n", ("t.csv, row 2",), ["good"]),
}


@pytest.mark.parametrize("name, content, parts, left", BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_passed_over(name, content, parts, left, tmp_path, cache_dir):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name, cache_dir)
    assert [part for part in (*parts, "--skip-bad") if part not in str(caught.value)] == [], caught.value
    found = read(tmp_path / name, cache_dir, skip_bad=True)
    assert [row[TEXT] for row in rows_of(found)] == left and len(found.bad) == 1


def test_skip_bad_passes_over_what_is_bad_and_nothing_else(tmp_path, cache_dir):
    """Two U+FFFD in a valid text were taken for a fault; a bad byte in another column went into
    the index as U+FFFD.
    """
    (tmp_path / "t.csv").write_bytes(
        "text,more\na \ufffd\ufffd b,x\n".encode() + b'good,sch\xf6n\n"two\nlines\xf6",y\nfine,"a\nb"\n'
    )
    found = read(tmp_path / "t.csv", cache_dir, skip_bad=True)
    assert [(row[TEXT], row["more"]) for row in rows_of(found)] == [
        ("a \ufffd\ufffd b", "x"),
        ("fine", "a\nb"),
    ]
    assert found.bad == {1: "not UTF-8", 2: "not UTF-8"}
    (tmp_path / "t.jsonl").write_bytes(
        b'{"text": "good", "more": {"a": ["\\udc00"]}}\n{"text": "\\ud800 \xf6", "more": null}\n{"text":'
        b' "fine", "more": null}\n'
    )
    found = read(tmp_path / "t.jsonl", cache_dir, skip_bad=True)
    assert [row[TEXT] for row in rows_of(found)] == ["fine"] and len(found.bad) == 2


def test_an_escape_is_half_a_character_only_in_json(tmp_path, cache_dir):
    (tmp_path / "t.csv").write_text('text\n"\\ud800"\n')
    assert [row[TEXT] for row in rows_of(read(tmp_path / "t.csv", cache_dir))] == ["\\ud800"]


def test_skip_bad_leaves_no_copy_of_the_file_in_the_cache(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"text\ngood\nsch\xf6n\n")
    found = read(tmp_path / "t.csv", tmp_path / "cache", skip_bad=True)
    assert [row[TEXT] for row in rows_of(found)] == ["good"] and not list(
        (tmp_path / "cache").rglob("*.arrow")
    )


@pytest.mark.parametrize("column", ["text", "more", "key"])
def test_parquet_that_is_no_utf8(column, tmp_path, cache_dir):
    """Arrow writes and reads it unchecked."""
    whole, broken = pa.array(["good", "schoen", "fine"]), pa.array([b"good", b"sch\xf6n", b"fine"])
    broken = pa.Array.from_buffers(pa.string(), 3, broken.buffers())
    pq.write_table(
        pa.table({name: broken if name == column else whole for name in ("text", "more", "key")}),
        tmp_path / "t.parquet",
    )
    with pytest.raises(UserError, match="t.parquet, row 2: not UTF-8.*--skip-bad"):
        read(tmp_path / "t.parquet", cache_dir, id_column="key")
    found = read(tmp_path / "t.parquet", cache_dir, id_column="key", skip_bad=True)
    assert [row[TEXT] for row in rows_of(found)] == ["good", "fine"] and list(found.bad) == [1]


IDS = {
    "twice": (
        '{"id": "a", "text": "x"}\n{"id": "b", "text": "y"}\n{"id": "a", "text": "z"}\n',
        ("row 3", "'a'", "occurs above"),
        ["x", "y"],
    ),
    "twice as numbers": (
        '{"id": 1, "text": "x"}\n{"id": 1, "text": "z"}\n',
        ("row 2", "1", "occurs above"),
        ["x"],
    ),
    "missing": (
        '{"id": "a", "text": "x"}\n{"id": null, "text": "y"}\n',
        ("row 2", "the id", "missing"),
        ["x"],
    ),
}


@pytest.mark.parametrize("content, parts, left", IDS.values(), ids=IDS)
def test_ids_must_be_there_once(content, parts, left, tmp_path, cache_dir):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "t.jsonl", cache_dir, id_column="id")
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value
    assert [
        row[TEXT] for row in rows_of(read(tmp_path / "t.jsonl", cache_dir, id_column="id", skip_bad=True))
    ] == left


@settings(max_examples=80)
@given(st.data())
def test_spans_cover_all_tokens_with_their_overlap(data):
    count = data.draw(st.integers(0, 120))
    steps = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    words = [sum(steps[: place + 1]) for place in range(count)]
    room = data.draw(st.integers(1, 30))
    overlap = data.draw(st.integers(0, room - 1))
    spans = token_spans(words, room, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == count
    assert all(0 < last - first <= room or count == 0 for first, last in spans)
    for (first, last), (next_first, next_last) in zip(spans, spans[1:]):
        assert first < next_first <= last < next_last  # no gap, no span within another


@functools.cache
def byte_level_encoder(max_length: int):
    """Return what chunks need of an encoder: a byte-level BPE tokenizer, in which a word's token
    holds the space before it.
    """
    texts = [
        f"the film was {word} and so very good, naïve 中文 🎉 n{number}"
        for number, word in enumerate(["fine", "poor", "grim"] * 40)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 1), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="</s>", bos_token="<s>", eos_token="</s>"
    )
    return SimpleNamespace(tokenizer=fast, max_length=max_length, name="bpe", prompt=lambda role: "")


@settings(max_examples=60)
@given(
    words=st.lists(
        st.sampled_from(["the", "film", "naïve", "中文", "🎉", "x" * 70, "good,", "\n", "  ", "n17"]),
        min_size=30,
        max_size=150,
    ),
    overlap=st.integers(0, 9),
)
def test_chunks_of_a_byte_level_tokenizer_lose_nothing(words, overlap):
    """39 of 44 were longer than the model reads, and lost their ends."""
    encoder, text = byte_level_encoder(14), " ".join(words)
    (pieces,) = split_into_chunks([text], encoder, overlap=overlap)
    assert max(len(encoder.tokenizer(piece)["input_ids"]) for _, piece in pieces) <= 14
    assert (
        pieces[0][0] == 0
        and pieces[-1][0] + len(pieces[-1][1]) == len(text)
        and all(text[start:].startswith(piece) for start, piece in pieces)
    )
    assert all(
        start < following <= start + len(piece) for (start, piece), (following, _) in zip(pieces, pieces[1:])
    )


def test_chunks_are_pieces_of_the_text_that_the_model_reads_whole(tiny_embedder):
    encoder = load_encoder(EncoderConfig(str(tiny_embedder)), Runtime(torch.device("cpu"), "fp32"))
    long = " ".join(
        f"the film was {word} and so very good, it was a story n{number}"
        for number, word in enumerate(["fine", "poor"] * 20)
    )
    (short,), pieces = split_into_chunks(["good film", long], encoder, overlap=10)
    assert short == (0, "good film")
    assert pieces[0][0] == 0 and pieces[-1][0] + len(pieces[-1][1]) == len(long)
    for (start, piece), (following, _) in zip(pieces, pieces[1:]):
        assert long[start : start + len(piece)] == piece and start < following < start + len(piece)
    assert encoder.tokenize([piece for _, piece in pieces])[1] == 0  # none is cut
    with pytest.raises(UserError, match="--chunk-overlap 62"):
        split_into_chunks([long], encoder, overlap=62)


# What a collection comes from: files, flags, the texts
SOURCES = {
    "no header": ({"t.csv": "a,one\nb,two\n"}, "t.csv", {"columns": ("id", "text")}, ["one", "two"]),
    "no ending": ({"t": 'a\t"one\nb\ttwo\n'}, "t", {"columns": ("id", "text")}, ['"one', "two"]),
    "compressed": ({"t.jsonl.gz": gzip.compress(b'{"text": "one"}\n')}, "t.jsonl.gz", {}, ["one"]),
    "compressed lines": ({"t.txt.gz": gzip.compress(b"one\ntwo\n")}, "t.txt.gz", {}, ["one", "two"]),
    "compressed Markdown": ({"t.md.gz": gzip.compress(b"one\n\ntwo\n")}, "t.md.gz", {}, ["one\n\ntwo"]),
    "Latin-1 Markdown": ({"t.md": b"sch\xf6n\r\n"}, "t.md", {"encoding": "latin-1"}, ["schön"]),
    "UTF-16 lines": (
        {"t.txt": "eins\nzwö\n".encode("utf-16")},
        "t.txt",
        {"encoding": "utf-16"},
        ["eins", "zwö"],
    ),
    "first Macs": ({"t.txt": b"one\rtwo\r"}, "t.txt", {}, ["one", "two"]),
    "fastText": ({"t.ft": "__label__a one\n"}, "t.ft", {}, ["one"]),
    "a folder": ({"d/a.md": "one", "d/b.TXT": "two", "d/c/d.txt": "three"}, "d", {}, ["one", "two", "three"]),
    "a folder in Latin-1": ({"d/a.txt": b"sch\xf6n"}, "d", {"encoding": "latin-1"}, ["schön"]),
}


@pytest.mark.parametrize("files, name, options, expected", SOURCES.values(), ids=SOURCES)
def test_collections_as_they_come(files, name, options, expected, tmp_path, cache_dir):
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read(tmp_path / name, cache_dir, options=FileOptions(**options))
    assert [row[TEXT] for row in rows_of(found)] == expected


@pytest.mark.parametrize("content", ['{"id": "01", "text": "one"}\n', '[{"id": "01", "text": "one"}]'])
def test_a_collection_of_json_through_standard_input(content, cache_dir, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert rows_of(read("-", cache_dir, id_column="id")) == [{"id": "01", TEXT: "one"}]


def test_ids_stay_as_they_are_written(tmp_path, cache_dir):
    (tmp_path / "t.csv").write_text("id,text,year\n0012,one,2004\n1.10,two,2005\n")
    found = rows_of(read(tmp_path / "t.csv", cache_dir, id_column="id"))
    assert [(row["id"], row["year"]) for row in found] == [("0012", 2004), ("1.10", 2005)]


def test_what_a_folder_holds_beside_its_texts_is_said(tmp_path, cache_dir, capsys):
    for name in ("a.txt", "train.csv", "b.pdf"):
        (tmp_path / name).write_text("text")
    assert len(read(tmp_path, cache_dir)) == 1
    assert "2 of its files" in capsys.readouterr().err
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="gone.txt: can't be read"):
        read(tmp_path, cache_dir)


def test_a_text_of_20_mb_is_refused_or_passed_over(tmp_path, cache_dir):
    (tmp_path / "t.txt").write_text("good\n" + "word " * (4 << 20) + "\n")
    with pytest.raises(UserError, match="t.txt, line 2: the text has more than 10,000,000 characters"):
        read(tmp_path / "t.txt", cache_dir)
    assert len(read(tmp_path / "t.txt", cache_dir, skip_bad=True)) == 1


def test_a_text_column_goes_by_its_whole_name_first(tmp_path, cache_dir):
    path = tmp_path / "t.csv"

    def found(named: str) -> list[str]:
        return [row[TEXT] for row in rows_of(read(path, cache_dir, text_column=named))]

    path.write_text('id, d,b," d,b"\n1,two,three,four\n')
    for named, text in [(" d,b", "four"), (" d, b", "two three"), ("b, d", "three two"), (" d", "two")]:
        assert found(named) == [text]
    path.write_text("id, d,b\n1,two,three\n")
    assert found(" d,b") == ["two three"]
    for named, problem in [("b,b", "'b' comes twice"), ("b,", "one is empty"), ("b,d", "no column 'd'")]:
        with pytest.raises(UserError, match=f"{problem}.*--text-column"):
            found(named)
