"""The store against a dictionary, whatever is added, updated, deleted and compacted; readers
during writes; damage; memory.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.errors import UserError
from common.files import LOCK, seal
from common.search import index, segments, texts
from common.search.builder import settings_of
from common.search.index import open_snapshot, open_store, rows_with_ids, verify
from common.search.segments import ID, TEXT, VECTOR
from common.search.selection import matching
from conftest import ROOT, StubEncoder, heavy
from index_rows import COLUMNS, numbered, unit_vectors, write, write_vectors


def contents(snapshot) -> dict[str, tuple]:
    """Return id -> (text, label) of the live rows, after checking that each has the vector of its
    text.
    """
    rows = np.flatnonzero(snapshot.is_live())
    entries = snapshot.take(rows)
    if entries:
        assert (
            snapshot.vectors_of(rows) == StubEncoder().encode_normalized([entry[TEXT] for entry in entries])
        ).all()
    assert len({entry[ID] for entry in entries}) == len(entries)
    return {entry[ID]: (entry[TEXT], entry["label"]) for entry in entries}


class StoreMachine(RuleBasedStateMachine):
    """Does to an index and to a dictionary the same."""

    @initialize()
    def start(self):
        self.folder, self.expected = Path(tempfile.mkdtemp()) / "index", {}
        write(self.folder, [])

    def teardown(self):
        shutil.rmtree(self.folder.parent)

    rows = st.dictionaries(
        st.integers(0, 12).map(str),
        st.tuples(st.sampled_from(["a", "b", "c", "dd", "é"]), st.integers(0, 2)),
        max_size=8,
    )

    @rule(rows=rows, block=st.integers(1, 4), update=st.booleans(), order=st.permutations(COLUMNS))
    def add(self, rows, block, update, order):
        changed = {key for key, value in rows.items() if key in self.expected and self.expected[key] != value}
        given = [{"key": key, TEXT: text, "label": label} for key, (text, label) in rows.items()]
        if changed and not update:
            with pytest.raises(UserError, match="--update"):
                write(self.folder, given, block=block)
            return
        counts = write(self.folder, given, block=block, update=update, order=order)
        assert counts.added == len(rows.keys() - self.expected.keys()) and counts.updated == len(changed)
        assert counts.encoded <= len(
            {text for text, _ in rows.values()} - {text for text, _ in self.expected.values()}
        )
        self.expected |= rows

    @rule(keys=st.lists(st.integers(0, 12).map(str), unique=True, min_size=1, max_size=5))
    def delete(self, keys):
        with open_store(self.folder) as opened:
            rows, unknown = rows_with_ids(opened.snapshot, keys)
            opened.commit(None, rows)
        assert set(unknown) == set(keys) - set(self.expected)
        self.expected = {key: value for key, value in self.expected.items() if key not in keys}

    @rule()
    def compact(self):
        with open_store(self.folder) as opened:
            before = [entry[ID] for entry in opened.snapshot.take(np.flatnonzero(opened.snapshot.is_live()))]
            opened.compact()
            assert [entry[ID] for entry in opened.snapshot.take(range(opened.snapshot.num_rows))] == before

    @invariant()
    def is_the_dictionary(self):
        snapshot = open_snapshot(self.folder)
        assert contents(snapshot) == self.expected
        named = {entry["file"] for entry in snapshot.manifest["segments"]} | {
            entry["deleted"]["file"] for entry in snapshot.manifest["segments"] if entry["deleted"]
        }
        # nothing is left lying about
        assert {path.name for path in self.folder.iterdir()} - {"manifest.json", ".lock"} == named


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=12)
test_store_is_a_dictionary = StoreMachine.TestCase


@pytest.mark.parametrize("num_versions", [10, heavy(24)])
def test_two_readers_during_a_write_see_whole_states(num_versions, tmp_path):
    """Each state has every text in one version or the next, block by block: a reader that mixed
    files would find another set.
    """
    folder, seen, stop, faults = tmp_path / "index", [set(), set()], threading.Event(), []
    write(folder, numbered(0, 20), block=20)

    def read(versions: set):
        with contextlib.ExitStack() as stack:
            stack.callback(stop.set)
            while not stop.is_set():
                found = contents(open_snapshot(folder))
                if set(found) != {str(number) for number in range(20)} or any(
                    text != f"text {key} {label}" for key, (text, label) in found.items()
                ):
                    faults.append(found)
                labels = tuple(found[str(number)][1] for number in range(20))
                if len(
                    {labels[start : start + 5] for start in range(0, 20, 5)}
                    - {(label,) * 5 for label in labels}
                ):
                    faults.append(labels)  # a block of five was committed in parts
                versions.add(labels)

    readers = [threading.Thread(target=read, args=(versions,)) for versions in seen]
    for reader in readers:
        reader.start()
    for version in range(1, num_versions + 1):
        write(folder, numbered(0, 20, version), block=5, update=True)
        if version % 5 == 0:
            with open_store(folder) as opened:
                opened.compact()
    stop.set()
    for reader in readers:
        reader.join()
    assert not faults and all(len(versions) > 3 for versions in seen)


def test_an_index_that_another_process_is_making_is_waited_for(tmp_path):
    """Between its first file of rows and its manifest, the folder is neither empty nor an index."""
    folder, manifest, found = tmp_path / "index", tmp_path / "index" / "manifest.json", []
    made = settings_of(StubEncoder(), id_column="key", chunk_overlap=None)

    def add() -> None:
        try:
            with open_store(folder, settings=made, wait=30) as opened:
                found.append(opened.snapshot.num_rows)
        except UserError as error:
            found.append(str(error))

    write(tmp_path / "other", numbered(0, 3))
    with open_store(folder, settings=made):
        for path in (tmp_path / "other").glob("*.arrow"):
            path.rename(folder / path.name)
        adding = threading.Thread(target=add)
        adding.start()
        adding.join(0.3)
        assert adding.is_alive() and found == []
        (tmp_path / "other" / manifest.name).rename(manifest)
    adding.join()
    assert found == [3]


def test_what_a_killed_writer_left_is_no_hindrance_and_what_somebody_else_has_is(tmp_path):
    """Killed before its first manifest: it leaves its lock, which nobody holds, and a file of rows."""
    for name, others in (("killed", []), ("others", ["notes.txt"]), ("no lock", [])):
        folder = tmp_path / name
        folder.mkdir()
        for file in ["segment-1.arrow", *([LOCK] if name != "no lock" else []), *others]:
            (folder / file).touch()
    write(tmp_path / "killed", numbered(0, 3))
    assert contents(open_snapshot(tmp_path / "killed")).keys() == {"0", "1", "2"}
    for name in ("others", "no lock"):
        before = sorted(path.name for path in (tmp_path / name).iterdir())
        with pytest.raises(UserError, match="holds other files"):
            write(tmp_path / name, numbered(0, 3))
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == before


def test_a_snapshot_stays_readable_after_its_files_are_gone(tmp_path):
    write(tmp_path / "index", numbered(0, 9))
    snapshot = open_snapshot(tmp_path / "index")
    write(tmp_path / "index", numbered(0, 9, 1), update=True)
    with open_store(tmp_path / "index") as opened:
        opened.compact()
    assert contents(snapshot) == {str(number): (f"text {number} 0", 0) for number in range(9)}


def test_a_second_writer_is_told_and_the_first_goes_on(tmp_path, capsys):
    write(tmp_path / "index", numbered(0, 3))
    with open_store(tmp_path / "index") as opened:
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} .*is writing"),
            open_store(tmp_path / "index", wait=0.1),
        ):
            pass
        opened.commit(None, [1])
    assert "waiting 0.1 s" in capsys.readouterr().err
    assert set(contents(open_snapshot(tmp_path / "index"))) == {"0", "2"}


def test_a_second_writer_waits_for_the_first(tmp_path):
    write(tmp_path / "index", numbered(0, 3))
    with open_store(tmp_path / "index") as opened:
        second = threading.Thread(target=lambda: write_waiting(tmp_path / "index"))
        second.start()
        opened.commit(None, [1])
    second.join()
    assert set(contents(open_snapshot(tmp_path / "index"))) == {"0"}


def write_waiting(folder):
    with open_store(folder, wait=30) as opened:
        rows, _ = rows_with_ids(opened.snapshot, ["2"])
        opened.commit(None, rows)


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_byte_anywhere_is_found(tmp_path, seed):
    write(tmp_path / "index", numbered(0, 9))
    with open_store(tmp_path / "index") as opened:
        opened.commit(None, [4])
    generator = random.Random(seed)
    files = sorted(path for path in (tmp_path / "index").iterdir() if path.name != ".lock")
    path = files[seed % len(files)]
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name}|manifest.json"):
        open_snapshot(tmp_path / "index")


@pytest.fixture
def many_blocks(tmp_path, monkeypatch) -> Path:
    """An index whose files have a checksum every 256 bytes."""
    monkeypatch.setattr(segments, "CHECKED", 256)
    monkeypatch.setattr(segments, "MAPPED", 0)
    write(tmp_path / "index", numbered(0, 60), block=60)
    with open_store(tmp_path / "index") as opened:
        opened.commit(None, [4])
    return tmp_path / "index"


def readings(folder) -> list:
    """Return what each way of reading gives, or the mistake that it reports."""
    ways = [
        lambda snapshot: contents(snapshot),
        lambda snapshot: [(start, part.tobytes()) for start, part in snapshot.vector_blocks(25)],
        lambda snapshot: [snapshot.take([row]) for row in range(60)],
        lambda snapshot: list(snapshot.texts()),
        lambda snapshot: rows_with_ids(snapshot, ["7", "50"])[0].tolist(),
        lambda snapshot: matching(snapshot, "label = 0 and _index_text like '%7%'").tolist(),
    ]
    found = []
    for way in ways:
        try:
            found.append(way(open_snapshot(folder)))
        except UserError as error:
            assert "damaged" in str(error)
            found.append("refused")
    return found


@pytest.mark.parametrize("step, least", [(701, 10), heavy(97, 70)])
def test_no_byte_that_was_changed_is_ever_served(step, least, many_blocks):
    """Whatever byte changes: each way of reading gives what it gave before, or refuses."""
    expected, refused = readings(many_blocks), 0
    for path in sorted(many_blocks.glob("*.arrow")):
        intact = path.read_bytes()
        for position in range(0, len(intact), step):
            changed = bytearray(intact)
            changed[position] ^= 1 << position % 8
            path.write_bytes(changed)
            with pytest.raises(UserError, match=path.name):
                verify(many_blocks)
            for found, before in zip(readings(many_blocks), expected):
                assert found in (before, "refused")
                refused += found == "refused"
        path.write_bytes(intact)
    assert refused > least and readings(many_blocks) == expected
    assert verify(many_blocks).num_rows == 60


def test_only_what_is_read_is_checked(many_blocks):
    snapshot = open_snapshot(many_blocks)
    unchecked = snapshot.segments[0].file.unchecked
    counts = [unchecked.sum()]
    for read in (
        lambda: snapshot.vectors_of([17]),
        lambda: snapshot.take([17], [TEXT]),
        lambda: snapshot.vectors_of(range(60)),
        lambda: contents(snapshot),
    ):
        read()
        counts.append(unchecked.sum())
    opened, vector, text, vectors, everything = -np.diff([len(unchecked), *counts])
    assert opened > 0 and 1 <= vector <= 2 and 0 < text <= 5  # at most two borders more than it needs
    assert vectors >= 60 * 32 // 256 - 3 and everything > 0


def test_an_index_of_another_version_is_refused_in_one_line(tmp_path):
    write(tmp_path / "index", numbered(0, 9))
    path = tmp_path / "index" / "manifest.json"
    manifest = {**json.loads(path.read_text()), "format": "embed_search index 1"}
    manifest["sha256"] = seal({**manifest, "sha256": None})
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="embed_search index 1, not .* index its texts anew"):
        open_snapshot(tmp_path / "index")


def test_verify_names_every_damaged_file(tmp_path):
    write(tmp_path / "index", numbered(0, 9))
    paths = sorted((tmp_path / "index").glob("segment-*"))
    for path in paths[:2]:
        path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match=f"{paths[0].name}.*{paths[1].name}"):
        verify(tmp_path / "index")


def test_a_missing_or_shortened_file_is_found(tmp_path):
    write(tmp_path / "index", numbered(0, 9))
    path = next((tmp_path / "index").glob("segment-*"))
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    with pytest.raises(UserError, match=path.name):
        open_snapshot(tmp_path / "index")
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name}: a file of the index is missing"):
        open_snapshot(tmp_path / "index")


def test_what_a_crash_left_is_ignored_and_removed(tmp_path):
    write(tmp_path / "index", numbered(0, 9))
    for name in ("segment-00000009-0000.arrow", "deleted-00000009-0000.arrow", "manifest.json.123"):
        (tmp_path / "index" / name).write_bytes(b"half of a fi")
    assert len(contents(open_snapshot(tmp_path / "index"))) == 9
    write(tmp_path / "index", numbered(9, 12))
    assert len(contents(open_snapshot(tmp_path / "index"))) == 12
    assert not list((tmp_path / "index").glob("*00000009*")) and not list(
        (tmp_path / "index").glob("manifest.json.*")
    )


def test_an_index_that_never_got_its_first_manifest_can_be_begun_again(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / ".lock").touch()
    (tmp_path / "index" / "manifest.json.77").write_text("{")
    write(tmp_path / "index", numbered(0, 3))
    assert len(contents(open_snapshot(tmp_path / "index"))) == 3


MANY_COMMITS = """
import resource, sys
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests"]
from common.search.index import (open_store)
from index_rows import numbered, write
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
write(sys.argv[1], numbered(0, 300), block=1)
write(sys.argv[1], numbered(0, 300, 1)[::3], block=1, update=True)
with open_store(sys.argv[1]) as opened:
    print(len(opened.snapshot.segments), opened.snapshot.num_rows)
