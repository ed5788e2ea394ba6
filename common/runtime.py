"""Where a script runs: device, precision, memory, seeds, and this process's rank among those of
torchrun.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import random
import resource
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from common import terminal
from common.errors import UserError, lacks_memory, reading
from common.files import sha256

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A process may work for hours, such as tokenising, while the others wait for it. One that dies
# ends the wait at once, because its connections close.
WAIT_FOR_WORK = datetime.timedelta(days=1)
JOIN_SECONDS, POLL_SECONDS = 1800.0, 0.05  # the first is PyTorch's own default
CONNECT_SECONDS = 60.0  # to torchrun's store on another machine
SHARED_FILE_TRIES = 90  # one a second; network file systems cache what they saw for up to 60
Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Runtime:
    """The device and precision of this process, and its rank among the processes of the job."""

    device: torch.device
    precision: str  # "fp32", "bf16" or "fp16"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the processes on this machine
    # torchrun's key-value store; it lives as long as the job, across restarts of the processes
    store: torch.distributed.Store | None = None

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    @property
    def alone(self) -> "Runtime":
        """The same device, for work that this process does without the others."""
        return dataclasses.replace(self, rank=0, world_size=1)

    def share(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yield this process's share of the pieces of some work: every `world_size`-th. Each piece
        is that of one process; where there are fewer pieces than processes, some have none.
        """
        return itertools.islice(pieces, self.rank, None, self.world_size)

    def say(self, *parts: object) -> None:
        """Print on the main process only, above the progress bar if one is open, in lines that fit a
        terminal.
        """
        self.write(terminal.prose(" ".join(map(str, parts))))

    def write(self, line: str) -> None:
        """Print a line as `say` does, but unchanged: for another program."""
        if self.is_main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def autocast(self) -> torch.autocast:
        """Return the autocast context of this device and precision; it does nothing in fp32."""
        return torch.autocast(
            self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32"
        )

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes; it is added up in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(value)
        return value

    def all_reduce_max(self, number: int) -> int:
        """Return the highest of the processes' numbers on every process."""
        value = torch.tensor(number)
        if self.world_size > 1:
            torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return int(value.item())

    def all_gather_texts(self, text: str) -> list[str]:
        """Return the texts of all processes in the order of their ranks.

        They are sent as bytes over the CPU: gather_object would pickle them.
        """
        if self.world_size == 1:
            return [text]
        content = torch.from_numpy(np.frombuffer(text.encode("utf-8"), np.uint8).copy())
        return [part.numpy().tobytes().decode("utf-8") for part in self._all_gather(content)]

    def _all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors (n, ...) of all processes, in the order of their ranks; each may have
        another n.
        """
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world_size)]
        torch.distributed.all_gather(sizes, torch.tensor([len(own)]))
        longest = max(int(size) for size in sizes)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        if longest:
            torch.distributed.all_gather(parts, padded)
        return [part[: int(size)] for part, size in zip(parts, sizes)]

    def gather_rows(self, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return on every process the rows (n, columns) in float64 that `compute` returns on all of
        them, those of the first process first. A UserError of one is raised on all.
        """
        if self.world_size == 1:
            return compute().astype(np.float64, copy=False)
        with self.raised_on_all():
            own = compute().astype(np.float64, copy=False)
        return np.concatenate([part.numpy() for part in self._all_gather(torch.from_numpy(own))])

    @contextlib.contextmanager
    def raised_on_all(self) -> Iterator[None]:
        """Raise a UserError of the block, which every process runs, on all of them: one says it,
        and none waits for one that has ended.
        """
        if self.world_size == 1:
            yield
            return
        error = ""
        try:
            yield
        except UserError as raised:
            error = str(raised)
        if told := next(filter(None, self.all_gather_texts(error)), None):
            raise UserError(told)

    def require_same(self, state: str, problem: str) -> None:
        """Raise UserError on every process unless all of them have the same state of something."""
        states = self.all_gather_texts(state)
        others = [str(rank) for rank, other in enumerate(states) if other != states[0]]
        if others:
            raise UserError(f"torchrun: process {', '.join(others)} {problem}")

    def broadcast_from_main(self, choose: Callable[[], Any]) -> Any:
        """Return on every process what `choose` returns on the main one; the value must be JSON.

        For decisions that depend on files: on a network file system the processes can see
        different states. A UserError of `choose` is raised on all processes.
        """
        decided: dict[str, Any] = {}
        if self.is_main:
            try:
                decided = {"chosen": choose()}
            except UserError as error:
                decided = {"error": str(error)}
        decided = json.loads(self.all_gather_texts(json.dumps(decided))[0])
        if "error" in decided:
            raise UserError(decided["error"])
        return decided["chosen"]

    def barrier(self) -> None:
        """Wait for every process, on the CPU: a GPU would spin meanwhile, and NCCL gives up after
        minutes.
        """
        self.all_reduce_sum(torch.zeros(1))

    @contextlib.contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Run the block in one process of each machine first; the others then find its results in
        the cache. A UserError of the first ones is raised on all.
        """
        if not self.local_rank:
            with self.raised_on_all():
                yield
            return
        with self.raised_on_all():
            pass  # until the first ones are done
        yield

    def began_run(self, folder: Path) -> bool:
        """Return whether this job, before a restart by torchrun, began the run in this folder;
        main process only.
        """
        return self.store is not None and self.store.check([f"run {folder.resolve()}"])

    def note_run(self, folder: Path) -> None:
        """Remember for `began_run`, as long as the job lasts, that its run is in this folder."""
        if self.store is not None:
            self.store.set(f"run {folder.resolve()}", "begun")

    def require_shared(self, path: Path, *, flag: str) -> None:
        """Raise UserError on every process unless all of them see the same file.

        Processes on machines without a common file system do not.
        """
        if self.world_size == 1:
            return
        others: list[str] = []
        for _ in range(SHARED_FILE_TRIES):
            digests = self.all_gather_texts(sha256(path) if path.is_file() else "")
            others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
            if not others:
                return
            time.sleep(1)  # a network file system can show a new file late
        raise UserError(
            f"{flag}: process {', '.join(others)} does not see {path} as process 0 does; name a"
            " folder on a file system that all machines share"
        )

    def synchronize(self) -> None:
        """Wait until a GPU has finished its work; a CPU always has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def describe(self) -> str:
        """Return one line for the screen: device, threads, processes, precision."""
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        else:
            where = f"{self.device.type}, {torch.get_num_threads()} threads"
        processes = f", {self.world_size} processes" if self.world_size > 1 else ""
        autocast = " autocast" if self.precision != "fp32" else ""
        return f"{where}{processes}, {self.precision}{autocast}"


