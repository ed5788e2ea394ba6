"""The thread that generates the texts of requests: they are decoded together, each with its own
sampler, random numbers and end.

With the step in C, a text that waits joins those that are being generated at the next token, and
one that has ended leaves (continuous batching; Yu et al. 2022, "Orca"). The caches of the library's
models have many forms, of which rows can't be put together: there, the next texts begin when all of
a batch have ended.
"""

from __future__ import annotations

import functools
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.api import ApiError
from common.errors import UserError, fault_of_system
from common.generation import decoding
from common.generation.completion import Completion, Run, logprobs
from common.generation.decoding import Batch, Step
from common.generation.fast_sampling import make_sampler  # the plain version: sampling.make_sampler
from common.generation.language_model import LanguageModel
from common.generation.sampling import Sampler, Settings
from common.runtime import free_memory_bytes


@dataclass(frozen=True)
class Limits:
    """What the server takes on at a time."""

    batch_size: int  # texts that are decoded together
    waiting: int  # texts that wait for their turn
    seconds: float  # from a request to the end of its answer
    api_key: str | None = None


@dataclass(frozen=True)
class Piece:
    """What a token adds to a text, and whether it is the last one."""

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
    def length(self) -> int:
        """How many tokens there are, with the prompt."""
        return len(self.row.prompt.ids) + len(self.row.token_ids)

    @property
    def num_left(self) -> int:
        """How many tokens can still come."""
        return self.settings.max_new_tokens - len(self.row.token_ids)

    def sampler(self, device: torch.device) -> Sampler:
        """Return a sampler that draws this text as if it were alone: from its own settings, random
        numbers and tokens, without padding.
        """
        starts, length = torch.zeros(1, dtype=torch.long, device=device), len(self.row.prompt.ids)
        return make_sampler(self.settings, prompt_length=length, starts=starts, seed=self.seed)

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
            row.mark_whole(self.settings)
            row.finish()
        self.tell(self.number, Piece(row.text[shown:], entries, offset, has_ended))
        return has_ended


@dataclass
class Group:
    """The texts that are decoded together, one in each row of a batch."""

    jobs: list[Job]
    samplers: list[Sampler]
    batch: Batch
    logits: Tensor  # (B, V), from which the next tokens are chosen

    @property
    def going_on(self) -> list[int]:
        """The rows whose texts have not ended."""
        return [row for row, has_ended in enumerate(self.batch.ended) if not has_ended]


class Engine:
    """The thread that generates texts, and the jobs that wait for it."""

    def __init__(self, run: Run, limits: Limits) -> None:
        self.run, self.limits, self.model = run, limits, run.language_model
        self.waiting: deque[Job] = deque()
        self.group: Group | None = None  # what is being generated; the thread's own
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
                waiting, most = len(self.waiting), self.limits.waiting
                problem = f"{waiting} texts wait, and at most {most} may; try again later"
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
        group = self.group
        for job in group.jobs if group else ():
            job.is_wanted = False

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.group or self.is_closed)
                if not self.waiting and not self.group:
                    return
                taken = self._take()
            fresh = self._tried(taken, self.read, taken) if taken else None
            jobs = [*(self.group.jobs if self.group else ()), *(fresh.jobs if fresh else ())]
            self.group = self._tried(jobs, self.go_on, fresh)

    def _tried(self, jobs: list[Job], act: Callable[..., Any], given: object) -> Any:
        """Return what a function returns; whatever it raises is passed on to these jobs, and ends their texts
        but not the server.
        """
        try:
            return act(given)
        except Exception as error:
            if not isinstance(error, UserError) and fault_of_system(error) is None:
                traceback.print_exc()
            for job in jobs:
                job.tell(job.number, error)
            return None

    def _take(self) -> list[Job]:
        """Return the jobs that begin now, in the order in which they came: as many as there is memory for in
        addition to those that are being generated. With a library's model, they begin only when none is being
        generated, and only as many as fit into the context together: their columns are those of the longest
        prompt plus the longest rest of a text.
        """
        running = [self.group.jobs[row] for row in self.group.going_on] if self.group else []
        taken: list[Job] = []
        joins = self.model.model.is_compiled
        context = None if joins else self.model.context
        free = free_memory_bytes(self.model.device)
        room = self.limits.batch_size - len(running) if joins or not running else 0
        while self.waiting and len(taken) < room:
            jobs = [*running, *taken, self.waiting[0]]
            columns = max(job.length for job in jobs) + max(job.num_left for job in jobs)
            needed = len(jobs) * self.run.bytes_per_row(columns)
            fits = (context is None or columns <= context) and (free is None or needed <= free)
            if len(jobs) > 1 and not fits:
                break
            job = self.waiting.popleft()
            if job.is_wanted and fits:
                taken.append(job)
            elif job.is_wanted:
                refusal = ApiError(503, "too little memory for this text; lower max_tokens")
                job.tell(job.number, refusal)
        return taken

    def read(self, jobs: list[Job]) -> Group:
        """Read the prompts of new texts."""
        room = max(job.num_left for job in jobs)
        batch = decoding.left_pad([job.row.prompt.ids for job in jobs], self.model, room=room)
        samplers = [job.sampler(self.model.device) for job in jobs]
        return Group(jobs, samplers, batch, decoding.prefill(self.model, batch))

    def go_on(self, fresh: Group | None) -> Group | None:
        """Let new texts join, add a token to each text, and return those that go on, or None."""
        group = join(self.group, fresh, self.model)
        if group is None:
            return None
        self.group = group  # what `drop` ends
        tokens = self.choose(group)
        step = Step(tokens, group.logits)
        for row in group.going_on:
            job = group.jobs[row]
            group.batch.ended[row] = not job.is_wanted or job.add(step, row, self.model)
        if not group.going_on:
            return None
        group.logits = decoding.step(self.model, group.batch, tokens)
        return group

    def choose(self, group: Group) -> list[int]:
        """Return the next token of each text, the padding id where it has ended: also where its sampler
        fails, such as by a constraint that takes too long. Raises UserError when the model's logits are not
        numbers.
        """
        batch, logits = group.batch, group.logits
        chosen = torch.full((len(logits),), self.model.pad_id, device=logits.device)
        for row in group.going_on:
            token = self._tried([group.jobs[row]], functools.partial(draw_one, group), row)
            batch.ended[row] = token is None
            chosen[row] = self.model.pad_id if token is None else token
        return decoding.fetch_ids(chosen, logits, self.model)


def draw_one(group: Group, row: int) -> Tensor:
    """Return the next token of a text, from its own logits and tokens, without the padding."""
    own_ids = group.batch.tokens[row : row + 1, int(group.batch.starts[row]) :]
    return group.samplers[row](group.logits[row : row + 1], own_ids)[0]


def join(group: Group | None, fresh: Group | None, model: LanguageModel) -> Group | None:
    """Return the texts that go on, and new ones, as one group."""
    if group is None:
        return fresh
    if not model.model.is_compiled or (fresh is None and all(not ended for ended in group.batch.ended)):
        return group
    parts = [(group, group.going_on)] + ([(fresh, fresh.going_on)] if fresh else [])
    jobs = [part.jobs[row] for part, rows in parts for row in rows]
    batch = decoding.regroup(
        [(part.batch, row) for part, rows in parts for row in rows],
        model,
        room=max(job.num_left for job in jobs),
    )
    samplers = [part.samplers[row] for part, rows in parts for row in rows]
    return Group(jobs, samplers, batch, torch.cat([part.logits[rows] for part, rows in parts]))
