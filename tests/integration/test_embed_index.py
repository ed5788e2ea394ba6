"""An index that survives: torchrun, signals, kills of every writer, two writers at once, through
the command line.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.search.index import open_snapshot
from common.search.manifest import entries_of, read_manifest
from conftest import ROOT, heavy, make_sentences, rows_by_id, write_lines


@pytest.mark.slow
def test_torchrun_gives_the_same_index(ok, sentences, tiny_embedder, cache_dir, run_script, tmp_path):
    sentences.write_text(sentences.read_text() + "copy,good film,pos,1\ncopy2,good film,pos,2\n")
    flags = (
        "index",
        sentences,
        "--id-column",
        "id",
        "--model",
        tiny_embedder,
        "--cache-dir",
        cache_dir,
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--block",
        "25",
        "--batch-tokens",
        "300",
        "--json",
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as torchrun does
        ok(*flags, "--index", tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    done = run_script(
        "torchrun", "--nproc-per-node", "2", "embed_search.py", *flags, "--index", tmp_path / "two"
    )
    assert json.loads(done.stdout)["rows"] == 62
    one, two = open_snapshot(tmp_path / "one"), open_snapshot(tmp_path / "two")
    assert (
        one.take(range(62)) == two.take(range(62))
        and (one.vectors_of(range(62)) == two.vectors_of(range(62))).all()
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_mistake_under_torchrun_is_said_once(run_script, tmp_path):
    done = run_script(
        "torchrun",
        "--nproc-per-node",
        "2",
        "embed_search.py",
        "index",
        "nowhere.csv",
        "--index",
        tmp_path / "ix",
        check=False,
    )
    mistake = "embed_search.py: error: nowhere.csv: no such file"  # torchrun repeats it, indented
    said = [line for line in done.stderr.splitlines() if line.startswith(mistake)]
    assert done.returncode != 0 and len(said) == 1, done.stderr


class RealJob:
    """Two processes of a script as torchrun starts them; a test's forked ones end without the
    seconds that Python takes to tidy up.
    """

    def begin(self, *, command: list[str], world: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(world),
            "TORCHELASTIC_RUN_ID": "as torchrun sets it",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        self.running = [
            subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]

    def processes(self) -> list[int]:
        return [process.pid for process in self.running]

    def wait(self) -> list[int]:
        self.stderr = [process.communicate(timeout=120)[1] for process in self.running]
        return [process.returncode for process in self.running]

    def said(self, *, rank: int = 0) -> str:
        return self.stderr[rank]


@pytest.mark.parametrize(
    "is_forked, number, code",
    [
        (True, signal.SIGINT, 130),
        heavy(True, signal.SIGTERM, 143),
        heavy(False, signal.SIGINT, 130),
        heavy(False, signal.SIGTERM, 143),
    ],
)
def test_a_signal_to_one_of_two_processes_ends_both_and_leaves_the_index(
    is_forked, number, code, forking, tiny_embedder, cache_dir, tmp_path
):
    write_lines(tmp_path / "texts.txt", [text for text, _ in make_sentences(3000)])
    flags = ["index", tmp_path / "texts.txt", "--model", tiny_embedder, "--cache-dir", cache_dir]
    flags += ["--device", "cpu", "--block", 64, "--index", tmp_path / "ix"]
    job = forking if is_forked else RealJob()
    job.begin(command=["embed_search.py", *map(str, flags)], world=2)
    while not (tmp_path / "ix" / "manifest.json").exists() or not open_snapshot(tmp_path / "ix").num_rows:
        time.sleep(0.02)
    # Ctrl-C reaches both, kill one
    for process in job.processes()[: 2 if number == signal.SIGINT else 1]:
        os.kill(process, number)
    codes, said, said_by_other = job.wait(), job.said(), job.said(rank=1)
    assert codes == [code, 1], said + said_by_other
    assert "the same command" in said and said_by_other.count("lost another process") == 1
    assert "Traceback" not in said + said_by_other and "terminate" not in said + said_by_other
    count = int(re.search(r"([\d,]+) texts of this run", said)[1].replace(",", ""))
    assert 0 <= open_snapshot(tmp_path / "ix").num_rows - count <= 64


def kill_at_random_moments(times: int, forking, tiny_embedder, cache_dir, tmp_path, seed: int):
    """Kill `index` `times` times, going on with the same command; after each kill all that was
    committed is there, and nothing wrong is.
    """
    texts = [text for text, _ in make_sentences(400)]
    write_lines(tmp_path / "texts.txt", texts)
    command = ["embed_search.py", "index", tmp_path / "texts.txt", "--model", tiny_embedder]
    command += ["--cache-dir", cache_dir, "--precision", "fp32", "--device", "cpu", "--block", "4"]
    generator, kills = random.Random(seed), 0

    def start(name: str) -> int:
        forking.begin(command=list(map(str, [*command, "--index", tmp_path / name])))
        return forking.processes()[0]

    for name in ("warm-up", "whole"):
        moment = time.monotonic()
        start(name)
        assert forking.wait() == [0]
    seconds, expected = time.monotonic() - moment, rows_by_id(tmp_path / "whole")
    assert sorted(text for text, _ in expected.values()) == sorted(texts)
    for run in range(10 * times):
        name = f"killed-{run}"
        while kills < times:
            child = start(name)
            time.sleep(generator.uniform(0, 0.6 * seconds))
            before = rows_by_id(tmp_path / name) if (tmp_path / name / "manifest.json").exists() else {}
            with contextlib.suppress(ProcessLookupError):  # it is done
                os.kill(child, signal.SIGKILL)
            if forking.wait() == [0]:  # it was done before the kill
                break
            kills += 1
            after = rows_by_id(tmp_path / name) if (tmp_path / name / "manifest.json").exists() else {}
            assert before.items() <= after.items() and after.items() <= expected.items()
        start(name)
        assert forking.wait() == [0] and rows_by_id(tmp_path / name) == expected
        if kills == times:
            break
    assert kills == times


def test_kills_lose_nothing(forking, tiny_embedder, cache_dir, tmp_path):
    kill_at_random_moments(2, forking, tiny_embedder, cache_dir, tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills_lose_nothing(forking, tiny_embedder, cache_dir, tmp_path):
    kill_at_random_moments(30, forking, tiny_embedder, cache_dir, tmp_path, seed=1)


WRITERS = {
    "update": ["--update", "--block", "4"],
    "delete": ["s1", "s2", "s9", "s17", "--skip-bad"],
    "compact": [],
}


def kill_at_events(events, command: str, forking, tiny_embedder, cache_dir, tmp_path):
    """Kill a command at the given events: each row is as it was or as it is to be, and the same
    command ends in the same rows and files.
    """
    texts = [text for text, _ in make_sentences(20)]
    for name, mark in (("old", ""), ("new", " monday")):
        write_lines(
            tmp_path / f"{name}.csv",
            [
                "id,text",
                *(f"s{number},{text}{mark if number % 3 == 0 else ''}" for number, text in enumerate(texts)),
            ],
        )
    model = ["--id-column", "id", "--model", tiny_embedder, "--cache-dir", cache_dir]
    model += ["--precision", "fp32", "--device", "cpu"]
    commands = {
        "update": ["index", tmp_path / "new.csv", *model],
        "delete": ["delete"],
        "compact": ["compact"],
    }

    def run(folder: Path, *flags, event: int = 0) -> int:
        line = ["embed_search.py", *map(str, flags), "--index", str(folder)]
        return forking.do(command=line, run=str(folder), event=event)[0]

    assert run(tmp_path / "start", "index", tmp_path / "old.csv", *model, "--block", "3") == 0
    assert run(tmp_path / "start", "delete", "s4") == 0
    before, kills = rows_by_id(tmp_path / "start"), 0
    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    assert run(tmp_path / "whole", *commands[command], *WRITERS[command]) == 0
    after = rows_by_id(tmp_path / "whole")
    for event in events:
        folder = tmp_path / f"killed-{event}"
        shutil.copytree(tmp_path / "start", folder)
        if run(folder, *commands[command], *WRITERS[command], event=event) == 0:
            break  # it has fewer events
        kills, found = kills + 1, rows_by_id(folder)
        if command == "update":
            assert found.keys() - {"s4"} == before.keys() and all(
                row in (before.get(key), after[key]) for key, row in found.items()
            )
        else:
            assert found in (before, after)
        assert run(folder, *commands[command], *WRITERS[command]) == 0 and rows_by_id(folder) == after
        entries = {*entries_of(read_manifest(folder)), "manifest.json"}
        assert {path.name for path in folder.iterdir()} == entries, "a writer removes its lock"
    return kills


@pytest.mark.parametrize(
    "command, events", [heavy("update", (17, 44)), ("delete", (12, 17)), heavy("compact", (14,))]
)
def test_kills_of_every_writer_lose_nothing(command, events, forking, tiny_embedder, cache_dir, tmp_path):
    assert kill_at_events(events, command, forking, tiny_embedder, cache_dir, tmp_path) == len(events)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command, least", [("update", 60), ("delete", 15), ("compact", 15)])
def test_kills_of_every_writer_at_every_event_lose_nothing(
    command, least, forking, tiny_embedder, cache_dir, tmp_path
):
    assert kill_at_events(range(1, 1000), command, forking, tiny_embedder, cache_dir, tmp_path) >= least


def test_two_processes_make_one_index(forking, embed, tiny_embedder, cache_dir, tmp_path):
    """Both find no index, both make one: the second waits and adds to what the first made."""
    texts = [text for text, _ in make_sentences(60)]
    flags = ["--model", tiny_embedder, "--cache-dir", cache_dir, "--device", "cpu", "--precision", "fp32"]
    flags += ["--block", "4", "--index", tmp_path / "ix", "--wait", "100"]
    for name, own in (("a", texts[:40]), ("b", texts[20:])):
        write_lines(tmp_path / f"{name}.txt", own)
    forking.begin(command=list(map(str, ["embed_search.py", "index", tmp_path / "a.txt", *flags])))
    code, _, stderr = embed("index", tmp_path / "b.txt", *flags)
    assert (forking.wait(), code) == ([0], 0), forking.said() + stderr
    assert sorted(text for text, _ in rows_by_id(tmp_path / "ix").values()) == sorted(texts)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), heavy(signal.SIGINT, 130)])
def test_an_interrupted_index_says_how_to_go_on(
    number, code, forking, tiny_embedder, cache_dir, embed, tmp_path
):
    write_lines(tmp_path / "texts.txt", [text for text, _ in make_sentences(3000)])
    flags = ["index", tmp_path / "texts.txt", "--model", tiny_embedder, "--cache-dir", cache_dir]
    flags += ["--device", "cpu", "--block", "4", "--index", tmp_path / "ix"]
    forking.begin(command=list(map(str, ["embed_search.py", *flags])))
    while not (tmp_path / "ix" / "manifest.json").exists() or not open_snapshot(tmp_path / "ix").num_rows:
        time.sleep(0.05)
    os.kill(forking.processes()[0], number)
    codes, stderr = forking.wait(), forking.said()
    assert codes == [code] and "the same command" in stderr and "Traceback" not in stderr
    said = int(re.search(r"([\d,]+) texts of this run", stderr)[1].replace(",", ""))
    committed = rows_by_id(tmp_path / "ix")
    assert 0 <= len(committed) - said <= 4  # a block may have been committed and not yet counted
    # goes on from there
    code, stdout, _ = embed("index", *flags[1:6], "--index", tmp_path / "ix", "--block", 1000, "--json")
    counts, whole = json.loads(stdout)["counts"], rows_by_id(tmp_path / "ix")
    assert code == 0 and (counts["unchanged"], counts["added"], len(whole)) == (
        len(committed),
        3000 - len(committed),
        3000,
    )
    assert committed.items() <= whole.items()
