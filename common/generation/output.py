"""Texts on the screen, and the output file: one JSON line per text, written in whole batches, so
that an interrupted run can be resumed.

Importing it is quick: `check_path` is called before PyTorch is loaded.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import is_rank_0
from common.errors import UserError, shorten
from common.files import only_writer

if TYPE_CHECKING:
    from common.generation.completion import Completion, Run
    from common.runtime import Runtime

OTHER_KINDS = (".csv", ".tsv", ".parquet", ".xlsx")  # endings that promise another kind of file
PROMPT_WIDTH = 60  # characters of a prompt in the line above its text
# what a run adds to a prompt; all else must be the same for a run to continue after a line
GENERATED = ("text", "token_ids", "finish_reason", "batch_seed", "logprobs")
ALWAYS = ("prompt_number", "sample", "prompt", "seed", "settings", *GENERATED[:-1])  # in each line
OWN_FIELDS = (*ALWAYS, "messages", "error", "logprobs")


# On the screen ------------------------------------------------------------------------------------


def heading(number: int, sample: int, prompt: str) -> str:
    """Return the line above a text on the screen, where there are several, with its line break."""
    return f"--- prompt {number}, sample {sample}: {shorten(prompt, PROMPT_WIDTH)}\n"


def show_lines(lines: list[dict], *, with_headings: bool, first_is_shown: bool) -> None:
    """Show the texts of a batch; the first one may have been shown while it grew."""
    for index, line in enumerate(lines):
        if index == 0 and first_is_shown:
            print(flush=True)  # only its line break is missing
            continue
        named = line["prompt_number"], line["sample"], line["prompt"]
        above = heading(*named) if with_headings else ""
        print(above + line["text"], flush=True)


def show_summary(run: Run, runtime: Runtime) -> None:
    """Print the summary line on stderr, dim on a terminal."""
    from common.runtime import peak_memory_bytes

    if not runtime.is_main or not run.timing.new_tokens:
        return
    line = run.summary(peak_memory_bytes(runtime.device))
    if runtime.world_size > 1:
        line += " (process 0)"
    print(f"\x1b[2m{line}\x1b[0m" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


# Lines of the file --------------------------------------------------------------------------------


def make_line(row: Completion, *, seed: int, batch_seed: int, settings: dict) -> dict:
    """Return what is written for one text, as JSON takes it: with it, what the run depends on.

    `batch_seed` is the seed of its batch: with it as --seed, this batch alone is drawn again.
    """
    prompt = row.prompt
    line = {
        "prompt_number": prompt.number + 1,
        "sample": row.sample + 1,
        "prompt": prompt.text,
        **prompt.cells,
        "text": row.text,
        "token_ids": row.token_ids,
        "finish_reason": row.finish_reason,
        "seed": seed,
        "batch_seed": batch_seed,
        "settings": settings,
    }
    more = {"messages": prompt.messages, "error": prompt.problem, "logprobs": row.logprobs}
    return line | {name: value for name, value in more.items() if value}


def gather(lines: list[dict], runtime: Runtime) -> list[dict]:
    """Return the lines of all processes, in the order of their batches."""
    if runtime.world_size == 1:
        return lines
    parts = runtime.all_gather_texts(json.dumps(lines))
    return [line for part in parts for line in json.loads(part)]


def _encode(line: dict) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode("utf-8", errors="replace")


# The file -----------------------------------------------------------------------------------------


def check_path(path: str, *, resume: bool) -> None:
    """Raise UserError unless `path` can be written: a new file in an existing folder, or one to
    resume.
    """
    file = Path(path)
    if file.suffix.lower() in OTHER_KINDS:
        like = file.with_suffix(".jsonl")
        raise UserError(f"--output {path}: lines of JSON are written, not {file.suffix}; name it {like}")
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        _check_new(path)
        return
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}; name another file") from error
    if stat.S_ISDIR(mode):
        example = file / "texts.jsonl"
        raise UserError(f"--output {path}: it is a folder; name a file in it, such as {example}")
    if not stat.S_ISREG(mode):
        raise UserError(
            f"--output {path}: it is a device or a pipe, which cannot be resumed; name a file, or "
            "leave --output out and read standard output"
        )
    with OutputFile(path) as opened:
        opened.check_content(resume=resume)


def _check_new(path: str) -> None:
    """Raise UserError unless a file can be made at `path`."""
    file = Path(path)
    if file.is_symlink():
        problem = "it is a link to a file that is not there"
        raise UserError(f"--output {path}: {problem}; name another file")
    if path.endswith(os.sep):
        example = file / "texts.jsonl"
        raise UserError(f"--output {path}: it is a folder; name a file in it, such as {example}")
    if not file.parent.is_dir():
        raise UserError(
            f"--output {path}: there is no folder {file.parent}; make it first or name another file"
        )
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: no permission to write there; name another file")


@contextlib.contextmanager
def open_file(path: str | None, *, resume: bool) -> Iterator[OutputFile | None]:
    """Open an output file that no other run writes to within the block; None where this process
    writes none: without --output, and in all processes of a job but the first.

    Raises UserError if the file holds what the run would not continue, or another run writes to it.
    """
    if path is None or not is_rank_0():
        yield None
        return
    with only_writer(Path(path), flag="--output"), OutputFile(path) as file:
        file.check_content(resume=resume)
        yield file


class OutputFile:
    """A file of texts, of which each batch is on the disk before the next one starts.

    A file that was made and is still empty at the end is removed.
    """

    def __init__(self, path: str) -> None:
        """Open a file. Raises UserError if it can't be opened or made."""
        self.path = Path(path)
        self.is_new = not self.path.exists()
        try:
            self.file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        except OSError as error:
            raise UserError(f"--output {path}: {error.strerror}; name another file") from error
        self.lines: list[dict] = []  # those that it held before

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_new and os.fstat(self.file.fileno()).st_size == 0:
            self.path.unlink(missing_ok=True)
        self.file.close()

    def check_content(self, *, resume: bool) -> None:
        """Raise UserError for a file that holds anything, unless it is to be resumed and begins as
        this script writes it.
        """
        start = b'{"prompt_number": 1, "sample": 1, "prompt": "'
        self.file.seek(0)
        found = self.file.read(len(start))
        if found and not resume:
            raise UserError(
                f"--output {self.path}: it already holds texts; continue after them with --resume,"
                " or name a new file"
            )
        if not start.startswith(found):
            raise UserError(
                f"--output {self.path}, line 1: not a line of this script's output, so --resume"
                " cannot continue it; name another file"
            )

    def resume(self, expected: Iterator[dict], *, texts_per_batch: int) -> None:
        """Keep the lines of whole batches in `lines`, and remove what follows them.

        `expected` are the lines of the whole run, whose texts are still empty. Only what this run has
        written is removed: the lines of a batch that is not whole, and a last line that an
        interruption cut short. Raises UserError, and leaves the file as it is, if it holds anything
        else.
        """
        self.file.seek(0)
        *encoded, rest = self.file.read().split(b"\n")
        lines = []
        for number, line in enumerate(encoded, start=1):
            wanted = next(expected, None)
            if wanted is None:
                raise UserError(
                    f"{self.path}: it holds {len(encoded):,} texts and this run has {number - 1:,};"
                    " --resume needs the same prompts and flags"
                )
            lines.append(_check_line(line, wanted, name=f"{self.path}, line {number}"))
        following = next(expected, None)
        self._check_rest(rest, following)
        if following is not None:  # the last batch of a run may be smaller
            lines = lines[: len(lines) // texts_per_batch * texts_per_batch]
        self.lines = lines
        self.file.truncate(sum(len(line) + 1 for line in encoded[: len(lines)]))

    def _check_rest(self, rest: bytes, following: dict | None) -> None:
        """Raise UserError unless what follows the last line break is the beginning of a line."""
        start = b""
        if following is not None:
            known = itertools.takewhile(lambda item: item[0] != "text", following.items())
            start = _encode(dict(known)).removesuffix(b"}") + b', "text": "'
        if not start.startswith(rest) and not (start and rest.startswith(start)):
            raise UserError(
                f"{self.path}: its last {len(rest):,} bytes are not of this script's output; remove"
                " them, or name another file with --output"
            )

    def write(self, lines: list[dict]) -> None:
        """Add the lines of a batch. Raises UserError if the system refuses them."""
        remaining = b"".join(_encode(line) + b"\n" for line in lines)
        try:
            self.file.seek(0, os.SEEK_END)
            while remaining:  # a disk that is nearly full takes a part
                remaining = remaining[self.file.write(remaining) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            raise UserError(
                f"--output {self.path}: it can't be written: {error.strerror}; after that is"
                " mended, continue with --resume"
            ) from error

    def num_lines(self) -> int:
        """Return how many whole lines the file holds."""
        return self.path.read_bytes().count(b"\n")


def _check_line(encoded: bytes, expected: dict, *, name: str) -> dict:
    """Return a line of the file as the run would write it, but for its text. Raises UserError if it
    has other fields or belongs to a different run.
    """
    try:
        line = json.loads(encoded)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict) or not line.keys() >= set(ALWAYS):
        problem = "not a line of this script's output"
        raise UserError(f"{name}: {problem}; remove it, or name another file with --output")
    nothing = object()  # stands for a missing field, which is not the same as null
    for key in dict.fromkeys([*expected, *line]):
        if key not in GENERATED and line.get(key, nothing) != expected.get(key, nothing):
            difference = _describe_difference(key, line, expected)
            raise UserError(f"{name}: its {difference}; --resume needs the same prompts and flags")
    return line


def _describe_difference(key: str, line: dict, expected: dict) -> str:
    if key == "settings" and isinstance(line["settings"], dict):
        line, expected = line["settings"], expected["settings"]
        names = sorted(set(line) | set(expected))
        key = next(name for name in names if line.get(name) != expected.get(name))
    theirs, ours = (shorten(repr(part.get(key)), 100) for part in (line, expected))
    return f"{key} is {theirs}, this run's is {ours}"
