"""A training run on a terminal: bars come and go, and at the end the screen holds what a file would
hold, line by line.
"""

import re

import pytest
import wcwidth

from conftest import make_sentences, write_lines
from terminal import run_on_terminal

FLAGS = ["--epochs", 2, "--max-length", 24, "--batch-size", 4, "--lr", "3e-3", "--log-every", 3]
# what differs from run to run: times, speeds, memory
FIGURES = re.compile(r"(?<=, )[\d.]+ examples/s|^(time|memory|disk) .*|(?<= )\d+\.\d$", re.M)


@pytest.fixture(scope="module")
def flags(tiny_model, tmp_path_factory):
    """Texts so short that a file has them whole; a cache of its own: with bars for reading and for
    tokenising, too.
    """
    cache = tmp_path_factory.mktemp("cache")
    rows = [
        f"{number} {text[:50].strip()},{label}" for number, (text, label) in enumerate(make_sentences(120))
    ]
    write_lines(cache / "texts.csv", ["text,label", *rows])
    return ["--model", tiny_model, "--dataset", cache / "texts.csv", "--cache-dir", cache, *FLAGS]


def lines_of(text: str) -> list[str]:
    """Return the lines of a text without trailing blanks, and with each figure that varies, and the
    blanks before it, as #.
    """
    text = FIGURES.sub("#", re.sub(r" +$", "", text, flags=re.M))
    return re.sub(" +#", " #", text).rstrip("\n").split("\n")


def test_the_final_screen_of_a_run_is_what_a_file_would_hold(flags, forking, tmp_path):
    """The epoch lines are whole, no bar is left, and colours and bars never reach the file."""
    folder = tmp_path / "run"
    command = ["train_classifier.py", *flags, "--output-dir", folder]
    code, written, screen = run_on_terminal(forking, *command)
    assert code == 0, written
    bars = [bar for bar in ("tokenising", "epoch 1/2:", "epoch 2/2:", "evaluating:") if bar in written]
    assert bars == ["tokenising", "epoch 1/2:", "epoch 2/2:", "evaluating:"]
    assert re.search(r"epoch 2/2:.*loss \d\.\d+, [\d.]+ examples/s, \d+ seconds left", written)

    folder.rename(tmp_path / "first")
    done = forking.call(*command)
    assert done.stderr == "" and not re.search(r"[\r\x1b\b]", done.stdout)
    assert lines_of("\n".join(screen)) == lines_of(done.stdout)
    for name in ("report.md", "predictions.csv", "metrics.jsonl", "config.json"):
        assert not re.search(r"[\r\x1b\b]|it/s|step/s", (tmp_path / "first" / name).read_text()), name


def test_what_a_run_shows_fits_the_terminal(tiny_model, sentences_csv, forking, tmp_path):
    """Scores, tables and all that is said before the first step; texts are longer than it is wide."""
    flags = ["--model", tiny_model, "--dataset", sentences_csv, *FLAGS, "--output-dir", tmp_path / "run"]
    code, written, _ = run_on_terminal(forking, "train_classifier.py", *flags, columns=80)
    assert code == 0, written
    lines = [re.sub(r".*[\r\x1b]", "", line.rstrip("\r")) for line in written.split("\n")]
    shown = [line for line in lines if "/" not in line]  # a path has no place to break
    assert max(map(wcwidth.width, shown)) == 80, written
    assert any(re.search(r"\.\.\.  +(pos|neg)  ", line) for line in shown), "a text is cut for its answers"


@pytest.mark.slow
def test_ctrl_c_leaves_no_bar_on_the_screen(flags, forking, tmp_path):
    """As the terminal sends it, in the second epoch."""
    folder, interrupted = tmp_path / "run", tmp_path / "interrupted.py"
    interrupted.write_text(INTERRUPTED_IN_EPOCH_2)
    code, written, screen = run_on_terminal(forking, interrupted, *flags, "--output-dir", folder)
    assert code == 130, written
    assert screen[-2:] == [
        "SIGINT: saving after this step; a second one ends the run at once",
        f"train_classifier.py: stopped by SIGINT; continue with --resume {folder}",
    ]
    assert sum(line.startswith("epoch ") for line in screen) == 1 and not re.search(
        "[█▏▎▍▌▋▊▉]", "".join(screen)
    )


INTERRUPTED_IN_EPOCH_2 = """
import os, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
import train_classifier
from common import cli

steps = 0
def interrupt(*_):
    global steps
    steps += 1
    if steps == 30:
        os.kill(os.getpid(), signal.SIGINT)

register_optimizer_step_post_hook(interrupt)
cli.run(train_classifier.make_parser(), train_classifier.main, sys.argv[1:])
"""
