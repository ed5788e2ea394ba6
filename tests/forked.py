"""Runs the scripts in forked children of one process, which has paid for the imports, and kills
them on order.

A child counts its events: each optimizer step, and each file or folder of its run that it opens,
renames, links, makes or removes. It can be told to send itself a signal at a given event, so that
a kill falls into the middle of a save as easily as between two steps. Python's audit hooks see
these events; the script itself runs unchanged.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

os.environ["TQDM_LEAVE"] = ""  # before transformers imports tqdm, which reads it then: see common/sources.py

from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import train_classifier
from common import cli, figures
from common.training import checkpoint
from common.training.tracking import LossMeter

# what the steps of a run load when they come to it: here once, instead of in each child
LOADED_BY_STEPS = (
    "common.models",
    "common.delimited",
    "common.training.inspection",
    "common.training.metrics",
    "scipy.stats",
    "sklearn.metrics",
    "sklearn.model_selection",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "tensorboard.plugins.hparams.plugin_data_pb2",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "transformers.optimization",
)
FILE_EVENTS = ("open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def count_events(job: dict):
    """Count this process's events, and send it the job's signal at the job's event."""
    count = 0

    def happened(*_):
        nonlocal count
        count += 1
        if count == job.get("event"):
            os.kill(os.getpid(), signal.Signals[job.get("signal", "SIGKILL")])

    def audit(event: str, arguments: tuple):
        if (
            event in FILE_EVENTS
            and isinstance(arguments[0], (str, os.PathLike))
            and os.fspath(arguments[0]).startswith(job["run"])
        ):
            happened()

    sys.addaudithook(audit)
    register_optimizer_step_post_hook(happened)
    return lambda: count


class SignalAfterOneBatch:
    """Stands for the signals that an evaluation checks before each batch: sends one after the first."""

    def __init__(self, signals, number: int):
        self.signals, self.number, self.batches = signals, number, 0

    def check(self):
        self.batches += 1
        if self.batches == 2:
            os.kill(os.getpid(), self.number)
        self.signals.check()


def signal_in_evaluation(job: dict):
    """Let the job's signal come after the first batch of the given evaluation."""
    evaluate, count = train_classifier.evaluate, 0

    def evaluated(*arguments, signals, **options):
        nonlocal count
        count += 1
        if count == job["in_evaluation"]:
            signals = SignalAfterOneBatch(signals, signal.Signals[job["signal"]])
        return evaluate(*arguments, signals=signals, **options)

    train_classifier.evaluate = evaluated


def spoil_losses():
    """Let no loss of this process be a number."""
    sum_losses = train_classifier.sum_losses
    train_classifier.sum_losses = lambda *arguments: sum_losses(*arguments) * float("nan")


def limit_memory(room: int):
    """Let the model's passes, and nothing else, take at most `room` bytes more than the process
    has: threads and files need theirs too.

    The passes are those of prepare(), and of each optimizer step: it begins with count_examples()
    and ends with the loss meter's end_step().
    """
    prepare, count_examples, end_step = (
        train_classifier.prepare,
        train_classifier.count_examples,
        LossMeter.end_step,
    )

    def limit():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))

    def unlimit():
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def limited_prepare(*arguments):
        limit()
        state = prepare(*arguments)
        unlimit()
        return state

    def limit_step(*arguments):
        limit()
        return count_examples(*arguments)

    def unlimit_step(*arguments, **options):
        unlimit()
        end_step(*arguments, **options)

    train_classifier.prepare, train_classifier.count_examples = limited_prepare, limit_step
    LossMeter.end_step = unlimit_step


def draw_nothing():
    """Let the pictures of a report be small and blank: to draw them takes a third of a small run."""

    def blank(*_, **__):
        return figures.plt.figure(figsize=(0.1, 0.1))

    for name in ("confusion_matrix", "label_bars", "scatter", "learning_curve", "reliability"):
        assert callable(getattr(figures, name))
        setattr(figures, name, blank)


