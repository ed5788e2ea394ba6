"""Chats through the command line: conversations from files, prompts that do not fit, the model's
own settings, and what is typed into a conversation.
"""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import generate_on_cpu, read_json_lines, write_lines
from language_models import save_tiny_model
from terminal import OnTerminal

ASK, MORE = {"role": "user", "content": "Why is the sky blue?"}, {"role": "user", "content": "And the light?"}
SAID = {"role": "assistant", "content": "The quick brown fox"}
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.fixture
def script(tiny, capsys):
    """Return a function that runs generate.py in this process; returns code, stdout, stderr."""

    def run(*flags) -> tuple[int, str, str]:
        return generate_on_cpu(flags, tiny, 12), *capsys.readouterr()

    return run


def write_prompts(path: Path, *rows: dict) -> Path:
    return write_lines(path, [json.dumps(row) for row in rows])


def test_conversations_come_from_a_file(script, tiny, tmp_path):
    """Oracle: the library's template and generate, for each line alone; a conversation that ends
    with an answer goes on with it.
    """
    conversations = [[ASK, SAID, MORE], [SYSTEM, ASK], [ASK], [SYSTEM, MORE, SAID]]
    rows = [{"messages": messages, "id": 7} for messages in conversations]
    rows[2] = {"prompt": ASK["content"]}
    file, out = write_prompts(tmp_path / "x.jsonl", *rows), tmp_path / "out.jsonl"
    flags = ["--chat", "--prompts-file", file, "--output", out, "--batch-size", 2]
    code, _, stderr = script(*flags)
    assert code == 0, stderr
    lines = read_json_lines(out)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    for messages, line in zip(conversations, lines, strict=True):
        goes_on = messages[-1]["role"] == "assistant"
        inputs = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        assert line["token_ids"] == ids.tolist()
        assert line["prompt"] == messages[-1]["content"]
    assert [line.get("messages") for line in lines] == [row.get("messages") for row in rows]
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    assert script(*flags, "--resume")[0] == 0 and out.read_bytes() == whole
    write_prompts(file, {"messages": [MORE, SAID, MORE]}, *rows[1:])
    code, _, stderr = script(*flags, "--resume")
    assert code == 2 and "line 1: its messages" in stderr


def test_a_system_text_is_for_conversations_that_have_none(script, tmp_path):
    files = [
        write_prompts(tmp_path / "a.jsonl", {"messages": [SYSTEM, ASK]}),
        write_prompts(tmp_path / "b.jsonl", {"messages": [ASK]}),
    ]
    first, second, other = (
        script("--chat", "--prompts-file", file, *system)[1]
        for file, system in zip([*files, files[1]], (["--system", "x"], ["--system", "Be short."], []))
    )
    assert first == second != other


def test_prompts_that_do_not_fit_are_left_out(script, tmp_path):
    """Each has a line with its reason, and what else is in the file, also after --resume, is as if
    it were not there, but for its number.
    """
    good = [ASK["content"], MORE["content"], "I like the fox"]
    texts = [good[0], "$%" * 200, good[1], good[2], "%$" * 200]
    file, out = write_lines(tmp_path / "x.txt", texts), tmp_path / "out.jsonl"
    code, stdout, stderr = script("--prompts-file", file, "--output", out)
    assert code == 2 and "prompt 2: the prompt has" in stderr and not out.exists()
    flags = ["--prompts-file", file, "--output", out, "--skip-bad", "--batch-size", 1]
    code, stdout, stderr = script(*flags)
    assert code == 0 and stdout == "", stderr
    left_out = re.findall(
        r"^generate.py: left out: (prompt [25]: the prompt has [\d,]+ tokens.*)$", stderr, re.M
    )
    lines = read_json_lines(out)
    assert [line.get("error", "") for line in lines] == ["", left_out[0], "", "", left_out[1]]
    assert [(x["text"], x["token_ids"]) for x in lines if "error" in x] == [("", [])] * 2
    assert [line["finish_reason"] == "refused" for line in lines] == [bool(x.get("error")) for x in lines]
    alone = tmp_path / "alone.jsonl"
    script("--prompts-file", write_lines(tmp_path / "y.txt", good), "--output", alone, "--batch-size", 1)
    assert [x["token_ids"] for x in lines if "error" not in x] == [
        x["token_ids"] for x in read_json_lines(alone)
    ]
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    assert script(*flags, "--resume")[0] == 0 and out.read_bytes() == whole
    assert script("--prompts-file", file, "--skip-bad", "--stream")[1].count("--- prompt") == 3
    bad = write_lines(tmp_path / "z.txt", [texts[1]])
    code, stdout, stderr = script("--prompts-file", bad, "--skip-bad")
    assert code == 2 and "no prompt is left" in stderr


