"""A pretrained encoder with a head for a task, its tokenizer, and whether they belong together.

transformers, which takes seconds to import, is imported by the functions that need it: a prediction
by a model that common/bert.py knows does not.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from common import bert, sources
from common.errors import UserError, shorten
from common.runtime import Runtime
from common.training.adaptation import dropout_options, head_modules
from common.training.batching import AnyTokenizer
from common.training.run import (
    DEFAULT_CHUNK_LENGTH,
    DEFAULT_MAX_LENGTH,
    DEFAULT_TRUNCATION,
    MULTI,
    REGRESSION,
    SINGLE,
    Kind,
)
from common.training.task import PROBLEM_TYPES, Task
from common.training.tokenization import TokenConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# transformers' own, and those of common/bert.py, which stand for them in predictions
AnyModel: TypeAlias = "PreTrainedModel | bert.BertClassifier"
UNLIMITED = 1_000_000  # tokenizers without a limit say 1e30
# what a saved head may be for
PROBLEMS = {
    SINGLE: "one class of several",
    MULTI: "several labels per text",
    REGRESSION: "numbers (regression)",
}
# architectures that can't be trained or scored in padded batches of any length, and why
UNSERVED = {"reformer": "trains on texts of one length only"}
UNNAMED = re.compile(r"LABEL_\d+")  # names that transformers gives to classes


@dataclass(frozen=True)
class ModelConfig:
    """Which pretrained model, and what to change about it; the fields are named as their flags."""

    model: str
    revision: str | None
    tokenizer: str | None  # another one than the model's
    cache_dir: str | None
    dropout: float | None
    attention_dropout: float | None
    freeze_layers: int
    lora_rank: int | None
    gradient_checkpointing: bool
    compile: bool


# Load ---------------------------------------------------------------------------------------------


def load_pretrained(
    config: ModelConfig, task: Task, runtime: Runtime
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the pretrained model with a head for a task, and its tokenizer.

    Prints what was loaded. Raises UserError when either can't be loaded.
    """
    from transformers import AutoConfig

    from common import models

    name = config.model
    options = {"cache_dir": config.cache_dir, "revision": config.revision}
    folder = sources.find_folder(name, kind="encoder", **options)
    saved = models.load(AutoConfig, folder, name=name)
    if config.tokenizer is None:
        tokenizer = models.load_tokenizer(folder, name=name)
    else:
        tokenizer = load_tokenizer(config.tokenizer, flag="--tokenizer", cache_dir=config.cache_dir)
    has_padding_token = tokenizer.pad_token is not None  # of its own
    ensure_padding_token(tokenizer, name=name)
    dropout = dropout_options(
        saved, dropout=config.dropout, attention_dropout=config.attention_dropout, name=name
    )
    model, head = load_classifier(
        folder, name=name, task=task, dropout=dropout, pad_token_id=tokenizer.pad_token_id
    )
    pad_at_unread_end(model, tokenizer)
    size = sum(parameter.numel() for parameter in model.parameters())
    kind = type(model).__name__
    runtime.say(f"model    {name}: {kind}, {size / 1e6:.1f} million parameters, with {head}")
    if not has_padding_token:
        padding = f"padding with its end token {tokenizer.pad_token!r}"
        runtime.say(f"         the tokenizer has no padding token: {padding}")
    return model, tokenizer


