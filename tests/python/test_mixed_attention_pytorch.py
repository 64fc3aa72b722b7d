"""mixed_attention as PyTorch sees it: opcheck, meta, autocast, compile, export, script."""

import dataclasses

import mixhead  # noqa: F401
import pytest
import reference
import torch
from compare import assert_near, assert_same_bits
from samples import NAMES, SAMPLES, Sample, each_sample, floating
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

mixed_attention = torch.ops.mixhead.mixed_attention

OPCHECKED = [*SAMPLES, Sample("dropout", options={"dropout_p": 0.5})]


# opcheck looks at .grad of the clones it makes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@each_sample(OPCHECKED)
def test_opcheck(sample):
    dtype = torch.float32 if len(sample.name) % 2 else torch.float64
    tensors, options = sample.make(dtype, requires_grad=True)
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if sample.S and sample.M and sample.L and all(sample.batch) and sample.index != 0:
        utilities.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(mixed_attention.default, tensors, options, test_utils=utilities)


@each_sample()
def test_meta_and_fake_shapes(sample):
    """Shapes, dtypes and strides of the outputs are known without the numbers."""
    tensors, options = sample.make(torch.bfloat16)
    real = mixed_attention(*tensors, **options)
    meta_tensors, meta_options = sample.make(torch.bfloat16, device="meta")
    abstract = [mixed_attention(*meta_tensors, **meta_options)]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in tensors]
        fake_options = {
            n: mode.from_tensor(o) if isinstance(o, torch.Tensor) else o for n, o in options.items()
        }
        abstract.append(mixed_attention(*fake, **fake_options))
    for outputs in abstract:
        for got, want in zip(outputs, real, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


class Kept(TorchDispatchMode):
    """Notes how many numbers the op below autograd keeps for the backward."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function is torch.ops.mixhead._mixed_attention_forward.default:
            self.numbers = [kept.numel() for kept in results[3:]]
        return results


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_forward_alone_keeps_nothing_for_the_backward(device):
    for rule, dtype, expected in [
        ("gate", torch.float32, [1, 1]),
        ("joint", torch.float32, [0, 0]),
        ("joint", torch.bfloat16, [1, 0]),
    ]:
        sample = Sample("kept", options={"rule": rule})
        for requires_grad in (False, True):
            tensors, options = sample.make(dtype, requires_grad=requires_grad, device=device)
            with Kept() as kept:
                output = mixed_attention(*tensors, **options)[0]
            assert kept.numbers == [requires_grad * one * output.numel() for one in expected]


class Dtypes(TorchDispatchMode):
    """Notes the dtypes in which the op below autocast receives its arguments."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.mixhead._mixed_attention_forward.default:
            self.seen = {name: args[i].dtype for i, name in enumerate(NAMES)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["gate", "joint"])
def test_autocast(rule):
    sample = Sample("autocast", attn_mask=("float", "L", "S"), options={"rule": rule})
    tensors, options = sample.make(torch.float32, requires_grad=True)
    inputs = floating(tensors, options)
    with torch.autocast("cpu", dtype=torch.bfloat16), Dtypes() as dtypes:
        outputs = mixed_attention(*tensors, **options)
    assert [o.dtype for o in outputs] == [torch.bfloat16, torch.float32, torch.float32]
    assert {n: t for n, t in dtypes.seen.items() if t != torch.bfloat16} == {"mix": torch.float32}
    expected = reference.mixed_attention(*tensors, **options)
    assert_near(outputs[0], expected[0], torch.bfloat16, "output")
    for grad, tensor in zip(
        torch.autograd.grad(outputs[0].float().sum(), [*inputs.values()]),
        inputs.values(),
        strict=True,
    ):
        assert (grad.dtype, grad.shape) == (torch.float32, tensor.shape)


def test_autocast_leaves_float64_alone():
    tensors, options = Sample("autocast float64").make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = mixed_attention(*tensors, **options)
    for got, want in zip(outputs, mixed_attention(*tensors, **options), strict=True):
        assert_same_bits(got, want)


def loss(query, key, value, memory_key, memory_value, mix, attn_mask=None, dropout_p=0.0):
    output, self_lse, memory_lse = torch.ops.mixhead.mixed_attention(
        query * 2.0,
        key,
        value,
        memory_key,
        memory_value,
        mix,
        rule="joint",
        attn_mask=attn_mask,
        dropout_p=dropout_p,
    )
    return output.square().mean() + self_lse.mean() + memory_lse.mean()


def check_compiled(compiled, sample):
    for L, S in ((5, 7), (6, 9), (11, 3)):
        made, options = dataclasses.replace(sample, L=L, S=S).make(
            torch.float32, requires_grad=True
        )
        mask = options.get("attn_mask")
        inputs = [*floating(made, options).values()]
        expected = loss(*made, mask)
        actual = compiled(*made, mask)
        assert_near(actual, expected.detach().double(), torch.float32)
        for got, want in zip(
            torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            assert_near(got, want.double(), torch.float32)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_compile(dynamic, shared):
    torch._dynamo.reset()
    sample = Sample("compile", shared=shared, attn_mask=("float", "L", "S"))
    check_compiled(
        torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager"), sample
    )


def test_compile_inductor():
    torch._dynamo.reset()
    check_compiled(torch.compile(loss, fullgraph=True, dynamic=True), Sample("inductor"))


def test_compile_with_dropout_and_memory_index():
    torch._dynamo.reset()
    sample = Sample("compile index", index=3, options={"dropout_p": 0.5})
    tensors, options = sample.make(torch.float32, requires_grad=True)

    def function(*tensors):
        return mixed_attention(*tensors, **options)[0].sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = torch.autograd.grad(function(*tensors), tensors)
    torch.manual_seed(0)
    for got, want in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        assert_near(got, want.double(), torch.float32)


class Head(torch.nn.Module):
    def __init__(self, rule: str):
        super().__init__()
        self.rule = rule
        self.mix = torch.nn.Parameter(torch.tensor([0.3, -0.2])[:, None, None])

    def forward(self, query, key, value, memory_key, memory_value):
        return torch.ops.mixhead.mixed_attention(
            query, key, value, memory_key, memory_value, self.mix, rule=self.rule, is_causal=True
        )


@pytest.mark.parametrize("rule", ["gate", "joint"])
def test_export_with_dynamic_sizes(rule):
    batch, L, S, M = (torch.export.Dim(name, min=2) for name in ("batch", "L", "S", "M"))
    rows = {0: batch, 2: S}
    head = Head(rule)
    made, _ = Sample("export").make(torch.float32)
    program = torch.export.export(
        head, made[:5], dynamic_shapes=({0: batch, 2: L}, rows, rows, {1: M}, {1: M})
    )
    made, _ = Sample("exported", batch=(4,), L=9, S=13, M=21).make(torch.float32)
    for got, want in zip(program.module()(*made[:5]), head(*made[:5]), strict=True):
        assert_same_bits(got.detach(), want.detach())


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script(tmp_path):
    def function(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        memory_key: torch.Tensor,
        memory_value: torch.Tensor,
        mix: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.ops.mixhead.mixed_attention(
            query,
            key,
            value,
            memory_key,
            memory_value,
            mix,
            rule="joint",
            attn_mask=attn_mask,
            is_causal=True,
            scale=0.5,
        )

    scripted = torch.jit.script(function)
    torch.jit.save(scripted, str(tmp_path / "function.pt"))
    tensors, options = Sample("script", attn_mask=("float", "L", "S")).make(requires_grad=True)
    expected = function(*tensors, **options)
    expected_grads = torch.autograd.grad(expected[0].sum(), tensors)
    for run in (scripted, torch.jit.load(str(tmp_path / "function.pt"))):
        outputs = run(*tensors, **options)
        for got, want in zip(outputs, expected, strict=True):
            assert_same_bits(got.detach(), want.detach())
        grads = torch.autograd.grad(outputs[0].sum(), tensors)
        for got, want in zip(grads, expected_grads, strict=True):
            assert_same_bits(got, want)


def test_deterministic_algorithms_are_available():
    tensors, options = Sample("deterministic", index=4, memory_mask=("float", "M")).make(
        requires_grad=True
    )
    torch.use_deterministic_algorithms(True)
    try:
        mixed_attention(*tensors, **options)[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.grad is not None for tensor in tensors)
