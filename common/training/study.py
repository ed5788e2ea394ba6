"""Several runs for one table: seeds, learning rates and grids of flags.

Each run is a process of the same script in a folder of its own, so that it comes to the same as the
single command. A study writes down what it runs; a run that is finished is not repeated, and one
that was stopped is continued. Nothing here takes time to import but for the table at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from common import cli, sources, terminal
from common.errors import Interrupted, UserError, counted, shorten
from common.files import only_writer, read_json, replace_file, sha256
from common.training.run import (
    CONFIG,
    HEADLINES,
    LOWER_IS_BETTER,
    RESULTS,
    STARTED_IN,
    STUDY,
    changes,
    identity_of_flags,
    is_finished,
    new_run_folder,
    read_study,
    refuse_changes,
)

if TYPE_CHECKING:
    import subprocess

    from common.intervals import Spread

# flags that a grid can't vary: those that belong to the study, and the seed, which has a flag of its own
NOT_IN_GRIDS = ("output_dir", "cache_dir", "seed", "seeds", "grid", "keep", "keep_after", "max_minutes")
STOPPED = (129, 130, 143, -1, -2, -15)  # exit codes of a run that a signal has stopped, or ended at its start
DATA_FLAGS = ("dataset", "validation_file", "test_file")
TABLES = ("runs.csv", "study.csv", "study.tex")
POLL_SECONDS = 0.1
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


@dataclass(frozen=True)
class Planned:
    """A run of a study: what sets it apart, its folder, and the flags of its process."""

    setting: dict[str, str]  # flag -> value, as written
    seed: int
    folder: Path
    flags: list[str]

    def describe(self) -> str:
        """Return in a few words what sets the run apart."""
        varied = [f"{name} {value}" for name, value in self.setting.items()]
        return ", ".join([*varied, f"seed {self.seed}"])


@dataclass(frozen=True)
class Study:
    """All runs of a study, and the flags that it was started with."""

    folder: Path
    runs: list[Planned]
    flags: dict[str, Any]
    metric: str  # the score of the validation split by which settings are compared
    data: dict[str, dict[str, str]]  # flag, with the value of an axis -> file -> its SHA-256


class OneOrSeveral(argparse.Action):
    """Store a value, or a list of several."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def grid_axis(text: str) -> str:
    """Parse FLAG=a,b: a flag, with or without its dashes, and the values that it is to have."""
    name, _, values = text.removeprefix("--").partition("=")
    if not name or not all(value.strip() for value in values.split(",")):
        advice = "write a flag and its values, as in batch-size=8,16"
        raise argparse.ArgumentTypeError(f"{text!r}: {advice}")
    return f"{name}={values}"


# The plan -----------------------------------------------------------------------------------------


def is_study(args: argparse.Namespace) -> bool:
    """Tell whether the flags ask for several runs, or for more of a study."""
    if args.seeds is not None or bool(args.grid) or isinstance(args.lr, list):
        return True
    folder = args.resume or args.output_dir
    return args.resume is not None and folder is not None and (Path(folder) / STUDY).is_file()


def make_study(
    parser: cli.Parser, args: argparse.Namespace, not_settings: Iterable[str], *, name: str
) -> Study:
    """Return the runs that the flags ask for; nothing is written yet.

    A new folder is called after `name` and the time unless the flags name it. A study that is resumed
    has its own seeds and values besides those that the flags name. Raises UserError for axes that
    can't be varied, and when the folder holds something else than this study.
    """
    folder = Path(args.resume or args.output_dir or new_run_folder(None, name))
    axes, seeds = _axes(parser, args), [args.seed] if args.seeds is None else args.seeds
    for flag, values in {"seeds": list(map(str, seeds)), **axes}.items():
        if len(set(values)) < len(values):
            shown = f"--{_flag(flag)} {' '.join(values)}"
            raise UserError(f"{shown}: one of them twice; give each once")
    if args.resume is not None:
        args = _joined(parser, args, folder)
        axes, seeds = _axes(parser, args), args.seeds
    given = {
        flag: value
        for flag, value in vars(args).items()
        if value != parser.get_default(flag) and flag not in {*not_settings, "output_dir"}
    }
    runs = list(_plan_runs(parser, folder, given, axes, seeds))
    study = Study(folder, runs, given, args.best_metric, _hash_data(args, axes))
    if len({run.folder for run in study.runs}) < len(study.runs):
        raise UserError("--grid: two of its values make the same name of a folder; leave one out")
    if args.resume is None:
        new_run_folder(str(folder), name)
    else:
        _require_same_study(parser, study, axes)
    return study


