"""Texts -> vectors: what SentenceTransformer.encode does, written out.

Identical texts are encoded once; texts are sorted by tokens, not characters, and cut into batches
of at most `batch_tokens` positions, so that little is padding; the transformer runs in bf16 where
the processor has it, what follows it (pooling, dense layers, normalisation: the model's own
modules) in fp32. Under torchrun the batches are dealt out to the processes: each is computed by
one of them, exactly as one process would. Texts are tokenised before they are computed, not
meanwhile: on a CPU both want the same cores.
"""

import json
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed
from sentence_transformers import SentenceTransformer

from common import reading, speedups
from common.errors import UserError
from common.runtime import Runtime
from common.search import loading

# on a CPU more falls out of the cache, on a GPU less leaves it idle
BATCH_TOKENS = {"cpu": 4096, "cuda": 131_072, "mps": 16_384}
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # as encode_document looks for them


@dataclass
class Encoder:
    """A model on its device, and what it saw: `num_encoded` texts went through it, `num_cut` of
    them lost their end.
    """

    name: str
    model: SentenceTransformer
    runtime: Runtime
    max_length: int  # tokens, special ones included
    batch_tokens: int
    num_encoded: int = 0
    num_cut: int = 0
    fingerprint: str = field(default="")

    @property
    def width(self) -> int:
        """The number of dimensions of a vector."""
        return self.model.get_embedding_dimension()

    @property
    def tokenizer(self):
        """The model's own tokenizer."""
        return self.model[0].tokenizer

    def identity(self) -> dict:
        """Return what vectors must share to be compared: fingerprint, width, pooling, max_length;
        and the name, for people.
        """
        return {
            "model": self.name,
            "fingerprint": self.fingerprint,
            "width": self.width,
            "pooling": loading.describe_pooling(self.model),
            "max_length": self.max_length,
        }

    def prompt(self, role: str | None) -> str:
        """Return what is put before each text of a role ("query", "document", None: neither), as
        encode_query, encode_document and encode do.
        """
        names = {"query": ("query",), "document": DOCUMENT_PROMPTS, None: ()}[role]
        # "" counts as found
        found = next((name for name in names if name in self.model.prompts), self.model.default_prompt_name)
        return self.model.prompts.get(found) or ""

    def encode(self, texts: list[str], *, role: str | None = None) -> np.ndarray:
        """Return the vectors (texts, width) of texts in float32, as the model gives them. Under
        torchrun the other processes must be in follow().
        """
        if self.runtime.world_size > 1:
            _broadcast(json.dumps([texts, role]), self.runtime)
        return self._encode(texts, role)

    def encode_unit(self, texts: list[str], *, role: str | None = None) -> np.ndarray:
        """Return the vectors scaled to length 1; a vector of zeros, or one that is not finite,
        becomes NaN.
        """
        vectors = self.encode(texts, role=role)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(
            vectors, norms, out=np.full_like(vectors, np.nan), where=np.isfinite(norms) & (norms > 0)
        )

    def follow(self):
        """Compute this process's share of all that the main process encodes, until it calls
        release().
        """
        while (message := _broadcast(None, self.runtime)) != "":
            self._encode(*json.loads(message))

    def release(self):
        """Let the other processes of torchrun leave follow()."""
        if self.runtime.world_size > 1 and self.runtime.is_main:
            _broadcast("", self.runtime)

    @torch.inference_mode()
    def _encode(self, texts: list[str], role: str | None) -> np.ndarray:
        # identical texts: encoded once
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        prompt = self.prompt(role)
        tokens, num_cut = self.tokenize([prompt + text for text in places])
        vectors = torch.zeros(len(places), self.width, device=self.runtime.device)
        batches = token_batches([len(ids) for ids in tokens["input_ids"]], self.batch_tokens)
        # around all batches: the cast weights are kept as long as it is open
        with self.runtime.autocast():
            for batch in batches[self.runtime.rank :: self.runtime.world_size]:
                vectors[torch.from_numpy(batch).to(vectors.device)] = self._forward(tokens, batch, prompt)
        self.runtime.all_reduce_sum(vectors)  # each row is zero in all processes but one
        self.num_encoded, self.num_cut = self.num_encoded + len(places), self.num_cut + num_cut
        return vectors.cpu().numpy()[[places[text] for text in texts]].reshape(len(texts), self.width)

    def tokenize(self, texts: list[str]) -> tuple[dict, int]:
        """Return the tokens of texts, cut at max_length, and how many were longer than that."""
        if not texts:
            return {"input_ids": []}, 0
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length, padding=False)
        if tokens.encodings is not None:
            return tokens, sum(bool(encoding.overflowing) for encoding in tokens.encodings)
        whole = self.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
        return tokens, sum(len(ids) > self.max_length for ids in whole)

    def _forward(self, tokens: dict, batch: np.ndarray, prompt: str) -> torch.Tensor:
        """Return the vectors (batch, width) of some of the tokenised texts."""
        columns = {name: [tokens[name][row] for row in batch] for name in tokens}
        features = self.tokenizer.pad(columns, padding=True, return_tensors="pt").to(self.runtime.device)
        features = self.model[0](dict(features))  # token_embeddings (B, T, hidden)
        if prompt:  # some models' pooling leaves the prompt out
            last = self.tokenizer(prompt)["input_ids"]
            features["prompt_length"] = len(last) - (last[-1] in self.tokenizer.all_special_ids)
        with torch.autocast(self.runtime.device.type, enabled=False):
            features["token_embeddings"] = features["token_embeddings"].float()
            for module in list(self.model)[1:]:
                features = module(features)
        return features["sentence_embedding"]