def start_runtime(device: str, precision: str, seed: int) -> Runtime:
    """Choose device and precision, join torchrun's processes if there are any, and seed every
    generator.

    Raises UserError for a device or a precision that this machine does not have.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = choose_device(device, local_rank)
    precision = choose_precision(precision, chosen)
    under_torchrun = world_size > 1 or "TORCHELASTIC_RUN_ID" in os.environ
    store = _connect_to_torchrun() if under_torchrun else None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if store is not None and world_size > 1:
        # gloo in addition to NCCL: counts stay on the CPU, without waiting for the GPU
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        _join_processes(store, rank, world_size, backend)
    keep_large_blocks()
    seed_everything(seed)
    return Runtime(chosen, precision, rank, world_size, local_rank, store)


def _connect_to_torchrun() -> torch.distributed.Store:
    """Return torchrun's key-value store. Raises UserError when nothing answers where it should be,
    such as for variables that are left over from a job.
    """
    address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    advice = "start the job with torchrun again; if this is none, unset TORCHELASTIC_RUN_ID"
    with reading(f"torchrun: nothing answers at {address}", advice):
        # torchrun's own store is there before its processes, and PyTorch would wait half an hour
        # for it; without torchrun, process 0 makes one, perhaps later
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        store, _, _ = next(rendezvous("env://"))
    return store


def check_compiler(device: torch.device) -> None:
    """Raise UserError unless torch.compile works here: on a CPU it needs a C++ compiler.

    Compiling an addition takes some seconds, and shows it before the data are read.
    """
    advice = "install a C++ compiler such as g++, or leave --compile out"
    with reading("--compile: PyTorch can't compile on this machine", advice):
        torch.compile(lambda numbers: numbers + 1)(torch.ones(8, device=device))


def stop_runtime() -> None:
    """Leave torchrun's process group, if this process is in one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the torch device for `auto`, `cpu`, `cuda` or `mps`.

    Raises UserError when this machine has none, or not enough for this process.
    """
    # in the order in which `auto` tries them
    has_mps = torch.backends.mps.is_available()
    available = {"cuda": torch.cuda.is_available(), "mps": has_mps, "cpu": True}
    if name == "auto":
        name = next(candidate for candidate, is_available in available.items() if is_available)
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch finds none on this machine; use --device auto")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun --nproc-per-node: there is no GPU for process {local_rank} of this machine,"
            f" which has {torch.cuda.device_count()}; start one per GPU, or use --device cpu"
        )
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """Return `fp32`, `bf16` or `fp16`; `auto` is bf16 where the processor computes in it, fp16 on
    other GPUs, else fp32.

    On a CPU without bf16 instructions, bf16 is emulated and slower than fp32, so `auto` does not
    choose it; nor on a Mac, whose processors have them, while PyTorch there lacks oneDNN, which
    uses them (pytorch/torchchat#1444). Raises UserError for fp16 without CUDA: CPUs have no fast
    fp16, and its small range needs loss scaling, which is meant for GPUs.
    """
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"--precision fp16: only on CUDA, not on {device.type}; use bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if has_bf16 and torch.backends.mkldnn.is_available() else "fp32"


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def deterministic(device: torch.device, *, wanted: bool, hint: str) -> Iterator[None]:
    """Make a GPU give the same bits for the same inputs within the block, as a CPU always does.

    Without it, atomic additions happen in any order. Raises UserError, ending with `hint`, for an
    operation without a deterministic implementation (PyTorch's notes on reproducibility list
    them).
    """
    if not wanted or device.type != "cuda":
        yield
        return
    # additions within the NVLink switch of eight GPUs happen in any order (nccl #1497, pytorch
    # #156381)
    os.environ.setdefault("NCCL_ALGO", "^NVLS")
    # cuBLAS repeats its bits only with fixed workspaces
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    # nothing here reads what it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        message, _, _ = str(error).partition(", but you set 'torch.use_deterministic_algorithms")
        if message == str(error):
            raise
        raise UserError(f"{message}, so that two runs may differ; {hint}") from error
    finally:
        torch.use_deterministic_algorithms(False)


def keep_large_blocks() -> None:
    """Keep glibc from returning freed blocks of up to 1 GiB to the system.

    Every optimizer step allocates and frees the same large activations; returning them costs a
    page fault per 4 KiB in the next step, up to half of the time on a CPU. Other C libraries have
    no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # the numbers in glibc's malloc.h
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**30)


