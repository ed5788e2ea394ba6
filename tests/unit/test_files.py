"""Folders that are put in place of others, when it goes wrong in between; one writer at a time;
manifests from elsewhere.
"""

import os
import signal
import socket
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError, reading
from common.files import (
    check_new,
    find_damage,
    manifest_text,
    member,
    only_writer,
    replace_file,
    replace_folder,
    write_manifest,
)
from conftest import limited_file_size


def test_what_was_put_aside_stays_until_the_new_folder_stands_there(tmp_path):
    """After a kill between the two renames the one put aside is all that there is; a second one
    that fails must not take it.
    """
    (tmp_path / "step.old").mkdir()
    (tmp_path / "step.old" / "weights").write_text("whole")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "of a save that was killed", tmp_path / "step")
    assert (tmp_path / "step.old" / "weights").read_text() == "whole"
    (tmp_path / "fresh").mkdir()
    replace_folder(tmp_path / "fresh", tmp_path / "step")
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_file_that_can_not_be_replaced_stays_and_leaves_nothing(tmp_path):
    path = tmp_path / "chat.json"
    replace_file(path, "before")
    with pytest.raises(OSError, match="File too large"), limited_file_size(100):
        replace_file(path, "x" * 1000)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"chat.json": "before"}


# One writer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file", "file that exists"])
def test_a_second_writer_is_told_who_the_first_one_is(kind, tmp_path):
    path = tmp_path if kind == "folder" else tmp_path / "texts.jsonl"
    if kind == "file that exists":
        path.write_text("a line\n")
    with only_writer(path, flag="--output"):
        second = only_writer(path, flag="--output")
        with pytest.raises(UserError, match=f"--output {path}: process {os.getpid()} on .* since 20"), second:
            pass
    with only_writer(path, flag="--output"):
        pass
    # the lock leaves nothing, and touches nothing
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == (
        {"texts.jsonl": "a line\n"} if kind == "file that exists" else {}
    )


def test_a_link_is_another_name_of_the_same_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "folder" / "texts.jsonl")
    second = only_writer(tmp_path / "link.jsonl", flag="--output")
    first = only_writer(tmp_path / "folder" / "texts.jsonl", flag="--output")
    with first, pytest.raises(UserError, match="is writing to it"), second:
        pass


def test_a_folder_for_new_files_has_nothing_but_the_lock_of_its_writer(tmp_path):
    check_new(str(tmp_path / "nowhere"))
    with only_writer(tmp_path, flag="--output-dir"):
        check_new(str(tmp_path))
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="--output-dir .*holds other files"):
            check_new(str(tmp_path))


def test_a_killed_writer_leaves_no_lock_although_its_child_goes_on(tmp_path):
    """A loader's worker outlives its parent by seconds."""
    (tmp_path / "locked").mkdir()
    writer = os.fork()
    if not writer:
        with only_writer(tmp_path / "locked", flag="--x"):
            child = os.fork()
            if child:
                (tmp_path / "child").write_text(str(child))
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        time.sleep(0.005)
    with pytest.raises(UserError, match=f"process {writer} "), only_writer(tmp_path / "locked", flag="--x"):
        pass
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    with only_writer(tmp_path / "locked", flag="--x"):
        pass
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "locked").mkdir()
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "locked" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="--x"), only_writer(tmp_path / "locked", flag="--x"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_the_holder_s_name_does_not_command_the_terminal(tmp_path):
    with only_writer(tmp_path, flag="--x"):
        (tmp_path / ".lock").write_bytes(b"\x1b[2J\xff process 1\n" * 100)
        with pytest.raises(UserError) as error, only_writer(tmp_path, flag="--x"):
            pass
    assert str(error.value).isprintable() and len(str(error.value)) < 300


# Manifests ----------------------------------------------------------------------------------------


def plant(folder: Path) -> None:
    """Make a folder of everything that a manifest must not lead to."""
    (folder / "inside").mkdir(parents=True)
    (folder / "plain").write_text("plain")
    (folder / "inside" / "plain").write_text("plain")
    (folder.parent / "secret").write_text("secret")
    (folder / "out").symlink_to(folder.parent / "secret")
    (folder / "up").symlink_to(folder.parent)
    (folder / "within").symlink_to(folder / "plain")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "device").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))


