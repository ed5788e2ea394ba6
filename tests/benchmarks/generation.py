#!/usr/bin/env python
"""Generation speed: generate.py beside `model.generate` and llama.cpp, with the weights of one
model.

Contenders: `generate`, model.generate with its defaults for a dynamic cache, over weights widened
to fp32; `c_file`, `c_bf16` and `c_fp32`, generate.py's step in C over the weights as the model's
file has them (4 bits), in bf16 and in fp32; `lookup`, c_file with prompt lookup; `llama_cpp`,
llama.cpp on the same file, where llama-cpp-python is installed; `start`, generate.py as a command.
By name only: `exact` and `independent`, the two samplers with the library's forward, and what ends
with `_bf16`, in that precision.

Tasks (--only): `one` text at a time, a `batch` of texts, a text that is `repeating` itself (c_file
and lookup only), and a `long` prompt, until its first token. Each round runs every contender in a
process of its own, one after the other, and measures how fast the memory can be read. Nothing ends
a text early. A speed is the tokens after the first ones over the time that they took: the prompt is
not in it. The last line on stdout is one JSON object.

  python tests/benchmarks/generation.py                             # about 8 minutes on two cores
  python tests/benchmarks/generation.py --rounds 1 --new-tokens 16  # a quick look
  python tests/benchmarks/generation.py --contenders generate exact independent --sample --only one batch
  python tests/benchmarks/generation.py --parts
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import environment
import numpy as np
import start
import torch
from tabulate import tabulate

import generate
from common import bundled, cli, sources
from common.errors import UserError
from common.generation import decoding, explain, fast_sampling, stored_weights
from common.generation import language_model as models
from common.generation.completion import Options, Prompt, Run
from common.generation.fast_decoding import CLayer
from common.generation.language_model import LanguageModel, Weights
from common.generation.library import TransformersModel
from common.generation.lookup import PromptLookup
from common.generation.sampling import Settings
from common.runtime import Runtime, choose_device, choose_precision, keep_large_blocks

SAMPLE = {"sample": True, "top_k": 50, "top_p": 0.92}  # both filters of the tutorial
AHEAD = 5  # tokens that `lookup` guesses
WARMUP_TOKENS = 4
PARTS = ("matrix products", "other kernels", "dispatch", "sampling")


@dataclass(frozen=True)
class Way:
    """How a contender computes."""

    loop: str  # generate, exact, independent or lookup
    weights: Weights = "auto"
    in_c: bool = False
    precision: str = "fp32"


WAYS = {
    "generate": Way("generate"),
    "exact": Way("exact"),
    "independent": Way("independent"),
    "generate_bf16": Way("generate", precision="bf16"),
    "exact_bf16": Way("exact", precision="bf16"),
    "independent_bf16": Way("independent", precision="bf16"),
    "c_fp32": Way("exact", "fp32", in_c=True),
    "c_bf16": Way("exact", "bf16", in_c=True),
    "c_file": Way("exact", "file", in_c=True),
    "lookup": Way("lookup", "file", in_c=True),
}
CONTENDERS = (*WAYS, "llama_cpp", "start")
USUAL = ("generate", "c_fp32", "c_bf16", "c_file", "lookup", "llama_cpp", "start")

TASKS = ("one", "batch", "repeating", "long")
TEXTS, BATCH = 4, 16  # bundled news texts, of which prompts are the first words
# tokens of the prompts; those of a batch differ, so that it is padded
SHORTEST, LONGEST, LONG = 48, 128, 1000
AGAIN = 32  # tokens with which a text begins again


@dataclass(frozen=True)
class Goal:
    """A row of the last table: a figure of a contender, as a multiple of a peer's if one is named."""

    what: str
    contender: str
    figure: str
    peer: str | None
    wanted: str = ""


