"""Queries and judgements from elsewhere: any file is a task or one line that names file and line."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import UserError
from common.search import model_scores
from common.search.relevance import Measures, query_scores, read_task

WORDS = st.sampled_from(
    ["q1", "q2", "0", "d1", "1", "-1", "1.5", "x", "", "\0", "9" * 20, "\u00b2", "{", "[" * 5000]
)
LINES = st.lists(st.lists(WORDS, max_size=5).map(" ".join) | st.text(max_size=12), max_size=5)
VALUES = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
QUERIES = st.lists(
    st.dictionaries(st.sampled_from(["id", "_id", "text", "x"]), VALUES, max_size=3).map(json.dumps)
    | st.text(max_size=12),
    max_size=3,
)


@settings(max_examples=300)
@given(queries=QUERIES, judgements=LINES, whole=st.booleans())
def test_any_files_are_a_task_or_one_line(queries, judgements, whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    if whole:
        queries = ['{"id": "q1", "text": "a text"}', '{"id": "q2", "text": "another"}']
    for name, lines in (("queries", queries), ("qrels", judgements)):
        (folder / name).write_bytes("\n".join(lines).encode("utf-8", errors="surrogatepass"))
    try:
        task = read_task(str(folder / "queries"), str(folder / "qrels"))
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
    else:
        assert set(task.judgements) <= set(task.queries)
        assert all(type(value) is int for judged in task.judgements.values() for value in judged.values())


@pytest.mark.parametrize("content", ["[" * 100_000, '{"id": ' * 10_000])
def test_deeply_nested_queries_are_one_line(content, tmp_path):
    (tmp_path / "queries").write_text(content)
    (tmp_path / "qrels").write_text("q1 0 d1 1")
    with pytest.raises(UserError, match="queries, line 1"):
        read_task(str(tmp_path / "queries"), str(tmp_path / "qrels"))


# Measures against their definitions ---------------------------------------------------------------


@pytest.fixture
def cranfield(tmp_path):
    """A task like Cranfield's in BEIR's form: 40 queries, 200 documents, grades from -1 to 4; and
    what two searches find, of which one is better.
    """
    generator = np.random.default_rng(0)
    lines, hits = ["query-id\tcorpus-id\tscore"], ({}, {})
    for query in range(40):
        judged = generator.permutation(200)[: generator.integers(2, 12)]
        grades = generator.integers(-1, 5, size=len(judged))
        lines += [f"q{query}\td{document}\t{grade}" for document, grade in zip(judged, grades)]
        for better, found in enumerate(hits):
            scores = generator.random(200)
            scores[judged] += (0.2 + 0.3 * better) * (grades > 0)
            found[f"q{query}"] = [f"d{document}" for document in np.argsort(-scores)[:150]]
    queries = [json.dumps({"_id": f"q{query}", "text": f"query {query}"}) for query in range(41)]
    (tmp_path / "queries.jsonl").write_text("\n".join(queries))
    (tmp_path / "test.tsv").write_text("\n".join(lines))
    return read_task(str(tmp_path / "queries.jsonl"), str(tmp_path / "test.tsv")), hits


def by_hand(judged: dict[str, int], found: list[str], cut: int) -> dict[str, float]:
    gains = np.array([max(judged.get(document, 0), 0) for document in found], float)
    ideal = np.sort([max(grade, 0) for grade in judged.values()])[::-1].astype(float)
    relevant = sum(grade > 0 for grade in judged.values())
    places, good = np.arange(1, len(gains) + 1), gains > 0
    discounts = np.log2(places + 1)
    best = (ideal[:cut] / np.log2(np.arange(2, len(ideal[:cut]) + 2))).sum()
    firsts = np.flatnonzero(good[:cut])
    precision = good.cumsum() / places
    return {
        f"nDCG@{cut}": (gains[:cut] / discounts[:cut]).sum() / best if best else 0,
        f"MRR@{cut}": 1 / (firsts[0] + 1) if len(firsts) else 0,
        f"P@{cut}": good[:cut].sum() / cut,
        f"recall@{cut}": good[:cut].sum() / relevant if relevant else 0,
        "MAP": precision[good].sum() / relevant if relevant else 0,
    }


def test_every_measure_is_its_definition(cranfield):
    task, (found, _) = cranfield
    assert len(task.judgements) == 40 and {-1, 0, 4} <= {
        grade for judged in task.judgements.values() for grade in judged.values()
    }
    for cuts in ((10,), (1, 5, 120)):
        measures = Measures(cuts, cuts)
        cut_hits = {query: documents[: measures.depth] for query, documents in found.items()}
        scores = query_scores(task.judgements, cut_hits, measures)
        for cut in cuts:
            for place, (query, judged) in enumerate(task.judgements.items()):
                expected = by_hand(judged, cut_hits[query], cut)
                expected[f"MAP@{measures.depth}"] = expected.pop("MAP")
                assert {name: scores[name][place] for name in expected} == pytest.approx(expected), query
    assert Measures((1, 5, 120), (1,)).depth == 120
    assert list(Measures().keys)[:3] == ["nDCG@10", "MRR@10", "MAP@100"]


def test_intervals_and_tests_are_those_of_scipy(cranfield):
    """Within the noise of other draws: 1,000 resamples here, 9,999 there."""
    task, hits = cranfield
    names = ("exact", "hybrid")
    values = {name: query_scores(task.judgements, found) for name, found in zip(names, hits)}
    exact, hybrid = model_scores.of_searches(list(task.judgements), values)
    differences = {one["measure"]: one for one in model_scores.differences([exact, hybrid])}
    for measure in ("nDCG@10", "MAP@100", "P@10"):
        first, second = exact.values[measure], hybrid.values[measure]
        options = {"method": "percentile", "rng": 0}
        own = stats.bootstrap((first,), np.mean, **options).confidence_interval
        assert exact.intervals()[measure] == pytest.approx(tuple(own), abs=0.02)
        one, gain = differences[measure], second - first
        interval = stats.bootstrap((gain,), np.mean, **options).confidence_interval
        assert one["interval"] == pytest.approx(tuple(interval), abs=0.02)
        drawn = stats.permutation_test((gain,), np.mean, permutation_type="samples", rng=0)
        assert one["difference"] == pytest.approx(gain.mean())
        assert one["p"] == pytest.approx(drawn.pvalue, abs=0.03)
    twins = model_scores.of_searches(exact.queries, {name: values["exact"] for name in ("one", "other")})
    same = model_scores.differences(twins)
    assert {(one["difference"], one["p_holm"]) for one in same} == {(0.0, 1.0)}


def test_the_difference_of_rank_correlations_is_tested_on_ranks():
    """One model's cosines lie within a tenth of the other's range, which Spearman's correlation ignores."""
    generator = np.random.default_rng(0)
    human = generator.random(80)
    good, bad = (human + generator.normal(0, noise, 80) for noise in (0.2, 0.5))
    models = [
        model_scores.ModelScores("m", "", 0, None, ["q"] * 80, {"cosine": cosines, "human": human})
        for cosines in (good, bad, 0.1 * bad + 0.5)
    ]
    same, squeezed = model_scores.differences(models)

    drawn = stats.permutation_test(
        (stats.rankdata(good), stats.rankdata(bad)),
        lambda first, other: np.float64(
            stats.spearmanr(other, human).statistic - stats.spearmanr(first, human).statistic
        ),
        permutation_type="samples",
        vectorized=False,
        n_resamples=1000,
        rng=0,
    )
    assert same["p"] == pytest.approx(drawn.pvalue, abs=0.01) and same["p"] < 0.02
    assert (squeezed["difference"], squeezed["p"]) == (pytest.approx(same["difference"]), same["p"])


def test_of_one_query_nothing_is_significant():
    scores = {"exact": {"nDCG@10": [0.2]}, "hybrid": {"nDCG@10": [0.9]}}
    (found,) = model_scores.differences(model_scores.of_searches(["a query"], scores))
    assert (found["difference"], found["p"]) == (pytest.approx(0.7), 1)
