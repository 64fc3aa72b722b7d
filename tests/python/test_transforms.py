"""torch.func and forward mode: every operator under every transform.

Compared with plain differences, loops and PyTorch's own derivatives of the float64 reference. A
warning, such as that of vmap's slow loop, is an error.
"""

import math

import mixhead
import pytest
import reference
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

ops = torch.ops.mixhead
D, DV = 3, 2


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def points(queries=3, keys=4):
    return (normal(2, 2, queries, D), normal(2, 2, keys, D, seed=1), normal(2, 2, keys, DV, seed=2))


MASK = torch.ones(3, 4, dtype=torch.bool).tril(1)

# name: (function of the inputs to a tuple of differentiable outputs, inputs)
OPERATORS = {
    "mixed_attention": (
        lambda q, k, v, mk, mv, mix: ops.mixed_attention(q, k, v, mk, mv, mix),
        (*points(), normal(2, 5, D), normal(2, 5, DV), normal(2, 1, 1)),
    ),
    "mixed_attention, joint, masked": (
        lambda q, k, v, mk, mv, mix: ops.mixed_attention(
            q, k, v, mk, mv, mix, rule="joint", attn_mask=MASK, is_causal=True
        ),
        (*points(), normal(2, 2, 5, D), normal(2, 2, 5, DV), normal(2, 1, 1)),
    ),
    "mixed_attention, named slots": (
        lambda q, k, v, mk, mv, mix: ops.mixed_attention(
            q, k, v, mk, mv, mix, memory_index=torch.arange(24).view(2, 2, 3, 2) % 6 - 1
        ),
        (*points(), normal(2, 5, D), normal(2, 5, DV), normal(2, 1, 1)),
    ),
    **{
        f"kernel_attention, {kernel}": (
            lambda q, k, v, h, kernel=kernel: ops.kernel_attention(q, k, v, h, [kernel]),
            (*points(), torch.tensor(1.7, dtype=torch.float64)),
        )
        for kernel in ("dot", "cosine", "gaussian", "matern52", "cauchy")
    },
    "local_linear_attention": (
        lambda q, k, v, h: ops.local_linear_attention(q, k, v, h, ["gaussian"]),
        (*points(3, 9), torch.tensor([2.0, 1.5], dtype=torch.float64)),
    ),
    "topk_keys": (
        lambda q, k: ops.topk_keys(q, k, 2)[:1],
        (normal(2, 2, 3, D), normal(2, 6, D)),
    ),
    "merge_attention": (
        lambda a, b, la, lb: ops.merge_attention([a, b], [la, lb]),
        (normal(2, 3, D), normal(2, 3, D, seed=1), normal(2, 3), normal(2, 3, seed=1)),
    ),
}
each = pytest.mark.parametrize("name", OPERATORS)


def scalar(function):
    """One number of all outputs, nothing of which is symmetric."""

    def total(*inputs):
        outputs = function(*inputs)
        return sum(
            (o * torch.sin(torch.arange(o.numel()).view(o.shape) + 1.0)).sum() for o in outputs
        )

    return total


def differences(function, inputs, tangents, step=1e-5):
    """The directional derivative by central differences of fourth order."""
    weights = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
    with torch.no_grad():
        results = {
            s: function(*[i + s * step * t for i, t in zip(inputs, tangents, strict=True)])
            for s in weights
        }
    return [
        sum(w * results[s][i] for s, w in weights.items()) / step for i in range(len(results[1]))
    ]


@each
def test_jvp_is_the_difference(name):
    function, inputs = OPERATORS[name]
    tangents = [normal(*i.shape, seed=7) for i in inputs]
    _, found = jvp(function, inputs, tuple(tangents))
    for got, want in zip(found, differences(function, inputs, tangents), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@each
# PyTorch's own, of any function with constants in it.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_forward_ad_and_linearize(name):
    function, inputs = OPERATORS[name]
    tangents = tuple(normal(*i.shape, seed=7) for i in inputs)
    _, expected = jvp(function, inputs, tangents)
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(i, t) for i, t in zip(inputs, tangents, strict=True)
        ]
        found = [torch.autograd.forward_ad.unpack_dual(o).tangent for o in function(*duals)]
    _, linear = linearize(function, *inputs)
    for got, other, want in zip(found, linear(*tangents), expected, strict=True):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(other, want)


@each
def test_grad_and_vjp_are_autograd(name):
    function, inputs = OPERATORS[name]
    total, everything = scalar(function), tuple(range(len(inputs)))
    leaves = [i.clone().requires_grad_() for i in inputs]
    expected = torch.autograd.grad(total(*leaves), leaves)
    found = grad(total, argnums=everything)(*inputs)
    _, pull = vjp(total, *inputs)
    for got, other, want in zip(
        found, pull(torch.ones((), dtype=torch.float64)), expected, strict=True
    ):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(other, want)


