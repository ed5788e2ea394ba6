"""Texts without labels, which are to be predicted: checked first, then read block by block, so that
memory does not grow with their number.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from common import cli, plain_files, reading, sources
from common.columns import ROW, KeptColumns, possible_columns, require_column, unused_name
from common.errors import NOT_UTF8, Fault, UserError
from common.sources import FileOptions
from common.training.faults import TEXT_NOT_UTF8
from common.training.labels import ADVICE
from common.training.run import JOIN, PAIR

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

    from common.training.data import TextConfig

NO_PAIR = "pairs are read, and the line has no two texts with a tab between"


@dataclass(frozen=True)
class TextBlock:
    """Some texts of a source in their order, their numbers from 1, and the cells beside them."""

    rows: list[int]
    texts: list[str] | list[tuple[str, str]]
    columns: pa.Table | None


@contextlib.contextmanager
def open_texts(
    name: str,
    config: TextConfig,
    *,
    kept: KeptColumns,
    options: FileOptions,
    cache_dir: str | None,
    named: str | None = None,
    faults: list[Fault] | None = None,
) -> Iterator[Texts]:
    """Yield the texts of a data file, or the lines of any other file or of standard input ("-").
    `kept` are the columns of a data file that stay beside the answers; `named` is
    --text-column, None where it was not given.
    """
    sources.check_texts(name, any_suffix=options.is_table)
    with plain_files.open_plain(name, encoding=options.encoding, folder=cache_dir) as file:
        texts = Texts(file, plain_files.source_name(name), config, faults)
        if reading.is_table(file, name, options):
            texts.read_table(kept, options, cache_dir)
        else:
            texts.refuse_columns(named, kept)
        yield texts


class Texts:
    """The texts of an open source.

    A data file has them in the columns that `config` names: a text, a pair of them, or the parts of
    a text. In lines a tab parts the texts of a pair. Rows whose text can't be used are added to
    `faults`; where that is None, the first raises UserError.
    """

    def __init__(self, file: BinaryIO, source: str, config: TextConfig, faults: list[Fault] | None) -> None:
        self.file, self.source, self.config, self.faults = file, source, config, faults
        self.columns: list[str] = []  # that texts are read from
        self.kept: list[str] = []  # other columns, which stand beside the answers
        self.is_pair = config.text_mode == PAIR
        self.table: Any = None  # of lines

    def read_table(self, kept: KeptColumns, options: FileOptions, cache_dir: str | None) -> None:
        """Read the source as a data file. Raises UserError for a column that is not there, or that
        holds no texts.
        """
        as_text = [*possible_columns(self.config.text_column), *kept.as_text]
        given = {"as_text": as_text, "options": options, "cache_dir": cache_dir}
        read = functools.partial(reading.read_table, self.file, self.source, **given)
        rows = reading.or_advise_to_skip(read, self.faults)
        names = rows.column_names
        columns = self.columns = self.config.among(names).columns
        for column in columns:
            require_column(names, column, source=self.source, flag="--text-column")
            reading.check_kind(rows, column, source=self.source)
        self.kept = kept.among(names, others=columns, source=self.source)
        is_joined = self.config.text_mode == JOIN
        self.table = (self._joined(rows) if is_joined else rows).with_format("arrow")

    def refuse_columns(self, named: str | None, kept: KeptColumns) -> None:
        """Raise UserError for flags that name columns, for lines have none, and for a first line that
        names those of the texts: it is the header of a table.
        """
        text = self.config.text_column
        parts = {part.strip() for part in text.split(",")}
        first = next(reading.raw_lines(self.file), b"").decode("utf-8-sig", "replace")
        for word in ("comma", "tab", "semicolon", "pipe"):
            cells = [cell.strip(' "') for cell in first.split(cli.DELIMITERS[word])]
            if len(cells) > 1 and (text.strip() in cells or parts <= {*cells}):
                problem = f"it names the column {text}, as a table does"
                advice = f"read it as one with --delimiter {word}, or remove the line"
                raise UserError(f"{self.source}, line 1: {problem}; {advice}")
        if named is not None:
            advice = "leave it out, or read a table with --delimiter comma"
            raise UserError(f"--text-column {named}: the lines of {self.source} have no columns; {advice}")
        if self.config.text_mode == JOIN:
            problem = "--text-mode join needs columns, and it has lines"
            raise UserError(f"{self.source}: {problem}; name a data file")
        if kept != KeptColumns():
            problem = "its lines have no columns that could be kept"
            raise UserError(f"{self.source}: {problem}; leave --id-column and --keep-columns out")

    def _joined(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Return the rows with a column more, which holds the texts of all `columns` and is read
        instead of these.
        """
        for column in self.columns:
            cells = rows.with_format("arrow")[column]
            reading.check_characters(cells, f"{self.source}, row", first=1)
        cells = [rows[column][:] for column in self.columns]
        joined = reading.join_cells(cells, self.config.join_with)
        self.columns = [unused_name(",".join(self.columns), rows.column_names)]
        return cast("datasets.Dataset", rows.add_column(self.columns[0], joined))

    def find_faults(self) -> set[int]:
        """Return the numbers of the texts that can't be used, after adding all to the faults."""
        bad: set[int] = set()
        for number, text, cell in self._all():
            if number in bad:  # its row is a fault already, for the other text of a pair
                continue
            problem = reading.text_problem(text) or self._other_problem(text or "", cell)
            if not problem:
                continue
            bad.add(number)
            assert self.faults is not None
            row = number if self.table is None else self._source_row(number)
            self.faults.append(Fault(self.source, row, problem, text or ""))
        return bad

    def _other_problem(self, text: str, cell: bytes) -> str:
        if "\ufffd" in text and not _is_utf8(cell):
            return NOT_UTF8 if self.table is None else TEXT_NOT_UTF8
        is_no_pair = self.is_pair and self.table is None and split_pair(text) is None
        return NO_PAIR if is_no_pair else ""

    def sha256(self) -> str:
        """Return the SHA-256 of the source's plain content in hexadecimal."""
        self.file.seek(0)
        return hashlib.file_digest(cast(Any, self.file), "sha256").hexdigest()

    def check(self) -> set[int]:
        """Return the numbers of the texts that can't be used; without a list of
        faults raise UserError for the first.
        """
        if self.faults is not None:
            return self.find_faults()
        if self.table is not None:
            for column in self.columns:
                reading.check_texts(self.table.with_format(None), column, source=self.source, advice=ADVICE)
            return set()
        for number, line in enumerate(reading.lines_of(self.file, self.source), start=1):
            if sources.is_blank(line):
                advice = "remove the line, or leave such lines out with --skip-bad"
                raise UserError(f"{self.source}, line {number}: the text is empty; {advice}")
            reading.check_length(line, f"{self.source}, line {number}")
            if self.is_pair and split_pair(line) is None:
                advice = "correct it, or name a data file and its --text-column"
                raise UserError(f"{self.source}, line {number}: {NO_PAIR}; {advice}")
        return set()

    def blocks(self, size: int, *, without: set[int], skipped: int = 0) -> Iterator[TextBlock]:
        """Yield `size` texts at a time, but those `without` and the first `skipped` of the rest."""
        if self.table is None:
            lines = enumerate(reading.raw_lines(self.file), start=1)
            good = ((number, line.decode("utf-8-sig")) for number, line in lines if number not in without)
            good = itertools.islice(good, skipped, None)
            while block := list(itertools.islice(good, size)):
                texts: Any = [split_pair(text) if self.is_pair else text for _, text in block]
                yield TextBlock([number for number, _ in block], texts, None)
            return
        numbers = (number for number in range(1, len(self.table) + 1) if number not in without)
        numbers = itertools.islice(numbers, skipped, None)
        while rows := list(itertools.islice(numbers, size)):
            part = self.table[rows[0] - 1 : rows[-1]]
            part = part.take([row - rows[0] for row in rows])
            shown = part[ROW].to_pylist() if ROW in part.column_names else rows
            cells = [part[column].to_pylist() for column in self.columns]
            texts = list(zip(*cells)) if self.is_pair else cells[0]
            yield TextBlock(shown, texts, part.select(self.kept))

    def _source_row(self, number: int) -> int:
        if ROW in self.table.column_names:
            return self.table[number - 1 : number][ROW][0].as_py()
        return number

    def _all(self) -> Iterator[tuple[int, str | None, bytes]]:
        """Yield the number of each text, the text, and its bytes."""
        if self.table is None:
            for number, line in enumerate(reading.raw_lines(self.file), start=1):
                yield number, line.decode("utf-8-sig", "replace"), line
            return
        import pyarrow as pa

        for start in range(0, len(self.table), 10_000):
            for column in self.columns:
                block = self.table[start : start + 10_000][column].cast(pa.large_binary())
                for number, cell in enumerate(block.to_pylist(), start=start + 1):
                    text = None if cell is None else cell.decode("utf-8", "replace")
                    yield number, text, cell or b""


def split_pair(line: str) -> tuple[str, str] | None:
    """Return the two texts of a line, None unless one tab parts them."""
    first, *second = line.split("\t")
    if len(second) != 1 or sources.is_blank(first) or sources.is_blank(second[0]):
        return None
    return first, second[0]


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
