"""A causal language model with its tokenizer, and what decoding needs to know about the two: end
ids, padding id, context; prompts as token ids.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common import models, sources
from common.errors import UserError, shorten
from common.generation import fast_decoding, stored_weights
from common.generation.fast_decoding import FastStep, Kernel
from common.generation.llama import NotCovered, check_config, read_transformer
from common.generation.stored_weights import Matrix
from common.runtime import DTYPES, Runtime

MOST_CHARACTERS_PER_TOKEN = 1000  # far more than any tokenizer's longest token has
Weights = Literal["auto", "file", "fp32", "bf16"]  # of --weights


@dataclass(frozen=True)
class LanguageModel:
    """A model, its tokenizer, and how a text ends with them."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]  # each of them ends a text; () if none does
    pad_id: int
    context: int | None  # the most tokens that fit; None if nothing limits it
    fast_step: FastStep | None = None  # None: every step is the library's forward
    step_name: str = "PyTorch"  # how steps are computed, for the summary

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device


@dataclass(frozen=True)
class Loading:
    """How the weights of a model are wanted."""

    weights: Weights = "auto"
    # False: --precision asks for 16 bits, so that activations are rounded too
    in_fp32: bool = True
    uses_fast_step: bool = True


def load(
    name: str, runtime: Runtime, *, cache_dir: str | None, loading: Loading | None = None
) -> LanguageModel:
    """Return a causal language model on the runtime's device.

    On a CPU, a model that decoder.c covers keeps its weights as its file stores them, and computes
    with them in fp32; all others have weights in the runtime's precision. Raises UserError if it
    cannot be loaded or is of another kind.
    """
    loading = loading or Loading(in_fp32=runtime.precision == "fp32")
    source = sources.find_folder(name, kind="language model", cache_dir=cache_dir)
    gguf = stored_weights.find_gguf(source)
    with models.load_errors(name):
        folder = source if gguf is None else stored_weights.gguf_folder(gguf, cache_dir)
    config = models.load(AutoConfig, folder, name=name)
    check_trained_to_generate(config, name=name)
    tokenizer = models.load_tokenizer(folder, name=name)
    model, fast_step, step_name = load_model(config, folder, runtime, loading, name=name, cache_dir=cache_dir)
    if model.config.is_encoder_decoder or not model.can_generate():
        raise UserError(
            f"--model {name}: {type(model).__name__} does not continue texts; name a causal language model"
        )
    end_ids = find_end_ids(model, tokenizer)
    pad_ids = (model.generation_config.pad_token_id, tokenizer.pad_token_id, *end_ids, 0)
    # LLaMA's first models say -1 for none
    pad_id = next(number for number in pad_ids if number not in (None, -1))
    check_ids((*end_ids, pad_id), model, name=name)
    if gguf is None:
        models.try_out(model, tokenizer, name=name)
    context = models.max_positions(model)
    return LanguageModel(name, model, tokenizer, end_ids, pad_id, context, fast_step, step_name)


def load_model(
    config: PreTrainedConfig,
    folder: Path,
    runtime: Runtime,
    loading: Loading,
    *,
    name: str,
    cache_dir: str | None,
) -> tuple[PreTrainedModel, FastStep | None, str]:
    """Return a model, its step in C if there is one, and how its steps are computed, in words."""
    plain_dtype = DTYPES[runtime.precision]
    try:
        check_config(config)  # before the weights are read
        kernel = start_kernel(runtime, loading, cache_dir)
        dtype = wanted_dtype(folder, runtime, loading)
        model = read_model(config, folder, dtype, name=name, kernel=kernel)
        step = fast_decoding.fast_step(model, fast_decoding.stored_matrices(model), kernel)
        model.eval()
        return model, step, "C"
    except NotCovered as reason:
        if loading.weights == "file":
            raise UserError(f"--weights file: {name}: {reason}; leave the flag out") from reason
        dtype = DTYPES[loading.weights] if loading.weights != "auto" else plain_dtype
        plain: Any = read_model(config, folder, dtype, name=name, kernel=None)
        return plain.eval().to(runtime.device), None, f"PyTorch ({reason})"