REFUSED = {  # a name in a manifest, and whether the file is said to be missing instead
    "/etc/passwd": False,
    "../secret": False,
    "inside/../../secret": False,
    "./plain": False,
    "inside//plain": False,
    "plain/": False,
    "": False,
    ".": False,
    "..": False,
    "inside": False,
    "out": False,
    "up/secret": False,
    "device": False,
    "pipe": False,
    "socket": False,
    "plain\0": False,
    "inside\\plain": False,
    "nowhere": True,
    "\ud800": False,
}


@pytest.mark.parametrize("name, missing", REFUSED.items(), ids=map(repr, REFUSED))
def test_a_manifest_names_only_files_of_its_folder(name, missing):
    with tempfile.TemporaryDirectory() as parent:  # short, as the path of a socket must be
        folder = Path(parent) / "folder"
        plant(folder)
        with pytest.raises(FileNotFoundError if missing else ValueError):
            member(folder, name)
        damage = _damage_of(folder, {name: {"bytes": 6, "sha256": "0" * 64}})
        assert damage is not None and ("missing" if missing else "manifest.json is corrupt") in damage


@pytest.mark.parametrize("name", ["loop", "n" * 300, "plain/below"])
def test_a_name_that_the_system_refuses_is_damage(name):
    with tempfile.TemporaryDirectory() as parent:
        plant(Path(parent) / "folder")
        assert "can't be read" in (_damage_of(Path(parent) / "folder", {name: {}}) or "")


@pytest.mark.parametrize("name", ["plain", "inside/plain", "within"])
def test_a_manifest_may_name_what_is_within(name):
    with tempfile.TemporaryDirectory() as parent:
        plant(Path(parent) / "folder")
        assert member(Path(parent) / "folder", name).read_text() == "plain"


def _damage_of(folder: Path, files: object) -> str | None:
    (folder / "manifest.json").write_text(manifest_text(files))  # the seal holds
    return find_damage(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    (folder / "weights").write_text("weights")
    (folder / "sub").mkdir()
    (folder / "sub" / "more").write_text("more")
    return folder


@settings(max_examples=80)
@given(
    files=JSON | st.dictionaries(st.sampled_from(["weights", "sub/more", "sub", "../x", "/etc/passwd"]), JSON)
)
def test_any_sealed_manifest_is_intact_or_damaged_but_no_error(files, intact):
    damage = _damage_of(intact, files)
    assert isinstance(damage, str) or files == {}


@settings(max_examples=80)
@given(data=st.data())
def test_a_changed_manifest_is_damaged(data, intact):
    (intact / "manifest.json").unlink(missing_ok=True)
    write_manifest(intact)
    whole = (intact / "manifest.json").read_bytes()
    text = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    (intact / "manifest.json").write_bytes(text)
    assert (find_damage(intact) is None) == (bytes(text) == whole)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "", "null", "[]", '{"files": 5}', '{"files": [1]}'])
def test_a_manifest_that_is_none_is_damage(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    assert "manifest.json is corrupt" in (find_damage(tmp_path) or "")


def test_a_manifest_that_is_a_pipe_or_a_folder_is_damage(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    assert "manifest.json" in (find_damage(tmp_path) or "")
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    assert "manifest.json" in (find_damage(tmp_path) or "")


# Libraries ----------------------------------------------------------------------------------------


class Panic(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize("error", [ValueError("bad\nvalue"), RecursionError(), Panic("x"), KeyError("k")])
def test_what_a_library_raises_is_one_line_that_names_the_file(error):
    with (
        pytest.raises(UserError, match="rows.csv: .*; correct it") as told,
        reading("rows.csv", "correct it"),
    ):
        raise error
    assert told.value.__cause__ is error and "\n" not in str(told.value)


@pytest.mark.parametrize("error", [UserError("own"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_library_s_error_passes(error):
    with pytest.raises(type(error)) as passed, reading("rows.csv", "correct it"):
        raise error
    assert passed.value is error
