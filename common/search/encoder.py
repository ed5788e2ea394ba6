"""Texts -> embeddings: what `SentenceTransformer.encode` does, written out.

Identical texts are encoded once. Texts are sorted by their number of tokens, not of characters, and
put into batches of at most `batch_tokens` positions, so that there is little padding. The
transformer runs in bf16 where the processor has it; what follows it (pooling, dense layers,
normalisation) runs in fp32. Under torchrun the batches are shared out
among the processes; each batch is computed by one of them, exactly as a single process would. On a
CPU they are also shared out among its threads. All texts are tokenised first, not during the
computation: on a CPU both need the same cores.

Weights are read from safetensors only. Code that comes with a model is never run: its modules must
be those of sentence-transformers.
"""

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from common import bundled, reading, sources, speedups
from common.errors import UserError, note
from common.runtime import DTYPES, Runtime
from common.search.manifest import EncoderConfig, Identity, Settings, check_settings
from common.search.pooling import StaticEmbedding, Transformer
from common.search.sentence_model import PROMPT_NAMES, SentenceModel, load_model, missing_prompts
from common.tokenizer import Tokenizer, Tokens

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# positions, with padding. On a CPU each thread has a batch of its own, which must fit into its cache; on
# a GPU, small batches leave it idle.
BATCH_TOKENS = {"cpu": 2048, "cuda": 131_072, "mps": 16_384}
STATIC_TOKENS = 65_536  # of a model without a transformer, which only looks vectors up
SPLIT_AT_ONCE = 256  # texts that are split into chunks together


