"""What a run tells its reader: on the screen, in report.md with pictures, in predictions.csv."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import counted, printable, shorten
from common.intervals import Interval
from common.runtime import Runtime
from common.terminal import cut, room, table
from common.training import batching
from common.training.baseline import Baseline
from common.training.batching import BatchConfig
from common.training.calibration import Bin, calibration_error, decisions, reliability
from common.training.data import Splits, texts_of
from common.training.resampling import Answers, score_intervals
from common.training.run import HEADLINES, MULTI, REGRESSION, SCORES, SINGLE
from common.training.task import EXACT, NOUNS, Task, task_of_rows
from common.training.tokenization import TokenConfig
from common.training.tracking import Log

if TYPE_CHECKING:
    import datasets
    from matplotlib.figure import Figure

LOST = {"head": "lose their end", "tail": "lose their beginning", "head-tail": "lose their middle"}
SHOWN_CHARACTERS = 60
MARKDOWN = re.compile(r"[\\`*<&\[|]")  # what is more than a character in a line of Markdown
MOST_CLASSES, WORST_CLASSES = 30, 20  # of more classes than the first, a table shows the second
NUM_SHOWN, NUM_IN_TENSORBOARD = 5, 50  # texts with right or wrong answers
FEW_TEXTS = 1000  # of a split: a single text is worth 0.1 points or more
TEXTS_OF_AN_AXIS = 20  # that the axis of validation scores spans at least, so that one is no valley
# what is read of a text that is longer than the model reads at once
OF_LONGER_TEXTS = {
    "chunks": "a longer text is read whole, in chunks",
    "head": "of a longer text it reads the beginning",
    "tail": "of a longer text it reads the end",
    "head-tail": "of a longer text it reads a quarter from the beginning and the rest from the end",
}
# of decisions: what is compared with what
RELIABILITY = {
    SINGLE: ("the confidence in the predicted class", "the share of texts for which it is right"),
    MULTI: ("the probability of a label", "the share of texts that have it"),
}
# a column of a table of classes: its header, its key in the scores, how its numbers are written
CLASS_COLUMNS = {"precision": ("precision", ".4f"), "recall": ("recall", ".4f"), "F1": ("f1", ".4f")}
ANSWER_COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    SINGLE: {**CLASS_COLUMNS, "texts": ("support", "d")},
    MULTI: {
        "threshold": ("threshold", ".4f"),
        **CLASS_COLUMNS,
        "average precision": ("average_precision", ".4f"),
        "accuracy": ("accuracy", ".4f"),
        "texts": ("support", "d"),
    },
    REGRESSION: {
        "RMSE": ("rmse", ".4f"),
        "MAE": ("mae", ".4f"),
        "Pearson": ("pearson", ".4f"),
        "Spearman": ("spearman", ".4f"),
        "R2": ("r2", ".4f"),
    },
}
# the picture of all answers: its name in TensorBoard, its file, what it shows
PICTURES = {
    SINGLE: ("confusion", "confusion_matrix.png", "Confusion matrix of the test split"),
    MULTI: ("labels", "labels.png", "Texts of the test split found, missed and falsely reported, by label"),
    REGRESSION: ("scatter", "scatter.png", "Predicted over true numbers of the test split"),
}


# Scores on the screen -----------------------------------------------------------------------------


def token_lines(tokenized: Splits, tokens: TokenConfig, config: BatchConfig, runtime: Runtime) -> str:
    """Return three lines on what truncation drops, and how much of a batch is padding."""
    lines = []
    for use, split in (("training", "train"), ("scoring", "test")):
        if split not in tokenized:  # --inspect, of data that no splits can be cut from
            continue
        length = tokens.length_of(split)
        num_tokens = np.asarray(tokenized[split]["num_tokens"][:])  # (N)
        num_read = np.asarray(tokenized[split]["num_read"][:])  # (N)
        longer = (num_tokens > length).mean()
        if longer == 0:
            effect = ""
        elif tokens.truncation != "chunks":
            dropped = 1 - num_read.sum() / num_tokens.sum()
            effect = f" and {LOST[tokens.truncation]}, {dropped:.1%} of all tokens"
        elif split == "train":
            effect = f"; a step reads {config.max_chunks} of their chunks, drawn again in each epoch"
        else:
            effect = "; all of their chunks are read"
        lines.append(f"at most {length} in {use}: {longer:.1%} of the texts are longer{effect}")
    longest = batching.longest_chunks(tokenized["train"])
    steps = batching.step_order(longest, config, epoch=1, world_size=runtime.world_size)
    size = config.batch_size * runtime.world_size
    batches = [batch for step in steps for batch in batching.pieces(step, size)]
    share = batching.padding_share(longest, batches)
    lines.append(f"{share:.1%} of a training batch is padding (--batching {config.batching})")
    return "tokens   " + "\n         ".join(lines)


def shown_scores(task: Task, best_metric: str) -> dict[str, str]:
    """Return what the screen shows of each evaluation, and calls it: the scores of the task, and
    the one by which the best weights are chosen.
    """
    names = [*HEADLINES[task.kind], best_metric]
    return {name: SCORES[task.kind][name] for name in names if name != "loss"}


def _four_decimals(score: float | None) -> str:
    return "-" if score is None else f"{score:.4f}"


def epoch_table(epochs: list[dict], task: Task, best_metric: str, style: str = "simple") -> str:
    """Return the table of evaluations, each with the scores of `shown_scores`."""
    columns = {"train_loss": "training loss", "loss": "validation loss", **shown_scores(task, best_metric)}
    rows = [
        [
            f"{epoch['epoch']:g}",
            *(_four_decimals(epoch.get(name)) for name in columns),
            f"{epoch['examples_per_second']:.1f}",
        ]
        for epoch in epochs
    ]
    headers = ["epoch", *columns.values(), "examples/s"]
    align = ("right",) * len(headers)
    return table(rows, headers, style=style, disable_numparse=True, colalign=align)


def epoch_line(epoch: dict, num_epochs: int, task: Task, best_metric: str) -> str:
    """Return one line on an evaluation, mostly at the end of an epoch."""
    shown = shown_scores(task, best_metric).items()
    scores = ", ".join(f"{word} {_four_decimals(epoch.get(name))}" for name, word in shown)
    return (
        f"epoch {epoch['epoch']:g}/{num_epochs}  training loss {epoch['train_loss']:.4f},"
        f" validation loss {epoch['loss']:.4f}, {scores},"
        f" {epoch['examples_per_second']:.1f} examples/s"
    )


def score_lines(scores: dict, predictions: Predictions) -> str:
    """Return all scores with their intervals in two lines: first those that the screen shows of
    each evaluation and the loss, then the others.
    """
    kind = predictions.task.kind
    first = [*HEADLINES[kind], "loss"]
    others = [name for name in SCORES[kind] if name not in first and name in scores]
    lines = [[_score(name, scores, predictions) for name in names] for names in (first, others)]
    return "\n".join(", ".join(line) for line in lines if line)


def _score(name: str, scores: dict, predictions: Predictions, mark: str = "") -> str:
    """Return a score's name, its value, within marks of Markdown, and its interval."""
    score = f"{SCORES[predictions.task.kind][name]} {mark}{_four_decimals(scores.get(name))}{mark}"
    if name not in predictions.intervals:
        return score
    lowest, highest = predictions.intervals[name]
    return f"{score} [{lowest:.4f}, {highest:.4f}]"


