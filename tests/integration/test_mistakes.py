"""A user's mistake ends in one line that names it and the way out, with exit code 2, before
training, with nothing overwritten.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

import train_classifier
from common import cli
from common.training import training_flags
from common.training.saved_settings import name_sha256
from conftest import (
    ROOT,
    exit_code_in_process,
    heavy,
    make_sentences,
    may_mount,
    train_wordpiece,
    with_defaults,
)

GOOD = "text,label\n" + "".join(f"{text},{label}\n" for text, label in make_sentences(120))
BUNDLED = "bundled/all-MiniLM-L6-v2"


def is_of_saved_model(flags: tuple) -> bool:
    """Return whether flags ask for scores or answers of a saved model: no training, and no folder."""
    return not {"--predict", "--evaluate-only"}.isdisjoint(map(str, flags))


@pytest.fixture(scope="session")
def script(tiny_model, cache_dir):
    """Return a function that runs train_classifier.py in this process: a small model, one epoch;
    returns code, stdout, stderr.
    """

    def run(*flags) -> tuple[int, str, str]:
        defaults = {"--model": tiny_model, "--cache-dir": cache_dir, "--device": "cpu", "--precision": "fp32"}
        if not is_of_saved_model(flags):
            defaults["--epochs"] = 1
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = exit_code_in_process(train_classifier, with_defaults(flags, defaults))
        return code, stdout.getvalue(), stderr.getvalue()

    return run


@pytest.fixture
def refused(script, tmp_path, capfd):
    """Return a function that runs the script and checks that it is refused in one line, holding
    all of `parts`, and that nothing is made.
    """

    def check(*flags, parts: tuple[str, ...], trained: bool = False):
        folder = tmp_path / "run"
        has_none = "--output-dir" in flags or is_of_saved_model(flags)
        code, stdout, stderr = script(*flags, *(() if has_none else ("--output-dir", folder)))
        assert code == 2, stdout + stderr
        assert re.fullmatch(r"train_classifier\.py: error: [^\n]+\n", stderr), stderr
        assert [part for part in parts if part not in stderr] == [], stderr
        assert capfd.readouterr() == ("", "")  # nor does a library write past Python's streams
        if not trained:
            assert not folder.exists() and "training loss" not in stdout

    return check


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


FILES = {  # name: (file's name, content, what the line must hold)
    "unknown ending": (
        "rows.xlsx",
        "PK",
        ("rows.xlsx", "'.xlsx'", ".csv, .tsv, .json, .jsonl, .ndjson, .parquet", "as .csv"),
    ),
    "empty": ("rows.csv", "", ("rows.csv", "is empty", "name one")),
    "header only": ("rows.csv", "text,label\n", ("rows.csv", "no rows", "name one")),
    "empty list": ("rows.json", "[]", ("rows.json", "no rows", "name one")),
    "blank lines only": ("rows.csv", "\n\n", ("rows.csv", "no rows", "name one")),
    "broken JSON": ("rows.json", '[{"text": "a",', ("rows.json", "not readable as json", "correct")),
    "broken JSON lines": (
        "rows.jsonl",
        '{"text": "a", "label": "x"}\n{"text": \n',
        ("rows.jsonl, line 2", "not readable as json", "correct"),
    ),
    "broken Parquet": (
        "rows.parquet",
        "PAR1 and no more",
        ("rows.parquet", "not readable as parquet", "correct"),
    ),
    "not UTF-8": (
        "rows.csv",
        "text,label\na,x\nsch\u00f6n,y\n".encode("latin-1"),
        ("rows.csv, line 3", "0xf6", "convert"),
    ),
    "not UTF-8 in JSON": (
        "rows.jsonl",
        '{"text": "sch\u00f6n", "label": "x"}\n'.encode("latin-1"),
        ("rows.jsonl, line 1", "0xf6", "convert"),
    ),
    "ragged": ("rows.csv", "text,label\na,x\nc,d,e,f\n", ("rows.csv, line 3", "4 cells", "2 columns")),
    "too short a line": (
        "rows.csv",
        "text,label\na,x\nc\n",
        ("rows.csv, line 3", "1 cell,", "2 columns", "correct"),
    ),
    "unclosed quote": (
        "rows.csv",
        'text,label\n"a,x\nb,y\n',
        ("rows.csv, line 2", "never closed", "correct"),
    ),
    "no text column": (
        "rows.csv",
        "review,label\na,x\nb,y\n",
        ("split train", "'text'", "review, label", "--text-column"),
    ),
    "no label column": (
        "rows.csv",
        "text,stars\na,x\nb,y\n",
        ("split train", "'label'", "text, stars", "--label-column"),
    ),
    "column name with a line break": (
        "rows.csv",
        'text,"la\nbel"\na,x\nb,y\n',
        ("split train", "'label'", "--label-column"),
    ),
    "null text": (
        "rows.jsonl",
        '{"text": "a", "label": "x"}\n{"text": null, "label": "y"}',
        ("train, row 2", "'text'", "missing", "fill it in"),
    ),
    "lacking text": (
        "rows.jsonl",
        '{"text": "a", "label": "x"}\n{"label": "y"}\n',
        ("split train, row 2", "'text'", "missing", "fill it in"),
    ),
    "blank text": (
        "rows.csv",
        'text,label\na,x\nb,x\n"  ",y\n',
        ("split train, row 3", "'text'", "empty", "fill it in"),
    ),
    "a text that can't be seen": (
        "rows.csv",
        "text,label\na,x\n\u200b\ufeff,x\nb,y\n",
        ("split train, row 2", "'text'", "empty"),
    ),
    "a label that can't be seen": (
        "rows.csv",
        "text,label\na,x\nb,\u200b\n",
        ("split train, row 2", "'label'", "missing"),
    ),
    "a column name that can't be seen whole": (
        "rows.csv",
        "\ufeff\ufefftext, label\na,x\nb,y\n",
        ("split train", "'text'", r"'\ufefftext', ' label'"),
    ),
    "hundreds of columns": (
        "rows.csv",
        ",".join(f"c{number}" for number in range(300)) + "\n" + "," * 299 + "\n",
        ("split train", "'text'", "c0, c1", "300 in all", "--text-column"),
    ),
    "missing label": (
        "rows.csv",
        "text,label\na,x\nb,\n",
        ("split train, row 2", "'label'", "missing", "fill it in"),
    ),
    "missing number label": (
        "rows.csv",
        "text,label\na,1\nb,\n",
        ("split train, row 2", "'label'", "missing", "fill it in"),
    ),
    "null label": (
        "rows.jsonl",
        '{"text": "a", "label": 1}\n{"text": "b", "label": null}',
        ("train, row 2", "'label'", "missing", "fill it in"),
    ),
    "a list of labels with a hole": (
        "rows.jsonl",
        '{"text": "a", "label": ["x", null]}\n{"text": "b", "label": ["y"]}\n',
        ("split train, row 1", "'label'", "missing", "fill it in"),
    ),
    "rows within an object": (
        "rows.json",
        '{"status": "ok", "results": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "next": []}',
        ("'text' among status, results, next", "only object", "list 'results'", "save this list as a file"),
    ),
    "rows within an object, under a key that jq wants in quotes": (
        "rows.json",
        '{"search-results": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]}',
        ("list 'search-results'", """jq '.["search-results"]'"""),
    ),
    "a line for Excel": (
        "rows.csv",
        "SEP=;\r\ntext;label\r\na;x\r\nb;y\r\n",
        ("rows.csv, line 1: 'SEP=;'", "Excel", "remove this line"),
    ),
    "lists of numbers of two lengths": (
        "rows.jsonl",
        '{"text": "a", "label": [1.5, 2.5]}\n{"text": "b", "label": [0.5]}\n',
        ("split train, row 2", "'label'", "1 number,", "row 1", "correct"),
    ),
    "lists of lists": (
        "rows.jsonl",
        '{"text": "a", "label": [[1]]}\n',
        ("split train", "'label' holds lists of List", "--label-column", "--task"),
    ),
    "numeric text": (
        "rows.jsonl",
        '{"text": 1, "label": "x"}\n{"text": 2, "label": "y"}\n',
        ("split train", "'text' holds int64", "--text-column"),
    ),
    "nested text": (
        "rows.jsonl",
        '{"text": {"de": "a"}, "label": "x"}\n',
        ("split train", "'text' holds dict", "--text-column"),
    ),
    "one class": (
        "rows.csv",
        "text,label\na,x\nb,x\n",
        ("split train", "'x'", "at least two classes", "--label-column"),
    ),
    "a label as long as a text": (
        "rows.csv",
        "text,label\n" + "a,x\n" * 20 + "b," + "long " * 200 + "\n",
        ("validation", "'long long", "' has 1, and 3"),
    ),
    "a class too small to cut": (
        "rows.csv",
        "text,label\n" + "a,x\n" * 20 + "b,rare\n",
        ("validation", "'rare' has 1", "--drop-rare 3", "add rows"),
    ),
}


@pytest.mark.parametrize("name, content, parts", FILES.values(), ids=FILES)
def test_a_data_file_that_can_not_be_used(name, content, parts, refused, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("--dataset", tmp_path / name, parts=parts)


@pytest.mark.parametrize("splits", [None, "train"])
def test_a_folder_of_save_to_disk_is_named_as_what_it_is(splits, refused, tmp_path, capfd):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    (rows if splits is None else datasets.DatasetDict({splits: rows})).save_to_disk(tmp_path / "saved")
    capfd.readouterr()  # its progress bar
    refused("--dataset", tmp_path / "saved", parts=("saved: ", "save_to_disk", "to_parquet"))


def test_a_null_in_parquet(refused, tmp_path):
    pq.write_table(pa.table({"text": ["a", "b", None], "label": ["x", "y", "x"]}), tmp_path / "rows.parquet")
    refused(
        "--dataset",
        tmp_path / "rows.parquet",
        parts=("split train, row 3", "'text'", "missing", "fill it in"),
    )


@pytest.mark.parametrize("name", ["csv", "json", "text", "parquet"])
def test_the_name_of_a_format_is_no_data_set(name, refused, tmp_path, monkeypatch):
    """The library would read all files of the working directory."""
    (tmp_path / f"rows.{name}").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    refused("--dataset", name, parts=(f"--dataset {name}", "format", "name a file or folder"))


def test_a_field_and_a_column_of_one_name(refused, tmp_path):
    row = '{"doc": {"text": "a", "x": 1}, "doc.x": 2, "label": "x"}\n'
    (tmp_path / "rows.jsonl").write_text(row)
    refused("--dataset", tmp_path / "rows.jsonl", "--text-column", "doc.text", parts=("'doc.x'", "rename"))


@pytest.mark.parametrize("name", ["nowhere.csv", "./nowhere", "a/b/c", "nowhere/train.parquet"])
def test_a_data_set_that_is_not_there(name, refused):
    refused("--dataset", name, parts=(f"--dataset {name}: no such file or folder", "check the path"))


FOLDERS = {  # name: (files, what the line must hold)
    "a label that train lacks": (
        {"train.csv": GOOD, "validation.csv": "text,label\na,pos\nb,meh\n"},
        ("split validation, row 2", "'meh'", "training split (neg, pos)", "correct or remove"),
    ),
    "no such column in one split": (
        {"train.csv": GOOD, "test.csv": "review,label\na,pos\n"},
        ("split test", "'text'", "review", "--text-column"),
    ),
    "a blank text in one split": (
        {"train.csv": GOOD, "test.csv": 'text,label\na,pos\n"",neg\n'},
        ("split test, row 2", "empty", "fill it in"),
    ),
    "a broken file among good ones": (
        {"train.csv": GOOD, "test.csv": "text,label\na,pos\nb,c,d\n"},
        ("test.csv, line 3", "3 cells", "--skip-bad"),
    ),
    "an empty file among good ones": (
        {"train.csv": GOOD, "test.csv": ""},
        ("test.csv", "is empty", "name one"),
    ),
    "no training split": (
        {"validation.csv": GOOD, "test.csv": GOOD},
        ("--train-split train", "test, validation", "name one"),
    ),
    "data files and folders of texts": (
        {"train.csv": GOOD, "pos/1.txt": "good", "neg/1.txt": "bad"},
        ("train.csv", "neg", "name one"),
    ),
    "a folder named as a data file": (
        {"train.csv": GOOD, "test.csv/part.bin": GOOD},
        ("test.csv is no file", "name one of the files"),
    ),
    "two files of one split": (
        {"train.csv": GOOD, "train.jsonl": '{"text": "a", "label": "pos"}\n'},
        ("train.csv", "train.jsonl", "--train-file"),
    ),
    "two compressions of one split": (
        {"train.csv": GOOD, "train.csv.gz": "no gzip"},
        ("train.csv", "train.csv.gz", "--train-file"),
    ),
    "a shard that is not there": (
        {"train-00000-of-00002.csv": GOOD, "test.csv": GOOD},
        ("1 of 2 parts", "'train'"),
    ),
    "a file beside its shards": (
        {"train-00000-of-00001.csv": GOOD, "train.csv": GOOD},
        ("train-00000-of-00001.csv", "train.csv", "both"),
    ),
    "folders of texts and of classes": (
        {"pos/1.txt": "good", "neg/1.txt": "bad", "neg/old/1.txt": "bad"},
        ("pos holds texts", "neg holds folders"),
    ),
    "nothing to read": (
        {"notes.md": "nothing"},
        ("neither class folders of .txt files nor data files", "name a folder"),
    ),
    "an empty text in class folders": (
        {"pos/1.txt": "good", "neg/1.txt": "bad", "neg/2.txt": " \n"},
        ("neg/2.txt", "empty", "remove the file"),
    ),
    "class folders with one class": (
        {"pos/1.txt": "good", "pos/2.txt": "fine"},
        ("'pos'", "at least two classes"),
    ),
}


@pytest.mark.parametrize("files, parts", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_can_not_be_used(files, parts, refused, tmp_path):
    for name, content in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(content)
    refused("--dataset", tmp_path / "data", parts=parts)


FLAGS = {  # name: (flags, what the line must hold)
    "the text as its own label": (["--label-column", "text"], ("--text-column text", "--label-column")),
    "a file of a split that is not there": (["--test-file", "nowhere.csv"], ("--test-file", "nowhere.csv")),
    "a folder for a file": (["--train-file", "tests"], ("--train-file", "tests", "no such file")),
    "a data set and a file of its training split": (
        ["--dataset", "bundled/bbc-news", "--train-file", __file__],
        ("--train-file", "--dataset", "not allowed"),
    ),
    "columns without names": (["--columns", "label,,text"], ("--columns", "'label,,text'", "empty")),
    "a column twice": (["--columns", "text,text"], ("--columns", "'text' twice")),
    "no delimiter": (["--delimiter", ""], ("--delimiter", "''", "tab")),
    "a quotation mark as delimiter": (["--delimiter", '"'], ("--delimiter", "tab")),
    "unknown encoding": (["--encoding", "utf-88"], ("--encoding", "'utf-88'", "latin-1")),
    "an encoding of bytes": (["--encoding", "hex"], ("--encoding", "'hex'")),
    "unknown quoting": (["--quoting", "all"], ("--quoting", "'all'", "none")),
    "split name": (["--test-split", "tset"], ("--test-split tset", "has train", "name one")),
    "max length above the model": (["--max-length", 65], ("--max-length 65", "holds 64", "at most")),
    "max length above the bundled model": (
        ["--max-length", 513, "--model", BUNDLED],
        ("--max-length 513", "holds 512", "at most"),
    ),
    "max length for special tokens only": (
        ["--max-length", 2],
        ("--max-length 2", "special tokens", "use more"),
    ),
    "sample of fewer rows than classes": (
        ["--max-train-samples", 1],
        ("--max-train-samples 1", "use at least 2"),
    ),
    "unknown bundled model": (["--model", "bundled/nope"], ("--model bundled/nope", BUNDLED)),
    "unknown bundled data": (["--dataset", "bundled/nope"], ("--dataset bundled/nope", "bundled/bbc-news")),
    "model folder that is not there": (["--model", "./nowhere"], ("--model ./nowhere", "no such folder")),
    "fp16 on a CPU": (["--precision", "fp16"], ("--precision fp16", "cpu", "use bf16 or fp32")),
    "lr nan": (["--lr", "nan"], ("--lr", "'nan'", "a number above 0")),
    "lr 0": (["--lr", "0"], ("--lr", "'0'", "a number above 0")),
    "epochs 0": (["--epochs", "0"], ("--epochs", "'0'", "a whole number above 0")),
    "batch size 1.5": (["--batch-size", "1.5"], ("--batch-size", "'1.5'", "a whole number above 0")),
    "epochs beyond any count": (["--epochs", "9" * 400], ("--epochs", "999...'", "below 2**31")),
    "minutes beyond any clock": (["--max-minutes", "1e300"], ("--max-minutes", "'1e300'", "at most 1e6")),
    "a rank above that of every matrix": (["--lora-rank", 33], ("--lora-rank 33", "above 32", "at most")),
    "a rank beyond all memory": (["--lora-rank", 10**9], ("--lora-rank 1000000000", "above 32")),
    "warm-up 1": (["--warmup-ratio", "1"], ("--warmup-ratio", "'1'", "from 0 up to, not including, 1")),
    "seed -1": (["--seed", "-1"], ("--seed", "'-1'", "from 0 to")),
    "metric": (["--best-metric", "f1"], ("--best-metric", "'f1'", "accuracy", "macro_f1", "loss")),
    "unknown flag": (["--learning-rate", "1"], ("--learning-rate", "--help")),
    "abbreviated flag": (["--max-len", "32"], ("--max-len", "--help")),
    "a tokenizer to compare without an inspection": (
        ["--compare-tokenizer", BUNDLED],
        (f"--compare-tokenizer {BUNDLED}", "--inspect"),
    ),
    "a tokenizer to compare that is not there": (
        ["--inspect", "--compare-tokenizer", "./nowhere"],
        ("--compare-tokenizer ./nowhere", "no such folder"),
    ),
    "an unknown bundled tokenizer to compare": (
        ["--inspect", "--compare-tokenizer", "bundled/nope"],
        ("--compare-tokenizer bundled/nope", "no such bundled", BUNDLED),
    ),
    "a grid without values": (["--grid", "epochs"], ("--grid", "'epochs'", "batch-size=8,16")),
    "a grid of what is no flag": (["--grid", "epoch=1,2"], ("--grid epoch=1,2", "no flag of a training")),
    "a grid of seeds": (["--grid", "seed=1,2"], ("--grid seed=1,2", "--seeds")),
    "a value of a grid that can't be": (["--grid", "batch-size=1,0"], ("--batch-size", "'0'", "above 0")),
    "a switch with other values": (["--grid", "compile=1"], ("--grid compile=1", "compile=true,false")),
    "a seed twice": (["--seeds", 1, 2, 1], ("--seeds 1 2 1", "twice")),
    "a rate varied twice": (["--lr", 1, 2, "--grid", "lr=1"], ("--grid lr=1", "twice")),
    "a value beside a grid": (
        ["--batch-size", 4, "--grid", "batch-size=8,16"],
        ("--grid batch-size=8,16", "--batch-size has a value of its own, 4"),
    ),
    "a value of a grid twice": (
        ["--grid", "lr=1e-3,2e-3,0.001"],
        ("--grid: lr 1e-3 and lr 0.001 are the same",),
    ),
    "seeds to look at": (["--seeds", 1, 2, "--inspect"], ("--seeds", "leave them out, or --inspect")),
    "a grid of predictions": (
        ["--grid", "lr=1,2", "--predict", __file__],
        ("--grid", "leave them out, or --predict"),
    ),
    "a study that is not there": (["--seeds", 1, "--resume"], ("--resume", "holds no study")),
    "checkpoints that are not kept": (
        ["--keep", 0, "--save-every", 2],
        ("--save-every 2", "--keep 0", "leave one out"),
    ),
    "two modes": (["--inspect", "--evaluate-only"], ("--inspect", "--evaluate-only", "not allowed with")),
    "a file for the cache": (
        ["--cache-dir", __file__],
        ("--cache-dir", "test_mistakes.py is a file", "name a folder"),
    ),
}


@pytest.mark.parametrize("flags, parts", FLAGS.values(), ids=FLAGS)
def test_a_flag_that_can_not_be_used(flags, parts, refused, sentences_csv):
    refused(*(() if "--dataset" in flags else ("--dataset", sentences_csv)), *flags, parts=parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that the user lacks")
def test_a_device_that_is_not_there(refused, sentences_csv):
    refused(
        "--dataset",
        sentences_csv,
        "--device",
        "cuda",
        parts=("--device cuda", "none on this machine", "--device auto"),
    )


def test_an_output_folder_that_holds_a_run_stays_as_it_is(refused, sentences_csv, tmp_path):
    (tmp_path / "old" / "best").mkdir(parents=True)
    for name in ("config.json", "best/model.safetensors"):
        (tmp_path / "old" / name).write_bytes(os.urandom(100))
    before = fingerprint(tmp_path)
    refused(
        "--dataset",
        sentences_csv,
        "--output-dir",
        tmp_path / "old",
        parts=(f"--output-dir {tmp_path / 'old'}", "another run", "name a new"),
    )
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_an_output_folder_that_is_a_file_or_below_one(below, refused, sentences_csv, tmp_path):
    (tmp_path / "file").write_text("precious")
    folder = tmp_path / "file" / below
    refused(
        "--dataset",
        sentences_csv,
        "--output-dir",
        folder,
        parts=("--output-dir", f"{tmp_path / 'file'} is a file", "name a folder"),
    )
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="no right to mount a small file system here")
def test_a_disk_without_space(tiny_model, cache_dir, sentences_csv, tmp_path):
    """A 64 kB file system at /mnt, seen by one process only, holds neither a run nor what the
    cache needs.
    """
    (tmp_path / "large.csv").write_text(
        "text,label\n" + "".join(f"{text * 10},{label}\n" for text, label in make_sentences(200))
    )
    cache = ["--cache-dir", "/mnt/cache", "--output-dir", tmp_path / "run"]
    runs = [
        ["--dataset", sentences_csv, "--cache-dir", cache_dir, "--output-dir", "/mnt/a/run"],
        ["--dataset", tmp_path / "large.csv", *cache],
        ["--dataset", sentences_csv, *cache],
        ["--dataset", tmp_path / "large.csv", *cache],
    ]
    code = """import json, os, sys; import train_classifier; from common import cli
