"""The proof that a user can run: the same prompts through `model.generate`, compared token by
token.
"""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from common.generation import decoding
from common.generation.completion import Completion, Options, Prompt
from common.generation.language_model import LanguageModel

SHOWN_TOKENS = 12  # of each continuation, from the first difference on


@dataclass(frozen=True)
class Difference:
    """Where a row's tokens first differ from `generate`'s; a token is None where its text had
    ended.
    """

    row: Completion
    place: int
    ours: int | None
    theirs: int | None
    their_ids: list[int]


def generation_config(options: Options, language_model: LanguageModel) -> GenerationConfig:
    """Return `generate`'s own words for our options."""
    settings = options.settings
    sampling = (
        {
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "min_p": settings.min_p,
            "typical_p": settings.typical_p,
        }
        if settings.sample
        else {}
    )
    return GenerationConfig(
        do_sample=settings.sample,
        num_beams=1,
        num_return_sequences=options.num_samples,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        eos_token_id=list(settings.end_ids) or None,
        pad_token_id=language_model.pad_id,
        stop_strings=list(options.stops) or None,
        **sampling,
    )


@torch.inference_mode()
def generate(
    language_model: LanguageModel, prompts: list[Prompt], options: Options, *, seed: int
) -> list[list[int]]:
    """Return the new tokens of `model.generate` for a batch, (prompts x samples) rows with the
    padding that it puts after ended rows.

    What a call leaves open, it takes from the model's own generation config: for this call that
    one is empty, so that the flags alone decide.
    """
    batch = decoding.left_pad([prompt.ids for prompt in prompts], language_model, room=0)
    mask = torch.ones_like(batch.ids) if batch.mask is None else batch.mask
    torch.manual_seed(seed)
    model, own = language_model.model, language_model.model.generation_config
    try:
        model.generation_config = GenerationConfig()
        found = model.generate(
            batch.ids,
            attention_mask=mask,
            generation_config=generation_config(options, language_model),
            tokenizer=language_model.tokenizer,
        )
    finally:
        model.generation_config = own
    return found[:, batch.length :].tolist()


def first_difference(row: Completion, theirs: list[int], *, pad_id: int | None) -> Difference | None:
    """Return where a row first differs from `generate`'s tokens, None where all are equal.

    What follows an ended row must be `pad_id`; None: `generate` pads nothing, because no token
    ends a text.
    """
    ours = row.token_ids
    for place, pair in enumerate(zip(ours, theirs)):
        if pair[0] != pair[1]:
            return Difference(row, place, *pair, theirs)
    if len(ours) > len(theirs):
        return Difference(row, len(theirs), ours[len(theirs)], None, theirs)
    beyond = next((place for place in range(len(ours), len(theirs)) if theirs[place] != pad_id), None)
    return None if beyond is None or pad_id is None else Difference(row, beyond, None, theirs[beyond], theirs)


@torch.inference_mode()
def explain(difference: Difference, language_model: LanguageModel) -> str:
    """Return the first difference in words: both tokens with their logits after the tokens that
    both have, and both continuations.
    """
    row, place = difference.row, difference.place
    batch = decoding.left_pad([row.prompt.ids + row.token_ids[:place]], language_model, room=0)
    logits = decoding.prefill(language_model, batch)[0]
    lines = [
        f"different: prompt {row.prompt.number + 1}, sample {row.sample + 1}, token {place + 1}; the {place}"
        " before it are equal"
    ]
    for name, token, ids in (
        ("ours", difference.ours, row.token_ids),
        ("generate", difference.theirs, difference.their_ids),
    ):
        if token is None:
            lines.append(f"{name:<9} has ended here")
        else:
            text = language_model.tokenizer.decode(ids[place : place + SHOWN_TOKENS])
            lines.append(
                f"{name:<9} {language_model.tokenizer.decode([token])!r} (id {token}), logit"
                f" {logits[token].item():.6f}, goes on: {text!r}"
            )
    return "\n".join(lines)
