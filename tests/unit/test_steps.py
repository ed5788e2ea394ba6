"""The one-line calls of the loop: the divisor against one full-batch gradient, decay groups, the
loss meter.
"""

import argparse
import json
import os
import shutil

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, BatchEncoding

import train_classifier
from common.errors import UserError
from common.runtime import Runtime
from common.training import steps, tracking
from common.training.steps import (
    LossMeter,
    accumulation_windows,
    balanced_weights,
    count_examples,
    decay_groups,
    mark_last,
    sync_gradients,
)
from common.training.tracking import NullLog, progress

MACHINE = Runtime(torch.device("cpu"), "fp32")


def make_batches(sizes, seed=0):
    """Return batches of random tokens of the given sizes, each with its own length, so that
    padding differs too.
    """
    generator = torch.Generator().manual_seed(seed)
    batches, row = [], 0
    for size in sizes:
        length = int(torch.randint(4, 20, (), generator=generator))
        ids = torch.randint(5, 100, (size, length), generator=generator)
        batches.append(
            BatchEncoding(
                {
                    "input_ids": ids,
                    "attention_mask": torch.ones_like(ids),
                    "labels": torch.randint(0, 2, (size,), generator=generator),
                    "row": torch.arange(row + 1, row + size + 1),
                    "document": torch.arange(size),
                }
            )
        )
        row += size
    return batches


def gradients_of_the_loop(model, batches, grad_accum, class_weights=None, *flags):
    """Run the product's loop at learning rate 0 and return the gradient that each optimizer step
    saw.
    """
    gradients = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    )
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    training = steps.Training(
        model, None, model, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False), class_weights
    )
    args = train_classifier.make_parser().parse_args(["--max-grad-norm", "1e9", *flags])
    sizes = [len(batches[start : start + grad_accum]) for start in range(0, len(batches), grad_accum)]
    for _ in train_classifier.train_steps(
        training,
        batches,
        sizes,
        LossMeter(MACHINE, NullLog(None), progress([], label=""), 100),
        args,
        MACHINE,
    ):
        pass
    return gradients


@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.3, 2.5])])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    "sizes, grad_accum", [([4, 4, 4], 3), ([8, 1, 3, 5], 2), ([2, 2, 2, 2, 1], 3), ([7], 4)]
)
def test_each_step_has_the_gradient_of_one_batch_of_all_its_examples(
    tiny_model, sizes, grad_accum, smoothing, class_weights
):
    """Also with batches of unequal size, class weights and a short last window, where averaging
    batch means is wrong (transformers #34242).
    """
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model).double()
    got = gradients_of_the_loop(
        model, make_batches(sizes), grad_accum, class_weights, "--label-smoothing", str(smoothing)
    )
    batches = make_batches(sizes)
    assert len(got) == -(-len(sizes) // grad_accum)
    for number, gradients in enumerate(got):
        window = batches[number * grad_accum : (number + 1) * grad_accum]
        logits = torch.cat(
            [
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                for batch in window
            ]
        )
        weights = class_weights if class_weights is None else class_weights.double()
        # PyTorch's own mean
        loss = cross_entropy(
            logits,
            torch.cat([batch["labels"] for batch in window]),
            weight=weights,
            label_smoothing=smoothing,
        )
        oracle = torch.autograd.grad(loss, list(model.parameters()))
        for gradient, expected in zip(gradients, oracle):
            # the loop takes the logits to fp32
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_windows_mark_their_last_batch():
    windows = list(accumulation_windows(iter(range(5)), [2, 2, 1]))
    assert windows == [[0, 1], [2, 3], [4]]
    assert [last for window in windows for last, _ in mark_last(window)] == [False, True, False, True, True]


def test_examples_and_their_weights_are_counted_without_filler_rows():
    window = [{"labels": torch.tensor([0, 1, -100])}, {"labels": torch.tensor([-100, 1])}]
    assert count_examples(window, None, MACHINE) == (3, 3.0)
    assert count_examples(window, torch.tensor([0.5, 2.0]), MACHINE) == (3, 4.5)


def test_balanced_weights_are_scikit_learns_and_0_for_a_class_without_rows():
    labels = [0, 0, 0, 2]
    assert balanced_weights(labels, 3).tolist() == pytest.approx([4 / (2 * 3), 0.0, 4 / (2 * 1)])


def test_gradients_are_exchanged_only_when_asked():
    class Parallel(torch.nn.Module):
        def no_sync(self):
            return "no_sync"

    assert sync_gradients(Parallel(), when=False) == "no_sync"
    assert sync_gradients(Parallel(), when=True) != "no_sync"
    with sync_gradients(torch.nn.Linear(1, 1), when=False):
        pass


def test_matrices_decay_and_biases_norms_and_frozen_weights_do_not(tiny_model):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    model.bert.embeddings.requires_grad_(False)
    decayed, free = decay_groups(model, 0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.01 and free["weight_decay"] == 0.0
    assert all(
        "LayerNorm" not in names[id(parameter)] and names[id(parameter)].endswith("weight")
        for parameter in decayed["params"]
    )
    assert all(
        "LayerNorm" in names[id(parameter)] or names[id(parameter)].endswith("bias")
        for parameter in free["params"]
    )
    assert len(decayed["params"]) + len(free["params"]) == sum(
        parameter.requires_grad for parameter in model.parameters()
    )


class RecordNumbers:
    """Stands in for the run's log and keeps what it is given."""

    def __init__(self):
        self.lines = []

    def numbers(self, step, values):
        self.lines.append((step, values))


def feed(meter, losses, already=0):
    """Give the meter one step a loss, of two examples each, after `already` steps."""
    scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)], lr=0.5), factor=1)
    training = steps.Training(None, None, None, None, scheduler, torch.amp.GradScaler("cpu", enabled=False))
    training.step = already
    for number, loss in enumerate(losses):
        meter.add(torch.tensor(loss * 2), torch.tensor([2 * number + 1, 2 * number + 2]))
        training.step += 1
        meter.end_step(training, 2, 2.0, torch.tensor(1.5))


