"""Texts on the screen, and the output file: one JSON line per text, written in whole batches, so
that an interrupted run can be resumed.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.cli import is_rank_0
from common.errors import UserError, shorten
from common.files import only_writer
from common.generation.completion import Completion, Run
from common.runtime import Runtime, peak_memory_bytes

PROMPT_WIDTH = 60  # characters of a prompt in the line above its text
# what must be the same for a run to continue after a line
COMPARED = ("prompt_number", "sample", "prompt", "seed", "settings")


def heading(number: int, sample: int, prompt: str) -> str:
    """Return the line above a text on the screen, where there are several, with its line break."""
    return f"--- prompt {number}, sample {sample}: {shorten(prompt, PROMPT_WIDTH)}\n"


def show_lines(lines: list[dict], *, with_headings: bool, first_is_shown: bool) -> None:
    """Show the texts of a batch; the first one may have been shown while it grew."""
    for index, line in enumerate(lines):
        if index == 0 and first_is_shown:
            print(flush=True)  # only its line break is missing
            continue
        above = heading(line["prompt_number"], line["sample"], line["prompt"]) if with_headings else ""
        print(above + line["text"], flush=True)


def show_summary(run: Run, runtime: Runtime) -> None:
    """Print the summary line on stderr, dim on a terminal."""
    if not runtime.is_main or not run.timing.new_tokens:
        return
    line = run.summary(peak_memory_bytes(runtime.device))
    if runtime.world_size > 1:
        line += " (process 0)"
    print(f"\x1b[2m{line}\x1b[0m" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Record:
    """What the output file says of each text besides the text: the run's seed and settings."""

    seed: int
    settings: dict

    def line(self, row: Completion, *, batch_seed: int) -> dict:
        """Return what is written for one text, as JSON takes it.

        `batch_seed` is the seed of its batch: with it as --seed, this batch alone is drawn again.
        """
        line = {
            "prompt_number": row.prompt.number + 1,
            "sample": row.sample + 1,
            "prompt": row.prompt.text,
            "text": row.text,
            "token_ids": row.token_ids,
            "finish_reason": row.finish_reason,
            "seed": self.seed,
            "batch_seed": batch_seed,
            "settings": self.settings,
        }
        return {**line, "logprobs": row.logprobs} if row.logprobs else line


def gather(lines: list[dict], runtime: Runtime) -> list[dict]:
    """Return the lines of all processes, in the order of their batches."""
    if runtime.world_size == 1:
        return lines
    parts = runtime.all_gather_texts(json.dumps(lines))
    return [line for part in parts for line in json.loads(part)]


def check_path(path: str, *, resume: bool) -> None:
    """Raise UserError unless `path` can be written: a new file in an existing folder, or one to
    resume.
    """
    file = Path(path)
    if file.is_dir() or path.endswith(os.sep):
        example = file / "texts.jsonl"
        raise UserError(f"--output {path}: it is a folder; name a file in it, such as {example}")
    if not file.parent.is_dir():
        raise UserError(
            f"--output {path}: there is no folder {file.parent}; make it first or name another file"
        )
    if file.exists() and not file.is_file():
        raise UserError(
            f"--output {path}: it is a device or a pipe, which cannot be resumed; name a file, or "
            "leave --output out and read standard output"
        )
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"--output {path}: no permission to write there; name another file")
    if file.exists() and file.stat().st_size > 0 and not resume:
        raise UserError(
            f"--output {path}: it already holds texts; continue after them with --resume, or name a new file"
        )


@contextlib.contextmanager
def only_run(path: str | None, *, resume: bool) -> Iterator[None]:
    """Let no other run write to the output file, if there is one, within the block.

    Raises UserError when it can't be written, and when another run is writing to it.
    """
    if path is not None:
        check_path(path, resume=resume)
    if path is None or not is_rank_0():  # the other processes of a job write nothing
        yield
        return
    with only_writer(Path(path), flag="--output"):
        yield


def finished_lines(path: str, rows: list[Completion], record: Record, *, texts_per_batch: int) -> list[dict]:
    """Return the lines of a file that a run can continue after: those of whole batches.

    `rows` are the texts of the whole run, still empty. A last line that an interruption cut short
    does not count. Raises UserError for a line that is not JSON or belongs to a different run.
    """
    file = Path(path)
    content = file.read_bytes() if file.exists() else b""
    encoded = content.split(b"\n")[:-1]  # what follows the last line break was cut short
    lines = []
    for number, (line, row) in enumerate(zip(encoded, rows), start=1):
        expected = record.line(row, batch_seed=record.seed)
        lines.append(_check_line(line, expected, name=f"{path}, line {number}"))
    if len(encoded) > len(rows):
        raise UserError(
            f"{path}: it holds {len(encoded):,} texts and this run has {len(rows):,}; --resume "
            "needs the same prompts and flags"
        )
    if len(lines) == len(rows):  # the last batch of a run may be smaller
        return lines
    num_batches = len(lines) // texts_per_batch
    return lines[: num_batches * texts_per_batch]


def _check_line(encoded: bytes, expected: dict, *, name: str) -> dict:
    try:
        line = json.loads(encoded)
        different = [key for key in COMPARED if line[key] != expected[key]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{name}: not a line of this script's output; remove it, or name another file with --output"
        ) from error
    if different:
        difference = _describe_difference(different[0], line, expected)
        raise UserError(f"{name}: its {difference}; --resume needs the same prompts and flags")
    return line


def _describe_difference(key: str, line: dict, expected: dict) -> str:
    if key == "settings":
        line, expected = line["settings"], expected["settings"]
        names = sorted(set(line) | set(expected))
        key = next(name for name in names if line.get(name) != expected.get(name))
    return f"{key} is {line.get(key)!r}, this run's is {expected.get(key)!r}"


class OutputFile:
    """A file that is being written; each batch is on the disk before the next one starts."""

    def __init__(self, path: str, *, keep_lines: int) -> None:
        """Open a file after its first `keep_lines` lines, and drop the rest."""
        kept = Path(path).read_bytes().split(b"\n")[:keep_lines] if Path(path).exists() else []
        self.path = Path(path)
        self.file = open(path, "ab")  # noqa: SIM115  (open as long as the run)
        self.file.truncate(sum(len(line) + 1 for line in kept))

    def write(self, lines: list[dict]) -> None:
        """Add the lines of a batch."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.file.write(text.encode("utf-8", errors="replace"))
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> int:
        """Close the file and return how many lines it holds."""
        self.file.close()
        return self.path.read_bytes().count(b"\n")