"""


@pytest.mark.slow
def test_hundreds_of_commits_leave_few_files(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MANY_COMMITS, tmp_path / "index", ROOT],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    files, rows = map(int, done.stdout.split())
    assert files < 100 and rows == 400
    expected = {
        str(number): (f"text {number} {int(number % 3 == 0)}", int(number % 3 == 0)) for number in range(300)
    }
    assert contents(open_snapshot(tmp_path / "index")) == expected


def test_joined_files_keep_their_rows_numbers_and_are_cut_by_rows_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SEGMENT_ROWS", 100)
    monkeypatch.setattr(index, "SIZES", (32, 100))
    write(tmp_path / "index", numbered(0, 20), block=1)
    with open_store(tmp_path / "index") as opened:
        opened.commit(None, [4, 11])
        before = opened.snapshot.take(range(20))
    write(tmp_path / "index", numbered(20, 260), block=10)
    snapshot = open_snapshot(tmp_path / "index")
    assert snapshot.take(range(20)) == before and np.flatnonzero(~snapshot.is_live()).tolist() == [4, 11]
    assert len(snapshot.segments) < 32 and max(len(segment.is_live) for segment in snapshot.segments) == 100
    monkeypatch.setattr(
        index, "SEGMENT_BYTES", 40 * snapshot.segments[0].num_bytes // len(snapshot.segments[0].is_live)
    )
    with open_store(tmp_path / "index") as opened:
        opened.compact()
        assert (
            35 < max(len(segment.is_live) for segment in opened.snapshot.segments) < 45
            and opened.snapshot.num_rows == 258
        )


def test_a_commit_reads_no_file_that_was_there(tmp_path, monkeypatch):
    write(tmp_path / "index", numbered(0, 9))
    with open_store(tmp_path / "index") as opened, monkeypatch.context() as patched:
        patched.setattr(index, "map_file", None)
        patched.setattr(segments.CheckedFile, "check", None)
        opened.commit(None, [4])
        opened.commit(None, [5])
    assert len(contents(open_snapshot(tmp_path / "index"))) == 7


def test_a_writer_takes_no_file_from_a_reader_that_checks_them(tmp_path, monkeypatch):
    """Checking takes long, and a writer in a tight loop was faster each time: the reader began
    anew, twenty times.
    """
    write(tmp_path / "index", numbered(0, 4))
    changed, check_frame = [], segments.CheckedFile.check_frame

    def check(file):
        if not changed:
            changed.append(True)
            write(tmp_path / "index", numbered(0, 4, 1), update=True)
            with open_store(tmp_path / "index") as opened:
                opened.compact()
        return check_frame(file)

    monkeypatch.setattr(segments.CheckedFile, "check_frame", check)
    assert contents(open_snapshot(tmp_path / "index"))["0"] == ("text 0 0", 0) and changed
    assert contents(open_snapshot(tmp_path / "index"))["0"] == ("text 0 1", 1)


def test_any_arrow_reader_reads_the_files(tmp_path):
    write(tmp_path / "index", numbered(0, 4), block=4)
    table = pa.ipc.open_file(next((tmp_path / "index").glob("segment-*"))).read_all()
    assert (
        table[TEXT].to_pylist() == [f"text {number} 0" for number in range(4)]
        and table[VECTOR].type.list_size == 8
    )


def test_a_row_table_is_a_dictionary():
    found, expected, generator = texts.RowTable(), {}, random.Random(0)
    for start in range(0, 300_000, 50_000):
        digests = [texts.digest(str(generator.randrange(200_000))) for _ in range(50_000)]
        found.add(digests, range(start, start + 50_000))
        expected.update(zip(digests, range(start, start + 50_000)))
    wanted = [texts.digest(str(number)) for number in range(0, 250_000, 7)] + [b"\0" * 16]
    assert found.find(wanted).tolist() == [expected.get(key, -1) for key in wanted]
    assert len(found.keys) > 100_000  # it was merged


MEMORY = """
import json, sys, threading, time
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests"]
from common.search import texts
from common.search.builder import Builder, fill, settings_of
from common.search.index import (open_store)
from conftest import StubEncoder
def private():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
path, count = sys.argv[1], int(sys.argv[3])
encoder, peak, done = StubEncoder(384), [0], threading.Event()
def watch():
    while not done.wait(0.01): peak[0] = max(peak[0], private())
