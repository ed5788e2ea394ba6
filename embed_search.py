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
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common import cli, sources
from common.errors import Interrupted, UserError, first_repeated
from common.files import check_new, only_writer
from common.search.manifest import (
    MANIFEST,
    MILVUS,
    STORES,
    Settings,
    check_files,
    check_folder,
    check_settings,
    num_live_rows,
    read_manifest,
    store_of,
)
from common.search.search_flags import (
    DEFAULT_OVERLAP,
    EXPORTS,
    SKIP_BAD,
    add_model_flags,
    add_rerank_flags,
    add_source_flags,
    add_task_flags,
    add_text_flags,
    add_where_flags,
    check_index,
    check_known,
    check_milvus,
    check_model,
    check_processes,
    check_queries,
    check_source,
    check_task,
    check_texts,
    cosine,
    count_or_auto,
    encoder_config,
    export_file,
    index_name,
    is_milvus,
    limits_of,
    new_csv,
    overlap_of,
    pairs_file,
    per_query_file,
    picture_file,
    rank_of_cut,
    read_queries,
    read_texts,
    recorded_model,
    rows_file,
    start,
    vectors_file,
)
from common.search.words import AUTO, LANGUAGES, Words, stop_words

# Each command imports its libraries itself, after the flags are checked: PyTorch takes seconds.
if TYPE_CHECKING:
    import numpy as np

    from common.runtime import Runtime
    from common.search.display import Screen
    from common.search.encoder import Encoder
    from common.search.model_scores import ModelScores
    from common.search.relevance import Task
    from common.search.selection import Selection
    from common.search.texts import Collection

LARGEST_MATRIX = 5_000  # texts whose matrix of similarities is shown or written
WAIT = {"type": cli.duration, "default": 10.0, "help": "seconds to wait for another writer"}
LANGUAGE = {"choices": list(LANGUAGES), "default": AUTO, "metavar": "CODE"}
LANGUAGE["help"] = f"whose words --hybrid counts: {', '.join(LANGUAGES)}"
APPROXIMATE = {"action": "store_true", "help": "find candidates by FAISS codes, kept with the index"}
OFFSET = {"type": cli.non_negative_int, "default": 0, "help": "leave out so many of the first"}


# what is compared or searched: rows of an index, or of one that is made for this command


@contextlib.contextmanager
def open_rows(
    args: argparse.Namespace,
    runtime: Runtime,
    screen: Screen,
    *,
    encodes: bool = False,
    least: int = 1,
    most: int | None = None,
    role: str | None = None,
) -> Iterator[tuple[Selection, Encoder | None]]:
    """Yield the rows where --where holds, of an index or of texts, and their encoder, which an index
    needs only where the command `encodes`. `role`: how texts without an index are encoded.

    Raises UserError when there are fewer than `least` or more than `most` rows.
    """
    from common.search.selection import select, shared

    with tempfile.TemporaryDirectory() as folder:
        if args.index:
            from common.search.index import open_snapshot

            snapshot, encoder, name, added = open_snapshot(args.index), None, None, None
        else:
            from common.search.builder import build_temporary
            from common.search.encoder import load_encoder

            collection = read_texts(args)
            check_size(len(collection), most)
            encoder, name = load_encoder(encoder_config(args), runtime), collection.name
            options = {"block": args.block, "say": screen.say, "role": role}
            snapshot = build_temporary(collection, encoder, folder, **options)
            added = snapshot.settings["id_column"]
        selection = select(snapshot, args.where, limits=limits_of(args), least=least, name=name)
        check_size(len(selection), most)
        if encoder is None and encodes:
            from common.search.encoder import load_index_encoder

            encoder = load_index_encoder(encoder_config(args), runtime, args.index, snapshot.settings)
        yield dataclasses.replace(shared(selection, runtime), added=added), encoder


def check_size(count: int, most: int | None) -> None:
    """Raise UserError when a matrix of similarities would be too large."""
    if most is not None and count > most:
        advice = "use pairs, or index and search"
        problem = f"{count:,} texts, but the matrix holds {most:,} at most"
        raise UserError(f"similarity: {problem}; {advice}")


# similarity: the cosine of every text with every other


def add_similarity_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    flag = command.add_argument
    flag("--query", action="append", default=[], help="a text to compare with all; may be repeated")
    flag("--top-k", type=cli.positive_int, default=3, help="the most similar pairs to show")
    flag("--figure", metavar="PNG", type=picture_file, help="write the matrix as a picture")
    flag("--output", metavar="NPY", type=vectors_file, help="write the embeddings at norm 1 for NumPy")


def check_similarity(args: argparse.Namespace) -> None:
    for number, query in enumerate(args.query, start=1):
        sources.check_query(query, f"--query {number}")
    check_source(args, encodes=bool(args.query))


