"""A request of OpenAI's protocol: its JSON, its parameters, and how it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import shorten

if TYPE_CHECKING:
    from aiohttp import web

BODY_BYTES = 4 << 20  # of a request to an API; a context of 100,000 tokens has about a tenth of it


class ApiError(Exception):
    """A request that is refused, as OpenAI's clients read it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def content(self) -> dict[str, Any]:
        """Return the error as JSON takes it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        about = {"param": self.param, "code": self.code}
        return {"error": {"message": str(self), "type": kind, **about}}


async def json_of(request: web.Request) -> Any:
    """Return the content of a request. Raises ApiError where it is no JSON, which also is what a
    page of another site can't send unasked, and for half of a character: JavaScript cuts them.
    """
    if request.content_type != "application/json":
        raise ApiError(415, "the Content-Type is not application/json")
    body = await request.read()
    try:
        content = json.loads(body, parse_constant=_refuse_constant)
        if b"\\u" in body:
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        problem = "a lone surrogate (\\ud800 to \\udfff) in the body is no character"
        raise ApiError(400, f"{problem}; send whole characters", code="invalid_value") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON in UTF-8") from error
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# Parameters ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """A parameter of a request: what it may be."""

    accepts: Callable[[Any], bool]
    wanted: str


def number(accepts: Callable[[Any], bool], wanted: str, *, whole: bool = False) -> Parameter:
    """Return a parameter that is a number; true and false are none."""
    kinds = (int,) if whole else (int, float)
    return Parameter(lambda value: type(value) in kinds and accepts(value), wanted)


def only(*values: Any) -> Parameter:
    """Return a parameter of OpenAI's protocol that is taken only where it changes nothing."""
    wanted = f"only {' or '.join(map(json.dumps, values))}, since nothing else is done here"

    def accepts(value: Any) -> bool:
        return any(value == one and type(value) is type(one) for one in values)

    return Parameter(accepts, wanted)


def texts_of(value: Any, most: int) -> list[str] | None:
    """Return a text or a list of up to `most` texts as a list, None for anything else."""
    texts = [value] if isinstance(value, str) else value
    is_list = isinstance(texts, list) and 1 <= len(texts) <= most
    return texts if is_list and all(isinstance(text, str) and text for text in texts) else None


def check_parameters(body: Any, known: dict[str, Parameter], *needed: str) -> dict[str, Any]:
    """Return the parameters that a request gives; one that is null is not given. Raises ApiError
    for one that is unknown, for a value that can't be taken, and where one of `needed` is missing.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not an object of JSON")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            raise unsupported(name)
        if not known[name].accepts(value):
            shown, wanted = shorten(json.dumps(value), 60), known[name].wanted
            problem = f"{name}: {shown} can't be used; give {wanted}"
            raise ApiError(400, problem, param=name, code="invalid_value")
    for name in needed:
        if name not in given:
            raise ApiError(400, f"{name} is missing; give it", param=name, code="missing_parameter")
    return given


def unsupported(name: str) -> ApiError:
    """Return that a parameter is not known here."""
    shown = shorten(name, 80)
    problem = f"{shown}: unknown or unsupported here, and nothing is ignored; leave it out"
    return ApiError(400, problem, param=shown, code="unsupported_parameter")
