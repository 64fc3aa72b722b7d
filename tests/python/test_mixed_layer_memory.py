"""MixedMultiheadAttention with a memory against its formulas, and with a MemoryBank."""

import pytest
import reference
import torch
import torch.nn.functional as F
from mixhead import MemoryBank, MixedMultiheadAttention
from multihead import (
    BATCH,
    EMBED,
    HEADS,
    KEYS,
    LENGTH,
    SLOTS,
    inputs,
    randomized,
    saved_and_loaded,
)
from torch import nn


def dense_layer(layer, query, key, value, memory, **options):
    """The layer from its formulas, batch first, float64: (output, weights per head)."""
    kv_heads, size = layer.num_kv_heads, layer.head_dim
    widths = [EMBED, kv_heads * size, kv_heads * size]
    if layer.in_proj_weight is not None:
        projections = list(layer.in_proj_weight.split(widths))
    else:
        projections = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    biases = [None] * 3 if layer.in_proj_bias is None else list(layer.in_proj_bias.split(widths))

    def heads(tokens, weight, bias, count):
        rows = tokens @ weight.T if bias is None else tokens @ weight.T + bias
        return torch.stack(rows.split(size, dim=-1)[:count], dim=-3)

    arguments = [
        heads(tokens, weight, bias, count)
        for tokens, weight, bias, count in zip(
            (query, key, value), projections, biases, (HEADS, kv_heads, kv_heads), strict=True
        )
    ]
    own = layer.memory_projection == "own"
    for index in (1, 2):
        weight, bias = projections[index], biases[index]
        if own:
            linear = layer.memory_k_proj if index == 1 else layer.memory_v_proj
            weight, bias = linear.weight, linear.bias
        arguments.append(heads(memory, weight, bias, kv_heads))
    mix = layer.mix
    if layer.gate == "token":
        mix = mix + torch.einsum("blc,hc->bhl", query, layer.mix_weight)[..., None]
    options = {"rule": layer.rule, "enable_gqa": kv_heads != HEADS, **options}
    output = reference.mixed_attention(*arguments, mix, **options)[0]
    output = F.linear(torch.cat(output.unbind(1), dim=-1), layer.out_proj.weight)
    if layer.out_proj.bias is not None:
        output = output + layer.out_proj.bias
    if layer.gate == "channel":
        # Each channel has weights of its own; the layer's are their average.
        each = [
            reference.mixed_attention_weights(*arguments, mix[..., c : c + 1], **options)
            for c in range(size)
        ]
        return output, torch.stack(each).mean(0)
    return output, reference.mixed_attention_weights(*arguments, mix, **options)


GATES = [("gate", "head"), ("gate", "token"), ("gate", "channel"), ("joint", "head")]
GATES.append(("joint", "token"))


