"""decoder.c, a step of a Llama-like model: compiled at its first use for the processor that it runs
on, checked against `llama.reference_step`, and called through ctypes.

It is kept because the library's forward spends most of its time on reading weights in fp32 and on
dispatch: with the bundled model's own 4-bit numbers, a token takes a fraction of that
time (docs/benchmarks.md). It is not used before it has computed what the reference computes: with
a small model of every kind of weights, once after it was compiled, and with the first layer of each
model that is loaded.

Shapes: B texts, T columns of the cache, V tokens in the vocabulary; L layers, K heads of D numbers for
keys and values; R tokens, which are the rows of a step.
"""

import ctypes
import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import compiler
from common.errors import NotSupported
from common.generation.llama import Layer, Linear, Positions, Rotary, Transformer, reference_step
from common.generation.stored_weights import GROUP, KIND_OF_DTYPE, KINDS, Kind, Matrix, convert, pack

if TYPE_CHECKING:  # which imports this file
    from common.generation.decoding import Batch

SOURCE = Path(__file__).with_name("decoder.c")
MAX_ROWS = 128  # the largest number of rows that decoder.c takes in one step
WIDE_COLUMNS = 17  # prompts of at least this many tokens are read with weights widened to fp32
MANY_ROWS = 10  # and so are steps of at least this many rows, where the weights are 4-bit or 8-bit groups
LARGEST_DIFFERENCE = 1e-3  # between a logit of decoder.c and of the reference; 1e-5 is usual
CHECKED_TOKENS = 64  # the number of tokens whose logits are compared when a model is loaded
PATIENCE = 3.0  # seconds before a bar shows how much of a prompt has been read
ROOM = 256  # the number of columns of a cache is rounded up to a multiple of this


@functools.cache
def load_library(cache_dir: str | None) -> ctypes.CDLL:
    """Return the compiled decoder.c. Raises what `compiler.load` raises, and NotSupported when what it has
    compiled computes something other than `reference_step`.
    """
    return compiler.load(SOURCE, cache_dir, declare=_declare, check=check_library)


def check_library(library: ctypes.CDLL) -> None:
    """Raise NotSupported unless the compiled step computes what the reference does."""
    difference = self_check(library)
    if difference > LARGEST_DIFFERENCE:
        raise NotSupported(f"the compiled step is wrong: a logit differs by {difference:.1g}")


# What decoder.c reads, field by field -------------------------------------------------------------


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
        *((name, ctypes.c_int32) for name in ("rows", "capacity", "first_logits", "wide", "stride")),
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
    library.widen_one.argtypes = [ctypes.POINTER(CMatrix), number, pointer]
    library.widen_one.restype = None
    library.product.argtypes = [pointer, ctypes.POINTER(CMatrix), pointer, number, number, pointer]
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
            raise NotSupported(f"the system gives no {num_threads} threads")
        self.instructions = library.instructions().decode()

    def __del__(self) -> None:
        if getattr(self, "pool", None):
            self.library.stop(self.pool)


# The cache of keys and values ---------------------------------------------------------------------


