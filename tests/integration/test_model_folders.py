"""Damaged, foreign and hostile model folders: a table of cases, each through the loader of every
task that would read it. Each is refused with one line that names the flag, the folder and what is
wrong, in seconds and before memory is taken, or the model works.

The tasks are the five ways into a model: train, predict, generate, embed, rerank.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import data, sampled_from
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from common import models, sources
from common.errors import UserError
from common.generation import decoding, language_model
from common.runtime import Runtime
from common.search import encoder
from common.training import classifier, saved_model
from common.training.run import SINGLE
from common.training.task import Task
from conftest import heavy
from language_models import save_tiny_model, train_byte_bpe

SECONDS = 10  # for one case: a load takes 0.1
TASKS = ("train", "predict", "generate", "embed", "rerank")
ENCODERS = ("train", "predict", "embed", "rerank")
FLAGS = {"rerank": "--rerank"}
WEIGHTS = "model.safetensors"
BERT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
Damage = Callable[[Path], None]


class Case(NamedTuple):
    """What is done to a model, the tasks that read it then, and what the message must name; None
    if the model must still work.
    """

    damage: Damage
    tasks: tuple[str, ...]
    parts: tuple[str, ...] | None


# Models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sound(tiny_model, tiny_embedder, tmp_path_factory) -> dict[str, Path]:
    """A folder for each task with a model that it takes, all of random weights."""
    root = tmp_path_factory.mktemp("sound")
    return sound_models(root, tiny_model, tiny_embedder)


def sound_models(root: Path, tiny_model: Path, tiny_embedder: Path) -> dict[str, Path]:
    """Write the models that are not there yet below `root`; return the folder of each task."""
    shutil.copytree(tiny_model, root / "reranker")
    torch.manual_seed(5)
    vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    ranks = BertConfig(**{**BERT, "vocab_size": vocabulary}, num_labels=1)
    BertForSequenceClassification(ranks).save_pretrained(root / "reranker")
    return {
        "train": tiny_model,
        "predict": tiny_model,
        "embed": tiny_embedder,
        "rerank": root / "reranker",
        "generate": save_tiny_model(root / "writer"),
    }


def use(task: str, folder: str | Path) -> None:
    """Load a model for a task as its script does, and let it read one text."""
    name, runtime = str(folder), Runtime(torch.device("cpu"), "fp32")
    if task == "embed":
        loaded = encoder.load_encoder(encoder.EncoderConfig(model=name), runtime)
        assert loaded.encode(["a good film"]).shape == (1, 32)
    elif task == "rerank":
        encoder.load_reranker(name, runtime, cache_dir=None).predict([("a good film", "a bad story")])
    elif task == "generate":
        loaded = language_model.load(name, runtime, cache_dir=None)
        ids = language_model.encode_prompt("the quick fox", loaded, name="prompt")
        language_model.check_length(ids, 1, loaded, name="prompt")
        assert decoding.prefill(loaded, decoding.left_pad([ids], loaded, room=1)).isfinite().all()
    else:
        if task == "train":
            config = classifier.ModelConfig(name, None, None, None, None, None, 0, None, False, False)
            model, tokenizer = classifier.load_pretrained(config, Task(SINGLE, ("neg", "pos")), runtime)
        else:
            saved = saved_model.load(name, runtime)
            saved.choose_tokens(eval_max_length=None, truncation=None)
            model, tokenizer = saved.model, saved.tokenizer
        classifier.require_match(model, tokenizer, name=name)
        model.eval()(**tokenizer("a good film", return_tensors="pt"))


# Damages ------------------------------------------------------------------------------------------


def write(name: str, content: str | bytes) -> Damage:
    """Return a damage that replaces a file."""

    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def changed(name: str, **changes) -> Damage:
    """Return a damage that changes settings in a JSON file; a value of ... removes one."""

    def damage(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        content.update(changes)
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return damage


config = functools.partial(changed, "config.json")


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    """Return a damage that changes the weights."""

    def damage(folder: Path) -> None:
        changed = change(load_file(folder / WEIGHTS))
        save_file(
            {key: value.contiguous() for key, value in changed.items()}, folder / WEIGHTS, {"format": "pt"}
        )

    return damage


def without(*words: str) -> Damage:
    """Return a damage that removes the tensors whose name has one of the words."""
    return tensors(lambda old: {k: v for k, v in old.items() if not any(word in k for word in words)})


def renamed(old_word: str, new_word: str) -> Damage:
    """Return a damage that gives tensors other names."""
    return tensors(lambda old: {key.replace(old_word, new_word): value for key, value in old.items()})


def filled(word: str, value: float) -> Damage:
    """Return a damage that puts a value into the tensors whose name has a word."""

    def change(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for key, tensor in old.items():
            if word in key:
                tensor.view(-1)[-1] = value
        return old

    return tensors(change)


def cut(word: str) -> Damage:
    """Return a damage that takes the last row from the tensors whose name has a word."""
    return tensors(lambda old: {k: v[:-1].clone() if word in k else v for k, v in old.items()})


def in_shards(names: list[str], **changes) -> Damage:
    """Return a damage that puts the weights into shards, the first of which is written."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        keys = list(load_file(folder / "model-00001-of-00002.safetensors"))
        weight_map = {key: names[number % len(names)] for number, key in enumerate(keys)}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map} | changes
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def header(length: int, text: str = "{}", size: int = 100) -> Damage:
    """Return a damage that replaces the weights by a header that says it has `length` bytes."""
    return write(WEIGHTS, length.to_bytes(8, "little") + text.encode() + bytes(size))


