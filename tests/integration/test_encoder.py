"""Encoding against SentenceTransformer.encode, for every kind of pooling; what is counted, and
what is computed once.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from common.errors import UserError
from common.runtime import Runtime
from common.search.encoder import Encoder, EncoderConfig, load_encoder, token_batches
from common.search.sentence_model import load_model
from conftest import make_sentences

CPU = Runtime(torch.device("cpu"), "fp32")
TEXTS = [text for text, _ in make_sentences(60)] + [
    "good",
    "  good film  ",
    "film\n\nstory",
    "x " * 200,
    "good",
]
MODULES = {
    "mean": lambda: [Pooling(32), Normalize()],
    "cls": lambda: [Pooling(32, "cls")],
    "max": lambda: [Pooling(32, "max"), Normalize()],
    "weighted mean": lambda: [Pooling(32, "weightedmean")],
    "last token": lambda: [Pooling(32, "lasttoken")],
    "two at once": lambda: [Pooling(32, ("mean", "cls"))],
    "dense": lambda: [Pooling(32), Dense(32, 12), Normalize()],
}


@pytest.fixture(params=MODULES)
def folder(request, tiny_model, tmp_path):
    torch.manual_seed(1)
    SentenceTransformer(
        modules=[Transformer(str(tiny_model), max_seq_length=64), *MODULES[request.param]()], device="cpu"
    ).save(str(tmp_path))
    return tmp_path


def test_vectors_are_those_of_sentence_transformers(folder):
    oracle = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, batch_size=7)
    encoder = load_encoder(EncoderConfig(str(folder), batch_tokens=200), CPU)
    assert np.abs(encoder.encode(TEXTS) - oracle).max() < 1e-5
    assert encoder.width == oracle.shape[1]


@pytest.mark.parametrize("modes, only_first", [("cls", True), ("mean", False), (("mean", "cls"), False)])
def test_where_the_first_token_alone_is_read_the_last_layer_computes_no_other(
    modes, only_first, tiny_model, tmp_path
):
    modules = [Transformer(str(tiny_model), max_seq_length=64), Pooling(32, modes)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path))
    encoder, shapes = load_encoder(EncoderConfig(str(tmp_path)), CPU), []
    last = encoder.model.modules[0].model.layers[-1]
    last.register_forward_hook(lambda *call: shapes.append(call[-1].shape[1]))
    encoder.encode(["one two three"])
    assert (shapes == [1]) == only_first


@pytest.mark.parametrize("dimensions", [5, 500])
def test_a_saved_model_keeps_the_first_dimensions(tiny_embedder, tmp_path, dimensions):
    shutil.copytree(tiny_embedder, tmp_path / "short")
    file = tmp_path / "short" / "config_sentence_transformers.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncate_dim": dimensions}))
    oracle = SentenceTransformer(str(tmp_path / "short"), device="cpu").encode(TEXTS)
    encoder = load_encoder(EncoderConfig(str(tmp_path / "short")), CPU)
    assert encoder.width == oracle.shape[1] == min(dimensions, 32)
    assert np.abs(encoder.encode(TEXTS) - oracle).max() < 1e-5


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("include", [True, False])
def test_prompts_are_put_before_queries_and_documents(tiny_model, tmp_path, include, mode):
    modules = [Transformer(str(tiny_model), max_seq_length=64), Pooling(32, mode, include_prompt=include)]
    model = SentenceTransformer(
        modules=modules, device="cpu", prompts={"query": "what: ", "document": "story: "}
    )
    model.save(str(tmp_path))
    encoder = load_encoder(EncoderConfig(str(tmp_path)), CPU)
    for role, oracle in (
        ("query", model.encode_query),
        ("document", model.encode_document),
        (None, model.encode),
    ):
        assert np.abs(encoder.encode(TEXTS, role=role) - oracle(TEXTS)).max() < 1e-5


@pytest.mark.parametrize("role", ["query", None])
def test_threads_compute_what_one_computes(role, tiny_model, tmp_path):
    modules = [Transformer(str(tiny_model), max_seq_length=64), Pooling(32, include_prompt=False)]
    SentenceTransformer(modules=modules, device="cpu", prompts={"query": "what: "}).save(str(tmp_path))
    encoder = load_encoder(EncoderConfig(str(tmp_path), batch_tokens=100), CPU)
    texts = [f"good film {'x ' * (number % 40)}{number}" for number in range(200)]
    seen, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            seen.append(encoder.encode(texts, role=role))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert (seen[0] == seen[1]).all() and len(np.unique(seen[0], axis=0)) == 200


def test_identical_texts_are_encoded_once_and_long_ones_counted(tiny_embedder, monkeypatch):
    encoder, seen = load_encoder(EncoderConfig(str(tiny_embedder)), CPU), []
    forward = Encoder._forward
    monkeypatch.setattr(
        Encoder,
        "_forward",
        lambda self, tokens, batch, prompt: (seen.extend(batch), forward(self, tokens, batch, prompt))[1],
    )
    # 65 and 64 tokens with the special ones
    vectors = encoder.encode(["good film", "x " * 63, "good film", "x " * 62])
    assert len(seen) == encoder.num_encoded == 3 and encoder.num_cut == 1
    assert (vectors[0] == vectors[2]).all()


def test_an_embedding_of_norm_zero_is_nan(tiny_embedder, monkeypatch):
    encoder = load_encoder(EncoderConfig(str(tiny_embedder)), CPU)
    monkeypatch.setattr(
        Encoder,
        "encode",
        lambda self, texts, role=None: np.array([[3, 4], [0, 0], [np.inf, 1], [np.nan, 1]], np.float32),
    )
    unit = encoder.encode_normalized(["a", "b", "c", "d"])
    assert np.allclose(unit[0], [0.6, 0.8]) and np.isnan(unit[1:]).all()


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 600), st.booleans())
def test_batches_hold_each_text_once_within_their_tokens(lengths, most, is_padded):
    batches = token_batches(lengths, most, is_padded=is_padded)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[row] for row in batch) * len(batch) <= most
        assert is_padded or len({lengths[row] for row in batch}) == 1


def fingerprint(folder):
    return load_model(str(folder), cache_dir=None).fingerprint


def test_the_fingerprint_tells_models_apart(tiny_model, tiny_embedder, tmp_path):
    encoder = load_encoder(EncoderConfig(str(tiny_embedder)), CPU)
    encoder.encode(["good film"])  # a call sets the tokenizer's truncation
    assert encoder.identity()["fingerprint"] == fingerprint(tiny_embedder)
    SentenceTransformer(
        modules=[Transformer(str(tiny_model), max_seq_length=64), Pooling(32, "cls"), Normalize()],
        device="cpu",
    ).save(str(tmp_path / "cls"))
    shutil.copytree(tiny_embedder, tmp_path / "other")
    weights = load_file(tiny_embedder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 3] += 1e-3
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    others = (tiny_embedder, tmp_path / "cls", tmp_path / "other")
    assert len({fingerprint(folder) for folder in others}) == 3


@pytest.mark.parametrize(
    "file, setting, value, same",
    [
        ("config.json", "num_attention_heads", 2, False),
        ("config.json", "hidden_act", "relu", False),
        ("config.json", "layer_norm_eps", 1e-3, False),
        ("config.json", "architectures", ["Other"], True),
        ("config.json", "transformers_version", "4.0.0", True),
        ("config.json", "_name_or_path", "x", True),
    ],
)
def test_the_fingerprint_holds_the_settings_that_make_vectors(
    file, setting, value, same, tiny_embedder, tmp_path
):
    shutil.copytree(tiny_embedder, tmp_path / "other")
    settings = json.loads((tmp_path / "other" / file).read_text())
    (tmp_path / "other" / file).write_text(json.dumps({**settings, setting: value}))
    assert (fingerprint(tiny_embedder) == fingerprint(tmp_path / "other")) is same


@pytest.mark.parametrize(
    "setting, value",
    [("query_length", 8), ("document_length", 8), ("query_expansion", {"strategy": "fixed", "length": 16})],
)
def test_lengths_by_role_are_refused(setting, value, tiny_embedder, tmp_path):
    """Each of them alone."""
    shutil.copytree(tiny_embedder, tmp_path / "other")
    file = tmp_path / "other" / "sentence_bert_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    with pytest.raises(UserError, match=f"its first module sets {setting}, which"):
        load_model(str(tmp_path / "other"), cache_dir=None)


@pytest.mark.slow
def test_pickled_weights_of_every_module_are_converted(tiny_embedder, tmp_path):
    """As most models of sentence-transformers from before 2023 have them."""
    parts = [Transformer(str(tiny_embedder)), Pooling(32), Dense(32, 8), Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "plain"))
    shutil.copytree(tmp_path / "plain", tmp_path / "pickled")
    for weights in (tmp_path / "pickled").rglob("model.safetensors"):
        torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()
    assert len(list((tmp_path / "pickled").rglob("pytorch_model.bin"))) == 2
    plain = load_model(str(tmp_path / "plain"), cache_dir=None)
    pickled = load_model(str(tmp_path / "pickled"), cache_dir=str(tmp_path / "cache"))
    assert pickled.fingerprint == plain.fingerprint and pickled.width == 8


def test_foreign_code_is_refused(tiny_embedder, tmp_path):
    shutil.copytree(tiny_embedder, tmp_path / "code")
    modules = (tmp_path / "code" / "modules.json").read_text()
    (tmp_path / "code" / "modules.json").write_text(
        modules.replace("sentence_transformers.base.modules.normalize.Normalize", "evil.Code").replace(
            "sentence_transformers.models.Normalize", "evil.Code"
        )
    )
    (tmp_path / "code" / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match="remote code"):
        load_model(str(tmp_path / "code"), cache_dir=None)
