"""Finished runs side by side: their settings and scores, tests of the differences, and the texts on
which they disagree.

All of it is read from the folders of the runs, without PyTorch. Each run is tested against the
first one, on the test rows that both have: the same text with the same label.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common import terminal
from common.errors import UserError, counted, one_line, shorten
from common.files import read_json
from common.intervals import Interval, bootstrap, holm, mcnemar, percentiles, randomization
from common.training.resampling import Answers
from common.training.run import CONFIG, MULTI, REGRESSION, RESULTS, SINGLE, STARTED_IN, Kind, is_like
from common.training.study import headline_scores, latex_table, write_csv

PREDICTIONS = "predictions.csv"
# of config.json: what a run is called or when it was, and no setting of it
NO_SETTINGS = (
    *("output_dir", "started", "identity", "versions", "cache_dir", "save_every", "max_minutes"),
    *("keep", "keep_after", STARTED_IN),
)
NUM_SHOWN, TEXT_WIDTH, NAME_WIDTH = 10, 60, 30
# scores of the table of differences; the share of right texts is tested by McNemar's test
TESTED: dict[Kind, tuple[str, ...]] = {
    SINGLE: ("accuracy", "macro_f1"),
    MULTI: ("subset_accuracy", "macro_f1"),
    REGRESSION: ("rmse", "spearman"),
}
SHARES = ("accuracy", "subset_accuracy")
FILES = ("comparison.csv", "differences.csv", "disagreements.csv", "comparison.tex")
Key = tuple[str, tuple[str, ...], int]  # a text, what is true of it, and how often both came before


@dataclass(frozen=True)
class Row:
    """A test row of a run as it is written: what is true, what the run says, how sure it is."""

    text: str
    number: str
    true: tuple[str, ...]
    predicted: tuple[str, ...]
    confidence: str


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run has left in its folder."""

    name: str
    settings: dict[str, Any]
    results: dict[str, Any]
    kind: Kind
    names: list[str]  # of classes, labels or numbers
    rows: dict[Key, Row]


# Read ---------------------------------------------------------------------------------------------


def read_run(folder: Path) -> FinishedRun:
    """Return a finished run. Raises UserError when a file of it is damaged."""
    try:
        settings, results = read_json(folder / CONFIG), read_json(folder / RESULTS)
        with open(folder / PREDICTIONS, newline="", encoding="utf-8") as file:
            csv.field_size_limit(2**31 - 1)  # a text may be long
            reader = csv.DictReader(file, strict=True)
            kind, names = _kind_of(reader.fieldnames or [])
            rows = _keyed(_read_row(line, kind, names) for line in reader)
        if not rows or not isinstance(settings, dict) or not isinstance(results, dict):
            raise ValueError("a file of it is empty")
        if not isinstance(results["test_intervals"], dict) or not is_like(results["train_seconds"], 0.0):
            raise ValueError(f"{RESULTS} has no intervals or no time")
        return FinishedRun(str(folder), settings, results, kind, names, rows)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, csv.Error) as error:
        problem = f"no whole run ({one_line(error)})"
        raise UserError(f"--compare {folder}: {problem}; name another") from error


def _kind_of(columns: Sequence[str]) -> tuple[Kind, list[str]]:
    """Return the task of a run and the names of its answers, by the columns of its predictions."""
    numbers = [name.removeprefix("true ") for name in columns if name.startswith("true ")]
    if numbers and "true" not in columns:
        return REGRESSION, numbers
    names = [name.removeprefix("score ") for name in columns if name.startswith("score ")]
    if not {"row", "true", "predicted", "text"} <= set(columns) or not names:
        raise ValueError(f"{PREDICTIONS} has other columns")
    return SINGLE if "confidence" in columns else MULTI, names


def _read_row(line: dict[str, str], kind: Kind, names: list[str]) -> Row:
    def cells(what: str) -> tuple[str, ...]:
        if kind == REGRESSION:
            return tuple(line[f"{what} {name}"] for name in names)
        return (line[what],) if kind == SINGLE else tuple(filter(None, line[what].split("|")))

    if None in line or None in line.values():
        raise ValueError(f"{PREDICTIONS} has a line of another length")
    if kind == MULTI and not {*cells("true"), *cells("predicted")} <= {*names}:
        raise ValueError("the name of a label holds |, which parts labels")
    text = line["text"] + ("\t" + line["text_pair"] if "text_pair" in line else "")
    return Row(text, line["row"], cells("true"), cells("predicted"), line.get("confidence", ""))