def certainty_line(predictions: Predictions) -> str:
    """Return what the intervals are, what a single text is worth on a small split, and how far the
    probabilities can be trusted.
    """
    count, kind = len(predictions.labels), predictions.task.kind
    parts = ["in brackets: 95 % intervals"]
    if kind != REGRESSION and count <= FEW_TEXTS:
        share = SCORES[kind][HEADLINES[kind][0]]
        parts.append(f"one text is {100 / count:.2g} points of {share}")
    if kind != REGRESSION:
        error = calibration_error(predictions.reliability())
        parts.append(f"expected calibration error {error:.4f}")
    return "; ".join(parts)


def thresholds_of(scores: dict) -> list[float] | None:
    """Return the thresholds (C) with which labels were scored; None for other tasks."""
    return scores.get("per_class", {}).get("threshold")


def _per_answer(scores: dict, task: Task) -> dict[str, list]:
    return scores["per_number" if task.kind == REGRESSION else "per_class"]


def answer_table(scores: dict, task: Task, style: str = "simple") -> str:
    """Return the scores of each class, label or number as a table.

    Of more than 30 classes or labels it shows the 20 with the lowest F1, the lowest first, and says
    so below.
    """
    columns, per_answer = ANSWER_COLUMNS[task.kind], _per_answer(scores, task)
    noun, plural = NOUNS[task.kind]
    named = [_in_cell(name, style) for name in task.names]
    rows = list(zip(named, *(per_answer[key] for key, _ in columns.values())))
    note = ""
    if len(rows) > MOST_CLASSES and "F1" in columns:
        note = f"\n\nThese are the {WORST_CLASSES} of {len(rows):,} {plural} with the lowest F1."
        f1 = 1 + list(columns).index("F1")
        rows = sorted(rows, key=lambda row: row[f1])[:WORST_CLASSES]
    shown = table(
        rows,
        [noun, *columns],
        style=style,
        floatfmt=("", *(form for _, form in columns.values())),
        missingval="-",  # undefined
        disable_numparse=[0],  # else the class 1.10 would read 1.1
    )
    return shown + note


