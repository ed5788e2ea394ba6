"""Finished runs side by side, from the files that they leave: the table, the paired tests against
statsmodels and NumPy, and the texts on which they disagree.
"""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import permutation_test, spearmanr
from sklearn.metrics import f1_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

import train_classifier
from common.errors import UserError
from common.training import comparison
from conftest import exit_code_in_process

NAMES = ["no", "yes", "1.10"]


def write_run(folder: Path, header: list[str], rows: list[list], *, results: dict | None = None, **settings):
    """Write the files of a finished run, of those that --compare reads."""
    folder.mkdir(parents=True)
    versions = {"torch": "2"}
    config = {"lr": 1e-4, "seed": 0, "output_dir": str(folder), "versions": versions, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    written = {"test_accuracy": 0.5, "test_intervals": {}, "train_seconds": 12.3, **(results or {})}
    (folder / "metrics.json").write_text(json.dumps(written))
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


def single_rows(predicted: list[int], labels: list[int], first: int = 0) -> list[list]:
    return [
        [n, NAMES[true], NAMES[said], "0.9", *["0.3"] * 3, f"text {first + n // 2},\n" + "long " * 40_000]
        for n, (true, said) in enumerate(zip(labels, predicted))
    ]


HEADER = ["row", "true", "predicted", "confidence", *(f"score {name}" for name in NAMES), "text"]


@pytest.fixture(scope="module")
def guesses():
    """Labels of 80 texts, and what three runs say: the second is better, the third as good as the first."""
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=80)
    said = [
        np.where(generator.random(80) < share, labels, generator.integers(3, size=80))
        for share in (0.4, 0.9, 0.4)
    ]
    return labels, said


@pytest.fixture
def compare(capsys):
    """Return a function that compares runs and returns the exit code, stdout and stderr."""

    def run(*flags) -> tuple[int, str, str]:
        code = exit_code_in_process(train_classifier, ["--compare", *flags])
        return code, *capsys.readouterr()

    return run


def test_runs_are_tested_against_the_first_on_their_rows(guesses, compare, tmp_path):
    """Texts of 200,000 characters, each of them twice, with line ends; a class that looks like a number."""
    labels, said = guesses
    interval = {"test_intervals": {"accuracy": [0.25, 0.75]}}
    folders = [
        write_run(
            tmp_path / f"r{n}",
            HEADER,
            single_rows(one, labels),
            results=interval,
            lr=rate,
            columns=["a", "b"],
        )
        for n, (one, rate) in enumerate(zip(said, (1e-4, 1e-4, 5e-5)))
    ]
    code, screen, stderr = compare(*folders, "--output-dir", tmp_path / "tables")
    assert code == 0, stderr
    assert "test rows: 80, the same in all runs" in screen
    assert re.search(rf"^run +lr +accuracy +training seconds\n.*\n{folders[0]} +0.0001 ", screen, re.M)
    assert "0.5000 (0.2500 to 0.7500)" in screen and re.search(r" 12$", screen, re.M)
    with open(tmp_path / "tables" / "differences.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["score"]) for row in rows] == [
        (str(folder), score) for folder in folders[1:] for score in ("accuracy", "macro_f1")
    ]
    right = [one == labels for one in said]
    expected = []
    for number in (1, 2):
        table = [[(right[0] & right[number]).sum(), (right[0] & ~right[number]).sum()],
                 [(~right[0] & right[number]).sum(), 0]]  # fmt: skip
        expected.append(mcnemar(table, exact=True).pvalue)
        accuracy, macro_f1 = rows[2 * number - 2 : 2 * number]
        assert float(accuracy["difference"]) == pytest.approx(
            right[number].mean() - right[0].mean(), abs=1e-12
        )
        f1 = [f1_score(labels, said[of], average="macro") for of in (number, 0)]
        assert float(macro_f1["difference"]) == pytest.approx(f1[0] - f1[1], abs=1e-12)
        low, high = float(macro_f1["low"]), float(macro_f1["high"])
        assert low < f1[0] - f1[1] < high and (low > 0) == (float(macro_f1["p"]) < 0.05)
    found = [(float(row["p"]), float(row["p (Holm)"])) for row in rows[::2]]
    assert [p for p, _ in found] == pytest.approx(expected, rel=1e-9) and expected[0] < 0.00005
    assert [p for _, p in found] == pytest.approx(multipletests(expected, method="holm")[1], rel=1e-9)
    assert re.search(rf"^{folders[1]} +accuracy .* <0.0001 ", screen, re.M), "and not 0.0000"
    with open(tmp_path / "tables" / "comparison.csv", newline="") as file:
        scores = [{**row} for row in csv.DictReader(file)]
    assert [float(scores[0][f"accuracy{end}"]) for end in ("", " low", " high")] == [0.5, 0.25, 0.75]
    differ = [n for n in range(80) if any(said[0][n] != one[n] for one in said[1:])]
    assert f"disagree on {len(differ)} texts, of which 10 are shown" in screen
    with open(tmp_path / "tables" / "disagreements.csv", newline="") as file:
        shown = list(csv.DictReader(file))
    assert sorted(int(row["row"]) for row in shown) == differ and len(shown[0]["text"]) > 200_000
    assert all(row[f"predicted {folders[1]}"] == NAMES[said[1][int(row["row"])]] for row in shown)
    latex = (tmp_path / "tables" / "comparison.tex").read_text()
    assert latex.count(r"\begin{tabular}") == 2 and r"95 \% interval" in latex


