"""What stands behind the one-line calls of the training loop: decay groups, accumulation windows, the loss meter."""

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator

import torch

from common.errors import UserError
from common.runtime import Runtime
from common.training.batching import IGNORED_LABEL


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Return AdamW's parameter groups: matrices decay, biases and norm weights (one dimension) don't. Frozen ones are left out."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [{"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
            {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0}]


def accumulation_windows(batches: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` batches, the last one possibly shorter: one list is one optimizer step."""
    batches = iter(batches)
    while window := list(itertools.islice(batches, size)):
        yield window


def mark_last(window: list) -> Iterator[tuple[bool, object]]:
    """Yield each batch with whether it is the window's last: the one after which gradients are exchanged."""
    for number, batch in enumerate(window, start=1):
        yield number == len(window), batch


def sync_gradients(model: torch.nn.Module, *, when: bool):
    """Return a context in which DDP exchanges gradients only `when` asked; it must hold forward and backward. A plain model has none."""
    return model.no_sync() if hasattr(model, "no_sync") and not when else contextlib.nullcontext()


def count_examples(window: list, runtime: Runtime) -> torch.Tensor:
    """Return the number of examples of a window over all processes: the divisor of its summed loss (transformers #34242)."""
    count = sum(int((batch["labels"] != IGNORED_LABEL).sum()) for batch in window)  # labels are still on the CPU: no sync
    return runtime.all_reduce_sum(torch.tensor(float(count), device=runtime.device))


class LossMeter:
    """The losses of one epoch; it reads them from the device, shows and logs them only every `log_every` steps and at the end."""

    def __init__(self, machine: Runtime, run, bar, log_every: int):
        self.machine, self.run, self.bar, self.log_every = machine, run, bar, log_every
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []  # (summed loss, row numbers) of each batch since the last report
        self.waiting_examples: list[torch.Tensor] = []
        self.loss_sum = self.examples = self.seconds = 0.0
        self.started = time.perf_counter()

    def add(self, summed_loss: torch.Tensor, rows: torch.Tensor):
        """Take the summed loss of one batch and the row numbers of its texts."""
        self.waiting.append((summed_loss.detach(), rows))

    def end_step(self, training, examples: torch.Tensor, grad_norm: torch.Tensor):
        """Take the number of examples of the step that just ended; report if a report is due."""
        self.waiting_examples.append(examples)
        if training.step % self.log_every == 0:
            values = self._read()
            values = {"train/loss": values["loss"], "train/examples_per_second": values["examples_per_second"],
                      "train/learning_rate": training.scheduler.get_last_lr()[0], "train/grad_norm": grad_norm.item()}
            self.run.numbers(training.step, values)
            self.bar.set_postfix_str(f"loss {values['train/loss']:.4f}, {values['train/examples_per_second']:.1f} examples/s")

    def end_epoch(self) -> dict[str, float]:
        """Return `train_loss` (mean) and `examples_per_second` of the epoch."""
        if self.waiting:
            self._read()
        return {"train_loss": self.loss_sum / self.examples, "examples_per_second": self.examples / self.seconds}

    def _read(self) -> dict[str, float]:
        losses = torch.stack([loss for loss, _ in self.waiting])
        finite = torch.isfinite(losses).tolist()  # waits for the device
        if not all(finite):
            rows = self.waiting[finite.index(False)][1].tolist()
            raise UserError(f"the training loss is not finite any more, first in the batch with the rows {', '.join(map(str, rows))} of the data; "
                            "lower --lr, raise --warmup-ratio, or look at these texts")
        total = self.machine.all_reduce_sum(losses.sum()).item()  # fp32: MPS has no float64
        examples = torch.stack(self.waiting_examples).sum().item()
        seconds = time.perf_counter() - self.started
        self.waiting, self.waiting_examples, self.started = [], [], time.perf_counter()
        self.loss_sum, self.examples, self.seconds = self.loss_sum + total, self.examples + examples, self.seconds + seconds
        return {"loss": total / examples, "examples_per_second": examples / seconds}
