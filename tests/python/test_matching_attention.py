"""matching_attention against dense Sinkhorn iterations, their unrolled gradients, and POT."""

import math
import warnings

import mixhead
import pytest
import reference
import torch
from compare import assert_near, assert_same_bits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # POT looks for every array library there is
    import ot

matching_attention = torch.ops.mixhead.matching_attention
KERNELS = ["dot", "cosine", "gaussian", "laplacian", "matern32", "matern52", "cauchy"]
COMPACT = ["epanechnikov", "tricube", "boxcar"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CONVERGED = {"iterations": 5000, "tolerance": 1e-13}


def randn(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def inputs(batch=(2,), heads=2, rows=5, columns=4, channels=3, shared=False):
    leading = () if shared else batch
    return (
        randn(*batch, heads, rows, channels, seed=1),
        randn(*leading, heads, columns, channels, seed=2),
        randn(*leading, heads, columns, 4, seed=3),
    )


def scores_of(query, key, bandwidth, kernel):
    """log K (..., L, S), every pair stored."""
    heads, channels = query.shape[-3], query.shape[-1]
    if bandwidth is None:
        bandwidth = torch.tensor(channels**0.25, dtype=torch.float64)
    bandwidth = bandwidth.double()
    bandwidth = bandwidth.reshape(-1, 1, 1) if bandwidth.dim() < 2 else bandwidth.unsqueeze(1)
    bandwidth = bandwidth.expand(heads, 1, -1)
    names = kernel * heads if len(kernel) == 1 else kernel
    each = [
        reference.log_kernel(name, query[..., h, :, :], key[..., h, :, :], bandwidth[h])
        for h, name in enumerate(names)
    ]
    return torch.stack(each, -3)


def dense(
    query,
    key,
    value,
    bandwidth,
    kernel,
    *,
    row_mass=None,
    column_mass=None,
    dustbin=None,
    iterations=50,
    tolerance=0.0,
    scores=None,
):
    """Sinkhorn on the stored matrix, the dustbin a row and a column of it; unrolled gradients."""
    query, key, value = query.double(), key.double(), value.double()
    scores = scores_of(query, key, bandwidth, kernel) if scores is None else scores
    a = torch.ones(scores.shape[:-1]).double() * (1.0 if row_mass is None else row_mass)
    b = torch.ones_like(scores[..., 0, :]) * (1.0 if column_mass is None else column_mass)
    if dustbin is None:
        b = b * a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True)
    else:
        edge = dustbin.double().reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, edge], -1)
        scores = torch.cat([scores, edge[..., :1, :].expand_as(scores[..., :1, :])], -2)
        value = torch.nn.functional.pad(value, (0, 0, 0, 1))
        a, b = (
            torch.cat([a, b.sum(-1, keepdim=True)], -1),
            torch.cat([b, a.sum(-1, keepdim=True)], -1),
        )
    g = torch.zeros_like(b)
    for _ in range(iterations):
        f = a.log() - (scores + g.unsqueeze(-2)).logsumexp(-1)
        g = b.log() - (scores + f.unsqueeze(-1)).logsumexp(-2)
    g = g - g.mean(-1, keepdim=True)
    f = a.log() - (scores + g.unsqueeze(-2)).logsumexp(-1)
    plan = (f.unsqueeze(-1) + scores + g.unsqueeze(-2)).exp()
    output = plan / a.unsqueeze(-1) @ value
    if dustbin is None:
        return output, f, g
    return output[..., :-1, :], f[..., :-1], g[..., :-1]


