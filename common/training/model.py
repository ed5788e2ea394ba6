"""A classifier and its tokenizer: load them, check that they belong together, save them, load the saved."""

import json
import shutil
from pathlib import Path

import huggingface_hub.errors
import safetensors
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from common import assets, hub
from common.errors import UserError, one_line
from common.training.durable import replace_folder

UNLIMITED = 1_000_000  # tokenizers without a limit say 1e30
SETTINGS_FILE = "training.json"  # beside the saved model: what it was trained on

transformers.utils.logging.set_verbosity_error()  # what matters of its warnings is checked and said here
transformers.utils.logging.disable_progress_bar()


def locate(name: str) -> str:
    """Return what `from_pretrained` takes for a bundled name, a local folder or a Hub id. Raises UserError for a missing folder."""
    if assets.is_bundled(name):
        return str(assets.model_folder(name))
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"--model {name}: the folder has no config.json; a saved model is in runs/<name>/best")
    if not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise UserError(f"--model {name}: no such folder; check the path")
    return name


def load_pretrained(auto_class, name: str, **options):
    """Call `auto_class.from_pretrained`; weights must be safetensors, and no remote code runs.

    Raises UserError when the model can't be found, reached or read.
    """
    location = locate(name)
    reachable = Path(location).is_dir() or hub.is_reachable()
    try:
        loaded = auto_class.from_pretrained(location, **options)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError, safetensors.SafetensorError) as error:
        if isinstance(error, ValueError) and not any(known in str(error) for known in ("trust_remote_code", "model_type", "backend tokenizer")):
            raise
        raise UserError(f"--model {name}: {explain(error, reachable)}") from error
    if not reachable:
        hub.say_cached(f"--model {name}")
    return loaded


def explain(error: Exception, reachable: bool) -> str:
    """Return in one line why a model can't be loaded, and the way out."""
    if not reachable:
        return f"the Hub can't be reached; use a local folder or a bundled model: {one_line(error)}"
    if isinstance(error.__cause__, huggingface_hub.errors.RepositoryNotFoundError):
        return ("neither a local folder nor a model on the Hub that you may read; check the name (a private one needs `hf auth login`), "
                f"or use {', '.join(assets.MODELS)}")
    if "file named model.safetensors" in str(error):
        return ("it has no model.safetensors, and pickled weights (pytorch_model.bin) are never read, for they can run code; "
                "use a version of it with safetensors, or convert it first")
    return f"{one_line(error).rstrip('.')}; mend its files or name another model"


def load_tokenizer(name: str, *, cache_dir: str | None):
    """Return the tokenizer of a model, with a padding token, and a note for the screen ("" mostly).

    The file of all-MiniLM-L6-v2 switches on truncation and padding at 128; both are switched off here, and every call says what it wants.
    Raises UserError when there is no tokenizer, or neither a padding nor an end token.
    """
    tokenizer = load_pretrained(AutoTokenizer, name, cache_dir=cache_dir)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes up when the files are not there
        raise UserError(f"--model {name}: it has no tokenizer, or one without words; copy the files of its tokenizer into the folder")
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    if tokenizer.pad_token is not None:
        return tokenizer, ""
    if tokenizer.eos_token is None:
        raise UserError(f"--model {name}: its tokenizer has neither a padding token nor an end token; batches can't be padded")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, f"the tokenizer has no padding token: padding with its end token {tokenizer.eos_token!r}"


def load_classifier(name: str, *, names: list[str], dropout: dict[str, float], pad_token_id: int, cache_dir: str | None):
    """Return a model with a new head for the classes `names`, in fp32, with `id2label` and `label2id` in its config.

    `dropout` gives values of the config's options for dropout. Raises UserError when the model can't be loaded.
    """
    config = load_config(name, cache_dir=cache_dir, num_labels=len(names),
                         id2label=dict(enumerate(names)), label2id={label: number for number, label in enumerate(names)})
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id  # decoders look for the last token that is not padding
    config.problem_type = "single_label_classification"
    for option, value in dropout.items():
        setattr(config, option, value)
    return load_pretrained(AutoModelForSequenceClassification, name, cache_dir=cache_dir, config=config, dtype=torch.float32,
                           use_safetensors=True, ignore_mismatched_sizes=True, adapter_kwargs={"cache_dir": cache_dir})  # else the look for adapters leaves files elsewhere


def load_config(name: str, *, cache_dir: str | None, **options):
    """Return a model's config. Raises UserError when it can't be found, reached or read."""
    return load_pretrained(AutoConfig, name, cache_dir=cache_dir, **options)


def load_saved(folder: str, *, cache_dir: str | None):
    """Return a classifier with the head that it was saved with, in fp32. Raises UserError when it has none."""
    model, report = load_pretrained(AutoModelForSequenceClassification, folder, cache_dir=cache_dir, dtype=torch.float32,
                                    use_safetensors=True, output_loading_info=True, adapter_kwargs={"cache_dir": cache_dir})
    if report["missing_keys"]:
        raise UserError(f"--model {folder}: it was never trained to classify (no weights for {', '.join(sorted(report['missing_keys']))}); "
                        "give the folder runs/<name>/best of a finished run")
    return model


def max_positions(model: torch.nn.Module) -> int | None:
    """Return the most tokens that a model takes at once, None if nothing limits it.

    RoBERTa and its kin number positions from the padding id + 1, so that 514 embeddings hold 512 tokens.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    for option in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(model.config, option, None), int):
            return getattr(model.config, option)
    return None


def choose_max_length(wanted: int | None, default: int, model, tokenizer, *, flag: str) -> int:
    """Return the number of tokens to truncate at: what the user wants, else `default` or what the model holds if that is less.

    Raises UserError when more is wanted than the model holds.
    """
    holds = max_positions(model) or UNLIMITED
    if wanted is not None and wanted > holds:
        raise UserError(f"{flag} {wanted}: the model holds {holds} tokens; use at most that")
    if wanted is not None and wanted <= tokenizer.num_special_tokens_to_add():
        raise UserError(f"{flag} {wanted}: the special tokens alone take {tokenizer.num_special_tokens_to_add()}; use more")
    return wanted or min(default, holds, tokenizer.model_max_length)


def mismatches(model, tokenizer) -> list[str]:
    """Return what shows that a tokenizer and a model don't belong together, one sentence each; empty when nothing does."""
    rows, highest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    found = []
    if highest >= rows:
        found.append(f"the tokenizer's ids go up to {highest}, but the embedding table has {rows} rows: higher ids crash the model")
    if tokenizer.pad_token_id is None:
        found.append("the tokenizer has no padding token: texts of different length can't share a batch")
    own_pad = model.config.pad_token_id
    if own_pad is not None and tokenizer.pad_token_id is not None and own_pad != tokenizer.pad_token_id:
        found.append(f"the tokenizer pads with id {tokenizer.pad_token_id}, the model expects {own_pad}")
    return found


def save(model, tokenizer, folder: Path, *, settings: dict):
    """Write model, tokenizer and `training.json` as a plain Hugging Face folder; an older one is replaced only by a complete one.

    The tokenizer remembers settings["eval_max_length"] as its limit, so that `pipeline(..., truncation=True)` cuts where the scores were taken.
    """
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    tokenizer.model_max_length = settings["eval_max_length"]
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    replace_folder(fresh, folder)


def saved_settings(name: str) -> dict:
    """Return the `training.json` of a saved model, {} for a model that this script did not train."""
    path = Path(name) / SETTINGS_FILE
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
