"""How large a batch goes forward and backward in the memory that there is; and what is said when
one does not.
"""

import contextlib
import gc

import datasets
import torch

from common.errors import UserError
from common.runtime import Runtime
from common.training import batching

# of PyTorch's allocators for CPU, CUDA and MPS
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def is_too_little(error: BaseException) -> bool:
    """Tell whether an exception is that of an allocator which has no more."""
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or isinstance(error, RuntimeError)
        and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def way_out(args) -> str:
    """Return what to do when a training step takes too much memory."""
    other = (
        "" if args.auto_batch_size else ", or let --auto-batch-size halve it and keep the steps as they are"
    )
    return (
        f"--batch-size {args.batch_size}: a batch of {args.max_length} tokens does not fit into memory; lower"
        f" it or --max-length{other}"
    )


@contextlib.contextmanager
def explained(message: str):
    """Within, too little memory is a UserError of this message."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_too_little(error):
            raise
        raise UserError(message) from error


def largest_batch(model, rows: datasets.Dataset, tokenizer, args, runtime: Runtime) -> int:
    """Return the largest of `args.batch_size`, its half, its quarter, ... windows for which a step
    of the longest texts fits into memory.

    The windows of one text in a step, `args.max_windows`, stay together, so it is at least that.
    It is tried on the bare model, with room held for what the optimizer and DDP add. Every process
    gets the smallest of their answers. Raises UserError when not even one text fits.
    """
    size = args.batch_size
    while size and not _fits(model, rows, tokenizer, size, args, runtime):
        size = max(size // 2, args.max_windows) if size > args.max_windows else 0
    size = -runtime.all_reduce_max(-size)
    if size == 0:
        what = (
            f"one text of {args.max_length} tokens"
            if args.max_windows == 1
            else f"one text of {args.max_windows} windows of {args.max_length} tokens (--max-windows)"
        )
        raise UserError(
            f"--auto-batch-size: not even {what} fits into memory; lower --max-length or add"
            " --gradient-checkpointing"
        )
    if size < args.batch_size:
        runtime.say(
            f"memory   {args.batch_size} windows at once don't fit: {size} at a time, accumulated to the same"
            " step"
        )
    return size


def _fits(model, rows, tokenizer, size: int, args, runtime: Runtime) -> bool:
    # windows of the longest texts, as many as a batch can have: at least what any batch of
    # `cut_by_windows`
    # takes
    picks = [
        pick
        for batch in batching.evaluation_batches(
            [lengths[: args.max_windows] for lengths in rows["window_lengths"][:]], batch_size=size
        )[:1]
        for pick in batch
    ]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        # AdamW's averages, DDP's buckets
        room = [
            torch.empty_like(parameter) for parameter in learning for _ in range(2 + (runtime.world_size > 1))
        ]
        (batch,) = batching.loader(rows, [picks], tokenizer)
        del batch["labels"], batch["row"], batch["document"]
        model.train()
        # the second pass of an accumulated step needs more than the first: the gradients are there
        # already
        for _ in range(2):
            with runtime.autocast():
                logits = model(**batch.to(runtime.device)).logits
            logits.float().sum().backward()
        runtime.synchronize()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_too_little(error):
            raise
        return False
    finally:
        room = logits = batch = None  # noqa: F841  (freed before the next try)
        model.zero_grad()
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
