"""A causal language model with its tokenizer, and what decoding needs to know about the two: end
ids, padding id, context; prompts as token ids.

A model that the step in C covers is read from its folder without transformers, whose code of a
model takes seconds to import. All others are the library's (library.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from common import bundled
from common.errors import NotSupported, UserError, shorten
from common.files import read_settings
from common.generation import fast_decoding, stored_weights
from common.generation.fast_decoding import CompiledModel, Kernel
from common.generation.llama_config import check_config, read_transformer
from common.generation.stored_weights import Matrix
from common.runtime import DTYPES, Runtime, give_back_memory
from common.tokenizer import Tokenizer, read_language_tokenizer

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedTokenizerBase

    from common.generation.adapters import Adapter
    from common.generation.library import TransformersModel

MOST_CHARACTERS_PER_TOKEN = 1000  # far more than any tokenizer's longest token has
Weights = Literal["auto", "file", "fp32", "bf16"]  # of --weights


@dataclass(frozen=True)
class LanguageModel:
    """A model, its tokenizer, and how a text ends with them."""

    name: str
    model: TransformersModel | CompiledModel  # both have what decoding needs from a model
    tokenizer: PreTrainedTokenizerBase | Tokenizer
    end_ids: tuple[int, ...]  # each of them ends a text; () if none does
    pad_id: int
    context: int | None  # the maximum number of tokens of a text; None if nothing limits it
    backend: str = "PyTorch"  # what computes, for the summary
    folder: Path = Path()
    # of a compiled model as stored, by name; an adapter is merged into others
    weights: dict[str, Matrix | Tensor] = field(default_factory=dict)
    adapter: Adapter | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers that are computed with."""
        return self.model.dtype

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return self.model.vocabulary


@dataclass(frozen=True)
class Loading:
    """Options of loading a model."""

    weights: Weights = "auto"
    # False: --precision names 16 bits, in which decoder.c does not compute
    may_compute_in_fp32: bool = True
    may_compile: bool = True  # False: transformers computes, whatever the model
    adapter: str | None = None  # a LoRA adapter that is merged into them


def load(
    name: str, runtime: Runtime, *, cache_dir: str | None, loading: Loading | None = None
) -> LanguageModel:
    """Return a causal language model on the runtime's device.

    On a CPU, decoder.c computes in fp32. Its weights stay as their file stores them, unless `--weights`
    names another type, or the runtime's precision is bf16 and the file is not GGUF (`wanted_dtype`).
    All other models have weights in the runtime's precision, or in the type that `--weights` names.
    Raises UserError if the model cannot be loaded or is of another kind.
    """
    loading = loading or Loading(may_compute_in_fp32=runtime.precision == "fp32")
    folder = stored_weights.model_folder(name, cache_dir)
    adapter = find_adapter(loading.adapter, cache_dir)
    try:
        options = {"name": name, "cache_dir": cache_dir, "adapter": adapter}
        found = load_compiled(folder, runtime, loading, **options)
    except NotSupported as reason:
        if loading.weights == "file":
            raise UserError(f"--weights file: {name}: {reason}; leave the flag out") from reason
        dtype = DTYPES[loading.weights if loading.weights in DTYPES else runtime.precision]
        backend = f"PyTorch ({reason})"
        found = load_from_library(folder, dtype, runtime.device, name=name, backend=backend, adapter=adapter)
    if adapter is not None:
        from common.generation import adapters

        adapters.note(adapter, found)
    give_back_memory()
    return found


def find_adapter(name: str | None, cache_dir: str | None) -> Adapter | None:
    """Return the adapter that --adapter names, None without one."""
    if name is None:
        return None
    from common.generation import adapters

    return adapters.find(name, cache_dir=cache_dir)


