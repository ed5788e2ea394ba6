"""Several runs for one table: what is run, in which order, what is repeated, and what the table
says.

Where only the order of the processes is under test, a small script stands for the training: it
notes its flags and writes the results of a run.
"""

import csv
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from scipy import stats

import train_classifier
from common.errors import UserError
from common.training import study
from common.training.run import identity_of_flags

# accuracies on the test split of learning rate and seed; by validation the first rate is the better
# one
SCORES = {("0.1", 0): 0.5, ("0.1", 1): 0.6, ("0.2", 0): 0.9, ("0.2", 1): 0.7}
STAND_IN = f"""
import json, os, signal, sys, time
from pathlib import Path
flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in sys.argv[1:])
folder, seed, lr = Path(flags["output-dir"]), int(flags["seed"]), flags.get("lr", "0.1")
folder.mkdir(parents=True, exist_ok=True)
behaviour = os.environ.get("BEHAVIOUR", "")
with open(folder / "starts", "a") as file:
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), time.time(), file=file)
if behaviour == f"wrong {{seed}}":
    sys.exit(2)
identity = json.loads(os.environ["IDENTITIES"]).get(str(folder), {{}})
(folder / "config.json").write_text(json.dumps({{"identity": identity, "started_in": os.getcwd()}}))
if behaviour == f"bad {{seed}} {{lr}}":
    sys.exit(2)
if behaviour == f"wait {{seed}}":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    (folder / "noted").write_text(str(os.getpid()))
    (folder / "noted").rename(folder / "waiting")
    time.sleep(60)
if behaviour == "slow":
    time.sleep(0.5)
scores = {SCORES!r}
results = {{"test_accuracy": scores[lr, seed], "best_validation_loss": float(lr), "interval": [0, 1]}}
(folder / "metrics.json").write_text(json.dumps(results))
print("ran", seed, lr, flush=True)
"""


@pytest.fixture
def stand_in(tmp_path) -> Path:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return path


def parse(*flags):
    return train_classifier.make_parser().parse_args([str(flag) for flag in flags])


def run(script: Path, *flags):
    plan = train_classifier.plan_study(parse(*flags))
    settings = {str(run.folder): train_classifier.settings_of(parse(*run.flags)) for run in plan.runs}
    identities = {folder: identity_of_flags(of_run) for folder, of_run in settings.items()}
    os.environ["IDENTITIES"] = json.dumps(identities)
    study.run_study(plan, script, device="cpu", max_minutes=None)


def starts(folder: Path) -> dict[str, int]:
    """Return how often each run was started."""
    paths = sorted(folder.rglob("starts"))
    return {str(path.parent.relative_to(folder)): len(path.read_text().splitlines()) for path in paths}


def test_a_plan_has_a_run_for_each_combination_and_nothing_but_what_is_given(tmp_path):
    flags = ["--seeds", 3, 4, "--lr", "1e-5", "3e-5", "--grid=--batch-size=8,16", "--epochs", 2]
    grid = [*flags, "--grid", "gradient-checkpointing=true,false", "--output-dir", tmp_path / "s"]
    plan = train_classifier.plan_study(parse(*grid))
    assert len(plan.runs) == 16
    first, last = plan.runs[0], plan.runs[-1]
    name = "lr-1e-05_batch-size-8_gradient-checkpointing-true"
    assert first.folder == tmp_path / "s" / name / "seed-3"
    switches = ["--gradient-checkpointing", "--resume-or-start"]
    given = [
        "--epochs=2",
        "--keep-after=0",
        f"--output-dir={first.folder}",
        "--seed=3",
        "--lr=1e-05",
        "--batch-size=8",
    ]
    assert sorted(first.flags) == sorted([*given, *switches])
    assert "--gradient-checkpointing" not in last.flags and "--seed=4" in last.flags
    single = train_classifier.plan_study(
        parse("--seeds", 7, "--output-dir", tmp_path / "t", "--keep-after", 1)
    )
    assert [run.folder for run in single.runs] == [tmp_path / "t" / "seed-7"]
    assert "--keep-after=1" in single.runs[0].flags


