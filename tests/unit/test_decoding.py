"""The decoder against `model.generate`, token for token; rows against the same rows alone."""

import dataclasses
import itertools

import pytest
import torch
from transformers import GenerationConfig

from common.errors import UserError
from common.generation import check, decoding, lookup
from common.generation.completion import Options, Prompt
from common.generation.sampling import Settings
from language_models import KINDS, tiny_language_model

PROMPTS = [[7, 8, 9, 10, 11, 12, 9, 10], [4], list(range(20, 35)), [100, 101, 100, 101, 100]]
UNPADDED = [[7, 8, 9, 10, 11], [100, 101, 100, 101, 100], [30, 31, 32, 33, 34]]
NEW_TOKENS = 24
SETTINGS = {
    "greedy": {},
    "repetition penalty": {"repetition_penalty": 1.3},
    "n-grams and a minimum": {"no_repeat_ngram_size": 2, "min_new_tokens": 12},
    "temperature": {"sample": True, "temperature": 0.7},
    "top-k": {"sample": True, "top_k": 20},
    "top-k above the vocabulary": {"sample": True, "top_k": 999},
    "top-p": {"sample": True, "top_p": 0.9},
    "min-p": {"sample": True, "min_p": 0.1},
    "typical": {"sample": True, "typical_p": 0.8},
    "all": {
        "sample": True,
        "temperature": 1.3,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.02,
        "typical_p": 0.95,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 5,
    },
}


def ours(language_model, prompts, settings, choose_with) -> list[list[int]]:
    """Return each row's new tokens, up to its end."""
    batch = decoding.left_pad(prompts, language_model, room=settings.max_new_tokens)
    found = [[] for _ in prompts]
    for step in decoding.decode(language_model, batch, choose_with(settings, batch), settings):
        # ended rows get padding
        assert all(live or token == language_model.pad_id for live, token in zip(step.live, step.tokens))
        for row, live, token in zip(found, step.live, step.tokens):
            row.extend([token] if live else [])
    return found


def exact(seed: int):
    return lambda settings, batch: decoding.exact_sampler(settings, batch, seed)


def until_end(row: list[int], ends: tuple[int, ...]) -> list[int]:
    """Return a row of `generate` up to its first end id."""
    place = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: place + 1]


def settings_of(flags: dict, language_model) -> Settings:
    return Settings(max_new_tokens=NEW_TOKENS, end_ids=language_model.end_ids, **flags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_the_one_of_generate(kind, dtype):
    """3 models x 2 precisions x one text, left-padded 4 and unpadded 3 x 10 settings x 2 seeds:
    360 runs.
    """
    language_model, ended_early, different = tiny_language_model(kind, dtype), 0, []
    for (name, flags), prompts, seed in itertools.product(
        SETTINGS.items(), (PROMPTS[:1], PROMPTS, UNPADDED), (0, 1)
    ):
        settings = settings_of(flags, language_model)
        found = ours(language_model, prompts, settings, exact(seed))
        theirs = check.generate(
            language_model,
            [Prompt(number, "", ids) for number, ids in enumerate(prompts)],
            Options(settings),
            seed=seed,
        )
        ended_early += sum(len(row) < NEW_TOKENS for row in found)
        different += (
            [(name, prompts, seed)] if found != [until_end(row, settings.end_ids) for row in theirs] else []
        )
    assert different == []
    assert ended_early > 0  # else nothing of what follows an end was tested


OWN_DEFAULTS = {  # of a model's generation config: no flag asks for any of them
    "suppress_tokens": list(range(20, 120)),
    "begin_suppress_tokens": list(range(20, 120)),
    "bad_words_ids": [[number] for number in range(20, 120)],
    "epsilon_cutoff": 0.02,
    "eta_cutoff": 0.05,
    "top_h": 0.3,
    "forced_eos_token_id": 3,
    "exponential_decay_length_penalty": (2, 9.0),
    "return_dict_in_generate": True,
    "sequence_bias": [[[9], 50.0]],
    "guidance_scale": 2.0,
}


@pytest.mark.parametrize("name", OWN_DEFAULTS)
@pytest.mark.parametrize("flags", [{}, {"sample": True, "temperature": 1.5}], ids=["greedy", "drawn"])
def test_generate_is_asked_for_what_the_flags_say_and_nothing_else(name, flags):
    """What a call leaves open, generate takes from the model's own generation config; afterwards
    the model has it again.
    """
    language_model = tiny_language_model("llama")
    own = language_model.model.generation_config = GenerationConfig(
        pad_token_id=0, eos_token_id=[3, 5], **{name: OWN_DEFAULTS[name]}
    )
    settings = settings_of(flags, language_model)
    theirs = check.generate(
        language_model,
        [Prompt(number, "", ids) for number, ids in enumerate(PROMPTS)],
        Options(settings),
        seed=3,
    )
    assert ours(language_model, PROMPTS, settings, exact(3)) == [
        until_end(row, settings.end_ids) for row in theirs
    ]
    assert language_model.model.generation_config is own


def test_several_samples_are_those_of_num_return_sequences():
    language_model = tiny_language_model("llama")
    settings = settings_of({"sample": True, "top_k": 30}, language_model)
    theirs = check.generate(
        language_model,
        [Prompt(0, "", PROMPTS[0]), Prompt(1, "", PROMPTS[2])],
        Options(settings, num_samples=3),
        seed=5,
    )
    found = ours(language_model, [PROMPTS[0]] * 3 + [PROMPTS[2]] * 3, settings, exact(5))
    assert (
        found == [until_end(row, settings.end_ids) for row in theirs]
        and len({tuple(row) for row in found}) == 6
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"sample": True, "top_k": 30, "temperature": 1.2},
        {"sample": True, "top_p": 0.95, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    ],
    ids=["greedy", "top-k", "top-p and history"],
)
def test_a_text_does_not_depend_on_its_neighbours(kind, flags):
    """In fp32; in 16 bits the sums of a larger batch are rounded in another way (transformers
    #25420).
    """
    language_model, rows = tiny_language_model(kind), [(number, 0) for number in range(len(PROMPTS))]
    settings = settings_of(flags, language_model)
    together = ours(
        language_model,
        PROMPTS,
        settings,
        lambda settings, batch: decoding.fast_sampler(settings, batch, 3, rows),
    )
    for number, prompt in enumerate(PROMPTS):
        alone = ours(
            language_model,
            [prompt],
            settings,
            lambda settings, batch, row=rows[number]: decoding.fast_sampler(settings, batch, 3, [row]),
        )
        assert alone == [together[number]]


