"""--predict with --output: what stays beside an answer, the three formats, and going on after a kill."""

import csv
import json
import shutil
import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import train_classifier
from common.columns import KeptColumns
from common.sources import FileOptions
from common.training import evaluation, predictions, unlabelled
from common.training.data import TextConfig
from conftest import exit_code_in_process, make_sentences

CPU = ["--device", "cpu", "--precision", "fp32"]
NUM_ROWS = 30


@pytest.fixture
def table(tmp_path) -> Path:
    """A CSV file of texts with an id, a label and a number."""
    path = tmp_path / "new.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "label", "stars"])
        for number, (text, label) in enumerate(make_sentences(NUM_ROWS)):
            writer.writerow([f"{number:03}", f'{text}, "so"', label, f"{number}.50"])
    return path


@pytest.fixture
def predict(tiny_model, capsys):
    """Return a function that runs --predict and returns code, stdout and stderr."""

    def run(source: Path, *flags) -> tuple[int, str, str]:
        capsys.readouterr()
        code = exit_code_in_process(
            train_classifier, ["--model", tiny_model, "--predict", source, *CPU, *flags]
        )
        return code, *capsys.readouterr()

    return run


def read(path: Path) -> list[dict]:
    """Return the rows of a file of predictions, scores as columns."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        numbers = [name for name in rows[0] if name.startswith(("score_", "confidence"))]
        return [row | {"row": int(row["row"])} | {name: float(row[name]) for name in numbers} for row in rows]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key != "scores"}
        | {f"score_{name}": score for name, score in row["scores"].items()}
        for row in rows
    ]


@pytest.mark.parametrize("ending", predictions.ENDINGS)
def test_ids_and_other_columns_stay_as_they_are_written(ending, table, predict, tmp_path):
    output = tmp_path / f"answers{ending}"
    flags = ["--output", output, "--id-column", "id", "--keep-columns", "stars,label"]
    assert predict(table, *flags)[0] == 0
    code, printed, _ = predict(table)
    answers = [json.loads(line) for line in printed.splitlines()]
    rows = read(output)
    assert list(rows[0])[:4] == ["row", "id", "stars", "given_label"]
    for number, (row, answer, (_, label)) in enumerate(
        zip(rows, answers, make_sentences(NUM_ROWS), strict=True)
    ):
        assert (row["row"], row["id"], row["stars"]) == (number + 1, f"{number:03}", f"{number}.50")
        assert (row["given_label"], row["label"]) == (label, answer["label"])
        assert {f"score_{name}": score for name, score in answer["scores"].items()}.items() <= row.items()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([output.name, table.name])


def test_all_columns_stay_also_on_the_screen(table, predict, tmp_path):
    code, printed, _ = predict(table, "--keep-columns", "all")
    first = json.loads(printed.splitlines()[0])
    assert (first["id"], first["given_label"], first["stars"], first["row"]) == ("000", "neg", "0.50", 1)
    assert "text" not in first


def test_columns_with_the_names_of_answers_are_neither_lost_nor_doubled(predict, tmp_path):
    """Each has the same other name in every kind of file, and on the screen."""
    source, answers = tmp_path / "new.csv", ["label", "scores", "score_LABEL_0", "row", "prediction"]
    columns = ["text", *answers, "given_label", "given_row", "given_row_"]
    lines = [columns, *([f"{text} {name}" for name in columns] for text in ("good", "bad"))]
    source.write_text("".join(",".join(cells) + "\n" for cells in lines))
    names = dict(zip(columns[1:], columns[1:]))
    names |= {name: f"given_{name}" for name in ("scores", "score_LABEL_0", "prediction")}
    names |= {"label": "given_label_", "row": "given_row__"}
    _, printed, _ = predict(source, "--keep-columns", "all")
    (screen := tmp_path / "screen.jsonl").write_text(printed)
    outputs = [screen]
    for ending in predictions.ENDINGS:
        outputs.append(tmp_path / f"answers{ending}")
        assert predict(source, "--keep-columns", "all", "--output", outputs[-1])[0] == 0
    for output in outputs:
        rows = read(output)
        own = ["label", "confidence", "score_LABEL_0", "score_LABEL_1"]
        assert list(rows[0]) == ["row", *names.values(), *own], output
        for text, row in zip(("good", "bad"), rows, strict=True):
            assert {name: row[name] for name in names.values()} == {
                name: f"{text} {column}" for column, name in names.items()
            }


def test_columns_are_kept_by_their_whole_names(predict, tmp_path):
    source = tmp_path / "new.csv"
    source.write_text('id,text,b,"b,c", d\n007,good,1.50,2.50,3.50\n')
    for named, kept in [
        ("b,c", {"b,c": "2.50"}),
        (" d,b", {" d": "3.50", "b": "1.50"}),
        (" d, id", {" d": "3.50", "id": "007"}),
    ]:
        code, printed, said = predict(source, "--keep-columns", named)
        assert code == 0, said
        assert list(json.loads(printed).items())[1:-3] == list(kept.items())
    code, printed, said = predict(source, "--id-column", "b,c", "--keep-columns", "all")
    assert code == 0 and list(json.loads(printed))[1:-3] == ["id", "b", "b,c", " d"], said
    for flags, missing in [
        (["--id-column", "id,b"], "id,b"),
        (["--id-column", "d", "--keep-columns", "all"], "d"),
        (["--keep-columns", "id,d"], "d"),
    ]:
        code, _, said = predict(source, *flags)
        assert code == 2 and f"no column {missing!r} among id, text, b, b,c, ' d'; name the" in said, said
        assert f"with {flags[0]}\n" in said, said


@pytest.mark.parametrize("ending", predictions.ENDINGS)
def test_what_a_kill_has_left_is_gone_on_with(ending, table, predict, tmp_path, monkeypatch):
    for module in (train_classifier, evaluation):
        monkeypatch.setattr(module, "PREDICT_BLOCK", 8)
    flags = ["--keep-columns", "all", "--output"]
    whole, output = tmp_path / f"whole{ending}", tmp_path / f"answers{ending}"
    assert predict(table, *flags, whole)[0] == 0

    class Killed(BaseException):
        pass

    computed, add = [], predictions.PredictionFile.add

    def add_and_die(self, answers, columns):
        computed.append(len(answers))
        if len(computed) == 3:
            self.file.write(b"half a block")  # and the progress is not written
            self.file.flush()
            raise Killed
        add(self, answers, columns)

    monkeypatch.setattr(predictions.PredictionFile, "add", add_and_die)
    with pytest.raises(Killed):
        predict(table, *flags, output)
    assert not output.exists()
    code, _, said = predict(table, *flags, output)
    assert code == 2 and "--resume" in said and said.count("\n") == 1
    assert predict(table, *flags, output, "--resume")[0] == 0
    assert computed == [8, 8, 8, 8, 6]  # of the first two blocks nothing was computed again
    assert output.read_bytes() == whole.read_bytes()
    code, printed, _ = predict(table, *flags, output, "--resume")
    assert (code, len(computed)) == (0, 5) and "complete" in printed


def test_a_part_from_elsewhere_is_not_gone_on_with(table, predict, tmp_path, monkeypatch):
    output = tmp_path / "answers.csv"
    monkeypatch.setattr(predictions.PredictionFile, "finish", lambda self: None)
    assert predict(table, "--output", output)[0] == 0
    for change, part in [
        (lambda: None, None),
        (lambda: predictions.partial_file(output).write_bytes(b""), "damaged"),
        (lambda: table.write_text(table.read_text() + "x,good,pos,1\n"), "text"),
    ]:
        change()
        code, _, said = predict(table, "--output", output, "--resume")
        assert (code == 2 and part in said) if part else code == 0, said


def test_a_complete_file_of_other_texts_or_another_model_is_not_taken_for_this_one(
    table, predict, tmp_path, tiny_model
):
    output, other = tmp_path / "answers.csv", tmp_path / "other.csv"
    assert predict(table, "--output", output, "--resume")[0] == 0
    content = output.read_bytes()
    other.write_text(table.read_text().replace("good", "fine") + "\nlacks,,pos,1\n")
    for source, flags, parts in [
        (other, ["--skip-bad"], ("was written with another text;", "name another file")),
        (table, ["--keep-columns", "id"], ("was written with another --keep-columns;",)),
    ]:
        code, printed, said = predict(source, *flags, "--output", output, "--resume")
        assert (code, printed, said.count("\n")) == (2, "", 1) and all(part in said for part in parts), said
        assert output.read_bytes() == content and not predictions.bad_rows_file(output).exists()
    predictions.progress_file(output).unlink()
    code, _, said = predict(table, "--output", output, "--resume")
    assert (
        code == 2
        and "nothing tells from what: answers.csv.progress" in said
        and output.read_bytes() == content
    ), said
    output.unlink()
    for flags in ([], ["--resume"]):  # what stays does not stand in the way of a new file
        assert predict(table, "--output", output, *flags)[0] == 0
        assert output.read_bytes() == content
        output.unlink()


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--output", "answers.txt"], ("--output answers.txt", ".jsonl, .csv, .parquet")),
        (["--output", "nowhere/answers.csv"], ("--output", "no such folder")),
        (["--keep-columns", "author"], ("author", "--keep-columns", "stars")),
        (["--resume"], ("--resume", "--output")),
    ],
)
def test_mistakes(flags, parts, table, predict):
    code, printed, said = predict(table, *flags)
    assert (code, printed, said.count("\n")) == (2, "", 1) and all(part in said for part in parts), said


def test_flags_that_need_others(table, predict, tmp_path, capsys):
    lines = tmp_path / "new.txt"
    lines.write_text("good\n")
    code, _, said = predict(lines, "--id-column", "id")
    assert code == 2 and "--id-column" in said
    assert exit_code_in_process(train_classifier, ["--dataset", table, "--output", "a.csv"]) == 2
    assert "--predict" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_texts(tmp_path):
    peaks = []
    for count in (20_000, 200_000):
        path = tmp_path / f"{count}.txt"
        path.write_text("".join(f"a text of some words, the number {number}\n" for number in range(count)))
        tracemalloc.start()
        with unlabelled.open_texts(
            str(path), TextConfig(), kept=KeptColumns(), options=FileOptions(), cache_dir=None
        ) as texts:
            assert texts.check() == set()
            blocks = texts.blocks(evaluation.PREDICT_BLOCK, without=set(), skipped=5)
            assert sum(len(block.texts) for block in blocks) == count - 5
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 100_000, peaks


@pytest.fixture
def model_of_reviews(tiny_model, tmp_path) -> Path:
    """A model whose training read the texts in the column `review`, and the labels in `mood`."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "reviews"))
    trained = {"dataset_sha256": "0", "seed": 0, "truncation": "chunks"}
    names = {"text_column": "review", "label_column": "mood"}
    (folder / "training.json").write_text(json.dumps({**trained, **names}))
    return folder


