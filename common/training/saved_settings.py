"""How a model was trained, in `training.json` beside it, as far as it takes to use it and to score it
again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import model_files, reading
from common.errors import UserError
from common.files import read_json, replace_file
from common.training.labels import Label
from common.training.run import DEFAULT_TRUNCATION, JOIN, PAIR, TRUNCATIONS, is_like

SETTINGS_FILE = "training.json"
OWN_SETTING = "dataset_sha256"  # is in each of ours
# what the file holds of the settings of a run
REMEMBERED = (
    "dataset_config",
    "seed",
    "split_seed",
    "max_length",
    "eval_max_length",
    "truncation",
    "text_column",
    "text_mode",
    "join_with",
    "label_column",
    "label_separator",
    "positive_class",
    "merge_rare",
)


@dataclass(frozen=True)
class RememberedData:
    """What the file holds of the data of a run; the fields are those of `SavedSettings`."""

    baseline: Label
    cut: list[str]
    test_sha256: str | None
    rare_classes: list[str]


@dataclass(frozen=True)
class SavedSettings:
    """How a model was trained; the defaults are for one that this script did not train."""

    dataset_sha256: str | None = None  # of the data set's name
    seed: int | None = None
    split_seed: int | None = None
    truncation: str = DEFAULT_TRUNCATION
    text_mode: str | None = None
    join_with: str = " "
    text_column: str | None = None  # or several, which text_mode tells
    label_column: str | None = None
    label_separator: str | None = None
    positive_class: str | None = None
    thresholds: Sequence[float] = ()  # one per label
    temperature: float = 1.0  # by which logits are divided; not 1 if the model was calibrated
    cut: Sequence[str] = ()  # splits that were cut from the training split
    test_sha256: str | None = None  # of the texts of the test split, if it was cut
    baseline: Label | None = None  # the answer of a baseline, such as the most frequent class
    rare_classes: Sequence[str] = ()  # that were left out of the training, or made one class:
    merge_rare: str | None = None  # its name

    @property
    def is_ours(self) -> bool:
        """Whether this script has trained the model, and so the settings are known."""
        return self.dataset_sha256 is not None


def settings_to_save(settings: dict, data: RememberedData, thresholds: list[float] | None) -> dict:
    """Return what is remembered of a run's settings and data, and the thresholds of labels.

    The path of the data set is nobody else's business: a SHA-256 of its name stands for it.
    """
    remembered = {OWN_SETTING: name_sha256(settings["dataset"])}
    remembered |= {name: settings[name] for name in REMEMBERED} | dataclasses.asdict(data)
    return remembered if thresholds is None else {**remembered, "thresholds": thresholds}


def save_temperature(folder: Path, temperature: float) -> None:
    """Add a temperature to a saved model, and move its thresholds so that its answers stay the same.

    Its settings become a new file: the old one may have a second name in a checkpoint.
    """
    from common.training.calibration import moved_thresholds

    settings = read_json(folder / SETTINGS_FILE)
    if "thresholds" in settings:
        settings["thresholds"] = moved_thresholds(settings["thresholds"], temperature)
    settings["temperature"] = temperature
    replace_file(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")


def read_settings(folder: Path, name: str) -> SavedSettings:
    """Return how the model in a folder was trained. Raises UserError, naming the model, when the file
    is damaged: the model would be scored in another way than before.
    """
    path = folder / SETTINGS_FILE
    settings = model_files.read_json(path, f"--model {name}") if path.is_file() else {}
    if OWN_SETTING not in settings:  # on the Hub, others may call a file of theirs so
        return SavedSettings()
    own = [field.name for field in dataclasses.fields(SavedSettings) if field.name in settings]
    saved = SavedSettings(**{setting: settings[setting] for setting in own})
    is_usable = {
        "truncation": settings.get("truncation") in TRUNCATIONS,
        "seed": _is_seed(saved.seed),
        "split_seed": saved.split_seed is None or _is_seed(saved.split_seed),
        "text_mode": saved.text_mode in (None, PAIR, JOIN),
        "join_with": isinstance(saved.join_with, str),
        "text_column": isinstance(saved.text_column, str | None),
        "label_column": isinstance(saved.label_column, str | None),
        "label_separator": isinstance(saved.label_separator, str | None),
        "thresholds": isinstance(saved.thresholds, list | tuple)
        and all(is_like(value, 0.5) and 0 <= value <= 1 for value in saved.thresholds),
        "temperature": is_like(saved.temperature, 1.0) and saved.temperature > 0,
        "cut": saved.cut in ((), [], ["validation"], ["test"], ["validation", "test"]),
        "rare_classes": isinstance(saved.rare_classes, list | tuple)
        and all(isinstance(name, str) for name in saved.rare_classes),
        "merge_rare": isinstance(saved.merge_rare, str | None),
    }
    for setting, usable in is_usable.items():
        if not usable:
            raise UserError(
                f"--model {name}: {path} has no usable {setting} ({settings.get(setting)!r:.40});"
                " copy it from the run once more"
            )
    return saved


def _is_seed(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32


def name_sha256(name: str) -> str:
    """Return the SHA-256 of a data set's full name, in hexadecimal.

    It tells whether another name is the same without giving the name away.
    """
    return hashlib.sha256(reading.full_name(name).encode()).hexdigest()
