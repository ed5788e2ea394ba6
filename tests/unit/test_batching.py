"""The batch order, its shares, padding and pooling, and tokenisation, against their definitions."""

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.runtime import Runtime
from common.training import batching
from common.training.batching import BatchConfig, Pick
from common.training.task import IGNORED_CLASS
from common.training.tokenization import tokenize

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=400)


@settings(max_examples=60)
@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(1, 50),
    buckets=st.booleans(),
)
def test_an_epoch_holds_each_row_once_in_full_batches_and_depends_on_nothing_else(
    lengths, batch_size, seed, epoch, buckets
):
    options = {"batch_size": batch_size, "seed": seed, "epoch": epoch, "buckets": buckets}
    order = batching.batch_order(lengths, **options)
    assert sorted(np.concatenate(order).tolist()) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in order[:-1]) and 1 <= len(order[-1]) <= batch_size
    np.random.seed(epoch)  # noqa: NPY002  the global generator must not matter
    again = batching.batch_order(lengths, **options)
    assert all(np.array_equal(batch, other) for batch, other in zip(order, again, strict=True))


@pytest.mark.parametrize("buckets", [True, False])
def test_the_order_changes_with_the_epoch_and_the_seed(buckets):
    orders = [
        np.concatenate(
            batching.batch_order(range(1, 101), batch_size=8, seed=seed, epoch=epoch, buckets=buckets)
        ).tolist()
        for seed, epoch in ((0, 1), (0, 2), (1, 1))
    ]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]


def test_buckets_pad_less_and_are_not_sorted_over_the_epoch():
    lengths = np.random.default_rng(0).integers(5, 500, 2000)
    order = batching.batch_order(lengths, batch_size=16, seed=0, epoch=1, buckets=True)
    random_order = batching.batch_order(lengths, batch_size=16, seed=0, epoch=1, buckets=False)
    assert batching.padding_share(lengths, order) < 0.04 < 0.3 < batching.padding_share(lengths, random_order)
    means = np.array([lengths[batch].mean() for batch in order])
    # neither rising nor falling over the epoch
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


@pytest.mark.parametrize("count", [96, 500, 2000])
def test_buckets_put_other_texts_together_in_each_epoch(count):
    """Also where the epoch is short and no two texts have the same length: sorted as a whole,
    every epoch would have the same batches.
    """
    epochs = [
        batching.batch_order(range(1, count + 1), batch_size=16, seed=0, epoch=epoch, buckets=True)
        for epoch in (1, 2)
    ]
    first, second = ({frozenset(batch.tolist()) for batch in order} for order in epochs)
    assert not first & second


def test_padding_share_counts_positions():
    assert batching.padding_share([1, 3, 4, 4], [np.array([0, 1]), np.array([2, 3])]) == pytest.approx(2 / 14)


@settings(max_examples=60)
@given(count=st.integers(1, 60), batch_size=st.integers(1, 20), world_size=st.integers(1, 4))
def test_the_processes_share_each_global_batch_and_all_run_each_step(count, batch_size, world_size):
    for numbers in batching.batch_order([1] * count, batch_size=batch_size, seed=0, epoch=1, buckets=False):
        picks = [Pick(row, (0,)) for row in numbers.tolist()]
        parts = [batching.share_of_rank(picks, rank, world_size) for rank in range(world_size)]
        assert all(parts), "a process without a row would leave the others waiting"
        assert sorted(pick for part in parts for pick in part if not pick.is_filler) == sorted(picks)


@settings(max_examples=60)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=40), batch_size=st.integers(1, 12))
def test_evaluation_goes_from_long_to_short_through_each_chunk_once_in_bounded_batches(counts, batch_size):
    lengths = [[5 + number % 7] * count for number, count in enumerate(counts)]
    batches = batching.evaluation_batches(lengths, batch_size=batch_size)
    seen = [(row, chunk) for batch in batches for row, chunks, _ in batch for chunk in chunks]
    assert sorted(seen) == [(row, chunk) for row, count in enumerate(counts) for chunk in range(count)]
    assert all(sum(len(pick.chunks) for pick in batch) <= batch_size for batch in batches)
    longest = [lengths[row][0] for row, _ in seen]
    assert longest == sorted(longest, reverse=True)


