"""The perplexity of a long text: windows that overlap, so that each token is predicted from a long
stretch before it, and scored once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.generation import decoding
from common.generation.language_model import LanguageModel

DEFAULT_WINDOW = 1024
CHUNK = 256  # positions whose logits are turned into fp32 at once: (256, 50k) are 50 MB


@dataclass(frozen=True)
class Likelihood:
    """The summed negative log-likelihood of a text, natural logarithm, and over how many tokens;
    the text's first token is never scored.
    """

    total: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(mean negative log-likelihood)."""
        return math.exp(self.total / self.num_tokens) if self.total / self.num_tokens < 700 else math.inf


def windows(length: int, *, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, first): a pass over the tokens [begin, end) that scores those from
    `first` on; stride < window.

    Each token but the first of the text is scored exactly once, with at least window - stride
    tokens before it as far as the text has them.
    """
    first, begin = 1, 0
    while first < length:
        end = min(begin + window, length)
        yield begin, end, first
        first, begin = end, begin + stride


@torch.inference_mode()
def likelihood(
    language_model: LanguageModel, ids: list[int], *, window: int, stride: int, progress=iter
) -> Likelihood:
    """Return the likelihood of a text's tokens; `progress` wraps the list of windows."""
    total, tokens = torch.zeros((), dtype=torch.float64), torch.tensor([ids], device=language_model.device)
    for begin, end, first in progress(list(windows(len(ids), window=window, stride=stride))):
        # columns from the one before the first scored token: the logits of the overlap are not
        # needed
        kept = end - first + 1
        options = (
            {"logits_to_keep": kept}
            if "logits_to_keep" in decoding.accepted_inputs(type(language_model.model))
            else {}
        )
        # (kept, V)
        logits = language_model.model(tokens[:, begin:end], use_cache=False, **options).logits[0, -kept:]
        for place in range(first, end, CHUNK):
            targets = tokens[0, place : min(place + CHUNK, end)]
            # those of the position before predict a token
            before = logits[place - first : place - first + len(targets)].float()
            total += torch.nn.functional.cross_entropy(before, targets, reduction="sum").double().cpu()
    return Likelihood(total.item(), len(ids) - 1)
