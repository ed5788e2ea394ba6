"""A text longer than the model reads -> the windows of its tokens that are read."""

import math

import numpy as np
from transformers import PreTrainedTokenizerBase

TRUNCATIONS = ("head", "tail", "head-tail", "chunks")
# of a window with head-tail: 128 of 510 tokens was best on IMDb (Sun et al. 2019, "How to
# fine-tune BERT for
# text classification?")
HEAD_SHARE = 0.25
# of a chunk, at least, lies in the chunk before it: what stands at a border is whole in one of the
# two
OVERLAP = 0.25


def cut(num_tokens: int, size: int, truncation: str) -> list[np.ndarray]:
    """Return the windows of a text of `num_tokens` tokens as arrays of at most `size` positions.

    `head` and `tail` read one end, `head-tail` both; `chunks` reads everything, in windows of
    equal size that overlap.
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
        return [np.concatenate([positions[:head], positions[head - size :]])]
    step = size - min(math.ceil(size * OVERLAP), size - 1)
    count = math.ceil((num_tokens - size) / step) + 1
    starts = np.linspace(0, num_tokens - size, count).round().astype(int)
    return [positions[start : start + size] for start in starts]


def encode(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int, truncation: str
) -> dict[str, list]:
    """Return the columns of tokenised texts: `input_ids`, and whatever else the model takes, as
    lists of windows.

    Each window has the special tokens around it and at most `max_length` tokens with them. Beside
    them `window_lengths`; `num_tokens`, the length of the whole text, and `num_read`, the tokens
    of it that stand in any window, both with special tokens.
    """
    whole = tokenizer(texts, truncation=False, padding=False, return_special_tokens_mask=True, verbose=False)
    # the collator makes the mask
    names = [name for name in whole if name not in ("attention_mask", "special_tokens_mask")]
    columns = {name: [] for name in (*names, "window_lengths", "num_tokens", "num_read")}
    for number, mask in enumerate(whole["special_tokens_mask"]):
        own = np.flatnonzero(np.asarray(mask) == 0)
        # the text between the special tokens
        first, last = (own[0], own[-1] + 1) if len(own) else (len(mask), len(mask))
        before, after = np.arange(first), np.arange(last, len(mask))
        kept = cut(last - first, max_length - len(before) - len(after), truncation)
        windows = [np.concatenate([before, first + positions, after]) for positions in kept]
        for name in names:
            values = np.asarray(whole[name][number])
            columns[name].append([values[window].tolist() for window in windows])
        columns["window_lengths"].append([len(window) for window in windows])
        columns["num_tokens"].append(len(mask))
        columns["num_read"].append(len(np.unique(np.concatenate(windows))))
    return columns
