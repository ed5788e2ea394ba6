"""Find a pretrained model, load it safely, and check that it can be used, for every script."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import safetensors
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common import bundled, hub
from common.errors import UserError, one_line

# Files of a Hub model that are downloaded: no pickles, no ONNX, no code.
FILES_READ = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
FILES_IGNORED = ["onnx/*", "openvino/*"]
PICKLED = ("*.bin", "*.pt", "*.pkl")
# most models; GPT-2; MPT
POSITION_OPTIONS = ("max_position_embeddings", "n_positions", "max_seq_len")

# What matters of the library's warnings is checked and said here.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def find_folder(
    name: str, *, kind: bundled.Kind, flag: str = "--model", cache_dir: str | None = None
) -> Path:
    """Return the local folder of a model: a bundled name, a folder, or a Hub id, which is
    downloaded first.

    `kind` says which bundled models are meant. Raises UserError, naming `flag`, when there is no
    such model, it can't be reached, or its weights are pickled.
    """
    if bundled.is_bundled(name):
        return bundled.model_folder(name, kind=kind, flag=flag, cache_dir=cache_dir)
    folder = Path(name)
    if folder.is_file():
        raise UserError(f"{flag} {name}: this is a file; name the folder of a saved model")
    if not name or not folder.is_dir():
        if not name or name.startswith((".", "/")) or name.count("/") > 1:
            raise UserError(f"{flag} {name}: no such folder; check the path, or use {bundled.names(kind)}")
        folder = _download(name, kind=kind, flag=flag, cache_dir=cache_dir)
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise UserError(f"{flag} {name}: the folder has no config.json; name the folder of a saved model")
    _refuse_pickles(folder, f"{flag} {name}")
    return folder


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


def _download(name: str, *, kind: bundled.Kind, flag: str, cache_dir: str | None) -> Path:
    """Return the folder of a Hub model's files, downloaded or from the cache."""
    reachable = hub.is_reachable()
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            cache_dir=cache_dir,
            allow_patterns=FILES_READ,
            ignore_patterns=FILES_IGNORED,
            local_files_only=not reachable,
        )
    except huggingface_hub.errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{flag} {name}: no such folder, and the Hub can't be reached; use a local folder or"
            f" {bundled.names(kind)}"
        ) from error
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError) as error:
        raise UserError(
            f"{flag} {name}: neither a local folder nor a model on the Hub that you may read; check the name"
            f" (a private one needs `hf auth login`), or use {bundled.names(kind)}"
        ) from error
    if not reachable:
        hub.say_cached(f"{flag} {name}")
    return Path(folder)


def _refuse_pickles(folder: Path, source: str) -> None:
    """Raise UserError if a folder, or the folder of one of its modules, has pickled weights and no
    safetensors.
    """
    for part in (folder, *_module_folders(folder, source)):
        pickled = sorted(path.name for pattern in PICKLED for path in part.glob(pattern))
        pickled = [file for file in pickled if file != "training_args.bin"]
        if pickled and not any(part.glob("*.safetensors")):
            raise UserError(
                f"{source}: {part / pickled[0]} holds pickled weights, which are never read because they can"
                " run code; use a version with safetensors or convert it first"
            )


def _module_folders(folder: Path, source: str) -> list[Path]:
    """Return the folders that a sentence-transformers model names for its modules."""
    listed = folder / "modules.json"
    if not listed.is_file():
        return []
    try:
        parts = [folder / module["path"] for module in json.loads(listed.read_text("utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{source}: {listed} is not a list of modules; repair it or name another model"
        ) from error
    for part in parts:
        if not part.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{source}: {listed} names a folder outside the model: {part}; name another model"
            )
    return [part for part in parts if part.is_dir()]
