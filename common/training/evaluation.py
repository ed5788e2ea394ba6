"""A model over a split: logits in the rows' order, on any number of processes; its scores, and
which evaluation's are the best.
"""

import math
from collections.abc import Callable, Iterator

import datasets
import torch

from common.metrics import classification_scores
from common.runtime import Runtime
from common.training import batching, memory, windows
from common.training.tracking import progress

# texts held at a time: enough to sort by length, little memory, early first answers
PREDICT_BLOCK = 2048


@torch.inference_mode()
def predict_logits(
    model,
    rows: datasets.Dataset,
    tokenizer,
    runtime: Runtime,
    *,
    batch_size: int,
    between: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Return the logits (N, C), fp32 on the CPU, of tokenised rows in their order: the mean over a
    row's windows.

    Batches of at most `batch_size` windows go from long to short. Each process takes every
    `world_size`-th batch, none twice and without padding rows (a padded DistributedSampler counts
    some twice, pytorch #25162), and the processes' parts are added up. `model` is the bare one,
    not DDP's. `between` is called before each batch, as often on each process. Raises UserError
    when a batch does not fit into memory.
    """
    model.eval()
    lengths = rows["window_lengths"][:]
    all_batches = batching.evaluation_batches(lengths, batch_size=batch_size)
    batches = all_batches[runtime.rank :: runtime.world_size]
    sums = torch.zeros(len(rows), model.config.num_labels, device=runtime.device)
    seen = torch.zeros(len(rows), dtype=torch.int64, device=runtime.device)
    batch_loader = batching.loader(rows, batches, tokenizer, pin_memory=runtime.device.type == "cuda")
    with memory.explained(f"--eval-batch-size {batch_size}: a batch does not fit into memory; use less"):
        for picks, batch in zip(batches, progress(batch_loader, label="evaluating", shown=runtime.is_main)):
            between()
            batch = batch.to(runtime.device, non_blocking=True)
            # (W)
            row_of_window = torch.tensor([row for row, _ in picks], device=runtime.device)[
                batch.pop("document")
            ]
            del batch["labels"], batch["row"]
            with runtime.autocast():
                logits = model(**batch).logits  # (W, C)
            sums.index_add_(0, row_of_window, logits.float())
            seen.index_add_(0, row_of_window, torch.ones_like(row_of_window))
    # another process has one batch more
    for _ in range(-(-len(all_batches) // runtime.world_size) - len(batches)):
        between()
    sums, seen = runtime.all_reduce_sum(sums), runtime.all_reduce_sum(seen)
    assert seen.tolist() == list(map(len, lengths)), "each window must be scored exactly once"
    return (sums / seen.unsqueeze(1)).cpu()


def score(model, rows: datasets.Dataset, tokenizer, runtime: Runtime, **options) -> tuple[dict, torch.Tensor]:
    """Return a model's classification scores on a tokenised split, and its logits (N, C); the
    options are those of `predict_logits`.
    """
    logits = predict_logits(model, rows, tokenizer, runtime, **options)
    return classification_scores(logits, torch.tensor(rows["label"][:])), logits


def is_better(evaluation: dict, best: dict | None, metric: str) -> bool:
    """Tell whether an evaluation's scores beat the best so far; on a tie the earlier one stays,
    and a NaN never wins.
    """
    sign = -1 if metric == "loss" else 1
    return not math.isnan(evaluation[metric]) and (
        best is None or sign * evaluation[metric] > sign * best[metric]
    )


def predict_texts(
    model, tokenizer, texts: list[str], runtime: Runtime, *, batch_size: int, max_length: int, truncation: str
) -> Iterator[dict]:
    """Yield, in the order of the texts, a dict with `row` (from 1), `label`, `confidence` and
    `scores` (class name -> probability).
    """
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    for start in range(0, len(texts), PREDICT_BLOCK):
        columns = windows.encode(
            texts[start : start + PREDICT_BLOCK], tokenizer, max_length=max_length, truncation=truncation
        )
        logits = predict_logits(
            model, datasets.Dataset.from_dict(columns), tokenizer, runtime, batch_size=batch_size
        )
        for row, values in enumerate(logits.softmax(-1).tolist(), start=start + 1):
            best = max(range(len(names)), key=values.__getitem__)
            rounded = [round(value, 6) for value in values]
            yield {
                "row": row,
                "label": names[best],
                "confidence": rounded[best],
                "scores": dict(zip(names, rounded)),
            }
