#!/usr/bin/env python
"""Fine-tune a pretrained encoder to classify texts, in an explicit PyTorch loop; evaluate it;
predict with it.

The loop is in train_steps(): AdamW with decay groups, a linear schedule with warm-up, automatic
mixed precision, gradient accumulation, clipping, DistributedDataParallel. Left out on purpose:
Trainer, callbacks, multi-label and regression heads.

  python train_classifier.py --epochs 3  # BBC News with all-MiniLM-L6-v2, both bundled
  python train_classifier.py --dataset reviews.csv --text-column review --label-column stars
  python train_classifier.py --dataset reviews.csv --inspect
  python train_classifier.py --model runs/reviews/best --predict new.txt # one JSON line a text
  python train_classifier.py --model runs/reviews/best --dataset reviews.csv --evaluate-only
  python train_classifier.py --epochs 3 --resume runs/news               # go on where it was stopped
  torchrun --nproc-per-node 2 train_classifier.py --epochs 3             # one process a GPU (or CPU share)
"""

import contextlib
import datetime
import json
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from common import cli, reading
from common.errors import UserError
from common.runtime import deterministic, peak_memory_bytes, start_runtime, stop_runtime
from common.training import batching, checkpoint, inspection, loading, memory, report, tracking
from common.training import classifier as models
from common.training.evaluation import predict_texts, score
from common.training.interruption import Interruption
from common.training.milestones import Watch, evaluate_if_due, out_of_patience, save_if_due
from common.training.preparing import check_flags, prepare
from common.training.steps import (
    LossMeter,
    Training,
    accumulation_windows,
    count_examples,
    mark_last,
    sync_gradients,
)
from common.training.windows import TRUNCATIONS