def _joined(parser: cli.Parser, args: argparse.Namespace, folder: Path) -> argparse.Namespace:
    """Return the flags of a study that is resumed, with its seeds and the values of its axes before
    those that the flags add. Raises UserError where there is no study.
    """
    if not (folder / STUDY).is_file():
        raise UserError(
            f"--resume: {folder} holds no study; leave --resume out to start one, or --seeds,"
            " --grid and all but one --lr to continue a run"
        )
    before = read_study(folder)
    flags, result = before["flags"], argparse.Namespace(**vars(args))
    seeds = flags.get("seeds") or [flags.get("seed", parser.get_default("seed"))]
    result.seeds = list(dict.fromkeys([*seeds, *(args.seeds or ())]))
    if isinstance(flags.get("lr"), list):
        added = args.lr if isinstance(args.lr, list) else [args.lr]
        result.lr = list(dict.fromkeys([*flags["lr"], *added]))
    now = _axes(parser, args)
    # those of before come first, and with them the names of their folders stay
    names = dict.fromkeys(_grid_names([*(flags.get("grid") or ()), *(args.grid or ())]))
    both = {name: dict.fromkeys([*before["axes"].get(name, ()), *now.get(name, ())]) for name in names}
    result.grid = [f"{_flag(name)}={','.join(values)}" for name, values in both.items()] or None
    return result


def _grid_names(grid: Iterable[str]) -> list[str]:
    return [text.partition("=")[0].replace("-", "_") for text in grid]


def _plan_runs(
    parser: cli.Parser, folder: Path, given: dict[str, Any], axes: dict[str, list[str]], seeds: list[int]
) -> Iterator[Planned]:
    """Yield a run for each combination of values, the last axis changing first, and each seed."""
    base = {flag: value for flag, value in given.items() if flag not in {*axes, "seeds", "grid"}}
    switches = {action.dest for action in parser._actions if action.nargs == 0}
    for values in itertools.product(*axes.values()):
        setting = dict(zip(axes, values))
        varied = {name: value == "true" if name in switches else value for name, value in setting.items()}
        for seed in seeds:
            path = folder / _folder_name(setting) / f"seed-{seed}"
            own = {"seed": seed, "output_dir": str(path), "resume_or_start": True}
            flags = parser.as_flags({"keep_after": 0, **base, **own, **varied})
            written = {_flag(name): value for name, value in setting.items()}
            yield Planned(written, seed, path, flags)


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _axes(parser: cli.Parser, args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the values, as written, of each flag that is varied."""
    known = {action.dest: action for action in parser._actions}
    axes = {"lr": [f"{value:g}" for value in args.lr]} if isinstance(args.lr, list) else {}
    for text in args.grid or []:
        flag, _, values = text.partition("=")
        name = flag.replace("-", "_")
        if name == "seed":
            raise UserError(f"--grid {text}: seeds have a flag of their own; use --seeds 0 1 2")
        if name not in known or name in NOT_IN_GRIDS or not hasattr(args, name):
            problem = f"{flag} is no flag of a training that can be varied"
            raise UserError(f"--grid {text}: {problem}; see --help")
        if name in axes:
            raise UserError(f"--grid {text}: --{flag} is varied twice; give its values once")
        if getattr(args, name) != parser.get_default(name):
            problem = f"--{_flag(name)} has a value of its own, {getattr(args, name)}"
            raise UserError(f"--grid {text}: {problem}; leave that out, or add it to the grid")
        axes[name] = [value.strip() for value in values.split(",")]
        if known[name].nargs == 0 and not set(axes[name]) <= {"true", "false"}:
            raise UserError(f"--grid {text}: --{flag} is on or off; write {flag}=true,false")
    return axes


def _folder_name(setting: dict[str, str]) -> str:
    named = ((_flag(name), re.sub(r"[^A-Za-z0-9.+]+", "-", value)) for name, value in setting.items())
    return "_".join(f"{name}-{value}" for name, value in named)


def _hash_data(args: argparse.Namespace, axes: dict[str, list[str]]) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of each local file of the data: runs of one table must have the same."""
    found = {}
    for flag in DATA_FLAGS:
        values = {f"--{_flag(flag)}": getattr(args, flag)}
        if flag in axes:
            values = {f"--{_flag(flag)} {value}": value for value in axes[flag]}
        for shown, name in values.items():
            kind = "nothing" if name is None else sources.kind_of_path(name)
            if kind == "file":
                found[shown] = {"": sha256(Path(name))}
            elif kind == "folder":
                files = sorted(path for path in Path(name).rglob("*") if path.is_file())
                found[shown] = {str(path.relative_to(name)): sha256(path) for path in files}
    return found


def _require_same_study(parser: cli.Parser, study: Study, axes: dict[str, list[str]]) -> None:
    """Raise UserError, naming what differs, when a study is continued with other flags or data."""
    before = read_study(study.folder)
    varying = {*axes, "seeds", "grid", "lr"}
    names = {*before["flags"], *study.flags} - varying
    flags = [
        identity_of_flags({name: flags.get(name, parser.get_default(name)) for name in names})
        for flags in (before["flags"], study.flags)
    ]
    refuse_changes(study.folder, changes(*flags))
    if sorted(before["axes"]) != sorted(axes):
        both = (before["axes"], axes)
        was, now = (", ".join(map(_flag, sorted(names))) or "none" for names in both)
        refuse_changes(study.folder, [f"the flags that are varied were {was}, are {now}"])
    if not any(is_finished(run.folder) for run in study.runs):
        return  # what it was started with may have been corrected
    for flag in {**before["data"], **study.data}:
        was, now = before["data"].get(flag), study.data.get(flag)
        is_another_value = " " in flag and None in (was, now)  # of an axis
        if was != now and not is_another_value:
            problem = f"the data of {flag} are not those of its finished runs"
            raise UserError(f"--resume {study.folder}: {problem}; restore them, or start another study")


# The runs -----------------------------------------------------------------------------------------


def gpus(device: str) -> list[str]:
    """Return the names of the GPUs on which runs can go on at the same time, as
    CUDA_VISIBLE_DEVICES names them: those that it lists, else those that nvidia-smi finds.
    """
    if device not in ("auto", "cuda"):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    import subprocess

    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, _ in enumerate(re.findall(r"^GPU \d+", listing, re.MULTILINE))]


