"""The BERT that is written out against that of transformers, and which models are left to that
library.

With queries, keys and values from three products instead of one, it must give the same bits. With
one product the numbers are the same on the processors that we know, but BLAS promises only
rounding.
"""

import copy
import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from common import bert, bundled, models, speedups
from common.errors import NotSupported

VOCABULARY, POSITIONS = 90, 40
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": POSITIONS,
}
CONFIGS = {
    "bert": BertConfig(**SHAPE, layer_norm_eps=1e-5),
    "bert, relu": BertConfig(**SHAPE, hidden_act="relu", type_vocab_size=3),
    "roberta": RobertaConfig(**SHAPE, type_vocab_size=1),
    "xlm-roberta": XLMRobertaConfig(**SHAPE),
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=24,
        n_layers=2,
        n_heads=3,
        hidden_dim=40,
        max_position_embeddings=POSITIONS,
        sinusoidal_pos_embds=True,
    ),
}


def save(config, folder, auto_class=AutoModel, **options):
    """Save a model whose weights are large enough that all parts count, with biases too."""
    torch.manual_seed(0)
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save(config, tmp_path_factory.mktemp("bert")) for name, config in CONFIGS.items()}


class ThreeProducts(torch.nn.Module):
    """Stands for the one product of queries, keys and values."""

    def __init__(self, fused):
        super().__init__()
        self.parts = list(zip(fused.weight.chunk(3), fused.bias.chunk(3)))

    def forward(self, hidden):
        products = [torch.nn.functional.linear(hidden, weight, bias) for weight, bias in self.parts]
        return torch.cat(products, dim=-1)


def unfused(model):
    """Return a model that computes queries, keys and values one after the other."""
    model = copy.deepcopy(model)
    for layer in getattr(model, "bert", model).layers:
        layer.query_key_value = ThreeProducts(layer.query_key_value)
    return model


def load_three(folder):
    """Return our model, the same with three products, and the library's."""
    ours = bert.load_encoder(folder)[0]
    return ours, unfused(ours), AutoModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: load_three(folder) for name, folder in folders.items()}


def assert_same(ours, exact, expected):
    assert torch.equal(exact, expected)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def make_batch(lengths, width, seed=0, pad=1):
    """Return ids and mask (B, T) of texts of some lengths, each padded at the right."""
    ids = torch.randint(2, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.where(mask.bool(), torch.tensor(pad)), "attention_mask": mask}


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=6)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=12)
@given(lengths=LENGTHS, extra=st.integers(0, 5), seed=st.integers(0, 99))
def test_hidden_states_are_those_of_transformers(loaded, name, lengths, extra, seed):
    """With padding and without, but for a single token: there BLAS multiplies a matrix by a vector,
    whose last bit depends on where the matrix is in memory.
    """
    assume(lengths != [1] or extra)
    batch = make_batch(lengths, max(lengths) + extra, seed)
    if name.startswith("bert"):
        batch["token_type_ids"] = batch["input_ids"] % 2
    ours, exact, theirs = loaded[name]
    with torch.inference_mode():
        assert_same(ours(**batch), exact(**batch), theirs(**batch).last_hidden_state)


