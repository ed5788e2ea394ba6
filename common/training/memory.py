"""How large a batch goes forward and backward in the memory that there is."""

import gc

import datasets
import torch

from common.errors import UserError
from common.runtime import Runtime
from common.training import batching

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # of PyTorch's allocators for CPU, CUDA and MPS


def largest_batch(model, rows: datasets.Dataset, tokenizer, args, machine: Runtime) -> int:
    """Return the largest of `args.batch_size`, its half, its quarter, ... windows for which a step of the longest texts fits into memory.

    It is tried on the bare model, with room held for what the optimizer and DDP add. Every process gets the smallest of their answers.
    Raises UserError when not even one window fits.
    """
    size = args.batch_size
    while size and not _fits(model, rows, tokenizer, size, args, machine):
        size //= 2
    size = -machine.agree_on_highest(-size)
    if size == 0:
        raise UserError(f"--auto-batch-size: not even one text of {args.max_length} tokens fits into memory; lower --max-length or add --gradient-checkpointing")
    if size < args.batch_size:
        machine.say(f"memory   {args.batch_size} windows at once don't fit: {size} at a time, accumulated to the same step")
    return size


def _fits(model, rows, tokenizer, size: int, args, machine: Runtime) -> bool:
    picks = [pick for batch in batching.evaluation_batches([lengths[: args.max_windows] for lengths in rows["window_lengths"][:]], batch_size=size)[:1] for pick in batch]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        room = [torch.empty_like(parameter) for parameter in learning for _ in range(2 + (machine.world_size > 1))]  # AdamW's averages, DDP's buckets
        (batch,) = batching.loader(rows, [picks], tokenizer)
        del batch["labels"], batch["row"], batch["document"]
        model.train()
        for _ in range(2):  # the second pass of an accumulated step needs more than the first: the gradients are there already
            with machine.autocast():
                logits = model(**batch.to(machine.device)).logits
            logits.float().sum().backward()
        machine.synchronize()
        return True
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return False
    finally:
        room = logits = batch = None  # noqa: F841  (freed before the next try)
        model.zero_grad()
        gc.collect()
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
