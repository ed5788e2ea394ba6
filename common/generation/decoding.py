"""What the decode loop in generate.py is made of: the batch, prefill, step.

Batched decoding goes wrong in three ways: the model attends to padding (prevented by `Batch.mask`),
positions are counted from the padding instead of the text (prevented by `Batch.starts`; transformers
#18478, #29419), or tokens that were already read are computed again (prevented by `Batch.cache`).
`prefill` reads all prompts at once and `step` one token per row. Both call the model's `forward`: that
of transformers (library.py), or the step in C (fast_decoding.py).

Shapes: B rows (texts), T columns (tokens so far), V tokens in the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.generation.fast_decoding import PreallocatedCache
from common.generation.language_model import LanguageModel

Cache: TypeAlias = Any  # the keys and values of a batch: what its model's `new_cache` returns


@dataclass
class Batch:
    """The texts so far, and what the model remembers of them.

    The texts are left-padded, so that all of them end at the same column.
    """

    ids: Tensor  # (B, T + room for all new tokens)
    # same shape as ids, 1 for a token and 0 for padding; None if no row is padded
    mask: Tensor | None
    starts: Tensor  # (B): the column where each row's text begins
    length: int  # T, the number of columns in use
    cache: Cache
    ended: list[bool]  # (B): rows that have ended get padding until all have

    @property
    def tokens(self) -> Tensor:
        """All tokens so far, (B, T)."""
        return self.ids[:, : self.length]


@dataclass(frozen=True)
class Step:
    """One token for each row, and the logits that it was chosen from."""

    tokens: list[int]  # (B); the padding id in rows that had ended before
    logits: Tensor  # (B, V), fp32, before any filter


def left_pad(
    prompts: list[list[int]], language_model: LanguageModel, *, room: int, cache: Cache | None = None
) -> Batch:
    """Return prompts as a batch with `room` more columns for new tokens.

    `cache` holds the first columns of the prompts; the default is an empty one.
    """
    length, device = max(map(len, prompts)), language_model.device
    ids = torch.full((len(prompts), length + room), language_model.pad_id, dtype=torch.long)
    mask = torch.ones_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) : length] = torch.tensor(prompt)
        mask[row, : length - len(prompt)] = 0
    is_padded = any(len(prompt) < length for prompt in prompts)
    return Batch(
        ids=ids.to(device),
        mask=mask.to(device) if is_padded else None,
        starts=torch.tensor([length - len(prompt) for prompt in prompts], device=device),
        length=length,
        cache=language_model.model.new_cache() if cache is None else cache,
        ended=[False] * len(prompts),
    )


def regroup(rows: list[tuple[Batch, int]], language_model: LanguageModel, *, room: int) -> Batch:
    """Return rows of several batches, each with its number, as one batch with `room` more columns
    for new tokens; what is cached of them is copied. For compiled models only.
    """
    texts, cached = [], []
    for batch, row in rows:
        start = int(batch.starts[row])
        texts.append(batch.tokens[row, start:].tolist())
        cached.append((batch.cache, row, start))
    columns = max(map(len, texts)) + room
    cache = PreallocatedCache.of_texts(cached, columns)
    return left_pad(texts, language_model, room=room, cache=cache)


def is_croppable(cache: Cache) -> bool:
    """Return whether a cache can forget its last columns: a recurrent state can't take back a token."""
    return all(getattr(layer, "is_croppable", True) for layer in cache.layers)


def prefill(language_model: LanguageModel, batch: Batch) -> Tensor:
    """Read all tokens that are not in the cache yet; return the logits (B, V) that follow, fp32."""
    first = batch.cache.get_seq_length()
    logits = language_model.model.forward(batch, first=first, keep=1)  # (B, 1, V)
    return logits[:, -1].float()


def step(language_model: LanguageModel, batch: Batch, tokens: list[int]) -> Tensor:
    """Add one token to each row, and return the logits (B, V) that follow, fp32."""
    batch.ids[:, batch.length] = torch.tensor(tokens, device=batch.ids.device)
    batch.length += 1
    logits = language_model.model.forward(batch, first=batch.length - 1, keep=1)  # (B, 1, V)
    return logits[:, -1].float()


def fetch_ids(tokens: Tensor, logits: Tensor, language_model: LanguageModel) -> list[int]:
    """Return tokens (B), which may be on a GPU, as a list.

    Raises UserError when a row of the logits (B, V) holds NaN or infinity, which argmax would
    silently choose.
    """
    if logits.is_cpu:  # by numpy, on this thread: to wake PyTorch's others takes longer than this
        ids = tokens.tolist()
        is_broken = not np.isfinite(logits.numpy().max(-1)).all()  # NaN for a row that holds one
    else:
        broken = ~logits.amax(-1).isfinite().all()
        # tokens and check travel together, in the one sync with a GPU per token; the sync is
        # deliberate, because the text is shown as it grows
        *ids, is_broken = torch.cat([tokens, broken[None]]).tolist()
    if is_broken:
        raise UserError(
            f"--model {language_model.name}: its logits are not numbers (NaN or infinite); use "
            "--precision fp32, or repair the model"
        )
    return ids
