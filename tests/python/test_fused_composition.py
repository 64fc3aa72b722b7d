"""mixed_attention composed of PyTorch's fused operators, on CPU tensors.

The CUDA kernel composes attention with a log-sum-exp and its backward, whichever back end gives
them; on CPU tensors PyTorch's flash kernel for the CPU stands in, which keeps the same contract. So
everything above the back ends is compared with the float64 reference without a GPU.
"""

import mixhead  # noqa: F401  (loads the operators)
import pytest
import reference
import torch
from against_reference import cotangents, reference_gradients
from compare import assert_near
from samples import NAMES, SAMPLES, each_sample, floating

CUDA = torch._C.DispatchKey.CUDA
forward_op = torch.ops.mixhead._mixed_attention_forward.default
backward_op = torch.ops.mixhead._mixed_attention_backward.default
ORDER = ("rule", "attn_mask", "memory_mask", "memory_index", "dropout_p", "seed")
DEFAULTS = {"rule": "gate", "dropout_p": 0.0, "is_causal": False, "enable_gqa": False}


def positional(options):
    names = [*ORDER, "is_causal", "scale", "enable_gqa"]
    return [options.get(name, DEFAULTS.get(name)) for name in names]


def composed(tensors, options, lse_gradients=True):
    """Outputs and gradients by argument name, each by a kernel registered for CUDA."""
    arguments = [*tensors, *positional(options)]
    results = forward_op._op_dk(CUDA, *arguments, True)
    grads = [
        g.to(tensors[0].dtype).to(o.dtype)
        for g, o in zip(cotangents(results[:3]), results, strict=False)
    ]
    if not lse_gradients:
        grads[1:] = [torch.empty(0, dtype=results[1].dtype)] * 2
    names = [*NAMES, "attn_mask", "memory_mask"]
    inputs = floating(tensors, options)
    wanted = [name in inputs for name in names]
    found = backward_op._op_dk(CUDA, *grads, *arguments, *results, wanted)
    return results[:3], {n: g for n, g in zip(names, found, strict=True) if n in inputs}


def is_composed(sample):
    """Whether the composition takes the sample itself, and not the portable path behind it."""
    plain = not (sample.attn_mask or sample.memory_mask or sample.index is not None)
    return plain and sample.options.get("scale", 1.0) > 0 and sample.L > 0 and 0 not in sample.batch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_sample([s for s in SAMPLES if is_composed(s)])
def test_against_reference(sample, dtype):
    tensors, options = sample.make(dtype)
    outputs, grads = composed(tensors, options)
    for tensor in floating(tensors, options).values():
        tensor.requires_grad_()
    expected, expected_grads = reference_gradients(tensors, options)
    scale = 20.0 if sample.magnitude > 1 else 1.0
    for name, got, want in zip(
        ("output", "self_lse", "memory_lse"), outputs, expected, strict=True
    ):
        assert_near(got, want, dtype, name, scale)
    for name, grad in grads.items():
        assert_near(grad, expected_grads[name], dtype, f"gradient of {name}", scale)


@each_sample([s for s in SAMPLES if not is_composed(s)][::3])
def test_the_rest_goes_to_the_portable_path(sample):
    tensors, options = sample.make(torch.float64)
    outputs, grads = composed(tensors, options)
    for tensor in floating(tensors, options).values():
        tensor.requires_grad_()
    expected, expected_grads = reference_gradients(tensors, options)
    for got, want in zip(outputs, expected, strict=True):
        assert_near(got, want, torch.float64)
    for name, grad in grads.items():
        assert_near(grad, expected_grads[name], torch.float64, f"gradient of {name}")


@pytest.mark.parametrize("rule", ["gate", "joint"])
def test_an_empty_gradient_of_a_log_sum_exp_is_zero(rule):
    sample = next(s for s in SAMPLES if s.name == "gate of a head")
    tensors, options = sample.make(torch.float64)
    options["rule"] = rule
    _, grads = composed(tensors, options, lse_gradients=False)
    inputs = [tensor.requires_grad_() for tensor in tensors]
    output = reference.mixed_attention(*inputs, **options)[0]
    expected = torch.autograd.grad(output, inputs, cotangents([output])[0])
    for name, want in zip(NAMES, expected, strict=True):
        assert_near(grads[name], want, torch.float64, f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["gate", "joint"])
def test_half_precision(rule, dtype):
    sample = next(s for s in SAMPLES if s.name == "memory of each batch entry")
    tensors, options = sample.make(dtype)
    options["rule"] = rule
    outputs, grads = composed(tensors, options)
    for tensor in tensors:
        tensor.requires_grad_()
    expected, expected_grads = reference_gradients(tensors, options)
    for got, want in zip(outputs, expected, strict=True):
        assert_near(got, want, dtype)
    for name, grad in grads.items():
        # The fused backward reads the rounded output.
        assert_near(grad, expected_grads[name], dtype, f"gradient of {name}", scale=4.0)


def test_few_rows_read_a_large_memory_in_parts():
    """5000 slots a part: more than one part, and a rest that none of them holds."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(2, 2, 1, 8), (2, 2, 3, 8), (2, 2, 3, 8), (2, 10007, 8), (2, 10007, 8), ()]
    ]
    outputs = forward_op._op_dk(CUDA, *tensors, *positional({}), False)[:3]
    for got, want in zip(outputs, reference.mixed_attention(*tensors), strict=True):
        assert_near(got, want, torch.float64)