GOALS = [
    Goal("4-bit file, 1 text: speed, times generate in fp32", "c_file", "one speed", "generate", ">= 8"),
    Goal("4-bit file, 1 text: speed, times llama.cpp", "c_file", "one speed", "llama_cpp", ">= 1.5"),
    Goal("4-bit file, 16 texts: speed, times generate in fp32", "c_file", "batch speed", "generate", ">= 4"),
    Goal("4-bit file, 16 texts: speed, times llama.cpp", "c_file", "batch speed", "llama_cpp"),
    Goal("fp32 weights, 1 text: speed, times generate in fp32", "c_fp32", "one speed", "generate", ">= 1.35"),
    Goal("bf16 weights, 1 text: speed, times generate in fp32", "c_bf16", "one speed", "generate", ">= 2.5"),
    Goal("first token after 128: time, times generate's", "c_file", "one read", "generate", "<= 1"),
    Goal("first token after 1,000: time, times generate's", "c_file", "long read", "generate", "<= 1"),
    Goal("first token after 128: time, times llama.cpp's", "c_file", "one read", "llama_cpp"),
    Goal("first token after 1,000: time, times llama.cpp's", "c_file", "long read", "llama_cpp"),
    Goal(
        "from the start of the command to the first token, s", "start", "first_output_seconds", None, "<= 2"
    ),
    Goal("peak memory of that command, MB", "start", "peak_memory_mb", None, "<= 400"),
    Goal(
        "--lookup 5, a text that repeats itself: speed, times without", "lookup", "repeating speed", "c_file"
    ),
    Goal("--lookup 5, ordinary texts: speed, times without", "lookup", "one speed", "c_file"),
    *(
        Goal(f"share of the speed at which memory is read: {what}", name, "share of memory", None)
        for name, what in (
            ("c_file", "4-bit file"),
            ("c_bf16", "bf16 weights"),
            ("c_fp32", "fp32 weights"),
            ("generate", "generate in fp32"),
            ("llama_cpp", "llama.cpp"),
        )
    ),
    *(
        Goal(f"{sampler}{end}, {what}: speed, times generate{end}", sampler + end, figure, "generate" + end)
        for end in ("", "_bf16")
        for sampler in ("exact", "independent")
        for what, figure in (("1 text", "one speed"), ("16 texts", "batch speed"))
    ),
]


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="tests/benchmarks/generation.py", description=__doc__)
    cli.add_shared_flags(parser, model=bundled.SMOLLM2)
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        help=f"default: {', '.join(USUAL)}, as far as they can run",
    )
    parser.add_argument("--only", nargs="+", choices=TASKS, default=TASKS, help="tasks; default: all")
    parser.add_argument("--sample", action="store_true", help=f"draw with {SAMPLE} instead of greedily")
    parser.add_argument("--new-tokens", type=cli.positive_int, default=48, help="tokens of each text")
    parser.add_argument(
        "--rounds", type=cli.positive_int, default=3, help="medians are taken over the rounds"
    )
    parser.add_argument(
        "--parts",
        action="store_true",
        help="show only where the milliseconds of a step through the library's forward go",
    )
    # what runs in a process of its own
    parser.add_argument("--child", choices=[*CONTENDERS, "limits", "parts"], help=argparse.SUPPRESS)
    return parser


# The contenders: each takes prompts, and tells what it wrote and when -----------------------------


@dataclass(frozen=True)
class Written:
    """The new tokens of each text, and the moments before the prompts were read and after each token."""

    rows: list[list[int]]
    moments: list[np.ndarray]

    @property
    def read(self) -> np.ndarray:
        """The time and CPU time (2) until the first tokens, in seconds."""
        return self.moments[1] - self.moments[0]

    @property
    def write(self) -> np.ndarray:
        """The time and CPU time (2) that the other tokens took, in seconds."""
        return self.moments[-1] - self.moments[1]


@dataclass(frozen=True)
class Contender:
    """What is timed: `write` gets the tokens of some prompts, and how many each text shall have."""

    write: Callable[[list[list[int]], int], Written]
    tokenizer: Callable[[str], dict]
    weight_bytes: int  # that are read for each token


