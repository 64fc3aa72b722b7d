"""MixedMultiheadAttention against torch.nn.MultiheadAttention: alone, in transformers, in state
dicts; and the arguments it refuses."""

import copy
import itertools
import math
import re

import pytest
import torch
from mixhead import MixedMultiheadAttention
from multihead import (
    BATCH,
    EMBED,
    HEADS,
    KEYS,
    LENGTH,
    SLOTS,
    TOLERANCE,
    compare_with_torch,
    inputs,
    masks,
    randomized,
)
from torch import nn


def pair(dtype=torch.float64, **options):
    """torch's layer and ours with the same weights."""
    peer = randomized(nn.MultiheadAttention(EMBED, HEADS, dtype=dtype, **options))
    ours = MixedMultiheadAttention(EMBED, HEADS, dtype=dtype, **options)
    ours.load_state_dict(peer.state_dict())
    return peer, ours


FLAGS = list(itertools.product([False, True], [False, True], [False, True]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("batched", "batch_first", "bias"), FLAGS)
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("pairs", [None, "bool2", "bool3", "float2", "float3"])
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
def test_equals_torch_without_memory(dtype, batched, batch_first, bias, padding, pairs):
    peer, ours = pair(dtype, bias=bias, batch_first=batch_first)
    tensors = inputs(batched, batch_first, dtype=dtype)
    options = masks(padding, pairs, batched, dtype)
    compare_with_torch(peer, ours, tensors, options, dtype)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (8, None), (None, 10), (8, 10)])
@pytest.mark.parametrize("batched", [False, True])
def test_equals_torch_in_weights_and_widths(need_weights, average, kdim, vdim, batched):
    peer, ours = pair(kdim=kdim, vdim=vdim)
    tensors = inputs(batched, kdim=kdim or EMBED, vdim=vdim or EMBED)
    options = {"need_weights": need_weights, "average_attn_weights": average}
    compare_with_torch(peer, ours, tensors, options, torch.float64)


@pytest.mark.parametrize("same", ["query is key is value", "key is value"])
def test_equals_torch_where_inputs_are_one_tensor(same):
    peer, ours = pair()
    query, key, _ = inputs()
    tensors = (query, query, query) if same.startswith("query") else (query, key, key)
    compare_with_torch(peer, ours, tensors, {}, torch.float64)


def test_is_causal_with_and_without_mask():
    peer, ours = pair()
    query = inputs()[0]
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    expected = peer(query, query, query, attn_mask=causal)
    torch.testing.assert_close(ours(query, query, query, is_causal=True), expected)
    hinted = ours(query, query, query, attn_mask=causal, is_causal=True)
    torch.testing.assert_close(hinted, expected)
    # Bottom-right: the last query reads every key.
    key = inputs()[1]
    blocked = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(KEYS - LENGTH + 1)
    expected = peer(query, key, key, attn_mask=blocked)
    torch.testing.assert_close(ours(query, key, key, is_causal=True), expected)


def test_initial_values_are_those_of_torch():
    for options in ({}, {"bias": False}, {"kdim": 8, "vdim": 10}):
        torch.manual_seed(3)
        peer = nn.MultiheadAttention(EMBED, HEADS, **options)
        torch.manual_seed(3)
        ours = MixedMultiheadAttention(EMBED, HEADS, initial_mix=-1.5, **options)
        state = ours.state_dict()
        mix = state.pop("mix")
        torch.testing.assert_close(dict(state), dict(peer.state_dict()), rtol=0, atol=0)
        torch.testing.assert_close(mix, torch.full((HEADS, 1, 1), -1.5))