@dataclass
class Encoder:
    """A model on its device, and how many texts went through it: `num_encoded`, of which `num_cut`
    were longer than `max_length` and lost their end.
    """

    name: str
    model: SentenceModel
    runtime: Runtime
    max_length: int  # tokens, special ones included
    batch_tokens: int
    cache_dir: str | None
    prompts: dict[str, str] = field(default_factory=dict)  # role -> what a flag puts before a text
    num_encoded: int = 0
    num_cut: int = 0

    @property
    def width(self) -> int:
        """The number of dimensions of an embedding."""
        return self.model.width

    @property
    def tokenizer(self) -> "Tokenizer | PreTrainedTokenizerBase":
        """The model's own tokenizer."""
        return self.model.tokenizer

    def identity(self) -> Identity:
        """Return what embeddings must share to be compared."""
        return {
            "model": self.name,
            "fingerprint": self.model.fingerprint,
            "width": self.width,
            "pooling": self.model.pooling,
            "max_length": self.max_length,
            "document_prompt": self.prompts.get("document"),
        }

    def prompt(self, role: str | None) -> str:
        """Return what is put before each text of a role: "query" as in encode_query, "document" as in
        encode_document, None as in encode. A flag takes precedence over the model's own prompt; that of
        documents also applies to texts without a role.
        """
        given = self.prompts.get(role or "document")
        if given is not None:
            return given
        prompts = self.model.prompts
        for name in PROMPT_NAMES[role]:
            if name in prompts:  # even if it is empty
                return prompts[name] or ""
        default = self.model.default_prompt_name
        return (prompts.get(default) or "") if default else ""

    def encode(self, texts: list[str], *, role: str | None = None) -> np.ndarray:
        """Return the embeddings (texts, width) in float32, as the model gives them. Under torchrun
        the other processes must be in run_worker(), or encode the same texts now.
        """
        if self.runtime.world_size > 1:
            self.runtime.broadcast_from_main(lambda: [texts, role])
        return self._encode(texts, role)

    def encode_normalized(self, texts: list[str], *, role: str | None = None) -> np.ndarray:
        """Return the normalized embeddings; one whose norm is zero or not finite becomes NaN."""
        vectors = self.encode(texts, role=role)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        usable = np.isfinite(norms) & (norms > 0)
        return np.divide(vectors, norms, out=np.full_like(vectors, np.nan), where=usable)

    def run_worker(self) -> None:
        """Be a worker under torchrun: compute this process's share of all that the main process
        encodes, until its block of workers() ends.
        """
        # Ctrl-C reaches every process, but this one ends only when the main one has ended
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while (job := self.runtime.broadcast_from_main(lambda: None)) is not None:
            texts, role = job
            self._encode(texts, role)

    @contextlib.contextmanager
    def workers(self) -> Iterator[None]:
        """Let the other processes of torchrun leave run_worker() at the end of the block, also after
        a mistake of the user; after a signal they may be in the middle of a batch.
        """
        try:
            yield
        except UserError:
            self._stop_workers()
            raise
        self._stop_workers()

    def _stop_workers(self) -> None:
        if self.runtime.world_size > 1 and self.runtime.is_main:
            self.runtime.broadcast_from_main(lambda: None)

    @torch.inference_mode()
    def _encode(self, texts: list[str], role: str | None) -> np.ndarray:
        # each different text once
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        prompt = self.prompt(role)
        tokens, num_cut = self.tokenize([prompt + text for text in row_of])
        vectors = torch.zeros(len(row_of), self.width, device=self.runtime.device)
        lengths, is_padded = [len(ids) for ids in tokens["input_ids"]], not self.model.reads_padding
        batches = token_batches(lengths, self.batch_tokens, is_padded=is_padded)
        own = batches[self.runtime.rank :: self.runtime.world_size]
        length = self._prompt_length(prompt)
        if self.model.library is None:
            computed = self._in_threads(lambda batch: self._forward(tokens, batch, length), own)
        else:
            different = list(row_of)
            parts = ([different[row] for row in batch] for batch in own)
            computed = (self._forward_by_library(part, prompt, role) for part in parts)
        for batch, embeddings in zip(own, computed):
            vectors[torch.from_numpy(batch).to(vectors.device)] = embeddings
        self.runtime.all_reduce_sum(vectors)  # each row is zero in all processes but one
        self.num_encoded += len(row_of)
        self.num_cut += num_cut
        rows = [row_of[text] for text in texts]
        return vectors.cpu().numpy()[rows].reshape(len(texts), self.width)

    def _in_threads(
        self, compute: Callable[[np.ndarray], torch.Tensor], batches: list[np.ndarray]
    ) -> Iterator[torch.Tensor]:
        """Yield compute(batch) for each batch. On a CPU each batch has a thread of its own, which is
        faster than splitting each matrix product over all threads: these wait for each other after
        each product, and long where other programs use the same cores.
        """
        threads = torch.get_num_threads()
        count = min(threads, len(batches)) if self.runtime.device.type == "cpu" else 1
        if count <= 1:
            yield from map(compute, batches)
            return
        share = (max(threads // count, 1),)  # each has several if there are few batches
        try:
            with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=share) as pool:
                yield from pool.map(compute, batches)
        finally:
            torch.set_num_threads(threads)  # for threads that begin later

    def _prompt_length(self, prompt: str) -> int:
        """Return how many tokens a prompt takes at the start of a text."""
        if not prompt:
            return 0
        ids = self.tokenizer(prompt)["input_ids"]
        # the end token, if there is one, comes after the text and not after the prompt
        has_end_token = ids[-1] in self.tokenizer.all_special_ids
        return len(ids) - 1 if has_end_token else len(ids)

    def tokenize(self, texts: list[str]) -> "tuple[Tokens | BatchEncoding, int]":
        """Return the tokens of texts, cut at max_length, and how many texts were longer."""
        if not texts:
            return Tokens({"input_ids": []}, []), 0
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length, padding=False)
        if tokens.encodings is not None:  # a fast tokenizer, which keeps what it cuts off
            return tokens, sum(bool(encoding.overflowing) for encoding in tokens.encodings)
        whole = self.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
        return tokens, sum(len(ids) > self.max_length for ids in whole)

    @torch.inference_mode()  # which belongs to a thread, as autocast does
    def _forward(
        self, tokens: "Tokens | BatchEncoding", batch: np.ndarray, prompt_length: int
    ) -> torch.Tensor:
        """Return the embeddings (batch, width) of some of the tokenised texts."""
        if isinstance(self.model.modules[0], StaticEmbedding):
            return self._forward_static([tokens["input_ids"][row] for row in batch])
        rows = [{name: tokens[name][row] for name in tokens} for row in batch]
        padded = self.tokenizer.pad(rows, padding=True, return_tensors="pt")
        features = {name: value.to(self.runtime.device) for name, value in padded.items()}
        transformer, *others = self.model.modules
        with self.runtime.autocast():
            features = transformer(features)  # token_embeddings (B, T, hidden)
        if prompt_length:  # some models' pooling leaves the prompt out
            features["prompt_length"] = prompt_length
        features["token_embeddings"] = features["token_embeddings"].float()
        for module in others:
            features = module(features)
        return features["sentence_embedding"][:, : self.width]  # (B, width)

    def _forward_static(self, ids: list[list[int]]) -> torch.Tensor:
        """Return the embeddings (B, width) of texts by a model without a transformer: their tokens
        lie one after the other, not padded.
        """
        flat = torch.tensor([token for tokens in ids for token in tokens], dtype=torch.long)
        offsets = torch.from_numpy(np.cumsum([0, *map(len, ids)])[:-1])  # (B): where texts begin
        inputs = {"input_ids": flat, "offsets": offsets}
        features = {name: value.to(self.runtime.device) for name, value in inputs.items()}
        for module in self.model.modules:
            features = module(features)
        return features["sentence_embedding"][:, : self.width]

    def _forward_by_library(self, texts: list[str], prompt: str, role: str | None) -> torch.Tensor:
        """Return the embeddings (texts, width) of a model that sentence-transformers computes: it
        may have a part of its own for each role.
        """
        library: Any = self.model.library
        task = {} if role is None else {"task": role}
        with self.runtime.autocast():
            embeddings = library.encode(
                texts,
                prompt=prompt,
                batch_size=1 if self.model.reads_padding else len(texts),
                convert_to_tensor=True,
                show_progress_bar=False,
                **task,
            )
        return embeddings.float()[:, : self.width]


