"""No code that comes with a model runs, whatever stands on standard input: transformers would ask
there for leave and take "y" for it.
"""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

import embed_search
import generate
import train_classifier
from conftest import exit_code_in_process
from language_models import save_tiny_model

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
Path({marker!r}).write_text("the code of the model ran")
class Config(BertConfig):
    model_type = "hostile"
class Model(BertForSequenceClassification):
    config_class = Config
class Words(BertTokenizerFast):
    pass
"""
MODEL_CLASSES = ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM")
# name: (script, flags; MODEL and TEXTS stand for paths, what it reads of a model first)
COMMANDS = {
    "train": (train_classifier, ["--dataset", "TEXTS", "--model", "MODEL", "--output-dir", "RUN"]),
    "inspect": (train_classifier, ["--dataset", "TEXTS", "--model", "MODEL", "--inspect"]),
    "predict": (train_classifier, ["--predict", "-", "--model", "MODEL"]),
    "evaluate only": (train_classifier, ["--dataset", "TEXTS", "--evaluate-only", "--model", "MODEL"]),
    "generate": (generate, ["--prompts-file", "-", "--model", "MODEL"]),
    "interactive": (generate, ["--interactive", "--model", "MODEL"]),
    "similarity": (embed_search, ["similarity", "TEXTS", "--model", "MODEL"]),
    "index": (embed_search, ["index", "-", "--index", "INDEX", "--model", "MODEL"]),
}


def add_code(folder: Path, part: str) -> Path:
    """Let a model's config or its tokenizer name code that leaves a marker; return where the
    marker would be.
    """
    marker = folder.parent / "marker"
    (folder / "hostile.py").write_text(CODE.format(marker=str(marker)))
    path = folder / {"config": "config.json", "tokenizer": "tokenizer_config.json"}[part]
    settings = json.loads(path.read_text())
    if part == "config":
        settings |= {
            "model_type": "hostile",
            "auto_map": {"AutoConfig": "hostile.Config", **dict.fromkeys(MODEL_CLASSES, "hostile.Model")},
        }
    else:
        settings |= {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "hostile.Words"]}}
    path.write_text(json.dumps(settings))
    return marker


def run(script, flags: list[str], monkeypatch) -> int:
    """Run a script in this process with answers on standard input that would let the code run;
    return its exit code.
    """
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n1\nyes\n" * 20)))
    return exit_code_in_process(script, flags)


@pytest.mark.parametrize("part", ["config", "tokenizer"])
@pytest.mark.parametrize("name", COMMANDS)
def test_code_of_a_model_never_runs(
    name, part, tiny_model, tiny_embedder, sentences_csv, cache_dir, tmp_path, monkeypatch
):
    script, flags = COMMANDS[name]
    model = tmp_path / "model"
    if script is generate:
        save_tiny_model(model)
    else:
        shutil.copytree(tiny_embedder if script is embed_search else tiny_model, model)
    marker = add_code(model, part)
    paths = {"MODEL": model, "TEXTS": sentences_csv, "INDEX": tmp_path / "index", "RUN": tmp_path / "run"}
    code = run(
        script,
        [*(str(paths.get(flag, flag)) for flag in flags), "--cache-dir", str(cache_dir), "--device", "cpu"],
        monkeypatch,
    )
    assert not marker.exists()
    # a tokenizer that transformers knows by its files can be used without the code
    assert code == 2 or part == "tokenizer"


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_of_a_cross_encoder_never_runs(
    part, tiny_model, tiny_embedder, ok, embed, sentences, tmp_path, monkeypatch
):
    ok("index", sentences, "--index", tmp_path / "index", "--model", tiny_embedder)
    shutil.copytree(tiny_model, tmp_path / "model")
    marker = add_code(tmp_path / "model", part)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n1\nyes\n" * 20)))
    code, _, _ = embed("search", "--index", tmp_path / "index", "a good film", "--rerank", tmp_path / "model")
    assert code == 2 and not marker.exists()
