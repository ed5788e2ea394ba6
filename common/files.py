"""Files that survive a crash: synced to the disk, folders replaced as a whole, manifests that
reveal damage; and locks, so that one process at a time writes.

PyTorch is imported by the two functions that need it, so that the scripts can check folders before
they load it.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import mmap
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import NotSupported, UserError, shorten

if TYPE_CHECKING:
    from concurrent.futures import Future

    import filelock
    import torch

MANIFEST = "manifest.json"
LOCK = ".lock"  # in a folder that is being written; of a file it is .<its name>.lock
HOLDER_CHARACTERS = 100  # of a lock's file, which says who holds it
HASHED_AHEAD: "dict[Path, Future[str]]" = {}  # their SHA-256, as threads compute it
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems that have none


@contextlib.contextmanager
def only_writer(path: Path, *, flag: str, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder that exists, or a file, as the only process that writes to it within the block.

    The lock is the operating system's: it ends with its process, however that ends, and children
    of the process do not inherit it. Raises UserError, naming `flag` and who writes, when another
    process holds it for longer than `wait` seconds, and when no lock can be made there.
    """
    import filelock

    real = Path(os.path.realpath(path))  # a link is another name of the same file
    lock_file = real / LOCK if real.is_dir() else real.with_name(f".{real.name}{LOCK}")
    lock = filelock.FileLock(lock_file, on_acquired=_sign)
    try:
        held = _acquire(lock, 0)
        if wait and not held:
            waiting = f"{flag} {path}: {_holder(lock_file)} is writing to it; waiting {wait:g} s"
            print(waiting, file=sys.stderr, flush=True)
            held = _acquire(lock, wait)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            problem = f"can't be written: {error.strerror or error}"
            raise UserError(f"{flag} {path}: {problem}; name another place") from error
        problem = "its file system has no locks; let no other process write to it"
        print(f"{flag} {path}: {problem}", file=sys.stderr, flush=True)
        yield
        return
    if not held:
        advice = "wait for it, or stop it" if not wait else "try again later, or raise --wait"
        raise UserError(f"{flag} {path}: {_holder(lock_file)} is writing to it; {advice}")
    try:
        yield
    finally:
        # while it is held: a process that has opened it meanwhile finds that it lost its name, and
        # tries again
        with contextlib.suppress(OSError):
            lock_file.unlink()
        lock.release()


def _acquire(lock: "filelock.BaseFileLock", seconds: float) -> bool:
    """Take a lock, waiting for it at most this many seconds; return whether it is held."""
    import filelock

    with contextlib.suppress(filelock.Timeout):
        lock.acquire(timeout=seconds)
        return True
    return False


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Let an error of the system within the block name a file: that of a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def check_new(folder: str) -> None:
    """Raise UserError unless nothing is in a folder for new files but the lock of its writer."""
    path = Path(folder)
    if path.is_dir() and any(entry.name != LOCK for entry in path.iterdir()):
        problem = "it holds other files; name a new folder or remove it"
        raise UserError(f"--output-dir {folder}: {problem}")


def _sign(descriptor: int) -> None:
    """Write into a lock's file who holds it."""
    since = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}, since {since},".encode())


def _holder(lock_file: Path) -> str:
    """Return who holds a lock, for a message."""
    try:
        with open(lock_file, encoding="utf-8", errors="replace", opener=_open_at_once) as file:
            text = file.read(HOLDER_CHARACTERS)
    except OSError:
        text = ""
    readable = "".join(character if character.isprintable() else " " for character in text)
    return shorten(readable, HOLDER_CHARACTERS) or "another process"


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def member(folder: Path, name: object) -> Path:
    """Return the path of the regular file that a manifest in `folder` names, without opening it.

    Raises ValueError, saying what is wrong, for anything but a relative name that stays within the folder,
    also through links: a manifest from elsewhere could otherwise have any file read, or a pipe that never
    ends.
    """
    shown = shorten(repr(name), 60)
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise ValueError(f"{shown} is not the name of a file")
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{shown} is not the name of a file in its folder")
    path = folder / name
    kind = os.stat(path).st_mode  # FileNotFoundError is the caller's
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{shown} is a link that leads out of its folder")
    if not stat.S_ISREG(kind):
        raise ValueError(f"{shown} is not a regular file")
    return path


def hash_ahead(path: Path) -> None:
    """Let a thread compute the SHA-256 of a large file while this one imports libraries: the next
    call of `sha256` for the file returns it.
    """
    from concurrent.futures import ThreadPoolExecutor  # as PyTorch does, but --help need not

    pool = ThreadPoolExecutor(1)
    HASHED_AHEAD[path] = pool.submit(_mapped_sha256, path)
    pool.shutdown(wait=False)


def _mapped_sha256(path: Path) -> str:
    # in one call, not block by block: after each the thread would wait for Python's lock, which an
    # import gives up only every 5 ms
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    if path in HASHED_AHEAD:
        return HASHED_AHEAD.pop(path).result()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(value: Any) -> str:
    """Return the SHA-256 in hexadecimal of a value's JSON with sorted keys: a manifest's proof of
    itself.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path) -> None:
    """Write manifest.json: size and SHA-256 of each file of a folder, and the seal of this list
    itself.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(manifest_text(files), encoding="utf-8")
    sync_file(folder / MANIFEST)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(path)


