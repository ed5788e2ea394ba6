#!/usr/bin/env python
"""Fine-tune a pretrained encoder to classify texts, in an explicit PyTorch loop; evaluate it; predict with it.

The loop is in train(): AdamW with decay groups, a linear schedule with warm-up, automatic mixed precision, gradient
accumulation, clipping, DistributedDataParallel. Left out on purpose: Trainer, callbacks, multi-label and regression heads.

  python train_classifier.py --epochs 3                                  # BBC News with all-MiniLM-L6-v2, both bundled
  python train_classifier.py --dataset reviews.csv --text-column review --label-column stars --output-dir runs/reviews
  python train_classifier.py --dataset reviews.csv --inspect             # look at data, tokens and a batch; train nothing
  python train_classifier.py --model runs/reviews/best --predict new.txt # one JSON line a text
  python train_classifier.py --model runs/reviews/best --dataset reviews.csv --evaluate-only
  torchrun --nproc-per-node 2 train_classifier.py --epochs 3             # one process a GPU (or CPU share)
"""

import contextlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from common import cli, data, runtime, tracking
from common.errors import UserError
from common.training import batching, inspection, labelling, report
from common.training import model as models
from common.training.evaluation import is_better, predict_texts, score
from common.training.steps import LossMeter, accumulation_windows, count_examples, decay_groups, mark_last, sync_gradients

DEFAULT_MAX_LENGTH, DEFAULT_EVAL_MAX_LENGTH = 256, 512  # training costs three times what scoring does: scoring can read more of a text
MISTAKES_IN_TENSORBOARD = 50
RUN_SIZE_IN_MODELS = 3  # a run folder holds the best model, for a moment twice, and small files


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="train_classifier.py", description=__doc__)
    cli.add_shared_flags(parser, model="bundled/all-MiniLM-L6-v2")
    parser.add_argument("--output-dir", type=cli.folder, help="the run's folder (default: runs/<data set>-<model>-<time>)")

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="bundled/bbc-news", help="a bundled name, a CSV/TSV/JSON/JSONL/Parquet file, a folder of class folders, or a Hub id")
    group.add_argument("--dataset-config", help="the configuration of a Hub data set that has several")
    group.add_argument("--text-column", default="text", help="where the texts are")
    group.add_argument("--label-column", default="label", help="where the labels are: strings or whole numbers")
    for split in ("train", "validation", "test"):
        group.add_argument(f"--{split}-split", help="its name in the data set" + ("" if split == "train" else "; cut from train when there is none"))
    group.add_argument("--max-train-samples", type=cli.positive_int, help="train on a stratified sample of at most this many")
    group.add_argument("--max-eval-samples", type=cli.positive_int, help="the same for validation and test")
    group.add_argument("--max-length", type=cli.positive_int, help=f"tokens a text is cut to in training (default: {DEFAULT_MAX_LENGTH})")
    group.add_argument("--eval-max-length", type=cli.positive_int, help="the same in evaluation and prediction (default: --max-length where it is given, "
                       f"else {DEFAULT_EVAL_MAX_LENGTH}; what a saved model was scored with)")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=cli.positive_int, default=3, help="passes over the training split")
    group.add_argument("--batch-size", type=cli.positive_int, default=16, help="texts a process and a backward pass")
    group.add_argument("--eval-batch-size", type=cli.positive_int, default=32, help="texts a process in evaluation")
    group.add_argument("--grad-accum", type=cli.positive_int, default=1, help="batches an optimizer step")
    group.add_argument("--lr", type=cli.positive_float, default=1e-4, help="the highest learning rate")
    group.add_argument("--warmup-ratio", type=cli.fraction, default=0.1, help="share of the steps in which the rate rises from 0")
    group.add_argument("--weight-decay", type=cli.non_negative_float, default=0.01, help="of matrices; biases and norms have none")
    group.add_argument("--max-grad-norm", type=cli.positive_float, default=1.0, help="clip the gradient to this norm")
    group.add_argument("--attention-dropout", type=cli.fraction, default=0.0, help="above 0 it keeps PyTorch from its fused attention: slower on CPU")
    group.add_argument("--batching", choices=["buckets", "random"], default="buckets", help="buckets: texts of similar length share a batch")
    group.add_argument("--best-metric", choices=["loss", "accuracy", "macro_f1"], default="loss", help="which epoch is kept, by validation; the earliest on ties")
    group.add_argument("--log-every", type=cli.positive_int, default=10, help="optimizer steps between two points of a curve")

    group = parser.add_argument_group("instead of training").add_mutually_exclusive_group()
    group.add_argument("--inspect", action="store_true", help="show data, tokenizer and a batch")
    group.add_argument("--evaluate-only", action="store_true", help="score the model given by --model on the test split")
    group.add_argument("--predict", metavar="FILE", help="classify each line of a text file (- for standard input), or each row of a data file")
    return parser


