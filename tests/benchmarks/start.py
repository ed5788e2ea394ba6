#!/usr/bin/env python
"""Start-up: what a person waits for before a command does its work.

Each command runs in a process of its own, round after round: seconds until it ends and until its
first output, processor seconds, peak memory, and how many modules it has loaded. The index that is
searched has random vectors, and the identity of the bundled model. PyTorch's import alone is
measured in the same rounds: nothing that computes starts before it has ended. The last line on
stdout is one JSON object; the seconds in its `ratios` are medians, of help the slowest.

  python tests/benchmarks/start.py                  # about two minutes on two cores
  python tests/benchmarks/start.py --rounds 1 --only search
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import environment
import torch
from tabulate import tabulate

from common import cli
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = str(ROOT / "docs" / "examples" / "sentences.txt")
WIDTH = 384

IMPORT = "import of PyTorch"
# name: the script and its flags; INDEX, CLASSIFIER and HOME are put in. Those whose name ends with
# "help" give `help_seconds`.
COMMANDS = {
    IMPORT: ["HOME/import.py"],
    "search help": ["embed_search.py", "search", "--help"],
    "embed_search help": ["embed_search.py", "--help"],
    "no such index": ["embed_search.py", "search", "--index", "HOME/nowhere", "a query"],
    "search cold": ["embed_search.py", "search", "--index", "INDEX", "a query about nothing"],
    "search --hybrid": ["embed_search.py", "search", "--index", "INDEX", "number 17", "--hybrid"],
    "similarity": ["embed_search.py", "similarity", SENTENCES],
    "delete": ["embed_search.py", "delete", "--index", "INDEX", "no such id", "--skip-bad"],
    "verify": ["embed_search.py", "verify", "--index", "INDEX"],
    "train_classifier help": ["train_classifier.py", "--help"],
    "no such data": ["train_classifier.py", "--dataset", "HOME/nowhere.csv"],
    "occupied folder": ["train_classifier.py", "--output-dir", "docs"],
    "predict": ["train_classifier.py", "--model", "CLASSIFIER", "--predict", "HOME/text.txt"],
    "generate help": ["generate.py", "--help"],
    "no such prompts": ["generate.py", "--prompts-file", "HOME/nowhere.txt"],
    "generate": ["generate.py", "--prompt", "Natural Language Processing is", "--stream"],
}
EXIT_CODES = {"no such index": 2, "no such data": 2, "occupied folder": 2, "no such prompts": 2}
# ratio: the command whose seconds it holds, and the figure
RATIOS = {
    "search_cold_seconds": ("search cold", "seconds"),
    "predict_seconds": ("predict", "seconds"),
    "first_token_seconds": ("generate", "first_output_seconds"),
}

# Peak memory is inherited from the process that starts another one: this one is small.
LAUNCH = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
with subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE) as process:
    process.stdout.read(1)
    first = time.perf_counter() - started
    process.stdout.read()
seconds = time.perf_counter() - started
used = resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({
    "seconds": seconds,
    "first_output_seconds": first,
    "cpu_seconds": used.ru_utime + used.ru_stime,
    "peak_memory_mb": used.ru_maxrss * unit / 1e6,
    "code": process.returncode,
}))
"""
# Runs a script as the main program and writes the number of modules at its end to a file.
COUNT = """
import atexit, runpy, sys
report, sys.argv = sys.argv[1], sys.argv[2:]
atexit.register(lambda: open(report, "w").write(str(len(sys.modules))))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="tests/benchmarks/start.py", description=__doc__)
    parser.add_argument("--rounds", type=cli.positive_int, default=3, help="medians are taken over these")
    parser.add_argument("--rows", type=cli.positive_int, default=100_000, help="rows of the index")
    parser.add_argument("--only", default="", help="measure only the commands with this in their name")
    parser.add_argument("--prepare", metavar="DIR", help=argparse.SUPPRESS)  # in a process of its own
    return parser


def make_index(folder: Path, rows: int):
    """Write an index of random unit vectors as the bundled model would have filled it."""
    import numpy as np
    import pyarrow as pa

    from common.runtime import start_runtime
    from common.search import segments
    from common.search.builder import settings_of
    from common.search.encoder import load_encoder
    from common.search.index import open_store
    from common.search.manifest import EncoderConfig
    from common.search.segments import vector_array

    encoder = load_encoder(EncoderConfig(), start_runtime("cpu", "fp32", 0))
    settings = settings_of(encoder, id_column=None, chunk_overlap=None)
    generator = np.random.default_rng(0)
    with open_store(folder, settings=settings) as store:
        for first in range(0, rows, 40_000):
            numbers = range(first, min(first + 40_000, rows))
            vectors = generator.standard_normal((len(numbers), WIDTH), dtype=np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            texts = [f"text number {number} says a few words about nothing at all" for number in numbers]
            columns = {
                segments.ID: pa.array([f"id {number}" for number in numbers]),
                segments.HASH: pa.array([bytes(32)] * len(numbers), pa.binary(32)),
                segments.CHUNK: pa.array([0] * len(numbers), pa.int32()),
                segments.NUM_CHUNKS: pa.array([1] * len(numbers), pa.int32()),
                segments.START: pa.array([0] * len(numbers), pa.int32()),
                segments.TEXT: pa.array(texts, pa.large_string()),
                segments.VECTOR: vector_array(vectors),
            }
            store.commit(pa.table(columns))


def make_classifier(folder: Path):
    """Write the bundled model with a head of random numbers for five classes."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from common import bundled

    source = bundled.model_folder(bundled.MINILM, kind="encoder")
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=5).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def run(name: str, home: Path, *launcher: str) -> str:
    """Run a command; return what the launcher prints."""
    places = {"INDEX": str(home / "index"), "CLASSIFIER": str(home / "classifier"), "HOME": str(home)}
    command = COMMANDS[name]
    for place, path in places.items():
        command = [part.replace(place, path) for part in command]
    script, *flags = command
    command = [*launcher, str(ROOT / script), *flags]
    # Python keeps what it has compiled, as it does by default: the first run compiles for the others
    known = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=known, check=True).stdout


