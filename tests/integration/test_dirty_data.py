"""Data as it comes: --inspect lists every kind of fault in one look, --skip-bad goes on without the
rows that can't be used, and rare classes and splits without labels are no end.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest

import train_classifier
from conftest import exit_code_in_process, heavy, make_sentences

CPU = ["--device", "cpu", "--precision", "fp32"]
SHORT = ["--epochs", 1, "--max-train-samples", 16, "--max-eval-samples", 8, "--max-length", 32]


@pytest.fixture
def run(tiny_model, cache_dir, capsys):
    """Return a function that runs the script on a data set and returns code, stdout and stderr."""

    def call(source: Path, *flags) -> tuple[int, str, str]:
        capsys.readouterr()
        command = ["--model", tiny_model, "--cache-dir", cache_dir, *CPU, *flags]
        dataset = [] if "--predict" in flags else ["--dataset", source]
        code = exit_code_in_process(train_classifier, [*command, *dataset])
        return code, *capsys.readouterr()

    return call


DIRTY = b"""text,label
%s
,pos
   ,neg
a good film,
a film, with a comma,pos
caf\xe9 was fine,pos
only text
a good film said twice,pos
A good film -- said twice!,neg
something rare,once
nearly named,POS
this film has a story that I saw on monday with all the actors that were so very good in it,pos
This film has a story that I saw on tuesday with all the actors that were so very good in it!,pos
"a quotation mark that is never closed,pos
the last film was great,pos
"""


@pytest.fixture
def dirty(tmp_path) -> Path:
    """A CSV file with a fault of each kind behind 60 good rows: the first bad one is row 61."""
    good = "\n".join(f"{text},{label}" for text, label in make_sentences(60)).encode()
    path = tmp_path / "dirty.csv"
    path.write_bytes(DIRTY % good)
    return path


FAULTS = {  # what is said -> rows
    "the text is missing": [],
    "the text is empty": [61, 62],
    "the label is missing": [63],
    "not as many cells as columns (3 for 2)": [64],
    "not UTF-8": [65],
    "not as many cells as columns (1 for 2)": [66],
    "a quotation mark is opened and never closed": [73],
}


def test_inspect_lists_every_kind_of_fault_with_its_rows(dirty, run):
    code, printed, said = run(dirty, "--inspect", "--drop-rare", 3)
    assert code == 0, said
    table = printed[printed.index("ROWS THAT CAN'T BE USED") : printed.index("ROWS THAT CAN BE USED")]
    for problem, rows in FAULTS.items():
        lines = [line for line in table.splitlines() if line.startswith(problem)]
        assert len(lines) == bool(rows), (problem, table)
        assert all(str(row) in line for line in lines for row in rows), (problem, table)
    assert "7 rows can't be used" in printed
    encoding = "1 row is not UTF-8: if the file has another encoding, name it, such as --encoding cp1252"
    assert encoding in table and encoding in printed.partition("ROWS THAT CAN'T")[0]
    rest = printed[printed.index("WHAT ELSE IS TO BE KNOWN") : printed.index("\nSPLITS")]
    assert "nearly the same name: 'POS' and 'pos'" in rest
    assert "train row 67 (pos), train row 68 (neg): a good film said twice" in rest
    near = rest[rest.index("texts that are nearly alike within a split: 2") :].splitlines()[1]
    assert near.startswith("  train row 71 (pos), train row 72 (pos): 0.82 alike: this film has a story")
    assert "'POS' 1" in rest and "'once' 1" in rest and "--drop-rare" in rest and "--merge-rare" in rest


def test_inspect_names_texts_that_are_nearly_alike_across_splits(run, tmp_path):
    """A copy of a text in another split, with and without another label; of pairs both texts count."""
    folder, rows = tmp_path / "splits", make_sentences(60)
    folder.mkdir()
    story = "the film was a story with actors that I saw on monday and so it was very good for what it was"
    other = story.replace("monday", "friday")
    for split, part, added in (
        ("train", rows[:40], [(story, "pos")]),
        ("validation", rows[40:50], [(other.upper(), "neg")]),
        ("test", rows[50:], [(other, "pos")]),
    ):
        lines = [f"{text},{text},{label}" for text, label in [*part, *added]]
        (folder / f"{split}.csv").write_text("\n".join(["text,second,label", *lines]) + "\n")
    for flags in ([], ["--text-column", "text,second", "--text-mode", "pair"]):
        code, printed, said = run(folder, "--inspect", *flags)
        assert code == 0, said
        rest = printed[printed.index("WHAT ELSE IS TO BE KNOWN") : printed.index("\nSPLITS")]
        lines = rest.splitlines()
        apart = lines.index("texts that are nearly alike and have different labels: 2")
        first = "  train row 41 (pos), validation row 11 (neg): 0.8"
        assert lines[apart + 1].startswith(first), rest
        across = lines.index("texts that are nearly alike in several splits: 2")
        assert lines[across + 1].startswith("  train row 41 (pos), test row 11 (pos): 0.8"), rest
        assert "  validation row 11 (neg), test row 11 (pos): " in rest  # alike but for capitals


def test_lists_of_one_label_are_classes_where_that_is_said(run, tmp_path):
    """As tools for annotation write them; a list of none or of two is no class."""
    rows = [{"text": text, "label": [label]} for text, label in make_sentences(40)]
    write = (tmp_path / "rows.jsonl").write_text
    write("".join(f"{json.dumps(row)}\n" for row in rows))
    code, printed, said = run(tmp_path / "rows.jsonl", "--inspect")
    assert code == 0 and "task     multi" in printed and "--task single makes classes of them" in printed, (
        said
    )
    code, printed, said = run(tmp_path / "rows.jsonl", "--inspect", "--task", "single")
    assert code == 0 and "task     single" in printed and "4 test texts, 2 classes" in printed, said
    rows[3]["label"], rows[7]["label"] = [], ["neg", "pos"]
    write("".join(f"{json.dumps(row)}\n" for row in rows))
    code, _, said = run(tmp_path / "rows.jsonl", "--task", "single", "--output-dir", tmp_path / "run")
    assert code == 2 and "split train, row 4: column 'label' holds 0 labels" in said
    code, printed, said = run(tmp_path / "rows.jsonl", "--task", "single", "--inspect")
    line = next(line for line in printed.splitlines() if line.startswith("the label is none or several"))
    assert code == 0 and "4, 8" in line


def test_inspect_shows_all_the_rest_where_no_split_can_be_cut(dirty, run, tmp_path):
    """A class with one row can't be cut into three splits, nor can one text with numbers."""
    code, printed, said = run(dirty, "--inspect")
    assert code == 0 and "error" not in said
    ends = next(line for line in printed.splitlines() if line.startswith("training would end here: "))
    for part in ("'POS' has 1", "'once' has 1", "--drop-rare 3", "--merge-rare", "--clean-labels"):
        assert part in ends
    code, _, said = run(dirty, "--skip-bad", "--output-dir", tmp_path / "run")
    assert code == 2 and ends.partition(": ")[2] in said, "it is what training says"
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("text,label\na good film,1.5\n")
    code, few, said = run(numbers, "--inspect", "--task", "regression")
    assert code == 0, said
    assert "training would end here: can't cut a validation split of 1 row from 1; add rows" in few
    for screen in (printed, few):
        for title in ("ROWS THAT CAN'T BE USED", "LENGTHS", "TOKENIZER", "ONE TEXT", "MODEL", "CONFIG"):
            assert f"\n{title}" in screen
        assert "they belong together" in screen


