"""mixed_attention beside its reference on one sample: outputs and gradients."""

import mixhead  # noqa: F401  (loads the operators)
import reference
import torch
from compare import assert_near
from samples import NAMES, floating

mixed_attention = torch.ops.mixhead.mixed_attention
OUTPUTS = ("output", "self_lse", "memory_lse")
HALVES = [torch.bfloat16, torch.float16]


def cotangents(outputs, seed=0):
    """One random gradient for each output, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]


def gradients(function, tensors, options, precision=None):
    """(outputs, gradient by argument name); an argument that no output depends on has zeros.

    The gradients that come in are random, as precise as `precision` or else the query.
    """
    inputs = {n: t for n, t in floating(tensors, options).items() if t.requires_grad}
    outputs = function(*tensors, **options)
    precision = precision or tensors[0].dtype
    grads = [
        grad.to(precision).to(output.dtype)
        for grad, output in zip(cotangents(outputs), outputs, strict=True)
    ]
    found = torch.autograd.grad(outputs, [*inputs.values()], grads, allow_unused=True)
    filled = [
        torch.zeros_like(tensor) if grad is None else grad
        for grad, tensor in zip(found, inputs.values(), strict=True)
    ]
    return outputs, dict(zip(inputs, filled, strict=True))


def reference_gradients(tensors, options):
    """The same in float64 from the same, rounded numbers: nothing is rounded after that."""
    inputs = floating(tensors, options)
    wide = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in inputs.items()}
    masks = {name: wide[name] for name in wide if name not in NAMES}
    options = {**options, **masks}
    wide_tensors = [wide[name] for name in NAMES]
    return gradients(reference.mixed_attention, wide_tensors, options, tensors[0].dtype)


def rounding_scale(outputs):
    """How much larger the scores are than ordinary ones."""
    largest = [o[o.isfinite()].abs().max().item() for o in outputs[1:] if o.isfinite().any()]
    return max([1.0, *(value / 10 for value in largest)])


def check_against_reference(sample, dtype):
    tensors, options = sample.make(dtype, requires_grad=True)
    outputs, grads = gradients(mixed_attention, tensors, options)
    expected, expected_grads = reference_gradients(tensors, options)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert [o.dtype for o in outputs] == [dtype, lse_dtype, lse_dtype]
    scale = rounding_scale(expected)
    precision = [dtype, lse_dtype, lse_dtype]
    for name, got, want, kind in zip(OUTPUTS, outputs, expected, precision, strict=True):
        assert_near(got, want, kind, name, scale)
    inputs = floating(tensors, options)
    assert grads.keys() == inputs.keys()
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype, name
        assert_near(grad, expected_grads[name], dtype, f"gradient of {name}", scale)
