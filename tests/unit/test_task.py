"""What a text has, classes, labels or numbers: found from the labels, read, refused with its place,
and scored as scikit-learn and scipy score.
"""

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, List
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from common.errors import UserError
from common.training import data
from common.training.labels import LabelConfig
from common.training.metrics import areas, best_thresholds, class_scores, compute_scores
from common.training.run import HEADLINES, MULTI, REGRESSION, SCORES, SINGLE
from common.training.task import Scoring, Task, task_of_rows

FLAGS = {"toxic": ["0", "1", "0", "1"], "insult": ["0", "0", "1", "1"]}
SCORE_TEXTS = ["5.000", "3.800", "0.400", "2.600"]


def validated(columns: dict[str, list], labels: LabelConfig, **features) -> datasets.Dataset:
    """Return the rows of a split with these columns, and texts beside them."""
    count = len(next(iter(columns.values())))
    rows = datasets.Dataset.from_dict({"text": [f"text {number}" for number in range(count)], **columns})
    for name, feature in features.items():
        rows = rows.cast_column(name, feature)
    return data.checked_splits({"train": rows}, labels=labels.among(rows.column_names))["train"]


@pytest.mark.parametrize(
    "columns, flags, kind, names, cells",
    [
        ({"label": ["b", "a", "b", "c"]}, {}, SINGLE, "abc", [1, 0, 1, 2]),
        ({"label": [5, 1, 1, 3]}, {}, SINGLE, "135", [2, 0, 0, 1]),
        ({"label": SCORE_TEXTS}, {}, REGRESSION, ["label"], [5.0, 3.8, 0.4, 2.6]),
        ({"label": ["0.5", "1.0", "5.0"] * 1000}, {}, REGRESSION, ["label"], [0.5, 1.0, 5.0] * 1000),
        ({"label": ["1e-05", "2", "2"]}, {}, REGRESSION, ["label"], [1e-05, 2.0, 2.0]),
        ({"label": [0.5, 1.0, 2.0, 2.0]}, {}, REGRESSION, ["label"], [0.5, 1.0, 2.0, 2.0]),
        ({"label": [5, 1, 1, 3]}, {"task": REGRESSION}, REGRESSION, ["label"], [5.0, 1.0, 1.0, 3.0]),
        (FLAGS, {"label_column": "toxic,insult"}, MULTI, ["toxic", "insult"], [[], [0], [1], [0, 1]]),
        ({"a": [True, False], "b": [1.0, 0.0]}, {"label_column": "b,a"}, MULTI, "ba", [[0, 1], []]),
        (
            {"a": [1, 0], "b": ["0.5", "2"]},
            {"label_column": "a,b"},
            REGRESSION,
            "ab",
            [[1.0, 0.5], [0.0, 2.0]],
        ),
        ({"label": [["b", "a"], [], ["c"]]}, {}, MULTI, "abc", [[0, 1], [], [2]]),
        ({"label": [[3, 12], [], [3]]}, {}, MULTI, ["3", "12"], [[0, 1], [], [0]]),
        ({"label": [[0, 1, 1], [0, 0, 0]]}, {}, MULTI, "012", [[1, 2], []]),
        ({"label": [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]}, {}, MULTI, "012", [[1, 2], []]),
        (
            {"label": [[0.1, 1.5], [2.0, 3.0]]},
            {},
            REGRESSION,
            ["label_0", "label_1"],
            [[0.1, 1.5], [2.0, 3.0]],
        ),
        ({"label": ["b; a", "", "c ;"]}, {"label_separator": ";"}, MULTI, "abc", [[0, 1], [], [2]]),
        ({"label": ["a", "b", "a"]}, {"task": MULTI}, MULTI, "ab", [[0], [1], [0]]),
        ({"label": [0, 1, 0]}, {"task": MULTI}, MULTI, ["label"], [[], [0], []]),
    ],
)
def test_the_labels_tell_the_task_and_its_names(columns, flags, kind, names, cells):
    rows = validated(columns, LabelConfig(**flags))
    assert task_of_rows(rows) == Task(kind, tuple(names))
    if kind == REGRESSION:
        cells = [dict(zip(names, np.atleast_1d(cell).tolist())) for cell in cells]
    assert rows["label"][:] == cells


