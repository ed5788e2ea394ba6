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
from tabulate import tabulate

from common.errors import printable, shorten
from common.intervals import Interval
from common.runtime import Runtime
from common.training import batching
from common.training.batching import BatchConfig
from common.training.calibration import Bin, calibration_error, decisions, reliability
from common.training.data import Splits, TokenConfig, texts_of
from common.training.resampling import Answers, score_intervals
from common.training.run import HEADLINES, MULTI, REGRESSION, SCORES, SINGLE
from common.training.task import Task, task_of_rows
from common.training.tracking import Log

if TYPE_CHECKING:
    import datasets
    from matplotlib.figure import Figure

CARD_SETTINGS = (
    "revision dataset_revision text_column text_mode label_column task max_train_samples seed split_seed"
    " epochs batch_size grad_accum processes batching lr schedule max_steps warmup_ratio weight_decay"
    " max_grad_norm dropout attention_dropout label_smoothing class_weights lora_rank freeze_layers"
    " max_length eval_max_length truncation max_chunks best_metric precision device"
)
UNSET = {  # what a card shows for a flag that was not given
    "revision": "none: the model is not from the Hub",
    "dataset_revision": "none: the data is not from the Hub",
    "text_mode": "one text",
    "max_train_samples": "all",
    "split_seed": "seed",
    "max_steps": "as the epochs have",
    "dropout": "as in the pretrained model",
    "attention_dropout": "as dropout if given, else 0",
    "lora_rank": "none",
}
LOST = {"head": "lose their end", "tail": "lose their beginning", "head-tail": "lose their middle"}
HUB_NAMES = {"bundled/all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
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
EXAMPLES = {
    SINGLE: ("Five right", "Five wrong"),
    MULTI: ("Five right", "Five wrong"),
    REGRESSION: ("Five nearest", "Five farthest"),
}


def token_lines(tokenized: Splits, tokens: TokenConfig, config: BatchConfig, runtime: Runtime) -> str:
    """Return three lines on what truncation drops, and how much of a batch is padding."""
    lines = []
    for use, split in (("training", "train"), ("scoring", "test")):
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


def shown_scores(task: Task, best_metric: str) -> list[str]:
    """Return the scores of each evaluation that the screen shows: those of the task, and the one by
    which the best weights are chosen.
    """
    names = [*HEADLINES[task.kind], best_metric]
    return [name for name in dict.fromkeys(names) if name != "loss"]


def words(name: str, task: Task) -> str:
    """Return what the screen calls a score."""
    return SCORES[task.kind][name]


def _four_decimals(score: float | None) -> str:
    return "-" if score is None else f"{score:.4f}"


def epoch_table(epochs: list[dict], task: Task, best_metric: str, style: str = "simple") -> str:
    """Return the table of evaluations, each with the scores of `shown_scores`."""
    names = shown_scores(task, best_metric)
    rows = [
        [
            f"{epoch['epoch']:g}",
            *(_four_decimals(epoch.get(name)) for name in ("train_loss", "loss", *names)),
            f"{epoch['examples_per_second']:.1f}",
        ]
        for epoch in epochs
    ]
    called = (
        "epoch",
        "training loss",
        "validation loss",
        *(words(name, task) for name in names),
        "examples/s",
    )
    align = ("right",) * len(called)
    return tabulate(rows, called, tablefmt=style, disable_numparse=True, colalign=align)


def score_lines(scores: dict, predictions: Predictions) -> str:
    """Return all scores with their intervals in two lines: first those that the screen shows of
    each evaluation and the loss, then the others.
    """
    task, intervals = predictions.task, predictions.intervals
    first = [*HEADLINES[task.kind], "loss"]
    others = [name for name in SCORES[task.kind] if name not in first and name in scores]
    lines = (first, others) if others else (first,)
    return "\n".join(
        ", ".join(f"{words(name, task)} {_with_interval(name, scores, intervals)}" for name in line)
        for line in lines
    )


def _with_interval(name: str, scores: dict, intervals: dict[str, Interval], mark: str = "") -> str:
    """Return a score, within marks of Markdown, and its interval."""
    score = f"{mark}{_four_decimals(scores.get(name))}{mark}"
    if name not in intervals:
        return score
    lowest, highest = intervals[name]
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
    },
}


def thresholds_of(scores: dict) -> list[float] | None:
    """Return the thresholds (C) with which labels were scored; None for other tasks."""
    return scores.get("per_class", {}).get("threshold")


