"""The file of predictions: JSON lines, CSV or Parquet, written block by block beside its name and
moved to it when it is complete, so that a prediction that was killed can go on. With --resume a file of
progress stays beside it, which tells what it comes from, for a job that is started again.

Importing it is quick: `check_output` is called before PyTorch is loaded.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from common import cli
from common.columns import names_beside
from common.errors import Fault, UserError
from common.files import named_in_errors, only_writer, read_json, replace_file, sync_folder

if TYPE_CHECKING:
    import pyarrow as pa

    from common.runtime import Runtime

ENDINGS = (".jsonl", ".csv", ".parquet")
OWN_COLUMNS = ("row", "label", "labels", "confidence", "prediction", "scores")


def partial_file(output: Path) -> Path:
    """Return the file that holds a part of the predictions."""
    return output.with_name(f"{output.name}.partial")


def progress_file(output: Path) -> Path:
    """Return the file that tells how far they have come."""
    return output.with_name(f"{output.name}.progress")


def bad_rows_file(output: Path) -> Path:
    """Return the file of the rows that --skip-bad leaves out."""
    return output.with_name(f"{output.stem}.bad-rows.jsonl")


def check_output(name: str, *, resume: bool) -> None:
    """Raise UserError unless predictions can be written to a file of this name."""
    path = Path(name)
    if path.suffix.lower() not in ENDINGS:
        known = ", ".join(ENDINGS)
        raise UserError(f"--output {name}: the name ends with {path.suffix!r}, not with one of {known}")
    if not path.parent.is_dir():
        raise UserError(f"--output {name}: no such folder; make it first")
    if path.is_dir():
        raise UserError(f"--output {name}: this is a folder; name a file in it")
    if resume:
        return
    if path.exists():
        raise UserError(f"--output {name}: it exists; name another file, or remove it")
    if partial_file(path).exists():
        raise UserError(
            f"--output {name}: a part of it has been written; add --resume to go on, or remove"
            f" {partial_file(path).name}"
        )


def write_bad_rows(path: Path, faults: Sequence[Fault]) -> None:
    """Write rows that were left out as JSON lines: where each is, its problem and its content."""
    lines = [json.dumps(dataclasses.asdict(fault), ensure_ascii=False) for fault in faults]
    replace_file(path, "".join(f"{line}\n" for line in lines))


def with_columns(columns: pa.Table | None, answers: list[dict]) -> list[dict]:
    """Return answers with the cells of the kept columns before them."""
    if columns is None or not columns.column_names:
        return answers
    names = _kept_names(columns, answers)
    rows = zip(*(column.to_pylist() for column in columns.columns))
    return [{"row": answer["row"], **dict(zip(names, row)), **answer} for row, answer in zip(rows, answers)]


def _kept_names(columns: pa.Table, answers: list[dict]) -> list[str]:
    """Return the names of the kept columns beside those of answers, the same in every kind of file."""
    own = [*OWN_COLUMNS, *_flat(answers[0])]
    return names_beside(columns.column_names, own)


def write_csv(path: Path, answers: list[dict]) -> None:
    """Write answers as a table."""
    path.write_bytes(_csv_block(answers, with_header=True))


class PredictionFile:
    """A file of predictions that is being written: whole blocks of rows, and how many they are.

    What counts is in the file of progress, which is replaced after each block is on the disk. What
    a kill leaves behind the last of these is cut off.
    """

    def __init__(
        self, output: Path, file: BinaryIO | None, state: dict, *, keep_progress: bool = False
    ) -> None:
        # without a file in all processes of a job but one, which only count
        self.output, self.file, self.state = output, file, state
        self.keep_progress = keep_progress

    @property
    def is_complete(self) -> bool:
        """Tell whether an earlier command has written all of it."""
        return self.state.get("is_complete", False)

    @property
    def num_rows(self) -> int:
        """The rows that have been written."""
        return self.state["rows"]

    def add(self, answers: list[dict], columns: pa.Table | None) -> None:
        """Write a block of rows."""
        if self.file is None:
            self.state["rows"] += len(answers)
            return
        ending = self.output.suffix.lower()
        if ending == ".parquet":
            block = _arrow_block(answers, columns)
        elif ending == ".csv":
            block = _csv_block(with_columns(columns, answers), with_header=not self.num_rows)
        else:
            lines = "".join(f"{cli.json_text(line)}\n" for line in with_columns(columns, answers))
            block = lines.encode("utf-8", "backslashreplace")
        with named_in_errors(partial_file(self.output)):
            self.file.write(block)
            self.file.flush()
            os.fsync(self.file.fileno())
        self.state |= {"rows": self.num_rows + len(answers), "bytes": self.file.tell()}
        replace_file(progress_file(self.output), json.dumps(self.state))

    def finish(self) -> None:
        """Give the complete file its name."""
        if self.file is None:
            return
        source = partial_file(self.output)
        if self.output.suffix.lower() == ".parquet":
            source = self.output.with_name(f"{self.output.name}.new")
            _write_parquet(partial_file(self.output), source)
        os.replace(source, self.output)
        sync_folder(self.output.parent)
        if not self.keep_progress:
            progress_file(self.output).unlink(missing_ok=True)
        partial_file(self.output).unlink(missing_ok=True)


@contextlib.contextmanager
def open_predictions(
    name: str, *, identity: dict, resume: bool, runtime: Runtime
) -> Iterator[PredictionFile]:
    """Yield the file of predictions to go on with, which one process of a job writes.

    Raises UserError when what is there was written with another `identity`: from other texts, by
    another model or with other flags.
    """
    output = Path(name)
    with contextlib.ExitStack() as stack:

        def find_state() -> dict:
            stack.enter_context(only_writer(output, flag="--output"))
            check_output(name, resume=resume)
            if not output.exists() and not partial_file(output).exists():
                return {"identity": identity, "rows": 0, "bytes": 0}
            return _read_state(output, identity)

        state = runtime.broadcast_from_main(find_state)
        if not runtime.is_main or state.get("is_complete"):
            yield PredictionFile(output, None, state)
            return
        file = stack.enter_context(open(partial_file(output), "r+b" if state["bytes"] else "wb"))
        file.truncate(state["bytes"])
        file.seek(state["bytes"])
        if not state["rows"]:
            replace_file(progress_file(output), json.dumps(state))
        yield PredictionFile(output, file, state, keep_progress=resume)


def _read_state(output: Path, identity: dict) -> dict:
    path, is_complete = progress_file(output), output.exists() and not partial_file(output).exists()
    remove = f"remove {path.name} and {partial_file(output).name}"
    if is_complete:
        remove = "remove it, or name another file"
    damaged = UserError(f"--output {output}: {path.name} is damaged or missing; {remove}")
    if is_complete and not path.exists():
        problem = f"it is complete, but nothing tells from what: {path.name} stays only with --resume"
        raise UserError(f"--output {output}: {problem}; {remove}")
    try:
        state = read_json(path)
        size = partial_file(output).stat().st_size if partial_file(output).exists() else 0
        is_whole = all(type(state[key]) is int and state[key] >= 0 for key in ("rows", "bytes"))
        before = dict(state["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged from error
    changed = [key for key in {**before, **identity} if before.get(key) != identity.get(key)]
    if changed:
        what = "it" if is_complete else "its part"
        problem = f"{what} was written with another {', '.join(sorted(changed))}"
        raise UserError(f"--output {output}: {problem}; use the same again, or {remove}")
    if not is_whole or (size < state["bytes"] and not is_complete):
        raise damaged
    return {**state, "is_complete": is_complete}


# Blocks of rows -----------------------------------------------------------------------------------


def _flat(answer: dict) -> dict:
    """Return an answer with a column for each score."""
    flat = {key: value for key, value in answer.items() if key != "scores"}
    return flat | {f"score_{name}": score for name, score in answer["scores"].items()}


def _csv_block(lines: list[dict], *, with_header: bool) -> bytes:
    flat = [_flat(line) for line in lines]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if with_header:
        writer.writerow(flat[0])
    for line in flat:
        writer.writerow([_csv_cell(value) for value in line.values()])
    return text.getvalue().encode("utf-8", "backslashreplace")


def _csv_cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


def _arrow_block(answers: list[dict], columns: pa.Table | None) -> bytes:
    """Return a block as a stream of Arrow, with the kept columns as they were read."""
    import pyarrow as pa

    table = pa.Table.from_pylist([_flat(answer) for answer in answers])
    if "labels" in table.column_names:  # of texts without any, else without a type
        labels = pa.array(table["labels"].to_pylist(), pa.list_(pa.string()))
        table = table.set_column(table.column_names.index("labels"), "labels", labels)
    if columns is not None:
        names = _kept_names(columns, answers)
        for position, (name, column) in enumerate(zip(names, columns.columns), start=1):
            table = table.add_column(position, name, column)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _write_parquet(blocks: Path, target: Path) -> None:
    """Write streams of Arrow, one behind the other, as one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.memory_map(str(blocks)) as source, contextlib.ExitStack() as stack:
        writer, position = None, 0
        while position < source.size():
            source.seek(position)
            reader = pa.ipc.open_stream(source)
            table = reader.read_all()
            position = source.tell()
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(target, table.schema))
            writer.write_table(table.cast(writer.schema))
    with open(target, "rb") as file:
        os.fsync(file.fileno())