def _keyed(rows: Iterable[Row]) -> dict[Key, Row]:
    """Return rows by text and label; of equal ones, each is a row of its own."""
    seen: Counter[tuple] = Counter()
    keyed = {}
    for row in rows:
        keyed[row.text, row.true, seen[row.text, row.true]] = row
        seen[row.text, row.true] += 1
    return keyed


def answers_of(run: FinishedRun, keys: Sequence[Key], names: list[str]) -> Answers:
    """Return the answers of a run on some of its rows, their classes or labels being `names`."""
    true = [run.rows[key].true for key in keys]
    said = [run.rows[key].predicted for key in keys]
    if run.kind == REGRESSION:
        truth, predicted = (np.array(values, dtype=np.float64) for values in (true, said))
    elif run.kind == SINGLE:
        index = {name: number for number, name in enumerate(names)}
        truth, predicted = (np.array([index[one] for (one,) in values]) for values in (true, said))
    else:
        truth, predicted = (
            np.array([[name in has for name in names] for has in values]) for values in (true, said)
        )
    return Answers(run.kind, truth, predicted, len(names))


# The differences ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A score of a run minus that of the first run, on the rows that both have."""

    run: str
    score: str
    rows: int
    value: float
    interval: Interval | None
    p: float
    test: str


def differences(first: FinishedRun, other: FinishedRun) -> list[Difference]:
    """Return the tested differences of two runs, [] when they have no row in common."""
    keys = [key for key in first.rows if key in other.rows]
    if not keys:
        return []
    names = list(dict.fromkeys([*first.names, *other.names]))
    both = [answers_of(run, keys, names) for run in (first, other)]
    right = [answers.is_right() for answers in both]
    statistics = [answers.statistics() for answers in both]

    def of_pairs(weights: np.ndarray) -> dict[str, np.ndarray]:
        before, after = (of_run(weights) for of_run in statistics)
        return {name: after[name] - before[name] for name in TESTED[first.kind]}

    resampled, p_values = bootstrap(of_pairs, len(keys)), _randomized(*both)
    exact = of_pairs(np.ones((1, len(keys)), dtype=int))
    found = []
    for name in TESTED[first.kind]:
        p, test = p_values[name], "randomization"
        if name in SHARES:
            only_first = int((right[0] & ~right[1]).sum())
            only_other = int((right[1] & ~right[0]).sum())
            p = mcnemar(only_first, only_other)
            test = f"McNemar, exact ({only_other} better, {only_first} worse)"
        value, interval = float(exact[name][0]), percentiles(resampled[name])
        found.append(Difference(other.name, name, len(keys), value, interval, p, test))
    return found


def _randomized(first: Answers, other: Answers) -> dict[str, float]:
    """Return the p-value of the difference of each score, by exchanging the answers of two runs.

    Spearman's correlation is one of ranks: for it, ranks are exchanged. Numbers of two runs can lie on
    different scales, and mixed they would have other ranks than in either run.
    """
    p_values = _exchanged(first, other)
    if first.kind == REGRESSION:
        from scipy.stats import rankdata

        ranked = [replace(one, predicted=rankdata(one.predicted, axis=0)) for one in (first, other)]
        p_values["spearman"] = _exchanged(*ranked)["spearman"]
    return p_values


def _exchanged(first: Answers, other: Answers) -> dict[str, float]:
    """Return the p-values of a randomization test. Rows that are equal in truth and answers are
    counted: to exchange one is to exchange any of them.
    """
    columns = np.column_stack([first.truth, first.predicted, other.predicted])
    rows, counts = np.unique(columns, axis=0, return_counts=True)
    truth, *said = (part.reshape(-1, *first.truth.shape[1:]) for part in np.split(rows, 3, axis=1))
    both = Answers(first.kind, np.concatenate([truth, truth]), np.concatenate(said), first.num_classes)
    return randomization(both.statistics(), counts)


def shared_lines(runs: list[FinishedRun]) -> Iterator[str]:
    """Yield what is to be said of the test rows that runs have in common with the first one."""
    first, others = runs[0], runs[1:]
    if all(run.rows.keys() == first.rows.keys() for run in others):
        yield f"test rows: {len(first.rows):,}, the same in all runs"
        return
    texts = {row.text for row in first.rows.values()}
    for run in others:
        shared = len(run.rows.keys() & first.rows.keys())
        relabelled = sum(row.text in texts for key, row in run.rows.items() if key not in first.rows)
        also = f"; with another label: {relabelled:,} of its texts" if relabelled else ""
        tested = "; tested on these" if shared else "; nothing can be tested"
        of = f"{shared:,} of its {len(run.rows):,} test rows are among the {len(first.rows):,}"
        yield f"test rows: {run.name}: {of} of {first.name}{also}{tested}"


