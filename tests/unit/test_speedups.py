"""Attention by matrix products against float64, the library's textbook form and PyTorch's fused
kernel; and when it is taken. The last layer for the first token alone against the whole one.
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
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


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 50}
KINDS = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "electra": {"embedding_size": 8},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24},
    # the last layer of this one stays as it is
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
}


def make_classifier(kind, *, dropout=0.0, attention="sdpa"):
    """Return a classifier of float64 in training mode."""
    torch.manual_seed(0)
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
    names = (*names, "seq_classif_dropout", "classifier_dropout")
    options = {**SIZES, "hidden_size": 16, "num_labels": 3, "pad_token_id": 0, **KINDS[kind]}
    config = AutoConfig.for_model(kind, **options, **dict.fromkeys(names, dropout))
    config._attn_implementation = attention
    model = AutoModelForSequenceClassification.from_config(config)
    # biases and norms begin at 0 and 1, which would hide one that is left out
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    return model.double().train()


def padded_batch():
    ids = torch.randint(5, 50, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(11) < torch.tensor([[11], [6], [2]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_of_the_first_token_gives_the_losses_and_gradients_of_the_whole(kind, checkpointed):
    whole = make_classifier(kind)
    fast = copy.deepcopy(whole)
    speedups.use_fast_attention(fast)
    speedups.use_first_token(fast)
    states = []
    for model in (whole, fast):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        layers = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        layers[0][-1].register_forward_hook(lambda *call: states.append(call[-1]))
        model(**padded_batch()).loss.backward()
    tokens = [state.shape[1] for state in states if isinstance(state, torch.Tensor)]
    assert set(tokens) == ({11} if kind == "modernbert" else {11, 1})
    assert fast.state_dict().keys() == whole.state_dict().keys()
    for batch in (padded_batch(), {"input_ids": padded_batch()["input_ids"]}):
        torch.testing.assert_close(fast(**batch).logits, whole(**batch).logits, rtol=0, atol=1e-12)
    for (name, ours), theirs in zip(fast.named_parameters(), whole.parameters()):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_a_model_without_layers_stays_as_it_is():
    """Hypothesis found it: a damaged config of a cross-encoder with no layers."""
    model = make_classifier("bert")
    model.bert.encoder.layer = torch.nn.ModuleList()
    speedups.use_first_token(model)
    assert model(**padded_batch()).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("where", ["hidden", "attention"])
def test_the_first_tokens_dropout_is_that_of_the_whole_layer(kind, where):
    """The logits of many passes have the mean and spread of those of the whole layer."""
    whole, samples = make_classifier(kind, dropout=0.3), []
    for module in whole.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    last = (whole.distilbert.transformer if kind == "distilbert" else whole.bert.encoder).layer[-1]
    attention = last.attention if kind == "distilbert" else last.attention.self
    for module in last.modules():
        if isinstance(module, torch.nn.Dropout) and (module is attention.dropout) == (where == "attention"):
            module.p = 0.3
    fast = copy.deepcopy(whole)
    speedups.use_first_token(fast)
    batch = {name: rows[:1].expand(4000, -1) for name, rows in padded_batch().items() if name != "labels"}
    for model in (whole, fast):
        with torch.no_grad():
            samples.append(model(**batch).logits)
    theirs, ours = samples
    assert ours.std(dim=0).min() > 1e-3
    error = 5 * theirs.std(dim=0) / 4000**0.5
    assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() < error * 2**0.5).all()
    torch.testing.assert_close(ours.std(dim=0), theirs.std(dim=0), rtol=0.1, atol=0)


def test_a_model_with_attention_of_another_kind_keeps_its_last_layer():
    model = make_classifier("bert", attention="eager")
    speedups.use_first_token(model)
    assert "forward" not in vars(model.bert.encoder.layer[-1])