def give_back_memory() -> None:
    """Return to the system what glibc keeps of freed memory, with `keep_large_blocks` all of it:
    after a model was read, some 30 MB. Other C libraries have no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def used_memory_bytes(device: torch.device) -> int:
    """Return the memory in use now in bytes: allocated on the GPU with CUDA, else resident in this
    process, or its peak so far where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_memory_bytes(device)
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far in bytes: allocated on the GPU with CUDA, else resident in
    this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory_bytes(device: torch.device) -> int | None:
    """Return about how much memory a process can still get: on the GPU with CUDA, else in this
    machine; None where the system does not tell.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception stands for a lack of memory, on any device."""
    if isinstance(error, torch.OutOfMemoryError) or lacks_memory(error):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error)  # MPS


@contextlib.contextmanager
def explain_out_of_memory(message: str) -> Iterator[None]:
    """Turn what the block raises where memory runs out, on any device, into a UserError."""
    try:
        yield
    except UserError:  # of a block within this one, which knows better what helps
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from error


def _join_processes(store: torch.distributed.Store, rank: int, world_size: int, backend: str) -> None:
    """Join the processes that torchrun started, in a part of its store that belongs to this
    attempt alone.

    This is not left to torch.distributed.init_process_group because torchrun keeps its store when
    it restarts failed workers, on one machine a little later than on another: in the same part of
    the store, a new worker could find the address of a dead one and wait for it for half an hour.
    """
    store = torch.distributed.PrefixStore(attempt_name(store, rank, world_size), store)
    timeout = datetime.timedelta(seconds=JOIN_SECONDS)
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    # The long wait is for the CPU's group only: a GPU waits for nothing but what is about to
    # arrive.
    world: Any = torch.distributed.group.WORLD
    world._get_backend(torch.device("cpu")).set_timeout(WAIT_FOR_WORK)


def attempt_name(store: torch.distributed.Store, rank: int, world_size: int) -> str:
    """Return a name that all processes of this attempt share, and none of an earlier attempt.

    Each process draws a random number and acknowledges a list of all numbers that has its own in
    it; the name is that of a list which all processes have acknowledged. A dead process's number
    may still be in the store, but it can't have acknowledged a list with a new number. Raises
    UserError when processes are missing.
    """
    own_number, deadline = uuid.uuid4().hex, time.monotonic() + JOIN_SECONDS
    number_keys = [f"number {other}" for other in range(world_size)]
    awaited = number_keys
    store.set(number_keys[rank], own_number)
    while time.monotonic() < deadline:
        if store.check(number_keys):
            numbers = [number.decode() for number in store.multi_get(number_keys)]
            if numbers[rank] != own_number:
                problem = f"another process has taken rank {rank} of {world_size}"
                raise UserError(f"torchrun: {problem}; start the job again")
            name = hashlib.sha256(" ".join(numbers).encode()).hexdigest()
            awaited = [f"{name} {other}" for other in range(world_size)]
            store.set(awaited[rank], "acknowledged")
            if store.check(awaited):
                return name
        time.sleep(POLL_SECONDS)
    missing = ", ".join(str(other) for other, key in enumerate(awaited) if not store.check([key]))
    raise UserError(
        f"torchrun: process {missing} of {world_size} has not joined within {JOIN_SECONDS / 60:.0f}"
        " minutes; look at its machine"
    )
