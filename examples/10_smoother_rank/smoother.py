"""Attention heads as a smoother matrix: its softmax form, its linear part, and what it must fit."""

import mixhead
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

STEPS = 20  # of L-BFGS between two movements of the progress bar


class SmootherHeads(nn.Module):
    """Heads over fixed points that share their values: together they are one smoother matrix.

    Head h gives point i the query W_Q x_i and point j the key W_K x_j, both of `head_dim` channels;
    the heads are averaged. `inputs` (n, E) are the points.
    """

    def __init__(self, inputs: Tensor, heads: int, head_dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (heads, inputs.size(1), head_dim)
        scale = (inputs.square().sum(1).mean() * len(inputs)).rsqrt()
        draw = [torch.randn(shape, generator=generator, dtype=inputs.dtype) for _ in range(2)]
        self.register_buffer("inputs", inputs)
        self.register_buffer("gain", torch.tensor(float(heads * len(inputs)), dtype=inputs.dtype))
        self.query_weight = nn.Parameter(scale * draw[0])
        self.key_weight = nn.Parameter(scale * draw[1])

    def forward(self, values: Tensor, scale: float = 1.0) -> Tensor:
        """Softmax attention with scores ``scale * q.k``: values (n, C) smoothed, (n, C)."""
        return self.softmax(values, torch.tensor(scale, dtype=values.dtype))

    @torch.jit.export
    def softmax(self, values: Tensor, scale: Tensor) -> Tensor:
        """`forward` with a scale to differentiate by."""
        query = scale * (self.inputs @ self.query_weight)
        key = self.inputs @ self.key_weight
        shared = values.expand(key.size(0), -1, -1)
        one = torch.ones((), dtype=values.dtype)
        return mixhead.kernel_attention(query, key, shared, one, "dot").mean(0)

    @torch.jit.export
    def linearised(self, values: Tensor) -> Tensor:
        """The mean of the values, plus the derivative of `forward` by its scale, times ``gain``:
        ``1/n (1 1^T + gain/H sum_h q_h (k_h - mean k_h)^T)``. No n x n matrix is made."""
        return values.mean(0) + self.gain * self.slope(values)

    @torch.jit.export
    def slope(self, values: Tensor) -> Tensor:
        """The derivative of `forward` by its scale at 0, from its formula."""
        query = self.inputs @ self.query_weight
        key = self.inputs @ self.key_weight
        moments = (key - key.mean(1, keepdim=True)).transpose(1, 2) @ values / len(values)
        return (query @ moments).mean(0)


def derivative_at_zero(model: SmootherHeads) -> Tensor:
    """The n x n derivative of the softmax smoother by its scale at 0, taken of the operator itself
    (forward mode by two backward passes)."""
    identity = torch.eye(len(model.inputs), dtype=model.inputs.dtype)
    zero = torch.zeros((), dtype=identity.dtype)
    return torch.autograd.functional.jvp(
        lambda scale: model.softmax(identity, scale), zero, torch.ones_like(zero)
    )[1].detach()


@torch.no_grad()
def deviation(model: SmootherHeads, scale: float) -> Tensor:
    """The softmax smoother's n x n matrix minus the uniform one."""
    identity = torch.eye(len(model.inputs), dtype=model.inputs.dtype)
    return model(identity, scale) - 1 / len(identity)


def digits(points: int, seed: int) -> Tensor:
    """`points` of scikit-learn's digits (n, 64), pixels from 0 to 1, float64."""
    images = torch.tensor(load_digits().data, dtype=torch.float64) / 16
    return images[
        torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:points]
    ]


def gaussian_smoother(inputs: Tensor, bandwidth: float) -> Tensor:
    """The n x n matrix of Gaussian kernel regression; `bandwidth` in median distances."""
    width = bandwidth * torch.pdist(inputs).median()
    identity = torch.eye(len(inputs), dtype=inputs.dtype)
    points = inputs.unsqueeze(0)
    return mixhead.kernel_attention(points, points, identity.unsqueeze(0), width, "gaussian")[0]


def fit(model: SmootherHeads, target: Tensor, iterations: int, name: str) -> None:
    """Trains the heads' weights so that the linearised smoother is `target` (least squares)."""
    identity = torch.eye(len(target), dtype=target.dtype)
    parameters = [model.query_weight, model.key_weight]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=0.0, tolerance_change=0.0,
    )  # fmt: skip
    size = (target - 1 / len(target)).square().sum()

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = (model.linearised(identity) - target).square().sum() / size
        error.backward()
        return error

    with tqdm(total=iterations, desc=name, unit="step", mininterval=0.5) as progress:
        while progress.n < iterations:
            error = optimizer.step(loss).item()
            progress.set_postfix(error=f"{error:.6f}", refresh=False)
            progress.update(STEPS)
