"""Under torchrun, on one machine and on two: a killed worker's job goes on by itself, and a
failing process ends the others with its own message.

The two machines are network name spaces with a cable between them: each has its own addresses and
ports, and sees nothing else of the other.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, heavy

FLAGS = [
    "--max-train-samples",
    85,
    "--grad-accum",
    3,
    "--epochs",
    4,
    "--max-length",
    20,
    "--lr",
    "3e-3",
    "--dropout",
    0.1,
    "--save-every",
    1,
    "--batch-size",
    4,
]


@pytest.fixture(scope="module")
def flags(tiny_model, sentences_csv, cache_dir):
    return ["--model", tiny_model, "--dataset", sentences_csv, "--cache-dir", cache_dir, *FLAGS]


def start(folder: Path | None, flags: list, *options) -> subprocess.Popen:
    """Start two processes under torchrun."""
    command = [
        Path(sys.executable).with_name("torchrun"),
        "--nproc-per-node",
        "2",
        *options,
        "train_classifier.py",
        *flags,
        *(["--output-dir", folder] if folder else []),
    ]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def wait_for_checkpoint(folder: Path, job: subprocess.Popen):
    while not list(folder.glob("checkpoints/step-*")):
        assert job.poll() is None, job.communicate()
        time.sleep(0.002)


def workers(job: subprocess.Popen) -> list[int]:
    """Return the processes that torchrun started."""
    return [int(child) for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]


def said_by_us(stderr: str) -> list[str]:
    """Return the lines of the script itself; torchrun repeats one at the end of its own."""
    return [line for line in stderr.splitlines() if line.startswith("train_classifier.py: error: ")]


def same_end(folder: Path, other: Path) -> bool:
    first, second = (
        load_file(max((path / "checkpoints").iterdir()) / "model.safetensors") for path in (folder, other)
    )
    scores = [
        {
            name: value
            for name, value in json.loads((path / "metrics.json").read_text()).items()
            if "second" not in name and "bytes" not in name
        }
        for path in (folder, other)
    ]
    return all(torch.equal(first[name], second[name]) for name in first | second) and scores[0] == scores[1]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """An uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    job = start(folder, flags)
    _, stderr = job.communicate(timeout=200)
    assert job.returncode == 0, stderr
    return folder


