"""What a run leaves while it goes: the run folder, config.json, metrics.jsonl, TensorBoard events,
progress bars.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from common import figures
from common.errors import UserError
from common.files import replace_file

REPORTED_PACKAGES = ("transformers", "datasets", "tokenizers", "evaluate", "scikit-learn")
CONFIG = "config.json"  # there when a run can go on, and whole
# all that a run leaves that is killed when it has hardly begun
UNFINISHED_CONFIG = re.compile(r"config\.json\.\d+")


def run_folder(output_dir: str | None, *, name: str) -> Path:
    """Return the folder for a new run: `output_dir`, else runs/<name>-<time>. Nothing is made yet.

    Raises UserError when it holds anything.
    """
    folder = Path(output_dir or f"runs/{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    if folder.is_dir() and any(not UNFINISHED_CONFIG.fullmatch(path.name) for path in folder.iterdir()):
        raise UserError(
            f"--output-dir {folder}: it holds another run or other files; name a new folder or remove it"
            " first"
        )
    return folder


def make_folder(folder: Path, *, needed_bytes: int):
    """Make the run folder, if it is not there. Raises UserError, and makes nothing, when the disk
    has no room for `needed_bytes` in it, those that it holds included.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(there).free, needed_bytes - _bytes_in(folder)
    if free < needed:
        raise UserError(
            f"--output-dir {folder}: the run needs {_size(needed)}, the disk has {_size(free)} free; free"
            " some or name a folder on another disk"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output-dir {folder}: can't be made: {error.strerror}; name another folder"
        ) from error


def _bytes_in(folder: Path) -> int:
    files = {
        (stat.st_dev, stat.st_ino): stat.st_size
        for stat in (path.stat() for path in folder.rglob("*") if path.is_file())
    }
    return sum(files.values())  # one with several names, as hard links are, takes its space once


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes >= 1e7 else f"{num_bytes / 1e3:,.0f} kB"


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    # which says for what device it was built
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in REPORTED_PACKAGES},
    }


class RunLog:
    """Writes a run's numbers, texts and pictures to metrics.jsonl and TensorBoard as they come."""

    def __init__(self, folder: Path, settings: dict, go_on: dict | None = None):
        """`go_on`: {"bytes": length of metrics.jsonl, "step": the last step} of a checkpoint; what
        was written after it is dropped.
        """
        for path in folder.iterdir():
            if UNFINISHED_CONFIG.fullmatch(path.name):
                path.unlink()
        replace_file(folder / CONFIG, json.dumps(settings, indent=2) + "\n")
        self.folder, self.settings = folder, settings
        # open as long as the run
        self.lines = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if go_on is not None:
            self.lines.truncate(go_on["bytes"])
        self.writer = SummaryWriter(str(folder), purge_step=None if go_on is None else go_on["step"] + 1)

    def numbers(self, step: int, values: dict[str, float]):
        """Add one line to metrics.jsonl and a point at `step` to each TensorBoard curve."""
        print(json.dumps({"step": step, **values}), file=self.lines, flush=True)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def position(self) -> int:
        """Return the length in bytes of metrics.jsonl, once the disk has it."""
        self.lines.flush()
        os.fsync(self.lines.fileno())
        return self.lines.tell()

    def confusion(self, step: int, tag: str, counts: list[list[int]], names: list[str]):
        """Add a confusion matrix as a picture."""
        self.writer.add_figure(tag, figures.confusion_matrix(counts, names, title=tag), step)

    def text(self, step: int, tag: str, markdown: str):
        """Add a text panel."""
        self.writer.add_text(tag, markdown, step)

    def finish(self, results: dict[str, float], *, curves: list[str]):
        """Write metrics.json and, for TensorBoard's HParams, the settings beside the last points
        of the named curves.

        SummaryWriter.add_hparams would write each result once more, as a curve of one point.
        """
        (self.folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        settings = {
            name: value for name, value in self.settings.items() if isinstance(value, (bool, int, float, str))
        }
        for summary in hparams(settings, dict.fromkeys(curves, 0.0)):
            self.writer.file_writer.add_summary(summary)

    def close(self):
        """Write out what is still in buffers."""
        self.writer.close()
        self.lines.close()


class NullLog:
    """Takes what RunLog takes and writes nothing: for every process but the first."""

    def __init__(self, folder: Path):
        self.folder = folder

    def numbers(self, step, values):
        pass

    def confusion(self, step, tag, counts, names):
        pass

    def text(self, step, tag, markdown):
        pass

    def finish(self, results, *, curves):
        pass

    def close(self):
        pass


def progress(batches, *, label: str, shown: bool = True) -> tqdm:
    """Return a progress bar around sized batches; it is drawn only on a terminal and vanishes when
    it is done.
    """
    return tqdm(
        batches,
        desc=label,
        unit="batch",
        leave=False,
        file=sys.stderr,
        dynamic_ncols=True,
        disable=None if shown else True,
    )  # None: off unless stderr is a terminal
