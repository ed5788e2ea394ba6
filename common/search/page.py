"""A page over an index for a browser on this machine: search, conditions, similar texts, a map of
clusters; the same answers as JSON; embeddings for other programs.

It is reached at the loopback only, and by its own name only. A browser may load and run nothing but
the three files beside this one. One thread computes, for one request after the other; another one
draws the map, which takes long.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import functools
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from aiohttp import web

from common import cli, local_server, sources
from common.api import BODY_BYTES, ApiError, json_of
from common.errors import Interrupted, UserError, fault_of_system, shorten
from common.reading import evenly_spaced
from common.search import embeddings, mining
from common.search.display import hit_documents
from common.search.index import known_rows
from common.search.manifest import Limits
from common.search.ranker import Ranker
from common.search.screen import Screen
from common.search.searcher import HitRange, Searcher, liked_vector
from common.search.segments import ID, TEXT
from common.search.selection import Selection, matching
from common.search.words import LANGUAGES, stop_words

FILES = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css")}
FILES["/page.js"] = ("page.js", "text/javascript")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# texts of an answer, texts left out before them; without top_k
MOST, FARTHEST, USUAL = 100, 1_000, 10
LONGEST = 4_000  # characters of a parameter
LINE_BYTES = 1 << 17  # of a request's first line: two parameters, each character escaped
API = "/v1/"  # begins the addresses of OpenAI's protocol
MOST_WAITING = 16  # requests that wait for the one that is computed
MARKED = 100_000  # characters of a text in which words are marked
CLUSTERS, NUM_WORDS = 8, 4  # on the map, and the words of each
SHOWN = 160  # characters of a text on the map
BLOCK = 1_024  # rows read at once for the map


class Refused(Exception):
    """A request that is not answered, with its status of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# What is asked ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a request asks for."""

    hit_range: HitRange
    query: str = ""
    id: str = ""
    where: str | None = None
    hybrid: bool = False


PAGED = {"where", "top_k", "offset", "min_score"}
PARAMETERS = {"/search": {"query", "hybrid", *PAGED}, "/like": {"id", *PAGED}}
PARAMETERS |= {"/map": set(), "/about": set()}
NEEDED = {"/search": "query", "/like": "id"}


def read(path: str, given: list[tuple[str, str]]) -> Asked:
    """Return what the parameters of a request say. Raises UserError for one that can't be used."""
    values: dict[str, str] = {}
    for name, text in given:
        if name not in PARAMETERS[path]:
            known = ", ".join(sorted(PARAMETERS[path])) or "none"
            raise UserError(f"{shorten(name, 40)}: no parameter of {path}; it takes {known}")
        if name in values:
            raise UserError(f"{name}: it is named twice; name it once")
        if len(text) > LONGEST:
            raise UserError(f"{name}: it has more than {LONGEST:,} characters; shorten it")
        sources.check_query(text, name)
        values[name] = text
    needed = NEEDED.get(path)
    if needed and needed not in values:
        raise UserError(f"{needed}: it is missing; ask for {path}?{needed}=...")
    hybrid = values.get("hybrid", "false")
    if hybrid not in ("true", "false"):
        raise UserError(f"hybrid: {shorten(hybrid, 40)!r} is neither true nor false")
    count = _number(values, "top_k", USUAL, 1, MOST)
    offset = _number(values, "offset", 0, 0, FARTHEST)
    texts = values.get("query", ""), values.get("id", "")
    return Asked(HitRange(count, offset, _score(values)), *texts, values.get("where"), hybrid == "true")


def _number(values: dict[str, str], name: str, usual: int, lowest: int, highest: int) -> int:
    text = values.get(name, str(usual))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and lowest <= int(text) <= highest):
        problem = f"{shorten(text, 40)!r} is not a number from {lowest} to {highest:,}"
        raise UserError(f"{name}: {problem}")
    return int(text)


def _score(values: dict[str, str]) -> float | None:
    text = values.get("min_score")
    try:
        return None if text is None else cli.finite_float(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"min_score: {error}") from error


# What is answered ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clusters:
    """The rows on the map, the cluster (n) of each, the words of each cluster, ids and texts."""

    drawn: Selection
    labels: np.ndarray
    words: list[list[str]]
    entries: list[dict]