CALLED = {SINGLE: "class", MULTI: "label", REGRESSION: "number"}  # what an answer is


def answer_table(scores: dict, task: Task, style: str = "simple") -> str:
    """Return the scores of each class, label or number as a table."""
    key = "per_number" if task.kind == REGRESSION else "per_class"
    return class_table(scores[key], task, style)


def class_table(per_class: dict[str, list], task: Task, style: str = "simple") -> str:
    """Return the scores of each class, label or number as a table.

    Of more than 30 classes or labels it shows the 20 with the lowest F1, the lowest first, and says
    so below.
    """
    columns = ANSWER_COLUMNS[task.kind]
    named = [_in_cell(name, style) for name in task.names]
    rows = list(zip(named, *(per_class[key] for key, _ in columns.values())))
    note = ""
    if len(rows) > MOST_CLASSES and "F1" in columns:
        plural = "classes" if task.kind == SINGLE else "labels"
        note = f"\n\nThese are the {WORST_CLASSES} of {len(rows):,} {plural} with the lowest F1."
        f1 = 1 + list(columns).index("F1")
        rows = sorted(rows, key=lambda row: row[f1])[:WORST_CLASSES]
    table = tabulate(
        rows,
        [CALLED[task.kind], *columns],
        tablefmt=style,
        floatfmt=("", *(form for _, form in columns.values())),
        missingval="-",  # undefined
        disable_numparse=[0],  # else the class 1.10 would read 1.1
    )
    return table + note


