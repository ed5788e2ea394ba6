"""Prompt-lookup decoding: guess the next tokens from what was written before, check all guesses in
one pass, keep those that greedy would choose.

Texts repeat themselves: names, quotations, code. Where the last tokens occurred before, what
followed them is a good guess, and a pass over several tokens takes hardly longer than over one
(Leviathan et al. 2023; Saxena 2023). Every token is still the model's own likeliest, so the text
is greedy's. In 16-bit precision a pass over several tokens rounds in another way than one over a
single token, and two nearly equal logits can swap places: `--check` tells.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.generation import decoding, sampling
from common.generation.language_model import LanguageModel
from common.generation.sampling import Settings

LONGEST, SHORTEST = 4, 2  # how many last tokens must have occurred before: one alone guesses badly


@dataclass
class Guesses:
    """How many tokens were guessed, and how many of them were right."""

    offered: int = 0
    right: int = 0


class History:
    """All tokens so far, and where each short run of them was last followed by another token."""

    def __init__(self, tokens: list[int]):
        self.tokens: list[int] = []
        # run -> the place after its latest occurrence, but for the one at the very end
        self.follows: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int):
        """Take the next token."""
        for size in range(SHORTEST, LONGEST + 1):
            if len(self.tokens) >= size:
                self.follows[tuple(self.tokens[-size:])] = len(self.tokens)
        self.tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """Return up to `count` tokens that followed the longest run of last tokens where it
        occurred before; [] where it did not.
        """
        for size in range(LONGEST, SHORTEST - 1, -1):
            place = self.follows.get(tuple(self.tokens[-size:]))
            if place is not None and len(self.tokens) >= size:
                return self.tokens[place : place + count]
        return []


@torch.inference_mode()
def decode(
    language_model: LanguageModel, batch: decoding.Batch, settings: Settings, *, ahead: int, guesses: Guesses
) -> Iterator[decoding.Step]:
    """Yield one Step a token, as decoding.decode does with a greedy sampler, for a batch of one
    row; `ahead`: the most tokens to guess at once.
    """
    filters = sampling.history_filters(
        settings, prompt_length=batch.length, starts=None, padding_is_text=True
    )
    history, ends, ended, made = History(batch.tokens[0].tolist()), set(settings.end_ids), [False], 0
    # a sliding window must not forget what a wrong guess pushed out
    batch.cache.activate_past_recording()
    logits, guess = decoding.prefill(language_model, batch), []  # (1 + guessed, V)
    while True:
        known = batch.length - len(guess)  # columns that are right for sure
        right = 0
        for place in range(len(guess) + 1):
            scores = logits[place : place + 1]
            [token] = decoding.fetch(
                decoding.apply(filters, scores, batch.ids[:, : known + place]).argmax(-1),
                scores,
                language_model,
            )
            history.add(token)
            made += 1
            right += place < len(guess) and token == guess[place]
            ended[0] = ended[0] or token in ends
            yield decoding.Step([token], [True], scores, ended)
            if ended[0] or made == settings.max_new_tokens or place == len(guess) or token != guess[place]:
                break
        guesses.offered += len(guess)
        guesses.right += right
        if ended[0] or made == settings.max_new_tokens:
            return
        wrong = len(guess) - right
        batch.cache.crop(-wrong)
        batch.length -= wrong
        guess = history.guess(min(ahead, settings.max_new_tokens - made - 1))
        logits = check(language_model, batch, token, guess)


def check(language_model: LanguageModel, batch: decoding.Batch, token: int, guess: list[int]) -> torch.Tensor:
    """Add a token and the guesses after it to the batch; return the logits (1 + guessed, V) that
    follow each of them, fp32.
    """
    first, count = batch.length, 1 + len(guess)
    batch.ids[0, first : first + count] = torch.tensor([token, *guess], device=batch.ids.device)
    batch.length += count
    return decoding.forward(language_model, batch, first=first, keep=count)[0].float()
