"""A conversation keeps its cache and answers as if it had none, also after what goes wrong: oracle
is each answer from the whole conversation, anew.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from common.errors import UserError
from common.generation.chat import Chat
from common.generation.completion import Generator, Options, Prompt
from common.generation.language_model import LanguageModel, encode_chat
from common.generation.sampling import Settings
from language_models import CHAT_TEMPLATE, SIZES, train_byte_bpe

TURNS = ["Why is the sky blue?", "And the light?", "I like the fox"]


def generator_of(kind: str, *, context: int = 512) -> Generator:
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
    return Generator(
        LanguageModel(kind, model, tokenizer, (2,), 0, context),
        Options(Settings(max_new_tokens=12, end_ids=(2,))),
    )


def anew(generator: Generator, chat: Chat, text: str) -> list[int]:
    """Return the tokens of the answer to the conversation so far and one more text, without any
    cache.
    """
    ids = encode_chat([*chat.messages, {"role": "user", "content": text}], generator.language_model)
    return generator.complete([Prompt(0, text, ids)], seed=0)[0].token_ids


def stop_after(count: int):
    """Return a `show` that Ctrl-C ends at the given chunk."""
    shown = []

    def show(chunk: str):
        shown.append(chunk)
        if len(shown) == count:
            raise KeyboardInterrupt

    return show


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_each_answer_is_that_of_the_whole_conversation(kind):
    """Mistral's window has forgotten what a shorter conversation would need again: such a cache is
    not gone on with.
    """
    generator = generator_of(kind)
    chat = Chat(generator, "Be short.")
    for turn in TURNS:
        expected = anew(generator, chat, turn)
        assert chat.reply(turn, lambda chunk: None).token_ids == expected


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_an_interrupted_turn_leaves_nothing(kind):
    generator = generator_of(kind)
    chat = Chat(generator, None)
    chat.reply(TURNS[0], lambda chunk: None)
    before = list(chat.messages)
    with pytest.raises(KeyboardInterrupt):
        chat.reply(TURNS[1], stop_after(3))
    assert chat.messages == before
    expected = anew(generator, chat, TURNS[2])
    assert chat.reply(TURNS[2], lambda chunk: None).token_ids == expected


def test_a_full_context_is_said_and_a_new_conversation_can_begin():
    generator = generator_of("llama", context=96)
    chat = Chat(generator, None)
    chat.reply(TURNS[0], lambda chunk: None)
    before = list(chat.messages)
    with pytest.raises(UserError, match="the conversation .* holds 96; .*; /reset begins a new one"):
        chat.reply("The quick brown fox " * 5, lambda chunk: None)
    assert chat.messages == before
    chat.reset()
    expected = anew(generator, chat, TURNS[1])
    assert chat.reply(TURNS[1], lambda chunk: None).token_ids == expected
