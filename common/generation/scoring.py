"""ROUGE of texts against references: reading both, and the lines on the screen."""

from pathlib import Path

from common import data
from common.errors import UserError


def read_texts(name: str, column: str, args) -> list[str]:
    """Return texts to score or to score against: a data file's column, or the lines of any other file. An empty text is one, with score 0."""
    if Path(name).suffix.lower() not in data.FILE_READERS:
        return data.read_lines(name)
    if not Path(name).is_file():
        raise UserError(f"{name}: no such file; check the path")
    rows = data.read_file(Path(name), cache_dir=args.cache_dir)
    if column not in rows.features or data.kind(rows, column) not in ("string", "large_string"):
        raise UserError(f"{name}: no column {column!r} of texts; there is {', '.join(rows.column_names)}; name the right one with --text-column or "
                        "--reference-column")
    return [text or "" for text in rows[column][:]]


def read_references(args, num_texts: int) -> list[str]:
    """Return one reference for each of `num_texts` texts. Raises UserError when there are more or fewer."""
    references = read_texts(args.references, args.reference_column, args)
    if len(references) != num_texts:
        raise UserError(f"--references {args.references}: it has {len(references):,} texts for {num_texts:,} to score; give one for each")
    return references


def show(texts: list[str], references: list[str]):
    """Print the ROUGE scores of texts, one line each."""
    from common.metrics import Rouge  # scikit-learn and evaluate take three seconds to import, which no other mode should wait for
    scores = Rouge(keep_in_memory=True).compute(predictions=texts, references=references)
    print(f"ROUGE, mean F1 over {len(texts):,} texts")
    for name, value in scores.items():
        print(f"{name:<9} {value:.4f}")
