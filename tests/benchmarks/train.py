#!/usr/bin/env python
"""Training speed and accuracy: transformers Trainer beside the loop of train_classifier.py, on the
bundled texts.

Contenders: `trainer`, Trainer as in its tutorial (fp32, random order, the model's own dropout);
`best_trainer`, the same with bf16, group_by_length and our attention dropout; `ours`,
train_classifier.py with its defaults; `ours_with_attention_dropout`, with the model's own.

Speed: each round runs every contender in a process of its own, one after the other, over a sample
of the batches of its own epoch. Accuracy: each contender trains fully and is scored on the test
split, once a seed. The last line on stdout is one JSON object.

  python tests/benchmarks/train.py  # speed: about 10 minutes on two cores
  python tests/benchmarks/train.py --sample 16 --rounds 1               # a quick look
  python tests/benchmarks/train.py --accuracy  # five seeds: about an hour on two cores
  python tests/benchmarks/train.py --accuracy --contenders ours ours_with_attention_dropout --seeds 0 1 2 3
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import datasets
import environment
import numpy as np
import torch
from tabulate import tabulate
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import train_classifier
from common import cli, models, sources
from common.errors import UserError
from common.runtime import (
    Runtime,
    choose_device,
    choose_precision,
    peak_memory_bytes,
    seed_everything,
    start_runtime,
)
from common.training import adaptation, batching, tracking
from common.training.batching import Pick
from common.training.checkpoint import TrainingState
from common.training.data import DataNotes

# their names in the ratios
CONTENDERS = {
    "trainer": "trainer",
    "best_trainer": "best_trainer",
    "ours": "train",
    "ours_with_attention_dropout": "train_with_attention_dropout",
}
# the tutorial's
SPEED = {
    "contenders": ["trainer", "best_trainer", "ours"],
    "batch_size": 8,
    "max_length": 512,
    "lr": 2e-5,
    "epochs": 3,
}
# for two cores
ACCURACY = {"contenders": ["trainer", "ours"], "batch_size": 16, "max_length": 128, "lr": 1e-4, "epochs": 2}
WEIGHT_DECAY = 0.01  # the tutorial's, and our default


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="tests/benchmarks/train.py", description=__doc__)
    cli.add_shared_flags(parser, model="bundled/all-MiniLM-L6-v2")
    group = parser.add_argument_group("both comparisons")
    kinds = {"contenders": {"nargs": "+", "choices": CONTENDERS}, "lr": {"type": cli.positive_float}}
    for name in SPEED:
        group.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            **kinds.get(name, {"type": cli.positive_int}),
            help=f"default for speed: {SPEED[name]}; for accuracy: {ACCURACY[name]}",
        )
    for split in ("train", "eval"):
        group.add_argument(f"--max-{split}-samples", type=cli.positive_int, help="as in train_classifier.py")
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--sample",
        type=cli.positive_int,
        default=96,
        help="texts that each contender is timed on in each round",
    )
    group.add_argument(
        "--warmup-steps", type=cli.positive_int, default=2, help="steps before, on the longest other texts"
    )
    group.add_argument("--rounds", type=cli.positive_int, default=3, help="rounds; medians count")
    group = parser.add_argument_group("accuracy")
    group.add_argument("--accuracy", action="store_true", help="compare accuracies instead of speeds")
    group.add_argument(
        "--seeds",
        nargs="+",
        type=cli.non_negative_int,
        default=[0, 1, 2, 3, 4],
        help="each cuts its own splits, for all alike",
    )
    # what the script runs in a process of its own
    parser.add_argument("--child", choices=[*CONTENDERS, "limits"], help=argparse.SUPPRESS)
    parser.add_argument("--round", type=cli.non_negative_int, default=0, help=argparse.SUPPRESS)
    return parser


@dataclass
class Setup:
    """One contender, loaded."""

    contender: str
    args: argparse.Namespace  # the flags of train_classifier.py
    config: train_classifier.TrainConfig
    runtime: Runtime
    tokenizer: object
    model: torch.nn.Module
    tokenized: dict[str, datasets.Dataset]


def model_config(flags) -> PreTrainedConfig:
    """Return the config of the model that all contenders train."""
    folder = sources.find_folder(flags.model, kind="encoder", cache_dir=flags.cache_dir)
    return models.load(AutoConfig, folder, name=flags.model)


def classifier_flags(contender: str, flags, **more):
    """Return the flags of train_classifier.py for a contender; what is not given here keeps its
    default.
    """
    names = (
        "model",
        "cache_dir",
        "device",
        "precision",
        "seed",
        *SPEED,
        "max_train_samples",
        "max_eval_samples",
    )
    given = {
        **{name: getattr(flags, name) for name in names if name != "contenders"},
        "weight_decay": WEIGHT_DECAY,
        "truncation": "head",
        **more,
    }
    if contender == "ours_with_attention_dropout":
        config = model_config(flags)
        given["attention_dropout"] = next(
            getattr(config, name) for name in adaptation.ATTENTION_DROPOUT_NAMES if hasattr(config, name)
        )
    arguments = [
        text
        for name, value in given.items()
        if value is not None
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    return train_classifier.make_parser().parse_args(arguments)


def load(contender: str, flags) -> Setup:
    """Load a contender's data and model. Only ours gets what start_runtime changes in the process,
    above all the allocator's settings.
    """
    args = classifier_flags(contender, flags)
    if contender.startswith("ours"):
        runtime = start_runtime(args.device, args.precision, args.seed)
    else:
        device = choose_device(args.device)
        runtime = Runtime(device, choose_precision(args.precision, device))
        seed_everything(args.seed)
    loaded = train_classifier.load(args, runtime, DataNotes())
    model, tokenized = loaded.model, loaded.tokenized
    if contender == "trainer":  # the model as the tutorial loads it
        seed_everything(args.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            sources.find_folder(args.model, kind="encoder", cache_dir=args.cache_dir),
            num_labels=loaded.splits["train"].features["label"].num_classes,
            dtype=torch.float32,
        )
    if not contender.startswith("ours"):
        tokenized = {
            split: rows.map(first_chunk, load_from_cache_file=False) for split, rows in tokenized.items()
        }
    return Setup(contender, args, loaded.config, runtime, loaded.tokenizer, model, tokenized)


def first_chunk(row: dict) -> dict:
    """Return a tokenised row as Trainer takes it: one chunk, and the length by which it groups."""
    inputs = {name: chunks[0] for name, chunks in row.items() if name not in batching.NOT_MODEL_INPUTS}
    return {**inputs, "length": len(inputs["input_ids"])}


def trainer_options(setup: Setup, folder: str, *, seed: int, **more) -> dict:
    """Return Trainer's arguments: the tutorial's, and for `best_trainer` also its own means of
    being faster.
    """
    args, precision = setup.args, setup.runtime.precision
    best = {
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "train_sampling_strategy": "group_by_length",
    }
    arguments = TrainingArguments(
        output_dir=folder,
        learning_rate=args.lr,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        num_train_epochs=args.epochs,
        weight_decay=WEIGHT_DECAY,
        report_to="none",
        seed=seed,
        use_cpu=setup.runtime.device.type == "cpu",
        **(best if setup.contender == "best_trainer" else {}),
        **more,
    )
    return {
        "model": setup.model,
        "args": arguments,
        "train_dataset": setup.tokenized["train"],
        "eval_dataset": setup.tokenized["validation"],
        "processing_class": setup.tokenizer,
        "data_collator": DataCollatorWithPadding(setup.tokenizer),
    }


def choose_batches(batches: list, lengths: np.ndarray, flags) -> tuple[list, list]:
    """Return the batches of an epoch to warm up with and those to time.

    The timed ones stand at even quantiles of the padded length, in the epoch's order. So they are
    as long as the epoch is on the whole, and every contender sorts by length among all texts: in a
    small sample of texts there are no eight of the same length.
    """
    full = [np.asarray(batch) for batch in batches if len(batch) == flags.batch_size]
    by_length = sorted(
        range(len(full)), key=lambda number: (lengths[full[number]].max(), lengths[full[number]].sum())
    )
    count = min(max(flags.sample // flags.batch_size, 1), len(full) - flags.warmup_steps)
    if count < 1:
        raise UserError(
            f"--warmup-steps {flags.warmup_steps}: the training split has {len(full)} full batches; use"
            " fewer, or more texts"
        )
    timed = {by_length[(2 * number + 1) * len(full) // (2 * count)] for number in range(count)}
    others = [number for number in by_length if number not in timed]
    return [full[number] for number in others[-flags.warmup_steps :]], [
        full[number] for number in sorted(timed)
    ]


class SampledTrainer(Trainer):
    """Trainer that runs only the batches that `choose` takes of its own sampler's epoch."""

    def _get_train_sampler(self, train_dataset=None):
        order, size = list(super()._get_train_sampler(train_dataset)), self.args.train_batch_size
        self.epoch_batches = [order[start : start + size] for start in range(0, len(order), size)]
        self.warmup, self.timed = self.choose(self.epoch_batches)
        return np.concatenate([*self.warmup, *self.timed]).tolist()