def test_rows_of_rare_classes_are_counted_and_listed(dirty, run, tmp_path):
    clean, output = tmp_path / "clean.csv", tmp_path / "run"
    rare = ["something rare,once", "seldom seen,twice", "seldom heard,twice"]
    lines = [*(f"{text},{label}" for text, label in make_sentences(60)), *rare]
    clean.write_text("\n".join(["text,label", *lines]) + "\n")
    code, printed, said = run(clean, "--drop-rare", 3, "--output-dir", output, *SHORT)
    assert code == 0 and "rare classes, left out with 3 rows: once, twice" in printed, said
    bad = [json.loads(line) for line in (output / "bad-rows.jsonl").read_text().splitlines()]
    assert [row["content"] for row in bad] == [
        "something rare | once",
        *(f"{text} | twice" for text in ("seldom seen", "seldom heard")),
    ]
    assert [row["row"] for row in bad] == [61, 62, 63]
    assert {row["problem"] for row in bad} == {"its class has too few texts in training"}
    code, printed, said = run(clean, "--merge-rare", "other", "--output-dir", tmp_path / "merged", *SHORT)
    assert code == 0 and not (tmp_path / "merged" / "bad-rows.jsonl").exists(), "nothing is left out"


def test_skip_bad_trains_without_the_bad_rows_and_keeps_them(dirty, run, tmp_path):
    output = tmp_path / "run"
    code, printed, said = run(dirty, "--output-dir", output, *SHORT)
    assert code == 2 and "line" in said and not output.exists()
    flags = ["--skip-bad", "--drop-rare", 3, "--output-dir", output]
    code, printed, said = run(dirty, *flags, *SHORT)
    assert code == 0 and "7 rows can't be used: left out" in printed, said
    bad = [json.loads(line) for line in (output / "bad-rows.jsonl").read_text().splitlines()]
    rare = [("its class has too few texts in training", row) for row in (69, 70)]
    assert sorted((row["problem"], row["row"]) for row in bad) == sorted(
        [*((problem, row) for problem, rows in FAULTS.items() for row in rows), *rare]
    )
    contents = {row["row"]: row["content"] for row in bad}
    assert contents[64] == "a film, with a comma,pos" and contents[65] == "caf\\xe9 was fine,pos"
    with open(output / "predictions.csv") as file:  # the rows that are left keep their numbers
        texts = {int(row["row"]): row["text"] for row in csv.DictReader(file)}
    lines = dirty.read_bytes().splitlines()
    assert texts and all(lines[row].decode().startswith(text) for row, text in texts.items())
    code, printed, said = run(dirty, "--model", output / "best", "--evaluate-only", "--skip-bad")
    assert code == 0 and "7 rows that can't be used\n         1 row is not UTF-8: " in printed, said


