"""The commands of README.md and docs/*.md that need no network and no long time run, and print what
the pages show, but for figures.
"""

import contextlib
import io
from pathlib import Path

import pytest

import embed_search
import generate
import train_classifier
from common import cli
from conftest import heavy
from documents import COLUMNS, PAGES, commands, make_workspace, run, script_calls, shortened, without_figures

SCRIPTS = {"train_classifier.py": train_classifier, "generate.py": generate, "embed_search.py": embed_search}
# a part of a command -> why tests/unit/test_pages.py parses it and no test runs it
ONLY_PARSED = {
    "pip install": "installs packages; .ci/run does it",
    "python -m pytest": "runs the tests themselves",
    "tensorboard ": "a server",
    "ruff check": ".ci/run does it",
    "pyrefly check": "the same",
    "tests/documents.py": "changes the pages",
    "tests/benchmarks/": "takes minutes",
    "torchrun ": "tests/integration/test_torchrun.py runs such commands with small models",
    "distilbert": "needs the Hub",
    "HuggingFaceTB/": "needs the Hub",
    "sentence-transformers/": "needs the Hub",
    "--epochs 3 --output-dir runs/news": "trains for minutes; the slow tests run it on three seeds",
    "--resume runs/news": "goes on with that run",
    "--compare runs/": "needs these runs; tests/integration/test_compare.py makes some",
    "--seeds 0 1 2": "trains for many minutes; tests/integration/test_study.py runs small ones",
    "--model runs/news/best": "needs that run",
    "bundled/bbc-news": "encodes for minutes on one core",
    "--index news": "needs that index",
    "embed_search.py index texts.csv": "the reader's own file, and a model of the Hub",
    "me/my-adapter": "the reader's own model and adapter; tests/integration/test_adapters.py makes some",
    "--serve": "runs until it is stopped; tests/integration/test_server.py asks it",
    "127.0.0.1:8000/search": "asks the page's server; tests/integration/test_page.py does",
    "--predict new.csv": "the reader's own file",
    "--dataset train.csv": "the reader's own file; test_tasks.py makes some of such shapes",
    "--dataset train.tsv": "the reader's own file",
    "--dataset films.csv": "the reader's own file",
    "--dataset msr_paraphrase_train.tsv": "the reader's own file",
    "--dataset news.csv": "the reader's own file",
    "embed_search.py evaluate": "encodes for minutes on one core",
    "--vectors vectors.npy": "needs what the command before it exports; test_export.py runs both",
    "--index milvus:": "needs Milvus; tests/integration/test_milvus.py runs these commands",
    "--dataset reviews.csv": "the reader's own file",
    "--prompts-file reviews.csv": "the reader's own file; test_prompts.py makes some",
    "questions.csv": "the reader's own file",
    "--interactive": "asks at a terminal",
    "--num-samples 3": "generates for a minute",
    "--max-new-tokens 60": "generates for many seconds; --check and --explain run",
    "--max-new-tokens 40": "the same",
    '"Why is the sky blue?"': "generates until a stop string",
}


def reason_not_to_run(text: str) -> str | None:
    """Return why a command is only parsed, or None when a test runs it."""
    return next((reason for part, reason in ONLY_PARSED.items() if part in text), None)


ALL_COMMANDS = [command for page in PAGES for command in commands(page)]
RUN = list(dict.fromkeys(command.text for command in ALL_COMMANDS if not reason_not_to_run(command.text)))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder as a reader has it, in which the commands of all pages run one after the other."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def run_in_this_process(text: str, folder: Path) -> list[str]:
    """Run a command in `folder`, its script without the seconds of its imports; return its output."""
    if not script_calls(text):
        return run(text, folder)
    [(script, arguments)] = script_calls(text)
    stdout = io.StringIO()
    stderr = stdout if "2>&1" in text else io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        cli.run(SCRIPTS[script].make_parser(), SCRIPTS[script].main, arguments)
    return [line.rstrip() for line in stdout.getvalue().strip("\n").splitlines()]


# these train for a quarter of a minute, or read the words of a GGUF file with transformers for half
# of that; other tests train, predict and compare with less
HEAVY = ("--output-dir runs/reviews", "--model runs/reviews/best", "--compare-tokenizer")
CASES = [heavy(text) if any(part in text for part in HEAVY) else text for text in RUN]


@pytest.mark.parametrize("text", CASES)
def test_a_command_prints_what_the_pages_show(text, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("COLUMNS", COLUMNS)
    output = run_in_this_process(text, workspace)
    for command in ALL_COMMANDS:
        if command.text == text and command.language == "console":
            expected = shortened(output, command.output)
            assert [without_figures(line) for line in command.output] == [
                without_figures(line) for line in expected
            ], f"{command}: refresh it with tests/documents.py"


def test_each_reason_is_still_one():
    texts = [command.text for command in ALL_COMMANDS]
    assert [part for part in ONLY_PARSED if not any(part in text for text in texts)] == []


def test_commands_of_each_script_run():
    scripts = {script for text in RUN for script, _ in script_calls(text)}
    assert scripts == set(SCRIPTS)
