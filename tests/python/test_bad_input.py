"""Every wrong argument of mixed_attention raises before any work, and the error says what came.

The message is `mixed_attention: <argument> must <what was expected>, got <what came>`.
"""

import dataclasses
import math
from collections.abc import Callable

import mixhead  # noqa: F401
import pytest
import torch
from samples import Sample
from torch._subclasses.fake_tensor import FakeTensorMode

mixed_attention = torch.ops.mixhead.mixed_attention

# B 2, Hq = H 4, L 5, S 7, M 6, D 8, Dv 10.
GOOD = Sample("good", query_heads=4, heads=4, Dv=10)


@dataclasses.dataclass(frozen=True)
class Bad:
    """One change that makes a good call wrong, and what the error must say after its argument."""

    argument: str
    name: str
    change: object  # the new value, or a function of the old one
    expected: str  # regex
    got: str  # regex, the end of the message
    others: dict = dataclasses.field(default_factory=dict)
    numbers: bool = False  # needs the numbers of a tensor, which Meta does not have


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


INDEX = torch.zeros(2, 4, 5, 3, dtype=torch.int64)


def shape_errors():
    yield Bad("query", "two dimensions", zeros(5, 8), "at least 3 dimensions", r"\(5, 8\)")
    yield Bad("query", "no channels", zeros(2, 4, 5, 0), "at least one", r"\(2, 4, 5, 0\)")
    yield Bad("query", "no heads", zeros(2, 0, 5, 8), "at least one", r"\(2, 0, 5, 8\)")
    batch = r"batch dimensions of query \(2, 4, 5, 8\)"
    for name, keys, channels in (("key", 7, 8), ("value", 7, 10)):
        yield Bad(name, "batch", zeros(3, 4, keys, channels), batch, rf"\(3, 4, 7, {channels}\)")
        yield Bad(
            name, "batch of one", zeros(1, 4, keys, channels), batch, rf"\(1, 4, 7, {channels}\)"
        )
        yield Bad(name, "no batch", zeros(4, keys, channels), batch, rf"\(4, 7, {channels}\)")
        yield Bad(
            name, "two batches", zeros(2, 2, 4, keys, channels), batch, r"\(2, 2, 4, 7, \d+\)"
        )
    yield Bad("key", "channels", zeros(2, 4, 7, 9), "8 channels like query", r"\(2, 4, 7, 9\)")
    yield Bad("key", "heads", zeros(2, 3, 7, 8), "4 heads like query", r"\(2, 3, 7, 8\)")
    yield Bad(
        "key",
        "fewer heads without enable_gqa",
        zeros(2, 2, 7, 8),
        r"4 heads like query .*enable_gqa",
        r"\(2, 2, 7, 8\)",
    )
    for heads in (3, 8, 0):
        yield Bad(
            "key",
            f"{heads} heads with enable_gqa",
            zeros(2, heads, 7, 8),
            r"heads that divides query's 4",
            rf"\(2, {heads}, 7, 8\)",
            {"enable_gqa": True},
        )
    yield Bad("value", "heads", zeros(2, 3, 7, 10), "4 heads like key", r"\(2, 3, 7, 10\)")
    yield Bad("value", "keys", zeros(2, 4, 8, 10), "7 rows like key", r"\(2, 4, 8, 10\)")
    for name, channels in (("memory_key", 8), ("memory_value", 10)):
        yield Bad(name, "two dimensions", zeros(6, channels), "3 dimensions", rf"\(6, {channels}\)")
        yield Bad(
            name,
            "five dimensions",
            zeros(1, 2, 4, 6, channels),
            "3 dimensions",
            r"\(1, 2, 4, 6, \d+\)",
        )
        yield Bad(name, "batch", zeros(3, 4, 6, channels), batch, rf"\(3, 4, 6, {channels}\)")
        yield Bad(
            name, "heads", zeros(3, 6, channels), "4 heads like key", rf"\(3, 6, {channels}\)"
        )
    yield Bad("memory_key", "channels", zeros(4, 6, 9), "8 channels like query", r"\(4, 6, 9\)")
    yield Bad("memory_value", "channels", zeros(4, 6, 9), "10 channels like value", r"\(4, 6, 9\)")
    yield Bad("memory_value", "slots", zeros(4, 5, 10), "6 slots", r"\(4, 5, 10\)")
    yield Bad(
        "memory_value",
        "of each batch entry, keys shared",
        zeros(2, 4, 6, 10),
        "3 dimensions like memory_key",
        r"\(2, 4, 6, 10\)",
    )
    target = r"broadcast to \(2, 4, 5, 1\)"
    yield Bad("mix", "heads", zeros(3, 1, 1), target, r"\(3, 1, 1\)")
    yield Bad(
        "mix", "a head in the channel's place", zeros(4), target + r" or \(2, 4, 5, 10\)", r"\(4,\)"
    )
    yield Bad("mix", "too many dimensions", zeros(1, 2, 4, 5, 1), target, r"\(1, 2, 4, 5, 1\)")
    yield Bad(
        "mix",
        "channel with rule joint",
        zeros(10),
        target + ' with rule "joint"',
        r"\(10,\)",
        {"rule": "joint"},
    )
    for name, columns in (("attn_mask", 7), ("memory_mask", 6)):
        for dtype in (torch.bool, torch.float32):
            target = rf"broadcast to \(2, 4, 5, {columns}\)"
            yield Bad(
                name,
                f"columns, {dtype}",
                zeros(5, columns + 1, dtype=dtype),
                target,
                rf"\(5, {columns + 1}\)",
            )
            yield Bad(
                name,
                f"batch, {dtype}",
                zeros(3, 1, 1, columns, dtype=dtype),
                target,
                rf"\(3, 1, 1, {columns}\)",
            )
            yield Bad(
                name,
                f"dimensions, {dtype}",
                zeros(1, 2, 4, 5, columns, dtype=dtype),
                target,
                rf"\(1, 2, 4, 5, {columns}\)",
            )
            yield Bad(name, f"no columns, {dtype}", zeros(5, 0, dtype=dtype), target, r"\(5, 0\)")
    yield Bad("memory_index", "dimensions", INDEX[0], "4 dimensions like query", r"\(4, 5, 3\)")
    yield Bad("memory_index", "batch", INDEX[:1], batch, r"\(1, 4, 5, 3\)")
    yield Bad("memory_index", "heads", INDEX[:, :1], "4 heads and 5 rows", r"\(2, 1, 5, 3\)")
    yield Bad("memory_index", "queries", INDEX[:, :, :4], "4 heads and 5 rows", r"\(2, 4, 4, 3\)")


