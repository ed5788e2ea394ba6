"""The decoding step in C: its products against float64, the step against the one written out in
PyTorch and the library's forward, and how it is compiled.
"""

import functools
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from common import compiler
from common.errors import NotSupported
from common.generation import fast_decoding, language_model
from common.generation.fast_decoding import CompiledModel, Kernel
from common.generation.llama import Positions, reference_step
from common.generation.stored_weights import KIND_OF_DTYPE, KINDS, TILE, Matrix, as_matrix, convert, pack
from common.runtime import Runtime
from conftest import heavy
from language_models import SIZES, VOCABULARY, needs_compiler, own_transformer, save_tiny_model

pytestmark = needs_compiler

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {kind: dtype for dtype, kind in KIND_OF_DTYPE.items()}
# an fp32 product has an error of some 2^-24 of the sum of the sizes of its terms
ROUNDING = 4e-7
WIDENED_ROUNDING = 8e-7  # of sums in fp32, one term after the other: 4.2e-7 was seen


@pytest.fixture(scope="module", params=["native", "portable"])
def kernel(request, cache_dir, tmp_path_factory) -> Kernel:
    """The step compiled for this processor, and without any of its special instructions."""
    if request.param == "portable":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiler, "FLAGS", [*compiler.FLAGS, "-DPORTABLE"])
            library = fast_decoding.load_library.__wrapped__(str(tmp_path_factory.mktemp("cache")))
        assert Kernel(library, 1).instructions == "portable C"
    else:
        library = fast_decoding.load_library(str(cache_dir))
    return Kernel(library, 2)


