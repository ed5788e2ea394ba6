"""Prompts from files through the command line: templates over columns, columns that stay beside the
texts, and rows that can't be used.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import generate_on_cpu, read_json_lines, write_lines

TEXTS = ("Why is the sky blue?", "I like the fox", "The quick brown fox")


@pytest.fixture
def script(tiny, capsys):
    """Return a function that runs generate.py in this process; returns code, stdout, stderr."""

    def run(*flags) -> tuple[int, str, str]:
        return generate_on_cpu(flags, tiny, 6), *capsys.readouterr()

    return run


@pytest.fixture
def written(script, tmp_path):
    """Return a function that runs generate.py with an output file; returns its lines and stderr."""

    def run(*flags) -> tuple[list[dict], str]:
        out = tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        code, _, stderr = script(*flags, "--output", out)
        assert code == 0, stderr
        return read_json_lines(out), stderr

    return run


def write_table(path: Path, rows: list[dict]) -> Path:
    """Write the same rows as the ending of a name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        write_lines(path, [json.dumps(row) for row in rows])
    else:
        header = ",".join(f'"{name}"' for name in rows[0])
        lines = [header, *(",".join(f'"{cell}"' for cell in row.values()) for row in rows)]
        write_lines(path, lines)
    return path


ROWS = [
    {"id": f"00{number}", "text": text, "stars": number, "prompt": "p"}
    for number, text in enumerate(TEXTS, start=1)
]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_columns_stay_beside_the_texts(ending, written, tmp_path):
    """As --predict keeps them: as they are written, and under another name where ours is taken."""
    file = write_table(tmp_path / f"rows{ending}", ROWS)
    flags = ["--prompts-file", file, "--top-k", 5, "--num-samples", 2]
    plain, _ = written(*flags)
    kept, _ = written(*flags, "--id-column", "id", "--keep-columns", "stars,prompt")
    assert [list(line)[3:6] for line in kept] == [["id", "stars", "given_prompt"]] * 6
    cells = [(line.pop("id"), str(line.pop("stars")), line.pop("given_prompt")) for line in kept]
    assert cells == [(row["id"], str(row["stars"]), "p") for row in ROWS for _ in range(2)]
    assert kept == plain
    every, _ = written(*flags, "--keep-columns", "all")
    assert [(line["id"], str(line["stars"])) for line in every] == [cell[:2] for cell in cells]
    assert all("given_text" not in line for line in every)  # it is the prompt
    other = [{**row, "given_prompt": "g"} for row in ROWS]
    both, _ = written(
        "--prompts-file", write_table(tmp_path / f"other{ending}", other), "--keep-columns", "all"
    )
    assert [(line["given_prompt"], line["given_prompt_"]) for line in both] == [("g", "p")] * len(ROWS)
    whole = write_table(tmp_path / f"whole{ending}", [{**row, " a,b ": "1.50"} for row in ROWS])
    lines, _ = written("--prompts-file", whole, "--keep-columns", " a,b ")
    assert [line[" a,b "] for line in lines] == ["1.50"] * len(ROWS)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("chat", [[], ["--chat", "--system", "Be short."]], ids=["plain", "chat"])
def test_a_template_makes_the_prompts(ending, chat, written, tmp_path):
    """Oracle: the same texts written out, as lines of a file."""
    file = write_table(tmp_path / f"rows{ending}", ROWS)
    alone = write_lines(tmp_path / "lines.txt", [f"{row['stars']} {{: {row['text']}" for row in ROWS])
    made, _ = written("--prompts-file", file, "--prompt-template", "{stars} {{: {text}", *chat)
    expected, _ = written("--prompts-file", alone, *chat)
    assert {line["settings"].pop("prompt_template") for line in made} == {"{stars} {{: {text}"}
    assert made == expected


def test_a_template_can_have_line_breaks_and_cells_are_data(written, tmp_path):
    file = write_table(tmp_path / "rows.csv", [{"text": "{id} {{ \\\\n {text.__class__}", "id": "7"}])
    [line], _ = written("--prompts-file", file, "--prompt-template", r"{id}:\n{text}")
    assert line["prompt"] == "7:\n{id} {{ \\\\n {text.__class__}"


