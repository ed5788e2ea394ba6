"""What flags change about a pretrained model: its dropout, which layers learn, low-rank adapters,
recomputed activations.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, cast

import torch

from common import attention, speedups
from common.errors import NotSupported, UserError
from common.runtime import Runtime

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedConfig, PreTrainedModel

    from common.training.classifier import ModelConfig

# of BERT, DistilBERT, GPT-2
ATTENTION_DROPOUT_NAMES = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
LORA_ALPHA = 2  # times the rank: the scale by which the update is multiplied, as is usual
# dropout in the adapters would be one more source of randomness; --dropout is the model's own
LORA_DROPOUT = 0.0


def adapt(model: PreTrainedModel, config: ModelConfig, runtime: Runtime) -> PreTrainedModel:
    """Return the model as the flags want it: frozen layers, recomputed activations, adapters.

    Attention, dropout and the last layer are replaced by versions that cost less.
    """
    if not config.compile:  # torch.compile fuses them itself
        use_attention(model, config, runtime)
        speedups.use_fast_dropout(model)
        speedups.use_first_token(model)
    if config.gradient_checkpointing:
        recompute_activations(model)
    adapted = add_adapters(model, config.lora_rank) if config.lora_rank else model
    freeze_layers(model, config.freeze_layers)  # last, so that their adapters are frozen too
    return adapted


def use_attention(model: PreTrainedModel, config: ModelConfig, runtime: Runtime) -> None:
    """Let a model compute attention in the fastest way there is; say so if that would be attention.c
    and it can't be compiled.
    """
    speedups.use_fast_attention(model)
    if runtime.device.type != "cpu" or runtime.precision != "fp32" or not speedups.has_served_heads(model):
        return
    try:
        speedups.use_compiled_attention(model, attention.load_library(config.cache_dir))
    except NotSupported as error:
        runtime.say(f"         attention is computed by PyTorch: {error}")


def freeze_layers(model: PreTrainedModel, number: int) -> None:
    """Keep the embeddings and the `number` lowest layers of a model unchanged in training.

    Raises UserError when it has fewer layers, or its layers can't be found.
    """
    if number == 0:
        return
    layers = encoder_layers(model)
    if number > len(layers):
        raise UserError(f"--freeze-layers {number}: the model has {len(layers)}; give at most that")
    embeddings = getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()
    for module in (embeddings, *layers[:number]):
        module.requires_grad_(False)


def encoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the layers of a model: its first list of as many modules as its config has layers."""
    number = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == number:
            return module
    problem = f"{type(model).__name__} has no list of layers to count"
    raise UserError(f"--freeze-layers: {problem}; leave the flag out")


def recompute_activations(model: PreTrainedModel) -> None:
    """Let the backward pass compute each layer's activations again (gradient checkpointing).

    It saves memory and takes a third more time. Raises UserError when the model can't.
    """
    if not model.supports_gradient_checkpointing:
        problem = f"{type(model).__name__} does not support it"
        raise UserError(f"--gradient-checkpointing: {problem}; leave the flag out")
    # the reentrant variant gives no gradient under frozen embeddings, and none to DDP
    model.activation_checkpointing_enable({"use_reentrant": False})


def add_adapters(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """Return the model with low-rank adapters (LoRA, Hu et al. 2021) at its linear layers.

    Only the adapters and the head, which has none, learn. The head is everything except the
    pretrained model: it is new and has one linear layer or, as in DistilBERT and ModernBERT,
    several. peft is not told about it, because it finds modules by the ends of their names and
    would take DistilBERT's `pre_classifier` for its `classifier` too. Raises UserError for a rank
    that no matrix has.
    """
    import peft  # seconds to import, and only this needs it
    from transformers.pytorch_utils import Conv1D

    modules = {
        f"{model.base_model_prefix}.{name}": module
        for name, module in model.base_model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    highest = max((min(module.weight.shape) for module in modules.values()), default=rank)
    if rank > highest:
        problem = f"no matrix has a rank above {highest}"
        raise UserError(f"--lora-rank {rank}: {problem}; give at most that")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=LORA_ALPHA * rank,
        lora_dropout=LORA_DROPOUT,
        target_modules=list(modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with warnings.catch_warnings():
        # about what peft asks of transformers: nothing that the user can change
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(model, config)
    for module in head_modules(model):
        module.requires_grad_(True)
    # peft's wrapper has all attributes of the model within
    return cast("PreTrainedModel", adapted)


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Return a plain model: a copy with the adapters merged into its weights, or itself."""
    if not hasattr(model, "merge_and_unload"):
        return model
    return cast("peft.PeftModel", copy.deepcopy(model)).merge_and_unload()


def dropout_options(
    config: PreTrainedConfig, *, dropout: float | None, attention_dropout: float | None, name: str
) -> dict[str, float]:
    """Return values for a config's dropout options, as the flags ask for them.

    `dropout` sets all of them where given; `attention_dropout` (default 0) sets attention's, where
    a value above 0 takes the slow path on CPUs. Raises UserError when the model lacks an option
    that is asked for.
    """
    # layerdrop is another thing: it skips whole layers
    settings = config.to_dict()
    options = [name for name in settings if "drop" in name and "layerdrop" not in name]
    attention = [option for option in ATTENTION_DROPOUT_NAMES if hasattr(config, option)]
    if attention_dropout and not attention:
        asked = f"--attention-dropout {attention_dropout}"
        raise UserError(f"{asked}: {name} has none; leave the flag out")
    if dropout and not options:
        raise UserError(f"--dropout {dropout}: {name} has none; leave the flag out")
    values = {} if dropout is None else dict.fromkeys(options, dropout)
    if attention_dropout is not None or dropout is None:
        values.update(dict.fromkeys(attention, attention_dropout or 0.0))
    return values


def head_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the modules of a model that are not in its pretrained encoder or decoder."""
    return [module for name, module in model.named_children() if name != model.base_model_prefix]
