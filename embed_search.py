#!/usr/bin/env python
"""Texts in, embeddings on disk, answers out: similarity, search, pairs, duplicates and clusters
over a durable index.

Texts come from a file with one per line, from standard input ("-"), a CSV/TSV/JSON/JSONL/Parquet
file with --text-column, a folder of .txt files, or a bundled set. Models are those of
sentence-transformers, local or from the Hub; without --model, an index is searched with the model
that made it, and everything else uses bundled/all-MiniLM-L6-v2. Left out on purpose: a server,
embeddings made by other programs, images.

  python embed_search.py similarity sentences.txt --query "Artificial intelligence" --figure map.png
  python embed_search.py index bundled/bbc-news --index news
  python embed_search.py search --index news "interest rates" --where "label = 'business'" --hybrid
  python embed_search.py duplicates --index news --threshold 0.9
  python embed_search.py cluster --index news --num-clusters 5 --figure clusters.png
  python embed_search.py evaluate
  torchrun --nproc-per-node 2 embed_search.py index texts.csv --index texts  # one process per GPU
"""

import argparse
import dataclasses
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np

from common import cli, figures, reading
from common.errors import Interrupted, UserError
from common.runtime import Runtime, start_runtime, stop_runtime
from common.search import display, mining, relevance, texts
from common.search.builder import (
    Builder,
    Source,
    check_settings,
    fill,
    load_index_encoder,
    rows_with_ids,
    settings_of,
    whole_documents,
)
from common.search.display import Screen
from common.search.encoder import EncoderConfig, chunk_size, load_encoder, load_reranker
from common.search.index import MANIFEST, check_folder, open_snapshot, open_store, read_manifest
from common.search.searcher import Searcher, matching
from common.sources import FileOptions

DEFAULT_OVERLAP = 32
LARGEST_MATRIX = 5_000  # texts whose matrix of similarities is shown or written
WHERE = {"metavar": "SQL", "help": "only rows where this holds, such as \"label = 'tech'\""}
WAIT = {"type": cli.non_negative_float, "default": 10.0, "help": "seconds to wait for another writer"}
SKIP_BAD = {"action": "store_true", "help": "skip rows and ids that can't be used"}


# similarity: the cosine of every text with every other


def add_similarity_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    flag = command.add_argument
    flag("--query", action="append", default=[], help="a text to compare with all; may be repeated")
    flag("--top-k", type=cli.positive_int, default=3, help="the most similar pairs to show")
    flag("--figure", metavar="PNG", type=display.picture_file, help="write the matrix as a picture")


def similarity(args: argparse.Namespace, runtime: Runtime, screen: Screen) -> None:
    """Compare all texts with each other, and with queries, by cosine."""
    for number, query in enumerate(args.query, start=1):
        texts.check_query(query, f"--query {number}")
    options = {"say": screen.say, "most": LARGEST_MATRIX}
    with mining.open_source(source_of(args), runtime, **options) as (selection, encoder):
        vectors = selection.vectors(slice(None)).astype(np.float64)
        matrix = vectors @ vectors.T  # (N, N)
        best = mining.best_pairs(selection, args.top_k, block=args.block)
        queries = []
        if args.query:
            # encoded like the texts, so that the same text has the cosine 1
            role = "document" if args.index else None
            embeddings = encoder().encode_unit(args.query, role=role).astype(np.float64)
            queries = list(zip(args.query, embeddings @ vectors.T))
        display.show_similarity(screen, selection, matrix, best, queries)
        if args.figure:
            figure = figures.similarity_map(matrix, display.ids_of(selection))
            display.save_figure(figure, args.figure, screen)


# index: texts -> embeddings on disk, block by block


def add_index_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("texts", help="texts to put into the index")
    flag("--index", metavar="DIR", required=True, help="the folder of the index")
    flag("--id-column", help="the column of ids (default: the index's, else a hash of the text)")
    flag("--update", action="store_true", help="replace rows whose text or columns changed")
    flag("--chunk", action="store_true", help="split texts that the model can't read whole")
    overlap = f"tokens that neighbouring chunks share (default: {DEFAULT_OVERLAP})"
    flag("--chunk-overlap", type=cli.non_negative_int, help=overlap)
    flag("--wait", **WAIT)
    add_text_flags(command)


