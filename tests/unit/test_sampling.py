"""The filters against the library's own classes, bit for bit."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as library

from common.generation import sampling
from common.generation.sampling import Settings

INFINITY = float("inf")


def rows() -> dict[str, torch.Tensor]:
    """Logits (4, V) that are hard for a filter."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(4, 97, generator=generator) * 4
    banned = smooth.clone()
    banned[:, ::2] = -INFINITY
    single = torch.full((4, 97), -INFINITY)
    single[:, 5] = 1.0
    wide = torch.randn(4, 3000, generator=generator) * 4
    few = wide.masked_fill(wide < wide.topk(50).values[:, -1:], -INFINITY)
    return {
        "wide": wide,
        "few left of many": few,
        "few left, with ties": few.round(),
        "smooth": smooth,
        "bf16 with ties": smooth.bfloat16().float().round(),
        "all equal": torch.zeros(4, 97),
        "half -inf": banned,
        "one left": single,
        "huge": smooth * 1e4,
        "two values": (smooth > 0).float(),
    }


FILTERS = {
    "temperature": (sampling.scale_by_temperature, library.TemperatureLogitsWarper, (0.1, 0.7, 1.0, 3.0)),
    "top_k": (sampling.keep_top_k, library.TopKLogitsWarper, (1, 2, 50, 96, 97, 98, 100_000)),
    "top_p": (sampling.keep_top_p, library.TopPLogitsWarper, (0.0, 1e-9, 0.25, 0.5, 0.9, 0.999, 1.0)),
    "min_p": (sampling.keep_min_p, library.MinPLogitsWarper, (0.0, 0.05, 0.5, 1.0)),
    "typical_p": (sampling.keep_typical, library.TypicalLogitsWarper, (1e-6, 0.2, 0.5, 0.95, 0.999)),
    "epsilon": (sampling.keep_above_epsilon, library.EpsilonLogitsWarper, (1e-6, 3e-4, 0.02, 0.5, 0.999)),
    "eta": (sampling.keep_above_eta, library.EtaLogitsWarper, (1e-6, 3e-4, 0.02, 0.5, 0.999)),
}


@pytest.mark.parametrize("logits", rows().values(), ids=rows())
@pytest.mark.parametrize(
    "ours, theirs, value",
    [(ours, theirs, value) for ours, theirs, values in FILTERS.values() for value in values],
)
def test_a_filter_equals_the_librarys(ours, theirs, value, logits):
    before = logits.clone()
    assert torch.equal(ours(logits, value), theirs(value)(None, logits.clone()))
    assert torch.equal(logits, before)  # and leaves its input as it is


@pytest.mark.parametrize("place", range(0, 60, 3))
def test_a_filter_equals_the_librarys_where_the_mass_is_reached_exactly(place):
    """transformers #18976, #19839: the limit is itself one of the sums that it is compared
    with.
    """
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(place)) * 2
    logits = logits.round() if place % 2 else logits
    likely = logits.sort(descending=False).values.softmax(-1).cumsum(-1)[0, place].item()
    assert torch.equal(
        sampling.keep_top_p(logits, 1 - likely), library.TopPLogitsWarper(1 - likely)(None, logits)
    )
    surprise = -logits.log_softmax(-1)
    order = (surprise - (surprise * (-surprise).exp()).sum(-1, keepdim=True)).abs().argsort(-1)
    typical = min(logits.gather(-1, order).softmax(-1).cumsum(-1)[0, place].item(), 0.999)
    assert torch.equal(
        sampling.keep_typical(logits, typical), library.TypicalLogitsWarper(typical)(None, logits)
    )


NUMBERS = st.one_of(st.integers(-3, 3).map(float), st.floats(-50, 50, width=32), st.just(-INFINITY))


@settings(max_examples=150)
@given(
    st.lists(NUMBERS, min_size=2, max_size=40).filter(lambda row: max(row) > -INFINITY),
    st.sampled_from(sorted(FILTERS)),
    st.floats(0.01, 0.99),
)
def test_a_filter_equals_the_librarys_on_any_row(row, name, share):
    ours, theirs, _ = FILTERS[name]
    value = max(1, round(share * 50)) if name == "top_k" else share
    logits = torch.tensor([row])
    assert torch.equal(ours(logits, value), theirs(value)(None, logits.clone()))