class ServedIndex:
    """An index as it is shown: one state of it, and how it is searched. Only
    rows that `searcher` allows are shown.
    """

    def __init__(self, searcher: Searcher, *, limits: Limits, seed: int) -> None:
        assert isinstance(searcher.ranker, Ranker)  # no page is served over Milvus
        self.searcher, self.ranker, self.snapshot = searcher, searcher.ranker, searcher.snapshot
        self.shown = searcher.ranker.allowed
        self.limits, self.seed = limits, seed

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.snapshot.folder.resolve().name

    @property
    def model(self) -> str:
        """The name of its model, without the folders of this machine."""
        return Path(self.snapshot.settings["model"]).name

    def about(self, asked: Asked) -> dict[str, Any]:
        """Return what the index is."""
        return {
            "index": self.name,
            "rows": int(self.shown.sum()),
            "unit": Selection(self.snapshot, np.flatnonzero(self.shown)).unit,
            "columns": {ID: "string", TEXT: "string", **self.snapshot.manifest["columns"]},
            "model": self.model,
            "language": self.ranker.words.language,
        }

    def search(self, asked: Asked) -> dict[str, Any]:
        """Return the texts that are nearest to a query, as `search --json` does, with the places of
        its words and the notes that a terminal would show.
        """
        notes: list[str] = []
        searcher, ranker, encoder = self.searcher, self.ranker, self.searcher.encoder
        assert encoder is not None
        # changed and not copied: what it has cached of the words stays
        ranker.allowed, ranker.hybrid = self._allowed(asked), asked.hybrid
        ranker.say = notes.append
        num_cut = encoder.num_cut
        [hits] = searcher.search([asked.query], asked.hit_range.depth)
        if encoder.num_cut > num_cut:
            notes.append(f"the query is longer than {encoder.max_length} tokens and was cut there")
        documents = hit_documents(self.snapshot, asked.hit_range.select(hits))
        wanted = set(ranker.words.of_query(asked.query))
        for document in documents:
            document["marks"] = ranker.words.places(document["text"][:MARKED], wanted)
        lines = [" ".join(note.split()) for note in notes]
        return {"query": asked.query, "hits": documents, "notes": lines}

    def embed(self, texts: list[str], role: str) -> tuple[np.ndarray, int]:
        """Return the embeddings (texts, dimensions) at norm 1, and how many tokens the model read."""
        encoder = self.searcher.encoder
        assert encoder is not None
        tokens, _ = encoder.tokenize([encoder.prompt(role) + text for text in texts])
        return encoder.encode_normalized(texts, role=role), sum(map(len, tokens["input_ids"]))

    def like(self, asked: Asked) -> dict[str, Any]:
        """Return the texts that are similar to one of the index, as `like --json` does."""
        rows, allowed = known_rows(self.snapshot, asked.id), self._allowed(asked)
        allowed[rows] = False
        nearest = Searcher(Ranker(self.snapshot, allowed)).nearest
        hits = nearest(liked_vector(self.snapshot, [rows], []), asked.hit_range.depth)
        documents = hit_documents(self.snapshot, asked.hit_range.select(hits))
        return {"id": asked.id, "hits": documents, "notes": []}

    @functools.cached_property
    def clusters(self) -> Clusters:
        """What is on the map, except the positions: all that is read from the index for it."""
        # imported here and not by the thread that draws: --where is evaluated in a child process,
        # and while it is made no other thread may import
        import sklearn.decomposition
        import sklearn.manifold  # noqa: F401

        rows = np.flatnonzero(self.shown)
        if len(rows) < 2:
            problem = f"{len(rows)} texts, at least 2 needed for a map"
            raise UserError(f"{self.name}: {problem}; add more texts")
        drawn = Selection(self.snapshot, rows[evenly_spaced(len(rows), mining.MAPPED)])
        labels = mining.k_means(drawn, min(CLUSTERS, len(drawn)), block=BLOCK, seed=self.seed)
        language = self.ranker.words.language
        stop = stop_words(language) if LANGUAGES[language].stop_words else None
        words = mining.typical_words(drawn, labels, NUM_WORDS, stop)
        return Clusters(drawn, labels, words, self.snapshot.take(drawn.rows, [ID, TEXT]))

    @functools.cached_property
    def map(self) -> dict[str, Any]:
        """The map of clusters: points from 0 to 1 of at most 2,000 rows, evenly spaced, and the words
        of each cluster. Their `clusters` are known before.
        """
        drawn, labels = self.clusters.drawn, self.clusters.labels
        _, points = mining.map_points(drawn, seed=self.seed)
        lowest, highest = points.min(0), points.max(0)
        places = (points - lowest) / np.maximum(highest - lowest, 1e-9)
        entries = self.clusters.entries
        return {
            "of": int(self.shown.sum()),
            "unit": drawn.unit,
            "points": [
                {"id": row[ID], "text": shorten(row[TEXT], SHOWN), "x": x, "y": y, "cluster": label + 1}
                for row, (x, y), label in zip(entries, places.tolist(), labels.tolist())
            ],
            "clusters": [
                {"cluster": number, "size": int((labels == number - 1).sum()), "words": own}
                for number, own in enumerate(self.clusters.words, start=1)
            ],
        }

    def _allowed(self, asked: Asked) -> np.ndarray:
        """Return a mask (rows) of the rows that may be found; the caller may change it."""
        if asked.where is None:
            return self.shown.copy()
        return self.shown & matching(self.snapshot, asked.where, self.limits)


