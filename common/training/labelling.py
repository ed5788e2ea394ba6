"""A data set as it was read -> labelled splits: choose, validate, cut, sample.

The result is a `datasets.DatasetDict` whose splits have the columns `text` (string), `label`
(ClassLabel, one frozen list of names for all splits) and `row` (the row's number in its source,
counted from 1, so that a message or a prediction can be traced back).
"""

import re

import datasets
import numpy as np
from sklearn.model_selection import train_test_split

from common.errors import UserError
from common.reading import check_texts, kind

# the names that public data sets use, in the order in which they are looked for
SPLIT_SYNONYMS = {
    "train": ["train", "training"],
    "validation": ["validation", "valid", "val", "dev"],
    "test": ["test"],
}
CUT_SHARE = 0.1  # of the source's training rows, for each split that is missing


def choose_splits(found: datasets.DatasetDict, wanted: dict[str, str | None]) -> datasets.DatasetDict:
    """Return the splits under the names `train`, `validation` and `test`; one that is neither
    named nor there is left out.

    `wanted` gives the source's name for each, or None to look for the usual ones. Raises UserError
    for a name that is not there.
    """
    chosen = {}
    for split, name in wanted.items():
        candidates = [name] if name else SPLIT_SYNONYMS[split]
        present = next((candidate for candidate in candidates if candidate in found), None)
        if present:
            chosen[split] = found[present]
        elif name or split == "train":
            raise UserError(
                f"--{split}-split {candidates[0]}: no such split; there is {', '.join(map(str, found))}; name"
                " one of these"
            )
    return datasets.DatasetDict(chosen)


def validate(
    splits: datasets.DatasetDict, *, text_column: str, label_column: str, names: list[str] | None = None
) -> datasets.DatasetDict:
    """Return the splits with the columns `text`, `label` and `row`, after checking every row.

    Labels may be strings, whole numbers, booleans or ClassLabel. The class names are `names`
    (those of a trained model), else those of the training split, sorted, numbers by value; those
    of ClassLabel keep their order. Raises UserError, naming split and row, for a missing column, a
    null or blank text, a missing label, a label that the training split lacks, or a training split
    with one class only.
    """
    for split, rows in splits.items():
        _check_columns(split, rows, [text_column, label_column])
        check_texts(rows, text_column, source=f"split {split}")
    labels = {split: _label_names(split, rows, label_column) for split, rows in splits.items()}
    if names is not None:
        seen, lack = set(names), "is not one of the model's classes"
    else:
        feature, seen, lack = (
            splits["train"].features[label_column],
            set(labels["train"]),
            "does not occur in the training split",
        )
        names = (
            feature.names if isinstance(feature, datasets.ClassLabel) else sorted(seen, key=_natural_order)
        )
        if len(seen) < 2:
            raise UserError(
                f"split train: every row has the label {labels['train'][0]!r}; a classifier needs at least"
                " two classes; add rows of another, or name the right column with --label-column"
            )
    for split, values in labels.items():
        unseen = next((row for row, label in enumerate(values) if label not in seen), None)
        if unseen is not None:
            raise UserError(
                f"split {split}, row {unseen + 1}: the label {values[unseen]!r} {lack} ({_listed(seen)});"
                " correct or remove the row"
            )
    return datasets.DatasetDict(
        {split: _with_labels(rows, labels[split], names, text_column) for split, rows in splits.items()}
    )


def _check_columns(split: str, rows: datasets.Dataset, columns: list[str]):
    flags = dict(zip(columns, ["--text-column", "--label-column"]))
    for column in columns:
        if column not in rows.features:
            raise UserError(
                f"split {split}: no column {column!r}; there is {', '.join(rows.column_names)}; name the"
                f" right one with {flags[column]}"
            )
    if len(rows) == 0:
        raise UserError(f"split {split}: it has no rows; choose another with --{split}-split")