def settings_of(flags, new_tokens: int) -> Settings:
    """Return how tokens are chosen; no token ends a text."""
    return Settings(max_new_tokens=new_tokens, **(SAMPLE if flags.sample else {}))


def load(flags, way: Way) -> LanguageModel:
    """Return the model with weights as a contender has them."""
    runtime = Runtime(choose_device(flags.device), way.precision)
    loading = models.Loading(way.weights, may_compile=way.in_c)
    language_model = models.load(flags.model, runtime, cache_dir=flags.cache_dir, loading=loading)
    assert language_model.model.is_compiled == way.in_c, language_model.backend
    return dataclasses.replace(language_model, end_ids=())


def torch_contender(flags, way: Way) -> Contender:
    """Return the library's loop or one of ours."""
    language_model = load(flags, way)
    write = library_loop if way.loop == "generate" else own_loop

    def write_texts(prompts: list[list[int]], new_tokens: int) -> Written:
        return write(language_model, prompts, settings_of(flags, new_tokens), way.loop, flags.seed)

    return Contender(write_texts, language_model.tokenizer, weight_bytes(language_model))


def weight_bytes(language_model: LanguageModel) -> int:
    """Return the bytes of all matrices that a token is multiplied with."""
    if not language_model.model.is_compiled:
        linear = [part for part in language_model.model.module.modules() if isinstance(part, torch.nn.Linear)]
        return sum(part.weight.nbytes for part in linear)
    model = language_model.model.transformer
    linear = [model.head, *(getattr(layer, name) for layer in model.layers for name in CLayer.MATRICES)]
    return sum(part.matrix.data.nbytes for part in linear)


def library_loop(
    language_model: LanguageModel, prompts: list[list[int]], settings: Settings, loop: str, seed: int
) -> Written:
    """Write texts by model.generate: a token is there when the forward of the next one begins."""
    model, moments = language_model.model.module, []
    hook = model.register_forward_pre_hook(
        lambda *_: moments.append(environment.moment(language_model.device))
    )
    numbered = [Prompt(number, "", ids) for number, ids in enumerate(prompts)]
    started = environment.moment(language_model.device)
    rows = explain.library_tokens(language_model, model, numbered, Options(settings), seed=seed)
    ended = environment.moment(language_model.device)
    hook.remove()
    assert len(moments) == settings.max_new_tokens
    return Written(rows, [started, *moments[1:], ended])


def own_loop(
    language_model: LanguageModel, prompts: list[list[int]], settings: Settings, loop: str, seed: int
) -> Written:
    """Write texts by the loop of generate.py, or with prompt lookup."""
    sampler = loop if loop == "independent" else "exact"
    options = Options(settings, seed=seed, sampler=sampler)
    run = Run(language_model, options)
    moments = [environment.moment(language_model.device)]
    rows = run.rows([Prompt(number, "", ids) for number, ids in enumerate(prompts)])
    batch = run.left_pad(rows)
    if loop == "lookup":
        steps = PromptLookup(AHEAD).decode(language_model, batch, settings)
    else:
        sampler = fast_sampling.make_sampler(
            settings, prompt_length=batch.length, starts=batch.starts, seed=run.sampler_seed(rows, seed)
        )
        steps = generate.decode(language_model, batch, sampler, settings)
    columns = []
    for step in steps:
        columns.append(step.tokens)
        moments.append(environment.moment(language_model.device))
    return Written([list(tokens) for tokens in zip(*columns)], moments)


def gguf_file(flags) -> Path:
    """Return the GGUF file of the model. Raises UserError for one that has none."""
    if bundled.is_bundled(flags.model):
        return (
            bundled.model_folder(flags.model, kind="language model", cache_dir=flags.cache_dir) / bundled.GGUF
        )
    source = sources.find_folder(flags.model, kind="language model", cache_dir=flags.cache_dir)
    path = stored_weights.find_gguf(source)
    if path is None:
        raise UserError(f"--contenders llama_cpp: {flags.model} is no GGUF file; leave llama_cpp out")
    return path


