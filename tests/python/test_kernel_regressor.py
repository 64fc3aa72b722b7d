"""KernelRegressor against published fits, statsmodels, and dense regressions in NumPy."""

import pickle
import subprocess
import sys
import warnings

import mixhead
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from regression_data import dataset, noisy
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from statsmodels.nonparametric.kernel_regression import KernelReg

KernelRegressor = mixhead.KernelRegressor
KERNELS = {
    "dot": lambda q, k, u: np.exp((q * k).sum(-1)),
    "cosine": None,
    "gaussian": lambda q, k, u: np.exp(-(u**2) / 2),
    "laplacian": lambda q, k, u: np.exp(-u),
    "matern32": lambda q, k, u: (1 + 3**0.5 * u) * np.exp(-(3**0.5) * u),
    "matern52": lambda q, k, u: (1 + 5**0.5 * u + 5 * u**2 / 3) * np.exp(-(5**0.5) * u),
    "cauchy": lambda q, k, u: 1 / (1 + u**2),
    "epanechnikov": lambda q, k, u: np.maximum(0, 1 - u**2),
    "tricube": lambda q, k, u: np.maximum(0, 1 - u**3) ** 3,
    "boxcar": lambda q, k, u: (u <= 1) * 1.0,
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_degree = pytest.mark.parametrize("degree", [0, 1])


def kernel_matrix(kernel, query, points, bandwidth):
    if kernel == "cosine":
        unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (query, points)]
        return np.exp(unit[0] @ unit[1].T / bandwidth**2)
    q, k = (query / bandwidth)[:, None], (points / bandwidth)[None]
    return KERNELS[kernel](q, k, np.linalg.norm(q - k, axis=-1))


def hat_matrix(kernel, degree, query, points, bandwidth, weights=1.0):
    """(mean weights (L, n), slope weights (L, d, n)) by dense least squares in NumPy."""
    kernels = kernel_matrix(kernel, query, points, bandwidth) * weights
    if degree == 0:
        return kernels / kernels.sum(1, keepdims=True), None
    rows = []
    for here, row in zip(query, kernels, strict=True):
        design = np.column_stack([np.ones(len(points)), points - here])
        root = np.sqrt(row)[:, None]
        rows.append(np.linalg.pinv(design * root) * root.T)
    rows = np.stack(rows)
    return rows[:, 0], rows[:, 1:]


class TestPublishedFits:
    """mcycle and faithful, as R's np and an independent minimisation have them."""

    @pytest.mark.parametrize(
        ("data", "degree", "bandwidth", "loo", "trace"),
        [
            ("mcycle", 0, 0.913829, 595.93634, 23.41280),
            ("mcycle", 1, 1.475794, 561.33945, 16.60957),
            ("faithful", 0, 0.261407, 32.29606, 4.95245),
            ("faithful", 1, 0.441921, 32.37307, None),
        ],
    )
    def test_leave_one_out(self, data, degree, bandwidth, loo, trace):
        X, y = dataset(data)
        found = KernelRegressor(degree=degree).fit(X, y)
        assert found.bandwidth_ == pytest.approx([bandwidth], abs=2e-5)
        assert found.loo_error_ == pytest.approx(loo, abs=6e-6)
        fixed = KernelRegressor(bandwidth=bandwidth, degree=degree).fit(X, y)
        assert fixed.loo_error_ == pytest.approx(loo, abs=6e-6)
        if trace:
            assert fixed.effective_dof_ == pytest.approx(trace, abs=2e-5)

    @pytest.mark.parametrize(
        ("data", "degree", "bandwidth"), [("mcycle", 1, 1.644501), ("faithful", 0, 0.241225)]
    )
    def test_aicc(self, data, degree, bandwidth):
        X, y = dataset(data)
        found = KernelRegressor(bandwidth="aicc", degree=degree).fit(X, y)
        assert found.bandwidth_ == pytest.approx([bandwidth], abs=2e-5)


