"""Small language models for the tests: three kinds with random weights, and one in a folder with a
trained tokenizer and a chat template.
"""

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from common.compiler import find_compiler
from common.generation.fast_decoding import CompiledModel, Kernel
from common.generation.language_model import LanguageModel
from common.generation.library import TransformersModel
from common.generation.llama import Transformer
from common.generation.llama_config import read_transformer
from common.generation.stored_weights import Matrix, as_matrix, convert

transformers.utils.logging.disable_progress_bar()  # of the tests' own models, on the stderr that is compared
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler: the step is PyTorch's")

VOCABULARY = 211
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = ("llama", "gpt2", "mistral")
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Why is the sky blue? Because of the light.",
    "你好，世界。今天天气很好。",
    "I like 🤖 and 🎉 and 👩‍👩‍👧!",
    "def add(left, right):\n    return left + right",
    "Straße, naïve, façade, 東京",
]
PROMPTS = [
    "The quick brown fox",
    "Why is the sky",
    "def add(left",
    "你好",
    "I like",
    "dog. Because the lazy light",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{%"
    " endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(kind: str) -> PretrainedConfig:
    """Return the config of a model of two layers; llama and mistral have two end ids, mistral sees
    8 tokens back, gpt2 has no padding id.
    """
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=3,
            eos_token_id=3,
        )
    if kind == "mistral":
        return MistralConfig(
            vocab_size=VOCABULARY,
            sliding_window=8,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=[3, 5],
            **SIZES,
        )
    return LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=128, pad_token_id=0, eos_token_id=[3, 5], **SIZES
    )


def tiny_language_model(
    kind: str, dtype: torch.dtype = torch.float32, *, seed: int = 1, scale: float = 3.0
) -> LanguageModel:
    """Return a small random model without a tokenizer; `scale` widens its weights, so that some
    tokens are much likelier than others.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    ends = (3,) if kind == "gpt2" else (3, 5)
    return LanguageModel(kind, TransformersModel(model), None, ends, 3 if kind == "gpt2" else 0, 128)


def own_weights(model: PreTrainedModel) -> dict[str, Matrix | torch.Tensor]:
    """Return the weights of a model of transformers under their names, as a folder's are read."""
    return {
        name: as_matrix(parameter.detach()) if parameter.dim() == 2 else parameter.detach()
        for name, parameter in model.named_parameters()
    }


def own_transformer(model: PreTrainedModel, stored: dict[str, Matrix] | None = None) -> Transformer:
    """Return a model of transformers as llama_config.py reads it; matrices in `stored` replace its own."""
    return read_transformer(model.config.to_dict(), own_weights(model) | (stored or {}))


def in_c(language_model: LanguageModel, kernel: Kernel, stored: torch.dtype = torch.float32) -> LanguageModel:
    """Return a language model of transformers as the step in C computes it, over weights of a dtype."""
    assert isinstance(language_model.model, TransformersModel)
    module = language_model.model.module
    matrices = {
        name: convert(weight, stored)
        for name, weight in own_weights(module).items()
        if isinstance(weight, Matrix)
    }
    model = CompiledModel(own_transformer(module, matrices), kernel)
    return dataclasses.replace(language_model, model=model)


def train_byte_bpe(size: int = 400) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of GPT-2's kind: an emoji or a Chinese character is several
    tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        TEXTS[:2] + TEXTS[4:5],
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=specials,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def save_tiny_model(
    folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, context: int = 256, **sizes: int
) -> Path:
    """Write a random Llama of two layers with its tokenizer."""
    tokenizer = train_byte_bpe()
    tokenizer.chat_template = chat_template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=context,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
        **{**SIZES, **sizes},
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


K_QUANTS = {  # GGUF formats that the gguf library reads and does not write: where the fp16 scales of a block
    # are, and about how large they are for weights of some hundredths
    "Q2_K": ((80, 82), 3e-3),
    "Q3_K": ((108,), 1e-3),
    "Q4_K": ((0, 2), 1.5e-4),
    "Q5_K": ((0, 2), 8e-5),
    "Q6_K": ((208,), 4e-5),
}


def random_blocks(name: str, rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """Return random bytes as a matrix in one of K_QUANTS: all but the scales can be anything."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    data = generator.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    places, usual = K_QUANTS[name]
    for place in places:
        scales = (usual * generator.uniform(0.5, 1.5, data.shape[:2])).astype(np.float16)
        data[..., place : place + 2] = scales[..., None].view(np.uint8)
    return data.reshape(rows, -1)