@pytest.mark.parametrize(
    "name, content, place, flags",
    [
        ("x.txt", "%s\n\n%s\n", "line 2", []),
        ("x.csv", "text,id\n%s,1\n,2\n%s,3\n", "row 2", []),
        ("x.jsonl", '{"prompt": "%s"}\n{"prompt": ""}\n{"prompt": "%s"}\n', "line 2", []),
        ("x.txt", "%s\n  \n%s\n", "line 2", ["--chat"]),
        ("x.jsonl", '{"prompt": "%s"}\n{"messages": 1}\n{"prompt": "%s"}\n', "line 2", ["--chat"]),
    ],
)
def test_a_prompt_that_is_missing_is_left_out(name, content, place, flags, script, tmp_path):
    """The others are as in a file without it, but for their number."""
    texts = (ASK["content"].replace(",", ""), "I like the fox")
    file, out, alone = tmp_path / name, tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    file.write_text(content % texts)
    flags = [*flags, "--batch-size", 1]
    code, _, stderr = script("--prompts-file", file, "--output", out, *flags)
    assert code == 2 and f"{name}, {place}" in stderr and not out.exists()
    code, _, stderr = script("--prompts-file", file, "--output", out, "--skip-bad", *flags)
    assert code == 0 and f"left out: {file}, {place}" in stderr
    first, bad, last = read_json_lines(out)
    assert bad["finish_reason"] == "refused" and f"{name}, {place}" in bad["error"]
    script("--prompts-file", write_lines(tmp_path / "y.txt", texts), "--output", alone, *flags)
    assert [x["token_ids"] for x in (first, last)] == [x["token_ids"] for x in read_json_lines(alone)]


@pytest.mark.parametrize(
    "name, rows",
    [
        ("x.json", [{"messages": [ASK, SAID, MORE]}, {"prompt": ASK["content"]}]),
        ("x.jsonl", [{"messages": [ASK, SAID, MORE], "id": 2}]),
        ("x.json", {"messages": [ASK]}),
        ("x.json", [ASK, SAID, MORE]),  # one conversation
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_conversations_are_read_however_json_is_written(name, rows, indent, script, tmp_path):
    """Oracle: the same objects in lines."""
    file, lines, out = tmp_path / name, tmp_path / "lines.jsonl", [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    file.write_text(json.dumps(rows, indent=indent))
    rows = rows if isinstance(rows, list) else [rows]
    write_prompts(lines, *([{"messages": rows}] if "role" in rows[0] else rows))
    for source, output in zip((file, lines), out):
        code, _, stderr = script("--chat", "--prompts-file", source, "--output", output)
        assert code == 0, stderr
    assert read_json_lines(out[0]) == read_json_lines(out[1])


@pytest.mark.parametrize(
    "name, lines",
    [
        ("x.jsonl", [[ASK], [MORE]]),
        ("x.json", [[[ASK], [ASK, SAID, MORE]]]),
        ("x.jsonl", [ASK, SAID, MORE]),
        ("x.json", [ASK]),
    ],
)
def test_messages_in_other_forms_are_refused_with_the_one_that_is_read(name, lines, script, tmp_path):
    write_lines(tmp_path / name, [json.dumps(line) for line in lines])
    code, _, stderr = script("--chat", "--prompts-file", tmp_path / name)
    form = 'its messages are not in conversations; write each as {"messages": [{'
    assert code == 2 and f"{name}: {form}" in stderr
    assert len(stderr.splitlines()) == 1


def test_a_list_of_conversations_names_its_row(script, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"messages": [ASK]}, {"messages": []}]))
    code, _, stderr = script("--chat", "--prompts-file", tmp_path / "x.json")
    assert code == 2 and "x.json, row 2: " in stderr
    code, _, stderr = script("--prompts-file", tmp_path / "x.json", "--skip-bad")
    assert code == 2 and "it holds messages; add --chat" in stderr