MISTAKES_IN_TENSORBOARD = 50
# the best model, for a moment twice; weights and AdamW's two averages
BEST_SIZE_IN_MODELS, CHECKPOINT_SIZE_IN_MODELS = 2, 3


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="train_classifier.py", description=__doc__)
    cli.add_shared_flags(parser, model="bundled/all-MiniLM-L6-v2")
    parser.add_argument(
        "--output-dir", type=cli.folder, help="the run's folder (default: runs/<data set>-<model>-<time>)"
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="bundled/bbc-news",
        help="a bundled name, a CSV/TSV/JSON/JSONL/Parquet file, a folder of class folders, or a Hub id",
    )
    group.add_argument("--dataset-config", help="the configuration of a Hub data set that has several")
    group.add_argument("--text-column", default="text", help="where the texts are")
    group.add_argument(
        "--label-column", default="label", help="where the labels are: strings or whole numbers"
    )
    for split in ("train", "validation", "test"):
        group.add_argument(
            f"--{split}-split",
            help="its name in the data set"
            + ("" if split == "train" else "; cut from train when there is none"),
        )
    group.add_argument(
        "--max-train-samples", type=cli.positive_int, help="train on a stratified sample of at most this many"
    )
    group.add_argument("--max-eval-samples", type=cli.positive_int, help="the same for validation and test")
    group.add_argument(
        "--max-length",
        type=cli.positive_int,
        help=f"tokens that the model reads at once, in training (default: {loading.DEFAULT_MAX_LENGTH})",
    )
    group.add_argument(
        "--eval-max-length",
        type=cli.positive_int,
        help="the same in evaluation and prediction (default: as in training)",
    )
    group.add_argument(
        "--truncation",
        choices=TRUNCATIONS,
        help=(
            "what is read of a longer text: its beginning, its end, a quarter and three quarters from both,"
            " or all in overlapping windows whose logits are averaged (default:"
            f" {loading.DEFAULT_TRUNCATION}; as a saved model was scored)"
        ),
    )
    group.add_argument(
        "--max-windows",
        type=cli.positive_int,
        default=1,
        help="with chunks: windows of a text in a training step, drawn anew each epoch; scoring reads all",
    )

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=cli.positive_int, default=3, help="passes over the training split")
    group.add_argument(
        "--batch-size", type=cli.positive_int, default=16, help="texts a process and a backward pass"
    )
    group.add_argument(
        "--eval-batch-size", type=cli.positive_int, default=32, help="texts a process in evaluation"
    )
    group.add_argument("--grad-accum", type=cli.positive_int, default=1, help="batches an optimizer step")
    group.add_argument("--lr", type=cli.positive_float, default=1e-4, help="the highest learning rate")
    group.add_argument(
        "--warmup-ratio",
        type=cli.fraction,
        default=0.1,
        help="share of the steps in which the rate rises from 0",
    )
    group.add_argument(
        "--weight-decay",
        type=cli.non_negative_float,
        default=0.01,
        help="of matrices; biases and norms have none",
    )
    group.add_argument(
        "--max-grad-norm", type=cli.positive_float, default=1.0, help="clip the gradient to this norm"
    )
    group.add_argument(
        "--dropout",
        type=cli.fraction,
        help="of every kind in the model (default: as it was pretrained, attention's 0)",
    )
    group.add_argument(
        "--attention-dropout",
        type=cli.fraction,
        help="above 0 it is slower on CPUs (default: --dropout if given, else 0)",
    )
    group.add_argument(
        "--label-smoothing",
        type=cli.fraction,
        default=0.0,
        help="share of each label that is spread over all classes",
    )
    group.add_argument(
        "--class-weights",
        choices=["none", "balanced"],
        default="none",
        help="balanced: every class counts the same, however few its texts",
    )
    group.add_argument(
        "--batching",
        choices=["buckets", "random"],
        default="buckets",
        help="buckets: texts of similar length share a batch",
    )
    group.add_argument(
        "--best-metric",
        choices=["loss", "accuracy", "macro_f1"],
        default="loss",
        help="which weights are kept, by validation; the earliest on ties",
    )
    group.add_argument(
        "--eval-every",
        type=cli.positive_int,
        help="evaluate after every so many optimizer steps too, not just after each epoch",
    )
    group.add_argument(
        "--early-stopping-patience",
        type=cli.positive_int,
        metavar="N",
        help="stop when N evaluations in a row were no better",
    )
    group.add_argument(
        "--freeze-layers",
        type=cli.non_negative_int,
        default=0,
        metavar="N",
        help="leave the embeddings and the N lowest layers as they are (0: learn all)",
    )
    group.add_argument(
        "--lora-rank",
        type=cli.positive_int,
        metavar="R",
        help="learn low-rank adapters and the head only; best/ has them merged",
    )
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument(
        "--auto-batch-size",
        action="store_true",
        help="if a batch doesn't fit into memory, halve it and accumulate: the same steps",
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile; minutes at first, faster steps on GPUs"
    )
    group.add_argument(
        "--nondeterministic",
        action="store_true",
        help="on a GPU: a little faster, and two runs differ in their last digits",
    )
    group.add_argument(
        "--num-workers",
        type=cli.non_negative_int,
        default=0,
        help="processes that make batches; the texts are tokenised before, so few gain",
    )
    group.add_argument(
        "--log-every", type=cli.positive_int, default=10, help="optimizer steps between two points of a curve"
    )

    group = parser.add_argument_group("stopping and going on")
    group.add_argument(
        "--save-every",
        type=cli.positive_int,
        metavar="STEPS",
        help="write a checkpoint after every so many optimizer steps, not just after each epoch",
    )
    group.add_argument(
        "--keep",
        type=cli.positive_int,
        default=2,
        help="checkpoints to keep: with two, damage of the newest loses little",
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const=checkpoint.NEWEST,
        metavar="RUN",
        help=(
            "go on with the run in this folder (or in --output-dir) from its newest whole checkpoint, or from"
            " a given one, runs/<name>/checkpoints/step-<number>; the other flags as at first"
        ),
    )

    group = parser.add_argument_group("instead of training").add_mutually_exclusive_group()
    group.add_argument("--inspect", action="store_true", help="show data, tokenizer and a batch")
    group.add_argument(
        "--evaluate-only", action="store_true", help="score the model given by --model on the test split"
    )
    group.add_argument(
        "--predict",
        metavar="FILE",
        help="classify each line of a text file (- for standard input), or each row of a data file",
    )
    return parser


def train_steps(training: Training, batches, sizes: list[int], meter: LossMeter, args, runtime):
    """Run the training loop over batches, `sizes` of them an optimizer step; yields after each
    step.
    """
    model, optimizer, scaler = training.parallel, training.optimizer, training.scaler
    for window in accumulation_windows(batches, sizes):  # a window is one optimizer step
        model.train()
        # the true divisor, also for a short last window
        examples, weight = count_examples(window, training.class_weights, runtime)
        for last, batch in mark_last(window):
            batch = batch.to(runtime.device, non_blocking=True)
            # (B), (B), (W)
            labels, rows, document = batch.pop("labels"), batch.pop("row"), batch.pop("document")
            with sync_gradients(model, when=last):
                with runtime.autocast():
                    logits = model(**batch).logits  # (W, C)
                logits = batching.pool_windows(logits.float(), document, len(labels))  # (B, C)
                summed_loss = cross_entropy(
                    logits,
                    labels,
                    weight=training.loss_weights,
                    reduction="sum",
                    label_smoothing=args.label_smoothing,
                )
                # DDP averages over processes: world_size undoes it
                scaler.scale(summed_loss / weight * runtime.world_size).backward()
            meter.add(summed_loss, rows)
        scaler.unscale_(optimizer)  # before clipping, so that the norm is the true gradient's
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        # fp16 skips a step whose gradients overflow: then the schedule waits too (pytorch #55585)
        if scaler.get_scale() >= scale:
            training.scheduler.step()
        optimizer.zero_grad()
        training.step, training.step_of_epoch = training.step + 1, training.step_of_epoch + 1
        meter.end_step(training, examples, weight, grad_norm)
        yield


