"""On GPUs: what the other tests prove on a CPU, where a GPU takes another way. For a machine that
has one: python -m pytest -m gpu -n 0
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from conftest import ROOT, make_sentences, write_lines
from language_models import save_tiny_model

DEVICE, NUM_DEVICES = "cuda", torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_DEVICES == 0, reason="no GPU on this machine")]
FLAGS = ["--epochs", 3, "--max-length", 20, "--lr", "5e-3", "--batch-size", 8]
WITH_DROPOUT = [
    *FLAGS,
    "--batch-size",
    4,
    "--grad-accum",
    3,
    "--max-chunks",
    4,
    "--dropout",
    0.1,
    "--attention-dropout",
    0.1,
    "--save-every",
    1,
]
# bytes that PyTorch may take of the GPU: a batch of 84 texts through layers of 16,384 needs more,
# one of 21
# does not
ROOM = 2**30
LIMITED = """
import sys, torch, train_classifier
from common import cli
if torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(int(sys.argv.pop(1)) / total)
cli.run(train_classifier.make_parser(), train_classifier.main, sys.argv[1:])
"""


@pytest.fixture(scope="module")
def train(run_script, tiny_model, sentences_csv, cache_dir):
    """Return a function that trains the small model into a folder, and returns what the run came
    to.
    """

    def run(folder: Path, *flags, torchrun: list = ()) -> dict:
        launcher = ["torchrun", *torchrun] if torchrun else []
        run_script(
            *launcher,
            "train_classifier.py",
            "--model",
            tiny_model,
            "--dataset",
            sentences_csv,
            "--cache-dir",
            cache_dir,
            "--output-dir",
            folder,
            *flags,
        )
        return outcome(folder)

    return run


def outcome(folder: Path) -> dict:
    """Return the tensors of a run's last checkpoint and best model, and its losses."""
    last = max((folder / "checkpoints").iterdir())
    tensors = {
        f"{path.name} {name}": tensor
        for path in [*last.glob("*.safetensors"), folder / "best" / "model.safetensors"]
        for name, tensor in load_file(path).items()
        if not name.startswith("meter.")
    }
    return {**tensors, "losses": torch.tensor(losses(folder))}


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["validation/loss"] for line in lines if "validation/loss" in line]


def differing(first: dict, second: dict) -> list[str]:
    assert len(first) > 60 and first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def start(folder: Path, *command) -> subprocess.Popen:
    """Start a script and wait for its run's first checkpoint."""
    job = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    while not list(folder.glob("checkpoints/step-*")):
        assert job.poll() is None, job.communicate()
        time.sleep(0.002)
    return job


@pytest.fixture(scope="module")
def of_the_cpu(train, tmp_path_factory):
    """The losses of a training on the CPU in fp32, which learns: a model that does not would have
    those of any other.
    """
    folder = tmp_path_factory.mktemp("cpu") / "run"
    train(folder, *FLAGS, "--device", "cpu", "--precision", "fp32", "--max-chunks", 2)
    assert losses(folder)[-1] < 0.3 < losses(folder)[0]
    return losses(folder)