def start_kernel(runtime: Runtime, loading: Loading, cache_dir: str | None) -> Kernel:
    """Return the compiled step with its threads. Raises NotCovered where it can't be used."""
    if not loading.uses_fast_step:
        raise NotCovered("--plain-step")
    if runtime.device.type != "cpu":
        raise NotCovered(runtime.device.type)
    if not loading.in_fp32:
        raise NotCovered(f"--precision {runtime.precision}")
    return Kernel(fast_decoding.load_library(cache_dir), torch.get_num_threads())


def wanted_dtype(folder: Path, runtime: Runtime, loading: Loading) -> torch.dtype | None:
    """Return the dtype of the weights for the step in C; None: as they are stored."""
    if loading.weights in ("fp32", "bf16"):
        return DTYPES[loading.weights]
    if loading.weights == "file" or runtime.precision == "fp32" or is_from_gguf(folder):
        return None
    return DTYPES[runtime.precision]  # where bf16 is fast, fp32 would take twice the time to read


def is_from_gguf(folder: Path) -> bool:
    """Return whether a folder is one of those that hold the content of a GGUF file."""
    return (folder / stored_weights.WEIGHTS_FILE).exists()


def read_model(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype | None, *, name: str, kernel: Kernel | None
) -> PreTrainedModel:
    """Return the model of a folder, with weights of a dtype; None: as they are stored.

    With a kernel, weights of less than 32 bits stay as they are, and are widened where they are
    used. Raises NotCovered, with a kernel, for a model whose weights it can't find.
    """
    if is_from_gguf(folder):
        return read_stored(config, folder, dtype, name=name, kernel=kernel)
    model, new = models.load_model(
        AutoModelForCausalLM, folder, name=name, config=config, dtype=dtype or "auto"
    )
    if new:
        raise UserError(
            f"--model {name}: it was never trained to generate (no weights for {', '.join(new[:3])}); name a "
            "causal language model"
        )
    if kernel is not None and model.dtype != torch.float32:
        read_transformer(model, {})  # raises NotCovered before anything is replaced
        matrices = fast_decoding.own_matrices(model)
        fast_decoding.store(model, matrices, kernel)
        model.float()  # the vectors, and what is computed with them
    return model


def read_stored(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype | None, *, name: str, kernel: Kernel | None
) -> PreTrainedModel:
    """Return a model from the folder of a GGUF file, as `read_model` does."""
    weights = stored_weights.read_weights(folder / stored_weights.WEIGHTS_FILE)
    keeps = kernel is not None and dtype != torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    matrices: dict[str, Matrix] = {}
    tensors: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if isinstance(weight, Matrix) and keeps:
            matrices[key] = weight if dtype is None else stored_weights.convert(weight, dtype)
        elif isinstance(weight, Matrix):
            tensors[key] = weight.widen().to(dtype or torch.float32)
        else:
            tensors[key] = weight if keeps else weight.to(dtype or torch.float32)
    if kernel is not None and keeps:
        fast_decoding.store(model, matrices, kernel)
    model.load_state_dict(tensors, strict=False, assign=True)
    if not keeps:
        model.tie_weights()
    missing = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise UserError(f"--model {name}: no weights for {missing[0]}; name a complete file")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its angles are no weights
    model.generation_config = models.load(GenerationConfig, folder, name=name)
    return model.requires_grad_(False)


def check_trained_to_generate(config: PreTrainedConfig, *, name: str) -> None:
    """Raise UserError for a model that was saved with another head than that of a language model,
    or without one.

    Some load all the same: BERT's head for masked words, or GPT-2 without a head, which is tied to
    the embeddings.
    """
    saved = config.architectures or []
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    is_known = not known.isdisjoint(saved) or any(kind.endswith("ForCausalLM") for kind in saved)
    if saved and not is_known and not config.is_encoder_decoder:
        raise UserError(
            f"--model {name}: it was never trained to generate (it was saved as {', '.join(saved)}); name a"
            " causal language model"
        )


