"""The step that is written out in PyTorch against the library's forward, and what it refuses."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from common.errors import NotSupported
from common.generation.llama import Positions, reference_step
from common.generation.llama_config import read_rotary, read_transformer
from language_models import SIZES, VOCABULARY, own_transformer, own_weights, tiny_config

COMMON: dict[str, Any] = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "llama, tied, biases, scaled positions": LlamaConfig(
        **COMMON, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_parameters=YARN
    ),
    "mistral, window": MistralConfig(**COMMON, sliding_window=5),
    "mistral, no window, wide heads": MistralConfig(**COMMON, sliding_window=None, head_dim=16),
    "qwen2, biases": Qwen2Config(**COMMON),
    "qwen2, a window in one layer": Qwen2Config(**COMMON, **SLIDING),
    "qwen3, norms of queries and keys": Qwen3Config(**COMMON, head_dim=8),
}


def random_model(config) -> PreTrainedModel:
    """Return a model with random numbers in every weight, also in norms and biases."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def empty_cache(model, texts: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values without content; what is not written must not be read."""
    shape = (len(model.layers), texts, model.num_key_value_heads, columns, model.head_dim)
    return torch.full(shape, 1e9), torch.full(shape, 1e9)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_computes_the_librarys_logits(name):
    """Three texts of different lengths, left-padded, column by column, in fp64 on the library's
    side too.
    """
    model = random_model(CONFIGS[name])
    transformer = own_transformer(model)
    ids, starts = torch.randint(3, 200, (3, 17)), torch.tensor([0, 4, 9])
    mask = (torch.arange(17) >= starts[:, None]).long()
    positions = (torch.arange(17) - starts[:, None]).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    keys, values = empty_cache(transformer, 3, 20)
    for column in range(17):
        rows = [text for text in range(3) if column >= starts[text]]
        positions = Positions(torch.tensor(rows), torch.full((len(rows),), column), starts[rows])
        logits = reference_step(transformer, keys, values, ids[rows, column], positions)
        torch.testing.assert_close(logits, expected[rows, column], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_the_same_text_are_guesses_that_follow_each_other(name):
    model = random_model(CONFIGS[name])
    transformer = own_transformer(model)
    ids = torch.randint(3, 200, (1, 12))
    expected = model(ids).logits[0]
    keys, values = empty_cache(transformer, 1, 12)
    for columns in (torch.arange(7), torch.arange(7, 12)):
        zeros = torch.zeros_like(columns)
        logits = reference_step(transformer, keys, values, ids[0, columns], Positions(zeros, columns, zeros))
        torch.testing.assert_close(logits, expected[columns], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config, reason",
    [
        (tiny_config("gpt2"), "gpt2"),
        # the names of its weights are those of Llama, what is computed with them is not
        (GemmaConfig(**COMMON, head_dim=8), "gemma"),
        (LlamaConfig(**COMMON, hidden_act="gelu"), "gelu"),
        (LlamaConfig(**COMMON, rope_parameters={**YARN, "rope_type": "dynamic"}), "dynamic"),
    ],
)
def test_another_kind_of_model_is_refused_with_its_reason(config, reason):
    with pytest.raises(NotSupported, match=reason):
        own_transformer(random_model(config))


def test_a_weight_that_would_not_be_used_or_is_missing_is_named():
    model = random_model(CONFIGS["llama"])
    model.model.layers[1].self_attn.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(NotSupported, match=r"layers\.1\.self_attn\.extra"):
        own_transformer(model)
    model = random_model(CONFIGS["llama"])
    model.model.layers[0].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(NotSupported, match=r"layers\.0\.mlp\.up_proj\.weight"):
        own_transformer(model)


def test_sizes_that_do_not_fit_are_refused():
    model = random_model(CONFIGS["llama"])
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(32, 63))
    with pytest.raises(NotSupported, match="63"):
        own_transformer(model)


def test_the_positions_count_from_the_start_of_a_text():
    positions = Positions(torch.zeros(2), torch.tensor([4, 7]), torch.tensor([0, 5]))
    assert positions.position_ids.tolist() == [4, 2]
    assert dataclasses.replace(positions, starts=torch.tensor([4, 7])).position_ids.tolist() == [0, 0]


LONGER = {"factor": 8.0, "original_max_position_embeddings": 64}
ROTARIES = {
    "default": {},
    "linear": {"factor": 3.0},
    "llama3": {**LONGER, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": LONGER,
}


@pytest.mark.parametrize("before_version_5", [False, True])
@pytest.mark.parametrize("kind", ROTARIES)
def test_angles_are_the_librarys(kind, before_version_5):
    """Also as older versions wrote the settings, with another name for the kind."""
    settings = {"rope_type": kind, "rope_theta": 5e4, **ROTARIES[kind]}
    config = LlamaConfig(**{**COMMON, "hidden_size": 256}, rope_parameters=dict(settings))
    positions = torch.tensor([0, 1, 7, 63, 64, 500])
    module = LlamaRotaryEmbedding(config)
    written = {**config.to_dict(), "rope_parameters": settings}
    if before_version_5:
        scaling = {"type": kind, **ROTARIES[kind]} if kind != "default" else None
        written |= {"rope_parameters": None, "rope_theta": 5e4, "rope_scaling": scaling}
    rotary = read_rotary(written)
    torch.testing.assert_close(rotary.frequencies, module.inv_freq, rtol=1e-6, atol=0)
    for ours, theirs in zip(rotary(positions), module(torch.empty(0), positions[None])):
        torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-4)


def test_a_tied_head_of_its_own_is_refused():
    model = random_model(LlamaConfig(**COMMON, tie_word_embeddings=False))
    config = model.config.to_dict() | {"tie_word_embeddings": True}
    with pytest.raises(NotSupported, match="tied"):
        read_transformer(config, own_weights(model))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, r"no model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1.*not used"),
        ({"hidden_size": 64}, "hidden_size"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"intermediate_size": 63}, "intermediate_size"),
        ({"attn_implementation": "flash_attention_2"}, "flash"),
        ({"pad_token_id": VOCABULARY}, "pad_token_id"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"attention_bias": True}, "bias"),
        ({"head_dim": 12}, "matrix"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"num_key_value_heads": True}, "num_key_value_heads"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_with_its_reason(changes, reason):
    model = random_model(CONFIGS["llama"])
    with pytest.raises(NotSupported, match=reason):
        read_transformer(model.config.to_dict() | changes, own_weights(model))