before = private()
threading.Thread(target=watch, daemon=True).start()
collection = texts.read(path, text_column="text")
settings = settings_of(encoder, id_column=None, chunk_overlap=None)
with open_store(path + ".index", settings=settings) as opened:
    builder = Builder(opened, encoder)
    fill(builder, collection, block=4096)
done.set()
print(json.dumps({"rows": opened.snapshot.num_rows, "grown": peak[0] - before}))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory that is not a file's is read from Linux's /proc"
)
@pytest.mark.slow
def test_memory_is_bounded_for_200_000_texts(tmp_path):
    """Their vectors take 307 MB: what the process holds of its own, without mapped files, must
    stay far below.
    """
    (tmp_path / "texts.txt").write_text("".join(f"short text number {number}\n" for number in range(200_000)))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "texts.txt", ROOT, "200000"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr
    assert found["rows"] == 200_000
    assert found["grown"] < 200e6, found


def mapped_bytes() -> int:
    """Return how much of the files that this process has mapped is in its memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssFile" in line)
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory that is a file's is read from Linux's /proc"
)
def test_a_first_pass_over_the_vectors_holds_few_of_them(tmp_path):
    vectors = unit_vectors(30_000, 384)  # 46 MB
    write_vectors(tmp_path / "index", vectors)
    snapshot = open_snapshot(tmp_path / "index")
    unchecked, before = snapshot.segments[0].file.unchecked, mapped_bytes()
    highest, blocks = [0, 0], ([], [])
    for number in range(2):
        for start, block in snapshot.vector_blocks(10_000):
            assert (block == vectors[start : start + len(block)]).all()
            highest[number] = max(highest[number], mapped_bytes() - before)
            blocks[number].append(len(block))
        assert 0 < unchecked.sum() < 12 < len(unchecked)  # those of the other columns
    assert highest[0] < 8e6 and highest[1] > 40e6, highest
    assert sum(blocks[0]) == 30_000 and blocks[1] == [10_000] * 3


ROWS_OF_COLUMNS = {
    "texts": pa.array(["a", None, "", "längst"] * 60),
    "long texts": pa.array(["a", None, "", "längst"] * 60, pa.large_string()),
    "truths": pa.array([True, None, False, True] * 60),
    "lists": pa.array([[1, 2], None, [], [None]] * 60),
    "structs": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": "y"}, {"a": 3, "b": None}] * 60),
    "classes": pa.array(["a", None, "b", "a"] * 60).dictionary_encode(),
    "times": pa.array([0, None, 10**15, -1] * 60, pa.timestamp("us", "UTC")),
    "hashes": pa.array([bytes([n]) * 32 for n in range(240)], pa.binary(32)),
    "nothing": pa.nulls(240),
}


@pytest.mark.parametrize("name", ROWS_OF_COLUMNS)
def test_few_rows_of_a_column_are_those_that_arrow_takes(name):
    column, generator = ROWS_OF_COLUMNS[name].slice(3), np.random.default_rng(0)
    for count in (0, 1, segments.FEW, segments.FEW + 1):
        rows = generator.integers(len(column), size=count)
        taken = segments.taken(column, rows)
        taken.validate(full=True)
        assert taken.type == column.type and taken.equals(column.take(pa.array(rows)))