def time_command(name: str, home: Path) -> dict:
    """Return the figures of one run of a command in a process of its own."""
    found = json.loads(run(name, home, sys.executable, "-c", LAUNCH, sys.executable).splitlines()[-1])
    code = found.pop("code")
    if code != EXIT_CODES.get(name, 0):
        raise UserError(f"{name}: ended with exit code {code}")
    return found


def count_modules(name: str, home: Path) -> int:
    """Return how many modules a command has loaded at its end."""
    report = home / "modules"
    try:
        run(name, home, sys.executable, "-c", COUNT, str(report))
    except subprocess.CalledProcessError as error:
        if error.returncode != EXIT_CODES.get(name, 0):
            raise
    return int(report.read_text())


def ratios(medians: dict[str, dict]) -> dict[str, float]:
    """Return the seconds that the goals are about, as far as their commands were measured."""
    helps = [figures["seconds"] for name, figures in medians.items() if name.endswith("help")]
    found = {"help_seconds": max(helps)} if helps else {}
    for ratio, (name, figure) in RATIOS.items():
        if name in medians:
            found[ratio] = medians[name][figure]
    return found


def measure(flags, home: Path) -> dict[str, list[dict]]:
    """Run the rounds, interleaved; the first run of each command, which counts its modules, warms
    the disk's cache.
    """
    names = [name for name in COMMANDS if flags.only in name or name == IMPORT]
    modules = {name: count_modules(name, home) for name in names}
    rounds: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(flags.rounds):
        for name in names:
            rounds[name].append({**time_command(name, home), "modules": modules[name]})
    return rounds


def main(flags):
    if flags.prepare:
        home = Path(flags.prepare)
        make_index(home / "index", flags.rows)
        make_classifier(home / "classifier")
        (home / "text.txt").write_text("The striker scored twice in the final\n")
        print("{}")
        return
    header = environment.describe(torch.device("cpu"))
    environment.show(header)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [command for name, command in COMMANDS.items() if flags.only in name]
        if any({"INDEX", "CLASSIFIER"} & set(command) for command in chosen):
            environment.run_child(__file__, "--prepare", folder)
        (Path(folder) / "import.py").write_text("import torch\nprint(torch.__version__)\n")
        rounds = measure(flags, Path(folder))
    medians = {name: environment.median_of(measured) for name, measured in rounds.items()}
    for figures in medians.values():
        figures["times_import"] = figures["seconds"] / medians[IMPORT]["first_output_seconds"]
    columns = {
        "seconds": "seconds",
        "times_import": "times the import",
        "first_output_seconds": "to the first output",
        "cpu_seconds": "CPU seconds",
        "peak_memory_mb": "peak MB",
        "modules": "modules",
    }
    lines = [[name, *(figures[key] for key in columns)] for name, figures in medians.items()]
    headers = ["command", *columns.values()]
    print("\n" + tabulate(lines, headers, floatfmt=("", ".2f", ".2f", ".2f", ".2f", ".0f", ".0f")))
    print(f"\nmedians over {flags.rounds} rounds; an index of {flags.rows:,} rows, {WIDTH} dimensions")
    lowest = {name: min(entry["cpu_seconds"] for entry in measured) for name, measured in rounds.items()}
    found = ratios(medians)
    document = {"environment": header, "settings": vars(flags), "medians": medians, "lowest_cpu": lowest}
    print("\n" + json.dumps({"benchmark": "start", **document, "ratios": found, "rounds": rounds}))


if __name__ == "__main__":
    cli.run(make_parser(), main)