ANSWERS: dict[str, Callable[[ServedIndex, Asked], dict[str, Any]]] = {
    "/search": ServedIndex.search,
    "/like": ServedIndex.like,
    "/about": ServedIndex.about,
}


# The server ---------------------------------------------------------------------------------------


class Worker:
    """A thread that computes, and what waits for it."""

    def __init__(self) -> None:
        self.calls: queue.Queue[tuple[concurrent.futures.Future, Callable[[], Any]] | None]
        self.calls = queue.Queue(MOST_WAITING)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    async def run(self, call: Callable[[], Any]) -> Any:
        """Return what a call returns, when its turn has come. Raises Refused if too many wait."""
        answer: concurrent.futures.Future = concurrent.futures.Future()
        try:
            self.calls.put_nowait((answer, call))
        except queue.Full:
            problem = f"{MOST_WAITING} requests wait, and no more may; try again later"
            raise Refused(429, problem) from None
        return await asyncio.wrap_future(answer)

    def close(self) -> None:
        """Refuse what waits; what is being computed has some seconds."""
        with contextlib.suppress(queue.Empty):
            while job := self.calls.get_nowait():
                if job[0].set_running_or_notify_cancel():
                    job[0].set_exception(Refused(503, "the server is stopping"))
        self.calls.put(None)
        self.thread.join(local_server.SECONDS_TO_FINISH)

    def _work(self) -> None:
        while job := self.calls.get():
            answer, call = job
            if not answer.set_running_or_notify_cancel():  # who asked has left
                continue
            try:
                answer.set_result(call())
            except BaseException as error:  # whoever waits for it deals with it
                answer.set_exception(error)


