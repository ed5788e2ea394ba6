"""Scoring a split against one text at a time, and the choice of the best epoch."""

import argparse

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.errors import UserError
from common.runtime import Runtime
from common.training import batching
from common.training.batching import BatchConfig
from common.training.evaluation import TextClassifier, answer, is_better, predict_logits, predict_texts
from common.training.run import REGRESSION
from common.training.task import Scoring, Task
from common.training.tokenization import TokenConfig, tokenize
from conftest import make_sentences

RUNTIME = Runtime(torch.device("cpu"), "fp32")
TOKENS = TokenConfig(20, 20, "head")


@pytest.fixture(scope="module")
def scored(tiny_model, tmp_path_factory):
    """The model, its tokenizer, 37 tokenised texts, and the logits of each text alone."""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tiny_model).eval(),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    pairs = make_sentences(37)
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "row": datasets.Value("int64"),
        }
    )
    rows = datasets.Dataset.from_dict(
        {"text": [text for text, _ in pairs], "label": [label for _, label in pairs], "row": list(range(37))},
        features=features,
    )
    tokenized = tokenize(
        rows, tokenizer, max_length=20, truncation="head", cache_dir=str(tmp_path_factory.mktemp("cache"))
    )
    with torch.inference_mode():
        alone = torch.cat(
            [
                model(**tokenizer(text, truncation=True, max_length=20, return_tensors="pt")).logits
                for text in rows["text"]
            ]
        )
    return model, tokenizer, tokenized, alone


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_logits_are_those_of_each_text_alone_in_the_rows_order(scored, batch_size):
    model, tokenizer, tokenized, alone = scored
    logits = predict_logits(TextClassifier(model, tokenizer, TOKENS, batch_size), tokenized, RUNTIME)
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-6)
    divided = TextClassifier(model, tokenizer, TOKENS, batch_size, temperature=2.0)
    assert torch.equal(predict_logits(divided, tokenized, RUNTIME), logits / 2)


def test_predictions_come_in_the_order_of_the_texts(scored, monkeypatch):
    model, tokenizer, tokenized, alone = scored
    # so that 37 texts take several blocks
    monkeypatch.setattr("common.training.evaluation.PREDICT_BLOCK", 10)
    model.config.id2label = {0: "neg", 1: "pos"}
    classifier = TextClassifier(model, tokenizer, TOKENS, batch_size=4)
    answers = list(predict_texts(classifier, tokenized["text"][:], range(1, 38), RUNTIME))
    assert [one["row"] for one in answers] == list(range(1, 38))
    for one, probabilities in zip(answers, alone.softmax(-1).tolist()):
        assert list(one["scores"].values()) == pytest.approx(probabilities, abs=1e-5)
        assert one["scores"][one["label"]] == one["confidence"] == max(one["scores"].values())


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_written_score_is_read_back_as_it_was(score):
    written = answer(Task(REGRESSION, ["price"]), [score], Scoring())
    assert np.float32(written["prediction"]) == np.float32(written["scores"]["price"]) == np.float32(score)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_chunks_give_the_mean_of_the_chunks_logits_also_when_a_batch_parts_a_text(
    scored, tmp_path, batch_size
):
    model, tokenizer, tokenized, _ = scored
    rows = tokenized.select_columns(["text", "label", "row"])
    chunked = tokenize(rows, tokenizer, max_length=9, truncation="chunks", cache_dir=str(tmp_path))
    assert max(map(len, chunked["input_ids"])) >= 4
    with torch.inference_mode():
        expected = torch.stack(
            [
                torch.cat([model(input_ids=torch.tensor([chunk])).logits for chunk in chunks]).mean(0)
                for chunks in chunked["input_ids"]
            ]
        )
    logits = predict_logits(TextClassifier(model, tokenizer, TOKENS, batch_size), chunked, RUNTIME)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("could not create a primitive"),
    ],
)
def test_too_little_memory_names_the_flag_that_helps(error, scored):
    _, tokenizer, tokenized, _ = scored

    class Large(torch.nn.Module):
        config = argparse.Namespace(num_labels=2)

        def forward(self, **_):
            raise error

    with pytest.raises(UserError, match="--eval-batch-size 4: a batch does not fit into memory; use less"):
        predict_logits(TextClassifier(Large(), tokenizer, TOKENS, batch_size=4), tokenized, RUNTIME)


@pytest.mark.parametrize(
    "message",
    [
        "mat1 and mat2 shapes cannot be multiplied",
        "could not create a primitive descriptor for the matmul primitive",
    ],
)
def test_another_error_of_the_model_stays_what_it_is(message, scored):
    _, tokenizer, tokenized, _ = scored

    class Broken(torch.nn.Module):
        config = argparse.Namespace(num_labels=2)

        def forward(self, **_):
            raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message):
        predict_logits(TextClassifier(Broken(), tokenizer, TOKENS, batch_size=4), tokenized, RUNTIME)


@pytest.mark.parametrize("max_chunks, tried", [(1, [12, 6, 3, 1]), (5, [12, 6, 5]), (12, [12])])
def test_a_batch_is_halved_to_the_chunks_of_one_text_and_no_further(max_chunks, tried, monkeypatch):
    sizes = []
    monkeypatch.setattr(batching, "longest_batch", lambda rows, tokenizer, size, least: sizes.append(size))
    monkeypatch.setattr(batching, "_fits", lambda *_: False)
    config = BatchConfig(12, 1, max_chunks, "buckets", 0, 0)
    with pytest.raises(UserError, match="--auto-batch-size: not even one text"):
        batching.largest_micro_batch(None, None, None, config, max_length=20, runtime=RUNTIME)
    assert sizes == tried


@pytest.mark.parametrize(
    "metric, value, best, better",
    [
        ("accuracy", 0.9, None, True),
        ("accuracy", 0.9, 0.9, False),
        ("accuracy", 0.91, 0.9, True),
        ("accuracy", float("nan"), None, False),
        ("loss", 0.2, 0.3, True),
        ("loss", 0.3, 0.3, False),
        ("loss", float("nan"), 0.3, False),
        ("loss", 0.4, 0.3, False),
    ],
)
def test_the_best_epoch_is_the_earliest_of_the_best_and_never_a_nan(metric, value, best, better):
    assert is_better({metric: value}, None if best is None else {metric: best}, metric) is better
