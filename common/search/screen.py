"""What embed_search.py shows: tables for a person on stdout, or one JSON document there and the
rest on stderr.
"""

import json
import sys
import textwrap

from tabulate import tabulate

HIGH, MODERATE = 0.7, 0.4  # the tutorial's thresholds of similarity
TEXT_WIDTH = 76


class Screen:
    """Where a command's words go."""

    def __init__(self, *, as_json: bool, shown: bool = True):
        self.as_json, self.shown = as_json, shown

    def say(self, line: str = ""):
        """Print a line for a person."""
        if self.shown:
            print(line, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def table(self, rows: list, headers: list[str], *, title: str = ""):
        """Print a table for a person; floats have three decimals."""
        if self.shown and not self.as_json:
            aligned = [
                "right" if rows and isinstance(value, int | float) else "left"
                for value in (rows[0] if rows else headers)
            ]
            print(f"\n{title}" if title else "")
            print(
                (
                    tabulate(
                        rows,
                        headers,
                        floatfmt=".3f",
                        colalign=aligned if rows else None,
                        disable_numparse=not rows,
                    )
                    if rows
                    else "(none)"
                ),
                flush=True,
            )

    def document(self, content: dict):
        """Print the JSON document, if one is wanted."""
        if self.shown and self.as_json:
            print(json.dumps(content, ensure_ascii=False, default=str))


def short(text: str, width: int = TEXT_WIDTH) -> str:
    """Return a text in one line of at most `width` characters."""
    return textwrap.shorten(text, width, placeholder="...") or text.strip()[:width]


def level(similarity: float) -> str:
    """Return how similar two texts are in a word: above 0.7 high, above or at 0.4 moderate, below
    low.
    """
    return "high" if similarity > HIGH else "moderate" if similarity >= MODERATE else "low"
