"""What the files of a model folder hold, checked before a library reads them and without PyTorch.

A folder that someone else made can name files outside of itself, ask for more memory than any
machine has, or hold a pipe in the place of a file. What a library would open, allocate or build is
compared here with what is there: config.json with the shapes in the weights.
"""

import fnmatch
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

from common.errors import UserError, shorten

TEMPLATES = "additional_chat_templates"  # a folder of files in Jinja, beside chat_template.jinja
CONFIG, MODULES = "config.json", "modules.json"
SENTENCE_CONFIG = "config_sentence_transformers.json"
ROUTES = "router_config.json"
WEIGHTS, SHARD_LIST = "model.safetensors", "model.safetensors.index.json"
SENTENCE_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# pickled weights that are read once and converted, their shards, and pickles that are never read
PICKLE, PICKLED_LIST = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLED_FILES = (PICKLE, "pytorch_model-*.bin")
PICKLED = ("*.bin", "*.pt", "*.pkl")
# a LoRA adapter, as peft writes it
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
NOT_WEIGHTS = ("training_args.bin",)
WITHOUT_WEIGHTS = ("Pooling", "Normalize", "Dropout")  # modules of sentence-transformers
# the JSON files that are read here, and what each holds; tokenizer.json is left to `tokenizers`
JSON_TYPES: dict[str, type] = {
    CONFIG: dict,
    MODULES: list,
    SHARD_LIST: dict,
    PICKLED_LIST: dict,
    "generation_config.json": dict,
    "tokenizer_config.json": dict,
    "special_tokens_map.json": dict,
    "added_tokens.json": dict,
    "vocab.json": dict,
    SENTENCE_CONFIG: dict,
    ROUTES: dict,
    **dict.fromkeys(SENTENCE_SETTINGS, dict),
    "processor_config.json": dict,
    "preprocessor_config.json": dict,
    "training.json": dict,
    ADAPTER_CONFIG: dict,
}
WEIGHT_FILES = ("*.safetensors", *PICKLED_FILES, ADAPTER_PICKLE)
OTHER_FILES = (*WEIGHT_FILES, "*.model", "*.jinja", "tokenizer.json", "vocab.txt", "merges.txt")
# settings that make transformers read other files than those that are checked here: (file, setting)
REDIRECTIONS = (
    (CONFIG, "configuration_files"),
    (CONFIG, "transformers_weights"),
    ("tokenizer_config.json", "fast_tokenizer_files"),
    ("tokenizer_config.json", "init_inputs"),
    *((file, "tokenizer_name_or_path") for file in SENTENCE_SETTINGS),
)
# settings that count modules, such as num_hidden_layers, which Python builds one by one
PARTS = re.compile(r"(layers?|depths?|blocks?|block_sizes|block_repeats|groups|group_num)$")
EXPERTS = re.compile(r"experts?$")  # lie one by one or in one tensor
LABELS = ("num_labels", "_num_labels")
# what sentence-transformers imports by its name and calls, and the names that are harmless
ACTIVATION_SETTINGS = ("activation_fn", "activation_function", "sbert_ce_default_activation_function")
ACTIVATIONS = re.compile(
    r"torch\.nn\.(modules\.(linear|activation)\.)?"
    r"(Identity|Sigmoid|LogSigmoid|Softplus|Softmax|Tanh|ReLU|GELU|SiLU|LeakyReLU|ELU)"
)
RANKING = "ForSequenceClassification"  # the end of a cross-encoder's class in transformers
MODEL_KINDS = {  # what sentence-transformers calls a kind of model
    "SentenceTransformer": "a sentence encoder",
    "CrossEncoder": "a cross-encoder",
    "SparseEncoder": "a sparse encoder",
    "MultiVectorEncoder": "an encoder of several vectors per text",
}
SIZES = ("in_features", "out_features")  # of sentence-transformers' dense modules
LENGTHS = (
    ("tokenizer_config.json", "model_max_length"),  # 1e30 for "no limit"
    *((file, "max_seq_length") for file in SENTENCE_SETTINGS),
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
MOST_TOKENS = 2**31
FEWEST_PARTS, FEWEST_LABELS = 256, 100_000  # that are allowed whatever the weights hold
MOST_TEXT_BYTES = 200_000_000  # the largest tokenizer.json today has 35 MB
MOST_JSON_BYTES = 50_000_000
MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors itself

Shapes = dict[str, tuple[int, ...]]  # of tensors


def check(folder: Path, source: str) -> None:
    """Raise UserError, beginning with `source`, unless a folder holds a model whose files can be
    opened without a risk.

    Refused are: files that are missing, no files, unreadable or outside the folder; pickled
    weights, but for those that `common/pickled_weights.py` converts; adapters, which need a model from
    elsewhere; JSON that is broken or of another type; a config.json that asks for more parts than
    the weights have.
    """
    try:
        if not (folder / CONFIG).is_file() and not (folder / MODULES).is_file():
            _check_files(folder, folder, source)  # a link that leads nowhere is no missing file
            raise _refuse(source, f"the folder has no {CONFIG}", "name the folder of a saved model")
        if (templates := folder / TEMPLATES).is_dir():
            _check_files(templates, folder, source)
        for part in (folder, *module_folders(folder, source)):
            _check_files(part, folder, source)
            _check_part(part, source)
    except OSError as error:
        raise _refuse(source, f"{error.filename or folder} can't be read: {error.strerror}") from error


def check_adapter(folder: Path, source: str) -> None:
    """Raise UserError, beginning with `source`, unless a folder holds a LoRA adapter whose files
    can be opened without a risk.
    """
    path = folder / ADAPTER_CONFIG
    try:
        _check_files(folder, folder, source)
        if not path.is_file():
            problem = f"the folder has no {ADAPTER_CONFIG}"
            raise _refuse(source, problem, "name the folder of a LoRA adapter, as peft writes it")
        if (kind := read_json(path, source).get("peft_type")) != "LORA":
            problem = f"{path}: its peft_type is {kind!r:.60}, and only LoRA is merged here"
            raise _refuse(source, problem, "name another adapter")
        if not (folder / ADAPTER_WEIGHTS).exists() and not (folder / ADAPTER_PICKLE).exists():
            problem = f"the folder has neither {ADAPTER_WEIGHTS} nor {ADAPTER_PICKLE}"
            raise _refuse(source, problem, "copy the whole adapter")
    except OSError as error:
        problem = f"{error.filename or folder} can't be read: {error.strerror}"
        raise _refuse(source, problem, "repair it or name another adapter") from error


def _refuse(source: str, problem: str, advice: str = "repair it or name another model") -> UserError:
    return UserError(f"{source}: {problem}; {advice}")


# Files --------------------------------------------------------------------------------------------


def _check_files(folder: Path, root: Path, source: str) -> None:
    """Raise UserError unless everything that a library may open in a folder is a file within the
    model `root`, with permission to read it.
    """
    # not Path.glob, which leaves out links that lead nowhere
    for path in sorted(folder.iterdir()):
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in (*JSON_TYPES, *OTHER_FILES)):
            continue
        try:
            status = path.stat()
        except FileNotFoundError:
            target = os.readlink(path)
            raise _refuse(source, f"{path} is a link to {target}, which does not exist") from None
        if not stat.S_ISREG(status.st_mode):
            raise _refuse(source, f"{path} is not a file")
        if not os.access(path, os.R_OK):
            raise _refuse(source, f"no permission to read {path}", "change that with chmod")
        # Weights may lie elsewhere, to save space. Whatever else a link brings in could be taken
        # for the words of a tokenizer, and be saved and published with it.
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in WEIGHT_FILES):
            if not path.resolve().is_relative_to(_home(root)):
                problem = f"{path} is a link out of the folder, to {path.resolve()}"
                raise _refuse(source, problem, "replace it by the file itself, if you trust it")
            if status.st_size > MOST_TEXT_BYTES:
                size = f"{status.st_size:,} bytes"
                raise _refuse(source, f"{path} has {size}, more than any model needs")


