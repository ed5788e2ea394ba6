"""What the flags of embed_search.py, and the files that they name, show to be wrong before the
libraries are loaded.

Importing it is quick: mistakes are reported before PyTorch is loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

from common import bundled, cli, reading, sources
from common.errors import UserError, first_repeated
from common.files import check_new
from common.search.manifest import (
    MANIFEST,
    MILVUS,
    MILVUS_INSTALL,
    Manifest,
    Settings,
    check_files,
    check_folder,
    check_settings,
    num_live_rows,
    parse_target,
    read_manifest,
    store_of,
)
from common.search.search_flags import (
    check_query_column,
    has_table_of_queries,
    kept_of,
    overlap_of,
    query_column,
)
from common.search.words import AUTO, LANGUAGES

# what the processes of torchrun do together, and what a collection in Milvus can do
SHARED = ("index", "sync", "search", "pairs", "duplicates", "dedupe", "cluster", "evaluate")
MILVUS_COMMANDS = ("index", "delete", "list", "search", "evaluate", "export")
OF_FOLDERS = ("sync", "show", "compact", "verify")  # the commands that need no vectors of other rows
# flags that can't be used in some cases: where no TEXTS are read, where sentence pairs are scored, in Milvus
OF_TEXTS = ("id_column", "text_column", "columns", "delimiter", "quoting", "decimal")
OF_DOCUMENTS = ("queries", "qrels", "texts", "index", "id_column", "text_column", "skip_bad", "query_prompt")
OF_SEARCH = ("rerank", "rerank_depth", "at", "store", "language")
NOT_OF_MILVUS = ("vectors", "store", "approximate", "language")


# The flags of each command ------------------------------------------------------------------------


def check_similarity(args: argparse.Namespace) -> None:
    for number, query in enumerate(args.query, start=1):
        sources.check_query(query, f"--query {number}")
    check_source(args, encodes=bool(args.query))


def check_index_command(args: argparse.Namespace) -> None:
    folder, model = Path(args.index), args.model
    check_folder(folder, new=True)
    if args.vectors:
        check_vectors(args.vectors)
        if overlap_of(args) is not None:
            raise UserError(f"--vectors {args.vectors}: they are of whole texts; leave --chunk out")
    if (folder / MANIFEST).is_file():
        settings = read_manifest(folder)["settings"]
        store = None if args.store == store_of(settings) else args.store
        own = {"id_column": args.id_column, "chunk_overlap": overlap_of(args), "store": store}
        check_given(args, settings, **own)
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


def check_delete(args: argparse.Namespace) -> None:
    check_deleted(args)
    check_existing(args)


def check_existing(args: argparse.Namespace) -> None:
    check_folder(Path(args.index), new=False)


def check_show(args: argparse.Namespace) -> None:
    check_ids(args.ids)
    check_existing(args)


def check_search(args: argparse.Namespace) -> None:
    check_queries(args)
    if not args.index and not args.texts:
        raise UserError("search: name an index with --index, or the texts to search and a --query")
    if args.language != AUTO and not args.hybrid:
        raise UserError(f"--language {args.language}: only --hybrid looks at words; give it too")
    check_source(args, encodes=True)
    if args.index:
        check_has_rows(args.index)
        kept_of(args, args.index)


def check_like(args: argparse.Namespace) -> None:
    check_ids([*args.ids, *args.unlike])
    both = next((key for key in args.ids if key in args.unlike), None)
    if both is not None:
        raise UserError(f"--unlike {both}: it is liked too; name it once")
    check_existing(args)
    kept_of(args, args.index)


def check_serve(args: argparse.Namespace) -> None:
    check_index(args, encodes=True)
    check_has_rows(args.index)


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
    check_source(args)
    if args.column:
        check_column(args, read_manifest(Path(args.index)))


def check_column(args: argparse.Namespace, manifest: Manifest) -> None:
    """Raise UserError where the numbers of clusters would replace a column of the texts."""
    for name in manifest["columns"]:
        is_made = name == args.column and name in manifest["clusters"]
        if name.lower() == args.column.lower() and not is_made:  # SQL ignores case
            problem = f"{args.index} has a column {name!r}, and nothing says that cluster made it"
            raise UserError(f"--column {args.column}: {problem}; give another --column")


def check_evaluate(args: argparse.Namespace) -> None:
    check_task(args)
    if not args.index:
        check_model(args.model)


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


def check_project(args: argparse.Namespace) -> None:
    check_files(Path(args.index))
    check_new(args.output_dir)


# What several commands share -----------------------------------------------------------------------


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
    check_given(args, settings)


def check_given(args: argparse.Namespace, settings: Settings, **more: object) -> None:
    """Raise UserError where flags, of some commands `more`, say otherwise than an index was made."""
    own = {"max_length": args.max_length, "width": args.dimensions, "document_prompt": args.document_prompt}
    given = {name: value for name, value in {**own, **more}.items() if value is not None}
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
            options, column = cli.file_options(args), args.text_column
            sources.check_texts(name, any_suffix=options.is_table)
            wanted, several = {}, {column: "--text-column"}
            if getattr(args, "id_column", None):
                wanted[args.id_column] = "--id-column"
            reading.check_columns(name, wanted, several=several, options=options)


def check_model(name: str | None, *, flag: str = "--model") -> None:
    """Check the name of a model, by default that of the bundled one."""
    sources.check_model(name or bundled.MINILM, kind="encoder", flag=flag)


def check_task(args: argparse.Namespace) -> None:
    """Check the flags and files of what a search is scored on."""
    if args.sts:
        others = [*OF_DOCUMENTS, *OF_SEARCH]
        if args.command == "evaluate":  # compare-models keeps the scores of each pair there
            others.append("per_query")
        reason = f"--sts {args.sts} is a task of its own, in which it has no part"
        cli.refuse_unused(args, others, args.default_of, reason)
        if not Path(args.sts).is_file():
            raise UserError(f"--sts {args.sts}: no such file; check the path")
        options = cli.file_options(args)
        sources.check_data_file(Path(args.sts), any_suffix=options.is_table)
        if len(set(args.sts_columns)) < len(args.sts_columns):
            columns = " ".join(args.sts_columns)
            problem = "one of them twice"
            raise UserError(f"--sts-columns {columns}: {problem}; name two texts and a score")
        wanted = dict.fromkeys(args.sts_columns, "--sts-columns")
        reading.check_columns(args.sts, wanted, options=options)
        return
    cli.refuse_unused(
        args, ["sts_columns"], args.default_of, "it names the columns of --sts FILE, which is not there"
    )
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
    if args.index and not is_milvus(args):
        check_index(args, encodes=True)


def check_queries(args: argparse.Namespace) -> None:
    """Check the queries of a search."""
    if args.queries and args.queries_file:
        raise UserError("search: name either queries or --queries FILE")
    for number, query in enumerate(args.queries, start=1):
        sources.check_query(query, f"query {number}")
    if has_table_of_queries(args):
        sources.check_texts(args.queries_file)
        options = sources.FileOptions(encoding=args.encoding)
        if names := reading.names_at_once(args.queries_file, [query_column(args)], options=options):
            check_query_column(names, args)
    elif args.queries_file:
        sources.check_text_file(args.queries_file)


def check_deleted(args: argparse.Namespace) -> None:
    """Check what is to be deleted."""
    if bool(args.ids) == bool(args.where):
        raise UserError("delete: name either ids or --where")
    check_ids(args.ids)


def check_ids(ids: list[str]) -> None:
    """Raise UserError for an id that no text can have."""
    for number, key in enumerate(ids, start=1):
        sources.check_query(key, f"id {number}")


def check_has_rows(index: str) -> None:
    if not num_live_rows(read_manifest(Path(index))):
        command = f"embed_search.py index TEXTS --index {index}"
        raise UserError(f"--index {index}: it has no rows; add some with: {command}")


def check_known(args: argparse.Namespace, unknown: list[str]) -> None:
    """Raise UserError for ids to delete that are `unknown`, unless --skip-bad leaves them out."""
    if unknown and not args.skip_bad:
        problem = f"no text with id {unknown[0]!r}; nothing is deleted"
        raise UserError(f"--index {args.index}: {problem}; correct it, or give --skip-bad")


def check_unused(args: argparse.Namespace) -> None:
    """Raise UserError for a flag that needs another one, or texts, which are not given."""
    if not args.rerank:
        cli.refuse_unused(
            args, ["rerank_depth"], args.default_of, "it belongs to --rerank, which is not there"
        )
    if not getattr(args, "texts", None) and not getattr(args, "sts", None):
        # dedupe writes the texts of an index into a column of this name; queries in a data file have one
        names_column = args.command == "dedupe" or has_table_of_queries(args)
        names = [name for name in OF_TEXTS if not (names_column and name == "text_column")]
        cli.refuse_unused(args, names, args.default_of, "it says how TEXTS are read, and there are none")


# Where a command runs -----------------------------------------------------------------------------


def is_milvus(args: argparse.Namespace) -> bool:
    """Return whether --index names a collection in Milvus."""
    return bool(args.index) and args.index.startswith(MILVUS)


def check_milvus(args: argparse.Namespace) -> None:
    """Check the flags of a command over a collection in Milvus."""
    target = parse_target(args.index)
    if args.command not in MILVUS_COMMANDS:
        advice = f"Milvus has {', '.join(MILVUS_COMMANDS)}"
        problem = f"{args.command} is for indexes in folders"
        if args.command not in OF_FOLDERS:
            problem = f"{args.command} needs the vectors on this machine"
            advice = f"export the rows into an index first; {advice}"
        raise UserError(f"--index {args.index}: {problem}; {advice}")
    if target.is_file and args.command != "index" and not os.path.exists(target.uri):
        # the client would make it
        command = f"embed_search.py index TEXTS --index {args.index}"
        raise UserError(f"--index {args.index}: {target.uri} is not there; make it with: {command}")
    if importlib.util.find_spec("pymilvus") is None:
        raise UserError(f"--index {args.index}: this needs Milvus' client; run: {MILVUS_INSTALL}")
    problem = "the engine keeps vectors, words and its indexes in its own way"
    cli.refuse_unused(args, NOT_OF_MILVUS, args.default_of, f"Milvus does not take it, because {problem}")
    if args.command == "index":
        check_texts(args)
        check_model(args.model)
        if "-" in args.texts and not target.is_file and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("-: each process reads the texts; name a file")
    elif args.command == "delete":
        check_deleted(args)
    elif args.command == "search":
        check_queries(args)
    elif args.command == "evaluate":
        check_task(args)


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
