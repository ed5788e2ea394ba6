"""`embed_search.py serve`: the answers are those of the command line, nobody else is answered, and
a real browser shows them: to a pointer, to a keyboard, to a screen reader.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

import aiohttp
import numpy as np
import openai
import pytest
import torch

from common.local_server import address_of, bind
from common.search import mining, page
from common.search.index import open_snapshot
from common.search.manifest import DEFAULT_LIMITS
from common.search.page import MOST_WAITING, Refused, Worker
from common.search.ranker import Ranker
from common.search.searcher import Searcher
from common.search.segments import ID, TEXT
from common.search.selection import select
from conftest import ROOT, make_sentences

HTML = "<script>document.title = 'hacked'</script> <img src=x onerror=alert(1)> a good film & <b>story</b>"
ARABIC, JAPANESE = "ارتفعت أسعار الفائدة film اليوم", "東京の映画はとても良い。ｻｰﾊﾞｰの設定。"
LONG = "\n\n".join(["It was on monday that I saw it, and so it was."] * 40) + " A zebra, at last."
COUNT = 40  # plain rows


@pytest.fixture(scope="module")
def index(embed, tmp_path_factory) -> Path:
    """An index of small texts with a label, a number that one of them lacks, and texts of every kind."""
    folder = tmp_path_factory.mktemp("page")
    rows = [{"id": f"s{n}", "text": text, "label": label, "n": n} for n, (text, label) in enumerate(_plain())]
    odd = {"html": HTML, "ar": ARABIC, "ja": JAPANESE, "long": LONG}
    rows += [{"id": name, "text": text, "label": "it's odd", "n": None} for name, text in odd.items()]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, stderr = embed("index", folder / "texts.jsonl", "--index", folder / "films", "--id-column", "id")
    assert code == 0, stderr
    return folder / "films"


def _plain() -> list[tuple[str, str]]:
    return make_sentences(COUNT)


class Serving:
    """The server in a process of its own."""

    def __init__(self, index: Path, *flags):
        flags = ["--port", "0", "--device", "cpu", "--precision", "fp32", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "embed_search.py", "serve", "--index", index, *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        line = self.process.stdout.readline()
        found = re.fullmatch(r"serving \S+ at (http://127\.0\.0\.1:(\d+)) \(Ctrl-C ends\)\n", line)
        assert found, line + self.process.communicate()[1]
        self.address, self.port = found[1], int(found[2])

    def get(self, path: str, method: str = "GET", headers: dict | None = None, **parameters):
        """Return status, headers and the answer's JSON, or its text where it is none."""
        url = f"{self.address}{path}" + (f"?{urlencode(parameters)}" if parameters else "")
        try:
            with urlopen(Request(url, method=method, headers=headers or {}), timeout=60) as answer:
                status, head, content = answer.status, answer.headers, answer.read().decode()
        except HTTPError as error:
            status, head, content = error.code, error.headers, error.read().decode()
        is_json = head.get_content_type() == "application/json"
        return status, head, json.loads(content) if is_json else content


@pytest.fixture(scope="module")
def serving(index) -> Iterator[Serving]:
    serving = Serving(index)
    yield serving
    serving.process.send_signal(signal.SIGINT)
    stdout, stderr = serving.process.communicate(timeout=60)
    assert serving.process.returncode == 130 and stderr.endswith("stopped by SIGINT\n"), stderr
    assert stdout == "" and "Traceback" not in stderr
    assert re.search(r"GET /\w* 200, ", stderr) and "good" not in stderr  # nor what was searched for


# As JSON ------------------------------------------------------------------------------------------

ASKED = {  # name: (query, parameters, the same as flags)
    "plain": ("a good film", {}, []),
    "more": ("a good film", {"top_k": 30}, ["--top-k", 30]),
    "a later part": ("grim", {"top_k": 3, "offset": 4}, ["--top-k", 3, "--offset", 4]),
    "a lowest score": ("it was lovely", {"min_score": 0.5}, ["--min-score", 0.5]),
    "a condition": ("poor", {"where": "label = 'neg' AND n > 20"}, ["--where", "label = 'neg' AND n > 20"]),
    "by words": ("monday film", {"hybrid": "true"}, ["--hybrid"]),
    "by words of Japan": (
        "東京",
        {"hybrid": "true", "where": "n IS NULL"},
        ["--hybrid", "--where", "n IS NULL"],
    ),
    "by a word that nothing has": ("xylophone", {"hybrid": "true"}, ["--hybrid"]),
    "without words": ("?!", {"hybrid": "false"}, []),
    "no text": ("film", {"where": "n > 1000"}, ["--where", "n > 1000"]),
}