class PreallocatedCache:
    """Keys and values, (L, B, K, T, D), with room for more columns than are in use, as decoder.c
    fills them.

    It has those methods of transformers' caches that decoding calls. A sliding window forgets nothing here:
    what it can't see is masked.
    """

    layers = ()  # none of which forgets anything

    def __init__(self, num_layers: int, num_heads: int, head_dim: int) -> None:
        self.length = 0  # the columns in use
        self.keys, self.values = torch.empty(2, num_layers, 0, num_heads, 0, head_dim)

    @classmethod
    def of_texts(cls, texts: list[tuple["PreallocatedCache", int, int]], columns: int) -> "PreallocatedCache":
        """Return a cache with room for `columns`, which holds copies of texts of other caches: each is
        given by its cache, its row and its first column there. All end at the same column.
        """
        num_layers, _, num_heads, _, head_dim = texts[0][0].keys.shape
        cache = cls(num_layers, num_heads, head_dim)
        cache.length = max(old.length - start for old, _, start in texts)
        cache.reserve(len(texts), columns)
        for row, (old, old_row, start) in enumerate(texts):
            here = slice(cache.length - (old.length - start), cache.length)
            there = slice(start, old.length)
            cache.keys[:, row, :, here] = old.keys[:, old_row, :, there]
            cache.values[:, row, :, here] = old.values[:, old_row, :, there]
        return cache

    @property
    def capacity(self) -> int:
        """The columns that there is room for."""
        return self.keys.shape[3]

    def get_seq_length(self) -> int:
        """Return the columns in use."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns; the number is negative."""
        self.length += tokens_to_remove

    def activate_past_recording(self) -> None:
        """Do nothing: no column is ever forgotten."""

    def reorder_cache(self, rows: Tensor) -> None:
        """Let each text go on from the columns of another one, `rows` (B): for beam search."""
        for name in ("keys", "values"):
            setattr(self, name, getattr(self, name)[:, rows])

    def reserve(self, texts: int, columns: int) -> None:
        """Make room for this many texts and columns; what is there is kept."""
        if self.keys.shape[1] == texts and self.capacity >= columns:
            return
        columns = math.ceil(columns / ROOM) * ROOM
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = torch.empty(old.shape[0], texts, old.shape[2], columns, old.shape[4])
            if old.shape[1] == texts:
                new[:, :, :, : self.length] = old[:, :, :, : self.length]
            setattr(self, name, new)


# The model ----------------------------------------------------------------------------------------


