"""README.md and docs/*.md: their commands parse, and what they name exists: flags, files, links, code."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

import embed_search
import generate
import train_classifier
from conftest import ROOT
from documents import DOTS, PAGES, SCRIPTS, blocks, commands, script_calls, shortened, without_figures

MAX_README_LINES = 250
MAX_COLUMNS = 110
PARSERS = {"train_classifier.py": train_classifier, "generate.py": generate, "embed_search.py": embed_search}
OTHER_PROGRAMS = {"clang-format", "curl", "head", "pip", "pyrefly", "ruff", "tensorboard"}
# flags of other programs that the pages mention outside of commands
FOREIGN_FLAGS = {"--nproc-per-node", "--max-restarts", "--python-platform"}
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OUR_PATH = re.compile(r"(?:common|tests|docs|\.assets|\.ci)/[\w./-]*\w")
ALL_COMMANDS = [command for page in PAGES for command in commands(page)]


def prose(page: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(
        r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def parser_of(script: str, monkeypatch) -> argparse.ArgumentParser:
    """Return the parser of a script, which looks at no file here, or of a benchmark."""
    if script in PARSERS:
        parser = PARSERS[script].make_parser()
        parser.check = None  # the pages name the reader's own files
        return parser
    monkeypatch.syspath_prepend(str(ROOT / Path(script).parent))
    return importlib.import_module(Path(script).stem).make_parser()


def all_flags(parser: argparse.ArgumentParser) -> set[str]:
    """Return the flags of a parser and of its subcommands."""
    flags = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags.update(*(all_flags(command) for command in action.choices.values()))
    return flags


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(str(page.relative_to(ROOT))), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=str)
def test_a_command_parses(command, monkeypatch):
    calls = script_calls(command.text)
    for script, arguments in calls:
        if script in SCRIPTS or script.startswith("tests/benchmarks/"):
            parser_of(script, monkeypatch).parse_args(arguments)
        else:
            assert (ROOT / script).is_file()
    if not calls and not command.text.startswith("python -m pytest"):
        assert command.text.split()[0] in OTHER_PROGRAMS


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    """A path below common/, tests/, docs/ is one of the project; a bare name of a Python file is of one."""
    names = {path.name for path in ROOT.rglob("*.py")}
    missing = []
    for code in INLINE_CODE.findall(prose(page)):
        missing += [path for path in OUR_PATH.findall(code) if not (ROOT / path).exists()]
        if re.fullmatch(r"\w+\.py", code) and code not in names:
            missing.append(code)
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_named_flags_exist(page, monkeypatch):
    known = FOREIGN_FLAGS | {"--help"}
    for script in [
        *SCRIPTS,
        *(f"tests/benchmarks/{path.name}" for path in ROOT.glob("tests/benchmarks/*.py")),
    ]:
        if "make_parser" in (ROOT / script).read_text(encoding="utf-8"):
            known |= all_flags(parser_of(script, monkeypatch))
    text = prose(page)
    if page == "docs/changes.md":  # what it says was before names flags of the past
        text = "\n".join(row.split(" | ")[1] for row in text.splitlines() if row.startswith("| `"))
    named = {flag for code in INLINE_CODE.findall(text) for flag in FLAG.findall(code)}
    assert named - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_quoted_code_is_the_code(page):
    """A block of Python begins with a comment that names its file; its lines stand there in this
    order, with lines left out where it has three dots.
    """
    missing = []
    for block in blocks(page):
        if block.language != "python":
            continue
        path, *quoted = block.lines
        lines = [line.strip() for line in (ROOT / path.removeprefix("# ")).read_text("utf-8").splitlines()]
        position = 0
        for part in "\n".join(map(str.strip, quoted)).split(f"\n{DOTS}\n"):
            wanted = part.splitlines()
            starts = range(position, len(lines) - len(wanted) + 1)
            start = next((row for row in starts if lines[row : row + len(wanted)] == wanted), None)
            if start is None:
                missing.append(f"{page}:{block.first_line}: {path}: {part}")
            else:
                position = start + len(wanted)
    assert missing == []


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_README_LINES
    assert [line for line in lines if len(line) > MAX_COLUMNS and not line.startswith("|")] == []


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_are_short(page):
    """But for tables, and what has no space to be broken at."""
    long = [line for line in prose(page).splitlines() if len(line) > MAX_COLUMNS]
    assert [line for line in long if line[0] != "|" and " " in line.strip()] == []


def test_readme_has_the_commands_that_ci_runs():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install -r requirements.txt && python -m pytest" in lines
    assert "pip install -r requirements.txt && python train_classifier.py --epochs 3" in lines
    formats = "ruff format --check . && clang-format -n --Werror common/*.[ch] common/*/*.c"
    types = "pyrefly check && pyrefly check --python-platform darwin"
    checks = f"ruff check . && {formats} && {types}"
    ours = (ROOT / ".ci" / "run").read_text().replace("\\\n", "")  # a line that goes on
    assert any(checks in line for line in lines) and checks in ours


@pytest.mark.parametrize(
    "before, after",
    [
        ([], ["a 1", "b 2", "c 3", "d 4", "e 5"]),
        (["a 9", "b"], ["a 1", "b 2", "c 3", "d 4", "e 5"]),
        (["a 9", "..."], ["a 1", "..."]),
        (["...", "e 9"], ["...", "e 5"]),
        (["a 9", "...", "c   9", "d", "...", "e 9"], ["a 1", "...", "c 3", "d 4", "...", "e 5"]),
        (["...", "b 9", "..."], ["...", "b 2", "..."]),
    ],
)
def test_a_new_output_is_shortened_like_the_old_one(before, after):
    assert shortened(["a 1", "b 2", "c 3", "d 4", "e 5"], before) == after


def test_a_part_that_is_gone_is_not_replaced_by_another():
    with pytest.raises(ValueError, match="'x 1'"):
        shortened(["a 1", "b 2"], ["...", "x 1", "..."])


@pytest.mark.parametrize(
    "one, other",
    [
        ("accuracy 0.9812 on 213 texts", "accuracy 0.5 on 1,701 texts"),
        ("cpu, 2 threads, bf16 autocast", "cpu, 1 threads, fp32"),
        ("---  -----", "-----  --"),
    ],
)
def test_figures_and_widths_do_not_count(one, other):
    assert without_figures(one) == without_figures(other)


def test_words_count():
    assert without_figures("5 clusters") != without_figures("5 groups")
    assert without_figures("-") != without_figures("--")


@pytest.mark.parametrize(
    "text, calls",
    [
        ("python generate.py --prompt 'a | b' > out.txt", [("generate.py", ["--prompt", "a | b"])]),
        ("echo x | python train_classifier.py --predict -", [("train_classifier.py", ["--predict", "-"])]),
        (
            "torchrun --nproc-per-node 2 embed_search.py \\\n  index a --index b  # twice",
            [("embed_search.py", ["index", "a", "--index", "b"])],
        ),
        ("pip install x && python generate.py --chat 2>&1", [("generate.py", ["--chat"])]),
        ("tensorboard --logdir runs", []),
    ],
)
def test_calls_of_scripts_are_taken_out_of_a_command_line(text, calls):
    assert script_calls(text) == calls
