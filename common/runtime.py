"""The machine a script runs on: device, precision, threads, seeds, and its place among the
processes of torchrun.
"""

import contextlib
import ctypes
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch.distributed.rendezvous import rendezvous

from common.bundled import sha256
from common.errors import UserError
from common.joining import join_processes

SHARED_TRIES = 90  # a second each; network file systems keep what they saw for up to 60
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Where this process computes, in what precision, and which of how many processes it is."""

    device: torch.device
    precision: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the processes of this machine
    # torchrun's: it lives as long as the job, also when its processes are started again
    store: torch.distributed.Store | None = None

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    def say(self, *parts):
        """Print on the main process only."""
        if self.is_main:
            print(*parts, flush=True)

    def autocast(self):
        """Return the autocast context of this device and precision; it does nothing in fp32."""
        return torch.autocast(
            self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32"
        )

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes; the tensor itself when there is one."""
        if self.world_size > 1:
            torch.distributed.all_reduce(value)
        return value

    def broadcast_int(self, number: int) -> int:
        """Return the main process's number on every process."""
        return int(self.all_reduce_sum(torch.tensor(number if self.is_main else 0)).item())

    def all_reduce_max(self, number: int) -> int:
        """Return the highest of the processes' numbers on every process."""
        value = torch.tensor(number)
        if self.world_size > 1:
            torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return int(value.item())

    def all_gather_texts(self, text: str) -> list[str]:
        """Return the texts of all processes in the order of their ranks, sent as bytes, over the
        CPU: gather_object would pickle them.
        """
        if self.world_size == 1:
            return [text]
        own = torch.tensor(list(text.encode("utf-8")), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world_size)]
        torch.distributed.all_gather(sizes, torch.tensor([len(own)]))
        blocks = [own.new_zeros(max(map(int, sizes))) for _ in sizes]
        torch.distributed.all_gather(blocks, torch.nn.functional.pad(own, (0, len(blocks[0]) - len(own))))
        return [bytes(block[: int(size)].tolist()).decode("utf-8") for block, size in zip(blocks, sizes)]

    def barrier(self):
        """Wait until every process is here, on the CPU: a GPU would spin meanwhile, and NCCL gives
        up after minutes.
        """
        self.all_reduce_sum(torch.zeros(1))

    def broadcast_from_main(self, choose: Callable[[], object]):
        """Return on every process what `choose`, asked on the main one only, returned as JSON
        takes it; a UserError of it is raised on all.

        For what depends on files: of a network file system the processes can see different states.
        """
        decided = {}
        if self.is_main:
            try:
                decided = {"chosen": choose()}
            except UserError as error:
                decided = {"error": str(error)}
        decided = json.loads(self.all_gather_texts(json.dumps(decided))[0])
        if "error" in decided:
            raise UserError(decided["error"])
        return decided["chosen"]

    def began_run(self, folder: Path) -> bool:
        """Tell the main process whether this job began its run in a folder, before torchrun
        started its processes again.
        """
        return self.store is not None and self.store.check([f"run {folder.resolve()}"])

    def note_run(self, folder: Path):
        """Let `began_run` know, for as long as the job lasts, that its run is in this folder."""
        if self.store is not None:
            self.store.set(f"run {folder.resolve()}", "begun")

    def require_shared(self, path: Path, *, flag: str):
        """Raise UserError on every process unless all see the same file, as processes on machines
        without a common file system do not.
        """
        if self.world_size == 1:
            return
        for _ in range(SHARED_TRIES):
            seen = self.all_gather_texts(sha256(path) if path.is_file() else "")
            others = [str(rank) for rank, digest in enumerate(seen) if digest != seen[0]]
            if not others:
                return
            time.sleep(1)  # a network file system can show a new file late
        raise UserError(
            f"{flag}: process {', '.join(others)} does not see {path} as process 0 does; name a folder on a"
            " file system that all machines share"
        )

    @contextlib.contextmanager
    def local_main_first(self):
        """Let a process of each machine do it before the others there, which then find what it
        left in the cache.
        """
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def synchronize(self):
        """Wait until a GPU has done what it was given; on a CPU nothing is left open."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def describe(self) -> str:
        """Return one line for a person: device, threads or processes, precision."""
        where = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"{self.device.type}, {torch.get_num_threads()} threads"
        )
        many = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f"{where}{many}, {self.precision}" + (" autocast" if self.precision != "fp32" else "")


def start_runtime(device: str, precision: str, seed: int) -> Runtime:
    """Choose device and precision, join torchrun's processes if there are any, seed every
    generator.

    Raises UserError for a device or a precision that this machine does not have.
    """
    local_rank, world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)
    precision, rank = choose_precision(precision, chosen), int(os.environ.get("RANK", 0))
    store = next(rendezvous("env://"))[0] if world_size > 1 or "TORCHELASTIC_RUN_ID" in os.environ else None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1:
        # counts stay on the CPU: no sync with the GPU
        join_processes(store, rank, world_size, "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    keep_large_blocks()
    seed_everything(seed)
    return Runtime(chosen, precision, rank, world_size, local_rank, store)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the torch device for `auto`, `cpu`, `cuda` or `mps`. Raises UserError when this
    machine has none, or none for this process.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(candidate for candidate, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch finds none on this machine; use --device auto")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun --nproc-per-node: process {local_rank} of this machine has no GPU, for it has"
            f" {torch.cuda.device_count()}; start one process a GPU, or use --device cpu"
        )
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """Return `fp32`, `bf16` or `fp16`. `auto` takes bf16 where the processor computes in it, fp16
    on other GPUs, else fp32.

    On a CPU without bf16 instructions bf16 is emulated and slower than fp32, hence not chosen.
    Raises UserError for fp16 without CUDA: CPUs have no fast fp16, and its small range needs the
    loss scaling that is meant for GPUs.
    """
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"--precision fp16: only on CUDA, not on {device.type}; use bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return (
        "bf16"
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
        else "fp32"
    )


def seed_everything(seed: int):
    """Seed the generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def deterministic(device: torch.device, *, wanted: bool, hint: str):
    """Within, a GPU gives the same bits for the same inputs, as a CPU does anyway: without it
    atomic additions come in any order.

    Raises UserError, ending with `hint`, for an operation that PyTorch has no such
    implementation of (its notes on reproducibility list them).
    """
    if not wanted or device.type != "cuda":
        yield
        return
    # sums within the switch of eight GPUs come in any order (nccl #1497, pytorch #156381)
    os.environ.setdefault("NCCL_ALGO", "^NVLS")
    # cuBLAS repeats itself only with workspaces of a fixed size
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # nothing here reads what it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        found, _, _ = str(error).partition(", but you set 'torch.use_deterministic_algorithms")
        if found == str(error):
            raise
        raise UserError(f"{found}, so that two runs may differ; {hint}") from error
    finally:
        torch.use_deterministic_algorithms(False)


def keep_large_blocks(threshold: int = 1 << 30):
    """Keep glibc from returning freed blocks of up to `threshold` bytes to the system.

    Every step allocates and frees the same large activations; giving them back costs a page fault
    per 4 KiB on the next step (on CPU up to half of the time). Other C libraries have no such
    knob, and there this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # the numbers of glibc's malloc.h
        mallopt(M_MMAP_THRESHOLD, threshold)
        mallopt(M_TRIM_THRESHOLD, threshold)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that was in use so far: of the GPU on CUDA, else of this process
    (resident).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def stop_runtime():
    """Leave torchrun's process group, if this process is in one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