def index(args: argparse.Namespace, runtime: Runtime, screen: Screen) -> None:
    """Build an index, or bring it up to date."""
    folder, source, config = Path(args.index), source_of(args), encoder_config(args)
    check_folder(folder, new=True)
    id_column, overlap = args.id_column, args.chunk_overlap
    if overlap is None and args.chunk:
        overlap = DEFAULT_OVERLAP
    if (folder / MANIFEST).is_file():  # the index exists: what no flag names stays as it was made
        existing = read_manifest(folder)["settings"]
        config = config.with_defaults(existing["model"], existing["max_length"])
        id_column = id_column or existing["id_column"]
        if overlap is None:
            overlap = existing["chunk_overlap"]
    collection = None
    if runtime.world_size == 1:  # mistakes in the texts are reported before the model is loaded
        collection = source.read(id_column)
    encoder = load_encoder(config, runtime)
    # under torchrun every process encodes, but only the main one reads the texts and writes
    if not runtime.is_main:
        encoder.follow()
        return
    settings = settings_of(encoder, id_column=id_column, chunk_overlap=overlap)
    started = time.perf_counter()
    builder = None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        if collection is None:
            collection = source.read(id_column)
        if overlap is not None:
            chunk_size(encoder, overlap)  # refuses an overlap that is too large, before any writing
        with open_store(folder, settings=settings, wait=args.wait) as store:
            check_settings(args.index, settings, store.snapshot.settings)
            builder = Builder(store, encoder, update=args.update, skip_bad=args.skip_bad)
            fill(builder, collection, block=args.block)
            seconds = time.perf_counter() - started
            display.show_build(screen, builder, collection, seconds=seconds)
    except UserError:
        encoder.release()
        raise
    except SystemExit as stopped:  # no release(): the others may be in the middle of a block
        done = builder.counts.committed if builder else 0
        message = f"stopped; {done:,} texts of this run are in {folder}; the same command continues"
        raise Interrupted(message, int(stopped.code or 0)) from None
    encoder.release()


