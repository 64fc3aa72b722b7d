"""The layers where PyTorch has torch.nn.MultiheadAttention.

Built with its arguments, swapped into its encoders, loaded from its state dicts, also where other
tools have renamed parameters.
"""

import inspect

import pytest
import torch
from mixhead import KernelMultiheadAttention, MixedMultiheadAttention
from torch import nn
from torch.nn.utils import parametrizations, prune

E, HEADS = 8, 2
KINDS = {
    "mixed": MixedMultiheadAttention,
    "kernel": lambda *args, **options: KernelMultiheadAttention(*args, kernel="dot", **options),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def pair(kind, *args, **options):
    torch.manual_seed(0)
    peer = nn.MultiheadAttention(E, HEADS, *args, dtype=torch.float64, **options)
    ours = KINDS[kind](E, HEADS, *args, dtype=torch.float64, **options)
    ours.load_state_dict(peer.state_dict())
    return peer.eval(), ours.eval()


@pytest.mark.parametrize("layer", [MixedMultiheadAttention, KernelMultiheadAttention])
def test_the_arguments_stand_in_pytorchs_order(layer):
    theirs = list(inspect.signature(nn.MultiheadAttention).parameters)
    assert list(inspect.signature(layer).parameters)[: len(theirs)] == theirs
    made = layer(E, HEADS, 0.0, True, True, True, 6, 7, True, "cpu", torch.float64)
    assert (made.kdim, made.vdim, made.batch_first) == (6, 7, True)
    assert made.bias_k.shape == (1, 1, E)
    assert made.bias_k.dtype == torch.float64


@each_kind
@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize("add_zero_attn", [False, True])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "padding", "both", "causal"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_added_keys_are_pytorchs(kind, add_bias_kv, add_zero_attn, masks, batch_first):
    peer, ours = pair(
        kind, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first
    )
    length, batch = 5, 3
    shape = (batch, length, E) if batch_first else (length, batch, E)
    x = torch.randn(shape, dtype=torch.float64)
    blocked = torch.ones(length, length, dtype=torch.bool).triu(1)
    options = {}
    if masks in ("bool", "causal"):
        options["attn_mask"] = blocked
    if masks == "causal":
        options["is_causal"] = True
    if masks == "float":
        options["attn_mask"] = torch.randn(batch * HEADS, length, length, dtype=torch.float64)
    if masks in ("padding", "both"):
        options["key_padding_mask"] = torch.arange(length) >= torch.tensor([[5], [3], [2]])
    if masks == "both":
        options["attn_mask"] = blocked
    for average in (True, False):
        expected, weights = peer(x, x, x, average_attn_weights=average, **options)
        output, found = ours(x, x, x, average_attn_weights=average, **options)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(found, weights)
    if masks == "causal":
        # Without a mask, which PyTorch asks for.
        torch.testing.assert_close(ours(x, x, x, is_causal=True)[0], expected)


@each_kind
def test_added_keys_in_training_and_script(kind):
    peer, ours = pair(kind, add_bias_kv=True, add_zero_attn=True)
    x = torch.randn(4, 2, E, dtype=torch.float64)
    for layer in (peer, ours):
        layer(x, x, x)[0].square().sum().backward()
    for name, parameter in peer.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, msg=name)
    scripted = torch.jit.script(ours)
    torch.testing.assert_close(scripted(x, x, x)[0], ours(x, x, x)[0])


@each_kind
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_swapped_into_a_built_encoder(kind, norm_first):
    """In inference the encoder hands over nested tensors where there is padding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, 0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(3, 6, E)
    padding = torch.arange(6) >= torch.tensor([[6], [4], [1]])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        plain = encoder(x)
        for block in encoder.layers:
            ours = KINDS[kind](E, HEADS, batch_first=True)
            ours.load_state_dict(block.self_attn.state_dict())
            block.self_attn = ours.eval()
        output = encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(output[~padding], expected[~padding], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder(x), plain, rtol=1e-5, atol=1e-5)


@each_kind
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors(kind, layout):
    _, ours = pair(kind, batch_first=True)
    rows = [torch.randn(n, E, dtype=torch.float64) for n in (4, 2, 6)]
    nested = torch.nested.as_nested_tensor(rows, layout=layout)
    output, weights = ours(nested, nested, nested, need_weights=False)
    assert weights is None
    assert output.layout == layout
    for got, row in zip(output.unbind(), rows, strict=True):
        torch.testing.assert_close(got, ours(row, row, row)[0])
    assert (nested + output).is_nested
    with pytest.raises(ValueError, match="a nested query must be key and value too"):
        ours(nested, nested, nested)


@each_kind
def test_a_state_dict_assigned_on_meta_names_what_is_missing(kind):
    peer, _ = pair(kind)
    with torch.device("meta"):
        ours = KINDS[kind](E, HEADS)
    with pytest.raises(RuntimeError, match=r"Missing key.*(mix|log_bandwidth)"):
        ours.load_state_dict(peer.state_dict(), assign=True)
    missing, unexpected = ours.load_state_dict(peer.state_dict(), assign=True, strict=False)
    assert missing == ["mix" if kind == "mixed" else "log_bandwidth"]
    assert not unexpected
    real = KINDS[kind](E, HEADS)
    assert not real.load_state_dict(peer.state_dict(), assign=True).missing_keys
    assert all(not parameter.is_meta for parameter in real.parameters())


RENAMED = {
    "pruned": lambda layer: prune.l1_unstructured(layer.out_proj, "weight", 0.3),
    "pruned packed weight": lambda layer: prune.l1_unstructured(layer, "in_proj_weight", 0.3),
    "weight norm": lambda layer: parametrizations.weight_norm(layer.out_proj),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer.out_proj),
    "wrapped": lambda layer: setattr(layer, "out_proj", nn.Sequential(layer.out_proj)),
}


@each_kind
@pytest.mark.parametrize("tool", RENAMED)
def test_state_dicts_with_renamed_parameters(kind, tool):
    torch.manual_seed(0)
    peer, ours = nn.MultiheadAttention(E, HEADS), KINDS[kind](E, HEADS)
    for layer in (peer, ours):
        RENAMED[tool](layer)
    found = ours.load_state_dict(peer.state_dict())
    assert not found.missing_keys
    assert not found.unexpected_keys
    for name, tensor in peer.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, msg=name)


@each_kind
def test_what_is_missing_is_named(kind):
    peer, ours = pair(kind)
    state = peer.state_dict()
    del state["in_proj_bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"in_proj_bias"'):
        ours.load_state_dict(state)
