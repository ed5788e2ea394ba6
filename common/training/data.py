"""Read a data set as labelled splits.

A labelled split has the columns `text` (string), `label` (its type tells the task, the same
for all splits: common/training/task.py) and `row` (the number of the row in its source,
counted from 1, so that a message or a prediction can be traced back); with `--text-mode pair`
also `text_pair` (string). In this code, `rows[name][:]` is a whole column as a list.

`datasets` and scikit-learn, which take a second to import, are imported by the functions that need
them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from common import reading, sources
from common.columns import ROW, named_columns, possible_columns, require_column
from common.errors import Fault, UserError, about_encoding, counted, listed, quoted
from common.runtime import Runtime
from common.sources import FileOptions, is_blank
from common.training.duplicates import count_shared_texts
from common.training.faults import (
    check_columns,
    clean,
    has_labels,
    leave_out,
    near_equal_names,
    rare_flag,
    read_otherwise,
    require_classes,
    text_problems,
    without_classes,
    without_rare,
)
from common.training.labels import (
    ADVICE,
    WHOLE,
    Label,
    LabelColumns,
    LabelConfig,
    are_few,
    cells_as_names,
    find_kind,
    flags_of_decimal_commas,
    label_names,
    natural_order,
    read_labels,
    tidy_labels,
    without_decimals,
)
from common.training.run import JOIN, MULTI, REGRESSION, SINGLE, TEXT_COLUMN, check_text_columns
from common.training.saved_settings import SavedSettings, name_sha256
from common.training.task import DESCRIPTIONS, Task, task_of_rows

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")


# the names that public data sets use, in the order in which they are tried
SPLIT_SYNONYMS = {
    "train": ["train", "training"],
    "validation": ["validation", "valid", "val", "dev"],
    "test": ["test"],
}
Splits: TypeAlias = "dict[str, datasets.Dataset]"
CUT_SHARE = 0.1  # of the source's training rows, for each split that is missing


@dataclass(frozen=True)
class TextConfig:
    """Which columns hold the texts; the fields are named as their flags."""

    text_column: str = TEXT_COLUMN  # with commas between several
    text_mode: str | None = None  # of several: PAIR, two texts that are read together; or JOIN
    join_with: str = " "

    def among(self, names: Collection[str]) -> TextColumns:
        """Return which of the columns in a header hold the texts. Raises UserError unless it is said what
        several are.
        """
        columns = named_columns(self.text_column, names, flag="--text-column")
        check_text_columns(columns, self.text_mode)
        return TextColumns(columns, self.text_mode, self.join_with)


@dataclass(frozen=True)
class TextColumns:
    """The columns of a data set that hold its texts, and how several are read."""

    columns: list[str]
    text_mode: str | None
    join_with: str


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
    inspect: bool  # splits that can't be cut are a finding, and no end
    drop_rare: int | None
    merge_rare: str | None
    files: FileOptions  # how data files are written
    texts: TextConfig
    labels: LabelConfig

    @property
    def columns(self) -> list[str]:
        """The columns that texts and labels may be in, which stay as they are written."""
        return [*possible_columns(self.texts.text_column), *possible_columns(self.labels.label_column)]


@dataclass
class DataNotes:
    """Findings about a data set that are not part of the splits that are trained and scored."""

    faults: list[Fault] = field(default_factory=list)  # rows that can't be used
    unlabelled: datasets.Dataset | None = None  # a test split without labels: its texts and `row`
    uncut: Splits = field(default_factory=dict)  # before splits are cut and rare classes left out
    unused: list[str] = field(default_factory=list)  # splits of the source that nothing asks for
    rare: list[str] = field(default_factory=list)  # classes that are left out or merged
    rare_rows: list[Fault] = field(default_factory=list)  # those of classes that are left out
    cut: list[str] = field(default_factory=list)  # splits that had to be cut from train
    test_sha256: str | None = None  # of the texts of the test split, if it was cut
    not_cut: str | None = None  # why they could not be, where --inspect goes on without them
    cleaned: dict[str, str | None] = field(default_factory=dict)  # label -> how it is read, None: as none


def load_splits(config: DataConfig, runtime: Runtime, notes: DataNotes | None = None) -> Splits:
    """Return the labelled splits train, validation and test, and print where they come from.

    What else there is, such as the rows that --skip-bad leaves out, is put into `notes`. Raises
    UserError for a split that is missing or can't be cut, and for rows that can't be used.
    """
    notes = DataNotes() if notes is None else notes
    faults = notes.faults if config.skip_bad else None
    source = _read_source(config, faults)
    wanted = {"train": config.train_split, "validation": config.validation_split, "test": config.test_split}
    splits = choose_splits(source, wanted)
    used = [id(rows) for rows in splits.values()]
    notes.unused = [str(name) for name, rows in source.items() if id(rows) not in used]
    for split, file in {"validation": config.validation_file, "test": config.test_file}.items():
        if file is not None:  # in place of the data set's own
            splits[split] = _read_file(file, config, faults)
    names = splits["train"].column_names
    texts, labels = config.texts.among(names), config.labels.among(names)
    splits, notes.cleaned = tidy_labels(splits, labels)
    if "test" in splits and not has_labels(splits["test"], labels):
        notes.unlabelled = _unlabelled(splits.pop("test"), texts, faults)
    if faults is not None:
        splits, labels = clean(splits, texts, labels, faults)
    splits = notes.uncut = checked_splits(splits, texts, labels)
    if config.drop_rare is not None or config.merge_rare is not None:
        splits, notes.rare, notes.rare_rows = without_rare(splits, config.drop_rare, config.merge_rare)
    try:
        splits, notes.cut = cut_missing_splits(splits, seed=config.seed)
        if "test" in notes.cut:
            notes.test_sha256 = texts_sha256(splits["test"])
    except UserError as error:
        if not config.inspect:
            raise
        notes.not_cut = str(error)
    for split, rows in splits.items():
        size, flag = config.max_eval_samples, "--max-eval-samples"
        if split == "train":
            size, flag = config.max_train_samples, "--max-train-samples"
        splits[split] = sample(rows, size, seed=config.seed, flag=flag)
    runtime.say(describe_splits(splits, config, notes))
    return splits


def describe_splits(splits: Splits, config: DataConfig, notes: DataNotes) -> str:
    """Return what was read in some lines: sizes, task, and whatever a reader should know."""
    sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items())
    task = task_of_rows(splits["train"])
    how = _how_it_was_found(splits["train"], task, config.labels) if config.labels.task == "auto" else ""
    about = []
    if notes.unused:
        advice = "name one with --train-split, --validation-split or --test-split to use it"
        about.append(f"not used: {listed(notes.unused)}; {advice}")
    for names in near_equal_names(task.names):
        alike = " and ".join(map(quoted, names))
        about.append(f"{alike} are different classes; if one is meant, add --clean-labels")
    if config.labels.task == "auto" and task.kind == SINGLE and flags_of_decimal_commas(task.names):
        about.append(f"the classes look like numbers; {read_otherwise(task.names)}")
    if notes.cleaned:
        read_as = [
            f"{quoted(old)} as {'none' if new is None else quoted(new)}" for old, new in notes.cleaned.items()
        ]
        about.append(f"labels that are read otherwise: {listed(read_as)}")
    if notes.faults:
        about.append(f"{counted(len(notes.faults), 'row')} can't be used: left out")
        about += filter(None, [about_encoding(notes.faults)])
    if notes.unlabelled is not None:
        about.append("the test split has no labels: it is predicted, and not scored")
    if notes.rare:
        into = f"left out with {counted(len(notes.rare_rows), 'row')}"
        if config.merge_rare is not None:
            into = f"one class {quoted(config.merge_rare)}"
        about.append(f"rare classes, {into}: {listed(notes.rare)}")
    if notes.cut:
        names = " and ".join(notes.cut)
        about.append(f"{names} cut from train: 10 % each, stratified, with seed {config.seed}")
    for split, count in count_shared_texts(splits).items():
        if count:
            also = "also in train (capitals, spaces and punctuation don't count)"
            says_little = "scores of such texts say little about new ones"
            about.append(f"{counted(count, f'{split} text')} {also}: {says_little}")
    lines = [
        f"data     {config.dataset}: {sizes} texts, {task.counted()}",
        f"task     {task.kind}: {DESCRIPTIONS[task.kind]}{how}",
        *(f"         {line}" for line in about),
    ]
    return "\n".join(lines)


def _how_it_was_found(rows: datasets.Dataset, task: Task, labels: LabelConfig) -> str:
    """Return why `--task auto` took the labels of training rows for those of a task, and what says
    otherwise.
    """
    if task.kind == REGRESSION and len(task.names) == 1:
        [name] = task.names
        if are_few([cell[name] for cell in rows["label"][:]]):
            return ", because the labels have decimals; --task single makes classes of them"
    are_lists = task.kind == MULTI and labels.label_separator is None and "," not in labels.label_column
    if are_lists and all(len(cell) == 1 for cell in rows["label"][:]):
        return ", because they stand in lists, of one label each; --task single makes classes of them"
    return ", found from the labels; --task chooses another"


def _unlabelled(rows: datasets.Dataset, texts: TextColumns, faults: list[Fault] | None) -> datasets.Dataset:
    """Return the texts of a split without labels, and their numbers."""
    source = "split test"
    for column in texts.columns:
        require_column(rows.column_names, column, source=source, flag="--text-column")
    if faults is None:
        _check_texts(rows, texts, source)
    else:
        rows = leave_out(source, rows, list(text_problems(rows, texts)), texts.columns, faults)
    result: Any = _with_texts(rows, texts)
    return result.add_column("row", _row_numbers(rows))


def load_rows_for_scoring(
    config: DataConfig, task: Task, trained: SavedSettings, runtime: Runtime
) -> datasets.Dataset:
    """Return the rows on which to score a saved model that was trained for `task`.

    These are the test split, or all training rows of a data set without one. `trained` tells how
    the model was trained: if the data set is the one that it was trained on, the same test
    split is cut again. Raises UserError when the seed would cut another one, most of whose rows the
    model was trained on.
    """
    faults: list[Fault] | None = [] if config.skip_bad else None
    split, rows = _read_rows_for_scoring(config, faults)
    texts, labels = config.texts.among(rows.column_names), config.labels.among(rows.column_names)
    if labels.label_separator is None and len(labels.columns) == 1:  # several columns have none
        labels = dataclasses.replace(labels, label_separator=trained.label_separator)
    splits, _ = tidy_labels({split: rows}, labels, (*task.names, *trained.rare_classes))
    if split == "test" and not has_labels(splits[split], labels):
        problem = "it has no labels to compare with"
        raise UserError(f"split test: {problem}; --predict answers for its texts")
    rare, merged = _rare_classes(splits, config, task, trained, texts=texts, labels=labels)
    known = dataclasses.replace(task, names=(*task.names, *rare))
    if faults is not None:
        splits, _ = clean(splits, texts, labels, faults, known)
        runtime.say(f"skipped  {counted(len(faults), 'row')} that can't be used")
        if advice := about_encoding(faults):
            runtime.say(f"         {advice}")
    splits = checked_splits(splits, texts, labels, trained=known)
    rare_rows: dict[int, str] = {}
    if rare:
        splits[split], rare_rows = _without_rare_as_trained(split, splits[split], rare, merged, task)
    when = ""
    was_cut = "test" in trained.cut and name_sha256(config.dataset) == trained.dataset_sha256
    if split == "train" and was_cut:
        splits["test"] = _cut_again(splits, config, trained)
        split, when = "test", ", before the test split was cut"
    rows = sample(splits[split], config.max_eval_samples, seed=config.seed, flag="--max-eval-samples")
    name = config.test_file or config.dataset
    runtime.say(f"data     {name}: {counted(len(rows), 'text')} of its {split} split")
    if merged is not None:  # of those that are scored; the others were left out before
        rare_rows = {row: rare_rows[row] for row in rows["row"][:] if row in rare_rows}
    if rare_rows:
        runtime.say(f"         {_rare_words([*rare_rows.values()], merged, when)}")
    if split == "train":
        runtime.say("         the model may have been trained on some of them, which would raise its scores")
    return rows


def _read_rows_for_scoring(config: DataConfig, faults: list[Fault] | None) -> tuple[str, datasets.Dataset]:
    """Return the name of the split that is scored, or that the test split is cut from, and its rows: no
    other split has a part in the scores.
    """
    if config.test_file is not None:
        return "test", _read_file(config.test_file, config, faults)
    source = _read_source(config, faults)
    if splits := choose_splits(source, {"test": config.test_split}):
        return "test", splits["test"]
    others = {"train": config.train_split, "validation": config.validation_split}
    return "train", choose_splits(source, others)["train"]


def _cut_again(splits: Splits, config: DataConfig, trained: SavedSettings) -> datasets.Dataset:
    """Return the test split that the training of a model cut from the training split. Raises UserError
    where it would be another one.
    """
    seed, flag = trained.split_seed, "--split-seed"
    if seed is None:
        seed, flag = trained.seed, "--seed"
    if seed != config.seed:
        problem = f"the model was trained with {flag} {seed}, which cuts a different test split"
        raise UserError(f"{flag} {config.seed}: {problem}; use that seed")
    splits, _ = cut_missing_splits(splits, seed=config.seed, missing=trained.cut)
    if trained.test_sha256 != texts_sha256(splits["test"]):
        problem = "the test split that is cut from it now is not the one of the training, so that texts"
        problem += " of the training would be scored: the data or the flags have changed since"
        advice = "give the file and the flags of the training, or texts that the model has not seen"
        raise UserError(f"--dataset {config.dataset}: {problem}; {advice}")
    return splits["test"]


def _rare_classes(
    splits: Splits,
    config: DataConfig,
    task: Task,
    trained: SavedSettings,
    *,
    texts: TextColumns,
    labels: LabelColumns,
) -> tuple[list[str], str | None]:
    """Return the classes whose rows are not scored as they are, and the class that they make, None
    if they are left out: as the model remembers it, or where it remembers nothing and flags ask for
    it, those that the model lacks.

    Raises UserError for flags of rare classes without such, or with another class than the model's.
    """
    least, merged = config.drop_rare, config.merge_rare
    flag, is_given = rare_flag(least, merged), (least, merged) != (None, None)
    if is_given:
        require_classes(task, flag)
    else:
        merged = trained.merge_rare
    rare = [name for name in trained.rare_classes if name not in task.names]
    if is_given and not rare:
        check_columns(splits, texts, labels)
        rare = _names_beyond(splits, labels, task)
    if rare and merged is not None and merged not in task.names:
        known = listed(sorted(task.names, key=natural_order), most=10)
        problem = f"the model has no such class; its classes are {known}"
        raise UserError(f"--merge-rare {merged}: {problem}; name one of them, or use --drop-rare")
    return rare, merged


def _names_beyond(splits: Splits, labels: LabelColumns, task: Task) -> list[str]:
    """Return the names of classes in the splits that are none of the task's."""
    cells = {cell for rows in splits.values() for cell in cells_as_names(rows, labels.columns[0])}
    names = {name for name in cells if not (name is None or is_blank(name))}
    beyond = {without_decimals(name) for name in names if name not in task.names}
    return sorted(beyond.difference(task.names), key=natural_order)


