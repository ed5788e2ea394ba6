"""The flags of train_classifier.py, and what they and the files that they name show at once.

Importing it is quick: a mistake is said before PyTorch is loaded.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from common import bundled, cli, hub, reading, sources
from common.columns import add_kept_flags, named_columns
from common.errors import UserError
from common.training import predictions, study
from common.training.run import (
    CONFIG,
    DEFAULT_CHUNK_LENGTH,
    DEFAULT_MAX_LENGTH,
    DEFAULT_TRUNCATION,
    JOIN,
    LABEL_COLUMN,
    METRICS,
    NEWEST,
    PAIR,
    SCHEDULES,
    STARTED_IN,
    TASKS,
    TEXT_COLUMN,
    TRUNCATIONS,
    check_label_columns,
    check_task,
    check_text_columns,
    compare_flags,
    finished_runs,
    is_finished,
    locate_run,
    read_config,
    require_same_flags,
    resumed_flags,
)
from common.training.saved_settings import SavedSettings, name_sha256, read_settings

# flags that are no settings of a run: they choose what to do instead of it, or where to continue
INSTEAD = ("inspect", "compare_tokenizer", "evaluate_only", "predict", "compare")
OF_PREDICTIONS = ("output", "id_column", "keep_columns")
# flags without a part in the scores or answers of a saved model, and those without one in answers
OF_TRAINING = (
    *("output_dir", "epochs", "max_steps", "batch_size", "grad_accum", "lr", "schedule", "warmup_ratio"),
    *("weight_decay", "max_grad_norm", "dropout", "attention_dropout", "label_smoothing", "class_weights"),
    *("batching", "best_metric", "eval_every", "early_stopping_patience", "calibrate", "log_every"),
    *("freeze_layers", "lora_rank", "gradient_checkpointing", "auto_batch_size", "save_every"),
    *("max_minutes", "keep", "keep_after", "max_train_samples"),
)
OF_LABELS = (
    *("dataset", "validation_file", "test_file", "dataset_revision", "dataset_config", "label_column"),
    *("task", "label_separator", "clean_labels", "train_split", "validation_split", "test_split"),
    *("split_seed", "drop_rare", "merge_rare", "max_eval_samples", "positive_class"),
)
NOT_SETTINGS = (*INSTEAD, *OF_PREDICTIONS, "resume", "resume_or_start", "seeds", "grid", "debug")


# All flags ----------------------------------------------------------------------------------------


def make_parser(description: str | None = None) -> cli.Parser:
    """Return the parser of all flags, with their defaults."""
    after = {"check": check_flags, "complete": flags_besides}
    example = "--dataset reviews.csv"
    parser = cli.Parser(prog="train_classifier.py", description=description, example=example, **after)
    cli.add_shared_flags(parser, model="bundled/all-MiniLM-L6-v2")
    revision = "commit, branch or tag of a Hub model, for its weights, configuration and tokenizer"
    parser.add_argument("--revision", type=cli.name, help=revision)
    other = "another tokenizer than the model's: bundled name, folder or Hub id"
    parser.add_argument("--tokenizer", type=cli.path, metavar="NAME", help=other)
    help_text = "folder of the run (default: runs/<data set>-<model>-<time>)"
    parser.add_argument("--output-dir", type=cli.folder, help=help_text)
    for add_flags in (
        add_data_flags,
        add_text_flags,
        add_split_flags,
        add_length_flags,
        add_training_flags,
        add_loss_flags,
        add_score_flags,
        add_capacity_flags,
        add_run_flags,
        add_study_flags,
        add_other_work_flags,
    ):
        add_flags(parser)
    return parser


def add_data_flags(parser: cli.Parser) -> None:
    """Add the flags that say where the texts are."""
    group = parser.add_argument_group("data")
    flag = group.add_argument
    either = group.add_mutually_exclusive_group().add_argument
    help_text = "bundled name, CSV/TSV/JSON/JSONL/Parquet file, folder of class folders, or Hub id"
    either("--dataset", type=cli.path, default="bundled/bbc-news", help=help_text)
    own = "the data file of one split"
    either("--train-file", dest="dataset", type=cli.file, metavar="FILE", help=own)
    flag("--validation-file", type=cli.file, metavar="FILE", help=f"{own}, in place of the data set's")
    flag("--test-file", type=cli.file, metavar="FILE", help=f"{own}, in place of the data set's")
    cli.add_file_flags(group)
    flag("--dataset-revision", type=cli.name, help="commit, branch or tag of a Hub data set")
    flag("--dataset-config", help="configuration of a Hub data set that has several")


def add_text_flags(parser: cli.Parser) -> None:
    """Add the flags that say what a text is, and what its label."""
    flag = parser.add_argument_group("texts and labels").add_argument
    as_trained = "or as a saved model was trained"
    help_text = (
        "column of the texts; or two or more, separated by commas, with --text-mode"
        f" (default: {TEXT_COLUMN}, {as_trained})"
    )
    flag("--text-column", help=help_text)
    help_text = (
        "what several columns are: two texts that are read together (pair), or parts of one text"
        " (join; default: one column, or as a saved model was trained)"
    )
    flag("--text-mode", choices=[PAIR, JOIN], help=help_text)
    flag("--join-with", default=" ", help="with --text-mode join: what stands between the parts")
    help_text = (
        "column of the labels; several, separated by commas, hold 0 or 1 for each, or numbers"
        f" (default: {LABEL_COLUMN}, {as_trained})"
    )
    flag("--label-column", help=help_text)
    help_text = (
        "what a text has: one class (single), any number of labels (multi) or numbers (regression);"
        " auto: found from the labels"
    )
    flag("--task", choices=["auto", *TASKS], default="auto", help=help_text)
    flag("--label-separator", type=cli.name, help="what stands between the labels of one cell")
    help_text = (
        "take labels that differ in spaces and capital letters alone for one, and NaN, N/A, null and"
        " the like for none"
    )
    flag("--clean-labels", action="store_true", help=help_text)
    help_text = "what stands before the decimals of labels that are numbers"
    flag("--decimal", choices=[".", ","], default=".", help=help_text)


def add_split_flags(parser: cli.Parser) -> None:
    """Add the flags that say which rows each split has."""
    flag = parser.add_argument_group("splits").add_argument
    count = cli.positive_int
    flag("--train-split", help="its name in the data set")
    flag("--validation-split", help="its name in the data set; cut from train if there is none")
    flag("--test-split", help="its name in the data set; cut from train if there is none")
    seed = "seed that cuts and samples splits (default: --seed)"
    flag("--split-seed", type=cli.non_negative_int, help=seed)
    help_text = (
        "leave out rows that can't be used, and write them to bad-rows.jsonl in the run folder, or"
        " beside --output; --inspect lists them"
    )
    flag("--skip-bad", action="store_true", help=help_text)
    help_text = "leave out classes with fewer than N training texts"
    flag("--drop-rare", type=count, metavar="N", help=help_text)
    help_text = "make one class of them instead (without --drop-rare: of those with fewer than 10)"
    flag("--merge-rare", type=cli.name, metavar="NAME", help=help_text)
    flag("--max-train-samples", type=count, help="most texts to train on: a stratified sample")
    flag("--max-eval-samples", type=count, help="the same for validation and test")


def add_length_flags(parser: cli.Parser) -> None:
    """Add the flags that say how much of a text is read."""
    flag = parser.add_argument_group("lengths").add_argument
    count = cli.positive_int
    help_text = (
        f"tokens read at once in training (default: {DEFAULT_CHUNK_LENGTH} of chunks, else"
        f" {DEFAULT_MAX_LENGTH})"
    )
    flag("--max-length", type=count, help=help_text)
    help_text = f"the same in scoring (default: --max-length if given, else {DEFAULT_MAX_LENGTH})"
    flag("--eval-max-length", type=count, help=help_text)
    help_text = (
        "what to read of a longer text: its beginning, its end, a quarter from the beginning"
        " and the rest from the end, or all of it in overlapping chunks whose logits are averaged"
        f" (default: {DEFAULT_TRUNCATION}; for a saved model, as it was scored)"
    )
    flag("--truncation", choices=TRUNCATIONS, help=help_text)
    help_text = "chunks of a text in a training step, drawn again in each epoch; scoring reads all"
    flag("--max-chunks", type=count, default=1, help=help_text)


def add_training_flags(parser: cli.Parser) -> None:
    """Add the flags of the optimizer, its batches and its schedule."""
    flag = parser.add_argument_group("training").add_argument
    count, share = cli.positive_int, cli.fraction
    flag("--epochs", type=count, default=3, help="passes over the training split")
    flag("--max-steps", type=count, metavar="N", help="optimizer steps, in place of --epochs")
    flag("--batch-size", type=count, default=16, help="texts per process and micro-batch")
    flag("--eval-batch-size", type=count, default=32, help="chunks per process in evaluation")
    flag("--grad-accum", type=count, default=1, help="micro-batches per optimizer step")
    flag(
        "--lr",
        type=cli.positive_float,
        nargs="+",
        action=study.OneOrSeveral,
        default=1e-4,
        help="highest learning rate; several: a run with each",
    )
    help_text = "of the learning rate after the warm-up: it falls to 0 in a line or a cosine, or stays"
    flag("--schedule", choices=SCHEDULES, default="linear", help=help_text)
    flag("--warmup-ratio", type=share, default=0.1, help="share of steps in which the rate rises")
    help_text = "decay of the matrices; biases and norms have none"
    flag("--weight-decay", type=cli.non_negative_float, default=0.01, help=help_text)
    help_text = "clip the gradient to this norm"
    flag("--max-grad-norm", type=cli.positive_float, default=1.0, help=help_text)


def add_loss_flags(parser: cli.Parser) -> None:
    """Add the flags of dropout, of the loss, and of the order in which texts are read."""
    flag = parser.add_argument_group("dropout, loss and order").add_argument
    share = cli.fraction
    help_text = "dropout rate everywhere in the model (default: as pretrained, but 0 in attention)"
    flag("--dropout", type=share, help=help_text)
    help_text = "above 0, slower on CPUs (default: --dropout if given, else 0)"
    flag("--attention-dropout", type=share, help=help_text)
    help_text = "share of each label that is spread over all classes"
    flag("--label-smoothing", type=share, default=0.0, help=help_text)
    help_text = "balanced: every class counts the same, however few texts it has"
    flag("--class-weights", choices=["none", "balanced"], default="none", help=help_text)
    help_text = "buckets: texts of similar length share a batch"
    flag("--batching", choices=["buckets", "random"], default="buckets", help=help_text)


def add_score_flags(parser: cli.Parser) -> None:
    """Add the flags that say when to evaluate, and what the scores are."""
    flag = parser.add_argument_group("evaluation").add_argument
    count = cli.positive_int
    help_text = (
        "validation score that tells which weights are best; on ties, the earliest are: loss; of"
        " one class accuracy, macro_f1, micro_f1, weighted_f1, binary_f1, matthews, roc_auc,"
        " average_precision; of labels also subset_accuracy, label_accuracy; of numbers rmse, mae, r2,"
        " pearson, spearman"
    )
    flag("--best-metric", choices=METRICS, default="loss", metavar="SCORE", help=help_text)
    positive = "class whose F1 is binary_f1 (default: of two classes the second in their order)"
    flag("--positive-class", type=cli.name, metavar="NAME", help=positive)
    help_text = (
        "probability from which on a text has a label: a number, or auto: for each label the one"
        " with the highest F1 on the validation split (default: 0.5; for a saved model, as scored)"
    )
    flag("--threshold", type=threshold, metavar="P", help=help_text)
    every = "evaluate after every so many optimizer steps too, not only after each epoch"
    flag("--eval-every", type=count, metavar="STEPS", help=every)
    patience = "stop after N evaluations in a row that were no better than the best"
    flag("--early-stopping-patience", type=count, metavar="N", help=patience)
    help_text = (
        "in the end, fit one temperature on the validation split, so that a confidence of 0.8 is"
        " right in 80 of 100 texts; it is saved with the model"
    )
    flag("--calibrate", action="store_true", help=help_text)
    flag("--log-every", type=count, default=10, help="optimizer steps between points of a curve")


def add_capacity_flags(parser: cli.Parser) -> None:
    """Add the flags that say which weights are trained, and in how much memory and time."""
    flag = parser.add_argument_group("trained weights, memory and speed").add_argument
    count = cli.positive_int
    help_text = "do not train the embeddings and the N lowest layers (0: train all)"
    flag("--freeze-layers", type=cli.non_negative_int, default=0, metavar="N", help=help_text)
    help_text = "train low-rank adapters and the head only; best/ has them merged"
    flag("--lora-rank", type=count, metavar="R", help=help_text)
    help_text = "compute activations twice: less memory, a third more time"
    flag("--gradient-checkpointing", action="store_true", help=help_text)
    help_text = "if a micro-batch does not fit into memory, halve it and accumulate: the same steps"
    flag("--auto-batch-size", action="store_true", help=help_text)
    flag("--compile", action="store_true", help="torch.compile: slow start, faster steps on GPUs")
    help_text = "on a GPU: a little faster, and two runs differ in their last digits"
    flag("--nondeterministic", action="store_true", help=help_text)
    help_text = "processes that make batches; the texts are tokenised before, so few are enough"
    flag("--num-workers", type=cli.non_negative_int, default=0, help=help_text)


def add_run_flags(parser: cli.Parser) -> None:
    """Add the flags that stop and resume a run."""
    flag = parser.add_argument_group("stopping and resuming").add_argument
    count = cli.positive_int
    every = "write a checkpoint after every so many optimizer steps, not only after each epoch"
    flag("--save-every", type=count, metavar="STEPS", help=every)
    help_text = "stop N minutes after the start, save and evaluate; --resume continues"
    flag("--max-minutes", type=cli.positive_duration, metavar="N", help=help_text)
    flag(
        "--keep",
        type=cli.non_negative_int,
        default=2,
        help="checkpoints to keep; with two, damage to the newest one costs little; 0: write none",
    )
    help_text = "checkpoints to keep of a finished run (default: --keep; of each run of several: 0)"
    flag("--keep-after", type=cli.non_negative_int, metavar="N", help=help_text)
    help_text = (
        "continue the run in this folder (or in --output-dir) from its newest undamaged"
        " checkpoint, or from a given one, runs/<name>/checkpoints/step-<number>; the other flags"
        " are those of the run"
    )
    flag("--resume", nargs="?", type=os.path.expanduser, const=NEWEST, metavar="RUN", help=help_text)
    help_text = "for a job that is started again: continue the run in --output-dir if there is one"
    flag("--resume-or-start", action="store_true", help=help_text)


def add_study_flags(parser: cli.Parser) -> None:
    """Add the flags that make several runs."""
    flag = parser.add_argument_group("several runs, and a table of their scores").add_argument
    help_text = "a run with each of these seeds"
    flag("--seeds", type=cli.non_negative_int, nargs="+", metavar="N", help=help_text)
    help_text = "a run with each value of a flag, such as batch-size=8,16; may be repeated"
    flag("--grid", type=study.grid_axis, action="append", metavar="FLAG=A,B", help=help_text)


def add_other_work_flags(parser: cli.Parser) -> None:
    """Add the flags that do something else instead of training."""
    group = parser.add_argument_group("instead of training")
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--inspect", action="store_true", help="show data, tokenizer, model and a batch")
    help_text = (
        "show finished runs (or those of a study) side by side, each tested against the first;"
        " --output-dir takes the tables"
    )
    flag("--compare", nargs="+", type=cli.path, metavar="RUN", help=help_text)
    flag("--evaluate-only", action="store_true", help="score a saved --model on the test split")
    flag(
        "--predict",
        type=cli.path,
        metavar="FILE",
        help="classify the lines of a text file (- for standard input), or the rows of a data file",
    )
    help_text = "with --predict: a new .jsonl, .csv or .parquet; --resume goes on with one that was left"
    group.add_argument("--output", type=cli.path, metavar="FILE", help=help_text)
    add_kept_flags(group, needs="--predict", beside="each answer")
    help_text = "with --inspect: a second tokenizer on a sentence (bundled name, folder or Hub id)"
    group.add_argument("--compare-tokenizer", type=cli.path, metavar="NAME", help=help_text)


# What they show at once ---------------------------------------------------------------------------


def flags_besides(parser: cli.Parser, argv: Sequence[str]) -> list[str]:
    """Return the flags of the run that is to be continued, but for those in `argv`. Raises UserError
    when --evaluate-only is given without the data that the model needs.
    """
    given = parser.given(argv)
    if given.get("evaluate_only") and given.keys().isdisjoint(("dataset", "test_file")):
        model, dataset = given.get("model", parser.get_default("model")), parser.get_default("dataset")
        require_trained_on(dataset, model)
    if any(given.get(name) for name in INSTEAD):
        return []
    resume, saved = resumed_flags(given)
    not_saved = {*given, *NOT_SETTINGS} - ({"seeds", "grid"} - given.keys())
    # another name may be that of a local copy, which has no commits
    not_saved |= {
        revision
        for name, revision in (("model", "revision"), ("dataset", "dataset_revision"))
        if given.get(name, saved.get(name)) != saved.get(name)
    }
    others = {name: value for name, value in saved.items() if name not in not_saved}
    if saved:
        require_same_place(Path(resume or given["output_dir"]), others)
    return parser.as_flags({"resume": resume, **others})


def require_same_place(run: Path, saved: Mapping[str, object]) -> None:
    """Raise UserError for a file or folder that a run has named from the folder in which it was started,
    and that is not here: it would be looked for on the Hub.
    """
    for name in ("dataset", "validation_file", "test_file", "model", "tokenizer"):
        value = saved.get(name)
        if not isinstance(value, str) or bundled.is_bundled(value) or os.path.exists(value):
            continue
        if os.path.exists(os.path.join(str(saved[STARTED_IN]), value)):
            flag = f"--{name.replace('_', '-')}"
            problem = f"the run was started in {saved[STARTED_IN]}, and its {flag} {value} is not here"
            raise UserError(f"--resume {run}: {problem}; continue it there, or name {flag} too")


def require_trained_on(dataset: str, model: str) -> None:
    """Raise UserError unless a saved model was trained on the default data set; for a name that can be
    no model, `check_flags` does.
    """
    try:
        sources.check_model(model, kind="encoder")
    except UserError:
        return
    settings = read_settings(Path(model), model) if Path(model).is_dir() else SavedSettings()
    if settings.dataset_sha256 != name_sha256(dataset):
        problem = f"{model} is not known to be trained on {dataset}, its default"
        raise UserError(f"--evaluate-only: {problem}; name the data to score it on with --dataset")


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for a mistake that the flags show, or the files that they name."""
    if args.compare is not None:
        check_compared(args)
        return
    instead = next((name for name in INSTEAD if getattr(args, name) not in (None, False)), None)
    if instead is not None and study.is_study(args):
        flag = f"--{instead.replace('_', '-')}"
        raise UserError(f"--seeds, --grid and several --lr: they train; leave them out, or {flag}")
    sources.check_model(args.model, kind="encoder")
    check_hub_flags(args)
    if args.compare_tokenizer is not None:
        if not args.inspect:
            raise UserError(
                f"--compare-tokenizer {args.compare_tokenizer}: it works with --inspect only; add"
                " --inspect, or leave it out"
            )
        kind = bundled.MODELS.get(args.compare_tokenizer, "encoder")
        sources.check_model(args.compare_tokenizer, kind=kind, flag="--compare-tokenizer")
    default_of = make_parser().get_default
    if args.evaluate_only or args.predict is not None:
        cli.refuse_unused(args, OF_TRAINING, default_of, "it belongs to a training, and none is made")
    options = cli.file_options(args)
    if args.predict is not None:  # an empty name is a mistake, not a wish to train
        cli.refuse_unused(args, OF_LABELS, default_of, "--predict reads its own file, and no labels")
        sources.check_texts(args.predict, any_suffix=options.is_table)
        check_output_flags(args)
        reading.check_columns(args.predict, {}, options=options)
        return
    cli.refuse_unused(args, OF_PREDICTIONS, default_of, "it works with --predict only")
    sources.check_data(args.dataset, any_suffix=options.is_table)
    if not args.inspect and not args.evaluate_only:
        if args.task != "auto":  # else when the labels have told it
            check_task(args.task, vars(args))
        check_training_flags(args)
    check_files(args)


