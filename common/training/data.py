"""Read a data set as labelled splits, and turn their texts into chunks of tokens.

A labelled split has the columns `text` (string), `label` (its type tells the task, the same
for all splits: common/training/task.py) and `row` (the number of the row in its source,
counted from 1, so that a message or a prediction can be traced back). A text longer than the
model reads becomes one or more chunks of tokens (`--truncation`). In this code,
`rows[name][:]` is a whole column as a list.

`datasets` and scikit-learn, which take a second to import, are imported by the functions that need
them: `encode` does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from common import reading
from common.errors import Fault, UserError, listed, quoted
from common.files import replace_file, sha256
from common.runtime import Runtime
from common.sources import INVISIBLE, FileOptions, note
from common.training.faults import clean, has_labels, note_faults, text_problems, without_rare
from common.training.labels import (
    WHOLE,
    Label,
    LabelConfig,
    are_few,
    find_kind,
    label_names,
    natural_order,
    read_labels,
    split_columns,
    without_decimals,
)
from common.training.run import JOIN, MULTI, REGRESSION, SINGLE
from common.training.task import DESCRIPTIONS, Task, task_of_rows

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from common.tokenizer import Tokenizer

# the names that public data sets use, in the order in which they are tried
SPLIT_SYNONYMS = {
    "train": ["train", "training"],
    "validation": ["validation", "valid", "val", "dev"],
    "test": ["test"],
}
Splits: TypeAlias = "dict[str, datasets.Dataset]"
CUT_SHARE = 0.1  # of the source's training rows, for each split that is missing
# share of a chunk with head-tail: 128 of 510 tokens was best on IMDb (Sun et al. 2019, "How to
# Fine-Tune BERT for Text Classification?")
HEAD_SHARE = 0.25
# least share of a chunk that the chunk before it holds too, so that what one of them cuts apart is
# whole in the other
OVERLAP = 0.25
# no more digits than floats have
NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d{0,15})?(e[+-]?\d{1,2})?")
# special tokens that tell a model where a text begins, ends or is padding
MARKS = ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token")
FORMAT = 2  # of the cached Arrow files; counts up when their columns change


@dataclass(frozen=True)
class TextConfig:
    """Which columns hold the texts; the fields are named as their flags."""

    text_column: str = "text"  # or several, separated by commas
    text_mode: str | None = None  # of several: PAIR, two texts that are read together; or JOIN
    join_with: str = " "

    @property
    def columns(self) -> list[str]:
        """The columns of the texts."""
        return split_columns(self.text_column)


@dataclass(frozen=True)
class DataConfig:
    """Which texts and labels to read, and at most how many; the fields are named as their flags."""

    dataset: str
    validation_file: str | None  # in place of the data set's own split
    test_file: str | None
    dataset_config: str | None
    dataset_revision: str | None
    train_split: str | None
    validation_split: str | None
    test_split: str | None
    max_train_samples: int | None
    max_eval_samples: int | None
    seed: int
    cache_dir: str | None
    skip_bad: bool  # rows that can't be used are left out
    drop_rare: int | None
    merge_rare: str | None
    files: FileOptions  # how data files are written
    texts: TextConfig
    labels: LabelConfig

    @property
    def columns(self) -> list[str]:
        """The columns of texts and labels, which stay as they are written."""
        return [*self.texts.columns, *self.labels.columns]


@dataclass
class DataNotes:
    """What a data set holds beside the splits that are trained and scored."""

    faults: list[Fault] = field(default_factory=list)  # rows that can't be used
    unlabelled: datasets.Dataset | None = None  # a test split without labels: its texts and `row`
    uncut: Splits = field(default_factory=dict)  # before splits are cut and rare classes left out
    unused: list[str] = field(default_factory=list)  # splits of the source that nothing asks for
    rare: list[str] = field(default_factory=list)  # classes that are left out or merged
    cut: list[str] = field(default_factory=list)  # splits that had to be cut from train


@dataclass(frozen=True)
class TokenConfig:
    """How many tokens the model reads at once, and which part of a longer text."""

    max_length: int  # tokens of a chunk in training
    eval_max_length: int  # in evaluation and prediction
    truncation: str
    # special tokens that a text holds, such as </s>, are read as the unknown token
    hides_special: bool = False

    def length_of(self, split: str) -> int:
        """Return the number of tokens at which a split is truncated."""
        return self.max_length if split == "train" else self.eval_max_length


# Labelled splits ----------------------------------------------------------------------------------


def load_splits(config: DataConfig, runtime: Runtime, notes: DataNotes | None = None) -> Splits:
    """Return the labelled splits train, validation and test, and print where they come from.

    What else there is, such as the rows that --skip-bad leaves out, is put into `notes`. Raises
    UserError as `validate` does.
    """
    notes = DataNotes() if notes is None else notes
    faults = notes.faults if config.skip_bad else None
    wanted = {"train": config.train_split, "validation": config.validation_split}
    wanted["test"] = config.test_split
    source = _read_source(config, faults)
    splits = choose_splits(source, wanted)
    used = [id(rows) for rows in splits.values()]
    notes.unused = [str(name) for name, rows in source.items() if id(rows) not in used]
    splits |= _read_split_files(config, faults)
    if "test" in splits and not has_labels(splits["test"], config.labels):
        notes.unlabelled = _unlabelled(splits.pop("test"), config.texts, faults)
    labels = config.labels
    if faults is not None:
        _check_names(splits, config.texts, config.labels)
        splits, labels = clean(splits, config.texts, config.labels, faults, None)
    splits = notes.uncut = validate(splits, config.texts, labels)
    if config.drop_rare is not None or config.merge_rare is not None:
        splits, notes.rare = without_rare(splits, config.drop_rare, config.merge_rare)
    splits, notes.cut = cut_missing_splits(splits, seed=config.seed)
    limits = {"train": config.max_train_samples}
    limits |= dict.fromkeys(("validation", "test"), config.max_eval_samples)
    for split, size in limits.items():
        flag = "--max-train-samples" if split == "train" else "--max-eval-samples"
        splits[split] = sample(splits[split], size, seed=config.seed, flag=flag)
    runtime.say(describe_splits(splits, config, notes))
    return splits


def describe_splits(splits: Splits, config: DataConfig, notes: DataNotes) -> str:
    """Return what was read in some lines: sizes, task, and whatever a reader should know."""
    sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items())
    task = task_of_rows(splits["train"])
    how = _how_it_was_found(splits["train"], task) if config.labels.task == "auto" else ""
    about = []
    if notes.unused:
        advice = "name one with --train-split, --validation-split or --test-split to use it"
        about.append(f"not used: {listed(notes.unused)}; {advice}")
    for names in near_equal_names(task.names):
        alike = " and ".join(map(quoted, names))
        about.append(f"{alike} are different classes; if one is meant, correct the labels")
    if notes.faults:
        about.append(f"{len(notes.faults):,} rows can't be used and are left out")
    if notes.unlabelled is not None:
        about.append("the test split has no labels: it is predicted, and not scored")
    if notes.rare:
        into = "left out" if config.merge_rare is None else f"one class {quoted(config.merge_rare)}"
        about.append(f"rare classes, {into}: {listed(notes.rare)}")
    if notes.cut:
        names = " and ".join(notes.cut)
        about.append(f"{names} cut from train: 10 % each, stratified, with seed {config.seed}")
    for split, count in count_shared_texts(splits).items():
        if count:
            says_little = "also occur in train: their scores say little about new texts"
            about.append(f"{count:,} of the {split} texts {says_little}")
    lines = [
        f"data     {config.dataset}: {sizes} texts, {task.counted()}",
        f"task     {task.kind}: {DESCRIPTIONS[task.kind]}{how}",
        *(f"         {line}" for line in about),
    ]
    return "\n".join(lines)


def _how_it_was_found(rows: datasets.Dataset, task: Task) -> str:
    """Return why `--task auto` took the labels of training rows for those of a task, and what says
    otherwise.
    """
    if task.kind == REGRESSION and len(task.names) == 1:
        [name] = task.names
        if are_few([cell[name] for cell in rows["label"][:]]):
            return ", because the labels have decimals; --task single makes classes of them"
    return ", found from the labels; --task chooses another"


def _unlabelled(rows: datasets.Dataset, texts: TextConfig, faults: list[Fault] | None) -> datasets.Dataset:
    """Return the texts of a split without labels; those that can't be used become faults."""
    source = "split test"
    if faults is None:
        _check_texts(rows, texts, source)
    else:
        for column in texts.columns:
            reading.require_column(rows.column_names, column, source=source, flag="--text-column")
        problems = list(text_problems(rows, texts))
        note_faults(source, rows, problems, texts.columns, faults)
        good = [number for number, problem in enumerate(problems) if not problem]
        rows = _take(rows, np.array(good, np.int64))
    return _as_dataset(_with_texts(rows, texts).add_column("row", _row_numbers(rows)))


