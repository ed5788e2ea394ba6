"""Several labels, numbers and pairs through the command line: what a run leaves, and that transformers'
pipeline, --predict, a second look and a second process answer as the run did.
"""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from sklearn import metrics as sklearn_metrics
from transformers import AutoConfig, pipeline

from conftest import POSITIVE, make_sentences

TOXIC = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
FLAGS = ["--epochs", 2, "--max-length", 32, "--lr", "5e-3", "--precision", "fp32", "--log-every", 3]


def toxic_comments(path: Path) -> None:
    """Write the shape of the toxic comments of Kaggle: a text in quotation marks, and six columns of 0
    and 1.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_MINIMAL)
        writer.writerow(["id", "comment_text", *TOXIC])
        for number, (text, label) in enumerate(make_sentences(120)):
            found = [word in text for word in ("bad", "awful", "grim", "film")]
            flags = [label == "neg", *found, number % 15 == 2]
            writer.writerow([f"{number:016x}", f'{text},\n"quoted"', *map(int, flags)])


def scored_texts(path: Path) -> None:
    """Write texts with the share of their good words, from 0 to 5."""
    rows = ["text,score"]
    for text, _ in make_sentences(120):
        words = text.split()
        rows.append(f"{text},{5 * sum(word in POSITIVE for word in words) / len(words):.3f}")
    path.write_text("\n".join(rows) + "\n")


@dataclass(frozen=True)
class Case:
    """A file of a task, the flags that read it, and what its answers are called."""

    kind: str
    write: Callable[[Path], None]
    file: str
    flags: tuple[str, ...]
    names: tuple[str, ...]


MULTI = Case(
    "multi",
    toxic_comments,
    "train.csv",
    ("--text-column", "comment_text", "--label-column", ",".join(TOXIC), "--class-weights", "balanced"),
    TOXIC,
)
REGRESSION = Case(
    "regression", scored_texts, "scores.csv", ("--label-column", "score", "--best-metric", "rmse"), ("score",)
)
CASES = [pytest.param(case, id=case.kind) for case in (MULTI, REGRESSION)]


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    folder: Path
    data: list
    said: str

    @property
    def rows(self) -> list[dict]:
        """The rows of its predictions.csv."""
        with open(self.folder / "predictions.csv", newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @property
    def results(self) -> dict:
        """The content of its metrics.json."""
        return json.loads((self.folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(forked_runs, tmp_path_factory):
    """Return a function that gives the finished run of a case."""
    forked_runs.flags, made = FLAGS, {}

    def get(case: Case) -> Finished:
        if case.kind not in made:
            folder = tmp_path_factory.mktemp(case.kind)
            case.write(folder / case.file)
            data = ["--dataset", folder / case.file, *case.flags]
            assert forked_runs.run(folder / "run", *data) == [0], forked_runs.said()
            made[case.kind] = Finished(folder / "run", data, forked_runs.said("stdout"))
        return made[case.kind]

    return get


def truth_of(rows: list[dict], case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what predictions.csv holds as arrays (N, C): the truth, the answers, the scores."""
    if case.kind == "regression":
        true, predicted = (
            np.array([[float(row[f"{what} {name}"]) for name in case.names] for row in rows])
            for what in ("true", "predicted")
        )
        return true, predicted, predicted
    true, predicted = (
        np.array([[name in row[what].split("|") for name in case.names] for row in rows])
        for what in ("true", "predicted")
    )
    return true, predicted, np.array([[float(row[f"score {name}"]) for name in case.names] for row in rows])


