#!/usr/bin/env python
"""PyTorch's fused attention beside ours: forward as in encoding, forward and backward as in training. In
bf16 ours is common/speedups.py's matrix products, in fp32 common/attention.c, which serves training alone.

Both are called through transformers' interface on the shapes of all-MiniLM-L6-v2 (12 heads of 32)
and of BERT-base (12 heads of 64), 4,096 tokens at once. They take turns; the medians of --rounds
count. The last line on stdout is one JSON object.

  python tests/benchmarks/attention.py                 # a minute on two cores
  python tests/benchmarks/attention.py --precision fp32
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable

import environment
import torch
from tabulate import tabulate
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common import attention, cli, speedups
from common.runtime import keep_large_blocks

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS, HEADS = 4096, 12


class Layer(torch.nn.Module):
    """What an attention function asks of the layer that calls it."""

    is_causal = False


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="tests/benchmarks/attention.py", description=__doc__)
    parser.add_argument(
        "--rounds",
        type=cli.positive_int,
        default=15,
        help="medians are taken over them; the first three are left out",
    )
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="of all numbers")
    parser.add_argument(
        "--lengths", nargs="+", type=cli.positive_int, default=[64, 128, 256, 512], help="tokens of a text"
    )
    parser.add_argument(
        "--widths", nargs="+", type=cli.positive_int, default=[32, 64], help="dimensions of a head"
    )
    return parser


def compare(length: int, width: int, ways: dict[str, Callable], args: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds of each way, forward and forward with backward."""
    device, dtype, rounds = torch.device("cpu"), DTYPES[args.precision], args.rounds
    parts = [
        part.transpose(1, 2).requires_grad_()
        for part in torch.randn(3, TOKENS // length, length, HEADS, width).to(dtype).unbind()
    ]
    grad = torch.randn(TOKENS // length, length, HEADS, width).to(dtype)
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds + 3):
        for name, attend in ways.items():
            started = environment.moment(device)
            with torch.inference_mode():
                attend(Layer(), *parts, None)
            between = environment.moment(device)
            attend(Layer(), *parts, None)[0].backward(grad)
            ended = environment.moment(device)
            seconds.setdefault(f"{name}, forward", []).append((between - started)[0])
            seconds.setdefault(f"{name}, both", []).append((ended - between)[0])
    return {name: 1000 * float(statistics.median(times[3:])) for name, times in seconds.items()}


def main(args: argparse.Namespace):
    keep_large_blocks()
    header = environment.describe(torch.device("cpu"))
    environment.show(header)
    library = attention.load_library(None) if args.precision == "fp32" else None
    ways = {"fused": sdpa_attention_forward, "ours": functools.partial(speedups.attend, library=library)}
    found, rows = {}, []
    for width in args.widths:
        for length in args.lengths:
            measured = found[f"{length} tokens, heads of {width}"] = compare(length, width, ways, args)
            forward, both = (
                measured[f"fused, {what}"] / measured[f"ours, {what}"] for what in ("forward", "both")
            )
            rows.append(
                [
                    width,
                    length,
                    *(measured[f"{name}, {what}"] for what in ("forward", "both") for name in ways),
                    forward,
                    both,
                ]
            )
    print(
        tabulate(
            rows,
            [
                "head",
                "tokens",
                "forward, ms: fused",
                "ours",
                "with backward, ms: fused",
                "ours",
                "times, forward",
                "with backward",
            ],
            floatfmt=("", "", ".1f", ".1f", ".1f", ".1f", ".2f", ".2f"),
        )
    )
    print(
        "\n"
        + json.dumps(
            {"benchmark": "attention", "environment": header, "settings": vars(args), "milliseconds": found}
        )
    )


if __name__ == "__main__":
    cli.run(make_parser(), main)
