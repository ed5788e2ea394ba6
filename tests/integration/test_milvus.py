"""The commands over a collection in Milvus, which is Milvus Lite here: the answers of an index on
this machine, also after kills; conditions in its own words; and what it refuses.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from common.search import texts
from common.search.builder import settings_of
from common.search.manifest import parse_target
from conftest import ROOT, StubEncoder, make_sentences, quick, write_lines

pytest.importorskip("pymilvus", reason="Milvus' client is not installed: pip install pymilvus milvus-lite")
pytest.importorskip("milvus_lite", reason="Milvus Lite is not installed: pip install milvus-lite")
from common.search import milvus
from common.search.milvus import translate

COLUMNS = {"label": "VARCHAR", "n": "INT64", "part": "DOUBLE", "odd": "BOOL"}
CONDITIONS = {
    "label = 'pos'": 30,
    "'pos' = label AND n < 10": 5,
    "n > 50 OR n <= 2": 12,
    "n BETWEEN 3 AND 5": 3,
    "n NOT BETWEEN 3 AND 57": 5,
    "NOT (label = 'pos')": 30,
    "label <> 'pos' AND n >= 58.0": 1,
    "n IN (1, 2, 99)": 2,
    "label NOT IN ('pos', 'x')": 30,
    "part IS NULL": 12,
    "part NOT IN (0.5, 99.5)": 47,  # not those that are NULL
    "NOT (part IN (0.5, 99.5) OR n < +7)": 42,
    "part IS NOT NULL AND part > 10": 31,
    "part = 0.5": 1,
    "NOT (part > 10)": 17,
    "odd": 30,
    "odd = false AND n < 4": 2,
    "label LIKE 'p%'": 30,
    "LABEL NOT LIKE '%e%'": 30,
    "_index_id = 's7'": 1,
    "_index_id IN ('s7', 'it''s \"odd\"')": 1,
}
QUICK = (
    "'pos' = label AND n < 10",
    "n NOT BETWEEN 3 AND 57",
    "NOT (label = 'pos')",
    "label NOT IN ('pos', 'x')",
    "NOT (part IN (0.5, 99.5) OR n < +7)",
    "part IS NOT NULL AND part > 10",
    "NOT (part > 10)",
    "odd = false AND n < 4",
    "LABEL NOT LIKE '%e%'",
    "_index_id IN ('s7', 'it''s \"odd\"')",
)
REFUSED = {
    "lower(label) = 'pos'": "lower",
    "n + 1 > 2": r"\+",
    "n IN (1, NULL)": "nothing compares with NULL",
    "n > 9223372036854775808": "64 bits",
    "label = 3": "3",
    "n = 'x'": "x",
    "label ILIKE 'P%'": r"~~\*",
    "label LIKE 'p_s'": "wildcard",
    "n = (SELECT 1)": "subquery",
    "nothing = 1": "nothing",
    "n = 1 GROUP BY n": "more than one",
    "n = 1; DROP TABLE rows": "",
    "n =": "",
    "n = part": "",
    "n = CAST('2' AS INTEGER)": "cast",
}


def rows_csv(path, count=60, changed=()):
    texts = [text for text, _ in make_sentences(count)]
    rows = ["id,text,label,n,part,odd"]
    for n, text in enumerate(texts):
        part = "" if n % 5 == 4 else n / 2
        text = f"changed {text}" if n in changed else text
        rows.append(f"s{n},{text},{'pos' if n % 2 else 'neg'},{n},{part},{'true' if n % 2 else 'false'}")
    return write_lines(path, rows)


@pytest.fixture(scope="module")
def stores(embed, tmp_path_factory):
    """An index and a collection of the same rows."""
    folder = tmp_path_factory.mktemp("stores")
    rows, names = rows_csv(folder / "rows.csv"), (str(folder / "ix"), f"milvus:{folder}/x.db/docs")
    for name in names:
        code, _, stderr = embed("index", rows, "--index", name, "--id-column", "id", "--block", 16)
        assert code == 0, stderr
    return names


def hits(ok, index, *flags):
    found = ok("search", "--index", index, *flags, "--json")["queries"]
    return [
        [(hit["id"], round(hit["score"], 6), hit["text"], hit["columns"]) for hit in q["hits"]] for q in found
    ]


def test_both_stores_give_the_same_answers(ok, stores):
    queries = [part for text, _ in make_sentences(30, seed=5) for part in ("--query", text)]
    for flags in ((), ("--where", "label = 'pos' AND n > 7"), ("--offset", 2, "--top-k", 70)):
        ours, theirs = (hits(ok, name, *queries, *flags) for name in stores)
        assert ours == theirs and len(ours) == 30 and all(ours)
    found = hits(ok, stores[1], "--query", "good film", "--hybrid")
    assert len(found[0]) == 5


@pytest.mark.slow
def test_both_stores_are_reranked_alike(ok, embed, stores, tiny_reranker, tmp_path):
    queries = [part for text, _ in make_sentences(30, seed=5) for part in ("--query", text)]
    flags, rerank = (*queries, "--top-k", 12), ("--rerank", tiny_reranker, "--rerank-depth", 8)
    ours, theirs = (hits(ok, name, *flags, *rerank) for name in stores)
    assert ours == theirs
    for reranked, plain in zip(theirs, hits(ok, stores[1], *flags)):
        ids, before = ([hit[0] for hit in found] for found in (reranked, plain))
        assert sorted(ids[:8]) == sorted(before[:8]) and ids[8:] == before[8:]
        scores = [score for _, score, *_ in reranked[:8]]
        assert scores == sorted(scores, reverse=True)
    both = hits(ok, stores[1], "--query", "good film", "--hybrid", *rerank)[0]
    by_words = hits(ok, stores[1], "--query", "good film", "--hybrid", "--top-k", 8)[0]
    assert {hit[0] for hit in both} <= {hit[0] for hit in by_words}
    judged = [json.dumps({"id": f"q{n}", "text": text}) for n, text in enumerate(queries[1::2])]
    task = ("--queries", write_lines(tmp_path / "queries.jsonl", judged))
    task += ("--qrels", write_lines(tmp_path / "qrels.txt", [f"q{n} 0 s{n} 1" for n in range(30)]))
    scores = [ok("evaluate", "--index", name, *task, *rerank, "--json")["scores"] for name in stores]
    for way in ("exact", "reranked"):
        assert scores[0][way] == scores[1][way]
    code, _, stderr = embed("search", "--index", stores[1], "x", "--rerank", "./nope")
    assert code == 2 and "--rerank ./nope" in stderr


def test_long_queries_are_counted(ok, stores):
    found = ok("search", "--index", stores[1], "--query", "good film " * 90, "--query", "good film")
    assert "1 queries are longer than 64 tokens and were cut there" in found


def test_a_query_that_is_skipped_has_no_table_in_either_store(ok, stores, tmp_path):
    """It stands in JSON alone, without hits."""
    queries = ("--queries", write_lines(tmp_path / "queries.txt", ["good film", " "]), "--skip-bad")
    for name in stores:
        found = ok("search", "--index", name, *queries)
        assert found.count("query: ") == 1 and "1 skipped" in found, found
        assert [bool(found) for found in hits(ok, name, *queries)] == [True, False]


@pytest.mark.parametrize("condition", quick(CONDITIONS.keys(), *QUICK))
def test_a_condition_in_the_words_of_milvus(condition, ok, stores):
    found = [ok("list", "--index", name, "--where", condition, "--top-k", 60, "--json") for name in stores]
    assert [document["of"] for document in found] == [CONDITIONS[condition]] * 2
    ids = [sorted(text["id"] for text in document["texts"]) for document in found]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("condition", REFUSED)
def test_what_milvus_has_no_words_for_is_refused_by_name(condition):
    with pytest.raises(UserError, match=f"--where .*{REFUSED[condition]}"):
        translate(condition, COLUMNS)


def test_a_collection_over_its_life(ok, embed, tmp_path):
    ix = f"milvus:{tmp_path}/x.db/docs"
    rows = rows_csv(tmp_path / "rows.csv")
    ok("index", rows, "--index", ix, "--id-column", "id")
    again = ok("index", rows, "--index", ix, "--json")
    assert (again["counts"]["unchanged"], again["counts"]["encoded"], again["rows"]) == (60, 0, 60)
    changed = rows_csv(tmp_path / "changed.csv", changed=(3, 8))
    code, _, stderr = embed("index", changed, "--index", ix)
    assert code == 2 and "'s3'" in stderr and "--update" in stderr
    assert ok("index", changed, "--index", ix, "--update", "--json")["counts"]["updated"] == 2
    code, _, stderr = embed("delete", "--index", ix, "s1", "none")
    assert code == 2 and "'none'" in stderr
    assert ok("delete", "--index", ix, "s1", "none", "--skip-bad", "--json")["deleted"] == 1
    assert ok("delete", "--index", ix, "--where", "n >= 50", "--json")["rows"] == 49
    folder = str(tmp_path / "ix")
    ok("index", changed, "--index", folder, "--id-column", "id")
    ok("delete", "--index", folder, "--where", "n >= 50 OR n = 1")
    for name, kind in ((ix, "theirs"), (folder, "ours")):
        to = ("--to", tmp_path / f"{kind}.parquet", "--to", tmp_path / f"{kind}.npy")
        assert ok("export", "--index", name, *to, "--json")["rows"] == 49
    tables = [pq.read_table(tmp_path / f"{kind}.parquet").sort_by("n") for kind in ("theirs", "ours")]
    vectors = [np.array(table["vector"].to_pylist()) for table in tables]
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-6  # some were encoded among others
    plain = [table.drop_columns(["vector"]).to_pylist() for table in tables]
    assert plain[0] == plain[1] and len(plain[0]) == 49
    judged = [json.dumps({"id": f"q{n}", "text": text}) for n, (text, _) in enumerate(make_sentences(6))]
    task = ("--queries", write_lines(tmp_path / "queries.jsonl", judged))
    task += ("--qrels", write_lines(tmp_path / "qrels.txt", [f"q{n} 0 s{n} 1" for n in range(6)]))
    scores = [ok("evaluate", "--index", name, *task, "--json")["scores"] for name in (ix, folder)]
    assert scores[0]["exact"] == scores[1]["exact"] and set(scores[0]) == {"exact", "hybrid"}


def test_equal_texts_of_one_source_are_one_row(ok, tmp_path):
    """Without ids a text has the id of its equal; of both the first counts, in each run."""
    rows = ["text,label", "good,1", "bad,2", "good,3", "fine,4", "good,5"]
    source = write_lines(tmp_path / "rows.csv", rows)
    for name in (f"milvus:{tmp_path}/x.db/docs", str(tmp_path / "ix")):
        for block in (2, 9):
            for flags in ((), ("--update",)):
                index = ("index", source, "--index", name, "--block", block, *flags)
                counts = ok(*index, "--json")["counts"]
                assert (counts["repeated"], counts["updated"], counts["bad"]) == (2, 0, 0)
        assert counts["unchanged"] == 3
        found = ok("list", "--index", name, "--json")["texts"]
        assert sorted((text["text"], text["columns"]["label"]) for text in found) == [
            ("bad", 2),
            ("fine", 4),
            ("good", 1),
        ]


def test_processes_that_share_the_blocks_write_equal_texts_once(tmp_path):
    """A text whose equal lies in the block of another process."""
    rows = write_lines(tmp_path / "rows.csv", ["text,label", *(f"text {n % 5},{n}" for n in range(12))])
    collection, encoder = texts.read(str(rows), text_column="text"), StubEncoder()
    target = parse_target(f"milvus:{tmp_path}/x.db/docs")
    with milvus.connected(target) as client:
        settings = settings_of(encoder, id_column=None, chunk_overlap=None)
        milvus.make_collection(client, target, settings, milvus.columns_of(collection))
        store = milvus.existing_collection(client, target)
        writers = [milvus.Writer(store, encoder, rank=rank, world_size=2) for rank in range(2)]
        for writer in writers:
            writer.fill(collection, block=3)
        assert [writer.counts.added for writer in writers] == [3, 2]
        assert [writer.counts.repeated for writer in writers] == [3, 4]
        assert sorted(row["label"] for row in store.query("", ["label"], limit=99)) == [0, 1, 2, 3, 4]


def test_an_export_names_no_column_twice(ok, tmp_path):
    """The texts have columns of the names that an export gives to what is its own."""
    rows = write_lines(tmp_path / "rows.csv", ["body,text,id", "good film,a,1", "bad film,b,2"])
    names = []
    for number, name in enumerate((f"milvus:{tmp_path}/x.db/docs", str(tmp_path / "ix"))):
        ok("index", rows, "--index", name, "--text-column", "body")
        ok("export", "--index", name, "--to", tmp_path / f"{number}.parquet")
        table = pq.read_table(tmp_path / f"{number}.parquet").sort_by("text_")
        assert table["text_"].to_pylist() == ["bad film", "good film"]
        assert table["text"].to_pylist() == ["b", "a"]
        names.append(table.column_names)
    assert names[0] == names[1] == ["id_", "text_", "text", "id", "vector"]


def test_chunks_of_long_texts(ok, tmp_path):
    """A shorter document loses the chunks that it no longer has."""
    ix = f"milvus:{tmp_path}/x.db/docs"
    long, short = "good film and a story " * 40, "good film"
    rows = write_lines(tmp_path / "a.csv", ["id,text", f"a,{long}", f"b,{short}"])
    flags = ("--index", ix, "--id-column", "id", "--chunk", "--max-length", 24, "--chunk-overlap", 4)
    many = ok("index", rows, *flags, "--json")["rows"]
    assert many > 5
    folder = str(tmp_path / "ix")
    ok("index", rows, *flags[:1], folder, *flags[2:])
    assert hits(ok, ix, "--query", "a story") == hits(ok, folder, "--query", "a story")
    rows = write_lines(tmp_path / "b.csv", ["id,text", f"a,{short}", f"b,{long}"])
    assert ok("index", rows, "--index", ix, "--update", "--json")["rows"] == many
    assert ok("list", "--index", ix, "--json")["of"] == 2
    assert ok("delete", "--index", ix, "b", "--json")["rows"] == 1


def test_what_is_refused(ok, embed, tiny_model, stores, tmp_path):
    ix, more = stores[1], write_lines(tmp_path / "more.csv", ["id,text,date", "x,good film,1"])
    wrong = {
        ("search", "--index", "milvus:docs", "x"): "URI/COLLECTION",
        ("search", "--index", f"milvus:{tmp_path}/x/docs", "x"): ".db",
        ("search", "--index", f"milvus:{tmp_path}/new.db/docs", "x"): "new.db is not there; make it with",
        ("list", "--index", f"milvus:{tmp_path}/new.db/docs"): "new.db is not there; make it with",
        ("search", "--index", f"{stores[1]}2", "x"): "no such collection",
        ("search", "--index", ix, "x", "--approximate"): "--approximate",
        ("index", more, "--index", ix, "--store", "int8"): "--store",
        ("evaluate", "--index", ix, "--sts", more): f"--index {ix}: --sts {more}",
        ("evaluate", "--index", ix, "--queries", more, "--qrels", more, "--texts", more): "or --index",
        ("evaluate", "--index", ix): "--queries and --qrels",
        ("pairs", "--index", ix): "pairs needs",
        ("delete", "--index", ix, "a\udc80"): "id 1",
        ("delete", "--index", ix): "either ids or --where",
        ("verify", "--index", ix): "verify is for indexes in folders; Milvus has",
        ("sync", more, "--index", ix): "sync is for indexes in folders; Milvus has",
        ("index", more, "--index", ix): "'date'",
        ("index", more, "--index", ix, "--id-column", "date"): "--id-column",
        ("search", "--index", ix, "x", "--model", tiny_model): "fingerprint",
        ("search", "--index", ix, "x", "--max-length", 9): "max_length",
    }
    for command, message in wrong.items():
        code, _, stderr = embed(*command)
        assert code == 2 and message in stderr and len(stderr.splitlines()) <= 2, (command, stderr)
    assert not (tmp_path / "new.db").exists()
    (tmp_path / "locked.db").mkdir()
    with open(tmp_path / "locked.db" / "LOCK", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, stderr = embed("search", "--index", f"milvus:{tmp_path}/locked.db/docs", "x")
    assert code == 2 and "no other process has it open" in stderr and len(stderr.splitlines()) == 1
    from pymilvus import MilvusClient

    client = MilvusClient(f"{tmp_path}/other.db")
    client.create_collection("docs", dimension=4)
    client.close()
    code, _, stderr = embed("search", "--index", f"milvus:{tmp_path}/other.db/docs", "x")
    assert code == 2 and "not a collection that embed_search.py made" in stderr


KILLED = """
import os, runpy, signal, sys
from pymilvus import MilvusClient
upsert, left = MilvusClient.upsert, [int(sys.argv.pop(1))]
def until(*args, **options):
    done = upsert(*args, **options) if left[0] else os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return done
