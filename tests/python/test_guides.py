"""The Python of the README and of the guides runs as it stands, and does what the pages say."""

import re
import runpy
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[2]


def names_of(page: str) -> dict:
    """What a page's code defines, its blocks run one after the other as one file."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    Path("page.py").write_text("\n".join(blocks))
    return runpy.run_path("page.py", run_name="page")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    pyplot.close("all")


def test_readme():
    names = names_of("README.md")
    assert names["output"].shape == names["x"].shape
    reader = torch.jit.load("reader.pt")
    assert reader(names["x"], names["facts"]).shape == names["x"].shape


def test_memory():
    names = names_of("docs/memory.md")
    tokens, bank = names["tokens"], names["bank"]
    script = torch.jit.load("reader.pt")(tokens)
    attention = names["attention"]
    expected = attention(tokens, tokens, tokens, memory=bank, need_weights=False)[0]
    torch.testing.assert_close(script, expected)
    torch.testing.assert_close(names["program"].module()(tokens), expected)
    query, best = names["query"], names["best"]
    scores = query @ bank.keys().transpose(-1, -2) / query.size(-1) ** 0.5
    allowed = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    read = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ bank.values()
    sequence = F.scaled_dot_product_attention(query, names["sequence_key"], names["sequence_value"])
    torch.testing.assert_close(names["output"], (sequence + read) / 2)


def test_regression():
    names = names_of("docs/regression.md")
    assert names["fit"].bandwidth_.shape == (1,)


def test_plotting():
    names_of("docs/plotting.md")
    of_layer, of_weights = (
        pyplot.figure(number).axes[0].images[0].get_array() for number in pyplot.get_fignums()[2:4]
    )
    np.testing.assert_allclose(of_layer, of_weights, atol=1e-5)
    assert Path("kernels.png").exists()
