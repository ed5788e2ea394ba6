"""Embeddings for other programs, as OpenAI's clients ask for them: what a request may hold, and its
answer.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common import sources
from common.api import ApiError, Parameter, check_parameters, number, texts_of
from common.errors import UserError, shorten

MOST_TEXTS = 2_048  # of a request, as at OpenAI
AT_ONCE = 32  # texts encoded before it is the turn of another request
PARAMETERS = {
    "input": Parameter(
        lambda value: texts_of(value, MOST_TEXTS) is not None,
        f"a text or a list of up to {MOST_TEXTS:,} texts, none of them empty",
    ),
    "model": Parameter(lambda value: isinstance(value, str), "the name of the model"),
    "encoding_format": Parameter(lambda value: value in ("float", "base64"), "float or base64"),
    "dimensions": number(lambda value: value > 0, "a whole number above 0", whole=True),
    "input_type": Parameter(lambda value: value in ("query", "document"), "query or document"),
    "user": Parameter(lambda value: isinstance(value, str), "a text"),  # changes nothing
}


@dataclass(frozen=True)
class EmbeddingRequest:
    """Texts to encode in a role, and how the answer is written."""

    texts: list[str]
    role: str
    width: int
    as_base64: bool


def read(body: Any, *, model: str, width: int) -> EmbeddingRequest:
    """Return what a request asks for from the model of this name, whose embeddings have `width` dimensions.
    Raises ApiError for what can't be answered.
    """
    given = check_parameters(body, PARAMETERS, "model", "input")
    if given["model"] != model:
        problem = f"there is no model {shorten(repr(given['model']), 60)}; {model!r} is served"
        raise ApiError(404, problem, param="model", code="model_not_found")
    wanted = given.get("dimensions", width)
    if wanted > width:
        problem = f"dimensions: the embeddings have {width}, not {wanted:,}; ask for fewer"
        raise ApiError(400, problem, param="dimensions", code="invalid_value")
    texts = texts_of(given["input"], MOST_TEXTS) or []
    try:
        for position, text in enumerate(texts):
            sources.check_query(text, f"input[{position}]")
    except UserError as error:
        raise ApiError(400, str(error), param="input", code="invalid_value") from error
    as_base64 = given.get("encoding_format") == "base64"
    return EmbeddingRequest(texts, given.get("input_type", "document"), wanted, as_base64)


def answer(asked: EmbeddingRequest, vectors: np.ndarray, *, model: str, num_tokens: int) -> dict[str, Any]:
    """Return the answer to a request. `vectors`: the embeddings (texts, dimensions) at norm 1, of
    which the first numbers are kept and brought to norm 1 again. Raises ApiError for one that is NaN.
    """
    kept = vectors[:, : asked.width]
    if asked.width < vectors.shape[1]:
        kept = kept / np.linalg.norm(kept, axis=1, keepdims=True)
    for position in np.flatnonzero(~np.isfinite(kept).all(1)):
        problem = f"input[{position}]: its embedding has norm zero, NaN or infinity; reword it"
        raise ApiError(400, problem, param="input", code="invalid_value")
    written = kept.astype("<f4")
    data = [
        {"object": "embedding", "index": index, "embedding": _written(row, as_base64=asked.as_base64)}
        for index, row in enumerate(written)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _written(row: np.ndarray, *, as_base64: bool) -> str | Sequence[float]:
    return base64.b64encode(row.tobytes()).decode() if as_base64 else row.tolist()