@each
def test_hessian_vector_products_both_ways(name):
    function, inputs = OPERATORS[name]
    total = scalar(function)
    tangents = tuple(normal(*i.shape, seed=7) for i in inputs)
    slopes = grad(total, argnums=tuple(range(len(inputs))))
    _, forward_over_reverse = jvp(slopes, inputs, tangents)
    reverse_over_forward = grad(
        lambda *x: jvp(total, x, tangents)[1], argnums=tuple(range(len(inputs)))
    )(*inputs)
    expected = differences(slopes, inputs, tangents, step=1e-4)
    for got, other, want in zip(forward_over_reverse, reverse_over_forward, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(other, got, rtol=1e-9, atol=1e-9)


@each
def test_jacobians_and_hessian(name):
    function, inputs = OPERATORS[name]
    total = scalar(function)
    forward = jacfwd(lambda q: function(q, *inputs[1:])[0])(inputs[0])
    backward = jacrev(lambda q: function(q, *inputs[1:])[0])(inputs[0])
    torch.testing.assert_close(forward, backward)
    found = hessian(lambda q: total(q, *inputs[1:]))(inputs[0])
    expected = torch.autograd.functional.hessian(lambda q: total(q, *inputs[1:]), inputs[0])
    torch.testing.assert_close(found, expected)


@each
def test_vmap_is_a_loop(name):
    function, inputs = OPERATORS[name]
    for mapped in ({0}, set(range(len(inputs))), {len(inputs) - 1}):
        dims = tuple(0 if i in mapped else None for i in range(len(inputs)))
        stacked = [
            torch.stack([x + 0.1 * n for n in range(3)]) if i in mapped else x
            for i, x in enumerate(inputs)
        ]
        found = vmap(function, in_dims=dims)(*stacked)
        for n in range(3):
            one = function(*[x[n] if i in mapped else x for i, x in enumerate(stacked)])
            for got, want in zip(found, one, strict=True):
                torch.testing.assert_close(got[n], want)


@each
def test_gradients_of_each_sample(name):
    function, inputs = OPERATORS[name]
    total = scalar(function)
    stacked = [torch.stack([x, x + 0.1]) for x in inputs]
    found = vmap(grad(total))(*stacked)
    twice = vmap(vmap(grad(total)))(*[torch.stack([x, x]) for x in stacked])
    for n in range(2):
        want = grad(total)(*[x[n] for x in stacked])
        torch.testing.assert_close(found[n], want)
        torch.testing.assert_close(twice[1, n], want)


@each
def test_gradcheck_in_every_mode(name):
    function, inputs = OPERATORS[name]
    leaves = [i.clone().requires_grad_() for i in inputs]
    assert torch.autograd.gradcheck(
        function, leaves, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True, atol=1e-6,
    )  # fmt: skip


def test_jvp_of_the_reference():
    """The tangent is that of plain PyTorch, to rounding."""
    _, inputs = OPERATORS["mixed_attention"]
    tangents = tuple(normal(*i.shape, seed=7) for i in inputs)
    _, found = jvp(ops.mixed_attention, inputs, tangents)
    _, expected = jvp(reference.mixed_attention, inputs, tangents)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_where_nothing_requires_a_gradient_the_tangent_is_not_zero():
    q = torch.randn(2, 5, 8)
    _, tangent = jvp(lambda q: mixhead.mixed_attention(q, q, q, q, q, torch.zeros(1)), (q,), (q,))
    assert tangent.abs().max() > 0.1


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap_draws_as_asked(randomness):
    _, (q, k, v, mk, mv, mix) = OPERATORS["mixed_attention"]
    stacked = torch.stack([q, q])

    def call(q):
        return ops.mixed_attention(q, k, v, mk, mv, mix, dropout_p=0.5)[0]

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(stacked)
    first, second = vmap(call, randomness=randomness)(stacked)
    assert torch.equal(first, second) == (randomness == "same")


@pytest.mark.parametrize("kind", ["mixed", "kernel"])
def test_layers_by_sample(kind):
    torch.manual_seed(0)
    kinds = {"mixed": mixhead.MixedMultiheadAttention, "kernel": mixhead.KernelMultiheadAttention}
    layer = kinds[kind](4, 2, batch_first=True, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    x, memory = normal(3, 5, 4), normal(6, 4)
    more = {"memory": memory} if kind == "mixed" else {}

    def loss(parameters, x):
        output, _ = functional_call(layer, parameters, (x, x, x), {"need_weights": False, **more})
        return output.square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for n in range(3):
        layer.zero_grad()
        layer(x[n], x[n], x[n], need_weights=False, **more)[0].square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][n], parameter.grad, msg=name)
    _, tangent = jvp(lambda x: loss(parameters, x), (x,), (x,))
    [want] = differences(lambda x: (loss(parameters, x),), (x,), (x,))
    assert math.isclose(tangent.item(), want.item(), rel_tol=1e-7)
