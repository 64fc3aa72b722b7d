"""examples/09_kernel_ensemble: its figures, its controls, and the saved ensemble against SciPy."""

import mixhead  # noqa: F401 (the operators that a saved model calls)
import pytest
import torch
from example_runs import ROOT, assert_files, run_example
from scipy.spatial.distance import cdist

FOLDER = ROOT / "examples" / "09_kernel_ensemble"


@pytest.fixture(scope="module")
def kernel_ensemble(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernel_ensemble")
    return out, run_example(FOLDER, "--out", out)[1]


@pytest.mark.parametrize("suffix", ["", "_diabetes"])
def test_figures_and_controls(kernel_ensemble, suffix):
    figures = {name: kernel_ensemble[1][name + suffix] for name in (
        "ambiguity_identity_error", "ensemble_over_best_single", "ard_single_kernel",
        "mixed_kernels_over_same_kernel", "heads_gain", "cloned_heads_gain",
        "diversity_gain_spearman",
    )}  # fmt: skip
    assert figures["ambiguity_identity_error"] <= 1e-12
    assert abs(figures["cloned_heads_gain"]) <= 1e-12
    assert figures["heads_gain"] >= 0.01
    assert figures["diversity_gain_spearman"] >= 0.5
    # A short training on few points; on diabetes the single kernel is as good in the full run too.
    assert figures["ensemble_over_best_single"] <= (1.3 if suffix else 0.8)
    assert figures["ard_single_kernel"] > 0
    assert 0.5 < figures["mixed_kernels_over_same_kernel"] < 1.5


def test_files(kernel_ensemble):
    pictures = ("errors.png", "diversity.png", "projections.png")
    assert_files(kernel_ensemble[0], *pictures, "kernel_ensemble.pt")


def test_saved_ensemble_is_the_average_of_kernel_regressions(kernel_ensemble):
    model = torch.jit.load(kernel_ensemble[0] / "kernel_ensemble.pt")
    inputs, targets, projection = model.inputs, model.targets, model.projection.detach()
    queries = torch.randn(7, inputs.size(1), dtype=torch.float64)
    similarity = {
        "gaussian": lambda u: -(u**2) / 2,
        "laplacian": lambda u: -u,
        "matern32": lambda u: torch.log1p(3**0.5 * u) - 3**0.5 * u,
        "matern52": lambda u: torch.log1p(5**0.5 * u + 5 * u**2 / 3) - 5**0.5 * u,
        "cauchy": lambda u: -torch.log1p(u**2),
    }
    expected = []
    for kernel, matrix in zip(model.kernels, projection, strict=True):
        distance = torch.from_numpy(cdist(queries @ matrix, inputs @ matrix))
        expected.append(torch.softmax(similarity[kernel](distance), 1) @ targets)
    torch.testing.assert_close(model(queries), torch.stack(expected), rtol=0, atol=1e-9)
    torch.testing.assert_close(model.predict(queries), torch.stack(expected).mean(0))
