"""What tests need and may not find: files next to the checkout, optional packages."""

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"


def require(there: bool, what: str) -> None:
    """Skip for something missing, or fail where EIT_REQUIRE=all says that all must be there."""
    if there:
        return
    if os.environ.get("EIT_REQUIRE") == "all":
        pytest.fail(f"EIT_REQUIRE=all, but {what}")
    pytest.skip(what)
