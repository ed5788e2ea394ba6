"""generate.py through its command line: with a small model for every mode, with the bundled model
for what a user gets.
"""

import collections
import contextlib
import io
import itertools
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
import tty
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate
from common import bundled, cli
from common.compiler import find_compiler
from common.generation import explain, scoring
from common.generation.conversation import Chat
from conftest import ROOT, generate_on_cpu, heavy, read_json_lines
from hub_server import HubServer
from language_models import PROMPTS, needs_compiler, save_tiny_model

REAL = "bundled/SmolLM2-135M-Instruct"
TUTORIAL = "Natural Language Processing is"


@pytest.fixture
def script(tiny, capsys, monkeypatch):
    """Return a function that runs generate.py in this process, in fp32 unless told otherwise;
    returns code, stdout, stderr.
    """

    def run(*flags, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", StandardInput(stdin))
        return generate_on_cpu(flags, tiny, 16), *capsys.readouterr()

    return run


class StandardInput:
    """Standard input that holds a text and is no terminal."""

    def __init__(self, text: str):
        self.lines, self.buffer = iter(text.splitlines(keepends=True)), self
        self.content = io.BytesIO(text.encode())

    def read(self, size: int = -1) -> bytes:
        return self.content.read(size)

    def readline(self) -> str:
        return next(self.lines, "")

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError("no file")


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


def prompt_flags(count: int = len(PROMPTS)) -> list[str]:
    return [part for prompt in PROMPTS[:count] for part in ("--prompt", prompt)]


CHECKED = {
    "greedy": [],
    "top-k": ["--top-k", 20],
    "top-p": ["--top-p", 0.9, "--seed", 4],
    "bf16": ["--precision", "bf16", "--top-k", 50],
    "samples": ["--top-k", 9, "--num-samples", 3],
    "all": [
        "--temperature",
        1.2,
        "--top-k",
        40,
        "--top-p",
        0.95,
        "--min-p",
        0.01,
        "--typical-p",
        0.95,
        "--repetition-penalty",
        1.2,
        "--no-repeat-ngram-size",
        3,
        "--min-new-tokens",
        4,
    ],
    "what other programs have": [
        *(
            "--presence-penalty",
            0.6,
            "--frequency-penalty",
            0.3,
            "--logit-bias",
            "20=2",
            "--ban-words",
            "the,lazy",
        ),
        *("--top-n-sigma", 2, "--epsilon-cutoff", 1e-4, "--eta-cutoff", 1e-3, "--xtc-probability", 0.5),
        *("--xtc-threshold", 0.02, "--batch-size", 3),
    ],
    "beams": ["--num-beams", 3, "--num-samples", 2, "--length-penalty", 0.5, "--early-stopping", "never"],
    "stop strings": ["--stop", "e", "--stop", "the l", "--temperature", 1.5],
    "end tokens": ["--end-token", "e", "--end-token", "s", "--temperature", 2.0],
    "lookup": ["--lookup", 4, "--max-new-tokens", 60],
    "chat": ["--chat", "--system", "Be short.", "--top-k", 9],
    "batches": ["--batch-size", 2, "--top-k", 9],
    "temperature 0 is greedy": ["--temperature", 0, "--top-k", 5],
}


@pytest.mark.parametrize("flags", CHECKED.values(), ids=CHECKED)
def test_check_finds_every_token_equal(flags, script):
    code, stdout, stderr = script(*prompt_flags(4), *flags, "--check")
    assert code == 0, stdout + stderr
    found = re.fullmatch(r"equal: (\d+) of (\d+) tokens\n", stdout)
    assert found[1] == found[2] and int(found[1]) >= 4


def test_check_shows_the_first_difference_and_ends_with_1(script, monkeypatch):
    """generate is told another temperature, as if one of the two were wrong."""
    right = explain.generation_config

    def wrong(*args):
        config = right(*args)
        config.temperature = 3.0
        return config

    monkeypatch.setattr(explain, "generation_config", wrong)
    code, stdout, _ = script(*prompt_flags(2), "--temperature", 0.8, "--check")
    assert code == 1
    head, ours, theirs, *hint = stdout.strip().splitlines()
    assert ["--plain-step" in line for line in hint] == [True] * (find_compiler() is not None)
    assert re.fullmatch(r"different: prompt 1, sample 1, token \d+; the \d+ before it are equal", head)
    for name, line in (("ours", ours), ("generate", theirs)):
        assert re.fullmatch(rf"{name} +'.*' \(id \d+\), logit -?[\d.]+, continues: '.*'", line), line


def test_the_text_is_the_librarys(script, tiny):
    """Oracle: tokenizer, generate and decode, as the tutorial calls them."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    expected = tokenizer.decode(
        model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :],
        skip_special_tokens=True,
    )
    for flags in ([], ["--stream"], ["--no-stream"], ["--sampler", "independent"], ["--lookup", 3]):
        code, stdout, stderr = script("--prompt", PROMPTS[0], *flags)
        assert (code, stdout) == (0, expected + "\n")
        assert re.match(
            r"prompt \d+ tokens, [\d.,]+ tokens/s; text \d+ tokens, [\d.,]+ tokens/s; first token after"
            r" [\d.]+ s; peak memory [\d,]+ MB",
            stderr,
        )
    assert "guessed tokens accepted" in stderr


def test_words_are_banned_and_tokens_are_biased(script, tiny, tmp_path):
    """Oracle: the tokens of the texts; a token by its text and by its id is the same one."""
    tokenizer, flags = AutoTokenizer.from_pretrained(tiny), [*prompt_flags(4), "--max-new-tokens", 40]

    def tokens(*more) -> list[list[int]]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        code, _, stderr = script(*flags, *more, "--output", path)
        assert code == 0, stderr
        return [line["token_ids"] for line in read_json_lines(path)]

    plain = tokens()
    counts = collections.Counter(itertools.chain(*plain))
    common = [token for token, _ in counts.most_common() if tokenizer.decode(token).isalpha()][0]
    word = tokenizer.decode(common)
    banned = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (word, " " + word)}
    for row in tokens("--ban-words", f"{word},nothing\\,else"):
        assert not {tuple(row[n : n + size]) for size in (1, 2, 3) for n in range(len(row))} & banned
    by_text, by_id = tokens("--logit-bias", f"{word}=50"), tokens("--logit-bias", f"{common}=50")
    assert by_text == by_id and all(set(row) == {common} for row in by_text)
    assert all(common not in row for row in tokens("--logit-bias", f"{word}=-1e2".replace("1e2", "100")))
    assert any(common in row for row in plain)


def test_explain_shows_where_xtc_strikes(script):
    flags = ["--temperature", 1.5, "--xtc-probability", 0.5, "--xtc-threshold", 0.01, "--max-new-tokens", 12]
    for sampler in ("exact", "independent"):
        _, text, _ = script("--prompt", PROMPTS[0], *flags, "--sampler", sampler)
        code, stdout, stderr = script("--prompt", PROMPTS[0], *flags, "--sampler", sampler, "--explain")
        assert code == 0 and stdout.endswith("\n" + text), stderr
        shares = re.findall(r"^>.*", stdout, re.M)
        assert len(shares) == 12 and all(not line.rstrip().endswith("-") for line in shares)  # drawn: kept
        assert stdout.count("XTC 0.01") == 12


@needs_compiler
def test_the_summary_says_where_a_draw_need_not_be_generates(script):
    """Drawn tokens of the step in C, within its rounding; greedy ones and the library's have no note."""
    for flags, says in (([], False), (["--top-k", 5], True), (["--top-k", 5, "--plain-step"], False)):
        _, _, stderr = script("--prompt", PROMPTS[0], *flags)
        assert ("rounding can change a drawn token" in stderr) == says, stderr


@pytest.mark.parametrize(
    "terminal, flags, streams",
    [(True, [], True), (False, [], False), (True, ["--no-stream"], False), (False, ["--stream"], True)],
)
def test_a_text_grows_on_a_terminal(terminal, flags, streams, script, monkeypatch):
    whole, pieces = script("--prompt", PROMPTS[0], "--no-stream")[1], []
    show = generate.show
    monkeypatch.setattr(generate, "show", lambda text: (pieces.append(text), show(text)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert script("--prompt", PROMPTS[0], *flags)[1] == whole
    assert "".join(pieces) == (whole.rstrip("\n") if streams else "") and (len(pieces) > 5) == streams


def test_stop_strings_are_no_part_of_a_text(script):
    whole = script("--prompt", PROMPTS[0])[1].rstrip("\n")
    stop = whole[5:8]
    for flags in (["--stream"], ["--no-stream"]):
        assert script("--prompt", PROMPTS[0], "--stop", stop, *flags)[1] == whole[: whole.find(stop)] + "\n"


def test_a_stop_string_can_be_a_line_break_a_tab_or_a_backslash(script, monkeypatch):
    """As it arrives from a shell: a backslash and a letter."""
    stops, load = [], generate.load

    def loaded(args):
        stops.append(args.stop)
        return load(args)

    monkeypatch.setattr(generate, "load", loaded)
    given = [r"\n", r"a\tb", r"\\n", r"\x", "plain"]
    assert script("--prompt", PROMPTS[0], *(part for stop in given for part in ("--stop", stop)))[0] == 0
    assert stops == [["\n", "a\tb", r"\n", r"\x", "plain"]]


def test_the_summary_says_which_texts_were_cut(script):
    """Oracle: the finish reasons in the output file are those of texts with the most tokens."""
    stderr = script("--prompt", PROMPTS[0])[2]
    assert "; cut at 16 tokens" in stderr
    flags = ["--top-k", 30, "--num-samples", 6, "--temperature", 2, "--stop", "e", "--max-new-tokens", 9]
    _, stdout, stderr = script("--prompt", PROMPTS[0], *flags)
    [found] = re.findall(r"; (\d) of 6 cut at 9 tokens", stderr)
    assert 0 < int(found) < 6
    assert "cut at" not in script("--prompt", PROMPTS[0], "--stop", "e", "--max-new-tokens", 100)[2]


def test_each_batch_has_a_seed_that_draws_it_again(script, tmp_path):
    """The same prompt in three batches gives three texts, and the seed in a line draws its batch
    without those before it.
    """
    script(
        *["--prompt", PROMPTS[0]] * 3,
        "--batch-size",
        1,
        "--top-k",
        20,
        "--seed",
        3,
        "--output",
        tmp_path / "out.jsonl",
    )
    lines = read_json_lines(tmp_path / "out.jsonl")
    assert (
        [line["seed"] for line in lines] == [3, 3, 3]
        and lines[0]["batch_seed"] == 3
        and len({line["text"] for line in lines}) == 3
    )
    for line in lines:
        assert (
            script("--prompt", PROMPTS[0], "--top-k", 20, "--seed", line["batch_seed"])[1]
            == line["text"] + "\n"
        )


def test_prompts_come_from_flags_files_and_standard_input(script, prompts_file, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": prompt}, ensure_ascii=False) + "\n" for prompt in PROMPTS),
        encoding="utf-8",
    )
    from_flags = script(*prompt_flags())[1]
    assert from_flags.count("--- prompt ") == len(PROMPTS)
    assert script("--prompts-file", prompts_file)[1] == from_flags
    assert script("--prompts-file", "-", stdin=prompts_file.read_text("utf-8"))[1] == from_flags
    assert script("--prompts-file", tmp_path / "rows.jsonl", "--text-column", "question")[1] == from_flags
    assert script(*prompt_flags(1), "--prompts-file", prompts_file)[1].startswith(
        from_flags.split("--- prompt 2")[0]
    )


def test_files_are_read_as_their_flags_say(script, tmp_path):
    """A table without a header or an ending, in another encoding, with quotation marks as text:
    prompts, references, texts to score. Oracle: the same texts as flags and as lines.
    """
    rows = ['1|Straße "A|it is blue', "2|naïve|it is not"]
    (tmp_path / "table").write_text("\n".join(rows) + "\n", encoding="latin-1")
    flags = ["--columns", "id,question,answer", "--delimiter", "pipe", "--quoting", "none"]
    flags += ["--encoding", "latin-1", "--text-column", "question"]
    expected = script("--prompt", 'Straße "A', "--prompt", "naïve")[1]
    code, stdout, stderr = script("--prompts-file", tmp_path / "table", *flags)
    assert (code, stdout) == (0, expected), stderr
    (tmp_path / "texts.txt").write_text("it is blue\nit is not\n")
    scored = [tmp_path / "table", "--references", tmp_path / "table", *flags[:-1], "answer"]
    same = script("--score", *scored, "--reference-column", "answer")
    assert same[:2] == script("--score", tmp_path / "texts.txt", "--references", tmp_path / "texts.txt")[:2]
    (tmp_path / "text.txt").write_text("Straße, naïve, façade", encoding="latin-1")
    (tmp_path / "utf-8.txt").write_text("Straße, naïve, façade", encoding="utf-8")
    found = script("--perplexity", tmp_path / "text.txt", "--encoding", "latin-1")
    assert found[:2] == script("--perplexity", tmp_path / "utf-8.txt")[:2] and found[0] == 0


def test_the_output_file_holds_everything(script, tiny, tmp_path):
    """Oracles: the tokenizer's decode, and log-softmax of one pass over prompt and text."""
    code, stdout, _ = script(
        *prompt_flags(3),
        "--output",
        tmp_path / "out.jsonl",
        "--logprobs",
        4,
        "--top-k",
        30,
        "--num-samples",
        4,
        "--seed",
        9,
        "--temperature",
        2,
        "--end-token",
        "e",
        "--end-token",
        "s",
        "--stop",
        "t",
        "--stop",
        "a",
    )
    assert (code, stdout) == (0, "")
    lines = read_json_lines(tmp_path / "out.jsonl")
    assert [(line["prompt_number"], line["sample"], line["prompt"]) for line in lines] == [
        (n + 1, s, PROMPTS[n]) for n in range(3) for s in (1, 2, 3, 4)
    ]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    assert {line["finish_reason"] for line in lines} == {"end", "stop", "length"}
    for line in lines:
        assert (
            line["seed"] == 9
            and line["settings"]["top_k"] == 30
            and line["settings"]["precision"] == "float32"
        )
        ids, ends = line["token_ids"], line["settings"]["end_ids"]
        text, before = (
            tokenizer.decode([number for number in part if number not in ends], skip_special_tokens=True)
            for part in (ids, ids[:-1])
        )
        assert line["text"] == re.split("[ta]", text)[0] and line["text"].startswith(
            re.split("[ta]", before)[0]
        )
        # nothing follows an end
        assert not set(ids[:-1]) & set(ends) and not re.search("[ta]", before)
        assert line["finish_reason"] == (
            "end" if ids[-1] in ends else "stop" if re.search("[ta]", text) else "length"
        )
        assert (len(ids) == 16) >= (line["finish_reason"] == "length")
        prompt = tokenizer(line["prompt"])["input_ids"]
        with torch.inference_mode():
            scores = (
                model(torch.tensor([prompt + line["token_ids"]]))
                .logits[0]
                .log_softmax(-1)[len(prompt) - 1 : -1]
            )
        for place, found in enumerate(line["logprobs"]):
            assert found["id"] == line["token_ids"][place] and found["token"] == tokenizer.decode(
                [found["id"]]
            )
            assert math.isclose(found["logprob"], scores[place, found["id"]].item(), abs_tol=1e-3)
            best = scores[place].topk(4)
            assert [entry["id"] for entry in found["top"]] == best.indices.tolist()
            assert [entry["logprob"] for entry in found["top"]] == pytest.approx(
                best.values.tolist(), abs=1e-3
            )


@pytest.mark.parametrize(
    "flags",
    [
        heavy([], id="greedy"),
        heavy(["--top-k", 20], id="exact"),
        pytest.param(["--top-k", 20, "--sampler", "independent", "--num-samples", 2], id="independent"),
    ],
)
@pytest.mark.parametrize(
    "cut", ["between lines", "within a line", "within a batch", "nothing there", "all there"]
)
def test_an_interrupted_output_goes_on(cut, flags, script, prompts_file, tmp_path):
    """Oracle: the file of an uninterrupted run, byte for byte."""
    flags = ["--prompts-file", prompts_file, "--batch-size", 2, *flags]
    script(*flags, "--output", tmp_path / "whole.jsonl")
    whole, part = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "part.jsonl"
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    group = len(ends) // 3
    part.write_bytes(
        {
            "between lines": whole[: ends[group - 1]],
            "within a line": whole[: ends[group - 1] + 50],
            "within a batch": whole[: ends[group]],
            "nothing there": b"",
            "all there": whole,
        }[cut]
    )
    code, _, stderr = script(*flags, "--output", part, "--resume")
    assert code == 0, stderr
    assert part.read_bytes() == whole


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), heavy(signal.SIGINT, 130)])
def test_a_signal_keeps_the_finished_lines_and_says_how_to_go_on(number, code, forking, tiny, tmp_path):
    """Stopped while it writes; then the same command with --resume gives the file of an uninterrupted run."""
    prompts, part, whole = tmp_path / "many.txt", tmp_path / "part.jsonl", tmp_path / "whole.jsonl"
    prompts.write_text(
        "\n".join(f"{prompt} {number}" for number in range(10) for prompt in PROMPTS) + "\n", encoding="utf-8"
    )
    command = ["--model", tiny, "--device", "cpu", "--precision", "fp32", "--prompts-file", prompts]
    command = list(map(str, [*command, "--batch-size", 4, "--max-new-tokens", 40, "--top-k", 20, "--output"]))
    forking.begin(command=["generate.py", *command, str(part)])
    [process] = forking.processes()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (part.exists() and part.read_bytes().count(b"\n") >= 8):
        time.sleep(0.002)
    os.kill(process, number)
    codes, stderr, kept = forking.wait(), forking.said(), read_json_lines(part)
    assert codes == [code] and 8 <= len(kept) < 60 and len(kept) % 4 == 0, stderr
    assert (
        f"{part} holds {len(kept)} of 60 texts;" in stderr
        and "--resume" in stderr
        and stderr.endswith("generate.py: interrupted\n")
    )
    for extra in ([part, "--resume"], [whole]):
        cli.run(generate.make_parser(), generate.main, [*command, *map(str, extra)])
    assert part.read_bytes() == whole.read_bytes()


