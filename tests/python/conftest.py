import random

import numpy
import pytest
import torch


@pytest.fixture(autouse=True)
def seeds():
    """Every test begins with the same random numbers, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002 (what libraries under test may draw from)
    torch.manual_seed(0)