def similarity(args: argparse.Namespace) -> None:
    """Compare all texts with each other, and with queries, by cosine."""
    import numpy as np

    from common.search import display, mining

    runtime, screen = start(args)
    opened = open_rows(args, runtime, screen, encodes=bool(args.query), most=LARGEST_MATRIX)
    with opened as (selection, encoder):
        vectors = selection.vectors(slice(None)).astype(np.float64)
        matrix = vectors @ vectors.T  # (N, N)
        best = mining.best_pairs(selection, args.top_k, block=args.block)
        queries = []
        if args.query:
            assert encoder is not None
            # encoded like the texts, so that the same text has the cosine 1
            role = "document" if args.index else None
            embeddings = encoder.encode_unit(args.query, role=role).astype(np.float64)
            queries = list(zip(args.query, embeddings @ vectors.T))
        display.show_similarity(screen, selection, matrix, best, queries)
        if args.output:
            display.save_vectors(vectors.astype(np.float32), args.output, screen)
        if args.figure:
            from common import figures

            figure = figures.similarity_map(matrix, display.ids_of(selection))
            display.save_figure(figure, args.figure, screen)


# index: texts -> embeddings on disk, block by block


def add_index_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("texts", nargs="+", help="texts to put into the index: files, patterns, folders, -")
    where = f"the folder of the index, or {MILVUS}URI/COLLECTION"
    flag("--index", metavar="DIR", type=index_name, required=True, help=where)
    flag("--id-column", help="the column of ids (default: the index's, else a hash of the text)")
    flag("--update", action="store_true", help="replace rows whose text or columns changed")
    flag("--chunk", action="store_true", help="split texts that the model can't read whole")
    overlap = f"tokens that neighbouring chunks share (default: {DEFAULT_OVERLAP})"
    flag("--chunk-overlap", type=cli.non_negative_int, help=overlap)
    kept = "how vectors are kept; searches are exact over these (default: the index's, else fp32)"
    flag("--store", choices=list(STORES), help=kept)
    flag("--wait", **WAIT)
    given = "embeddings made elsewhere with --model, one for each row of TEXTS; nothing is encoded"
    flag("--vectors", metavar="NPY", type=cli.name, help=given)
    add_text_flags(command)


def add_sync_flags(command: cli.Parser) -> None:
    add_index_flags(command)
    command.set_defaults(update=True)  # --update is implied


def check_index_command(args: argparse.Namespace) -> None:
    folder, model = Path(args.index), args.model
    check_folder(folder, new=True)
    if args.vectors:
        check_vectors(args.vectors)
        if overlap_of(args) is not None:
            raise UserError(f"--vectors {args.vectors}: they are of whole texts; leave --chunk out")
    if (folder / MANIFEST).is_file():
        settings = read_manifest(folder)["settings"]
        wanted = {"id_column": args.id_column, "max_length": args.max_length}
        wanted["chunk_overlap"] = overlap_of(args)
        wanted |= {"width": args.dimensions, "document_prompt": args.document_prompt}
        if args.store and args.store != store_of(settings):
            wanted["store"] = args.store
        given = {name: value for name, value in wanted.items() if value is not None}
        check_settings(args.index, given, settings)
        model = model or recorded_model(args.index, settings)
    check_texts(args)
    check_model(model)


def check_vectors(path: str) -> None:
    """Raise UserError unless a file begins as NumPy's do."""
    try:
        with open(path, "rb") as file:
            begins = file.read(6)
    except OSError as error:
        raise UserError(f"--vectors {path}: can't be read: {error.strerror}; check it") from error
    if begins != b"\x93NUMPY":
        raise UserError(f"--vectors {path}: not a .npy file; write one with numpy.save")


def index(args: argparse.Namespace) -> None:
    """Build an index, or bring it up to date."""
    from common.search.builder import settings_of
    from common.search.encoder import load_encoder, load_index_encoder

    runtime, screen = start(args)
    config = encoder_config(args)
    id_column, overlap, existing, text_columns = args.id_column, overlap_of(args), None, ()
    if (Path(args.index) / MANIFEST).is_file():  # what no flag names stays as the index was made
        manifest = read_manifest(Path(args.index))
        existing = manifest["settings"]
        # where a column holds texts, digits are texts too
        text_columns = [name for name, kind in manifest["columns"].items() if kind == "string"]
        id_column = id_column or existing["id_column"]
        if overlap is None:
            overlap = existing["chunk_overlap"]

    @functools.cache
    def read() -> Collection:
        return read_texts(args, id_column, as_text=text_columns)

    if runtime.world_size == 1:  # mistakes in the texts are reported before the model is loaded
        read()
    if existing:
        encoder = load_index_encoder(config, runtime, args.index, existing)
    else:
        encoder = load_encoder(config, runtime)
    # under torchrun every process encodes, but only the main one reads the texts and writes
    if not runtime.is_main:
        encoder.follow()
        return
    kept = args.store or (store_of(existing) if existing else None)
    settings = settings_of(encoder, id_column=id_column, chunk_overlap=overlap, store=kept)
    build(read, encoder, settings, args, screen)


