"""train_classifier.py as a user calls it, on a small model: what a run leaves, repeats, and is
read by.
"""

import ast
import csv
import json
import re
import urllib.request
from pathlib import Path

import matplotlib.image
import pytest
import torch
from safetensors.torch import load_file
from tensorboard import program
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from common.bundled import model_folder
from conftest import heavy, make_sentences
from terminal import run_on_terminal

FLAGS = [
    "--epochs",
    2,
    "--max-length",
    24,
    "--batch-size",
    8,
    "--lr",
    "8e-3",
    "--log-every",
    3,
    "--dropout",
    0.1,
]


@pytest.fixture(scope="module")
def flags(tiny_model, sentences_csv, cache_dir, tmp_path_factory):
    """With the small model as a pretrained encoder comes, without a head: each run draws one, and
    its dropout masks, from its seed.
    """
    encoder = tmp_path_factory.mktemp("models") / "encoder"
    AutoModel.from_pretrained(tiny_model).save_pretrained(encoder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(encoder)
    return ["--model", encoder, "--dataset", sentences_csv, "--cache-dir", cache_dir, *FLAGS]


@pytest.fixture(scope="module")
def finished(call_script, flags, tmp_path_factory):
    """A finished run: its folder and what the process printed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, call_script("train_classifier.py", *flags, "--output-dir", folder, pictures=True)


def predictions_of(folder: Path) -> list[dict]:
    """Return the rows of a run's predictions.csv."""
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_screen_shows_epochs_and_examples_and_stderr_stays_quiet(finished):
    folder, process = finished
    assert process.stderr == ""
    assert "validation and test cut from train: 10 % each, stratified" in process.stdout
    assert re.search(r"96 train, 12 validation, 12 test texts, 2 classes", process.stdout)
    table = process.stdout[
        process.stdout.index(
            "  epoch    training loss    validation loss    accuracy    macro-F1    examples/s"
        ) :
    ]
    assert re.search(r"\n +1 +\d\.\d+ .*\n +2 +\d\.\d+ ", table)
    assert (
        "five right answers" in table and "predicted class    true class" in table and "confidence" in table
    )
    assert "five wrong answers" in table


def test_the_run_folder_holds_results_that_agree_with_each_other(finished):
    folder, process = finished
    results = json.loads((folder / "metrics.json").read_text())
    assert {"test_accuracy", "test_macro_f1", "best_epoch", "train_examples_per_second"} <= results.keys()
    assert results["test_accuracy"] > 0.8, "the sentences are easy: the loop must learn them"
    rows = predictions_of(folder)
    assert len(rows) == 12
    assert sum(row["true"] == row["predicted"] for row in rows) / 12 == pytest.approx(
        results["test_accuracy"]
    )
    sources = make_sentences(120)
    for row in rows:
        assert (row["text"], row["true"]) == sources[int(row["row"]) - 1], (
            "a row number leads back to the source"
        )
        scores = {name: float(row[f"score {name}"]) for name in ("neg", "pos")}
        assert max(scores, key=scores.get) == row["predicted"] and float(row["confidence"]) == pytest.approx(
            max(scores.values()), abs=1e-5
        )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validation = [line for line in lines if "validation/accuracy" in line]
    assert [line["step"] for line in validation] == [12, 24]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(3, 25, 3))
    losses = [line["validation/loss"] for line in validation]
    assert results["best_epoch"] == losses.index(min(losses)) + 1
    config = json.loads((folder / "config.json").read_text())
    assert config["lr"] == 8e-3 and config["seed"] == 0 and config["versions"]["torch"] == torch.__version__


def test_the_learning_rate_rises_then_falls_to_zero(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["train/learning_rate"] for line in lines if "train/loss" in line}
    warmup, total, peak = 2, 24, 8e-3  # 10 % of 24 steps, rounded
    assert rates == pytest.approx(
        {step: peak * min(step / warmup, (total - step) / (total - warmup)) for step in rates}
    )


