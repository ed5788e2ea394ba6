"""A conversation keeps its cache and answers as if it had none, also after an interruption: the
oracle is each answer to the whole conversation without a cache.
"""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import generate
from common.errors import UserError
from common.generation.chat import Chat, encode_chats, render
from common.generation.completion import Options, Prompt, Run
from common.generation.language_model import LanguageModel
from common.generation.sampling import Settings
from common.runtime import Runtime
from language_models import CHAT_TEMPLATE, SIZES, train_byte_bpe

TURNS = ["Why is the sky blue?", "And the light?", "I like the fox"]


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
    return Run(
        LanguageModel(kind, model, tokenizer, (2,), 0, context),
        Options(Settings(max_new_tokens=12, end_ids=(2,))),
    )


def without_cache(chat: Chat, text: str) -> list[int]:
    """Return the tokens of the answer to the conversation so far and one more text."""
    messages = [*chat.messages, {"role": "user", "content": text}]
    [ids] = encode_chats([messages], chat.run.language_model)
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
    assert chat.messages == before
    expected = without_cache(chat, TURNS[2])
    assert answer(chat, TURNS[2], monkeypatch) == expected


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
    conversation = [
        {"role": "system", "content": "Be <short> & kind."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "  Hello. "},
    ]
    refused = expected = None
    try:
        expected = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # of the template
        refused = error
    if refused is None:
        assert render([conversation], tokenizer, name="x") == [expected]
        return
    with pytest.raises(UserError, match="the template of x fails"):
        render([conversation], tokenizer, name="x")


def test_of_several_templates_the_default_is_taken():
    tokenizer = train_byte_bpe()
    tokenizer.chat_template = {"tool_use": "tool", "default": "{{ messages[0].content }}"}
    assert render([[{"role": "user", "content": "a"}]], tokenizer, name="x") == ["a"]
