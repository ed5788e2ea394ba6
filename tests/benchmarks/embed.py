#!/usr/bin/env python
"""Encoding and exact search: sentence-transformers and its peers beside embed_search.py's encoder
and kernel.

Encoding, of bundled news texts: `encode`, SentenceTransformer.encode as the tutorial calls it
(fp32); `ours_fp32` and `ours`, the encoder of embed_search.py, the second with its default
precision. Search, of 200,000 random unit vectors: `semantic_search` of sentence-transformers,
`scikit_learn` (cosine_similarity, then argsort, as in the tutorial), `faiss_flat`, `matmul_topk` of
PyTorch, and `ours`.

Each round runs every contender in a process of its own, one after the other. Loading and building
are not timed; the answers are checked against each other. What ours takes is also divided by what
the machine itself does in that round: matrix products in the precision that ran, or, one query,
reading the vectors once, which is timed before each of its searches: other programs take their share
of the memory's speed, another one at every moment. The last line on stdout is one JSON object.

  python tests/benchmarks/embed.py                          # about 8 minutes on two cores
  python tests/benchmarks/embed.py --rounds 1 --texts 32    # a quick look
  python tests/benchmarks/embed.py --only search --rows 1000000 --queries 1 64 1024
"""

import argparse
import json
import statistics
from collections.abc import Callable

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
from common.runtime import choose_device, choose_precision, peak_memory_bytes, start_runtime
from common.search import encoder, kernel

ENCODERS = ("encode", "ours_fp32", "ours")
SEARCHERS = ("semantic_search", "scikit_learn", "faiss_flat", "matmul_topk", "ours")
TOP_K = 10
# searches in a process; the median counts, and one or two warm up. Fewer of more scores.
REPEATS, FEW_REPEATS, MANY_SCORES = 15, 3, 64 * 200_000
SORTED_SCORES = 64 * 1_000_000  # scikit_learn, which sorts all, needs 16 bytes for each: not for more


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
    numbers = "numbers of queries that are searched for at once"
    parser.add_argument("--queries", nargs="+", type=cli.positive_int, default=[1, 64], help=numbers)
    parser.add_argument("--only", choices=("encoding", "search"), help="measure only one of the two")
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
    found = {
        "texts_per_second": len(texts) / seconds,
        "cpu_seconds_per_text": cpu_seconds / len(texts),
        "lowest_cosine": float(cosines.min()),
        "peak_memory_mb": peak,
    }
    if contender != "encode":
        found["gflops"] = gflop(oracle, texts) / seconds
    return found


def gflop(model: SentenceTransformer, texts: list[str]) -> float:
    """Return the matrix products of encoding texts one by one, without padding, in GFLOP."""
    config = model[0].auto_model.config
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lengths = [len(ids) for ids in model.tokenizer(texts, truncation=True)["input_ids"]]
    linear = 2 * (4 * width * width + 2 * width * inner)  # a token, in a layer
    return layers * sum(count * linear + 4 * count * count * width for count in lengths) / 1e9


def make_vectors(flags) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors (rows, width) and queries (the most, width) near some of them."""
    generator, count = np.random.default_rng(flags.seed), max(flags.queries)
    rows = generator.standard_normal((flags.rows, flags.width), dtype=np.float32)
    queries = rows[np.linspace(0, flags.rows - 1, count).astype(int)]
    queries += generator.standard_normal(queries.shape, dtype=np.float32)
    for block in (rows, queries):
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return rows, queries


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
    if contender == "matmul_topk":
        columns = torch.from_numpy(vectors).T
        return lambda queries: (torch.from_numpy(queries) @ columns).topk(TOP_K).indices.tolist()
    start_runtime(flags.device, flags.precision, flags.seed)

    def ours(queries):
        blocks = (
            (start, vectors[start : start + kernel.BLOCK]) for start in range(0, len(vectors), kernel.BLOCK)
        )
        return [
            rows
            for rows, _ in kernel.nearest_rows(blocks, queries, TOP_K, vectors_of=lambda rows: vectors[rows])
        ]

    return ours


def time_search(contender: str, flags) -> dict:
    """Return the milliseconds of a search with each number of queries, and the rows found, for the
    check.
    """
    vectors, queries = make_vectors(flags)
    search, found, cpu = searcher(contender, vectors, flags), {}, torch.device("cpu")
    rows = []
    for count in sorted(flags.queries):
        if contender == "scikit_learn" and count * len(vectors) > SORTED_SCORES:
            continue
        repeats = REPEATS if count * len(vectors) <= MANY_SCORES else FEW_REPEATS
        seconds, reading = [], []
        for _ in range(repeats + repeats // 3):
            if contender == "ours" and count == 1:
                started = environment.moment(cpu)
                torch.from_numpy(vectors).sum()
                reading.append(float((environment.moment(cpu) - started)[0]))
            started = environment.moment(cpu)
            rows = search(queries[:count])
            seconds.append(float((environment.moment(cpu) - started)[0]))
        found[f"ms_{count}"] = 1000 * statistics.median(seconds[-repeats:])
        if reading:
            found["reading_ms"] = 1000 * statistics.median(reading[-repeats:])
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
    contenders = {"limits": ("limits",), "encoding": ENCODERS, "search": SEARCHERS}
    if flags.only:
        contenders.pop("encoding" if flags.only == "search" else "search")
    names = [(kind, name) for kind, names in contenders.items() for name in names]
    rounds = {f"{kind} {name}": [] for kind, name in names}
    for number in range(flags.rounds):
        for kind, name in names:
            found = environment.run_child(
                __file__, "--child", kind, name, **environment.variables(is_ours=name.startswith("ours"))
            )
            rounds[f"{kind} {name}"].append(found)
            shown = {key: round(value, 4) for key, value in found.items() if isinstance(value, float)}
            print(f"round {number + 1}/{flags.rounds}  {kind} {name:<16} {shown}", flush=True)
    check_rows(rounds)
    return rounds


def check_rows(rounds: dict[str, list[dict]]) -> None:
    """Remove the rows that were found. Raises UserError unless all contenders found the same."""
    found = {
        name: [entry.pop("rows") for entry in entries if "rows" in entry] for name, entries in rounds.items()
    }
    for name, answers in found.items():
        for rows in answers:
            if rows != found["search ours"][0][: len(rows)]:
                raise UserError(f"{name}: finds other rows than ours")


def ratios(rounds: dict[str, list[dict]], flags) -> dict[str, float]:
    """Return the medians over the rounds of how many times faster ours is than each peer, and of
    what it takes beside the limits of the machine.
    """
    found: dict[str, list[float]] = {}

    def note(name: str, number: float) -> None:
        found.setdefault(name, []).append(number)

    for number, limits in enumerate(rounds["limits limits"]):
        figures = {name: entries[number] for name, entries in rounds.items()}
        if flags.only != "search":
            note_encoding(figures, limits, flags, note)
        if flags.only != "encoding":
            note_search(figures, limits, flags, note)
    return {name: statistics.median(numbers) for name, numbers in found.items()}


def note_encoding(figures: dict[str, dict], limits: dict, flags, note: Callable[[str, float], None]) -> None:
    """Note the ratios of one round's encoders."""
    device = choose_device(flags.device)
    precisions = {"ours_fp32": "fp32", "ours": choose_precision(flags.precision, device)}
    for name, precision in precisions.items():
        own = figures[f"encoding {name}"]
        note(f"{name}_vs_encode", own["texts_per_second"] / figures["encoding encode"]["texts_per_second"])
        if precision != "fp16":  # of which no limit is measured
            note(f"{name}_share_of_{precision}_products", own["gflops"] / limits[f"{precision}_gflops"])


