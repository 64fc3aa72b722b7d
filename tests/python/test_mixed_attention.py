"""Values and derivatives of mixed_attention against the float64 reference."""

import dataclasses
import math

import hypothesis
import mixhead  # noqa: F401  (loads the operators)
import pytest
import reference
import torch
import torch.nn.functional as F
from compare import assert_near, assert_same_bits
from hypothesis import strategies
from samples import NAMES, SAMPLES, SMALL, Sample, floating

mixed_attention = torch.ops.mixhead.mixed_attention
OUTPUTS = ("output", "self_lse", "memory_lse")
HALVES = [torch.bfloat16, torch.float16]


def each_sample(samples=SAMPLES):
    return pytest.mark.parametrize("sample", samples, ids=lambda sample: sample.name)


def named(name):
    return next(sample for sample in SAMPLES if sample.name == name)


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


# Derivatives


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


# Meaning


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
