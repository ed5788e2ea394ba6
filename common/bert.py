"""BERT written out, and read from a Hugging Face folder.

`BertModel` is Devlin et al. 2018 in plain PyTorch: embeddings of words, positions and segments,
then layers of self-attention and a feed-forward network, each followed by a residual connection and
a layer normalisation. RoBERTa and XLM-RoBERTa count positions from the padding id on, DistilBERT
has no segments. The one change is that queries, keys and values come from one matrix product: it is
wider than three small ones, and faster. There is no dropout: the models here are not trained.

transformers has the same models, but importing one takes seconds; this file needs only PyTorch and
`safetensors`. It reads a folder only if it knows everything in it, and gives the numbers of
transformers then (tests/integration/test_bert.py). Otherwise it raises `NotSupported`, and the caller uses
transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from common import speedups
from common.errors import NotSupported
from common.files import read_settings

# The configuration ------------------------------------------------------------------------------

# What transformers assumes where config.json is silent.
BERT_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "use_cache": True,
    "classifier_dropout": None,
    "is_decoder": False,
    "add_cross_attention": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": True,
}
ROBERTA_CHANGES = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": BERT_DEFAULTS,
    "roberta": BERT_DEFAULTS | ROBERTA_CHANGES | {"vocab_size": 50265},
    "xlm-roberta": BERT_DEFAULTS | ROBERTA_CHANGES,
    "distilbert": {
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "sinusoidal_pos_embds": False,
        "n_layers": 6,
        "n_heads": 12,
        "dim": 768,
        "hidden_dim": 3072,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation": "gelu",
        "initializer_range": 0.02,
        "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    },
}
# Another value would change what is computed here. (Whether DistilBERT's positions were made of
# sines doesn't matter: they are in the file.)
COMMON = {  # settings of every kind of model
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
}
ONLY = COMMON | {"is_decoder": False, "add_cross_attention": False}
ONLY |= {"position_embedding_type": "absolute"}
# Names, versions, training, and what no model of these kinds reads.
NO_MATTER: dict[str, type | None] = {  # and the type of each; None: any
    "_name_or_path": str,
    "architectures": list,
    "directionality": None,
    "finetuning_task": None,
    "gradient_checkpointing": None,
    "id2label": dict,
    "label2id": dict,
    "model_type": str,
    "output_past": None,
    "pooler_fc_size": None,
    "pooler_num_attention_heads": None,
    "pooler_num_fc_layers": None,
    "pooler_size_per_head": None,
    "pooler_type": None,
    "problem_type": None,
    "transformers_version": str,
}


@dataclass(frozen=True)
class BertConfig:
    """The shape of a model, and all its settings, with the names and defaults of transformers."""

    model_type: str
    vocabulary: int
    width: int
    num_layers: int
    num_heads: int
    inner_width: int  # of the feed-forward networks
    num_positions: int
    activation: Callable[[torch.Tensor], torch.Tensor]
    norm_eps: float
    pad_token_id: int
    settings: dict[str, Any]
    num_types: int = 0  # segments; 0 for a model without them

    @property
    def first_position(self) -> int:
        """The number of a text's first position: RoBERTa begins after the padding id."""
        return self.pad_token_id + 1 if self.model_type in ("roberta", "xlm-roberta") else 0


LARGEST = 2**31  # a size
SIZES = {  # the fields of BertConfig -> settings
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "inner_width": "intermediate_size",
    "num_positions": "max_position_embeddings",
}
# what DistilBERT calls them
DISTILBERT_SETTINGS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}


def _is_known(key: str, value: Any, defaults: dict[str, Any]) -> bool:
    """Return whether a setting is one that transformers would take, and that is computed here."""
    if key in ONLY:
        return type(value) is type(ONLY[key]) and value == ONLY[key]
    if key in ("dtype", "torch_dtype"):
        return value in (None, "float32", "float16", "bfloat16")
    if key in NO_MATTER:
        return isinstance(value, NO_MATTER[key] | None) if NO_MATTER[key] else True
    if key not in defaults:
        return False
    if "dropout" in key:
        is_number = type(value) in (float, int) and 0 <= value <= 1
        return is_number or (value is None and defaults[key] is None)
    if defaults[key] is None:  # the ids of tokens
        return value is None or type(value) is int
    return type(value) is type(defaults[key])