def test_a_table_has_means_intervals_and_the_setting_that_validation_chose(stand_in, tmp_path, capsys):
    """Oracle: NumPy and SciPy. By the test scores the other setting would be the better one."""
    folder = tmp_path / "s"
    run(stand_in, "--seeds", 0, 1, "--lr", 0.1, 0.2, "--output-dir", folder)
    screen = capsys.readouterr().out
    assert "best setting by validation loss: lr 0.1\n" in screen
    mean, low, high = 0.55, *stats.t.interval(0.95, 1, loc=0.55, scale=stats.sem([0.5, 0.6]))
    cell = f"{mean:.4f} ± {np.std([0.5, 0.6], ddof=1):.4f} ({low:.4f} to {high:.4f})"
    assert re.search(rf"^0\.1 +2\* .*{re.escape(cell)}", screen, re.M)
    with open(folder / "study.csv", newline="") as file:
        rows = {(row["lr"], row["result"]): row for row in csv.DictReader(file)}
    assert float(rows["0.2", "test_accuracy"]["mean"]) == pytest.approx(0.8)
    assert float(rows["0.1", "test_accuracy"]["low"]) == pytest.approx(low)
    with open(folder / "runs.csv", newline="") as file:
        assert [float(row["test_accuracy"]) for row in csv.DictReader(file)] == list(SCORES.values())
    latex = (folder / "study.tex").read_text()
    assert latex.count(r"\\") == 3 and r"0.5500 $\pm$ 0.0707" in latex and r"\toprule" in latex


def test_a_score_that_no_run_has_chooses_no_setting(stand_in, tmp_path, capsys):
    """As ROC-AUC where all validation texts have one class: the table is there, without a star."""
    flags = ["--lr", 0.1, 0.2, "--best-metric", "roc_auc", "--output-dir", tmp_path / "s"]
    run(stand_in, "--seeds", 0, 1, *flags)
    screen = capsys.readouterr().out
    assert "validation roc_auc is undefined in runs of 2 of 2 settings" in screen
    assert "best setting" not in screen and "*" not in screen and "0.5500" in screen


def test_a_study_goes_on_where_it_stopped_and_repeats_no_finished_run(
    stand_in, tmp_path, capsys, monkeypatch
):
    """A run that fails leaves the others alone; more seeds join a study."""
    folder, flags = tmp_path / "s", ["--lr", 0.1, 0.2, "--output-dir", tmp_path / "s"]
    monkeypatch.setenv("BEHAVIOUR", "bad 0 0.1")
    with pytest.raises(UserError, match=r"1 of 2 runs failed: lr 0.1, seed 0 \(exit code 2\); --resume"):
        run(stand_in, *flags, "--seeds", 0)
    assert "0.9000" in capsys.readouterr().out  # the table of the others
    monkeypatch.delenv("BEHAVIOUR")
    with pytest.raises(UserError, match="holds another run"):
        parse(*flags, "--seeds", 0)
    run(stand_in, "--resume", folder)
    assert starts(folder) == {"lr-0.1/seed-0": 2, "lr-0.2/seed-0": 1}
    capsys.readouterr()
    run(stand_in, "--resume", folder, "--seeds", 1)
    assert "best setting by validation loss: lr 0.1\n" in (screen := capsys.readouterr().out)
    assert "0.5500 ± " in screen and "0.8000 ± " in screen, "of both seeds"
    assert starts(folder) == {
        "lr-0.1/seed-0": 2, "lr-0.1/seed-1": 1, "lr-0.2/seed-0": 1, "lr-0.2/seed-1": 1
    }  # fmt: skip
    run(stand_in, "--resume-or-start", *flags, "--seeds", 0, 1)
    assert sum(starts(folder).values()) == 5
    joined = train_classifier.plan_study(parse("--resume", folder, "--lr", 0.3, "--seeds", 7))
    assert [run.describe() for run in joined.runs] == [
        f"lr 0.{rate}, seed {seed}" for rate in (1, 2, 3) for seed in (0, 1, 7)
    ]
    for changed, named in (
        (["--epochs", 9], "--epochs was 3, is 9"),
        (["--grid", "batch-size=1,2"], "that are varied were lr, are batch-size, lr"),
    ):
        with pytest.raises(UserError, match=named):
            parse("--resume", folder, *changed)
    (folder / "study.json").write_text("{")
    with pytest.raises(UserError, match=r"study.json is damaged"):
        parse("--resume", folder)


def test_new_values_of_one_flag_join_a_study_that_varies_several(stand_in, tmp_path):
    folder, grid = tmp_path / "s", ["--grid", "batch-size=8,16", "--grid", "warmup-ratio=0,0.1"]
    run(stand_in, *grid, "--output-dir", folder)
    run(stand_in, "--resume", folder, "--grid", "warmup-ratio=0.2,0.1")
    joined = train_classifier.plan_study(parse("--resume", folder, "--grid", "batch-size=32"))
    assert [run.describe() for run in joined.runs] == [
        f"batch-size {size}, warmup-ratio {ratio}, seed 0" for size in (8, 16, 32) for ratio in (0, 0.1, 0.2)
    ]
    assert [run.folder.is_dir() for run in joined.runs] == 6 * [True] + 3 * [False], "the old ones stay"