class Clock(TrainerCallback):
    """Times Trainer's steps after `warmup_steps`: what it does before the first step is left out,
    as it is for ours.
    """

    def __init__(self, warmup_steps: int, device: torch.device):
        self.warmup_steps, self.device, self.moments = warmup_steps, device, []

    def on_step_end(self, args, state, control, **others):
        if state.global_step in (self.warmup_steps, state.max_steps):
            self.moments.append(environment.moment(self.device))


def time_trainer(setup: Setup, lengths: np.ndarray, flags, folder: str) -> dict:
    """Return the figures of Trainer on a sample of its epoch."""
    setup.args.epochs = 1
    clock = Clock(flags.warmup_steps, setup.runtime.device)
    trainer = SampledTrainer(
        **trainer_options(setup, folder, seed=flags.seed + flags.round, save_strategy="no"), callbacks=[clock]
    )
    trainer.choose = lambda batches: choose_batches(batches, lengths, flags)
    trainer.train()
    return figures(clock.moments[1] - clock.moments[0], trainer.timed, trainer.epoch_batches, lengths, setup)


class StepClock:
    """Times our steps after `warmup_steps`, as Clock does Trainer's.

    It stands for the signals that can stop a run, which the loop asks after each optimizer step.
    """

    def __init__(self, state: TrainingState, warmup_steps: int, num_steps: int, device: torch.device):
        self.state, self.ends, self.device = state, (warmup_steps, num_steps), device
        self.moments: list[np.ndarray] = []

    def requested(self) -> bool:
        if self.state.step in self.ends:
            self.moments.append(environment.moment(self.device))
        return False