def dtype_errors():
    tensors = ("key", "value", "memory_key", "memory_value")
    for dtype, printed in (
        (torch.int64, "Long"),
        (torch.bool, "Bool"),
        (torch.complex64, "ComplexFloat"),
    ):
        yield Bad(
            "query",
            printed,
            lambda t, d=dtype: t.to(d),
            "float32, float64, bfloat16 or float16",
            printed,
        )
    for name in tensors:
        for dtype, printed in (
            (torch.float64, "Double"),
            (torch.bfloat16, "BFloat16"),
            (torch.int32, "Int"),
        ):
            yield Bad(name, printed, lambda t, d=dtype: t.to(d), "Float like query", printed)
    for name, change in (
        ("mix", zeros(4, 1, 1)),
        ("attn_mask", zeros(5, 7)),
        ("memory_mask", zeros(5, 6)),
    ):
        for dtype, printed in ((torch.float64, "Double"), (torch.float16, "Half")):
            yield Bad(name, printed, change.to(dtype), "Float like query", printed)
    yield Bad("mix", "Long", zeros(4, 1, 1, dtype=torch.int64), "Float like query", "Long")
    for name, columns in (("attn_mask", 7), ("memory_mask", 6)):
        for dtype, printed in ((torch.int64, "Long"), (torch.uint8, "Byte")):
            yield Bad(name, printed, zeros(5, columns, dtype=dtype), "bool or floating", printed)
    for dtype, printed in ((torch.int32, "Int"), (torch.float32, "Float"), (torch.bool, "Bool")):
        yield Bad("memory_index", printed, INDEX.to(dtype), "int64", printed)


def device_errors():
    new = {
        "attn_mask": zeros(5, 7),
        "memory_mask": zeros(5, 6, dtype=torch.bool),
        "memory_index": INDEX,
    }
    for name in ("key", "value", "memory_key", "memory_value", "mix"):
        yield Bad(name, "device", lambda tensor: tensor.to("meta"), "on cpu like query", "meta")
    for name, tensor in new.items():
        yield Bad(name, "device", tensor.to("meta"), "on cpu like query", "meta")


def sparse_errors():
    for name in ("query", "key", "value", "memory_key", "memory_value", "mix"):
        yield Bad(
            name,
            "sparse",
            lambda tensor: tensor.to_sparse(),
            "a dense tensor",
            "layout Sparse",
            numbers=True,
        )
    for dtype in (torch.bool, torch.float32):
        yield Bad(
            "attn_mask",
            f"sparse {dtype}",
            zeros(5, 7, dtype=dtype).to_sparse(),
            "a dense tensor",
            "layout Sparse",
            numbers=True,
        )
    yield Bad(
        "memory_index", "sparse", INDEX.to_sparse(), "a dense tensor", "layout Sparse", numbers=True
    )


def option_errors():
    for rule in ("", "Gate", "softmax", "gate "):
        yield Bad("rule", repr(rule), rule, r'"gate" or "joint"', f'"{rule}"')
    for p, printed in ((-0.1, r"-0\.1"), (1.5, r"1\.5"), (math.nan, "-?nan"), (math.inf, "inf")):
        yield Bad("dropout_p", str(p), p, r"in \[0, 1\]", printed)
    for scale in (math.nan, math.inf, -math.inf):
        yield Bad("scale", str(scale), scale, "finite", "-?(nan|inf)")


