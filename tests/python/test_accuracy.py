"""Errors against float64, ours beside scaled_dot_product_attention's on the same input.

``python -m pytest tests/python/test_accuracy.py -s`` prints both. An error is the root mean square
over the output, or over a gradient, of the difference from the same formula in a wider type.
"""

import math

import mixhead
import numpy
import pytest
import torch
import torch.nn.functional as F

B, H, L, S, D = 2, 2, 100, 700, 64
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALE = D**-0.5


def normal(generator):
    query, key, value = (
        torch.randn(B, H, n, D, generator=generator, dtype=torch.float64) for n in (L, S, S)
    )
    return query, key, value


def large(generator):
    """Scores reach from -500 to 500."""
    query, key, value = normal(generator)
    largest = (query @ key.mT * SCALE).abs().max()
    factor = (500.0 / largest) ** 0.5
    return query * factor, key * factor, value


def constant(generator):
    return tuple(torch.full((B, H, n, D), 0.7, dtype=torch.float64) for n in (L, S, S))


def adversarial(generator):
    """Each key scores higher than all before it, so that every block of keys rescales what was
    summed; values of alternating sign cancel."""
    query, key, value = normal(generator)
    query = query.abs()
    key = 0.01 * key + torch.linspace(0.0, 3.0, S, dtype=torch.float64).view(-1, 1)
    sign = torch.ones(S, 1, dtype=torch.float64)
    sign[1::2] = -1.0
    return query, key, sign * (100.0 + value)


KINDS = {"normal": normal, "large": large, "constant": constant, "adversarial": adversarial}


def inputs(kind, dtype, requires_grad=False):
    return [
        tensor.to(dtype).requires_grad_(requires_grad)
        for tensor in KINDS[kind](torch.Generator().manual_seed(0))
    ]


def exact(query, key, value):
    """Attention in numpy's longest float: 80 bits on x86."""
    wide = [
        tensor.detach().double().numpy().astype(numpy.longdouble) for tensor in (query, key, value)
    ]
    scores = numpy.einsum("bhld,bhsd->bhls", wide[0], wide[1]) * numpy.longdouble(SCALE)
    weights = numpy.exp(scores - scores.max(-1, keepdims=True))
    return numpy.einsum("bhls,bhsd->bhld", weights / weights.sum(-1, keepdims=True), wide[2])


def sequence_alone(query, key, value):
    """The sequence's side of mixed_attention: the memory has no slot."""
    none = query.new_zeros(H, 0, D)
    return mixhead.mixed_attention(query, key, value, none, none, query.new_zeros(()))


def memory_alone(query, key, value):
    """The memory's side: the sequence has no key."""
    none = query.new_zeros(B, H, 0, D)
    return mixhead.mixed_attention(query, none, none, key, value, query.new_zeros(()))


def rms(difference):
    return math.sqrt(float((difference**2).mean()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_as_close_to_float64_as_pytorchs(kind, dtype):
    tensors = inputs(kind, dtype)
    want = exact(*tensors)

    def error(output):
        return rms(output.double().numpy().astype(numpy.longdouble) - want)

    theirs = error(F.scaled_dot_product_attention(*tensors))
    unit = torch.finfo(dtype).eps * float(numpy.abs(want).max())
    for name, function in (("sequence", sequence_alone), ("memory", memory_alone)):
        ours = error(function(*tensors))
        print(f"\n{kind:12} {dtype!s:15} {name:9} ours {ours:.2e}  SDPA {theirs:.2e}", end="")
        # Beneath an eighth of the last place of the output's own type no error shows in it.
        assert ours <= max(1.02 * theirs, unit / 8)


def gradients(function, tensors, grad):
    output = function(*tensors)
    return torch.autograd.grad(output, tensors, grad.to(output.dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["normal", "adversarial"])
def test_gradients_are_closer_to_float64_than_pytorchs(kind, dtype):
    tensors = inputs(kind, dtype, requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(B, H, L, D, generator=generator, dtype=torch.float64).to(dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]

    def plain(query, key, value):
        return (query @ key.mT * SCALE).softmax(-1) @ value

    want = gradients(plain, wide, grad)
    ours = gradients(sequence_alone, tensors, grad)
    theirs = gradients(F.scaled_dot_product_attention, tensors, grad)
    for name, a, b, exact_gradient in zip(
        ("query", "key", "value"), ours, theirs, want, strict=True
    ):
        mine, peer = (rms(g.double() - exact_gradient) for g in (a, b))
        print(f"\n{kind:12} {dtype!s:15} d {name:9} ours {mine:.2e}  SDPA {peer:.2e}", end="")
        # In float32 both are right to the last place; sums in another order differ by some percent.
        assert mine <= peer * (1.1 if dtype == torch.float32 else 1.0)
