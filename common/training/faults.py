"""What is wrong with the rows of a data set, found in one look: rows that can't be used, by kind;
classes whose names look the same, or that are rare.

The rows that can't even be read are collected by `common/reading.py`. Here are those whose text or
label can't be used. `clean` leaves both out.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common import reading, terminal
from common.columns import ROW, require_column
from common.errors import Fault, UserError, counted, listed, quoted, shorten
from common.sources import is_blank
from common.training.duplicates import SHOWN_GROUPS, SHOWN_ROWS, duplicate_lines
from common.training.labels import (
    DECIMAL,
    LISTS,
    MISSING,
    WHOLE,
    LabelColumns,
    cells_as_names,
    find_kind,
    flags_of_decimal_commas,
    is_flag,
    is_number,
    seen_name,
    separated,
    without_decimals,
)
from common.training.run import JOIN, MULTI, REGRESSION, SINGLE, Kind
from common.training.task import Task, task_of_rows

if TYPE_CHECKING:
    import datasets

    from common.training.data import Splits, TextColumns

TEXT_NOT_UTF8 = "the text is not UTF-8"  # in a Parquet file, which has no other encoding
TYPICAL = 0.9  # share of the rows that tells what kind of labels a column has
SURE_SEPARATORS = ";|"  # of labels in one cell: they are hardly ever part of a name
SEPARATORS = SURE_SEPARATORS + ",/"
RARE = 10  # texts of a class in training, below which it is said


# Rows that can't be used --------------------------------------------------------------------------


def clean(
    splits: Splits, texts: TextColumns, labels: LabelColumns, faults: list[Fault], trained: Task | None = None
) -> tuple[Splits, LabelColumns]:
    """Return the splits without the rows whose text or label can't be used, which are added to
    `faults`, and the labels with the task that the other rows have.

    Labels of other splits must occur in training, or be those of the task of a `trained` model.
    Raises UserError for a missing column, and when no row of a split can be used.
    """
    check_columns(splits, texts, labels)
    kind = trained.kind if trained is not None else _kind(splits["train"], labels)
    problems, names = {}, {}
    for split, rows in splits.items():
        pairs = zip(text_problems(rows, texts), _label_problems(rows, kind, labels), strict=True)
        problems[split] = [text or label for text, label in pairs]
        names[split] = _names_of(rows, kind, labels)
    known = _usable(names["train"], problems["train"]) if trained is None else set(trained.names)
    cleaned = {}
    for split, rows in splits.items():
        if split != "train" or trained is not None:
            _mark_unknown(names[split], problems[split], known)
        columns = [*texts.columns, *labels.columns]
        cleaned[split] = leave_out(f"split {split}", rows, problems[split], columns, faults)
        if not len(cleaned[split]):
            problem = "it has no row that can be used"
            raise UserError(f"split {split}: {problem}; --inspect lists why")
    return cleaned, dataclasses.replace(labels, task=kind)


def check_columns(splits: Splits, texts: TextColumns, labels: LabelColumns) -> None:
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
                require_column(known, column, source=source, flag=flag)
        if len(rows) == 0:
            raise UserError(f"split {split}: it has no rows; choose another with --{split}-split")


def has_labels(rows: datasets.Dataset, labels: LabelColumns) -> bool:
    """Tell whether any row of a split has a label: in competitions none has, or -1 in each."""
    present = [column for column in labels.columns if column in rows.column_names]
    if len(present) < len(labels.columns):
        return False
    for column in present:
        if reading.kind(rows, column) in LISTS:
            return any(cell is not None for cell in rows[column][:])
        values = cells_as_names(rows, column)
        if any(not (value is None or is_blank(value) or value == "-1") for value in values):
            return True
    return False


def _kind(rows: datasets.Dataset, labels: LabelColumns) -> Kind:
    """Return the task of labels some of which may be wrong: that which fits nearly all rows."""
    kinds = [reading.kind(rows, column) for column in labels.columns]
    if labels.task != "auto" or any(kind in LISTS for kind in kinds):
        return find_kind(rows, labels)
    cells = list(zip(*(cells_as_names(rows, column) for column in labels.columns)))
    has_none = [any(cell is None or is_blank(cell) for cell in row) for row in cells]
    present = [number for number, is_missing in enumerate(has_none) if not is_missing]
    typical = present
    for is_typical in (is_flag, _is_numeric) if len(labels.columns) > 1 else (_is_numeric,):
        alike_rows = [number for number in present if all(map(is_typical, cells[number]))]
        if len(alike_rows) >= TYPICAL * len(present):
            typical = alike_rows
            break
    some: Any = rows.select(typical)
    return find_kind(some, labels) if typical else SINGLE


def _is_numeric(value: str) -> bool:
    return DECIMAL.fullmatch(value) is not None or is_flag(value)


def text_problems(rows: datasets.Dataset, texts: TextColumns) -> Iterator[str]:
    """Yield what is wrong with the text of each row, or with one of a pair; "" if nothing is.

    Of columns that are joined, a cell may be empty: the text that they make together may not.
    """
    import pyarrow as pa

    columns = texts.columns
    for column in columns:
        reading.check_kind(rows, column, source="the data")
    table: Any = rows.select_columns(columns).with_format("arrow")
    for block in table.iter(batch_size=10_000):
        cells = [block[column].cast(pa.large_binary()).to_pylist() for column in columns]
        for row in zip(*cells):
            yield _row_problem(row, texts)


def _row_problem(cells: Sequence[bytes | None], texts: TextColumns) -> str:
    try:
        parts = [None if cell is None else cell.decode() for cell in cells]
    except UnicodeDecodeError:
        return TEXT_NOT_UTF8
    if texts.text_mode == JOIN:
        parts = reading.join_cells([[part] for part in parts], texts.join_with)
    return next(filter(None, map(reading.text_problem, parts)), "")


def _label_problems(rows: datasets.Dataset, kind: Kind, labels: LabelColumns) -> list[str]:
    """Return what is wrong with the label of each row (N) on its own, "" if nothing is."""
    columns = labels.columns
    if len(columns) == 1 and reading.kind(rows, columns[0]) in LISTS:
        cells = rows[columns[0]][:]
        lengths = Counter(len(cell) for cell in cells if cell)
        usual = lengths.most_common(1)[0][0] if lengths else 0
        return [_list_problem(cell, kind, usual) for cell in cells]
    problems = [""] * len(rows)
    may_be_flags = kind == MULTI and labels.label_separator is None
    for column in columns:
        values = cells_as_names(rows, column)
        flags = [value for value in values if value is not None and is_flag(value)]
        are_flags = may_be_flags and (len(columns) > 1 or len(flags) >= TYPICAL * len(values))
        for number, value in enumerate(values):
            problems[number] = problems[number] or _cell_problem(value, kind, labels, are_flags)
    return problems


def _cell_problem(value: str | None, kind: Kind, labels: LabelColumns, are_flags: bool) -> str:
    if labels.label_separator is not None:
        return ""  # no label is a label there
    if value is None or is_blank(value):
        return "the label is missing"
    if kind == REGRESSION and not is_number(value):
        return "the label is no number"
    if are_flags and not is_flag(value):
        return "the label is neither 0 nor 1"
    return ""


def _list_problem(cell: list | None, kind: Kind, usual: int) -> str:
    if cell is None or any(item is None or is_blank(str(item)) for item in cell):
        return "the label is missing"
    if kind == SINGLE and len(cell) != 1:
        return "the label is none or several"
    if kind == REGRESSION and len(cell) != usual:
        return f"the label has another count of numbers than {usual}"
    if kind == REGRESSION and not all(map(is_number, cell)):
        return "the label is no number"
    return ""


def _names_of(rows: datasets.Dataset, kind: Kind, labels: LabelColumns) -> list[list[str]]:
    """Return the names of labels in each row (N), none where they are columns, numbers or lists."""
    column = labels.columns[0]
    if kind != REGRESSION and len(labels.columns) == 1 and reading.kind(rows, column) not in LISTS:
        values = cells_as_names(rows, column)
        if labels.label_separator is not None:
            return separated(values, labels.label_separator)
        if kind == SINGLE:
            return [[] if value is None else [value] for value in values]
    return [[] for _ in range(len(rows))]


def _usable(names: list[list[str]], problems: list[str]) -> set[str]:
    """Return the names in the rows (N) without a problem."""
    known = {name for row, problem in zip(names, problems) if not problem for name in row}
    return set(map(without_decimals, known)) if all(map(WHOLE.fullmatch, known)) else known


def _mark_unknown(names: list[list[str]], problems: list[str], known: set[str]) -> None:
    for number, row in enumerate(names):
        unknown = [name for name in row if known.isdisjoint((name, without_decimals(name)))]
        if unknown and not problems[number]:
            problems[number] = "the label does not occur in training"


def leave_out(
    source: str, rows: datasets.Dataset, problems: list[str], columns: Sequence[str], faults: list[Fault]
) -> datasets.Dataset:
    """Return the rows (N) without a problem; the others are added to the faults, with what is in
    their `columns`.
    """
    has_numbers = ROW in rows.column_names
    table: Any = rows.select_columns([*columns, *([ROW] if has_numbers else [])])
    table = table.with_format("arrow")
    for number, problem in enumerate(problems):
        if problem:
            cells = table[number : number + 1]
            row = cells[ROW][0].as_py() if has_numbers else number + 1
            content = " | ".join(_readable(cells[column][0]) for column in columns)
            faults.append(Fault(source, row, problem, content))
    good: Any = rows.select([number for number, problem in enumerate(problems) if not problem])
    return good


def _readable(cell: Any) -> str:
    try:
        value = cell.as_py()
    except UnicodeDecodeError:
        return cell.as_buffer().to_pybytes().decode("utf-8", "backslashreplace")
    return "" if value is None else str(value)


def fault_table(faults: Sequence[Fault]) -> str:
    """Return the kinds of faults as a table: how many rows, and the first of them."""
    kinds: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        kinds.setdefault((fault.problem, fault.source), []).append(fault)
    lines = []
    for (problem, source), found in kinds.items():
        rows = ", ".join(str(fault.row) for fault in found[:SHOWN_ROWS])
        more = ", ..." if len(found) > SHOWN_ROWS else ""
        example = terminal.cut(found[0].content, terminal.room(40))
        line = [shorten(problem, 60), shorten(source, 60), f"{len(found):,}", rows + more]
        lines.append([*line, example])
    headers = ["what is wrong", "where", "rows", "first rows", "the first holds"]
    sides = ("left", "left", "right", "left", "left")
    return terminal.table(lines, headers, folded=[0, 3], texts=[4], disable_numparse=True, colalign=sides)


# Class names that look the same, and rare classes -------------------------------------------------


def near_equal_names(names: Sequence[str]) -> list[list[str]]:
    """Return the groups of class names that differ only in capital letters, spaces, characters that
    can't be seen, the way in which Unicode writes a character, or in which a number is written.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(seen_name(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def list_separator(names: Sequence[str]) -> str | None:
    """Return what parts the labels in class names that look like lists of them, such as `drama; crime`,
    None if none does.

    A comma or a slash can be part of a name. It parts labels if one of these is found a second time.
    """
    for separator in SEPARATORS:
        lists = [parts for parts in separated(names, separator) if len(parts) > 1]
        counts = Counter(part for parts in separated(names, separator) for part in set(parts))
        is_repeated = any(counts[part] > 1 for parts in lists for part in parts)
        if lists and (is_repeated or separator in SURE_SEPARATORS):
            return separator
    return None


