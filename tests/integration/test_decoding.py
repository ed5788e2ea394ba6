"""The decode loop against `model.generate`, token for token; rows against the same rows alone."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from transformers import GenerationConfig

import generate
from common.errors import UserError
from common.generation import decoding, explain, fast_sampling, lookup, sampling
from common.generation.beams import Beams
from common.generation.completion import Completion, Options, Prompt, Run, TextStream
from common.generation.decoding import Batch
from common.generation.fast_decoding import Kernel, load_library
from common.generation.language_model import LanguageModel
from common.generation.lookup import PromptLookup, TokenHistory
from common.generation.sampling import Sampler, Settings
from conftest import generate_on_cpu, heavy, quick
from language_models import KINDS, in_c, needs_compiler, save_tiny_model, tiny_language_model, train_byte_bpe

PROMPTS = [[7, 8, 9, 10, 11, 12, 9, 10], [4], list(range(20, 35)), [100, 101, 100, 101, 100]]
UNPADDED = [[7, 8, 9, 10, 11], [100, 101, 100, 101, 100], [30, 31, 32, 33, 34]]
ALL_TEXTS = (PROMPTS[:1], PROMPTS, UNPADDED)
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
    "bias, bans and penalties": {
        "logit_bias": ((5, -2.0), (40, 3.0), (41, 3.0)),
        "banned": ((40, 41), (7,), (3,), (120,)),
        "presence_penalty": 1.5,
        "frequency_penalty": 0.5,
    },
    "epsilon and eta": {"sample": True, "epsilon_cutoff": 0.002, "eta_cutoff": 0.02},
    "top-n-sigma and XTC": {
        "sample": True,
        "top_n_sigma": 2.0,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.05,
    },
    "all": {
        "sample": True,
        "temperature": 1.3,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.02,
        "typical_p": 0.95,
        "epsilon_cutoff": 1e-4,
        "eta_cutoff": 1e-4,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 5,
    },
}


def ours(
    language_model: LanguageModel,
    prompts: list[list[int]],
    settings: Settings,
    sampler_of: Callable[[Settings, Batch], Sampler],
) -> list[list[int]]:
    """Return each row's new tokens, up to its end."""
    batch = decoding.left_pad(prompts, language_model, room=settings.max_new_tokens)
    rows: list[list[int]] = [[] for _ in prompts]
    for step in generate.decode(language_model, batch, sampler_of(settings, batch), settings):
        for row, ended, token in zip(rows, batch.ended, step.tokens):
            assert not ended or token == language_model.pad_id
            row.extend([] if ended else [token])
    return rows


def exact(seed: int) -> Callable[[Settings, Batch], Sampler]:
    """Return the exact sampler of the script, the fast one."""
    return lambda settings, batch: fast_sampling.make_sampler(
        settings, prompt_length=batch.length, starts=batch.starts, seed=seed
    )


def plain(seed: int) -> Callable[[Settings, Batch], Sampler]:
    """Return the plain exact sampler."""
    return lambda settings, batch: sampling.make_sampler(
        settings, prompt_length=batch.length, starts=batch.starts, seed=seed
    )


def independent(*numbers: int) -> Callable[[Settings, Batch], Sampler]:
    """Return the independent sampler of the script for the prompts of these numbers, seed 3."""
    names = [f"3/{number}/0" for number in numbers]
    return lambda settings, batch: fast_sampling.make_sampler(
        settings, prompt_length=batch.length, starts=batch.starts, seed=names
    )


def library(
    language_model: LanguageModel, prompts: list[list[int]], options: Options, seed: int
) -> list[list[int]]:
    """Return the rows of `model.generate`, each up to its first end id."""
    numbered = [Prompt(number, "", ids) for number, ids in enumerate(prompts)]
    rows = explain.library_tokens(
        language_model, explain.library_model(language_model), numbered, options, seed=seed
    )
    return [until_end(row, options.settings.end_ids) for row in rows]


def until_end(row: list[int], ends: tuple[int, ...]) -> list[int]:
    """Return a row up to its first end id."""
    end = next((index for index, token in enumerate(row) if token in ends), len(row))
    return row[: end + 1]


def settings_of(flags: dict, language_model: LanguageModel) -> Settings:
    """Return the settings of the tests, with some changed."""
    return Settings(max_new_tokens=NEW_TOKENS, end_ids=language_model.end_ids, **flags)