def stop(number: int, _: FrameType | None) -> NoReturn:
    """End the process; what is committed stays. Later signals are ignored: torchrun sends two."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


# delete, compact: an index over its life


def add_delete_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("ids", nargs="*", help="the ids of the texts to delete")
    flag("--where", metavar="SQL", help="delete every row for which this holds")
    flag("--index", metavar="DIR", required=True, help="the index to delete from")
    flag("--wait", **WAIT)
    flag("--skip-bad", **SKIP_BAD)


def delete(args: argparse.Namespace, runtime: Runtime, screen: Screen) -> None:
    """Delete rows of an index, by their ids or by a condition."""
    if bool(args.ids) == bool(args.where):
        raise UserError("delete: name either ids or --where")
    for number, key in enumerate(args.ids, start=1):
        texts.check_query(key, f"id {number}")
    unknown: list[str] = []
    with open_store(args.index, wait=args.wait) as store:
        if args.where:
            matched = np.flatnonzero(matching(store.snapshot, args.where))
            rows = whole_documents(store.snapshot, matched)
        else:
            rows, unknown = rows_with_ids(store.snapshot, args.ids)
        if unknown and not args.skip_bad:
            problem = f"no text with id {unknown[0]!r}; nothing is deleted"
            raise UserError(f"--index {args.index}: {problem}; correct it, or give --skip-bad")
        if len(rows):
            store.commit(None, rows)
        display.show_deletion(screen, store.snapshot, deleted=len(rows), unknown=len(unknown))


def add_compact_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("--index", metavar="DIR", required=True, help="the index to compact")
    flag("--wait", **WAIT)


def compact(args: argparse.Namespace, runtime: Runtime, screen: Screen) -> None:
    """Free the space of deleted rows and merge small files."""
    with open_store(args.index, wait=args.wait) as store:
        store.compact()
        display.show_index(screen, store.snapshot)


# search: queries -> hits


def add_search_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("queries", nargs="*", metavar="QUERY", help="a text to search for; without any, a prompt")
    flag("--index", metavar="DIR", required=True, help="where to search")
    lines = "one query per line, - for standard input"
    flag("--queries", dest="queries_file", metavar="FILE", help=lines)
    flag("--top-k", type=cli.positive_int, default=5, help="texts per query")
    flag("--hybrid", action="store_true", help="fuse cosine and BM25 by reciprocal rank")
    flag("--approximate", action="store_true", help="search a FAISS graph, kept beside the index")
    flag("--where", **WHERE)
    add_rerank_flags(command)
    add_model_flags(command)


def search(args: argparse.Namespace, runtime: Runtime, screen: Screen) -> None:
    """Find the texts of an index that are nearest to queries; without a query, ask for them."""
    if args.queries and args.queries_file:
        raise UserError("search: name either queries or --queries FILE")
    queries, location = args.queries, "query"
    if args.queries_file:
        queries, location = reading.read_lines(args.queries_file), f"{args.queries_file}, line"
    for number, query in enumerate(queries, start=1):
        texts.check_query(query, f"{location} {number}")
    snapshot = open_snapshot(args.index)
    if not snapshot.alive().any():
        command = f"embed_search.py index TEXTS --index {args.index}"
        raise UserError(f"--index {args.index}: it has no rows; add some with: {command}")
    allowed = matching(snapshot, args.where)
    encoder = load_index_encoder(encoder_config(args), runtime, snapshot)
    reranker = None
    if args.rerank:
        reranker = load_reranker(args.rerank, runtime, cache_dir=args.cache_dir)
    searcher = Searcher(
        snapshot,
        encoder,
        allowed,
        approximate=args.approximate,
        hybrid=args.hybrid,
        reranker=reranker,
        rerank_depth=args.rerank_depth,
        say=screen.say,
    )
    if not queries:
        display.answer_prompt(screen, searcher, args.top_k)
        return
    hits = searcher.search(queries, args.top_k)
    display.show_hits(screen, searcher, queries, hits)
    if encoder.num_cut:
        limit = f"{encoder.max_length} tokens"
        screen.say(f"{encoder.num_cut:,} queries are longer than {limit} and were cut there")


# pairs, duplicates, cluster: similar texts without a query


def add_pairs_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    command.add_argument("--top-k", type=cli.positive_int, default=10, help="how many")


def pairs(args: argparse.Namespace, runtime: Runtime, screen: Screen) -> None:
    """Find the most similar pairs."""
    with mining.open_source(source_of(args), runtime, say=screen.say, least=2) as (selection, _):
        best = mining.best_pairs(selection, args.top_k, block=args.block)
        display.show_pairs(screen, selection, best)


def add_duplicates_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    flag = command.add_argument
    flag("--threshold", type=display.cosine, default=0.9, help="the lowest cosine of a pair")
    flag("--pairs-file", metavar="CSV", type=display.output_file, help="write every pair once")


def duplicates(args: argparse.Namespace, runtime: Runtime, screen: Screen) -> None:
    """Find groups of texts that are nearly the same."""
    with mining.open_source(source_of(args), runtime, say=screen.say, least=2) as (selection, _):
        similar = mining.similar_pairs(selection, args.threshold, block=args.block)
        with display.open_output(args.pairs_file) as file:
            groups, kept = display.collect_groups(selection, similar, file, keep=screen.as_json)
        display.show_groups(screen, selection, groups, kept, threshold=args.threshold)


def add_cluster_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    how = command.add_mutually_exclusive_group(required=True)
    how.add_argument("--num-clusters", type=cli.positive_int, help="the clusters of k-means")
    how.add_argument("--threshold", type=display.cosine, help="group neighbours of at least this cosine")
    flag = command.add_argument
    flag("--min-size", type=cli.positive_int, default=2, help="drop smaller clusters (--threshold)")
    flag("--figure", metavar="PNG", type=display.picture_file, help="write a map of the clusters")


def cluster(args: argparse.Namespace, runtime: Runtime, screen: Screen) -> None:
    """Find clusters, the texts nearest to each centre and the words typical of it."""
    with mining.open_source(source_of(args), runtime, say=screen.say, least=2) as (selection, _):
        count, wanted = len(selection), args.num_clusters or 0
        if wanted > count:
            raise UserError(
                f"--num-clusters {wanted}: there are {count} {selection.unit}; use fewer clusters"
            )
        if wanted:
            labels = mining.k_means(selection, wanted, block=args.block, seed=args.seed)
        else:
            threshold, least = args.threshold, args.min_size
            labels = mining.communities(selection, threshold, min_size=least, block=args.block)
        words = mining.typical_words(selection, labels, display.NUM_WORDS)
        if len(words) < wanted:
            reason = f"the {selection.unit} have no more different embeddings"
            screen.say(f"only {len(words)} clusters, not {wanted}: {reason}")
        display.show_clusters(screen, selection, labels, words)
        if args.figure:
            positions, points = mining.map_points(selection, seed=args.seed)
            names = [f"{number}: {', '.join(own[:3])}" for number, own in enumerate(words, start=1)]
            figure = figures.cluster_map(points, labels[positions], names)
            display.save_figure(figure, args.figure, screen)


# evaluate, compare-models: how good a search or a model is


def add_evaluate_flags(command: cli.Parser) -> None:
    command.add_argument("--index", metavar="DIR", help="where to search")
    add_rerank_flags(command)
    add_task_flags(command)


def evaluate(args: argparse.Namespace, runtime: Runtime, screen: Screen) -> None:
    """Score an index (nDCG, MRR, recall), sentence pairs (Spearman) or the bundled task."""
    if args.sts and (args.queries or args.qrels or args.texts or args.index or args.rerank):
        others = "--queries, --qrels, --texts, --index and --rerank"
        raise UserError(f"--sts {args.sts}: it is a task of its own; leave {others} out")
    if args.sts:
        encoder = load_encoder(encoder_config(args), runtime)
        scores = relevance.sts_score(encoder, args.sts, args.sts_columns, block=args.block)
        display.show_sts(screen, args.sts, scores)
        return
    files = relevance.TaskFiles(args.queries, args.qrels, args.id_column)
    reranker, depth = None, args.rerank_depth
    if args.rerank:
        reranker = load_reranker(args.rerank, runtime, cache_dir=args.cache_dir)
    with relevance.open_task(files, source_of(args), runtime, say=screen.say) as opened:
        snapshot, allowed = opened.snapshot, opened.snapshot.alive()
        searcher = Searcher(snapshot, opened.encoder, allowed, rerank_depth=depth, say=screen.say)
        scores = relevance.score_all(searcher, opened.task, reranker=reranker)
        display.show_scores(screen, opened.task, scores)


def add_compare_flags(command: cli.Parser) -> None:
    models = "bundled names, local folders or Hub ids"
    command.add_argument("models", nargs="+", metavar="MODEL", help=models)
    add_task_flags(command)


def compare_models(args: argparse.Namespace, runtime: Runtime, screen: Screen) -> None:
    """Evaluate several models: quality, texts/s, bytes per embedding."""
    if args.model:
        raise UserError(
            f"--model {args.model}: compare-models takes its models without it; leave --model out"
        )
    lines = []
    files = relevance.TaskFiles(args.queries, args.qrels, args.id_column)
    for name in args.models:
        encoder = load_encoder(dataclasses.replace(encoder_config(args), model=name), runtime)
        line = {"model": name, "width": encoder.width, "bytes_a_vector": 4 * encoder.width}
        if args.sts:
            line |= relevance.sts_score(encoder, args.sts, args.sts_columns, block=args.block)
        else:
            source, options = source_of(args), {"say": screen.say, "encoder": encoder}
            with relevance.open_task(files, source, runtime, **options) as opened:
                snapshot = opened.snapshot
                searcher = Searcher(snapshot, encoder, snapshot.alive(), say=screen.say)
                line["texts_per_second"] = snapshot.num_rows / opened.seconds
                line |= relevance.score(searcher, opened.task)
        lines.append(line)
    display.show_models(screen, lines)


# project: an index for TensorBoard


def add_project_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("--index", metavar="DIR", required=True, help="what to show")
    flag("--output-dir", type=cli.folder, required=True, help="the folder for tensorboard --logdir")
    flag("--max-points", type=cli.positive_int, default=10_000, help="the most rows, evenly spaced")
    flag("--where", **WHERE)


def project(args: argparse.Namespace, runtime: Runtime, screen: Screen) -> None:
    """Write an index for TensorBoard's projector."""
    selection = mining.select(open_snapshot(args.index), args.where)
    display.write_projection(screen, selection, args.output_dir, most=args.max_points)


