"""Checkpoints that somebody has changed, and what lies beside them: damage and nonsense are refused
in one line, also when the manifest vouches for them; only our own names count.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.files import read_json, write_manifest
from common.runtime import Runtime
from common.training.checkpoint import Checkpoints, StopSignals, TrainingState
from common.training.run import RunLocation, checkpoints_in, choose_checkpoint, locate_run, only_run
from common.training.tracking import LogPosition, LossMeter, NullLog, RunLog

RUNTIME = Runtime(torch.device("cpu"), "fp32")
SCORES = {"train_loss": 1.0, "loss": 1.0, "accuracy": 0.5, "macro_f1": 0.5, "examples_per_second": 9.0}
ENTRY = {"epoch": 1, "step": 1, **SCORES}


class Model(torch.nn.Linear):
    """A model of ten numbers."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__(4, 2)


def new_state() -> TrainingState:
    """Return a training that has done one step."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    meter = LossMeter(RUNTIME, scaler)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = TrainingState(model, None, model, optimizer, scheduler, scaler, meter, num_steps=2)
    state.micro_batch_size, state.step, state.step_of_epoch, state.steps_per_epoch = 8, 1, 1, 2
    state.history, state.best = [dict(ENTRY)], dict(ENTRY)
    return state


def checkpoints_of(folder: Path, checkpoint: Path | None = None) -> Checkpoints:
    return Checkpoints(RunLocation(folder, True, checkpoint), {"the data": {}}, keep=2, runtime=RUNTIME)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with one checkpoint."""
    folder = tmp_path / "run"
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "model.safetensors").write_bytes(b"the best")
    checkpoints_of(folder).save(new_state(), NullLog(folder))
    return folder


def resealed(run: Path) -> None:
    """Let the manifest of the checkpoint vouch for what is in it now."""
    [path] = checkpoints_in(run)
    (path / "manifest.json").unlink()
    write_manifest(path)


def resumed(run: Path) -> TrainingState:
    checkpoints = checkpoints_of(run)
    start = checkpoints.choose()
    assert start is not None
    state = new_state()
    checkpoints.restore(start, state)
    return state


def refused(run: Path, *parts: str) -> None:
    resealed(run)
    with pytest.raises(UserError) as error:
        resumed(run)
    line = str(error.value)
    assert line.startswith("--resume") and "\n" not in line, line
    assert [part for part in parts if part not in line] == [], line


def test_what_is_saved_is_resumed(run):
    resealed(run)
    state, new = resumed(run), new_state()
    assert (state.step, state.history, state.best) == (1, [ENTRY], ENTRY)
    assert torch.equal(state.model.weight, new.model.weight)


WRONG = [None, -1, 1.5, "x", [], {}, True, 10**400, float("nan")]
REQUIRED = ["identity", "position", "param_groups", "scheduler", "scaler", "log_bytes"]
POSITION = ["micro_batch_size", "epoch", "step_of_epoch", "step", "history", "best"]
HARMLESS = {"best": [None], "history": [], "scaler": [{}], "identity": [], "log_bytes": []}


@pytest.mark.parametrize("name", [*REQUIRED, *POSITION])
def test_a_number_of_another_kind_is_refused(name, run):
    [path] = checkpoints_in(run)
    original = read_json(path / "state.json")
    for value in WRONG:
        if value in HARMLESS.get(name, []):
            continue
        state = json.loads(json.dumps(original))
        (state if name in REQUIRED else state["position"])[name] = value
        (path / "state.json").write_text(json.dumps(state))
        refused(run, "step-00000001")
    state = json.loads(json.dumps(original))
    del (state if name in REQUIRED else state["position"])[name]
    (path / "state.json").write_text(json.dumps(state))
    refused(run, "state.json", name)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "[" * 100_000, "{}", '"x"'])