def build(
    read: Callable[[], Collection],
    encoder: Encoder,
    settings: Settings,
    args: argparse.Namespace,
    screen: Screen,
) -> None:
    """Write the texts of a collection to the index, and let the other processes go."""
    from common.search import display
    from common.search.builder import Builder, fill, read_vectors
    from common.search.encoder import chunk_size
    from common.search.index import open_store

    folder, started, builder = Path(args.index), time.perf_counter(), None
    cli.exit_at_signals()
    try:
        collection = read()
        if settings["chunk_overlap"] is not None:
            chunk_size(encoder, settings["chunk_overlap"])  # refuses one that is too large
        with open_store(folder, settings=settings, wait=args.wait) as store:
            check_settings(args.index, settings, store.snapshot.settings)
            if store.snapshot.num_rows and settings["model"] != store.snapshot.settings["model"]:
                store.record_model(settings["model"])  # the same one, which has moved
            options, given = {"skip_bad": args.skip_bad}, None
            if args.vectors:
                given = read_vectors(args.vectors, collection, encoder, **options, say=screen.say)
            builder = Builder(store, encoder, update=args.update, given=given, **options)
            fill(builder, collection, block=args.block)
            if args.command == "sync":
                builder.remove_unseen()
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


def sync(args: argparse.Namespace) -> None:
    """Bring an index to the state of its source: new rows come, changed ones are replaced, and rows
    that are gone from the source are deleted.
    """
    index(args)


# delete, compact, verify: an index over its life


def add_delete_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("ids", nargs="*", help="the ids of the texts to delete")
    flag("--index", metavar="DIR", type=cli.name, required=True, help="the index to delete from")
    add_where_flags(command, "delete every row for which this holds")
    flag("--wait", **WAIT)
    flag("--skip-bad", **SKIP_BAD)


def check_delete(args: argparse.Namespace) -> None:
    if bool(args.ids) == bool(args.where):
        raise UserError("delete: name either ids or --where")
    for number, key in enumerate(args.ids, start=1):
        sources.check_query(key, f"id {number}")
    check_existing(args)


def delete(args: argparse.Namespace) -> None:
    """Delete rows of an index, by their ids or by a condition."""
    import numpy as np

    from common.search import display
    from common.search.index import open_store, rows_with_ids, whole_documents
    from common.search.selection import matching

    screen = display.Screen(as_json=args.json)
    unknown: list[str] = []
    with open_store(args.index, wait=args.wait) as store:
        if args.where:
            matched = np.flatnonzero(matching(store.snapshot, args.where, limits_of(args)))
            rows = whole_documents(store.snapshot, matched)
        else:
            rows, unknown = rows_with_ids(store.snapshot, args.ids)
        check_known(args, unknown)
        if len(rows):
            store.commit(None, rows)
        display.show_deletion(screen, store.snapshot, deleted=len(rows), unknown=len(unknown))


def add_compact_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("--index", metavar="DIR", type=cli.name, required=True, help="the index to compact")
    flag("--wait", **WAIT)


def check_existing(args: argparse.Namespace) -> None:
    check_folder(Path(args.index), new=False)


def compact(args: argparse.Namespace) -> None:
    """Free the space of deleted rows and merge small files."""
    from common.search import display
    from common.search.index import open_store

    with open_store(args.index, wait=args.wait) as store:
        store.compact()
        display.show_index(display.Screen(as_json=args.json), store.snapshot)


def add_verify_flags(command: cli.Parser) -> None:
    command.add_argument("--index", metavar="DIR", type=cli.name, required=True, help="the index to verify")


def verify(args: argparse.Namespace) -> None:
    """Read an index whole, and compare each of its files with its SHA-256."""
    from common.search import display
    from common.search import index as indexes

    display.show_index(display.Screen(as_json=args.json), indexes.verify(args.index), verified=True)


# list, show: what an index holds


def add_list_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("--index", metavar="DIR", type=cli.name, required=True, help="the index to list")
    flag("--top-k", type=cli.positive_int, default=20, help="the most texts to show")
    flag("--offset", **OFFSET)
    add_where_flags(command)


def list_texts(args: argparse.Namespace) -> None:
    """List the texts of an index with their columns, in the order of its rows."""
    from common.search import display
    from common.search.index import open_snapshot
    from common.search.selection import select

    snapshot = open_snapshot(args.index)
    selection = select(snapshot, args.where, limits=limits_of(args), least=0)
    screen = display.Screen(as_json=args.json)
    display.show_list(screen, selection, offset=args.offset, count=args.top_k)


