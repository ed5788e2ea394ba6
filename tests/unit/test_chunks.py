"""What is read of a long text, against the definitions and the tokenizer's own truncation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.training import data
from common.training.run import TRUNCATIONS
from conftest import make_sentences


@settings(deadline=None, max_examples=200)
@given(num_tokens=st.integers(0, 300), size=st.integers(1, 60), truncation=st.sampled_from(TRUNCATIONS))
def test_chunks_are_what_their_name_says(num_tokens, size, truncation):
    found = [chunk.tolist() for chunk in data.cut_chunks(num_tokens, size, truncation)]
    everything = list(range(num_tokens))
    if num_tokens <= size:
        assert found == [everything]
    elif truncation == "head":
        assert found == [everything[:size]]
    elif truncation == "tail":
        assert found == [everything[-size:]]
    elif truncation == "head-tail":
        head = round(size / 4)
        assert (
            found == [everything[:head] + everything[num_tokens - (size - head) :]] and len(found[0]) == size
        )
    else:
        assert sorted({position for chunk in found for position in chunk}) == everything, (
            "nothing is left out"
        )
        assert all(chunk == list(range(chunk[0], chunk[0] + size)) for chunk in found), "whole chunks"
        overlap = min(math.ceil(size / 4), size - 1)
        assert all(later[0] - earlier[0] <= size - overlap for earlier, later in zip(found, found[1:]))
        assert len(found) == math.ceil((num_tokens - overlap) / (size - overlap)), (
            "and no chunk more than that takes"
        )


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


TEXTS = [*(text for text, _ in make_sentences(20)), "a [SEP] in a text", "🙂", "the film was " * 40]


@pytest.mark.parametrize("max_length", [4, 9, 64])
@pytest.mark.parametrize("side", ["head", "tail"])
def test_one_end_is_what_the_tokenizer_keeps(tokenizer, side, max_length):
    tokenizer.truncation_side = {"head": "right", "tail": "left"}[side]
    try:
        expected = tokenizer(TEXTS, truncation=True, max_length=max_length)
    finally:
        tokenizer.truncation_side = "right"
    columns = data.encode(TEXTS, tokenizer, max_length=max_length, truncation=side)
    for name in ("input_ids", "token_type_ids"):
        assert [row for (row,) in columns[name]] == expected[name]
    assert (
        columns["num_read"]
        == [len(ids) for ids in expected["input_ids"]]
        == [sum(lengths) for lengths in columns["chunk_lengths"]]
    )


@pytest.mark.parametrize("truncation", ["head-tail", "chunks"])
def test_each_chunk_stands_between_the_special_tokens(tokenizer, truncation):
    columns = data.encode(TEXTS, tokenizer, max_length=12, truncation=truncation)
    for text, found, read, total in zip(
        TEXTS, columns["input_ids"], columns["num_read"], columns["num_tokens"]
    ):
        whole = tokenizer(text)["input_ids"]
        assert total == len(whole)
        assert all(chunk[0] == whole[0] and chunk[-1] == whole[-1] and len(chunk) <= 12 for chunk in found)
        own = whole[1:-1]
        if truncation == "chunks":
            assert read == total and len(found) == (1 if total <= 12 else math.ceil((len(own) - 3) / 7))
        elif total > 12:
            # 10 tokens: a quarter, rounded, from the beginning
            assert found[0][1:-1] == own[:2] + own[-8:] and read == 12
        assert len(np.unique([len(chunk) for chunk in found])) == 1
