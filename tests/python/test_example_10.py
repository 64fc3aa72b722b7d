"""examples/10_smoother_rank: its figures, its controls, and the saved heads against NumPy."""

import mixhead  # noqa: F401 (the operators that a saved model calls)
import numpy
import pytest
import torch
from example_runs import ROOT, assert_files, assert_goals, run_example
from scipy.special import softmax

FOLDER = ROOT / "examples" / "10_smoother_rank"


@pytest.fixture(scope="module")
def smoother_rank(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoother_rank")
    return out, run_example(FOLDER, "--out", out)[1]


def test_figures_and_controls(smoother_rank):
    figures = smoother_rank[1]
    assert_goals(FOLDER, figures)
    assert 1 - 1e-9 <= figures["over_eckart_young"] < figures["over_eckart_young_pixels"]


def test_files(smoother_rank):
    assert_files(smoother_rank[0], "ranks.png", "errors.png", "smoother_rank.pt")


def test_saved_heads_are_a_softmax_and_its_linear_part(smoother_rank):
    model = torch.jit.load(smoother_rank[0] / "smoother_rank.pt")
    inputs = model.inputs.numpy()
    query = inputs @ model.query_weight.detach().numpy()
    key = inputs @ model.key_weight.detach().numpy()
    values = numpy.random.default_rng(0).normal(size=(len(inputs), 3))
    scores = query @ key.transpose(0, 2, 1)
    smoothed = model(torch.from_numpy(values), 0.7).detach()
    expected = (softmax(0.7 * scores, axis=-1) @ values).mean(0)
    numpy.testing.assert_allclose(smoothed, expected, rtol=0, atol=1e-10)
    slope = (scores - scores.mean(-1, keepdims=True)).mean(0) @ values / len(inputs)
    expected = values.mean(0) + float(model.gain) * slope
    numpy.testing.assert_allclose(
        model.linearised(torch.from_numpy(values)).detach(), expected, rtol=0, atol=1e-9
    )