def check_files(args: argparse.Namespace) -> None:
    """Raise UserError for a file of a split that is no text, and for a column of texts or labels that
    it lacks, as its beginning shows; a test split may have no labels.
    """
    options = cli.file_options(args)
    text = TEXT_COLUMN if args.text_column is None else args.text_column
    label = LABEL_COLUMN if args.label_column is None else args.label_column
    names = [TEXT_COLUMN, LABEL_COLUMN]
    if not bundled.is_bundled(args.dataset):
        names = reading.names_at_once(args.dataset, [text, label], options=options)
    if not args.evaluate_only:  # else as the saved model was trained
        # a header that is not seen yet may have a column of the whole name
        if names or "," not in text:
            check_text_columns(named_columns(text, names, flag="--text-column"), args.text_mode)
        if names or "," not in label:
            check_label_columns(named_columns(label, names, flag="--label-column"), args.label_separator)
    files = {"train": args.dataset, "validation": args.validation_file, "test": args.test_file}
    is_known = not (args.evaluate_only or args.train_split or args.test_split or args.validation_split)
    for split, name in files.items():
        if name is None or bundled.is_bundled(name):
            continue
        wanted = {text: "--text-column"} if is_known else {}
        if is_known and split != "test":
            wanted[label] = "--label-column"
        reading.check_columns(name, {}, several=wanted, options=options, source=f"split {split}")