@pytest.mark.filterwarnings("ignore:After 0.17:FutureWarning")  # of its random numbers, not used
class TestStatsmodels:
    @pytest.mark.parametrize(("regression", "degree"), [("lc", 0), ("ll", 1)])
    @pytest.mark.parametrize(("data", "bandwidth"), [("mcycle", 1.5), ("faithful", 0.3)])
    def test_fixed_bandwidth(self, data, bandwidth, regression, degree):
        X, y = dataset(data)
        model = KernelReg(y, X, "c", reg_type=regression, bw=[bandwidth])
        ours = KernelRegressor(bandwidth=bandwidth, degree=degree).fit(X, y)
        grid = np.linspace(X.min(), X.max(), 50)[:, None]
        mean, slope = ours.predict(grid, return_slope=True)
        expected_mean, expected_slope = model.fit(grid)
        scale = y.std()
        np.testing.assert_allclose(mean / scale, expected_mean / scale, atol=1e-12, rtol=0)
        if degree == 1:
            np.testing.assert_allclose(slope / scale, expected_slope / scale, atol=1e-12, rtol=0)
        assert ours.loo_error_ == pytest.approx(
            float(np.squeeze(model.cv_loo(np.array([bandwidth]), model.est[regression]))), rel=1e-12
        )
        if degree == 0:  # for ll statsmodels takes the trace of lc
            expected = np.squeeze(model.aic_hurvich(np.array([bandwidth])))
            assert ours.aicc_ == pytest.approx(float(expected), rel=1e-12)

    def test_two_columns(self):
        X, y = noisy()
        model = KernelReg(y, X, "cc", reg_type="ll", bw=[0.7, 1.1])
        mean, slope = (
            KernelRegressor(bandwidth=[0.7, 1.1], degree=1)
            .fit(X, y)
            .predict(X[:9], return_slope=True)
        )
        expected_mean, expected_slope = model.fit(X[:9])
        np.testing.assert_allclose(mean, expected_mean, atol=1e-12)
        np.testing.assert_allclose(slope, expected_slope, atol=1e-12)


class TestDenseReference:
    """Every kernel against hat matrices made in NumPy."""

    @each_degree
    @each_kernel
    def test_fit(self, kernel, degree):
        X, y = noisy(targets=2)
        bandwidth = np.array([1.5]) if kernel == "cosine" else np.array([1.5, 2.0])
        query = noisy(15, seed=1)[0] * 0.9
        fit = KernelRegressor(kernel, bandwidth, degree).fit(X, y)
        mean, std, slope = fit.predict(query, return_std=True, return_slope=True)

        weights, slopes = hat_matrix(kernel, degree, query, X, bandwidth)
        hat, _ = hat_matrix(kernel, degree, X, X, bandwidth)
        residual = y - hat @ y
        variance = (residual**2).sum(0) / (len(y) - np.trace(hat))
        np.testing.assert_allclose(mean, weights @ y, atol=1e-11)
        np.testing.assert_allclose(
            std, np.sqrt((weights**2).sum(1))[:, None] * np.sqrt(variance), rtol=1e-10
        )
        assert fit.effective_dof_ == pytest.approx(np.trace(hat), rel=1e-11)
        np.testing.assert_allclose(fit.residual_variance_, variance, rtol=1e-11)
        if degree == 1:
            np.testing.assert_allclose(slope, slopes @ y, atol=1e-10)
            return
        step = 1e-6 * np.eye(2)
        difference = [(fit.predict(query + row) - fit.predict(query - row)) / 2e-6 for row in step]
        np.testing.assert_allclose(slope, np.stack(difference, 1), atol=2e-7)

    @each_degree
    @each_kernel
    def test_leave_one_out_is_a_fit_without_the_point(self, kernel, degree):
        X, y = noisy(25)
        bandwidth = 2.5  # no window without a point in it
        errors = []
        for i in range(len(y)):
            others = np.arange(len(y)) != i
            weights, _ = hat_matrix(kernel, degree, X[[i]], X[others], np.array([bandwidth]))
            errors.append(y[i] - weights[0] @ y[others])
        fit = KernelRegressor(kernel, bandwidth, degree).fit(X, y)
        assert fit.loo_error_ == pytest.approx(np.mean(np.square(errors)), rel=1e-10)

    @each_degree
    def test_aicc_and_r_squared(self, degree):
        X, y = noisy()
        fit = KernelRegressor(bandwidth=0.8, degree=degree).fit(X, y)
        hat, _ = hat_matrix("gaussian", degree, X, X, 0.8)
        n, trace, fitted = len(y), np.trace(hat), hat @ y
        expected = np.log(np.mean((y - fitted) ** 2)) + 1 + 2 * (trace + 1) / (n - trace - 2)
        assert fit.aicc_ == pytest.approx(expected, rel=1e-11)
        deviation, explained = y - y.mean(), fitted - y.mean()
        assert fit.r_squared_ == pytest.approx(
            (deviation @ explained) ** 2 / (deviation @ deviation) / (explained @ explained)
        )
        assert fit.score(X, y) == pytest.approx(1 - np.mean((y - fitted) ** 2) / y.var())


