"""Everything that the next step depends on, saved on disk, and how a run stops and continues.

A checkpoint is a folder `step-<number>` of safetensors and JSON, no pickle: model.safetensors,
optimizer.safetensors, state.json, rank-<number>.safetensors and .json for each process, the best
model so far under best/, and manifest.json with size and SHA-256 of each of them. It is written
under the name `tmp-<number>` and renamed when it is complete, so that a kill at any moment leaves
the earlier ones. It is verified before it is used, and older ones are removed only after that.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import safetensors.torch
import torch

from common import cli
from common.cli import ERASE_LINE
from common.errors import Interrupted, reading
from common.files import (
    find_damage,
    link_folder,
    member,
    read_json,
    replace_folder,
    sync_file,
    sync_folder,
    tensors_sha256,
    write_json,
    write_manifest,
    write_tensors,
)
from common.runtime import Runtime
from common.training import tracking
from common.training.run import (
    CHECKPOINT_PREFIX,
    CHECKPOINTS,
    CONFIG,
    STATE,
    RunLocation,
    changes,
    checkpoints_in,
    choose_checkpoint,
    identity_of_flags,
    is_like,
    locate_run,
    only_run,
    read_config,
    refuse_changes,
    step_of,
)
from common.training.tracking import Log, LossMeter, file_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNFINISHED = "tmp-"
OWN_UNFINISHED = re.compile(rf"{UNFINISHED}\d{{8,}}")  # other files beside them are left alone
RESTART_SECONDS = 60.0  # that a job restarted by torchrun waits for the processes of before
ADAM_SLOTS = ("step", "exp_avg", "exp_avg_sq")  # the number of steps, and two averages
TIME_IS_UP = signal.SIGALRM  # the signal of --max-minutes
FINGERPRINTS = ("the data", "the model")
POSITION = ("micro_batch_size", "epoch", "step_of_epoch", "step", "history", "best")


@dataclass
class TrainingState:
    """What a step changes: the model and all that belongs to it, and how far training has come."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    wrapped: torch.nn.Module  # the model itself, or DDP or a compiled module around it
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    meter: LossMeter
    num_steps: int  # optimizer steps of the run
    class_weights: torch.Tensor | None = None  # (C), on the CPU
    micro_batch_size: int = 0  # the maximum number of chunks in a backward pass
    epoch: int = 1
    step_of_epoch: int = 0
    steps_per_epoch: int = 0
    step: int = 0
    history: list[dict] = field(default_factory=list)  # the scores of each evaluation
    best: dict | None = None

    def ends_epoch(self) -> bool:
        """Tell whether the last step of the epoch, or of the run, is done."""
        return self.step_of_epoch == self.steps_per_epoch or self.step == self.num_steps

    def steps_left(self) -> int:
        """Return how many steps of the run are left."""
        return self.num_steps - self.step

    def is_due(self, every: int | None) -> bool:
        """Tell whether what happens after `every` steps, and after each epoch, is due."""
        return self.ends_epoch() or (every is not None and self.step > 0 and self.step % every == 0)

    def is_evaluated(self) -> bool:
        """Tell whether the weights have been evaluated since the last step."""
        return bool(self.history) and self.history[-1]["step"] == self.step

    def epochs_done(self) -> float:
        """Return how many epochs are done: a whole number at the end of one, else two decimals."""
        if self.step_of_epoch == self.steps_per_epoch:
            return self.epoch
        return round(self.epoch - 1 + self.step_of_epoch / self.steps_per_epoch, 2)

    def epochs_left(self) -> float:
        """Return how many epochs are left, as a fraction within one."""
        return self.steps_left() / self.steps_per_epoch

    def is_finished(self, patience: int | None) -> bool:
        """Tell whether the last step was the last one of the run."""
        return self.step == self.num_steps or self.is_out_of_patience(patience)

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Tell whether the last `patience` evaluations were no better than the best one."""
        if patience is None or self.best is None:
            return False
        return len(self.history) - 1 - self.history.index(self.best) >= patience


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, verified, with the content of its state.json."""

    path: Path
    state: dict

    def log_position(self) -> tracking.LogPosition:
        """Return how far the run's log had come."""
        return tracking.LogPosition(self.state["log_bytes"], self.state["position"]["step"])