def add_show_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("ids", nargs="+", metavar="ID", help="the ids of the texts to show")
    flag("--index", metavar="DIR", type=cli.name, required=True, help="the index that has them")
    numbers = "also show the embedding: its first ten numbers, with --json all"
    flag("--vector", action="store_true", help=numbers)


def check_show(args: argparse.Namespace) -> None:
    for number, key in enumerate(args.ids, start=1):
        sources.check_query(key, f"id {number}")
    check_existing(args)


def show(args: argparse.Namespace) -> None:
    """Show whole texts of an index by their ids, with their columns."""
    from common.search import display
    from common.search.index import known_rows, open_snapshot

    snapshot = open_snapshot(args.index)
    rows = [known_rows(snapshot, key) for key in args.ids]
    display.show_texts(display.Screen(as_json=args.json), snapshot, rows, vector=args.vector)


# export: an index -> files of other programs


def add_export_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("--index", metavar="DIR", type=cli.name, required=True, help="the index to export")
    to = f"a new file of rows and vectors: {', '.join(EXPORTS)}; may be repeated"
    flag("--to", metavar="FILE", type=export_file, action="append", required=True, help=to)
    add_where_flags(command)


def export(args: argparse.Namespace) -> None:
    """Write rows and vectors for other programs: Parquet, NumPy or FAISS."""
    import numpy as np

    from common.search import display
    from common.search.index import open_snapshot
    from common.search.selection import matching

    screen, snapshot = display.Screen(as_json=args.json), open_snapshot(args.index)
    rows = np.flatnonzero(matching(snapshot, args.where, limits_of(args)))
    if not len(rows):
        raise UserError(f"--index {args.index}: no rows to export; widen --where or index texts")
    display.write_export(screen, snapshot.parts(rows), len(rows), args.to)


# search, like, serve: queries or liked texts -> hits, in a terminal or a browser


def add_search_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    what = "a text to search for in --index (none: a prompt); without --index, texts to search"
    flag("names", nargs="*", metavar="QUERY|TEXTS", help=what)
    flag("--index", metavar="DIR", type=cli.name, help="where to search; a few texts need none")
    flag("--query", action="append", default=[], help="a text to search for; may be repeated")
    lines = "one query per line, - for standard input"
    flag("--queries", dest="queries_file", metavar="FILE", type=cli.name, help=lines)
    add_hit_flags(command)
    flag("--hybrid", action="store_true", help="fuse cosine and BM25 by reciprocal rank")
    flag("--language", **LANGUAGE)
    flag("--approximate", **APPROXIMATE)
    add_where_flags(command)
    add_rerank_flags(command)
    add_text_flags(command)


def add_hit_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("--top-k", type=cli.positive_int, default=5, help="texts to find")
    flag("--offset", **OFFSET)
    flag("--min-score", type=cli.finite_float, metavar="N", help="leave out what has a lower score")


def check_search(args: argparse.Namespace) -> None:
    check_queries(args)
    if not args.index and not args.texts:
        raise UserError("search: name an index with --index, or the texts to search and a --query")
    if args.language != AUTO and not args.hybrid:
        raise UserError(f"--language {args.language}: only --hybrid looks at words; give it too")
    check_source(args, encodes=True)
    if args.index:
        check_has_rows(args.index)
    if args.rerank:
        check_model(args.rerank, flag="--rerank")


def check_has_rows(index: str) -> None:
    if not num_live_rows(read_manifest(Path(index))):
        command = f"embed_search.py index TEXTS --index {index}"
        raise UserError(f"--index {index}: it has no rows; add some with: {command}")


def search(args: argparse.Namespace) -> None:
    """Find the texts that are nearest to queries, in an index or among a few texts without one;
    without a query, ask for them.
    """
    from common.search import display
    from common.search.encoder import load_reranker
    from common.search.searcher import Page, Searcher

    runtime, screen = start(args)
    queries = args.queries
    if args.queries_file:
        read = functools.partial(read_queries, args.queries_file, args.encoding)
        queries = runtime.broadcast_from_main(read)
    opened = open_rows(args, runtime, screen, encodes=True, least=0, role="document")
    with opened as (selection, encoder):
        assert encoder is not None
        searcher = Searcher(
            selection.snapshot,
            encoder,
            selection.mask,
            approximate=args.approximate,
            hybrid=args.hybrid,
            words=Words(args.language),
            reranker=load_reranker(args.rerank, runtime, cache_dir=args.cache_dir),
            rerank_depth=args.rerank_depth,
            say=screen.say,
        )
        page = Page(args.top_k, args.offset, args.min_score)
        if not queries:
            display.answer_prompt(screen, searcher, page)
            return
        num_cut = encoder.num_cut  # of the texts, which are told already
        hits = searcher.search(queries, page.depth)
        display.show_hits(screen, searcher.snapshot, queries, hits, page)
        display.say_cut_queries(screen, encoder, encoder.num_cut - num_cut)


