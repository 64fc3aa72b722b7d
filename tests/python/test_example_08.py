"""Example 08, small, as a user would run it: its figures, its controls, its files."""

import mixhead  # noqa: F401 (the operators that a saved model calls)
import pytest
import torch
from example_runs import ROOT, assert_files, run_example

FOLDER = ROOT / "examples" / "08_kernel_regression"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernel_regression")
    return out, run_example(FOLDER, "--out", out)[1]


def test_figures(result):
    figures = result[1]
    assert set(figures) == {
        "statsmodels_max_error", "torchscript_max_error", "learned_bandwidth_vs_loo",
        "mcycle_lc_loo_h", "faithful_lc_loo_h", "key_bias_max_error", "no_key_bias_unequal_norms",
        "no_key_bias_unit_norms",
    }  # fmt: skip
    assert figures["statsmodels_max_error"] <= 1e-12
    assert figures["torchscript_max_error"] <= 1e-12
    assert figures["learned_bandwidth_vs_loo"] <= 0.01
    assert figures["mcycle_lc_loo_h"] == pytest.approx(0.9138, abs=1e-3)
    assert figures["faithful_lc_loo_h"] == pytest.approx(0.2614, abs=1e-3)
    assert figures["key_bias_max_error"] <= 1e-12


def test_controls(result):
    assert result[1]["no_key_bias_unequal_norms"] > 0.1
    assert result[1]["no_key_bias_unit_norms"] <= 1e-12


def test_files(result):
    models = [f"{name}_degree_{degree}.pt" for name in ("mcycle", "faithful") for degree in (0, 1)]
    assert_files(result[0], "fits.png", "bandwidths.png", "attention.png", *models)


def test_saved_head_answers(result):
    head = torch.jit.load(result[0] / "faithful_degree_1.pt")
    with torch.no_grad():
        short, long = head(torch.tensor([[2.0], [4.5]], dtype=torch.float64)).flatten().tolist()
    assert 50 < short < 60 < 75 < long < 85
