"""Turn tokenised texts into padded batches, in order, and into steps that fit into memory.

Which texts share an optimizer step is a pure function of the seed and the epoch. A step is split
into micro-batches that fit into memory. A micro-batch may hold several chunks of one text, whose
logits are averaged (`pool_chunks`).

The shapes of tensors are in letters: B texts, K chunks of them, T tokens of a chunk with padding, C
classes, and N rows of a data set.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import numpy as np
import torch

from common.errors import UserError
from common.runtime import Runtime, is_out_of_memory, used_memory_bytes
from common.training.task import count_targets, task_of_rows
from common.training.tracking import file_size

if TYPE_CHECKING:
    import datasets
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from common.tokenizer import Tokenizer

# texts are sorted by length only within pools of at most 50 batches, and an epoch has at least four
# pools if it has four batches, so that it stays shuffled
MAX_POOL_BATCHES, MIN_POOLS = 50, 4
# peak memory in terms of the activations' size, as the heap does not return all that is freed
# (`keep_large_blocks`); with the bundled model and texts 1.57 were measured
CPU_OVERHEAD = 1.5
# columns of the data, and of a padded batch, that a model does not take
NOT_MODEL_INPUTS = ("text", "text_pair", "label", "row", "chunk_lengths", "num_tokens", "num_read")
NOT_FORWARDED = ("labels", "row", "text_of_chunk")


@dataclass(frozen=True)
class BatchConfig:
    """How the texts of an epoch are grouped; the fields are named as their flags."""

    batch_size: int  # texts per process and forward pass, if each of them has one chunk
    grad_accum: int  # an optimizer step reads batch_size * grad_accum texts per process
    max_chunks: int  # drawn from a text in an epoch; if they are several, a step has more micro-batches
    batching: str
    seed: int
    num_workers: int

    def texts_per_step(self, world_size: int) -> int:
        """Return the number of texts of an optimizer step, over all processes and micro-batches."""
        return self.batch_size * self.grad_accum * world_size


class Pick(NamedTuple):
    """A row of the data and which of its chunks to read."""

    row: int
    chunks: tuple[int, ...]
    is_filler: bool = False  # for a process without a row: its loss is ignored


# The order of the data ----------------------------------------------------------------------------


def plan_epoch(
    rows: datasets.Dataset, config: BatchConfig, *, epoch: int, micro_batch_size: int, runtime: Runtime
) -> list[list[list[Pick]]]:
    """Return the optimizer steps of an epoch for this process: lists of micro-batches of picks.

    A micro-batch has at most `micro_batch_size` chunks. Which texts a step sees depends on the seed, the
    epoch and `config.texts_per_step` only: it makes no difference whether a step is large because
    of its batch size, of accumulation or of the number of processes.
    """
    chunk_lengths = rows["chunk_lengths"][:]  # for each row a list, the tokens of each chunk
    longest = [max(lengths) for lengths in chunk_lengths]
    num_chunks = [len(lengths) for lengths in chunk_lengths]
    chunks_of_row = draw_chunks(num_chunks, most=config.max_chunks, seed=config.seed, epoch=epoch)
    steps = []
    for rows_of_step in step_order(longest, config, epoch=epoch, world_size=runtime.world_size):
        picks = [Pick(row, chunks_of_row[row]) for row in rows_of_step.tolist()]
        share = share_of_rank(picks, runtime.rank, runtime.world_size)
        steps.append(split_picks(share, micro_batch_size))
    return steps


def step_order(
    lengths: Sequence[int] | np.ndarray, config: BatchConfig, *, epoch: int, world_size: int
) -> list[np.ndarray]:
    """Return the row numbers of each optimizer step of an epoch, over all processes.

    `lengths` (N): tokens of the longest chunk of each row.
    """
    return batch_order(
        lengths,
        batch_size=config.texts_per_step(world_size),
        seed=config.seed,
        epoch=epoch,
        buckets=config.batching == "buckets",
    )


def batch_order(
    lengths: Sequence[int] | np.ndarray, *, batch_size: int, seed: int, epoch: int, buckets: bool
) -> list[np.ndarray]:
    """Return one epoch's batches of row numbers: each row once, a pure function of the arguments.

    `lengths` (N): tokens of each row. With `buckets`, rows are shuffled, sorted by length within
    pools and cut into batches, and the batches are shuffled. So a batch holds texts of similar
    length, which leaves little padding; the epoch as a whole is not sorted; and which texts share a
    batch changes from epoch to epoch. A short last batch comes last.
    """
    generator = np.random.default_rng([seed, epoch])
    shuffled = generator.permutation(len(lengths))
    if not buckets:
        return pieces(shuffled, batch_size)

    num_full = len(lengths) // batch_size  # batches that are not short
    pool_batches = max(1, min(MAX_POOL_BATCHES, num_full // MIN_POOLS))
    pools = pieces(shuffled, pool_batches * batch_size)
    lengths = np.asarray(lengths)
    by_length = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
    batches = pieces(np.concatenate(by_length), batch_size)
    full = [batches[number] for number in generator.permutation(num_full)]
    return full + batches[num_full:]


def pieces(numbers: np.ndarray, size: int) -> list[np.ndarray]:
    """Return an array cut into pieces of `size`, of which the last may be shorter."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def draw_chunks(num_chunks: list[int], *, most: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Return which chunks of each row an epoch reads: at most `most` of them, drawn at random.

    The choice is a pure function of the arguments.
    """
    # the 1 makes it another stream of random numbers than that of batch_order
    generator = np.random.default_rng([seed, epoch, 1])
    drawn = [generator.permutation(count)[:most] for count in num_chunks]
    return [tuple(np.sort(chunks).tolist()) for chunks in drawn]


def share_of_rank(picks: list[Pick], rank: int, world_size: int) -> list[Pick]:
    """Return this process's share of a step: every `world_size`-th pick.

    A process whose share of a short step is empty gets the first pick as a filler, whose loss
    counts nowhere: under DDP every process must run every step.
    """
    return picks[rank::world_size] or [picks[0]._replace(is_filler=True)]


def split_picks(picks: list[Pick], most: int) -> list[list[Pick]]:
    """Return the picks as consecutive batches of at most `most` chunks.

    Only a single pick with more chunks than that makes a larger batch.
    """
    batches: list[list[Pick]] = []
    num_chunks = 0  # in the last batch
    for pick in picks:
        if not batches or num_chunks + len(pick.chunks) > most:
            batches.append([])
            num_chunks = 0
        batches[-1].append(pick)
        num_chunks += len(pick.chunks)
    return batches


def evaluation_batches(chunk_lengths: list[list[int]], *, batch_size: int) -> list[list[Pick]]:
    """Return batches of at most `batch_size` chunks, each chunk once, from the longest texts down.

    That order has the least padding and shows at once whether memory is too small. A text with more
    chunks is spread over several batches, because their logits are summed anyway.
    """
    order = np.argsort([-max(lengths) for lengths in chunk_lengths], kind="stable")
    picks = [
        Pick(row, tuple(range(start, min(start + batch_size, len(chunk_lengths[row])))))
        for row in order.tolist()
        for start in range(0, len(chunk_lengths[row]), batch_size)
    ]
    return split_picks(picks, batch_size)


def longest_chunks(rows: datasets.Dataset) -> np.ndarray:
    """Return the length of the longest chunk of each row (N)."""
    return np.array([max(lengths) for lengths in rows["chunk_lengths"][:]])


def padding_share(lengths: list[int] | np.ndarray, batches: list[np.ndarray]) -> float:
    """Return the share of all positions in the batches that are padding."""
    lengths = np.asarray(lengths)
    used = sum(lengths[batch].sum() for batch in batches)
    positions = sum(lengths[batch].max() * len(batch) for batch in batches)
    return float(1 - used / positions)


# Padded batches -----------------------------------------------------------------------------------


class Columns:
    """Rows in memory, read in the ways in which those of a `datasets.Dataset` are read here.

    For a few texts to predict: importing that library takes longer than their prediction.
    """

    def __init__(self, columns: dict[str, list]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> list:
        return self.columns[name]

    def __getitems__(self, numbers: list[int]) -> list[dict]:
        columns = self.columns.items()
        return [{name: values[number] for name, values in columns} for number in numbers]


Rows: TypeAlias = "datasets.Dataset | Columns"
# transformers' own, and those of common/tokenizer.py, which stand for them in predictions
AnyTokenizer: TypeAlias = "PreTrainedTokenizerBase | Tokenizer"
Batch: TypeAlias = "BatchEncoding | dict[str, torch.Tensor]"


def pad_batch(picks: list[Pick], rows: Rows, tokenizer: AnyTokenizer) -> Batch:
    """Return the padded batch of the chunks that are picked.

    A batch holds what the model takes, above all `input_ids` and `attention_mask` (K, T), with one
    row for each chunk. It also holds `labels` (B) or (B, C), the targets of the loss (none for
    texts to predict), `row` (B), the rows' numbers in the source, and `text_of_chunk` (K), which of
    the B texts each chunk belongs to.
    """
    inputs = [name for name in rows.column_names if name not in NOT_MODEL_INPUTS]
    texts = rows.__getitems__([pick.row for pick in picks])
    chunks = [
        {name: text[name][chunk] for name in inputs}
        for text, pick in zip(texts, picks)
        for chunk in pick.chunks
    ]
    batch = tokenizer.pad(chunks, padding=True, return_tensors="pt")  # (K, T)
    if not isinstance(rows, Columns):  # texts to predict have neither labels nor row numbers
        task = task_of_rows(rows)
        targets = [
            task.no_target() if pick.is_filler else task.target(text["label"])
            for text, pick in zip(texts, picks)
        ]
        batch["labels"] = torch.tensor(targets)  # (B), or in single precision (B, C)
        batch["row"] = torch.tensor([text["row"] for text in texts])  # (B)
    num_chunks = torch.tensor([len(pick.chunks) for pick in picks])  # (B)
    batch["text_of_chunk"] = torch.arange(len(picks)).repeat_interleave(num_chunks)  # (K)
    return batch


def make_loader(
    rows: Rows,
    batches: list[list[Pick]],
    tokenizer: AnyTokenizer,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> torch.utils.data.DataLoader:
    """Return a loader of padded batches, in the order of `batches`. It draws no random number."""
    if num_workers:
        # with any value it prevents a warning of tokenizers when the workers start
        # (transformers #5486)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return torch.utils.data.DataLoader(
        cast("torch.utils.data.Dataset", batches),  # a list will do: it has lengths and numbers
        batch_size=None,  # its items are batches already
        collate_fn=functools.partial(pad_batch, rows=rows, tokenizer=tokenizer),
        pin_memory=pin_memory,
        num_workers=num_workers,
        worker_init_fn=_leave_the_process_group,
        # without its own generator, each iterator over it would draw from that of the run
        generator=torch.Generator(),
    )


def model_inputs(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Return what of a batch a model takes, on its device."""
    return {
        name: tensor.to(device, non_blocking=True)
        for name, tensor in batch.items()
        if name not in NOT_FORWARDED
    }


