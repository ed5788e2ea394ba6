"""Texts -> embeddings: what `SentenceTransformer.encode` does, written out.

Identical texts are encoded once. Texts are sorted by their number of tokens, not of characters, and
put into batches of at most `batch_tokens` positions, so that there is little padding. The
transformer runs in bf16 where the processor has it; what follows it (pooling, dense layers,
normalisation: the model's own modules) runs in fp32. Under torchrun the batches are shared out
among the processes; each batch is computed by one of them, exactly as a single process would. All
texts are tokenised first, not during the computation: on a CPU both need the same cores.

Weights are read from safetensors only. Code that comes with a model is never run: its modules must
be those of sentence-transformers.
"""

import hashlib
import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Module
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BatchEncoding, PreTrainedTokenizerBase

from common import models, reading, sources, speedups
from common.errors import UserError
from common.files import tensors_sha256
from common.runtime import Runtime
from common.search.manifest import EncoderConfig, Identity

DEFAULT_MODEL = "bundled/all-MiniLM-L6-v2"
# larger batches fall out of a CPU's cache; smaller ones leave a GPU idle
BATCH_TOKENS = {"cpu": 4096, "cuda": 131_072, "mps": 16_384}
# role -> the names under which a model may keep its prompt, as in encode_query and encode_document
PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus"), None: ()}
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
SPLIT_AT_ONCE = 256  # texts that are split into chunks together
LoadedModel = TypeVar("LoadedModel", SentenceTransformer, CrossEncoder)


