"""One decoding step of a Llama-like transformer, written out: embedding, attention with a cache,
gated MLP, logits.

`read_layers` finds the weights of a model by their names and refuses what is not computed here.
`plain_step` is the text to read, and the oracle of the tests for its faster twin in C, decoder.c.
Llama, SmolLM, Mistral (a sliding window), Qwen2 (biases) and Qwen3 (norms of queries and keys) are
all of this kind.

Shapes: R rows (one token each), T columns of the cache, E the width of the model, H heads of D
numbers for queries and K for keys and values, V tokens in the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.generation.stored_weights import GROUP, KIND_OF_DTYPE, Matrix, matrix_of

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# of these, the angle of a position does not depend on the length of the text
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class NotCovered(Exception):
    """Why a model is not computed by this step, in a few words."""


@dataclass(frozen=True)
class Linear:
    """A linear layer: matrix (outputs, inputs) and bias (outputs), if it has one."""

    matrix: Matrix
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Return x (R, inputs) times the matrix, plus the bias: (R, outputs)."""
        return torch.nn.functional.linear(x, self.matrix.widen(), self.bias)


@dataclass(frozen=True)
class Layer:
    """The weights of a layer, and how far back it sees."""

    query: Linear  # (H * D, E)
    key: Linear  # (K * D, E)
    value: Linear  # (K * D, E)
    output: Linear  # (E, H * D)
    gate: Linear  # (I, E)
    up: Linear  # (I, E)
    down: Linear  # (E, I)
    attention_norm: Tensor  # (E)
    mlp_norm: Tensor  # (E)
    query_norm: Tensor | None  # (D)
    key_norm: Tensor | None  # (D)
    window: int | None  # columns that a token sees, itself included; None: all


@dataclass(frozen=True)
class Transformer:
    """All weights of a model, and the sizes that the weights do not show."""

    layers: list[Layer]
    embedding: Matrix  # (V, E)
    head: Linear  # (V, E)
    norm: Tensor  # (E)
    heads: int
    key_heads: int
    head_size: int
    epsilon: float
    rotary: Any  # the model's own module: (x, positions (1, R)) -> cosines, sines (1, R, D)


@dataclass(frozen=True)
class Places:
    """Where the rows of a step are: all (R)."""

    texts: Tensor  # the text that each row belongs to, a row of the cache
    columns: Tensor  # its column there
    starts: Tensor  # the first column of its text

    @property
    def positions(self) -> Tensor:
        """The number of each row's token in its text, from 0."""
        return self.columns - self.starts


@torch.inference_mode()
def plain_step(model: Transformer, keys: Tensor, values: Tensor, tokens: Tensor, places: Places) -> Tensor:
    """Return the logits (R, V) that follow each token, and add its keys and values to the cache.

    `keys` and `values` (layers, texts, K, T, D) hold what was computed before; rows of the same
    text may follow each other, as guesses do.
    """
    texts, columns = places.texts, places.columns
    cosines, sines = model.rotary(keys, places.positions[None])  # (1, R, D)
    cosines, sines = cosines[0, :, None], sines[0, :, None]  # (R, 1, D)
    all_columns = torch.arange(keys.shape[3])  # (T)
    x = model.embedding.widen()[tokens]  # (R, E)
    for number, layer in enumerate(model.layers):
        normed = rms_norm(x, layer.attention_norm, model.epsilon)
        query = layer.query(normed).view(len(x), model.heads, model.head_size)  # (R, H, D)
        key = layer.key(normed).view(len(x), model.key_heads, model.head_size)  # (R, K, D)
        value = layer.value(normed).view(len(x), model.key_heads, model.head_size)
        if layer.query_norm is not None and layer.key_norm is not None:
            query = rms_norm(query, layer.query_norm, model.epsilon)
            key = rms_norm(key, layer.key_norm, model.epsilon)
        query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
        keys[number, texts, :, columns] = key
        values[number, texts, :, columns] = value
        sees = (all_columns >= places.starts[:, None]) & (all_columns <= columns[:, None])  # (R, T)
        if layer.window is not None:
            sees &= all_columns > columns[:, None] - layer.window
        groups = model.heads // model.key_heads  # heads that share their keys
        own_keys = keys[number, texts].repeat_interleave(groups, 1)  # (R, H, T, D)
        own_values = values[number, texts].repeat_interleave(groups, 1)
        scores = (own_keys @ query[..., None])[..., 0] * model.head_size**-0.5  # (R, H, T)
        weights = scores.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
        attended = (weights[:, :, None] @ own_values)[:, :, 0]  # (R, H, D)
        x = x + layer.output(attended.flatten(1))
        normed = rms_norm(x, layer.mlp_norm, model.epsilon)
        x = x + layer.down(torch.nn.functional.silu(layer.gate(normed)) * layer.up(normed))
    return model.head(rms_norm(x, model.norm, model.epsilon))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x (..., E) divided by the root of its mean square, times the weights (E) (Zhang and
    Sennrich 2019).
    """
    return weight * (x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt())


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return heads (R, H, D) rotated by the angles of their positions (R, 1, D): numbers half a
    head apart are a pair (Su et al. 2021).
    """
    first, second = heads.chunk(2, -1)
    return heads * cosines + torch.cat([-second, first], -1) * sines


