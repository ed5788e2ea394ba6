"""A run before PyTorch is loaded: which of its flags may change, where it lies, and whether it can be
continued.

Nothing here takes time to import, so that the script can answer mistakes at once.
"""

import datetime
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import find_damage, read_json

TRUNCATIONS = ("head", "tail", "head-tail", "chunks")
# on the bundled news more accurate than reading only the beginning, at the same cost
# (docs/benchmarks.md)
DEFAULT_MAX_LENGTH, DEFAULT_TRUNCATION = 256, "chunks"

NEWEST = ""  # the value of --resume given alone: the newest checkpoint
CONFIG = "config.json"  # once it exists, it is complete and the run can be resumed
RESULTS = "metrics.json"  # of a finished run
# the only file that a run leaves behind when it is killed at its very beginning
UNFINISHED_CONFIG = re.compile(r"config\.json\.\d+")
CHECKPOINTS, CHECKPOINT_PREFIX, STATE = "checkpoints", "step-", "state.json"
# files of a checkpoint up to this size are read in a first look at it, larger ones only measured
QUICKLY_READ_BYTES = 2**20
# flags that may differ when a run is resumed: the names of data and model, because their contents
# are compared, and flags that change no number
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
    "max_minutes",
    "auto_batch_size",
    "nondeterministic",
}


@dataclass(frozen=True)
class RunLocation:
    """Where a run is kept, and whether and from where it is resumed."""

    folder: Path
    is_resumed: bool = False
    checkpoint: Path | None = None  # None: the newest one that is not damaged


# The run's folder ---------------------------------------------------------------------------------


def locate_run(
    output_dir: str | None,
    resume: str | None,
    *,
    name: str,
    is_of_this_job: Callable[[Path], bool] = lambda folder: False,
) -> RunLocation:
    """Return the location of the run that the flags `--output-dir` and `--resume` ask for.

    A new folder is called after `name` and the time unless the flags name it. After a failure
    torchrun starts every process again with the same flags; the run is then resumed if it was this
    job that began it, which `is_of_this_job` tells. Raises UserError when the flags do not tell
    which run to resume, when there is none, and when the folder of a new run is not empty.
    """
    named = _named_run(output_dir, resume)
    if named is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise UserError(
            "--output-dir: torchrun with --max-restarts needs it, because a restarted process must"
            " find its run; name a folder"
        )
    if named is not None and is_of_this_job(named.folder) and (named.folder / CONFIG).is_file():
        # a checkpoint that the flags name was where the job began: by now it has come further
        return RunLocation(named.folder, is_resumed=True)
    if resume is None:
        return RunLocation(_new_run_folder(output_dir, name))
    if named is None:
        raise UserError("--resume: which run? name its folder, as in --resume runs/news")
    if not (named.folder / CONFIG).is_file():
        raise UserError(
            f"--resume: {named.folder} holds no run; check the name, or leave --resume out to start one"
        )
    if named.checkpoint is not None and not named.checkpoint.is_dir():
        raise UserError(
            f"--resume {resume}: no such checkpoint; --resume {named.folder} takes the newest one"
        )
    return named


def _named_run(output_dir: str | None, resume: str | None) -> RunLocation | None:
    """Return the run, and the checkpoint if any, that the flags name; None when they name none."""
    if not resume:
        return None if output_dir is None else RunLocation(Path(output_dir), is_resumed=True)
    path = Path(resume)
    is_checkpoint = path.name.startswith(CHECKPOINT_PREFIX) and path.absolute().parent.name == CHECKPOINTS
    folder = Path(os.path.normpath(path / ".." / "..")) if is_checkpoint else path
    if output_dir is not None and Path(output_dir).resolve() != folder.resolve():
        raise UserError(
            f"--output-dir {output_dir}: --resume {resume} continues in {folder}; leave one of the two out"
        )
    return RunLocation(folder, is_resumed=True, checkpoint=path if is_checkpoint else None)