def find_end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end a text: those of the model, else that of the tokenizer, else none.

    The model's can be a list (transformers #31362).
    """
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def check_ids(ids: tuple, model: PreTrainedModel, *, name: str) -> None:
    """Raise UserError unless all ids, which come from a model's files, are of its vocabulary."""
    size = model.config.get_text_config(decoder=True).vocab_size
    for number in ids:
        if type(number) is not int or not 0 <= number < size:
            raise UserError(
                f"--model {name}: it ends or pads texts with the id {shorten(repr(number), 60)}, and its "
                f"ids go from 0 to {size - 1}; correct its generation_config.json"
            )


def end_token_ids(tokens: list[str], language_model: LanguageModel) -> tuple[int, ...]:
    """Return the ids of the tokens of --end-token. Raises UserError for one that is not a single
    token of the model.
    """
    vocabulary = language_model.tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise UserError(
                f"--end-token {token!r}: no token of {language_model.name}; use --stop for other texts"
            )
    return tuple(vocabulary[token] for token in tokens)


def check_stops(stops: list[str], language_model: LanguageModel) -> None:
    """Raise UserError for a stop string that contains a special token, because special tokens are
    not part of the text that is searched.
    """
    tokenizer = language_model.tokenizer
    added = tokenizer.added_tokens_decoder.values()
    special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    for stop in stops:
        for token in special:
            if token in stop:
                raise UserError(
                    f"--stop {stop!r}: {token} is a special token, which no text shows; use "
                    f"--end-token {token!r}"
                )


def encode_prompt(text: str, language_model: LanguageModel, *, name: str) -> list[int]:
    """Return the token ids of a raw prompt, with the special tokens that its tokenizer adds.

    Raises UserError for an empty one; `name` says in it which prompt it is.
    """
    check_characters(text, language_model, name=name)
    ids = language_model.tokenizer(text)["input_ids"] if text.strip() else []
    if not ids:
        raise UserError(f"{name}: the prompt is empty; write something to continue from")
    return ids


def check_characters(text: str, language_model: LanguageModel, *, name: str) -> None:
    """Raise UserError for a text that can't fit into the model's context, before the minutes that
    its tokens would take.
    """
    context = language_model.context
    if context is not None and len(text) > context * MOST_CHARACTERS_PER_TOKEN:
        raise UserError(
            f"{name}: the prompt has {len(text):,} characters and {language_model.name} holds "
            f"{context:,} tokens; shorten it"
        )


def check_tokens(ids: list[int], language_model: LanguageModel, *, name: str) -> None:
    """Raise UserError for a token that the tokenizer has and the model does not."""
    size = language_model.model.config.get_text_config(decoder=True).vocab_size
    highest = max(ids, default=0)
    if highest >= size:
        token = language_model.tokenizer.decode([highest])
        raise UserError(
            f"{name}: its token {token!r} has the id {highest}, and the ids of {language_model.name} go "
            f"from 0 to {size - 1}; copy the tokenizer that belongs to the model"
        )


def check_length(ids: list[int], new_tokens: int, language_model: LanguageModel, *, name: str) -> None:
    """Raise UserError unless a prompt and `new_tokens` more tokens fit into the model's context."""
    check_tokens(ids, language_model, name=name)
    context = language_model.context
    if context is None or len(ids) + new_tokens <= context:
        return
    if len(ids) >= context:
        raise UserError(
            f"{name}: the prompt has {len(ids):,} tokens and {language_model.name} holds "
            f"{context:,}; shorten it"
        )
    raise UserError(
        f"--max-new-tokens {new_tokens}: {name} has {len(ids):,} tokens and {language_model.name} "
        f"holds {context:,}; use at most {context - len(ids):,}"
    )