class Runner:
    """Runs the processes of a study, one at a time or one on each GPU."""

    def __init__(self, study: Study, script: Path, slots: list[str], max_minutes: float | None) -> None:
        self.study, self.script, self.slots = study, script, slots or [""]
        self.started, self.max_minutes = time.monotonic(), max_minutes
        self.running: dict[str, tuple[subprocess.Popen, Planned]] = {}
        self.failed: dict[str, int] = {}  # what sets a run apart -> its exit code
        self.received: int | None = None

    def run_all(self) -> None:
        """Run what is not finished. Raises Interrupted when a signal or the time limit ends it
        before, and UserError when a run failed before it began.
        """
        waiting = []
        for run in self.study.runs:
            if is_finished(run.folder):
                terminal.say(f"finished before: {run.describe()}")
            else:
                waiting.append(run)
        with self._signals():
            try:
                while self.running or (waiting and not self._is_over()):
                    while waiting and len(self.running) < len(self.slots) and not self._is_over():
                        self._start(waiting.pop(0))
                    time.sleep(POLL_SECONDS)
                    self._collect()
            except BaseException:
                self._pass_on(signal.SIGTERM)
                for process, _ in self.running.values():
                    process.wait()
                raise
        advice = f"continue with --resume {shlex.quote(str(self.study.folder))}"
        if self.received is not None:
            name = signal.Signals(self.received).name
            raise Interrupted(f"stopped by {name}; {advice}", 128 + self.received)
        unfinished = [run for run in self.study.runs if not is_finished(run.folder)]
        if len(unfinished) > len(self.failed):
            problem = f"the time is up before the end of {counted(len(unfinished), 'run')}"
            raise Interrupted(f"{problem}; {advice}", 0)

    def _is_over(self) -> bool:
        return self.received is not None or self._minutes_left() <= 0

    def _minutes_left(self) -> float:
        if self.max_minutes is None:
            return float("inf")
        return self.max_minutes - (time.monotonic() - self.started) / 60

    def _start(self, run: Planned) -> None:
        """Start the process of a run on a GPU that is free."""
        slot = next(slot for slot in self.slots if slot not in self.running)
        flags, environment = run.flags, dict(os.environ)
        if self.max_minutes is not None:
            flags = [*flags, f"--max-minutes={self._minutes_left()}"]
        import subprocess  # a study alone starts processes

        number = self.study.runs.index(run) + 1
        which = f"run {number} of {len(self.study.runs)}"
        terminal.say(f"\n{which}: {run.describe()}, in {run.folder}")
        with contextlib.ExitStack() as files:
            output = None
            if len(self.slots) > 1:  # their lines would mix
                environment["CUDA_VISIBLE_DEVICES"] = slot
                log = run.folder.with_name(f"{run.folder.name}.log")
                log.parent.mkdir(parents=True, exist_ok=True)
                output = files.enter_context(open(log, "a", encoding="utf-8"))
            # a signal that comes before the process is known would not be passed on to it
            before = files.enter_context(_blocked(cli.stop_signals()))
            process = subprocess.Popen(
                [sys.executable, str(self.script), *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                process_group=0,  # Ctrl-C comes to this process alone, which passes it on once
                preexec_fn=functools.partial(_end_with_parent, os.getpid(), before),
            )
            self.running[slot] = process, run

    def _collect(self) -> None:
        """Take note of the processes that have ended."""
        for slot, (process, run) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[slot]
            if len(self.slots) > 1:
                terminal.say(f"ended: {run.describe()}, exit code {code}")
            if code == 0 or (self.received is not None and code in STOPPED):
                continue
            name, where = run.describe(), "see above"
            if len(self.slots) > 1:
                where = f"its last lines are in {run.folder}.log"
            if not (run.folder / CONFIG).is_file():
                raise UserError(f"the run with {name} failed before it began ({where}); mend it")
            print(f"failed: {name}, exit code {code} ({where})", file=sys.stderr, flush=True)
            self.failed[name] = code

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass the signals to stop on to the runs, which save and end, within the block."""
        before = {number: signal.signal(number, self._note) for number in cli.stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for process, _ in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


@contextlib.contextmanager
def _blocked(signals: Sequence[signal.Signals]) -> Iterator[set[int]]:
    """Let signals wait until the end of the block; yield those that waited before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(parent: int, blocked: set[int]) -> None:
    """Let a run, before it begins, save and stop when its study's process is killed, where the system
    can; then let it have the signals that the study has blocked for its start.
    """
    for number in cli.stop_signals():  # the handlers of the study are not the run's
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)
        if os.getppid() != parent:  # it has been killed before it could be told
            os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def run_study(study: Study, script: Path, *, device: str, max_minutes: float | None) -> None:
    """Run what is not finished of a study, then show and write its tables.

    Raises UserError when runs failed, after the tables of the others.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    slots = gpus(device)
    with only_writer(study.folder, flag="--output-dir"):
        axes: dict[str, list[str]] = {}
        for run in study.runs:
            for name, value in run.setting.items():
                axes.setdefault(name.replace("-", "_"), []).append(value)
        different = {name: list(dict.fromkeys(values)) for name, values in axes.items()}
        content = {"flags": study.flags, "axes": different, "data": study.data, STARTED_IN: os.getcwd()}
        replace_file(study.folder / STUDY, json.dumps(content, indent=2) + "\n")
        at_once = ", one after another"
        if len(slots) > 1:
            at_once = f", {len(slots)} at a time, one on each GPU"
        terminal.say(f"study    {study.folder}: {counted(len(study.runs), 'run')}{at_once}")
        runner = Runner(study, script, slots, max_minutes)
        runner.run_all()
        finished = [run for run in study.runs if is_finished(run.folder)]
        if finished:
            show(study, finished)
    if runner.failed:
        names = "; ".join(f"{name} (exit code {code})" for name, code in runner.failed.items())
        raise UserError(
            f"{len(runner.failed)} of {len(study.runs)} runs failed: {shorten(names, 200)};"
            f" --resume {shlex.quote(str(study.folder))} tries them again"
        )


# The table ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A setting of a study, with the spread of each result over its seeds."""

    setting: dict[str, str]
    seeds: list[int]
    results: dict[str, Spread]


