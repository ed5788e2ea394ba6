"""Chat templates, rendered within limits of time and memory: how the conversations of a model are
written, and how its answers begin and end.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common import reading, sources
from common.cli import limit_memory
from common.errors import UserError, listed, note, one_line, outcome, without_errors
from common.generation.language_model import LanguageModel, check_characters
from common.generation.messages import Message, is_begun, system_in_question

if TYPE_CHECKING:  # importing it takes a second
    import jinja2
    from transformers import PreTrainedTokenizerBase

    from common.tokenizer import Tokenizer


# A template is a program by the model's author: it gets these seconds and characters for one
# conversation, and this much memory.
TEMPLATE_SECONDS, TEMPLATE_CHARACTERS, TEMPLATE_BYTES = 10, 10_000_000, 1 << 29
MARK = "THE-TEXT-ENDS-HERE "  # stands where a text ends, to find it again in what a template writes
# what every template is given; --template-option may name none of them
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


# Templates ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """A program in Jinja that writes a conversation as a text."""

    source: str
    name: str  # as messages call it
    special: dict[str, str] = field(default_factory=dict)  # role -> token: "eos_token" -> "</s>"
    options: dict[str, Any] = field(default_factory=dict)  # of --template-option


def choose_template(language_model: LanguageModel, wanted: str | None, options: dict[str, Any]) -> Template:
    """Return the model's own template, or the one that `wanted` names: one of several of the
    model's, or a file. Raises UserError if there is none.
    """
    tokenizer, name = language_model.tokenizer, language_model.name
    found = tokenizer.chat_template or {}
    sources_by_name = found if isinstance(found, dict) else {"default": found}
    special = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    if taken := [option for option in options if option in (*GIVEN, *special)]:
        raise UserError(f"--template-option {taken[0]}: every template is given it; leave it out")
    chosen = wanted or "default"
    if chosen in sources_by_name:
        return Template(sources_by_name[chosen], f"the template of {name}", special, options)
    if wanted is not None and sources.kind_of_path(wanted) == "file":
        text = "\n".join(reading.read_lines(wanted))
        return Template(text, f"the template {wanted}", special, options)
    has = f"it has {listed(sources_by_name)}" if sources_by_name else "it has none"
    if wanted is not None:
        problem = f"neither a template of {name} ({has}) nor a file"
        raise UserError(f"--chat-template {wanted}: {problem}; name one of these")
    if sources_by_name:
        problem = f"{name} has several chat templates ({has})"
        raise UserError(f"--chat: {problem}; name one with --chat-template")
    raise UserError(
        f"--chat: {name} has no chat template; leave --chat out, name a file with --chat-template,"
        " or a model that was trained for chats"
    )


def try_to_render(conversations: list[list[Message]], template: Template) -> list[str | UserError]:
    """Return the text of each conversation, up to where the next answer starts, or why the template does not
    write it; if the last message is an answer, that is its beginning, and the text ends with it.

    A child process renders them, because only the operating system can stop a template that
    computes `10 ** 10 ** 10`. Raises UserError when the template breaks a limit.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _render_and_exit(conversations, template, writer)
    os.close(writer)
    try:
        with open(reader, encoding="utf-8") as pipe:
            results = [json.loads(line) for line in pipe if line.endswith("\n")]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if len(results) < len(conversations):
        limits = f"{TEMPLATE_SECONDS} seconds, {TEMPLATE_BYTES >> 20} MiB, "
        limits += f"{TEMPLATE_CHARACTERS:,} characters"
        raise _failure(template, f"it breaks a limit ({limits})", conversations[len(results)])
    return [
        result["text"] if "text" in result else _failure(template, result["reason"], messages)
        for messages, result in zip(conversations, results)
    ]


def _failure(template: Template, reason: str, messages: list[Message]) -> UserError:
    """Return the error that a template does not write a conversation, with the reason and what may help."""
    helps = {
        "leave --system out": messages[0]["role"] == "system",
        "leave --prefill out": is_begun(messages),
        "correct --template-option": bool(template.options),
    }
    given = [text for text, is_given in helps.items() if is_given]
    advice = ", ".join([*given, "or name another model"])
    return UserError(f"--chat: {template.name} fails: {reason}; {advice.removeprefix('or ')}")


def _render_and_exit(conversations: list[list[Message]], template: Template, writer: int) -> None:
    """Write a line of JSON for each conversation into a pipe, and end this process, to which the limits of a
    template apply.
    """
    # collecting a model that is garbage would stop its threads, which a fork does not copy
    gc.freeze()
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        limit_memory(TEMPLATE_BYTES)
        with open(writer, "w", encoding="utf-8") as pipe:
            for conversation in conversations:
                signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS)  # SIGALRM ends this process
                pipe.write(json.dumps(_render(conversation, template)) + "\n")
    finally:
        os._exit(0)


def _render(conversation: list[Message], template: Template) -> dict[str, str]:
    """Return the text of a conversation, or the reason why the template gives none."""
    *before, last = conversation
    goes_on = is_begun(conversation)
    if goes_on:
        conversation = [*before, {**last, "content": last["content"] + MARK}]
    try:
        environment = make_environment()
        if unknown := unread_options(template, environment):
            return {"reason": unknown}
        given = dict(zip(GIVEN, (conversation, None, None, not goes_on)))
        text = environment.from_string(template.source).render(
            **given, **template.special, **template.options
        )
    except Exception as error:  # of the template, which can raise any
        return {"reason": one_line(error)}
    if len(text) > TEMPLATE_CHARACTERS:
        return {"reason": f"it writes {len(text):,} characters"}
    return cut_at_mark(text, last["content"]) if goes_on else {"text": text}