def token_batches(lengths, batch_tokens: int) -> list[np.ndarray]:
    """Return batches of row numbers, the longest texts first, each of at most `batch_tokens`
    positions with its padding, or of one text.

    `lengths` (N): tokens of each text.
    """
    order, batches, start = np.argsort(-np.asarray(lengths), kind="stable"), [], 0
    while start < len(order):
        # the first is the longest: all are padded to it
        size = max(batch_tokens // max(lengths[order[start]], 1), 1)
        batches.append(order[start : start + size])
        start += size
    return batches


def load(
    name: str,
    runtime: Runtime,
    *,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    cache_dir: str | None = None,
) -> Encoder:
    """Return the encoder of a sentence-transformers model. Raises UserError when it can't be read,
    or can't hold `max_length` tokens.
    """
    model = loading.load_embedder(name, cache_dir=cache_dir)
    holds = max_positions(model)
    special = model[0].tokenizer.num_special_tokens_to_add()
    if max_length is not None and not special < max_length <= (holds or max_length):
        raise UserError(
            f"--max-length {max_length}: the model takes more than {special} (the special tokens) and at most"
            f" {holds} tokens"
        )
    own = min(
        length for length in (model.max_seq_length, holds, model[0].tokenizer.model_max_length) if length
    )
    fingerprint = loading.fingerprint(model)
    speedups.use_fast_attention(model[0].auto_model)
    return Encoder(
        reading.full_name(name),
        model.to(runtime.device).eval(),
        runtime,
        max_length=max_length or own,
        batch_tokens=batch_tokens or BATCH_TOKENS[runtime.device.type],
        fingerprint=fingerprint,
    )


def max_positions(model: SentenceTransformer) -> int | None:
    """Return the most tokens that a model's position embeddings hold, None if nothing limits it.

    RoBERTa and MPNet number positions from the padding id + 1, so that 514 embeddings hold 512
    tokens.
    """
    for name, module in model[0].auto_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(model[0].auto_model.config, "max_position_embeddings", None)


def _broadcast(message: str | None, runtime: Runtime) -> str:
    """Return the main process's message on every process. As bytes: torch's own way for objects is
    pickle.
    """
    content = np.frombuffer((message or "").encode(), dtype=np.uint8)
    size = runtime.broadcast_int(len(content))
    data = torch.zeros(size, dtype=torch.uint8, device=runtime.device)
    if runtime.is_main:
        data.copy_(torch.from_numpy(content.copy()))
    torch.distributed.broadcast(data, src=0)
    return data.cpu().numpy().tobytes().decode()