@pytest.mark.parametrize("flags, wanted", [([], "review"), (["--text-column", "text"], "text")])
def test_a_saved_model_reads_the_column_of_its_training(flags, wanted, model_of_reviews, predict, tmp_path):
    """Although the file has a column with the default's name too; a flag says otherwise."""
    columns = {"text": "nothing good in here", "review": "a wonderful film"}
    source, alone = tmp_path / "both.csv", tmp_path / "alone.csv"
    source.write_text(",".join(columns) + "\n" + ",".join(columns.values()) + "\n")
    alone.write_text(f"text\n{columns[wanted]}\n")
    code, found, stderr = predict(source, "--model", model_of_reviews, *flags)
    assert code == 0, stderr
    assert found == predict(alone)[1]


@pytest.mark.parametrize("trained, given", [(None, "pair"), ("join", "pair"), ("pair", "join")])
def test_a_saved_model_reads_pairs_only_if_it_was_trained_on_them(
    trained, given, model_of_reviews, predict, tmp_path
):
    settings = model_of_reviews / "training.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "text_mode": trained}))
    source = tmp_path / "new.csv"
    source.write_text("title,body\na good film,fun\n")
    columns = ["--text-column", "title,body", "--text-mode", given]
    code, _, stderr = predict(source, "--model", model_of_reviews, *columns)
    assert code == 2 and f"--text-mode {given}: the model was trained on" in stderr, stderr
    assert "leave it out" in stderr and stderr.count("\n") == 1


