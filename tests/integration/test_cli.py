"""Numbers on the command line: what is taken, and what is refused with its value; and how a
process ends, whatever surrounds it.
"""

import argparse
import errno
import gc
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import embed_search
import generate
import train_classifier
from common import cli
from common.errors import UserError, counted

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "count, words, said",
    [
        (0, ("row",), "0 rows"),
        (1, ("row",), "1 row"),
        (2000, ("row",), "2,000 rows"),
        (1, ("class", "classes"), "1 class"),
        (2, ("class", "classes"), "2 classes"),
    ],
)
def test_one_thing_is_not_several(count, words, said):
    assert counted(count, *words) == said


@pytest.mark.parametrize(
    "parse, text, value",
    [
        (cli.positive_int, "3", 3),
        (cli.positive_float, "2e-5", 2e-5),
        (cli.non_negative_float, "0", 0.0),
        (cli.fraction, "0.999", 0.999),
        (cli.non_negative_int, "0", 0),
    ],
)
def test_takes_numbers_in_range(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    "parse, text",
    [
        (cli.positive_int, "0"),
        (cli.positive_int, "-1"),
        (cli.positive_int, "1.5"),
        (cli.positive_float, "nan"),
        (cli.positive_float, "inf"),
        (cli.positive_float, "0"),
        (cli.non_negative_float, "-0.1"),
        (cli.fraction, "1"),
        (cli.fraction, "nan"),
        (cli.non_negative_int, "4294967296"),
    ],
)
def test_refuses_numbers_out_of_range_and_says_the_value(parse, text):
    with pytest.raises(argparse.ArgumentTypeError, match=text.replace(".", r"\.")):
        parse(text)


def test_flags_are_not_abbreviated():
    parser = cli.Parser(prog="script")
    cli.add_shared_flags(parser, model="m")
    with pytest.raises(UserError, match="--mod"):
        parser.parse_args(["--mod", "x"])