@contextlib.contextmanager
def open_location(
    output_dir: str | None, resume: str | None, runtime: Runtime, *, name: str
) -> Iterator[RunLocation]:
    """Yield on every process the location of the run that the main one finds with `locate_run`, and
    holds within the block.

    In a run that torchrun has started again, the main process knows whether this job began it, and
    waits for the processes of before, which may be about to end.
    """
    with contextlib.ExitStack() as held:

        def locate() -> list[str | bool | None]:
            location = locate_run(output_dir, resume, name=name, is_of_this_job=runtime.began_run)
            wait = RESTART_SECONDS if runtime.began_run(location.folder) else 0.0
            run = only_run(location, is_named=output_dir is not None, wait=wait)
            location = held.enter_context(run)
            checkpoint = None if location.checkpoint is None else str(location.checkpoint)
            return [str(location.folder), location.is_resumed, checkpoint]

        folder, is_resumed, checkpoint = runtime.broadcast_from_main(locate)
        chosen = None if checkpoint is None else Path(checkpoint)
        yield RunLocation(Path(folder), is_resumed, chosen)


class Checkpoints:
    """The checkpoints of one run; `identity` is what must not change for the run to be resumed."""

    def __init__(
        self, run: RunLocation, identity: dict, *, keep: int, runtime: Runtime, keep_after: int | None = None
    ) -> None:
        self.run, self.identity, self.keep, self.runtime = run, identity, keep, runtime
        self.keep_after = keep if keep_after is None else min(keep, keep_after)  # of a finished run
        self.folder, self.best = run.folder / CHECKPOINTS, run.folder / "best"

    def open_log(self, flags: dict, model: PreTrainedModel, start: Checkpoint | None) -> Log:
        """Return the run's log, which continues where `start` was saved.

        What was saved after `start` is removed first. Raises UserError when the disk has no room
        for the run, and when the processes do not share its folder.
        """
        run_folder = self.run.folder
        log: Log = tracking.NullLog(run_folder)
        if self.runtime.is_main:
            needed_bytes, left_bytes = disk_bytes(model, keep=self.keep, keep_after=self.keep_after)
            free_bytes = tracking.check_room(run_folder, needed_bytes=needed_bytes)
            self.runtime.note_run(run_folder)
            if start is not None:
                self._remove_after(start)
            begin = tracking.LogPosition() if start is None else start.log_position()
            settings = tracking.run_settings(flags, self.identity, run_folder, self.runtime)
            log = tracking.RunLog(run_folder, settings, begin if self.run.is_resumed else None)
            sizes = f"{file_size(needed_bytes)} of the {file_size(free_bytes)} that are free"
            left = f"when it is finished {file_size(left_bytes)} (--keep-after {self.keep_after})"
            self.runtime.say(f"disk     at most {sizes} (--keep {self.keep} and best/), {left}")
        self.runtime.require_shared(run_folder / CONFIG, flag="--output-dir")
        self.runtime.say(f"machine  {self.runtime.describe()}")
        parent = shlex.quote(str(run_folder.parent))
        self.runtime.say(f"run      {run_folder}; curves: tensorboard --logdir {parent}")
        if start is not None:
            self.runtime.say(f"resume   {start.path}: after step {start.log_position().step}")
        elif self.run.is_resumed:
            self.runtime.say("resume   no checkpoint yet: from the beginning")
        self.runtime.say("")
        return log

    def save(self, state: TrainingState, log: Log) -> None:
        """Write a checkpoint with every process's part, then remove those beyond
        `keep`; with a `keep` of 0, write none.

        On an error, such as a full disk, what was written of it is removed, and the earlier ones
        stay.
        """
        if self.keep == 0:
            return
        name = f"{state.step:08}"
        target = self.folder / f"{CHECKPOINT_PREFIX}{name}"
        unfinished = self.folder / f"{UNFINISHED}{name}"
        if self.runtime.is_main:
            for leftover in self.folder.glob(f"{UNFINISHED}*"):
                if OWN_UNFINISHED.fullmatch(leftover.name):
                    shutil.rmtree(leftover)
            unfinished.mkdir(parents=True)
        self.runtime.barrier()
        try:
            self._write_part(unfinished, state.meter)
            if self.runtime.is_main:
                self._write_shared(unfinished, state, log)
            self.runtime.barrier()  # every process's part is on the disk
            if self.runtime.is_main:
                write_manifest(unfinished)
                # there is one of the same step already when a run is resumed and stopped within an
                # evaluation
                replace_folder(unfinished, target)
                sync_folder(self.folder)
        except BaseException:
            if self.runtime.is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        if self.runtime.is_main and find_damage(target) is None:
            older = [path for path in checkpoints_in(self.run.folder) if step_of(path) < state.step]
            for beyond in older[self.keep - 1 :]:
                shutil.rmtree(beyond)
        self.runtime.barrier()

    def prune_finished(self) -> None:
        """Remove the checkpoints that a finished run is not to keep."""
        if self.runtime.is_main:
            for path in checkpoints_in(self.run.folder)[self.keep_after :]:
                shutil.rmtree(path)
            with contextlib.suppress(OSError):  # there is none, or it is not empty
                self.folder.rmdir()

    def _write_part(self, folder: Path, meter: LossMeter) -> None:
        """Write what only this process knows: its random states and its loss meter."""
        losses, sums = meter.state()
        tensors = {f"meter.{name}": tensor for name, tensor in losses.items()}
        tensors["torch"] = torch.get_rng_state()
        if self.runtime.device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(self.runtime.device)
        name, keys, *rest = np.random.get_state(legacy=True)
        numbers = np.asarray(keys).tolist()
        others = {"python": random.getstate(), "numpy": [name, numbers, *rest]}
        path = folder / f"rank-{self.runtime.rank}"
        write_tensors(path.with_suffix(".safetensors"), tensors)
        write_json(path.with_suffix(".json"), {"random": others, "meter": sums})

    def _write_shared(self, folder: Path, state: TrainingState, log: Log) -> None:
        """Write what all processes have in common."""
        # save_model knows weights that share memory
        safetensors.torch.save_model(state.model, str(folder / "model.safetensors"))
        sync_file(folder / "model.safetensors")
        optimizer = state.optimizer.state_dict()
        tensors = {
            f"{number}.{name}": value
            for number, values in optimizer["state"].items()
            for name, value in values.items()
        }
        write_tensors(folder / "optimizer.safetensors", tensors)
        content = {
            "identity": self.identity,
            "position": {name: getattr(state, name) for name in POSITION},
            "param_groups": optimizer["param_groups"],
            "scheduler": state.scheduler.state_dict(),
            "scaler": state.scaler.state_dict(),
            "log_bytes": log.position(),
        }
        write_json(folder / STATE, content)
        if state.best is not None:
            link_folder(self.best, folder / "best")

    def choose(self) -> Checkpoint | None:
        """Return the checkpoint to resume from, None to begin the run, or to begin it again.

        It is the one that the flags name or else the newest one that is not damaged; damaged ones
        are reported. Raises UserError when all are damaged, when the run is finished and its
        checkpoints were removed, and when another run wrote the checkpoint, naming what differs.
        """
        if not self.run.is_resumed:
            return None
        chosen = self.runtime.broadcast_from_main(self._choose)
        if chosen is None:
            return None
        self.runtime.require_shared(Path(chosen) / "manifest.json", flag="--resume")
        return Checkpoint(Path(chosen), read_json(Path(chosen) / STATE))

    def _choose(self) -> str | None:
        chosen, damage = choose_checkpoint(self.run)
        for path, problem in damage.items():
            self.runtime.say(f"resume   {path} is damaged ({problem}); trying the one before it")
        if chosen is None:
            self._compare(self.run.folder, read_config(self.run.folder)["identity"])
            return None
        self._compare(chosen, read_json(chosen / STATE)["identity"])
        return str(chosen)

    def _compare(self, path: Path, before: dict) -> None:
        """Raise UserError, naming what differs, unless `before` is the identity of this run."""
        flags_before, flags_now = (
            {name: value for name, value in identity.items() if name not in FINGERPRINTS}
            for identity in (before, self.identity)
        )
        changed = changes(flags_before, flags_now)
        # a changed flag can change data and model as well: then only the flag is named
        if not changed and before.get("the data") != self.identity["the data"]:
            old, new = before.get("the data", {}), self.identity["the data"]
            old = old if isinstance(old, dict) else {}
            differing = " and ".join(split for split in new if old.get(split) != new[split])
            changed = [f"the texts, labels or tokens of {differing} differ"]
        elif not changed and before != self.identity:
            changed = ["the model's weights differ"]
        refuse_changes(path, changed)

    def _remove_after(self, start: Checkpoint) -> None:
        """Remove the checkpoints after one that is resumed from: damaged, or of a course not taken.

        Otherwise pruning and a later resume would count them.
        """
        for later in checkpoints_in(self.run.folder):
            if step_of(later) > start.log_position().step:
                shutil.rmtree(later)

    def restore(self, start: Checkpoint, state: TrainingState) -> None:
        """Put the training, this process's random states and best/ back to a checkpoint.

        Raises UserError for one with other tensors or numbers than this training has.
        """
        advice = f"--resume {self.run.folder} takes the newest one, another --output-dir starts anew"
        with reading(f"--resume {start.path}: not a checkpoint of this training", advice):
            _load_model(start, state)
            _load_optimizer(start, state)
            for name in POSITION:
                setattr(state, name, start.state["position"][name])
            for suffix in (".safetensors", ".json"):
                member(start.path, f"rank-{self.runtime.rank}{suffix}")
            self._restore_part(start.path / f"rank-{self.runtime.rank}", state.meter)
        if self.runtime.is_main and state.best is not None:
            fresh = self.best.with_name("best.new")
            shutil.rmtree(fresh, ignore_errors=True)
            link_folder(start.path / "best", fresh)
            replace_folder(fresh, self.best)
        self.runtime.barrier()

    def _restore_part(self, path: Path, meter: LossMeter) -> None:
        """Set this process's random states and its loss meter from its part of a checkpoint."""
        tensors = safetensors.torch.load_file(path.with_suffix(".safetensors"))
        others = read_json(path.with_suffix(".json"))
        restore_random_states(tensors, others["random"], self.runtime)
        losses = {
            name.removeprefix("meter."): tensor
            for name, tensor in tensors.items()
            if name.startswith("meter.")
        }
        meter.restore(losses, others["meter"])


