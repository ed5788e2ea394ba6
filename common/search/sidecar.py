"""Caches beside an index: what takes long to make of one state of it, kept with that state's stamp, never trusted without it."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from common.assets import sha256
from common.errors import UserError
from common.search.snapshot import Snapshot

STAMP = "stamp.json"


def cached(snapshot: Snapshot, name: str, *, build: Callable[[Path], None], load: Callable[[Path], object], say=lambda line: None):
    """Return `load(folder)` of the cache `cache-<name>` in the index's folder; `build(folder)` fills it where it is missing, stale or damaged.

    Raises UserError when the folder can't be written.
    """
    folder = snapshot.folder / f"cache-{name}"
    if not is_whole(folder, snapshot.stamp):
        say(f"cache    {folder}: made anew for this state of the index")
        fresh = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            fresh.mkdir(exist_ok=True)
            build(fresh)
            files = {path.name: sha256(path) for path in sorted(fresh.iterdir()) if path.name != STAMP}
            (fresh / STAMP).write_text(json.dumps({"stamp": snapshot.stamp, "files": files}), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another reader was faster
                fresh.rename(folder)
        except PermissionError as error:
            raise UserError(f"{folder}: no right to write the cache; ask for it, or copy the index to a folder of your own") from error
        if not is_whole(folder, snapshot.stamp):
            return load(fresh)
        shutil.rmtree(fresh, ignore_errors=True)
    return load(folder)


def is_whole(folder: Path, stamp: str) -> bool:
    """Tell whether a cache is of the state `stamp`, and each of its files is as it was written."""
    try:
        found = json.loads((folder / STAMP).read_bytes())
        return found["stamp"] == stamp and all(sha256(folder / name) == expected for name, expected in found["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
