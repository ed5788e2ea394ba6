"""Attention written out as matrix products, for texts of up to 512 tokens in bf16 on a CPU;
PyTorch's fused kernel for all else.

The fused kernel works in blocks that fit into the cache, which is what keeps long texts possible.
On a CPU its small products leave most of bf16's speed unused: two batched products with a softmax
between them are 1.3 to 2.2 times as fast, with the backward pass 2.1 to 4.9 times
(tests/benchmarks/attention.py). They keep the probabilities of all pairs of tokens, hence the
limit on the length.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "matrix_products"
LONGEST = 512  # tokens; the probabilities take 2 bytes x heads x tokens a token and layer


def use_matrix_products(model: PreTrainedModel):
    """Let a model take the faster way in each call. One whose attention is not PyTorch's fused one
    stays as it is.
    """
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attend(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options,
):
    """Return attention's output (B, T, H, D) and None, as transformers asks of an attention
    function.

    `query` (B, H, T, D); `key`, `value` (B, H, S, D); `attention_mask` None, or broadcast to (B,
    H, T, S): True, or 0, where a token is seen.
    """
    causal = attention_mask is None and (
        getattr(module, "is_causal", True) if is_causal is None else is_causal
    )
    short = (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and max(query.shape[-2], key.shape[-2]) <= LONGEST
    )
    if (
        not short
        or causal
        or dropout
        or query.shape[1] != key.shape[1]
        or options.get("position_bias") is not None
    ):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
    # (B, H, T, S)
    scores = torch.matmul(
        query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key.transpose(-1, -2)
    )
    if attention_mask is not None:
        scores += (
            attention_mask if attention_mask.is_floating_point() else _bias(attention_mask, scores.dtype)
        )
    output = torch.matmul(torch.softmax(scores, dim=-1), value)  # (B, H, T, D)
    return output.transpose(1, 2).contiguous(), None


def _bias(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 where a token is seen, else the lowest number: with -inf, a row that sees nothing
    would be NaN (transformers #32390).
    """
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
