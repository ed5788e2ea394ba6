"""A run that is killed anywhere and started again ends as one that was never stopped, to
the bit.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForSequenceClassification

from common.files import find_damage, replace_folder, write_manifest
from conftest import KINDS, ROOT, heavy, may_mount
from language_models import needs_compiler

# 85 texts: 11 batches of 8, the last of 5; steps of 3 micro-batches, the last of 2. Evaluations and
# checkpoints fall between the ends of epochs too.
FLAGS = [
    "--max-train-samples",
    85,
    "--grad-accum",
    3,
    "--epochs",
    2,
    "--max-length",
    20,
    "--lr",
    "3e-3",
    "--dropout",
    0.1,
    "--log-every",
    3,
    "--save-every",
    2,
    "--eval-every",
    3,
    "--batching",
    "buckets",
]
# and the length of the text that holds them
TIMES = re.compile(r'"(train/)?examples_per_second": [^,}]+|"seconds": [^,}]+|"log_bytes": \d+')
EVENTS_OF_RANK_1 = 20  # at least, of a run of these flags: it writes few files


@pytest.fixture(scope="module")
def forked(forked_runs):
    """The runs of this module: all with the flags above."""
    forked_runs.flags = FLAGS
    return forked_runs


@pytest.fixture(scope="module")
def whole(forked, tmp_path_factory):
    """Return a function that gives the folder of an uninterrupted run of a kind, and its number of
    events.
    """
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            assert set(forked.run(folder, kind=kind)) == {0}, forked.said()
            made[kind] = folder, forked.num_events()
        return made[kind]

    return get


def outcome(folder: Path) -> dict:
    """Return all that a run came to: every tensor of its last checkpoint and best model, and every
    text without the times it took.
    """
    last = max((folder / "checkpoints").iterdir())
    tensors = {
        f"{path.relative_to(folder)} {name}": tensor
        for path in [*last.glob("*.safetensors"), folder / "best" / "model.safetensors"]
        for name, tensor in load_file(path).items()
    }
    texts = [
        last / "state.json",
        *last.glob("rank-*.json"),
        folder / "metrics.jsonl",
        folder / "predictions.csv",
        *(folder / "best").glob("*.json"),
    ]
    return {**tensors, **{str(path.relative_to(folder)): TIMES.sub("", path.read_text()) for path in texts}}


def differing(folder: Path, other: Path) -> list[str]:
    """Return what differs between the outcomes of two runs."""
    first, second = outcome(folder), outcome(other)
    assert len(first) > 60
    return [
        name
        for name in first.keys() | second.keys()
        if name not in first
        or name not in second
        or type(first[name]) is not type(second[name])
        or not (
            torch.equal(first[name], second[name])
            if isinstance(first[name], torch.Tensor)
            else first[name] == second[name]
        )
    ]


def kill_until_done(forked, folder: Path, events: list[int], kind: str, generator: random.Random) -> int:
    """Kill a run at each of the given events, starting it again each time, then let it end; return
    how often it was killed.
    """
    world, killed = KINDS[kind][0], 0
    for event in [*events, None]:
        going_on = ["--resume"] if (folder / "config.json").exists() else []
        codes = forked.run(folder, *going_on, kind=kind, event=event, rank=generator.randrange(world))
        assert set(codes) == {0} or -9 in codes, [forked.said(rank=rank) for rank in range(world)]
        killed += -9 in codes
        if set(codes) == {0}:
            break
    return killed


@pytest.mark.parametrize(
    "kind, seed",
    [
        ("one process", 0),
        heavy("one process", 1),
        heavy("one process, two loader workers", 2),
        ("two processes", 3),
        heavy("four processes", 18),
    ],
)  # more than two add up in an order of DDP's
def test_a_killed_run_ends_as_one_that_was_never_stopped(kind, seed, forked, whole, tmp_path):
    folder, events = whole(kind)
    generator = random.Random(seed)
    assert (
        kill_until_done(forked, tmp_path / "run", [generator.randrange(events // 3, events)], kind, generator)
        == 1
    )
    assert ": after step" in forked.said("stdout"), "it came after the first checkpoint"
    assert differing(tmp_path / "run", folder) == []


@pytest.fixture(scope="module")
def heads_of_32(tiny_model, tmp_path_factory) -> Path:
    """The small model with heads of the size for which attention.c computes attention in training."""
    folder = tmp_path_factory.mktemp("heads") / "model"
    config = AutoConfig.from_pretrained(tiny_model, hidden_size=64, num_attention_heads=2)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@needs_compiler
def test_a_run_with_attention_in_c_is_resumed_to_the_bit(forked, heads_of_32, cache_dir, tmp_path):
    # without it, a processor with bf16 instructions trains in bf16, which attention.c leaves to others
    flags = ["--model", heads_of_32, "--precision", "fp32"]
    assert forked.run(tmp_path / "whole", *flags) == [0], forked.said()
    assert list((cache_dir / "kernels").glob("attention-*.so")), "it was compiled"
    event = forked.num_events() // 2
    assert forked.run(tmp_path / "run", *flags, event=event, signal="SIGKILL") != [0]
    assert forked.run(tmp_path / "run", *flags, "--resume", tmp_path / "run") == [0], forked.said()
    assert differing(tmp_path / "run", tmp_path / "whole") == []


@needs_compiler
def test_without_attention_in_c_a_line_says_so_and_pytorch_computes_it(
    heads_of_32, sentences_csv, call_script, tmp_path
):
    flags = ["--model", heads_of_32, "--dataset", sentences_csv, "--max-steps", 2, "--keep", 0]
    flags += ["--device", "cpu", "--precision", "fp32", "--cache-dir", tmp_path / "cache"]
    losses = []
    for folder, compiler in (("without", "false"), ("with", "")):
        done = call_script(
            "train_classifier.py", *flags, "--output-dir", tmp_path / folder, CC=compiler, OMP_NUM_THREADS="1"
        )
        said = "attention is computed by PyTorch: the C compiler false failed: code 1"
        assert (said in done.stdout) == (folder == "without")
        assert list((tmp_path / "cache").glob("kernels/attention-*.so")) == [] or folder == "with"
        results = json.loads((tmp_path / folder / "metrics.json").read_text())
        losses.append(results["test_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_killed_many_times_end_as_one_that_was_never_stopped(kind, forked, whole, tmp_path):
    """Eight kills and more for each kind of run: two to a run, the second wherever it falls after
    the first; a process with fewer events may outlive its.
    """
    folder, events = whole(kind)
    generator, killed = random.Random(kind), 0
    for number in range(24):
        run = tmp_path / str(number)
        killed += kill_until_done(
            forked, run, [generator.randrange(1, events), generator.randrange(1, events)], kind, generator
        )
        assert differing(run, folder) == []
        if killed >= 8:
            return
    raise AssertionError(f"only {killed} kills")


def test_the_comparison_sees_a_random_state_that_is_not_restored(forked, whole, tmp_path):
    """The control of the proofs above."""
    folder, events = whole("one process")
    assert forked.run(tmp_path / "run", event=events // 2) == [-9]
    assert forked.run(tmp_path / "run", "--resume", forget_random_state=True) == [0]
    assert any("model.safetensors" in name for name in differing(tmp_path / "run", folder))


@pytest.mark.parametrize(
    "name, code, share",
    [
        ("SIGTERM", 143, 0.3),
        heavy("SIGINT", 130, 0.5),
        heavy("SIGHUP", 129, 0.3),
        heavy("SIGTERM", 143, 0.5),
        heavy("SIGINT", 130, 0.3),
        heavy("SIGHUP", 129, 0.5),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(name, code, share, forked, whole, tmp_path):
    folder, events = whole("one process")
    assert forked.run(tmp_path / "run", event=int(events * share), signal=name) == [code]
    last = forked.said().splitlines()[-1]
    assert last == f"train_classifier.py: stopped by {name}; continue with --resume {tmp_path / 'run'}"
    assert forked.run(tmp_path / "run", "--resume", tmp_path / "run") == [0], forked.said()
    assert differing(tmp_path / "run", folder) == []


@pytest.mark.parametrize("kind", ["one process", heavy("two processes")])
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(kind, forked, whole, tmp_path):
    """With two processes one gets it, and both leave between the same two batches: torchrun kills
    what takes longer than 30 seconds.
    """
    folder, _ = whole(kind)
    codes = forked.run(
        tmp_path / "run",
        "--eval-batch-size",
        2,
        kind=kind,
        signal="SIGTERM",
        in_evaluation=2,
        rank=KINDS[kind][0] - 1,
    )
    assert set(codes) == {143}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines.count("validation/loss") == 1, "the second evaluation was left"
    assert set(forked.run(tmp_path / "run", "--resume", "--eval-batch-size", 2, kind=kind)) == {0}, (
        forked.said()
    )
    assert [name for name in differing(tmp_path / "run", folder) if "safetensors" in name] == []


@pytest.mark.parametrize(
    "kind, share",
    [
        ("one process", 0.2),
        heavy("one process", 0.55),
        heavy("two processes", 0.2),
        heavy("two processes", 0.55),
    ],
)
def test_a_time_limit_saves_evaluates_and_says_how_to_go_on(kind, share, forked, whole, tmp_path):
    """The signal that the system sends when the time is up comes at an event here; with two
    processes to one of them. The evaluation at the stop is none of the continued run.
    """
    folder, events = whole(kind)
    last_rank = KINDS[kind][0] - 1
    event = int((events if last_rank == 0 else EVENTS_OF_RANK_1) * share)
    flags = ["--max-minutes", 999]
    codes = forked.run(tmp_path / "run", *flags, kind=kind, event=event, signal="SIGALRM", rank=last_rank)
    assert set(codes) == {0} and forked.said() == ""
    *_, scores, _, advice, _ = forked.said("stdout").splitlines()
    (step,) = re.findall(
        rf"the time is up after step (\d+): continue with --resume {tmp_path / 'run'}$", advice
    )
    assert scores.startswith("epoch ") and "validation loss" in scores
    assert (tmp_path / "run" / "checkpoints" / f"step-{int(step):08}").is_dir()
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "report.md").exists()
    told = json.loads((tmp_path / "run" / "best" / "training.json").read_text())
    assert told["cut"] == ["validation", "test"] and told["test_sha256"], "for --evaluate-only"
    assert set(forked.run(tmp_path / "run", "--resume", tmp_path / "run", kind=kind)) == {0}, forked.said()
    assert f"after step {step}" in forked.said("stdout")
    assert differing(tmp_path / "run", folder) == []


@pytest.mark.slow
def test_a_time_limit_stops_after_the_first_step_at_the_earliest(forked, whole, tmp_path):
    """By the clock, without --output-dir given again: one step with each command, to the end."""
    folder, _ = whole("one process")
    starts = 0
    while not (tmp_path / "run" / "report.md").exists():
        going_on = ["--resume"] if starts else []
        assert forked.run(tmp_path / "run", *going_on, "--max-minutes", "1e-5") == [0], forked.said()
        starts += 1
    assert starts == 8, "the last step ends the run, and the test follows"
    assert differing(tmp_path / "run", folder) == []


@pytest.mark.slow
def test_a_time_limit_lets_an_evaluation_end(forked, whole, tmp_path):
    folder, _ = whole("one process")
    flags = ["--eval-batch-size", 2, "--max-minutes", 999]
    assert forked.run(tmp_path / "run", *flags, signal="SIGALRM", in_evaluation=2) == [0], forked.said()
    assert "the time is up after step 4:" in forked.said("stdout")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("validation/loss") == 2
    assert forked.run(tmp_path / "run", "--resume", "--eval-batch-size", 2) == [0], forked.said()
    assert [name for name in differing(tmp_path / "run", folder) if "safetensors" in name] == []


@pytest.mark.slow
def test_a_signal_in_the_evaluation_at_a_time_limit_changes_nothing(forked, whole, tmp_path):
    """The checkpoint was saved before it, and stays as it is."""
    folder, events = whole("one process")
    assert forked.run(
        tmp_path / "run", "--max-minutes", "1e-5", "--eval-batch-size", 2, signal="SIGTERM", in_evaluation=1
    ) == [143]
    assert forked.run(tmp_path / "run", "--resume", "--eval-batch-size", 2) == [0], forked.said()
    assert [name for name in differing(tmp_path / "run", folder) if "safetensors" in name] == []


@pytest.mark.slow
def test_ctrl_c_is_for_the_process_in_charge_not_for_its_loader_workers(
    tiny_model, sentences_csv, cache_dir, tmp_path
):
    """A terminal sends it to all of them; an epoch of 29 steps has them still at work after the
    second.
    """
    command = [
        sys.executable,
        "train_classifier.py",
        "--model",
        tiny_model,
        "--dataset",
        sentences_csv,
        "--cache-dir",
        cache_dir,
        *FLAGS,
        "--num-workers",
        2,
        "--batch-size",
        1,
        "--epochs",
        99,
        "--output-dir",
        tmp_path / "run",
    ]
    job = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    while not list(tmp_path.glob("run/checkpoints/step-*")):
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGINT)
    _, stderr = job.communicate(timeout=100)
    assert job.returncode == 130
    assert stderr == (
        "\nSIGINT: saving after this step; a second one ends the run at once\n"
        "train_classifier.py: stopped by SIGINT; continue with --resume"
        f" {tmp_path / 'run'}\n"
    )


def test_a_loss_that_one_process_finds_bad_ends_all_with_the_rows_of_that_one(forked, tmp_path):
    """The gradients of both are bad then: neither the one nor the other may speak of those."""
    assert forked.run(tmp_path / "run", kind="two processes", bad_losses=True, rank=1) == [2, 2]
    assert (
        "the training loss is no longer finite, first in the batch with the rows " in forked.said()
        and forked.said(rank=1) == forked.said()
    )


def test_a_run_that_diverges_keeps_the_checkpoints_from_before(forked, tmp_path):
    """The loss is read before each save, not every --log-every steps only."""
    assert forked.run(
        tmp_path / "run", "--lr", "1e30", "--warmup-ratio", 0, "--save-every", 1, "--log-every", 100
    ) == [2]
    assert "the training loss is no longer finite" in forked.said()
    left = list((tmp_path / "run" / "checkpoints").iterdir())
    assert left and all(
        tensor.isfinite().all() for path in left for tensor in load_file(path / "model.safetensors").values()
    )


def test_a_named_checkpoint_is_gone_on_from(forked, whole, tmp_path):
    folder, _ = whole("one process")
    shutil.copytree(folder, tmp_path / "run")
    older = min((tmp_path / "run" / "checkpoints").iterdir())
    assert forked.run(tmp_path / "run", "--resume", older) == [0], forked.said()
    assert f"resume   {older}: after step {int(older.name[5:])}" in forked.said("stdout")
    assert differing(tmp_path / "run", folder) == []
    assert forked.run(tmp_path / "run", "--resume", older.with_name("step-00000099")) == [2]
    assert "no such checkpoint" in forked.said()


def test_resuming_a_finished_run_changes_nothing(forked, whole, tmp_path):
    folder, _ = whole("one process")
    shutil.copytree(folder, tmp_path / "run")
    assert forked.run(tmp_path / "run", "--resume") == [0]
    assert differing(tmp_path / "run", folder) == []


def damages(folder: Path):
    """Yield a name and a function that damages one file of a checkpoint, for each file and kind of
    damage.
    """
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        yield f"{file} deleted", lambda checkpoint, file=file: (checkpoint / file).unlink()
        yield (
            f"{file} truncated",
            lambda checkpoint, file=file: os.truncate(
                checkpoint / file, (checkpoint / file).stat().st_size // 2
            ),
        )
        yield f"{file} with one bit flipped", lambda checkpoint, file=file: flip(checkpoint / file)


def flip(path: Path):
    """Flip one bit in the middle of a file, not in other files that are the same one by a hard
    link.
    """
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_every_damage_of_a_checkpoint_is_found(whole, tmp_path):
    folder, _ = whole("one process")
    last = max((folder / "checkpoints").iterdir())
    assert find_damage(last) is None
    names = []
    for name, damage in damages(last):
        shutil.copytree(last, tmp_path / "copy")
        damage(tmp_path / "copy")
        found = find_damage(tmp_path / "copy")
        assert found and name.split()[0] in found, (name, found)
        shutil.rmtree(tmp_path / "copy")
        names.append(name)
    assert len(names) > 30


def test_resume_passes_over_a_damaged_checkpoint_and_ends_when_none_is_whole(forked, whole, tmp_path):
    folder, _ = whole("one process")
    shutil.copytree(folder, tmp_path / "run")
    older, newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    flip(newest / "optimizer.safetensors")
    assert forked.run(tmp_path / "run", "--resume") == [0], forked.said()
    assert f"{newest} is damaged (optimizer.safetensors is corrupt); trying the one before" in forked.said(
        "stdout"
    )
    assert f"resume   {older}: after step" in forked.said("stdout")
    assert differing(tmp_path / "run", folder) == []
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "model.safetensors").unlink()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert forked.run(tmp_path / "run", "--resume") == [2]
    assert re.fullmatch(
        r"train_classifier\.py: error: --resume: all checkpoints in [^\n]+ are damaged"
        r" [^\n]+model\.safetensors is missing[^\n]+\n",
        forked.said(),
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--lr", "2e-3"], "--lr was 0.003, is 0.002"),
        (["--seed", 1], "--seed was 0, is 1"),
        (["--max-eval-samples", 7], "the texts, labels or tokens of validation and test differ"),
    ],
)
def test_a_changed_run_is_refused_naming_what_differs(flags, named, forked, whole, tmp_path):
    """In one cause: another seed cuts other splits and draws another head, which are not named
    beside it.
    """
    folder, _ = whole("one process")
    shutil.copytree(folder, tmp_path / "run")
    assert forked.run(tmp_path / "run", "--resume", *flags) == [2]
    assert (
        f"was written by another run: {named}; use the same again" in forked.said()
        and len(forked.said().splitlines()) == 1
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flags", [[], ["--lr", "2e-3"]])
def test_a_finished_run_without_its_checkpoints_is_not_begun_again(flags, forked, whole, tmp_path):
    folder, _ = whole("one process")
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = files(tmp_path / "run")
    assert forked.run(tmp_path / "run", "--resume", *flags) == [2]
    assert forked.said().endswith(
        f"{tmp_path / 'run'} is a finished run whose checkpoints were removed; start a new run with"
        " another --output-dir\n"
    )
    assert files(tmp_path / "run") == before


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_again_as_it_was_only(forked, whole, tmp_path):
    folder, events = whole("one process")
    assert forked.run(tmp_path / "run", "--save-every", 50, event=events // 8) == [-9]
    assert not (tmp_path / "run" / "checkpoints").exists() and (tmp_path / "run" / "config.json").exists()
    before = files(tmp_path / "run")
    assert forked.run(tmp_path / "run", "--resume", "--lr", "2e-3") == [2]
    assert "--lr was 0.003, is 0.002" in forked.said() and files(tmp_path / "run") == before
    assert forked.run(tmp_path / "run", "--resume") == [0], forked.said()
    assert "no checkpoint yet: from the beginning" in forked.said("stdout")
    assert differing(tmp_path / "run", folder) == []


def test_after_damage_what_was_saved_later_goes_and_what_is_saved_next_stays(forked, whole, tmp_path):
    """With --keep 1: a damaged newer checkpoint must not be the one that is kept."""
    folder, _ = whole("one process")
    shutil.copytree(folder, tmp_path / "run")
    older, newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    newest.rename(newest.with_name("step-00000099"))
    flip(newest.with_name("step-00000099") / "model.safetensors")
    assert forked.run(tmp_path / "run", "--resume", "--keep", 1) == [0], forked.said()
    (left,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert left.name == "step-00000008" and find_damage(left) is None
    assert differing(tmp_path / "run", folder) == []


def test_a_checkpoint_put_aside_for_one_of_the_same_step_is_found(forked, whole, tmp_path):
    """As a kill leaves it that falls between the two renames of a save at a step that has a
    checkpoint already.
    """
    folder, _ = whole("one process")
    shutil.copytree(folder, tmp_path / "run")
    older, newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    newest.rename(newest.with_name(newest.name.replace("step-", "tmp-")))
    # where a kill would end it: the product's own first rename, under the product's own name
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", older)
    assert not older.exists()
    assert forked.run(tmp_path / "run", "--resume") == [0], forked.said()
    assert re.search(
        rf"^resume   {re.escape(str(older.parent))}/\S+: after step {int(older.name[5:])}$",
        forked.said("stdout"),
        re.M,
    )
    assert differing(tmp_path / "run", folder) == []


def test_a_damaged_checkpoint_that_is_named_is_refused_with_the_way_to_the_newest(forked, whole, tmp_path):
    folder, _ = whole("one process")
    shutil.copytree(folder, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    flip(newest / "model.safetensors")
    assert forked.run(tmp_path / "run", "--resume", newest) == [2]
    assert forked.said().endswith(
        f"--resume {newest}: it is damaged (model.safetensors is corrupt); --resume {tmp_path / 'run'} takes"
        " the newest one that is not\n"
    )


def test_a_run_whose_folder_is_named_as_a_checkpoint_is(forked, whole, tmp_path):
    folder, _ = whole("one process")
    shutil.copytree(folder, tmp_path / "step-1")
    assert forked.run(tmp_path / "step-1", "--resume", tmp_path / "step-1") == [0], forked.said()


def test_a_checkpoint_of_another_kind_of_device_is_refused(forked, whole, tmp_path):
    """It has the random state of one device and not of the other."""
    folder, _ = whole("one process")
    shutil.copytree(folder, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        state = path / "state.json"
        content = state.read_text().replace('"--device": "cpu"', '"--device": "cuda"')
        state.unlink()
        state.write_text(content)
        (path / "manifest.json").unlink()
        write_manifest(path)
    assert forked.run(tmp_path / "run", "--resume") == [2]
    assert "another run: --device was cuda, is cpu; use" in forked.said()


def test_another_number_of_processes_or_another_model_is_refused(forked, whole, tmp_path, tiny_model):
    folder, _ = whole("one process")
    shutil.copytree(folder, tmp_path / "run")
    assert set(forked.run(tmp_path / "run", "--resume", "--batch-size", 8, kind="two processes")) != {0}
    assert "number of processes was 1, is 2" in forked.said()
    shutil.copytree(tiny_model, tmp_path / "model")
    flip(tmp_path / "model" / "model.safetensors")
    assert forked.run(tmp_path / "run", "--resume", "--model", tmp_path / "model") == [2]
    assert "another run: the model's weights differ; use the same again" in forked.said()


def test_epochs_are_saved_beside_every_so_many_steps(forked, tmp_path):
    """An epoch has 4 steps."""
    assert forked.run(tmp_path / "run", "--save-every", 3, "--keep", 9) == [0]
    assert [int(path.name[5:]) for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        3,
        4,
        6,
        8,
    ]


def test_keep_prunes_older_checkpoints(forked, tmp_path):
    assert forked.run(tmp_path / "run", "--keep", 3) == [0]
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000006",
        "step-00000008",
    ]


def same_model(folder: Path, other: Path) -> bool:
    first, second = (load_file(path / "best" / "model.safetensors") for path in (folder, other))
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_without_checkpoints_a_run_says_so_and_begins_again(forked, whole, tmp_path):
    folder, _ = whole("one process")
    run, own = tmp_path / "run", [flag for flag in FLAGS if flag not in ("--save-every", "--epochs", 2)]
    flags = [*forked.shared_flags, *own, "--epochs", 2, "--batch-size", 8, "--keep", 0, "--output-dir", run]
    code = forked.do(flags=list(map(str, flags)), run=str(run), event=15, signal="SIGTERM")
    assert code == [143]
    assert f"nothing is saved (--keep 0): --resume {run} starts from the beginning" in forked.said()
    assert "SIGTERM: ending after this step" in forked.said() and not (run / "checkpoints").exists()
    assert do(forked, "--resume", run) == [0], forked.said()
    assert "no checkpoint yet: from the beginning" in forked.said("stdout")
    assert same_model(run, folder) and not (run / "checkpoints").exists()


def test_a_finished_run_keeps_what_it_was_told_to(forked, whole, tmp_path):
    """The newest ones; the screen says before how much that is."""
    folder, _ = whole("one process")
    for number in (0, 1):
        run = tmp_path / f"run-{number}"
        shutil.copytree(folder, run)
        shutil.rmtree(max((run / "checkpoints").iterdir()))  # a step and its checkpoint are left to be done
        assert forked.run(run, "--resume", "--keep-after", number) == [0], forked.said()
        left = [path.name for path in (run / "checkpoints").glob("*")]
        assert left == ["step-00000008"][:number] and same_model(run, folder)
        assert f"(--keep-after {number})" in forked.said("stdout")


def test_a_folder_without_a_run_can_not_be_resumed(forked, tmp_path):
    assert forked.run(tmp_path / "none", "--resume") == [2]
    assert (
        forked.said()
        == f"train_classifier.py: error: --resume: {tmp_path / 'none'} holds no run; check the name, or leave"
        " --resume out to start one\n"
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_kill_within_the_write_of_a_large_file_leaves_the_checkpoint_before(forked, tmp_path, tiny_model):
    """By what stands on the disk, not at an event: the file is being written when the process
    dies, under the name that safetensors gives it until it is whole.
    """
    config = BertConfig(
        vocab_size=100_000,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    shutil.copytree(tiny_model, tmp_path / "model")
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    # two steps an epoch: a checkpoint after each epoch
    flags = ["--model", tmp_path / "model", "--max-train-samples", 48]
    assert forked.run(tmp_path / "whole", *flags) == [0], forked.said()
    assert forked.run(tmp_path / "run", *flags, kill_in_write=1) == [-9]
    before, unfinished = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert unfinished.name == "tmp-00000004" and find_damage(before) is None
    assert list(unfinished.glob(".tmp*")) and not list(unfinished.glob("optimizer.*"))
    assert forked.run(tmp_path / "run", *flags, "--resume") == [0], forked.said()
    assert f"resume   {before}: after step 2" in forked.said("stdout")
    assert differing(tmp_path / "run", tmp_path / "whole") == []


FULL_DISK = """
import contextlib, ctypes, os, sys
from pathlib import Path
import train_classifier
from common import cli
from common.files import find_damage
from common.training.checkpoint import Checkpoints