def read_config(folder: Path) -> BertConfig:
    """Return the configuration of the model in a folder. Raises NotSupported for a setting that is not
    computed here.
    """
    given = read_settings(folder / "config.json")
    model_type = given.get("model_type")
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        raise NotSupported(f"model_type {model_type!r}")
    for key, value in given.items():
        if not _is_known(key, value, DEFAULTS[model_type]):
            raise NotSupported(f"the setting {key} {value!r}")
    settings: dict[str, Any] = DEFAULTS[model_type] | given
    is_distilled = model_type == "distilbert"

    def setting(name: str) -> Any:
        return settings[DISTILBERT_SETTINGS.get(name, name) if is_distilled else name]

    sizes = {field: setting(name) for field, name in SIZES.items()}
    if not is_distilled:
        sizes["num_types"] = settings["type_vocab_size"]
    if not all(0 < size < LARGEST for size in sizes.values()):
        raise NotSupported(f"the sizes {sizes}")
    if sizes["width"] % sizes["num_heads"]:
        raise NotSupported(f"{sizes['width']} dimensions for {sizes['num_heads']} heads")
    activation, pad = setting("hidden_act"), setting("pad_token_id")
    if activation not in ("gelu", "relu"):
        raise NotSupported(f"the activation {activation!r}")
    if not 0 <= pad < sizes["vocabulary"]:
        raise NotSupported(f"pad_token_id {pad!r}")
    return BertConfig(
        **sizes,
        model_type=model_type,
        activation=F.relu if activation == "relu" else F.gelu,
        norm_eps=settings.get("layer_norm_eps", 1e-12),
        pad_token_id=pad,
        settings=settings,
    )


# The model --------------------------------------------------------------------------------------


class BertLayer(nn.Module):
    """Self-attention and a feed-forward network."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.activation = config.activation
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.inner = nn.Linear(width, config.inner_width)
        self.output = nn.Linear(config.inner_width, width)
        self.output_norm = nn.LayerNorm(width, eps=config.norm_eps)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, *, only_first: bool = False
    ) -> torch.Tensor:
        """Return the next hidden states (B, T, width), or (B, 1, width) with `only_first`, which
        leaves out what the first token's does not need; `mask` (B, 1, 1, T) is True at texts'
        tokens, None if there is no padding.
        """
        batch, tokens, width = hidden.shape
        projected = self.query_key_value(hidden)  # (B, T, 3 x width)
        heads = projected.view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if only_first:  # from here on, T of the queries is 1
            hidden, query = hidden[:, :1], query[:, :, :1]
        attended = speedups.attention(query, key, value, mask)  # (B, H, T, D)
        attended = attended.transpose(1, 2).flatten(2)  # (B, T, width)
        hidden = self.attention_norm(self.attention_output(attended) + hidden)
        return self.output_norm(self.output(self.activation(self.inner(hidden))) + hidden)


def _embedding(rows: int, width: int, **options: Any) -> nn.Embedding:
    # nn.Embedding() draws numbers, and on the "meta" device that imports PyTorch's compiler: two seconds
    return nn.Embedding.from_pretrained(torch.empty(rows, width), **options)


class BertModel(nn.Module):
    """The encoder: tokens of texts -> one vector for each token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        pad = config.pad_token_id if config.first_position else None
        self.word_embeddings = _embedding(config.vocabulary, config.width)
        self.position_embeddings = _embedding(config.num_positions, config.width, padding_idx=pad)
        types = config.num_types
        self.token_type_embeddings = _embedding(types, config.width) if types else None
        self.embedding_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList([BertLayer(config) for _ in range(config.num_layers)])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        *,
        only_first: bool = False,
    ) -> torch.Tensor:
        """Return the hidden states (B, T, width) of the last layer, or (B, 1, width), the first
        token's, with `only_first`. All three tensors are (B, T); `attention_mask` is 0 at padding.
        """
        hidden = self.word_embeddings(input_ids)  # (B, T, width)
        if self.token_type_embeddings is not None:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            hidden = hidden + self.token_type_embeddings(types)
        hidden = hidden + self.position_embeddings(self._positions(input_ids))
        hidden = self.embedding_norm(hidden)
        # without a mask, the fused kernel of attention is faster
        mask = None if attention_mask.all() else attention_mask.bool()[:, None, None, :]
        *lower, last = self.layers
        for layer in lower:
            hidden = layer(hidden, mask)
        return last(hidden, mask, only_first=only_first)

    def _positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the number of each token's position, (T) or (B, T)."""
        if self.config.first_position == 0:
            return torch.arange(input_ids.shape[1], device=input_ids.device)
        # RoBERTa counts what is not the padding token, wherever the padding is
        is_text = input_ids.ne(self.config.pad_token_id)
        return is_text.cumsum(dim=1) * is_text + self.config.pad_token_id


