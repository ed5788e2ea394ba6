"""Which architectures of transformers train_classifier.py serves: each trains two steps, resumes,
saves, reloads and predicts, with a tiny random model; what can't be done is one line.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

import train_classifier
from conftest import exit_code_in_process, heavy, make_sentences, train_wordpiece
from language_models import train_byte_bpe

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
KEYS = {**SIZES, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}  # attention of DeBERTa
ENCODERS = {
    "bert": SIZES,
    "roberta": {**SIZES, "pad_token_id": 0},
    "xlm-roberta": {**SIZES, "pad_token_id": 0},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    "albert": {**SIZES, "embedding_size": 16},
    "electra": {**SIZES, "embedding_size": 16},
    "deberta": {**SIZES, **DISENTANGLED, "max_relative_positions": 16},
    "deberta-v2": {**SIZES, **DISENTANGLED, "position_buckets": 8, "conv_kernel_size": 3},
    "deberta-v3": {
        **SIZES,
        **DISENTANGLED,
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "mpnet": {**SIZES, "pad_token_id": 0},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "pad_token_id": 0},
    "longformer": {**SIZES, "attention_window": 8, "pad_token_id": 0},
    "big_bird": {**SIZES, "block_size": 4, "num_random_blocks": 1},
    "funnel": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]},
    "modernbert": {**SIZES, "global_attn_every_n_layers": 2, "local_attention": 8},
    "nomic_bert": SIZES,
}
DECODERS = {  # their tokenizer has no padding token
    "gpt2": GPT,
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "llama": KEYS,
    "mistral": {**KEYS, "sliding_window": 8},
    "qwen2": KEYS,
    "qwen3": {**KEYS, "head_dim": 8},
    "gemma": {**KEYS, "head_dim": 8},
    "gemma2": {**KEYS, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {**KEYS, "head_dim": 8, "sliding_window": 8},
}
SMALL_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BOTH = {  # an encoder and a decoder
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
    },
    "t5": SMALL_T5,
    "mt5": SMALL_T5,
}
# ids of the tokenizers that are made here
WORDPIECE_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 0}
BYTE_BPE_IDS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {**ENCODERS, **DECODERS, **BOTH}
BY_DEFAULT = ("xlnet", "llama")
CASES = [kind if kind in BY_DEFAULT else heavy(kind) for kind in FAMILIES]
CPU = ["--device", "cpu", "--precision", "fp32"]
TEXTS = [text for text, _ in make_sentences(40, seed=7)]


def save(folder: Path, kind: str) -> Path:
    """Write a random model without a head, with a tokenizer."""
    tokenizer = train_wordpiece(TEXTS)
    if kind in DECODERS:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_byte_bpe().backend_tokenizer, eos_token="<|im_end|>"
        )
    tokenizer.save_pretrained(folder)
    ids = BYTE_BPE_IDS if kind in DECODERS else WORDPIECE_IDS
    config = AutoConfig.for_model(
        "deberta-v2" if kind == "deberta-v3" else kind,
        **{**ids, **FAMILIES[kind], "vocab_size": len(tokenizer)},
    )
    if kind == "funnel":  # it has two models, and the library looks for the one that is named
        config.architectures = ["FunnelModel"]
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def classify(*flags: object) -> int:
    return exit_code_in_process(train_classifier, [*flags, *CPU])


@pytest.mark.parametrize("kind", CASES)
def test_it_trains_resumes_and_predicts(kind, sentences_csv, tmp_path, capsys):
    """The oracle of the predictions is the library's model on one text at a time, without padding."""
    flags = ["--model", save(tmp_path / kind, kind), "--dataset", sentences_csv, "--epochs", 1]
    flags += ["--max-train-samples", 16, "--max-eval-samples", 8, "--batch-size", 8, "--save-every", 1]
    flags += ["--max-length", 32, "--cache-dir", tmp_path / "cache", "--output-dir", tmp_path / "run"]
    assert classify(*flags) == 0, capsys.readouterr()
    weights = (tmp_path / "run/best/model.safetensors").read_bytes()
    first, _ = sorted((tmp_path / "run/checkpoints").iterdir())
    assert classify(*flags, "--resume", first) == 0, capsys.readouterr()
    assert (tmp_path / "run/best/model.safetensors").read_bytes() == weights

    best, lines = tmp_path / "run/best", tmp_path / "new.txt"
    lines.write_text("\n".join(TEXTS) + "\n")
    capsys.readouterr()
    assert classify("--model", best, "--predict", lines) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(best).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(best)
    for text, answer in zip(TEXTS, answers, strict=True):
        with torch.no_grad():
            encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
            logits = model(**encoded).logits[0]
        if encoded["input_ids"].shape[1] < 32:  # else it is read in chunks
            expected = dict(zip(answer["scores"], logits.softmax(-1).tolist()))
            assert answer["scores"] == pytest.approx(expected, abs=2e-5), text


