"""A sentence-transformers model, read from its folder: its modules, tokenizer and prompts, and a
fingerprint of all that determines its embeddings.

A folder with something that is not known here is read by the library, which takes
seconds to import. Only the classes listed here or those of that library are ever
made, and no code of a folder is run.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from common import bert, model_files, sources, speedups
from common.errors import NotSupported, UserError, note, one_line
from common.files import read_json, read_settings, tensors_sha256
from common.search.pooling import (
    OLDER_MODES,
    POOLING,
    WEIGHTED_MEAN,
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from common.tokenizer import Tokenizer, read_tokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router
    from transformers import PreTrainedTokenizerBase

# settings of a model's configuration that don't change an embedding
NEUTRAL_SETTINGS = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "id2label",
    "label2id",
    "dtype",
    "torch_dtype",
    "problem_type",
)
ROLE_SETTINGS = ("query_length", "document_length", "query_expansion")
# role -> the names under which a model may keep its prompt, as in encode_query and encode_document
PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus"), None: ()}


@dataclass
class SentenceModel:
    """A model on the CPU in fp32, or where its modules were moved to."""

    modules: list[nn.Module]  # Features -> Features, the transformer first; none with `library`
    tokenizer: "Tokenizer | PreTrainedTokenizerBase"  # that of documents
    max_length: int  # the maximum number of tokens that the model was made for, special ones included
    positions: int | None  # the maximum that it can take, None if nothing limits it
    width: int  # of its embeddings
    prompts: dict[str, str]
    default_prompt_name: str | None
    pooling: str  # what follows the transformer, in a few words
    fingerprint: str  # of all that determines its embeddings
    library: "SentenceTransformer | None" = None  # where the modules are no sequence
    reads_padding: bool = False  # whether an embedding depends on how far a text is padded


def load_model(name: str, *, cache_dir: str | None) -> SentenceModel:
    """Return a sentence-transformers model. As in that library, a plain encoder (without
    modules.json) gets mean pooling.

    Raises UserError when it can't be read, or reads something other than texts.
    """
    folder = sources.find_folder(
        name, kind="encoder", flag="--model", cache_dir=cache_dir, organization="sentence-transformers"
    )
    model_files.check_kind(folder, "SentenceTransformer", f"--model {name}")
    try:
        model = read_model(folder)
    except NotSupported:
        model = load_with_library(folder, name)
    if not ((folder / "modules.json").is_file() or is_static(folder)):
        problem = "no sentence encoder (no modules.json)"
        note(f"--model {name}: {problem}: mean pooling, untrained for this")
    return model


@dataclass(frozen=True)
class Family:
    """Models that were trained with prompts before texts; most were saved without them."""

    name: str  # a regular expression
    query: str
    document: str | None = None


# from the models' cards on the Hub
FAMILIES = (
    Family(
        r"e5\b.*-instruct",
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: ",
    ),
    Family(r"(^|[-_])e5[-_](small|base|large)", "query: ", "passage: "),
    Family(r"^bge-(small|base|large)-en", "Represent this sentence for searching relevant passages: "),
    Family(r"^bge-(small|base|large)-zh", "为这个句子生成表示以用于检索相关文章："),
)


def missing_prompts(name: str, model: SentenceModel, given: dict[str, str]) -> str:
    """Return the flags with the prompts that a model of a known family needs and that neither its
    files nor flags (`given`, by role) name; "" where nothing is missing.
    """
    roles = ("query", "document")
    own = {role: any(model.prompts.get(key) for key in PROMPT_NAMES[role]) for role in roles}
    for family in FAMILIES:
        if re.search(family.name, Path(name).name.lower()):
            wanted = {"query": family.query, "document": family.document}
            flags = [
                f"--{role}-prompt {prompt!r}"
                for role, prompt in wanted.items()
                if prompt and role not in given and not own[role]
            ]
            return " ".join(flags)
    return ""


# Read from a folder -----------------------------------------------------------------------------

MODULES = ("Transformer", "StaticEmbedding", "Pooling", "Dense", "Normalize", "LayerNorm")
MODULE_FILES = ("transformer", "static_embedding", "pooling", "dense", "normalize", "layer_norm")
FIRST_MODULES = ("Transformer", "StaticEmbedding")
PACKAGES = (
    "sentence_transformers.models",
    "sentence_transformers.base.modules",
    "sentence_transformers.sentence_transformer.modules",
)
# what a dense layer may have as its activation; each is called without arguments
ACTIVATIONS = (
    *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU"),
    *("LogSigmoid", "Mish", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink"),
    *("Softsign", "Tanh", "Tanhshrink"),
)
# other ways to read texts, or other inputs: left to the library
OTHER_FILES = (
    "adapter_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
PLAIN_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
TEXT_ONLY = {"text": PLAIN_TEXT}
TRANSFORMER_ONLY = {
    "transformer_task": "feature-extraction",
    "modality_config": TEXT_ONLY,
    "module_output_name": "token_embeddings",
}
MODEL_SETTINGS = {  # searches compare by the cosine, whatever `similarity_fn_name` is
    "__version__",
    "default_prompt_name",
    "model_type",
    "prompts",
    "similarity_fn_name",
    "truncate_dim",
}
VERSION = re.compile(r"\d+(\.\d+)*(\.?(dev|rc|a|b|post)\d+)?")
MOST_TOKENS = 2**31 - 1  # of a text, where nothing limits it
SETTINGS_FILES = "sentence_*_config.json"  # of the first module; older names hold the model's type


@dataclass(frozen=True)
class Part:
    """A module of a model."""

    module: nn.Module
    kind: str  # its class
    settings: dict[str, Any]  # as the library would save them
    weights: bert.Tensors  # by the library's names
    width: int | None  # of its output, None: that of its input
    pooling: str  # the same in a word or two, "" for a transformer


@dataclass(frozen=True)
class ModelSettings:
    """What a model says of itself as a whole."""

    prompts: dict[str, str]
    default_prompt_name: str | None = None
    truncate_dim: int | None = None  # the first numbers of an embedding that are kept


NO_PROMPTS = {"query": "", "document": ""}


def read_model(folder: Path) -> SentenceModel:
    """Return the model of a folder. Raises NotSupported when the library is needed to read it, or
    to say what is wrong with it.
    """
    if found := [name for name in OTHER_FILES if (folder / name).exists()]:
        raise NotSupported(", ".join(found))
    if is_static(folder):
        return read_static_model(folder)
    settings, limit, lower_case, listed = ModelSettings(NO_PROMPTS), None, False, None
    if (folder / "modules.json").is_file():
        _, *listed = _read_list(folder)
        limit, lower_case = _read_transformer_settings(folder)
        settings = _read_model_settings(folder)
    transformer, weights = bert.load_encoder(folder)
    config = transformer.config
    tokenizer = read_tokenizer(folder, max_length=limit)
    if limit is None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.num_positions)
    num_tokens = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True)
    if num_tokens <= len(tokenizer.all_special_tokens):
        raise NotSupported("a tokenizer without words")
    if lower_case:
        _lower_case(tokenizer)
    if listed is None:  # a plain encoder
        others = {"1": _pooling({"embedding_dimension": config.width})}
    else:
        others = {name: _read_part(kind, folder / path) for name, kind, path in listed}
    pooling = [part.module for part in others.values() if isinstance(part.module, Pooling)]
    if not pooling:
        raise NotSupported("no pooling")
    only_first = all(part.reads_first_position for part in pooling)
    module = Transformer(transformer, only_first=only_first)
    named = {f"model.{name}": value for name, value in weights.items()}
    first = Part(module, "Transformer", TRANSFORMER_ONLY, named, config.width, "")
    positions = config.num_positions - config.first_position
    return _assembled(first, others, tokenizer, settings, positions=positions, config=_settings(config))


def _assembled(
    first: Part,
    others: dict[str, Part],
    tokenizer: Tokenizer,
    settings: ModelSettings,
    *,
    positions: int | None,
    config: dict[str, Any],
) -> SentenceModel:
    """Return the model of which these are the modules, after trying whether they fit each other."""
    parts = {"0": first, **others}
    width = [part.width for part in parts.values() if part.width is not None][-1]
    assert first.width is not None
    _try_out([part.module for part in others.values()], first.width, width)
    weights = {}
    for name, part in parts.items():
        weights |= {f"{name}.{key}": value for key, value in part.weights.items()}
    kinds = [[part.kind, part.settings] for part in parts.values()]
    prompts, default = settings.prompts, settings.default_prompt_name
    return SentenceModel(
        modules=[part.module.eval().requires_grad_(False) for part in parts.values()],
        tokenizer=tokenizer,
        max_length=tokenizer.model_max_length,
        positions=positions,
        width=min(width, settings.truncate_dim or width),
        prompts=prompts,
        default_prompt_name=default,
        pooling=", ".join(part.pooling for part in parts.values() if part.pooling),
        fingerprint=_digest(_vocabulary(tokenizer), kinds, config, prompts, default, weights),
    )


def is_static(folder: Path) -> bool:
    """Tell whether a model has a fixed vector for each token instead of a transformer: its first
    module is a StaticEmbedding, or, in an older folder, config.json is that of model2vec.
    """
    if (folder / "modules.json").is_file():
        _, kind, _ = _read_list(folder)[0]
        return kind == "StaticEmbedding"
    config = folder / "config.json"
    return config.is_file() and read_settings(config).get("model_type") == "model2vec"


def read_static_model(folder: Path) -> SentenceModel:
    """Return a static model: tokens, their vectors, and the modules that follow, such as a
    normalisation. Raises UserError when its files don't fit each other.
    """
    settings, home, listed = ModelSettings(NO_PROMPTS), folder, []
    if (folder / "modules.json").is_file():
        (_, _, path), *listed = _read_list(folder)
        home = folder / path
        settings = _read_model_settings(folder)
    elif read_settings(folder / "config.json").get("normalize", True):
        listed = [("1", "Normalize", "1_Normalize")]
    tokenizer, vectors = _read_static_tokenizer(home), _read_static_vectors(home)
    if len(vectors) < tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True):
        problem = f"its tokenizer has more tokens than there are vectors ({len(vectors):,})"
        raise UserError(f"{home}: {problem}; repair it or name another model")
    others = {name: _read_part(kind, folder / path) for name, kind, path in listed}
    if any(part.kind == "Pooling" for part in others.values()):
        raise NotSupported("pooling of what is no sequence")
    weights = {"embedding.weight": vectors}
    width = vectors.shape[1]
    first = Part(StaticEmbedding(vectors), "StaticEmbedding", {}, weights, width, "static mean")
    return _assembled(first, others, tokenizer, settings, positions=None, config={})


def _read_static_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a static model, which puts nothing around a text and cuts it only
    where tokenizer.json says so.
    """
    description = read_settings(folder / "tokenizer.json")
    cut = description.get("truncation") or {}
    if cut.get("direction", "Right") != "Right":
        raise NotSupported("truncation at the left")
    try:
        unused = dict.fromkeys(("post_processor", "truncation", "padding"))
        text = json.dumps({**description, **unused})
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise NotSupported(f"{folder / 'tokenizer.json'}: {error}") from error
    return Tokenizer(backend, {}, ["input_ids"], int(cut.get("max_length", MOST_TOKENS)))


