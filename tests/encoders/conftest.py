"""Seeds and images of the tests of teachers."""

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Three RGB images of different shapes."""
    generator = np.random.default_rng(0)
    shapes = [(40, 56), (71, 33), (32, 32)]
    return [Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