def _load_model(start: Checkpoint, state: TrainingState) -> None:
    """Set the weights to those of a checkpoint. Raises an error for other tensors."""
    device = str(state.model.device)
    safetensors.torch.load_model(state.model, str(start.path / "model.safetensors"), device=device)
    for name, weights in state.model.named_parameters():
        if not weights.isfinite().all():
            raise ValueError(f"model.safetensors: {name} holds NaN or infinity")


def _load_optimizer(start: Checkpoint, state: TrainingState) -> None:
    """Set optimizer, schedule and loss scaler to those of a checkpoint. Raises an error for other
    tensors or numbers: the optimizer itself would take them, and fail in its next step.
    """
    optimizer = state.optimizer
    for name, own in (
        ("param_groups", optimizer.state_dict()["param_groups"]),
        ("scheduler", state.scheduler.state_dict()),
        ("scaler", state.scaler.state_dict()),
    ):
        if not is_like(start.state[name], own):
            raise ValueError(f"{STATE}: {name} differs from this training's")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in safetensors.torch.load_file(start.path / "optimizer.safetensors").items():
        number, _, slot = name.partition(".")
        shape = () if slot == "step" else parameters[int(number)].shape
        if slot not in ADAM_SLOTS or tensor.shape != shape or not tensor.isfinite().all():
            raise ValueError(f"optimizer.safetensors: {name} does not fit the model")
        slots.setdefault(int(number), {})[slot] = tensor
    if any(values.keys() != set(ADAM_SLOTS) for values in slots.values()):
        raise ValueError("optimizer.safetensors: a tensor is missing")
    optimizer.load_state_dict({"state": slots, "param_groups": start.state["param_groups"]})
    state.scheduler.load_state_dict(start.state["scheduler"])
    state.scaler.load_state_dict(start.state["scaler"])


