"""How the processes that torchrun starts, and starts again, find each other."""

import datetime
import hashlib
import time
import uuid

import torch.distributed

from common.errors import UserError

PATIENCE = datetime.timedelta(days=1)  # with a process that is at work, such as tokenising; one that dies ends the wait at once
START_PATIENCE, POLL = 1800.0, 0.02  # seconds; the first is PyTorch's own


def join_processes(store: torch.distributed.Store, rank: int, world_size: int, backend: str):
    """Join the processes that torchrun started, in a part of its store that is this attempt's own.

    torchrun keeps its store when it starts failed workers again, on one machine a little later than on another. In the same part a new worker
    could find the address of one that is dead, and wait for it for half an hour.
    """
    store = torch.distributed.PrefixStore(name_of_attempt(store, rank, world_size), store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)


def name_of_attempt(store: torch.distributed.Store, rank: int, world_size: int) -> str:
    """Return a name that all processes of this attempt have, and none of an earlier one.

    Each process draws a number, and answers to a list of all that has its own on it; the name is that of a list to which all have answered. A dead
    process's number may still be there, but it can't have answered to a list with a new one. Raises UserError when some don't come.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + START_PATIENCE
    store.set(f"number {rank}", own)
    while time.monotonic() < deadline:
        missing = [other for other in range(world_size) if not store.check([f"number {other}"])]
        if not missing:
            numbers = [number.decode() for number in store.multi_get([f"number {other}" for other in range(world_size)])]
            name = hashlib.sha256(" ".join(numbers).encode()).hexdigest()
            if numbers[rank] == own:  # else this process has been replaced, and is about to be stopped
                store.set(f"{name} {rank}", "here")
            missing = [other for other in range(world_size) if not store.check([f"{name} {other}"])]
            if not missing:
                return name
        time.sleep(POLL)
    raise UserError(f"torchrun: process {', '.join(map(str, missing))} of {world_size} did not start within {START_PATIENCE // 60:.0f} minutes; look at its machine")
