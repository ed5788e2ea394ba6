"""What a person sees on a terminal: no line is torn by a progress bar, no bar stays when its work
is done, and neither bars nor colours reach a file.
"""

import re
from pathlib import Path

import pytest
import wcwidth

from conftest import quick
from language_models import needs_compiler
from terminal import run_on_terminal

COLUMNS = 130
BAR = re.compile(r"\d+%\||it/s|token/s|text/s|\[\d\d:\d\d<")


@pytest.fixture
def on_terminal(forking):
    """Return a function that runs a script in a terminal, and returns the lines of its final screen
    and all that was written.
    """

    def run(*command: object, code: int = 0) -> tuple[list[str], str]:
        ended_with, written, lines = run_on_terminal(forking, *command, columns=COLUMNS)
        assert ended_with == code, written
        return lines, written

    return run


def test_generate_leaves_whole_lines_and_no_bar(on_terminal, tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"The quick brown fox {number}\n" for number in range(60)))
    flags = ["--model", tiny, "--device", "cpu", "--precision", "fp32", "--batch-size", 4]
    flags += ["--max-new-tokens", 40, "--output", tmp_path / "out.jsonl"]
    lines, written = on_terminal("generate.py", "--prompts-file", prompts, *flags)
    assert BAR.search(written) and "<" in written, "a bar was shown, with the time that remains"
    # without a C compiler it says so, which takes more than a line; a break stands for a space
    summary = " ".join("".join(line.ljust(COLUMNS) for line in lines).split())
    assert re.fullmatch(r"prompt [^|]* tokens/s; text [^|]* peak memory [\d,]+ MB; step in [^|]+", summary)
    assert not re.search(rb"\x1b|\r|\d%\|", (tmp_path / "out.jsonl").read_bytes())


IMPATIENT = """
import runpy, sys
from common.generation import fast_decoding
fast_decoding.PATIENCE = 0
sys.argv = sys.argv[1:]
runpy.run_path("generate.py", run_name="__main__")
"""


@needs_compiler
def test_how_far_a_long_prompt_is_read_is_shown_until_it_is(on_terminal, tiny, tmp_path):
    """With a bar at once, where it comes after some seconds."""
    impatient, prompt = tmp_path / "impatient.py", "The quick brown fox. " * 40
    impatient.write_text(IMPATIENT)
    flags = ["--model", tiny, "--device", "cpu", "--precision", "fp32", "--max-new-tokens", 2]
    lines, written = on_terminal(impatient, "generate.py", "--prompt", prompt, *flags)
    assert re.search(r"reading: +\d+%", written)
    assert not any("reading" in line or BAR.search(line.replace("tokens/s", "")) for line in lines)


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
sys.argv = sys.argv[1:]
runpy.run_path("generate.py", run_name="__main__")
"""


def test_an_error_while_a_bar_is_open_is_a_line_of_its_own(on_terminal, tiny, tmp_path):
    """The file may not grow: the error comes while the bar stands."""
    flags = ["--model", tiny, "--device", "cpu", "--precision", "fp32", "--batch-size", 1]
    flags += [flag for number in range(8) for flag in ("--prompt", f"The quick {number}")]
    limited, out = tmp_path / "limited.py", tmp_path / "out.jsonl"
    limited.write_text(LIMITED)
    lines, written = on_terminal(limited, "generate.py", *flags, "--output", out, code=2)
    assert BAR.search(written)
    [line] = [line for line in "".join(lines).split("generate.py: error: ") if line]
    assert line.startswith(f"--output {out}") and not BAR.search(line)


def test_index_leaves_whole_lines_and_no_bar(on_terminal, tiny_embedder, tmp_path, cache_dir):
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


@pytest.fixture(scope="module")
def texts_csv(tmp_path_factory) -> Path:
    """Texts longer than a screen, one of them Chinese, with columns."""
    texts = [f"The quick brown fox number {number} jumps over the lazy dog " * 3 for number in range(24)]
    texts[1] = "敏捷的棕色狐狸跳过了懒狗" * 20
    rows = [f"s{number},{text},{number * 10**6},a label" for number, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    path.write_text("id,text,price,label\n" + "\n".join(rows) + "\n")
    return path


SEARCHES = {  # name: (command, columns of the terminal)
    "search": (["search", "TEXTS", "--query", "a fox"], 80),
    "similarity": (["similarity", "TEXTS", "--query", "a fox"], 80),
    "pairs": (["pairs", "TEXTS"], 120),
    "duplicates": (["duplicates", "TEXTS", "--threshold", "0.5"], 80),
    "cluster": (["cluster", "TEXTS", "--clusters", "auto"], 80),
    "list": (["list", "--index", "INDEX"], 80),
    "show": (["show", "s1", "s2", "--index", "INDEX", "--vector"], 80),
}


@pytest.mark.parametrize("command, columns", quick(SEARCHES, "search", "cluster", "show"))
def test_what_a_search_shows_fits_the_terminal(
    command, columns, texts_csv, tiny_embedder, cache_dir, forking, tmp_path
):
    compute = ["--model", tiny_embedder, "--device", "cpu", "--precision", "fp32", "--cache-dir", cache_dir]
    if "INDEX" in command:
        done = forking.call(
            "embed_search.py", "index", texts_csv, "--index", tmp_path / "ix", "--id-column", "id", *compute
        )
        assert done.returncode == 0, done.stderr
        compute = []
    places = {"TEXTS": texts_csv, "INDEX": tmp_path / "ix"}
    flags = [places.get(word, word) for word in command]
    code, written, _ = run_on_terminal(forking, "embed_search.py", *flags, *compute, columns=columns)
    assert code == 0, written
    lines = re.sub(r".*\x1b\[K", "", written).replace("\r", "").split("\n")
    widths = [
        wcwidth.width(line) for line in lines if not any(str(place) in line for place in places.values())
    ]
    assert columns - 10 < max(widths) <= columns, written
    assert written.count("loading PyTorch") <= 1, "it is said once"