def _home(root: Path) -> Path:
    """Return the folder that a model's links may not leave: itself, or its repository in the Hub's
    cache, where they lead from snapshots/ to blobs/.
    """
    resolved = root.resolve()
    return resolved.parent.parent if resolved.parent.name == "snapshots" else resolved


def module_folders(folder: Path, source: str) -> list[Path]:
    """Return the folders that a sentence-transformers model names for its modules."""
    listed = folder / MODULES
    if not listed.exists():
        return []
    _check_files(folder, folder, source)
    try:
        parts = [folder / module["path"] for module in read_json(listed, source)]
    except (KeyError, TypeError) as error:
        raise _refuse(source, f"{listed} is not a list of modules") from error
    parts += [inner for part in parts for inner in _routed_folders(part, source)]
    for part in parts:
        if not part.resolve().is_relative_to(folder.resolve()):
            problem = f"{listed} names a folder outside the model: {part}"
            raise _refuse(source, problem, "name another model")
    return [part for part in parts if part.is_dir() and part.resolve() != folder.resolve()]


def _routed_folders(folder: Path, source: str) -> list[Path]:
    """Return the folders of the parts that a Router names, such as one for queries and one for
    documents. Raises UserError when it names code of another package.
    """
    for name in (ROUTES, CONFIG):  # where newer and older versions keep them
        types = read_json(folder / name, source).get("types") if (folder / name).is_file() else None
        if types is None:
            continue
        if not isinstance(types, dict) or not all(isinstance(kind, str) for kind in types.values()):
            raise _refuse(source, f"{folder / name}: types is no table of modules")
        for kind in types.values():
            if not kind.startswith("sentence_transformers."):
                problem = f"{folder / name} asks for code by its name ({shorten(kind, 80)})"
                raise _refuse(source, problem, "name another model")
        return [folder / part for part in types]
    return []


