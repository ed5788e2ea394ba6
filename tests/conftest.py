"""What the tests share: small real models with trained tokenizers, a small labelled file, and the
scripts as a user calls them.

Large libraries are imported where they are needed: the process that hands the tests to others reads
this file too, and runs none; the others wait for it.
"""

from __future__ import annotations

import gc

gc.disable()  # until all tests are collected: what they import is no garbage, and the search takes time

import atexit
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import numpy as np
    from transformers import BertTokenizerFast

# two tests run at a time: each, and every process that it starts, has one core
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # PyTorch reads it when it is imported

# gRPC, by which Milvus is asked, would say on stderr that it stays as it is when a later test forks
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

ROOT = Path(__file__).resolve().parent.parent
POSITIVE, NEGATIVE = ["good", "fine", "great", "lovely"], ["bad", "awful", "poor", "grim"]
COMMON = [
    "the",
    "film",
    "was",
    "and",
    "it",
    "so",
    "very",
    "what",
    "a",
    "story",
    "with",
    "actors",
    "that",
    "I",
    "saw",
    "on",
    "monday",
]


def pytest_configure(config):
    """Let all tests but those of the GPU compute on the CPU, on a machine with a GPU too: there
    they must come to the same.
    """
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # by default forked trainings draw what a test looks at; the heavy proofs draw all
    if "slow" in config.option.markexpr.replace("not slow", ""):
        os.environ["DRAW_ALL_PICTURES"] = "1"
    if config.option.dist == "no" or "PYTEST_XDIST_WORKER" in os.environ:  # this process runs tests
        import hypothesis

        # how long an example takes depends on what else runs; what hangs is ended by pytest-timeout
        hypothesis.settings.register_profile("no deadline", deadline=None)
        hypothesis.settings.load_profile("no deadline")


def pytest_collection_finish():
    """Search for garbage among what the tests make, and not among what they have imported; at its end
    the interpreter tidies up as it always does: some libraries tell of what it leaves.
    """
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)


def exit_code_in_process(script: ModuleType, flags: list) -> int:
    """Run a script in this process, without the seconds of its imports, and return its exit code."""
    from common import cli

    try:
        cli.run(script.make_parser(), script.main, [str(flag) for flag in flags])
    except SystemExit as exit:
        return exit.code
    return 0


def with_defaults(flags: tuple, defaults: dict) -> list:
    """Return flags, and those of `defaults` that are not among them."""
    missing = {name: value for name, value in defaults.items() if name not in flags}
    return [*flags, *(part for flag in missing.items() for part in flag)]


def generate_on_cpu(flags: tuple, model: Path, max_new_tokens: int) -> int:
    """Run generate.py in this process, with these values where no flag says else; return its exit code."""
    import generate

    defaults = {"--model": model, "--device": "cpu", "--precision": "fp32"}
    if not set(flags).intersection(generate.generation_flags.NO_TEXTS):
        defaults["--max-new-tokens"] = max_new_tokens
    return exit_code_in_process(generate, with_defaults(flags, defaults))


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def heavy(*values, **options):
    """Return one of a test's many cases that is left to the heavy proofs (`-m slow`)."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def quick(cases: Iterable[str] | dict[str, tuple], *names: str) -> list:
    """Return a test's cases, all but the named ones left to the heavy proofs. `cases`: names, or
    values with a name each.
    """
    values = cases if isinstance(cases, dict) else {name: (name,) for name in cases}
    missing = set(names) - set(values)
    assert not missing, missing
    return [
        pytest.param(*given, id=name) if name in names else heavy(*given, id=name)
        for name, given in values.items()
    ]


def make_sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return (text, label) pairs, half `pos` and half `neg`: easy to learn, of 4 to 30 words, all
    different.
    """
    generator = random.Random(seed)
    pairs = []
    for number in range(count):
        words, label = (POSITIVE, "pos") if number % 2 else (NEGATIVE, "neg")
        text = [
            generator.choice(words) if generator.random() < 0.4 else generator.choice(COMMON)
            for _ in range(generator.randint(3, 29))
        ]
        pairs.append((" ".join([generator.choice(words), *text, f"n{number}"]), label))
    return pairs