def add_like_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("ids", nargs="+", metavar="ID", help="the ids of the texts that are liked")
    flag("--unlike", nargs="+", default=[], metavar="ID", help="the ids of texts that are disliked")
    flag("--index", metavar="DIR", type=cli.name, required=True, help="the index that has them")
    add_hit_flags(command)
    add_where_flags(command)


def check_like(args: argparse.Namespace) -> None:
    for number, key in enumerate([*args.ids, *args.unlike], start=1):
        sources.check_query(key, f"id {number}")
    both = next((key for key in args.ids if key in args.unlike), None)
    if both is not None:
        raise UserError(f"--unlike {both}: it is liked too; name it once")
    check_existing(args)


def like(args: argparse.Namespace) -> None:
    """Recommend texts that are similar to one or several, and unlike others; needs no model."""
    from common.search import display
    from common.search.index import known_rows, open_snapshot
    from common.search.searcher import Page, Searcher, liked_vector
    from common.search.selection import select

    snapshot = open_snapshot(args.index)
    liked = [known_rows(snapshot, key) for key in args.ids]
    unliked = [known_rows(snapshot, key) for key in args.unlike]
    selection = select(snapshot, args.where, limits=limits_of(args), least=0)
    allowed = selection.mask
    for rows in [*liked, *unliked]:
        allowed[rows] = False
    page = Page(args.top_k, args.offset, args.min_score)
    vector = liked_vector(snapshot, liked, unliked)
    hits = Searcher(snapshot, None, allowed).nearest(vector, page.depth)
    unlike = f", unlike {', '.join(args.unlike)}" if args.unlike else ""
    title = f"like {', '.join(args.ids)}{unlike}"
    screen = display.Screen(as_json=args.json)
    display.show_hits(screen, snapshot, [title], [hits], page, heading="")


def add_serve_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("--index", metavar="DIR", type=cli.name, required=True, help="what is searched")
    flag("--port", type=cli.port, default=8000, help="of 127.0.0.1; 0: any free one")
    language = f"whose words are marked, and counted by hybrid search: {', '.join(LANGUAGES)}"
    flag("--language", **{**LANGUAGE, "help": language})
    flag("--approximate", **APPROXIMATE)
    add_where_flags(command)
    add_rerank_flags(command)
    add_model_flags(command)


def check_serve(args: argparse.Namespace) -> None:
    check_index(args, encodes=True)
    check_has_rows(args.index)
    if args.rerank:
        check_model(args.rerank, flag="--rerank")


def serve(args: argparse.Namespace) -> None:
    """Open a local page over an index: search, conditions, similar texts, a map of clusters; the
    same answers as JSON. It runs until a signal comes.
    """
    from common import local_server

    listener = local_server.bind(args.port)  # before the libraries are loaded
    from common.search import page
    from common.search.encoder import load_index_encoder, load_reranker
    from common.search.index import open_snapshot
    from common.search.searcher import Searcher
    from common.search.selection import select

    runtime, screen = start(args)
    selection = select(open_snapshot(args.index), args.where, limits=limits_of(args))
    snapshot = selection.snapshot
    searcher = Searcher(
        snapshot,
        load_index_encoder(encoder_config(args), runtime, args.index, snapshot.settings),
        selection.mask,
        approximate=args.approximate,
        words=Words(args.language),
        reranker=load_reranker(args.rerank, runtime, cache_dir=args.cache_dir),
        rerank_depth=args.rerank_depth,
    )

    page.serve(page.ServedIndex(searcher, limits=limits_of(args), seed=args.seed), listener, screen)


# pairs, duplicates, cluster: similar texts without a query


def add_pairs_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    command.add_argument("--top-k", type=cli.positive_int, default=10, help="how many")


def pairs(args: argparse.Namespace) -> None:
    """Find the most similar pairs."""
    from common.search import display, mining

    runtime, screen = start(args)
    with open_rows(args, runtime, screen, least=2) as (selection, _):
        best = mining.best_pairs(selection, args.top_k, block=args.block)
        display.show_pairs(screen, selection, best)


def add_duplicates_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    flag = command.add_argument
    flag("--threshold", type=cosine, default=0.9, help="the lowest cosine of a pair")
    flag("--pairs-file", metavar="CSV", type=pairs_file, help="write every pair once")


def duplicates(args: argparse.Namespace) -> None:
    """Find groups of texts that are nearly the same."""
    from common.search import display, mining

    runtime, screen = start(args)
    with open_rows(args, runtime, screen, least=2) as (selection, _):
        similar = mining.similar_pairs(selection, args.threshold, block=args.block)
        with display.open_output(args.pairs_file if runtime.is_main else None) as file:
            groups, kept = display.collect_groups(selection, similar, file, keep=screen.as_json)
        display.show_groups(screen, selection, groups, kept, threshold=args.threshold)


