"""--score-continuations: log-probabilities of given texts, against a float64 sum over the model's logits."""

import json
import re

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate
from common.generation import continuations, language_model
from common.generation.continuations import Question, encode_pair
from common.generation.language_model import Loading
from common.runtime import Runtime
from conftest import exit_code_in_process, heavy
from language_models import needs_compiler, save_tiny_model

QUESTIONS = [
    ("The quick brown", [" fox", " dog jumps over the lazy light", " blue"], 0),
    ("Why is the sky ", ["blue?", "lazy", "dog because of the light of the sky"], 2),  # a space at its end
    ("def add(left, ri", ["ght):", "g", "\n    return left"], 1),  # in the middle of a word
    ("你", ["好", "好，世界"], 0),
    ("", ["The", "dog the dog"], 1),  # nothing before it
]


@pytest.fixture(scope="module", params=["with a start token", "without"])
def folder(request, tmp_path_factory):
    """A random Llama; its tokenizer puts a token before each text, or none."""
    path = save_tiny_model(tmp_path_factory.mktemp("models") / "llama")
    if request.param == "with a start token":
        tokenizer = AutoTokenizer.from_pretrained(path)
        backend = tokenizer.backend_tokenizer
        start = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
        tokenizer.save_pretrained(path)
    return path


