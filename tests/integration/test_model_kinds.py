"""Models that are not one transformer with pooling: static ones, those with a part for queries and
one for documents, CLIP's texts; prompts and dimensions by flag; and what is refused or said.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from model2vec import StaticModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    Dense,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
)

from common.errors import UserError
from common.runtime import Runtime
from common.search.encoder import Encoder, EncoderConfig, load_encoder
from common.search.index import open_snapshot
from common.search.sentence_model import read_model
from conftest import make_sentences, train_wordpiece, write_lines

CPU = Runtime(torch.device("cpu"), "fp32")
TEXTS = [text for text, _ in make_sentences(20)] + ["good", "  good\nfilm ", "good " * 90, "good", "Zürich"]
WIDTH = 24


def static_model(folder, **options):
    torch.manual_seed(3)
    tokenizer = train_wordpiece([text for text, _ in make_sentences(60)])
    modules = [StaticEmbedding(tokenizer, embedding_dim=WIDTH), Dense(WIDTH, 20), Normalize()]
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(folder))


def static_model_that_cuts(folder):
    static_model(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(6)
    tokenizer.save(str(folder / "tokenizer.json"))


def model2vec(folder, *, shared=False):
    tokenizer = train_wordpiece([text for text, _ in make_sentences(60)])._tokenizer
    count, random = tokenizer.get_vocab_size(), np.random.default_rng(0)
    vectors, options = random.normal(size=(count, WIDTH)).astype(np.float32), {}
    if shared:  # fewer vectors than tokens, and a weight for each token
        vectors = vectors[:50]
        options = {
            "token_mapping": random.integers(0, 50, count),
            "weights": random.random(count).astype(np.float32),
        }
    StaticModel(vectors, tokenizer, normalize=True, **options).save_pretrained(folder)


STATIC = {
    "static": static_model,
    "static, cut": static_model_that_cuts,
    "static, fewer dimensions": lambda folder: static_model(folder, truncate_dim=7),
    "model2vec": model2vec,
    "model2vec, shared vectors": lambda folder: model2vec(folder, shared=True),
}


@pytest.mark.parametrize("kind", STATIC)
def test_static_models_give_the_numbers_of_the_library(kind, tmp_path):
    STATIC[kind](tmp_path)
    expected = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, batch_size=7)
    assert read_model(tmp_path).library is None
    encoder = load_encoder(EncoderConfig(str(tmp_path), batch_tokens=50), CPU)
    assert np.abs(encoder.encode(TEXTS) - expected).max() < 1e-6
    assert (encoder.num_cut > 0) == ("cut" in kind)


def test_a_model2vec_folder_of_an_older_version(tmp_path):
    """It has no modules.json; what model2vec makes of it, which leaves unknown tokens out."""
    model2vec(tmp_path)
    (tmp_path / "modules.json").unlink()
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "model2vec"}))
    known = [text for text in TEXTS if text.isascii()]
    found = load_encoder(EncoderConfig(str(tmp_path)), CPU).encode(known)
    assert np.abs(found - StaticModel.from_pretrained(tmp_path).encode(known)).max() < 1e-6


def test_a_text_without_known_tokens_is_named(tmp_path, embed):
    tokenizer = Tokenizer(models.BPE())  # leaves out what it does not know
    tokenizer.train_from_iterator(["good film"], trainers.BpeTrainer())
    modules = [StaticEmbedding(tokenizer, embedding_dim=WIDTH)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "static"))
    texts = write_lines(tmp_path / "texts.txt", ["good film", "東"])
    code, _, stderr = embed("index", texts, "--index", tmp_path / "ix", "--model", tmp_path / "static")
    assert code == 2 and "texts.txt, line 2" in stderr


@pytest.mark.parametrize("damage", ["vectors", "mapping", "tokens"])
def test_a_static_model_whose_files_do_not_fit_is_refused(damage, tmp_path):
    from safetensors.numpy import load_file, save_file

    model2vec(tmp_path, shared=True)
    tensors = load_file(tmp_path / "model.safetensors")
    if damage == "vectors":
        tensors["embeddings"][3, 3] = np.nan
        tensors["mapping"][:] = 3
    elif damage == "mapping":
        tensors["mapping"][0] = 50
    else:
        tensors = {name: value[:40] for name, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=str(tmp_path)):
        read_model(tmp_path)


@pytest.mark.parametrize("is_in_a_router", [False, True])
def test_what_reads_the_padding_gets_none(is_in_a_router, tiny_model, tmp_path):
    """The library's CNN looks at the neighbours of each token, also behind the end of a text: there a
    text's embedding depends on the longest of its batch.
    """
    torch.manual_seed(9)
    transformer = Transformer(str(tiny_model), max_seq_length=64)
    modules = [transformer, CNN(32, 8, kernel_sizes=[1, 5]), Pooling(16)]
    if is_in_a_router:
        static = StaticEmbedding(train_wordpiece([text for text, _ in make_sentences(60)]), embedding_dim=16)
        modules = [Router.for_query_document([static], modules)]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path))
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    one_by_one = theirs.encode_document(TEXTS, batch_size=1)
    assert np.abs(theirs.encode_document(TEXTS) - one_by_one).max() > 0.01
    encoder = load_encoder(EncoderConfig(str(tmp_path)), CPU)
    assert np.abs(encoder.encode(TEXTS, role="document") - one_by_one).max() < 1e-5


def test_an_encoder_that_nothing_limits_reads_texts_whole(tiny_model, tmp_path):
    """T5 has no table of positions, and its tokenizer may name no number of tokens."""
    words = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    pieces = str(tiny_model / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=pieces, **words).save_pretrained(tmp_path)
    torch.manual_seed(8)
    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    encoder = load_encoder(EncoderConfig(str(tmp_path)), CPU)
    assert np.abs(encoder.encode(TEXTS) - theirs.encode(TEXTS)).max() < 1e-5 and not encoder.num_cut
    short = load_encoder(EncoderConfig(str(tmp_path), max_length=9), CPU)
    assert short.encode(TEXTS).shape == (len(TEXTS), 16) and short.num_cut


@pytest.fixture(scope="module")
def router(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "router"
    torch.manual_seed(2)
    query = StaticEmbedding(train_wordpiece([text for text, _ in make_sentences(60)]), embedding_dim=32)
    document = [Transformer(str(tiny_model), max_seq_length=40), Pooling(32)]
    modules = [Router.for_query_document([query], document), Normalize()]
    prompts = {"query": "what: ", "document": "story: "}
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save(str(folder))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "clip"
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator([text for text, _ in make_sentences(60)], trainer)
    pieces = json.loads(tokenizer.to_str())["model"]
    words = CLIPTokenizerFast(
        vocab=pieces["vocab"], merges=[tuple(pair) for pair in pieces["merges"]], model_max_length=24
    )
    small = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    text = CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=24, pad_token_id=words.pad_token_id, **small, **ids
    )
    image = CLIPVisionConfig(image_size=8, patch_size=4, **small)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=12)
    torch.manual_seed(4)
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    CLIPProcessor(CLIPImageProcessorPil(size=size, crop_size=size), words).save_pretrained(folder)
    SentenceTransformer(modules=[Transformer(str(folder))], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="module")
def router_head(tiny_model, tmp_path_factory):
    """One transformer for all texts, and then a layer for queries and one for documents."""
    folder = tmp_path_factory.mktemp("models") / "router_head"
    torch.manual_seed(6)
    head = Router({"query": [Dense(32, WIDTH)], "document": [Dense(32, WIDTH)]})
    modules = [Transformer(str(tiny_model), max_seq_length=40), Pooling(32), head, Normalize()]
    prompts = {"query": "what: ", "document": ""}
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save(str(folder))
    return folder


@pytest.fixture(scope="module")
def router_of_robertas(tiny_model, tmp_path_factory):
    """RoBERTa numbers positions from 2: of 50 it has 48 for tokens, and its tokenizer says 64."""
    plain = tmp_path_factory.mktemp("models") / "roberta"
    shutil.copytree(tiny_model, plain, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    small = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    positions = {"max_position_embeddings": 50, "pad_token_id": 1}
    torch.manual_seed(7)
    AutoModel.from_config(RobertaConfig(vocab_size=300, **small, **positions)).save_pretrained(plain)
    query, document = ([Transformer(str(plain)), Pooling(16, mode)] for mode in ("cls", "mean"))
    folder = plain.with_name("router_of_robertas")
    modules = [Router.for_query_document(query, document)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


@pytest.mark.parametrize("kind", ["router", "router_head", "clip"])
def test_models_of_several_parts_give_the_numbers_of_the_library(kind, request):
    folder = request.getfixturevalue(kind)
    theirs = SentenceTransformer(str(folder), device="cpu")
    encoder = load_encoder(EncoderConfig(str(folder), batch_tokens=100), CPU)
    oracles = {"query": theirs.encode_query, "document": theirs.encode_document, None: theirs.encode}
    for role, oracle in oracles.items():
        expected = oracle(TEXTS, batch_size=3)
        assert np.abs(encoder.encode(TEXTS, role=role) - expected).max() < 1e-5
    assert encoder.num_cut  # the long text, at 40 or 24 tokens
    again = load_encoder(EncoderConfig(str(folder)), CPU)
    assert again.identity() == encoder.identity()


def test_a_shorter_length_reaches_the_parts(router):
    theirs = SentenceTransformer(str(router), device="cpu")
    theirs[0].sub_modules["document"][0].max_seq_length = 9
    encoder = load_encoder(EncoderConfig(str(router), max_length=9), CPU)
    expected = theirs.encode_document(TEXTS)
    assert np.abs(encoder.encode(TEXTS, role="document") - expected).max() < 1e-5
    with pytest.raises(UserError, match="--max-length 41"):
        load_encoder(EncoderConfig(str(router), max_length=41), CPU)


def test_a_search_goes_through_the_routes_of_queries_and_documents(router_head, tmp_path, ok):
    texts = write_lines(tmp_path / "texts.txt", TEXTS[:20])
    theirs = SentenceTransformer(str(router_head), device="cpu")
    expected = theirs.encode_document(TEXTS[:20]) @ theirs.encode_query("good film")
    ok("index", texts, "--index", tmp_path / "ix", "--model", router_head)
    for source in ([texts, "--model", router_head, "--query"], ["--index", tmp_path / "ix"]):
        hits = ok("search", *source, "good film", "--top-k", 20, "--json")["queries"][0]["hits"]
        assert np.abs(np.sort(expected)[::-1] - [hit["score"] for hit in hits]).max() < 1e-5


def test_a_router_without_a_route_for_documents_is_refused(router_head, tmp_path, embed, ok):
    """As encode_document refuses it; what the message advises helps."""
    folder = shutil.copytree(router_head, tmp_path / "model")
    settings = next(folder.rglob("router_config.json"))
    routes = settings.read_text()
    assert routes.count('"document"') == 1
    settings.write_text(routes.replace('"document"', '"passage"'))
    texts = write_lines(tmp_path / "texts.txt", TEXTS[:9])
    code, _, stderr = embed("index", texts, "--index", tmp_path / "ix", "--model", folder)
    assert code == 2 and stderr.count("\n") == 1
    assert "no route for 'document', only for query, passage; rename one" in stderr
    settings.write_text(settings.read_text().replace('"passage"', '"document"'))
    ok("index", texts, "--index", tmp_path / "ix", "--model", folder)


def test_the_parts_of_a_router_read_no_more_tokens_than_they_have_positions(router_of_robertas):
    """The library itself fails on a text of more."""
    encoder = load_encoder(EncoderConfig(str(router_of_robertas)), CPU)
    assert encoder.max_length == 48
    theirs = SentenceTransformer(str(router_of_robertas), device="cpu")
    for part in theirs[0].sub_modules.values():
        part[0].max_seq_length = 48
    for role, oracle in {"query": theirs.encode_query, "document": theirs.encode_document}.items():
        assert np.abs(encoder.encode(TEXTS, role=role) - oracle(TEXTS)).max() < 1e-5
    with pytest.raises(UserError, match="--max-length 49: .* at most 48 tokens"):
        load_encoder(EncoderConfig(str(router_of_robertas), max_length=49), CPU)


def test_a_router_is_known_by_each_of_its_parts(router, tmp_path):
    from safetensors.torch import load_file, save_file

    before = load_encoder(EncoderConfig(str(router)), CPU).identity()["fingerprint"]
    for part in ("query_0_StaticEmbedding", "document_0_Transformer"):
        folder = shutil.copytree(router, tmp_path / part)
        weights = load_file(folder / part / "model.safetensors")
        name = next(name for name in weights if "embedding" in name)
        weights[name][5] += 1
        save_file(weights, folder / part / "model.safetensors")
        assert load_encoder(EncoderConfig(str(folder)), CPU).identity()["fingerprint"] != before


def test_a_router_names_no_code_and_no_pickles(router, tmp_path, embed):
    folder = shutil.copytree(router, tmp_path / "router")
    routes = json.loads((folder / "router_config.json").read_text())
    (folder / "document_0_Transformer" / "model.safetensors").rename(
        folder / "document_0_Transformer" / "pytorch_model.bin"
    )
    texts = write_lines(tmp_path / "texts.txt", ["good film", "bad film"])
    code, _, stderr = embed("pairs", texts, "--model", folder)
    assert code == 2 and "pickled" in stderr
    for name, kind in {
        "document_1_Pooling": "evil.Code",
        "../elsewhere": "sentence_transformers.x.Y",
    }.items():
        changed = {**routes, "types": {**routes["types"], name: kind}}
        (folder / "router_config.json").write_text(json.dumps(changed))
        code, _, stderr = embed("pairs", texts, "--model", folder)
        assert code == 2 and ("evil.Code" in stderr or "outside" in stderr), stderr


def test_dimensions_are_cut_and_then_normalised(tiny_embedder, tmp_path, embed, ok):
    texts = write_lines(tmp_path / "texts.txt", [text for text, _ in make_sentences(12)])
    ok("index", texts, "--index", tmp_path / "ix", "--dimensions", 6)
    vectors = open_snapshot(tmp_path / "ix").vectors_of(np.arange(12))
    whole = SentenceTransformer(str(tiny_embedder), device="cpu").encode(texts.read_text().splitlines())[
        :, :6
    ]
    assert np.abs(vectors - whole / np.linalg.norm(whole, axis=1, keepdims=True)).max() < 1e-5
    # searches and later texts take the index's number
    hit = ok("search", "--index", tmp_path / "ix", "good film", "--top-k", 1, "--json")["queries"][0]["hits"][
        0
    ]
    encoder = load_encoder(EncoderConfig(str(tiny_embedder), dimensions=6), CPU)
    cosines = vectors @ encoder.encode_normalized(["good film"], role="query")[0]
    assert abs(hit["score"] - cosines.max()) < 1e-5
    more = write_lines(tmp_path / "more.txt", ["great story"])
    ok("index", more, "--index", tmp_path / "ix")
    assert open_snapshot(tmp_path / "ix").num_rows == 13
    for command in (["search", "--index", tmp_path / "ix", "x"], ["index", more, "--index", tmp_path / "ix"]):
        code, _, stderr = embed(*command, "--dimensions", 7)
        assert code == 2 and "--dimensions" in stderr and "width 6" in stderr
    code, _, stderr = embed("pairs", texts, "--dimensions", 33)
    assert code == 2 and "--dimensions 33" in stderr and "32" in stderr


def test_prompts_by_flag_are_remembered_by_the_index(tiny_embedder, tmp_path, embed, ok):
    texts = write_lines(tmp_path / "texts.txt", ["good film", "bad story"])
    ix = tmp_path / "ix"
    ok("index", texts, "--index", ix, "--document-prompt", "story: ", "--query-prompt", "what: ")
    theirs = SentenceTransformer(str(tiny_embedder), device="cpu")
    documents = theirs.encode(["story: good film", "story: bad story"])
    assert np.abs(open_snapshot(ix).vectors_of([0, 1]) - documents).max() < 1e-5
    for flags, prompt in (([], "what: "), (["--query-prompt", ""], "")):
        hits = ok("search", "--index", ix, "good", *flags, "--json")["queries"][0]["hits"]
        expected = documents @ theirs.encode(prompt + "good")
        assert np.abs(sorted(expected, reverse=True) - np.array([hit["score"] for hit in hits])).max() < 1e-5
    code, _, stderr = embed("index", texts, "--index", ix, "--document-prompt", "x: ")
    assert code == 2 and "--document-prompt" in stderr
    # texts that are compared with each other have the documents' prompt
    matrix = ok("similarity", texts, "--document-prompt", "story: ", "--json")["matrix"]
    assert abs(matrix[0][1] - float(documents[0] @ documents[1])) < 1e-3


@pytest.mark.parametrize(
    "name, prompts, given, missing",
    [
        ("multilingual-e5-small", {}, {}, "--query-prompt 'query: ' --document-prompt 'passage: '"),
        ("e5-base-v2", {"query": "query: ", "passage": "passage: "}, {}, ""),
        ("e5-base-v2", {}, {"query": "query: "}, "--document-prompt 'passage: '"),
        ("multilingual-e5-large-instruct", {}, {}, "--query-prompt 'Instruct"),
        ("bge-small-en-v1.5", {}, {}, "--query-prompt 'Represent"),
        ("bge-base-zh-v1.5", {}, {"query": ""}, ""),
        ("bge-m3", {}, {}, ""),
        ("e5x-model", {}, {}, ""),
    ],
)
def test_known_families_are_told_which_prompts_they_lack(
    name, prompts, given, missing, tiny_model, tmp_path, capsys
):
    modules = [Transformer(str(tiny_model), max_seq_length=64), Pooling(32)]
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save(str(tmp_path / name))
    flags = {f"{role}_prompt": prompt for role, prompt in given.items()}
    encoder = load_encoder(EncoderConfig(str(tmp_path / name), **flags), CPU)
    assert isinstance(encoder, Encoder)
    said = capsys.readouterr().err
    assert (missing in said) if missing else ("trained with prompts" not in said)


def test_a_model_that_is_no_sentence_encoder_is_said(tiny_model, tiny_embedder, capsys):
    load_encoder(EncoderConfig(str(tiny_model)), CPU)
    assert "mean pooling, untrained for this" in capsys.readouterr().err
    load_encoder(EncoderConfig(str(tiny_embedder)), CPU)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "package, kind", [("sparse_encoder", "a sparse"), ("cross_encoder", "a cross-encoder")]
)
def test_older_folders_of_other_kinds_are_refused(package, kind, tiny_embedder, tmp_path):
    """Their settings don't say what they are, but their modules do."""
    folder = shutil.copytree(tiny_embedder, tmp_path / "model")
    (folder / "config_sentence_transformers.json").unlink()
    file = folder / "modules.json"
    file.write_text(file.read_text().replace("sentence_transformer.modules.pooling", f"{package}.models.x"))
    assert f".{package}." in file.read_text()
    with pytest.raises(UserError, match=kind):
        load_encoder(EncoderConfig(str(folder)), CPU)