class Server:
    """The handlers of all addresses."""

    def __init__(self, index: ServedIndex, worker: Worker, drawer: Worker) -> None:
        self.index, self.worker, self.drawer = index, worker, drawer
        folder = Path(__file__).parent
        self.files = {path: (folder / name).read_text("utf-8") for path, (name, _) in FILES.items()}

    def app(self) -> web.Application:
        """Return what answers requests."""
        app = web.Application(middlewares=[self.answer_errors], client_max_size=BODY_BYTES)
        app.router.add_get("/favicon.ico", self.no_icon)  # which browsers ask for unasked
        for path in FILES:
            app.router.add_get(path, self.file)
        for path in ANSWERS:
            app.router.add_get(path, self.answer)
        app.router.add_get("/map", self.map)
        app.router.add_get(f"{API}models", self.models)
        app.router.add_post(f"{API}embeddings", self.embeddings)
        return app

    @web.middleware
    async def answer_errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Check who asks, answer what goes wrong as JSON, and write a line about each request,
        without what was searched for.
        """
        began, status = time.perf_counter(), 499  # the client has left
        try:
            try:
                check_sender(request)
                response = await handler(request)
            except ApiError as error:
                response = web.json_response(error.content(), status=error.status)
            except Refused as error:
                response = refusal(request, error.status, str(error))
            except UserError as error:
                response = refusal(request, 400, str(error))
            except web.HTTPException as error:
                named = f"{error.reason}: {request.method} {shorten(request.path, 60)}"
                response = refusal(request, error.status, named)
            except Exception as error:  # a bug or a lack ends this request, not the server
                reason = fault_of_system(error)
                if reason is None:
                    traceback.print_exc()
                response = refusal(request, 500, reason or "a fault of the server; see what it wrote")
            response.headers.update(HEADERS)
            status = response.status
            return response
        finally:
            line = f"{request.method} {shorten(request.path, 60)} {status}"
            print(f"{line}, {time.perf_counter() - began:.2f} s", file=sys.stderr, flush=True)

    async def answer(self, request: web.Request) -> web.Response:
        """Answer a question about the index as JSON."""
        asked = read(request.path, list(request.query.items()))
        compute = ANSWERS[request.path]
        text = await self.worker.run(lambda: cli.json_line(compute(self.index, asked)))
        return web.json_response(text=text)

    async def map(self, request: web.Request) -> web.Response:
        """Answer with the map, which another thread draws: meanwhile texts are found."""
        read(request.path, list(request.query.items()))  # refuses what a map does not take
        await self.worker.run(lambda: self.index.clusters)
        text = await self.drawer.run(lambda: cli.json_line(self.index.map))
        return web.json_response(text=text)

    async def models(self, request: web.Request) -> web.Response:
        """List the one model, as OpenAI's clients ask for it."""
        model = {"id": self.index.model, "object": "model", "created": 0, "owned_by": "local"}
        return web.json_response({"object": "list", "data": [model]})

    async def embeddings(self, request: web.Request) -> web.Response:
        """Answer with embeddings, as OpenAI's clients ask for them; a few texts at a time, so that
        searches have their turn.
        """
        model, width = self.index.model, self.index.snapshot.width
        asked = embeddings.read(await json_of(request), model=model, width=width)
        parts, num_tokens = [], 0
        for start in range(0, len(asked.texts), embeddings.AT_ONCE):
            texts = asked.texts[start : start + embeddings.AT_ONCE]
            vectors, count = await self.worker.run(functools.partial(self.index.embed, texts, asked.role))
            parts.append(vectors)
            num_tokens += count
        content = embeddings.answer(asked, np.concatenate(parts), model=model, num_tokens=num_tokens)
        return web.json_response(content)

    async def file(self, request: web.Request) -> web.Response:
        """Send a file of the page."""
        return web.Response(text=self.files[request.path], content_type=FILES[request.path][1])

    async def no_icon(self, request: web.Request) -> web.Response:
        """Say that the page has no icon."""
        return web.Response(status=204)


def check_sender(request: web.Request) -> None:
    """Raise Refused for a request that did not come to this machine's own name, as one of a page
    whose name was bound to this address, and for a question that a page of another site asks.
    """
    if not local_server.is_own_name(request.headers.get("Host", "")):
        raise Refused(403, local_server.WRONG_HOST)
    asker = request.headers.get("Sec-Fetch-Site", "none")  # as the browser says
    is_question = request.path in PARAMETERS or request.path.startswith(API)
    if is_question and asker not in ("none", "same-origin"):
        raise Refused(403, "this server answers its own page only, and programs on this machine")


def refusal(request: web.Request, status: int, message: str) -> web.Response:
    """Return what says in one line why there is no answer."""
    line = " ".join(message.splitlines())
    content = ApiError(status, line).content() if request.path.startswith(API) else {"error": line}
    return web.json_response(text=cli.json_line(content), status=status)


def serve(index: ServedIndex, listener: socket.socket, screen: Screen) -> NoReturn:
    """Serve an index until a signal comes, and say where. Raises Interrupted at the end."""
    number = asyncio.run(_serve(index, listener, screen))
    raise Interrupted(f"stopped by {signal.Signals(number).name}", 128 + number)


async def _serve(index: ServedIndex, listener: socket.socket, screen: Screen) -> int:
    came, folder = local_server.coming_signal(), str(index.snapshot.folder)
    async with running(index, listener):
        screen.say(f"serving {folder} at {local_server.address_of(listener)} (Ctrl-C ends)")
        screen.document({"index": folder, "address": local_server.address_of(listener)})
        sys.stdout.flush()
        return await came


@contextlib.asynccontextmanager
async def running(index: ServedIndex, listener: socket.socket) -> AsyncIterator[None]:
    """Answer requests within the block. At its end it takes no more of them, and what is being
    computed has some seconds.
    """
    worker, drawer = Worker(), Worker()

    async def finish() -> None:
        await asyncio.gather(*(asyncio.to_thread(one.close) for one in (worker, drawer)))

    app = Server(index, worker, drawer).app()
    async with local_server.answering(app, listener, finish, max_line_size=LINE_BYTES):
        yield
