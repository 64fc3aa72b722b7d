"""Heads as an ensemble of kernel regressions, and the single kernels they are compared with."""

import mixhead
import torch
from data import Regression
from torch import Tensor, nn
from tqdm import tqdm


class KernelEnsemble(nn.Module):
    """Nadaraya-Watson regressions as heads: each sees the inputs through its own projection and
    compares them by its own kernel. Their mean is the prediction.

    Args:
        inputs: training inputs ``(n, E)``.
        targets: training targets ``(n,)``, the values that all heads share.
        kernels: the kernel of each head.
        channels: of each head's projection.
        seed: of the projections' initial values.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, kernels: list[str], channels: int, seed: int
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.register_buffer("inputs", inputs)
        self.register_buffer("targets", targets)
        # The bandwidth is 1, in the units of the projection.
        self.register_buffer("bandwidth", torch.ones((), dtype=inputs.dtype))
        generator = torch.Generator().manual_seed(seed)
        shape = (len(kernels), inputs.size(1), channels)
        random = torch.randn(shape, generator=generator, dtype=inputs.dtype)
        self.projection = nn.Parameter(random / inputs.size(1) ** 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """Each head's prediction ``(H, N)`` for inputs ``(N, E)``."""
        return self.smooth(inputs, False)

    @torch.jit.export
    def smooth(self, inputs: Tensor, leave_one_out: bool) -> Tensor:
        """`forward`; with ``leave_one_out`` of the training inputs, each without itself."""
        output = mixhead.kernel_attention(
            inputs @ self.projection,
            self.inputs @ self.projection,
            self.targets.unsqueeze(-1).expand(len(self.kernels), -1, 1),
            self.bandwidth,
            self.kernels,
            exclude_self=leave_one_out,
            empty="nearest",
        )
        return output.squeeze(-1)

    @torch.jit.export
    def predict(self, inputs: Tensor) -> Tensor:
        """The ensemble's prediction ``(N,)``."""
        return self.forward(inputs).mean(0)


def learn(model: KernelEnsemble, args, name: str) -> KernelEnsemble:
    """Learns the projections by leave-one-out error: half of it the ensemble's, half the heads'
    own, so that heads differ and are good alone; the penalty keeps the kernels wide."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    progress = tqdm(range(args.steps), desc=name, unit="step", mininterval=0.5)
    for _ in progress:
        heads = model.smooth(model.inputs, True)
        together = (heads.mean(0) - model.targets).square().mean()
        alone = (heads - model.targets).square().mean()
        size = model.projection.square().sum() / len(heads)
        optimizer.zero_grad()
        ((together + alone) / 2 + args.penalty * size).backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(leave_one_out=f"{together.item():.3f}", refresh=False)
    return model.requires_grad_(False)


SINGLE_KERNELS = (
    "gaussian", "laplacian", "matern32", "matern52", "cauchy", "epanechnikov", "tricube",
)  # fmt: skip


def single(data: Regression, inputs: Tensor, bandwidth: Tensor, kernel: str, out: bool) -> Tensor:
    """Predictions (H, N) of single kernels with H bandwidths, (H,) or (H, E)."""
    points, targets = data.inputs.unsqueeze(0), data.targets.view(1, -1, 1)
    queries = inputs.expand(len(bandwidth), -1, -1)
    return mixhead.kernel_attention(
        queries, points, targets, bandwidth, kernel,
        exclude_self=out, empty="nearest", enable_gqa=True,
    ).squeeze(-1)  # fmt: skip


def best_single_kernel(data: Regression, candidates: int) -> tuple[str, Tensor]:
    """The kernel and bandwidth (1,) of least leave-one-out error; a head for each bandwidth."""

    def errors(kernel: str, bandwidth: Tensor) -> Tensor:
        predictions = single(data, data.inputs, bandwidth, kernel, True)
        return (predictions - data.targets).square().mean(1)

    found = []
    for kernel in SINGLE_KERNELS:
        grid = torch.logspace(-0.7, 1.3, candidates, dtype=torch.float64)
        for _ in range(2):  # the second grid lies between the neighbours of the first's best
            best = int(errors(kernel, grid).argmin().clamp(1, candidates - 2))
            ends = grid[best - 1].log10(), grid[best + 1].log10()
            grid = torch.logspace(*map(float, ends), candidates, dtype=torch.float64)
        error, best = errors(kernel, grid).min(0)
        found.append((float(error), kernel, grid[best : best + 1]))
    return min(found)[1:]


def ard_kernel(data: Regression, kernel: str, bandwidth: Tensor, args) -> Tensor:
    """A bandwidth for each input (1, E), by gradient of the leave-one-out error from `bandwidth`
    (automatic relevance determination)."""
    log_bandwidth = bandwidth.log().unsqueeze(1).repeat(1, data.inputs.size(1)).requires_grad_()
    optimizer = torch.optim.Adam([log_bandwidth], 2 * args.lr)
    for _ in tqdm(range(args.steps), desc=f"{data.name}, one kernel", unit="step", mininterval=0.5):
        prediction = single(data, data.inputs, log_bandwidth.exp(), kernel, True)
        optimizer.zero_grad()
        (prediction - data.targets).square().mean().backward()
        optimizer.step()
    return log_bandwidth.detach().exp()


def ambiguity(heads: Tensor) -> Tensor:
    """How far the heads (H, N) are from their mean, squared, averaged over the heads: (N,)."""
    return (heads - heads.mean(0)).square().mean(0)


def identity_error(heads: Tensor, targets: Tensor) -> float:
    """How far the ambiguity decomposition is from exact: the ensemble's squared error is the heads'
    average one minus the ambiguity (Krogh & Vedelsby, "Neural network ensembles, cross validation,
    and active learning", 1995)."""
    ensemble = (heads.mean(0) - targets).square()
    average = (heads - targets).square().mean(0)
    return float((average - ambiguity(heads) - ensemble).abs().max())


def gain(heads: Tensor, targets: Tensor) -> float:
    """The share of the heads' average squared error that averaging them takes away."""
    average = (heads - targets).square().mean()
    return float(1 - (heads.mean(0) - targets).square().mean() / average)


@torch.no_grad()
def diversity_and_gain(data: Regression, args, heads: int) -> list[tuple[float, float]]:
    """For each random set of projections: the ambiguity of the heads' leave-one-out predictions in
    training, which looks at no test point, and the gain on the test part."""
    pairs = []
    for number in tqdm(range(args.sets), desc=f"{data.name}, random sets", mininterval=0.5):
        seed = args.seed * 10_000 + number
        model = KernelEnsemble(
            data.inputs, data.targets, heads * ["gaussian"], args.random_channels, seed
        )
        model.projection *= (data.inputs.size(1) / args.random_channels) ** 0.5
        diversity = float(ambiguity(model.smooth(model.inputs, True)).mean())
        pairs.append((diversity, gain(model(data.test_inputs), data.test_targets)))
    return pairs
