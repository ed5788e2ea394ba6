"""A model over a split: logits in the rows' order, on any number of processes; its scores, and which epoch's are the best."""

import math
from collections.abc import Iterator

import datasets
import torch

from common.metrics import classification_scores
from common.runtime import Runtime
from common.tracking import progress
from common.training import batching

PREDICT_BLOCK = 2048  # texts held at a time: enough to sort by length, little memory, early first answers


@torch.inference_mode()
def predict_logits(model, rows: datasets.Dataset, tokenizer, machine: Runtime, *, batch_size: int) -> torch.Tensor:
    """Return the logits (N, C), fp32 on the CPU, of tokenised rows in their order.

    Batches go from long to short. Each process takes every `world_size`-th row of a batch, none twice and without padding rows
    (a padded DistributedSampler counts some twice, pytorch #25162), and the processes' parts are added up. `model` is the bare one, not DDP's.
    """
    model.eval()
    batches = batching.evaluation_order(rows["length"][:], batch_size=batch_size)
    shares = [share for batch in batches if (share := batch[machine.rank :: machine.world_size].tolist())]
    logits = torch.zeros(len(rows), model.config.num_labels, device=machine.device)
    seen = torch.zeros(len(rows), dtype=torch.int64, device=machine.device)
    batch_loader = batching.loader(rows, shares, tokenizer, pin_memory=machine.device.type == "cuda")
    for share, batch in zip(shares, progress(batch_loader, label="evaluating", shown=machine.is_main)):
        batch = batch.to(machine.device, non_blocking=True)
        del batch["labels"], batch["row"]
        with machine.autocast():
            logits[share] = model(**batch).logits.float()
        seen[share] += 1
    logits, seen = machine.all_reduce_sum(logits), machine.all_reduce_sum(seen)
    assert bool((seen == 1).all()), "each row must be scored exactly once"
    return logits.cpu()


def score(model, rows: datasets.Dataset, tokenizer, machine: Runtime, *, batch_size: int) -> tuple[dict, torch.Tensor]:
    """Return a model's classification scores on a tokenised split, and its logits (N, C)."""
    logits = predict_logits(model, rows, tokenizer, machine, batch_size=batch_size)
    return classification_scores(logits, torch.tensor(rows["label"][:])), logits


def is_better(epoch: dict, best: dict | None, metric: str) -> bool:
    """Tell whether an epoch's scores beat the best so far; on a tie the earlier epoch stays, and a NaN never wins."""
    sign = -1 if metric == "loss" else 1
    return not math.isnan(epoch[metric]) and (best is None or sign * epoch[metric] > sign * best[metric])


@torch.inference_mode()
def predict_texts(model, tokenizer, texts: list[str], machine: Runtime, *, max_length: int, batch_size: int) -> Iterator[dict]:
    """Yield, in the order of the texts, a dict with `row` (from 1), `label`, `confidence` and `scores` (class name -> probability)."""
    model.eval()
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    for start in range(0, len(texts), PREDICT_BLOCK):
        encoded = tokenizer(texts[start : start + PREDICT_BLOCK], truncation=True, max_length=max_length, padding=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        scores = torch.empty(len(lengths), len(names))
        for numbers in batching.evaluation_order(lengths, batch_size=batch_size):
            rows = {name: [values[number] for number in numbers] for name, values in encoded.items()}
            batch = tokenizer.pad(rows, return_tensors="pt").to(machine.device)
            with machine.autocast():
                logits = model(**batch).logits
            scores[numbers] = logits.float().softmax(-1).cpu()
        for row, values in enumerate(scores.tolist(), start=start + 1):
            best = max(range(len(names)), key=values.__getitem__)
            rounded = [round(value, 6) for value in values]
            yield {"row": row, "label": names[best], "confidence": rounded[best], "scores": dict(zip(names, rounded))}
