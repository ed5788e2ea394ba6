"""What the processes of torchrun do together comes to what one process does: the same answers,
files and ties, and one line for a mistake.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, heavy, make_sentences, write_lines

MODEL_FLAGS = ("--precision", "fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def given(embed, tiny_embedder, tmp_path_factory) -> Path:
    """A folder with texts, some of them equal, an index of them and one of their chunks, queries,
    and judgements.
    """
    folder = tmp_path_factory.mktemp("together")
    texts = [text for text, _ in make_sentences(60)]
    rows = [f"s{n},{text}" for n, text in enumerate([*texts, *texts[:9]])]
    write_lines(folder / "texts.csv", ["id,text", *rows])
    for name, more in (("ix", ()), ("chunks", ("--chunk", "--max-length", 12, "--chunk-overlap", 4))):
        flags = ("--index", folder / name, "--id-column", "id", *more)
        assert embed("index", folder / "texts.csv", *flags)[0] == 0
    queries = [text for text, _ in make_sentences(150, seed=5)]
    write_lines(folder / "queries.txt", queries)
    judged = [json.dumps({"id": f"q{n}", "text": text}) for n, text in enumerate(queries)]
    write_lines(folder / "queries.jsonl", judged)
    write_lines(folder / "qrels.txt", [f"q{n} 0 s{n % 60} {n % 3}" for n in range(150)])
    return folder


INDEX, CHUNKS, TEXTS = "--index {given}/ix", "--index {given}/chunks", "{given}/texts.csv --id-column id"
BLOCKS = "--block 7 --batch-tokens 300"
COMMANDS = {
    "pairs": f"pairs {INDEX} --top-k 20 {BLOCKS}",
    "pairs of chunks": f"pairs {CHUNKS} --top-k 200 {BLOCKS}",
    "more processes than blocks": f"pairs {INDEX} --top-k 20 --block 999",
    "duplicates": f"duplicates {INDEX} --threshold 0.95 --pairs-file {{out}}.csv {BLOCKS}",
    "dedupe of texts": f"dedupe {{given}}/texts.csv --model {{model}} --output {{out}}.jsonl {BLOCKS}",
    "communities": f"cluster {INDEX} --threshold 0.98 --assign --output {{out}}.csv {BLOCKS}",
    "communities of chunks": f"cluster {CHUNKS} --threshold 0.98 --output {{out}}.csv {BLOCKS}",
    "k-means": f"cluster {INDEX} --clusters 3 --output {{out}}.csv {BLOCKS}",
    "search": f"search {INDEX} --queries {{given}}/queries.txt --top-k 70",
    "every kind of search": f"search {CHUNKS} --queries {{given}}/queries.txt --hybrid --approximate",
    "evaluate": "evaluate --texts {given}/texts.csv --model {model} --queries {given}/queries.jsonl"
    " --qrels {given}/qrels.txt --store int8 --per-query {out}.csv " + BLOCKS,
}


QUICK = ("pairs of chunks", "more processes than blocks", "duplicates", "communities of chunks")
QUICK += ("every kind of search",)


@pytest.mark.parametrize("command", [name if name in QUICK else heavy(name) for name in COMMANDS])
def test_two_processes_come_to_what_one_does(command, given, call_script, tiny_embedder, tmp_path):
    results = []
    for world in (1, 2):
        names = {"given": given, "model": tiny_embedder, "out": tmp_path / f"{world}"}
        flags = [*COMMANDS[command].format(**names).split(), *MODEL_FLAGS, "--json"]
        done = call_script("embed_search.py", *flags, world=world)
        written = [path.read_bytes() for path in sorted(tmp_path.glob(f"{world}.*"))]
        results.append((json.loads(done.stdout.replace(str(names["out"]), "OUT")), written))
    assert results[0] == results[1]


def test_of_three_processes_two_may_have_nothing_to_do(given, call_script):
    flags = ["embed_search.py", "duplicates", "--index", given / "ix", "--block", 999, *MODEL_FLAGS, "--json"]
    assert call_script(*flags, world=3).stdout == call_script(*flags).stdout


RAISED_ON_ALL = """
import sys
import numpy as np
from common.errors import UserError
from common.runtime import start_runtime

way, fails = sys.argv[1], int(sys.argv[2])
runtime = start_runtime("cpu", "fp32", 0)

def compute():
    if runtime.rank == fails:
        raise UserError(f"of {fails}")
    return np.full((runtime.rank, 2), runtime.rank)

