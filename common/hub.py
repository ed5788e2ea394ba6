"""The Hugging Face Hub: is it there, and what to tell the user when it is not."""

import datasets
import httpx2
import huggingface_hub
import huggingface_hub.constants

CONNECT_SECONDS = 5.0


def is_reachable() -> bool:
    """Tell whether the Hub (HF_ENDPOINT) answers; if not, turn the libraries offline so that they use what is cached, at once.

    Without this they retry each file with growing pauses and a warning each: 23 seconds before a mistyped name is an error.
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
