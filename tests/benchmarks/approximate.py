#!/usr/bin/env python
"""Approximate search: what kinds of FAISS indexes cost and find, beside embed_search.py's choice.

Each kind proposes candidates, and their exact float64 scores decide, as in `--approximate`. The
vectors lie in topics and in stories within them, the queries near some of them. Each kind runs in a
process of its own with one thread; times are processor time. Recall is the share of the exact ten
that are found. The last line on stdout is one JSON object.

  python tests/benchmarks/approximate.py                   # three minutes on two cores
  python tests/benchmarks/approximate.py --rows 1000000 --only "fast scan"
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass

import environment
import faiss
import numpy as np
import torch
from tabulate import tabulate

from common import cli
from common.search import kernel

TOP_K, NUM_QUERIES = 10, 200
TOPICS, STORIES = 20, 20  # stories in each topic
SPREAD = 1.2  # of the rows of a story, beside the length 1 of its centre


@dataclass(frozen=True)
class Kind:
    """A FAISS index: how its factory calls it, how it is searched, how many of its rows are scored
    exactly. `lists` stands for the square root of the number of rows.
    """

    name: str
    factory: str
    candidates: int
    search: str = ""  # parameters of FAISS's ParameterSpace
    building: str = ""


KINDS = [
    Kind("product quantization, fast scan, 4 bits for 2 dimensions", "PQ{width/2}x4fs", 200),
    Kind("the same, 100 candidates", "PQ{width/2}x4fs", 100),
    Kind("product quantization, fast scan, 4 bits for 4 dimensions", "PQ{width/4}x4fs", 200),
    Kind("scalar quantization, 8 bits", "SQ8", 20),
    Kind("scalar quantization, 4 bits", "SQ4", 100),
    Kind("lists of 8-bit vectors, 16 searched", "IVF{lists},SQ8", 100, "nprobe=16"),
    Kind("lists of 8-bit vectors, 8 searched", "IVF{lists},SQ8", 100, "nprobe=8"),
    Kind("lists, fast scan, 16 searched", "IVF{lists},PQ{width/2}x4fs", 200, "nprobe=16"),
    Kind("graph (HNSW), 16 links, breadth 40 and 200", "HNSW16", 100, "efSearch=200"),
    Kind("graph (HNSW), 32 links, breadth 200 and 200", "HNSW32", 100, "efSearch=200", "efConstruction=200"),
]


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="tests/benchmarks/approximate.py", description=__doc__)
    parser.add_argument("--rows", type=cli.positive_int, default=100_000, help="vectors that are searched")
    parser.add_argument("--width", type=cli.positive_int, default=384, help="their dimensions")
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="of the vectors")
    parser.add_argument("--only", default="", help="measure only the kinds with this in their name")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)  # in a process of its own
    return parser


def make_vectors(rows: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors (rows, width) in topics and stories, and queries near some of them."""
    generator = np.random.default_rng(seed)

    def near(centres: np.ndarray, spread: float) -> np.ndarray:
        noise = generator.standard_normal(centres.shape, np.float32)
        noise *= spread / width**0.5
        noise += centres
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        return noise

    topics = near(np.zeros((TOPICS, width), np.float32), 1.0)
    stories = near(np.repeat(topics, STORIES, axis=0), 1.0)
    vectors = near(stories[generator.integers(len(stories), size=rows)], SPREAD)
    return vectors, near(vectors[generator.integers(rows, size=NUM_QUERIES)], SPREAD)


def build(kind: Kind, vectors: np.ndarray) -> faiss.Index:
    """Return the index of some vectors."""
    rows, width = vectors.shape
    names = {"{width/2}": width // 2, "{width/4}": width // 4, "{lists}": int(rows**0.5)}
    factory = kind.factory
    for name, number in names.items():
        factory = factory.replace(name, str(number))
    index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    if kind.building:
        faiss.ParameterSpace().set_index_parameters(index, kind.building)
    index.train(vectors)
    index.add(vectors)
    if kind.search:
        faiss.ParameterSpace().set_index_parameters(index, kind.search)
    return index


def measure(kind: Kind, flags: argparse.Namespace) -> dict[str, float]:
    """Return what a kind costs and finds, in this process."""
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    vectors, queries = make_vectors(flags.rows, flags.width, flags.seed)
    blocks = ((first, vectors[first : first + kernel.BLOCK]) for first in range(0, flags.rows, kernel.BLOCK))
    exact = kernel.nearest_rows(blocks, queries, TOP_K, vectors_of=vectors.__getitem__)
    started = time.process_time()
    index = build(kind, vectors)
    seconds = time.process_time() - started
    found, started = 0, time.process_time()
    for query, (rows, _) in zip(queries, exact):
        _, [candidates] = index.search(query[None], kind.candidates)
        best, _ = kernel.rank_plainly(candidates[candidates >= 0], query, TOP_K, vectors.__getitem__)
        found += len(np.intersect1d(best, rows))
    milliseconds = 1000 * (time.process_time() - started) / len(queries)
    return {
        "build_seconds": seconds,
        "megabytes": faiss.serialize_index(index).nbytes / 1e6,
        "candidates": kind.candidates,
        "ms_per_query": milliseconds,
        "recall_at_10": found / (TOP_K * len(queries)),
    }


def main(flags: argparse.Namespace) -> None:
    if flags.child is not None:
        print(json.dumps(measure(KINDS[flags.child], flags)))
        return
    header = environment.describe(torch.device("cpu"))
    environment.show(header)
    measured = {}
    for number, kind in enumerate(KINDS):
        if flags.only in kind.name:
            figures = environment.run_child(__file__, "--child", str(number))
            measured[kind.name] = {**asdict(kind), **figures}
            print(f"{kind.name:<60} {figures}", flush=True)
    keys = ("build_seconds", "megabytes", "candidates", "ms_per_query", "recall_at_10")
    lines = [[name, *(figures[key] for key in keys)] for name, figures in measured.items()]
    headers = ["FAISS index", "seconds to build", "MB", "candidates", "ms, 1 query", "recall@10"]
    print("\n" + tabulate(lines, headers, floatfmt=("", ".1f", ".0f", ".0f", ".1f", ".4f")))
    print(f"\n{flags.rows:,} x {flags.width} vectors, {NUM_QUERIES} queries; one thread, processor time")
    settings = {name: value for name, value in vars(flags).items() if name != "child"}
    print(
        "\n"
        + json.dumps(
            {"benchmark": "approximate", "environment": header, "settings": settings} | {"kinds": measured}
        )
    )


if __name__ == "__main__":
    cli.run(make_parser(), main)