MilvusClient.upsert = until
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(ok, stores, tiny_embedder, tmp_path):
    """SIGKILL after each of the first writes; then the same answers as an index that was never killed."""
    ix, rows = f"milvus:{tmp_path}/x.db/docs", rows_csv(tmp_path / "rows.csv")
    flags = [
        "--index",
        ix,
        "--id-column",
        "id",
        "--block",
        "16",
        "--model",
        tiny_embedder,
        "--precision",
        "fp32",
    ]
    command = ["embed_search.py", "index", rows, *flags, "--device", "cpu"]
    for writes in (1, 0, 2):  # none of the second run: all of the first is kept
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(writes), *map(str, command)], cwd=ROOT, env=environment
        )
        assert done.returncode == -signal.SIGKILL
    last = ok("index", rows, *flags, "--json")
    assert last["rows"] == 60 and last["counts"]["unchanged"] == 48
    queries = [part for text, _ in make_sentences(30, seed=5) for part in ("--query", text)]
    assert hits(ok, ix, *queries) == hits(ok, stores[0], *queries)


@pytest.mark.slow
def test_a_killed_update_of_chunks_goes_on(ok, tiny_embedder, tmp_path):
    """SIGKILL before and after the later chunks of documents are written: without their first chunk
    they count as not yet written, and what is left over of longer ones goes.
    """
    long, ix, folder = "good film and a story " * 20, f"milvus:{tmp_path}/x.db/docs", str(tmp_path / "ix")
    old = write_lines(tmp_path / "a.csv", ["id,text", *(f"s{n},{long * (n % 3)} n{n}" for n in range(9))])
    new = write_lines(tmp_path / "b.csv", ["id,text", *(f"s{n},{long * (2 - n % 3)} m{n}" for n in range(9))])
    flags = ["--id-column", "id", "--chunk", "--max-length", 24, "--chunk-overlap", 4, "--block", 3]
    flags += ["--model", tiny_embedder, "--precision", "fp32", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for rows, writes, code in ((old, -1, 0), *((new, writes, -signal.SIGKILL) for writes in (0, 1, 2))):
        command = [str(writes), "embed_search.py", "index", rows, "--index", ix, "--update", *flags]
        done = subprocess.run([sys.executable, "-c", KILLED, *map(str, command)], cwd=ROOT, env=environment)
        assert done.returncode == code
    last = ok("index", new, "--index", ix, "--update", *flags, "--json")
    assert ok("index", new, "--index", folder, *flags, "--json")["rows"] == last["rows"]
    queries = [part for text, _ in make_sentences(30, seed=5) for part in ("--query", text)]
    found = [hits(ok, name, *queries, "--top-k", 9) for name in (folder, ix)]
    # equal scores are in another order there
    ours, theirs = ([sorted(hit[:2] for hit in own) for own in answers] for answers in found)
    assert ours == theirs and len(ours[0]) == 9


@pytest.mark.slow
def test_each_process_of_a_job_writes_its_share(ok, stores, tiny_embedder, run_script, tmp_path):
    """To a server, which is Milvus Lite's own here; and to a file, which the main process writes."""
    server = subprocess.Popen(
        [
            str(os.path.join(os.path.dirname(sys.executable), "milvus-lite")),
            "server",
            "--data-dir",
            str(tmp_path / "s"),
            "--host",
            "127.0.0.1",
            "--port",
            "19555",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(8)
        rows = rows_csv(tmp_path / "rows.csv")
        for name in ("milvus:http://127.0.0.1:19555/docs", f"milvus:{tmp_path}/x.db/docs"):
            flags = ("--index", name, "--id-column", "id", "--block", 8, "--model", tiny_embedder)
            script = ("embed_search.py", "index", rows, *flags, "--precision", "fp32", "--json")
            done = run_script("torchrun", "--nproc-per-node", 2, *script)
            built = json.loads(done.stdout)
            assert built["rows"] == 60 and built["counts"]["added"] == 60
            queries = [part for text, _ in make_sentences(30, seed=5) for part in ("--query", text)]
            assert hits(ok, name, *queries) == hits(ok, stores[0], *queries)
    finally:
        server.kill()
        server.wait()