for flags in json.loads(sys.argv[1]):
    try: cli.run(train_classifier.make_parser(), train_classifier.main, flags)
    except SystemExit as exit: print("code", exit.code, os.path.exists("/mnt/a"))"""
    command = [
        sys.executable,
        "-c",
        code,
        json.dumps([[str(flag) for flag in ("--model", tiny_model, "--epochs", 1, *run)] for run in runs]),
    ]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64k none /mnt && "$@"', "sh", *command],
        text=True,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    run_line, *cache_lines = done.stderr.splitlines()
    assert re.match(
        "train_classifier.py: error: --output-dir /mnt/a/run: the run needs [0-9,]+ kB, the disk has [0-9]+"
        " kB free; free some space or name .* another disk",
        run_line,
    )
    for line in cache_lines:
        assert re.match(
            "train_classifier.py: error: (No space left on device|Not enough disk space); free some space, or"
            " .*--cache-dir",
            line,
        )
    assert re.findall("code .*", done.stdout) == ["code 2 False"] * 4 and "epoch" not in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        OSError(122, "Disk quota exceeded"),
        OSError("Not enough disk space. Needed: Unknown size"),
    ],
)
def test_a_disk_that_fills_up_during_a_run(error, capsys):
    def main(args):
        try:
            raise error
        finally:  # as libraries do that trip over the error while they clean up after it
            raise ValueError("I/O operation on closed file")

    with pytest.raises(SystemExit, match="2"):
        cli.run(train_classifier.make_parser(), main, [])
    words = "No space left on device|Disk quota exceeded|Not enough disk space"
    assert re.fullmatch(f"train_classifier.py: error: ({words}); free .*\n", capsys.readouterr().err)


def test_a_model_folder_without_a_config(refused, sentences_csv, tmp_path):
    (tmp_path / "model").mkdir()
    refused(
        "--dataset",
        sentences_csv,
        "--model",
        tmp_path / "model",
        parts=(f"--model {tmp_path / 'model'}", "no config.json", "name the folder of a saved model"),
    )


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_a_model_folder_without_a_tokenizer(kind, refused, sentences_csv, tmp_path):
    """transformers makes one up that knows no word, and every text becomes a row of unknown
    tokens.
    """
    AutoConfig.for_model(kind).save_pretrained(tmp_path / "model")
    refused(
        "--dataset",
        sentences_csv,
        "--model",
        tmp_path / "model",
        parts=(f"--model {tmp_path / 'model'}", "tokenizer"),
    )


@pytest.mark.parametrize(
    "file, content, parts",
    [("model.safetensors", "no weights", ("header",)), ("config.json", "{", ("JSON",))],
)
def test_a_damaged_model_folder(file, content, parts, refused, tiny_model, sentences_csv, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / file).write_text(content)
    refused(
        "--dataset", sentences_csv, "--model", tmp_path / "model", parts=("--model", *parts, "name another")
    )


@pytest.fixture(scope="session")
def trained(script, sentences_csv, tmp_path_factory) -> Path:
    """The best model of a run with seed 0 on sentences.csv, named as from the folder in which the
    run was started.
    """
    folder = tmp_path_factory.mktemp("trained") / "run"
    code, _, stderr = script("--dataset", os.path.relpath(sentences_csv), "--output-dir", folder)
    assert (code, stderr) == (0, "")
    return folder / "best"


@pytest.mark.parametrize("mode", [["--predict", __file__], ["--evaluate-only"], []])
def test_the_folder_of_a_run_in_the_place_of_its_model(mode, refused, trained, sentences_csv):
    source = [] if "--predict" in mode else ["--dataset", sentences_csv]
    parts = (f"--model {trained.parent}", f"its model is {trained}")
    refused(*mode, "--model", trained.parent, *source, parts=parts)


@pytest.mark.parametrize(
    "place", [lambda best: best, lambda best: next((best.parent / "checkpoints").iterdir()) / "best"]
)
def test_a_model_in_the_place_of_its_run(place, refused, trained):
    parts = ("the model of the run", f"--resume {trained.parent} continues")
    refused("--resume", place(trained), parts=parts)


@pytest.mark.parametrize("content", ["{}", "{", "[]"])
def test_a_config_around_a_model_is_not_yet_a_run(content, refused, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "models" / "one")
    (tmp_path / "models" / "config.json").write_text(content)
    refused("--resume", model, parts=("a saved model, and no run", "--model"))


@pytest.mark.parametrize("flag, name", [("dataset", "here.csv"), ("tokenizer", "own")])
def test_a_run_that_was_started_in_another_folder(
    flag, name, refused, trained, sentences_csv, tmp_path, monkeypatch
):
    """A name that is not here could be one on the Hub."""
    run = Path(shutil.copytree(trained.parent, tmp_path / "elsewhere" / "run"))
    config = json.loads((run / "config.json").read_text())
    assert config["started_in"] == os.getcwd()
    config |= {"dataset": str(sentences_csv), "started_in": str(tmp_path / "here"), flag: name}
    (run / "config.json").write_text(json.dumps(config))
    (tmp_path / "here" / name).mkdir(parents=True)
    monkeypatch.chdir(run)
    parts = (f"started in {tmp_path / 'here'}, and its --{flag} {name} is not here", f"name --{flag} too")
    refused("--resume", run, "--output-dir", run, parts=parts)


def test_the_folder_of_the_start_is_in_no_file_for_others(trained):
    files = [path for path in trained.parent.rglob("*") if path.is_file()]
    told = [path.relative_to(trained.parent) for path in files if os.getcwd().encode() in path.read_bytes()]
    assert told == [Path("config.json")]


def test_a_name_on_the_hub_is_no_folder_that_lies_around_the_run(trained, tmp_path):
    run = Path(shutil.copytree(trained.parent, tmp_path / "imdb" / "run"))
    config = json.loads((run / "config.json").read_text())
    config |= {"dataset": "imdb", "started_in": str(tmp_path / "imdb")}
    (run / "config.json").write_text(json.dumps(config))
    flags = training_flags.flags_besides(train_classifier.make_parser(), ["--resume", str(run)])
    assert "--dataset=imdb" in flags


def test_a_model_of_other_data_is_not_scored_on_the_default(refused, trained):
    refused(
        "--evaluate-only", "--model", trained, parts=(f"{trained} is not known", "name the data", "--dataset")
    )
    settings = trained / "training.json"
    told = json.loads(settings.read_text())
    settings.write_text(json.dumps({**told, "dataset_sha256": name_sha256("bundled/bbc-news")}))
    refused("--evaluate-only", "--model", trained, parts=("the label 'business' is not one",))
    settings.write_text(json.dumps(told))


@pytest.mark.parametrize("mode", [["--predict", __file__], ["--evaluate-only", "--test-file", __file__]])
def test_a_saved_model_is_not_calibrated(mode, refused, trained):
    refused(*mode, "--model", trained, "--calibrate", parts=("--calibrate", "belongs to a training"))


@pytest.mark.parametrize("mode", ["--predict", "--evaluate-only"])
def test_a_model_that_was_never_trained_to_classify(mode, refused, sentences_csv):
    data = [sentences_csv] if mode == "--predict" else ["--dataset", sentences_csv]
    refused(
        mode,
        *data,
        "--model",
        BUNDLED,
        parts=(f"--model {BUNDLED}", "never trained to classify", "runs/<name>/best"),
    )


LINES = {  # name: (content or None for no file, what the line must hold)
    "no such file": (None, ("new.txt", "No such file", "name a text file")),
    "empty": (b"", ("new.txt", "is empty", "one text on each line")),
    "an empty line": (
        b"good film\n\nbad film\n",
        ("new.txt, line 2", "is empty", "remove the line", "--skip-bad"),
    ),
    "not UTF-8": (b"good film\nsch\xf6n\n", ("new.txt, line 2", "0xf6", "convert")),
}


@pytest.mark.parametrize("content, parts", LINES.values(), ids=LINES)
def test_texts_that_can_not_be_predicted(content, parts, refused, trained, tmp_path):
    if content is not None:
        (tmp_path / "new.txt").write_bytes(content)
    refused("--predict", tmp_path / "new.txt", "--model", trained, parts=parts)


def test_nothing_on_standard_input(refused, trained, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    refused(
        "--predict", "-", "--model", trained, parts=("standard input", "is empty", "one text on each line")
    )


def test_an_empty_name_of_a_file_is_no_wish_to_train(refused, trained, sentences_csv):
    """As in --predict "$FILE" where FILE is not set."""
    refused(
        "--predict",
        "",
        "--dataset",
        sentences_csv,
        "--model",
        trained,
        parts=("--predict", "the name is empty"),
    )


def test_scoring_on_classes_that_the_model_does_not_know(refused, trained, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,pos\nb,meh\n")
    refused(
        "--evaluate-only",
        "--dataset",
        tmp_path / "rows.csv",
        "--model",
        trained,
        parts=("split train, row 2", "'meh'", "the model's training (neg, pos)", "correct or remove"),
    )


@pytest.mark.parametrize(
    "spelled", [lambda path: path, lambda path: os.path.relpath(path)], ids=["from the root", "from here"]
)
def test_scoring_a_cut_split_with_another_seed(spelled, refused, trained, sentences_csv):
    """Another seed cuts another test split, most of which the model was trained on."""
    refused(
        "--evaluate-only",
        "--dataset",
        spelled(sentences_csv),
        "--model",
        trained,
        "--seed",
        1,
        parts=("--seed 1", "trained with --seed 0", "use that seed"),
    )


def test_scoring_needs_no_more_than_a_test_split(script, trained, tmp_path):
    """What else is in the data set does not matter: a validation split with other labels, no
    training split.
    """
    (tmp_path / "test.csv").write_text(GOOD)
    (tmp_path / "validation.csv").write_text("text,label\na,meh\n")
    code, stdout, stderr = script("--evaluate-only", "--dataset", tmp_path, "--model", trained)
    assert (code, stderr) == (0, "") and "120 texts of its test split" in stdout


@pytest.mark.parametrize(
    "batch_size, parts",
    [
        # seen at the tenth step
        (8, ("the training loss is no longer finite", "rows", "lower --lr")),
        # an epoch of 6 steps: seen at its end
        (16, ("the training loss is no longer finite", "rows", "lower --lr")),
        # the only step's loss was still finite
        (96, ("epoch 1, step 1: the validation loss is nan", "lower --lr")),
    ],
)
def test_a_loss_that_is_not_a_number_stops_the_run(batch_size, parts, refused, sentences_csv, tmp_path):
    flags = ["--lr", "1e30", "--warmup-ratio", 0, "--batch-size", batch_size]
    refused("--dataset", sentences_csv, *flags, parts=parts, trained=True)
    assert {"config.json", "metrics.jsonl"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not (tmp_path / "run" / "best").exists()


def test_the_rows_of_a_loss_that_is_not_a_number_are_rows_of_the_data(script, sentences_csv, tmp_path):
    _, _, stderr = script(
        "--dataset",
        sentences_csv,
        "--output-dir",
        tmp_path / "run",
        "--lr",
        "1e30",
        "--warmup-ratio",
        0,
        "--batch-size",
        8,
    )
    rows = [
        int(row) for row in re.search(r"with the rows ([\d, ]+) of the data", stderr).group(1).split(", ")
    ]
    assert len(set(rows)) == 8 and all(1 <= row <= 120 for row in rows)


@pytest.fixture(scope="session")
def foreign_tokenizer(tiny_model, tmp_path_factory) -> Path:
    """The small model with the tokenizer of a bigger one: its ids go beyond the embedding
    table.
    """
    folder = tmp_path_factory.mktemp("foreign") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = train_wordpiece([text for text, _ in make_sentences(1000)], vocab_size=600)
    assert len(tokenizer) == 600
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_of_another_model_is_refused_in_training(foreign_tokenizer, refused, sentences_csv):
    refused(
        "--dataset",
        sentences_csv,
        "--model",
        foreign_tokenizer,
        parts=(f"--model {foreign_tokenizer}", "up to 599", "300 rows", "--inspect"),
    )


def test_a_tokenizer_of_another_model_is_a_warning_in_inspection(
    foreign_tokenizer, tiny_model, script, sentences_csv
):
    code, stdout, stderr = script("--dataset", sentences_csv, "--model", foreign_tokenizer, "--inspect")
    assert (code, stderr) == (0, "")
    assert [line for line in stdout.splitlines() if re.match("WARNING: .*up to 599.*300 rows", line)]
    _, stdout, _ = script("--dataset", sentences_csv, "--model", tiny_model, "--inspect")
    assert "WARNING" not in stdout


def test_a_tokenizer_without_a_padding_token_gets_its_end_token(script, sentences_csv, tmp_path):
    """GPT-2 has none; batches are padded with its end token, which is said on screen and saved
    with the model.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text for text, _ in make_sentences(100)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>").save_pretrained(
        tmp_path / "gpt"
    )
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt")

    code, stdout, stderr = script(
        "--dataset", sentences_csv, "--model", tmp_path / "gpt", "--output-dir", tmp_path / "run"
    )
    assert (code, stderr) == (0, "")
    assert "the tokenizer has no padding token: padding with its end token '<end>'" in stdout
    assert (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "best").config.pad_token_id == 0
    )
    (tmp_path / "new.txt").write_text("good\na rather longer text, so that the first one is padded\n")
    code, answers, stderr = script("--predict", tmp_path / "new.txt", "--model", tmp_path / "run" / "best")
    assert (code, stderr, answers.count("\n")) == (0, "", 2)


