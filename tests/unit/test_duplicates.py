"""Texts that are nearly alike: found as all pairs of them are when each is compared with each."""

import itertools
import random
import re

import datasets
import pytest

from common.training.duplicates import (
    BEGINNING,
    NEAR,
    NEIGHBOURS,
    SKETCH,
    WORD,
    alike,
    count_shared_texts,
    nearly_alike,
)
from conftest import heavy


def all_pairs(texts: list[str]) -> dict[tuple[int, int], float]:
    """Return the similarity of each pair of texts by brute force: of sets of pairs of words."""
    words = [re.findall(WORD, text) for text in texts]
    sets = [set(zip(own, own[1:])) for own in words]
    return {
        (one, other): len(sets[one] & sets[other]) / len(sets[one] | sets[other])
        for one, other in itertools.combinations(range(len(texts)), 2)
        if sets[one] | sets[other]
    }


def variants(generator: random.Random, *, length: int, count: int, share: float) -> list[str]:
    """Return a text of so many words, and others in which at most a share of the words is another."""
    vocabulary = [f"w{number}" for number in range(300)]
    words, texts = generator.choices(vocabulary, k=length), []
    for _ in range(count):
        other = list(words)
        for _ in range(generator.randint(0, max(1, round(share * length)))):
            other[generator.randrange(length)] = generator.choice(vocabulary)
        texts.append(" ".join(other))
    return [" ".join(words), *texts]


SAME = {  # how the texts of a group are alike -> these
    "white space": ["one two  three four five", "one two three four five\n", " one\ttwo three four five"],
    "capitals and punctuation": [
        "Good; BETTER best of all",
        "good better, best of all!",
        "GOOD better best of all",
    ],
    "few words": ["C++", "c"],
    "no words": ["?!", "?!"],
    "marks before the words": ["- " * BEGINNING + "a late word or two", "a late word or two"],
    "signs that are written in two ways": ["ﬁne cafe\u0301s of all kinds", "fine cafés of all kinds"],
    "a word without an end": ["x" * BEGINNING + " one two three", "x" * BEGINNING + ": one two three"],
}
OTHERS = [
    "one two three four six",
    "one two three",
    "?!?",
    "good better best",
    "- " * BEGINNING,
    "x" * BEGINNING,
]


@pytest.mark.parametrize("texts", SAME.values(), ids=SAME)
def test_texts_of_train_are_found_in_other_splits_where_they_are_written_otherwise(texts):
    for train, test in itertools.permutations(texts, 2):
        splits = {
            "train": make([*OTHERS, train]),
            "validation": make(["none of these at all"]),
            "test": make(["a new text", test, test]),
        }
        assert count_shared_texts(splits) == {"validation": 0, "test": 2}
        assert count_shared_texts({**splits, "validation": splits["train"]}, ("validation",))["test"] == 2


def test_texts_are_shared_as_a_look_at_all_their_words_finds():
    """And of pairs, both texts must be alike."""
    generator = random.Random(0)
    texts = [
        " ".join(generator.choices(["a", "A", "b", "--", "ñ"], k=generator.randint(1, 6))) for _ in range(600)
    ]
    train, test = texts[:300], texts[300:]
    expected = sum(alike(text) in set(map(alike, train)) for text in test)
    assert count_shared_texts({"train": make(train), "test": make(test)}) == {"test": expected}
    assert 50 < expected < 250
    seconds = {"train": make(train, train), "test": make([*train, *train], [*train[:2], *["new"] * 598])}
    assert count_shared_texts(seconds) == {"test": 2}


def make(texts: list[str], seconds: list[str] | None = None) -> datasets.Dataset:
    """Return rows with these texts, or with pairs."""
    return datasets.Dataset.from_dict({"text": texts} | ({"text_pair": seconds} if seconds else {}))


@pytest.mark.parametrize("seed", range(4))
def test_nearly_alike_texts_are_those_that_brute_force_finds(seed):
    generator = random.Random(seed)
    texts = [
        text
        for _ in range(50)
        for text in variants(generator, length=generator.randint(1, SKETCH), count=3, share=0.08)
    ]
    expected = {pair: value for pair, value in all_pairs(texts).items() if value >= NEAR}
    found = {(one, other): value for one, other, value in nearly_alike(texts)}
    assert found == pytest.approx(expected) and 50 < len(expected) < 250
    assert list(found.values()) == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("num_groups", [15, heavy(30)])
def test_long_texts_are_compared_by_a_sample_of_their_words(num_groups):
    """Also where one is longer, by a part that the other lacks: its sample is a smaller share of it."""
    generator = random.Random(0)
    groups = [variants(generator, length=1500, count=1, share=0.03) for _ in range(num_groups)]
    more = " ".join(f"new{number}" for number in range(225))
    groups += [[text, f"{text} {more}"] for text, _ in groups]
    texts = [text for group in groups for text in group]
    expected = {pair: value for pair, value in all_pairs(texts).items() if value >= NEAR}
    found = {(one, other): value for one, other, value in nearly_alike(texts)}
    assert len(expected.keys() & found.keys()) > 0.9 * len(expected)
    assert all(abs(value - found[pair]) < 0.15 for pair, value in expected.items() if pair in found)


def test_a_text_that_many_rows_have_in_common_takes_work_in_proportion():
    letter = "this is a letter that everybody gets with all of its many words, but for the number {} in it"
    texts = [letter.format(number) for number in range(500)]
    found = nearly_alike(texts)
    assert {text for pair in found for text in pair[:2]} == set(range(500))
    assert len(found) <= 500 * NEIGHBOURS * 20


@pytest.mark.parametrize("texts", [[], ["one"], ["", ""], ["two words", "two others"]])
def test_texts_with_too_few_words_are_not_alike(texts):
    assert nearly_alike(texts) == []


def test_words_of_languages_without_spaces_are_their_characters():
    texts = ["今日は天気がとても良いので、近くの公園まで散歩に行きました", "人工智能正在改变世界"]
    assert [pair[:2] for pair in nearly_alike([*texts, texts[0].replace("近", "遠")])] == [(0, 2)]