def tensor_header(**tensor) -> Damage:
    """Return a damage that replaces the weights by a header of one tensor."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | tensor})
    return header(len(text), text)


def linked(name: str, target: str) -> Damage:
    """Return a damage that puts a link in the place of a file; TMP stands for a folder beside the
    model, with a file of the same content.
    """

    def damage(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        shutil.copy2(folder / name, outside / name)
        (folder / name).unlink()
        (folder / name).symlink_to(target.replace("TMP", str(outside)))

    return damage


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    """Return a damage that puts something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def listening(path: Path) -> None:
    """Make a socket at a path, which must be short."""
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


def saved(make: Callable[[], torch.nn.Module], **changes) -> Damage:
    """Return a damage that puts another model into the folder and leaves the tokenizer."""

    def damage(folder: Path) -> None:
        for name in (WEIGHTS, "config.json", "modules.json", "generation_config.json"):
            (folder / name).unlink(missing_ok=True)
        torch.manual_seed(0)
        make().save_pretrained(folder)
        config(**changes)(folder)

    return damage


def sentence_encoder(folder: Path) -> None:
    """Put a sentence encoder into a folder, over the transformer that is there."""
    SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32)], device="cpu").save(str(folder))


def splade(folder: Path) -> None:
    """Put a sparse encoder into a folder."""
    saved(lambda: BertForMaskedLM(bert()))(folder)
    transformer = Transformer(str(folder), transformer_task="fill-mask")
    sparse = SparseEncoder(modules=[transformer, SpladePooling("max")], device="cpu")
    shutil.rmtree(folder)
    sparse.save(str(folder))


def bert(**changes) -> BertConfig:
    return BertConfig(**{**BERT, **changes})


def llama(**changes) -> LlamaConfig:
    small = {k: v for k, v in BERT.items() if k != "max_position_embeddings"}
    return LlamaConfig(**{**small, "vocab_size": len(train_byte_bpe()), "pad_token_id": 0, **changes})


# The table ----------------------------------------------------------------------------------------

# what a tensor of the first layer is called, and its number, in BERT and in Llama
QUERY = {"generate": "layers.0.self_attn.q_proj.weight"}
LAYER_1 = {"generate": "layers.1."}
WORDS = {"generate": "embed_tokens"}


def by_task(words: dict[str, str], usual: str, make: Callable[[str], Damage], *parts: str) -> dict[str, Case]:
    """Return one case for each task, with the task's own name of a tensor."""
    return {
        task: Case(make(words.get(task, usual)), (task,), (*parts, words.get(task, usual))) for task in TASKS
    }


