"""The model card, README.md beside a saved model: what the model is and how to use it, its data,
settings, results and limits.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import counted, shorten
from common.training.data import Splits
from common.training.duplicates import count_shared_texts
from common.training.report import (
    MOST_CLASSES,
    SHOWN_CHARACTERS,
    Outcome,
    answer_table,
    baseline_sentence,
    certainty_sentence,
    score_sentence,
    setting_cell,
    setting_table,
)
from common.training.run import MULTI, REGRESSION, SCORES, SINGLE
from common.training.task import Task

# the settings that the card shows, and what it says of a flag that was not given
SETTINGS = {
    "revision": "none: the model is not from the Hub",
    "dataset_revision": "none: the data is not from the Hub",
    "text_column": "",
    "text_mode": "one text",
    "label_column": "",
    "task": "",
    "max_train_samples": "all",
    "seed": "",
    "split_seed": "seed",
    "epochs": "",
    "batch_size": "",
    "grad_accum": "",
    "processes": "",
    "batching": "",
    "lr": "",
    "schedule": "",
    "max_steps": "as the epochs have",
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
HUB_METRICS = {  # as the Hub names them
    SINGLE: "accuracy, f1",
    MULTI: "f1, roc_auc",
    REGRESSION: "mse, pearsonr, spearmanr",
}
HUB_NAMES = {"bundled/all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2"}


def write_card(folder: Path, outcome: Outcome, splits: Splits) -> None:
    """Write the model card into the folder of a saved model."""
    (folder / "README.md").write_text(_card_text(outcome, splits), encoding="utf-8")


def _card_text(outcome: Outcome, splits: Splits) -> str:
    settings, scores, predictions = outcome.settings, outcome.scores, outcome.predictions
    task, model = predictions.task, settings["model"]
    # the Hub accepts only its own names here
    base_model = "" if Path(model).exists() else f"base_model: {HUB_NAMES.get(model, model)}\n"
    title, purpose = _title(task)
    names = ", ".join(map(_code, task.names[:MOST_CLASSES]))
    rest = len(task.names) - MOST_CLASSES
    is_pair = "text_pair" in splits["test"].column_names
    text = '{"text": "a text", "text_pair": "another"}' if is_pair else '"a text"'
    options = "truncation=True" if task.kind == SINGLE else "truncation=True, top_k=None"
    shown = {
        f"`{name}`": unset if settings[name] is None else setting_cell(settings[name])
        for name, unset in SETTINGS.items()
    }
    return f"""---
library_name: transformers
pipeline_tag: text-classification
{base_model}metrics: [{HUB_METRICS[task.kind]}]
---

# {title}

{_code(_public(model))}, fine-tuned on {_code(_public(settings["dataset"]))} to {purpose}
{names}{f" and {rest:,} more" if rest > 0 else ""}.

```python
from transformers import pipeline

classify = pipeline("text-classification", model="this folder or its name on the Hub")
print(classify({text}, {options}))
```

{_meaning(task, scores)}{_about_temperature(outcome.temperature)}

## Results

On {counted(len(predictions.labels), "text")} of the test split, {_novelty(splits)}:
{score_sentence(scores, predictions)}
{certainty_sentence(predictions)}
{baseline_sentence(outcome.baseline, task)} The weights are those after epoch {outcome.best["epoch"]:g},
the best by validation {SCORES[task.kind][settings["best_metric"]]}.

{answer_table(scores, task, "github")}

{predictions.length_table(settings["eval_max_length"], "github")}

## Training

{counted(len(splits["train"]), "text")} for training, {len(splits["validation"]):,} for validation.

{setting_table([*shown.items(), *settings["versions"].items()], "setting", "value")}

## Limits

The scores hold for texts like those of the data set. A text beyond {settings["eval_max_length"]} tokens was
read in scoring by `--truncation {settings["truncation"]}`; the pipeline above reads its beginning only.
Biases of the pretrained model and of the labels were not examined. Licence: that of the pretrained model and
the data allow; see both before passing this on.
"""


def _code(name: str) -> str:
    """Return a name as code within a line of Markdown, which a backtick would end."""
    return "`" + shorten(name, SHOWN_CHARACTERS).replace("`", "'") + "`"


def _public(name: str) -> str:
    # the last part of a local path: the card may be passed on
    return Path(name).resolve().name if Path(name).exists() else name


def _title(task: Task) -> tuple[str, str]:
    """Return the title of the card, and what the model was trained to do."""
    count = f"{len(task.names)} {task.noun()}"
    if task.kind == SINGLE:
        return f"A classifier of texts into {count}", "tell"
    if task.kind == MULTI:
        return f"A classifier of texts by {count}, of which a text can have several", "find"
    return f"A model that gives texts {count}", "predict"


def _meaning(task: Task, scores: dict) -> str:
    """Return a sentence on what the answers of the pipeline mean."""
    if task.kind == SINGLE:
        return "The score is the probability of the class."
    if task.kind == REGRESSION:
        return "The scores are the numbers themselves."
    limits = zip(task.names, scores["per_class"]["threshold"])
    shown = ", ".join(f"{_code(name)} {threshold:.4g}" for name, threshold in limits)
    return f"A score is the probability of a label. A text has it from this probability on: {shown}."


def _about_temperature(temperature: float) -> str:
    """Return a sentence on the temperature of a calibrated model."""
    if temperature == 1:
        return ""
    return (
        f" Probabilities are calibrated: `--predict` divides the logits by the temperature"
        f" {temperature:.4f} (in `training.json`), fitted on the validation split. The"
        " pipeline does not: its best class is the same, its score another."
    )


def _novelty(splits: Splits) -> str:
    count = count_shared_texts(splits, ("train", "validation"))["test"]
    if count == 0:
        return "which were used neither for training nor for choosing the weights"
    return (
        f"of which {count:,} also occur in the training or the validation split (capitals, spaces and"
        " punctuation don't count), so that the scores say little about new texts"
    )
