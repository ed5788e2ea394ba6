"""The commands of README.md and docs/*.md: extract them, and refresh the outputs below them.

  python tests/documents.py --list README.md                      # the commands of a page
  python tests/documents.py --refresh README.md docs/generate.md  # run them, and replace their outputs
  python tests/documents.py --refresh docs/*.md --only=--inspect  # only commands that contain a text
  python tests/documents.py --refresh docs/*.md --skip "--epochs 3" --skip bundled/bbc-news

A page shows commands in two kinds of fenced blocks:

  ```console    lines that begin with "$ " are commands, the lines below each are its standard output
  ```bash       each line is a command, and no output is shown

A line that ends with a backslash continues on the next one. An output that the author shortened has
lines of three dots, and a refresh keeps its shape: as many lines as before from the beginning, as
many from the end, and between two lines of dots as many as before, from the line that is equal to
the first of them but for its figures. A block that begins with "```console by-hand" is left as it
is: it shows a key press or a state that a new run does not meet.

All commands of one call run in one folder, which has a link to each file of the project, in the
order of the pages; a command that stands on several pages runs once.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
SCRIPTS = ("train_classifier.py", "generate.py", "embed_search.py")
DOTS = "..."
COLUMNS = "110"  # the width of the terminal that the scripts see
FENCE = re.compile(r"^```(?P<info>.*)$")
NUMBER = re.compile(r"[-+]?\d[\d,.]*%?")
PRECISION = re.compile(r"\b(bf16 autocast|fp16 autocast|fp32|bf16|fp16)\b")


@dataclass
class Command:
    """A command of a page, with the output that the page shows below it."""

    page: str
    line: int  # of the page, from 1
    text: str  # continuation lines included
    language: str  # of the block: console or bash
    by_hand: bool
    output: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@dataclass
class Block:
    """A fenced block: its language, the words after it, and its lines without the fences."""

    language: str
    words: list[str]
    first_line: int  # of the page, from 1
    lines: list[str]


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    result: list[Block] = []
    inside: Block | None = None
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        fence = FENCE.match(line)
        if fence is None:
            if inside is not None:
                inside.lines.append(line)
        elif inside is None:
            language, *words = fence["info"].split() or [""]
            inside = Block(language, words, number + 1, [])
        else:
            result.append(inside)
            inside = None
    assert inside is None, f"{page}: the fence above line {inside and inside.first_line} is never closed"
    return result


def commands(page: str) -> list[Command]:
    """Return the commands of a page in their order."""
    result: list[Command] = []
    for block in blocks(page):
        if block.language not in ("console", "bash"):
            continue
        continues = False
        for number, line in enumerate(block.lines, start=block.first_line):
            starts = line.startswith("$ ") if block.language == "console" else bool(line.strip())
            if continues:
                result[-1].text += "\n" + line
            elif starts and not line.startswith("#"):
                text = line.removeprefix("$ ")
                result.append(Command(page, number, text, block.language, "by-hand" in block.words))
            elif block.language == "console":
                assert number > block.first_line, f"{page}:{number}: a console block begins with a command"
                result[-1].output.append(line)
            continues = (continues or starts) and line.endswith("\\")
    return result


def script_calls(text: str) -> list[tuple[str, list[str]]]:
    """Return (script, arguments) for each call of a Python file in a command line."""
    lexer = shlex.shlex(text.replace("\\\n", " ").replace("2>&1", ""), posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    calls, words = [], []
    for token in [*lexer, ";"]:
        if set(token) <= set("&|;<>"):
            script = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
            if script is not None and words[0] in ("python", "torchrun"):
                calls.append((words[script], words[script + 1 :]))
            words = []
        else:
            words.append(token)
    return calls


def without_figures(line: str) -> str:
    """Return a line of output without what differs between machines and runs: figures, precision, widths."""
    line = re.sub(r"\s+", " ", NUMBER.sub("#", PRECISION.sub("#", line)))
    return re.sub(r"-{2,}", "--", line).strip()


def shortened(output: list[str], before: list[str]) -> list[str]:
    """Return `output`, shortened as the author shortened the output that stood there before.

    Raises ValueError when a part between two lines of dots is not in `output`.
    """
    if DOTS not in before:
        return output
    parts: list[list[str]] = [[]]
    for line in before:
        if line == DOTS:
            parts.append([])
        else:
            parts[-1].append(line)
    first, *middle, last = parts
    result = [*output[: len(first)], DOTS]
    position = len(first)
    for part in middle:
        wanted = without_figures(part[0])
        found = (row for row in range(position, len(output)) if without_figures(output[row]) == wanted)
        start = next(found, None)
        if start is None:
            raise ValueError(f"the output has no line {part[0]!r} any more; shorten it by hand")
        position = start + len(part)
        result += [*output[start:position], DOTS]
    return [*result, *output[len(output) - len(last) :]]


def rewrite(page: str, changed: Command, output: list[str]) -> None:
    """Replace the output below one command of a page."""
    path = ROOT / page
    lines = path.read_text(encoding="utf-8").splitlines()
    start = changed.line + changed.text.count("\n")  # the line after the command, from 0
    lines[start : start + len(changed.output)] = output
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(text: str, folder: Path) -> list[str]:
    """Run a command in `folder` as a shell would, and return the lines of its standard output.

    Raises ValueError when it fails.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": COLUMNS}
    done = subprocess.run(
        ["bash", "-c", text], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        raise ValueError(f"exit code {done.returncode}")
    return [line.rstrip() for line in done.stdout.strip("\n").splitlines()]


def make_workspace(folder: Path) -> Path:
    """Fill `folder` with a link to each file and folder of the project, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in ROOT.iterdir():
        link = folder / source.name
        if not source.name.startswith(".") and source.name != "runs" and not link.exists():
            link.symlink_to(source)
    return folder


def refresh(pages: list[str], folder: Path, *, only: list[str], skip: list[str]) -> int:
    """Run the commands of the pages and replace their outputs; return how many could not be refreshed."""
    outputs: dict[str, list[str]] = {}
    failures = 0
    for page in pages:
        for number in range(len(commands(page))):
            command = commands(page)[number]  # read again: the lines above may have moved it
            chosen = not only or any(text in command.text for text in only)
            chosen = chosen and not any(text in command.text for text in skip)
            if command.language != "console" or command.by_hand or not chosen:
                continue
            print(command, file=sys.stderr, flush=True)
            try:
                if command.text not in outputs:
                    outputs[command.text] = run(command.text, folder)
                rewrite(page, command, shortened(outputs[command.text], command.output))
            except ValueError as error:
                failures += 1
                print(f"NOT REFRESHED: {command}: {error}", file=sys.stderr, flush=True)
    return failures


def main() -> int:
    """Run the command line, and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="print the commands")
    action.add_argument("--refresh", action="store_true", help="run the commands and replace their outputs")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"default: {' '.join(PAGES)}")
    parser.add_argument(
        "--only", action="append", default=[], help="only commands that contain this text; repeatable"
    )
    parser.add_argument(
        "--skip", action="append", default=[], help="no command that contains this text; repeatable"
    )
    parser.add_argument("--workspace", type=Path, help="where the commands run (default: a temporary folder)")
    args = parser.parse_args()
    pages = [str(Path(page).resolve().relative_to(ROOT)) for page in args.pages] or list(PAGES)
    if args.list:
        print("\n".join(str(command) for page in pages for command in commands(page)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_workspace(args.workspace or Path(temporary))
        return min(1, refresh(pages, folder, only=args.only, skip=args.skip))


if __name__ == "__main__":
    sys.exit(main())
