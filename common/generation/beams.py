"""Beam search: several texts of a prompt grow side by side, and those that are likeliest as a whole
are kept.

`BeamSearch.steps` is the whole algorithm, in the order in which `model.generate` has it, whose
tokens it gives. Shapes: P prompts, N beams of each, V tokens in the vocabulary; the rows of the
batch are the beams of the first prompt, those of the second, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.generation import decoding, sampling
from common.generation.completion import Completion, Run
from common.generation.decoding import Batch
from common.generation.language_model import LanguageModel
from common.generation.sampling import Settings

IMPOSSIBLE = -1e9  # a score below those of all texts


@dataclass(frozen=True)
class Beams:
    """The settings of a beam search."""

    size: int  # N: texts that grow side by side
    # a text's score is the sum of its log-probabilities, divided by its length to this power
    length_penalty: float = 1.0
    # True: it ends when N texts have ended; False: when no running text would beat the worst of them at its
    # present length; "never": at the length that is best for it
    early_stopping: bool | Literal["never"] = False


@dataclass(frozen=True)
class Hypothesis:
    """A text that has ended."""

    score: float
    tokens: list[int]


class BeamSearch:
    """A search for some prompts; after its last step, `finished` holds the N best texts of each, the
    best first.
    """

    def __init__(self, beams: Beams, num_prompts: int) -> None:
        self.beams = beams
        self.finished: list[list[Hypothesis]] = [[] for _ in range(num_prompts)]
        self.is_done = [False] * num_prompts

    @torch.inference_mode()
    def steps(self, model: LanguageModel, batch: Batch, settings: Settings) -> Iterator[None]:
        """Add one token to all beams at each step; `batch` holds each prompt once or N times."""
        size, first = self.beams.size, batch.length
        logits = decoding.prefill(model, batch)  # (P, V) or (P * N, V)
        if len(logits) < len(self.finished) * size:
            logits = _for_each_beam(batch, logits, size)
        filters = sampling.history_filters(
            settings, prompt_length=first, starts=batch.starts, padding_is_text=True
        )
        device = batch.ids.device
        end_ids = torch.tensor(settings.end_ids, dtype=torch.long, device=device)
        # enough candidates for N of them to go on, even if all N beams can end with each end token
        num_candidates = max(2, 1 + len(end_ids)) * size
        scores = torch.full((len(self.finished), size), IMPOSSIBLE, device=device)  # (P, N)
        scores[:, 0] = 0  # the beams of a prompt are still equal: only the first one counts
        offsets = torch.arange(len(scores), device=device)[:, None] * size  # (P, 1)
        for length in range(1, settings.max_new_tokens + 1):
            decoding.fetch_ids(logits.argmax(-1), logits, model)  # refuses what are not numbers
            new = sampling.apply_filters(filters, logits.log_softmax(-1), batch.tokens)
            totals = (new.view(*scores.shape, -1) + scores[..., None]).flatten(1)  # (P, N * V)
            best, places = totals.topk(min(num_candidates, totals.shape[-1]))  # (P, K), best first
            beams, tokens = places // new.shape[-1], places % new.shape[-1]
            ends = torch.isin(tokens, end_ids) | (length == settings.max_new_tokens)
            self._finish(batch, best, beams + offsets, tokens, ends, length=length)
            # the N best that do not end go on, with the cache of the beam that each comes from
            scores, columns = (best + ends * IMPOSSIBLE).topk(size)
            rows = (beams.gather(-1, columns) + offsets).flatten()
            batch.ids = batch.ids[rows]
            batch.cache.reorder_cache(rows)  # pyrefly: ignore[bad-argument-type]  (a LongTensor)
            self._end_hopeless(scores[:, 0].tolist(), length, settings.max_new_tokens)
            yield
            if all(self.is_done) or length == settings.max_new_tokens:
                return
            logits = decoding.step(model, batch, tokens.gather(-1, columns).flatten().tolist())

    def _finish(
        self, batch: Batch, best: Tensor, rows: Tensor, tokens: Tensor, ends: Tensor, *, length: int
    ) -> None:
        """Keep the texts that end among the N best candidates of each prompt: all (P, K)."""
        size, first = self.beams.size, batch.length - (length - 1)
        scores = best / length**self.beams.length_penalty
        for prompt, finished in enumerate(self.finished):
            if self.is_done[prompt]:
                continue
            for rank in ends[prompt, :size].nonzero()[:, 0].tolist():
                ids = batch.ids[rows[prompt, rank], first : batch.length].tolist()
                score, token = scores[prompt, rank].item(), int(tokens[prompt, rank])
                finished.append(Hypothesis(score, [*ids, token]))
            finished.sort(key=lambda hypothesis: -hypothesis.score)
            del finished[size:]

    def _end_hopeless(self, best_scores: list[float], length: int, most: int) -> None:
        """End the prompts whose running texts can't beat those that have ended; `best_scores` (P)
        are the sums of their best running texts.
        """
        beams = self.beams
        at_most = beams.early_stopping == "never" and beams.length_penalty > 0
        for prompt, finished in enumerate(self.finished):
            if len(finished) < beams.size:
                continue
            possible = best_scores[prompt] / (most if at_most else length) ** beams.length_penalty
            is_full = beams.early_stopping is True
            self.is_done[prompt] |= is_full or possible <= finished[-1].score


def _for_each_beam(batch: Batch, logits: Tensor, size: int) -> Tensor:
    """Repeat each row of a batch for N beams; return the logits (P * N, V) that follow them."""
    rows = torch.arange(len(logits)).repeat_interleave(size)
    batch.ids, batch.starts = batch.ids[rows], batch.starts[rows]
    batch.mask = None if batch.mask is None else batch.mask[rows]
    batch.ended = [False] * len(rows)
    batch.cache.reorder_cache(rows)  # pyrefly: ignore[bad-argument-type]  (a LongTensor)
    return logits[rows]


def complete(run: Run, rows: list[Completion], beams: Beams) -> Iterator[str]:
    """Fill completions with the best texts of their prompts; yield nothing to show but the first
    text, at its end: until then, it can be replaced by another one.
    """
    num_samples, settings = run.options.num_samples, run.options.settings
    firsts = rows[::num_samples]  # of each prompt
    # the library's forward reads a prompt once for each beam, as in `generate`: otherwise it rounds
    copies = 1 if run.language_model.model.is_compiled else beams.size
    batch = run.left_pad([row for row in firsts for _ in range(copies)])
    search = BeamSearch(beams, len(firsts))
    run.timing.start(batch)
    for _ in search.steps(run.language_model, batch, settings):
        run.timing.note_token()
        yield ""
    for number, row in enumerate(rows):
        for token in search.finished[number // num_samples][number % num_samples].tokens:
            row.add(token, settings.end_ids)
        row.finish()
    run.timing.end(rows, None)
    yield rows[0].text
