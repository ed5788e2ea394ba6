"""A classifier in its folder: written, read, and used again as it was trained and scored."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common import bert, sources, speedups
from common.errors import NotSupported, UserError, counted
from common.files import replace_folder
from common.runtime import Runtime
from common.training.batching import AnyTokenizer
from common.training.classifier import (
    AnyModel,
    choose_max_length,
    ensure_padding_token,
    pad_at_unread_end,
    reads_ends,
    require_match,
    saved_kind,
    task_of_model,
)
from common.training.labels import Label
from common.training.run import MULTI, PAIR, REGRESSION, SINGLE
from common.training.saved_settings import SETTINGS_FILE, SavedSettings, read_settings
from common.training.task import PROBLEM_TYPES, Task
from common.training.tokenization import TokenConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SavedModel:
    """A trained model, its tokenizer, and how it was trained."""

    name: str
    model: AnyModel
    tokenizer: AnyTokenizer
    settings: SavedSettings

    @property
    def task(self) -> Task:
        """The task that it was trained for."""
        return task_of_model(self.model)

    def choose_tokens(self, *, eval_max_length: int | None, truncation: str | None) -> TokenConfig:
        """Return how it reads texts; None: as it was scored."""
        default = self.tokenizer.model_max_length
        length = choose_max_length(
            eval_max_length, default, self.model, self.tokenizer, flag="--eval-max-length"
        )
        hides_special = self.settings.text_mode == PAIR or reads_ends(self.model)
        return TokenConfig(length, length, truncation or self.settings.truncation, hides_special)

    def thresholds(self) -> tuple[float, ...] | float:
        """Return from which probability on a text has a label: one for each label, as training chose
        them, else 0.5. Raises UserError when there are more or fewer than labels.
        """
        thresholds, labels = self.settings.thresholds, self.task.names
        if not thresholds or self.task.kind != MULTI:
            return 0.5
        if len(thresholds) != len(labels):
            raise UserError(
                f"--model {self.name}: {SETTINGS_FILE} has {counted(len(thresholds), 'threshold')} for"
                f" {counted(len(labels), 'label')}; copy it from the run once more"
            )
        return tuple(thresholds)

    def baseline(self) -> Label | None:
        """Return the answer of a baseline, None where training left none. Raises UserError when it is
        none of the model's.
        """
        answer, names = self.settings.baseline, self.task.names
        if self.task.kind == REGRESSION:
            is_known = isinstance(answer, list) and [type(number) for number in answer] == [float] * len(
                names
            )
        else:
            labels = answer if self.task.kind == MULTI else [answer]
            is_known = isinstance(labels, list) and all(label in names for label in labels)
        if answer is not None and not is_known:
            problem = f"{SETTINGS_FILE} has a baseline that is no answer of the model"
            raise UserError(f"--model {self.name}: {problem}; copy it from the run once more")
        return answer


# Save ---------------------------------------------------------------------------------------------


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    max_length: int,
    settings: dict,
) -> None:
    """Write model, tokenizer and `training.json`, which holds the `settings`, as a plain Hugging Face
    folder.

    An older folder is replaced only by a complete one. The tokenizer remembers `max_length` as its
    limit, so that `pipeline(..., truncation=True)` truncates where the model was scored.
    """
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    tokenizer.model_max_length = max_length
    model.save_pretrained(fresh)
    for weights in fresh.glob("*.safetensors"):  # the library lets nobody but their owner read them
        weights.chmod((fresh / "config.json").stat().st_mode)
    tokenizer.save_pretrained(fresh)
    (fresh / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    replace_folder(fresh, folder)


# Load ---------------------------------------------------------------------------------------------


def load(
    name: str, runtime: Runtime, *, cache_dir: str | None = None, revision: str | None = None
) -> SavedModel:
    """Return a classifier with the head that it was saved with, on its device. Raises UserError when
    it was never trained to classify.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from common import models

    folder = sources.find_folder(name, kind="encoder", cache_dir=cache_dir, revision=revision)
    config = models.load(AutoConfig, folder, name=name)
    model, new = models.load_model(
        AutoModelForSequenceClassification, folder, name=name, config=config, dtype=torch.float32
    )
    if new:
        raise UserError(
            f"--model {name}: it was never trained to classify (no weights for {', '.join(new)});"
            " name the folder runs/<name>/best of a finished run"
        )
    check_classes(config, name=name)
    model = model.to(runtime.device)
    speedups.use_fast_attention(model)
    speedups.use_first_token(model)
    tokenizer = models.load_tokenizer(folder, name=name)
    ensure_padding_token(tokenizer, name=name)
    pad_at_unread_end(model, tokenizer)
    require_match(model, tokenizer, name=name)
    return SavedModel(name, model, tokenizer, read_settings(folder, name))


def load_to_predict(
    name: str, runtime: Runtime, *, cache_dir: str | None, revision: str | None = None
) -> SavedModel:
    """Return what `load` returns, without transformers where the project knows the model itself: it
    is ready in a fraction of the time.
    """
    from common.tokenizer import read_tokenizer

    folder = sources.find_folder(name, kind="encoder", cache_dir=cache_dir, revision=revision)
    with contextlib.suppress(NotSupported):
        model, tokenizer = bert.load_classifier(folder), read_tokenizer(folder)
        if tokenizer.pad_token is not None and _is_sound(model):
            model = model.to(runtime.device).eval()
            return SavedModel(name, model, tokenizer, read_settings(folder, name))
    return load(name, runtime, cache_dir=cache_dir, revision=revision)


def _is_sound(model: bert.BertClassifier) -> bool:
    """Tell whether a model's outputs have names that nothing contradicts; else `load` says why."""
    settings = model.config.settings
    numbers = {name: number for number, name in enumerate(model.class_names)}
    return (
        settings.get("problem_type") in (None, *PROBLEM_TYPES.values())
        and len(numbers) == model.classifier.out_features
        and (len(numbers) > 1 or task_of_model(model).kind != SINGLE)
        and (settings.get("label2id") or numbers) == numbers
        and all(bool(weights.isfinite().all()) for weights in model.parameters())
    )


def check_classes(config: PreTrainedConfig, *, name: str) -> None:
    """Raise UserError unless a saved model names its classes, labels or numbers without contradiction."""
    if saved_kind(config) == SINGLE and config.num_labels == 1:
        raise UserError(
            f"--model {name}: it has only one class, so it can't tell anything; name another model"
        )
    labels, numbers = config.id2label or {}, config.label2id or {}
    if sorted(labels) != list(range(len(labels))) or len(set(labels.values())) < len(labels):
        problem = "id2label is no list of different names"
    elif numbers and numbers != {label: number for number, label in labels.items()}:
        problem = "id2label and label2id contradict each other"
    else:
        return
    advice = "repair it or name another model"
    raise UserError(f"--model {name}: {problem} in its config.json; {advice}")