def test_two_processes_give_the_same_file_in_the_same_order(
    call_script, script, tiny, prompts_file, tmp_path
):
    flags = ["--prompts-file", prompts_file, "--batch-size", 2, "--top-k", 20]
    script(*flags, "--output", tmp_path / "one.jsonl")
    flags += ["--model", tiny, "--device", "cpu", "--precision", "fp32", "--max-new-tokens", 16]
    call_script("generate.py", *flags, "--output", tmp_path / "two.jsonl", world=2)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def under_torchrun(run_script, model, *flags):
    """Run generate.py in two processes, as torchrun starts them, and return what it did."""
    torchrun = ["torchrun", "--nproc-per-node", 2, "generate.py", "--model", model, "--device", "cpu"]
    flags = ["--precision", "fp32", "--max-new-tokens", 16, *flags]
    return run_script(*torchrun, *flags, OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_torchrun_gives_the_same_file_in_the_same_order(run_script, script, tiny, prompts_file, tmp_path):
    """The processes of the test above, started as users start them."""
    flags = ["--prompts-file", prompts_file, "--batch-size", 2, "--top-k", 20, "--output"]
    script(*flags, tmp_path / "one.jsonl")
    under_torchrun(run_script, tiny, *flags, tmp_path / "two.jsonl")
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.slow
def test_torchrun_goes_on_after_what_is_there(run_script, script, tiny, prompts_file, tmp_path):
    """One batch of three is there: of the two processes, each has one left."""
    flags, whole, part = (
        ["--prompts-file", prompts_file, "--batch-size", 2, "--top-k", 20],
        tmp_path / "whole.jsonl",
        tmp_path / "part.jsonl",
    )
    script(*flags, "--output", whole)
    part.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:3])[:-9])
    done = under_torchrun(run_script, tiny, *flags, "--output", part, "--resume")
    assert part.read_bytes() == whole.read_bytes() and f"{part}: it already holds 2 of 6 texts" in done.stdout


