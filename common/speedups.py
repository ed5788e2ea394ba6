"""Fast versions of what models compute: the last layer for the first token alone, and on CPUs
attention as matrix products and dropout with packed draws.

Each is switched on by one line (`use_first_token(model)`, `use_fast_attention(model)`,
`use_compiled_attention(model, library)`, `use_fast_dropout(model)`) and proven equal to the plain one by
test_speedups.py, test_attention.py and test_dropout.py: to rounding, and dropout in
distribution.

The head of BERT and its relatives reads one hidden state, that of the first token. The last layer's
queries, feed-forward network and residuals at all other tokens are computed and thrown away: an
eighth of a model of six layers. Only keys and values are needed there.

PyTorch's fused attention kernel works in blocks that fit into the cache, which makes long texts
possible. On a CPU its small products leave most of the speed of bf16 unused: two batched products
with a softmax between them are 1.3 to 2.2 times as fast, and 2.1 to 4.9 times with the backward
pass (tests/benchmarks/attention.py). They keep the probabilities of all pairs of tokens in memory,
hence the limit on the length.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from common import attention as compiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME, COMPILED = "matrix_products", "compiled"
MAX_TOKENS = 512  # the probabilities take 2 bytes x heads x tokens for each token and layer
DRAWS_PER_INT64, LEVELS = 4, 1 << 16  # a 64-bit draw holds four 16-bit decisions
# whole numbers of as many bits
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# Classes of transformers whose head reads the first token alone, and whose layers have these parts.
KINDS = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
BERT_LIKE = tuple(f"{name}ForSequenceClassification" for name in KINDS)
DISTILBERT = "DistilBertForSequenceClassification"


def use_fast_attention(model: "PreTrainedModel") -> None:
    """Compute attention as matrix products wherever that is faster; all other calls use PyTorch's
    fused kernel.

    A model of transformers whose attention is not PyTorch's fused kernel stays unchanged.
    """
    _register(model, NAME, attend)


def use_compiled_attention(model: "PreTrainedModel", library: ctypes.CDLL) -> None:
    """Compute attention in fp32 on a CPU by attention.c too, which attention.py has compiled to
    `library`; all other calls as `use_fast_attention` does.
    """
    _register(model, COMPILED, functools.partial(attend, library=library))


def has_served_heads(model: "PreTrainedModel") -> bool:
    """Tell whether attention.c takes heads of this model's size, and the model leaves its attention to
    such functions.
    """
    heads, width = (getattr(model.config, name, 0) for name in ("num_attention_heads", "hidden_size"))
    is_open = model.config._attn_implementation in ("sdpa", NAME)
    return bool(is_open and heads and width % heads == 0 and width // heads == compiled.SIZE)


def _register(model: "PreTrainedModel", name: str, function: Callable) -> None:
    # who has such a model has imported the library, which takes seconds
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _mask)
    if model.config._attn_implementation in ("sdpa", NAME):
        model.set_attn_implementation(name)


def _mask(*given: Any, **options: Any) -> torch.Tensor | None:
    """Return the mask (B, 1, T, S) that PyTorch's kernel takes, one row of it for all where all are equal,
    as without a causal mask they are: `is_served` sees that by its stride.
    """
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(*given, **options)
    if mask is None or mask.device.type != "cpu" or not torch.equal(mask, mask[:, :, :1].expand_as(mask)):
        return mask
    return mask[:, :, :1].expand_as(mask)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the output of attention (B, H, T, D), by matrix products wherever that is faster, else
    by PyTorch's fused kernel.

    `query` (B, H, T, D); `key`, `value` (B, H, S, D); `mask` None or broadcastable to (B, H, T, S),
    True where a token is attended to.
    """
    if _products_are_faster(query, key):
        return _matrix_products(query, key, value, mask, query.shape[-1] ** -0.5)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    library: ctypes.CDLL | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return the output of attention (B, T, H, D) and None, as transformers asks of an attention
    function.

    `library` is the compiled attention.c, if it is to be used.

    `query` (B, H, T, D); `key`, `value` (B, H, S, D); `attention_mask` None or broadcastable to
    (B, H, T, S), boolean (True: attend) or additive. The signature is that of
    `transformers.AttentionInterface`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    needs_causal_mask = attention_mask is None and causal
    has_groups = query.shape[1] != key.shape[1]  # grouped-query attention
    has_bias = options.get("position_bias") is not None
    is_special = needs_causal_mask or dropout or has_groups or has_bias
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if library is not None and not is_special and compiled.is_served(query, key, value, attention_mask):
        bias = compiled.bias_of_keys(attention_mask)
        return compiled.CompiledAttention.apply(query, key, value, bias, scale, library), None
    if is_special or not _products_are_faster(query, key):
        options |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    output = _matrix_products(query, key, value, attention_mask, scale)
    return output.transpose(1, 2).contiguous(), None


def _products_are_faster(query: torch.Tensor, key: torch.Tensor) -> bool:
    is_short = max(query.shape[-2], key.shape[-2]) <= MAX_TOKENS
    return is_short and query.device.type == "cpu" and query.dtype == torch.bfloat16