def load_rows_for_scoring(
    config: DataConfig, task: Task, trained: dict, runtime: Runtime
) -> datasets.Dataset:
    """Return the rows on which to score a saved model that was trained for `task`.

    These are the test split, or all rows of a data set without one. `trained` holds the settings
    that the model was saved with: if the data set is the one that it was trained on, the same test
    split is cut again. Raises UserError when the seed would cut another one, most of whose rows the
    model was trained on.
    """
    faults: list[Fault] | None = [] if config.skip_bad else None
    splits = _read_split_files(dataclasses.replace(config, validation_file=None), faults)
    if not splits:
        source = _read_source(config, faults)
        splits = choose_splits(source, {"test": config.test_split})
        if not splits:
            wanted = {"train": config.train_split, "validation": config.validation_split}
            splits = choose_splits(source, wanted)
    if "test" in splits and not has_labels(splits["test"], config.labels):
        problem = "it has no labels to compare with"
        raise UserError(f"split test: {problem}; --predict answers for its texts")
    if faults is not None:
        _check_names(splits, config.texts, config.labels)
        splits, _ = clean(splits, config.texts, config.labels, faults, task)
        runtime.say(f"skipped  {len(faults):,} rows that can't be used")
    splits = validate(splits, config.texts, config.labels, trained=task)
    if "test" not in splits and name_sha256(config.dataset) == trained.get("dataset_sha256"):
        flag = "--seed" if trained.get("split_seed") is None else "--split-seed"
        seed = trained["seed"] if flag == "--seed" else trained["split_seed"]
        if seed != config.seed:
            problem = f"the model was trained with {flag} {seed}, which cuts a different test split"
            raise UserError(f"{flag} {config.seed}: {problem}; use that seed")
        splits, _ = cut_missing_splits(splits, seed=config.seed)
    split = "test" if "test" in splits else "train"
    size = config.max_eval_samples
    rows = sample(splits[split], size, seed=config.seed, flag="--max-eval-samples")
    name = config.test_file or config.dataset
    runtime.say(f"data     {name}: {len(rows):,} texts of its {split} split")
    return rows


