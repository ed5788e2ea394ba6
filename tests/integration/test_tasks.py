"""Several labels, numbers and pairs through the command line: what a run leaves, and that
transformers' pipeline, --predict, a second look and a second process answer as the run did.
"""

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from scipy import stats
from sklearn import metrics as sklearn_metrics
from transformers import AutoConfig, AutoTokenizer, pipeline

from conftest import POSITIVE, heavy, make_sentences, train_wordpiece

TOXIC = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
FLAGS = ["--epochs", 2, "--max-length", 32, "--lr", "5e-3", "--precision", "fp32", "--log-every", 3]


def toxic_comments(path: Path) -> None:
    """Write the shape of the toxic comments of Kaggle: a text in quotation marks, and six columns
    of 0 and 1.
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


def pairs_of_texts() -> list[tuple[str, str, bool]]:
    """Return pairs of texts, each with whether both are good or both bad; some with a quotation
    mark that is not closed.
    """
    texts = make_sentences(240)
    pairs = []
    for number in range(120):
        (first, label), (second, other) = texts[number], texts[239 - number if number % 3 else 238 - number]
        marks = ('"', "") if number % 7 == 0 else ("", "")
        pairs.append((marks[0] + first, second + ' he said "so' * (number % 5 == 0), label == other))
    return pairs


def paraphrases(path: Path) -> None:
    """Write the shape of MRPC: tabs, a header of odd names, quotation marks that are text."""
    rows = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    for number, (first, second, same) in enumerate(pairs_of_texts()):
        rows.append(f"{int(same)}\t{number}\t{number + 1000}\t{first}\t{second}")
    path.write_text("\n".join(rows) + "\n")


def similar_texts(path: Path) -> None:
    """Write the shape of STS-B: ten columns between tabs, scores from 0.000 to 5.000."""
    names = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
    rows = ["\t".join(names.split())]
    for number, (first, second, same) in enumerate(pairs_of_texts()):
        score = 3 * same + (number * 8 % 21) / 10
        cells = ["main-news", "headlines", "2012", f"{number:04}", "none", "none"]
        rows.append("\t".join([str(number), *cells, first, second, f"{score:.3f}"]))
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
PAIR = ("--text-mode", "pair", "--max-length", "48")
MRPC = Case(
    "single",
    paraphrases,
    "msr_paraphrase_train.tsv",
    (
        "--text-column",
        "#1 String,#2 String",
        *PAIR,
        "--label-column",
        "Quality",
        "--best-metric",
        "binary_f1",
    ),
    ("0", "1"),
)
STS_B = Case(
    "regression",
    similar_texts,
    "train.tsv",
    ("--text-column", "sentence1,sentence2", *PAIR, "--label-column", "score", "--best-metric", "pearson"),
    ("score",),
)
PAIRS = [heavy(MRPC, id=MRPC.file), pytest.param(STS_B, id=STS_B.file)]
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

    @property
    def intervals(self) -> dict[str, list[float]]:
        """The intervals of its test scores."""
        return self.results["test_intervals"]


@pytest.fixture(scope="module")
def finished(forked_runs, tmp_path_factory):
    """Return a function that gives the finished run of a case."""
    forked_runs.flags, made = FLAGS, {}

    def get(case: Case) -> Finished:
        if case not in made:
            folder = tmp_path_factory.mktemp(case.kind)
            case.write(folder / case.file)
            data = ["--dataset", folder / case.file, *case.flags]
            assert forked_runs.run(folder / "run", *data, pictures=True) == [0], forked_runs.said()
            made[case] = Finished(folder / "run", data, forked_runs.said("stdout"))
        return made[case]

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
            "r2": sklearn_metrics.r2_score(true, predicted),
            "pearson": stats.pearsonr(true[:, 0], predicted[:, 0])[0],
            "spearman": stats.spearmanr(true[:, 0], predicted[:, 0])[0],
        }
    assert {name: results[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    answer = results["baseline"]["answer"]
    always = [float(name in answer) for name in case.names] if case.kind == "multi" else answer
    first = "subset_accuracy" if case.kind == "multi" else "rmse"
    score = {"multi": sklearn_metrics.accuracy_score, "regression": sklearn_metrics.root_mean_squared_error}
    same = np.broadcast_to(always, true.shape)
    assert results["baseline"][first] == pytest.approx(score[case.kind](true, same), abs=1e-4)
    assert run.said.count("\nbaseline, always ") == 1
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
        else:
            assert {"score": answer["prediction"]} == answer["scores"]
        if len(classify.tokenizer(text)["input_ids"]) > 32:
            continue  # the pipeline reads only its beginning
        num_short += 1
        assert answer["scores"] == pytest.approx(expected, abs=1e-4)
        written = "predicted score" if case.kind == "regression" else "score toxic"
        assert float(row[written]) == pytest.approx(expected[case.names[0]], abs=1e-4)
    assert num_short >= 3


@pytest.mark.parametrize("case", PAIRS)
def test_a_pair_is_read_by_pipeline_and_predict_as_the_run_read_it(case, finished, call_script, tmp_path):
    """Predicted without flags from lines with a tab, and from the file itself."""
    run = finished(case)
    assert re.search(rf"^task     {case.kind}: ", run.said, re.M)
    rows, model = run.rows, run.folder / "best"
    source = [line.split("\t") for line in Path(run.data[1]).read_text().splitlines()[1:]]
    texts = [
        tuple(source[int(row["row"]) - 1][column] for column in ((3, 4) if case is MRPC else (7, 8)))
        for row in rows
    ]
    assert [(row["text"], row["text_pair"]) for row in rows] == texts
    classify = pipeline("text-classification", model=str(model), device="cpu", top_k=None)
    common = ("train_classifier.py", "--model", model, "--precision", "fp32", "--predict")
    lines = call_script(*common, "-", stdin="".join(f"{first}\t{second}\n" for first, second in texts)).stdout
    whole = call_script(*common, run.data[1]).stdout.splitlines()
    num_short = 0
    for row, (first, second), line in zip(rows, texts, lines.splitlines(), strict=True):
        answer = json.loads(line)
        assert json.loads(whole[int(row["row"]) - 1])["scores"] == pytest.approx(answer["scores"], abs=1e-4)
        name = case.names[-1]
        written = "predicted score" if case.kind == "regression" else f"score {name}"
        assert float(row[written]) == pytest.approx(answer["scores"][name], abs=1e-4)
        if len(classify.tokenizer(first, second)["input_ids"]) <= 48:
            num_short += 1
            expected = classify({"text": first, "text_pair": second}, truncation=True)
            assert answer["scores"] == pytest.approx(
                {one["label"]: one["score"] for one in expected}, abs=1e-4
            )
    assert num_short >= 2
    assert '"text_pair"' in (model / "README.md").read_text()


def test_parts_of_a_text_are_joined_and_a_blank_one_left_out(call_script, tiny_model, cache_dir, tmp_path):
    rows = ["title,body,label"]
    rows += [
        f"{text if n % 4 else ''},{label} {text},{label}"
        for n, (text, label) in enumerate(make_sentences(40))
    ]
    (tmp_path / "news.csv").write_text("\n".join(rows) + "\n")
    flags = ["--dataset", tmp_path / "news.csv", "--text-column", "title,body", "--text-mode", "join"]
    flags += ["--join-with", " | ", "--cache-dir", cache_dir, "--epochs", 1, "--precision", "fp32"]
    common = ("train_classifier.py", "--model")
    call_script(*common, tiny_model, *flags, "--output-dir", tmp_path / "run")
    run = Finished(tmp_path / "run", [], "")
    for row in run.rows:
        title, body, _ = rows[int(row["row"])].split(",")
        assert row["text"] == (f"{title} | {body}" if title else body)
    done = call_script(
        *common, tmp_path / "run" / "best", "--predict", tmp_path / "news.csv", "--precision", "fp32"
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for row in run.rows:
        assert answers[int(row["row"]) - 1]["confidence"] == pytest.approx(float(row["confidence"]), abs=1e-4)


def test_thresholds_are_chosen_on_validation_saved_and_used(finished, forked_runs, call_script, tmp_path):
    """Oracle: the F1 of scikit-learn on the validation texts, which --evaluate-only scores too."""
    run, folder = finished(MULTI), tmp_path / "run"
    assert forked_runs.run(folder, *run.data, "--threshold", "auto") == [0], forked_runs.said()
    settings = json.loads((folder / "best" / "training.json").read_text())
    chosen = dict(zip(TOXIC, settings["thresholds"], strict=True))
    assert len(set(chosen.values())) > 1
    again = Finished(folder, run.data, "")
    true, predicted, scores = truth_of(again.rows, MULTI)
    assert ((scores >= np.array(list(chosen.values()))) == predicted).all()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = again.results["best_epoch"]
    [found] = [line for line in lines if "validation/loss" in line][best - 1 : best]
    assert {name: found[f"validation_threshold/{name}"] for name in TOXIC} == chosen
    plain = [line for line in map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())]
    [before] = [line for line in plain if "validation/loss" in line][best - 1 : best]
    assert before["validation/loss"] == found["validation/loss"]
    assert before["validation/macro_f1"] < found["validation/macro_f1"]
    text = again.rows[0]["text"].replace("\n", " ")
    common = ("train_classifier.py", "--model", folder / "best", "--predict", "-", "--precision", "fp32")
    for flags, limits in (([], chosen), (["--threshold", 0.2], dict.fromkeys(TOXIC, 0.2))):
        answer = json.loads(call_script(*common, *flags, stdin=text + "\n").stdout)
        assert answer["labels"] == [name for name in TOXIC if answer["scores"][name] >= limits[name]]


@pytest.mark.parametrize("schedule", ["linear", "cosine", heavy("constant")])
def test_a_run_has_as_many_steps_as_asked_for_on_its_schedule(schedule, finished, forked_runs, tmp_path):
    """It ends within an epoch, killed and continued too. Oracle: transformers' schedules."""
    data, flags = finished(REGRESSION).data, ["--max-steps", 15, "--log-every", 1, "--warmup-ratio", 0.2]
    flags += ["--schedule", schedule]
    assert forked_runs.run(tmp_path / "run", *data, *flags) == [0], forked_runs.said()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train/learning_rate"] for line in lines if "train/loss" in line]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-3)
    options = {} if schedule == "constant" else {"num_training_steps": 15}
    scheduler = transformers.get_scheduler(
        f"{schedule}_with_warmup" if schedule == "constant" else schedule, optimizer, 3, **options
    )
    expected = []
    for _ in range(15):
        optimizer.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    assert rates == pytest.approx(expected)
    assert [line["step"] for line in lines if "validation/loss" in line] == [12, 15]
    assert "epoch 1.25/2" in forked_runs.said("stdout")
    if schedule == "linear":
        killed = tmp_path / "killed"
        assert forked_runs.run(killed, *data, *flags, "--save-every", 4, event=160) == [-9]
        assert forked_runs.run(killed, *data, *flags, "--save-every", 4, "--resume") == [0], (
            forked_runs.said()
        )
        first, second = (
            load_file(path / "best" / "model.safetensors") for path in (tmp_path / "run", killed)
        )
        assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_another_tokenizer_is_used_and_saved_and_refused_where_its_ids_do_not_fit(
    call_script, tiny_model, sentences_csv, cache_dir, tmp_path
):
    other = tmp_path / "other"
    train_wordpiece([text for text, _ in make_sentences(50, seed=5)], vocab_size=120).save_pretrained(other)
    shutil.copy(tiny_model / "config.json", other)
    shutil.copy(tiny_model / "model.safetensors", other)
    common = (
        "train_classifier.py",
        "--model",
        tiny_model,
        "--dataset",
        sentences_csv,
        "--cache-dir",
        cache_dir,
    )
    call_script(*common, "--tokenizer", other, "--epochs", 1, "--output-dir", tmp_path / "run")
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "best")
    assert saved.get_vocab() == AutoTokenizer.from_pretrained(other).get_vocab()
    bundled = "bundled/all-MiniLM-L6-v2"
    done = call_script(*common, "--tokenizer", bundled, "--output-dir", tmp_path / "none", check=False)
    assert (
        done.returncode == 2 and f"--tokenizer {bundled}: the tokenizer's ids go up to 30521" in done.stderr
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("case", CASES)
def test_evaluate_only_and_inspect_know_the_task(case, finished, call_script, tiny_model, cache_dir):
    run = finished(case)
    names = [flag for flag in run.data if not str(flag).startswith(("--class", "--best", "balanced", "rmse"))]
    common = ["--cache-dir", cache_dir, "--precision", "fp32", "--max-length", 32]
    done = call_script(
        "train_classifier.py", "--model", run.folder / "best", *names, "--evaluate-only", *common
    )
    for said in (r"^.* on 12 texts$", r"^baseline, always .*$"):
        [line] = re.findall(said, run.said, re.M)
        assert line in done.stdout
    done = call_script("train_classifier.py", "--model", tiny_model, *names, "--inspect", *common)
    shown = done.stdout[done.stdout.index("SPLITS") : done.stdout.index("LENGTHS")]
    assert done.stderr == "" and all(name in shown for name in case.names)
    if case.kind == "multi":
        assert re.search(r"^toxic +\d+ +\d+ +\d+$", shown, re.M) and "no label" in shown


@pytest.mark.parametrize("case", [pytest.param(MULTI, id="multi"), heavy(REGRESSION, id="regression")])
def test_a_killed_run_ends_as_one_that_was_never_stopped(case, finished, forked_runs, tmp_path):
    run, folder = finished(case), tmp_path / "run"
    flags = [*run.data, "--save-every", 4]
    assert forked_runs.run(folder, *flags, event=150) == [-9] and list(folder.glob("checkpoints/step-*"))
    assert forked_runs.run(folder, *flags, "--resume") == [0], forked_runs.said()
    assert ": after step" in forked_runs.said("stdout")
    first, second = (load_file(path / "best" / "model.safetensors") for path in (run.folder, folder))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert (folder / "predictions.csv").read_bytes() == (run.folder / "predictions.csv").read_bytes()


def scored_twice(path: Path) -> None:
    """Write texts with two numbers: their share of good words, and how many words they have."""
    rows = ["text,good,length"]
    for text, _ in make_sentences(120):
        words = text.split()
        rows.append(f"{text},{sum(word in POSITIVE for word in words) / len(words):.3f},{len(words) / 10}")
    path.write_text("\n".join(rows) + "\n")


def titled_texts(path: Path) -> None:
    """Write texts in two columns, of which the first may be empty."""
    rows = ["title,body,label"]
    for number, (text, label) in enumerate(make_sentences(120)):
        title, _, body = text.partition(" ")
        rows.append(f"{title if number % 4 else ''},{body},{label}")
    path.write_text("\n".join(rows) + "\n")


SEVERAL = Case("regression", scored_twice, "twice.csv", ("--label-column", "good,length"), ("good", "length"))
JOINED = Case(
    "single",
    titled_texts,
    "titled.csv",
    ("--text-column", "title,body", "--text-mode", "join", "--calibrate"),
    ("neg", "pos"),
)
IN_TWO = [
    pytest.param(case, id=case.file, marks=[] if case is MULTI else pytest.mark.slow)
    for case in (MULTI, STS_B, REGRESSION, SEVERAL, MRPC, JOINED)
]


def in_steps(case: Case, folder: Path) -> list:
    """Write the data of a case, and return the flags of a run of 12 steps: 93 texts in steps of 8
    leave 5 for the last, of which one of two processes gets 3.
    """
    case.write(folder / case.file)
    data = ["--dataset", folder / case.file, *case.flags, "--save-every", 4]
    return [*data, "--epochs", 1, "--max-train-samples", 93]


def require_same_outcome(run: Finished, other: Finished, *, exact: bool) -> None:
    """Compare weights, all test scores and predictions: bit by bit, or but for what another order
    of sums changes.
    """
    one, two = (load_file(path.folder / "best" / "model.safetensors") for path in (run, other))
    tolerance = 0.0 if exact else 1e-4
    for name in one | two:
        torch.testing.assert_close(one[name], two[name], rtol=10 * tolerance, atol=tolerance, msg=name)
    scores = [
        {**path.results, **{f"test_{name} from, to": limits for name, limits in path.intervals.items()}}
        for path in (run, other)
    ]
    names = [name for name in scores[0] if name.startswith("test_") and "second" not in name]
    names = [name for name in names if name not in ("test_intervals", "test_baseline")]
    assert scores[0]["test_baseline"] == scores[1]["test_baseline"]
    assert len(names) > 8
    for name in names:
        # correlations of few numbers magnify their last digits
        expected = pytest.approx(scores[0][name], rel=10 * tolerance, abs=10 * tolerance)
        assert scores[1][name] == expected, name
    for row, same in zip(run.rows, other.rows, strict=True):
        for name, cell in row.items():
            if cell != same[name]:
                assert float(cell) == pytest.approx(float(same[name]), rel=10 * tolerance, abs=tolerance)


@pytest.mark.parametrize("case", IN_TWO)
def test_two_processes_learn_what_one_does(case, forked_runs, tmp_path):
    forked_runs.flags = FLAGS
    data = in_steps(case, tmp_path)
    assert forked_runs.run(tmp_path / "one", *data) == [0], forked_runs.said()
    assert forked_runs.run(tmp_path / "two", *data, kind="two processes") == [0, 0], forked_runs.said()
    require_same_outcome(*(Finished(tmp_path / name, data, "") for name in ("one", "two")), exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(*case.values, id=case.id) for case in IN_TWO])