def _leave_the_process_group(_worker: int) -> None:
    # Ctrl-C and torchrun send their signal to a whole process group, but only the process that
    # trains must receive it, and save
    os.setpgid(0, 0)


# What the loss needs ------------------------------------------------------------------------------


def pool_chunks(logits: torch.Tensor, text_of_chunk: torch.Tensor, num_texts: int) -> torch.Tensor:
    """Return the mean of the logits (K, C) of each text's chunks, (B, C).

    `text_of_chunk` (K) tells which of the B texts each chunk belongs to.
    """
    sums = logits.new_zeros(num_texts, logits.shape[1])  # (B, C)
    sums = sums.index_add(0, text_of_chunk, logits)
    # the number of chunks of each text; torch.bincount would wait for a GPU
    ones = torch.ones_like(logits[:, 0])  # (K)
    counts = logits.new_zeros(num_texts).index_add(0, text_of_chunk, ones)  # (B)
    return sums / counts.unsqueeze(1)


def count_examples(
    micro_batches: list[BatchEncoding], class_weights: torch.Tensor | None, runtime: Runtime
) -> tuple[int, float]:
    """Return the number of examples of a step, over all processes, and the divisor of its loss.

    Both are those of `count_targets`. To divide each micro-batch by a divisor of its own would be
    wrong (transformers #34242).
    """
    # the labels are still on the CPU, so nothing waits for a GPU
    targets = torch.cat([batch["labels"] for batch in micro_batches])
    both = torch.tensor(count_targets(targets, class_weights), dtype=torch.float64)
    examples, divisor = runtime.all_reduce_sum(both).tolist()
    return int(examples), divisor