def widen(kernel: Kernel, matrix: Matrix, first_row: int = 0, rows: int | None = None) -> torch.Tensor:
    """Return `rows` rows of a matrix from `first_row` on, a multiple of 16, in fp32."""
    count = matrix.rows - first_row if rows is None else rows
    whole_tiles = min(-(-count // TILE) * TILE, matrix.rows - first_row)
    result, source = torch.empty(whole_tiles, matrix.columns), fast_decoding.c_matrix(matrix)
    kernel.library.widen(kernel.pool, source, first_row, whole_tiles, result.data_ptr())
    return result[:count]


def multiply(kernel: Kernel, matrix: Matrix, x: torch.Tensor, *, wide: bool = False) -> torch.Tensor:
    """Return x (R, columns) times a matrix: (R, rows). For up to 128 rows R; `wide` as for those of
    a prompt.
    """
    result, source, x = torch.empty(len(x), matrix.rows), fast_decoding.c_matrix(matrix), x.contiguous()
    assert not kernel.library.product(kernel.pool, source, x.data_ptr(), len(x), wide, result.data_ptr())
    return result


def widen_rows(kernel: Kernel, matrix: Matrix) -> torch.Tensor:
    """Return a matrix in fp32, widened row by row, as the embeddings of tokens are."""
    result, source = torch.empty(matrix.rows, matrix.columns), fast_decoding.c_matrix(matrix)
    for row in range(matrix.rows):
        kernel.library.widen_one(source, row, result[row].data_ptr())
    return result


def random_matrix(kind: str, rows: int, columns: int, seed: int = 0) -> Matrix:
    """Return a matrix with numbers of the whole range of its kind."""
    generator = torch.Generator().manual_seed(seed)
    if kind not in ("groups4", "groups8"):
        return as_matrix(torch.randn(rows, columns, generator=generator).to(DTYPES[kind]))
    low, high = (0, 16) if kind == "groups4" else (-128, 128)
    numbers = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int16)
    scales = torch.randn(2, rows, columns // 32, generator=generator).half()
    return pack(kind, numbers, scales[0], scales[1] if kind == "groups4" else None)


def relative_error(kernel: Kernel, matrix: Matrix, x: torch.Tensor, *, wide: bool = False) -> float:
    """Return the largest error of the products, relative to the sum of the sizes of their terms."""
    weights = matrix.widen().double()
    error = (multiply(kernel, matrix, x, wide=wide).double() - x.double() @ weights.T).abs()
    return (error / (x.double().abs() @ weights.abs().T).clamp(min=1e-300)).max().item()


# Products -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 33, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_float64(kind, rows, kernel):
    """Sizes that do not fill tiles of 16 rows, and for numbers of their own not a vector either."""
    sizes = [(1, 32), (16, 64), (37, 96), (100, 160), (257, 32)]
    sizes += [] if kind.startswith("groups") else [(3, 1), (21, 37), (16, 15), (5, 100)]
    for size in sizes:
        matrix = random_matrix(kind, *size)
        x = torch.randn(rows, size[1]) * torch.logspace(-3, 3, rows)[:, None]
        assert relative_error(kernel, matrix, x) < ROUNDING, size


@pytest.mark.parametrize("value", [1.0, -1.0, 3.7e-20, 1e30])
@pytest.mark.parametrize("kind", ["groups4", "groups8"])
def test_the_largest_digits_and_numbers_do_not_overflow(kind, value, kernel):
    """All activations as large as the largest of their group: every digit of every product is at
    its limit; then one of them halfway between two whole numbers.
    """
    low, high = (0, 15) if kind == "groups4" else (-128, 127)
    for number in (low, high):
        numbers = torch.full((17, 64), number, dtype=torch.int16)
        ones = torch.ones(17, 2).half()
        matrix = pack(kind, numbers, ones, -ones if kind == "groups4" else None)
        for share in (1.0, 127.5 / 128, 0.5, 1 / 3):
            x = torch.full((2, 64), value)
            x[1, 1::2] *= -share
            assert relative_error(kernel, matrix, x) < ROUNDING


def test_activations_have_the_precision_of_fp32(kernel):
    """A matrix of ones and zeros shows each activation: off by at most half a step of its group,
    the largest of 32 divided by 8,355,000, and by what three fp32 products round.
    """
    matrix = pack(
        "groups4", torch.eye(32, dtype=torch.int16), torch.ones(32, 1).half(), torch.zeros(32, 1).half()
    )
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    error = (multiply(kernel, matrix, x) - x).abs().amax(1)
    assert (error <= (0.5 / 8_355_000 + 3 * 2**-24) * x.abs().amax(1)).all()


@pytest.mark.parametrize("kind", ["groups4", "groups8"])
def test_whole_numbers_come_out_as_they_are_and_others_rounded(kind, kernel):
    """The largest of a group is 8,355,000, so that its scale is 1; others are not cut, which would
    make them smaller on the average, and what is below 1e-30 counts as 0.
    """
    eye = identity(kind, 64)
    x = torch.randint(-8_355_000, 8_355_001, (20, 64), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::32] = 8_355_000
    assert torch.equal(multiply(kernel, eye, x), x)
    assert torch.equal(multiply(kernel, eye, around_zero()), around_zero().round())
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    growth = (multiply(kernel, eye, x) - x) * x.sign() / x.abs().amax(1, keepdim=True)
    assert abs(growth.double().mean().item()) < 3e-8  # half a step is 6e-8
    assert (multiply(kernel, eye, torch.full((2, 64), 1e-38)) == 0).all()


def around_zero() -> torch.Tensor:
    """Return numbers (1, 64) from -1.6 to 1.5 in groups whose scale is 1; none is halfway between two."""
    x = (torch.arange(64) % 32)[None] / 10 - 1.6
    x[:, ::32] = 8_355_000
    x[(x - x.round()).abs() == 0.5] = 0.4
    return x


def identity(kind: str, size: int) -> Matrix:
    """Return a matrix of groups with ones in its diagonal, and zeros."""
    scales = torch.ones(size, size // 32).half()
    numbers = torch.eye(size, dtype=torch.int16)
    return pack(kind, numbers, scales, torch.zeros_like(scales) if kind == "groups4" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_give_zero_and_what_is_no_number_gives_none(kind, kernel):
    matrix = random_matrix(kind, 20, 64)
    x = torch.randn(4, 64)
    x[0] = 0.0
    x[1, 40], x[2, 3] = torch.inf, torch.nan
    found = multiply(kernel, matrix, x)
    assert (found[0] == 0).all() and found[3].isfinite().all()
    assert not found[1].isfinite().any() or kind in ("fp32", "fp16", "bf16")
    assert found[2].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_widened_exactly(kind, kernel):
    for rows, columns in ((1, 32), (37, 96), (64, 160)):
        matrix = random_matrix(kind, rows, columns)
        assert torch.equal(widen(kernel, matrix), matrix.widen())
        assert torch.equal(widen_rows(kernel, matrix), matrix.widen())
    assert torch.equal(widen(kernel, matrix, 16, 21), matrix.widen()[16:37])


def test_the_smallest_fp16_numbers_survive(kernel):
    """Subnormal ones: a scale of a group can be one."""
    numbers = torch.tensor([[6e-8, -6e-8, 3e-5, 6e-5, 65504.0, -0.0, 1.0, 2.0]]).half()
    matrix = as_matrix(numbers)
    assert torch.equal(widen(kernel, matrix), numbers.float())
    assert torch.equal(multiply(kernel, as_matrix(numbers.T.contiguous()), torch.ones(1, 1)), numbers.float())


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_gives_the_same_bits(kind, kernel):
    matrix, x = random_matrix(kind, 100, 96), torch.randn(5, 96)
    expected = multiply(kernel, matrix, x)
    for num_threads in (1, 3, 8):
        other = Kernel(kernel.library, num_threads)
        for _ in range(20):
            assert torch.equal(multiply(other, matrix, x), expected)


# Steps --------------------------------------------------------------------------------------------

COMMON: dict[str, Any] = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "llama, tied, biases, scaled positions": LlamaConfig(
        **COMMON, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3
    ),
    "llama, several groups of 32": LlamaConfig(**{**COMMON, "hidden_size": 64, "intermediate_size": 96}),
    "llama, odd sizes": LlamaConfig(
        vocab_size=101,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ),
    "mistral, window": MistralConfig(**COMMON, sliding_window=5),
    "qwen2, biases": Qwen2Config(**COMMON),
    "mistral, a window and heads of whole tiles": MistralConfig(**COMMON, head_dim=32, sliding_window=21),
    "llama, large heads": LlamaConfig(**COMMON, head_dim=244),
    "qwen3, norms of queries and keys, a window in one layer": Qwen3Config(
        **COMMON, head_dim=16, sliding_window=6, use_sliding_window=True, max_window_layers=1
    ),
}


@functools.cache
def random_model(name: str) -> Any:
    """Return a model with random numbers in every weight, also in norms and biases."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def in_kind(model: Any, kind: str) -> dict[str, Matrix]:
    """Return the matrices of a model in another kind of storage."""
    matrices = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2:
            continue
        if not kind.startswith("groups"):
            matrices[name] = convert(as_matrix(parameter), DTYPES[kind])
            continue
        # rounded to groups in the simplest way: the reference gets the same numbers
        groups = parameter.reshape(len(parameter), -1, 32)
        if kind == "groups4":
            minimums = groups.amin(-1)
            scales = ((groups.amax(-1) - minimums) / 15).half()
            numbers = ((groups - minimums.half().float()[..., None]) / scales.float()[..., None]).round()
            packed = numbers.clamp(0, 15).short().flatten(1), scales, minimums.half()
        else:
            scales = (groups.abs().amax(-1) / 127).half()
            numbers = (groups / scales.float()[..., None]).round().clamp(-128, 127)
            packed = numbers.short().flatten(1), scales, None
        matrices[name] = pack(kind, *packed)
    return matrices


def in_mixed_kinds(model: Any, shift: int) -> dict[str, Matrix]:
    """Return the matrices of a model, each in the next kind of storage; the first is in the `shift`-th."""
    kinds = {kind: in_kind(model, kind) for kind in KINDS}
    names = enumerate(kinds["fp32"])
    return {name: kinds[KINDS[(place + shift) % len(KINDS)]][name] for place, name in names}


def compare_steps(compiled: CompiledModel, texts: int, starts: list[int], splits: list[int]) -> None:
    """Compare the logits of C and of PyTorch for padded texts whose columns come in parts."""
    model, length = compiled.transformer, splits[-1]
    ids = torch.randint(0, model.embedding.rows, (texts, length), generator=torch.Generator().manual_seed(2))
    cache, first_columns = compiled.new_cache(), torch.tensor(starts)
    shape = (len(model.layers), texts, model.num_key_value_heads, length, model.head_dim)
    keys, values = torch.full(shape, 1e9), torch.full(shape, 1e9)
    for begin, end in zip([0, *splits], splits):
        ours = compiled.compute(ids[:, :end], first_columns, cache, first=begin, keep=end - begin)
        for column in range(begin, end):
            columns = torch.full((texts,), column)
            positions = Positions(torch.arange(texts), columns, torch.minimum(first_columns, columns))
            expected = reference_step(model, keys, values, ids[:, column], positions)
            torch.testing.assert_close(ours[:, column - begin], expected, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(cache.keys[:, :, :, :length], keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.values[:, :, :, :length], values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_computes_what_is_written_out_in_pytorch(name, kernel):
    """One text token by token, then guesses; padded texts; more rows than fit into one call."""
    compiled = CompiledModel(own_transformer(random_model(name)), kernel)
    compare_steps(compiled, 1, [0], [1, 2, 3, 4, 9, 10, 15])
    compare_steps(compiled, 3, [0, 2, 7], [9, 10, 11])
    compare_steps(compiled, 5, [0, 1, 0, 3, 20], [21, 22])  # 105 rows
    compare_steps(compiled, 70, list(range(10)) * 7, [10, 11])


PROMPTS = {  # texts, the first column of each, how the columns come: those of a prompt at once
    "one text": (1, [0], [17, 18, 19]),
    "a long one": (1, [0], [300, 301]),
    "after some tokens": (1, [0], [5, 30, 31, 70]),
    "padded": (3, [0, 2, 25], [29, 30, 60]),
    "more rows than fit into one call": (5, [0, 1, 0, 3, 40], [41, 42]),
    "more texts than rows of a call": (150, list(range(15)) * 10, [18, 19]),
}


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("name", ["llama, odd sizes", "mistral, a window and heads of whole tiles"])
def test_the_rows_of_a_prompt_are_computed_as_those_of_tokens(name, case, kernel):
    """With weights that are widened for all of them, and heads of whole tiles together."""
    compare_steps(CompiledModel(own_transformer(random_model(name)), kernel), *PROMPTS[case])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_over_weights_of_each_kind(kind, kernel):
    model = random_model("qwen3, norms of queries and keys, a window in one layer")
    compiled = CompiledModel(own_transformer(model, in_kind(model, kind)), kernel)
    compare_steps(compiled, 2, [0, 3], [40, 41])


@pytest.mark.parametrize("kind", ["groups4", "groups8", "bf16"])
def test_many_texts_step_with_weights_of_each_kind(kind, kernel):
    """From 10 texts on, those of groups are widened."""
    model = random_model("qwen3, norms of queries and keys, a window in one layer")
    compiled = CompiledModel(own_transformer(model, in_kind(model, kind)), kernel)
    assert compiled.is_grouped == kind.startswith("groups")
    for texts in (9, 10, 17):
        compare_steps(compiled, texts, list(range(texts)), [19, 20, 21])


@pytest.mark.parametrize("rows", [8, 10, 17, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_products_with_widened_weights_are_those_of_float64(kind, rows, kernel):
    """Also of more columns than are widened at once."""
    sizes = [(1, 32), (16, 64), (37, 96), (257, 32), (20, 1056)]
    sizes += [] if kind.startswith("groups") else [(3, 1), (21, 37), (16, 15), (5, 600)]
    for size in sizes:
        matrix = random_matrix(kind, *size)
        x = torch.randn(rows, size[1]) * torch.logspace(-3, 3, rows)[:, None]
        assert relative_error(kernel, matrix, x, wide=True) < WIDENED_ROUNDING, size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["llama, several groups of 32", "qwen3, norms of queries and keys, a window in one layer"]
)
def test_a_step_over_weights_of_each_kind(name, kind, kernel):
    model = random_model(name)
    compiled = CompiledModel(own_transformer(model, in_kind(model, kind)), kernel)
    compare_steps(compiled, 1, [0], [1, 2, 7])
    compare_steps(compiled, 4, [0, 3, 0, 5], [6, 7])


@pytest.mark.parametrize("shift", range(len(KINDS)))
def test_each_matrix_may_be_stored_in_a_kind_of_its_own(shift, kernel):
    """As in a file of several formats, or where an adapter was merged into some of them."""
    model = random_model("llama, several groups of 32")
    mixed = in_mixed_kinds(model, shift)
    compiled = CompiledModel(own_transformer(model, mixed), kernel)
    compare_steps(compiled, 2, [0, 3], [1, 6, 7, 30, 31])


def test_a_tied_head_is_that_of_the_embedding(kernel):
    compiled = CompiledModel(own_transformer(random_model("llama, tied, biases, scaled positions")), kernel)
    assert compiled.c_model.head.data == compiled.c_model.embedding.data


def test_a_cache_grows_and_shrinks_without_losing_anything(kernel):
    """Beyond its room for 256 columns, and back: the logits are those of one pass."""
    model = random_model("mistral, window")
    compiled = CompiledModel(own_transformer(model), kernel)
    ids, starts = torch.randint(3, 200, (1, 300)), torch.zeros(1, dtype=torch.long)
    expected = model(ids).logits[0]
    cache, column = compiled.new_cache(), 0
    for end in (5, 255, 256, 257, 300):
        logits = compiled.compute(ids[:, :end], starts, cache, first=column, keep=end - column)[0]
        torch.testing.assert_close(logits, expected[column:end], rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == end
        column = end
    cache.crop(-250)
    assert cache.get_seq_length() == 50
    logits = compiled.compute(ids[:, :51], starts, cache, first=50, keep=1)[0]
    torch.testing.assert_close(logits, expected[50:51], rtol=1e-4, atol=1e-4)


# Compiling ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_before() -> dict[tuple, bytes]:
    """What the compiler has made of a source with a command."""
    return {}


@pytest.fixture
def load_anew(monkeypatch, made_before):
    """Return a function that loads the library as a new process does, with another environment. It
    is compiled without optimisations, which takes a quarter of the time; and a compiler that has
    made a library gives the same one for the same source and flags, at once.
    """
    monkeypatch.setattr(compiler, "FLAGS", ["-O0", *compiler.FLAGS[1:]])
    really_compile = compiler.compile_file

    def compile_once(command: list[str]):
        *start, source, _, library, _ = command
        made = (*start, Path(source).read_text())
        if made in made_before:
            Path(library).write_bytes(made_before[made])
            return
        really_compile(command)
        if Path(library).exists():
            made_before[made] = Path(library).read_bytes()

    monkeypatch.setattr(compiler, "compile_file", compile_once)

    def load(cache_dir: Path, **environment: str):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return fast_decoding.load_library.__wrapped__(str(cache_dir))

    return load


@pytest.fixture
def counted(monkeypatch) -> list:
    """The commands of the compiler that were run."""
    commands, original = [], compiler.compile_file

    def compile_counted(command: list[str]):
        commands.append(command)
        original(command)

    monkeypatch.setattr(compiler, "compile_file", compile_counted)
    return commands


def test_it_is_compiled_once(load_anew, counted, tmp_path):
    assert Kernel(load_anew(tmp_path), 1).instructions
    assert Kernel(load_anew(tmp_path), 1).instructions and len(counted) == 1
    [file] = (tmp_path / "kernels").iterdir()
    assert file.suffix == ".so"


def test_another_processor_or_source_or_flag_is_compiled_anew(load_anew, counted, tmp_path, monkeypatch):
    load_anew(tmp_path)
    monkeypatch.setattr(compiler, "processor", lambda: "another")
    load_anew(tmp_path)
    monkeypatch.setattr(compiler, "FLAGS", [*compiler.FLAGS, "-DPORTABLE"])
    load_anew(tmp_path)
    other = tmp_path / "other.c"
    other.write_text(fast_decoding.SOURCE.read_text() + "// changed\n")
    monkeypatch.setattr(fast_decoding, "SOURCE", other)
    load_anew(tmp_path)
    assert len(counted) == len(list((tmp_path / "kernels").iterdir())) == 4


def test_a_step_that_computes_something_else_is_refused(load_anew, tmp_path, monkeypatch):
    """The check after compiling: here an RMSNorm without its epsilon, and a rotation the other way
    round.
    """
    text, other = fast_decoding.SOURCE.read_text(), tmp_path / "other.c"
    for right, wrong in ((" + epsilon", ""), ("first * cosines[i] - second", "first * cosines[i] + second")):
        assert right in text
        other.write_text(text.replace(right, wrong))
        monkeypatch.setattr(fast_decoding, "SOURCE", other)
        with pytest.raises(NotSupported, match="a logit differs by"):
            load_anew(tmp_path)
    assert not list((tmp_path / "kernels").iterdir())


def test_a_compiled_file_that_was_exchanged_is_not_used(load_anew, tmp_path):
    """What lies in the cache is not checked anew with small models, but with each model that is
    loaded: here it has an RMSNorm without its epsilon.
    """
    cache, model = tmp_path / "cache", save_tiny_model(tmp_path / "tiny")
    load_anew(cache)
    [compiled] = (cache / "kernels").iterdir()
    other = tmp_path / "other.c"
    other.write_text(fast_decoding.SOURCE.read_text().replace(" + epsilon", " + 2 * epsilon + 0.001f"))
    compiled.unlink()  # this process has it mapped
    command = [*compiler.find_compiler(), *compiler.FLAGS, *compiler.INCLUDES, "-march=native", str(other)]
    subprocess.run([*command, "-o", str(compiled), "-lm"], check=True)
    cpu = Runtime(torch.device("cpu"), "fp32")
    loaded = language_model.load(str(model), cpu, cache_dir=str(cache))
    assert not loaded.model.is_compiled
    assert re.fullmatch(r"PyTorch \(the compiled step is wrong: a logit differs by \S+\)", loaded.backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_a_model_is_checked_with_its_first_rows(name, kind, kernel):
    model = random_model(name)
    transformer = own_transformer(model, in_kind(model, kind))
    fast_decoding.check_model(transformer, kernel)
    matrix = transformer.embedding
    for rows in (16, 37, VOCABULARY - 1, VOCABULARY, 500):
        first = matrix.first(rows)
        assert first.rows == (rows // 16 * 16 if rows < VOCABULARY else VOCABULARY)
        assert torch.equal(first.widen(), matrix.widen()[: first.rows])


def test_a_small_model_of_each_kind_is_checked():
    """Each of the kinds of weights gives other logits: none is checked with the weights of another."""
    models = [fast_decoding.random_transformer(kind) for kind in KINDS]
    assert [model.layers[0].gate.matrix.kind for model in models] == list(KINDS)


def test_a_file_that_was_cut_off_is_compiled_anew(load_anew, counted, tmp_path):
    load_anew(tmp_path)
    [file] = (tmp_path / "kernels").iterdir()
    file.unlink()  # this process has it mapped
    file.write_bytes(b"\x7fELF")
    assert Kernel(load_anew(tmp_path), 1).instructions and len(counted) == 2


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(load_anew, counted, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert Kernel(load_anew(tmp_path), 1).instructions and len(counted) == 1


def test_a_cache_that_is_no_folder(load_anew, counted, tmp_path):
    """Root may write everywhere, but not into a file."""
    (tmp_path / "kernels").write_text("not a folder")
    assert Kernel(load_anew(tmp_path), 1).instructions and len(counted) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kernels"]


def test_without_a_compiler_the_reason_says_so(load_anew, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotSupported, match="no C compiler"):
        load_anew(tmp_path, PATH=str(tmp_path), CC="")


@pytest.mark.parametrize("script", ["echo 'x.c:1: error: no such flag' >&2; exit 1", "exit 3", "kill -9 $$"])
def test_a_broken_compiler_is_named_with_its_message(script, load_anew, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    with pytest.raises(NotSupported, match="broken failed: " + ("x.c:1" if "echo" in script else "")):
        load_anew(tmp_path / "cache", CC=f"{broken} -O1")
    assert not list((tmp_path / "cache" / "kernels").iterdir())


def test_a_compiler_that_ends_well_and_writes_nothing(load_anew, tmp_path):
    with pytest.raises(NotSupported):
        load_anew(tmp_path, CC="true")


def test_the_compiler_of_the_user_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert compiler.find_compiler() in (["cc"], ["gcc"], ["clang"])
    mine = tmp_path / "mine"
    mine.write_text("")
    mine.chmod(0o755)
    monkeypatch.setenv("CC", f"{mine} -m64")
    assert compiler.find_compiler() == [str(mine), "-m64"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC")
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: name == "ziglang")
    assert compiler.find_compiler() == [sys.executable, "-m", "ziglang", "cc"]


AVX2 = ["-mavx2", "-mfma", "-mf16c"]


@pytest.mark.slow
def test_two_processes_that_compile_at_once(tmp_path):
    code = (
        "from common.generation.fast_decoding import *;"
        f" print(Kernel(load_library({str(tmp_path)!r}), 2).instructions)"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0, 0] and not any(error for _, error in ended)
    assert len(list((tmp_path / "kernels").iterdir())) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["-march=cascadelake", "-O1"],
        heavy(["-march=cascadelake"]),
        heavy(["-mavx2", "-mfma", "-mf16c", "-mavxvnni"]),
        heavy(["-mavx2", "-mfma", "-mf16c"]),
    ],
)
def test_the_other_variants_of_this_kind_of_processor_compile(flags, tmp_path):
    if os.uname().machine != "x86_64":
        pytest.skip("flags of x86-64")
    command = ["cc", *compiler.FLAGS, *compiler.INCLUDES, "-Wall", "-Wextra", "-Werror", *flags]
    done = subprocess.run(
        [*command, fast_decoding.SOURCE, "-o", tmp_path / "x.so", "-lm"], capture_output=True
    )
    if b"unrecognized" in done.stderr:
        pytest.skip("this compiler does not know the flags")
    assert done.returncode == 0, done.stderr.decode()
