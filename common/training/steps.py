"""What a training step changes, and what stands behind the one-line calls of the loop: decay
groups, accumulation windows, the loss meter.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.runtime import Runtime
from common.training.batching import IGNORED_LABEL


@dataclass
class Training:
    """What a step changes: the model and everything that goes with it, and how far it has come."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    parallel: torch.nn.Module  # the model itself, or DDP or a compiled module around it
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    class_weights: torch.Tensor | None = None  # (C), on the CPU, where the examples are counted
    micro_batch: int = 0  # windows in a backward pass
    epoch: int = 1
    step_of_epoch: int = 0
    steps_of_epoch: int = 0
    step: int = 0
    history: list[dict] = field(default_factory=list)  # an entry for each evaluation
    best: dict | None = None

    def __post_init__(self):
        self.loss_weights = None if self.class_weights is None else self.class_weights.to(self.model.device)

    def position(self) -> dict:
        """Return how far it has come, for a checkpoint."""
        return {
            name: getattr(self, name)
            for name in ("micro_batch", "epoch", "step_of_epoch", "step", "history", "best")
        }

    def restore_position(self, position: dict):
        """Go to where `position` was taken."""
        for name, value in position.items():
            setattr(self, name, value)


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Return AdamW's parameter groups: matrices decay, biases and norm weights (one dimension)
    don't. Frozen ones are left out.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def balanced_weights(labels: list[int], num_classes: int) -> torch.Tensor:
    """Return a weight for each class (C), fp32, as scikit-learn's "balanced": the fewer its rows,
    the higher; 0 for a class without rows.
    """
    present = np.unique(labels)
    weights = torch.zeros(num_classes)
    weights[torch.from_numpy(present)] = torch.from_numpy(
        compute_class_weight("balanced", classes=present, y=labels)
    ).float()
    return weights


def accumulation_windows(batches: Iterable, sizes: list[int]) -> Iterator[list]:
    """Yield the batches in lists of the given sizes: one list is one optimizer step."""
    batches = iter(batches)
    for size in sizes:
        yield list(itertools.islice(batches, size))


def mark_last(window: list) -> Iterator[tuple[bool, object]]:
    """Yield each batch with whether it is the window's last: the one after which gradients are
    exchanged.
    """
    for number, batch in enumerate(window, start=1):
        yield number == len(window), batch


def sync_gradients(model: torch.nn.Module, *, when: bool):
    """Return a context in which DDP exchanges gradients only `when` asked; it must hold forward
    and backward. A plain model has none.
    """
    return model.no_sync() if hasattr(model, "no_sync") and not when else contextlib.nullcontext()


def count_examples(window: list, class_weights: torch.Tensor | None, runtime: Runtime) -> tuple[int, float]:
    """Return the number of examples of a window over all processes and the divisor of its summed
    loss (transformers #34242).

    The divisor is the number itself, or the sum of the weights of the examples' classes.
    """
    # still on the CPU: no sync with a GPU
    labels = torch.cat([batch["labels"] for batch in window])
    labels = labels[labels != IGNORED_LABEL]
    weight = (
        float(len(labels)) if class_weights is None else class_weights[labels].sum(dtype=torch.float64).item()
    )
    examples, weight = runtime.all_reduce_sum(
        torch.tensor([len(labels), weight], dtype=torch.float64)
    ).tolist()
    return int(examples), weight