def count_tokens(micro_batches: list[BatchEncoding]) -> int:
    """Return the number of tokens of a step in this process, without padding, while it is still on
    the CPU.
    """
    return sum(int(batch["attention_mask"].sum()) for batch in micro_batches)


def num_tokens(rows: datasets.Dataset, *, max_chunks: int | None = None) -> float:
    """Return the number of tokens of a split, with at most `max_chunks` chunks of each text, drawn
    at random, if given: their expected number.
    """
    total = 0.0
    for lengths in rows["chunk_lengths"][:]:
        share = 1.0 if max_chunks is None else min(1.0, max_chunks / len(lengths))
        total += share * sum(lengths)
    return total


def sync_gradients(model: torch.nn.Module, *, when: bool) -> contextlib.AbstractContextManager:
    """Return a context for forward and backward in which DDP exchanges gradients only if `when`.

    Without DDP there is nothing to exchange, and the context does nothing.
    """
    no_sync = getattr(model, "no_sync", None)  # a method of DDP
    return contextlib.nullcontext() if when or no_sync is None else no_sync()


# Fit into memory, and into DDP --------------------------------------------------------------------


def backward_once(model: torch.nn.Module, batch: Batch, runtime: Runtime) -> None:
    """Run one forward and one backward pass on the sum of a batch's logits, whatever its labels."""
    with runtime.autocast():
        logits = model(**model_inputs(batch, runtime.device)).logits  # (K, C)
    logits.float().sum().backward()


