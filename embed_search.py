#!/usr/bin/env python
"""Texts in, embeddings on disk, answers out: similarity, search, pairs, duplicates and clusters
over a durable index.

Texts come from a file with one per line, from standard input ("-"), a CSV/TSV/JSON/JSONL/Parquet
file with --text-column, a folder of .txt files, or a bundled set. Models are those of
sentence-transformers, local or from the Hub; without --model, an index is searched with the model
that made it, and everything else uses bundled/all-MiniLM-L6-v2. An index
beyond one machine is a collection in Milvus (milvus:URI/COLLECTION). Left out on purpose: images.

  python embed_search.py similarity sentences.txt --query "Artificial intelligence" --figure map.png
  python embed_search.py index bundled/bbc-news --index news
  python embed_search.py search --index news "interest rates" --where "label = 'business'" --hybrid
  python embed_search.py serve --index news  # a page for a browser, at http://127.0.0.1:8000
  python embed_search.py duplicates --index news --threshold 0.9
  python embed_search.py cluster --index news --num-clusters 5 --figure clusters.png
  python embed_search.py evaluate
  torchrun --nproc-per-node 2 embed_search.py index texts.csv --index texts  # one process per GPU
  torchrun --nproc-per-node 2 embed_search.py duplicates --index texts  # they share the pairs
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common import cli, sources
from common.errors import Interrupted, UserError
from common.files import only_writer
from common.search import search_checks as checks
from common.search import search_flags as flags
from common.search.manifest import MANIFEST, check_settings, read_manifest
from common.search.screen import Screen
from common.search.search_flags import (
    encoder_config,
    limits_of,
    read_queries,
    read_source,
    read_task,
    read_texts,
    reading_options,
    start,
    task_fingerprint,
)
from common.search.words import Words, stop_words

# Each command imports its libraries itself, after the flags are checked: PyTorch takes seconds.
if TYPE_CHECKING:
    import numpy as np

    from common.runtime import Runtime
    from common.search.encoder import Encoder
    from common.search.index import Snapshot
    from common.search.model_scores import ModelScores
    from common.search.relevance import Task
    from common.search.selection import Selection
    from common.search.texts import Collection

LARGEST_MATRIX = 5_000  # texts whose matrix of similarities is shown or written


# What is compared or searched: rows of an index, or of one that is made for this command ----------


@contextlib.contextmanager
def open_source(
    source: Collection | str,
    args: argparse.Namespace,
    runtime: Runtime,
    screen: Screen,
    *,
    role: str | None = "document",
) -> Iterator[tuple[Snapshot, Encoder | None]]:
    """Yield the index of this name, or one of these texts that lasts for the command, and the encoder with
    which the texts were encoded in the `role`; None for an index, which may need no encoder.
    """
    if isinstance(source, str):
        from common.search.index import open_snapshot

        yield open_snapshot(source), None
        return
    from common.search.builder import build_temporary
    from common.search.encoder import load_encoder

    with tempfile.TemporaryDirectory() as folder:
        encoder = load_encoder(encoder_config(args), runtime)
        options = {"block": args.block, "say": screen.say, "role": role}
        yield build_temporary(source, encoder, folder, **options), encoder


@contextlib.contextmanager
def open_rows(
    source: Collection | str,
    args: argparse.Namespace,
    runtime: Runtime,
    screen: Screen,
    *,
    least: int = 1,
    role: str | None = None,
) -> Iterator[tuple[Selection, Encoder | None]]:
    """Yield the rows where --where holds, and the encoder that `open_source` yields. Raises UserError when
    there are fewer than `least`.
    """
    from common.search.selection import select, shared

    with open_source(source, args, runtime, screen, role=role) as (snapshot, encoder):
        name = None if isinstance(source, str) else source.name
        selection = select(snapshot, args.where, limits=limits_of(args), least=least, name=name)
        yield shared(selection, runtime), encoder


def index_encoder(args: argparse.Namespace, runtime: Runtime, snapshot: Snapshot) -> Encoder:
    """Return the encoder of the index that --index names."""
    from common.search.encoder import load_index_encoder

    return load_index_encoder(encoder_config(args), runtime, args.index, snapshot.settings)


# similarity: the cosine of every text with every other --------------------------------------------


def similarity(args: argparse.Namespace, screen: Screen) -> None:
    """Compare all texts with each other, and with queries, by cosine."""
    import numpy as np

    from common.search import display, mining

    runtime, source = start(args), read_source(args)
    if not args.index:
        check_matrix(len(source))  # before they are encoded
    with open_rows(source, args, runtime, screen) as (selection, encoder):
        check_matrix(len(selection))
        vectors = selection.vectors(slice(None)).astype(np.float64)
        matrix = vectors @ vectors.T  # (N, N)
        best = mining.best_pairs(selection, args.top_k, block=args.block)
        queries = []
        if args.query:
            encoder = encoder or index_encoder(args, runtime, selection.snapshot)
            # encoded like the texts, so that the same text has the cosine 1
            role = "document" if args.index else None
            embeddings = encoder.encode_normalized(args.query, role=role).astype(np.float64)
            queries = list(zip(args.query, embeddings @ vectors.T))
        display.show_similarity(screen, selection, matrix, best, queries)
        if args.output:
            display.save_vectors(vectors.astype(np.float32), args.output, screen)
        if args.figure:
            from common import figures

            figure = figures.similarity_map(matrix, selection.ids())
            display.save_figure(figure, args.figure, screen)


def check_matrix(count: int) -> None:
    """Raise UserError when a matrix of similarities would be too large."""
    if count > LARGEST_MATRIX:
        problem = f"{count:,} texts, but the matrix holds {LARGEST_MATRIX:,} at most"
        raise UserError(f"similarity: {problem}; use pairs, or index and search")


# index: texts -> embeddings on disk, block by block -----------------------------------------------


def index(args: argparse.Namespace, screen: Screen) -> None:
    """Build an index, or bring it up to date."""
    from common.search.encoder import load_index_encoder

    runtime, folder = start(args), Path(args.index)
    existing, text_columns, collection = None, (), None
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        existing = manifest["settings"]
        # where a column holds texts, digits are texts too
        text_columns = [name for name, kind in manifest["columns"].items() if kind == "string"]
    options = flags.index_options(args, existing)
    # under torchrun every process encodes, but only the main one reads the texts and writes
    with runtime.raised_on_all():  # mistakes in the texts are reported before the model is loaded
        if runtime.is_main:
            collection = read_texts(args, options["id_column"], as_text=text_columns)
    encoder = load_index_encoder(encoder_config(args), runtime, args.index, existing)
    if collection is None:
        encoder.run_worker()
        return
    with encoder.workers():
        fill_index(args, collection, encoder, options, screen)


def fill_index(
    args: argparse.Namespace,
    collection: Collection,
    encoder: Encoder,
    options: flags.IndexOptions,
    screen: Screen,
) -> None:
    """Write the embeddings of texts to an index, block by block; a signal keeps the blocks that are done."""
    from common.search import display
    from common.search.builder import Builder, check_decimal_commas, fill, read_vectors, settings_of
    from common.search.encoder import chunk_size
    from common.search.index import open_store

    settings, started, builder = settings_of(encoder, **options), time.perf_counter(), None
    if settings["chunk_overlap"] is not None:
        chunk_size(encoder, settings["chunk_overlap"])  # refuses one that is too large
    cli.exit_at_signals()
    try:
        with open_store(args.index, settings=settings, wait=args.wait) as store:
            check_settings(args.index, settings, store.snapshot.settings)
            if store.snapshot.num_rows and settings["model"] != store.snapshot.settings["model"]:
                store.record_model(settings["model"])  # the same one, which has moved
            if args.decimal == ",":
                check_decimal_commas(collection, store.snapshot)
            given = None
            if args.vectors:
                given = read_vectors(
                    args.vectors, collection, encoder, skip_bad=args.skip_bad, say=screen.say
                )
            builder = Builder(store, encoder, update=args.update, given=given, skip_bad=args.skip_bad)
            fill(builder, collection, block=args.block)
            if args.prune:
                builder.remove_unseen()
            display.show_build(screen, builder, collection, seconds=time.perf_counter() - started)
    except SystemExit as stopped:
        done = builder.counts.committed if builder else 0
        message = f"stopped; {done:,} texts of this run are in {args.index}; the same command continues"
        raise Interrupted(message, int(stopped.code or 0)) from None


def sync(args: argparse.Namespace, screen: Screen) -> None:
    """Bring an index to the state of its source: new rows come, changed ones are replaced, and rows
    that are gone from the source are deleted.
    """
    index(args, screen)


# delete, compact, verify: an index over its life --------------------------------------------------


def delete(args: argparse.Namespace, screen: Screen) -> None:
    """Delete rows of an index, by their ids or by a condition."""
    import numpy as np

    from common.search import display
    from common.search.index import open_store, rows_with_ids, whole_documents
    from common.search.selection import matching

    unknown: list[str] = []
    with open_store(args.index, wait=args.wait) as store:
        if args.where:
            matched = np.flatnonzero(matching(store.snapshot, args.where, limits_of(args)))
            rows = whole_documents(store.snapshot, matched)
        else:
            rows, unknown = rows_with_ids(store.snapshot, args.ids)
        checks.check_known(args, unknown)
        if len(rows):
            store.commit(None, rows)
        display.show_deletion(screen, store.snapshot, deleted=len(rows), unknown=len(unknown))


def compact(args: argparse.Namespace, screen: Screen) -> None:
    """Free the space of deleted rows and merge small files."""
    from common.search import display
    from common.search.index import open_store

    with open_store(args.index, wait=args.wait) as store:
        store.compact()
        display.show_index(screen, store.snapshot)


def verify(args: argparse.Namespace, screen: Screen) -> None:
    """Read an index whole, and compare each of its files with its SHA-256."""
    from common.search import display
    from common.search import index as indexes

    display.show_index(screen, indexes.verify(args.index), verified=True)


# list, show: what an index holds ------------------------------------------------------------------


def list_texts(args: argparse.Namespace, screen: Screen) -> None:
    """List the texts of an index with their columns, in the order of its rows."""
    from common.search import display
    from common.search.index import open_snapshot
    from common.search.selection import select

    snapshot = open_snapshot(args.index)
    selection = select(snapshot, args.where, limits=limits_of(args), least=0)
    display.show_list(screen, selection, offset=args.offset, count=args.top_k)


def show(args: argparse.Namespace, screen: Screen) -> None:
    """Show whole texts of an index by their ids, with their columns."""
    from common.search import display
    from common.search.index import known_rows, open_snapshot

    snapshot = open_snapshot(args.index)
    rows = [known_rows(snapshot, key) for key in args.ids]
    display.show_texts(screen, snapshot, rows, vector=args.vector)


# export: an index -> files of other programs ------------------------------------------------------


def export(args: argparse.Namespace, screen: Screen) -> None:
    """Write rows and vectors for other programs: Parquet, NumPy or FAISS."""
    import numpy as np

    from common.search import display
    from common.search.index import open_snapshot
    from common.search.selection import matching

    snapshot = open_snapshot(args.index)
    rows = np.flatnonzero(matching(snapshot, args.where, limits_of(args)))
    if not len(rows):
        raise UserError(f"--index {args.index}: no rows to export; widen --where or index texts")
    display.write_export(screen, snapshot.parts(rows), len(rows), args.to)


# search, like, serve: queries or liked texts -> hits, in a terminal or a browser ------------------


def search(args: argparse.Namespace, screen: Screen) -> None:
    """Find the texts that are nearest to queries, in an index or among a few texts without one;
    without a query, ask for them.
    """
    from common.search import display
    from common.search.encoder import load_reranker
    from common.search.ranker import Ranker
    from common.search.searcher import HitRange, Searcher

    runtime = start(args)
    queries = flags.Queries(*runtime.broadcast_from_main(lambda: read_queries(args)))
    source = read_source(args)
    kept = flags.kept_of(args, source)
    opened = open_rows(source, args, runtime, screen, least=0, role="document")
    with opened as (selection, encoder):
        encoder = encoder or index_encoder(args, runtime, selection.snapshot)
        ranker = Ranker(
            selection.snapshot,
            selection.mask,
            approximate=args.approximate,
            hybrid=args.hybrid,
            words=Words(args.language),
            say=screen.say,
        )
        reranker = load_reranker(args.rerank, runtime, cache_dir=args.cache_dir)
        searcher = Searcher(ranker, encoder, reranker=reranker, rerank_depth=args.rerank_depth)
        hit_range = HitRange(args.top_k, args.offset, args.min_score)
        display.search_and_show(screen, searcher, queries, hit_range, kept=kept)


def like(args: argparse.Namespace, screen: Screen) -> None:
    """Recommend texts that are similar to one or several, and unlike others; needs no model."""
    from common.search import display
    from common.search.index import known_rows, open_snapshot
    from common.search.ranker import Ranker
    from common.search.searcher import HitRange, Searcher, liked_vector
    from common.search.selection import select

    snapshot = open_snapshot(args.index)
    liked = [known_rows(snapshot, key) for key in args.ids]
    unliked = [known_rows(snapshot, key) for key in args.unlike]
    selection = select(snapshot, args.where, limits=limits_of(args), least=0)
    allowed = selection.mask
    for rows in [*liked, *unliked]:
        allowed[rows] = False
    hit_range = HitRange(args.top_k, args.offset, args.min_score)
    vector = liked_vector(snapshot, liked, unliked)
    hits = Searcher(Ranker(snapshot, allowed)).nearest(vector, hit_range.depth)
    unlike = f", unlike {', '.join(args.unlike)}" if args.unlike else ""
    title = f"like {', '.join(args.ids)}{unlike}"
    options = {"kept": flags.kept_of(args, args.index), "heading": ""}
    display.show_hits(screen, snapshot, [title], [hits], hit_range, **options)


def serve(args: argparse.Namespace, screen: Screen) -> None:
    """Open a local page over an index: search, conditions, similar texts, a map of clusters; the
    same answers as JSON. It runs until a signal comes.
    """
    from common import local_server

    listener = local_server.bind(args.port)  # before the libraries are loaded
    from common.search import page
    from common.search.encoder import load_reranker
    from common.search.index import open_snapshot
    from common.search.ranker import Ranker
    from common.search.searcher import Searcher
    from common.search.selection import select

    runtime = start(args)
    selection = select(open_snapshot(args.index), args.where, limits=limits_of(args))
    snapshot, words = selection.snapshot, Words(args.language)
    ranker = Ranker(snapshot, selection.mask, approximate=args.approximate, words=words)
    encoder = index_encoder(args, runtime, snapshot)
    reranker = load_reranker(args.rerank, runtime, cache_dir=args.cache_dir)
    searcher = Searcher(ranker, encoder, reranker=reranker, rerank_depth=args.rerank_depth)
    page.serve(page.ServedIndex(searcher, limits=limits_of(args), seed=args.seed), listener, screen)


# pairs, duplicates, cluster: similar texts without a query ----------------------------------------


def pairs(args: argparse.Namespace, screen: Screen) -> None:
    """Find the most similar pairs."""
    from common.search import display, mining

    runtime, source = start(args), read_source(args)
    kept = flags.kept_of(args, source)
    with open_rows(source, args, runtime, screen, least=2) as (selection, _):
        best = mining.best_pairs(selection, args.top_k, block=args.block)
        display.show_pairs(screen, selection, best, kept)


def duplicates(args: argparse.Namespace, screen: Screen) -> None:
    """Find groups of texts that are nearly the same."""
    from common.search import display, mining

    runtime = start(args)
    with open_rows(read_source(args), args, runtime, screen, least=2) as (selection, _):
        similar = mining.similar_pairs(selection, args.threshold, block=args.block)
        with display.open_pairs(args.pairs_file if runtime.is_main else None) as writer:
            groups, kept = display.collect_groups(selection, similar, writer, keep=screen.as_json)
        display.show_groups(screen, selection, groups, kept, threshold=args.threshold)


def dedupe(args: argparse.Namespace, screen: Screen) -> None:
    """Write the texts without those that are nearly the same as another: one of each group stays."""
    from common.search import display, mining

    runtime, source = start(args), read_source(args)
    with open_rows(source, args, runtime, screen) as (selection, _):
        if selection.documents is not None:
            problem = "it holds chunks, not whole texts"
            raise UserError(f"dedupe --index {args.index}: {problem}; name the texts themselves")
        groups = mining.Groups(len(selection))
        for left, right, _ in mining.similar_pairs(selection, args.threshold, block=args.block):
            groups.join(left, right)
        with runtime.raised_on_all():  # the other processes wait for the first, which writes
            if runtime.is_main:
                kept = mining.one_of_each(selection, groups, args.keep)
                path, text, order = args.output, args.text_column, ()
                if not isinstance(source, str):
                    text, order = source.text_column or text, source.rows.column_names
                count = display.write_rows(selection, kept, path, text_column=text, order=order)
                options = {"count": count, "threshold": args.threshold}
                display.show_dedupe(screen, selection, groups, path, **options)


def cluster(args: argparse.Namespace, screen: Screen) -> None:
    """Find clusters, the texts nearest to each centre and the words typical of it."""
    from common.search import mining

    runtime = start(args)
    stop = None if args.stop_words is None else stop_words(args.stop_words)
    with open_rows(read_source(args), args, runtime, screen, least=2) as (selection, _):
        if args.column:  # again: the index may have changed meanwhile
            checks.check_column(args, selection.snapshot.manifest)
        labels = None
        if args.threshold is not None:  # it alone looks at all pairs, which the processes share
            options = {"min_size": args.min_size or 2, "block": args.block}
            labels = mining.communities(selection, args.threshold, **options)
        with runtime.raised_on_all():  # the others wait for the first, which does the rest
            if runtime.is_main:
                labels = labels_of(selection, args, screen) if labels is None else labels
                show_clusters(selection, labels, args, screen, stop)


def show_clusters(
    selection: Selection,
    labels: np.ndarray,
    args: argparse.Namespace,
    screen: Screen,
    stop: frozenset[str] | None,
) -> None:
    """Show clusters with the words that mark them, none of them in `stop`; write what flags name."""
    from common.search import display, mining

    if args.assign:
        labels = mining.assigned(selection, labels, block=args.block)
    words = mining.typical_words(selection, labels, display.NUM_WORDS, stop)
    wanted = args.num_clusters or 0
    if wanted != flags.BY_SILHOUETTE and len(words) < wanted:
        reason = f"the {selection.unit} have no more different embeddings"
        screen.say(f"only {len(words)} clusters, not {wanted}: {reason}")
    display.show_clusters(screen, selection, labels, words)
    if args.output:
        display.write_clusters(selection, labels, args.output, screen)
    if args.column:
        keep_clusters(selection, labels, args)
        screen.say(f"column   {args.column}: the numbers, in {args.index}")
    if args.figure:
        from common import figures

        positions, points = mining.map_points(selection, seed=args.seed)
        names = [f"{number}: {', '.join(own[:3])}" for number, own in enumerate(words, start=1)]
        figure = figures.cluster_map(points, labels[positions], names)
        display.save_figure(figure, args.figure, screen)


def labels_of(selection: Selection, args: argparse.Namespace, screen: Screen) -> np.ndarray:
    """Return the number of the cluster (n) of each row, -1 for none, by HDBSCAN or k-means."""
    from common.search import mining

    wanted, options = args.num_clusters, {"block": args.block, "seed": args.seed}
    if args.hdbscan:
        return mining.density_clusters(selection, min_size=args.min_size or 5)
    if wanted == flags.BY_SILHOUETTE:
        labels, silhouettes = mining.choose_clusters(selection, **options)
        shown = ", ".join(f"{count}: {value:.3f}" for count, value in silhouettes.items())
        shown = shown or "none: the embeddings are alike"
        screen.say(f"silhouette by the number of clusters: {shown}")
        return labels
    if wanted > len(selection):
        problem = f"there are {len(selection)} {selection.unit}"
        raise UserError(f"--num-clusters {wanted}: {problem}; use fewer clusters")
    return mining.k_means(selection, wanted, **options)


def keep_clusters(selection: Selection, labels: np.ndarray, args: argparse.Namespace) -> None:
    """Write the numbers of clusters, from 1, to the index as a column; rows that were not looked at
    keep theirs, and those in no cluster have none.
    """
    from common.search.index import open_store

    with open_store(args.index, wait=args.wait) as store:
        if store.snapshot.sha256 != selection.snapshot.sha256:
            raise UserError(f"--index {args.index}: it has changed meanwhile; run the command again")
        store.set_column(args.column, selection.rows, labels + 1)  # 0: in no cluster


# evaluate, compare-models: how good a search or a model is ----------------------------------------


def evaluate(args: argparse.Namespace, screen: Screen) -> None:
    """Score an index (nDCG, MRR, MAP, precision, recall), sentence pairs (Spearman) or the bundled
    task, with intervals and tests of what differs.
    """
    from common.search import display, model_scores, relevance
    from common.search.encoder import load_encoder, load_reranker
    from common.search.index import rows_with_ids
    from common.search.ranker import Ranker
    from common.search.searcher import Searcher

    runtime = start(args)
    if args.sts:
        encoder = load_encoder(encoder_config(args), runtime)
        scores = relevance.sts_score(
            encoder, args.sts, args.sts_columns, options=reading_options(args), block=args.block
        )
        display.show_sts(screen, args.sts, scores)
        return
    task, source = read_task(args)
    reranker = load_reranker(args.rerank, runtime, cache_dir=args.cache_dir)
    with open_source(source, args, runtime, screen) as (snapshot, encoder):
        encoder = encoder or index_encoder(args, runtime, snapshot)
        relevance.check_documents(task, lambda ids: rows_with_ids(snapshot, ids)[1], screen.say)
        ranker = Ranker(snapshot, snapshot.is_live(), words=Words(args.language), say=screen.say)
        searcher = Searcher(ranker, encoder, reranker=reranker, rerank_depth=args.rerank_depth)
        measures = relevance.measures_at(args.at)
        values = relevance.score_all(searcher, task, measures, ways=["approximate", "hybrid"])
        stores = relevance.score_stores(searcher, task, measures, stores=args.store)
        with runtime.raised_on_all():  # the other processes have helped to search, and wait
            if runtime.is_main:
                searches = model_scores.of_searches(list(task.judgements), values)
                display.show_scores(screen, task, searches, stores)
                if args.per_query:
                    display.write_query_scores(searches, args.per_query, screen)


def compare_models(args: argparse.Namespace, screen: Screen) -> None:
    """Evaluate several models: quality, texts/s, bytes per embedding; test what differs."""
    from common.search import display, model_scores
    from common.search.encoder import load_encoder

    runtime = start(args)
    given = None if args.sts else read_task(args)  # mistakes in it before any model is loaded
    configs = [dataclasses.replace(encoder_config(args), model=name) for name in args.models]
    fingerprints = []
    for config in configs:  # all before the first is scored: a missing one is reported at once
        fingerprints.append(task_fingerprint(load_encoder(config, runtime), args))
    path = None if args.per_query is None else Path(args.per_query)
    kept = {} if path is None else model_scores.read_scores(path)
    done = []
    with contextlib.nullcontext() if path is None else only_writer(path, flag="--per-query"):
        try:
            for config, fingerprint in zip(configs, fingerprints):
                if fingerprint in kept:
                    screen.say(f"model    {config.model}: its scores are in {path}")
                else:
                    encoder = load_encoder(config, runtime)
                    model = score_model(encoder, fingerprint, args, screen, given)
                    kept[fingerprint] = model
                    scores = [f"{name} {value:.3f}" for name, value in model.scores().items()]
                    screen.say(f"model    {config.model}: {', '.join(scores)}")
                    if path is not None:
                        model_scores.write_scores(path, list(kept.values()))
                done.append(kept[fingerprint])
        finally:  # shows those that are finished, whatever stops the others
            if done:
                display.show_models(screen, done)


def score_model(
    encoder: Encoder,
    fingerprint: str,
    args: argparse.Namespace,
    screen: Screen,
    given: tuple[Task, Collection | str] | None,
) -> ModelScores:
    """Return the scores of a model on the task of the flags: the one that is `given`, or --sts."""
    import numpy as np

    from common.search import relevance
    from common.search.builder import build_temporary
    from common.search.index import rows_with_ids
    from common.search.model_scores import COSINE, HUMAN, ModelScores
    from common.search.ranker import Ranker
    from common.search.searcher import Searcher

    own = (encoder.name, fingerprint, encoder.width)
    if given is None:
        cosines, human = relevance.sts_cosines(
            encoder, args.sts, args.sts_columns, options=reading_options(args), block=args.block
        )
        rows = [str(row) for row in range(1, len(human) + 1)]
        return ModelScores(*own, None, rows, {COSINE: cosines, HUMAN: human})
    task, source = given
    assert not isinstance(source, str)  # compare-models has no --index
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        snapshot = build_temporary(source, encoder, folder, block=args.block, say=screen.say)
        speed = snapshot.num_rows / (time.perf_counter() - started)  # texts a second
        relevance.check_documents(task, lambda ids: rows_with_ids(snapshot, ids)[1], screen.say)
        searcher = Searcher(Ranker(snapshot, snapshot.is_live(), say=screen.say), encoder)
        values = relevance.query_scores(task.judgements, relevance.find(searcher, task))
    arrays = {name: np.array(of_queries) for name, of_queries in values.items()}
    return ModelScores(*own, speed, list(task.judgements), arrays)


# project: an index for TensorBoard ----------------------------------------------------------------


def project(args: argparse.Namespace, screen: Screen) -> None:
    """Write an index for TensorBoard's projector."""
    from common.search import display
    from common.search.index import open_snapshot
    from common.search.selection import select

    selection = select(open_snapshot(args.index), args.where, limits=limits_of(args))
    display.write_projection(screen, selection, args.output_dir, most=args.max_points)