# --- From a model of transformers to its weights


def read_transformer(model: PreTrainedModel, stored: dict[str, Matrix]) -> Transformer:
    """Return the weights of a model by their names; matrices in `stored` take the place of the
    model's own.

    Raises NotCovered, with the reason, for a model that `plain_step` would compute wrongly: another
    kind of model, a weight that is not used here, a weight that is missing.
    """
    config = model.config
    check_config(config)
    if config.num_hidden_layers < 1:
        raise NotCovered("it has no layers")
    weights: dict[str, Tensor | Matrix] = dict(model.named_parameters())
    weights |= stored
    unused = set(weights)

    def vector(name: str) -> Tensor | None:
        weight = weights.get(name)
        unused.discard(name)
        if isinstance(weight, Matrix):
            raise NotCovered(f"{name} is a matrix")
        return None if weight is None else weight.detach().float().contiguous()

    def linear(name: str) -> Linear:
        return Linear(matrix(f"{name}.weight"), vector(f"{name}.bias"))

    def matrix(name: str) -> Matrix:
        unused.discard(name)
        weight = weights.get(name)
        if weight is None:
            raise NotCovered(f"it has no {name}")
        if isinstance(weight, Matrix):
            return weight
        if weight.device.type != "cpu" or weight.dtype not in KIND_OF_DTYPE or weight.dim() != 2:
            raise NotCovered(f"{name} is {weight.dtype} on {weight.device.type}")
        return matrix_of(weight.detach())

    def norm(name: str) -> Tensor:
        found = vector(name)
        if found is None:
            raise NotCovered(f"it has no {name}")
        return found

    def layer(number: int) -> Layer:
        prefix = f"model.layers.{number}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return Layer(
            query=linear(f"{attention}.q_proj"),
            key=linear(f"{attention}.k_proj"),
            value=linear(f"{attention}.v_proj"),
            output=linear(f"{attention}.o_proj"),
            gate=linear(f"{mlp}.gate_proj"),
            up=linear(f"{mlp}.up_proj"),
            down=linear(f"{mlp}.down_proj"),
            attention_norm=norm(f"{prefix}.input_layernorm.weight"),
            mlp_norm=norm(f"{prefix}.post_attention_layernorm.weight"),
            query_norm=vector(f"{attention}.q_norm.weight"),
            key_norm=vector(f"{attention}.k_norm.weight"),
            window=window_of(config, number),
        )

    embedding = matrix("model.embed_tokens.weight")
    head = Linear(embedding, None) if "lm_head.weight" not in weights else linear("lm_head")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = Transformer(
        layers=[layer(number) for number in range(config.num_hidden_layers)],
        embedding=embedding,
        head=head,
        norm=norm("model.norm.weight"),
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_size=head_size,
        epsilon=config.rms_norm_eps,
        rotary=model.model.rotary_emb,
    )
    if unused:
        raise NotCovered(f"{min(unused)} is not used")
    check_sizes(found)
    return found


def check_config(config: Any) -> None:
    """Raise NotCovered for a config that asks for something else than `plain_step` computes."""
    if config.model_type not in MODEL_TYPES:
        raise NotCovered(f"{config.model_type} is not one of {', '.join(MODEL_TYPES)}")
    if config.hidden_act != "silu":
        raise NotCovered(f"its activation is {config.hidden_act}, not silu")
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise NotCovered(f"its positions are of the kind {rope['rope_type']}")


def window_of(config: Any, layer: int) -> int | None:
    """Return how many columns a layer sees; None: all."""
    layer_types = getattr(config, "layer_types", None)
    is_sliding = layer_types is None or layer_types[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if is_sliding else None


def check_sizes(model: Transformer) -> None:
    """Raise NotCovered for sizes that do not fit each other, as those of a broken file."""
    width, size = model.embedding.columns, model.head_size
    queries, keys = model.heads * size, model.key_heads * size
    if model.heads % model.key_heads or size % 2:
        raise NotCovered(f"{model.heads} heads, {model.key_heads} for keys, of {size} numbers")
    pairs: list[tuple[Linear, int, int]] = [(model.head, model.embedding.rows, width)]
    for layer in model.layers:
        inner = layer.gate.matrix.rows
        pairs += [(layer.query, queries, width), (layer.key, keys, width), (layer.value, keys, width)]
        pairs += [(layer.output, width, queries), (layer.gate, inner, width), (layer.up, inner, width)]
        pairs += [(layer.down, width, inner)]
        for norm, expected in ((layer.query_norm, size), (layer.key_norm, size)):
            if norm is not None and norm.shape != (expected,):
                raise NotCovered(f"a norm of {norm.shape[0]} numbers for heads of {expected}")
        if (layer.query_norm is None) != (layer.key_norm is None):
            raise NotCovered("a norm of queries without one of keys, or the other way round")
    for linear, rows, columns in pairs:
        matrix = linear.matrix
        if (matrix.rows, matrix.columns) != (rows, columns):
            raise NotCovered(f"a matrix of {matrix.rows} x {matrix.columns} instead of {rows} x {columns}")
        if matrix.kind.startswith("groups") and columns % GROUP:
            raise NotCovered(f"groups of {GROUP} in rows of {columns}")
