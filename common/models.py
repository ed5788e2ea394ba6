"""Load a pretrained model safely, and check that it can be used, for every script."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError, one_line

# most models; GPT-2; MPT
POSITION_OPTIONS = ("max_position_embeddings", "n_positions", "max_seq_len")

# What matters of the library's warnings is checked and said here.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load(auto_class: Any, folder: Path, *, name: str, flag: str = "--model", **options: Any) -> Any:
    """Return `auto_class.from_pretrained(folder, **options)`, without running any code from the
    folder.

    When `trust_remote_code` is left open, transformers asks on standard input whether to run the
    code that a config names, and takes the first line of a piped text as the answer. Raises
    UserError, naming `flag` and `name`, when the files can't be used.
    """
    with load_errors(name, flag=flag):
        return auto_class.from_pretrained(folder, trust_remote_code=False, **options)


def load_tokenizer(folder: Path, *, name: str, flag: str = "--model") -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model with truncation and padding switched off: every call sets
    its own.

    The file of all-MiniLM-L6-v2 switches both on, at 128 tokens. Raises UserError when there is no
    tokenizer.
    """
    tokenizer = load(AutoTokenizer, folder, name=name, flag=flag)
    check_tokenizer(tokenizer, name=name, flag=flag)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, name: str, flag: str = "--model") -> None:
    """Raise UserError for a tokenizer without words, which transformers makes up when its files
    are missing.
    """
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(
            f"{flag} {name}: its tokenizer is missing or has no words; copy its files into the folder"
        )


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the most tokens that a model takes at once, None if nothing limits it.

    RoBERTa and models like it number positions from the padding id + 1, so 514 embeddings hold 512
    tokens.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    config = model.config.get_text_config(decoder=True)
    sizes = [getattr(config, option, None) for option in POSITION_OPTIONS]
    return next((size for size in sizes if isinstance(size, int)), None)


@contextlib.contextmanager
def load_errors(name: str, *, flag: str = "--model") -> Iterator[None]:
    """Turn whatever a library raises within the block, while it reads a model, into one line for
    the user.

    The block holds nothing but the library's call, so that a bug of this project still shows its
    traceback.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{flag} {name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if "file named model.safetensors" in str(error):
        return (
            "it has no model.safetensors, and pickled weights (pytorch_model.bin) are never read because they"
            " can run code; use a version with safetensors or convert it first"
        )
    if "trust_remote_code" in str(error):
        return "it needs remote code, which is never run here; use a model that transformers itself supports"
    if "Unrecognized configuration class" in str(error):
        return "this kind of model can't do what the script does; name another model"
    return f"{one_line(error).rstrip('.')}; repair its files or name another model"