def save_t5_tokenizer(folder: Path) -> int:
    """Write a tokenizer as T5 has it, whose vocabulary of pieces holds the mark of an end, and
    return its size.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    options = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def test_an_encoder_without_the_decoder_of_its_classifier_is_refused(tmp_path, capsys):
    model = save(tmp_path / "t5", "t5")
    config = AutoConfig.for_model("t5", **SMALL_T5, vocab_size=save_t5_tokenizer(model))
    transformers.T5EncoderModel(config).save_pretrained(model)
    (tmp_path / "data.csv").write_text("text,label\n" + "a film,x\na book,y\n" * 9)
    flags = ["--dataset", tmp_path / "data.csv", "--output-dir", tmp_path / "run"]
    assert classify("--model", model, *flags, "--cache-dir", tmp_path / "cache") == 2
    said = capsys.readouterr().err
    assert str(model) in said and "an encoder alone, and a T5ForSequenceClassification has a decoder" in said


@pytest.mark.parametrize(
    "kind, mark, is_pair",
    [
        heavy("bart", "[SEP]", False),
        ("t5", "</s>", False),
        heavy("t5", "\uff1c/s\uff1e", False),  # becomes </s> when the tokenizer normalises it
        heavy("bert", "[SEP]", True),
    ],
)
def test_a_mark_of_the_tokenizer_in_a_text_is_no_mark(kind, mark, is_pair, tmp_path, capsys):
    """BART and T5 can't read two ends, and a pair would have three parts. Oracle: the library's
    model on the text with its unknown token in the place of the mark.
    """
    model = save(tmp_path / kind, kind)
    if kind == "t5":
        size = save_t5_tokenizer(model)
        ids = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}
        config = AutoConfig.for_model("t5", **SMALL_T5, **ids, vocab_size=size)
        AutoModel.from_config(config).save_pretrained(model)
    rows = [f"{text}\t{text}\t{label}" for text, label in make_sentences(40, seed=7)]
    rows[2] = f"the film {mark} was\tgood\tpos"
    data = tmp_path / "data.tsv"
    data.write_text("\n".join(["text\tother\tlabel", *rows]) + "\n", encoding="utf-8")
    flags = ["--text-column", "text,other", "--text-mode", "pair"] if is_pair else []
    flags += ["--model", model, "--dataset", data, "--epochs", 1, "--cache-dir", tmp_path / "cache"]
    flags += ["--max-length", 64, "--output-dir", tmp_path / "run"]
    assert classify(*flags) == 0, capsys.readouterr()
    said = rf"1 text holds a mark of the tokenizer, as '{re.escape(mark)}' in \w+ row 3: the unknown token"
    assert bool(re.search(said, capsys.readouterr().out)) == mark.isascii()

    texts = ["the film", f"the film {mark} was", f"{mark}{mark} the film"]
    lines = tmp_path / "new.txt"
    lines.write_text("".join(f"{text}\tgood\n" if is_pair else f"{text}\n" for text in texts))
    assert classify("--model", tmp_path / "run/best", "--predict", lines) == 0, capsys.readouterr()
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/best").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/best")
    end = tokenizer.convert_tokens_to_ids("</s>" if kind == "t5" else "[SEP]")
    for text, answer in zip(texts, answers, strict=True):
        encoded = tokenizer(
            text, *(["good"] if is_pair else []), return_special_tokens_mask=True, return_tensors="pt"
        )
        within = (encoded["input_ids"] == end) & (encoded.pop("special_tokens_mask") == 0)
        assert within.sum() == text.count(mark)
        encoded["input_ids"][within] = tokenizer.unk_token_id
        with torch.no_grad():
            logits = trained(**encoded).logits[0]
        expected = dict(zip(answer["scores"], logits.softmax(-1).tolist()))
        assert answer["scores"] == pytest.approx(expected, abs=2e-5), text


REFUSED: dict[str, tuple[Callable[[], transformers.PreTrainedModel], tuple[str, ...]]] = {
    "mamba": (
        lambda: AutoModel.from_config(
            AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=1, vocab_size=300)
        ),
        ("kind of model (Mamba)", "name another"),
    ),
    "T5's encoder alone": (
        lambda: transformers.T5EncoderModel(transformers.T5Config(**SMALL_T5, vocab_size=300)),
        ("decoder",),
    ),
    "reformer": (
        lambda: transformers.ReformerModelWithLMHead(
            transformers.ReformerConfig(
                hidden_size=32,
                attn_layers=["local"],
                num_attention_heads=2,
                attention_head_size=16,
                axial_pos_shape=[8, 8],
                axial_pos_embds_dim=[16, 16],
                vocab_size=300,
                is_decoder=True,
            )
        ),
        ("a reformer", "one length"),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_done_is_one_line(kind, sentences_csv, tmp_path, capsys):
    make, parts = REFUSED[kind]
    make().save_pretrained(tmp_path / "model")
    train_wordpiece(TEXTS).save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--dataset", sentences_csv, "--cache-dir", tmp_path / "cache"]
    capsys.readouterr()
    assert classify(*flags, "--output-dir", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(part in said for part in ("--model", *parts)), said
    assert not (tmp_path / "run").exists()
