"""What the search for a bandwidth is made of: criteria with gradients, and the descent."""

import numpy as np
import pytest
import scipy.optimize
import torch
from mixhead.regression import KernelRegressor, criteria
from mixhead.regression.descent import Descent
from mixhead.regression.smoother import Smoother


def smoother(columns, targets=1, weighted=False, n=40):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(n, columns, generator=generator, dtype=torch.float64) * 4 + 100
    values = torch.randn(n, targets, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.2 if weighted else None
    return Smoother(points, values, weights, "gaussian", 0)


def dense_criterion(name, data, bandwidth):
    """(T,) for one bandwidth (D,), with the whole hat matrix."""
    u = (data.points[:, None] - data.points[None]) / bandwidth
    weights = torch.ones(len(u), dtype=torch.float64) if data.weights is None else data.weights
    kernel = torch.exp(-0.5 * u.square().sum(-1)) * weights
    hat = kernel / kernel.sum(1, keepdim=True)
    own, fitted, share = hat.diagonal(), hat @ data.values, weights / weights.sum()
    if name == "loo":
        own = (own / weights * weights.clamp(max=1.0)).unsqueeze(-1)
        return share @ ((data.values - fitted) / (1 - own)).square()
    rest, trace = weights.sum(), (weights * own / weights).sum()
    return (
        (share @ (data.values - fitted).square()).log() + 1 + 2 * (trace + 1) / (rest - trace - 2)
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("name", ["loo", "aicc"])
def test_gradients_of_several_bandwidths_at_once(name, columns, targets, weighted):
    data = smoother(columns, targets, weighted)
    log_h = torch.linspace(-1.0, 0.7, 2 * columns, dtype=torch.float64).view(2, columns)
    log_h.requires_grad_()
    criterion = {"loo": criteria.loo_error, "aicc": criteria.aicc}[name]
    values = criterion(data, log_h.exp())
    expected = torch.stack([dense_criterion(name, data, row.exp()) for row in log_h])
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    along = torch.linspace(0.5, 2.0, values.numel(), dtype=torch.float64).view_as(values)
    mine, theirs = (torch.autograd.grad((v * along).sum(), log_h)[0] for v in (values, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_gradients_at_a_sample():
    data = smoother(2, weighted=True)
    log_h = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    u = (data.points[:3, None] - data.points[None, 3:]) / log_h.exp()
    kernel = torch.exp(-0.5 * u.square().sum(-1)) * data.weights[3:]
    fitted = (kernel @ data.values[3:]) / kernel.sum(1, keepdim=True)
    errors = data.weights[:3] @ (data.values[:3] - fitted).square() / data.weights[:3].sum()
    estimate = criteria.loo_error(data, log_h.exp(), 3)
    torch.testing.assert_close(estimate, errors)
    torch.testing.assert_close(
        *(torch.autograd.grad(value.sum(), log_h)[0] for value in (estimate, errors))
    )


def test_many_points_with_a_long_tail():
    """Lone points decide between two valleys: float32 has to see how near their neighbours are."""
    rng = np.random.default_rng(1)
    x = rng.exponential(1, (1500, 1))
    y = np.sin(8 / (x[:, 0] + 0.3)) + 0.3 * rng.normal(size=1500)
    found = KernelRegressor().fit(x, y).loo_error_
    others = (KernelRegressor(bandwidth=h).fit(x, y) for h in np.geomspace(0.002, 0.5, 60))
    assert found <= min(other.loo_error_ for other in others) * (1 + 1e-6)


def rosenbrock(place):
    return scipy.optimize.rosen(place), scipy.optimize.rosen_der(place)


class TestDescent:
    @staticmethod
    def objective(function, calls):
        def at(places):
            calls.append(len(places))
            values, gradients = zip(*(function(place) for place in places), strict=True)
            return np.array(values), np.array(gradients)

        return at

    @pytest.mark.parametrize("high", [[5.0, 5.0, 5.0], [5.0, 0.5, 5.0]], ids=["free", "bound"])
    def test_several_starts(self, high):
        low, high, calls = np.full(3, -3.0), np.array(high), []
        starts = [
            np.array(start) for start in ([-1.0, 0.4, 0.9], [2.0, 0.5, -1.0], [0.0, 0.0, 0.0])
        ]
        found = Descent(low, high, 1e-15).minima(self.objective(rosenbrock, calls), starts)
        for start, minimum in zip(starts, found, strict=True):
            peer = scipy.optimize.minimize(
                rosenbrock, start, jac=True, bounds=np.stack([low, high], -1), tol=1e-14
            )
            np.testing.assert_allclose(minimum.place, peer.x, atol=1e-5)
            assert minimum.value == pytest.approx(peer.fun, abs=1e-10)
        assert calls[0] == 3
        assert len(calls) < 100

    def test_inverse_hessian_of_a_parabola(self):
        hessian = np.array([[3.0, 1.0], [1.0, 0.5]])
        far = np.full(2, 9.0)

        def parabola(place):
            return place @ hessian @ place / 2, hessian @ place

        (found,) = Descent(-far, far, 1e-20).minima(
            self.objective(parabola, []), [np.array([1.0, -2.0])]
        )
        np.testing.assert_allclose(found.place, 0, atol=1e-8)
        np.testing.assert_allclose(found.inverse_hessian, np.linalg.inv(hessian), rtol=0.02)
        calls = []
        Descent(-far, far, 1e-12).minima(
            self.objective(parabola, calls), [np.array([0.3, -0.4])], np.linalg.inv(hessian)
        )
        assert len(calls) == 2  # Newton's step leads there

    def test_a_flat_hill_and_a_start_without_a_value(self):
        def bump(place):  # concave where it begins, and nothing below -4
            if place[0] < -4:
                return np.inf, np.zeros(1)
            return -np.exp(-0.5 * place[0] ** 2), place * np.exp(-0.5 * place[0] ** 2)

        found = Descent(np.array([-9.0]), np.array([9.0]), 1e-16).minima(
            self.objective(bump, []), [np.array([3.5]), np.array([-6.0])]
        )
        assert found[0].place == pytest.approx([0.0], abs=1e-6)
        assert found[1].value == np.inf
