"""The flags of embed_search.py: one subcommand after the other."""

import argparse
import os
from pathlib import Path

from common import cli

DEFAULT_OVERLAP = 32
PICTURES = (".png", ".pdf", ".svg", ".jpg")


def cosine(text: str) -> float:
    """Parse a number from -1 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from -1 to 1")
    return value


def output_file(text: str) -> str:
    """Take the path of a file in a folder that is there and can be written."""
    folder = Path(text).absolute().parent
    if Path(text).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f"{text}: no file can be written there; name one in a folder that is there"
        )
    return text


def picture_file(text: str) -> str:
    """Take the path of a picture, by its ending."""
    if Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"{text}: the ending is not one of {', '.join(PICTURES)}; name a .png file"
        )
    return output_file(text)


def add_model_flags(command: cli.Parser):
    """Add the flags of a subcommand that encodes."""
    cli.add_shared_flags(command, model=None)
    command.add_argument(
        "--max-length",
        type=cli.positive_int,
        help="tokens that the model reads of a text (default: the index's, else the model's own)",
    )
    command.add_argument(
        "--batch-tokens", type=cli.positive_int, help="positions a batch (default: by device)"
    )


def add_text_flags(command: cli.Parser):
    """Add the flags of a subcommand that reads texts."""
    add_model_flags(command)
    command.add_argument(
        "--block",
        type=cli.positive_int,
        default=1024,
        help="texts encoded and committed at once; rows compared at once",
    )
    command.add_argument("--text-column", default="text", help="where the texts are in a data file")
    add_skip_bad(command)


def add_skip_bad(command: cli.Parser):
    """Add the flag that goes on where rows or ids can't be used."""
    command.add_argument("--skip-bad", action="store_true", help="pass over what can't be used, and count it")


def add_source(command: cli.Parser):
    """Add what a subcommand reads: texts, or an index and a condition on its rows."""
    command.add_argument("texts", nargs="?", help="texts to look at, or name an index with --index")
    command.add_argument("--index", metavar="DIR", help="an index made before")
    command.add_argument(
        "--where", metavar="SQL", help="only rows for which this holds, such as \"label = 'tech'\""
    )


def add_search_flags(command: cli.Parser):
    """Add the flags of ranking."""
    command.add_argument("--rerank", metavar="MODEL", help="order the best again with a cross-encoder")
    command.add_argument(
        "--rerank-depth", type=cli.positive_int, default=100, help="how many of the best it reads"
    )