@dataclass
class Training:
    """What a step changes: the model and everything that goes with it."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    parallel: torch.nn.Module  # the model itself, or DDP around it
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    step: int = 0


def load_splits(args, machine):
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


def tokenize(splits, tokenizer, args, machine):
    """Return the tokenised splits, and say what truncation cuts."""
    lengths = {split: args.max_length if split == "train" else args.eval_max_length for split in splits}
    tokenized = {split: batching.tokenize(rows, tokenizer, max_length=lengths[split], cache_dir=args.cache_dir) for split, rows in splits.items()}
    for use, split in (("training", "train"), ("scoring", "test")):
        cut = sum(count > lengths[split] for count in tokenized[split]["num_tokens"]) / len(tokenized[split])
        machine.say(f"{'tokens  ' if split == 'train' else '        '} at most {lengths[split]} a text in {use}: {cut:.1%} of the texts are longer and lose their end")
    return tokenized


def prepare(model, tokenizer, num_rows: int, args, machine) -> Training:
    """Put the model on its device, and make the optimizer, the schedule and the loss scaler for epochs of `num_rows` texts."""
    model.to(machine.device)
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), lr=args.lr, fused=True)
    num_steps = math.ceil(math.ceil(num_rows / (args.batch_size * machine.world_size)) / args.grad_accum) * args.epochs
    scheduler = get_linear_schedule_with_warmup(optimizer, round(args.warmup_ratio * num_steps), num_steps)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
    parallel = DistributedDataParallel(model) if machine.world_size > 1 else model
    torch.manual_seed(args.seed + machine.rank)  # each process draws its own dropout masks
    return Training(model, tokenizer, parallel, optimizer, scheduler, scaler)


def train_epoch(training: Training, batches, meter: LossMeter, args, machine):
    """Run the training loop over the batches of one epoch."""
    model, optimizer, scaler = training.parallel, training.optimizer, training.scaler
    model.train()
    for window in accumulation_windows(batches, args.grad_accum):  # a window is one optimizer step
        examples = count_examples(window, machine)  # the true divisor, also for a short last window
        for last, batch in mark_last(window):
            batch = batch.to(machine.device, non_blocking=True)
            labels, rows = batch.pop("labels"), batch.pop("row")  # (B), (B)
            with sync_gradients(model, when=last):
                with machine.autocast():
                    logits = model(**batch).logits  # (B, C)
                summed_loss = cross_entropy(logits.float(), labels, reduction="sum")
                loss = summed_loss / examples * machine.world_size  # DDP averages over processes: world_size undoes it
                scaler.scale(loss).backward()
            meter.add(summed_loss, rows)
        scaler.unscale_(optimizer)  # before clipping, so that the norm is the true gradient's
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:  # fp16 skips a step whose gradients overflow: then the schedule waits too (pytorch #55585)
            training.scheduler.step()
        optimizer.zero_grad()
        training.step += 1
        meter.end_step(training, examples, grad_norm)


def train(training: Training, rows, validation, run, args, machine) -> tuple[list[dict], dict]:
    """Train on `rows`, score each epoch on `validation`, save the best one to run.folder/best.

    Returns each epoch's losses and scores, and the best of them.
    """
    epochs, best, names, global_batch = [], None, rows.features["label"].names, args.batch_size * machine.world_size
    for epoch in range(1, args.epochs + 1):
        order = batching.batch_order(rows["length"][:], batch_size=global_batch, seed=args.seed, epoch=epoch, buckets=args.batching == "buckets")
        share = batching.share_of_rank(order, machine.rank, machine.world_size)
        with tracking.progress(batching.loader(rows, share, training.tokenizer), label=f"epoch {epoch}/{args.epochs}", shown=machine.is_main) as bar:
            meter = LossMeter(machine, run, bar, args.log_every)
            train_epoch(training, bar, meter, args, machine)
        losses = meter.end_epoch()  # before scoring, whose time is not training's
        scores, _ = score(training.model, validation, training.tokenizer, machine, batch_size=args.eval_batch_size)
        if not math.isfinite(scores["loss"]):  # the last steps of an epoch can ruin the weights after its losses were read
            raise UserError(f"epoch {epoch}: the validation loss is {scores['loss']}; lower --lr or raise --warmup-ratio")
        epochs.append({"epoch": epoch, "step": training.step, **losses, **scores})
        report.log_scores(run, training.step, "validation", scores, names)
        improved = is_better(epochs[-1], best, args.best_metric)
        if improved:
            best = epochs[-1]
            if machine.is_main:
                models.save(training.model, training.tokenizer, run.folder / "best", settings=training_settings(args))
        machine.say(report.epoch_line(epochs[-1], args.epochs) + (", the best so far" if improved else ""))
    return epochs, best


def training_settings(args) -> dict:
    """Return what a saved model must remember to be used and scored rightly."""
    settings = {name: getattr(args, name) for name in ("dataset_config", "seed", "max_length", "eval_max_length", "text_column", "label_column")}
    return {"dataset": data.full_name(args.dataset), **settings}


def load_for_training(splits, args, machine):
    """Return tokenizer, model and tokenised splits; sets args.max_length and args.eval_max_length to what is in use."""
    tokenizer, note = models.load_tokenizer(args.model, cache_dir=args.cache_dir)
    model = models.load_classifier(args.model, names=splits["train"].features["label"].names, attention_dropout=args.attention_dropout,
                                   pad_token_id=tokenizer.pad_token_id, cache_dir=args.cache_dir)
    args.eval_max_length = models.choose_max_length(args.eval_max_length, args.max_length or DEFAULT_EVAL_MAX_LENGTH, model, tokenizer, flag="--eval-max-length")
    args.max_length = models.choose_max_length(args.max_length, DEFAULT_MAX_LENGTH, model, tokenizer, flag="--max-length")
    size = sum(parameter.numel() for parameter in model.parameters())
    machine.say(f"model    {args.model}: {type(model).__name__}, {size / 1e6:.1f} million parameters, with a new head")
    if note:
        machine.say(f"         {note}")
    return tokenizer, model, tokenize(splits, tokenizer, args, machine)


def fit(args, machine):
    """Train, keep the best epoch, score it on the test split, and leave report, predictions and curves in the run folder."""
    folder = tracking.run_folder(args.output_dir, name=f"{Path(args.dataset).stem}-{Path(args.model).name}", moment=machine.agree(int(time.time())))
    splits = load_splits(args, machine)
    tokenizer, model, tokenized = load_for_training(splits, args, machine)
    if problems := models.mismatches(model, tokenizer):
        raise UserError(f"--model {args.model}: {problems[0]}; --inspect shows more")
    flags = {name: value for name, value in vars(args).items() if name not in ("inspect", "evaluate_only", "predict")}  # not the modes
    settings = {**flags, "output_dir": str(folder), "precision": machine.precision, "device": machine.describe(), "versions": tracking.versions()}
    model_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    run = tracking.open_run(folder, settings, needed_bytes=RUN_SIZE_IN_MODELS * model_bytes) if machine.is_main else tracking.NullLog(folder)
    training = prepare(model, tokenizer, len(splits["train"]), args, machine)
    machine.say(f"machine  {machine.describe()}\nrun      {folder}; curves: tensorboard --logdir {folder.parent}\n")
    with contextlib.closing(run):
        epochs, best = train(training, tokenized["train"], tokenized["validation"], run, args, machine)
        finish(splits["test"], tokenized["test"], epochs, best, run, args, machine)


def finish(rows, tokenized, epochs, best, run, args, machine):
    """Reload the best epoch, score it once on the test split, show and write what the run came to."""
    machine.barrier()  # the main process has written it
    model, tokenizer = load_saved(str(run.folder / "best"), args, machine)
    scores, logits = score(model, tokenized, tokenizer, machine, batch_size=args.eval_batch_size)
    predictions = report.Predictions(rows, logits)
    results = {**{f"test_{name}": scores[name] for name in ("accuracy", "macro_f1", "loss")}, "best_epoch": best["epoch"],
               **{f"best_validation_{name}": best[name] for name in ("accuracy", "macro_f1", "loss")},
               "train_examples_per_second": len(epochs) / sum(1 / epoch["examples_per_second"] for epoch in epochs),
               "peak_memory_bytes": runtime.peak_memory_bytes(machine.device)}
    report.log_scores(run, best["step"], "test", scores, predictions.names)
    run.text(best["step"], "test/mistakes", predictions.examples(right=False, most=MISTAKES_IN_TENSORBOARD, style="github"))
    run.finish(results, curves=["test/accuracy", "test/macro_f1", "test/loss", "train/examples_per_second"])
    machine.say(f"\n{report.epoch_table(epochs)}\n\nbest epoch {best['epoch']}, reloaded and scored on the test split:")
    report.show(scores, predictions, machine.say)
    if machine.is_main:
        report.write_report(run.folder, settings=run.settings, results=results, epochs=epochs, scores=scores, predictions=predictions)
    machine.say(f"\nreport: {run.folder}/report.md   model: {run.folder}/best   every test row: {run.folder}/predictions.csv")


def load_saved(name: str, args, machine):
    """Return a saved model on its device and its tokenizer; sets args.eval_max_length to what is in use."""
    model = models.load_saved(name, cache_dir=args.cache_dir).to(machine.device)
    tokenizer, _ = models.load_tokenizer(name, cache_dir=args.cache_dir)
    args.eval_max_length = models.choose_max_length(args.eval_max_length, tokenizer.model_max_length, model, tokenizer, flag="--eval-max-length")
    return model, tokenizer


def evaluate_only(args, machine):
    """Score a saved model on the test split; on every row of a data set without one that it was not trained on."""
    model, tokenizer = load_saved(args.model, args, machine)
    rows = load_test_split(model, args, machine)
    tokenized = batching.tokenize(rows, tokenizer, max_length=args.eval_max_length, cache_dir=args.cache_dir)
    scores, logits = score(model, tokenized, tokenizer, machine, batch_size=args.eval_batch_size)
    report.show(scores, report.Predictions(rows, logits), machine.say)


def load_test_split(model, args, machine):
    """Return the rows to score a saved model on, with the model's own classes; refuses rows that the model was trained on."""
    trained = models.saved_settings(args.model)
    found = data.read(args.dataset, config=args.dataset_config, cache_dir=args.cache_dir)
    splits = labelling.choose_splits(found, {"test": args.test_split})
    splits = splits or labelling.choose_splits(found, {"train": args.train_split, "validation": args.validation_split})
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    splits = labelling.validate(splits, text_column=args.text_column, label_column=args.label_column, names=names)
    if "test" not in splits and trained.get("dataset") == data.full_name(args.dataset):
        if trained["seed"] != args.seed:
            raise UserError(f"--seed {args.seed}: the model was trained with --seed {trained['seed']}, which cuts another test split; use that seed")
        splits, _ = labelling.cut_missing_splits(splits, seed=args.seed)
    split = "test" if "test" in splits else "train"
    rows = labelling.limit(splits[split], args.max_eval_samples, seed=args.seed, flag="--max-eval-samples")
    machine.say(f"data     {args.dataset}: {len(rows):,} texts of its {split} split")
    return rows


def predict(args, machine):
    """Print one JSON line a text: row, label, confidence and the score of every class."""
    model, tokenizer = load_saved(args.model, args, machine)
    texts = data.read_texts(args.predict, column=args.text_column, cache_dir=args.cache_dir)
    for answer in predict_texts(model, tokenizer, texts, machine, max_length=args.eval_max_length, batch_size=args.eval_batch_size):
        print(json.dumps(answer, ensure_ascii=False))


def inspect(args, machine):
    """Show the data, the tokenizer and a batch; train nothing."""
    splits = load_splits(args, machine)
    tokenizer, model, tokenized = load_for_training(splits, args, machine)
    inspection.show(splits, tokenized, model, tokenizer, max_lengths=(args.max_length, args.eval_max_length), batch_size=args.batch_size)


def main(args):
    machine = runtime.start(args.device, args.precision, args.seed)
    if args.inspect:
        inspect(args, machine)
    elif args.predict is not None:  # an empty name is a mistake, not a wish to train
        predict(args, machine)
    elif args.evaluate_only:
        evaluate_only(args, machine)
    else:
        fit(args, machine)
    runtime.stop()


if __name__ == "__main__":
    cli.run(make_parser(), main)
