"""The Hugging Face Hub: is it there, where its files go, and what to tell the user when it is not
there.
"""

import contextlib
import functools
import os
import sys

import datasets
import httpx2
import huggingface_hub
import huggingface_hub.constants

CONNECT_SECONDS = 5.0

# Where a model has no safetensors, transformers would send its name and the user's token to a
# converter on
# the Hub and wait for it.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
# that a data set's card is missing, or what it retries, is no matter of the user
huggingface_hub.utils.logging.set_verbosity_error()


def is_reachable() -> bool:
    """Tell whether the Hub (HF_ENDPOINT) answers; if not, turn the libraries offline so that they
    use what is cached, at once.

    Without this they retry each file with growing pauses and a warning each: 23 seconds before a
    mistyped name is an error.
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


@functools.cache  # once for each name: a model is read in several parts
def say_cached(name: str):
    """Say on stderr, for stdout may be another program's input, that a model or data set comes
    from the cache without a look at the Hub.
    """
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{name}: a copy in the cache; the Hub is off (HF_HUB_OFFLINE) or can't be reached",
            file=sys.stderr,
        )


@contextlib.contextmanager
def downloads_in(cache_dir: str | None):
    """Let the Hub's files go to `cache_dir`: `datasets` puts only what it makes of them there, and
    them in the user's cache.
    """
    usual = huggingface_hub.constants.HF_HUB_CACHE
    huggingface_hub.constants.HF_HUB_CACHE = cache_dir or usual
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_CACHE = usual
