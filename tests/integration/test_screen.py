"""What a person sees on a terminal: no line is torn by a progress bar, no bar stays when its work is
done, and neither bars nor colours reach a file.
"""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from conftest import ROOT
from language_models import save_tiny_model

COLUMNS = 130
BAR = re.compile(r"\d+%\||it/s|token/s|text/s|\[\d\d:\d\d<")


class Screen:
    """The final screen of a terminal: understands line ends, returns, and what erases or colours."""

    def __init__(self) -> None:
        self.lines, self.row, self.column = [""], 0, 0

    def feed(self, text: str) -> None:
        """Show what a program has written."""
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n\b]|[^\x1b\r\n\b]", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self._move(1)
            elif part == "\b":
                self.column = max(0, self.column - 1)
            elif part.startswith("\x1b"):
                self._control(part)
            else:
                if self.column == COLUMNS:  # a long line goes on in the next one
                    self._move(1)
                    self.column = 0
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1

    def _move(self, rows: int) -> None:
        self.row = max(0, self.row + rows)
        self.lines += [""] * (self.row + 1 - len(self.lines))

    def _control(self, sequence: str) -> None:
        count = int(re.sub(r"\D", "", sequence) or 1)
        if sequence.endswith("A"):
            self._move(-count)
        elif sequence.endswith("B"):
            self._move(count)
        elif sequence.endswith("K"):
            self.lines[self.row] = self.lines[self.row][: self.column]
        else:
            assert sequence.endswith("m"), f"this screen does not know {sequence!r}"

    @property
    def text(self) -> list[str]:
        """The lines, without the blanks at their ends."""
        return [line.rstrip() for line in self.lines]


def on_terminal(*command: object, code: int = 0) -> tuple[list[str], str]:
    """Run a script in a terminal. Return the lines of its final screen, and all that was written."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, COLUMNS))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm"}
    running = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 1 << 16):
            written += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert running.wait() == code, written.decode()
    screen = Screen()
    screen.feed(written.decode())
    return screen.text, written.decode()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def test_the_screen_of_the_test_is_a_screen():
    screen = Screen()
    screen.feed("50%|##  |\rdone\x1b[K\r\nnext\n\x1b[2mdim\x1b[0m\n" + "x" * (COLUMNS + 2))
    assert screen.text == ["done", "next", "    dim", "       " + "x" * (COLUMNS - 7), "x" * 9]


def test_generate_leaves_whole_lines_and_no_bar(tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"The quick brown fox {number}\n" for number in range(60)))
    flags = ["--model", tiny, "--device", "cpu", "--precision", "fp32", "--batch-size", 4]
    flags += ["--max-new-tokens", 40, "--output", tmp_path / "out.jsonl"]
    lines, written = on_terminal("generate.py", "--prompts-file", prompts, *flags)
    assert BAR.search(written) and "<" in written, "a bar was shown, with the time that remains"
    summary = "".join(lines)  # without a C compiler it says so, which takes more than a line
    assert re.fullmatch(r"prompt [^|]* tokens/s; text [^|]* peak memory [\d,]+ MB; step in [^|]+", summary)
    assert not re.search(rb"\x1b|\r|\d%\|", (tmp_path / "out.jsonl").read_bytes())


def test_an_error_while_a_bar_is_open_is_a_line_of_its_own(tiny, tmp_path):
    """The file may not grow: the error comes while the bar stands."""
    flags = ["--model", tiny, "--device", "cpu", "--precision", "fp32", "--batch-size", 1]
    flags += [flag for number in range(8) for flag in ("--prompt", f"The quick {number}")]
    code = "\n".join(
        [
            "import resource, runpy, sys",
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))",
            "sys.argv = sys.argv[1:]",
            "runpy.run_path('generate.py', run_name='__main__')",
        ]
    )
    out = tmp_path / "out.jsonl"
    lines, written = on_terminal("-c", code, "generate.py", *flags, "--output", out, code=2)
    assert BAR.search(written)
    [line] = [line for line in "".join(lines).split("generate.py: error: ") if line]
    assert line.startswith(f"--output {out}") and not BAR.search(line)


def test_index_leaves_whole_lines_and_no_bar(tiny_embedder, tmp_path, cache_dir):
    texts = tmp_path / "texts.csv"
    texts.write_text("text\n" + "".join(f"The quick brown fox {number}\n" for number in range(400)))
    flags = [
        "--index",
        tmp_path / "index",
        "--model",
        tiny_embedder,
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    lines, written = on_terminal(
        "embed_search.py", "index", texts, *flags, "--block", 20, "--cache-dir", cache_dir
    )
    assert BAR.search(written)
    shown = "\n".join(lines).strip()
    assert re.match("texts +/", shown) and not BAR.search(shown.replace("texts/s on", ""))
