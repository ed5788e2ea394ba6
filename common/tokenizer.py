"""The tokenizer of BERT, RoBERTa, XLM-RoBERTa, DistilBERT or a Llama, made from the files of a
model's folder by the `tokenizers` library alone.

transformers makes the same one, but importing it takes seconds. `Tokenizer` has what this project
uses of that library's tokenizers, so that one can stand for the other
(tests/unit/test_tokenizer.py).
"""

import base64
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Encoding, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece

from common.errors import NotSupported
from common.files import read_settings

UNLIMITED = int(1e30)  # the model_max_length of a tokenizer without a limit, in transformers


class Tokens(dict[str, list]):
    """Tokenised texts: columns such as `input_ids` with a list for each text. It has what this
    project uses of transformers' BatchEncoding.
    """

    def __init__(self, columns: dict[str, list], encodings: list[Encoding]) -> None:
        super().__init__(columns)
        self.encodings = encodings

    def word_ids(self, number: int) -> list[int | None]:
        """Return the word of each token of a text, None for special tokens."""
        return self.encodings[number].word_ids

    def sequence_ids(self, number: int) -> list[int | None]:
        """Return which text of a pair each token belongs to, 0 or 1; None for special tokens."""
        return self.encodings[number].sequence_ids


class Tokenizer:
    """A tokenizer of the `tokenizers` library, called as transformers' tokenizers are.

    `special_tokens_map` is role -> token, such as "pad_token" -> "[PAD]"; `model_input_names` the columns
    that the model takes; `model_max_length` the maximum number of tokens of a text, special ones included.
    """

    is_fast = True  # what transformers says of a tokenizer of that library

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens_map: dict[str, str],
        model_input_names: Sequence[str],
        model_max_length: int,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend_tokenizer = backend
        self.special_tokens_map = special_tokens_map
        self.model_input_names = list(model_input_names)
        self.model_max_length = model_max_length
        self.chat_template = chat_template

    @property
    def pad_token(self) -> str | None:
        """The token that fills up short texts."""
        return self.special_tokens_map.get("pad_token")

    @property
    def pad_token_id(self) -> int | None:
        """Its id."""
        token = self.pad_token
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text."""
        token = self.special_tokens_map.get("eos_token")
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Return the tokens that are found in a text before it is split, under their ids."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once."""
        return list(dict.fromkeys(self.special_tokens_map.values()))

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return [_id_of(token, self.backend_tokenizer) for token in self.all_special_tokens]

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_ids_to_tokens(self, token: int) -> str:
        """Return the name of a token."""
        return str(self.backend_tokenizer.id_to_token(token))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return how many tokens are put around a text, or around and between two."""
        return self.backend_tokenizer.num_special_tokens_to_add(pair)

    def __call__(
        self,
        texts: str | list[str],
        text_pair: list[str] | None = None,
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_offsets_mapping: bool = False,
        return_special_tokens_mask: bool = False,
        padding: bool = False,
        verbose: bool = False,
    ) -> Tokens:
        """Return the tokens of texts, or of one text, cut at `max_length` with `truncation`; of
        pairs, where each text has a second one in `text_pair`.

        Nothing is padded or printed: the last two arguments are there as transformers has them.
        """
        assert not padding
        if truncation:
            self.backend_tokenizer.enable_truncation(max_length or self.model_max_length)
        else:
            self.backend_tokenizer.no_truncation()
        batch: list = [texts] if isinstance(texts, str) else texts
        if text_pair is not None:
            batch = list(zip(texts, text_pair, strict=True))
        options = {"add_special_tokens": add_special_tokens}
        encodings = self.backend_tokenizer.encode_batch(batch, **options)
        columns: dict[str, list] = {"input_ids": [encoding.ids for encoding in encodings]}
        if "token_type_ids" in self.model_input_names:
            columns["token_type_ids"] = [encoding.type_ids for encoding in encodings]
        if "attention_mask" in self.model_input_names:
            columns["attention_mask"] = [encoding.attention_mask for encoding in encodings]
        if return_special_tokens_mask:
            columns["special_tokens_mask"] = [one.special_tokens_mask for one in encodings]
        if return_offsets_mapping:
            columns["offset_mapping"] = [encoding.offsets for encoding in encodings]
        if isinstance(texts, str):
            columns = {name: values[0] for name, values in columns.items()}
        return Tokens(columns, encodings)

    def decode(
        self, ids: list[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Return the text of tokens. Its spaces are never cleaned up: the last argument is there
        because transformers has it.
        """
        assert not clean_up_tokenization_spaces
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def pad(
        self, rows: list[dict[str, list[int]]], *, padding: bool = True, return_tensors: str = "pt"
    ) -> dict[str, torch.Tensor]:
        """Return tokenised texts, a dictionary of columns for each, as tensors (B, T): filled up at
        the right, with an `attention_mask` that is 0 there.
        """
        assert padding and return_tensors == "pt" and self.pad_token_id is not None
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_token_id}  # 0 in the other columns
        padded: dict[str, list[list[int]]] = {name: [] for name in (*rows[0], "attention_mask")}
        for row in rows:
            length = len(row["input_ids"])
            for name, values in {"attention_mask": [1] * length, **row}.items():
                padded[name].append([*values, *[fill.get(name, 0)] * (longest - length)])
        return {name: torch.tensor(values) for name, values in padded.items()}


