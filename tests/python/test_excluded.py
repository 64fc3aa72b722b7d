"""What a query may not read has no effect.

A NaN or an infinity there changes no output and no gradient. The same call with ordinary numbers in
its place is the reference. What is read propagates.
"""

import math

import mixhead
import pytest
import torch

ops = torch.ops.mixhead
B, H, DV = 2, 2, 3


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exclusions(rows, keys):
    """name: (options, the keys that no query reads; for causal the last)."""
    excluded = [keys // 3, keys - 1]
    mask = torch.ones(keys, dtype=torch.bool)
    mask[excluded] = False
    additive = normal(keys, seed=9).masked_fill(~mask, -math.inf)
    by_row = mask.expand(B, H, rows, keys)
    return {
        "bool": ({"attn_mask": mask}, excluded),
        "padding": ({"attn_mask": by_row}, excluded),
        "additive": ({"attn_mask": additive}, excluded),
        "causal": ({"is_causal": True}, [keys - 1]),
    }


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def derivatives(function, inputs, rows):
    """Outputs and gradients of the rows that are compared."""
    outputs = [o for o in function(*inputs) if o.is_floating_point()]
    loss = 0
    for i, output in enumerate(outputs):
        part = output[:, :, rows]
        weights = normal(*part.shape, seed=40 + i).to(part.dtype)
        loss = loss + torch.where(part.isfinite(), part * weights, 0.0).sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [o[:, :, rows] for o in outputs], grads


KERNELS = [
    "dot",
    "cosine",
    "gaussian",
    "laplacian",
    "matern32",
    "cauchy",
    "epanechnikov",
    "tricube",
]
FUNCTIONS = {
    **{
        f"kernel, {kernel}": lambda q, k, v, h, kernel=kernel, **o: ops.kernel_attention(
            q, k, v, h, [kernel], **o
        )
        for kernel in KERNELS
    },
    "kernel, nearest": lambda q, k, v, h, **o: ops.kernel_attention(
        q, k, v, h * 0.01, ["epanechnikov"], empty="nearest", **o
    ),
    "local linear": lambda q, k, v, h, **o: ops.local_linear_attention(
        q, k, v, h, ["gaussian"], **o
    ),
    "mixed": lambda q, k, v, h, **o: ops.mixed_attention(q, k, v, q[0], q[0, ..., :DV], h, **o),
    "mixed, joint": lambda q, k, v, h, **o: ops.mixed_attention(
        q, k, v, q[0], q[0, ..., :DV], h, rule="joint", **o
    ),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("place", ["key", "value"])
@pytest.mark.parametrize("kind", ["bool", "padding", "additive", "causal"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_excluded_numbers_change_nothing(name, kind, place, bad):
    for rows, keys, channels in ((20, 20, 3), (1, 70, 5), (70, 70, 9)):
        if kind == "causal" and rows != keys:
            continue
        options, excluded = exclusions(rows, keys)[kind]
        h = torch.tensor(1.5, dtype=torch.float64)
        q, k = normal(B, H, rows, channels), normal(B, H, keys, channels, seed=1)
        v = normal(B, H, keys, DV, seed=2)
        read_by = slice(0, keys - 1) if kind == "causal" else slice(None)

        def function(*inputs, options=options, name=name):
            return FUNCTIONS[name](*inputs, **options)

        expected, expected_grads = derivatives(function, leaves(q, k, v, h), read_by)
        spoiled_k, spoiled_v = k.clone(), v.clone()
        (spoiled_k if place == "key" else spoiled_v)[:, :, excluded] = bad
        found, grads = derivatives(function, leaves(q, spoiled_k, spoiled_v, h), read_by)
        for got, want in zip(found, expected, strict=True):
            # Windows of few points: what is summed in another order is divided by little.
            tolerance = 1e-6 if name == "local linear" else 1e-9
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        if kind == "causal":
            continue  # the last row reads it: gradients of shared inputs are rightly NaN
        for got, want in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", ["gate", "joint"])
def test_the_future_does_not_leak(rule):
    """The smallest case seen: rows 48 to 62 of 64 read a NaN in the value of the last key."""
    q = torch.randn(1, 64, 8)
    v = q.clone()
    v[0, 63] = math.nan
    memory = torch.randn(1, 5, 8)
    output = mixhead.mixed_attention(
        q, q, v, memory, memory, 0 * q[..., :1], rule=rule, is_causal=True
    )
    assert output[0, :63].isfinite().all()
    assert output[0, 63].isnan().all()


def test_a_masked_memory_and_unnamed_slots():
    q, memory, value = normal(1, 1, 6, 4), normal(1, 9, 4, seed=1), normal(1, 9, 4, seed=2)
    mask = torch.arange(9) != 4
    index = torch.tensor([0, 2, -1, 7]).expand(1, 1, 6, 4)
    for options in ({"memory_mask": mask}, {"memory_index": index}):
        results = []
        for bad in (0.0, math.nan):
            k, v = memory.clone(), value.clone()
            k[:, 4] = v[:, 4] = bad
            inputs = leaves(q, k, v)
            output = ops.mixed_attention(
                inputs[0], q, q, inputs[1], inputs[2], torch.zeros((), dtype=q.dtype), **options
            )[0]
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        for got, want in zip(*reversed(results), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_read_propagates(name):
    h = torch.tensor(1.5, dtype=torch.float64)
    q, k, v = normal(B, H, 12, 3), normal(B, H, 12, 3, seed=1), normal(B, H, 12, DV, seed=2)
    v[0, 0, 5] = math.nan
    output = FUNCTIONS[name](q, k, v, h, is_causal=True)[0]
    assert output[0, 0, :5].isfinite().all()
    assert output[0, 1].isfinite().all()
    if name in ("kernel, epanechnikov", "kernel, tricube", "kernel, nearest"):
        return  # key 5 may lie outside of their support
    assert output[0, 0, 5:].isnan().all()


def test_second_derivatives():
    q, k, v = normal(1, 1, 4, 3), normal(1, 1, 5, 3, seed=1), normal(1, 1, 5, 2, seed=2)
    mask = torch.arange(5) != 2
    results = []
    for bad in (0.0, math.nan):
        spoiled_k, spoiled_v = k.clone(), v.clone()
        spoiled_k[..., 2, :] = spoiled_v[..., 2, :] = bad
        inputs = leaves(q, spoiled_k, spoiled_v)
        output = ops.kernel_attention(
            *inputs, torch.tensor(1.5, dtype=q.dtype), ["gaussian"], attn_mask=mask
        )[0]
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_padded_batch_of_a_layer(dtype):
    torch.manual_seed(0)
    for layer in (
        mixhead.MixedMultiheadAttention(16, 2, batch_first=True, dtype=dtype),
        mixhead.KernelMultiheadAttention(16, 2, batch_first=True, dtype=dtype),
    ):
        x = torch.randn(3, 7, 16, dtype=dtype)
        padding = torch.arange(7) >= torch.tensor([7, 5, 2]).unsqueeze(1)
        bad = x.masked_fill(padding.unsqueeze(-1), math.nan)
        output, _ = layer(x, bad, bad, key_padding_mask=padding, need_weights=False)
        expected, _ = layer(x, x, x, key_padding_mask=padding, need_weights=False)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
