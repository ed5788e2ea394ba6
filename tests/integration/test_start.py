"""What each command loads, in a process that began with nothing: help and mistakes load nothing large, and a
command loads no library that only other commands need.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from common import bundled, cli
from common.files import cache_home
from common.generation import language_model
from common.runtime import Runtime
from conftest import ROOT, make_sentences, quick, write_lines
from language_models import needs_compiler, save_tiny_model

# Runs a script as the main program, and at its end writes down which packages are loaded.
RUN = """
import atexit, json, runpy, sys
report, sys.argv = sys.argv[1], sys.argv[2:]
found = lambda: {name if name == "pyarrow.compute" else name.partition(".")[0] for name in sys.modules}
packages = lambda: sorted(found())
atexit.register(lambda: open(report, "w").write(json.dumps(packages())))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Forks a child for each line of its input, [report, script, *flags], which does the same; prints its
# exit code. What all commands load is loaded here; if that were a large package, every child would
# have it.
FORKS = f"""
import json, os, sys
import common.generation.generation_flags, common.search.search_checks, common.training.training_flags
for line in sys.stdin:
    if os.fork() == 0:
        sys.argv[1:] = json.loads(line)
        sys.stdin = open(os.devnull)
        for descriptor, stream in ((1, "stdout"), (2, "stderr")):
            name = sys.argv[1] + "." + stream
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
{RUN}"""
# the packages whose import takes a tenth of a second or more, and one that takes half of that
LARGE = {
    "llguidance",
    "pyarrow.compute",
    *("torch", "numpy", "scipy", "sklearn", "pandas", "pyarrow", "datasets", "evaluate", "matplotlib"),
    *("transformers", "sentence_transformers", "tokenizers", "peft", "tensorboard", "huggingface_hub"),
    *("duckdb", "faiss", "bm25s", "tabulate", "pytrec_eval", "rouge_score", "aiohttp"),
}
STORE = {"numpy", "pyarrow"}  # what an index is read with
COMPUTE = {*STORE, "torch", "tabulate"}
SKLEARN = {"sklearn", "scipy", "pandas", "pyarrow.compute"}  # pandas imports the last


def environment_of(folder: Path) -> dict[str, str]:
    """Return the environment of a process that finds nothing of this machine's but the scripts."""
    return {"PATH": "", "HOME": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def packages_of(command: list[str], folder: Path, **environment: str) -> tuple[int, set[str], str]:
    """Return the exit code of a command, the large packages that it had loaded at its end, and what
    it said on stderr.
    """
    report = folder / "packages.json"
    script, *flags = command
    done = subprocess.run(
        [sys.executable, "-c", RUN, report, ROOT / script, *flags],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**environment_of(folder), **environment},
    )
    return done.returncode, LARGE & set(json.loads(report.read_text())), done.stderr


@pytest.fixture(scope="module")
def home(embed, tmp_path_factory) -> Path:
    """A folder with an index, texts, and what the mistakes of the table need."""
    home = tmp_path_factory.mktemp("home")
    rows = [f"s{number},{text},{label}" for number, (text, label) in enumerate(make_sentences(12))]
    write_lines(home / "texts.csv", ["id,text,label", *rows])
    write_lines(home / "texts.txt", [text for text, _ in make_sentences(12)])
    code, _, stderr = embed("index", home / "texts.csv", "--index", home / "ix", "--id-column", "id")
    assert code == 0, stderr
    (home / "damaged").mkdir()
    (home / "damaged" / "manifest.json").write_text((home / "ix" / "manifest.json").read_text()[:-9])
    (home / "empty.txt").touch()
    objects = [json.dumps(dict(zip(("id", "text", "label"), row.split(",")))) for row in rows]
    write_lines(home / "texts.jsonl", objects)
    write_lines(home / "list.json", [f"[{', '.join(objects)}]"])
    write_lines(home / "texts.tsv", [row.replace(",", "\t") for row in ["id,text,label", *rows]])
    write_lines(home / "other.csv", ["Review;label", "good;yes"])
    for name in ("zip.txt", "zip.csv"):
        (home / name).write_bytes(b"PK\x03\x04 and so on")
    for name in ("run-a", "run-b"):
        (home / name).mkdir()
        write_lines(home / name / "config.json", ['{"seed": 0}'])
        metrics = '{"test_accuracy": 0.5, "test_intervals": {}, "train_seconds": 12.3}'
        write_lines(home / name / "metrics.json", [metrics])
        header = "row,true,predicted,confidence,score no,score yes,text"
        write_lines(
            home / name / "predictions.csv", [header, f"1,no,{'no' if name[-1] == 'a' else 'yes'},1,1,0,x"]
        )
    save_tiny_model(home / "llama")
    return home