class TestChoice:
    @pytest.mark.parametrize("kernel", ["laplacian", "cauchy", "epanechnikov", "boxcar"])
    @pytest.mark.parametrize("criterion", ["loo", "aicc"])
    def test_no_bandwidth_of_a_fine_grid_is_better(self, kernel, criterion):
        X, y = dataset("mcycle")
        found = KernelRegressor(kernel, criterion).fit(X, y)

        def value(bandwidth):
            hat, _ = hat_matrix(kernel, 0, X, X, bandwidth)
            own = np.diag(hat)
            if criterion == "aicc":
                rest = len(y) - own.sum() - 2
                error = np.log(np.mean((y - hat @ y) ** 2))
                return error + 1 + 2 * (own.sum() + 1) / rest if rest > 0 else np.inf
            alone = own > 1 - 1e-9
            left_out = (hat @ y - own * y) / np.where(alone, 1, 1 - own)
            others = (y.sum() - y) / (len(y) - 1)
            return np.mean((y - np.where(alone, others, left_out)) ** 2)

        mine = value(found.bandwidth_)
        assert mine == pytest.approx(found.aicc_ if criterion == "aicc" else found.loo_error_)
        assert mine <= min(value(h) for h in np.geomspace(0.3, 30, 120)) + 1e-9

    def test_a_bandwidth_for_each_column(self):
        X, y = noisy(80)
        noise = np.random.default_rng(5).normal(size=(80, 1))
        found = KernelRegressor().fit(np.hstack([X, noise]), y).bandwidth_
        assert found.shape == (3,)
        assert found[2] > 10 * found[0]

    def test_matches_a_minimum_found_without_gradients(self):
        X, y = noisy(60)
        found = KernelRegressor().fit(X, y)

        def loo(log_bandwidth):
            hat, _ = hat_matrix("gaussian", 0, X, X, np.exp(log_bandwidth))
            return np.mean(((y - hat @ y) / (1 - np.diag(hat))) ** 2)

        best = scipy.optimize.minimize(
            loo, np.log(found.bandwidth_), method="Nelder-Mead", options={"xatol": 1e-7}
        )
        np.testing.assert_allclose(found.bandwidth_, np.exp(best.x), rtol=1e-3)
        assert found.loo_error_ <= best.fun * (1 + 1e-9)

    def test_silverman_is_scipys(self):
        X, y = noisy(60, d=1)
        factor = scipy.stats.gaussian_kde(X[:, 0], bw_method="silverman").factor
        found = KernelRegressor(bandwidth="silverman").fit(X, y).bandwidth_
        np.testing.assert_allclose(found, [factor * X.std(ddof=1)], rtol=1e-12)

    def test_units_of_targets_do_not_matter(self):
        X, y = noisy(targets=3)
        found = KernelRegressor().fit(X, y).bandwidth_
        scaled = KernelRegressor().fit(X, y * [1.0, 1e4, 1e-3] + [0, 5, 0]).bandwidth_
        np.testing.assert_allclose(scaled, found, rtol=1e-4)

    def test_many_points_are_searched_as_well(self):
        X, y = noisy(1500, d=1)
        found = KernelRegressor().fit(X, y)
        best = scipy.optimize.minimize_scalar(
            lambda h: KernelRegressor(bandwidth=h).fit(X, y).loo_error_,
            bounds=(0.5 * found.bandwidth_[0], 2 * found.bandwidth_[0]),
            method="bounded",
        )
        assert found.loo_error_ <= best.fun * (1 + 1e-6)

    def test_verbose_shows_progress(self, capsys):
        X, y = noisy(20)
        KernelRegressor(verbose=True).fit(X, y)
        assert "bandwidth by loo" in capsys.readouterr().err


