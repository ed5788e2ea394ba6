"""The Hugging Face Hub: whether it can be reached, and where its files are stored."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator

import datasets
import httpx2
import huggingface_hub
import huggingface_hub.constants

CONNECT_SECONDS = 5.0

# Without this, transformers sends the name of a model without safetensors, and the user's token,
# to a conversion service on the Hub and waits for it.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
# Warnings about missing dataset cards and retries are nothing that the user can act on.
huggingface_hub.utils.logging.set_verbosity_error()


def is_reachable() -> bool:
    """Return whether the Hub (HF_ENDPOINT) answers; if it does not, switch the libraries to
    offline mode.

    Offline, they use cached files at once. Otherwise they retry each file with growing pauses and
    a warning each: 23 seconds before a mistyped name is an error.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=CONNECT_SECONDS)
        return True
    except httpx2.TransportError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
        return False


@functools.cache  # once per name: the parts of a model are read one by one
def say_cached(name: str) -> None:
    """Say on stderr that a model or data set comes from the cache and was not compared with the
    Hub.

    On stderr, because stdout may be another program's input.
    """
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{name}: using the cached copy; the Hub is offline (HF_HUB_OFFLINE) or can't be reached",
            file=sys.stderr,
        )


@contextlib.contextmanager
def downloads_in(cache_dir: str | None) -> Iterator[None]:
    """Store the Hub's files in `cache_dir` within the block.

    `datasets` honours its own `cache_dir` only for the files that it builds, not for those that it
    downloads.
    """
    usual = huggingface_hub.constants.HF_HUB_CACHE
    huggingface_hub.constants.HF_HUB_CACHE = cache_dir or usual
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_CACHE = usual