def test_lines_are_no_pairs_for_a_model_of_single_texts(model_of_reviews, tiny_model, predict, tmp_path):
    """Of a model that this script did not train, the flag alone tells it."""
    source = tmp_path / "new.txt"
    source.write_text("a good film\tfun\nno tab here\n")
    code, _, stderr = predict(source, "--model", model_of_reviews, "--text-mode", "pair")
    assert code == 2 and "--text-mode pair: the model was trained on single texts" in stderr, stderr
    code, _, stderr = predict(source, "--model", tiny_model, "--text-mode", "pair")
    assert code == 2 and "line 2: pairs are read, and the line has no two texts" in stderr, stderr


def test_evaluate_only_reads_the_labels_of_the_training(model_of_reviews, tmp_path, capsys):
    """The label that `mood` has, and not those of `label`, which are the other ones."""
    source, swapped = tmp_path / "both.csv", {"neg": "LABEL_1,LABEL_0", "pos": "LABEL_0,LABEL_1"}
    rows = [f"other {n},{text},{swapped[label]}" for n, (text, label) in enumerate(make_sentences(40))]
    source.write_text("\n".join(["text,review,label,mood", *rows]) + "\n")
    flags = ["--model", model_of_reviews, "--dataset", source, "--evaluate-only", *CPU]
    screens = []
    for named in ([], ["--text-column", "review", "--label-column", "mood"], ["--label-column", "label"]):
        assert exit_code_in_process(train_classifier, [*flags, *named]) == 0
        screens.append(capsys.readouterr().out)
    assert screens[0] == screens[1] != screens[2]


