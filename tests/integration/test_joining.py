"""Processes that come one after the other, some of them dead, and the name that those of an
attempt agree on.
"""

import concurrent.futures
import random
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from common import runtime
from common.errors import UserError
from common.runtime import attempt_name


@pytest.fixture
def store():
    """A store as torchrun keeps it, which outlives the processes that use it."""
    return TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=20))


def arrive(store, ranks, world_size: int, *, seed: int = 0) -> list[str]:
    """Let processes of the given ranks come one after the other, each with a connection of its
    own; return the names that they agree on.
    """
    generator = random.Random(seed)

    def come(rank: int, pause: float) -> str:
        time.sleep(pause)
        return attempt_name(
            TCPStore("127.0.0.1", store.port, None, False, timeout=timedelta(seconds=20)), rank, world_size
        )

    with concurrent.futures.ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(come, ranks, [generator.uniform(0, 0.3) for _ in ranks]))


def test_the_processes_of_an_attempt_agree_on_a_name_that_no_other_attempt_has(store):
    """However late each comes: it never takes the numbers of dead ones for those of its own
    attempt.
    """
    names = [arrive(store, [2, 0, 3, 1], 4, seed=attempt) for attempt in range(6)]
    assert all(len(set(attempt)) == 1 for attempt in names) and len({attempt[0] for attempt in names}) == 6


def test_processes_wait_for_one_that_has_drawn_a_number_and_died(store):
    store.set("number 1", "of one that died before it answered")
    answers = []
    waiting = threading.Thread(target=lambda: answers.extend(arrive(store, [0, 2], 3)))
    waiting.start()
    time.sleep(0.6)
    assert not answers
    (name,) = arrive(store, [1], 3)
    waiting.join()
    assert answers == [name, name]


def test_those_that_do_not_come_are_named(store, monkeypatch):
    monkeypatch.setattr(runtime, "JOIN_SECONDS", 0.5)
    store.set("number 1", "of one that died before it answered")
    with pytest.raises(UserError, match="torchrun: process 1, 3 of 4 has not joined within 0 minutes"):
        store.set("number 3", "of another")
        arrive(store, [0, 2], 4)


def test_a_process_that_has_been_replaced_does_not_join_under_the_rank_of_the_other(store, monkeypatch):
    """As one of a machine that was cut off for a while: without it the others still come
    together.
    """
    monkeypatch.setattr(runtime, "JOIN_SECONDS", 10.0)
    for seconds, number in ((0.6, 0), (0.8, 1)):  # the process itself comes within 0.3
        threading.Timer(seconds, store.set, [f"number {number}", "of the one in its place"]).start()
    with pytest.raises(UserError, match="torchrun: another process has taken rank 0 of 2"):
        arrive(store, [0], 2)


@pytest.mark.parametrize("address, port", [("127.0.0.1", "9"), ("127.0.0.1", "first"), ("no.invalid", "9")])
def test_variables_that_are_left_over_are_told_at_once(address, port, monkeypatch):
    """PyTorch would wait half an hour for a store that nobody keeps."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port}
    variables |= {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"torchrun: nothing answers at {address}:{port}"):
        runtime.start_runtime("cpu", "fp32", 0)
