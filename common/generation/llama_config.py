"""The config of a Llama-like model and its weights under their names in transformers -> the
`Transformer` of llama.py.

What `llama.reference_step` does not compute is refused with NotSupported: another kind of model, a
setting that is not known here, a weight that is not used, a size that does not fit.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.errors import NotSupported
from common.generation.llama import Layer, Linear, Rotary, Transformer
from common.generation.stored_weights import GROUP, Matrix

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class NamedWeights:
    """The weights of a model under their names in transformers, and which of them were not used."""

    def __init__(self, weights: Mapping[str, Tensor | Matrix]) -> None:
        self.weights = weights
        # the frequencies of the first Llamas are among them, and follow from the config too
        self.unused = {name for name in weights if not name.endswith("rotary_emb.inv_freq")}

    def matrix(self, name: str) -> Matrix:
        """Return a matrix; raise NotSupported unless it is one."""
        weight = self._take(name)
        if not isinstance(weight, Matrix):
            raise NotSupported(f"{name} is no matrix of a known kind")
        return weight

    def vector(self, name: str) -> Tensor:
        """Return a vector in fp32; raise NotSupported unless it is one."""
        weight = self._take(name)
        if isinstance(weight, Matrix) or weight.dim() != 1 or not weight.is_floating_point():
            raise NotSupported(f"{name} is no vector of numbers")
        return weight.float().contiguous()

    def linear(self, name: str, *, has_bias: bool) -> Linear:
        """Return a linear layer."""
        bias = self.vector(f"{name}.bias") if has_bias else None
        return Linear(self.matrix(f"{name}.weight"), bias)

    def _take(self, name: str) -> Tensor | Matrix:
        if name not in self.weights:
            raise NotSupported(f"it has no {name}")
        self.unused.discard(name)
        return self.weights[name]


def read_transformer(config: Mapping[str, Any], weights: Mapping[str, Tensor | Matrix]) -> Transformer:
    """Return a model from its config.json and its weights, under their names in transformers.

    Raises NotSupported, with the reason, for a model that `reference_step` would compute wrongly: another
    kind of model, a weight that is not used here, a weight that is missing.
    """
    check_config(config)
    num_layers = read_number(config, "num_hidden_layers")
    num_heads = read_number(config, "num_attention_heads")
    if config["model_type"] == "llama" and config.get("num_key_value_heads") is None:
        config = {**config, "num_key_value_heads": num_heads}  # the first Llamas
    named = NamedWeights(weights)
    embedding = named.matrix("model.embed_tokens.weight")
    head = read_head(config, named, embedding)
    model = Transformer(
        layers=[read_layer(config, named, number) for number in range(num_layers)],
        embedding=embedding,
        head=head,
        norm=named.vector("model.norm.weight"),
        num_attention_heads=num_heads,
        num_key_value_heads=read_number(config, "num_key_value_heads"),
        head_dim=find_head_dim(config),
        rms_norm_eps=read_positive(config, "rms_norm_eps"),
        rotary=read_rotary(config),
        max_position_embeddings=read_number(config, "max_position_embeddings"),
    )
    if named.unused:
        raise NotSupported(f"{min(named.unused)} is not used")
    check_sizes(model, config)
    return model


def read_head(config: Mapping[str, Any], named: NamedWeights, embedding: Matrix) -> Linear:
    """Return what turns the last layer into logits: often the embedding, tied to it."""
    if not config.get("tie_word_embeddings", False):
        return named.linear("lm_head", has_bias=False)
    has_own = "lm_head.weight" in named.weights  # a copy, in some files
    if has_own and not torch.equal(named.matrix("lm_head.weight").data, embedding.data):
        raise NotSupported("its head is tied to the embedding and differs from it")
    return Linear(embedding, None)


def read_layer(config: Mapping[str, Any], named: NamedWeights, number: int) -> Layer:
    """Return one layer, counted from 0."""
    prefix = f"model.layers.{number}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    biases, has_norms = biased_layers(config), config["model_type"] == "qwen3"
    return Layer(
        query=named.linear(f"{attention}.q_proj", has_bias="query" in biases),
        key=named.linear(f"{attention}.k_proj", has_bias="key" in biases),
        value=named.linear(f"{attention}.v_proj", has_bias="value" in biases),
        output=named.linear(f"{attention}.o_proj", has_bias="output" in biases),
        gate=named.linear(f"{mlp}.gate_proj", has_bias="mlp" in biases),
        up=named.linear(f"{mlp}.up_proj", has_bias="mlp" in biases),
        down=named.linear(f"{mlp}.down_proj", has_bias="mlp" in biases),
        attention_norm=named.vector(f"{prefix}.input_layernorm.weight"),
        mlp_norm=named.vector(f"{prefix}.post_attention_layernorm.weight"),
        query_norm=named.vector(f"{attention}.q_norm.weight") if has_norms else None,
        key_norm=named.vector(f"{attention}.k_norm.weight") if has_norms else None,
        window=find_window(config, number),
    )


def check_config(config: Mapping[str, Any]) -> None:
    """Raise NotSupported for a config that asks for something else than `reference_step` computes."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise NotSupported(f"{kind} is not one of {', '.join(MODEL_TYPES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise NotSupported(f"its activation is {config['hidden_act']}, not silu")
    if config.get("quantization_config") is not None:
        raise NotSupported("its weights are quantised in a format of their own")
    for name in ("attn_implementation", "_attn_implementation"):
        if config.get(name) not in (None, "eager", "sdpa"):
            raise NotSupported(f"its attention is {config[name]!r:.40}")
    pad_id = config.get("pad_token_id")
    is_id = type(pad_id) is int and -1 <= pad_id < read_number(config, "vocab_size")
    if pad_id is not None and not is_id:
        raise NotSupported(f"its pad_token_id is {pad_id!r:.40}")
    read_rotary(config)


def read_number(config: Mapping[str, Any], name: str) -> int:
    """Return a setting that must be a positive whole number; raise NotSupported unless it is one."""
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise NotSupported(f"its {name} is {value!r:.40}")
    return value


def read_positive(config: Mapping[str, Any], name: str) -> float:
    """Return a setting that must be a positive number; raise NotSupported unless it is one."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise NotSupported(f"its {name} is {value!r:.40}")
    return float(value)


def find_head_dim(config: Mapping[str, Any]) -> int:
    """Return how many numbers a head has."""
    if config.get("head_dim") is not None or config["model_type"] == "qwen3":
        return read_number(config, "head_dim")
    return read_number(config, "hidden_size") // read_number(config, "num_attention_heads")


def biased_layers(config: Mapping[str, Any]) -> set[str]:
    """Return which linear layers have a bias."""
    if config["model_type"] == "qwen2":
        return {"query", "key", "value"}
    attention = {"query", "key", "value", "output"} if config.get("attention_bias") else set()
    has_mlp = config.get("mlp_bias") and config["model_type"] == "llama"
    return attention | ({"mlp"} if has_mlp else set())


def find_window(config: Mapping[str, Any], layer: int) -> int | None:
    """Return how many columns a layer sees; None: all."""
    kind, layer_types = config["model_type"], config.get("layer_types")
    if kind == "llama" or (kind != "mistral" and not config.get("use_sliding_window", False)):
        return None
    if config.get("sliding_window", 0) is None:
        return None
    is_sliding = kind == "mistral" or layer >= read_number(config, "max_window_layers")
    if layer_types is not None:
        is_sliding = layer_types[layer] == "sliding_attention"
    return read_number(config, "sliding_window") if is_sliding else None


def read_rotary(config: Mapping[str, Any]) -> Rotary:
    """Return the angles that a config asks for. Raises NotSupported for a kind that is not known
    here, such as those whose angles depend on the length of the text.

    Versions of transformers before 5 write `rope_theta` and `rope_scaling` for `rope_parameters`.
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise NotSupported("its rope_parameters are no settings")
    kind = settings.get("rope_type", settings.get("type", "default"))
    base = read_positive({"rope_theta": config.get("rope_theta"), **settings}, "rope_theta")
    if (settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise NotSupported("its heads are rotated in part")
    size = find_head_dim(config)
    frequencies = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float) / size))
    if kind == "linear":
        return Rotary(frequencies / read_positive(settings, "factor"))
    if kind == "llama3":
        return Rotary(scale_as_llama3(frequencies, settings))
    if kind == "yarn":
        return scale_as_yarn(frequencies, base, size, settings)
    if kind != "default":
        raise NotSupported(f"its positions are of the kind {kind!r:.40}")
    return Rotary(frequencies)