def train(training: Training, rows, meter_state, watch: Watch, args, runtime):
    """Train on `rows`, evaluate, keep the best weights in best/; goes on from where `training` is,
    with the loss meter's state from there.
    """
    while training.epoch <= args.epochs and not out_of_patience(training, args):
        plan = batching.plan_epoch(rows, training.epoch, training.micro_batch, args, runtime)
        # what a resumed epoch has done is skipped, not read
        training.steps_of_epoch, rest = len(plan), plan[training.step_of_epoch :]
        batches = batching.loader(
            rows,
            [batch for step in rest for batch in step],
            training.tokenizer,
            num_workers=args.num_workers,
            pin_memory=runtime.device.type == "cuda",
        )
        with (
            tracking.progress(
                batches, label=f"epoch {training.epoch}/{args.epochs}", shown=runtime.is_main
            ) as bar,
            memory.explained(memory.way_out(args)),
        ):
            meter = LossMeter(runtime, watch.log, bar, args.log_every)
            if meter_state is not None:
                meter.restore(*meter_state)
                meter_state = None
            # it may have been stopped in an evaluation
            evaluate_if_due(training, meter, watch, args, runtime)
            for _ in train_steps(training, bar, [len(step) for step in rest], meter, args, runtime):
                evaluate_if_due(training, meter, watch, args, runtime)
                save_if_due(training, meter, watch, args)
                if out_of_patience(training, args):
                    break
        training.epoch, training.step_of_epoch = training.epoch + 1, 0


def fit(args, runtime):
    """Train, keep the best weights, score them on the test split, and leave report, predictions
    and curves in the run folder.
    """
    check_flags(args)
    folder, resumed, wanted = checkpoint.locate_run(
        args, runtime, name=f"{Path(args.dataset).stem}-{Path(args.model).name}"
    )
    rows = loading.load_splits(args, runtime)
    tokenizer, model, tokenized = loading.load_for_training(rows, args, runtime)
    if problems := models.mismatches(model, tokenizer):
        raise UserError(f"--model {args.model}: {problems[0]}; --inspect shows more")
    identity = checkpoint.identity(run_flags(args), model, tokenized, runtime)
    settings = {
        **run_flags(args),
        "output_dir": str(folder),
        "precision": runtime.precision,
        "device": runtime.describe(),
        "processes": runtime.world_size,
        "identity": identity,
        "versions": tracking.versions(),
        "started": datetime.datetime.now().isoformat(),
    }
    checkpoints = checkpoint.Checkpoints(folder, identity, keep=args.keep, runtime=runtime)
    found = checkpoints.choose(wanted) if resumed else None
    training = prepare(model, tokenizer, tokenized["train"], args, runtime)
    model_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    needed = (BEST_SIZE_IN_MODELS + CHECKPOINT_SIZE_IN_MODELS * (args.keep + 1)) * model_bytes
    log = tracking.NullLog(folder)
    if runtime.is_main:
        tracking.make_folder(folder, needed_bytes=needed)
        runtime.note_run(folder)
        if found:
            checkpoints.drop_after(found[0])
        log = tracking.RunLog(folder, settings, checkpoint.place_in_log(found) if resumed else None)
    runtime.require_shared(folder / "config.json", flag="--output-dir")
    meter_state = checkpoints.restore(*found, training) if found else None
    runtime.say(
        f"machine  {runtime.describe()}\nrun      {folder}; curves: tensorboard --logdir {folder.parent}"
    )
    if resumed:
        runtime.say(
            f"resume   {found[0]}: after step {training.step}"
            if found
            else "resume   no checkpoint yet: from the beginning"
        )
    runtime.say("")
    interruption = Interruption(runtime, f"go on with the same command and --resume {folder}")
    watch = Watch(tokenized["validation"], log, checkpoints, interruption)
    with contextlib.closing(log), interruption:
        train(training, tokenized["train"], meter_state, watch, args, runtime)
        finish(rows, tokenized["test"], training, watch, args, runtime)


