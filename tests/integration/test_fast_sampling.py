"""The draws, plain and fast: against each other, the library's own steps, and exact
probabilities.
"""

import dataclasses
from types import ModuleType

import pytest
import scipy.stats
import torch
from transformers.generation import logits_process as library

from common.generation import fast_sampling, sampling
from common.generation.sampling import Sampler, Settings
from conftest import heavy

INFINITY = float("inf")
DRAWS = 200_000
VOCABULARY = 49_152


def draw_as_the_library(logits: torch.Tensor, options: Settings, generator: torch.Generator) -> torch.Tensor:
    """Return tokens (B) by the library's own processors in its order, softmax and multinomial."""
    steps = [library.TemperatureLogitsWarper(options.temperature)] if options.temperature != 1 else []
    steps += [library.TopKLogitsWarper(options.top_k)] if options.top_k else []
    steps += [library.TopPLogitsWarper(options.top_p)] if options.top_p < 1 else []
    steps += [library.MinPLogitsWarper(options.min_p)] if options.min_p else []
    steps += [library.TypicalLogitsWarper(options.typical_p)] if options.typical_p < 1 else []
    steps += [library.EpsilonLogitsWarper(options.epsilon_cutoff)] if options.epsilon_cutoff else []
    steps += [library.EtaLogitsWarper(options.eta_cutoff)] if options.eta_cutoff else []
    if options.top_n_sigma:
        logits = sampling.keep_top_n_sigma(logits, options.top_n_sigma)
    for step in steps:
        logits = step(None, logits)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("seed", range(20))
def test_the_noise_is_what_exponential_and_multinomial_draw(seed):
    """Bit for bit, and the generator stands where it would stand; from the seed on and from any
    later state.
    """
    ours, theirs, third = (torch.Generator().manual_seed(seed) for _ in range(3))
    assert fast_sampling.noise_is_known("cpu") and not fast_sampling.noise_is_known("cuda")
    for shape in ((1, 7), (3, 10_000), (seed + 1, 501)):
        probabilities = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)
        found = fast_sampling.noise(fast_sampling.random_bits(torch.Size(shape), ours))
        assert torch.equal(found, torch.empty(shape).exponential_(1, generator=theirs))
        assert torch.equal(
            (probabilities / found).argmax(-1), torch.multinomial(probabilities, 1, generator=third)[:, 0]
        )
        assert torch.equal(ours.get_state(), theirs.get_state()) and torch.equal(
            ours.get_state(), third.get_state()
        )


EXACT = {
    "top-k and top-p": {"top_k": 50, "top_p": 0.92},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "plain": {"temperature": 0.9},
    "all": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    "all and typical": {"top_k": 40, "typical_p": 0.9},
    "low top-p": {"top_p": 1e-7},
    "lowest top-p": {"top_p": 5e-324, "top_k": 50},
    "nearly all": {"top_k": 100, "top_p": 0.999999},
    "epsilon": {"epsilon_cutoff": 0.001},
    "eta": {"eta_cutoff": 0.002, "temperature": 0.8},
    "top-n-sigma": {"top_n_sigma": 1.5, "temperature": 1.5},
    "all that are new": {"top_n_sigma": 2.0, "top_p": 0.95, "epsilon_cutoff": 0.002, "eta_cutoff": 0.02},
    "all that are new, with top-k": {"top_n_sigma": 3.0, "top_k": 60, "eta_cutoff": 0.005, "min_p": 0.01},
}


DEFAULT_EXACT = ("all", "all that are new")