def check_hub_flags(args: argparse.Namespace) -> None:
    """Raise UserError for a revision of what does not come from the Hub,
    and for a tokenizer that can be none.
    """
    for name, flag, value in (
        (args.model, "--revision", args.revision),
        (args.dataset, "--dataset-revision", args.dataset_revision),
    ):
        if value is not None and (bundled.is_bundled(name) or Path(name).exists()):
            raise UserError(
                f"{flag} {value}: {name} is not on the Hub, which alone has revisions; leave it out"
            )
    if args.tokenizer is not None:
        if args.evaluate_only or args.predict is not None:
            problem = "a saved model has its own"
            raise UserError(f"--tokenizer {args.tokenizer}: {problem}; leave the flag out")
        kind = bundled.MODELS.get(args.tokenizer, "encoder")
        sources.check_model(args.tokenizer, kind=kind, flag="--tokenizer")


def threshold(text: str) -> float | Literal["auto"]:
    """Parse a probability from which on a text has a label, or auto."""
    return "auto" if text == "auto" else cli.probability(text)


def check_output_flags(args: argparse.Namespace) -> None:
    """Raise UserError unless the file of predictions can be written."""
    resumes = args.resume is not None
    if args.output is not None:
        predictions.check_output(args.output, resume=resumes)
    elif resumes:
        raise UserError("--resume: with --predict it goes on with the file of --output; name it")


