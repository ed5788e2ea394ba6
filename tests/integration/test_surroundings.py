"""The scripts in surroundings that are not as they should be: terminals, limits, left-over
variables, a second job. Each works, or ends with one line and exit code 2.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, heavy, make_sentences

SCRIPTS = {
    "train_classifier.py": [],
    "generate.py": ["--prompt", "x"],
    "embed_search.py": ["similarity", "bundled/bbc-news"],
}


@pytest.fixture
def flags(tiny_model, sentences_csv, cache_dir) -> list[str]:
    given = ["--model", tiny_model, "--dataset", sentences_csv, "--cache-dir", cache_dir, "--epochs", 1]
    return [*map(str, given), "--device", "cpu", "--precision", "fp32"]


def in_shell(before: str, *command, after: str = "", cwd: Path = ROOT, **environment):
    """Run a script in a shell, after a command such as ulimit and with a redirection."""
    return subprocess.run(
        ["bash", "-c", f'{before} "$0" "$@" {after}', sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )


# the value that a script finds in `sys`, and what it says
ELSEWHERE = {"sys.platform = 'win32'": "WSL", "sys.version_info = (3, 10, 14)": "3.11"}


@pytest.mark.parametrize("machine", ELSEWHERE)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_machine_that_the_scripts_do_not_run_on_is_one_line(script, machine):
    start = f"import runpy, sys; {machine}; runpy.run_path({script!r}, run_name='__main__')"
    done = in_shell("exec", "-c", start)
    assert is_one_line(done, ELSEWHERE[machine])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_machine_without_the_packages_is_one_line(script):
    done = in_shell("exec", "-S", script, *SCRIPTS[script])  # -S: Python without installed packages
    assert is_one_line(done, "not installed", "pip install -r requirements.txt")


def is_one_line(done, *parts: str) -> bool:
    lines = done.stderr.splitlines()
    return done.returncode == 2 and len(lines) == 1 and all(part in lines[0] for part in parts)


@pytest.mark.parametrize("variables", [{"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "x"}, {"WORLD_SIZE": ""}])
@pytest.mark.parametrize("script", SCRIPTS)
def test_variables_left_over_from_a_job_are_told_at_once(script, variables):
    done = in_shell("", script, *SCRIPTS[script], **variables)
    assert is_one_line(done, f"{script}: error: ", next(iter(variables)), "unset"), done


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_limit_that_the_libraries_exceed_is_told_at_once(script):
    done = in_shell("ulimit -v 2000000;", script, *SCRIPTS[script])
    assert is_one_line(done, f"{script}: error: ", "ulimit -v"), done


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_reader_of_the_help_may_leave(script):
    done = in_shell("set -o pipefail;", script, "--help", after="| head -c 1")
    assert done.returncode in (0, 141) and done.stderr == "" and len(done.stdout) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="keeps a process on one core")
def test_threads_of_a_library_do_not_abort_a_process_that_ends(tmp_path):
    """Arrow's threads waited for Python's lock when the process ended, which aborts it: four times in
    five with one core and a lock that is rarely given up.
    """
    start = (
        "import os, sys; sys.setswitchinterval(0.3); os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    )
    (tmp_path / "sitecustomize.py").write_text(start)
    (tmp_path / "texts.csv").write_text("text,label\na b,x\nc,d,e\nf g,y\n")
    command = ("embed_search.py", "index", tmp_path / "texts.csv", "--index", tmp_path / "index")
    for _ in range(3):
        assert is_one_line(in_shell("exec", *command, PYTHONPATH=str(tmp_path)), "line 3: 3 cells")


@pytest.mark.slow
def test_a_limit_of_file_size_is_one_line(flags, tmp_path):
    """TensorBoard's thread meets it as well."""
    done = in_shell("ulimit -f 8;", "train_classifier.py", *flags, "--output-dir", tmp_path / "run")
    assert is_one_line(done, "ulimit -f"), done.stderr


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_before_the_data_are_read(flags, tmp_path):
    nowhere = {"PATH": str(tmp_path), "CXX": str(tmp_path / "c++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "train_classifier.py", *flags, "--compile", "--output-dir", tmp_path / "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **nowhere},
    )
    assert is_one_line(done, "--compile", "compiler"), done.stderr
    assert not (tmp_path / "run").exists() and "texts" not in done.stdout


