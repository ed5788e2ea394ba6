"""A conversation that keeps its cache: each turn reads only what is new, however long the
talk is.
"""

from collections.abc import Callable

from common.errors import UserError
from common.generation import decoding, fast_sampling
from common.generation.completion import Completion, Generator, Prompt, Timing
from common.generation.language_model import check_length, encode_chat


class Chat:
    """A conversation and what the model's cache holds of it."""

    def __init__(self, generator: Generator, system: str | None):
        self.generator, self.language_model, self.options, self.system = (
            generator,
            generator.language_model,
            generator.options,
            system,
        )
        self.reset()

    def check(self):
        """Raise UserError at once where the model can't chat."""
        encode_chat([*self.messages, {"role": "user", "content": "?"}], self.language_model)

    def reset(self):
        """Begin a new conversation."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.cached: list[int] = []  # the tokens whose keys and values are in the cache
        self.cache = decoding.new_cache(self.language_model)
        self.turns = 0

    def reply(self, text: str, show: Callable[[str], None]) -> Completion:
        """Return the model's answer to the user's next words. Raises UserError, and forgets them,
        when the conversation is beyond the context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = encode_chat(messages, self.language_model)
        try:
            check_length(
                ids, self.options.settings.max_new_tokens, self.language_model, place="the conversation"
            )
        except UserError as error:
            raise UserError(f"{error}; /reset begins a new one") from error
        batch = self.batch(ids)
        self.generator.timing = Timing()  # of this turn
        row = Completion(Prompt(self.turns, text, ids), 0)
        try:
            self.generator.fill(
                [row], batch, seed=fast_sampling.batch_seed(self.options.seed, self.turns), show=show
            )
        # an interruption can come between two layers: what the cache holds is unknown then
        except BaseException:
            self.cached, self.cache = [], decoding.new_cache(self.language_model)
            raise
        self.cached, self.turns = batch.tokens[0].tolist()[: self.cache.get_seq_length()], self.turns + 1
        self.messages = [*messages, {"role": "assistant", "content": row.text}]
        return row

    def batch(self, ids: list[int]) -> decoding.Batch:
        """Return the conversation as a batch of one, with the cache of as many of its first tokens
        as are the same as before.
        """
        same = next(
            (place for place, pair in enumerate(zip(ids, self.cached)) if pair[0] != pair[1]),
            min(len(ids), len(self.cached)),
        )
        # one token at least must be read: the logits follow from it
        same = min(same, len(ids) - 1)
        if same < len(self.cached):
            # a window has forgotten what would be needed again
            if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
                same, self.cache = 0, decoding.new_cache(self.language_model)
            else:
                self.cache.crop(same - len(self.cached))
        self.cached = ids[:same]
        return decoding.left_pad(
            [ids], self.language_model, room=self.options.settings.max_new_tokens, cache=self.cache
        )