def test_a_conversation_that_the_template_refuses_is_left_out(script, tmp_path):
    """A template that breaks a limit is another matter: it ends the run."""
    save_tiny_model(
        tmp_path / "model",
        chat_template="{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}"
        "{% if messages[0].content == 'x' %}{% for i in range(9999) %}{% for j in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}",
    )
    file = write_prompts(tmp_path / "x.jsonl", {"messages": [ASK, SAID, MORE]}, {"messages": [ASK]})
    flags = ["--model", tmp_path / "model", "--chat", "--prompts-file", file, "--skip-bad"]
    out = tmp_path / "out.jsonl"
    assert script(*flags, "--output", out)[0] == 0
    assert ["one only" in line.get("error", "") for line in read_json_lines(out)] == [True, False]


DEFAULTS = {  # name: (generation_config.json, flags, what generate is given, what the note holds)
    "drawn": (
        {"do_sample": True, "temperature": 1.7, "top_p": 0.9},
        [],
        {},
        ("temperature 1.7", "top_p 0.9", "top_k 50", "(drawn)"),
    ),
    "a flag wins": (
        {"do_sample": True, "temperature": 1.7, "top_p": 0.9},
        ["--top-p", 0.5, "--top-k", 7],
        {"top_p": 0.5, "top_k": 7},
        ("temperature 1.7", "(drawn)"),
    ),
    "temperature 0 wins": (
        {"do_sample": True, "temperature": 1.7},
        ["--temperature", 0],
        {"do_sample": False, "temperature": None},
        ("top_k 50", "(greedy)"),
    ),
    "greedy with a penalty": (
        {"temperature": 0.2, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        ["--no-repeat-ngram-size", 0],
        {"no_repeat_ngram_size": 0},
        ("repetition_penalty 1.4 (greedy)",),
    ),
    "what is not computed here": (
        {"sequence_bias": [[[5], 1.0]]},
        [],
        None,
        ("nothing (greedy)", "sequence_bias"),
    ),
}


@pytest.mark.parametrize("config, flags, given, parts", DEFAULTS.values(), ids=DEFAULTS)
def test_the_models_own_settings_are_those_of_generate(config, flags, given, parts, script, tiny, tmp_path):
    """Oracle: generate with the model's own configuration, and with what the flags say on top."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    ends = {"eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps({**ends, **config}))
    out = tmp_path / "out.jsonl"
    flags = ["--model", folder, "--prompt", ASK["content"], "--use-model-defaults", "--plain-step", *flags]
    code, _, stderr = script(*flags, "--output", out, "--seed", 3, "--max-new-tokens", 20)
    note = stderr.splitlines()[0]
    assert code == 0 and note.startswith("note: the generation_config.json of"), stderr
    assert [part for part in parts if part not in note] == []
    if given is None:
        return
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(ASK["content"], return_tensors="pt")
    torch.manual_seed(3)
    ids = model.generate(**inputs, max_new_tokens=20, **given)[0, inputs["input_ids"].shape[1] :]
    assert read_json_lines(out)[0]["token_ids"] == ids.tolist()


# What is typed ------------------------------------------------------------------------------------


@pytest.fixture
def typed(tiny, call_script):
    """Return a function that types lines into a conversation; returns its answers and what else it
    said.
    """

    def run(*lines: str, flags: tuple = ()) -> tuple[list[str], str]:
        command = ["generate.py", "--interactive", "--model", tiny, "--precision", "fp32", *flags]
        done = call_script(*command, "--max-new-tokens", 12, stdin="".join(f"{line}\n" for line in lines))
        return done.stdout.split("\n")[:-1], done.stderr

    return run


def test_commands_of_a_conversation(typed, tmp_path):
    file, first, second = tmp_path / "talk.jsonl", ASK["content"], MORE["content"]
    answers, said = typed(
        first, second, f"/save {file}", "/retry", "/reset", first, f"/load {file}", "/retry", "/exit", first
    )
    assert answers[2] == answers[1] == answers[4] and answers[3] == answers[0] and len(answers) == 5, said
    [line] = read_json_lines(file)
    contents = [message["content"] for message in line["messages"]]
    assert contents == [first, answers[0], second, answers[1]]
    # the file is also one of prompts
    assert "saved: 4 messages" in said and "loaded: 4 messages" in said
    with_system, _ = typed(first, flags=("--system", "Be short."))
    answers, said = typed("/system Be short.", first, "/system", "/reset", first)
    assert answers[0] == with_system[0] != answers[1]
    assert said.count("no system message from the next answer on") == 1, said


def test_a_typo_is_not_sent_to_the_model(typed, tmp_path):
    (tmp_path / "other.jsonl").write_text("{}\n")
    lines = {
        "/rest": "no such command; did you mean /reset?",
        "/usr/bin/python is a program?": "/help lists them",
        "/save": "write /save FILE",
        "/reset now": "write /reset",
        "/retry": "no question yet",
        f"/save {tmp_path}/x.jsonl": "nothing was said yet",
        f"/load {tmp_path}/no.jsonl": "can't be read",
        f"/load {tmp_path}/other.jsonl": "a list of messages",
        "/help": "/system TEXT  another system message",
    }
    answers, said = typed(*lines)
    assert answers == [] and [text for text in lines.values() if text not in said] == [], said
    answers, _ = typed(" /usr/bin/python is a program?")
    assert len(answers) == 1
    answers, said = typed(ASK["content"], f"/save {tmp_path}/other.jsonl")
    assert "it exists; name a new file" in said and (tmp_path / "other.jsonl").read_text() == "{}\n"
    answers, said = typed(ASK["content"], f"/save {tmp_path}/{'a' * 300}", ASK["content"])
    assert "name another file" in said and len(answers) == 2, "the conversation goes on"


LEFT, UP, CTRL_C, CTRL_D = "\x1b[D", "\x1b[A", "\x03", "\x04"
PROMPT = "\x1b[?2004h> "  # readline has the terminal
PASTED = "\x1b[200~{}\x1b[201~"  # how a terminal marks what is pasted


def test_a_conversation_at_a_terminal(forking, tmp_path, cache_dir):
    """Arrow keys edit a line and bring back the last one, pasted lines are one message, Ctrl-C ends
    an answer, of which what was said stays if it is wanted, and at the prompt it takes back the
    line.
    """
    model = save_tiny_model(tmp_path / "model", context=9000)
    file, long = (
        tmp_path / "talk.jsonl",
        ["--max-new-tokens", 4000, "--min-new-tokens", 4000, "--temperature", 1],
    )
    flags = ["--model", model, "--precision", "fp32", "--cache-dir", cache_dir, "--interactive", *long]
    talk = OnTerminal(forking, "generate.py", *flags, TERM="xterm")
    answer_and_stop(talk, f"a sky{LEFT * 3}blue \r", keep="y")
    answer_and_stop(talk, f"{UP}!\r", keep="y")
    answer_and_stop(talk, PASTED.format("first\nsecond") + "\r", keep="n")
    talk.wait_for(PROMPT)
    talk.type("/rset\r")
    talk.wait_for("did you mean /reset?")
    talk.wait_for(PROMPT)
    talk.type("half a line")
    talk.wait_for("half a line")
    time.sleep(0.5)  # readline waits for a key again: CPython sees a signal before that with the next key
    talk.type(CTRL_C)
    talk.wait_for("ends the conversation")
    talk.wait_for(PROMPT)
    talk.type(f"/save {file}\r")
    talk.wait_for("saved: 4 messages")
    answer_and_stop(talk, "/retry\r", keep="y")
    talk.wait_for(PROMPT)
    talk.type(f"/save {file}\r")
    talk.wait_for("saved: 6 messages")
    talk.wait_for(PROMPT)
    talk.type(CTRL_D)
    code, written = talk.end()
    assert code == 0 and "^[[" not in written, written
    [line] = read_json_lines(file)
    asked = [message["content"] for message in line["messages"][::2]]
    assert asked == ["a blue sky", "a blue sky!", "first\nsecond"]
    assert all(message["content"].strip() for message in line["messages"][1::2])


def answer_and_stop(talk: OnTerminal, keys: str, *, keep: str) -> None:
    """Type a message, and end its answer after a moment."""
    talk.wait_for(PROMPT)
    talk.type(keys)
    talk.wait_for("\x1b[?2004l")  # readline has taken the line
    talk.wait_for_more(20)  # a part of the answer
    talk.type(CTRL_C)
    talk.wait_for("keep what was said? [y/N] ")
    talk.type(f"{keep}\r")
    talk.wait_for("kept" if keep == "y" else "forgotten")