def test_skip_bad_predicts_without_the_bad_rows(run, tmp_path):
    source, output = tmp_path / "new.jsonl", tmp_path / "answers.jsonl"
    source.write_bytes(b'{"text": "good"}\n{"text": ""}\n{"text": 3\n[1]\n{"no": 1}\n{"text": "bad"}\n')
    code, _, said = run(source, "--predict", source, "--output", output)
    assert code == 2 and "line 3" in said
    code, printed, said = run(source, "--predict", source, "--skip-bad")
    assert code == 0 and [json.loads(line)["row"] for line in printed.splitlines()] == [1, 6]
    assert f"4 rows can't be used, the first is {source}, " in said
    code, _, said = run(source, "--predict", source, "--skip-bad", "--output", output)
    bad = tmp_path / "answers.bad-rows.jsonl"
    assert code == 0 and f"4 rows can't be used: left out, see {bad}" in said
    assert [json.loads(line)["row"] for line in output.read_text().splitlines()] == [1, 6]
    found = {row["row"]: row["problem"] for row in map(json.loads, bad.read_text().splitlines())}
    assert found == {
        2: "the text is empty",
        3: "not readable as json",
        4: "not a JSON object",
        5: "the text is missing",
    }


def test_skip_bad_predicts_lines(run, tmp_path):
    source, output = tmp_path / "new.txt", tmp_path / "answers.csv"
    source.write_bytes(b"good\n\nca\xe9\nbad\n")
    code, _, said = run(source, "--predict", source, "--skip-bad", "--output", output)
    assert code == 0 and "2 rows can't be used" in said
    assert "1 row is not UTF-8: if the file has another encoding, name it, such as --encoding" in said
    with open(output) as file:
        assert [row["row"] for row in csv.DictReader(file)] == ["1", "4"]


def test_labels_of_other_tasks_have_faults_of_their_own(run, tmp_path):
    sentences = make_sentences(40)
    several = tmp_path / "several.csv"
    rows = [f"{text},{int(label == 'pos')},{number % 2}" for number, (text, label) in enumerate(sentences)]
    several.write_text("\n".join(["text,good,odd", *rows, "a film,1,", "a story,2,0"]) + "\n")
    code, printed, said = run(several, "--inspect", "--label-column", "good,odd")
    assert code == 0 and "task     multi" in printed, said
    assert "the label is missing" in printed and "the label is neither 0 nor 1" in printed
    scores = tmp_path / "scores.csv"
    rows = [f"{text},{number / 7:.3f}" for number, (text, _) in enumerate(sentences)]
    scores.write_text("\n".join(["text,label", *rows, "a film,many", "a story,inf"]) + "\n")
    code, printed, said = run(scores, "--inspect")
    assert code == 0 and "task     regression" in printed, said
    line = next(line for line in printed.splitlines() if line.startswith("the label is no number"))
    assert "41, 42" in line