@pytest.mark.parametrize(("rule", "gate"), GATES)
@pytest.mark.parametrize("projection", ["shared", "own"])
@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_memory_against_reference(rule, gate, projection, per_batch, kv_heads, bias):
    layer = MixedMultiheadAttention(
        EMBED,
        HEADS,
        bias=bias,
        batch_first=True,
        num_kv_heads=kv_heads,
        rule=rule,
        gate=gate,
        memory_projection=projection,
        dtype=torch.float64,
    )
    randomized(layer)
    tensors = inputs(batch_first=True)
    memory = torch.randn(BATCH, SLOTS, EMBED, dtype=torch.float64)
    memory = (memory if per_batch else memory[0]).requires_grad_()
    memory_mask = torch.rand(BATCH, 1, LENGTH, SLOTS) < 0.7
    output, weights = layer(
        *tensors, memory=memory, memory_mask=memory_mask, average_attn_weights=False, is_causal=True
    )
    expected = dense_layer(layer, *tensors, memory, memory_mask=memory_mask, is_causal=True)
    torch.testing.assert_close(output, expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(weights, expected[1], rtol=0, atol=1e-10)
    assert weights.shape == (BATCH, HEADS, LENGTH, KEYS + SLOTS)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))

    leaves = [*tensors, memory, *layer.parameters()]
    actual = torch.autograd.grad(output.sin().sum(), leaves)
    for mine, theirs in zip(
        actual, torch.autograd.grad(expected[0].sin().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_weights_with_memory_sum_to_one(batched, batch_first, average):
    layer = randomized(MixedMultiheadAttention(EMBED, HEADS, batch_first=batch_first))
    tensors = inputs(batched, batch_first, dtype=torch.float32)
    output, weights = layer(
        *tensors, memory=torch.randn(SLOTS, EMBED), average_attn_weights=average
    )
    assert output.shape == tensors[0].shape
    shape = [LENGTH, KEYS + SLOTS]
    shape = shape if average else [HEADS, *shape]
    assert list(weights.shape) == ([BATCH, *shape] if batched else shape)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_channel_weights_are_averaged_over_channels():
    layer = randomized(MixedMultiheadAttention(EMBED, HEADS, gate="channel", dtype=torch.float64))
    tensors, memory = inputs(), torch.randn(SLOTS, EMBED, dtype=torch.float64)
    _, weights = layer(*tensors, memory=memory, average_attn_weights=False)
    share = layer.mix.sigmoid().mean(-1).expand(HEADS, LENGTH)
    torch.testing.assert_close(weights[..., KEYS:].sum(-1), share.expand(BATCH, HEADS, LENGTH))


def test_gates_open_and_close():
    layer = MixedMultiheadAttention(EMBED, HEADS, initial_mix=-100.0, dtype=torch.float64)
    randomized(layer.out_proj)
    tensors, memory = inputs(), torch.randn(SLOTS, EMBED, dtype=torch.float64)
    alone = layer(*tensors)[0]
    torch.testing.assert_close(layer(*tensors, memory=memory)[0], alone)
    nn.init.constant_(layer.mix, 100.0)
    # Wide open, the sequence does not matter.
    other = (tensors[0], torch.randn_like(tensors[1]), torch.randn_like(tensors[2]))
    opened = layer(*tensors, memory=memory)[0]
    torch.testing.assert_close(layer(*other, memory=memory)[0], opened)
    assert not torch.allclose(opened, alone)


def test_where_no_key_may_be_read_all_comes_from_the_memory():
    layer = randomized(MixedMultiheadAttention(EMBED, HEADS, dtype=torch.float64))
    tensors, memory = inputs(), torch.randn(SLOTS, EMBED, dtype=torch.float64)
    blocked = torch.ones(LENGTH, KEYS, dtype=torch.bool)
    _, weights = layer(*tensors, attn_mask=blocked, memory=memory)
    torch.testing.assert_close(weights[..., KEYS:].sum(-1), torch.ones(BATCH, LENGTH).double())
    nothing = torch.zeros(SLOTS, dtype=torch.bool)
    output, _ = layer(*tensors, memory=memory, memory_mask=nothing)
    torch.testing.assert_close(output, layer(*tensors)[0])


def test_shared_projection_follows_kdim():
    layer = randomized(MixedMultiheadAttention(EMBED, HEADS, kdim=8, vdim=8, dtype=torch.float64))
    layer.batch_first = True
    tensors = inputs(batch_first=True, kdim=8, vdim=8)
    memory = torch.randn(SLOTS, 8, dtype=torch.float64)
    expected = dense_layer(layer, *tensors, memory)
    torch.testing.assert_close(layer(*tensors, memory=memory)[0], expected[0])


# ---- memory banks --------------------------------------------------------------------------------


def layer_and_bank(capacity=SLOTS + 4):
    layer = randomized(MixedMultiheadAttention(EMBED, HEADS, dtype=torch.float64))
    memory = torch.randn(SLOTS, EMBED, dtype=torch.float64)
    bank = MemoryBank(HEADS, capacity, EMBED // HEADS, dtype=torch.float64)
    bank.append(*layer.project_memory(memory))
    return layer, memory, bank


def test_bank_equals_memory_tensor():
    layer, memory, bank = layer_and_bank()
    tensors = inputs()
    expected = layer(*tensors, memory=memory)
    torch.testing.assert_close(layer(*tensors, memory=bank), expected)
    memory_mask = torch.rand(LENGTH, SLOTS) < 0.5
    expected = layer(*tensors, memory=memory, memory_mask=memory_mask)
    torch.testing.assert_close(layer(*tensors, memory=bank, memory_mask=memory_mask), expected)
    whole = F.pad(memory_mask, (0, 4), value=True)
    torch.testing.assert_close(layer(*tensors, memory=bank, memory_mask=whole), expected)


class WithBank(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, _, self.bank = layer_and_bank()

    def forward(self, tokens):
        return self.attention(tokens, tokens, tokens, memory=self.bank)[0]


class WithBankScripted(WithBank):
    def forward(self, tokens):
        bank = self.bank
        attention = self.attention
        return attention.attend(tokens, tokens, tokens, bank.keys(), bank.values())[0]


def test_bank_in_compiled_and_exported_models():
    model = WithBank()
    tokens = inputs()[0].detach()
    expected = model(tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), expected)
    exported = torch.export.export(model, (tokens,))
    torch.testing.assert_close(exported.module()(tokens), expected)
    # The graph does not hold the number of entries.
    more = torch.randn(HEADS, 2, EMBED // HEADS, dtype=torch.float64)
    model.bank.append(more, more)
    assert not torch.allclose(model(tokens), expected)
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_bank_in_scripted_model():
    model = WithBankScripted()
    tokens = inputs()[0].detach()
    loaded = saved_and_loaded(torch.jit.script(model))
    torch.testing.assert_close(loaded(tokens), model(tokens))
    more = torch.randn(HEADS, 9, EMBED // HEADS, dtype=torch.float64)
    loaded.bank.append(more, more)
    model.bank.append(more, more)
    torch.testing.assert_close(loaded(tokens), model(tokens))