def _read_source(config: DataConfig, faults: list[Fault] | None) -> datasets.DatasetDict:
    return reading.read(
        config.dataset,
        as_text=config.columns,
        options=config.files,
        config=config.dataset_config,
        revision=config.dataset_revision,
        cache_dir=config.cache_dir,
        faults=faults,
    )


def _read_split_files(config: DataConfig, faults: list[Fault] | None) -> Splits:
    """Return the splits that have a file of their own."""
    files = {"validation": config.validation_file, "test": config.test_file}
    return {
        split: reading.read_file(
            Path(file),
            as_text=config.columns,
            options=config.files,
            cache_dir=config.cache_dir,
            faults=faults,
        )
        for split, file in files.items()
        if file is not None
    }


def name_sha256(name: str) -> str:
    """Return the SHA-256 of a data set's full name, in hexadecimal.

    It tells whether another name is the same without giving the name away.
    """
    return hashlib.sha256(reading.full_name(name).encode()).hexdigest()


def choose_splits(source: datasets.DatasetDict, wanted: dict[str, str | None]) -> Splits:
    """Return the wanted splits under the names `train`, `validation` and `test`.

    `wanted` maps each of them to its name in the source, or to None to try the usual names. A split
    that is neither named nor in the source is left out. Raises UserError for a name that is not in
    the source, and when there is no training split.
    """
    chosen: Splits = {}
    known = {str(split).lower(): split for split in source}
    for split, name in wanted.items():
        candidates = [name] if name else SPLIT_SYNONYMS[split]
        present = next((candidate for candidate in candidates if candidate in source), None)
        if not name and present is None:  # Train.csv
            present = next((known[one] for one in candidates if one in known), None)
        if present:
            chosen[split] = source[present]
        elif name or split == "train":
            available = ", ".join(map(str, source))
            raise UserError(
                f"--{split}-split {candidates[0]}: no such split; the data set has {available};"
                " name one of these"
            )
    return chosen


