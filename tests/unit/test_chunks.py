"""What is read of a long text, against the definitions and the tokenizer's own truncation."""

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from common.bundled import model_folder
from common.tokenizer import read_tokenizer
from common.training import classifier
from common.training.run import TRUNCATIONS
from common.training.tokenization import cut_chunks, cut_pair, encode
from conftest import make_sentences


@settings(max_examples=200)
@given(num_tokens=st.integers(0, 300), size=st.integers(1, 60), truncation=st.sampled_from(TRUNCATIONS))
def test_chunks_are_what_their_name_says(num_tokens, size, truncation):
    found = [chunk.tolist() for chunk in cut_chunks(num_tokens, size, truncation)]
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
    columns = encode(TEXTS, tokenizer, max_length=max_length, truncation=side)
    for name in ("input_ids", "token_type_ids"):
        assert [row for (row,) in columns[name]] == expected[name]
    assert (
        columns["num_read"]
        == [len(ids) for ids in expected["input_ids"]]
        == [sum(lengths) for lengths in columns["chunk_lengths"]]
    )


@pytest.mark.parametrize("truncation", ["head-tail", "chunks"])
def test_each_chunk_stands_between_the_special_tokens(tokenizer, truncation):
    columns = encode(TEXTS, tokenizer, max_length=12, truncation=truncation)
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


# Pairs --------------------------------------------------------------------------------------------

WORDS = " ".join(f"w{number}" for number in range(40))


@pytest.mark.parametrize("lengths", [(3, 4), (3, 30), (30, 3), (20, 30), (30, 30), (9, 8), (1, 40)])
@pytest.mark.parametrize("max_length", [8, 15, 20])
@pytest.mark.parametrize("name", ["tiny", "bundled/all-MiniLM-L6-v2"])
def test_the_head_of_a_pair_is_the_librarys_longest_first(lengths, max_length, name, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(
        tiny_model if name == "tiny" else model_folder(name, kind="encoder")
    )
    first, second = (" ".join(["the film was"] * 40).split()[:length] for length in lengths)
    pair = (" ".join(first), " ".join(second))
    expected = tokenizer(*pair, truncation="longest_first", max_length=max_length)
    columns = encode([pair[0]], tokenizer, max_length=max_length, truncation="head", pairs=[pair[1]])
    for column in ("input_ids", "token_type_ids"):
        assert columns[column] == [[expected[column]]]
    assert columns["num_tokens"] == [len(tokenizer(*pair)["input_ids"])]
    assert columns["num_read"] == [len(expected["input_ids"])]


@pytest.mark.parametrize("first, second", [(3, 40), (40, 3), (30, 40), (40, 30), (2, 3)])
@pytest.mark.parametrize("size", [6, 11])
def test_the_chunks_of_a_pair_read_all_of_the_longer_text_beside_the_shorter_one(first, second, size):
    chunks = cut_pair(first, second, size, "chunks")
    longer = 0 if first > second else 1
    read = set().union(*(chunk[longer].tolist() for chunk in chunks))
    assert read == set(range(max(first, second)))
    kept = min(first, second, size // 2) if first + second > size else min(first, second)
    assert all(chunk[1 - longer].tolist() == list(range(kept)) for chunk in chunks)
    assert all(len(one) + len(other) <= size for one, other in chunks)


@pytest.mark.parametrize("truncation", ["head", "tail", "head-tail", "chunks"])
def test_a_pair_is_read_alike_by_both_tokenizers(truncation):
    folder = model_folder("bundled/all-MiniLM-L6-v2", kind="encoder")
    texts = (["a film " * 20, "short"], ["b story " * 9, "another text " * 12])
    options = {"max_length": 24, "truncation": truncation, "pairs": texts[1]}
    own = encode(texts[0], read_tokenizer(folder), **options)
    assert own == encode(texts[0], AutoTokenizer.from_pretrained(folder), **options)


@pytest.mark.parametrize(
    "flags, lengths",
    [
        ({}, (128, 256)),
        ({"truncation": "head"}, (256, 256)),
        ({"max_length": 40}, (40, 40)),
        ({"max_length": 300, "truncation": "tail"}, (300, 300)),
        ({"eval_max_length": 64}, (128, 64)),
        ({"max_length": 40, "eval_max_length": 80}, (40, 80)),
        ({"positions": 100}, (100, 100)),
    ],
)
def test_how_many_tokens_are_read_at_once(flags, lengths, tokenizer):
    """In training and in scoring, with what is left to the defaults and to the model."""
    given = {"max_length": None, "eval_max_length": None, "truncation": None, "positions": 512} | flags
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = BertConfig(vocab_size=9, max_position_embeddings=given.pop("positions"), **size)
    long_tokenizer = copy.copy(tokenizer)
    long_tokenizer.model_max_length = 512
    tokens = classifier.choose_tokens(BertForSequenceClassification(config), long_tokenizer, **given)
    assert (tokens.max_length, tokens.eval_max_length) == lengths
