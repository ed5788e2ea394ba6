"""The scores of answering every text alike: a model has learned something where it is better.

scikit-learn, which takes a second to import, is imported by the functions that need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import listed
from common.training.labels import Label
from common.training.run import MULTI, REGRESSION, SCORES, SINGLE, Kind
from common.training.task import Scoring, Task, task_of_rows

if TYPE_CHECKING:
    import datasets

# the scores that tell whether a model has learned something; correlations are undefined here
SHOWN: dict[Kind, tuple[str, ...]] = {
    SINGLE: ("accuracy", "macro_f1"),
    MULTI: ("subset_accuracy", "label_accuracy", "micro_f1", "macro_f1"),
    REGRESSION: ("rmse", "r2"),
}


@dataclass(frozen=True)
class Baseline:
    """An answer that every text gets, and the scores that this comes to, by the names of `SCORES`."""

    answer: Label
    scores: dict[str, float]

    def line(self, task: Task) -> str:
        """Return the answer and its scores in one line."""
        if task.kind == SINGLE:
            always = f"{listed([self.answer])}, the most frequent class in training"
        elif task.kind == MULTI:
            always = f"{listed(self.answer, most=5) or 'no label'}, as most texts in training"
        else:
            means = ", ".join(f"{number:.4g}" for number in self.answer[:5])
            always = f"the mean in training, {means}{', ...' * (len(self.answer) > 5)}"
        scores = [f"{SCORES[task.kind][name]} {score:.4f}" for name, score in self.scores.items()]
        return f"baseline, always {always}: {', '.join(scores)}"


def commonest_answer(rows: datasets.Dataset) -> Label:
    """Return what is the best guess without a look at the text, for a training split: its most
    frequent class; the labels that more than half of its texts have; or the mean of each number.
    """
    from sklearn.dummy import DummyClassifier, DummyRegressor

    task = task_of_rows(rows)
    targets = task.targets(rows["label"][:]).numpy()  # (N) or (N, C)
    unread = np.zeros((len(targets), 1))  # in place of the texts
    guesser = DummyRegressor() if task.kind == REGRESSION else DummyClassifier(strategy="most_frequent")
    answer = np.ravel(guesser.fit(unread, targets).predict(unread[:1]))  # (1) or (C)
    if task.kind == SINGLE:
        return task.names[answer[0]]
    if task.kind == MULTI:
        return [name for name, has_it in zip(task.names, answer) if has_it]
    return answer.tolist()


def score_answer(answer: Label, rows: datasets.Dataset) -> Baseline:
    """Return the scores that a model has which gives one answer to all texts of a labelled split."""
    from common.training.metrics import compute_scores

    task = task_of_rows(rows)
    targets = task.targets(rows["label"][:])  # (N) or (N, C)
    target = torch.tensor(task.target(task.cells([answer])[0]), dtype=targets.dtype)
    if task.kind == SINGLE:
        logits = F.one_hot(target, len(task.names))  # (C)
    else:
        logits = target if task.kind == REGRESSION else target - 0.5
    scores = compute_scores(task, logits.expand(len(targets), -1), targets, Scoring())
    return Baseline(answer, {name: scores[name] for name in SHOWN[task.kind] if name in scores})
