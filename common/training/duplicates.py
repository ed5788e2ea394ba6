"""Texts that are alike, or nearly so, in several rows of a data set: duplicates, some of which
contradict each other or lie in several splits.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.errors import shorten
from common.training.run import MULTI, SINGLE
from common.training.task import Task

if TYPE_CHECKING:
    import datasets
    import scipy.sparse

    from common.training.data import Splits

SHOWN_ROWS, SHOWN_GROUPS = 5, 10
# how rows whose texts are alike relate, in the order in which they are shown
DIFFERENT_LABELS, SEVERAL_SPLITS = "and have different labels", "in several splits"
ONE_SPLIT = "within a split"
RELATIONS = (DIFFERENT_LABELS, SEVERAL_SPLITS, ONE_SPLIT)
# Texts that are nearly alike. They are compared by the pairs of neighbouring words that they hold,
# as sets: the similarity of two texts is the share of the pairs that both hold among those that any
# of them holds (Jaccard's). From NEAR on they are shown: of 19 words, one may be another.
NEAR = 0.8
SKETCH = 128  # pairs of words that are looked at in a text: those with the lowest hashes, at random
MOST_COMPARED = 200_000  # texts: 100,000 of 120 words took a minute and 600 MB
HASHES = 2**31 - 1  # different ones
NEIGHBOURS = 20  # so many of the texts that share a pair are compared, which bounds the work
SHINGLE_BLOCK = 2000  # texts whose pairs of words are in memory at the same time
BEGINNING, FIRST_WORDS = 64, 3  # characters and words of a text that are looked at before all others
# each Han character and each kana is a word: nothing parts the words of Chinese and Japanese
WORD = r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+"


class Row(NamedTuple):
    """A row of labelled splits; its number is that of its source."""

    split: str
    number: int
    text: str
    label: Any


class Alike(NamedTuple):
    """Rows whose texts are alike, and what is said of these before the first of them is shown."""

    rows: list[Row]
    remark: str = ""


# What is shown ------------------------------------------------------------------------------------


def duplicate_lines(splits: Splits, task: Task) -> list[str]:
    """Return lines on the texts of labelled splits that are alike, and those that are nearly so."""
    groups = similar_texts(splits)
    same = [Alike(rows) for rows in groups.values() if len(rows) > 1]
    warning = ": their scores say little about new texts"
    lines = _lines_by_relation("alike", same, task, count=len, warning=warning)
    # of texts that are alike, one for each split and label is compared with others
    members = {(key, row.split, str(row.label)): row for key, group in groups.items() for row in group}
    keys, rows = [key for key, _, _ in members], list(members.values())
    if len(keys) > MOST_COMPARED:
        count = f"{len(keys):,} are more than {MOST_COMPARED:,}"
        return [*lines, f"not looked for: nearly alike texts, because {count}"]
    pairs = [
        Alike([rows[first], rows[second]], f"{similarity:.2f} alike: ")
        for first, second, similarity in nearly_alike(keys)
        if keys[first] != keys[second]
    ]
    return lines + _lines_by_relation("nearly alike", pairs, task, count=_count_rows)


def _count_rows(groups: Iterable[Alike]) -> int:
    return len({(row.split, row.number) for group in groups for row in group.rows})


def _relation(rows: Sequence[Row]) -> str:
    """Return which of RELATIONS is that of rows whose texts are alike."""
    if any(row.label != rows[0].label for row in rows):
        return DIFFERENT_LABELS
    if any(row.split != rows[0].split for row in rows):
        return SEVERAL_SPLITS
    return ONE_SPLIT


def _lines_by_relation(
    how: str, groups: Sequence[Alike], task: Task, *, count: Callable[[list[Alike]], int], warning: str = ""
) -> list[str]:
    """Return lines on how many texts are alike in each relation, and on the first groups of them."""
    lines = []
    for relation in RELATIONS:
        found = [group for group in groups if _relation(group.rows) == relation]
        if found:
            note = warning if relation == SEVERAL_SPLITS else ""
            lines.append(f"texts that are {how} {relation}{note}: {count(found):,}")
            for rows, remark in found[:SHOWN_GROUPS]:
                lines.append(f"  {_group_line(rows, task)}: {remark}{shorten(rows[0].text, 60)}")
            lines += ["  ..."] * (len(found) > SHOWN_GROUPS)
    return lines


def _group_line(group: Sequence[Row], task: Task) -> str:
    rows = ", ".join(
        f"{split} row {row} ({_label(label, task)})" for split, row, _, label in group[:SHOWN_ROWS]
    )
    more = f", ... ({len(group):,} in all)" if len(group) > SHOWN_ROWS else ""
    return rows + more


def _label(label: Any, task: Task) -> str:
    if task.kind == SINGLE:
        return shorten(task.names[label], 30)
    if task.kind == MULTI:
        return shorten(", ".join(task.names[number] for number in label) or "no label", 30)
    return ", ".join(f"{value:g}" for value in label.values())


# How they are found -------------------------------------------------------------------------------


def alike(text: str) -> str:
    """Return what is left of a text when only its letters and digits count, and no capitals."""
    plain = _plain(text)
    return " ".join(re.findall(r"\w+", plain)) or plain


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def similar_texts(splits: Splits) -> dict[str, list[Row]]:
    """Return all rows in groups whose texts are alike, by what is alike in them."""
    groups: dict[str, list[Row]] = {}
    for split, rows in splits.items():
        numbers, labels = rows["row"][:], rows["label"][:]
        for number, (text, pair), label in zip(numbers, _texts(rows), labels):
            groups.setdefault(_key(text, pair), []).append(Row(split, number, text, label))
    return groups


def count_shared_texts(splits: Splits, seen: Sequence[str] = ("train",)) -> dict[str, int]:
    """Return, for each split that is not `seen`, how many of its rows have a text that is alike to
    one of a seen split: their scores say little about new texts.
    """
    scored = {
        split: list(itertools.starmap(_key, _texts(rows)))
        for split, rows in splits.items()
        if split not in seen
    }
    keys = {key for keys_of_split in scored.values() for key in keys_of_split}
    beginnings = {tuple(key.split(" ", FIRST_WORDS)[:FIRST_WORDS]) for key in keys}
    found = set()
    for split in seen:
        for text, pair in _texts(splits[split]):
            # nearly all texts of training are told apart by their first words, in a sixth of the time
            words = re.findall(r"\w+", _plain(text[:BEGINNING]))
            if len(words) <= FIRST_WORDS or tuple(words[:FIRST_WORDS]) in beginnings:
                found.add(_key(text, pair))
    shared = keys & found
    return {split: sum(key in shared for key in keys_of_split) for split, keys_of_split in scored.items()}


def _texts(rows: datasets.Dataset) -> Iterator[tuple[str, str]]:
    """Yield the text of each row, and the second of a pair, else ""."""
    pairs = rows["text_pair"][:] if "text_pair" in rows.column_names else itertools.repeat("")
    return zip(rows["text"][:], pairs)


def _key(text: str, pair: str) -> str:
    """Return what is left of a text, or of both texts of a pair, as `alike` does."""
    return f"{alike(text)}\0{alike(pair)}" if pair else alike(text)


def word_pairs(texts: Sequence[str]) -> scipy.sparse.csr_array:
    """Return which pairs of neighbouring words, by their hashes, each text holds: a sparse matrix
    with a row for each text and at most SKETCH ones in it, those of its lowest hashes.
    """
    import scipy.sparse
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(
        lowercase=False,
        token_pattern=WORD,
        ngram_range=(2, 2),
        n_features=HASHES,
        alternate_sign=False,
        norm=None,  # pyrefly: ignore [bad-argument-type]
        binary=True,
        dtype=np.uint8,
    )
    values, lengths = [np.empty(0, np.int64)], []
    for start in range(0, len(texts), SHINGLE_BLOCK):
        block: Any = hashing.transform(texts[start : start + SHINGLE_BLOCK])
        block.sort_indices()
        for first, last in itertools.pairwise(block.indptr):
            own = block.indices[first : min(last, first + SKETCH)]
            values.append(own.astype(np.int64))
            lengths.append(len(own))
    indices = np.concatenate(values)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ones = np.ones(len(indices), np.uint8)
    return scipy.sparse.csr_array((ones, indices, starts), shape=(len(texts), HASHES))


def nearly_alike(texts: Sequence[str]) -> list[tuple[int, int, float]]:
    """Return pairs of texts (N) that share at least NEAR of their pairs of words, each as two
    numbers of texts and their similarity, the most similar first.

    Of texts with at most SKETCH pairs the similarity is exact; of others it is that of a
    random sample. Two such texts share one of their rarest pairs (Bayardo et al. 2007,
    "Scaling up all pairs similarity search"): only texts that do are compared. Where more than
    NEIGHBOURS share one, each is compared with that many, so that the work grows with the
    number of texts and not with its square.
    """
    sketches = word_pairs(texts)
    lengths = np.diff(sketches.indptr)  # (N)
    candidates = _share_a_rare_pair(sketches.indices, lengths)  # (P, 2)
    found = []
    for start in range(0, len(candidates), SHINGLE_BLOCK * 10):
        block = candidates[start : start + SHINGLE_BLOCK * 10]
        similarity = _similarity(sketches, block)
        is_near = similarity >= NEAR
        found += zip(*block[is_near].T.tolist(), similarity[is_near].tolist())
    return sorted(found, key=lambda pair: (-pair[2], pair[0], pair[1]))


def _share_a_rare_pair(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the pairs of texts (P, 2) that share one of their rarest values: of the values of all
    texts in their order, and how many each text has (N).
    """
    texts = np.repeat(np.arange(len(lengths)), lengths)
    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.lexsort((numbers, counts[numbers], texts))  # in each text the rarest first
    # of n values, two similar sets share NEAR * n, so one is among the n - NEAR * n + 1 rarest; two
    # samples of sets of which one is larger may share only NEAR times as many
    shared = np.where(lengths < SKETCH, NEAR, NEAR**2) * lengths
    rarest = lengths - np.ceil(shared - 1e-9).astype(int) + 1
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(texts)) - np.repeat(starts, lengths)
    order = order[(place < np.repeat(rarest, lengths)) & (counts[numbers[order]] > 1)]
    numbers, texts = numbers[order], texts[order]
    order = np.lexsort((texts, numbers))
    numbers, texts = numbers[order], texts[order]
    found = np.empty(0, np.int64)
    for distance in range(1, NEIGHBOURS + 1):
        both = numbers[:-distance] == numbers[distance:]
        pairs = texts[:-distance][both] * len(lengths) + texts[distance:][both]
        found = np.union1d(found, pairs)
    return np.stack(np.divmod(found, max(len(lengths), 1)), axis=1)


def _similarity(sketches: scipy.sparse.csr_array, pairs: np.ndarray) -> np.ndarray:
    """Return the similarity (P) of pairs of texts (P, 2), by hashes that both sketches cover."""
    first, second = pairs.T
    matrix: Any = sketches
    shared = matrix[first].multiply(matrix[second]).astype(np.int64).sum(axis=1)
    ends = sketches.indptr[1:]
    lengths = np.diff(sketches.indptr)
    last = np.where(lengths < SKETCH, HASHES, sketches.indices[np.maximum(ends - 1, 0)])  # (N)
    limit = np.minimum(last[first], last[second])
    # the hashes of all texts in one ascending order
    numbers = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    keys = numbers * (HASHES + 1) + sketches.indices
    sizes = [
        np.searchsorted(keys, texts * (HASHES + 1) + limit, side="right") - sketches.indptr[texts]
        for texts in (first, second)
    ]
    return shared / (sizes[0] + sizes[1] - shared)