def llama_cpp_contender(flags) -> Contender:
    """Return llama.cpp with its own samplers and its own defaults, but for the number of threads."""
    import gguf
    import llama_cpp

    path = gguf_file(flags)
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in tensors:  # else the embedding is the head, too
        del tensors["token_embd.weight"]
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"

    def write(prompts: list[list[int]], new_tokens: int) -> Written:
        with LlamaCpp(flags, model, prompts, new_tokens) as texts:
            moments, columns = [environment.moment(torch.device("cpu"))], []
            places = texts.read(
                (token, position, text, position == len(ids) - 1)
                for text, ids in enumerate(prompts)
                for position, token in enumerate(ids)
            )
            for number in range(new_tokens):
                if number:
                    places = texts.read(
                        (token, len(ids) + number - 1, text, True)
                        for text, (ids, token) in enumerate(zip(prompts, columns[-1]))
                    )
                columns.append([texts.draw(text, place) for text, place in enumerate(places)])
                moments.append(environment.moment(torch.device("cpu")))
        return Written([list(tokens) for tokens in zip(*columns)], moments)

    folder = stored_weights.model_folder(flags.model, flags.cache_dir)
    return Contender(write, models.load_tokenizer(folder, name=flags.model), sum(tensors.values()))


class LlamaCpp:
    """Some texts that llama.cpp writes at the same time; as a context manager, it frees them."""

    def __init__(self, flags, model, prompts: list[list[int]], new_tokens: int):
        import llama_cpp

        self.library = llama_cpp
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max = len(prompts)
        options.n_ctx = len(prompts) * (max(map(len, prompts)) + new_tokens)
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        num_tokens = sum(map(len, prompts))
        options.n_batch = max(options.n_batch, num_tokens)
        self.context = llama_cpp.llama_init_from_model(model, options)
        assert self.context, "llama.cpp makes no context"
        self.batch = llama_cpp.llama_batch_init(num_tokens, 0, 1)
        self.samplers = [self.make_sampler(flags, text) for text in range(len(prompts))]

    def make_sampler(self, flags, text: int):
        library = self.library
        chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        parts = [library.llama_sampler_init_greedy()]
        if flags.sample:
            parts = [
                library.llama_sampler_init_top_k(SAMPLE["top_k"]),
                library.llama_sampler_init_top_p(SAMPLE["top_p"], 1),
                library.llama_sampler_init_dist(flags.seed + text),
            ]
        for part in parts:
            library.llama_sampler_chain_add(chain, part)
        return chain

    def read(self, tokens) -> list[int]:
        """Read tokens, each with its position, its text and whether another one follows it; return
        where in the batch these last ones are.
        """
        batch, places = self.batch, []
        batch.n_tokens = 0
        for place, (token, position, text, is_last) in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, is_last
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, text
            batch.n_tokens += 1
            places += [place] if is_last else []
        code = self.library.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode returns {code}"
        return places

    def draw(self, text: int, place: int) -> int:
        """Return the next token of a text, by the logits of a place in the batch."""
        return self.library.llama_sampler_sample(self.samplers[text], self.context, place)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sampler in self.samplers:
            self.library.llama_sampler_free(sampler)
        self.library.llama_batch_free(self.batch)
        self.library.llama_free(self.context)


# One contender, in a process of its own -----------------------------------------------------------


