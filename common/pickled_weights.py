"""Pickled weights -> safetensors, once, kept in the cache.

A pickle may make its reader run any code. torch.load(weights_only=True) makes tensors and plain
values, and refuses one that asks for more. It does so here in a process of its own with limited
memory.
"""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import model_files
from common.cli import limit_memory
from common.errors import UserError, one_line, shorten
from common.files import cache_home, make_once, seal, sha256, sync_file, write_manifest
from common.model_files import ADAPTER_PICKLE, ADAPTER_WEIGHTS, PICKLE, PICKLED_LIST, SHARD_LIST

PROJECT = Path(__file__).resolve().parent.parent
CONVERT = "import sys; from common import pickled_weights; sys.exit(pickled_weights.convert(*sys.argv[1:]))"
# the address space of that process: what PyTorch takes, TIMES_THE_FILE times the file, and MORE_BYTES
TIMES_THE_FILE, MORE_BYTES = 4, 1 << 30


def converted_model(folder: Path, source: str, *, cache_dir: str | None) -> Path:
    """Return a model's folder; for one whose weights, or those of a module, are only pickled, a
    copy of it in the cache with safetensors in their place.

    The copy is found by the SHA-256 of all files that it is made from. Raises UserError, beginning
    with `source`, when torch's check refuses a pickle, and when the disk is too full.
    """
    parts = [folder, *model_files.module_folders(folder, source)]
    pickled = {part: model_files.pickled_files(part, source) for part in parts}
    if not any(pickled.values()):
        return folder
    others = [path for part in parts for path in sorted(part.iterdir()) if _is_copied(path)]

    def write(copy: Path) -> None:
        for path in others:
            (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy / path.relative_to(folder))
        for part, paths in pickled.items():
            for path in paths:
                _convert_in_child(path, copy / part.relative_to(folder) / _converted_name(path.name), source)
            if paths and paths[0].name != PICKLE:  # there are several, in a list
                _convert_list(part, copy / part.relative_to(folder), source)

    weights = [path for paths in pickled.values() for path in paths]
    digests = {str(path.relative_to(folder)): sha256(path) for path in (*weights, *others)}
    copy = _make_once(digests, write, weights, source, cache_dir)
    model_files.check(copy, source)
    return copy


def converted_adapter(folder: Path, source: str, *, cache_dir: str | None) -> Path:
    """Return the file with the weights of a LoRA adapter; of one whose weights are pickled, a copy
    in the cache as safetensors, found by the pickle's SHA-256.

    Raises UserError, beginning with `source`, when torch's check refuses a pickle.
    """
    if (folder / ADAPTER_WEIGHTS).exists():
        return folder / ADAPTER_WEIGHTS
    pickled = folder / ADAPTER_PICKLE

    def write(copy: Path) -> None:
        _convert_in_child(pickled, copy / ADAPTER_WEIGHTS, source)

    digests = {ADAPTER_PICKLE: sha256(pickled)}
    return _make_once(digests, write, [pickled], source, cache_dir) / ADAPTER_WEIGHTS


def _make_once(
    digests: dict[str, str],
    write: Callable[[Path], None],
    pickled: list[Path],
    source: str,
    cache_dir: str | None,
) -> Path:
    """Return the folder of the cache for files with these SHA-256; `write` fills it if it is new."""
    copy = cache_home(cache_dir) / "converted" / seal(digests)

    def make(scratch: Path) -> Path:
        made = scratch / "made"
        made.mkdir()
        write(made)
        write_manifest(made)
        return made

    note = (
        f"{source}: its weights are pickled ({pickled[0].name}); they are read once, by a reader that"
        f" runs no code, and kept as safetensors in {copy}"
    )
    size = sum(path.stat().st_size for path in pickled)
    return make_once(copy, make, source=source, needed_bytes=2 * size, note=note)


def _is_copied(path: Path) -> bool:
    """Return whether a library may read a file of a model in addition to its pickled weights."""
    patterns = (*model_files.JSON_TYPES, *model_files.OTHER_FILES, "*.json", "*.txt")
    is_pickled = fnmatch.fnmatch(path.name, "*.bin") or path.name == PICKLED_LIST
    is_wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
    return is_wanted and not is_pickled and path.is_file()


def _converted_name(name: str) -> str:
    """Return the name of a file of weights as safetensors, as transformers looks for it."""
    return name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def _convert_list(folder: Path, copy: Path, source: str) -> None:
    """Write the list of a model's shards for the converted ones."""
    listed = model_files.read_json(folder / PICKLED_LIST, source)
    weight_map = {key: _converted_name(name) for key, name in listed["weight_map"].items()}
    metadata = listed.get("metadata") if isinstance(listed.get("metadata"), dict) else {}
    content = {"metadata": metadata, "weight_map": weight_map}
    (copy / SHARD_LIST).write_text(json.dumps(content), encoding="utf-8")


def _convert_in_child(pickled: Path, target: Path, source: str) -> None:
    """Write a file of safetensors for one that is pickled, in a process of its own. Raises
    UserError with that process's reason.
    """
    command = [sys.executable, "-c", CONVERT, str(pickled.absolute()), str(target.absolute())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.splitlines() or [f"its reader ended with code {done.returncode}"]
        advice = "use a version with safetensors, or another model"
        raise UserError(f"{source}: {pickled.name} is refused: {shorten(lines[-1], 300)}; {advice}")
    sync_file(target)


def convert(pickled: str, target: str) -> str | None:
    """Write the tensors of a pickled file as safetensors: what the process of `_convert_in_child`
    does. Return why it can't, None if it could.
    """
    import torch
    from safetensors.torch import save_file

    most = TIMES_THE_FILE * os.path.getsize(pickled) + MORE_BYTES
    limit_memory(most)
    try:
        # mapped, a large file takes no memory of its own; the format before 2020 can't be
        is_mapped = zipfile.is_zipfile(pickled)
        tensors = torch.load(pickled, map_location="cpu", weights_only=True, mmap=is_mapped)
        if not isinstance(tensors, dict) or not all(map(_is_tensor, tensors.items())):
            return "it holds other things than tensors under their names"
        # what several names share is written for each of them
        plain = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        save_file(plain, target, {"format": "pt"})
    except Exception as error:  # what a file from elsewhere can raise has no end
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            return f"torch's check stops at {shorten(asked[1], 80)}, which may run code"
        if stopped := re.search(r"WeightsUnpickler error:\s+(.+)", str(error)):
            return f"torch's check stops: {shorten(stopped[1], 200)}"
        if isinstance(error, MemoryError) or "alloc" in str(error):
            size = os.path.getsize(pickled)
            return f"it takes more than {most >> 20:,} MiB to read its {size:,} bytes"
        return f"not readable as a file of tensors: {one_line(error)}"
    return None


def _is_tensor(item: tuple[Any, Any]) -> bool:
    import torch

    name, tensor = item
    is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    return isinstance(name, str) and is_dense
