"""A conversation that keeps its cache from turn to turn, the lines that are typed into it, and the
file that it is saved to.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import reading
from common.cli import check_encoding
from common.errors import UserError, shorten
from common.files import replace_file
from common.generation.chat import ChatFormat
from common.generation.completion import Completion, Prompt, Run
from common.generation.decoding import Batch, is_croppable
from common.generation.language_model import check_length
from common.generation.messages import Message, as_conversation, check_messages, is_begun
from common.generation.prompts import parse_object
from common.generation.sampling import batch_seed

if TYPE_CHECKING:
    from common.generation.decoding import Cache

# A conversation with a cache ----------------------------------------------------------------------


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
        """Start a conversation. Raises UserError if the template does not take the system text."""
        assert run.chat is not None
        self.run, self.system = run, system
        self.format: ChatFormat = run.chat
        self.reset()
        self.format.encode(as_conversation("?", system))

    def reset(self) -> None:
        """Start a new conversation, in which each answer is drawn as in the first one."""
        self.messages: list[Message] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self.num_turns = 0  # answers that were finished or kept: each has a seed of its own
        self.turn: Turn | None = None  # that was begun and has not ended
        self._forget_cache()

    def set_system(self, text: str) -> None:
        """Give the conversation another system message, from its next answer on; "" is none."""
        self.system = text or None
        first = [{"role": "system", "content": text}] if text else []
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*first, *others]

    def replace(self, messages: list[Message]) -> None:
        """Put another conversation in the place of this one."""
        self.system = messages[0]["content"] if messages[0]["role"] == "system" else None
        self.reset()
        self.messages = list(messages)

    def begin_turn(self, text: str) -> Turn:
        """Return the turn of the user's next message. Raises UserError, and forgets the message,
        if the conversation does not fit into the model's context.

        A turn that never ends, because it was interrupted, leaves no trace unless it is kept: the
        conversation gets its cache back only in `end_turn`. (An interruption can come between two
        layers, and then nobody knows what the cache holds.)
        """
        language_model, options = self.run.language_model, self.run.options
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.format.encode(messages)
        try:
            most = options.settings.max_new_tokens
            check_length(ids, most, language_model, name="the conversation")
        except UserError as error:
            raise UserError(f"{error}; /reset starts a new one") from error
        cache = self._reusable_cache(ids)
        self._forget_cache()
        run = Run(language_model, options)
        [answer] = run.rows([Prompt(self.num_turns, text, ids)])
        seed = batch_seed(options.seed, self.num_turns)
        self.turn = Turn(run, seed, messages, answer, run.left_pad([answer], cache))
        return self.turn

    def end_turn(self, turn: Turn) -> None:
        """Add a question and its finished answer to the conversation."""
        self.cache = turn.batch.cache
        self.cached_ids = turn.batch.tokens[0].tolist()[: self.cache.get_seq_length()]
        self.keep_turn(turn)

    def keep_turn(self, turn: Turn) -> None:
        """Add a question, and what was generated of its answer, to the conversation."""
        turn.answer.finish()
        text = self.format.prefill + turn.answer.text
        self.messages = [*turn.messages, {"role": "assistant", "content": text}]
        self.num_turns += 1
        self.turn = None

    def take_back(self) -> str | None:
        """Return the last question, and forget it with its answer; None if there is none.

        Its next answer has another seed, since this one was counted.
        """
        if self.turn is not None:  # interrupted, and not kept
            return self.turn.messages[-1]["content"]
        asked = [n for n, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            return None
        text, self.messages = self.messages[asked[-1]]["content"], self.messages[: asked[-1]]
        return text

    def _forget_cache(self) -> None:
        self.cached_ids: list[int] = []  # the tokens whose keys and values are in the cache
        self.cache = self.run.language_model.model.new_cache()

    def _reusable_cache(self, ids: list[int]) -> Cache:
        """Return a cache of the first tokens, as far as they are the same as before."""
        num_same = 0
        for new, cached in zip(ids, self.cached_ids):
            if new != cached:
                break
            num_same += 1
        num_same = min(num_same, len(ids) - 1)  # at least one token must be read to get logits
        if not is_croppable(self.cache):  # nor does every model read several tokens from such a state
            return self.run.language_model.model.new_cache()
        if num_same == len(self.cached_ids):
            return self.cache
        if any(hasattr(layer, "activate_past_recording") for layer in self.cache.layers):
            # a sliding window has forgotten what would be needed again
            return self.run.language_model.model.new_cache()
        self.cache.crop(num_same - len(self.cached_ids))
        return self.cache


# What is typed ------------------------------------------------------------------------------------

COMMANDS = {  # what a line can begin with: (what follows, what it does)
    "/help": ("", "this list"),
    "/reset": ("", "a new conversation"),
    "/system": ("TEXT", "another system message from the next answer on; without TEXT none"),
    "/retry": ("", "the last question again; where tokens are drawn, with other random numbers"),
    "/save": ("FILE", "write the conversation to a file"),
    "/load": ("FILE", "go on with a conversation from a file"),
    "/exit": ("", "the end, as Ctrl-D"),
}


def typed_messages(chat: Chat) -> Iterator[str]:
    """Yield each message that is to be answered, and carry out the commands between them, until the
    input ends.

    A line that begins with / is a command or a typo, and never a message. Raises UserError for a
    line that is not UTF-8.
    """
    console = Console()
    if console.is_terminal:
        say("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the conversation")
    while (line := console.read()) is not None:
        if not line.startswith("/"):
            if line.strip():
                yield line
            continue
        name, *rest = line.split(maxsplit=1)
        if name == "/exit":
            return
        try:
            message = carry_out(name, rest[0].strip() if rest else "", chat, console)
        except UserError as error:
            say(f"generate.py: {error}")
            continue
        if message is not None:
            yield message


class Console:
    """Lines that a person types, or that are piped in."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty()
        self.own_files: set[Path] = set()  # that this conversation was saved to or loaded from
        if self.is_terminal:
            # importing it gives `input` the arrow keys and a history, which no file keeps
            import readline

            # what is pasted is one message, with its line breaks; Python switches that off
            readline.parse_and_bind("set enable-bracketed-paste on")

    def read(self) -> str | None:
        """Return the next line, None at the end. On a terminal, Ctrl-C only takes back the line."""
        while True:
            try:
                line = input("> " if self.is_terminal else "")
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                say("\n(Ctrl-D or /exit ends the conversation)")
                continue
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                problem = f"standard input: not UTF-8 (byte {byte:#04x})"
                raise UserError(f"{problem}; convert it to UTF-8") from error
            check_encoding(line, "standard input")
            return line

    def confirm(self, question: str) -> bool:
        """Ask for yes or no; without a terminal the answer is no."""
        if not self.is_terminal:
            return False
        import readline

        readline.set_auto_history(False)  # a yes does not belong in the history
        try:
            return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            say("")
            return False
        finally:
            readline.set_auto_history(True)