def _label_names(split: str, rows: datasets.Dataset, column: str) -> list[str]:
    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        outside = [
            row for row, value in enumerate(values) if value is None or not 0 <= value < len(feature.names)
        ]
        if outside:
            raise UserError(
                f"split {split}, row {outside[0] + 1}: the label {values[outside[0]]} is not one of the"
                f" {len(feature.names)} classes; if this split has no labels, choose another with"
                f" --{split}-split"
            )
        return [feature.names[value] for value in values]
    if not re.fullmatch(r"(large_)?string|bool|u?int\d+", kind(rows, column)):
        raise UserError(
            f"split {split}: column {column!r} holds {kind(rows, column)}, but labels are strings or whole"
            " numbers; name the right one with --label-column"
        )
    missing = [row for row, value in enumerate(values) if value is None or not str(value).strip()]
    if missing:
        raise UserError(
            f"split {split}, row {missing[0] + 1}: the label in column {column!r} is missing; remove the row"
            " or fill it in"
        )
    return [str(value) for value in values]


def _listed(names) -> str:
    shown = sorted(names, key=_natural_order)
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "")


def _with_labels(
    rows: datasets.Dataset, labels: list[str], names: list[str], text_column: str
) -> datasets.Dataset:
    index = {name: number for number, name in enumerate(names)}
    result = rows.select_columns([text_column]).rename_columns(
        {text_column: "text"} if text_column != "text" else {}
    )
    result = result.cast_column("text", datasets.Value("string"))
    result = result.add_column(
        "label", [index[label] for label in labels], feature=datasets.ClassLabel(names=list(names))
    )
    return result.add_column("row", np.arange(1, len(rows) + 1))


def _natural_order(name: str):
    return (0, int(name), name) if re.fullmatch(r"-?\d{1,20}", name) else (1, 0, name)


def cut_missing_splits(splits: datasets.DatasetDict, *, seed: int) -> tuple[datasets.DatasetDict, list[str]]:
    """Cut each missing split from train: stratified, 10 % of the source's training rows, a
    function of the seed.

    Returns the three splits and the names of those that were cut. Raises UserError when a class
    has too few rows.
    """
    cut, rows = dict(splits), len(splits["train"])
    missing = [split for split in ("validation", "test") if split not in splits]
    for split in missing:
        size = max(round(rows * CUT_SHARE), splits["train"].features["label"].num_classes)
        cut["train"], cut[split] = stratified_cut(cut["train"], size, seed=seed, purpose=f"a {split} split")
    return datasets.DatasetDict({split: cut[split] for split in ("train", "validation", "test")}), missing


def stratified_cut(
    rows: datasets.Dataset, size: int, *, seed: int, purpose: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split off `size` rows with each class's share kept; both parts keep the source's order.
    Raises UserError if it can't be done.
    """
    labels = np.asarray(rows["label"][:])
    try:
        rest, part = train_test_split(
            np.arange(len(rows)), test_size=size, stratify=labels, random_state=seed
        )
    except ValueError as error:  # a class with one row, or fewer rows left than classes
        present, counts = np.unique(labels, return_counts=True)
        name = rows.features["label"].names[present[counts.argmin()]]
        raise UserError(
            f"can't cut {purpose} of {size} rows from {len(rows)} with each class in both parts: class"
            f" {name!r} has {counts.min()}; add rows of it, or give the split yourself, such as a folder with"
            " train.csv, validation.csv and test.csv"
        ) from error
    return rows.select(np.sort(rest)), rows.select(np.sort(part))


def limit(rows: datasets.Dataset, size: int | None, *, seed: int, flag: str) -> datasets.Dataset:
    """Return a stratified sample of at most `size` rows, in the source's order; all rows when
    `size` is None.

    Raises UserError, naming the `flag` that asked for it, for fewer rows than classes.
    """
    if size is None or size >= len(rows):
        return rows
    labels = np.asarray(rows["label"][:])
    num_classes = len(np.unique(labels))
    if size < num_classes:
        raise UserError(f"{flag} {size}: the rows are of {num_classes} classes; use at least {num_classes}")
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # evenly spaced: each class's share, within one row
    return rows.select(np.sort(by_class[np.arange(size) * len(rows) // size]))


def count_shared_texts(splits: datasets.DatasetDict) -> dict[str, int]:
    """Count, for each split but train, the rows whose text stands in train too: their scores say
    little about new texts.
    """
    train = set(splits["train"]["text"])
    return {
        split: sum(text in train for text in rows["text"])
        for split, rows in splits.items()
        if split != "train"
    }
