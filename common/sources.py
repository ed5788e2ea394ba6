"""What a name on the command line stands for: a bundled default, a local file or folder, or
something on the Hugging Face Hub.

The checks need nothing but the file system, and importing this file is quick: the scripts make
them before they load PyTorch. The libraries that download are imported when they are needed.
"""

import glob
import os
import stat
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import bundled, hub, model_files
from common.errors import UserError, first_repeated, shorten

GGUF_SUFFIX = ".gguf"
SAVED_TO_DISK = ("dataset_dict.json", "dataset_info.json")  # in a folder by save_to_disk of `datasets`
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
DATA_SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES, ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".rar", ".7z")
OFFICE_SUFFIXES = (".xlsx", ".xls", ".ods", ".docx", ".doc", ".odt")
# a text of nothing but these is empty: spaces, control characters, and those of format, such as a
# byte order mark or a space of no width
INVISIBLE = ("Cc", "Cf")  # categories of Unicode
BLANK = r"^[\s\p{Z}\p{Cc}\p{Cf}]*$"  # as Arrow writes it; see is_blank
EVERY_COLUMN = "*"  # among columns that stay as they are written: all of them
FASTTEXT_LABEL = "__label__"  # each line of fastText's files begins with it
# files of a Hub model that are downloaded: no code; pickles only where there is nothing else
FILES_READ = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# the models on the Hub that belong to no organization: sentence-transformers takes any other name
# without one for that of a model of its own
WITHOUT_ORGANIZATION = """
albert-base-v1 albert-base-v2 albert-large-v1 albert-large-v2 albert-xlarge-v1 albert-xlarge-v2
albert-xxlarge-v1 albert-xxlarge-v2 bert-base-cased-finetuned-mrpc bert-base-cased bert-base-chinese
bert-base-german-cased bert-base-german-dbmdz-cased bert-base-german-dbmdz-uncased
bert-base-multilingual-cased bert-base-multilingual-uncased bert-base-uncased
bert-large-cased-whole-word-masking-finetuned-squad bert-large-cased-whole-word-masking
bert-large-cased bert-large-uncased-whole-word-masking-finetuned-squad
bert-large-uncased-whole-word-masking bert-large-uncased camembert-base ctrl
distilbert-base-cased-distilled-squad distilbert-base-cased distilbert-base-german-cased
distilbert-base-multilingual-cased distilbert-base-uncased-distilled-squad
distilbert-base-uncased-finetuned-sst-2-english distilbert-base-uncased distilgpt2
distilroberta-base gpt2-large gpt2-medium gpt2-xl gpt2 openai-gpt roberta-base-openai-detector
roberta-base roberta-large-mnli roberta-large-openai-detector roberta-large t5-11b t5-3b t5-base
t5-large t5-small transfo-xl-wt103 xlm-clm-ende-1024 xlm-clm-enfr-1024 xlm-mlm-100-1280
xlm-mlm-17-1280 xlm-mlm-en-2048 xlm-mlm-ende-1024 xlm-mlm-enfr-1024 xlm-mlm-enro-1024
xlm-mlm-tlm-xnli15-1024 xlm-mlm-xnli15-1024 xlm-roberta-base
xlm-roberta-large-finetuned-conll02-dutch xlm-roberta-large-finetuned-conll02-spanish
xlm-roberta-large-finetuned-conll03-english xlm-roberta-large-finetuned-conll03-german
xlm-roberta-large xlnet-base-cased xlnet-large-cased
""".split()  # noqa: SIM905

# Without this, the progress bars of libraries would stay on the screen when their work is done.
# tqdm reads its defaults from such variables when it is imported; an empty one is False.
os.environ["TQDM_LEAVE"] = ""
# Without this, transformers sends the name of a model without safetensors, and the user's token,
# to a conversion service on the Hub and waits for it.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"


# Models -------------------------------------------------------------------------------------------


