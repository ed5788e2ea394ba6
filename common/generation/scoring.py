"""Two scores of texts: ROUGE against references, and a model's perplexity."""

import math
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from common import reading
from common.errors import UserError
from common.generation import decoding
from common.generation.language_model import LanguageModel, check_tokens
from common.sources import FileOptions

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
COUNTED = re.compile("[a-z0-9]", re.IGNORECASE)  # rouge_score counts words of these characters only

ONE_BYTE = re.compile("<0x[0-9A-F]{2}>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a part of a character is decoded to
SCORED_AT_ONCE = 256  # positions whose logits become fp32 at once: (256, 50k) are 50 MB


# ROUGE --------------------------------------------------------------------------------------------


def rouge(texts: list[str], references: list[str]) -> dict[str, float]:
    """Return the mean F1 over all texts of the overlap with their references (Lin 2004).

    rouge1 counts words, rouge2 pairs of words, rougeL the longest common subsequence; rougeLsum
    takes the subsequence of each line by itself. `evaluate.load("rouge")` reports the same mean,
    but downloads the script that computes it.
    """
    # importing it takes two seconds, which no other mode should wait for
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE_TYPES)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references)]
    f1 = {name: [score[name].fmeasure for score in scores] for name in ROUGE_TYPES}
    return {name: statistics.fmean(values) for name, values in f1.items()}


def read_references(
    name: str, num_texts: int, *, column: str, cache_dir: str | None, options: FileOptions
) -> list[str]:
    """Return one reference for each of `num_texts` texts, from a file or standard input ("-").

    Raises UserError if there are more or fewer, and for one without a word that ROUGE counts.
    """
    references = reading.read_texts(
        name, column=column, cache_dir=cache_dir, flag="--reference-column", options=options
    )
    if len(references) != num_texts:
        raise UserError(
            f"--references {name}: it has {len(references):,} texts for {num_texts:,} to score; "
            "give one for each"
        )
    for number, text in enumerate(references, start=1):
        if not is_counted(text):
            raise UserError(
                f"--references {name}, text {number}: no word that ROUGE counts (letters a to z "
                "and digits); compare texts in such letters, or leave --references out"
            )
    return references


def is_counted(text: str) -> bool:
    """Return whether ROUGE counts any word of a text; an empty text counts too, with score 0."""
    return not text.strip() or COUNTED.search(text) is not None


def show_rouge(texts: list[str], references: list[str]) -> None:
    """Print the ROUGE scores of texts, and how many of them have no word that counts."""
    num_ignored = sum(not is_counted(text) for text in texts)
    if num_ignored:
        reason = "ROUGE counts only words of the letters a to z and digits, and they have none"
        print(f"{num_ignored:,} of {len(texts):,} texts score 0: {reason}", file=sys.stderr)
    print(f"ROUGE, mean F1 over {len(texts):,} texts")
    for name, value in rouge(texts, references).items():
        print(f"{name:<9} {value:.4f}")


# Perplexity ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Likelihood:
    """The summed negative log-likelihood of a text (natural logarithm) over `num_tokens` tokens.

    The first token of a text is not scored, because nothing predicts it; `num_bytes` are the bytes
    of the others.
    """

    total: float
    num_tokens: int
    num_bytes: int = 0

    @property
    def perplexity(self) -> float:
        """exp(mean negative log-likelihood)."""
        mean = self.total / self.num_tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The negative log-likelihood in bits, per byte of text: comparable between tokenizers."""
        return self.total / math.log(2) / self.num_bytes


@dataclass(frozen=True)
class SlidingWindow:
    """A window over a long text: `size` tokens per pass, `stride` tokens from pass to pass."""

    size: int
    stride: int


def choose_window(
    language_model: LanguageModel, size: int | None, stride: int | None, *, most: int
) -> SlidingWindow:
    """Return the window that --window and --stride ask for; None stands for the default, which is
    `most` tokens if they fit.

    Raises UserError if the two do not fit the model or each other.
    """
    context = language_model.context
    if size is None:
        size = min(most, context or most)
    if context is not None and size > context:
        problem = f"{language_model.name} holds {context:,} tokens"
        raise UserError(f"--window {size}: {problem}; use at most {context}")
    if size < 2:
        raise UserError(
            f"--window {size}: each token is predicted from at least one before it; use at least 2"
        )
    if stride is None:
        stride = max(1, size // 2)
    if stride >= size:
        raise UserError(
            f"--stride {stride}: windows of {size} tokens must overlap, because the first token of "
            f"each is not predicted; use at most {size - 1}"
        )
    return SlidingWindow(size, stride)


def passes(length: int, window: SlidingWindow, *, has_start: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first): a pass over tokens [begin, end) that scores those from `first`.

    Each token of the text but the first is scored exactly once, with at least size - stride tokens
    before it, as far as the text has them; with `has_start`, all passes but the first leave room
    for a token before theirs.
    """
    first, begin = 1, 0
    while first < length:
        room = window.size - 1 if has_start and begin > 0 else window.size
        end = min(begin + room, length)
        yield begin, end, first
        first, begin = end, begin + window.stride