def test_runs_with_other_test_rows_say_so(guesses, compare, tmp_path):
    """One shares half of the texts, one has another label for one, one shares none."""
    labels, said = guesses
    first = write_run(tmp_path / "a", HEADER, single_rows(said[0], labels))
    half = write_run(tmp_path / "b", HEADER, single_rows(said[1], labels, first=20))
    changed = np.array([(labels[0] + 1) % 3, *labels[1:]])
    relabelled = write_run(tmp_path / "c", HEADER, single_rows(said[1], changed))
    other = write_run(tmp_path / "d", HEADER, single_rows(said[1], labels, first=900))
    keys = comparison.read_run(first).rows.keys() & comparison.read_run(half).rows.keys()
    assert 0 < len(keys) <= 40
    code, screen, _ = compare(first, half, relabelled, other)
    assert code == 0
    assert f"{half}: {len(keys)} of its 80 test rows are among the 80 of {first}" in screen
    said_of = f"{relabelled}: 79 of its 80 test rows are among the 80 of {first}"
    assert f"{said_of}; with another label: 1 of its texts; tested on these" in screen
    assert f"{other}: 0 of its 80 test rows are among the 80 of {first}; nothing can be tested" in screen
    assert "they disagree on" in screen
    code, alone, _ = compare(first, other)
    assert code == 0 and "nothing can be tested" in alone and "disagree" not in alone
    assert not re.search(rf"^{other} +accuracy", screen, re.M) and re.search(
        rf"^{half} +accuracy", screen, re.M
    )


