"""A conversation keeps its cache and answers as if it had none, also after an interruption: the
oracle is each answer to the whole conversation without a cache.
"""

import dataclasses
import gc
import os
import re
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import generate
from common.errors import UserError, without_errors
from common.generation.chat import ChatFormat, Template, choose_template, read_format, try_to_render
from common.generation.completion import Options, Prompt, Run
from common.generation.conversation import Chat, Console, after_interruption
from common.generation.language_model import LanguageModel
from common.generation.library import TransformersModel
from common.generation.sampling import Settings
from common.runtime import Runtime
from language_models import CHAT_TEMPLATE, SIZES, train_byte_bpe

TURNS = ["Why is the sky blue?", "And the light?", "I like the fox"]


def render(conversations: list[list[dict]], template: Template) -> list[str]:
    return without_errors(try_to_render(conversations, template))


def run_of(kind: str, *, context: int = 512) -> Run:
    """Return a random model that chats: llama, or mistral that sees 8 tokens back."""
    tokenizer = train_byte_bpe()
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": context,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **SIZES,
    }
    model = AutoModelForCausalLM.from_config(
        MistralConfig(sliding_window=8, **shape) if kind == "mistral" else LlamaConfig(**shape)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    language_model = LanguageModel(kind, TransformersModel(model), tokenizer, (2,), 0, context)
    options = Options(Settings(max_new_tokens=12, end_ids=(2,)))
    return Run(language_model, options, chat=format_of(language_model))


def format_of(language_model: LanguageModel, **more) -> ChatFormat:
    """Return how its conversations are written, as flags that are not given leave it."""
    return read_format(language_model, **{"wanted": None, "options": {}, "prefill": "", **more})


def model_with(template: str | dict | None) -> LanguageModel:
    """Return a model that is only asked for its words."""
    run = run_of("llama")
    run.language_model.tokenizer.chat_template = template
    return run.language_model


def without_cache(chat: Chat, text: str) -> list[int]:
    """Return the tokens of the answer to the conversation so far and one more text."""
    messages = [*chat.messages, {"role": "user", "content": text}]
    ids = chat.format.encode(messages)
    rows = chat.run.rows([Prompt(0, text, ids)])
    list(generate.complete(chat.run, rows, seed=0))
    return rows[0].token_ids


def answer(chat: Chat, text: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the tokens of an answer, given as the script gives it."""
    turns, end_turn = [], Chat.end_turn
    monkeypatch.setattr(Chat, "end_turn", lambda self, turn: (turns.append(turn), end_turn(self, turn)))
    generate.answer(chat, text, Runtime(torch.device("cpu"), "fp32"))
    monkeypatch.setattr(Chat, "end_turn", end_turn)
    return turns[0].answer.token_ids


def interrupt_after(count: int) -> Callable[[str], None]:
    """Return a `show` that Ctrl-C interrupts at the given piece of text."""
    shown = []

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == count:
            raise KeyboardInterrupt

    return show


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_each_answer_is_that_of_the_whole_conversation(kind, monkeypatch):
    """Mistral's window has forgotten what a shorter conversation would need again: such a cache is
    not reused.
    """
    chat = Chat(run_of(kind), "Be short.")
    for turn in TURNS:
        expected = without_cache(chat, turn)
        assert answer(chat, turn, monkeypatch) == expected


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_an_interrupted_turn_leaves_nothing(kind, monkeypatch):
    chat = Chat(run_of(kind), None)
    answer(chat, TURNS[0], monkeypatch)
    before = list(chat.messages)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(generate, "show", interrupt_after(3))
        answer(chat, TURNS[1], patched)
    assert chat.messages == before and chat.take_back() == TURNS[1]
    expected = without_cache(chat, TURNS[2])
    assert answer(chat, TURNS[2], monkeypatch) == expected


def test_what_was_said_before_an_interruption_can_be_kept(monkeypatch):
    chat = Chat(run_of("llama"), None)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(generate, "show", interrupt_after(8))
        answer(chat, TURNS[0], patched)
    monkeypatch.setattr(Console, "confirm", lambda self, question: True)
    after_interruption(chat)
    ask, said = chat.messages
    assert ask["content"] == TURNS[0] and said["role"] == "assistant" and said["content"]
    expected = without_cache(chat, TURNS[1])
    assert answer(chat, TURNS[1], monkeypatch) == expected


def test_a_question_is_answered_again_with_other_random_numbers(monkeypatch):
    run = run_of("llama")
    settings = Settings(max_new_tokens=12, end_ids=(2,), sample=True, temperature=1.5)
    chat = Chat(dataclasses.replace(run, options=Options(settings)), "Be short.")
    answer(chat, TURNS[0], monkeypatch)
    first = answer(chat, TURNS[1], monkeypatch)
    before = chat.messages[:-2]
    assert chat.take_back() == TURNS[1] and chat.messages == before
    assert answer(chat, TURNS[1], monkeypatch) != first


def test_a_full_context_is_reported_and_a_new_conversation_can_start(monkeypatch):
    chat = Chat(run_of("llama", context=96), None)
    answer(chat, TURNS[0], monkeypatch)
    before = list(chat.messages)
    with pytest.raises(UserError, match="the conversation .* holds 96; .*; /reset "):
        chat.begin_turn("The quick brown fox " * 5)
    assert chat.messages == before
    chat.reset()
    expected = without_cache(chat, TURNS[1])
    assert answer(chat, TURNS[1], monkeypatch) == expected


TEMPLATES = {
    "of the tests": CHAT_TEMPLATE,
    "blocks on lines of their own": """
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{% for message in messages %}
  {%- if message.role == 'assistant' -%}
    {% generation %}{{ message.content | trim }}{% endgeneration %}
  {% else %}
[{{ loop.index }}] {{ message.content + eos_token }}
  {% endif %}
{% endfor %}
{{- system if system is defined }}{% if tools is not none %}tools{% endif %}
""",
    "json": "{{ messages | tojson }}{{ {'ä': '<b>'} | tojson(indent=2) }}{{ dict(a=1) | tojson }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}"
    "{% endfor %}",
    "a namespace": "{% set ns = namespace(count=0) %}{% for m in messages %}{% set ns.count = ns.count + 1 %}"
    "{% endfor %}{{ ns.count }}",
    "the date": "{{ strftime_now('%Y') }}{{ pad_token }}{{ add_generation_prompt }}{{ documents }}",
    "it refuses": "{{ raise_exception('roles must alternate') }}",
    "it changes its messages": "{{ messages.append(1) }}",
    "it looks at Python": "{{ messages.__class__ }}",
    "it hides a part of Python": "{% set ns = namespace(x=1) %}{% set ns._x = 2 %}{{ ns.x }}",
    "it fails": "{{ messages[0].content / 2 }}",
    "it is broken": "{% for message in messages %}",
    "what is not there": "{{ nothing.at.all }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_the_library_writes(name):
    """Or is refused by both."""
    tokenizer = train_byte_bpe()
    tokenizer.chat_template = TEMPLATES[name]
    template = choose_template(LanguageModel("x", None, tokenizer, (2,), 0, 99), None, {})
    conversation = [
        {"role": "system", "content": "Be <short> & kind."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "  Hello. "},
    ]
    for number, how in ((2, "add_generation_prompt"), (3, "continue_final_message")):
        messages, refused, expected = conversation[:number], None, None
        try:
            expected = tokenizer.apply_chat_template(messages, tokenize=False, **{how: True})
        except Exception as error:  # of the template
            refused = error
        if refused is None:
            assert render([messages], template) == [expected]
            continue
        if "not an accepted field" in str(refused):  # only the library looks for the word "content"
            continue
        with pytest.raises(UserError, match="the template of x fails"):
            render([messages], template)


SEVERAL = {"tool_use": "tool", "default": "{{ messages[0].content }}"}


def test_of_several_templates_the_default_or_the_named_one_is_taken(tmp_path):
    ask = [{"role": "user", "content": "a"}]
    (tmp_path / "own.jinja").write_text("own {{ messages[0].content }}\n")
    for wanted, text in ((None, "a"), ("tool_use", "tool"), (str(tmp_path / "own.jinja"), "own a")):
        assert render([ask], choose_template(model_with(SEVERAL), wanted, {})) == [text]
    with pytest.raises(UserError, match=r"--chat-template x: .*tool_use, default.* nor a file"):
        choose_template(model_with(SEVERAL), "x", {})
    with pytest.raises(UserError, match="a, b.*name one with --chat-template"):
        choose_template(model_with({"a": "1", "b": "2"}), None, {})
    template = choose_template(model_with(None), str(tmp_path / "own.jinja"), {})
    assert render([ask], template) == ["own a"]


THINKING = CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}"


def test_options_reach_the_template_and_an_unknown_one_is_refused():
    ask, model = [{"role": "user", "content": "a"}], model_with(THINKING)
    plain, off = (
        render([ask], choose_template(model, None, options)) for options in ({}, {"enable_thinking": False})
    )
    assert off == [plain[0] + "<no>"]
    with pytest.raises(UserError, match="does not read 'thinking'; it reads enable_thinking;.*option"):
        render([ask], choose_template(model, None, {"thinking": False}))
    with pytest.raises(UserError, match="--template-option messages: every template"):
        choose_template(model, None, {"messages": []})


TURNS_OF = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
ENDS = {  # what a template writes after an answer: the end ids of a model that ends on 2, eos being 2
    "the end token of the config": (CHAT_TEMPLATE, [2]),
    "another token": (TURNS_OF + "<|endoftext|>{% endfor %}", [2, 0]),
    "on a line of its own": (TURNS_OF + "\n<|endoftext|>{% endfor %}", [2, 0]),
    "the token before the next turn": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}",
        [2, 1],
    ),
    "nothing but text": (TURNS_OF + "\n{% endfor %}", [2]),
    "one question only": (
        "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}{{ messages[0].content }}",
        [2],
    ),
}


@pytest.mark.parametrize("template, expected", ENDS.values(), ids=ENDS)
def test_an_answer_ends_where_the_template_ends_it(template, expected):
    assert list(format_of(model_with(template)).end_ids) == expected


def test_an_answer_ends_at_the_end_token_of_the_tokenizer_too():
    """A model whose config ends on one token while its tokenizer names another."""
    model = dataclasses.replace(model_with(TURNS_OF + "{% endfor %}"), end_ids=(0,))
    assert format_of(model).end_ids == (0, 2)


NO_SYSTEM = {  # templates without a system role: one refuses it, one leaves it out
    "refused": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + CHAT_TEMPLATE,
    "left out": "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    + CHAT_TEMPLATE,
}


@pytest.mark.parametrize("template", NO_SYSTEM.values(), ids=NO_SYSTEM)
def test_a_system_text_goes_into_the_first_question_where_there_is_no_role_for_it(template, capsys):
    model = model_with(template)
    system, ask = {"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}
    more = [{"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    expected = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Be short.\n\nWhy?"}, *more],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    chat_format = format_of(model)
    assert chat_format.encode([system, ask, *more]) == expected
    chat_format.note_system()
    assert re.fullmatch(r"note: .*takes no system message.*\n", capsys.readouterr().err)
    with_role = format_of(model_with(CHAT_TEMPLATE))
    with_role.note_system()
    assert with_role.takes_system and capsys.readouterr().err == ""


def test_an_answer_that_was_begun_goes_on(monkeypatch):
    """Oracle: the library's continue_final_message; in a conversation the beginning is part of the
    answer.
    """
    run = run_of("llama")
    chat_format = format_of(run.language_model, prefill="The light ")
    chat = Chat(dataclasses.replace(run, chat=chat_format), None)
    messages = [{"role": "user", "content": TURNS[0]}, {"role": "assistant", "content": "The light "}]
    ids = run.language_model.tokenizer.apply_chat_template(
        messages, continue_final_message=True, return_dict=True
    )["input_ids"]
    assert chat_format.encode(messages[:1]) == ids
    expected = without_cache(chat, TURNS[0])
    assert answer(chat, TURNS[0], monkeypatch) == expected
    said = run.language_model.tokenizer.decode(ids + expected, skip_special_tokens=True)
    assert said.endswith(chat.messages[-1]["content"]) and chat.messages[-1]["content"].startswith(
        "The light "
    )
    with pytest.raises(UserError, match="--prefill: the conversation ends with an answer"):
        chat_format.encode(messages)


def test_the_child_that_renders_does_not_collect_what_its_parent_left(tmp_path):
    """The threads of a model that is garbage are not in the child: to stop them there would crash it."""

    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            (tmp_path / str(os.getpid())).touch()

    before = gc.get_threshold()
    gc.disable()
    try:
        Garbage()
        gc.set_threshold(1)
        template = Template("{% set _ = [] %}" * 200 + "{{ messages[0].content }}", "it")
        fork = os.fork

        def fork_and_collect() -> int:
            child = fork()
            if child == 0:
                gc.enable()
            return child

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fork", fork_and_collect)
            assert render([[{"role": "user", "content": "x"}]], template) == ["x"]
    finally:
        gc.set_threshold(*before)
        gc.enable()
    gc.collect()
    assert {path.name for path in tmp_path.iterdir()} <= {str(os.getpid())}