def add_dedupe_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    flag = command.add_argument
    flag("--threshold", type=cosine, default=0.9, help="the lowest cosine of texts that are the same")
    rules = "which of a group is kept: the first or last row, or the longest text"
    flag("--keep", choices=["first", "last", "longest"], default="first", help=rules)
    kinds = "where what is kept is written: .jsonl, .csv or .parquet"
    flag("--output", metavar="FILE", type=rows_file, required=True, help=kinds)


def dedupe(args: argparse.Namespace) -> None:
    """Write the texts without those that are nearly the same as another: one of each group stays."""
    from common.search import display, mining

    runtime, screen = start(args)
    with open_rows(args, runtime, screen) as (selection, _):
        if selection.documents is not None:
            problem = "it holds chunks, not whole texts"
            raise UserError(f"dedupe --index {args.index}: {problem}; name the texts themselves")
        similar = mining.similar_pairs(selection, args.threshold, block=args.block)
        groups, _ = display.collect_groups(selection, similar, None, keep=False)
        with runtime.raised_on_all():  # the other processes wait for the first, which writes
            if runtime.is_main:
                kept = mining.one_of_each(selection, groups, args.keep)
                path, text = args.output, args.text_column
                count = display.write_rows(selection, kept, path, text_column=text)
                options = {"count": count, "threshold": args.threshold}
                display.show_dedupe(screen, selection, groups, path, **options)


def add_cluster_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    how = command.add_mutually_exclusive_group(required=True)
    numbers = "the clusters of k-means; auto: as many as the silhouette is highest for, up to 20"
    names = ("--num-clusters", "--clusters")
    how.add_argument(*names, type=count_or_auto, metavar="N|auto", help=numbers)
    how.add_argument("--threshold", type=cosine, help="group neighbours of at least this cosine")
    how.add_argument("--hdbscan", action="store_true", help="groups of any shape, by density")
    flag = command.add_argument
    smallest = "drop smaller clusters (default: 2 with --threshold, 5 with --hdbscan)"
    flag("--min-size", type=cli.positive_int, help=smallest)
    flag("--assign", action="store_true", help="put what is in no cluster into the nearest one")
    stop = "words that mark no cluster: a file with one on each line, or a language such as de"
    flag("--stop-words", metavar="FILE|CODE", type=cli.name, help=stop)
    flag("--output", metavar="CSV", type=new_csv, help="write the cluster of each id")
    kept = "keep the numbers in the index, as a column of this name"
    flag("--column", metavar="NAME", type=cli.name, help=kept)
    flag("--wait", **WAIT)
    flag("--figure", metavar="PNG", type=picture_file, help="write a map of the clusters")


def check_cluster(args: argparse.Namespace) -> None:
    if args.min_size and args.num_clusters:
        others = "--threshold and --hdbscan"
        raise UserError(f"--min-size {args.min_size}: it belongs to {others}; leave it out")
    if args.hdbscan and args.min_size == 1:
        raise UserError("--min-size 1: density needs at least two texts; give 2 or more")
    if args.column and not args.index:
        problem = "texts have no place for it"
        raise UserError(f"--column {args.column}: {problem}; name an --index, or --output")
    if args.column and args.column.lower().startswith("_index_"):
        raise UserError(f"--column {args.column}: names like this are our own; choose another")
    if args.stop_words and args.stop_words not in LANGUAGES:
        sources.check_text_file(args.stop_words)
    if args.column:
        kind = read_manifest(Path(args.index))["columns"].get(args.column, "null")
        if kind not in ("null", "int64"):
            problem = f"the index has one of {kind} already"
            raise UserError(f"--column {args.column}: {problem}; choose another name")
    check_source(args)


def cluster(args: argparse.Namespace) -> None:
    """Find clusters, the texts nearest to each centre and the words typical of it."""
    from common.search import mining

    runtime, screen = start(args)
    stop = None if args.stop_words is None else stop_words(args.stop_words)
    with open_rows(args, runtime, screen, least=2) as (selection, _):
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
    if wanted != AUTO and len(words) < wanted:
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
    if wanted == AUTO:
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
        if store.snapshot.stamp != selection.snapshot.stamp:
            raise UserError(f"--index {args.index}: it has changed meanwhile; run the command again")
        store.set_column(args.column, selection.rows, labels + 1)  # 0: in no cluster


# evaluate, compare-models: how good a search or a model is


def add_evaluate_flags(command: cli.Parser) -> None:
    command.add_argument("--index", metavar="DIR", type=cli.name, help="where to search")
    flag = command.add_argument
    others = "score vectors that are kept so as well; may be repeated"
    flag("--store", choices=list(STORES), action="append", default=[], help=others)
    flag("--language", **LANGUAGE)
    cuts = "the ranks at which the measures stop (default: 10, and 1, 10 and 100 for recall)"
    flag("--at", nargs="+", type=rank_of_cut, metavar="K", help=cuts)
    flag("--per-query", metavar="CSV", type=new_csv, help="write the measures of each query")
    add_rerank_flags(command)
    add_task_flags(command)


