"""attention.c, attention in fp32 and its gradient on a CPU: compiled at its first use for the processor
that it runs on, checked against `reference`, and called through ctypes.

It is kept because, with the backward pass, it is 1.1 to 1.3 times as fast as PyTorch's fused kernel
(docs/benchmarks.md).

Shapes: B texts, H heads, T tokens, D numbers of a head.
"""

import ctypes
import functools
import math
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import compiler
from common.errors import NotSupported

SOURCE = Path(__file__).with_name("attention.c")
SIZE = 32  # numbers of a head: of 64, as BERT's, the kernel of PyTorch is as fast
LARGEST_DIFFERENCE = 1e-4  # between two numbers of the check; usual is 1e-6


def reference(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return the output of attention (B, T, H, D): each query's mean of the values, weighted by the
    softmax of its scores.

    `query`, `key`, `value` (B, H, T, D); `bias` (B, T) is added to the scores of each key.
    """
    scores = query @ key.transpose(-1, -2) * scale  # (B, H, T, T)
    if bias is not None:
        scores = scores + bias[:, None, None]
    return (scores.softmax(-1) @ value).transpose(1, 2)


def bias_of_keys(mask: Tensor | None) -> Tensor | None:
    """Return what is added to the scores of each key (B, T): 0 where the mask is True, else -inf."""
    if mask is None:
        return None
    seen = mask[:, 0, 0]
    return torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)


def is_served(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Tell whether attention.c computes this: in fp32 on a CPU, with gradients, from all tokens to all
    tokens, with a mask that leaves out keys, the same ones for each head and query.
    """
    is_fp32 = all(part.device.type == "cpu" and part.dtype == torch.float32 for part in (query, key, value))
    is_whole = query.shape == key.shape == value.shape and query.shape[-1] == SIZE
    if not (is_fp32 and is_whole and torch.is_grad_enabled()):
        return False
    if mask is None:
        return True
    heads, rows = mask.shape[1] == 1 or mask.stride(1) == 0, mask.shape[2] == 1 or mask.stride(2) == 0
    return mask.dtype == torch.bool and len(mask) == len(query) and heads and rows


class CompiledAttention(torch.autograd.Function):
    """attention.c as a function that PyTorch differentiates."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        scale: float,
        library: ctypes.CDLL,
    ) -> Tensor:
        """Return what `reference` returns. Raises MemoryError."""
        parts = [query, key, value]
        if len({part.stride() for part in parts}) > 1 or query.stride(3) != 1:
            parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
        texts, heads, length, size = query.shape
        output, log_sums = query.new_empty(texts, length, heads, size), query.new_empty(texts, length, heads)
        _run(library, parts, bias, scale, [output, log_sums])
        ctx.save_for_backward(*parts, bias, output, log_sums)
        ctx.scale, ctx.library = scale, library
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    # pyrefly: ignore [bad-override]  (the decorator loses the name of a parameter)
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Return the gradients of query, key and value (B, H, T, D). Raises MemoryError."""
        *parts, bias, output, log_sums = ctx.saved_tensors
        grads = [torch.empty_like(output) for _ in parts]
        results = [output, log_sums, grad_outputs[0].contiguous(), *grads]
        _run(ctx.library, parts, bias, ctx.scale, results)
        return *(grad.transpose(1, 2) for grad in grads), None, None, None


class CAttention(ctypes.Structure):
    """Attention in attention.c."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("texts", "heads", "length")),
        *((name, ctypes.c_int64) for name in ("text_stride", "head_stride", "row_stride")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "bias", "output", "log_sums")),
        *((name, ctypes.c_void_p) for name in ("output_grad", "query_grad", "key_grad", "value_grad")),
        ("next", ctypes.c_int32),
    ]


def _run(
    library: ctypes.CDLL, parts: list[Tensor], bias: Tensor | None, scale: float, results: list[Tensor]
) -> None:
    """Compute output and log_sums, or with all `results` the gradients, with as many threads as PyTorch
    has: each takes the next head that no other has taken.
    """
    is_backward = len(results) > 2
    tensors = [*parts, bias, *results, *([] if is_backward else [None] * 4)]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    job = CAttention(*parts[0].shape[:3], *parts[0].stride()[:3], scale, *pointers, 0)
    codes: list[int] = []

    def work() -> None:
        codes.append(library.attend(ctypes.byref(job), is_backward))

    threads = [threading.Thread(target=work) for _ in range(torch.get_num_threads() - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if any(codes):
        raise MemoryError


@functools.cache
def load_library(cache_dir: str | None) -> ctypes.CDLL:
    """Return the compiled attention.c. Raises what `compiler.load` raises, and NotSupported when what it has
    compiled computes something other than `reference`.
    """
    return compiler.load(SOURCE, cache_dir, declare=_declare, check=check_library)


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    library.attend.argtypes = [ctypes.POINTER(CAttention), ctypes.c_int]
    return library


@torch.enable_grad()
def check_library(library: ctypes.CDLL) -> None:
    """Raise NotSupported unless output and gradients are those of `reference`, for texts of which one is
    padded.
    """
    generator = torch.Generator().manual_seed(0)
    bias = bias_of_keys((torch.arange(101) < torch.tensor([[101], [60]]))[:, None, None])
    query, key, value, grad = torch.randn(4, 2, 101, 3, SIZE, generator=generator)  # each (B, T, H, D)
    parts = [part.transpose(1, 2).requires_grad_() for part in (query, key, value)]
    ours = CompiledAttention.apply(*parts, bias, SIZE**-0.5, library)
    theirs = reference(parts[0], parts[1], parts[2], bias, SIZE**-0.5)
    pairs = zip(
        (ours, *torch.autograd.grad(ours, parts, grad)), (theirs, *torch.autograd.grad(theirs, parts, grad))
    )
    difference = max((one - other).abs().max().item() for one, other in pairs)
    if not difference <= LARGEST_DIFFERENCE:  # nor if it is no number
        raise NotSupported(f"the compiled attention is wrong: a number differs by {difference:.1g}")
