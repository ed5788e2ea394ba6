"""What a training comes by between two steps: an evaluation, new best weights, a checkpoint, its
end.
"""

import math
from dataclasses import dataclass

import datasets

from common.errors import Interrupted, UserError
from common.training import adaptation, loading, report, tracking
from common.training import classifier as models
from common.training.checkpoint import Checkpoints
from common.training.evaluation import is_better, score
from common.training.interruption import Interruption
from common.training.steps import LossMeter, Training


@dataclass
class Watch:
    """What goes along with a training: its validation rows, its log, its checkpoints, and the
    signals that stop it.
    """

    validation: datasets.Dataset
    log: tracking.RunLog | tracking.NullLog
    checkpoints: Checkpoints
    interruption: Interruption


def evaluate_if_due(training: Training, meter: LossMeter, watch: Watch, args, runtime):
    """Evaluate after an epoch's last step and after every `--eval-every` steps, once; save the
    model if it is the best so far.
    """
    whole = training.step_of_epoch == training.steps_of_epoch
    done = bool(training.history) and training.history[-1]["step"] == training.step
    if (
        done
        or training.step == 0
        or not (whole or (args.eval_every and training.step % args.eval_every == 0))
    ):
        return
    with meter.paused():
        losses = meter.so_far()
        try:
            scores, _ = score(
                training.model,
                watch.validation,
                training.tokenizer,
                runtime,
                batch_size=args.eval_batch_size,
                between=watch.interruption.check,
            )
        except Interrupted:
            # as it was before the evaluation, which a resumed run makes again
            watch.checkpoints.save(training, meter, watch.log)
            raise
        # the last steps can ruin the weights after their losses were read
        if not math.isfinite(scores["loss"]):
            raise UserError(
                f"epoch {training.epoch}, step {training.step}: the validation loss is {scores['loss']};"
                " lower --lr or raise --warmup-ratio"
            )
        epoch = (
            training.epoch
            if whole
            else round(training.epoch - 1 + training.step_of_epoch / training.steps_of_epoch, 2)
        )
        training.history.append({"epoch": epoch, "step": training.step, **losses, **scores})
        report.log_scores(
            watch.log, training.step, "validation", scores, watch.validation.features["label"].names
        )
        improved = is_better(training.history[-1], training.best, args.best_metric)
        if improved:
            training.best = training.history[-1]
            if runtime.is_main:
                models.save(
                    adaptation.merged(training.model),
                    training.tokenizer,
                    watch.log.folder / "best",
                    settings=training_settings(args),
                )
        runtime.say(
            report.epoch_line(training.history[-1], args.epochs) + (", the best so far" if improved else "")
        )


def save_if_due(training: Training, meter: LossMeter, watch: Watch, args):
    """Write a checkpoint after an epoch's last step, after every `--save-every` steps, and when a
    signal asks to stop; then stop.
    """
    stop = watch.interruption.requested()
    if (
        stop
        or training.step_of_epoch == training.steps_of_epoch
        or (args.save_every and training.step % args.save_every == 0)
    ):
        with meter.paused():
            # a loss that is not finite leaves weights that must not push out those from before
            meter.check()
            watch.checkpoints.save(training, meter, watch.log)
    if stop:
        watch.interruption.end()


def out_of_patience(training: Training, args) -> bool:
    """Tell whether the last evaluations, as many as --early-stopping-patience, were no better than
    the best.
    """
    if args.early_stopping_patience is None or training.best is None:
        return False
    return len(training.history) - 1 - training.history.index(training.best) >= args.early_stopping_patience


def training_settings(args) -> dict:
    """Return what a saved model must remember to be used and scored rightly; of the data, whose
    path is nobody else's matter, a digest of its name.
    """
    names = (
        "dataset_config",
        "seed",
        "max_length",
        "eval_max_length",
        "truncation",
        "text_column",
        "label_column",
    )
    return {
        "dataset_sha256": loading.name_digest(args.dataset),
        **{name: getattr(args, name) for name in names},
    }