def test_conversations_keep_their_columns(written, tmp_path):
    ask = [{"role": "user", "content": TEXTS[0]}]
    rows = [{"messages": ask, "id": 7, "at": {"day": 1}}, {"prompt": TEXTS[1], "id": "b"}]
    file = write_table(tmp_path / "x.jsonl", rows)
    lines, _ = written("--chat", "--prompts-file", file, "--id-column", "id", "--keep-columns", "at")
    assert [(line["id"], line["at"]) for line in lines] == [(7, {"day": 1}), ("b", None)]
    every, _ = written("--chat", "--prompts-file", file, "--keep-columns", "all")
    assert every == lines


def test_a_run_with_columns_goes_on_only_with_the_same(script, tmp_path):
    file, out = write_table(tmp_path / "rows.csv", ROWS), tmp_path / "out.jsonl"
    flags = ["--prompts-file", file, "--batch-size", 1, "--output", out]
    kept, template = ["--id-column", "id"], ["--prompt-template", "{stars}: {text}"]
    assert script(*flags, *kept, *template)[0] == 0
    whole = out.read_bytes()
    # two lines, and the beginning of a third, cut in its cell and in its text
    for cut in (0, len(b'{"prompt_number": 3, "sample": 1, "prompt": "3: T'), whole.index(b'"text"') + 12):
        first = whole.splitlines(keepends=True)
        out.write_bytes(first[0] + first[1] + first[2][:cut])
        assert script(*flags, *kept, *template, "--resume")[0] == 0 and out.read_bytes() == whole
    others = {
        "id is '001', this run's is None": [*template],
        "stars is None, this run's is": [*kept, "--keep-columns", "stars", *template],
        "prompt is '1: Why": [*kept],
        "prompt is '1: Why is": [*kept, "--prompt-template", "{stars}, {text}"],
    }
    for part, other in others.items():
        code, _, stderr = script(*flags, *other, "--resume")
        assert code == 2 and f"line 1: its {part}" in stderr and out.read_bytes() == whole, stderr
    write_table(file, [{**row, "id": "x"} for row in ROWS])
    code, _, stderr = script(*flags, *kept, *template, "--resume")
    assert code == 2 and "line 1: its id is '001', this run's is 'x'" in stderr


MISTAKES = {  # name: (file, content, flags, what the line must hold)
    "a template without its column": (
        "t.csv",
        "text,id\na,1\n",
        ["--prompt-template", "{txt} {id}"],
        ("t.csv", "no column 'txt' among text, id", "--prompt-template"),
    ),
    "a template of lines": (
        "t.txt",
        "a\n",
        ["--prompt-template", "{text}"],
        ("--prompt-template", "t.txt", "no columns", "data file"),
    ),
    "columns of lines": ("t.txt", "a\n", ["--id-column", "id"], ("--id-column", "t.txt", "no columns")),
    "an id with a comma": ("t.csv", "text,a\nx,y\n", ["--id-column", "text,a"], ("'text,a'", "--id-column")),
    "an id that is not there": ("t.csv", "text\na\n", ["--id-column", "id"], ("t.csv", "'id'", "text")),
    "one that no conversation has": (
        "t.jsonl",
        '{"messages": [{"role": "user", "content": "a"}], "key": 1}\n',
        ["--chat", "--id-column", "id"],
        ("t.jsonl", "'id'", "messages, key"),
    ),
    "a cell of a template that is missing": (
        "t.csv",
        "text,id\na,\n",
        ["--prompt-template", "{text} {id}"],
        ("t.csv, row 1", "'id'", "empty", "--skip-bad"),
    ),
    "a brace alone": ("t.csv", "text\na\n", ["--prompt-template", "{text"], ("--prompt-template", "{{")),
    "a column of a template": (
        "t.csv",
        "text\na\n",
        ["--prompt-template", "{text}", "--text-column", "x"],
        ("--prompt-template", "--text-column"),
    ),
}


