"""The loop with a loss scaler that is switched on, as fp16 on a GPU has it; PyTorch has the same
scaler for CPUs.
"""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from training_loop import NO_SCALER, make_batches, make_state, run_loop


def run(model, batches, scaler, *flags, rate=0.1):
    """Run the product's loop with SGD, one batch per step.

    Returns after each step the weights' sum of changes, the learning rate and the scale.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1, end_factor=0.5, total_iters=100)
    before, seen = [parameter.detach().clone() for parameter in model.parameters()], []

    def look():
        change = sum(
            (parameter.detach() - old).abs().sum().item()
            for parameter, old in zip(model.parameters(), before)
        )
        seen.append((change, scheduler.get_last_lr()[0], scaler.get_scale()))

    state = make_state(model, optimizer, scheduler, scaler)
    run_loop(state, [[batch] for batch in batches], "--max-grad-norm", "1e9", *flags, after_step=look)
    return seen


def test_a_step_that_overflows_is_skipped_and_the_schedule_waits_for_it(tiny_model):
    """The scale falls until the gradients are finite; only then do weights and schedule move
    (pytorch #55585).
    """
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
    with torch.no_grad():
        model.classifier.weight *= 100  # larger gradients below it
    found = run(
        model,
        make_batches([4] * 16),
        torch.amp.GradScaler("cpu", init_scale=3e38, growth_interval=1000),
        rate=1e-4,
    )
    skipped = [scale < before for (_, _, before), (_, _, scale) in zip([(0, 0, 3e38), *found], found)]
    assert skipped[0] and not skipped[-1], "the first overflows, the last does not"
    for (weights, rate, _), (next_weights, next_rate, _), overflowed in zip(
        [(0.0, 1e-4, 0), *found], found, skipped
    ):
        assert (next_weights == weights) is overflowed and (next_rate == rate) is overflowed


@pytest.mark.parametrize("flags", [[], ["--max-grad-norm", "0.01"]])
def test_a_scale_changes_no_step(tiny_model, flags):
    """Clipping sees the true gradient: scaled by 1024, its norm would be above any limit."""

    def trained(scaler):
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model)
        run(model, make_batches([4, 3]), scaler, *flags)
        return list(model.parameters())

    plain = trained(NO_SCALER)
    for one, other in zip(plain, trained(torch.amp.GradScaler("cpu", init_scale=1024.0))):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