def test_lists_of_classes_keep_the_names_that_the_data_set_gives_them():
    feature = List(ClassLabel(names=["zebra", "ant", "unused"]))
    rows = validated({"label": [[1], [0, 1], []]}, LabelConfig(), label=feature)
    assert task_of_rows(rows) == Task(MULTI, ("zebra", "ant", "unused")) and rows["label"][:] == [
        [1],
        [0, 1],
        [],
    ]


@pytest.mark.parametrize(
    "columns, flags, message",
    [
        (
            {"a": ["0", "1"], "b": ["1", "2"]},
            {"label_column": "a,b", "task": MULTI},
            "split train, row 2: the label '2' in column 'b' is neither 0 nor 1; .*--task",
        ),
        (
            {"a": ["0", "1"], "b": ["1", None]},
            {"label_column": "a,b"},
            "split train, row 2: the label in column 'b' is missing",
        ),
        ({"a": ["0", "1"]}, {"label_column": "a,b"}, "split train: no column 'b' among text, a"),
        (
            {"label": ["1.5", "high", "2"]},
            {"task": REGRESSION},
            "split train, row 2: the label 'high' in column 'label' is no number",
        ),
        ({"label": ["1.5", "inf"]}, {"task": REGRESSION}, "split train, row 2: the label 'inf' .*no number"),
        ({"label": [1.5, None]}, {}, "split train, row 2: the label in column 'label' is missing"),
        (
            {"label": [[1.5, 2.0], [1.0]]},
            {},
            "split train, row 2: the list in column 'label' has 1 number, that of row 1 2",
        ),
        ({"label": [["a"], None]}, {}, "split train, row 2: the label in column 'label' is missing"),
        ({"label": [[], []]}, {"task": MULTI}, "split train: no row has a label"),
        (
            {"a": ["x", "y"], "b": ["x", "x"]},
            {"label_column": "a,b", "task": SINGLE},
            "--label-column a,b: a text has one class .*--task multi or regression",
        ),
        (
            {"label": SCORE_TEXTS},
            {"task": SINGLE},
            "split train: column 'label' holds decimal numbers, .*--task",
        ),
    ],
)
def test_labels_that_do_not_fit_the_task_are_named_with_their_row(columns, flags, message):
    with pytest.raises(UserError, match=message):
        validated(columns, LabelConfig(**flags))


@pytest.mark.parametrize(
    "task, columns, flags, message",
    [
        (
            Task(SINGLE, ("a", "b")),
            {"label": ["a"]},
            {"task": MULTI},
            "--task multi: .*trained for --task single",
        ),
        (
            Task(MULTI, ("toxic", "threat")),
            FLAGS,
            {"label_column": "toxic,insult"},
            "--label-column toxic,insult: the model's labels are toxic, threat",
        ),
        (
            Task(MULTI, ("a", "b")),
            {"label": [["a"], ["c"]]},
            {},
            "row 2: the label 'c' is not one of .* model's",
        ),
        (
            Task(REGRESSION, ("x", "y")),
            {"label": ["1", "2"]},
            {},
            "--label-column label: 1 number a row, and the model answers 2: x, y",
        ),
    ],
)
def test_labels_for_a_trained_model_must_be_its_own(task, columns, flags, message):
    rows = datasets.Dataset.from_dict({"text": ["text"] * len(next(iter(columns.values()))), **columns})
    labels = LabelConfig(**flags).among(rows.column_names)
    with pytest.raises(UserError, match=message):
        data.checked_splits({"test": rows}, labels=labels, trained=task)


def test_columns_of_a_trained_model_are_found_by_name_in_any_order():
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "low": [1, 2], "high": [3, 4]})
    for kind, cells in (
        (REGRESSION, [{"high": 3.0, "low": 1.0}, {"high": 4.0, "low": 2.0}]),
        (MULTI, [[1], [0]]),
    ):
        if kind == MULTI:
            rows = datasets.Dataset.from_dict({"text": ["x", "y"], "low": [1, 0], "high": [0, 1]})
        task = Task(kind, ("high", "low"))
        labels = LabelConfig("low,high").among(rows.column_names)
        assert data.checked_splits({"test": rows}, labels=labels, trained=task)["test"]["label"][:] == cells


