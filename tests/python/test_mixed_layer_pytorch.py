"""MixedMultiheadAttention scripted, exported, compiled and in half precision."""

import pytest
import torch
from mixhead import MixedMultiheadAttention
from multihead import (
    BATCH,
    EMBED,
    HEADS,
    KEYS,
    SLOTS,
    compiled_like_eager,
    inputs,
    randomized,
    saved_and_loaded,
)

VARIANTS = {
    "plain": {},
    "token": {"gate": "token", "rule": "joint"},
    "channel": {"gate": "channel", "bias": False},
    "own, grouped": {"memory_projection": "own", "num_kv_heads": 2, "batch_first": True},
    "widths": {"kdim": 8, "vdim": 8},
}


def variant(name):
    options = VARIANTS[name]
    layer = randomized(MixedMultiheadAttention(EMBED, HEADS, **options))
    width = options.get("kdim", EMBED)
    batch_first = options.get("batch_first", False)
    tensors = inputs(batch_first=batch_first, kdim=width, vdim=width, dtype=torch.float32)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, -1] = True
    keywords = {"key_padding_mask": padding, "memory": torch.randn(SLOTS, width)}
    return layer, tuple(tensor.detach() for tensor in tensors), keywords


@pytest.mark.parametrize("name", VARIANTS)
def test_scripts_and_saves(name):
    layer, tensors, keywords = variant(name)
    loaded = saved_and_loaded(torch.jit.script(layer))
    torch.testing.assert_close(loaded(*tensors, **keywords), layer(*tensors, **keywords))
    torch.testing.assert_close(loaded(*tensors)[0], layer(*tensors)[0])
    projected = layer.project_memory(keywords["memory"])
    torch.testing.assert_close(loaded.project_memory(keywords["memory"]), projected)
    torch.testing.assert_close(
        loaded.attend(*tensors, *projected), layer(*tensors, memory=keywords["memory"])
    )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_exports(name, strict):
    layer, tensors, keywords = variant(name)
    exported = torch.export.export(layer, tensors, keywords, strict=strict)
    torch.testing.assert_close(exported.module()(*tensors, **keywords), layer(*tensors, **keywords))


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_forward_and_backward(name):
    layer, tensors, keywords = variant(name)
    compiled = compiled_like_eager(layer, tensors, keywords)
    torch.testing.assert_close(compiled(*tensors, **keywords), layer(*tensors, **keywords))


@pytest.mark.slow
def test_compiles_with_inductor():
    layer, tensors, keywords = variant("plain")
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors, **keywords), layer(*tensors, **keywords))


def test_half_precision_and_autocast():
    layer, tensors, keywords = variant("plain")
    expected = layer(*tensors, **keywords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, weights = layer(*tensors, **keywords)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected[0], rtol=0.05, atol=0.1)
    torch.testing.assert_close(weights.float(), expected[1], rtol=0.05, atol=0.05)
    keywords["memory"] = keywords["memory"].bfloat16()
    output, _ = layer.bfloat16()(*(tensor.bfloat16() for tensor in tensors), **keywords)
    torch.testing.assert_close(output.float(), expected[0], rtol=0.05, atol=0.1)
