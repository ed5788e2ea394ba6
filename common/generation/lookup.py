"""Prompt-lookup decoding: guess the next tokens from the text so far, check all guesses in one pass,
and keep those that greedy decoding would choose.

Texts repeat themselves: names, quotations, code. Where the last tokens occurred before, what
followed them is a good guess, and a pass over several tokens takes hardly longer than a pass over
one (Leviathan et al. 2023; Saxena 2023). Every token is still the model's most likely one, so the
text is that of greedy decoding. In 16-bit precision, a pass over several tokens rounds differently
from a pass over one, and two nearly equal logits can swap places: `--check` shows it.

Where arithmetic is the limit, a wrong guess costs half a pass. So the first guess is one token;
after guesses that were all right, twice as many are made, else as many as were right, or one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from common.errors import UserError
from common.generation import sampling
from common.generation.decoding import Batch, Step, fetch_ids, is_croppable, prefill
from common.generation.language_model import LanguageModel
from common.generation.sampling import Settings


class TokenHistory:
    """All tokens so far, and where each short run of tokens was last followed by another one."""

    LONGEST, SHORTEST = 4, 2  # lengths of the runs: a single token predicts the next one badly

    def __init__(self, tokens: list[int]) -> None:
        self.tokens: list[int] = []
        # run -> the index after its latest occurrence, except for the one at the very end
        self.next_index: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Add the next token."""
        for size in range(self.SHORTEST, self.LONGEST + 1):
            if len(self.tokens) >= size:
                self.next_index[tuple(self.tokens[-size:])] = len(self.tokens)
        self.tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """Return up to `count` tokens that followed the last tokens when they occurred before.

        The longest run that occurred before counts; [] if none did.
        """
        for size in range(self.LONGEST, self.SHORTEST - 1, -1):
            index = self.next_index.get(tuple(self.tokens[-size:]))
            if index is not None and len(self.tokens) >= size:
                return self.tokens[index : index + count]
        return []


class PromptLookup:
    """Decodes one text by prompt lookup, and counts its guesses."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead  # the maximum number of tokens to guess at once
        self.num_next = 1  # how many are guessed next
        self.num_guessed = 0
        self.num_accepted = 0

    @torch.inference_mode()
    def decode(self, language_model: LanguageModel, batch: Batch, settings: Settings) -> Iterator[Step]:
        """Yield one Step per token, like `generate.decode` with greedy sampling, for one row."""
        sampler = sampling.make_sampler(settings, prompt_length=batch.length, starts=batch.starts, seed=0)
        history = TokenHistory(batch.tokens[0].tolist())
        # a sliding window must not forget what a wrong guess has pushed out
        batch.cache.activate_past_recording()
        remaining = settings.max_new_tokens
        logits, guess = prefill(language_model, batch), []  # (1 + guessed, V)
        if not is_croppable(batch.cache):
            problem = f"{language_model.name} keeps a state that can't take back a wrong guess"
            raise UserError(f"--lookup {self.ahead}: {problem}; leave it out")
        while True:
            known = batch.length - len(guess)  # columns that hold final tokens
            accepted = 0
            for index in range(len(guess) + 1):
                row = logits[index : index + 1]  # (1, V)
                chosen = sampler(row, batch.ids[:, : known + index])
                [token] = fetch_ids(chosen, row, language_model)
                history.add(token)
                remaining -= 1
                yield Step([token], row)
                batch.ended[0] |= token in settings.end_ids
                is_accepted = index < len(guess) and token == guess[index]
                accepted += is_accepted
                if batch.ended[0] or remaining == 0 or not is_accepted:
                    break
            self.num_guessed += len(guess)
            self.num_accepted += accepted
            if batch.ended[0] or remaining == 0:
                return
            wrong = len(guess) - accepted
            if guess:
                self.num_next = max(accepted, 1) if wrong else min(2 * accepted, self.ahead)
            batch.cache.crop(-wrong)
            batch.length -= wrong
            guess = history.guess(min(self.num_next, remaining - 1))
            logits = check_guess(language_model, batch, [token, *guess])


def check_guess(language_model: LanguageModel, batch: Batch, tokens: list[int]) -> Tensor:
    """Add a token and the guesses that follow it to the only row of a batch.

    Return the logits (1 + guessed, V) that follow each of them, fp32.
    """
    first = batch.length
    batch.ids[0, first : first + len(tokens)] = torch.tensor(tokens, device=batch.ids.device)
    batch.length += len(tokens)
    return language_model.model.forward(batch, first=first, keep=len(tokens))[0].float()
