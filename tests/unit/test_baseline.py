"""The baseline beside a model's scores: the answer that training has most often, given to every text."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import dummy, metrics

from common.errors import UserError
from common.training.baseline import commonest_answer, score_answer
from common.training.run import MULTI, REGRESSION, SINGLE
from common.training.saved_model import SavedModel
from common.training.saved_settings import SavedSettings
from common.training.task import PROBLEM_TYPES, Task

NAMES = ("a", "b", "c")


def split(kind: str, labels: list) -> datasets.Dataset:
    task = Task(kind, NAMES)
    features = datasets.Features({"label": task.feature()})
    return datasets.Dataset.from_dict({"label": task.cells(labels)}, features=features)


def drawn(kind: str, count: int, generator: np.random.Generator) -> tuple[list, np.ndarray]:
    """Return labels (N), and the same as scikit-learn takes them: (N) or (N, C)."""
    if kind == SINGLE:
        numbers = generator.choice(3, size=count, p=generator.dirichlet(np.ones(3)))
        return [NAMES[number] for number in numbers], numbers
    if kind == MULTI:
        flags = generator.random((count, 3)) < generator.random(3)
        return [[name for name, flag in zip(NAMES, row) if flag] for row in flags], flags.astype(int)
    numbers = generator.normal(3.0, 2.0, size=(count, 3))
    return numbers.tolist(), numbers


@settings(max_examples=30)
@given(kind=st.sampled_from([SINGLE, MULTI, REGRESSION]), seed=st.integers(0, 10**6))
def test_it_is_scikit_learns_dummy(kind, seed):
    """Oracle: its dummies, fitted to the training split, and its metrics of what they predict."""
    generator = np.random.default_rng(seed)
    known, fitted = drawn(kind, 30, generator)
    labels, truth = drawn(kind, 20, generator)
    found = score_answer(commonest_answer(split(kind, known)), split(kind, labels))
    guesser = (
        dummy.DummyRegressor() if kind == REGRESSION else dummy.DummyClassifier(strategy="most_frequent")
    )
    guesser.fit(np.zeros((30, 1)), fitted)
    guesses = guesser.predict(np.zeros((20, 1)))
    if kind == REGRESSION:
        expected = {
            "rmse": metrics.root_mean_squared_error(truth, guesses),
            "r2": metrics.r2_score(truth, guesses),
        }
    else:
        whole = "accuracy" if kind == SINGLE else "subset_accuracy"
        f1 = {
            f"{average}_f1": metrics.f1_score(truth, guesses, average=average, zero_division=0)
            for average in ("macro", *(["micro"] if kind == MULTI else []))
        }
        expected = {whole: guesser.score(np.zeros((20, 1)), truth), **f1}
        if kind == MULTI:
            expected["label_accuracy"] = (truth == guesses).mean()
    assert found.scores == pytest.approx(expected)


@pytest.mark.parametrize(
    "kind, known, line",
    [
        (SINGLE, ["b", "a", "b"], "b, the most frequent class in training: accuracy 0.3333, macro-F1 0.2500"),
        (MULTI, [["a"], ["b", "a"], ["a", "b"]], "a, b, as most texts in training: subset accuracy 0.0000"),
        (MULTI, [["a"], ["b"], ["c"]], "no label, as most texts in training: subset accuracy 0.0000"),
        (REGRESSION, [[1, 2, 3], [2, 3, 4]], "the mean in training, 1.5, 2.5, 3.5: RMSE 0.5000, R2 0.0000"),
    ],
)
def test_its_line_says_the_answer_and_what_it_comes_to(kind, known, line):
    """By hand: one of three classes is b, so its F1 is 2/4 and the mean over a and b 1/4."""
    rows = {SINGLE: ["a", "a", "b"], MULTI: [["a"], ["c"]], REGRESSION: [[1, 2, 3], [2, 3, 4]]}[kind]
    baseline = score_answer(commonest_answer(split(kind, known)), split(kind, rows))
    assert baseline.line(Task(kind, NAMES)).startswith(f"baseline, always {line}")


def test_one_text_has_no_r2():
    baseline = score_answer([1.0, 2.0, 3.0], split(REGRESSION, [[2.0, 2.0, 3.0]]))
    assert baseline.scores == {"rmse": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    "kind, answer, is_known",
    [
        (SINGLE, "b", True),
        (SINGLE, "d", False),
        (SINGLE, ["b"], False),
        (MULTI, [], True),
        (MULTI, ["a", "c"], True),
        (MULTI, "abc", False),
        (REGRESSION, [1.0, -2.5, 0.0], True),
        (REGRESSION, [1.0, 2.0], False),
        (REGRESSION, ["1", "2", "3"], False),
        (REGRESSION, None, True),
    ],
)
def test_a_saved_answer_must_be_one_of_the_models(kind, answer, is_known):
    config = SimpleNamespace(problem_type=PROBLEM_TYPES[kind], num_labels=3, id2label=dict(enumerate(NAMES)))
    saved = SavedModel("model", SimpleNamespace(config=config), None, SavedSettings(baseline=answer))
    if is_known:
        assert saved.baseline() == answer
        return
    with pytest.raises(UserError, match="--model model: training.json has a baseline that is no answer"):
        saved.baseline()