class Predictions:
    """A tokenised split with the model's answers, from `logits` (N, C).

    These are the `scores` (N, C), the probabilities of classes or labels or the numbers; and, but
    for numbers, `predicted`: the class (N), or of each label whether a text has it (N, C), the
    `thresholds` (C) being the probabilities from which on it has.
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
        self.scores = self.task.scores(logits)
        if self.task.kind == SINGLE:
            self.confidence, self.predicted = self.scores.max(-1)
        elif self.task.kind == MULTI:
            limits = torch.tensor(thresholds or [0.5] * len(self.names), dtype=torch.float64)
            self.predicted = (self.scores >= limits).double()  # (N, C)

    @functools.cached_property
    def answers(self) -> Answers:
        """The same as arrays of NumPy: what intervals are made of."""
        task, logits, labels = self.task, self.logits.double(), self.labels
        if task.kind == REGRESSION:
            numbers = (labels.double().numpy(), logits.numpy())
            return Answers(task.kind, *numbers, num_classes=len(self.names))
        predicted, losses = self.predicted, F.cross_entropy
        if task.kind == MULTI:
            labels, predicted = labels.double(), predicted > 0
            losses = F.binary_cross_entropy_with_logits
        each = losses(logits, labels, reduction="none").numpy()
        return Answers(
            task.kind,
            labels.numpy() if task.kind == SINGLE else labels.numpy() > 0,
            predicted.numpy(),
            num_classes=len(self.names),
            probabilities=task.scores(logits).numpy(),
            losses=each if each.ndim == 1 else each.mean(axis=1),
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

    def true(self, number: int) -> str:
        """Return the class, labels or numbers of a text in words."""
        return self._in_words(self.labels[number])

    def answer(self, number: int) -> str:
        """Return the class, labels or numbers that the model gives a text in words."""
        is_number = self.task.kind == REGRESSION
        return self._in_words((self.scores if is_number else self.predicted)[number])

    def _in_words(self, values: torch.Tensor) -> str:
        if self.task.kind == SINGLE:
            return self.names[values]
        if self.task.kind == MULTI:
            return ", ".join(name for name, value in zip(self.names, values.tolist()) if value)
        return ", ".join(f"{value:.4g}" for value in values.tolist())

    def examples(self, *, right: bool, most: int = NUM_SHOWN, style: str = "simple") -> str:
        """Return at most `most` texts with a right (or wrong) answer, over the split, as a table;
        of numbers those with the smallest (or largest) errors.

        Returns "none" when there are none.
        """
        if self.task.kind == REGRESSION:
            numbers = self.errors().argsort(descending=not right, stable=True)[:most].tolist()
        else:
            numbers = torch.nonzero(self.right() == right).flatten().tolist()
        if not numbers:
            return "none"
        if len(numbers) > most:
            numbers = [numbers[index * len(numbers) // most] for index in range(most)]
        last, values = "confidence", self._certainty()
        if self.task.kind == REGRESSION:
            last = "error"
        rows = [
            [
                _in_cell(" / ".join(self.texts[number]), style),
                _in_cell(self.answer(number), style),
                _in_cell(self.true(number), style),
                values[number].item(),
            ]
            for number in numbers
        ]
        numbers_of = "numbers" if len(self.names) > 1 else "number"
        called = {SINGLE: "class", MULTI: "labels", REGRESSION: numbers_of}
        answers = called[self.task.kind]
        headers = ["text", f"predicted {answers}", f"true {answers}", last]
        return tabulate(rows, headers, tablefmt=style, floatfmt=".3f", disable_numparse=[0, 1, 2])

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
        limits = [0, max_length, 2 * max_length, 4 * max_length, int(self.num_tokens.max())]
        rows = []
        for low, high in zip(limits, limits[1:]):
            chosen = (self.num_tokens > low) & (self.num_tokens <= high)
            if not chosen.any():
                continue
            label = f"over {low}" if low == limits[3] else f"{low + 1}-{high}"
            dropped = 1 - self.num_read[chosen].sum() / self.num_tokens[chosen].sum()
            rows.append([label, int(chosen.sum()), f"{dropped:.1%}", self._score_of(chosen)])
        score = {SINGLE: "accuracy", MULTI: "subset accuracy", REGRESSION: "RMSE"}[self.task.kind]
        return tabulate(
            rows,
            ["tokens", "texts", "not read", score],
            tablefmt=style,
            floatfmt=".4f",
            colalign=("left", "right", "right", "right"),
            disable_numparse=[0, 2],
        )

    def _score_of(self, chosen: torch.Tensor) -> float:
        if self.task.kind == REGRESSION:
            return self.errors()[chosen].square().mean().sqrt().item()
        return self.right()[chosen].double().mean().item()

    def write_csv(self, path: Path) -> None:
        """Write one line per row: its number in the source, the classes, labels (separated by a
        bar) or numbers, the scores, the text.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            texts = ("text", "text_pair")[: len(self.texts[0])]
            writer.writerow(["row", *self._csv_columns(), *texts])
            for number, row in enumerate(self.rows["row"][:]):
                writer.writerow([row, *self._csv_cells(number), *self.texts[number]])

    def _csv_columns(self) -> list[str]:
        if self.task.kind == REGRESSION:
            return [f"{what} {name}" for what in ("true", "predicted") for name in self.names]
        certainty = ["confidence"] if self.task.kind == SINGLE else []
        return ["true", "predicted", *certainty, *(f"score {name}" for name in self.names)]

    def _csv_cells(self, number: int) -> list[str]:
        scores = [f"{score:.6f}" for score in self.scores[number].tolist()]
        true = self.labels[number]
        if self.task.kind == REGRESSION:
            return [*(f"{value:.10g}" for value in true.tolist()), *scores]
        predicted = self.predicted[number]
        if self.task.kind == SINGLE:
            confidence = f"{self.confidence[number].item():.6f}"
            return [self.names[true], self.names[predicted], confidence, *scores]
        has = [
            [name for name, value in zip(self.names, values.tolist()) if value]
            for values in (true, predicted)
        ]
        return [*map("|".join, has), *scores]


def _in_cell(text: str, style: str) -> str:
    """Return a text as one short line, in Markdown as it is written."""
    line = shorten(text, SHOWN_CHARACTERS)
    return _as_written(line) if style == "github" else line


def _as_written(line: str) -> str:
    """Return a line as Markdown shows it as it is: a bar would end a cell, and `<` begin HTML."""
    return MARKDOWN.sub(r"\\\g<0>", line)


def _code(name: str) -> str:
    """Return a name as code within a line of Markdown, which a backtick would end."""
    return "`" + shorten(name, SHOWN_CHARACTERS).replace("`", "'") + "`"


@dataclass(frozen=True)
class Outcome:
    """What a run came to: its best weights on the test split, and how it got there."""

    settings: dict
    history: list[dict]  # the scores of each evaluation
    best: dict  # that of the best one
    scores: dict  # on the test split
    predictions: Predictions
    temperature: float  # by which logits are divided
    num_texts: dict[str, int]  # of each split
    peak_memory_bytes: int

    @property
    def results(self) -> dict[str, Any]:
        """The content of metrics.json."""
        whole = [entry for entry in self.history if isinstance(entry["epoch"], int)]
        epochs = whole or self.history
        seconds_per_example = [1 / entry["examples_per_second"] for entry in epochs]
        mean_seconds = sum(seconds_per_example) / len(epochs)
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


