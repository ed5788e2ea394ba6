"""What --inspect shows before any training: the data, the tokenizer, the model, one text, one
batch.

With --compare-tokenizer it also shows a second tokenizer on the same text.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import models
from common.errors import about_encoding, listed, shorten
from common.terminal import say, table
from common.training import faults
from common.training.batching import Pick, pad_batch
from common.training.classifier import count_embeddings, mismatches
from common.training.data import DataNotes, Splits
from common.training.report import MOST_CLASSES, WORST_CLASSES
from common.training.run import MULTI, REGRESSION
from common.training.task import NOUNS, Task, task_of_rows
from common.training.tokenization import TokenConfig

if TYPE_CHECKING:
    import datasets

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
SHOWN_TOKENS = 24
SENTENCE_WORDS = 20  # on which two tokenizers are compared


def show(
    splits: Splits,
    tokenized: Splits,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: TokenConfig,
    batch_size: int,
) -> None:
    """Print everything that --inspect promises, on standard output."""
    holds = models.max_positions(model) or "any number"
    say(f"\nSPLITS\n{split_table(splits)}")
    _show_labels(task_of_rows(splits["train"]))
    say(
        f"\nLENGTHS in tokens, special tokens included; the model reads {tokens.max_length} at once"
        f" in training and {tokens.eval_max_length} in scoring, the model holds {holds}"
    )
    say(length_table(tokenized))
    _show_tokenizer(tokenizer)
    _show_text(splits["train"][0], tokenized["train"][0], tokenizer)
    _show_batch(tokenized["train"], tokenizer, batch_size)
    print(f"\nMODEL\n{model}")
    print(f"\nCONFIG\n{model.config.to_json_string(use_diff=False).strip()}")
    _show_match(model, tokenizer)


def show_faults(notes: DataNotes) -> None:
    """Print the rows that can't be used by kind, and what else is odd about the others."""
    if not notes.uncut and not notes.faults:
        return
    say("\nROWS THAT CAN'T BE USED, counted without the header (--skip-bad leaves them out)")
    say(faults.fault_table(notes.faults) if notes.faults else "none")
    if advice := about_encoding(notes.faults):
        say(advice)
    if notes.uncut:
        say(f"\nROWS THAT CAN BE USED\n{split_table(notes.uncut)}")
        say("\nWHAT ELSE IS TO BE KNOWN")
        if notes.not_cut is not None:
            say(f"training would end here: {notes.not_cut}")
        say(faults.describe(notes.uncut))


def split_table(splits: Splits) -> str:
    """Return the number of texts of each class or label in each split as a table, of more than 30
    only of the 20 rarest; of numbers their range.
    """
    task = task_of_rows(splits["train"])
    if task.kind == REGRESSION:
        return number_table(splits, task)
    names = task.names
    counts = [_texts_of_each(rows["label"][:], len(names)) for rows in splits.values()]
    shown, note = range(len(names)), ""
    if len(names) > MOST_CLASSES:
        shown = np.argsort(sum(counts), kind="stable")[:WORST_CLASSES].tolist()
        note = f"\nThese are the {WORST_CLASSES} rarest of {task.counted()}."
    lines = [[listed([names[number]]), *(count[number] for count in counts)] for number in shown]
    if task.kind == MULTI:
        lines.append(
            ["(no label)", *(sum(not cell for cell in rows["label"][:]) for rows in splits.values())]
        )
    lines.append(["all", *(len(rows) for rows in splits.values())])
    return table(lines, [NOUNS[task.kind][0], *splits], disable_numparse=[0]) + note


def _texts_of_each(cells: list, count: int) -> np.ndarray:
    """Return how many texts have each of `count` classes or labels."""
    numbers = [number for cell in cells for number in (cell if isinstance(cell, list) else [cell])]
    return np.bincount(np.asarray(numbers, np.int64), minlength=count)


def number_table(splits: Splits, task: Task) -> str:
    """Return count, range, mean and standard deviation of each number in each split as a table."""
    lines = []
    for name in task.names:
        for split, rows in splits.items():
            values = np.array([cell[name] for cell in rows["label"][:]])  # (N)
            measures = (values.min(), values.mean(), values.std(), values.max())
            lines.append([shorten(name, 60), split, len(values), *(f"{measure:.4g}" for measure in measures)])
    headers = ["number", "split", "texts", "least", "mean", "deviation", "most"]
    return table(lines, headers, keys=2, stralign="right", disable_numparse=True, colalign=("left", "left"))


