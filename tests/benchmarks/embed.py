#!/usr/bin/env python
"""Encoding and exact search: sentence-transformers and its peers beside embed_search.py's encoder
and kernel.

Encoding, of bundled news texts: `encode`, SentenceTransformer.encode as the tutorial calls it
(fp32); `ours_fp32` and `ours`, the encoder of embed_search.py, the second with its default
precision. Search, of 200,000 random unit vectors: `semantic_search` of sentence-transformers,
`scikit_learn` (cosine_similarity, then argsort, as in the tutorial), `faiss_flat`, and `ours`.

Each round runs every contender in a process of its own, one after the other. Loading and building
are not timed; the answers are checked against each other. The last line on stdout is one JSON
object.

  python tests/benchmarks/embed.py                          # about 5 minutes on two cores
  python tests/benchmarks/embed.py --rounds 1 --texts 32    # a quick look
"""

import argparse
import json
import statistics

import environment
import faiss
import numpy as np
import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer
from sklearn.metrics.pairwise import cosine_similarity
from tabulate import tabulate

from common import bundled, cli, sources
from common.errors import UserError
from common.runtime import choose_device, peak_memory_bytes, start_runtime
from common.search import encoder, kernel

ENCODERS, SEARCHERS, QUERIES = (
    ("encode", "ours_fp32", "ours"),
    ("semantic_search", "scikit_learn", "faiss_flat", "ours"),
    (1, 64),
)
TOP_K = 10
REPEATS = 7  # searches in a process; the median counts, the first two warm up


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="tests/benchmarks/embed.py", description=__doc__)
    cli.add_shared_flags(parser, model="bundled/all-MiniLM-L6-v2")
    parser.add_argument(
        "--rounds", type=cli.positive_int, default=3, help="medians are taken over the rounds"
    )
    parser.add_argument(
        "--texts",
        type=cli.positive_int,
        default=96,
        help="news texts that each encoder is timed on in each round",
    )
    parser.add_argument("--rows", type=cli.positive_int, default=200_000, help="vectors that are searched")
    parser.add_argument("--width", type=cli.positive_int, default=384, help="their dimensions")
    # what the script runs in a process of its own
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