def test_rare_classes_become_one(run, tmp_path):
    source = tmp_path / "rare.csv"
    rows = [*make_sentences(40), *((f"a rare text {n}", f"rare{n % 4}") for n in range(12))]
    source.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    code, printed, said = run(source, "--inspect", "--merge-rare", "other", "--drop-rare", 5)
    assert code == 0 and "id2label   {0: 'neg', 1: 'pos', 2: 'other'}" in printed, said
    assert "one class 'other': rare0, rare1, rare2, rare3" in printed
    code, printed, said = run(source, "--inspect", "--drop-rare", 5)
    assert code == 0 and "id2label   {0: 'neg', 1: 'pos'}" in printed, said
    code, _, said = run(source, "--inspect", "--drop-rare", 100)
    assert code == 2 and "--drop-rare 100" in said


def test_a_split_of_rare_classes_alone(run, tmp_path):
    good = "".join(f"{text},{label}\n" for text, label in make_sentences(40))
    (tmp_path / "train.csv").write_text(f"text,label\n{good}one,rare\n")
    (tmp_path / "test.csv").write_text("text,label\ntwo,rare\n")
    code, _, said = run(tmp_path, "--inspect", "--drop-rare", 5)
    assert code == 2 and "--drop-rare 5: it leaves no row of split test" in said, said


@pytest.mark.parametrize(
    "flags, said_of_it, scored",
    [
        (("--drop-rare", 5), "left out with 12 rows, before the test split was cut: rare0, rare1, rare2,", 5),
        (("--merge-rare", "other", "--drop-rare", 5), "rare classes, one class 'other' of 1 row: rare", 6),
    ],
    ids=["dropped", "merged"],
)
def test_rare_classes_are_scored_as_they_were_trained(flags, said_of_it, scored, run, tmp_path):
    """Those that the training left out are left out again, or make one class again: they are not
    found by counting once more, and no other class is treated so.
    """
    source, folder = tmp_path / "rare.csv", tmp_path / "run"
    rows = [*make_sentences(48), *((f"a rare text {n}", f"rare{n % 4}") for n in range(12))]
    source.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    code, printed, said = run(source, *flags, "--output-dir", folder, *SHORT[:2], *SHORT[-2:])
    assert code == 0, said
    loss = json.loads((folder / "metrics.json").read_text())["test_loss"]
    score = ["--model", folder / "best", "--evaluate-only"]
    for given in ((), flags):
        code, printed, said = run(source, *score, *given)
        assert code == 0 and said_of_it in printed and f"{scored} texts of its test split" in printed, said
        assert f"loss {loss:.4f}" in printed
    other = tmp_path / "other.csv"
    other.write_text("text,label\na good film,pos\nbad,rare3\nawful,neg\n")
    code, printed, said = run(other, *score)
    left = 3 if "other" in flags else 2
    assert code == 0 and f"{left} texts of its train split" in printed and "rare3" in printed, said
    splits = tmp_path / "splits"
    splits.mkdir()
    shutil.copy(other, splits / "train.csv")
    (splits / "validation.csv").write_text("text,label\none,rare1\ntwo,rare2\n")
    code, printed, said = run(splits, *score)  # a validation split is not scored
    said_of_train = "one class 'other' of 1 row: rare3" if "other" in flags else "left out with 1 row: rare3"
    assert code == 0 and said_of_train in printed and f"{left} texts of its train split" in printed, said
    other.write_text("text,label\none,rare1\ntwo,rare2\n")
    code, printed, said = run(other, *score)
    assert code == (0 if "other" in flags else 2), printed
    assert code == 0 or "split train: all its rows are of rare classes" in said, said
    other.write_text("text,label\na good film,pos\nawful,never\n")
    code, printed, said = run(other, *score)
    assert code == 2 and "'never' is not one of the classes" in said, said


def test_a_model_that_remembers_no_rare_classes_is_told_by_flags(run, tmp_path):
    source, folder = tmp_path / "train.csv", tmp_path / "run"
    rows = "".join(f"{text},{label}\n" for text, label in make_sentences(40))
    source.write_text(f"text,label\n{rows}")
    code, _, said = run(source, "--output-dir", folder, *SHORT)
    assert code == 0, said
    other = tmp_path / "other.csv"
    other.write_text("text,label\na good film,pos\nbad,rare\nawful,neg\n")
    score = ["--model", folder / "best", "--evaluate-only"]
    code, printed, said = run(other, *score, "--drop-rare", 3)
    assert code == 0 and "2 texts" in printed and "left out with 1 row: rare" in printed, said
    code, printed, said = run(other, *score, "--merge-rare", "neg")
    assert code == 0 and "3 texts" in printed and "one class 'neg' of 1 row: rare" in printed, said
    code, printed, said = run(other, *score, "--merge-rare", "rest")
    assert code == 2 and "--merge-rare rest: " in said and "neg, pos" in said, said


