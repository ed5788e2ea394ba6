"""Labelled splits: which are chosen, what is refused, class names, stratified cuts and samples."""

import gzip
import os
import random
import shlex
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer

import train_classifier
from common.columns import KeptColumns
from common.errors import UserError
from common.runtime import Runtime
from common.training import classifier, data, faults, unlabelled
from common.training.data import TextConfig
from common.training.labels import LabelConfig, flags_of_decimal_commas, tidy_labels
from common.training.run import SINGLE
from common.training.saved_settings import SavedSettings
from common.training.task import Task, task_of_rows
from common.training.tokenization import tokenize

PER_CLASS = st.lists(st.integers(3, 40), min_size=2, max_size=5)


def make(labels: list, **features) -> datasets.Dataset:
    """Return rows with the given labels and texts that are all different."""
    columns = {"text": [f"text {number}" for number in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(
        columns, features=datasets.Features(text=datasets.Value("string"), **features) if features else None
    )


def labelled(per_class: list[int]) -> datasets.Dataset:
    """Return validated rows, shuffled, with so many rows of each class."""
    labels = [f"class {number}" for number, count in enumerate(per_class) for _ in range(count)]
    random.Random(0).shuffle(labels)
    return data.checked_splits(datasets.DatasetDict(train=make(labels)))["train"]


def assert_stratified(part: datasets.Dataset, whole: datasets.Dataset):
    counts, totals = Counter(part["label"][:]), Counter(whole["label"][:])
    for label, total in totals.items():
        assert abs(counts[label] - total * len(part) / len(whole)) < 1


@given(per_class=PER_CLASS, share=st.floats(0.05, 0.9), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_a_cut_is_stratified_disjoint_and_complete(per_class, share, seed):
    rows = labelled(per_class)
    size = min(max(round(share * len(rows)), len(per_class)), len(rows) - len(per_class))
    rest, part = data.stratified_cut(rows, size, seed=seed, purpose="a test split")
    assert len(part) == size
    assert sorted(rest["row"][:] + part["row"][:]) == rows["row"][:]
    assert rest["row"][:] == sorted(rest["row"][:]) and part["row"][:] == sorted(part["row"][:])
    # each class has its share, up to rounding, and at least a row, for which larger ones make room
    counts, totals = Counter(part["label"][:]), Counter(rows["label"][:])
    shares = {label: total * size / len(rows) for label, total in totals.items()}
    room = sum(share < 1 or total - share < 1 for share, total in zip(shares.values(), totals.values()))
    for label, share in shares.items():
        assert 1 <= counts[label] <= totals[label] - 1
        assert -1 - room < counts[label] - share < 1 + room
    if room == 0:
        assert_stratified(part, rows)
    by_row = dict(zip(rows["row"], zip(rows["text"], rows["label"])))
    for piece in (rest, part):  # each row keeps its text and its label
        assert [by_row[row] for row in piece["row"]] == list(zip(piece["text"], piece["label"]))


@given(per_class=PER_CLASS, share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_a_sample_is_stratified_and_has_the_size_that_was_asked_for(per_class, share, seed):
    rows = labelled(per_class)
    size = max(len(per_class), round(share * (len(rows) + 5)))
    sample = data.sample(rows, size, seed=seed, flag="--max-eval-samples")
    assert len(sample) == min(size, len(rows))
    assert sample["row"][:] == sorted(set(sample["row"]) & set(rows["row"]))
    assert_stratified(sample, rows)


def test_a_sample_may_leave_fewer_rows_than_classes():
    """scikit-learn's train_test_split refuses it, since nothing would be left to test on."""
    rows = labelled([10, 10, 1])
    for size in (20, 21, 22, 100):
        assert len(data.sample(rows, size, seed=0, flag="")) == min(size, 21)
    assert data.sample(rows, None, seed=0, flag="") is rows


def test_a_sample_smaller_than_the_number_of_classes_is_refused():
    with pytest.raises(UserError, match="^--max-train-samples 2: .*use at least 3"):
        data.sample(labelled([5, 5, 5]), 2, seed=0, flag="--max-train-samples")


@pytest.mark.parametrize(
    "pick",
    [
        lambda rows, seed: data.stratified_cut(rows, 30, seed=seed, purpose="")[1]["row"][:],
        lambda rows, seed: data.sample(rows, 30, seed=seed, flag="")["row"][:],
    ],
    ids=["cut", "limit"],
)
def test_the_seed_alone_decides(pick):
    rows = labelled([40, 60, 20])
    first = pick(rows, 7)
    random.seed(123)  # the state of the global generators has no part in it
    assert pick(rows, 7) == first
    assert len({tuple(pick(rows, seed)) for seed in range(10)}) == 10


def test_missing_splits_are_cut_from_train():
    rows = labelled([100, 60, 40])
    splits, cut = data.cut_missing_splits(datasets.DatasetDict(train=rows), seed=0)
    assert list(splits) == ["train", "validation", "test"] and cut == ["validation", "test"]
    assert {split: len(part) for split, part in splits.items()} == {
        "train": 160,
        "validation": 20,
        "test": 20,
    }
    assert sorted(row for part in splits.values() for row in part["row"]) == rows["row"][:]
    for part in splits.values():
        assert Counter(part["label"][:]) == {0: len(part) // 2, 1: len(part) * 3 // 10, 2: len(part) // 5}


def test_a_given_split_stays_as_it_is():
    rows, test = labelled([50, 50]), labelled([3, 3])
    splits, cut = data.cut_missing_splits(datasets.DatasetDict(train=rows, test=test), seed=0)
    assert cut == ["validation"] and splits["test"] is test
    assert (len(splits["train"]), len(splits["validation"])) == (90, 10)


def test_a_small_data_set_gets_a_row_of_each_class_in_every_split():
    splits, _ = data.cut_missing_splits(datasets.DatasetDict(train=labelled([3, 3, 3, 3])), seed=0)
    assert all(set(part["label"]) == {0, 1, 2, 3} for part in splits.values())


@given(per_class=st.lists(st.integers(3, 60), min_size=2, max_size=6), seed=st.integers(0, 2**32 - 1))
@example(per_class=[100, 100, 3], seed=0)
@settings(max_examples=25)
def test_every_class_is_in_every_split_however_rare(per_class, seed):
    rows = labelled(per_class)
    splits, _ = data.cut_missing_splits(datasets.DatasetDict(train=rows), seed=seed)
    assert all(set(part["label"]) == set(range(len(per_class))) for part in splits.values())
    assert sorted(row for part in splits.values() for row in part["row"]) == rows["row"][:]
    size = max(round(len(rows) / 10), len(per_class))
    assert len(splits["validation"]) == len(splits["test"]) == size


@pytest.mark.parametrize("labels", [["a"] * 20 + ["rare"], ["a"] * 3 + ["rare"] * 2, ["a", "rare", "a"]])
def test_a_class_with_too_few_rows_to_cut_is_named(labels):
    rows = data.checked_splits(datasets.DatasetDict(train=make(labels)))
    has = f"'rare' has {labels.count('rare')}.* 3 are needed; .*--drop-rare 3.*--merge-rare"
    with pytest.raises(UserError, match=f"a validation and a test split can't be cut .*{has}"):
        data.cut_missing_splits(rows, seed=0)


@pytest.mark.parametrize(
    "added, advice", [(["A"], "spellings with --clean-labels"), (["a; b"], "add --label-separator ';'")]
)
def test_the_way_out_for_a_class_with_too_few_rows_is_that_of_its_labels(added, advice):
    rows = data.checked_splits(datasets.DatasetDict(train=make(["a"] * 9 + ["b"] * 9 + added)))
    with pytest.raises(UserError, match=f"can't be cut .*{advice}.*--drop-rare 3"):
        data.cut_missing_splits(rows, seed=0)


def test_labels_that_may_be_numbers_are_said_to_be():
    rows = data.checked_splits(datasets.DatasetDict(train=make([f"{number},5" for number in range(30)])))
    with pytest.raises(UserError, match="can't be cut .*if they are numbers, add --decimal ,"):
        data.cut_missing_splits(rows, seed=0)
    rows = data.checked_splits(datasets.DatasetDict(train=make([str(number) for number in range(30)])))
    with pytest.raises(UserError, match="can't be cut .*add --task regression"):
        data.cut_missing_splits(rows, seed=0)


SPELLINGS = {"pos": ["pos", "pos", " pos", "POS ", "Pos"], "neg": ["neg", "neg", "nEg", "neg  "]}


@settings(max_examples=10)
@given(st.permutations([spelled for group in SPELLINGS.values() for spelled in group]))
def test_tidy_labels_are_the_most_frequent_spelling_or_none(labels):
    missing = ["NaN", "n/a", " ", "NULL"]
    splits = {"train": make([*labels, *missing, None]), "test": make(["PoS", "other", "NA"])}
    config = LabelConfig(clean_labels=True).among(())
    tidied, changes = tidy_labels(splits, config)
    expected = [name for label in labels for name, group in SPELLINGS.items() if label in group]
    assert tidied["train"]["label"][:] == [*expected, *[None] * 5]
    assert tidied["test"]["label"][:] == ["pos", "other", None]
    assert changes["PoS"] == "pos" and changes["NA"] is None and "pos" not in changes
    assert tidied["train"]["text"][:] == splits["train"]["text"][:]
    trained, _ = tidy_labels(splits, config, ["POS ", "neg"])
    assert set(trained["train"]["label"][:]) == {"POS ", "neg", None}
    same, none = tidy_labels(splits, LabelConfig().among(()))
    assert same["train"]["label"][:] == splits["train"]["label"][:] and not none


def test_tidy_labels_of_a_cell_with_several():
    rows = make(["a; B", "b ;a", "b", "NaN", ""])
    config = LabelConfig(label_separator=";", clean_labels=True).among(())
    tidied, _ = tidy_labels({"train": rows}, config)
    assert tidied["train"]["label"][:] == ["a;b", "b;a", "b", "", ""]


def test_decimal_commas():
    meant = {"1,5": "1.5", "-,25": "-.25", "2": "2", "1.5": "1.5", "a,5": "a,5", "1,5,2": "1,5,2"}
    meant |= {"1.154,91": "1154.91", "-1.000.154": "-1000154", "1.15,9": "1.15,9", "1.1545": "1.1545"}
    rows = make(list(meant))
    tidied, _ = tidy_labels({"train": rows}, LabelConfig(decimal=",").among(()))
    assert tidied["train"]["label"][:] == list(meant.values())


@pytest.mark.parametrize(
    "values, names",
    [
        (["b", "a", "B"], ["B", "a", "b"]),
        ([10, 9, -1, 100, 0], ["-1", "0", "9", "10", "100"]),
        # what only looks like a number is a name
        (["10", "9", "ten", "-1", "²", "--5"], ["-1", "9", "10", "--5", "ten", "²"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_class_names_are_sorted_and_numbers_by_value(values, names):
    random.Random(1).shuffle(values)
    rows = data.checked_splits(datasets.DatasetDict(train=make(values)))["train"]
    assert rows.features["label"] == datasets.ClassLabel(names=names)
    assert [names[label] for label in rows["label"]] == [str(value) for value in values]


@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=30).filter(
        lambda values: len(set(values)) > 1
    )
)
@settings(max_examples=25)
def test_whole_numbers_are_classes_in_their_order(values):
    rows = data.checked_splits(datasets.DatasetDict(train=make(values)))["train"]
    assert rows.features["label"].names == [str(value) for value in sorted(set(values))]
    assert [int(rows.features["label"].int2str(label)) for label in rows["label"]] == values


def test_class_label_keeps_its_order_and_its_empty_classes():
    feature = datasets.ClassLabel(names=["zebra", "ant", "unused"])
    rows = data.checked_splits(datasets.DatasetDict(train=make([0, 1, 0], label=feature)))["train"]
    assert rows.features["label"].names == ["zebra", "ant", "unused"] and rows["label"][:] == [0, 1, 0]


def test_labels_of_every_split_get_the_numbers_of_the_training_split():
    splits = datasets.DatasetDict(train=make(["x", "y", "z"]), validation=make(["z", "y"]), test=make(["z"]))
    splits = data.checked_splits(splits)
    assert {split: rows["label"][:] for split, rows in splits.items()} == {
        "train": [0, 1, 2],
        "validation": [2, 1],
        "test": [2],
    }
    assert all(rows.features["label"].names == ["x", "y", "z"] for rows in splits.values())


def test_labels_may_be_numbers_in_one_split_and_strings_in_another():
    splits = data.checked_splits(datasets.DatasetDict(train=make([9, 10]), test=make(["10", "9"])))
    assert splits["test"]["label"][:] == [1, 0]


def test_the_classes_of_a_trained_model_give_the_numbers():
    splits = data.checked_splits(
        datasets.DatasetDict(test=make(["a", "c", "a"])), trained=Task(SINGLE, tuple(["c", "b", "a"]))
    )
    assert splits["test"]["label"][:] == [2, 0, 2] and splits["test"].features["label"].names == [
        "c",
        "b",
        "a",
    ]
    with pytest.raises(
        UserError,
        match="split test, row 2: the label 'd' is not one of .* model's training .a, b, c.; correct",
    ):
        data.checked_splits(
            datasets.DatasetDict(test=make(["a", "d"])), trained=Task(SINGLE, tuple(["c", "b", "a"]))
        )


def test_the_columns_are_text_label_and_row():
    rows = datasets.Dataset.from_dict(
        {"row": ["x", "y"], "stars": [5, 1], "review": ["good", "bad"], "text": [1, 2], "label": [None, None]}
    )
    rows = data.checked_splits(
        datasets.DatasetDict(train=rows), TextConfig("review").among(()), LabelConfig("stars").among(())
    )["train"]
    assert rows[:] == {"text": ["good", "bad"], "label": [1, 0], "row": [1, 2]}


@pytest.mark.parametrize(
    "rows, message",
    [
        (make(["a", None]), "split train, row 2: the label in column 'label' is missing; "),
        (make(["a", ""]), "split train, row 2: the label in column 'label' is missing; "),
        (make(["a", "b", " "]), "split train, row 3: the label in column 'label' is missing; "),
        (make([1, None]), "split train, row 2: the label in column 'label' is missing; "),
        (
            make([1.0, 2.5]),
            (
                "split train: column 'label' holds float64, but labels are strings or whole numbers;"
                " .*--label-column"
            ),
        ),
        (make([["a"], ["b", "c"]]), "split train, row 2: column 'label' holds 2 labels, .* --task multi"),
        (make([None, None]), "split train: column 'label' holds null, but labels are "),
        (
            make(["a", "a"]),
            (
                "split train: every row has the label 'a'; a classifier needs at least two classes;"
                " .*--label-column"
            ),
        ),
        (
            make(["a", "b"]).rename_column("label", "stars"),
            "split train: no column 'label' among text, stars; .*--label-column",
        ),
        (
            make(["a", "b"]).rename_column("text", "review"),
            "split train: no column 'text' among review, label; .*--text-column",
        ),
        (make(["a", "b"]).select([]), "split train: it has no rows; .*--train-split"),
        (
            make([0, -1], label=datasets.ClassLabel(names=["a", "b"])),
            "split train, row 2: the label -1 is not one of the 2 classes; .*--train-split",
        ),
        (
            make([0, None], label=datasets.ClassLabel(names=["a", "b"])),
            "split train, row 2: the label None is not one of the 2 classes",
        ),
    ],
)
def test_what_is_wrong_with_labels_is_said_with_its_place(rows, message):
    with pytest.raises(UserError, match=f"^{message}"):
        data.checked_splits(datasets.DatasetDict(train=rows), labels=LabelConfig(task=SINGLE).among(()))


def test_a_label_that_train_lacks_is_named_with_the_labels_that_it_has():
    splits = datasets.DatasetDict(
        train=make([str(number) for number in range(12)]), validation=make(["3", "12"])
    )
    with pytest.raises(
        UserError,
        match=r"split validation, row 2: the label '12' does not occur in the training split "
        r"\(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. \(12 in all\)\); correct or remove the row",
    ):
        data.checked_splits(splits)


@pytest.mark.parametrize(
    "present, wanted, chosen",
    [
        (["train", "validation", "test"], {}, {"train": "train", "validation": "validation", "test": "test"}),
        (["training", "dev"], {}, {"train": "training", "validation": "dev"}),
        (["train", "valid", "val"], {}, {"train": "train", "validation": "valid"}),
        (["train", "test", "extra"], {"test": "extra"}, {"train": "train", "test": "extra"}),
        (["all"], {"train": "all"}, {"train": "all"}),
        (["TRAIN", "Test", "test"], {}, {"train": "TRAIN", "test": "test"}),
        (["train", "Dev"], {}, {"train": "train", "validation": "Dev"}),
    ],
)
def test_splits_are_found_by_their_usual_names_or_the_given_ones(present, wanted, chosen):
    found = datasets.DatasetDict({name: make([name]) for name in present})
    splits = data.choose_splits(
        found, {split: wanted.get(split) for split in ("train", "validation", "test")}
    )
    assert {split: rows["label"][0] for split, rows in splits.items()} == chosen


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"train": None}, "--train-split train: no such split; .*all, test"),
        ({"test": "tset"}, "--test-split tset: no such split; .*all, test"),
    ],
)
def test_a_split_that_is_not_there_is_refused_with_those_that_are(wanted, message):
    with pytest.raises(UserError, match=message):
        data.choose_splits(datasets.DatasetDict(all=make(["a"]), test=make(["a"])), wanted)


def test_the_screen_says_which_splits_were_cut_and_how_many_texts_are_shared(tmp_path, cache_dir, capsys):
    for name, count, text in (("train", 40, "text"), ("test", 10, "  Text -")):
        (tmp_path / f"{name}.csv").write_text(
            "text,label\n" + "".join(f"{text} {number},{number % 2}\n" for number in range(count))
        )
    flags = [
        "--dataset",
        str(tmp_path),
        "--cache-dir",
        str(cache_dir),
        "--seed",
        "3",
        "--max-eval-samples",
        "4",
    ]
    args = train_classifier.make_parser().parse_args(flags)
    config = train_classifier.data_config(args)
    loaded = data.load_splits(config, Runtime(torch.device("cpu"), "fp32"))
    shown = capsys.readouterr().out
    numbers = [{text.split()[-1] for text in loaded[split]["text"]} for split in ("train", "test")]
    shared = len(set.intersection(*numbers))
    assert shared > 0
    assert "36 train, 4 validation, 4 test texts, 2 classes" in shown
    assert "validation cut from train: 10 % each, stratified, with seed 3" in shown
    assert f"{shared} test texts also in train" in shown


def test_class_names_go_into_the_models_config(tiny_model):
    model, head = classifier.load_classifier(
        tiny_model, name="tiny", task=Task(SINGLE, ("sport", "arts", "9")), dropout={}, pad_token_id=0
    )
    assert model.config.id2label == {0: "sport", 1: "arts", 2: "9"} and model.config.label2id == {
        "sport": 0,
        "arts": 1,
        "9": 2,
    }
    assert head == "a new head" and model.config.num_labels == model.classifier.out_features == 3


def test_a_head_of_as_many_classes_stays_and_is_not_called_new(tiny_model):
    model, head = classifier.load_classifier(
        tiny_model, name="tiny", task=Task(SINGLE, ("ham", "spam")), dropout={}, pad_token_id=0
    )
    assert "saved" in head and torch.equal(
        model.classifier.weight, load_file(tiny_model / "model.safetensors")["classifier.weight"]
    )


# Real files, as they are: small ones of exactly their shapes --------------------------------------

AG_NEWS = "".join(
    f'"{number % 4 + 1}","Title {number}, again","Text {number}: a ""quoted"" part #36;{number}\\, more"\n'
    for number in range(80)
)
TREC = "".join(
    f"{label}:{fine} What is the caf\xe9 {number} : of it ?\n"
    for number in range(30)
    for label, fine in (("DESC", "manner"), ("ENTY", "animal"))
)
SPAM = "".join(
    f"{label}\t{text}{number}\n"
    for number in range(40)
    for label, text in (("ham", 'Go until "jurong'), ("spam", '"Free entry in 2 a wkly comp'))
)
FASTTEXT = "".join(f"__label__{'ab'[number % 2]} how much {number} , salt ?\n" for number in range(60))
# name: (files, flags, classes, a text)
REAL = {
    "AG News": (
        {"test.csv": AG_NEWS},
        "--dataset test.csv --columns label,title,text",
        ["1", "2", "3", "4"],
        'Text 0: a "quoted" part #36;0\\, more',
    ),
    "AG News, compressed": (
        {"train.csv.gz": gzip.compress(AG_NEWS.encode()), "test.csv": AG_NEWS},
        "--train-file train.csv.gz --test-file test.csv --columns label,title,text",
        ["1", "2", "3", "4"],
        'Text 0: a "quoted" part #36;0\\, more',
    ),
    "TREC-6": (
        {"train_5500.label": TREC.encode("latin-1"), "TREC_10.label": TREC.encode("latin-1")},
        "--train-file train_5500.label --test-file TREC_10.label --columns label,fine,text"
        " --delimiter ': ' --encoding latin-1",
        ["DESC", "ENTY"],
        "What is the café 0 : of it ?",
    ),
    "TREC with fine classes": (
        {"train_5500.label": TREC.encode("latin-1")},
        "--dataset train_5500.label --columns label,text --delimiter space --encoding latin-1",
        ["DESC:manner", "ENTY:animal"],
        "What is the café 0 : of it ?",
    ),
    "SMSSpamCollection": (
        {"SMSSpamCollection": SPAM},
        "--dataset SMSSpamCollection --columns label,text",
        ["ham", "spam"],
        'Go until "jurong0',
    ),
    "fastText": ({"cooking.train": FASTTEXT}, "--dataset cooking.train", ["a", "b"], "how much 0 , salt ?"),
    "fastText with several labels": (
        {"cooking.train": FASTTEXT.replace("__label__b", "__label__food-safety __label__b")},
        "--dataset cooking.train",
        ["a", "b", "food-safety"],
        "how much 1 , salt ?",
    ),
    "IMDb": (
        {
            f"aclImdb/{split}/{label}/{number}_1.txt": f"{split} {label}<br />{number}"
            for split in ("train", "test")
            for label in ("neg", "pos", *(["unsup"] if split == "train" else []))
            for number in range(20)
        },
        "--dataset aclImdb",
        ["neg", "pos"],
        "train neg<br />0",
    ),
    "nested JSON": (
        {
            "t.jsonl": "".join(
                f'{{"body": {{"en": "text {n}"}}, "meta": {{"stars": {n % 2}}}}}\n' for n in range(40)
            )
        },
        "--dataset t.jsonl --text-column body.en --label-column meta.stars",
        ["0", "1"],
        "text 0",
    ),
    "numbers that pandas wrote beside a missing value": (
        {"t.csv": "text,label\n" + "".join(f"text {n},{n % 2}.0\n" for n in range(40))},
        "--dataset t.csv",
        ["0", "1"],
        "text 0",
    ),
    "three files": (
        {
            f"{split}.tsv": "text\tlabel\n" + "".join(f"{split} {n}\t{n % 2}\n" for n in range(20))
            for split in ("a", "b", "c")
        },
        "--train-file a.tsv --validation-file b.tsv --test-file c.tsv",
        ["0", "1"],
        "a 0",
    ),
}


@pytest.mark.parametrize("files, flags, classes, text", REAL.values(), ids=REAL)
def test_a_real_file_is_read_as_it_is(files, flags, classes, text, tmp_path, monkeypatch, cache_dir):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    args = train_classifier.make_parser().parse_args([*shlex.split(flags), "--cache-dir", str(cache_dir)])
    splits = data.load_splits(train_classifier.data_config(args), Runtime(torch.device("cpu"), "fp32"))
    assert list(task_of_rows(splits["train"]).names) == classes
    assert text in [text for rows in splits.values() for text in rows["text"][:]]


def test_a_file_of_a_split_takes_the_place_of_the_data_sets_own(tmp_path, cache_dir):
    for name in ("train", "test", "other"):
        rows = "".join(f"{name} {n},{n % 2}\n" for n in range(40))
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").rename(tmp_path / "data" / f"{name}.csv")
    flags = ["--dataset", tmp_path / "data", "--test-file", tmp_path / "other.csv", "--cache-dir", cache_dir]
    args = train_classifier.make_parser().parse_args(list(map(str, flags)))
    runtime = Runtime(torch.device("cpu"), "fp32")
    splits = data.load_splits(train_classifier.data_config(args), runtime)
    assert all(text.startswith("other") for text in splits["test"]["text"])
    rows = data.load_rows_for_scoring(
        train_classifier.data_config(args), Task(SINGLE, ("0", "1")), SavedSettings(), runtime
    )
    assert rows["text"][:] == splits["test"]["text"][:]


# Labels as they are written -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels, names",
    [
        (["1.0", "0.0", "1.0"], ["0", "1"]),
        ([1.0, 0.0, 1.0], ["0", "1"]),
        (["1.0", "0"], ["0", "1"]),
        (["007", "7", "7.0"], ["007", "7", "7.0"]),
        (["1.10", "1.1"] * 3, ["1.1", "1.10"]),  # versions
        (["1.1.0", "1.2"] * 3, ["1.1.0", "1.2"]),
        (["01.5", "02.5"], ["01.5", "02.5"]),
        (["1e3", "2"], ["2", "1e3"]),
        (["Rain", "rain ", " rain"], [" rain", "Rain", "rain "]),
    ],
)
def test_labels_are_names_as_they_are_written(labels, names):
    rows = data.checked_splits(datasets.DatasetDict(train=make(labels)))["train"]
    assert rows.features["label"].names == names


def test_whole_labels_agree_between_splits_and_with_a_trained_model():
    splits = datasets.DatasetDict(train=make(["0", "1"]), test=make(["1.0", "0.0"]), validation=make([1.0]))
    assert data.checked_splits(splits)["test"]["label"][:] == [1, 0]
    test = datasets.DatasetDict(test=make(["1.0", "2.0"]))
    assert data.checked_splits(test, trained=Task(SINGLE, tuple(["1", "2"])))["test"]["label"][:] == [0, 1]
    with_decimals = data.checked_splits(test, trained=Task(SINGLE, ("1.0", "1.5", "2.0")))
    assert with_decimals["test"]["label"][:] == [0, 2]


@pytest.mark.parametrize("labels", [["0.5", "1.0", "1.5"] * 1000, [0.5, 1.0, 1.5] * 1000])
def test_few_numbers_with_decimals_are_classes_only_where_that_is_said(labels):
    splits, single = datasets.DatasetDict(train=make(labels)), LabelConfig(task=SINGLE).among(())
    rows = data.checked_splits(splits, labels=single)["train"]
    assert rows.features["label"].names == ["0.5", "1.0", "1.5"]


@pytest.mark.parametrize("labels", [[f"{n / 7:.3f}" for n in range(1, 31)], ["1.5", "2.0"], ["0.25", "3"]])
def test_scores_are_no_classes(labels):
    splits, single = datasets.DatasetDict(train=make(labels)), LabelConfig(task=SINGLE).among(())
    with pytest.raises(UserError, match="'label' holds decimal numbers, but labels are"):
        data.checked_splits(splits, labels=single)


@pytest.mark.parametrize(
    "names, groups",
    [
        (["Rain", "rain ", " rain", "sun"], [["Rain", "rain ", " rain"]]),
        (["caf\u00e9", "cafe\u0301", "cafe"], [["caf\u00e9", "cafe\u0301"]]),
        (["1", "01", "10", "0", "00"], [["1", "01"], ["0", "00"]]),
        (["a b", "a  b", "ab"], [["a b", "a  b"]]),
        (["x", "x\u200b", "\ufeffx", "x\0", "x\u00ad"], [["x", "x\u200b", "\ufeffx", "x\0", "x\u00ad"]]),
        (["1.1", "1.10", "1e3", "1000", "0", "-0"], [["1.1", "1.10"], ["1e3", "1000"], ["0", "-0"]]),
        (["10000000000000001", "10000000000000002", "1.1.0", "1.1"], []),
    ],
)
def test_class_names_that_look_the_same(names, groups):
    assert faults.near_equal_names(names) == groups


@pytest.mark.parametrize(
    "names, separator",
    [
        (["drama; Comedy", "horror"], ";"),
        (["a|b", "c"], "|"),
        (["drama, crime", "crime"], ","),
        (["drama, crime", "crime, comedy"], ","),
        (["action/crime", "action"], "/"),
        (["London, UK", "Paris, France"], None),
        (["input/output", "memory"], None),
        (["a;", "b"], None),
        (["good film", "bad film"], None),
    ],
)
def test_class_names_that_look_like_lists(names, separator):
    assert faults.list_separator(names) == separator


@pytest.mark.parametrize(
    "names, flags",
    [
        (["1,0", "1,3"], "--decimal ,"),
        (["1", "-2,5", " 3 "], "--decimal ,"),
        (["1.154,91", "3,5", "1.154"], "--decimal ,"),
        (["1,0", "2,0"], "--task regression --decimal ,"),  # without the task, these would be classes
        (["+1,5", "-0,5"], "--task regression --decimal ,"),
        (["1,0", "good"], ""),
        (["1", "2"], ""),
        (["1.5", "2.5"], ""),
        (["1,2,3", "4"], ""),
    ],
)
def test_class_names_that_look_like_numbers_with_a_comma(names, flags):
    assert flags_of_decimal_commas(names) == flags
    numbers = f"if they are numbers, add {flags}"
    assert (numbers in faults.read_otherwise(names)) == bool(flags)


def test_class_names_that_look_the_same_are_said(tmp_path, cache_dir, capsys):
    rows = "".join(f"text {n},{['Rain', 'rain ', 'sun'][n % 3]}\n" for n in range(60))
    (tmp_path / "t.csv").write_text(f"text,label\n{rows}")
    flags = ["--dataset", str(tmp_path / "t.csv"), "--cache-dir", str(cache_dir)]
    config = train_classifier.data_config(train_classifier.make_parser().parse_args(flags))
    data.load_splits(config, Runtime(torch.device("cpu"), "fp32"))
    assert "'Rain' and 'rain ' are different classes" in capsys.readouterr().out


def test_splits_that_are_not_used_are_said(tmp_path, cache_dir, capsys):
    rows = "".join(f"text {n},{['a', 'b'][n % 2]}\n" for n in range(60))
    for name in ("train", "dev", "val", "notes"):
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    flags = ["--dataset", str(tmp_path), "--cache-dir", str(cache_dir)]
    config = train_classifier.data_config(train_classifier.make_parser().parse_args(flags))
    data.load_splits(config, Runtime(torch.device("cpu"), "fp32"))
    assert "not used: dev, notes; name one with --train-split" in capsys.readouterr().out


def test_the_text_is_not_its_own_label():
    with pytest.raises(UserError, match="--text-column text: --label-column names the same column"):
        data.checked_splits(
            datasets.DatasetDict(train=make(["a", "b"])),
            TextConfig().among(()),
            LabelConfig("text").among(()),
        )


# The cache of tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["a byte", "the end", "the proof", "nothing"])
def test_damaged_tokens_are_made_anew_and_that_is_said(damage, tiny_model, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = labelled([5, 5])

    def tokens():
        return tokenize(rows, tokenizer, max_length=8, truncation="head", cache_dir=str(tmp_path))[:]

    expected = tokens()
    (cached,) = (tmp_path / "tokenized").glob("*.arrow")
    content = bytearray(cached.read_bytes())
    if damage == "a byte":
        content[len(content) // 2] ^= 0xFF
    if damage == "the end":
        del content[len(content) // 2 :]
    cached.write_bytes(content)
    if damage == "the proof":
        cached.with_suffix(".sha256").unlink()
    assert tokens() == expected
    said = capsys.readouterr().err
    assert ("is damaged" in said) == (damage in ("a byte", "the end"))
    assert tokens() == expected


def test_a_run_notices_a_file_that_changed_with_the_same_size_and_time(tiny_model, tmp_path, cache_dir):
    tokenizer, path = AutoTokenizer.from_pretrained(tiny_model), tmp_path / "t.csv"
    path.write_text("text,label\n")
    flags = ["--dataset", str(path), "--cache-dir", str(cache_dir)]
    config = train_classifier.data_config(train_classifier.make_parser().parse_args(flags))
    fingerprints = set()
    for word in ("good", "poor", "good"):
        path.write_text("text,label\n" + "".join(f"{word} {n},{n % 2}\n" for n in range(40)))
        os.utime(path, ns=(1, 1))
        rows = data.load_splits(config, Runtime(torch.device("cpu"), "fp32"))["train"]
        options = {"max_length": 8, "truncation": "head", "cache_dir": str(cache_dir)}
        fingerprints.add((word, tokenize(rows, tokenizer, **options)._fingerprint))
    assert len(fingerprints) == 2


@pytest.mark.parametrize("column", ["text", "label", "part of a text"])
def test_parquet_that_is_no_utf8_is_refused_with_its_row(column, tmp_path, cache_dir):
    """Arrow writes and reads it unchecked."""
    names = ("text", "label", "part of a text")
    broken = pa.array([b"a", b"sch\xf6n", b"a", b"b"])
    broken = pa.Array.from_buffers(pa.string(), 4, broken.buffers())
    table = pa.table({name: broken if name == column else ["a", "b", "c", "d"] for name in names})
    pq.write_table(table, tmp_path / "t.parquet")
    flags = ["--dataset", str(tmp_path / "t.parquet"), "--cache-dir", str(cache_dir)]
    if column == "part of a text":
        flags += ["--text-column", f"text,{column}", "--text-mode", "join"]
    config = train_classifier.data_config(train_classifier.make_parser().parse_args(flags))
    with pytest.raises(UserError, match="split train, row 2: not UTF-8"):
        data.load_splits(config, Runtime(torch.device("cpu"), "fp32"))
    if column == "part of a text":  # as --predict reads it
        options = {"kept": KeptColumns(), "options": config.files, "cache_dir": None}
        with (
            pytest.raises(UserError, match="t.parquet, row 2: not UTF-8"),
            unlabelled.open_texts(config.dataset, config.texts, **options),
        ):
            pass