def batches_of(task: str, tokenizer: Callable[[str], dict]) -> list[list[list[int]]]:
    """Return the prompts of a task, as token ids: those that are read together in a list."""
    news = bundled.bbc_news()["text"][: 2 * BATCH]
    ids = [tokenizer(text)["input_ids"] for text in news[:BATCH]]
    if task == "one":
        return [[text[:LONGEST]] for text in ids[:TEXTS]]
    if task == "batch":
        lengths = np.linspace(LONGEST, SHORTEST, BATCH).astype(int)
        return [[text[:length] for text, length in zip(ids, lengths)]]
    if task == "repeating":
        line_break = tokenizer("\n\n")["input_ids"]
        return [[text[:LONGEST] + line_break + text[:AGAIN]] for text in ids[:TEXTS]]
    joined = [tokenizer("\n\n".join(news[first:][:BATCH]))["input_ids"] for first in (0, BATCH)]
    return [[text[:LONG]] for text in joined]


def measure(contender: Contender, flags) -> dict:
    """Return the figures of a contender, and the tokens that it wrote in each task."""
    figures, texts = {"weight_bytes": contender.weight_bytes}, {}
    for task in [task for task in flags.only if task in tasks_of(flags.child)]:
        batches = batches_of(task, contender.tokenizer)
        new_tokens = 1 if task == "long" else flags.new_tokens
        contender.write(batches[0], min(WARMUP_TOKENS, new_tokens))
        written = [contender.write(batch, new_tokens) for batch in batches]
        texts[task] = [row for one in written for row in one.rows]
        figures[f"{task} read"] = statistics.median(one.read[0] for one in written)
        if new_tokens > 1:
            seconds, cpu_seconds = sum(one.write for one in written).tolist()
            num_tokens = (new_tokens - 1) * len(texts[task])
            figures[f"{task} speed"] = num_tokens / seconds
            figures[f"{task} CPU ms"] = 1000 * cpu_seconds / num_tokens
    return {"figures": figures, "texts": texts}


def tasks_of(name: str) -> list[str]:
    """Return the tasks of a contender: texts that repeat themselves show what lookup gains, one at a time."""
    if name == "lookup":
        return ["one", "repeating"]
    return [task for task in TASKS if task != "repeating" or name == "c_file"]


def child(flags) -> dict:
    """Return what is measured in this process."""
    if flags.child == "limits":
        return environment.limits(choose_device(flags.device), rows=BATCH * LONGEST, width=576)
    if flags.child == "parts":
        return time_parts(flags)
    if flags.child == "start":
        return {"figures": start.time_command("generate", Path()), "texts": {}}
    keep_large_blocks()
    if flags.child == "llama_cpp":
        return measure(llama_cpp_contender(flags), flags)
    return measure(torch_contender(flags, WAYS[flags.child]), flags)


def run_contender(name: str) -> dict:
    """Return what a contender measures, with threads that wait as our scripts have them, in its own
    contenders only.
    """
    is_ours = name in WAYS and WAYS[name].loop != "generate"
    return environment.run_child(__file__, "--child", name, **environment.variables(is_ours=is_ours))


# The rounds, and what they show -------------------------------------------------------------------


def compare(flags) -> dict:
    """Run the rounds, print a line a measurement and the tables; return medians, the figures of the
    rounds, and the goals' rows.
    """
    rounds: dict[str, list[dict]] = {name: [] for name in flags.contenders}
    limits, texts = [], {}
    for number in range(flags.rounds):
        # interleaved: a slow hour of the machine is slow for all
        limits.append(environment.run_child(__file__, "--child", "limits"))
        for name, measured in rounds.items():
            found = run_contender(name)
            figures, texts[name] = found["figures"], found["texts"]
            if "one speed" in figures and name != "lookup":  # which reads the weights once for some tokens
                read = figures["weight_bytes"] * figures["one speed"] / 1e9
                figures["share of memory"] = read / limits[-1]["read_gb_per_second"]
            measured.append(figures)
            shown = ", ".join(f"{what} {figure:.4g}" for what, figure in figures.items())
            print(f"round {number + 1}/{flags.rounds}  {name}: {shown}", flush=True)
    medians = {name: environment.median_of(measured) for name, measured in rounds.items()}
    show_figures(medians, flags)
    goals = goal_rows(rounds)
    print("\n" + tabulate(goals, headers="keys", floatfmt=".3g", disable_numparse=[1]))
    equal = show_equal(texts)
    machine = environment.median_of(limits)
    environment.show_limits(machine)
    return {"limits": machine, "medians": medians, "goals": goals, "equal": equal, "rounds": rounds}


