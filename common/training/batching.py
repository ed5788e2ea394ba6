"""Texts -> batches: tokenise once, a deterministic batch order, collation by DataCollatorWithPadding."""

import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

IGNORED_LABEL = -100  # cross_entropy's default ignore_index
POOL_BATCHES = 50  # texts are sorted by length only within pools of this many batches, so that an epoch stays shuffled


def tokenize(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, cache_dir: str | None) -> datasets.Dataset:
    """Return the rows with `input_ids` (at most `max_length`, special tokens included), their `length`, and `num_tokens` before truncation.

    The result is kept as an Arrow file whose name is the SHA-256 of texts, tokenizer and length; it is memory-mapped and reused.
    """
    def encode(batch):
        encoded = tokenizer(batch["text"], truncation=True, max_length=max_length, padding=False)
        whole = tokenizer(batch["text"], truncation=False, padding=False, verbose=False)["input_ids"]
        names = [name for name in encoded if name != "attention_mask"]  # the collator makes it
        return {**{name: encoded[name] for name in names}, "length": [len(ids) for ids in encoded["input_ids"]], "num_tokens": [len(ids) for ids in whole]}

    digest = hashlib.sha256(f"{tokenizer_json(tokenizer)} {max_length} {datasets.__version__}".encode())
    for name in rows.column_names:  # labels and row numbers are in the file as well
        for value in rows[name][:]:
            digest.update(f"{value}\0".encode())
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "tokenized"
    folder.mkdir(parents=True, exist_ok=True)
    key = digest.hexdigest()
    return rows.map(encode, batched=True, desc="tokenising", cache_file_name=str(folder / f"{key}.arrow"), new_fingerprint=key[:16])


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all that a tokenizer does as one string; its hash is the tokenizer's fingerprint.

    Truncation and padding are left out: every call sets them anew, so they say what the last call was, not what the tokenizer is.
    """
    if not tokenizer.is_fast:
        return repr((type(tokenizer), sorted(tokenizer.get_vocab().items())))
    return json.dumps({**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None})


def batch_order(lengths, *, batch_size: int, seed: int, epoch: int, buckets: bool) -> list[np.ndarray]:
    """Return one epoch's batches of row numbers: each row once, a pure function of the arguments.

    `lengths` (N): tokens of each row. With `buckets`, rows are shuffled, sorted by length within pools of 50 batches and cut into
    batches, and the batches are shuffled: batches hold texts of similar length, so little is padding, and an epoch is not
    sorted. A short last batch comes last.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    if buckets:
        pool = batch_size * POOL_BATCHES
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        order = np.concatenate([rows[np.argsort(np.asarray(lengths)[rows], kind="stable")] for rows in pools])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if buckets:
        num_full = len(order) // batch_size
        batches = [batches[number] for number in generator.permutation(num_full)] + batches[num_full:]
    return batches


def evaluation_order(lengths, *, batch_size: int) -> list[np.ndarray]:
    """Return batches of row numbers from the longest text to the shortest: least padding, and too little memory shows at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def padding_share(lengths, batches: list[np.ndarray]) -> float:
    """Return the share of all positions in the batches that are padding."""
    lengths = np.asarray(lengths)
    used = sum(lengths[batch].sum() for batch in batches)
    return float(1 - used / sum(lengths[batch].max() * len(batch) for batch in batches))


def share_of_rank(batches: list[np.ndarray], rank: int, world_size: int) -> list[list[int]]:
    """Return this process's part of each global batch: every `world_size`-th row.

    A process whose part of a short batch is empty gets the batch's first row as ~row (a negative number), which `Examples` gives
    out with a label that counts nowhere: under DDP every process must run every step.
    """
    return [batch[rank::world_size].tolist() or [~int(batch[0])] for batch in batches]


class Examples(torch.utils.data.Dataset):
    """The rows of a tokenised data set, with the columns that a model and the loop need."""

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows.remove_columns([name for name in ("text", "length", "num_tokens") if name in rows.column_names])

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, numbers: list[int]) -> list[dict]:
        examples = self.rows.__getitems__([number if number >= 0 else ~number for number in numbers])
        for number, example in zip(numbers, examples):
            if number < 0:
                example["label"] = IGNORED_LABEL
        return examples


def loader(rows: datasets.Dataset, batches: list[list[int]], tokenizer: PreTrainedTokenizerBase, *, pin_memory: bool = False):
    """Return a DataLoader over the given batches: input_ids and attention_mask (B, T) padded to the batch's longest, labels (B), row (B)."""
    return torch.utils.data.DataLoader(
        Examples(rows), batch_sampler=batches, collate_fn=DataCollatorWithPadding(tokenizer), pin_memory=pin_memory)