def manifest_text(files: dict[str, dict]) -> str:
    """Return the text of a manifest: a function of the files, byte for byte, so that no change
    goes unseen.
    """
    return json.dumps({"files": files, "sha256": seal(files)}, sort_keys=True, indent=1) + "\n"


def find_damage(folder: Path, *, max_bytes_read: int | None = None) -> str | None:
    """Return in a few words what is damaged in a folder with a manifest, None if every file is
    intact.

    A manifest that names anything but files of its folder counts as damaged, and is not followed.
    Of files with more than `max_bytes_read` bytes only the size is compared, which takes no time.
    """
    try:
        text = member(folder, MANIFEST).read_bytes()
        files = json.loads(text)["files"]
        if not isinstance(files, dict) or manifest_text(files).encode() != text:
            return f"{MANIFEST} is corrupt"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is corrupt"
    except OSError as error:
        return f"{MANIFEST} can't be read ({error.strerror})"
    for name, expected in files.items():
        try:
            path = member(folder, name)
            size = path.stat().st_size
            is_read = max_bytes_read is None or size <= max_bytes_read
            if size != expected["bytes"] or (is_read and sha256(path) != expected["sha256"]):
                return f"{name} is corrupt"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{shorten(name, 60)} can't be read ({error.strerror})"
        except ValueError as error:
            return f"{MANIFEST} is corrupt: {error}"
        except (KeyError, TypeError):
            return f"{MANIFEST} is corrupt"
    return None


def write_tensors(path: Path, tensors: "dict[str, torch.Tensor]") -> None:
    """Write a safetensors file and sync it to the disk."""
    import safetensors.torch

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, path)
    sync_file(path)


def tensors_sha256(tensors: "dict[str, torch.Tensor]") -> str:
    """Return the SHA-256 in hexadecimal of the names, dtypes, shapes and values of tensors, in
    their order.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file and sync it to the disk."""
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")
    sync_file(path)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text("utf-8"))


def read_settings(path: Path) -> dict[str, Any]:
    """Return the dictionary in a model's JSON file. Raises NotSupported when there is none."""
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise NotSupported(f"{path.name}: {error}") from error
    if not isinstance(content, dict):
        raise NotSupported(f"{path.name}, which is not a dictionary")
    return content


def make_once(
    folder: Path, make: Callable[[Path], Path], *, source: str, needed_bytes: int, note: str
) -> Path:
    """Return a folder of a cache, which has a manifest; make it first if it is not there.

    `make` gets an empty folder to work in and returns the complete folder that it has made there. `note` is
    printed on stderr before that. Two processes at once are safe: one makes the folder and the other waits.
    Raises UserError, naming `source`, when the disk has less than `needed_bytes` bytes free, and when the
    folder is damaged.
    """
    if not folder.is_dir():
        import filelock  # takes a tenth of a second

        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / LOCK):
            if not folder.is_dir():  # another process may have made it while this one waited
                for leftover in folder.parent.glob(".making-*"):  # of a killed process
                    shutil.rmtree(leftover, ignore_errors=True)
                _make(folder, make, source=source, needed_bytes=needed_bytes, note=note)
    if damage := find_damage(folder):
        raise UserError(f"{folder}: {damage}; remove the folder and run the command again")
    return folder


def _make(folder: Path, make: Callable[[Path], Path], *, source: str, needed_bytes: int, note: str) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < needed_bytes:
        raise UserError(
            f"{source}: its first use needs {needed_bytes / 1e6:,.0f} MB in {folder.parent}, and"
            f" {free / 1e6:,.0f} MB are free; free some space, or name another disk's folder with"
            " --cache-dir"
        )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(note, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        os.rename(make(Path(scratch)), folder)  # atomic: a folder of this name is always complete


def cache_home(cache_dir: str | None) -> Path:
    """Return the folder of the cache: --cache-dir, or else that of the Hugging Face libraries,
    found as they find it. (Importing them takes a tenth of a second.)
    """
    if cache_dir is not None:
        return Path(cache_dir)
    default = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(os.path.expandvars(os.path.expanduser(os.environ.get("HF_HOME", default))))


def replace_file(path: Path, text: str) -> None:
    """Replace a text file atomically; everything else in its folder is on the disk before that,
    the new file after it.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        sync_file(new)
        sync_folder(path.parent)
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)  # of a full disk, which needs the space
    sync_folder(path.parent)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which gets its name when the block has ended well."""
    new = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Replace a folder by a complete new one; the old one is removed only after the new one is in
    its position.
    """
    old = folder.with_name(folder.name + ".old")
    # if not, a kill came between the two renames, and the old one is the only copy
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_folder(source: Path, target: Path) -> None:
    """Make a folder of hard links to another folder's files, which takes no space; copies where
    links fail.
    """
    target.mkdir()
    for path in source.iterdir():
        with contextlib.suppress(OSError):
            os.link(path, target / path.name)
        if not (target / path.name).exists():
            shutil.copy2(path, target / path.name)
        sync_file(target / path.name)
