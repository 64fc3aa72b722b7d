"""What the tests of the multihead layers share: sizes, inputs, masks, torch.nn as the peer."""

import io

import torch
from torch import nn

EMBED, HEADS, LENGTH, KEYS, BATCH, SLOTS = 12, 4, 5, 6, 3, 7
TOLERANCE = {torch.float64: {"rtol": 0, "atol": 1e-10}, torch.float32: {"rtol": 0, "atol": 1e-5}}


def randomized(layer):
    """Every parameter random, so that nothing passes because a bias or a gate is 0."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def inputs(batched=True, batch_first=False, kdim=EMBED, vdim=EMBED, dtype=torch.float64, keys=KEYS):
    tensors = []
    for length, width in ((LENGTH, EMBED), (keys, kdim), (keys, vdim)):
        shape = [length, width]
        if batched:
            shape.insert(0 if batch_first else 1, BATCH)
        tensors.append(torch.randn(shape, dtype=dtype, requires_grad=True))
    return tensors


def masks(padding, pairs, batched, dtype):
    """Masks in torch.nn's meaning (True: blocked) that leave every query a key."""
    options = {}
    batch = BATCH if batched else 1
    if padding is not None:
        mask = torch.zeros(batch, KEYS, dtype=torch.bool)
        mask[0, -2:] = True
        mask = mask if padding == "bool" else torch.randn(batch, KEYS, dtype=dtype)
        options["key_padding_mask"] = mask if batched else mask[0]
    if pairs is not None:
        shape = (LENGTH, KEYS) if pairs.endswith("2") else (batch * HEADS, LENGTH, KEYS)
        mask = torch.rand(shape) < 0.4
        mask[..., 0] = False
        options["attn_mask"] = mask if pairs.startswith("bool") else torch.randn(shape, dtype=dtype)
    return options


def compare_with_torch(peer, ours, tensors, options, dtype):
    expected, actual = peer(*tensors, **options), ours(*tensors, **options)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    assert (actual[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(actual[1], expected[1], **tolerance)
    torch_names = dict(peer.named_parameters())
    weights = [p for name, p in ours.named_parameters() if name in torch_names]
    results = []
    for outputs, parameters in ((expected, peer.parameters()), (actual, weights)):
        loss = outputs[0].sin().sum()
        if outputs[1] is not None:
            loss = loss + outputs[1].square().sum()
        leaves = {id(leaf): leaf for leaf in (*tensors, *parameters)}
        results.append(torch.autograd.grad(loss, list(leaves.values())))
    for mine, theirs in zip(results[1], results[0], strict=True):
        # Sums of many terms, which cancel in some elements: the keys' bias has no gradient at all.
        # Their error goes by the largest.
        largest = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance["atol"] * largest)


def saved_and_loaded(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


def compiled_like_eager(layer, tensors, keywords):
    """`layer` compiled, after its gradients were found equal to those without compilation."""
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (layer, compiled):
        layer.zero_grad()
        output, weights = run(*tensors, **keywords)
        (output.sin().sum() + weights.square().sum()).backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    return compiled