def disk_bytes(model: torch.nn.Module, *, keep: int, keep_after: int) -> tuple[int, int]:
    """Return the most bytes that a run of a model takes on the disk,
    while it goes on and in the end.

    A checkpoint holds the weights, AdamW's two averages of what is trained, and the best model of
    its time, which may be another one in each; the oldest is removed when a new one is complete.
    """
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    best = weights
    checkpoint = weights + 2 * trained + best
    # without checkpoints, the best model so far and the one that replaces it
    most = (keep + 1) * checkpoint if keep else 2 * best
    return most, keep_after * checkpoint + best


def restore_random_states(tensors: dict[str, torch.Tensor], others: dict, runtime: Runtime) -> None:
    """Set the generators of torch, CUDA, Python and NumPy."""
    torch.set_rng_state(tensors["torch"])
    if runtime.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], runtime.device)
    version, internal, gauss = others["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(others["numpy"]))


def identity(flags: Mapping[str, object], model: torch.nn.Module, tokenized: dict, runtime: Runtime) -> dict:
    """Return what must not change for a run to be resumed.

    These are the flags that change its outcome, the device and the number of processes, and
    fingerprints of data and model as loaded.
    """
    return {
        **identity_of_flags(flags),
        "--precision": runtime.precision,
        "--device": runtime.device.type,
        "number of processes": runtime.world_size,
        "the data": {split: rows._fingerprint for split, rows in tokenized.items()},
        "the model": fingerprint(model),
    }


def fingerprint(model: torch.nn.Module) -> str:
    """Return the SHA-256 in hexadecimal of a model's class, and its weights' names and values."""
    weights = tensors_sha256(model.state_dict())
    return hashlib.sha256(f"{type(model).__name__} {weights}".encode()).hexdigest()


# Stop on a signal ---------------------------------------------------------------------------------


Handler = Callable[[int, FrameType | None], object] | int | None


class StopSignals:
    """Notes the first signal to stop (SIGINT, SIGTERM, SIGHUP) instead of ending the process; used
    as a context.

    A second one ends the process at once, unless there are several: these leave together, after
    a step or a batch, because one that left alone would keep the others waiting. torchrun gives
    them 30 seconds. After `seconds`, if given, the system sends TIME_IS_UP. `saves` tells
    whether the run writes checkpoints.
    """

    def __init__(
        self, runtime: Runtime, advice: str, *, seconds: float | None = None, saves: bool = True
    ) -> None:
        self.runtime, self.advice, self.seconds, self.saves = runtime, advice, seconds, saves
        self.received: int | None = None
        self.is_time_up = False
        self.handlers: dict[int, Handler] = {}

    def __enter__(self) -> StopSignals:
        # Python lets no other thread handle signals
        if threading.current_thread() is threading.main_thread():
            for number in cli.stop_signals():
                self.handlers[number] = signal.signal(number, self._note)
            if self.seconds is not None:
                self.handlers[TIME_IS_UP] = signal.signal(TIME_IS_UP, self._note_time)
                signal.setitimer(signal.ITIMER_REAL, max(self.seconds, 0.001))  # 0 would be never
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note_time(self, _number: int, _frame: FrameType | None) -> None:
        self.is_time_up = True

    def _note(self, number: int, _frame: FrameType | None) -> None:
        is_second = self.received is not None
        self.received = self.received or number
        if self.runtime.world_size > 1:
            return
        if is_second:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        # on a terminal in the place of the progress bar, which is drawn again below it
        begin = ERASE_LINE if sys.stderr.isatty() else "\n"
        what = "saving" if self.saves else "ending"
        after = f"{what} after this step; a second one ends the run at once"
        cli.warn_of_stop(f"{begin}{name}: {after}\n")

    def requested(self) -> int | None:
        """Return the signal by which any process was asked to stop, TIME_IS_UP if only the time is
        up, None otherwise; all must call it at the same point.
        """
        received = self.runtime.all_reduce_max(self.received or 0)
        if received:  # what came meanwhile stays, and counts the next time
            self.received = received
        elif self.seconds is not None and self.runtime.all_reduce_max(self.is_time_up):
            self.is_time_up = True
            return TIME_IS_UP
        return received or None

    def stop(self) -> NoReturn:
        """Raise Interrupted, with the advice and the exit code of the signal."""
        assert self.received is not None
        name = signal.Signals(self.received).name
        raise Interrupted(f"stopped by {name}; {self.advice}", 128 + self.received)

    def check(self) -> None:
        """Stop if any process received a signal, between the batches of an evaluation, which the
        time limit lets end.
        """
        if self.requested() not in (None, TIME_IS_UP):
            self.stop()
