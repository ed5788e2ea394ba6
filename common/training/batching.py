"""Texts -> batches: tokenise once, a deterministic order of the texts and their windows, collation
by DataCollatorWithPadding.
"""

import hashlib
import json
import os
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerBase

from common.runtime import Runtime
from common.training import windows

IGNORED_LABEL = -100  # cross_entropy's default ignore_index
# texts are sorted by length only within pools of at most 50 batches and a quarter of the epoch, so
# that it
# stays shuffled
POOL_BATCHES, POOLS = 50, 4
MODEL_INPUTS_NOT = ("text", "label", "row", "window_lengths", "num_tokens", "num_read")

# a row of the data and which of its windows; a negative number is ~row, a filler that counts
# nowhere
Pick = tuple[int, tuple[int, ...]]


def tokenize(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: str,
    cache_dir: str | None,
) -> datasets.Dataset:
    """Return the rows with the columns of `windows.encode`.

    The result is kept as an Arrow file, memory-mapped and reused, under the SHA-256 of texts,
    labels and their classes, tokenizer, length and truncation, which is its fingerprint as well.
    The file's name has the version of `datasets` beside it, for what it wrote may be read by no
    other.
    """
    digest = hashlib.sha256(
        f"{tokenizer_json(tokenizer)} {max_length} {truncation} "
        f"{windows.HEAD_SHARE} {windows.OVERLAP}".encode()
    )
    # the values of a label are numbers: its classes are what they mean
    for feature in rows.features.values():
        digest.update(f"{getattr(feature, 'names', None)}\0".encode())
    for name in rows.column_names:  # labels and row numbers are in the file as well
        for value in rows[name][:]:
            digest.update(f"{value}\0".encode())
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "tokenized"
    folder.mkdir(parents=True, exist_ok=True)
    key = digest.hexdigest()
    return rows.map(
        lambda batch: windows.encode(batch["text"], tokenizer, max_length=max_length, truncation=truncation),
        batched=True,
        desc="tokenising",
        cache_file_name=str(folder / f"{key}-{datasets.__version__}.arrow"),
        new_fingerprint=key[:16],
    )


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all that a tokenizer does as one string; its hash is the tokenizer's fingerprint.

    Truncation and padding are left out: every call sets them anew, so they say what the last call
    was, not what the tokenizer is.
    """
    if not tokenizer.is_fast:
        return repr((type(tokenizer), sorted(tokenizer.get_vocab().items())))
    return json.dumps(
        {**json.loads(tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
    )


def longest_windows(rows: datasets.Dataset) -> np.ndarray:
    """Return the length of the longest window of each row (N)."""
    return np.array([max(lengths) for lengths in rows["window_lengths"][:]])


def batch_order(lengths, *, batch_size: int, seed: int, epoch: int, buckets: bool) -> list[np.ndarray]:
    """Return one epoch's batches of row numbers: each row once, a pure function of the arguments.

    `lengths` (N): tokens of each row. With `buckets`, rows are shuffled, sorted by length within
    pools and cut into batches, and the batches are shuffled: batches hold texts of similar length,
    so little is padding, an epoch is not sorted, and which texts share a batch changes from epoch
    to epoch. A short last batch comes last.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    if buckets:
        pool = batch_size * max(1, min(POOL_BATCHES, len(lengths) // batch_size // POOLS))
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        order = np.concatenate([rows[np.argsort(np.asarray(lengths)[rows], kind="stable")] for rows in pools])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if buckets:
        num_full = len(order) // batch_size
        batches = [batches[number] for number in generator.permutation(num_full)] + batches[num_full:]
    return batches


def draw_windows(num_windows, *, most: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Return for each row which of its windows an epoch reads: all, or `most` of them drawn at
    random; a pure function of the arguments.
    """
    generator = np.random.default_rng([seed, epoch, 1])  # 1: another stream than the order's
    return [tuple(sorted(generator.permutation(count)[:most].tolist())) for count in num_windows]


def padding_share(lengths, batches: list[np.ndarray]) -> float:
    """Return the share of all positions in the batches that are padding."""
    lengths = np.asarray(lengths)
    used = sum(lengths[batch].sum() for batch in batches)
    return float(1 - used / sum(lengths[batch].max() * len(batch) for batch in batches))


def share_of_rank(batch: np.ndarray, rank: int, world_size: int) -> list[int]:
    """Return this process's part of a global batch: every `world_size`-th row.

    A process whose part of a short batch is empty gets the batch's first row as ~row (a negative
    number), which `Examples` gives out with a label that counts nowhere: under DDP every process
    must run every step.
    """
    return batch[rank::world_size].tolist() or [~int(batch[0])]


def cut_by_windows(picks: list[Pick], most: int) -> list[list[Pick]]:
    """Return the picks as consecutive batches of at most `most` windows; only a single pick may
    have more.
    """
    batches, count = [], most
    for pick in picks:
        count += len(pick[1])
        if count > most:
            batches.append([])
            count = len(pick[1])
        batches[-1].append(pick)
    return batches


def evaluation_batches(window_lengths: list[list[int]], *, batch_size: int) -> list[list[Pick]]:
    """Return batches of at most `batch_size` windows, each window once, from the longest texts to
    the shortest.

    That is the least padding, and too little memory shows at once. A text of more windows is
    parted: their logits are summed anyway.
    """
    order = np.argsort([-max(lengths) for lengths in window_lengths], kind="stable")
    picks = [
        (int(row), tuple(range(start, min(start + batch_size, len(window_lengths[row])))))
        for row in order
        for start in range(0, len(window_lengths[row]), batch_size)
    ]
    return cut_by_windows(picks, batch_size)


class Examples(torch.utils.data.Dataset):
    """The rows of a tokenised data set: a pick of a row and windows of it -> the windows' tokens,
    the row's label and number.
    """

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows
        self.inputs = [name for name in rows.column_names if name not in MODEL_INPUTS_NOT]

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, picks: list[Pick]) -> list[dict]:
        examples = self.rows.__getitems__([row if row >= 0 else ~row for row, _ in picks])
        return [
            {
                "windows": [{name: example[name][window] for name in self.inputs} for window in chosen],
                "label": example.get("label", IGNORED_LABEL) if row >= 0 else IGNORED_LABEL,
                "row": example.get("row", row),
            }
            for example, (row, chosen) in zip(examples, picks)
        ]


class Collator:
    """Makes of examples what a model takes, and beside it what the loop needs: labels (B), row (B)
    and document (W), the text of each window.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, examples: list[dict]) -> BatchEncoding:
        # input_ids, attention_mask (W, T)
        batch = self.pad([window for example in examples for window in example["windows"]])
        batch["labels"] = torch.tensor([example["label"] for example in examples])
        batch["row"] = torch.tensor([example["row"] for example in examples])
        batch["document"] = torch.repeat_interleave(
            torch.arange(len(examples)), torch.tensor([len(example["windows"]) for example in examples])
        )
        return batch


def loader(
    rows: datasets.Dataset,
    batches: list[list[Pick]],
    tokenizer,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
):
    """Return a DataLoader over the given batches of picks. It draws no random number of torch's:
    making one changes no run.
    """
    if num_workers:
        # set at all, it keeps tokenizers from a warning at the fork (transformers #5486)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return torch.utils.data.DataLoader(
        Examples(rows),
        batch_sampler=batches,
        collate_fn=Collator(tokenizer),
        pin_memory=pin_memory,
        num_workers=num_workers,
        worker_init_fn=_leave_the_group,
        generator=torch.Generator(),
    )