def weights() -> dict[str, Case]:
    """Silently wrong: weights that lack something, or do not fit."""
    query, layer, words = "layer.0.attention.self.query.weight", "layer.1.", "word_embeddings"
    kinds = {
        "one tensor missing": by_task(QUERY, query, without),
        "one layer missing": by_task(LAYER_1, layer, without),
        "no embeddings": by_task(WORDS, words, without),
        "NaN": by_task(QUERY, query, lambda word: filled(word, float("nan")), "finite"),
        "infinite": by_task(WORDS, words, lambda word: filled(word, float("-inf")), "finite"),
        "one row missing": by_task(WORDS, words, cut, "shape"),
    }
    cases = {f"{kind}, {task}": case for kind, tasks in kinds.items() for task, case in tasks.items()}
    fewer = {task: LAYER_1.get(task, layer) for task in TASKS}
    for task in TASKS:
        cases |= {
            f"all names changed, {task}": Case(renamed("", "x"), (task,), ("lack",)),
            f"a level renamed, {task}": Case(renamed("layer", "stage"), (task,), ("lack", "layer")),
            f"more layers asked for, {task}": Case(config(num_hidden_layers=3), (task,), ("lack", ".2.")),
            f"fewer layers asked for, {task}": Case(
                config(num_hidden_layers=1), (task,), ("fewer layers", fewer[task])
            ),
            f"more words asked for, {task}": Case(config(vocab_size=1000), (task,), ("shape", "1000")),
            f"wider layers asked for, {task}": Case(config(hidden_size=64), (task,), ("shape", "64")),
            f"wider middle asked for, {task}": Case(config(intermediate_size=96), (task,), ("shape", "96")),
        }
    half = without("classifier.bias")
    return cases | {
        "half a head": Case(half, ("train", "predict", "rerank"), ("lack", "classifier.bias")),
        "no head": Case(without("classifier"), ("predict", "rerank"), ("classifier",)),
        "no head to train": Case(without("classifier"), ("train",), None),
        "no pooler to train": Case(without("pooler"), ("train", "embed"), None),
        "no pooler": Case(without("pooler"), ("predict", "rerank"), ("pooler",)),
        "no head for words": Case(
            without("lm_head"), ("generate",), ("never trained to generate", "lm_head")
        ),
        "shards": Case(in_shards(["model-00001-of-00002.safetensors"]), TASKS, None),
        "without the level of the encoder": Case(renamed("bert.", ""), ("train", "embed"), None),
        "positions that older versions saved": Case(
            tensors(lambda old: old | {"bert.embeddings.position_ids": torch.arange(64)[None]}),
            ("train", "predict", "rerank"),
            None,
        ),
    }


def other_kinds() -> dict[str, Case]:
    """A model that was trained for something else."""
    encoder_only = saved(lambda: BertModel(bert()))
    masked = saved(lambda: BertForMaskedLM(bert()))
    one = saved(lambda: BertForSequenceClassification(bert(num_labels=1)))
    names = {"0": "neg", "1": "pos"}
    return {
        "an encoder, predict": Case(encoder_only, ("predict",), ("never trained to classify", "classifier")),
        "an encoder, rerank": Case(encoder_only, ("rerank",), ("rank",)),
        "masked words, rerank": Case(masked, ("rerank",), ("rank",)),
        "masked words, generate": Case(
            masked, ("generate",), ("never trained to generate", "BertForMaskedLM")
        ),
        "an encoder, generate": Case(encoder_only, ("generate",), ("never trained to generate",)),
        "one output, predict": Case(one, ("predict",), None),
        "regression, predict": Case(config(problem_type="regression"), ("predict",), None),
        "labels, predict": Case(config(problem_type="multi_label_classification"), ("predict",), None),
        "a decoder without head, generate": Case(
            saved(
                lambda: GPT2Model(
                    GPT2Config(vocab_size=len(train_byte_bpe()), n_embd=32, n_layer=1, n_head=2)
                )
            ),
            ("generate",),
            ("never trained to generate", "GPT2Model"),
        ),
        "a decoder that classifies, generate": Case(
            saved(lambda: LlamaForSequenceClassification(llama())),
            ("generate",),
            ("never trained to generate",),
        ),
        "encoder and decoder, generate": Case(
            saved(
                lambda: T5ForConditionalGeneration(
                    T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
                )
            ),
            ("generate",),
            ("name another model",),
        ),
        "a sentence encoder, rerank": Case(sentence_encoder, ("rerank",), ("a sentence encoder",)),
        "a sparse encoder, embed": Case(splade, ("embed",), ("a sparse encoder",)),
        "a name twice": Case(config(id2label={"0": "a", "1": "a"}), ("predict",), ("id2label",)),
        "a gap in the names": Case(config(id2label={"0": "a", "2": "b"}), ("predict",), ("id2label",)),
        "names without numbers": Case(
            config(id2label={"a": "a", "b": "b"}), ("predict", "train"), ("invalid",)
        ),
        "names in a list": Case(config(id2label=["a", "b"]), ("predict", "train"), ("id2label",)),
        "names that contradict": Case(
            config(id2label=names, label2id={"neg": 1, "pos": 0}), ("predict",), ("label2id",)
        ),
        "more names than outputs": Case(
            config(id2label={"0": "a", "1": "b", "2": "c"}), ("predict",), ("classifier",)
        ),
        "more outputs than names": Case(config(id2label={"0": "a"}), ("predict",), ("classifier",)),
    }