def load_compiled(
    folder: Path,
    runtime: Runtime,
    loading: Loading,
    *,
    name: str,
    cache_dir: str | None,
    adapter: Adapter | None,
) -> LanguageModel:
    """Return the model of a folder as decoder.c computes it. Raises NotSupported, with the reason,
    for one that it does not compute, and where it can't be used.
    """
    kernel = start_kernel(runtime, loading, cache_dir)
    config = read_settings(folder / "config.json")
    check_config(config)  # before the weights are read
    check_saved_to_generate(config)
    weights = stored_weights.read_folder(folder, f"--model {name}")
    check_stored_dtype(config, weights)
    dtype = wanted_dtype(folder, runtime, loading)
    if dtype is not None:
        weights = {
            key: stored_weights.convert(weight, dtype) if isinstance(weight, Matrix) else weight
            for key, weight in weights.items()
        }
    transformer = read_transformer(config, weights)
    if adapter is not None:
        from common.generation import adapters

        merged = adapters.merge_stored(folder, adapter, weights, name=name)
        transformer = read_transformer(config, merged)
    fast_decoding.check_model(transformer, kernel)
    tokenizer = load_tokenizer(folder, name=name)
    model = CompiledModel(transformer, kernel)
    special_ids = read_special_ids(folder, config)
    end_ids, pad_id = find_special_ids(special_ids, tokenizer, model, name=name)
    context = transformer.max_position_embeddings
    return LanguageModel(name, model, tokenizer, end_ids, pad_id, context, "C", folder, weights, adapter)


def start_kernel(runtime: Runtime, loading: Loading, cache_dir: str | None) -> Kernel:
    """Return the compiled step with its threads. Raises NotSupported where it can't be used."""
    if not loading.may_compile:
        raise NotSupported("--plain-step")
    if runtime.device.type != "cpu":
        raise NotSupported(runtime.device.type)
    if not loading.may_compute_in_fp32:
        raise NotSupported(f"--precision {runtime.precision}")
    return Kernel(fast_decoding.load_library(cache_dir), torch.get_num_threads())


def check_saved_to_generate(config: dict[str, Any]) -> None:
    """Raise NotSupported for a model that was saved with another head than that of a language model:
    the library says what it is.
    """
    saved = config.get("architectures") or ["ForCausalLM"]
    if not any(kind.endswith("ForCausalLM") for kind in saved):
        raise NotSupported(f"it was saved as {', '.join(saved)}")


def check_stored_dtype(config: dict[str, Any], weights: dict[str, Matrix | Tensor]) -> None:
    """Raise NotSupported where a config asks for weights of another type than the stored ones: the
    library rounds them when it loads them.
    """
    asked = config.get("dtype", config.get("torch_dtype"))
    kinds = {weight.data.dtype for weight in weights.values() if isinstance(weight, Matrix)}
    if asked is not None and any(f"torch.{asked}" != str(dtype) for dtype in kinds - {torch.uint8}):
        raise NotSupported(f"its weights are to be rounded to {asked}")


def wanted_dtype(folder: Path, runtime: Runtime, loading: Loading) -> torch.dtype | None:
    """Return the dtype of the weights for the step in C; None: as they are stored."""
    if loading.weights in ("fp32", "bf16"):
        return DTYPES[loading.weights]
    is_from_gguf = (folder / bundled.STORED_FILE).exists()
    if loading.weights == "file" or runtime.precision == "fp32" or is_from_gguf:
        return None
    return DTYPES[runtime.precision]  # where bf16 is fast, fp32 would take twice the time to read


def load_from_library(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    name: str,
    backend: str,
    adapter: Adapter | None,
) -> LanguageModel:
    """Return the model of a folder as transformers reads and computes it."""
    from common import models
    from common.generation import library

    module = library.load(folder, dtype, device, name=name)
    if adapter is not None:
        from common.generation import adapters

        module = adapters.merge(module, adapter, name=name)
    model, tokenizer = library.TransformersModel(module), models.load_tokenizer(folder, name=name)
    roles = ("eos_token_id", "pad_token_id")
    special_ids = {role: getattr(module.generation_config, role) for role in roles}
    end_ids, pad_id = find_special_ids(special_ids, tokenizer, model, name=name)
    context = models.max_positions(module)
    models.try_out(module, tokenizer, name=name)
    return LanguageModel(name, model, tokenizer, end_ids, pad_id, context, backend, folder, adapter=adapter)


def load_tokenizer(folder: Path, *, name: str) -> PreTrainedTokenizerBase | Tokenizer:
    """Return the tokenizer of a folder: our own, or the library's where ours does not know it."""
    try:
        return read_language_tokenizer(folder)
    except NotSupported:
        from common import models

        return models.load_tokenizer(folder, name=name)