said = "nothing"
try:
    if way == "gather":
        said = str(runtime.gather_rows(compute).tolist())
    elif way == "first":
        with runtime.local_main_first():
            compute()
    elif way == "all":
        with runtime.raised_on_all():
            compute()
    else:
        runtime.require_same(str(runtime.rank == fails), "differs")
except UserError as error:
    said = str(error)
said = runtime.all_gather_texts(said)
if runtime.is_main:
    print(*said, sep="\\n")
"""
WAYS = {
    ("gather", 9): ["[[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]"] * 3,
    ("gather", 1): ["of 1"] * 3,
    ("first", 9): ["nothing"] * 3,
    ("first", 0): ["of 0"] * 3,
    ("first", 2): ["nothing", "nothing", "of 2"],
    ("all", 2): ["of 2"] * 3,
    ("same", 9): ["nothing"] * 3,
    ("same", 1): ["torchrun: process 1 differs"] * 3,
}


@pytest.mark.parametrize("way, fails", WAYS)
def test_a_mistake_of_one_process_is_raised_on_all(way, fails, call_script, tmp_path):
    """None waits for one that has ended; `local_main_first` alone leaves a later process its own."""
    script = tmp_path / "script.py"
    script.write_text(RAISED_ON_ALL)
    done = call_script(script, way, fails, world=3)
    assert done.stdout.splitlines() == WAYS[way, fails]


MISTAKES = {
    "similarity texts.txt": "torchrun: similarity runs in one process; run it with python",
    "compare-models a b": "torchrun: compare-models runs in one process",
    "project --index {given}/ix --output-dir {out}": "torchrun: project runs in one process",
    "search --index {given}/ix": "search asks for queries in one process",
    "search - --query film": "torchrun: each process reads the texts",
    "pairs -": "torchrun: each process reads the texts",
    "evaluate --index {given}/ix --queries - --qrels {given}/qrels.txt": "torchrun: each process reads",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_what_several_processes_do_not_do(command, given, embed, tmp_path, monkeypatch):
    variables = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    write_lines(tmp_path / "texts.txt", ["a film"])
    flags = command.replace("texts.txt", str(tmp_path / "texts.txt")).replace("models a b", "models m1 m2")
    flags = flags.format(given=given, out=tmp_path / "new").split()
    code, _, stderr = embed(*flags)
    assert code == 2 and MISTAKES[command] in stderr and len(stderr.splitlines()) == 1, stderr


def environment_of(rank: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets."""
    job = {
        "WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **job, **own, "PYTHONPATH": str(ROOT)}


DIES = """
import os, runpy, signal, sys
from common.search import mining
rescored = mining.exact_pairs
def dies(*arguments):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return rescored(*arguments)
mining.exact_pairs = dies
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job(given, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ["embed_search.py", "duplicates", "--index", given / "ix", "--threshold", 0.5, "--block", 7]
    flags = [*map(str, script), *MODEL_FLAGS, "--pairs-file", str(tmp_path / "pairs.csv")]
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", DIES, *flags],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env=environment_of(rank, port),
        )
        for rank in range(2)
    )
    said, _ = (process.communicate(timeout=300)[1] for process in (first, second))
    assert (first.returncode, second.returncode) == (1, -signal.SIGKILL)
    assert said.splitlines() == [
        "embed_search.py: error: process 0 lost another process of the job; see its message"
    ]


@pytest.mark.slow
def test_torchrun_itself(given, run_script):
    """Two processes under torchrun, and mistakes that are said once: one that all find, one that
    the first alone finds, after the others have helped.
    """
    flags = ["embed_search.py", "pairs", "--index", given / "ix", "--block", "7", *MODEL_FLAGS, "--json"]
    one = run_script(*flags, OMP_NUM_THREADS="1")
    assert json.loads(run_script("torchrun", "--nproc-per-node", 2, *flags).stdout) == json.loads(one.stdout)
    wrong = {
        ("pairs", "--index", given / "ix", "--where", "nothing = 1"): "--where 'nothing = 1'",
        ("cluster", "--index", given / "ix", "--clusters", 999): "--num-clusters 999",
    }
    for command, message in wrong.items():
        done = run_script(
            "torchrun", "--nproc-per-node", 2, "embed_search.py", *command, *MODEL_FLAGS, check=False
        )
        said = [line for line in done.stderr.splitlines() if re.match(r"embed_search\.py: ", line)]
        assert done.returncode != 0 and len(said) == 1 and message in said[0], done.stderr
