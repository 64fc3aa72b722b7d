"""KernelMultiheadAttention against torch.nn.MultiheadAttention and against the dense reference."""

import copy
import math
import pickle
import re

import pytest
import reference
import torch
import torch.nn.functional as F
from mixhead import KernelMultiheadAttention
from multihead import (
    BATCH,
    EMBED,
    HEADS,
    KEYS,
    LENGTH,
    compare_with_torch,
    compiled_like_eager,
    inputs,
    masks,
    randomized,
    saved_and_loaded,
)
from torch import nn

SIZE = EMBED // HEADS
KERNELS = (
    "dot", "cosine", "gaussian", "laplacian", "matern32", "matern52", "cauchy", "epanechnikov",
    "tricube", "boxcar",
)  # fmt: skip


def pair(dtype=torch.float64, **options):
    """torch's layer and ours with the same weights. Made in float32, so that the bandwidth must be
    exact in every dtype."""
    peer = randomized(nn.MultiheadAttention(EMBED, HEADS, **options)).to(dtype)
    ours = KernelMultiheadAttention(EMBED, HEADS, kernel="dot", **options).to(dtype)
    ours.load_state_dict(peer.state_dict())
    return peer, ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("pairs", [None, "bool2", "bool3", "float3"])
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
def test_dot_equals_torch(dtype, batched, batch_first, padding, pairs):
    peer, ours = pair(dtype, batch_first=batch_first)
    options = masks(padding, pairs, batched, dtype)
    compare_with_torch(peer, ours, inputs(batched, batch_first, dtype=dtype), options, dtype)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (8, 10)])
@pytest.mark.parametrize("bias", [False, True])
def test_dot_equals_torch_in_weights_and_widths(need_weights, average, kdim, vdim, bias):
    peer, ours = pair(kdim=kdim, vdim=vdim, bias=bias)
    tensors = inputs(kdim=kdim or EMBED, vdim=vdim or EMBED)
    options = {"need_weights": need_weights, "average_attn_weights": average}
    compare_with_torch(peer, ours, tensors, options, torch.float64)


def test_is_causal_with_and_without_mask():
    peer, ours = pair()
    query, key, _ = inputs()
    blocked = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(KEYS - LENGTH + 1)
    expected = peer(query, key, key, attn_mask=blocked)
    torch.testing.assert_close(ours(query, key, key, is_causal=True), expected)
    hinted = ours(query, key, key, attn_mask=blocked, is_causal=True)
    torch.testing.assert_close(hinted, expected)


# ---- against the formulas ------------------------------------------------------------------------


def dense_layer(layer, query, key, value, **options):
    """The layer from its formulas, batch first: (output, weights of each head)."""
    kv_heads = layer.num_kv_heads
    widths = [EMBED, kv_heads * SIZE, kv_heads * SIZE]
    heads = [
        torch.stack((tokens @ weight.T + bias).split(SIZE, dim=-1), dim=-3)
        for tokens, weight, bias in zip(
            (query, key, value),
            layer.in_proj_weight.split(widths),
            layer.in_proj_bias.split(widths),
            strict=True,
        )
    ]
    bandwidth = SIZE**0.25 * torch.exp(layer.log_bandwidth)
    options = {"enable_gqa": kv_heads != HEADS, **options}
    output, _ = reference.kernel_attention(*heads, bandwidth, layer.kernel, **options)
    identity = torch.eye(key.size(1)).double().expand(*heads[1].shape[:-1], key.size(1))
    weights, _ = reference.kernel_attention(
        *heads[:2], identity, bandwidth, layer.kernel, **options
    )
    output = torch.cat(output.unbind(1), dim=-1)
    return F.linear(output, layer.out_proj.weight, layer.out_proj.bias), weights


MIXED = ["gaussian", "laplacian", "dot", "epanechnikov"]