def _without_rare_as_trained(
    split: str, rows: datasets.Dataset, rare: list[str], merged: str | None, task: Task
) -> tuple[datasets.Dataset, dict[int, str]]:
    """Return the rows of a split with the classes of a trained model, its `rare` ones left out or
    `merged` into one; and the class of each row that had a rare one, by its number. Raises UserError
    when no row is left.
    """
    names = task_of_rows(rows).names
    labels = [names[label] for label in rows["label"][:]]
    found = {number: name for number, name in zip(rows["row"][:], labels) if name in rare}
    result, _ = without_classes(split, rows, rare, task.names, merged=merged)
    if not len(result):
        gone = listed(sorted({*found.values()}, key=natural_order))
        problem = f"all its rows are of rare classes, which are left out: {gone}"
        raise UserError(f"split {split}: {problem}; give rows of the model's classes")
    return result, found


def _rare_words(found: list[str], merged: str | None, when: str) -> str:
    """Return what became of rows whose rare classes were `found`."""
    rows, names = counted(len(found), "row"), listed(sorted({*found}, key=natural_order))
    into = f"left out with {rows}{when}" if merged is None else f"one class {quoted(merged)} of {rows}"
    return f"rare classes, {into}: {names}"


def _read_source(config: DataConfig, faults: list[Fault] | None) -> datasets.DatasetDict:
    read = functools.partial(
        reading.read,
        config.dataset,
        as_text=config.columns,
        options=config.files,
        config=config.dataset_config,
        revision=config.dataset_revision,
        cache_dir=config.cache_dir,
    )
    return _read_named(config.dataset, read, faults)


