"""local_linear_attention where a window's weighted design is singular or nearly so, against
numpy.linalg.lstsq, on the engine and on the portable path."""

import mixhead  # noqa: F401  (registers the operators)
import numpy
import pytest
import torch

local_linear_attention = torch.ops.mixhead.local_linear_attention
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
PORTABLE = pytest.mark.parametrize("portable", [False, True], ids=["engine", "portable"])


def leaves(*arrays, dtype, portable):
    """query, key, value, bandwidth and what sends the call to the portable path: a mask's
    gradient (its backward) with a dense second derivative."""
    tensors = [torch.tensor(numpy.asarray(array), dtype=dtype) for array in arrays]
    tensors = [t[None, None] if t.dim() else t for t in tensors]
    if portable:
        tensors.append(torch.zeros(len(arrays[0]), len(arrays[1]), dtype=dtype))
    return [tensor.requires_grad_() for tensor in tensors]


def call(tensors):
    mask = tensors[4] if len(tensors) == 5 else None
    return local_linear_attention(*tensors[:4], ["gaussian"], attn_mask=mask)


def lstsq(query, key, value, bandwidth, rcond=1e-12):
    """((intercept, slope), the rest of the singular values) of one query; weights relative to
    the largest."""
    log_weight = -(((key - query) / bandwidth) ** 2).sum(1) / 2
    root = numpy.exp((log_weight - log_weight.max()) / 2)[:, None]
    design = numpy.column_stack([numpy.ones(len(key)), key - query]) * root
    return numpy.linalg.lstsq(design, value * root, rcond=rcond)


def sparse_window(seed):
    rng = numpy.random.default_rng(seed)
    keys = int(rng.integers(2, 6))
    return (
        rng.uniform(0, 3, (1, 2)),
        rng.uniform(0, 3, (keys, 2)),
        rng.normal(size=(keys, 1)),
        rng.uniform(0.1, 0.4),
    )


def assert_finite_derivatives(tensors, outputs):
    for output in outputs[:3]:
        grads = torch.autograd.grad(output.sum(), tensors, retain_graph=True, allow_unused=True)
        assert all(grad is None or grad.isfinite().all() for grad in grads)
    loss = outputs[0].sum() + outputs[1].sum()
    grads = torch.autograd.grad(loss, tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in grads), tensors, allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in second)


@PORTABLE
def test_two_points_of_unlike_weights(portable):
    """The second weighs e^-44 of the first; both are interpolated by the shortest solution."""
    window = ([[0.58, 1.44]], [[1.32, 0.42], [2.79, 0.94]], [[1.0], [2.0]], 0.2)
    tensors = leaves(*window, dtype=torch.float64, portable=portable)
    outputs = call(tensors)
    want = lstsq(*map(numpy.asarray, window))[0][:, 0]
    found = torch.cat([outputs[0].flatten(), outputs[1].flatten()])
    torch.testing.assert_close(found, torch.from_numpy(want), rtol=1e-7, atol=0)
    assert_finite_derivatives(tensors, outputs)


@DTYPES
@PORTABLE
def test_sparse_windows(dtype, portable):
    """Finite always; NumPy's solution where no singular value is near a cut-off."""
    compared, clear = 0, 1e-4 if dtype == torch.float64 else 2e-2
    for seed in range(30):
        window = sparse_window(seed)
        tensors = leaves(*window, dtype=dtype, portable=portable)
        outputs = call(tensors)
        assert all(output.isfinite().all() for output in outputs)
        assert_finite_derivatives(tensors, outputs)
        solution, _, rank, values = lstsq(*window)
        ratio = values[:rank] / values[0]
        if ratio.min() < clear or rank < min(3, len(window[1])):
            continue
        compared += 1
        found = torch.cat([outputs[0].flatten(), outputs[1].flatten()]).double()
        near = 1e-7 if dtype == torch.float64 else 1e-2
        torch.testing.assert_close(
            found, torch.from_numpy(solution[:, 0]), rtol=near, atol=near * abs(solution).max()
        )
    assert compared > 0


@DTYPES
@PORTABLE
def test_leverage_of_points_among_their_own_data(dtype, portable):
    for seed in range(30):
        _, key, value, bandwidth = sparse_window(seed)
        tensors = leaves(key, key, value, bandwidth, dtype=dtype, portable=portable)
        outputs = call(tensors)
        assert all(output.isfinite().all() for output in outputs)
        assert outputs[2].min() >= 0
        assert outputs[2].max() <= 1 + 1e-3
        assert_finite_derivatives(tensors, outputs)


@DTYPES
@PORTABLE
@pytest.mark.parametrize("apart", [0.0, 1e-12, 1e-9])
def test_copies_of_points(dtype, portable, apart):
    """Points that are copies but for less than the cut-off are one point with the mean value."""
    rng = numpy.random.default_rng(5)
    key, shift = rng.normal(size=(2, 2)), rng.normal(size=(2, 2))
    value = rng.normal(size=(4, 1))
    query = rng.normal(size=(1, 2))
    tensors = leaves(
        query, numpy.vstack([key, key + apart * shift]), value, 1.5, dtype=dtype, portable=portable
    )
    outputs = call(tensors)
    want = lstsq(query, numpy.vstack([key, key]), value, 1.5)[0][:, 0]
    found = torch.cat([outputs[0].flatten(), outputs[1].flatten()]).double()
    near = 1e-6 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, torch.from_numpy(want), rtol=near, atol=near)
    assert_finite_derivatives(tensors, outputs)


@DTYPES
def test_narrow_windows_of_channels_in_unlike_units(dtype):
    """Fewer keys than channels, whose units are up to a million apart."""
    for seed in range(10):
        rng = numpy.random.default_rng(seed)
        key = rng.normal(size=(9, 12)) * 10 ** rng.uniform(-3, 3, size=12)
        query = numpy.vstack([key[:2], key.mean(0) + rng.normal(size=12)])
        tensors = leaves(
            query, key, rng.normal(size=(9, 2)), abs(key).max(), dtype=dtype, portable=False
        )
        outputs = call(tensors)
        assert all(output.isfinite().all() for output in outputs)
        assert outputs[2][..., :2].max() <= 1 + 1e-2
        assert_finite_derivatives(tensors, outputs)
