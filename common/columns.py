"""The columns of a table: those that flags name, and those that are kept beside what a script writes.

Importing it is quick: flags are checked before PyTorch is loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from common.errors import UserError, first_repeated, listed
from common.sources import EVERY_COLUMN

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
    """Add the flags of columns to keep; they `need` another flag."""
    help_text = f"with {needs}: a column that stays beside {beside}"
    parser.add_argument("--id-column", metavar="NAME", help=help_text)
    help_text = f"with {needs}: other columns that stay, such as author,date; all: every other one"
    parser.add_argument("--keep-columns", metavar="NAMES", help=help_text)


@dataclass(frozen=True)
class KeptColumns:
    """Which columns are kept beside what a script writes; the fields have the names of their flags."""

    id_column: str | None = None
    keep_columns: str | None = None

    @property
    def as_text(self) -> list[str]:
        """All columns that they may be, which are read as they are written."""
        ids = [] if self.id_column is None else [self.id_column]
        if self.keep_columns is None:
            return ids
        others = [EVERY_COLUMN] if self.keep_columns == EVERY else possible_columns(self.keep_columns)
        return [*ids, *others]

    def flags(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the flags by what they name: one column, and perhaps several."""
        wanted = {} if self.id_column is None else {self.id_column: "--id-column"}
        if self.keep_columns in (None, EVERY):
            return wanted, {}
        return wanted, {self.keep_columns: "--keep-columns"}

    def among(self, names: Iterable[str], *, others: Collection[str], source: str) -> list[str]:
        """Return which of the columns (`names`) of a source are kept; with "all", those that are not
        `others`. Raises UserError for one that is not there.
        """
        names = [name for name in names if name != ROW]
        ids = [] if self.id_column is None else [self.id_column]
        for name in ids:
            require_column(names, name, source=source, flag="--id-column")
        if self.keep_columns is None:
            return ids
        if self.keep_columns == EVERY:
            return [name for name in names if name in ids or name not in others]
        kept = named_columns(self.keep_columns, names, flag="--keep-columns")
        for name in kept:
            require_column(names, name, source=source, flag="--keep-columns")
        return list(dict.fromkeys([*ids, *kept]))


def names_beside(kept: Sequence[str], own: Collection[str]) -> list[str]:
    """Return the names under which columns are kept beside our `own` ones, each of them once."""
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
