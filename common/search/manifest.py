"""What an index is made of: the settings that its embeddings share, and its files with their
checksums.

It is read and checked here with the standard library alone, so that mistakes are reported before the
libraries are loaded.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from common.errors import UserError, one_line, shorten
from common.files import LOCK, member, seal

FORMAT_NAME = "embed_search index"
FORMAT = f"{FORMAT_NAME} 2"
MANIFEST = "manifest.json"
ADVICE = "restore it from a copy, or index the texts into a new folder"  # for a damaged index


class Identity(TypedDict):
    """What embeddings must share to be compared; `model` is the name, for people."""

    model: str
    fingerprint: str
    width: int
    pooling: str
    max_length: int
    document_prompt: str | None  # given by a flag, None: the model's own


class Settings(Identity):
    """How an index is made; `chunk_overlap` is None for whole texts. `query_prompt` is what
    searches put before a query unless they say otherwise.
    """

    id_column: str | None
    chunk_overlap: int | None
    query_prompt: str | None
    store: str | None  # one of STORES, None: fp32


# the settings of an index, and the flag that must agree with each
CHECKED_SETTINGS = {
    "fingerprint": "--model",
    "width": "--model and --dimensions",
    "pooling": "--model",
    "max_length": "--max-length",
    "document_prompt": "--document-prompt",
    "id_column": "--id-column",
    "chunk_overlap": "--chunk and --chunk-overlap",
    "store": "--store",
}
# how the vectors of an index are kept, and the bits that each of their numbers takes
STORES = {"fp32": 32, "fp16": 16, "int8": 8, "binary": 1}


@dataclass(frozen=True)
class EncoderConfig:
    """Which model encodes, and how; None stands for the default."""

    model: str | None = None
    max_length: int | None = None
    batch_tokens: int | None = None
    cache_dir: str | None = None
    dimensions: int | None = None  # the first numbers of an embedding that are kept
    query_prompt: str | None = None  # what is put before each text, None: what the model says
    document_prompt: str | None = None

    def with_defaults(self, settings: Settings) -> "EncoderConfig":
        """Return the configuration with other defaults: those of an index."""
        prompts = (self.query_prompt, self.document_prompt)
        indexed = (settings["query_prompt"], settings["document_prompt"])
        query, document = (own if given is None else given for given, own in zip(prompts, indexed))
        return replace(
            self,
            model=self.model or settings["model"],
            max_length=self.max_length or settings["max_length"],
            query_prompt=query,
            document_prompt=document,
        )


@dataclass(frozen=True)
class Limits:
    """What evaluating a condition over the rows of an index may take."""

    seconds: float = 60.0
    megabytes: int = 2048


DEFAULT_LIMITS = Limits()
# of --pairs-file: here, because an existing file is checked before any library is loaded
PAIR_COLUMNS = ("first", "second", "similarity")
# of the file of --per-query, before its measures
PER_QUERY_COLUMNS = ("model", "fingerprint", "width", "texts_per_second", "query")


MILVUS = "milvus:"  # begins the name of an index in Milvus
MILVUS_INSTALL = "pip install pymilvus==3.0.2 milvus-lite==3.2.2"
MILVUS_NAME = re.compile(rf"{MILVUS}(?P<uri>.+)/(?P<collection>[A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True)
class Target:
    """A collection in Milvus: on a server, or in a folder of Milvus Lite for one process."""

    name: str  # as on the command line
    uri: str
    collection: str

    @property
    def is_file(self) -> bool:
        """Whether it is a folder of Milvus Lite, which calls it a file."""
        return "://" not in self.uri


def parse_target(name: str) -> Target:
    """Return the collection that a name stands for. Raises UserError for one that is none."""
    found = MILVUS_NAME.fullmatch(name)
    if not found:
        example = f"{MILVUS}http://localhost:19530/news or {MILVUS}folder.db/news"
        raise UserError(f"--index {name}: write {MILVUS}URI/COLLECTION, such as {example}")
    target = Target(name, found["uri"], found["collection"])
    if target.is_file and not target.uri.endswith(".db"):
        problem = "a folder of Milvus Lite ends with .db, and a server is http://..."
        raise UserError(f"--index {name}: {problem}")
    return target


class FileEntry(TypedDict):
    """A file that a manifest names: a segment, or the numbers of the rows deleted from one.

    `checksums` are those of the blocks, one after the other; `body` is where the bytes of the
    columns of a segment begin and end.
    """

    file: str
    rows: int
    sha256: str
    checksums: str
    body: NotRequired[list[int]]
    deleted: NotRequired["FileEntry | None"]  # in the entry of a segment


class Manifest(TypedDict):
    """The state of an index. `columns`: metadata column -> Arrow type, which is "null" where no row
    has a value; a segment may lack a column, or hold narrower numbers. `clusters`: those of them
    that `cluster` has made. `sha256` is the hash of all the rest, None while that is computed.
    """

    format: str
    generation: int  # the number of the state, one higher with each commit
    settings: Settings
    columns: dict[str, str]
    clusters: list[str]
    segments: list[FileEntry]
    sha256: str | None


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of an index. Raises UserError when it is missing or damaged."""
    path = folder / MANIFEST
    if not path.is_file():  # a pipe or a device is none either
        what = "not an index (it has no manifest.json)" if folder.exists() else "no such folder"
        raise UserError(
            f"--index {folder}: {what}; make one with: embed_search.py index TEXTS --index {folder}"
        )
    try:
        manifest = json.loads(member(folder, MANIFEST).read_bytes())
        is_index = manifest.get("format") == FORMAT
        if is_index and manifest["sha256"] != seal({**manifest, "sha256": None}):
            raise ValueError("its SHA-256 does not match its content")
    except (AttributeError, KeyError, RecursionError) as error:
        raise damaged(path, "it is not the manifest of an index") from error
    except ValueError as error:
        raise damaged(path, one_line(error)) from error
    if not is_index:
        raise UserError(f"--index {folder}: {_other_format(manifest.get('format'))}")
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise damaged(path, str(error)) from error
    return manifest