def test_the_runs_of_a_study_have_the_same_data(stand_in, tmp_path, monkeypatch):
    """Runs of other data would be in one table; data that no run has finished with may be corrected."""
    rows, other, folder = tmp_path / "rows.csv", tmp_path / "other.csv", tmp_path / "s"
    rows.write_text("text,label\na,pos\nb,neg\n")
    other.write_text("text,label\na,pos\nc,neg\n")
    flags = ["--dataset", rows, "--seeds", 0, "--output-dir", folder]
    monkeypatch.setenv("BEHAVIOUR", "bad 0 0.1")
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        run(stand_in, *flags)
    monkeypatch.delenv("BEHAVIOUR")
    rows.write_text("text,label\na,pos\nb,neg\nd,pos\n")
    run(stand_in, "--resume", folder)
    written = (folder / "study.json").read_bytes()
    with pytest.raises(UserError, match="the data of --dataset are not those of its finished runs; restore"):
        run(stand_in, "--resume", folder, "--dataset", other, "--seeds", 2)
    assert (folder / "study.json").read_bytes() == written
    rows.rename(tmp_path / "moved.csv")
    run(stand_in, "--resume", folder, "--dataset", tmp_path / "moved.csv", "--seeds", 1)
    with pytest.raises(UserError, match="the data of --test-file are not those"):
        run(stand_in, "--resume", folder, "--test-file", other)
    (tmp_path / "moved.csv").write_text("text,label\na,pos\n")
    with pytest.raises(UserError, match="are not those of its finished runs"):
        run(stand_in, "--resume", folder)


