"""What mixed_attention means, as one softmax or two, and what it does with extreme numbers."""

import dataclasses
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from against_reference import HALVES, OUTPUTS, gradients, mixed_attention
from compare import assert_near, assert_same_bits
from samples import NAMES, Sample, floating, named


@pytest.mark.parametrize("mix", [0.0, -1.3, 2.0])
def test_joint_is_one_softmax_over_both_key_sets(mix):
    tensors, _ = Sample("joint", L=9, S=11, M=13, shared=False, mix=()).make()
    query, key, value, memory_key, memory_value, _ = tensors
    bias = torch.zeros(9, 24, dtype=torch.float64)
    bias[:, 11:] = mix
    expected = F.scaled_dot_product_attention(
        query, torch.cat([key, memory_key], -2), torch.cat([value, memory_value], -2), bias
    )
    mix = torch.tensor(mix, dtype=torch.float64)
    output, _, _ = mixed_attention(query, key, value, memory_key, memory_value, mix, rule="joint")
    assert_near(output, expected, torch.float64)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gate_is_two_scaled_dot_product_attentions(is_causal):
    tensors, _ = Sample("gate", L=9, S=9, M=13, mix=("Hq", 1, 1)).make()
    query, key, value, memory_key, memory_value, mix = tensors
    own = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    memory = F.scaled_dot_product_attention(
        query, memory_key.expand(2, -1, -1, -1), memory_value.expand(2, -1, -1, -1)
    )
    expected = own.lerp(memory, torch.sigmoid(mix))
    output, _, _ = mixed_attention(*tensors, is_causal=is_causal)
    assert_near(output, expected, torch.float64)


def test_no_memory_is_scaled_dot_product_attention():
    tensors, _ = Sample("no memory", query_heads=4, M=0, S=5).make()
    for rule in ("gate", "joint"):
        output, _, memory_lse = mixed_attention(
            *tensors, rule=rule, is_causal=True, enable_gqa=True
        )
        expected = F.scaled_dot_product_attention(*tensors[:3], is_causal=True, enable_gqa=True)
        assert_near(output, expected, torch.float64)
        assert (memory_lse == -math.inf).all()


@pytest.mark.parametrize("rule", ["gate", "joint"])
def test_mix_of_infinity_takes_one_side_whole(rule):
    tensors, _ = Sample("infinite mix", mix=("B", "Hq", "L", 1)).make(requires_grad=True)
    for infinite, one_side in ((math.inf, 1e9), (-math.inf, -1e9)):
        mix = torch.full_like(tensors[5], infinite, requires_grad=True)
        inputs = (*tensors[:5], mix)
        output, _, _ = mixed_attention(*inputs, rule=rule)
        expected, _, _ = reference.mixed_attention(*tensors[:5], torch.tensor(one_side))
        assert_near(output, expected, torch.float64)
        for grad in torch.autograd.grad(output.square().sum(), inputs):
            assert grad.isfinite().all()
        assert (
            torch.autograd.grad(mixed_attention(*inputs, rule=rule)[0].sum(), mix)[0] == 0
        ).all()


def test_index_of_every_slot_is_no_index():
    sample = Sample("every slot", M=6, memory_mask=("float", "B", "Hq", 1, "M"))
    tensors, options = sample.make()
    index = torch.stack([torch.randperm(6) for _ in range(2 * 2 * 5)]).view(2, 2, 5, 6)
    expected = mixed_attention(*tensors, **options)
    for got, want in zip(
        mixed_attention(*tensors, memory_index=index, **options), expected, strict=True
    ):
        assert_near(got, want, torch.float64)