def read_otherwise(names: Sequence[str]) -> str:
    """Return which flags read class names that look like numbers with a decimal comma, or like lists of
    labels, as these; "" where none does.
    """
    flags = flags_of_decimal_commas(names)
    advice = [f"if they are numbers, add {flags}"] if flags else []
    if (separator := list_separator(names)) is not None:
        advice.append(f"if they are lists of labels, add --label-separator '{separator}'")
    return "; ".join(advice)


def describe(splits: Splits) -> str:
    """Return what else to know of labelled splits: alike texts, contradictions, rare classes."""
    task = task_of_rows(splits["train"])
    lines = []
    for names in near_equal_names(task.names):
        both = " and ".join(map(quoted, names))
        lines.append(f"nearly the same name: {both}; if one is meant, add --clean-labels, or correct it")
    if task.kind == SINGLE and (advice := read_otherwise(task.names)):
        like, separator = "numbers", ","
        if not flags_of_decimal_commas(task.names):
            like, separator = "lists", list_separator(task.names) or ""
        found = [name for name in task.names if separator in name]
        lines.append(f"look like {like}: {listed(map(quoted, found), most=SHOWN_GROUPS)}; {advice}")
    if missing := [name for name in task.names if seen_name(name) in MISSING]:
        lines.append(f"may stand for a missing label: {listed(missing)}; --clean-labels takes it for one")
    lines += duplicate_lines(splits, task)
    lines += _rare_lines(splits["train"], task)
    return "\n".join(lines) or "nothing: no alike texts, no contradictions, no rare classes"