def reaching_out() -> dict[str, Case]:
    """Settings and links that lead out of the folder, or to code."""
    listed = "model.safetensors.index.json"
    adapter = {"base_model_name_or_path": "/etc", "peft_type": "LORA"}
    ranks = {"activation_fn": "torch.hub.list"}
    return {
        "a shard above": Case(
            in_shards(["../model-00001-of-00002.safetensors"]), TASKS, (listed, "../model")
        ),
        "a shard anywhere": Case(in_shards(["/etc/passwd"]), TASKS, (listed, "/etc/passwd")),
        "a shard that is no weights": Case(in_shards(["config.json"]), TASKS, (listed, "config.json")),
        "a shard missing": Case(in_shards(["model-00002-of-00002.safetensors"]), TASKS, (listed, "missing")),
        "adapters": Case(changed("adapter_config.json", **adapter), TASKS, ("adapter_config.json",)),
        "another config": Case(
            config(configuration_files=["config.4.0.0.json"]), TASKS, ("config.json", "configuration_files")
        ),
        "other weights": Case(
            config(transformers_weights="adapter_model.bin"), TASKS, ("config.json", "transformers_weights")
        ),
        "another tokenizer": Case(
            changed("tokenizer_config.json", fast_tokenizer_files=["../tokenizer.json"]),
            TASKS,
            ("tokenizer_config.json", "fast_tokenizer_files"),
        ),
        "arguments of a tokenizer": Case(
            changed("tokenizer_config.json", init_inputs=["/etc/passwd"]), TASKS, ("init_inputs",)
        ),
        "attention from the Hub": Case(
            config(attn_implementation="some/kernel"), TASKS, ("attn_implementation", "some/kernel")
        ),
        "a linked config": Case(linked("config.json", "TMP/config.json"), TASKS, ("config.json", "link")),
        "linked words": Case(
            linked("tokenizer.json", "TMP/tokenizer.json"), TASKS, ("tokenizer.json", "link")
        ),
        "linked weights": Case(linked(WEIGHTS, f"TMP/{WEIGHTS}"), TASKS, None),
        "a function of torch": Case(config(sentence_transformers=ranks), ("rerank",), ("activation_fn",)),
        "a function of torch, old": Case(
            config(sbert_ce_default_activation_function="torch.hub.list"),
            ("rerank",),
            ("activation_function",),
        ),
        "a function of ours": Case(
            config(sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"}),
            ("rerank",),
            None,
        ),
        "modules above": Case(
            write("modules.json", '[{"path": "../other"}]'), TASKS, ("modules.json", "other")
        ),
        "a distributed checkpoint": Case(
            write("shard-00000-model-00001-of-00001.safetensors", ""), TASKS, ("shard-",)
        ),
    }


def too_large() -> dict[str, Case]:
    """Settings and files that ask for more memory or time than there is."""
    deep = "[" * 100_000 + "]" * 100_000
    settings_cases = {
        f"{name} {value:.0e}": Case(config(**{name: value}), TASKS, ("config",))
        for name, values in {
            "num_hidden_layers": (1e4, 1e7, 1e12),
            "vocab_size": (1e9, 1e12),
            "hidden_size": (1e6,),
            "intermediate_size": (1e9, 1e12),
            "max_position_embeddings": (1e12,),
            "type_vocab_size": (1e9,),
        }.items()
        for value in map(int, values)
    }
    for name, tasks in {  # Llama computes its positions, and has no types of tokens
        "max_position_embeddings 1e+12": ENCODERS,
        "type_vocab_size 1e+09": ENCODERS,
    }.items():
        settings_cases[name] = settings_cases[name]._replace(tasks=tasks)
    return settings_cases | {
        "hidden_size 1e+12": Case(config(hidden_size=10**12), TASKS, ()),  # in the words of the library
        "num_attention_heads 1e+09": Case(config(num_attention_heads=10**9), TASKS, ()),
        "num_labels 1e+09": Case(
            config(num_labels=10**9, id2label=..., label2id=...), TASKS, ("num_labels",)
        ),
        "num_labels without end": Case(config(num_labels=float("inf")), TASKS, ("config.json",)),
        "layers of a part": Case(
            config(text_config={"num_layers": 10**9}), TASKS, ("config.json", "num_layers")
        ),
        "experts": Case(config(num_local_experts=10**9), TASKS, ("config.json", "num_local_experts")),
        "a deep config": Case(write("config.json", deep), TASKS, ("config.json",)),
        "deep words": Case(write("tokenizer.json", deep), TASKS, ()),
        "a header of 2^63 bytes": Case(header(2**63), TASKS, (WEIGHTS, "header")),
        "a header of 99 MB": Case(header(99_000_000), TASKS, (WEIGHTS, "header")),
        "a header that is empty": Case(header(0), TASKS, (WEIGHTS, "header")),
        "a header of a list": Case(header(2, "[]"), TASKS, (WEIGHTS, "header")),
        "a header that is deep": Case(header(len(deep), deep), TASKS, (WEIGHTS, "header")),
        "a tensor of 10^12": Case(tensor_header(shape=[10**12]), TASKS, (WEIGHTS, "header")),
        "a tensor of -1": Case(tensor_header(shape=[-1]), TASKS, (WEIGHTS, "header")),
        "a tensor of a word": Case(tensor_header(shape="ab"), TASKS, (WEIGHTS, "header")),
        "an unknown number type": Case(tensor_header(dtype="F7"), TASKS, ()),
        "places beyond the file": Case(tensor_header(data_offsets=[0, 10**9]), TASKS, ()),
        "places turned around": Case(tensor_header(data_offsets=[8, 0]), TASKS, ()),
        "a tokenizer of 30 GB": Case(
            lambda folder: os.truncate(folder / "tokenizer.json", 30 * 10**9),
            TASKS,
            ("tokenizer.json", "bytes"),
        ),
        "a config of 30 GB": Case(
            lambda folder: os.truncate(folder / "config.json", 30 * 10**9), TASKS, ("config.json", "bytes")
        ),
    }


BROKEN = {
    "empty": "",
    "cut": '{"a": ',
    "a number": "1",
    "null": "null",
    "a text": '"text"',
    "not UTF-8": b"\xff\xfe\x00{}",
}


def broken_json() -> dict[str, Case]:
    """Each JSON file of a folder empty, broken, or of another type."""
    files = {
        "config.json": TASKS,
        "tokenizer_config.json": TASKS,
        "tokenizer.json": TASKS,
        "special_tokens_map.json": TASKS,
        "generation_config.json": ("generate",),
        "modules.json": ("embed",),
        "config_sentence_transformers.json": ("embed",),
        "sentence_bert_config.json": ("embed",),
        "1_Pooling/config.json": ("embed",),
        "training.json": ("predict",),
    }
    cases = {
        f"{file}: {kind}": Case(
            write(file, content), tasks, (file.rpartition("/")[2],) if file != "tokenizer.json" else ()
        )
        for file, tasks in files.items()
        for kind, content in {**BROKEN, "a list": "[]" if file != "modules.json" else "{}"}.items()
    }
    for kind, changes in {
        "empty": {"weight_map": {}},
        "of numbers": {"weight_map": {"a": 1}},
        "a list": {"weight_map": ["a"]},
        "missing": {"weight_map": None},
    }.items():
        cases[f"list of shards: {kind}"] = Case(in_shards(["x"], **changes), TASKS, ("index.json",))
    cases["list of shards: no metadata"] = Case(
        in_shards(["model-00001-of-00002.safetensors"], metadata=None), TASKS, ()
    )
    for kind, content in BROKEN.items():
        damage = in_shards(["x"])
        cases[f"list of shards: {kind}"] = Case(
            lambda folder, damage=damage, content=content: (
                damage(folder),
                write("model.safetensors.index.json", content)(folder),
            )[0],
            TASKS,
            ("index.json",),
        )
    return cases


HARMLESS = ("problem_type", "quantization_config")  # an unknown value is as good as none


def odd_settings() -> dict[str, Case]:
    """Settings out of range or of another type, and what a machine lacks."""
    values = {
        "model_type": ("nothing", 1, None, ["bert"]),
        "hidden_act": ("nothing", 1),
        "num_attention_heads": (0, 3, -1, "4"),
        "hidden_size": (0, -32, 33, "32"),
        "num_hidden_layers": (-1, "2", 2.5),
        "dtype": ("float99", "nn", 1),
        "architectures": ("BertModel", 1, [1]),
        "pad_token_id": (10**6, "0", -5),
        "attn_implementation": ("flash_attention_2", "nothing", 1),
        "problem_type": ("nothing",),
        "quantization_config": (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {"quant_method": "gptq", "bits": 4},
            {"quant_method": "awq"},
            {"quant_method": "nothing"},
            {"load_in_8bit": True},
            [],
            "4bit",
        ),
    }
    lengths = {
        f"model_max_length: {value!r}": Case(
            changed("tokenizer_config.json", model_max_length=value), TASKS, ("model_max_length",)
        )
        for value in (0, -1, True, "64", [64])
    }
    lengths["model_max_length: none"] = Case(
        changed("tokenizer_config.json", model_max_length=None), TASKS, None
    )
    usual = {"dataset_sha256": "0" * 64, "truncation": "tail", "seed": 1}
    saved_settings = {
        f"training.json, {name}: {value!r}": Case(
            changed("training.json", **(usual | {name: value})), ("predict",), (name,)
        )
        for name, value in (
            ("truncation", "x"),
            ("truncation", ["tail"]),
            ("seed", "1"),
            ("seed", -1),
            ("text_mode", "both"),
            ("join_with", 1),
        )
    }
    method = {"text": {"method": "save_pretrained", "method_output_name": "last_hidden_state"}}
    only_when_read = {
        "chunk_size_feed_forward": Case(config(chunk_size_feed_forward=10**6), ENCODERS, ("chunk",)),
        "a width that is not so": Case(
            changed("1_Pooling/config.json", embedding_dimension=64), ("embed",), ("64",)
        ),
        "a method of the transformer": Case(
            changed("sentence_bert_config.json", modality_config=method), ("embed",), ("save_pretrained",)
        ),
    }
    return (
        lengths
        | saved_settings
        | only_when_read
        | {
            f"{name}: {value!r}": Case(
                config(**{name: value}), TASKS, None if "nothing" in str(value) and name in HARMLESS else ()
            )
            for name, choices in values.items()
            for value in choices
        }
    )


def odd_files() -> dict[str, Case]:
    """Other things in the place of a file."""
    kinds: dict[str, tuple[Callable[[str], Damage], str]] = {
        "a link to nowhere": (lambda name: linked(name, "nowhere"), "nowhere"),
        "a link to itself": (lambda name: linked(name, name), "symbolic links"),
        "a pipe": (lambda name: replaced(name, os.mkfifo), "not a file"),
        "a folder": (lambda name: replaced(name, Path.mkdir), "not a file"),
        "a socket": (lambda name: replaced(name, listening), "not a file"),
        "a device": (lambda name: linked(name, "/dev/zero"), "not a file"),
    }
    return {
        f"{file}: {kind}": Case(make(file), TASKS, (file, part))
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS)
        for kind, (make, part) in kinds.items()
    }