WITHOUT_STDERR = """
import os, runpy, sys
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_on_a_terminal_the_first_text_of_each_batch_grows(forking, script, tiny, tmp_path):
    """A terminal of its own: what it shows is what a pipe gets, and it comes in pieces."""
    flags = [*prompt_flags(3), "--top-k", 20, "--max-new-tokens", 100]
    piped = script(*flags)[1].encode()
    ours, theirs = pty.openpty()
    tty.setraw(theirs)  # it changes no byte
    flags += ["--model", tiny, "--device", "cpu", "--precision", "fp32"]
    quiet, pieces = tmp_path / "quiet.py", []
    quiet.write_text(WITHOUT_STDERR)
    forking.begin(command=list(map(str, [quiet, "generate.py", *flags])), terminal=os.ttyname(theirs))
    while select.select([ours, forking.process.stdout], [], [])[0] != [forking.process.stdout]:
        pieces.append(os.read(ours, 1 << 16))
    os.close(theirs)
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while piece := os.read(ours, 1 << 16):
            pieces.append(piece)
    os.close(ours)
    assert forking.wait() == [0] and b"".join(pieces) == piped
    assert sum(b"--- prompt 2" not in piece for piece in pieces) > 5  # prompt 1 grew


def test_explain_shows_each_token_and_then_the_text(script):
    plain = script("--prompt", PROMPTS[0], "--top-k", 20, "--top-p", 0.9, "--seed", 3)[1]
    code, stdout, _ = script("--prompt", PROMPTS[0], "--top-k", 20, "--top-p", 0.9, "--seed", 3, "--explain")
    assert (
        code == 0
        and stdout.count("one of ") == 16 == len(re.findall(r"^>", stdout, re.MULTILINE))
        and stdout.endswith("\n" + plain)
    )
    assert re.search(r"candidate +model +top-k 20 +top-p 0.9", stdout) and "█" in stdout


@pytest.mark.parametrize(
    "flags",
    [
        ["--end-token", "e", "--end-token", "s", "--end-token", "a"],
        ["--sampler", "independent"],
        ["--stop", "e"],
    ],
    ids=" ".join,
)
def test_the_text_of_an_explanation_is_the_plain_one(flags, script):
    """Without its end token, and by the sampler that was asked for."""
    flags = ["--prompt", PROMPTS[0], "--temperature", 1.5, "--seed", 3, *flags]
    plain = script(*flags)[1]
    assert script(*flags, "--explain")[1].endswith("\n\n" + plain) and len(plain) > 1


def test_compare_shows_three_texts_side_by_side(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, stdout, _ = script("--prompt", PROMPTS[0], "--compare", "--top-p", 0.8)
    head, rule, *rows = stdout.splitlines()
    assert (
        code == 0
        and re.fullmatch(r"greedy +top-k 50 +top-p 0.8 *", head)
        and all(len(row) <= 100 for row in stdout.splitlines())
    )
    columns = [slice(match.start(), match.end()) for match in re.finditer("-+", rule)]
    for column, flags in zip(columns, ([], ["--top-k", 50], ["--top-p", 0.8])):
        text = script("--prompt", PROMPTS[0], *flags)[1]
        assert "".join("".join(row[column].split()) for row in rows) == "".join(
            char for char in text if char.isprintable() and char != " "
        )


def test_a_conversation_keeps_its_cache_and_answers_as_if_it_had_none(script, tiny, monkeypatch):
    """Oracle: each answer anew from the whole conversation, through --chat and the library's
    template.
    """
    turns, read = ["Why is the sky blue?", "And the light?", "你好"], []
    begin_turn = Chat.begin_turn

    def spy(self, text):
        turn = begin_turn(self, text)
        read.append((len(turn.answer.prompt.ids), turn.batch.cache.get_seq_length()))
        return turn

    monkeypatch.setattr(Chat, "begin_turn", spy)
    code, stdout, _ = script(
        "--interactive", "--system", "Be short.", stdin="\n".join([*turns, "/reset", turns[0]]) + "\n"
    )
    assert code == 0
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    expected, messages = [], []
    for turn in [*turns, "/reset", turns[0]]:
        messages = (
            [{"role": "system", "content": "Be short."}] if turn == "/reset" or not messages else messages
        )
        if turn != "/reset":
            messages = [*messages, {"role": "user", "content": turn}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
            messages.append({"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)})
            expected.append(messages[-1]["content"])
    assert stdout == "".join(answer + "\n" for answer in expected)
    assert read[0][1] == 0 and read[3][1] == 0  # the first turn, and the one after /reset
    assert all(cached > 0.6 * before for (before, _), (_, cached) in zip(read[:2], read[1:3]))


def test_texts_are_scored(script, prompts_file, tmp_path):
    references = tmp_path / "references.txt"
    references.write_text("\n".join(["the quick brown fox"] * len(PROMPTS)) + "\n")
    code, stdout, _ = script(
        "--prompts-file", prompts_file, "--output", tmp_path / "out.jsonl", "--references", references
    )
    assert code == 0 and re.match(
        rf"ROUGE, mean F1 over {len(PROMPTS)} texts\nrouge1 +[\d.]+\nrouge2 +[\d.]+\nrougeL"
        r" +[\d.]+\nrougeLsum +[\d.]+\n",
        stdout,
    )
    assert script("--score", tmp_path / "out.jsonl", "--references", references)[1] == stdout


def test_texts_without_a_word_that_counts_are_named(script, tmp_path):
    (tmp_path / "said.txt").write_text("the fox\n你好\n\n天气\n", encoding="utf-8")
    (tmp_path / "right.txt").write_text("the fox\na hello\n\na dog\n", encoding="utf-8")
    code, stdout, stderr = script("--score", tmp_path / "said.txt", "--references", tmp_path / "right.txt")
    assert code == 0 and "rouge1    0.2500" in stdout
    assert re.fullmatch(r"2 of 4 texts score 0: ROUGE [^\n]+ letters a to z [^\n]+\n", stderr)


def test_bits_a_byte_are_those_of_the_scored_tokens(script, tiny, tmp_path):
    """Oracle: the library's loss over the tokens that are scored, and their own bytes."""
    text = "The quick brown fox jumps over the lazy dog. "
    (tmp_path / "text.txt").write_text(text)
    stdout = script("--perplexity", tmp_path / "text.txt")[1]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    bits = (
        model(ids, labels=ids).loss.item()
        * (ids.shape[1] - 1)
        / math.log(2)
        / len(tokenizer.decode(ids[0, 1:]).encode())
    )
    assert float(re.search(r"([\d.]+) bits per byte", stdout)[1]) == pytest.approx(bits, abs=2e-4)