@pytest.fixture(scope="module")
def forked_packages_of(home) -> Iterator[Callable]:
    """`packages_of` for many commands, in children of one process that has loaded nothing large."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=home,
        env=environment_of(home),
    )

    def run(command: list[str]) -> tuple[int, set[str], str]:
        report = home / "forked.json"
        report.unlink(missing_ok=True)
        script, *flags = command
        process.stdin.write(json.dumps([str(report), str(ROOT / script), *flags]) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        return code, LARGE & set(json.loads(report.read_text())), Path(f"{report}.stderr").read_text()

    yield run
    process.communicate()


TABLES = ("texts.csv", "texts.tsv", "texts.jsonl", "list.json")
EMBED, GENERATE, TRAIN = "embed_search.py", "generate.py", "train_classifier.py"
PROMPT = ("--prompt", "The quick")
QUICK = [  # help and mistakes: (command, exit code)
    ([EMBED, "--help"], 0),
    *(([EMBED, name, "--help"], 0) for name in ("similarity", "index", "search", "cluster", "evaluate")),
    ([EMBED, "look"], 2),
    ([EMBED, "search", "--index", "ix", "x", "--fast"], 2),
    ([EMBED, "search", "--index", "ix", "x", "--top-k", "0"], 2),
    ([EMBED, "search", "--index", "ix", "x", "--queries", "texts.txt"], 2),
    ([EMBED, "search", "--index", "nowhere", "x"], 2),
    ([EMBED, "search", "--index", "ix", "x", "--keep-columns", "nope"], 2),
    ([EMBED, "search", "--index", "damaged", "x"], 2),
    ([EMBED, "search", "--index", "ix", " "], 2),
    ([EMBED, "search", "--index", "ix", "x", "--model", "./nope"], 2),
    ([EMBED, "search", "--index", "ix", "x", "--rerank", "./nope"], 2),
    ([EMBED, "search", "--index", "ix", "x", "--max-length", "32"], 2),
    ([EMBED, "index", "nowhere.csv", "--index", "new"], 2),
    ([EMBED, "index", "empty.txt", "--index", "new"], 2),
    ([EMBED, "index", "texts.csv", "--index", "."], 2),
    ([EMBED, "index", "texts.csv", "--index", "ix", "--id-column", "label"], 2),
    ([EMBED, "delete", "--index", "ix"], 2),
    ([EMBED, "search", "texts.txt", "--query", " "], 2),
    ([EMBED, "like", "s1", "--unlike", "s1", "--index", "ix"], 2),
    ([EMBED, "dedupe", "texts.txt", "--output", "texts.txt"], 2),
    ([EMBED, "compact", "--index", "damaged"], 2),
    ([EMBED, "export", "--index", "ix", "--to", "rows.xlsx"], 2),
    ([EMBED, "export", "--index", "ix", "--to", "texts.csv"], 2),
    ([EMBED, "index", "texts.csv", "--index", "new", "--vectors", "texts.csv"], 2),
    ([EMBED, "serve", "--index", "damaged"], 2),
    ([EMBED, "serve", "--index", "ix", "--port", "x"], 2),
    ([EMBED, "pairs"], 2),
    ([EMBED, "similarity", "texts.txt", "--figure", "no/map.png"], 2),
    ([EMBED, "similarity", "bundled/nope"], 2),
    ([EMBED, "duplicates", "texts.txt", "--threshold", "2"], 2),
    ([EMBED, "evaluate", "--queries", "texts.txt"], 2),
    ([EMBED, "evaluate", "--sts", "nowhere.csv"], 2),
    ([EMBED, "compare-models", "./nope"], 2),
    ([EMBED, "project", "--index", "ix", "--output-dir", "."], 2),
    ([TRAIN, "--help"], 0),
    ([TRAIN, "--compare", "run-a", "nowhere"], 2),
    ([TRAIN, "--seeds", "0", "1", "--grid", "epochs=1,0"], 2),
    ([GENERATE, "--help"], 0),
    ([GENERATE], 2),
    ([GENERATE, *PROMPT, "--fast"], 2),
    ([GENERATE, *PROMPT, "--top-p", "3"], 2),
    ([GENERATE, *PROMPT, "--check", "--output", "new.jsonl"], 2),
    ([GENERATE, "--prompt", " "], 2),
    ([GENERATE, "--prompts-file", "nowhere.txt"], 2),
    ([GENERATE, "--perplexity", "empty.txt"], 2),
    ([GENERATE, "--score", "texts.txt"], 2),
    ([GENERATE, *PROMPT, "--model", "./nope"], 2),
    ([GENERATE, *PROMPT, "--output", ""], 2),
    ([GENERATE, *PROMPT, "--output", "texts.txt"], 2),
    ([GENERATE, *PROMPT, "--output", "texts.txt", "--resume"], 2),
    ([GENERATE, *PROMPT, "--output", "nowhere/new.jsonl"], 2),
    *(([GENERATE, "--prompts-file", name, "--text-column", "no"], 2) for name in TABLES),
    ([GENERATE, "--prompts-file", "texts.csv", "--prompt-template", "{no}"], 2),
    ([GENERATE, "--prompts-file", "texts.csv", "--keep-columns", "id,no", "--output", "new.jsonl"], 2),
    ([GENERATE, "--score", "texts.csv", "--references", "texts.csv", "--reference-column", "no"], 2),
    *(
        ([GENERATE, flag, "zip.txt"], 2)
        for flag in ("--prompts-file", "--perplexity", "--score-continuations")
    ),
    *(([TRAIN, "--dataset", name, "--text-column", "no"], 2) for name in TABLES),
    ([TRAIN, "--dataset", "texts.csv", "--label-column", "no"], 2),
    ([TRAIN, "--train-file", "texts.csv", "--test-file", "other.csv"], 2),
    ([TRAIN, "--dataset", "texts.csv", "--validation-file", "zip.csv", "--inspect"], 2),
    ([TRAIN, "--predict", "zip.txt", "--model", "bundled/all-MiniLM-L6-v2"], 2),
    *(([EMBED, "index", name, "--index", "new", "--text-column", "no"], 2) for name in TABLES),
    ([EMBED, "pairs", "zip.txt"], 2),
    ([GENERATE, "--serve", "--port", "x"], 2),
    ([GENERATE, "--serve", *PROMPT], 2),
]


@pytest.mark.parametrize("command, code", QUICK, ids=[" ".join(command) for command, _ in QUICK])
def test_help_and_mistakes_load_nothing_large(command, code, forked_packages_of):
    found, packages, stderr = forked_packages_of(command)
    assert (found, packages) == (code, set()), stderr
    assert len(stderr.splitlines()) == (code == 2), stderr


def test_packages_that_are_loaded_are_seen(home, forked_packages_of):
    """The same command in a forked child and in a process of its own: one that does load some."""
    command = [EMBED, "verify", "--index", "ix"]
    assert forked_packages_of(command) == packages_of(command, home)
    assert forked_packages_of(command)[:2] == (0, STORE)


INDEX = ("--index", "ix")
LOADED = {  # name: (command, the large packages that it may load)
    "similarity": ([EMBED, "similarity", "texts.txt"], {*COMPUTE, "tokenizers", "pyarrow.compute"}),
    "delete": ([EMBED, "delete", *INDEX, "nope", "--skip-bad"], STORE),
    "delete --where": ([EMBED, "delete", *INDEX, "--where", "label = 'no'"], {*STORE, "duckdb"}),
    "compact": ([EMBED, "compact", *INDEX], STORE),
    "verify": ([EMBED, "verify", *INDEX], STORE),
    "export": ([EMBED, "export", *INDEX, "--to", "rows.npy", "--to", "rows.parquet"], STORE),
    "export to FAISS": ([EMBED, "export", *INDEX, "--to", "rows.faiss"], {*STORE, "faiss"}),
    "search": ([EMBED, "search", *INDEX, "good film"], {*COMPUTE, "tokenizers"}),
    "list": ([EMBED, "list", *INDEX], COMPUTE),
    "show": ([EMBED, "show", *INDEX, "s1", "--vector"], STORE),
    "like": ([EMBED, "like", *INDEX, "s1"], COMPUTE),
    "pairs": ([EMBED, "pairs", *INDEX], COMPUTE),
    "duplicates": ([EMBED, "duplicates", *INDEX], {*COMPUTE, "scipy"}),
    "cluster": ([EMBED, "cluster", *INDEX, "--num-clusters", "2"], {*COMPUTE, *SKLEARN}),
    "cluster --figure": (
        [EMBED, "cluster", *INDEX, "--threshold", "0.5", "--figure", "map.png"],
        {*COMPUTE, *SKLEARN, "matplotlib"},
    ),
    "project": ([EMBED, "project", *INDEX, "--output-dir", "board"], {*STORE, "torch", "tensorboard"}),
}

LOADED["train --compare"] = ([TRAIN, "--compare", "run-a", "run-b"], {"numpy", "scipy", "tabulate"})

CPU = ("--device", "cpu", "--precision", "fp32")  # there the step in C computes, also where there is a GPU
TINY = (*PROMPT, "--model", "llama", "--max-new-tokens", "2", *CPU)
# transformers' code of a model imports scikit-learn, SciPy and pandas, and torch._dynamo tabulate
MODEL = {"torch", "numpy", "transformers", "tokenizers", "huggingface_hub", "tabulate", *SKLEARN}
LOADED |= {
    "generate, no compiler": ([GENERATE, *TINY], MODEL),
    "generate --score": (
        [GENERATE, "--score", "texts.txt", "--references", "texts.txt"],
        {"torch", "numpy", "tokenizers", "rouge_score", "pyarrow", *SKLEARN},
    ),
}


# each is a process of its own
QUICK = ("similarity", "export", "search")


@pytest.mark.parametrize("command, allowed", quick(LOADED, *QUICK))
def test_a_command_loads_what_it_needs(command, allowed, home):
    code, packages, stderr = packages_of(command, home)
    assert code == 0, stderr
    assert packages <= allowed


IN_C = {"torch", "numpy", "tokenizers"}
STEP = {  # the modes whose model the step in C computes: without transformers, whose import takes seconds
    "one text": ([*TINY], IN_C),
    "drawn": ([*TINY, "--top-k", "5", "--temperature", "0.9"], IN_C),
    "--chat": ([*TINY, "--chat"], IN_C),
    "--output": ([*TINY, "--output", "new.jsonl"], IN_C),
    "--lookup": ([*TINY, "--lookup", "3"], IN_C),
    "--explain": ([*TINY, "--explain"], {*IN_C, "tabulate"}),
    "--interactive": (["--model", "llama", *CPU, "--interactive"], IN_C),
    "--perplexity": (["--perplexity", "texts.txt", "--model", "llama", *CPU], IN_C),
}


@needs_compiler
@pytest.mark.parametrize("flags, allowed", quick(STEP, "--chat"))
def test_a_model_that_the_step_in_c_computes_needs_no_transformers(flags, allowed, home):
    known = {"PATH": os.environ["PATH"], "HF_HOME": str(cache_home(None))}  # where it is compiled already
    code, packages, stderr = packages_of([GENERATE, *flags], home, **known)
    assert code == 0, stderr
    assert packages <= allowed and "step in PyTorch" not in stderr


@needs_compiler
def test_the_bundled_language_model_needs_no_transformers(home):
    """Once its file has been fetched and read, in an earlier run: here, by the first of two."""
    known = {"PATH": os.environ["PATH"], "HF_HOME": str(cache_home(None))}
    flags = [*PROMPT, "--max-new-tokens", "2", *CPU]
    language_model.load(bundled.SMOLLM2, Runtime(torch.device("cpu"), "fp32"), cache_dir=None)
    code, packages, stderr = packages_of([GENERATE, *flags], home, **known)
    assert code == 0 and "step in C" in stderr, stderr
    assert packages <= IN_C


BEFORE_TORCH = (  # runs a script up to its import of PyTorch, and says on stderr what is {asked} then
    "import os, runpy, sys; sys.argv = sys.argv[1:]\n"
    "class Torch:\n"
    "    def find_spec(self, name, *_):\n"
    "        if name == 'torch': sys.exit({asked})\n"
    "sys.meta_path.insert(0, Torch())\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_the_bundled_language_model_is_verified_while_pytorch_is_imported(home):
    language_model.load(bundled.SMOLLM2, Runtime(torch.device("cpu"), "fp32"), cache_dir=None)  # is stored
    code = BEFORE_TORCH.format(asked="str([path.name for path in sys.modules['common.files'].HASHED_AHEAD])")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, ROOT / GENERATE, *PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment)
    assert done.stderr.strip() == str([bundled.STORED_FILE])


@pytest.mark.parametrize("own, expected", [({}, cli.GOMP_SPINS), ({"GOMP_SPINCOUNT": "7"}, "7")])
@pytest.mark.parametrize(
    "command",
    [[GENERATE, *PROMPT], ["embed_search.py", "similarity", ROOT / "docs/examples/sentences.txt"]],
    ids=lambda c: c[0],
)
def test_pytorchs_threads_soon_give_up_their_cores_unless_told_otherwise(command, own, expected, home):
    """Before PyTorch reads it: two threads of the step in C were slower than one without it."""
    script, *flags = command
    code = BEFORE_TORCH.format(asked="os.environ.get('GOMP_SPINCOUNT')")
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    environment |= {"PYTHONPATH": str(ROOT), **own}
    called = [sys.executable, "-c", code, ROOT / script, *flags]
    done = subprocess.run(called, capture_output=True, text=True, cwd=home, env=environment)
    assert done.stderr.strip() == expected