def disagreements(runs: list[FinishedRun]) -> list[Key]:
    """Return the rows of the first run for which another run that has them says something else; of
    numbers, all rows that others have, those that differ most first.
    """
    first = runs[0]
    others = [run for run in runs[1:] if run.rows.keys() & first.rows.keys()]
    if first.kind != REGRESSION:
        return [
            key
            for key, row in first.rows.items()
            if any(key in run.rows and run.rows[key].predicted != row.predicted for run in others)
        ]

    def distance(key: Key) -> float:
        predicted = [run.rows[key].predicted for run in runs if key in run.rows]
        values = np.array(predicted, dtype=np.float64)
        return float(np.ptp(values, axis=0).max())

    shared = [key for key in first.rows if any(key in run.rows for run in others)]
    return sorted(shared, key=distance, reverse=True)


# Show ---------------------------------------------------------------------------------------------


def compare(folders: list[Path], output_dir: str | None) -> None:
    """Show runs side by side, and write the tables if there is a folder for them.

    Raises UserError when the runs predict different things.
    """
    runs = [read_run(folder) for folder in folders]
    first = runs[0]
    for run in runs[1:]:
        if run.kind != first.kind or (run.kind == REGRESSION and run.names != first.names):
            raise UserError(
                f"--compare: {first.name} predicts {_task(first)}, {run.name} {_task(run)}; compare"
                " runs of one task"
            )
    headers, rows = _score_table(runs)
    print(terminal.table(rows, headers, disable_numparse=True))
    terminal.say("in brackets the 95 % interval of each score on its test split\n")
    for line in shared_lines(runs):
        terminal.say(line)
    tested = [difference for run in runs[1:] for difference in differences(first, run)]
    tables, numbers = [(headers, rows)], [_score_numbers(runs)]
    if tested:
        headers, rows = _difference_table(tested)
        tables.append((headers, rows))
        numbers.append(_difference_numbers(tested))
        terminal.say(f"\nagainst {first.name}, row by row:")
        print(terminal.table(rows, headers, disable_numparse=True))
    keys = disagreements(runs)
    if any(run.rows.keys() & runs[0].rows.keys() for run in runs[1:]):
        _show_disagreements(runs, keys)
    if output_dir is not None:
        latex = "\n".join(latex_table(*table) for table in tables)
        _write(Path(output_dir), runs, numbers, latex, keys)


def _task(run: FinishedRun) -> str:
    words = {SINGLE: "one class", MULTI: "labels", REGRESSION: "numbers"}[run.kind]
    if run.kind != REGRESSION:
        return words
    return f"{words} ({shorten(', '.join(run.names), NAME_WIDTH)})"