@pytest.mark.parametrize("kind", [MULTI, REGRESSION])
def test_cut_and_sampled_rows_are_like_all_rows(kind):
    """A rare label is in each part in its share, numbers have their quantiles; and a seed repeats it."""
    generator = np.random.default_rng(0)
    labels = [["common"] * (row % 2) + ["rare"] * (row % 20 == 3) for row in range(200)]
    if kind == REGRESSION:
        labels = generator.normal(size=200).tolist()
    rows = validated({"label": labels}, LabelConfig())
    cut, _ = data.cut_missing_splits({"train": rows}, seed=1)
    again, _ = data.cut_missing_splits({"train": rows}, seed=1)
    other, _ = data.cut_missing_splits({"train": rows}, seed=2)
    assert {split: len(part) for split, part in cut.items()} == {"train": 160, "validation": 20, "test": 20}
    assert cut["test"]["row"][:] == again["test"]["row"][:] != other["test"]["row"][:]
    assert sorted(row for part in cut.values() for row in part["row"][:]) == list(range(1, 201))
    parts = [*cut.values(), data.sample(rows, 40, seed=0, flag="--max-train-samples")]
    for part in parts:
        if kind == MULTI:
            assert sum(1 in cell for cell in part["label"][:]) == pytest.approx(len(part) / 20, abs=1)
        else:
            values = [cell["label"] for cell in part["label"][:]]
            assert abs(np.median(values) - np.median(labels)) < 0.2


# Scores -------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), num_labels=st.integers(1, 5), count=st.integers(2, 40), rare=st.booleans())
def test_scores_of_labels_equal_scikit_learns(seed, num_labels, count, rare):
    generator = np.random.default_rng(seed)
    truth = generator.random((count, num_labels)) < (0.05 if rare else 0.5)
    logits = torch.tensor(generator.standard_normal((count, num_labels)))
    limits = generator.random(num_labels)
    predicted = logits.sigmoid().numpy() >= limits
    task = Task(MULTI, tuple("abcde"[:num_labels]))
    scores = compute_scores(task, logits, torch.tensor(truth).double(), Scoring(threshold=tuple(limits)))
    each = [
        [function(truth[:, label], predicted[:, label], zero_division=0) for label in range(num_labels)]
        for function in (
            sklearn_metrics.precision_score,
            sklearn_metrics.recall_score,
            sklearn_metrics.f1_score,
        )
    ]
    for name, values in zip(("precision", "recall", "f1"), each):
        assert scores["per_class"][name] == pytest.approx(values)
    assert scores["macro_f1"] == pytest.approx(np.mean(each[2]))
    assert scores["micro_f1"] == pytest.approx(
        sklearn_metrics.f1_score(truth.ravel(), predicted.ravel(), zero_division=0)
    )
    if num_labels > 1:
        for name in ("weighted", "macro", "micro"):
            expected = sklearn_metrics.f1_score(truth, predicted, average=name, zero_division=0)
            assert scores[f"{name}_f1"] == pytest.approx(expected)
    assert scores["subset_accuracy"] == np.mean([list(a) == list(b) for a, b in zip(truth, predicted)])
    assert scores["label_accuracy"] == pytest.approx(
        1 - sklearn_metrics.zero_one_loss(truth.ravel(), predicted.ravel())
    )
    defined = [label for label in range(num_labels) if 0 < truth[:, label].sum() < count]
    for name, function in (
        ("roc_auc", sklearn_metrics.roc_auc_score),
        ("average_precision", sklearn_metrics.average_precision_score),
    ):
        expected = [function(truth[:, label], logits[:, label]) for label in defined]
        assert (name in scores) == bool(defined)
        assert not defined or scores[name] == pytest.approx(np.mean(expected))
    loss = torch.nn.BCEWithLogitsLoss()(logits, torch.tensor(truth).double())
    assert scores["loss"] == pytest.approx(loss.item())
    assert set(HEADLINES[MULTI]) <= scores.keys() <= {*SCORES[MULTI], "per_class"}


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 25), ties=st.booleans())
def test_a_chosen_threshold_has_the_best_f1_of_all(seed, count, ties):
    """Oracle: the F1 of scikit-learn at each probability that occurs, and in the middle between two."""
    generator = np.random.default_rng(seed)
    probabilities = generator.random(count).round(1 if ties else 6)
    truth = generator.random(count) < 0.4
    [chosen] = best_thresholds(probabilities[:, None], truth[:, None])

    def f1(threshold: float) -> float:
        return sklearn_metrics.f1_score(truth, probabilities >= threshold, zero_division=0)

    if truth.all() or not truth.any():
        assert chosen == 0.5
        return
    known = np.unique(probabilities)
    tried = [*known, *((known[1:] + known[:-1]) / 2), known[0] / 2, 0.5]
    best = max(map(f1, tried))
    assert f1(chosen) == pytest.approx(best)
    assert abs(chosen - 0.5) <= min(
        abs(t - 0.5) for t in tried[len(known) :] if np.isclose(f1(t), best)
    ) + 1e-12 or (np.isclose(f1(chosen), best) and chosen in probabilities)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), num_outputs=st.integers(1, 3), count=st.integers(3, 40))