class Logits(NamedTuple):
    """What a classifier returns; transformers returns the same and more."""

    logits: torch.Tensor  # (B, C)


class BertClassifier(nn.Module):
    """The encoder with a head for classes, which reads the first token.

    The heads differ: BERT has a pooler, which belongs to the encoder there, and RoBERTa and
    DistilBERT a layer of the head.
    """

    def __init__(self, config: BertConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.pooler = nn.Linear(config.width, config.width)
        self.classifier = nn.Linear(config.width, num_classes)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes in the order of the logits."""
        names = self.config.settings.get("id2label")
        if names is None:
            return [f"LABEL_{number}" for number in range(self.classifier.out_features)]
        return [names[str(number)] for number in range(self.classifier.out_features)]

    def forward(self, **inputs: torch.Tensor) -> Logits:
        """Return the logits (B, C) of texts; the inputs are those of BertModel."""
        return Logits(self.head(self.bert(**inputs, only_first=True)[:, 0]))

    def head(self, first: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, C) of the hidden states of the first tokens (B, width)."""
        pooled = self.pooler(first)
        is_distilled = self.config.model_type == "distilbert"
        return self.classifier(pooled.relu() if is_distilled else pooled.tanh())


# The weights ------------------------------------------------------------------------------------

# our names -> those of transformers
EMBEDDING_NAMES = {
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "token_type_embeddings": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
}
LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "inner": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
DISTILBERT_LAYER_NAMES = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "inner": "ffn.lin1",
    "output": "ffn.lin2",
    "output_norm": "output_layer_norm",
}
FUSED = ("query", "key", "value")
PARTS = ("weight", "bias")
# the first part of the names of a model that was saved with a head
PREFIXES = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta.", "distilbert": "distilbert."}
ARCHITECTURES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "xlm-roberta": "XLMRobertaForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
}
HEADS = {  # the names of BertClassifier's pooler and classifier
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
}
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # in older files; no weights
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Tensors = dict[str, torch.Tensor]


def load_encoder(folder: Path) -> tuple[BertModel, Tensors]:
    """Return the encoder of a folder on the CPU in fp32, and its weights as transformers' AutoModel
    names them, with the pooler, which the encoder doesn't use.

    Raises NotSupported when that library is needed to read it, or to say what is wrong with it.
    """
    config, weights = read_config(folder), read_weights(folder)
    prefix = PREFIXES[config.model_type]
    if any(name.startswith(prefix) for name in weights):  # saved with a head, which is left out
        weights, _ = _split(weights, prefix)
    weights = {name: value for name, value in weights.items() if name not in BUFFERS}
    own_weights = dict(weights)
    if config.model_type != "distilbert":
        # transformers would draw random numbers for one that is missing
        shapes = {"weight": (config.width, config.width), "bias": (config.width,)}
        for part, shape in shapes.items():
            pooler = own_weights.pop(f"pooler.dense.{part}", None)
            if pooler is None or pooler.shape != shape:
                raise NotSupported("no weights of a pooler")
    with torch.device("meta"):  # without memory, and without drawing initial weights
        model = BertModel(config)
    _assign(model, _rename(own_weights, config))
    return model, weights


