"""What fits a terminal: its width, tables, lines of prose, the beginning of a long text.

A file and a pipe have no width: there tables and lines are as long as they are.
"""

import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from common.errors import shorten

CHARACTERS = 1_000  # of a text, looked at to cut it
LEAST_TEXT = 20  # columns that a table leaves a text
GAP = 2  # columns between two columns of a table
NUMBER, INTERVAL = re.compile(r"[+-]?\d[\d.,]*"), re.compile(r"\[[+-]?\d")
HELD = "\ue000"  # a space at which no line breaks; a character of private use, as wide as a space
LABEL = re.compile(r"\S*\s{2,}")  # before what a line says, as in "data     4 texts"


def width(stream: TextIO | None = None) -> int | None:
    """Return how many columns the terminal behind a stream, by default stdout, has now; None for a
    file, a pipe, and a terminal that does not say.
    """
    stream = sys.stdout if stream is None else stream
    return (os.get_terminal_size(stream.fileno()).columns or None) if stream.isatty() else None


def room(columns: int) -> int:
    """Return how much of a text a table gets: in a file `columns` columns; on a terminal the whole width, of
    which `table` gives it what is left.
    """
    return width() or columns


def cut(text: str, columns: int, end: int | None = None) -> str:
    """Return a text as one line of at most `columns` columns of a terminal, in which a character of Chinese
    takes two and an accent none. A longer one ends with "...", after the characters that fit, or after `end`
    columns.
    """
    import wcwidth

    line = shorten(text, CHARACTERS)  # what no screen shows need not be measured
    if wcwidth.width(line) <= columns:
        return line
    left, kept = columns - 3 if end is None else end, []
    for character in wcwidth.iter_graphemes(line):
        left -= wcwidth.width(character)
        if left < 0:
            break
        kept.append(character)
    return "".join(kept) + "..."


def prose(text: str, stream: TextIO | None = None) -> str:
    """Return a text whose lines break at words where the terminal is narrower; what stands under a
    label such as "data     " stays under it.
    """
    columns = width(stream)
    return text if columns is None else "\n".join(_wrapped(line, columns) for line in text.split("\n"))


def say(text: str) -> None:
    """Print lines that fit the terminal."""
    print(prose(text), flush=True)


def _wrapped(line: str, columns: int) -> str:
    import wcwidth

    if wcwidth.width(line) <= columns:
        return line
    match = LABEL.match(line)
    label = match[0] if match and len(match[0]) < columns // 2 else ""
    held = _held(line.removeprefix(label), columns - len(label))
    # a path stays whole, but Chinese has no spaces
    is_wide = wcwidth.width(line) > len(line)
    whole_words = {"break_long_words": is_wide, "break_on_hyphens": False}
    indents = {"initial_indent": label, "subsequent_indent": " " * len(label)}
    return "\n".join(wcwidth.wrap(held, columns, **indents, **whole_words)).replace(HELD, " ")


def _held(line: str, columns: int = 0) -> str:
    """Return a line in which a number is held to the word before it and to a "%" behind it, an interval
    together, as in "accuracy 0.9167 [0.7500, 1.0000]", and a word to the one with a colon before it, if both
    fit into `columns` columns.
    """
    first, *others = line.split(" ")
    parts, before = [first], first
    for word in others:
        is_named = NUMBER.match(word) and not NUMBER.fullmatch(before) and not before.endswith((",", ";"))
        is_interval = INTERVAL.match(word) or (INTERVAL.match(before) and before.endswith(","))
        is_announced = before.endswith(":") and len(before) + 1 + len(word) <= columns
        is_held = before and (is_named or is_interval or is_announced or word.startswith("%"))
        parts += [HELD if is_held else " ", word]
        before = word
    return "".join(parts)


# Tables -------------------------------------------------------------------------------------------