@pytest.mark.parametrize(
    "kind, dtype, texts, seeds",
    [
        ("llama", torch.float32, (PROMPTS,), (0,)),
        heavy("llama", torch.float32, ALL_TEXTS, (0,)),
        heavy("mistral", torch.float32, ALL_TEXTS, (0,)),
        heavy("gpt2", torch.bfloat16, ALL_TEXTS, (0,)),
        heavy("llama", torch.bfloat16, ALL_TEXTS, (0, 1)),
        heavy("mistral", torch.bfloat16, ALL_TEXTS, (0, 1)),
        heavy("gpt2", torch.float32, ALL_TEXTS, (0, 1)),
    ],
)
def test_every_token_is_the_one_of_generate(
    kind: str, dtype: torch.dtype, texts: tuple[list[list[int]], ...], seeds: tuple[int, ...]
) -> None:
    """3 models x 2 precisions x one text, 4 left-padded and 3 unpadded ones x 13 settings x one
    seed or two: 351 runs.
    """
    language_model, ended_early, different = tiny_language_model(kind, dtype), 0, []
    for (name, flags), prompts, seed in itertools.product(SETTINGS.items(), texts, seeds):
        settings = settings_of(flags, language_model)
        rows = ours(language_model, prompts, settings, exact(seed))
        ended_early += sum(len(row) < NEW_TOKENS for row in rows)
        if rows != library(language_model, prompts, Options(settings), seed):
            different.append((name, prompts, seed))
    assert different == []
    assert ended_early > 0  # else nothing of what follows an end was tested


@pytest.fixture(scope="module")
def kernel(cache_dir) -> Kernel:
    """The step in C, on one thread: another number gives the same bits (test_decoder.py), and two
    tests run at a time.
    """
    return Kernel(load_library(str(cache_dir)), 1)


@needs_compiler
@pytest.mark.parametrize(
    "kind, stored, texts, seeds",
    [
        ("llama", torch.float32, (PROMPTS,), (0,)),
        heavy("llama", torch.float32, ALL_TEXTS, (0,)),
        heavy("mistral", torch.bfloat16, ALL_TEXTS, (0,)),
        heavy("llama", torch.bfloat16, ALL_TEXTS, (0, 1)),
        heavy("mistral", torch.float32, ALL_TEXTS, (0, 1)),
    ],
)
def test_every_token_of_the_step_in_c_is_the_one_of_generate(kind, stored, texts, seeds, kernel):
    """The same matrix, 234 runs: its sums are rounded in another order, and no draw is that close."""
    language_model, different = tiny_language_model(kind), []
    for parameter in language_model.model.module.parameters():
        parameter.data = parameter.data.to(stored).float()
    fast = in_c(language_model, kernel, stored)
    for (name, flags), prompts, seed in itertools.product(SETTINGS.items(), texts, seeds):
        settings = settings_of(flags, language_model)
        if ours(fast, prompts, settings, exact(seed)) != library(
            language_model, prompts, Options(settings), seed
        ):
            different.append((name, prompts, seed))
    assert different == []


@pytest.mark.parametrize("kind", quick(KINDS, "llama"))
def test_the_plain_draw_gives_the_same_tokens(kind: str) -> None:
    language_model = tiny_language_model(kind)
    for flags in SETTINGS.values():
        settings = settings_of(flags, language_model)
        rows = [ours(language_model, PROMPTS, settings, sampler(1)) for sampler in (exact, plain)]
        assert rows[0] == rows[1]


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
OF_DRAWS = ("epsilon_cutoff", "eta_cutoff", "top_h")  # what greedy texts don't depend on


def own_defaults() -> list:
    """Return each of them with flags: by default greedy, or drawn where only draws depend on it."""
    drawn = {"sample": True, "temperature": 1.5}
    return [
        pytest.param(flags, name, id=f"{way}-{name}", marks=[] if is_quick else pytest.mark.slow)
        for name in OWN_DEFAULTS
        for way, flags, is_quick in (("greedy", {}, name not in OF_DRAWS), ("drawn", drawn, name in OF_DRAWS))
    ]


@pytest.mark.parametrize("flags, name", own_defaults())
def test_generate_is_asked_for_what_the_flags_say_and_nothing_else(name, flags):
    """What a call leaves open, generate takes from the model's own generation config; afterwards
    the model has it again.
    """
    language_model = tiny_language_model("llama")
    own = language_model.model.module.generation_config = GenerationConfig(
        pad_token_id=0, eos_token_id=[3, 5], **{name: OWN_DEFAULTS[name]}
    )
    settings = settings_of(flags, language_model)
    theirs = library(language_model, PROMPTS, Options(settings), 3)
    assert ours(language_model, PROMPTS, settings, exact(3)) == theirs
    assert language_model.model.module.generation_config is own


