#!/usr/bin/env python
"""Fine-tune a pretrained encoder to classify texts, in an explicit PyTorch loop; evaluate it;
predict with it. A text has one class, any number of labels, or numbers: common/training/task.py
holds what differs.

The lesson is in load(), prepare(), train(), train_step(), validate() and test(), in this order:
AdamW with decay groups, a linear schedule with warm-up, automatic mixed precision, gradient
accumulation, clipping, DistributedDataParallel. Left out on purpose: Trainer, callbacks.

  python train_classifier.py --epochs 3  # BBC News with all-MiniLM-L6-v2, both bundled
  python train_classifier.py --dataset reviews.csv --text-column review --label-column stars
  python train_classifier.py --dataset comments.csv --label-column toxic,insult,threat
  python train_classifier.py --dataset reviews.csv --inspect
  python train_classifier.py --model runs/reviews/best --predict new.txt # one JSON line per text
  python train_classifier.py --model runs/reviews/best --dataset reviews.csv --evaluate-only
  python train_classifier.py --resume runs/news                          # continue where it stopped
  torchrun --nproc-per-node 2 train_classifier.py --epochs 3             # one process per GPU
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from common import cli
from common.columns import KeptColumns
from common.errors import Fault, Interrupted, UserError, about_encoding, counted, note
from common.sources import FileOptions
from common.training import predictions, study, training_flags
from common.training.run import PAIR, RunLocation, check_task, finished_runs
from common.training.training_flags import (
    commits_of,
    needs_no_model,
    plan_study,
    run_name,
    settings_of,
    shown_while_loading,
)


def make_parser() -> cli.Parser:
    """Return the parser of all flags, which common/training/training_flags.py lists."""
    return training_flags.make_parser(__doc__)


def do_without_model(args: argparse.Namespace) -> None:
    """Do what the flags ask for where PyTorch has no part in it."""
    if args.compare is not None:
        from common.training import comparison

        comparison.compare(finished_runs(args.compare), args.output_dir)
    elif study.is_study(args):
        plan = plan_study(args)
        study.run_study(plan, Path(__file__), device=args.device, max_minutes=args.max_minutes)
    elif cli.is_rank_0():
        print(f"run      {args.output_dir} is finished: nothing is left to be done")


if __name__ == "__main__":
    # before the libraries are imported, which takes seconds: help and mistakes are answered at once
    ARGS = cli.parse(make_parser(), then=shown_while_loading)
    if needs_no_model(ARGS):
        cli.run_main(do_without_model, ARGS, prog="train_classifier.py")
        sys.exit()

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from common.files import tensors_sha256
from common.runtime import (
    Runtime,
    check_compiler,
    deterministic,
    explain_out_of_memory,
    peak_memory_bytes,
    start_runtime,
    stop_runtime,
)
from common.training import (
    baseline,
    batching,
    checkpoint,
    classifier,
    data,
    model_card,
    report,
    saved_model,
    saved_settings,
    tracking,
    unlabelled,
)
from common.training.adaptation import adapt, merge_adapters
from common.training.batching import BatchConfig, count_examples, model_inputs, pool_chunks, sync_gradients
from common.training.checkpoint import TIME_IS_UP, Checkpoints, StopSignals, TrainingState
from common.training.classifier import ModelConfig
from common.training.data import DataConfig, DataNotes, Splits, TextConfig
from common.training.evaluation import (
    PREDICT_BLOCK,
    TextClassifier,
    evaluate,
    is_better,
    predict_logits,
    predict_texts,
)
from common.training.labels import LabelConfig
from common.training.saved_model import SavedModel
from common.training.saved_settings import RememberedData
from common.training.task import Scoring, Task, balanced_weights, sum_losses, task_of_rows
from common.training.tokenization import TokenConfig, describe_marks, tokenize_splits

if TYPE_CHECKING:
    import datasets
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase


# Configs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The first five fields are settings of their own; the others are named as their flags."""

    model_config: ModelConfig
    batches: BatchConfig
    tokens: TokenConfig
    task: Task
    scoring: Scoring
    epochs: int
    max_steps: int | None
    lr: float
    schedule: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    label_smoothing: float
    class_weights: str
    auto_batch_size: bool
    eval_batch_size: int
    eval_every: int | None
    best_metric: str
    early_stopping_patience: int | None
    save_every: int | None
    log_every: int
    calibrate: bool

    def memory_advice(self) -> str:
        """Return what to say when a step does not fit into memory."""
        advice = (
            f"--batch-size {self.batches.batch_size}: a batch of {self.tokens.max_length} tokens does not"
            " fit into memory; lower it or --max-length"
        )
        if self.auto_batch_size:
            return advice
        return f"{advice}, or let --auto-batch-size halve it without changing a step"