def show(
    scores: dict, predictions: Predictions, baseline: Baseline | None, max_length: int, runtime: Runtime
) -> None:
    """Print scores, those of a baseline where its answer is known, the tables of answers and lengths,
    and five right and five wrong answers.
    """
    task = predictions.task
    first, *others = score_lines(scores, predictions).splitlines()
    lines = [f"{first} on {counted(len(predictions.labels), 'text')}", *others, certainty_line(predictions)]
    if baseline is not None:
        lines.append(baseline.line(task))
    runtime.say("\n".join(lines) + "\n")
    runtime.say(answer_table(scores, task))
    runtime.say(
        f"\nby length of the text; the model reads up to {max_length} tokens at once:\n"
        + predictions.length_table(max_length)
    )
    right, wrong = (f"five {kind} answers, spread over the split" for kind in ("right", "wrong"))
    if task.kind == REGRESSION:
        right, wrong = "five texts with the smallest errors", "five texts with the largest errors"
    runtime.say(f"\n{right}:\n" + predictions.examples(right=True))
    runtime.say(f"\n{wrong}:\n" + predictions.examples(right=False))


# Predictions --------------------------------------------------------------------------------------


class Predictions:
    """A tokenised split with the model's answers, from `logits` (N, C).

    These are the `scores` (N, C), the probabilities of classes or labels or the numbers; and
    `predicted`: the class (N); or of each label whether a text has it (N, C), the `thresholds` (C)
    being the probabilities from which on it has; or the numbers (N, C).
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        logits: torch.Tensor,
        thresholds: list[float] | None = None,
        positive_class: str | None = None,
    ) -> None:
        self.rows, self.task, self.positive_class = rows, task_of_rows(rows), positive_class
        self.logits = logits
        self.names = list(self.task.names)
        # of each row its text, or both texts of a pair
        self.texts = [(text,) if isinstance(text, str) else text for text in texts_of(rows)]
        self.labels = self.task.targets(rows["label"][:])  # (N) or (N, C)
        self.num_tokens = torch.tensor(rows["num_tokens"][:])  # (N)
        self.num_read = torch.tensor(rows["num_read"][:])  # (N)
        self.scores = self.predicted = self.task.scores(logits)
        if self.task.kind == SINGLE:
            self.confidence, self.predicted = self.scores.max(-1)
        elif self.task.kind == MULTI:
            limits = torch.tensor(thresholds or [0.5] * len(self.names), dtype=torch.float64)
            self.predicted = (self.scores >= limits).double()

    @functools.cached_property
    def answers(self) -> Answers:
        """The same as arrays of NumPy: what intervals are made of."""
        task, logits, labels = self.task, self.logits.double(), self.labels
        if task.kind == REGRESSION:
            numbers = (labels.double().numpy(), logits.numpy())
            return Answers(task.kind, *numbers, num_classes=len(self.names))
        if task.kind == SINGLE:
            truth, predicted = labels.numpy(), self.predicted.numpy()
            losses = F.cross_entropy(logits, labels, reduction="none")
        else:
            truth, predicted = labels.numpy() > 0, self.predicted.numpy() > 0
            losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)
        return Answers(
            task.kind,
            truth,
            predicted,
            num_classes=len(self.names),
            probabilities=task.scores(logits).numpy(),
            losses=losses.numpy(),
            positive=None if self.positive_class is None else self.names.index(self.positive_class),
        )

    @functools.cached_property
    def intervals(self) -> dict[str, Interval]:
        """The interval of each score."""
        return score_intervals(self.answers)

    def reliability(self) -> list[Bin]:
        """Return how often decisions are right, by their probability."""
        return reliability(*decisions(self.answers))

    def right(self) -> torch.Tensor:
        """Return whether the answer to each text (N) is right: its class, or all of its labels."""
        is_right = self.predicted == self.labels
        return is_right if self.task.kind == SINGLE else is_right.all(dim=1)

    def errors(self) -> torch.Tensor:
        """Return the error of each text (N): the root of the mean square of its numbers' errors."""
        return (self.scores - self.labels).square().mean(dim=1).sqrt()

    def _in_words(self, values: torch.Tensor, separator: str = ", ") -> str:
        """Return the class, the labels or the numbers of a text as it shows them."""
        if self.task.kind == SINGLE:
            return self.names[values]
        if self.task.kind == MULTI:
            return separator.join(name for name, value in zip(self.names, values.tolist()) if value)
        return separator.join(f"{value:.4g}" for value in values.tolist())

    def examples(self, *, right: bool, most: int = NUM_SHOWN, style: str = "simple") -> str:
        """Return at most `most` texts with a right (or wrong) answer, over the split, as a table;
        of numbers those with the smallest (or largest) errors.

        Returns "none" when there are none.
        """
        kind, last, values = self.task.kind, "confidence", self._certainty()
        if kind == REGRESSION:
            last = "error"
            numbers = values.argsort(descending=not right, stable=True)[:most].tolist()
        else:
            numbers = torch.nonzero(self.right() == right).flatten().tolist()
        if not numbers:
            return "none"
        if len(numbers) > most:
            numbers = [numbers[index * len(numbers) // most] for index in range(most)]
        rows = []
        for number in numbers:
            words = " / ".join(self.texts[number])
            answers = [self._in_words(each[number]) for each in (self.predicted, self.labels)]
            rows.append([*(_in_cell(cell, style) for cell in (words, *answers)), values[number].item()])
        noun = {SINGLE: "class", MULTI: "labels", REGRESSION: self.task.noun()}[kind]
        headers = ["text", f"predicted {noun}", f"true {noun}", last]
        options = {"floatfmt": ".3f", "disable_numparse": [0, 1, 2]}
        return table(rows, headers, texts=[0], folded=[1, 2], style=style, **options)

    def _certainty(self) -> torch.Tensor:
        """Return the last number of each example (N): the confidence in a class, or in the least
        certain of the decisions about labels; or the error of a number.
        """
        if self.task.kind == REGRESSION:
            return self.errors()
        if self.task.kind == SINGLE:
            return self.confidence
        return torch.where(self.predicted > 0, self.scores, 1 - self.scores).amin(dim=1)

    def length_table(self, max_length: int, style: str = "simple") -> str:
        """Return the number, the share not read and the accuracy of texts by length, as a table; of
        numbers the RMSE.

        The texts are grouped: up to `max_length` tokens, twice that, four times that, and longer.
        """
        is_number = self.task.kind == REGRESSION
        # a group's score is the mean of these, of numbers its root
        measures = self.errors().square() if is_number else self.right().double()  # (N)
        limits = [0, max_length, 2 * max_length, 4 * max_length, int(self.num_tokens.max())]
        rows = []
        for low, high in zip(limits, limits[1:]):
            chosen = (self.num_tokens > low) & (self.num_tokens <= high)
            if chosen.any():
                label = f"over {low}" if low == limits[3] else f"{low + 1}-{high}"
                dropped = 1 - self.num_read[chosen].sum() / self.num_tokens[chosen].sum()
                mean = measures[chosen].mean()
                score = (mean.sqrt() if is_number else mean).item()
                rows.append([label, int(chosen.sum()), f"{dropped:.1%}", score])
        return table(
            rows,
            ["tokens", "texts", "not read", SCORES[self.task.kind][HEADLINES[self.task.kind][0]]],
            style=style,
            floatfmt=".4f",
            colalign=("left", "right", "right", "right"),
            disable_numparse=[0, 2],
        )

    def write_csv(self, path: Path) -> None:
        """Write one line per row: its number in the source, the classes, labels (separated by a
        bar) or numbers, the scores, the text.
        """
        columns: dict[str, list] = {"row": self.rows["row"][:]}
        scores = [[format(score, EXACT) for score in column] for column in self.scores.T.tolist()]
        if self.task.kind == REGRESSION:
            true = [[f"{value:.10g}" for value in column] for column in self.labels.T.tolist()]
            columns |= {f"true {name}": column for name, column in zip(self.names, true)}
            columns |= {f"predicted {name}": column for name, column in zip(self.names, scores)}
        else:
            columns["true"] = [self._in_words(label, "|") for label in self.labels]
            columns["predicted"] = [self._in_words(label, "|") for label in self.predicted]
            if self.task.kind == SINGLE:
                columns["confidence"] = [format(value, EXACT) for value in self.confidence.tolist()]
            columns |= {f"score {name}": column for name, column in zip(self.names, scores)}
        columns |= dict(zip(("text", "text_pair"), map(list, zip(*self.texts))))
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *zip(*columns.values())])