@pytest.mark.parametrize("query, parameters, flags", ASKED.values(), ids=ASKED)
def test_an_answer_is_that_of_the_command_line(query, parameters, flags, serving, index, ok):
    status, _, found = serving.get("/search", query=query, **{"top_k": 5, **parameters})
    assert status == 200, found
    [told] = ok("search", query, "--index", index, "--json", *flags)["queries"]
    for hit in found["hits"]:
        assert all(0 <= first < last <= len(hit["text"]) for first, last in hit.pop("marks"))
    assert (found["query"], found["hits"]) == (told["query"], told["hits"])
    expected = r"xylophone.*found by meaning alone" if query == "xylophone" else "^$"
    notes = [note for note in found["notes"] if not note.startswith("cache ")]  # built by the first of them
    assert re.search(expected, " ".join(notes))


def test_a_query_that_is_cut_is_said(serving):
    _, _, found = serving.get("/search", query="film " * 100)
    assert found["notes"] == ["the query is longer than 64 tokens and was cut there"]


def test_similar_texts_are_those_of_the_command_line(serving, index, ok):
    for where in ({}, {"where": "label = 'pos'"}):
        _, _, found = serving.get("/like", id="s3", top_k=5, **where)
        [told] = ok(
            "like", "s3", "--index", index, "--json", *(["--where", *where.values()] if where else [])
        )["queries"]
        assert found["hits"] == told["hits"] and len(found["hits"]) == 5


def test_the_map_has_the_clusters_of_the_command_line(serving, index, ok):
    status, _, found = serving.get("/map")
    assert status == 200 and len(found["points"]) == found["of"] == COUNT + 4
    told = ok("cluster", "--index", index, "--num-clusters", 8, "--json")["clusters"]
    sizes = [(one["cluster"], one["size"], one["words"][:4]) for one in told]
    assert [(one["cluster"], one["size"], one["words"]) for one in found["clusters"]] == sizes
    own = {key: one["cluster"] for one in told for key in one["ids"]}
    assert {point["id"]: point["cluster"] for point in found["points"]} == own
    selection = select(open_snapshot(index), None)
    _, places = mining.map_points(selection, seed=0)
    places = (places - places.min(0)) / (places.max(0) - places.min(0))
    shown = {point["id"]: (point["x"], point["y"]) for point in found["points"]}
    ids = [row[ID] for row in selection.snapshot.take(selection.rows, [ID])]
    assert np.allclose([shown[key] for key in ids], places, atol=1e-3)


@pytest.mark.parametrize(
    "query, key, marked",
    [
        ("GOOD story", "html", ["good", "story"]),
        ("b", "html", ["b", "b"]),
        ("الفائدة", "ar", ["الفائدة"]),
        ("東京", "ja", ["東京"]),
        ("サーバー", "ja", ["ｻｰﾊﾞｰ"]),
        ("Zebra", "long", ["zebra"]),
    ],
)
def test_the_words_of_the_query_are_marked(query, key, marked, serving):
    _, _, found = serving.get("/search", query=query, top_k=COUNT + 4)
    [hit] = [hit for hit in found["hits"] if hit["id"] == key]
    assert [hit["text"][first:last] for first, last in hit["marks"]] == marked


