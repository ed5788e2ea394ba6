"""Conversations: chat templates, rendered within limits of time and memory, and a chat that keeps
its cache from turn to turn.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError, one_line
from common.generation import decoding
from common.generation.completion import Completion, Prompt, Run, TextStream
from common.generation.decoding import Batch
from common.generation.language_model import LanguageModel, check_characters, check_length
from common.generation.sampling import batch_seed

if TYPE_CHECKING:  # importing it takes a second
    import jinja2
    from transformers import PreTrainedTokenizerBase

    from common.generation.decoding import Cache
    from common.tokenizer import Tokenizer

Message = dict[str, str]  # {"role": "user", "content": "Why is the sky blue?"}

# A template is a program by the model's author: it gets these seconds and characters for one
# conversation, and this much memory.
TEMPLATE_SECONDS, TEMPLATE_CHARACTERS, TEMPLATE_BYTES = 10, 10_000_000, 1 << 29


# Templates ----------------------------------------------------------------------------------------


def encode_chats(conversations: list[list[Message]], language_model: LanguageModel) -> list[list[int]]:
    """Return the token ids of conversations in the model's own template, each up to where its
    answer starts.

    The template writes all special tokens itself; if the tokenizer added its own, the text would
    start with two. Raises UserError if there is no template, if it refuses the messages, or if it
    breaks a limit.
    """
    tokenizer = language_model.tokenizer
    if not tokenizer.chat_template:
        raise UserError(
            f"--chat: {language_model.name} has no chat template; leave --chat out, or name a "
            "model that was trained for chats"
        )
    texts = render(conversations, tokenizer, name=language_model.name)
    for number, text in enumerate(texts, start=1):
        check_characters(text, language_model, name=f"conversation {number}")
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def question(text: str, system: str | None) -> list[Message]:
    """Return a conversation of one question, after a system message if there is one."""
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": text}]


def render(
    conversations: list[list[Message]], tokenizer: PreTrainedTokenizerBase | Tokenizer, *, name: str
) -> list[str]:
    """Return the texts of conversations as the tokenizer's template writes them.

    A child process renders them, because only the operating system can stop a template that
    computes `10 ** 10 ** 10`. Raises UserError, naming the model, when the template raises an
    exception or breaks a limit.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _render_and_exit(conversations, tokenizer, writer)
    os.close(writer)
    try:
        with open(reader, encoding="utf-8") as pipe:
            answers = [json.loads(line) for line in pipe if line.endswith("\n")]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    reasons = [answer["reason"] for answer in answers if "reason" in answer]
    if len(answers) < len(conversations):
        limits = f"{TEMPLATE_SECONDS} seconds, {TEMPLATE_BYTES >> 20} MiB, {TEMPLATE_CHARACTERS:,} characters"
        reasons = reasons or [f"it breaks a limit ({limits})"]
    if reasons:
        raise UserError(
            f"--chat: the template of {name} fails: {reasons[0]}; leave --system out, or name another model"
        )
    return [answer["text"] for answer in answers]


def _render_and_exit(
    conversations: list[list[Message]], tokenizer: PreTrainedTokenizerBase | Tokenizer, writer: int
) -> None:
    """Write a line of JSON for each conversation into a pipe, and end this process, which has the
    limits of a template.
    """
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if sys.platform == "linux":  # elsewhere only time is limited
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + TEMPLATE_BYTES,) * 2)
        with open(writer, "w", encoding="utf-8") as pipe:
            for conversation in conversations:
                signal.alarm(TEMPLATE_SECONDS)  # its default action ends this process
                pipe.write(json.dumps(_render(conversation, tokenizer)) + "\n")
    finally:
        os._exit(0)


def _render(conversation: list[Message], tokenizer: PreTrainedTokenizerBase | Tokenizer) -> dict[str, str]:
    """Return the text of a conversation, or the reason why the template gives none."""
    try:
        template = compile_template(default_template(tokenizer))
        special = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
        text = template.render(
            messages=conversation, tools=None, documents=None, add_generation_prompt=True, **special
        )
    except Exception as error:  # of the template, which can raise any
        return {"reason": one_line(error)}
    if len(text) > TEMPLATE_CHARACTERS:
        return {"reason": f"it writes {len(text):,} characters"}
    return {"text": text}