@pytest.mark.slow
def test_a_job_whose_worker_is_killed_goes_on_from_the_last_checkpoint_by_itself(flags, whole, tmp_path):
    job = start(tmp_path / "run", flags, "--max-restarts", 1)
    wait_for_checkpoint(tmp_path / "run", job)
    os.kill(workers(job)[1], signal.SIGKILL)
    stdout, stderr = job.communicate(timeout=200)
    assert job.returncode == 0, stderr
    assert stdout.count("resume   ") == 1 and "/checkpoints/step-" in stdout
    assert same_end(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_job_that_is_started_again_takes_no_run_of_another_job_as_its_own(
    flags, whole, tmp_path, run_script
):
    """Neither at once nor when torchrun starts its processes again."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = run_script(
        "torchrun",
        "--nproc-per-node",
        2,
        "--max-restarts",
        1,
        "train_classifier.py",
        *flags,
        "--lr",
        "2e-3",
        "--output-dir",
        tmp_path / "run",
        check=False,
    )
    assert done.returncode != 0, done.stderr
    assert sum("it holds another run" in line for line in said_by_us(done.stderr)) == 2, done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_restarted_job_goes_on_from_the_newest_checkpoint_not_from_the_one_that_it_began_with(
    flags, whole, tmp_path
):
    """--resume names the folder: --output-dir is not needed as well."""
    shutil.copytree(whole, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    oldest = min((tmp_path / "run" / "checkpoints").iterdir())
    job = start(None, [*flags, "--resume", oldest], "--max-restarts", 1)
    while newest.exists():  # until the job has begun, which removes it
        assert job.poll() is None, job.communicate()
        time.sleep(0.002)
    while not newest.exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.0005)
    os.kill(workers(job)[1], signal.SIGKILL)
    stdout, stderr = job.communicate(timeout=200)
    assert job.returncode == 0, stderr
    assert [line.split(": after")[0] for line in stdout.splitlines() if line.startswith("resume ")] == [
        f"resume   {oldest}",
        f"resume   {newest}",
    ]
    assert same_end(tmp_path / "run", whole)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_the_run_can_be_resumed(flags, whole, tmp_path):
    # torchrun's signal is for the group that a loader's worker would be in
    job = start(tmp_path / "run", [*flags, "--num-workers", 1])
    wait_for_checkpoint(tmp_path / "run", job)
    job.terminate()
    _, stderr = job.communicate(timeout=200)
    assert job.returncode != 0
    assert stderr.count(f"stopped by SIGTERM; continue with --resume {tmp_path / 'run'}") == 1, stderr
    job = start(tmp_path / "run", [*flags, "--resume"])
    _, stderr = job.communicate(timeout=200)
    assert job.returncode == 0 and same_end(tmp_path / "run", whole), stderr


MISTAKE = ["--text-column", "txt"]
SAID = "train_classifier.py: error: split train: no column 'txt'"


def test_a_mistake_is_said_once(flags, forking):
    """By the first process; the second waits for torchrun, which ends all when one has failed."""
    forking.begin(command=list(map(str, ["train_classifier.py", *flags, *MISTAKE])), world=2)
    [first, *_] = forking.processes()
    while (left := forking.processes())[:1] == [first]:
        time.sleep(0.01)
    [second] = left
    os.kill(second, signal.SIGTERM)
    assert forking.wait() == [2, -signal.SIGTERM]
    [line] = [*said_by_us(forking.said()), *said_by_us(forking.said(rank=1))]
    assert line.startswith(SAID)


@pytest.mark.slow
def test_torchrun_ends_with_a_mistake_that_is_said_once(flags, run_script):
    torchrun = ["torchrun", "--nproc-per-node", 2]
    done = run_script(*torchrun, "train_classifier.py", *flags, *MISTAKE, check=False)
    assert done.returncode != 0
    [line] = said_by_us(done.stderr)
    assert line.startswith(SAID)
    # torchrun's own forty lines end with it
    assert done.stderr.splitlines()[-2].endswith(line) and set(done.stderr.splitlines()[-1]) == {"="}


RESTARTS = "error: --output-dir: torchrun with --max-restarts needs it"


def test_restarts_want_a_folder_to_find_their_run_in(flags, call_script):
    done = call_script("train_classifier.py", *flags, check=False, TORCHELASTIC_MAX_RESTARTS="1")
    assert done.returncode == 2 and RESTARTS in done.stderr


@pytest.mark.slow
def test_torchrun_tells_of_its_restarts(flags, run_script):
    torchrun = ["torchrun", "--nproc-per-node", 1, "--max-restarts", 1]
    done = run_script(*torchrun, "train_classifier.py", *flags, check=False)
    assert done.returncode != 0 and RESTARTS in done.stderr


ONE_FAILS = """
import os, train_classifier
from common import cli
from common.errors import UserError

def fail(*_):
    raise UserError("this process alone has found a mistake")

if os.environ["RANK"] == "1":
    train_classifier.count_examples = fail
cli.run(train_classifier.make_parser(), train_classifier.main)
"""


@pytest.mark.slow
def test_a_failing_process_ends_the_others_with_its_own_message(flags, run_script, tmp_path):
    (tmp_path / "one_fails.py").write_text(ONE_FAILS)
    started = time.monotonic()
    done = run_script(
        "torchrun",
        "--nproc-per-node",
        2,
        tmp_path / "one_fails.py",
        *flags,
        "--output-dir",
        tmp_path / "run",
        check=False,
        PYTHONPATH=str(ROOT),
    )
    assert done.returncode != 0 and time.monotonic() - started < 60
    mistake = "train_classifier.py: error: this process alone has found a mistake"
    assert said_by_us(done.stderr).count(mistake) == 1, done.stderr
    ours = done.stderr.partition("torch/distributed/elastic")[0]  # what follows is torchrun's own
    assert "Traceback" not in ours, ours


MACHINES = (f"nlp-{os.getpid()}-one", f"nlp-{os.getpid()}-two")
CABLE = f"""
ip netns add {MACHINES[1]}
ip link add nlp0 netns {MACHINES[0]} type veth peer name nlp0 netns {MACHINES[1]}
ip -n {MACHINES[0]} addr add 192.0.2.1/24 dev nlp0 && ip -n {MACHINES[1]} addr add 192.0.2.2/24 dev nlp0
for machine in {MACHINES[0]} {MACHINES[1]}; do
  ip -n $machine link set lo up && ip -n $machine link set nlp0 up
done
"""  # 192.0.2.0/24 is for examples (RFC 5737): no network has it
RENDEZVOUS = {
    "static": lambda rank: ["--node-rank", rank, "--master-addr", "192.0.2.1", "--master-port", 29500],
    "c10d": lambda rank: [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "192.0.2.1:29500",
        "--rdzv-id",
        "job",
        "--rdzv-conf",
        f"is_host={1 - rank}",
        "--local-addr",
        f"192.0.2.{rank + 1}",
    ],
}


@pytest.fixture(scope="module")
def machines():
    """Return a function that starts one process under torchrun on each of two machines."""
    if (
        shutil.which("ip") is None
        or subprocess.run(["ip", "netns", "add", MACHINES[0]], capture_output=True).returncode
    ):
        pytest.skip("no right to make network name spaces here")

    def start(folder: Path, flags: list, how: str, *within) -> list[subprocess.Popen]:
        torchrun, environment = (
            Path(sys.executable).with_name("torchrun"),
            {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "nlp0"},
        )
        commands = [
            [
                "ip",
                "netns",
                "exec",
                machine,
                *(within if rank else ()),
                torchrun,
                "--nnodes",
                2,
                "--nproc-per-node",
                1,
                "--max-restarts",
                1,
                *RENDEZVOUS[how](rank),
                "train_classifier.py",
                *flags,
                "--output-dir",
                folder,
            ]
            for rank, machine in enumerate(MACHINES)
        ]
        return [
            subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
            )
            for command in commands
        ]

    try:
        if subprocess.run(["sh", "-ec", CABLE], capture_output=True).returncode:
            pytest.skip("no right to lay a cable between network name spaces here")
        yield start
    finally:
        for machine in MACHINES:
            subprocess.run(["ip", "netns", "del", machine], capture_output=True)


@pytest.mark.parametrize(
    "how, killed", [heavy(how, killed) for how in ("static", "c10d") for killed in (0, 1)]
)
def test_a_job_on_two_machines_goes_on_when_a_worker_is_killed(how, killed, machines, flags, whole, tmp_path):
    """Their agents start new workers at different moments: one must not wait for a worker that is
    dead.
    """
    jobs = machines(tmp_path / "run", flags, how)
    wait_for_checkpoint(tmp_path / "run", jobs[0])
    os.kill(workers(jobs[killed])[0], signal.SIGKILL)
    said = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert said[0][0].count("resume   ") == 1 and said[1][0] == "", (
        "the first machine's process writes, the other's is silent"
    )
    assert same_end(tmp_path / "run", whole)


@pytest.mark.slow
def test_machines_without_a_common_file_system_are_told_so(machines, flags, tmp_path):
    """The second one has an empty folder where the first one writes."""
    (tmp_path / "runs").mkdir()
    within = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', tmp_path / "runs"]
    jobs = machines(tmp_path / "runs" / "run", flags, "static", *within)
    said = [job.communicate(timeout=250) for job in jobs]
    assert all(job.returncode for job in jobs)
    assert (
        f"--output-dir: process 1 does not see {tmp_path / 'runs' / 'run' / 'config.json'} as process 0 does;"
        " name a folder on a file system" in said[0][1]
    ), said