HEAD = torch.tensor([1.25, 2.0]).double()
MASSES = {"row_mass": randn(5, seed=4).exp(), "column_mass": randn(2, 4, seed=5).exp()}
BIN = torch.tensor([0.5, -0.5]).double()
OPTIONS = {
    "plain": (inputs(), HEAD, {}),
    "scalar bandwidth": (inputs(), HEAD[0], {}),
    "default bandwidth": (inputs(), None, {}),
    "bandwidth per channel": (inputs(), randn(2, 3, seed=6).abs() + 1, {}),
    "shared points": (inputs(shared=True), HEAD, {}),
    "no batch": (inputs(batch=()), HEAD, {}),
    "two batch dimensions": (inputs(batch=(2, 3)), HEAD, {}),
    "more columns": (inputs(rows=3, columns=7), HEAD, {}),
    "masses": (inputs(), HEAD, MASSES),
    "dustbin": (inputs(), HEAD, {"dustbin": BIN}),
    "one dustbin, shared points": (inputs(shared=True), HEAD, {"dustbin": BIN[0]}),
    "dustbin, masses": (inputs(), HEAD, {"dustbin": BIN, **MASSES}),
}


def cast(tensors, dtype):
    return [tensor.to(dtype) if torch.is_tensor(tensor) else tensor for tensor in tensors]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_after_a_few_iterations(name, kernel):
    tensors, bandwidth, options = OPTIONS[name]
    if kernel == "cosine" and bandwidth is not None and bandwidth.dim() == 2:
        bandwidth = bandwidth[:, 0]
    for iterations in (0, 1, 7):
        call = {**options, "iterations": iterations}
        got = matching_attention(*tensors, bandwidth, [kernel], **call, tolerance=0.0)
        want = dense(*tensors, bandwidth, [kernel], **call)
        for result, expected, what in zip(got, want, ("output", "row", "column"), strict=True):
            assert_near(result, expected, torch.float64, f"{what}, {iterations} iterations")


