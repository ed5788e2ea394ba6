"""What is wrong with the rows of a data set, found in one look: rows that can't be used, by kind;
texts that are alike in several rows; classes that are rare.

The rows that can't even be read are collected by `common/reading.py`. Here are those whose text or
label can't be used. `clean` leaves both out.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common import reading
from common.errors import Fault, UserError, quoted, shorten
from common.sources import is_blank
from common.training.labels import (
    DECIMAL,
    FLAGS,
    LISTS,
    WHOLE,
    LabelConfig,
    cells_as_names,
    find_kind,
    is_number,
    separated,
    without_decimals,
)
from common.training.run import JOIN, MULTI, REGRESSION, SINGLE, Kind
from common.training.task import Task, task_of_rows

if TYPE_CHECKING:
    import datasets
    import scipy.sparse

    from common.training.data import Splits, TextConfig

NOT_UTF8 = "not UTF-8"
TYPICAL = 0.9  # share of the rows that tells what kind of labels a column has
SHOWN_ROWS, SHOWN_GROUPS = 5, 10
RARE = 10  # texts of a class in training, below which it is said


class Row(NamedTuple):
    """A row of labelled splits; its number is that of its source."""

    split: str
    number: int
    text: str
    label: Any


# Rows that can't be used --------------------------------------------------------------------------


def clean(
    splits: Splits, texts: TextConfig, labels: LabelConfig, faults: list[Fault], trained: Task | None
) -> tuple[Splits, LabelConfig]:
    """Return the splits without the rows whose text or label can't be used, which are added to
    `faults`, and the labels with the task that the other rows have.

    The columns must be there. Labels of other splits must occur in training, or be those of the
    task of a `trained` model.
    """
    kind = trained.kind if trained is not None else _kind(splits["train"], labels)
    problems = {
        split: [
            text or label
            for text, label in zip(
                text_problems(rows, texts), _label_problems(rows, kind, labels), strict=True
            )
        ]
        for split, rows in splits.items()
    }
    known = _known(splits, problems, kind, labels) if trained is None else set(trained.names)
    for split, rows in splits.items():
        if known is not None and (split != "train" or trained is not None):
            _mark_unknown(rows, problems[split], kind, labels, known)
        columns = [*texts.columns, *labels.columns]
        note_faults(f"split {split}", rows, problems[split], columns, faults)
        good: Any = rows.select([n for n, problem in enumerate(problems[split]) if not problem])
        splits = {**splits, split: good}
        if not len(splits[split]):
            problem = f"none of its {len(rows):,} rows can be used"
            raise UserError(f"split {split}: {problem}; --inspect lists why")
    return splits, LabelConfig(labels.label_column, kind, labels.label_separator)


def has_labels(rows: datasets.Dataset, labels: LabelConfig) -> bool:
    """Tell whether any row of a split has a label: in competitions none has, or -1 in each."""
    present = [column for column in labels.columns if column in rows.column_names]
    if len(present) < len(labels.columns):
        return False
    for column in present:
        if reading.kind(rows, column) in LISTS:
            return any(cell is not None for cell in rows[column][:])
        if any(
            not (value is None or is_blank(value) or value == "-1") for value in cells_as_names(rows, column)
        ):
            return True
    return False


def _kind(rows: datasets.Dataset, labels: LabelConfig) -> Kind:
    """Return the task of labels some of which may be wrong: that of those
    that are alike in nearly all rows.
    """
    kinds = [reading.kind(rows, column) for column in labels.columns]
    if labels.task != "auto" or any(kind in LISTS for kind in kinds):
        return find_kind(rows, labels)
    cells = list(zip(*(cells_as_names(rows, column) for column in labels.columns)))
    has_none = [any(cell is None or is_blank(cell) for cell in row) for row in cells]
    present = [number for number, is_missing in enumerate(has_none) if not is_missing]
    typical = present
    for is_typical in (_is_flag, _is_numeric) if len(labels.columns) > 1 else (_is_numeric,):
        alike_rows = [number for number in present if all(map(is_typical, cells[number]))]
        if len(alike_rows) >= TYPICAL * len(present):
            typical = alike_rows
            break
    some: Any = rows.select(typical)
    return find_kind(some, labels) if typical else SINGLE


def _is_flag(value: str) -> bool:
    return value.strip().lower() in FLAGS


def _is_numeric(value: str) -> bool:
    return DECIMAL.fullmatch(value) is not None or _is_flag(value)


def text_problems(rows: datasets.Dataset, texts: TextConfig) -> Iterator[str]:
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


def _row_problem(cells: Sequence[bytes | None], texts: TextConfig) -> str:
    try:
        parts = [None if cell is None else cell.decode() for cell in cells]
    except UnicodeDecodeError:
        return NOT_UTF8
    if texts.text_mode == JOIN:
        parts = reading.join_cells([[part] for part in parts], texts.join_with)
    return next(filter(None, map(text_problem, parts)), "")


def text_problem(text: str | None) -> str:
    """Return what is wrong with a text, "" if nothing is."""
    if text is None:
        return "the text is missing"
    if is_blank(text):
        return "the text is empty"
    if len(text) > reading.LONGEST_TEXT:
        return f"the text has more than {reading.LONGEST_TEXT:,} characters"
    return ""


def _label_problems(rows: datasets.Dataset, kind: Kind, labels: LabelConfig) -> list[str]:
    """Return what is wrong with the label of each row (N) on its own, "" if nothing is."""
    columns = labels.columns
    if len(columns) == 1 and reading.kind(rows, columns[0]) in LISTS:
        cells = rows[columns[0]][:]
        lengths = Counter(len(cell) for cell in cells if cell)
        usual = lengths.most_common(1)[0][0] if lengths else 0
        return [_list_problem(cell, kind, usual) for cell in cells]
    problems = [""] * len(rows)
    is_flag = kind == MULTI and labels.label_separator is None
    for column in columns:
        values = cells_as_names(rows, column)
        numeric = [value for value in values if value is not None and _is_flag(value)]
        flags = is_flag and (len(columns) > 1 or len(numeric) >= TYPICAL * len(values))
        for number, value in enumerate(values):
            problems[number] = problems[number] or _cell_problem(value, kind, labels, is_flag=flags)
    return problems


def _cell_problem(value: str | None, kind: Kind, labels: LabelConfig, *, is_flag: bool) -> str:
    if labels.label_separator is not None:
        return ""  # no label is a label there
    if value is None or is_blank(value):
        return "the label is missing"
    if kind == REGRESSION and not is_number(value):
        return "the label is no number"
    if is_flag and not _is_flag(value):
        return "the label is neither 0 nor 1"
    return ""


def _list_problem(cell: list | None, kind: Kind, usual: int) -> str:
    if cell is None or any(item is None or is_blank(str(item)) for item in cell):
        return "the label is missing"
    if kind == REGRESSION and len(cell) != usual:
        return f"the label has another count of numbers than {usual}"
    if kind == REGRESSION and not all(map(is_number, cell)):
        return "the label is no number"
    return ""


def _names_of(rows: datasets.Dataset, kind: Kind, labels: LabelConfig) -> list[list[str]] | None:
    """Return the names of labels in each row (N), None where names are of columns or numbers."""
    if kind == REGRESSION or len(labels.columns) > 1:
        return None
    [column] = labels.columns
    if reading.kind(rows, column) in LISTS:
        return None  # their names are in the type, or counted
    values = cells_as_names(rows, column)
    if labels.label_separator is not None:
        return separated(values, labels.label_separator)
    if kind == MULTI:
        return None
    return [[] if value is None else [value] for value in values]


def _known(
    splits: Splits, problems: dict[str, list[str]], kind: Kind, labels: LabelConfig
) -> set[str] | None:
    """Return the names of the training labels that can be used; None where they are not names."""
    names = _names_of(splits["train"], kind, labels)
    if names is None:
        return None
    known = {name for row, problem in zip(names, problems["train"]) if not problem for name in row}
    return set(map(without_decimals, known)) if all(map(WHOLE.fullmatch, known)) else known


def _mark_unknown(
    rows: datasets.Dataset, problems: list[str], kind: Kind, labels: LabelConfig, known: set[str]
) -> None:
    names = _names_of(rows, kind, labels)
    for number, row in enumerate(names or []):
        unknown = [name for name in row if known.isdisjoint((name, without_decimals(name)))]
        if unknown and not problems[number]:
            problems[number] = "the label does not occur in training"


def note_faults(
    source: str, rows: datasets.Dataset, problems: list[str], columns: Sequence[str], faults: list[Fault]
) -> None:
    """Add the rows (N) with a problem to the faults, with what is in their `columns`."""
    has_numbers = reading.ROW in rows.column_names
    for number, problem in enumerate(problems):
        if problem:
            part: Any = rows.select_columns([*columns, *([reading.ROW] if has_numbers else [])])
            cells = part.with_format("arrow")[number : number + 1]
            row = cells[reading.ROW][0].as_py() if has_numbers else number + 1
            content = " | ".join(_readable(cells[column][0]) for column in columns)
            faults.append(Fault(source, row, problem, content))


def _readable(cell: Any) -> str:
    try:
        value = cell.as_py()
    except UnicodeDecodeError:
        return cell.as_buffer().to_pybytes().decode("utf-8", "backslashreplace")
    return "" if value is None else str(value)


def fault_table(faults: Sequence[Fault]) -> str:
    """Return the kinds of faults as a table: how many rows, and the first of them."""
    from tabulate import tabulate

    kinds: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        kinds.setdefault((fault.problem, fault.source), []).append(fault)
    lines = []
    for (problem, source), found in kinds.items():
        rows = ", ".join(str(fault.row) for fault in found[:SHOWN_ROWS])
        more = ", ..." if len(found) > SHOWN_ROWS else ""
        example = shorten(found[0].content, 40)
        line = [shorten(problem, 60), shorten(source, 60), f"{len(found):,}", rows + more]
        lines.append([*line, example])
    headers = ["what is wrong", "where", "rows", "first rows", "the first holds"]
    sides = ("left", "left", "right", "left", "left")
    return tabulate(lines, headers, disable_numparse=True, colalign=sides)


# Texts that are alike, and rare classes -----------------------------------------------------------


def alike(text: str) -> str:
    """Return what is left of a text when only its letters and digits count, and no capitals."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", plain)) or plain