class CompiledModel:
    """A model that decoder.c computes, with what decoding needs from any model."""

    is_compiled = True
    device, dtype = torch.device("cpu"), torch.float32  # also with weights of fewer bits
    reads_padding = False  # no text of a batch depends on the lengths of the others

    def __init__(self, model: Transformer, kernel: Kernel) -> None:
        self.transformer, self.kernel = model, kernel
        self.is_grouped = model.layers[0].gate.matrix.kind in ("groups4", "groups8")
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
            heads=model.num_attention_heads,
            key_heads=model.num_key_value_heads,
            head_size=model.head_dim,
            inner=model.layers[0].gate.matrix.rows,
            vocabulary=model.head.matrix.rows,
            epsilon=model.rms_norm_eps,
            scaling=model.head_dim**-0.5,
            embedding=c_matrix(model.embedding),
            head=c_matrix(model.head.matrix, model.head.bias),
            norm=_pointer(model.norm),
            layers=self.layers,
        )
        self.cosines = self.sines = np.empty((0, model.head_dim), np.float32)  # (positions, D)
        self.storage: Tensor | None = None  # the cache whose addresses are in self.layers

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return self.c_model.vocabulary

    @property
    def cache_bytes(self) -> int:
        """The bytes that the keys and values of a token take."""
        model = self.transformer
        return 2 * len(model.layers) * model.num_key_value_heads * model.head_dim * self.dtype.itemsize

    def new_cache(self) -> PreallocatedCache:
        """Return an empty cache."""
        model = self.transformer
        return PreallocatedCache(len(model.layers), model.num_key_value_heads, model.head_dim)

    def forward(self, batch: "Batch", *, first: int, keep: int) -> Tensor:
        """Run the model over the columns of a batch from `first` to the end, and add them to its
        cache. Return the logits of the last `keep` columns, (B, keep, V), in fp32.
        """
        batch.cache.reserve(*batch.ids.shape)  # room for all new tokens at once
        return self.compute(batch.tokens, batch.starts, batch.cache, first=first, keep=keep)

    def compute(
        self, ids: Tensor, starts: Tensor, cache: PreallocatedCache, *, first: int, keep: int
    ) -> Tensor:
        """Run the model over the columns of ids (B, T) from `first` on, and add them to the cache.

        Return the logits of the last `keep` columns, (B, keep, V), in fp32. `starts` (B) is the
        column where each text begins; what is before it counts as a text of its own, of one token.
        """
        texts, length = ids.shape
        new = length - first
        cache.reserve(texts, length)
        self._use(cache)
        tokens, row_texts, columns, row_starts = _rows_of(ids, starts, first)
        cosines, sines = self._angles(columns - row_starts)
        logits = torch.empty(keep * texts, self.c_model.vocabulary)
        num_skipped = len(tokens) - len(logits)  # rows without logits
        for begin, count in _blocks(len(tokens)):
            step = CStep(
                rows=count,
                capacity=cache.capacity,
                first_logits=min(max(num_skipped - begin, 0), count),
                wide=new >= WIDE_COLUMNS or (self.is_grouped and count >= MANY_ROWS),
                stride=texts,
                tokens=tokens[begin:].ctypes.data,
                texts=row_texts[begin:].ctypes.data,
                columns=columns[begin:].ctypes.data,
                starts=row_starts[begin:].ctypes.data,
                cosines=cosines[begin:].ctypes.data,
                sines=sines[begin:].ctypes.data,
                logits=logits[max(begin - num_skipped, 0) :].data_ptr(),
            )
            if self.kernel.library.step(self.kernel.pool, self.c_model, step):
                raise MemoryError
        cache.length = length
        return logits.view(keep, texts, -1).transpose(0, 1)

    def _use(self, cache: PreallocatedCache) -> None:
        """Let decoder.c read and write this cache."""
        if self.storage is cache.keys:
            return
        for number, layer in enumerate(self.layers):
            layer.keys = cache.keys[number].data_ptr()
            layer.values = cache.values[number].data_ptr()
        self.storage = cache.keys

    def _angles(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the cosines and sines (R, D) of positions (R)."""
        needed = int(positions.max()) + 1
        if needed > len(self.cosines):
            cosines, sines = self.transformer.rotary(torch.arange(2 * needed))
            self.cosines, self.sines = cosines.numpy(), sines.numpy()
        return self.cosines[positions], self.sines[positions]


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Yield the beginning and the length of each block of tokens that the step in C takes at a time.

    A long prompt takes minutes: on a terminal, a bar then shows how much of it has been read, and vanishes at
    the end. A server's thread, which is not the main one, draws nothing.
    """
    if length <= MAX_ROWS:  # as every step after the prompt
        yield 0, length
        return
    # None: hidden where stderr is no terminal
    is_hidden = None if threading.current_thread() is threading.main_thread() else True
    shown = {"unit": "token", "leave": False, "dynamic_ncols": True, "delay": PATIENCE, "disable": is_hidden}
    with tqdm(total=length, desc="reading", **shown) as bar:
        for begin in range(0, length, MAX_ROWS):
            count = min(MAX_ROWS, length - begin)
            yield begin, count
            bar.update(count)


def _rows_of(ids: Tensor, starts: Tensor, first: int) -> np.ndarray:
    """Return the token, text, column and first column of each row (4, R), for the columns of ids (B, T)
    from `first` on: column by column, so that a text's rows come in order. By numpy, because a call of
    PyTorch takes some microseconds, and this is done for each token.
    """
    texts, length = ids.shape
    rows = np.empty((4, length - first, texts), np.int32)
    rows[0] = ids[:, first:].numpy().T
    rows[1] = np.arange(texts)
    rows[2] = np.arange(first, length)[:, None]
    rows[3] = np.minimum(starts.numpy(), rows[2])
    return rows.reshape(4, -1)


# The self-check -----------------------------------------------------------------------------------


@torch.inference_mode()
def self_check(library: ctypes.CDLL) -> float:
    """Return the largest difference between a logit of the compiled step and of the reference: for
    a small model of each kind of weights, two texts, some tokens, a prompt and a token.
    """
    kernel, starts = Kernel(library, 2), torch.tensor([0, 2])
    length = 3 + WIDE_COLUMNS + 1
    ids = torch.arange(2 * length).view(2, -1) * 7 % CHECKED_SIZES["vocabulary"]
    largest = 0.0
    for kind in KINDS:
        model = random_transformer(kind)
        compiled = CompiledModel(model, kernel)
        cache = compiled.new_cache()
        shape = (len(model.layers), 2, model.num_key_value_heads, length, model.head_dim)
        keys, values = torch.zeros(2, *shape)
        ours, theirs = [], []
        for first, end in ((0, 3), (3, length - 1), (length - 1, length)):
            ours.append(compiled.compute(ids[:, :end], starts, cache, first=first, keep=end - first))
        for column in range(length):
            columns = torch.full((2,), column)
            positions = Positions(torch.arange(2), columns, torch.minimum(starts, columns))
            theirs.append(reference_step(model, keys, values, ids[:, column], positions))
        difference = (torch.cat(ours, 1) - torch.stack(theirs, 1)).abs().max().item()
        largest = math.inf if math.isnan(difference) else max(largest, difference)
    return largest


@torch.inference_mode()
def check_model(model: Transformer, kernel: Kernel) -> None:
    """Raise NotSupported unless the compiled step computes what the reference does with the first
    layer of a loaded model and some rows of its embedding and head: for a prompt and a token.

    It takes some hundredths of a second, and is done at each start: the compiled file may have been
    damaged since it was checked, and no small model has the sizes of this one.
    """
    head = Linear(model.head.matrix.first(CHECKED_TOKENS), None)
    small = replace(
        model, layers=model.layers[:1], embedding=model.embedding.first(CHECKED_TOKENS), head=head
    )
    length = WIDE_COLUMNS + 1
    ids = torch.arange(length)[None] % small.embedding.rows
    starts = torch.zeros(1, dtype=torch.long)
    compiled = CompiledModel(small, kernel)
    cache = compiled.new_cache()
    parts = ((0, length - 1), (length - 1, length))
    ours = torch.cat(
        [
            compiled.compute(ids[:, :end], starts, cache, first=first, keep=end - first)[0]
            for first, end in parts
        ]
    )
    keys, values = torch.zeros(2, 1, 1, model.num_key_value_heads, length, model.head_dim)
    one = torch.zeros(length, dtype=torch.long)
    positions = Positions(one, torch.arange(length), one)
    theirs = reference_step(small, keys, values, ids[0], positions)
    most = max(LARGEST_DIFFERENCE, 1e-5 * float(theirs.abs().max()))
    both = torch.isclose(ours, theirs, rtol=0, atol=most)
    if not both.all() and theirs.isfinite().all():  # else the model has no logits to compare
        difference = (ours - theirs).abs().max().item()
        raise NotSupported(f"the compiled step is wrong: a logit differs by {difference:.1g}")


DTYPE_OF_KIND = {kind: dtype for dtype, kind in KIND_OF_DTYPE.items()}
CHECKED_SIZES = {"width": 64, "inner": 96, "heads": 4, "key_heads": 2, "head_size": 16, "vocabulary": 50}


def _random_matrix(kind: Kind, rows: int, columns: int, generator: torch.Generator) -> Matrix:
    numbers = torch.randint(0, 16, (rows, columns), generator=generator)
    scales = torch.full((rows, columns // GROUP), 0.02).half()
    if kind == "groups8":
        return pack(kind, numbers - 8, scales, None)
    packed = pack("groups4", numbers, scales, -8 * scales)
    return packed if kind == "groups4" else convert(packed, DTYPE_OF_KIND[kind])


def random_transformer(kind: Kind) -> Transformer:
    """Return a small model with random weights of a kind, and with all that a layer can have."""
    generator = torch.Generator().manual_seed(0)
    width, inner, heads, key_heads, size, vocabulary = CHECKED_SIZES.values()

    def linear(rows: int, columns: int) -> Linear:
        matrix = _random_matrix(kind, rows, columns, generator)
        return Linear(matrix, torch.randn(rows, generator=generator) / 8)

    def norm(size: int) -> Tensor:
        return 1 + torch.randn(size, generator=generator) / 8

    def layer(window: int | None) -> Layer:
        return Layer(
            query=linear(heads * size, width),
            key=linear(key_heads * size, width),
            value=linear(key_heads * size, width),
            output=linear(width, heads * size),
            gate=linear(inner, width),
            up=linear(inner, width),
            down=linear(width, inner),
            attention_norm=norm(width),
            mlp_norm=norm(width),
            query_norm=norm(size),
            key_norm=norm(size),
            window=window,
        )

    return Transformer(
        layers=[layer(None), layer(2)],
        embedding=_random_matrix(kind, vocabulary, width, generator),
        head=linear(vocabulary, width),
        norm=norm(width),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=size,
        rms_norm_eps=0.1,
        rotary=Rotary(torch.logspace(0, -2, size // 2)),
        max_position_embeddings=64,
    )