def test_columns_with_spaces_and_commas_are_named_as_a_whole(run, tmp_path):
    """First, although there are columns with the names of their parts."""
    source, new, folder = tmp_path / "data.csv", tmp_path / "new.csv", tmp_path / "run"
    header = 'good,"good, or bad", review,"a,b"'
    rows = [f"0,{label},{text},{number}" for number, (text, label) in enumerate(make_sentences(40))]
    source.write_text("\n".join([header, *rows]) + "\n")
    named = ["--text-column", " review", "--label-column", "good, or bad"]
    code, printed, said = run(source, *named, "--output-dir", folder, *SHORT)
    assert code == 0 and "2 classes" in printed, said
    best = ["--model", folder / "best"]
    code, printed, said = run(source, *best, "--evaluate-only")
    assert code == 0 and "texts of its test split" in printed, said
    new.write_text('"title,body", review\nnothing,a wonderful film\n')
    code, printed, said = run(new, *best, "--predict", new)
    assert code == 0, said
    code, other, said = run(new, *best, "--predict", new, "--text-column", "title,body")
    assert code == 0 and other != printed, said
    code, other, said = run(new, *best, "--predict", new, "--text-column", "title, review")
    assert code == 2 and "--text-column title, review: say with --text-mode" in said, said


def test_only_the_header_tells_what_a_name_with_commas_is(run, tmp_path):
    source = tmp_path / "data.csv"
    for named, header, advice in [
        ("yes, or no, or no", "label", "'or no' comes twice"),
        ("label,", "mood", "one is empty"),
        ("", "mood", "one is empty"),
        ("label, mood ", "label", "no column 'mood' among text, label"),
    ]:
        for column in [header, *([named] if named else [])]:
            rows = [f"{text},{label}" for text, label in make_sentences(40)]
            source.write_text("\n".join([f'text,"{column}"', *rows]) + "\n")
            code, printed, said = run(source, "--label-column", named, "--inspect")
            if column == named:
                assert code == 0 and "2 classes" in printed, said
            else:
                assert code == 2 and "--label-column" in said and advice in said, said


def test_labels_that_training_lacks_are_faults_of_the_other_splits(run, tmp_path):
    folder = tmp_path / "splits"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [*make_sentences(20, seed=len(split)), *([("new", "never")] if split == "test" else [])]
        (folder / f"{split}.csv").write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in rows))
    code, printed, said = run(folder, "--inspect")
    assert code == 0 and "the label does not occur in training" in printed and "split test" in printed, said


