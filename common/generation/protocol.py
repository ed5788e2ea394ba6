"""What a request of OpenAI's protocol may ask for, and what it means for the texts of its answer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

from common.api import ApiError, Parameter, number, only, texts_of, unsupported
from common.errors import UserError
from common.generation import language_model
from common.generation.completion import Prompt, Run
from common.generation.constraints import Constraints
from common.generation.language_model import LanguageModel
from common.generation.messages import Message, check_messages
from common.generation.sampling import Constraint, Settings

MOST_STOPS, MOST_LOGPROBS, MOST_PROMPTS = 16, 20, 64
MOST_CHOICES, MOST_PATTERN, MOST_SCHEMA = 256, 2000, 20_000  # texts, characters, characters


# What may be asked for ----------------------------------------------------------------------------


def is_bias(value: Any) -> bool:
    """Return whether a value is an object with a number from -100 to 100 for some ids of tokens."""
    return isinstance(value, dict) and all(
        re.fullmatch(r"\d{1,9}", name) and type(bias) in (int, float) and -100 <= bias <= 100
        for name, bias in value.items()
    )


def is_form(value: Any) -> bool:
    """Return whether a value is an object with choices or with an expression."""
    if not isinstance(value, dict) or len(value) != 1:
        return False
    if "choice" in value:
        choices = value["choice"]
        return isinstance(choices, list) and texts_of(choices, MOST_CHOICES) is not None
    pattern = value.get("regex")
    return isinstance(pattern, str) and 0 < len(pattern) <= MOST_PATTERN


def is_format(value: Any) -> bool:
    """Return whether a value is an object that asks for any text, for an object of JSON, or for
    JSON of a schema.
    """
    if value in ({"type": "text"}, {"type": "json_object"}):
        return True
    if (
        not isinstance(value, dict)
        or value.keys() != {"type", "json_schema"}
        or value["type"] != "json_schema"
    ):
        return False
    asked = value["json_schema"]
    kinds = {"name": str, "schema": dict}
    kinds |= {"description": (str, NoneType), "strict": (bool, NoneType)}
    return (
        isinstance(asked, dict)
        and {"name", "schema"} <= asked.keys() <= kinds.keys()
        and all(isinstance(content, kinds[name]) for name, content in asked.items())
        and len(json.dumps(asked["schema"])) <= MOST_SCHEMA
    )


FLAG = Parameter(lambda value: type(value) is bool, "true or false")
TEXT = Parameter(lambda value: isinstance(value, str), "a text")
AT_LEAST_1 = number(lambda value: 1 <= value < 2**31, "a whole number above 0", whole=True)
MANY = f"a whole number up to {MOST_LOGPROBS}"
FEW = number(lambda value: 0 <= value <= MOST_LOGPROBS, MANY, whole=True)
COMMON = {
    "model": TEXT,
    "max_tokens": AT_LEAST_1,
    "temperature": number(lambda value: value == 0 or 1e-6 <= value <= 1e6, "0, or a number from 1e-6"),
    "top_p": number(lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "top_k": number(lambda value: 0 <= value < 2**31, "a whole number of at least 0", whole=True),
    "min_p": number(lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1"),
    "repetition_penalty": number(lambda value: 1e-3 <= value <= 1e3, "a number from 0.001 to 1000"),
    "seed": number(lambda value: -(2**63) <= value < 2**63, "a whole number of 64 bits", whole=True),
    "stop": Parameter(
        lambda value: texts_of(value, MOST_STOPS) is not None,
        f"a text or up to {MOST_STOPS} texts, none of them empty",
    ),
    "stream": FLAG,
    "stream_options": Parameter(
        lambda value: (
            isinstance(value, dict)
            and value.keys() <= {"include_usage"}
            and all(type(flag) is bool for flag in value.values())
        ),
        'an object with "include_usage" of true or false',
    ),
    "user": TEXT,  # names the end user, and does not change the text
    "n": only(1),
    "presence_penalty": number(lambda value: -2 <= value <= 2, "a number from -2 to 2"),
    "frequency_penalty": number(lambda value: -2 <= value <= 2, "a number from -2 to 2"),
    "logit_bias": Parameter(is_bias, "an object of ids and numbers from -100 to 100"),
    "structured_outputs": Parameter(
        is_form,
        f'an object with "choice", a list of up to {MOST_CHOICES} texts, or "regex", a text of up to'
        f" {MOST_PATTERN:,} characters",
    ),
}
COMPLETION = COMMON | {
    "prompt": Parameter(
        lambda value: texts_of(value, MOST_PROMPTS) is not None,
        f"a text or up to {MOST_PROMPTS} texts, none of them empty",
    ),
    "logprobs": FEW,
    "best_of": only(1),
    "echo": only(False),
    "suffix": only(""),
}
CHAT = COMMON | {
    "messages": Parameter(lambda value: isinstance(value, list), "a list of messages"),
    "max_completion_tokens": AT_LEAST_1,
    "logprobs": FLAG,
    "top_logprobs": FEW,
    "response_format": Parameter(
        is_format,
        'an object with "type": "text", "json_object", or "json_schema" with "json_schema", an object of'
        f' "name" and "schema" of up to {MOST_SCHEMA:,} characters',
    ),
    "modalities": only(["text"]),
    "tools": only([]),
    "tool_choice": only("none", "auto"),
    "store": only(False),
}
CONSTRAINTS = ("structured_outputs", "response_format")  # what says which constraint a text has
DRAWING = ("temperature", "top_k", "top_p", "min_p")  # any of them given: not greedy


def plain_messages(messages: list[Any]) -> list[Message]:
    """Return the messages of a request as templates take them: the parts of a text joined, and a
    developer's message as that of the system. Raises ApiError for one that holds more than a text.
    """
    plain = []
    for position, message in enumerate(messages):
        place = f"messages[{position}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{place}: not an object with role and content", param=place)
        given = {name: value for name, value in message.items() if value not in (None, [])}
        if unknown := sorted(given.keys() - {"role", "content"}):
            raise unsupported(f"{place}.{unknown[0]}")
        content, role = given.get("content", ""), given.get("role")
        if isinstance(content, list):
            content = "".join(text_of_part(part, f"{place}.content") for part in content)
        plain.append({"role": "system" if role == "developer" else role, "content": content})
    try:
        return check_messages(plain, "messages")
    except UserError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error


def text_of_part(part: Any, place: str) -> str:
    """Return the text of a part of a message. Raises ApiError for an image, a sound or a file."""
    is_text = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
    if is_text and isinstance(part["text"], str):
        return part["text"]
    problem = f"{place}: only parts of text are read here"
    raise ApiError(400, problem, param=place, code="invalid_value")


# What it means ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How the answers of an address are written."""

    name: str  # of a whole answer, and of a piece of one
    piece_name: str
    id_prefix: str
    is_chat: bool