def time_encoding(contender: str, flags) -> dict:
    """Return texts/s of an encoder, and the lowest cosine of its vectors with
    SentenceTransformer.encode's in fp32.
    """
    all_texts = bundled.bbc_news()["text"][:]
    texts = all_texts[:: max(len(all_texts) // flags.texts, 1)][: flags.texts]
    warm_up = sorted(all_texts[1 :: len(all_texts) // 16], key=len)[-16:]
    folder = sources.find_folder(flags.model, kind="encoder", cache_dir=flags.cache_dir)
    device = choose_device(flags.device)
    oracle = SentenceTransformer(str(folder), device=str(device), model_kwargs={"use_safetensors": True})
    if contender == "encode":
        encode = oracle.encode
    # only ours gets what start_runtime changes in the process, above all the allocator's settings
    else:
        runtime = start_runtime(
            flags.device, "fp32" if contender == "ours_fp32" else flags.precision, flags.seed
        )
        encode = encoder.load_encoder(
            encoder.EncoderConfig(flags.model, cache_dir=flags.cache_dir), runtime
        ).encode
    encode(warm_up)
    started = environment.moment(device)
    vectors = encode(texts)
    seconds, cpu_seconds = environment.moment(device) - started
    peak = peak_memory_bytes(device) / 1e6
    exact = oracle.encode(texts, normalize_embeddings=True)
    cosines = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * exact).sum(1)
    return {
        "texts_per_second": len(texts) / seconds,
        "cpu_seconds_per_text": cpu_seconds / len(texts),
        "lowest_cosine": float(cosines.min()),
        "peak_memory_mb": peak,
    }


def make_vectors(flags) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors (rows, width) and queries (64, width) near some of them."""
    generator = np.random.default_rng(flags.seed)
    rows = generator.standard_normal((flags.rows, flags.width), dtype=np.float32)
    queries = rows[:: max(flags.rows // 64, 1)][:64] + generator.standard_normal(
        (64, flags.width), dtype=np.float32
    )
    return tuple(block / np.linalg.norm(block, axis=1, keepdims=True) for block in (rows, queries))


def searcher(contender: str, vectors: np.ndarray, flags):
    """Return a function from queries (q, width) to rows (q, 10)."""
    if contender == "semantic_search":
        return lambda queries: [
            [hit["corpus_id"] for hit in hits]
            for hits in sentence_transformers.util.semantic_search(queries, vectors, top_k=TOP_K)
        ]
    if contender == "scikit_learn":
        return lambda queries: np.argsort(cosine_similarity(queries, vectors), axis=1)[:, ::-1][:, :TOP_K]
    if contender == "faiss_flat":
        flat = faiss.IndexFlatIP(vectors.shape[1])
        flat.add(vectors)
        return lambda queries: flat.search(queries, TOP_K)[1]
    start_runtime(flags.device, flags.precision, flags.seed)

    def ours(queries):
        blocks = (
            (start, vectors[start : start + kernel.BLOCK]) for start in range(0, len(vectors), kernel.BLOCK)
        )
        return [
            rows for rows, _ in kernel.search(blocks, queries, TOP_K, vectors_of=lambda rows: vectors[rows])
        ]

    return ours


def time_search(contender: str, flags) -> dict:
    """Return the milliseconds of a search with 1 and with 64 queries, and the rows found, for the
    check.
    """
    vectors, queries = make_vectors(flags)
    search, found, cpu = searcher(contender, vectors, flags), {}, torch.device("cpu")
    for count in QUERIES:
        seconds = []
        for _ in range(REPEATS + 2):
            started = environment.moment(cpu)
            rows = search(queries[:count])
            seconds.append(float((environment.moment(cpu) - started)[0]))
        found[f"ms_{count}"] = 1000 * statistics.median(seconds[2:])
    return {**found, "rows": [list(map(int, best)) for best in rows]}


def child(flags) -> dict:
    """Return the figures of one contender, in this process."""
    kind, contender = flags.child
    if kind == "limits":
        return environment.limits(
            choose_device(flags.device), rows=encoder.BATCH_TOKENS["cpu"], width=flags.width
        )
    return time_encoding(contender, flags) if kind == "encoding" else time_search(contender, flags)


def measure(flags) -> dict[str, list[dict]]:
    """Run the rounds, interleaved: a slow hour of the machine is slow for all."""
    names = [
        ("limits", "limits"),
        *(("encoding", name) for name in ENCODERS),
        *(("search", name) for name in SEARCHERS),
    ]
    rounds = {f"{kind} {name}": [] for kind, name in names}
    for number in range(flags.rounds):
        for kind, name in names:
            found = environment.run_child(__file__, "--child", kind, name)
            rounds[f"{kind} {name}"].append(found)
            shown = {key: round(value, 4) for key, value in found.items() if isinstance(value, float)}
            print(f"round {number + 1}/{flags.rounds}  {kind} {name:<16} {shown}", flush=True)
    for name, measured in rounds.items():
        if "rows" in measured[0] and any(
            entry.pop("rows") != first for first in [measured[0]["rows"]] for entry in measured[1:]
        ):
            raise UserError(f"{name}: other rows in another round")
    answers = {name: measured[0].pop("rows") for name, measured in rounds.items() if "rows" in measured[0]}
    if any(rows != answers["search ours"] for rows in answers.values()):
        raise UserError("the contenders find different rows")
    return rounds


def ratios(rounds: dict[str, list[dict]]) -> dict[str, float]:
    """Return the medians over the rounds of how many times faster ours is than each peer."""

    def factor(own: str, peer: str, key: str, *, faster_is_more: bool) -> float:
        pairs = [(one[key], other[key]) for one, other in zip(rounds[own], rounds[peer])]
        return statistics.median(one / other if faster_is_more else other / one for one, other in pairs)

    found = {
        f"{name}_vs_encode": factor(
            f"encoding {name}", "encoding encode", "texts_per_second", faster_is_more=True
        )
        for name in ENCODERS[1:]
    }
    for count in QUERIES:
        for name in SEARCHERS[:-1]:
            found[f"ours_vs_{name}_{count}_queries"] = factor(
                "search ours", f"search {name}", f"ms_{count}", faster_is_more=False
            )
    return found


def main(flags):
    if flags.child:
        print(json.dumps(child(flags)))
        return
    header = environment.describe(choose_device(flags.device))
    environment.show(header)
    rounds = measure(flags)
    medians, found = (
        {name: environment.median_of(measured) for name, measured in rounds.items()},
        ratios(rounds),
    )
    print(
        "\n"
        + tabulate(
            [
                [
                    name,
                    *(
                        medians[f"encoding {name}"][key]
                        for key in (
                            "texts_per_second",
                            "cpu_seconds_per_text",
                            "peak_memory_mb",
                            "lowest_cosine",
                        )
                    ),
                    found.get(f"{name}_vs_encode", 1.0),
                ]
                for name in ENCODERS
            ],
            ["encoding", "texts/s", "CPU s/text", "peak MB", "lowest cosine", "times encode"],
            floatfmt=("", ".1f", ".3f", ".0f", ".6f", ".2f"),
        )
    )
    print(
        "\n"
        + tabulate(
            [
                [
                    name,
                    *(medians[f"search {name}"][f"ms_{count}"] for count in QUERIES),
                    *(found.get(f"ours_vs_{name}_{count}_queries", 1.0) for count in QUERIES),
                ]
                for name in SEARCHERS
            ],
            [f"search of {flags.rows:,}", "ms, 1 query", "ms, 64", "ours is faster, 1", "64"],
            floatfmt=("", ".1f", ".1f", ".2f", ".2f"),
        )
    )
    print(
        f"\nmedians over {flags.rounds} rounds; {flags.texts} news texts; {flags.rows:,} x {flags.width}"
        f" vectors, top {TOP_K}"
    )
    environment.show_limits(medians["limits limits"])
    print(
        "\n"
        + json.dumps(
            {
                "benchmark": "embed",
                "environment": header,
                "settings": vars(flags),
                "medians": medians,
                "ratios": found,
                "rounds": rounds,
            }
        )
    )


if __name__ == "__main__":
    cli.run(make_parser(), main)
