"""Constraints on texts (guided decoding): one of several choices, or what a regular expression or a
schema of JSON describes.

At each step, a constraint tells which tokens may follow the new tokens of a text; all others are removed
before the draw (`keep_allowed` in sampling.py). Where a text can't go on, only end tokens are allowed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, one_line
from common.generation.language_model import LanguageModel, token_ids

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

END = -1  # in a trie: a choice is complete here
# in JSON, wherever it may be: without a limit, some models write nothing else
WHITESPACE = r"[ \n]{1,16}"
Trie = dict[int, Any]  # token -> the trie of what may follow it


@dataclass(frozen=True)
class Choices:
    """A text is exactly one of several choices."""

    trie: Trie  # over the tokens of the choices
    end_ids: tuple[int, ...]
    vocabulary: int
    name: str = "choices"

    def start(self) -> Callable[[list[int]], Tensor]:
        """Return a function for one text: its new tokens -> a mask (V) of the tokens that may follow."""
        return self.allowed

    def allowed(self, new_tokens: list[int]) -> Tensor:
        """Return which tokens (V) may follow: all those that lead to a choice."""
        place = self.trie
        for token in new_tokens:
            if token in self.end_ids:  # padding may follow
                return torch.ones(self.vocabulary, dtype=torch.bool)
            place = place[token]
        ids = [token for token in place if token != END]
        ids += self.end_ids if END in place else ()
        return torch.zeros(self.vocabulary, dtype=torch.bool).index_fill(0, torch.tensor(ids), True)


def check_end(end_ids: tuple[int, ...], language_model: LanguageModel, *, flag: str) -> None:
    """Raise UserError for a model without a token that could end a text."""
    if not end_ids:
        problem = f"no token of {language_model.name} ends a text"
        raise UserError(f"{flag}: {problem}; name one with --end-token")


def _decode(ids: list[int], language_model: LanguageModel) -> str:
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return str(language_model.tokenizer.decode(ids, **options))


@dataclass(frozen=True)
class Grammar:
    """A text follows a grammar of llguidance, such as a regular expression, from its beginning to
    its end.

    llguidance turns the grammar into an automaton over bytes, and walks it with the bytes of each
    token of the vocabulary.
    """

    name: str
    make_matcher: Callable[[], LLMatcher]
    end_ids: tuple[int, ...]
    vocabulary: int
    shown: str  # how messages name it

    def start(self) -> Callable[[list[int]], Tensor]:
        """Return a function for one text: its new tokens -> a mask (V) of the tokens that may follow. It
        raises UserError where finding out exceeds a limit of llguidance.
        """
        matcher, known = self.make_matcher(), []

        def allowed(new_tokens: list[int]) -> Tensor:
            if not set(self.end_ids).isdisjoint(new_tokens):  # padding may follow
                return torch.ones(self.vocabulary, dtype=torch.bool)
            if new_tokens[: len(known)] != known:  # the text goes another way: a wrong guess
                matcher.reset()
                known.clear()
            following = new_tokens[len(known) :]
            known.extend(following)
            matcher.consume_tokens(following)
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)  # eight tokens in each
            if matcher.is_error():  # finding out exceeded one of its limits
                raise UserError(f"{self.shown}: {_reason(matcher)}; ask for something simpler")
            allowed = np.unpackbits(bits, bitorder="little")[: self.vocabulary]
            return torch.from_numpy(allowed).bool()

        return allowed


class Constraints:
    """Makes the constraints of a model's texts. What grammars need to know of its vocabulary is made only
    once, because that takes half a second.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self.language_model = language_model
        self.tokenizers: dict[tuple[int, ...], LLTokenizer] = {}  # by the end tokens

    def choices(self, texts: list[str], end_ids: tuple[int, ...]) -> Choices:
        """Return the constraint of --choices. Raises UserError for a text that no tokens spell, and
        for a model without an end token.
        """
        model = self.language_model
        check_end(end_ids, model, flag="--choices")
        trie: Trie = {}
        before = token_ids("\n", model)
        for text in texts:
            ids = token_ids(text, model)
            place = trie
            for token in ids:
                place = place.setdefault(token, {})
            place[END] = {}
            both, prompt = (_decode(own, model) for own in ([*before, *ids], before))
            spelled = both.removeprefix(prompt)
            if spelled != text:
                problem = f"the tokens of {model.name} spell it {spelled!r}"
                raise UserError(f"--choices {text!r}: {problem}; write it so")
        return Choices(trie, end_ids, model.vocabulary)

    def regex(self, pattern: str, end_ids: tuple[int, ...]) -> Grammar:
        """Return the constraint of an expression, which the whole text matches. Raises UserError
        for one that llguidance refuses, and as `make_tokenizer`.
        """
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_regex(pattern)
        shown, advice = f"--regex {pattern!r}", "write another expression"
        return self._grammar("regex", grammar, end_ids, shown, advice)

    def json(self, schema: Mapping[str, Any], end_ids: tuple[int, ...]) -> Grammar:
        """Return the constraint of a text that is JSON of a schema. Raises UserError for a schema with
        keywords that llguidance does not know and would have to ignore, and as `make_tokenizer`.
        """
        from llguidance import LLMatcher

        options = {"whitespace_pattern": WHITESPACE}
        grammar = LLMatcher.grammar_from_json_schema(dict(schema), options)
        return self._grammar("json", grammar, end_ids, "schema", "leave that out")

    def _grammar(self, name: str, grammar: str, end_ids: tuple[int, ...], shown: str, advice: str) -> Grammar:
        from llguidance import LLMatcher

        tokenizers = self.tokenizers
        if end_ids not in tokenizers:
            flag = shown.split()[0]
            tokenizers[end_ids] = make_tokenizer(self.language_model, end_ids, flag=flag)
        make_matcher = functools.partial(LLMatcher, tokenizers[end_ids], grammar, log_level=0)
        matcher = make_matcher()
        has_a_text = any(matcher.compute_bitmask())
        reason = _reason(matcher) if matcher.is_error() else ""
        if reason.startswith("NoExtension") or not (has_a_text or reason):
            raise UserError(f"{shown}: no text has this form; correct it")
        if reason:
            raise UserError(f"{shown}: {reason}; {advice}")
        return Grammar(name, make_matcher, end_ids, self.language_model.vocabulary, shown)


def _reason(matcher: LLMatcher) -> str:
    """Return why llguidance has stopped, without the state that it prints."""
    return one_line(ValueError(re.split(r"\n\n|\n<state>", matcher.get_error())[0]))


def make_tokenizer(language_model: LanguageModel, end_ids: tuple[int, ...], *, flag: str) -> LLTokenizer:
    """Return what llguidance needs to know of a vocabulary. Raises UserError for a model without an
    end token, or without a tokenizer of the `tokenizers` library.
    """
    from llguidance import LLTokenizer

    check_end(end_ids, language_model, flag=flag)
    backend = getattr(language_model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        name = language_model.name
        raise UserError(f"{flag}: {name} has no tokenizer of the tokenizers library; leave it out")
    size = max(language_model.vocabulary, backend.get_vocab_size())
    return LLTokenizer(backend.to_str(), n_vocab=size, eos_token=list(end_ids))
