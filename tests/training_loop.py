"""What the tests of train_classifier.py's loop share: its config, batches, and a run of the loop alone."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from transformers import BatchEncoding

import train_classifier
from common.runtime import Runtime
from common.training.batching import BatchConfig
from common.training.checkpoint import TrainingState
from common.training.classifier import ModelConfig
from common.training.run import SINGLE
from common.training.task import Scoring, Task
from common.training.tokenization import TokenConfig
from common.training.tracking import Clock, Forecast, LossMeter, NullLog
from train_classifier import TrainConfig, config_from_flags

RUNTIME = Runtime(torch.device("cpu"), "fp32")
TWO_CLASSES = Task(SINGLE, ("0", "1"))
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def config_of(*flags: object, task: Task = TWO_CLASSES) -> TrainConfig:
    """Return the config that the script makes of flags."""
    args = train_classifier.make_parser().parse_args(list(map(str, flags)))
    model, batches = config_from_flags(ModelConfig, args), config_from_flags(BatchConfig, args)
    return config_from_flags(
        TrainConfig,
        args,
        model_config=model,
        batches=batches,
        tokens=TokenConfig(20, 20, "head"),
        task=task,
        scoring=Scoring(),
    )


def make_batches(sizes: list[int], seed: int = 0) -> list[BatchEncoding]:
    """Return batches of random tokens of the given sizes, each of its own length, so that padding differs."""
    generator = torch.Generator().manual_seed(seed)
    batches, row = [], 0
    for size in sizes:
        length = int(torch.randint(4, 20, (), generator=generator))
        ids = torch.randint(5, 100, (size, length), generator=generator)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.randint(0, 2, (size,), generator=generator),
            "row": torch.arange(row + 1, row + size + 1),
            "text_of_chunk": torch.arange(size),
        }
        batches.append(BatchEncoding(batch))
        row += size
    return batches


def make_state(
    model: torch.nn.Module | None,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    scaler: torch.amp.GradScaler = NO_SCALER,
    class_weights: torch.Tensor | None = None,
) -> TrainingState:
    """Return a training state of these parts; the schedule changes nothing by default."""
    scheduler = scheduler or torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    meter = LossMeter(RUNTIME, scaler)
    num_steps = 10**6  # more than any test takes
    return TrainingState(model, None, model, optimizer, scheduler, scaler, meter, num_steps, class_weights)


class EveryStep:
    """Stands for the signals that can stop a run: the loop asks them after each optimizer step."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then = then

    def requested(self) -> None:
        self.then()


def run_loop(
    state: TrainingState,
    steps: list[list[BatchEncoding]],
    *flags: object,
    log: object | None = None,
    after_step: Callable[[], None] = lambda: None,
    task: Task = TWO_CLASSES,
) -> None:
    """Run the script's loop for one epoch of the given steps, each a list of micro-batches.

    Nothing is evaluated or saved.
    """
    tokens = {"train_tokens": 1000, "validation_tokens": 100, "test_tokens": 100}
    forecast = Forecast(**tokens, validations=1, clock=Clock())
    run = train_classifier.Run(
        log or NullLog(Path()), mock.Mock(), EveryStep(after_step), forecast, mock.Mock()
    )
    config = config_of("--epochs", 1, "--log-every", 100, *flags, task=task)
    with (
        mock.patch.object(train_classifier.batching, "plan_epoch", lambda *_, **__: steps),
        mock.patch.object(train_classifier.batching, "make_loader", lambda _, batches, *__, **___: batches),
        mock.patch.object(train_classifier, "validate", lambda *_: None),
    ):
        train_classifier.train(state, {"train": None, "validation": None}, run, config, RUNTIME)