class LossMeter:
    """The losses of one epoch; it reads them from the device, shows and logs them only every
    `log_every` steps and at the end.
    """

    def __init__(self, runtime: Runtime, run, bar, log_every: int):
        self.runtime, self.run, self.bar, self.log_every = runtime, run, bar, log_every
        # (summed loss, row numbers) of each batch since the last report
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        # (norm of the gradient, step) of each step since then
        self.norms: list[tuple[torch.Tensor, int]] = []
        self.sums = dict.fromkeys(("loss", "weight", "examples", "seconds"), 0.0)
        self.waiting_sums = dict.fromkeys(("weight", "examples", "seconds"), 0.0)
        self.started = time.perf_counter()

    def add(self, summed_loss: torch.Tensor, rows: torch.Tensor):
        """Take the summed loss of one batch and the row numbers of its texts."""
        self.waiting.append((summed_loss.detach(), rows))

    def end_step(self, training, examples: int, weight: float, grad_norm: torch.Tensor):
        """Take the examples of the step that just ended and the divisor of its loss; report if a
        report is due.
        """
        self.waiting_sums["examples"] += examples
        self.waiting_sums["weight"] += weight
        self.norms.append((grad_norm, training.step))
        self.scaler = training.scaler
        if training.step % self.log_every == 0:
            values = self._read()
            values = {
                "train/loss": values["loss"],
                "train/examples_per_second": values["examples_per_second"],
                "train/learning_rate": training.scheduler.get_last_lr()[0],
                "train/grad_norm": grad_norm.item(),
            }
            # a step that the loss scaler has skipped
            if not math.isfinite(values["train/grad_norm"]):
                del values["train/grad_norm"]
            self.run.numbers(training.step, values)
            self.bar.set_postfix_str(
                f"loss {values['train/loss']:.4f}, {values['train/examples_per_second']:.1f} examples/s"
            )

    def so_far(self) -> dict[str, float]:
        """Return `train_loss` (mean) and `examples_per_second` of the epoch so far."""
        if self.waiting:
            self._read()
        return {
            "train_loss": self.sums["loss"] / self.sums["weight"],
            "examples_per_second": self.sums["examples"] / self.sums["seconds"],
        }

    @contextlib.contextmanager
    def paused(self):
        """Leave out of the training's time what happens within: evaluation, saving."""
        self.runtime.synchronize()
        self.waiting_sums["seconds"] += time.perf_counter() - self.started
        yield
        self.started = time.perf_counter()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
        """Return what has been taken in, as tensors and numbers: a meter that continues from it
        reports what this one would.
        """
        losses = [loss.cpu() for loss, _ in self.waiting]
        tensors = (
            {
                "losses": torch.stack(losses),
                "rows": torch.cat([rows.cpu() for _, rows in self.waiting]),
                "rows_of_loss": torch.tensor([len(rows) for _, rows in self.waiting]),
            }
            if losses
            else {}
        )
        return tensors, {"read": self.sums, "waiting": self.waiting_sums}

    def restore(self, tensors: dict[str, torch.Tensor], sums: dict[str, dict[str, float]]):
        """Continue from what `state` returned."""
        if tensors:
            rows = tensors["rows"].split(tensors["rows_of_loss"].tolist())
            self.waiting = list(zip(tensors["losses"].to(self.runtime.device), rows))
        self.sums, self.waiting_sums = dict(sums["read"]), dict(sums["waiting"])

    def check(self):
        """Raise UserError on every process if a loss since the last report, or a gradient that
        weights were changed by, is not finite on one of them.
        """
        bad_loss, bad_gradient = self._bad_loss(), self._bad_gradient()
        kind = 2 if bad_loss else 1 if bad_gradient else 0
        # a bad loss, which names its texts, makes the gradient bad on all processes
        worst = self.runtime.all_reduce_max(kind)
        if worst:
            told = self.runtime.all_gather_texts((bad_loss or bad_gradient) if kind == worst else "")
            raise UserError(next(filter(None, told)))

    def _bad_loss(self) -> str:
        place = _first_not_finite([loss for loss, _ in self.waiting])
        rows = "" if place is None else ", ".join(map(str, self.waiting[place][1].tolist()))
        return rows and (
            f"the training loss is not finite any more, first in the batch with the rows {rows} of the data;"
            " lower --lr, raise --warmup-ratio, or look at these texts"
        )

    def _bad_gradient(self) -> str:
        place = _first_not_finite([norm for norm, _ in self.norms])
        # such a step is skipped, and the next one scaled by half
        if place is None or self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            return ""
        way_out = (
            "use --precision bf16 or fp32"
            if self.scaler.is_enabled()
            else "lower --lr or raise --warmup-ratio"
        )
        return (
            f"the gradient is not finite any more, first in step {self.norms[place][1]}, though the loss is;"
            f" {way_out}"
        )

    def _read(self) -> dict[str, float]:
        self.check()
        losses = torch.stack([loss for loss, _ in self.waiting])
        new = {"loss": self.runtime.all_reduce_sum(losses.cpu().double().sum()).item(), **self.waiting_sums}
        new["seconds"] += time.perf_counter() - self.started
        self.sums = {name: value + new[name] for name, value in self.sums.items()}
        self.waiting, self.norms, self.waiting_sums, self.started = (
            [],
            [],
            dict.fromkeys(self.waiting_sums, 0.0),
            time.perf_counter(),
        )
        return {"loss": new["loss"] / new["weight"], "examples_per_second": new["examples"] / new["seconds"]}


def _first_not_finite(values: list[torch.Tensor]) -> int | None:
    """Return the place of the first of some numbers that is not finite, None when all are."""
    # one wait for the device
    finite = torch.isfinite(torch.stack(values)).tolist() if values else []
    return None if all(finite) else finite.index(False)