def validate(
    splits: Splits,
    texts: TextConfig = TextConfig(),  # noqa: B008  (frozen)
    labels: LabelConfig = LabelConfig(),  # noqa: B008
    *,
    trained: Task | None = None,
) -> Splits:
    """Return the splits with the columns `text`, `label` and `row`, and with pairs
    `text_pair`, after checking every row.

    The type of the column `label` tells the task (`task_of_rows`). It and its names are those of a
    `trained` model if given; else they follow from the labels of the training split. Raises
    UserError, naming split and row, for a missing column, a null or blank text, a missing label, a
    label that is not one of the task's, and a training split with only one class.
    """
    _check_names(splits, texts, labels)
    for split, rows in splits.items():
        _check_texts(rows, texts, f"split {split}")
        for column in labels.columns:
            cells = rows.with_format("arrow")[column]
            reading.check_characters(cells, f"split {split}, row", first=1)
    kind = find_kind(splits["train"], labels) if trained is None else trained.kind
    if trained is not None:
        _require_same_task(trained, labels)
    read = {split: read_labels(split, rows, kind, labels) for split, rows in splits.items()}
    if trained is None:
        if kind == SINGLE and all(map(WHOLE.fullmatch, read["train"])):
            read["train"] = list(map(without_decimals, read["train"]))
        names = label_names(splits["train"], kind, read["train"], labels)
        task, complaint = Task(kind, tuple(names)), "does not occur in the training split"
    else:
        task, complaint = trained, "is not one of the model's classes"
        read = {split: _in_order(values, task, labels) for split, values in read.items()}
    read = {split: _known_labels(split, values, task, complaint) for split, values in read.items()}
    return {split: _with_labels(rows, read[split], task, texts) for split, rows in splits.items()}


def _require_same_task(trained: Task, labels: LabelConfig) -> None:
    """Raise UserError unless the labels are for the task that a model was trained for."""
    if labels.task not in ("auto", trained.kind):
        raise UserError(
            f"--task {labels.task}: the model was trained for --task {trained.kind}; leave the flag"
            " out, or name another model"
        )
    columns, known = labels.columns, set(trained.names)
    is_by_column = trained.kind == MULTI and len(columns) > 1
    if is_by_column and set(columns) != known:
        raise UserError(
            f"--label-column {labels.label_column}: the model's labels are {listed(trained.names)};"
            " name a column for each"
        )


def _in_order(values: list[Label], task: Task, labels: LabelConfig) -> list[Label]:
    """Return labels as a trained model orders them. Numbers are those of columns with the names of
    its outputs; if there are others, of as many columns in their order.

    Raises UserError for another count of numbers than the model answers.
    """
    if task.kind != REGRESSION:
        return values
    if len(values[0]) != len(task.names):
        raise UserError(
            f"--label-column {labels.label_column}: {len(values[0])} numbers a row, and the model"
            f" answers {len(task.names)}: {listed(task.names)}; name a column for each"
        )
    if sorted(labels.columns) != sorted(task.names):
        return values
    order = [labels.columns.index(name) for name in task.names]
    return [[numbers[position] for position in order] for numbers in values]


def _known_labels(split: str, values: list[Label], task: Task, complaint: str) -> list[Label]:
    """Return labels as the task names them; raise UserError, naming the row, for an unknown one."""
    if task.kind == REGRESSION:
        return values
    known = set(task.names)

    def known_name(row: int, label: str) -> str:
        name = label if label in known else without_decimals(label)
        if name in known:
            return name
        raise UserError(
            f"split {split}, row {row}: the label {quoted(name)} {complaint}"
            f" ({listed(sorted(known, key=natural_order), most=10)}); correct or remove the row"
        )

    if task.kind == SINGLE:
        return [known_name(row, label) for row, label in enumerate(values, start=1)]
    numbered = enumerate(values, start=1)
    return [[known_name(row, label) for label in names] for row, names in numbered]


