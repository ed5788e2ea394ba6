#!/usr/bin/env python
"""Texts in, vectors on disk, answers out: similarity, search, pairs, duplicates, clusters over a
durable index.

Texts are a file with one a line, "-", a CSV/TSV/JSON/JSONL/Parquet file with --text-column, a
folder of .txt files, or a bundled set. Models are sentence-transformers' own, local or from the
Hub; --model is the index's own by default, else bundled/all-MiniLM-L6-v2. Left out on purpose: a
server, vectors of other makers, pictures.

  python embed_search.py similarity sentences.txt --query "Artificial intelligence" --figure map.png
  python embed_search.py index bundled/bbc-news --index news
  python embed_search.py search --index news "interest rates" --where "label = 'business'" --hybrid
  python embed_search.py duplicates --index news --threshold 0.9
  python embed_search.py cluster --index news --num-clusters 5 --figure clusters.png
  python embed_search.py evaluate
  torchrun --nproc-per-node 2 embed_search.py index texts.csv --index texts  # one process a GPU
"""

import argparse
import signal
import sys
import time
from pathlib import Path

import numpy as np

from common import cli, figures, reading
from common.errors import Interrupted, UserError
from common.runtime import start_runtime, stop_runtime
from common.search import builder as building
from common.search import clustering, flags, inputs, mining, passages, projector, store, texts
from common.search import display as views
from common.search import encoder as encoding
from common.search import relevance as evaluation
from common.search.filters import matching
from common.search.index import MANIFEST, open_snapshot, read_manifest
from common.search.screen import Screen
from common.search.searcher import Searcher


def make_parser() -> cli.Parser:
    return flags.make_parser(__doc__)


def similarity(args, runtime, screen):
    """Show the matrix of cosines, the most similar pairs, and each query's similarity to all
    texts.
    """
    for number, query in enumerate(args.query, start=1):
        texts.check_query(query, f"--query {number}")
    with inputs.source(args, runtime, screen) as (live, encoder):
        vectors = live.vectors(slice(None)).astype(np.float64)
        matrix = vectors @ vectors.T
        pairs = mining.best_pairs(live, args.top_k, block=args.block)
        # as the texts are encoded, so that the same text has the cosine 1
        role = "document" if args.index else None
        found = (
            encoder().encode_unit(args.query, role=role).astype(np.float64) @ vectors.T if args.query else []
        )
        views.show_similarity(screen, live, matrix, pairs, list(zip(args.query, found)))
        if args.figure:
            views.save_figure(figures.similarity_map(matrix, views.labels(live)), args.figure, screen)


def index(args, runtime, screen):
    """Build or extend an index, block by block; under torchrun the main process reads and writes,
    all encode.
    """
    store.check_place(Path(args.index), new=True)
    settings = (
        read_manifest(Path(args.index))["settings"] if (Path(args.index) / MANIFEST).is_file() else None
    )
    id_column = args.id_column or (settings and settings["id_column"])
    # what is wrong with the texts is said before the model loads
    collection = inputs.read_texts(args, id_column) if runtime.world_size == 1 else None
    encoder = inputs.load_encoder(args, runtime, settings)
    if not runtime.is_main:
        # Ctrl-C reaches every process: this one ends when it loses the main one
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        encoder.follow()
        return
    overlap = (
        args.chunk_overlap
        if args.chunk_overlap is not None
        else flags.DEFAULT_OVERLAP
        if args.chunk
        else settings and settings["chunk_overlap"]
    )
    wanted = building.settings_of(encoder, id_column=id_column, chunk_overlap=overlap)
    try:
        fill_index(args, screen, collection, encoder, wanted)
    except UserError:
        encoder.release()
        raise
    # not after a signal: the other processes may be in the midst of a block, and wait for its
    # vectors
    encoder.release()


