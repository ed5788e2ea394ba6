"""A server on this machine that speaks OpenAI's protocol: /v1/models, /v1/completions and
/v1/chat/completions, also as streams.

Requests wait in a bounded queue. One thread takes those that wait, as many as fit into a batch, and decodes
them together (engine.py). Each text has its own sampler, random numbers and end, so that it is the same as on
the command line and does not depend on its neighbours, except for how sums are rounded.

What a request can't do: reach the server from another machine or from a page in a browser, name a
file, or ask for something that is not done and be answered as if it were.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import secrets
import socket
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

# a child process writes each chat by its template: what it imports is imported here, because
# importing is not safe in the child of a process with threads
import jinja2.ext
import jinja2.meta
import jinja2.sandbox  # noqa: F401
from aiohttp import web

from common import local_server
from common.api import BODY_BYTES, ApiError, check_parameters, json_of, texts_of
from common.errors import UserError, fault_of_system, shorten
from common.generation import language_model
from common.generation.completion import REPLACEMENT, Completion, Prompt, Run, TextStream
from common.generation.constraints import Constraints
from common.generation.engine import Engine, Job, Limits, Piece
from common.generation.protocol import (
    CHAT,
    COMPLETION,
    MOST_PROMPTS,
    SHAPES,
    Shape,
    choose_settings,
    fit,
    plain_messages,
)
from common.generation.sampling import Settings

KEY_VARIABLE = "GENERATE_API_KEY"

USAGE = web.RequestKey("usage", dict)  # the tokens of a request, for its line
Send = Callable[[dict[str, Any]], Awaitable[None]]  # an event of a stream


# Requests -----------------------------------------------------------------------------------------


class Asked:
    """A request, its texts, and how they are sent."""

    def __init__(self, given: dict[str, Any], shape: Shape, model_name: str) -> None:
        self.given, self.shape, self.model_name = given, shape, model_name
        self.identity = f"{shape.id_prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.jobs: list[Job] = []
        self.pieces: list[list[Piece]] = []  # of each text, so far
        self.events: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def tell(self, number: int, event: Piece | Exception) -> None:
        """Take a piece of a text from the thread that generates."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever asked
            self.loop.call_soon_threadsafe(self.events.put_nowait, (number, event))

    def add_jobs(self, prompts: list[Prompt], settings: Settings, stops: tuple[str, ...], run: Run) -> None:
        """Make a job of each prompt. Raises ApiError for what does not fit into the model."""
        for number, prompt in enumerate(prompts):
            row = Completion(prompt, 0, TextStream(run.language_model.tokenizer, stops, prompt.ids))
            fitting = fit(settings, prompt, "max_tokens" in self.given, run.language_model)
            seed = self.given.get("seed", secrets.randbits(32))
            self.jobs.append(Job(number, row, fitting, seed, self.num_logprobs, self.tell))
            self.pieces.append([])

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported with each token; None: no log-probabilities."""
        if not self.shape.is_chat:
            return self.given.get("logprobs")
        return self.given.get("top_logprobs", 0) if self.given.get("logprobs") else None

    def usage(self) -> dict[str, int]:
        """Return how many tokens were read and written; an end token is counted."""
        prompt = sum(len(job.row.prompt.ids) for job in self.jobs)
        new = sum(len(job.row.token_ids) for job in self.jobs)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def whole(self) -> dict[str, Any]:
        """Return the answer, when all texts have ended."""
        choices = []
        for job, pieces in zip(self.jobs, self.pieces):
            said = {"message": {"role": "assistant", "content": job.row.text, "refusal": None}}
            content = said if self.shape.is_chat else {"text": job.row.text}
            choices.append(self._choice(job, content, pieces, has_ended=True))
        return {**self._head(self.shape.name), "choices": choices, "usage": self.usage()}

    def chunks(self, job: Job, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a stream for a piece."""
        if piece.text or piece.logprobs or (piece.is_last and not self.shape.is_chat):
            text = piece.text
            content = {"delta": {"content": text}} if self.shape.is_chat else {"text": text}
            ends_here = piece.is_last and not self.shape.is_chat
            yield self._chunk([self._choice(job, content, [piece], has_ended=ends_here)])
        if piece.is_last and self.shape.is_chat:
            yield self._chunk([self._choice(job, {"delta": {}}, [], has_ended=True)])

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """Yield what a stream begins with: in a chat, who speaks."""
        for job in self.jobs if self.shape.is_chat else ():
            content = {"delta": {"role": "assistant", "content": ""}}
            yield self._chunk([self._choice(job, content, [], has_ended=False)])

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """Yield what a stream ends with: how many tokens there were, if that was asked for."""
        if self.given.get("stream_options", {}).get("include_usage"):
            yield {**self._chunk([]), "usage": self.usage()}

    def _head(self, name: str) -> dict[str, Any]:
        about = {"created": self.created, "model": self.model_name}
        return {"id": self.identity, "object": name, **about}

    def _chunk(self, choices: list[dict]) -> dict[str, Any]:
        return {**self._head(self.shape.piece_name), "choices": choices}

    def _choice(self, job: Job, content: dict, pieces: list[Piece], *, has_ended: bool) -> dict[str, Any]:
        reason = "length" if job.row.finish_reason == "length" else "stop"
        return {
            "index": job.number,
            **content,
            "finish_reason": reason if has_ended else None,
            "logprobs": None if self.num_logprobs is None else self._logprobs(pieces),
        }

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any]:
        entries = [(piece.offset, entry) for piece in pieces for entry in piece.logprobs]
        if self.shape.is_chat:
            return {"content": [chat_entry(entry) for _, entry in entries], "refusal": None}
        return {
            "tokens": [entry["token"] for _, entry in entries],
            "token_logprobs": [entry["logprob"] for _, entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top"]} for _, entry in entries],
            "text_offset": [offset for offset, _ in entries],
        }


def chat_entry(entry: dict) -> dict[str, Any]:
    """Return the log-probability of a token as a chat reports it; of a part of a character, the bytes are not
    known.
    """

    def own(token: dict) -> dict[str, Any]:
        text = token["token"]
        known = None if REPLACEMENT in text else [*text.encode()]
        return {"token": text, "logprob": token["logprob"], "bytes": known}

    return {**own(entry), "top_logprobs": [own(token) for token in entry["top"]]}


# The server ---------------------------------------------------------------------------------------


class Server:
    """The handlers of all addresses."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.run, self.engine, self.limits, self.name = engine.run, engine, engine.limits, name
        self.started = int(time.time())
        self.encoding = asyncio.Lock()  # one request at a time
        self.constraints = Constraints(self.run.language_model)

    def app(self) -> web.Application:
        """Return what answers requests."""
        app = web.Application(middlewares=[self.answer_errors], client_max_size=BODY_BYTES)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{name:.+}", self.model)
        for path in SHAPES:
            app.router.add_post(path, self.generate)
        return app

    @web.middleware
    async def answer_errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Check who asks, answer what goes wrong as JSON, and write a line about each request."""
        began, status = time.perf_counter(), 499  # the client has left
        try:
            try:
                self.check_sender(request)
                response = await handler(request)
            except ApiError as error:
                response = web.json_response(error.content(), status=error.status)
            except web.HTTPException as error:
                known = ApiError(
                    error.status, f"{error.reason}: {request.method} {shorten(request.path, 60)}"
                )
                if error.status == 413:
                    problem = f"the body has more than {BODY_BYTES:,} bytes"
                    known = ApiError(413, problem, code="too_large")
                response = web.json_response(known.content(), status=error.status)
            status = response.status
            return response
        except Exception:  # a bug, which ends this request and not the server
            traceback.print_exc()
            status = 500
            return web.json_response(
                ApiError(500, "a fault of the server; see what it wrote").content(), status=500
            )
        finally:
            tokens = ""
            if counted := request.get(USAGE):
                sizes = counted["prompt_tokens"], counted["completion_tokens"]
                tokens = f", {sizes[0]} + {sizes[1]} tokens"
            line = f"{request.method} {shorten(request.path, 60)} {status}{tokens}"
            print(f"{line}, {time.perf_counter() - began:.2f} s", file=sys.stderr, flush=True)

    def check_sender(self, request: web.Request) -> None:
        """Raise ApiError for a request that did not come to this machine's own name, as one of a
        page whose name was bound to this address, and for one without the key.
        """
        if not local_server.is_own_name(request.headers.get("Host", "")):
            raise ApiError(403, local_server.WRONG_HOST, code="wrong_host")
        if self.limits.api_key is not None:
            wanted = f"Bearer {self.limits.api_key}"
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(wanted.encode(), given.encode(errors="replace")):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def health(self, request: web.Request) -> web.Response:
        """Say that the model is loaded."""
        return web.json_response({"status": "ok"})

    async def models(self, request: web.Request) -> web.Response:
        """List the one model."""
        return web.json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request) -> web.Response:
        """Describe the model, if it is asked for by its name."""
        self.check_model(request.match_info["name"])
        return web.json_response(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "local"}

    def check_model(self, name: str) -> None:
        """Raise ApiError for another model than the one that is served."""
        if name != self.name:
            problem = f"there is no model {shorten(repr(name), 60)}; {self.name!r} is served"
            raise ApiError(404, problem, param="model", code="model_not_found")

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Answer a request for texts. Where its client leaves or its time is up, they end."""
        until = asyncio.get_running_loop().time() + self.limits.seconds
        asked = None
        try:
            async with asyncio.timeout_at(until):
                asked = await self.read(request)
                self.engine.submit(asked.jobs)
                if not asked.given.get("stream"):
                    await self.collect(asked, None)
                    return web.json_response(asked.whole())
            return await self.stream(request, asked, until)
        except TimeoutError as error:
            raise self._time_is_up() from error
        finally:
            for job in asked.jobs if asked is not None else ():
                job.is_wanted = False
            if asked is not None:
                request[USAGE] = asked.usage()

    def _time_is_up(self) -> ApiError:
        problem = f"a request may take {self.limits.seconds:g} seconds; lower max_tokens"
        return ApiError(504, problem, code="timeout")

    async def read(self, request: web.Request) -> Asked:
        """Return a request with its jobs. Raises ApiError for one that can't be answered."""
        body = await json_of(request)
        shape = SHAPES[request.path]
        known, content = (CHAT, "messages") if shape.is_chat else (COMPLETION, "prompt")
        given = check_parameters(body, known, "model", content)
        self.check_model(given["model"])
        asked = Asked(given, shape, self.name)
        async with self.encoding:  # a form takes a while, as a long prompt does
            chosen = await asyncio.to_thread(choose_settings, given, shape, self.run, self.constraints)
        asked.add_jobs(await self.encode(given, shape), *chosen, self.run)
        return asked

    async def encode(self, given: dict[str, Any], shape: Shape) -> list[Prompt]:
        """Return the prompts of a request with their tokens, which take a while in a long one.
        Raises ApiError for one that can't be used.
        """
        try:
            async with self.encoding:
                return await asyncio.to_thread(self._encode, given, shape)
        except UserError as error:
            name = "messages" if shape.is_chat else "prompt"
            raise ApiError(400, str(error), param=name, code="invalid_value") from error

    def _encode(self, given: dict[str, Any], shape: Shape) -> list[Prompt]:
        model, chat = self.run.language_model, self.run.chat
        if not shape.is_chat:
            texts = texts_of(given["prompt"], MOST_PROMPTS) or []
            all_ids = [language_model.encode_prompt(text, model, name="prompt") for text in texts]
            numbered = enumerate(zip(texts, all_ids))
            return [Prompt(number, text, ids) for number, (text, ids) in numbered]
        if chat is None:
            raise UserError(f"{self.name} has no chat template; use /v1/completions")
        messages = plain_messages(given["messages"])
        return [Prompt(0, messages[-1]["content"], chat.encode(messages))]

    async def stream(self, request: web.Request, asked: Asked, until: float) -> web.StreamResponse:
        """Send the texts piece by piece, as server-sent events."""
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)

        async def send(content: dict[str, Any] | str) -> None:
            text = content if isinstance(content, str) else json.dumps(content)
            await response.write(f"data: {text}\n\n".encode())

        try:
            try:
                async with asyncio.timeout_at(until):
                    for chunk in asked.first_chunks():
                        await send(chunk)
                    await self.collect(asked, send)
                    for chunk in asked.last_chunks():
                        await send(chunk)
                    await send("[DONE]")
            except TimeoutError as error:
                if request.transport is not None and request.transport.get_write_buffer_size():
                    request.transport.abort()  # it does not read what it is sent
                raise self._time_is_up() from error
        except ApiError as error:  # the status is sent already
            with contextlib.suppress(ConnectionError):
                await send(error.content())
        except ConnectionError:  # the client has left
            pass
        return response

    async def collect(self, asked: Asked, send: Send | None) -> None:
        """Take the pieces of all texts until they have ended, and send each. Raises ApiError if one
        can't be generated.
        """
        num_running = len(asked.jobs)
        while num_running:
            number, event = await asked.events.get()
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, Exception):
                is_known = isinstance(event, UserError)
                raise ApiError(
                    500, str(event) if is_known else fault_of_system(event) or "a bug of the server"
                )
            asked.pieces[number].append(event)
            num_running -= event.is_last
            if send is not None:
                for chunk in asked.chunks(asked.jobs[number], event):
                    await send(chunk)


