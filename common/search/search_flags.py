"""Flags that several commands of embed_search.py share, what they show before the libraries are
loaded, and what they become for the wing.

Importing it is quick: a mistake is said before PyTorch is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import bundled, cli, sources
from common.errors import UserError
from common.search.manifest import (
    DEFAULT_LIMITS,
    MILVUS,
    MILVUS_INSTALL,
    PAIR_COLUMNS,
    PER_QUERY_COLUMNS,
    EncoderConfig,
    Limits,
    Settings,
    check_files,
    check_settings,
    parse_target,
)
from common.search.words import AUTO

if TYPE_CHECKING:
    from common.runtime import Runtime
    from common.search.display import Screen
    from common.search.texts import Collection

PICTURES = (".png", ".pdf", ".svg", ".jpg")
DEEPEST = 10_000  # rank at which a measure stops
DEFAULT_OVERLAP = 32  # tokens that neighbouring chunks share
# what the processes of torchrun do together, and what a collection in Milvus can do
SHARED = ("index", "sync", "search", "pairs", "duplicates", "dedupe", "cluster", "evaluate")
MILVUS_COMMANDS = ("index", "delete", "list", "search", "evaluate", "export")
EXPORTS = (".parquet", ".npy", ".faiss")
SKIP_BAD = {"action": "store_true", "help": "skip rows and ids that can't be used"}


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
    block = "texts encoded and committed at once; rows compared at once"
    flag("--block", type=cli.positive_int, default=1024, help=block)
    flag("--skip-bad", **SKIP_BAD)
    add_model_flags(command)


def add_source_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    flag("texts", nargs="*", help="texts to look at, or name an index with --index")
    flag("--index", metavar="DIR", type=cli.name, help="an index made before")
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
    flag("--texts", metavar="TEXTS", nargs="+", default=[], type=cli.name, help=documents)
    flag("--id-column", help="the column of the documents' ids (default: id, or else _id)")
    flag("--queries", metavar="JSONL", type=cli.name, help='one {"id": ..., "text": ...} per line')
    qrels = "judgements: query 0 document relevance (TREC), or query document relevance (BEIR)"
    flag("--qrels", metavar="FILE", type=cli.name, help=qrels)
    pairs = "a data file of sentence pairs with human scores"
    flag("--sts", metavar="FILE", type=cli.name, help=pairs)
    columns = ["sentence1", "sentence2", "score"]
    flag("--sts-columns", nargs=3, default=columns, metavar="COLUMN", help="its texts and score")
    add_text_flags(command)


def add_rerank_flags(command: cli.Parser) -> None:
    flag = command.add_argument
    reorders = "reorder the best hits with a cross-encoder"
    flag("--rerank", metavar="MODEL", type=cli.name, help=reorders)
    flag("--rerank-depth", type=cli.positive_int, default=100, help="how many of the best it reads")


def cosine(text: str) -> float:
    """Parse a number from -1 to 1."""
    with contextlib.suppress(ValueError):
        if -1 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from -1 to 1")


def count_or_auto(text: str) -> int | str:
    """Parse a number of clusters, or auto."""
    return AUTO if text == AUTO else cli.positive_int(text)


def rank_of_cut(text: str) -> int:
    """Parse a rank at which a measure stops."""
    rank = cli.positive_int(text)
    if rank > DEEPEST:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {DEEPEST:,}; name a lower rank")
    return rank


def new_file(*suffixes: str) -> Callable[[str], str]:
    """Return the parser of the path of a new or empty file, whose suffix is one of these."""

    def parse(text: str) -> str:
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
    return text if text.startswith(MILVUS) else cli.folder(text)


def export_file(text: str) -> str:
    """Parse the path of a new file, whose suffix is a format of export."""
    if Path(text).suffix not in EXPORTS:
        raise argparse.ArgumentTypeError(f"{text}: the suffix is not one of {', '.join(EXPORTS)}")
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: it exists; name a new file")
    return output_file(text)


def picture_file(text: str) -> str:
    """Parse the path of a picture, whose suffix is a format."""
    if Path(text).suffix.lower() not in PICTURES:
        reason = f"the suffix is not one of {', '.join(PICTURES)}; name a .png file"
        raise argparse.ArgumentTypeError(f"{text}: {reason}")
    return output_file(text)


new_csv, vectors_file = new_file(".csv"), new_file(".npy")
rows_file = new_file(".jsonl", ".csv", ".parquet")
pairs_file, per_query_file = table_file(PAIR_COLUMNS), table_file(PER_QUERY_COLUMNS)


# what the flags and the file system show, before the libraries are loaded


def check_source(args: argparse.Namespace, *, encodes: bool = False) -> None:
    """Check the flags of a command that reads texts or an index; `encodes` tells whether it needs a
    model in both cases.
    """
    if bool(args.texts) == bool(args.index):
        raise UserError(f"name either texts or --index, not {'both' if args.texts else 'neither'}")
    if args.index:
        check_index(args, encodes=encodes)
    else:
        check_texts(args)
        check_model(args.model)


def check_index(args: argparse.Namespace, *, encodes: bool) -> None:
    """Check an index, and the model that is named or, where one is needed, recorded."""
    settings = check_files(Path(args.index))["settings"]
    if encodes or args.model:
        check_model(args.model or recorded_model(args.index, settings))
    wanted = {"max_length": args.max_length, "width": args.dimensions}
    wanted["document_prompt"] = args.document_prompt
    given = {name: value for name, value in wanted.items() if value is not None}
    check_settings(args.index, given, settings)


def recorded_model(index: str, settings: Settings) -> str:
    """Return the model that an index names. Raises UserError for a folder that is not there any
    more: the index belongs to the model's fingerprint, wherever its files are.
    """
    model = settings["model"]
    if Path(model).is_absolute() and not Path(model).exists():
        known = f"(its fingerprint begins with {settings['fingerprint'][:12]})"
        problem = f"its model {known} was in {model}, which is not there"
        raise UserError(f"--index {index}: {problem}; name the folder where it is now with --model")
    return model


def check_texts(args: argparse.Namespace) -> None:
    """Check the names of a collection of texts."""
    for name in sources.expanded(args.texts):
        if bundled.is_bundled(name):
            sources.check_data(name, flag="TEXTS")
        elif not Path(name).is_dir():
            sources.check_texts(name, any_suffix=file_options(args).is_table)


def check_model(name: str | None, *, flag: str = "--model") -> None:
    """Check the name of a model, by default that of the bundled one."""
    sources.check_model(name or bundled.MINILM, kind="encoder", flag=flag)


def check_task(args: argparse.Namespace) -> None:
    """Check the flags and files of what a search is scored on."""
    if args.sts:
        if not Path(args.sts).is_file():
            raise UserError(f"--sts {args.sts}: no such file; check the path")
        sources.check_data_file(Path(args.sts))
        if len(set(args.sts_columns)) < len(args.sts_columns):
            columns = " ".join(args.sts_columns)
            problem = "one of them twice"
            raise UserError(f"--sts-columns {columns}: {problem}; name two texts and a score")
        return
    documents = f"--texts {' '.join(args.texts)}" if args.texts else f"--index {args.index}"
    if bool(args.queries) != bool(args.qrels):
        raise UserError("--queries and --qrels: each needs the other")
    if args.queries and bool(args.texts) == bool(args.index):
        raise UserError("--queries and --qrels: name the documents with --texts or --index")
    if not args.queries and (args.texts or args.index):
        reason = "the bundled task, which is scored without them, has its own texts"
        raise UserError(f"{documents}: say what to find with --queries and --qrels; {reason}")
    if args.queries:
        sources.check_text_file(args.queries)
        sources.check_text_file(args.qrels)
    if args.texts:
        check_texts(args)
    if args.index:
        check_index(args, encodes=True)


def check_queries(args: argparse.Namespace) -> None:
    """Check the queries of a search, and set `texts` and `queries` to what the names stand for."""
    # what stands without a flag is searched for in an index, or else what is searched
    args.texts, args.queries = ([], args.names) if args.index else (args.names, [])
    args.queries = [*args.queries, *args.query]
    if args.queries and args.queries_file:
        raise UserError("search: name either queries or --queries FILE")
    for number, query in enumerate(args.queries, start=1):
        sources.check_query(query, f"query {number}")
    if args.queries_file:
        sources.check_text_file(args.queries_file)


def check_known(args: argparse.Namespace, unknown: list[str]) -> None:
    """Raise UserError for ids to delete that are `unknown`, unless --skip-bad leaves them out."""
    if unknown and not args.skip_bad:
        problem = f"no text with id {unknown[0]!r}; nothing is deleted"
        raise UserError(f"--index {args.index}: {problem}; correct it, or give --skip-bad")


def is_milvus(args: argparse.Namespace) -> bool:
    """Return whether --index names a collection in Milvus."""
    return bool(args.index) and args.index.startswith(MILVUS)


def check_milvus(args: argparse.Namespace) -> None:
    """Check the flags of a command over a collection in Milvus."""
    target = parse_target(args.index)
    if args.command not in MILVUS_COMMANDS:
        advice = f"export the rows into an index first; Milvus has {', '.join(MILVUS_COMMANDS)}"
        problem = f"{args.command} needs the vectors on this machine"
        raise UserError(f"--index {args.index}: {problem}; {advice}")
    if importlib.util.find_spec("pymilvus") is None:
        raise UserError(f"--index {args.index}: this needs Milvus' client; run: {MILVUS_INSTALL}")
    if getattr(args, "rerank", None):
        check_model(args.rerank, flag="--rerank")
    refused = {"vectors": None, "store": None, "approximate": False, "language": AUTO}
    for name, usual in refused.items():
        if getattr(args, name, usual) not in (usual, []):
            problem = "the engine keeps vectors, words and its indexes in its own way"
            raise UserError(f"--{name}: Milvus does not take it, because {problem}; leave it out")
    if args.command == "index":
        check_texts(args)
        check_model(args.model)
        if "-" in args.texts and not target.is_file and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("-: each process reads the texts; name a file")
    elif args.command == "delete" and bool(args.ids) == bool(args.where):
        raise UserError("delete: name either ids or --where")
    elif args.command == "search":
        check_queries(args)
    elif args.command == "evaluate" and not (args.queries and args.qrels):
        raise UserError(f"--index {args.index}: say what to find with --queries and --qrels")


def check_processes(args: argparse.Namespace) -> None:
    """Raise UserError for what the processes of torchrun do not do together."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if args.command not in SHARED or (is_milvus(args) and args.command != "index"):
        what = f"{args.command} --index {args.index}" if is_milvus(args) else args.command
        raise UserError(f"torchrun: {what} runs in one process; run it with python")
    if args.command in ("index", "sync"):  # the first process reads the texts
        return
    if args.command == "search" and not (args.queries or args.queries_file):
        problem = "search asks for queries in one process"
        raise UserError(f"torchrun: {problem}; name them, or run it with python")
    files = [args.queries, args.qrels, args.sts] if args.command == "evaluate" else []
    if "-" in (*args.texts, *files):
        problem = "each process reads the texts, and - can be read once"
        raise UserError(f"torchrun: {problem}; name a file")


