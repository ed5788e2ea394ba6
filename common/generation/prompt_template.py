"""A template of prompts, such as "Summarise: {review}": a text with the names of columns in it.

Between braces stands a name and nothing else: str.format would follow its dots and brackets into
Python's objects. What the cells hold is data, in which no brace means anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import UserError

FLAG = "--prompt-template"
BRACES = re.compile(r"\{\{|\}\}|\{(?P<column>[^{}]+)\}|[{}]")


@dataclass(frozen=True)
class PromptTemplate:
    """A template in its pieces, texts and names of columns in turn; a text comes first and last."""

    pieces: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """The columns that it names, each once."""
        return list(dict.fromkeys(self.pieces[1::2]))

    def fill(self, cells: Mapping[str, str]) -> str:
        """Return the prompt of a row."""
        return "".join(cells[piece] if position % 2 else piece for position, piece in enumerate(self.pieces))


def parse(text: str) -> PromptTemplate:
    """Return a template from its text, in which {{ and }} are braces.

    Raises UserError for a brace without its partner or without a name, and for a text that names no
    column.
    """
    pieces, end = [""], 0
    for match in BRACES.finditer(text):
        pieces[-1] += text[end : match.start()]
        end = match.end()
        if match["column"] is not None:
            pieces += [match["column"], ""]
        elif len(match[0]) == 2:
            pieces[-1] += match[0][0]
        else:
            place = f"{FLAG}, character {match.start() + 1}"
            problem = f"{match[0]!r} encloses no name of a column"
            raise UserError(f"{place}: {problem}; write {2 * match[0]} for a brace of the text")
    pieces[-1] += text[end:]
    if len(pieces) == 1:
        raise UserError(f"{FLAG} {text!r:.60}: it names no column; write one in braces, such as {{text}}")
    return PromptTemplate(tuple(pieces))
