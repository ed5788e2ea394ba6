"""Everything that the next step depends on, on disk: saved atomically, verified before it is used,
pruned (design: "State that must survive").

A checkpoint is a folder `step-<number>` of safetensors and JSON, no pickle: model.safetensors,
optimizer.safetensors, state.json, for each process rank-<number>.safetensors and .json, the best
model so far under best/, and manifest.json with size and SHA-256 of each of them. It is written
under the name `tmp-<number>` and renamed when it is whole, so that a kill at any moment leaves the
earlier ones.
"""

import hashlib
import os
import random
import shutil
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from common.errors import UserError
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

FOLDER, PREFIX, UNFINISHED = "checkpoints", "step-", "tmp-"
# may differ when a run goes on: names of data and model, for their contents are compared, and what
# changes no
# number
FREE_FLAGS = {
    "model",
    "dataset",
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
NEWEST = ""  # what --resume without a value stands for


class Checkpoints:
    """The checkpoints of one run; `identity` is what must be the same for a run to go on from one
    of them.
    """

    def __init__(self, run_folder: Path, identity: dict, *, keep: int, runtime: Runtime):
        self.folder, self.best = run_folder / FOLDER, run_folder / "best"
        self.identity, self.keep, self.runtime = identity, keep, runtime

    def save(self, training, meter, run):
        """Write a checkpoint of the training as it is, with every process's part; then remove
        those over the number to keep.

        On an error, as when the disk is full, what was written of it is removed, and the earlier
        ones stay.
        """
        target, fresh = (
            self.folder / f"{PREFIX}{training.step:08}",
            self.folder / f"{UNFINISHED}{training.step:08}",
        )
        if self.runtime.is_main:
            for leftover in self.folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover)
            fresh.mkdir(parents=True)
        self.runtime.barrier()
        try:
            self._write_part(fresh, meter)
            if self.runtime.is_main:
                self._write_shared(fresh, training, run)
            self.runtime.barrier()  # every process's part is on the disk
            if self.runtime.is_main:
                write_manifest(fresh)
                # there is one of the same step when a run is resumed and stopped within an
                # evaluation
                replace_folder(fresh, target)
                sync_folder(self.folder)
        except BaseException:
            if self.runtime.is_main:
                shutil.rmtree(fresh, ignore_errors=True)
            raise
        if self.runtime.is_main and find_damage(target) is None:
            for old in [path for path in self._all() if path.name < target.name][self.keep - 1 :]:
                shutil.rmtree(old)
        self.runtime.barrier()

    def _write_part(self, folder: Path, meter):
        tensors, sums = meter.state()
        tensors = {f"meter.{name}": tensor for name, tensor in tensors.items()}
        tensors["torch"] = torch.get_rng_state()
        if self.runtime.device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(self.runtime.device)
        name, keys, *rest = np.random.get_state(legacy=True)
        others = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
        path = folder / f"rank-{self.runtime.rank}"
        write_tensors(path.with_suffix(".safetensors"), tensors)
        write_json(path.with_suffix(".json"), {"random": others, "meter": sums})

    def _write_shared(self, folder: Path, training, run):
        # it knows weights that share memory
        safetensors.torch.save_model(training.model, str(folder / "model.safetensors"))
        sync_file(folder / "model.safetensors")
        optimizer = training.optimizer.state_dict()
        tensors = {
            f"{number}.{name}": value
            for number, values in optimizer["state"].items()
            for name, value in values.items()
        }
        write_tensors(folder / "optimizer.safetensors", tensors)
        write_json(
            folder / "state.json",
            {
                "identity": self.identity,
                "position": training.position(),
                "param_groups": optimizer["param_groups"],
                "scheduler": training.scheduler.state_dict(),
                "scaler": training.scaler.state_dict(),
                "log_bytes": run.position(),
            },
        )
        if training.best is not None:
            link_folder(self.best, folder / "best")

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob(f"{PREFIX}*"), reverse=True)

    def choose(self, wanted: Path | None) -> tuple[Path, dict] | None:
        """Return the checkpoint to go on from and its state: `wanted`, else the newest whole one,
        saying which were passed over; None for the beginning.

        Raises UserError when none of those there is whole, when they were removed after the run's
        end, and when the run differs from the one that is gone on with, naming what differs.
        """
        chosen = self.runtime.broadcast_from_main(lambda: self._choose(wanted))
        if chosen is None:
            return None
        self.runtime.require_shared(Path(chosen) / "manifest.json", flag="--resume")
        return Path(chosen), read_json(Path(chosen) / "state.json")

    def _choose(self, wanted: Path | None) -> str | None:
        found = [wanted] if wanted is not None else self._all()
        faults = {}
        for path in found:
            faults[path] = find_damage(path)
            if faults[path] is None:
                break
            if len(faults) < len(found):
                self.runtime.say(f"resume   {path} is damaged ({faults[path]}); taking the one before")
        else:
            if not found:
                self._compare_with_config()
                return None
            if wanted is not None:
                raise UserError(
                    f"--resume {wanted}: it is damaged ({faults[wanted]}); --resume {self.folder.parent}"
                    " takes the newest whole one"
                )
            listed = "; ".join(f"{path.name}: {reason}" for path, reason in faults.items())
            raise UserError(
                f"--resume: no whole checkpoint in {found[0].parent} ({listed}); start anew with another"
                " --output-dir"
            )
        self._compare(path, read_json(path / "state.json")["identity"])
        return str(path)

    def _compare_with_config(self):
        """Raise UserError unless a run without checkpoints can begin again: it came to no end, and
        it is the same run.
        """
        run = self.folder.parent
        if (run / "metrics.json").exists():
            raise UserError(
                f"--resume: {run} is a finished run whose checkpoints were removed; start anew with another"
                " --output-dir"
            )
        self._compare(run, read_json(run / "config.json").get("identity", {}))

    def _compare(self, path: Path, before: dict):
        names = [name for name in {**before, **self.identity} if before.get(name) != self.identity.get(name)]
        changed = [
            f"{name} was {before.get(name)}, is {self.identity.get(name)}"
            for name in names
            if name not in FINGERPRINTS
        ]
        # a changed flag can change data and model as well: then it is the cause
        if not changed and "the data" in names:
            then, now = before["the data"], self.identity["the data"]
            changed.append(
                "the texts, labels or tokens of"
                f" {' and '.join(split for split in now if then.get(split) != now[split])} differ"
            )
        if not changed and names:
            changed.append("the model's weights differ")
        if changed:
            raise UserError(
                f"--resume: {path} was written by another run: {'; '.join(changed)}; give the same again, or"
                " start anew with another --output-dir"
            )

    def drop_after(self, path: Path):
        """Remove what was saved after a checkpoint, damaged or of a way that the run now leaves:
        with it there, pruning and a later resume would count it.
        """
        for later in self._all():
            if later.name > path.name:
                shutil.rmtree(later)

    def restore(self, path: Path, state: dict, training) -> tuple[dict, dict]:
        """Put the training into the state of a checkpoint, best/ and this process's random state
        with it; return the state of its loss meter.
        """
        safetensors.torch.load_model(
            training.model, str(path / "model.safetensors"), device=str(training.model.device)
        )
        slots: dict[int, dict] = {}
        for name, tensor in safetensors.torch.load_file(path / "optimizer.safetensors").items():
            number, slot = name.split(".", 1)
            slots.setdefault(int(number), {})[slot] = tensor
        training.optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})
        training.scheduler.load_state_dict(state["scheduler"])
        training.scaler.load_state_dict(state["scaler"])
        training.restore_position(state["position"])
        if self.runtime.is_main and training.best is not None:
            fresh = self.best.with_name("best.new")
            shutil.rmtree(fresh, ignore_errors=True)
            link_folder(path / "best", fresh)
            replace_folder(fresh, self.best)
        self.runtime.barrier()
        return restore_part(path / f"rank-{self.runtime.rank}", self.runtime)


