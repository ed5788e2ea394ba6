"""A run before PyTorch is loaded: which of its flags may change, where it
lies, and whether it can be continued.

Nothing here takes time to import, so that the script can answer mistakes at once.
"""

import contextlib
import datetime
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError, first_repeated, listed, one_line, shorten
from common.files import LOCK, find_damage, member, only_writer, read_json

TRUNCATIONS = ("head", "tail", "head-tail", "chunks")
# on the bundled news more accurate than reading only the beginning, at the same cost
# (docs/benchmarks.md)
DEFAULT_TRUNCATION = "chunks"
DEFAULT_MAX_LENGTH = 256  # in scoring, and in training on texts that are cut off
# in training on chunks, which are drawn again in each epoch: as accurate there as chunks of 256
# tokens, in 0.6 of the time
DEFAULT_CHUNK_LENGTH = 128

Kind = Literal["single", "multi", "regression"]  # of a task: one class, several labels, or numbers
SINGLE, MULTI, REGRESSION = "single", "multi", "regression"
TASKS = (SINGLE, MULTI, REGRESSION)
# the scores of each, as metrics.json and --best-metric name them, and what the screen calls them
SCORES: dict[str, dict[str, str]] = {
    SINGLE: {
        "accuracy": "accuracy",
        "macro_f1": "macro-F1",
        "loss": "loss",
        "micro_f1": "micro-F1",
        "weighted_f1": "weighted F1",
        "binary_f1": "binary F1",
        "matthews": "Matthews",
        "roc_auc": "ROC-AUC",
        "average_precision": "average precision",
    },
    MULTI: {
        "subset_accuracy": "subset accuracy",
        "micro_f1": "micro-F1",
        "macro_f1": "macro-F1",
        "loss": "loss",
        "weighted_f1": "weighted F1",
        "label_accuracy": "accuracy per label",
        "roc_auc": "ROC-AUC",
        "average_precision": "average precision",
    },
    REGRESSION: {
        "rmse": "RMSE",
        "pearson": "Pearson",
        "spearman": "Spearman",
        "loss": "loss",
        "mae": "MAE",
        "r2": "R2",
    },
}
LOWER_IS_BETTER = ("loss", "rmse", "mae")
METRICS = tuple(dict.fromkeys(name for names in SCORES.values() for name in names))
# those of each evaluation's line on the screen, always defined but for the correlations
HEADLINES = {
    SINGLE: ("accuracy", "macro_f1"),
    MULTI: ("subset_accuracy", "micro_f1", "macro_f1"),
    REGRESSION: ("rmse", "pearson", "spearman"),
}

SCHEDULES = ("linear", "cosine", "constant")
TEXT_COLUMN, LABEL_COLUMN = "text", "label"  # unless flags, or the training of a saved model, name others
PAIR, JOIN = "pair", "join"  # of --text-mode: what several columns of texts are
LEFT_OPEN = (None, "auto")  # the values of flags whose default depends on the data or the model
NEWEST = ""  # the value of --resume given alone: the newest checkpoint
CONFIG = "config.json"  # once it exists, it is complete and the run can be resumed
RESULTS = "metrics.json"  # of a finished run
STUDY = "study.json"  # of several runs: their flags
# the folder from which the flags of a run name their files; in no file that is meant for others
STARTED_IN = "started_in"
# the only file that a run leaves behind when it is killed at its very beginning
UNFINISHED_CONFIG = re.compile(r"config\.json\.\d+")
CHECKPOINTS, CHECKPOINT_PREFIX, STATE = "checkpoints", "step-", "state.json"
PARTS = (STATE, "model.safetensors", "optimizer.safetensors")  # and each process's, and best/
# the names that we give; `.old` is the only copy after a kill while a checkpoint was replaced
OWN_NAME = re.compile(rf"{CHECKPOINT_PREFIX}(\d{{8,}})(\.old)?")
# files of a checkpoint up to this size are read in a first look at it, larger ones only measured
QUICKLY_READ_BYTES = 2**20
# flags that may differ when a run is resumed: the names of data and model, because their contents
# are compared, and flags that change no number
FREE_FLAGS = {
    "model",
    "revision",
    "tokenizer",
    "dataset",
    "dataset_config",
    "dataset_revision",
    "validation_file",
    "test_file",
    "train_split",
    "validation_split",
    "test_split",
    "max_train_samples",
    "max_eval_samples",
    "columns",
    "delimiter",
    "quoting",
    "encoding",
    "text_column",
    "text_mode",
    "join_with",
    "label_column",
    "label_separator",
    "cache_dir",
    "output_dir",
    "device",
    "precision",
    "num_workers",
    "auto_batch_size",
    "nondeterministic",
    "calibrate",
    "save_every",
    "keep",
    "keep_after",
    "max_minutes",
}
# what config.json says in other words than a flag does, and the limit of one process of a run
NO_FLAGS = ("output_dir", "device", "precision", "max_minutes")


