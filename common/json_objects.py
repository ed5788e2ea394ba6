"""JSON -> objects: of a list, one per line, or over several lines.

Importing it is quick: a missing column is reported before any library is loaded.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from common.errors import UserError, first_repeated, one_line, shorten
from common.plain_files import DataFile

Row = tuple[str, int, dict]  # where it is: "line" or "row", and its number


def read_objects(data: DataFile) -> Iterator[Row]:
    """Yield the objects of a file: of a list, or one on each line, or spread over several lines.

    Raises UserError, naming the line or row, for anything else.
    """
    name = data.name
    keys = [f'"{column}"' for column in data.as_text]
    decoder, is_first = json.JSONDecoder(), True
    scan = decoder.scan_once  # pyrefly: ignore [missing-attribute]  (its types lack it)
    for number, line in enumerate(data.text(newline=None), start=1):
        try:
            # decode() looks for white space around the value too, which takes as long again
            row, end = scan(line, 0)
            is_whole = line[end:] in ("\n", "") and isinstance(row, dict)
        except (StopIteration, ValueError):
            row, is_whole = None, False
        if not is_whole:
            if not line.strip():
                continue
            if is_first and line.lstrip()[0] == "[":
                yield from _objects_in(data.text(newline=None).read(), data)
                return
            try:
                row = decoder.decode(line)
            except ValueError as error:
                if is_first:  # objects may be spread over several lines
                    yield from _objects_in(data.text(newline=None).read(), data)
                    return
                raise _not_json(name, number, error) from error
        if not isinstance(row, dict):
            raise UserError(f"{name}, line {number}: not a JSON object; write {{...}} on each line")
        # the decoder keeps the last value of a key; its words are counted, because a hook would
        # take as long as all the rest
        if any(line.count(key) > 1 for key in keys):
            json.loads(line, object_pairs_hook=require_once(data, f"{name}, line {number}"))
        is_first = False
        yield "line", number, row


def require_once(data: DataFile, location: str) -> Callable[[list[tuple[str, Any]]], dict]:
    """Return a hook of the JSON decoder that raises UserError, naming `location`, for an object
    with two values of a column `as_text`.
    """

    def to_row(pairs: list[tuple[str, Any]]) -> dict:
        row = dict(pairs)
        if len(row) != len(pairs):
            twice = first_repeated(key for key, _ in pairs if key in data.as_text)
            if twice is not None:
                values = [shorten(str(value), 40) for key, value in pairs if key == twice]
                first, second, *_ = values
                problem = f"{twice!r} has two values, {first!r} and {second!r}"
                raise UserError(f"{location}: {problem}; remove one of them")
        return row

    return to_row


def _objects_in(text: str, data: DataFile) -> Iterator[Row]:
    """Yield the objects of a list, or those that follow each other in a text."""
    hook, is_list = require_once(data, data.name), text.lstrip().startswith("[")
    advice = "the list must hold objects only" if is_list else "write a list of objects"
    try:
        rows = json.loads(text, object_pairs_hook=hook) if is_list else _values_in(text, hook)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise UserError(f"{data.name}, row {number}: not a JSON object; {advice}")
            yield "row", number, row
    except json.JSONDecodeError as error:
        raise _not_json(data.name, error.lineno, error) from error


def _values_in(text: str, hook: Callable[[list[tuple[str, Any]]], dict]) -> Iterator[Any]:
    decoder, ink, position = json.JSONDecoder(object_pairs_hook=hook), re.compile(r"\S"), 0
    while start := ink.search(text, position):
        value, position = decoder.raw_decode(text, start.start())
        yield value


def _not_json(name: str, line: int, error: ValueError) -> UserError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
    return UserError(f"{name}, line {line}: not readable as json: {reason}; correct the line")
