"""What a run leaves for its reader: tables on the screen, report.md with pictures,
predictions.csv.
"""

import csv
from pathlib import Path

import datasets
import torch
from tabulate import tabulate

from common import figures

EPOCH_COLUMNS = {
    "epoch": "epoch",
    "train_loss": "training loss",
    "loss": "validation loss",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "examples_per_second": "examples/s",
}
EPOCH_FORMATS = ("g", ".4f", ".4f", ".4f", ".4f", ".1f")
CARD_SETTINGS = {  # each with what stands for a value that was not given
    "text_column": "",
    "label_column": "",
    "max_train_samples": "all",
    "seed": "",
    "epochs": "",
    "batch_size": "",
    "grad_accum": "",
    "processes": "",
    "batching": "",
    "lr": "",
    "warmup_ratio": "",
    "weight_decay": "",
    "max_grad_norm": "",
    "dropout": "as it was pretrained",
    "attention_dropout": "as dropout if given, else 0",
    "label_smoothing": "",
    "class_weights": "",
    "lora_rank": "none",
    "freeze_layers": "",
    "max_length": "",
    "eval_max_length": "",
    "truncation": "",
    "max_windows": "",
    "best_metric": "",
    "precision": "",
    "device": "",
}
HUB_NAMES = {"bundled/all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
SHOWN_CHARACTERS = 60
NUM_SHOWN = 5


def epoch_table(epochs: list[dict], style: str = "simple") -> str:
    """Return the table of epochs; each epoch is a dict with the keys of EPOCH_COLUMNS."""
    return tabulate(
        [[epoch[key] for key in EPOCH_COLUMNS] for epoch in epochs],
        EPOCH_COLUMNS.values(),
        tablefmt=style,
        floatfmt=EPOCH_FORMATS,
    )


def class_table(per_class: dict[str, list], names: list[str], style: str = "simple") -> str:
    """Return precision, recall, F1 and number of texts of each class as a table."""
    rows = zip(names, *(per_class[key] for key in ("precision", "recall", "f1", "support")))
    return tabulate(
        rows,
        ["class", "precision", "recall", "F1", "texts"],
        tablefmt=style,
        floatfmt=("", ".4f", ".4f", ".4f", "d"),
    )


class Predictions:
    """A tokenised split with the model's answer to each row: `predicted` (N) and `confidence` (N)
    from `logits` (N, C).
    """

    def __init__(self, rows: datasets.Dataset, logits: torch.Tensor):
        self.rows, self.names = rows, rows.features["label"].names
        self.labels = torch.tensor(rows["label"][:])
        self.num_tokens, self.num_read = (torch.tensor(rows[name][:]) for name in ("num_tokens", "num_read"))
        self.scores = logits.softmax(-1)
        self.confidence, self.predicted = self.scores.max(-1)

    def examples(self, *, right: bool, most: int = NUM_SHOWN, style: str = "simple") -> str:
        """Return at most `most` rightly (or wrongly) classified texts, spread over the split, as a
        table; "none" when there are none.
        """
        found = torch.nonzero((self.predicted == self.labels) == right).flatten().tolist()
        chosen = (
            [found[number * len(found) // most] for number in range(most)] if len(found) > most else found
        )
        rows = [
            [
                _shorten(self.rows[number]["text"]),
                self.names[self.predicted[number]],
                self.names[self.labels[number]],
                self.confidence[number].item(),
            ]
            for number in chosen
        ]
        return (
            tabulate(
                rows, ["text", "predicted class", "true class", "confidence"], tablefmt=style, floatfmt=".3f"
            )
            if rows
            else "none"
        )

    def length_table(self, max_length: int, style: str = "simple") -> str:
        """Return, for texts up to `max_length` tokens, twice, four times that and longer ones, how
        many, what share of their tokens is not read, accuracy.
        """
        right, rows = (self.predicted == self.labels).double(), []
        for low, high in zip(
            (0, max_length, 2 * max_length, 4 * max_length),
            (max_length, 2 * max_length, 4 * max_length, None),
        ):
            chosen = (self.num_tokens > low) & (self.num_tokens <= (high or self.num_tokens.max()))
            if chosen.any():
                dropped = 1 - self.num_read[chosen].sum() / self.num_tokens[chosen].sum()
                rows.append(
                    [
                        f"{low + 1}-{high}" if high else f"over {low}",
                        int(chosen.sum()),
                        f"{dropped:.1%}",
                        right[chosen].mean().item(),
                    ]
                )
        return tabulate(
            rows,
            ["tokens", "texts", "not read", "accuracy"],
            tablefmt=style,
            floatfmt=".4f",
            colalign=("left", "right", "right", "right"),
        )

    def write_csv(self, path: Path):
        """Write one line a row: its number in the source, the classes, the confidence, the score
        of each class, the text.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["row", "true", "predicted", "confidence", *(f"score {name}" for name in self.names), "text"]
            )
            for number, row in enumerate(self.rows):
                scores = [f"{score:.6f}" for score in self.scores[number].tolist()]
                writer.writerow(
                    [
                        row["row"],
                        self.names[row["label"]],
                        self.names[self.predicted[number]],
                        f"{self.confidence[number].item():.6f}",
                        *scores,
                        row["text"],
                    ]
                )


def _shorten(text: str) -> str:
    line = " ".join(text.split()).replace("|", "/")  # a bar would end a cell in Markdown
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 3] + "..."


def write_report(
    folder: Path, *, settings: dict, results: dict, epochs: list[dict], scores: dict, predictions: Predictions
):
    """Write report.md, learning_curve.png, confusion_matrix.png and predictions.csv into the run
    folder.
    """
    names = predictions.names
    figures.save(figures.learning_curve(epochs, results["best_epoch"]), folder / "learning_curve.png")
    figures.save(
        figures.confusion_matrix(scores["confusion"], names, title="test split"),
        folder / "confusion_matrix.png",
    )
    predictions.write_csv(folder / "predictions.csv")
    described = tabulate(
        [
            [f"`{key}`", _cell(value)]
            for key, value in settings.items()
            if key not in ("identity", "versions")
        ],
        ["setting", "value"],
        tablefmt="github",
    )
    packages = tabulate(settings["versions"].items(), ["package", "version"], tablefmt="github")
    (folder / "report.md").write_text(
        f"""# {settings["model"]} on {settings["dataset"]}

Test accuracy **{results["test_accuracy"]:.4f}**, macro-F1 **{results["test_macro_f1"]:.4f}**
({len(predictions.labels)} texts), with the weights of epoch {results["best_epoch"]:g},
the best by validation {settings["best_metric"]}. Seed {settings["seed"]}.
{results["train_examples_per_second"]:.1f} training examples a second.

## Epochs

{epoch_table(epochs, "github")}

![Losses and validation scores of each epoch](learning_curve.png)

## Classes of the test split

{class_table(scores["per_class"], names, "github")}

![Confusion matrix of the test split](confusion_matrix.png)

## By length

A text is read to {settings["eval_max_length"]} tokens; of a longer one,
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
""",
        encoding="utf-8",
    )


def _cell(value) -> str:
    return "" if value is None else " ".join(str(value).split())


def _public(name: str) -> str:
    # of a local path the last part: the card may go to others
    return Path(name).resolve().name if Path(name).exists() else name


def _base_model(name: str) -> str:
    # the Hub takes its own names only
    return "" if Path(name).exists() else f"base_model: {HUB_NAMES.get(name, name)}\n"


def _novelty(splits: datasets.DatasetDict) -> str:
    seen = {*splits["train"]["text"], *splits["validation"]["text"]}
    count = sum(text in seen for text in splits["test"]["text"])
    if count == 0:
        return "which were used neither for training nor for choosing the weights"
    return (
        f"of which {count:,} stand in the training or the validation split too, so that the scores say little"
        " about new texts"
    )


def write_card(
    folder: Path,
    *,
    splits: datasets.DatasetDict,
    settings: dict,
    results: dict,
    predictions: Predictions,
    per_class: dict[str, list],
):
    """Write the model card, README.md, into the folder of a saved model: what it is, how to use
    it, data, settings, results, limits.
    """
    names, values = (
        predictions.names,
        {
            f"`{key}`": unset if settings[key] is None else _cell(settings[key])
            for key, unset in CARD_SETTINGS.items()
        },
    )
    shown = tabulate(
        [*values.items(), *settings["versions"].items()], ["setting", "value"], tablefmt="github"
    )
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
pipeline_tag: text-classification
{_base_model(settings["model"])}metrics: [accuracy, f1]
---

# A classifier of texts into {len(names)} classes

`{_public(settings["model"])}`, fine-tuned on `{_public(settings["dataset"])}` to tell
{", ".join(f"`{name}`" for name in names)}.

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

{class_table(per_class, names, "github")}

{predictions.length_table(settings["eval_max_length"], "github")}

## Training

{len(splits["train"]):,} texts for training, {len(splits["validation"]):,} for validation.

{shown}

## Limits

The scores hold for texts like those of the data set. A text beyond {settings["eval_max_length"]} tokens was
read in scoring by `--truncation {settings["truncation"]}`; the pipeline above reads its beginning only.
Biases of the pretrained model and of the labels were not examined. Licence: that of the pretrained model and
the data allow; see both before passing this on.
""",
        encoding="utf-8",
    )


def epoch_line(epoch: dict, num_epochs: int) -> str:
    """Return one line on an epoch that just ended."""
    return (
        f"epoch {epoch['epoch']:g}/{num_epochs}  training loss {epoch['train_loss']:.4f}, validation loss"
        f" {epoch['loss']:.4f}, accuracy {epoch['accuracy']:.4f}, macro-F1 {epoch['macro_f1']:.4f},"
        f" {epoch['examples_per_second']:.1f} examples/s"
    )


def show(scores: dict, predictions: Predictions, max_length: int, say):
    """Say scores, the tables of classes and lengths, and five right and five wrong texts."""
    say(
        f"accuracy {scores['accuracy']:.4f}, macro-F1 {scores['macro_f1']:.4f}, loss {scores['loss']:.4f} on"
        f" {len(predictions.labels):,} texts\n"
    )
    say(class_table(scores["per_class"], predictions.names))
    say(
        f"\nby length of the text, which is read to {max_length}"
        f" tokens:\n{predictions.length_table(max_length)}"
    )
    for right in (True, False):
        say(
            f"\nfive {'right' if right else 'wrong'} ones, spread over the"
            f" split:\n{predictions.examples(right=right)}"
        )


def log_scores(run, step: int, split: str, scores: dict, names: list[str]):
    """Give a split's scores to the run's log as curves, and its confusion matrix as a picture."""
    per_class = {
        f"{split}_{measure}/{name}": value
        for measure in ("precision", "recall")
        for name, value in zip(names, scores["per_class"][measure])
    }
    run.numbers(
        step, {**{f"{split}/{name}": scores[name] for name in ("loss", "accuracy", "macro_f1")}, **per_class}
    )
    run.confusion(step, f"{split}/confusion", scores["confusion"], names)
