"""ROUGE of texts against references: reading both, and the lines on the screen."""

import re
import sys

from common import reading
from common.errors import UserError

# what rouge_score makes words of; of a Chinese text it sees nothing
COUNTED = re.compile("[a-z0-9]", re.IGNORECASE)


def read_texts(name: str, column: str, flag: str, args) -> list[str]:
    """Return texts to score or to score against: a data file's column, or the lines of any other
    file. An empty text is one, with score 0.
    """
    return reading.read_texts(name, column=column, cache_dir=args.cache_dir, allow_empty=True, flag=flag)


def read_references(args, num_texts: int) -> list[str]:
    """Return one reference for each of `num_texts` texts. Raises UserError when there are more or
    fewer, and for one without a word that ROUGE counts.
    """
    references = read_texts(args.references, args.reference_column, "--reference-column", args)
    if len(references) != num_texts:
        raise UserError(
            f"--references {args.references}: it has {len(references):,} texts for {num_texts:,} to score;"
            " give one for each"
        )
    for number, text in enumerate(references, start=1):
        if text.strip() and not COUNTED.search(text):
            raise UserError(
                f"--references {args.references}, text {number}: ROUGE counts words of the letters a to z and"
                " of digits, and there are none; compare texts in such letters, or leave --references out"
            )
    return references


def show(texts: list[str], references: list[str]):
    """Print the ROUGE scores of texts, one line each, and say it where texts have no word that
    could count.
    """
    # scikit-learn and evaluate take three seconds to import, which no other mode should wait for
    from common.metrics import Rouge

    unseen = sum(bool(text.strip()) and not COUNTED.search(text) for text in texts)
    if unseen:
        print(
            f"{unseen:,} of {len(texts):,} texts score 0: ROUGE counts words of the letters a to z and of"
            " digits, and they have none",
            file=sys.stderr,
        )
    scores = Rouge(keep_in_memory=True).compute(predictions=texts, references=references)
    print(f"ROUGE, mean F1 over {len(texts):,} texts")
    for name, value in scores.items():
        print(f"{name:<9} {value:.4f}")