# flags that several commands share


def add_model_flags(command: cli.Parser) -> None:
    cli.add_shared_flags(command, model=None)
    flag = command.add_argument
    length = "tokens that the model reads of a text (default: the index's, else the model's own)"
    flag("--max-length", type=cli.positive_int, help=length)
    flag("--batch-tokens", type=cli.positive_int, help="positions per batch (default: by device)")


def add_text_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("--text-column", default="text", help="where the texts are in a data file")
    cli.add_file_flags(command)
    block = "texts encoded and committed at once; rows compared at once"
    flag("--block", type=cli.positive_int, default=1024, help=block)
    flag("--skip-bad", **SKIP_BAD)
    add_model_flags(command)


def add_source_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("texts", nargs="?", help="texts to look at, or name an index with --index")
    flag("--index", metavar="DIR", help="an index made before")
    flag("--where", **WHERE)
    add_text_flags(command)


def add_task_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("--texts", metavar="TEXTS", help="the documents, with --queries and --qrels")
    flag("--id-column", default="id", help="the column of the documents' ids")
    flag("--queries", metavar="JSONL", help='one {"id": ..., "text": ...} per line')
    flag("--qrels", metavar="FILE", help="judgements in TREC form: query 0 document relevance")
    flag("--sts", metavar="FILE", help="a data file of sentence pairs with human scores")
    columns = ["sentence1", "sentence2", "score"]
    flag("--sts-columns", nargs=3, default=columns, metavar="COLUMN", help="its texts and score")
    add_text_flags(command)