def default_template(tokenizer: PreTrainedTokenizerBase | Tokenizer) -> str:
    """Return the template of a tokenizer; of several, the one with the name "default"."""
    templates = tokenizer.chat_template
    return templates["default"] if isinstance(templates, dict) else str(templates)


def compile_template(text: str) -> jinja2.Template:
    """Return a chat template as transformers compiles it: in a sandbox that lets it change nothing, with
    the few functions that such templates use.
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
                raise jinja2.exceptions.SecurityError(f"a name that begins with an underscore: {name}")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    functions: dict[str, Any] = environment.globals
    functions["raise_exception"] = raise_exception
    functions["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    functions["dict"] = lambda *args, **named: dict(*args, **named)
    functions["namespace"] = Namespace
    return environment.from_string(text)


# A conversation with a cache -----------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """A question to the model, and its answer while it is being generated."""

    run: Run  # the timing of this turn alone
    seed: int
    messages: list[Message]  # the conversation with the question
    answer: Completion
    batch: Batch


class Chat:
    """A conversation that keeps its cache: each turn reads only what is new, however long the
    conversation is.
    """

    def __init__(self, run: Run, system: str | None) -> None:
        """Start a conversation. Raises UserError if the model has no chat template."""
        self.run, self.system = run, system
        self.reset()
        encode_chats([[*self.messages, {"role": "user", "content": "?"}]], run.language_model)

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages: list[Message] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self.num_turns = 0
        self._forget_cache()

    def begin_turn(self, text: str) -> Turn:
        """Return the turn of the user's next message. Raises UserError, and forgets the message,
        if the conversation does not fit into the model's context.

        A turn that never ends, because it was interrupted, leaves no trace: the conversation gets
        its cache back only in `end_turn`. (An interruption can come between two layers, and then
        nobody knows what the cache holds.)
        """
        language_model, options = self.run.language_model, self.run.options
        messages = [*self.messages, {"role": "user", "content": text}]
        [ids] = encode_chats([messages], language_model)
        try:
            check_length(ids, options.settings.max_new_tokens, language_model, name="the conversation")
        except UserError as error:
            raise UserError(f"{error}; /reset starts a new one") from error
        cache = self._reusable_cache(ids)
        self._forget_cache()
        stream = TextStream(language_model.tokenizer, options.stops)
        answer = Completion(Prompt(self.num_turns, text, ids), 0, stream)
        run = Run(language_model, options)
        seed = batch_seed(options.seed, self.num_turns)
        return Turn(run, seed, messages, answer, run.left_pad([answer], cache))

    def end_turn(self, turn: Turn) -> None:
        """Add a question and its finished answer to the conversation."""
        self.cache = turn.batch.cache
        self.cached_ids = turn.batch.tokens[0].tolist()[: self.cache.get_seq_length()]
        self.messages = [*turn.messages, {"role": "assistant", "content": turn.answer.text}]
        self.num_turns += 1

    def _forget_cache(self) -> None:
        self.cached_ids: list[int] = []  # the tokens whose keys and values are in the cache
        self.cache = decoding.new_cache(self.run.language_model)

    def _reusable_cache(self, ids: list[int]) -> Cache:
        """Return a cache of as many of the first tokens as are the same as before."""
        num_same = 0
        for new, cached in zip(ids, self.cached_ids):
            if new != cached:
                break
            num_same += 1
        num_same = min(num_same, len(ids) - 1)  # at least one token must be read to get logits
        if not all(getattr(layer, "is_croppable", True) for layer in self.cache.layers):
            # a recurrent state can't be taken back, and not every model reads several tokens from one
            return decoding.new_cache(self.run.language_model)
        if num_same == len(self.cached_ids):
            return self.cache
        if any(hasattr(layer, "activate_past_recording") for layer in self.cache.layers):
            # a sliding window has forgotten what would be needed again
            return decoding.new_cache(self.run.language_model)
        self.cache.crop(num_same - len(self.cached_ids))
        return self.cache