def text_likelihood(
    language_model: LanguageModel, text: str, window: SlidingWindow, *, name: str
) -> Likelihood:
    """Return the likelihood of a text. Raises UserError, naming its file, if it is too short."""
    tokenizer = language_model.tokenizer
    ids = tokenizer(text)["input_ids"]
    if len(ids) < 2:
        raise UserError(
            f"--perplexity {name}: {len(ids)} tokens; a text needs two, because the first one is "
            "not predicted"
        )
    check_tokens(ids, language_model, name=f"--perplexity {name}")
    result = likelihood(language_model, ids, window, start=start_token(language_model))
    return replace(result, num_bytes=len(text.encode()) - _bytes_of_first(ids, text, language_model))


def _bytes_of_first(ids: list[int], text: str, language_model: LanguageModel) -> int:
    """Return how many bytes of a text its first token stands for: none if it is a special one."""
    tokenizer = language_model.tokenizer
    first = str(tokenizer.decode(ids[:1], skip_special_tokens=True))
    name = str(tokenizer.convert_ids_to_tokens(ids[0]))
    if REPLACEMENT in first and REPLACEMENT not in name:
        # a part of a character: its name is one byte in hexadecimal, or has a character for each byte
        return 1 if ONE_BYTE.fullmatch(name) else len(name)
    # white space that the tokenizer puts before a text is no part of it
    return len(first.encode()) if text.startswith(first) else 0


def show_perplexity(language_model: LanguageModel, text: str, window: SlidingWindow, *, name: str) -> None:
    """Print the perplexity of a text; it raises as `text_likelihood`."""
    result = text_likelihood(language_model, text, window, name=name)
    passes = f"window {window.size:,}, stride {window.stride:,}"
    print(
        f"perplexity {result.perplexity:.4f} over {result.num_tokens:,} tokens ({passes}); "
        f"{result.bits_per_byte:.4f} bits per byte"
    )


def start_token(language_model: LanguageModel) -> int | None:
    """Return the token that the tokenizer puts before a text, None if it puts none."""
    with_special = language_model.tokenizer("a")["input_ids"]
    without = language_model.tokenizer("a", add_special_tokens=False)["input_ids"]
    return with_special[0] if with_special[:1] != without[:1] else None


@torch.inference_mode()
def likelihood(
    language_model: LanguageModel, ids: list[int], window: SlidingWindow, *, start: int | None = None
) -> Likelihood:
    """Return the likelihood of a text's tokens, computed in overlapping windows, so that each token
    is predicted from a long stretch before it.

    `start` is the first token of every text that the model was trained on: each window begins with it.
    """
    tokens = torch.tensor([ids], device=language_model.device)  # (1, T)
    total = torch.zeros((), dtype=torch.float64)
    all_passes = list(passes(len(ids), window, has_start=start is not None))
    with tqdm(all_passes, unit="window", leave=False, dynamic_ncols=True, disable=None) as bar:
        for begin, end, first in bar:
            # from the column before the first scored token: the overlap's other logits are not needed
            kept = end - first + 1
            before = [start] if start is not None and begin > 0 else []
            batch = decoding.left_pad([before + ids[begin:end]], language_model, room=0)
            logits = language_model.model.forward(batch, first=0, keep=kept)[0]  # (kept, V)
            for place in range(first, end, SCORED_AT_ONCE):
                targets = tokens[0, place : min(place + SCORED_AT_ONCE, end)]
                # each token is predicted by the logits of the position before it
                predicting = logits[place - first : place - first + len(targets)].float()
                loss = torch.nn.functional.cross_entropy(predicting, targets, reduction="sum")
                total += loss.double().cpu()
    return Likelihood(total.item(), len(ids) - 1)