@pytest.mark.parametrize("case", CASES)
def test_a_run_finds_its_task_and_leaves_scores_that_agree(case, finished):
    """Oracle: the scores that scikit-learn and scipy compute from predictions.csv and the file itself."""
    run = finished(case)
    assert re.search(rf"^task     {case.kind}: .*found from the labels; --task", run.said, re.M)
    true, predicted, scores = truth_of(run.rows, case)
    results = {name.removeprefix("test_"): value for name, value in run.results.items()}
    if case.kind == "multi":
        expected = {
            "subset_accuracy": sklearn_metrics.accuracy_score(true, predicted),
            "label_accuracy": (true == predicted).mean(),
            "micro_f1": sklearn_metrics.f1_score(true, predicted, average="micro", zero_division=0),
            "macro_f1": sklearn_metrics.f1_score(true, predicted, average="macro", zero_division=0),
        }
        assert ((scores >= 0.5) == predicted).all()
    else:
        expected = {
            "rmse": sklearn_metrics.root_mean_squared_error(true, predicted),
            "mae": sklearn_metrics.mean_absolute_error(true, predicted),
            "pearson": stats.pearsonr(true[:, 0], predicted[:, 0])[0],
            "spearman": stats.spearmanr(true[:, 0], predicted[:, 0])[0],
        }
    assert {name: results[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    with open(run.data[1], newline="", encoding="utf-8") as file:
        source = list(csv.DictReader(file))
    for row, values in zip(run.rows, true):
        cells = source[int(row["row"]) - 1]
        assert row["text"] == cells[case.flags[1] if case.kind == "multi" else "text"]
        assert [float(cells[name]) for name in case.names] == values.tolist()


@pytest.mark.parametrize("case", CASES)
def test_report_card_curves_and_pictures_are_those_of_the_task(case, finished):
    run = finished(case)
    report, card = (run.folder / name for name in ("report.md", "best/README.md"))
    picture = {"multi": "labels.png", "regression": "scatter.png"}[case.kind]
    for name in re.findall(r"\]\((\S+\.png)\)", report.read_text()):
        pixels = matplotlib.image.imread(run.folder / name)
        assert min(pixels.shape[:2]) > 150 and pixels.std() > 0.05, "not a blank picture"
    assert picture in report.read_text() and "confusion" not in report.read_text()
    for name, value in run.results.items():
        if name in ("test_loss", "test_macro_f1", "test_rmse", "test_spearman"):
            assert f"{value:.4f}" in report.read_text() and f"{value:.4f}" in card.read_text(), name
    assert all(
        name.replace("_", "") in card.read_text().replace("\\", "").replace("_", "") for name in case.names
    )
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    logged = {name for line in lines for name in line}
    wanted = {
        "multi": {
            "validation/subset_accuracy",
            "test/roc_auc",
            "test_f1/toxic",
            "validation_threshold/threat",
        },
        "regression": {"validation/rmse", "test/spearman", "test_mae/score"},
    }
    assert wanted[case.kind] <= logged


@pytest.mark.parametrize("case", CASES)
def test_pipeline_answers_as_predict_and_the_run_do(case, finished, call_script):
    """transformers applies what the problem type asks for: a sigmoid to each label, nothing to numbers."""
    run = finished(case)
    config = AutoConfig.from_pretrained(run.folder / "best")
    problems = {"multi": "multi_label_classification", "regression": "regression"}
    assert config.problem_type == problems[case.kind]
    assert list(config.id2label.values()) == list(case.names)
    rows = run.rows
    texts = [" ".join(row["text"].split()) for row in rows]
    model = run.folder / "best"
    done = call_script(
        *("train_classifier.py", "--model", model, "--predict", "-", "--precision", "fp32"),
        stdin="\n".join(texts) + "\n",
    )
    classify = pipeline("text-classification", model=str(model), device="cpu", top_k=None)
    num_short = 0
    for row, text, line in zip(rows, texts, done.stdout.splitlines(), strict=True):
        answer = json.loads(line)
        expected = {score["label"]: score["score"] for score in classify([text], truncation=True)[0]}
        if case.kind == "multi":
            assert answer["labels"] == [name for name in case.names if answer["scores"][name] >= 0.5]
        if len(classify.tokenizer(text)["input_ids"]) > 32:
            continue  # the pipeline reads only its beginning
        num_short += 1
        assert answer["scores"] == pytest.approx(expected, abs=1e-4)
        written = "predicted score" if case.kind == "regression" else "score toxic"
        assert float(row[written]) == pytest.approx(expected[case.names[0]], abs=1e-4)
    assert num_short >= 3


@pytest.mark.parametrize("case", CASES)
def test_evaluate_only_and_inspect_know_the_task(case, finished, call_script, tiny_model, cache_dir):
    run = finished(case)
    names = [flag for flag in run.data if not str(flag).startswith(("--class", "--best", "balanced", "rmse"))]
    common = ["--cache-dir", cache_dir, "--precision", "fp32", "--max-length", 32]
    done = call_script(
        "train_classifier.py", "--model", run.folder / "best", *names, "--evaluate-only", *common
    )
    [line] = re.findall(r"^.* on 12 texts$", run.said, re.M)
    assert line in done.stdout
    done = call_script("train_classifier.py", "--model", tiny_model, *names, "--inspect", *common)
    shown = done.stdout[done.stdout.index("SPLITS") : done.stdout.index("LENGTHS")]
    assert done.stderr == "" and all(name in shown for name in case.names)
    if case.kind == "multi":
        assert re.search(r"^toxic +\d+ +\d+ +\d+$", shown, re.M) and "no label" in shown


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_as_one_that_was_never_stopped(case, finished, forked_runs, tmp_path):
    run, folder = finished(case), tmp_path / "run"
    flags = [*run.data, "--save-every", 4]
    assert forked_runs.run(folder, *flags, event=150) == [-9] and list(folder.glob("checkpoints/step-*"))
    assert forked_runs.run(folder, *flags, "--resume") == [0], forked_runs.said()
    assert ": after step" in forked_runs.said("stdout")
    first, second = (load_file(path / "best" / "model.safetensors") for path in (run.folder, folder))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert (folder / "predictions.csv").read_bytes() == (run.folder / "predictions.csv").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(case, finished, forked_runs, tmp_path):
    """93 texts in steps of 8 leave 5 for the last, of which one process gets 3."""
    data = [*finished(case).data, "--epochs", 1, "--max-train-samples", 93]
    assert forked_runs.run(tmp_path / "one", *data) == [0], forked_runs.said()
    assert forked_runs.run(tmp_path / "two", *data, kind="two processes") == [0, 0], forked_runs.said()
    one, two = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("one", "two"))
    for name in one | two:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=name)
    results = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], rel=1e-3)


@pytest.mark.parametrize(
    "case, flags, parts",
    [
        (MULTI, ["--best-metric", "accuracy"], ["--best-metric accuracy", "multi", "subset_accuracy"]),
        (REGRESSION, ["--best-metric", "macro_f1"], ["--best-metric macro_f1", "regression", "rmse"]),
        (REGRESSION, ["--label-smoothing", 0.1], ["--label-smoothing 0.1", "regression"]),
        (REGRESSION, ["--class-weights", "balanced"], ["--class-weights balanced", "regression"]),
        (REGRESSION, ["--label-separator", ";"], ["--label-separator ;", "multi"]),
    ],
)
@pytest.mark.parametrize("given", [True, False], ids=["named", "found"])
def test_flags_that_mean_nothing_in_a_task_are_refused(
    case, flags, parts, given, finished, call_script, tiny_model
):
    run = finished(case)
    task = ["--task", case.kind] if given or "--label-separator" in flags else []
    done = call_script("train_classifier.py", "--model", tiny_model, *run.data, *flags, *task, check=False)
    assert done.returncode == 2 and all(part in done.stderr for part in parts), done.stderr
    assert len(done.stderr.splitlines()) == 1
