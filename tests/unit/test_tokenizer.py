"""Tokenizers made by the `tokenizers` library alone against transformers' AutoTokenizer: the same
ids for any text, and everything else that a caller sees.
"""

import base64
import json
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizer, XLMRobertaTokenizer

from common import bundled
from common.errors import NotSupported
from common.tokenizer import read_language_tokenizer, read_tokenizer
from conftest import make_sentences, train_wordpiece
from language_models import CHAT_TEMPLATE, train_byte_bpe

# SentencePiece's table of replaced characters, made with a table of three: the ligature fi, the ohm
# sign, the ideographic space
CHARACTERS = (
    "eNod03e0D3QUAPDv+XnO8QdHeFaZCUkaRpK9QttMsleemb3r96yMR0XJyArPs7Kz914PoSij3qOMyqaM+Dz33M+599z/7rnn"
    "hpgQQjRdGJYQCSl5IiE1NhIS04cgo9GYSIhWDGkRXZQhEuINI/pMBhnJzJWkSMiiPkE2spKdWHKSg9zk4imeJC95yE8+ClKA"
    "QjxNYZ6hKEUoxrMU5zlK8Dwv8gIv8xKlKEkZSlOWVyjHq5TnNdJWqkBlKlGVKlSnGjWpQS1epw61eZM3eJu3eJd3qMt71Kce"
    "DWnA+zTiAxrzIU1oRlNa0JxWtKQNrWlHWz6iPXF0oBMd6UJnutGV7nxMT3rQm170pQ/96cdABjCYQXzKJ8SnHZihDGE4w/iM"
    "EYxiJGMYzVgS+JxxfMkXTGA8X/MV3zCRyUxiKlOYxrfMYDqzmMlsvmMuc5hHIvNJYiELWMwilvA9y1jKCpazipWs5gfWsob1"
    "rGMjG9jMJrayhe1sYyc72M0u9rKH/ezjIAc4RDJHOMxRfuQ4x/iZnzjJCX7lF05zirOc4Xd+I5UUznOOP/mDi1zgMpf4m7/S"
    "fo9/uMZVbnCdW9zkDrf5j3+5x10ecJ+H/P/499rHheT54RE/VItz"
)
SENTENCES = [text for text, _ in make_sentences(200)]
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
PIECES = [
    *(
        "film",
        "Good",
        "STORY",
        "n7",
        " ",
        "  ",
        "\n",
        "\t",
        "\u3000",
        "\u00a0",
        "\u200b",
        "\0",
        "\x07",
        "\ufeff",
    ),
    *("é", "e\u0301", "ﬁ", "Ω", "İ", "ß"),
    *("中文", "日本", "한국", "ไทย", "🙂", "👩\u200d👧", "\U0001d518"),
    *("[CLS]", "[MASK]", "[PAD]", "<s>", "<mask>", "</s>", "<unk>", "##m", "▁", "Ġ", "a" * 120),
    *(".", "...", "don't", "a.b", "-", "x_y", "$5", "½", "²"),
]
# any character but surrogates, which no tokenizer takes
CHARACTER = st.characters(exclude_categories=["Cs"])
TEXT = st.one_of(st.text(CHARACTER), st.lists(st.sampled_from(PIECES)).map("".join))


def make_wordpiece(folder):
    train_wordpiece(SENTENCES).save_pretrained(folder)


def make_byte_level(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ROBERTA_TOKENS, "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, **options))
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    RobertaTokenizer(vocab=model["vocab"], merges=merges).save_pretrained(folder)


def make_unigram(folder):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"special_tokens": ROBERTA_TOKENS[:4], "unk_token": "<unk>"}
    tokenizer.train_from_iterator(SENTENCES, trainers.UnigramTrainer(vocab_size=200, **options))
    model = json.loads(tokenizer.to_str())["model"]
    XLMRobertaTokenizer(vocab=[tuple(entry) for entry in model["vocab"]]).save_pretrained(folder)