@pytest.mark.parametrize(
    "precision, tolerance, flags",
    [
        ("fp32", 1e-3, []),
        ("bf16", 2e-2, []),
        ("fp16", 1e-2, []),
        ("fp32", 1e-3, ["--compile"]),
        ("fp32", 1e-3, ["--gradient-checkpointing"]),
        ("fp32", 1e-3, ["--num-workers", 2]),
    ],
)
def test_a_training_follows_that_of_the_cpu(precision, tolerance, flags, train, of_the_cpu, tmp_path):
    if (
        precision == "bf16"
        and DEVICE == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        pytest.skip("this GPU has no bf16")
    train(tmp_path / "run", *FLAGS, "--device", DEVICE, "--precision", precision, "--max-chunks", 2, *flags)
    # on a CPU bf16 is off by 0.002
    assert losses(tmp_path / "run") == pytest.approx(of_the_cpu, abs=tolerance)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["precision"] == precision and (
        DEVICE == "cpu" or torch.cuda.get_device_name() in config["device"]
    )


def test_adapters_learn_as_on_the_cpu(train, tmp_path):
    for device in ("cpu", DEVICE):
        train(
            tmp_path / "runs" / device,
            *FLAGS,
            "--lora-rank",
            4,
            "--lr",
            "2e-2",
            "--device",
            device,
            "--precision",
            "fp32",
        )
    assert losses(tmp_path / "runs" / DEVICE) == pytest.approx(losses(tmp_path / "runs" / "cpu"), rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "auto", "fp16"])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_never_stopped(
    precision, train, tmp_path, tiny_model, sentences_csv, cache_dir
):
    flags = [*WITH_DROPOUT, "--device", DEVICE, "--precision", precision]
    whole = train(tmp_path / "whole", *flags)
    job = start(
        tmp_path / "run",
        sys.executable,
        "train_classifier.py",
        "--model",
        tiny_model,
        "--dataset",
        sentences_csv,
        "--cache-dir",
        cache_dir,
        *flags,
        "--output-dir",
        tmp_path / "run",
    )
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert not (tmp_path / "run" / "metrics.json").exists(), "it was killed before its end"
    assert differing(train(tmp_path / "run", *flags, "--resume"), whole) == []


def test_the_comparison_sees_another_seed(train, tmp_path):
    flags = [*WITH_DROPOUT, "--device", DEVICE]
    assert differing(train(tmp_path / "one", *flags), train(tmp_path / "other", *flags, "--seed", 1))


@pytest.mark.skipif(DEVICE == "cuda" and NUM_DEVICES < 2, reason="NCCL wants a GPU for each process")
@pytest.mark.parametrize("flags", [["--class-weights", "balanced"], ["--max-chunks", 2]])
def test_two_processes_equal_one(flags, train, tmp_path):
    flags = [*FLAGS, *flags, "--device", DEVICE, "--precision", "fp32", "--eval-batch-size", 5]
    train(tmp_path / "one", *flags)
    train(tmp_path / "two", *flags, "--batch-size", 4, torchrun=["--nproc-per-node", 2])
    assert losses(tmp_path / "one")[-1] < 0.3 and losses(tmp_path / "two") == pytest.approx(
        losses(tmp_path / "one"), rel=1e-3
    )
    one, two = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4) for name in one)


@pytest.mark.skipif(DEVICE == "cuda" and NUM_DEVICES < 2, reason="NCCL wants a GPU for each process")
def test_a_job_whose_worker_is_killed_goes_on_by_itself(
    train, tmp_path, tiny_model, sentences_csv, cache_dir
):
    """On all GPUs: more than two add up in an order that must be the same after the restart."""
    flags, world = [*WITH_DROPOUT, "--device", DEVICE], min(NUM_DEVICES, 8)
    whole = train(tmp_path / "whole", *flags, torchrun=["--nproc-per-node", world])
    job = start(
        tmp_path / "run",
        Path(sys.executable).with_name("torchrun"),
        "--nproc-per-node",
        world,
        "--max-restarts",
        1,
        "train_classifier.py",
        "--model",
        tiny_model,
        "--dataset",
        sentences_csv,
        "--cache-dir",
        cache_dir,
        *flags,
        "--output-dir",
        tmp_path / "run",
    )
    os.kill(int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[1]), signal.SIGKILL)
    stdout, stderr = job.communicate(timeout=200)
    assert job.returncode == 0 and stdout.count("resume   ") == 1, stdout + stderr
    assert differing(outcome(tmp_path / "run"), whole) == []