def test_perplexity_of_a_file(script, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    code, stdout, _ = script("--perplexity", tmp_path / "text.txt", "--window", 64)
    found = re.fullmatch(
        r"perplexity ([\d.,]+) over (\d+) tokens \(window 64, stride 32\); [\d.]+ bits per byte\n", stdout
    )
    assert code == 0 and float(found[1].replace(",", "")) > 1


def test_weights_in_several_files_are_those_of_one(script, tiny, tmp_path):
    """In C and in the library's forward; a file that is missing, cut off or not listed is one line."""
    folder, text = tmp_path / "in-parts", ("--prompt", PROMPTS[0])
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="40KB")
    for file in tiny.iterdir():
        if not (folder / file.name).exists() and file.name != "model.safetensors":
            shutil.copy(file, folder)
    shards, listed = sorted(folder.glob("model-*.safetensors")), folder / "model.safetensors.index.json"
    assert len(shards) > 2
    for flags in (text, (*text, "--plain-step"), (*text, "--top-k", 5, "--check")):
        assert script(*flags, "--model", folder)[:2] == script(*flags)[:2] and script(*flags)[0] == 0
    index = json.loads(listed.read_text())
    part = {name: file for name, file in index["weight_map"].items() if file != shards[1].name}
    listed.write_text(json.dumps(index | {"weight_map": part}))
    code, stdout, stderr = script(*text, "--model", folder)
    assert (code, stdout) == (2, "") and "its weights lack" in stderr and stderr.count("\n") == 1, stderr
    listed.write_text(json.dumps(index))
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    code, stdout, stderr = script(*text, "--model", folder)
    assert (code, stdout) == (2, "") and shards[1].name in stderr and stderr.count("\n") == 1, stderr
    shards[1].unlink()
    code, stdout, stderr = script(*text, "--model", folder)
    wanted = f"names {shards[1].name}, which is missing"
    assert (code, stdout) == (2, "") and wanted in stderr and stderr.count("\n") == 1, stderr


