"""How long a run will take, and how much memory and disk, against runs whose cost is known."""

import itertools

import pytest
import torch
from transformers import BatchEncoding

from common.training import batching, checkpoint, tracking
from common.training.tracking import Forecast, duration
from training_loop import RUNTIME


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.2, "5 seconds"),
        (42.4, "40 seconds"),
        (57.9, "60 seconds"),
        (58, "1 minute"),
        (89, "1 minute"),
        (91, "2 minutes"),
        (9 * 60 + 20, "9 minutes"),
        (59 * 60, "59 minutes"),
        (3590, "1 h"),
        (3600 + 19 * 60, "1 h 20 min"),
        (26 * 3600, "26 h"),
    ],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


class SimulatedClock:
    """Stands for the clock of a run: moved on by hand."""

    def __init__(self):
        self.now = 0.0

    def seconds(self) -> float:
        return self.now


@pytest.mark.parametrize("eval_every, is_resumed", [(None, False), (7, False), (None, True)])
def test_a_forecast_after_six_steps_is_what_the_run_then_takes(eval_every, is_resumed):
    """Steps of very different length, a slow first step, and evaluations: on a machine that takes
    the same time for each token, forward, and twice that backward.
    """
    seconds_per_token, epochs, steps = 1e-3, 3, 40
    clock = SimulatedClock()
    tokens_of_step = list(itertools.islice(itertools.cycle([100, 400, 250, 50, 700]), steps))
    validations = 1 + (0 if eval_every is None else (steps - 1) // eval_every)
    forecast = Forecast(
        train_tokens=sum(tokens_of_step),
        validation_tokens=900,
        test_tokens=800,
        validations=validations,
        clock=clock,
    )
    foretold, first_epoch = None, 2 if is_resumed else 1
    for epoch in range(first_epoch, epochs + 1):
        for step, tokens in enumerate(tokens_of_step, start=1):
            if clock.now == 0:
                assert forecast.words_left(epochs) == "", "nothing is known yet"
                clock.now = 60.0  # loading, and preparing memory in the first step
            clock.now += 3 * tokens * seconds_per_token
            forecast.add_step(tokens, RUNTIME)
            if step == steps or (eval_every and step % eval_every == 0):
                clock.now += 900 * seconds_per_token
                forecast.add_validation()
            if forecast.is_due():
                assert foretold is None, "once"
                foretold = clock.now + forecast.seconds_left(epochs - (epoch - 1 + step / steps))
    clock.now += 800 * seconds_per_token
    assert foretold == pytest.approx(clock.now, rel=0.02)


@pytest.mark.parametrize(
    "seconds_before, said", [(1, "about 1 minute in all"), (600, "about 11 minutes in all, 1 minute left")]
)
def test_what_is_left_is_said_where_it_is_not_all(seconds_before, said):
    """After two steps of 60, of a second each."""
    clock = SimulatedClock()
    tokens = {"train_tokens": 60 * 100, "validation_tokens": 0, "test_tokens": 0}
    forecast = Forecast(**tokens, validations=0, clock=clock)
    clock.now = seconds_before
    forecast.add_step(100, RUNTIME)
    clock.now += 1
    forecast.add_step(100, RUNTIME)
    assert forecast.line(1.0, RUNTIME) == f"time     {said}"


class TwoProducts(torch.nn.Module):
    """Keeps its inputs of width 8 and 32 for the backward pass: 40 numbers of each token."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(300, 8)
        self.wide, self.head = torch.nn.Linear(8, 32), torch.nn.Linear(32, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.wide(self.embed(input_ids)).relu()
        return BatchEncoding({"logits": self.head(hidden)})


class NoPadding:
    """Stands for a tokenizer of texts that are all of one length."""

    def pad(self, chunks, **_):
        return BatchEncoding({name: torch.tensor([chunk[name] for chunk in chunks]) for name in chunks[0]})


def test_activations_are_those_that_the_backward_pass_needs():
    """The ids (8 bytes), the embeddings (8 numbers), what comes out of relu (32, kept once)."""
    model, size, ones = TwoProducts(), 10, [1] * 16
    chunks = {name: [[ones], [ones, ones]] for name in ("input_ids", "attention_mask")}
    rows = batching.Columns({"chunk_lengths": [[16], [16, 16]], **chunks})
    expected = size * 16 * (8 + 4 * 8 + 4 * 32)
    assert batching.activation_bytes(model, rows, NoPadding(), size, RUNTIME) == expected
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_on_disk_needs_whole_checkpoints_and_the_best_model_of_each():
    model = TwoProducts()
    model.embed.requires_grad_(False)
    weights = 4 * (300 * 8 + (8 * 32 + 32) + (32 * 2 + 2))
    trained = weights - 4 * 300 * 8
    each = weights + 2 * trained + weights
    assert checkpoint.disk_bytes(model, keep=2, keep_after=2) == (3 * each, 2 * each + weights)
    assert checkpoint.disk_bytes(model, keep=2, keep_after=0) == (3 * each, weights)
    assert checkpoint.disk_bytes(model, keep=0, keep_after=0) == (2 * weights, weights)


@pytest.mark.parametrize(
    "num_bytes, words",
    [
        (500, "0 kB"),
        (5e4, "50 kB"),
        (9.9e6, "9,900 kB"),
        (9.14e7, "91 MB"),
        (1.26e9, "1.3 GB"),
        (5.2e10, "52 GB"),
    ],
)
def test_sizes_in_words(num_bytes, words):
    assert tracking.file_size(num_bytes) == words
