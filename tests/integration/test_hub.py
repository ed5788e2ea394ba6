"""Models and data sets from the Hub: the tutorial's own command from end to end, and what a user
reads when something is missing.

The Hub is a server of our own on the loopback; what it serves is made here, in the shape of the
real repositories.
"""

import json
import random
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from transformers import DistilBertConfig, DistilBertForMaskedLM

from conftest import COMMON, Forker, start_forker, train_wordpiece
from hub_server import HubServer

RECIPE = shlex.split(
    "--model distilbert/distilbert-base-uncased --dataset ccdv/patent-classification --max-train-samples 5000"
    " --max-eval-samples 500 --batch-size 8 --lr 2e-5 --weight-decay 0.01 --epochs 3 --truncation head"
)
PATENT_CLASSES = [
    "Human Necessities",
    "Performing Operations; Transporting",
    "Chemistry; Metallurgy",
    "Textiles; Paper",
    "Fixed Constructions",
    "Mechanical Engineering; Lightning; Heating; Weapons; Blasting",
    "Physics",
    "Electricity",
    "General tagging of new or cross-sectional technology",
]
SIZES = {"train": 270, "validation": 90, "test": 90}


def make_patents(split: str) -> datasets.Dataset:
    """Return texts that name their class among common words, as many of each class."""
    generator = random.Random(split)
    labels = [number % len(PATENT_CLASSES) for number in range(SIZES[split])]
    texts = [
        " ".join(
            [
                PATENT_CLASSES[label],
                *generator.choices(COMMON, k=generator.randint(3, 20)),
                f"{split}{number}",
            ]
        )
        for number, label in enumerate(labels)
    ]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=PATENT_CLASSES)}
    )
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def write_parquet(folder: Path, configs: list[str]):
    """Write the patents as Parquet with a card that lists the configurations, as `push_to_hub`
    does.
    """
    card = ["---", "configs:"]
    for config in configs:
        place = "data" if config == "default" else config
        (folder / place).mkdir(parents=True)
        card += [f"- config_name: {config}", "  data_files:"]
        for split in SIZES:
            make_patents(split).to_parquet(folder / place / f"{split}-00000-of-00001.parquet")
            card += [f"  - split: {split}", f"    path: {place}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", "# Patents"]), encoding="utf-8")