class TestSampleWeight:
    @each_degree
    def test_weights_are_repetitions(self, degree):
        X, y = noisy(30, targets=2)
        counts = np.random.default_rng(2).integers(0, 4, 30)
        weighted = KernelRegressor(bandwidth=0.9, degree=degree).fit(X, y, sample_weight=counts)
        repeated = KernelRegressor(bandwidth=0.9, degree=degree).fit(
            X.repeat(counts, 0), y.repeat(counts, 0)
        )
        for name in ("loo_error_", "aicc_", "effective_dof_", "residual_variance_", "r_squared_"):
            np.testing.assert_allclose(getattr(weighted, name), getattr(repeated, name), rtol=1e-9)
        for mine, expected in zip(
            weighted.predict(X, return_std=True), repeated.predict(X, return_std=True), strict=True
        ):
            np.testing.assert_allclose(mine, expected, rtol=1e-9, atol=1e-12)

    @each_degree
    def test_fractions(self, degree):
        X, y = noisy(30)
        weights = np.random.default_rng(2).uniform(0.1, 1, 30)
        fit = KernelRegressor(bandwidth=0.9, degree=degree).fit(X, y, sample_weight=weights)
        hat, _ = hat_matrix("gaussian", degree, X, X, 0.9, weights)
        np.testing.assert_allclose(fit.predict(X), hat @ y, rtol=1e-9, atol=1e-12)
        left_out = (y - hat @ y) / (1 - np.diag(hat))
        assert fit.loo_error_ == pytest.approx(np.average(left_out**2, weights=weights))

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([-1.0, 1.0, 1.0], "sample_weight must not be negative, got -1"),
            ([0.0, 0.0, 0.0], "at least one non-zero"),
        ],
    )
    def test_bad(self, weights, message):
        with pytest.raises(ValueError, match=message):
            KernelRegressor(bandwidth=1.0).fit(np.eye(3), np.ones(3), weights)


class TestDegenerate:
    @each_degree
    def test_one_point(self, degree):
        fit = KernelRegressor(bandwidth=1.0, degree=degree).fit([[2.0]], [3.0])
        assert fit.predict([[2.0]]) == pytest.approx([3.0])
        assert fit.effective_dof_ == pytest.approx(1.0)
        assert np.isnan(fit.residual_variance_)
        assert np.isnan(fit.predict([[2.0]], return_std=True)[1]).all()
        assert np.isnan(fit.loo_error_)
        assert fit.aicc_ == np.inf

    @pytest.mark.parametrize("bandwidth", ["loo", "aicc", "silverman"])
    def test_one_point_has_no_choice(self, bandwidth):
        with pytest.raises(
            ValueError, match="at least 2 samples of positive weight, got n_samples=1"
        ):
            KernelRegressor(bandwidth=bandwidth).fit([[2.0]], [3.0])

    def test_too_few_for_aicc(self):
        with pytest.raises(ValueError, match="'aicc' finds no bandwidth"):
            KernelRegressor(bandwidth="aicc").fit([[1.0], [2.0], [3.0]], [1.0, 3.0, 2.0])

    @each_degree
    def test_duplicated_points(self, degree):
        X, y = np.repeat([[0.0], [1.0], [3.0]], 4, axis=0), np.arange(12.0) % 5
        fit = KernelRegressor(degree=degree).fit(X, y)
        assert np.isfinite(fit.predict(X)).all()
        narrow = KernelRegressor(bandwidth=1e-3, degree=degree).fit(X, y)
        means = y.reshape(3, 4).mean(1).repeat(4)
        np.testing.assert_allclose(narrow.predict(X), means, atol=1e-12)

    @each_degree
    @pytest.mark.parametrize("bandwidth", ["loo", "aicc", "silverman"])
    def test_constant_column_is_left_out(self, bandwidth, degree):
        X, y = noisy(30, d=1)
        both = np.hstack([X, np.full_like(X, 7.0)])
        alone = KernelRegressor(bandwidth=bandwidth, degree=degree).fit(X, y)
        fit = KernelRegressor(bandwidth=bandwidth, degree=degree).fit(both, y)
        np.testing.assert_array_equal(fit.bandwidth_, [alone.bandwidth_[0], np.inf])
        elsewhere = np.hstack([X, np.full_like(X, -1.0)])
        mean, slope = fit.predict(elsewhere, return_slope=True)
        np.testing.assert_array_equal(mean, alone.predict(X))
        assert (slope[:, 1] == 0).all()

    def test_nothing_varies(self):
        fit = KernelRegressor().fit(np.ones((5, 2)), np.arange(5.0))
        assert (fit.bandwidth_ == np.inf).all()
        assert fit.predict([[1.0, 1.0], [8.0, 9.0]]) == pytest.approx([2.0, 2.0])
        assert fit.effective_dof_ == pytest.approx(1.0)

    @pytest.mark.parametrize("bandwidth", ["loo", "aicc"])
    def test_constant_target(self, bandwidth):
        X, _ = noisy(20)
        fit = KernelRegressor(bandwidth=bandwidth).fit(X, np.full(20, 4.0))
        silverman = KernelRegressor(bandwidth="silverman").fit(X, np.full(20, 4.0))
        np.testing.assert_allclose(fit.bandwidth_, silverman.bandwidth_, rtol=1e-12)
        assert fit.predict(X) == pytest.approx(np.full(20, 4.0))

    @each_degree
    @pytest.mark.parametrize("kernel", ["epanechnikov", "tricube", "boxcar"])
    @pytest.mark.parametrize("empty", ["nan", "zero", "nearest"])
    def test_empty_window(self, kernel, empty, degree):
        X, y = np.array([[0.0], [0.4], [1.0], [1.3]]), np.array([1.0, 2.0, 3.0, 5.0])
        fit = KernelRegressor(kernel, 0.5, degree, empty).fit(X, y)
        mean, std, slope = fit.predict([[0.1], [9.0]], return_std=True, return_slope=True)
        expected = {"nan": np.nan, "zero": 0.0, "nearest": 5.0}[empty]
        np.testing.assert_equal(mean[1], expected)
        assert np.isfinite(mean[0])
        assert np.isnan([std[1], slope[1, 0]]).all()

    @pytest.mark.parametrize(
        "bandwidth",
        [0, 0.0, -1.0, np.nan, [1.0, -1.0], [1.0, np.nan], [1.0], [1.0] * 3, "wide", {}],
    )
    def test_bad_bandwidth(self, bandwidth):
        with pytest.raises(ValueError, match="KernelRegressor: bandwidth must be a"):
            KernelRegressor(bandwidth=bandwidth).fit(*noisy(10))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"kernel": "biweight"}, "kernel must be one of dot, .*, got 'biweight'"),
            ({"degree": 2}, "degree must be 0 or 1, got 2"),
            ({"empty": "mean"}, "empty must be nan, zero or nearest, got 'mean'"),
            ({"n_restarts": -1}, "n_restarts must be a whole number, 0 or more, got -1"),
            ({"kernel": "cosine", "bandwidth": "silverman"}, "no unit of length; got 'silverman'"),
        ],
    )
    def test_bad_argument(self, arguments, message):
        with pytest.raises(ValueError, match=f"KernelRegressor: .*{message}"):
            KernelRegressor(**arguments).fit(*noisy(10))


