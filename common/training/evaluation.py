"""Score a model on a split, and let it predict: logits in the order of the rows, on any number of
processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.bert import BertClassifier
from common.runtime import Runtime, explain_out_of_memory
from common.training import batching
from common.training.checkpoint import StopSignals
from common.training.classifier import AnyModel, task_of_model
from common.training.run import LOWER_IS_BETTER, MULTI, REGRESSION
from common.training.task import EXACT, Scoring, Task, task_of_rows
from common.training.tokenization import TokenConfig, encode
from common.training.tracking import progress

if TYPE_CHECKING:
    import datasets

# texts held at a time: enough to sort by length, with little memory and early first answers
PREDICT_BLOCK = 2048


@dataclass(frozen=True)
class TextClassifier:
    """A model with its tokenizer, how it reads texts, and how its logits are scored."""

    model: AnyModel
    tokenizer: batching.AnyTokenizer
    tokens: TokenConfig
    batch_size: int  # the most chunks at a time
    scoring: Scoring = Scoring()  # noqa: RUF009  (frozen)
    temperature: float = 1.0  # by which logits are divided


def evaluate(
    classifier: TextClassifier,
    rows: datasets.Dataset,
    runtime: Runtime,
    *,
    signals: StopSignals | None = None,
) -> tuple[dict, torch.Tensor]:
    """Return the scores of a model on a tokenised split, which are those of `compute_scores`, and
    its logits (N, C). Raises what `predict_logits` raises.
    """
    # with the libraries of metrics, which take a second to import and no prediction needs
    from common.training.metrics import compute_scores

    logits = predict_logits(classifier, rows, runtime, signals=signals)
    task = task_of_rows(rows)
    return compute_scores(task, logits, task.targets(rows["label"][:]), classifier.scoring), logits


@torch.inference_mode()
def predict_logits(
    classifier: TextClassifier, rows: batching.Rows, runtime: Runtime, *, signals: StopSignals | None = None
) -> torch.Tensor:
    """Return the logits (N, C), fp32 on the CPU, of tokenised rows: the mean over a row's chunks,
    divided by the temperature.

    Batches of at most `batch_size` chunks go from long to short. Each process takes every
    `world_size`-th batch, none twice and without padding rows (a padded DistributedSampler counts
    some twice, pytorch #25162), and the parts of all processes are added up. The model is the bare
    one, without DDP. Before each batch all processes check `signals`. Raises Interrupted when one
    of them was asked to stop, and UserError when a batch does not fit into memory.
    """
    model, batch_size = classifier.model, classifier.batch_size
    model.eval()
    lengths = rows["chunk_lengths"][:]
    all_batches = batching.evaluation_batches(lengths, batch_size=batch_size)
    batches = all_batches[runtime.rank :: runtime.world_size]
    sums = torch.zeros(len(rows), num_outputs(model), device=runtime.device)  # (N, C)
    counts = torch.zeros(len(rows), dtype=torch.int64, device=runtime.device)  # (N), chunks scored
    pin_memory = runtime.device.type == "cuda"
    loader = batching.make_loader(rows, batches, classifier.tokenizer, pin_memory=pin_memory)
    advice = f"--eval-batch-size {batch_size}: a batch does not fit into memory; use less"
    with explain_out_of_memory(advice):
        bar = progress(loader, label="evaluating", shown=runtime.is_main)
        for picks, batch in zip(batches, bar):
            if signals is not None:
                signals.check()
            row_of_chunk, logits = _logits_of_chunks(model, batch, picks, runtime)  # (K), (K, C)
            sums.index_add_(0, row_of_chunk, logits)
            counts.index_add_(0, row_of_chunk, torch.ones_like(row_of_chunk))
    most_batches = math.ceil(len(all_batches) / runtime.world_size)
    if signals is not None and len(batches) < most_batches:
        signals.check()  # another process has one batch more, and every process must check as often
    sums, counts = runtime.all_reduce_sum(sums), runtime.all_reduce_sum(counts)
    assert counts.tolist() == list(map(len, lengths)), "each chunk must be scored exactly once"
    return (sums / counts.unsqueeze(1)).cpu() / classifier.temperature


def num_outputs(model: AnyModel) -> int:
    """Return how many classes, labels or numbers a model answers with."""
    if isinstance(model, BertClassifier):  # our own, not transformers'
        return model.classifier.out_features
    return model.config.num_labels or 0


def _logits_of_chunks(
    model: AnyModel, batch: dict[str, torch.Tensor], picks: list[batching.Pick], runtime: Runtime
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row that each chunk of a batch belongs to (K), and its logits (K, C) in fp32."""
    numbers = torch.tensor([pick.row for pick in picks])  # (B)
    row_of_chunk = numbers[batch["text_of_chunk"]].to(runtime.device)  # (K)
    with runtime.autocast():
        logits = model(**batching.model_inputs(batch, runtime.device)).logits
    return row_of_chunk, logits.float()


def is_better(scores: dict, best: dict | None, metric: str) -> bool:
    """Tell whether an evaluation beats the best one so far: not on a tie, and never with a NaN. One
    whose score is undefined, and left out, is better than none and worse than any other.
    """
    if metric not in scores:
        return best is None
    if math.isnan(scores[metric]):
        return False
    if best is None or metric not in best:
        return True
    return scores[metric] < best[metric] if metric in LOWER_IS_BETTER else scores[metric] > best[metric]


def predict_texts(
    classifier: TextClassifier,
    texts: list[str] | list[tuple[str, str]],
    rows: Sequence[int],
    runtime: Runtime,
) -> Iterator[dict]:
    """Yield an answer for each text, or pair of texts, in order: a dict with its `row`, which is
    one of `rows` (N), and what `answer` says.
    """
    tokens, task = classifier.tokens, task_of_model(classifier.model)
    for start in range(0, len(texts), PREDICT_BLOCK):
        block = texts[start : start + PREDICT_BLOCK]
        firsts, pairs = (block, None) if isinstance(block[0], str) else map(list, zip(*block))
        columns = encode(
            firsts,
            classifier.tokenizer,
            max_length=tokens.eval_max_length,
            truncation=tokens.truncation,
            pairs=pairs,
            hides_special=tokens.hides_special,
        )
        logits = predict_logits(classifier, batching.Columns(columns), runtime)
        scores = task.scores(logits).tolist()
        for row, own in zip(rows[start : start + PREDICT_BLOCK], scores, strict=True):
            yield {"row": row, **answer(task, own, classifier.scoring)}


def answer(task: Task, scores: list[float], scoring: Scoring) -> dict:
    """Return what the scores (C) of a text say: `scores` by name, and before it the best `label`
    with its `confidence`, those `labels` whose probability reaches its threshold, or the only number
    as `prediction`.
    """
    written = dict(zip(task.names, (float(format(score, EXACT)) for score in scores)))
    if task.kind == REGRESSION:
        only = {"prediction": written[task.names[0]]} if len(scores) == 1 else {}
        return {**only, "scores": written}
    if task.kind == MULTI:
        assert scoring.threshold != "auto"
        limits = np.broadcast_to(scoring.threshold, len(scores)).tolist()
        chosen = [name for name, score, limit in zip(task.names, scores, limits) if score >= limit]
        return {"labels": chosen, "scores": written}
    best = task.names[max(range(len(scores)), key=scores.__getitem__)]
    return {"label": best, "confidence": written[best], "scores": written}