SHAPES = {
    "/v1/completions": Shape("text_completion", "text_completion", "cmpl", is_chat=False),
    "/v1/chat/completions": Shape("chat.completion", "chat.completion.chunk", "chatcmpl", is_chat=True),
}


def choose_settings(
    given: dict[str, Any], shape: Shape, run: Run, constraints: Constraints
) -> tuple[Settings, tuple[str, ...]]:
    """Return how the tokens of a request are chosen, and its stop strings: what it does not say is
    as the flags of the server say. Raises ApiError for what contradicts itself.
    """
    check_pairs(given)
    if "max_completion_tokens" in given:
        given["max_tokens"] = given.pop("max_completion_tokens")
    own = run.options.settings
    names = (*DRAWING, "repetition_penalty", "presence_penalty", "frequency_penalty")
    chosen: dict[str, Any] = {name: given[name] for name in names if name in given}
    if "logit_bias" in given:
        chosen["logit_bias"] = read_bias(given["logit_bias"], run.language_model)
    if "max_tokens" in given:
        chosen["max_new_tokens"] = given["max_tokens"]
    chosen["sample"] = own.sample or any(name in given for name in DRAWING)
    if given.get("temperature") == 0:  # greedy
        chosen |= {"sample": False, "temperature": 1.0}
    if shape.is_chat and run.chat is not None:
        chosen["end_ids"] = tuple(dict.fromkeys((*own.end_ids, *run.chat.end_ids)))
    settings, stops = replace(own, **chosen), read_stops(given, run)
    asked = [name for name in CONSTRAINTS if given.get(name, {"type": "text"}) != {"type": "text"}]
    if len(asked) > 1:
        raise ApiError(400, f"{' and '.join(asked)}: give one of them", param=asked[0])
    if asked:
        return replace(settings, constraint=make_constraint(given, asked[0], settings, constraints)), ()
    return settings, stops


