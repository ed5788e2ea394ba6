"""Clusters by density and by the silhouette, what becomes of the rest, and where their numbers go:
against groups that are known, and brute force.
"""

import csv
import io
import warnings

import numpy as np
import pytest
from sklearn.cluster import HDBSCAN
from sklearn.metrics import silhouette_score

from common import figures
from common.search import mining
from common.search.index import open_snapshot
from common.search.segments import ID
from common.search.selection import matching, select
from conftest import write_lines
from index_rows import write_vectors

SIZES = (30, 20, 12, 8)


def groups(generator: np.random.Generator, noise: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors (n, 16) of groups around four directions and of some that lie anywhere,
    in any order, and the group of each, -1 for none.
    """
    truth = np.repeat([0, 1, 2, 3, -1], [*SIZES, noise])
    centres = np.linalg.qr(generator.standard_normal((16, 16)))[0][:4]
    vectors = generator.standard_normal((len(truth), 16))
    vectors[truth >= 0] = centres[truth[truth >= 0]] + 0.05 * vectors[truth >= 0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = generator.permutation(len(truth))
    return vectors[order].astype(np.float32), truth[order]


@pytest.fixture
def made(tmp_path):
    vectors, truth = groups(np.random.default_rng(1))
    write_vectors(tmp_path / "ix", vectors)
    return tmp_path / "ix", vectors, truth


def labels_of(found: dict, count: int) -> np.ndarray:
    labels = np.full(count, -1)
    for one in found["clusters"]:
        labels[[int(key) for key in one["ids"]]] = one["cluster"] - 1
    return labels


def test_density_finds_the_groups_and_leaves_the_rest(made, ok):
    folder, vectors, truth = made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = labels_of(ok("cluster", "--index", folder, "--hdbscan", "--json"), len(truth))
    assert (found[truth >= 0] == truth[truth >= 0]).all()  # the largest is the first
    library = HDBSCAN(min_cluster_size=5, copy=True).fit_predict(vectors.astype(np.float64))
    assert ((found < 0) == (library < 0)).all() and (found < 0).sum() > 5
    least = labels_of(ok("cluster", "--index", folder, "--hdbscan", "--min-size", 10, "--json"), len(truth))
    assert np.isin(found[least >= 0], [0, 1, 2]).all() and least.max() == 2


def test_what_is_in_no_cluster_goes_to_the_nearest_on_request(made, ok):
    folder, vectors, _ = made
    for flags in (("--hdbscan",), ("--threshold", 0.8)):
        before = labels_of(ok("cluster", "--index", folder, *flags, "--json"), len(vectors))
        found = ok("cluster", "--index", folder, *flags, "--assign", "--json")
        after = labels_of(found, len(vectors))
        numbers = range(before.max() + 1)
        means = np.stack([vectors[before == number].mean(0, dtype=float) for number in numbers])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        nearest = (vectors.astype(np.float64) @ means.T).argmax(1)
        assert (after == np.where(before >= 0, before, nearest)).all() and found["in_none"] == []
        assert (before < 0).any()


def test_the_silhouette_chooses_how_many(tmp_path, ok):
    vectors, truth = groups(np.random.default_rng(2), noise=0)
    write_vectors(tmp_path / "ix", vectors)
    found = labels_of(ok("cluster", "--index", tmp_path / "ix", "--clusters", "auto", "--json"), len(truth))
    assert (found == truth).all()
    selection = select(open_snapshot(tmp_path / "ix"), None)
    _, silhouettes = mining.choose_clusters(selection, block=50, seed=0)
    assert list(silhouettes) == list(range(2, 21)) and max(silhouettes, key=silhouettes.get) == 4
    assert silhouettes[4] == pytest.approx(silhouette_score(vectors, truth, metric="cosine"), abs=1e-6)
    shown = ok("cluster", "--index", tmp_path / "ix", "--num-clusters", "auto")
    assert f"4: {silhouettes[4]:.3f}" in shown
    write_vectors(tmp_path / "alike", np.tile(vectors[:1], (5, 1)))
    shown = ok("cluster", "--index", tmp_path / "alike", "--clusters", "auto")
    assert "alike" in shown and "1 clusters, 0 texts in none" in shown


GERMAN = ["Der Hund liegt nicht auf dem Sofa", "Ein Hund und eine Katze auf dem Sofa"] * 3
GERMAN += ["Die Bank hebt nicht den Zins", "Der Zins auf dem Konto der Bank"] * 3


def test_words_of_a_language_or_a_file_mark_nothing(ok, tmp_path):
    texts = write_lines(tmp_path / "t.txt", [f"{text} {number}" for number, text in enumerate(GERMAN)])
    flags = ("cluster", texts, "--num-clusters", 1, "--json")

    def words(*more) -> set[str]:
        return {word for one in ok(*flags, *more)["clusters"] for word in one["words"]}

    assert {"auf", "dem", "nicht"} & words()
    german = words("--stop-words", "de")
    assert {"hund", "sofa", "zins"} <= german and not {"auf", "dem", "nicht", "der", "eine"} & german
    (tmp_path / "stop.txt").write_text("Hund\nbank\n")
    assert not {"hund", "bank"} & words("--stop-words", tmp_path / "stop.txt")


def test_scripts_without_spaces_are_marked_by_two_characters(ok, tmp_path):
    texts = write_lines(tmp_path / "t.txt", ["北京大学的历史", "我爱北京", "北京欢迎你", "去北京"])
    [one] = ok("cluster", texts, "--num-clusters", 1, "--json")["clusters"]
    assert one["words"][0] == "北京"


def test_the_numbers_become_a_column_or_a_file(made, ok, tmp_path):
    folder, vectors, _ = made
    flags = ("cluster", "--index", folder, "--hdbscan", "--output", tmp_path / "c.csv", "--column", "topic")
    found = labels_of(ok(*flags, "--json"), len(vectors))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "c.csv").read_text())))
    expected = [label + 1 if label >= 0 else None for label in found.tolist()]
    assert [int(row["cluster"]) if row["cluster"] else None for row in rows] == expected
    assert [row["id"] for row in rows] == [str(number) for number in range(len(rows))]
    snapshot = open_snapshot(folder)
    assert [row["topic"] for row in snapshot.take(range(len(rows)))] == expected
    assert (snapshot.vectors_of(range(len(rows))) == vectors).all()
    assert (matching(snapshot, "topic = 2") == (found == 1)).all()
    # again for some of them: the others keep theirs
    ok("delete", "--index", folder, "7")
    ok("cluster", "--index", folder, "--num-clusters", 1, "--where", "topic IS NULL", "--column", "topic")
    expected = [1 if label is None else label for label in expected]
    snapshot = open_snapshot(folder)
    rows = np.flatnonzero(snapshot.is_live())
    assert 7 not in rows and [row["topic"] for row in snapshot.take(rows)] == [expected[row] for row in rows]


def test_a_column_of_clusters_makes_no_row_of_the_source_a_changed_one(ok, sentences, tmp_path):
    index = ("--index", tmp_path / "ix")
    ok("index", sentences, *index, "--id-column", "id", "--block", 16)
    before = open_snapshot(tmp_path / "ix").take(range(60))
    ok("cluster", *index, "--num-clusters", 3, "--column", "topic")
    snapshot = open_snapshot(tmp_path / "ix")
    after = snapshot.take(range(60))
    assert {row.pop("topic") for row in after} == {1, 2, 3} and after == before
    assert ok("index", sentences, *index, "--json")["counts"]["unchanged"] == 60
    assert {row[ID] for row in snapshot.take(range(60))} == {f"s{number}" for number in range(60)}


def test_clusters_replace_no_column_of_the_texts(ok, embed, sentences, tmp_path):
    index = ("--index", tmp_path / "ix")
    clusters = ("cluster", *index, "--num-clusters", 3, "--column")

    def refused(*command, says: str) -> None:
        code, _, error = embed(*command)
        assert code == 2 and error.count("\n") == 1 and says in error, error

    ok("index", sentences, *index, "--id-column", "id")
    for name in ("n", "N"):  # SQL ignores case
        refused(*clusters, name, says=f"--column {name}: {tmp_path / 'ix'} has a column 'n'")
    assert [row["n"] for row in open_snapshot(tmp_path / "ix").take(range(60))] == list(range(60))
    ok(*clusters, "topic")
    ok("delete", *index, "s3")
    ok("compact", *index)
    assert ok("sync", sentences, *index, "--json")["counts"]["unchanged"] == 59
    ok(*clusters, "topic")  # its own it replaces
    refused(*clusters, "n", says="another --column")
    # the texts come with such a column themselves
    header, *rows = sentences.read_text().splitlines()
    own = write_lines(tmp_path / "own.csv", [f"{header},topic", *(f"{row},7" for row in rows)])
    refused("sync", own, *index, says="column 'topic'")
    ok("delete", *index, "--where", "n >= 0")
    ok("compact", *index)
    ok("sync", own, *index)
    refused(*clusters, "topic", says="another --column")


def test_clusters_can_be_told_apart():
    styles = [figures.cluster_style(number) for number in range(60)]
    assert len(set(styles)) == 60 and len({colour for colour, _ in styles[:7]}) == 7

    def rgb(colour: str) -> np.ndarray:
        return np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])

    for one in range(7):
        for other in range(one):
            assert np.abs(rgb(styles[one][0]) - rgb(styles[other][0])).sum() > 75
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 30 - 1
    figure = figures.cluster_map(generator.random((200, 2)), labels, [f"name {n}" for n in range(29)])
    assert {text.get_text() for text in figure.axes[0].texts} == {str(number) for number in range(1, 30)}
