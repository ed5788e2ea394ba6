"""What a GPU needs for the same bits each time, with an operation for CPUs that PyTorch can't
repeat either; and the memory that a process keeps.
"""

import subprocess
import sys

import pytest
import torch

from common.errors import UserError
from common.runtime import choose_device, choose_precision, deterministic, explain_out_of_memory
from conftest import ROOT

GPU = torch.device("cuda")


def unrepeatable():
    # which of the two stays is open
    torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_on_a_gpu_an_operation_that_can_not_be_repeated_is_refused_with_the_hint():
    refused = pytest.raises(
        UserError,
        match=r"^put_ does not have a deterministic implementation, so that two runs may differ; leave it$",
    )
    with refused, deterministic(GPU, wanted=True, hint="leave it"):
        assert (
            torch.are_deterministic_algorithms_enabled()
            and not torch.utils.deterministic.fill_uninitialized_memory
        )
        unrepeatable()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("device, wanted", [(GPU, False), (torch.device("cpu"), True)])
def test_elsewhere_or_where_it_is_not_wanted_nothing_changes(device, wanted):
    with deterministic(device, wanted=wanted, hint=""):
        assert not torch.are_deterministic_algorithms_enabled()
        unrepeatable()


def test_another_error_stays_as_it_is():
    with pytest.raises(RuntimeError, match="shapes"), deterministic(GPU, wanted=True, hint=""):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.mark.parametrize("local_rank, refused", [(1, False), (2, True)])
def test_a_process_too_many_for_the_gpus_of_a_machine_is_refused(local_rank, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if refused:
        with pytest.raises(
            UserError, match=("--nproc-per-node: .* process 2 of this machine, which has 2; .*--device cpu")
        ):
            choose_device("auto", local_rank)
    else:
        assert choose_device("auto", local_rank) == torch.device("cuda", local_rank)


HEAP = """
import torch
from common.runtime import give_back_memory, keep_large_blocks, used_memory_bytes
cpu = torch.device("cpu")
keep_large_blocks()
blocks = [b"x" * (1 << 20) for _ in range(64)]  # of which the last stays: the heap can't just end earlier
used = [used_memory_bytes(cpu)]
del blocks[:-1]
used.append(used_memory_bytes(cpu))
give_back_memory()
print(*used, used_memory_bytes(cpu))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_memory_is_kept_until_it_is_given_back():
    """In a process of its own: what earlier tests left in a heap fills again at any moment."""
    done = subprocess.run([sys.executable, "-c", HEAP], cwd=ROOT, capture_output=True, text=True, check=True)
    whole, kept, given_back = map(int, done.stdout.split())
    assert whole - kept < 16 << 20 and kept - given_back > 48 << 20


def test_a_lack_of_memory_is_told_by_the_innermost_block():
    """Evaluation within training knows which flag helps; other mistakes and bugs stay what they are."""
    with (
        pytest.raises(UserError, match="^lower --eval-batch-size$"),
        explain_out_of_memory("lower --batch-size"),
        explain_out_of_memory("lower --eval-batch-size"),
    ):
        raise torch.OutOfMemoryError("no memory")
    for error in (UserError("another mistake"), RuntimeError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, explain_out_of_memory("lower --batch-size"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("capabilities", "has_onednn", "chosen"),
    [
        ({"avx512_bf16": True}, True, "bf16"),
        ({"architecture": "arm64", "bf16": True}, True, "bf16"),
        ({"architecture": "arm64", "bf16": True}, False, "fp32"),  # a Mac since the M2
        ({"avx512_f": True}, True, "fp32"),
    ],
)
def test_a_cpu_computes_in_bf16_where_that_is_fast(capabilities, has_onednn, chosen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    assert choose_precision("auto", torch.device("cpu")) == chosen
