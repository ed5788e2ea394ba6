"""The labelled splits that the command line asks for, and what is said of them on the screen."""

import datasets
import numpy as np

from common import data
from common.errors import UserError
from common.runtime import Runtime
from common.training import batching, labelling

LOSS = {"head": "lose their end", "tail": "lose their beginning", "head-tail": "lose their middle", "chunks": "are read in several windows"}


def load(args, machine: Runtime) -> datasets.DatasetDict:
    """Return the three labelled splits that the flags ask for, and say how they came about."""
    found = data.read(args.dataset, config=args.dataset_config, cache_dir=args.cache_dir)
    splits = labelling.choose_splits(found, {"train": args.train_split, "validation": args.validation_split, "test": args.test_split})
    splits = labelling.validate(splits, text_column=args.text_column, label_column=args.label_column)
    splits, cut = labelling.cut_missing_splits(splits, seed=args.seed)
    splits["train"] = labelling.limit(splits["train"], args.max_train_samples, seed=args.seed, flag="--max-train-samples")
    for split in ("validation", "test"):
        splits[split] = labelling.limit(splits[split], args.max_eval_samples, seed=args.seed, flag="--max-eval-samples")
    classes = splits["train"].features["label"].num_classes
    machine.say(f"data     {args.dataset}: " + ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items()) + f" texts, {classes} classes")
    if cut:
        machine.say(f"         {' and '.join(cut)} cut from train: 10 % each, stratified, by seed {args.seed}")
    for split, count in labelling.count_shared_texts(splits).items():
        if count:
            machine.say(f"         {count:,} of the {split} texts stand in train too: their scores say little about new texts")
    return splits


def load_for_scoring(names: list[str], trained: dict, args, machine: Runtime) -> datasets.Dataset:
    """Return the rows to score a saved model of the classes `names` on; refuses rows that it was trained on, by its settings `trained`."""
    found = data.read(args.dataset, config=args.dataset_config, cache_dir=args.cache_dir)
    splits = labelling.choose_splits(found, {"test": args.test_split})
    splits = splits or labelling.choose_splits(found, {"train": args.train_split, "validation": args.validation_split})
    splits = labelling.validate(splits, text_column=args.text_column, label_column=args.label_column, names=names)
    if "test" not in splits and trained.get("dataset") == data.full_name(args.dataset):
        if trained["seed"] != args.seed:
            raise UserError(f"--seed {args.seed}: the model was trained with --seed {trained['seed']}, which cuts another test split; use that seed")
        splits, _ = labelling.cut_missing_splits(splits, seed=args.seed)
    split = "test" if "test" in splits else "train"
    rows = labelling.limit(splits[split], args.max_eval_samples, seed=args.seed, flag="--max-eval-samples")
    machine.say(f"data     {args.dataset}: {len(rows):,} texts of its {split} split")
    return rows


def tokenize(splits: datasets.DatasetDict, tokenizer, args, machine: Runtime) -> dict[str, datasets.Dataset]:
    """Return the tokenised splits, and say what truncation drops and what padding costs."""
    lengths = {split: args.max_length if split == "train" else args.eval_max_length for split in splits}
    with machine.main_first():
        tokenized = {split: batching.tokenize(rows, tokenizer, max_length=lengths[split], truncation=args.truncation, cache_dir=args.cache_dir)
                     for split, rows in splits.items()}
    for use, split in (("training", "train"), ("scoring", "test")):
        num_tokens, num_read = (np.asarray(tokenized[split][name][:]) for name in ("num_tokens", "num_read"))
        longer, dropped = (num_tokens > lengths[split]).mean(), 1 - num_read.sum() / num_tokens.sum()
        machine.say(f"{'tokens  ' if split == 'train' else '        '} at most {lengths[split]} in {use}: {longer:.1%} of the texts are longer and "
                    f"{LOSS[args.truncation]}" + (f", {dropped:.1%} of all tokens" if args.truncation != "chunks" else ""))
    longest = batching.longest_windows(tokenized["train"])
    order = batching.batch_order(longest, batch_size=args.batch_size * machine.world_size, seed=args.seed, epoch=1, buckets=args.batching == "buckets")
    machine.say(f"         {batching.padding_share(longest, order):.1%} of a training batch is padding (--batching {args.batching})")
    return tokenized
