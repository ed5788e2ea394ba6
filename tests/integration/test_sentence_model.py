"""Models read from their folders against sentence-transformers: the modules after the transformer
bit for bit, the settings, the fingerprints; and what is left to the library.
"""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
)
from torch import nn
from transformers import AutoModel, DistilBertConfig, RobertaConfig

from common import bundled
from common.errors import NotSupported, UserError
from common.search.sentence_model import describe_pooling, fingerprint, load_model, read_model

WIDTH = 32  # of the tiny model
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
MODULES = {
    **{mode: lambda mode=mode: [Pooling(WIDTH, mode)] for mode in MODES},
    "all modes": lambda: [Pooling(WIDTH, MODES)],
    "all modes in another order": lambda: [Pooling(WIDTH, MODES[::-1]), Normalize()],
    "all modes without the prompt": lambda: [Pooling(WIDTH, MODES, include_prompt=False)],
    "dense": lambda: [Pooling(WIDTH), Dense(WIDTH, 12), Normalize()],
    "dense without a bias": lambda: [Pooling(WIDTH), Dense(WIDTH, 40, bias=False, activation_function=None)],
    "dense, two": lambda: [Pooling(WIDTH), Dense(WIDTH, 8, activation_function=nn.GELU()), Dense(8, 9)],
    "residual": lambda: [Pooling(WIDTH), Dense(WIDTH, WIDTH, use_residual=True)],
    "residual of another width": lambda: [Pooling(WIDTH), Dense(WIDTH, 12, use_residual=True)],
    "dense of tokens": lambda: [
        Dense(WIDTH, 12, module_input_name="token_embeddings"),
        Normalize("token_embeddings"),
        Pooling(12, "max"),
    ],
    "layer norm": lambda: [Pooling(WIDTH, "cls"), LayerNorm(WIDTH), Normalize()],
}


def save(folder, transformer, modules, **options):
    torch.manual_seed(1)
    model = SentenceTransformer(modules=[transformer, *modules], device="cpu", **options)
    with torch.no_grad():
        for parameter in nn.ModuleList(modules).parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    transformer = Transformer(str(tiny_model), max_seq_length=64)
    return {
        name: save(tmp_path_factory.mktemp("sentence"), transformer, make()) for name, make in MODULES.items()
    }


@pytest.fixture(scope="module")
def pairs(folders):
    return {name: (read_model(folder), library(folder)) for name, folder in folders.items()}


def library(folder):
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()


def run(modules, features):
    for module in modules:
        features = module(features)
    return features["sentence_embedding"]


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    prompt_length=st.sampled_from([None, 0, 1, 3, 20]),
    seed=st.integers(0, 99),
)
def test_modules_give_the_numbers_of_the_library(pairs, name, lengths, side, prompt_length, seed):
    """Bit for bit, for any mask, and for prompts longer than a text too."""
    tokens = torch.randn(len(lengths), 9, WIDTH, generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    features = {"token_embeddings": tokens, "attention_mask": mask.flip(1) if side == "left" else mask}
    if prompt_length is not None:
        features["prompt_length"] = prompt_length
    ours, theirs = pairs[name]
    with torch.inference_mode():
        own, expected = run(ours.modules[1:], dict(features)), run(list(theirs)[1:], dict(features))
    assert torch.equal(own, expected) or torch.equal(own.nan_to_num(7), expected.nan_to_num(7))


def assert_as_in_the_library(folder, ours=None, theirs=None):
    ours, theirs = ours or read_model(folder), theirs or library(folder)
    assert ours.fingerprint == fingerprint(theirs)
    assert ours.pooling == describe_pooling(theirs)
    assert ours.width == theirs.get_embedding_dimension()
    assert ours.max_length == theirs.max_seq_length
    assert ours.prompts == theirs.prompts and ours.default_prompt_name == theirs.default_prompt_name


@pytest.mark.parametrize("name", MODULES)
def test_settings_and_fingerprint_are_those_of_the_library(pairs, name):
    assert_as_in_the_library(None, *pairs[name])


def test_the_bundled_model_is_known_to_indexes_of_earlier_versions():
    folder = bundled.model_folder("bundled/all-MiniLM-L6-v2", kind="encoder")
    assert_as_in_the_library(folder)
    known_by = "3f74a5a6acfc37df5849c8c4349b838e672869abd500a61495a2d3235041c651"
    assert read_model(folder).fingerprint == known_by


OTHER_TRANSFORMERS = {
    "distilbert": DistilBertConfig(vocab_size=300, dim=16, n_layers=1, n_heads=2, hidden_dim=20),
    "roberta": RobertaConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=50,
        bos_token_id=2,
        gradient_checkpointing=False,
    ),
}