def _check_part(folder: Path, source: str) -> None:
    """Raise UserError for pickled weights, adapters, broken JSON and settings that ask for more
    than there is, in the folder of a model or of one of its modules.
    """
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    pickled = [file for file in pickled if file not in NOT_WEIGHTS]
    if not pickled_files(folder, source) and pickled and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{source}: {folder / pickled[0]} holds pickled weights, which can run code and are"
            f" read under the name {PICKLE} only; use a version with safetensors"
        )
    if os.path.lexists(folder / ADAPTER_CONFIG):
        advice = "merge them into it first (merge_and_unload of peft) and name that folder"
        problem = f"{folder} holds adapters for another model ({ADAPTER_CONFIG})"
        raise _refuse(source, problem, advice)
    if any(folder.glob("shard-*-model-*.safetensors")):
        problem = f"{folder} holds the pieces of a distributed checkpoint (shard-*)"
        raise _refuse(source, problem, f"save it as one {WEIGHTS}")
    present = [name for name in JSON_TYPES if (folder / name).exists()]
    content = {name: read_json(folder / name, source) for name in present}
    for file, setting in REDIRECTIONS:
        if value := content.get(file, {}).get(setting):
            named = shorten(repr(value), 80)
            problem = f"{folder / file}: {setting} names other files to read ({named})"
            raise _refuse(source, problem, "remove the setting or name another model")
    for file in (CONFIG, SENTENCE_CONFIG, *SENTENCE_SETTINGS):
        for name, value in _settings(content.get(file, {})):
            _check_code(name, value, folder / file, source)
    _check_numbers(content, folder, source)
    if CONFIG in content:
        check_config(content[CONFIG], folder, source)


def _check_numbers(content: dict[str, Any], folder: Path, source: str) -> None:
    """Raise UserError for the id of a token, or a length, that is none."""
    for file in (CONFIG, "generation_config.json"):
        for name, value in _settings(content.get(file, {})):
            is_id = value is None or (isinstance(value, int) and -1 <= value < MOST_TOKENS)
            if name in TOKEN_IDS and (not is_id or isinstance(value, bool)):
                problem = f"{name} is {value!r:.80}, not the number of a token"
                raise _refuse(source, f"{folder / file}: {problem}")
    for file, setting in LENGTHS:
        length = content.get(file, {}).get(setting)
        is_length = length is None or (isinstance(length, int | float) and length >= 1)
        if not is_length or isinstance(length, bool):
            problem = f"{setting} is {length!r:.80}, not a number of tokens"
            raise _refuse(source, f"{folder / file}: {problem}")