def table(
    rows: Iterable[Sequence[object]],
    headers: Sequence[str],
    *,
    texts: Sequence[int] = (),
    folded: Sequence[int] = (),
    keys: int = 1,
    style: str = "simple",
    **options: Any,
) -> str:
    """Return a table; `options` are those of tabulate. On a terminal it fits the width: columns with
    the numbers `texts` are cut and those with the numbers `folded` break into lines, down to
    LEAST_TEXT, and headers break at their spaces. What still finds no room stands below, each part
    with the first `keys` columns, of which a long name, such as a path, breaks into lines. Numbers
    and ids are never cut.
    """
    from tabulate import tabulate

    rows, columns = [list(row) for row in rows], width()
    whole = tabulate(rows, headers, tablefmt=style, **options)
    if columns is None or style == "github" or _longest(whole) <= columns:
        return whole
    cells = _widths(rows, [""] * len(headers), options)
    headers = [_broken(header, wide) for header, wide in zip(headers, cells)]
    natural = _widths(rows, headers, options)
    least = list(natural)
    for one in (*texts, *folded):
        least[one] = min(natural[one], LEAST_TEXT)
    for one in folded:
        least[one] = max(least[one], _longest_word(str(row[one]) for row in rows))
    most = max(columns // 3, LEAST_TEXT)
    names = [one for one in range(keys) if one not in (*texts, *folded) and natural[one] > most]
    for one in names:
        least[one] = most
    fitting = {**dict.fromkeys(texts, cut), **dict.fromkeys(folded, _wrapped), **dict.fromkeys(names, _split)}
    parts = []
    for part in _parts(least, keys, columns):
        widths = {one: natural[one] for one in part}
        for group in (folded, texts, names):  # what is folded loses nothing
            _narrow(widths, [one for one in part if one in group], least, columns)
        fits = {one: fitting[one] for one in part if widths[one] < natural[one]}
        shown = [[_fitted(row[one], widths[one], fits.get(one)) for one in part] for row in rows]
        own = [headers[one] for one in part]
        parts.append(tabulate(shown, own, tablefmt=style, **_options_of(part, options)))
    return "\n\n".join(parts)


def _longest(text: str) -> int:
    import wcwidth

    return max(wcwidth.width(line) for line in text.split("\n"))


def _broken(header: str, wide: int) -> str:
    """Return a header as lines that are no wider than the cells below it, if its words allow that."""
    lines = textwrap.wrap(_held(header), wide, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace(HELD, " ")


def _widths(rows: list[list], headers: Sequence[str], options: dict[str, Any]) -> list[int]:
    """Return the width of each column: that of its line under the headers."""
    from tabulate import tabulate

    lines = tabulate(rows, headers, tablefmt="simple", **options).split("\n")
    rule = next(line for line in lines if re.fullmatch("[- ]*-", line))
    return [len(dashes) for dashes in rule.split()]


def _split(name: str, columns: int) -> str:
    """Return a name as lines, between any two characters if need be."""
    import wcwidth

    return "\n".join(wcwidth.wrap(name, columns, break_on_hyphens=False))


def _longest_word(cells: Iterable[str]) -> int:
    import wcwidth

    lines = [line for cell in cells for line in cell.split("\n")]
    whole = [line for line in lines if wcwidth.width(line) == len(line)]  # the others break anywhere
    return max((len(word) for line in whole for word in _held(line).split(" ")), default=0)


def _parts(least: list[int], keys: int, columns: int) -> list[list[int]]:
    """Return the columns of each part of a table, given how narrow each can be: the first `keys`
    columns, and as many others as there is room for, one at least.
    """
    parts = [list(range(keys))]
    for one in range(keys, len(least)):
        if _total(least[other] for other in [*parts[-1], one]) > columns and len(parts[-1]) > keys:
            parts.append(list(range(keys)))
        parts[-1].append(one)
    return parts


def _total(widths: Iterable[int]) -> int:
    return sum(wide + GAP for wide in widths) - GAP


def _narrow(widths: dict[int, int], group: list[int], least: list[int], columns: int) -> None:
    """Take from the widths of a group of columns what is too much, from the widest first."""
    while _total(widths.values()) > columns:
        group = [one for one in group if widths[one] > least[one]]
        if not group:
            break
        widths[max(group, key=lambda one: widths[one])] -= 1


def _fitted(cell: object, columns: int, fit: Callable[[str, int], str] | None) -> object:
    return cell if fit is None else "\n".join(fit(line, columns) for line in str(cell).split("\n"))


def _options_of(part: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """Return tabulate's options for some of the columns."""
    chosen = dict(options)
    for name in ("floatfmt", "colalign"):  # one for each column, from the first on
        if isinstance(value := options.get(name), list | tuple):
            chosen[name] = [value[one] for one in part if one < len(value)]
    if isinstance(numbers := options.get("disable_numparse"), list):
        chosen["disable_numparse"] = [place for place, one in enumerate(part) if one in numbers]
    return chosen