@pytest.mark.parametrize("kind", OTHER_TRANSFORMERS)
def test_other_transformers(kind, tiny_model, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path)
    AutoModel.from_config(OTHER_TRANSFORMERS[kind]).save_pretrained(tmp_path)
    assert_as_in_the_library(tmp_path)  # a plain encoder, which gets mean pooling


def change(path, **changes):
    """Change settings in a JSON file; None removes one."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def edited(name, **changes):
    return lambda folder: change(folder / name, **changes)


def as_before_version_5(folder):
    """As older versions of the library wrote the files."""
    file = folder / "modules.json"
    listed = json.loads(file.read_text())
    for module in listed:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    file.write_text(json.dumps(listed))
    older = {
        "pooling_mode_lasttoken": True,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
    }
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"word_embedding_dimension": WIDTH, **older}))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": false}')
    (folder / "config_sentence_transformers.json").unlink()


SETTINGS = "config_sentence_transformers.json"
KNOWN = {
    "older": as_before_version_5,
    "no mode of the older ones": lambda folder: (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": False})
    ),
    "prompts": edited(SETTINGS, prompts={"query": "q: ", "x": "", "passage": "p"}, default_prompt_name="x"),
    "dimensions": edited(SETTINGS, truncate_dim=5),
    "more dimensions than there are": edited(SETTINGS, truncate_dim=500),
    "similarity": edited(SETTINGS, similarity_fn_name="dot"),
    "no length": edited("sentence_bert_config.json", max_seq_length=None),
    "no length anywhere": lambda folder: (
        change(folder / "sentence_bert_config.json", max_seq_length=None),
        change(folder / "tokenizer_config.json", model_max_length=None),
    ),
    "lower case": lambda folder: (
        change(folder / "sentence_bert_config.json", do_lower_case=True),
        change(folder / "tokenizer_config.json", do_lower_case=False),
    ),
    "no settings of the transformer": lambda folder: (folder / "sentence_bert_config.json").unlink(),
    "neutral settings": edited("config.json", finetuning_task="x", pooler_type="y", torch_dtype="float16"),
    "changed settings": edited("config.json", hidden_dropout_prob=0.3, initializer_range=0.1, use_cache=True),
    "an activation by its short name": lambda folder: save_with_activation(folder, "torch.nn.SiLU"),
    "no activation": lambda folder: save_with_activation(folder, None),
}


def save_with_activation(folder, name):
    """Put a dense layer with an activation at the end of a model."""
    dense = folder / "2_Dense"
    dense.mkdir()
    Dense(WIDTH, 6).save(str(dense))
    change(dense / "config.json", activation_function=name)
    file = folder / "modules.json"
    kind = "sentence_transformers.base.modules.dense.Dense"
    listed = [*json.loads(file.read_text())[:2], {"idx": 2, "name": "2", "path": "2_Dense", "type": kind}]
    file.write_text(json.dumps(listed))


@pytest.mark.parametrize("what", KNOWN)
def test_settings_in_a_folder_mean_what_they_mean_in_the_library(what, tiny_embedder, tmp_path):
    folder = shutil.copytree(tiny_embedder, tmp_path / "model")
    KNOWN[what](folder)
    assert_as_in_the_library(folder)


def with_module(kind, **more):
    """Return a function that puts a module of another kind at the end of a model."""

    def add(folder):
        file = folder / "modules.json"
        module = {"idx": 3, "name": "3", "path": "3", "type": kind, **more}
        file.write_text(json.dumps([*json.loads(file.read_text()), module]))

    return add


def changed_weights(**tensors):
    def rewrite(folder):
        save_with_activation(folder, "torch.nn.Tanh")
        file = folder / "2_Dense" / "model.safetensors"
        weights = {name.replace("__", "."): value for name, value in tensors.items()}
        save_file(load_file(file) | weights, file)

    return rewrite


def renamed(folder, name, new):
    (folder / name).rename(folder / new)


POOLING, TRANSFORMER = "1_Pooling/config.json", "sentence_bert_config.json"
UNKNOWN = {
    "another module": with_module("sentence_transformers.models.CNN"),
    "code": with_module("evil.Code"),
    "a module of another package": with_module("torch.nn.Normalize"),
    "options of a module": with_module("sentence_transformers.models.Normalize", kwargs=["task"]),
    "two of a name": with_module("sentence_transformers.models.Normalize", name="1"),
    "two transformers": with_module("sentence_transformers.models.Transformer"),
    "a list without names": lambda folder: (folder / "modules.json").write_text('[{"type": "x"}]'),
    "no list": lambda folder: (folder / "modules.json").write_text("{"),
    "another pooling": edited(POOLING, pooling_mode="median"),
    "no pooling mode": edited(POOLING, pooling_mode=[]),
    "a setting of the pooling": edited(POOLING, trainable=True),
    "no width": edited(POOLING, embedding_dimension=None),
    "two widths": edited(POOLING, word_embedding_dimension=WIDTH),
    "other features": edited("2_Normalize/config.json", module_input_name="pooler_output"),
    "another task": edited(TRANSFORMER, transformer_task="fill-mask"),
    "another output": edited(TRANSFORMER, module_output_name="sentence_embedding"),
    "images": edited(TRANSFORMER, modality_config={"image": {}}),
    "options of the transformer": edited(TRANSFORMER, model_args={"attn_implementation": "eager"}),
    "lengths by role": edited(TRANSFORMER, query_length=8),
    "a length that is no number": edited(TRANSFORMER, max_seq_length="long"),
    "a file of another name": lambda folder: renamed(folder, TRANSFORMER, "sentence_roberta_config.json"),
    "another kind of model": edited(SETTINGS, model_type="SparseEncoder"),
    "requirements": edited(SETTINGS, requirements=["sentence-transformers>=9"]),
    "a prompt that is no text": edited(SETTINGS, prompts={"query": 1}),
    "a default prompt that is not there": edited(SETTINGS, default_prompt_name="none"),
    "no dimensions": edited(SETTINGS, truncate_dim=0),
    "adapters": edited("adapter_config.json", peft_type="LORA"),
    "a processor": edited("processor_config.json", processor_class="X"),
    "no words": lambda folder: change(
        folder / "tokenizer.json",
        model={"type": "WordPiece", "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}},
    ),
    "another activation": lambda folder: save_with_activation(folder, "torch.nn.Bilinear"),
    "a weight too many": changed_weights(more=torch.zeros(1)),
    "a weight of another shape": changed_weights(linear__bias=torch.zeros(7)),
    "pooling of another width": edited(POOLING, embedding_dimension=WIDTH + 1),
    "a dense layer for another width": lambda folder: (
        save_with_activation(folder, None),
        Dense(8, 6).save(str(folder / "2_Dense")),
    ),
    "no weights": lambda folder: (save_with_activation(folder, None), renamed(folder, "2_Dense", "gone")),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_anything_else_is_left_to_the_library(what, tiny_embedder, tmp_path):
    folder = shutil.copytree(tiny_embedder, tmp_path / "model")
    assert read_model(folder).pooling == "mean, Normalize"
    UNKNOWN[what](folder)
    with pytest.raises(NotSupported):
        read_model(folder)


def test_a_module_that_is_not_written_here_is_computed_by_the_library(tiny_model, tmp_path):
    transformer = Transformer(str(tiny_model), max_seq_length=64)
    save(tmp_path, transformer, [Pooling(WIDTH), Dropout(0.5), Normalize()], truncate_dim=9)
    model, theirs = load_model(str(tmp_path), cache_dir=None), library(tmp_path)
    assert isinstance(model.modules[2], Dropout)
    assert_as_in_the_library(None, model, theirs)


@pytest.mark.parametrize(
    "name", ["torch.nn.Bilinear", "torch.hub.load", "evil.Code", "torch.nn.functional.Tanh"]
)
def test_no_object_is_made_of_a_class_that_is_no_activation(name, tiny_embedder, tmp_path):
    folder = shutil.copytree(tiny_embedder, tmp_path / "model")
    save_with_activation(folder, name)
    with pytest.raises(UserError, match=f"--model .*2_Dense.*{name}"):
        load_model(str(folder), cache_dir=None)
