"""Prompts from files: the lines of a text, the rows of a table, conversations in JSON."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from common import plain_files, reading, sources
from common.cli import json_line
from common.columns import ROW, KeptColumns, names_beside, require_column
from common.errors import Fault, UserError, outcome
from common.generation.messages import Message, check_messages
from common.generation.output import OWN_FIELDS
from common.json_objects import read_objects
from common.sources import FileOptions

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

PROMPT_KEYS = ("messages", "prompt")  # an object of JSON that is not a row of a table has one of them
BLOCK = 10_000  # rows whose cells are looked at together
TEMPLATE_FLAG = "--prompt-template"
BRACES = re.compile(r"\{\{|\}\}|\{(?P<column>[^{}]+)\}|[{}]")


@dataclass(frozen=True)
class GivenPrompt:
    """A text, a conversation, or the error that says why there is none; and the cells to keep with it."""

    content: str | list[Message] | UserError
    cells: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptTemplate:
    """A text with names of columns in it, such as "Summarise: {review}", in its pieces: texts and names
    in turn, a text first and last.

    Between braces stands a name and nothing else: str.format would follow its dots and brackets into
    Python's objects. What the cells hold is data, in which no brace means anything.
    """

    pieces: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """The columns that it names, each once."""
        return list(dict.fromkeys(self.pieces[1::2]))

    def fill(self, cells: Mapping[str, str]) -> str:
        """Return the prompt of a row."""
        return "".join(cells[piece] if position % 2 else piece for position, piece in enumerate(self.pieces))


def parse_template(text: str) -> PromptTemplate:
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
            place = f"{TEMPLATE_FLAG}, character {match.start() + 1}"
            problem = f"{match[0]!r} encloses no name of a column"
            raise UserError(f"{place}: {problem}; write {2 * match[0]} for a brace of the text")
    pieces[-1] += text[end:]
    if len(pieces) == 1:
        raise UserError(
            f"{TEMPLATE_FLAG} {text!r:.60}: it names no column; write one in braces, such as {{text}}"
        )
    return PromptTemplate(tuple(pieces))


@dataclass(frozen=True)
class PromptConfig:
    """Where a file has its prompts, and what is kept with them."""

    text_column: str
    template: PromptTemplate | None  # makes the prompts, in the place of the text column
    kept: KeptColumns
    skip_bad: bool  # True: a prompt that can't be used is replaced by the reason, and reading goes on
    options: FileOptions
    cache_dir: str | None

    @property
    def columns(self) -> list[str]:
        """The columns that prompts are made of."""
        return [self.text_column] if self.template is None else self.template.columns

    @property
    def as_text(self) -> list[str]:
        """The columns that are read as they are written."""
        return [*self.columns, *self.kept.as_text]


def read_prompts(name: str, config: PromptConfig) -> list[GivenPrompt]:
    """Return the prompts of a file or of standard input ("-").

    Raises UserError, naming the row or line, for one that can't be used; with `skip_bad` the error
    stands in its place.
    """
    options = config.options
    sources.check_texts(name, any_suffix=options.is_table)
    source = plain_files.source_name(name)
    with plain_files.open_plain(name, encoding=options.encoding, folder=config.cache_dir) as file:
        if _holds_conversations(file, name, config):
            prompts = _read_json(file, source, config)
        elif reading.is_table(file, name, options):
            prompts = _read_table(file, source, config)
        else:
            prompts = _read_lines(file, source, config)
    for prompt in prompts if not config.skip_bad else ():
        if isinstance(prompt.content, UserError):
            between = "," if ";" in str(prompt.content) else "; correct it,"
            raise UserError(f"{prompt.content}{between} or leave it out with --skip-bad")
    return prompts


def check_columns(name: str, config: PromptConfig) -> None:
    """Raise UserError for a file that is not text, or a column that it lacks, as its beginning shows."""
    flag = "--text-column" if config.template is None else TEMPLATE_FLAG
    kept, several = config.kept.flags()
    wanted = kept | dict.fromkeys(config.columns, flag)
    with reading.open_if_plain(name, config.options) as file:
        if file is not None and not _holds_conversations(file, name, config):
            reading.check_header(file, name, wanted, several=several, options=config.options)


# Lines of text ------------------------------------------------------------------------------------


def _read_lines(file: BinaryIO, source: str, config: PromptConfig) -> list[GivenPrompt]:
    if config.template is not None or config.kept != KeptColumns():
        flag = TEMPLATE_FLAG if config.template is not None else "--id-column and --keep-columns"
        raise UserError(f"{flag}: the lines of {source} have no columns; name a data file")

    def read_line(line: bytes, place: str) -> str:
        text = plain_files.decode_utf8(line, place)
        if problem := reading.text_problem(text):
            raise UserError(f"{place}: {problem}; remove the line")
        return text

    lines = enumerate(reading.raw_lines(file), start=1)
    return [GivenPrompt(outcome(read_line, line, f"{source}, line {number}")) for number, line in lines]


# Tables -------------------------------------------------------------------------------------------


def _read_table(file: BinaryIO, source: str, config: PromptConfig) -> list[GivenPrompt]:
    """Return a prompt for each row, those that could not be read among the others."""
    faults: list[Fault] | None = [] if config.skip_bad else None
    given = {"as_text": config.as_text, "options": config.options, "cache_dir": config.cache_dir}
    rows = reading.or_advise_to_skip(functools.partial(reading.read_table, file, source, **given), faults)
    for column in config.columns:
        flag = "--text-column" if config.template is None else TEMPLATE_FLAG
        require_column(rows.column_names, column, source=source, flag=flag)
    if config.template is None:
        reading.check_kind(rows, config.text_column, source=source)
    others = config.columns if config.template is None else ()
    kept = config.kept.among(rows.column_names, others=others, source=source)
    beside = names_beside(kept, OWN_FIELDS)
    prompts = {}  # by the number of the row
    for number, row in _rows(rows, [*config.columns, *kept], source):
        content = outcome(_prompt_of_row, row, config, f"{source}, row {number}")
        cells = {name: json_value(row[column]) for name, column in zip(beside, kept)}
        prompts[number] = GivenPrompt(content, cells)
    for fault in faults or ():
        error = UserError(f"{source}, row {fault.row}: {fault.problem}; correct the row")
        prompts[fault.row] = GivenPrompt(error, dict.fromkeys(beside))
    return [prompts[number] for number in sorted(prompts)]


def _rows(rows: datasets.Dataset, columns: list[str], source: str) -> Iterator[tuple[int, dict]]:
    """Yield the number of each row and its cells in some columns; a text that is not UTF-8, which
    Arrow reads unchecked from Parquet, as bytes.
    """
    has_numbers, first = ROW in rows.column_names, 1
    names = list(dict.fromkeys([*columns, ROW] if has_numbers else columns))
    tables: Any = rows.select_columns(names).with_format("arrow")
    for table in tables.iter(batch_size=BLOCK):
        cells = [_cells(table[name], f"{source}, row", first) for name in names]
        for number, row in enumerate(zip(*cells), start=first):
            named = dict(zip(names, row))
            yield named.get(ROW, number), named
        first += len(table)


def _cells(column: pa.ChunkedArray, source: str, first: int) -> list:
    import pyarrow as pa

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        reading.check_characters(column, source, first=first)
        return column.to_pylist()
    cells = []
    for cell in column.cast(pa.large_binary()).to_pylist():
        with contextlib.suppress(UnicodeDecodeError):
            cell = None if cell is None else cell.decode()
        cells.append(cell)
    return cells


def _prompt_of_row(row: dict[str, Any], config: PromptConfig, place: str) -> str:
    texts = {column: _text(row[column], column, place) for column in config.columns}
    return texts[config.text_column] if config.template is None else config.template.fill(texts)


def _text(cell: Any, column: str, place: str) -> str:
    """Return what a prompt says of a cell: a text as it is, other values as JSON writes them.

    Raises UserError for a cell that is missing, blank or no text in UTF-8.
    """
    if isinstance(cell, bytes):
        raise UserError(f"{place}: not UTF-8; correct the row")
    text = cell
    if cell is not None and not isinstance(cell, str):
        text = json.dumps(cell, ensure_ascii=False, default=str)
    if problem := reading.text_problem(text):
        problem = problem.replace("the text", f"the text in column {column!r}", 1)
        raise UserError(f"{place}: {problem}; remove the row or fill it in")
    return text


def json_value(cell: Any) -> Any:
    """Return a cell as it comes back from a line of JSON, which is compared with --resume."""
    return json.loads(json_line(cell))


# JSON ---------------------------------------------------------------------------------------------


def _holds_conversations(file: BinaryIO, name: str, config: PromptConfig) -> bool:
    """Return whether an open file is of JSON objects with `messages` or `prompt`, or a list of
    messages, as its beginning shows; a column of texts, if there is one, goes before these, and a
    template too.
    """
    if config.options.is_table or config.template is not None:
        return False
    if name != "-" and sources.suffix(name) not in sources.JSON_SUFFIXES:
        return False
    head = _head(file)
    first, how = _first_object(head)
    if config.text_column not in first:
        _refuse_bare_messages(head, plain_files.source_name(name), first, how)
    is_prompt = not first.keys().isdisjoint(PROMPT_KEYS) or (how == "list" and _is_message(first))
    return is_prompt and config.text_column not in first


def _head(file: BinaryIO) -> str:
    """Return the beginning of an open file, without white space before it."""
    file.seek(0)
    head = file.read(reading.LONGEST_TEXT).decode("utf-8-sig", "replace").lstrip()
    file.seek(0)
    return head


def _first_object(head: str) -> tuple[dict, Literal["line", "list", "several lines"]]:
    """Return the first object of a file of JSON by its beginning, empty if that is none, and where it
    stands.
    """
    is_list = head.startswith("[")
    text = head.removeprefix("[").lstrip()
    first, end = None, 0
    with contextlib.suppress(ValueError, RecursionError):
        first, end = json.JSONDecoder().raw_decode(text)
    is_line = "\n" not in text[:end] and not text[end:].partition("\n")[0].strip()
    how = "list" if is_list else "line" if is_line else "several lines"
    return (first if isinstance(first, dict) else {}), how


def _refuse_bare_messages(head: str, source: str, first: dict, how: str) -> None:
    """Raise UserError for messages on a line each, and for several lists of messages, as the beginning
    of a file shows.
    """
    if how != "list":
        is_bare = _is_message(first)
    else:
        is_bare = re.match(r"\[\s*\[\s*\{", head) is not None
        with contextlib.suppress(ValueError, RecursionError):
            if _is_message(first):
                _, end = json.JSONDecoder().raw_decode(head)
                is_bare = head[end:].strip() != ""
    if is_bare:
        form = '{"messages": [{"role": "user", "content": "..."}]}'
        raise UserError(f"{source}: its messages are not in conversations; write each as {form} on a line")


def _is_message(row: dict) -> bool:
    return row.keys() >= {"role", "content"} and row.keys().isdisjoint(PROMPT_KEYS)


def _read_json(file: BinaryIO, source: str, config: PromptConfig) -> list[GivenPrompt]:
    """Return a prompt for each object, or the error that says why it can't be used: in a file with one object
    on each line, a bad line does not end the reading. A list of messages is one conversation.
    """
    first, how = _first_object(_head(file))
    if how == "line":
        lines = enumerate(reading.raw_lines(file), start=1)
        numbered = [(line, f"{source}, line {number}") for number, line in lines if line.strip()]
        rows = [(outcome(_object_of_line, line, place), place) for line, place in numbered]
    else:
        data = plain_files.DataFile(file, source, config.options, (), config.cache_dir)
        rows = [(row, f"{source}, {unit} {number}") for unit, number, row in read_objects(data)]
        if how == "list" and _is_message(first):
            rows = [({"messages": [row for row, _ in rows]}, source)]
    names = dict.fromkeys(key for row, _ in rows if isinstance(row, dict) for key in row)
    kept = config.kept.among(names, others=PROMPT_KEYS, source=source)
    beside = names_beside(kept, OWN_FIELDS)
    prompts = []
    for row, place in rows:
        if isinstance(row, UserError):
            prompts.append(GivenPrompt(row, dict.fromkeys(beside)))
            continue
        cells = {name: json_value(row.get(key)) for name, key in zip(beside, kept)}
        prompts.append(GivenPrompt(outcome(_prompt_of_object, row, place), cells))
    return prompts


def _prompt_of_object(row: dict, place: str) -> str | list[Message]:
    given = [row[key] for key in PROMPT_KEYS if row.get(key) is not None]
    if len(given) != 1:
        raise UserError(f"{place}: an object has either messages or a prompt; correct it")
    if row.get("messages") is not None:
        return check_messages(given[0], place)
    if not isinstance(given[0], str) or sources.is_blank(given[0]):
        raise UserError(f"{place}: the prompt is no text, or empty; correct it")
    return given[0]


def _object_of_line(line: bytes, place: str) -> dict:
    return parse_object(plain_files.decode_utf8(line, place), place)


def parse_object(line: str, place: str) -> dict:
    """Return a line of JSON, an object. Raises UserError, naming its place, for anything else."""
    row = None
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
    if not isinstance(row, dict):
        raise UserError(f'{place}: no object of JSON, such as {{"messages": [...]}}; correct it')
    return row
