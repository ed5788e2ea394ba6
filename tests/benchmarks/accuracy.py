#!/usr/bin/env python
"""What each way of reading long texts buys: test accuracy of train_classifier.py on the bundled
news, over chunk lengths and seeds.

  python tests/benchmarks/truncation.py  # 64 and 128 tokens, seeds 0, 1, 2: hours on two cores
  python tests/benchmarks/truncation.py --max-train-samples 400           # the table in docs/benchmarks.md

Runs that are already in --output-dir are read, not made again, so that it can be stopped and
started.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.training.run import TRUNCATIONS  # noqa: E402


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max-train-samples", type=int)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/truncation"))
    return parser


def accuracy(truncation: str, length: int, seed: int, args) -> float:
    """Return the test accuracy of one run, made now if it is not there."""
    folder = args.output_dir / f"{truncation}-{length}-{seed}"
    if not (folder / "metrics.json").is_file():
        more = ["--max-train-samples", args.max_train_samples] if args.max_train_samples else []
        command = [
            sys.executable,
            "train_classifier.py",
            "--truncation",
            truncation,
            "--max-length",
            length,
            "--seed",
            seed,
            "--epochs",
            args.epochs,
            *more,
            "--keep",
            1,
            "--output-dir",
            folder.resolve(),
        ]
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "metrics.json").read_text())["test_accuracy"]


def main(args):
    results = {}
    for seed in args.seeds:
        for length in args.lengths:
            for truncation in TRUNCATIONS:
                results.setdefault((truncation, length), []).append(accuracy(truncation, length, seed, args))
                print(
                    f"{truncation} at {length}, seed {seed}: {results[truncation, length][-1]:.4f}",
                    flush=True,
                )
    rows = [
        [
            truncation,
            *(
                f"{statistics.mean(results[truncation, length]):.4f}"
                f" ({', '.join(f'{value:.4f}' for value in results[truncation, length])})"
                for length in args.lengths
            ),
        ]
        for truncation in TRUNCATIONS
    ]
    print(
        "\n"
        + tabulate(
            rows,
            ["--truncation", *(f"{length} tokens: mean (seeds)" for length in args.lengths)],
            tablefmt="github",
        )
    )
    print(
        json.dumps(
            {
                "seeds": args.seeds,
                "results": {
                    f"{truncation} {length}": values for (truncation, length), values in results.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main(make_parser().parse_args())
