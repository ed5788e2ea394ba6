"""A loaded model and the flags -> all that a training step works with."""

import math

import datasets
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import get_linear_schedule_with_warmup

from common.errors import UserError
from common.runtime import Runtime
from common.training import adaptation, batching, memory
from common.training.steps import Training, balanced_weights, decay_groups


def check_flags(args):
    """Raise UserError for flags of a training that can't be used together."""
    if args.max_windows > 1 and args.truncation not in (None, "chunks"):  # None: its default
        raise UserError(
            f"--max-windows {args.max_windows}: --truncation {args.truncation} reads one window of a text;"
            " leave one of the two out"
        )
    if args.max_windows > args.batch_size:
        raise UserError(
            f"--max-windows {args.max_windows}: a backward pass holds at most --batch-size {args.batch_size}"
            " windows, those of a text together; lower the one or raise the other"
        )


def prepare(model, tokenizer, rows, args, runtime) -> Training:
    """Put the model on its device, and make the optimizer, the schedule and the loss scaler for
    epochs of `rows`.
    """
    model = adaptation.adapt(model, args).to(runtime.device)
    if args.freeze_layers or args.lora_rank:
        runtime.say(
            "learns  "
            f" {sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad):,}"
            " parameters"
        )
    class_weights = (
        balanced_weights(rows["label"][:], model.config.num_labels)
        if args.class_weights == "balanced"
        else None
    )
    micro_batch = (
        memory.largest_batch(model, rows, tokenizer, args, runtime)
        if args.auto_batch_size
        else args.batch_size
    )
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), lr=args.lr, fused=True)
    num_steps = math.ceil(len(rows) / batching.step_size(args, runtime)) * args.epochs
    scheduler = get_linear_schedule_with_warmup(optimizer, round(args.warmup_ratio * num_steps), num_steps)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
    parallel = distribute(model, rows, tokenizer, runtime) if runtime.world_size > 1 else model
    if args.compile:
        parallel = torch.compile(parallel, dynamic=True)  # batches differ in length
    torch.manual_seed(args.seed + runtime.rank)  # each process draws its own dropout masks
    return Training(model, tokenizer, parallel, optimizer, scheduler, scaler, class_weights, micro_batch)


def distribute(
    model: torch.nn.Module, rows: datasets.Dataset, tokenizer, runtime: Runtime
) -> DistributedDataParallel:
    """Return the model in DDP, which exchanges gradients between the processes, as it is after its
    first pass.

    A step can leave a parameter without a gradient, as BigBird's pooler: DDP waits for it unless
    it is told to look for such in every step. And after its first backward pass DDP puts gradients
    together in another order, in which more than two processes add up to other last digits: a
    resumed run must not have that pass once more.
    """
    backward_once(model, rows, tokenizer, runtime)
    unused = any(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.zero_grad()
    # they are constant in encoders
    parallel = DistributedDataParallel(model, find_unused_parameters=unused, forward_sync_buffers=False)
    backward_once(parallel, rows, tokenizer, runtime)
    model.zero_grad()
    return parallel


def backward_once(model: torch.nn.Module, rows: datasets.Dataset, tokenizer, runtime: Runtime):
    """Run one text forward and backward, without dropout, which would draw random numbers."""
    (batch,) = batching.loader(rows, [[(0, (0,))]], tokenizer)
    del batch["labels"], batch["row"], batch["document"]
    model.eval()
    with runtime.autocast():
        logits = model(**batch.to(runtime.device)).logits
    logits.float().sum().backward()