def time_ours(setup: Setup, lengths: np.ndarray, flags, folder: str) -> dict:
    """Return the figures of the loop of train_classifier.py on a sample of its epoch.

    The log is written as in any run; nothing is evaluated or saved.
    """
    config, runtime, rows = setup.config, setup.runtime, setup.tokenized["train"]
    state = train_classifier.prepare(setup.model, setup.tokenizer, rows, config, runtime)
    order = batching.batch_order(
        lengths,
        batch_size=config.batches.batch_size,
        seed=config.batches.seed,
        epoch=flags.round + 1,
        buckets=config.batches.batching == "buckets",
    )
    warmup, timed = choose_batches(order, lengths, flags)
    steps = [[[Pick(row, (0,)) for row in batch.tolist()]] for batch in (*warmup, *timed)]
    clock = StepClock(state, len(warmup), len(steps), runtime.device)
    log = tracking.RunLog(Path(folder), {})
    tokens = {"train_tokens": 1, "validation_tokens": 1, "test_tokens": 1}  # no forecast is shown
    forecast = tracking.Forecast(**tokens, validations=1, clock=tracking.Clock())
    run = train_classifier.Run(log, mock.Mock(), clock, forecast, mock.Mock())
    with (
        mock.patch.object(train_classifier.batching, "plan_epoch", lambda *_, **__: steps),
        mock.patch.object(train_classifier, "validate", lambda *_: None),
    ):
        one_epoch = dataclasses.replace(config, epochs=1)
        train_classifier.train(state, {"train": rows, "validation": rows}, run, one_epoch, runtime)
    log.close()
    return figures(clock.moments[1] - clock.moments[0], timed, order, lengths, setup)


def figures(elapsed: np.ndarray, timed: list, epoch_batches: list, lengths: np.ndarray, setup: Setup) -> dict:
    """Return what a child reports of its timed batches; `sample_to_epoch` compares their padded
    length a text with the whole epoch's.
    """
    rows, (seconds, cpu_seconds) = np.concatenate(timed), elapsed.tolist()
    padded, padded_epoch = (
        sum(lengths[np.asarray(batch)].max() * len(batch) for batch in batches)
        for batches in (timed, epoch_batches)
    )
    return {
        "examples_per_second": len(rows) / seconds,
        "tokens_per_second": int(lengths[rows].sum()) / seconds,
        "seconds": seconds,
        "cpu_seconds_per_example": cpu_seconds / len(rows),
        "padding_share": batching.padding_share(lengths, epoch_batches),
        "sample_to_epoch": float(padded / len(rows) * len(lengths) / padded_epoch),
        "gflops": training_flops(setup.model, lengths[rows]) / seconds / 1e9,
        "peak_memory_mb": peak_memory_bytes(setup.runtime.device) / 1e6,
    }