class Command(NamedTuple):
    """A subcommand: what it does, its flags, and what is wrong with them."""

    run: Callable[[argparse.Namespace, Screen], None]
    add_flags: Callable[[cli.Parser], None]
    check: Callable[[argparse.Namespace], None]


COMMANDS = {
    "similarity": Command(similarity, flags.add_similarity_flags, checks.check_similarity),
    "index": Command(index, flags.add_index_flags, checks.check_index_command),
    "sync": Command(sync, flags.add_sync_flags, checks.check_index_command),
    "list": Command(list_texts, flags.add_list_flags, checks.check_existing),
    "show": Command(show, flags.add_show_flags, checks.check_show),
    "delete": Command(delete, flags.add_delete_flags, checks.check_delete),
    "compact": Command(compact, flags.add_compact_flags, checks.check_existing),
    "verify": Command(verify, flags.add_verify_flags, checks.check_existing),
    "export": Command(export, flags.add_export_flags, checks.check_existing),
    "search": Command(search, flags.add_search_flags, checks.check_search),
    "like": Command(like, flags.add_like_flags, checks.check_like),
    "serve": Command(serve, flags.add_serve_flags, checks.check_serve),
    "pairs": Command(pairs, flags.add_pairs_flags, checks.check_source),
    "duplicates": Command(duplicates, flags.add_duplicates_flags, checks.check_source),
    "dedupe": Command(dedupe, flags.add_dedupe_flags, checks.check_source),
    "cluster": Command(cluster, flags.add_cluster_flags, checks.check_cluster),
    "evaluate": Command(evaluate, flags.add_evaluate_flags, checks.check_evaluate),
    "compare-models": Command(compare_models, flags.add_compare_flags, checks.check_compare),
    "project": Command(project, flags.add_project_flags, checks.check_project),
}


