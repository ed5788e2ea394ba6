"""The model finder: every name ends in a folder that is safe to load, or in one line that says why not."""

import contextlib
import errno
import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel, BertConfig, BertModel, RobertaConfig, RobertaModel

from common import model_files, models, sources
from common.errors import Interrupted, UserError


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model that a test may change."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy2(tiny_model / "config.json", tmp_path / "model" / "config.saved")
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


SHORT_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
FUZZED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SETTINGS = (
    "num_hidden_layers",
    "id2label",
    "architectures",
    "num_labels",
    "attn_implementation",
    "pad_token_id",
)


@pytest.mark.parametrize("file", sorted(model_files.JSON_TYPES))
@settings(FUZZED, max_examples=10)
@given(content=SHORT_JSON.map(json.dumps).map(str.encode) | st.binary(max_size=30))
def test_any_content_of_a_json_file_is_accepted_or_refused_in_one_line(file, content, folder):
    (folder / file).write_bytes(content)
    try:
        model_files.check(folder, "--model x")
    except UserError as error:
        assert str(error).startswith("--model x: ") and str(folder) in str(error)
    finally:
        (folder / file).unlink()
        shutil.copy2(folder / "config.saved", folder / "config.json")


@settings(FUZZED, max_examples=100)
@given(changes=st.dictionaries(st.sampled_from(SETTINGS), SHORT_JSON, max_size=3))
def test_any_setting_is_accepted_or_refused_in_one_line(changes, folder):
    content = json.loads((folder / "config.saved").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))
    with contextlib.suppress(UserError):
        model_files.check(folder, "--model x")


@settings(FUZZED, max_examples=100)
@given(
    header=SHORT_JSON | st.fixed_dictionaries({"x": st.fixed_dictionaries({"shape": SHORT_JSON})}),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header_of_the_weights_is_read_or_refused_in_one_line(header, length, folder):
    """Never more than the file has is read, whatever the header says of its own length."""
    text = json.dumps(header).encode()
    length = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text)
    try:
        shapes = model_files.weight_shapes(folder, "--model x")
    except UserError as error:
        assert "model.safetensors" in str(error)
    else:
        assert all(isinstance(size, int) and size >= 0 for shape in shapes.values() for size in shape)


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 300 + "/y", "loop", "loop/model", "a\0b", "nowhere", "pipe"]
)
def test_a_name_that_can_be_no_folder_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("elsewhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="^--model "):
        sources.check_model(name, kind="encoder")


def test_links_within_the_cache_of_the_hub_may_leave_the_folder(folder):
    """There a model is a folder of links, from snapshots/<revision>/ to blobs/."""
    snapshot = folder.parent / "models--some--model" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))
    model_files.check(snapshot, "--model x")
    outside = shutil.copy2(snapshot / "config.saved", folder.parent / "config.json")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(outside)
    with pytest.raises(UserError, match="a link out of the folder"):
        model_files.check(snapshot, "--model x")


def test_a_model_of_the_hub_that_can_not_be_stored_is_one_line(monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/cache/x")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr(sources, "is_reachable", lambda: True)
    with pytest.raises(UserError, match="--model some/model: .*/cache/x: Permission denied; .*--cache-dir"):
        find("some/model")


PANIC = type("PanicException", (BaseException,), {})  # what the libraries in Rust raise


@pytest.mark.parametrize("error", [PANIC("range"), RecursionError(), MemoryError(), AttributeError("x")])
def test_whatever_a_library_raises_is_one_line(error):
    library = compile("raise error", "/usr/lib/site-packages/library.py", "exec")
    with (
        pytest.raises(UserError, match=f"--model x: can't be read as AutoModel: {type(error).__name__}"),
        models.load_errors("x", reader="AutoModel"),
    ):
        exec(library, {"error": error})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("stopped", 143), UserError("said")])
def test_what_ends_a_process_is_let_through(error):
    with pytest.raises(type(error)), models.load_errors("x"):
        raise error


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