def expected_score(folder, prompt: str, text: str) -> tuple[float, int]:
    """Return the log-probability of a text, token by token, each from a pass of its own in float64,
    and its number of tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    first = tokenizer("")["input_ids"] or []
    both = first + tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    before = first + (tokenizer(prompt.rstrip(" "), add_special_tokens=False)["input_ids"] if prompt else [])
    shared = next(n for n in range(len(both)) if n == len(before) or both[n] != before[n])
    if shared == 0:
        both, shared = [2, *both], 1
    total = 0.0
    for place in range(shared, len(both)):
        with torch.inference_mode():
            logits = model(torch.tensor([both[:place]])).logits[0, -1]
        total += logits.log_softmax(-1)[both[place]].item()
    return total, len(both) - shared


@pytest.fixture
def script(folder, capsys):
    """Return a function that runs generate.py in this process."""

    def run(*flags) -> tuple[int, str, str]:
        given = ["--model", folder, "--device", "cpu", "--precision", "fp32", *flags]
        return exit_code_in_process(generate, given), *capsys.readouterr()

    return run


def write_questions(path, questions):
    rows = [{"prompt": prompt, "choices": choices, "answer": answer} for prompt, choices, answer in questions]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("plain", [pytest.param(False, marks=needs_compiler), heavy(True)])
def test_scores_are_those_of_one_token_at_a_time_in_any_batch(script, folder, tmp_path, plain):
    path = write_questions(tmp_path / "questions.jsonl", QUESTIONS)
    files = []
    for size in (1, 3, 100):
        file = tmp_path / f"{size}.jsonl"
        flags = ["--score-continuations", path, "--output", file, "--batch-size", size]
        code, stdout, stderr = script(*flags, *(["--plain-step"] if plain else []))
        assert code == 0, stderr
        files.append([json.loads(line) for line in file.read_text("utf-8").splitlines()])
    right = dict.fromkeys(("total", "per_token", "per_character"), 0)
    for (prompt, choices, answer), *lines in zip(QUESTIONS, *files):
        expected = [expected_score(folder, prompt, text) for text in choices]
        measures = {
            "total": [total for total, _ in expected],
            "per_token": [total / count for total, count in expected],
            "per_character": [total / len(text) for (total, _), text in zip(expected, choices)],
        }
        for line in lines:
            assert [scored["text"] for scored in line["choices"]] == choices and line["answer"] == answer
            assert [scored["num_tokens"] for scored in line["choices"]] == [count for _, count in expected]
            for measure, values in measures.items():
                name = "logprob" if measure == "total" else measure
                found = [scored[name] for scored in line["choices"]]
                assert found == pytest.approx(values, abs=2e-5, rel=2e-5)
                assert line["likeliest"][measure] == values.index(max(values))
        for measure, values in measures.items():
            right[measure] += values.index(max(values)) == answer
    shares = [right[measure] / len(QUESTIONS) for measure in right]
    found = re.fullmatch(
        r"accuracy over 5 prompts: ([\d.]+) total, ([\d.]+) per token, ([\d.]+) per character\n", stdout
    )
    assert [float(share) for share in found.groups()] == pytest.approx(shares, abs=1e-4)


def test_in_a_chat_the_template_writes_the_prompt(tmp_path, capsys):
    """The scores are those of the prompt that it writes."""
    folder = save_tiny_model(tmp_path / "model")
    said = (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo"
    )
    scores = []
    for prompt, flags in (
        ("Why?", ["--chat", "--system", "Be short.", "--prefill", "So"]),
        (said, []),
        ("Why?", []),
    ):
        path, out = tmp_path / "questions.jsonl", tmp_path / f"{len(scores)}.jsonl"
        write_questions(path, [(prompt, [" it is", ", the lazy dog"], 0)])
        given = ["--model", folder, "--score-continuations", path, "--output", out, "--device", "cpu", *flags]
        assert exit_code_in_process(generate, given) == 0, capsys.readouterr()
        scores.append(json.loads(out.read_text())["choices"])
    assert scores[0] == scores[1] != scores[2]


def test_the_table_marks_the_likeliest_and_the_right_one(script, tmp_path):
    path = write_questions(tmp_path / "questions.jsonl", QUESTIONS[:2])
    code, stdout, _ = script("--score-continuations", path)
    assert code == 0 and stdout.count("--- prompt ") == 2
    for question in stdout.split("--- prompt ")[1:]:
        assert question.count("*") == 3 and len(re.findall(r"^ *=", question, re.M)) == 1
    named = [(prompt, choices, choices[answer]) for prompt, choices, answer in QUESTIONS[:2]]
    assert script("--score-continuations", write_questions(path, named))[1] == stdout  # answers as texts
    nameless = [(prompt, choices, None) for prompt, choices, _ in QUESTIONS[:2]]
    without = script("--score-continuations", write_questions(path, nameless))[1]
    assert "accuracy" in stdout and "accuracy" not in without


def test_a_token_across_the_border_counts_as_the_continuations(folder):
    runtime = Runtime(torch.device("cpu"), "fp32")
    model = language_model.load(str(folder), runtime, cache_dir=None, loading=Loading(may_compile=False))
    decode = model.tokenizer.decode
    for prompt, text in (
        ("The quick bro", "wn fox"),
        ("Why is the sky ", "blue"),
        ("The", " quick"),
        ("", "fox"),
    ):
        ids, num_before = encode_pair(prompt, text, model, name="prompt 1")
        assert num_before >= 1 and decode(ids, skip_special_tokens=True) == prompt + text
        assert decode(ids[num_before:]).endswith(text)
    many = [Question("The", [" quick" * 40], None), Question("The", [" quick"], None)]
    continuations.MOST_LOGITS, most = 1000, continuations.MOST_LOGITS  # one text at a time
    try:
        few = continuations.score(many, model, batch_size=8)
    finally:
        continuations.MOST_LOGITS = most
    for ours, theirs in zip(few, continuations.score(many, model, batch_size=8)):
        assert ours[0].logprob == pytest.approx(theirs[0].logprob, rel=1e-5)


def test_columns_stay_beside_the_scores(script, tmp_path):
    rows = [
        {"id": "q1", "prompt": "The", "choices": [" fox"], "likeliest": "fox"},
        {"id": "q2", "prompt": "The", "choices": [" dog"], "n": 2},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for flags, names in (
        (["--id-column", "id", "--keep-columns", "all"], {"id", "n", "given_likeliest"}),
        (["--id-column", "id"], {"id"}),
        ([], set()),
    ):
        out = tmp_path / f"{len(flags)}.jsonl"
        code, _, stderr = script("--score-continuations", tmp_path / "q.jsonl", "--output", out, *flags)
        assert code == 0, stderr
        found = [json.loads(line) for line in out.read_text().splitlines()]
        own = {"prompt_number", "prompt", "choices", "likeliest", "answer"}
        assert [set(line) - own for line in found] == [names] * 2
        assert [line.get("id", "") for line in found] == ["q1" * bool(names), "q2" * bool(names)]
    flags = ("--output", tmp_path / "new.jsonl", "--id-column", "no")
    code, _, stderr = script("--score-continuations", tmp_path / "q.jsonl", *flags)
    assert code == 2 and "no column 'no' among id, prompt, choices" in stderr


MISTAKES = {
    "no JSON": ("prompt", ("line 2", '"prompt"')),
    "no prompt": ('{"choices": ["a"]}', ("line 2", "prompt")),
    "no list": ('{"prompt": "a", "choices": "b"}', ("line 2", "no list of texts")),
    "no choices": ('{"prompt": "a", "choices": []}', ("line 2", "no list of texts")),
    "an empty choice": ('{"prompt": "a", "choices": ["b", ""]}', ("line 2", "choice 2 is empty")),
    "an answer too high": (
        '{"prompt": "a", "choices": ["b"], "answer": 1}',
        ("line 2", "answer 1", "0 to 0"),
    ),
    "an unknown answer": ('{"prompt": "a", "choices": ["b"], "answer": "c"}', ("line 2", "answer 'c'")),
    "a missing answer": ('{"prompt": "a", "choices": ["b"]}', ("line 2", "no answer")),
    "too long": (
        json.dumps({"prompt": "$%" * 300, "choices": ["b"], "answer": 0}),
        ("prompt 2 with choice 1", "holds 256", "shorten"),
    ),
}


@pytest.mark.parametrize("row, parts", MISTAKES.values(), ids=MISTAKES)
def test_a_file_that_can_not_be_used(script, tmp_path, row, parts):
    first = json.dumps({"prompt": "a", "choices": ["b"], "answer": 0})
    (tmp_path / "questions.jsonl").write_text(f"{first}\n{row}\n")
    output = tmp_path / "out.jsonl"
    code, stdout, stderr = script("--score-continuations", tmp_path / "questions.jsonl", "--output", output)
    assert (code, stdout, len(stderr.splitlines())) == (2, "", 1) and not output.exists()
    assert [part for part in parts if part not in stderr] == [], stderr
