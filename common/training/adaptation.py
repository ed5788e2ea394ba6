"""What a run changes about a pretrained model: its dropouts, which layers learn, low-rank
adapters, recomputed activations, faster parts.
"""

import copy
import warnings

import torch
from transformers.pytorch_utils import Conv1D

from common import speedups
from common.errors import UserError
from common.speedups import use_fast_dropout

# BERT, DistilBERT, GPT-2
ATTENTION_DROPOUT_NAMES = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
LORA_ALPHA = 2  # times the rank: the scale that the update is multiplied by, as is usual
# a dropout of its own would be one more place of randomness; --dropout holds for the model's
LORA_DROPOUT = 0.0


def dropout_options(
    config, *, dropout: float | None, attention_dropout: float | None, name: str
) -> dict[str, float]:
    """Return the values for a config's dropout options: `dropout` for all of them where given,
    `attention_dropout` (default 0) for attention's.

    Attention dropout above 0 takes the slow way through attention on CPUs. Raises UserError when
    the model has no option that is asked for.
    """
    found = [option for option in config.to_dict() if "drop" in option and "layerdrop" not in option]
    attention = [option for option in ATTENTION_DROPOUT_NAMES if hasattr(config, option)]
    if attention_dropout and not attention:
        raise UserError(f"--attention-dropout {attention_dropout}: {name} has none; leave the flag out")
    if dropout and not found:
        raise UserError(f"--dropout {dropout}: {name} has none; leave the flag out")
    values = {} if dropout is None else dict.fromkeys(found, dropout)
    if attention_dropout is not None or dropout is None:
        values.update(dict.fromkeys(attention, attention_dropout or 0.0))
    return values


def adapt(model: torch.nn.Module, args) -> torch.nn.Module:
    """Return the model as the flags want it: frozen layers, recomputed activations, adapters; with
    attention and dropout that cost less on CPUs.
    """
    if not args.compile:  # which fuses them itself
        speedups.use_fast_attention(model)
        use_fast_dropout(model)
    if args.gradient_checkpointing:
        recompute_activations(model)
    adapted = add_adapters(model, args.lora_rank) if args.lora_rank else model
    freeze_layers(model, args.freeze_layers)  # with the adapters in them
    return adapted


def freeze_layers(model: torch.nn.Module, number: int):
    """Keep the embeddings and the `number` lowest layers of a model as they are. Raises UserError
    when it has fewer layers, or not all can be found.
    """
    if number == 0:
        return
    layers = encoder_layers(model)
    if number > len(layers):
        raise UserError(f"--freeze-layers {number}: the model has {len(layers)}; give at most that")
    embeddings = getattr(model.base_model, "embeddings", None) or model.get_input_embeddings()
    for module in (embeddings, *layers[:number]):
        module.requires_grad_(False)


def encoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """Return a model's stack of layers: its first list of as many modules as its config has
    layers.
    """
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise UserError(
        f"--freeze-layers: {type(model).__name__} has no list of layers to count; leave the flag out"
    )


def recompute_activations(model: torch.nn.Module):
    """Let each layer's activations be computed again in the backward pass: less memory, a third
    more time. Raises UserError when the model can't.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"--gradient-checkpointing: {type(model).__name__} has none; leave the flag out")
    # the reentrant kind gives no gradient under frozen embeddings, and none to DDP
    model.activation_checkpointing_enable({"use_reentrant": False})


def add_adapters(model: torch.nn.Module, rank: int):
    """Return the model with low-rank adapters (LoRA, Hu et al. 2021) at all linear layers but the
    head's; only they and the head learn.

    The head is all that lies beside the pretrained model: it is new, of one linear layer or, as
    DistilBERT's and ModernBERT's, of several. peft is not told of it, for it finds modules by the
    ends of their names, and takes DistilBERT's `pre_classifier` for its `classifier` too.
    """
    import peft  # seconds to import, and only this needs it

    linear = [
        f"{model.base_model_prefix}.{name}"
        for name, module in model.base_model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    ]
    head = [module for name, module in model.named_children() if name != model.base_model_prefix]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=LORA_ALPHA * rank,
        lora_dropout=LORA_DROPOUT,
        target_modules=linear,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with warnings.catch_warnings():
        # of what peft asks of transformers: nothing that the user can mend
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(model, config)
    for module in head:
        module.requires_grad_(True)
    return adapted


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """Return a plain model: a copy with its adapters added into its weights, or the model itself
    when it has none.
    """
    return copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