def token_batches(lengths: Sequence[int], batch_tokens: int, *, is_padded: bool = True) -> list[np.ndarray]:
    """Return batches of row numbers, the longest texts first, each of at most `batch_tokens`
    positions with its padding, or of one text. Unless `is_padded`, the texts of a batch are equally long.

    `lengths` (N): tokens of each text.
    """
    negated = -np.asarray(lengths)
    order = np.argsort(negated, kind="stable")  # longest first
    ascending = negated[order]
    batches, start = [], 0
    while start < len(order):
        # the first text of a batch is its longest, and the others are padded to its length
        length = max(lengths[order[start]], 1)
        size = max(batch_tokens // length, 1)
        if not is_padded:
            size = min(size, int(np.searchsorted(ascending, ascending[start], side="right")) - start)
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


def split_into_chunks(texts: list[str], encoder: Encoder, *, overlap: int | None) -> list[list[Chunk]]:
    """Return the chunks of each text, each of at most the encoder's max_length in tokens.

    Neighbours share about `overlap` tokens; None: no text is split. A chunk ends between two words,
    unless a word alone is too long. A text that fits stays whole. Raises UserError as chunk_size()
    does.
    """
    if overlap is None:
        return [[Chunk(0, text)] for text in texts]
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
    tokenizer: "Tokenizer | PreTrainedTokenizerBase",
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


def _tokenize(texts: list[str], tokenizer: "Tokenizer | PreTrainedTokenizerBase") -> "Tokens | BatchEncoding":
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
    name = config.model or bundled.MINILM
    model = load_model(name, cache_dir=config.cache_dir)
    max_length = _chosen_length(model, config.max_length)
    if config.dimensions is not None:
        if config.dimensions > model.width:
            problem = f"the model's embeddings have {model.width} numbers"
            raise UserError(f"--dimensions {config.dimensions}: {problem}; keep fewer")
        model.width = config.dimensions
    given = {"query": config.query_prompt, "document": config.document_prompt}
    prompts = {role: prompt for role, prompt in given.items() if prompt is not None}
    if flags := missing_prompts(name, model, prompts):
        problem = "it was trained with prompts that no file of it names"
        note(f"--model {name}: {problem}; give {flags}")
    _move(model, runtime, max_length)
    is_static = bool(model.modules) and isinstance(model.modules[0], StaticEmbedding)
    return Encoder(
        reading.full_name(name),
        model,
        runtime,
        max_length=max_length,
        batch_tokens=config.batch_tokens
        or (STATIC_TOKENS if is_static else BATCH_TOKENS[runtime.device.type]),
        cache_dir=config.cache_dir,
        prompts=prompts,
    )


def load_index_encoder(
    config: EncoderConfig, runtime: Runtime, index: str, settings: Settings | None
) -> Encoder:
    """Return the encoder of an index with these settings; refuse flags that name another. `settings` is None
    for an index that does not exist yet.
    """
    if settings is None:
        return load_encoder(config, runtime)
    encoder = load_encoder(config.with_defaults(settings), runtime)
    if config.dimensions is None:  # as many of the model's as the index was made with
        encoder.model.width = min(encoder.width, settings["width"])
    check_settings(index, encoder.identity(), settings)
    return encoder


def _chosen_length(model: SentenceModel, wanted: int | None) -> int:
    """Return how many tokens of a text a model reads: as many as `wanted`, or by default the number that it
    was made for. Raises UserError for fewer than its special tokens take, and for more than it can take.
    """
    if wanted is None:
        return min(model.max_length, model.positions or model.max_length)
    special = model.tokenizer.num_special_tokens_to_add()
    if wanted <= special or (model.positions and wanted > model.positions):
        most = f" and at most {model.positions}" if model.positions else ""
        limits = f"more than {special} (the special tokens){most}"
        raise UserError(f"--max-length {wanted}: the model reads {limits} tokens")
    return wanted


def _move(model: SentenceModel, runtime: Runtime, max_length: int) -> None:
    """Put a model onto the device, in the precision of the runtime, to read `max_length` tokens."""
    if model.library is not None:
        model.library.to(runtime.device)
        parts: Iterable[Any] = model.library.modules()
        for part in parts:
            if hasattr(part, "auto_model"):
                part.max_seq_length = min(max_length, part.max_seq_length or max_length)
    model.modules = [module.to(runtime.device) for module in model.modules]
    if model.modules and isinstance(model.modules[0], Transformer) and runtime.precision != "fp32":
        for module in model.modules[0].modules():
            if isinstance(module, torch.nn.Linear):  # autocast would do it again for each batch
                module.to(DTYPES[runtime.precision])


def load_reranker(name: str | None, runtime: Runtime, *, cache_dir: str | None) -> "CrossEncoder | None":
    """Return the cross-encoder that --rerank names, on its device; None stays None. Raises
    UserError when it can't be read, or gives several scores per pair.
    """
    if name is None:
        return None
    from sentence_transformers import CrossEncoder  # seconds, and only this needs it

    from common import models

    folder = sources.find_folder(
        name, kind="cross-encoder", flag="--rerank", cache_dir=cache_dir, organization="cross-encoder"
    )
    model = models.load_sentence_model(CrossEncoder, folder, name=name, flag="--rerank")
    model = model.to(runtime.device)
    if model.num_labels != 1:
        advice = "name a cross-encoder with one, such as cross-encoder/ms-marco-MiniLM-L6-v2"
        raise UserError(f"--rerank {name}: it gives {model.num_labels} scores per pair; {advice}")
    speedups.use_fast_attention(model[0].auto_model)
    speedups.use_first_token(model[0].auto_model)
    return model