@pytest.mark.parametrize("name", ["plain", "dustbin, masses"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(name, dtype):
    tensors, bandwidth, options = OPTIONS[name]
    rounded = cast(tensors, dtype)
    wide = cast(rounded, torch.float64)
    names = list(options)
    others = cast(options.values(), torch.float32 if dtype != torch.float64 else dtype)

    def results(function, tensors, others):
        leaves = [tensor.clone().requires_grad_() for tensor in (*tensors, *others)]
        keywords = dict(zip(names, leaves[3:], strict=True))
        h = bandwidth.to(others[0].dtype if others else tensors[0].dtype)
        outputs = function(*leaves[:3], h, ["gaussian"], **keywords, iterations=200, tolerance=1e-7)
        loss = outputs[0].double().square().sum() + outputs[1].double().exp().sum()
        return outputs, torch.autograd.grad(loss + outputs[2].double().square().sum(), leaves)

    outputs, grads = results(matching_attention, rounded, others)
    expected, wanted = results(dense, wide, cast(others, torch.float64))
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert [output.dtype for output in outputs] == [dtype, wide_dtype, wide_dtype]
    loose = 1e4 if dtype == torch.float64 else 10.0  # stops at 1e-7 in every dtype
    for got, want in zip(outputs, expected, strict=True):
        assert_near(got, want, got.dtype, scale=loose)
    for got, want in zip(grads, wanted, strict=True):
        assert_near(got, want, got.dtype, scale=2 * loose)


@pytest.mark.parametrize("kernel", KERNELS)
def test_agrees_with_pot(kernel):
    query, key, value = inputs(batch=(), heads=1, rows=9, columns=6)
    a, b = randn(9, seed=7).exp(), randn(6, seed=8).exp()
    a, b = a / a.sum(), b / b.sum()
    h = torch.tensor(1.5).double()
    output, f, g = matching_attention(
        query, key, value, h, [kernel], row_mass=a, column_mass=b, **CONVERGED
    )
    cost = -scores_of(query, key, h, [kernel])[0]
    plan = torch.from_numpy(
        ot.sinkhorn(
            a.numpy(),
            b.numpy(),
            cost.numpy(),
            1.0,
            method="sinkhorn_log",
            stopThr=1e-15,
            numItermax=20000,
        )
    )
    ours = (f[0].unsqueeze(-1) - cost + g[0]).exp()
    torch.testing.assert_close(ours, plan, rtol=0, atol=1e-10)
    torch.testing.assert_close(output[0], plan @ value[0] / a.unsqueeze(-1), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (64, 40), (1000, 1000), (1000, 700)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_marginals(rows, columns, dtype):
    query, key = randn(1, rows, 2, seed=1).to(dtype), randn(1, columns, 2, seed=2).to(dtype)
    h = torch.tensor(0.7, dtype=dtype)
    # float32 rounds log K itself to 1e-7 of its size
    limit = 1e-6 if dtype == torch.float64 else 1e-5
    options = {"iterations": 500, "tolerance": limit / 4}
    _, f, g = matching_attention(query, key, key, h, ["gaussian"], **options)
    scores = scores_of(query.double(), key.double(), h, ["gaussian"])
    plan = (f.double().unsqueeze(-1) + scores + g.double().unsqueeze(-2)).exp()
    assert (plan.sum(-1) - 1).abs().max() <= limit
    assert (plan.sum(-2) * columns / rows - 1).abs().max() <= limit


def test_no_iterations_is_the_row_softmax():
    tensors, bandwidth, _ = OPTIONS["plain"]
    output, f, g = matching_attention(*tensors, bandwidth, ["laplacian"], iterations=0)
    rows, mass = torch.ops.mixhead.kernel_attention(*tensors, bandwidth, ["laplacian"])
    assert_same_bits((output, f, g), (rows, -mass, torch.zeros_like(g)))


@pytest.mark.parametrize("name", ["plain", "shared points", "masses", "dustbin, masses"])
def test_gradients_are_those_of_unrolled_iterations(name):
    tensors, bandwidth, options = OPTIONS[name]
    names = list(options)
    leaves = [t.clone().requires_grad_() for t in (*tensors, bandwidth, *options.values())]

    def gradients(function, **keywords):
        outputs = function(
            *leaves[:4], ["gaussian"], **dict(zip(names, leaves[4:], strict=True)), **keywords
        )
        weights = [randn(*output.shape, seed=9) for output in outputs]
        loss = sum((output * w).sum() for output, w in zip(outputs, weights, strict=True))
        return torch.autograd.grad(loss, leaves)

    got = gradients(matching_attention, **CONVERGED)
    want = gradients(dense, iterations=500)
    for grad, expected in zip(got, want, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["plain", "dustbin, masses"])
def test_derivatives(kernel, name):
    _, _, options = OPTIONS[name]
    query, key, value = (randn(2, rows, 2, seed=rows).requires_grad_() for rows in (3, 4, 4))
    bandwidth = (HEAD + 0.5).requires_grad_()
    chosen = {
        name: (tensor[..., :3] if name == "row_mass" else tensor).clone().requires_grad_()
        for name, tensor in options.items()
    }

    def call(*tensors):
        keywords = dict(zip(chosen, tensors[4:], strict=True))
        return matching_attention(*tensors[:4], [kernel], **keywords, **CONVERGED)

    leaves = (query, key, value, bandwidth, *chosen.values())
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_second_derivative_entry_by_entry():
    query, key, value = (randn(1, rows, 2, seed=rows).requires_grad_() for rows in (3, 2, 2))
    dustbin = torch.tensor(0.3).double().requires_grad_()

    def call(query, key, value, dustbin):
        return matching_attention(
            query, key, value, None, ["gaussian"], dustbin=dustbin, **CONVERGED
        )

    assert torch.autograd.gradgradcheck(call, (query, key, value, dustbin))


def test_second_derivative_with_frozen_arguments():
    """kernel_attention's second derivative where some arguments take no gradient."""
    query, key, value = inputs(batch=(), heads=1, rows=3, columns=2)
    query.requires_grad_()
    call = lambda query: matching_attention(query, key, value, None, ["gaussian"], **CONVERGED)  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (query,))


@pytest.mark.parametrize("kernel", COMPACT)
def test_points_without_a_partner(kernel):
    """The last row and the last column reach nothing: no mass, output 0, gradients finite."""
    query, key, value = (randn(1, 6, 2, seed=seed, scale=0.1) for seed in (1, 2, 3))
    query[0, -1], key[0, -1] = 50.0, -50.0
    for tensor in (query, key, value):
        tensor.requires_grad_()
    output, f, g = matching_attention(query, key, value, torch.tensor(2.0).double(), [kernel])
    assert torch.equal(output[0, -1], torch.zeros(2).double())
    assert f[0, -1] == -math.inf
    assert g[0, -1] == -math.inf
    assert f[0, :-1].isfinite().all()
    loss = output.square().sum() + f[0, :-1].sum() + g[0, :-1].square().sum()
    grads = torch.autograd.grad(loss, (query, key, value))
    assert all(grad.isfinite().all() for grad in grads)
    assert torch.equal(grads[0][0, -1], torch.zeros(2).double())
    assert torch.equal(grads[1][0, -1], torch.zeros(2).double())


def test_points_without_mass_are_as_if_absent():
    query, key, value = inputs(batch=(), heads=1)
    row_mass, column_mass = torch.ones(5).double(), torch.ones(4).double()
    row_mass[2], column_mass[1] = 0.0, 0.0
    masses = {"row_mass": row_mass.requires_grad_(), "column_mass": column_mass.requires_grad_()}
    output, f, g = matching_attention(query, key, value, None, ["dot"], **masses, **CONVERGED)
    rows, columns = [0, 1, 3, 4], [0, 2, 3]
    want = matching_attention(
        query[:, rows], key[:, columns], value[:, columns], None, ["dot"], **CONVERGED
    )
    torch.testing.assert_close(output[:, rows], want[0])
    torch.testing.assert_close(f[:, rows], want[1])
    torch.testing.assert_close(g[:, columns], want[2])
    assert f[0, 2] == g[0, 1] == -math.inf
    grads = torch.autograd.grad(output[:, rows].square().sum(), list(masses.values()))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (5, 0), (0, 0)])