def find_folder(
    name: str,
    *,
    kind: bundled.Kind,
    flag: str = "--model",
    cache_dir: str | None = None,
    organization: str | None = None,
    revision: str | None = None,
) -> Path:
    """Return the local folder of a model: a bundled name, a folder, or a Hub id, which is
    downloaded first; a language model can also be a GGUF file.

    `kind` says which bundled models are meant, and `organization` whose model on the Hub is meant
    by a name alone, such as all-MiniLM-L6-v2; `revision` is a commit, branch or tag there. Of
    weights that are only pickled it is the folder of their conversion. Raises UserError, naming
    `flag`, when there is no such model, it can't be reached, or its pickled weights are refused.
    """
    check_model(name, kind=kind, flag=flag)
    if bundled.is_bundled(name):
        return bundled.model_folder(name, kind=kind, flag=flag, cache_dir=cache_dir)
    folder = Path(name)
    if folder.is_file():
        return folder
    if not folder.exists():
        is_short = "/" not in name and name.lower() not in WITHOUT_ORGANIZATION
        if organization is not None and is_short:
            name = f"{organization}/{name}"
        folder = _downloaded(name, kind=kind, flag=flag, cache_dir=cache_dir, revision=revision)
    from common import pickled_weights  # it loads what no mistake needs

    return pickled_weights.converted_model(folder, f"{flag} {name}", cache_dir=cache_dir)


def _downloaded(
    name: str, *, kind: bundled.Kind, flag: str, cache_dir: str | None, revision: str | None
) -> Path:
    """Return the folder of a model of the Hub, pickled weights only where there are no others."""

    def pickled_only(folder: Path) -> list[str]:
        model_files.check(folder, f"{flag} {name}")
        parts = model_files.parts_without_weights(folder, f"{flag} {name}")
        return [f"{part}{file}" for part in parts for file in model_files.PICKLED_FILES]

    # the Hub may be what can't be reached
    bundled_names = f" or {bundled.names(kind)}" if kind in bundled.MODELS.values() else f" of a {kind}"
    others = f"a local folder{bundled_names}"
    folder = hub.download(
        name,
        FILES_READ,
        pickled_only,
        flag=flag,
        what="a model",
        others=others,
        cache_dir=cache_dir,
        revision=revision,
    )
    model_files.check(folder, f"{flag} {name}")
    return folder


def check_model(name: str, *, kind: bundled.Kind, flag: str = "--model") -> None:
    """Raise UserError, naming `flag`, for a name that can be no model as far as this machine's
    files show: a bundled name that does not exist, a file, a folder without a usable model.
    """
    if bundled.is_bundled(name):
        bundled.check_model(name, kind=kind, flag=flag)
        return
    folder = Path(name)
    try:
        mode = folder.stat().st_mode if name else None
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:  # too long, a loop of links, no permission, a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{flag} {name}: can't be read: {reason}; check the path") from error
    if mode is not None and stat.S_ISDIR(mode):
        best = folder / "best"
        # os.path.isfile is False where a folder can't be entered; the check after it says so
        if os.path.isfile(best / model_files.CONFIG) and not any(folder.glob("*.safetensors")):
            raise UserError(f"{flag} {name}: this is the folder of a run; its model is {best}")
        model_files.check(folder, f"{flag} {name}")
    elif mode is not None and kind == "language model" and folder.suffix.lower() == GGUF_SUFFIX:
        return
    elif mode is not None:
        or_file = f", or a file that ends with {GGUF_SUFFIX}" if kind == "language model" else ""
        raise UserError(f"{flag} {name}: this is a file; name the folder of a saved model{or_file}")
    elif folder.is_symlink():
        target = os.readlink(folder)
        raise UserError(f"{flag} {name}: a link to {target}, which does not exist; check it")
    elif not name or name.startswith((".", "/")) or name.count("/") > 1:
        advice = f"check the path, or use {bundled.names(kind)}"
        raise UserError(f"{flag} {name}: no such folder; {advice}")