@pytest.mark.parametrize("file, content, flags, parts", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(file, content, flags, parts, script, tmp_path):
    (tmp_path / file).write_text(content)
    out = tmp_path / "out.jsonl"
    code, stdout, stderr = script("--prompts-file", tmp_path / file, "--output", out, *flags)
    assert (code, stdout, len(stderr.splitlines())) == (2, "", 1) and not out.exists(), stderr
    assert [part for part in parts if part not in stderr] == [], stderr


# name: (content, flags, where the prompts that can't be used are, and what is wrong with each)
BAD = {
    "lines.txt": (
        b"%s\n\n%s\n\xff\n \t\n%s\n",
        [],
        {"line 2": "empty", "line 4": "not UTF-8", "line 5": "empty"},
    ),
    "rows.csv": (
        b"id,text\n1,%s\n\n2,\n3,%s\n4,x,y\n5,\xff\n6,%s\n",
        ["--id-column", "id"],
        {"row 2": "'text' is empty", "row 4": "3 for 2", "row 5": "not UTF-8"},
    ),
    "rows.jsonl": (
        b'{"text": "%s"}\n\n{"text": null}\n{"text": "%s", "id": 9}\n{"text"\n[1]\n'
        b'{"id": 1}\n{"text": "%s"}\n',
        ["--keep-columns", "all"],
        {"row 2": "missing", "row 4": "not readable", "row 5": "not a JSON object", "row 6": "missing"},
    ),
    "talk.jsonl": (
        b'\n{"messages": [{"role": "user", "content": "%s"}], "id": 4}\n\n{"prompt": " "}\n{"messages": []}\n'
        b'{"prompt": "%s"}\n\xff\n{"messages": [{"role": "user"}], "id": 8}\n{"prompt": "%s"}\n',
        ["--chat", "--id-column", "id"],
        {"line 4": "empty", "line 5": "a list of", "line 7": "not UTF-8", "line 8": "role and content"},
    ),
    "template.csv": (
        b"id,title,text\n1,A,%s\n2,,x\n3,B,%s\n4,C,\n5,D,%s\n",
        ["--prompt-template", "{title}: {text}", "--id-column", "id"],
        {"row 2": "'title' is empty", "row 4": "'text' is empty"},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_cannot_be_used_end_the_run_or_are_left_out(name, script, written, tmp_path):
    """Each is told with its place, and has a line with its reason where it stands in the file; the
    texts of the others are those of a file without it.
    """
    content, flags, reasons = BAD[name]
    titles = ("A: ", "B: ", "D: ") if "template" in name else ("", "", "")
    file = tmp_path / name
    file.write_bytes(content % tuple(text.encode() for text in TEXTS))
    code, _, stderr = script("--prompts-file", file, "--output", tmp_path / "no.jsonl", *flags)
    assert (code, len(stderr.splitlines())) == (2, 1) and name in stderr, stderr
    flags = [*flags, "--batch-size", 1]
    lines, stderr = written("--prompts-file", file, "--skip-bad", *flags)
    bad = [line for line in lines if line["finish_reason"] == "refused"]
    assert len(bad) == len(reasons) and len(lines) == len(reasons) + 3
    for line, (place, reason) in zip(bad, reasons.items()):
        assert f"{file}, {place}" in line["error"] and reason in line["error"]
        assert f"left out: {line['error']}" in stderr
    chat = ["--chat"] if "--chat" in flags else []
    alone = write_lines(tmp_path / "alone.txt", [title + text for title, text in zip(titles, TEXTS)])
    expected, _ = written("--prompts-file", alone, "--batch-size", 1, *chat)
    good = [line for line in lines if "error" not in line]
    assert [(x["prompt"], x["token_ids"]) for x in good] == [(x["prompt"], x["token_ids"]) for x in expected]


def test_the_id_of_a_row_that_is_left_out_is_told(written, tmp_path):
    file = write_lines(tmp_path / "rows.csv", ["id,text", "a,one", "b,", "c,two,x", "d,three"])
    lines, _ = written("--prompts-file", file, "--skip-bad", "--id-column", "id")
    assert [line["id"] for line in lines] == ["a", "b", None, "d"]
    assert ["error" in line for line in lines] == [False, True, True, False]