def _read_static_vectors(folder: Path) -> torch.Tensor:
    """Return the vector (V, width) of each token in fp32. A model2vec model may share vectors
    between tokens (`mapping`) and weigh them (`weights`).
    """
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
        vectors = tensors["embedding.weight" if "embedding.weight" in tensors else "embeddings"]
        if "mapping" in tensors:
            vectors = vectors[tensors["mapping"].long()]
        vectors = vectors.float()
        if "weights" in tensors:
            vectors = vectors * tensors["weights"].float()[:, None]
    except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
        problem = f"not the vectors of a static model: {one_line(error)}"
        raise UserError(f"{path}: {problem}; repair it") from error
    if vectors.dim() != 2 or not vectors.isfinite().all():
        raise UserError(f"{path}: its vectors are no table of finite numbers; repair it")
    return vectors.contiguous()


def _try_out(modules: list[nn.Module], width: int, said: int) -> None:
    """Raise NotSupported when modules don't fit each other: they look at their input only when they
    run. `width` is that of the tokens' embeddings, `said` what the settings say of the text's.
    """
    tokens, mask = torch.ones(1, 2, width), torch.ones(1, 2).long()
    features = {"token_embeddings": tokens, "attention_mask": mask}
    features["sentence_embedding"] = torch.ones(1, width)  # pooling makes its own
    try:
        for module in modules:
            features = module(features)
    except (KeyError, RuntimeError) as error:
        raise NotSupported(f"modules that don't fit each other: {error}") from error
    if features["sentence_embedding"].shape != (1, said):
        raise NotSupported(f"modules that don't make {said} numbers")


