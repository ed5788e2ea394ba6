"""Weights as they are stored, against the formulas of the formats and the gguf library."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.generation import stored_weights
from common.generation.stored_weights import Matrix, pack, unpack
from language_models import K_QUANTS, random_blocks

FORMATS = gguf.GGMLQuantizationType
PYTHON_WRITES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def random_groups(kind: str, rows: int, columns: int, seed: int = 0):
    """Return numbers of the whole range, and scales and minimums of both signs."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (0, 16) if kind == "groups4" else (-128, 128)
    numbers = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int16)
    scales = torch.randn(rows, columns // 32, generator=generator).half()
    minimums = torch.randn(rows, columns // 32, generator=generator).half()
    return numbers, scales, minimums if kind == "groups4" else None


@settings(max_examples=40)
@given(st.sampled_from(["groups4", "groups8"]), st.integers(1, 40), st.integers(1, 5), st.integers(0, 9))
def test_what_is_packed_is_unpacked(kind, rows, groups, seed):
    numbers, scales, minimums = random_groups(kind, rows, 32 * groups, seed)
    matrix = pack(kind, numbers, scales, minimums)
    assert (matrix.rows, matrix.columns) == (rows, 32 * groups)
    own_numbers, own_scales, own_minimums = unpack(matrix)
    assert torch.equal(own_numbers.short(), numbers) and torch.equal(own_scales, scales)
    assert torch.equal(own_minimums, torch.zeros_like(scales) if minimums is None else minimums)


@pytest.mark.parametrize("kind", ["groups4", "groups8"])
def test_a_group_is_scale_times_number_plus_minimum(kind):
    numbers, scales, minimums = random_groups(kind, 19, 96)
    widened = pack(kind, numbers, scales, minimums).widen()
    for row, column in ((0, 0), (3, 31), (15, 32), (16, 63), (18, 95), (7, 5)):
        group = column // 32
        minimum = 0.0 if minimums is None else minimums[row, group].item()
        expected = np.float32(scales[row, group].item()) * np.float32(numbers[row, column].item())
        assert widened[row, column].item() == np.float32(expected + np.float32(minimum))


def write_gguf(path, name: str, rows: int = 48, columns: int = 256, *, architecture: str = "llama"):
    """Write a file with one matrix under several names, and a vector; return the matrix as the gguf
    library reads it.
    """
    writer, kind = gguf.GGUFWriter(path, architecture), FORMATS[name]
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    generator = np.random.default_rng(0)
    if name in PYTHON_WRITES:
        data = gguf.quantize(generator.standard_normal((rows, columns), np.float32), kind)
    else:
        data = random_blocks(name, rows, columns, generator)
    for tensor in ("blk.0.ffn_up.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight", "token_embd.weight"):
        writer.add_tensor(tensor, data, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", np.arange(columns, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(gguf.dequantize(data, kind).copy()).view(rows, columns)


def read_gguf(path: Path) -> dict[str, Any]:
    with stored_weights.open_gguf(path) as reader:
        return stored_weights.read_gguf(reader, path)


@pytest.mark.parametrize("name", [*PYTHON_WRITES, *K_QUANTS])
def test_every_format_is_read_as_the_gguf_library_reads_it(name, tmp_path):
    expected = write_gguf(tmp_path / "model.gguf", name)
    weights = read_gguf(tmp_path / "model.gguf")
    up, norm = weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.0.input_layernorm.weight"]
    kinds = {"Q4_0": "groups4", "Q4_1": "groups4", "Q8_0": "groups8", "F16": "fp16", "BF16": "bf16"}
    assert isinstance(up, Matrix) and up.kind == kinds.get(name, "fp32")
    assert torch.equal(up.widen(), expected)
    assert torch.equal(norm, torch.arange(256.0))
    # llama.cpp alternates the halves of each head's rows: row 1 of a head of 12 is its row 6
    for part, heads in (("q", 4), ("k", 2)):
        rows = weights[f"model.layers.0.self_attn.{part}_proj.weight"].widen()
        size = 48 // heads
        for head in range(heads):
            for row in range(size):
                theirs = head * size + 2 * (row % (size // 2)) + row // (size // 2)
                assert torch.equal(rows[head * size + row], expected[theirs])


def test_only_the_files_of_llama_have_their_heads_reordered(tmp_path):
    expected = write_gguf(tmp_path / "model.gguf", "Q8_0", architecture="qwen2")
    weights = read_gguf(tmp_path / "model.gguf")
    assert torch.equal(weights["model.layers.0.self_attn.q_proj.weight"].widen(), expected)


def test_an_unknown_architecture_or_tensor_is_named(tmp_path):
    write_gguf(tmp_path / "gpt2.gguf", "F32", architecture="gpt2")
    with pytest.raises(UserError, match="gpt2"):
        read_gguf(tmp_path / "gpt2.gguf")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_head_count(4)
    writer.add_tensor("blk.0.ssm_conv.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"blk\.0\.ssm_conv\.weight"):
        read_gguf(tmp_path / "odd.gguf")


def test_a_folder_of_weights_is_read_as_it_was_written(tmp_path):
    weights = {
        "four": pack("groups4", *random_groups("groups4", 19, 64)),
        "eight": pack("groups8", *random_groups("groups8", 5, 32)),
        "half": stored_weights.as_matrix(torch.randn(3, 5).half()),
        "vector": torch.randn(7),
    }
    stored_weights.write_weights(tmp_path / "file", weights)
    found = stored_weights.read_weights(tmp_path / "file")
    assert set(found) == set(weights) and torch.equal(found["vector"], weights["vector"])
    for name in ("four", "eight", "half"):
        one, other = found[name], weights[name]
        assert (one.kind, one.rows, one.columns) == (other.kind, other.rows, other.columns)
        assert torch.equal(one.data, other.data)


def test_a_weight_is_rounded_to_another_dtype():
    matrix = pack("groups4", *random_groups("groups4", 19, 64))
    rounded = stored_weights.convert(matrix, torch.bfloat16)
    assert rounded.kind == "bf16" and torch.equal(rounded.data, matrix.widen().bfloat16())