# Made from the files of a folder ----------------------------------------------------------------

NAMED_TOKENS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Another value would change what a text becomes.
ONLY = {
    "pad_token_type_id": 0,
    "padding_side": "right",
    "split_special_tokens": False,
    "truncation_side": "right",
}
# Neither the tokens nor their ids depend on these, or they are read by name below.
NO_MATTER = {
    "added_tokens_decoder",
    "additional_special_tokens",
    "backend",
    "clean_up_tokenization_spaces",
    "do_basic_tokenize",
    "errors",
    "extra_special_tokens",
    "full_tokenizer_file",
    "is_local",
    "local_files_only",
    "max_length",
    "model_input_names",
    "model_max_length",
    "name_or_path",
    "never_split",
    "pad_to_multiple_of",
    "sp_model_kwargs",
    "special_tokens_map_file",
    "stride",
    "tokenizer_class",
    "tokenizer_file",
    "truncation_strategy",
    "vocab_file",
}


@dataclass(frozen=True)
class Parts:
    """What a tokenizer is made from."""

    description: dict[str, Any]  # tokenizer.json
    settings: dict[str, Any]  # tokenizer_config.json
    special: dict[str, str]  # role -> token
    added: dict[int, AddedToken]  # id -> token that is found in a text before it is split


def read_tokenizer(folder: Path, *, max_length: int | None = None) -> Tokenizer:
    """Return the tokenizer of a model's folder, as transformers' AutoTokenizer makes it;
    `max_length` stands for the limit that the folder gives.

    That library builds the tokenizers of BERT and RoBERTa anew: from tokenizer.json it takes only
    the vocabulary, the rest from its own class and from tokenizer_config.json. Raises NotSupported
    when it would make one in another way, or none.
    """
    description = read_settings(folder / "tokenizer.json")
    settings = _read_tokenizer_settings(folder)
    if (folder / "chat_template.jinja").exists():
        raise NotSupported("the tokenizer's chat_template.jinja")
    kind = _kind(settings, read_settings(folder / "config.json"))
    _check_settings(settings, kind.options)
    for name in ("truncation", "padding"):
        if (description.get(name) or {}).get("direction", "Right") != "Right":
            raise NotSupported(f"{name} at the left")
    with _unknown_if_broken():
        special = _special_tokens(settings)
        parts = Parts(description, settings, special, _added_tokens(description, settings, special))
        backend = kind.build(parts)
    added = [(number, token.content) for number, token in parts.added.items()]
    if wrong := [token for number, token in added if backend.token_to_id(token) != number]:
        raise NotSupported(f"other ids of {', '.join(wrong)}")
    limit = settings.get("model_max_length")
    names = settings.get("model_input_names", [*kind.input_names])
    if not (limit is None or (type(limit) is int and limit > 0)):
        raise NotSupported(f"model_max_length {limit!r}")
    if not isinstance(names, list) or not set(map(str, names)) <= set(INPUT_NAMES):
        raise NotSupported(f"model_input_names {names!r}")
    return Tokenizer(backend, special, names, max_length or limit or UNLIMITED)