def _check_code(name: str, value: Any, path: Path, source: str) -> None:
    """Raise UserError for a setting that makes a library import, or download, code by its name."""
    if not isinstance(value, str):
        return
    is_code = name in ACTIVATION_SETTINGS and "." in value and not ACTIVATIONS.fullmatch(value)
    is_method = name == "method" and path.name in SENTENCE_SETTINGS  # of the transformer
    is_code = is_code or (is_method and not re.fullmatch(r"forward|get_\w+_features", value))
    is_implementation = name.endswith(("attn_implementation", "experts_implementation"))
    is_code = is_code or (is_implementation and "/" in value)
    if is_code:
        problem = f"{path} asks for code by its name ({name}: {shorten(value, 80)})"
        raise _refuse(source, problem, "remove the setting or name another model")


def check_kind(folder: Path, wanted: str, source: str) -> None:
    """Raise UserError for a model of another kind than `wanted`, the name of its class in
    sentence-transformers.

    That library would "convert" it: drop its last modules and put new ones in their place, or take
    a language model's "yes" and "no" for scores.
    """
    if not (folder / MODULES).exists():
        config = read_json(folder / CONFIG, source)
        kinds = config.get("architectures") or []
        count = config.get("num_labels") if config.get("id2label") is None else len(config["id2label"])
        gives_one_score = bool(kinds) and kinds[0].endswith(RANKING) and count == 1
        if wanted == "SentenceTransformer" and gives_one_score:
            problem = f"it is a cross-encoder (a {kinds[0]} with one label) and makes no embeddings"
            raise _refuse(source, problem, "name a sentence encoder, and this one with --rerank")
        if wanted == "CrossEncoder" and kinds and not any(kind.endswith(RANKING) for kind in kinds):
            problem = f"it was never trained to rank (it was saved as {', '.join(kinds)})"
            advice = "name a cross-encoder, such as cross-encoder/ms-marco-MiniLM-L6-v2"
            raise _refuse(source, problem, advice)
        return
    path = folder / SENTENCE_CONFIG
    saved = read_json(path, source).get("model_type") if path.exists() else None
    saved = saved or _kind_by_modules(folder, source)
    if saved != wanted:
        kind = MODEL_KINDS.get(saved) if isinstance(saved, str) else None
        problem = f"it was saved as {kind or repr(saved)}, not as {MODEL_KINDS[wanted]}"
        raise _refuse(source, problem, "name another model")


def _kind_by_modules(folder: Path, source: str) -> str:
    """Return the kind of a model whose settings don't say it, as in older versions, which kept the
    modules of sparse encoders and cross-encoders in packages of their own.
    """
    types = [str(module.get("type")) for module in read_json(folder / MODULES, source)]
    packages = {"sparse_encoder": "SparseEncoder", "cross_encoder": "CrossEncoder"}
    for package, kind in packages.items():
        if any(f".{package}." in name for name in types):
            return kind
    return "SentenceTransformer"


def read_json(path: Path, source: str) -> Any:
    """Return the content of a JSON file of a model, which must be of the type that its name stands
    for.
    """
    if path.stat().st_size > MOST_JSON_BYTES:
        size = f"{path.stat().st_size:,} bytes"
        raise _refuse(source, f"{path} has {size}, more than any model needs")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refuse(source, f"{path} can't be read as JSON: {error}") from error
    wanted = JSON_TYPES.get(path.name, object)
    if not isinstance(value, wanted):
        kinds = {dict: "an object", list: "a list"}
        found = kinds.get(type(value), repr(value)[:40])
        raise _refuse(source, f"{path} holds {found}, not {kinds[wanted]}")
    return value


# Sizes --------------------------------------------------------------------------------------------