def train_wordpiece(texts: list[str], vocab_size: int = 300) -> BertTokenizerFast:
    """Train a WordPiece tokenizer of BERT's kind with the `tokenizers` library."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # the trainer numbers pieces in an order that differs from run to run, and ties follow the
    # numbers; so they get theirs before
    pieces = [f"##{character}" for character in sorted(set("".join(texts).lower()) - {" "})]
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*specials, *pieces])
    trained.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64)


def save_bert(folder: Path, *, seed: int = 0, **options) -> Path:
    """Write a random BERT, 32 wide, with its own trained tokenizer, and return its folder."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = train_wordpiece([text for text, _ in make_sentences(200)])
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        **options,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a BERT of two layers, 32 wide, 64 positions, no dropout, and its own trained
    tokenizer.
    """
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return save_bert(tmp_path_factory.mktemp("models") / "tiny-bert", num_hidden_layers=2, **options)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a random Llama, its tokenizer and a chat template."""
    from language_models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def sentences_csv(tmp_path_factory) -> Path:
    """A CSV file of 120 labelled sentences."""
    path = tmp_path_factory.mktemp("data") / "sentences.csv"
    path.write_text(
        "text,label\n" + "".join(f"{text},{label}\n" for text, label in make_sentences(120)), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """One cache folder for all tests of a session: never the user's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def run_script():
    """Return a function that runs a script of the project in a new process, without a network, and
    returns what it did.
    """

    def run(
        *command, stdin: str | None = None, check: bool = True, timeout: float = 300, **environment
    ) -> subprocess.CompletedProcess:
        launcher = [] if command[0] == "torchrun" else [sys.executable]
        if command[0] == "torchrun":
            command = [str(Path(sys.executable).with_name("torchrun")), *command[1:]]
        done = subprocess.run(
            [*launcher, *map(str, command)],
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )
        assert not check or done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def may_mount() -> bool:
    """Tell whether this user may mount a small file system in a name space of its own."""
    return (
        sys.platform == "linux"
        and shutil.which("unshare") is not None
        and subprocess.run(
            ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"], capture_output=True
        ).returncode
        == 0
    )


KINDS = {
    "one process": (1, 0),
    "one process, two loader workers": (1, 2),
    "two processes": (2, 0),
    "two processes, two loader workers each": (2, 2),
    "four processes": (4, 0),
}


SECONDS_FOR_A_JOB = 120
# a PyTorch for CUDA says so to --compile where CUDA's tools are installed and no GPU is
WITHOUT_A_GPU = "No CUDA runtime is found"


def start_forker(**variables: str) -> subprocess.Popen:
    """Start a process of tests/forked.py, with more variables in its environment."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, ROOT / "tests" / "forked.py"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | variables,
        start_new_session=True,
    )