@pytest.mark.parametrize("name", CONFIGS)
def test_in_bf16_they_are_those_with_fast_attention(folders, name):
    ours, exact, theirs = load_three(folders[name])
    batch = make_batch([30, 17, 1], 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        fused = theirs(**batch).last_hidden_state
        speedups.use_fast_attention(theirs)
        products = theirs(**batch).last_hidden_state
        assert torch.equal(exact(**batch), products) and not torch.equal(products, fused)
        torch.testing.assert_close(ours(**batch), products, rtol=0.02, atol=0.02)


def test_the_bundled_model():
    folder = bundled.model_folder("bundled/all-MiniLM-L6-v2", kind="encoder")
    ours, exact, theirs = load_three(folder)
    batch = make_batch([200, 199, 64, 3], 200, pad=0)
    batch["input_ids"] = batch["input_ids"] * 300
    with torch.inference_mode():
        assert_same(ours(**batch), exact(**batch), theirs(**batch).last_hidden_state)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_have_the_names_and_values_of_the_library(folders, name):
    _, weights = bert.load_encoder(folders[name])
    expected = AutoModel.from_pretrained(folders[name]).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_positions_are_counted_as_in_the_library(loaded, name):
    ours, _, theirs = loaded[name]
    assert models.max_positions(ours) == models.max_positions(theirs)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("names", [None, ["sport", "business", "tech"]])
def test_a_classifier_gives_the_logits_of_the_library(tmp_path, name, names):
    config = CONFIGS[name].__class__.from_dict(CONFIGS[name].to_dict())
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {label: number for number, label in enumerate(names)}
    save(config, tmp_path, AutoModelForSequenceClassification)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ours = bert.load_classifier(tmp_path)
    assert ours.class_names == [theirs.config.id2label[number] for number in range(len(names or "ab"))]
    batch, exact = make_batch([30, 17, 1], 32), unfused(ours)
    with torch.inference_mode():
        whole = exact.head(exact.bert(**batch)[:, 0])  # the last layer of all tokens
        assert_same(ours(**batch).logits, whole, theirs(**batch).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_is_an_encoder_without_its_head(tmp_path, name):
    """RoBERTa's has no pooler, and the library would draw random numbers for one."""
    save(CONFIGS[name], tmp_path, AutoModelForSequenceClassification)
    if "roberta" in name:
        with pytest.raises(NotSupported):
            bert.load_encoder(tmp_path)
        return
    ours, exact, theirs = load_three(tmp_path)
    batch = make_batch([30, 17, 1], 32)
    with torch.inference_mode():
        assert_same(ours(**batch), exact(**batch), theirs(**batch).last_hidden_state)


@pytest.mark.parametrize("how", ["several files", "bf16", "older"])
def test_weights_as_they_are_stored(tmp_path, how):
    options = {"max_shard_size": "6KB"} if how == "several files" else {}
    save(CONFIGS["bert"], tmp_path, **options)
    if how == "several files":
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    else:
        file = tmp_path / "model.safetensors"
        weights = load_file(file)
        if how == "bf16":
            weights = {name: value.bfloat16() for name, value in weights.items()}
        else:
            weights["embeddings.position_ids"] = torch.arange(POSITIONS)[None]
        save_file(weights, file, metadata={"format": "pt"})
    exact, batch = unfused(bert.load_encoder(tmp_path)[0]), make_batch([9, 4], 9)
    theirs = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.equal(exact(**batch), theirs(**batch).last_hidden_state)


def edit(folder, **changes):
    """Change the configuration of a model."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


UNKNOWN_SETTINGS = [
    {"model_type": "mpnet"},
    {"model_type": None},
    {"hidden_act": "gelu_new"},
    {"hidden_act": "silu"},
    {"position_embedding_type": "relative_key"},
    {"is_decoder": True},
    {"add_cross_attention": True},
    {"is_encoder_decoder": True},
    {"chunk_size_feed_forward": 8},
    {"output_hidden_states": True},
    {"quantization_config": {"bits": 4}},
    {"auto_map": {"AutoModel": "evil.Model"}},
    {"pruned_heads": {"0": [1]}},
    {"num_attention_heads": 5},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 3},
    {"hidden_size": "24"},
    {"hidden_size": 48},
    {"intermediate_size": 41},
    {"vocab_size": 91},
    {"max_position_embeddings": 39},
    {"type_vocab_size": 0},
    {"pad_token_id": None},
    {"layer_norm_eps": "small"},
    {"a_setting_of_the_future": 1},
]


@pytest.mark.parametrize("changes", UNKNOWN_SETTINGS, ids=str)
def test_other_settings_are_left_to_the_library(tmp_path, changes):
    edit(save(CONFIGS["bert"], tmp_path), **changes)
    with pytest.raises(NotSupported):
        bert.load_encoder(tmp_path)


def rewritten(change):
    """Return a function that changes the weights in a folder."""

    def rewrite(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def without_file(folder):
    (folder / "model.safetensors").unlink()


def outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


QUERY = "encoder.layer.0.attention.self.query.weight"
UNKNOWN_FILES = {
    "a weight is missing": rewritten(lambda weights: weights.pop(QUERY)),
    "a bias is missing": rewritten(lambda weights: weights.pop("embeddings.LayerNorm.bias")),
    "the pooler is missing": rewritten(lambda weights: weights.pop("pooler.dense.weight")),
    "a weight too many": rewritten(lambda weights: weights.update(more=torch.zeros(1))),
    "distances": rewritten(
        lambda weights: weights.update(
            {"encoder.layer.0.attention.self.distance_embedding.weight": torch.zeros(79, 8)}
        )
    ),
    "another shape": rewritten(lambda weights: weights.update({QUERY: torch.zeros(24, 25)})),
    "another shape of the pooler": rewritten(
        lambda weights: weights.update({"pooler.dense.bias": torch.zeros(25)})
    ),
    "eight bits": rewritten(lambda weights: weights.update({QUERY: torch.zeros(24, 24, dtype=torch.int8)})),
    "a weight that is infinite": rewritten(lambda weights: weights[QUERY][0].fill_(float("inf"))),
    "damaged": written("model.safetensors", b"\x08"),
    "no weights": without_file,
    "weights elsewhere": outside,
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "a damaged configuration": written("config.json", b"{"),
    "a list": written("config.json", b"[]"),
}


@pytest.mark.parametrize("what", UNKNOWN_FILES)
def test_other_files_are_left_to_the_library(tmp_path, what):
    folder = save(CONFIGS["bert"], tmp_path / "model")
    UNKNOWN_FILES[what](folder)
    with pytest.raises(NotSupported):
        bert.load_encoder(folder)


def test_a_model_that_never_learned_to_classify_is_left_to_the_library(folders):
    for folder in folders.values():
        with pytest.raises(NotSupported):
            bert.load_classifier(folder)


@pytest.mark.parametrize(
    "change", [{"id2label": {"0": "a", "1": "b", "2": "c"}}, {"architectures": ["BertForX"]}]
)
def test_a_classifier_with_other_classes_is_left_to_the_library(tmp_path, change):
    edit(save(CONFIGS["bert"], tmp_path, AutoModelForSequenceClassification), **change)
    with pytest.raises(NotSupported):
        bert.load_classifier(tmp_path)
