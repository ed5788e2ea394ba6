#!/usr/bin/env python
"""What settings of train_classifier.py buy: test and validation accuracy on the bundled news, and the
seconds that training took, over seeds.

Each setting is a set of flags, and each run a process of its own; the runs of one seed follow each
other, so that all settings meet the same machine. Runs that are already in --output-dir are read,
not made again, and one that was stopped goes on: it can be stopped and started. Differences to the
first setting are taken seed by seed. The last line on stdout is one JSON object.

  python tests/benchmarks/accuracy.py                     # eight settings, three seeds: hours on two cores
  python tests/benchmarks/accuracy.py --seeds 0 1 2 3 4 5 6 7 -- --precision fp32  # flags of all runs
  python tests/benchmarks/accuracy.py --preset truncation -- --max-train-samples 400
  python tests/benchmarks/accuracy.py --settings "" "--lr 5e-5" "--batch-size 32"
"""

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import environment
import torch
from tabulate import tabulate

from common import cli
from common.training.run import TRUNCATIONS

ROOT = Path(__file__).resolve().parents[2]
PRESETS = {
    "speed": [
        "",
        "--freeze-layers 3",
        "--freeze-layers 4",
        "--max-length 64",
        "--max-length 64 --freeze-layers 3",
        "--epochs 2 --freeze-layers 3",
        "--max-length 256",
        "--truncation head --max-length 256",
    ],
    "truncation": [
        f"--truncation {way} --max-length {length}" for length in (64, 128) for way in TRUNCATIONS
    ],
}
# column: its name in metrics.json
TESTED = "test accuracy"
FIGURES = {
    TESTED: "test_accuracy",
    "validation accuracy": "best_validation_accuracy",
    "validation loss": "best_validation_loss",
    "training seconds": "train_seconds",
}


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="tests/benchmarks/accuracy.py", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="speed", help="which settings")
    parser.add_argument("--settings", nargs="+", metavar="FLAGS", help="others, each in quotation marks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("flags", nargs="*", help="flags of all runs, after --")
    return parser


def run(setting: str, seed: int, flags) -> dict[str, float]:
    """Return the figures of one run, made now if it is not there."""
    parts = [*shlex.split(setting), *flags.flags]
    name = "-".join(part.lstrip("-").replace("/", "-") for part in [*parts, "seed", str(seed)])
    folder = flags.output_dir / name
    if not (folder / "metrics.json").is_file():
        # a flag that is given twice counts as it is given last
        command = [sys.executable, "train_classifier.py", "--epochs", "3", *parts, "--seed", str(seed)]
        command += ["--keep", "1", "--output-dir", str(folder.resolve()), "--resume-or-start"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    metrics = json.loads((folder / "metrics.json").read_text())
    found = {column: metrics[name] for column, name in FIGURES.items()}
    shown = ", ".join(f"{column} {value:.4g}" for column, value in found.items())
    print(f"seed {seed}  {setting or 'the defaults':<40} {shown}", flush=True)
    return found


def table(runs: dict[str, list[dict[str, float]]]) -> list[list]:
    """Return a row for each setting: means over the seeds, the median of the test accuracies, and
    their mean difference to the first setting with its 95 % interval, in points.
    """
    rows = []
    accuracies = {
        setting: [100 * figures[TESTED] for figures in measured] for setting, measured in runs.items()
    }
    first, *_ = accuracies.values()
    for setting, measured in runs.items():
        means = [statistics.mean(figures[column] for figures in measured) for column in FIGURES]
        median = statistics.median(figures[TESTED] for figures in measured)
        difference = environment.paired_difference(accuracies[setting], first)
        shown = f"{difference['mean']:+.2f}"
        if difference["low"] is not None:
            shown += f" ({difference['low']:+.2f} to {difference['high']:+.2f})"
        rows.append([setting or "the defaults", *means, median, shown])
    return rows


def main(flags):
    header = environment.describe(torch.device("cpu"))
    environment.show(header)
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in flags.seeds:
        for setting in flags.settings or PRESETS[flags.preset]:
            runs.setdefault(setting, []).append(run(setting, seed, flags))
    headers = ["flags", *FIGURES, "median", "points to the first"]
    floats = ("", ".4f", ".4f", ".4f", ".0f", ".4f", "")
    print("\n" + tabulate(table(runs), headers, floatfmt=floats, tablefmt="github"))
    print(f"\nmeans over the seeds {', '.join(map(str, flags.seeds))}")
    settings = {**vars(flags), "output_dir": str(flags.output_dir)}
    print(
        "\n"
        + json.dumps({"benchmark": "accuracy", "environment": header, "settings": settings, "runs": runs})
    )


if __name__ == "__main__":
    cli.run(make_parser(), main)