@pytest.mark.parametrize(
    "script, words, advice",
    [
        ("train_classifier.py", ["--epoch", "3"], "--epoch 3; did you mean --epochs?"),
        ("train_classifier.py", ["reviews.csv"], "reviews.csv; a value follows its flag: --dataset "),
        ("generate.py", ["--promt=a b"], "--promt=a b; did you mean --prompt?"),
        ("generate.py", ["Once", "upon"], "Once upon; a value follows its flag: --prompt "),
        ("embed_search.py", ["search", "--index", "x", "--topk", "3", "q"], "--topk; did you mean --top-k?"),
        ("embed_search.py", ["search", "--index", "x", "--zzz", "q"], "--zzz (--help lists the flags)"),
    ],
)
def test_an_unknown_argument_names_what_was_meant(script, words, advice):
    done = subprocess.run([sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: unrecognized arguments: {advice}")


@pytest.mark.parametrize(
    "words, usage",
    [
        (["generate.py"], "generate.py [flags]"),
        (["embed_search.py"], "embed_search.py [flags] COMMAND ..."),
        (["embed_search.py", "like"], "embed_search.py like --index DIR [flags] ID [ID ...]"),
    ],
)
def test_help_begins_with_what_must_be_given(words, usage):
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True)
    first, blank, description = done.stdout.splitlines()[:3]
    assert first == f"usage: {usage}" and blank == "" and description[0].isupper()


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("no such file"), 2, "script: error: no such file\n"),
        (KeyboardInterrupt(), 130, "script: interrupted\n"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(error, code, line, capsys):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as exit:
        cli.run(cli.Parser(prog="script"), main, [])
    assert exit.value.code == code
    assert capsys.readouterr() == ("", line)


def test_a_bug_keeps_its_traceback():
    def main(args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(cli.Parser(prog="script"), main, [])


def test_a_lost_connection_of_a_process_on_its_own_is_no_lost_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def main(args):
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        cli.run(cli.Parser(prog="script"), main, [])


def test_help_shows_defaults_that_say_something(capsys):
    parser = cli.Parser(prog="script")
    cli.add_shared_flags(parser, model="the-model")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())  # argparse breaks lines to the terminal
    assert "(default: the-model)" in shown and "None" not in shown


def test_flags_that_do_not_go_together_are_refused_before_main(capsys):
    def check(args):
        raise UserError(f"--seed {args.seed}: not with this")

    parser = cli.Parser(prog="script", check=check)
    cli.add_shared_flags(parser, model="m")
    with pytest.raises(SystemExit):
        cli.run(parser, lambda args: pytest.fail("main was called"), ["--seed", "3"])
    assert capsys.readouterr() == ("", "script: error: --seed 3: not with this\n")


def test_the_name_of_a_folder_is_not_empty():
    """An unset variable of the shell would else mean the current folder."""
    with pytest.raises(argparse.ArgumentTypeError, match="empty"):
        cli.folder("")


def flags_of_files(parser: argparse.ArgumentParser) -> Iterator[tuple[str, Callable]]:
    """Yield name and type of each flag of a script that stands for a file or folder, as its help says."""
    kinds = {"FILE", "FOLDER", "DIR", "RUN", "NPY", "PNG", "CSV", "JSONL"}
    others = {"--model", "--dataset", "--cache-dir", "--output-dir", "--tokenizer", "--rerank", "--texts"}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from flags_of_files(command)
        elif kinds & set(str(action.metavar).split("|")) or others & set(action.option_strings):
            yield action.option_strings[0], action.type or str


@pytest.mark.parametrize("script", [train_classifier, generate, embed_search])
def test_the_sign_of_the_home_folder_is_read_where_a_shell_leaves_it(script, tmp_path, monkeypatch):
    """Arrow reads it too, where nothing else did: files were left in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    flags = list(flags_of_files(script.make_parser()))
    assert len({flag for flag, _ in flags}) > 5
    for flag, parse in flags:
        try:
            read = parse("~/here/x.npy")
        except (argparse.ArgumentTypeError, UserError) as error:
            read = str(error)
        assert str(tmp_path / "home/here/x.npy") in read and "~" not in read, flag
    args = embed_search.make_parser()._parse(["search", "--index=milvus:~/a.db/news", "x"], None)
    assert args.index == f"milvus:{tmp_path}/home/a.db/news"


def test_control_c_while_libraries_are_imported_is_quiet():
    program = "\n".join(
        [
            "import os, signal",
            "from common import cli",
            "args = cli.parse(cli.Parser(prog='script'), [])",
            "os.kill(os.getpid(), signal.SIGINT)",
            "print('still there')",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_control_c_ends_main_as_ever():
    program = "\n".join(
        [
            "import os, signal",
            "from common import cli",
            "parser = cli.Parser(prog='script')",
            "args = cli.parse(parser, [])",
            "cli.run_main(lambda args: os.kill(os.getpid(), signal.SIGINT), args, prog='script')",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "script: interrupted\n")


@pytest.mark.parametrize("text", ["", " ", "\t"])
def test_an_empty_name_is_refused(text):
    """It is what an unset variable of the shell leaves."""
    with pytest.raises(argparse.ArgumentTypeError, match="empty"):
        cli.name(text)


# Faults of the system -----------------------------------------------------------------------------


def fails_with(error: BaseException, *flags: str):
    def main(args):
        raise error

    cli.run(cli.Parser(prog="script"), main, flags)


FAULTS = {  # name: (the error, what the line must hold)
    "full disk": (OSError(errno.ENOSPC, "No space", "out"), ("out", "No space left", "--output-dir")),
    "quota": (OSError(errno.EDQUOT, "quota"), ("--cache-dir",)),
    "limit of a file": (OSError(errno.EFBIG, "big", "o.jsonl"), ("o.jsonl", "ulimit -f")),
    "no permission": (PermissionError(errno.EACCES, "x", "/no/x"), ("/no/x", "permissions")),
    "read-only": (OSError(errno.EROFS, "x", "/mnt/x"), ("/mnt/x", "Read-only", "--cache-dir")),
    "open files": (OSError(errno.EMFILE, "x", "y"), ("ulimit -n",)),
    "no memory": (OSError(errno.ENOMEM, "x"), ("Cannot allocate memory", "ulimit -v")),
    "no memory for Python": (MemoryError(), ("Cannot allocate memory", "ulimit -v")),
    "no memory for PyTorch": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        ("ulimit -v",),
    ),
    "no memory for oneDNN": (RuntimeError("could not create a primitive"), ("ulimit -v",)),
    "no thread": (RuntimeError("can't start new thread"), ("ulimit -u",)),
    "no process": (BlockingIOError(errno.EAGAIN, "x"), ("ulimit -u",)),
    "broken disk": (OSError(errno.EIO, "x", "weights"), ("weights", "Input/output error")),
    "long name": (OSError(errno.ENAMETOOLONG, "x", "n" * 300), ("n" * 300, "shorter")),
    "loop of links": (OSError(errno.ELOOP, "x", "a"), ("a", "link")),
    "Rust": (Exception("I/O error: File too large (os error 27)"), ("File too large", "ulimit -f")),
    "Rust, no permission": (Exception("Permission denied (os error 13)"), ("Permission denied",)),
    "Arrow": (Exception("[Errno 28] Error writing bytes. Detail: [errno 28] x"), ("No space left",)),
    "datasets": (Exception("Not enough disk space. Needed: 5"), ("No space left", "--cache-dir")),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("error, parts", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_the_system_is_one_line(error, parts, wrapped, capsys):
    if wrapped:  # as libraries do
        outer = ValueError("could not save")
        outer.__cause__ = error
        error = outer
    with pytest.raises(SystemExit) as exit:
        fails_with(error)
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("script: error: ") and [part for part in parts if part not in err] == [], err


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No such file"), KeyError("28"), ValueError("(os error 2)")]
)
def test_what_may_be_a_bug_is_no_fault_of_the_system(error):
    with pytest.raises(type(error)):
        fails_with(error)


def test_debug_shows_where_a_mistake_was_found(capsys):
    with pytest.raises(SystemExit):
        fails_with(UserError("wrong"), "--debug")
    err = capsys.readouterr().err
    assert "Traceback" in err and "in main" in err and err.endswith("script: error: wrong\n")
    with pytest.raises(PermissionError):
        fails_with(PermissionError(errno.EACCES, "x"), "--debug")


def test_a_message_does_not_command_the_terminal(capsys):
    with pytest.raises(SystemExit):
        fails_with(UserError("file \x1b[2Jx\x07\x9b: wrong\nname"))
    assert capsys.readouterr().err == "script: error: file \ufffd[2Jx\ufffd\ufffd: wrong name\n"


# What surrounds a process -------------------------------------------------------------------------


JOBS = {  # name: (variables, what the line must hold; None: it is a job, or none)
    "none": ({}, None),
    "one process": ({"RANK": "0", "WORLD_SIZE": "1"}, None),
    "of torchrun": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", cli.TORCHRUN: "x"},
        None,
    ),
    "no number": ({"RANK": "first"}, "RANK=first"),
    "empty": ({"WORLD_SIZE": ""}, "WORLD_SIZE="),
    "negative": ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
    "fraction": ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0"),
    "huge": ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9"),
    "other digits": ({"RANK": "\u0661"}, "RANK="),
    "a rank alone": ({"RANK": "1"}, "RANK=1"),
    "a rank too high": ({"RANK": "2", "WORLD_SIZE": "2", cli.TORCHRUN: "x"}, "RANK=2"),
    "left over": ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
    "left over with an address": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        "WORLD_SIZE=2",
    ),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2", cli.TORCHRUN: "x"}, "WORLD_SIZE=2"),
}


@pytest.mark.parametrize("variables, part", JOBS.values(), ids=JOBS)
def test_variables_of_torchrun(variables, part, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", cli.TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if part is None:
        cli.check_job()
        return
    with pytest.raises(UserError, match="unset") as error:
        cli.check_job()
    assert part in str(error.value)


def test_torchrun_repeats_the_line(tmp_path, monkeypatch):
    """It prints what this file holds at the end of its own report."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        fails_with(UserError("no such file"))
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == message["extraInfo"]["py_callstack"] == "script: error: no such file"
    assert int(message["extraInfo"]["timestamp"]) > 0
    with pytest.raises(ZeroDivisionError):
        fails_with(ZeroDivisionError())
    assert "ZeroDivisionError" in (tmp_path / "error.json").read_text()


@pytest.mark.parametrize(
    "encoding, shown", [("utf-8", '{"name": "caf\u00e9"}'), ("ascii", '{"name": "caf\\u00e9"}')]
)
def test_json_stays_json_on_every_terminal(encoding, shown, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert cli.json_line({"name": "caf\u00e9"}) == shown
    assert json.loads(cli.json_line({"name": "\ud800"})) == {"name": "\ud800"}  # half of a character


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_has_no_number_that_json_lacks(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    value = {"f": [float("nan"), 1.5, {"g": float("-inf")}], "name": "caf\u00e9"}
    shown = json.loads(cli.json_line(value), parse_constant=pytest.fail)
    assert shown == {"f": [None, 1.5, {"g": None}], "name": "caf\u00e9"}


@pytest.mark.parametrize("flag", ["--model=--", "--top-k=--", "--queries=--"])
def test_a_flag_whose_value_is_a_separator_is_refused(flag):
    with pytest.raises(UserError, match=f"{flag.removesuffix('=--')}: '--' is no value"):
        embed_search.make_parser().parse_args(["search", "--index", "x", flag])


PROGRAM = r"""
import sys
from common import cli
from common.errors import UserError
def main(args):
    mode = {mode!r}
    if mode == "mistake":
        raise UserError("wrong")
    if mode == "read":
        print(repr(sys.stdin.read()))
    if mode == "accents":
        print("caf\u00e9 \ud800")
    if mode == "many":
        print("line\n" * 100000)
    if mode == "open":
        opened = open({path!r}, "w")
        print("printed")
        print("told", file=sys.stderr)
        print(opened.fileno(), file=opened, flush=True)
cli.run(cli.Parser(prog="script"), main, {argv!r})
"""


def in_shell(redirected: str, *, mode: str = "", path: str = "", argv: tuple = (), **environment):
    """Run a program with `cli.run` in a shell, with what stands behind its name there."""
    program = PROGRAM.format(mode=mode, path=path, argv=list(argv))
    # which some environments set: without it, what can't be written is written again at the end
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$PYTHON" -c "$PROGRAM" {redirected}'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**surroundings, "PYTHON": sys.executable, "PROGRAM": program, **environment},
    )


@pytest.mark.parametrize("argv, mode", [(["--help"], ""), ([], "many")])
def test_a_reader_that_leaves_early_is_no_error(argv, mode):
    done = in_shell("| head -c 5", mode=mode, argv=argv)
    # a short help may be written before the reader has left
    assert done.returncode in ((0, 141) if argv else (141,)) and done.stderr == "", done
    assert len(done.stdout) == 5


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_file_does_not_take_the_place_of_a_closed_stream(closed, tmp_path):
    done = in_shell(closed, mode="open", path=str(tmp_path / "file"))
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "file").read_text()) > 2  # and nothing else is in it
    assert done.stdout == ("" if ">&-" in closed.split() else "printed\n")