def check_pairs(given: dict[str, Any]) -> None:
    """Raise ApiError for parameters that exclude each other, and for one without what it needs."""
    if "max_tokens" in given and "max_completion_tokens" in given:
        problem = "max_tokens and max_completion_tokens: give one of them"
        raise ApiError(400, problem, param="max_tokens")
    for name, needed in (("top_logprobs", "logprobs"), ("stream_options", "stream")):
        if name in given and not given.get(needed):
            raise ApiError(400, f"{name} needs {needed}: true", param=name)


def read_bias(given: dict[str, float], model: LanguageModel) -> tuple[tuple[int, float], ...]:
    """Return (id, number) for each token of a request's logit_bias. Raises ApiError for an id that
    the model does not have.
    """
    biases = tuple((int(token), float(bias)) for token, bias in given.items())
    if any(token >= model.vocabulary for token, _ in biases):
        most = model.vocabulary - 1
        problem = f"logit_bias: the ids of tokens go from 0 to {most}"
        raise ApiError(400, problem, param="logit_bias")
    return biases


def read_stops(given: dict[str, Any], run: Run) -> tuple[str, ...]:
    """Return the stop strings of a request, else those of the server. Raises ApiError for one that
    holds a special token.
    """
    stops = run.options.stops
    if "stop" in given:
        stops = tuple(texts_of(given["stop"], MOST_STOPS) or ())
    try:
        language_model.check_stops(list(stops), run.language_model)
    except UserError as error:
        raise ApiError(400, str(error), param="stop", code="invalid_value") from error
    return stops


def make_constraint(
    given: dict[str, Any], name: str, settings: Settings, constraints: Constraints
) -> Constraint:
    """Return the constraint that a parameter of a request asks for. Raises ApiError where it can't be."""
    asked = given[name]
    if "stop" in given:
        raise ApiError(400, f"stop and {name}: the text ends where its form does", param="stop")
    if settings.min_new_tokens or settings.no_repeat_ngram_size or settings.banned:
        problem = "this server forbids tokens that a form could need (--ban-words and such)"
        raise ApiError(400, f"{name}: {problem}", param=name)
    try:
        if "choice" in asked:
            return constraints.choices(asked["choice"], settings.end_ids)
        if "regex" in asked:
            return constraints.regex(asked["regex"], settings.end_ids)
        schema = asked["json_schema"]["schema"] if "json_schema" in asked else {"type": "object"}
        return constraints.json(schema, settings.end_ids)
    except UserError as error:
        problem = str(error).replace("--choices", "choice").replace("--regex", "regex")
        raise ApiError(400, f"{name}: {problem}", param=name, code="invalid_value") from error


def fit(settings: Settings, prompt: Prompt, is_given: bool, model: LanguageModel) -> Settings:
    """Return settings whose tokens fit into the context after a prompt: as many as were asked for,
    or fewer than the flags say. Raises ApiError where they do not.
    """
    room = settings.max_new_tokens
    if model.context is not None and not is_given:
        room = max(1, min(room, model.context - len(prompt.ids)))
    try:
        language_model.check_length(prompt.ids, room, model, name="the prompt")
    except UserError as error:
        problem = str(error).replace("--max-new-tokens", "max_tokens")
        raise ApiError(400, problem, param="max_tokens", code="context_length_exceeded") from error
    return replace(settings, max_new_tokens=room)