def _rare_lines(rows: datasets.Dataset, task: Task) -> list[str]:
    """Return a line on the classes that few texts of the training split have, the rarest first."""
    if task.kind != SINGLE:
        return []
    counts = np.bincount(rows["label"][:], minlength=len(task.names))
    rarest = (int(number) for number in np.argsort(counts, kind="stable") if counts[number] < RARE)
    rare = [f"{quoted(task.names[number])} {counts[number]}" for number in rarest]
    if not rare:
        return []
    shown = ", ".join(rare[:SHOWN_GROUPS]) + ", ..." * (len(rare) > SHOWN_GROUPS)
    return [
        f"classes with fewer than {RARE} texts in training: {shown}; --drop-rare {RARE} leaves them"
        " out, --merge-rare NAME makes one class of them"
    ]


def without_rare(
    splits: Splits, least: int | None, name: str | None
) -> tuple[Splits, list[str], list[Fault]]:
    """Return the splits without the classes that have fewer than `least` texts in training (None:
    RARE), or with one class `name` in their place; these classes; and the rows that are left out.

    Raises UserError for another task than one class of several, and when one class is left.
    """
    task = task_of_rows(splits["train"])
    flag = rare_flag(least, name)
    require_classes(task, flag)
    counts = np.bincount(splits["train"]["label"][:], minlength=len(task.names))
    few = [task.names[n] for n, count in enumerate(counts) if count < (least or RARE)]
    rare = [label for label in few if label != name]
    if not rare:
        return splits, [], []
    names = [label for label in task.names if label not in rare]
    if name is not None and name not in names:
        names.append(name)
    if len(names) < 2:
        problem = f"it leaves {counted(len(names), 'class', 'classes')}"
        raise UserError(f"{flag}: {problem}; a classifier needs two, so use less")
    result, left_out = {}, []
    for split, rows in splits.items():
        result[split], faults = without_classes(split, rows, rare, names, merged=name)
        left_out += faults
        if not len(result[split]):
            raise UserError(f"{flag}: it leaves no row of split {split}; use less")
    return result, rare, left_out


