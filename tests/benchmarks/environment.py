"""What the benchmarks share: the environment header, the machine's own limits, a process of its
own for each measurement, statistics.

Importing it puts the project's folder on the import path, so that a benchmark runs from any
folder: import it before the project.
"""

import datetime
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import scipy.stats
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import cli
from common.runtime import choose_precision
from common.training.tracking import versions

BF16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16")
TIMES = 15  # repetitions of a limit; the median of them counts
READ_BYTES = 1 << 28  # far more than any cache holds


def describe(device: torch.device) -> dict:
    """Return what a speed depends on: the processor, its cores and load, the threads in use, the
    versions, the date.
    """
    capabilities = torch.cpu.get_capabilities()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": any(capabilities.get(name) for name in BF16_CAPABILITIES),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "load_before": round(os.getloadavg()[0], 2),
        **versions(),
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
    }


def show(environment: dict):
    """Print the environment, one line an entry."""
    for name, value in environment.items():
        print(f"{name:<18} {value}")
    print(flush=True)


def limits(device: torch.device, *, rows: int, width: int) -> dict[str, float]:
    """Return the machine's own limits: `fp32_gflops` and `bf16_gflops` of matrix products, and
    `read_gb_per_second` of the memory.

    The product is a transformer's largest, its feed-forward layer: (rows, width) x (width, 4
    width), where the rows are a batch's tokens.
    """
    rates, inner = {}, 4 * width
    for name, dtype in (("fp32_gflops", torch.float32), ("bf16_gflops", torch.bfloat16)):
        if dtype == torch.bfloat16 and choose_precision("auto", device) == "fp32":
            rows //= 32  # emulated: a hundredth of the speed
        left, right = (
            torch.randn(rows, width, device=device).to(dtype),
            torch.randn(width, inner, device=device).to(dtype),
        )
        # no allocation is timed
        product = functools.partial(torch.matmul, left, right, out=left.new_empty(rows, inner))
        rates[name] = 2 * rows * width * inner / _median_seconds(product, device) / 1e9
    block = torch.ones(READ_BYTES // 4, device=device)
    return {**rates, "read_gb_per_second": READ_BYTES / _median_seconds(block.sum, device) / 1e9}


def show_limits(limits: dict):
    """Print the machine's limits in one line."""
    print(
        f"the machine's limits: matrix products {limits['fp32_gflops']:,.0f} GFLOP/s in fp32,"
        f" {limits['bf16_gflops']:,.0f} in bf16; memory is read at {limits['read_gb_per_second']:,.1f} GB/s",
        flush=True,
    )


def moment(device: torch.device) -> np.ndarray:
    """Return the time and this process's CPU time (2), in seconds, once a GPU has done what it was
    given.

    The difference of two is what lies between; other programs of a shared machine lengthen the
    first much more than the second.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return np.array([time.perf_counter(), time.process_time()])


def run_child(script: str, *arguments: str, **variables: str) -> dict:
    """Run a benchmark again in a process of its own, with the same flags and `arguments`, and with
    `variables` in its environment unless they are set there; return the JSON line that it prints
    last.

    Allocator settings, peak memory and library state belong to a process: contenders that share
    one change each other's figures. A child that fails ends the benchmark, with all that it wrote
    on stderr.
    """
    # Trainer spreads over all GPUs that it sees
    first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    child_environment = {"HF_HUB_OFFLINE": "1", **variables, **os.environ, "CUDA_VISIBLE_DEVICES": first_gpu}
    done = subprocess.run(
        [sys.executable, script, *sys.argv[1:], *arguments],
        capture_output=True,
        text=True,
        env=child_environment,
    )
    if done.returncode != 0:
        print(
            f"{done.stderr}{Path(script).name} {' '.join(arguments)}: ended with exit code {done.returncode}",
            file=sys.stderr,
        )
        sys.exit(max(done.returncode, 1))
    return json.loads(done.stdout.splitlines()[-1])


def variables(*, is_ours: bool) -> dict[str, str]:
    """Return what our scripts set for PyTorch's threads before they import it, for our contenders
    only.
    """
    return {"GOMP_SPINCOUNT": cli.GOMP_SPINS} if is_ours else {}


def median_of(rounds: list[dict]) -> dict:
    """Return the median of each number over the rounds, which are dicts with the same keys."""
    return {name: statistics.median(entry[name] for entry in rounds) for name in rounds[0]}


def paired_difference(own: list[float], peers: list[float]) -> dict:
    """Return the mean difference, pair by pair, and its 95 % interval by Student's t; `low` and
    `high` are None for a single pair.
    """
    found = [a - b for a, b in zip(own, peers)]
    mean = statistics.mean(found)
    if len(found) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(scipy.stats.t.ppf(0.975, len(found) - 1)) * statistics.stdev(found) / math.sqrt(len(found))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _median_seconds(work, device: torch.device) -> float:
    seconds = []
    for _ in range(TIMES + 3):  # the first three warm up
        started = moment(device)
        work()
        seconds.append((moment(device) - started)[0])
    return float(statistics.median(seconds[3:]))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or an ARM kernel, which gives no name
        return platform.processor() or platform.runtime()