REFUSED = {  # name: (address, parameters, status, what the message has)
    "no query": ("/search", {}, 400, "query: it is missing"),
    "an empty query": ("/search", {"query": " "}, 400, "query: the text is empty"),
    "a long query": ("/search", {"query": "長" * 4001}, 400, "more than 4,000 characters"),
    "no condition": ("/search", {"query": "x", "where": "labl = 1"}, 400, "--where .*labl.*label, n"),
    "a statement": ("/search", {"query": "x", "where": "1; DROP TABLE x"}, 400, "--where"),
    "a file": ("/search", {"query": "x", "where": "n IN (SELECT 1 FROM '/etc/passwd')"}, 400, "--where"),
    "an empty condition": ("/search", {"query": "x", "where": ""}, 400, "where: the text is empty"),
    "too many texts": ("/search", {"query": "x", "top_k": 101}, 400, "top_k: '101' is not .* 1 to 100"),
    "no number": ("/search", {"query": "x", "top_k": "²"}, 400, "top_k"),
    "too far": ("/search", {"query": "x", "offset": 1001}, 400, "offset: '1001' is not .* 0 to 1,000"),
    "no score": ("/search", {"query": "x", "min_score": "nan"}, 400, "min_score: 'nan' is not a number"),
    "neither": ("/search", {"query": "x", "hybrid": "yes"}, 400, "hybrid: 'yes' is neither true nor false"),
    "an unknown parameter": ("/search", {"query": "x", "limit": 3}, 400, "limit: no parameter of /search"),
    "an unknown id": ("/like", {"id": "s99"}, 400, "no text with id 's99'"),
    "no id": ("/like", {}, 400, "id: it is missing"),
    "a parameter of the map": ("/map", {"query": "x"}, 400, "it takes none"),
    "no such address": ("/page.py", {}, 404, "Not Found: GET /page.py"),
    "a way out": ("/../../README.md", {}, 404, "Not Found"),
}


