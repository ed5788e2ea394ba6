"""Everything that the next step depends on, saved on disk, and how a run stops and continues.

A checkpoint is a folder `step-<number>` of safetensors and JSON, no pickle: model.safetensors,
optimizer.safetensors, state.json, rank-<number>.safetensors and .json for each process, the best
model so far under best/, and manifest.json with size and SHA-256 of each of them. It is written
under the name `tmp-<number>` and renamed when it is complete, so that a kill at any moment leaves
the earlier ones. It is verified before it is used, and older ones are removed only after that.
"""

import hashlib
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

import numpy as np
import safetensors.torch
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.errors import Interrupted, UserError
from common.files import (
    find_damage,
    link_folder,
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
from common.training.tracking import CHECKPOINT_PREFIX, CHECKPOINTS, Log, LossMeter, RunLocation

UNFINISHED = "tmp-"
# the best model, for a moment twice; in a checkpoint the weights and AdamW's two averages
BEST_SIZE_IN_MODELS, CHECKPOINT_SIZE_IN_MODELS = 2, 3
# flags that may differ when a run is resumed: the names of data and model, because their contents
# are compared, and flags that change no number
FREE_FLAGS = {
    "model",
    "dataset",
    "validation_file",
    "test_file",
    "columns",
    "delimiter",
    "quoting",
    "encoding",
    "dataset_config",
    "text_column",
    "label_column",
    "train_split",
    "validation_split",
    "test_split",
    "max_train_samples",
    "max_eval_samples",
    "cache_dir",
    "output_dir",
    "device",
    "precision",
    "num_workers",
    "save_every",
    "keep",
    "auto_batch_size",
    "nondeterministic",
}
FINGERPRINTS = ("the data", "the model")
POSITION = ("micro_batch", "epoch", "step_of_epoch", "step", "history", "best")


@dataclass
class TrainingState:
    """What a step changes: the model and all that belongs to it, and how far training has come."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    parallel: torch.nn.Module  # the model itself, or DDP or a compiled module around it
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    meter: LossMeter
    class_weights: torch.Tensor | None = None  # (C), on the CPU
    micro_batch: int = 0  # chunks in a backward pass
    epoch: int = 1
    step_of_epoch: int = 0
    steps_of_epoch: int = 0
    step: int = 0
    history: list[dict] = field(default_factory=list)  # the scores of each evaluation
    best: dict | None = None

    def ends_epoch(self) -> bool:
        """Tell whether the last step of the epoch is done."""
        return self.step_of_epoch == self.steps_of_epoch

    def is_due(self, every: int | None) -> bool:
        """Tell whether what happens after `every` steps, and after each epoch, is due."""
        return self.ends_epoch() or (every is not None and self.step > 0 and self.step % every == 0)

    def is_evaluated(self) -> bool:
        """Tell whether the weights have been evaluated since the last step."""
        return bool(self.history) and self.history[-1]["step"] == self.step

    def epochs_done(self) -> float:
        """Return how many epochs are done: a whole number at the end of one, else two decimals."""
        if self.ends_epoch():
            return self.epoch
        return round(self.epoch - 1 + self.step_of_epoch / self.steps_of_epoch, 2)

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


class Checkpoints:
    """The checkpoints of one run; `identity` is what must not change for the run to be resumed."""

    def __init__(self, run: RunLocation, identity: dict, *, keep: int, runtime: Runtime) -> None:
        self.run, self.identity, self.keep, self.runtime = run, identity, keep, runtime
        self.folder, self.best = run.folder / CHECKPOINTS, run.folder / "best"

    def open_log(self, flags: dict, model: PreTrainedModel, start: Checkpoint | None) -> Log:
        """Create the run's folder and return its log, which continues where `start` was saved.

        What was saved after `start` is removed first. Raises UserError when the disk has no room
        for the run, and when the processes do not share its folder.
        """
        run_folder = self.run.folder
        log: Log = tracking.NullLog(run_folder)
        if self.runtime.is_main:
            model_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
            most_models = BEST_SIZE_IN_MODELS + CHECKPOINT_SIZE_IN_MODELS * (self.keep + 1)
            tracking.make_folder(run_folder, needed_bytes=most_models * model_bytes)
            self.runtime.note_run(run_folder)
            if start is not None:
                self._remove_after(start)
            begin = tracking.LogPosition() if start is None else start.log_position()
            settings = tracking.run_settings(flags, self.identity, run_folder, self.runtime)
            log = tracking.RunLog(run_folder, settings, begin if self.run.is_resumed else None)
        self.runtime.require_shared(run_folder / tracking.CONFIG, flag="--output-dir")
        self.runtime.say(f"machine  {self.runtime.describe()}")
        self.runtime.say(f"run      {run_folder}; curves: tensorboard --logdir {run_folder.parent}")
        if start is not None:
            self.runtime.say(f"resume   {start.path}: after step {start.log_position().step}")
        elif self.run.is_resumed:
            self.runtime.say("resume   no checkpoint yet: from the beginning")
        self.runtime.say("")
        return log

    def save(self, state: TrainingState, log: Log) -> None:
        """Write a checkpoint with every process's part, then remove those beyond `keep`.

        On an error, such as a full disk, what was written of it is removed, and the earlier ones
        stay.
        """
        name = f"{state.step:08}"
        target = self.folder / f"{CHECKPOINT_PREFIX}{name}"
        unfinished = self.folder / f"{UNFINISHED}{name}"
        if self.runtime.is_main:
            for leftover in self.folder.glob(f"{UNFINISHED}*"):
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
            for old in [path for path in self._all() if path.name < target.name][self.keep - 1 :]:
                shutil.rmtree(old)
        self.runtime.barrier()

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
        write_json(folder / "state.json", content)
        if state.best is not None:
            link_folder(self.best, folder / "best")

    def _all(self) -> list[Path]:
        """Return the run's checkpoints, the newest first."""
        return sorted(self.folder.glob(f"{CHECKPOINT_PREFIX}*"), reverse=True)

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
        return Checkpoint(Path(chosen), read_json(Path(chosen) / "state.json"))

    def _choose(self) -> str | None:
        wanted = self.run.checkpoint
        candidates = [wanted] if wanted is not None else self._all()
        if not candidates:
            self._compare_with_config()
            return None
        damage: dict[Path, str] = {}
        for path in candidates:
            problem = find_damage(path)
            if problem is None:
                self._compare(path, read_json(path / "state.json")["identity"])
                return str(path)
            damage[path] = problem
            if path != candidates[-1]:
                self.runtime.say(f"resume   {path} is damaged ({problem}); trying the one before it")
        if wanted is not None:
            raise UserError(
                f"--resume {wanted}: it is damaged ({damage[wanted]}); --resume"
                f" {self.run.folder} takes the newest one that is not"
            )
        listed = "; ".join(f"{path.name}: {problem}" for path, problem in damage.items())
        raise UserError(
            f"--resume: all checkpoints in {self.folder} are damaged ({listed}); start a new run"
            " with another --output-dir"
        )

    def _compare_with_config(self) -> None:
        """Raise UserError unless a run without checkpoints is unfinished, and this one."""
        run = self.run.folder
        if (run / "metrics.json").exists():
            raise UserError(
                f"--resume: {run} is a finished run whose checkpoints were removed; start a new run"
                " with another --output-dir"
            )
        self._compare(run, read_json(run / tracking.CONFIG).get("identity", {}))

    def _compare(self, path: Path, before: dict) -> None:
        """Raise UserError, naming what differs, unless `before` is the identity of this run."""
        now = self.identity
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        changed = [
            f"{name} was {before.get(name)}, is {now.get(name)}" for name in names if name not in FINGERPRINTS
        ]
        # a changed flag can change data and model as well: then only the flag is named
        if not changed and "the data" in names:
            old, new = before["the data"], now["the data"]
            differing = " and ".join(split for split in new if old.get(split) != new[split])
            changed.append(f"the texts, labels or tokens of {differing} differ")
        if not changed and names:
            changed.append("the model's weights differ")
        if changed:
            raise UserError(
                f"--resume: {path} was written by another run: {'; '.join(changed)}; use the same"
                " again, or start a new run with another --output-dir"
            )

    def _remove_after(self, start: Checkpoint) -> None:
        """Remove the checkpoints after one that is resumed from: damaged, or of a course not taken.

        Otherwise pruning and a later resume would count them.
        """
        for later in self._all():
            if later.name > start.path.name:
                shutil.rmtree(later)

    def restore(self, start: Checkpoint, state: TrainingState) -> None:
        """Put the training, this process's random states and best/ back to a checkpoint."""
        safetensors.torch.load_model(
            state.model, str(start.path / "model.safetensors"), device=str(state.model.device)
        )
        slots: dict[int, dict] = {}
        optimizer = safetensors.torch.load_file(start.path / "optimizer.safetensors")
        for name, tensor in optimizer.items():
            number, slot = name.split(".", 1)
            slots.setdefault(int(number), {})[slot] = tensor
        param_groups = start.state["param_groups"]
        state.optimizer.load_state_dict({"state": slots, "param_groups": param_groups})
        state.scheduler.load_state_dict(start.state["scheduler"])
        state.scaler.load_state_dict(start.state["scaler"])
        for name in POSITION:
            setattr(state, name, start.state["position"][name])
        if self.runtime.is_main and state.best is not None:
            fresh = self.best.with_name("best.new")
            shutil.rmtree(fresh, ignore_errors=True)
            link_folder(start.path / "best", fresh)
            replace_folder(fresh, self.best)
        self.runtime.barrier()
        self._restore_part(start.path / f"rank-{self.runtime.rank}", state.meter)

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
    kept = {
        f"--{name.replace('_', '-')}": value
        for name, value in sorted(flags.items())
        if name not in FREE_FLAGS
    }
    return {
        **kept,
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
    """Notes the first SIGINT or SIGTERM instead of ending the process; used as a context.

    A second one ends the process at once, unless there are several: these leave together, after a
    step or a batch, because one that left alone would keep the others waiting. torchrun gives them
    30 seconds.
    """

    def __init__(self, runtime: Runtime, advice: str) -> None:
        self.runtime, self.advice = runtime, advice
        self.received: int | None = None
        self.handlers: dict[int, Handler] = {}

    def __enter__(self) -> "StopSignals":
        # Python lets no other thread handle signals
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        is_second = self.received is not None
        self.received = self.received or number
        if self.runtime.world_size > 1:
            return
        if is_second:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        # print is not reentrant
        line = f"\n{name}: saving after this step; a second one ends the run at once\n"
        os.write(sys.stderr.fileno(), line.encode())

    def requested(self) -> bool:
        """Tell whether any process was asked to stop; all must call it at the same point."""
        self.received = self.runtime.all_reduce_max(self.received or 0) or None
        return self.received is not None

    def stop(self) -> NoReturn:
        """Raise Interrupted, with the advice and the exit code of the signal."""
        assert self.received is not None
        name = signal.Signals(self.received).name
        raise Interrupted(f"stopped by {name}; {self.advice}", 128 + self.received)

    def check(self) -> None:
        """Stop if any process was asked to, between the batches of an evaluation."""
        if self.requested():
            self.stop()