def test_evaluate_only_parts_labels_as_the_training_did(model_of_reviews, tmp_path, capsys):
    """A cell with two labels is no third label."""
    config, trained = model_of_reviews / "config.json", model_of_reviews / "training.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "problem_type": "multi_label_classification"})
    )
    settings = {**json.loads(trained.read_text()), "label_separator": ";", "thresholds": [0.5, 0.5]}
    trained.write_text(json.dumps(settings))
    source, labels = tmp_path / "several.csv", {"neg": "LABEL_0; LABEL_1", "pos": "LABEL_1"}
    rows = [f"{text},{labels[label]},{labels[label]}" for text, label in make_sentences(40)]
    source.write_text("\n".join(['review,mood,"good, or bad"', *rows]) + "\n")
    flags = ["--model", model_of_reviews, "--dataset", source, "--evaluate-only", *CPU]
    screens = []
    for named in ([], ["--label-separator", ";"], ["--label-column", "good, or bad"]):
        assert exit_code_in_process(train_classifier, [*flags, *named]) == 0, capsys.readouterr().err
        screens.append(capsys.readouterr().out)
    assert screens[0] == screens[1] == screens[2]


@pytest.mark.parametrize("name", ["new.txt", "-"])
@pytest.mark.parametrize(
    "header, flags, parts",
    [
        ("id,text", [], ("line 1", "column text", "--delimiter comma")),
        ("id;a, or b, or b", ["--text-column", "a, or b, or b"], ("line 1", "column a, or b", "semicolon")),
        ("a text", ["--text-column", "a, or b, or b"], ("--text-column a, or b, or b", "no columns")),
        ('"text"\tid', [], ("line 1", "column text", "--delimiter tab")),
        ("id;Review", ["--text-column", "review"], ("--text-column review", "no columns", "--delimiter")),
    ],
)
def test_a_table_is_not_read_as_lines(name, header, flags, parts, predict, tmp_path, monkeypatch):
    """Each row would be a text, with its label in it, and the header the first of them."""
    (tmp_path / "new.txt").write_text(f"{header}\n1,a wonderful film\n")
    with open(tmp_path / "new.txt") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        code, stdout, stderr = predict("-" if name == "-" else tmp_path / name, *flags)
    assert code == 2 and stdout == "" and all(part in stderr for part in parts), stderr
