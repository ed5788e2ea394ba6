"""What flags change about a model, seen in the model itself."""

import datasets
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    PreTrainedConfig,
)

import train_classifier
from common.errors import UserError
from common.training import adaptation
from training_loop import RUNTIME, config_of


@pytest.fixture
def model(tiny_model):
    return AutoModelForSequenceClassification.from_pretrained(tiny_model)


def adapt(model, *flags):
    """Return the model as the script adapts it with these flags."""
    return adaptation.adapt(model, config_of(*flags).model_config, RUNTIME)


def forward_calls(model) -> int:
    """Return how often a step calls the lowest layer."""
    calls = []
    adaptation.encoder_layers(model)[0].attention.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.randint(5, 100, (2, 7))
    model.train()
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    return len(calls)


def test_gradient_checkpointing_computes_a_layer_again_in_the_backward_pass(model, tiny_model):
    assert forward_calls(model) == 1
    another = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    assert forward_calls(adapt(another, "--gradient-checkpointing")) == 2


@pytest.mark.slow
def test_compile_puts_a_compiled_module_around_the_model_and_leaves_the_model_plain(model, tiny_model):
    features = datasets.Features(label=datasets.ClassLabel(names=["no", "yes"]))
    rows = datasets.Dataset.from_dict({"label": [0, 1, 1]}, features)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    compiled = train_classifier.prepare(model, tokenizer, rows, config_of("--compile"), RUNTIME)
    assert isinstance(compiled.wrapped, torch._dynamo.OptimizedModule) and compiled.model is model
    assert train_classifier.prepare(model, tokenizer, rows, config_of(), RUNTIME).wrapped is model


def test_layers_are_found_by_their_number(model):
    assert len(adaptation.encoder_layers(model)) == model.config.num_hidden_layers == 2
    with pytest.raises(UserError, match="--freeze-layers 3: the model has 2"):
        adaptation.freeze_layers(model, 3)


SMALL = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "cls_token_id": 1,
    "sep_token_id": 1,
    "pooler_hidden_size": 16,
}


@pytest.mark.parametrize(
    "kind, head, num_matrices",
    [
        # six matrices a layer, and the pooler, which is pretrained
        ("bert", {"classifier"}, 2 * 6 + 1),
        ("distilbert", {"pre_classifier", "classifier"}, 2 * 6),
        ("deberta-v2", {"pooler", "classifier"}, 2 * 6),
        ("modernbert", {"head", "classifier"}, 2 * 4),
        ("gpt2", {"score"}, 2 * 4),
    ],
)
def test_only_adapters_and_the_whole_head_learn(kind, head, num_matrices, recwarn):
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **SMALL))
    names = set(model.state_dict())
    adapted = adapt(model, "--lora-rank", 4)
    learning = {
        name.removeprefix("base_model.model.")
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert {name.split(".")[0] for name in learning if "lora_" not in name} == head
    assert {name for name in names if name.split(".")[0] in head} <= learning, (
        "all of the head, none of it as an adapter"
    )
    assert sum("lora_A" in name for name in learning) == num_matrices
    ids = torch.randint(2, 100, (3, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    adapted(**inputs).logits.sum().backward()
    begun = adapted.eval()(**inputs).logits
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zeros at first: the adapters change nothing
                parameter.normal_()
    learned, plain = adapted(**inputs).logits, adaptation.merge_adapters(adapted).eval()
    assert set(plain.state_dict()) == names and any("lora" in name for name in adapted.state_dict()), (
        "training goes on with the adapters"
    )
    assert (plain(**inputs).logits - learned).abs().max() < (learned - begun).abs().max() / 1000, (
        "what the adapters learned is in the plain model's weights"
    )
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)], (
        "a user would see them"
    )


def test_frozen_layers_stay_frozen_with_adapters(model):
    adapted = adapt(model, "--lora-rank", 4, "--freeze-layers", 1)
    learning = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("layer.1." in name for name in learning) and not any(
        "layer.0." in name or "embeddings" in name for name in learning
    )


@pytest.mark.parametrize(
    "config, dropout, attention, expected",
    [
        (AutoConfig.for_model("bert"), None, None, {"attention_probs_dropout_prob": 0.0}),
        (AutoConfig.for_model("bert"), None, 0.1, {"attention_probs_dropout_prob": 0.1}),
        (
            AutoConfig.for_model("bert"),
            0.2,
            None,
            {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "classifier_dropout": 0.2},
        ),
        (
            AutoConfig.for_model("distilbert"),
            0.2,
            0.0,
            {"dropout": 0.2, "attention_dropout": 0.0, "seq_classif_dropout": 0.2, "qa_dropout": 0.2},
        ),
        (
            GPT2Config(),
            0.3,
            None,
            {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3, "summary_first_dropout": 0.3},
        ),
    ],
)
def test_dropout_options_are_all_found(config, dropout, attention, expected):
    assert (
        adaptation.dropout_options(config, dropout=dropout, attention_dropout=attention, name="m") == expected
    )


def test_a_dropout_that_a_model_has_not_is_refused():
    config = PreTrainedConfig()
    with pytest.raises(UserError, match="--dropout 0.1: m has none"):
        adaptation.dropout_options(config, dropout=0.1, attention_dropout=None, name="m")
    with pytest.raises(UserError, match="--attention-dropout 0.1: m has none"):
        adaptation.dropout_options(config, dropout=None, attention_dropout=0.1, name="m")