def test_the_report_holds_what_the_screen_shows_with_pictures(finished):
    folder, process = finished
    report = (folder / "report.md").read_text()
    for heading in (
        "## Epochs",
        "## Classes of the test split",
        "## Five right",
        "## Five wrong",
        "## Settings",
    ):
        assert heading in report
    screen = [re.split(" {2,}", line.strip()) for line in process.stdout.splitlines()]
    tables = {
        section.splitlines()[0]: [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in section.splitlines()
            if line.startswith("|")
        ][2:]
        for section in report.split("\n## ")[1:]
    }  # without the head and the line below it
    for heading in ("Epochs", "Classes of the test split", "By length", "Five right", "Five wrong"):
        assert [row for row in screen if row in tables[heading]] == tables[heading], heading
    assert [len(tables[heading]) for heading in ("Epochs", "Classes of the test split")] == [2, 2] and tables[
        "By length"
    ]
    for heading, right in (("Five right", True), ("Five wrong", False)):
        answers = [
            (row["predicted"], row["true"])
            for row in predictions_of(folder)
            if (row["predicted"] == row["true"]) == right
        ]
        shown = [(predicted, true) for _, predicted, true, _ in tables[heading]]
        assert len(shown) == min(5, len(answers)) and set(shown) <= set(answers), heading
    for picture in re.findall(r"\]\((\S+\.png)\)", report):
        pixels = matplotlib.image.imread(folder / picture)
        assert min(pixels.shape[:2]) > 200 and pixels.std() > 0.05, "not a blank picture"
    assert report.count(".png") == 3
    assert f"| torch           | {torch.__version__}" in re.sub(r"torch +\|", "torch           |", report)
    assert "`seed`" in report


