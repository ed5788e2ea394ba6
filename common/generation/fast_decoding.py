"""The faster twin of `llama.plain_step`: decoder.c, compiled at its first use for the processor
that it runs on, and called through ctypes.

It is kept because a step of the library's forward spends most of its time on reading weights in
fp32 and on dispatch: with the bundled model's own 4-bit numbers, a token takes a fraction of that
time (docs/benchmarks.md). `fast_step` returns it for a model, or why there is none.

Shapes: B texts, T columns, V tokens in the vocabulary.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from common.errors import one_line
from common.generation.llama import Linear, NotCovered, Transformer, read_transformer
from common.generation.stored_weights import KINDS, TILE, Matrix, matrix_of

SOURCE = Path(__file__).with_name("decoder.c")
# contracting lets the compiler use fused multiply-add; numbers keep their order otherwise
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
COMPILE_SECONDS = 120  # it takes 2 to 4
MAX_ROWS = 64  # of decoder.c
CHECKED_TOKENS = 4  # of the self-check
LARGEST_DIFFERENCE = 1e-3  # between two logits of the self-check; usual is 1e-5
ROOM = 256  # a cache grows by so many columns
WIDENED_BYTES = 1 << 24  # of a matrix at once, in the forward of the library


# --- Compiling


def find_compiler() -> list[str] | None:
    """Return the command of a C compiler: $CC, cc, gcc, clang, or the one in the package
    ziglang; None if there is none.
    """
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in ([chosen] if chosen else []) + [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    return None


def processor() -> str:
    """Return what the compiled code depends on: the processor's kind, name and instructions."""
    lines = []
    if Path("/proc/cpuinfo").exists():
        names = ("model name", "flags", "Features", "CPU part")
        text = Path("/proc/cpuinfo").read_text()
        lines = sorted({line for line in text.splitlines() if line.startswith(names)})
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *lines])