@pytest.mark.parametrize("free, refused", [(1500, True), (2500, False)])
def test_a_run_that_goes_on_needs_no_space_for_what_it_has(free, refused, monkeypatch, tmp_path):
    """Of 4 kB it has 2: a file of that size, under two names."""
    (tmp_path / "weights").write_bytes(bytes(2000))
    os.link(tmp_path / "weights", tmp_path / "again")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=free))
    if refused:
        with pytest.raises(UserError, match="the run needs 2 kB, the disk has 2 kB free"):
            tracking.make_folder(tmp_path, needed_bytes=4000)
    else:
        tracking.make_folder(tmp_path, needed_bytes=4000)


def test_the_meter_reports_means_over_examples():
    log = RecordNumbers()
    meter = LossMeter(MACHINE, log, progress([], label=""), 2)
    feed(meter, [1.0, 3.0, 5.0])
    ((step, values),) = log.lines
    assert (
        step == 2
        and values["train/loss"] == 2.0
        and values["train/grad_norm"] == 1.5
        and values["train/learning_rate"] == 0.5
    )
    assert meter.so_far()["train_loss"] == 3.0
    json.dumps(values)  # plain numbers, no tensors


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(bad):
    meter = LossMeter(MACHINE, RecordNumbers(), progress([], label=""), 2)
    with pytest.raises(UserError, match="rows 3, 4 of the data"):
        feed(meter, [1.0, bad, 1.0])


def test_a_bad_loss_after_the_last_report_is_found_at_the_end_of_the_epoch():
    meter = LossMeter(MACHINE, RecordNumbers(), progress([], label=""), 10)
    feed(meter, [1.0, float("nan")])
    with pytest.raises(UserError, match="rows 3, 4"):
        meter.so_far()


class Root(torch.nn.Module):
    """Logits (B, 2) that are the root of a weight of 0: they are finite, their gradient is not."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, input_ids, attention_mask):
        return argparse.Namespace(logits=self.weight.sqrt().expand(len(input_ids), 2))


def steps_of_root(scaler, count: int, log=None):
    """Yield the model and the meter after each of some steps of a batch, a report after each."""
    model = Root()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = steps.Training(
        model, None, model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1), scaler
    )
    meter = LossMeter(MACHINE, log or NullLog(None), progress([], label=""), 100 if log is None else 1)
    for _ in train_classifier.train_steps(
        training,
        make_batches([4] * count),
        [1] * count,
        meter,
        train_classifier.make_parser().parse_args([]),
        MACHINE,
    ):
        yield model, meter


def test_weights_that_a_gradient_ruined_though_the_loss_was_finite_are_found_before_they_are_saved():
    for model, meter in steps_of_root(torch.amp.GradScaler("cpu", enabled=False), 1):
        assert not model.weight.isfinite().any() and all(loss.isfinite() for loss, _ in meter.waiting)
        with pytest.raises(
            UserError,
            match="gradient is not finite any more, first in step 1, though the loss is; lower --lr",
        ):
            meter.check()  # as before each save


def test_a_loss_scaler_may_skip_steps_but_not_all_of_them():
    """Else a run would end well with a model that has learned nothing. A step that is skipped has
    no norm: NaN is no JSON.
    """
    log = RecordNumbers()
    found = steps_of_root(torch.amp.GradScaler("cpu", init_scale=4.0), 9, log)
    for _ in range(2):  # the scale is 2, then 1
        model, _ = next(found)
        assert (
            model.weight.tolist() == [0.0, 0.0]
            and "train/grad_norm" not in log.lines[-1][1]
            and "train/loss" in log.lines[-1][1]
        )
    with pytest.raises(
        UserError,
        match=(
            "gradient is not finite any more, first in step 3, though the loss is; use --precision bf16 or"
            " fp32"
        ),
    ):
        next(found)


def test_a_restored_meter_reports_what_the_first_one_would():
    """Also when it is saved between two reports, whose losses are then read together."""
    logs = [RecordNumbers(), RecordNumbers()]
    whole = LossMeter(MACHINE, logs[0], progress([], label=""), 2)
    feed(whole, [0.1, 0.7, 0.3, 0.9, 0.5])
    first = LossMeter(MACHINE, logs[1], progress([], label=""), 2)
    feed(first, [0.1, 0.7, 0.3])
    tensors, sums = first.state()
    second = LossMeter(MACHINE, logs[1], progress([], label=""), 2)
    second.restore({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(sums)))
    feed(second, [0.9, 0.5], already=3)
    assert [(step, values["train/loss"]) for step, values in logs[1].lines] == [
        (step, values["train/loss"]) for step, values in logs[0].lines
    ]
    assert second.so_far()["train_loss"] == whole.so_far()["train_loss"]
