"""Tables and lines fit a terminal, and are as they are in a file."""

import os
import pty
import termios

import pytest
import wcwidth
from hypothesis import given
from hypothesis import strategies as st
from tabulate import tabulate

from common import terminal

WORDS = st.text("abc北京é😀 ", max_size=120).map(lambda text: " ".join(text.split()))
SCORES = "accuracy 0.9167 [0.7500, 1.0000], macro-F1 0.9161 [0.7482, 1.0000], loss 0.2508 on 12 texts"


@pytest.fixture
def at_width(monkeypatch):
    """Return a function that sets the width of the terminal."""

    def set_width(columns):
        monkeypatch.setattr(terminal, "width", lambda stream=None: columns)

    return set_width


def longest(text: str) -> int:
    return max(wcwidth.width(line) for line in text.split("\n"))


def test_the_width_is_that_of_the_terminal_now(tmp_path):
    ours, theirs = pty.openpty()
    with open(theirs, "w") as stream:
        for columns, known in ((80, 80), (120, 120), (0, None)):  # a user pulls at the window
            termios.tcsetwinsize(ours, (24, columns))
            assert terminal.width(stream) == known
    os.close(ours)
    with open(tmp_path / "file", "w") as file:
        assert terminal.width(file) is None


def test_in_a_file_a_table_and_a_line_are_as_they_are(at_width):
    at_width(None)
    rows, headers = [[1, "word " * 60, "x"]], ["a number", "text", "y"]
    assert terminal.table(rows, headers, texts=[1], floatfmt=".3f") == tabulate(rows, headers, floatfmt=".3f")
    assert terminal.prose(SCORES * 9) == SCORES * 9
    assert terminal.room(76) == 76


@given(
    rows=st.lists(st.tuples(st.integers(0, 10**9), WORDS, WORDS, st.floats(0, 1)), min_size=1, max_size=5),
    columns=st.integers(62, 120),
)
def test_a_table_fits_and_its_numbers_are_whole(rows, columns):
    terminal_width, terminal.width = terminal.width, lambda stream=None: columns
    try:
        options = {"floatfmt": ("", "", "", ".4f"), "disable_numparse": [1, 2]}
        shown = terminal.table(rows, ["a number", "text", "words", "score"], texts=[1], folded=[2], **options)
    finally:
        terminal.width = terminal_width
    assert longest(shown) <= columns
    for number, text, words, score in rows:
        assert str(number) in shown and f"{score:.4f}" in shown
        assert text[:5].strip() in shown  # five of Chinese take ten columns
        if all(wcwidth.width(word) <= terminal.LEAST_TEXT for word in words.split()):
            assert all(word in shown for word in words.split()), "what is folded loses no word"


def test_a_text_takes_what_is_left(at_width):
    rows = [[1, 0.5, "s1", "北京" * 100]]
    for columns in (80, 120):
        at_width(columns)
        shown = terminal.table(rows, ["", "score", "id", "text"], texts=[3])
        assert columns - 1 <= longest(shown) <= columns  # a Chinese character takes two
        assert shown.split("\n")[-1].endswith("京...") or shown.split("\n")[-1].endswith("北...")


def test_headers_break_before_texts_are_cut(at_width):
    at_width(60)
    rows = [["a text of some words " * 3, "yes", "no", 0.5]]
    shown = terminal.table(rows, ["text", "predicted class", "true class", "confidence"], texts=[0])
    assert [line.split() for line in shown.split("\n")[:2]] == [
        ["text", "predicted", "true", "confidence"],
        ["class", "class"],
    ]
    assert longest(shown) == 60


def test_what_has_no_room_stands_below_with_the_keys(at_width):
    at_width(40)
    rows = [[f"t{row}", "n", *(row / 9 + column for column in range(9))] for row in range(3)]
    headers = ["name", "kind", *(f"column {number}" for number in range(9))]
    options = {"floatfmt": ".4f", "colalign": ["left", "left", *["right"] * 9]}
    shown = terminal.table(rows, headers, keys=2, **options)
    parts = [part.split("\n") for part in shown.split("\n\n")]
    assert len(parts) == 5 and longest(shown) <= 40
    assert all(part[0].split()[0] in ("column", "name") for part in parts)
    numbers = [[line.split() for line in part[-3:]] for part in parts]
    assert all(line[:2] == [f"t{row}", "n"] for part in numbers for row, line in enumerate(part))
    found = [[float(cell) for part in numbers for cell in part[row][2:]] for row in range(3)]
    assert found == [[round(row / 9 + column, 4) for column in range(9)] for row in range(3)]


def test_a_long_name_leaves_room_for_its_numbers(at_width):
    """Whole: its lines joined are the name."""
    at_width(80)
    names = ["/opt/models/" + "some-very-long-folder/" * 3 + end for end in ("a", "b")]
    rows = [[name, *(number + 0.5 for number in range(4))] for name in names]
    shown = terminal.table(rows, ["model", *(f"score {number}" for number in range(4))], floatfmt=".4f")
    assert longest(shown) <= 80 and "\n\n" not in shown, "one part is enough"
    lines = [line.split(" ")[0] for line in shown.split("\n---")[1].split("\n")[1:]]
    assert "".join(lines) == "".join(names) and all(f"{number}.5000" in shown for number in range(4))


def test_a_table_of_markdown_is_for_a_file(at_width):
    at_width(40)
    rows, headers = [["word " * 30, 1]], ["text", "number"]
    assert terminal.table(rows, headers, texts=[0], style="github") == tabulate(
        rows, headers, tablefmt="github"
    )


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_a_line_breaks_at_words_and_a_number_stays_at_its_name(at_width, columns):
    at_width(columns)
    lines = terminal.prose(SCORES).split("\n")
    assert " ".join(lines) == SCORES and longest("\n".join(lines)) <= columns
    assert not any(line.startswith(("0", "1", "[")) for line in lines)
    at_width(24)
    assert terminal.prose("in brackets the interval 95 % wide").split("\n")[1] == "interval 95 % wide"


def test_what_follows_a_label_stays_beside_it(at_width):
    at_width(30)
    lines = terminal.prose("data     one two three four five six\n         seven eight nine ten eleven")
    assert lines.split("\n") == [
        "data     one two three four",
        "         five six",
        "         seven eight nine ten",
        "         eleven",
    ]
    at_width(34)
    paths = terminal.prose("report: runs/a/report.md   model: runs/a/best").split("\n")
    assert paths == ["report: runs/a/report.md", "model: runs/a/best"]
    at_width(30)
    path = f"report: {'x' * 50}/report.md"
    assert terminal.prose(path).split("\n") == path.split(" "), "a path is never broken"
