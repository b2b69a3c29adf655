"""Fixtures shared by all tests: offline by default, and the optional folders of real data and reference outputs."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: this test compares with material that is not part of the project")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference outputs of the authors' modules."""
    return _shared("golden")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real biomedical images with labels or captions."""
    return _shared("data")