def read_special_ids(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the ids that end and pad texts: those of generation_config.json where there is one,
    else those of config.json.
    """
    path = folder / "generation_config.json"
    if path.exists():
        return read_settings(path)
    known = {"eos_token_id": 2} if config["model_type"] in ("llama", "mistral") else {}
    return {**known, **config}


def find_special_ids(
    special_ids: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | Tokenizer,
    model: TransformersModel | CompiledModel,
    *,
    name: str,
) -> tuple[tuple[int, ...], int]:
    """Return the ids that end a text, () if none does, and the id that pads it. Raises UserError
    for one that the model does not have.

    The end ids are those of the model, which can be a list (transformers #31362), else that of the
    tokenizer. Padding is masked: any id would do.
    """
    ends = special_ids.get("eos_token_id")
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        ends = ()
    end_ids = tuple(ends) if isinstance(ends, list | tuple) else (ends,)
    candidates = (special_ids.get("pad_token_id"), tokenizer.pad_token_id, *end_ids, 0)
    # LLaMA's first models say -1 for none
    pad_id = next(number for number in candidates if number not in (None, -1))
    for number in (*end_ids, pad_id):
        if type(number) is not int or not 0 <= number < model.vocabulary:
            raise UserError(
                f"--model {name}: it ends or pads texts with the id {shorten(repr(number), 60)}, and its"
                f" ids go from 0 to {model.vocabulary - 1}; correct its generation_config.json"
            )
    return end_ids, pad_id


def end_token_ids(tokens: list[str], language_model: LanguageModel) -> tuple[int, ...]:
    """Return the ids of the tokens of --end-token. Raises UserError for one that is not a single
    token of the model.
    """
    vocabulary = language_model.tokenizer.get_vocab() if tokens else {}  # takes 50 ms
    for token in tokens:
        if token not in vocabulary:
            problem = f"no token of {language_model.name}"
            raise UserError(f"--end-token {token!r}: {problem}; use --stop for other texts")
    return tuple(vocabulary[token] for token in tokens)


def read_bias(biases: list[str], language_model: LanguageModel) -> tuple[tuple[int, float], ...]:
    """Return (id, number) for each TOKEN=NUMBER of --logit-bias; a TOKEN of digits is an id.

    Raises UserError for a text that is not a single token, and for an id that the model does not have.
    """
    numbers: dict[int, float] = {}
    for bias in biases:
        token, _, number = bias.rpartition("=")
        if token.isdecimal():
            token_id = int(token)
            if token_id >= language_model.vocabulary:
                most = language_model.vocabulary - 1
                problem = f"the ids of {language_model.name} go from 0 to {most}"
                raise UserError(f"--logit-bias {bias}: {problem}")
        else:
            ids = token_ids(token, language_model)
            if len(ids) != 1:
                problem = f"{token!r} is {len(ids)} tokens of {language_model.name}"
                raise UserError(f"--logit-bias {bias}: {problem}; name one of their ids {ids}")
            [token_id] = ids
        numbers[token_id] = numbers.get(token_id, 0.0) + float(number)
    return tuple(numbers.items())


def tokens_of_words(words: list[str], language_model: LanguageModel) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each word of --ban-words: at the start of a text, and after a space."""
    texts = (before + word.strip() for word in words for before in ("", " "))
    runs = [tuple(token_ids(text, language_model)) for text in texts]
    return tuple(dict.fromkeys(runs))


def token_ids(text: str, language_model: LanguageModel) -> list[int]:
    """Return the token ids of a text that goes on, without the special tokens around texts.

    Some tokenizers put a space before each text that they encode: behind a line break they do not.
    """
    tokenizer: Any = language_model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)  # asks without a list of all tokens
    own = tokenizer.get_vocab().get(text) if backend is None else backend.token_to_id(text)
    if own is not None:
        return [own]
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    before = tokenizer("\n", add_special_tokens=False)["input_ids"]
    both = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    return both[len(before) :] if both[: len(before)] == before else alone


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
    size = language_model.vocabulary
    highest = max(ids, default=0)
    if highest >= size:
        token = language_model.tokenizer.decode([highest])
        raise UserError(
            f"{name}: its token {token!r} has the id {highest}, and the ids of {language_model.name}"
            f" go from 0 to {size - 1}; copy the tokenizer that belongs to the model"
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
