"""The CPU engine of local_linear_attention where its blocks, panels, chunks and splits change,
against the float64 reference and against the portable path."""

import pytest
import reference
import torch
from compare import assert_near
from test_local_linear_attention import OUTPUTS, results

local_linear_attention = torch.ops.mixhead.local_linear_attention


def spread(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def case(rows, keys, channels, wide, batch=2, shared=False):
    leading = () if shared else (batch,)
    return (
        spread(batch, 2, rows, channels, seed=1),
        spread(*leading, 2, keys, channels, seed=2),
        spread(*leading, 2, keys, wide, seed=3),
    )


HEAD = torch.tensor([3.0, 4.0]).double()
CASES = {
    "several blocks": (case(70, 450, 3, 1), HEAD, {}),
    "one channel": (case(70, 450, 1, 2), HEAD / 2, {}),
    "eight channels": (case(20, 90, 8, 6), HEAD * 2, {}),
    "nine channels": (case(20, 90, 9, 10), HEAD * 2, {}),
    "32 channels": (case(20, 150, 32, 3), HEAD * 5, {"is_causal": True}),
    "more channels than the engine": (case(10, 150, 33, 2), HEAD * 5, {}),
    "per channel": (case(33, 65, 5, 3), spread(2, 5, seed=4).abs() + 3.0, {}),
    "chunks of rows": (case(300, 100, 8, 64, batch=1), HEAD * 2, {}),
    "shared points": (case(9, 420, 3, 2, batch=5, shared=True), HEAD, {}),
    "causal": (case(150, 450, 2, 1), HEAD, {"is_causal": True}),
    "leave-one-out": (case(420, 420, 2, 1, batch=1), HEAD, {"exclude_self": True}),
    "mask for each row": (case(70, 110, 3, 2), HEAD, {"attn_mask": spread(70, 110, seed=5) > -1}),
    "ridge": (case(70, 110, 3, 2), HEAD, {"ridge": 2.0}),
}


@pytest.mark.parametrize(("kernel", "threads"), [("gaussian", 2), ("laplacian", 1), ("tricube", 2)])
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients(name, kernel, threads, dtype):
    tensors, bandwidth, options = CASES[name]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outputs, grads = results(
            local_linear_attention, tensors, bandwidth, [kernel], options, dtype
        )
    finally:
        torch.set_num_threads(before)
    expected, wanted = results(
        reference.local_linear_attention, tensors, bandwidth, [kernel], options, dtype, wide=True
    )
    for what, output, want in zip(OUTPUTS, outputs, expected, strict=True):
        assert_near(output, want, dtype, what, scale=4.0)
    for index, (grad, want) in enumerate(zip(grads, wanted, strict=True)):
        assert_near(grad, want, dtype, f"gradient {index}", scale=8.0)


@pytest.mark.parametrize("wanted", range(4))
def test_gradient_of_one_argument_alone(wanted):
    """The others' sums are left out; what is found is the same."""
    tensors = [*CASES["several blocks"][0], HEAD]

    def gradient(names):
        leaves = [tensor.clone().requires_grad_(i in names) for i, tensor in enumerate(tensors)]
        outputs = local_linear_attention(*leaves, ["matern52"])
        loss = sum((output * spread(*output.shape, seed=9)).sum() for output in outputs)
        return torch.autograd.grad(loss, leaves[wanted])[0]

    torch.testing.assert_close(gradient({wanted}), gradient(range(4)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_portable_path(scale):
    """Which has all gradients where that of a mask is wanted. Narrow windows, mostly singular,
    have the same derivatives in both."""
    x, value = spread(1, 1, 150, 2, seed=1), spread(1, 1, 150, 1, seed=2)
    tensors = (x, x.clone(), value)
    options = {"attn_mask": spread(150, seed=3)}
    _, portable = results(
        local_linear_attention, tensors, HEAD[:1] * scale, ["cauchy"], options, torch.float64
    )
    leaves = [t.clone().requires_grad_() for t in (*tensors, HEAD[:1] * scale)]
    outputs = local_linear_attention(*leaves, ["cauchy"], **options)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    for found, want in zip(torch.autograd.grad(outputs, leaves, grads), portable, strict=False):
        torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-8 * want.abs().max().item())


@pytest.mark.parametrize("kernel", ["gaussian", "cauchy", "tricube"])
def test_gradients_do_not_cancel_far_from_the_origin(kernel):
    """In float32, points near 5e5 and 50 apart, whose means are no float32 numbers."""
    near = torch.arange(0.0, 500.0, 50.0).view(1, 10, 1) * torch.tensor([1.0, 0.0])
    near = near + spread(1, 10, 2, seed=4).float().mul(4.0).round() * 8.0
    value, h = spread(1, 10, 1, seed=3).float(), torch.tensor(120.0)
    if kernel == "tricube":
        h = h * 4.0

    def gradients(function, points, dtype):
        leaves = [each.to(dtype).clone().requires_grad_() for each in (points, value, h)]
        outputs = function(leaves[0], *leaves, [kernel])[:3]
        grads = [spread(*output.shape, seed=8).to(dtype) for output in outputs]
        return torch.autograd.grad(outputs, leaves, grads)

    got = gradients(local_linear_attention, near + 5e5, torch.float32)
    want = gradients(reference.local_linear_attention, near, torch.float64)
    for index, (found, expected) in enumerate(zip(got, want, strict=True)):
        scale = expected.abs().max()
        assert_near(found / scale, expected / scale, torch.float32, f"gradient {index}", scale=8.0)