@settings(max_examples=150)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=7, max_size=7), min_size=1, max_size=3),
    st.integers(1, 9),
    st.sampled_from([0.5, 1.1, 2.0]),
    st.integers(0, 6),
)
def test_history_filters_equal_the_librarys(ids, size, penalty, padding):
    ids, starts = torch.tensor(ids), torch.tensor([padding] * len(ids))
    logits = torch.randn(len(ids), 10, generator=torch.Generator().manual_seed(size))
    theirs = library.RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=starts)(
        ids, logits.clone()
    )
    assert torch.equal(sampling.penalize_repetition(logits, ids, penalty, starts), theirs)
    theirs = library.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(sampling.penalize_repetition(logits, ids, penalty), theirs)
    theirs = library.NoRepeatNGramLogitsProcessor(size)(ids, logits.clone())
    assert torch.equal(sampling.forbid_repeated_ngrams(logits, ids, size), theirs)
    # padding is no text: as if it were not there
    unpadded = library.NoRepeatNGramLogitsProcessor(size)(ids[:, padding:], logits.clone())
    assert torch.equal(sampling.forbid_repeated_ngrams(logits, ids, size, starts), unpadded)


@settings(max_examples=150)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 9), st.floats(-9, 9, width=32)), min_size=1, max_size=4, unique_by=min),
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=4),
)
def test_bias_and_banned_sequences_equal_the_librarys(ids, bias, sequences):
    bias = tuple({number: value for number, value in bias}.items())
    ids, logits = torch.tensor(ids), torch.randn(len(ids), 10, generator=torch.Generator().manual_seed(0))
    theirs = library.SequenceBiasLogitsProcessor([[[number], value] for number, value in bias])
    assert torch.equal(sampling.add_bias(logits, bias), theirs(ids, logits.clone()))
    options = Settings(banned=tuple(map(tuple, sequences)), end_ids=(2, 7))  # no end token alone is banned
    found = sampling.apply_filters(
        sampling.history_filters(options, prompt_length=3, starts=None, padding_is_text=True), logits, ids
    )
    if [sequence for sequence in sequences if sequence not in ([2], [7])]:
        expected = library.NoBadWordsLogitsProcessor(sequences, eos_token_id=[2, 7])(ids, logits.clone())
    else:
        expected = logits
    assert torch.equal(found, expected)


