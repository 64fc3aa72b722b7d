"""Values and gradients of mixed_attention against the float64 reference, in every dtype."""

import dataclasses

import hypothesis
import pytest
import reference
import torch
from against_reference import (
    HALVES,
    OUTPUTS,
    check_against_reference,
    gradients,
    mixed_attention,
    reference_gradients,
)
from compare import assert_near, assert_same_bits
from hypothesis import strategies
from samples import Sample, each_sample, floating, named


@each_sample()
def test_float64(sample):
    check_against_reference(sample, torch.float64)


@each_sample()
def test_float32(sample):
    check_against_reference(sample, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@each_sample()
def test_half(sample, dtype):
    if sample.magnitude > 1:
        # The reference's gradients come back rounded to halves; with scores of hundreds only the
        # outputs are comparable.
        tensors, options = sample.make(dtype)
        outputs = mixed_attention(*tensors, **options)
        expected = reference.mixed_attention(*tensors, **options)
        for name, got, want in zip(OUTPUTS, outputs, expected, strict=True):
            assert_near(got, want, dtype, name)
    else:
        check_against_reference(sample, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_with_float32_mix_and_masks(dtype):
    sample = dataclasses.replace(
        named("float masks with -inf"), name="float32 mix and masks", mix=("B", "Hq", "L", 1)
    )
    tensors, options = sample.make(dtype)
    tensors = [*tensors[:5], tensors[5].float() + 1e-4]
    options = {n: o.float() if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    inputs = floating(tensors, options)
    for tensor in inputs.values():
        tensor.requires_grad_()
    outputs, grads = gradients(mixed_attention, tensors, options)
    expected, expected_grads = reference_gradients(tensors, options)
    assert_near(outputs[0], expected[0], dtype, "output")
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype, name
        assert_near(grad, expected_grads[name], dtype, f"gradient of {name}")


# Determinism, threads, modes


@pytest.mark.parametrize(
    "name",
    [
        "L 67, S 513, M 130, D 20",
        "joint, L 70, S 300, M 700, index",
        "L 129, S 600, bool masks",
        "joint, L 33, S 257, M 65, grouped",
    ],
)
def test_same_bits_twice(name):
    for dtype in (torch.float32, torch.bfloat16):
        runs = []
        for _ in range(2):
            tensors, options = named(name).make(dtype, requires_grad=True)
            outputs, grads = gradients(mixed_attention, tensors, options)
            runs.append({**dict(zip(OUTPUTS, outputs, strict=True)), **grads})
        for key in runs[0]:
            assert_same_bits(runs[1][key], runs[0][key], key)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["L 67, S 513, M 130, D 20", "joint, L 70, S 300, M 700, index"])
def test_thread_counts(name, count, threads):
    threads(count)
    check_against_reference(named(name), torch.float32)


def test_gradient_modes_give_the_same_bits():
    tensors, options = named("L 67, S 513, M 130, D 20").make(torch.float32, requires_grad=True)
    expected = mixed_attention(*tensors, **options)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = mixed_attention(*tensors, **options)
        for got, want in zip(outputs, expected, strict=True):
            assert not got.requires_grad
            assert_same_bits(got, want.detach())


# Random shapes


@strategies.composite
def random_samples(draw):
    size = strategies.integers(0, 9) | strategies.sampled_from([16, 31, 65])
    one_up = strategies.integers(1, 9) | strategies.sampled_from([16, 33])
    heads, groups = draw(strategies.integers(1, 3)), draw(strategies.integers(1, 3))
    rule = draw(strategies.sampled_from(["gate", "joint"]))
    batch = tuple(draw(strategies.lists(strategies.integers(1, 3), max_size=2)))
    leading = [("B", "Hq"), ("Hq",), (1,), ()]

    def broadcast(*last):
        letters = [*draw(strategies.sampled_from(leading))]
        letters += [draw(strategies.sampled_from([letter, 1])) for letter in last]
        return tuple(letters)

    def mask(*last):
        kind = draw(strategies.sampled_from([None, "bool", "float"]))
        return None if kind is None else (kind, *broadcast(*last))

    return Sample(
        name=f"random {draw(strategies.integers(0, 99))}",
        batch=batch,
        heads=heads,
        query_heads=heads * groups,
        L=draw(size),
        S=draw(size),
        M=draw(size),
        D=draw(one_up),
        Dv=draw(one_up),
        shared=draw(strategies.booleans()),
        mix=broadcast("L", "Dv") if rule == "gate" else broadcast("L", 1),
        attn_mask=mask("L", "S"),
        memory_mask=mask("L", "M"),
        index=draw(strategies.none() | strategies.integers(0, 5)),
        options={"rule": rule, "is_causal": draw(strategies.booleans())},
    )


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
@hypothesis.given(sample=random_samples())
def test_random_shapes(sample):
    check_against_reference(sample, torch.float64)