BEAMS = [
    Beams(2),
    Beams(4, 0.0, True),
    Beams(3, 2.0, "never"),
    Beams(4, -1.0),
    Beams(5, 1.0, True),
    Beams(3, 0.6),
]
BEAM_SETTINGS = {
    "plain": {},
    "history": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "presence_penalty": 0.5},
    "a minimum": {"min_new_tokens": 9, "logit_bias": ((3, 4.0), (5, 4.0))},
    "quick ends": {"logit_bias": ((3, 6.0), (5, 5.0))},
}


ONE_OR_MORE = (PROMPTS[:1], PROMPTS)


@pytest.mark.parametrize(
    "kind, texts",
    [
        ("mistral", (PROMPTS,)),
        *(
            pytest.param(kind, ONE_OR_MORE, marks=[pytest.mark.slow, needs_compiler])
            for kind in ("llama in C", "mistral in C")
        ),
        heavy("mistral", ONE_OR_MORE),
        heavy("llama", ONE_OR_MORE),
        heavy("gpt2", ONE_OR_MORE),
    ],
)
def test_beams_are_those_of_generate(kind, texts, request):
    """6 searches x one text and 4 left-padded ones x 4 settings for each model; some texts end
    before the limit. All beams of a prompt, not the best one alone.
    """
    name, _, is_in_c = kind.partition(" ")
    language_model, tokenizer = tiny_language_model(name, scale=2.0), train_byte_bpe()
    different, lengths = [], set()
    library_model = explain.library_model(language_model)
    if is_in_c:
        language_model = in_c(language_model, request.getfixturevalue("kernel"))
    for beams, prompts, flags in itertools.product(BEAMS, texts, BEAM_SETTINGS.values()):
        options = Options(
            dataclasses.replace(settings_of(flags, language_model), max_new_tokens=14),
            num_samples=beams.size,
            beams=beams,
        )
        run = Run(language_model, options)
        numbered = [Prompt(number, "", ids) for number, ids in enumerate(prompts)]
        rows = [
            Completion(prompt, sample, TextStream(tokenizer))
            for prompt in numbered
            for sample in range(beams.size)
        ]
        list(generate.complete(run, rows, seed=0))
        theirs = explain.library_tokens(language_model, library_model, numbered, options, seed=0)
        found = [row.token_ids for row in rows]
        lengths |= {len(row) for row in found}
        if found != theirs:
            different.append((beams, prompts, flags))
    assert different == []
    assert len(lengths) > 5 and 14 in lengths


def test_several_samples_are_those_of_num_return_sequences():
    language_model = tiny_language_model("llama")
    settings = settings_of({"sample": True, "top_k": 30}, language_model)
    theirs = library(language_model, [PROMPTS[0], PROMPTS[2]], Options(settings, num_samples=3), 5)
    rows = ours(language_model, [PROMPTS[0]] * 3 + [PROMPTS[2]] * 3, settings, exact(5))
    assert rows == theirs and len({tuple(row) for row in rows}) == 6


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
    language_model = tiny_language_model(kind)
    settings = settings_of(flags, language_model)
    together = ours(language_model, PROMPTS, settings, independent(*range(len(PROMPTS))))
    for number, prompt in enumerate(PROMPTS):
        alone = ours(language_model, [prompt], settings, independent(number))
        assert alone == [together[number]]


def test_padding_is_no_text_to_the_independent_sampler():
    """After 0, which pads here, 4 was never written: the independent sampler may choose it, whereas
    generate counts the padding before the first 4.
    """
    language_model = tiny_language_model("llama")
    batch, settings = (
        decoding.left_pad([[4, 0], [7, 8, 9, 10]], language_model, room=1),
        settings_of({"no_repeat_ngram_size": 2}, language_model),
    )
    logits = torch.zeros(2, 211).index_fill(-1, torch.tensor([4]), 9.0).index_fill(-1, torch.tensor([6]), 5.0)
    assert independent(0, 1)(settings, batch)(logits, batch.tokens).tolist() == [4, 4]
    assert exact(0)(settings, batch)(logits, batch.tokens).tolist() == [6, 4]


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
            last = decoding.step(language_model, batch, [token])
        assert torch.allclose(
            last,
            decoding.prefill(language_model, decoding.left_pad([PROMPTS[2]], language_model, room=0)),
            atol=1e-4,
        )


