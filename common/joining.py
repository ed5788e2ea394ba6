"""How the processes that torchrun starts, and starts again, find each other."""

import datetime
import hashlib
import time
import uuid

import torch
import torch.distributed

from common.errors import UserError

# with a process that is at work, such as tokenising; one that dies ends the wait at once, for its
# connections
# close
PATIENCE = datetime.timedelta(days=1)
START_PATIENCE, POLL = 1800.0, 0.05  # seconds; the first is PyTorch's own


def join_processes(store: torch.distributed.Store, rank: int, world_size: int, backend: str):
    """Join the processes that torchrun started, in a part of its store that is this attempt's own.

    torchrun keeps its store when it starts failed workers again, on one machine a little later
    than on another. In the same part a new worker could find the address of one that is dead, and
    wait for it for half an hour.
    """
    store = torch.distributed.PrefixStore(name_of_attempt(store, rank, world_size), store)
    torch.distributed.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=START_PATIENCE),
    )
    # a GPU waits only for what is about to come
    torch.distributed.group.WORLD._get_backend(torch.device("cpu")).set_timeout(PATIENCE)


def name_of_attempt(store: torch.distributed.Store, rank: int, world_size: int) -> str:
    """Return a name that all processes of this attempt have, and none of an earlier one.

    Each process draws a number, and answers to a list of all that has its own on it; the name is
    that of a list to which all have answered. A dead process's number may still be there, but it
    can't have answered to a list with a new one. Raises UserError when some don't come.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + START_PATIENCE
    awaited = drawn = [f"number {other}" for other in range(world_size)]
    store.set(drawn[rank], own)
    while time.monotonic() < deadline:
        if store.check(drawn):
            numbers = [number.decode() for number in store.multi_get(drawn)]
            if numbers[rank] != own:
                raise UserError(
                    f"torchrun: another process was started in the place of this one, process {rank} of"
                    f" {world_size}"
                )
            name = hashlib.sha256(" ".join(numbers).encode()).hexdigest()
            awaited = [f"{name} {other}" for other in range(world_size)]
            store.set(awaited[rank], "here")
            if store.check(awaited):
                return name
        time.sleep(POLL)
    missing = ", ".join(str(other) for other, key in enumerate(awaited) if not store.check([key]))
    raise UserError(
        f"torchrun: process {missing} of {world_size} has not joined this attempt within"
        f" {START_PATIENCE / 60:.0f} minutes; look at its machine"
    )