def _read_list(folder: Path) -> list[tuple[str, str, str]]:
    """Return (name, class, path) of the modules."""
    try:
        entries = read_json(folder / "modules.json")
        listed = [(entry["name"], entry["type"], entry["path"]) for entry in entries]
        is_known = not any(set(entry) - {"idx", "name", "path", "type"} for entry in entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotSupported(f"modules.json: {error!r}") from error
    parts = []
    for name, reference, path in listed:
        package, _, kind = str(reference).rpartition(".")
        base, _, file = package.rpartition(".")
        known = package in PACKAGES or (base in PACKAGES and file in MODULE_FILES)
        named = isinstance(name, str) and name and "." not in name
        inside = isinstance(path, str) and not Path(path).is_absolute()
        inside = inside and ".." not in Path(path).parts
        if kind not in MODULES or not (known and named and inside):
            raise NotSupported(f"the module {name!r}, {reference!r} in {path!r}")
        parts.append((name, kind, path))
    names = [name for name, _, _ in parts]
    if not is_known or names[:1] != ["0"] or len(set(names)) < len(names):
        raise NotSupported("modules.json")
    kinds, first_path = [kind for _, kind, _ in parts], parts[0][2]
    if kinds[0] not in FIRST_MODULES or set(FIRST_MODULES) & set(kinds[1:]):
        raise NotSupported(f"the modules {', '.join(kinds)}")
    if kinds[0] == "Transformer" and first_path != "":
        raise NotSupported("a transformer in a folder of its own")
    return parts


def _read_transformer_settings(folder: Path) -> tuple[int | None, bool]:
    """Return the maximum number of tokens of a text, and whether it is put into lower case."""
    files = sorted(path.name for path in folder.glob(SETTINGS_FILES))
    if files and files != ["sentence_bert_config.json"]:
        raise NotSupported(", ".join(files))
    settings = read_settings(folder / files[0]) if files else {}
    for name, value in settings.items():
        known = name in ("max_seq_length", "do_lower_case")
        known = known or (name in ROLE_SETTINGS and value is None)
        if not known and (name not in TRANSFORMER_ONLY or value != TRANSFORMER_ONLY[name]):
            raise NotSupported(f"the transformer's {name} {value!r}")
    if ("modality_config" in settings) != ("module_output_name" in settings):
        raise NotSupported("one of modality_config and module_output_name")
    limit, lower_case = settings.get("max_seq_length"), settings.get("do_lower_case", False)
    if not (limit is None or (type(limit) is int and limit > 0)) or type(lower_case) is not bool:
        raise NotSupported(f"max_seq_length {limit!r}, do_lower_case {lower_case!r}")
    return limit, lower_case


def _read_model_settings(folder: Path) -> ModelSettings:
    """Return what a folder says of its model as a whole."""
    path = folder / "config_sentence_transformers.json"
    settings = read_settings(path) if path.is_file() else {}
    prompts, default = settings.get("prompts", {}), settings.get("default_prompt_name")
    truncate_dim = settings.get("truncate_dim")
    kind = settings.get("model_type", "SentenceTransformer")
    if set(settings) - MODEL_SETTINGS or kind != "SentenceTransformer":
        raise NotSupported(f"{path.name} with {', '.join(settings)}")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise NotSupported(f"the prompts {prompts!r}")
    prompts = NO_PROMPTS | prompts
    version = settings.get("__version__", {})
    if not _is_version(version):
        raise NotSupported(f"__version__ {version!r}")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise NotSupported(f"default_prompt_name {default!r}")
    if truncate_dim is not None and (type(truncate_dim) is not int or truncate_dim < 1):
        raise NotSupported(f"truncate_dim {truncate_dim!r}")
    return ModelSettings(prompts, default, truncate_dim)


def _is_version(versions: Any) -> bool:
    saved = versions.get("sentence_transformers", "1") if isinstance(versions, dict) else None
    return isinstance(saved, str) and VERSION.fullmatch(saved) is not None


def _lower_case(tokenizer: Tokenizer) -> None:
    """Put texts into lower case first, as the library does for every model that asks for it."""
    from tokenizers import normalizers

    normalizer = tokenizer.backend_tokenizer.normalizer
    if isinstance(normalizer, (normalizers.Lowercase, normalizers.Sequence)):
        raise NotSupported("do_lower_case with such a normalizer")
    steps = [normalizers.Lowercase(), *([] if normalizer is None else [normalizer])]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)