Config = TypeVar(
    "Config", FileOptions, TextConfig, LabelConfig, DataConfig, ModelConfig, BatchConfig, TrainConfig
)


def config_from_flags(config_class: type[Config], args: argparse.Namespace, **given: object) -> Config:
    """Build a config: each field comes from `given` if it is there, else from the flag of the same name.
    Where that flag is None and the field has a default, the default is kept.
    """
    values = dict(given)
    for field in dataclasses.fields(config_class):
        has_default = field.default is not dataclasses.MISSING
        if field.name not in given and not (has_default and getattr(args, field.name) is None):
            values[field.name] = getattr(args, field.name)
    return config_class(**values)


def data_config(args: argparse.Namespace) -> DataConfig:
    """Return which texts and labels the flags name."""
    return config_from_flags(
        DataConfig,
        args,
        seed=args.seed if args.split_seed is None else args.split_seed,
        skip_bad=args.skip_bad or args.inspect,
        files=cli.file_options(args),
        texts=config_from_flags(TextConfig, args),
        labels=config_from_flags(LabelConfig, args),
    )


# Data, tokenizer and model ------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """Labelled splits, their tokens, and the pretrained model that is to learn from them."""

    splits: Splits
    tokenized: Splits
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    config: TrainConfig
    notes: DataNotes  # what reading the data found: bad rows, unlabelled rows, splits that were cut


def load(args: argparse.Namespace, runtime: Runtime, notes: DataNotes) -> Loaded:
    """Read the data, load tokenizer and model, and tokenise the data; `notes` is filled by the reading."""
    splits = data.load_splits(data_config(args), runtime, notes)
    # what is asked: one class of several, several labels, or numbers; and the names of the answers
    task = task_of_rows(splits["train"])
    check_task(task.kind, vars(args), task.names)

    # a pretrained encoder with a head for these answers
    model_config = config_from_flags(ModelConfig, args)
    model, tokenizer = classifier.load_pretrained(model_config, task, runtime)

    # each text becomes the ids of its tokens; a long one is cut into several chunks
    tokens = classifier.choose_tokens(
        model,
        tokenizer,
        max_length=args.max_length,
        eval_max_length=args.eval_max_length,
        truncation=args.truncation,
        is_pair=args.text_mode == PAIR,
    )
    tokenized = tokenize_splits(splits, tokenizer, tokens, runtime, cache_dir=args.cache_dir)

    batches = config_from_flags(BatchConfig, args)
    runtime.say(report.token_lines(tokenized, tokens, batches, runtime))
    if marks := describe_marks(splits, tokenizer, tokens):
        runtime.say(f"         {marks}")
    scoring = Scoring(args.positive_class, 0.5 if args.threshold is None else args.threshold)
    config = config_from_flags(
        TrainConfig,
        args,
        model_config=model_config,
        batches=batches,
        tokens=tokens,
        task=task,
        scoring=scoring,
    )
    if config.max_steps is not None:  # as many epochs as they take, of which the last may be a part
        epochs = math.ceil(config.max_steps / steps_in_epoch(tokenized["train"], config, runtime))
        config = dataclasses.replace(config, epochs=epochs)
    return Loaded(splits, tokenized, tokenizer, model, config, notes)