def test_a_state_that_is_none_is_refused(text, run):
    [path] = checkpoints_in(run)
    (path / "state.json").write_text(text)
    refused(run, "step-00000001", "state.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50)
@given(data=st.data())
def test_any_state_is_resumed_or_refused(data, tmp_path_factory):
    """What is resumed has finite numbers of the right kind; nothing else is an error of ours."""
    folder = tmp_path_factory.mktemp("any") / "run"
    (folder / "best").mkdir(parents=True)
    checkpoints_of(folder).save(new_state(), NullLog(folder))
    [path] = checkpoints_in(folder)
    state = read_json(path / "state.json")
    inner = (
        state if data.draw(st.booleans()) else state[data.draw(st.sampled_from(["position", "scheduler"]))]
    )
    inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(JSON)
    (path / "state.json").write_text(json.dumps(state))
    resealed(folder)
    try:
        assert resumed(folder).step >= 0
    except UserError as error:
        assert "\n" not in str(error)
    shutil.rmtree(folder)


def changed_tensors(file: str, change):
    def apply(path: Path):
        tensors = safetensors.torch.load_file(path / file)
        safetensors.torch.save_file(change(tensors), path / file)

    return apply


def without(name: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def instead(name: str, tensor: torch.Tensor):
    return lambda tensors: {**tensors, name: tensor}


MODEL, OPTIMIZER, RANK = "model.safetensors", "optimizer.safetensors", "rank-0.safetensors"
TENSORS = {
    "a weight is missing": changed_tensors(MODEL, without("bias")),
    "one more weight": changed_tensors(MODEL, instead("more", torch.ones(2))),
    "a weight of another shape": changed_tensors(MODEL, instead("bias", torch.ones(3))),
    "a weight that broadcasts": changed_tensors(MODEL, instead("bias", torch.ones(1))),
    "NaN in a weight": changed_tensors(MODEL, instead("bias", torch.tensor([1.0, float("nan")]))),
    "infinity in a weight": changed_tensors(MODEL, instead("bias", torch.tensor([1.0, float("inf")]))),
    "an average is missing": changed_tensors(OPTIMIZER, without("0.exp_avg")),
    "an average that broadcasts": changed_tensors(OPTIMIZER, instead("0.exp_avg", torch.ones(1))),
    "an average of another shape": changed_tensors(OPTIMIZER, instead("1.exp_avg_sq", torch.ones(5))),
    "NaN in an average": changed_tensors(OPTIMIZER, instead("1.exp_avg", torch.tensor([0.0, float("nan")]))),
    "an average of no weight": changed_tensors(OPTIMIZER, instead("7.exp_avg", torch.ones(1))),
    "an average without a number": changed_tensors(OPTIMIZER, instead("x.exp_avg", torch.ones(1))),
    "a tensor of another optimizer": changed_tensors(OPTIMIZER, instead("0.momentum", torch.ones(2, 4))),
    "no name": changed_tensors(OPTIMIZER, instead("", torch.ones(1))),
    "steps as a list": changed_tensors(OPTIMIZER, instead("0.step", torch.ones(2))),
    "no random state": changed_tensors(RANK, without("torch")),
    "a short random state": changed_tensors(RANK, instead("torch", torch.zeros(3, dtype=torch.uint8))),
    "a random state in floats": changed_tensors(RANK, instead("torch", torch.zeros(5056))),
    "no safetensors": lambda path: (path / MODEL).write_bytes(b"\xff" * 100),
    "an empty file": lambda path: (path / MODEL).write_bytes(b""),
    "a huge header": lambda path: (path / MODEL).write_bytes((10**15).to_bytes(8, "little") + b"{}"),
    "no weights": lambda path: (path / MODEL).unlink(),
    "no averages": lambda path: (path / OPTIMIZER).unlink(),
    "no part of the process": lambda path: (path / "rank-0.json").unlink(),
    "an empty part of the process": lambda path: (path / "rank-0.json").write_text("{}"),
    "no best model": lambda path: shutil.rmtree(path / "best"),
    "a pipe for the weights": lambda path: ((path / MODEL).unlink(), os.mkfifo(path / MODEL)),
    "a pipe for the state": lambda path: ((path / "state.json").unlink(), os.mkfifo(path / "state.json")),
    "a pipe for the part": lambda path: ((path / "rank-0.json").unlink(), os.mkfifo(path / "rank-0.json")),
    "a link out": lambda path: ((path / MODEL).unlink(), (path / MODEL).symlink_to("/etc/passwd")),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_other_tensors_are_refused_although_they_are_sealed(change, run):
    [path] = checkpoints_in(run)
    change(path)
    refused(run, "step-00000001")
    assert (run / "best" / "model.safetensors").read_bytes() == b"the best"  # nothing is lost


# What lies beside them ----------------------------------------------------------------------------


def plant_beside(run: Path) -> set[str]:
    """Put beside the checkpoints what users put there, and return its names."""
    folder, [path] = run / "checkpoints", checkpoints_in(run)
    for name in ("step-backup", "step-99999999 (copy)", "step-9", "step-00000009.bak", "tmp-notes"):
        shutil.copytree(path, folder / name)
    for name in ("step-00000001.tar", "step-99999999", "tmp-00000009.txt", "notes.txt"):
        (folder / name).write_text("a user's file")
    (folder / "step-88888888").symlink_to(path)
    return {entry.name for entry in folder.iterdir()} - {path.name}


def test_only_our_own_names_are_checkpoints(run):
    beside = plant_beside(run)
    assert [path.name for path in checkpoints_in(run)] == ["step-00000001"]
    chosen, damage = choose_checkpoint(RunLocation(run, True))
    assert (chosen.name, damage) == ("step-00000001", {})
    state = new_state()
    for state.step in (2, 3, 100_000_000):
        checkpoints_of(run).save(state, NullLog(run))
    names = {path.name for path in (run / "checkpoints").iterdir()}
    # pruning keeps two of ours, the newest by its number, and all of the user's
    assert names - beside == {"step-00000003", "step-100000000"} and beside <= names
    checkpoints = checkpoints_of(run, run / "checkpoints" / "step-backup")
    checkpoints._remove_after(checkpoints.choose())  # a copy may be named; it is of step 1
    assert {path.name for path in (run / "checkpoints").iterdir()} == beside


# The log ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, saved, kept",
    [
        ("", 40, ""),  # emptied
        ('{"step": 1}\n', 40, '{"step": 1}\n'),
        ('{"step": 1}\n{"ste', 40, '{"step": 1}\n'),
        ('{"step": 1}\n{"step": 2}\n', 12, '{"step": 1}\n'),
        (None, 40, ""),  # removed
    ],
)
def test_a_log_that_was_emptied_goes_on_without_zeros(content, saved, kept, tmp_path):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    log = RunLog(tmp_path, {}, LogPosition(saved, step=1))
    log.numbers(2, {"loss": 1.0})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == kept + '{"step": 2, "loss": 1.0}\n'


# One job ------------------------------------------------------------------------------------------


def test_a_second_job_in_a_folder_is_told_who_is_there(tmp_path):
    with only_run(locate_run(str(tmp_path / "run"), None, name="x"), is_named=True) as first:
        (first.folder / "config.json").write_text("{}")
        for location in (RunLocation(first.folder), RunLocation(first.folder, is_resumed=True)):
            second = only_run(location, is_named=True)
            with pytest.raises(UserError, match=f"{first.folder}: process {os.getpid()} "), second:
                pass
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json"]


def test_jobs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path):
    location = RunLocation(tmp_path / "runs" / "news-20260101-120000")
    with only_run(location, is_named=False) as first, only_run(location, is_named=False) as second:
        (second.folder / "config.json").write_text("{}")
        assert (first.folder.name, second.folder.name) == ("news-20260101-120000", "news-20260101-120000-2")
    # what a mistake has left empty goes
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["news-20260101-120000-2"]


def test_a_job_that_ended_meanwhile_has_left_its_run(tmp_path):
    """The folder was empty when the flags were checked, before PyTorch was loaded."""
    location = locate_run(str(tmp_path / "run"), None, name="x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    problem = f"holds another run; continue that with --resume {location.folder}, or name a new folder"
    with pytest.raises(UserError, match=problem), only_run(location, is_named=True):
        pass
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(("number", "call"), [(signal.SIGTERM, 1), (signal.SIGALRM, 2)])
def test_a_signal_while_processes_agree_counts_the_next_time(number, call):
    """Python handles it after the call that waits for the others, before its answer is kept."""
    calls = []

    class Interrupted(Runtime):
        def all_reduce_max(self, value: int) -> int:
            calls.append(value)
            if len(calls) == call:
                signal.raise_signal(number)
            return value

    runtime = Interrupted(torch.device("cpu"), "fp32")
    with StopSignals(runtime, "go on", seconds=3600) as signals:
        assert signals.requested() is None
        assert signals.requested() == number
