"""Tokens -> text as it arrives: whole characters only, nothing of a stop string, and all chunks
joined equal the text decoded at once.
"""

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what a decoder shows for bytes that are no whole character (yet)


class TextStream:
    """Turns one text's tokens into chunks that may be shown: `add` after each token, `finish` once
    at the end.

    A character can take several tokens, and a stop string can lie across tokens: both are held
    back until they are whole. The search for stop strings sees the new text only, never the prompt
    (transformers #31435).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        # ids[shown_from:read] are decoded again with what follows: some decoders treat the first
        # token of a
        # text in another way
        self.shown_from = 0
        self.read = 0  # ids[:read] are decoded
        self.held = ""  # decoded, not shown: it may be the beginning of a stop string
        self.text = ""  # all that was shown
        # a stop string was found; it and what follows it are no part of the text
        self.stopped = False

    def add(self, token: int) -> str:
        """Take one token; return what can be shown now, often "" ."""
        self.ids.append(token)
        return self._show(self._decode_new(whole=True))

    def finish(self) -> str:
        """Return what was held back: the text ends here, so that it can't become a stop string or
        a whole character any more.
        """
        shown = self._show(self._decode_new(whole=False))
        rest, self.held = self.held, ""
        self.text += rest
        return shown + rest

    def _decode_new(self, *, whole: bool) -> str:
        known, fresh = self._text(self.shown_from, self.read), self._text(self.shown_from, len(self.ids))
        if len(fresh) <= len(known) or (whole and fresh.endswith(INCOMPLETE)):
            return ""
        self.shown_from, self.read = self.read, len(self.ids)
        return fresh[len(known) :]

    def _text(self, start: int, end: int) -> str:
        return self.tokenizer.decode(
            self.ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _show(self, fresh: str) -> str:
        if self.stopped:
            return ""
        self.held += fresh
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self.held = self.held[: min(found)], ""
        else:
            split = len(self.held) - self._possible_stop()
            shown, self.held = self.held[:split], self.held[split:]
        self.text += shown
        return shown

    def _possible_stop(self) -> int:
        """Return how many characters at the end of `held` could begin a stop string."""
        lengths = (
            length
            for stop in self.stops
            for length in range(min(len(stop) - 1, len(self.held)), 0, -1)
            if self.held.endswith(stop[:length])
        )
        return max(lengths, default=0)
