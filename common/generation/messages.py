"""Conversations as lists of messages: checked, with a system message, begun answers."""

from __future__ import annotations

from typing import Any

from common.errors import UserError

Message = dict[str, str]  # {"role": "user", "content": "Why is the sky blue?"}
ROLES = ("system", "user", "assistant")


def as_conversation(given: str | list[Message], system: str | None) -> list[Message]:
    """Return a question or a conversation as one that begins with a system message, if there is
    one; its own goes before `system`.
    """
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def is_begun(messages: list[Message]) -> bool:
    """Return whether a conversation ends with an answer, which is then to go on."""
    return messages[-1]["role"] == "assistant"


def system_in_question(messages: list[Message]) -> list[Message]:
    """Return messages without their system message, whose text is put before the first question."""
    first, *rest = messages
    if first["role"] != "system" or not rest or rest[0]["role"] != "user":
        return messages
    text = f"{first['content']}\n\n{rest[0]['content']}"
    return [{"role": "user", "content": text}, *rest[1:]]


def check_messages(value: Any, name: str) -> list[Message]:
    """Return the messages of a conversation; raise UserError, naming it, for any other value."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{name}: a conversation is a list of messages with role and content")
    for number, message in enumerate(value, start=1):
        place = f"{name}, message {number}"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise UserError(f"{place}: a message has role and content, and no more; correct it")
        if message["role"] not in ROLES:
            role = message["role"]
            raise UserError(f"{place}: the role is {role!r:.60}; use {', '.join(ROLES)}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise UserError(f"{place}: the content is no text, or empty; write something")
        if message["role"] == "system" and number > 1:
            raise UserError(f"{place}: a system message comes first; move it")
    if value[-1]["role"] == "system":
        raise UserError(f"{name}: nothing follows the system message; add a question")
    return value
