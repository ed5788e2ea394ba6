"""What the commands of train_classifier.py load: --help, and mistakes that flags and files show,
need no large library, and a command loads only those that it needs.

Each command runs in a process of its own, which tells at its end what it has loaded.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, ElectraConfig, ElectraForSequenceClassification, pipeline

from conftest import ROOT

LARGE = {"torch", "numpy", "transformers", "datasets", "sentence_transformers", "pyarrow", "sklearn", "scipy"}
FOR_REPORTS = {"datasets", "evaluate", "matplotlib", "pandas", "pyarrow", "sklearn", "tensorboard"}
TELL_WHAT_IS_LOADED = """
import atexit, json, runpy, sys
report, sys.argv = sys.argv[1], sys.argv[2:]
packages = lambda: sorted({name.partition(".")[0] for name in sys.modules})
atexit.register(lambda: open(report, "w").write(json.dumps(packages())))
sys.path[0] = ""
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def loads(tmp_path):
    """Return a function that runs a command, and returns what it did and the packages it loaded."""

    def run(*command, stdin: str = "") -> tuple[subprocess.CompletedProcess, set[str]]:
        told = tmp_path / "loaded.json"
        done = subprocess.run(
            [sys.executable, "-c", TELL_WHAT_IS_LOADED, told, *map(str, command)],
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        return done, set(json.loads(told.read_text()))

    return run


TRAIN_MISTAKES = {  # name: flags
    "unknown flag": ["--learning-rate", "1"],
    "bad number": ["--lr", "nan"],
    "flags that exclude each other": ["--inspect", "--evaluate-only"],
    "flags that do not go together": ["--max-chunks", 2, "--truncation", "head"],
    "more chunks than a batch holds": ["--max-chunks", 99],
    "a tokenizer to compare without an inspection": ["--compare-tokenizer", "bundled/all-MiniLM-L6-v2"],
    "no such data file": ["--dataset", "nowhere.csv"],
    "unknown bundled data": ["--dataset", "bundled/nope"],
    "no such model folder": ["--model", "./nowhere"],
    "a folder that is no model": ["--model", "docs"],
    "no such text file": ["--predict", "nowhere.txt"],
    "no such data file to predict": ["--predict", "nowhere.csv"],
    "occupied output folder": ["--output-dir", "docs"],
    "an output folder below a file": ["--output-dir", "README.md/run"],
    "no run to resume": ["--resume", "docs"],
    "which run to resume": ["--resume"],
}


@pytest.mark.parametrize("flags", TRAIN_MISTAKES.values(), ids=TRAIN_MISTAKES)
def test_training_answers_a_mistake_before_it_loads_a_large_library(flags, loads):
    done, loaded = loads("train_classifier.py", *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("train_classifier.py: error: ")
    assert loaded & LARGE == set()


def test_help_of_training_loads_no_large_library(loads):
    done, loaded = loads("train_classifier.py", "--help")
    assert done.returncode == 0 and "--epochs" in done.stdout and done.stderr == ""
    assert loaded & LARGE == set()


@pytest.fixture(scope="module")
def trained(call_script, tiny_model, sentences_csv, cache_dir, tmp_path_factory) -> tuple[Path, list]:
    """A finished run, and the flags that it was started with."""
    flags = ["--model", tiny_model, "--dataset", sentences_csv, "--cache-dir", cache_dir, "--epochs", 1]
    folder = tmp_path_factory.mktemp("runs") / "run"
    call_script("train_classifier.py", *flags, "--output-dir", folder)
    return folder, flags


def test_a_prediction_loads_nothing_that_only_training_needs(trained, loads):
    folder, _ = trained
    done, loaded = loads("train_classifier.py", "--model", folder / "best", "--predict", "-", stdin="good\n")
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["row"] == 1
    assert "torch" in loaded, "or the test sees nothing"
    assert loaded & {*FOR_REPORTS, "transformers", "scipy", "peft"} == set()


@pytest.mark.slow
def test_a_prediction_by_a_model_that_the_project_does_not_know_is_the_librarys(trained, loads, tmp_path):
    """ELECTRA has a head of its own; the answer is that of a pipeline."""
    folder, _ = trained
    config = ElectraConfig(
        vocab_size=300,
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        num_labels=2,
    )
    torch.manual_seed(0)
    ElectraForSequenceClassification(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder / "best").save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--predict", "-", "--precision", "fp32"]
    done, loaded = loads("train_classifier.py", *flags, stdin="a good film\n")
    assert (done.returncode, done.stderr) == (0, "") and "transformers" in loaded
    classify = pipeline("text-classification", model=str(tmp_path / "model"), device="cpu")
    (expected,) = classify(["a good film"])
    answer = json.loads(done.stdout)
    assert answer["label"] == expected["label"] and answer["confidence"] == pytest.approx(
        expected["score"], abs=1e-5
    )


@pytest.mark.slow
def test_scoring_loads_nothing_that_only_reports_need(trained, loads, sentences_csv):
    folder, _ = trained
    flags = ["--model", folder / "best", "--dataset", sentences_csv, "--evaluate-only"]
    done, loaded = loads("train_classifier.py", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"torch", "datasets", "evaluate"} <= loaded
    assert loaded & {"matplotlib", "tensorboard"} == set()


RUN_DAMAGES = {  # name: (what to do with the run's folder, what the line must hold)
    "no manifest": (lambda last: (last / "manifest.json").unlink(), "manifest.json is missing"),
    "broken manifest": (lambda last: os.truncate(last / "manifest.json", 99), "manifest.json is corrupt"),
    "no weights": (lambda last: (last / "model.safetensors").unlink(), "model.safetensors is missing"),
    "half of the weights": (
        lambda last: os.truncate(last / "model.safetensors", 999),
        "model.safetensors is corrupt",
    ),
    "other numbers in the state": (
        lambda last: (last / "state.json").write_text((last / "state.json").read_text().replace("1", "2")),
        "state.json is corrupt",
    ),
}


@pytest.mark.parametrize("damage, said", RUN_DAMAGES.values(), ids=RUN_DAMAGES)
@pytest.mark.parametrize("names_checkpoint", [False, True], ids=["newest", "named"])
def test_a_damaged_checkpoint_is_found_before_a_large_library_is_loaded(
    damage, said, names_checkpoint, trained, loads, tmp_path
):
    folder, flags = trained
    shutil.copytree(folder, tmp_path / "run")
    (last,) = (tmp_path / "run" / "checkpoints").iterdir()
    damage(last)
    named = last if names_checkpoint else tmp_path / "run"
    done, loaded = loads("train_classifier.py", *flags, "--resume", named)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert loaded & LARGE == set()


def test_a_changed_flag_of_a_resumed_run_is_found_before_a_large_library_is_loaded(trained, loads, tmp_path):
    folder, flags = trained
    shutil.copytree(folder, tmp_path / "run")
    done, loaded = loads("train_classifier.py", *flags, "--resume", tmp_path / "run", "--lr", "2e-3")
    assert done.returncode == 2 and "--lr was 0.0001, is 0.002" in done.stderr
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    again, loaded_again = loads("train_classifier.py", *flags, "--resume", tmp_path / "run")
    assert again.returncode == 2 and "finished run whose checkpoints were removed" in again.stderr
    assert (loaded | loaded_again) & LARGE == set()
