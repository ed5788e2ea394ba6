"""GGUF files as models: weights, tokenizer and chat template against what transformers reads from
the same file.
"""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import bundled, files
from common.errors import UserError
from common.generation import decoding, explain, language_model, stored_weights
from common.generation.language_model import Loading
from common.generation.stored_weights import Matrix
from common.runtime import Runtime
from conftest import generate_on_cpu, quick
from language_models import K_QUANTS, TEXTS, needs_compiler, random_blocks, save_tiny_model

CPU = Runtime(torch.device("cpu"), "fp32")
FORMATS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q5_0")
QUICK = ("F16", "Q4_0", "Q4_1", "Q8_0")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "norm": "output_norm",
}


def gguf_name(name: str) -> str:
    """Return the name in a GGUF file of a parameter of transformers."""
    parts = name.removeprefix("model.").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:-1])]}.{parts[-1]}"
    return f"{NAMES['.'.join(parts[:-1])]}.{parts[-1]}"


def write_gguf(folder: Path, path: Path, *kinds: str) -> None:
    """Write a small Llama with its tokenizer as llama.cpp's conversion does: its matrices in some
    formats in turn, in those of K_QUANTS with other numbers.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    merges = [" ".join(merge) for merge in _merges(folder)]
    in_turn, generator = itertools.cycle(kinds), np.random.default_rng(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp alternates the halves of each head
                numbers = (
                    numbers.reshape(heads, 2, -1, numbers.shape[1]).swapaxes(1, 2).reshape(numbers.shape)
                )
        numbers = np.ascontiguousarray(numbers)
        kind = next(in_turn) if parameter.dim() == 2 else "F32"
        wanted = gguf.GGMLQuantizationType[kind]
        is_random = kind in K_QUANTS
        data = random_blocks(kind, *numbers.shape, generator) if is_random else gguf.quantize(numbers, wanted)
        writer.add_tensor(gguf_name(name), data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merges(folder: Path) -> list[list[str]]:
    return json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]


@needs_compiler
@pytest.mark.parametrize("kind", quick(FORMATS, *QUICK))
def test_a_file_is_the_model_that_transformers_reads_from_it(kind, tiny, cache, tmp_path):
    path = tmp_path / f"{kind}.gguf"
    write_gguf(tiny, path, kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = language_model.load(str(path), CPU, cache_dir=cache)
    assert ours.model.is_compiled and ours.backend == "C"
    kinds = {weight.kind for weight in ours.weights.values() if isinstance(weight, Matrix)}
    stored = {"Q4_0": "groups4", "Q4_1": "groups4", "Q8_0": "groups8", "F16": "fp16", "BF16": "bf16"}
    assert kinds == {stored.get(kind, "fp32")}
    assert (ours.end_ids, ours.context) == ((2,), 256)
    for text in TEXTS:
        ids = ours.tokenizer(text)["input_ids"]
        assert ids == their_tokenizer(text)["input_ids"] and ours.tokenizer.decode(ids) == text
    assert ours.tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny).chat_template
    ids = torch.randint(3, 300, (1, 90))
    expected = theirs(ids).logits[0]
    twin = explain.library_model(ours)
    torch.testing.assert_close(twin(ids).logits[0], expected, rtol=1e-6, atol=1e-6)
    batch = decoding.left_pad([ids[0, :80].tolist()], ours, room=10)
    logits = [decoding.prefill(ours, batch)]
    logits += [decoding.step(ours, batch, [token]) for token in ids[0, 80:].tolist()]
    torch.testing.assert_close(torch.cat(logits), expected[79:], rtol=1e-4, atol=1e-4)


@needs_compiler
def test_a_file_of_k_quants_is_computed_as_float64_computes_it(cache, tmp_path):
    """The weights are those of the gguf library, and the logits those of its weights in float64:
    all five formats in one model.
    """
    folder = save_tiny_model(tmp_path / "tiny", hidden_size=256, intermediate_size=512)
    path = tmp_path / "k.gguf"
    write_gguf(folder, path, *K_QUANTS)
    ours = language_model.load(str(path), CPU, cache_dir=cache)
    assert ours.backend == "C"
    seen = set()
    for tensor in gguf.GGUFReader(path).tensors:
        name = stored_weights._name_in_transformers(tensor.name, path)
        weight = ours.weights[name]
        if not isinstance(weight, Matrix) or name.endswith(("q_proj.weight", "k_proj.weight")):
            continue  # rows of these are in another order; the logits show it
        seen.add(tensor.tensor_type.name)
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).double()
        assert weight.kind == "fp32" and torch.equal(weight.widen().double(), expected), name
        assert 0.01 < expected.std() < 0.2, name
    assert seen == set(K_QUANTS)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    theirs = theirs.double().eval()
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    batch = decoding.left_pad([ids[0, :30].tolist()], ours, room=10)
    logits = [decoding.prefill(ours, batch)]
    logits += [decoding.step(ours, batch, [token]) for token in ids[0, 30:].tolist()]
    expected = theirs(ids).logits[0, 29:]
    torch.testing.assert_close(torch.cat(logits).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_file_that_changed_with_the_same_size_and_time_is_read_again(tiny, cache, tmp_path):
    path, weights = tmp_path / "a.gguf", []
    for zeros in (False, True):
        write_gguf(tiny, path, "F32")
        if zeros:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
        os.utime(path, ns=(1, 1))
        loading = Loading("fp32", may_compile=False)
        loaded = language_model.load(str(path), CPU, cache_dir=cache, loading=loading)
        weights.append(torch.cat([value.flatten() for value in loaded.model.module.state_dict().values()]))
    assert len(weights[0]) == len(weights[1]) and not torch.equal(*weights)


@needs_compiler
@pytest.mark.parametrize("weights, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_weights_can_be_kept_in_another_dtype(weights, dtype, tiny, cache, tmp_path):
    write_gguf(tiny, tmp_path / "a.gguf", "Q4_1")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.to(dtype).float()
    loading = Loading(weights)
    ours = language_model.load(str(tmp_path / "a.gguf"), CPU, cache_dir=cache, loading=loading)
    assert ours.model.is_compiled
    ids = torch.randint(3, 300, (1, 12))
    batch = decoding.left_pad(ids.tolist(), ours, room=1)
    found = ours.model.forward(batch, first=0, keep=12)
    torch.testing.assert_close(found, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_without_a_compiler_the_weights_are_widened(tiny, cache, tmp_path, monkeypatch):
    write_gguf(tiny, tmp_path / "a.gguf", "Q4_1")
    monkeypatch.setattr(language_model.fast_decoding, "load_library", _no_compiler)
    ours = language_model.load(str(tmp_path / "a.gguf"), CPU, cache_dir=cache)
    assert not ours.model.is_compiled and "no C compiler" in ours.backend
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    ids = torch.randint(3, 300, (2, 12))
    assert torch.equal(ours.model.module(ids).logits, theirs(ids).logits)
    with pytest.raises(UserError, match="--weights file.*no C compiler"):
        language_model.load(str(tmp_path / "a.gguf"), CPU, cache_dir=cache, loading=Loading("file"))


def _no_compiler(cache_dir):
    raise language_model.NotSupported("no C compiler")


@needs_compiler
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_folder_in_16_bits_stays_in_16_bits_and_is_computed_in_fp32(stored, tiny, cache, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=stored)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "half")
    ours = language_model.load(str(tmp_path / "half"), CPU, cache_dir=cache)
    assert ours.model.is_compiled and ours.dtype == torch.float32
    assert ours.model.transformer.head.matrix.data.dtype == stored
    ids = torch.randint(3, 300, (1, 12))
    expected = model.float()(ids).logits
    batch = decoding.left_pad(ids.tolist(), ours, room=1)
    torch.testing.assert_close(ours.model.forward(batch, first=0, keep=12), expected, rtol=1e-4, atol=1e-4)
    twin = explain.library_model(ours)
    torch.testing.assert_close(twin(ids).logits, expected, rtol=1e-6, atol=1e-6)


def stored_folder() -> Path:
    """Return the folder with the content of the bundled model's file, in the cache of this machine."""
    return stored_weights.model_folder(bundled.SMOLLM2, None)