def summarize(runs: list[Planned], results: list[dict[str, Any]]) -> list[Line]:
    """Return a line for each setting, with those results that are numbers in all of its runs."""
    from common.intervals import spread

    groups: dict[tuple, list[tuple[int, dict]]] = {}
    for run, values in zip(runs, results):
        groups.setdefault(tuple(run.setting.items()), []).append((run.seed, values))
    lines = []
    for setting, members in groups.items():
        names = [
            name
            for name in members[0][1]
            if all(isinstance(values.get(name), int | float) for _, values in members)
        ]
        spreads = {name: spread([float(values[name]) for _, values in members]) for name in names}
        lines.append(Line(dict(setting), [seed for seed, _ in members], spreads))
    return lines


def best_line(lines: list[Line], metric: str) -> Line | None:
    """Return the setting with the best mean of a validation score, the first of equal ones, among
    those of which the most seeds are finished; None where no setting has the score in all of its runs.
    """
    name = f"best_validation_{metric}"
    scored = [line for line in lines if name in line.results]
    sign = 1 if metric in LOWER_IS_BETTER else -1
    return min(scored, key=lambda line: (-len(line.seeds), sign * line.results[name].mean), default=None)


def show(study: Study, finished: list[Planned]) -> None:
    """Show a study's table, and write it as CSV and LaTeX, beside one line a run as CSV."""
    results = [read_json(run.folder / RESULTS) for run in finished]
    lines = summarize(finished, results)
    best = best_line(lines, study.metric)
    headers, rows = _table(lines, study.metric, best)
    print(f"\n{terminal.table(rows, headers, disable_numparse=True)}\n")
    interval = "the 95 % interval of the mean (Student's t)"
    terminal.say(f"mean ± standard deviation over the seeds, and {interval}")
    num_scored = sum(f"best_validation_{study.metric}" in line.results for line in lines)
    if num_scored < len(lines):  # such as an area under a curve where all texts have one class
        undefined = f"{len(lines) - num_scored} of {counted(len(lines), 'setting')}"
        terminal.say(
            f"validation {study.metric} is undefined in runs of {undefined}, which can't be the best"
        )
    if len(lines) > 1 and best is not None:
        setting = ", ".join(f"{name} {value}" for name, value in best.setting.items())
        terminal.say(f"best setting by validation {study.metric}: {setting}")
    if any(spread.interval is None for line in lines for spread in line.results.values()):
        terminal.say("one seed has no spread: give several --seeds")
    _write_tables(study.folder, lines, finished, results, latex_table(headers, rows))
    terminal.say(f"tables: {', '.join(str(study.folder / name) for name in TABLES)}")