KINDS = {
    "weights": weights,
    "other kinds": other_kinds,
    "reaching out": reaching_out,
    "too large": too_large,
    "broken JSON": broken_json,
    "odd settings": odd_settings,
    "odd files": odd_files,
}
CASES = {
    (kind, name, task): case
    for kind, make in KINDS.items()
    for name, case in make().items()
    for task in case.tasks
}


def in_turn() -> list:
    """Return the cases: each damage to one of the tasks that read it, in turn, all others left to
    the heavy proofs.
    """
    damages = list(dict.fromkeys((kind, name) for kind, name, _ in CASES))
    turns = {damage: number for number, damage in enumerate(damages)}
    return [
        case if case[2] == tasks[turns[case[:2]] % len(tasks)] else heavy(*case)
        for case, (_, tasks, _) in CASES.items()
    ]


@contextlib.contextmanager
def time_limit(seconds: int):
    """Raise TimeoutError in the block after so many seconds."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(case: Case, task: str, sound: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy of a task's sound model with the damage of a case."""
    folder = tmp_path / "model"
    shutil.copytree(sound[task], folder)
    case.damage(folder)
    return folder


@pytest.mark.parametrize("kind, name, task", in_turn())
def test_a_folder_is_refused_in_one_line_or_works(kind, name, task, sound, tmp_path, capfd):
    case = CASES[kind, name, task]
    folder = damaged(case, task, sound, tmp_path)
    with time_limit(SECONDS):
        if case.parts is None:
            use(task, folder)
            return
        with pytest.raises(UserError) as refused:
            use(task, folder)
    message = str(refused.value)
    assert message.startswith(f"{FLAGS.get(task, '--model')} {folder}: ") and len(message) < 1000
    for part in case.parts:
        assert part in message
    assert capfd.readouterr().err == ""


