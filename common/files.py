"""Files that survive: written through to the disk, folders put in place whole, and a manifest by
which damage is found.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch

from common.bundled import sha256


def write_manifest(folder: Path):
    """Write manifest.json: size and SHA-256 of each file of a folder, and a SHA-256 of this list
    itself.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / "manifest.json").write_text(manifest_text(files), encoding="utf-8")
    sync_file(folder / "manifest.json")
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(path)


def manifest_text(files: dict) -> str:
    """Return the text of a manifest, byte for byte a function of the files: a changed byte of it
    can't go unseen.
    """
    listed = json.dumps(files, sort_keys=True)
    return (
        json.dumps(
            {"files": files, "sha256": hashlib.sha256(listed.encode()).hexdigest()}, sort_keys=True, indent=1
        )
        + "\n"
    )


def fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, in a few words; None when each file is there with
    the SHA-256 that the manifest says.
    """
    try:
        text = (folder / "manifest.json").read_bytes()
        files = json.loads(text)["files"]
        if manifest_text(files).encode() != text:
            return "manifest.json is changed"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is changed"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            return f"{name} is changed"
    return None


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]):
    """Write a safetensors file and wait until the disk has it."""
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    sync_file(path)


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """Return a SHA-256 of the names, kinds, shapes and values of tensors, in their order, in
    hexadecimal.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_json(path: Path, value):
    """Write a JSON file and wait until the disk has it."""
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")
    sync_file(path)


def read_json(path: Path):
    """Read a JSON file."""
    return json.loads(path.read_text("utf-8"))


def replace_file(path: Path, text: str):
    """Put a new text file in the place of another in one step, after all that stands in its folder
    is on the disk; then so is it.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    sync_file(fresh)
    sync_folder(path.parent)
    fresh.rename(path)
    sync_folder(path.parent)


def sync_file(path: Path):
    """Wait until the disk has a file's content."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path):
    """Wait until the disk has a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_folder(source: Path, target: Path):
    """Make a folder of hard links to another's files, which costs no space; copies where the file
    system has no links.
    """
    target.mkdir()
    for path in source.iterdir():
        with contextlib.suppress(OSError):
            os.link(path, target / path.name)
        if not (target / path.name).exists():
            shutil.copy2(path, target / path.name)
        sync_file(target / path.name)


def replace_folder(fresh: Path, folder: Path):
    """Put a complete folder in the place of another, which is gone only when the new one stands
    there.
    """
    old = folder.with_name(folder.name + ".old")
    # else a kill came between the two renames, and the old one is all that there is
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