def note_search(figures: dict[str, dict], limits: dict, flags, note: Callable[[str, float], None]) -> None:
    """Note the ratios of one round's searches."""
    own = figures["search ours"]
    for count in flags.queries:
        milliseconds = own[f"ms_{count}"]
        for name in SEARCHERS[:-1]:
            if f"ms_{count}" in figures[f"search {name}"]:
                note(
                    f"ours_vs_{name}_{count}_queries", figures[f"search {name}"][f"ms_{count}"] / milliseconds
                )
        if count == 1:
            note("ours_times_reading_once_1_queries", milliseconds / own["reading_ms"])
        else:
            product = 2 * flags.rows * flags.width * count / limits["fp32_gflops"] / 1e6
            note(f"ours_times_the_product_{count}_queries", milliseconds / product)


def show(medians: dict[str, dict], found: dict[str, float], flags) -> None:
    """Print the tables."""
    if flags.only != "search":
        keys = ("texts_per_second", "cpu_seconds_per_text", "peak_memory_mb", "lowest_cosine")
        lines = [
            [name, *(medians[f"encoding {name}"][key] for key in keys), found.get(f"{name}_vs_encode", 1.0)]
            for name in ENCODERS
        ]
        headers = ["encoding", "texts/s", "CPU s/text", "peak MB", "lowest cosine", "times encode"]
        print("\n" + tabulate(lines, headers, floatfmt=("", ".1f", ".3f", ".0f", ".6f", ".2f")))
    if flags.only != "encoding":
        lines = [
            [
                name,
                *(medians[f"search {name}"].get(f"ms_{count}") for count in flags.queries),
                *(found.get(f"ours_vs_{name}_{count}_queries") for count in flags.queries),
            ]
            for name in SEARCHERS
        ]
        headers = [f"search of {flags.rows:,}", *(f"ms, {count}" for count in flags.queries)]
        headers += [f"ours is faster, {count}" for count in flags.queries]
        print("\n" + tabulate(lines, headers, floatfmt=".2f", missingval="-"))
    for name, number in found.items():
        if "share" in name or "times" in name:
            print(f"{name.replace('_', ' ')}: {number:.2f}")


def main(flags):
    if flags.child:
        print(json.dumps(child(flags)))
        return
    header = environment.describe(choose_device(flags.device))
    environment.show(header)
    rounds = measure(flags)
    medians = {name: environment.median_of(measured) for name, measured in rounds.items()}
    found = ratios(rounds, flags)
    show(medians, found, flags)
    print(
        f"\nmedians over {flags.rounds} rounds; {flags.texts} news texts; {flags.rows:,} x {flags.width}"
        f" vectors, top {TOP_K}; {'with' if header['bf16_instructions'] else 'without'} bf16 instructions"
    )
    environment.show_limits(medians["limits limits"])
    document = {"environment": header, "settings": vars(flags), "medians": medians, "ratios": found}
    print("\n" + json.dumps({"benchmark": "embed", **document, "rounds": rounds}))


if __name__ == "__main__":
    cli.run(make_parser(), main)