def read_language_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a Llama's folder, as transformers' AutoTokenizer makes it: what
    tokenizer.json says, and a chat template.

    Raises NotSupported when that library would make it in another way, or none.
    """
    settings, config = _read_tokenizer_settings(folder), read_settings(folder / "config.json")
    kind = (config.get("model_type"), settings.get("tokenizer_class"))
    if kind[0] != "llama" or kind[1] not in FROM_FILE_CLASSES or "tokenizer_class" in config:
        raise NotSupported(f"the tokenizer {kind[1]!r} of {kind[0]!r}")
    _check_settings(settings, ("chat_template", "padding_side"))
    with _unknown_if_broken():
        backend = tokenizers.Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
        special, added = _special_tokens(settings), backend.get_added_tokens_decoder()
        described = [{"id": number, **_fields(token)} for number, token in added.items()]
        listed = _added_tokens({"added_tokens": described}, settings, special)
    written, read = ({number: repr(token) for number, token in tokens.items()} for tokens in (listed, added))
    if written != read:
        raise NotSupported("added tokens that differ between the tokenizer's files")
    if not isinstance(backend.model, BPE):  # spaces of others may be cleaned up
        raise NotSupported("a tokenizer that merges no pairs")
    if backend.get_vocab_size(with_added_tokens=True) <= len(added):
        raise NotSupported("a tokenizer without words")
    template = _chat_template(folder, settings)
    return Tokenizer(backend, special, ("input_ids", "attention_mask"), UNLIMITED, template)


def _fields(token: AddedToken) -> dict[str, Any]:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Return the template that writes a conversation as a text: the one in a file of its own goes
    before the one in the settings.
    """
    file = folder / "chat_template.jinja"
    template = file.read_text("utf-8") if file.exists() else settings.get("chat_template")
    if not isinstance(template, str | None):
        raise NotSupported("several chat templates")
    return template


def _check_settings(settings: dict[str, Any], options: Sequence[str]) -> None:
    """Raise NotSupported for a setting of tokenizer_config.json that is not known here."""
    for name, value in settings.items():
        known = name in NO_MATTER or name in NAMED_TOKENS or name in options
        if not known and (name not in ONLY or value != ONLY[name]):
            raise NotSupported(f"the tokenizer's {name} {value!r:.80}")


@contextlib.contextmanager
def _unknown_if_broken() -> Iterator[None]:
    """Turn whatever is raised within the block into NotSupported: files can hold anything."""
    try:
        yield
    except NotSupported:
        raise
    except BaseException as error:
        # the library in Rust ends with a PanicException, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise NotSupported(f"the tokenizer: {error!r}") from error


def _read_tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, with the special tokens of special_tokens_map.json, where older
    versions keep them.
    """
    settings = read_settings(folder / "tokenizer_config.json")
    others = ["additional_chat_templates"]
    if "added_tokens_decoder" not in settings:
        others.append("added_tokens.json")
        if (folder / "special_tokens_map.json").is_file():
            settings |= read_settings(folder / "special_tokens_map.json")
    if found := [name for name in others if (folder / name).exists()]:
        raise NotSupported(f"the tokenizer's {', '.join(found)}")
    return settings


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Return role -> token."""
    for name in ("additional_special_tokens", "extra_special_tokens"):
        if settings.get(name):
            raise NotSupported(f"the tokenizer's {name}")
    special = {}
    for role in NAMED_TOKENS:
        token = settings.get(role)
        if token is not None:
            special[role] = token if isinstance(token, str) else token["content"]
    return special


def _added_tokens(
    description: dict[str, Any], settings: dict[str, Any], special: dict[str, str]
) -> dict[int, AddedToken]:
    """Return id -> token of the added tokens, among which all special ones must be."""
    listed = settings.get("added_tokens_decoder")
    if listed is None:
        listed = {token["id"]: token for token in description["added_tokens"]}
    added = {}
    for number in sorted(listed, key=int):
        fields = {name: value for name, value in listed[number].items() if name not in ("id", "__type")}
        token = AddedToken(**fields)
        token.special = token.special or token.content in special.values()
        added[int(number)] = token
    missing = set(special.values()) - {token.content for token in added.values()}
    if missing:
        names = ", ".join(sorted(missing))
        raise NotSupported(f"special tokens that are not in the vocabulary: {names}")
    return added


def _build_wordpiece(parts: Parts) -> tokenizers.Tokenizer:
    """BERT's: words are split at spaces and punctuation, then into the longest known pieces."""
    settings = parts.settings
    cls, sep = parts.special["cls_token"], parts.special["sep_token"]
    model = WordPiece(parts.description["model"]["vocab"], unk_token=parts.special["unk_token"])
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_tokens(list(parts.added.values()))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, _id_of(token, backend)) for token in (cls, sep)],
    )
    return backend


