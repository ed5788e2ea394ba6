"""Models and data sets from the Hub: the tutorial's own command from end to end, and what a user
reads when something is missing.

The Hub is a server of our own on the loopback; what it serves is made here, in the shape of the
real repositories.
"""

import contextlib
import json
import random
import shlex
import shutil
import subprocess
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
SIZES = {"train": 45, "validation": 18, "test": 18}


def make_patents(split: str, size: int | None = None) -> datasets.Dataset:
    """Return texts that name their class among common words, as many of each class."""
    generator = random.Random(split)
    labels = [number % len(PATENT_CLASSES) for number in range(size or SIZES[split])]
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


def write_parquet(folder: Path, configs: list[str], *, size: int | None = None):
    """Write the patents as Parquet with a card that lists the configurations, as `push_to_hub`
    does.
    """
    card = ["---", "configs:"]
    for config in configs:
        place = "data" if config == "default" else config
        (folder / place).mkdir(parents=True)
        card += [f"- config_name: {config}", "  data_files:"]
        for split in SIZES:
            make_patents(split, size).to_parquet(folder / place / f"{split}-00000-of-00001.parquet")
            card += [f"  - split: {split}", f"    path: {place}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", "# Patents"]), encoding="utf-8")


def write_distilbert(folder: Path, *, seed: int = 0) -> DistilBertForMaskedLM:
    """Write a DistilBERT of two layers, 32 wide, with the files of distilbert-base-uncased: a
    masked language model, so without a classifier.
    """
    tokenizer = train_wordpiece(make_patents("train")["text"][:])
    torch.manual_seed(seed)
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


def write_repositories(root: Path) -> None:
    """Write what the tutorial needs, and repositories that must be refused."""
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


class Served:
    """A Hub of our own, and a process with an empty home that knows no other, and forks others like it."""

    def __init__(self, folder: Path, hub: HubServer):
        self.root, self.hub, self.home = hub.root, hub, folder / "home"
        self.forker = Forker(start_forker(**environment(hub, self.home)), folder / "said")

    def call(self, *flags, check: bool = False) -> subprocess.CompletedProcess:
        return self.forker.call("train_classifier.py", *flags, check=check)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_repositories(folder / "hub")
    with HubServer(folder / "hub") as hub:
        made = Served(folder, hub)
        yield made
        made.forker.stop()


@pytest.fixture(scope="module")
def recipe(served, tmp_path_factory):
    """The folder of two runs of the tutorial's command, `first` with the Hub and `again` when it
    is gone, and what they printed.
    """
    folder = tmp_path_factory.mktemp("recipe")
    command = [*RECIPE, "--cache-dir", folder / "cache", "--output-dir"]
    first = served.call(*command, folder / "first", check=True)
    with served.hub.away():
        again = served.call(*command, folder / "again", check=True)
    return folder, first, again


def test_the_tutorials_command_downloads_trains_and_scores(recipe):
    folder, first, _ = recipe
    assert (
        "45 train, 18 validation, 18 test texts, 9 classes" in first.stdout
        and "cut from train" not in first.stdout
    )
    assert "DistilBertForSequenceClassification" in first.stdout and first.stderr == ""
    config = json.loads((folder / "first/best/config.json").read_text())
    assert [config["id2label"][str(number)] for number in range(9)] == PATENT_CLASSES
    assert 0 <= json.loads((folder / "first/metrics.json").read_text())["test_accuracy"] <= 1


