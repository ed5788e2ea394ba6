"""What a run tells its reader: on the screen, in report.md with pictures, in predictions.csv."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tabulate import tabulate

from common.errors import printable, shorten
from common.runtime import Runtime
from common.training import batching
from common.training.batching import BatchConfig
from common.training.data import Splits, TokenConfig
from common.training.tracking import Log

if TYPE_CHECKING:
    import datasets

EPOCH_COLUMNS = {
    "epoch": "epoch",
    "train_loss": "training loss",
    "loss": "validation loss",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "examples_per_second": "examples/s",
}
EPOCH_FORMATS = ("g", ".4f", ".4f", ".4f", ".4f", ".1f")
CARD_SETTINGS = {  # each with what is shown for a flag that was not given
    "text_column": "",
    "label_column": "",
    "max_train_samples": "all",
    "seed": "",
    "split_seed": "seed",
    "epochs": "",
    "batch_size": "",
    "grad_accum": "",
    "processes": "",
    "batching": "",
    "lr": "",
    "warmup_ratio": "",
    "weight_decay": "",
    "max_grad_norm": "",
    "dropout": "as in the pretrained model",
    "attention_dropout": "as dropout if given, else 0",
    "label_smoothing": "",
    "class_weights": "",
    "lora_rank": "none",
    "freeze_layers": "",
    "max_length": "",
    "eval_max_length": "",
    "truncation": "",
    "max_chunks": "",
    "best_metric": "",
    "precision": "",
    "device": "",
}
LOST = {"head": "lose their end", "tail": "lose their beginning", "head-tail": "lose their middle"}
HUB_NAMES = {"bundled/all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
SHOWN_CHARACTERS = 60
MARKDOWN = re.compile(r"[\\`*<&\[|]")  # what is more than a character in a line of Markdown
MOST_CLASSES, WORST_CLASSES = 30, 20  # of more classes than the first, a table shows the second
NUM_SHOWN, NUM_IN_TENSORBOARD = 5, 50  # texts with right or wrong answers


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


def epoch_table(epochs: list[dict], style: str = "simple") -> str:
    """Return the table of epochs; each epoch is a dict with the keys of EPOCH_COLUMNS."""
    return tabulate(
        [[epoch[key] for key in EPOCH_COLUMNS] for epoch in epochs],
        list(EPOCH_COLUMNS.values()),
        tablefmt=style,
        floatfmt=EPOCH_FORMATS,
    )


def class_table(per_class: dict[str, list], names: list[str], style: str = "simple") -> str:
    """Return precision, recall, F1 and number of texts of each class as a table.

    Of more than 30 classes it shows the 20 with the lowest F1, the lowest first, and says so below.
    """
    named = [_in_cell(name, style) for name in names]
    rows = list(zip(named, *(per_class[key] for key in ("precision", "recall", "f1", "support"))))
    note = ""
    if len(rows) > MOST_CLASSES:
        note = f"\n\nThese are the {WORST_CLASSES} of {len(rows):,} classes with the lowest F1."
        rows = sorted(rows, key=lambda row: row[3])[:WORST_CLASSES]
    table = tabulate(
        rows,
        ["class", "precision", "recall", "F1", "texts"],
        tablefmt=style,
        floatfmt=("", ".4f", ".4f", ".4f", "d"),
        disable_numparse=[0],  # else the class 1.10 would read 1.1
    )
    return table + note


class Predictions:
    """A tokenised split with the model's answers, from `logits` (N, C).

    These are the class `predicted` (N) and its probability, the `confidence` (N).
    """

    def __init__(self, rows: datasets.Dataset, logits: torch.Tensor) -> None:
        self.rows, self.names = rows, rows.features["label"].names
        self.labels = torch.tensor(rows["label"][:])
        self.num_tokens = torch.tensor(rows["num_tokens"][:])  # (N)
        self.num_read = torch.tensor(rows["num_read"][:])  # (N)
        self.scores = logits.softmax(-1)
        self.confidence, self.predicted = self.scores.max(-1)

    def examples(self, *, right: bool, most: int = NUM_SHOWN, style: str = "simple") -> str:
        """Return at most `most` texts with a right (or wrong) answer, over the split, as a table.

        Returns "none" when there are none.
        """
        numbers = torch.nonzero((self.predicted == self.labels) == right).flatten().tolist()
        if not numbers:
            return "none"
        if len(numbers) > most:
            numbers = [numbers[index * len(numbers) // most] for index in range(most)]
        rows = [
            [
                _in_cell(self.rows[number]["text"], style),
                _in_cell(self.names[self.predicted[number]], style),
                _in_cell(self.names[self.labels[number]], style),
                self.confidence[number].item(),
            ]
            for number in numbers
        ]
        headers = ["text", "predicted class", "true class", "confidence"]
        return tabulate(rows, headers, tablefmt=style, floatfmt=".3f", disable_numparse=[0, 1, 2])

    def length_table(self, max_length: int, style: str = "simple") -> str:
        """Return the number, the share not read and the accuracy of texts by length, as a table.

        The texts are grouped: up to `max_length` tokens, twice that, four times that, and longer.
        """
        right, rows = (self.predicted == self.labels).double(), []
        limits = [0, max_length, 2 * max_length, 4 * max_length, int(self.num_tokens.max())]
        for low, high in zip(limits, limits[1:]):
            chosen = (self.num_tokens > low) & (self.num_tokens <= high)
            if not chosen.any():
                continue
            label = f"over {low}" if low == limits[3] else f"{low + 1}-{high}"
            dropped = 1 - self.num_read[chosen].sum() / self.num_tokens[chosen].sum()
            rows.append([label, int(chosen.sum()), f"{dropped:.1%}", right[chosen].mean().item()])
        return tabulate(
            rows,
            ["tokens", "texts", "not read", "accuracy"],
            tablefmt=style,
            floatfmt=".4f",
            colalign=("left", "right", "right", "right"),
            disable_numparse=[0, 2],
        )

    def write_csv(self, path: Path) -> None:
        """Write one line per row: its number in the source, the classes, the scores, the text."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            scores_of = [f"score {name}" for name in self.names]
            writer.writerow(["row", "true", "predicted", "confidence", *scores_of, "text"])
            columns = (self.rows[name][:] for name in ("row", "label", "text"))
            for number, (row, label, text) in enumerate(zip(*columns)):
                true, predicted = self.names[label], self.names[self.predicted[number]]
                confidence = f"{self.confidence[number].item():.6f}"
                scores = [f"{score:.6f}" for score in self.scores[number].tolist()]
                writer.writerow([row, true, predicted, confidence, *scores, text])


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
    peak_memory_bytes: int

    @property
    def results(self) -> dict[str, float]:
        """The content of metrics.json."""
        epochs = [entry for entry in self.history if isinstance(entry["epoch"], int)] or self.history
        seconds_per_example = [1 / entry["examples_per_second"] for entry in epochs]
        names = ("accuracy", "macro_f1", "loss")
        return {
            **{f"test_{name}": self.scores[name] for name in names},
            "best_epoch": self.best["epoch"],
            **{f"best_validation_{name}": self.best[name] for name in names},
            "train_examples_per_second": len(epochs) / sum(seconds_per_example),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def log_outcome(log: Log, outcome: Outcome) -> None:
    """Write the test scores, the mistakes and metrics.json to the run's log."""
    step, predictions = outcome.best["step"], outcome.predictions
    log_scores(log, step, "test", outcome.scores, predictions.names)
    mistakes = predictions.examples(right=False, most=NUM_IN_TENSORBOARD, style="github")
    log.text(step, "test/mistakes", mistakes)
    curves = ["test/accuracy", "test/macro_f1", "test/loss", "train/examples_per_second"]
    log.finish(outcome.results, curves=curves)


def write_report(folder: Path, outcome: Outcome) -> None:
    """Write report.md, its pictures and predictions.csv into the run folder."""
    from common import figures

    curve = figures.learning_curve(outcome.history, outcome.best["epoch"])
    figures.save(curve, folder / "learning_curve.png")
    counts, names = outcome.scores["confusion"], outcome.predictions.names
    figures.save(figures.confusion_matrix(counts, names, title="test split"), folder / "confusion_matrix.png")
    outcome.predictions.write_csv(folder / "predictions.csv")
    (folder / "report.md").write_text(_report_text(outcome), encoding="utf-8")


def _report_text(outcome: Outcome) -> str:
    settings, results, predictions = outcome.settings, outcome.results, outcome.predictions
    shown = [key for key in settings if key not in ("identity", "versions")]
    described = _settings_table([(f"`{key}`", _cell(settings[key])) for key in shown], "setting", "value")
    packages = _settings_table(settings["versions"].items(), "package", "version")
    return f"""# {_cell(settings["model"])} on {_cell(settings["dataset"])}

Test accuracy **{results["test_accuracy"]:.4f}**, macro-F1 **{results["test_macro_f1"]:.4f}**
({len(predictions.labels)} texts), with the weights of epoch {results["best_epoch"]:g},
the best by validation {settings["best_metric"]}. Seed {settings["seed"]}.
{results["train_examples_per_second"]:.1f} training examples a second.

## Epochs

{epoch_table(outcome.history, "github")}

![Losses and validation scores of each epoch](learning_curve.png)

## Classes of the test split

{class_table(outcome.scores["per_class"], predictions.names, "github")}

![Confusion matrix of the test split](confusion_matrix.png)

## By length

A text is read up to {settings["eval_max_length"]} tokens; of a longer one,
`--truncation {settings["truncation"]}`.

{predictions.length_table(settings["eval_max_length"], "github")}

## Five right

{predictions.examples(right=True, style="github")}

## Five wrong

{predictions.examples(right=False, style="github")}

Every row of the test split is in [predictions.csv](predictions.csv).

## Settings

{described}

{packages}
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
    seen = {*splits["train"]["text"], *splits["validation"]["text"]}
    count = sum(text in seen for text in splits["test"]["text"])
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
    settings, results, predictions = outcome.settings, outcome.results, outcome.predictions
    names = predictions.names
    values = {
        f"`{key}`": unset if settings[key] is None else _cell(settings[key])
        for key, unset in CARD_SETTINGS.items()
    }
    shown = _settings_table([*values.items(), *settings["versions"].items()], "setting", "value")
    return f"""---
library_name: transformers
pipeline_tag: text-classification
{_base_model(settings["model"])}metrics: [accuracy, f1]
---

# A classifier of texts into {len(names)} classes

{_code(_public(settings["model"]))}, fine-tuned on {_code(_public(settings["dataset"]))} to tell
{_listed(names)}.

```python
from transformers import pipeline

classify = pipeline("text-classification", model="this folder or its name on the Hub")
print(classify("a text", truncation=True))
```

## Results

On {len(predictions.labels):,} texts of the test split, {_novelty(splits)}:
accuracy {results["test_accuracy"]:.4f}, macro-F1 {results["test_macro_f1"]:.4f},
loss {results["test_loss"]:.4f}. The weights are those after epoch {results["best_epoch"]:g},
the best by validation {settings["best_metric"]}.

{class_table(outcome.scores["per_class"], names, "github")}

{predictions.length_table(settings["eval_max_length"], "github")}

## Training

{len(splits["train"]):,} texts for training, {len(splits["validation"]):,} for validation.

{shown}

## Limits

The scores hold for texts like those of the data set. A text beyond {settings["eval_max_length"]} tokens was
read in scoring by `--truncation {settings["truncation"]}`; the pipeline above reads its beginning only.
Biases of the pretrained model and of the labels were not examined. Licence: that of the pretrained model and
the data allow; see both before passing this on.
"""


def epoch_line(epoch: dict, num_epochs: int) -> str:
    """Return one line on an evaluation, mostly at the end of an epoch."""
    return (
        f"epoch {epoch['epoch']:g}/{num_epochs}  training loss {epoch['train_loss']:.4f},"
        f" validation loss {epoch['loss']:.4f}, accuracy {epoch['accuracy']:.4f}, macro-F1"
        f" {epoch['macro_f1']:.4f}, {epoch['examples_per_second']:.1f} examples/s"
    )


def show(scores: dict, predictions: Predictions, max_length: int, runtime: Runtime) -> None:
    """Print scores, the tables of classes and lengths, and five right and five wrong answers."""
    accuracy, macro_f1, loss = (scores[name] for name in ("accuracy", "macro_f1", "loss"))
    count = len(predictions.labels)
    runtime.say(f"accuracy {accuracy:.4f}, macro-F1 {macro_f1:.4f}, loss {loss:.4f} on {count:,} texts\n")
    runtime.say(class_table(scores["per_class"], predictions.names))
    runtime.say(
        f"\nby length of the text, which is read up to {max_length} tokens:\n"
        + predictions.length_table(max_length)
    )
    runtime.say("\nfive right answers, spread over the split:\n" + predictions.examples(right=True))
    runtime.say("\nfive wrong answers, spread over the split:\n" + predictions.examples(right=False))


def log_scores(log: Log, step: int, split: str, scores: dict, names: list[str]) -> None:
    """Write a split's scores to the run's log as curves, and its confusion matrix as a picture."""
    values = {f"{split}/{name}": scores[name] for name in ("loss", "accuracy", "macro_f1")}
    for measure in ("precision", "recall"):
        for name, value in zip(names, scores["per_class"][measure]):
            values[f"{split}_{measure}/{name}"] = value
    log.numbers(step, values)
    log.confusion(step, f"{split}/confusion", scores["confusion"], names)