def load_tokenizer(name: str, *, flag: str, cache_dir: str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a flag names in place of the model's: of any model, an encoder or not."""
    from common import bundled, models

    kind = bundled.MODELS.get(name, "encoder")
    folder = sources.find_folder(name, kind=kind, flag=flag, cache_dir=cache_dir)
    return models.load_tokenizer(folder, name=name, flag=flag)


def ensure_padding_token(tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
    """Let a tokenizer pad with its end token if need be. Raises UserError if it has neither."""
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise UserError(
            f"--model {name}: its tokenizer has neither a padding token nor an end token, so"
            " batches can't be padded; use another model"
        )
    tokenizer.pad_token = tokenizer.eos_token


def pad_at_unread_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer pad at the left for a model that reads the last token, as XLNet does: it
    would read padding. (Decoders find the last token that is none.)
    """
    if getattr(model.config, "summary_type", None) == "last":
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # which is saved


def load_classifier(
    folder: Path, *, name: str, task: Task, dropout: dict[str, float], pad_token_id: int
) -> tuple[PreTrainedModel, str]:
    """Return a model for a task, in fp32, and in a few words what its head is.

    Its config has `problem_type`, `id2label` and `label2id`. A saved head is kept if it is for the
    same classes, labels or numbers, and its outputs are put into the task's order; or if it is for
    as many without names. `dropout` gives values of the config's dropout options. Raises UserError,
    naming `name`, when the model can't be loaded or its pretrained part is incomplete.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from common import models

    saved = models.load(AutoConfig, folder, name=name)
    config = models.load(
        AutoConfig,
        folder,
        name=name,
        num_labels=len(task.names),
        id2label=dict(enumerate(task.names)),
        label2id={label: number for number, label in enumerate(task.names)},
    )
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id  # decoders look for the last token that is not padding
    config.problem_type = task.problem_type
    for option, value in dropout.items():
        setattr(config, option, value)
    model, new = models.load_model(
        AutoModelForSequenceClassification, folder, name=name, config=config, dtype=torch.float32
    )
    return model, choose_head(model, new, saved, task)


def choose_head(model: PreTrainedModel, new: list[str], saved: PreTrainedConfig, task: Task) -> str:
    """Give a loaded model a head for a task, whose logits are in the order of its names, and return
    in a few words what it is.

    `new` lists the tensors that the files lacked, and `saved` is the configuration in them.
    """
    if new:
        has_pooler = any(".pooler." in f".{key}" for key in new)
        return "a new head and a new pooler" if has_pooler else "a new head"
    if saved_kind(saved) != task.kind:
        renew_head(model)
        return f"a new head, because the saved one was for {PROBLEMS[saved_kind(saved)]}"
    classes, names = saved_classes(saved), list(task.names)
    if classes == names:
        return "the head that it was saved with"
    if all(UNNAMED.fullmatch(label) for label in classes):
        return "the head that it was saved with, whose classes have no names"
    order = [classes.index(label) for label in names if label in classes]
    if sorted(classes) == sorted(names) and reorder_head(model, order):
        return "the head that it was saved with, its classes put into another order"
    renew_head(model)
    return f"a new head, because the saved one was for {shorten(', '.join(classes), 60)}"


def saved_kind(config: PreTrainedConfig) -> Kind:
    """Return for what kind of task a model was saved; without a word about it, one output is a
    number and several are classes.
    """
    return _kind_of(config.problem_type, config.num_labels or 0)


def _kind_of(problem_type: str | None, num_outputs: int) -> Kind:
    kinds = {problem: kind for kind, problem in PROBLEM_TYPES.items()}
    return kinds.get(problem_type or "", SINGLE if num_outputs > 1 else REGRESSION)


def saved_classes(config: PreTrainedConfig) -> list[str]:
    """Return the names of a saved model's classes in the order of its logits."""
    return [str(label) for _, label in sorted((config.id2label or {}).items())]


def task_of_model(model: AnyModel) -> Task:
    """Return the task of a model, with its names in the order of its logits."""
    if isinstance(model, bert.BertClassifier):
        kind = _kind_of(model.config.settings.get("problem_type"), model.classifier.out_features)
        return Task(kind, tuple(model.class_names))
    return Task(saved_kind(model.config), tuple(saved_classes(model.config)))


def renew_head(model: PreTrainedModel) -> None:
    """Replace the numbers of a model's head by new random ones, as the library draws them for a
    head that the files lack.
    """
    for module in head_modules(model):
        for part in module.modules():
            for key, parameter in list(part.named_parameters(recurse=False)):
                # the library leaves alone what it has once loaded into
                setattr(part, key, torch.nn.Parameter(torch.empty_like(parameter)))
        module.apply(model._init_weights)


def reorder_head(model: PreTrainedModel, order: list[int]) -> bool:
    """Put the outputs of a model's head into another order, and return whether its last layer was
    found: the only linear one with as many outputs as classes.
    """
    last = [
        part
        for module in head_modules(model)
        for part in module.modules()
        if isinstance(part, torch.nn.Linear) and part.out_features == len(order)
    ]
    if len(last) != 1:
        return False
    with torch.no_grad():
        for parameter in last[0].parameters():
            parameter.copy_(parameter[order].clone())
    return True


def choose_max_length(
    wanted: int | None,
    default: int,
    model: AnyModel,
    tokenizer: AnyTokenizer,
    *,
    flag: str,
    is_pair: bool = False,
) -> int:
    """Return how many tokens a chunk may have: `wanted`, else `default` or what the model holds.

    Raises UserError when more is wanted than the model holds, or so little that no word fits.
    """
    holds = _positions(model) or UNLIMITED
    num_special = tokenizer.num_special_tokens_to_add(pair=is_pair) + is_pair  # one of each text
    if wanted is None:
        return min(default, holds, tokenizer.model_max_length)
    if wanted > holds:
        raise UserError(f"{flag} {wanted}: the model holds {holds} tokens; use at most that")
    if wanted <= num_special:
        raise UserError(f"{flag} {wanted}: the special tokens alone take {num_special}; use more")
    return wanted


def _positions(model: AnyModel) -> int | None:
    """Return the most tokens that a model takes at once, None if nothing limits it."""
    if isinstance(model, bert.BertClassifier):
        return model.config.num_positions - model.config.first_position
    from common import models

    return models.max_positions(model)


def choose_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    eval_max_length: int | None,
    truncation: str | None,
    is_pair: bool = False,
) -> TokenConfig:
    """Return how texts are read in training and evaluation; an argument that is None gets its default.
    Raises UserError for pairs of texts where the tokenizer can't tell their tokens apart.
    """
    if is_pair and not tokenizer.is_fast:
        problem = f"{type(tokenizer).__name__} does not tell which token is of which text"
        raise UserError(f"--text-mode pair: {problem}; join the columns, or use another model")
    choose = functools.partial(choose_max_length, model=model, tokenizer=tokenizer, is_pair=is_pair)
    truncation = truncation or DEFAULT_TRUNCATION
    default = DEFAULT_CHUNK_LENGTH if truncation == "chunks" else DEFAULT_MAX_LENGTH
    length = choose(max_length, default, flag="--max-length")
    eval_default = max_length or DEFAULT_MAX_LENGTH
    eval_length = choose(eval_max_length, eval_default, flag="--eval-max-length")
    return TokenConfig(length, eval_length, truncation, hides_special=is_pair or reads_ends(model))


def reads_ends(model: AnyModel) -> bool:
    """Tell whether a model reads the one end token of each text, as BART and T5 do, and can't read
    a text that holds another.
    """
    return getattr(model.config, "is_encoder_decoder", False)


def mismatches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a sentence for each sign that a tokenizer and a model do not belong together."""
    num_embeddings, highest = count_embeddings(model), max(tokenizer.get_vocab().values())
    problems = []
    if num_embeddings is not None and highest >= num_embeddings:
        problems.append(
            f"the tokenizer's ids go up to {highest}, but the embedding table has {num_embeddings}"
            " rows: higher ids crash the model"
        )
    if tokenizer.pad_token_id is None:
        problems.append("the tokenizer has no padding token: batches can't be padded")
    expected = model.config.pad_token_id
    if expected is not None and tokenizer.pad_token_id not in (None, expected):
        actual = tokenizer.pad_token_id
        problems.append(f"the tokenizer pads with id {actual}, the model expects {expected}")
    return problems


def count_embeddings(model: PreTrainedModel) -> int | None:
    """Return the rows of a model's embedding table; None without one: CANINE hashes characters."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None


def require_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, other: str | None = None
) -> None:
    """Raise UserError unless a tokenizer and a model belong together, and the model can read a padded
    batch of texts.
    """
    from common import models

    if problems := mismatches(model, tokenizer):
        named = f"--model {name}" if other is None else f"--tokenizer {other}"
        raise UserError(f"{named}: {problems[0]}; --inspect shows more")
    if (kind := model.config.model_type) in UNSERVED:
        raise UserError(f"--model {name}: a {kind} {UNSERVED[kind]}; name another model")
    if "attention_mask" not in tokenizer.model_input_names:
        problem = f"{type(model).__name__} reads padding as text"
        raise UserError(f"--model {name}: {problem}; name another model")
    models.try_out(model, tokenizer, name=name)
    with models.load_errors(name, reader=type(model).__name__), torch.no_grad():
        texts = [dict(tokenizer(text)) for text in ("word", "three more words")]
        model(**tokenizer.pad(texts, padding=True, return_tensors="pt").to(model.device))