def with_slot(slot):
    index = INDEX.clone()
    index[1, 2, 3, 1] = slot
    return index


def index_errors():
    for slot in (6, 2**40, -2, -(2**40)):
        ends = rf"{min(slot, 0)} to {max(slot, 0)}"
        yield Bad(
            "memory_index", f"slot {slot}", with_slot(slot), r"in \[-1, 6\)", ends, numbers=True
        )
    empty = {"memory_key": zeros(4, 0, 8), "memory_value": zeros(4, 0, 10)}
    yield Bad(
        "memory_index", "into no memory", INDEX, r"in \[-1, 0\)", "0 to 0", empty, numbers=True
    )


BAD = [
    *shape_errors(),
    *dtype_errors(),
    *device_errors(),
    *sparse_errors(),
    *option_errors(),
    *index_errors(),
]


def bad_call(bad):
    tensors, _ = GOOD.make(torch.float32)
    arguments = dict(
        zip(("query", "key", "value", "memory_key", "memory_value", "mix"), tensors, strict=True)
    )
    arguments.update(bad.others)
    change = bad.change
    arguments[bad.argument] = (
        change(arguments[bad.argument]) if isinstance(change, Callable) else change
    )
    return arguments


def message(bad):
    return rf"(?s)^mixed_attention: {bad.argument} must .*{bad.expected}.*, got .*{bad.got}"


def each_bad(rows):
    return pytest.mark.parametrize("bad", rows, ids=lambda bad: f"{bad.argument}: {bad.name}")


def test_good_call():
    """The table's starting point is right, so each row fails for its own reason alone."""
    tensors, _ = GOOD.make(torch.float32)
    mixed_attention(*tensors, attn_mask=zeros(5, 7), memory_mask=zeros(5, 6), memory_index=INDEX)


@each_bad(BAD)
def test_raises(bad):
    with pytest.raises(RuntimeError, match=message(bad)):
        mixed_attention(**bad_call(bad))


@each_bad(BAD)
def test_raises_with_gradients(bad):
    arguments = bad_call(bad)
    for name in ("query", "memory_key"):
        if arguments[name].is_floating_point():
            arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match=message(bad)):
        mixed_attention(**arguments)


@each_bad([bad for bad in BAD if not bad.numbers and bad.name != "device"])
def test_raises_on_meta(bad):
    arguments = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in bad_call(bad).items()
    }
    with pytest.raises(RuntimeError, match=message(bad)):
        mixed_attention(**arguments)


@each_bad([*shape_errors(), *dtype_errors()])
def test_raises_on_fake_tensors(bad):
    with FakeTensorMode() as mode:
        arguments = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in bad_call(bad).items()
        }
        with pytest.raises(RuntimeError, match=message(bad)):
            mixed_attention(**arguments)


def test_raises_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(lambda **arguments: mixed_attention(**arguments), backend="aot_eager")
    bad = next(bad for bad in BAD if (bad.argument, bad.name) == ("memory_key", "channels"))
    with pytest.raises(RuntimeError, match="memory_key must have 8 channels like query, got"):
        compiled(**bad_call(bad))


def test_index_out_of_range_raises_in_a_compiled_function():
    torch._dynamo.reset()
    compiled = torch.compile(lambda **arguments: mixed_attention(**arguments), backend="aot_eager")
    bad = next(bad for bad in BAD if bad.name == "slot 6")
    with pytest.raises(RuntimeError, match=message(bad)):
        compiled(**bad_call(bad))


def test_error_of_the_contract():
    """The message word for word."""
    tensors, _ = Sample("contract", heads=8, query_heads=8, D=64, M=4096).make(torch.float32)
    arguments = [*tensors[:3], zeros(8, 4096, 32), *tensors[4:]]
    with pytest.raises(RuntimeError) as error:
        mixed_attention(*arguments)
    first = str(error.value).splitlines()[0]
    assert first == (
        "mixed_attention: memory_key must have 64 channels like query, got (8, 4096, 32)"
    )


def test_nothing_is_computed_before_the_error():
    """Inputs whose scores would take terabytes: the error comes at once."""
    huge = torch.zeros(1, 1, 1, 8).expand(1, 1, 2**22, 8)
    memory = torch.zeros(1, 1, 8).expand(1, 2**22, 8)
    with pytest.raises(RuntimeError, match="mixed_attention: memory_mask must broadcast"):
        mixed_attention(huge, huge, huge, memory, memory, zeros(1), memory_mask=zeros(3))


def test_backward_checks_nothing_away():
    """An error in one call leaves the next call untouched."""
    tensors, options = GOOD.make(torch.float64, requires_grad=True)
    before = mixed_attention(*tensors, **options)
    with pytest.raises(RuntimeError):
        mixed_attention(*tensors, rule="none")
    for got, want in zip(mixed_attention(*tensors, **options), before, strict=True):
        assert torch.equal(got, want)
