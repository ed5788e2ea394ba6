"""What the tests share: small real models with trained tokenizers, a small labelled file, and the scripts as a user calls them."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
POSITIVE, NEGATIVE = ["good", "fine", "great", "lovely"], ["bad", "awful", "poor", "grim"]
COMMON = ["the", "film", "was", "and", "it", "so", "very", "what", "a", "story", "with", "actors", "that", "I", "saw", "on", "monday"]


def make_sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return (text, label) pairs, half `pos` and half `neg`: easy to learn, of 4 to 30 words, all different."""
    generator = random.Random(seed)
    pairs = []
    for number in range(count):
        words, label = (POSITIVE, "pos") if number % 2 else (NEGATIVE, "neg")
        text = [generator.choice(words) if generator.random() < 0.4 else generator.choice(COMMON) for _ in range(generator.randint(3, 29))]
        pairs.append((" ".join([generator.choice(words), *text, f"n{number}"]), label))
    return pairs


def train_wordpiece(texts: list[str], vocab_size: int = 300) -> BertTokenizerFast:
    """Train a WordPiece tokenizer of BERT's kind with the `tokenizers` library."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=specials))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a BERT of two layers, 32 wide, 64 positions, no dropout, and its own trained tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = train_wordpiece([text for text, _ in make_sentences(200)])
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentences_csv(tmp_path_factory) -> Path:
    """A CSV file of 120 labelled sentences."""
    path = tmp_path_factory.mktemp("data") / "sentences.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in make_sentences(120)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """One cache folder for all tests of a session: never the user's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def run_script():
    """Return a function that runs a script of the project in a process of its own, without a network, and returns what it did."""
    def run(*command, stdin: str | None = None, check: bool = True, timeout: float = 300, **environment) -> subprocess.CompletedProcess:
        launcher = [] if command[0] == "torchrun" else [sys.executable]
        if command[0] == "torchrun":
            command = [str(Path(sys.executable).with_name("torchrun")), *command[1:]]
        done = subprocess.run([*launcher, *map(str, command)], cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=timeout,
                              env={**os.environ, "HF_HUB_OFFLINE": "1", **environment})
        assert not check or done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done
    return run