def test_a_closed_input_is_an_empty_one():
    assert in_shell("<&-", mode="read").stdout == "''\n"


def test_a_mistake_has_its_code_without_a_place_to_say_it():
    for redirected in ("2>&-", ">&- 2>&-", "2>/dev/full"):
        assert in_shell(redirected, mode="mistake").returncode == 2


def test_a_full_device_behind_stdout_is_one_line():
    done = in_shell(">/dev/full", mode="many")
    assert done.returncode == 2 and "No space left" in done.stderr and done.stderr.count("\n") == 1


def test_a_terminal_without_accents_shows_what_it_can():
    plain = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = in_shell("", mode="accents", **plain)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf? ?\n", "")


def test_libraries_are_not_searched_for_garbage(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    frozen = gc.get_freeze_count()
    cli.loading()
    was_enabled = gc.isenabled()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    cli.run_main(lambda args: None, argparse.Namespace(), prog="program")
    assert not was_enabled and gc.isenabled() and gc.get_freeze_count() > frozen  # also at the end


def test_a_limit_below_what_the_libraries_need_is_said_before_they_are_loaded():
    done = in_shell("", mode="", path="")
    assert done.returncode == 0
    program = PROGRAM.format(mode="", path="", argv=[])
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 2000000; "$PYTHON" -c "$PROGRAM"'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "PROGRAM": program},
    )
    assert done.returncode == 2 and "ulimit -v" in done.stderr and done.stderr.count("\n") == 1


