"""The training loop and what stands behind its calls: the divisor against one full-batch gradient,
decay groups, the loss meter.
"""

import argparse
import json
import os
import shutil

import datasets
import pytest
import torch
from torch.nn import BCEWithLogitsLoss
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.loss.loss_utils import ForSequenceClassificationLoss

import train_classifier
from common.errors import UserError
from common.training import tracking
from common.training.batching import count_examples, sync_gradients
from common.training.run import MULTI, REGRESSION, SINGLE
from common.training.task import Task, balanced_weights
from common.training.tracking import LossMeter
from training_loop import NO_SCALER, RUNTIME, config_of, make_batches, make_state, run_loop


def gradients_of_the_loop(model, batches, grad_accum, class_weights=None, *flags, **options):
    """Run the product's loop at learning rate 0 and return the gradient that each optimizer step saw."""
    gradients = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    )
    state = make_state(model, optimizer, class_weights=class_weights)
    steps = [batches[start : start + grad_accum] for start in range(0, len(batches), grad_accum)]
    run_loop(state, steps, "--max-grad-norm", "1e9", *flags, **options)
    assert state.step == len(steps)
    return gradients


@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.3, 2.5])])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    "sizes, grad_accum", [([4, 4, 4], 3), ([8, 1, 3, 5], 2), ([2, 2, 2, 2, 1], 3), ([7], 4)]
)
def test_each_step_has_the_gradient_of_one_batch_of_all_its_examples(
    tiny_model, sizes, grad_accum, smoothing, class_weights
):
    """Also with batches of unequal size, class weights and a short last step, where averaging
    batch means is wrong (transformers #34242).
    """
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model).double()
    got = gradients_of_the_loop(
        model, make_batches(sizes), grad_accum, class_weights, "--label-smoothing", str(smoothing)
    )
    batches = make_batches(sizes)
    assert len(got) == -(-len(sizes) // grad_accum)
    for number, gradients in enumerate(got):
        step = batches[number * grad_accum : (number + 1) * grad_accum]
        logits = torch.cat(
            [
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                for batch in step
            ]
        )
        weights = class_weights if class_weights is None else class_weights.double()
        # PyTorch's own mean
        loss = cross_entropy(
            logits, torch.cat([batch["labels"] for batch in step]), weight=weights, label_smoothing=smoothing
        )
        oracle = torch.autograd.grad(loss, list(model.parameters()))
        for gradient, expected in zip(gradients, oracle):
            # the loop takes the logits to fp32
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


NAN = float("nan")
SOME_LABELS = torch.tensor(
    [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
)


@pytest.mark.parametrize(
    "kind, num_outputs, weighted, smoothing",
    [
        (MULTI, 3, False, 0.0),
        (MULTI, 3, True, 0.0),
        (MULTI, 3, False, 0.2),
        (MULTI, 1, False, 0.0),
        (REGRESSION, 3, False, 0.0),
        (REGRESSION, 1, False, 0.0),
    ],
)
def test_labels_and_numbers_have_the_gradient_of_transformers_loss_of_one_batch(
    tiny_model, kind, num_outputs, weighted, smoothing
):
    """Batches of unequal size, in each a text that only fills it up, and a short last step. With
    weights the oracle is PyTorch's own mean.
    """
    sizes, grad_accum = [4, 1, 3, 5, 2], 3
    task = Task(kind, tuple("abc"[:num_outputs]))
    config = AutoConfig.from_pretrained(tiny_model, num_labels=num_outputs, problem_type=task.problem_type)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).double()
    weights = torch.tensor([0.3, 2.5, 7.0]) if weighted else None

    def batches() -> list:
        made, generator = make_batches([size + 1 for size in sizes]), torch.Generator().manual_seed(1)
        for batch, size in zip(made, sizes):
            random = torch.rand(size, num_outputs, generator=generator)
            targets = (random > 0.6).float() if kind == MULTI else 9 * random
            batch["labels"] = torch.cat([targets, torch.full((1, num_outputs), NAN)])
        return made

    flags = ["--label-smoothing", str(smoothing)]
    got = gradients_of_the_loop(model, batches(), grad_accum, weights, *flags, task=task)
    assert len(got) == 2
    for number, gradients in enumerate(got):
        step = batches()[number * grad_accum : (number + 1) * grad_accum]
        logits = torch.cat(
            [
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:-1]
                for batch in step
            ]
        )
        targets = torch.cat([batch["labels"][:-1] for batch in step]).double()
        targets = targets * (1 - smoothing) + 0.5 * smoothing
        loss = ForSequenceClassificationLoss(targets, logits, model.config)
        if weights is not None:
            loss = BCEWithLogitsLoss(pos_weight=weights.double())(logits, targets)
        oracle = torch.autograd.grad(loss, list(model.parameters()))
        for gradient, expected in zip(gradients, oracle):
            # the loop takes the logits to fp32
            torch.testing.assert_close(gradient, expected, rtol=2e-5, atol=1e-7)


