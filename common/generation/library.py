"""Language models of transformers: those that the step in C does not cover, and the library's own
version of one that it does, for `--check`.

Importing the library's code of a model takes seconds, so this file is imported only where it is needed.
"""

import functools
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common import bundled, model_files, models
from common.errors import UserError
from common.generation import stored_weights
from common.generation.decoding import Batch
from common.generation.stored_weights import Matrix
from common.runtime import free_memory_bytes


@dataclass(frozen=True)
class TransformersModel:
    """A model of transformers, with what decoding needs from any model. Shapes: B texts, T columns, V tokens
    in the vocabulary.
    """

    module: PreTrainedModel
    is_compiled: ClassVar[bool] = False  # by fast_decoding.py

    @property
    def config(self) -> PreTrainedConfig:
        """The settings of the decoder."""
        return self.module.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers that are computed with."""
        return self.module.dtype

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return self.config.vocab_size

    @property
    def cache_bytes(self) -> int:
        """The bytes that the keys and values of a token take."""
        numbers = 0
        for layer in self.config.per_layer_config:  # of Gemma 4, layers differ in the size of a head
            heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
            size = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
            numbers += 2 * heads * size
        return numbers * self.dtype.itemsize

    @property
    def reads_padding(self) -> bool:
        """Whether a text of a batch depends on the lengths of the others, in the library's code."""
        return self.module.config.model_type == "recurrent_gemma"

    def new_cache(self) -> DynamicCache:
        """Return an empty cache, which forgets what a sliding-window model can no longer see."""
        return DynamicCache(config=self.config)

    def forward(self, batch: Batch, *, first: int, keep: int) -> Tensor:
        """Run the model over the columns of a batch from `first` to the end, and add them to its
        cache. Return the logits of the last `keep` columns, (B, keep, V), in the model's precision.
        """
        columns = torch.arange(first, batch.length, device=batch.ids.device)
        positions = columns - batch.starts[:, None]  # (B, T - first), negative in the padding
        options = {"position_ids": positions.clamp(min=0), "logits_to_keep": keep}
        accepted = accepted_inputs(type(self.module))
        output = self.module(
            input_ids=batch.ids[:, first : batch.length],
            attention_mask=None if batch.mask is None else batch.mask[:, : batch.length],
            past_key_values=batch.cache,
            use_cache=True,
            **{name: value for name, value in options.items() if name in accepted},
        )
        return output.logits[:, -keep:]  # a model without logits_to_keep returns all columns


@functools.cache
def accepted_inputs(model_class: type[PreTrainedModel]) -> frozenset[str]:
    """Return the parameters of a model's forward: Bloom takes no positions, and old models no
    logits_to_keep. Looked up once per class, not once per token.
    """
    return frozenset(inspect.signature(model_class.forward).parameters)


def load(folder: Path, dtype: torch.dtype, device: torch.device, *, name: str) -> PreTrainedModel:
    """Return the causal language model of a folder. Raises UserError if it can't be loaded, is of
    another kind, or takes no cache, such as models that are nothing but a recurrent state.
    """
    config = models.load(AutoConfig, folder, name=name)
    check_trained_to_generate(config, name=name)
    model = read(config, folder, dtype, name=name).eval().to(device)  # pyrefly: ignore[bad-argument-type]
    kind = type(model).__name__
    if model.config.is_encoder_decoder or not model.can_generate():
        problem = f"{kind} does not continue texts"
        raise UserError(f"--model {name}: {problem}; name a causal language model")
    is_refused = "past_key_values" not in accepted_inputs(type(model))
    with models.load_errors(name, reader=kind):
        if is_refused or not uses_cache(model):
            problem = f"{kind} reads on without a key-value cache, which this script needs"
            raise UserError(f"--model {name}: {problem}; name a transformer that has one")
    return model


@torch.inference_mode()
def uses_cache(model: PreTrainedModel) -> bool:
    """Return whether a model fills the cache that it is given, or its logits depend on it: some
    take one, and then read each token as if it were the first.
    """
    config = model.config.get_text_config(decoder=True)
    ids = torch.tensor([[1, 2, 3]], device=model.device) % config.vocab_size

    def read(first: int, cache: DynamicCache) -> Tensor:
        options = {"position_ids": torch.arange(first, 3, device=model.device)[None]}
        names = accepted_inputs(type(model))
        options = {key: value for key, value in options.items() if key in names}
        return model(ids[:, first:], past_key_values=cache, use_cache=True, **options).logits[:, -1]

    filled, empty = DynamicCache(config=config), DynamicCache(config=config)
    model(ids[:, :2], past_key_values=filled, use_cache=True)
    # weights that are zero in part may give the same logits, whatever the cache holds
    return filled.get_seq_length() > 0 or not torch.equal(read(2, filled), read(2, empty))


def read(config: PreTrainedConfig, folder: Path, dtype: torch.dtype, *, name: str) -> PreTrainedModel:
    """Return the model of a folder with weights of a dtype."""
    if (folder / bundled.STORED_FILE).exists():
        weights = stored_weights.read_folder(folder, f"--model {name}")
        return over_weights(config, folder, weights, dtype, name=name)
    shapes = model_files.weight_shapes(folder, f"--model {name}")
    check_memory(sum(map(math.prod, shapes.values())), dtype, name=name)
    options = {"config": config, "dtype": dtype}
    model, new = models.load_model(AutoModelForCausalLM, folder, name=name, **options)
    if new:
        raise UserError(
            f"--model {name}: it was never trained to generate (no weights for"
            f" {', '.join(new[:3])}); name a causal language model"
        )
    return model


def check_memory(num_weights: int, dtype: torch.dtype, *, name: str) -> None:
    """Raise UserError for a model whose weights do not fit into the memory that is free: else the
    system would end this process, without a word.
    """
    free, needed = free_memory_bytes(torch.device("cpu")), num_weights * dtype.itemsize
    if free is not None and needed > free:
        precision, size = str(dtype).removeprefix("torch."), f"{needed / 1e9:,.1f} GB"
        taken = f"in {precision} its weights take about {size}"
        helps = "name a smaller model"
        helps = helps if dtype.itemsize == 2 else "use --precision bf16, or a smaller model"
        raise UserError(f"--model {name}: {taken}, and {free / 1e9:,.1f} GB are free; {helps}")


def over_folder(folder: Path, weights: dict[str, Matrix | Tensor], *, name: str) -> PreTrainedModel:
    """Return the model of a folder over weights that are read already, widened to fp32."""
    sizes = [w.rows * w.columns if isinstance(w, Matrix) else w.numel() for w in weights.values()]
    check_memory(sum(sizes), torch.float32, name=name)
    config = models.load(AutoConfig, folder, name=name)
    return over_weights(config, folder, weights, torch.float32, name=name).eval()


def over_weights(
    config: PreTrainedConfig,
    folder: Path,
    weights: dict[str, Matrix | Tensor],
    dtype: torch.dtype,
    *,
    name: str,
) -> PreTrainedModel:
    """Return the model of a config with the given weights, widened to a dtype."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain = {
        key: (weight.widen() if isinstance(weight, Matrix) else weight).to(dtype)
        for key, weight in weights.items()
    }
    model.load_state_dict(plain, strict=False, assign=True)
    model.tie_weights()
    missing = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise UserError(f"--model {name}: no weights for {missing[0]}; name a complete file")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its angles are not weights
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
            f"--model {name}: it was never trained to generate (it was saved as"
            f" {', '.join(saved)}); name a causal language model"
        )