@pytest.mark.parametrize("rule", ["gate", "joint"])
def test_rows_that_read_nothing(rule):
    """Output 0, lse -inf, gradient 0: exactly, in both masks' styles."""
    for name in ("rows that read nothing", "rows that read nothing, float masks"):
        sample = dataclasses.replace(named(name), options={"rule": rule})
        tensors, options = sample.make(torch.float32, requires_grad=True)
        outputs, grads = gradients(mixed_attention, tensors, options)
        assert (outputs[0][..., 2, :] == 0).all()
        assert (outputs[1][..., [1, 2]] == -math.inf).all()
        assert (outputs[2][..., [2, 3]] == -math.inf).all()
        assert (grads["query"][..., 2, :] == 0).all()
        assert all(grad.isfinite().all() for grad in grads.values())


# Numbers at the edge


def test_float_mask_of_the_lowest_number_is_not_nan():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rule in ("gate", "joint"):
            sample = Sample(
                "lowest",
                attn_mask=("float", "L", "S"),
                memory_mask=("float", "L", "M"),
                options={"rule": rule},
            )
            tensors, options = sample.make(dtype)
            for name in ("attn_mask", "memory_mask"):
                options[name] = torch.full_like(options[name], torch.finfo(dtype).min)
                options[name][0, 0] = 0
            for tensor in floating(tensors, options).values():
                tensor.requires_grad_()
            outputs, grads = gradients(mixed_attention, tensors, options)
            assert outputs[0].isfinite().all(), (dtype, rule)
            assert not any(o.isnan().any() for o in outputs)
            assert all(not grad.isnan().any() for grad in grads.values()), (dtype, rule)
            assert_near(
                outputs[0][..., 0, :],
                reference.mixed_attention(*tensors, **options)[0][..., 0, :],
                dtype,
            )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rule", ["gate", "joint"])
def test_half_with_large_norms(dtype, rule):
    """Dot products beyond float16's largest number (65504); the scaled scores are one-hot."""
    sample = Sample("norms", D=64, L=20, S=30, M=40, magnitude=60.0, options={"rule": rule})
    tensors, options = sample.make(dtype, requires_grad=True)
    query, key = tensors[0].double(), tensors[1].double()
    assert (query @ key.transpose(-1, -2)).abs().max() > 65504 / 2
    tensors = tuple(t.detach().clone().requires_grad_() for t in tensors)
    with torch.no_grad():
        tensors[0].mul_(3)
    outputs, grads = gradients(mixed_attention, tensors, options)
    expected = reference.mixed_attention(*tensors, **options)
    for name, got, want in zip(OUTPUTS, outputs, expected, strict=True):
        assert_near(got, want, dtype, name)
    assert not any(grad.isnan().any() for grad in grads.values())


@pytest.mark.parametrize("rule", ["gate", "joint"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("argument", NAMES)
def test_nan_and_infinity_are_not_swallowed(argument, bad, rule):
    """One bad number reaches every output that reads it, and no output of another batch entry."""
    sample = Sample("nan", shared=False, mix=("B", "Hq", "L", 1), options={"rule": rule})
    tensors, options = sample.make(torch.float32)
    clean = mixed_attention(*tensors, **options)
    tensors[NAMES.index(argument)][1, 1, 2, 0] = bad
    outputs = mixed_attention(*tensors, **options)
    for got, want in zip(outputs, clean, strict=True):
        assert_same_bits(got[0], want[0])
    if argument == "mix" and bad == math.inf:
        return  # a gate of one, tested above
    reads = outputs[0][1, 1, 2] if argument in ("query", "mix") else outputs[0][1, 1, :, 0]
    if bad == math.inf and argument in ("key", "memory_key"):
        # The sign of the query's channel decides between a score of inf and one of -inf.
        reads = reads[tensors[0][1, 1, :, 0] > 0]
    assert reads.numel()
    assert not reads.isfinite().any()


def test_nan_in_a_float_mask_is_not_swallowed():
    for name in ("attn_mask", "memory_mask"):
        sample = Sample("nan mask", **{name: ("float", "L", "S" if name == "attn_mask" else "M")})
        tensors, options = sample.make(torch.float32)
        options[name][2, 1] = math.nan
        output, _, _ = mixed_attention(*tensors, **options)
        assert output[..., 2, :].isnan().all()
        assert output[..., [0, 1, 3, 4], :].isfinite().all()
