"""Each flag of a training through the command line, against what it must come to."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BigBirdConfig,
    BigBirdForSequenceClassification,
)

from conftest import heavy, make_sentences, train_wordpiece

# bytes that a process may take beyond what it has when it starts: 84 texts take some 2,600 MB, 21
# a quarter
# of that
MEMORY = 950 * 2**20
FLAGS = ["--max-train-samples", 84, "--epochs", 1, "--max-length", 20, "--lr", "3e-3", "--precision", "fp32"]


@pytest.fixture(scope="module")
def forked(forked_runs):
    """The runs of this module: all with the flags above."""
    forked_runs.flags = FLAGS
    return forked_runs


@pytest.fixture(scope="module")
def plain(forked, tmp_path_factory):
    """A run without any flag of the tests below."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert forked.run(folder) == [0], forked.said()
    return folder


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory):
    """A file in which one class has four times the texts of the other: the sum of a batch's class
    weights is not its number of texts.
    """
    rows = [
        (text, label)
        for number, (text, label) in enumerate(make_sentences(200))
        if label == "pos" or number % 8 == 0
    ]
    path = tmp_path_factory.mktemp("data") / "lopsided.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def weights(folder) -> dict:
    return load_file(folder / "best" / "model.safetensors")


def close(folder, other, **tolerance) -> bool:
    first, second = weights(folder), weights(other)
    assert first.keys() == second.keys()
    return all(torch.allclose(first[name], second[name], **tolerance) for name in first)