def test_an_import_that_the_system_prevents_is_one_line():
    program = "\n".join(
        [
            "from common import cli",
            "args = cli.parse(cli.Parser(prog='script'), [])",
            "raise ImportError('x.so: failed to map segment from shared object: Cannot allocate memory')",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("script: error: Cannot allocate memory")
    done = subprocess.run(
        [sys.executable, "-c", program.replace("ImportError(", "ImportError('no' ")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2  # the words count, wherever they stand
    done = subprocess.run(
        [sys.executable, "-c", program.replace("Cannot allocate memory", "")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" in done.stderr  # a bug, or a broken installation


def test_nohup_is_honoured(monkeypatch):
    for handler, expected in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        monkeypatch.setattr(signal, "getsignal", lambda number, handler=handler: handler)
        assert (signal.SIGHUP in cli.stop_signals()) == expected


def test_the_backend_of_a_notebook_is_not_used(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    cli.parse(cli.Parser(prog="script"), [])
    assert os.environ["MPLBACKEND"] == "Agg"


def test_a_thread_leaves_faults_of_the_system_to_the_main_one(capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back afterwards

    def fail(error):
        raise error

    def main(args):
        for error in (OSError(errno.EFBIG, "too large"), ZeroDivisionError()):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()

    cli.run(cli.Parser(prog="script"), main, [])
    told = capsys.readouterr().err
    assert "ZeroDivisionError" in told and "OSError" not in told
