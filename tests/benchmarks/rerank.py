#!/usr/bin/env python
"""What a cross-encoder adds to search: one is trained on half of the bundled headlines, and
embed_search.py evaluates it on the other half.

A query is an article's headline, its one relevant text the article without it. The cross-encoder
starts from all-MiniLM-L6-v2, sees articles of its own half only, and learns to score a headline's
article above other articles that the encoder finds near the headline. The folder that is left can
be used like any cross-encoder: embed_search.py search --rerank runs/reranker ...

  python tests/benchmarks/rerank.py  # ten minutes on two cores
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import environment
import numpy as np
import torch
from sentence_transformers import CrossEncoder
from tabulate import tabulate
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup

from common import bundled, cli, speedups
from common.runtime import start_runtime
from common.search import kernel, relevance
from common.search.encoder import EncoderConfig, load_encoder
from common.search.segments import TEXT
from common.speedups import use_fast_dropout
from common.training import tracking

NEAR = 20  # the wrong articles nearest to a headline, from which some are drawn


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="tests/benchmarks/rerank.py", description=__doc__)
    cli.add_shared_flags(parser, model="bundled/all-MiniLM-L6-v2")
    parser.add_argument("--epochs", type=cli.positive_int, default=2, help="passes over the training half")
    parser.add_argument("--batch-size", type=cli.positive_int, default=8, help="headlines a step")
    parser.add_argument(
        "--wrong",
        type=cli.positive_int,
        default=3,
        help="wrong articles for each headline in a step, drawn anew each epoch",
    )
    parser.add_argument("--lr", type=cli.positive_float, default=1e-4, help="the highest learning rate")
    parser.add_argument(
        "--max-length",
        type=cli.positive_int,
        default=256,
        help="tokens of a headline and an article together",
    )
    parser.add_argument(
        "--rerank-depth",
        type=cli.positive_int,
        default=20,
        help="documents of the exact search that the cross-encoder orders again",
    )
    parser.add_argument(
        "--most", type=cli.positive_int, help="look at no more than so many headlines: a quick look"
    )
    parser.add_argument(
        "--output-dir",
        type=cli.folder,
        default="runs/reranker",
        help="for the cross-encoder and the files of the task",
    )
    return parser


def nearest_wrong(headlines: list[str], articles: list[str], runtime, args) -> np.ndarray:
    """Return for each headline (N) the numbers of the articles (N, NEAR) that are nearest to it,
    its own left out.
    """
    encoder = load_encoder(EncoderConfig(args.model, cache_dir=args.cache_dir), runtime)
    queries, vectors = encoder.encode_normalized(headlines), encoder.encode_normalized(articles)
    blocks = (
        (start, vectors[start : start + kernel.BLOCK]) for start in range(0, len(vectors), kernel.BLOCK)
    )
    found = kernel.nearest_rows(blocks, queries, NEAR + 1, vectors_of=lambda rows: vectors[rows])
    return np.array([[row for row in rows if row != own][:NEAR] for own, (rows, _) in enumerate(found)])


def train(headlines: list[str], articles: list[str], runtime, args) -> CrossEncoder:
    """Return a cross-encoder that learned to score each headline's own article above wrong ones
    (softmax over the articles of a headline).
    """
    wrong = nearest_wrong(headlines, articles, runtime, args)
    ranker = CrossEncoder(
        str(bundled.model_folder(args.model, kind="encoder")),
        num_labels=1,
        max_length=args.max_length,
        device=str(runtime.device),
        model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        config_kwargs={"attention_probs_dropout_prob": 0.0},
    )
    model, tokenizer = ranker.model, ranker.tokenizer
    speedups.use_fast_attention(model)
    use_fast_dropout(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    num_steps = -(-len(headlines) // args.batch_size)
    scheduler = get_linear_schedule_with_warmup(
        optimizer, num_steps * args.epochs // 10, num_steps * args.epochs
    )
    model.train()
    for epoch in range(1, args.epochs + 1):
        draw = np.random.default_rng([args.seed, epoch])
        order, losses = draw.permutation(len(headlines)), []
        with tracking.progress(
            range(0, len(order), args.batch_size), label=f"epoch {epoch}/{args.epochs}", shown=True
        ) as bar:
            for start in bar:
                picked = order[start : start + args.batch_size]
                # the right one first
                candidates = [[own, *draw.choice(wrong[own], args.wrong, replace=False)] for own in picked]
                pairs = [
                    (headlines[own], articles[row]) for own, rows in zip(picked, candidates) for row in rows
                ]
                batch = tokenizer(
                    *zip(*pairs),
                    truncation="only_second",
                    max_length=args.max_length,
                    padding=True,
                    return_tensors="pt",
                ).to(runtime.device)
                with runtime.autocast():
                    scores = model(**batch).logits
                # (headlines, candidates)
                scores = scores.float().view(len(picked), 1 + args.wrong)
                loss = cross_entropy(scores, torch.zeros(len(picked), dtype=torch.long, device=scores.device))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        print(f"epoch {epoch}/{args.epochs}  training loss {torch.stack(losses).mean():.4f}", flush=True)
    return ranker


def write_task(
    folder: Path, articles: dict[str, str], queries: dict[str, str], judgements: dict[str, dict[str, int]]
):
    """Write texts.jsonl, queries.jsonl and qrels.txt, as embed_search.py evaluate reads them."""
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in articles.items())
    )
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in queries.items())
    )
    (folder / "qrels.txt").write_text(
        "".join(
            f"{query} 0 {document} {relevance}\n"
            for query, judged in judgements.items()
            for document, relevance in judged.items()
        )
    )


def main(args: argparse.Namespace):
    runtime = start_runtime(args.device, args.precision, args.seed)
    environment.show(environment.describe(runtime.device))
    task, collection = relevance.bundled_task()
    articles = {row["id"]: row[TEXT] for row in collection.rows.to_pylist()}
    names = np.random.default_rng(args.seed).permutation(list(task.queries))[: args.most].tolist()
    learned, held_out = names[: len(names) // 2], names[len(names) // 2 :]
    ranker = train(
        [task.queries[name] for name in learned],
        [articles[next(iter(task.judgements[name]))] for name in learned],
        runtime,
        args,
    )
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    ranker.save_pretrained(str(folder))
    write_task(
        folder,
        articles,
        {name: task.queries[name] for name in held_out},
        {name: task.judgements[name] for name in held_out},
    )
    print(
        f"\n{len(learned):,} headlines learned, {len(held_out):,} held out, {len(articles):,} articles"
        " searched\n",
        flush=True,
    )
    flags = [
        "--texts",
        "texts.jsonl",
        "--id-column",
        "id",
        "--queries",
        "queries.jsonl",
        "--qrels",
        "qrels.txt",
        "--rerank",
        ".",
        "--rerank-depth",
        args.rerank_depth,
    ]
    command = [
        sys.executable,
        Path(relevance.__file__).resolve().parents[2] / "embed_search.py",
        "evaluate",
        "--json",
        *flags,
    ]
    scores = json.loads(
        subprocess.run(
            list(map(str, command)), cwd=folder, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    )["scores"]
    print(
        tabulate(
            [[name, *measures.values()] for name, measures in scores.items()],
            ["search", *relevance.USUAL.keys],
            floatfmt=".3f",
        )
    )
    print(
        "\n"
        + json.dumps(
            {
                "benchmark": "rerank",
                "settings": vars(args),
                "learned": len(learned),
                "held_out": len(held_out),
                "scores": scores,
            }
        )
    )


if __name__ == "__main__":
    cli.run(make_parser(), main)
