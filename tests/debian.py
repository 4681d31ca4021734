"""What tests do without a Debian package that they need."""

from __future__ import annotations

import os

import pytest


def missing(package: str) -> None:
    """Skip the test; on CI, where all are installed, fail."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs Debian's package {package}")
