"""--choices and --regex: each text has the form that was asked for, and is the model's own choice
within it.
"""

import dataclasses
import json
import re

import pytest
import regex
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import generate
from common.errors import UserError
from common.generation import constraints, decoding
from common.generation.completion import Completion, Options, Prompt, Run, TextStream
from common.generation.language_model import LanguageModel
from common.generation.library import TransformersModel
from common.generation.lookup import PromptLookup
from common.generation.sampling import Settings
from conftest import exit_code_in_process
from language_models import VOCABULARY, save_tiny_model, tiny_language_model, train_byte_bpe

TOKENIZER = train_byte_bpe()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A random Llama whose vocabulary is somewhat larger than its tokenizer's."""
    found = tiny_language_model("llama", scale=2.0)
    assert isinstance(found.model, TransformersModel)
    found.model.module.resize_token_embeddings(len(TOKENIZER) + 5, mean_resizing=False)
    return dataclasses.replace(found, tokenizer=TOKENIZER, end_ids=(2, 0), pad_id=0)


def texts_of(model: LanguageModel, prompts: list[list[int]], **flags) -> list[Completion]:
    """Return the completions of prompts."""
    chosen = Settings(**{"max_new_tokens": 40, "end_ids": model.end_ids, **flags})
    run = Run(model, Options(chosen))
    rows = [
        Completion(Prompt(number, "", ids), 0, TextStream(TOKENIZER)) for number, ids in enumerate(prompts)
    ]
    list(generate.complete(run, rows, seed=3))
    return rows


PROMPTS = [[30, 31, 32, 33, 34], [50], [70, 71, 72]]
TEXTS = st.text("abcTheqy \n,", min_size=1, max_size=12)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TEXTS, min_size=1, max_size=5), st.booleans())
def test_exactly_one_of_the_choices_comes_out(model, choices, sample):
    constraint = constraints.Constraints(model).choices(choices, model.end_ids)
    flags = {"sample": True, "temperature": 2.0} if sample else {}
    for row in texts_of(model, PROMPTS, constraint=constraint, **flags):
        assert row.text in choices and row.finish_reason == "end" and row.token_ids[-1] in model.end_ids


def test_a_greedy_choice_is_the_models_token_by_token(model):
    """Oracle: the likeliest of the tokens that lead to a choice, each from one pass over the whole text."""
    choices = ["The", "The quick brown fox", "The lazy dog", "def", "dogs", "a,b"]
    runs = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in choices]
    constraint = constraints.Constraints(model).choices(choices, model.end_ids)
    assert isinstance(model.model, TransformersModel)
    for prompt, row in zip(PROMPTS, texts_of(model, PROMPTS, constraint=constraint)):
        text: list[int] = []
        while not text or text[-1] not in model.end_ids:
            leading = [[*run, end] for run in runs for end in model.end_ids if run[: len(text)] == text]
            allowed = sorted({run[len(text)] for run in leading})
            with torch.inference_mode():
                logits = model.model.module(torch.tensor([prompt + text])).logits[0, -1]
            text.append(allowed[int(logits[allowed].argmax())])
        assert row.token_ids == text


PATTERNS = [
    r"\d{1,3}(\.\d{2})?",
    "(yes|no|maybe)",
    r"[A-Z][a-z]{2,5} [A-Z][a-z]{1,4}",
    r"\{\"name\": \"[a-z]{1,8}\", \"age\": \d{1,2}\}",
    r"你好|世界|[é-ü]{2}",
    r"(ab|cd){2,4}e?",
    r"\w{3}\s\w{1,2}",
    r"[^a-m\n]{4}",
    "a?",
]
ATOMS = st.sampled_from(["a", "[b-e]", "The", r"\d", "é", " ", r"\.", "[^x]", "(q|y|fox)"])
REPEATS = st.sampled_from(["", "?", "{2}", "{1,3}"])
REGEXES = st.lists(st.tuples(ATOMS, REPEATS), min_size=1, max_size=5).map(
    lambda parts: "".join(f"({atom}){repeat}" for atom, repeat in parts)
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.sampled_from(PATTERNS), REGEXES), st.booleans())
def test_each_text_matches_the_expression(model, pattern, sample):
    """As Python's own `re` understands it, from the beginning to the end."""
    constraint = constraints.Constraints(model).regex(pattern, model.end_ids)
    flags = {"sample": True, "top_k": 30, "temperature": 1.5} if sample else {}
    for row in texts_of(model, PROMPTS, constraint=constraint, max_new_tokens=60, **flags):
        assert row.finish_reason == "end", (pattern, row.text)
        # not by re, whose Unicode is older than that of --regex and knows fewer digits
        assert regex.fullmatch(pattern, row.text), (pattern, row.text)


ROW = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"$ref": "#/$defs/few"}}}
SCHEMAS = {  # name: (schema, whether a value is of it)
    "a whole number": (
        {"type": "integer", "minimum": -3, "maximum": 120},
        lambda value: value in range(-3, 121),
    ),
    "values": ({"enum": ["a", 2, None, [1]]}, lambda value: value in ("a", 2, None, [1])),
    "a pattern": (
        {"type": "string", "pattern": "^[a-c]{2,4}$"},
        lambda value: regex.fullmatch("[a-c]{2,4}", value),
    ),
    "lists of either kind": (
        {
            "type": "array",
            "items": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 2}]},
            "minItems": 1,
            "maxItems": 3,
        },
        lambda value: (
            1 <= len(value) <= 3
            and all(type(one) is bool or (len(one) <= 2 and one + "") == one for one in value)
        ),
    ),
    "an object": (
        {
            **ROW,
            "required": ["a"],
            "additionalProperties": False,
            "$defs": {"few": {"type": "array", "items": {"const": "x"}, "maxItems": 2}},
        },
        lambda value: (
            type(value["a"]) is bool
            and value.keys() <= {"a", "b"}
            and value.get("b", []) in ([], ["x"], ["x", "x"])
        ),
    ),
}