# Markdown -----------------------------------------------------------------------------------------


def _in_cell(text: str, style: str) -> str:
    """Return a text as one short line, in Markdown as it is written."""
    if style == "github":
        return _as_written(shorten(text, SHOWN_CHARACTERS))
    return cut(text, room(SHOWN_CHARACTERS))


def _as_written(line: str) -> str:
    """Return a line as Markdown shows it as it is: a bar would end a cell, and `<` begin HTML."""
    return MARKDOWN.sub(r"\\\g<0>", line)


def setting_cell(value: object) -> str:
    """Return the value of a setting in one line, as Markdown shows it as it is."""
    return "" if value is None else _as_written(printable(" ".join(str(value).split())))


def setting_table(rows: Iterable[tuple[str, str]], *headers: str) -> str:
    """Return a table of Markdown in which all is text, also 1e-4."""
    return table(rows, headers, style="github", disable_numparse=True)


def score_sentence(scores: dict, predictions: Predictions) -> str:
    """Return all scores as a sentence of Markdown."""
    return score_lines(scores, predictions).replace("\n", ",\n") + "."


def certainty_sentence(predictions: Predictions) -> str:
    """Return the line on certainty as a sentence of Markdown."""
    return _sentence(certainty_line(predictions))


def baseline_sentence(baseline: Baseline, task: Task) -> str:
    """Return the line on the baseline as a sentence of Markdown."""
    return _sentence(_as_written(baseline.line(task)))


