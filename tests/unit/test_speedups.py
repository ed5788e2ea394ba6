"""Attention by matrix products against float64, the library's textbook form and PyTorch's fused
kernel; and when it is taken.
"""

import pytest
import torch
from transformers import AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bert.modeling_bert import eager_attention_forward

from common import speedups


class Module(torch.nn.Module):
    is_causal = False


def make(batch=2, heads=3, tokens=7, width=4, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, heads, tokens, width, generator=generator).to(dtype).requires_grad_(**options)
        for _ in range(3)
    ]


def some_mask(batch, tokens):
    """Return (B, 1, T, T), True where seen: the texts end at different places, and the last row of
    the last text sees nothing.
    """
    mask = (torch.arange(tokens) < torch.arange(tokens, tokens - batch, -1)[:, None])[
        :, None, None, :
    ].repeat(1, 1, tokens, 1)
    mask[-1, :, -1] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_in_bf16_are_near_those_of_float64(masked):
    """And about as near as the library's textbook form in bf16."""
    mask = some_mask(2, 33) if masked else None
    # rows that see nothing may hold anything
    seen = torch.ones(2, 1, 33, 1) if mask is None else mask.any(dim=-1, keepdim=True)
    grad = torch.randn(2, 3, 33, 4, generator=torch.Generator().manual_seed(1)).bfloat16() * seen

    def run(function, dtype, mask):
        parts = [part.detach().to(dtype).requires_grad_() for part in make(tokens=33, dtype=torch.bfloat16)]
        output = function(Module(), *parts, mask, scaling=0.5)[0].transpose(1, 2)
        output.backward(grad.to(dtype))
        return [(output * seen).double(), *(part.grad.double() for part in parts)]

    bias = (
        None
        if mask is None
        else torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, torch.finfo(torch.bfloat16).min)
    )
    exact, ours = (
        run(sdpa_attention_forward, torch.float64, mask),
        run(speedups.attend, torch.bfloat16, mask),
    )
    theirs = run(eager_attention_forward, torch.bfloat16, bias)
    for name, right, own, other in zip(("output", "query", "key", "value"), exact, ours, theirs):
        own_error, other_error = ((found - right).square().mean().sqrt() for found in (own, other))
        assert 0 < own_error < 1.3 * other_error, name  # 0 would mean that bf16 was not used


def test_a_row_that_sees_nothing_gives_numbers():
    query, key, value = make(dtype=torch.bfloat16)
    output, _ = speedups.attend(Module(), query, key, value, some_mask(2, 7))
    output.sum().backward()
    assert all(torch.isfinite(part).all() for part in (output, query.grad, key.grad, value.grad))


def test_additive_masks_are_added():
    parts = [part.detach() for part in make(dtype=torch.bfloat16)]
    bias = torch.randn(2, 1, 7, 7).bfloat16()
    ours, _ = speedups.attend(Module(), *parts, bias)
    fused, _ = sdpa_attention_forward(Module(), *parts, bias)
    assert torch.allclose(ours.float(), fused.float(), atol=0.03) and ours.std() > 0.1


@pytest.mark.parametrize("what", ["fp32", "long", "dropout", "causal", "grouped"])
def test_what_the_fused_kernel_does_better_is_left_to_it(what):
    """Bit for bit: the library's own function was called, with all it needs."""
    tokens, options, module = (speedups.MAX_TOKENS + 1 if what == "long" else 7), {}, Module()
    query, key, value = (
        part.detach()
        for part in make(tokens=tokens, heads=4, dtype=torch.float32 if what == "fp32" else torch.bfloat16)
    )
    if what == "dropout":
        options["dropout"] = 0.5
    if what == "causal":
        module.is_causal = True
    if what == "grouped":
        key, value, module.num_key_value_groups = key[:, :2], value[:, :2], 2
    torch.manual_seed(0)
    ours, _ = speedups.attend(module, query, key, value, None, **options)
    torch.manual_seed(0)
    theirs, _ = sdpa_attention_forward(module, query, key, value, None, **options)
    assert torch.equal(ours, theirs)


def test_a_model_gives_in_bf16_what_it_gives_with_the_fused_kernel(tiny_model):
    model = AutoModel.from_pretrained(tiny_model).eval()
    ids = torch.randint(5, 100, (3, 11))
    mask = (torch.arange(11) < torch.tensor([[11], [6], [2]])).long()

    def run():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]

    fused = run()
    speedups.use_fast_attention(model)
    ours = run()
    # equal would mean that the fused kernel was used
    assert torch.allclose(ours, fused, atol=0.05) and not torch.equal(ours, fused)


def test_models_with_attention_of_their_own_stay_as_they_are(tiny_model):
    model = AutoModel.from_pretrained(tiny_model, attn_implementation="eager")
    speedups.use_fast_attention(model)
    assert model.config._attn_implementation == "eager"


def test_a_saved_model_does_not_ask_for_this_attention(tiny_model, tmp_path):
    model = AutoModel.from_pretrained(tiny_model)
    speedups.use_fast_attention(model)
    model.save_pretrained(tmp_path)
    assert speedups.NAME not in (tmp_path / "config.json").read_text()
