"""Texts as chunks of tokens: a text longer than the model reads becomes one or more of them
(`--truncation`). The chunks of a split are cached.

`datasets`, which takes a second to import, is imported by the functions that need it: `encode` does
not.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import note, quoted
from common.files import replace_file, sha256
from common.runtime import Runtime
from common.training.data import Splits, values_sha256

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from common.tokenizer import Tokenizer

# share of a chunk with head-tail: 128 of 510 tokens was best on IMDb (Sun et al. 2019, "How to
# Fine-Tune BERT for Text Classification?")
HEAD_SHARE = 0.25
# least share of a chunk that the chunk before it holds too, so that what one of them cuts apart is
# whole in the other
OVERLAP = 0.25
# special tokens that tell a model where a text begins, ends or is padding
MARKS = ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token")
FORMAT = 2  # of the cached Arrow files; counts up when their columns change


@dataclass(frozen=True)
class TokenConfig:
    """How many tokens the model reads at once, and which part of a longer text."""

    max_length: int  # tokens of a chunk in training
    eval_max_length: int  # in evaluation and prediction
    truncation: str
    # special tokens that a text holds, such as </s>, are read as the unknown token
    hides_special: bool = False

    def length_of(self, split: str) -> int:
        """Return the number of tokens at which a split is truncated."""
        return self.max_length if split == "train" else self.eval_max_length


def cut_chunks(num_tokens: int, size: int, truncation: str) -> list[np.ndarray]:
    """Return the chunks of a text of `num_tokens` tokens as arrays of at most `size` positions.

    `head` and `tail` read one end of the text, `head-tail` both; `chunks` reads everything, in
    chunks of equal size that overlap.
    """
    positions = np.arange(num_tokens)
    if num_tokens <= size:
        return [positions]
    if truncation == "head":
        return [positions[:size]]
    if truncation == "tail":
        return [positions[-size:]]
    if truncation == "head-tail":
        head = round(size * HEAD_SHARE)
        tail = size - head
        return [np.concatenate([positions[:head], positions[-tail:]])]
    # as few chunks as overlap enough, evenly spaced from the beginning of the text to its end
    overlap = min(math.ceil(size * OVERLAP), size - 1)
    last_start = num_tokens - size
    count = math.ceil(last_start / (size - overlap)) + 1
    starts = np.linspace(0, last_start, count).round().astype(int)
    return [positions[start : start + size] for start in starts]


def cut_pair(first: int, second: int, size: int, truncation: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the chunks of a pair of texts of so many tokens, together at most `size`: the
    positions in each of the two.

    The longer text is cut first, until both are equally long. With `chunks`, the longer one is read
    in chunks, each beside the shorter text, of which at most half a chunk is read.
    """
    shorter, longer = min(first, second), max(first, second)
    if first + second <= size:
        kept, pieces = np.arange(shorter), [np.arange(longer)]
    elif truncation == "chunks":
        kept = np.arange(min(shorter, size // 2))
        pieces = cut_chunks(longer, size - len(kept), truncation)
    else:
        room = min(shorter, size // 2)
        kept = cut_chunks(shorter, room, truncation)[0]
        pieces = cut_chunks(longer, size - room, truncation)
    return [(kept, piece) if first <= second else (piece, kept) for piece in pieces]


def encode(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase | Tokenizer,
    *,
    max_length: int,
    truncation: str,
    pairs: list[str] | None = None,
    hides_special: bool = False,
) -> dict[str, list]:
    """Return the columns of tokenised texts, of each with its second one where there are `pairs`:
    `input_ids`, and whatever else the model takes.

    Each cell is a list of chunks. A chunk stands between the special tokens and has at most
    `max_length` tokens including them. Three more columns count tokens, special tokens included:
    `chunk_lengths`; `num_tokens`, the length of the whole text; and `num_read`, how many of these
    are in any chunk. With `hides_special`, what a text holds of the tokens that mark beginnings,
    ends and padding becomes the unknown token.
    """
    options: dict[str, Any] = {"truncation": False, "padding": False, "verbose": False}
    encoded = tokenizer(texts, text_pair=pairs, return_special_tokens_mask=True, **options)
    # `pad_batch` makes the attention mask
    names = [name for name in encoded if name not in ("attention_mask", "special_tokens_mask")]
    counts = ("chunk_lengths", "num_tokens", "num_read")
    columns: dict[str, list] = {name: [] for name in (*names, *counts)}
    if hides_special:
        _hide_special(encoded["input_ids"], encoded["special_tokens_mask"], tokenizer)
    for number, mask in enumerate(encoded["special_tokens_mask"]):
        if pairs is not None:
            chunks = _chunks_of_pair(encoded.sequence_ids(number), max_length, truncation)
        else:
            chunks = _chunks_of_text(mask, max_length, truncation)
        for name in names:
            values = np.asarray(encoded[name][number])
            columns[name].append([values[chunk].tolist() for chunk in chunks])
        columns["chunk_lengths"].append([len(chunk) for chunk in chunks])
        columns["num_tokens"].append(len(mask))
        columns["num_read"].append(len(np.unique(np.concatenate(chunks))))
    return columns


def _hide_special(
    ids: list[list[int]], masks: list[list[int]], tokenizer: PreTrainedTokenizerBase | Tokenizer
) -> None:
    """Put the unknown token in the place of marks within texts, given their ids and which of these
    are around them. Without an unknown token that is no mark itself, they stay.
    """
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
    roles = tokenizer.special_tokens_map
    unknown = special.get(roles.get("unk_token", ""))
    marks = {special[token] for role, token in roles.items() if role in MARKS and token in special}
    if unknown is None or unknown in marks:
        return
    for text, mask in zip(ids, masks):
        if not marks.isdisjoint(text):
            for position, (token, is_around) in enumerate(zip(text, mask)):
                if token in marks and not is_around:
                    text[position] = unknown


def _chunks_of_text(mask: list[int], max_length: int, truncation: str) -> list[np.ndarray]:
    """Return the positions of each chunk's tokens in a text, given which tokens are special."""
    # positions: the text from `first` up to `last`, special tokens before and after it
    words = np.flatnonzero(np.asarray(mask) == 0)
    first, last = (words[0], words[-1] + 1) if len(words) else (len(mask), len(mask))
    before, after = np.arange(first), np.arange(last, len(mask))
    cut = cut_chunks(last - first, max_length - len(before) - len(after), truncation)
    return [np.concatenate([before, first + positions, after]) for positions in cut]


def _chunks_of_pair(sequence_ids: list[int | None], max_length: int, truncation: str) -> list[np.ndarray]:
    """Return the positions of the tokens of each chunk of a pair, given which text each is of."""
    texts = np.array([-1 if text is None else text for text in sequence_ids])
    special, first, second = (np.flatnonzero(texts == text) for text in (-1, 0, 1))
    cut = cut_pair(len(first), len(second), max_length - len(special), truncation)
    # the tokens of a chunk keep their order, with the special ones around and between them
    return [np.sort(np.concatenate([special, first[one], second[other]])) for one, other in cut]


def tokenize(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: str,
    cache_dir: str | None,
    hides_special: bool = False,
) -> datasets.Dataset:
    """Return the rows with the columns of `encode`.

    The result is cached as a memory-mapped Arrow file under the SHA-256 of all that it depends on,
    its fingerprint too, and the version of `datasets`: one may not read what another wrote.
    """
    import datasets

    options = f"{max_length} {truncation} {HEAD_SHARE} {OVERLAP}" + (f" {MARKS}" if hides_special else "")
    key = _sha256_of_rows(rows, f"{tokenizer_json(tokenizer)} {options}")
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "tokenized"
    folder.mkdir(parents=True, exist_ok=True)
    cached = folder / f"{key}-{FORMAT}-{datasets.__version__}.arrow"
    proof = cached.with_suffix(".sha256")
    _remove_if_damaged(cached, proof)
    tokenized: Any = rows.map(
        lambda batch: encode(
            batch["text"],
            tokenizer,
            max_length=max_length,
            truncation=truncation,
            pairs=batch["text_pair"] if "text_pair" in rows.column_names else None,
            hides_special=hides_special,
        ),
        batched=True,
        desc="tokenising",
        cache_file_name=str(cached),
        new_fingerprint=key[:16],  # as long as those of `datasets`
    )
    if not proof.exists():
        replace_file(proof, f"{sha256(cached)}\n")
    return tokenized


def _sha256_of_rows(rows: datasets.Dataset, what_is_done: str) -> str:
    """Return the SHA-256 of rows, and of what is done to them, in hexadecimal."""
    # the values of a label are numbers: its names are what they mean
    features = "".join(f"{feature}\0" for feature in rows.features.values())
    # labels and row numbers are in the file as well
    return values_sha256(rows, rows.column_names, before=what_is_done + features)


def _remove_if_damaged(cached: Path, proof: Path) -> None:
    """Remove a cached file that is not what was written, and say so: Arrow maps it unchecked."""
    is_whole = cached.exists() and proof.exists()  # a kill can come between the two
    if is_whole and proof.read_bytes() != f"{sha256(cached)}\n".encode():
        note(f"{cached}: this cached file is damaged; the texts are tokenised again")
        is_whole = False
    if not is_whole:
        cached.unlink(missing_ok=True)
        proof.unlink(missing_ok=True)


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return everything that a tokenizer does as one string, from which its fingerprint is made.

    Truncation and padding are left out: each call sets them, so they describe the last call and not
    the tokenizer.
    """
    if not tokenizer.is_fast:
        return repr((type(tokenizer), sorted(tokenizer.get_vocab().items())))
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**description, "truncation": None, "padding": None})


def tokenize_splits(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    config: TokenConfig,
    runtime: Runtime,
    *,
    cache_dir: str | None,
) -> Splits:
    """Return the tokenised splits: one process per machine fills the cache, the others read it."""
    with runtime.local_main_first():
        return {
            split: tokenize(
                rows,
                tokenizer,
                max_length=config.length_of(split),
                truncation=config.truncation,
                hides_special=config.hides_special,
                cache_dir=cache_dir,
            )
            for split, rows in splits.items()
        }


def describe_marks(
    splits: Splits, tokenizer: PreTrainedTokenizerBase | Tokenizer, tokens: TokenConfig
) -> str:
    """Return a line on the texts that hold tokens with which the tokenizer marks beginnings, ends
    and padding, and what becomes of these; "" if there are none.
    """
    marks = [token for role, token in tokenizer.special_tokens_map.items() if role in MARKS]
    occurrences = [
        (split, row, mark)
        for split, rows in splits.items()
        for column in ("text", "text_pair")
        if column in rows.column_names
        for row, text in zip(rows["row"][:], rows[column][:])
        for mark in marks
        if mark in text
    ]
    if not occurrences:
        return ""
    count, (split, row, mark) = len({place[:2] for place in occurrences}), occurrences[0]
    texts = "1 text holds a mark" if count == 1 else f"{count:,} texts hold marks"
    becomes = "it is read as that"
    if tokens.hides_special:
        becomes = "the unknown token is read in its place"
    return f"{texts} of the tokenizer, as {quoted(mark)} in {split} row {row}: {becomes}"