def training_flops(model, lengths: np.ndarray) -> float:
    """Return the FLOPs that training on texts of these lengths must take, without padding:
    forward, and twice that backward.

    A matrix weight is 2 a token; attention's two products are 4 x width x length a token and layer
    (Kaplan et al. 2020, section 2.1). Of the last layer, keys and values alone must be computed for
    all tokens (common/speedups.py); what it and the pooler do for one token a text is left out.
    """
    last = adaptation.encoder_layers(model)[-1]
    needed = {
        module: module.weight.numel()
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.Linear) and "pooler" not in name
    }
    for module in last.modules():
        needed.pop(module, None)
    weights = sum(needed.values()) + 2 * model.config.hidden_size**2
    lengths, layers = lengths.astype(float), model.config.num_hidden_layers - 1
    return float(3 * (2 * weights * lengths + 4 * layers * model.config.hidden_size * lengths**2).sum())


def train_fully(contender: str, flags, folder: str) -> dict:
    """Train a contender as its user would, and return `test_accuracy` of its best epoch."""
    if contender.startswith("ours"):
        args = classifier_flags(contender, flags, output_dir=f"{folder}/run")
        train_classifier.fit(args, start_runtime(args.device, args.precision, args.seed))
        return {"test_accuracy": json.loads(Path(folder, "run", "metrics.json").read_text())["test_accuracy"]}
    setup = load(contender, flags)
    trainer = Trainer(
        **trainer_options(
            setup,
            folder,
            seed=flags.seed,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
        )
    )
    trainer.train()
    answer = trainer.predict(setup.tokenized["test"])
    return {"test_accuracy": float((answer.predictions.argmax(-1) == answer.label_ids).mean())}


def child(flags) -> dict:
    """Return the figures of one contender, in this process."""
    if flags.child == "limits":
        config = model_config(flags)
        return environment.limits(
            choose_device(flags.device), rows=flags.batch_size * flags.max_length, width=config.hidden_size
        )
    with tempfile.TemporaryDirectory() as folder:
        if flags.accuracy:
            return train_fully(flags.child, flags, folder)
        setup = load(flags.child, flags)
        lengths = batching.longest_chunks(setup.tokenized["train"])
        return (time_ours if flags.child.startswith("ours") else time_trainer)(setup, lengths, flags, folder)


def compare_speeds(flags) -> dict:
    """Run the rounds, print a line a measurement and the table, return medians and ratios."""
    rounds = {name: [] for name in ["limits", *flags.contenders]}
    for number in range(flags.rounds):
        # interleaved: a slow hour of the machine is slow for all
        for name, measured in rounds.items():
            measured.append(
                environment.run_child(
                    __file__,
                    "--child",
                    name,
                    "--round",
                    str(number),
                    **environment.variables(is_ours=name.startswith("ours")),
                )
            )
            if name != "limits":
                print(
                    f"round {number + 1}/{flags.rounds}  {name:<28} {measured[-1]['examples_per_second']:.2f}"
                    " examples/s",
                    flush=True,
                )
    found, limits = ratios(rounds, flags), environment.median_of(rounds.pop("limits"))
    show_speeds(rounds, limits, found, flags)
    contenders = {
        name: {**environment.median_of(measured), "rounds": measured} for name, measured in rounds.items()
    }
    return {"limits": limits, "contenders": contenders, "ratios": found}


def precision_of(contender: str, flags) -> str:
    """Return the precision in which a contender computes here: its limit is that of the machine."""
    is_tutorial = contender == "trainer"
    return "fp32" if is_tutorial else choose_precision(flags.precision, choose_device(flags.device))