def similar_texts(splits: Splits) -> dict[str, list[Row]]:
    """Return all rows in groups whose texts are alike, by what is alike in them."""
    groups: dict[str, list[Row]] = {}
    for split, rows in splits.items():
        pairs = rows["text_pair"][:] if "text_pair" in rows.column_names else [""] * len(rows)
        numbers, texts, labels = (rows[name][:] for name in ("row", "text", "label"))
        for number, text, pair, label in zip(numbers, texts, pairs, labels):
            key = f"{alike(text)}\0{alike(pair)}" if pair else alike(text)
            groups.setdefault(key, []).append(Row(split, number, text, label))
    return groups


# Texts that are nearly alike. They are compared by the pairs of neighbouring words that they hold,
# as sets: the similarity of two texts is the share of the pairs that both hold among those that any
# of them holds (Jaccard's). From NEAR on they are shown: of 19 words, one may be another.
NEAR = 0.8
SKETCH = 128  # pairs of words that are looked at in a text: those with the lowest hashes, at random
MOST_COMPARED = 200_000  # texts: 100,000 of 120 words took a minute and 600 MB
HASHES = 2**31 - 1  # different ones
NEIGHBOURS = 20  # so many of the texts that share a pair are compared, which bounds the work
SHINGLE_BLOCK = 2000  # texts whose pairs of words are in memory at the same time
# each Han character and each kana is a word: nothing parts the words of Chinese and Japanese
WORD = r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+"


