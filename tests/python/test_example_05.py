"""examples/05_occlusion: its figures, its controls, and that dropped patches are not read."""

import gzip
import sys

import mixhead  # noqa: F401 (the operators that a saved model calls)
import pytest
import torch
from example_runs import ROOT, assert_files, run_example
from sklearn.datasets import load_digits

FOLDER = ROOT / "examples" / "05_occlusion"
MODULES = ("corners", "images", "model", "training")


@pytest.fixture(scope="module")
def occlusion(tmp_path_factory):
    out = tmp_path_factory.mktemp("occlusion")
    return out, run_example(FOLDER, "--out", out)[1]


@pytest.fixture
def modules(monkeypatch):
    """The example's own modules, by name."""
    monkeypatch.syspath_prepend(FOLDER)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: __import__(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def test_figures(occlusion):
    figures = occlusion[1]
    assert figures["size_difference"] <= 0.02
    assert 145_000 <= figures["vit_parameters"] <= 155_000
    assert figures["vit_minus_cnn_50"] >= 0.15
    # A few seconds of training: the full figures are those of the default run.
    assert figures["clean_gap"] <= 0.15
    assert figures["both_corners_one_layer"] >= 0.95
    for key in ("clean_gap", "vit_minus_cnn_50", "vit_minus_cnn_patchdrop_50"):
        assert figures[f"{key}_low"] <= figures[key] <= figures[f"{key}_high"]
    # With the same training the two differ by little.
    assert abs(figures["vit_minus_cnn_patchdrop_50"]) <= 0.1


def test_controls(occlusion):
    figures = occlusion[1]
    assert abs(figures["cnn_small_receptive_field"] - 0.5) <= 0.05
    assert figures["cnn_full_receptive_field"] >= 0.9


def test_files(occlusion):
    pictures = ("accuracy.png", "images.png", "corners.png")
    assert_files(occlusion[0], *pictures, "transformer.pt")


def test_dropped_patches_are_not_read(occlusion):
    model = torch.jit.load(occlusion[0] / "transformer.pt")
    digits = load_digits()
    images = torch.from_numpy(digits.images[:50] / 16).float()
    right = model(images).argmax(1) == torch.from_numpy(digits.target[:50])
    assert right.double().mean() >= 0.8
    # Of the 16 patches of 2 x 2 pixels, those of the upper half: the lower half may be anything.
    kept = torch.arange(8).expand(50, 8)
    noise = torch.cat([images[:, :4], torch.rand(50, 4, 8)], 1)
    torch.testing.assert_close(model(images, kept), model(noise, kept))
    assert not torch.allclose(model(images), model(noise))
    shuffled = kept[:, torch.randperm(8)]
    torch.testing.assert_close(model(images, kept), model(images, shuffled), rtol=0, atol=1e-5)


def test_convolutions_get_zeros(modules):
    model = modules["model"].ConvolutionalNet(2, 10, 4, 6).eval()
    images, kept = torch.rand(3, 8, 8), torch.tensor([[0, 5], [3, 15], [1, 2]])
    filled = torch.zeros_like(images)
    for image, patches in enumerate(kept.tolist()):
        for patch in patches:
            down, right = 2 * (patch // 4), 2 * (patch % 4)
            place = image, slice(down, down + 2), slice(right, right + 2)
            filled[place] = images[place]
    torch.testing.assert_close(model(images, kept), model(filled))


def test_only_a_net_that_sees_both_corners_compares_them(modules):
    """Of a net whose votes never see both, the answers to (a, a) and (b, b) add up to those to
    (a, b) and (b, a), whatever its weights are."""
    corners = modules["corners"]
    images, same = corners.Corners(torch.rand(20, 8, 8), torch.arange(20), 3).draw(6)
    assert same.view(4, 6).tolist() == [[1.0] * 6] * 2 + [[0.0] * 6] * 2

    @torch.no_grad()
    def difference(model: torch.nn.Module) -> float:
        aa, bb, ab, ba = model.double()(images.double()).view(4, 6)
        return float((aa + bb - ab - ba).abs().max())

    assert difference(corners.CornerConvolutions(8, 16, reach=1)) <= 1e-14
    assert difference(corners.CornerConvolutions(8, 16, reach=3)) >= 1e-6
    assert difference(corners.OneAttentionLayer(8, 32, 4)) >= 1e-6


def test_interval_agrees_with_the_exact_variance(modules):
    """Of rows that are alike, the interval is that of the mean of the columns."""
    figure = torch.randn(400, dtype=torch.float64).expand(3, -1)
    found = modules["training"].interval(figure, seed=0)
    half = 1.96 * float(figure[0].std(correction=0)) / 20
    assert found.mean == pytest.approx(float(figure.mean()))
    assert found.high - found.mean == pytest.approx(half, rel=0.15)
    assert found.mean - found.low == pytest.approx(half, rel=0.15)


def test_reads_the_files_of_fashion_mnist(modules, tmp_path):
    images = torch.randint(256, (10, 28, 28), dtype=torch.uint8)
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(header + images.numpy().tobytes()))
    assert torch.equal(modules["images"].read_idx(path), images)
