"""The functions forward to the operators, and script, export and compile as they are called."""

import inspect

import mixhead
import pytest
import reference
import torch
from torch import Tensor, nn

HEADS, LENGTH, SLOTS, SIZE = 2, 4, 6, 8


def arguments():
    query, key, value = torch.randn(3, 3, HEADS, LENGTH, SIZE, dtype=torch.float64).unbind()
    memory_key, memory_value = torch.randn(2, HEADS, SLOTS, SIZE, dtype=torch.float64).unbind()
    return query, key, value, memory_key, memory_value, torch.randn(HEADS, 1, 1).double()


def alone(
    query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor, memory_value: Tensor, mix: Tensor
) -> Tensor:
    return mixhead.mixed_attention(
        query, key, value, memory_key, memory_value, mix, rule="joint", is_causal=True
    )


def merged(
    query: Tensor, key: Tensor, value: Tensor, memory_key: Tensor, memory_value: Tensor, mix: Tensor
) -> Tensor:
    output, self_lse, memory_lse = mixhead.mixed_attention(
        query, key, value, memory_key, memory_value, mix, return_lse=True
    )
    return mixhead.merge_attention([output, 2 * output], [self_lse, memory_lse])[0]


def expected(function, args):
    if function is alone:
        return reference.mixed_attention(*args, rule="joint", is_causal=True)[0]
    output, self_lse, memory_lse = reference.mixed_attention(*args)
    return reference.merge_attention([output, 2 * output], [self_lse, memory_lse])[0]


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, query, key, value, memory_key, memory_value, mix):
        return self.function(query, key, value, memory_key, memory_value, mix)


@pytest.mark.parametrize("function", [alone, merged])
@pytest.mark.parametrize("way", ["eager", "script", "compile", "export", "export strict"])
def test_every_way_of_calling(function, way):
    args = arguments()
    if way == "script":
        run = torch.jit.script(function)
    elif way == "compile":
        run = torch.compile(function, fullgraph=True, backend="aot_eager")
    elif way.startswith("export"):
        run = torch.export.export(Model(function), args, strict=way.endswith("strict")).module()
    else:
        run = function
    torch.testing.assert_close(run(*args), expected(function, args), rtol=0, atol=1e-10)


def test_every_option_arrives():
    query, key, value, memory_key, memory_value, mix = arguments()
    attn_mask = torch.randn(LENGTH, LENGTH, dtype=torch.float64)
    memory_mask = torch.rand(SLOTS) < 0.6
    options = {
        "rule": "joint",
        "attn_mask": attn_mask,
        "memory_mask": memory_mask,
        "is_causal": True,
        "scale": 0.3,
        "enable_gqa": True,
    }
    args = (query, key[:, :1], value[:, :1], memory_key[:1], memory_value[:1], mix)
    actual = mixhead.mixed_attention(*args, **options, return_lse=True)
    for mine, theirs in zip(actual, reference.mixed_attention(*args, **options), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    index, args = torch.randint(-1, SLOTS, (3, HEADS, LENGTH, 2)), arguments()
    actual = mixhead.mixed_attention(*args, memory_index=index)
    theirs = reference.mixed_attention(*args, memory_index=index)[0]
    torch.testing.assert_close(actual, theirs, rtol=0, atol=1e-10)
    dropped = mixhead.mixed_attention(*args, dropout_p=1.0)
    assert dropped.abs().max() == 0


def test_signature_and_documentation_are_visible():
    parameters = inspect.signature(mixhead.mixed_attention).parameters
    assert list(parameters)[:6] == ["query", "key", "value", "memory_key", "memory_value", "mix"]
    schema = torch.ops.mixhead.mixed_attention.default._schema
    for argument in schema.arguments[6:]:
        assert parameters[argument.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[argument.name].default == argument.default_value
    assert list(parameters)[-1] == "return_lse"
    assert "Memorizing Transformers" in mixhead.mixed_attention.__doc__
    for name in mixhead.__all__:
        assert hasattr(mixhead, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_number_stands_for_a_tensor_of_one_element(dtype):
    q = torch.randn(2, 6, 4, dtype=dtype)
    half = torch.tensor(0.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    functions = [
        lambda x: mixhead.mixed_attention(q, q, q, q, q, x),
        lambda x: mixhead.kernel_attention(q, q, q, x, "gaussian"),
        lambda x: mixhead.local_linear_attention(q, q, q, x, "gaussian")[0],
        lambda x: mixhead.matching_attention(q, q, q, x, "gaussian")[0],
    ]
    for function in functions:
        torch.testing.assert_close(function(0.5), function(half), rtol=0, atol=0)
        torch.testing.assert_close(function(1), function(torch.ones_like(half)), rtol=0, atol=0)