def test_values_of_data_are_known_by_their_value(stand_in, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text(f"text,label\n{name},pos\n{name},neg\n")
    folder = tmp_path / "s"
    run(stand_in, "--grid", f"dataset={tmp_path / 'x'}", "--output-dir", folder)
    run(stand_in, "--resume", folder, "--grid", f"dataset={tmp_path / 'y'}")
    (tmp_path / "x" / "test.csv").write_text("text,label\na,pos\n")
    with pytest.raises(UserError, match=f"the data of --dataset {tmp_path / 'x'} are not those"):
        run(stand_in, "--resume", folder)


def test_a_study_that_was_started_in_another_folder(stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("text,label\na,pos\nb,neg\n")
    run(stand_in, "--dataset", "rows.csv", "--seeds", 0, 1, "--output-dir", "s")
    monkeypatch.chdir(tmp_path / "s")
    with pytest.raises(UserError, match=f"started in {tmp_path}, and its --dataset rows.csv is not here"):
        parse("--resume", tmp_path / "s")


def test_a_fault_that_all_runs_would_have_ends_a_study(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", "wrong 0")
    with pytest.raises(UserError, match="seed 0 failed before it began"):
        run(stand_in, "--seeds", 0, 1, "--output-dir", tmp_path / "s")
    assert starts(tmp_path / "s") == {"seed-0": 1}


def test_a_run_on_each_gpu_at_the_same_time(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    monkeypatch.setenv("BEHAVIOUR", "slow")
    plan = train_classifier.plan_study(parse("--seeds", 0, 1, "--output-dir", tmp_path / "s"))
    study.run_study(plan, stand_in, device="auto", max_minutes=None)
    lines = [path.read_text().split() for path in sorted((tmp_path / "s").rglob("starts"))]
    assert [device for device, _ in lines] == ["3", "GPU-abc"]
    assert abs(float(lines[0][1]) - float(lines[1][1])) < 0.5
    assert (tmp_path / "s" / "seed-1.log").read_text() == "ran 1 0.1\n"
    assert study.gpus("cpu") == [] and study.gpus("cuda") == ["3", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert study.gpus("auto") == []


RUN_A_STUDY = """
import sys
from pathlib import Path
import train_classifier
from common import cli
from common.training import study
args = train_classifier.make_parser().parse_args(sys.argv[2:])
plan = train_classifier.plan_study(args)
run = lambda args: study.run_study(plan, Path(sys.argv[1]), device="cpu", max_minutes=None)
cli.run_main(run, args, prog="study")
"""


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_stops_the_runs_and_says_how_to_go_on(number, code, stand_in, forking, tmp_path):
    """Also SIGKILL, which a process can't pass on: the system ends the run."""
    folder, program = tmp_path / "s t", tmp_path / "run_a_study.py"
    waiting = folder / "seed-0" / "waiting"
    program.write_text(RUN_A_STUDY)
    command = [program, stand_in, "--seeds", 0, 1, "--output-dir", folder]
    behaviour = {"BEHAVIOUR": "wait 0", "IDENTITIES": "{}"}
    forking.begin(command=list(map(str, command)), environment=behaviour)
    [process] = forking.processes()
    while not waiting.exists():
        assert forking.processes() == [process], forking.said()
        time.sleep(0.01)
    os.kill(process, number)
    assert forking.wait() == [code]
    deadline, run = time.monotonic() + 30, int(waiting.read_text())
    while is_alive(run):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if number == signal.SIGTERM:
        assert f"stopped by SIGTERM; continue with --resume '{folder}'" in forking.said()
    assert starts(folder) == {"seed-0": 1}


SIGNAL_AT_A_START = """
import os, signal, subprocess
class Popen(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen = Popen
"""


def test_a_signal_that_comes_while_a_run_is_started_stops_it(stand_in, forking, tmp_path):
    """It comes when the process is there and the study does not know it yet."""
    folder, program = tmp_path / "s", tmp_path / "run_a_study.py"
    program.write_text(SIGNAL_AT_A_START + RUN_A_STUDY)
    command = [program, stand_in, "--seeds", 0, 1, "--output-dir", folder]
    behaviour = {"BEHAVIOUR": "wait 0", "IDENTITIES": "{}"}
    forking.begin(command=list(map(str, command)), environment=behaviour)
    assert forking.wait() == [143], forking.said()
    assert f"stopped by SIGTERM; continue with --resume {folder}" in forking.said()
    assert not (folder / "seed-0" / "metrics.json").exists() and not (folder / "seed-1").exists()


@pytest.mark.timeout(600)  # two processes that import everything, on a machine that may be busy
@pytest.mark.slow
def test_runs_of_a_study_are_those_of_single_commands_to_the_bit(
    call_script, run_script, tiny_model, sentences_csv, cache_dir, tmp_path
):
    """One seed for both splits of the data, two for the training; the checkpoints are gone at the end."""
    shared = ["--model", tiny_model, "--dataset", sentences_csv, "--cache-dir", cache_dir, "--split-seed", 5]
    shared += ["--epochs", 1, "--max-train-samples", 40, "--max-length", 20, "--dropout", 0.1, "--lr", "3e-3"]
    folder = tmp_path / "study"
    study_flags = [*shared, "--seeds", 1, 2, "--output-dir", folder]
    done = run_script("train_classifier.py", *study_flags, OMP_NUM_THREADS="1")  # as the single commands
    assert "run 2 of 2: seed 2, in" in done.stdout
    weights = []
    for seed in (1, 2):
        single = tmp_path / f"single-{seed}"
        call_script("train_classifier.py", *shared, "--seed", seed, "--output-dir", single)
        one, other = (
            load_file(path / "best" / "model.safetensors") for path in (single, folder / f"seed-{seed}")
        )
        assert all(one[name].equal(other[name]) for name in one.keys() | other.keys())
        assert (single / "predictions.csv").read_bytes() == (
            folder / f"seed-{seed}" / "predictions.csv"
        ).read_bytes()
        assert not (folder / f"seed-{seed}" / "checkpoints").exists() and (single / "checkpoints").is_dir()
        weights.append(one)
    assert not all(weights[0][name].equal(weights[1][name]) for name in weights[0]), "seeds differ"
    rows = [
        list(csv.DictReader((folder / f"seed-{seed}" / "predictions.csv").read_text().splitlines()))
        for seed in (1, 2)
    ]
    assert [row["text"] for row in rows[0]] == [row["text"] for row in rows[1]], "one split"
    accuracies = [
        json.loads((folder / f"seed-{seed}" / "metrics.json").read_text())["test_accuracy"] for seed in (1, 2)
    ]
    assert f"{np.mean(accuracies):.4f} ± {np.std(accuracies, ddof=1):.4f}" in done.stdout
    compared = call_script("train_classifier.py", "--compare", folder).stdout
    assert "test rows: 12, the same in all runs" in compared and "McNemar, exact (" in compared
    assert re.search(r"^run +seed +accuracy", compared, re.M), "what differs is the seed alone"