@pytest.mark.parametrize("path, parameters, status, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_answered_is_refused_in_one_line(path, parameters, status, words, serving):
    found, head, content = serving.get(path, **parameters)
    assert (found, list(content)) == (status, ["error"]) and head["Cache-Control"] == "no-store"
    assert re.search(words, content["error"]) and "\n" not in content["error"]


def test_nobody_else_is_answered(serving):
    """Neither a page whose name was bound to this address, nor one that asks through the browser."""
    ask = {"path": "/search", "query": "film"}
    for host in ("evil.example", f"127.0.0.1.evil.example:{serving.port}", "0.0.0.0", ""):
        for path in ("/", "/search"):
            status, _, content = serving.get(path, headers={"Host": host}, query="film")
            assert (status, "localhost only" in content["error"]) == (403, True), host
    assert serving.get(**ask, headers={"Host": f"localhost:{serving.port}"})[0] == 200
    for site, status in {"cross-site": 403, "same-site": 403, "same-origin": 200, "none": 200}.items():
        assert serving.get(**ask, headers={"Sec-Fetch-Site": site})[0] == status
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        status, head, content = serving.get(**ask, method=method)
        assert status == 405 and content["error"] and "Access-Control-Allow-Origin" not in head
    twice = serving.get("/search?query=film&query=story")
    assert twice[0] == 400 and "query: it is named twice" in twice[2]["error"]


# Embeddings for other programs --------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(serving) -> openai.OpenAI:
    """The official client."""
    return openai.OpenAI(base_url=f"{serving.address}/v1", api_key="none", max_retries=0)


def test_embeddings_are_those_of_the_index_and_of_a_search(client, serving, index):
    """More texts than are encoded at once, in their order, in both formats."""
    snapshot = open_snapshot(index)
    rows = snapshot.take(range(COUNT), [ID, TEXT])
    [model] = [model.id for model in client.models.list()]
    asked = {"model": model, "input": [row[TEXT] for row in rows]}
    as_numbers = client.embeddings.create(**asked, encoding_format="float")
    found = np.array([one.embedding for one in as_numbers.data], np.float32)
    assert np.allclose(found, snapshot.vectors_of(np.arange(COUNT)), atol=1e-5)
    assert [one.index for one in as_numbers.data] == list(range(COUNT)) and as_numbers.model == model
    assert as_numbers.usage.prompt_tokens == as_numbers.usage.total_tokens > COUNT
    packed = client.embeddings.create(**asked)  # the client asks for base64 and unpacks it
    assert np.array_equal(np.array([one.embedding for one in packed.data], np.float32), found)
    [query] = client.embeddings.create(
        model=model, input="it was good", extra_body={"input_type": "query"}
    ).data
    _, _, searched = serving.get("/search", query="it was good", where="id = 's3'")
    assert np.isclose(np.dot(query.embedding, found[3]), searched["hits"][0]["score"], atol=1e-5)


def test_fewer_dimensions_are_the_first_ones_at_norm_1(client):
    asked = {"model": "tiny-embedder", "input": "a good film"}
    [whole], [part] = (client.embeddings.create(**asked, **more).data for more in ({}, {"dimensions": 8}))
    first = np.array(whole.embedding[:8])
    assert np.allclose(part.embedding, first / np.linalg.norm(first), atol=1e-6)


NO_EMBEDDINGS = {  # name: (what differs from a good request, status, the parameter, what the message has)
    "another model": ({"model": "ada"}, 404, "model", "'tiny-embedder' is served"),
    "no texts": ({"input": []}, 400, "input", "up to 2,048 texts"),
    "too many texts": ({"input": ["x"] * 2049}, 400, "input", "up to 2,048 texts"),
    "tokens": ({"input": [[1, 2]]}, 400, "input", "up to 2,048 texts"),
    "a blank text": ({"input": ["x", " "]}, 400, "input", r"input\[1\]: the text is empty"),
    "half a character": ({"input": "\udc80"}, 400, None, "a lone surrogate .* is no character"),
    "more dimensions": ({"dimensions": 4096}, 400, "dimensions", "ask for fewer"),
    "no dimensions": ({"dimensions": 0}, 400, "dimensions", "above 0"),
    "a format": ({"encoding_format": "int8"}, 400, "encoding_format", "float or base64"),
    "an unknown parameter": ({"truncate": True}, 400, "truncate", "nothing is ignored"),
}


@pytest.mark.parametrize("more, status, name, words", NO_EMBEDDINGS.values(), ids=NO_EMBEDDINGS)
def test_embeddings_that_are_refused(more, status, name, words, serving):
    body = json.dumps({"model": "tiny-embedder", "input": "x", **more}).encode()
    found, content = post(serving, body)
    error = content["error"]
    assert (found, error["param"], error["type"]) == (status, name, "invalid_request_error")
    assert re.search(words, error["message"])


def post(serving: Serving, body: bytes, **headers: str) -> tuple[int, dict]:
    """Ask for embeddings; return the status and the answer."""
    head = {
        "Content-Type": "application/json",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    request = Request(f"{serving.address}/v1/embeddings", data=body, headers=head)
    try:
        with urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def test_embeddings_have_bounds_and_no_other_site_gets_any(serving):
    body = b'{"model": "tiny-embedder", "input": "x"}'
    assert post(serving, body)[0] == 200
    for status, more in {
        403: {"Sec_Fetch_Site": "cross-site"},
        415: {"Content_Type": "text/plain"},  # what a page may send without asking first
    }.items():
        found, content = post(serving, body, **more)
        assert found == status and content["error"]["message"]
    assert post(serving, body, Host="evil.example")[0] == 403
    assert post(serving, b"{" + b" " * (4 << 20) + b"}")[0] == 413
    assert post(serving, b"[NaN]")[1]["error"]["message"] == "the body is not JSON in UTF-8"


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes)."""

    def __init__(self, content: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_loads_its_own_files_only(serving):
    status, head, content = serving.get("/")
    assert status == 200 and head.get_content_type() == "text/html"
    policy = dict(part.split(" ", 1) for part in head["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and {policy["script-src"], policy["style-src"]} == {"'self'"}
    assert (head["X-Content-Type-Options"], head["Cache-Control"]) == ("nosniff", "no-store")
    elements = Elements(content).found
    named = [attributes[name] for _, attributes in elements for name in ("src", "href") if name in attributes]
    assert sorted(named) == ["#found", "/page.css", "/page.js"]
    for path, kind in {"/page.css": "text/css", "/page.js": "text/javascript"}.items():
        status, head, content = serving.get(path)
        assert (status, head.get_content_type(), head["X-Content-Type-Options"]) == (200, kind, "nosniff")
        outside = [url for url in re.findall(r"https?://[^\s\"')]+", content) if "www.w3.org" not in url]
        assert not outside and "innerHTML" not in content and "@import" not in content
    names = [name for _, attributes in elements for name in attributes]
    assert not [name for name in names if name.startswith("on") or name == "style"]


def test_what_is_wrong_is_said_before_the_page_is_there(serving, index, embed, ok, tmp_path):
    cases = [
        (["--index", index, "--port", serving.port], f"--port {serving.port}: Address already in use"),
        (["--index", index, "--port", 65536], "is not a number from 0 to 65535"),
        (["--index", "milvus:films.db/films"], "--index milvus:films.db/films: serve needs the vectors"),
        (["--index", tmp_path], "index"),
        (["--index", index, "--port", 0, "--where", "n > 1000"], "0 texts, at least 1 needed; widen --where"),
    ]
    for flags, words in cases:
        code, stdout, stderr = embed("serve", *flags)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1) and words in stderr, stderr


def test_one_thread_computes_and_what_waits_has_an_end():
    """A full queue refuses, who has left is not computed for, and at the end whoever waits is told."""

    async def act() -> None:
        worker, computed = Worker(), []

        async def block() -> tuple[asyncio.Task, threading.Event]:
            """Let the thread compute until an event is set."""
            has_begun, may_end = threading.Event(), threading.Event()
            task = asyncio.create_task(worker.run(lambda: (has_begun.set(), may_end.wait(30))[1]))
            assert await asyncio.to_thread(has_begun.wait, 30)
            return task, may_end

        async def wait_for_turn(name: object) -> asyncio.Task:
            size = worker.calls.qsize()
            task = asyncio.create_task(worker.run(lambda: computed.append(name)))
            while worker.calls.qsize() == size:
                await asyncio.sleep(0.001)
            return task

        first, may_end = await block()
        waiting = [await wait_for_turn(number) for number in range(MOST_WAITING)]
        with pytest.raises(Refused, match="16 requests wait") as refused:
            await worker.run(lambda: computed.append("too many"))
        assert refused.value.status == 429
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        may_end.set()
        assert await first is True
        await asyncio.gather(*waiting[1:])
        assert computed == list(range(1, MOST_WAITING))
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 / 0)
        last, may_end = await block()
        late = await wait_for_turn("late")
        closing = asyncio.create_task(asyncio.to_thread(worker.close))
        with pytest.raises(Refused, match="stopping"):
            await late
        may_end.set()
        await closing
        assert await last is True and "late" not in computed and not worker.thread.is_alive()

    asyncio.run(act())


def test_texts_are_found_while_the_map_is_drawn(index, monkeypatch):
    """With a drawing that waits; a condition makes a child process meanwhile."""
    snapshot, draw = open_snapshot(index), mining.map_points
    has_begun, may_end = threading.Event(), threading.Event()

    def wait_and_draw(*args, **options):
        has_begun.set()
        assert may_end.wait(30)
        return draw(*args, **options)

    monkeypatch.setattr(mining, "map_points", wait_and_draw)
    served = page.ServedIndex(Searcher(Ranker(snapshot, snapshot.is_live())), limits=DEFAULT_LIMITS, seed=0)

    async def act() -> None:
        listener = bind(0)
        async with page.running(served, listener), aiohttp.ClientSession(address_of(listener)) as client:
            drawing = [asyncio.create_task(client.get("/map")) for _ in range(2)]
            assert await asyncio.to_thread(has_begun.wait, 30)
            async with client.get("/like", params={"id": "s3", "where": "n > 5"}) as answer:
                assert answer.status == 200 and len((await answer.json())["hits"]) == 10
            assert not any(task.done() for task in drawing)
            may_end.set()
            first, second = [await (await task).json() for task in drawing]
            assert first == second and len(first["points"]) == COUNT + 4

    asyncio.run(act())


# In a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium that the system has."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, serving):
    """Return a function that opens the page. At the end nothing was loaded from elsewhere and
    nothing was amiss.
    """
    contexts, asked, complaints = [], [], []

    def open_page(address: str = "/", **options):
        contexts.append(chromium.new_context(**{"viewport": {"width": 1000, "height": 800}, **options}))
        contexts[-1].set_default_timeout(20_000)
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(serving.address + address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert {urlsplit(url).netloc for url in asked} == {f"127.0.0.1:{serving.port}"}
    assert [line for line in complaints if "status of 400" not in line] == []


def search(page, query: str) -> None:
    """Type a query, and wait for the texts."""
    page.get_by_label("Search for").fill(query)
    page.get_by_role("button", name="Search", exact=True).click()
    page.get_by_role("heading", name=f"Texts for “{query}”").wait_for()


def shown_ids(page) -> list[str]:
    return page.locator("#hits h3").all_inner_texts()


def test_a_query_shows_texts_scores_and_marks(open_page, serving, index):
    page = open_page()
    page.wait_for_function("document.title === 'films: search'")  # the index's name comes after the page
    search(page, "a good story")
    _, _, found = serving.get("/search", query="a good story")
    assert shown_ids(page) == [hit["id"] for hit in found["hits"]]
    assert page.get_by_role("status").inner_text() == "10 texts found"
    for item, hit in zip(page.locator("#hits > li").all(), found["hits"]):
        assert f"score {hit['score']:.3f}" in item.inner_text()
        assert item.locator("mark").all_inner_texts() == [hit["text"][a:b] for a, b in hit["marks"]]
        assert item.locator(".text").text_content() == hit["text"]
    page.get_by_role("button", name="More texts").click()
    page.get_by_text("20 texts found").wait_for()
    _, _, both = serving.get("/search", query="a good story", top_k=20)
    assert shown_ids(page) == [hit["id"] for hit in both["hits"]]
    assert page.evaluate("document.activeElement.querySelector('h3').innerText") == both["hits"][10]["id"]


def test_texts_are_shown_as_they_are(open_page):
    """Markup is text, Arabic runs from the right, and of a long text the part with the words."""
    page = open_page("/?query=film&where=n+IS+NULL&hybrid=true")
    page.get_by_text("4 texts found").wait_for()
    assert page.get_by_label("Count words too").is_checked()
    texts = {item.locator("h3").inner_text(): item for item in page.locator("#hits > li").all()}
    assert texts["html"].locator(".text").text_content() == HTML and page.title() == "films: search"
    assert page.locator("#hits script, #hits img, #hits b").count() == 0
    directions = {
        key: texts[key].locator(".text").evaluate("e => getComputedStyle(e).direction") for key in texts
    }
    assert directions == {"html": "ltr", "ar": "rtl", "ja": "ltr", "long": "ltr"}
    search(page, "zebra")
    long = page.locator("#hits > li", has=page.get_by_role("heading", name="long"))
    assert len(long.locator(".text").text_content()) < 600 and long.locator("mark").inner_text() == "zebra"
    whole = long.get_by_role("button", name="Whole text")
    assert whole.get_attribute("aria-expanded") == "false"
    whole.click()
    assert long.locator(".text").text_content() == LONG and whole.get_attribute("aria-expanded") == "true"


def test_a_condition_narrows_the_search_and_a_wrong_one_is_said(open_page):
    page = open_page()
    search(page, "it's")
    page.get_by_label("Only texts where").fill("n < 3")
    page.get_by_label("Only texts where").press("Enter")
    page.get_by_text("3 texts found").wait_for()
    assert sorted(shown_ids(page)) == ["s0", "s1", "s2"]
    page.get_by_role("button", name="label: neg, show only such texts").first.click()
    page.get_by_text("2 texts found").wait_for()
    assert page.get_by_label("Only texts where").input_value() == """(n < 3) AND "label" = 'neg'"""
    page.get_by_label("Only texts where").fill("n IS NULL")
    page.get_by_label("Only texts where").press("Enter")
    page.get_by_text("4 texts found").wait_for()
    page.get_by_role("button", name="label: it's odd").first.click()  # a quotation mark
    page.wait_for_url("**label**")
    page.get_by_text("4 texts found").wait_for()
    page.get_by_role("button", name="n: none").first.click()
    page.get_by_text("4 texts found").wait_for()
    page.get_by_label("Only texts where").fill("labl = 1")
    page.get_by_label("Only texts where").press("Enter")
    page.get_by_role("alert").filter(has_text="labl").wait_for()
    assert shown_ids(page) == [] and "label, n" in page.get_by_role("alert").inner_text()


def test_similar_texts_and_back(open_page, serving):
    page = open_page()
    search(page, "a good film")
    before = shown_ids(page)
    page.get_by_role("button", name=f"Similar texts to {before[0]}", exact=True).click()
    page.get_by_role("heading", name=f"Similar to {before[0]}").wait_for()
    _, _, found = serving.get("/like", id=before[0])
    assert shown_ids(page) == [hit["id"] for hit in found["hits"]]
    page.go_back()
    page.get_by_role("heading", name="Texts for").wait_for()
    assert shown_ids(page) == before and page.get_by_label("Search for").input_value() == "a good film"
    page.go_back()
    page.locator("#hits > li").first.wait_for(state="detached")
    assert page.url == f"{serving.address}/"


def test_the_map_shows_each_text_at_the_pointer_and_in_a_list(open_page, serving):
    page = open_page()
    page.get_by_role("button", name="Map of clusters").click()
    page.get_by_role("img", name="Map of clusters").wait_for()
    _, _, found = serving.get("/map")
    assert page.locator("#points path").count() == COUNT + 4
    page.locator("#points").scroll_into_view_if_needed()
    shown = []
    for number in range(0, COUNT, 9):
        box = page.locator("#points path").nth(number).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.locator("#tip").wait_for()
        shown.append(found["points"][number]["text"] in page.locator("#tip").inner_text())
    assert shown == [True] * len(shown)
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.get_by_role("heading", name=f"Similar to {found['points'][number]['id']}").wait_for()
    lists = page.locator("#clusters > li")
    assert lists.count() == len(found["clusters"])
    for item, cluster in zip(lists.all(), found["clusters"]):
        own = [point["text"] for point in found["points"] if point["cluster"] == cluster["cluster"]]
        assert item.locator("li").all_text_contents() == own and len(own) == cluster["size"]
        assert ", ".join(cluster["words"]) in item.locator("summary").inner_text()


def test_the_keyboard_is_enough(open_page):
    """Search, similar texts and the map, with a focus that is seen and never lost."""
    page = open_page()
    focused = "document.activeElement.id || document.activeElement.innerText"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the texts"
    page.keyboard.press("/")
    assert page.evaluate(focused) == "query"
    assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    page.keyboard.type("and/or film")  # here a slash is one
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Texts for “and/or film”").wait_for()
    order = []
    for _ in range(9):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
    assert order[:5] == ["", "where", "hybrid", "count", "draw"] or order[0] == "Search", order
    assert order[1:5] == ["where", "hybrid", "count", "draw"]
    assert [text.split(":")[0] for text in order[5:8]] == ["label", "n", "Similar texts"], order
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Similar to").wait_for()
    assert page.evaluate(focused) == "found"  # the button is gone: the list of texts begins here
    page.keyboard.press("/")
    for _ in range(5):
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.get_by_role("img", name="Map of clusters").wait_for()
    assert page.evaluate(focused) == "map-title"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first cluster's list
    page.keyboard.press("Tab")
    text = page.evaluate(focused)
    page.keyboard.press("Enter")
    page.get_by_role("status").filter(has_text="10 texts found").wait_for()
    assert page.get_by_role("heading", name="Similar to").count() == 1 and text


def test_a_screen_reader_is_told_what_is_what(open_page):
    page = open_page("/?query=film&top_k=2")
    page.get_by_text("2 texts found").wait_for()
    tree = page.locator("body").aria_snapshot()
    for line in (
        'heading "Search films" [level=1]',
        'search "Texts"',
        'searchbox "Search for"',
        'textbox "Only texts where (a condition in SQL)"',
        'checkbox "Count words too (hybrid)"',
        'spinbutton "Texts at once"',
        'button "Map of clusters"',
        "status: 2 texts found",
        'region "Texts for “film”"',
        'heading "Texts for “film”" [level=2]',
        'list "Columns"',
    ):
        assert line in tree, tree
    assert page.locator("ol#hits > li").count() == 2
    assert page.locator("#query").evaluate("e => e.ariaDescribedByElements.length") == 1


# the contrast of an element's text with the nearest ground behind it, as WCAG 2 computes it
CONTRAST = """element => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  let behind = element;
  while (numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const light = (colour) => numbers(colour).slice(0, 3)
    .map((one) => one / 255).map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, n) => sum + one * [0.2126, 0.7152, 0.0722][n], 0);
  const style = getComputedStyle(element), ground = light(getComputedStyle(behind).backgroundColor);
  const [dark, bright] = [light(style.color), ground].sort((a, b) => a - b);
  return (bright + 0.05) / (dark + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark_on_wide_and_narrow_screens(scheme, open_page):
    page = open_page("/?query=film&top_k=3", color_scheme=scheme, viewport={"width": 320, "height": 600})
    page.locator("mark").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 150) == (scheme == "dark")
    for part in (
        "h1",
        "#about",
        ".text",
        "mark",
        ".main",
        "#draw",
        ".columns button",
        "#status",
        "#query",
        ".head span",
    ):
        assert page.locator(part).first.evaluate(CONTRAST) >= 4.5, part
    page.get_by_label("Only texts where").fill("no condition")
    page.get_by_label("Only texts where").press("Enter")
    page.get_by_role("alert").filter(has_text="--where").wait_for()
    assert page.get_by_role("alert").evaluate(CONTRAST) >= 4.5