@pytest.mark.parametrize("dustbin", [None, BIN], ids=["", "dustbin"])
def test_empty_sides(rows, columns, dustbin):
    tensors = [tensor.requires_grad_() for tensor in inputs(rows=rows, columns=columns)]
    output, f, g = matching_attention(*tensors, HEAD, ["gaussian"], dustbin=dustbin)
    assert output.shape == (2, 2, rows, 4)
    assert (f.shape, g.shape) == ((2, 2, rows), (2, 2, columns))
    assert not output.isnan().any()
    (output.sum() + f.masked_fill(f.isinf(), 0.0).sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in tensors)


def test_small_bandwidths_in_float32():
    """Scores down to -1e5, where exp(scores) is 0: the potentials stay finite and right."""
    query, key = randn(1, 40, 2, seed=1).float(), randn(1, 30, 2, seed=2).float()
    h = torch.tensor(0.01)
    output, f, g = matching_attention(query, key, key, h, ["gaussian"], iterations=300)
    assert f.isfinite().all()
    assert g.isfinite().all()
    scores = -(torch.cdist(query.double(), key.double()) / h.double()).square() / 2
    assert scores.max(-1).values.min() < -745  # the kernel itself is 0 in float64 too
    want = dense(query, key, key, h, ["gaussian"], iterations=300, scores=scores)
    assert_near(output, want[0], torch.float32, scale=1e3)
    assert_near(f, want[1], torch.float32, scale=10.0)


def test_tolerance_ends_the_iterations():
    tensors, bandwidth, _ = OPTIONS["plain"]
    loose = matching_attention(*tensors, bandwidth, ["gaussian"], iterations=1000, tolerance=1e-3)
    tight = matching_attention(*tensors, bandwidth, ["gaussian"], **CONVERGED)
    apart = (loose[2] - tight[2]).abs().max()
    assert 1e-9 < apart < 1e-2


def test_nan_propagates():
    query, key, value = inputs()
    query[0, 0, 0, 0] = math.nan
    query.requires_grad_()
    output, _, _ = matching_attention(query, key, value, HEAD, ["gaussian"], iterations=3)
    assert output[0, 0].isnan().all()
    assert output[1].isfinite().all()
    (grad,) = torch.autograd.grad(output.sum(), query)
    assert grad[0, 0].isnan().any()
    assert grad[1].isfinite().all()


