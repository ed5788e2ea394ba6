"""What a run leaves while it goes on: its folder, config.json, metrics.jsonl, TensorBoard events.

Beside them are the progress bar and the loss meter, which reads losses from the device only when
they are logged.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from common.errors import UserError, counted
from common.files import replace_file
from common.runtime import Runtime
from common.training.run import CONFIG, RESULTS, STARTED_IN, UNFINISHED_CONFIG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = "metrics.jsonl"
COST_OF_TRAINING = 3  # of a token, relative to a token in evaluation
STEPS_BEFORE_FORECAST = 5
REPORTED_PACKAGES = ("transformers", "datasets", "tokenizers", "evaluate", "scikit-learn")


# The run's folder ---------------------------------------------------------------------------------


def check_room(folder: Path, *, needed_bytes: int) -> int:
    """Return how many bytes the disk of the run folder has free. Raises UserError when that is no
    room for `needed_bytes` in it, counting those that the folder already holds.
    """
    free, needed = shutil.disk_usage(folder).free, needed_bytes - _bytes_in(folder)
    if free < needed:
        raise UserError(
            f"--output-dir {folder}: the run needs {file_size(needed)}, the disk has"
            f" {file_size(free)} free; free some space or name a folder on another disk"
        )
    return free


def _bytes_in(folder: Path) -> int:
    files = {
        (stat.st_dev, stat.st_ino): stat.st_size
        for stat in (path.stat() for path in folder.rglob("*") if path.is_file())
    }
    return sum(files.values())  # a file with several names, as hard links are, takes its space once


def file_size(num_bytes: float) -> str:
    """Return a number of bytes in words, with two or three digits."""
    if num_bytes >= 1e10:
        return f"{num_bytes / 1e9:,.0f} GB"
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes >= 1e7 else f"{num_bytes / 1e3:,.0f} kB"


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,  # it also says for which device it was built
        **{name: importlib.metadata.version(name) for name in REPORTED_PACKAGES},
    }


def run_settings(flags: dict, identity: dict, folder: Path, runtime: Runtime) -> dict:
    """Return what config.json and the reports say about a run."""
    return {
        **flags,
        "output_dir": str(folder),
        "precision": runtime.precision,
        "device": runtime.describe(),
        "processes": runtime.world_size,
        "identity": identity,
        "versions": versions(),
        "started": datetime.datetime.now().isoformat(),
    }


# The log ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogPosition:
    """How far a log had come when a checkpoint was saved; what was written after it is dropped."""

    num_bytes: int = 0  # of metrics.jsonl
    step: int = -1


def _cut(path: Path, num_bytes: int) -> None:
    """Drop what comes after the first `num_bytes` of a log of lines; a shorter one, which somebody
    has emptied, keeps its whole lines.
    """
    if path.exists():
        kept = path.read_bytes()[:num_bytes].rfind(b"\n") + 1
        os.truncate(path, kept)


class RunLog:
    """Writes a run's numbers, texts and pictures to metrics.jsonl and TensorBoard as they come."""

    def __init__(self, folder: Path, settings: dict, resume_at: LogPosition | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and only runs need it

        for path in folder.iterdir():
            if UNFINISHED_CONFIG.fullmatch(path.name):
                path.unlink()
        written = {**settings, STARTED_IN: os.getcwd()}  # there alone: reports and curves are for others
        replace_file(folder / CONFIG, json.dumps(written, indent=2) + "\n")
        self.folder, self.settings = folder, settings
        if resume_at is not None:
            _cut(folder / CURVES, resume_at.num_bytes)
        # open as long as the run
        self.lines = open(folder / CURVES, "a", encoding="utf-8")  # noqa: SIM115
        purge_step = None if resume_at is None else resume_at.step + 1
        self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Add one line to metrics.jsonl and a point at `step` to each TensorBoard curve."""
        print(json.dumps({"step": step, **values}), file=self.lines, flush=True)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def position(self) -> int:
        """Return the length of metrics.jsonl in bytes, once all of it is on the disk."""
        self.lines.flush()
        os.fsync(self.lines.fileno())
        return self.lines.tell()

    def figure(self, step: int, tag: str, draw: Callable[[str], Figure]) -> None:
        """Add the picture that `draw` returns for its title."""
        self.writer.add_figure(tag, draw(tag), step)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Add a text panel."""
        self.writer.add_text(tag, markdown, step)

    def finish(self, results: dict[str, Any], *, curves: list[str]) -> None:
        """Write metrics.json and, for TensorBoard's HParams, the settings beside the named curves.

        SummaryWriter.add_hparams would write each result once more, as a curve of one point.
        """
        from torch.utils.tensorboard.summary import hparams

        text = json.dumps(results, indent=2) + "\n"
        replace_file(self.folder / RESULTS, text)  # once it is there, the run is finished
        plain = (bool, int, float, str)
        settings = {name: value for name, value in self.settings.items() if isinstance(value, plain)}
        file_writer = self.writer._get_file_writer()
        assert file_writer is not None
        for summary in hparams(settings, dict.fromkeys(curves, 0.0)):
            file_writer.add_summary(summary)

    def close(self) -> None:
        """Write out what is still buffered."""
        self.writer.close()
        self.lines.close()


class NullLog:
    """Takes what RunLog takes and writes nothing: for every process but the first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.settings = folder, {}

    def position(self) -> int:
        """Return the length of a file that is not written."""
        return 0

    def nothing(self, *_args: object, **_named: object) -> None:
        """Write nothing."""

    numbers = figure = text = finish = close = nothing


Log = RunLog | NullLog


def progress(batches: Iterable, *, label: str, shown: bool = True, unit: str = "batch") -> tqdm:
    """Return `batches` with a progress bar, drawn on a terminal only, which vanishes at the end."""
    return tqdm(
        batches,
        desc=label,
        unit=unit,
        leave=False,
        file=sys.stderr,
        dynamic_ncols=True,
        disable=None if shown else True,  # None: off unless stderr is a terminal
    )


# The time that a run takes ------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Return a duration in words, rounded to what a waiting person wants to know."""
    if seconds < 58:
        return f"{max(5, 5 * round(seconds / 5))} seconds"
    minutes = round(seconds / 60)
    if minutes < 60:
        return counted(minutes, "minute")
    hours, minutes = divmod(5 * round(minutes / 5), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


class Clock:
    """The seconds since a run was started or resumed."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds so far."""
        return time.perf_counter() - self.started


class Forecast:
    """How long a run will take: the work that is left, at the speed of the work that is done.

    Work is counted in tokens that go forward through the model; in a training step they go backward
    too, which costs twice as much again. The first step is not counted: it prepares memory, or
    compiles.
    """

    def __init__(
        self,
        *,
        train_tokens: float,
        validation_tokens: float,
        test_tokens: float,
        validations: int,  # in an epoch
        clock: Clock,
    ) -> None:
        self.epoch_work = COST_OF_TRAINING * train_tokens + validations * validation_tokens
        self.validation_work, self.test_work, self.clock = validation_tokens, test_tokens, clock
        self.counted_from: float | None = None  # the end of the first step
        self.work, self.num_steps = 0.0, 0  # since then

    def add_step(self, num_tokens: int, runtime: Runtime) -> None:
        """Count an optimizer step that has read `num_tokens` over all processes."""
        if self.counted_from is None:
            runtime.synchronize()  # once: a GPU may still be at work
            self.counted_from = self.clock.seconds()
            return
        self.work += COST_OF_TRAINING * num_tokens
        self.num_steps += 1

    def add_validation(self) -> None:
        """Count an evaluation of the validation split."""
        if self.counted_from is not None:
            self.work += self.validation_work

    def seconds_left(self, epochs_left: float) -> float | None:
        """Return how long the rest of the run will take, None as long as nothing is known."""
        if self.counted_from is None or self.num_steps == 0:
            return None
        seconds_per_work = (self.clock.seconds() - self.counted_from) / self.work
        return seconds_per_work * (epochs_left * self.epoch_work + self.test_work)

    def is_due(self) -> bool:
        """Tell whether a few steps have been counted, which happens once."""
        return self.num_steps == STEPS_BEFORE_FORECAST

    def line(self, epochs_left: float, runtime: Runtime) -> str:
        """Return one line on the time that the run will take."""
        runtime.synchronize()  # once: a GPU may still be at work
        left = self.seconds_left(epochs_left)
        assert left is not None
        whole, rest = duration(self.clock.seconds() + left), duration(left)
        return f"time     about {whole} in all" + (f", {rest} left" if rest != whole else "")

    def words_left(self, epochs_left: float) -> str:
        """Return what the progress bar says, "" as long as nothing is known."""
        left = self.seconds_left(epochs_left)
        return "" if left is None else f", {duration(left)} left"


# The loss -----------------------------------------------------------------------------------------


class LossMeter:
    """The training loss and the speed of one epoch.

    Losses stay on the device until `read`, because reading one waits for a GPU.
    """

    def __init__(self, runtime: Runtime, scaler: torch.amp.GradScaler) -> None:
        self.runtime, self.scaler = runtime, scaler
        self.reset()

    def start_epoch(self, *, is_resumed: bool) -> None:
        """Start the clock; unless the epoch is a resumed one, forget what was before."""
        if not is_resumed:
            self.reset()
        self.started = time.perf_counter()

    def reset(self) -> None:
        """Forget everything."""
        # since the last read: of each micro-batch its summed loss and the row numbers of its texts,
        # of each step the norm of its gradient and its number
        self.losses: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.norms: list[tuple[torch.Tensor, int]] = []
        # sums since the last read, and of the epoch up to it; `weight` is that of the divisors
        self.recent = dict.fromkeys(("weight", "examples", "seconds"), 0.0)
        self.total = dict.fromkeys(("loss", *self.recent), 0.0)
        self.started = time.perf_counter()

    def add(self, summed_loss: torch.Tensor, rows: torch.Tensor) -> None:
        """Take the summed loss of a micro-batch and the row numbers of its texts."""
        self.losses.append((summed_loss.detach(), rows))

    def end_step(self, step: int, *, examples: int, divisor: float, grad_norm: torch.Tensor) -> None:
        """Take a step's number of examples, the divisor of its loss, and its gradient's norm."""
        self.recent["examples"] += examples
        self.recent["weight"] += divisor
        self.norms.append((grad_norm, step))

    def read(self) -> dict[str, float]:
        """Return `loss` (the mean) and `examples_per_second` since the last read.

        Raises UserError on every process when a loss or a gradient is not finite.
        """
        self.check()
        losses = torch.stack([loss for loss, _ in self.losses]).cpu()
        total = self.runtime.all_reduce_sum(losses.double().sum()).item()
        new = {"loss": total, **self.recent}
        now = time.perf_counter()
        new["seconds"] += now - self.started
        self.total = {name: value + new[name] for name, value in self.total.items()}
        self.losses, self.norms, self.started = [], [], now
        self.recent = dict.fromkeys(self.recent, 0.0)
        speed = new["examples"] / new["seconds"]
        return {"loss": new["loss"] / new["weight"], "examples_per_second": speed}

    def so_far(self) -> dict[str, float]:
        """Return `train_loss` (the mean) and `examples_per_second` of the epoch so far."""
        if self.losses:
            self.read()
        return {
            "train_loss": self.total["loss"] / self.total["weight"],
            "examples_per_second": self.total["examples"] / self.total["seconds"],
        }

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for what is not training: an evaluation, saving."""
        self.runtime.synchronize()
        now = time.perf_counter()
        self.recent["seconds"] += now - self.started
        self.started = now  # so that a read within the pause does not count these seconds again
        yield
        self.started = time.perf_counter()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
        """Return tensors and numbers from which another meter continues to the same results."""
        sums = {"read": self.total, "waiting": self.recent}
        if not self.losses:
            return {}, sums
        rows = [rows.cpu() for _, rows in self.losses]
        tensors = {
            "losses": torch.stack([loss.cpu() for loss, _ in self.losses]),
            "rows": torch.cat(rows),
            "rows_of_loss": torch.tensor([len(numbers) for numbers in rows]),
        }
        return tensors, sums

    def restore(self, tensors: dict[str, torch.Tensor], sums: dict[str, dict[str, float]]) -> None:
        """Continue from what `state` returned."""
        if tensors:
            rows = tensors["rows"].split(tensors["rows_of_loss"].tolist())
            self.losses = list(zip(tensors["losses"].to(self.runtime.device), rows))
        self.total, self.recent = dict(sums["read"]), dict(sums["waiting"])

    def check(self) -> None:
        """Raise UserError on every process unless all numbers since the last read are finite.

        Those are the losses, and the gradients that changed weights. A loss that is not finite
        makes the gradients of all processes so, hence its message, which names texts, goes first.
        """
        complaints = [self._bad_loss(), self._bad_gradient()]
        if not self.runtime.all_reduce_max(int(any(complaints))):
            return
        for complaint in complaints:
            if told := next(filter(None, self.runtime.all_gather_texts(complaint)), None):
                raise UserError(told)

    def _bad_loss(self) -> str:
        """Return what to say of the first loss that is not finite, "" when all are."""
        first = _first_not_finite([loss for loss, _ in self.losses])
        if first is None:
            return ""
        rows = ", ".join(map(str, self.losses[first][1].tolist()))
        return (
            f"the training loss is no longer finite, first in the batch with the rows {rows} of the"
            " data; lower --lr, raise --warmup-ratio, or look at these texts"
        )

    def _bad_gradient(self) -> str:
        """Return what to say of the first gradient that is not finite, "" when all are."""
        first = _first_not_finite([norm for norm, _ in self.norms])
        scaled = self.scaler.is_enabled()
        # the scaler skips such a step and halves its scale; below 1 halving helps no more
        if first is None or (scaled and self.scaler.get_scale() >= 1):
            return ""
        remedy = "use --precision bf16 or fp32" if scaled else "lower --lr or raise --warmup-ratio"
        return (
            f"the gradient is no longer finite, first in step {self.norms[first][1]}, although the"
            f" loss is; {remedy}"
        )


def _first_not_finite(values: Sequence[torch.Tensor]) -> int | None:
    """Return the index of the first of some numbers that is not finite, None when all are."""
    # one wait for the device
    finite = torch.isfinite(torch.stack(list(values))).tolist() if values else []
    return None if all(finite) else finite.index(False)
