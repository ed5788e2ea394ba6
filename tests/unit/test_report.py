"""What a run says of single texts: which are shown as right and as wrong, and the line of each."""

import csv
import re

import datasets
import pytest
import torch
from markdown_it import MarkdownIt

from common import figures
from common.training.report import Predictions, answer_table
from common.training.run import SINGLE
from common.training.task import Task
from conftest import heavy

LABELS = [0, 1] * 6
WRONG = (0, 3, 4, 7, 8, 10, 11)  # seven of twelve: more than are shown


@pytest.fixture
def predictions():
    """Twelve texts, of rows 101 to 112 of their source, with logits 0 and 2 to 13, so that each
    has a confidence of its own.
    """
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "row": datasets.Value("int64"),
            "num_tokens": datasets.Value("int64"),
            "num_read": datasets.Value("int64"),
        }
    )
    rows = datasets.Dataset.from_dict(
        {
            "text": [f"text {number}" for number in range(11)] + ["a | bar,\n" + "long " * 20],
            "label": LABELS,
            "row": list(range(101, 113)),
            "num_tokens": [5] * 12,
            "num_read": [5] * 12,
        },
        features=features,
    )
    logits = torch.zeros(12, 2)
    for number, label in enumerate(LABELS):
        logits[number, 1 - label if number in WRONG else label] = number + 2
    return Predictions(rows, logits)


def shown(predictions, **options) -> list[list[str]]:
    lines = predictions.examples(style="github", **options).splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


@pytest.mark.parametrize("right", [True, False])
def test_right_and_wrong_ones_are_shown_spread_over_the_split(right, predictions):
    """Oracle: the labels, and a sigmoid of the one logit that is not 0."""
    chosen = [number for number in range(12) if (number not in WRONG) == right]
    rows = shown(predictions, right=right, most=12)
    for number, (text, predicted, true, confidence) in zip(chosen, rows, strict=True):
        assert true == ["no", "yes"][LABELS[number]] and (predicted == true) == right
        assert text == (
            f"text {number}" if number < 11 else "a \\| bar, " + ("long " * 20)[:48] + "..."
        ) and float(confidence) == pytest.approx(torch.tensor(number + 2.0).sigmoid().item(), abs=5e-4)
    few = shown(predictions, right=right, most=3)
    assert few == [rows[number * len(rows) // 3] for number in range(3)] and few[0] == rows[0]


def test_of_none_it_says_none(predictions):
    predictions.predicted = predictions.labels.clone()
    assert predictions.examples(right=False) == "none"


def test_the_file_of_predictions_has_each_row_with_its_source_and_scores(predictions, tmp_path):
    predictions.write_csv(tmp_path / "predictions.csv")
    with open(tmp_path / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["row"]) for row in rows] == list(range(101, 113)) and rows[11][
        "text"
    ] == "a | bar,\n" + "long " * 20
    for number, row in enumerate(rows):
        high, label = torch.tensor(number + 2.0).sigmoid().item(), LABELS[number]
        assert row["true"] == ["no", "yes"][label] and (row["predicted"] == row["true"]) == (
            number not in WRONG
        )
        assert float(row["confidence"]) == pytest.approx(high, abs=1e-6) and float(
            row[f"score {row['predicted']}"]
        ) == pytest.approx(high, abs=1e-6)
        assert float(row["score no"]) + float(row["score yes"]) == pytest.approx(1, abs=2e-6)


# what Markdown would take for more than characters
MARKED = ["a|b", "a\\|b", "a\\", "<b>x</b><script>", "`x`", "```", "**x**", "[x](y)", "![x](y)", "&amp;"]


def test_tables_of_markdown_show_texts_and_names_as_they_are(predictions):
    """Oracle: a parser of Markdown, which allows HTML, as some viewers do."""
    predictions.names[:] = MARKED[:2]
    tables = [
        answer_table(scores_of(len(MARKED)), Task(SINGLE, tuple(MARKED)), "github"),
        predictions.examples(right=True, style="github"),
    ]
    for table, names in zip(tables, [MARKED, MARKED[:2]]):
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(table)
        cells = [token.children for token in tokens if token.type == "inline"]
        assert {child.type for cell in cells for child in cell} <= {"text", "text_special"}
        texts = {"".join(child.content for child in cell) for cell in cells}
        assert texts >= set(names)
        rows = [token for token in tokens if token.type == "tr_open"]
        assert len(cells) == len(rows) * (5 if len(names) > 2 else 4)


# Names and many classes ---------------------------------------------------------------------------

NAMES = ["1.10", "2e3", "007", "1_000", "nan", "inf", "0x10", "-5", "1e999", "True", " ", "a|b", "x\ty"]


def scores_of(count: int) -> dict[str, dict[str, list]]:
    """Return scores of classes whose F1 rises with their number."""
    f1 = [number / count for number in range(count)]
    return {"per_class": {"precision": f1, "recall": f1, "f1": f1, "support": [5] * count}}


@pytest.mark.parametrize("style", ["simple", "github"])
def test_names_that_look_like_numbers_stay_as_they_are(style):
    lines = answer_table(scores_of(len(NAMES)), Task(SINGLE, tuple(NAMES)), style).splitlines()[2:]
    for name, line in zip(NAMES, lines, strict=True):
        expected = " ".join(name.split()).replace("|", "\\|" if style == "github" else "|")
        start = line.lstrip("| ") if style == "github" else line
        assert start.startswith(expected), line
        assert len(line.replace("\\|", "").strip("|").split("|")) == (
            5 if style == "github" else 1 + line.count("|")
        )


def test_predictions_name_classes_as_they_are(predictions):
    predictions.names[:] = ["1.10", "2e3"]
    assert {row[1] for row in shown(predictions, right=True)} == {"1.10", "2e3"}


@pytest.mark.parametrize("count, num_lines", [(2, 2), (30, 30), (31, 20), (1000, 20)])
def test_of_many_classes_the_worst_are_shown(count, num_lines):
    names = [f"class {number}" for number in range(count)]
    table, _, note = answer_table(scores_of(count), Task(SINGLE, tuple(names))).partition("\n\n")
    lines = table.splitlines()[2:]
    assert len(lines) == num_lines and lines[0].startswith("class 0 ")
    assert bool(note) == (count > 30) and (not note or f"{count:,} classes" in note)


@pytest.mark.parametrize("count", [2, 20, 21, 150, heavy(1000)])
def test_a_picture_of_many_classes_stays_small(count):
    """Oracle of the choice: the number of confused texts of each class, counted one by one."""
    generator = torch.Generator().manual_seed(count)
    counts = torch.randint(0, 9, (count, count), generator=generator)
    figure = figures.confusion_matrix(counts.tolist(), [f"class {n}" for n in range(count)], title="test")
    axes = figure.axes[0]
    shown = [int(label.get_text().split()[1]) for label in axes.get_yticklabels()]
    figures.plt.close(figure)
    assert len(shown) == min(count, 20) and figure.get_size_inches().max() <= 16
    confused = [
        sum(int(counts[number, other] + counts[other, number]) for other in range(count) if other != number)
        for number in range(count)
    ]
    least_shown = min(confused[number] for number in shown)
    assert all(confused[number] <= least_shown for number in range(count) if number not in shown)
    assert ("most confused" in axes.get_title()) == (count > 20)
    cells = {tuple(map(int, text.get_position()[::-1])): int(text.get_text()) for text in axes.texts}
    assert all(cells.get((row, column), 0) == counts[shown[row], shown[column]] for row, column in cells)