def show_figures(medians: dict[str, dict], flags):
    """Print the table of what was measured: a line a contender, a column a figure."""
    figures = {
        "one speed": "1 text, tokens/s",
        "one CPU ms": "CPU ms/token",
        "share of memory": "share of memory",
        "batch speed": f"{BATCH} texts, tokens/s",
        "repeating speed": "repeating, tokens/s",
        "one read": f"first after {LONGEST}, s",
        "long read": f"first after {LONG:,}, s",
    }
    shown = {key: title for key, title in figures.items() if any(key in own for own in medians.values())}
    lines = [[name, *(own.get(key) for key in shown)] for name, own in medians.items() if name != "start"]
    print("\n" + tabulate(lines, ["contender", *shown.values()], floatfmt=".3g"))
    print(
        f"\nmedians over {flags.rounds} rounds of {flags.new_tokens} new tokens a text,"
        f" {SAMPLE if flags.sample else 'greedy'}"
    )


def goal_rows(rounds: dict[str, list[dict]]) -> list[dict]:
    """Return the rows of the goals that were measured: the median of the rounds, the lowest and the
    highest.
    """
    rows = []
    for goal in GOALS:
        own, peers = rounds.get(goal.contender, []), rounds.get(goal.peer or goal.contender, [])
        found = [
            one[goal.figure] / (peer[goal.figure] if goal.peer else 1)
            for one, peer in zip(own, peers)
            if goal.figure in one and goal.figure in peer
        ]
        if found:
            spread = {"median": statistics.median(found), "lowest": min(found), "highest": max(found)}
            rows.append({"figure": goal.what, "goal": goal.wanted, **spread})
    return rows


def show_equal(texts: dict[str, dict]) -> dict[str, int]:
    """Print, and return, how many texts of each contender and task have the tokens of `generate`;
    of texts that repeat themselves, those of `c_file`.
    """
    found = {}
    for name, own in texts.items():
        for task, rows in own.items():
            peer = "c_file" if task == "repeating" else "generate"
            if name != peer and peer in texts:
                equal = sum(ours == theirs for ours, theirs in zip(rows, texts[peer][task]))
                found[f"{name}, {task}"] = equal
                print(f"{name}, {task}: {equal} of {len(rows)} texts have the tokens of {peer}")
    return found


# Where the milliseconds of a step through the library's forward go --------------------------------


@torch.inference_mode()
def time_parts(flags) -> dict:
    """Return for each precision and number of texts the milliseconds of one token: its matrix
    products alone, the other kernels, dispatch, and the exact sampler.

    Dispatch is the step of a model with as many layers and heads, and next to nothing to compute
    in them.
    """
    found = {}
    fast = choose_precision("auto", choose_device(flags.device))
    for precision, task in [
        (name, task) for name in dict.fromkeys(("fp32", fast)) for task in ("one", "batch")
    ]:
        language_model = load(flags, Way("exact", precision=precision))
        [prompts, *_] = batches_of(task, language_model.tokenizer)
        size, settings = len(prompts), settings_of(flags, flags.new_tokens)
        batch = decoding.left_pad(prompts, language_model, room=environment.TIMES + 4)
        hollow = hollow_model(language_model)
        hollow_batch = decoding.left_pad(
            [[0] * len(ids) for ids in prompts], hollow, room=environment.TIMES + 4
        )
        decoding.prefill(hollow, hollow_batch)
        sampler = fast_sampling.make_sampler(
            settings, prompt_length=batch.length, starts=batch.starts, seed=flags.seed
        )
        logits = decoding.prefill(language_model, batch)
        modules = language_model.model.module.modules()
        weights = [module.weight for module in modules if isinstance(module, torch.nn.Linear)]
        inputs = [
            torch.randn(size, weight.shape[1], dtype=weight.dtype, device=weight.device) for weight in weights
        ]
        steps, samples, products, dispatches = [], [], [], []
        for _ in range(environment.TIMES):
            marks = [environment.moment(language_model.device)[0]]
            tokens = sampler(logits, batch.tokens).tolist()
            marks.append(environment.moment(language_model.device)[0])
            logits = decoding.step(language_model, batch, tokens)
            marks.append(environment.moment(language_model.device)[0])
            for weight, activation in zip(weights, inputs):
                torch.nn.functional.linear(activation, weight)
            marks.append(environment.moment(language_model.device)[0])
            decoding.step(hollow, hollow_batch, [0] * size)
            marks.append(environment.moment(language_model.device)[0])
            for number, times in enumerate((samples, steps, products, dispatches)):
                times.append(1000 * (marks[number + 1] - marks[number]))
        sample, step, product, dispatch = (
            statistics.median(times) for times in (samples, steps, products, dispatches)
        )
        found[f"{precision}, {size}"] = dict(
            zip(PARTS, (product, step - product - dispatch, dispatch, sample))
        )
    return found