def near_equal_names(names: Sequence[str]) -> list[list[str]]:
    """Return the groups of class names that differ only in capital letters, spaces, characters that
    can't be seen, the way in which Unicode writes a character, or in which a number is written.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        seen = "".join(
            character
            for character in unicodedata.normalize("NFKC", name)
            if character.isspace() or unicodedata.category(character) not in INVISIBLE
        )
        alike = " ".join(seen.casefold().split())
        if NUMBER.fullmatch(alike):
            alike = str(float(alike) + 0.0)  # not -0.0
        groups.setdefault(re.sub(r"^0+(?=\d)", "", alike), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _check_names(splits: Splits, texts: TextConfig, labels: LabelConfig) -> None:
    """Raise UserError unless the columns of texts and labels are there, and none is both."""
    both = [column for column in texts.columns if column in labels.columns]
    if both:
        raise UserError(
            f"--text-column {both[0]}: --label-column names the same column; a text can't be its"
            " own label, so name two columns"
        )
    for split, rows in splits.items():
        source, known = f"split {split}", rows.column_names
        for flag, columns in (("--text-column", texts.columns), ("--label-column", labels.columns)):
            for column in columns:
                reading.require_column(known, column, source=source, flag=flag)
        if len(rows) == 0:
            raise UserError(f"split {split}: it has no rows; choose another with --{split}-split")


def _check_texts(rows: datasets.Dataset, texts: TextConfig, source: str) -> None:
    """Raise UserError, naming `source` and row, unless each row has its text, or both of a pair."""
    for column in texts.columns:
        reading.require_column(rows.column_names, column, source=source, flag="--text-column")
    if texts.text_mode != JOIN:
        for column in texts.columns:
            reading.check_texts(rows, column, source=source)
        return
    for column in texts.columns:
        reading.check_kind(rows, column, source=source)
        reading.check_characters(rows.with_format("arrow")[column], f"{source}, row", first=1)
    joined = _with_texts(rows, texts).rename_column("text", texts.text_column)
    reading.check_texts(joined, texts.text_column, source=source)


def _with_texts(rows: datasets.Dataset, texts: TextConfig) -> datasets.Dataset:
    """Return only the texts of rows: the column `text`, and of pairs `text_pair`."""
    import datasets

    if texts.text_mode == JOIN:
        joined = reading.join_cells([rows[column][:] for column in texts.columns], texts.join_with)
        return datasets.Dataset.from_dict({"text": joined})
    result = rows.select_columns(texts.columns)
    result = result.rename_columns(dict(zip(texts.columns, ("text", "text_pair"))))
    for column in result.column_names:
        result = result.cast_column(column, datasets.Value("string"))
    return _as_dataset(result)


def _with_labels(
    rows: datasets.Dataset, labels: list[Label], task: Task, texts: TextConfig
) -> datasets.Dataset:
    result = _with_texts(rows, texts)
    result = _as_dataset(result.add_column("label", task.cells(labels), feature=task.feature()))
    return _as_dataset(result.add_column("row", _row_numbers(rows)))


def _row_numbers(rows: datasets.Dataset) -> np.ndarray:
    """Return the number of each row (N): from 1, or as in its file where bad rows were left out."""
    has_numbers = reading.ROW in rows.column_names
    return np.asarray(rows[reading.ROW][:]) if has_numbers else np.arange(1, len(rows) + 1)


def cut_missing_splits(splits: Splits, *, seed: int) -> tuple[Splits, list[str]]:
    """Return the three splits, and the names of those that had to be cut from the training split.

    Each missing split gets 10 % of the source's training rows, stratified; which ones depends on
    the seed alone. Raises UserError when a class has too few rows.
    """
    cut, num_rows = dict(splits), len(splits["train"])
    missing = [split for split in ("validation", "test") if split not in splits]
    for split in missing:
        task = task_of_rows(splits["train"])
        size = max(round(num_rows * CUT_SHARE), len(task.names) if task.kind == SINGLE else 1)
        purpose = f"a {split} split"
        cut["train"], cut[split] = stratified_cut(cut["train"], size, seed=seed, purpose=purpose)
    return {split: cut[split] for split in ("train", "validation", "test")}, missing


def stratified_cut(
    rows: datasets.Dataset, size: int, *, seed: int, purpose: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return the rows in two parts, the second of `size` rows, with the same shares of classes.

    Rows with several labels, or with numbers, are drawn evenly from all of them in the order of
    `strata`. Both parts keep the order of the source. Raises UserError, naming the `purpose`, when
    a class has too few rows.
    """
    from sklearn.model_selection import train_test_split

    if task_of_rows(rows).kind != SINGLE:
        if len(rows) < 2 * size:
            raise UserError(
                f"can't cut {purpose} of {size} rows from {len(rows)}; add rows, or supply the"
                " split, for example as a folder with train.csv, validation.csv and test.csv"
            )
        is_part = np.zeros(len(rows), bool)
        is_part[_one_of_each_stretch(strata(rows), size, seed=seed)] = True
        return _take(rows, np.flatnonzero(~is_part)), _take(rows, np.flatnonzero(is_part))
    labels = np.asarray(rows["label"][:])
    try:
        rest, part = train_test_split(
            np.arange(len(rows)), test_size=size, stratify=labels, random_state=seed
        )
    except ValueError as error:  # a class with one row, or fewer rows left than classes
        present, counts = np.unique(labels, return_counts=True)
        name = rows.features["label"].names[present[counts.argmin()]]
        raise UserError(
            f"can't cut {purpose} of {size} rows from {len(rows)} with every class in both parts:"
            f" class {quoted(name)} has {counts.min()}; add rows of it, or supply the split, for"
            " example as a folder with train.csv, validation.csv and test.csv"
        ) from error
    return _take(rows, rest), _take(rows, part)


