"""How close is close: each dtype against the float64 reference."""

import torch

# float64 and float32: the project's promise. Halves: the relative tolerance of torch.testing.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 1.6e-2,
    torch.float16: 1e-3,
}


def assert_near(actual, expected, dtype, what="", scale=1.0):
    """`actual` within the dtype's tolerance of the float64 `expected`, relative to its magnitude.

    `scale` widens the tolerance where the input's own rounding is larger: scores of 500 carry 500
    times the rounding of scores of 1 into the exponential.
    """
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    if expected.numel() == 0:
        return
    finite = expected[expected.isfinite()]
    magnitude = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        expected.detach(),
        rtol=0.0,
        atol=TOLERANCE[dtype] * magnitude * scale,
        equal_nan=True,
        msg=lambda message: f"{what}: {message}",
    )


def assert_same_bits(actual, expected, what=""):
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )
