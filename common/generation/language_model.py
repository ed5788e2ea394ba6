"""A causal language model with its tokenizer, and what decoding needs to know about the two: end
ids, padding id, context; prompts as token ids.
"""

from dataclasses import dataclass

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common import models, sources
from common.errors import UserError, shorten
from common.runtime import DTYPES, Runtime


@dataclass(frozen=True)
class LanguageModel:
    """A model, its tokenizer, and how a text ends with them."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]  # each of them ends a text; () if none does
    pad_id: int
    context: int | None  # the most tokens that fit; None if nothing limits it

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device


def load(name: str, runtime: Runtime, *, cache_dir: str | None) -> LanguageModel:
    """Return a causal language model on the runtime's device, with weights in its precision.

    Raises UserError if it cannot be loaded or is of another kind.
    """
    folder = sources.find_folder(name, kind="language model", cache_dir=cache_dir)
    config = models.load(AutoConfig, folder, name=name)
    check_trained_to_generate(config, name=name)
    tokenizer = models.load_tokenizer(folder, name=name)
    model, new = models.load_model(
        AutoModelForCausalLM, folder, name=name, config=config, dtype=DTYPES[runtime.precision]
    )
    if new:
        raise UserError(
            f"--model {name}: it was never trained to generate (no weights for {', '.join(new[:3])}); name a "
            "causal language model"
        )
    if model.config.is_encoder_decoder or not model.can_generate():
        raise UserError(
            f"--model {name}: {type(model).__name__} does not continue texts; name a causal language model"
        )
    end_ids = find_end_ids(model, tokenizer)
    pad_ids = (model.generation_config.pad_token_id, tokenizer.pad_token_id, *end_ids, 0)
    # LLaMA's first models say -1 for none
    pad_id = next(number for number in pad_ids if number not in (None, -1))
    check_ids((*end_ids, pad_id), model, name=name)
    model.eval().to(runtime.device)
    models.try_out(model, tokenizer, name=name)
    return LanguageModel(name, model, tokenizer, end_ids, pad_id, models.max_positions(model))


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
    ids = language_model.tokenizer(text)["input_ids"] if text.strip() else []
    if not ids:
        raise UserError(f"{name}: the prompt is empty; write something to continue from")
    return ids


def check_length(ids: list[int], new_tokens: int, language_model: LanguageModel, *, name: str) -> None:
    """Raise UserError unless a prompt and `new_tokens` more tokens fit into the model's context."""
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