# as `unshare -rm` and `mount -t tmpfs -o size=3m none /mnt`
NEW_USER, NEW_MOUNTS, PRIVATE = 0x10000000, 0x20000, 0x44000
system, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
assert system.unshare(NEW_USER | NEW_MOUNTS) == 0
for file, text in ("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1"):
    Path("/proc/self", file).write_text(text)
assert system.mount(b"none", b"/", None, PRIVATE, None) == 0
assert system.mount(b"none", b"/mnt", b"tmpfs", 0, b"size=3m") == 0

save, saves = Checkpoints.save, 0

def saved(self, *arguments):
    global saves
    saves += 1
    if saves == 2:  # another program takes what is left of the disk
        with open("/mnt/filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
    try:
        save(self, *arguments)
    except BaseException:
        print("save", saves, "failed")
        raise

Checkpoints.save = saved
try:
    cli.run(train_classifier.make_parser(), train_classifier.main, sys.argv[1:])
except SystemExit as end:
    checkpoints = Path("/mnt/run/checkpoints").iterdir()
    print("code", end.code, [(path.name, find_damage(path)) for path in checkpoints])
"""


@pytest.mark.skipif(not may_mount(), reason="no right to mount a small file system here")
def test_a_disk_that_fills_up_during_a_save_leaves_the_earlier_checkpoints_whole(
    call_script, tiny_model, sentences_csv, cache_dir, tmp_path
):
    """A file system of 3 MB at /mnt, seen by one process only: room for a run of the small
    model.
    """
    script = tmp_path / "full_disk.py"
    script.write_text(FULL_DISK)
    flags = ["--model", tiny_model, "--dataset", sentences_csv, "--cache-dir", cache_dir, *FLAGS]
    done = call_script(script, *flags, "--output-dir", "/mnt/run")
    assert done.stdout.endswith("save 2 failed\ncode 2 [('step-00000002', None)]\n"), (
        done.stdout + done.stderr
    )
    assert re.fullmatch(
        r"train_classifier\.py: error: No space left on device; free some space[^\n]+\n", done.stderr
    )


# The run's own flags ------------------------------------------------------------------------------


def do(forked, *flags, **job) -> list[int]:
    """Run the script with these flags alone, and none of those that the runs here share."""
    return forked.do(flags=[str(flag) for flag in flags], run="/nowhere", **job)


def test_resume_alone_goes_on_with_the_flags_of_the_run(forked, whole, tmp_path):
    """Also with the number of texts, which differs from every default; another value is refused by name."""
    folder, events = whole("one process")
    run = tmp_path / "runs of today" / "1"
    assert forked.run(run, event=events // 2, signal="SIGTERM") == [143]
    assert f"continue with --resume '{run}'" in forked.said()  # to be pasted into a shell
    assert f"--logdir '{run.parent}'\n" in forked.said("stdout")
    assert do(forked, "--resume", run, "--lr", "2e-3", "--epochs", 3) == [2]
    assert "--epochs was 2, is 3; --lr was 0.003, is 0.002; use the same" in forked.said()
    assert do(forked, "--resume", run, "--keep", 3) == [0], forked.said()
    assert differing(run, folder) == []


def test_a_job_that_is_started_again_starts_continues_and_finds_its_run_finished(forked, whole, tmp_path):
    folder, events = whole("one process")
    run = tmp_path / "run"
    assert forked.run(run, "--resume-or-start", event=events // 2) == [-9], forked.said()
    assert forked.run(run, "--resume-or-start") == [0], forked.said()
    assert "resume   " in forked.said("stdout") and differing(run, folder) == []
    before = files(run)
    assert forked.run(run, "--resume-or-start") == [0]
    assert forked.said("stdout").startswith(f"run      {run} is finished") and files(run) == before
    assert forked.run(run, "--resume-or-start", "--lr", "2e-3") == [2]
    assert "--lr was 0.003, is 0.002" in forked.said() and files(run) == before


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--resume-or-start"], ("--resume-or-start", "--output-dir")),
        (["--resume-or-start", "--resume", "run"], ("--resume-or-start", "--resume")),
    ],
)
def test_flags_that_do_not_say_which_run(flags, parts, forked):
    assert do(forked, *flags) == [2]
    assert all(part in forked.said() for part in parts) and len(forked.said().splitlines()) == 1