@pytest.mark.slow
def test_the_tutorials_command_loads_a_model_from_the_hub(run_script, call_script, tmp_path):
    """HuggingFaceTB/SmolLM-1.7B, here a small Llama behind a Hub of our own."""
    save_tiny_model(tmp_path / "hub" / "models" / "HuggingFaceTB" / "SmolLM-1.7B", chat_template=None)
    with HubServer(tmp_path / "hub") as hub:
        done = run_script(
            "generate.py",
            "--model",
            "HuggingFaceTB/SmolLM-1.7B",
            "--prompt",
            TUTORIAL,
            "--cache-dir",
            tmp_path / "cache",
            "--max-new-tokens",
            20,
            "--precision",
            "fp32",
            HF_HUB_OFFLINE="0",
            HF_ENDPOINT=hub.endpoint,
        )
        unknown = run_script(
            "generate.py",
            "--model",
            "HuggingFaceTB/SmolLM-17B",
            "--prompt",
            TUTORIAL,
            "--cache-dir",
            tmp_path / "cache",
            check=False,
            HF_HUB_OFFLINE="0",
            HF_ENDPOINT=hub.endpoint,
        )
    assert unknown.returncode == 2 and unknown.stdout == ""
    assert re.fullmatch(
        r"generate\.py: error: --model HuggingFaceTB/SmolLM-17B: neither a local folder nor a model on the"
        r" Hub [^\n]+\n",
        unknown.stderr,
    )
    local = call_script(
        "generate.py",
        "--model",
        tmp_path / "hub" / "models" / "HuggingFaceTB" / "SmolLM-1.7B",
        "--prompt",
        TUTORIAL,
        "--max-new-tokens",
        20,
        "--precision",
        "fp32",
    )
    assert done.stdout == local.stdout and len(done.stdout) > 20
    assert any(path.name == "model.safetensors" for path in (tmp_path / "cache").rglob("*"))


