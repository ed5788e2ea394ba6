"""attention.c against attention in float64: outputs and gradients, for any length, mask and layout; and
when it is taken.
"""

import itertools

import pytest
import torch

from common import attention, compiler, speedups
from common.attention import CompiledAttention, bias_of_keys, is_served
from common.errors import NotSupported
from language_models import needs_compiler

pytestmark = needs_compiler

Parts = list[torch.Tensor]


# attention.c has no instructions of one processor: the compiler makes vectors of 16 numbers out of
# shorter ones where it must, so that the lines for AVX-512 run anywhere
VARIANTS = {"this processor": [], "portable C": ["-DPORTABLE"], "vectors of 16": ["-D__AVX512F__"]}


@pytest.fixture(scope="module", params=VARIANTS)
def library(request, tmp_path_factory, cache_dir):
    defined = VARIANTS[request.param]
    if not defined:
        return attention.load_library(str(cache_dir))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "FLAGS", ["-O1", *compiler.FLAGS[1:], *defined])
        return attention.load_library.__wrapped__(str(tmp_path_factory.mktemp("cache")))


def make(texts: int, length: int, heads: int, size: int = 32) -> Parts:
    """Return query, key, value (B, H, T, D) and the gradient of the output (B, T, H, D)."""
    generator = torch.Generator().manual_seed(length + size)
    *parts, grad = torch.randn(4, texts, length, heads, size, generator=generator)
    return [*(part.transpose(1, 2) for part in parts), grad]


def ends(texts: int, length: int) -> torch.Tensor:
    """Return a mask (B, 1, 1, T) of texts that end at different places."""
    last = torch.linspace(length, 1, texts).long()[:, None]
    return (torch.arange(length) < last)[:, None, None]


def differentiate(function, parts: Parts, grad: torch.Tensor, *options) -> Parts:
    """Return output (B, T, H, D) and gradients (B, H, T, D)."""
    parts = [part.detach().requires_grad_() for part in parts]
    output = function(*parts, *options)
    return [output.detach(), *torch.autograd.grad(output, parts, grad)]


def fused(query, key, value, bias, scale) -> torch.Tensor:
    mask = None if bias is None else bias[:, None, None]
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return output.transpose(1, 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 5, 16, 47, 48, 49, 63, 64, 65, 96, 101, 130])
def test_outputs_and_gradients_are_those_of_float64(length, masked, library):
    """As near as those of PyTorch's own kernel."""
    *parts, grad = make(2, length, 3)
    bias = bias_of_keys(ends(2, length)) if masked else None
    doubled = None if bias is None else bias.double()
    exact = differentiate(
        attention.reference, [part.double() for part in parts], grad.double(), doubled, 32**-0.5
    )
    ours = differentiate(CompiledAttention.apply, parts, grad, bias, 32**-0.5, library)
    theirs = differentiate(fused, parts, grad, bias, 32**-0.5)
    for name, right, own, other in zip(("output", "query", "key", "value"), exact, ours, theirs):
        most = 3 * (other - right).abs().max() + 1e-6 * right.abs().max() + 1e-6
        assert (own - right).abs().max() <= most, name


def test_large_scores_are_no_overflow(library):
    *parts, grad = make(1, 50, 2)
    parts = [100 * parts[0], *parts[1:]]
    exact = differentiate(attention.reference, [part.double() for part in parts], grad.double(), None, 1.0)
    for right, own in zip(exact, differentiate(CompiledAttention.apply, parts, grad, None, 1.0, library)):
        assert torch.allclose(own.double(), right, rtol=1e-3, atol=1e-3 * right.abs().max().item())


@pytest.mark.parametrize("which", range(3))
def test_what_is_not_a_number_stays_none(which, library):
    *parts, grad = make(1, 20, 1)
    parts[which][0, 0, 3, 7] = torch.nan
    output, *grads = differentiate(CompiledAttention.apply, parts, grad, None, 1.0, library)
    assert output.isnan().any() and any(grad.isnan().any() for grad in grads)


def test_any_layout_and_number_of_threads_gives_the_same_bits(library):
    *parts, grad = make(3, 70, 4)
    bias = bias_of_keys(ends(3, 70))
    first = differentiate(CompiledAttention.apply, parts, grad, bias, 0.2, library)
    fused_rows = torch.stack([part.transpose(1, 2) for part in parts], 2)  # (B, T, 3, H, D), as one product
    layouts = [
        [fused_rows[:, :, number].transpose(1, 2) for number in range(3)],
        [part.contiguous() for part in parts],
        [parts[0].contiguous(), parts[1], parts[2]],
        [part.transpose(2, 3).contiguous().transpose(2, 3) for part in parts],
    ]
    threads = torch.get_num_threads()
    try:
        for layout, number in itertools.product(layouts, (1, 2, 5)):
            torch.set_num_threads(number)
            other = differentiate(CompiledAttention.apply, layout, grad.transpose(0, 0), bias, 0.2, library)
            assert all(map(torch.equal, first, other))
    finally:
        torch.set_num_threads(threads)


def test_it_is_taken_for_what_it_computes_alone():
    query, key, value = (part.requires_grad_() for part in make(2, 40, 4)[:3])
    mask = ends(2, 40)
    assert is_served(query, key, value, None) and is_served(query, key, value, mask)
    assert is_served(query, key, value, mask.expand(-1, 4, 40, -1))
    causal = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    assert not is_served(query, key, value, causal)
    assert not is_served(query, key, value, mask.float())  # additive
    assert not is_served(query[:, :, :1], key, value, None)  # the first token alone
    assert not is_served(query, key[:, :2], value[:, :2], None)  # heads that share keys
    assert not is_served(query.bfloat16(), key.bfloat16(), value.bfloat16(), None)
    assert not is_served(query.double(), key.double(), value.double(), None)
    assert not is_served(*(part.requires_grad_() for part in make(2, 40, 4, 64)[:3]), None)
    with torch.no_grad():
        assert not is_served(query, key, value, None)


def test_a_model_computes_its_attention_by_it(library, monkeypatch):
    """Gradients of a padded batch: those of the fused kernel to rounding, and not to the bit."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=100, hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64
    )
    config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    ids, mask = torch.randint(5, 100, (3, 30)), ends(3, 30)[:, 0, 0].long()

    def gradients() -> torch.Tensor:
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask).logits.logsumexp(-1).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    before = gradients()
    assert speedups.has_served_heads(model)
    speedups.use_compiled_attention(model, library)
    calls, really_run = [], attention._run
    monkeypatch.setattr(attention, "_run", lambda *given: calls.append(len(given[-1])) or really_run(*given))
    after = gradients()
    assert calls == [2, 2, 6, 6] and torch.allclose(before, after, rtol=1e-4, atol=1e-6)
    assert not torch.equal(before, after)


def test_code_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    text = attention.SOURCE.read_text()
    monkeypatch.setattr(compiler, "FLAGS", ["-O0", *compiler.FLAGS[1:]])
    for right, wrong in [(" - products[row + i]", ""), ("/ sums[row]", "* sums[row]")]:
        assert right in text
        other = tmp_path / "other.c"
        other.write_text(text.replace(right, wrong))
        monkeypatch.setattr(attention, "SOURCE", other)
        with pytest.raises(NotSupported, match="a number differs by"):
            attention.load_library.__wrapped__(str(tmp_path))
    assert not list((tmp_path / "kernels").iterdir())