def _other_format(name: object) -> str:
    """Return what is wrong with a manifest of something else, or of another version."""
    if isinstance(name, str) and name.startswith(FORMAT_NAME):
        made = f"it was made by another version of this script ({shorten(name, 40)}, not {FORMAT})"
        return f"{made}; index its texts anew, into a new folder"
    return f"its manifest.json is not {FORMAT!r}; name another folder"


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError, saying what is wrong, unless a manifest says what a store writes: settings,
    columns, and files under the names that a store gives.
    """
    parts = ("settings", "columns", "clusters", "segments")
    settings, columns, clusters, segments = (manifest.get(name) for name in parts)
    if not isinstance(settings, dict):
        raise ValueError("settings are missing")
    check_values(settings)
    if not _is_count(manifest.get("generation")):
        raise ValueError("generation is no number")
    if not isinstance(columns, dict) or not all(isinstance(kind, str) for kind in columns.values()):
        raise ValueError("columns are missing")
    numbers = [name for name, kind in columns.items() if kind == "int64"]
    if not isinstance(clusters, list) or not all(name in numbers for name in clusters):
        raise ValueError("clusters are no columns of whole numbers")
    if not isinstance(segments, list):
        raise ValueError("segments are missing")
    for entry in segments:
        _check_entry(entry, "segment")
        if (deleted := entry.get("deleted")) is not None:
            _check_entry(deleted, "deleted")
            if deleted["rows"] > entry["rows"]:
                raise ValueError(f"{deleted['file']} has more rows than its segment")
    names = [entry["file"] for entry in segments]
    names += [entry["deleted"]["file"] for entry in segments if entry.get("deleted")]
    if len(set(names)) < len(names):
        raise ValueError("it names a file twice")


def check_values(settings: Mapping[str, Any]) -> None:
    """Raise ValueError, saying which one, for a setting that no index can have."""
    for name, is_valid in VALID_SETTINGS.items():
        if name not in settings:
            raise ValueError(f"the setting {name} is missing")
        if not is_valid(settings[name]):
            raise ValueError(f"the setting {name} is {shorten(repr(settings[name]), 40)}")


def _check_entry(entry: object, kind: str) -> None:
    """Raise ValueError unless an entry of a manifest names a file as a store does."""
    if not isinstance(entry, dict):
        raise ValueError(f"an entry of its {kind} files is {shorten(repr(entry), 40)}")
    file, digest = entry.get("file"), entry.get("sha256")
    pattern = rf"{kind}-[0-9]{{8,20}}-[0-9]{{4,20}}\.arrow"
    if not isinstance(file, str) or not re.fullmatch(pattern, file):
        raise ValueError(f"{shorten(repr(file), 60)} is not the name of a {kind} file of an index")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"the SHA-256 of {file} is missing")
    sums = entry.get("checksums")
    if not isinstance(sums, str) or not re.fullmatch("([0-9a-f]{16})*", sums):
        raise ValueError(f"the checksums of {file} are none")
    body = entry.get("body", [0, 0])
    is_pair = isinstance(body, list) and len(body) == 2 and all(map(_is_count, body))
    if not is_pair or body[0] > body[1]:
        raise ValueError(f"the body of {file} is {shorten(repr(body), 40)}")
    if not _is_count(entry.get("rows")) or not entry["rows"]:
        raise ValueError(f"the rows of {file} are {shorten(repr(entry.get('rows')), 40)}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**40


# the settings of an index, and what each can be
VALID_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "model": lambda value: isinstance(value, str),
    "fingerprint": lambda value: isinstance(value, str),
    "width": lambda value: _is_count(value) and value > 0,
    "pooling": lambda value: isinstance(value, str),
    "max_length": lambda value: _is_count(value) and value > 0,
    "document_prompt": lambda value: value is None or isinstance(value, str),
    "query_prompt": lambda value: value is None or isinstance(value, str),
    "store": lambda value: value is None or (isinstance(value, str) and value in STORES),
    "id_column": lambda value: value is None or isinstance(value, str),
    "chunk_overlap": lambda value: value is None or _is_count(value),
}


def store_of(settings: Settings) -> str:
    """Return how the vectors of an index are kept."""
    return settings["store"] or "fp32"


def bytes_of_vector(store: str, width: int) -> int:
    """Return the bytes that a vector takes."""
    return -(-STORES[store] * width // 8)


def damaged(path: Path, reason: str) -> UserError:
    """Return the mistake that a file of an index is damaged."""
    return UserError(f"{path}: damaged ({reason}); {ADVICE}")


def entries_of(manifest: Manifest) -> dict[str, FileEntry]:
    """Return the files that a manifest names, each with its entry."""
    entries = {}
    for entry in manifest["segments"]:
        entries[entry["file"]] = entry
        if deleted := entry.get("deleted"):
            entries[deleted["file"]] = deleted
    return entries


def num_live_rows(manifest: Manifest) -> int:
    """Return the number of rows that are not deleted."""
    deleted = [entry.get("deleted") for entry in manifest["segments"]]
    num_deleted = sum(part["rows"] for part in deleted if part)
    return sum(entry["rows"] for entry in manifest["segments"]) - num_deleted


def check_folder(folder: Path, *, new: bool) -> None:
    """Raise UserError unless a folder is an index or, with `new`, can become one: it is missing or
    empty.
    """
    if new and (not folder.exists() or _is_empty(folder)):
        return
    if folder.exists() and not (folder / MANIFEST).is_file():
        what = "holds other files but no index" if folder.is_dir() else "is a file"
        raise UserError(
            f"--index {folder}: it {what}; name a new folder or one made by: embed_search.py index"
        )
    check_files(folder)


def check_files(folder: Path) -> Manifest:
    """Return the manifest of an index. Raises UserError when that is missing or damaged, or when a
    file that it names is missing.
    """
    manifest = read_manifest(folder)
    while (missing := _missing(folder, manifest)) is not None:
        before, manifest = manifest, read_manifest(folder)
        if manifest["sha256"] == before["sha256"]:  # else a writer has committed meanwhile
            raise UserError(f"{missing}: a file of the index is missing; {ADVICE}")
    return manifest


def _missing(folder: Path, manifest: Manifest) -> Path | None:
    """Return the first file that a manifest names and that is missing. Raises UserError for one
    that is no file of this folder.
    """
    for name in entries_of(manifest):
        try:
            member(folder, name)
        except FileNotFoundError:
            return folder / name
        except (OSError, ValueError) as error:
            raise damaged(folder / MANIFEST, one_line(error)) from error
    return None


def _is_empty(folder: Path) -> bool:
    """Tell whether a folder has at most the files of a writer that never wrote its manifest, or has
    not yet: its rows are written before, in a folder with a lock.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    own = (f"{MANIFEST}.", "segment-") if LOCK in names else (f"{MANIFEST}.",)
    return all(name == LOCK or name.startswith(own) for name in names)


def check_settings(index: str, wanted: Mapping[str, object], settings: Settings) -> None:
    """Raise UserError when an index was made with other settings than those that are wanted now,
    which need not be all of them.
    """
    for name, flag in CHECKED_SETTINGS.items():
        if name in wanted and wanted[name] != settings.get(name):
            was, now = _describe_setting(name, settings), _describe_setting(name, wanted)
            problem = f"it was made {was}, not {now}; their embeddings or rows can't be compared"
            raise UserError(f"--index {index}: {problem}; give the same {flag}, or another --index")


def _describe_setting(name: str, settings: Mapping[str, object]) -> str:
    """Return how a setting reads in "it was made ...", such as "with max_length 256"."""
    value = settings.get(name)
    if name == "store":
        value = value or "fp32"
    if value is None:  # whole texts, or texts without ids
        flag, *_ = CHECKED_SETTINGS[name].split()
        return f"without {flag}"
    if name == "fingerprint":
        value = f"{settings['model']} ({str(value)[:12]})"
    return f"with {name} {value}"