def log_outcome(log: Log, outcome: Outcome) -> None:
    """Write the test scores, the mistakes and metrics.json to the run's log."""
    step, predictions = outcome.best["step"], outcome.predictions
    log_scores(log, step, "test", outcome.scores, predictions)
    mistakes = predictions.examples(right=False, most=NUM_IN_TENSORBOARD, style="github")
    log.text(step, "test/mistakes", mistakes)
    curves = [f"test/{name}" for name in SCORES[predictions.task.kind] if name in outcome.scores]
    log.finish(outcome.results, curves=[*curves, "train/examples_per_second"])


def answer_picture(scores: dict, predictions: Predictions, *, title: str) -> Figure:
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


# the file of that picture, and what it shows
PICTURES = {
    SINGLE: ("confusion_matrix.png", "Confusion matrix of the test split"),
    MULTI: ("labels.png", "Texts of the test split found, missed and falsely reported, by label"),
    REGRESSION: ("scatter.png", "Predicted over true numbers of the test split"),
}


def write_report(folder: Path, outcome: Outcome) -> None:
    """Write report.md, its pictures and predictions.csv into the run folder."""
    from common import figures

    task = outcome.predictions.task
    names = shown_scores(task, outcome.settings["best_metric"])
    shown = {name: words(name, task) for name in names}
    shares = task.kind != REGRESSION
    least = TEXTS_OF_AN_AXIS / outcome.num_texts["validation"] if shares else 0.0
    curve = figures.learning_curve(outcome.history, outcome.best["epoch"], shown, least=least)
    figures.save(curve, folder / "learning_curve.png")
    picture = answer_picture(outcome.scores, outcome.predictions, title="test split")
    figures.save(picture, folder / PICTURES[task.kind][0])
    if task.kind != REGRESSION:
        every = outcome.predictions.reliability()
        bins = [(one.probability, one.share, one.count) for one in every]
        picture = figures.reliability(bins, called=RELIABILITY[task.kind])
        figures.save(picture, folder / "reliability.png")
    outcome.predictions.write_csv(folder / "predictions.csv")
    (folder / "report.md").write_text(_report_text(outcome), encoding="utf-8")


def _headline(outcome: Outcome) -> str:
    """Return the first scores of the test split in a sentence's part, the first one in bold."""
    task, intervals = outcome.predictions.task, outcome.predictions.intervals
    parts: list[str] = []
    for name in HEADLINES[task.kind]:
        mark = "" if parts else "**"
        parts.append(f"{words(name, task)} {_with_interval(name, outcome.scores, intervals, mark)}")
    return ", ".join(parts)


def _report_text(outcome: Outcome) -> str:
    settings, results, predictions = outcome.settings, outcome.results, outcome.predictions
    task, best_metric = predictions.task, settings["best_metric"]
    right, wrong = EXAMPLES[task.kind]
    return f"""# {_cell(settings["model"])} on {_cell(settings["dataset"])}

Test {_headline(outcome)}
({len(predictions.labels)} texts), with the weights of epoch {results["best_epoch"]:g},
the best by validation {words(best_metric, task)}. Seed {settings["seed"]}.
{_sentence(certainty_line(predictions))}
{results["train_examples_per_second"]:.1f} training examples a second.

## Epochs

{epoch_table(outcome.history, task, best_metric, "github")}

![Losses and validation scores of each epoch](learning_curve.png)
{_answers_section(outcome)}{_calibration_section(outcome)}
## By length

The model reads up to {settings["eval_max_length"]} tokens at once; {OF_LONGER_TEXTS[settings["truncation"]]}
(`--truncation {settings["truncation"]}`).

{predictions.length_table(settings["eval_max_length"], "github")}

## {right}

{predictions.examples(right=True, style="github")}

## {wrong}

{predictions.examples(right=False, style="github")}

Every row of the test split is in [predictions.csv](predictions.csv).
{_settings_section(settings)}"""


def _answers_section(outcome: Outcome) -> str:
    """Return the section of the report on each class, label or number."""
    task = outcome.predictions.task
    called = {SINGLE: "Classes", MULTI: "Labels", REGRESSION: "Numbers"}[task.kind]
    picture, description = PICTURES[task.kind]
    return f"""
## {called} of the test split

{_score_table(outcome)}

{answer_table(outcome.scores, task, "github")}

![{description}]({picture})
"""


