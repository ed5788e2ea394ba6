"""Queries and judgements from elsewhere: any file is a task or one line that names file and line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.search.relevance import read_task

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


@settings(max_examples=300, deadline=None)
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
