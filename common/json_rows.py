"""JSON -> an Arrow table: a list of objects, one object per line, or objects over several lines."""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from common.columns import ROW
from common.errors import UserError, first_repeated, one_line, shorten
from common.tables import DataFile, as_strings, explained, gather, is_utf8, parse_lines

Row = tuple[str, int, dict]  # where it is: "line" or "row", and its number
BLOCK_OBJECTS = 2_000  # few, because Python's garbage collector goes through them again and again


def read(data: DataFile) -> pa.Table:
    """Return the table of a list of objects, or of one object per line.

    A key that a row lacks is null there. A column whose values have several types becomes text, but
    a column `as_text` may mix only texts and whole numbers. Raises UserError, naming the line.
    """
    with explained(data.name, "json"):
        try:
            return gather(_blocks_of_objects(data), data.folder)
        except UnicodeDecodeError as error:
            raise data.not_utf8() from error


def _sound_objects(data: DataFile) -> Iterator[Row]:
    """Yield the objects of a file with one on each line, with their number in the column ROW, and
    note other lines as faults. A list of objects can be read only as a whole.
    """
    head = data.head().lstrip()
    if head.startswith("[") or not head.split("\n", 1)[0].rstrip().endswith("}"):
        for unit, number, row in _objects(data):
            yield unit, number, {**row, ROW: number}
        return

    def parse(line: str) -> dict:
        try:
            row = json.loads(line, object_pairs_hook=_require_once(data, "the object"))
        except (ValueError, RecursionError) as error:
            raise UserError("not readable as json") from error
        if not isinstance(row, dict):
            raise UserError("not a JSON object")
        return row

    for number, row in parse_lines(data, parse):
        yield "line", number, {**row, ROW: number}


def _objects(data: DataFile) -> Iterator[Row]:
    name = data.name
    keys = [f'"{column}"' for column in data.as_text]
    decoder, is_first = json.JSONDecoder(), True
    scan = decoder.scan_once  # pyrefly: ignore [missing-attribute]  (its types lack it)
    for number, line in enumerate(data.text(newline=None), start=1):
        try:
            # decode() looks for white space around the value too, which takes as long again
            row, end = scan(line, 0)
            is_whole = end == len(line) - 1
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
            json.loads(line, object_pairs_hook=_require_once(data, f"{name}, line {number}"))
        is_first = False
        yield "line", number, row


def _require_once(data: DataFile, location: str) -> Callable[[list[tuple[str, Any]]], dict]:
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
    hook, is_list = _require_once(data, data.name), text.lstrip().startswith("[")
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


def _blocks_of_objects(data: DataFile) -> Iterator[pa.Table]:
    rows = _objects(data) if data.faults is None else _sound_objects(data)
    while block := list(itertools.islice(rows, BLOCK_OBJECTS)):
        yield _block_of_objects(block, data)


def _block_of_objects(block: list[Row], data: DataFile) -> pa.Table:
    """Return objects as a table. One with a value that its column can't hold is left out and noted,
    or refused.
    """
    while True:
        objects = [row for _, _, row in block]
        columns = dict.fromkeys(itertools.chain.from_iterable(objects))
        for column in columns:
            if not is_utf8(column):
                unit, number, _ = next(row for row in block if column in row[2])
                problem = f"the key {column!r} has a lone surrogate, which is no character"
                raise UserError(f"{data.name}, {unit} {number}: {problem}; correct it")
        try:
            return pa.table(
                {name: _json_column([row.get(name) for row in objects], name, data) for name in columns}
            )
        except _BadValue as bad:
            unit, number, row = block.pop(bad.position)
            if data.faults is None:
                raise UserError(f"{data.name}, {unit} {number}: {bad}; correct it") from bad
            row.pop(ROW)
            data.note(number, str(bad), json.dumps(row))


class _BadValue(Exception):
    """A value that its column can't hold, and its position in the block."""

    def __init__(self, position: int, problem: str) -> None:
        super().__init__(problem)
        self.position = position


def _json_column(values: list, column: str, data: DataFile) -> pa.Array:
    """Return one column of a block.

    Raises _BadValue for half of a character, and for a value of a column `as_text` that is neither
    text nor a whole number beside values that are.
    """
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        for position, value in enumerate(values):
            if not is_utf8(json.dumps(value, ensure_ascii=False)):
                problem = "a lone surrogate (\\ud800 to \\udfff) is no character"
                raise _BadValue(position, problem) from None
        for position, value in enumerate(values if column in data.as_text else ()):
            if value is not None and type(value) not in (str, int):
                problem = f"{column!r} holds a {type(value).__name__}, in other rows texts"
                raise _BadValue(position, problem) from None
        return as_strings(values)