@pytest.mark.parametrize("labels", ["", "-1", heavy(None)])
def test_a_test_split_without_labels_is_predicted(labels, run, tmp_path):
    folder = tmp_path / "splits"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = make_sentences(20, seed=len(split))
        number = {"neg": 0, "pos": 1}
        (folder / f"{split}.csv").write_text(
            "text,label\n" + "".join(f"{t},{number[label]}\n" for t, label in rows)
        )
    cells = ["text", *(text for text, _ in make_sentences(6, seed=9))]
    added = ["" if labels is None else ",label", *([""] * 6 if labels is None else [f",{labels}"] * 6)]
    (folder / "test.csv").write_text("".join(f"{cell}{more}\n" for cell, more in zip(cells, added)))
    output = tmp_path / "run"
    code, printed, said = run(folder, "--output-dir", output, "--epochs", 1, "--max-length", 32)
    assert code == 0 and "the test split has no labels: it is predicted" in printed, said
    with open(output / "unlabelled.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == [str(number) for number in range(1, 7)]
    assert all(row["label"] in ("0", "1") for row in rows)


@pytest.mark.parametrize("mode, bad", [("join", [42]), ("pair", [41, 42])])
def test_an_empty_cell_is_a_fault_of_a_pair_but_not_of_a_text_that_is_joined(mode, bad, run, tmp_path):
    """Oracle of the split without labels: --predict on its file, with the model of the run."""
    folder, output = tmp_path / "splits", tmp_path / "run"
    folder.mkdir()
    rows = [f"title {n},{text},{label}" for n, (text, label) in enumerate(make_sentences(40))]
    (folder / "train.csv").write_text("\n".join(["title,body,label", *rows, ",a film,pos", ",,neg"]) + "\n")
    rows = [row.rpartition(",")[0] for row in rows]
    (folder / "test.csv").write_text("\n".join(["title,body", *rows, ",a film", ",  "]) + "\n")
    columns = ["--text-column", "title,body", "--text-mode", mode]
    code, _, said = run(folder, *columns, "--output-dir", output, *SHORT)
    assert code == 2 and f"split test, row {bad[0]}" in said and not output.exists()
    code, printed, said = run(folder, *columns, "--skip-bad", "--output-dir", output, *SHORT)
    assert code == 0 and f"{2 * len(bad)} rows can't be used: left out" in printed, said
    faults = [json.loads(line) for line in (output / "bad-rows.jsonl").read_text().splitlines()]
    assert sorted((row["source"], row["row"]) for row in faults) == [
        (split, row) for split in ("split test", "split train") for row in bad
    ]
    answers = tmp_path / "answers.csv"
    flags = ["--predict", folder / "test.csv", "--skip-bad", "--output", answers, "--eval-max-length", 32]
    code, _, said = run(folder, "--model", output / "best", *flags)
    rows = "1 row" if len(bad) == 1 else "2 rows"
    assert code == 0 and f"{rows} can't be used: left out" in said, said
    with open(output / "unlabelled.csv") as one, open(answers) as other:
        ours, theirs = list(csv.DictReader(one)), list(csv.DictReader(other))
    assert [int(row["row"]) for row in ours] == [row for row in range(1, 43) if row not in bad]
    for row, expected in zip(ours, theirs, strict=True):
        assert row["row"] == expected["row"] and row["label"] == expected["label"]
        assert float(row["confidence"]) == pytest.approx(float(expected["confidence"]), abs=1e-4)


def test_labels_of_a_spreadsheet_are_cleaned(run, tmp_path):
    """Spelled in several ways, or missing in words; without the flag these are classes of their own."""
    path = tmp_path / "sheet.csv"
    lines = [f"{text},{label}" for text, label in make_sentences(60)]
    lines += ["a good film indeed,POS", "a fine film, pos", "a grim film,neg ", "no label,NaN"]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    flags = ["--clean-labels", "--skip-bad", "--output-dir", tmp_path / "run", *SHORT]
    code, stdout, stderr = run(path, *flags)
    assert (code, stderr) == (0, "") and "2 classes" in stdout
    assert "'POS' as 'pos'" in stdout and "'NaN' as none" in stdout
    assert "1 row can't be used" in stdout
    [bad] = (tmp_path / "run" / "bad-rows.jsonl").read_text().splitlines()
    assert json.loads(bad)["problem"] == "the label is missing"
    code, stdout, _ = run(path, "--evaluate-only", "--model", tmp_path / "run" / "best", *flags[:2])
    assert code == 0 and "texts of its test split" in stdout, "its classes are those of the cleaned labels"
    code, stdout, _ = run(path, "--inspect")
    assert code == 0 and "'NaN' has 1" in stdout and "--drop-rare 3" in stdout
    assert "may stand for a missing label: NaN; --clean-labels" in stdout


def test_decimal_commas_are_the_numbers_that_they_mean(run, tmp_path):
    runs = []
    for decimal in ".,":
        path, folder = tmp_path / "prices.csv", tmp_path / f"run{len(runs)}"
        rows = [(text, f"{number % 7 - 2.5:.2f}") for number, (text, _) in enumerate(make_sentences(60))]
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter=";").writerows(
                [("text", "label"), *((text, price.replace(".", decimal)) for text, price in rows)]
            )
        code, _, _ = run(path, "--decimal", decimal, "--output-dir", folder, *SHORT)
        assert code == 0
        runs.append(json.loads((folder / "metrics.json").read_text()))
    for name in ("test_rmse", "best_validation_loss"):
        assert runs[0][name] == runs[1][name]
    code, _, stderr = run(path, "--task", "regression", *SHORT)
    assert code == 2 and "add --decimal ," in stderr
    numbers = "look like numbers"
    flags = "if they are numbers, add --decimal ,; if they are lists of labels, add --label-separator ','"
    code, stdout, _ = run(path, "--inspect")
    assert code == 0 and f"the classes {numbers}; {flags}" in stdout
    assert f"\n{numbers}: '-0,50', '-1,50', " in stdout.partition("WHAT ELSE")[2]
    for flags in (["--task", "single"], ["--decimal", ","]):  # it is known what they are
        code, stdout, _ = run(path, "--inspect", *flags)
        assert code == 0 and "the classes look like numbers" not in stdout
