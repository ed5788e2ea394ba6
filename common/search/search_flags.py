"""The flags of embed_search.py, command by command, and what they become for the other files of
search. What is wrong with them is in search_checks.py.

Importing it is quick: mistakes are reported before PyTorch is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypedDict

from common import cli, sources
from common.columns import KeptColumns, require_column
from common.errors import UserError, listed, outcome
from common.search.manifest import (
    DEFAULT_LIMITS,
    MILVUS,
    PAIR_COLUMNS,
    PER_QUERY_COLUMNS,
    STORES,
    EncoderConfig,
    Limits,
    Settings,
    read_manifest,
    store_of,
)
from common.search.words import AUTO, LANGUAGES

if TYPE_CHECKING:
    from common.runtime import Runtime
    from common.search.encoder import Encoder
    from common.search.relevance import Task
    from common.search.searcher import Hit
    from common.search.texts import Collection
    from common.sources import FileOptions

BY_SILHOUETTE = "auto"  # in the place of a number of clusters
PICTURES = (".png", ".pdf", ".svg", ".jpg")
DEEPEST = 10_000  # rank at which a measure stops
DEFAULT_OVERLAP = 32  # tokens that neighbouring chunks share
EXPORTS = (".parquet", ".npy", ".faiss")


class IndexOptions(TypedDict):
    """Settings of an index that do not come from its encoder."""

    id_column: str | None
    chunk_overlap: int | None
    store: str | None


# The flags of each command ------------------------------------------------------------------------


def add_similarity_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    flag = command.add_argument
    flag("--query", action="append", default=[], help="a text to compare with all; may be repeated")
    flag("--top-k", type=cli.positive_int, default=3, help="the most similar pairs to show")
    flag("--figure", metavar="PNG", type=picture_file, help="write the matrix as a picture")
    flag("--output", metavar="NPY", type=vectors_file, help="write the embeddings at norm 1 for NumPy")


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
    add_wait_flag(command)
    given = "embeddings made elsewhere with --model, one for each row of TEXTS; nothing is encoded"
    flag("--vectors", metavar="NPY", type=cli.path, help=given)
    add_text_flags(command)
    command.set_defaults(prune=False)  # True: rows that are gone from the texts are deleted


def add_sync_flags(command: cli.Parser) -> None:
    add_index_flags(command)
    command.set_defaults(update=True, prune=True)  # --update is implied


def add_delete_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("ids", nargs="*", help="the ids of the texts to delete")
    add_index_flag(command, "the index to delete from")
    add_where_flags(command, "delete every row for which this holds")
    add_wait_flag(command)
    add_skip_flag(command)


def add_compact_flags(command: cli.Parser) -> None:
    add_index_flag(command, "the index to compact")
    add_wait_flag(command)


def add_verify_flags(command: cli.Parser) -> None:
    add_index_flag(command, "the index to verify")


def add_list_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    add_index_flag(command, "the index to list")
    flag("--top-k", type=cli.positive_int, default=20, help="the most texts to show")
    add_offset_flag(command)
    add_where_flags(command)


def add_show_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("ids", nargs="+", metavar="ID", help="the ids of the texts to show")
    add_index_flag(command, "the index that has them")
    numbers = "also show the embedding: its first ten numbers, with --json all"
    flag("--vector", action="store_true", help=numbers)


def add_export_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    add_index_flag(command, "the index to export")
    to = f"a new file of rows and vectors: {', '.join(EXPORTS)}; may be repeated"
    flag("--to", metavar="FILE", type=export_file, action="append", required=True, help=to)
    add_where_flags(command)


def add_search_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    what = "a text to search for in --index (none: a prompt); without --index, texts to search"
    flag("names", nargs="*", metavar="QUERY|TEXTS", help=what)
    add_index_flag(command, "where to search; a few texts need none", required=False)
    add_id_flag(command)
    flag("--query", action="append", default=[], help="a text to search for; may be repeated")
    lines = "one query per line, - for standard input; or a data file with a column of texts"
    flag("--queries", dest="queries_file", metavar="FILE", type=cli.path, help=lines)
    add_hit_flags(command)
    flag("--hybrid", action="store_true", help="fuse cosine and BM25 by reciprocal rank")
    add_language_flag(command, "whose words --hybrid counts")
    add_approximate_flag(command)
    add_where_flags(command)
    add_rerank_flags(command)
    add_text_flags(command)


def add_like_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("ids", nargs="+", metavar="ID", help="the ids of the texts that are liked")
    flag("--unlike", nargs="+", default=[], metavar="ID", help="the ids of texts that are disliked")
    add_index_flag(command, "the index that has them")
    add_hit_flags(command)
    add_where_flags(command)


def add_serve_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    add_index_flag(command, "what is searched")
    flag("--port", type=cli.port, default=8000, help="of 127.0.0.1; 0: any free one")
    add_language_flag(command, "whose words are marked, and counted by hybrid search")
    add_approximate_flag(command)
    add_where_flags(command)
    add_rerank_flags(command)
    add_model_flags(command)


def add_pairs_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    command.add_argument("--top-k", type=cli.positive_int, default=10, help="how many")
    add_kept_flag(command, "each text")


def add_duplicates_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    flag = command.add_argument
    flag("--threshold", type=cosine, default=0.9, help="the lowest cosine of a pair")
    flag("--pairs-file", metavar="CSV", type=pairs_file, help="write every pair once")


def add_dedupe_flags(command: cli.Parser) -> None:
    add_source_flags(command)
    flag = command.add_argument
    joins = "the lowest cosine that joins two texts; chains of such pairs join whole groups"
    flag("--threshold", type=cosine, default=0.9, help=joins)
    rules = "which of a group is kept: the first or last row, or the longest text"
    flag("--keep", choices=["first", "last", "longest"], default="first", help=rules)
    kinds = "where what is kept is written: .jsonl, .csv or .parquet"
    flag("--output", metavar="FILE", type=rows_file, required=True, help=kinds)


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
    flag("--stop-words", metavar="FILE|CODE", type=cli.path, help=stop)
    flag("--output", metavar="CSV", type=new_csv, help="write the cluster of each id")
    kept = "keep the numbers in the index, as a column of this name"
    flag("--column", metavar="NAME", type=cli.name, help=kept)
    add_wait_flag(command)
    flag("--figure", metavar="PNG", type=picture_file, help="write a map of the clusters")


def add_evaluate_flags(command: cli.Parser) -> None:
    add_index_flag(command, "where to search", required=False)
    flag = command.add_argument
    others = "score vectors that are kept so as well; may be repeated"
    flag("--store", choices=list(STORES), action="append", default=[], help=others)
    add_language_flag(command, "whose words --hybrid counts")
    cuts = "the ranks at which the measures stop (default: 10, and 1, 10 and 100 for recall)"
    flag("--at", nargs="+", type=rank_of_cut, metavar="K", help=cuts)
    flag("--per-query", metavar="CSV", type=new_csv, help="write the measures of each query")
    add_rerank_flags(command)
    add_task_flags(command)


def add_compare_flags(command: cli.Parser) -> None:
    models = "bundled names, local folders or Hub ids; the others are compared with the first"
    command.add_argument("models", nargs="+", metavar="MODEL", help=models)
    kept = "write each query's scores; models that are in the file already are not scored again"
    command.add_argument("--per-query", metavar="CSV", type=per_query_file, help=kept)
    add_task_flags(command)


def add_project_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    add_index_flag(command, "what to show")
    flag("--output-dir", type=cli.folder, required=True, help="the folder for tensorboard --logdir")
    flag("--max-points", type=cli.positive_int, default=10_000, help="the most rows, evenly spaced")
    add_where_flags(command)


# Flags that several commands share ----------------------------------------------------------------


def add_index_flag(command: cli.Parser, what: str, *, required: bool = True) -> None:
    command.add_argument("--index", metavar="DIR", type=index_path, required=required, help=what)


def add_id_flag(command: cli.Parser) -> None:
    ids = "the column of ids of TEXTS (default: none, and the numbers of rows are shown)"
    command.add_argument("--id-column", metavar="NAME", type=cli.name, help=ids)


def add_offset_flag(command: cli.Parser) -> None:
    skipped = "leave out this many of the first"
    command.add_argument("--offset", type=cli.non_negative_int, default=0, help=skipped)


def add_wait_flag(command: cli.Parser) -> None:
    seconds = "seconds to wait for another writer"
    command.add_argument("--wait", type=cli.duration, default=10.0, help=seconds)


def add_skip_flag(command: cli.Parser) -> None:
    skipped = "skip rows and ids that can't be used"
    command.add_argument("--skip-bad", action="store_true", help=skipped)


def add_language_flag(command: cli.Parser, what: str) -> None:
    options = {"choices": list(LANGUAGES), "default": AUTO, "metavar": "CODE"}
    command.add_argument("--language", **options, help=f"{what}: {', '.join(LANGUAGES)}")


def add_approximate_flag(command: cli.Parser) -> None:
    codes = "find candidates by FAISS codes, kept with the index"
    command.add_argument("--approximate", action="store_true", help=codes)


def add_hit_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("--top-k", type=cli.positive_int, default=5, help="texts to find")
    add_offset_flag(command)
    flag("--min-score", type=cli.finite_float, metavar="N", help="leave out what has a lower score")
    add_kept_flag(command, "each hit", " (default: in --json alone)")


def add_kept_flag(command: cli.Parser, beside: str, more: str = "") -> None:
    kept = f"columns to show beside {beside}, such as author,date; all: every one{more}"
    command.add_argument("--keep-columns", metavar="NAMES", help=kept)


def add_model_flags(command: cli.Parser) -> None:
    cli.add_shared_flags(command, model=None)
    flag = command.add_argument
    length = "tokens that the model reads of a text (default: the index's, else the model's own)"
    flag("--max-length", type=cli.positive_int, help=length)
    flag("--batch-tokens", type=cli.positive_int, help="positions per batch (default: by device)")
    kept = "the first numbers of each embedding, for a Matryoshka model (default: all)"
    flag("--dimensions", type=cli.positive_int, metavar="N", help=kept)
    before = "put before each {} (default: the index's, else what the model says)"
    flag("--query-prompt", metavar="TEXT", help=before.format("query"))
    flag("--document-prompt", metavar="TEXT", help=before.format("text that is no query"))


def add_text_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    columns = "where the texts are in a data file; title,text joins two columns"
    flag("--text-column", default="text", help=columns)
    cli.add_file_flags(command)
    decimal = "what stands before the decimals of numbers in a CSV file"
    flag("--decimal", choices=[".", ","], default=".", help=decimal)
    block = "texts encoded and committed at once; rows compared at once"
    flag("--block", type=cli.positive_int, default=1024, help=block)
    add_skip_flag(command)
    add_model_flags(command)


def add_source_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("texts", nargs="*", help="texts to look at, or name an index with --index")
    add_id_flag(command)
    add_index_flag(command, "an index made before", required=False)
    add_where_flags(command)
    add_text_flags(command)


def add_where_flags(
    command: cli.Parser, what: str = "only rows where this holds, such as \"label = 'tech'\""
) -> None:
    flag = command.add_argument
    flag("--where", metavar="SQL", type=cli.name, help=what)
    most, seconds = "the most time that --where may take", DEFAULT_LIMITS.seconds
    flag("--where-seconds", type=cli.positive_duration, default=seconds, metavar="N", help=most)
    most, megabytes = "the most memory that --where may take", DEFAULT_LIMITS.megabytes
    flag("--where-megabytes", type=cli.positive_int, default=megabytes, metavar="N", help=most)


def add_task_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    documents = "the documents, with --queries and --qrels"
    flag("--texts", metavar="TEXTS", nargs="+", default=[], type=cli.path, help=documents)
    flag("--id-column", help="the column of the documents' ids (default: id, or else _id)")
    flag("--queries", metavar="JSONL", type=cli.path, help='one {"id": ..., "text": ...} per line')
    qrels = "judgements: query 0 document relevance (TREC), or query document relevance (BEIR)"
    flag("--qrels", metavar="FILE", type=cli.path, help=qrels)
    pairs = "a data file of sentence pairs with human scores"
    flag("--sts", metavar="FILE", type=cli.path, help=pairs)
    columns = ["sentence1", "sentence2", "score"]
    flag("--sts-columns", nargs=3, default=columns, metavar="COLUMN", help="its texts and score")
    add_text_flags(command)


def add_rerank_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    reorders = "reorder the best hits with a cross-encoder"
    flag("--rerank", metavar="MODEL", type=cli.path, help=reorders)
    flag("--rerank-depth", type=cli.positive_int, default=100, help="how many of the best it reads")


# What the text of a flag becomes ------------------------------------------------------------------


def cosine(text: str) -> float:
    """Parse a number from -1 to 1."""
    with contextlib.suppress(ValueError):
        if -1 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from -1 to 1")


def count_or_auto(text: str) -> int | str:
    """Parse a number of clusters, or auto."""
    return text if text == BY_SILHOUETTE else cli.positive_int(text)


def rank_of_cut(text: str) -> int:
    """Parse a rank at which a measure stops."""
    rank = cli.positive_int(text)
    if rank > DEEPEST:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {DEEPEST:,}; name a lower rank")
    return rank


def new_file(*suffixes: str) -> Callable[[str], str]:
    """Return the parser of the path of a new or empty file, whose suffix is one of these."""

    def parse(text: str) -> str:
        text = cli.path(text)
        path = Path(text)
        if path.suffix.lower() not in suffixes:
            reason = f"the suffix is not one of {', '.join(suffixes)}; name such a file"
            raise argparse.ArgumentTypeError(f"{text}: {reason}")
        if path.exists() and not path.is_dir() and not (path.is_file() and path.stat().st_size == 0):
            raise argparse.ArgumentTypeError(f"{text}: it exists; name a new file")
        return output_file(text)

    return parse


def table_file(columns: tuple[str, ...]) -> Callable[[str], str]:
    """Return the parser of the path of a CSV that is new, empty, or begins with these columns."""

    def parse(text: str) -> str:
        text = cli.path(text)
        path = Path(text)
        if path.exists() and not path.is_file() and not path.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: this is a device or a pipe; name a file")
        if path.is_file() and path.stat().st_size:
            with open(path, "rb") as file:
                header = file.readline().rstrip().decode(errors="replace").split(",")
            if tuple(header[: len(columns)]) != columns:
                problem = "it holds something else"
                raise argparse.ArgumentTypeError(f"{text}: {problem}; name a new file")
        return output_file(text)

    return parse


def output_file(text: str) -> str:
    """Parse the path of a file in a folder that exists and can be written to."""
    folder = Path(text).absolute().parent
    if Path(text).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "no file can be written there; name one in a folder that exists"
        raise argparse.ArgumentTypeError(f"{text}: {reason}")
    return text


def index_name(text: str) -> str:
    """Parse the folder of an index that exists or can be made, or the name of a collection."""
    text = index_path(text)
    return text if text.startswith(MILVUS) else cli.folder(text)


def index_path(text: str) -> str:
    """Parse the folder of an index, or the name of a collection."""
    if text.startswith(MILVUS):
        return MILVUS + cli.path(text.removeprefix(MILVUS))
    return cli.path(text)


def export_file(text: str) -> str:
    """Parse the path of a new file, whose suffix is a format of export."""
    text = cli.path(text)
    if Path(text).suffix not in EXPORTS:
        raise argparse.ArgumentTypeError(f"{text}: the suffix is not one of {', '.join(EXPORTS)}")
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: it exists; name a new file")
    return output_file(text)


def picture_file(text: str) -> str:
    """Parse the path of a picture, whose suffix is a format."""
    text = cli.path(text)
    if Path(text).suffix.lower() not in PICTURES:
        reason = f"the suffix is not one of {', '.join(PICTURES)}; name a .png file"
        raise argparse.ArgumentTypeError(f"{text}: {reason}")
    return output_file(text)


new_csv, vectors_file = new_file(".csv"), new_file(".npy")
rows_file = new_file(".jsonl", ".csv", ".parquet")
pairs_file, per_query_file = table_file(PAIR_COLUMNS), table_file(PER_QUERY_COLUMNS)


# What flags become for the other files of search --------------------------------------------------


def split_names(args: argparse.Namespace) -> None:
    """Set `texts` and `queries` of a search: with an index, arguments without a flag are queries; otherwise
    they are the texts to search.
    """
    args.texts, args.queries = ([], args.names) if args.index else (args.names, [])
    args.queries = [*args.queries, *args.query]


def start(args: argparse.Namespace) -> Runtime:
    """Return where a command computes, once its libraries are loaded."""
    from common.runtime import start_runtime

    cli.loaded()
    return start_runtime(args.device, args.precision, args.seed)


def encoder_config(args: argparse.Namespace) -> EncoderConfig:
    return EncoderConfig(
        args.model,
        args.max_length,
        args.batch_tokens,
        args.cache_dir,
        dimensions=args.dimensions,
        query_prompt=args.query_prompt,
        document_prompt=args.document_prompt,
    )


def limits_of(args: argparse.Namespace) -> Limits:
    return Limits(args.where_seconds, args.where_megabytes)


def overlap_of(args: argparse.Namespace) -> int | None:
    """Return how many tokens neighbouring chunks share, None where no flag asks for chunks."""
    return DEFAULT_OVERLAP if args.chunk and args.chunk_overlap is None else args.chunk_overlap


def index_options(args: argparse.Namespace, existing: Settings | None) -> IndexOptions:
    """Return what an index is made with besides its encoder: what no flag names stays as in the
    settings of an existing one.
    """
    id_column, overlap, store = args.id_column, overlap_of(args), args.store
    if existing:
        id_column = id_column or existing["id_column"]
        overlap = existing["chunk_overlap"] if overlap is None else overlap
        store = store or store_of(existing)
    return {"id_column": id_column, "chunk_overlap": overlap, "store": store}


def read_source(args: argparse.Namespace) -> Collection | str:
    """Return what a command looks at: the name of an index, or else texts."""
    return args.index or read_texts(args, args.id_column)


def kept_columns(args: argparse.Namespace, names: Iterable[str], source: str) -> list[str] | None:
    """Return the columns that are shown with a hit, None without the flag. Raises UserError for one that is
    not among the `names` of the source.
    """
    if args.keep_columns is None:
        return None
    return KeptColumns(keep_columns=args.keep_columns).among(names, others=(), source=source)


def kept_of(args: argparse.Namespace, source: Collection | str) -> list[str] | None:
    """Return the same for an index of this name, or for texts."""
    if isinstance(source, str):
        return kept_columns(args, read_manifest(Path(source))["columns"], f"--index {source}")
    from common.search.segments import RESERVED_COLUMNS

    names = [name for name in source.rows.column_names if name not in RESERVED_COLUMNS]
    return kept_columns(args, names, source.name)


class Queries(NamedTuple):
    """The queries of a search. `bad`: the positions of those that can't be searched for, which have no hits;
    `why`: the reason of the first of these.
    """

    texts: list[str]
    bad: list[int]
    why: str

    @property
    def good(self) -> list[str]:
        return [text for position, text in enumerate(self.texts) if position not in self.bad]

    def with_empty(self, hits: list[list[Hit]]) -> list[list[Hit]]:
        """Return the hits of all queries, given those of the good ones; bad ones have none."""
        found = iter(hits)
        return [[] if position in self.bad else next(found) for position in range(len(self.texts))]


def read_queries(args: argparse.Namespace) -> Queries:
    """Return the queries of the command line, of the column of a data file, or the lines of any other
    file. Raises UserError, naming row or line, for one that can't be searched for, unless --skip-bad
    leaves it out.
    """
    if not args.queries_file:
        return Queries(args.queries, [], "")
    from common import plain_files, reading

    name = plain_files.source_name(args.queries_file)
    texts: list[str] = []
    bad: list[int] = []
    why = ""
    with plain_files.open_plain(args.queries_file, encoding=args.encoding, folder=args.cache_dir) as file:
        is_table = has_table_of_queries(args)
        unit = "row" if is_table else "line"
        given = _query_cells(file, name, args) if is_table else reading.raw_lines(file)
        for position, content in enumerate(given):
            text = outcome(_query_of, content, f"{name}, {unit} {position + 1}")
            if isinstance(text, UserError):
                if not args.skip_bad:
                    raise UserError(f"{text}, or skip it with --skip-bad") from text
                bad.append(position)
                why = why or str(text)
                text = content.decode(errors="replace") if isinstance(content, bytes) else content or ""
            texts.append(text)
    if len(bad) == len(texts):
        raise UserError(f"{name}: none of its queries can be used; name another file")
    return Queries(texts, bad, why)


def has_table_of_queries(args: argparse.Namespace) -> bool:
    """Return whether --queries of a search names a data file."""
    name = getattr(args, "queries_file", None)
    return name is not None and sources.suffix(name) in sources.DATA_SUFFIXES


def query_column(args: argparse.Namespace) -> str:
    """Return the column of the queries in a data file: --text-column is that of TEXTS, where there are
    some.
    """
    return "text" if args.texts else args.text_column


def _query_cells(file: BinaryIO, name: str, args: argparse.Namespace) -> Sequence[str | None]:
    from common import reading

    column, options = query_column(args), sources.FileOptions(encoding=args.encoding)
    rows = reading.read_table(file, name, as_text=[column], options=options, cache_dir=args.cache_dir)
    check_query_column(rows.column_names, args)
    reading.check_kind(rows, column, source=name)
    return rows[column][:]


def check_query_column(names: Sequence[str], args: argparse.Namespace) -> None:
    """Raise UserError unless the column of the queries is one of the `names` of their file."""
    column = query_column(args)
    if args.texts and column not in names:
        problem = f"no column {column!r} among {listed(names)}"
        raise UserError(f"{args.queries_file}: {problem}; rename the column of the queries so")
    require_column(names, column, source=args.queries_file, flag="--text-column")


def _query_of(content: bytes | str | None, location: str) -> str:
    from common.plain_files import decode_utf8

    if content is None:
        raise UserError(f"{location}: the text is missing; write something in it")
    text = decode_utf8(content, location) if isinstance(content, bytes) else content
    sources.check_query(text, location)
    return text


def reading_options(args: argparse.Namespace) -> FileOptions:
    """Return how the flags say that data files are written."""
    return dataclasses.replace(cli.file_options(args), decimal=args.decimal)


def read_texts(
    args: argparse.Namespace, id_column: str | None = None, *, as_text: Sequence[str] = ()
) -> Collection:
    """Return the texts that are named, as `texts.read` does."""
    from common.search import texts

    return texts.read(
        sources.expanded(args.texts),
        text_column=args.text_column,
        id_column=id_column,
        as_text=as_text,
        skip_bad=args.skip_bad,
        options=reading_options(args),
        cache_dir=args.cache_dir,
    )


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


def task_fingerprint(encoder: Encoder, args: argparse.Namespace) -> str:
    """Return what tells the scores of a model on a task from all others."""
    from common.search import model_scores

    files = [args.queries, args.qrels, args.sts, args.index, *sources.expanded(args.texts)]
    names = ["id_column", "sts_columns", "text_column", "columns", "delimiter", "quoting", "decimal"]
    names += ["encoding", "skip_bad", "query_prompt"]
    settings = {name: getattr(args, name) for name in names}
    settings["precision"] = encoder.runtime.precision
    return model_scores.fingerprint(encoder.identity(), files, settings)
