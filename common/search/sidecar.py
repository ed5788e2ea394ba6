"""Caches beside an index: what takes long to make of one state of it, kept with that state's
stamp, never trusted without it.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import files
from common.errors import UserError
from common.search.index import Snapshot

PREFIX = "cache-"
STAMP = "stamp"  # a file of a cache: the state that it was made of
# seconds after which a cache that is still being made is taken for the rest of a process that was
# killed
GIVEN_UP = 86_400


def cached(
    snapshot: Snapshot,
    name: str,
    *,
    build: Callable[[Path], None],
    load: Callable[[Path], object],
    say=lambda line: None,
):
    """Return `load(folder)` of the cache `cache-<name>` in the index's folder; `build(folder)`
    fills it where it is missing, stale or damaged.

    Raises UserError when the folder can't be written.
    """
    folder = snapshot.folder / f"{PREFIX}{name}"
    if _stamp(folder) == snapshot.stamp and files.find_damage(folder) is None:
        # another process replaced it meanwhile; RuntimeError is FAISS's
        with contextlib.suppress(OSError, RuntimeError):
            return load(folder)
    say(f"cache    {folder}: made anew for this state of the index")
    try:
        with tempfile.TemporaryDirectory(
            prefix=f"{folder.name}.", dir=snapshot.folder, ignore_cleanup_errors=True
        ) as place:
            # the folder around it is its maker's alone, and this one everybody's who may read the
            # index
            fresh = Path(place) / name
            fresh.mkdir()
            build(fresh)
            (fresh / STAMP).write_text(snapshot.stamp, encoding="utf-8")
            files.write_manifest(fresh)
            made = load(fresh)
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was faster
                fresh.rename(folder)
            return made
    except OSError as error:
        raise UserError(
            f"{folder}: the cache can't be written: {error.strerror or error}; mend that, or copy the index"
            " to a folder of your own"
        ) from error


def remove_stale(folder: Path, stamp: str):
    """Remove the caches of other states of an index than `stamp`: they hold what was deleted."""
    for path in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            if time.time() - path.stat().st_mtime > GIVEN_UP if "." in path.name else _stamp(path) != stamp:
                shutil.rmtree(path, ignore_errors=True)


def _stamp(folder: Path) -> str | None:
    try:
        return (folder / STAMP).read_text("utf-8")
    except (OSError, ValueError):
        return None