def evaluations(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation/loss" in line]


def logged(folder) -> list[dict]:
    """Return all that a run logged, without how fast it was."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "train/examples_per_second"} for line in lines
    ]


def files(folder) -> list[str]:
    """Return the names of a run's files, of the events without time and process, and the number of
    lines of its log.
    """
    names = [
        re.sub(r"tfevents.*", "tfevents", str(path.relative_to(folder)))
        for path in folder.rglob("*")
        if path.is_file() and "rank-1" not in path.name
    ]
    return [*sorted(names), len((folder / "metrics.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("flags", [["--class-weights", "balanced"], heavy(["--label-smoothing", 0.3])])
def test_what_changes_the_loss_changes_what_is_learned(flags, forked, lopsided, tmp_path):
    for name, given in (("with", flags), ("without", [])):
        assert forked.run(tmp_path / name, "--dataset", lopsided, *given) == [0], forked.said()
    assert not close(tmp_path / "with", tmp_path / "without", atol=1e-3)


WEIGHTED = ["--class-weights", "balanced", "--max-train-samples", 92]


@pytest.mark.parametrize(
    "flags",
    [
        [*WEIGHTED, "--truncation", "chunks", "--max-chunks", 3],
        heavy(WEIGHTED),
        heavy(["--label-smoothing", 0.1]),
        heavy(["--truncation", "chunks", "--max-chunks", 3]),
        heavy([]),
    ],
)
def test_accumulation_equals_a_batch_as_large(flags, forked, lopsided, tmp_path):
    """84 (92) texts in batches of 8 are 10 (11) and a half: with steps of two micro-batches of 4
    the last step has one.
    """
    flags = [*flags, "--dataset", lopsided]
    assert forked.run(tmp_path / "one", *flags) == [0], forked.said()
    assert forked.run(tmp_path / "many", "--batch-size", 4, "--grad-accum", 2, *flags) == [0]
    assert close(tmp_path / "one", tmp_path / "many", rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--class-weights", "balanced", "--grad-accum", 2],
        heavy(["--truncation", "chunks", "--max-chunks", 3]),
    ],
)
def test_two_processes_equal_one(flags, forked, lopsided, tmp_path):
    """Over a whole run, evaluation with a remainder for rank 1 too; dropout is 0 in the small
    model. Only rank 0 writes.

    81 texts in steps of 16 or 8 leave one for the last, which only one process gets.
    """
    flags = [*flags, "--dataset", lopsided, "--eval-batch-size", 5, "--max-train-samples", 81]
    assert forked.run(tmp_path / "one", "--epochs", 2, *flags) == [0]
    assert forked.run(tmp_path / "two", "--epochs", 2, *flags, kind="two processes") == [0, 0], (
        forked.said() + forked.said(rank=1)
    )
    assert forked.said("stdout", rank=1) == ""
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert close(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=1e-4)
    for one, two in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        # the training's loss and the gradient's norm too: of all processes, not of the one that
        # writes
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert (
        second["test_loss"] == pytest.approx(first["test_loss"], rel=1e-4)
        and second["test_accuracy"] == first["test_accuracy"]
    )


def test_early_stopping_stops_after_so_many_evaluations_that_were_no_better(forked, tmp_path):
    """The test split is the validation split once more: the best weights, and no later ones, give
    its best loss again.
    """
    (tmp_path / "data").mkdir()
    for split, start, stop in (("train", 0, 96), ("validation", 96, 120), ("test", 96, 120)):
        (tmp_path / "data" / f"{split}.csv").write_text(
            "text,label\n" + "".join(f"{text},{label}\n" for text, label in make_sentences(120)[start:stop])
        )
    flags = [
        "--dataset",
        tmp_path / "data",
        "--epochs",
        30,
        "--lr",
        "2e-2",
        "--early-stopping-patience",
        3,
        "--eval-every",
        4,
        "--dropout",
        0.1,
    ]
    assert forked.run(tmp_path / "run", *flags) == [0], forked.said()
    assert "stopped early: no better in 3 evaluations\n" in forked.said("stdout")
    losses = [line["validation/loss"] for line in evaluations(tmp_path / "run")]
    best = losses.index(min(losses))
    assert len(losses) == best + 4 < 90, "three evaluations after the best, then no more"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test_loss"] == pytest.approx(
        losses[best], rel=1e-6
    )


def test_whoever_may_read_the_run_may_read_its_model(plain):
    """safetensors makes files that nobody but their owner can read."""
    modes = {path.name: path.stat().st_mode for path in (plain / "best").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_eval_every_evaluates_between_the_ends_of_epochs_too(forked, tmp_path):
    assert forked.run(tmp_path / "run", "--eval-every", 4) == [0]
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [4, 8, 11]
    assert re.search(r"\n +0\.36 .*\n +0\.73 .*\n +1 ", forked.said("stdout"))


def test_dropout_is_set_everywhere_and_attentions_apart(forked, plain, tmp_path):
    assert forked.run(tmp_path / "run", "--dropout", 0.3, "--attention-dropout", 0.1) == [0]
    config = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert (
        config["hidden_dropout_prob"] == config["classifier_dropout"] == 0.3
        and config["attention_probs_dropout_prob"] == 0.1
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "best")
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert rates and all(rate == (0.1 if "attention.self" in name else 0.3) for name, rate in rates.items())
    assert not close(tmp_path / "run", plain, atol=1e-3)


@pytest.mark.parametrize("number", [heavy(0), 1, heavy(2)])
def test_frozen_layers_stay_as_they_were(number, forked, tiny_model, tmp_path):
    assert forked.run(tmp_path / "run", "--freeze-layers", number) == [0]
    before, after = load_file(tiny_model / "model.safetensors"), weights(tmp_path / "run")
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {
        name
        for name in before
        if number and (".embeddings." in name or any(f".layer.{layer}." in name for layer in range(number)))
    }
    assert frozen <= same and not {
        name for name in same - frozen if "weight" in name and "position_embeddings" not in name
    }


def test_low_rank_adapters_are_merged_into_a_plain_model(forked, tiny_model, tmp_path):
    assert forked.run(tmp_path / "run", "--lora-rank", 2, "--lr", "2e-2", "--epochs", 3) == [0], forked.said()
    before, after = load_file(tiny_model / "model.safetensors"), weights(tmp_path / "run")
    assert before.keys() == after.keys(), "no name of an adapter is left"
    for name, tensor in before.items():
        if "classifier" in name:
            continue
        linear = tensor.ndim == 2 and "embeddings" not in name
        change = after[name] - tensor
        assert (
            (torch.linalg.matrix_rank(change, atol=1e-5) == 2) if linear else torch.equal(after[name], tensor)
        ), name
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    losses = [line["validation/loss"] for line in evaluations(tmp_path / "run")]
    assert results["best_validation_loss"] == min(losses)
    assert forked.score(tmp_path / "run" / "best", "--precision", "fp32") == [0]
    assert f"loss {results['test_loss']:.4f}" in forked.said("stdout")


@pytest.mark.slow
def test_low_rank_adapters_with_two_processes_and_after_a_stop(forked, tmp_path):
    """The stopped run ends with the bits of the whole one; two processes with those of one, but
    for rounding.
    """
    flags = ["--lora-rank", 2, "--lr", "2e-2", "--epochs", 2]
    assert forked.run(tmp_path / "whole", *flags) == [0], forked.said()
    events = forked.num_events()
    assert forked.run(tmp_path / "two", *flags, kind="two processes") == [0, 0], forked.said() + forked.said(
        rank=1
    )
    assert close(tmp_path / "two", tmp_path / "whole", rtol=1e-2, atol=1e-3)
    assert forked.run(tmp_path / "stopped", *flags, event=int(events * 0.7)) == [-9]
    assert forked.run(tmp_path / "stopped", *flags, "--resume") == [0], forked.said()
    assert ": after step" in forked.said("stdout")
    assert close(tmp_path / "stopped", tmp_path / "whole", rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_train_a_model_that_leaves_parameters_without_a_gradient(forked, tiny_model, tmp_path):
    """BigBird has a pooler that its classifier does not use; DDP would wait for it in the second
    step.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    config = BigBirdConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attention_type="original_full",
    )
    BigBirdForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, kind in (("one", "one process"), ("two", "two processes")):
        assert set(forked.run(tmp_path / name, "--model", tmp_path / "model", kind=kind)) == {0}, (
            forked.said()
        )
    assert close(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(forked, plain, tmp_path):
    assert forked.run(tmp_path / "run", "--gradient-checkpointing") == [0], forked.said()
    assert close(tmp_path / "run", plain, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_and_is_saved_plain(forked, plain, tmp_path):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    assert forked.run(tmp_path / "run", "--compile") == [0], forked.said()
    assert close(tmp_path / "run", plain, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved_and_the_steps_stay_the_same(forked, tmp_path):
    """Under a limit on the process's memory: 84 texts of 60 tokens through layers of 16,384 need
    more than it.
    """
    tokenizer = train_wordpiece([text for text, _ in make_sentences(200)])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16384,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "long.csv").write_text(
        "text,label\n" + "".join(f"{text * 20},{label}\n" for text, label in make_sentences(120))
    )
    flags = [
        "--model",
        tmp_path / "model",
        "--dataset",
        tmp_path / "long.csv",
        "--max-length",
        60,
        "--batch-size",
        84,
        "--eval-batch-size",
        4,
        "--warmup-ratio",
        0,
    ]
    assert forked.run(tmp_path / "refused", *flags, memory=MEMORY) == [2], (
        "the test is worth nothing if the batch fits"
    )
    assert forked.said().startswith(
        "train_classifier.py: error: --batch-size 84: a batch of 60 tokens does not fit into memory; lower it"
        " or --max-length, or let --auto-batch-size"
    )
    assert len(forked.said().splitlines()) == 1
    assert forked.run(tmp_path / "halved", *flags, "--auto-batch-size", memory=MEMORY) == [0], forked.said()
    size = int(
        re.search(
            r"memory   84 chunks at once do not fit: (\d+) at a time, accumulated to the same step",
            forked.said("stdout"),
        ).group(1)
    )
    assert size in (42, 21, 10, 5)
    assert forked.run(tmp_path / "whole", *flags) == [0]
    assert close(tmp_path / "halved", tmp_path / "whole", rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "truncation, reads_all",
    [("head", False), heavy("tail", False), heavy("head-tail", False), ("chunks", True)],
)
def test_each_truncation_trains_scores_reports_and_predicts(truncation, reads_all, forked, tmp_path):
    assert forked.run(tmp_path / "run", "--truncation", truncation, "--max-length", 12) == [0], forked.said()
    said, report = forked.said("stdout"), (tmp_path / "run" / "report.md").read_text()
    assert "by length of the text; the model reads up to 12 tokens" in said and "## By length" in report
    assert f"(`--truncation {truncation}`)" in report
    rows = re.findall(r"^(1-12|13-24|25-48) +(\d+) +([\d.]+)% +([\d.]+)$", said, re.M)
    assert sum(int(texts) for _, texts, _, _ in rows) == 12
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert sum(int(texts) * float(accuracy) for _, texts, _, accuracy in rows) / 12 == pytest.approx(
        results["test_accuracy"], abs=1e-3
    )
    longest = next(float(dropped) for tokens, _, dropped, _ in rows if tokens == "25-48")
    assert longest == 0 if reads_all else longest > 40
    assert ("of all tokens" in said) is not reads_all
    assert forked.score(tmp_path / "run" / "best", "--max-length", 12, "--precision", "fp32") == [0]
    assert f"loss {results['test_loss']:.4f}" in forked.said("stdout"), (
        "best/ remembers how its texts are read"
    )


def test_buckets_pad_less_than_random_batches_and_the_screen_says_so(forked, tmp_path):
    shares, sizes = {}, ["--max-length", 60, "--batch-size", 2, "--max-steps", 1]
    for batching in ("buckets", "random"):
        assert forked.run(tmp_path / batching, "--batching", batching, *sizes) == [0]
        shares[batching] = float(
            re.search(
                rf"([\d.]+)% of a training batch is padding \(--batching {batching}\)", forked.said("stdout")
            ).group(1)
        )
    assert shares["buckets"] < shares["random"] / 2


def test_the_model_card_tells_data_settings_and_results(plain, sentences_csv):
    card = (plain / "best" / "README.md").read_text()
    results = json.loads((plain / "metrics.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n")
    low, high = results["test_intervals"]["accuracy"]
    share = f"accuracy {results['test_accuracy']:.4f} [{low:.4f}, {high:.4f}], macro-F1"
    assert f"{share} {results['test_macro_f1']:.4f}" in card
    assert (
        f"Test {share}".replace(f"{results['test_accuracy']:.4f}", f"**{results['test_accuracy']:.4f}**")
        in (plain / "report.md").read_text()
    )
    assert re.search(r"\| `lr` +\| 0\.003 +\|", card) and "`neg`, `pos`" in card
    assert (
        "84 texts for training, 12 for validation." in card
        and "used neither for training nor for choosing the weights" in card
    )
    for name, value in (
        ("text_column", "text"),
        ("max_train_samples", "84"),
        ("processes", "1"),
        ("batching", "buckets"),
        ("best_metric", "loss"),
        ("dropout", "as in the pretrained model"),
        ("lora_rank", "none"),
    ):
        assert re.search(rf"\| `{name}` +\| {value} +\|", card), name
    for name, value in (
        ("torch", re.escape(torch.__version__)),
        ("transformers", re.escape(transformers.__version__)),
    ):
        assert re.search(rf"\| {name} +\| {value} +\|", card), name
    assert not re.search(r"\| +\|$", card, re.M), "no empty cell"


def test_what_is_saved_for_others_names_no_folder_of_this_machine(plain, sentences_csv, tiny_model):
    texts = [path.read_text() for path in (plain / "best").iterdir() if path.suffix in (".json", ".md")]
    assert len(texts) >= 5 and not [
        text for text in texts if str(sentences_csv.parent) in text or str(tiny_model.parent) in text
    ]
    assert f"`{sentences_csv.name}`" in (plain / "best" / "README.md").read_text()


def test_the_model_card_does_not_call_texts_new_that_are_not(forked, tmp_path):
    (tmp_path / "data").mkdir()
    for split, start, stop in (("train", 0, 100), ("validation", 100, 120), ("test", 110, 130)):
        (tmp_path / "data" / f"{split}.csv").write_text(
            "text,label\n" + "".join(f"{text},{label}\n" for text, label in make_sentences(130)[start:stop])
        )
    assert forked.run(tmp_path / "run", "--dataset", tmp_path / "data") == [0], forked.said()
    card = (tmp_path / "run" / "best" / "README.md").read_text()
    assert (
        "20 texts of the test split, of which 10 also occur in the training or the validation split" in card
        and "neither" not in card
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--freeze-layers", 3], "--freeze-layers 3: the model has 2; give at most that"),
        (["--dropout", 1], "argument --dropout: '1' is not a number from 0 up to, not including, 1"),
        (["--truncation", "middle"], "argument --truncation: invalid choice: 'middle'"),
        (
            ["--early-stopping-patience", 0],
            "argument --early-stopping-patience: '0' is not a whole number above 0",
        ),
        (["--label-smoothing", -0.1], "argument --label-smoothing: '-0.1' is not"),
        (
            ["--max-chunks", 9],
            (
                "--max-chunks 9: a micro-batch holds at most --batch-size 8 chunks, and those of a text stay"
                " together; lower the one or raise the other"
            ),
        ),
        (
            ["--max-chunks", 3, "--truncation", "tail"],
            "--max-chunks 3: --truncation tail reads one chunk of a text; leave one of the two out",
        ),
    ],
)
def test_a_flag_out_of_range_is_one_line(flags, said, forked, tmp_path):
    assert forked.run(tmp_path / "run", *flags) == [2]
    assert said in forked.said() and len(forked.said().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_calibrated_model_says_how_sure_it_is(forked, plain, call_script, tmp_path, sentences_csv):
    """Oracle: the temperature that SciPy finds on the logits of the validation split; --predict and
    --evaluate-only use the one that is saved, and answers stay the same.
    """
    run = tmp_path / "run"
    assert forked.run(run, "--calibrate") == [0], forked.said()
    results, before = (json.loads((folder / "metrics.json").read_text()) for folder in (run, plain))
    temperature = json.loads((run / "best" / "training.json").read_text())["temperature"]
    assert results["temperature"] == temperature and temperature != 1 and "temperature" not in before
    assert results["test_accuracy"] == before["test_accuracy"] and results["test_loss"] != before["test_loss"]
    assert results["test_calibration_error_before"] == pytest.approx(before["test_calibration_error"])
    assert close(run, plain), "the weights are those of a run without it"
    assert "--predict` divides the logits" in (run / "best" / "README.md").read_text()
    assert "## Calibration" in (run / "report.md").read_text() and (run / "reliability.png").exists()
    (tmp_path / "texts.txt").write_text("good film\nawful story\n")
    said = []
    for folder in (plain, run):
        flags = ["--model", folder / "best", "--predict", tmp_path / "texts.txt"]
        lines = call_script("train_classifier.py", *flags).stdout.splitlines()
        said.append([json.loads(line) for line in lines])
    for one, calibrated in zip(*said):
        logits = torch.tensor(list(one["scores"].values())).log() / temperature
        assert list(calibrated["scores"].values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-4)
        assert one["label"] == calibrated["label"]
    flags = ["--model", run / "best", "--dataset", sentences_csv, "--evaluate-only"]
    scored = call_script("train_classifier.py", *flags).stdout
    assert f"loss {results['test_loss']:.4f} [" in scored
    assert f"expected calibration error {results['test_calibration_error']:.4f}" in scored
