"""Files that survive a crash: synced to the disk, folders replaced as a whole, manifests that
reveal damage.

PyTorch is imported by the two functions that need it, so that the scripts can check folders before
they load it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UnknownModel

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
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


def find_damage(folder: Path) -> str | None:
    """Return in a few words what is damaged in a folder with a manifest, None if every file is
    intact.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        files = json.loads(text)["files"]
        if manifest_text(files).encode() != text:
            return f"{MANIFEST} is corrupt"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is corrupt"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            return f"{name} is corrupt"
    return None


def write_tensors(path: Path, tensors: "dict[str, torch.Tensor]") -> None:
    """Write a safetensors file and sync it to the disk."""
    import safetensors.torch

    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
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
    """Return the dictionary in a model's JSON file. Raises UnknownModel when there is none."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UnknownModel(f"{path.name}: {error}") from error
    if not isinstance(content, dict):
        raise UnknownModel(f"{path.name}, which is not a dictionary")
    return content


def replace_file(path: Path, text: str) -> None:
    """Replace a text file atomically; everything else in its folder is on the disk before that,
    the new file after it.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    sync_file(new)
    sync_folder(path.parent)
    new.rename(path)
    sync_folder(path.parent)


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
