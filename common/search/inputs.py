"""What the flags of embed_search.py name: an encoder, texts, the rows of an index, a task to
score.
"""

import contextlib
import tempfile
import time

import numpy as np

from common.errors import UserError
from common.search import builder as building
from common.search import display as views
from common.search import encoder as encoding
from common.search import loading, mining, texts
from common.search import relevance as evaluation
from common.search.filters import matching
from common.search.index import open_snapshot

DEFAULT_MODEL = "bundled/all-MiniLM-L6-v2"
LARGEST_MATRIX = 5_000  # texts whose matrix of similarities is shown or written


def load_encoder(args, runtime, settings: dict | None = None) -> encoding.Encoder:
    """Return the encoder that the flags ask for, by default that of an index with `settings`;
    refuses another one than the index's.
    """
    settings = settings or {}
    encoder = encoding.load(
        args.model or settings.get("model", DEFAULT_MODEL),
        runtime,
        max_length=args.max_length or settings.get("max_length"),
        batch_tokens=args.batch_tokens,
        cache_dir=args.cache_dir,
    )
    if settings:
        building.check_settings(args.index, encoder.identity(), settings)
    return encoder


def read_texts(args, id_column: str | None = None) -> texts.Collection:
    """Return the collection that the flags name."""
    return texts.read(
        args.texts,
        text_column=args.text_column,
        id_column=id_column,
        skip_bad=args.skip_bad,
        cache_dir=args.cache_dir,
    )


@contextlib.contextmanager
def source(args, runtime, screen):
    """Give the live rows to look at, of the index or of an index made of the texts for this
    command, and a function that returns their encoder.
    """
    if bool(args.texts) == bool(args.index):
        raise UserError(
            f"{args.command}: name either texts or --index, not {'both' if args.texts else 'neither'}"
        )
    with tempfile.TemporaryDirectory() as folder:
        if args.index:
            snapshot = open_snapshot(args.index)
            rows = chosen_rows(snapshot, args)
            check_size(args, len(rows))
            yield mining.Live(snapshot, rows), lambda: load_encoder(args, runtime, snapshot.settings)
        else:
            collection = read_texts(args)
            check_size(args, len(collection))
            encoder = load_encoder(args, runtime)
            snapshot = building.temporary(
                collection, encoder, folder, block=args.block, role=None
            ).store.snapshot
            views.say_counts(screen, collection, encoder)
            yield mining.Live(snapshot, chosen_rows(snapshot, args)), lambda: encoder


def chosen_rows(snapshot, args) -> np.ndarray:
    """Return the live rows for which --where holds. Raises UserError when there are fewer than the
    command needs.
    """
    rows = np.flatnonzero(matching(snapshot, args.where))
    needed = 2 if args.command in ("pairs", "duplicates", "cluster") else 1
    if len(rows) < needed:
        way_out = (
            "widen --where"
            if args.where
            else "name more texts"
            if needed == 2
            else "add some with: embed_search.py index"
        )
        raise UserError(
            f"{args.index or args.texts}: {len(rows)} texts, and {args.command} needs"
            f" {'two' if needed == 2 else 'one'}; {way_out}"
        )
    return rows


def load_reranker(args, runtime):
    """Return the cross-encoder that the flags name, None without one."""
    return (
        loading.load_reranker(args.rerank, cache_dir=args.cache_dir, device=runtime.device)
        if args.rerank
        else None
    )


def check_size(args, count: int):
    """Raise UserError when a matrix of similarities would be too large."""
    if args.command == "similarity" and count > LARGEST_MATRIX:
        raise UserError(
            f"similarity: {count:,} texts, and the matrix is made for {LARGEST_MATRIX:,} at most; use pairs,"
            " or index and search"
        )


def read_task(args) -> tuple[evaluation.Task, texts.Collection | None]:
    """Return the task that the flags name and its documents, None where an index has them."""
    index = getattr(args, "index", None)
    if bool(args.queries) != bool(args.qrels):
        raise UserError("--queries and --qrels: each needs the other")
    if not args.queries and (args.texts or index):
        raise UserError(
            f"{'--texts' if args.texts else '--index'} {args.texts or index}: say with --queries and --qrels"
            " what is to be found there; the bundled task, which is scored without them, has texts of"
            " its own"
        )
    if not args.queries:
        return evaluation.bundled_task("bundled/bbc-news")
    if bool(args.texts) == bool(index):
        raise UserError("--queries and --qrels: name the documents with --texts or --index")
    return evaluation.read_task(args.queries, args.qrels), (
        read_texts(args, args.id_column) if args.texts else None
    )


@contextlib.contextmanager
def retrieval_task(args, runtime, screen, encoder=None):
    """Give the task that the flags name, a snapshot to search, its encoder, and the seconds that
    encoding took.
    """
    task, collection = read_task(args)
    with tempfile.TemporaryDirectory() as folder:
        if collection is None:
            snapshot, seconds = open_snapshot(args.index), None
        else:
            encoder, started = encoder or load_encoder(args, runtime), time.perf_counter()
            id_column = args.id_column if args.texts else evaluation.BUNDLED_IDS
            snapshot = building.temporary(
                collection, encoder, folder, block=args.block, id_column=id_column
            ).store.snapshot
            seconds = time.perf_counter() - started
            views.say_counts(screen, collection, encoder)
        evaluation.check_documents(task, snapshot, screen.say)
        yield task, snapshot, encoder or load_encoder(args, runtime, snapshot.settings), seconds