def check_compared(args: argparse.Namespace) -> None:
    """Raise UserError unless --compare names finished runs, and --output-dir a place for tables."""
    finished_runs(args.compare)
    if args.output_dir is not None and (Path(args.output_dir) / CONFIG).exists():
        advice = "name another folder for tables"
        raise UserError(f"--output-dir {args.output_dir}: it holds a run; {advice}")


def check_training_flags(args: argparse.Namespace) -> None:
    """Raise UserError when flags exclude each other, or a run can't be kept where they say."""
    if args.max_chunks > 1 and args.truncation not in (None, "chunks"):
        raise UserError(
            f"--max-chunks {args.max_chunks}: --truncation {args.truncation} reads one chunk of a"
            " text; leave one of the two out"
        )
    if args.max_chunks > args.batch_size:
        raise UserError(
            f"--max-chunks {args.max_chunks}: a micro-batch holds at most --batch-size"
            f" {args.batch_size} chunks, and those of a text stay together; lower the one or"
            " raise the other"
        )
    if args.keep == 0 and args.save_every is not None:
        problem = "--keep 0 writes no checkpoint"
        raise UserError(f"--save-every {args.save_every}: {problem}; leave one out")
    if study.is_study(args):
        check_study(args)
    # several processes decide together where the run lies, when they have found each other
    elif is_done(args):
        compare_flags(Path(args.output_dir), read_config(Path(args.output_dir)), settings_of(args))
    elif "RANK" not in os.environ:
        location = locate_run(args.output_dir, args.resume, name=run_name(args))
        if location.is_resumed:
            require_same_flags(location, settings_of(args))