def _read_file(file: str, config: DataConfig, faults: list[Fault] | None) -> datasets.Dataset:
    """Return the rows of a split that has a file of its own."""
    options = {"as_text": config.columns, "options": config.files, "cache_dir": config.cache_dir}
    return _read_named(file, functools.partial(reading.read_file, Path(file), **options), faults)


def _read_named(name: str, read: Callable[..., T], faults: list[Fault] | None) -> T:
    is_local = sources.kind_of_path(name) in ("file", "folder")  # what else there is, is read only once
    return reading.or_advise_to_skip(read, faults) if is_local else read(faults=faults)


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


def checked_splits(
    splits: Splits,
    texts: TextColumns = TextConfig().among(()),  # noqa: B008  (frozen)
    labels: LabelColumns = LabelConfig().among(()),  # noqa: B008
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
    check_columns(splits, texts, labels)
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
        task, complaint = trained, "is not one of the classes of the model's training"
        read = {split: _in_order(values, task, labels) for split, values in read.items()}
    read = {split: _known_labels(split, values, task, complaint) for split, values in read.items()}
    return {split: _with_labels(rows, read[split], task, texts) for split, rows in splits.items()}


def _require_same_task(trained: Task, labels: LabelColumns) -> None:
    """Raise UserError unless the labels are for the task that a model was trained for."""
    if labels.task not in ("auto", trained.kind):
        raise UserError(
            f"--task {labels.task}: the model was trained for --task {trained.kind}; leave the flag"
            " out, or name another model"
        )
    is_by_column = trained.kind == MULTI and len(labels.columns) > 1
    if is_by_column and set(labels.columns) != set(trained.names):
        raise UserError(
            f"--label-column {','.join(labels.columns)}: the model's labels are {listed(trained.names)};"
            " name a column for each"
        )


def _in_order(values: list[Label], task: Task, labels: LabelColumns) -> list[Label]:
    """Return labels as a trained model orders them. Numbers are those of columns with the names of
    its outputs; if there are others, of as many columns in their order.

    Raises UserError for another count of numbers than the model answers.
    """
    if task.kind != REGRESSION:
        return values
    if len(values[0]) != len(task.names):
        raise UserError(
            f"--label-column {','.join(labels.columns)}: {counted(len(values[0]), 'number')} a row, and the"
            f" model answers {len(task.names)}: {listed(task.names)}; name a column for each"
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
            f" ({listed(sorted(known, key=natural_order), most=10)}); correct or remove the row,"
            " or leave such rows out with --skip-bad"
        )

    numbered = enumerate(values, start=1)
    if task.kind == SINGLE:
        return [known_name(row, label) for row, label in numbered]
    return [[known_name(row, label) for label in names] for row, names in numbered]


def _check_texts(rows: datasets.Dataset, texts: TextColumns, source: str) -> None:
    """Raise UserError, naming `source` and row, unless each row has its text, or both of a pair; the
    columns must be there.
    """
    if texts.text_mode != JOIN:
        for column in texts.columns:
            reading.check_texts(rows, column, source=source, advice=ADVICE)
        return
    for column in texts.columns:
        reading.check_kind(rows, column, source=source)
        reading.check_characters(rows.with_format("arrow")[column], f"{source}, row", first=1)
    name = ",".join(texts.columns)
    joined = _with_texts(rows, texts).rename_column("text", name)
    reading.check_texts(joined, name, source=source, advice=ADVICE)


def _with_texts(rows: datasets.Dataset, texts: TextColumns) -> datasets.Dataset:
    """Return only the texts of rows: the column `text`, and of pairs `text_pair`."""
    import datasets

    if texts.text_mode == JOIN:
        joined = reading.join_cells([rows[column][:] for column in texts.columns], texts.join_with)
        return datasets.Dataset.from_dict({"text": joined})
    result: Any = rows.select_columns(texts.columns)
    result = result.rename_columns(dict(zip(texts.columns, ("text", "text_pair"))))
    for column in result.column_names:
        result = result.cast_column(column, datasets.Value("string"))
    return result


def _with_labels(
    rows: datasets.Dataset, labels: list[Label], task: Task, texts: TextColumns
) -> datasets.Dataset:
    result: Any = _with_texts(rows, texts)
    result = result.add_column("label", task.cells(labels), feature=task.feature())
    return result.add_column("row", _row_numbers(rows))


def _row_numbers(rows: datasets.Dataset) -> np.ndarray:
    """Return the number of each row (N): from 1, or as in its file where bad rows were left out."""
    has_numbers = ROW in rows.column_names
    return np.asarray(rows[ROW][:]) if has_numbers else np.arange(1, len(rows) + 1)


def texts_sha256(rows: datasets.Dataset) -> str:
    """Return the SHA-256 of the texts of a split, in their order, in hexadecimal."""
    return values_sha256(rows, [name for name in ("text", "text_pair") if name in rows.column_names])


def values_sha256(rows: datasets.Dataset, columns: list[str], before: str = "") -> str:
    """Return the SHA-256 of what stands in some columns, and of a text before it, in hexadecimal."""
    digest = hashlib.sha256(before.encode())
    for name in columns:
        for value in rows[name][:]:
            digest.update(f"{value}\0".encode())
    return digest.hexdigest()


def cut_missing_splits(splits: Splits, *, seed: int, missing: Sequence[str] = ()) -> tuple[Splits, list[str]]:
    """Return the splits, and the names of those that had to be cut from the training split: the
    `missing` ones, by default all that are not there.

    Each missing split gets 10 % of the source's training rows, stratified; which ones depends on
    the seed alone. Raises UserError when a class has too few rows.
    """
    cut, num_rows = dict(splits), len(splits["train"])
    missing = list(missing) or [split for split in ("validation", "test") if split not in splits]
    if missing and task_of_rows(splits["train"]).kind == SINGLE:
        _check_counts(splits["train"], missing)
    for split in missing:
        task = task_of_rows(splits["train"])
        size = max(round(num_rows * CUT_SHARE), len(task.names) if task.kind == SINGLE else 1)
        purpose = f"a {split} split"
        cut["train"], cut[split] = stratified_cut(cut["train"], size, seed=seed, purpose=purpose)
    return {split: cut[split] for split in ("train", "validation", "test") if split in cut}, missing


def _check_counts(rows: datasets.Dataset, missing: list[str]) -> None:
    """Raise UserError unless each class has a row for each split that is to be cut, and for train."""
    names, least = task_of_rows(rows).names, len(missing) + 1
    counts = np.bincount(rows["label"][:], minlength=len(names))
    few = [f"{quoted(name, 30)} has {count}" for name, count in zip(names, counts) if 0 < count < least]
    if not few:
        return
    splits = " and ".join(f"a {split}" for split in missing)
    advice = (
        f"leave such classes out with --drop-rare {least}, put them together with --merge-rare, add rows,"
        " or supply the splits, for example as a folder with train.csv, validation.csv and test.csv"
    )
    if near_equal_names(names):
        advice = f"make one class of several spellings with --clean-labels, {advice}"
    if 2 * len(few) > len(rows) and not flags_of_decimal_commas(names):
        advice = f"if the labels are numbers, add --task regression (--decimal , for 1,5); else {advice}"
    elif otherwise := read_otherwise(names):
        advice = f"{otherwise}; else {advice}"
    problem = f"{splits} split can't be cut with every class in each: class {listed(few)}"
    raise UserError(f"{problem}, and {least} are needed; {advice}")


def stratified_cut(
    rows: datasets.Dataset, size: int, *, seed: int, purpose: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return the rows in two parts, the second of `size` rows, with the same shares of classes, and
    of each class with two rows at least one in both.

    Rows with several labels, or with numbers, are drawn evenly from all of them in the order of
    `strata`. Both parts keep the order of the source. Raises UserError, naming the `purpose`, when
    a class has too few rows.
    """
    from sklearn.model_selection import train_test_split

    problem = f"can't cut {purpose} of {counted(size, 'row')} from {len(rows):,}"
    supply = "or supply the split, for example as a folder with train.csv, validation.csv and test.csv"
    if task_of_rows(rows).kind != SINGLE:
        if len(rows) < 2 * size:
            raise UserError(f"{problem}; add rows, {supply}")
        part = _one_of_each_stretch(rows, size, seed=seed)
        return _take(rows, np.setdiff1d(np.arange(len(rows)), part)), _take(rows, part)
    labels = np.asarray(rows["label"][:])
    try:
        rest, part = train_test_split(
            np.arange(len(rows)), test_size=size, stratify=labels, random_state=seed
        )
    except ValueError as error:  # a class with one row, or fewer rows left than classes
        present, counts = np.unique(labels, return_counts=True)
        name = rows.features["label"].names[present[counts.argmin()]]
        raise UserError(
            f"{problem} with every class in both parts: class {quoted(name)} has {counts.min()};"
            f" add rows of it, {supply}"
        ) from error
    for one, other in ((part, rest), (rest, part)):
        _give_each_class(one, other, labels)
    return _take(rows, rest), _take(rows, part)


def _give_each_class(part: np.ndarray, other: np.ndarray, labels: np.ndarray) -> None:
    """Exchange rows of two parts, in place, so that `part` has each class of `labels` (N): a rare
    one, whose share was rounded to 0, takes the place of a row of the class that has most beyond
    its share.
    """
    shares = np.bincount(labels) * len(part) / len(labels)  # (C)
    for label in np.setdiff1d(labels, labels[part]):
        counts = np.bincount(labels[part], minlength=len(shares))  # (C)
        surplus = np.where(counts > 1, counts - shares, -np.inf)  # its last row is not given away
        mine = np.flatnonzero(labels[part] == surplus.argmax())[0]
        theirs = np.flatnonzero(labels[other] == label)[0]
        part[mine], other[theirs] = other[theirs], part[mine]


def sample(rows: datasets.Dataset, size: int | None, *, seed: int, flag: str) -> datasets.Dataset:
    """Return a stratified sample of at most `size` rows, in the order of the source.

    With `size` None all rows are returned. Raises UserError, naming the `flag` that set the size,
    when there are more classes than rows to take.
    """
    if size is None or size >= len(rows):
        return rows
    if task_of_rows(rows).kind != SINGLE:
        return _take(rows, _one_of_each_stretch(rows, size, seed=seed))
    num_classes = len(np.unique(rows["label"][:]))
    if size < num_classes:
        problem = f"the rows have {num_classes} classes"
        raise UserError(f"{flag} {size}: {problem}; use at least {num_classes}")
    by_class = _shuffled_by_stratum(rows, np.random.default_rng(seed))
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


def _shuffled_by_stratum(rows: datasets.Dataset, generator: np.random.Generator) -> np.ndarray:
    """Return all row numbers (N) in the order of `strata`, and at random within a stratum."""
    shuffled = generator.permutation(len(rows))
    return shuffled[np.argsort(strata(rows)[shuffled], kind="stable")]


def _one_of_each_stretch(rows: datasets.Dataset, size: int, *, seed: int) -> np.ndarray:
    """Return `size` row numbers: one drawn from each of as many equal stretches of the rows in the
    order of `strata`.
    """
    generator = np.random.default_rng(seed)
    order = _shuffled_by_stratum(rows, generator)
    ends = np.arange(size + 1) * len(rows) // size
    return order[generator.integers(ends[:-1], ends[1:])]


def _take(rows: datasets.Dataset, numbers: np.ndarray) -> Any:
    """Return the rows with these numbers, in the order of the source."""
    return rows.select(np.sort(numbers))


def texts_of(rows: datasets.Dataset) -> list[str] | list[tuple[str, str]]:
    """Return the text of each row (N), or both texts of a pair."""
    if "text_pair" in rows.column_names:
        return list(zip(rows["text"][:], rows["text_pair"][:]))
    return rows["text"][:]
