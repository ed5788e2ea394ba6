"""Texts, labelled or not, from a bundled set, a file, a folder or the Hub: read, choose splits, validate, cut, sample.

A labelled data set is a `datasets.DatasetDict` whose splits have the columns `text` (string), `label` (ClassLabel, one
frozen list of names for all splits) and `row` (the row's number in its source, counted from 1, so that a message or a
prediction can be traced back).
"""

import sys
from pathlib import Path

import datasets
import httpx2
import huggingface_hub.errors
import numpy as np
import pyarrow.compute
from sklearn.model_selection import train_test_split

from common import assets, hub
from common.errors import UserError, one_line

# pandas would read the texts "NA", "None" and "null" as missing; only a missing cell is missing here.
CSV_OPTIONS = {"keep_default_na": False}
FILE_READERS = {
    ".csv": ("csv", CSV_OPTIONS),
    ".tsv": ("csv", {**CSV_OPTIONS, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
SPLIT_SYNONYMS = {  # the names that public data sets use, in the order in which they are looked for
    "train": ["train", "training"],
    "validation": ["validation", "valid", "val", "dev"],
    "test": ["test"],
}
CUT_SHARE = 0.1  # of the source's training rows, for each split that is missing

datasets.disable_progress_bars()  # reading is quick or shows the Hub's own bar; the scripts show theirs


def read(name: str, *, config: str | None = None, cache_dir: str | None = None) -> datasets.DatasetDict:
    """Read a data set as it is: every split, every column.

    `name`: a bundled name; a CSV, TSV, JSON, JSONL or Parquet file (one split, `train`); a folder with one folder of
    .txt files per class, or with `train`, `validation`, `test` folders of such folders; a folder of data files named after
    their splits; a Hub id, with `config` where it has several. Raises UserError when it can't be found, reached or read.
    """
    path = Path(name)
    if assets.is_bundled(name):
        if name not in assets.DATASETS:
            raise UserError(f"--dataset {name}: no such bundled data set; there is {', '.join(assets.DATASETS)}")
        return datasets.DatasetDict(train=assets.DATASETS[name]())
    if path.is_file():
        return datasets.DatasetDict(train=read_file(path, cache_dir=cache_dir))
    if path.is_dir():
        return _read_folder(path, cache_dir)
    if path.suffix in FILE_READERS or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"--dataset {name}: no such file or folder")
    return _read_hub(name, config, cache_dir)


def read_file(path: Path, *, cache_dir: str | None = None) -> datasets.Dataset:
    """Read one data file by its ending, all columns. Raises UserError for an unknown ending, an empty or a broken file."""
    if path.suffix.lower() not in FILE_READERS:
        raise UserError(f"{path}: the ending {path.suffix!r} is not one of {', '.join(FILE_READERS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    builder, options = FILE_READERS[path.suffix.lower()]
    try:
        rows = datasets.load_dataset(builder, data_files=str(path), split="train", cache_dir=cache_dir, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise UserError(f"{path}: not readable as {builder}: {one_line(error.__cause__ or error)}") from error
    if len(rows) == 0:
        raise UserError(f"{path}: the file has no rows")
    return rows


def read_lines(name: str) -> list[str]:
    """Return the lines of a UTF-8 text file, or of standard input for "-". Raises UserError with the file and the line."""
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = content.decode("utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}, line {content[: error.start].count(10) + 1}: not UTF-8 (byte {content[error.start]:#04x})") from error
    if not lines:
        raise UserError(f"{'standard input' if name == '-' else name}: no texts in it")
    return lines


def read_texts(name: str, *, column: str, cache_dir: str | None) -> list[str]:
    """Return the texts of a data file's column, or the lines of any other file or of standard input ("-"), after checking each.

    Raises UserError, naming the row or line, for one that is missing or empty.
    """
    if Path(name).suffix.lower() in FILE_READERS:
        if not Path(name).is_file():
            raise UserError(f"{name}: no such file")
        rows = read_file(Path(name), cache_dir=cache_dir)
        if column not in rows.features:
            raise UserError(f"{name}: no column {column!r}; there is {', '.join(rows.column_names)}; name the right one with --text-column")
        check_texts(rows, column, place=name)
        return rows[column][:]
    lines = read_lines(name)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{name}, line {number}: the text is empty; remove the line")
    return lines


def _read_folder(root: Path, cache_dir: str | None) -> datasets.DatasetDict:
    if any(root.glob("*/*.txt")):
        return datasets.DatasetDict(train=_read_class_folders(root))
    splits = [path for path in sorted(root.iterdir()) if any(path.glob("*/*.txt"))]
    if splits:  # as in the IMDb archive: train/pos, train/neg, test/pos, test/neg
        return datasets.DatasetDict({path.name: _read_class_folders(path) for path in splits})
    try:
        return datasets.load_dataset(str(root), cache_dir=cache_dir)
    except (datasets.exceptions.DatasetGenerationError, datasets.exceptions.DataFilesNotFoundError, ValueError) as error:
        raise UserError(f"--dataset {root}: neither class folders of .txt files nor data files in it: {one_line(error.__cause__ or error)}") from error


def _read_class_folders(root: Path) -> datasets.Dataset:
    files = sorted(path for path in root.glob("*/*.txt") if not path.parent.name.startswith("."))
    texts = []
    for file in files:
        try:
            texts.append(file.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); convert it first") from error
        if not texts[-1].strip():
            raise UserError(f"{file}: the text is empty")
    return datasets.Dataset.from_dict({"text": texts, "label": [file.parent.name for file in files]})


def _read_hub(name: str, config: str | None, cache_dir: str | None) -> datasets.DatasetDict:
    hub.is_reachable()  # if not, what is cached is still used, and what is not fails at once
    try:
        found = datasets.load_dataset(name, config, cache_dir=cache_dir)
    except (datasets.exceptions.DatasetNotFoundError, huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError) as error:
        raise UserError(f"--dataset {name}: neither a local file or folder nor a data set on the Hub: {one_line(error)}") from error
    except (ConnectionError, httpx2.TransportError) as error:
        raise UserError(f"--dataset {name}: no such local file or folder, and the Hub can't be reached: {one_line(error)}; "
                        f"without a network use a local file or {', '.join(assets.DATASETS)}") from error
    except ValueError as error:
        if "config" not in str(error).lower():  # not about the choice of a configuration: a bug
            raise
        raise UserError(f"--dataset {name}: choose with --dataset-config: {one_line(error)}") from error
    except RuntimeError as error:
        if "script" not in str(error).lower():
            raise
        raise UserError(f"--dataset {name}: it needs remote code, which is never run here; use a Parquet version of it") from error
    return found


def choose_splits(found: datasets.DatasetDict, wanted: dict[str, str | None]) -> datasets.DatasetDict:
    """Return the splits under the names `train`, `validation` and `test`; one that is neither named nor there is left out.

    `wanted` gives the source's name for each, or None to look for the usual ones. Raises UserError for a name that is not there.
    """
    chosen = {}
    for split, name in wanted.items():
        candidates = [name] if name else SPLIT_SYNONYMS[split]
        present = next((candidate for candidate in candidates if candidate in found), None)
        if present:
            chosen[split] = found[present]
        elif name or split == "train":
            raise UserError(f"--{split}-split {candidates[0]}: no such split; there is {', '.join(map(str, found))}")
    return datasets.DatasetDict(chosen)


def validate(splits: datasets.DatasetDict, *, text_column: str, label_column: str, names: list[str] | None = None) -> datasets.DatasetDict:
    """Return the splits with the columns `text`, `label` and `row`, after checking every row.

    Labels may be strings, whole numbers, booleans or ClassLabel. The class names are `names` (those of a trained model), else
    those of the training split, sorted; those of ClassLabel keep their order. Raises UserError, naming split and row, for a missing column, a null or blank text, a missing label, a
    label that the training split lacks, or a training split with one class only.
    """
    for split, rows in splits.items():
        _check_columns(split, rows, [text_column, label_column])
        check_texts(rows, text_column, place=f"split {split}")
    labels = {split: _label_names(split, rows, label_column) for split, rows in splits.items()}
    if names is not None:
        seen, lack = set(names), "is not one of the model's classes"
    else:
        feature, seen, lack = splits["train"].features[label_column], set(labels["train"]), "does not occur in the training split"
        names = feature.names if isinstance(feature, datasets.ClassLabel) else sorted(seen, key=_natural_order)
        if len(seen) < 2:
            raise UserError(f"split train: every row has the label {labels['train'][0]!r}; a classifier needs at least two classes")
    for split, values in labels.items():
        unseen = next((row for row, label in enumerate(values) if label not in seen), None)
        if unseen is not None:
            raise UserError(f"split {split}, row {unseen + 1}: the label {values[unseen]!r} {lack} ({_listed(seen)}); correct or remove the row")
    return datasets.DatasetDict({split: _with_labels(rows, labels[split], names, text_column) for split, rows in splits.items()})


def check_texts(rows: datasets.Dataset, column: str, *, place: str):
    """Raise UserError, naming `place` and the row, unless each value of a column is a text with something in it."""
    if rows.features[column].dtype not in ("string", "large_string"):
        raise UserError(f"{place}: column {column!r} holds {rows.features[column].dtype}, not texts; name the right one with --text-column")
    for start, block in _blocks(rows, column):
        blank = pyarrow.compute.equal(pyarrow.compute.utf8_trim_whitespace(block), "").fill_null(True)
        row = pyarrow.compute.index(blank, True).as_py()
        if row >= 0:
            kind = "missing" if not block[row].is_valid else "empty"
            raise UserError(f"{place}, row {start + row + 1}: the text in column {column!r} is {kind}; remove the row or fill it in")


def _blocks(rows: datasets.Dataset, column: str):
    start = 0
    for table in rows.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        yield start, table[column]
        start += len(table)


def _check_columns(split: str, rows: datasets.Dataset, columns: list[str]):
    flags = dict(zip(columns, ["--text-column", "--label-column"]))
    for column in columns:
        if column not in rows.features:
            raise UserError(f"split {split}: no column {column!r}; there is {', '.join(rows.column_names)}; name the right one with {flags[column]}")
    if len(rows) == 0:
        raise UserError(f"split {split}: it has no rows")


def _label_names(split: str, rows: datasets.Dataset, column: str) -> list[str]:
    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        outside = [row for row, value in enumerate(values) if value is None or not 0 <= value < len(feature.names)]
        if outside:
            raise UserError(f"split {split}, row {outside[0] + 1}: the label {values[outside[0]]} is not one of the {len(feature.names)} classes; "
                            f"if this split has no labels, choose another with --{split}-split")
        return [feature.names[value] for value in values]
    if not (feature.dtype in ("string", "large_string", "bool") or "int" in feature.dtype):
        raise UserError(f"split {split}: column {column!r} holds {feature.dtype}; labels are strings or whole numbers")
    missing = [row for row, value in enumerate(values) if value is None or value == ""]
    if missing:
        raise UserError(f"split {split}, row {missing[0] + 1}: the label in column {column!r} is missing")
    return [str(value) for value in values]


def _listed(names) -> str:
    shown = sorted(names, key=_natural_order)
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "")


def _with_labels(rows: datasets.Dataset, labels: list[str], names: list[str], text_column: str) -> datasets.Dataset:
    index = {name: number for number, name in enumerate(names)}
    result = rows.select_columns([text_column]).rename_columns({text_column: "text"} if text_column != "text" else {})
    result = result.cast_column("text", datasets.Value("string"))
    result = result.add_column("label", [index[label] for label in labels], feature=datasets.ClassLabel(names=list(names)))
    return result.add_column("row", np.arange(1, len(rows) + 1))


def _natural_order(name: str):
    return (0, int(name), name) if name.lstrip("-").isdigit() else (1, 0, name)


def cut_missing_splits(splits: datasets.DatasetDict, *, seed: int) -> tuple[datasets.DatasetDict, list[str]]:
    """Cut each missing split from train: stratified, 10 % of the source's training rows, a function of the seed.

    Returns the three splits and the names of those that were cut. Raises UserError when a class has too few rows.
    """
    cut, rows = dict(splits), len(splits["train"])
    missing = [split for split in ("validation", "test") if split not in splits]
    for split in missing:
        size = max(round(rows * CUT_SHARE), splits["train"].features["label"].num_classes)
        cut["train"], cut[split] = stratified_cut(cut["train"], size, seed=seed, purpose=f"a {split} split")
    return datasets.DatasetDict({split: cut[split] for split in ("train", "validation", "test")}), missing


def stratified_cut(rows: datasets.Dataset, size: int, *, seed: int, purpose: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split off `size` rows with each class's share kept; both parts keep the source's order. Raises UserError if it can't be done."""
    labels = np.asarray(rows["label"][:])
    try:
        rest, part = train_test_split(np.arange(len(rows)), test_size=size, stratify=labels, random_state=seed)
    except ValueError as error:
        counts = np.bincount(labels, minlength=rows.features["label"].num_classes)
        name = rows.features["label"].names[int(np.argmin(np.where(counts > 0, counts, len(rows) + 1)))]
        raise UserError(f"can't cut {purpose} of {size} rows from {len(rows)}: class {name!r} has {counts[counts > 0].min()} rows ({one_line(error)}); "
                        "add rows, or give the split yourself") from error
    return rows.select(np.sort(rest)), rows.select(np.sort(part))


def limit(rows: datasets.Dataset, size: int | None, *, seed: int) -> datasets.Dataset:
    """Return a stratified sample of at most `size` rows, in the source's order; all rows when `size` is None."""
    if size is None or size >= len(rows):
        return rows
    return stratified_cut(rows, size, seed=seed, purpose="a sample")[1]


def count_shared_texts(splits: datasets.DatasetDict) -> dict[str, int]:
    """Count, for each split but train, the rows whose text stands in train too: their scores say little about new texts."""
    train = set(splits["train"]["text"])
    return {split: sum(text in train for text in rows["text"]) for split, rows in splits.items() if split != "train"}