def check_adapter(name: str) -> None:
    """Raise UserError for a name that is no LoRA adapter, as far as this machine's files show."""
    source = f"--adapter {name}"
    kind = kind_of_path(name) if name else "nothing"
    if kind == "folder":
        model_files.check_adapter(Path(name), source)
    elif kind != "nothing":
        raise UserError(f"{source}: this is a file; name the folder of a LoRA adapter")
    elif not name or name.startswith((".", "/")) or name.count("/") != 1:
        raise UserError(f"{source}: no such folder; check the path")


def find_adapter(name: str, *, cache_dir: str | None) -> Path:
    """Return the local folder of a LoRA adapter: a folder, or one on the Hub, which is downloaded
    first, pickled weights only where there are no others. Raises UserError when there is none.
    """
    check_adapter(name)
    if Path(name).exists():
        return Path(name)

    def pickled_only(folder: Path) -> list[str]:
        has_weights = (folder / model_files.ADAPTER_WEIGHTS).exists()
        return [] if has_weights else [model_files.ADAPTER_PICKLE]

    files = [model_files.ADAPTER_CONFIG, model_files.ADAPTER_WEIGHTS]
    folder = hub.download(
        name,
        files,
        pickled_only,
        flag="--adapter",
        what="an adapter",
        others="a local one",
        cache_dir=cache_dir,
    )
    model_files.check_adapter(folder, f"--adapter {name}")
    return folder


# Texts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileOptions:
    """How a data file is written, where its name and its content leave it open; the fields are
    named as their flags.
    """

    columns: tuple[str, ...] | None = None  # the names, for a file without a header
    delimiter: str | None = None  # None: found out
    quoting: Literal["auto", "csv", "none"] = "auto"
    encoding: str | None = None  # None: UTF-8
    decimal: str = "."  # what stands before the decimals of numbers in a table with a delimiter

    @property
    def is_table(self) -> bool:
        """Whether they make any file a table with a delimiter, whatever its ending."""
        return self.columns is not None or self.delimiter is not None


def suffix(name: str | Path) -> str:
    """Return the ending of a file name in lower case, without that of a compression: ".csv" for
    rows.CSV.gz.
    """
    path = Path(name)
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix.lower()


def kind_of_path(name: str | Path) -> Literal["file", "folder", "pipe", "nothing"]:
    """Return what a path is. Raises UserError for one that can't be looked at, such as a dangling
    link, and for a device or socket, from which no data set comes.
    """
    shown = shorten(str(name), 200)
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.islink(name):
            target = os.readlink(name)
            problem = f"a link to {target}, which is not there"
            raise UserError(f"{shown}: {problem}; correct the link") from error
        return "nothing"
    except OSError as error:
        raise UserError(f"{shown}: can't be read: {error.strerror}; name another file") from error
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISFIFO(mode):
        return "pipe"
    what = "a socket" if stat.S_ISSOCK(mode) else "a device"
    raise UserError(f"{shown}: this is {what}; name a file, or - for standard input")


def check_data(name: str, *, flag: str = "--dataset", any_suffix: bool = False) -> None:
    """Raise UserError, naming `flag`, for a name that can be no data set as far as this machine's
    files show. `any_suffix`: flags say how a file is written, whatever its ending.
    """
    path = Path(name)
    if bundled.is_bundled(name):
        if name not in bundled.DATASETS:
            known = ", ".join(bundled.DATASETS)
            raise UserError(f"{flag} {name}: no such bundled data set; use {known}")
        return
    kind = kind_of_path(name) if name else "nothing"
    if kind in ("file", "pipe"):
        check_data_file(path, any_suffix=any_suffix)
    elif kind == "folder" and any(os.path.isfile(path / name) for name in SAVED_TO_DISK):
        problem = "this is a data set of the library datasets, written by save_to_disk"
        advice = 'write each split as a file first: load_from_disk(...)["train"].to_parquet("train.parquet")'
        raise UserError(f"{flag} {name}: {problem}; {advice}")
    elif kind == "nothing":
        is_local = path.is_absolute() or name.startswith(".") or name.count("/") > 1  # never a Hub id
        if not name or is_local or suffix(path) in DATA_SUFFIXES:
            raise UserError(f"{flag} {name}: no such file or folder; check the path")