def make_parser(description: str) -> cli.Parser:
    """Return the parser of the whole command line."""
    parser = cli.Parser(prog="embed_search.py", description=description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> cli.Parser:
        added = commands.add_parser(name, help=help, description=help)
        added.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
        return added

    similarity = command("similarity", "the cosines of all texts with each other, and with a query")
    add_source(similarity)
    similarity.add_argument(
        "--query", action="append", default=[], help="a text to compare with all; may be repeated"
    )
    similarity.add_argument(
        "--figure", metavar="PNG", type=picture_file, help="write the matrix as a heat map"
    )
    similarity.add_argument(
        "--top-k", type=cli.positive_int, default=3, help="the most similar pairs to show"
    )

    index = command("index", "build an index, or bring it up to date")
    index.add_argument("texts", help="texts to put into the index")
    index.add_argument("--index", metavar="DIR", required=True, help="its folder")
    index.add_argument(
        "--id-column", help="the column that names a row (default: the index's, else a hash of the text)"
    )
    index.add_argument("--update", action="store_true", help="replace rows whose text or columns changed")
    index.add_argument(
        "--chunk",
        action="store_true",
        help="split texts that the model can't read whole into overlapping passages",
    )
    index.add_argument(
        "--chunk-overlap",
        type=cli.non_negative_int,
        help=f"tokens that neighbouring passages share (default: {DEFAULT_OVERLAP})",
    )

    delete = command("delete", "delete rows of an index")
    delete.add_argument("ids", nargs="*", help="the ids of the texts to delete")
    delete.add_argument("--where", metavar="SQL", help="delete every row for which this holds")
    delete.add_argument("--index", metavar="DIR", required=True, help="the index to delete from")
    compact = command("compact", "free the space of deleted rows and join small files")
    compact.add_argument("--index", metavar="DIR", required=True, help="the index to compact")
    for writer in (index, delete, compact):
        writer.add_argument(
            "--wait", type=cli.non_negative_float, default=10.0, help="seconds to wait for another writer"
        )

    search = command(
        "search", "the texts of an index that are nearest to queries; without one it asks for them"
    )
    search.add_argument("queries", nargs="*", metavar="QUERY")
    search.add_argument("--index", metavar="DIR", required=True, help="where to search")
    search.add_argument(
        "--queries", dest="queries_file", metavar="FILE", help="one query a line, - for standard input"
    )
    search.add_argument("--top-k", type=cli.positive_int, default=5, help="texts a query")
    search.add_argument(
        "--where", metavar="SQL", help="only rows for which this holds, such as \"label = 'tech'\""
    )
    search.add_argument("--hybrid", action="store_true", help="fuse cosine and BM25 by reciprocal rank")
    search.add_argument(
        "--approximate",
        action="store_true",
        help="search a FAISS graph, which is built and kept beside the index",
    )
    add_search_flags(search)

    pairs = command("pairs", "the most similar pairs")
    add_source(pairs)
    pairs.add_argument("--top-k", type=cli.positive_int, default=10, help="how many")

    duplicates = command("duplicates", "groups of texts that are nearly the same")
    add_source(duplicates)
    duplicates.add_argument(
        "--threshold", type=cosine, default=0.9, help="pairs with at least this cosine belong together"
    )
    duplicates.add_argument(
        "--pairs-file", metavar="CSV", type=output_file, help="write every pair, each once"
    )

    cluster = command("cluster", "clusters, the texts nearest to each centre and the words that mark it")
    add_source(cluster)
    how = cluster.add_mutually_exclusive_group(required=True)
    how.add_argument("--num-clusters", type=cli.positive_int, help="k-means with this many clusters")
    how.add_argument("--threshold", type=cosine, help="each text with its neighbours of at least this cosine")
    cluster.add_argument(
        "--min-size", type=cli.positive_int, default=2, help="with --threshold: smaller clusters are dropped"
    )
    cluster.add_argument("--figure", metavar="PNG", type=picture_file, help="write a map of the clusters")

    evaluate = command(
        "evaluate",
        "nDCG, MRR and recall of an index, or Spearman's correlation for sentence pairs; else the bundled"
        " task",
    )
    compare = command("compare-models", "evaluate several models: quality, texts/s, bytes a vector")
    compare.add_argument("models", nargs="+", metavar="MODEL", help="bundled names, local folders or Hub ids")
    evaluate.add_argument("--index", metavar="DIR", help="with --queries and --qrels: where to search")
    for added in (evaluate, compare):
        added.add_argument(
            "--texts", metavar="TEXTS", help="with --queries and --qrels: the documents, keyed by --id-column"
        )
        added.add_argument("--id-column", default="id", help="the column of the documents' ids")
        added.add_argument("--queries", metavar="JSONL", help='one {"id": ..., "text": ...} a line')
        added.add_argument(
            "--qrels", metavar="FILE", help="judgements in TREC form: query 0 document relevance"
        )
        added.add_argument("--sts", metavar="FILE", help="a data file of sentence pairs with human scores")
        added.add_argument(
            "--columns",
            nargs=3,
            default=["sentence1", "sentence2", "score"],
            metavar="COLUMN",
            help="its two texts and the score",
        )
    add_search_flags(evaluate)

    project = command("project", "an index in TensorBoard's projector")
    project.add_argument("--index", metavar="DIR", required=True, help="what to show")
    project.add_argument("--where", metavar="SQL", help="only rows for which this holds")
    project.add_argument(
        "--output-dir", type=cli.folder, required=True, help="the folder for tensorboard --logdir"
    )
    project.add_argument(
        "--max-points", type=cli.positive_int, default=10_000, help="at most this many rows, evenly spread"
    )

    add_skip_bad(delete)
    add_model_flags(search)
    for reader in (similarity, index, pairs, duplicates, cluster, evaluate, compare):
        add_text_flags(reader)
    for other in (delete, compact, project):
        other.set_defaults(device="cpu", precision="fp32", seed=0)  # they compute nothing
    return parser
