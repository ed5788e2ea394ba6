"""Templates of prompts: names of columns between braces, and nothing else."""

import string

import pytest

from common.errors import UserError
from common.generation.prompts import parse_template

CELLS = {"review": "good {label} }", "a.b": "x", "id": "7", "Bewertung Text": "fein"}


@pytest.mark.parametrize(
    "text",
    ["Summarise: {review}", "{id}{id}: {review}\n", "{{{id}}} and }}{{ {{review}}", '{{"id": "{id}"}}'],
)
def test_it_is_filled_as_str_format_fills_it(text):
    """Oracle: str.format, for names that it takes for names. What a cell holds is not looked at."""
    template = parse_template(text)
    assert template.fill(CELLS) == text.format(**CELLS)
    named = [name for _, name, _, _ in string.Formatter().parse(text) if name]
    assert template.columns == list(dict.fromkeys(named))


@pytest.mark.parametrize("name", ["a.b", "Bewertung Text", "id!r", "id:>9", "id[0]", "id.__class__", "0"])
def test_a_name_is_the_name_of_a_column_and_reaches_no_object(name):
    template = parse_template(f"<{{{name}}}>")
    assert template.columns == [name]
    assert template.fill({name: "x"}) == "<x>"


@pytest.mark.parametrize(
    "text, parts",
    [
        ("{review", ("character 1", "'{'", "{{")),
        ("a }", ("character 3", "'}'", "}}")),
        ("{}", ("character 1", "'{'")),
        ("{a{b}}", ("character 1", "'{'")),
        ("no column", ("no column", "names no column", "{text}")),
        ("{{text}}", ("names no column",)),
    ],
)
def test_what_is_no_template_is_refused(text, parts):
    with pytest.raises(UserError) as caught:
        parse_template(text)
    assert [part for part in ("--prompt-template", *parts) if part not in str(caught.value)] == []