def _read_part(kind: str, folder: Path) -> Part:
    path = folder / "config.json"
    settings = read_settings(path) if path.is_file() else {}
    try:
        if kind == "Pooling":
            return _pooling(settings)
        if kind == "Normalize":
            return _normalize(settings)
        return _dense(settings, folder) if kind == "Dense" else _layer_norm(settings, folder)
    except (KeyError, TypeError, RuntimeError) as error:
        raise NotSupported(f"{path}: {error!r}") from error


def _only(settings: dict[str, Any], known: tuple[str, ...]) -> None:
    if unknown := sorted(set(settings) - set(known)):
        raise NotSupported(f"the settings {', '.join(unknown)}")


def _pooling(settings: dict[str, Any]) -> Part:
    own = ("embedding_dimension", "word_embedding_dimension", "pooling_mode", "include_prompt")
    _only(settings, (*own, *OLDER_MODES))
    if len({"embedding_dimension", "word_embedding_dimension"} & set(settings)) != 1:
        raise NotSupported("the width of the pooling")
    width = settings.get("embedding_dimension", settings.get("word_embedding_dimension"))
    modes = settings.get("pooling_mode")
    if "pooling_mode" not in settings:
        modes = [mode for name, mode in OLDER_MODES.items() if settings.get(name)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    include_prompt = settings.get("include_prompt", True)
    if not isinstance(modes, list) or not modes or not set(modes) <= {*POOLING, WEIGHTED_MEAN}:
        raise NotSupported(f"the pooling {modes!r}")
    if type(width) is not int or type(include_prompt) is not bool:
        raise NotSupported(f"pooling of width {width!r}, include_prompt {include_prompt!r}")
    saved = {
        "embedding_dimension": width,
        "pooling_mode": modes[0] if len(modes) == 1 else modes,
        "include_prompt": include_prompt,
    }
    module = Pooling(modes, include_prompt=include_prompt)
    return Part(module, "Pooling", saved, {}, len(modes) * width, "+".join(modes))


def _names(settings: dict[str, Any]) -> tuple[str, str]:
    """Return the names of the feature that a module reads, and of the one that it writes."""
    source = settings.get("module_input_name", "sentence_embedding")
    target = settings.get("module_output_name")
    names = (source, source if target is None else target)
    if not set(names) <= {"sentence_embedding", "token_embeddings"}:
        raise NotSupported(f"the features {names}")
    return names


def _normalize(settings: dict[str, Any]) -> Part:
    _only(settings, ("module_input_name", "module_output_name"))
    source, target = _names(settings)
    saved = {"module_input_name": source, "module_output_name": target}
    return Part(Normalize((source, target)), "Normalize", saved, {}, None, "Normalize")


def _dense(settings: dict[str, Any], folder: Path) -> Part:
    shape = ("in_features", "out_features", "bias", "use_residual")
    _only(settings, (*shape, "activation_function", "module_input_name", "module_output_name"))
    source, target = _names(settings)
    activation = _activation(settings.get("activation_function", "torch.nn.Tanh"))
    weights = bert.read_weights(folder)
    in_features, out_features = settings["in_features"], settings["out_features"]
    has_bias, has_residual = settings.get("bias", True), settings.get("use_residual", False)
    residual = None
    if has_residual:
        same_width = in_features == out_features
        residual = nn.Identity() if same_width else nn.Linear(in_features, out_features, bias=False)
    linear = nn.Linear(in_features, out_features, bias=has_bias)
    module = Dense(linear, activation, residual, (source, target))
    module.load_state_dict(weights, strict=True)
    saved = {
        "in_features": in_features,
        "out_features": out_features,
        "bias": has_bias,
        "activation_function": f"{type(activation).__module__}.{type(activation).__name__}",
        "module_input_name": source,
        "module_output_name": target,
        **({"use_residual": True} if has_residual else {}),  # saved only where it is set
    }
    return Part(module, "Dense", saved, weights, out_features, "Dense")


def _activation(reference: str) -> nn.Module:
    package, _, name = reference.rpartition(".")
    if name == "Identity" and package in ("torch.nn", "torch.nn.modules.linear"):
        return nn.Identity()
    if name not in ACTIVATIONS or package not in ("torch.nn", "torch.nn.modules.activation"):
        raise NotSupported(f"the activation {reference}")
    return getattr(nn, name)()


def _layer_norm(settings: dict[str, Any], folder: Path) -> Part:
    _only(settings, ("dimension",))
    weights, width = bert.read_weights(folder), settings["dimension"]
    module = LayerNorm(nn.LayerNorm(width))
    module.load_state_dict(weights, strict=True)
    return Part(module, "LayerNorm", {"dimension": width}, weights, width, "LayerNorm")


# Read by the library ----------------------------------------------------------------------------


def load_with_library(folder: Path, name: str) -> SentenceModel:
    """Return the model of a folder, read by sentence-transformers. Raises UserError when it can't
    be read, or reads something other than texts.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer import modules

    from common import models

    model = models.load_sentence_model(SentenceTransformer, folder, name=name)
    first, readers = model[0], (modules.Transformer, Router, modules.StaticEmbedding)
    if not isinstance(first, readers) or "text" not in first.modalities:
        kind = type(first).__name__
        problem = f"its first module is {kind}, not a transformer that reads texts"
        raise UserError(f"--model {name}: {problem}")
    kinds = {type(part) for part in model.modules()}
    reads_padding = modules.CNN in kinds  # it looks at the neighbours of each token
    is_transformer = isinstance(first, modules.Transformer)
    # a Router may come later too, with a layer for each role
    if Router in kinds or not is_transformer or first.modality_config.get("text") != PLAIN_TEXT:
        return _opaque(model, name, reads_padding=reads_padding)
    for setting in ROLE_SETTINGS:
        if getattr(first, setting, None) is not None:
            problem = f"its first module sets {setting}, which is unsupported"
            advice = "use another model, or remove it from a copy of sentence_bert_config.json"
            raise UserError(f"--model {name}: {problem}; {advice}")
    tokenizer, width = first.tokenizer, model.get_embedding_dimension()
    assert tokenizer is not None and not isinstance(tokenizer, tokenizers.Tokenizer) and width is not None
    models.check_tokenizer(tokenizer, name=name, flag="--model")
    known_by = fingerprint(model)  # before fast attention changes the model
    speedups.use_fast_attention(first.auto_model)
    return SentenceModel(
        modules=[module.eval() for module in model],
        tokenizer=tokenizer,
        max_length=min(model.max_seq_length or tokenizer.model_max_length, MOST_TOKENS),
        positions=models.max_positions(first.auto_model),
        width=width,
        prompts=model.prompts,
        default_prompt_name=model.default_prompt_name,
        pooling=describe_pooling(model),
        fingerprint=known_by,
        reads_padding=reads_padding,
    )


def _opaque(model: "SentenceTransformer", name: str, *, reads_padding: bool) -> SentenceModel:
    """Return a model that the library computes as a whole: with a Router, which has modules for
    queries and others for documents, or CLIP, of which texts take a part.
    """
    from common import models

    parts: Iterable[Any] = model.modules()
    for part in parts:
        if hasattr(part, "sub_modules"):
            _check_routes(part, name)
        if hasattr(part, "auto_model") and (positions := models.max_positions(part.auto_model)):
            # the library reads max_position_embeddings: of RoBERTa two more than there are for tokens
            part.max_seq_length = min(part.max_seq_length or positions, positions)
    part: Any = model[0]
    while hasattr(part, "sub_modules"):
        part = part.sub_modules[part._resolve_route("document", "text")][0]
    tokenizer, width = part.tokenizer, model.get_embedding_dimension()
    assert tokenizer is not None and width is not None
    max_length = int(min(part.max_seq_length or MOST_TOKENS, MOST_TOKENS))
    if isinstance(tokenizer, tokenizers.Tokenizer):
        tokenizer = Tokenizer(
            tokenizers.Tokenizer.from_str(tokenizer.to_str()), {}, ["input_ids"], MOST_TOKENS
        )
        tokenizer.backend_tokenizer.post_processor = None
    else:
        models.check_tokenizer(tokenizer, name=name, flag="--model")
    return SentenceModel(
        modules=[],
        tokenizer=tokenizer,
        max_length=max_length,
        positions=None if max_length == MOST_TOKENS else max_length,  # another part may have no more
        width=width,
        prompts={key: prompt or "" for key, prompt in model.prompts.items()},
        default_prompt_name=model.default_prompt_name,
        pooling=", ".join(type(module).__name__ for module in model),
        fingerprint=_opaque_fingerprint(model),
        library=model,
        reads_padding=reads_padding,
    )


def _check_routes(router: "Router", name: str) -> None:
    """Raise UserError unless a Router has a route for queries and one for documents."""
    for task in ("query", "document"):
        try:
            router._resolve_route(task, "text")
        except ValueError as error:
            problem = f"its Router has no route for {task!r}, only for {', '.join(router.sub_modules)}"
            advice = "rename one in a copy of router_config.json, or name another model"
            raise UserError(f"--model {name}: {problem}; {advice}") from error


def _opaque_fingerprint(model: "SentenceTransformer") -> str:
    """Return the fingerprint of a model that the library computes."""
    settings, vocabularies, configs = [], {}, {}
    named: Iterable[tuple[str, Any]] = model.named_modules()
    for name, module in named:
        if hasattr(module, "get_config_dict"):
            values = module.get_config_dict()
            values = {key: values[key] for key in values if key != "max_seq_length"}
            settings.append([name, type(module).__name__, str(sorted(values.items(), key=str))])
        if hasattr(module, "auto_model"):
            changed = module.auto_model.config.to_diff_dict()
            configs[name] = {key: changed[key] for key in changed if key not in NEUTRAL_SETTINGS}
        tokenizer = getattr(module, "tokenizer", None)
        if isinstance(tokenizer, tokenizers.Tokenizer):
            vocabularies[name] = tokenizer.to_str()
        elif tokenizer is not None:
            vocabularies[name] = _vocabulary(tokenizer)
    prompts: Any = model.prompts
    return _digest(vocabularies, settings, configs, prompts, model.default_prompt_name, model.state_dict())


def describe_pooling(model: "SentenceTransformer") -> str:
    """Return in a few words what follows a model's transformer, such as "mean, Normalize"."""
    parts = []
    for module in list(model)[1:]:
        mode = getattr(module, "pooling_mode", type(module).__name__)
        parts.append(mode if isinstance(mode, str) else "+".join(mode))
    return ", ".join(parts) or "none"


# The fingerprint --------------------------------------------------------------------------------


def fingerprint(model: Any) -> str:
    """Return the SHA-256 of all that determines a SentenceTransformer's embeddings: weights,
    configuration, tokenizer, its modules' settings and its prompts.

    It does not cover the length at which texts are cut, the precision, and what doesn't change an
    embedding (names, paths, versions).
    """
    settings = []
    for module in model:
        values = {**module.get_config_dict()}
        values.pop("max_seq_length", None)
        settings.append([type(module).__name__, values])
    # only what differs from the defaults, because later versions of transformers have more settings
    changed = model[0].auto_model.config.to_diff_dict()
    config = {key: value for key, value in changed.items() if key not in NEUTRAL_SETTINGS}
    prompts = (model.prompts, model.default_prompt_name)
    return _digest(_vocabulary(model[0].tokenizer), settings, config, *prompts, model.state_dict())


def _settings(config: bert.BertConfig) -> dict[str, Any]:
    """Return a model's configuration as the library would have it in a fingerprint."""
    settings = {key: value for key, value in config.settings.items() if key not in NEUTRAL_SETTINGS}
    if "use_cache" in settings:  # which the library switches off
        settings["use_cache"] = False
    return {key: value for key, value in settings.items() if key not in bert.COMMON}


def _vocabulary(tokenizer: "Tokenizer | PreTrainedTokenizerBase") -> Any:
    if not tokenizer.is_fast:
        return sorted(tokenizer.get_vocab().items())
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    return {**vocabulary, "truncation": None, "padding": None}  # every call sets these again


def _digest(
    vocabulary: Any,
    settings: list,
    config: dict[str, Any],
    prompts: dict[str, str],
    default_prompt_name: str | None,
    weights: bert.Tensors,
) -> str:
    sha256 = tensors_sha256(dict(sorted(weights.items())))
    parts = [vocabulary, settings, config, prompts, default_prompt_name, sha256]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
