"""An index that another program has made, or changed and sealed again: each is refused in one line
that names the file, and nothing outside of its folder is opened.
"""

import copy
import functools
import hashlib
import json
import operator
import os
import shutil
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.files import seal, write_manifest
from common.search import index, selection, texts
from common.search.builder import Builder, fill, settings_of
from common.search.index import open_snapshot, open_store
from common.search.manifest import Limits, check_files, read_manifest
from common.search.ranker import Ranker
from common.search.searcher import Searcher
from common.search.segments import CHUNK, HASH, ID, NUM_CHUNKS, TEXT, VECTOR, checksums
from common.search.selection import matching
from conftest import StubEncoder

WIDTH, ROWS = 8, 9


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An index of nine rows, one of them deleted."""
    folder = tmp_path_factory.mktemp("made") / "index"
    kinds = pa.schema({"key": pa.string(), TEXT: pa.large_string(), "label": pa.int64()})
    rows = [{"key": str(number), TEXT: f"text {number}", "label": number} for number in range(ROWS)]
    collection = texts.Collection("rows.csv", pa.Table.from_pylist(rows, kinds), "row", {})
    encoder = StubEncoder(WIDTH)
    with open_store(folder, settings=settings_of(encoder, id_column="key", chunk_overlap=None)) as store:
        fill(Builder(store, encoder), collection, block=ROWS)
        store.commit(None, [4])
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(made, tmp_path / "index")
    return tmp_path / "index"


def sealed(folder: Path, manifest: dict) -> None:
    """Write a manifest that vouches for itself."""
    manifest["sha256"] = seal({**manifest, "sha256": None})
    (folder / "manifest.json").write_text(json.dumps(manifest))


def read_all(folder: Path) -> None:
    """Read everything that an index holds."""
    check_files(folder)
    snapshot = open_snapshot(folder)
    rows = np.arange(snapshot.num_rows)
    snapshot.take(rows)
    for _ in snapshot.vector_blocks(4):
        pass
    for segment in snapshot.segments:
        segment.rows()
    index.whole_documents(snapshot, rows)


def refused(folder: Path, part: str) -> None:
    """Check that reading an index is refused in one line that holds a part."""
    with pytest.raises(UserError) as error:
        read_all(folder)
    line = str(error.value)
    assert part in line and "\n" not in line and "index the texts into a new folder" in line, line


def test_the_index_itself_is_read(folder):
    read_all(folder)


# Names --------------------------------------------------------------------------------------------


SEGMENT = "segment-00000099-0000.arrow"
NAMES = ["/etc/passwd", "../x", "../../etc/passwd", "", ".", "/dev/zero", "manifest.json", "x.arrow"]
NAMES += ["segment-1.arrow", f"sub/{SEGMENT}", f"./{SEGMENT}", f"{SEGMENT}/", f"{SEGMENT}\0", None, 5, ["x"]]
NAMES += [{}, True, "deleted-00000001-0000.arrow", f"{SEGMENT}\n", "segment-\u0661\u0661.arrow", "\ud800"]


@pytest.mark.parametrize("name", NAMES, ids=map(repr, NAMES))
@pytest.mark.parametrize("kind", ["segment", "deleted"])
def test_a_name_that_no_store_gives_is_refused_before_anything_is_opened(name, kind, folder, monkeypatch):
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["segments"][0]
    if kind == "deleted":
        entry = entry["deleted"]
        name = SEGMENT if name == "deleted-00000001-0000.arrow" else name  # the other kind's name
    entry["file"] = name
    sealed(folder, manifest)
    monkeypatch.setattr(index, "map_file", None)  # opens the files of an index
    refused(folder, "manifest.json")


def link_out(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("plant", [link_out, link_to_device, link_loop, os.mkfifo, os.mkdir])
@pytest.mark.parametrize("which", ["segment", "deleted"])
def test_what_is_no_file_of_the_folder_is_refused_before_it_is_opened(which, plant, folder, monkeypatch):
    [path] = folder.glob(f"{which}-*")
    path.unlink()
    plant(path)
    monkeypatch.setattr(index, "map_file", None)
    refused(folder, "manifest.json")


@pytest.mark.parametrize("plant", [link_out, link_to_device, link_loop, os.mkfifo, os.mkdir])
def test_a_manifest_that_is_no_file_of_the_folder_is_refused(plant, folder):
    (folder / "manifest.json").unlink()
    plant(folder / "manifest.json")
    with pytest.raises(UserError, match="manifest.json"):
        read_all(folder)


def test_a_link_within_the_folder_is_read(folder):
    [path] = folder.glob("segment-*")
    path.rename(folder / "elsewhere")
    path.symlink_to("elsewhere")
    read_all(folder)


# Manifests ----------------------------------------------------------------------------------------


WRONG = [None, -1, 1.5, "x", [], {}, True, 10**15, 10**30]  # 10**15 is written as a checksum is


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Return the path of each value within a manifest."""
    found = [path] if path else []
    if isinstance(value, dict):
        found += [place for key, inner in value.items() for place in places(inner, (*path, key))]
    elif isinstance(value, list):
        found += [place for key, inner in enumerate(value) for place in places(inner, (*path, key))]
    return found


