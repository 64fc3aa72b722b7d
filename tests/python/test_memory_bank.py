"""MemoryBank against a Python list of everything ever appended."""

import copy
import io

import pytest
import torch
from mixhead import MemoryBank
from torch import nn

HEADS, CAPACITY, SIZE, VALUE_SIZE = 2, 5, 3, 4


def bank():
    return MemoryBank(HEADS, CAPACITY, SIZE, VALUE_SIZE)


def entries(count):
    return torch.randn(HEADS, count, SIZE), torch.randn(HEADS, count, VALUE_SIZE)


def as_set(keys, values):
    """The entries without their order, which attention does not see."""
    rows = torch.cat([keys, values], dim=-1).transpose(0, 1).flatten(1)
    return {tuple(row.tolist()) for row in rows}


@pytest.mark.parametrize(
    "counts", [[3], [5], [3, 3], [2, 2, 2, 2], [7], [1, 12], [0, 4], [5, 5, 1]]
)
@pytest.mark.parametrize("scripted", [False, True])
def test_holds_the_newest_entries(counts, scripted):
    memory = torch.jit.script(bank()) if scripted else bank()
    history = []
    for count in counts:
        key, value = entries(count)
        memory.append(key, value)
        history += zip(key.unbind(1), value.unbind(1), strict=True)
        kept = history[-CAPACITY:]
        assert len(memory) == len(kept)
        expected = [torch.stack(side, dim=1) for side in zip(*kept, strict=True)] if kept else None
        if expected:
            assert as_set(memory.keys(), memory.values()) == as_set(*expected)
    assert memory.mask().tolist() == [slot < len(memory) for slot in range(CAPACITY)]


def test_slots_are_a_ring():
    memory = bank()
    key, value = entries(7)
    memory.append(key[:, :4], value[:, :4])
    torch.testing.assert_close(memory.keys(), key[:, :4], rtol=0, atol=0)
    memory.append(key[:, 4:], value[:, 4:])
    order = [5, 6, 2, 3, 4]
    torch.testing.assert_close(memory.keys(), key[:, order], rtol=0, atol=0)
    torch.testing.assert_close(memory.values(), value[:, order], rtol=0, atol=0)
    # n > capacity: entry i still goes to the slot of its number modulo the capacity.
    more_key, more_value = entries(8)
    memory.append(more_key, more_value)
    torch.testing.assert_close(memory.keys(), more_key[:, 3:], rtol=0, atol=0)


def test_keys_are_a_view():
    memory = bank()
    memory.append(*entries(2))
    assert memory.keys().data_ptr() == memory.key_slots.data_ptr()
    assert memory.values().shape == (HEADS, 2, VALUE_SIZE)


def test_reset_and_truth():
    memory = bank()
    assert len(memory) == 0
    assert memory, "an empty bank is still a bank"
    memory.append(*entries(9))
    memory.reset()
    assert len(memory) == 0
    assert memory.keys().shape == (HEADS, 0, SIZE)
    memory.append(*entries(1))
    assert len(memory) == 1


def test_holds_no_gradient():
    memory = bank()
    key, value = (side.requires_grad_() for side in entries(3))
    memory.append(key, value)
    assert not list(memory.parameters())
    assert not memory.keys().requires_grad
    assert not memory.values().requires_grad


def test_overwriting_what_backward_needs_is_an_error():
    memory = bank()
    memory.append(*entries(3))
    query = torch.randn(HEADS, 2, SIZE, requires_grad=True)
    scores = query @ memory.keys().transpose(1, 2)
    memory.append(*entries(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_state_dict_copy_and_script_keep_the_entries():
    memory = bank()
    memory.append(*entries(7))
    other = bank()
    other.load_state_dict(memory.state_dict())
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(memory), file)
    file.seek(0)
    for same in (other, copy.deepcopy(memory), torch.jit.load(file)):
        # Python's len() works on scripted modules, but not on those torch.jit.load returns.
        assert same.keys().shape == (HEADS, 5, SIZE)
        torch.testing.assert_close(same.keys(), memory.keys(), rtol=0, atol=0)
        torch.testing.assert_close(same.values(), memory.values(), rtol=0, atol=0)
        same.append(*entries(1))
    assert int(memory.appended) == 7


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.bank = bank()

    def forward(self, key, value):
        self.bank.append(key, value)
        return self.bank.mask().sum()

    @torch.jit.export
    def count(self) -> int:
        return len(self.bank)


def test_scripted_model_uses_the_bank():
    model = torch.jit.script(Remembers())
    assert int(model(*entries(3))) == 3
    assert model.count() == 3
    model(*entries(4))
    assert model.count() == 5


def test_append_compiles():
    eager, compiled = Remembers(), Remembers()
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for count in (3, 3, 9):
        key, value = entries(count)
        assert int(run(key, value)) == int(eager(key, value))
        torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=0, atol=0)


def test_dtype_and_default_value_size():
    memory = MemoryBank(HEADS, CAPACITY, SIZE, dtype=torch.bfloat16)
    key = torch.randn(HEADS, 2, SIZE)
    memory.append(key, key)
    torch.testing.assert_close(memory.values(), key.bfloat16(), rtol=0, atol=0)
    assert MemoryBank(HEADS, CAPACITY, SIZE, device="meta").key_slots.device.type == "meta"
    assert "capacity=5" in repr(memory)


@pytest.mark.parametrize("argument", ["num_heads", "capacity", "head_dim", "value_dim"])
def test_constructor_refuses(argument):
    sizes = {"num_heads": 2, "capacity": 5, "head_dim": 3, "value_dim": 4, argument: 0}
    with pytest.raises(ValueError, match=f"MemoryBank: {argument} must be positive, got 0"):
        MemoryBank(**sizes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ((2, 4, 4), (2, 4, 4), r"key must be .* shape \(2, n, 3\), got torch.float32 \(2, 4, 4\)"),
        ((3, 4, 3), (3, 4, 4), r"key must be .* shape \(2, n, 3\), got torch.float32 \(3, 4, 3\)"),
        ((1, 2, 4, 3), (2, 4, 4), r"key must be .*, got torch.float32 \(1, 2, 4, 3\)"),
        ((2, 4, 3), (2, 4, 3), r"value must be .* shape \(2, n, 4\), got .* \(2, 4, 3\)"),
        ((2, 4, 3), (2, 3, 4), r"must have the same number of entries, got 4 and 3"),
    ],
)
def test_append_refuses(key, value, message):
    memory = bank()
    with pytest.raises(ValueError, match=f"MemoryBank: .*{message}"):
        memory.append(torch.zeros(key), torch.zeros(value))
    assert len(memory) == 0


def test_append_refuses_integers():
    with pytest.raises(ValueError, match=r"key must be floating point .* got torch\.int64"):
        bank().append(torch.zeros(2, 1, 3, dtype=torch.int64), torch.zeros(2, 1, 4))
