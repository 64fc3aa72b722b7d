"""Dropout of mixed_attention: the numbers of csrc/dropout.h, recomputed in NumPy."""

import dataclasses

import mixhead  # noqa: F401
import pytest
import reference
import torch
from compare import assert_near, assert_same_bits
from samples import NAMES, SAMPLES, SMALL, Sample, each_sample, floating
from torch.utils._python_dispatch import TorchDispatchMode

mixed_attention = torch.ops.mixhead.mixed_attention

DROPPED = [
    dataclasses.replace(sample, options={**sample.options, "dropout_p": p})
    for sample in SAMPLES
    for name, p in (
        ("gate of everything", 0.3),
        ("joint, gate of a token", 0.5),
        ("memory of each batch entry", 0.1),
        ("joint, grouped heads", 0.5),
        ("float masks with -inf", 0.4),
        ("joint, rows that read nothing", 0.4),
        ("memory index, float mask", 0.5),
        ("joint, memory index, a slot twice", 0.5),
        ("causal, L > S", 0.3),
        ("two batch dimensions", 0.3),
        ("no batch dimension", 0.3),
        ("joint, no memory", 0.3),
        ("L 67, S 513, M 130, D 20", 0.2),
        ("joint, L 33, S 257, M 65, grouped", 0.7),
        ("L 70, S 300, M 700, index", 0.2),
    )
    if sample.name == name
]
each_dropped = each_sample(DROPPED)


class Seeds(TorchDispatchMode):
    """Notes the seed with which the op calls what lies below it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.mixhead._mixed_attention_forward.default:
            schema = [argument.name for argument in function._schema.arguments]
            self.seen.append(int(args[schema.index("seed")]))
        return function(*args, **(kwargs or {}))


def keep_masks(tensors, options, seed):
    """The reference's keep masks for this call."""
    rows = tensors[0].shape[:-1]
    index = options.get("memory_index")
    columns = tensors[3].shape[-2] if index is None else index.shape[-1]
    p = options["dropout_p"]
    return {
        "self_keep": reference.dropout_keep(seed, 0, (*rows, tensors[1].shape[-2]), p),
        "memory_keep": reference.dropout_keep(seed, 1, (*rows, columns), p),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_dropped
def test_dropout_against_reference(sample, dtype):
    """Forward and backward both use the numbers that the drawn seed stands for."""
    tensors, options = sample.make(dtype, requires_grad=True)
    torch.manual_seed(3)
    with Seeds() as seeds:
        outputs = mixed_attention(*tensors, **options)
    (seed,) = seeds.seen
    keep = keep_masks(tensors, options, seed)
    expected = reference.mixed_attention(*tensors, **options, **keep)
    for got, want in zip(outputs, expected, strict=True):
        assert_near(got, want, dtype)
    inputs = floating(tensors, options)
    wanted = [*inputs.values()]
    weights = [
        torch.sin(torch.arange(o.numel(), dtype=torch.float64)).view(o.shape) for o in outputs
    ]
    ours = torch.autograd.grad(
        outputs,
        wanted,
        [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)],
        allow_unused=True,
    )
    reference_grads = torch.autograd.grad(expected, wanted, weights, allow_unused=True)
    for name, got, want in zip(inputs, ours, reference_grads, strict=True):
        zeros = torch.zeros_like(inputs[name])
        got, want = (zeros if grad is None else grad for grad in (got, want))
        assert_near(got, want.double(), dtype, f"gradient of {name}")


@pytest.mark.parametrize(
    "sample",
    [
        s
        for s in SMALL
        if s.name
        in ("gate of everything", "joint, float mask (B,1,1,S)", "memory index, float mask")
    ],
    ids=lambda sample: sample.name,
)
def test_gradcheck_and_gradgradcheck_with_dropout(sample):
    tensors, options = sample.make(requires_grad=True)
    inputs = floating(tensors, options)

    def function(*values):
        given = dict(zip(inputs, values, strict=True))
        masks = {name: given[name] for name in given if name not in NAMES}
        torch.manual_seed(5)
        return mixed_attention(
            *(given[n] for n in NAMES), **{**options, **masks, "dropout_p": 0.4}
        )[0]

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


def test_manual_seed_reproduces_and_other_seeds_differ():
    tensors, _ = Sample("seeds", L=20, S=30, M=40).make(torch.float32)

    def run(seed):
        torch.manual_seed(seed)
        return mixed_attention(*tensors, dropout_p=0.5)[0]

    assert_same_bits(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(1)
    first, second = (mixed_attention(*tensors, dropout_p=0.5)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_dropout_is_the_same_for_every_thread_count():
    sample = Sample("threads", L=130, S=300, M=400, options={"dropout_p": 0.3})
    before, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            tensors, options = sample.make(torch.float64)
            runs.append(mixed_attention(*tensors, **options)[0])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert_near(run, runs[0], torch.float64)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("side", ["sequence", "memory"])
def test_rate_of_kept_weights(p, side):
    """With one-hot values the output is the dropped weights themselves."""
    L, S = 64, 128
    query, key = torch.zeros(1, 2, L, 4), torch.zeros(1, 2, S, 4)
    value = torch.eye(S).expand(1, 2, S, S)
    memory_key, memory_value = torch.zeros(2, S, 4), value[0]
    mix = torch.tensor(100.0 if side == "memory" else -100.0)
    torch.manual_seed(0)
    weights, self_lse, memory_lse = mixed_attention(
        query, key, value, memory_key, memory_value, mix, dropout_p=p
    )
    kept = weights > 0.5 / S
    expected_rate, deviation = 1 - p, (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - expected_rate) < 4 * deviation
    for dimension in (-1, -2):
        rates = kept.double().mean(dimension)
        spread = (p * (1 - p) / kept.shape[dimension]) ** 0.5
        assert (rates - expected_rate).abs().max() < 6 * spread
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / (S * (1 - p))))
    for lse in (self_lse, memory_lse):
        torch.testing.assert_close(lse, torch.full_like(lse, float(S)).log())


def test_sides_and_heads_are_dropped_independently():
    S = 256
    query, key = torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, S, 4)
    value = torch.eye(S).expand(2, 2, S, S)
    kept = []
    for mix in (-100.0, 100.0):
        torch.manual_seed(0)
        output, _, _ = mixed_attention(
            query, key, value, key[0], value[0], torch.tensor(mix), dropout_p=0.5
        )
        kept.append(output > 0.5 / S)
    rows = torch.stack(kept).flatten(0, -2).double() * 2 - 1
    correlation = rows @ rows.T / S - torch.eye(len(rows), dtype=torch.float64)
    assert correlation.abs().max() < 6 / S**0.5


def test_no_dropout_draws_no_number():
    tensors, _ = Sample("p 0").make()
    state = torch.get_rng_state()
    assert_same_bits(mixed_attention(*tensors, dropout_p=0.0), mixed_attention(*tensors))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rule", ["gate", "joint"])
def test_dropping_everything(rule):
    tensors, _ = Sample("p 1", L=9).make(requires_grad=True)
    output, self_lse, memory_lse = mixed_attention(*tensors, rule=rule, dropout_p=1.0)
    expected = mixed_attention(*tensors, rule=rule)
    assert (output == 0).all()
    assert_near(self_lse, expected[1].detach(), torch.float64)
    assert_near(memory_lse, expected[2].detach(), torch.float64)
    for grad in torch.autograd.grad(output.sum(), tensors):
        assert (grad == 0).all()