def _sentence(line: str) -> str:
    return f"{line[0].upper()}{line[1:]}."


# A finished run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run came to: its best weights on the test split, and how it got there."""

    settings: dict
    history: list[dict]  # the scores of each evaluation
    best: dict  # that of the best one
    scores: dict  # on the test split
    baseline: Baseline  # there
    predictions: Predictions
    temperature: float  # by which logits are divided
    num_texts: dict[str, int]  # of each split
    peak_memory_bytes: int

    @functools.cached_property
    def results(self) -> dict[str, Any]:
        """The content of metrics.json."""
        whole = [entry for entry in self.history if isinstance(entry["epoch"], int)]
        epochs = whole or self.history
        mean_seconds = sum(1 / entry["examples_per_second"] for entry in epochs) / len(epochs)
        names = SCORES[self.predictions.task.kind]
        return {
            **{f"test_{name}": self.scores[name] for name in names if name in self.scores},
            "best_epoch": self.best["epoch"],
            **{f"best_validation_{name}": self.best[name] for name in names if name in self.best},
            "train_examples_per_second": 1 / mean_seconds,
            # of the steps alone, without evaluations
            "train_seconds": mean_seconds * self.num_texts["train"] * self.history[-1]["epoch"],
            "peak_memory_bytes": self.peak_memory_bytes,
            **self._calibration(),
            "test_intervals": self.predictions.intervals,
            "test_baseline": {"answer": self.baseline.answer, **self.baseline.scores},
        }

    def _calibration(self) -> dict[str, float]:
        """Return the error of the probabilities, also without the temperature if there is one."""
        if self.predictions.task.kind == REGRESSION:
            return {}
        found = {"test_calibration_error": calibration_error(self.predictions.reliability())}
        if self.temperature == 1:
            return found
        # of what the model answers; thresholds play no part in it
        plain = Predictions(self.predictions.rows, self.predictions.logits * self.temperature)
        before = calibration_error(plain.reliability())
        return {**found, "test_calibration_error_before": before, "temperature": self.temperature}