def cut_at_mark(text: str, begun: str) -> dict[str, str]:
    """Return the part of a text that ends with an answer that is begun, which the mark follows; the
    spaces at its end stay only where the template leaves them.
    """
    place = text.rfind(MARK.rstrip())
    if place < 0 or not text[:place].rstrip().endswith(begun.strip()):
        return {"reason": "it does not write the beginning of an answer as it is"}
    keeps_spaces = text.startswith(MARK, place)
    return {"text": text[:place] if keeps_spaces else text[:place].rstrip()}


def unread_options(template: Template, environment: jinja2.Environment) -> str:
    """Return the message that a template does not read one of its options, "" if it reads all."""
    import jinja2.meta

    if not template.options:
        return ""
    read = jinja2.meta.find_undeclared_variables(environment.parse(template.source))
    unread = [name for name in template.options if name not in read]
    known = listed(sorted(read - {*GIVEN, *template.special, *environment.globals})) or "no options"
    return f"it does not read {unread[0]!r}; it reads {known}" if unread else ""


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Return a value as JSON, in which jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def raise_exception(message: str) -> None:
    """End a template that refuses a conversation, with its reason."""
    import jinja2.exceptions

    raise jinja2.exceptions.TemplateError(message)


def make_environment() -> jinja2.Environment:
    """Return what compiles chat templates as transformers does: in a sandbox that lets them change
    nothing, with the few functions that such templates use.
    """
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks the answers for a training, changes no text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("show"), [], [], body).set_lineno(line)

        def show(self, caller: Any) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Variables of a template, none of which may hide a part of Python."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                problem = f"a name that begins with an underscore: {name}"
                raise jinja2.exceptions.SecurityError(problem)
            super().__setitem__(name, value)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    functions: dict[str, Any] = environment.globals
    functions["raise_exception"] = raise_exception
    functions["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    functions["dict"] = lambda *args, **named: dict(*args, **named)
    functions["namespace"] = Namespace
    return environment


# How a model's conversations are written ----------------------------------------------------------


@dataclass(frozen=True)
class ChatFormat:
    """How the conversations of a model are written, and how its answers begin and end."""

    language_model: LanguageModel
    template: Template
    prefill: str = ""  # how each answer begins
    takes_system: bool = True  # False: the system text goes before the first question
    end_ids: tuple[int, ...] = ()  # each of them ends an answer

    def encode(self, messages: list[Message]) -> list[int]:
        """Return the token ids of a conversation, up to where its answer starts or goes on. Raises
        UserError if the template refuses it or breaks a limit.
        """
        [ids] = without_errors(self.try_to_encode([messages], ["the conversation"]))
        return ids

    def try_to_encode(
        self, conversations: list[list[Message]], names: list[str]
    ) -> list[list[int] | UserError]:
        """Return the token ids of conversations, or why one has none; errors call them by `names`.

        The template writes all special tokens itself; if the tokenizer added its own, the text
        would start with two. Raises UserError if it breaks a limit.
        """
        return [
            text if isinstance(text, UserError) else outcome(self._tokens, text, name)
            for text, name in zip(self.write(conversations, names), names)
        ]

    def write(self, conversations: list[list[Message]], names: list[str]) -> list[str | UserError]:
        """Return the texts of conversations, or why one has none; it raises as `try_to_encode`."""
        begun = [name for name, given in zip(names, conversations) if is_begun(given)]
        if self.prefill and begun:
            problem = f"{begun[0]} ends with an answer that is begun"
            raise UserError(f"--prefill: {problem}; leave one of them out")
        return try_to_render([self._as_written(given) for given in conversations], self.template)

    def _tokens(self, text: str, name: str) -> list[int]:
        check_characters(text, self.language_model, name=name)
        return self.language_model.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _as_written(self, messages: list[Message]) -> list[Message]:
        """Return messages as the template takes them, with the beginning of the answer."""
        messages = messages if self.takes_system else system_in_question(messages)
        begun = [{"role": "assistant", "content": self.prefill}] if self.prefill else []
        return [*messages, *begun]

    def note_system(self) -> None:
        """Say where a system text goes, if the template takes none."""
        if not self.takes_system:
            where = "the system text goes before the first question, and an empty line follows"
            note(f"note: {self.template.name} takes no system message: {where}")


def read_format(
    language_model: LanguageModel, *, wanted: str | None, options: dict[str, Any], prefill: str
) -> ChatFormat:
    """Return how the conversations of a model are written. What its template does is seen from what
    it writes. Raises UserError if there is no template, or if it can't write a question.
    """
    template = choose_template(language_model, wanted, options)
    ask = {"role": "user", "content": "?"}
    system, said = {"role": "system", "content": MARK}, {"role": "assistant", "content": MARK}
    question, with_system, turns = [ask], [system, ask], [ask, said, ask]
    without_errors(try_to_render([question], template))
    # a template may refuse both, and still write questions
    written = [
        "" if isinstance(result, UserError) else result
        for result in try_to_render([with_system, turns], template)
    ]
    tokenizer = language_model.tokenizer
    ends = (tokenizer.eos_token_id, token_after_turn(written[1], tokenizer))
    known = range(language_model.vocabulary)
    possible = [number for number in ends if number is not None and number in known]
    end_ids = tuple(dict.fromkeys((*language_model.end_ids, *possible)))
    return ChatFormat(language_model, template, prefill, MARK.strip() in written[0], end_ids)


def token_after_turn(text: str, tokenizer: PreTrainedTokenizerBase | Tokenizer) -> int | None:
    """Return the token that a template writes after an answer, which is the mark, or before the
    next question; None if it writes none.
    """
    _, _, after = text.rpartition(MARK.strip())
    after = after.lstrip()
    tokens = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    longest = max(filter(after.startswith, tokens), key=len, default=None)
    return None if longest is None else tokens[longest]