@pytest.mark.slow
def test_the_content_of_the_bundled_file_is_known_whatever_made_the_folder(tmp_path, monkeypatch):
    """Made anew, elsewhere and with the Hub within reach, all its files are the same."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    file = bundled.model_folder(bundled.SMOLLM2, kind="language model") / bundled.GGUF
    (tmp_path / "another name.gguf").symlink_to(file)
    made = stored_weights.convert_gguf(tmp_path / "another name.gguf", tmp_path / "made", name="x")
    assert (made / "manifest.json").read_bytes() == (stored_folder() / "manifest.json").read_bytes()


PLANTED = {
    "another end": lambda folder: replace(folder / "generation_config.json", '{"eos_token_id": 5}'),
    "another template": lambda folder: replace(folder / "chat_template.jinja", "obey {{ messages }}"),
    "no template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "another file": lambda folder: (folder / "added_tokens.json").write_text("{}"),
}


def replace(path: Path, text: str) -> None:
    path.unlink()  # a hard link to the file in the cache
    path.write_text(text)


@pytest.mark.parametrize("vouched", [True, False], ids=["with a manifest", "without"])
@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_folder_does_not_stand_for_the_bundled_model(what, vouched, tmp_path):
    known = stored_folder()
    folder = tmp_path / "stored" / known.name
    folder.parent.mkdir()
    files.link_folder(known, folder)
    assert stored_weights.model_folder(bundled.SMOLLM2, str(tmp_path)) == folder
    PLANTED[what](folder)
    if vouched:
        (folder / "manifest.json").unlink()
        files.write_manifest(folder)
    with pytest.raises(UserError, match=re.escape(str(folder)) + ".*remove the folder"):
        stored_weights.model_folder(bundled.SMOLLM2, str(tmp_path))


def test_a_folder_that_was_hashed_ahead_is_refused_all_the_same(tmp_path):
    known = stored_folder()
    folder = tmp_path / "stored" / known.name
    folder.parent.mkdir()
    files.link_folder(known, folder)
    weights = folder / bundled.STORED_FILE
    weights.unlink()
    shutil.copy(known / weights.name, weights)
    with open(weights, "r+b") as file:
        file.seek(50_000_000)
        file.write(b"x")
    bundled.verify_ahead(bundled.SMOLLM2, str(tmp_path))
    assert weights in files.HASHED_AHEAD
    with pytest.raises(UserError, match=f"{weights.name} is corrupt; remove the folder"):
        stored_weights.model_folder(bundled.SMOLLM2, str(tmp_path))
    assert weights not in files.HASHED_AHEAD


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such file" * 100])
def test_a_damaged_file_is_one_line(content, cache, tmp_path):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"--model .*a\.gguf"):
        language_model.load(str(tmp_path / "a.gguf"), CPU, cache_dir=cache)


def test_the_ending_of_a_file_may_be_in_capitals(tiny, cache, tmp_path, capsys):
    path, flags = tmp_path / "A.GGUF", ("--prompt", "the fox", "--cache-dir", cache)
    write_gguf(tiny, path, "F32")
    assert generate_on_cpu(flags, path, 2) == 0, capsys.readouterr().err
    path.rename(tmp_path / "model")
    assert generate_on_cpu(flags, tmp_path / "model", 2) == 2
    assert "or a file that ends with .gguf" in capsys.readouterr().err
