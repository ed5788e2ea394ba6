"""Several models on one task: the scores of each query, kept in a
file, and tests of the differences.

The file is a CSV with a line for each model and query. It is replaced as a whole whenever a model is done, so
that a failure or a kill leaves the scores of the models before it; these models are not scored again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import replace_file, sha256
from common.intervals import Interval, bootstrap, correlations, holm, means, percentiles, randomization, ranks
from common.search.manifest import PER_QUERY_COLUMNS

SPEARMAN = "spearman"
COSINE, HUMAN = "cosine", "human"  # the columns of sentence pairs, whose score is a correlation


@dataclass(frozen=True)
class ModelScores:
    """The results of a model on a task: a line of the table, and the values (Q) of each measure, in the order
    of the queries. Of sentence pairs these are the cosine and the human score.
    """

    model: str
    fingerprint: str  # of the model, the task, and how texts are read
    width: int
    texts_per_second: float | None
    queries: list[str]
    values: dict[str, np.ndarray] = field(repr=False)

    def line(self) -> dict[str, object]:
        """Return the line of a table: what the model takes, and its scores."""
        line: dict[str, object] = {"model": self.model, "width": self.width}
        line["bytes_a_vector"] = 4 * self.width
        if self.texts_per_second is not None:
            line["texts_per_second"] = self.texts_per_second
        if HUMAN in self.values:
            line["pairs"] = len(self.queries)
        return line | self.scores()

    def scores(self) -> dict[str, float]:
        """Return the score of each measure over all queries."""
        whole = np.ones((1, len(self.queries)), dtype=int)
        return {name: float(values[0]) for name, values in self.resampled(whole).items()}

    def intervals(self) -> dict[str, Interval | None]:
        """Return the 95 % interval of each score, by a bootstrap over the queries."""
        resampled = bootstrap(self.resampled, len(self.queries))
        return {name: percentiles(values) for name, values in resampled.items()}

    def resampled(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return the scores (R) of resamples (R, Q) of the queries."""
        if HUMAN in self.values:
            both = (ranks(weights, self.values[name]) for name in (COSINE, HUMAN))
            return {SPEARMAN: correlations(weights, *both)}
        return {name: means(weights, values) for name, values in self.values.items()}


def of_searches(queries: list[str], values: Mapping[str, Mapping[str, list[float]]]) -> list[ModelScores]:
    """Return the results of several ways of searching with one model, by the names of the ways."""
    searches = []
    for name, measures in values.items():
        arrays = {measure: np.array(scores) for measure, scores in measures.items()}
        searches.append(ModelScores(name, "", 0, None, queries, arrays))
    return searches


def fingerprint(identity: Mapping[str, Any], files: Sequence[str | None], settings: Mapping[str, Any]) -> str:
    """Return a short SHA-256 of a model's identity, the content of files, and settings."""
    contents = [None if name is None else _content(Path(name)) for name in files]
    text = json.dumps([dict(identity), contents, dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(path: Path) -> list[str]:
    """Return the SHA-256 of a file, or the name, size and time of what is in a folder."""
    if path.is_file():
        return [sha256(path)]
    found = sorted(member for member in path.rglob("*") if member.is_file())
    states = [(member, member.stat()) for member in found]
    return [str(path), *(f"{member} {state.st_size} {state.st_mtime_ns}" for member, state in states)]


def read_scores(path: Path) -> dict[str, ModelScores]:
    """Return the models in a file, by their fingerprints, {} when there is none. Raises UserError
    when it holds something else.
    """
    if not path.exists() or path.stat().st_size == 0:
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, strict=True))
        groups: dict[str, list[dict[str, str]]] = {}
        for line in lines:
            groups.setdefault(line["fingerprint"], []).append(line)
        return {name: _read_model(name, members) for name, members in groups.items()}
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        problem = f"it can't be read ({error})"
        raise UserError(f"--per-query {path}: {problem}; name a new file") from error


def _read_model(name: str, lines: list[dict[str, str]]) -> ModelScores:
    measures = [column for column in lines[0] if column not in PER_QUERY_COLUMNS]
    values = {}
    for column in measures:
        numbers = [float(line[column]) for line in lines if line[column]]
        if numbers:  # columns of other tasks in the same file are empty
            values[column] = np.array(numbers)
    if any(len(numbers) != len(lines) for numbers in values.values()) or not values:
        raise ValueError("numbers are missing")
    first = lines[0]
    speed = float(first["texts_per_second"]) if first["texts_per_second"] else None
    queries = [line["query"] for line in lines]
    return ModelScores(first["model"], name, int(first["width"]), speed, queries, values)


def write_scores(path: Path, models: Sequence[ModelScores]) -> None:
    """Replace a file by the scores of each query of all models."""
    measures = list(dict.fromkeys(name for model in models for name in model.values))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*PER_QUERY_COLUMNS, *measures])
    for model in models:
        speed = "" if model.texts_per_second is None else repr(model.texts_per_second)
        own = [model.model, model.fingerprint, model.width, speed]
        for row, query in enumerate(model.queries):
            numbers = [
                repr(float(model.values[name][row])) if name in model.values else "" for name in measures
            ]
            writer.writerow([*own, query, *numbers])
    replace_file(path, text.getvalue())


def differences(models: Sequence[ModelScores]) -> list[dict[str, Any]]:
    """Return each model's scores minus those of the first one, with the interval of a paired bootstrap
    over the queries, and the p-value of a randomization test, as Smucker et al. 2007 ("A comparison of
    statistical significance tests for information retrieval evaluation") advise; p-values of a measure
    are also adjusted by Holm's method.
    """
    first, found = models[0], []
    for model in models[1:]:

        def of_pairs(weights: np.ndarray, model: ModelScores = model) -> dict[str, np.ndarray]:
            before, after = first.resampled(weights), model.resampled(weights)
            return {name: after[name] - before[name] for name in before}

        resampled, before = bootstrap(of_pairs, len(first.queries)), first.scores()
        p_values = _randomized(first, model)
        for name, score in model.scores().items():
            found.append(
                {
                    "model": model.model,
                    "measure": name,
                    "difference": score - before[name],
                    "interval": percentiles(resampled[name]),
                    "p": p_values[name],
                }
            )
    for name in {one["measure"] for one in found}:
        members = [one for one in found if one["measure"] == name]
        for one, adjusted in zip(members, holm([one["p"] for one in members])):
            one["p_holm"] = adjusted
    return found


def _randomized(first: ModelScores, other: ModelScores) -> dict[str, float]:
    """Return the p-value of the difference of each measure, by exchanging the results of two models.

    Of sentence pairs, where cosines lie differs from model to model: their ranks are exchanged, which
    are all that Spearman's correlation depends on.
    """
    said = [first.values, other.values]
    if HUMAN in first.values:
        from scipy.stats import rankdata

        said = [{**values, COSINE: rankdata(values[COSINE])} for values in said]
    values = {name: np.concatenate([one[name] for one in said]) for name in first.values}
    both = replace(first, values=values)  # of each query, a model gets one of the two values
    return randomization(both.resampled, np.ones(len(first.queries), dtype=int))