def run_flags(args) -> dict:
    """Return the flags of a run, without those that choose what else to do."""
    return {
        name: value
        for name, value in vars(args).items()
        if name not in ("inspect", "evaluate_only", "predict", "resume")
    }


def finish(rows, tokenized, training: Training, watch: Watch, args, runtime):
    """Reload the best weights, score them once on the test split, show and write what the run came
    to.
    """
    runtime.barrier()  # the main process has written them
    history, best, log = training.history, training.best, watch.log
    model, tokenizer = loading.load_saved(str(log.folder / "best"), args, runtime)
    scores, logits = score(
        model,
        tokenized,
        tokenizer,
        runtime,
        batch_size=args.eval_batch_size,
        between=watch.interruption.check,
    )
    predictions = report.Predictions(tokenized, logits)
    epochs = [evaluation for evaluation in history if isinstance(evaluation["epoch"], int)] or history
    results = {
        **{f"test_{name}": scores[name] for name in ("accuracy", "macro_f1", "loss")},
        "best_epoch": best["epoch"],
        **{f"best_validation_{name}": best[name] for name in ("accuracy", "macro_f1", "loss")},
        "train_examples_per_second": len(epochs) / sum(1 / epoch["examples_per_second"] for epoch in epochs),
        "peak_memory_bytes": peak_memory_bytes(runtime.device),
    }
    report.log_scores(log, best["step"], "test", scores, predictions.names)
    log.text(
        best["step"],
        "test/mistakes",
        predictions.examples(right=False, most=MISTAKES_IN_TENSORBOARD, style="github"),
    )
    log.finish(results, curves=["test/accuracy", "test/macro_f1", "test/loss", "train/examples_per_second"])
    runtime.say(
        f"\n{report.epoch_table(history)}\n\nbest epoch {best['epoch']}, reloaded and scored on the test"
        " split:"
    )
    report.show(scores, predictions, args.eval_max_length, runtime.say)
    if runtime.is_main:
        report.write_report(
            log.folder,
            settings=log.settings,
            results=results,
            epochs=history,
            scores=scores,
            predictions=predictions,
        )
        report.write_card(
            log.folder / "best",
            splits=rows,
            settings=log.settings,
            results=results,
            predictions=predictions,
            per_class=scores["per_class"],
        )
    runtime.say(
        f"\nreport: {log.folder}/report.md   model: {log.folder}/best   every test row:"
        f" {log.folder}/predictions.csv"
    )


def evaluate_only(args, runtime):
    """Score a saved model on the test split; on every row of a data set without one that it was
    not trained on.
    """
    model, tokenizer = loading.load_saved(args.model, args, runtime)
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    rows = loading.load_rows_for_scoring(names, models.saved_settings(args.model), args, runtime)
    with runtime.local_main_first():
        tokenized = batching.tokenize(
            rows,
            tokenizer,
            max_length=args.eval_max_length,
            truncation=args.truncation,
            cache_dir=args.cache_dir,
        )
    scores, logits = score(model, tokenized, tokenizer, runtime, batch_size=args.eval_batch_size)
    report.show(scores, report.Predictions(tokenized, logits), args.eval_max_length, runtime.say)


def predict(args, runtime):
    """Print one JSON line a text: row, label, confidence and the score of every class."""
    model, tokenizer = loading.load_saved(args.model, args, runtime)
    texts = reading.read_texts(args.predict, column=args.text_column, cache_dir=args.cache_dir)
    for answer in predict_texts(
        model,
        tokenizer,
        texts,
        runtime,
        batch_size=args.eval_batch_size,
        max_length=args.eval_max_length,
        truncation=args.truncation,
    ):
        runtime.say(json.dumps(answer, ensure_ascii=False))


def inspect(args, runtime):
    """Show the data, the tokenizer and a batch; train nothing."""
    rows = loading.load_splits(args, runtime)
    tokenizer, model, tokenized = loading.load_for_training(rows, args, runtime)
    inspection.show(
        rows,
        tokenized,
        model,
        tokenizer,
        max_lengths=(args.max_length, args.eval_max_length),
        batch_size=args.batch_size,
    )


def main(args):
    runtime = start_runtime(args.device, args.precision, args.seed)
    if args.inspect:
        inspect(args, runtime)
    elif args.predict is not None:  # an empty name is a mistake, not a wish to train
        predict(args, runtime)
    elif args.evaluate_only:
        evaluate_only(args, runtime)
    else:
        with deterministic(
            runtime.device,
            wanted=not args.nondeterministic,
            hint="--nondeterministic does without, or use --device cpu",
        ):
            fit(args, runtime)
    stop_runtime()


if __name__ == "__main__":
    cli.run(make_parser(), main)