@parametrize_with_checks([KernelRegressor(), KernelRegressor(bandwidth=2.0, degree=1)])
def test_scikit_learn(estimator, check):
    check(estimator)


def test_every_choice_passes_scikit_learns_weight_check():
    from sklearn.utils.estimator_checks import check_sample_weight_equivalence_on_dense_data

    for bandwidth in ("loo", "aicc", "silverman"):
        check_sample_weight_equivalence_on_dense_data(
            "KernelRegressor", KernelRegressor(bandwidth=bandwidth)
        )


def test_refit_forgets_the_first_fit():
    X, y = noisy(20)
    fit = KernelRegressor(bandwidth=0.5).fit(X, y)
    before = fit.effective_dof_
    fit.set_params(bandwidth=2.0).fit(X, y)
    assert fit.effective_dof_ < before / 2


def test_pickle_and_clone():
    X, y = noisy(20)
    fit = KernelRegressor(degree=1, bandwidth="silverman").fit(X, y)
    again = pickle.loads(pickle.dumps(fit))
    np.testing.assert_array_equal(again.predict(X), fit.predict(X))
    assert clone(fit).get_params() == fit.get_params()


def test_later_changes_of_the_data_do_not_matter():
    X, y = noisy(20)
    fit = KernelRegressor(bandwidth=0.5).fit(X, y)
    before = fit.predict(X[:5].copy())
    query = X[:5].copy()
    X[:], y[:] = 0.0, 0.0
    np.testing.assert_array_equal(fit.predict(query), before)


class TestOptional:
    @staticmethod
    def run(code):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    def test_import_needs_neither_scikit_learn_nor_matplotlib(self):
        done = self.run(
            "import sys; sys.modules['sklearn'] = sys.modules['matplotlib'] = None\n"
            "import mixhead; assert 'KernelRegressor' in dir(mixhead)\nmixhead.KernelRegressor"
        )
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(
            "ImportError: mixhead.KernelRegressor needs 'scikit-learn>=1.6': pip"
        )


@pytest.mark.parametrize("kernel", ["gaussian", "tricube"])
def test_an_average_lies_among_its_targets(kernel):
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(300, 1))
    y = np.stack([(x[:, 0] > 0.5) * 1.0, np.full(300, 0.1)], 1)
    fitted = KernelRegressor(kernel=kernel, bandwidth=0.2).fit(x, y)
    predicted = fitted.predict(rng.uniform(size=(2000, 1)))
    assert (predicted <= y.max(0)).all()
    assert (predicted >= y.min(0)).all()
