"""What a run says of single texts: which are shown as right and as wrong, and the line of each."""

import csv

import datasets
import pytest
import torch

from common.training.report import Predictions

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
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("right", [True, False])
def test_right_and_wrong_ones_are_shown_spread_over_the_split(right, predictions):
    """Oracle: the labels, and a sigmoid of the one logit that is not 0."""
    chosen = [number for number in range(12) if (number not in WRONG) == right]
    rows = shown(predictions, right=right, most=12)
    for number, (text, predicted, true, confidence) in zip(chosen, rows, strict=True):
        assert true == ["no", "yes"][LABELS[number]] and (predicted == true) == right
        assert text == (
            f"text {number}" if number < 11 else "a / bar, " + ("long " * 20)[:48] + "..."
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