def test_weights_of_labels_are_the_texts_without_for_each_with():
    weights = balanced_weights(Task(MULTI, ("a", "b", "c")), SOME_LABELS)
    assert weights.tolist() == pytest.approx([2 / 3, 3 / 2, 1.0])


def test_examples_and_their_weights_are_counted_without_filler_rows():
    step = [{"labels": torch.tensor([0, 1, -100])}, {"labels": torch.tensor([-100, 1])}]
    assert count_examples(step, None, RUNTIME) == (3, 3.0)
    assert count_examples(step, torch.tensor([0.5, 2.0]), RUNTIME) == (3, 4.5)
    step = [{"labels": SOME_LABELS}, {"labels": torch.full((1, 3), NAN)}]
    assert count_examples(step, torch.ones(3), RUNTIME) == (5, 15.0)


def test_balanced_weights_are_scikit_learns_and_0_for_a_class_without_rows():
    labels = [0, 0, 0, 2]
    weights = balanced_weights(Task(SINGLE, ("a", "b", "c")), torch.tensor(labels))
    assert weights.tolist() == pytest.approx([4 / (2 * 3), 0.0, 4 / (2 * 1)])


def test_gradients_are_exchanged_only_when_asked():
    class Parallel(torch.nn.Module):
        def no_sync(self):
            return "no_sync"

    assert sync_gradients(Parallel(), when=False) == "no_sync"
    assert sync_gradients(Parallel(), when=True) != "no_sync"
    with sync_gradients(torch.nn.Linear(1, 1), when=False):
        pass


def test_gradients_are_exchanged_after_the_last_micro_batch_of_a_step_only(tiny_model):
    """Under DDP: all others run within no_sync, forward and backward."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    within, seen = [False], []

    class NoSync:
        def __enter__(self):
            within[0] = True

        def __exit__(self, *_):
            within[0] = False

    model.no_sync = NoSync
    model.register_forward_hook(lambda *_: seen.append(("forward", within[0])))
    model.classifier.bias.register_hook(lambda _: seen.append(("backward", within[0])))
    batches = make_batches([2] * 5)
    steps = [batches[:2], batches[2:4], batches[4:]]
    run_loop(make_state(model, torch.optim.SGD(model.parameters(), lr=0.0)), steps)
    exchanged = [not inside for name, inside in seen if name == "backward"]
    assert exchanged == [not inside for name, inside in seen if name == "forward"]
    assert exchanged == [False, True, False, True, True]


def test_matrices_decay_and_biases_norms_and_frozen_weights_do_not(tiny_model):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    config = config_of("--freeze-layers", 1, "--weight-decay", 0.01)
    features = datasets.Features(label=datasets.ClassLabel(names=["no", "yes"]))
    rows = datasets.Dataset.from_dict({"label": [0, 1, 1]}, features=features)
    state = train_classifier.prepare(model, None, rows, config, RUNTIME)
    decayed, free = state.optimizer.param_groups
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
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(decayed["params"]) + len(free["params"]) == len(trained) < len(list(model.parameters()))


class RecordNumbers:
    """Stands in for the run's log and keeps what it is given."""

    def __init__(self):
        self.lines = []

    def numbers(self, step, values):
        self.lines.append((step, values))


def feed(meter, losses, every, already=0) -> list[tuple[int, float]]:
    """Give the meter one step per loss, of two examples each, after `already` steps.

    Returns (step, loss) of each read, after `every` so many steps.
    """
    read = []
    for number, loss in enumerate(losses):
        step = already + number + 1
        meter.add(torch.tensor(loss * 2), torch.tensor([2 * number + 1, 2 * number + 2]))
        meter.end_step(step, examples=2, divisor=2.0, grad_norm=torch.tensor(1.5))
        if step % every == 0:
            read.append((step, meter.read()["loss"]))
    return read


