"""What the command line names -> labelled splits, tokenizer, model; and what is said of them on
the screen.
"""

import hashlib

import datasets
import numpy as np

from common import reading, speedups
from common.errors import UserError
from common.runtime import Runtime
from common.training import adaptation, batching, labelling
from common.training import model as models

# on the bundled news more accurate than the beginning alone, at the same cost (README)
DEFAULT_MAX_LENGTH, DEFAULT_TRUNCATION = 256, "chunks"
LOSS = {"head": "lose their end", "tail": "lose their beginning", "head-tail": "lose their middle"}


def load_splits(args, runtime: Runtime) -> datasets.DatasetDict:
    """Return the three labelled splits that the flags ask for, and say how they came about."""
    found = reading.read(args.dataset, config=args.dataset_config, cache_dir=args.cache_dir)
    splits = labelling.choose_splits(
        found, {"train": args.train_split, "validation": args.validation_split, "test": args.test_split}
    )
    splits = labelling.validate(splits, text_column=args.text_column, label_column=args.label_column)
    splits, cut = labelling.cut_missing_splits(splits, seed=args.seed)
    splits["train"] = labelling.limit(
        splits["train"], args.max_train_samples, seed=args.seed, flag="--max-train-samples"
    )
    for split in ("validation", "test"):
        splits[split] = labelling.limit(
            splits[split], args.max_eval_samples, seed=args.seed, flag="--max-eval-samples"
        )
    classes = splits["train"].features["label"].num_classes
    runtime.say(
        f"data     {args.dataset}: "
        + ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items())
        + f" texts, {classes} classes"
    )
    if cut:
        runtime.say(
            f"         {' and '.join(cut)} cut from train: 10 % each, stratified, by seed {args.seed}"
        )
    for split, count in labelling.count_shared_texts(splits).items():
        if count:
            runtime.say(
                f"         {count:,} of the {split} texts stand in train too: their scores say little about"
                " new texts"
            )
    return splits


def load_rows_for_scoring(names: list[str], trained: dict, args, runtime: Runtime) -> datasets.Dataset:
    """Return the rows to score a saved model of the classes `names` on; refuses rows that it was
    trained on, by its settings `trained`.
    """
    found = reading.read(args.dataset, config=args.dataset_config, cache_dir=args.cache_dir)
    splits = labelling.choose_splits(found, {"test": args.test_split})
    splits = splits or labelling.choose_splits(
        found, {"train": args.train_split, "validation": args.validation_split}
    )
    splits = labelling.validate(
        splits, text_column=args.text_column, label_column=args.label_column, names=names
    )
    if "test" not in splits and name_digest(args.dataset) == trained.get("dataset_sha256"):
        if trained["seed"] != args.seed:
            raise UserError(
                f"--seed {args.seed}: the model was trained with --seed {trained['seed']}, which cuts another"
                " test split; use that seed"
            )
        splits, _ = labelling.cut_missing_splits(splits, seed=args.seed)
    split = "test" if "test" in splits else "train"
    rows = labelling.limit(splits[split], args.max_eval_samples, seed=args.seed, flag="--max-eval-samples")
    runtime.say(f"data     {args.dataset}: {len(rows):,} texts of its {split} split")
    return rows


def name_digest(name: str) -> str:
    """Return a SHA-256 of a data set's full name, in hexadecimal: it tells whether another name is
    the same, and not what it is.
    """
    return hashlib.sha256(reading.full_name(name).encode()).hexdigest()


def tokenize(splits: datasets.DatasetDict, tokenizer, args, runtime: Runtime) -> dict[str, datasets.Dataset]:
    """Return the tokenised splits, and say what truncation drops and what padding costs."""
    lengths = {split: args.max_length if split == "train" else args.eval_max_length for split in splits}
    with runtime.local_main_first():
        tokenized = {
            split: batching.tokenize(
                rows,
                tokenizer,
                max_length=lengths[split],
                truncation=args.truncation,
                cache_dir=args.cache_dir,
            )
            for split, rows in splits.items()
        }
    for use, split in (("training", "train"), ("scoring", "test")):
        num_tokens, num_read = (np.asarray(tokenized[split][name][:]) for name in ("num_tokens", "num_read"))
        longer, dropped = (num_tokens > lengths[split]).mean(), 1 - num_read.sum() / num_tokens.sum()
        windows = {
            "train": f"a step reads {args.max_windows} of their windows, drawn anew each epoch",
            "test": "all of their windows are read",
        }[split]
        what = (
            ""
            if longer == 0
            else (
                f"; {windows}"
                if args.truncation == "chunks"
                else f" and {LOSS[args.truncation]}, {dropped:.1%} of all tokens"
            )
        )
        runtime.say(
            f"{'tokens  ' if split == 'train' else '        '} at most {lengths[split]} in {use}:"
            f" {longer:.1%} of the texts are longer{what}"
        )
    longest = batching.longest_windows(tokenized["train"])
    steps = batching.batch_order(
        longest,
        batch_size=batching.step_size(args, runtime),
        seed=args.seed,
        epoch=1,
        buckets=args.batching == "buckets",
    )
    size = args.batch_size * runtime.world_size
    batches = [step[start : start + size] for step in steps for start in range(0, len(step), size)]
    runtime.say(
        f"         {batching.padding_share(longest, batches):.1%} of a training batch is padding (--batching"
        f" {args.batching})"
    )
    return tokenized


def load_for_training(rows, args, runtime):
    """Return tokenizer, model and tokenised splits; sets the flags for lengths and truncation to
    what is in use.
    """
    tokenizer, note = models.load_tokenizer(args.model, cache_dir=args.cache_dir)
    dropout = adaptation.dropout_options(
        models.load_config(args.model, cache_dir=args.cache_dir),
        dropout=args.dropout,
        attention_dropout=args.attention_dropout,
        name=args.model,
    )
    model, is_new = models.load_classifier(
        args.model,
        names=rows["train"].features["label"].names,
        dropout=dropout,
        pad_token_id=tokenizer.pad_token_id,
        cache_dir=args.cache_dir,
    )
    args.max_length = models.choose_max_length(
        args.max_length, DEFAULT_MAX_LENGTH, model, tokenizer, flag="--max-length"
    )
    args.eval_max_length = models.choose_max_length(
        args.eval_max_length, args.max_length, model, tokenizer, flag="--eval-max-length"
    )
    args.truncation = args.truncation or DEFAULT_TRUNCATION
    size = sum(parameter.numel() for parameter in model.parameters())
    runtime.say(
        f"model    {args.model}: {type(model).__name__}, {size / 1e6:.1f} million parameters, with"
        f" {'a new head' if is_new else 'the head that it was saved with'}"
    )
    if note:
        runtime.say(f"         {note}")
    return tokenizer, model, tokenize(rows, tokenizer, args, runtime)


def load_saved(name: str, args, runtime):
    """Return a saved model on its device and its tokenizer; sets the flags for length and
    truncation to what it was scored with, if not given.
    """
    model = models.load_saved(name, cache_dir=args.cache_dir).to(runtime.device)
    speedups.use_fast_attention(model)
    tokenizer, _ = models.load_tokenizer(name, cache_dir=args.cache_dir)
    args.eval_max_length = models.choose_max_length(
        args.eval_max_length, tokenizer.model_max_length, model, tokenizer, flag="--eval-max-length"
    )
    args.truncation = args.truncation or models.saved_settings(name).get("truncation", DEFAULT_TRUNCATION)
    return model, tokenizer
