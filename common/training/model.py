"""A classifier and its tokenizer: load them, check that they belong together, save them, load the
saved.
"""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from common import models
from common.errors import UserError
from common.files import replace_folder

UNLIMITED = 1_000_000  # tokenizers without a limit say 1e30
SETTINGS_FILE = "training.json"  # beside the saved model: what it was trained on


def find_folder(name: str, cache_dir: str | None) -> Path:
    """Return the folder of an encoder."""
    return models.find_folder(name, kind="encoder", cache_dir=cache_dir)


def load_tokenizer(name: str, *, cache_dir: str | None):
    """Return the tokenizer of a model, with a padding token, and a note for the screen (""
    mostly).

    The file of all-MiniLM-L6-v2 switches on truncation and padding at 128; both are switched off
    here, and every call says what it wants. Raises UserError when there is no tokenizer, or
    neither a padding nor an end token.
    """
    tokenizer = models.load_tokenizer(find_folder(name, cache_dir), name=name)
    if tokenizer.pad_token is not None:
        return tokenizer, ""
    if tokenizer.eos_token is None:
        raise UserError(
            f"--model {name}: its tokenizer has neither a padding token nor an end token; batches can't be"
            " padded"
        )
    tokenizer.pad_token = tokenizer.eos_token
    return (
        tokenizer,
        f"the tokenizer has no padding token: padding with its end token {tokenizer.eos_token!r}",
    )


def load_classifier(
    name: str, *, names: list[str], dropout: dict[str, float], pad_token_id: int, cache_dir: str | None
):
    """Return a model for the classes `names`, in fp32, with `id2label` and `label2id` in its
    config, and whether its head is new.

    A head of as many classes that the model was saved with stays, as in transformers, whatever
    they were. `dropout` gives values of the config's options for dropout. Raises UserError when
    the model can't be loaded.
    """
    config = load_config(
        name,
        cache_dir=cache_dir,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={label: number for number, label in enumerate(names)},
    )
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id  # decoders look for the last token that is not padding
    config.problem_type = "single_label_classification"
    for option, value in dropout.items():
        setattr(config, option, value)
    model, report = models.load(
        AutoModelForSequenceClassification,
        find_folder(name, cache_dir),
        name=name,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        # else the look for adapters leaves files elsewhere
        adapter_kwargs={"cache_dir": cache_dir},
    )
    return model, bool(report["missing_keys"] or report["mismatched_keys"])


def load_config(name: str, *, cache_dir: str | None, **options):
    """Return a model's config. Raises UserError when it can't be found, reached or read."""
    return models.load(AutoConfig, find_folder(name, cache_dir), name=name, **options)


def load_saved(folder: str, *, cache_dir: str | None):
    """Return a classifier with the head that it was saved with, in fp32. Raises UserError when it
    has none.
    """
    model, report = models.load(
        AutoModelForSequenceClassification,
        find_folder(folder, cache_dir),
        name=folder,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        adapter_kwargs={"cache_dir": cache_dir},
    )
    if report["missing_keys"]:
        raise UserError(
            f"--model {folder}: it was never trained to classify (no weights for"
            f" {', '.join(sorted(report['missing_keys']))}); give the folder runs/<name>/best of a"
            " finished run"
        )
    return model


def choose_max_length(wanted: int | None, default: int, model, tokenizer, *, flag: str) -> int:
    """Return the number of tokens to truncate at: what the user wants, else `default` or what the
    model holds if that is less.

    Raises UserError when more is wanted than the model holds.
    """
    holds = models.max_positions(model) or UNLIMITED
    if wanted is not None and wanted > holds:
        raise UserError(f"{flag} {wanted}: the model holds {holds} tokens; use at most that")
    if wanted is not None and wanted <= tokenizer.num_special_tokens_to_add():
        raise UserError(
            f"{flag} {wanted}: the special tokens alone take {tokenizer.num_special_tokens_to_add()}; use"
            " more"
        )
    return wanted or min(default, holds, tokenizer.model_max_length)


def mismatches(model, tokenizer) -> list[str]:
    """Return what shows that a tokenizer and a model don't belong together, one sentence each;
    empty when nothing does.
    """
    rows, highest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    found = []
    if highest >= rows:
        found.append(
            f"the tokenizer's ids go up to {highest}, but the embedding table has {rows} rows: higher ids"
            " crash the model"
        )
    if tokenizer.pad_token_id is None:
        found.append("the tokenizer has no padding token: texts of different length can't share a batch")
    own_pad = model.config.pad_token_id
    if own_pad is not None and tokenizer.pad_token_id is not None and own_pad != tokenizer.pad_token_id:
        found.append(f"the tokenizer pads with id {tokenizer.pad_token_id}, the model expects {own_pad}")
    return found


def save(model, tokenizer, folder: Path, *, settings: dict):
    """Write model, tokenizer and `training.json` as a plain Hugging Face folder; an older one is
    replaced only by a complete one.

    The tokenizer remembers settings["eval_max_length"] as its limit, so that `pipeline(...,
    truncation=True)` cuts where the scores were taken.
    """
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    tokenizer.model_max_length = settings["eval_max_length"]
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    replace_folder(fresh, folder)


def saved_settings(name: str) -> dict:
    """Return the `training.json` of a saved model, {} for a model that this script did not
    train.
    """
    path = Path(name) / SETTINGS_FILE
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
