"""Rows of texts, and an index of them with embeddings that cost nothing."""

import numpy as np
import pyarrow as pa

from common.search import texts
from common.search.builder import Builder, Counts, fill, settings_of
from common.search.index import open_store
from common.search.segments import CHUNK, HASH, ID, NUM_CHUNKS, START, TEXT, VECTOR, vector_array
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


def unit_vectors(count: int, width: int) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((count, width), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_vectors(folder, vectors: np.ndarray) -> None:
    """Write an index of one file that has these vectors, with texts and ids that are numbers."""
    count, zeros = len(vectors), np.zeros(len(vectors), np.int32)
    names = pa.array([str(number) for number in range(count)])
    columns = {
        ID: names,
        HASH: pa.array([bytes(32)] * count, pa.binary(32)),
        **{name: pa.array(zeros) for name in (CHUNK, NUM_CHUNKS, START)},
        TEXT: names.cast(pa.large_string()),
        VECTOR: vector_array(vectors),
    }
    encoder = StubEncoder(vectors.shape[1])
    with open_store(folder, settings=settings_of(encoder, id_column=None, chunk_overlap=None)) as opened:
        opened.commit(pa.table(columns))