def _new_run_folder(output_dir: str | None, name: str) -> Path:
    """Return the folder for a new run: `output_dir`, or runs/<name>-<time>. Nothing is created yet.

    Raises UserError when the folder is not empty.
    """
    folder = Path(output_dir or f"runs/{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    if folder.is_dir() and any(not UNFINISHED_CONFIG.fullmatch(path.name) for path in folder.iterdir()):
        raise UserError(
            f"--output-dir {folder}: it holds another run or other files; name a new folder or"
            " remove it first"
        )
    return folder


# What a run is continued from ---------------------------------------------------------------------


def checkpoints_in(run_folder: Path) -> list[Path]:
    """Return a run's checkpoints, the newest first."""
    return sorted((run_folder / CHECKPOINTS).glob(f"{CHECKPOINT_PREFIX}*"), reverse=True)


def choose_checkpoint(
    run: RunLocation, *, max_bytes_read: int | None = None
) -> tuple[Path | None, dict[Path, str]]:
    """Return the checkpoint to continue from, and the damage of newer ones that are passed over.

    The checkpoint is the one that the flags name or else the newest one that is not damaged, None
    when there is none yet. Files of more than `max_bytes_read` bytes are only measured. Raises
    UserError when all checkpoints are damaged, and when they were removed after the run's end.
    """
    candidates = [run.checkpoint] if run.checkpoint is not None else checkpoints_in(run.folder)
    if not candidates and (run.folder / RESULTS).exists():
        raise UserError(
            f"--resume: {run.folder} is a finished run whose checkpoints were removed; start a new"
            " run with another --output-dir"
        )
    damage: dict[Path, str] = {}
    for path in candidates:
        problem = find_damage(path, max_bytes_read=max_bytes_read)
        if problem is None:
            return path, damage
        damage[path] = problem
    if run.checkpoint is not None:
        raise UserError(
            f"--resume {run.checkpoint}: it is damaged ({damage[run.checkpoint]}); --resume"
            f" {run.folder} takes the newest one that is not"
        )
    if damage:
        listed = "; ".join(f"{path.name}: {problem}" for path, problem in damage.items())
        raise UserError(
            f"--resume: all checkpoints in {run.folder / CHECKPOINTS} are damaged ({listed}); start"
            " a new run with another --output-dir"
        )
    return None, {}


def read_config(run_folder: Path) -> dict:
    """Return the content of a run's config.json. Raises UserError when it is damaged."""
    path = run_folder / CONFIG
    try:
        return read_json(path)
    except ValueError as error:
        raise UserError(f"--resume: {path} is damaged; start a new run with another --output-dir") from error


def identity_of_flags(flags: Mapping[str, object]) -> dict[str, object]:
    """Return the flags that change the outcome of a run, by their names on the command line."""
    return {
        f"--{name.replace('_', '-')}": value
        for name, value in sorted(flags.items())
        if name not in FREE_FLAGS
    }


def require_same_flags(run: RunLocation, flags: Mapping[str, object]) -> None:
    """Raise UserError unless a run can be continued with these flags, as far as a quick look shows.

    Large files are only measured, and a flag that was not given (None) is not compared, because
    its default may depend on the model.
    """
    checkpoint, _ = choose_checkpoint(run, max_bytes_read=QUICKLY_READ_BYTES)
    written = read_config(run.folder) if checkpoint is None else read_json(checkpoint / STATE)
    now = {name: value for name, value in identity_of_flags(flags).items() if value is not None}
    before = written.get("identity", {})
    refuse_changes(checkpoint or run.folder, changes({name: before.get(name) for name in now}, now))


def changes(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return in words how the identity of a run has changed."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)}, is {now.get(name)}" for name in names]


def refuse_changes(path: Path, changed: list[str]) -> None:
    """Raise UserError, naming what has changed since `path` was written, if anything has."""
    if changed:
        raise UserError(
            f"--resume: {path} was written by another run: {'; '.join(changed)}; use the same"
            " again, or start a new run with another --output-dir"
        )