# from the flags to what the wing needs


def start(args: argparse.Namespace) -> tuple[Runtime, Screen]:
    """Return where a command computes, and where its output goes. Its libraries are loaded now."""
    from common.runtime import start_runtime
    from common.search.display import Screen

    cli.loaded()
    runtime = start_runtime(args.device, args.precision, args.seed)
    return runtime, Screen(as_json=args.json, shown=runtime.is_main)


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


def file_options(args: argparse.Namespace) -> sources.FileOptions:
    return sources.FileOptions(args.columns, args.delimiter, args.quoting, args.encoding)


def limits_of(args: argparse.Namespace) -> Limits:
    return Limits(args.where_seconds, args.where_megabytes)


def overlap_of(args: argparse.Namespace) -> int | None:
    """Return how many tokens neighbouring chunks share, None where no flag asks for chunks."""
    return DEFAULT_OVERLAP if args.chunk and args.chunk_overlap is None else args.chunk_overlap


def read_queries(file: str, encoding: str | None) -> list[str]:
    """Return the lines of a file; raise UserError, naming it, for one that can't be encoded."""
    from common import reading

    queries = reading.read_lines(file, encoding=encoding)
    for number, query in enumerate(queries, start=1):
        sources.check_query(query, f"{file}, line {number}")
    return queries


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
        options=file_options(args),
        cache_dir=args.cache_dir,
    )