def differing_settings(runs: list[FinishedRun]) -> dict[str, list[str]]:
    """Return the settings, versions among them, that are not the same in all runs."""
    flat = []
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name not in NO_SETTINGS}
        versions = run.settings.get("versions", {})
        named = {f"{name} (version)": value for name, value in versions.items()}
        flat.append({**settings, **named})
    names = dict.fromkeys(name for settings in flat for name in settings)
    values = {name: [_in_words(settings.get(name)) for settings in flat] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def _in_words(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _score_table(runs: list[FinishedRun]) -> tuple[list[str], list[list[str]]]:
    """Return the table of settings that differ, scores with their intervals, and times."""
    settings = differing_settings(runs)
    scores = headline_scores([run.results for run in runs])
    headers = ["run", *settings, *(name.removeprefix("test_").replace("_", " ") for name in scores)]
    rows = []
    for number, run in enumerate(runs):
        intervals, cells = run.results["test_intervals"], []
        for name in scores:
            low_high = intervals.get(name.removeprefix("test_"))
            cell = f"{run.results[name]:.4f}"
            interval = "" if low_high is None else f" ({low_high[0]:.4f} to {low_high[1]:.4f})"
            cells.append(f"{cell}{interval}")
        varied = [values[number] for values in settings.values()]
        rows.append([run.name, *varied, *cells, f"{run.results['train_seconds']:.0f}"])
    return [*headers, "training seconds"], rows


def _score_numbers(runs: list[FinishedRun]) -> tuple[list[str], list[list[Any]]]:
    """Return the table of scores as programs read it: all digits, the ends of an interval apart."""
    settings = differing_settings(runs)
    scores = [name.removeprefix("test_") for name in headline_scores([run.results for run in runs])]
    rows = []
    for number, run in enumerate(runs):
        intervals, cells = run.results["test_intervals"], []
        for name in scores:
            cells += [run.results[f"test_{name}"], *intervals.get(name, (None, None))]
        varied = [values[number] for values in settings.values()]
        rows.append([run.name, *varied, *cells, run.results["train_seconds"]])
    ends = [f"{name}{end}" for name in scores for end in ("", " low", " high")]
    return ["run", *settings, *ends, "training seconds"], rows


def _difference_table(tested: list[Difference]) -> tuple[list[str], list[list[str]]]:
    """Return the table of differences; the p-values of each score are adjusted for their number."""
    several, adjusted = len({difference.run for difference in tested}) > 1, _adjusted(tested)
    rows = []
    for number, one in enumerate(tested):
        low_high = one.interval
        interval = "-" if low_high is None else f"{low_high[0]:+.4f} to {low_high[1]:+.4f}"
        p_values = [_p_in_words(one.p), *([_p_in_words(adjusted[number])] if several else [])]
        score = one.score.replace("_", " ")
        values = [f"{one.value:+.4f}", interval, *p_values, one.test]
        rows.append([one.run, score, str(one.rows), *values])
    headers = ["run", "score", "rows", "difference", "95 % interval", "p"]
    return [*headers, *(["p (Holm)"] if several else []), "test"], rows


def _adjusted(tested: list[Difference]) -> dict[int, float]:
    """Return the p-value of each difference, adjusted for the number of runs that a score is tested in."""
    adjusted: dict[int, float] = {}
    for score in {difference.score for difference in tested}:
        members = [number for number, one in enumerate(tested) if one.score == score]
        adjusted |= dict(zip(members, holm([tested[number].p for number in members])))
    return adjusted


def _p_in_words(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def _difference_numbers(tested: list[Difference]) -> tuple[list[str], list[list[Any]]]:
    """Return the table of differences as programs read it: all digits, the ends of an interval apart."""
    adjusted = _adjusted(tested)
    rows = [
        [
            one.run,
            one.score,
            one.rows,
            one.value,
            *(one.interval or (None, None)),
            one.p,
            adjusted[number],
            one.test,
        ]
        for number, one in enumerate(tested)
    ]
    return ["run", "score", "rows", "difference", "low", "high", "p", "p (Holm)", "test"], rows


def _show_disagreements(runs: list[FinishedRun], keys: list[Key]) -> None:
    first = runs[0]
    if not keys:
        terminal.say("\nthey disagree on no text")
        return
    shown = keys[:NUM_SHOWN]
    if first.kind == REGRESSION:
        terminal.say("\nthe texts on which they differ most:")
    else:
        shown = [keys[index * len(keys) // len(shown)] for index in range(len(shown))]
        some = f", of which {len(shown)} are shown" if len(shown) < len(keys) else ""
        terminal.say(f"\nthey disagree on {counted(len(keys), 'text')}{some}:")
    rows = []
    for key in shown:
        said = [_said(run, key) for run in runs]
        rows.append([terminal.cut(key[0], terminal.room(TEXT_WIDTH)), _joined(key[1]), *said])
    names = [shorten(run.name, NAME_WIDTH) for run in runs]
    print(terminal.table(rows, ["text", "true", *names], texts=[0], disable_numparse=True))


def _joined(cells: tuple[str, ...]) -> str:
    return shorten(", ".join(cells), NAME_WIDTH)


def _said(run: FinishedRun, key: Key) -> str:
    row = run.rows.get(key)
    if row is None:
        return "-"
    return f"{_joined(row.predicted)} {row.confidence[:4]}".rstrip()


def _write(
    folder: Path,
    runs: list[FinishedRun],
    numbers: list[tuple[list[str], list[list[Any]]]],
    latex: str,
    keys: list[Key],
) -> None:
    """Write the tables as CSV and LaTeX, and every text on which the runs disagree as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (headers, rows) in zip(FILES, numbers):
        write_csv(folder / name, headers, rows)
    columns = [f"{what} {run.name}" for run in runs for what in ("predicted", "confidence")]
    answers = {key: [cell for run in runs for cell in _csv_cells(run.rows.get(key))] for key in keys}
    first = runs[0].rows
    lines = [[first[key].number, "|".join(key[1]), *answers[key], key[0]] for key in keys]
    write_csv(folder / FILES[2], ["row", "true", *columns, "text"], lines)
    (folder / FILES[3]).write_text(latex, encoding="utf-8")
    written = [str(folder / name) for name in FILES if (folder / name).exists()]
    terminal.say(f"\ntables: {', '.join(written)}")


def _csv_cells(row: Row | None) -> list[str]:
    return ["", ""] if row is None else ["|".join(row.predicted), row.confidence]
