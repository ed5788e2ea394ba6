"""LoRA adapters (Hu et al. 2021) that were trained elsewhere: read from their folder, put into a language
model by peft, and merged into its weights, so that a token takes no longer than without an adapter.

peft knows the variants (DoRA, rank-stabilised scales, ranks of single layers, whole modules) and is the
oracle of `--check`. It reads neither the files nor the settings itself: those are read here, and a setting
that is not known here is refused. Importing peft takes seconds, so this file is imported only where there is
an adapter.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import peft.tuners.lora
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common import errors, model_files, models, pickled_weights, sources
from common.errors import UserError, shorten
from common.files import read_settings
from common.generation import library
from common.generation.language_model import LanguageModel
from common.generation.stored_weights import Matrix, as_matrix

# settings that say what is added to the weights
TAKEN = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("bias", "lora_bias", "modules_to_save"),
)
# settings that matter only during training, or that describe the adapter
WITHOUT_EFFECT = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("auto_mapping", "lora_dropout", "eva_config", "loftq_config", "megatron_core", "runtime_config"),
)
# initializations of adapters; all others (PiSSA, OLoRA, CorDA, LoftQ) also change the model itself
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """An adapter as its folder describes it."""

    name: str  # of --adapter
    settings: dict[str, Any]  # of adapter_config.json
    weights: Path

    @property
    def made_for(self) -> str:
        """The name of the model that it was trained for, according to its settings; "" if they name none."""
        return str(self.settings.get("base_model_name_or_path") or "")


def find(name: str, *, cache_dir: str | None) -> Adapter:
    """Return an adapter of a folder or of the Hub. Raises UserError where there is none, and for
    settings that are not known here.
    """
    folder = sources.find_adapter(name, cache_dir=cache_dir)
    weights = pickled_weights.converted_adapter(folder, f"--adapter {name}", cache_dir=cache_dir)
    settings = read_settings(folder / model_files.ADAPTER_CONFIG)
    usual = peft.LoraConfig()
    for key, value in settings.items():
        is_known = key in (*TAKEN, *WITHOUT_EFFECT) or value in (None, False, [], {})
        if key == "init_lora_weights":
            is_known = value in BEGINNINGS
        if not is_known and value != getattr(usual, key, None):
            setting = f"{model_files.ADAPTER_CONFIG}: {key} is {value!r:.80}"
            problem = f"{setting}, which is not known here"
            raise UserError(f"--adapter {name}: {problem}; merge it with peft, or name another")
    return Adapter(name, settings, weights)


def attach(model: PreTrainedModel, adapter: Adapter, *, name: str) -> peft.PeftModel:
    """Return a language model with an adapter that is not merged: peft's layers are put into the model
    itself.

    Raises UserError for an adapter that does not fit the model, of which `name` is the name.
    """
    known = {key: adapter.settings[key] for key in TAKEN if key in adapter.settings}
    with _errors(adapter):
        config = peft.LoraConfig(**known, init_lora_weights=False, inference_mode=True)
        tensors = safetensors.torch.load_file(adapter.weights)
        with torch.device("meta"):  # no numbers yet: a rank of millions takes no memory
            adapted = peft.PeftModel(model, config, low_cpu_mem_usage=True)
        needed = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        allowed = peft.get_peft_model_state_dict(adapted, save_embedding_layers=True)
    problem = first_problem(tensors, needed, allowed) or tied_layer(model)
    if problem:
        told = f" (it was made for {shorten(adapter.made_for, 80)})" if adapter.made_for else ""
        raise UserError(
            f"--adapter {adapter.name}: it does not fit {name}{told}: {problem}; name the model"
            " that it was made for with --model, or another adapter"
        )
    with _errors(adapter):
        rounded = {key: tensor.to(allowed[key].dtype) for key, tensor in tensors.items()}
        peft.set_peft_model_state_dict(adapted, rounded, low_cpu_mem_usage=True)
    return adapted.to(model.device).eval()


def _errors(adapter: Adapter) -> contextlib.AbstractContextManager[None]:
    """Turn whatever peft raises within the block into one line."""
    return models.load_errors(adapter.name, flag="--adapter", reader="a LoRA adapter")


def first_problem(
    tensors: dict[str, Tensor], needed: dict[str, Tensor], allowed: dict[str, Tensor]
) -> str | None:
    """Return the first way in which the tensors of a file differ from those that a model needs, None if there
    is none. In addition to these, `allowed` has the whole embeddings that a file may hold.
    """
    for key, tensor in tensors.items():
        if key not in allowed:
            return f"it has {key}, and the model has no such place"
        if tensor.shape != allowed[key].shape:
            saved, wanted = tuple(tensor.shape), tuple(allowed[key].shape)
            return f"{key} has the shape {saved}, and the model needs {wanted}"
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            return f"{key} is not finite"
    return next((f"it has no {key}" for key in needed if key not in tensors), None)


def tied_layer(model: PreTrainedModel) -> str | None:
    """Return the message that a layer with an adapter shares its weights with another one, None if none does:
    what is merged into one would change the other.
    """
    named = model.named_parameters(remove_duplicate=False)
    shared = [parameter.data_ptr() for _, parameter in named]
    for key, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            layer: Any = module.get_base_layer()
            if shared.count(layer.weight.data_ptr()) > 1:
                return f"{key} shares its weights with another layer: nothing can be merged into it"
    return None


def merge(model: PreTrainedModel, adapter: Adapter, *, name: str) -> PreTrainedModel:
    """Return a language model with an adapter in its weights. Raises UserError as `attach` does."""
    adapted: Any = attach(model, adapter, name=name)
    with _errors(adapter):
        return adapted.merge_and_unload()


def merge_stored(
    folder: Path, adapter: Adapter, weights: dict[str, Matrix | Tensor], *, name: str
) -> dict[str, Matrix | Tensor]:
    """Return the weights of a folder as they are stored, but for those that an adapter
    changes, which are in fp32.

    Raises UserError as `attach` does.
    """
    model = library.over_folder(folder, weights, name=name)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # peft adds in place; `weights` must stay
    merged = dict(weights)
    for key, parameter in merge(model, adapter, name=name).named_parameters():
        stored, own = weights.get(key), parameter.detach()
        before = stored.widen() if isinstance(stored, Matrix) else stored
        if before is None or not torch.equal(before.float(), own):
            merged[key] = as_matrix(own) if own.dim() == 2 else own
    return merged


def note(adapter: Adapter, language_model: LanguageModel) -> None:
    """Say that an adapter was merged, and what that has changed."""
    name, given = adapter.made_for, language_model.name
    parts = [f"merged into the weights of {given}"]
    if language_model.model.is_compiled:
        parts.append("those that it changes are in fp32, no longer as in the model's file")
    if name and name.rpartition("/")[2].lower() != given.rpartition("/")[2].lower():
        parts.append(f"it says that it was made for {shorten(name, 80)}")
    errors.note(f"note: --adapter {adapter.name}: {'; '.join(parts)}")