def synthetic_rows(number: int, rows: int) -> torch.Tensor:
    """Return logits (rows, V) in bf16's numbers, as a language model's head gives them: a long
    tail with ties everywhere, flat or with a few peaks.
    """
    generator = torch.Generator().manual_seed(number)
    logits = torch.randn(rows, VOCABULARY, generator=generator) * (2.6, 1.5, 3.5)[number % 3] + 8
    logits[:, :40] += torch.rand(rows, 40, generator=generator) * (0, 8, 16)[number // 3 % 3]
    return logits.bfloat16().float()


def make(draws: ModuleType, settings: Settings, num_rows: int, seed: int | list[str]) -> Sampler:
    """Return the plain or the fast sampler of a batch without padding, after prompts of one token."""
    starts = torch.zeros(num_rows, dtype=torch.long)
    return draws.make_sampler(settings, prompt_length=1, starts=starts, seed=seed)


def ids_of(num_rows: int) -> torch.Tensor:
    """Return the tokens so far, of which these filters need none."""
    return torch.zeros(num_rows, 1, dtype=torch.long)


@pytest.mark.parametrize(
    "name, num_batches", [*((name, 6) for name in DEFAULT_EXACT), *(heavy(name, 18) for name in EXACT)]
)
def test_the_exact_draws_take_the_librarys_tokens(name, num_batches):
    """360 rows a setting, 5,400 in all, with ties at top-k's border and at top-p's; most take the
    short way, some have to take the whole one.
    """
    settings, certain, ids = Settings(sample=True, **EXACT[name]), [], ids_of(20)
    fast, plain = (make(draws, settings, 20, seed=1) for draws in (fast_sampling, sampling))
    library_generator = torch.Generator().manual_seed(1)
    for number in range(num_batches):
        logits = synthetic_rows(number, 20)
        state = torch.Generator().set_state(library_generator.get_state())
        bits = fast_sampling.random_bits(logits.shape, state)
        drawn = fast_sampling.draw_exactly(logits, settings, bits)
        certain += (drawn != fast_sampling.UNDECIDED).tolist()
        tokens = draw_as_the_library(logits, settings, library_generator)
        assert torch.equal(fast(logits, ids), tokens), number
        assert torch.equal(plain(logits, ids), tokens), number
    share = sum(certain) / len(certain)
    if name in ("plain", "all and typical", "low top-p", "lowest top-p"):
        assert share == 0
    else:
        assert share > 0.4 and (share < 1 or "top_p" not in EXACT[name]), share


@pytest.mark.parametrize("size", [1, 31, 211, 5000, VOCABULARY])
@pytest.mark.parametrize("count", [1, 7, 50, 4000])
@pytest.mark.parametrize("kind", ["smooth", "ties", "equal"])
def test_the_most_likely_tokens_are_found(size, count, kind):
    """Oracle: a sort of all logits. At least `count`, all that tie with the last, highest first."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size + count)) * 3
    if kind != "smooth":
        logits = logits.round() if kind == "ties" else torch.zeros(size)
    ids = torch.from_numpy(fast_sampling.find_most_likely(logits.numpy(), count))
    assert len(ids) >= min(count, size) and len(set(ids.tolist())) == len(ids)
    assert torch.equal(logits[ids], logits.sort(descending=True).values[: len(ids)])
    assert (logits >= logits[ids[-1]]).sum() == len(ids)
    assert kind == "equal" or len(ids) <= max(2 * count, 64) or size // 32 <= count


def test_logits_that_are_not_numbers_are_left_to_the_plain_draw():
    logits = torch.zeros(3, 5000)
    logits[0, 7], logits[1, 8], logits[2] = torch.nan, torch.inf, -torch.inf
    bits = torch.ones(logits.shape, dtype=torch.int64)
    settings = Settings(sample=True, top_k=50)
    assert (fast_sampling.draw_exactly(logits, settings, bits) == fast_sampling.UNDECIDED).all()


@pytest.mark.parametrize("every", [30, 2])
def test_ties_at_the_border_of_top_p_are_split_as_the_library_splits_them(every):
    """10 or 150 equal tokens, of which top-p keeps some: which ones, only the library's sort
    knows. And equal tokens of equal noise.
    """
    logits = torch.full((200, 300), -9.0)
    logits[:, ::every] = 5.0
    settings = Settings(sample=True, top_k=20, top_p=0.55)
    tokens = draw_as_the_library(logits, settings, torch.Generator().manual_seed(2))
    for draws in (fast_sampling, sampling):
        assert torch.equal(make(draws, settings, 200, seed=2)(logits, ids_of(200)), tokens)
    bits = torch.full(logits.shape, 2**52)
    drawn = fast_sampling.draw_exactly(logits, Settings(sample=True, top_k=5), bits)
    assert (drawn == fast_sampling.UNDECIDED).all()


def test_where_the_noise_is_unknown_the_plain_draw_is_used(monkeypatch):
    """On a GPU, or if PyTorch ever changes its method."""
    monkeypatch.setattr(fast_sampling, "noise_is_known", lambda device: False)
    settings, logits = Settings(sample=True, top_k=50, top_p=0.9), synthetic_rows(1, 20)
    tokens = draw_as_the_library(logits, settings, torch.Generator().manual_seed(1))
    assert torch.equal(make(fast_sampling, settings, 20, seed=1)(logits, ids_of(20)), tokens)


@pytest.mark.parametrize("flags", [heavy({"top_k": 50}), {"top_p": 0.9, "typical_p": 0.9}], ids=str)
def test_with_xtc_the_fast_sampler_draws_the_plain_ones_tokens(flags):
    """Some rows of each step are drawn with XTC, the others among the candidates. Without XTC the
    tokens are others: it was active.
    """
    settings = Settings(sample=True, xtc_probability=0.5, xtc_threshold=0.02, max_new_tokens=6, **flags)
    without = dataclasses.replace(settings, xtc_probability=0.0)
    fast, plain, other = (
        make(draws, options, 20, seed=1)
        for draws, options in ((fast_sampling, settings), (sampling, settings), (sampling, without))
    )
    num_equal = 0
    for number in range(6):
        logits = synthetic_rows(number, 20)
        tokens = plain(logits, ids_of(20))
        assert torch.equal(fast(logits, ids_of(20)), tokens)
        num_equal += int((other(logits, ids_of(20)) == tokens).sum())
    assert 60 <= num_equal < 120


DISTRIBUTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 20},
    "top-k above the vocabulary": {"top_k": 5000},
    "top-p": {"top_p": 0.9},
    "top-p of nearly all": {"top_p": 0.9999},
    "lowest top-p": {"top_p": 5e-324},
    "min-p": {"min_p": 0.05},
    "tiny min-p": {"min_p": 1e-9},
    "typical": {"typical_p": 0.8},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
    "top-p and typical": {"top_p": 0.8, "typical_p": 0.7},
    "hot top-p": {"temperature": 2.0, "top_p": 0.95, "min_p": 0.01},
    "epsilon": {"epsilon_cutoff": 0.001},
    "eta and top-k": {"eta_cutoff": 0.01, "top_k": 50},
    "top-n-sigma": {"top_n_sigma": 1.5, "temperature": 0.8, "eta_cutoff": 0.001},
}


def distribution(logits: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Return the probabilities (B, V) after all filters."""
    return sampling.apply_filters(sampling.distribution_filters(settings), logits, logits).softmax(-1)


MANY_KEPT = [
    DISTRIBUTIONS[name]
    for name in (
        "plain",
        "temperature",
        "top-p of nearly all",
        "tiny min-p",
        "typical",
        "hot top-p",
        "epsilon",
    )
]


@pytest.mark.parametrize("flags", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("kind", ["smooth", "flat", "ties", "a hundred ties at the top"])
def test_the_fast_independent_draw_has_the_plain_distribution(flags, kind):
    """Oracle: the library's order of filters over the whole vocabulary of 3,000; its candidates
    are 1,024 at most.
    """
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(1)) * (0.1 if kind == "flat" else 3)
    logits = (
        (logits * 2).round() / 2
        if kind == "ties"
        else logits.clamp(max=5)
        if kind == "a hundred ties at the top"
        else logits
    )
    options = Settings(sample=True, **flags)
    exact = distribution(logits, options)
    found, ids, complete = fast_sampling.candidate_distribution(logits, options)
    full = torch.where(complete[:, None], torch.zeros_like(exact).scatter(-1, ids, found), exact)
    assert complete.all() or kind != "smooth" or flags in MANY_KEPT
    # which of the tokens that tie at the edge is in, the sort decides
    if "ties" in kind and ("top_p" in flags or "typical_p" in flags):
        exact, full = exact.sort(-1).values, full.sort(-1).values
    assert torch.allclose(full, exact, atol=2e-6)
    assert torch.allclose(full.sum(-1), torch.ones(5))


def chi_square(drawn: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Return the p-value of draws against probabilities; cells with fewer than 10 expected are
    pooled.
    """
    assert probabilities[drawn].min() > 0  # nothing outside the support
    counts, expected = (
        torch.bincount(drawn, minlength=len(probabilities)).double(),
        probabilities.double() / probabilities.double().sum() * len(drawn),
    )
    rare = expected < 10
    counts, expected = (torch.cat([values[~rare], values[rare].sum()[None]]) for values in (counts, expected))
    keep = expected > 0
    return scipy.stats.chisquare(
        counts[keep].numpy(), (expected[keep] / expected[keep].sum() * counts[keep].sum()).numpy()
    ).pvalue


def draw_independently(
    draws: ModuleType, logits: torch.Tensor, settings: Settings, uniforms: torch.Tensor, monkeypatch
) -> torch.Tensor:
    """Return the tokens (B) of an independent sampler with given random numbers (B)."""
    monkeypatch.setattr(sampling, "row_uniforms", lambda names, count: uniforms[:, None])
    return make(draws, settings, len(logits), [""] * len(logits))(logits, ids_of(len(logits)))


@pytest.mark.parametrize("draws", [sampling, fast_sampling], ids=["plain", "fast"])
@pytest.mark.parametrize("sampler", ["exact", "independent"])
@pytest.mark.parametrize(
    "flags",
    [heavy({}), heavy({"top_k": 12}), {"top_p": 0.9}, heavy({"temperature": 0.8, "min_p": 0.03})],
    ids=str,
)
def test_draws_follow_the_probabilities(draws, sampler, flags, monkeypatch):
    """200,000 draws by chi-square; the same draws against a temperature that is off by 5 % must
    fail, or the test has no power.
    """
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(2)) * 2
    settings, many = Settings(sample=True, **flags), logits.expand(DRAWS, -1)
    probabilities = distribution(logits, settings)
    if sampler == "exact":
        tokens = make(sampling, settings, DRAWS, seed=3)(many, ids_of(DRAWS))
        if draws is fast_sampling:  # which goes row by row: the first rows, and they must be equal
            fast = make(fast_sampling, settings, 5000, seed=3)(logits.expand(5000, -1), ids_of(5000))
            assert torch.equal(fast, tokens[:5000])
    else:
        uniforms = torch.rand(DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        tokens = draw_independently(draws, many, settings, uniforms, monkeypatch)
    assert chi_square(tokens, probabilities[0]) > 1e-3
    assert chi_square(tokens, (probabilities[0].log() / 1.05).softmax(-1)) < 1e-6


@pytest.mark.parametrize("draws", [sampling, fast_sampling], ids=["plain", "fast"])
def test_the_independent_draws_never_leave_the_support_at_the_edges(draws, monkeypatch):
    logits = torch.tensor([[-INFINITY, 0.0, -INFINITY, 0.0, -INFINITY]]).expand(3, -1)
    edges = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens = draw_independently(draws, logits, Settings(sample=True), edges, monkeypatch)
    assert tokens.tolist() == [1, 3, 3]


def test_random_numbers_of_a_row_do_not_depend_on_its_neighbours():
    names = ["7/0/0", "7/0/1", "7/5/0"]
    many = sampling.row_uniforms(names, 50)
    assert torch.equal(many[2:], sampling.row_uniforms(names[2:], 50))
    assert torch.equal(many[:, :20], sampling.row_uniforms(names, 20))
    rows = [*many.tolist(), *sampling.row_uniforms(["8/0/0"], 50).tolist()]
    assert len(set(map(tuple, rows))) == 4


@pytest.mark.parametrize("flags", [{"top_p": 0.9}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.02}], ids=str)
def test_a_row_draws_the_same_whatever_its_neighbours_keep(flags):
    """A flat row keeps more than the candidates, and goes another way than a peaked one: each must
    do so alone.
    """
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(1)) * 3
    logits[::2] *= 0.01
    settings, names = Settings(sample=True, **flags), [str(row) for row in range(40)]
    together = make(fast_sampling, settings, 40, names)(logits, ids_of(40))
    alone = [
        make(fast_sampling, settings, 1, [name])(logits[row : row + 1], ids_of(1))
        for row, name in enumerate(names)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_runs_of_neighbouring_seeds_share_no_batch():
    seeds = {(seed, number): sampling.batch_seed(seed, number) for seed in range(30) for number in range(30)}
    assert all(seeds[seed, 0] == seed for seed in range(30)) and len(set(seeds.values())) == 900
    assert all(0 <= value < 2**32 for value in seeds.values())  # --seed takes it