def key_from_environment() -> str | None:
    """Return the key that requests must give, None for none: on the command line, every user of
    this machine could read it. Raises UserError for an empty one.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key is not None and not key.strip():
        advice = "set it, or unset the variable for no key"
        raise UserError(f"{KEY_VARIABLE}: the key is empty; {advice}")
    return key


def served_name(model: str) -> str:
    """Return the name of a model as requests give it: without the folders of this machine."""
    if os.path.exists(model):
        return os.path.basename(os.path.normpath(model))
    return model.removeprefix("bundled/")


def serve(run: Run, limits: Limits, listener: socket.socket) -> int:
    """Serve a model until a signal comes, and return its number."""
    return asyncio.run(_serve(Engine(run, limits), listener))


async def _serve(engine: Engine, listener: socket.socket) -> int:
    came = local_server.coming_signal()
    async with running(engine, listener) as name:
        print(f"serving {name} at {local_server.address_of(listener)}/v1 (Ctrl-C ends)", flush=True)
        return await came


@contextlib.asynccontextmanager
async def running(engine: Engine, listener: socket.socket) -> AsyncIterator[str]:
    """Answer requests within the block, in which the server has a name. At its end it takes no more
    of them, and those that are being answered have some seconds.
    """
    name = served_name(engine.model.name)

    async def finish() -> None:
        engine.close()
        await asyncio.to_thread(engine.thread.join, local_server.SECONDS_TO_FINISH)
        engine.drop()

    async with local_server.answering(Server(engine, name).app(), listener, finish):
        yield name