@pytest.fixture(scope="module")
def real() -> Path:
    """The bundled model, fetched from the package index and converted where the cache does not
    hold it yet.
    """
    return bundled.model_folder(REAL, kind="language model")


REAL_CHECKS = {
    "greedy, fp32": ["--precision", "fp32", "--max-new-tokens", 24],
    "top-k, bf16": ["--precision", "bf16", "--top-k", 50, "--seed", 1, "--max-new-tokens", 24],
    "left-padded, top-p, bf16": [
        "--precision",
        "bf16",
        "--top-p",
        0.92,
        "--temperature",
        0.8,
        "--prompt",
        "The capital of France",
        "--prompt",
        "Once upon a time, in a small village by the sea, there was",
        "--max-new-tokens",
        12,
    ],
    "chat": ["--precision", "fp32", "--chat", "--max-new-tokens", 24, "--repetition-penalty", 1.1],
    "few likely tokens, bf16": [
        "--precision",
        "bf16",
        "--top-k",
        3,
        "--temperature",
        2,
        "--seed",
        2,
        "--max-new-tokens",
        16,
    ],
    "little probability, bf16": [
        "--precision",
        "bf16",
        "--top-p",
        0.4,
        "--temperature",
        1.5,
        "--seed",
        2,
        "--max-new-tokens",
        16,
    ],
    "few typical tokens, bf16": [
        "--precision",
        "bf16",
        "--typical-p",
        0.3,
        "--min-p",
        0.01,
        "--temperature",
        1.5,
        "--seed",
        3,
        "--max-new-tokens",
        16,
    ],
    "n-grams of the prompt, fp32": [
        "--precision",
        "fp32",
        "--no-repeat-ngram-size",
        2,
        "--max-new-tokens",
        8,
        "--prompt",
        "The cat sat on the mat. The cat sat on",
    ],
    "lookup": [
        "--precision",
        "fp32",
        "--lookup",
        5,
        "--max-new-tokens",
        40,
        "--prompt",
        "The cat sat on the mat. The cat sat on the rug. The cat sat on",
    ],
    **{
        f"min-p, typical and n-grams, bf16, seed {seed}": [
            "--precision",
            "bf16",
            "--min-p",
            0.02,
            "--typical-p",
            0.95,
            "--no-repeat-ngram-size",
            2,
            "--seed",
            seed,
            "--prompt",
            "Once upon a time",
            "--max-new-tokens",
            12,
        ]
        for seed in (0, 1)
    },
}


