"""LoRA adapters: merged by generate.py, they give the texts that peft generates with them beside
the weights, and what does not fit is refused in one line.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

import generate
from common.generation import language_model
from common.generation.language_model import Loading
from common.generation.stored_weights import Matrix
from common.runtime import Runtime
from conftest import exit_code_in_process, quick, with_defaults
from hub_server import HubServer
from language_models import PROMPTS, SIZES, needs_compiler, save_tiny_model, train_byte_bpe

CPU = Runtime(torch.device("cpu"), "fp32")
NEW = 12  # tokens of a text


def save_gpt2(folder: Path) -> Path:
    """Write a random GPT-2, whose head is tied to its embedding, with its tokenizer."""
    tokenizer = train_byte_bpe()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=2,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of a Llama, which the step in C computes, and of a GPT-2, which it does not."""
    root = tmp_path_factory.mktemp("models")
    return {"llama": save_tiny_model(root / "tiny-llama"), "gpt2": save_gpt2(root / "tiny-gpt2")}


def save_adapter(model: Path, folder: Path, **settings: Any) -> Path:
    """Write an adapter for a model as a training with peft does, of random numbers."""
    import peft  # five seconds, in the process that runs these tests alone

    base = AutoModelForCausalLM.from_pretrained(model)
    is_gpt2 = base.config.model_type == "gpt2"
    usual = {"target_modules": ["c_attn", "c_fc"] if is_gpt2 else ["q_proj", "v_proj", "down_proj"]}
    usual |= {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "fan_in_fan_out": is_gpt2}
    torch.manual_seed(1)
    adapted = peft.get_peft_model(base, peft.LoraConfig(**usual | settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    adapted.save_pretrained(folder)
    return folder


def by_peft(model: Path, adapter: Path) -> Any:
    """Return a model with an adapter beside its weights, as peft reads it."""
    import peft

    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()


@pytest.fixture
def script(models, cache_dir, capfd):
    """Return a function that runs generate.py in this process; returns code, stdout, stderr."""

    def run(*flags) -> tuple[int, str, str]:
        defaults = {"--model": models["llama"], "--device": "cpu", "--precision": "fp32"}
        defaults |= {"--cache-dir": cache_dir}
        if not set(flags).intersection(generate.generation_flags.NO_TEXTS):
            defaults["--max-new-tokens"] = NEW
        code = exit_code_in_process(generate, with_defaults(flags, defaults))
        return code, *capfd.readouterr()

    return run


KINDS = {  # name: (model, settings of the adapter)
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "scales and ranks of their own": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "one layer": ("llama", {"layers_to_transform": [1]}),
    "directions and lengths (DoRA)": ("llama", {"use_dora": True}),
    "a whole head": ("llama", {"modules_to_save": ["lm_head"]}),
    "a whole head that was tied": ("gpt2", {"modules_to_save": ["lm_head"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "biases": ("gpt2", {"bias": "lora_only"}),
}
QUICK = (
    "llama",
    "gpt2",
    "scales and ranks of their own",
    "directions and lengths (DoRA)",
    "a whole head that was tied",
)


@pytest.mark.parametrize("name", quick(KINDS.keys(), *QUICK))
def test_texts_are_those_that_peft_generates(name, models, script, tmp_path):
    """Greedy tokens one by one, drawn ones in a padded batch by --check."""
    kind, settings = KINDS[name]
    model, adapter = models[kind], save_adapter(models[kind], tmp_path / "adapter", **settings)
    theirs, tokenizer = by_peft(model, adapter), AutoTokenizer.from_pretrained(model)
    flags = ("--model", model, "--adapter", adapter, "--prompt", PROMPTS[0])
    code, _, stderr = script(*flags, "--output", tmp_path / "texts.jsonl")
    assert code == 0 and f"note: --adapter {adapter}: merged into the weights of {model}" in stderr, stderr
    line = json.loads((tmp_path / "texts.jsonl").read_text())
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": 2, "pad_token_id": 0}
    assert line["token_ids"] == theirs.generate(input_ids=ids, **options)[0, ids.shape[1] :].tolist()
    assert line["settings"]["adapter"] == str(adapter)
    plain = AutoModelForCausalLM.from_pretrained(model).generate(ids, **options)
    assert line["token_ids"] != plain[0, ids.shape[1] :].tolist()  # the adapter matters
    drawn = ("--prompt", PROMPTS[1], "--top-k", 20, "--num-samples", 2)
    code, stdout, stderr = script(*flags, *drawn, "--check")
    assert code == 0 and re.match(r"equal: \d+ of \d+ tokens\n", stdout), stdout + stderr
    assert ("step in C" in stderr) == (kind == "llama"), stderr


@needs_compiler
def test_what_an_adapter_does_not_change_stays_as_the_file_stores_it(models, script, tmp_path):
    """Over a GGUF file of 4 bits; --check compares with peft over the same numbers."""
    adapter, path = save_adapter(models["llama"], tmp_path / "adapter"), tmp_path / "tiny.gguf"
    write_gguf(models["llama"], path, "Q4_1")
    flags = ("--model", path, "--adapter", adapter, "--prompt", PROMPTS[0])
    code, stdout, stderr = script(*flags, "--check")
    assert code == 0 and stdout == f"equal: {NEW} of {NEW} tokens\n", stdout + stderr
    assert "those that it changes are in fp32, no longer as in the model's file" in stderr
    assert f"it says that it was made for {models['llama']}" in stderr  # a file of another name
    loading = Loading(adapter=str(adapter))
    loaded = language_model.load(str(path), CPU, cache_dir=str(tmp_path / "cache"), loading=loading)
    layer = loaded.model.transformer.layers[0]
    kinds = {name: getattr(layer, name).matrix.kind for name in ("query", "key", "value", "down", "up")}
    assert kinds == {"query": "fp32", "key": "groups4", "value": "fp32", "down": "fp32", "up": "groups4"}
    stored = {weight.kind for weight in loaded.weights.values() if isinstance(weight, Matrix)}
    assert stored == {"groups4"}


def test_conversations_and_scores_are_those_of_the_merged_model(models, script, tmp_path, monkeypatch):
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    merged = by_peft(models["llama"], adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(models["llama"]).save_pretrained(tmp_path / "merged")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"prompt": "The quick", "choices": [" a", " fox"]}))
    questions = ("--score-continuations", tmp_path / "questions.jsonl")
    for flags in (("--chat", "--prompt", "Why?"), questions):
        texts = [
            script(*flags, *given)[:2]
            for given in (("--adapter", adapter), ("--model", tmp_path / "merged"), ())
        ]
        assert texts[0] == texts[1] != texts[2] and texts[0][0] == 0


@pytest.mark.slow
def test_pickled_weights_are_converted_once(models, script, tmp_path):
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    flags = ("--adapter", adapter, "--prompt", PROMPTS[0])
    expected = script(*flags)[1]
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    first, second = script(*flags), script(*flags)
    assert first[:2] == second[:2] == (0, expected)
    assert "are pickled (adapter_model.bin)" in first[2] and "are pickled" not in second[2]


@pytest.mark.slow  # a process of its own
def test_an_adapter_of_the_hub(models, run_script, script, tmp_path):
    adapter = save_adapter(models["llama"], tmp_path / "hub" / "models" / "me" / "adapter")
    (adapter / "adapter_model.bin").write_bytes(b"never fetched")
    flags = ("--prompt", PROMPTS[0], "--model", models["llama"], "--max-new-tokens", NEW)
    flags += ("--precision", "fp32", "--device", "cpu", "--cache-dir", tmp_path / "cache")
    with HubServer(tmp_path / "hub") as hub:
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint}
        done = run_script("generate.py", "--adapter", "me/adapter", *flags, **online)
    assert done.stdout == script("--adapter", adapter, "--prompt", PROMPTS[0])[1]
    assert not list((tmp_path / "cache").rglob("adapter_model.bin"))


def settings(**changes: Any) -> Callable[[Path], None]:
    """Return what changes the settings of an adapter."""

    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(act: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Return what changes the tensors of an adapter."""

    def change(adapter: Path) -> None:
        found = load_file(adapter / "adapter_model.safetensors")
        act(found)
        save_file(found, adapter / "adapter_model.safetensors")

    return change


def in_pickles(adapter: Path) -> None:
    """Replace the weights by a pickle that asks for code."""
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"a": shutil.rmtree}, adapter / "adapter_model.bin")


def without(name: str) -> Callable[[Path], None]:
    """Return what removes a file of an adapter."""
    return lambda adapter: (adapter / name).unlink()


QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MISTAKES = {  # name: (what is done to the adapter, more flags, what the line must hold)
    "another kind": (settings(peft_type="IA3"), (), ("adapter_config.json", "'IA3'", "only LoRA")),
    "no settings": (without("adapter_config.json"), (), ("no adapter_config.json", "peft")),
    "no weights": (without("adapter_model.safetensors"), (), ("neither adapter_model.safetensors",)),
    "settings that are none": (
        lambda adapter: (adapter / "adapter_config.json").write_text("[]"),
        (),
        ("adapter_config.json", "a list, not an object"),
    ),
    "weights that are none": (
        lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"{}" * 99),
        (),
        ("can't be read as a LoRA adapter", "SafetensorError"),
    ),
    "a pickle that asks for code": (in_pickles, (), ("adapter_model.bin is refused", "rmtree")),
    "another rank": (settings(r=8), (), ("it does not fit", "lora_A", "(4, ", "the model needs (8, ")),
    "a rank beyond all memory": (settings(r=10**12), (), ("lora_A", "the model needs (1000000000000, ")),
    "a rank that is none": (settings(r="four"), (), ("can't be read as a LoRA adapter",)),
    "other modules": (settings(target_modules=["c_attn"]), (), ("c_attn", "LoRA adapter")),
    "more modules": (settings(target_modules=["q_proj", "v_proj", "down_proj", "k_proj"]), (), ("k_proj",)),
    "fewer modules": (settings(target_modules=["q_proj"]), (), ("down_proj", "no such place")),
    "more layers": (settings(layer_replication=[[0, 2], [1, 2]]), (), ("layer_replication", "not known")),
    "a changed model": (settings(init_lora_weights="pissa"), (), ("init_lora_weights is 'pissa'",)),
    "a setting of tomorrow": (settings(use_tomorrow=True), (), ("use_tomorrow is True",)),
    "no number": (tensors(lambda found: found[QUERY].fill_(torch.nan)), (), (QUERY, "not finite")),
    "a tensor missing": (tensors(lambda found: found.pop(QUERY)), (), ("it has no", QUERY)),
    "the numbers of the file": (None, ("--weights", "file"), ("--adapter", "--weights file", "leave")),
    "no model": (None, ("--score", "texts.txt", "--references", "texts.txt"), ("--adapter", "--score")),
}


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory) -> Path:
    """A folder with an adapter for the Llama."""
    return save_adapter(models["llama"], tmp_path_factory.mktemp("adapters") / "adapter")


@pytest.mark.parametrize("change, flags, parts", MISTAKES.values(), ids=MISTAKES)
def test_an_adapter_that_can_not_be_used(change, flags, parts, adapter, script, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    if change:
        change(copy)
    prompt = () if "--score" in flags else ("--prompt", PROMPTS[0])
    code, stdout, stderr = script("--adapter", copy, *prompt, *flags)
    lines = [line for line in stderr.splitlines() if not line.startswith("--adapter")]  # a note on pickles
    assert (code, stdout) == (2, "") and len(lines) == 1, stdout + stderr
    assert lines[0].startswith("generate.py: error: --adapter"), stderr
    assert [part for part in parts if part not in lines[0]] == [], stderr


OTHERS = {  # name: (sizes of the model that the adapter was made for, what the line must hold)
    "fewer layers": ({"num_hidden_layers": 1}, ("it has no", "layers.1")),
    "more layers": ({"num_hidden_layers": 3}, ("layers.2", "no such place")),
    "wider": ({"hidden_size": 64}, ("lora_B", "(64, 4)", "the model needs (32, 4)")),
}


@pytest.mark.parametrize("sizes, parts", OTHERS.values(), ids=OTHERS)
def test_an_adapter_of_another_model_is_refused(sizes, parts, script, tmp_path):
    config = LlamaConfig(vocab_size=400, **SIZES | sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    adapter = save_adapter(tmp_path / "other", tmp_path / "adapter")
    code, stdout, stderr = script("--adapter", adapter, "--prompt", PROMPTS[0])
    assert (code, stdout) == (2, "") and stderr.count("\n") == 1, stderr
    wanted = ("it does not fit", "it was made for", "other", "--model", *parts)
    assert [part for part in wanted if part not in stderr] == [], stderr


def test_a_layer_that_shares_its_weights_is_refused(models, script, tmp_path):
    """Merged into the head of a GPT-2, the numbers would change its embedding too."""
    adapter = save_adapter(models["gpt2"], tmp_path / "adapter", target_modules=["lm_head"])
    code, _, stderr = script("--model", models["gpt2"], "--adapter", adapter, "--prompt", PROMPTS[0])
    assert code == 2 and "lm_head shares its weights" in stderr and stderr.count("\n") == 1, stderr


def test_names_that_can_be_no_adapter(script, models, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "adapter_config.json").symlink_to("/etc/hostname")
    names = {"./nowhere": "no such folder", "": "the name is empty", tmp_path / "file": "this is a file"}
    names |= {models["llama"]: "no adapter_config.json", tmp_path / "linked": "link out of the folder"}
    for name, reason in names.items():
        code, _, stderr = script("--adapter", name, "--prompt", PROMPTS[0])
        assert code == 2 and reason in stderr and stderr.count("\n") == 1, stderr