def test_a_batch_that_does_not_fit_is_halved_and_the_steps_stay_the_same(
    train, run_script, tiny_model, cache_dir, tmp_path
):
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(
        tiny_model, intermediate_size=16384, hidden_size=8, num_attention_heads=2
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    for path in tiny_model.glob("tokenizer*"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "long.csv").write_text(
        "text,label\n" + "".join(f"{text * 20},{label}\n" for text, label in make_sentences(120))
    )
    flags = [
        "--model",
        tmp_path / "model",
        "--dataset",
        tmp_path / "long.csv",
        "--cache-dir",
        cache_dir,
        "--max-train-samples",
        84,
        "--epochs",
        1,
        "--max-length",
        60,
        "--batch-size",
        84,
        "--eval-batch-size",
        4,
        "--warmup-ratio",
        0,
        "--device",
        DEVICE,
        "--precision",
        "fp32",
    ]
    (tmp_path / "limited.py").write_text(LIMITED)
    refused = run_script(
        tmp_path / "limited.py",
        ROOM,
        *flags,
        "--output-dir",
        tmp_path / "refused",
        check=False,
        PYTHONPATH=str(ROOT),
    )
    assert (
        refused.returncode == 2
        and "--batch-size 84: a batch of 60 tokens does not fit into memory" in refused.stderr
    ), refused.stderr
    halved = run_script(
        tmp_path / "limited.py",
        ROOM,
        *flags,
        "--auto-batch-size",
        "--output-dir",
        tmp_path / "halved",
        PYTHONPATH=str(ROOT),
    )
    assert "memory   84 chunks at once do not fit: " in halved.stdout
    run_script("train_classifier.py", *flags, "--output-dir", tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("halved", "whole"))
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5) for name in one)


@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize("flags", [["--top-k", 20, "--top-p", 0.9], []])
def test_generated_tokens_are_those_of_generate(precision, flags, run_script, tmp_path):
    save_tiny_model(tmp_path / "model")
    run_script(
        "generate.py",
        "--model",
        tmp_path / "model",
        "--prompt",
        "The quick brown fox",
        "--prompt",
        "Why",
        "--max-new-tokens",
        30,
        *flags,
        # exit code 1 when a token differs
        "--device",
        DEVICE,
        "--precision",
        precision,
        "--check",
    )


@pytest.mark.parametrize("precision, lowest", [("fp32", 0.99999), ("auto", 0.999)])
def test_vectors_are_those_of_the_cpu(precision, lowest, run_script, tiny_embedder, cache_dir, tmp_path):
    path = write_lines(tmp_path / "texts.txt", [text for text, _ in make_sentences(60)])
    found = {}
    for device, wanted in (("cpu", "fp32"), (DEVICE, precision)):
        run_script(
            "embed_search.py",
            "index",
            path,
            "--model",
            tiny_embedder,
            "--cache-dir",
            cache_dir,
            "--index",
            tmp_path / device / wanted,
            "--device",
            device,
            "--precision",
            wanted,
        )
        done = run_script(
            "embed_search.py",
            "search",
            "--index",
            tmp_path / device / wanted,
            "the film was good",
            "--top-k",
            60,
            "--json",
            "--device",
            device,
            "--precision",
            wanted,
            "--cache-dir",
            cache_dir,
        )
        found[device, wanted] = {
            result["text"]: result["score"] for result in json.loads(done.stdout)["queries"][0]["hits"]
        }
    one, other = found.values()
    assert len(one) == 60 and max(abs(one[text] - other[text]) for text in one) < 1 - lowest
    assert np.ptp(list(one.values())) > 0.01, "else the comparison sees nothing"


@pytest.mark.parametrize(
    "command",
    [("pairs", "--top-k", 99), ("duplicates", "--threshold", 0.95), ("cluster", "--threshold", 0.98)],
)
def test_pairs_of_a_gpu_are_those_of_a_cpu(command, ok, sentences, tmp_path):
    """fp32 products of another order of addition, and the same float64 scores of what is near."""
    ok("index", sentences, "--index", tmp_path / "ix", "--id-column", "id")
    for index in (("--index", tmp_path / "ix", "--block", 7), ("--index", tmp_path / "ix")):
        found = [ok(*command, *index, "--device", device, "--json") for device in (DEVICE, "cpu")]
        assert found[0] == found[1]
