"""The code of docs/recipes.md, as it stands there, against plain torch."""

import math
import re
from pathlib import Path

import mixhead
import pytest
import torch
import torch.nn.functional as F

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
DOUBLE = {"dtype": torch.float64}


@pytest.fixture(scope="module")
def recipes():
    """The names that the page's code defines."""
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def compare(actual, expected, *leaves):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(output.sin().sum(), leaves) for output in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


def random(*shape):
    return torch.randn(shape, **DOUBLE).requires_grad_()


def test_every_section_has_a_tested_recipe(recipes):
    titles = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(titles) == 7
    defined = {name for name, value in recipes.items() if getattr(value, "__code__", None)}
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert len(defined) == len(titles)
    assert defined <= tested


@pytest.mark.parametrize("training", [False, True])
def test_modern_nca(recipes, training):
    key, label = random(9, 4), torch.arange(9) % 3
    query = key if training else random(5, 4)
    temperature = torch.tensor(0.7, **DOUBLE, requires_grad=True)
    actual = recipes["modern_nca"](query, key, label, 3, temperature, training)
    distance = (query[:, None] - key).square().sum(-1).clamp_min(1e-300).sqrt() / temperature
    if training:
        distance = distance.masked_fill(torch.eye(9, dtype=torch.bool), math.inf)
    expected = torch.log(torch.softmax(-distance, -1) @ F.one_hot(label, 3).double() + 1e-7)
    compare(actual, expected, key, temperature)


def test_modern_nca_by_the_mask_of_its_text(recipes):
    batch, more = random(3, 4), random(4, 4)
    key, label = torch.cat([batch, more]), torch.arange(7) % 2
    value = F.one_hot(label, 2).double()
    mask = torch.ones(3, 7, dtype=torch.bool).fill_diagonal_(False)
    actual = mixhead.kernel_attention(
        batch[None],
        key[None],
        value[None],
        torch.tensor(1.0, **DOUBLE),
        "laplacian",
        attn_mask=mask,
    )[0]
    everyone = recipes["modern_nca"](key, key, label, 2, torch.tensor(1.0, **DOUBLE), True)
    torch.testing.assert_close(torch.log(actual + 1e-7), everyone[:3])


def test_tabr(recipes):
    query, key, label_embedding = random(5, 4), random(20, 4), random(20, 4)
    correction = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    correction.double()
    actual = recipes["tabr"](query, key, label_embedding, correction, 6)
    rows = []
    for row in query:
        similarity = -(row - key).square().sum(-1)
        best = similarity.topk(6).indices
        value = label_embedding[best] + correction(row - key[best])
        rows.append(torch.softmax(similarity[best], 0) @ value)
    compare(actual, torch.stack(rows), query, key, label_embedding, *correction.parameters())


@pytest.mark.parametrize("kernel", ["laplacian", "cosine"])
def test_nadaraya_watson_head(recipes, kernel):
    feature, support, label = random(4, 5), random(10, 5), torch.arange(10) % 3
    bandwidth = torch.tensor(0.8, **DOUBLE, requires_grad=True)
    actual, log_mass = recipes["nadaraya_watson_head"](
        feature, support, label, 3, bandwidth, kernel
    )
    if kernel == "cosine":
        similarity = F.cosine_similarity(feature[:, None], support, dim=-1) / bandwidth**2
    else:
        similarity = -torch.linalg.vector_norm(feature[:, None] - support, dim=-1) / bandwidth
    expected = torch.softmax(similarity, -1) @ F.one_hot(label, 3).double()
    compare(actual, expected, feature, support, bandwidth)
    torch.testing.assert_close(log_mass, similarity.logsumexp(-1))


def test_mixture_of_gaussian_keys(recipes):
    query, keys, value = random(2, 3, 4, 5), random(2, 2, 3, 6, 5), random(2, 3, 6, 4)
    log_prior = torch.log_softmax(torch.randn(2, 3, 1, 6, **DOUBLE), 0).requires_grad_()
    width = (torch.rand(2, 3, **DOUBLE) + 0.5).requires_grad_()
    actual = recipes["mixture_of_gaussian_keys"](query, keys, value, log_prior, width)
    distance = (query[..., None, :] - keys[:, :, :, None]).square().sum(-1)
    density = log_prior.exp()[:, None] * torch.exp(
        -distance / (2 * width.square()[:, None, :, None, None])
    )
    weights = density.sum(0) / density.sum((0, -1))[..., None]
    compare(actual, weights @ value, query, keys, value, log_prior, width)


def test_elliptical_attention(recipes):
    query, key, value, previous = (random(2, 3, 6, 4) for _ in range(4))
    actual = recipes["elliptical_attention"](query, key, value, previous)
    moved = (value - previous).detach().abs().transpose(1, 2).flatten(0, 1).mean(0)
    relevance = moved / moved.max(-1, keepdim=True).values
    scores = torch.einsum("bhld,hd,bhsd->bhls", query, relevance, key) / math.sqrt(4)
    compare(actual, torch.softmax(scores, -1) @ value, query, key, value)


def test_gaussian_kernel_attention(recipes):
    query, key, value = random(2, 3, 6, 4), random(2, 3, 7, 4), random(2, 3, 7, 5)
    actual = recipes["gaussian_kernel_attention"](query, key, value)
    distance = (query[..., None, :] - key[..., None, :, :]).square().sum(-1)
    expected = torch.exp(-distance / (2 * math.sqrt(4))) @ value
    compare(actual, expected, query, key, value)


def test_hopfield_retrieval(recipes):
    patterns, beta = random(8, 16), 2.0
    state = (patterns + 0.5 * torch.randn(8, 16, **DOUBLE)).detach().requires_grad_()
    expected = state
    for _ in range(3):
        expected = (patterns.T @ torch.softmax(beta * patterns @ expected.T, 0)).T
    compare(recipes["hopfield_retrieval"](state, patterns, beta, 3), expected, state, patterns)
