"""Rounding a plan to a matching, and the layer that makes plans from several criteria."""

import itertools
import sys

import mixhead
import pytest
import torch
from compare import assert_same_bits


def best_by_trying_all(plan):
    rows, columns = plan.shape
    if rows > columns:
        inverse = best_by_trying_all(plan.T)
        matched = [-1] * rows
        for column, row in enumerate(inverse):
            matched[row] = column
        return matched
    choices = itertools.permutations(range(columns), rows)
    return list(max(choices, key=lambda chosen: sum(plan[i, j] for i, j in enumerate(chosen))))


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3), (1, 1)])
def test_assignment_is_the_best_of_all(shape):
    plan = torch.rand(2, 3, *shape)
    matched = mixhead.assignment(plan)
    assert matched.shape == (2, 3, shape[0])
    for index in itertools.product(range(2), range(3)):
        assert matched[index].tolist() == best_by_trying_all(plan[index])


def test_assignment_of_nothing():
    assert mixhead.assignment(torch.zeros(2, 0, 3)).shape == (2, 0)
    assert mixhead.assignment(torch.zeros(2, 3, 0)).tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (torch.zeros(3), r"\(\.\.\., L, S\), got \(3\)"),
        (torch.full((2, 2), torch.nan), "finite, got inf or nan"),
    ],
)
def test_assignment_raises(plan, message):
    with pytest.raises(ValueError, match=f"assignment: plan must be {message}"):
        mixhead.assignment(plan)


def test_assignment_says_what_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "mixhead.matching", raising=False)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"mixhead\.assignment needs scipy: pip install scipy"):
        mixhead.assignment  # noqa: B018


def dense_plan(scores, iterations):
    plan = scores.softmax(-1)
    for _ in range(iterations):
        plan = plan / plan.sum(-2, keepdim=True)
        plan = plan / plan.sum(-1, keepdim=True)
    return plan


@pytest.mark.parametrize("kernel", ["gaussian", "dot"])
@pytest.mark.parametrize("head_dim", [None, 3])
def test_soft_assignment_adds_up_its_criteria(kernel, head_dim):
    layer = mixhead.SoftAssignment([4, 2], head_dim, kernel=kernel, iterations=400).double()
    with torch.no_grad():
        layer.log_weight.copy_(torch.tensor([0.3, -0.8]))
    rows, columns = torch.randn(2, 3, 5, 6, dtype=torch.float64).unbind()
    scores = torch.zeros(3, 5, 5, dtype=torch.float64)
    for c, block in enumerate([slice(0, 4), slice(4, 6)]):
        query = layer.row_proj[c](rows[..., block])
        key = layer.column_proj[c](columns[..., block])
        each = query @ key.mT if kernel == "dot" else -torch.cdist(query, key).square() / 2
        scores = scores + layer.log_weight[c].exp() * each
    plan = dense_plan(scores, 500)
    torch.testing.assert_close(layer.log_plan(rows, columns).exp(), plan, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(rows, columns), plan @ columns, rtol=0, atol=1e-5)
    value = torch.randn(3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(rows, columns, value), plan @ value, rtol=0, atol=1e-5)


def test_soft_assignment_learns():
    """Every parameter gets a gradient, and a few steps bring the plan nearer to its target."""
    layer = mixhead.SoftAssignment([3, 2], 2, dustbin=True)
    rows = torch.randn(6, 5)
    target = torch.randperm(6)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    losses = []
    for _ in range(20):
        loss = -layer.log_plan(rows, rows[target].roll(1, -1))[torch.arange(6), target].mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("way", ["script", "compile", "export"])
def test_soft_assignment_every_way(way):
    layer = mixhead.SoftAssignment([3, 2], 2, dustbin=True, iterations=10)
    rows, columns = torch.randn(2, 4, 5), torch.randn(2, 3, 5)
    run = {
        "script": lambda: torch.jit.script(layer),
        "compile": lambda: torch.compile(layer, fullgraph=True, backend="aot_eager"),
        "export": lambda: torch.export.export(layer, (rows, columns)).module(),
    }[way]()
    assert_same_bits(run(rows, columns), layer(rows, columns))
    if way == "script":
        assert_same_bits(run.log_plan(rows, columns), layer.log_plan(rows, columns))


def test_soft_assignment_masses():
    layer = mixhead.SoftAssignment([2], iterations=300, tolerance=1e-9).double()
    rows, columns = torch.randn(4, 2).double(), torch.randn(3, 2).double()
    mass = torch.tensor([1.0, 2.0, 1.0]).double()
    plan = layer.log_plan(rows, columns, column_mass=mass).exp()
    torch.testing.assert_close(plan.sum(-2), mass, rtol=0, atol=1e-8)
    torch.testing.assert_close(plan.sum(-1), torch.ones(4).double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), r"criteria must be numbers of features, got \[\]"),
        (([2, 0],), r"criteria .*got \[2, 0\]"),
        (([2], 0), "head_dim must be positive, got 0"),
    ],
)
def test_soft_assignment_raises(arguments, message):
    with pytest.raises(ValueError, match=f"SoftAssignment: {message}"):
        mixhead.SoftAssignment(*arguments)


def test_soft_assignment_raises_at_wrong_features():
    layer = mixhead.SoftAssignment([3, 2])
    with pytest.raises(ValueError, match=r"SoftAssignment: rows must be \(B, L, 5\), got \(4, 6\)"):
        layer(torch.zeros(4, 6), torch.zeros(4, 5))
    with pytest.raises(
        ValueError, match=r"SoftAssignment: columns must be \(B, S, 5\), got \(1, 4, 5\)"
    ):
        layer(torch.zeros(4, 5), torch.zeros(1, 4, 5))
    with pytest.raises(
        ValueError, match='SoftAssignment: kernel must be "gaussian" or "dot", got "cauchy"'
    ):
        mixhead.SoftAssignment([3, 2], kernel="cauchy")
