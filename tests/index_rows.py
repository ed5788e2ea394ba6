"""Rows of texts, and an index of them with embeddings that cost nothing."""

import pyarrow as pa

from common.search import texts
from common.search.builder import Builder, Counts, fill, settings_of
from common.search.index import TEXT
from common.search.store import open_store
from conftest import StubEncoder

COLUMNS = ("key", TEXT, "label")


def collection(rows: list[dict], order=COLUMNS) -> texts.Collection:
    kinds = {"key": pa.string(), TEXT: pa.large_string(), "label": pa.int64()}
    return texts.Collection(
        "rows.csv", pa.Table.from_pylist(rows, pa.schema({name: kinds[name] for name in order})), "row", {}
    )


def write(folder, rows: list[dict], *, block: int = 3, update: bool = False, order=COLUMNS) -> Counts:
    encoder = StubEncoder()
    with open_store(folder, settings=settings_of(encoder, id_column="key", chunk_overlap=None)) as opened:
        builder = Builder(opened, encoder, update=update)
        fill(builder, collection(rows, order), block=block)
    return builder.counts


def numbered(first: int, last: int, version: int = 0) -> list[dict]:
    return [
        {"key": str(number), TEXT: f"text {number} {version}", "label": version}
        for number in range(first, last)
    ]
