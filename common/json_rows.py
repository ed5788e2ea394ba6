"""JSON -> an Arrow table: a list of objects, one object per line, or objects over several lines."""

import itertools
import json
from collections.abc import Iterator

import pyarrow as pa

from common.columns import ROW
from common.errors import UserError
from common.json_objects import Row, read_objects, require_once
from common.plain_files import DataFile
from common.tables import as_strings, explained, gather, is_utf8, parse_lines

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
        for row_number, (unit, number, row) in enumerate(read_objects(data), start=1):
            yield unit, number, {**row, ROW: row_number}
        return

    def parse(line: str) -> dict:
        try:
            row = json.loads(line, object_pairs_hook=require_once(data, "the object"))
        except (ValueError, RecursionError) as error:
            raise UserError("not readable as json") from error
        if not isinstance(row, dict):
            raise UserError("not a JSON object")
        return row

    for number, row in parse_lines(data, parse):
        yield "row", number, {**row, ROW: number}


def _blocks_of_objects(data: DataFile) -> Iterator[pa.Table]:
    rows = read_objects(data) if data.faults is None else _sound_objects(data)
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
            number = row.pop(ROW)
            data.note(number, str(bad), json.dumps(row))


class _BadValue(Exception):
    """A value that its column can't hold, and its position in the block."""

    def __init__(self, position: int, problem: str) -> None:
        super().__init__(problem)
        self.position = position


def _json_column(values: list, column: str, data: DataFile) -> pa.Array:
    """Return one column of a block.

    Raises _BadValue for half of a character, and for a value of a column `as_text` that is neither text nor a
    whole number, where other values are.
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
        return as_strings(values, column)
