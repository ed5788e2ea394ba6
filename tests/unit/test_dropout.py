"""Packed dropout: the kept share, independence, scale, and the same random state as any other
dropout.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.speedups import PackedDropout, use_fast_dropout


def kept(p: float, *shape: int, seed: int = 0) -> torch.Tensor:
    """Return which elements of a block of ones PackedDropout keeps."""
    torch.manual_seed(seed)
    return PackedDropout(p).train()(torch.ones(*shape)) != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p(p):
    number = 4_000_000
    dropped = number - kept(p, number).sum().item()
    # the chance of more is below 1e-5; p is rounded to 1/65536
    assert abs(dropped / number - p) < 4.5 * math.sqrt(p * (1 - p) / number) + 1 / 2**17


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 64, 384])
def test_decisions_are_independent_of_each_other(distance):
    """Near ones come from one draw: their covariance must be 0 too."""
    mask = kept(0.3, 4_000_000).double() - 0.7
    covariance = (mask[:-distance] * mask[distance:]).mean().item()
    assert abs(covariance) < 4.5 * 0.21 / math.sqrt(len(mask))


def test_a_shared_decision_would_be_seen():
    """The power check of the test above: neighbours that share one decision in twenty fail it."""
    mask = kept(0.3, 4_000_000)
    mask[1::20] = mask[::20]
    mask = mask.double() - 0.7
    assert abs((mask[:-1] * mask[1:]).mean().item()) > 4.5 * 0.21 / math.sqrt(len(mask))


@given(
    st.floats(0, 1),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_is_kept_is_scaled_and_nothing_else_comes_out(p, shape, dtype):
    hidden = torch.rand(shape).to(dtype) + 1
    output = PackedDropout(p).train()(hidden)
    scale = 65536 / (65536 - round(p * 65536)) if round(p * 65536) < 65536 else 0
    assert output.dtype == dtype and output.shape == hidden.shape
    assert torch.all(
        (output == 0) | (output == hidden * scale) | torch.isclose(output, hidden * scale, rtol=0.01)
    )


def test_gradients_pass_where_the_output_passed():
    torch.manual_seed(0)
    hidden = torch.ones(1000, requires_grad=True)
    output = PackedDropout(0.25).train()(hidden)
    output.sum().backward()
    assert torch.equal(hidden.grad, output.detach()) and 0 < (hidden.grad == 0).sum() < 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_bits_are_the_product_with_the_mask(dtype):
    torch.manual_seed(0)
    # a transposed block, as some models pass
    hidden, weights = (torch.randn(6, 50).to(dtype).t() for _ in range(2))
    output = PackedDropout(0.25).train()(hidden.requires_grad_())
    output.backward(weights)
    mask, scale = output != 0, 1 / (1 - 0.25)
    assert 50 < mask.sum() < 300
    assert torch.equal(output, (hidden * mask).mul(scale))
    assert torch.equal(hidden.grad, (weights * mask).mul(scale))


def test_the_generator_decides_alone():
    assert torch.equal(kept(0.5, 1001, seed=3), kept(0.5, 1001, seed=3))
    assert not torch.equal(kept(0.5, 1001, seed=3), kept(0.5, 1001, seed=4))


def test_evaluation_leaves_everything_as_it_is():
    hidden = torch.rand(10)
    assert torch.equal(PackedDropout(0.5).eval()(hidden), hidden)


def test_every_dropout_of_a_model_is_replaced_and_keeps_its_probability():
    model = torch.nn.Sequential(
        torch.nn.Dropout(0.2),
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.4)),
        torch.nn.AlphaDropout(0.3),
    )
    use_fast_dropout(model)
    assert [(type(module), module.p) for module in model.modules() if hasattr(module, "p")] == [
        (PackedDropout, 0.2),
        (PackedDropout, 0.4),
        (torch.nn.AlphaDropout, 0.3),
    ]