def expanded(names: Iterable[str]) -> list[str]:
    """Return the names of sources, with the files that a pattern such as "part-*.jsonl" stands for,
    sorted, in its place. Raises UserError for a pattern without files, a source that is named
    twice, and standard input among others.
    """
    found = []
    for name in names:
        is_pattern = any(sign in name for sign in "*?[") and not os.path.exists(name)
        matches = sorted(glob.glob(name, recursive=True)) if is_pattern else [name]
        if not matches:
            raise UserError(f"TEXTS {name}: no file has such a name; check the pattern")
        found += matches
    twice = first_repeated(found)
    if twice is not None:
        raise UserError(f"TEXTS {twice}: it is named twice; name each source once")
    if "-" in found and len(found) > 1:
        raise UserError("TEXTS -: standard input can't be one of several; save it to a file")
    return found


def check_texts(name: str, *, any_suffix: bool = False) -> None:
    """Raise UserError unless a name can be a data file, a text file with one text per line, or "-"
    for standard input. `any_suffix`: flags say how a data file is written, whatever its ending.
    """
    if name == "-":
        return
    if not any_suffix and suffix(name) not in DATA_SUFFIXES:
        check_text_file(name)
    elif kind_of_path(name) == "nothing":
        raise UserError(f"{name}: no such file; check the path")
    else:
        check_data_file(Path(name), any_suffix=any_suffix)


def check_data_file(path: Path, *, any_suffix: bool = False) -> None:
    """Raise UserError for a data file with an unknown ending, without permission to read it, or
    empty. A pipe can only be looked at by reading it.
    """
    kind = kind_of_path(path)
    if kind == "folder":
        raise UserError(f"{path}: this is a folder; name a file in it")
    if suffix(path) not in DATA_SUFFIXES and not any_suffix and not is_fasttext(path):
        known = ", ".join(DATA_SUFFIXES)
        advice = "convert it, or read a table with --delimiter comma, and without a header with --columns"
        if path.suffix.lower() in ARCHIVE_SUFFIXES:
            advice = "unpack it first"
        elif path.suffix.lower() in OFFICE_SUFFIXES:
            advice = "save its table as .csv"
        problem = f"the file name ends with {path.suffix!r}, not with one of {known}"
        raise UserError(f"{path}: {problem}; {advice}")
    if not os.access(path, os.R_OK):
        advice = "change that with chmod or name another file"
        raise UserError(f"{path}: no permission to read it; {advice}")
    if kind == "file" and path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; name one that has rows")


def is_fasttext(path: Path) -> bool:
    """Return whether a file begins with fastText's mark of a label."""
    if kind_of_path(path) != "file" or not os.access(path, os.R_OK):
        return False
    with open(path, "rb") as file:
        return file.read(len(FASTTEXT_LABEL)) == FASTTEXT_LABEL.encode()


def check_text_file(name: str) -> None:
    """Raise UserError unless a name is "-", a pipe, or a text file that can be opened and is not
    empty.

    A pipe, as in `--predict <(command)`, is left alone: it has no size, and whoever writes into it
    would notice that it was opened and closed.
    """
    if name == "-" or (name and kind_of_path(name) == "pipe"):
        return
    try:
        with open(name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        shown, hint = name or "the empty name", "name a text file, or - for standard input"
        raise UserError(f"{shown}: can't be read: {error.strerror}; {hint}") from error
    if size == 0:
        raise UserError(f"{name}: it is empty; write one text on each line")


def is_blank(text: str) -> bool:
    """Return whether a text has nothing that could be seen."""
    return all(sign.isspace() or unicodedata.category(sign) in INVISIBLE for sign in text)


def check_query(text: str, location: str) -> None:
    """Raise UserError, naming `location`, unless a text from the command line or a prompt can be
    encoded.
    """
    if is_blank(text):
        raise UserError(f"{location}: the text is empty; write something in it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{location}: not UTF-8 (character {error.start + 1}); convert it to UTF-8 first"
        ) from error