@pytest.mark.parametrize("process", ["call_script", heavy("run_script")])
def test_the_process_ends_with_code_2_and_one_line(process, request, cache_dir, tmp_path):
    # one that the library would log too
    (tmp_path / "rows.csv").write_text("text,label\na,b\nc,d,e,f\n")
    flags = ["--dataset", tmp_path / "rows.csv", "--cache-dir", cache_dir]
    done = request.getfixturevalue(process)("train_classifier.py", *flags, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"train_classifier\.py: error: [^\n]*rows\.csv, line 3: [^\n]+\n", done.stderr)


@pytest.mark.slow
def test_a_run_without_a_mistake_leaves_stderr_empty(
    call_script, tiny_model, cache_dir, sentences_csv, tmp_path
):
    done = call_script(
        "train_classifier.py",
        "--dataset",
        sentences_csv,
        "--model",
        tiny_model,
        "--cache-dir",
        cache_dir,
        "--epochs",
        1,
        "--output-dir",
        tmp_path / "run",
    )
    assert done.stderr == ""


OF_TRAINING = [
    "--epochs=5",
    "--max-minutes=3",
    "--output-dir=scores",
    "--lr=0.001",
    "--save-every=5",
    "--keep=1",
]
OF_LABELS = [
    "--dataset=HOME",
    "--test-file=HOME/x.csv",
    "--label-column=y",
    "--max-eval-samples=5",
    "--clean-labels",
]


@pytest.mark.parametrize("flag", [*OF_TRAINING, *OF_LABELS])
def test_a_flag_that_has_no_part_in_what_a_saved_model_does_is_refused(flag, script, trained, tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na good film,pos\n")
    name, _, value = flag.replace("HOME", str(tmp_path)).partition("=")
    given = [name, value] if value else [name]
    modes = [["--predict", tmp_path / "x.csv"]]
    modes += [["--evaluate-only", "--test-file", tmp_path / "x.csv"]] if flag in OF_TRAINING else []
    for mode in modes:
        code, stdout, stderr = script(*mode, "--model", trained, *given)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stdout + stderr
        assert " ".join(given) in stderr and "leave it out" in stderr