def check_evaluate(args: argparse.Namespace) -> None:
    of_search = (args.queries, args.qrels, args.texts, args.index, args.rerank, args.at, args.per_query)
    if args.sts and any(of_search):
        others = "--queries, --qrels, --texts, --index, --rerank, --at and --per-query"
        raise UserError(f"--sts {args.sts}: it is a task of its own; leave {others} out")
    check_task(args)
    if args.rerank:
        check_model(args.rerank, flag="--rerank")
    if not args.index:
        check_model(args.model)


def evaluate(args: argparse.Namespace) -> None:
    """Score an index (nDCG, MRR, MAP, precision, recall), sentence pairs (Spearman) or the bundled
    task, with intervals and tests of what differs.
    """
    from common.search import display, model_scores, relevance
    from common.search.encoder import load_encoder, load_reranker
    from common.search.searcher import Searcher

    runtime, screen = start(args)
    if args.sts:
        encoder = load_encoder(encoder_config(args), runtime)
        scores = relevance.sts_score(encoder, args.sts, args.sts_columns, block=args.block)
        display.show_sts(screen, args.sts, scores)
        return
    task, source = read_task(args)
    reranker = load_reranker(args.rerank, runtime, cache_dir=args.cache_dir)
    opened = relevance.open_documents(
        task, source, encoder_config(args), runtime, block=args.block, say=screen.say
    )
    with opened as documents:
        snapshot, allowed = documents.snapshot, documents.snapshot.alive()
        words = Words(args.language)
        options = {"words": words, "rerank_depth": args.rerank_depth, "say": screen.say}
        searcher = Searcher(snapshot, documents.encoder, allowed, **options)
        measures = relevance.measures_at(args.at)
        values = relevance.score_all(searcher, task, reranker=reranker, measures=measures)
        stores = relevance.score_stores(searcher, task, args.store, measures)
        with runtime.raised_on_all():  # the other processes have helped to search, and wait
            if runtime.is_main:
                searches = model_scores.of_searches(list(task.judgements), values)
                differences = model_scores.differences(searches)
                display.show_scores(screen, task, searches, differences, stores)
                if args.per_query:
                    display.write_query_scores(searches, args.per_query, screen)


def read_task(args: argparse.Namespace) -> tuple[Task, Collection | str]:
    """Return what a search is scored on, and its documents: texts, or the name of an index. Without
    files it is the bundled task.
    """
    from common.search import relevance
    from common.search.texts import ANY_ID

    if not args.queries:
        return relevance.bundled_task()
    task = relevance.read_task(args.queries, args.qrels, args.encoding)
    return task, read_texts(args, args.id_column or ANY_ID) if args.texts else args.index


def add_compare_flags(command: cli.Parser) -> None:
    models = "bundled names, local folders or Hub ids; the others are compared with the first"
    command.add_argument("models", nargs="+", metavar="MODEL", help=models)
    kept = "write each query's scores; models that are in the file already are not scored again"
    command.add_argument("--per-query", metavar="CSV", type=per_query_file, help=kept)
    add_task_flags(command)


def check_compare(args: argparse.Namespace) -> None:
    if args.model:
        raise UserError(
            f"--model {args.model}: compare-models takes its models without it; leave --model out"
        )
    if (twice := first_repeated(args.models)) is not None:
        raise UserError(f"MODEL {twice}: it is named twice; name each model once")
    check_task(args)
    for name in args.models:
        check_model(name, flag="MODEL")


def compare_models(args: argparse.Namespace) -> None:
    """Evaluate several models: quality, texts/s, bytes per embedding; test what differs."""
    from common.search import display, model_scores
    from common.search.encoder import load_encoder

    runtime, screen = start(args)
    configs = [dataclasses.replace(encoder_config(args), model=name) for name in args.models]
    fingerprints = []
    for config in configs:  # all before the first is scored: a missing one costs no hours
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
                    model = score_model(encoder, fingerprint, args, runtime, screen)
                    kept[fingerprint] = model
                    scores = [f"{name} {value:.3f}" for name, value in model.scores().items()]
                    screen.say(f"model    {config.model}: {', '.join(scores)}")
                    if path is not None:
                        model_scores.write_scores(path, list(kept.values()))
                done.append(kept[fingerprint])
        finally:  # of those that are finished, whatever stops the others
            if done:
                lines = [model.line() for model in done]
                display.show_models(screen, lines, model_scores.differences(done))


