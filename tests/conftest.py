"""Fixtures that all tests share."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    "The reference data beside the checkout; mark such a test with `pytest.mark.shared`."
    if not SHARED.is_dir():
        pytest.skip(f"no reference data: {SHARED} is absent")
    return SHARED