def changed(manifest: dict, path: tuple, value: object) -> dict:
    manifest = copy.deepcopy(manifest)
    parent = manifest
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return manifest


def test_every_value_of_a_manifest_may_be_of_another_kind(folder):
    """It is refused in one line, or does no harm, as another name of the model does."""
    manifest, outcomes = json.loads((folder / "manifest.json").read_text()), []
    for path in places(manifest):
        for value in WRONG:
            if path != ("format",) and path != ("sha256",):
                sealed(folder, changed(manifest, path, value))
                try:
                    read_all(folder)
                    outcomes.append((path, value))
                except UserError as error:
                    assert "\n" not in str(error)
    harmless = {"model", "fingerprint", "pooling", "id_column", "chunk_overlap", "deleted"}
    harmless |= {"query_prompt", "document_prompt", "store"}  # None: the model's own, and fp32
    harmless |= {"segments", "clusters"}  # none: an empty index, no columns of clusters
    assert {path[-1] for path, _ in outcomes if isinstance(path[-1], str)} <= harmless, outcomes


def test_no_part_of_a_manifest_may_be_missing(folder):
    manifest, kept = json.loads((folder / "manifest.json").read_text()), set()
    for path in places(manifest):
        if isinstance(path[-1], str) and path != ("sha256",):
            fewer = copy.deepcopy(manifest)
            del functools.reduce(operator.getitem, path[:-1], fewer)[path[-1]]
            sealed(folder, fewer)
            try:
                read_all(folder)
                kept.add(path[-1])
            except UserError as error:
                assert "\n" not in str(error)
    # without a place for the columns, all of a file is checked; without those deleted, none are
    assert kept == {"body", "deleted"}


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "5", '"x"', "[" * 100_000, '{"format": "embed_search index 2"}', "{}"]
)
def test_a_manifest_that_is_none_is_refused(text, folder):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json"):
        read_manifest(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100)
@given(data=st.data())
def test_any_manifest_is_read_or_refused(data, made):
    original = (made / "manifest.json").read_text()
    manifest = json.loads(original)
    path = data.draw(st.sampled_from([place for place in places(manifest) if place != ("sha256",)]))
    sealed(made, changed(manifest, path, data.draw(JSON)))
    try:
        read_all(made)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        (made / "manifest.json").write_text(original)


# Rows ---------------------------------------------------------------------------------------------