def take_files(job: dict, rank: int):
    """Read from the job's file, and write to files of this process."""
    os.dup2(os.open(job.get("stdin", os.devnull), os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (to the end of the process)
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{job['log']}.{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)


def take_terminal(path: str):
    """Read from a terminal and write to it, which becomes the one of this process: the first that
    the leader of a session opens.
    """
    os.setsid()
    terminal = os.open(path, os.O_RDWR)
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        os.dup2(terminal, descriptor)
        setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def child(job: dict, rank: int):
    """Be one process of a job: run the script and end with its exit code, without the seconds that
    Python takes to tidy up.
    """
    if "terminal" in job:
        take_terminal(job["terminal"])
    else:
        take_files(job, rank)
    if job["world"] > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job["world"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(job["port"]),
            TORCHELASTIC_RUN_ID="forked",
        )
    os.environ.update(job.get("environment", {}))
    if not job.get("pictures") and "DRAW_ALL_PICTURES" not in os.environ:
        draw_nothing()
    if "run" in job:
        counted = count_events(job if rank == job.get("rank", 0) else {**job, "event": None})
    if "command" in job:
        end(called(job["command"]))
    # the control: a comparison that does not see this sees nothing
    if job.get("forget_random_state"):
        checkpoint.restore_random_states = lambda *_: None
    if job.get("memory"):
        limit_memory(job["memory"])
    if job.get("bad_losses") and rank == job["rank"]:
        spoil_losses()
    if job.get("in_evaluation") and rank == job.get("rank", 0):
        signal_in_evaluation(job)
    code = exit_code(lambda: cli.run(train_classifier.make_parser(), train_classifier.main, job["flags"]))
    Path(f"{job['log']}.{rank}.events").write_text(str(counted()))
    end(code)


def called(command: list[str]) -> int:
    """Run a script as Python does, and return its exit code."""
    sys.argv = command
    return exit_code(lambda: runpy.run_path(command[0], run_name="__main__"))


def exit_code(run: Callable[[], object]) -> int:
    """Return the exit code with which `run` would end a process."""
    try:
        run()
    except SystemExit as exit:
        return exit.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(code: int) -> NoReturn:
    """End this process without the seconds that Python takes to tidy up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def kill_in_write(job: dict, running: dict[int, int]):
    """Kill the processes while one writes a file of 2**25 bytes or more of a checkpoint, after the
    given number of whole ones, unless they end before.
    """
    folder, found = Path(job["run"]) / "checkpoints", False
    while running and not found:
        time.sleep(0.0002)
        with contextlib.suppress(FileNotFoundError):  # it has been renamed meanwhile
            found = len(list(folder.glob("step-*"))) >= job["kill_in_write"] and any(
                path.stat().st_size > 2**25 for path in folder.glob("tmp-*/.tmp*")
            )
    for process in list(running):
        os.kill(process, signal.SIGKILL)


def run(job: dict) -> list[int]:
    """Run a job's processes and return their exit codes; when one dies by a signal, the others are
    killed as well.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job["port"] = free.getsockname()[1]
    running, codes = {}, [0] * job["world"]
    for rank in range(job["world"]):
        running[os.fork() or child(job, rank)] = rank
    if job.get("kill_in_write"):
        threading.Thread(target=kill_in_write, args=(job, running)).start()
    while running:
        process, status = os.wait()
        codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
        if min(codes) < 0:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return codes


def load_libraries() -> None:
    """Load what children would load one by one, and let them share it: a search for unreachable
    objects would copy nearly all of it into each child.
    """
    gc.disable()
    for name in LOADED_BY_STEPS:
        importlib.import_module(name)
    # what these make once, and keep: a thousand patterns, the fonts and the writers of pictures
    get_checkpoint_conversion_mapping("bert")
    with tempfile.TemporaryDirectory() as folder:
        figures.save(figures.confusion_matrix([[1]], ["a"], title="a"), Path(folder) / "a.png")
    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    load_libraries()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