def _leave_the_group(_worker: int):
    # Ctrl-C and torchrun signal a whole group of processes: only the one that is in charge is to
    # hear it, and
    # to save
    os.setpgid(0, 0)


def pool_windows(logits: torch.Tensor, document: torch.Tensor, num_documents: int) -> torch.Tensor:
    """Return the mean of the logits (W, C) of each document's windows, (B, C); `document` (W)
    tells whose each window is.
    """
    sums = logits.new_zeros(num_documents, logits.shape[1]).index_add(0, document, logits)
    # bincount would wait for a GPU
    counts = logits.new_zeros(num_documents).index_add(0, document, torch.ones_like(logits[:, 0]))
    return sums / counts.unsqueeze(1)


def plan_epoch(
    rows: datasets.Dataset, epoch: int, micro_batch: int, args, runtime: Runtime
) -> list[list[list[Pick]]]:
    """Return this process's batches of an epoch: a list of optimizer steps, each a list of batches
    of at most `micro_batch` windows.

    Which texts a step sees is a pure function of seed, epoch and the step's size
    (`args.batch_size` times accumulation times processes): it does not matter which of the three
    makes it up.
    """
    lengths = rows["window_lengths"][:]
    order = batch_order(
        [max(windows) for windows in lengths],
        batch_size=step_size(args, runtime),
        seed=args.seed,
        epoch=epoch,
        buckets=args.batching == "buckets",
    )
    drawn = draw_windows(
        [len(windows) for windows in lengths], most=args.max_windows, seed=args.seed, epoch=epoch
    )
    shares = [share_of_rank(step, runtime.rank, runtime.world_size) for step in order]
    return [
        cut_by_windows([(row, drawn[row if row >= 0 else ~row]) for row in share], micro_batch)
        for share in shares
    ]


def step_size(args, runtime: Runtime) -> int:
    """Return the number of texts of an optimizer step: of all processes and all batches that are
    accumulated for it.
    """
    return args.batch_size * args.grad_accum * runtime.world_size