def test_scores_of_numbers_equal_scipys_and_scikit_learns(seed, num_outputs, count):
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 6, (count, num_outputs)).astype(float)
    answers = truth + generator.standard_normal((count, num_outputs))
    task = Task(REGRESSION, tuple("abc"[:num_outputs]))
    scores = compute_scores(task, torch.tensor(answers), torch.tensor(truth), Scoring())
    columns = range(num_outputs)
    varied = [column for column in columns if len(set(truth[:, column])) > 1]
    assert scores["loss"] == pytest.approx(sklearn_metrics.mean_squared_error(truth, answers))
    assert scores["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(truth, answers))
    assert scores["rmse"] == pytest.approx(sklearn_metrics.root_mean_squared_error(truth, answers))
    for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        values = [function(answers[:, column], truth[:, column])[0] for column in varied]
        assert [value for value in scores["per_number"][name] if value is not None] == pytest.approx(values)
        assert not varied or scores[name] == pytest.approx(np.mean(values))
    r2 = [sklearn_metrics.r2_score(truth[:, column], answers[:, column]) for column in varied]
    assert [value for value in scores["per_number"]["r2"] if value is not None] == pytest.approx(r2)
    assert not varied or scores["r2"] == pytest.approx(np.mean(r2))
    problem = type("Config", (), {"problem_type": "regression", "num_labels": num_outputs})
    loss = ForSequenceClassificationLoss(torch.tensor(truth), torch.tensor(answers), problem)
    assert scores["loss"] == pytest.approx(loss.item())


def test_there_is_no_r2_of_one_number_or_equal_ones():
    for count in (1, 3):
        scores = compute_scores(
            Task(REGRESSION, ("a",)), torch.zeros(count, 1), torch.ones(count, 1), Scoring()
        )
        assert "r2" not in scores and scores["per_number"]["r2"] == [None] and scores["rmse"] == 1.0


def test_a_correlation_with_equal_numbers_is_left_out():
    scores = compute_scores(
        Task(REGRESSION, ("a",)), torch.ones(3, 1), torch.tensor([[1.0], [2.0], [3.0]]), Scoring()
    )
    assert "pearson" not in scores and scores["per_number"]["spearman"] == [None] and scores["mae"] == 1.0


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), num_classes=st.integers(2, 4), count=st.integers(4, 40))
def test_scores_of_classes_equal_scikit_learns(seed, num_classes, count):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, count)
    logits = torch.tensor(generator.standard_normal((count, num_classes)))
    names, predicted = tuple("abcd"[:num_classes]), logits.argmax(1).numpy()
    probabilities = logits.softmax(1).numpy()
    scores = class_scores(logits, torch.tensor(labels), names, "a")
    assert scores["binary_f1"] == pytest.approx(
        sklearn_metrics.f1_score(labels == 0, predicted == 0, zero_division=0)
    )
    assert scores["matthews"] == pytest.approx(sklearn_metrics.matthews_corrcoef(labels, predicted))
    for average in ("micro", "weighted"):
        expected = sklearn_metrics.f1_score(labels, predicted, average=average, zero_division=0)
        assert scores[f"{average}_f1"] == pytest.approx(expected)
    if len(set(labels)) == num_classes == 2:
        assert scores["roc_auc"] == pytest.approx(
            sklearn_metrics.roc_auc_score(labels == 0, probabilities[:, 0])
        )
        assert scores["average_precision"] == pytest.approx(
            sklearn_metrics.average_precision_score(labels == 0, probabilities[:, 0])
        )
        by_default = class_scores(logits, torch.tensor(labels), names)
        assert by_default["binary_f1"] == pytest.approx(
            sklearn_metrics.f1_score(labels, predicted, zero_division=0)
        )
    elif len(set(labels)) == num_classes:
        expected = sklearn_metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
        assert scores["roc_auc"] == pytest.approx(expected)
        assert "binary_f1" not in class_scores(logits, torch.tensor(labels), names)


def test_an_area_that_no_column_defines_is_left_out():
    assert areas(np.array([[0.1], [0.2]]), np.array([[True], [True]])) == {}