# Optimizer, schedule, loss scaler, DDP ------------------------------------------------------------


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    config: TrainConfig,
    runtime: Runtime,
) -> TrainingState:
    """Return everything that an optimizer step needs and changes, for epochs of `rows`."""
    # attention, dropout and last layer made faster; if asked for, frozen layers and LoRA
    model = adapt(model, config.model_config, runtime)
    # pyrefly: ignore [bad-argument-type]  (transformers wraps to() so that its types are lost)
    model = model.to(runtime.device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.model_config.freeze_layers or config.model_config.lora_rank:
        runtime.say(f"learns   {sum(parameter.numel() for parameter in trainable):,} parameters")

    class_weights = None
    if config.class_weights == "balanced":
        class_weights = balanced_weights(config.task, config.task.targets(rows["label"][:]))  # (C)

    # a step reads its texts in micro-batches of at most this many chunks, whose gradients add up
    micro_batch_size = config.batches.batch_size
    if config.auto_batch_size:
        max_length = config.tokens.max_length
        micro_batch_size = batching.largest_micro_batch(
            model, rows, tokenizer, config.batches, max_length=max_length, runtime=runtime
        )

    optimizer = make_optimizer(trainable, config)
    num_steps = config.max_steps or config.epochs * steps_in_epoch(rows, config, runtime)
    scheduler = make_scheduler(optimizer, num_steps, config)
    # without it, small gradients would be 0 in fp16; in other precisions it does nothing
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")

    wrapped = model if runtime.world_size == 1 else distribute(model, rows, tokenizer, runtime)
    if config.model_config.compile:
        # dynamic: compiled once for texts of all lengths
        wrapped = cast(torch.nn.Module, torch.compile(wrapped, dynamic=True))

    # each process draws its own dropout masks
    torch.manual_seed(config.batches.seed + runtime.rank)
    return TrainingState(
        model=model,
        tokenizer=tokenizer,
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        meter=tracking.LossMeter(runtime, scaler),
        class_weights=class_weights,
        micro_batch_size=micro_batch_size,
        num_steps=num_steps,
    )


def make_optimizer(trainable: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW: matrices decay; biases and norm weights, which have one dimension, do not."""
    decay = [parameter for parameter in trainable if parameter.ndim >= 2]
    no_decay = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, num_steps: int, config: TrainConfig
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule of the learning rate, which rises from 0, then falls to 0 or stays."""
    import transformers  # this takes seconds, which --predict saves

    num_warmup_steps = round(config.warmup_ratio * num_steps)
    if config.schedule == "constant":
        return transformers.get_constant_schedule_with_warmup(optimizer, num_warmup_steps)
    if config.schedule == "cosine":
        return transformers.get_cosine_schedule_with_warmup(optimizer, num_warmup_steps, num_steps)
    return transformers.get_linear_schedule_with_warmup(optimizer, num_warmup_steps, num_steps)


def steps_in_epoch(rows: datasets.Dataset, config: TrainConfig, runtime: Runtime) -> int:
    """Return the number of optimizer steps of an epoch, the last of which may be short."""
    return math.ceil(len(rows) / config.batches.texts_per_step(runtime.world_size))


def distribute(
    model: PreTrainedModel, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, runtime: Runtime
) -> DistributedDataParallel:
    """Return the model in DDP, which averages gradients over all processes."""
    first_chunk = batching.Pick(row=0, chunks=(0,))
    batch = batching.pad_batch([first_chunk], rows, tokenizer)
    wrapped = DistributedDataParallel(
        model,
        find_unused_parameters=batching.has_unused_parameters(model, batch, runtime),
        forward_sync_buffers=False,  # they are constant in encoders
    )
    # after its first backward pass, DDP regroups the gradients. With more than two processes this
    # changes the order of the sums, and so the last digits. That pass is run here, so that a new run
    # and a resumed one add up in the same order; without dropout, which would draw random numbers
    model.eval()
    batching.backward_once(wrapped, batch, runtime)
    model.zero_grad()
    return wrapped


# The loop -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The parts of a run that are not the model: log, checkpoints, stop signals, forecast of its time,
    and facts about the data that are saved with the model.
    """

    log: tracking.Log
    checkpoints: Checkpoints
    signals: StopSignals
    forecast: tracking.Forecast
    remembered: RememberedData


def make_forecast(
    tokenized: Splits, config: TrainConfig, clock: tracking.Clock, runtime: Runtime
) -> tracking.Forecast:
    """Return a forecast of the time that a run takes, by the tokens that it has to read."""
    steps = steps_in_epoch(tokenized["train"], config, runtime)
    return tracking.Forecast(
        train_tokens=batching.num_tokens(tokenized["train"], max_chunks=config.batches.max_chunks),
        validation_tokens=batching.num_tokens(tokenized["validation"]),
        test_tokens=batching.num_tokens(tokenized["test"]),
        # at the end of an epoch, and where --eval-every falls before it
        validations=1 + (0 if config.eval_every is None else (steps - 1) // config.eval_every),
        clock=clock,
    )


def train(state: TrainingState, tokenized: Splits, run: Run, config: TrainConfig, runtime: Runtime) -> bool:
    """Train from where `state` is to the last epoch, and keep the best weights in best/.

    Return whether it came to the end: with --max-minutes, the time may be up before.
    """
    rows, patience = tokenized["train"], config.early_stopping_patience
    while state.epoch <= config.epochs and not state.is_out_of_patience(patience):
        # for each optimizer step of the epoch, its micro-batches: which chunks of which texts each has
        plan = batching.plan_epoch(
            rows, config.batches, epoch=state.epoch, micro_batch_size=state.micro_batch_size, runtime=runtime
        )
        state.steps_per_epoch = len(plan)
        # a resumed epoch skips the steps that are done, and --max-steps may end within one
        plan = plan[state.step_of_epoch :][: state.steps_left()]
        loader = batching.make_loader(
            rows,
            [picks for step in plan for picks in step],
            state.tokenizer,
            num_workers=config.batches.num_workers,
            pin_memory=runtime.device.type == "cuda",
        )
        title = f"epoch {state.epoch}/{config.epochs}"
        with (
            tracking.progress(plan, label=title, unit="step", shown=runtime.is_main) as bar,
            explain_out_of_memory(config.memory_advice()),
        ):
            state.meter.start_epoch(is_resumed=state.step_of_epoch > 0)
            # a run that was stopped during an evaluation begins with that evaluation
            if state.is_due(config.eval_every) and not state.is_evaluated():
                validate_or_save(state, tokenized["validation"], run, config, runtime)

            batches = iter(loader)
            for step in bar:
                micro_batches = list(itertools.islice(batches, len(step)))
                num_tokens = batching.count_tokens(micro_batches)
                grad_norm = train_step(state, micro_batches, config, runtime)

                run.forecast.add_step(num_tokens * runtime.world_size, runtime)
                if run.forecast.is_due():  # once, after a few steps
                    runtime.say(run.forecast.line(state.epochs_left(), runtime))
                if state.step % config.log_every == 0:  # not always: reading a loss waits for a GPU
                    bar.set_postfix_str(log_step(state, run, grad_norm))

                if state.is_due(config.eval_every):
                    validate_or_save(state, tokenized["validation"], run, config, runtime)

                # a signal: save, then leave by an exception. The time is up: save, then return
                stop = run.signals.requested()
                if stop or state.is_due(config.save_every):
                    with state.meter.paused():
                        state.meter.check()  # raises UserError: what is not finite must not be kept
                        run.checkpoints.save(state, run.log)
                if stop and stop != TIME_IS_UP:
                    run.signals.stop()
                if stop and not state.is_finished(patience):
                    return False
                if state.is_out_of_patience(patience):
                    break
        state.epoch += 1
        state.step_of_epoch = 0
    if patience is not None and state.is_out_of_patience(patience):
        runtime.say(f"stopped early: no better in {counted(patience, 'evaluation')}")
    return True


def train_step(
    state: TrainingState, micro_batches: list[BatchEncoding], config: TrainConfig, runtime: Runtime
) -> torch.Tensor:
    """Do one optimizer step: forward and backward passes of its micro-batches, then the change of the
    weights. Return the norm of the gradient before it was clipped.
    """
    model = state.wrapped  # with DDP around it if there are several processes
    optimizer, scheduler, scaler = state.optimizer, state.scheduler, state.scaler
    # the shapes in comments: B texts, K chunks of these texts, C classes, labels or numbers
    class_weights = state.class_weights  # (C), on the CPU, as the targets are when they are counted
    # the loss is a mean over the examples of all micro-batches and processes: their number (times
    # that of labels), or the sum of their class weights, divides the sum
    num_examples, divisor = count_examples(micro_batches, class_weights, runtime)
    if class_weights is not None:
        class_weights = class_weights.to(runtime.device, non_blocking=True)

    model.train()  # with dropout, which an evaluation has switched off
    for number, batch in enumerate(micro_batches, start=1):
        batch = batch.to(runtime.device, non_blocking=True)
        targets = batch["labels"]  # (B), or of labels and numbers (B, C)
        # DDP exchanges gradients once, in the last backward pass of the step
        with sync_gradients(model, when=number == len(micro_batches)):
            with runtime.autocast():
                logits = model(**model_inputs(batch, runtime.device)).logits  # (K, C)
            logits = pool_chunks(logits.float(), batch["text_of_chunk"], len(targets))  # (B, C)
            # cross-entropy of classes or labels, squared error of numbers
            summed_loss = sum_losses(config.task, logits, targets, class_weights, config.label_smoothing)
            # times world_size, because DDP divides by it when it averages gradients
            loss_share = summed_loss / divisor * runtime.world_size
            scaler.scale(loss_share).backward()
        state.meter.add(summed_loss, batch["row"])

    scaler.unscale_(optimizer)  # before clipping: the norm is the true gradient's
    grad_norm = clip_grad_norm_(model.parameters(), config.max_grad_norm)
    scale_before = scaler.get_scale()  # in fp16 it waits for the GPU; else it is 1 at once
    scaler.step(optimizer)
    scaler.update()
    # in fp16 the scaler skips a step that overflows, and lowers its scale; then the schedule waits
    # too (pytorch #55585)
    is_skipped = scaler.get_scale() < scale_before
    if not is_skipped:
        scheduler.step()
    optimizer.zero_grad()
    state.step += 1
    state.step_of_epoch += 1
    state.meter.end_step(state.step, examples=num_examples, divisor=divisor, grad_norm=grad_norm)
    return grad_norm


def log_step(state: TrainingState, run: Run, grad_norm: torch.Tensor) -> str:
    """Write a step's loss, learning rate and gradient to the log; return words for the bar."""
    values = {f"train/{name}": value for name, value in state.meter.read().items()}
    values["train/learning_rate"] = float(state.scheduler.get_last_lr()[0])
    if grad_norm.isfinite():  # if not, the scaler has skipped the step
        values["train/grad_norm"] = grad_norm.item()
    run.log.numbers(state.step, values)
    loss, speed = values["train/loss"], values["train/examples_per_second"]
    left = run.forecast.words_left(state.epochs_left())
    return f"loss {loss:.4f}, {speed:.1f} examples/s{left}"


def validate(
    state: TrainingState, rows: datasets.Dataset, run: Run, config: TrainConfig, runtime: Runtime
) -> None:
    """Score the model on the validation split, and keep it in best/ if it is the best so far."""
    train_scores = state.meter.so_far()
    model = TextClassifier(
        state.model, state.tokenizer, config.tokens, config.eval_batch_size, config.scoring
    )
    scores, logits = evaluate(model, rows, runtime, signals=run.signals)
    run.forecast.add_validation()
    # the losses of the last steps were finite, but these steps can have ruined the weights
    if not math.isfinite(scores["loss"]):
        raise UserError(
            f"epoch {state.epoch}, step {state.step}: the validation loss is {scores['loss']};"
            " lower --lr or raise --warmup-ratio"
        )
    entry = {"epoch": state.epochs_done(), "step": state.step, **train_scores, **scores}
    state.history.append(entry)
    thresholds = report.thresholds_of(scores)
    answers = report.Predictions(rows, logits, thresholds)
    report.log_scores(run.log, state.step, "validation", scores, answers)
    line = report.epoch_line(entry, config.epochs, config.task, config.best_metric)
    if is_better(entry, state.best, config.best_metric):
        state.best, line = entry, f"{line}, the best so far"
        if runtime.is_main:
            plain, folder = merge_adapters(state.model), run.log.folder / "best"
            trained = saved_settings.settings_to_save(run.log.settings, run.remembered, thresholds)
            max_length = config.tokens.eval_max_length
            saved_model.save(plain, state.tokenizer, folder, max_length=max_length, settings=trained)
    runtime.say(line)


def validate_or_save(
    state: TrainingState, rows: datasets.Dataset, run: Run, config: TrainConfig, runtime: Runtime
) -> None:
    """Validate while the clock of the training stands. If a signal interrupts it, save the state before
    it, so that a resumed run begins with this evaluation.
    """
    with state.meter.paused():
        try:
            validate(state, rows, run, config, runtime)
        except Interrupted:
            run.checkpoints.save(state, run.log)
            raise


def show_unfinished(
    state: TrainingState, rows: datasets.Dataset, run: Run, config: TrainConfig, runtime: Runtime
) -> None:
    """Show the scores of a run whose time is up before its end, and how it is continued.

    Its checkpoint is saved already, so that this evaluation is no part of the continued run.
    """
    if not state.is_evaluated():
        with state.meter.paused():
            validate(state, rows, run, config, runtime)
    runtime.say(f"\nthe time is up after step {state.step}: {run.signals.advice}")


# The test split, and the report -------------------------------------------------------------------


def test(loaded: Loaded, state: TrainingState, run: Run, runtime: Runtime) -> None:
    """Reload the best weights, score them once on the test split, and write the report."""
    config, rows, folder = loaded.config, loaded.tokenized["test"], run.log.folder
    best = reload_best(loaded, run, runtime)
    scores, logits = evaluate(best, rows, runtime, signals=run.signals)
    thresholds, positive_class = report.thresholds_of(scores), config.scoring.positive_class
    assert state.best is not None
    outcome = report.Outcome(
        settings=run.log.settings,
        history=state.history,
        best=state.best,
        scores=scores,
        baseline=baseline.score_answer(run.remembered.baseline, rows),
        predictions=report.Predictions(rows, logits, thresholds, positive_class),
        temperature=best.temperature,
        num_texts={split: len(loaded.tokenized[split]) for split in loaded.tokenized},
        peak_memory_bytes=peak_memory_bytes(runtime.device),
    )
    runtime.say(f"\n{report.epoch_table(state.history, config.task, config.best_metric)}")
    runtime.say(f"\nbest epoch {state.best['epoch']}, reloaded and scored on the test split:")
    report.show(scores, outcome.predictions, outcome.baseline, config.tokens.eval_max_length, runtime)

    answers, unlabelled_rows = [], loaded.notes.unlabelled
    if unlabelled_rows is not None:  # a test split of a competition
        texts, numbers = data.texts_of(unlabelled_rows), unlabelled_rows["row"][:]
        answers = list(predict_texts(best, texts, numbers, runtime))
    if runtime.is_main:
        if answers:
            predictions.write_csv(folder / "unlabelled.csv", answers)
        report.write_report(folder, outcome)
        model_card.write_card(folder / "best", outcome, loaded.splits)
    report.log_outcome(run.log, outcome)  # the last: metrics.json tells that the run is finished
    run.checkpoints.prune_finished()
    paths = f"model: {folder}/best   every test row: {folder}/predictions.csv"
    runtime.say(f"\nreport: {folder}/report.md   {paths}")
    if answers:
        runtime.say(f"the test split without labels, predicted: {folder}/unlabelled.csv")


def reload_best(loaded: Loaded, run: Run, runtime: Runtime) -> TextClassifier:
    """Return the best weights of a run, with the thresholds that were chosen for them, and with
    --calibrate a temperature.
    """
    runtime.barrier()  # the main process has written them
    config, folder = loaded.config, run.log.folder / "best"
    saved = saved_model.load(str(folder), runtime)
    best = TextClassifier(saved.model, saved.tokenizer, config.tokens, config.eval_batch_size)
    if config.calibrate:
        rows = loaded.tokenized["validation"]
        logits = predict_logits(best, rows, runtime, signals=run.signals)
        calibrate(logits, rows, folder, config.task, runtime)
        saved = dataclasses.replace(saved, settings=saved_settings.read_settings(folder, str(folder)))
    scoring = dataclasses.replace(config.scoring, threshold=saved.thresholds())
    return dataclasses.replace(best, scoring=scoring, temperature=saved.settings.temperature)


def calibrate(
    logits: torch.Tensor, rows: datasets.Dataset, folder: Path, task: Task, runtime: Runtime
) -> None:
    """Fit a temperature to the logits (N, C) of the validation split; save it with the model."""
    from common.training import calibration

    truth = task.targets(rows["label"][:]).numpy()
    temperature = calibration.fit_temperature(logits.double().numpy(), truth, task.kind)
    if runtime.is_main:
        saved_settings.save_temperature(folder, temperature)
    runtime.barrier()
    runtime.say(f"\ncalibrated on the validation split: logits are divided by {temperature:.4f}")


# A run in its folder ------------------------------------------------------------------------------


def fit(args: argparse.Namespace, runtime: Runtime) -> None:
    """Train and test in a folder that no other job writes to, as a run that can be resumed."""
    clock = tracking.Clock()
    if args.compile:
        check_compiler(runtime.device)
    name = run_name(args)
    with checkpoint.open_location(args.output_dir, args.resume, runtime, name=name) as location:
        fit_in(location, args, clock, runtime)


def fit_in(location: RunLocation, args: argparse.Namespace, clock: tracking.Clock, runtime: Runtime) -> None:
    """Load, prepare, train and test, from the beginning or from a checkpoint."""
    loaded = load(args, runtime, DataNotes())
    classifier.require_match(loaded.model, loaded.tokenizer, name=args.model, other=args.tokenizer)

    settings, identity = run_identity(args, loaded, runtime)
    checkpoints = Checkpoints(location, identity, keep=args.keep, keep_after=args.keep_after, runtime=runtime)
    start = checkpoints.choose()  # None: from the beginning

    rows = loaded.tokenized["train"]
    state = prepare(loaded.model, loaded.tokenizer, rows, loaded.config, runtime)
    with explain_out_of_memory(loaded.config.memory_advice()):
        runtime.say(batching.memory_line(state.model, rows, state.tokenizer, state.micro_batch_size, runtime))
    if start is not None:
        checkpoints.restore(start, state)
    log = checkpoints.open_log(settings, state.model, start)
    notes = loaded.notes
    left_out = [*notes.faults, *notes.rare_rows]
    if (args.skip_bad or left_out) and runtime.is_main:
        predictions.write_bad_rows(log.folder / "bad-rows.jsonl", left_out)
    signals = make_signals(args, location.folder, clock, runtime)
    forecast = make_forecast(loaded.tokenized, loaded.config, clock, runtime)
    answer = baseline.commonest_answer(rows)
    remembered = RememberedData(answer, notes.cut, notes.test_sha256, notes.rare)
    run = Run(log, checkpoints, signals, forecast, remembered)
    with contextlib.closing(log), signals:
        if train(state, loaded.tokenized, run, loaded.config, runtime):
            test(loaded, state, run, runtime)
        else:
            show_unfinished(state, loaded.tokenized["validation"], run, loaded.config, runtime)
    runtime.say(f"time     {tracking.duration(clock.seconds())} in all")


def run_identity(args: argparse.Namespace, loaded: Loaded, runtime: Runtime) -> tuple[dict, dict]:
    """Return the settings of a run, and its identity: a run is only resumed from checkpoints that have
    the same settings (with the defaults that were chosen), model and data.
    """
    chosen = {**dataclasses.asdict(loaded.config.tokens), "task": loaded.config.task.kind}
    given = data_config(args)
    chosen |= {"text_column": given.texts.text_column, "label_column": given.labels.label_column}
    settings = {**settings_of(args), **chosen, **commits_of(args)}
    return settings, checkpoint.identity(settings, loaded.model, loaded.tokenized, runtime)


def make_signals(
    args: argparse.Namespace, folder: Path, clock: tracking.Clock, runtime: Runtime
) -> StopSignals:
    """Return what stops a run before its end, a signal or --max-minutes, with advice how to go on."""
    resume = f"--resume {shlex.quote(str(folder))}"  # to be pasted
    advice = f"continue with {resume}"
    if args.keep == 0:
        advice = f"nothing is saved (--keep 0): {resume} starts from the beginning"
    time_left = None if args.max_minutes is None else 60 * args.max_minutes - clock.seconds()
    return StopSignals(runtime, advice, seconds=time_left, saves=args.keep > 0)


# A saved model ------------------------------------------------------------------------------------


def saved_scoring(saved: SavedModel, args: argparse.Namespace) -> Scoring:
    """Return how the answers of a saved model are scored: as in its training, unless flags say else.
    Raises UserError for flags that have no meaning in its task.
    """
    if args.threshold == "auto":
        raise UserError("--threshold auto: training chose it, and saved it with the model; leave it out")
    positive_class = args.positive_class or saved.settings.positive_class
    of_training = {"best_metric": "loss", "label_smoothing": 0.0, "class_weights": "none"}
    given = {**vars(args), **of_training, "label_separator": None, "positive_class": positive_class}
    check_task(saved.task.kind, given, saved.task.names)
    return Scoring(positive_class, saved.thresholds() if args.threshold is None else args.threshold)


def saved_texts(saved: SavedModel, args: argparse.Namespace) -> TextConfig:
    """Return which columns hold the texts for a saved model: as in its training, unless flags say else.
    Raises UserError for pairs where it was trained on single texts, or the other way round.
    """
    texts, trained = config_from_flags(TextConfig, args), saved.settings
    was_pair = trained.text_mode == PAIR
    if args.text_mode is not None and trained.is_ours and (args.text_mode == PAIR) != was_pair:
        problem = f"the model was trained on {'pairs of' if was_pair else 'single'} texts"
        raise UserError(f"--text-mode {args.text_mode}: {problem}; leave it out, or name another --model")
    if texts.text_mode is None and trained.text_mode is not None:
        texts = dataclasses.replace(texts, text_mode=trained.text_mode, join_with=trained.join_with)
    if args.text_column is None and trained.text_column is not None:
        texts = dataclasses.replace(texts, text_column=trained.text_column)
    return texts


def saved_labels(saved: SavedModel, args: argparse.Namespace) -> LabelConfig:
    """Return where the labels stand for a saved model: as in its training, unless flags say else."""
    labels, trained = config_from_flags(LabelConfig, args), saved.settings
    if args.label_column is None and trained.label_column is not None:
        labels = dataclasses.replace(labels, label_column=trained.label_column)
    return labels


def saved_classifier(saved: SavedModel, args: argparse.Namespace) -> TextClassifier:
    """Return a saved model that reads and answers as in its training, unless flags say else."""
    tokens = saved.choose_tokens(eval_max_length=args.eval_max_length, truncation=args.truncation)
    scoring, temperature = saved_scoring(saved, args), saved.settings.temperature
    return TextClassifier(saved.model, saved.tokenizer, tokens, args.eval_batch_size, scoring, temperature)


def evaluate_only(args: argparse.Namespace, runtime: Runtime) -> None:
    """Score a saved model on the test split, or on all rows of a data set that has none."""
    saved = saved_model.load(args.model, runtime, cache_dir=args.cache_dir, revision=args.revision)
    model = saved_classifier(saved, args)
    texts, labels = saved_texts(saved, args), saved_labels(saved, args)
    config = dataclasses.replace(data_config(args), texts=texts, labels=labels)
    rows = data.load_rows_for_scoring(config, saved.task, saved.settings, runtime)
    tokenizer = cast("PreTrainedTokenizerBase", model.tokenizer)  # load() has no other
    splits = tokenize_splits({"test": rows}, tokenizer, model.tokens, runtime, cache_dir=args.cache_dir)
    rows = splits["test"]
    scores, logits = evaluate(model, rows, runtime)
    thresholds, positive_class = report.thresholds_of(scores), model.scoring.positive_class
    answers = report.Predictions(rows, logits, thresholds, positive_class)
    known = saved.baseline()
    always = None if known is None else baseline.score_answer(known, rows)
    report.show(scores, answers, always, model.tokens.eval_max_length, runtime)


def predict(args: argparse.Namespace, runtime: Runtime) -> None:
    """Answer for each text, with its row, label, confidence and the score of every class: a JSON
    line on the screen, or a row of --output.
    """
    saved = saved_model.load_to_predict(args.model, runtime, cache_dir=args.cache_dir, revision=args.revision)
    model = saved_classifier(saved, args)
    faults: list[Fault] | None = [] if args.skip_bad else None
    with unlabelled.open_texts(
        args.predict,
        saved_texts(saved, args),
        kept=KeptColumns(args.id_column, args.keep_columns),
        options=cli.file_options(args),
        cache_dir=args.cache_dir,
        named=args.text_column,
        faults=faults,
    ) as texts:
        bad = texts.check()
        if faults and runtime.is_main and (advice := about_encoding(faults)):
            note(advice)
        if args.output is not None:
            write_predictions(model, texts, bad, args, runtime)
            return
        if faults and runtime.is_main:
            unusable, first = f"{counted(len(faults), 'row')} can't be used", faults[0]
            note(f"{unusable}, the first is {first.source}, row {first.row}: {first.problem}")
        for block in texts.blocks(PREDICT_BLOCK, without=bad):
            answers = list(predict_texts(model, block.texts, block.rows, runtime))
            for line in predictions.with_columns(block.columns, answers):
                runtime.write(cli.json_line(line))


def write_predictions(
    model: TextClassifier, texts: unlabelled.Texts, bad: set[int], args: argparse.Namespace, runtime: Runtime
) -> None:
    """Write an answer for each text but the `bad` ones to --output; with --resume go on with a file
    that was begun, if whatever its answers depend on is the same.
    """
    tokens, options = model.tokens, cli.file_options(args)
    identity = {
        "text": texts.sha256(),
        "model": tensors_sha256(model.model.state_dict()),
        "thresholds": str(model.scoring.threshold),
        "temperature": model.temperature,
        "--text-column": str(texts.config),
        "--keep-columns": texts.kept,
        "--eval-batch-size": model.batch_size,
        "precision or device": f"{runtime.precision} {runtime.device.type} {runtime.world_size}",
        "way to read texts": f"{tokens.eval_max_length} {tokens.truncation} {options}",
    }
    is_resumed = args.resume is not None
    with predictions.open_predictions(
        args.output, identity=identity, resume=is_resumed, runtime=runtime
    ) as file:
        if file.is_complete:
            runtime.say(f"{args.output} is complete already")
            return
        if texts.faults and runtime.is_main:
            path = predictions.bad_rows_file(Path(args.output))
            predictions.write_bad_rows(path, texts.faults)
            note(f"{counted(len(texts.faults), 'row')} can't be used: left out, see {path}")
        for block in texts.blocks(PREDICT_BLOCK, without=bad, skipped=file.num_rows):
            file.add(list(predict_texts(model, block.texts, block.rows, runtime)), block.columns)
        file.finish()
    runtime.say(f"{counted(file.num_rows, 'prediction')}: {args.output}")


# What the flags ask for ---------------------------------------------------------------------------


def inspect(args: argparse.Namespace, runtime: Runtime) -> None:
    """Show the data, the tokenizer, the model and a batch; train nothing."""
    from common.training import inspection

    name, other = args.compare_tokenizer, None
    if name is not None:
        other = classifier.load_tokenizer(name, flag="--compare-tokenizer", cache_dir=args.cache_dir)
    notes = DataNotes()
    try:
        loaded = load(args, runtime, notes)
    finally:  # also where too little is left to go on
        inspection.show_faults(notes)
    inspection.show(
        loaded.splits,
        loaded.tokenized,
        loaded.model,
        loaded.tokenizer,
        tokens=loaded.config.tokens,
        batch_size=args.batch_size,
    )
    if other is not None:
        text = loaded.splits["train"][0]["text"]
        inspection.show_comparison(text, {args.model: loaded.tokenizer, name: other})


def main(args: argparse.Namespace) -> None:
    """Do what the flags ask for."""
    if needs_no_model(args):
        do_without_model(args)
        return
    runtime = start_runtime(args.device, args.precision, args.seed)
    if args.inspect:
        inspect(args, runtime)
    elif args.predict is not None:
        predict(args, runtime)
    elif args.evaluate_only:
        evaluate_only(args, runtime)
    else:
        hint = "add --nondeterministic to allow that, or use --device cpu"
        with deterministic(runtime.device, wanted=not args.nondeterministic, hint=hint):
            fit(args, runtime)
    stop_runtime()


if __name__ == "__main__":
    # pyrefly: ignore [unbound-name]  (it is bound where the process begins)
    cli.run_main(main, ARGS, prog="train_classifier.py")