def carry_out(name: str, text: str, chat: Chat, console: Console) -> str | None:
    """Carry out a command; return the message that is to be answered next, if the command asks for one.

    Raises UserError for one that does not exist, that needs a text or takes none, and for a file
    that can't be used.
    """
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        way_out = "/help lists them (a message may begin with a space)"
        raise UserError(f"{shorten(name, 60)}: no such command; {meant}{way_out}")
    wanted, _ = COMMANDS[name]
    if (text and not wanted) or (not text and wanted == "FILE"):
        raise UserError(f"{name}: write {f'{name} {wanted}'.strip()}")
    if name == "/help":
        for command, (argument, what) in COMMANDS.items():
            say(f"{f'{command} {argument}':<13} {what}")
    elif name == "/reset":
        chat.reset()
    elif name == "/system":
        chat.set_system(text)
        chat.format.note_system()
        if not text:
            say("(no system message from the next answer on)")
    elif name == "/save":
        save(chat.messages, Path(text), console.own_files)
    elif name == "/load":
        return load(Path(text), chat, console.own_files)
    elif name == "/retry":
        if (message := chat.take_back()) is None:
            raise UserError("/retry: there is no question yet; ask one")
        return message
    return None


def after_interruption(chat: Chat) -> None:
    """Let the user keep the part of an answer that came before Ctrl-C; otherwise the turn is forgotten."""
    say("")
    turn = chat.turn
    if turn is not None and turn.answer.token_ids and Console().confirm("keep what was said?"):
        chat.keep_turn(turn)
        say("(kept: the conversation goes on after it)")
    else:
        say("(interrupted; the model has forgotten this turn; /retry answers it anew)")


def say(text: str) -> None:
    """Show a line that is no part of an answer."""
    print(text, file=sys.stderr, flush=True)


# Files --------------------------------------------------------------------------------------------


def save(messages: list[Message], path: Path, own_files: set[Path]) -> None:
    """Write a conversation to a file as a line that --prompts-file takes. Raises UserError for a
    file that exists and is not one of `own_files`, and if it can't be written.
    """
    if not any(message["role"] == "user" for message in messages):
        raise UserError("/save: nothing was said yet; ask something")
    try:
        if path.exists() and path.resolve() not in own_files:
            raise UserError(f"/save {path}: it exists; name a new file")
        replace_file(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        own_files.add(path.resolve())
    except OSError as error:
        raise UserError(f"/save {path}: {error.strerror}; name another file") from error
    say(f"(saved: {len(messages)} messages)")


def load(path: Path, chat: Chat, own_files: set[Path]) -> str | None:
    """Go on with the conversation of a file; return its question that has no answer yet, if it ends
    with one. Raises UserError, and changes nothing, for a file that holds something else.
    """
    name = f"/load {path}"
    if str(path) == "-":
        raise UserError("/load -: standard input is the conversation itself; name a file")
    lines = [line for line in reading.read_lines(str(path)) if line.strip()]
    if len(lines) > 1:
        raise UserError(f"{name}: it has {len(lines):,} lines; name a file of one conversation")
    row = parse_object(lines[0] if lines else "", name)
    messages = check_messages(row.get("messages"), name)
    ask = {"role": "user", "content": "?"}
    chat.format.encode([*messages, ask] if is_begun(messages) else messages)
    chat.replace(messages)
    own_files.add(path.resolve())
    say(f"(loaded: {len(messages)} messages)")
    return None if is_begun(messages) else chat.take_back()
