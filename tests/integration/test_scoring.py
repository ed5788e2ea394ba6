"""Perplexity with a sliding window against the definition, token by token; ROUGE against known values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoModelForCausalLM, LlamaConfig

from common.generation import decoding, scoring
from common.generation.language_model import LanguageModel
from common.generation.library import TransformersModel
from common.generation.scoring import SlidingWindow
from language_models import SIZES, tiny_language_model, train_byte_bpe


@given(st.integers(0, 60), st.integers(2, 20), st.booleans(), st.data())
def test_each_token_but_the_first_is_scored_once_with_enough_before_it(length, window, has_start, data):
    """The token before a text counts as one of those before a token, and of those of a window."""
    stride, scored = data.draw(st.integers(1, window - 1)), []
    for begin, end, first in scoring.passes(length, SlidingWindow(window, stride), has_start=has_start):
        before = int(has_start and begin > 0)
        assert begin < first + before and end - begin + before <= window
        scored += range(first, end)
        assert all(place - begin + before >= min(window - stride, place) for place in range(first, end))
    assert scored == list(range(1, length))


def test_the_overlap_of_windows_costs_no_logits():
    language_model, widths = tiny_language_model("llama"), []
    language_model.model.module.lm_head.register_forward_hook(
        lambda module, given, logits: widths.append(logits.shape[1])
    )
    scoring.likelihood(language_model, list(range(5, 45)), SlidingWindow(16, 4))
    assert widths == [16, 5, 5, 5, 5, 5, 5]


@pytest.mark.parametrize("window, stride", [(8, 4), (8, 7), (8, 1), (64, 32), (500, 250)])
@pytest.mark.parametrize("at_once, start", [(3, None), (256, 7)])
def test_perplexity_is_the_definition(window, stride, at_once, start, monkeypatch):
    """Oracle: one pass a token over exactly the tokens that its window shows, in fp64."""
    monkeypatch.setattr(scoring, "SCORED_AT_ONCE", at_once)
    language_model, ids = (
        tiny_language_model("gpt2", scale=2.0),
        torch.randint(0, 211, (50,), generator=torch.Generator().manual_seed(0)).tolist(),
    )
    found = scoring.likelihood(language_model, ids, SlidingWindow(window, stride), start=start)
    language_model.model.module.double()
    total = 0.0
    with torch.inference_mode():
        for begin, end, first in scoring.passes(
            len(ids), SlidingWindow(window, stride), has_start=start is not None
        ):
            for place in range(first, end):
                before = [start] if start is not None and begin > 0 else []
                logits = language_model.model.module(torch.tensor([before + ids[begin:place]])).logits[0, -1]
                total -= logits.log_softmax(-1)[ids[place]].item()
    assert found.num_tokens == 49 and math.isclose(found.total, total, rel_tol=1e-5)
    assert math.isclose(found.perplexity, math.exp(total / 49), rel_tol=1e-4)


def test_every_window_begins_with_the_token_that_the_tokenizer_puts_before_a_text(monkeypatch):
    """Oracle: the tokens that the model is given."""
    tokenizer, given_ids = train_byte_bpe(), []
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=128)
    model = AutoModelForCausalLM.from_config(config).eval()
    language_model = LanguageModel("tiny", TransformersModel(model), tokenizer, (2,), 0, 128)
    assert scoring.start_token(language_model) is None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert scoring.start_token(language_model) == 1
    left_pad = decoding.left_pad

    def noted(rows, *args, **options):
        given_ids.extend(rows)
        return left_pad(rows, *args, **options)

    monkeypatch.setattr(decoding, "left_pad", noted)
    scoring.text_likelihood(language_model, "a b c d e f g h", SlidingWindow(6, 3), name="x")
    assert len(given_ids) > 3 and all(len(ids) <= 6 and ids[0] == 1 and 1 not in ids[1:] for ids in given_ids)


@pytest.mark.parametrize("text", ["éa b", " é", "a é", "\ufffda", "😀 b", "日本"])
def test_bytes_of_the_first_token_are_not_scored(text):
    """Oracle: the bytes that the token's name stands for, a character each."""
    tokenizer = train_byte_bpe()
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=128)
    model = AutoModelForCausalLM.from_config(config).eval()
    language_model = LanguageModel("tiny", TransformersModel(model), tokenizer, (2,), 0, 128)
    found = scoring.text_likelihood(language_model, text, SlidingWindow(6, 3), name="x")
    first, *others = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert found.num_bytes == sum(map(len, others)) == len(text.encode()) - len(first)


def test_rouge_is_what_the_tutorial_prints():
    """Oracle: the output of evaluate.load("rouge") in the tutorial, for its two quotations."""
    texts = ["It does not do to dwell on dreams and forget to live.", "After all this time? Always."]
    references = [
        "It does not do well to dwell on dreams and forget to live.",
        "After all this time? Yes, always.",
    ]
    assert scoring.rouge(texts, references) == pytest.approx(
        {
            "rouge1": 0.9345454545454546,
            "rouge2": 0.7681159420289854,
            "rougeL": 0.9345454545454546,
            "rougeLsum": 0.9345454545454546,
        }
    )


def test_rouge_lsum_takes_each_line_by_itself():
    assert scoring.rouge(["c d\na b"], ["a b\nc d"]) == pytest.approx(
        {"rouge1": 1.0, "rouge2": 2 / 3, "rougeL": 0.5, "rougeLsum": 1.0}
    )