def answer_picture(scores: dict, predictions: Predictions, title: str) -> Figure:
    """Return the picture of all answers on a split: a confusion matrix of classes; texts found,
    missed and falsely reported of each label; predicted over true numbers.
    """
    from common import figures

    names = predictions.names
    if predictions.task.kind == SINGLE:
        return figures.confusion_matrix(scores["confusion"], names, title=title)
    if predictions.task.kind == MULTI:
        return figures.label_bars(scores["per_class"], names, title=title)
    numbers = predictions.labels.numpy(), predictions.scores.numpy()
    return figures.scatter(*numbers, names, title=title)


def log_scores(log: Log, step: int, split: str, scores: dict, predictions: Predictions) -> None:
    """Write a split's scores to the run's log as curves, also those of each class, label or number,
    and the picture of its answers.
    """
    task = predictions.task
    values = {f"{split}/{name}": scores[name] for name in SCORES[task.kind] if name in scores}
    for key, _ in ANSWER_COLUMNS[task.kind].values():
        for name, value in zip(task.names, _per_answer(scores, task)[key]):
            if value is not None and key != "support":
                values[f"{split}_{key}/{name}"] = value
    log.numbers(step, values)
    picture = functools.partial(answer_picture, scores, predictions)
    log.figure(step, f"{split}/{PICTURES[task.kind][0]}", picture)


def log_outcome(log: Log, outcome: Outcome) -> None:
    """Write the test scores, the mistakes and metrics.json to the run's log."""
    step, predictions = outcome.best["step"], outcome.predictions
    log_scores(log, step, "test", outcome.scores, predictions)
    mistakes = predictions.examples(right=False, most=NUM_IN_TENSORBOARD, style="github")
    log.text(step, "test/mistakes", mistakes)
    curves = [f"test/{name}" for name in SCORES[predictions.task.kind] if name in outcome.scores]
    log.finish(outcome.results, curves=[*curves, "train/examples_per_second"])