def write_segment(folder: Path, table: pa.Table, *, batch: int | None = None, compression=None) -> None:
    """Put a table in the place of the index's rows, and seal it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["segments"][0]
    path = folder / entry["file"]
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch or max(len(table), 1))
    reseal(folder, manifest, entry, path.read_bytes())


def reseal(folder: Path, manifest: dict, entry: dict, content: bytes) -> None:
    """Put content in the place of a file, and seal it."""
    (folder / entry["file"]).write_bytes(content)
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    entry["checksums"] = checksums(bytearray(content))
    entry["body"] = [0, 0]
    sealed(folder, manifest)


def rows_of(folder: Path) -> pa.Table:
    [path] = folder.glob("segment-*")
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all().combine_chunks()


def replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def vectors(values: np.ndarray) -> pa.Array:
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def spoiled(value: float) -> pa.Array:
    values = np.eye(ROWS, WIDTH, dtype=np.float32) + np.eye(ROWS, WIDTH, k=-WIDTH, dtype=np.float32)
    values[3, 3] = value
    return vectors(values)


def short(value: object) -> pa.Array:
    """Return numbers of chunks, of which one is wrong."""
    return pa.array([0, 0, 0, value, 0, 0, 0, 0, 0], pa.int32())


TABLES = {
    "no columns": lambda table: table.select([]),
    "a column is missing": lambda table: table.drop_columns([ID]),
    "the vectors are missing": lambda table: table.drop_columns([VECTOR]),
    "the metadata is missing": lambda table: table.drop_columns(["label"]),
    "one more column": lambda table: table.append_column("more", pa.array(range(ROWS))),
    "a column twice": lambda table: table.append_column(ID, table[ID]),
    "no rows": lambda table: table.slice(0, 0),
    "fewer rows": lambda table: table.slice(0, 5),
    "more rows": lambda table: pa.concat_tables([table, table]).combine_chunks(),
    "numbers for texts": lambda table: replaced(table, TEXT, pa.array(range(ROWS))),
    "bytes for texts": lambda table: replaced(table, TEXT, pa.array([b"\xff"] * ROWS, pa.large_binary())),
    "a missing text": lambda table: replaced(
        table, TEXT, pa.array([None] + ["x"] * (ROWS - 1), pa.large_string())
    ),
    "a missing id": lambda table: replaced(table, ID, pa.array([None] + ["x"] * (ROWS - 1))),
    "numbers for ids": lambda table: replaced(table, ID, pa.array(range(ROWS))),
    "lists for texts": lambda table: replaced(table, TEXT, pa.array([["x"]] * ROWS)),
    "a dictionary of texts": lambda table: replaced(
        table, TEXT, table[TEXT].combine_chunks().dictionary_encode()
    ),
    "null for texts": lambda table: replaced(table, TEXT, pa.nulls(ROWS)),
    "short hashes": lambda table: replaced(table, HASH, pa.array([b"x"] * ROWS, pa.binary(1))),
    "texts for labels": lambda table: replaced(table, "label", pa.array(["x"] * ROWS)),
    "small labels": lambda table: replaced(table, "label", table["label"].cast(pa.int8())),
    "wider vectors": lambda table: replaced(table, VECTOR, vectors(np.eye(ROWS, 16, dtype=np.float32))),
    "narrower vectors": lambda table: replaced(table, VECTOR, vectors(np.ones((ROWS, 1), np.float32))),
    "vectors in float64": lambda table: replaced(table, VECTOR, vectors(np.eye(ROWS, WIDTH))),
    "lists of any length": lambda table: replaced(
        table, VECTOR, pa.array([[1.0] + [0.0] * 7] * ROWS, pa.list_(pa.float32()))
    ),
    "numbers for vectors": lambda table: replaced(table, VECTOR, pa.array([1.0] * ROWS)),
    "a missing vector": lambda table: replaced(
        table, VECTOR, pa.array([None] + [[1.0] + [0.0] * 7] * (ROWS - 1), pa.list_(pa.float32(), WIDTH))
    ),
    "a missing number in a vector": lambda table: replaced(
        table, VECTOR, pa.array([[1.0] + [None] * 7] * ROWS, pa.list_(pa.float32(), WIDTH))
    ),
    "NaN": lambda table: replaced(table, VECTOR, spoiled(float("nan"))),
    "infinity": lambda table: replaced(table, VECTOR, spoiled(float("inf"))),
    "a vector of norm 0": lambda table: replaced(table, VECTOR, spoiled(0.0)),
    "a vector of norm 2": lambda table: replaced(table, VECTOR, spoiled(2.0)),
    "a chunk that is none": lambda table: replaced(table, CHUNK, short(7)),
    "a negative chunk": lambda table: replaced(table, CHUNK, short(-7)),
    "too many chunks": lambda table: replaced(table, NUM_CHUNKS, short(1000)),
    "no chunks": lambda table: replaced(table, NUM_CHUNKS, short(0)),
    "texts for chunks": lambda table: replaced(table, CHUNK, pa.array(["0"] * ROWS)),
}


@pytest.mark.parametrize("change", TABLES.values(), ids=TABLES)
def test_other_rows_are_refused_although_they_are_sealed(change, folder):
    write_segment(folder, change(rows_of(folder)))
    refused(folder, str(folder))


@pytest.mark.parametrize("options", [{"batch": 4}, {"compression": "zstd"}, {"compression": "lz4"}])
def test_rows_in_another_layout_are_refused(options, folder):
    write_segment(folder, rows_of(folder), **options)
    refused(folder, "segment-")


DELETED = {
    "no such row": pa.table({"row": pa.array([ROWS], pa.uint32())}),
    "a huge row": pa.table({"row": pa.array([2**32 - 1], pa.uint32())}),
    "more rows than it says": pa.table({"row": pa.array([1, 2], pa.uint32())}),
    "none": pa.table({"row": pa.array([], pa.uint32())}),
    "null": pa.table({"row": pa.array([None], pa.uint32())}),
    "signed": pa.table({"row": pa.array([-1], pa.int64())}),
    "texts": pa.table({"row": pa.array(["4"])}),
    "another column": pa.table({"rows": pa.array([4], pa.uint32())}),
}


@pytest.mark.parametrize("table", DELETED.values(), ids=DELETED)
def test_other_deleted_rows_are_refused_although_they_are_sealed(table, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["segments"][0]["deleted"]
    with pa.ipc.new_file(folder / entry["file"], table.schema) as writer:
        writer.write_table(table)
    reseal(folder, manifest, entry, (folder / entry["file"]).read_bytes())
    refused(folder, "deleted-")


@settings(max_examples=300)
@given(data=st.data())
def test_any_bytes_in_place_of_the_rows_are_read_or_refused(data, made, tmp_path_factory):
    """As long as they are sealed, Arrow reads them."""
    manifest = json.loads((made / "manifest.json").read_text())
    which = data.draw(st.sampled_from(["segment", "deleted"]))
    entry = manifest["segments"][0] if which == "segment" else manifest["segments"][0]["deleted"]
    before, content = (made / "manifest.json").read_bytes(), (made / entry["file"]).read_bytes()
    bytes_now = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(bytes_now) - 1))
        bytes_now[place : place + data.draw(st.sampled_from([0, 1, 1, 4]))] = data.draw(st.binary(max_size=4))
    try:
        reseal(made, manifest, entry, bytes(bytes_now))
        read_all(made)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        (made / entry["file"]).write_bytes(content)
        (made / "manifest.json").write_bytes(before)


# Conditions ---------------------------------------------------------------------------------------


ENDLESS = {
    "a count": "(SELECT count(*) FROM range(1000000000000)) > 5",
    "a recursion": "(WITH RECURSIVE a(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM a) FROM a) > 5",
    "one function": "length(repeat('a', 1000000000)) > 5",  # DuckDB can't interrupt it
}


@pytest.mark.parametrize("condition", ENDLESS.values(), ids=ENDLESS)
def test_a_condition_without_an_end_is_ended(condition, made):
    with pytest.raises(UserError, match="0.3 seconds.*--where-seconds"):
        matching(open_snapshot(made), condition, Limits(seconds=0.3, megabytes=4000))


LARGE = {
    "a text": "length(repeat('a', 4000000000)) > 5",
    "a text of each row": "length(repeat(_index_text, 100000000)) > 5",
    "a list": "len(range(1000000000)) > 5",
}


@pytest.mark.parametrize("condition", LARGE.values(), ids=LARGE)
def test_a_condition_that_needs_more_memory_is_ended(condition, made):
    with pytest.raises(UserError, match="500 MB.*--where-megabytes"):
        matching(open_snapshot(made), condition, Limits(seconds=30, megabytes=500))


def test_a_condition_holds_for_the_live_rows_only(made):
    assert np.flatnonzero(matching(open_snapshot(made), "label BETWEEN 3 AND 5")).tolist() == [3, 5]


def test_a_bug_in_the_process_of_the_condition_is_no_mistake_of_the_user(made, monkeypatch):
    monkeypatch.setattr(selection, "_holds", None)
    with pytest.raises(RuntimeError, match="TypeError"):
        matching(open_snapshot(made), "label = 1")


def test_duckdb_that_is_not_installed_is_no_lack_of_memory(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ModuleNotFoundError, match="duckdb"):
        matching(open_snapshot(made), "label = 1")


# Caches -------------------------------------------------------------------------------------------


def searcher_of(folder: Path, **options) -> Searcher:
    snapshot = open_snapshot(folder)
    return Searcher(Ranker(snapshot, snapshot.is_live(), **options), StubEncoder(WIDTH))


def other_codes(cache: Path) -> None:
    """Put whole codes of other vectors in the place of the cache's."""
    codes = faiss.IndexPQFastScan(WIDTH, 2, 4, faiss.METRIC_INNER_PRODUCT)
    codes.train(np.random.default_rng(0).standard_normal((16, WIDTH)).astype(np.float32))
    codes.add(np.eye(3, WIDTH, dtype=np.float32))
    faiss.write_index(codes, str(cache / "codes.faiss"))