@pytest.mark.parametrize("kernel", [*KERNELS, MIXED], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_against_reference(kernel, per_channel, kv_heads, is_causal):
    if per_channel and kernel == "cosine":
        pytest.skip("an error, tested below")
    bandwidth = 1 + 3 * torch.rand((HEADS, SIZE) if per_channel else (HEADS,))
    layer = KernelMultiheadAttention(
        EMBED, HEADS, batch_first=True, num_kv_heads=kv_heads, kernel=kernel, bandwidth=bandwidth,
        dtype=torch.float64,
    )  # fmt: skip
    torch.testing.assert_close(layer.bandwidth, bandwidth.double())
    for name, parameter in layer.named_parameters():
        if name != "log_bandwidth":
            nn.init.normal_(parameter, std=0.4)
    tensors = inputs(batch_first=True)
    output, weights = layer(*tensors, average_attn_weights=False, is_causal=is_causal)
    expected = dense_layer(layer, *tensors, is_causal=is_causal)
    torch.testing.assert_close(output, expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(weights, expected[1], rtol=0, atol=1e-10)

    leaves = [*tensors, *layer.parameters()]
    gradients = [
        torch.autograd.grad(
            out.sin().sum() + w.square().sum(), leaves, allow_unused=True, materialize_grads=True
        )
        for out, w in ((output, weights), expected)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("masked", ["none", "bool", "float", "one for all keys"])
def test_weights_of_many_keys(keys, masked):
    """The weights are computed in blocks of keys."""
    layer = randomized(KernelMultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.double))
    tensors = inputs(batch_first=True, keys=keys)
    mask = None
    if masked == "bool":
        mask = torch.rand(LENGTH, keys) < 0.3
    elif masked == "float":
        mask = torch.randn(LENGTH, keys, dtype=torch.float64)
    elif masked == "one for all keys":
        mask = torch.randn(LENGTH, 1, dtype=torch.float64).expand(LENGTH, keys)
    weights = layer(*tensors, attn_mask=mask, average_attn_weights=False)[1]
    theirs = mask.logical_not() if masked == "bool" else mask
    expected = dense_layer(layer, *tensors, attn_mask=theirs)[1]
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operator_of_the_weights():
    query, key = (
        torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    bandwidth = torch.rand(4, dtype=torch.float64) + 1
    _, mass = torch.ops.mixhead.kernel_attention(query, key, key, bandwidth, MIXED)
    mask = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    arguments = (query, key, mass.detach(), bandwidth, MIXED, mask, True, False)
    torch.library.opcheck(torch.ops.mixhead._kernel_attention_weights.default, arguments)


def test_no_keys_at_all():
    layer = KernelMultiheadAttention(EMBED, HEADS)
    query, empty = torch.randn(LENGTH, BATCH, EMBED), torch.randn(0, BATCH, EMBED)
    output, weights = layer(query, empty, empty)
    assert output.shape == query.shape
    assert not output.any()
    assert weights.shape == (BATCH, LENGTH, 0)


def test_a_query_without_mass_gives_zeros():
    layer = KernelMultiheadAttention(
        EMBED, HEADS, kernel="epanechnikov", bandwidth=1e-3, dtype=torch.float64
    )
    tensors = inputs()
    output, weights = layer(*tensors)
    assert not output.any()
    assert not weights.any()
    blocked = torch.ones(LENGTH, KEYS, dtype=torch.bool)
    wide = KernelMultiheadAttention(EMBED, HEADS, dtype=torch.float64)
    output, weights = wide(*tensors, attn_mask=blocked)
    leaves = [*tensors, *wide.parameters()]
    gradients = torch.autograd.grad(output.sum() + weights.square().sum(), leaves)
    assert not output.any()
    assert not weights.any()
    assert all(gradient.isfinite().all() for gradient in gradients)


# ---- bandwidths ----------------------------------------------------------------------------------


def test_default_bandwidth_and_names():
    layer = KernelMultiheadAttention(EMBED, HEADS)
    torch.testing.assert_close(layer.bandwidth, torch.full((HEADS,), SIZE**0.25))
    peer = nn.MultiheadAttention(EMBED, HEADS)
    assert {*layer.state_dict()} == {*peer.state_dict(), "log_bandwidth"}
    fixed = KernelMultiheadAttention(EMBED, HEADS, learn_bandwidth=False)
    assert {*fixed.state_dict()} == {*layer.state_dict()}
    assert {*dict(fixed.named_parameters())} == {*dict(peer.named_parameters())}
    fixed.load_state_dict(layer.state_dict())


def test_initial_values_are_those_of_torch():
    for options in ({}, {"bias": False}, {"kdim": 8, "vdim": 10}):
        torch.manual_seed(3)
        peer = nn.MultiheadAttention(EMBED, HEADS, **options)
        torch.manual_seed(3)
        state = KernelMultiheadAttention(EMBED, HEADS, bandwidth=2.0, **options).state_dict()
        log_bandwidth = torch.full((HEADS,), math.log(2.0 / SIZE**0.25))
        torch.testing.assert_close(state.pop("log_bandwidth"), log_bandwidth)
        torch.testing.assert_close(dict(state), dict(peer.state_dict()), rtol=0, atol=0)


def test_learned_bandwidth_stays_positive_and_learns():
    """Queries and keys are fixed, so the bandwidth alone can follow the target."""
    layer = KernelMultiheadAttention(1, 1, bandwidth=3.0, bias=False, dtype=torch.float64)
    x = torch.linspace(0, 1, 40, dtype=torch.float64).view(40, 1)
    with torch.no_grad():
        layer.in_proj_weight.fill_(1.0)
        layer.out_proj.weight.fill_(1.0)
    y = torch.sin(6 * x)
    target = torch.softmax(-(x - x.T).square() / (2 * 0.1**2), -1) @ y
    optimizer = torch.optim.Adam([layer.log_bandwidth], lr=0.2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x, x, y, need_weights=False)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        assert (layer.bandwidth > 0).all()
    torch.testing.assert_close(layer.bandwidth, torch.tensor([0.1]).double(), rtol=0.02, atol=0)


def test_state_dict_of_torch_loads_and_keeps_the_bandwidth():
    peer = randomized(nn.MultiheadAttention(EMBED, HEADS))
    layer = KernelMultiheadAttention(EMBED, HEADS, bandwidth=[1.0, 2.0, 3.0, 4.0])
    result = layer.load_state_dict(peer.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    torch.testing.assert_close(layer.bandwidth, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(layer.in_proj_weight, peer.in_proj_weight)
    state = {k: v for k, v in layer.state_dict().items() if k != "in_proj_bias"}
    with pytest.raises(RuntimeError, match=r"Missing key.*in_proj_bias"):
        layer.load_state_dict(state)


# ---- in torch's transformers, copied, scripted, exported, compiled -------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_inside_encoder_layer(training):
    peer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, 0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(peer)
    ours.self_attn = KernelMultiheadAttention(
        EMBED, HEADS, batch_first=True, kernel="dot", dtype=torch.float64
    )
    ours.self_attn.load_state_dict(peer.self_attn.state_dict())
    peer.train(training)
    ours.train(training)
    tokens = torch.randn(BATCH, LENGTH, EMBED, dtype=torch.float64)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, -1] = True
    with torch.set_grad_enabled(training):
        expected = peer(tokens, src_key_padding_mask=padding)
        torch.testing.assert_close(ours(tokens, src_key_padding_mask=padding), expected)
        # torch's own attention would not move with the bandwidth.
        ours.self_attn.log_bandwidth.data.fill_(-1.0)
        assert not torch.allclose(ours(tokens), peer(tokens))
    scripted = torch.jit.script(ours.eval())
    torch.testing.assert_close(scripted(tokens), ours(tokens))


VARIANTS = {
    "gaussian": {},
    "mixed": {"kernel": MIXED, "bandwidth": 2.0, "num_kv_heads": 2, "batch_first": True},
    "per channel": {"kernel": "matern32", "bandwidth": torch.ones(HEADS, SIZE), "bias": False},
    "fixed": {"kernel": "cauchy", "learn_bandwidth": False, "kdim": 8, "vdim": 8},
}


def variant(name):
    options = VARIANTS[name]
    layer = randomized(KernelMultiheadAttention(EMBED, HEADS, **options))
    width = options.get("kdim", EMBED)
    batch_first = options.get("batch_first", False)
    tensors = inputs(batch_first=batch_first, kdim=width, vdim=width, dtype=torch.float32)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, -1] = True
    return layer, tuple(t.detach() for t in tensors), {"key_padding_mask": padding}


@pytest.mark.parametrize("name", VARIANTS)
def test_copies_pickles_scripts_and_saves(name):
    layer, tensors, keywords = variant(name)
    expected = layer(*tensors, **keywords)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        saved_and_loaded(torch.jit.script(layer)),
    ):
        torch.testing.assert_close(other(*tensors, **keywords), expected)
        alone = other(*tensors, need_weights=False)
        assert alone[1] is None


@pytest.mark.parametrize("name", VARIANTS)
def test_exports(name):
    layer, tensors, keywords = variant(name)
    exported = torch.export.export(layer, tensors, keywords)
    torch.testing.assert_close(exported.module()(*tensors, **keywords), layer(*tensors, **keywords))


def test_exports_with_any_length():
    layer = randomized(KernelMultiheadAttention(EMBED, HEADS))
    tokens = torch.randn(LENGTH, BATCH, EMBED)
    length = torch.export.Dim("length", min=2, max=1000)
    shapes = {"query": {0: length}, "key": {0: length}, "value": {0: length}}
    exported = torch.export.export(layer, (tokens,) * 3, dynamic_shapes=shapes)
    longer = torch.randn(70, BATCH, EMBED)
    expected = layer(longer, longer, longer)
    torch.testing.assert_close(exported.module()(longer, longer, longer), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_forward_and_backward(name):
    layer, tensors, keywords = variant(name)
    compiled_like_eager(layer, tensors, keywords)


def test_dropout_only_in_training():
    layer = randomized(KernelMultiheadAttention(EMBED, HEADS, dropout=0.5))
    tensors = inputs(dtype=torch.float32)
    torch.manual_seed(5)
    first = layer(*tensors)[0]
    assert not torch.allclose(first, layer(*tensors)[0])
    torch.manual_seed(5)
    torch.testing.assert_close(layer(*tensors)[0], first, rtol=0, atol=0)
    layer.eval()
    torch.testing.assert_close(layer(*tensors)[0], layer(*tensors)[0], rtol=0, atol=0)


def test_half_precision_and_autocast():
    layer, tensors, keywords = variant("gaussian")
    expected = layer(*tensors, **keywords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, weights = layer(*tensors, **keywords)
    assert output.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected[0], rtol=0.05, atol=0.1)
    torch.testing.assert_close(weights.float(), expected[1], rtol=0.05, atol=0.05)
    output, _ = layer.bfloat16()(*(tensor.bfloat16() for tensor in tensors), **keywords)
    torch.testing.assert_close(output.float(), expected[0], rtol=0.1, atol=0.2)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, got 12 and 5"),
        ({"kernel": "box"}, "kernel must be one of 'dot', 'cosine', 'gaussian', "),
        ({"kernel": "box"}, "got 'box'"),
        ({"kernel": ["dot", "dot"]}, "kernel must be one name or one for each of 4 heads, got 2"),
        ({"kernel": []}, "kernel must be one name or one for each of 4 heads, got 0"),
        ({"bandwidth": 0.0}, "bandwidth must be positive and finite, got 0.0"),
        ({"bandwidth": [1.0, -1.0, 1.0, 1.0]}, "bandwidth must be positive and finite, got -1.0"),
        ({"bandwidth": math.nan}, "bandwidth must be positive and finite, got nan"),
        ({"bandwidth": torch.ones(3)}, "bandwidth must be a number, (4,) or (4, 3), got (3,)"),
        (
            {"bandwidth": torch.ones(4, 3), "kernel": "cosine"},
            "bandwidth must be a number or (4,) with kernel 'cosine', got one per channel (4, 3)",
        ),
    ],
)
def test_constructor_refuses(options, message):
    pattern = f"KernelMultiheadAttention: .*{re.escape(message)}"
    with pytest.raises(ValueError, match=pattern):
        KernelMultiheadAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **options})


