"""Tokens to text: whole characters only, all pieces joined equal the text decoded at once, stop
strings never shown.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from common.generation.completion import REPLACEMENT, TextStream
from language_models import TEXTS, train_byte_bpe

BPE = train_byte_bpe()


def stream(
    ids: list[int], tokenizer=BPE, stops: tuple[str, ...] = (), before: tuple[int, ...] = ()
) -> tuple[list[str], TextStream]:
    """Return the pieces of a text, and the stream."""
    found = TextStream(tokenizer, stops, before)
    pieces = []
    for token in ids:
        pieces.append(found.add(token))
        if found.stopped:
            break
    return [*pieces, found.finish()], found


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(text):
    ids = BPE(text)["input_ids"]
    pieces, found = stream(ids)
    assert "".join(pieces) == found.text == text == BPE.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5  # it streams


@settings(max_examples=300)
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_any_text_comes_through(text):
    ids = BPE(text)["input_ids"]
    assert "".join(stream(ids)[0]) == BPE.decode(ids)


@settings(max_examples=300)
@given(st.lists(st.integers(0, len(BPE) - 1), max_size=40))
def test_any_tokens_come_through(ids):
    """A model may write bytes that are no text."""
    assert "".join(stream(ids)[0]) == BPE.decode(ids, skip_special_tokens=True)


@settings(max_examples=100)
@given(
    st.text(st.characters(codec="utf-8"), max_size=20), st.lists(st.integers(3, len(BPE) - 1), max_size=20)
)
def test_a_text_is_what_its_tokens_add_to_the_prompt(prompt, ids):
    before = BPE(prompt)["input_ids"]
    text = "".join(stream(ids, before=before)[0])
    assert BPE.decode(before) + text == BPE.decode(before + ids)


def test_a_space_at_the_start_of_a_word_survives():
    """Tokenizers of SentencePiece's kind strip the space of the first token that they decode:
    token by token all words would run together.
    """
    words = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁sat": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert "".join(stream([1, 2, 3, 4], tokenizer)[0]) == tokenizer.decode([1, 2, 3, 4]) == "the cats sat"
    # after a prompt, the space is part of the text: what is decoded together, without the prompt
    whole, prompt = tokenizer.decode([1, 2, 3, 4]), tokenizer.decode([1, 2, 3])
    assert "".join(stream([4], tokenizer, before=(1, 2, 3))[0]) == whole.removeprefix(prompt) == " sat"


CASES = {  # text, stops, what is shown
    "in the middle": ("one two three", ("two",), "one "),
    "across tokens": ("The quick brown fox", ("ck bro",), "The qui"),
    "the earliest of several": ("one two three", ("three", "wo", "two"), "one "),
    "begins, but is none": ("one two", ("one three", "two four"), "one two"),
    "begins again at once": ("aab", ("ab",), "a"),
    "at the very end": ("one\n", ("\n",), "one"),
    "not there": ("one two", ("three",), "one two"),
    "Chinese": ("你好，世界。今天", ("世界",), "你好，"),
    "half of an emoji is none": ("I like 🤖 and", ("🎉",), "I like 🤖 and"),
}


@pytest.mark.parametrize("text, stops, shown", CASES.values(), ids=CASES)
def test_a_stop_string_and_what_follows_is_not_shown(text, stops, shown):
    pieces, found = stream(BPE(text)["input_ids"], stops=stops)
    assert "".join(pieces) == found.text == shown and found.stopped == (shown != text)


@settings(max_examples=300)
@given(st.text("ab🤖", max_size=20), st.lists(st.text("ab🤖", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text, stops):
    """Oracle: str.find in the whole text, token by token: a string counts as soon as it is
    whole.
    """
    ids = BPE(text)["input_ids"]
    expected = text
    for end in range(1, len(ids) + 1):
        known = BPE.decode(ids[:end]).rstrip(REPLACEMENT)
        places = [known.find(stop) for stop in stops if stop in known]
        if places:
            expected = text[: min(places)]
            break
    assert "".join(stream(ids, stops=tuple(stops))[0]) == expected