# Fuzzing ------------------------------------------------------------------------------------------

FUZZED = {
    "train": ("config.json", "tokenizer_config.json", "tokenizer.json"),
    "predict": ("config.json",),
    "generate": ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
    "embed": (
        "config.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "tokenizer_config.json",
    ),
    "rerank": ("config.json",),
}
ODD = (
    None,
    True,
    -1,
    0,
    1,
    3,
    10**6,
    10**12,
    2**63,
    1e300,
    float("nan"),
    "",
    "x",
    "../x",
    "32",
    [],
    {},
    [1],
    {"a": 1},
)


def places(value: object, place: tuple = ()) -> list[tuple]:
    """Return the place of every value within a JSON value, as the keys that lead to it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [place] if place else []
    return found + [deep for key, below in inner for deep in places(below, (*place, key))]


def put(value: object, place: tuple, new: object) -> object:
    """Return a JSON value with something else at a place; ... removes what is there."""
    if not place:
        return new
    copied = dict(value.items()) if isinstance(value, dict) else list(value)
    copied[place[0]] = put(copied[place[0]], place[1:], new)
    if copied[place[0]] is ...:
        del copied[place[0]]
    return copied


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("count", [12, heavy(200)])
def test_any_change_of_a_json_file_is_refused_in_one_line_or_works(count, task, sound, tmp_path_factory):
    """A random place of a random file of the model is removed, or gets a value that it never had."""
    contents = {file: json.loads((sound[task] / file).read_text()) for file in FUZZED[task]}

    @settings(max_examples=count, database=None, derandomize=True)
    @given(data())
    def check(drawn) -> None:
        file = drawn.draw(sampled_from(sorted(contents)))
        # a tokenizer has hundreds of words, which are all alike
        place = drawn.draw(sampled_from([p for p in places(contents[file]) if "vocab" not in p[:-1]]))
        changed = put(contents[file], place, drawn.draw(sampled_from([..., *ODD])))
        folder = tmp_path_factory.mktemp("fuzzed") / "model"
        shutil.copytree(sound[task], folder, copy_function=os.link)
        (folder / file).unlink()
        (folder / file).write_text(json.dumps(changed))
        with time_limit(SECONDS), contextlib.suppress(UserError):
            use(task, folder)
        shutil.rmtree(folder)

    check()


# Heads --------------------------------------------------------------------------------------------

CLASSES = ["business", "politics", "sport"]


def classifier_of(folder: Path, names: list[str], tiny_model: Path, **settings) -> torch.nn.Module:
    """Write a classifier for classes of these names; return it."""
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(7)
    number = dict(enumerate(names))
    words = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    model = BertForSequenceClassification(
        bert(vocab_size=words, id2label=number, label2id={name: n for n, name in number.items()}, **settings)
    )
    model.save_pretrained(folder)
    return model.eval()


def loaded_for(folder: Path, names: list[str]) -> tuple[torch.nn.Module, str]:
    return classifier.load_classifier(
        folder, name="x", task=Task(SINGLE, tuple(names)), dropout={}, pad_token_id=0
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_the_outputs_of_a_saved_head_get_the_order_of_the_classes(order, tiny_model, tmp_path):
    """They stayed where they were: a model that was fine-tuned once more started with its classes swapped."""
    saved = classifier_of(tmp_path / "model", [CLASSES[place] for place in order], tiny_model)
    model, head = loaded_for(tmp_path / "model", CLASSES)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = saved(input_ids=ids).logits[:, [order.index(place) for place in range(3)]]
        assert torch.allclose(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-8)
    assert "saved" in head and ("order" in head) == (order != (0, 1, 2))
    assert model.config.id2label == dict(enumerate(CLASSES))


@pytest.mark.parametrize(
    "names, settings",
    [(["a", "b", "c"], {}), (CLASSES, {"problem_type": "multi_label_classification"})],
    ids=["other classes", "several labels"],
)
def test_a_head_for_something_else_is_replaced_and_the_encoder_kept(names, settings, tiny_model, tmp_path):
    saved = classifier_of(tmp_path / "model", names, tiny_model, **settings)
    model, head = loaded_for(tmp_path / "model", CLASSES)
    assert head.startswith("a new head")
    assert not torch.equal(model.classifier.weight, saved.classifier.weight)
    # as the library draws it: N(0, 0.02), and no bias
    assert 0.01 < model.classifier.weight.std().item() < 0.03 and not model.classifier.bias.any()
    for key, tensor in saved.bert.state_dict().items():
        assert torch.equal(model.bert.state_dict()[key], tensor)


# Kinds of models ----------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict] = {"bert": {}, "roberta": {}, "distilbert": {}}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_what_may_be_absent_is_not_missed(kind, auto_class, tmp_path):
    """Poolers, tied weights, buffers, heads of pretraining: a model of each kind, saved in each
    form, can be trained; and a tensor of its own is missed.
    """
    torch.manual_seed(0)
    made = auto_class.from_config(AutoConfig.for_model(kind, **SMALL, **ARCHITECTURES[kind]))
    made.save_pretrained(tmp_path)
    options = {"config": AutoConfig.from_pretrained(tmp_path), "dtype": torch.float32}
    model, new = models.load_model(AutoModelForSequenceClassification, tmp_path, name="x", **options)
    assert all(models.is_head(key, model) for key in new)
    assert bool(new) == (auto_class is not AutoModelForSequenceClassification)
    own = next(
        key for key, value in load_file(tmp_path / WEIGHTS).items() if ".1." in key and value.dim() == 2
    )
    without(own)(tmp_path)
    with pytest.raises(UserError, match="lack"):
        models.load_model(AutoModelForSequenceClassification, tmp_path, name="x", **options)


def test_a_folder_without_permission(tiny_model, sound):
    """The user is another one here: the superuser may read everything."""
    if os.geteuid() != 0:
        pytest.skip("only the superuser can become somebody else")
    for name, mode, inner in (("config.json", 0o000, 0o755), (WEIGHTS, 0o000, 0o755), ("", 0o755, 0o000)):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "model"
            shutil.copytree(tiny_model, folder)
            for path in (Path(root), folder):
                path.chmod(0o755)
            (folder / name).chmod(mode)
            folder.chmod(inner)
            os.seteuid(65534)
            try:
                with pytest.raises(UserError, match=f"--model {folder}: .*[Pp]ermission"):
                    sources.check_model(str(folder), kind="encoder")
            finally:
                os.seteuid(0)
