"""merge_attention: exact attention over a union of key sets, from its parts."""

import dataclasses
import itertools
import math

import mixhead  # noqa: F401
import pytest
import reference
import torch
import torch.nn.functional as F
from compare import assert_near, assert_same_bits

merge_attention = torch.ops.mixhead.merge_attention


def parts(ways, shape=(2, 3, 5), channels=4, dtype=torch.float64, closed=(), requires_grad=False):
    """`ways` outputs and log-sum-exps; the rows of `closed`, (way, query), read nothing."""
    generator = torch.Generator().manual_seed(ways)
    outputs, lses = [], []
    for way in range(ways):
        output = torch.randn(*shape, channels, generator=generator, dtype=torch.float64)
        lse = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for closed_way, row in closed:
            if closed_way == way:
                output[..., row, :], lse[..., row] = 0.0, -math.inf
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        outputs.append(output.to(dtype).requires_grad_(requires_grad))
        lses.append(lse.to(lse_dtype).requires_grad_(requires_grad))
    return outputs, lses


CASES = {
    "one": {"ways": 1},
    "two": {"ways": 2},
    "five": {"ways": 5},
    "a row that reads nothing in one": {"ways": 3, "closed": [(1, 2)]},
    "a row that reads nothing in the first": {"ways": 2, "closed": [(0, 0)]},
    "a row that reads nothing in any": {"ways": 2, "closed": [(0, 3), (1, 3)]},
    "one, nothing read": {"ways": 1, "closed": [(0, 0)]},
    "no batch": {"ways": 3, "shape": (6,)},
    "no heads, no rows": {"ways": 2, "shape": (0,)},
    "one row": {"ways": 4, "shape": (), "channels": 1},
    "no channels": {"ways": 2, "channels": 0},
    "many": {"ways": 33, "shape": (2, 70)},
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@each_case
def test_values_and_gradients(case, dtype):
    outputs, lses = parts(**case, dtype=dtype, requires_grad=True)
    lse_dtype = lses[0].dtype
    merged = merge_attention(outputs, lses)
    expected = reference.merge_attention(outputs, lses)
    assert [tensor.dtype for tensor in merged] == [dtype, lse_dtype]
    assert_near(merged[0], expected[0], dtype, "output")
    assert_near(merged[1], expected[1], lse_dtype, "lse")
    weights = [torch.cos(torch.arange(t.numel()).double()).view(t.shape) for t in merged]
    grads = torch.autograd.grad(
        merged, outputs + lses, [w.to(t.dtype) for w, t in zip(weights, merged, strict=True)]
    )
    wanted = torch.autograd.grad(expected, outputs + lses, weights)
    for tensor, got, want in zip(outputs + lses, grads, wanted, strict=True):
        assert got.dtype == tensor.dtype
        assert_near(got, want.double(), dtype, "gradient")


@pytest.mark.parametrize("cuts", [(4,), (1, 9), (3, 3, 8)])
def test_is_attention_over_the_union(cuts):
    """The parts' own softmaxes, merged, are one softmax over all keys."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 5, 8).double(), torch.randn(2, 3, 12, 8).double()
    value = torch.randn(2, 3, 12, 6).double()
    edges = [0, *cuts, 12]
    outputs, lses = [], []
    for start, end in itertools.pairwise(edges):
        scores = query @ key[..., start:end, :].transpose(-1, -2) / 8**0.5
        empty = start == end
        outputs.append(
            torch.zeros(2, 3, 5, 6).double()
            if empty
            else scores.softmax(-1) @ value[..., start:end, :]
        )
        lses.append(scores.logsumexp(-1))
    output, lse = merge_attention(outputs, lses)
    assert_near(output, F.scaled_dot_product_attention(query, key, value), torch.float64)
    assert_near(lse, (query @ key.transpose(-1, -2) / 8**0.5).logsumexp(-1), torch.float64)


def test_merges_what_mixed_attention_gives():
    """Shards of a memory, each read by a call of its own, merge into one call that reads all."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 5, 8).double().unbind()
    memory_key, memory_value = torch.randn(2, 2, 30, 8).double().unbind()
    none = key[..., :0, :], value[..., :0, :]
    mix = torch.zeros(()).double()

    def read(*memory):
        output, _, lse = torch.ops.mixhead.mixed_attention(query, *none, *memory, mix)
        return output, lse

    shards = [read(memory_key[:, i::3], memory_value[:, i::3]) for i in range(3)]
    merged = merge_attention(*map(list, zip(*shards, strict=True)))
    for got, want in zip(merged, read(memory_key, memory_value), strict=True):
        assert_near(got, want, torch.float64)


# opcheck looks at .grad of the clones it makes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@each_case
def test_opcheck(case):
    outputs, lses = parts(**case, requires_grad=True)
    torch.library.opcheck(merge_attention.default, (outputs, lses))


@pytest.mark.parametrize(
    "name", ["one", "two", "a row that reads nothing in one", "a row that reads nothing in any"]
)
def test_gradcheck_and_gradgradcheck(name):
    case = {**CASES[name], "shape": (2, 4), "channels": 2}
    outputs, lses = parts(**case, requires_grad=True)
    ways = len(outputs)
    closed = [lse == -math.inf for lse in lses]

    def function(*tensors):
        # A closed row stays closed under the numerical steps; -inf has no numerical derivative.
        lses = [
            lse.masked_fill(mask, -math.inf)
            for lse, mask in zip(tensors[ways:], closed, strict=True)
        ]
        output, lse = merge_attention(list(tensors[:ways]), lses)
        return output, torch.where(lse.isfinite(), lse, 0.0)

    steps = [lse.detach().nan_to_num(neginf=0.0).requires_grad_() for lse in lses]
    assert torch.autograd.gradcheck(function, (*outputs, *steps))
    assert torch.autograd.gradgradcheck(function, (*outputs, *steps))


def test_far_apart_and_large():
    outputs, lses = parts(3)
    for offset in (-1e4, 1e4):
        merged = merge_attention(outputs, [lse + offset for lse in lses])
        expected = merge_attention(outputs, lses)
        assert_near(merged[0], expected[0], torch.float64, scale=100)
        assert_near(merged[1] - offset, expected[1], torch.float64, scale=100)
    merged = merge_attention(outputs, [lses[0], lses[1] - 1e30, lses[2] - 1e300])
    assert_near(merged[0], outputs[0], torch.float64)


def test_nan_is_not_swallowed():
    outputs, lses = parts(2)
    lses[1][0, 0, 0] = math.nan
    outputs[0][1, 1, 1, 1] = math.nan
    output, lse = merge_attention(outputs, lses)
    assert output[0, 0, 0].isnan().all()
    assert lse[0, 0, 0].isnan()
    assert output[1, 1, 1, 1].isnan()
    assert output.isnan().sum() == 5
    assert lse.isnan().sum() == 1


def test_non_contiguous_and_same_bits():
    outputs, lses = parts(3)
    strided = [o.transpose(0, -1).contiguous().transpose(0, -1) for o in outputs]
    first = merge_attention(strided, lses)
    for got, again, want in zip(
        first, merge_attention(strided, lses), merge_attention(outputs, lses), strict=True
    ):
        assert_same_bits(got, again)
        assert_near(got, want, torch.float64)


def test_compile():
    torch._dynamo.reset()
    outputs, lses = parts(3, requires_grad=True)

    def function(outputs, lses):
        output, lse = merge_attention(outputs, lses)
        return output.square().sum() + lse.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(function(outputs, lses), outputs + lses)
    for got, want in zip(
        torch.autograd.grad(compiled(outputs, lses), outputs + lses), wanted, strict=True
    ):
        assert_near(got, want, torch.float64)


@dataclasses.dataclass(frozen=True)
class Bad:
    name: str
    outputs: list
    lses: list
    message: str


_OUTPUT, _LSE = torch.zeros(2, 5, 4), torch.zeros(2, 5)
BAD = [
    Bad("no parts", [], [], r"outputs must .*got"),
    Bad("lists of different lengths", [_OUTPUT, _OUTPUT], [_LSE], r"lses must .*2.*got .*1"),
    Bad(
        "shape of another output",
        [_OUTPUT, _OUTPUT[..., :3]],
        [_LSE, _LSE],
        r"outputs\[1\] must .*\(2, 5, 4\).*got \(2, 5, 3\)",
    ),
    Bad(
        "shape of a lse",
        [_OUTPUT, _OUTPUT],
        [_LSE, _LSE[:1]],
        r"lses\[1\] must .*\(2, 5\).*got \(1, 5\)",
    ),
    Bad("dimensions of a lse", [_OUTPUT], [_LSE[..., None]], r"lses\[0\] must .*got \(2, 5, 1\)"),
    Bad(
        "an output of no dimensions",
        [torch.zeros(())],
        [torch.zeros(())],
        r"outputs\[0\] must .*got \(\)",
    ),
    Bad(
        "dtype of an output",
        [_OUTPUT, _OUTPUT.double()],
        [_LSE, _LSE],
        r"outputs\[1\] must be .*got (Double|float64)",
    ),
    Bad("integer outputs", [_OUTPUT.long()], [_LSE], r"outputs\[0\] must be .*got (Long|int64)"),
    Bad("dtype of a lse", [_OUTPUT], [_LSE.half()], r"lses\[0\] must be .*got (Half|float16)"),
    Bad("device of a lse", [_OUTPUT], [_LSE.to("meta")], r"lses\[0\] must be on cpu.*got meta"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_input(bad):
    with pytest.raises(RuntimeError, match=f"^merge_attention: {bad.message}"):
        merge_attention(bad.outputs, bad.lses)