def sample(rows: datasets.Dataset, size: int | None, *, seed: int, flag: str) -> datasets.Dataset:
    """Return a stratified sample of at most `size` rows, in the order of the source.

    With `size` None all rows are returned. Raises UserError, naming the `flag` that set the size,
    when there are more classes than rows to take.
    """
    if size is None or size >= len(rows):
        return rows
    labels = strata(rows)
    if task_of_rows(rows).kind != SINGLE:
        return _take(rows, _one_of_each_stretch(labels, size, seed=seed))
    num_classes = len(np.unique(labels))
    if size < num_classes:
        problem = f"the rows have {num_classes} classes"
        raise UserError(f"{flag} {size}: {problem}; use at least {num_classes}")
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # evenly spaced over the classes: each has its share, within one row
    return _take(rows, by_class[reading.evenly_spaced(len(rows), size)])


def strata(rows: datasets.Dataset) -> np.ndarray:
    """Return a number for each row (N), in whose order rows with like labels are together: that of
    its class, or of its rarest label, so that this one is shared out evenly; or its first number.
    """
    task, cells = task_of_rows(rows), rows["label"][:]
    if task.kind == SINGLE:
        return np.asarray(cells)
    if task.kind == REGRESSION:
        return np.asarray([cell[task.names[0]] for cell in cells])
    counts = np.bincount([number for cell in cells for number in cell], minlength=len(task.names))
    last = len(counts)  # where those without any label come
    return np.asarray([min(cell, key=counts.__getitem__, default=last) for cell in cells])


def _one_of_each_stretch(strata: np.ndarray, size: int, *, seed: int) -> np.ndarray:
    """Return `size` row numbers: of the rows in the order of `strata` (N), cut into as many equal
    stretches, one drawn from each.
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(strata))
    order = shuffled[np.argsort(strata[shuffled], kind="stable")]
    ends = np.arange(size + 1) * len(strata) // size
    return order[generator.integers(ends[:-1], ends[1:])]


def _take(rows: datasets.Dataset, numbers: np.ndarray) -> datasets.Dataset:
    """Return the rows with these numbers, in the order of the source."""
    return _as_dataset(rows.select(np.sort(numbers)))


def _as_dataset(rows: datasets.Dataset | datasets.DatasetDict) -> datasets.Dataset:
    """Return the rows; the library's types leave open which of the two its methods return."""
    import datasets

    assert isinstance(rows, datasets.Dataset)
    return rows


def count_shared_texts(splits: Splits) -> dict[str, int]:
    """Return, for each split but train, how many of its rows have a text that is in train too.

    The scores of such rows say little about new texts.
    """
    train = set(texts_of(splits["train"]))
    return {
        split: sum(text in train for text in texts_of(rows))
        for split, rows in splits.items()
        if split != "train"
    }


def describe_marks(
    splits: Splits, tokenizer: PreTrainedTokenizerBase | Tokenizer, tokens: TokenConfig
) -> str:
    """Return a line on the texts that hold tokens with which the tokenizer marks beginnings, ends
    and padding, and what becomes of these; "" if there are none.
    """
    marks = [token for role, token in tokenizer.special_tokens_map.items() if role in MARKS]
    occurrences = [
        (split, row, mark)
        for split, rows in splits.items()
        for column in ("text", "text_pair")
        if column in rows.column_names
        for row, text in zip(rows["row"][:], rows[column][:])
        for mark in marks
        if mark in text
    ]
    if not occurrences:
        return ""
    count, (split, row, mark) = len({place[:2] for place in occurrences}), occurrences[0]
    texts = "1 text holds a mark" if count == 1 else f"{count:,} texts hold marks"
    becomes = "it is read as that"
    if tokens.hides_special:
        becomes = "the unknown token is read in its place"
    return f"{texts} of the tokenizer, as {quoted(mark)} in {split} row {row}: {becomes}"


def texts_of(rows: datasets.Dataset) -> list[str] | list[tuple[str, str]]:
    """Return the text of each row (N), or both texts of a pair."""
    if "text_pair" in rows.column_names:
        return list(zip(rows["text"][:], rows["text_pair"][:]))
    return rows["text"][:]


# Chunks of tokens ---------------------------------------------------------------------------------


