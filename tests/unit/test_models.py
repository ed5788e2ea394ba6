"""The model finder: every name ends in a folder that is safe to load, or in one line that says why not."""

import json
import shutil

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, RobertaConfig, RobertaModel

from common import models, sources
from common.errors import UserError


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model that a test may change."""
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def find(name, **options):
    return sources.find_folder(str(name), kind="encoder", **options)


def test_a_local_folder_is_itself(folder):
    assert find(folder) == folder


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c", ""])
@pytest.mark.parametrize("flag", ["--model", "--rerank"])
def test_a_missing_folder_is_named_with_the_flag_and_the_bundled_model(name, flag):
    with pytest.raises(UserError, match=f"{flag} {name}: no such folder; .*bundled/all-MiniLM-L6-v2"):
        find(name, flag=flag)


def test_a_file_is_not_a_model(folder):
    with pytest.raises(UserError, match="config.json: this is a file; name the folder"):
        find(folder / "config.json")


def test_a_folder_without_config_is_not_a_model(tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        find(tmp_path)


@pytest.mark.parametrize(
    "kind, name", [("encoder", "SmolLM2-135M-Instruct"), ("language model", "all-MiniLM-L6-v2")]
)
def test_a_bundled_model_of_another_kind_is_refused(kind, name):
    with pytest.raises(UserError, match=f"--model bundled/{name}: no such bundled {kind}; use bundled/"):
        sources.find_folder(f"bundled/{name}", kind=kind)


@pytest.mark.parametrize("part", [".", "1_Dense", "dense", "parts/dense"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "weights.pt", "model.pkl"])
def test_pickled_weights_are_refused_in_every_folder_that_a_module_names(part, file, folder):
    """They were found only in folders whose name begins with a digit."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": part}]))
    for weights in folder.glob("*.safetensors"):
        if part == ".":
            weights.unlink()
    (folder / part / file).write_bytes(b"a pickle")
    with pytest.raises(UserError, match=f"{file} holds pickled weights"):
        find(folder)


def test_pickles_beside_safetensors_are_left_alone(folder):
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    assert find(folder) == folder


@pytest.mark.parametrize("path", ["../outside", "/etc", "1_Pooling/../../outside"])
def test_a_module_outside_the_model_is_refused(path, folder):
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": path}]))
    with pytest.raises(UserError, match="modules.json names a folder outside"):
        find(folder)


@pytest.mark.parametrize("content", ["{", "[1]", '[{"name": 1}]', '{"a": 1}', '[{"path": 1}]'])
def test_a_broken_list_of_modules_is_one_line(content, folder):
    (folder / "modules.json").write_text(content)
    with pytest.raises(UserError, match="modules.json"):
        find(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": 1}', '{"model_type": "nothing"}', "\x00"])
def test_a_broken_config_is_one_line_that_names_the_model(content, folder):
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match="--model the-name: "):
        models.load(AutoModel, folder, name="the-name")


def test_a_bug_outside_the_loader_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), models.load_errors("name"):
        _ = 1 / 0


def test_a_tokenizer_is_loaded_without_truncation_and_padding(folder):
    tokenizer = models.load_tokenizer(folder, name="x")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.save_pretrained(folder)
    backend = models.load_tokenizer(folder, name="x").backend_tokenizer
    assert backend.truncation is None and backend.padding is None


def test_a_missing_tokenizer_is_one_line(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match="--model x: "):
        models.load_tokenizer(folder, name="x")


@pytest.mark.parametrize(
    "model_class, config, most", [(BertModel, BertConfig, 40), (RobertaModel, RobertaConfig, 38)]
)
def test_max_positions_is_what_the_model_takes_and_no_more(model_class, config, most):
    """RoBERTa numbers positions from the padding id + 1 (here 2): two embeddings are never used."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = model_class(config(vocab_size=20, max_position_embeddings=40, **sizes)).eval()
    assert models.max_positions(model) == most
    model(torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, most + 1), 5))