def load_classifier(folder: Path) -> BertClassifier:
    """Return the classifier of a folder, with the head that it was saved with, on the CPU in fp32.

    Raises NotSupported when transformers is needed to read it, or to say what is wrong with it.
    """
    config, weights = read_config(folder), read_weights(folder)
    if config.settings.get("architectures") != [ARCHITECTURES[config.model_type]]:
        raise NotSupported(f"architectures {config.settings.get('architectures')!r}")
    renamed = {}
    for own, theirs in zip(("pooler", "classifier"), HEADS[config.model_type]):
        for part in PARTS:
            if (value := weights.pop(f"{theirs}.{part}", None)) is None:
                raise NotSupported(f"no weights of {theirs}.{part}")
            renamed[f"{own}.{part}"] = value
    num_classes = len(renamed["classifier.bias"])
    numbers = [str(number) for number in range(num_classes)]
    if sorted(config.settings.get("id2label") or ("0", "1")) != sorted(numbers):
        raise NotSupported(f"{num_classes} classes, and other names")
    encoder, others = _split(weights, PREFIXES[config.model_type])
    if others:
        raise NotSupported(f"the weights {', '.join(sorted(others))}")
    encoder = {name: value for name, value in encoder.items() if name not in BUFFERS}
    renamed |= {f"bert.{name}": value for name, value in _rename(encoder, config).items()}
    with torch.device("meta"):
        model = BertClassifier(config, num_classes)
    _assign(model, renamed)
    return model


def read_weights(folder: Path) -> Tensors:
    """Return all weights of a folder in fp32, from one file or from several. Raises NotSupported
    when they are not safetensors of floating point numbers.
    """
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = [file.name]
    if not file.is_file():
        if not index.is_file():
            raise NotSupported("weights that are not in model.safetensors")
        listed = read_settings(index)
        if not all(isinstance(listed.get(part), dict) for part in ("weight_map", "metadata")):
            raise NotSupported(f"the list of files {index.name}")
        names = sorted({str(name) for name in listed["weight_map"].values()})
    weights: Tensors = {}
    for name in names:
        if Path(name).name != name:  # another folder
            raise NotSupported(f"the file of weights {name}")
        try:
            with safe_open(folder / name, framework="pt") as opened:
                weights |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise NotSupported(f"{name}: {error}") from error
    for name, value in weights.items():
        if value.dtype not in DTYPES and not name.endswith(BUFFERS):
            raise NotSupported(f"{name} in {value.dtype}")
        if value.is_floating_point() and value.numel():
            lowest, highest = torch.aminmax(value)
            if not (lowest.isfinite() and highest.isfinite()):
                raise NotSupported(f"{name}, which is not finite")
    return {name: value.float() for name, value in weights.items()}


def _split(weights: Tensors, prefix: str) -> tuple[Tensors, Tensors]:
    """Return the weights with a prefix, without it, and the others."""
    inside = {name: value for name, value in weights.items() if name.startswith(prefix)}
    others = {name: value for name, value in weights.items() if name not in inside}
    return {name.removeprefix(prefix): value for name, value in inside.items()}, others


def _rename(weights: Tensors, config: BertConfig) -> Tensors:
    """Return the weights of an encoder under the names of BertModel, queries, keys and values
    together. Raises NotSupported for one that BertModel doesn't have.
    """
    weights, renamed = dict(weights), {}
    is_distilled = config.model_type == "distilbert"
    layers = "transformer.layer" if is_distilled else "encoder.layer"
    layer_names = DISTILBERT_LAYER_NAMES if is_distilled else LAYER_NAMES

    def take(name: str) -> torch.Tensor:
        if name not in weights:
            raise NotSupported(f"no weights of {name}")
        return weights.pop(name)

    for own, theirs in EMBEDDING_NAMES.items():
        if own == "token_type_embeddings" and not config.num_types:
            continue
        for part in PARTS if own == "embedding_norm" else ("weight",):
            renamed[f"{own}.{part}"] = take(f"{theirs}.{part}")
    for number in range(config.num_layers):
        for part in PARTS:
            prefix = f"{layers}.{number}"
            values = {own: take(f"{prefix}.{name}.{part}") for own, name in layer_names.items()}
            fused = [values.pop(name) for name in FUSED]
            if len({value.shape for value in fused}) > 1:
                raise NotSupported("queries, keys and values of different widths")
            renamed[f"layers.{number}.query_key_value.{part}"] = torch.cat(fused)
            renamed |= {f"layers.{number}.{name}.{part}": value for name, value in values.items()}
    if weights:
        raise NotSupported(f"the weights {', '.join(sorted(weights))}")
    return renamed


def _assign(model: nn.Module, weights: Tensors) -> None:
    """Give a model its weights. Raises NotSupported when a shape differs."""
    for name, value in model.state_dict().items():
        if value.shape != weights[name].shape:
            found, wanted = tuple(weights[name].shape), tuple(value.shape)
            raise NotSupported(f"{name} of shape {found}, not {wanted}")
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
