"""What a run leaves for its reader: tables on the screen, report.md with pictures, predictions.csv."""

import csv
from pathlib import Path

import datasets
import torch
from tabulate import tabulate

from common import figures

EPOCH_COLUMNS = {"epoch": "epoch", "train_loss": "training loss", "loss": "validation loss", "accuracy": "accuracy",
                 "macro_f1": "macro-F1", "examples_per_second": "examples/s"}
EPOCH_FORMATS = ("d", ".4f", ".4f", ".4f", ".4f", ".1f")
SHOWN_CHARACTERS = 60
NUM_SHOWN = 5


def epoch_table(epochs: list[dict], style: str = "simple") -> str:
    """Return the table of epochs; each epoch is a dict with the keys of EPOCH_COLUMNS."""
    return tabulate([[epoch[key] for key in EPOCH_COLUMNS] for epoch in epochs], EPOCH_COLUMNS.values(), tablefmt=style, floatfmt=EPOCH_FORMATS)


def class_table(per_class: dict[str, list], names: list[str], style: str = "simple") -> str:
    """Return precision, recall, F1 and number of texts of each class as a table."""
    rows = zip(names, *(per_class[key] for key in ("precision", "recall", "f1", "support")))
    return tabulate(rows, ["class", "precision", "recall", "F1", "texts"], tablefmt=style, floatfmt=("", ".4f", ".4f", ".4f", "d"))


class Predictions:
    """A split with the model's answer to each row: `predicted` (N) and `confidence` (N) from `logits` (N, C)."""

    def __init__(self, rows: datasets.Dataset, logits: torch.Tensor):
        self.rows, self.names = rows, rows.features["label"].names
        self.labels = torch.tensor(rows["label"][:])
        self.scores = logits.softmax(-1)
        self.confidence, self.predicted = self.scores.max(-1)

    def examples(self, *, right: bool, most: int = NUM_SHOWN, style: str = "simple") -> str:
        """Return at most `most` rightly (or wrongly) classified texts, spread over the split, as a table; "none" when there are none."""
        found = torch.nonzero((self.predicted == self.labels) == right).flatten().tolist()
        chosen = [found[number * len(found) // most] for number in range(most)] if len(found) > most else found
        rows = [[_shorten(self.rows[number]["text"]), self.names[self.predicted[number]], self.names[self.labels[number]],
                 self.confidence[number].item()] for number in chosen]
        return tabulate(rows, ["text", "predicted class", "true class", "confidence"], tablefmt=style, floatfmt=".3f") if rows else "none"

    def write_csv(self, path: Path):
        """Write one line a row: its number in the source, the classes, the confidence, the score of each class, the text."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "true", "predicted", "confidence", *(f"score {name}" for name in self.names), "text"])
            for number, row in enumerate(self.rows):
                scores = [f"{score:.6f}" for score in self.scores[number].tolist()]
                writer.writerow([row["row"], self.names[row["label"]], self.names[self.predicted[number]],
                                 f"{self.confidence[number].item():.6f}", *scores, row["text"]])


def _shorten(text: str) -> str:
    line = " ".join(text.split()).replace("|", "/")  # a bar would end a cell in Markdown
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 3] + "..."


def write_report(folder: Path, *, settings: dict, results: dict, epochs: list[dict], scores: dict, predictions: Predictions):
    """Write report.md, learning_curve.png, confusion_matrix.png and predictions.csv into the run folder."""
    names = predictions.names
    figures.save(figures.learning_curve(epochs, results["best_epoch"]), folder / "learning_curve.png")
    figures.save(figures.confusion_matrix(scores["confusion"], names, title="test split"), folder / "confusion_matrix.png")
    predictions.write_csv(folder / "predictions.csv")
    described = tabulate([[f"`{key}`", _cell(value)] for key, value in settings.items() if key != "versions"], ["setting", "value"], tablefmt="github")
    packages = tabulate(settings["versions"].items(), ["package", "version"], tablefmt="github")
    (folder / "report.md").write_text(f"""# {settings["model"]} on {settings["dataset"]}

Test accuracy **{results["test_accuracy"]:.4f}**, macro-F1 **{results["test_macro_f1"]:.4f}** ({len(predictions.labels)} texts), with the weights of
epoch {results["best_epoch"]}, the best by validation {settings["best_metric"]}. Seed {settings["seed"]}.
{results["train_examples_per_second"]:.1f} training examples a second.

## Epochs

{epoch_table(epochs, "github")}

![Losses and validation scores of each epoch](learning_curve.png)

## Classes of the test split

{class_table(scores["per_class"], names, "github")}

![Confusion matrix of the test split](confusion_matrix.png)

## Five right

{predictions.examples(right=True, style="github")}

## Five wrong

{predictions.examples(right=False, style="github")}

Every row of the test split is in [predictions.csv](predictions.csv).

## Settings

{described}

{packages}
""", encoding="utf-8")


def _cell(value) -> str:
    return "" if value is None else " ".join(str(value).split())


def epoch_line(epoch: dict, num_epochs: int) -> str:
    """Return one line on an epoch that just ended."""
    return (f"epoch {epoch['epoch']}/{num_epochs}  training loss {epoch['train_loss']:.4f}, validation loss {epoch['loss']:.4f}, "
            f"accuracy {epoch['accuracy']:.4f}, macro-F1 {epoch['macro_f1']:.4f}, {epoch['examples_per_second']:.1f} examples/s")


def show(scores: dict, predictions: Predictions, say):
    """Say scores, the table of classes, and five right and five wrong texts."""
    say(f"accuracy {scores['accuracy']:.4f}, macro-F1 {scores['macro_f1']:.4f}, loss {scores['loss']:.4f} on {len(predictions.labels):,} texts\n")
    say(class_table(scores["per_class"], predictions.names))
    for right in (True, False):
        say(f"\nfive {'right' if right else 'wrong'} ones, spread over the split:\n{predictions.examples(right=right)}")


def log_scores(run, step: int, split: str, scores: dict, names: list[str]):
    """Give a split's scores to the run's log as curves, and its confusion matrix as a picture."""
    per_class = {f"{split}_{measure}/{name}": value for measure in ("precision", "recall")
                 for name, value in zip(names, scores["per_class"][measure])}
    run.numbers(step, {**{f"{split}/{name}": scores[name] for name in ("loss", "accuracy", "macro_f1")}, **per_class})
    run.confusion(step, f"{split}/confusion", scores["confusion"], names)
