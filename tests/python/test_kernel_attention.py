"""Values and derivatives of kernel_attention against the float64 reference."""

import math

import mixhead
import pytest
import reference
import torch
import torch.nn.functional as F
from compare import assert_near, assert_same_bits

kernel_attention = torch.ops.mixhead.kernel_attention
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
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def points(*shape, seed=0, dtype=torch.float64):
    """On a grid of 1/64 within [-2, 2]: exact in every dtype, so all see the same distances."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-128, 129, shape, generator=generator) / 64.0).to(dtype)


def inputs(batch=(2,), query_heads=2, heads=2, rows=5, keys=7, channels=3, shared=False, wide=4):
    leading = () if shared else batch
    return (
        points(*batch, query_heads, rows, channels, seed=1),
        points(*leading, heads, keys, channels, seed=2),
        points(*leading, heads, keys, wide, seed=3),
    )


HEAD = torch.tensor([1.25, 2.0])
OPTIONS = {
    "plain": (inputs(), HEAD, {}),
    "scalar bandwidth": (inputs(), torch.tensor(1.5), {}),
    "default bandwidth": (inputs(), None, {}),
    "bandwidth per channel": (inputs(), points(2, 3, seed=4).abs() + 1.0, {}),
    "shared points": (inputs(shared=True), HEAD, {}),
    "no batch": (inputs(batch=()), HEAD, {}),
    "two batch dimensions": (inputs(batch=(2, 3)), HEAD, {}),
    "grouped": (inputs(query_heads=4), torch.tensor([1.0, 1.5, 2.0, 2.5]), {"enable_gqa": True}),
    "causal": (inputs(), HEAD, {"is_causal": True}),
    "causal, more rows than keys": (inputs(rows=7, keys=4), HEAD, {"is_causal": True}),
    "leave-one-out": (inputs(rows=6, keys=6), HEAD, {"exclude_self": True}),
    "sum": (inputs(), HEAD, {"normalize": False}),
    "bool mask": (inputs(), HEAD, {"attn_mask": torch.rand(2, 1, 5, 7).gt(0.4)}),
    "prior": (inputs(), HEAD, {"attn_mask": points(7, seed=5)}),
    "rows that read nothing": (
        inputs(),
        HEAD,
        {"attn_mask": torch.arange(5).view(5, 1) > 1},
    ),
    "no keys": (inputs(keys=0), HEAD, {}),
    "no rows": (inputs(rows=0), HEAD, {}),
    "narrow, nan": (inputs(), HEAD / 4, {"empty": "nan"}),
    "narrow, nearest": (inputs(), HEAD / 4, {"empty": "nearest"}),
    "narrow, nearest readable": (
        inputs(),
        HEAD / 4,
        {"empty": "nearest", "attn_mask": torch.rand(5, 7).gt(0.6)},
    ),
}


def applies(kernel, bandwidth):
    return not (kernel == "cosine" and bandwidth is not None and bandwidth.dim() == 2)


def cases():
    for name, (tensors, bandwidth, options) in OPTIONS.items():
        for kernel in KERNELS:
            if applies(kernel, bandwidth):
                yield pytest.param(tensors, bandwidth, [kernel], options, id=f"{kernel}, {name}")
    tensors, _, _ = OPTIONS["grouped"]
    bandwidth = points(4, 3, seed=6).abs() + 1.0
    names = ["gaussian", "dot", "tricube", "matern32"]
    yield pytest.param(tensors, bandwidth, names, {"enable_gqa": True}, id="one per head")


def differentiable(tensors, bandwidth, options, dtype):
    """The floating arguments in `dtype` with gradients, and a call of them."""
    mask = options.get("attn_mask")
    leaves = [*tensors]
    leaves += [] if bandwidth is None else [bandwidth]
    leaves += [mask] if mask is not None and mask.is_floating_point() else []
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]

    def arguments():
        rest = leaves[3:]
        found = rest.pop(0) if bandwidth is not None else None
        return (*leaves[:3], found), {**options, **({"attn_mask": rest[0]} if rest else {})}

    return leaves, arguments


def results(function, tensors, bandwidth, kernel, options, dtype, wide=False):
    """Outputs and gradients; `wide`: in float64 from numbers rounded to `dtype`."""
    tensors = [tensor.to(dtype) for tensor in tensors]
    bandwidth = None if bandwidth is None else bandwidth.to(dtype)
    leaves, arguments = differentiable(
        tensors, bandwidth, options, torch.float64 if wide else dtype
    )
    positional, keywords = arguments()
    outputs = function(*positional, kernel, **keywords)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    # Where a row is empty its mass is -inf and its output may be NaN: no gradient comes in there.
    empty = outputs[1].isinf()
    grads[1] = grads[1].masked_fill(empty, 0.0)
    if options.get("empty") == "nan":
        grads[0] = grads[0].masked_fill(empty.unsqueeze(-1), 0.0)
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
    outputs, grads = results(kernel_attention, tensors, bandwidth, kernel, options, dtype)
    expected, wanted = results(
        reference.kernel_attention, tensors, bandwidth, kernel, options, dtype, wide=True
    )
    mass_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert [output.dtype for output in outputs] == [dtype, mass_dtype]
    assert_near(outputs[0], expected[0], dtype, "output")
    assert_near(outputs[1], expected[1], mass_dtype, "log_mass")
    for index, (grad, want) in enumerate(zip(grads, wanted, strict=True)):
        assert_near(grad, want, dtype, f"gradient {index}", scale=4.0)


@each_kernel
@pytest.mark.parametrize("options", [{}, {"exclude_self": True}, {"normalize": False}], ids=str)
def test_derivatives(kernel, options):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 4, 2, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    )
    shape = (2,) if kernel == "cosine" else (2, 2)
    bandwidth = (torch.rand(shape, generator=generator, dtype=torch.float64) + 2.0).requires_grad_()

    def call(*tensors):
        return kernel_attention(*tensors, [kernel], **options)

    assert torch.autograd.gradcheck(call, (query, key, value, bandwidth))
    assert torch.autograd.gradgradcheck(call, (query, key, value, bandwidth))


@pytest.mark.parametrize("leaf", range(4))
def test_second_derivative_of_one_argument_alone(leaf):
    query, key, value = (torch.randn(2, 4, 2, dtype=torch.float64) for _ in range(3))
    tensors = [query, key, value, torch.tensor([1.5, 2.0], dtype=torch.float64)]

    def call(tensor):
        return kernel_attention(*tensors[:leaf], tensor, *tensors[leaf + 1 :], ["gaussian"])

    assert torch.autograd.gradgradcheck(call, (tensors[leaf].requires_grad_(),))


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "laplacian"])
def test_derivatives_where_query_equals_key(kernel):
    """Points attend to themselves: both derivatives are right at distance 0, where there is one."""
    x, value = (torch.randn(2, 4, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    bandwidth = torch.tensor([2.5, 3.0], dtype=torch.float64, requires_grad=True)

    def call(x, value, bandwidth):
        return kernel_attention(x, x, value, bandwidth, [kernel])

    assert torch.autograd.gradcheck(call, (x, value, bandwidth))
    assert torch.autograd.gradgradcheck(call, (x, value, bandwidth))


def test_cusp_of_laplacian_has_subgradient_zero():
    point = torch.zeros(1, 1, 3, dtype=torch.float64, requires_grad=True)
    mass = kernel_attention(point, point.detach(), point.detach(), None, ["laplacian"])[1]
    (grad,) = torch.autograd.grad(mass.sum(), point)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_dot_is_scaled_dot_product_attention():
    query, key, value = inputs(channels=16)
    output, mass = kernel_attention(query, key, value, None, ["dot"])
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value))
    torch.testing.assert_close(mass, (query @ key.mT / 4.0).logsumexp(-1))


def test_gaussian_is_dot_with_a_key_bias():
    query, key, value = inputs()
    h = torch.tensor(1.5, dtype=torch.float64)
    bias = -(key / h).square().sum(-1, keepdim=True).mT / 2
    expected = F.scaled_dot_product_attention(query / h, key / h, value, attn_mask=bias, scale=1.0)
    torch.testing.assert_close(kernel_attention(query, key, value, h, ["gaussian"])[0], expected)


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian", "matern32", "matern52", "cauchy"])
def test_no_cancellation_far_from_the_origin(kernel):
    """Points near 5e5 and 100 apart in float32: torch.cdist by matrix product says 0."""
    offsets = torch.tensor([0.0, 100.0, 250.0]).view(1, 3, 1)
    far, near = offsets + 5e5, offsets
    h, value = torch.tensor(100.0), torch.randn(1, 3, 2)
    got = kernel_attention(far, far, value, h, [kernel])
    want = reference.kernel_attention(near, near, value, h, [kernel])
    assert_near(got[0], want[0], torch.float32)
    assert_near(got[1], want[1], torch.float32)


def test_zero_vector_has_cosine_zero():
    query, key, value = inputs()
    query[..., 0, :] = 0.0
    query.requires_grad_()
    output, mass = kernel_attention(query, key, value, torch.tensor(1.0).double(), ["cosine"])
    torch.testing.assert_close(mass[..., 0], torch.full_like(mass[..., 0], math.log(7)))
    (grad,) = torch.autograd.grad(output.sum(), query)
    assert grad.isfinite().all()


def test_leverage_of_a_fitted_point_is_the_diagonal_of_its_smoother():
    x, y = points(1, 9, 2, seed=8), points(1, 9, 1, seed=9)
    h = torch.tensor(1.0).double()
    _, mass = kernel_attention(x, x, y, h, ["gaussian"])
    smoother = kernel_attention(x, x, torch.eye(9).double().unsqueeze(0), h, ["gaussian"])[0]
    torch.testing.assert_close((-mass).exp()[0], smoother[0].diagonal())


def test_leave_one_out_from_leverage():
    """The residual without a point is its residual over one minus its leverage."""
    x, y = points(1, 9, 1, seed=8), points(1, 9, 1, seed=9)
    h = torch.tensor(1.5).double()
    fit, mass = kernel_attention(x, x, y, h, ["gaussian"])
    without = kernel_attention(x, x, y, h, ["gaussian"], exclude_self=True)[0]
    leverage = (-mass).exp().unsqueeze(-1)
    torch.testing.assert_close(y - without, (y - fit) / (1 - leverage))


# opcheck looks at .grad of what the op returned, which torch warns of.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kernel", ["dot", "gaussian", "tricube"])
@pytest.mark.parametrize("name", ["plain", "grouped", "prior", "leave-one-out", "narrow, nearest"])
def test_opcheck(kernel, name):
    tensors, bandwidth, options = OPTIONS[name]
    leaves, arguments = differentiable(tensors, bandwidth, options, torch.float64)
    positional, keywords = arguments()
    torch.library.opcheck(kernel_attention, (*positional, [kernel]), keywords)
    assert leaves[0].grad is None


def test_dropout_is_reproducible_and_unbiased():
    query, key, value = inputs(rows=64, keys=256)
    call = lambda: kernel_attention(query, key, value, HEAD.double(), ["cauchy"], dropout_p=0.25)  # noqa: E731
    torch.manual_seed(3)
    first = call()
    torch.manual_seed(3)
    assert_same_bits(call(), first)
    assert not torch.equal(call()[0], first[0])
    mean = torch.stack([call()[0] for _ in range(64)]).mean(0)
    torch.testing.assert_close(
        mean, kernel_attention(query, key, value, HEAD.double(), ["cauchy"])[0], atol=0.05, rtol=0
    )


def test_gradient_of_a_bandwidth_in_float32_beside_bfloat16():
    query, key, value = (tensor.bfloat16().requires_grad_() for tensor in inputs())
    bandwidth = HEAD.clone().requires_grad_()
    output, mass = kernel_attention(query, key, value, bandwidth, ["gaussian"])
    output.float().sum().add(mass.sum()).backward()
    assert bandwidth.grad.dtype == torch.float32
    assert output.dtype == torch.bfloat16


def test_autocast():
    query, key, value = (tensor.float() for tensor in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, mass = kernel_attention(query, key, value, HEAD, ["gaussian"])
    assert output.dtype == torch.bfloat16
    assert mass.dtype == torch.float32


def test_nan_propagates():
    query, key, value = inputs()
    query[0, 0, 0, 0] = math.nan
    for kernel in KERNELS:
        output, mass = kernel_attention(query, key, value, HEAD.double(), [kernel])
        assert output[0, 0, 0].isnan().all(), kernel
        assert mass[0, 0, 0].isnan(), kernel
        assert output[0, 1].isfinite().all(), kernel


def test_one_batch_dimension_may_be_partially_broadcast_in_the_mask():
    tensors, bandwidth, _ = OPTIONS["two batch dimensions"]
    mask = torch.rand(2, 1, 1, 5, 7).gt(0.4)
    got = kernel_attention(*tensors, bandwidth.double(), ["gaussian"], attn_mask=mask)
    want = reference.kernel_attention(*tensors, bandwidth, ["gaussian"], attn_mask=mask)
    assert_near(got[0], want[0], torch.float64)


def scripted_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, h: torch.Tensor):
    alone = mixhead.kernel_attention(query, key, value, h, "gaussian")
    output, mass = mixhead.kernel_attention(query, key, value, h, ["gaussian"], return_mass=True)
    return alone, output, mass


def test_script_and_compile():
    arguments = (*inputs(), torch.tensor(1.5).double())
    expected = kernel_attention(*arguments, ["gaussian"])
    for call in (
        scripted_call,
        torch.jit.script(scripted_call),
        torch.compile(scripted_call, fullgraph=True, backend="aot_eager"),
    ):
        alone, output, mass = call(*arguments)
        assert_same_bits(alone, expected[0])
        assert_same_bits((output, mass), expected)


BAD = {
    "kernel": [(["gauss"], 'one of dot, cosine.*got "gauss"'), (["dot"] * 3, "got 3")],
    "bandwidth": [
        (torch.tensor([1.0, -1.0]).double(), "positive, got -1"),
        (torch.tensor(math.nan).double(), "positive, got nan"),
        (torch.tensor(0.0).double(), "positive, got 0"),
        (torch.ones(3).double(), r"got \(3,\)"),
        (torch.ones(2, 2).double(), r"got \(2, 2\)"),
        (torch.ones(2).half(), "got Half"),
    ],
    "key": [
        (points(2, 2, 7, 4), r"3 channels like query, got \(2, 2, 7, 4\)"),
        (points(2, 1, 7, 3), r"2 heads like query .*, got \(2, 1, 7, 3\)"),
        (points(3, 2, 7, 3), r"batch dimensions of query .*, got \(3, 2, 7, 3\)"),
        (points(2, 2, 7, 3).float(), "got Float"),
    ],
    "value": [(points(2, 2, 6, 4), r"7 rows .*got \(2, 2, 6, 4\)")],
    "empty": [("none", 'got "none"')],
    "dropout_p": [(1.5, "got 1.5"), (math.nan, "got nan")],
    "attn_mask": [
        (torch.ones(5, 6, dtype=torch.bool), r"\(2, 2, 5, 7\), got \(5, 6\)"),
        (torch.ones(5, 7, dtype=torch.int64), "bool or floating, got Long"),
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
        "bandwidth": HEAD.double(),
        "kernel": ["gaussian"],
        argument: value,
    }
    with pytest.raises(RuntimeError, match=f"kernel_attention: {argument} must .*{message}"):
        kernel_attention(**arguments)


def test_leave_one_out_needs_as_many_keys():
    with pytest.raises(RuntimeError, match=r"kernel_attention: key must have 5 rows like query"):
        kernel_attention(*inputs(), HEAD.double(), ["gaussian"], exclude_self=True)


def test_cosine_has_no_bandwidth_per_channel():
    with pytest.raises(RuntimeError, match=r"bandwidth must be .* \"cosine\", got one per channel"):
        kernel_attention(*inputs(), torch.ones(2, 3).double(), ["cosine"])
