"""Goldens and the pictures they are about, from the script that wrote them."""

import json
import runpy
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def pictures():
    """size -> (2, size, size, 3) float32 in [0, 1]: a smooth picture and the same under noise."""
    return runpy.run_path(str(GOLDEN / "write_goldens.py"))["pictures"]


@pytest.fixture(scope="session")
def goldens():
    return json.loads((GOLDEN / "goldens.json").read_text())