def test_pipeline_and_from_pretrained_load_best_and_agree_with_predict(finished, call_script, tmp_path):
    folder, _ = finished
    texts = ["a good film with lovely actors", "the story was awful and grim", "so it was 🙂 " * 40]
    done = call_script(
        "train_classifier.py",
        "--model",
        folder / "best",
        "--predict",
        "-",
        "--precision",
        "fp32",
        "--truncation",
        "head",
        stdin="\n".join(texts) + "\n",
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stderr == "" and [answer["row"] for answer in answers] == [1, 2, 3]
    classify = pipeline("text-classification", model=str(folder / "best"), device="cpu", top_k=None)
    for text, answer in zip(texts, answers):
        expected = {score["label"]: score["score"] for score in classify([text], truncation=True)[0]}
        assert answer["scores"] == pytest.approx(expected, abs=1e-5)
        assert (
            answer["label"] == max(expected, key=expected.get)
            and answer["confidence"] == answer["scores"][answer["label"]]
        )
    model = AutoModelForSequenceClassification.from_pretrained(folder / "best")
    assert model.config.id2label == {0: "neg", 1: "pos"} and model.config.label2id == {"neg": 0, "pos": 1}
    assert AutoTokenizer.from_pretrained(folder / "best").model_max_length == 24


def test_evaluate_only_scores_the_test_split_of_the_training_or_none(
    flags, call_script, sentences_csv, tmp_path
):
    """With a file for the validation, the test split alone was cut; of a file that has changed since,
    another one would be, most of whose texts the model has learned.
    """
    header, *rows = sentences_csv.read_text(encoding="utf-8").splitlines(keepends=True)
    data, validation, run = tmp_path / "data.csv", tmp_path / "validation.csv", tmp_path / "run"
    data.write_text(header + "".join(rows[:100]), encoding="utf-8")
    validation.write_text(header + "".join(rows[100:]), encoding="utf-8")
    own = ["--dataset", data, "--validation-file", validation, "--output-dir", run]
    call_script("train_classifier.py", *flags, *own)
    scored = ["train_classifier.py", "--model", run / "best", "--dataset", data, "--evaluate-only"]
    loss = json.loads((run / "metrics.json").read_text())["test_loss"]
    assert f"loss {loss:.4f}" in call_script(*scored).stdout
    # had the test split a file of its own, all rows are those of the training, which a line says
    settings = json.loads((run / "best" / "training.json").read_text())
    told = {**settings, "cut": ["validation"], "test_sha256": None}
    (run / "best" / "training.json").write_text(json.dumps(told))
    assert "100 texts" in (shown := call_script(*scored).stdout) and "may have been trained on" in shown
    (run / "best" / "training.json").write_text(json.dumps(settings))
    data.write_text(header + "".join(rows[99::-1]), encoding="utf-8")
    done = call_script(*scored, check=False)
    assert (
        done.returncode == 2
        and "is not the one of the training" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_evaluate_only_gives_the_score_of_the_run(finished, call_script, sentences_csv):
    folder, _ = finished
    before = sorted(path for path in folder.rglob("*"))
    done = call_script(
        "train_classifier.py", "--model", folder / "best", "--dataset", sentences_csv, "--evaluate-only"
    )
    results = json.loads((folder / "metrics.json").read_text())

    def shown(name: str) -> str:  # an interval of width 0 is left out
        ends = [f"{end:.4f}" for end in results["test_intervals"].get(name, ())]
        return f"{results[f'test_{name}']:.4f}" + (f" [{', '.join(ends)}]" if ends else "")

    accuracy, macro_f1, loss = map(shown, ("accuracy", "macro_f1", "loss"))
    assert f"accuracy {accuracy}, macro-F1 {macro_f1}, loss {loss} on 12 texts" in done.stdout
    assert "one text is 8.3 points of accuracy" in done.stdout
    assert sorted(path for path in folder.rglob("*")) == before


def test_the_same_seed_repeats_a_run_bit_for_bit_and_a_terminal_gets_a_bar(
    finished, flags, forking, tmp_path
):
    """The second run has a terminal, which must change nothing but the screen."""
    folder, again = finished[0], tmp_path / "again"
    command = ["train_classifier.py", *flags, "--output-dir", again]
    code, screen, _ = run_on_terminal(forking, *command, columns=120, rows=24)
    assert code == 0 and re.search(r"epoch 2/2:.*loss \d\.\d+, \d+\.\d examples/s", screen), screen
    first, second = (load_file(path / "best" / "model.safetensors") for path in (folder, again))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert (folder / "predictions.csv").read_bytes() == (again / "predictions.csv").read_bytes()


def test_tensorboard_shows_curves_pictures_texts_and_settings(finished):
    """A real TensorBoard server reads the run, and is asked over HTTP as its page does."""
    folder, _ = finished
    server = program.TensorBoard()
    server.configure(
        argv=[
            None,
            "--logdir",
            str(folder.parent),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--load_fast",
            "false",
            "--reload_interval",
            "0",
        ]
    )
    url = server.launch()

    def get(path, data=None):
        return json.load(
            urllib.request.urlopen(
                urllib.request.Request(
                    url.rstrip("/") + "/data/plugin/" + path,
                    data=data,
                    headers={"Content-Type": "application/json"},
                ),
                timeout=30,
            )
        )

    scalars = get("scalars/tags")["first"]
    assert {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/examples_per_second",
        "validation/loss",
        "validation/accuracy",
        "validation/macro_f1",
        "test/accuracy",
    } <= scalars.keys()
    points = get("scalars/scalars?run=first&tag=validation%2Faccuracy")
    assert [point[1] for point in points] == [12, 24]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [point[2] for point in points] == pytest.approx(
        [line["validation/accuracy"] for line in lines if "validation/accuracy" in line]
    )
    assert {"validation/confusion", "test/confusion"} <= get("images/tags")["first"].keys()
    assert "test/mistakes/text_summary" in get("text/tags")["first"]
    (panel,) = get("text/text?run=first&tag=test%2Fmistakes%2Ftext_summary")
    rows = predictions_of(folder)
    wrong = [row["text"] for row in rows if row["predicted"] != row["true"]]
    assert [row["text"] for row in rows if row["text"][:40] in panel["text"]] == wrong and (
        "none" in panel["text"]
    ) == (wrong == [])
    experiment = get("hparams/experiment", data=json.dumps({"experimentName": ""}).encode())
    assert {"lr", "batch_size", "model"} <= {info["name"] for info in experiment["hparamInfos"]}
    assert (
        {"test/accuracy", "test/loss"}
        <= {info["name"]["tag"] for info in experiment["metricInfos"]}
        <= scalars.keys()
    )
    asked = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS"],
        "colParams": [{"metric": {"tag": "test/accuracy"}}],
        "sliceSize": 10,
    }
    (group,) = get("hparams/session_groups", data=json.dumps(asked).encode())["sessionGroups"]
    values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    assert values["test/accuracy"] == pytest.approx(
        json.loads((folder / "metrics.json").read_text())["test_accuracy"]
    )


def test_inspect_shows_data_tokens_and_a_batch_and_trains_nothing(call_script, flags, tiny_model, tmp_path):
    done = call_script("train_classifier.py", *flags, "--inspect", "--output-dir", tmp_path / "none")
    out = done.stdout
    assert done.stderr == "" and not (tmp_path / "none").exists()
    assert re.search(r"neg +48 +6 +6\n *pos +48 +6 +6\n *all +96 +12 +12", out)
    assert (
        "reads 24 at once in training and 24 in scoring, the model holds 64" in out
        and "'[PAD]' = id 0" in out
        and "they belong together" in out
    )
    tokens, ids = (
        re.search(rf"^{name} +(\S.*)$", out[out.index("ONE TEXT") :], re.M).group(1).split()
        for name in ("tokens", "ids")
    )
    assert (
        tokens[0] == "[CLS]"
        and ids[0] == "2"
        and list(map(int, ids)) == AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids(tokens)
    )
    width = int(re.search(r"input_ids +\(4, (\d+)\) int64", out).group(1))
    assert "id2label   {0: 'neg', 1: 'pos'}" in out and "label2id   {'neg': 0, 'pos': 1}" in out
    printed = out[out.index("\nMODEL\n") : out.index("\nCONFIG\n")]
    assert "BertForSequenceClassification(" in printed and "out_features=2" in printed
    config, _ = json.JSONDecoder().raw_decode(out[out.index("\nCONFIG\n") + len("\nCONFIG\n") :])
    assert config["hidden_size"] == 32 and config["id2label"] == {"0": "neg", "1": "pos"}
    rows = re.findall(r"\((\d+) tokens \+ (\d+) padding\)", out[out.index("ONE PADDED BATCH") :])
    assert [int(own) + int(padding) for own, padding in rows] == [width] * 4 and "[PAD]" in out[
        out.index("ONE PADDED BATCH") :
    ]


def test_inspect_compares_two_tokenizers_on_a_sentence_of_the_data(
    call_script, flags, tiny_model, sentences_csv
):
    """Tokens and ids side by side, and the ids of each decoded by the other, as the tokenizers
    themselves have them.
    """
    bundled = "bundled/all-MiniLM-L6-v2"
    done = call_script("train_classifier.py", *flags, "--inspect", "--compare-tokenizer", bundled)
    out = done.stdout[done.stdout.index("TWO TOKENIZERS") :]
    sentence = ast.literal_eval(re.search(r"TWO TOKENIZERS on (.*)", out).group(1))
    assert f"{sentence}" in sentences_csv.read_text()
    folders = (tiny_model, model_folder(bundled, kind="encoder"))
    small, large = (AutoTokenizer.from_pretrained(folder) for folder in folders)
    for tokenizer in (small, large):
        ids = tokenizer(sentence)["input_ids"]
        for token, number in zip(tokenizer.convert_ids_to_tokens(ids), ids):
            assert re.search(rf"(^|  ){re.escape(token)} +{number}( |$)", out, re.M), token
        assert repr(tokenizer.decode(ids)) in out
    assert f"decoded by {bundled}:\n  {large.decode(small(sentence)['input_ids'])!r}" in out
    known = [number for number in large(sentence)["input_ids"] if number < len(small)]
    lost = len(large(sentence)["input_ids"]) - len(known)
    assert lost and f"({lost} of them beyond its vocabulary):\n  {small.decode(known)!r}" in out


@pytest.mark.slow
@pytest.mark.parametrize("extra", [["--grad-accum", 2]])
def test_two_processes_at_batch_4_equal_one_at_batch_8(extra, run_script, flags, tmp_path):
    """The global batch decides the order, and gradients are sums over the true count: only
    rounding differs.

    41 texts leave nine for the last step: one process has five in two batches, the other four in
    one.
    """
    short = [*flags, "--dropout", 0, "--precision", "fp32", "--epochs", 1, "--max-train-samples", 41, *extra]
    run_script("train_classifier.py", *short, "--output-dir", tmp_path / "one")
    done = run_script(
        "torchrun",
        "--nproc-per-node",
        2,
        "train_classifier.py",
        *short,
        "--batch-size",
        4,
        "--output-dir",
        tmp_path / "two",
        OMP_NUM_THREADS="1",
    )
    assert done.stdout.count("epoch 1/1") == 1, "only the main process prints"
    one, two = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("one", "two"))
    for name in one | two:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    results = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_main_command_reaches_98_percent(run_script, tmp_path):
    """The median of seeds 0, 1 and 2 on the bundled news, with the defaults of the command line, in
    fp32: what is rounded to bf16 differs with the number of threads, and a text of 213 with it.
    """
    accuracies = []
    for seed in (0, 1, 2):
        run_script(
            "train_classifier.py",
            "--epochs",
            3,
            "--precision",
            "fp32",
            "--seed",
            seed,
            "--output-dir",
            tmp_path / str(seed),
            timeout=2000,
        )
        accuracies.append(
            json.loads((Path(tmp_path) / str(seed) / "metrics.json").read_text())["test_accuracy"]
        )
    assert sorted(accuracies)[1] >= 0.98, accuracies


# of the main command: epochs, texts for training and of each other split, tokens, learning rate
@pytest.mark.parametrize(
    "epochs, num_texts, others, tokens, lr", [(1, 128, 10, 32, 5e-4), heavy(2, 128, 24, 64, 3e-4)]
)
def test_the_main_command_learns_on_a_sample_of_the_bundled_news(
    epochs, num_texts, others, tokens, lr, call_script, tmp_path, cache_dir
):
    """The real encoder on real texts; few and short ones, so that every test run covers the defaults."""
    sizes = ["--epochs", epochs, "--max-train-samples", num_texts, "--max-eval-samples", others]
    sizes += ["--max-length", tokens]
    flags = ["--lr", lr, "--cache-dir", cache_dir, "--output-dir", tmp_path / "news"]
    done = call_script("train_classifier.py", *sizes, *flags)
    results = json.loads((tmp_path / "news" / "metrics.json").read_text())
    assert done.stderr == "" and results["test_accuracy"] > 0.8, results