QUICK_CHECKS = ("greedy, fp32",)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(flags, id=name) if name in QUICK_CHECKS else heavy(flags, id=name)
        for name, flags in REAL_CHECKS.items()
    ],
)
def test_the_real_model_gives_the_tokens_of_generate(flags, real, script):
    code, stdout, stderr = script("--model", REAL, "--prompt", TUTORIAL, *flags, "--check")
    assert code == 0 and re.fullmatch(r"equal: (\d+) of \1 tokens\n", stdout), stdout + stderr
    guesses = re.search(r"lookup: (\d+) of (\d+) guessed tokens accepted", stderr)
    assert bool(guesses) == ("--lookup" in flags) and (
        not guesses or 0 < int(guesses[1]) < int(guesses[2])
    ), "some guesses are right and some are wrong"


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_compiler
def test_the_real_models_loss_is_that_of_its_weights_in_fp32(real, tmp_path):
    """2,000 tokens with the file's 4-bit numbers in C, and in the library's model with the same
    numbers widened to fp32: the same natural logarithm a token, within 0.00001.
    """
    lines, losses = (ROOT / "docs/tutorial.md").read_text("utf-8").splitlines(), []
    for flags in ([], ["--plain-step"]):
        args = generate.make_parser().parse_args(
            ["--model", REAL, "--perplexity", "README.md", "--precision", "fp32", "--device", "cpu", *flags]
        )
        model = generate.load(args)[0].language_model
        assert model.model.is_compiled != bool(flags)
        text = model.tokenizer.decode(model.tokenizer("\n".join(lines))["input_ids"][:2000])
        window = scoring.choose_window(model, None, None, most=1024)
        found = scoring.text_likelihood(model, text, window, name="the tutorial")
        assert found.num_tokens > 1900
        losses.append(math.log(found.perplexity))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_real_models_texts_do_not_depend_on_their_neighbours(real, script):
    """The independent sampler in fp32, one text a batch and all three in one; a comma ends two of
    them early.
    """
    flags = [
        "--model",
        REAL,
        "--prompt",
        TUTORIAL,
        "--prompt",
        "Once upon a time",
        "--prompt",
        "The",
        "--sampler",
        "independent",
        "--top-p",
        0.98,
        "--temperature",
        1.3,
        "--end-token",
        ",",
    ]
    alone, together = (script(*flags, "--batch-size", size, "--max-new-tokens", 12)[1] for size in (1, 3))
    assert alone == together and alone.count("--- prompt") == 3


def test_the_real_model_answers_sensibly_and_speaks_its_template(real, script):
    """Greedy in fp32: a wrong conversion, tokenizer, template or position would not know the
    capital of France.
    """
    code, stdout, _ = script(
        "--model", REAL, "--chat", "--prompt", "What is the capital of France?", "--max-new-tokens", 24
    )
    assert code == 0 and re.fullmatch(r"[^\n]*Paris[^\n]*\n", stdout), (
        "no role above it, and nothing after its end"
    )


def test_the_real_model_loads_in_three_seconds(real, capsys):
    """Not a benchmark: the issue's limit, with room; without the conversion it takes twenty."""
    from common.generation import language_model
    from common.runtime import Runtime

    started = time.process_time()
    language_model.load(REAL, Runtime(torch.device("cpu"), "fp32"), cache_dir=None)
    assert time.process_time() - started < 3
