"""The model finder: every name ends in a folder that is safe to load, or in one line that says why not."""

import argparse
import contextlib
import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.util import misc
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, RobertaConfig, RobertaModel

from common import hub, model_files, models, pickled_weights, sources
from common.errors import Interrupted, UserError
from conftest import heavy, make_sentences
from language_models import train_byte_bpe


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
@pytest.mark.parametrize("file", ["weights.bin", "weights.pt", "model.pkl"])
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


# Folders with a vocabulary and no tokenizer.json --------------------------------------------------

SPECIAL = ["<mask>", "<sep>", "<cls>", "[CLS]", "[SEP]", "[MASK]"]
SENTENCEPIECE = {  # model_type: the file that its models come with
    "albert": "spiece.model",
    "deberta-v2": "spm.model",
    "t5": "spiece.model",
    "xlm-roberta": "sentencepiece.bpe.model",
    "xlnet": "spiece.model",
}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """A vocabulary of sentencepiece."""
    path = tmp_path_factory.mktemp("pieces") / "pieces.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text, _ in make_sentences(200)]),
        model_prefix=str(path.with_suffix("")),
        vocab_size=120,
        hard_vocab_limit=False,
        control_symbols=SPECIAL,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": 3},
        minloglevel=2,
    )
    return path


@pytest.mark.parametrize("kind, file", SENTENCEPIECE.items())
def test_a_vocabulary_of_sentencepiece_is_enough(kind, file, pieces, tmp_path):
    shutil.copy(pieces, tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    tokenizer = models.load_tokenizer(tmp_path, name="x")
    own = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    for text, _ in make_sentences(20, seed=3):
        text = text.lower()  # as ALBERT does
        assert tokenizer.tokenize(text) == own.encode(text, out_type=str)


def test_a_vocabulary_of_words_or_of_pairs_is_enough(tiny_model, tmp_path):
    known = json.loads((tiny_model / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(known, key=known.get)))
    shutil.copy(tiny_model / "config.json", tmp_path)
    text = "the good film was very grim"
    words, whole = models.load_tokenizer(tmp_path, name="x"), models.load_tokenizer(tiny_model, name="x")
    assert words(text)["input_ids"] == whole(text)["input_ids"]

    (tmp_path / "vocab.txt").unlink()
    tokenizer = train_byte_bpe()
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(described["vocab"]))
    merges = "".join(f"{first} {second}\n" for first, second in described["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    pairs = models.load_tokenizer(tmp_path, name="x")
    assert pairs(text)["input_ids"] == tokenizer(text)["input_ids"]


# Pickled weights that are converted ---------------------------------------------------------------


class Command:
    """What a hostile pickle holds: a command for the shell."""

    def __init__(self, line: str):
        self.line = line

    def __reduce__(self):
        return os.system, (self.line,)


def pickled(folder: Path, make: Callable[[dict, Path], object], part: str = ".") -> None:
    """Replace the safetensors of a folder by what `make` writes for them."""
    tensors = load_file(folder / part / "model.safetensors")
    (folder / part / "model.safetensors").unlink()
    make(tensors, folder / part)


def in_one_file(tensors: dict, folder: Path) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def as_before_2020(tensors: dict, folder: Path) -> None:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def in_shards(tensors: dict, folder: Path) -> None:
    weight_map = {}
    for number in (1, 2):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        part = dict(list(tensors.items())[number - 1 :: 2])
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("make", [heavy(in_one_file), as_before_2020, heavy(in_shards)])
def test_pickled_weights_are_converted_once_and_said(make, folder, tmp_path, capsys):
    weights = AutoModel.from_pretrained(folder).state_dict()
    pickled(folder, make)
    before = {path.name for path in folder.iterdir()}
    found = find(folder, cache_dir=str(tmp_path / "cache"))
    assert found.is_relative_to(tmp_path / "cache") and not list(found.rglob("*.bin"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--model {folder}: " in said and str(found) in said, said
    config = AutoConfig.from_pretrained(found)
    model, new = models.load_model(AutoModel, found, name="x", config=config, dtype=torch.float32)
    assert not new and all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert find(folder, cache_dir=str(tmp_path / "cache")) == found and capsys.readouterr().err == ""
    assert {path.name for path in folder.iterdir()} == before  # nothing is written there
    (folder / "vocab.txt").write_text("another\n")  # another model: not what was kept of the first
    assert find(folder, cache_dir=str(tmp_path / "cache")) != found


def test_a_pickle_that_would_run_code_is_refused_before_it_does(folder, tmp_path):
    mark = tmp_path / "it-ran"
    pickled(folder, lambda tensors, place: in_one_file({**tensors, "x": Command(f"touch {mark}")}, place))
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # it is a real one
    assert mark.exists()
    mark.unlink()
    with pytest.raises(UserError) as refusal:
        find(folder, cache_dir=str(tmp_path / "cache"))
    assert not mark.exists()
    words = ("--model", "pytorch_model.bin is refused", "system", "may run code", "use a version with")
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value)
    assert not [path for path in tmp_path.glob("cache/converted/*") if path.is_dir()]


def test_what_is_no_file_of_tensors_is_refused_with_the_reason(tmp_path, monkeypatch):
    """In this process: the limit of memory, which stays, is left out."""
    monkeypatch.setattr(pickled_weights, "limit_memory", lambda more: None)
    path, target = tmp_path / "pytorch_model.bin", str(tmp_path / "model.safetensors")
    shared = torch.arange(6.0)
    torch.save({"a": shared, "b": shared, "c": shared.view(2, 3).T}, path)
    assert pickled_weights.convert(str(path), target) is None
    assert torch.equal(load_file(target)["c"], shared.view(2, 3).T)
    for content, reason in [
        ([torch.ones(1)], "other things than tensors"),
        ({"a": {"b": torch.ones(1)}}, "other things than tensors"),
        ({"a": torch.ones(1).to_sparse()}, "other things than tensors"),
        ({"a": argparse.Namespace()}, "argparse.Namespace"),
    ]:
        torch.save(content, path)
        assert reason in (pickled_weights.convert(str(path), target) or ""), content
    path.write_bytes(b"")
    assert "not readable as a file of tensors" in (pickled_weights.convert(str(path), target) or "")
    path.write_bytes(pickle.dumps(Command("touch it-ran"), protocol=4))
    assert "torch's check stops" in (pickled_weights.convert(str(path), target) or "")


@pytest.mark.slow
def test_a_pickle_that_takes_more_memory_than_any_of_its_size_is_refused(folder, tmp_path):
    pickled(folder, lambda tensors, place: in_one_file({"x": torch.zeros(1).expand(5 * 10**8)}, place))
    with pytest.raises(UserError, match="pytorch_model.bin is refused: it takes more than 1,024 MiB"):
        find(folder, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["../pytorch_model-1.bin", "/etc/passwd", "config.json", "missing.bin"])
def test_a_list_of_pickled_shards_stays_in_its_folder(name, folder):
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": name}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="pytorch_model.bin.index.json names"):
        sources.check_model(str(folder), kind="encoder")


def test_names_without_an_organization_are_those_of_the_library():
    assert sources.WITHOUT_ORGANIZATION == misc.ORIGINAL_TRANSFORMER_MODELS
    assert SentenceTransformer.default_huggingface_organization == "sentence-transformers"
    assert CrossEncoder.default_huggingface_organization == "cross-encoder"


@pytest.mark.parametrize(
    "name, organization, full",
    [
        ("all-MiniLM-L6-v2", "sentence-transformers", "sentence-transformers/all-MiniLM-L6-v2"),
        ("ms-marco-MiniLM-L6-v2", "cross-encoder", "cross-encoder/ms-marco-MiniLM-L6-v2"),
        ("intfloat/e5-small", "sentence-transformers", "intfloat/e5-small"),
        ("BERT-base-uncased", "sentence-transformers", "BERT-base-uncased"),
        ("all-MiniLM-L6-v2", None, "all-MiniLM-L6-v2"),
    ],
)
def test_a_name_alone_is_that_of_the_organization(name, organization, full):
    with pytest.raises(UserError, match=f"--model {full}: no such folder, and the Hub"):
        find(name, organization=organization)


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
FUZZED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
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
@example(header={"x": {"shape": [float("inf")]}}, length=None)
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
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
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
    with pytest.raises(type(error)), models.load_errors("x", reader="AutoModel"):
        raise error


def test_a_bug_outside_the_loader_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), models.load_errors("name", reader="AutoModel"):
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