@pytest.mark.parametrize("schema, is_of_it", SCHEMAS.values(), ids=SCHEMAS)
def test_each_text_is_json_of_the_schema(model, schema, is_of_it):
    """As Python's own parser reads it, greedy and drawn."""
    constraint = constraints.Constraints(model).json(schema, model.end_ids)
    for flags in ({}, {"sample": True, "temperature": 2.0}):
        for row in texts_of(model, PROMPTS, constraint=constraint, max_new_tokens=300, **flags):
            assert row.finish_reason == "end" and is_of_it(json.loads(row.text)), row.text


LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}


@pytest.mark.parametrize(
    "schema, problem",
    [
        ({"type": "object", "propertyNames": {"maxLength": 2}}, "propertyNames.*; leave that out"),
        ({"type": "word"}, "word.*; leave that out"),
        (LOOP, "no text has this form; correct it"),
    ],
)
def test_a_schema_that_is_not_known_or_has_no_text_is_refused(model, schema, problem):
    with pytest.raises(UserError, match=f"^schema: .*{problem}"):
        constraints.Constraints(model).json(schema, model.end_ids)


def test_a_schema_that_takes_too_much_ends_its_text_with_the_reason(model):
    schema = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(550)}}
    constraint = constraints.Constraints(model).json(schema, model.end_ids)
    with pytest.raises(UserError, match=r"^schema: .*max is 2000.*; ask for something simpler$"):
        texts_of(model, PROMPTS[:1], constraint=constraint)


def test_a_text_that_is_cut_says_so_and_a_whole_one_does_not(model):
    def finish(pattern: str, limit: int) -> tuple[str, str]:
        constraint = constraints.Constraints(model).regex(pattern, model.end_ids)
        [row] = texts_of(model, PROMPTS[:1], constraint=constraint, max_new_tokens=limit)
        return row.text, row.finish_reason

    assert finish("a{3}b{20}", 4)[1] == "length"
    assert finish("a{4}", 4) == ("aaaa", "end")  # only the end token is missing
    assert finish("a{4}", 3)[1] == "length"


def test_guesses_and_end_tokens_keep_the_form(model):
    """Prompt lookup asks what follows a guess, also a wrong one; the text is the same."""
    constraint = constraints.Constraints(model).regex("(ab){1,9}(cd){2,9}", model.end_ids)
    expected = texts_of(model, PROMPTS[:1], constraint=constraint)[0].token_ids
    settings = Settings(max_new_tokens=40, end_ids=model.end_ids, constraint=constraint)
    batch = decoding.left_pad([PROMPTS[0]], model, room=40)
    steps = PromptLookup(3).decode(model, batch, settings)
    assert [step.tokens[0] for step in steps] == expected


def test_a_model_without_an_end_and_a_text_that_no_token_spells_are_refused(model):
    with pytest.raises(UserError, match="--choices.*--end-token"):
        constraints.Constraints(model).choices(["a"], ())
    with pytest.raises(UserError, match="--regex.*--end-token"):
        constraints.Constraints(model).regex("a", ())
    with pytest.raises(UserError, match="--choices.*spell it"):
        constraints.Constraints(model).choices(["a<|im_start|>"], model.end_ids)


FLAGS = (
    ["--choices", "yes,no,it is", "--batch-size", 2],
    ["--regex", r"\d{2,4}|no", "--top-k", 20, "--num-samples", 2],
    ["--regex", "(ab)+c", "--temperature", 1.5, "--presence-penalty", 0.5],
)


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: flags[1])
def test_the_command_line_checks_and_explains_it(flags, tmp_path_factory, capsys):
    folder = tmp_path_factory.getbasetemp() / "constrained-llama"
    if not folder.exists():
        save_tiny_model(folder)
    shared = ["--model", folder, "--device", "cpu", "--precision", "fp32", "--max-new-tokens", 30]
    prompts = ["--prompt", "The quick brown", "--prompt", "Why"]
    assert exit_code_in_process(generate, [*shared, *prompts, *flags, "--check"]) == 0
    assert re.match(r"equal: (\d+) of \1 tokens", capsys.readouterr().out)
    if "--num-samples" not in flags:
        assert exit_code_in_process(generate, [*shared, *prompts[:2], *flags, "--explain"]) == 0
        name = flags[0].removeprefix("--")
        stdout = capsys.readouterr().out
        assert name in stdout and re.search(r"one of \d+ kept", stdout)
    cut = ["--regex", "a{50}", "--max-new-tokens", 5]
    assert exit_code_in_process(generate, [*shared[:-2], *prompts[:2], *cut]) == 0
    assert "cut at 5 tokens, before the end of its regex" in capsys.readouterr().err


def test_the_tokenizer_is_larger_than_the_models_of_other_tests():
    assert len(TOKENIZER) > VOCABULARY  # so that `model` must have its own embeddings
