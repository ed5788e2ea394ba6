"""Where a command of embed_search.py prints: tables for a person on stdout, or one JSON document on
stdout and the rest on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common import cli, terminal


class Screen:
    """Where the output of a command goes: the main process alone shows something."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json, self.shown = as_json, cli.is_rank_0()

    def say(self, line: str = "") -> None:
        """Print a line for a person."""
        if self.shown:
            stream = sys.stderr if self.as_json else sys.stdout
            print(terminal.prose(line, stream), file=stream, flush=True)

    def table(
        self,
        rows: Sequence[Sequence[object]],
        headers: Sequence[str],
        *,
        title: str = "",
        texts: Sequence[int] = (),
        folded: Sequence[int] = (),
    ) -> None:
        """Print a table for a person; floats have three decimals. `texts` and `folded` are the columns
        that fit it to a terminal, as in `terminal.table`.
        """
        if not self.shown or self.as_json:
            return
        print(terminal.prose(f"\n{title}" if title else ""))
        if not rows:
            print("(none)", flush=True)
            return
        is_number = [isinstance(value, int | float) for value in rows[0]]
        aligned = ["right" if number else "left" for number in is_number]
        words = [column for column, number in enumerate(is_number) if not number]
        # a text that looks like a number, such as an id 1.10 or 2e3, stays as it is
        options = {"floatfmt": ".3f", "colalign": aligned, "disable_numparse": words}
        print(terminal.table(rows, headers, texts=texts, folded=folded, **options), flush=True)

    def document(self, content: dict) -> None:
        """Print the JSON document, if one is wanted."""
        if self.shown and self.as_json:
            print(cli.json_line(content))