def test_a_query_that_reads_nothing_gives_zeros():
    _, ours = pair()
    nn.init.zeros_(ours.out_proj.bias)
    tensors = inputs()
    blocked = torch.zeros(LENGTH, KEYS, dtype=torch.bool)
    blocked[2] = True
    output, weights = ours(*tensors, attn_mask=blocked)
    assert output[2].abs().max() == 0
    assert weights[:, 2].abs().max() == 0
    gradients = torch.autograd.grad(output.sum() + weights.square().sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_dropout_only_in_training():
    peer, ours = pair(dropout=0.5)
    tensors = inputs()
    torch.testing.assert_close(ours.eval()(*tensors), peer.eval()(*tensors))
    ours.train()
    torch.manual_seed(5)
    first = ours(*tensors)[0]
    assert not torch.allclose(first, ours(*tensors)[0])
    torch.manual_seed(5)
    torch.testing.assert_close(ours(*tensors)[0], first, rtol=0, atol=0)


# ---- in torch's transformers ---------------------------------------------------------------------


def transformer_layers(batch_first, norm_first=False):
    peer = nn.TransformerEncoderLayer(
        EMBED, HEADS, 16, 0.0, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64
    )
    ours = copy.deepcopy(peer)
    ours.self_attn = MixedMultiheadAttention(
        EMBED, HEADS, batch_first=batch_first, dtype=torch.float64
    )
    ours.load_state_dict({**peer.state_dict(), "self_attn.mix": ours.self_attn.mix})
    return peer, ours


@pytest.fixture
def count_calls(monkeypatch):
    """How often our layer computed. (A forward hook would switch torch's fast path off.)"""
    calls = []
    attend = MixedMultiheadAttention.attend

    def counted(self, *args, **kwargs):
        calls.append(self)
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(MixedMultiheadAttention, "attend", counted)
    return calls


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_inside_encoder_layer(batch_first, norm_first, training, masked, count_calls):
    peer, ours = transformer_layers(batch_first, norm_first)
    peer.train(training)
    ours.train(training)
    shape = (BATCH, LENGTH, EMBED) if batch_first else (LENGTH, BATCH, EMBED)
    tokens = torch.randn(shape, dtype=torch.float64)
    options = {}
    if masked:
        padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        padding[1, -1] = True
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        options = {"src_mask": causal, "src_key_padding_mask": padding, "is_causal": True}
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(ours(tokens, **options), peer(tokens, **options))
    assert len(count_calls) == 1


def test_inside_encoder_and_decoder(count_calls):
    peer, ours = transformer_layers(batch_first=True)
    peers = nn.TransformerEncoder(peer, 2, enable_nested_tensor=False).eval()
    tokens = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, -2:] = True
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim"):
        ours = nn.TransformerEncoder(ours, 2).eval()
    with torch.no_grad():
        expected = peers(tokens, src_key_padding_mask=padding)
        actual = ours(tokens, src_key_padding_mask=padding)
    torch.testing.assert_close(actual[~padding], expected[~padding])
    assert len(count_calls) == 2

    peer = nn.TransformerDecoderLayer(EMBED, HEADS, 16, 0.0, dtype=torch.float64).eval()
    ours = copy.deepcopy(peer)
    for name in ("self_attn", "multihead_attn"):
        replacement = MixedMultiheadAttention(EMBED, HEADS, dtype=torch.float64)
        replacement.load_state_dict(getattr(peer, name).state_dict())
        setattr(ours, name, replacement.eval())
    target, encoded, _ = inputs()
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    options = {"tgt_mask": causal, "tgt_is_causal": True}
    torch.testing.assert_close(ours(target, encoded, **options), peer(target, encoded, **options))
    assert len(count_calls) == 4


def test_scripted_encoder_layer():
    peer, ours = transformer_layers(batch_first=True)
    tokens = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    scripted = torch.jit.script(ours.eval())
    with torch.no_grad():
        torch.testing.assert_close(scripted(tokens), peer.eval()(tokens))


# ---- state dicts ---------------------------------------------------------------------------------


def test_state_dict_of_torch_loads_strictly_and_back():
    peer, ours = pair()
    for name, tensor in peer.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=0)
    other = MixedMultiheadAttention(
        EMBED, HEADS, gate="token", memory_projection="own", initial_mix=2.0, dtype=torch.float64
    )
    before = other.memory_k_proj.weight.clone()
    result = other.load_state_dict(peer.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert (other.mix == 2.0).all()
    torch.testing.assert_close(other.memory_k_proj.weight, before, rtol=0, atol=0)
    back = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64)
    back.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "mix"})
    nested = nn.Sequential(MixedMultiheadAttention(EMBED, HEADS, dtype=torch.float64))
    nested.load_state_dict(nn.Sequential(peer).state_dict())
    torch.testing.assert_close(nested[0].in_proj_weight, peer.in_proj_weight)


