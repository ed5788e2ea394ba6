"""The labels of a file: which kind of task they ask for, what they say, and their names.

In the letters of the shapes: N rows in a split, C classes, labels or numbers.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from common import reading
from common.columns import named_columns
from common.errors import UserError, counted, quoted
from common.sources import INVISIBLE, is_blank
from common.training.run import LABEL_COLUMN, MULTI, REGRESSION, SINGLE, TASKS, Kind, check_label_columns

if TYPE_CHECKING:
    import datasets

# labels that are whole numbers, if need be with decimals that say nothing; 007 is a name
WHOLE = re.compile(r"-?(0|[1-9]\d*)(\.0+)?")
DECIMAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")  # 1e-05, as pandas writes it
MOST_DECIMALS = 20  # different numbers with decimals that may be the names of classes
FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
# lists of so many zeros and ones each hold one number for each label; shorter ones could be two
# labels
LEAST_FLAGS = 3
LISTS = ("List", "LargeList")  # kinds of columns
# no more digits than floats have
NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d{0,15})?(e[+-]?\d{1,2})?")
DECIMAL_COMMA = re.compile(r"[+-]?(\d*|\d{1,3}(\.\d{3})+),\d+([eE][+-]?\d+)?")
THOUSANDS = re.compile(r"[+-]?\d{1,3}(\.\d{3})+")  # where a comma stands for the decimal point
# what stands for a missing label in files of spreadsheets and of pandas, in small letters
MISSING = ("", "nan", "na", "n/a", "#n/a", "null")  # "none" can be a class
# for a row that lacks its text or its label
ADVICE = "remove the row, fill it in, or leave such rows out with --skip-bad"
# of a class: its name; of labels: the names of those that a text has; of numbers: all of them
Label: TypeAlias = "Any"  # str | list[str] | list[float]


@dataclass(frozen=True)
class LabelConfig:
    """Which columns hold the labels, and what they mean; the fields are named as their flags."""

    label_column: str = LABEL_COLUMN  # with commas between several
    task: str = "auto"
    label_separator: str | None = None
    clean_labels: bool = False
    decimal: str = "."

    def among(self, names: Collection[str]) -> LabelColumns:
        """Return which of the columns in a header hold the labels, and what they mean. Raises UserError
        for a count of them that other flags don't fit.
        """
        columns = named_columns(self.label_column, names, flag="--label-column")
        check_label_columns(columns, self.label_separator)
        return LabelColumns(columns, self.task, self.label_separator, self.clean_labels, self.decimal)


@dataclass(frozen=True)
class LabelColumns:
    """The columns of a data set that hold its labels, and what they mean."""

    columns: list[str]
    task: str
    label_separator: str | None
    clean_labels: bool
    decimal: str


# Labels that are written in several ways ----------------------------------------------------------


def seen_name(name: str) -> str:
    """Return a name as a reader sees it: without capital letters, needless spaces, characters that
    can't be seen, and with characters and numbers written in one way.
    """
    visible = "".join(
        character
        for character in unicodedata.normalize("NFKC", name)
        if character.isspace() or unicodedata.category(character) not in INVISIBLE
    )
    seen = " ".join(visible.casefold().split())
    if NUMBER.fullmatch(seen):
        seen = str(float(seen) + 0.0)  # not -0.0
    return re.sub(r"^0+(?=\d)", "", seen)


def tidy_labels(
    splits: dict[str, datasets.Dataset], config: LabelColumns, trained: Sequence[str] | None = None
) -> tuple[dict[str, datasets.Dataset], dict[str, str | None]]:
    """Return the splits with the labels in their columns of strings written in one way, as
    --clean-labels and --decimal ask for; and what was changed: label -> new label, None for none.

    Names that look the same become the most frequent of them in the first split, or that of a
    `trained` model. Raises UserError for a cell that is not UTF-8.
    """
    if not config.clean_labels and config.decimal == ".":
        return splits, {}
    for split, rows in splits.items():
        for column in _string_columns(rows, config):
            reading.check_characters(rows.with_format("arrow")[column], f"split {split}, row", first=1)
    usual = _usual_spellings(next(iter(splits.values())), config, trained)
    changes: dict[str, str | None] = {}

    def tidy(cell: str | None) -> str | None:
        if cell is None:
            return None
        parts = [cell] if config.label_separator is None else cell.split(config.label_separator)
        tidied = {part: _tidy_name(part, config, usual) for part in parts}
        changes.update((part, new) for part, new in tidied.items() if new != part)
        kept = [new for part in parts if (new := tidied[part]) is not None]
        # a cell with a separator may name no label
        return config.label_separator.join(kept) if config.label_separator else next(iter(kept), None)

    tidied_splits = {}
    for split, rows in splits.items():
        changed: Any = rows
        for column in _string_columns(rows, config):
            cells, feature = [tidy(cell) for cell in rows[column][:]], rows.features[column]
            changed = changed.remove_columns(column).add_column(column, cells, feature=feature)
        tidied_splits[split] = changed.select_columns(rows.column_names)
    return tidied_splits, changes


def _usual_spellings(
    rows: datasets.Dataset, config: LabelColumns, trained: Sequence[str] | None
) -> dict[str, str]:
    """Return how each name is spelled most often, by the name as it is seen; of equally frequent
    spellings the first in sorted order.
    """
    names = Counter(trained or ())
    if trained is None:
        for column in _string_columns(rows, config):
            cells = [cell for cell in rows[column][:] if cell is not None]
            parts = [cells] if config.label_separator is None else separated(cells, config.label_separator)
            names.update(name.strip() for names_of_cell in parts for name in names_of_cell)
    usual: dict[str, str] = {}
    for name, _ in sorted(names.items(), key=lambda item: (-item[1], item[0])):
        usual.setdefault(seen_name(name), name)
    return usual


def _tidy_name(name: str, config: LabelColumns, usual: dict[str, str]) -> str | None:
    """Return a label as it is meant: a number with a decimal point, or a name in its usual spelling;
    None where it stands for a missing one.
    """
    if config.decimal == "," and (number := _with_decimal_point(name)) is not None:
        return number
    if not config.clean_labels:
        return name
    seen = seen_name(name)
    return None if seen in MISSING else usual.get(seen, name.strip())


def _with_decimal_point(label: str) -> str | None:
    """Return a number with a decimal comma, or with points between thousands, as Python writes it; None
    for another label.
    """
    number = label.strip()
    if DECIMAL_COMMA.fullmatch(number) is None and THOUSANDS.fullmatch(number) is None:
        return None
    return number.replace(".", "").replace(",", ".")


def _string_columns(rows: datasets.Dataset, config: LabelColumns) -> list[str]:
    present = [column for column in config.columns if column in rows.column_names]
    return [column for column in present if reading.kind(rows, column).endswith("string")]


# Which task labels ask for, and what they say -----------------------------------------------------


def find_kind(rows: datasets.Dataset, config: LabelColumns) -> Kind:
    """Return the kind of task that labels ask for where `--task auto` leaves it open.

    Several columns, or lists, are labels if they hold names, or nothing but 0 and 1; else numbers.
    One column holds numbers if these have decimals, and not each of them is whole; else classes.
    """
    if config.task in TASKS:
        return cast(Kind, config.task)
    if config.label_separator is not None:
        return MULTI
    if len(config.columns) > 1:
        columns = [cells_as_names(rows, column) for column in config.columns]
        is_yes_or_no = all(map(_is_yes_or_no, columns))
        return MULTI if is_yes_or_no else REGRESSION
    [column] = config.columns
    kind, values = reading.kind(rows, column), rows[column][:]
    if kind in LISTS:
        is_decimal = any(isinstance(item, float) for value in values if value for item in value)
        return REGRESSION if is_decimal and not _are_flags(values) else MULTI
    if kind.startswith("float"):
        are_whole = all(value is None or float(value).is_integer() for value in values)
        return SINGLE if are_whole else REGRESSION
    return REGRESSION if kind.endswith("string") and _are_decimals(values) else SINGLE


def _are_decimals(labels: Iterable[str | None]) -> bool:
    """Return whether labels are numbers of which not all are whole, each written in one way: 1.1
    beside 1.10 are names, as versions have them.
    """
    different = {label for label in labels if label}
    if not all(map(DECIMAL.fullmatch, different)):
        return False
    fractions = [label for label in different if not float(label).is_integer()]
    return len(fractions) > 0 and len(set(map(float, fractions))) == len(fractions)


def are_few(labels: Sequence[Any]) -> bool:
    """Return whether labels (N) repeat themselves as those of classes do: where nearly each row has
    its own, these are scores.
    """
    different = {label for label in labels if label is not None}
    return len(different) <= MOST_DECIMALS and 2 * len(different) <= len(labels)


def flags_of_decimal_commas(labels: Collection[str]) -> str:
    """Return the flags that read labels as numbers where they look like those of a European spreadsheet,
    `1,5` beside `2`; "" where they don't.
    """
    if not any(DECIMAL_COMMA.fullmatch(label.strip()) for label in labels):
        return ""
    numbers = [_with_decimal_point(label) or label.strip() for label in labels]
    if not all(map(is_number, numbers)):
        return ""
    are_found = _are_decimals(numbers)
    return "--decimal ," if are_found else "--task regression --decimal ,"


def is_flag(value: str) -> bool:
    """Tell whether a label says yes or no: 1 or true, 0 or false."""
    return value.strip().lower() in FLAGS


def _is_yes_or_no(values: Sequence[str | None]) -> bool:
    return all(value is None or is_flag(value) for value in values)


def _are_flags(values: Sequence[list | None]) -> bool:
    """Return whether lists hold a 0 or 1 for each label: as many in each, and none is a list of
    names, in which no name comes twice.
    """
    lengths = {len(value) for value in values if value is not None}
    is_long = len(lengths) == 1 and lengths.pop() >= LEAST_FLAGS
    items = (item for value in values if value is not None for item in value)
    return is_long and all(item in (0, 1) for item in items)


def cells_as_names(rows: datasets.Dataset, column: str) -> list[str | None]:
    """Return the cells of a column (strings, numbers, classes) as strings, None where missing."""
    import datasets

    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        is_known = [value is not None and 0 <= value < len(feature.names) for value in values]
        return [feature.names[value] if known else None for value, known in zip(values, is_known)]
    return [None if value is None or value != value else str(value) for value in values]


def read_labels(split: str, rows: datasets.Dataset, kind: Kind, config: LabelColumns) -> list[Label]:
    """Return the label of each row (N). Raises UserError, naming split and row, for one that is
    missing or of another kind.
    """
    if kind == SINGLE:
        if len(config.columns) > 1:
            raise UserError(
                f"--label-column {','.join(config.columns)}: a text has one class (--task single), so name"
                " one column; --task multi or regression takes several"
            )
        return read_classes(split, rows, config.columns[0])
    if kind == REGRESSION:
        return read_numbers(split, rows, config.columns)
    return read_label_lists(split, rows, config)


def read_classes(split: str, rows: datasets.Dataset, column: str) -> list[str]:
    """Return the class of each row (N) as a string. Raises UserError for one that is missing."""
    import datasets

    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        num_classes = len(feature.names)
        for row, value in enumerate(values, start=1):
            if value is None or not 0 <= value < num_classes:
                raise UserError(
                    f"split {split}, row {row}: the label {value} is not one of the {num_classes}"
                    f" classes; if this split has no labels, choose another with --{split}-split"
                )
        return [feature.names[value] for value in values]
    kind = reading.kind(rows, column)
    if kind in LISTS:
        return _only_labels(split, _listed_labels(split, rows, column), column)
    if kind.startswith("float"):
        values = [None if value is None or math.isnan(value) else value for value in values]
        if all(value is None or value.is_integer() for value in values):
            kind, values = "int64", [None if value is None else int(value) for value in values]
        elif are_few(values):
            kind, values = "string", [None if value is None else str(value) for value in values]
    elif kind.endswith("string") and _are_decimals(values) and not are_few(values):
        kind = "decimal numbers"
    if not re.fullmatch(r"(large_)?string|bool|u?int\d+", kind):
        raise UserError(
            f"split {split}: column {column!r} holds {kind}, but labels are strings or whole"
            " numbers; name the right one with --label-column, or choose another --task"
        )
    for row, value in enumerate(values, start=1):
        if value is None or is_blank(str(value)):
            raise _missing(split, row, column)
    return [str(value) for value in values]


def _only_labels(split: str, lists: list[list[str]], column: str) -> list[str]:
    """Return the classes of texts (N) that stand in lists of one, as tools for annotation write them."""
    for row, labels in enumerate(lists, start=1):
        if len(labels) != 1:
            problem = f"column {column!r} holds {len(labels)} labels, and with --task single a text has one"
            raise UserError(f"split {split}, row {row}: {problem}; correct the row, or use --task multi")
    return [label for [label] in lists]


def _missing(split: str, row: int, column: str) -> UserError:
    problem = f"the label in column {column!r} is missing"
    return UserError(f"split {split}, row {row}: {problem}; {ADVICE}")


def read_numbers(split: str, rows: datasets.Dataset, columns: Sequence[str]) -> list[list[float]]:
    """Return the numbers of each row (N, C): those of its columns, or
    of the list in its only column.

    Raises UserError for one that is missing, no number or not finite, and for lists that differ in
    length.
    """
    if len(columns) == 1 and reading.kind(rows, columns[0]) in LISTS:
        [column] = columns
        cells = rows[column][:]
        length = len(cells[0] or [])
        for row, cell in enumerate(cells, start=1):
            if cell is None or len(cell) != length or not cell:
                has = f"the list in column {column!r} has {counted(len(cell or []), 'number')}"
                problem = f"{has}, that of row 1 {length}"
                raise UserError(f"split {split}, row {row}: {problem}; correct or remove the row")
        rows_of_items = enumerate(cells, start=1)
        return [[_number(item, split, row, column) for item in cell] for row, cell in rows_of_items]
    cells = zip(*(cells_as_names(rows, column) for column in columns))
    return [
        [_number(value, split, row, column) for value, column in zip(values, columns)]
        for row, values in enumerate(cells, start=1)
    ]


def _number(value: str | float | None, split: str, row: int, column: str) -> float:
    if value is None or is_blank(str(value)):
        raise _missing(split, row, column)
    if not is_number(value):
        has_comma = DECIMAL_COMMA.fullmatch(str(value)) is not None
        advice = "add --decimal ," if has_comma else "correct the row, or choose another --task"
        raise UserError(
            f"split {split}, row {row}: the label {quoted(str(value))} in column {column!r} is no"
            f" number, but --task regression needs one; {advice}"
        )
    return float(value)


def is_number(value: Any) -> bool:
    """Tell whether a label is a number whose square, the loss, is finite."""
    try:
        return abs(float(value)) < 1e18
    except (TypeError, ValueError):
        return False


def read_label_lists(split: str, rows: datasets.Dataset, config: LabelColumns) -> list[list[str]]:
    """Return the labels of each row (N), each a list that may be empty.

    They are the names of the columns that hold 1 or true; the items of a list, or of the 0 and 1 in
    it the numbers of the ones; the parts of a string between separators; or the only string.
    Raises UserError for a cell that is missing or none of these.
    """
    columns = config.columns
    [column] = columns[:1]
    if len(columns) == 1 and reading.kind(rows, column) in LISTS:
        return _listed_labels(split, rows, column)
    if config.label_separator is not None:
        return separated(cells_as_names(rows, column), config.label_separator)
    if len(columns) == 1 and not _is_yes_or_no(cells_as_names(rows, column)):
        return [[label] for label in read_classes(split, rows, column)]
    flags = {column: _read_flags(split, rows, column) for column in columns}
    return [[column for column in columns if flags[column][row]] for row in range(len(rows))]


def separated(cells: Iterable[str | None], separator: str) -> list[list[str]]:
    """Return the labels that each cell (N) names, with a separator between two."""
    parts = [(cell or "").split(separator) for cell in cells]
    return [[part.strip() for part in cell if not is_blank(part)] for cell in parts]


def _read_flags(split: str, rows: datasets.Dataset, column: str) -> list[bool]:
    """Return whether each row (N) has 1 or true in a column, and not 0 or false."""
    flags = []
    for row, value in enumerate(cells_as_names(rows, column), start=1):
        if value is None or is_blank(value):
            raise _missing(split, row, column)
        flag = FLAGS.get(value.strip().lower())
        if flag is None:
            problem = f"the label {quoted(value)} in column {column!r} is neither 0 nor 1"
            advice = "correct the row, or choose another --task"
            raise UserError(f"split {split}, row {row}: {problem}; {advice}")
        flags.append(flag)
    return flags


def _listed_labels(split: str, rows: datasets.Dataset, column: str) -> list[list[str]]:
    import datasets

    feature, cells = rows.features[column], rows[column][:]
    for row, cell in enumerate(cells, start=1):
        if cell is None or any(item is None or is_blank(str(item)) for item in cell):
            raise _missing(split, row, column)
    item = feature.feature
    if isinstance(item, datasets.ClassLabel):
        return [[item.names[number] for number in cell] for cell in cells]
    if _are_flags(cells):
        return [[str(number) for number, flag in enumerate(cell) if flag] for cell in cells]
    kind = getattr(item, "dtype", type(item).__name__)
    if not re.fullmatch(r"(large_)?string|u?int\d+|null", kind):
        raise UserError(
            f"split {split}: column {column!r} holds lists of {kind}, but labels are strings or"
            " whole numbers; name the right one with --label-column, or choose another --task"
        )
    return [[str(name) for name in cell] for cell in cells]


# Their names --------------------------------------------------------------------------------------


def label_names(
    rows: datasets.Dataset, kind: Kind, labels: Sequence[Label], config: LabelColumns
) -> list[str]:
    """Return the names of the answers that the labels (N) of a training split ask for, in order:
    those of its columns; those that the data set lists; else strings sorted, and numbers by value.

    Raises UserError when there is nothing to learn.
    """
    columns = config.columns
    feature: Any = rows.features[columns[0]]
    is_list = len(columns) == 1 and reading.kind(rows, columns[0]) in LISTS
    if kind == REGRESSION:
        count = len(labels[0])
        return [f"{columns[0]}_{number}" for number in range(count)] if is_list else columns
    if kind == SINGLE:
        known = set(labels)
        if len(known) < 2:
            problem = f"every row has the label {quoted(labels[0])}"
            raise _only_one(f"{problem}; a classifier needs at least two classes")
        listed_names = getattr(feature, "names", None)
        return list(listed_names) if listed_names is not None else sorted(known, key=natural_order)
    known = {name for label in labels for name in label}
    if not known:
        raise _only_one("no row has a label")
    is_separated = is_list or config.label_separator is not None
    if not is_separated and (len(columns) > 1 or _is_yes_or_no(cells_as_names(rows, columns[0]))):
        return columns
    if is_list and getattr(feature.feature, "names", None) is not None:
        return list(feature.feature.names)
    if is_list and _are_flags(rows[columns[0]][:]):
        return [str(number) for number in range(len(rows[columns[0]][0]))]
    return sorted(known, key=natural_order)


def _only_one(problem: str) -> UserError:
    advice = "add rows of another class, or name the right column with --label-column"
    return UserError(f"split train: {problem}; {advice}")


def natural_order(name: str) -> tuple[int, int, str]:
    """Return a sort key: whole numbers by value, then all other names.

    20 digits are enough for any 64-bit number.
    """
    return (0, int(name), name) if re.fullmatch(r"-?\d{1,20}", name) else (1, 0, name)


def without_decimals(label: str) -> str:
    """Return a label as it is, but a whole number that is written with decimals, as pandas writes
    one beside a missing value, without them.
    """
    return label.partition(".")[0] if WHOLE.fullmatch(label) else label