def cut_chunks(num_tokens: int, size: int, truncation: str) -> list[np.ndarray]:
    """Return the chunks of a text of `num_tokens` tokens as arrays of at most `size` positions.

    `head` and `tail` read one end of the text, `head-tail` both; `chunks` reads everything, in
    chunks of equal size that overlap.
    """
    positions = np.arange(num_tokens)
    if num_tokens <= size:
        return [positions]
    if truncation == "head":
        return [positions[:size]]
    if truncation == "tail":
        return [positions[-size:]]
    if truncation == "head-tail":
        head = round(size * HEAD_SHARE)
        tail = size - head
        return [np.concatenate([positions[:head], positions[-tail:]])]
    # as few chunks as overlap enough, evenly spaced from the beginning of the text to its end
    overlap = min(math.ceil(size * OVERLAP), size - 1)
    last_start = num_tokens - size
    count = math.ceil(last_start / (size - overlap)) + 1
    starts = np.linspace(0, last_start, count).round().astype(int)
    return [positions[start : start + size] for start in starts]


def cut_pair(first: int, second: int, size: int, truncation: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the chunks of a pair of texts of so many tokens, together at most `size`: the
    positions in each of the two.

    The longer text is cut first, until both are equally long. With `chunks`, the longer one is read
    in chunks, each beside the shorter text, of which at most half a chunk is read.
    """
    shorter, longer = min(first, second), max(first, second)
    if first + second <= size:
        kept, pieces = np.arange(shorter), [np.arange(longer)]
    elif truncation == "chunks":
        kept = np.arange(min(shorter, size // 2))
        pieces = cut_chunks(longer, size - len(kept), truncation)
    else:
        room = min(shorter, size // 2)
        kept = cut_chunks(shorter, room, truncation)[0]
        pieces = cut_chunks(longer, size - room, truncation)
    return [(kept, piece) if first <= second else (piece, kept) for piece in pieces]


def encode(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase | Tokenizer,
    *,
    max_length: int,
    truncation: str,
    pairs: list[str] | None = None,
    hides_special: bool = False,
) -> dict[str, list]:
    """Return the columns of tokenised texts, of each with its second one where there are `pairs`:
    `input_ids`, and whatever else the model takes.

    Each cell is a list of chunks. A chunk stands between the special tokens and has at most
    `max_length` tokens including them. Three more columns count tokens, special tokens included:
    `chunk_lengths`; `num_tokens`, the length of the whole text; and `num_read`, how many of these
    are in any chunk. With `hides_special`, what a text holds of the tokens that mark beginnings,
    ends and padding becomes the unknown token.
    """
    options: dict[str, Any] = {"truncation": False, "padding": False, "verbose": False}
    encoded = tokenizer(texts, text_pair=pairs, return_special_tokens_mask=True, **options)
    # the collator makes the attention mask
    names = [name for name in encoded if name not in ("attention_mask", "special_tokens_mask")]
    counts = ("chunk_lengths", "num_tokens", "num_read")
    columns: dict[str, list] = {name: [] for name in (*names, *counts)}
    if hides_special:
        _hide_special(encoded["input_ids"], encoded["special_tokens_mask"], tokenizer)
    for number, mask in enumerate(encoded["special_tokens_mask"]):
        if pairs is not None:
            chunks = _chunks_of_pair(encoded.sequence_ids(number), max_length, truncation)
        else:
            chunks = _chunks_of_text(mask, max_length, truncation)
        for name in names:
            values = np.asarray(encoded[name][number])
            columns[name].append([values[chunk].tolist() for chunk in chunks])
        columns["chunk_lengths"].append([len(chunk) for chunk in chunks])
        columns["num_tokens"].append(len(mask))
        columns["num_read"].append(len(np.unique(np.concatenate(chunks))))
    return columns


def _hide_special(
    ids: list[list[int]], masks: list[list[int]], tokenizer: PreTrainedTokenizerBase | Tokenizer
) -> None:
    """Put the unknown token in the place of marks within texts, given their ids and which of these
    are around them. Without an unknown token that is no mark itself, they stay.
    """
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
    roles = tokenizer.special_tokens_map
    unknown = special.get(roles.get("unk_token", ""))
    marks = {special[token] for role, token in roles.items() if role in MARKS and token in special}
    if unknown is None or unknown in marks:
        return
    for text, mask in zip(ids, masks):
        if not marks.isdisjoint(text):
            for position, (token, is_around) in enumerate(zip(text, mask)):
                if token in marks and not is_around:
                    text[position] = unknown


def _chunks_of_text(mask: list[int], max_length: int, truncation: str) -> list[np.ndarray]:
    """Return the positions of each chunk's tokens in a text, given which tokens are special."""
    # positions: the text from `first` up to `last`, special tokens before and after it
    words = np.flatnonzero(np.asarray(mask) == 0)
    first, last = (words[0], words[-1] + 1) if len(words) else (len(mask), len(mask))
    before, after = np.arange(first), np.arange(last, len(mask))
    cut = cut_chunks(last - first, max_length - len(before) - len(after), truncation)
    return [np.concatenate([before, first + positions, after]) for positions in cut]


def _chunks_of_pair(sequence_ids: list[int | None], max_length: int, truncation: str) -> list[np.ndarray]:
    """Return the positions of the tokens of each chunk of a pair, given which text each is of."""
    texts = np.array([-1 if text is None else text for text in sequence_ids])
    special, first, second = (np.flatnonzero(texts == text) for text in (-1, 0, 1))
    cut = cut_pair(len(first), len(second), max_length - len(special), truncation)
    # the tokens of a chunk keep their order, with the special ones around and between them
    return [np.sort(np.concatenate([special, first[one], second[other]])) for one, other in cut]


def tokenize(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: str,
    cache_dir: str | None,
    hides_special: bool = False,
) -> datasets.Dataset:
    """Return the rows with the columns of `encode`.

    The result is cached as a memory-mapped Arrow file under the SHA-256 of all that it depends on,
    its fingerprint too, and the version of `datasets`: one may not read what another wrote.
    """
    import datasets

    what_it_does = f"{tokenizer_json(tokenizer)} {max_length} {truncation} {HEAD_SHARE} {OVERLAP}"
    what_it_does += f" {MARKS}" if hides_special else ""
    key = _sha256_of_rows(rows, what_it_does)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "tokenized"
    folder.mkdir(parents=True, exist_ok=True)
    cached = folder / f"{key}-{FORMAT}-{datasets.__version__}.arrow"
    _remove_if_damaged(cached)
    tokenized = rows.map(
        lambda batch: encode(
            batch["text"],
            tokenizer,
            max_length=max_length,
            truncation=truncation,
            pairs=batch["text_pair"] if "text_pair" in rows.column_names else None,
            hides_special=hides_special,
        ),
        batched=True,
        desc="tokenising",
        cache_file_name=str(cached),
        new_fingerprint=key[:16],  # as long as those of `datasets`
    )
    if not _proof_of(cached).exists():
        replace_file(_proof_of(cached), f"{sha256(cached)}\n")
    return _as_dataset(tokenized)


def _sha256_of_rows(rows: datasets.Dataset, what_is_done: str) -> str:
    """Return the SHA-256 of rows, and of what is done to them, in hexadecimal."""
    digest = hashlib.sha256(what_is_done.encode())
    # the values of a label are numbers: its names are what they mean
    for feature in rows.features.values():
        digest.update(f"{feature}\0".encode())
    for name in rows.column_names:  # labels and row numbers are in the file as well
        for value in rows[name][:]:
            digest.update(f"{value}\0".encode())
    return digest.hexdigest()


def _proof_of(cached: Path) -> Path:
    return cached.with_suffix(".sha256")


def _remove_if_damaged(cached: Path) -> None:
    """Remove a cached file that is not what was written, and say so: Arrow maps it unchecked."""
    proof = _proof_of(cached)
    if cached.exists() and proof.exists() and proof.read_bytes() != f"{sha256(cached)}\n".encode():
        note(f"{cached}: this cached file is damaged; the texts are tokenised again")
        cached.unlink()
    if not (cached.exists() and proof.exists()):  # or a kill came between the two
        cached.unlink(missing_ok=True)
        proof.unlink(missing_ok=True)


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return everything that a tokenizer does as one string, from which its fingerprint is made.

    Truncation and padding are left out: each call sets them, so they describe the last call and not
    the tokenizer.
    """
    if not tokenizer.is_fast:
        return repr((type(tokenizer), sorted(tokenizer.get_vocab().items())))
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**description, "truncation": None, "padding": None})


def tokenize_splits(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    config: TokenConfig,
    runtime: Runtime,
    *,
    cache_dir: str | None,
) -> Splits:
    """Return the tokenised splits: one process per machine fills the cache, the others read it."""
    with runtime.local_main_first():
        return {
            split: tokenize(
                rows,
                tokenizer,
                max_length=config.length_of(split),
                truncation=config.truncation,
                hides_special=config.hides_special,
                cache_dir=cache_dir,
            )
            for split, rows in splits.items()
        }