def test_padding_is_no_text_to_the_fast_sampler():
    """After 0, which pads here, 4 was never written: the fast sampler may choose it, whereas
    generate counts the padding before the first 4.
    """
    language_model = tiny_language_model("llama")
    batch, settings = (
        decoding.left_pad([[4, 0], [7, 8, 9, 10]], language_model, room=1),
        settings_of({"no_repeat_ngram_size": 2}, language_model),
    )
    logits = torch.zeros(2, 211).index_fill(-1, torch.tensor([4]), 9.0).index_fill(-1, torch.tensor([6]), 5.0)
    assert decoding.fast_sampler(settings, batch, 0, [(0, 0), (1, 0)])(logits, batch, 0).tolist() == [4, 4]
    assert decoding.exact_sampler(settings, batch, 0)(logits, batch, 0).tolist() == [6, 4]


def test_padding_changes_no_logit():
    """transformers #18478, #29419: positions must count a row's own tokens."""
    for kind in KINDS:
        language_model = tiny_language_model(kind)
        with torch.inference_mode():
            together = decoding.prefill(language_model, decoding.left_pad(PROMPTS, language_model, room=0))
            alone = torch.cat(
                [
                    decoding.prefill(language_model, decoding.left_pad([prompt], language_model, room=0))
                    for prompt in PROMPTS
                ]
            )
        # a fully masked row would be NaN (#32390)
        assert torch.allclose(together, alone, atol=1e-4) and together.isfinite().all()


def test_steps_give_what_one_pass_over_all_tokens_gives():
    """The cache holds what was computed before: no token is seen twice or not at all."""
    language_model = tiny_language_model("llama")
    with torch.inference_mode():
        batch = decoding.left_pad([PROMPTS[2][:10]], language_model, room=5)
        decoding.prefill(language_model, batch)
        for token in PROMPTS[2][10:]:
            last = decoding.step(language_model, batch, torch.tensor([token]))
        assert torch.allclose(
            last,
            decoding.prefill(language_model, decoding.left_pad([PROMPTS[2]], language_model, room=0)),
            atol=1e-4,
        )


def test_logits_that_are_no_numbers_are_refused():
    """argmax would pick NaN without a word."""
    language_model = tiny_language_model("llama")
    with torch.no_grad():
        language_model.model.lm_head.weight[9] = float("nan")
    settings = settings_of({}, language_model)
    with pytest.raises(UserError, match="NaN.*--precision fp32"):
        ours(language_model, PROMPTS[:1], settings, exact(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "flags",
    [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 4, "min_new_tokens": 20}],
    ids=["greedy", "penalty", "n-grams"],
)
@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_looked_up_tokens_are_greedys(kind, flags, ahead):
    """A model that repeats itself: guesses are both right and wrong. Wrong ones must leave no
    trace in the cache, also beyond a sliding window.
    """
    language_model = tiny_language_model(kind, scale=1.0)
    language_model = dataclasses.replace(language_model, end_ids=())
    guesses = lookup.Guesses()
    for prompt in (*PROMPTS, [30, 31, 32, 33, 34, 35, 30, 31, 32, 33, 34, 99, 30, 31]):
        settings = dataclasses.replace(settings_of(flags, language_model), max_new_tokens=60)
        greedy = ours(language_model, [prompt], settings, exact(0))
        batch = decoding.left_pad([prompt], language_model, room=60)
        assert [
            [
                step.tokens[0]
                for step in lookup.decode(language_model, batch, settings, ahead=ahead, guesses=guesses)
            ]
        ] == greedy
    # a penalty can make each guess wrong
    assert guesses.right < guesses.offered and (guesses.right > 0 or flags)


def test_guesses_are_what_followed_the_longest_run_that_occurred_before():
    """Oracle: a search by eye over the whole history."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (300,), generator=generator).tolist()
    history = lookup.History(tokens[:5])
    for end in range(5, len(tokens)):
        expected = []
        for size in range(lookup.LONGEST, lookup.SHORTEST - 1, -1):
            places = [
                place
                for place in range(size, end)
                if tokens[place - size : place] == tokens[end - size : end]
            ]
            if places:
                expected = tokens[places[-1] : min(places[-1] + 4, end)]
                break
        assert history.guess(4) == expected
        history.add(tokens[end])


def test_a_text_may_end_at_each_of_several_ids():
    """transformers #31362."""
    language_model = tiny_language_model("llama")
    settings = settings_of({"sample": True}, language_model)
    found = [ours(language_model, PROMPTS, settings, exact(seed)) for seed in range(12)]
    assert {row[-1] for rows in found for row in rows if len(row) < NEW_TOKENS} == {3, 5}