def check_text_columns(columns: Sequence[str], mode: str | None) -> None:
    """Raise UserError unless it is said what several columns of texts are,
    and there are as many as that takes.
    """
    count, shown = len(columns), ",".join(columns)
    if mode is None and count > 1:
        raise UserError(
            f"--text-column {shown}: say with --text-mode pair that two texts are read together,"
            " or with --text-mode join that they are one text"
        )
    if (mode == PAIR and count != 2) or (mode == JOIN and count < 2):
        wanted = "two columns" if mode == PAIR else "several columns"
        advice = f"name {wanted}, as in --text-column title,body"
        raise UserError(f"--text-mode {mode}: {advice}; not {shown!r}")


def check_task(kind: Kind, flags: Mapping[str, Any], names: Sequence[str] = ()) -> None:
    """Raise UserError for a flag that has no meaning in a task, the `names` of whose answers are
    known as soon as the data is.
    """
    best_metric = flags["best_metric"]
    if best_metric not in SCORES[kind]:
        known = ", ".join(SCORES[kind])
        problem = f"--task {kind} has no such score"
        raise UserError(f"--best-metric {best_metric}: {problem}; use one of {known}")
    if kind == REGRESSION:
        neutral_values = {"label_smoothing": 0.0, "class_weights": "none", "calibrate": False}
        for name, neutral in neutral_values.items():
            if flags[name] != neutral:
                flag = f"--{name.replace('_', '-')} {flags[name]}".removesuffix(" True")
                problem = "it is for classes and labels, and --task regression has numbers"
                raise UserError(f"{flag}: {problem}; leave it out")
    positive, threshold = flags["positive_class"], flags["threshold"]
    if positive is not None and (kind != SINGLE or (names and positive not in names)):
        known = listed(names, most=10) if kind == SINGLE else f"none in --task {kind}"
        raise UserError(f"--positive-class {positive}: no such class; the classes are {known}")
    if threshold is not None and kind != MULTI:
        problem = f"it is for labels, and this is --task {kind}"
        raise UserError(f"--threshold {threshold}: {problem}; leave it out")
    if best_metric == "binary_f1" and len(names) > 2 and positive is None:
        advice = "name the class with --positive-class, because there are several"
        raise UserError(f"--best-metric binary_f1: {advice}")
    separator = flags["label_separator"]
    if separator is not None and kind != MULTI:
        raise _no_separator(separator)


def check_label_columns(columns: Sequence[str], separator: str | None) -> None:
    """Raise UserError for a separator of labels where several columns hold them."""
    if separator is not None and len(columns) > 1:
        raise _no_separator(separator)


def _no_separator(separator: str) -> UserError:
    problem = "it parts several labels in the cells of one column (--task multi)"
    return UserError(f"--label-separator {separator}: {problem}; leave it out")


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
        return RunLocation(new_run_folder(output_dir, name))
    if named is None:
        raise UserError("--resume: which run? name its folder, as in --resume runs/news")
    if not (named.folder / CONFIG).is_file():
        advice = "check the name, or leave --resume out to start one"
        raise UserError(f"--resume: {named.folder} holds no run; {advice}")
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
    is_in_checkpoints = path.absolute().parent.name == CHECKPOINTS
    is_checkpoint = path.name.startswith(CHECKPOINT_PREFIX) and is_in_checkpoints
    folder = Path(os.path.normpath(path / ".." / "..")) if is_checkpoint else path
    _refuse_model(folder)
    if output_dir is not None and Path(output_dir).resolve() != folder.resolve():
        problem = f"--resume {resume} continues in {folder}"
        raise UserError(f"--output-dir {output_dir}: {problem}; leave one of the two out")
    return RunLocation(folder, is_resumed=True, checkpoint=path if is_checkpoint else None)