def test_all_downloads_lie_in_the_cache_dir(recipe, served):
    folder, *_ = recipe
    repositories = {path.name for path in (folder / "cache").iterdir() if "--" in path.name}
    assert repositories == {
        "models--distilbert--distilbert-base-uncased",
        "datasets--ccdv--patent-classification",
    }
    assert [
        path for path in served.home.glob("**/*") if "patent" in path.name or "distilbert" in path.name
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


def test_an_embedding_model_goes_into_the_cache(served, tiny_embedder, sentences, tmp_path):
    (served.root / "models/some").mkdir()
    (served.root / "models/some/embedder").symlink_to(tiny_embedder)
    flags = ["--model", "some/embedder", "--cache-dir", tmp_path / "cache", "--index", tmp_path / "ix"]
    done = served.forker.call("embed_search.py", "index", sentences, *flags, "--json")
    assert json.loads(done.stdout)["rows"] == 60 and list((tmp_path / "cache").rglob("model.safetensors"))


@dataclass
class Refusal:
    """How a command line ended that was refused."""

    code: int
    seconds: float
    stdout: str
    stderr: str


def run_refused(served: Served, folder: Path, command_lines: dict[str, list]) -> dict[str, Refusal]:
    """Run command lines one after the other, and return how each ended."""
    common, ends = ["--cache-dir", folder / "cache", "--output-dir", folder / "run"], {}
    for name, line in command_lines.items():
        start = time.monotonic()
        done = served.call(*line, *common)
        ends[name] = Refusal(done.returncode, time.monotonic() - start, done.stdout, done.stderr)
    return ends


@pytest.fixture(scope="module")
def refusals(served, sentences_csv, tmp_path_factory):
    """What the Hub does not have, or has in a form that is not taken, by the name of the case; and
    the requests that the Hub got.
    """
    known = len(served.hub.requests)
    ends = run_refused(
        served,
        tmp_path_factory.mktemp("refusals"),
        {
            "unknown model": ["--model", "nobody/nothing", "--dataset", sentences_csv],
            "unknown data set": ["--dataset", "nobody/nothing"],
            "pickle": ["--model", "owner/only-pickle", "--dataset", sentences_csv, "--inspect"],
            "script": ["--dataset", "owner/only-script"],
            "no data": ["--dataset", "owner/only-card"],
            "no configuration": ["--dataset", "owner/two-configs"],
        },
    )
    return ends, served.hub.requests[known:]


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
def refusals_without_hub(served, sentences_csv, tmp_path_factory):
    """What is neither cached nor to be had, for nothing listens at the Hub's address."""
    with served.hub.away():
        return run_refused(
            served,
            tmp_path_factory.mktemp("without-hub"),
            {
                "model": ["--model", "distilbert/distilbert-base-uncased", "--dataset", sentences_csv],
                "dataset": ["--dataset", "ccdv/patent-classification"],
            },
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


SHORT = ["--model", "owner/model", "--dataset", "owner/data", "--max-steps", 2, "--batch-size", 4]
SHORT += ["--max-train-samples", 18, "--max-eval-samples", 9, "--max-length", 16, "--save-every", 1]


class Published:
    """A model and a data set on the Hub, with a tag each, and commands that use them."""

    def __init__(self, served: Served, folder: Path):
        self.served, self.hub, self.folder = served, served.hub, folder

    def commit(self, kind: str, name: str, revision: str) -> str:
        return self.hub.repository(kind, name, revision).commit

    def call(self, *flags, hub: str = "with-hub"):
        with self.hub.away() if hub == "without-hub" else contextlib.nullcontext():
            return self.served.call(*flags, "--cache-dir", self.folder / "cache")

    def train(self, name: str, *flags, hub: str = "with-hub") -> dict:
        """Return the settings of a run."""
        done = self.call(*SHORT, *flags, "--output-dir", self.folder / name, hub=hub)
        assert done.returncode == 0, done
        return json.loads((self.folder / name / "config.json").read_text())


@pytest.fixture(scope="module")
def published(served, tmp_path_factory):
    for number, name in enumerate(("model", "model@v1", "model@new")):
        write_distilbert(served.root / "models/owner" / name, seed=number)
    for name, size in (("data", 54), ("data@v1", 27), ("data@new", 36)):
        write_parquet(served.root / "datasets/owner" / name, ["default"], size=size)
    return Published(served, tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def tagged(published) -> dict:
    """The settings of runs of a tag, of the commit that it means, of the main branch, and of the
    tag without the Hub.
    """
    model = published.commit("models", "owner/model", "v1")
    texts = published.commit("datasets", "owner/data", "v1")
    tag = ["--revision", "v1", "--dataset-revision", "v1"]
    return {
        "tag": published.train("tag", *tag),
        "commit": published.train("commit", "--revision", model, "--dataset-revision", texts),
        "main": published.train("main"),
        "tag without the Hub": published.train("tag-cached", *tag, hub="without-hub"),
        "main without the Hub": published.train("main-cached", hub="without-hub"),
    }


def test_a_revision_is_a_tag_a_branch_or_a_commit_and_the_run_keeps_its_commit(published, tagged):
    """Without the Hub, the cache holds both, and the library alone would take the one that it used last."""
    for name, settings in tagged.items():
        revision = "main" if name.startswith("main") else "v1"
        for flag, kind, source in (
            ("revision", "models", "owner/model"),
            ("dataset_revision", "datasets", "owner/data"),
        ):
            assert settings[flag] == published.commit(kind, source, revision), (name, flag)
            card = (Path(settings["output_dir"]) / "best/README.md").read_text()
            assert settings[flag] in card, (name, flag)
    loaded = {
        name: [settings["identity"][part] for part in ("the model", "the data")]
        for name, settings in tagged.items()
    }
    assert loaded["tag"] == loaded["commit"] == loaded["tag without the Hub"]
    assert loaded["main"] == loaded["main without the Hub"]
    assert all(one != other for one, other in zip(loaded["tag"], loaded["main"]))


@pytest.mark.parametrize("hub", ["with-hub", "without-hub"])
@pytest.mark.parametrize("flag", ["--revision", "--dataset-revision"])
def test_an_unknown_revision_is_one_line(flag, hub, published, tagged):
    done = published.call(*SHORT, flag, "nothing", "--output-dir", published.folder / "none", hub=hub)
    said = [line for line in done.stderr.splitlines() if "cached copy" not in line]
    assert done.returncode == 2 and len(said) == 1 and f"{flag} nothing" in said[0], done
    assert not (published.folder / "none").exists()


def test_a_model_from_the_hub_predicts_as_its_folder_does(published, tagged):
    """With the temperature of its training.json; a file of another tool with this name is none of ours."""
    settings = {
        "mine": {"temperature": 4.0},
        "plain": {},
        "foreign": {"dataset_sha256": ..., "seed": "none"},
        "damaged": {"temperature": -1},
    }
    texts, answers = published.folder / "texts.txt", {}
    texts.write_text("Physics with actors\nElectricity and a film\n")
    for name, changes in settings.items():
        folder = published.served.root / "models/owner" / name
        shutil.copytree(published.folder / "main/best", folder)
        content = json.loads((folder / "training.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / "training.json").write_text(json.dumps(content))
        answers[name] = published.call("--model", f"owner/{name}", "--predict", texts)
        local = published.call("--model", folder, "--predict", texts)
        assert (local.returncode, local.stdout) == (answers[name].returncode, answers[name].stdout)
    assert answers["mine"].stdout != answers["plain"].stdout == answers["foreign"].stdout != ""
    damaged = answers["damaged"]
    assert damaged.returncode == 2 and "--model owner/damaged" in damaged.stderr and "-1" in damaged.stderr
    assert damaged.stderr.count("\n") == 1


def test_a_run_is_resumed_from_its_commits_also_when_the_branch_has_moved(published, tagged):
    run, hub = published.folder / "main", published.hub
    weights = (run / "best/model.safetensors").read_bytes()
    for source in ("models/owner/model", "datasets/owner/data"):
        folder = published.served.root / source
        folder.rename(folder.with_name(f"{folder.name}@old"))
        folder.with_name(f"{folder.name}@new").rename(folder)
    hub.repositories.clear()
    first = min((run / "checkpoints").iterdir())
    for flag in ("--revision", "--dataset-revision"):
        done = published.call("--resume", first, flag, "main")
        assert done.returncode == 2 and "differ" in done.stderr and done.stderr.count("\n") == 1, done
    done = published.call("--resume", first)
    assert done.returncode == 0 and "resume   " in done.stdout, done
    assert (run / "best/model.safetensors").read_bytes() == weights
    assert json.loads((run / "config.json").read_text())["revision"] == tagged["main"]["revision"]