def _build_byte_level(parts: Parts) -> tokenizers.Tokenizer:
    """RoBERTa's: bytes, and pairs of pieces that were often neighbours are merged."""
    model = parts.description["model"]
    begins_with_space = parts.settings.get("add_prefix_space", False)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    backend = tokenizers.Tokenizer(
        BPE(
            vocab=model["vocab"],
            merges=[(left, right) for left, right in pairs],
            dropout=None,
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=begins_with_space)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(parts.added.values()))
    cls, sep = parts.special["cls_token"], parts.special["sep_token"]
    backend.post_processor = processors.RobertaProcessing(
        (sep, _id_of(sep, backend)),
        (cls, _id_of(cls, backend)),
        parts.settings.get("trim_offsets", True),
        begins_with_space,
    )
    return backend


def _build_unigram(parts: Parts) -> tokenizers.Tokenizer:
    """XLM-RoBERTa's: of all ways to split a word, the most probable one (SentencePiece)."""
    bos, eos = parts.special["bos_token"], parts.special["eos_token"]
    vocabulary = [(piece, score) for piece, score in parts.description["model"]["vocab"]]
    backend = tokenizers.Tokenizer(Unigram(vocab=vocabulary, unk_id=3, byte_fallback=False))
    normalizer = parts.description.get("normalizer") or {}
    for step in normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]:
        if step.get("type") == "Precompiled":  # transformers takes the first, and nothing else
            table = base64.b64decode(step["precompiled_charsmap"])
            backend.normalizer = normalizers.Precompiled(table)
            break
    scheme = "always" if parts.settings.get("add_prefix_space", True) else "never"
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    backend.add_tokens(list(parts.added.values()))
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A", eos],
        pair=[bos, "$A", eos, eos, "$B", eos],
        special_tokens=[(token, _id_of(token, backend)) for token in (bos, eos)],
    )
    return backend


def _build_from_file(parts: Parts) -> tokenizers.Tokenizer:
    """A tokenizer without a class of its own: what tokenizer.json says."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(parts.description))
    if backend.post_processor is None:
        raise NotSupported("a tokenizer that puts nothing around a text")
    known = {number: repr(token) for number, token in backend.get_added_tokens_decoder().items()}
    if known != {number: repr(token) for number, token in parts.added.items()}:
        raise NotSupported("added tokens that differ between the tokenizer's files")
    return backend


def _id_of(token: str, backend: tokenizers.Tokenizer) -> int:
    number = backend.token_to_id(token)  # to ask for the whole vocabulary takes 20 ms
    if number is None:
        raise NotSupported(f"no token {token}")
    return number


INPUT_NAMES = ("input_ids", "token_type_ids", "attention_mask")


@dataclass(frozen=True)
class Kind:
    """A way in which transformers makes tokenizers: how, from which settings, for which inputs."""

    build: Callable[[Parts], tokenizers.Tokenizer]
    options: Sequence[str]
    input_names: Sequence[str] = ("input_ids", "attention_mask")


WORDPIECE_OPTIONS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
BYTE_LEVEL_OPTIONS = ("add_prefix_space", "trim_offsets")
FROM_FILE = Kind(_build_from_file, (*WORDPIECE_OPTIONS, *BYTE_LEVEL_OPTIONS))
FROM_FILE_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
KINDS = {  # the class that tokenizer_config.json names
    "BertTokenizer": Kind(_build_wordpiece, WORDPIECE_OPTIONS, INPUT_NAMES),
    "DistilBertTokenizer": Kind(_build_wordpiece, WORDPIECE_OPTIONS),
    "RobertaTokenizer": Kind(_build_byte_level, BYTE_LEVEL_OPTIONS),
    "XLMRobertaTokenizer": Kind(_build_unigram, ("add_prefix_space",)),
    **dict.fromkeys(FROM_FILE_CLASSES, FROM_FILE),
}
CLASSES = {  # model_type -> the class where none is named
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}


def _kind(settings: dict[str, Any], config: dict[str, Any]) -> Kind:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CLASSES or "tokenizer_class" in config:
        raise NotSupported(f"the tokenizer of model_type {model_type!r}")
    name = str(settings.get("tokenizer_class") or CLASSES[model_type])
    kind = KINDS.get(name) or KINDS.get(name.removesuffix("Fast"))
    if kind is None:
        raise NotSupported(f"tokenizer_class {name!r}")
    return kind