def _matrix_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Return the output of attention (B, H, T, D)."""
    scores = torch.matmul(query * scale, key.transpose(-1, -2))  # (B, H, T, S)
    if mask is not None:
        scores += mask if mask.is_floating_point() else _bias(mask, scores.dtype)
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 where the mask is True, elsewhere the lowest number.

    With -inf, a row that attends to nothing would be NaN (transformers #32390).
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def use_first_token(model: "PreTrainedModel") -> None:
    """Compute the last layer of a classifier for the first token alone, if its head reads no other.

    Another model, a decoder, or one whose attention is not computed here stays unchanged.
    """
    kind, config = type(model).__name__, model.config
    is_known = kind in (*BERT_LIKE, DISTILBERT) and config._attn_implementation in ("sdpa", NAME, COMPILED)
    if not is_known or getattr(config, "is_decoder", False):
        return
    is_distilled = kind == DISTILBERT
    body: Any = model.base_model
    layers = (body.transformer if is_distilled else body.encoder).layer
    if not len(layers):  # the head reads the embeddings
        return
    layer = layers[-1]
    first = _first_of_distilbert if is_distilled else _first_of_bert
    layer.forward = functools.partial(first, layer)


def _first_of_bert(
    layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    """Return the hidden state (B, 1, width) of the first token after a layer of a BertModel.

    What transformers passes in addition to `hidden` (B, T, width) and `mask` concerns decoders.
    """
    first, attention = hidden[:, :1], layer.attention.self
    attended = _attend_from_first(
        attention, attention.query(first), attention.key(hidden), attention.value(hidden), mask
    )
    return layer.feed_forward_chunk(layer.attention.output(attended, first))


def _first_of_distilbert(
    layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None = None, **_: Any
) -> torch.Tensor:
    """Return the hidden state (B, 1, width) of the first token after a layer of DistilBERT."""
    first, attention = hidden[:, :1], layer.attention
    attended = _attend_from_first(
        attention, attention.q_lin(first), attention.k_lin(hidden), attention.v_lin(hidden), mask
    )
    first = layer.sa_layer_norm(attention.out_lin(attended) + first)
    return layer.output_layer_norm(layer.ffn(first) + first)


def _attend_from_first(
    attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the output of attention (B, 1, width); `query` (B, 1, width), `key` and `value`
    (B, T, width), `mask` None or (B, 1, T or 1, T).
    """
    # (B, T, width) -> (B, H, T, D)
    query, key, value = (
        part.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)
        for part in (query, key, value)
    )
    dropout = attention.dropout.p if attention.training else 0.0
    row = None if mask is None else mask[:, :, :1]
    output, _ = attend(attention, query, key, value, row, dropout, attention.scaling)
    return output.flatten(2)  # (B, 1, H * D)


class PackedDropout(torch.nn.Dropout):
    """nn.Dropout that takes four decisions from each 64-bit draw of the default generator, in
    training on a CPU.

    bernoulli_ draws once per element, on one thread, and takes a tenth of a training step. The
    probability is rounded to 1/65536, and the kept elements are scaled by the rounded one, so that
    the mean stays exact.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `input` (any shape) with about `p` of its elements 0 and the others scaled by 1 /
        (1 - p).
        """
        num_dropped = round(self.p * LEVELS)  # of the 65,536 16-bit numbers
        is_plain = not self.training or self.inplace or input.device.type != "cpu"
        if is_plain or input.dtype not in INTEGERS or not 0 < num_dropped < LEVELS:
            return super().forward(input)
        return _DroppedAtRandom.apply(input, num_dropped)


class _DroppedAtRandom(torch.autograd.Function):
    """Dropout by masks of bits. A product with a mask of truth values would convert it first, here
    and again for the gradient, which takes as long as all the rest.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, num_dropped: int) -> torch.Tensor:
        draws = torch.empty(math.ceil(input.numel() / DRAWS_PER_INT64), dtype=torch.int64)
        draws.random_(torch.iinfo(torch.int64).min, None)  # all 64 bits
        levels = draws.view(torch.int16)[: input.numel()].view(input.shape)
        lowest_kept = num_dropped - LEVELS // 2  # the 16-bit numbers begin at -32,768
        kept = levels.ge_(lowest_kept).neg_()  # 1 and 0, then -1, all bits of which are set, and 0
        ctx.save_for_backward(kept)
        ctx.num_dropped = num_dropped
        return _keep(input, kept, num_dropped)

    @staticmethod
    def backward(ctx: Any, *output_grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kept,) = ctx.saved_tensors
        return _keep(output_grad[0], kept, ctx.num_dropped), None


def _keep(numbers: torch.Tensor, kept: torch.Tensor, num_dropped: int) -> torch.Tensor:
    """Return numbers times what makes their mean that of before, and 0 where no bit of `kept`, of the
    same shape, is set.
    """
    integers = INTEGERS[numbers.dtype]
    bits = numbers.contiguous().view(integers) & kept.to(integers)
    return bits.view(numbers.dtype).mul_(LEVELS / (LEVELS - num_dropped))


def use_fast_dropout(model: torch.nn.Module) -> None:
    """Replace each nn.Dropout of a model by a PackedDropout, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.Dropout:
                setattr(module, name, PackedDropout(child.p, child.inplace))