class Forker:
    """A process of tests/forked.py, and jobs for it: the scripts without the seconds of their
    imports.
    """

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self.log = process, log

    def do(self, **job) -> list[int]:
        """Run a job, and return the exit codes of its processes."""
        self.begin(**job)
        return self.wait()

    def begin(self, *, world: int = 1, **job) -> None:
        """Begin a job."""
        self.process.stdin.write(json.dumps({**job, "world": world, "log": str(self.log)}) + "\n")
        self.process.stdin.flush()

    def processes(self) -> list[int]:
        """Return the numbers of the processes of a job that has begun, [] if it has ended."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not (found := children.read_text().split()):
            if select.select([self.process.stdout], [], [], 0.001)[0]:
                break
        return list(map(int, found))

    def wait(self) -> list[int]:
        """Wait for the end of a job, and return the exit codes of its processes."""
        if not select.select([self.process.stdout], [], [], SECONDS_FOR_A_JOB)[0]:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise TimeoutError(
                f"a job took more than {SECONDS_FOR_A_JOB} seconds; it said: {self.said('stdout')}"
                f" {self.said()}"
            )
        return json.loads(self.process.stdout.readline())

    def call(
        self,
        *command,
        stdin: str = "",
        check: bool = True,
        world: int = 1,
        pictures: bool = False,
        **environment: str,
    ) -> subprocess.CompletedProcess:
        """Run a script as its own process would run, or as the processes of a job would, and return
        what the first of them did. Without `pictures`, those of a training are blank.
        """
        command = list(map(str, command))
        Path(f"{self.log}.stdin").write_text(stdin)
        job = {"stdin": f"{self.log}.stdin", "environment": environment, "pictures": pictures}
        codes = self.do(world=world, command=command, **job)
        done = subprocess.CompletedProcess(command, codes[0], self.said("stdout"), self.said())
        others = [self.said(stream, rank) for rank in range(1, world) for stream in ("stdout", "stderr")]
        assert not check or set(codes) == {0}, (done, others)
        assert not check or not any(others), others
        return done

    def said(self, stream: str = "stderr", rank: int = 0) -> str:
        """Return what a process of the last job printed."""
        return Path(f"{self.log}.{rank}.{stream}").read_text()

    def num_events(self) -> int:
        """Return the events that the first process of the last job counted."""
        return int(Path(f"{self.log}.0.events").read_text())

    def stop(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


class ForkedRuns(Forker):
    """Runs of train_classifier.py that share flags."""

    def __init__(self, process: subprocess.Popen, shared_flags: list, log: Path):
        super().__init__(process, log)
        self.shared_flags, self.flags = shared_flags, []

    def run(self, folder: Path, *flags, kind: str = "one process", **job) -> list[int]:
        """Run the script into `folder`, a global batch being 8, and return the exit codes of its
        processes.
        """
        world, workers = KINDS[kind]
        given = [
            *self.shared_flags,
            *self.flags,
            "--batch-size",
            8 // world,
            "--num-workers",
            workers,
            "--output-dir",
            folder,
            *flags,
        ]
        codes = self.do(world=world, flags=list(map(str, given)), run=str(folder), **job)
        complaints = [
            line
            for rank in range(world)
            for line in self.said(rank=rank).splitlines()
            if WITHOUT_A_GPU not in line
        ]
        assert set(codes) != {0} or not complaints, complaints  # what ends well has none
        return codes

    def score(self, model: Path, *flags) -> list[int]:
        """Score a saved model on the test split, and return the exit code in a list."""
        given = [*self.shared_flags, "--model", model, "--evaluate-only", *flags]
        return self.do(world=1, flags=list(map(str, given)), run=str(model.parent))


@pytest.fixture(scope="session")
def forking(tmp_path_factory):
    """A process that has paid for the imports, and forks others that run the scripts."""
    forker = Forker(start_forker(), tmp_path_factory.mktemp("printed") / "call")
    yield forker
    forker.stop()


@pytest.fixture(scope="session")
def call_script(forking):
    """Return a function that runs a script in a forked process, and returns what it did."""
    return forking.call


@pytest.fixture(scope="module")
def forked_runs(forking, tiny_model, sentences_csv, cache_dir, tmp_path_factory):
    """Jobs of train_classifier.py on the small model and data; a module may set more flags for all
    of its jobs.
    """
    shared = ["--model", tiny_model, "--dataset", sentences_csv, "--cache-dir", cache_dir]
    return ForkedRuns(forking.process, shared, tmp_path_factory.mktemp("printed") / "job")


@pytest.fixture(scope="session")
def tiny_embedder(tiny_model, tmp_path_factory) -> Path:
    """A folder with a sentence-transformers model over the tiny BERT: mean pooling and vectors of
    length 1, 32 wide.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    folder = tmp_path_factory.mktemp("models") / "tiny-embedder"
    transformer = Transformer(str(tiny_model), max_seq_length=64)
    SentenceTransformer(modules=[transformer, Pooling(32), Normalize()], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory) -> Path:
    """A folder with a cross-encoder of one layer and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-reranker"
    return save_bert(folder, seed=5, num_hidden_layers=1, num_labels=1)


class StubEncoder:
    """Stands for an encoder where only the store is under test: a text's vector is made of its
    hash, at once.
    """

    def __init__(self, width: int = 8):
        import torch

        from common.runtime import Runtime

        self.name, self.width, self.max_length, self.num_encoded, self.num_cut = "stub", width, 16, 0, 0
        self.runtime = Runtime(torch.device("cpu"), "fp32")
        self.prompts: dict[str, str] = {}

    def identity(self) -> dict:
        return {
            "model": self.name,
            "fingerprint": "stub",
            "width": self.width,
            "pooling": "none",
            "max_length": self.max_length,
            "document_prompt": None,
        }

    def encode_normalized(self, texts: list[str], *, role: str | None = None) -> np.ndarray:
        import numpy as np

        self.num_encoded += len(set(texts))
        numbers = [
            np.frombuffer(hashlib.shake_128(text.encode()).digest(2 * self.width), np.int16) for text in texts
        ]
        # never all zeros
        vectors = np.array(numbers, np.float32).reshape(len(texts), self.width) + 0.5
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


WITHOUT_A_MODEL = ("delete", "compact", "verify", "project", "export", "list", "show", "like")


@pytest.fixture(scope="session")
def embed(tiny_embedder, cache_dir):
    """Return a function that runs embed_search.py in this process, with the tiny model in fp32 on
    the CPU; returns code, stdout, stderr.
    """
    import embed_search

    def run(command: str, *flags) -> tuple[int, str, str]:
        flags = [str(flag) for flag in flags]
        defaults = (
            {}
            if command in WITHOUT_A_MODEL
            else {"--cache-dir": cache_dir, "--device": "cpu", "--precision": "fp32"}
        )
        if command in ("similarity", "index", "sync") or "--index" not in flags:
            defaults |= {} if command in ("compare-models", *WITHOUT_A_MODEL) else {"--model": tiny_embedder}
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = exit_code_in_process(embed_search, [command, *with_defaults(flags, defaults)])
        return code, stdout.getvalue(), stderr.getvalue()

    return run


@pytest.fixture
def ok(embed):
    """Return a function that runs a subcommand, which must succeed; returns its JSON document with
    --json, else what it printed.
    """

    def run(command: str, *flags):
        code, stdout, stderr = embed(command, *flags)
        assert code == 0, stdout + stderr
        return json.loads(stdout) if "--json" in flags else stdout

    return run


@pytest.fixture
def sentences(tmp_path) -> Path:
    """A CSV of 60 texts with ids, a label and a number."""
    path = tmp_path / "sentences.csv"
    path.write_text(
        "id,text,label,n\n"
        + "".join(f"s{n},{text},{label},{n}\n" for n, (text, label) in enumerate(make_sentences(60)))
    )
    return path


def write_lines(path: Path, lines: list[str]) -> Path:
    """Write lines to a file and return its path."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def limited_file_size(num_bytes: int) -> Iterator[None]:
    """Let no file that this process writes within the block become larger: as on a full disk, the
    system takes the bytes before, and its error names no file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def rows_by_id(folder: Path) -> dict[str, tuple]:
    """Return id -> (text, vector as bytes) of an index."""
    import numpy as np

    from common.search.index import open_snapshot
    from common.search.segments import ID, TEXT

    snapshot = open_snapshot(folder)
    rows = np.flatnonzero(snapshot.is_live())
    return {
        row[ID]: (row[TEXT], vector.tobytes())
        for row, vector in zip(snapshot.take(rows), snapshot.vectors_of(rows))
    }