def write_distilbert(folder: Path) -> DistilBertForMaskedLM:
    """Write a DistilBERT of two layers, 32 wide, with the files of distilbert-base-uncased: a
    masked language model, so without a classifier.
    """
    tokenizer = train_wordpiece(make_patents("train")["text"][:])
    torch.manual_seed(0)
    model = DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=2, n_heads=4)
    )
    model.save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": True, "model_max_length": 512})
    )
    (folder / "vocab.txt").write_text(
        "\n".join(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)), encoding="utf-8"
    )
    return model


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """The folder that the server serves: what the tutorial needs, and repositories that must be
    refused.
    """
    root = tmp_path_factory.mktemp("hub")
    write_parquet(root / "datasets/ccdv/patent-classification", ["default"])
    write_parquet(root / "datasets/owner/two-configs", ["abstract", "patent"])
    for name, file, content in [
        ("only-script", "only-script.py", "print('the script ran')"),
        ("only-card", "README.md", "# Nothing else"),
    ]:
        (root / "datasets/owner" / name).mkdir()
        (root / "datasets/owner" / name / file).write_text(content)
    distilbert, pickled = (
        root / "models/distilbert/distilbert-base-uncased",
        root / "models/owner/only-pickle",
    )
    model = write_distilbert(distilbert)
    shutil.copytree(distilbert, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    return root


def environment(hub: HubServer, home: Path) -> dict[str, str]:
    """Return what sends a process to our Hub, past any proxy, with an empty home for its
    caches.
    """
    return {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "NO_PROXY": "*",
        "no_proxy": "*",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def recipe(repositories, run_script, tmp_path_factory):
    """The folder of two runs of the tutorial's command, `first` with the Hub and `again` when it
    is gone, and what they printed.
    """
    folder = tmp_path_factory.mktemp("recipe")
    command = ["train_classifier.py", *RECIPE, "--cache-dir", folder / "cache", "--output-dir"]
    with HubServer(repositories) as hub:
        first = run_script(*command, folder / "first", **environment(hub, folder / "home"))
    again = run_script(*command, folder / "again", **environment(hub, folder / "home"))
    return folder, first, again


def test_the_tutorials_command_downloads_trains_and_scores(recipe):
    folder, first, _ = recipe
    assert (
        "270 train, 90 validation, 90 test texts, 9 classes" in first.stdout
        and "cut from train" not in first.stdout
    )
    assert "DistilBertForSequenceClassification" in first.stdout and first.stderr == ""
    config = json.loads((folder / "first/best/config.json").read_text())
    assert [config["id2label"][str(number)] for number in range(9)] == PATENT_CLASSES
    assert 0 <= json.loads((folder / "first/metrics.json").read_text())["test_accuracy"] <= 1


def test_all_downloads_lie_in_the_cache_dir(recipe):
    folder, *_ = recipe
    repositories = {path.name for path in (folder / "cache").iterdir() if "--" in path.name}
    assert repositories == {
        "models--distilbert--distilbert-base-uncased",
        "datasets--ccdv--patent-classification",
    }
    assert [
        path for path in folder.glob("home/**/*") if "patent" in path.name or "distilbert" in path.name
    ] == []


def test_the_same_command_runs_from_the_cache_when_the_hub_is_gone_and_says_so(recipe):
    folder, _, again = recipe
    said = "using the cached copy; the Hub is offline (HF_HUB_OFFLINE) or can't be reached\n"
    assert (
        again.stderr
        == f"--dataset ccdv/patent-classification: {said}--model distilbert/distilbert-base-uncased: {said}"
    )
    first_results, results = (
        json.loads((folder / run / "metrics.json").read_text()) for run in ("first", "again")
    )
    assert [results[name] for name in ("test_accuracy", "test_loss")] == [
        first_results[name] for name in ("test_accuracy", "test_loss")
    ]


@dataclass
class Refusal:
    """How a command line ended that was refused."""

    code: int
    seconds: float
    stdout: str
    stderr: str


def run_refused(folder: Path, command_lines: dict[str, list], **variables: str) -> dict[str, Refusal]:
    """Run command lines one after the other, with variables, and return how each ended."""
    common = ["--cache-dir", folder / "cache", "--output-dir", folder / "run"]
    forker, ends = Forker(start_forker(**variables), folder / "said"), {}
    for name, line in command_lines.items():
        start = time.monotonic()
        done = forker.call("train_classifier.py", *line, *common, check=False)
        ends[name] = Refusal(done.returncode, time.monotonic() - start, done.stdout, done.stderr)
    forker.stop()
    return ends


@pytest.fixture(scope="module")
def refusals(repositories, sentences_csv, tmp_path_factory):
    """What the Hub does not have, or has in a form that is not taken, by the name of the case; and
    the requests that the Hub got.
    """
    folder = tmp_path_factory.mktemp("refusals")
    with HubServer(repositories) as hub:
        ends = run_refused(
            folder,
            {
                "unknown model": ["--model", "nobody/nothing", "--dataset", sentences_csv],
                "unknown data set": ["--dataset", "nobody/nothing"],
                "pickle": ["--model", "owner/only-pickle", "--dataset", sentences_csv, "--inspect"],
                "script": ["--dataset", "owner/only-script"],
                "no data": ["--dataset", "owner/only-card"],
                "no configuration": ["--dataset", "owner/two-configs"],
            },
            **environment(hub, folder / "home"),
        )
    return ends, hub.requests


@pytest.mark.parametrize(
    "case, parts",
    [
        ("unknown model", ["--model nobody/nothing", "check the name", "bundled/all-MiniLM-L6-v2"]),
        ("unknown data set", ["--dataset nobody/nothing", "check the name", "bundled/bbc-news"]),
        ("script", ["--dataset owner/only-script", "remote code, which is never run", "Parquet"]),
        ("no data", ["--dataset owner/only-card", "no data files"]),
        ("no configuration", ["--dataset owner/two-configs", "--dataset-config", "['abstract', 'patent']"]),
    ],
)
def test_what_the_hub_lacks_is_one_line_at_once(refusals, case, parts):
    end = refusals[0][case]
    assert (
        end.code == 2
        and end.stderr.count("\n") == 1
        and [part for part in parts if part not in end.stderr] == []
    )
    assert end.seconds < 60  # the Hub library alone would try again for minutes


def test_pickled_weights_are_downloaded_where_there_are_no_others_and_converted_here(refusals):
    ends, requests = refusals
    assert ends["pickle"].code == 0 and "DistilBertForSequenceClassification" in ends["pickle"].stdout
    assert ends["pickle"].stderr.startswith("--model owner/only-pickle: its weights are pickled")
    asked = [request for request in requests if "pytorch_model.bin" in request]
    assert asked and all("owner/only-pickle" in request for request in asked), asked


def test_foreign_code_is_not_run_and_nothing_is_converted_elsewhere(refusals):
    ends, requests = refusals
    assert "the script ran" not in ends["script"].stdout
    # transformers would look up commits and discussions for a conversion to safetensors, and ask a
    # service on
    # the Hub for one
    assert [request for request in requests if "/commits/" in request] == []


@pytest.fixture(scope="module")
def refusals_without_hub(repositories, sentences_csv, tmp_path_factory):
    """What is neither cached nor to be had, for nothing listens at the Hub's address."""
    folder = tmp_path_factory.mktemp("without-hub")
    with HubServer(repositories) as hub:
        pass
    return run_refused(
        folder,
        {
            "model": ["--model", "distilbert/distilbert-base-uncased", "--dataset", sentences_csv],
            "dataset": ["--dataset", "ccdv/patent-classification"],
        },
        **environment(hub, folder / "home"),
    )


@pytest.mark.parametrize(
    "case, name, way_out",
    [
        (
            "model",
            "--model distilbert/distilbert-base-uncased",
            "use a local folder or bundled/all-MiniLM-L6-v2",
        ),
        ("dataset", "--dataset ccdv/patent-classification", "use a local file or bundled/bbc-news"),
    ],
)
def test_without_a_hub_what_is_not_cached_is_one_line_at_once(refusals_without_hub, case, name, way_out):
    end = refusals_without_hub[case]
    assert (
        end.code == 2
        and end.stderr.count("\n") == 1
        and name in end.stderr
        and "the Hub can't be reached" in end.stderr
        and way_out in end.stderr
    )
    assert end.seconds < 60  # the Hub library alone would try again for minutes
