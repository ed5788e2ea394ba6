"""Numbers on the command line: what is taken, and what is refused with its value."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from common import cli
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


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