@functools.cache
def load_library(cache_dir: str | None) -> ctypes.CDLL:
    """Return the compiled decoder.c, from the cache if it is there for this source, these flags and
    this processor. Raises NotCovered, with the reason, when there is no compiler or it fails.

    Two processes at once each compile their own file and rename it to the same name. Where the
    cache can't be written, the file lives as long as it takes to load it.
    """
    import huggingface_hub.constants

    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    key = "\n".join([SOURCE.read_text("utf-8"), *FLAGS, native, processor()])
    name = f"decoder-{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    folder = Path(cache_dir or huggingface_hub.constants.HF_HOME) / "kernels"
    try:
        return _declare(ctypes.CDLL(str(folder / name)))
    except (OSError, AttributeError):  # not there, or cut off by a full disk
        pass
    compiler = find_compiler()
    if compiler is None:
        raise NotCovered("no C compiler (cc, gcc, clang, or pip install ziglang)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".making-")
    except OSError:
        scratch = tempfile.TemporaryDirectory()
    with scratch as scratch_name:
        compiled = Path(scratch_name) / name
        _compile([*compiler, *FLAGS, native, str(SOURCE), "-o", str(compiled), "-lm"])
        try:
            library = _declare(ctypes.CDLL(str(compiled)))  # stays loaded when the file is gone
        except (OSError, AttributeError) as error:
            raise NotCovered(f"the C compiler {compiler[0]} made no library: {one_line(error)}") from error
        if compiled.parent.parent == folder:
            os.replace(compiled, folder / name)
    return library


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotCovered(f"the C compiler failed: {one_line(error)}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"code {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise NotCovered(f"the C compiler {command[0]} failed: {reason.strip()}")


# --- What decoder.c reads, field by field


class CMatrix(ctypes.Structure):
    """Matrix in decoder.c."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class CLayer(ctypes.Structure):
    """Layer in decoder.c."""

    MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
    NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm")
    _fields_ = [
        *((name, CMatrix) for name in MATRICES),
        *((name, ctypes.c_void_p) for name in (*NORMS, "keys", "values")),
        ("window", ctypes.c_int32),
    ]


class CModel(ctypes.Structure):
    """Model in decoder.c."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("num_layers", "width", "heads", "key_heads", "head_size", "inner", "vocabulary")
        ),
        ("epsilon", ctypes.c_float),
        ("scaling", ctypes.c_float),
        ("embedding", CMatrix),
        ("head", CMatrix),
        ("norm", ctypes.c_void_p),
        ("layers", ctypes.POINTER(CLayer)),
    ]


class CStep(ctypes.Structure):
    """Step in decoder.c."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rows", "capacity", "first_logits")),
        *(
            (name, ctypes.c_void_p)
            for name in ("tokens", "texts", "columns", "starts", "cosines", "sines", "logits")
        ),
    ]


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.start.argtypes, library.start.restype = [number], pointer
    library.stop.argtypes, library.stop.restype = [pointer], None
    library.step.argtypes = [pointer, ctypes.POINTER(CModel), ctypes.POINTER(CStep)]
    library.widen.argtypes = [pointer, ctypes.POINTER(CMatrix), number, number, pointer]
    library.widen.restype = None
    library.widen_one.argtypes, library.widen_one.restype = [ctypes.POINTER(CMatrix), number, pointer], None
    library.product.argtypes = [pointer, ctypes.POINTER(CMatrix), pointer, number, pointer]
    library.instructions.restype = ctypes.c_char_p
    return library


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def c_matrix(matrix: Matrix, bias: Tensor | None = None) -> CMatrix:
    """Return a matrix as decoder.c reads it; the tensors must outlive it."""
    kind = KINDS.index(matrix.kind)
    return CMatrix(kind, matrix.rows, matrix.columns, _pointer(matrix.data), _pointer(bias))


class Kernel:
    """The compiled code with its threads, which wait between two calls."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self.library, self.num_threads = library, num_threads
        self.pool = library.start(num_threads)
        if not self.pool:
            raise NotCovered(f"the system gives no {num_threads} threads")
        self.instructions = library.instructions().decode()

    def __del__(self) -> None:
        if getattr(self, "pool", None):
            self.library.stop(self.pool)

    def widen(self, matrix: Matrix, first_row: int = 0, rows: int | None = None) -> Tensor:
        """Return `rows` rows of a matrix from `first_row` on, a multiple of 16, in fp32."""
        count = matrix.rows - first_row if rows is None else rows
        whole_tiles = min(-(-count // TILE) * TILE, matrix.rows - first_row)
        result = torch.empty(whole_tiles, matrix.columns)
        self.library.widen(self.pool, c_matrix(matrix), first_row, whole_tiles, result.data_ptr())
        return result[:count]

    def widen_rows(self, matrix: Matrix, rows: list[int]) -> Tensor:
        """Return some rows of a matrix in fp32."""
        result, source = torch.empty(len(rows), matrix.columns), c_matrix(matrix)
        for target, row in enumerate(rows):
            self.library.widen_one(source, row, result[target].data_ptr())
        return result

    def product(self, matrix: Matrix, x: Tensor) -> Tensor:
        """Return x (R, columns) times a matrix: (R, rows). For up to 64 rows R."""
        result = torch.empty(len(x), matrix.rows)
        failed = self.library.product(
            self.pool, c_matrix(matrix), x.contiguous().data_ptr(), len(x), result.data_ptr()
        )
        if failed:
            raise MemoryError
        return result


# --- The cache of keys and values


class CacheLayer(DynamicLayer):
    """A layer of a RoomyCache, as the library's forward uses it."""

    def __init__(self, cache: "RoomyCache", number: int) -> None:
        super().__init__()
        self.cache, self.number, self.length = cache, number, 0
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, K, n, D) at the end; return all so far."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.cache.reserve(len(key_states), self.length)
        keys, values = self.cache.keys[self.number], self.cache.values[self.number]
        keys[:, :, start : self.length] = key_states
        values[:, :, start : self.length] = value_states
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Return the columns in use."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns; the number is negative."""
        self.length += tokens_to_remove


class RoomyCache(DynamicCache):
    """Keys and values with room for more, which the library's forward and decoder.c both fill.

    A sliding window forgets nothing here: what it can't see is masked.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.key_heads, self.head_size = model.key_heads, model.head_size
        self.layer_class_to_replicate = None
        self.own_layers = [CacheLayer(self, number) for number in range(len(model.layers))]
        self.layers = list(self.own_layers)
        self.keys = torch.empty(len(self.layers), 0, self.key_heads, 0, self.head_size)  # (L, B, K, T, D)
        self.values = torch.empty_like(self.keys)

    @property
    def capacity(self) -> int:
        """The columns that there is room for."""
        return self.keys.shape[3]

    def reserve(self, texts: int, columns: int) -> None:
        """Make room for so many texts and columns; what is there is kept."""
        if self.keys.shape[1] == texts and self.capacity >= columns:
            return
        columns = -(-columns // ROOM) * ROOM
        used = max(layer.length for layer in self.own_layers)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = torch.empty(len(self.layers), texts, self.key_heads, columns, self.head_size)
            kept = min(used, old.shape[3])
            if old.shape[1] == texts:
                new[:, :, :, :kept] = old[:, :, :, :kept]
            setattr(self, name, new)


# --- The step


class FastStep:
    """The step of a model in C."""

    def __init__(self, model: Transformer, kernel: Kernel) -> None:
        self.model, self.kernel = model, kernel
        self.layers = (CLayer * len(model.layers))()
        for own, layer in zip(self.layers, model.layers):
            for name in CLayer.MATRICES:
                linear: Linear = getattr(layer, name)
                setattr(own, name, c_matrix(linear.matrix, linear.bias))
            for name in CLayer.NORMS:
                setattr(own, name, _pointer(getattr(layer, name)))
            own.window = layer.window or 0
        self.c_model = CModel(
            num_layers=len(model.layers),
            width=model.embedding.columns,
            heads=model.heads,
            key_heads=model.key_heads,
            head_size=model.head_size,
            inner=model.layers[0].gate.matrix.rows,
            vocabulary=model.head.matrix.rows,
            epsilon=model.epsilon,
            scaling=model.head_size**-0.5,
            embedding=c_matrix(model.embedding),
            head=c_matrix(model.head.matrix, model.head.bias),
            norm=_pointer(model.norm),
            layers=self.layers,
        )
        self.cosines = self.sines = torch.empty(0, model.head_size)  # (positions, D)
        self.storage: Tensor | None = None  # the cache whose addresses are in self.layers

    def forward(self, ids: Tensor, starts: Tensor, cache: RoomyCache, *, first: int, keep: int) -> Tensor:
        """Run the model over the columns of ids (B, T) from `first` on, and add them to the cache.

        Return the logits of the last `keep` columns, (B, keep, V), in fp32. `starts` (B) is the
        column where each text begins; what is before it counts as a text of its own, of one token.
        """
        texts, length = ids.shape
        new = length - first
        cache.reserve(texts, length)
        self._use(cache)
        # column by column, so that a text's rows come in order
        tokens = ids[:, first:].T.reshape(-1).int()
        columns = torch.arange(first, length, dtype=torch.int32).repeat_interleave(texts)
        row_starts = torch.minimum(starts.int().repeat(new), columns)
        row_texts = torch.arange(texts, dtype=torch.int32).repeat(new)
        cosines, sines = self._angles(columns - row_starts)
        logits = torch.empty(keep * texts, self.c_model.vocabulary)
        num_skipped = len(tokens) - len(logits)  # rows without logits
        for begin in range(0, len(tokens), MAX_ROWS):
            rows = slice(begin, min(begin + MAX_ROWS, len(tokens)))
            step = CStep(
                rows=rows.stop - begin,
                capacity=cache.capacity,
                first_logits=min(max(num_skipped - begin, 0), rows.stop - begin),
                tokens=tokens[rows].data_ptr(),
                texts=row_texts[rows].data_ptr(),
                columns=columns[rows].data_ptr(),
                starts=row_starts[rows].data_ptr(),
                cosines=cosines[rows].data_ptr(),
                sines=sines[rows].data_ptr(),
                logits=logits[max(begin - num_skipped, 0) :].data_ptr(),
            )
            if self.kernel.library.step(self.kernel.pool, self.c_model, step):
                raise MemoryError
        for layer in cache.own_layers:
            layer.length = length
        return logits.view(keep, texts, -1).transpose(0, 1)

    def _use(self, cache: RoomyCache) -> None:
        """Let decoder.c read and write this cache."""
        if self.storage is cache.keys:
            return
        for number, layer in enumerate(self.layers):
            layer.keys = cache.keys[number].data_ptr()
            layer.values = cache.values[number].data_ptr()
        self.storage = cache.keys

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines (R, D) of positions (R), from the model's own module."""
        needed = int(positions.max()) + 1
        if needed > len(self.cosines):
            known = torch.arange(2 * needed)[None]
            cosines, sines = self.model.rotary(torch.empty(0), known)
            self.cosines, self.sines = cosines[0].contiguous(), sines[0].contiguous()
        return self.cosines[positions], self.sines[positions]


def fast_step(model: PreTrainedModel, stored: dict[str, Matrix], kernel: Kernel) -> FastStep:
    """Return the step of a model in C, after a check of a few tokens against the library's forward.

    Raises NotCovered, with the reason, for a model that it would compute wrongly.
    """
    step = FastStep(read_transformer(model, stored), kernel)
    difference = self_check(step, model)
    if not difference <= LARGEST_DIFFERENCE:
        raise NotCovered(f"a logit differs by {difference:.1g}")
    return step


@torch.inference_mode()
def self_check(step: FastStep, model: PreTrainedModel) -> float:
    """Return the largest difference between a logit of the library's forward and of the step, for a
    few tokens one after the other.
    """
    vocabulary = step.model.head.matrix.rows
    ids = (torch.arange(1, CHECKED_TOKENS + 1) * 7919 % vocabulary)[None]  # spread over the vocabulary
    theirs = model(ids, use_cache=False).logits[0].float()  # (n, V)
    cache, starts = RoomyCache(step.model), torch.zeros(1, dtype=torch.long)
    ours = [
        step.forward(ids[:, : column + 1], starts, cache, first=column, keep=1)[0]
        for column in range(CHECKED_TOKENS)
    ]
    return (torch.cat(ours) - theirs).abs().max().item()


# --- A model of transformers over stored weights


class StoredLinear(torch.nn.Module):
    """A linear layer whose weights stay as they are stored; each forward widens them to fp32."""

    def __init__(self, matrix: Matrix, bias: Tensor | None, kernel: Kernel) -> None:
        super().__init__()
        self.matrix, self.bias, self.kernel = matrix, bias, kernel

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., columns) times the matrix, plus the bias: (..., rows)."""
        parts = [torch.nn.functional.linear(x, weight) for weight in self._blocks()]
        result = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return result if self.bias is None else result + self.bias

    def _blocks(self) -> Iterator[Tensor]:
        size = max(WIDENED_BYTES // (4 * self.matrix.columns) // TILE * TILE, TILE)
        for first in range(0, self.matrix.rows, size):
            yield self.kernel.widen(self.matrix, first, min(size, self.matrix.rows - first))


class StoredEmbedding(torch.nn.Module):
    """An embedding whose weights stay as they are stored."""

    def __init__(self, matrix: Matrix, kernel: Kernel) -> None:
        super().__init__()
        self.matrix, self.kernel = matrix, kernel

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings (..., E) of token ids in fp32."""
        return self.kernel.widen_rows(self.matrix, ids.flatten().tolist()).view(*ids.shape, -1)


def own_matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """Return the matrices of a model under their names, without copying them."""
    return {
        name: matrix_of(parameter.detach())
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
    }


def stored_matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """Return the matrices of a model that `store` has changed, under the names of its
    parameters.
    """
    return {
        f"{name}.weight": module.matrix
        for name, module in model.named_modules()
        if isinstance(module, StoredLinear | StoredEmbedding)
    }


def store(model: PreTrainedModel, stored: dict[str, Matrix], kernel: Kernel) -> None:
    """Replace the linear layers and the embedding of a model by those over stored weights, in
    place; `stored` has them under the names of the model's parameters.
    """
    for name, module in list(model.named_modules()):
        matrix = stored.get(f"{name}.weight")
        if isinstance(module, torch.nn.Embedding) and matrix is not None:
            model.set_submodule(name, StoredEmbedding(matrix, kernel))
        elif isinstance(module, torch.nn.Linear):
            # tied: a head without weights of its own has those of the embedding
            matrix = matrix or stored.get("model.embed_tokens.weight")
            if matrix is not None:
                model.set_submodule(name, StoredLinear(matrix, module.bias, kernel))
