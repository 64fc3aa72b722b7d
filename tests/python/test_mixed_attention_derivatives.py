"""First and second derivatives of mixed_attention against finite differences and the reference."""

import dataclasses
import math

import pytest
import reference
import torch
from against_reference import OUTPUTS, gradients, mixed_attention
from compare import assert_near, assert_same_bits
from samples import NAMES, SMALL, Sample, each_sample, floating, named


@each_sample(SMALL)
def test_gradcheck_and_gradgradcheck(sample):
    tensors, options = sample.make(torch.float64, requires_grad=True)
    inputs = floating(tensors, options)
    reads = [o.isfinite() for o in mixed_attention(*tensors, **options)[1:]]

    def function(*values):
        given = dict(zip(inputs, values, strict=True))
        masks = {name: given[name] for name in given if name not in NAMES}
        output, *lses = mixed_attention(*(given[n] for n in NAMES), **{**options, **masks})
        # -inf has no numerical derivative.
        return output, *(
            torch.where(finite, lse, 0.0) for finite, lse in zip(reads, lses, strict=True)
        )

    # A float mask's -inf is a constant: a step away from it stays -inf, with difference NaN.
    if any((tensor == -math.inf).any() for tensor in inputs.values()):
        constant = {n: t for n, t in inputs.items() if n not in NAMES}
        steps = {n: t.detach().nan_to_num(neginf=0.0).requires_grad_() for n, t in constant.items()}
        closed = {n: t == -math.inf for n, t in constant.items()}
        inner = function

        def function(*values):
            given = dict(zip(inputs, values, strict=True))
            for name, mask in closed.items():
                given[name] = given[name].masked_fill(mask, -math.inf)
            return inner(*given.values())

        inputs = {**inputs, **steps}
    values = tuple(inputs.values())
    assert torch.autograd.gradcheck(function, values, atol=1e-7, rtol=1e-5)
    assert torch.autograd.gradgradcheck(function, values, atol=1e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("leaf", range(6))
def test_second_derivative_of_one_argument_alone(leaf):
    shapes = [(2, 3, 4), (2, 5, 4), (2, 5, 3), (2, 6, 4), (2, 6, 3), (2, 1, 1)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]

    def function(tensor):
        return mixed_attention(*tensors[:leaf], tensor, *tensors[leaf + 1 :])[0]

    assert torch.autograd.gradgradcheck(function, (tensors[leaf].requires_grad_(),))


@pytest.mark.parametrize("name", ["joint, gate of a head", "float masks with -inf"])
def test_second_derivative_against_reference(name):
    """Not only consistent with the first derivative: the reference's own second derivative."""
    tensors, options = named(name).make(torch.float64, requires_grad=True)
    inputs = [*floating(tensors, options).values()]

    def second(function):
        outputs = function(*tensors, **options)
        loss = (outputs[0] ** 3).sum() + sum(
            torch.where(o.isfinite(), o, 0.0).sum() for o in outputs[1:]
        )
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in grads), inputs)

    for got, want in zip(second(mixed_attention), second(reference.mixed_attention), strict=True):
        assert_near(got, want, torch.float64, scale=10)


@pytest.mark.parametrize("rule", ["gate", "joint"])
@pytest.mark.parametrize("which", range(3), ids=OUTPUTS)
def test_gradient_of_one_output_alone(which, rule):
    sample = dataclasses.replace(
        named("float masks with -inf"), mix=("B", "Hq", "L", 1), options={"rule": rule}
    )
    tensors, options = sample.make(requires_grad=True)
    inputs = floating(tensors, options)

    def alone(function):
        output = function(*tensors, **options)[which]
        return torch.autograd.grad(
            output, [*inputs.values()], torch.ones_like(output), allow_unused=True
        )

    for name, got, want in zip(
        inputs, alone(mixed_attention), alone(reference.mixed_attention), strict=True
    ):
        got = torch.zeros_like(inputs[name]) if got is None else got
        want = torch.zeros_like(inputs[name]) if want is None else want
        assert_near(got, want, torch.float64, f"gradient of {name}")


@pytest.mark.parametrize("rule", ["gate", "joint"])
@pytest.mark.parametrize("wanted", [*NAMES, "attn_mask", "memory_mask"])
def test_gradient_of_one_argument_alone(wanted, rule):
    """Asking for one gradient gives the same bits as asking for all."""
    sample = dataclasses.replace(named("float masks with -inf"), options={"rule": rule})
    tensors, options = sample.make(requires_grad=True)
    _, every = gradients(mixed_attention, tensors, options)
    for name, tensor in floating(tensors, options).items():
        tensor.requires_grad_(name == wanted)
    _, alone = gradients(mixed_attention, tensors, options)
    assert alone.keys() == {wanted}
    assert_same_bits(alone[wanted], every[wanted], wanted)


def test_gradient_through_backward_of_a_sum():
    """`sum().backward()` hands over an expanded gradient of stride 0."""
    tensors, options = named("gate of everything").make(requires_grad=True)
    sum(o.sum() for o in mixed_attention(*tensors, **options)).backward()
    ours = [tensor.grad for tensor in tensors]
    expected = sum(o.sum() for o in reference.mixed_attention(*tensors, **options))
    for got, want in zip(ours, torch.autograd.grad(expected, tensors), strict=True):
        assert_near(got, want, torch.float64)


def test_no_gradient_kept_without_a_need():
    tensors, options = named("gate of a head").make(torch.float32)
    assert not any(o.requires_grad for o in mixed_attention(*tensors, **options))


@pytest.mark.parametrize("rule", ["gate", "joint"])
def test_saves_no_more_than_inputs_and_outputs(rule):
    """Inputs, outputs and log-sum-exps; the gate also the two sides' own outputs."""
    sample = Sample("saved", L=64, S=96, M=512, options={"rule": rule})
    tensors, options = sample.make(torch.float32, requires_grad=True)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = mixed_attention(*tensors, **options)
    allowed = sum(t.nbytes for t in tensors) + sum(o.nbytes for o in outputs)
    allowed += 2 * outputs[0].nbytes if rule == "gate" else 0
    assert saved, "nothing saved for backward"
    assert sum(saved.values()) <= allowed