def make_from_file(folder):
    """Without a class of its own, as many models on the Hub are."""
    tokenizer = train_wordpiece(SENTENCES).backend_tokenizer
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)


def change(path, **settings):
    """Change settings in a JSON file; None removes one."""
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def as_before_version_5(folder):
    """As older versions of transformers wrote the files: the special tokens in a file of their own."""
    config, roles = json.loads((folder / "tokenizer_config.json").read_text()), {}
    for name in [name for name in config if name.endswith("_token")]:
        roles[name] = config.pop(name)
    roles["mask_token"] = {"content": roles["mask_token"], "lstrip": True, "normalized": False}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def with_added_tokens(folder):
    """As versions 4.34 to 5 wrote them: the added tokens once more in the configuration."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    listed = {str(token.pop("id")): token for token in added}
    change(folder / "tokenizer_config.json", added_tokens_decoder=listed)


def with_character_table(folder):
    """The replacing of spaces that follows the table is lost in transformers, and so here."""
    table = base64.b64encode(zlib.decompress(base64.b64decode(CHARACTERS))).decode()
    steps = [
        {"type": "Precompiled", "precompiled_charsmap": table},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "x"},
    ]
    change(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})


def with_other_file(folder):
    """tokenizer.json says other things than the configuration, and transformers doesn't look."""
    change(
        folder / "tokenizer.json",
        normalizer={"type": "Lowercase"},
        truncation={"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
    )
    change(folder / "tokenizer_config.json", do_lower_case=False, strip_accents=True)


def configured(**settings):
    return lambda folder: change(folder / "tokenizer_config.json", **settings)


VARIANTS = {  # name: (model_type, how the files are made, how they are changed)
    "bert": ("bert", make_wordpiece, None),
    "bert, cased": ("bert", make_wordpiece, configured(do_lower_case=False)),
    "bert, Chinese": ("bert", make_wordpiece, configured(tokenize_chinese_chars=False, strip_accents=False)),
    "bert, another file": ("bert", make_wordpiece, with_other_file),
    "bert, older": ("bert", make_wordpiece, as_before_version_5),
    "bert, added tokens": ("bert", make_wordpiece, with_added_tokens),
    "bert without a class": ("bert", make_wordpiece, configured(tokenizer_class=None)),
    "bert with XLM-RoBERTa's": ("bert", make_unigram, None),
    "distilbert": ("distilbert", make_wordpiece, configured(tokenizer_class="DistilBertTokenizerFast")),
    "distilbert without a class": ("distilbert", make_wordpiece, configured(tokenizer_class=None)),
    "roberta": ("roberta", make_byte_level, None),
    "roberta with a space": (
        "roberta",
        make_byte_level,
        configured(add_prefix_space=True, trim_offsets=False),
    ),
    "roberta, older": ("roberta", make_byte_level, as_before_version_5),
    "xlm-roberta": ("xlm-roberta", make_unigram, None),
    "xlm-roberta with a table": ("xlm-roberta", make_unigram, with_character_table),
    "xlm-roberta, older": ("xlm-roberta", make_unigram, as_before_version_5),
    "from its file": ("bert", make_from_file, None),
    "from its file, limited": ("bert", make_from_file, configured(model_max_length=9)),
    "from its file, added tokens": ("bert", make_from_file, with_added_tokens),
}


def make(folder, variant):
    model_type, build, edit = VARIANTS[variant]
    build(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if edit:
        edit(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {variant: make(tmp_path_factory.mktemp("tokenizer"), variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def pairs(folders):
    """Our tokenizer and the library's, for each variant."""
    return {
        name: (read_tokenizer(path), AutoTokenizer.from_pretrained(path)) for name, path in folders.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_about_a_tokenizer_is_as_in_the_library(pairs, variant):
    ours, theirs = pairs[variant]
    descriptions = []
    for tokenizer in (ours, theirs):
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        descriptions.append(json.dumps({**description, "truncation": None, "padding": None}))
    assert descriptions[0] == descriptions[1]
    for name in ("model_input_names", "model_max_length", "pad_token", "pad_token_id", "is_fast"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.num_special_tokens_to_add() == theirs.num_special_tokens_to_add()


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15)
@given(texts=st.lists(TEXT, min_size=1, max_size=4), length=st.integers(3, 12))
def test_any_text_becomes_the_same_tokens(pairs, variant, texts, length):
    ours, theirs = pairs[variant]
    for options in (
        {"truncation": True, "max_length": length},
        {"truncation": False, "return_special_tokens_mask": True, "verbose": False},
        {"add_special_tokens": False, "return_offsets_mapping": True, "padding": False},
    ):
        own, other = ours(texts, **options), theirs(texts, **options)
        assert dict(own) == dict(other)
        for number, (encoding, its) in enumerate(zip(own.encodings, other.encodings)):
            assert own.word_ids(number) == other.word_ids(number)
            assert len(encoding.overflowing) == len(its.overflowing)
    assert dict(ours(texts[0])) == dict(theirs(texts[0]))


@pytest.mark.parametrize("variant", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("has_mask", [True, False])
def test_padding_is_that_of_the_library(pairs, variant, has_mask):
    ours, theirs = pairs[variant]
    columns = ours(["film", "a good story with actors", ""])
    names = [name for name in columns if has_mask or name != "attention_mask"]
    rows = [{name: columns[name][number] for name in names} for number in range(3)]
    padded, expected = ours.pad(rows), theirs.pad(rows, padding=True, return_tensors="pt")
    assert set(padded) == set(expected)
    assert all(torch.equal(padded[name], expected[name]) for name in padded)
    assert (padded["attention_mask"] == 0).any()


def test_the_bundled_tokenizer():
    folder = bundled.model_folder("bundled/all-MiniLM-L6-v2", kind="encoder")
    ours, theirs = read_tokenizer(folder, max_length=256), AutoTokenizer.from_pretrained(folder)
    texts = [*PIECES, *bundled.bbc_news()["text"][:300:30]]
    options = {"truncation": True, "max_length": 256}
    assert dict(ours(texts, **options)) == dict(theirs(texts, **options))
    assert ours.model_max_length == 256


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def edited(name, **settings):
    return lambda folder: change(folder / name, **settings)


ANOTHER = {"content": "[NEW]", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
UNKNOWN = {  # what makes transformers do something else, or fail
    "no tokenizer.json": remove("tokenizer.json"),
    "no configuration": remove("tokenizer_config.json"),
    "damaged JSON": write("tokenizer.json", "{"),
    "not a dictionary": write("tokenizer.json", "[]"),
    "no vocabulary": edited("tokenizer.json", model=None),
    "another class": configured(tokenizer_class="MPNetTokenizer"),
    "code": configured(auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}),
    "a setting without a name here": configured(keep_accents=True),
    "truncation at the left": configured(truncation_side="left"),
    "padding at the left": configured(padding_side="left"),
    "padding at the left in the file": edited("tokenizer.json", padding={"direction": "Left"}),
    "special tokens that are split": configured(split_special_tokens=True),
    "more special tokens": configured(extra_special_tokens=["[NEW]"]),
    "a special token that is not in the vocabulary": configured(bos_token="[NEW]"),
    "an added token with another id": configured(added_tokens_decoder={"7": ANOTHER}),
    "older added tokens": write("added_tokens.json", '{"[NEW]": 300}'),
    "a chat template": write("chat_template.jinja", "{{ messages }}"),
    "more chat templates": lambda folder: (folder / "additional_chat_templates").mkdir(),
    "no special token": configured(cls_token=None),
    "another kind of model": edited("config.json", model_type="mpnet"),
    "a class in the model's configuration": edited("config.json", tokenizer_class="BertTokenizer"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_not_known_is_left_to_the_library(tmp_path, what):
    UNKNOWN[what](make(tmp_path, "bert"))
    with pytest.raises(NotSupported):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        edited("tokenizer.json", post_processor=None),
        configured(added_tokens_decoder={"0": {**ANOTHER, "content": "[PAD]", "lstrip": True}}),
        edited("tokenizer.json", model={"type": "WordPiece"}),
    ],
)
def test_a_file_that_is_not_complete_is_left_to_the_library(tmp_path, edit):
    edit(make(tmp_path, "from its file"))
    with pytest.raises(NotSupported):
        read_tokenizer(tmp_path)


def test_a_text_that_no_tokenizer_takes_is_an_error(folders: dict[str, Path]):
    with pytest.raises(TypeError):
        read_tokenizer(folders["bert"])(["\ud800"])


# Those of language models -------------------------------------------------------------------------


def make_language(folder, *edits):
    """A byte-level tokenizer with a chat template in a file of its own, in the folder of a Llama."""
    tokenizer = train_byte_bpe()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for edit in edits:
        edit(folder)
    return folder


LANGUAGE = {
    "as saved": (),
    "a template in the settings": (
        remove("chat_template.jinja"),
        configured(chat_template="{{ messages[0].content }}"),
    ),
    "both": (configured(chat_template="{{ messages[0].content }}"),),
    "no template": (remove("chat_template.jinja"),),
    "more special tokens with a role": (configured(bos_token="<|im_start|>", unk_token="<|endoftext|>"),),
    "padded at the left": (configured(padding_side="left", clean_up_tokenization_spaces=True),),
    "before version 5": (configured(tokenizer_class="PreTrainedTokenizerFast"), with_added_tokens),
    "a bos token around each text": (
        configured(bos_token="<|im_start|>"),
        edited(
            "tokenizer.json",
            post_processor={
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [],
                "special_tokens": {
                    "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
                },
            },
        ),
    ),
}


@pytest.mark.parametrize("variant", LANGUAGE)
def test_a_language_models_tokenizer_is_the_librarys(tmp_path, variant):
    folder = make_language(tmp_path, *LANGUAGE[variant])
    ours, theirs = read_language_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for name in ("eos_token_id", "pad_token_id", "chat_template", "special_tokens_map"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.get_vocab() == theirs.get_vocab()
    added = [
        {number: repr(token) for number, token in t.added_tokens_decoder.items()} for t in (ours, theirs)
    ]
    assert added[0] == added[1]
    for text in (*PIECES, *SENTENCES[:20], "<|im_start|>user\nWhy?<|im_end|>", "don't . ,  ' s"):
        for options in ({}, {"add_special_tokens": False}):
            ids = ours(text, **options)["input_ids"]
            assert ids == theirs(text, **options)["input_ids"]
            for skips in (False, True):
                assert ours.decode(ids, skip_special_tokens=skips) == theirs.decode(
                    ids, skip_special_tokens=skips
                )


UNKNOWN_LANGUAGE = {
    "no tokenizer.json": remove("tokenizer.json"),
    "damaged JSON": write("tokenizer.json", "{"),
    "another class": configured(tokenizer_class="LlamaTokenizer"),
    "no class": configured(tokenizer_class=None),
    "another kind of model": edited("config.json", model_type="qwen2"),
    "a class in the model's configuration": edited("config.json", tokenizer_class="LlamaTokenizer"),
    "several templates": configured(chat_template=[{"name": "default", "template": "x"}]),
    "a setting without a name here": configured(add_bos_token=True),
    "no words": edited(
        "tokenizer.json",
        model={"type": "BPE", "vocab": {}, "merges": []},
        added_tokens=[],
        post_processor=None,
    ),
    "no pairs": edited("tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 9}, "unk_token": "a"}),
    "an added token with another id": configured(added_tokens_decoder={"7": ANOTHER}),
    "a special token that is not in the vocabulary": configured(bos_token="[NEW]"),
}


@pytest.mark.parametrize("what", UNKNOWN_LANGUAGE)
def test_what_is_not_known_of_a_language_models_is_left_to_the_library(tmp_path, what):
    edits = (remove("chat_template.jinja"),) if "templates" in what else ()
    make_language(tmp_path, *edits, UNKNOWN_LANGUAGE[what])
    with pytest.raises(NotSupported):
        read_language_tokenizer(tmp_path)