@settings(max_examples=60)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=40), most=st.integers(1, 12))
def test_a_cut_keeps_the_picks_in_order_and_the_memory_bounded(counts, most):
    picks = [Pick(row, tuple(range(count))) for row, count in enumerate(counts)]
    batches = batching.split_picks(picks, most)
    assert [pick for batch in batches for pick in batch] == picks and all(batches)
    assert all(len(batch) == 1 or sum(len(pick.chunks) for pick in batch) <= most for batch in batches)
    for batch, following in zip(batches, batches[1:]):  # and no batch is cut without need
        assert sum(len(pick.chunks) for pick in batch) + len(following[0].chunks) > most


def test_drawn_chunks_are_a_function_of_seed_and_epoch_and_reach_every_chunk():
    counts = [1, 2, 7] * 20
    drawn = batching.draw_chunks(counts, most=2, seed=3, epoch=1)
    assert (
        drawn
        == batching.draw_chunks(counts, most=2, seed=3, epoch=1)
        != batching.draw_chunks(counts, most=2, seed=3, epoch=2)
    )
    assert all(
        len(set(chunks)) == len(chunks) == min(count, 2) and max(chunks) < count
        for chunks, count in zip(drawn, counts)
    )
    reached = {
        chunks for epoch in range(1, 40) for chunks in batching.draw_chunks([7], most=1, seed=3, epoch=epoch)
    }
    assert reached == {(chunk,) for chunk in range(7)}


@settings(max_examples=40)
@given(
    count=st.integers(1, 50),
    batch_size=st.integers(1, 6),
    world_size=st.integers(1, 3),
    grad_accum=st.integers(1, 4),
    micro_batch_size=st.integers(1, 6),
)
def test_the_steps_of_all_processes_hold_each_text_once_whatever_the_size_of_their_batches(
    count, batch_size, world_size, grad_accum, micro_batch_size
):
    """A step of the same size has the same texts, whatever share of it processes and accumulation
    have, and with any bound on memory.
    """
    rows = {"chunk_lengths": [[3 + number % 5] * (1 + number % 3) for number in range(count)]}
    config = BatchConfig(batch_size, grad_accum, max_chunks=2, batching="buckets", seed=1, num_workers=0)
    plans = [
        batching.plan_epoch(
            rows,
            config,
            epoch=1,
            micro_batch_size=micro_batch_size,
            runtime=Runtime(torch.device("cpu"), "fp32", rank, world_size),
        )
        for rank in range(world_size)
    ]
    one = BatchConfig(batch_size * world_size * grad_accum, 1, 2, "buckets", 1, 0)
    alone = batching.plan_epoch(
        rows, one, epoch=1, micro_batch_size=10**6, runtime=Runtime(torch.device("cpu"), "fp32")
    )
    assert len({len(plan) for plan in plans}) == 1 and len(plans[0]) == len(alone)
    for step, expected in enumerate(alone):
        together = [pick for plan in plans for batch in plan[step] for pick in batch if not pick.is_filler]
        assert sorted(together) == sorted(pick for batch in expected for pick in batch)
    assert all(step and all(step) for plan in plans for step in plan), (
        "every process has something to do in every step"
    )


@pytest.fixture
def rows():
    texts = ["the film was good", "a story with actors that I saw on monday and it was awful " * 3, "grim"]
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "row": datasets.Value("int64"),
        }
    )
    return datasets.Dataset.from_dict(
        {"text": texts, "label": [1, 0, 0], "row": [1, 2, 3]}, features=features
    )