@pytest.mark.slow
def test_accented_labels_on_a_terminal_without_accents(flags, tmp_path):
    """The files are UTF-8; the backend of a notebook and closed streams do not matter either."""
    names = {"pos": "caf\u00e9", "neg": "\u732b"}
    rows = [f"{text},{names[label]}\n" for text, label in make_sentences(60)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(rows), encoding="utf-8")
    flags[flags.index("--dataset") + 1] = str(tmp_path / "rows.csv")
    plain = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    plain["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    done = in_shell("", "train_classifier.py", *flags, "--output-dir", tmp_path / "run", after="<&-", **plain)
    assert done.returncode == 0 and done.stderr == "" and "caf?" in done.stdout, done
    for name in ("report.md", "predictions.csv"):
        content = (tmp_path / "run" / name).read_text("utf-8")
        assert "caf\u00e9" in content and "\u732b" in content


@pytest.mark.slow
def test_jobs_that_start_at_once_get_folders_of_their_own(flags, tmp_path):
    command = [sys.executable, ROOT / "train_classifier.py", *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    said = [job.communicate(timeout=250) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    for folder in folders:  # each has a whole run
        assert (folder / "report.md").exists() and not (folder / ".lock").exists()


# Permissions: the administrator's power to pass over them is laid down first, where the tests have
# it
UNPRIVILEGED = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
needs_permissions = pytest.mark.skipif(
    bool(UNPRIVILEGED) and shutil.which("setpriv") is None, reason="the administrator may read everything"
)


def run_unprivileged(*command, **environment):
    """Run a script as a user for whom permissions count, with the default cache in the home folder."""
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HOME"}
    return subprocess.run(
        [*UNPRIVILEGED, sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        env={**inherited, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture
def closed(tmp_path):
    """A folder in which its owner may not write."""
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


@needs_permissions
@pytest.mark.parametrize(
    "command",
    [
        heavy(["train_classifier.py", "--model", "MODEL", "--dataset", "ROWS", "--output-dir", "OUT"]),
        ["generate.py", "--prompt", "x"],
    ],
)
def test_a_home_that_can_not_be_written_is_one_line_with_the_flag(command, tiny_model, closed, tmp_path):
    """It is where the cache is by default."""
    (tmp_path / "rows.csv").write_text("text,label\n" + "good,a\nbad,b\n" * 20)
    values = {"MODEL": tiny_model, "ROWS": tmp_path / "rows.csv", "OUT": tmp_path / "run"}
    done = run_unprivileged(*(values.get(part, part) for part in command), HOME=str(closed))
    assert is_one_line(done, str(closed), "--cache-dir"), done
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@needs_permissions
def test_a_home_that_can_not_be_written_is_not_needed(flags, closed, tmp_path):
    done = run_unprivileged("train_classifier.py", *flags, "--output-dir", tmp_path / "run", HOME=str(closed))
    assert (done.returncode, done.stderr) == (0, ""), done


@pytest.mark.slow
@needs_permissions
def test_folders_for_temporary_files_are_not_needed(closed, tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    flags = ["--index", tmp_path / "index", "--cache-dir", tmp_path / "cache"]
    done = run_unprivileged("embed_search.py", "index", tmp_path / "texts.txt", *flags, TMPDIR=str(closed))
    assert (done.returncode, done.stderr) == (0, ""), done


@needs_permissions
@pytest.mark.parametrize(
    "command",
    [
        ["train_classifier.py", "--output-dir", "CLOSED/run"],
        ["train_classifier.py", "--cache-dir", "CLOSED/cache"],
        ["generate.py", "--prompt", "x", "--output", "CLOSED/texts.jsonl"],
        ["generate.py", "--prompt", "x", "--cache-dir", "CLOSED/cache"],
        ["embed_search.py", "index", "bundled/bbc-news", "--index", "CLOSED/index"],
        ["embed_search.py", "index", "bundled/bbc-news", "--index", "new", "--cache-dir", "CLOSED/cache"],
        [
            "embed_search.py",
            "cluster",
            "bundled/bbc-news",
            "--num-clusters",
            "5",
            "--output",
            "CLOSED/map.html",
        ],
    ],
)
def test_a_place_that_can_not_be_written_is_told_before_the_libraries_are_loaded(command, closed):
    done = run_unprivileged("-X", "importtime", *(part.replace("CLOSED", str(closed)) for part in command))
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(said) == 1 and str(closed) in said[0], (said, done.stdout)
    assert not any("| torch" in line for line in done.stderr.splitlines())


@needs_permissions
def test_an_index_that_can_not_be_written_is_searched_by_words_and_codes_all_the_same(
    tiny_embedder, ok, tmp_path
):
    """As one that a class shares: what its owner has not made yet is made for the command alone."""
    (tmp_path / "texts.txt").write_text("a good film\na bad story\nthe actors\n")
    index = tmp_path / "index"
    ok("index", tmp_path / "texts.txt", "--index", index)
    before = sorted(index.iterdir())
    index.chmod(0o555)
    flags = ["--hybrid", "--approximate", "--device", "cpu", "--precision", "fp32", "--json"]
    done = run_unprivileged("embed_search.py", "search", "--index", index, "story", *flags)
    index.chmod(0o755)
    assert done.returncode == 0, done
    said = [f"{index}/{name}: built for this command alone" for name in ("cache-bm25", "cache-faiss")]
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith(start) for line, start in zip(lines, said)), done.stderr
    assert sorted(index.iterdir()) == before
    assert json.loads(done.stdout) == ok("search", "--index", index, "story", "--hybrid", "--json")


@needs_permissions
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "."])
@pytest.mark.parametrize("script", ["train_classifier.py", "embed_search.py"])
def test_a_model_that_can_not_be_read_is_one_line(script, name, tiny_model, sentences_csv, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    command = ["--dataset", sentences_csv, "--output-dir", tmp_path / "run"]
    if script == "embed_search.py":
        command = ["similarity", sentences_csv]
    (model / name).chmod(0)
    done = run_unprivileged(script, *command, "--model", model, "--cache-dir", tmp_path / "cache")
    (model / name).chmod(0o755)
    assert is_one_line(done, str(model / name) if name != "." else str(model), "ermission"), done


@needs_permissions
@pytest.mark.parametrize(
    "closed_part", [heavy("rows.csv"), heavy("classes"), "classes/a", heavy("classes/a/1.txt")]
)
def test_data_that_can_not_be_read_are_one_line(closed_part, tmp_path):
    """A class whose folder can't be entered is not left out."""
    (tmp_path / "rows.csv").write_text("text,label\ngood,a\nbad,b\n")
    for name in "ab":
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "1.txt").write_text(f"a text of {name}")
    dataset = tmp_path / closed_part.split("/")[0]
    (tmp_path / closed_part).chmod(0)
    flags = ["--dataset", dataset, "--output-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    done = run_unprivileged("train_classifier.py", *flags)
    (tmp_path / closed_part).chmod(0o755)
    assert is_one_line(done, str(tmp_path / closed_part), "ermission"), done