def add_rerank_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("--rerank", metavar="MODEL", help="reorder the best hits with a cross-encoder")
    flag("--rerank-depth", type=cli.positive_int, default=100, help="how many of the best it reads")


def encoder_config(args: argparse.Namespace) -> EncoderConfig:
    return EncoderConfig(args.model, args.max_length, args.batch_tokens, args.cache_dir)


def source_of(args: argparse.Namespace) -> Source:
    return Source(
        encoder=encoder_config(args),
        texts=args.texts,
        index=args.index,
        where=args.where,
        text_column=args.text_column,
        options=FileOptions(args.columns, args.delimiter, args.quoting, args.encoding),
        skip_bad=args.skip_bad,
        block=args.block,
    )


COMMANDS = {
    "similarity": (similarity, add_similarity_flags),
    "index": (index, add_index_flags),
    "delete": (delete, add_delete_flags),
    "compact": (compact, add_compact_flags),
    "search": (search, add_search_flags),
    "pairs": (pairs, add_pairs_flags),
    "duplicates": (duplicates, add_duplicates_flags),
    "cluster": (cluster, add_cluster_flags),
    "evaluate": (evaluate, add_evaluate_flags),
    "compare-models": (compare_models, add_compare_flags),
    "project": (project, add_project_flags),
}


def make_parser() -> cli.Parser:
    """Return the parser of the whole command line; a command's docstring is its help."""
    parser = cli.Parser(prog="embed_search.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, add_flags) in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        # what main() and source_of() read, for commands that lack these flags
        command.set_defaults(device="cpu", precision="fp32", seed=0, index=None, where=None)
        add_flags(command)
    return parser


def main(args: argparse.Namespace) -> None:
    runtime = start_runtime(args.device, args.precision, args.seed)
    if runtime.world_size > 1 and args.command != "index":
        problem = "only index runs in several processes"
        raise UserError(f"torchrun: {problem}; run {args.command} with python")
    run, _ = COMMANDS[args.command]
    run(args, runtime, Screen(as_json=args.json, shown=runtime.is_main))
    stop_runtime()


if __name__ == "__main__":
    cli.run(make_parser(), main)
