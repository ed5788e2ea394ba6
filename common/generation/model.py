"""A causal language model with its tokenizer, and what decoding must know of the two: end ids,
padding id, context.
"""

from dataclasses import dataclass

import jinja2
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from common import models
from common.errors import UserError, one_line
from common.runtime import DTYPES, Runtime


@dataclass(frozen=True)
class LanguageModel:
    """A model, its tokenizer, and how a text ends with them."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]  # each of them ends a text; () where nothing does
    pad_id: int
    context: int | None  # the most tokens that fit, None if nothing limits it

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.device


def load(name: str, runtime: Runtime, *, cache_dir: str | None) -> LanguageModel:
    """Return a causal language model in the machine's precision on its device. Raises UserError
    when it can't be loaded, or is none.
    """
    folder = models.find_folder(name, kind="language model", cache_dir=cache_dir)
    tokenizer = models.load_tokenizer(folder, name=name)
    model, report = models.load(
        AutoModelForCausalLM,
        folder,
        name=name,
        dtype=DTYPES[runtime.precision],
        use_safetensors=True,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise UserError(
            f"--model {name}: it was never trained to generate (no weights for"
            f" {', '.join(sorted(report['missing_keys'])[:3])}); name a causal language model"
        )
    if model.config.is_encoder_decoder or not model.can_generate():
        raise UserError(
            f"--model {name}: {type(model).__name__} does not continue texts; name a causal language model"
        )
    end_ids = end_ids_of(model, tokenizer)
    own = model.generation_config.pad_token_id
    pad_id = next(number for number in (own, tokenizer.pad_token_id, *end_ids, 0) if number is not None)
    model.eval().to(runtime.device)
    return LanguageModel(name, model, tokenizer, end_ids, pad_id, models.max_positions(model))


def end_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end a text: the model's, which can be a list (transformers #31362), else
    the tokenizer's, else none.
    """
    found = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def end_token_ids(tokens: list[str], language_model: LanguageModel) -> tuple[int, ...]:
    """Return the ids of tokens that shall end a text too. Raises UserError for one that is not a
    single token.
    """
    vocabulary = language_model.tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise UserError(
                f"--end-token {token!r}: no token of {language_model.name}; use --stop for other strings"
            )
    return tuple(vocabulary[token] for token in tokens)


def check_stops(stops: list[str], language_model: LanguageModel):
    """Raise UserError for a stop string with a special token in it: such a token is no part of the
    text that is searched.
    """
    tokenizer = language_model.tokenizer
    special = (
        {
            *tokenizer.all_special_tokens,
            *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special),
        }
        if stops
        else set()
    )
    for stop in stops:
        found = next((token for token in special if token in stop), None)
        if found:
            raise UserError(
                f"--stop {stop!r}: {found} is a special token, and no text shows it; use --end-token"
                f" {found!r}"
            )


def encode_prompt(text: str, language_model: LanguageModel, *, place: str) -> list[int]:
    """Return the token ids of a raw prompt, with the special tokens that its tokenizer adds.
    Raises UserError for an empty one.
    """
    ids = language_model.tokenizer(text)["input_ids"] if text.strip() else []
    if not ids:
        raise UserError(f"{place}: the prompt is empty; write something to go on from")
    return ids


def encode_chat(messages: list[dict[str, str]], language_model: LanguageModel) -> list[int]:
    """Return the token ids of a conversation in the model's own template, up to where its answer
    starts.

    The template writes all special tokens itself: adding the tokenizer's own would begin the text
    twice. Raises UserError where there is no template, or it refuses the messages.
    """
    tokenizer = language_model.tokenizer
    if not tokenizer.chat_template:
        raise UserError(
            f"--chat: {language_model.name} has no chat template; leave --chat out, or name a model that was"
            " trained for chats"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise UserError(
            f"--chat: the template of {language_model.name} refuses this: {one_line(error)}; leave"
            " --system out"
        ) from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_length(ids: list[int], new_tokens: int, language_model: LanguageModel, *, place: str):
    """Raise UserError unless a prompt and the tokens to come fit into the model's context."""
    context = language_model.context
    if context is None or len(ids) + new_tokens <= context:
        return
    if len(ids) >= context:
        raise UserError(
            f"{place}: the prompt has {len(ids):,} tokens and {language_model.name} holds {context:,};"
            " shorten it"
        )
    raise UserError(
        f"--max-new-tokens {new_tokens}: {place} has {len(ids):,} tokens and {language_model.name} holds"
        f" {context:,}; use at most {context - len(ids):,}"
    )