def test_presence_and_frequency_are_those_of_openai():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, where c counts the generated tokens."""
    options = Settings(presence_penalty=0.5, frequency_penalty=0.25)
    [stage] = sampling.history_filters(options, prompt_length=2, starts=None, padding_is_text=True)
    ids = torch.tensor([[0, 1, 4, 4, 2], [3, 3, 3, 0, 3]])
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    expected = logits.clone()
    for row, new in enumerate([[4, 4, 2], [3, 0, 3]]):
        for token in range(5):
            count = new.count(token)
            expected[row, token] -= count * 0.25 + (count > 0) * 0.5
    assert torch.allclose(stage.apply(logits, ids), expected)
    assert stage.name == "presence 0.5, frequency 0.25"


# what llama.cpp's tests expect of these distributions
@pytest.mark.parametrize("n, kept", [(1.0, [0.4, 0.3]), (0.0, [0.4]), (3.0, [0.4, 0.3, 0.2, 0.1])])
def test_top_n_sigma_keeps_what_is_near_the_top(n, kept):
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    for temperature in (0.5, 1.0, 4.0):  # the same tokens at any
        found = sampling.keep_top_n_sigma(logits / temperature, n)[0] * temperature
        left = sorted(found[found > -INFINITY].exp().tolist(), reverse=True)
        assert left == pytest.approx(kept)


@pytest.mark.parametrize("logits", rows().values(), ids=rows())
@pytest.mark.parametrize("n", [0.3, 1.0, 2.5])
def test_top_n_sigma_is_that_of_its_authors(logits, n):
    """Their two lines, over the tokens that are left."""
    found = sampling.keep_top_n_sigma(logits, n)
    for row, ours in zip(logits, found):
        left = row[row > -INFINITY]
        sigma = left.std() if len(left) > 1 else 0.0
        close = (row - (left.max() - n * sigma)).abs() < 1e-4
        expected = row.masked_fill(row < left.max() - n * sigma, -INFINITY)
        assert torch.equal(ours[~close], expected[~close])


XTC = [0.4, 0.3, 0.2, 0.1]  # and what llama.cpp's tests expect to be left at each threshold


@pytest.mark.parametrize(
    "threshold, left", [(0.09, [0.1]), (0.19, [0.2, 0.1]), (0.29, [0.3, 0.2, 0.1]), (0.39, XTC), (0.5, XTC)]
)
def test_xtc_leaves_the_least_likely_of_the_top_choices(threshold, left):
    logits = torch.tensor([XTC, XTC]).log()
    found = sampling.exclude_top_choices(logits, threshold, torch.tensor([True, False]))
    assert found[0][found[0] > -INFINITY].exp().tolist() == pytest.approx(left)
    assert torch.equal(found[1], logits[1])  # where it is not active


def test_xtc_is_active_as_often_as_it_is_asked_to_be():
    options = Settings(sample=True, xtc_probability=0.3, max_new_tokens=5000)
    names = sampling.name_rows(1, 2)
    active = torch.stack(list(sampling.xtc_steps(options, names)), -1)
    assert active.shape == (2, 5000)
    assert active.float().mean(-1).tolist() == pytest.approx([0.3, 0.3], abs=0.03)
    assert not torch.equal(active[0], active[1])
    uniforms = sampling.row_uniforms(names, 5000)[0]
    agreeing = ((uniforms < 0.3) == active[0]).float().mean()  # its numbers are not those of the draw
    assert 0.5 < agreeing < 0.7


def test_the_filter_xtc_is_active_in_the_rows_of_its_random_numbers():
    """Oracle: the plain function, token by token."""
    options = Settings(sample=True, xtc_probability=0.5, max_new_tokens=40)
    [stage] = sampling.distribution_filters(options, ["a", "b"])
    logits = torch.tensor([XTC, XTC]).log()
    for active in sampling.xtc_steps(options, ["a", "b"]):
        expected = sampling.exclude_top_choices(logits, options.xtc_threshold, active)
        assert torch.equal(stage.apply(logits, logits), expected)


@pytest.mark.parametrize("made", [0, 2, 3, 4])
def test_no_end_before_the_minimum_equals_the_librarys(made):
    options = Settings(min_new_tokens=3, end_ids=(2, 7))
    logits, ids = torch.randn(2, 10), torch.zeros(2, 5 + made, dtype=torch.long)
    [stage] = sampling.history_filters(options, prompt_length=5, starts=None, padding_is_text=True)
    assert torch.equal(
        stage.apply(logits, ids), library.MinNewTokensLengthLogitsProcessor(5, 3, [2, 7])(ids, logits.clone())
    )


def test_the_order_of_the_filters_is_the_documented_one():
    options = Settings(
        sample=True,
        temperature=0.5,
        top_k=5,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.5,
        epsilon_cutoff=0.01,
        eta_cutoff=0.02,
        top_n_sigma=2.0,
        xtc_probability=0.5,
        repetition_penalty=2.0,
        presence_penalty=1.0,
        logit_bias=((3, 1.0),),
        banned=((4, 5),),
        no_repeat_ngram_size=2,
        min_new_tokens=1,
        end_ids=(0,),
    )
    names = [
        stage.name
        for stage in [
            *sampling.history_filters(options, prompt_length=1, starts=None, padding_is_text=True),
            *sampling.distribution_filters(options, ["a row"]),
        ]
    ]
    assert names == [
        "logit bias",
        "repetition penalty 2",
        "no repeated 2-gram",
        "banned words",
        "min 1 new tokens",
        "presence 1, frequency 0",
        "top-n-sigma 2",
        "temperature 0.5",
        "top-k 5",
        "top-p 0.5",
        "min-p 0.1",
        "typical 0.5",
        "epsilon 0.01",
        "eta 0.02",
        "XTC 0.1",
    ]
    assert sampling.distribution_filters(dataclasses.replace(options, sample=False)) == []
