"""What makes one embedding of a text: a transformer, then pooling, dense layers and normalisation,
as modules that pass on a dictionary of tensors.

For the same embeddings of tokens they give the numbers of sentence-transformers bit for bit
(tests/integration/test_sentence_model.py).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common.bert import BertModel

# What flows through the modules: tensors by name, such as `token_embeddings` (B, T, width),
# `attention_mask` (B, T), and at the end `sentence_embedding` (B, width).
Features = dict[str, Any]


class Transformer(nn.Module):
    """The first module: token ids -> `token_embeddings`, with `only_first` those of first tokens."""

    def __init__(self, model: BertModel, *, only_first: bool = False) -> None:
        super().__init__()
        self.model, self.only_first = model, only_first

    def forward(self, features: Features) -> Features:
        """Add `token_embeddings` (B, T, width), or (B, 1, width) with `only_first`."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: features[name] for name in names if name in features}
        return {**features, "token_embeddings": self.model(**inputs, only_first=self.only_first)}


class StaticEmbedding(nn.Module):
    """The first module of a model without a transformer: a text's embedding is the mean of one
    fixed vector for each of its tokens (Tulkens, van Dongen: Model2Vec, 2024).
    """

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights, requires_grad=False)  # (V, width)

    def forward(self, features: Features) -> Features:
        """Add `sentence_embedding` (B, width); `input_ids` are those of all texts one after the
        other, and `offsets` (B) tell where each text begins. A text without tokens gets zeros.
        """
        means = F.embedding_bag(features["input_ids"], self.weight, features["offsets"], mode="mean")
        return {**features, "sentence_embedding": means}


def pool_cls(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The first token, which BERT calls [CLS]."""
    return _pick(tokens, mask.int().argmax(dim=1))


def pool_max(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The largest number of each dimension."""
    return tokens.masked_fill(mask[:, :, None] == 0, float("-inf")).max(dim=1).values


def pool_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of the tokens."""
    weights = mask[:, :, None].to(tokens.dtype)  # (B, T, 1)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


def pool_mean_sqrt(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sum of the tokens, divided by the square root of their number."""
    weights = mask[:, :, None].to(tokens.dtype)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9).sqrt()


def pool_last(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last token, or the first position where there is none."""
    last_is_text, from_the_end = mask.flip(1).max(dim=1)
    last = tokens.shape[1] - 1
    from_the_end = torch.where(last_is_text == 0, last, from_the_end)
    return _pick(tokens * mask[:, :, None].to(tokens.dtype), last - from_the_end)


def _pick(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return one token (B, width) of each text; `positions` (B)."""
    index = positions[:, None, None].expand(-1, 1, tokens.shape[-1])
    return tokens.gather(1, index).squeeze(1)


def pool_weighted_mean(tokens: torch.Tensor, mask: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The mean of the tokens, the later ones counting more: 1, 2, 3 and so on from the first token
    of the text, prompt included, whose position is `first` (B).
    """
    positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device, dtype=tokens.dtype)
    weights = mask[:, :, None].to(tokens.dtype) * (positions[None, :, None] - first[:, None, None])
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


POOLING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": pool_cls,
    "max": pool_max,
    "mean": pool_mean,
    "mean_sqrt_len_tokens": pool_mean_sqrt,
    "lasttoken": pool_last,
}
WEIGHTED_MEAN = "weightedmean"
OLDER_MODES = {  # in the order in which several are concatenated
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": WEIGHTED_MEAN,
    "pooling_mode_lasttoken": "lasttoken",
}


class Pooling(nn.Module):
    """Embeddings of tokens -> one of the text: one or several kinds, concatenated."""

    def __init__(self, modes: list[str], *, include_prompt: bool) -> None:
        super().__init__()
        self.modes, self.include_prompt = modes, include_prompt

    @property
    def reads_first_position(self) -> bool:
        """Whether nothing is read but the first position: texts are padded at the right here."""
        return self.modes == ["cls"] and self.include_prompt

    def forward(self, features: Features) -> Features:
        """Add `sentence_embedding` (B, width x kinds). `prompt_length` is how many tokens a prompt
        has, which some models leave out.
        """
        tokens, whole = features["token_embeddings"], features["attention_mask"]
        first = whole.int().argmax(dim=1)  # (B), not 0 where the padding is at the left
        mask, prompt_length = whole, features.get("prompt_length")
        if prompt_length and not self.include_prompt:
            positions = torch.arange(whole.shape[1], device=whole.device)
            mask = whole * (positions[None, :] >= (first + prompt_length)[:, None])
        pooled = [
            pool_weighted_mean(tokens, mask, first) if mode == WEIGHTED_MEAN else POOLING[mode](tokens, mask)
            for mode in self.modes
        ]
        return {**features, "sentence_embedding": torch.cat(pooled, dim=-1)}


class Dense(nn.Module):
    """A linear layer with an activation; with `residual`, the input is added to its output, itself
    or through a linear layer where the widths differ.
    """

    def __init__(
        self, linear: nn.Linear, activation: nn.Module, residual: nn.Module | None, names: tuple[str, str]
    ) -> None:
        super().__init__()
        self.linear, self.activation, self.residual = linear, activation, residual
        self.source, self.target = names

    def forward(self, features: Features) -> Features:
        """Replace one of the features."""
        value = features[self.source]
        output = self.activation(self.linear(value))
        if self.residual is not None:
            output = output + self.residual(value)
        return {**features, self.target: output}


class Normalize(nn.Module):
    """Length 1."""

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        self.source, self.target = names

    def forward(self, features: Features) -> Features:
        """Replace one of the features, if it is there."""
        if self.source not in features:
            return features
        return {**features, self.target: F.normalize(features[self.source], p=2, dim=-1)}


class LayerNorm(nn.Module):
    """Mean 0 and variance 1, then learned factors and offsets."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, features: Features) -> Features:
        """Replace `sentence_embedding`."""
        return {**features, "sentence_embedding": self.norm(features["sentence_embedding"])}