def restore_part(path: Path, runtime: Runtime) -> tuple[dict, dict]:
    """Set this process's random states from its part of a checkpoint; return its loss meter's
    tensors and sums.
    """
    tensors, others = (
        safetensors.torch.load_file(path.with_suffix(".safetensors")),
        read_json(path.with_suffix(".json")),
    )
    restore_random_states(tensors, others["random"], runtime)
    return {
        name.removeprefix("meter."): tensor for name, tensor in tensors.items() if name.startswith("meter.")
    }, others["meter"]


def restore_random_states(tensors: dict, others: dict, runtime: Runtime):
    """Set the generators of torch, CUDA, Python and NumPy."""
    torch.set_rng_state(tensors["torch"])
    if runtime.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], runtime.device)
    version, internal, gauss = others["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(others["numpy"]))


def place_in_log(found: tuple[Path, dict] | None) -> dict:
    """Return how far a run's log had come at a checkpoint with its state, as `tracking.RunLog`
    takes it; its beginning for None.
    """
    if found is None:
        return {"bytes": 0, "step": -1}
    _, state = found
    return {"bytes": state["log_bytes"], "step": state["position"]["step"]}


def locate_run(args, runtime: Runtime, *, name: str) -> tuple[Path, bool, Path | None]:
    """Return the run's folder, whether there is a run in it to go on with, and the checkpoint to
    go on from if the flags name it.

    A new folder is called after `name` and the time unless the flags name it. After a failure
    torchrun starts every process again with the same flags: then the run goes on by itself, if it
    was this job that began it. Raises UserError when the flags don't tell which run, there is
    none, or a new one's folder holds anything.
    """

    def choose() -> list:
        folder, wanted = _run_to_resume(args, runtime)
        return [
            str(folder or tracking.run_folder(args.output_dir, name=name)),
            folder is not None,
            wanted and str(wanted),
        ]

    folder, resumed, wanted = runtime.broadcast_from_main(choose)
    return Path(folder), resumed, wanted and Path(wanted)


def _run_to_resume(args, runtime: Runtime) -> tuple[Path | None, Path | None]:
    """Return the folder of the run that is to go on, None for a new one, and the checkpoint if the
    flags name it.
    """
    folder, wanted = _named_run(args)
    if folder is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise UserError(
            "--output-dir: torchrun with --max-restarts needs it, for a restarted process must find its run;"
            " name a folder"
        )
    if folder is not None and runtime.began_run(folder) and (folder / "config.json").is_file():
        return folder, None  # a named checkpoint was where the job began: it has come further
    if args.resume is None:
        return None, None
    if folder is None:
        raise UserError("--resume: which run? name its folder, as in --resume runs/news")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--resume: {folder} holds no run; check the name, or leave --resume out to start one"
        )
    if wanted is not None and not wanted.is_dir():
        raise UserError(f"--resume {args.resume}: no such checkpoint; --resume {folder} takes the newest")
    return folder, wanted


def _named_run(args) -> tuple[Path | None, Path | None]:
    """Return the run's folder as --output-dir or --resume gives it, and the checkpoint if that is
    what --resume names.
    """
    own = Path(args.output_dir) if args.output_dir else None
    if not args.resume:
        return own, None
    named = Path(args.resume)
    is_checkpoint = named.name.startswith(PREFIX) and named.absolute().parent.name == FOLDER
    folder = Path(os.path.normpath(named / ".." / "..")) if is_checkpoint else named
    if own is not None and own.resolve() != folder.resolve():
        raise UserError(
            f"--output-dir {args.output_dir}: --resume {args.resume} goes on in {folder}; leave one of"
            " them out"
        )
    return folder, named if is_checkpoint else None


def identity(flags: dict, model: torch.nn.Module, tokenized: dict, runtime: Runtime) -> dict:
    """Return what must be the same for a run to go on: flags that change its outcome, the
    machine's part in it, and fingerprints of data and model as loaded.
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
    """Return a SHA-256 of a model's class, the names and values of its weights, in hexadecimal."""
    return hashlib.sha256(f"{type(model).__name__} {tensors_sha256(model.state_dict())}".encode()).hexdigest()