def check_config(config: dict, folder: Path, source: str) -> None:
    """Raise UserError for a config.json that asks for more layers, experts or classes than the
    weights beside it can have.

    A library builds ten million layers one by one before it looks at the weights, and writes a
    table of as many class names as a config says.
    """
    path, kinds = folder / CONFIG, config.get("architectures")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(k, str) for k in kinds)):
        raise _refuse(source, f"{path}: architectures is no list of names")
    for setting in ("id2label", "label2id"):
        if not isinstance(config.get(setting), dict | NoneType):
            raise _refuse(source, f"{path}: {setting} is no table of classes")
    shapes = weight_shapes(folder, source)
    longest = max((size for shape in shapes.values() for size in shape), default=0)
    for name, value in _settings(config):
        most = None
        if name in LABELS:
            most = max(longest, FEWEST_LABELS)
        elif name in SIZES and shapes:
            most = longest
        elif PARTS.search(name):
            most = max(len(shapes), FEWEST_PARTS)
        elif EXPERTS.search(name):
            most = max(len(shapes), longest, FEWEST_PARTS)
        if most is not None and isinstance(value, int | float) and value > most:
            raise _refuse(
                source,
                f"{path} asks for {name} {value:,}, but its weights hold {len(shapes):,} tensors"
                f" of at most {longest:,} rows",
            )
        is_number = PARTS.search(name) or name.endswith(("heads", "head"))
        if is_number and isinstance(value, int | float) and value < 0:
            raise _refuse(source, f"{path} asks for {name} {value}")


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield all settings of a configuration, those in lists and objects within it too."""
    waiting = [("", value)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, inner) for inner in value]
        else:
            yield name, value


def weight_shapes(folder: Path, source: str) -> Shapes:
    """Return the shape of each tensor in the weights of a folder, {} if it has none.

    Only the headers are read. Raises UserError when they, or the list of shards, are broken.
    """
    shapes: Shapes = {}
    for path in weight_files(folder, source):
        try:
            shapes |= _read_header(path)
        # an OverflowError is a size of Infinity, which Python's JSON knows
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            problem = "can't be read as safetensors: its header is broken, or the file was cut off"
            raise _refuse(source, f"{path} {problem}") from error
    return shapes


def weight_files(folder: Path, source: str) -> list[Path]:
    """Return the files with a model's weights, as transformers finds them: one file, or else all
    that the list of shards names, which must lie in the folder.
    """
    return _weight_files(folder, WEIGHTS, SHARD_LIST, source)


def pickled_files(folder: Path, source: str) -> list[Path]:
    """Return the files with the weights of a folder that has them only pickled, as transformers
    finds them; none if it has others, or no weights.
    """
    if any(folder.glob("*.safetensors")):
        return []
    return _weight_files(folder, PICKLE, PICKLED_LIST, source)


def _weight_files(folder: Path, single: str, shard_list: str, source: str) -> list[Path]:
    if (folder / single).exists():
        return [folder / single]
    listed, ending = folder / shard_list, Path(single).suffix
    if not listed.exists():
        return []
    shards = read_json(listed, source).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        problem = "it has no weight_map of file names"
        raise _refuse(source, f"{listed} is not a list of shards: {problem}")
    for name in sorted(set(shards.values())):
        if name != Path(name).name or not name.endswith(ending):
            problem = f"which is no {ending.removeprefix('.')} file in the folder"
            raise _refuse(source, f"{listed} names {name!r}, {problem}", "name another model")
        if not (folder / name).is_file():
            problem = f"{listed} names {name}, which is missing"
            raise _refuse(source, problem, "copy it into the folder")
    return [folder / name for name in sorted(set(shards.values()))]


def _read_header(path: Path) -> Shapes:
    """Return the shapes in the header of a safetensors file: its length in 8 bytes, then JSON."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MOST_HEADER_BYTES):
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    shapes = {name: tuple(map(int, tensor["shape"])) for name, tensor in header.items()}
    # the smallest type has 4 bits
    is_negative = any(min(shape, default=0) < 0 for shape in shapes.values())
    if is_negative or sum(map(math.prod, shapes.values())) > 2 * size:
        raise ValueError("the tensors are larger than the file")
    ends = [tensor["data_offsets"][1] for tensor in header.values()]
    if 8 + length + max(ends, default=0) > size:
        raise ValueError("the file ends before its tensors do")
    return shapes


def parts_without_weights(folder: Path, source: str) -> list[str]:
    """Return the beginnings ("" or "2_Dense/") of the names of a model's parts that should have
    weights and have no safetensors.
    """
    parts = [("", "Transformer")]
    if (folder / MODULES).exists():
        modules = read_json(folder / MODULES, source)
        parts = [(f"{m['path']}/" if m["path"] else "", str(m.get("type"))) for m in modules]
    return [
        path
        for path, kind in parts
        if not kind.endswith(WITHOUT_WEIGHTS) and not any((folder / path).glob("*.safetensors"))
    ]