def make_parser() -> cli.Parser:
    """Return the parser of the whole command line; a command's docstring is its help."""
    parser = cli.Parser(prog="embed_search.py", description=__doc__, check=complete_and_check)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog=parser.prog)
    for name, (run, add_flags, _) in COMMANDS.items():
        text = inspect.getdoc(run)
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        command.set_defaults(index=None, rerank=None)  # for commands that lack these flags
        command.set_defaults(default_of=command.get_default)  # tells what a flag is where it is not given
        add_flags(command)
    return parser


def complete_and_check(args: argparse.Namespace) -> None:
    """Finish the parsing, then raise UserError for what flags and file system show to be wrong."""
    if args.command == "search":
        flags.split_names(args)
    if checks.is_milvus(args):
        checks.check_milvus(args)
    else:
        COMMANDS[args.command].check(args)
    if args.rerank:
        sources.check_model(args.rerank, kind="cross-encoder", flag="--rerank")
    checks.check_unused(args)
    checks.check_processes(args)


def main(args: argparse.Namespace) -> None:
    screen, computes = Screen(as_json=args.json), "device" in args
    if computes:
        cli.loading()  # until start()
    if checks.is_milvus(args):  # beyond one machine the same commands are those of another store
        from common.search import milvus

        milvus.COMMANDS[args.command](args, screen)
    else:
        COMMANDS[args.command].run(args, screen)
    if computes:
        from common.runtime import stop_runtime

        stop_runtime()


if __name__ == "__main__":
    cli.run(make_parser(), main)
