"""Fixtures shared by all tests: offline, one thread, and the optional folders of real data and reference outputs."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores, and towers are tiny
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers imports torch in each
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Know the marks of transformers' own tests, where `tests/support/transformers_tests.py` has fetched them."""
    files = list((ROOT / ".transformers-tests").glob("*/test_*.py"))
    spec = importlib.util.find_spec("transformers") if files else None
    if spec is not None and spec.origin is not None:
        files.append(Path(spec.origin).with_name("testing_utils.py"))
    marks = {mark for file in files for mark in re.findall(r"\bmark\.(\w+)", file.read_text(encoding="utf-8"))}
    for mark in sorted(marks - {"parametrize", "skip", "skipif", "xfail", "usefixtures", "filterwarnings"}):
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")


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