def test_logits_that_are_no_numbers_are_refused():
    """argmax would pick NaN without a word."""
    language_model = tiny_language_model("llama")
    with torch.no_grad():
        language_model.model.module.lm_head.weight[9] = float("nan")
    settings = settings_of({}, language_model)
    with pytest.raises(UserError, match="NaN.*--precision fp32"):
        ours(language_model, PROMPTS[:1], settings, exact(0))


@pytest.mark.parametrize("kind", quick(KINDS, "mistral"))
@pytest.mark.parametrize(
    "flags",
    [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 4, "min_new_tokens": 20}],
    ids=["greedy", "penalty", "n-grams"],
)
@pytest.mark.parametrize("ahead", [heavy(1), 3, heavy(8)])
def test_looked_up_tokens_are_greedys(kind, flags, ahead):
    """A model that repeats itself: guesses are both right and wrong. Wrong ones must leave no
    trace in the cache, also beyond a sliding window.
    """
    language_model = tiny_language_model(kind, scale=1.0)
    language_model = dataclasses.replace(language_model, end_ids=())
    num_guessed = num_accepted = 0
    for prompt in (*PROMPTS, [30, 31, 32, 33, 34, 35, 30, 31, 32, 33, 34, 99, 30, 31]):
        settings = dataclasses.replace(settings_of(flags, language_model), max_new_tokens=60)
        greedy = ours(language_model, [prompt], settings, exact(0))
        batch = decoding.left_pad([prompt], language_model, room=60)
        lookup = PromptLookup(ahead)
        assert [[step.tokens[0] for step in lookup.decode(language_model, batch, settings)]] == greedy
        num_guessed += lookup.num_guessed
        num_accepted += lookup.num_accepted
    # a penalty can make each guess wrong
    assert num_accepted < num_guessed and (num_accepted > 0 or flags)


def test_as_many_tokens_are_guessed_as_were_right_or_twice_as_many(monkeypatch):
    """Oracle: the rule, over the tokens that greedy decoding chooses; with guesses of which all,
    some and none are right.
    """
    language_model = dataclasses.replace(tiny_language_model("llama", scale=1.0), end_ids=())
    settings = dataclasses.replace(settings_of({}, language_model), max_new_tokens=80)
    counted, check, ahead, seen = [], lookup.check_guess, 6, set()

    def count(model, batch, tokens):
        counted.append(len(tokens) - 1)
        return check(model, batch, tokens)

    monkeypatch.setattr(lookup, "check_guess", count)
    for prompt in (*PROMPTS, [30, 31, 32, 33, 34, 35, 30, 31, 32, 33, 34, 99, 30, 31]):
        [greedy] = ours(language_model, [prompt], settings, exact(0))
        history, num_next, expected, done = TokenHistory([*prompt, greedy[0]]), 1, [], 1
        while done < len(greedy):
            guess = history.guess(min(num_next, len(greedy) - done - 1))
            right = 0
            while right < len(guess) and guess[right] == greedy[done + right]:
                right += 1
            if guess:
                seen.add("all" if right == len(guess) else "some" if right else "none")
                num_next = min(2 * right, ahead) if right == len(guess) else max(right, 1)
            expected.append(len(guess))
            for token in greedy[done : done + right + 1]:
                history.add(token)
            done += right + 1
        seen |= {"the most"} if ahead in expected else set()
        counted.clear()
        batch = decoding.left_pad([prompt], language_model, room=80)
        list(PromptLookup(ahead).decode(language_model, batch, settings))
        assert counted == expected
    assert seen == {"all", "some", "none", "the most"}


def test_guesses_are_what_followed_the_longest_run_that_occurred_before():
    """Oracle: a search by eye over the whole history."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (300,), generator=generator).tolist()
    history = TokenHistory(tokens[:5])
    for end in range(5, len(tokens)):
        expected = []
        for size in range(TokenHistory.LONGEST, TokenHistory.SHORTEST - 1, -1):
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


@needs_compiler
def test_beams_read_a_prompt_once_in_c(tmp_path, monkeypatch, capsys):
    """Four beams of one text cost no four readings of its prompt; the texts are those of generate."""
    read, prefill = [], decoding.prefill

    def counted(model, batch):
        read.append(len(batch.ids))
        return prefill(model, batch)

    monkeypatch.setattr(decoding, "prefill", counted)
    folder = save_tiny_model(tmp_path / "tiny")
    code = generate_on_cpu(["--prompt", "the fox", "--num-beams", 4, "--check"], folder, 8)
    assert (code, read) == (0, [1]), capsys.readouterr().err
