"""The bars and tables: what they show is what the filters do."""

import re

import pytest
import torch

from common.generation import explain, sampling
from common.generation.sampling import Settings
from language_models import train_byte_bpe


def test_a_bar_is_as_long_as_its_share():
    assert [explain.bar(share).rstrip() for share in (0, 1 / 64, 0.5, 1.0, 1.2)] == [
        "",
        "▏",
        "████",
        "████████",
        "████████",
    ]
    assert all(len(explain.bar(number / 100)) == explain.BAR_WIDTH for number in range(101))
    for share in (number / 1000 for number in range(1001)):
        eighths = sum(explain.BLOCKS.index(block) for block in explain.bar(share))
        assert abs(eighths / (8 * explain.BAR_WIDTH) - share) <= 0.5 / (8 * explain.BAR_WIDTH) + 1e-9, (
            "the nearest of 64 lengths"
        )


def test_stages_are_the_distribution_after_each_filter():
    """Oracle: the last stage is what the exact sampler draws from; the first is the model's."""
    logits, tokens = (
        torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 3,
        torch.tensor([[5, 6, 7]]),
    )
    settings = Settings(sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.5)
    found = explain.stages(logits, tokens, explain.all_filters(settings, prompt_length=3, seed=0))
    assert [stage.name for stage in found] == [
        "model",
        "repetition penalty 1.5",
        "temperature 0.7",
        "top-k 20",
        "top-p 0.8",
    ]
    assert torch.equal(found[0].probabilities, logits[0].softmax(-1))
    expected = sampling.penalize_repetition(logits, tokens, 1.5)
    for stage in sampling.distribution_filters(settings):
        expected = stage.apply(expected, expected)
    assert torch.equal(found[-1].probabilities, expected[0].softmax(-1))


def test_a_table_shows_the_chosen_token_and_every_share():
    tokenizer = train_byte_bpe()
    logits = torch.zeros(1, len(tokenizer))
    logits[0, [40, 50, 60]] = torch.tensor([9.0, 8.0, 7.0])
    filters = explain.all_filters(Settings(sample=True, top_k=2), prompt_length=1, seed=0)
    found = explain.stages(logits, torch.tensor([[5]]), filters)
    table = explain.token_table(3, 50, found, tokenizer)
    lines = table.splitlines()
    assert lines[0] == f"token 3: {tokenizer.decode([50])!r}, one of 2 kept of {len(tokenizer):,}"
    row = next(line for line in lines if line.startswith(">"))
    shares = [float(share) for share in re.findall(r"([\d.]+)%", row)]
    assert (
        shares == [round(100 * stage.probabilities[50].item(), 1) for stage in found]
        and repr(tokenizer.decode([50])) in row
    )
    # dropped by top-k
    assert re.search(rf"{re.escape(repr(tokenizer.decode([60])))}.*%.* -", table)
    for start in (lines[1].index(stage.name) for stage in found):
        shares = [line[start:].split()[0] for line in lines[2:]]
        assert sum(float(share.rstrip("%")) for share in shares if share != "-") == pytest.approx(
            100, abs=0.5
        ), "with all others"
    unlikely = explain.token_table(4, 200, explain.stages(logits, torch.tensor([[5]]), []), tokenizer)
    assert re.search(rf"^> +{re.escape(repr(tokenizer.decode([200])))} ", unlikely, re.M), (
        "the chosen one, though others are likelier"
    )