def scale_as_llama3(frequencies: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Return frequencies (D / 2) for longer texts: slow ones divided by a factor, quick ones kept,
    and between the two a mixture (Llama 3.1).
    """
    factor = read_positive(settings, "factor")
    length = read_number(settings, "original_max_position_embeddings")
    slow = read_positive(settings, "low_freq_factor")
    quick = read_positive(settings, "high_freq_factor")
    turns = length * frequencies / (2 * math.pi)  # full turns within a text of the training
    share = ((turns - slow) / (quick - slow)).clamp(0, 1)  # of the unscaled frequency
    return (1 - share) * frequencies / factor + share * frequencies


def scale_as_yarn(frequencies: Tensor, base: float, size: int, settings: Mapping[str, Any]) -> Rotary:
    """Return angles for longer texts: as in Llama 3.1, but the share falls with the number of the
    pair, and cosines and sines grow a little (Peng et al. 2023).
    """
    factor = read_positive(settings, "factor")
    length = read_number(settings, "original_max_position_embeddings")
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    if unknown := set(settings) - known:
        raise NotSupported(f"its positions have the setting {min(unknown)}")
    pair_of = {}  # turns within a text of the training -> the number of the pair that makes that many
    for turns in (32, 1):
        pair_of[turns] = size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
    first, last = max(math.floor(pair_of[32]), 0), min(math.ceil(pair_of[1]), size - 1)
    share = 1 - ((torch.arange(size // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
    scaled = frequencies / factor * (1 - share) + frequencies * share
    return Rotary(scaled, 0.1 * math.log(factor) + 1 if factor > 1 else 1.0)


def check_sizes(model: Transformer, config: Mapping[str, Any]) -> None:
    """Raise NotSupported for sizes that do not fit the config or each other, as of a broken file."""
    sizes = (model.embedding.rows, model.embedding.columns, model.layers[0].gate.matrix.rows)
    for name, expected in zip(("vocab_size", "hidden_size", "intermediate_size"), sizes):
        if read_number(config, name) != expected:
            raise NotSupported(f"its {name} is {config[name]}, and its weights have {expected}")
    width, size = model.embedding.columns, model.head_dim
    num_heads, num_key_heads = model.num_attention_heads, model.num_key_value_heads
    queries, keys = num_heads * size, num_key_heads * size
    if num_heads % num_key_heads or size % 2:
        raise NotSupported(f"{num_heads} heads, {num_key_heads} for keys, of {size} numbers")
    pairs: list[tuple[Linear, int, int]] = [(model.head, model.embedding.rows, width)]
    for layer in model.layers:
        inner = layer.gate.matrix.rows
        pairs += [(layer.query, queries, width), (layer.key, keys, width)]
        pairs += [(layer.value, keys, width), (layer.output, width, queries)]
        pairs += [(layer.gate, inner, width), (layer.up, inner, width), (layer.down, width, inner)]
        for norm, expected in ((layer.query_norm, size), (layer.key_norm, size)):
            if norm is not None and norm.shape != (expected,):
                raise NotSupported(f"a norm of {norm.shape[0]} numbers for heads of {expected}")
        if (layer.query_norm is None) != (layer.key_norm is None):
            raise NotSupported("a norm of queries without one of keys, or the other way round")
    for linear, rows, columns in pairs:
        matrix = linear.matrix
        if (matrix.rows, matrix.columns) != (rows, columns):
            found = f"{matrix.rows} x {matrix.columns}"
            raise NotSupported(f"a matrix of {found} instead of {rows} x {columns}")
        if matrix.kind.startswith("groups") and columns % GROUP:
            raise NotSupported(f"groups of {GROUP} in rows of {columns}")