@pytest.mark.parametrize("num_rows", [1, 8])
def test_few_texts_are_not_called_significant(num_rows, compare, tmp_path):
    """Half of them, rounded up, are right in the second run alone. Oracle: SciPy's exact permutation test; a
    bootstrap said p 0.0020 of one text.
    """
    labels = np.arange(num_rows) % 2
    said = [labels.copy(), labels]
    said[0][: (num_rows + 1) // 2] ^= 1
    folders = [
        write_run(tmp_path / str(n), HEADER, single_rows(list(one), labels)) for n, one in enumerate(said)
    ]
    code, screen, _ = compare(*folders)

    def gain(first, second, axis):
        scores = [
            np.apply_along_axis(lambda one: f1_score(labels, one, average="macro"), axis, part)
            for part in (first, second)
        ]
        return scores[1] - scores[0]

    exact = 1.0
    if num_rows > 1:  # SciPy wants two
        exact = permutation_test(said, gain, permutation_type="samples").pvalue
    p = re.search(r"macro f1 .* ([\d.]+) +[a-z]+$", screen, re.M)
    assert code == 0 and p is not None and float(p[1]) == pytest.approx(exact, abs=0.03)


def test_labels_and_numbers_are_compared_too(compare, tmp_path):
    generator = np.random.default_rng(1)
    truth = generator.integers(2, size=(60, 2)) > 0
    said = [np.where(generator.random((60, 2)) < share, truth, ~truth) for share in (0.6, 0.95)]
    for number, one in enumerate(said):
        rows = [
            [n, *("|".join(np.array(["a", "b"])[has]) for has in (truth[n], one[n])), 0, 0, f"text {n}"]
            for n in range(60)
        ]
        header = ["row", "true", "predicted", "score a", "score b", "text"]
        write_run(tmp_path / f"labels-{number}", header, rows)
    code, screen, _ = compare(tmp_path / "labels-0", tmp_path / "labels-1")
    gain = (said[1] == truth).all(1).mean() - (said[0] == truth).all(1).mean()
    assert code == 0 and re.search(rf"subset accuracy +60 +\+{gain:.4f} .*McNemar, exact", screen)
    numbers = generator.random(60)
    guessed = [numbers + generator.normal(0, noise, 60) for noise in (0.3, 0.1)]
    for number, one in enumerate(guessed):
        rows = [[n, numbers[n], one[n], f"text {n}"] for n in range(60)]
        write_run(tmp_path / f"numbers-{number}", ["row", "true score", "predicted score", "text"], rows)
    code, screen, _ = compare(tmp_path / "numbers-0", tmp_path / "numbers-1")
    before, after = (np.sqrt(np.mean((one - numbers) ** 2)) for one in guessed)
    assert code == 0 and re.search(rf"rmse +60 +{after - before:.4f} .*randomization", screen)
    rows = [[n, numbers[n], guessed[0][n] / 5 + 6, f"text {n}"] for n in range(60)]  # its ranks are the same
    write_run(tmp_path / "numbers-2", ["row", "true score", "predicted score", "text"], rows)
    _, rescaled, _ = compare(tmp_path / "numbers-2", tmp_path / "numbers-1")
    found = [re.search(r"spearman +60 .*randomization.*", one)[0].split() for one in (screen, rescaled)]
    assert found[0] == found[1]
    before, after = (spearmanr(numbers, one).statistic for one in guessed)
    assert f"+{after - before:.4f}" in found[0] and "0.0010" in found[0]
    farthest = np.argmax(abs(guessed[0] - guessed[1]))
    assert re.search(rf"differ most:\n.*\n.*\ntext {farthest} ", screen)
    code, _, stderr = compare(tmp_path / "labels-0", tmp_path / "numbers-1")
    assert code == 2 and all(part in stderr for part in ("labels-0", "numbers (score)", "one task"))


def test_a_label_whose_name_looks_like_two_is_refused(compare, tmp_path):
    """It would be taken for `a` and `b`, and be in none of the scores."""
    header = ["row", "true", "predicted", "score a|b", "score c", "text"]
    rows = [[n, "a|b", "c", 0, 0, f"text {n}"] for n in range(9)]
    folders = [write_run(tmp_path / name, header, rows) for name in "xy"]
    code, stdout, stderr = compare(*folders)
    assert code == 2 and stdout == "" and str(folders[0]) in stderr and "label holds |" in stderr


@pytest.mark.parametrize(
    "spoil, parts",
    [
        (lambda run: (run / "predictions.csv").unlink(), ("no whole run", "predictions.csv")),
        (lambda run: (run / "predictions.csv").write_text("a,b\n1,2\n"), ("no whole run", "other columns")),
        (lambda run: (run / "predictions.csv").write_text(",".join(HEADER) + "\n1\n"), ("another length",)),
        (lambda run: (run / "predictions.csv").write_text(",".join(HEADER) + "\n"), ("empty",)),
        (lambda run: (run / "config.json").write_text("[["), ("no whole run",)),
        (lambda run: (run / "metrics.json").unlink(), ("no finished run",)),
        (lambda run: (run / "metrics.json").write_text("{}"), ("no whole run", "test_intervals")),
        (None, ("one run", "at least two")),
    ],
)
def test_what_can_not_be_compared_is_one_line(spoil, parts, guesses, compare, tmp_path):
    labels, said = guesses
    folders = [write_run(tmp_path / name, HEADER, single_rows(said[0], labels)[:9]) for name in "ab"]
    if spoil is not None:
        spoil(folders[1])
    code, stdout, stderr = compare(*(folders if spoil is not None else folders[:1]))
    assert code == 2 and stdout == "" and len(stderr.splitlines()) == 1
    assert "--compare" in stderr and all(part in stderr for part in parts), stderr


def test_a_run_is_not_compared_with_itself(guesses, compare, tmp_path):
    labels, said = guesses
    folders = [write_run(tmp_path / name, HEADER, single_rows(said[0], labels)[:9]) for name in "ab"]
    code, stdout, stderr = compare(*folders, f"{folders[0]}/")
    assert code == 2 and stdout == "" and f"{folders[0]} is named twice" in stderr


def test_a_place_for_tables_is_no_run(guesses, tmp_path):
    labels, said = guesses
    folders = [write_run(tmp_path / name, HEADER, single_rows(said[0], labels)[:9]) for name in "ab"]
    flags = ["--compare", *map(str, folders), "--output-dir", str(folders[0])]
    with pytest.raises(UserError, match="it holds a run"):
        train_classifier.make_parser().parse_args(flags)