def _settings_section(settings: dict) -> str:
    """Return the section of the report on the flags and the versions of the packages."""
    shown = [key for key in settings if key not in ("identity", "versions")]
    described = [(f"`{key}`", _cell(settings[key])) for key in shown]
    return f"""
## Settings

{_settings_table(described, "setting", "value")}

{_settings_table(settings["versions"].items(), "package", "version")}
"""


def _score_table(outcome: Outcome) -> str:
    """Return all scores as a sentence of Markdown."""
    return score_lines(outcome.scores, outcome.predictions).replace("\n", ",\n") + "."


def _sentence(line: str) -> str:
    return f"{line[0].upper()}{line[1:]}."


def _calibration_section(outcome: Outcome) -> str:
    """Return the section of the report on the probabilities, "" for numbers, which have none."""
    kind, results = outcome.predictions.task.kind, outcome.results
    if kind == REGRESSION:
        return ""
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
{RELIABILITY[kind][0]} and {RELIABILITY[kind][1]} differ, on average. {about}

![How often decisions are right, by their probability](reliability.png)
"""


def _cell(value: object) -> str:
    return "" if value is None else _as_written(printable(" ".join(str(value).split())))


def _settings_table(rows: Iterable[tuple[str, str]], *headers: str) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)  # text, also 1e-4


def _public(name: str) -> str:
    # the last part of a local path: the card may be passed on
    return Path(name).resolve().name if Path(name).exists() else name


def _base_model(name: str) -> str:
    # the Hub accepts only its own names here
    return "" if Path(name).exists() else f"base_model: {HUB_NAMES.get(name, name)}\n"


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(_code, names[:MOST_CLASSES]))
    rest = len(names) - MOST_CLASSES
    return f"{shown} and {rest:,} more" if rest > 0 else shown


def _novelty(splits: Splits) -> str:
    seen = {*texts_of(splits["train"]), *texts_of(splits["validation"])}
    count = sum(text in seen for text in texts_of(splits["test"]))
    if count == 0:
        return "which were used neither for training nor for choosing the weights"
    return (
        f"of which {count:,} also occur in the training or the validation split, so that the scores"
        " say little about new texts"
    )


def write_card(folder: Path, outcome: Outcome, splits: Splits) -> None:
    """Write the model card, README.md, into the folder of a saved model.

    It tells what the model is and how to use it, its data, settings, results and limits.
    """
    (folder / "README.md").write_text(_card_text(outcome, splits), encoding="utf-8")


def _card_text(outcome: Outcome, splits: Splits) -> str:
    settings, task = outcome.settings, outcome.predictions.task
    title, purpose = _title(task)
    return f"""---
library_name: transformers
pipeline_tag: text-classification
{_base_model(settings["model"])}metrics: [{", ".join(CARD_METRICS[task.kind])}]
---

# {title}

{_code(_public(settings["model"]))}, fine-tuned on {_code(_public(settings["dataset"]))} to {purpose}
{_listed(list(task.names))}.

```python
from transformers import pipeline

classify = pipeline("text-classification", model="this folder or its name on the Hub")
print(classify({_example_call(task, is_pair="text_pair" in splits["test"].column_names)}))
```

{_answers(task, outcome.scores)}{_about_temperature(outcome)}
{_card_results(outcome, splits)}{_card_training(outcome, splits)}
## Limits

The scores hold for texts like those of the data set. A text beyond {settings["eval_max_length"]} tokens was
read in scoring by `--truncation {settings["truncation"]}`; the pipeline above reads its beginning only.
Biases of the pretrained model and of the labels were not examined. Licence: that of the pretrained model and
the data allow; see both before passing this on.
"""


def _card_results(outcome: Outcome, splits: Splits) -> str:
    settings, predictions = outcome.settings, outcome.predictions
    return f"""
## Results

On {len(predictions.labels):,} texts of the test split, {_novelty(splits)}:
{_score_table(outcome)}
{_sentence(certainty_line(predictions))} The weights are those after epoch {outcome.best["epoch"]:g},
the best by validation {words(settings["best_metric"], predictions.task)}.

{answer_table(outcome.scores, predictions.task, "github")}