def word_pairs(texts: Sequence[str]) -> scipy.sparse.csr_array:
    """Return which pairs of neighbouring words, by their hashes, each text holds: a sparse matrix
    with a row for each text and at most SKETCH ones in it, those of its lowest hashes.
    """
    import scipy.sparse
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(
        lowercase=False,
        token_pattern=WORD,
        ngram_range=(2, 2),
        n_features=HASHES,
        alternate_sign=False,
        norm=None,  # pyrefly: ignore [bad-argument-type]
        binary=True,
        dtype=np.uint8,
    )
    values, lengths = [np.empty(0, np.int64)], []
    for start in range(0, len(texts), SHINGLE_BLOCK):
        block: Any = hashing.transform(texts[start : start + SHINGLE_BLOCK])
        block.sort_indices()
        for first, last in itertools.pairwise(block.indptr):
            own = block.indices[first : min(last, first + SKETCH)]
            values.append(own.astype(np.int64))
            lengths.append(len(own))
    indices = np.concatenate(values)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ones = np.ones(len(indices), np.uint8)
    return scipy.sparse.csr_array((ones, indices, starts), shape=(len(texts), HASHES))


def nearly_alike(texts: Sequence[str]) -> list[tuple[int, int, float]]:
    """Return pairs of texts (N) that share at least NEAR of their pairs of words, each as two
    numbers of texts and their similarity, the most similar first.

    Of texts with at most SKETCH pairs the similarity is exact; of others it is that of a
    random sample. Two such texts share one of their rarest pairs (Bayardo et al. 2007,
    "Scaling up all pairs similarity search"): only texts that do are compared. Where more than
    NEIGHBOURS share one, each is compared with that many, so that the work grows with the
    number of texts and not with its square.
    """
    sketches = word_pairs(texts)
    lengths = np.diff(sketches.indptr)  # (N)
    candidates = _share_a_rare_pair(sketches.indices, lengths)  # (P, 2)
    found = []
    for start in range(0, len(candidates), SHINGLE_BLOCK * 10):
        block = candidates[start : start + SHINGLE_BLOCK * 10]
        similarity = _similarity(sketches, block)
        is_near = similarity >= NEAR
        found += zip(*block[is_near].T.tolist(), similarity[is_near].tolist())
    return sorted(found, key=lambda pair: (-pair[2], pair[0], pair[1]))


