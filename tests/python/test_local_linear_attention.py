"""Values and derivatives of local_linear_attention against the float64 reference, statsmodels and
NumPy's pseudo-inverse."""

import math

import mixhead
import numpy
import pytest
import reference
import torch
from compare import assert_near, assert_same_bits
from statsmodels.nonparametric.kernel_regression import KernelReg

local_linear_attention = torch.ops.mixhead.local_linear_attention
KERNELS = [
    "dot",
    "cosine",
    "gaussian",
    "laplacian",
    "matern32",
    "matern52",
    "cauchy",
    "epanechnikov",
    "tricube",
    "boxcar",
]
COMPACT = ["epanechnikov", "tricube", "boxcar"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OUTPUTS = ["output", "slope", "leverage", "log_mass"]
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def points(*shape, seed=0):
    """On a grid of 1/64 within [-2, 2]: exact in every dtype, so all see the same distances."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-128, 129, shape, generator=generator) / 64.0).double()


def inputs(batch=(2,), rows=5, keys=12, channels=2, shared=False, wide=3):
    leading = () if shared else batch
    return (
        points(*batch, 2, rows, channels, seed=1),
        points(*leading, 2, keys, channels, seed=2),
        points(*leading, 2, keys, wide, seed=3),
    )


HEAD = torch.tensor([3.0, 4.0]).double()
OPTIONS = {
    "plain": (inputs(), HEAD, {}),
    "scalar bandwidth": (inputs(), torch.tensor(3.5).double(), {}),
    "default bandwidth": (inputs(keys=40), None, {}),
    "bandwidth per channel": (inputs(), points(2, 2, seed=4).abs() + 3.0, {}),
    "shared points": (inputs(shared=True), HEAD, {}),
    "no batch": (inputs(batch=()), HEAD, {}),
    "two batch dimensions": (inputs(batch=(2, 3)), HEAD, {}),
    "causal": (inputs(rows=6), HEAD, {"is_causal": True}),
    "leave-one-out": (inputs(rows=12), HEAD, {"exclude_self": True}),
    "bool mask": (inputs(keys=24), HEAD, {"attn_mask": points(2, 1, 5, 24, seed=5) > -1.0}),
    "prior": (inputs(), HEAD, {"attn_mask": points(12, seed=5)}),
    "rows that read nothing": (inputs(), HEAD, {"attn_mask": torch.arange(5).view(5, 1) > 1}),
    "no keys": (inputs(keys=0), HEAD, {}),
    "no rows": (inputs(rows=0), HEAD, {}),
    "ridge": (inputs(), HEAD, {"ridge": 0.75}),
}


def cases():
    for name, (tensors, bandwidth, options) in OPTIONS.items():
        for kernel in KERNELS:
            if kernel == "cosine" and bandwidth is not None and bandwidth.dim() == 2:
                continue  # not for this kernel
            if kernel in COMPACT and bandwidth is None:
                continue  # windows of a few keys almost in line: the reference is inexact
            yield pytest.param(tensors, bandwidth, [kernel], options, id=f"{kernel}, {name}")
    tensors, bandwidth, options = OPTIONS["bandwidth per channel"]
    yield pytest.param(tensors, bandwidth, ["dot", "tricube"], options, id="one per head")


def results(function, tensors, bandwidth, kernel, options, dtype, wide=False):
    """Outputs and gradients; `wide`: in float64 from numbers rounded to `dtype`."""
    mask = options.get("attn_mask")
    leaves = [*tensors]
    leaves += [] if bandwidth is None else [bandwidth]
    leaves += [mask] if mask is not None and mask.is_floating_point() else []
    leaves = [leaf.to(dtype).to(torch.float64 if wide else dtype) for leaf in leaves]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    rest = leaves[3:]
    h = rest.pop(0) if bandwidth is not None else None
    options = {**options, **({"attn_mask": rest[0]} if rest else {})}
    outputs = function(*leaves[:3], h, kernel, **options)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    grads[3] = grads[3].masked_fill(outputs[3].isinf(), 0.0)
    grads = [grad.to(dtype).to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
    live = [i for i, output in enumerate(outputs) if output.requires_grad]  # not boxcar's mass
    found = torch.autograd.grad(
        [outputs[i] for i in live], leaves, [grads[i] for i in live], allow_unused=True
    )
    return outputs, [
        torch.zeros_like(leaf) if grad is None else grad
        for grad, leaf in zip(found, leaves, strict=True)
    ]


@pytest.mark.parametrize(("tensors", "bandwidth", "kernel", "options"), list(cases()))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(tensors, bandwidth, kernel, options, dtype):
    outputs, grads = results(local_linear_attention, tensors, bandwidth, kernel, options, dtype)
    expected, wanted = results(
        reference.local_linear_attention, tensors, bandwidth, kernel, options, dtype, wide=True
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [output.dtype for output in outputs] == [dtype, dtype, wide, wide]
    for name, output, want in zip(OUTPUTS, outputs, expected, strict=True):
        assert_near(output, want, output.dtype, name, scale=4.0)
    for index, (grad, want) in enumerate(zip(grads, wanted, strict=True)):
        assert_near(grad, want, dtype, f"gradient {index}", scale=8.0)


@each_kernel
@pytest.mark.parametrize("options", [{}, {"exclude_self": True}, {"ridge": 0.3}], ids=str)
def test_derivatives(kernel, options):
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(2, 6, 2, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    value = torch.randn(2, 6, 1, generator=generator, dtype=torch.float64).requires_grad_()
    shape = (2,) if kernel == "cosine" else (2, 2)
    bandwidth = (torch.rand(shape, generator=generator, dtype=torch.float64) + 4.0).requires_grad_()

    def call(*tensors):
        return local_linear_attention(*tensors, [kernel], **options)

    assert torch.autograd.gradcheck(call, (query, key, value, bandwidth))
    assert torch.autograd.gradgradcheck(call, (query, key, value, bandwidth))


@pytest.mark.parametrize("argument", range(4))
def test_second_derivative_of_one_argument_alone(argument):
    tensors = [tensor.clone() for tensor in (*inputs(batch=(), rows=2, keys=6, wide=1), HEAD)]
    tensors[argument].requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda *tensors: local_linear_attention(*tensors, ["cauchy"]), tensors
    )


@pytest.mark.filterwarnings("ignore:After 0.17:FutureWarning")  # of its random numbers, not used
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_statsmodels(channels):
    """KernelReg(reg_type="ll"): the fit and its marginal effects."""
    generator = numpy.random.default_rng(channels)
    x, grid = generator.normal(size=(60, channels)), generator.normal(size=(20, channels)) * 0.7
    y = numpy.sin(x.sum(1)) + 0.1 * generator.normal(size=60)
    h = 0.8 + 0.2 * numpy.arange(channels)
    mean, effects = KernelReg(y, x, "c" * channels, "ll", bw=h).fit(grid)
    arguments = (torch.from_numpy(a).unsqueeze(0) for a in (grid, x, y[:, None], h))
    output, slope, *_ = mixhead.local_linear_attention(*arguments, "gaussian")
    numpy.testing.assert_allclose(output[0, :, 0], mean, rtol=0, atol=1e-12)
    numpy.testing.assert_allclose(slope[0, :, :, 0], effects, rtol=0, atol=1e-12)


@each_kernel
def test_a_linear_function_is_reproduced(kernel):
    query, key, _ = inputs(keys=40)
    intercept, effects = points(3, seed=5), points(2, 3, seed=6)
    output, slope, *_ = local_linear_attention(
        query, key, intercept + key @ effects, HEAD, [kernel]
    )
    torch.testing.assert_close(output, intercept + query @ effects, rtol=0, atol=1e-10)
    torch.testing.assert_close(slope, effects.expand_as(slope), rtol=0, atol=1e-10)


@each_kernel
def test_leverage_is_the_diagonal_of_the_smoother(kernel):
    x, h = points(1, 15, 2, seed=8), torch.tensor(2.5).double()
    leverage = local_linear_attention(x, x, x, h, [kernel])[2]
    smoother = local_linear_attention(x, x, torch.eye(15).double().unsqueeze(0), h, [kernel])[0]
    torch.testing.assert_close(leverage[0], smoother[0].diagonal())


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_leave_one_out_from_leverage(ridge):
    """The residual without a point is its residual over one minus its leverage, and a point put
    back has leverage / (1 + leverage)."""
    x, y, h = points(1, 15, 2, seed=8), points(1, 15, 1, seed=9), torch.tensor(1.5).double()
    options = {"ridge": ridge}
    fit, _, leverage, _ = local_linear_attention(x, x, y, h, ["gaussian"], **options)
    without, _, outside, _ = local_linear_attention(
        x, x, y, h, ["gaussian"], exclude_self=True, **options
    )
    torch.testing.assert_close(y - without, (y - fit) / (1 - leverage).unsqueeze(-1))
    torch.testing.assert_close(leverage, outside / (1 + outside))


def test_a_large_ridge_leaves_kernel_attention():
    query, key, value = inputs()
    ridged = local_linear_attention(query, key, value, HEAD, ["gaussian"], ridge=1e14)
    plain, mass = torch.ops.mixhead.kernel_attention(query, key, value, HEAD, ["gaussian"])
    torch.testing.assert_close(ridged[0], plain, rtol=0, atol=1e-10)
    torch.testing.assert_close(ridged[3], mass, rtol=0, atol=1e-12)
    assert ridged[1].abs().max() < 1e-10


def least_squares(query, key, value, bandwidth):
    """(intercept, slope, leverage) by the pseudo-inverse of the weighted design, query by query."""
    found = []
    for q in query:
        weight = numpy.exp(-0.25 * (((key - q) / bandwidth) ** 2).sum(1))  # the root of K
        design = numpy.column_stack([numpy.ones(len(key)), key - q]) * weight[:, None]
        inverse = numpy.linalg.pinv(design, rcond=1e-10)
        solution = inverse @ (value * weight[:, None])
        found.append((solution[0], solution[1:], (inverse[0] ** 2).sum()))
    return [torch.from_numpy(numpy.stack(part)) for part in zip(*found, strict=True)]


def _duplicated(key):
    return key[:, :2].repeat(1, 3, 1)


def _constant(key):
    return torch.cat([key[..., :2], torch.full_like(key[..., :1], 0.3)], -1)


def _collinear(key):
    return torch.stack([key[..., 0], 2 * key[..., 0] + 0.7, 1000 * key[..., 1]], -1)


SINGULAR = {
    "one key": lambda key: key[:, :1],
    "fewer keys": lambda key: key[:, :3],
    "duplicated keys": _duplicated,
    "constant channel": _constant,
    "collinear channels": _collinear,
    "one point": lambda key: key[:, :1].expand(1, 6, 3),
}


@pytest.mark.parametrize("design", list(SINGULAR))
@pytest.mark.parametrize("bandwidth", [[2.0, 2.0, 2.0], [1.5, 2.5, 4.0]], ids=str)
def test_singular_design_has_the_minimum_norm_solution(design, bandwidth):
    key = SINGULAR[design](points(1, 8, 3, seed=2))
    query, value = points(1, 5, 3, seed=1), points(1, key.shape[1], 2, seed=3)
    h = torch.tensor([bandwidth]).double()
    if design == "collinear channels":  # a unit of its own for the third channel
        query, h = query * torch.tensor([1, 1, 1000]), h * torch.tensor([1, 1, 1000])
    tensors = [tensor.clone().requires_grad_() for tensor in (query, key, value, h)]
    outputs = local_linear_attention(*tensors, ["gaussian"])
    expected = least_squares(*(tensor[0].numpy() for tensor in (query, key, value)), h[0].numpy())
    for output, want in zip(outputs, expected, strict=False):
        torch.testing.assert_close(output[0], want, rtol=0, atol=1e-10)
    for grad in torch.autograd.grad([o.sum() for o in outputs], tensors):
        assert grad.isfinite().all()


def test_derivative_of_a_design_of_too_few_keys():
    """However keys, queries and weights move, the rank stays: the derivative is that of the
    minimum-norm solution."""
    tensors = [
        tensor.clone().requires_grad_() for tensor in (*inputs(batch=(), keys=2, channels=3), HEAD)
    ]
    assert torch.autograd.gradcheck(
        lambda *tensors: local_linear_attention(*tensors, ["gaussian"]), tensors
    )


def test_windows_that_one_point_dominates():
    """Ten channels, a narrow bandwidth: weights and with them the spreads of a window range over
    sixteen orders of magnitude. A fitted point still has the fit that NumPy finds."""
    x = torch.randn(1, 200, 10, dtype=torch.float64)
    value = torch.randn(1, 200, 1, dtype=torch.float64)
    h = torch.tensor(0.3).double()
    output, _, leverage, _ = local_linear_attention(x, x, value, h, ["gaussian"])
    for row, here in enumerate(x[0].numpy()):
        offset = x[0].numpy() - here
        root = numpy.exp(-((offset / 0.3) ** 2).sum(1, keepdims=True) / 4)
        design = numpy.hstack([numpy.ones((200, 1)), offset])
        fit = numpy.linalg.lstsq(design * root, value[0].numpy() * root, rcond=None)[0]
        assert abs(output[0, row, 0] - fit[0, 0]) <= 1e-6
    assert leverage.min() >= 0.99
    assert leverage.max() <= 1 + 1e-9


def test_gradients_are_finite_where_the_leverage_is_not():
    """Nearest keys 60 bandwidths away: what a key put at the query would weigh is e^1800 times
    theirs."""
    key = torch.arange(6.0, dtype=torch.float64).view(1, 6, 1)
    tensors = [key, key.sin(), torch.tensor(1 / 60).double()]
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    outputs = local_linear_attention(tensors[0], *tensors, ["gaussian"], exclude_self=True)
    for output in outputs:
        grads = torch.autograd.grad(output.sum(), tensors, retain_graph=True, allow_unused=True)
        assert all(grad is None or grad.isfinite().all() for grad in grads)


def test_query_within_its_data_needs_no_shrinking():
    """A constant channel changes nothing where the query shares it."""
    query, key, value = inputs()
    expected = local_linear_attention(query, key, value, HEAD, ["gaussian"])
    wider = [torch.cat([x, torch.full_like(x[..., :1], 0.7)], -1) for x in (query, key)]
    actual = local_linear_attention(*wider, value, HEAD, ["gaussian"])
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1][..., :2, :], expected[1])
    torch.testing.assert_close(actual[1][..., 2, :], torch.zeros_like(actual[1][..., 2, :]))
    torch.testing.assert_close(actual[2], expected[2])


def test_channels_of_unlike_units():
    """Spreads of 1 and 1e-4 under one bandwidth, in float32: both slopes are found."""
    key = points(1, 30, 2, seed=2).float() * torch.tensor([1.0, 1e-4])
    effects = torch.tensor([[2.0], [3e4]])
    slope = local_linear_attention(key, key, key @ effects, torch.tensor(2.0), ["gaussian"])[1]
    torch.testing.assert_close(slope, effects.expand_as(slope), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kernel", ["gaussian", "cauchy", "tricube"])
def test_no_cancellation_far_from_the_origin(kernel):
    """In float32, points near 5e5 and apart by 50."""
    offsets = torch.arange(0.0, 500.0, 50.0).view(1, 10, 1)
    far, value, h = offsets + 5e5, torch.randn(1, 10, 2), torch.tensor(120.0)
    got = local_linear_attention(far, far, value, h, [kernel])
    want = reference.local_linear_attention(offsets, offsets, value, h, [kernel])
    for name, mine, theirs in zip(OUTPUTS, got, want, strict=True):
        assert_near(mine, theirs, torch.float32, name, scale=4.0)


def test_slope_does_not_depend_on_the_level_of_the_values():
    """In float32, values of spread 1 around 10,000."""
    query, key, value = inputs(keys=40)
    level = 1e4
    got = local_linear_attention(
        query.float(), key.float(), (value + level).float(), HEAD.float(), ["gaussian"]
    )
    want = reference.local_linear_attention(query, key, value, HEAD, ["gaussian"])
    assert_near(got[1], want[1], torch.float32, "slope")


def test_nan_propagates():
    query, key, value = inputs()
    query[0, 0, 0, 0] = math.nan
    value[1, 0, 0, 0] = math.nan
    for kernel in KERNELS:
        output, slope, leverage, mass = local_linear_attention(query, key, value, HEAD, [kernel])
        for row in (output[0, 0, 0], slope[0, 0, 0], leverage[0, 0, 0], mass[0, 0, 0]):
            assert row.isnan().all(), kernel
        assert output[0, 1].isfinite().all(), kernel
        assert output[1, 0, :, 0].isnan().all(), kernel


# opcheck looks at .grad of what the op returned, which torch warns of.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kernel", ["dot", "gaussian", "tricube"])
@pytest.mark.parametrize("name", ["plain", "prior", "leave-one-out", "bandwidth per channel"])
def test_opcheck(kernel, name):
    tensors, bandwidth, options = OPTIONS[name]
    tensors = [tensor.clone().requires_grad_() for tensor in (*tensors, bandwidth)]
    torch.library.opcheck(local_linear_attention, (*tensors, [kernel]), options)


def test_autocast():
    query, key, value = (tensor.float() for tensor in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = local_linear_attention(query, key, value, HEAD.float(), ["gaussian"])
    wide = torch.float32
    assert [output.dtype for output in outputs] == [torch.bfloat16, torch.bfloat16, wide, wide]


def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, h: torch.Tensor):
    output, slope, leverage, _ = mixhead.local_linear_attention(query, key, value, h, "gaussian")
    again = mixhead.local_linear_attention(query, key, value, h, ["gaussian"], ridge=0.5)
    return output, slope, leverage, again[0]


class Model(torch.nn.Module):
    def forward(self, query, key, value, h):
        return call(query, key, value, h)


def test_script_compile_and_export():
    arguments = (*inputs(), HEAD)
    plain = local_linear_attention(*arguments, ["gaussian"])
    ridged = local_linear_attention(*arguments, ["gaussian"], ridge=0.5)
    rows = torch.export.Dim("rows")
    dynamic = ({2: rows}, None, None, None)
    for run in (
        call,
        torch.jit.script(call),
        torch.compile(call, fullgraph=True, backend="aot_eager"),
        torch.export.export(Model(), arguments, dynamic_shapes=dynamic).module(),
    ):
        assert_same_bits(run(*arguments), (*plain[:3], ridged[0]))


BAD = {
    "kernel": [(["gauss"], 'one of dot, cosine.*got "gauss"'), (["dot"] * 3, "got 3")],
    "bandwidth": [
        (torch.tensor([1.0, -1.0]).double(), "positive, got -1"),
        (torch.tensor(math.nan).double(), "positive, got nan"),
        (torch.tensor(0.0).double(), "positive, got 0"),
        (torch.ones(3).double(), r"got \(3,\)"),
        (torch.ones(2).half(), "got Half"),
    ],
    "query": [
        (points(5, 2), r"at least 3 dimensions, got \(5, 2\)"),
        (points(2, 2, 5, 2).long(), "float32, .*, got Long"),
    ],
    "key": [
        (points(2, 2, 12, 4), r"2 channels like query, got \(2, 2, 12, 4\)"),
        (points(2, 1, 12, 2), r"2 heads like query, got \(2, 1, 12, 2\)"),
        (points(3, 2, 12, 2), r"batch dimensions of query .*, got \(3, 2, 12, 2\)"),
        (points(2, 2, 12, 2).float(), "got Float"),
    ],
    "value": [
        (points(2, 2, 6, 4), r"12 rows .*got \(2, 2, 6, 4\)"),
        (points(2, 12, 4), r"4 dimensions like key, got \(2, 12, 4\)"),
    ],
    "ridge": [(-0.5, "at least 0, got -0.5"), (math.nan, "got nan"), (math.inf, "got inf")],
    "attn_mask": [
        (torch.ones(5, 6, dtype=torch.bool), r"\(2, 2, 5, 12\), got \(5, 6\)"),
        (torch.ones(5, 12, dtype=torch.int64), "bool or floating, got Long"),
    ],
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
    with pytest.raises(RuntimeError, match=f"local_linear_attention: {argument} must .*{message}"):
        local_linear_attention(**arguments)


def test_leave_one_out_needs_as_many_keys():
    with pytest.raises(RuntimeError, match=r"attention: key must have 5 rows like query"):
        local_linear_attention(*inputs(), HEAD, ["gaussian"], exclude_self=True)