def rare_flag(least: int | None, name: str | None) -> str:
    """Return the flag that treats rare classes in another way, with its value."""
    return f"--drop-rare {least}" if name is None else f"--merge-rare {name}"


def require_classes(task: Task, flag: str) -> None:
    """Raise UserError for a flag of rare classes, unless a text has one class of several."""
    if task.kind != SINGLE:
        raise UserError(f"{flag}: it is for classes, and --task {task.kind} has none; leave it out")


def without_classes(
    split: str, rows: datasets.Dataset, rare: Sequence[str], names: Sequence[str], *, merged: str | None
) -> tuple[datasets.Dataset, list[Fault]]:
    """Return the rows (N) of a split without those of `rare` classes, or with these in the class
    `merged`, their labels being of the classes `names`; and the rows that are left out.
    """
    import datasets

    old = task_of_rows(rows).names
    labels = [old[label] for label in rows["label"][:]]
    left_out = [] if merged is not None else list(_rows_of_classes(split, rows, labels, rare))
    kept = [n for n, label in enumerate(labels) if merged is not None or label not in rare]
    some: Any = rows.select(kept)
    if not kept:  # the library adds no column to no rows
        return some, left_out
    numbers = [names.index(merged if labels[n] in rare else labels[n]) for n in kept]  # pyrefly: ignore
    feature = datasets.ClassLabel(names=list(names))
    changed = some.remove_columns("label").add_column("label", numbers, feature=feature)
    return changed.select_columns(rows.column_names), left_out


def _rows_of_classes(
    split: str, rows: datasets.Dataset, labels: Sequence[str], rare: Sequence[str]
) -> Iterator[Fault]:
    """Yield the rows whose labels (N) are rare classes."""
    for number in [number for number, label in enumerate(labels) if label in rare]:
        row = rows[number]
        cells = [row[column] for column in ("text", "text_pair") if column in row]
        content = " | ".join([*cells, labels[number]])
        yield Fault(f"split {split}", row["row"], "its class has too few texts in training", content)