def _share_a_rare_pair(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the pairs of texts (P, 2) that share one of their rarest values: of the values of all
    texts in their order, and how many each text has (N).
    """
    texts = np.repeat(np.arange(len(lengths)), lengths)
    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.lexsort((numbers, counts[numbers], texts))  # in each text the rarest first
    # of n values, two similar sets share NEAR * n, so one is among the n - NEAR * n + 1 rarest; two
    # samples of sets of which one is larger may share only NEAR times as many
    shared = np.where(lengths < SKETCH, NEAR, NEAR**2) * lengths
    rarest = lengths - np.ceil(shared - 1e-9).astype(int) + 1
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(texts)) - np.repeat(starts, lengths)
    order = order[(place < np.repeat(rarest, lengths)) & (counts[numbers[order]] > 1)]
    numbers, texts = numbers[order], texts[order]
    order = np.lexsort((texts, numbers))
    numbers, texts = numbers[order], texts[order]
    found = np.empty(0, np.int64)
    for distance in range(1, NEIGHBOURS + 1):
        both = numbers[:-distance] == numbers[distance:]
        pairs = texts[:-distance][both] * len(lengths) + texts[distance:][both]
        found = np.union1d(found, pairs)
    return np.stack(np.divmod(found, max(len(lengths), 1)), axis=1)


def _similarity(sketches: scipy.sparse.csr_array, pairs: np.ndarray) -> np.ndarray:
    """Return the similarity (P) of pairs of texts (P, 2), by hashes that both sketches cover."""
    first, second = pairs.T
    matrix: Any = sketches
    shared = matrix[first].multiply(matrix[second]).astype(np.int64).sum(axis=1)
    ends = sketches.indptr[1:]
    lengths = np.diff(sketches.indptr)
    last = np.where(lengths < SKETCH, HASHES, sketches.indices[np.maximum(ends - 1, 0)])  # (N)
    limit = np.minimum(last[first], last[second])
    # the hashes of all texts in one ascending order
    numbers = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    keys = numbers * (HASHES + 1) + sketches.indices
    sizes = [
        np.searchsorted(keys, texts * (HASHES + 1) + limit, side="right") - sketches.indptr[texts]
        for texts in (first, second)
    ]
    return shared / (sizes[0] + sizes[1] - shared)


def near_lines(groups: dict[str, list[Row]], task: Task) -> list[str]:
    """Return lines on the texts that are nearly alike, of groups of rows whose texts are alike."""
    # of those, one for each split and label
    members = [(key, row) for key, group in groups.items() for row in group]
    rows = {(key, row.split, str(row.label)): (key, row) for key, row in members}
    keys, rows = zip(*rows.values())
    if len(keys) > MOST_COMPARED:
        count = f"{len(keys):,} are more than {MOST_COMPARED:,}"
        return [f"not looked for: nearly alike texts, because {count}"]
    pairs = [
        Alike([rows[first], rows[second]], f"{similarity:.2f} alike: ")
        for first, second, similarity in nearly_alike(keys)
        if keys[first] != keys[second]
    ]
    contradictory, across, within = _by_relation(pairs)
    kinds = {
        "nearly alike and have different labels": contradictory,
        "nearly alike in several splits": across,
        "nearly alike within a split": within,
    }
    lines = []
    for what, found in kinds.items():
        count = len({(row.split, row.number) for pair in found for row in pair.rows})
        lines += _alike_lines(what, count, found, task)
    return lines


class Alike(NamedTuple):
    """Rows whose texts are alike, and what is said of these before the first of them is shown."""

    rows: list[Row]
    remark: str = ""


def _by_relation(groups: Iterable[Alike]) -> tuple[list[Alike], list[Alike], list[Alike]]:
    """Return the groups that have different labels, those of the others that lie in several splits,
    and those within a split.
    """
    contradictory, across, within = [], [], []
    for group in groups:
        first = group.rows[0]
        if any(row.label != first.label for row in group.rows):
            contradictory.append(group)
        elif any(row.split != first.split for row in group.rows):
            across.append(group)
        else:
            within.append(group)
    return contradictory, across, within


def _alike_lines(what: str, count: int, found: list[Alike], task: Task) -> list[str]:
    """Return lines on how many texts are alike in some way, and on the first groups of them."""
    if not found:
        return []
    shown = [
        f"  {_group_line(group.rows, task)}: {group.remark}{shorten(group.rows[0].text, 60)}"
        for group in found[:SHOWN_GROUPS]
    ]
    return [f"texts that are {what}: {count:,}", *shown, *["  ..."] * (len(found) > SHOWN_GROUPS)]


def describe(splits: Splits) -> str:
    """Return what else to know of labelled splits: alike texts, contradictions, rare classes."""
    from common.training.data import near_equal_names

    task = task_of_rows(splits["train"])
    lines = []
    for names in near_equal_names(task.names):
        both = " and ".join(map(quoted, names))
        lines.append(f"nearly the same name: {both}; if one is meant, correct it")
    groups = similar_texts(splits)
    several = (Alike(rows) for rows in groups.values() if len(rows) > 1)
    contradictory, across, within = _by_relation(several)
    kinds = {
        "alike and have different labels": contradictory,
        "alike in several splits: their scores say little about new texts": across,
        "alike within a split": within,
    }
    for what, found in kinds.items():
        lines += _alike_lines(what, len(found), found, task)
    lines += near_lines(groups, task)
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


def _group_line(group: Sequence[Row], task: Task) -> str:
    rows = ", ".join(
        f"{split} row {row} ({_label(label, task)})" for split, row, _, label in group[:SHOWN_ROWS]
    )
    more = f", ... ({len(group):,} in all)" if len(group) > SHOWN_ROWS else ""
    return rows + more


def _label(label: Any, task: Task) -> str:
    if task.kind == SINGLE:
        return shorten(task.names[label], 30)
    if task.kind == MULTI:
        return shorten(", ".join(task.names[number] for number in label) or "no label", 30)
    return ", ".join(f"{value:g}" for value in label.values())


def without_rare(splits: Splits, least: int | None, name: str | None) -> tuple[Splits, list[str]]:
    """Return the splits without the classes that have fewer than `least` texts in training (None:
    RARE), or with one class `name` in their place; and these classes.

    Raises UserError for another task than one class of several, and when one class is left.
    """
    import datasets

    task = task_of_rows(splits["train"])
    flag = f"--drop-rare {least}" if name is None else f"--merge-rare {name}"
    if task.kind != SINGLE:
        raise UserError(f"{flag}: it is for classes, and --task {task.kind} has none; leave it out")
    counts = np.bincount(splits["train"]["label"][:], minlength=len(task.names))
    few = [task.names[n] for n, count in enumerate(counts) if count < (least or RARE)]
    rare = [label for label in few if label != name]
    if not rare:
        return splits, []
    names = [label for label in task.names if label not in rare]
    if name is not None and name not in names:
        names.append(name)
    if len(names) < 2:
        problem = f"it leaves {len(names)} class"
        raise UserError(f"{flag}: {problem}; a classifier needs two, so use less")
    feature, result = datasets.ClassLabel(names=names), {}
    for split, rows in splits.items():
        labels = [task.names[label] for label in rows["label"][:]]
        kept = [n for n, label in enumerate(labels) if name is not None or label not in rare]
        if not kept:
            raise UserError(f"{flag}: it leaves no row of split {split}; use less")
        numbers = [names.index(name if labels[n] in rare else labels[n]) for n in kept]  # pyrefly: ignore
        order = rows.column_names
        some: Any = rows.select(kept)
        changed = some.remove_columns("label").add_column("label", numbers, feature=feature)
        result[split] = changed.select_columns(order)
    return result, rare