def flat(cache: Path) -> None:
    faiss.write_index(faiss.IndexFlatIP(WIDTH), str(cache / "codes.faiss"))


CACHES = {
    "other codes": ("faiss", other_codes),
    "no codes": ("faiss", flat),
    "bytes for codes": ("faiss", lambda cache: (cache / "codes.faiss").write_bytes(b"IHNf" + bytes(200))),
    "rows without a code": (
        "faiss",
        lambda cache: np.save(cache / "codes.npy", np.full(ROWS - 1, 99), allow_pickle=False),
    ),
    "a pickle for the numbers": (
        "faiss",
        lambda cache: np.save(cache / "codes.npy", np.array([Path()]), allow_pickle=True),
    ),
    "no settings of BM25": ("bm25", lambda cache: (cache / "params.index.json").write_text("[]")),
    "bytes for words": ("bm25", lambda cache: (cache / "vocab.index.json").write_bytes(b"\xff")),
}


@pytest.mark.parametrize("name, change", CACHES.values(), ids=CACHES)
def test_a_cache_that_is_nonsense_is_built_again_although_it_is_sealed(name, change, folder):
    options = {"approximate": True} if name == "faiss" else {"hybrid": True}
    expected = searcher_of(folder, **options).search(["text 3"], 3)
    cache, said = folder / f"cache-{name}", []
    change(cache)
    (cache / "manifest.json").unlink()
    write_manifest(cache)
    assert searcher_of(folder, **options, say=said.append).search(["text 3"], 3) == expected
    assert len(said) == 1 and str(cache) in said[0]


def test_the_stamp_of_a_cache_is_no_pipe(folder):
    searcher_of(folder, approximate=True).search(["text 3"], 3)
    (folder / "cache-faiss" / "stamp").unlink()
    os.mkfifo(folder / "cache-faiss" / "stamp")
    assert len(searcher_of(folder, approximate=True).search(["text 3"], 3)[0]) == 3