{predictions.length_table(settings["eval_max_length"], "github")}
"""


def _card_training(outcome: Outcome, splits: Splits) -> str:
    settings = outcome.settings
    values = {
        f"`{key}`": UNSET.get(key, "") if settings[key] is None else _cell(settings[key])
        for key in CARD_SETTINGS.split()
    }
    shown = _settings_table([*values.items(), *settings["versions"].items()], "setting", "value")
    return f"""
## Training

{len(splits["train"]):,} texts for training, {len(splits["validation"]):,} for validation.

{shown}
"""


CARD_METRICS = {  # as the Hub names them
    SINGLE: ("accuracy", "f1"),
    MULTI: ("f1", "roc_auc"),
    REGRESSION: ("mse", "pearsonr", "spearmanr"),
}


def _title(task: Task) -> tuple[str, str]:
    """Return the title of a model's card, and what it was trained to do."""
    count = len(task.names)
    if task.kind == SINGLE:
        return f"A classifier of texts into {count} classes", "tell"
    if task.kind == MULTI:
        labels = f"{count} label{'s' * (count > 1)}, of which a text can have several"
        return f"A classifier of texts by {labels}", "find"
    return f"A model that gives texts {count} number{'s' * (count > 1)}", "predict"


def _example_call(task: Task, *, is_pair: bool) -> str:
    """Return the arguments with which the pipeline shows all that the model answers."""
    options = "truncation=True" if task.kind == SINGLE else "truncation=True, top_k=None"
    text = '{"text": "a text", "text_pair": "another"}' if is_pair else '"a text"'
    return f"{text}, {options}"


def _about_temperature(outcome: Outcome) -> str:
    """Return a sentence on the temperature of a calibrated model."""
    if outcome.temperature == 1:
        return ""
    return (
        f" Probabilities are calibrated: `--predict` divides the logits by the temperature"
        f" {outcome.temperature:.4f} (in `training.json`), fitted on the validation split. The"
        " pipeline does not: its best class is the same, its score another."
    )


def _answers(task: Task, scores: dict) -> str:
    """Return a sentence on what the answers of the pipeline mean."""
    if task.kind == SINGLE:
        return "The score is the probability of the class."
    if task.kind == REGRESSION:
        return "The scores are the numbers themselves."
    limits = zip(task.names, scores["per_class"]["threshold"])
    shown = ", ".join(f"{_code(name)} {threshold:.4g}" for name, threshold in limits)
    threshold = f"A text has it from this probability on: {shown}."
    return f"A score is the probability of a label. {threshold}"


def epoch_line(epoch: dict, num_epochs: int, task: Task, best_metric: str) -> str:
    """Return one line on an evaluation, mostly at the end of an epoch."""
    names = shown_scores(task, best_metric)
    scores = ", ".join(f"{words(name, task)} {_four_decimals(epoch.get(name))}" for name in names)
    return (
        f"epoch {epoch['epoch']:g}/{num_epochs}  training loss {epoch['train_loss']:.4f},"
        f" validation loss {epoch['loss']:.4f}, {scores},"
        f" {epoch['examples_per_second']:.1f} examples/s"
    )


def show(scores: dict, predictions: Predictions, max_length: int, runtime: Runtime) -> None:
    """Print scores, the tables of answers and lengths, and five right and five wrong answers."""
    task = predictions.task
    first, *others = score_lines(scores, predictions).splitlines()
    about = certainty_line(predictions)
    runtime.say("\n".join([f"{first} on {len(predictions.labels):,} texts", *others, about]) + "\n")
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


def log_scores(log: Log, step: int, split: str, scores: dict, predictions: Predictions) -> None:
    """Write a split's scores to the run's log as curves, also those of each class, label or number,
    and the picture of its answers.
    """
    task = predictions.task
    values = {f"{split}/{name}": scores[name] for name in SCORES[task.kind] if name in scores}
    answers = scores["per_number" if task.kind == REGRESSION else "per_class"]
    for key, _ in ANSWER_COLUMNS[task.kind].values():
        for name, value in zip(task.names, answers[key]):
            if value is not None and key != "support":
                values[f"{split}_{key}/{name}"] = value
    log.numbers(step, values)
    name = {SINGLE: "confusion", MULTI: "labels", REGRESSION: "scatter"}[task.kind]

    def draw(title: str) -> Figure:
        return answer_picture(scores, predictions, title=title)

    log.figure(step, f"{split}/{name}", draw)
