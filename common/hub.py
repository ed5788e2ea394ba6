"""The Hugging Face Hub: models, adapters and data sets, downloaded or, where it can't be reached, from
the cache.

The libraries that download are imported when they are needed: importing this file is quick.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common import bundled
from common.errors import UserError, note, one_line

if TYPE_CHECKING:
    import datasets

CONNECT_SECONDS = 5.0
COMMIT = re.compile(r"[0-9a-f]{40}")  # the full hash of a commit
FILES_IGNORED = ["onnx/*", "openvino/*"]  # the same weights for other libraries


def is_reachable() -> bool:
    """Return whether the Hub (HF_ENDPOINT) answers; if it does not, switch the libraries to
    offline mode.

    Offline, they use cached files at once. Otherwise they retry each file with growing pauses and
    a warning each: 23 seconds before a mistyped name is an error.
    """
    import datasets
    import httpx2
    import huggingface_hub
    import huggingface_hub.constants

    # warnings about missing dataset cards and retries are nothing that the user can act on
    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():  # the library's bars for downloads are meant for a terminal
        huggingface_hub.utils.disable_progress_bars()
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        session, address = huggingface_hub.get_session(), huggingface_hub.constants.ENDPOINT
        session.head(address, timeout=CONNECT_SECONDS)
        return True
    except (ImportError, ValueError) as error:  # of the client, before it asks anything
        problem = f"the proxy that HTTPS_PROXY or ALL_PROXY names can't be used: {one_line(error)}"
        advice = "unset it, or for one of SOCKS install socksio"
        raise UserError(f"{problem}; {advice}") from error
    except httpx2.TransportError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
        return False


def commit_of(
    name: str, *, kind: Literal["model", "dataset"], revision: str | None, cache_dir: str | None
) -> str | None:
    """Return the full hash of the commit that a revision (None: the branch main) of a Hub's model or data set
    was when the Hub was last asked; None for what does not come from there.
    """
    if bundled.is_bundled(name) or Path(name).exists():
        return None
    import huggingface_hub.constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(cache_dir or huggingface_hub.constants.HF_HUB_CACHE)
    folder = cache / repo_folder_name(repo_id=name, repo_type=kind)
    reference = folder / "refs" / (revision or huggingface_hub.constants.DEFAULT_REVISION)
    if reference.is_file():
        return reference.read_text(encoding="utf-8").strip()
    return revision if revision is not None and COMMIT.fullmatch(revision) else None


@functools.cache  # once per name: the parts of a model are read one by one
def _say_cached(name: str) -> None:
    """Say that a model or data set comes from the cache and was not compared with the Hub."""
    note(f"{name}: using the cached copy; the Hub is offline (HF_HUB_OFFLINE) or can't be reached")


# Models and adapters ------------------------------------------------------------------------------


def download(
    name: str,
    files: list[str],
    pickled_only: Callable[[Path], list[str]],
    *,
    flag: str,
    what: str,
    others: str,
    cache_dir: str | None,
    revision: str | None = None,
) -> Path:
    """Return the folder of a model's or adapter's `files`, patterns of their names, and of the pickled
    weights that `pickled_only` names when it has seen these: those that there are in no other form.

    Raises UserError, naming `flag`, `what` it is and `others` that help, when it is not there, can't
    be reached or can't be stored.
    """
    import huggingface_hub

    reachable = is_reachable()

    def fetch(patterns: list[str]) -> Path:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=patterns,
            ignore_patterns=FILES_IGNORED,
            local_files_only=not reachable,
        )
        return Path(folder)

    with _model_errors(name, flag=flag, what=what, revision=revision, others=others):
        folder = fetch(files)
        pickled = pickled_only(folder)
        if pickled and reachable:
            folder = fetch(pickled)
    if not reachable:
        _say_cached(f"{flag} {name}")
    return folder


@contextlib.contextmanager
def _model_errors(name: str, *, flag: str, what: str, revision: str | None, others: str) -> Iterator[None]:
    """Turn what goes wrong with the Hub within the block into a UserError."""
    import huggingface_hub.errors

    try:
        yield
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        if revision is not None:
            raise UserError(
                f"--revision {revision}: the Hub can't be reached, and the cache does not hold this"
                f" revision of {name}; name a whole commit that it holds, or leave it out"
            ) from error
        raise UserError(
            f"{flag} {name}: no such folder, and the Hub can't be reached; use {others}"
        ) from error
    except huggingface_hub.errors.RevisionNotFoundError as error:
        problem = f"{name} has no such commit, branch or tag on the Hub"
        raise UserError(f"--revision {revision}: {problem}; check it there") from error
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError) as error:
        raise UserError(
            f"{flag} {name}: neither a local folder nor {what} on the Hub that you may read; check"
            f" the name (a private one needs `hf auth login`), or use {others}"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # reported by fault_of_system
            raise
        raise UserError(
            f"{flag} {name}: can't be stored in the cache: {error.filename}: {error.strerror}; name"
            " a folder with --cache-dir"
        ) from error


# Data sets ----------------------------------------------------------------------------------------


def read_dataset(
    name: str, config: str | None, revision: str | None, cache_dir: str | None
) -> datasets.DatasetDict:
    """Return the splits of a data set. Raises UserError, naming its flags, when it is not there, can't
    be reached or can't be read.
    """
    import datasets

    if name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        # the library would read every file of this kind in the working directory
        problem = "this is the name of a format, not of a data set"
        advice = f"name a file or folder, or use {', '.join(bundled.DATASETS)}"
        raise UserError(f"--dataset {name}: {problem}; {advice}")
    # if not, cached data is still used, and anything else fails at once
    reachable = is_reachable()
    with _dataset_errors(name, revision), _downloads_in(cache_dir):
        commit = _dataset_commit(name, revision, cache_dir, reachable=reachable)
        splits = _load_undamaged(name, config, commit, cache_dir)
    if not reachable:
        if commit is not None and not _is_of_commit(splits, commit):
            asked = "" if revision is None else f"--dataset-revision {revision} of "
            raise UserError(
                f"{asked}--dataset {name}: this is commit {commit}, which is not in the cache, and"
                " the Hub can't be reached; name another revision"
            )
        _say_cached(f"--dataset {name}")
    return splits


@contextlib.contextmanager
def _dataset_errors(name: str, revision: str | None) -> Iterator[None]:
    """Raise UserError for what the libraries raise in this block about a data set of the Hub."""
    import httpx2
    from datasets import data_files, exceptions
    from huggingface_hub import errors

    local, asked = ", ".join(bundled.DATASETS), f"--dataset {name}"
    try:
        yield
    except errors.RevisionNotFoundError as error:
        problem = f"{name} has no such commit, branch or tag on the Hub; check it there"
        raise UserError(f"--dataset-revision {revision}: {problem}") from error
    except (exceptions.DatasetNotFoundError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        problem = "neither a local file or folder nor a data set on the Hub"
        reason = one_line(error).rstrip(".")
        advice = f"check the name (a private one needs `hf auth login`), or use {local}"
        raise UserError(f"{asked}: {problem} ({reason}); {advice}") from error
    except (
        data_files.EmptyDatasetError,
        exceptions.DataFilesNotFoundError,
        exceptions.DatasetGenerationError,
    ) as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(f"{asked}: it has no data files on the Hub that can be read: {reason}") from error
    except (ConnectionError, httpx2.TransportError) as error:
        problem = f"no such file or folder, and the Hub can't be reached ({one_line(error)})"
        advice = f"without a network, use a local file or {local}"
        raise UserError(f"{asked}: {problem}; {advice}") from error
    except ValueError as error:
        if "config" not in str(error).lower():  # not about the choice of a configuration: a bug
            raise
        raise UserError(f"{asked}: choose with --dataset-config: {one_line(error)}") from error
    except RuntimeError as error:
        if "script" not in str(error).lower():
            raise
        problem = "it needs remote code, which is never run here; use a Parquet version of it"
        raise UserError(f"{asked}: {problem}") from error


def _dataset_commit(name: str, revision: str | None, cache_dir: str | None, *, reachable: bool) -> str | None:
    """Return the commit that is meant by a branch, a tag or the beginning of its hash: as the Hub says, or as
    it was when it was last asked; None if it never was.

    Without the Hub the library would take whatever commit it has used last, so that one is made the
    last. Raises UserError for a revision of which nothing is known.
    """
    import datasets
    import huggingface_hub

    if reachable:  # a small file: with it, the library stores what the revision means
        card = ["README.md"]
        huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, cache_dir=cache_dir, allow_patterns=card
        )
    commit = commit_of(name, kind="dataset", revision=revision, cache_dir=cache_dir)
    if commit is None and revision is not None:
        raise UserError(
            f"--dataset-revision {revision}: the Hub can't be reached, and the cache does not know"
            f" this revision of {name}; name a whole commit, or leave it out"
        )
    if not reachable:
        for folder in Path(cache_dir or datasets.config.HF_DATASETS_CACHE).glob(f"*/*/*/{commit}"):
            os.utime(folder)
    return commit


def _is_of_commit(splits: datasets.DatasetDict, commit: str) -> bool:
    """Tell whether a data set comes from a commit's folder in the library's cache."""
    files = [Path(file["filename"]) for rows in splits.values() for file in rows.cache_files]
    return all(file.parent.name == commit for file in files)


def _load_undamaged(
    name: str, config: str | None, revision: str | None, cache_dir: str | None
) -> datasets.DatasetDict:
    """Return a data set of the Hub; if the copy in the library's cache is damaged, made anew from
    what was downloaded.
    """
    import datasets
    import pyarrow as pa

    def load(mode: str) -> datasets.DatasetDict:
        splits = datasets.load_dataset(
            name, config, revision=revision, cache_dir=cache_dir, download_mode=mode
        )
        for rows in splits.values():
            # the library maps its files unchecked, and a wrong offset would end the process
            rows.data.table.validate(full=True)
        return splits

    damages = (pa.ArrowException, KeyError, TypeError, json.JSONDecodeError)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE)
    try:
        return load("reuse_dataset_if_exists")
    except damages as error:
        note(f"--dataset {name}: its copy in the cache is damaged ({one_line(error)}); it is made anew")
    for information in list(folder.rglob("dataset_info.json")):
        try:
            json.loads(information.read_bytes())
        except ValueError:  # the library reads it before it thinks of making anything anew
            shutil.rmtree(information.parent)
    try:
        return load("reuse_cache_if_exists")
    except damages as error:
        problem = f"its copy in {folder} is damaged ({one_line(error)})"
        raise UserError(f"--dataset {name}: {problem}; remove it and try again") from error


@contextlib.contextmanager
def _downloads_in(cache_dir: str | None) -> Iterator[None]:
    """Store the Hub's files in `cache_dir` within the block.

    `datasets` honours its own `cache_dir` only for the files that it builds, not for those that it
    downloads.
    """
    import huggingface_hub.constants

    usual = huggingface_hub.constants.HF_HUB_CACHE
    huggingface_hub.constants.HF_HUB_CACHE = cache_dir or usual
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_CACHE = usual
