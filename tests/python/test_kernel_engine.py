"""The CPU engine of kernel_attention where its blocks, forms and splits change, against the float64
reference."""

import mixhead
import pytest
import reference
import torch
from compare import assert_near, assert_same_bits
from test_kernel_attention import COMPACT, KERNELS, applies, results

kernel_attention = torch.ops.mixhead.kernel_attention
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def spread(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() * scale


def case(rows, keys, channels, wide, batch=2, heads=2, query_heads=2, shared=False):
    leading = () if shared else (batch,)
    return (
        spread(batch, query_heads, rows, channels, seed=1, scale=channels**-0.5),
        spread(*leading, heads, keys, channels, seed=2, scale=channels**-0.5),
        spread(*leading, heads, keys, wide, seed=3),
    )


PER_HEAD = torch.tensor([0.8, 1.25], dtype=torch.float64)
CASES = {
    "one block": (case(5, 7, 12, 4), PER_HEAD, {}),
    "several blocks, wide": (case(70, 150, 24, 20), PER_HEAD, {}),
    "several blocks, narrow": (case(70, 150, 3, 1), PER_HEAD, {}),
    "narrow points, wide values": (case(33, 100, 2, 17), PER_HEAD, {}),
    "per channel, wide": (case(33, 65, 12, 9), spread(2, 12, seed=4).abs() + 0.8, {}),
    "per channel, narrow": (case(33, 65, 3, 9), spread(2, 3, seed=4).abs() + 0.8, {}),
    "shared points": (case(9, 120, 16, 8, batch=5, shared=True), PER_HEAD, {}),
    "causal": (case(70, 150, 12, 8), PER_HEAD, {"is_causal": True}),
    "leave-one-out": (case(130, 130, 12, 8), PER_HEAD, {"exclude_self": True}),
    "sum": (case(40, 90, 12, 8), PER_HEAD, {"normalize": False}),
    "grouped": (
        case(20, 60, 12, 8, query_heads=4),
        torch.tensor([0.8, 1.0, 1.2, 1.4]).double(),
        {"enable_gqa": True},
    ),
    "mask for each row": (
        case(70, 110, 12, 8),
        PER_HEAD,
        {"attn_mask": spread(2, 1, 70, 110, seed=5)},
    ),
    "mask for each key": (case(70, 110, 3, 2), PER_HEAD, {"attn_mask": spread(110, seed=5)}),
    "bool mask, nearest": (
        case(70, 110, 3, 2),
        PER_HEAD / 8,
        {"attn_mask": spread(70, 110, seed=5).gt(0.5), "empty": "nearest"},
    ),
}


def cases():
    for name, (tensors, bandwidth, options) in CASES.items():
        for kernel in KERNELS:
            # No row has all its keys at the edge of a support, where little is left of 1 - u^2.
            h = bandwidth * 1.6 if kernel in COMPACT and "bool" not in name else bandwidth
            if kernel == "boxcar" and "bool" not in name:
                continue  # random points may lie on the edge of its support
            if applies(kernel, bandwidth):
                yield pytest.param(tensors, h, [kernel], options, id=f"{kernel}, {name}")
    tensors, bandwidth, options = CASES["grouped"]
    names = ["gaussian", "dot", "tricube", "matern32"]
    yield pytest.param(tensors, bandwidth, names, options, id="one per head")


@pytest.mark.parametrize(("tensors", "bandwidth", "kernel", "options"), list(cases()))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients(tensors, bandwidth, kernel, options, dtype):
    outputs, grads = results(kernel_attention, tensors, bandwidth, kernel, options, dtype)
    expected, wanted = results(
        reference.kernel_attention, tensors, bandwidth, kernel, options, dtype, wide=True
    )
    assert_near(outputs[0], expected[0], dtype, "output")
    assert_near(outputs[1], expected[1], dtype, "log_mass")
    for index, (grad, want) in enumerate(zip(grads, wanted, strict=True)):
        assert_near(grad, want, dtype, f"gradient {index}", scale=4.0)


@pytest.mark.parametrize("channels", [3, 12])
@pytest.mark.parametrize("kernel", ["gaussian", "laplacian", "matern52", "cauchy", "tricube"])
def test_no_cancellation_far_from_the_origin(kernel, channels):
    """Points near 5e5 and 100 apart, some of them twice: differences are exact in float32."""
    near = (
        torch.randint(0, 4, (1, 40, channels), generator=torch.Generator().manual_seed(1)) * 100.0
    )
    h = torch.tensor(100.0 * channels**0.5)
    value = spread(1, 40, 2, seed=3).float()
    far, near = (x.clone().requires_grad_() for x in (near + 5e5, near))
    got = kernel_attention(far, far, value, h, [kernel])
    want = reference.kernel_attention(near.double(), near.double(), value, h, [kernel])
    assert_near(got[0], want[0], torch.float32, "output")
    assert_near(got[1], want[1], torch.float32, "log_mass")
    grad = spread(1, 40, 2, seed=6)
    (got_grad,) = torch.autograd.grad(got[0], far, grad.float())
    (want_grad,) = torch.autograd.grad(want[0], near, grad)
    assert_near(got_grad * 100, want_grad.double() * 100, torch.float32, "gradient")


def test_cusp_between_many_channels_has_subgradient_zero():
    x = spread(1, 30, 20, seed=1).float().requires_grad_()
    mass = kernel_attention(x, x.detach(), x.detach(), None, ["laplacian"])[1]
    (grad,) = torch.autograd.grad(mass.sum(), x)
    wide = x.detach().double().requires_grad_()
    want = reference.kernel_attention(wide, wide.detach(), wide.detach(), None, ["laplacian"])[1]
    assert_near(grad, torch.autograd.grad(want.sum(), wide)[0], torch.float32)


@pytest.mark.parametrize("channels", [2, 12])
def test_nan_in_a_key_that_is_masked_out_stays_there(channels):
    query, key, value = case(20, 90, channels, 3)
    mask = torch.arange(90) != 50
    want = kernel_attention(query, key, value, PER_HEAD, ["gaussian"], attn_mask=mask)
    key[..., 50, :] = torch.nan
    got = kernel_attention(query, key, value, PER_HEAD, ["gaussian"], attn_mask=mask)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kernel", ["gaussian", "cosine", "tricube"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_deterministic_and_close_on_any_number_of_threads(kernel, threads):
    tensors = [tensor.float() for tensor in case(200, 300, 16, 8)]
    leaves = [tensor.requires_grad_() for tensor in (*tensors, PER_HEAD.float())]

    def step():
        output, mass = kernel_attention(*leaves, [kernel])
        grads = torch.autograd.grad(output.square().sum() + mass.sum(), leaves)
        return [output, mass, *grads]

    alone, before = step(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, again = step(), step()
    finally:
        torch.set_num_threads(before)
    assert_same_bits(again, found)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@each_kernel
def test_strides_make_no_difference(kernel):
    """Transposed heads, every other channel, values expanded over the batch."""
    query = spread(2, 33, 2, 24, seed=1).float().transpose(1, 2)[..., ::2]
    key = spread(2, 65, 2, 24, seed=2).float().transpose(1, 2)[..., ::2]
    value = spread(1, 2, 65, 5, seed=3).float().expand(2, -1, -1, -1)
    strided = [query, key, value]
    plain = [tensor.contiguous() for tensor in strided]
    bandwidth = PER_HEAD.float()
    grad = spread(2, 2, 33, 5, seed=4).float()
    found = []
    for tensors in (strided, plain):
        leaves = [tensor.requires_grad_() for tensor in tensors]
        output, mass = kernel_attention(*leaves, bandwidth, [kernel])
        found.append((output, mass, *torch.autograd.grad(output, leaves, grad)))
    assert_same_bits(found[0], found[1])


@pytest.mark.parametrize("kernel", COMPACT)
def test_blocks_outside_the_support_are_skipped_without_a_trace(kernel):
    """Sorted points: most blocks are skipped; shuffled ones: none. The same regression."""
    x = torch.linspace(0.0, 100.0, 700).double().view(1, 700, 1).requires_grad_()
    y = spread(1, 700, 1, seed=2)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(3))
    h = torch.tensor(1.4321).double()
    grad = spread(1, 700, 1, seed=4)
    results = []
    for keys in (torch.arange(700), order):
        output, mass = kernel_attention(x, x.detach()[:, keys], y[:, keys], h, [kernel])
        results.append((output, mass, *torch.autograd.grad(output, x, grad)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


def test_more_rows_than_a_chunk_of_the_backward():
    """Rows whose partial query gradients exceed the budget are taken in chunks."""
    rows = 140_000
    leaves = [tensor.float().requires_grad_() for tensor in case(rows, 40, 64, 1, 1, 1, 1)]
    query, key, value = leaves
    grad = spread(1, 1, rows, 1, seed=5).float()

    def gradients(part):
        output = mixhead.kernel_attention(query[:, :, part], key, value, None, "laplacian")
        return torch.autograd.grad(output, leaves, grad[:, :, part])

    whole = gradients(slice(None))
    pieces = gradients(slice(0, rows // 2)), gradients(slice(rows // 2, None))
    for found, *parts in zip(whole, *pieces, strict=True):
        torch.testing.assert_close(found, sum(parts), rtol=1e-4, atol=1e-3)