def _table(lines: list[Line], metric: str, best: Line | None) -> tuple[list[str], list[list[str]]]:
    """Return the headers and the rows of the table of settings; a star marks the best one."""
    names = headline_scores([line.results for line in lines])
    names = [f"best_validation_{metric}", *names]
    axes = list(lines[0].setting)
    headers = [
        *axes,
        "seeds",
        *(name.replace("best_validation", "validation").replace("_", " ") for name in names),
    ]
    rows = []
    for line in lines:
        mark = "*" if line is best and len(lines) > 1 else ""
        cells = [_in_words(line.results[name]) if name in line.results else "" for name in names]
        rows.append([*line.setting.values(), f"{len(line.seeds)}{mark}", *cells])
    return headers, rows


def headline_scores(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the results that a table has room for: the first scores of the task and the loss."""
    for names in HEADLINES.values():
        wanted = [f"test_{name}" for name in (*names, "loss")]
        if all(name in values for name in wanted for values in results):
            return wanted
    # each is a number, or its spread over the seeds; a dictionary is no score, such as the intervals
    scores = [name for name, value in results[0].items() if not isinstance(value, dict)]
    return [name for name in scores if name.startswith("test_")]


def _in_words(spread: Spread) -> str:
    if spread.interval is None:
        return f"{spread.mean:.4f}"
    low, high = spread.interval
    return f"{spread.mean:.4f} ± {spread.deviation:.4f} ({low:.4f} to {high:.4f})"


def latex_table(headers: list[str], rows: list[list[str]]) -> str:
    """Return a table for LaTeX with the package booktabs."""
    from tabulate import tabulate

    text = tabulate(rows, headers, tablefmt="latex_booktabs", disable_numparse=True)
    return text.replace("±", r"$\pm$") + "\n"


def write_csv(path: Path, headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as programs read it."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([headers, *rows])


def _write_tables(
    folder: Path, lines: list[Line], runs: list[Planned], results: list[dict[str, Any]], latex: str
) -> None:
    """Write runs.csv (a line per run), study.csv (one per setting and result) and study.tex."""
    axes = list(lines[0].setting)
    numbers = [name for name, value in results[0].items() if isinstance(value, int | float)]
    of_runs = [
        [*run.setting.values(), run.seed, run.folder, *map(values.get, numbers)]
        for run, values in zip(runs, results)
    ]
    of_settings = [
        [*line.setting.values(), name, one.count, one.mean, one.deviation, *(one.interval or (None, None))]
        for line in lines
        for name, one in line.results.items()
    ]
    measures = ["result", "seeds", "mean", "standard deviation", "low", "high"]
    write_csv(folder / TABLES[0], [*axes, "seed", "folder", *numbers], of_runs)
    write_csv(folder / TABLES[1], [*axes, *measures], of_settings)
    (folder / TABLES[2]).write_text(latex, encoding="utf-8")