def hollow_model(language_model: LanguageModel) -> LanguageModel:
    """Return a model of the same class with as many layers and heads as another, but heads of two
    dimensions and hardly anything else.
    """
    config = copy.deepcopy(language_model.model.module.config)
    config.hidden_size, config.head_dim, config.intermediate_size, config.vocab_size = (
        2 * config.num_attention_heads,
        2,
        2,
        8,
    )
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    model = (
        type(language_model.model.module)(config)
        .to(language_model.device, next(language_model.model.module.parameters()).dtype)
        .eval()
    )
    return dataclasses.replace(language_model, model=TransformersModel(model), pad_id=0)


def show_parts(parts: dict):
    """Print where the milliseconds of a step go."""
    print("the milliseconds of a step (products alone are timed in a loop over the same weights):")
    lines = [
        [cell, *(values[name] for name in PARTS), sum(values.values())] for cell, values in parts.items()
    ]
    print(tabulate(lines, ["precision, texts", *PARTS, "all"], floatfmt=".1f"), flush=True)


# The command --------------------------------------------------------------------------------------


def choose_contenders(flags) -> list[str]:
    """Return the contenders of a run. Raises UserError for one that can't run."""
    obstacles = {}
    if importlib.util.find_spec("llama_cpp") is None:
        obstacles["llama_cpp"] = "llama-cpp-python is not installed; install it"
    if flags.sample:
        obstacles["lookup"] = "it is for greedy decoding; leave --sample out"
    if flags.model != bundled.SMOLLM2:
        obstacles["start"] = f"it starts with {bundled.SMOLLM2}; leave --model out"
    for name in flags.contenders or ():
        if name in obstacles:
            raise UserError(f"--contenders {name}: {obstacles[name]}, or leave it out")
    return flags.contenders or [name for name in USUAL if name not in obstacles]


def main(flags):
    if flags.new_tokens < 2:
        raise UserError("--new-tokens 1: the first token is the prompt's; use at least 2")
    flags.contenders = choose_contenders(flags)
    if flags.child:
        print(json.dumps(child(flags)))
        return
    # fetched, converted and compiled before anything is timed
    models.load(flags.model, Runtime(torch.device("cpu"), "fp32"), cache_dir=flags.cache_dir)
    header = environment.describe(choose_device(flags.device))
    environment.show(header)
    if flags.parts:
        found = {"milliseconds_a_step": environment.run_child(__file__, "--child", "parts")}
        show_parts(found["milliseconds_a_step"])
    else:
        found = compare(flags)
    print(
        "\n" + json.dumps({"benchmark": "generate", "environment": header, "settings": vars(flags), **found})
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cli.run(make_parser(), main)