def test_incomplete_or_foreign_state_dict_is_refused():
    ours = MixedMultiheadAttention(EMBED, HEADS, gate="token")
    state = ours.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*mix_weight"):
        ours.load_state_dict({k: v for k, v in state.items() if k != "mix_weight"})
    with pytest.raises(RuntimeError, match=r"Missing key.*in_proj_bias"):
        ours.load_state_dict({k: v for k, v in state.items() if k != "in_proj_bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias_k"):
        ours.load_state_dict({**state, "bias_k": torch.zeros(1)})


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be positive, got 0"),
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, got 12 and 5"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"num_kv_heads": 0}, "num_kv_heads must be positive, got 0"),
        ({"dropout": 1.5}, "dropout must be in [0, 1], got 1.5"),
        ({"dropout": math.nan}, "dropout must be in [0, 1], got nan"),
        ({"rule": "sum"}, "rule must be one of 'gate', 'joint', got 'sum'"),
        ({"gate": "layer"}, "gate must be one of 'head', 'token', 'channel', got 'layer'"),
        ({"memory_projection": "no"}, "memory_projection must be one of 'shared', 'own', got 'no'"),
        ({"rule": "joint", "gate": "channel"}, "gate='channel' needs rule='gate'"),
    ],
)
def test_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=re.escape(f"MixedMultiheadAttention: {message}")):
        MixedMultiheadAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **options})


def bad_calls():
    query, key, value = inputs(dtype=torch.float32)
    memory = torch.randn(SLOTS, EMBED)
    ints = torch.zeros(BATCH, KEYS, dtype=torch.int64)
    return {
        "query must have 2 or 3 dimensions, got (12)": ((query[0, 0], key, value), {}),
        "key must have 3 dimensions, the last of 12, got (6, 12)": ((query, key[:, 0], value), {}),
        "value must have 3 dimensions, the last of 12, got (6, 3, 4)": (
            (query, key, value[..., :4]),
            {},
        ),
        "key_padding_mask must have shape [3, 6], got (6, 3)": (
            (query, key, value),
            {"key_padding_mask": ints.T.bool()},
        ),
        "key_padding_mask must be bool or floating point, got torch.int64": (
            (query, key, value),
            {"key_padding_mask": ints},
        ),
        "attn_mask must have shape [5, 6], got (6, 5)": (
            (query, key, value),
            {"attn_mask": torch.zeros(KEYS, LENGTH)},
        ),
        "attn_mask must have shape [12, 5, 6], got (3, 5, 6)": (
            (query, key, value),
            {"attn_mask": torch.zeros(BATCH, LENGTH, KEYS)},
        ),
        "memory must be (M, 12) or (B, M, 12), got (7, 5)": (
            (query, key, value),
            {"memory": memory[:, :5]},
        ),
        "memory must have 2 or 3 dimensions, got (12)": (
            (query, key, value),
            {"memory": memory[0]},
        ),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_forward_refuses(message):
    args, options = bad_calls()[message]
    with pytest.raises(ValueError, match=re.escape(f"MixedMultiheadAttention: {message}")):
        MixedMultiheadAttention(EMBED, HEADS)(*args, **options)


def test_forward_refuses_what_the_operator_refuses():
    tensors = inputs(dtype=torch.float32)
    layer = MixedMultiheadAttention(EMBED, HEADS)
    with pytest.raises(RuntimeError, match="memory_mask"):
        layer(*tensors, memory=torch.randn(SLOTS, EMBED), memory_mask=torch.zeros(SLOTS + 1))
    with pytest.raises(TypeError, match="memory must be a tensor, a MemoryBank or None, got list"):
        layer(*tensors, memory=[1.0])
    layer = MixedMultiheadAttention(EMBED, HEADS, kdim=8)
    tensors = inputs(kdim=8, dtype=torch.float32)
    with pytest.raises(ValueError, match="got kdim=8 and vdim=12"):
        layer(*tensors, memory=torch.randn(SLOTS, 8))


def test_memory_is_keyword_only():
    layer, tensors = MixedMultiheadAttention(EMBED, HEADS), inputs(dtype=torch.float32)
    with pytest.raises(TypeError, match="by keyword"):
        layer(*tensors, None, True, None, True, False, torch.randn(SLOTS, EMBED))


def test_factory_arguments_and_repr():
    layer = MixedMultiheadAttention(
        EMBED, HEADS, gate="token", memory_projection="own", device="meta", dtype=torch.bfloat16
    )
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert layer.mix_weight.shape == (HEADS, EMBED)
    text = repr(layer)
    assert "embed_dim=12, num_heads=4" in text
    assert "gate='token', memory_projection='own'" in text
