"""Load a pretrained model safely, and check that it can be used, for every script."""

import contextlib
import copy
import math
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common import model_files
from common.errors import Interrupted, UserError, one_line

PROJECT = Path(__file__).resolve().parent.parent
# most models; GPT-2; MPT
POSITION_OPTIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# A model may have this many numbers for each one in its files: packed weights hold 8 in one. And this many in
# addition: a new head, tables that are computed.
NUMBERS_PER_SAVED, MORE_NUMBERS = 8, 50_000_000

# What matters of the library's warnings is checked and reported here.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load(auto_class: Any, folder: Path, *, name: str, flag: str = "--model", **options: Any) -> Any:
    """Return `auto_class.from_pretrained(folder, **options)`, without running any code from the
    folder.

    When `trust_remote_code` is left open, transformers asks on standard input whether to run the
    code that a config names, and takes the first line of a piped text as the answer. Raises
    UserError, naming `flag` and `name`, when the files can't be used.
    """
    with load_errors(name, flag=flag, reader=auto_class.__name__):
        return auto_class.from_pretrained(folder, trust_remote_code=False, **options)


def load_model(
    auto_class: Any, folder: Path, *, name: str, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """Return a model in evaluation mode, and the names of the tensors that its files lack and that
    are therefore new: those of its head.

    Raises UserError when anything else is new, so that no part of a pretrained model is silently replaced by
    random numbers; when a weight is not finite; when the configuration does not fit the weights.
    """
    _check_size(auto_class, config, folder, name=name)
    model, report = load(
        auto_class,
        folder,
        name=name,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported, and refused below unless it is the head
        output_loading_info=True,
    )
    # the library cuts what some models' files hold as one tensor (the queries, keys and values of
    # NomicBERT), and safetensors can't write such parts: each gets memory of its own
    for parameter in model.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
    return model, check_weights(model, report, source=f"--model {name}")


def load_sentence_model(model_class: Any, folder: Path, *, name: str, flag: str = "--model") -> Any:
    """Return a model of sentence-transformers of the class `model_class` on the CPU in fp32,
    without running any code from the folder.

    Raises UserError, naming `flag` and `name`, for a model of another kind, and as load_model()
    does. Nothing may be new, but for the pooler of an encoder, which is not used.
    """
    model_files.check_kind(folder, model_class.__name__, f"{flag} {name}")
    if (folder / model_files.CONFIG).exists():
        config = load(AutoConfig, folder, name=name, flag=flag)
        _check_size(AutoModel, config, folder, name=name, flag=flag)
    with load_errors(name, flag=flag, reader=model_class.__name__), _loading_reports() as reports:
        model = model_class(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )
    for part, report in reports:
        new = check_weights(part, report, source=f"{flag} {name}")
        if new and part.base_model is not part:
            problem = f"it was never trained for this (no weights for {_names(new)})"
            raise UserError(f"{flag} {name}: {problem}; name another model")
    # its modules look at their settings only when they read something
    with load_errors(name, flag=flag, reader=model_class.__name__):
        if hasattr(model, "predict"):  # a cross-encoder
            model.predict([("word", "word")], show_progress_bar=False)
            return model
        width = model.encode("word", show_progress_bar=False).size
        said = model.get_embedding_dimension()
    if width != said:
        problem = f"its modules make vectors of {width} numbers, and their settings say {said}"
        raise UserError(f"{flag} {name}: {problem}; repair it or name another model")
    return model


@contextlib.contextmanager
def _loading_reports() -> Iterator[list[tuple[PreTrainedModel, dict]]]:
    """Collect the models that are loaded within the block, and what transformers reports of each:
    sentence-transformers does not ask for the report.
    """
    reports = []
    usual = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(model_class: type, *args: Any, **options: Any) -> PreTrainedModel:
        asked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = usual.__func__(model_class, *args, **(options | asked))
        reports.append((model, report))
        return model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    try:
        yield reports
    finally:
        PreTrainedModel.from_pretrained = usual


def _check_size(
    auto_class: Any, config: PreTrainedConfig, folder: Path, *, name: str, flag: str = "--model"
) -> None:
    """Raise UserError when a configuration describes a model far larger than the weights beside it,
    before anything of that size is allocated.
    """
    shapes = model_files.weight_shapes(folder, f"{flag} {name}")
    saved = sum(map(math.prod, shapes.values()))
    # on the device "meta" a tensor has a shape and no memory
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("meta"),
        load_errors(name, flag=flag, reader=auto_class.__name__),
    ):
        skeleton = auto_class.from_config(copy.deepcopy(config), trust_remote_code=False)
    described = sum(tensor.numel() for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    if described > NUMBERS_PER_SAVED * saved + MORE_NUMBERS:
        raise UserError(
            f"{flag} {name}: its config.json describes a model of {described:,} numbers, and its"
            f" weights hold {saved:,}; repair it or name another model"
        )


def check_weights(model: PreTrainedModel, report: dict, *, source: str) -> list[str]:
    """Return the tensors that are new in a loaded model, all of its head, given transformers'
    report of the loading.

    Raises UserError when the pretrained part lacks a tensor, has one of another shape, or has fewer
    layers than the weights; and for a weight that is NaN or infinite.
    """
    mismatched = report["mismatched_keys"]
    other_shapes = {key: (tuple(saved), tuple(wanted)) for key, saved, wanted in mismatched}
    new = {*report["missing_keys"], *other_shapes}
    loaded = {key.rpartition(".")[0] for key in model.state_dict() if key not in new}  # modules
    # a part of the head that is only half there is damaged, not new
    lacking = sorted(key for key in new if not is_head(key, model) or key.rpartition(".")[0] in loaded)
    if lacking:
        problem = f"its weights lack {_names(lacking)}"
        if all(".decoder." in key for key in lacking):
            problem = f"its weights are an encoder alone, and a {type(model).__name__} has a decoder too"
        if lacking[0] in other_shapes:
            saved, wanted = other_shapes[lacking[0]]
            problem = f"{lacking[0]} has the shape {saved}, and {wanted} in config.json"
        raise UserError(f"{source}: {problem}; copy the whole model, or name another")
    if surplus := _surplus(model, report["unexpected_keys"]):
        problem = f"its config.json describes fewer layers than the weights have: {_names(surplus)}"
        raise UserError(f"{source}: {problem}; repair it or name another model")
    for key, parameter in model.named_parameters():
        # the types of one byte are those of quantised weights
        if parameter.is_floating_point() and parameter.element_size() > 1 and parameter.numel():
            extremes = torch.stack(torch.aminmax(parameter.detach()))  # one pass, which keeps NaN
            if not extremes.isfinite().all():
                kind = str(parameter.dtype).removeprefix("torch.")
                raise UserError(f"{source}: {key} is not finite in {kind}; name another model")
    return sorted(new)


def is_head(key: str, model: PreTrainedModel) -> bool:
    """Return whether a tensor belongs to a model's head: everything but the pretrained encoder or
    decoder.

    Its pooler counts as head too: BERT has one for its second task, and models that were trained
    without that task come without it.
    """
    if ".pooler." in f".{key}":
        return True
    return model.base_model is not model and not key.startswith(f"{model.base_model_prefix}.")


def _surplus(model: PreTrainedModel, unexpected: set[str]) -> list[str]:
    """Return the tensors of the files that a model would have if it had more layers."""

    def without_numbers(key: str) -> str:
        return re.sub(r"(?<=\.)\d+(?=\.)", "N", key.removeprefix(prefix))

    prefix = f"{model.base_model_prefix}."
    known = {without_numbers(key) for key in model.state_dict()}
    return sorted(key for key in unexpected if without_numbers(key) in known)


def _names(keys: list[str]) -> str:
    """Return the names of three tensors, and how many more there are."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def load_tokenizer(folder: Path, *, name: str, flag: str = "--model") -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model with truncation and padding switched off: every call sets
    its own.

    The file of all-MiniLM-L6-v2 switches both on, at 128 tokens. That of a model which is a GGUF
    file is in it. Raises UserError when there is no tokenizer.
    """
    found = sorted(folder.glob("*.gguf"))
    is_in_gguf = found and not (folder / "tokenizer_config.json").exists()
    in_gguf = {"gguf_file": found[0].name} if is_in_gguf else {}
    tokenizer = load(AutoTokenizer, folder, name=name, flag=flag, **in_gguf)
    check_tokenizer(tokenizer, name=name, flag=flag)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, name: str, flag: str) -> None:
    """Raise UserError for a tokenizer without words, which transformers makes up when its files
    are missing.
    """
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        problem = "its tokenizer is missing or has no words"
        raise UserError(f"{flag} {name}: {problem}; copy its files into the folder")