def length_table(tokenized: Splits) -> str:
    """Return percentiles of the texts' lengths in tokens, and the share cut, for each split."""
    lines = []
    for split, rows in tokenized.items():
        lengths, read = np.asarray(rows["num_tokens"][:]), np.asarray(rows["num_read"][:])  # (N)
        percentiles = np.percentile(lengths, PERCENTILES).astype(int).tolist()
        texts_cut, tokens_cut = (lengths > read).mean(), 1 - read.sum() / lengths.sum()
        lines.append([split, *percentiles, f"{texts_cut:.1%}", f"{tokens_cut:.1%}"])
    between = [f"{percentile} %" for percentile in PERCENTILES[1:-1]]
    headers = ["tokens", "min", *between, "max", "texts cut", "tokens cut"]
    return table(lines, headers, stralign="right", disable_numparse=[0])


def show_comparison(text: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Print how two tokenizers see the beginning of a text, and what each makes of the other's ids.

    `tokenizers` maps two names to tokenizers.
    """
    sentence = " ".join(text.split()[:SENTENCE_WORDS])
    say(f"\nTWO TOKENIZERS on {sentence!r}")
    ids = {name: tokenizer(sentence)["input_ids"] for name, tokenizer in tokenizers.items()}
    columns = []
    for name, tokenizer in tokenizers.items():
        say(f"{name}: {type(tokenizer).__name__}, {len(tokenizer):,} tokens in its vocabulary")
        columns += [tokenizer.convert_ids_to_tokens(ids[name]), ids[name]]
    cells = list(itertools.zip_longest(*columns, fillvalue=""))
    headers = [header for name in tokenizers for header in (name, "id")]
    say(table(cells, headers, disable_numparse=True))
    for name, tokenizer in tokenizers.items():
        say(f"its own ids decoded by {name}:\n  {tokenizer.decode(ids[name])!r}")
    for name, tokenizer in tokenizers.items():
        for other, numbers in ids.items():
            if other != name:
                known = [number for number in numbers if number < len(tokenizer)]
                lost = len(numbers) - len(known)
                beyond = f" ({lost} of them beyond its vocabulary)" if lost else ""
                say(f"the ids of {other} decoded by {name}{beyond}:\n  {tokenizer.decode(known)!r}")


def _show_labels(task: Task) -> None:
    say("\nLABELS as the model's config keeps them")
    names = task.names[:MOST_CLASSES]
    rest = len(task.names) - len(names)
    more = f" and {rest:,} more" if rest else ""
    say(f"id2label   {dict(enumerate(names))}{more}")
    say(f"label2id   { {name: number for number, name in enumerate(names)} }{more}")


def _show_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    say(f"\nTOKENIZER {type(tokenizer).__name__}\nvocabulary  {len(tokenizer):,} tokens")
    for role, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            say(f"{role:<11} {token!r} = id {tokenizer.convert_tokens_to_ids(token)}")


def _show_text(row: dict, tokenized: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenized["input_ids"][0]
    shown = ids[:SHOWN_TOKENS]
    say(
        f"\nONE TEXT (row {row['row']}, {tokenized['num_tokens']} tokens, of which the model reads"
        f" {tokenized['num_read']}; the first {len(shown)} are shown)"
    )
    say("text     " + repr(row["text"][:120]))
    if "text_pair" in row:
        say("pair     " + repr(row["text_pair"][:120]))
    say("tokens   " + " ".join(tokenizer.convert_ids_to_tokens(shown)))
    say("ids      " + " ".join(map(str, shown)))
    say("decoded  " + repr(tokenizer.decode(shown)))


def _show_batch(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
    count = min(batch_size, len(rows), 4)  # four rows show what padding does
    picks = [Pick(number, chunks=(0,)) for number in range(count)]
    batch = pad_batch(picks, rows, tokenizer)
    say(f"\nONE PADDED BATCH of {count} (training uses {batch_size}), as the model gets it")
    for name, value in batch.items():
        say(f"{name:<15} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")
    say(f"padding         {(batch['attention_mask'] == 0).float().mean().item():.1%} of the positions")
    for row, mask in zip(batch["input_ids"], batch["attention_mask"]):
        say(f"  {_ends(row, tokenizer)}   ({int(mask.sum())} tokens + {int((mask == 0).sum())} padding)")


def _ends(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    return " ".join(tokens) if len(tokens) <= 10 else " ".join([*tokens[:6], "...", *tokens[-3:]])


def _show_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    say("\nTOKENIZER AND MODEL")
    problems = mismatches(model, tokenizer)
    for problem in problems:
        say(f"WARNING: {problem}")
    if not problems:
        num_embeddings = count_embeddings(model)
        embeddings = f"{num_embeddings:,} embeddings" if num_embeddings else "no table of embeddings"
        say(f"they belong together: {len(tokenizer):,} tokens, {embeddings}")