def test_same_bits_twice():
    tensors = [tensor.requires_grad_() for tensor in inputs(rows=60, columns=50)]

    def once():
        outputs = matching_attention(*tensors, HEAD, ["gaussian"])
        return *outputs, *torch.autograd.grad(outputs[0].square().sum(), tensors)

    assert_same_bits(once(), once())


# opcheck looks at .grad of what the op returned, which torch warns of.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["plain", "shared points", "dustbin, masses"])
def test_opcheck(name):
    tensors, bandwidth, options = OPTIONS[name]
    leaves = [tensor.clone().requires_grad_() for tensor in (*tensors, bandwidth)]
    options = {name: tensor.clone().requires_grad_() for name, tensor in options.items()}
    torch.library.opcheck(matching_attention, (*leaves, ["gaussian"]), options)


def test_autocast():
    query, key, value = cast(inputs(), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, f, g = matching_attention(query, key, value, HEAD.float(), ["gaussian"])
    assert [output.dtype, f.dtype, g.dtype] == [torch.bfloat16, torch.float32, torch.float32]


class Model(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        return mixhead.matching_attention(query, key, value, None, "gaussian", iterations=20)


@pytest.mark.parametrize("way", ["script", "compile", "export"])
def test_every_way_of_calling(way):
    tensors = [tensor.requires_grad_() for tensor in inputs()]
    model = Model()
    run = {
        "script": lambda: torch.jit.script(model),
        "compile": lambda: torch.compile(model, fullgraph=True, backend="aot_eager"),
        "export": lambda: torch.export.export(model, tuple(tensors)).module(),
    }[way]()
    got, want = run(*tensors), model(*tensors)
    assert_same_bits(got, want)
    loss = lambda outputs: outputs[0].square().sum() + outputs[2].square().sum()  # noqa: E731
    assert_same_bits(
        torch.autograd.grad(loss(got), tensors), torch.autograd.grad(loss(want), tensors)
    )


BAD = {
    "kernel": [(["gauss"], 'one of dot, cosine.*got "gauss"')],
    "bandwidth": [(torch.tensor(0.0).double(), "positive, got 0")],
    "key": [
        (randn(2, 2, 4, 5), r"3 channels like query, got \(2, 2, 4, 5\)"),
        (randn(2, 1, 4, 3), r"2 heads like query .*, got \(2, 1, 4, 3\)"),
    ],
    "value": [(randn(2, 2, 5, 4), r"4 rows .*got \(2, 2, 5, 4\)")],
    "row_mass": [
        (torch.ones(4).double(), r"broadcast to \(2, 2, 5\), got \(4,\)"),
        (torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0]).double(), "not be negative, got -1"),
        (torch.full((5,), math.nan).double(), "not be negative, got -?nan"),
        (torch.ones(5).half(), "Double like query or float32, got Half"),
    ],
    "column_mass": [(torch.ones(5).double(), r"broadcast to \(2, 2, 4\), got \(5,\)")],
    "dustbin": [
        (torch.ones(3).double(), r"a scalar or \(2,\), got \(3,\)"),
        (torch.ones(2, 1).double(), r"a scalar or \(2,\), got \(2, 1\)"),
    ],
    "iterations": [(-1, "not be negative, got -1")],
    "tolerance": [(-1.0, "not be negative, got -1"), (math.nan, "not be negative, got -?nan")],
}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [(name, *each) for name, entries in BAD.items() for each in entries],
)
def test_bad_input(argument, value, message):
    query, key, values = inputs()
    arguments = {
        "query": query,
        "key": key,
        "value": values,
        "bandwidth": HEAD,
        "kernel": ["gaussian"],
        argument: value,
    }
    with pytest.raises(RuntimeError, match=f"matching_attention: {argument} must .*{message}"):
        matching_attention(**arguments)
