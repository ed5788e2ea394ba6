"""One decoding step of a Llama-like transformer, written out: embedding, attention with a cache,
gated MLP, logits.

`reference_step` generates no text. It says in PyTorch what decoder.c computes, which is compared with it
after it is compiled, whenever a model is loaded, and in the tests. Where decoder.c is not used
(`--plain-step`, a GPU, another kind of model), the forward of transformers computes each token.

Llama, SmolLM, Mistral (a sliding window), Qwen2 (biases) and Qwen3 (norms of queries and keys) are
all of this kind. llama_config.py makes a `Transformer` of the files of such a model. transformers has
the same models, but importing one takes seconds.

Shapes: R tokens, which are the rows of a step, T columns of the cache, E the width of the model, H
heads of D numbers for queries and K for keys and values, I the width of the MLP, V tokens in the
vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.generation.stored_weights import Matrix


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
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # D
    rms_norm_eps: float
    rotary: "Rotary"
    max_position_embeddings: int  # the maximum number of tokens of a text


@dataclass(frozen=True)
class Rotary:
    """The angles by which heads are rotated: position times frequency, for D / 2 pairs."""

    frequencies: Tensor  # (D / 2)
    scaling: float = 1.0  # of cosines and sines

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines (R, D) of positions (R)."""
        angles = positions[:, None].float() * self.frequencies
        both = torch.cat([angles, angles], -1)  # the two numbers of a pair are half a head apart
        return both.cos() * self.scaling, both.sin() * self.scaling


@dataclass(frozen=True)
class Positions:
    """Where each of the R tokens of a step lies; every field has shape (R)."""

    texts: Tensor  # the text that each token belongs to: its row in the cache
    columns: Tensor  # the column of each token in the cache
    starts: Tensor  # the first column of its text

    @property
    def position_ids(self) -> Tensor:
        """The number of each token in its text, from 0."""
        return self.columns - self.starts


@torch.inference_mode()
def reference_step(
    model: Transformer, keys: Tensor, values: Tensor, tokens: Tensor, positions: Positions
) -> Tensor:
    """Return the logits (R, V) that follow each token, and add its keys and values to the cache: the
    reference that decoder.c is checked against, written to be read and not to be fast.

    `keys` and `values` (layers, texts, K, T, D) hold what was computed before; rows of the same
    text may follow each other, as guesses do.
    """
    texts, columns = positions.texts, positions.columns
    cosines, sines = (part[:, None] for part in model.rotary(positions.position_ids))  # (R, 1, D)
    all_columns = torch.arange(keys.shape[3])  # (T)
    x = model.embedding.widen()[tokens]  # (R, E)
    for number, layer in enumerate(model.layers):
        normed = rms_norm(x, layer.attention_norm, model.rms_norm_eps)
        query = layer.query(normed).view(len(x), model.num_attention_heads, model.head_dim)  # (R, H, D)
        key = layer.key(normed).view(len(x), model.num_key_value_heads, model.head_dim)  # (R, K, D)
        value = layer.value(normed).view(len(x), model.num_key_value_heads, model.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            query = rms_norm(query, layer.query_norm, model.rms_norm_eps)
            key = rms_norm(key, layer.key_norm, model.rms_norm_eps)
        query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
        keys[number, texts, :, columns] = key
        values[number, texts, :, columns] = value
        visible = (all_columns >= positions.starts[:, None]) & (all_columns <= columns[:, None])  # (R, T)
        if layer.window is not None:
            visible &= all_columns > columns[:, None] - layer.window
        groups = model.num_attention_heads // model.num_key_value_heads  # heads that share their keys
        own_keys = keys[number, texts].repeat_interleave(groups, 1)  # (R, H, T, D)
        own_values = values[number, texts].repeat_interleave(groups, 1)
        scores = (own_keys @ query[..., None])[..., 0] * model.head_dim**-0.5  # (R, H, T)
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        attended = (weights[:, :, None] @ own_values)[:, :, 0]  # (R, H, D)
        x = x + layer.output(attended.flatten(1))
        normed = rms_norm(x, layer.mlp_norm, model.rms_norm_eps)
        x = x + layer.down(torch.nn.functional.silu(layer.gate(normed)) * layer.up(normed))
    return model.head(rms_norm(x, model.norm, model.rms_norm_eps))


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