def write_report(folder: Path, outcome: Outcome) -> None:
    """Write report.md, its pictures and predictions.csv into the run folder."""
    from common import figures

    predictions = outcome.predictions
    task = predictions.task
    shown = shown_scores(task, outcome.settings["best_metric"])
    least = 0.0 if task.kind == REGRESSION else TEXTS_OF_AN_AXIS / outcome.num_texts["validation"]
    curve = figures.learning_curve(outcome.history, outcome.best["epoch"], shown, least=least)
    figures.save(curve, folder / "learning_curve.png")
    picture = answer_picture(outcome.scores, predictions, "test split")
    figures.save(picture, folder / PICTURES[task.kind][1])
    if task.kind != REGRESSION:
        picture = figures.reliability(predictions.reliability(), called=RELIABILITY[task.kind])
        figures.save(picture, folder / "reliability.png")
    predictions.write_csv(folder / "predictions.csv")
    (folder / "report.md").write_text(_report_text(outcome), encoding="utf-8")


def _report_text(outcome: Outcome) -> str:
    settings, results, predictions = outcome.settings, outcome.results, outcome.predictions
    task, scores, best_metric = predictions.task, outcome.scores, settings["best_metric"]
    first, *others = HEADLINES[task.kind]
    headline = ", ".join(
        [_score(first, scores, predictions, "**"), *(_score(name, scores, predictions) for name in others)]
    )
    _, picture, description = PICTURES[task.kind]
    is_number = task.kind == REGRESSION
    right, wrong = ("Five nearest", "Five farthest") if is_number else ("Five right", "Five wrong")
    shown = {
        f"`{key}`": setting_cell(settings[key]) for key in settings if key not in ("identity", "versions")
    }
    return f"""# {setting_cell(settings["model"])} on {setting_cell(settings["dataset"])}

Test {headline}
({counted(len(predictions.labels), "text")}), with the weights of epoch {results["best_epoch"]:g},
the best by validation {SCORES[task.kind][best_metric]}. Seed {settings["seed"]}.
{certainty_sentence(predictions)}
{baseline_sentence(outcome.baseline, task)}
{results["train_examples_per_second"]:.1f} training examples a second.

## Epochs

{epoch_table(outcome.history, task, best_metric, "github")}

![Losses and validation scores of each epoch](learning_curve.png)

## {NOUNS[task.kind][1].capitalize()} of the test split

{score_sentence(scores, predictions)}

{answer_table(scores, task, "github")}

![{description}]({picture})
{"" if is_number else _calibration_section(outcome)}
## By length

The model reads up to {settings["eval_max_length"]} tokens at once; {OF_LONGER_TEXTS[settings["truncation"]]}
(`--truncation {settings["truncation"]}`).

{predictions.length_table(settings["eval_max_length"], "github")}

## {right}

{predictions.examples(right=True, style="github")}

## {wrong}

{predictions.examples(right=False, style="github")}

Every row of the test split is in [predictions.csv](predictions.csv).

## Settings

{setting_table(shown.items(), "setting", "value")}

{setting_table(settings["versions"].items(), "package", "version")}
"""


def _calibration_section(outcome: Outcome) -> str:
    """Return the section of the report on probabilities, which numbers do not have."""
    results, (probability, share) = outcome.results, RELIABILITY[outcome.predictions.task.kind]
    about = "Nothing was calibrated; `--calibrate` fits a temperature on the validation split."
    if "temperature" in results:
        before = results["test_calibration_error_before"]
        about = (
            f"Logits are divided by the temperature {results['temperature']:.4f}, which was fitted"
            f" on the validation split; without it, the error is {before:.4f}."
        )
    return f"""
## Calibration

Expected calibration error **{results["test_calibration_error"]:.4f}** on the test split: by so much do
{probability} and {share} differ, on average. {about}

![How often decisions are right, by their probability](reliability.png)
"""
