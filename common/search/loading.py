"""A sentence-transformers model or a cross-encoder: found, checked to be safe, loaded.

Weights are read from safetensors only and no code comes with a model: its modules must be
sentence-transformers' own.
"""

import hashlib
import json

import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from common import models, speedups
from common.errors import UserError
from common.files import tensors_sha256

# of a model on the Hub; no pickles, no ONNX, no code
IDLE_SETTINGS = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "id2label",
    "label2id",
    "dtype",
    "torch_dtype",
    "problem_type",
)

# what matters of its warnings is checked and said here
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load_embedder(name: str, *, cache_dir: str | None) -> SentenceTransformer:
    """Return a sentence-transformers model on the CPU in fp32; a plain encoder without
    modules.json gets mean pooling, as there.

    Raises UserError when it can't be read, or takes something else than texts.
    """
    model = _load(SentenceTransformer, name, flag="--model", cache_dir=cache_dir)
    if not isinstance(model[0], Transformer) or "text" not in model[0].modality_config:
        raise UserError(
            f"--model {name}: its first module is {type(model[0]).__name__}; only transformers that read"
            " texts can be used"
        )
    for setting in ("query_length", "document_length", "query_expansion"):
        if getattr(model[0], setting, None) is not None:
            raise UserError(
                f"--model {name}: its first module sets {setting}, which this script does not follow; use"
                " another model, or take the setting out of a copy of sentence_bert_config.json"
            )
    tokenizer = model[0].tokenizer
    models.check_tokenizer(tokenizer, name=name)
    return model


def load_reranker(name: str, *, cache_dir: str | None, device: torch.device) -> CrossEncoder:
    """Return a cross-encoder with one output on its device. Raises UserError when it can't be
    read, or gives several scores a pair.
    """
    model = _load(CrossEncoder, name, flag="--rerank", cache_dir=cache_dir).to(device)
    if model.num_labels != 1:
        raise UserError(
            f"--rerank {name}: it gives {model.num_labels} scores a pair; name a cross-encoder with one, such"
            " as cross-encoder/ms-marco-MiniLM-L6-v2"
        )
    speedups.use_fast_attention(model[0].auto_model)
    return model


def _load(model_class, name: str, *, flag: str, cache_dir: str | None):
    folder = models.find_folder(name, kind="encoder", flag=flag, cache_dir=cache_dir)
    with models.load_errors(name, flag=flag):
        return model_class(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )


def fingerprint(model: SentenceTransformer) -> str:
    """Return the SHA-256 of all that makes a model's vectors: weights, configuration, tokenizer,
    its modules' settings and its prompts.

    The length at which texts are cut, the precision, and what doesn't change a vector (names,
    paths, versions) are no part of it.
    """
    tokenizer = model[0].tokenizer
    words = (
        json.loads(tokenizer.backend_tokenizer.to_str())
        if tokenizer.is_fast
        else sorted(tokenizer.get_vocab().items())
    )
    if tokenizer.is_fast:
        words.update(truncation=None, padding=None)  # every call sets these anew
    settings = [
        [
            type(module).__name__,
            {key: value for key, value in module.get_config_dict().items() if key != "max_seq_length"},
        ]
        for module in model
    ]
    # from the defaults: a later version of transformers may know more settings
    changed = model[0].auto_model.config.to_diff_dict()
    config = {key: value for key, value in changed.items() if key not in IDLE_SETTINGS}
    weights = tensors_sha256(dict(sorted(model.state_dict().items())))
    parts = [words, settings, config, model.prompts, model.default_prompt_name, weights]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def describe_pooling(model: SentenceTransformer) -> str:
    """Return in a few words what follows a model's transformer, such as "mean, Normalize"."""
    parts = []
    for module in list(model)[1:]:
        mode = module.pooling_mode if isinstance(module, Pooling) else type(module).__name__
        parts.append(mode if isinstance(mode, str) else "+".join(mode))
    return ", ".join(parts) or "none"
