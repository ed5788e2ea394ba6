"""How a text is headed on the screen; and the output file: one JSON line a text, whole batches at
a time.

So an interrupted run can go on after what is there.
"""

import json
import os
from pathlib import Path

from common.errors import UserError
from common.generation.completion import Completion

SHOWN_OF_A_PROMPT = 60  # characters
# what must be the same for a run to go on after a line
COMPARED = ("prompt_number", "sample", "prompt", "seed", "settings")


def heading(number: int, sample: int, prompt: str) -> str:
    """Return the line over a text on the screen, where there are several, with its line break."""
    short = " ".join(prompt.split())
    short = short if len(short) <= SHOWN_OF_A_PROMPT else short[: SHOWN_OF_A_PROMPT - 3] + "..."
    return f"--- prompt {number}, sample {sample}: {short}\n"


def line(row: Completion, *, seed: int, batch_seed: int, settings: dict) -> dict:
    """Return what is written of one text; `batch_seed`: the one that its batch was drawn from,
    which alone draws this batch again.
    """
    found = {
        "prompt_number": row.prompt.number + 1,
        "sample": row.sample + 1,
        "prompt": row.prompt.text,
        "text": row.text,
        "token_ids": row.token_ids,
        "finish_reason": row.finish_reason,
        "seed": seed,
        "batch_seed": batch_seed,
        "settings": settings,
    }
    return {**found, "logprobs": row.logprobs} if row.logprobs else found


def check_new(path: str, *, resume: bool):
    """Raise UserError unless `path` can be written: a new file in a folder that is there, or an
    older one to go on with.
    """
    file = Path(path)
    if file.is_dir() or path.endswith(os.sep):
        raise UserError(f"--output {path}: it is a folder; name a file in it, such as {file / 'texts.jsonl'}")
    if not file.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {file.parent}; make it first or name another")
    if file.exists() and not file.is_file():
        raise UserError(
            f"--output {path}: it is a device or a pipe, which can't be gone on with; name a file, or leave"
            " --output out and read standard output"
        )
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"--output {path}: no right to write there; name another file")
    if file.exists() and file.stat().st_size > 0 and not resume:
        raise UserError(
            f"--output {path}: it holds texts already; go on after them with --resume, or name a new file"
        )


def finished(path: str, expected: list[dict], *, group: int) -> list[dict]:
    """Return the lines of a file that a run can go on after: whole groups of `group`, each a text
    of the expected prompt and settings.

    `expected`: the lines of the whole run, with empty texts. A last line that an interruption cut
    off counts as not there. Raises UserError for a line that is no JSON or belongs to another run.
    """
    file = Path(path)
    written = file.read_bytes() if file.exists() else b""
    lines, kept = written.split(b"\n")[:-1], []  # what follows the last line break was cut off
    for number, (content, wanted) in enumerate(zip(lines, expected), start=1):
        try:
            kept.append(found := json.loads(content))
            different = [name for name in COMPARED if found[name] != wanted[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: not a line of this script's output; remove it, or name another file"
                " with --output"
            ) from error
        if different:
            raise UserError(
                f"{path}, line {number}: its {_words(different[0], found, wanted)}; --resume needs the same"
                " prompts and flags"
            )
    if len(lines) > len(expected):
        raise UserError(
            f"{path}: it holds {len(lines):,} texts and this run has {len(expected):,}; --resume needs the"
            " same prompts and flags"
        )
    return kept if len(kept) == len(expected) else kept[: len(kept) // group * group]


def _words(name: str, found: dict, wanted: dict) -> str:
    if name != "settings":
        return f"{name} is {found[name]!r}, this run's is {wanted[name]!r}"
    names = sorted(set(found["settings"]) | set(wanted["settings"]))
    first = next(key for key in names if found["settings"].get(key) != wanted["settings"].get(key))
    return f"{first} is {found['settings'].get(first)!r}, this run's is {wanted['settings'].get(first)!r}"


class Output:
    """An output file that is being written; each batch is on the disk before the next one
    starts.
    """

    def __init__(self, path: str, *, keep_lines: int):
        kept = Path(path).read_bytes().split(b"\n")[:keep_lines] if Path(path).exists() else []
        self.file = open(path, "ab")  # noqa: SIM115  (open as long as the run)
        self.file.truncate(sum(len(content) + 1 for content in kept))

    def write(self, lines: list[dict]):
        """Add the lines of a batch."""
        self.file.write(
            "".join(json.dumps(found, ensure_ascii=False) + "\n" for found in lines).encode(
                "utf-8", errors="replace"
            )
        )
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> int:
        """Close the file and return how many lines it holds."""
        self.file.close()
        return Path(self.file.name).read_bytes().count(b"\n")
