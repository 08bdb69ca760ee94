"""The Hugging Face hub where there may be no network: its library would try for half a minute, file by file."""

from functools import cache

from huggingface_hub import constants, get_session
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import logging

from eit.errors import first_line

TIMEOUT = 10.0  # seconds


@cache
def prepare_hub() -> None:
    """Ask once whether the hub answers. If not, this process reads the hub's cache alone, without waiting."""
    logging.set_verbosity_error()  # no lines on retries; the error is reported by the caller
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
        except Exception:  # of its HTTP library, which differs between versions
            constants.HF_HUB_OFFLINE = True


def hub_reason(error: Exception) -> str:
    """Why the hub did not give a file, and what to do, in one line."""
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return f"{constants.ENDPOINT} cannot be reached, and the file is not in its cache; give a local file"
    return first_line(error)