def check_study(args: argparse.Namespace) -> None:
    """Raise UserError unless each of several runs can be started with these flags."""
    if cli.TORCHRUN in os.environ:
        problem = "each run is a process of its own"
        raise UserError(f"--seeds, --grid and several --lr: {problem}; start the script with python")
    found: dict[str, str] = {}
    for run in plan_study(args).runs:
        flags = {**vars(make_parser().parse_args(run.flags)), "output_dir": None}
        written = ", ".join(f"{flag} {value}" for flag, value in run.setting.items())
        if (same := found.setdefault(repr(flags), written)) != written:
            raise UserError(f"--grid: {same} and {written} are the same; give one of them")


def plan_study(args: argparse.Namespace) -> study.Study:
    """Return the runs that --seeds, --grid and --lr ask for."""
    left_out = {*NOT_SETTINGS} - {"seeds", "grid"}
    return study.make_study(make_parser(), args, left_out, name=run_name(args))


def is_done(args: argparse.Namespace) -> bool:
    """Tell whether --resume-or-start finds a finished run."""
    return args.resume_or_start and args.resume is not None and is_finished(Path(args.output_dir))


def run_name(args: argparse.Namespace) -> str:
    """Return the name of a run's folder where the flags give none; the time is added to it."""
    return f"{Path(args.dataset).stem}-{Path(args.model).name}"


def settings_of(args: argparse.Namespace) -> dict:
    """Return the flags that are settings of a run."""
    return {flag: value for flag, value in vars(args).items() if flag not in NOT_SETTINGS}


def commits_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the commits of model and data that come from the Hub, by the flags that name them: a
    branch may mean another one when the run is resumed.
    """
    commits = {
        "revision": hub.commit_of(args.model, kind="model", revision=args.revision, cache_dir=args.cache_dir),
        "dataset_revision": hub.commit_of(
            args.dataset, kind="dataset", revision=args.dataset_revision, cache_dir=args.cache_dir
        ),
    }
    return {flag: commit for flag, commit in commits.items() if commit is not None}


def shown_while_loading(args: argparse.Namespace) -> str | None:
    """Return the names of the model and of the texts, to be shown while the libraries
    are loaded; None if none is needed.
    """
    if needs_no_model(args):
        return None
    return f"{args.model} and {args.dataset if args.predict is None else args.predict}"


def needs_no_model(args: argparse.Namespace) -> bool:
    """Tell whether nothing is to be trained or scored in this process."""
    if any(getattr(args, name) for name in INSTEAD):
        return args.compare is not None
    return study.is_study(args) or is_done(args)