@dataclass
class Encoder:
    """A model on its device, and how many texts went through it: `num_encoded`, of which `num_cut`
    were longer than `max_length` and lost their end.
    """

    name: str
    model: SentenceTransformer
    runtime: Runtime
    max_length: int  # tokens, special ones included
    batch_tokens: int
    fingerprint: str
    cache_dir: str | None
    num_encoded: int = 0
    num_cut: int = 0

    @property
    def width(self) -> int:
        """The number of dimensions of an embedding."""
        width = self.model.get_embedding_dimension()
        assert width is not None
        return width

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer."""
        return tokenizer_of(self.model)

    def identity(self) -> Identity:
        """Return what embeddings must share to be compared."""
        return {
            "model": self.name,
            "fingerprint": self.fingerprint,
            "width": self.width,
            "pooling": describe_pooling(self.model),
            "max_length": self.max_length,
        }

    def prompt(self, role: str | None) -> str:
        """Return what is put before each text of a role: "query" as in encode_query, "document" as
        in encode_document, None as in encode.
        """
        prompts = self.model.prompts
        for name in PROMPT_NAMES[role]:
            if name in prompts:  # even if it is empty
                return prompts[name] or ""
        default = self.model.default_prompt_name
        return (prompts.get(default) or "") if default else ""

    def encode(self, texts: list[str], *, role: str | None = None) -> np.ndarray:
        """Return the embeddings (texts, width) in float32, as the model gives them. Under torchrun
        the other processes must be in follow().
        """
        if self.runtime.world_size > 1:
            self.runtime.broadcast_from_main(lambda: [texts, role])
        return self._encode(texts, role)

    def encode_unit(self, texts: list[str], *, role: str | None = None) -> np.ndarray:
        """Return the embeddings at norm 1; one whose norm is zero or not finite becomes NaN."""
        vectors = self.encode(texts, role=role)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        usable = np.isfinite(norms) & (norms > 0)
        return np.divide(vectors, norms, out=np.full_like(vectors, np.nan), where=usable)

    def follow(self) -> None:
        """Compute this process's share of all that the main process encodes, until it calls
        release().
        """
        # Ctrl-C reaches every process, but this one ends only when the main one has ended
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while (job := self.runtime.broadcast_from_main(lambda: None)) is not None:
            texts, role = job
            self._encode(texts, role)

    def release(self) -> None:
        """Let the other processes of torchrun leave follow()."""
        if self.runtime.world_size > 1 and self.runtime.is_main:
            self.runtime.broadcast_from_main(lambda: None)

    @torch.inference_mode()
    def _encode(self, texts: list[str], role: str | None) -> np.ndarray:
        # each different text once
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        prompt = self.prompt(role)
        tokens, num_cut = self.tokenize([prompt + text for text in row_of])
        vectors = torch.zeros(len(row_of), self.width, device=self.runtime.device)
        batches = token_batches([len(ids) for ids in tokens["input_ids"]], self.batch_tokens)
        # one context for all batches: it keeps the cast weights as long as it is open
        with self.runtime.autocast():
            for batch in batches[self.runtime.rank :: self.runtime.world_size]:
                rows = torch.from_numpy(batch).to(vectors.device)
                vectors[rows] = self._forward(tokens, batch, prompt)
        self.runtime.all_reduce_sum(vectors)  # each row is zero in all processes but one
        self.num_encoded += len(row_of)
        self.num_cut += num_cut
        rows = [row_of[text] for text in texts]
        return vectors.cpu().numpy()[rows].reshape(len(texts), self.width)

    def tokenize(self, texts: list[str]) -> tuple[BatchEncoding, int]:
        """Return the tokens of texts, cut at max_length, and how many texts were longer."""
        if not texts:
            return BatchEncoding({"input_ids": []}), 0
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length, padding=False)
        if tokens.encodings is not None:  # a fast tokenizer, which keeps what it cuts off
            return tokens, sum(bool(encoding.overflowing) for encoding in tokens.encodings)
        whole = self.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
        return tokens, sum(len(ids) > self.max_length for ids in whole)

    def _forward(self, tokens: BatchEncoding, batch: np.ndarray, prompt: str) -> torch.Tensor:
        """Return the embeddings (batch, width) of some of the tokenised texts."""
        columns = {name: [tokens[name][row] for row in batch] for name in tokens}
        padded = self.tokenizer.pad(columns, padding=True, return_tensors="pt")
        features = dict(padded.to(self.runtime.device))
        features = self.model[0](features)  # token_embeddings (B, T, hidden)
        if prompt:  # some models' pooling leaves the prompt out
            ids = self.tokenizer(prompt)["input_ids"]
            # the end token, if there is one, comes after the text and not after the prompt
            has_end_token = ids[-1] in self.tokenizer.all_special_ids
            features["prompt_length"] = len(ids) - 1 if has_end_token else len(ids)
        with torch.autocast(self.runtime.device.type, enabled=False):
            features["token_embeddings"] = features["token_embeddings"].float()
            for module in list(self.model)[1:]:
                features = module(features)
        return features["sentence_embedding"]  # (B, width)


def token_batches(lengths: Sequence[int], batch_tokens: int) -> list[np.ndarray]:
    """Return batches of row numbers, the longest texts first, each of at most `batch_tokens`
    positions with its padding, or of one text.

    `lengths` (N): tokens of each text.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")  # longest first
    batches, start = [], 0
    while start < len(order):
        # the first text of a batch is its longest, and the others are padded to its length
        length = max(lengths[order[start]], 1)
        size = max(batch_tokens // length, 1)
        batches.append(order[start : start + size])
        start += size
    return batches


class Chunk(NamedTuple):
    """A piece of a text, and the number of its first character in the text, from 0."""

    start: int
    text: str


def chunk_size(encoder: Encoder, overlap: int) -> int:
    """Return how many tokens of a text a chunk holds.

    Raises UserError when that is not more than `overlap`, or when the tokenizer doesn't report
    which characters a token stands for.
    """
    tokenizer = encoder.tokenizer
    if not tokenizer.is_fast:
        problem = f"the tokenizer of {encoder.name} doesn't report where its tokens are in a text"
        raise UserError(f"--chunk: {problem}; leave --chunk out or use another model")
    prompt = tokenizer(encoder.prompt("document"), add_special_tokens=False)["input_ids"]
    size = encoder.max_length - tokenizer.num_special_tokens_to_add() - len(prompt)
    if not 0 <= overlap < size:
        raise UserError(f"--chunk-overlap {overlap}: a chunk holds {size} tokens; use fewer")
    return size


def split_into_chunks(texts: list[str], encoder: Encoder, *, overlap: int) -> list[list[Chunk]]:
    """Return the chunks of each text, each of at most the encoder's max_length in tokens.

    Neighbours share about `overlap` tokens. A chunk ends between two words, unless a word alone is
    too long. A text that fits stays whole. Raises UserError as chunk_size() does.
    """
    size, chunks = chunk_size(encoder, overlap), []
    for start in range(0, len(texts), SPLIT_AT_ONCE):
        block = texts[start : start + SPLIT_AT_ONCE]
        tokens = _tokenize(block, encoder.tokenizer)
        for number, text in enumerate(block):
            words, offsets = tokens.word_ids(number), tokens["offset_mapping"][number]
            chunks.append(_split(text, words, offsets, encoder.tokenizer, size=size, overlap=overlap))
    return chunks


def _split(
    text: str,
    words: list[int | None],
    offsets: list[tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    size: int,
    overlap: int,
) -> list[Chunk]:
    """Return the chunks of a text, given the word and the characters of each token.

    A chunk tokenised by itself can have more tokens than it had within its text, because a word may
    be split in another way at the start of a text. Then all chunks are made shorter.
    """
    room = size  # tokens of the whole text per chunk
    while True:
        spans = token_spans(words, room, min(overlap, room - 1))
        chunks = _cut(text, offsets, spans)
        lengths = map(len, _tokenize([chunk.text for chunk in chunks], tokenizer)["input_ids"])
        excess = max(lengths) - size
        if excess <= 0 or room == 1 or len(chunks) == 1:
            return chunks
        room = max(room - excess, 1)


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        truncation=False,
        padding=False,
        verbose=False,
    )


def token_spans(words: list[int | None], room: int, overlap: int) -> list[tuple[int, int]]:
    """Return spans (first token, token after the last) of at most `room` tokens that cover all
    tokens; `words` is the word of each token, None for a token outside of words.

    A span ends, and starts, at the border of a word, unless the word is longer than half of a span.
    """

    def word_start(token: int, lowest: int) -> int:
        """Return the first token of a token's word, or the token itself if that is not above
        `lowest`.
        """
        first = token
        while first > lowest and words[first] == words[first - 1] and words[first] is not None:
            first -= 1
        return first if first > lowest else token

    spans, start, end = [], 0, 0
    while len(words) - start > room:
        # at least half full, and after the end of the last span
        end = word_start(start + room, max(start + room // 2, end))
        spans.append((start, end))
        overlapping = max(word_start(end - overlap, start + 1), start + 1)
        start = overlapping if overlap else end
    return [*spans, (start, len(words))]


def _cut(text: str, offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[Chunk]:
    """Return the chunk of each span of tokens. Characters between two tokens, such as spaces, go
    with the second; the first and the last chunk reach to the ends of the text.
    """
    chunks = []
    for number, (first, after_last) in enumerate(spans):
        start = offsets[first - 1][1] if number else 0
        end = offsets[after_last - 1][1] if number < len(spans) - 1 else len(text)
        if end > start:  # several tokens can share a character
            chunks.append(Chunk(start, text[start:end]))
    return chunks


def load_encoder(config: EncoderConfig, runtime: Runtime) -> Encoder:
    """Return the encoder of a sentence-transformers model. Raises UserError when the model can't be
    read, or can't take texts of `max_length` tokens.
    """
    name, max_length = config.model or DEFAULT_MODEL, config.max_length
    model = load_model(name, cache_dir=config.cache_dir)
    transformer, tokenizer = transformer_of(model).auto_model, tokenizer_of(model)
    positions = models.max_positions(transformer)  # None: without a limit
    if max_length is None:
        lengths = (model.max_seq_length, positions, tokenizer.model_max_length)
        max_length = min(length for length in lengths if length)
    else:
        special = tokenizer.num_special_tokens_to_add()
        if max_length <= special or (positions and max_length > positions):
            most = f" and at most {positions}" if positions else ""
            limits = f"more than {special} (the special tokens){most}"
            raise UserError(f"--max-length {max_length}: the model reads {limits} tokens")
    model_fingerprint = fingerprint(model)  # before fast attention changes the model
    speedups.use_fast_attention(transformer)
    return Encoder(
        reading.full_name(name),
        model.to(runtime.device).eval(),
        runtime,
        max_length=max_length,
        batch_tokens=config.batch_tokens or BATCH_TOKENS[runtime.device.type],
        fingerprint=model_fingerprint,
        cache_dir=config.cache_dir,
    )


def load_model(name: str, *, cache_dir: str | None) -> SentenceTransformer:
    """Return a sentence-transformers model on the CPU in fp32. As in that library, a plain encoder
    (without modules.json) gets mean pooling.

    Raises UserError when it can't be read, or reads something other than texts.
    """
    model = _load(SentenceTransformer, name, flag="--model", cache_dir=cache_dir)
    if not isinstance(model[0], Transformer) or "text" not in model[0].modality_config:
        kind = type(model[0]).__name__
        raise UserError(f"--model {name}: its first module is {kind}, not a transformer that reads texts")
    for setting in ("query_length", "document_length", "query_expansion"):
        if getattr(model[0], setting, None) is not None:
            advice = "use another model, or remove it from a copy of sentence_bert_config.json"
            raise UserError(
                f"--model {name}: its first module sets {setting}, which is unsupported; {advice}"
            )
    models.check_tokenizer(tokenizer_of(model), name=name, flag="--model")
    return model


def transformer_of(model: SentenceTransformer | CrossEncoder) -> Transformer:
    """Return the first module of a model, which holds its transformer and tokenizer."""
    first = model[0]
    assert isinstance(first, Transformer)
    return first


def tokenizer_of(model: SentenceTransformer) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model."""
    tokenizer = transformer_of(model).tokenizer
    assert tokenizer is not None
    return tokenizer


def load_reranker(name: str, runtime: Runtime, *, cache_dir: str | None) -> CrossEncoder:
    """Return a cross-encoder with one output on its device. Raises UserError when it can't be read,
    or gives several scores per pair.
    """
    model = _load(CrossEncoder, name, flag="--rerank", cache_dir=cache_dir).to(runtime.device)
    if model.num_labels != 1:
        advice = "name a cross-encoder with one, such as cross-encoder/ms-marco-MiniLM-L6-v2"
        raise UserError(f"--rerank {name}: it gives {model.num_labels} scores per pair; {advice}")
    speedups.use_fast_attention(transformer_of(model).auto_model)
    return model


def _load(model_class: type[LoadedModel], name: str, *, flag: str, cache_dir: str | None) -> LoadedModel:
    folder = sources.find_folder(name, kind="encoder", flag=flag, cache_dir=cache_dir)
    return models.load_sentence_model(model_class, folder, name=name, flag=flag)


def fingerprint(model: SentenceTransformer) -> str:
    """Return the SHA-256 of all that determines a model's embeddings: weights, configuration,
    tokenizer, its modules' settings and its prompts.

    It does not cover the length at which texts are cut, the precision, and what doesn't change an
    embedding (names, paths, versions).
    """
    tokenizer = tokenizer_of(model)
    if tokenizer.is_fast:
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary.update(truncation=None, padding=None)  # every call sets these again
    else:
        vocabulary = sorted(tokenizer.get_vocab().items())
    settings = []
    for module in model:
        assert isinstance(module, Module)
        values = {**module.get_config_dict()}
        values.pop("max_seq_length", None)
        settings.append([type(module).__name__, values])
    # only what differs from the defaults, because later versions of transformers have more settings
    changed = transformer_of(model).auto_model.config.to_diff_dict()
    config = {key: value for key, value in changed.items() if key not in NEUTRAL_SETTINGS}
    weights = tensors_sha256(dict(sorted(model.state_dict().items())))
    parts = [vocabulary, settings, config, model.prompts, model.default_prompt_name, weights]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def describe_pooling(model: SentenceTransformer) -> str:
    """Return in a few words what follows a model's transformer, such as "mean, Normalize"."""
    parts = []
    for module in list(model)[1:]:
        mode = module.pooling_mode if isinstance(module, Pooling) else type(module).__name__
        parts.append(mode if isinstance(mode, str) else "+".join(mode))
    return ", ".join(parts) or "none"