def test_forward_refuses():
    layer, (query, key, value) = KernelMultiheadAttention(EMBED, HEADS), inputs(dtype=torch.float)
    for args, options, message in (
        ((query[0, 0], key, value), {}, "query must have 2 or 3 dimensions, got (12)"),
        ((query, key, value[..., :4]), {}, "value must have 3 dimensions, the last of 12, got"),
        (
            (query, key, value),
            {"attn_mask": torch.zeros(KEYS, LENGTH)},
            "attn_mask must have shape [5, 6], got (6, 5)",
        ),
        (
            (query, key, value),
            {"key_padding_mask": torch.zeros(BATCH, KEYS, dtype=torch.int64)},
            "key_padding_mask must be bool or floating point, got torch.int64",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(f"KernelMultiheadAttention: {message}")):
            layer(*args, **options)


def test_factory_arguments_and_repr():
    layer = KernelMultiheadAttention(
        EMBED, HEADS, kernel=MIXED, learn_bandwidth=False, device="meta", dtype=torch.bfloat16
    )
    tensors = [*layer.parameters(), *layer.buffers()]
    assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.bfloat16)}
    text = repr(layer)
    assert "embed_dim=12, num_heads=4" in text
    assert f"kernel={MIXED!r}, learn_bandwidth=False" in text
    assert "kernel='gaussian', learn_bandwidth=True" in repr(KernelMultiheadAttention(EMBED, HEADS))