def try_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
    """Let a model read a word, because many settings are looked at only then. Raises UserError when
    they don't fit.
    """
    with load_errors(name, reader=type(model).__name__), torch.no_grad():
        model(**tokenizer("word", return_tensors="pt").to(model.device))


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens that a model takes at once, None if nothing limits it.

    RoBERTa and models like it number positions from the padding id + 1, so 514 embeddings hold 512
    tokens.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    config = model.config.get_text_config(decoder=True)
    sizes = [getattr(config, option, None) for option in POSITION_OPTIONS]
    # XLNet and Transformer-XL say -1: no number of positions limits them
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


@contextlib.contextmanager
def load_errors(name: str, *, flag: str = "--model", reader: str) -> Iterator[None]:
    """Turn whatever a library raises within the block, while it reads a model, into one line for
    the user; `reader` is what the files are read as.

    The block holds nothing but the library's call. An exception that this project itself raises
    there is a bug and keeps its traceback.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # nothing that the user can act on
            yield
    except BaseException as error:
        # the libraries in Rust end with a PanicException, which is no Exception
        ends_it = not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        if ends_it or isinstance(error, UserError | Interrupted) or _is_ours(error):
            raise
        raise UserError(f"{flag} {name}: {_reason(error, reader)}") from error


def _is_ours(error: BaseException) -> bool:
    """Return whether the line that raised an exception is one of this project."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(PROJECT) and "site-packages" not in path.parts


def _reason(error: BaseException, reader: str) -> str:
    if "file named model.safetensors" in str(error):
        return (
            "it has no weights that are read here (model.safetensors or pytorch_model.bin, or a"
            " list of their shards); name another model"
        )
    if "trust_remote_code" in str(error):
        return "it needs remote code, which is never run here; use a model that transformers supports"
    unknown = r"Unrecognized configuration class <class '(?:\w+\.)*(\w+?)(?:Config)?'>"
    if kind := re.search(unknown, str(error)):
        return f"this kind of model ({kind[1]}) can't do what the script does; name another model"
    # "'version'" says nothing without the KeyError
    is_plain = isinstance(error, OSError | ValueError | ImportError)
    reason = ("" if is_plain else f"{type(error).__name__}: ") + one_line(error).rstrip(".")
    return f"can't be read as {reader}: {reason}; repair its files or name another model"
