#!/usr/bin/env python
"""PyTorch's fused attention beside common/speedups.py's matrix products, in bf16: forward as in
encoding, forward and backward as in training.

Both are called through transformers' interface on the shapes of all-MiniLM-L6-v2 (12 heads of 32)
and of BERT-base (12 heads of 64), 4,096 tokens at once. They take turns; the medians of --rounds
count. The last line on stdout is one JSON object.

  python tests/benchmarks/attention.py                 # a minute on two cores
"""

import argparse
import json
import statistics

import environment
import torch
from tabulate import tabulate
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common import cli, speedups
from common.runtime import keep_large_blocks

WAYS = {"fused": sdpa_attention_forward, "matrix products": speedups.attend}
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
    parser.add_argument(
        "--lengths", nargs="+", type=cli.positive_int, default=[64, 128, 256, 512], help="tokens of a text"
    )
    parser.add_argument(
        "--widths", nargs="+", type=cli.positive_int, default=[32, 64], help="dimensions of a head"
    )
    return parser


def compare(length: int, width: int, rounds: int) -> dict[str, float]:
    """Return the milliseconds of each way, forward and forward with backward."""
    device = torch.device("cpu")
    parts = [
        part.transpose(1, 2).requires_grad_()
        for part in torch.randn(3, TOKENS // length, length, HEADS, width).bfloat16().unbind()
    ]
    grad = torch.randn(TOKENS // length, length, HEADS, width).bfloat16()
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds + 3):
        for name, attend in WAYS.items():
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
    found, rows = {}, []
    for width in args.widths:
        for length in args.lengths:
            measured = found[f"{length} tokens, heads of {width}"] = compare(length, width, args.rounds)
            forward, both = (
                measured[f"fused, {what}"] / measured[f"matrix products, {what}"]
                for what in ("forward", "both")
            )
            rows.append(
                [
                    width,
                    length,
                    *(measured[f"{name}, {what}"] for what in ("forward", "both") for name in WAYS),
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
                "products",
                "with backward, ms: fused",
                "products",
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
