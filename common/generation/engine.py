"""The thread that generates the texts of requests: those that wait are decoded together, each with its own
sampler, random numbers and end.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.cli import fault_of_system
from common.errors import UserError
from common.generation import decoding, fast_sampling, sampling
from common.generation.completion import Completion, Run, logprobs
from common.generation.decoding import Batch, Step
from common.generation.language_model import LanguageModel
from common.generation.protocol import ApiError
from common.generation.sampling import Sampler, Settings
from common.runtime import free_memory_bytes

Decode = Callable[[LanguageModel, Batch, Sampler, Settings], Iterator[Step]]


@dataclass(frozen=True)
class Limits:
    """What the server takes on at a time."""

    batch_size: int  # texts that are decoded together
    waiting: int  # texts that wait for their turn
    seconds: float  # from a request to the end of its answer
    api_key: str | None = None


@dataclass(frozen=True)
class Piece:
    """What a token adds to a text, and with its last one that it has ended."""

    text: str
    logprobs: list[dict]
    offset: int  # of the token, in characters of the text
    is_last: bool = False


@dataclass
class Job:
    """A text that is being generated for a request, which takes its pieces from a queue."""

    number: int  # among the texts of its request
    row: Completion
    settings: Settings
    seed: int
    num_logprobs: int | None
    tell: Callable[[int, Piece | Exception], None]
    is_wanted: bool = True  # False: the client has left, or waited long enough

    @property
    def num_columns(self) -> int:
        """How many tokens there can be, with the prompt."""
        return len(self.row.prompt.ids) + self.settings.max_new_tokens

    def add(self, step: Step, index: int, language_model: LanguageModel) -> bool:
        """Add the token of a row of a step; return whether the text has ended with it."""
        row, token = self.row, step.tokens[index]
        shown, offset = len(row.text), len(row.text) + len(row.stream.held)
        has_ended = row.add(token, self.settings.end_ids)
        has_ended |= len(row.token_ids) == self.settings.max_new_tokens
        entries = []
        if self.num_logprobs is not None and row.finish_reason != "end":
            own = Step([token], step.logits[index : index + 1])
            entries = logprobs(own, self.num_logprobs, language_model.tokenizer)
        if has_ended:
            row.finish()
        self.tell(self.number, Piece(row.text[shown:], entries, offset, has_ended))
        return has_ended


class Engine:
    """The thread that generates texts, and the jobs that wait for it."""

    def __init__(self, run: Run, decode: Decode, limits: Limits) -> None:
        self.run, self.decode, self.limits = run, decode, limits
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.changed = threading.Condition()
        self.is_closed = False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Let jobs wait for their turn. Raises ApiError if too many wait, or the server stops."""
        with self.changed:
            self.waiting = deque(job for job in self.waiting if job.is_wanted)
            if self.is_closed:
                raise ApiError(503, "the server is stopping", code="stopping")
            if len(self.waiting) + len(jobs) > self.limits.waiting:
                problem = (
                    f"{len(self.waiting)} texts wait, and at most {self.limits.waiting} may; try again later"
                )
                raise ApiError(429, problem, code="queue_full")
            self.waiting.extend(jobs)
            self.changed.notify()

    def close(self) -> None:
        """Refuse what waits and what comes; the texts that are being generated go on."""
        with self.changed:
            self.is_closed = True
            refused, self.waiting = self.waiting, deque()
            self.changed.notify()
        for job in refused:
            job.tell(job.number, ApiError(503, "the server is stopping", code="stopping"))

    def drop(self) -> None:
        """End the texts that are being generated."""
        for job in self.running:
            job.is_wanted = False

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.is_closed)
                if not self.waiting:
                    return
                self.running = self._take()
            try:
                self._generate(self.running)
            except Exception as error:  # whatever it is, it ends these texts and not the server
                if not isinstance(error, UserError) and fault_of_system(error) is None:
                    traceback.print_exc()
                for job in self.running:
                    job.tell(job.number, error)
            self.running = []

    def _take(self) -> list[Job]:
        """Return the jobs of the next batch, in the order in which they came: as many as there is
        memory for, and whose columns, longest prompt and longest text together, fit into the context.
        """
        taken: list[Job] = []
        context, free = self.run.language_model.context, free_memory_bytes(self.run.language_model.device)
        while self.waiting and len(taken) < self.limits.batch_size:
            jobs = [*taken, self.waiting[0]]
            prompt = max(len(job.row.prompt.ids) for job in jobs)
            columns = prompt + max(job.settings.max_new_tokens for job in jobs)
            needed = len(jobs) * self.run.bytes_per_row(columns)
            fits = (context is None or columns <= context) and (free is None or needed <= free)
            if taken and not fits:
                break
            job = self.waiting.popleft()
            if job.is_wanted and fits:
                taken.append(job)
            elif job.is_wanted:
                job.tell(job.number, ApiError(503, "too little memory for this text; lower max_tokens"))
        return taken

    def _generate(self, jobs: list[Job]) -> None:
        """Generate the texts of a batch, each to its own end."""
        if not jobs:
            return
        model = self.run.language_model
        most = max(job.settings.max_new_tokens for job in jobs)
        batch = decoding.left_pad([job.row.prompt.ids for job in jobs], model, room=most)
        # each text ends by its own settings, and the loop when all have ended
        shared = Settings(max_new_tokens=most)
        for step in self.decode(model, batch, row_sampler(jobs, batch, model.pad_id), shared):
            for index, job in enumerate(jobs):
                if not batch.ended[index]:
                    batch.ended[index] = not job.is_wanted or job.add(step, index, model)


def row_sampler(jobs: list[Job], batch: Batch, pad_id: int) -> Sampler:
    """Return a sampler that draws each row as if it were alone: from its own settings, random numbers
    and tokens, without the padding.
    """
    starts = batch.starts.tolist()
    samplers = [
        sampling.exact_sampler(
            job.settings,
            prompt_length=len(job.row.prompt.ids),
            starts=batch.starts.new_zeros(1),
            seed=job.seed,
            draw=fast_sampling.draw_exactly,
        )
        for job in jobs
    ]

    def sample(logits: Tensor, ids: Tensor) -> Tensor:
        tokens = torch.full((len(logits),), pad_id, device=logits.device)
        for row, sampler in enumerate(samplers):
            if not batch.ended[row]:
                tokens[row] = sampler(logits[row : row + 1], ids[row : row + 1, starts[row] :])[0]
        return tokens

    return sample