def has_unused_parameters(model: torch.nn.Module, batch: Batch, runtime: Runtime) -> bool:
    """Tell whether a step leaves a parameter without a gradient, such as the pooler of BigBird.

    DDP would wait for it, unless it is told to look for such parameters in every step. Dropout is
    off, because it would draw random numbers.
    """
    model.eval()
    backward_once(model, batch, runtime)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    unused = any(parameter.grad is None for parameter in trainable)
    model.zero_grad()
    return unused


def activation_bytes(
    model: torch.nn.Module, rows: Rows, tokenizer: AnyTokenizer, size: int, runtime: Runtime
) -> int:
    """Return the bytes that a forward pass of `size` of the longest chunks keeps for its backward
    pass, in addition to the weights: what one and two of them keep, extrapolated.

    The passes have dropout, and leave the random state as it was.
    """
    lengths = rows["chunk_lengths"][:]
    row = max(range(len(lengths)), key=lambda number: max(lengths[number]))
    longest = Pick(row, (lengths[row].index(max(lengths[row])),))
    model.train()
    batches = (pad_batch([longest] * number, rows, tokenizer) for number in (1, 2))
    one, two = (_kept_bytes(model, batch, runtime) for batch in batches)
    return one + (size - 1) * (two - one)


def _kept_bytes(model: torch.nn.Module, batch: Batch, runtime: Runtime) -> int:
    tensors = (*model.parameters(), *model.buffers())
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}  # the memory of each saved tensor, once

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = model_inputs(batch, runtime.device)
    gpus = [runtime.device] if runtime.device.type == "cuda" else []
    with (
        torch.random.fork_rng(gpus),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        runtime.autocast(),
    ):
        logits = model(**inputs).logits
    del logits  # until here the graph held all of them, so that no address was used twice
    return sum(kept.values())


