"""The columns of a table: those that flags name, and those that stay beside what a script writes.

Importing it is quick: flags are checked before PyTorch is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Sequence

from common.errors import UserError, first_repeated, listed

# the column with the number of each row in its file, where those that can't be used are collected
ROW = "__row__"
EVERY = "all"  # the value of --keep-columns for all columns
GIVEN = "given_"  # begins the name of a kept column that has the name of one of ours


def named_columns(text: str, names: Collection[str], *, flag: str) -> list[str]:
    """Return the columns that the value of a `flag` names, by the `names` in a header: the one that
    has all of it as its name; else those between its commas, without the spaces around a name that
    no column has with them. They may be missing in the header. Raises UserError for an empty name,
    and for one that comes twice.
    """
    if text in names:
        return [text]
    parts = [part if part in names else part.strip() for part in text.split(",")]
    twice = first_repeated(parts)
    if twice is not None or "" in set(parts).difference(names):
        problem = f"{twice!r} comes twice" if twice else "one is empty"
        advice = f"name others with {flag}"
        raise UserError(f"{flag} {text!r}: no column has this name, and of those in it {problem}; {advice}")
    return parts


def possible_columns(text: str) -> list[str]:
    """Return all columns that a flag may name: the header tells which these are."""
    parts = text.split(",")
    return list(dict.fromkeys([text, *parts, *(part.strip() for part in parts)]))


def require_column(names: Iterable[str], column: str, *, source: str, flag: str) -> None:
    """Raise UserError, naming `source` and the `flag` that names the column, unless `column` is
    one of `names`.
    """
    if column not in (names := [name for name in names if name != ROW]):
        among = f"among {listed(names)}" if names else "but texts alone"
        problem = f"no column {column!r} {among}"
        raise UserError(f"{source}: {problem}; name the right one with {flag}")


# Columns that stay --------------------------------------------------------------------------------


def add_kept_flags(parser: argparse._ArgumentGroup, *, needs: str, beside: str) -> None:
    """Add the flags of columns that stay; they `need` another flag."""
    help_text = f"with {needs}: a column that stays beside {beside}"
    parser.add_argument("--id-column", metavar="NAME", help=help_text)
    help_text = f"with {needs}: other columns that stay, such as author,date; all: every one"
    parser.add_argument("--keep-columns", metavar="NAMES", help=help_text)


def kept_by_flags(args: argparse.Namespace) -> list[str] | None:
    """Return the names of the columns that stay, as flags give them, None for all."""
    if args.keep_columns == EVERY:
        return None
    return [text for text in (args.id_column, args.keep_columns) if text is not None]


def find_kept(
    kept: Sequence[str] | None, names: Iterable[str], *, others: Collection[str], source: str
) -> list[str]:
    """Return the columns that stay among the `names` of a source, of those that flags give (`kept`);
    of all, those that are not `others`. Raises UserError for one that is not there.
    """
    names = [name for name in names if name != ROW]
    if kept is None:
        return [name for name in names if name not in others]
    flag = "--keep-columns"
    found = list(dict.fromkeys(name for text in kept for name in named_columns(text, names, flag=flag)))
    for name in found:
        require_column(names, name, source=source, flag=flag)
    return found


def names_beside(kept: Sequence[str], own: Collection[str]) -> list[str]:
    """Return the names under which columns stand beside our `own` ones, each of them once."""
    taken = [*own, *kept]
    names = []
    for name in kept:
        names.append(unused_name(GIVEN + name, taken) if name in own else name)
        taken.append(names[-1])
    return names


def unused_name(wanted: str, taken: Iterable[str]) -> str:
    """Return the wanted column name, with "_" added until it is none of `taken`. SQL ignores case,
    and so does this.
    """
    lowered = [name.lower() for name in taken]
    while wanted.lower() in lowered:
        wanted += "_"
    return wanted
