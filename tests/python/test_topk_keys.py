"""topk_keys against every score stored and sorted."""

import math

import mixhead
import pytest
import torch
import torch.nn.functional as F
from compare import assert_near, assert_same_bits

topk_keys = torch.ops.mixhead.topk_keys
METRICS = ["dot", "cosine", "l2"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_metric = pytest.mark.parametrize("metric", METRICS)


def scores_of(query, key, metric, mask=None):
    """All scores (B, Hq, L, M) in float64, -inf where the mask closes."""
    query, key = query.double(), key.double()
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    if metric == "dot":
        scores = torch.einsum("...ld,...md->...lm", query, key)
    elif metric == "cosine":
        scores = F.cosine_similarity(query.unsqueeze(-2), key.unsqueeze(-3), dim=-1)
    else:
        scores = -(query.unsqueeze(-2) - key.unsqueeze(-3)).pow(2).sum(-1)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return scores + mask.double()


def expected(query, key, k, metric="dot", mask=None):
    """Stable sort keeps equal scores in the order of their keys."""
    scores = scores_of(query, key, metric, mask)
    scores = F.pad(scores, (0, k), value=-math.inf)
    scores, indices = scores.sort(dim=-1, descending=True, stable=True)
    scores, indices = scores[..., :k], indices[..., :k]
    return scores, indices.masked_fill(scores == -math.inf, -1)


def points(*shape, seed=0):
    """Small integers: their products and sums are exact in every dtype, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).double()


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# name: query, key, mask
CASES = {
    "shared keys": ((2, 3, 5, 4), (3, 40, 4), None),
    "keys of each entry": ((2, 3, 5, 4), (2, 3, 40, 4), None),
    "no batch": ((3, 5, 4), (3, 40, 4), None),
    "two batch dimensions": ((2, 3, 2, 5, 4), (2, 3, 2, 40, 4), None),
    "grouped": ((2, 6, 5, 4), (2, 40, 4), None),
    "grouped, keys of each entry": ((2, 6, 5, 4), (2, 3, 40, 4), None),
    "one query": ((2, 3, 1, 4), (3, 700, 4), None),
    "many keys and rows": ((2, 1, 130, 7), (1, 1300, 7), None),
    "wide": ((1, 2, 9, 80), (2, 300, 80), None),
    "bool mask": ((2, 3, 5, 4), (3, 40, 4), (2, 3, 5, 40)),
    "bool mask of keys": ((2, 3, 5, 4), (2, 3, 40, 4), (40,)),
    "bool mask, grouped": ((2, 6, 5, 4), (2, 3, 40, 4), (6, 1, 40)),
}


@each_metric
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 8, 33])
def test_equal_scores_come_in_the_order_of_the_keys(metric, name, dtype, k):
    """On integers, whose scores are exact and often equal. Cosines round, so theirs are powers of
    two over a norm of 2."""
    query_shape, key_shape, mask_shape = CASES[name]
    query, key = points(*query_shape, seed=1), points(*key_shape, seed=2)
    if metric == "cosine":
        query, key = (torch.zeros_like(x) for x in (query, key))
        query[..., 0] = 2.0 * points(*query_shape[:-1], seed=1).sign()
        key[..., :4] = points(*key_shape[:-1], 4, seed=2).sign().add(0.5).sign()
    mask = None if mask_shape is None else points(*mask_shape, seed=3) > 0
    scores, indices = topk_keys(query.to(dtype), key.to(dtype), k, mask=mask, metric=metric)
    want, where = expected(query, key, k, metric, mask)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(scores.double(), want)
    assert torch.equal(indices, where)


@each_metric
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normal_numbers(metric, name, dtype):
    query_shape, key_shape, mask_shape = CASES[name]
    query, key = normal(*query_shape, seed=1).to(dtype), normal(*key_shape, seed=2).to(dtype)
    mask = None if mask_shape is None else normal(*mask_shape, seed=3) > 0
    scores, indices = topk_keys(query, key, 12, mask=mask, metric=metric)
    want, where = expected(query, key, 12, metric, mask)
    near = torch.float64 if dtype == torch.float64 else torch.float32
    assert_near(scores, want, near)
    found = scores_of(query, key, metric, mask).gather(-1, indices.clamp_min(0))
    assert_near(scores, found.masked_fill(indices < 0, -math.inf), near)
    assert torch.equal(indices < 0, where < 0)


def test_many_tiles():
    """More keys and rows than any tile or split holds, some scores equal."""
    query, key = normal(1, 70, 16).float(), normal(1, 20_000, 16, seed=1).float()
    key[:, 15_000:] = key[:, :5_000]
    scores, indices = topk_keys(query, key, 20)
    want, _ = (query @ key.mT).sort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(scores, want[..., :20])
    # A key's copy has its score to the bit, and comes right after it.
    copies = (indices >= 15_000).nonzero()
    assert len(copies) > 100
    for head, row, place in copies.tolist():
        assert place > 0
        assert indices[head, row, place] == indices[head, row, place - 1] + 15_000
        assert scores[head, row, place] == scores[head, row, place - 1]


def test_k_larger_than_the_tile():
    query, key = normal(1, 3, 4), normal(1, 5000, 4, seed=1)
    scores, indices = topk_keys(query, key, 4000)
    want, where = expected(query, key, 4000)
    torch.testing.assert_close(scores, want)
    assert torch.equal(indices, where)


def test_fewer_than_k():
    query, key = points(1, 2, 3), points(1, 3, 3, seed=1)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    scores, indices = topk_keys(query, key, 5, mask=mask)
    want, where = expected(query, key, 5, mask=mask)
    assert torch.equal(scores, want)
    assert torch.equal(indices, where)
    assert indices[0, 1].tolist() == [-1] * 5


@pytest.mark.parametrize("shapes", [((1, 2, 3), (1, 0, 3)), ((1, 0, 3), (1, 4, 3))], ids=str)
@pytest.mark.parametrize("k", [0, 2])
def test_nothing(shapes, k):
    query, key = (torch.randn(shape).requires_grad_() for shape in shapes)
    scores, indices = topk_keys(query, key, k)
    assert scores.shape == indices.shape == (*shapes[0][:-1], k)
    assert (indices == -1).all()
    assert (scores == -math.inf).all()
    for grad in torch.autograd.grad(scores, (query, key), torch.ones_like(scores)):
        assert (grad == 0).all()


def test_float_mask_adds_to_the_score():
    query, key = normal(2, 3, 5, 4), normal(3, 40, 4, seed=1)
    mask = normal(3, 1, 40, seed=2)
    mask[0, 0, ::2] = -math.inf
    scores, indices = topk_keys(query, key, 30, mask=mask)
    want, where = expected(query, key, 30, mask=mask)
    torch.testing.assert_close(scores, want)
    assert torch.equal(indices, where)
    assert (indices[:, 0, :, 20:] == -1).all()


def test_l2_far_from_the_origin():
    """Points near 5e5 and a step of 1 apart, in float32: |q|^2 - 2 q.k + |k|^2 would be noise."""
    key = (torch.arange(200.0) + 5e5).view(1, 200, 1)
    scores, indices = topk_keys(key[:, 50:51], key, 5, metric="l2")
    assert indices[0, 0].tolist() == [50, 49, 51, 48, 52]
    assert scores[0, 0].tolist() == [0.0, -1.0, -1.0, -4.0, -4.0]


def test_nan_is_the_highest():
    query, key = normal(1, 3, 4), normal(1, 900, 4, seed=1)
    key[0, 700, 1] = math.nan
    query[0, 2, 0] = math.nan
    scores, indices = topk_keys(query, key, 3)
    assert indices[0, :, 0].tolist() == [700, 700, 0]
    assert scores[0, :, 0].isnan().all()
    assert scores[0, :2, 1:].isfinite().all()
    assert indices[0, 2].tolist() == [0, 1, 2]


def test_strides():
    query, key = normal(5, 4, 2, seed=1).permute(2, 0, 1), normal(4, 2, 80, seed=2).permute(1, 2, 0)
    wide = torch.stack([key, key], -1).flatten(-2)[..., ::2]
    want = topk_keys(query.contiguous(), key.contiguous(), 6)
    for strided in (key, wide):
        scores, indices = topk_keys(query, strided, 6)
        torch.testing.assert_close(scores, want[0])
        assert torch.equal(indices, want[1])


def named(query, key, indices, metric, mask):
    """The scores of `indices`, by indexing the scores of all keys."""
    return scores_of(query, key, metric, mask).gather(-1, indices)


@each_metric
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(metric, shared, dtype):
    query = normal(2, 4, 5, 3, seed=1).to(dtype)
    key = normal(*(() if shared else (2,)), 2, 30, 3, seed=2).to(dtype)
    mask = normal(4, 1, 30, seed=3).to(dtype)
    tensors = [tensor.requires_grad_() for tensor in (query, key, mask)]
    scores, indices = topk_keys(query, key, 6, mask=mask, metric=metric)
    assert not indices.requires_grad
    weight = normal(*scores.shape, seed=4)
    actual = torch.autograd.grad((scores * weight.to(scores.dtype)).sum(), tensors)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    want = named(*wide[:2], indices, metric, wide[2])
    for mine, theirs in zip(actual, torch.autograd.grad((want * weight).sum(), wide), strict=True):
        assert_near(mine, theirs, dtype, scale=2.0)


@each_metric
def test_derivatives(metric):
    tensors = [
        tensor.requires_grad_()
        for tensor in (normal(2, 3, 2, seed=1), normal(2, 8, 2, seed=2), normal(2, 1, 8, seed=3))
    ]

    def call(query, key, mask):
        return topk_keys(query, key, 3, mask=mask, metric=metric)[0]

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("argument", range(3))
def test_second_derivative_of_one_argument_alone(argument):
    tensors = [normal(2, 3, 2, seed=1), normal(2, 8, 2, seed=2), normal(2, 1, 8, seed=3)]
    tensors[argument].requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda q, k, mask: topk_keys(q, k, 3, mask=mask, metric="cosine")[0], tensors
    )


def test_gradient_of_unfilled_places_is_zero():
    query, key = normal(1, 2, 3).requires_grad_(), normal(1, 3, 3, seed=1).requires_grad_()
    mask = torch.tensor([[True, True, False], [False, False, False]])
    scores, _ = topk_keys(query, key, 4, mask=mask)
    grads = torch.autograd.grad(scores, (query, key), torch.ones_like(scores))
    want = torch.autograd.grad(scores_of(query, key, "dot")[0, 0, :2].sum(), (query, key))
    for mine, theirs in zip(grads, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_indices_feed_memory_index():
    """Attention over the best slots alone equals attention over all with the others masked."""
    query, key, value = normal(3, 2, 2, 5, 8).unbind()
    memory_key, memory_value, mix = (
        normal(2, 40, 8, seed=1),
        normal(2, 40, 8, seed=2),
        normal(2, 1, 1),
    )
    _, indices = mixhead.topk_keys(query, memory_key, 6)
    best = torch.zeros(2, 2, 5, 40, dtype=torch.bool).scatter(-1, indices, True)
    arguments = (query, key, value, memory_key, memory_value, mix)
    named_slots = mixhead.mixed_attention(*arguments, memory_index=indices)
    torch.testing.assert_close(named_slots, mixhead.mixed_attention(*arguments, memory_mask=best))


# opcheck looks at .grad of what the op returned, which torch warns of.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@each_metric
def test_opcheck(metric):
    query, key = normal(2, 4, 3, 5).requires_grad_(), normal(2, 30, 5).requires_grad_()
    mask = normal(4, 1, 30).requires_grad_()
    torch.library.opcheck(topk_keys, (query, key, 7), {"mask": mask, "metric": metric})
    torch.library.opcheck(topk_keys, (query, key, 7), {"metric": metric})


def test_same_bits_every_time():
    query, key = normal(2, 100, 16).float(), normal(2, 5000, 16).float()
    assert_same_bits(topk_keys(query, key, 9), topk_keys(query, key, 9))


def test_autocast():
    query, key = normal(1, 4, 8).float(), normal(1, 30, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, indices = topk_keys(query, key, 5)
    assert_same_bits((scores, indices), topk_keys(query.bfloat16(), key.bfloat16(), 5))
    assert scores.dtype == torch.float32


def call(query: torch.Tensor, key: torch.Tensor):
    scores, indices = mixhead.topk_keys(query, key, 4, metric="l2")
    return scores, indices, mixhead.topk_keys(query, key, 2)[1]


class Model(torch.nn.Module):
    def forward(self, query, key):
        return call(query, key)


def test_script_compile_and_export():
    arguments = normal(2, 6, 5), normal(2, 30, 5, seed=1)
    want = call(*arguments)
    rows, keys = torch.export.Dim("rows"), torch.export.Dim("keys")
    for run in (
        torch.jit.script(call),
        torch.compile(call, fullgraph=True, backend="aot_eager"),
        torch.export.export(Model(), arguments, dynamic_shapes=({1: rows}, {1: keys})).module(),
    ):
        assert_same_bits(run(*arguments), want)


BAD = {
    "query": [
        (points(5, 3), r"at least 3 dimensions, got \(5, 3\)"),
        (points(2, 5, 3).long(), "Long"),
    ],
    "key": [
        (points(4, 30, 2), r"3 channels like query, got \(4, 30, 2\)"),
        (points(3, 30, 3), r"divides query's 4, got \(3, 30, 3\)"),
        (points(3, 4, 30, 3), r"batch dimensions of query .*, got \(3, 4, 30, 3\)"),
        (points(4, 30, 3).float(), "got Float"),
        (points(30, 3), r"3 dimensions .*, got \(30, 3\)"),
    ],
    "k": [(-1, "at least 0, got -1")],
    "metric": [("euclidean", '"l2", got "euclidean"')],
    "mask": [
        (torch.ones(5, 29, dtype=torch.bool), r"\(2, 4, 5, 30\), got \(5, 29\)"),
        (torch.ones(5, 30, dtype=torch.int64), "bool or floating, got Long"),
    ],
}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [(name, *each) for name, entries in BAD.items() for each in entries],
)
def test_bad_input(argument, value, message):
    arguments = {"query": points(2, 4, 5, 3), "key": points(4, 30, 3), "k": 3, argument: value}
    with pytest.raises(RuntimeError, match=f"topk_keys: {argument} must .*{message}"):
        topk_keys(**arguments)