def _refuse_model(folder: Path) -> None:
    """Raise UserError for the folder of a saved model, such as best/ of a run."""
    if not (folder / CONFIG).is_file() or not any(folder.glob("*.safetensors")):
        return
    run = next(filter(_is_run, folder.parents), None)
    if run is None:
        problem, advice = "this is a saved model, and no run", "train it further with --model"
    else:
        problem, advice = f"this is the model of the run {run}", f"--resume {run} continues the run"
    raise UserError(f"--resume {folder}: {problem}; {advice}")


def _is_run(folder: Path) -> bool:
    """Tell whether the config.json of a folder is that of a run; many programs write such a file."""
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "identity" in config


def new_run_folder(output_dir: str | None, name: str) -> Path:
    """Return the folder for a new run: `output_dir`, or runs/<name>-<time>. Nothing is created yet.

    Raises UserError when the folder is not empty.
    """
    folder = Path(output_dir or f"runs/{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    _require_empty(folder)
    return folder


def _require_empty(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} - {LOCK} if folder.is_dir() else set()
    if all(UNFINISHED_CONFIG.fullmatch(name) for name in names):
        return
    problem, advice = "it holds other files", "name a new folder or remove it first"
    if not names.isdisjoint((CONFIG, STUDY)):
        problem, advice = (
            "it holds another run",
            f"continue that with --resume {folder}, or name a new folder",
        )
    raise UserError(f"--output-dir {folder}: {problem}; {advice}")


@contextlib.contextmanager
def only_run(location: RunLocation, *, is_named: bool, wait: float = 0.0) -> Iterator[RunLocation]:
    """Yield the location of a run, with its folder made and held: within the block no other job can
    write there.

    Unless the flags have named it (`is_named`), a folder that another job has just made gets a
    number after its name. Folders that were made for it are removed again if nothing was written
    into them. Raises UserError when another job holds it for longer than `wait` seconds, and when
    it can't be made.
    """
    folder = location.folder
    if location.is_resumed:
        with only_writer(folder, flag="--resume", wait=wait):
            yield location
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if not is_named:
            folder = _make_first_free(folder)
            made.insert(0, folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output-dir {folder}: can't be created: {error.strerror}; name another folder"
        ) from error
    try:
        with only_writer(folder, flag="--output-dir"):
            _require_empty(folder)  # another job may have ended since it was looked at
            yield RunLocation(folder)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it is not empty: it holds the run
                path.rmdir()


def _make_first_free(folder: Path) -> Path:
    """Make a folder of this name, or with a number after it, that no other job has made before."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("counted to the end")


# What a run is continued from ---------------------------------------------------------------------


def checkpoints_in(run_folder: Path) -> list[Path]:
    """Return a run's checkpoints, the newest first; other files and folders beside them are left
    alone.
    """
    paths = [path for path in (run_folder / CHECKPOINTS).glob("*") if OWN_NAME.fullmatch(path.name)]
    folders = [path for path in paths if path.is_dir() and not path.is_symlink()]
    return sorted(folders, key=lambda path: (step_of(path), path.name), reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint."""
    match = OWN_NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def choose_checkpoint(
    run: RunLocation, *, max_bytes_read: int | None = None
) -> tuple[Path | None, dict[Path, str]]:
    """Return the checkpoint to continue from, and the damage of newer ones that are passed over.

    The checkpoint is the one that the flags name or else the newest one that is not damaged, None
    when there is none yet. Files of more than `max_bytes_read` bytes are only measured. Raises
    UserError when all checkpoints are damaged, and when they were removed after the run's end.
    """
    candidates = [run.checkpoint] if run.checkpoint is not None else checkpoints_in(run.folder)
    if not candidates and is_finished(run.folder):
        raise UserError(
            f"--resume: {run.folder} is a finished run whose checkpoints were removed; start a new"
            " run with another --output-dir"
        )
    damage: dict[Path, str] = {}
    for path in candidates:
        problem = find_damage(path, max_bytes_read=max_bytes_read) or state_problem(path)
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


def state_problem(path: Path) -> str | None:
    """Return what is wrong with the state.json of a checkpoint, None if it is as it is written.

    It can be nonsense although the manifest holds its SHA-256.
    """
    try:
        # a file that the manifest leaves out was not looked at: it may be none, such as a pipe
        for name in PARTS:
            member(path, name)
        state = read_json(path / STATE)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"{STATE}: {one_line(error)}"
    kinds = {"identity": dict, "position": dict, "param_groups": list, "scheduler": dict, "scaler": dict}
    for name, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            return f"{STATE}: {name} is missing or no {kind.__name__}"
    position = state["position"]
    least = {"micro_batch_size": 1, "epoch": 1, "step_of_epoch": 0, "step": 0}
    numbers = {**{name: position.get(name) for name in least}, "log_bytes": state.get("log_bytes")}
    for name, value in numbers.items():
        if type(value) is not int or not least.get(name, 0) <= value < 2**53:
            return f"{STATE}: {name} is {shorten(repr(value), 40)}"
    history, best = position.get("history"), position.get("best")
    if not isinstance(history, list) or not all(map(_is_evaluation, history)):
        return f"{STATE}: history is no list of evaluations"
    if "best" not in position or (best is not None and best not in history):
        return f"{STATE}: best is none of the evaluations"
    if best is not None and not (path / "best").is_dir():
        return "best/ is missing"
    return None


def _is_evaluation(entry: object) -> bool:
    """Tell whether a value is an entry of the history with all scores that are shown."""
    names = ("epoch", "step", "train_loss", "loss", "examples_per_second")
    return isinstance(entry, dict) and all(is_like(entry.get(name), 0.0) for name in names)


def is_like(value: object, example: object) -> bool:
    """Tell whether a value from JSON has the structure of an example: the same keys, lengths and
    kinds of values, and finite numbers.
    """
    if isinstance(example, dict):
        if not isinstance(value, dict) or value.keys() != example.keys():
            return False
        return all(is_like(value[key], example[key]) for key in example)
    if isinstance(example, list | tuple):
        if not isinstance(value, list) or len(value) != len(example):
            return False
        return all(map(is_like, value, example))
    if isinstance(example, int | float) and not isinstance(example, bool):
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
    return type(value) is type(example)


def read_config(run_folder: Path) -> dict:
    """Return the content of a run's config.json. Raises UserError when it is damaged."""
    path = run_folder / CONFIG
    try:
        config = read_json(path)
        if not isinstance(config["identity"], dict) or not isinstance(config[STARTED_IN], str):
            raise ValueError("it holds no settings")
        return config
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        advice = "start a new run with another --output-dir"
        raise UserError(f"--resume: {path} is damaged; {advice}") from error


def resumed_flags(given: Mapping[str, Any]) -> tuple[str | None, dict[str, object]]:
    """Return the value of --resume for the flags that are given, None for a new run, and the flags
    of the run that it continues.

    With --resume-or-start it is the run in --output-dir, if there is one. Raises UserError when
    flags contradict each other, and when the run's config.json is damaged.
    """
    output_dir, resume = given.get("output_dir"), given.get("resume")
    if given.get("resume_or_start"):
        if resume is not None:
            problem = "--resume says to continue"
            raise UserError(f"--resume-or-start: {problem}; leave one of the two out")
        if output_dir is None:
            raise UserError("--resume-or-start: name the folder of the run with --output-dir")
        known = any((Path(output_dir) / name).is_file() for name in (CONFIG, STUDY))
        resume = NEWEST if known else None
    return resume, {} if resume is None else saved_flags(output_dir, resume)


def is_finished(run_folder: Path) -> bool:
    """Tell whether a run has come to its end: its results are the last that it writes."""
    return (run_folder / RESULTS).is_file()


def finished_runs(names: Sequence[str]) -> list[Path]:
    """Return the folders of at least two finished runs; a study stands for those of its runs.

    Raises UserError for a folder that holds none.
    """
    found = []
    for name in names:
        folder = Path(name)
        is_study = (folder / STUDY).is_file()
        paths = sorted(folder.rglob(RESULTS) if is_study else folder.glob(RESULTS))
        runs = [path.parent for path in paths]
        if not runs:
            problem = "it holds no finished run"
            raise UserError(f"--compare {name}: {problem}; check the name, or finish it")
        found += runs
    twice = first_repeated([str(folder.resolve()) for folder in found])
    if twice is not None:
        raise UserError(f"--compare {' '.join(names)}: {twice} is named twice; name each run once")
    if len(found) < 2:
        advice = "name at least two, or a study of several"
        raise UserError(f"--compare {' '.join(names)}: one run; {advice}")
    return found


def saved_flags(output_dir: str | None, resume: str) -> dict[str, object]:
    """Return the flags of the run, or of the study, that `--resume` and `--output-dir` name, and
    where it was started; {} where there is none, which `locate_run` says. Raises UserError when its
    config.json is damaged.
    """
    run = _named_run(output_dir, resume)
    if run is None or not any((run.folder / name).is_file() for name in (CONFIG, STUDY)):
        return {}
    if (run.folder / STUDY).is_file():
        study = read_study(run.folder)
        return {**study["flags"], STARTED_IN: study[STARTED_IN]}
    config = read_config(run.folder)
    kinds = {name: config["identity"].get(f"--{name}") for name in ("device", "precision")}
    return {**{name: value for name, value in config.items() if name not in NO_FLAGS}, **kinds}


def read_study(folder: Path) -> dict[str, Any]:
    """Return the content of a study.json. Raises UserError when it is damaged."""
    path = folder / STUDY
    try:
        content = read_json(path)
        kinds = {"flags": dict, "axes": dict, "data": dict, STARTED_IN: str}
        if not all(isinstance(content[name], kind) for name, kind in kinds.items()):
            raise ValueError("no flags")
        return content
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        advice = "start a new study with another --output-dir"
        raise UserError(f"--resume: {path} is damaged; {advice}") from error


def identity_of_flags(flags: Mapping[str, object]) -> dict[str, object]:
    """Return the flags that change the outcome of a run, by their names on the command line."""
    kept = {name: value for name, value in sorted(flags.items()) if name not in FREE_FLAGS}
    return {f"--{name.replace('_', '-')}": value for name, value in kept.items()}


def require_same_flags(run: RunLocation, flags: Mapping[str, object]) -> None:
    """Raise UserError unless a run can be continued with these flags, as far as a quick look shows.

    Large files are only measured; the default of a flag that was not given may depend on the model.
    """
    checkpoint, _ = choose_checkpoint(run, max_bytes_read=QUICKLY_READ_BYTES)
    written = read_config(run.folder) if checkpoint is None else read_json(checkpoint / STATE)
    compare_flags(checkpoint or run.folder, written, flags)


def compare_flags(path: Path, written: dict, flags: Mapping[str, object]) -> None:
    """Raise UserError unless the identity that is `written` in `path` is that of these flags; one
    that was not given (None) is not compared.
    """
    now = identity_of_flags(flags)
    now = {name: value for name, value in now.items() if value not in LEFT_OPEN}
    before = written["identity"]
    refuse_changes(path, changes({name: before.get(name) for name in now}, now))


def changes(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return in words how the identity of a run has changed."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [
        f"{shorten(name, 60)} was {shorten(str(before.get(name)), 60)}, is {shorten(str(now.get(name)), 60)}"
        for name in names
    ]


def refuse_changes(path: Path, changed: list[str]) -> None:
    """Raise UserError, naming what has changed since `path` was written, if anything has."""
    if changed:
        raise UserError(
            f"--resume: {path} was written by another run: {'; '.join(changed)}; use the same"
            " again, or start a new run with another --output-dir"
        )