def score_model(
    encoder: Encoder, fingerprint: str, args: argparse.Namespace, runtime: Runtime, screen: Screen
) -> ModelScores:
    """Return what a model comes to on the task of the flags."""
    import numpy as np

    from common.search import relevance
    from common.search.model_scores import COSINE, HUMAN, ModelScores
    from common.search.searcher import Searcher

    own = (encoder.name, fingerprint, encoder.width)
    if args.sts:
        columns = args.sts_columns
        cosines, human = relevance.sts_cosines(encoder, args.sts, columns, block=args.block)
        pairs = [str(row) for row in range(1, len(human) + 1)]
        return ModelScores(*own, None, pairs, {COSINE: cosines, HUMAN: human})
    task, source = read_task(args)
    options = {"block": args.block, "say": screen.say, "encoder": encoder}
    with relevance.open_documents(task, source, encoder_config(args), runtime, **options) as documents:
        snapshot = documents.snapshot
        searcher = Searcher(snapshot, encoder, snapshot.alive(), say=screen.say)
        speed = snapshot.num_rows / documents.seconds if documents.seconds else None
        values = relevance.query_scores(task.judgements, relevance.find(searcher, task))
    arrays = {name: np.array(of_queries) for name, of_queries in values.items()}
    return ModelScores(*own, speed, list(task.judgements), arrays)


def task_fingerprint(encoder: Encoder, args: argparse.Namespace) -> str:
    """Return what tells the scores of a model on a task from all others."""
    from common.search import model_scores

    files = [args.queries, args.qrels, args.sts, args.index, *sources.expanded(args.texts)]
    names = "id_column sts_columns text_column columns delimiter quoting encoding skip_bad"
    settings = {name: getattr(args, name) for name in names.split()}
    return model_scores.fingerprint(encoder.identity(), files, settings)


# project: an index for TensorBoard


def add_project_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("--index", metavar="DIR", type=cli.name, required=True, help="what to show")
    flag("--output-dir", type=cli.folder, required=True, help="the folder for tensorboard --logdir")
    flag("--max-points", type=cli.positive_int, default=10_000, help="the most rows, evenly spaced")
    add_where_flags(command)


def check_project(args: argparse.Namespace) -> None:
    check_files(Path(args.index))
    check_new(args.output_dir)


def project(args: argparse.Namespace) -> None:
    """Write an index for TensorBoard's projector."""
    from common.search import display
    from common.search.index import open_snapshot
    from common.search.selection import select

    screen = display.Screen(as_json=args.json)
    selection = select(open_snapshot(args.index), args.where, limits=limits_of(args))
    display.write_projection(screen, selection, args.output_dir, most=args.max_points)


class Command(NamedTuple):
    """A subcommand: what it does, its flags, and what is wrong with them."""

    run: Callable[[argparse.Namespace], None]
    add_flags: Callable[[cli.Parser], None]
    check: Callable[[argparse.Namespace], None]


COMMANDS = {
    "similarity": Command(similarity, add_similarity_flags, check_similarity),
    "index": Command(index, add_index_flags, check_index_command),
    "sync": Command(sync, add_sync_flags, check_index_command),
    "list": Command(list_texts, add_list_flags, check_existing),
    "show": Command(show, add_show_flags, check_show),
    "delete": Command(delete, add_delete_flags, check_delete),
    "compact": Command(compact, add_compact_flags, check_existing),
    "verify": Command(verify, add_verify_flags, check_existing),
    "export": Command(export, add_export_flags, check_existing),
    "search": Command(search, add_search_flags, check_search),
    "like": Command(like, add_like_flags, check_like),
    "serve": Command(serve, add_serve_flags, check_serve),
    "pairs": Command(pairs, add_pairs_flags, check_source),
    "duplicates": Command(duplicates, add_duplicates_flags, check_source),
    "dedupe": Command(dedupe, add_dedupe_flags, check_source),
    "cluster": Command(cluster, add_cluster_flags, check_cluster),
    "evaluate": Command(evaluate, add_evaluate_flags, check_evaluate),
    "compare-models": Command(compare_models, add_compare_flags, check_compare),
    "project": Command(project, add_project_flags, check_project),
}


def make_parser() -> cli.Parser:
    """Return the parser of the whole command line; a command's docstring is its help."""
    parser = cli.Parser(prog="embed_search.py", description=__doc__, check=check_flags)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, add_flags, _) in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        command.set_defaults(index=None)  # for commands that lack the flag
        add_flags(command)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for what the flags and the file system show to be wrong."""
    if is_milvus(args):
        check_milvus(args)
    else:
        COMMANDS[args.command].check(args)
    check_processes(args)


def main(args: argparse.Namespace) -> None:
    computes = "device" in args
    if computes:
        cli.loading()  # until start()
    if is_milvus(args):  # beyond one machine the same commands are those of another store
        from common.search import milvus

        milvus.COMMANDS[args.command](args)
    else:
        COMMANDS[args.command].run(args)
    if computes:
        from common.runtime import stop_runtime

        stop_runtime()


if __name__ == "__main__":
    cli.run(make_parser(), main)