def ratios(rounds: dict[str, list[dict]], flags) -> dict[str, float]:
    """Return the median over the rounds of each contender's speed over each earlier one's, and its
    share of the machine's limit in the precision that it computes in.
    """
    found, names = {}, [name for name in rounds if name != "limits"]
    for place, name in enumerate(names):
        for peer in names[:place]:
            factors = [
                own["examples_per_second"] / other["examples_per_second"]
                for own, other in zip(rounds[name], rounds[peer])
            ]
            found[f"{CONTENDERS[name]}_vs_{CONTENDERS[peer]}"] = statistics.median(factors)
        # fp16 is for GPUs, where it is as fast as bf16
        precision = precision_of(name, flags).replace("fp16", "bf16")
        limit = f"{precision}_gflops"
        shares = [own["gflops"] / limits[limit] for own, limits in zip(rounds[name], rounds["limits"])]
        found[f"{CONTENDERS[name]}_vs_{precision}_limit"] = statistics.median(shares)
    return found


def share_of_limit(short: str, found: dict[str, float]) -> str:
    """Return words for a contender's share of the machine's limit, and in which precision."""
    shares = {name: found.get(f"{short}_vs_{name}_limit") for name in ("fp32", "bf16")}
    return next(f"{share:.1%} {name}" for name, share in shares.items() if share is not None)


def show_speeds(rounds: dict[str, list[dict]], limits: dict, found: dict, flags):
    """Print the table of contenders, and the machine's limits below it."""
    first, lines = CONTENDERS[flags.contenders[0]], []
    for name, measured in rounds.items():
        own, short, speeds = (
            environment.median_of(measured),
            CONTENDERS[name],
            [entry["examples_per_second"] for entry in measured],
        )
        lines.append(
            [
                name,
                own["examples_per_second"],
                f"{min(speeds):.2f}-{max(speeds):.2f}",
                own["tokens_per_second"],
                own["cpu_seconds_per_example"],
                own["peak_memory_mb"],
                f"{own['padding_share']:.1%}",
                share_of_limit(short, found),
                found.get(f"{short}_vs_{first}", 1.0),
            ]
        )
    headers = [
        "contender",
        "examples/s",
        "min-max",
        "tokens/s",
        "CPU s/example",
        "peak MB",
        "padding",
        "of limit",
        f"times {first}",
    ]
    print(
        "\n"
        + tabulate(
            lines,
            headers,
            floatfmt=("", ".2f", "", ".0f", ".2f", ".0f", "", "", ".2f"),
            colalign=("left", *["right"] * 8),
        )
    )
    print(
        f"\nmedians over {flags.rounds} x {flags.sample} texts of at most {flags.max_length} tokens, batch"
        f" {flags.batch_size}; padding is no token"
    )
    environment.show_limits(limits)


def compare_accuracies(flags) -> dict:
    """Train each contender with each seed, print the table, return accuracies and paired
    differences from the first contender.
    """
    accuracies = {name: [] for name in flags.contenders}
    for seed in flags.seeds:
        for name, measured in accuracies.items():
            measured.append(
                environment.run_child(
                    __file__,
                    "--child",
                    name,
                    "--seed",
                    str(seed),
                    **environment.variables(is_ours=name.startswith("ours")),
                )["test_accuracy"]
            )
            print(f"seed {seed}  {name:<28} test accuracy {measured[-1]:.4f}", flush=True)
    first = flags.contenders[0]
    differences = {
        name: environment.paired_difference(measured, accuracies[first])
        for name, measured in accuracies.items()
        if name != first
    }
    lines = [[name, *measured, statistics.mean(measured)] for name, measured in accuracies.items()]
    print(
        "\n"
        + tabulate(
            lines, ["test accuracy", *(f"seed {seed}" for seed in flags.seeds), "mean"], floatfmt=".4f"
        )
    )
    for name, found in differences.items():
        interval = (
            "unknown, from one seed"
            if found["low"] is None
            else f"{found['low']:+.4f} to {found['high']:+.4f}"
        )
        print(f"{name} - {first}: {found['mean']:+.4f} on average; 95 % interval {interval}", flush=True)
    return {"contenders": accuracies, "differences": differences}


def main(flags):
    flags = argparse.Namespace(**{**(ACCURACY if flags.accuracy else SPEED), **vars(flags)})
    if flags.child:
        print(json.dumps(child(flags)))
        return
    header = environment.describe(choose_device(flags.device))
    environment.show(header)
    found = compare_accuracies(flags) if flags.accuracy else compare_speeds(flags)
    print(
        "\n"
        + json.dumps(
            {
                "benchmark": "accuracy" if flags.accuracy else "speed",
                "environment": header,
                "settings": vars(flags),
                **found,
            }
        )
    )


if __name__ == "__main__":
    cli.run(make_parser(), main)