def fill_index(args, screen, collection, encoder, wanted: dict):
    """Bring the texts into the index. A signal ends it at once: what is committed is there."""
    started, builder = time.perf_counter(), None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        collection = collection or inputs.read_texts(args, wanted["id_column"])
        if wanted["chunk_overlap"] is not None:
            passages.room(encoder, wanted["chunk_overlap"])
        with store.writing(args.index, settings=wanted, wait=args.wait) as opened:
            building.check_settings(args.index, wanted, opened.snapshot.settings)
            builder = building.Builder(opened, encoder, update=args.update, skip_bad=args.skip_bad)
            building.fill(builder, collection, block=args.block)
            views.show_index(screen, builder, collection, seconds=time.perf_counter() - started)
    except SystemExit as stopped:
        done = builder.counts.committed if builder else 0
        raise Interrupted(
            f"stopped; {done:,} texts of this run are in {args.index}; the same command goes on from there",
            stopped.code,
        ) from None


def stop(number: int, _):
    """End by a signal, and by one only: torchrun sends a second."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def delete(args, runtime, screen):
    """Delete rows by their ids or by a condition."""
    if bool(args.ids) == bool(args.where):
        raise UserError("delete: name either ids or --where")
    for number, key in enumerate(args.ids, start=1):
        texts.check_query(key, f"id {number}")
    unknown = []
    with store.writing(args.index, wait=args.wait) as opened:
        if args.where:
            rows = building.whole_documents(
                opened.snapshot, np.flatnonzero(matching(opened.snapshot, args.where))
            )
        else:
            rows, unknown = building.rows_with_ids(opened.snapshot, args.ids)
            if unknown and not args.skip_bad:
                raise UserError(
                    f"--index {args.index}: no text with id {unknown[0]!r}; nothing is deleted; leave it out,"
                    " or pass it over with --skip-bad"
                )
        if len(rows):
            opened.commit(None, rows)
        views.show_state(screen, opened.snapshot, deleted=len(rows), unknown=len(unknown))


def compact(args, runtime, screen):
    """Write the live rows anew."""
    with store.writing(args.index, wait=args.wait) as opened:
        opened.compact()
        views.show_state(screen, opened.snapshot)


def search(args, runtime, screen):
    """Answer queries from the command line, a file, or a prompt."""
    if args.queries and args.queries_file:
        raise UserError("search: name either queries or --queries FILE")
    queries = reading.read_lines(args.queries_file) if args.queries_file else args.queries
    for number, query in enumerate(queries, start=1):
        texts.check_query(
            query, f"{args.queries_file}, line {number}" if args.queries_file else f"query {number}"
        )
    searcher = make_searcher(args, runtime, screen, open_snapshot(args.index))
    if queries:
        views.show_hits(screen, searcher, queries, searcher.search(queries, args.top_k))
        if searcher.encoder.num_cut:
            screen.say(
                f"{searcher.encoder.num_cut:,} queries are longer than {searcher.encoder.max_length} tokens"
                " and were read without their end"
            )
    else:
        views.prompt(screen, searcher, args.top_k)


def make_searcher(args, runtime, screen, snapshot) -> Searcher:
    """Return what searches a snapshot as the flags ask for."""
    if not snapshot.alive().any():
        raise UserError(
            f"--index {args.index}: it has no rows; add some with: embed_search.py index TEXTS --index"
            f" {args.index}"
        )
    mask, encoder = matching(snapshot, args.where), inputs.load_encoder(args, runtime, snapshot.settings)
    return Searcher(
        snapshot,
        encoder,
        mask,
        approximate=args.approximate,
        hybrid=args.hybrid,
        reranker=inputs.load_reranker(args, runtime),
        rerank_depth=args.rerank_depth,
        say=screen.say,
    )


def pairs(args, runtime, screen):
    """Show the most similar pairs."""
    with inputs.source(args, runtime, screen) as (live, _):
        views.show_pairs(screen, live, mining.best_pairs(live, args.top_k, block=args.block))


def duplicates(args, runtime, screen):
    """Show groups of texts joined by pairs above the threshold."""
    with inputs.source(args, runtime, screen) as (live, _), views.open_output(args.pairs_file) as file:
        groups, kept = views.collect_groups(
            live, mining.similar_pairs(live, args.threshold, block=args.block), file, keep=screen.as_json
        )
        views.show_groups(screen, live, groups, kept, threshold=args.threshold)


def cluster(args, runtime, screen):
    """Show clusters: sizes, marking words, the texts nearest to their centres."""
    with inputs.source(args, runtime, screen) as (live, _):
        if args.num_clusters and args.num_clusters > len(live):
            raise UserError(
                f"--num-clusters {args.num_clusters}: there are {len(live)} {live.unit}; use fewer clusters"
            )
        if args.num_clusters:
            labels = clustering.k_means(live, args.num_clusters, block=args.block, seed=args.seed)
        else:
            labels = clustering.communities(live, args.threshold, min_size=args.min_size, block=args.block)
        if labels.max(initial=-1) + 1 < (args.num_clusters or 0):
            screen.say(
                f"only {labels.max() + 1} clusters, not {args.num_clusters}: the {live.unit} have no more"
                " different vectors"
            )
        words = clustering.marking_words(live, labels, views.WORDS)
        views.show_clusters(screen, live, labels, words)
        if args.figure:
            places, points = clustering.map_places(live, seed=args.seed)
            names = [f"{number + 1}: {', '.join(own[:3])}" for number, own in enumerate(words)]
            views.save_figure(figures.cluster_map(points, labels[places], names), args.figure, screen)


def evaluate(args, runtime, screen):
    """Score a search, or sentence pairs."""
    if args.sts and (args.queries or args.qrels or args.texts or args.index or args.rerank):
        raise UserError(
            "--sts: it is a task of its own; leave --queries, --qrels, --texts, --index and --rerank out"
        )
    if args.sts:
        encoder = inputs.load_encoder(args, runtime)
        views.show_sts(
            screen,
            args.sts,
            evaluation.sts_score(encoder, args.sts, args.columns, block=args.block, cache_dir=args.cache_dir),
        )
        return
    with inputs.retrieval_task(args, runtime, screen) as (task, snapshot, encoder, _):
        searcher = Searcher(
            snapshot, encoder, snapshot.alive(), rerank_depth=args.rerank_depth, say=screen.say
        )
        views.show_scores(
            screen, task, evaluation.score_modes(searcher, task, reranker=inputs.load_reranker(args, runtime))
        )


def compare_models(args, runtime, screen):
    """Score several models and compare their speed and size."""
    if args.model:
        raise UserError(
            f"--model {args.model}: compare-models takes its models without a flag; leave --model out"
        )
    lines = []
    for name in args.models:
        encoder = encoding.load(
            name,
            runtime,
            max_length=args.max_length,
            batch_tokens=args.batch_tokens,
            cache_dir=args.cache_dir,
        )
        line = {"model": name, "width": encoder.width, "bytes_a_vector": 4 * encoder.width}
        if args.sts:
            line |= evaluation.sts_score(
                encoder, args.sts, args.columns, block=args.block, cache_dir=args.cache_dir
            )
        else:
            with inputs.retrieval_task(args, runtime, screen, encoder) as (task, snapshot, _, seconds):
                line["texts_per_second"] = snapshot.num_rows / seconds
                line |= evaluation.score_mode(
                    Searcher(snapshot, encoder, snapshot.alive(), say=screen.say), task, {}
                )
        lines.append(line)
    views.show_models(screen, lines)


def project(args, runtime, screen):
    """Write an index for TensorBoard's projector."""
    snapshot = open_snapshot(args.index)
    rows = inputs.chosen_rows(snapshot, args)
    count = projector.write(snapshot, rows, args.output_dir, most=args.max_points)
    views.show_projection(screen, count, len(rows), args.output_dir)


COMMANDS = {
    "similarity": similarity,
    "index": index,
    "delete": delete,
    "compact": compact,
    "search": search,
    "pairs": pairs,
    "duplicates": duplicates,
    "cluster": cluster,
    "evaluate": evaluate,
    "compare-models": compare_models,
    "project": project,
}


def main(args: argparse.Namespace):
    runtime = start_runtime(args.device, args.precision, args.seed)
    if runtime.world_size > 1 and args.command != "index":
        raise UserError(f"torchrun: only index is split over processes; run {args.command} with python")
    COMMANDS[args.command](args, runtime, Screen(as_json=args.json, shown=runtime.is_main))
    stop_runtime()


if __name__ == "__main__":
    cli.run(make_parser(), main)