def memory_line(
    model: torch.nn.Module, rows: Rows, tokenizer: AnyTokenizer, micro_batch_size: int, runtime: Runtime
) -> str:
    """Return one line on the memory that training will take, and what for."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    activations = activation_bytes(model, rows, tokenizer, micro_batch_size, runtime)
    if runtime.device.type == "cpu":
        activations = round(CPU_OVERHEAD * activations)
    parts = {
        "now": used_memory_bytes(runtime.device),
        "gradients": trained if runtime.world_size == 1 else 2 * trained,  # DDP's buckets
        "AdamW": 2 * trained,
        f"activations of {micro_batch_size} chunks": activations,
    }
    listed = ", ".join(f"{file_size(num_bytes)} {name}" for name, num_bytes in parts.items())
    return f"memory   about {file_size(sum(parts.values()))}: {listed}"


def largest_micro_batch(
    model: torch.nn.Module,
    rows: Rows,
    tokenizer: AnyTokenizer,
    config: BatchConfig,
    *,
    max_length: int,
    runtime: Runtime,
) -> int:
    """Return the largest of the batch size, its half, its quarter, ... that fits into memory.

    It is tried with the longest texts on the bare model, with room held for what the optimizer and
    DDP add. The chunks of one text in a step (`max_chunks`) stay together, so the answer is at
    least that. Every process gets the smallest answer of all. Raises UserError when not even one
    text fits.
    """
    size, least = config.batch_size, config.max_chunks
    while size and not _fits(model, longest_batch(rows, tokenizer, size, least), runtime):
        size = max(size // 2, least) if size > least else 0
    size = -runtime.all_reduce_max(-size)
    if size == 0:
        text = f"one text of {max_length} tokens"
        if least > 1:
            text = f"one text of {least} chunks of {max_length} tokens (--max-chunks)"
        raise UserError(
            f"--auto-batch-size: not even {text} fits into memory; lower --max-length or add"
            " --gradient-checkpointing"
        )
    if size < config.batch_size:
        runtime.say(
            f"memory   {config.batch_size} chunks at once do not fit: {size} at a time, accumulated"
            " to the same step"
        )
    return size


def longest_batch(rows: Rows, tokenizer: AnyTokenizer, size: int, max_chunks: int) -> Batch:
    """Return a batch of `size` chunks of the longest texts, as many as a batch of `split_picks` can
    have, or more.
    """
    lengths = [lengths[:max_chunks] for lengths in rows["chunk_lengths"][:]]
    return pad_batch(evaluation_batches(lengths, batch_size=size)[0], rows, tokenizer)


def _fits(model: torch.nn.Module, batch: Batch, runtime: Runtime) -> bool:
    """Tell whether a batch goes forward and backward at once."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    room: list[torch.Tensor] = []
    try:
        # AdamW's two averages, and DDP's buckets
        copies = 2 if runtime.world_size == 1 else 3
        room = [torch.empty_like(parameter) for parameter in trainable for _ in range(copies)]
        model.train()
        # the second pass of an accumulated step needs more than the first: gradients exist by then
        for _ in range(2):
            backward_once(model, batch, runtime)
        runtime.synchronize()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        room.clear()  # freed before the next try
        model.zero_grad()
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