def test_two_processes_resume_to_the_bit(case, forked_runs, tmp_path):
    """test_resume.py kills such a run of classes by default."""
    forked_runs.flags = FLAGS
    data, two = in_steps(case, tmp_path), "two processes"
    assert forked_runs.run(tmp_path / "two", *data, kind=two) == [0, 0], forked_runs.said()
    event = forked_runs.num_events() // 3
    assert -9 in forked_runs.run(tmp_path / "killed", *data, kind=two, event=event)
    assert (
        list(tmp_path.glob("killed/checkpoints/step-*")) and not (tmp_path / "killed/metrics.json").exists()
    )
    assert forked_runs.run(tmp_path / "killed", *data, "--resume", kind=two) == [0, 0], forked_runs.said()
    assert ": after step" in forked_runs.said("stdout")
    require_same_outcome(*(Finished(tmp_path / name, data, "") for name in ("two", "killed")), exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.file) for case in (MULTI, STS_B)])
def test_torchrun_ends_as_two_forked_processes(case, forked_runs, run_script, tmp_path):
    """The processes of the test above, started as users start them."""
    forked_runs.flags = FLAGS
    data = in_steps(case, tmp_path)
    assert forked_runs.run(tmp_path / "two", *data, kind="two processes") == [0, 0], forked_runs.said()
    flags = [*forked_runs.shared_flags, *FLAGS, *data, "--batch-size", 4, "--output-dir", tmp_path / "run"]
    run_script("torchrun", "--nproc-per-node", 2, "train_classifier.py", *flags, OMP_NUM_THREADS="1")
    runs = [Finished(tmp_path / name, data, "") for name in ("two", "run")]
    require_same_outcome(*runs, exact=True)


@pytest.mark.parametrize(
    "case, flags, parts",
    [
        (MULTI, ["--best-metric", "accuracy"], ["--best-metric accuracy", "multi", "subset_accuracy"]),
        (REGRESSION, ["--best-metric", "macro_f1"], ["--best-metric macro_f1", "regression", "rmse"]),
        (REGRESSION, ["--label-smoothing", 0.1], ["--label-smoothing 0.1", "regression"]),
        (REGRESSION, ["--class-weights", "balanced"], ["--class-weights balanced", "regression"]),
        (REGRESSION, ["--label-separator", ";"], ["--label-separator ;", "multi"]),
        (REGRESSION, ["--threshold", 0.3], ["--threshold 0.3", "regression"]),
        (MULTI, ["--positive-class", "toxic"], ["--positive-class toxic", "multi"]),
        (MULTI, ["--text-mode", "pair"], ["--text-mode pair", "two columns", "comment_text"]),
        (MULTI, ["--text-column", "id,comment_text"], ["--text-column id,comment_text", "pair", "join"]),
        (MULTI, ["--revision", "main"], ["--revision main", "Hub"]),
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
