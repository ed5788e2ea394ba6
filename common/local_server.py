"""A server that this machine alone reaches: its socket, whom it answers, how it begins and ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from common.cli import stop_signals
from common.errors import UserError

if TYPE_CHECKING:
    from aiohttp import web

HOST = "127.0.0.1"
OWN_NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")  # in an honest header Host
WRONG_HOST = f"this server answers to {HOST} and localhost only"
SECONDS_TO_FINISH = 10.0  # for what is being computed when a signal comes


def bind(port: int) -> socket.socket:
    """Return a socket at a port of this machine, 0 being any free one. Raises UserError where it is
    taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        raise UserError(
            f"--port {port}: {error.strerror}; name another port, or 0 for any free one"
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the address of a socket as a browser takes it."""
    return f"http://{HOST}:{listener.getsockname()[1]}"


def is_own_name(host: str) -> bool:
    """Tell whether the header Host names this machine: that of a page whose name was bound to this
    address does not.
    """
    return OWN_NAMES.fullmatch(host) is not None


def coming_signal() -> asyncio.Future[int]:
    """Return what will be the number of the first signal that asks this process to stop; a second one
    ends it at once.
    """
    loop = asyncio.get_running_loop()
    came: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if came.done():
            os._exit(128 + number)
        came.set_result(number)

    for number in stop_signals():
        loop.add_signal_handler(number, stop, number)
    return came


@contextlib.asynccontextmanager
async def answering(
    app: web.Application, listener: socket.socket, finish: Callable[[], Awaitable[object]], **options: Any
) -> AsyncIterator[None]:
    """Answer requests within the block. At its end no more are taken, and `finish` ends what is
    being computed.
    """
    from aiohttp import web

    # a client that leaves cancels its handler
    options |= {"handler_cancellation": True, "access_log": None, "shutdown_timeout": 1.0}
    runner = web.AppRunner(app, **options)
    await runner.setup()
    site = web.SockSite(runner, listener)
    await site.start()
    try:
        yield
    finally:
        await site.stop()
        await finish()
        await runner.cleanup()
