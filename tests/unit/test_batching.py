"""The batch order, its shares, and tokenisation, against their definitions."""

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.training import batching

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=400)


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, batch_size=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), epoch=st.integers(1, 50), buckets=st.booleans())
def test_an_epoch_holds_each_row_once_in_full_batches_and_depends_on_nothing_else(lengths, batch_size, seed, epoch, buckets):
    options = {"batch_size": batch_size, "seed": seed, "epoch": epoch, "buckets": buckets}
    order = batching.batch_order(lengths, **options)
    assert sorted(np.concatenate(order).tolist()) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in order[:-1]) and 1 <= len(order[-1]) <= batch_size
    np.random.seed(epoch)  # noqa: NPY002  the global generator must not matter
    again = batching.batch_order(lengths, **options)
    assert all(np.array_equal(batch, other) for batch, other in zip(order, again, strict=True))


@pytest.mark.parametrize("buckets", [True, False])
def test_the_order_changes_with_the_epoch_and_the_seed(buckets):
    orders = [np.concatenate(batching.batch_order(range(1, 101), batch_size=8, seed=seed, epoch=epoch, buckets=buckets)).tolist()
              for seed, epoch in ((0, 1), (0, 2), (1, 1))]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]


def test_buckets_pad_less_and_are_not_sorted_over_the_epoch():
    lengths = np.random.default_rng(0).integers(5, 500, 2000)
    order = batching.batch_order(lengths, batch_size=16, seed=0, epoch=1, buckets=True)
    random_order = batching.batch_order(lengths, batch_size=16, seed=0, epoch=1, buckets=False)
    assert batching.padding_share(lengths, order) < 0.04 < 0.3 < batching.padding_share(lengths, random_order)
    means = np.array([lengths[batch].mean() for batch in order])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3  # neither rising nor falling over the epoch


def test_padding_share_counts_positions():
    assert batching.padding_share([1, 3, 4, 4], [np.array([0, 1]), np.array([2, 3])]) == pytest.approx(2 / 14)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 60), batch_size=st.integers(1, 20), world_size=st.integers(1, 4))
def test_the_processes_share_each_global_batch_and_all_run_each_step(count, batch_size, world_size):
    batches = batching.batch_order([1] * count, batch_size=batch_size, seed=0, epoch=1, buckets=False)
    shares = [batching.share_of_rank(batches, rank, world_size) for rank in range(world_size)]
    for step, batch in enumerate(batches):
        parts = [share[step] for share in shares]
        assert all(parts), "a process without a row would leave the others waiting"
        assert sorted(number for part in parts for number in part if number >= 0) == sorted(batch.tolist())


def test_evaluation_goes_from_long_to_short_through_each_row():
    lengths = [3, 9, 1, 9, 5]
    order = np.concatenate(batching.evaluation_order(lengths, batch_size=2))
    assert order.tolist() == [1, 3, 4, 0, 2]


@pytest.fixture
def rows():
    texts = ["the film was good", "a story with actors that I saw on monday and it was awful " * 3, "grim"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"]), "row": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"text": texts, "label": [1, 0, 0], "row": [1, 2, 3]}, features=features)


def test_tokenize_truncates_counts_and_equals_the_tokenizer(rows, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenized = batching.tokenize(rows, tokenizer, max_length=12, cache_dir=str(tmp_path))
    for row, text in zip(tokenized, rows["text"]):
        whole = tokenizer(text)["input_ids"]
        assert row["input_ids"] == tokenizer(text, truncation=True, max_length=12)["input_ids"]
        assert row["num_tokens"] == len(whole) and row["length"] == len(row["input_ids"]) == min(len(whole), 12)


def test_tokenize_reuses_its_file_until_texts_length_or_tokenizer_change(rows, tiny_model, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    first = batching.tokenize(rows, tokenizer, max_length=12, cache_dir=str(tmp_path))
    tokenizer("a call with other settings", padding="max_length", max_length=20, truncation=True)
    batching.tokenize(rows, tokenizer, max_length=12, cache_dir=str(tmp_path))
    assert len(list(tmp_path.rglob("*.arrow"))) == 1, "a call in between changes the tokenizer's state, not what it does"
    batching.tokenize(rows, tokenizer, max_length=13, cache_dir=str(tmp_path))
    batching.tokenize(rows.map(lambda row: {"text": row["text"] + "!"}, load_from_cache_file=False), tokenizer, max_length=12, cache_dir=str(tmp_path))
    tokenizer.add_tokens(["monday"])
    batching.tokenize(rows, tokenizer, max_length=12, cache_dir=str(tmp_path))
    assert len(list(tmp_path.rglob("*.arrow"))) == 4
    assert first.cache_files[0]["filename"].startswith(str(tmp_path))


def test_a_filler_row_counts_nowhere(rows, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenized = batching.tokenize(rows, tokenizer, max_length=12, cache_dir=str(tmp_path))
    batch = next(iter(batching.loader(tokenized, [[1, 2, ~0]], tokenizer)))
    assert batch["labels"].tolist() == [0, 0, batching.IGNORED_LABEL]
    assert batch["row"].tolist() == [2, 3, 1]
    assert batch["attention_mask"].sum(1).tolist() == tokenized[[1, 2, 0]]["length"]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
