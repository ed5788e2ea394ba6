"""What --inspect shows before any training: the data, the tokenizer, one text on its way to the
model, one batch.
"""

import numpy as np
import torch
from tabulate import tabulate

from common.models import max_positions
from common.training import batching
from common.training.model import mismatches

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
SHOWN_TOKENS = 24


def split_table(splits) -> str:
    """Return the number of texts of each class in each split as a table."""
    names = splits["train"].features["label"].names
    counts = {split: np.bincount(rows["label"][:], minlength=len(names)) for split, rows in splits.items()}
    lines = [[name, *(int(count[number]) for count in counts.values())] for number, name in enumerate(names)]
    return tabulate([*lines, ["all", *(len(rows) for rows in splits.values())]], ["class", *counts])


def length_table(tokenized) -> str:
    """Return the percentiles of the texts' lengths in tokens, and the share that truncation cuts,
    for each split.
    """
    lines = []
    for split, rows in tokenized.items():
        lengths, kept = np.asarray(rows["num_tokens"][:]), np.asarray(rows["num_read"][:])
        lines.append(
            [
                split,
                *np.percentile(lengths, PERCENTILES).astype(int).tolist(),
                f"{(lengths > kept).mean():.1%}",
                f"{1 - kept.sum() / lengths.sum():.1%}",
            ]
        )
    return tabulate(
        lines,
        ["tokens", "min", *(f"{p} %" for p in PERCENTILES[1:-1]), "max", "texts cut", "tokens cut"],
        stralign="right",
    )


def show(splits, tokenized, model, tokenizer, *, max_lengths: tuple[int, int], batch_size: int):
    """Print everything that --inspect promises, on standard output."""
    print("\nSPLITS\n" + split_table(splits))
    print(
        f"\nLENGTHS in tokens, special tokens included; the model reads {max_lengths[0]} at once in training"
        f" and {max_lengths[1]} in scoring, the model holds {max_positions(model) or 'any number'}"
    )
    print(length_table(tokenized))
    _show_tokenizer(tokenizer)
    _show_text(splits["train"][0], tokenized["train"][0], tokenizer)
    _show_batch(tokenized["train"], tokenizer, batch_size)
    warnings = mismatches(model, tokenizer)
    print(
        "\nTOKENIZER AND MODEL\n"
        + (
            "\n".join(f"WARNING: {warning}" for warning in warnings)
            or f"they belong together: {len(tokenizer):,} tokens, "
            f"{model.get_input_embeddings().num_embeddings:,} embeddings"
        )
    )


def _show_tokenizer(tokenizer):
    print(f"\nTOKENIZER {type(tokenizer).__name__}\nvocabulary  {len(tokenizer):,} tokens")
    for role, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            print(f"{role:<11} {token!r} = id {tokenizer.convert_tokens_to_ids(token)}")


def _show_text(row: dict, tokenized: dict, tokenizer):
    ids = tokenized["input_ids"][0]
    print(
        f"\nONE TEXT (row {row['row']}, {tokenized['num_tokens']} tokens, of which the model sees"
        f" {tokenized['num_read']}; the first {min(SHOWN_TOKENS, len(ids))} shown)"
    )
    print("text     " + repr(row["text"][:120]))
    print("tokens   " + " ".join(tokenizer.convert_ids_to_tokens(ids[:SHOWN_TOKENS])))
    print("ids      " + " ".join(map(str, ids[:SHOWN_TOKENS])))
    print("decoded  " + repr(tokenizer.decode(ids[:SHOWN_TOKENS])))


def _show_batch(rows, tokenizer, batch_size: int):
    numbers = list(range(min(batch_size, len(rows), 4)))  # four rows show what padding does
    batch = next(iter(batching.loader(rows, [[(number, (0,)) for number in numbers]], tokenizer)))
    print(f"\nONE PADDED BATCH of {len(numbers)} (training uses {batch_size}), as the model gets it")
    for name, value in batch.items():
        print(f"{name:<15} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")
    print(f"padding         {(batch['attention_mask'] == 0).float().mean().item():.1%} of the positions")
    for row, mask in zip(batch["input_ids"], batch["attention_mask"]):
        print(f"  {_ends(row, tokenizer)}   ({int(mask.sum())} tokens + {int((mask == 0).sum())} padding)")


def _ends(ids: torch.Tensor, tokenizer) -> str:
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    return " ".join(tokens) if len(tokens) <= 10 else " ".join([*tokens[:6], "...", *tokens[-3:]])