@pytest.mark.parametrize("free, refused", [(1500, True), (2500, False)])
def test_a_run_that_goes_on_needs_no_space_for_what_it_has(free, refused, monkeypatch, tmp_path):
    """Of 4 kB it has 2: a file of that size, under two names."""
    (tmp_path / "weights").write_bytes(bytes(2000))
    os.link(tmp_path / "weights", tmp_path / "again")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=free))
    if refused:
        with pytest.raises(UserError, match="the run needs 2 kB, the disk has 2 kB free"):
            tracking.check_room(tmp_path, needed_bytes=4000)
    else:
        tracking.check_room(tmp_path, needed_bytes=4000)


def test_the_meter_reports_means_over_examples():
    meter = LossMeter(RUNTIME, NO_SCALER)
    assert feed(meter, [1.0, 3.0, 5.0], every=2) == [(2, 2.0)]
    assert meter.so_far()["train_loss"] == 3.0


def test_the_loop_logs_loss_rate_and_norm_as_plain_numbers(tiny_model):
    model, log = AutoModelForSequenceClassification.from_pretrained(tiny_model), RecordNumbers()
    state = make_state(model, torch.optim.SGD(model.parameters(), lr=0.5))
    run_loop(state, [[batch] for batch in make_batches([2] * 3)], "--log-every", 2, log=log)
    ((step, values),) = log.lines
    assert step == 2 and values["train/learning_rate"] == 0.5 and values["train/grad_norm"] > 0
    assert values["train/loss"] > 0 and values["train/examples_per_second"] > 0
    json.dumps(values)  # no tensors


def test_time_is_counted_once_and_not_while_the_meter_is_paused(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: now[0])
    meter = LossMeter(RUNTIME, NO_SCALER)
    meter.start_epoch(is_resumed=False)
    now[0] = 2.0
    feed(meter, [1.0], every=100)
    with meter.paused():
        assert meter.so_far()["examples_per_second"] == pytest.approx(2 / 2.0)
        now[0] = 50.0
    now[0] = 51.0
    feed(meter, [1.0], every=100, already=1)
    assert meter.so_far()["examples_per_second"] == pytest.approx(4 / 3.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(bad):
    with pytest.raises(UserError, match="rows 3, 4 of the data"):
        feed(LossMeter(RUNTIME, NO_SCALER), [1.0, bad, 1.0], every=2)


def test_a_bad_loss_after_the_last_report_is_found_at_the_end_of_the_epoch():
    meter = LossMeter(RUNTIME, NO_SCALER)
    feed(meter, [1.0, float("nan")], every=10)
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


def train_root(model, scaler, count: int, *flags, log=None, after_step=lambda: None):
    """Run the loop over some steps of a batch of 4."""
    state = make_state(model, torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    run_loop(state, [[batch] for batch in make_batches([4] * count)], *flags, log=log, after_step=after_step)


def test_weights_that_a_gradient_ruined_though_the_loss_was_finite_are_found_before_they_are_saved():
    model = Root()
    with pytest.raises(UserError, match="first in step 1, although the loss is; lower --lr"):
        train_root(model, NO_SCALER, 1)
    assert not model.weight.isfinite().any()


def test_a_loss_scaler_may_skip_steps_but_not_all_of_them():
    """Else a run would end well with a model that has learned nothing. A step that is skipped has
    no norm: NaN is no JSON.
    """
    log, model, weights = RecordNumbers(), Root(), []
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pytest.raises(
        UserError, match="first in step 3, although the loss is; use --precision bf16 or fp32"
    ):
        train_root(
            model,
            scaler,
            9,
            "--log-every",
            1,
            log=log,
            after_step=lambda: weights.append(model.weight.tolist()),
        )
    assert weights == [[0.0, 0.0]] * 2  # the scale is 2, then 1
    assert [step for step, _ in log.lines] == [1, 2]
    assert all("train/grad_norm" not in values and "train/loss" in values for _, values in log.lines)


def test_a_restored_meter_reports_what_the_first_one_would():
    """Also when it is saved between two reports, whose losses are then read together."""
    whole, first, second = (LossMeter(RUNTIME, NO_SCALER) for _ in range(3))
    expected = feed(whole, [0.1, 0.7, 0.3, 0.9, 0.5], every=2)
    read = feed(first, [0.1, 0.7, 0.3], every=2)
    tensors, sums = first.state()
    second.restore({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(sums)))
    read += feed(second, [0.9, 0.5], every=2, already=3)
    assert read == expected and len(read) == 2
    assert second.so_far()["train_loss"] == whole.so_far()["train_loss"]