def test_tokenize_truncates_counts_and_equals_the_tokenizer(rows, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenized = tokenize(rows, tokenizer, max_length=12, truncation="head", cache_dir=str(tmp_path))
    for row, text in zip(tokenized, rows["text"]):
        whole = tokenizer(text)["input_ids"]
        assert row["input_ids"] == [tokenizer(text, truncation=True, max_length=12)["input_ids"]]
        assert row["num_tokens"] == len(whole) and row["chunk_lengths"] == [row["num_read"]] == [
            min(len(whole), 12)
        ]


def test_tokenize_reuses_its_file_until_texts_length_truncation_or_tokenizer_change(
    rows, tiny_model, tmp_path, monkeypatch
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    first = tokenize(rows, tokenizer, max_length=12, truncation="head", cache_dir=str(tmp_path))
    tokenizer("a call with other settings", padding="max_length", max_length=20, truncation=True)
    tokenize(rows, tokenizer, max_length=12, truncation="head", cache_dir=str(tmp_path))
    assert len(list(tmp_path.rglob("*.arrow"))) == 1, (
        "a call in between changes the tokenizer's state, not what it does"
    )
    tokenize(rows, tokenizer, max_length=13, truncation="head", cache_dir=str(tmp_path))
    tokenize(
        rows.map(lambda row: {"text": row["text"] + "!"}, load_from_cache_file=False),
        tokenizer,
        max_length=12,
        truncation="head",
        cache_dir=str(tmp_path),
    )
    tokenize(rows, tokenizer, max_length=12, truncation="tail", cache_dir=str(tmp_path))
    renamed = rows.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    tokenized = tokenize(renamed, tokenizer, max_length=12, truncation="head", cache_dir=str(tmp_path))
    assert tokenized.features["label"].names == ["bad", "good"], (
        "the same numbers for other classes are other labels"
    )
    tokenizer.add_tokens(["monday"])
    tokenize(rows, tokenizer, max_length=12, truncation="head", cache_dir=str(tmp_path))
    assert len(list(tmp_path.rglob("*.arrow"))) == 6
    assert first.cache_files[0]["filename"].startswith(str(tmp_path))


def test_the_fingerprint_of_tokens_outlives_another_version_of_the_library(
    rows, tiny_model, tmp_path, monkeypatch
):
    """A run goes on after it; only the file is written anew."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    options = {"max_length": 12, "truncation": "head", "cache_dir": str(tmp_path)}
    before = tokenize(rows, tokenizer, **options)._fingerprint
    monkeypatch.setattr(datasets, "__version__", "99")
    assert tokenize(rows, tokenizer, **options)._fingerprint == before
    assert len(list(tmp_path.rglob("*.arrow"))) == 2


def test_a_batch_holds_the_chosen_chunks_and_a_filler_row_counts_nowhere(rows, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenized = tokenize(rows, tokenizer, max_length=12, truncation="chunks", cache_dir=str(tmp_path))
    assert len(tokenized["chunk_lengths"][1]) >= 4
    picks = [Pick(1, (0, 3)), Pick(2, (0,)), Pick(0, (0,), is_filler=True)]
    batch = batching.pad_batch(picks, tokenized, tokenizer)
    assert batch["labels"].tolist() == [0, 0, IGNORED_CLASS]
    assert batch["row"].tolist() == [2, 3, 1] and batch["text_of_chunk"].tolist() == [0, 0, 1, 2]
    expected = [
        *(tokenized[1]["input_ids"][chunk] for chunk in (0, 3)),
        tokenized[2]["input_ids"][0],
        tokenized[0]["input_ids"][0],
    ]
    assert [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ] == expected
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_a_loader_takes_no_random_number_from_the_run(rows, tiny_model, tmp_path):
    """With one, a resumed run would draw other dropout masks: PyTorch's own loader draws a seed
    for its workers.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenized = tokenize(rows, tokenizer, max_length=12, truncation="head", cache_dir=str(tmp_path))
    state = torch.get_rng_state()
    batches = [[Pick(0, (0,))], [Pick(1, (0,)), Pick(2, (0,))]]
    for num_workers in (0, 1):
        loader = batching.make_loader(tokenized, batches, tokenizer, num_workers=num_workers)
        assert [batch["row"].tolist() for batch in loader] == [[1], [2, 3]]
    assert torch.equal(torch.get_rng_state(), state)


def test_pooled_logits_are_the_mean_of_each_text():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    pooled = batching.pool_chunks(logits, torch.tensor([0, 0, 1, 2, 2]), 3)
    torch.testing.assert_close(pooled, torch.stack([logits[:2].mean(0), logits[2], logits[3:].mean(0)]))
    assert torch.equal(batching.pool_chunks(logits, torch.arange(5), 5), logits), (
        "one chunk per text changes nothing, to the bit"
    )
