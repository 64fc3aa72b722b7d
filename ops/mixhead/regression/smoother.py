"""A smoother: training points, and what the operators make of them at any bandwidth."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixhead.functional import kernel_attention, local_linear_attention


class Fit(NamedTuple):
    """At each of ``L`` queries; ``leverage`` is the weight of one unit of data put at the query."""

    mean: Tensor  # (L, T)
    leverage: Tensor  # (L,)
    log_mass: Tensor  # (L,), -inf where the window holds no point
    slope: Tensor | None  # (L, D, T), of degree 1


class Sample(NamedTuple):
    """Some of the points, from which a criterion is estimated."""

    rows: Tensor  # (M,)
    mask: Tensor  # (M, N): the log-weights of all points where one unit of each row is left out


@dataclass
class Smoother:
    """Training data, all float64, and the kernel that smooths it.

    ``points (N, D)``, ``values (N, T)``, ``weights (N,)`` or None for ones. A weight counts
    observations: weight 2 is the row twice. A bandwidth is ``(D,)``, or ``(1,)`` for ``cosine``.
    """

    points: Tensor
    values: Tensor
    weights: Tensor | None
    kernel: str
    degree: int

    @property
    def total_weight(self) -> float:
        return len(self.points) if self.weights is None else float(self.weights.sum())

    def sample(self, rows: Tensor) -> Sample:
        here = torch.arange(len(rows))
        if self.weights is None:
            mask = torch.ones(len(rows), len(self.points), dtype=torch.bool)
            mask[here, rows] = False
        else:
            mask = self.weights.log().repeat(len(rows), 1)
            mask[here, rows] = (self.weights[rows] - 1.0).clamp(min=0.0).log()
        return Sample(rows, mask)

    def values_of(self, sample: Sample | None) -> Tensor:
        return self.values if sample is None else self.values[sample.rows]

    def mean_of(self, each: Tensor, sample: Sample | None = None) -> Tensor:
        """The weighted mean of ``(N, T)`` over the points, or of ``(M, T)`` over a sample."""
        if self.weights is None:
            return each.mean(0)
        weights = self.weights if sample is None else self.weights[sample.rows]
        return weights @ each / weights.sum()

    def at(self, query: Tensor, bandwidth: Tensor) -> Fit:
        """The fit at ``query (L, D)``."""
        return self._apply(query[None], self.points[None], self.values[None], bandwidth)

    def at_points(self, bandwidth: Tensor, sample: Sample | None = None) -> tuple[Tensor, Tensor]:
        """Fitted values ``(N, T)`` and the weight ``(N,)`` of an observation in its own.

        Summed over the observations these weights are the trace of the hat matrix. Both may be of
        a sample alone.
        """
        fit = self.at(self.points if sample is None else self.points[sample.rows], bandwidth)
        return fit.mean, fit.leverage

    def left_out(self, bandwidth: Tensor, sample: Sample | None = None) -> Tensor:
        """What the fit without an observation says of it: ``(N, T)``, or ``(M, T)`` of a sample.

        One unit of weight is left out, or all of it where there is less. A point that leaves an
        empty window behind is predicted by the mean of the others.
        """
        every, values = self.points[None], self.values[None]
        if sample is None:
            fit = self._apply(every, every, values, bandwidth, exclude_self=True)
        else:
            query = every[:, sample.rows]
            fit = self._apply(query, every, values, bandwidth, mask=sample.mask)
        unit = 1.0 if self.weights is None else self.weights.clamp(max=1.0).unsqueeze(-1)
        total = self.total_weight
        others = (total * self.mean_of(self.values) - unit * self.values) / (total - unit)
        others = others if sample is None else others[sample.rows]
        predicted = torch.where(fit.log_mass.isneginf().unsqueeze(-1), others, fit.mean)
        if sample is not None or self.weights is None:
            return predicted
        # The rest of a point of more than one unit still takes part. With l its weight in its own
        # fit m, a linear smoother of weights that sum to 1 is (m - l y) / (1 - l) without a unit.
        heavy = (self.weights > 1.0).nonzero().squeeze(-1)
        fit = self.at(self.points[heavy], bandwidth)
        own = fit.leverage.unsqueeze(-1)
        rest = (fit.mean - own * self.values[heavy]) / (1.0 - own)
        return predicted.index_copy(0, heavy, rest)

    def equivalent_kernel(self, query: Tensor, bandwidth: Tensor) -> Tensor:
        """The weights ``(L, N)`` with which each prediction adds up the values.

        The prediction is linear in the values, so its weights are its gradient in them: with the
        queries as a batch, each with values of its own, one backward pass gives all.
        """
        with torch.enable_grad():
            rows, keys = len(query), len(self.points)
            values = torch.zeros(rows, 1, keys, 1, dtype=torch.float64, requires_grad=True)
            points = self.points.expand(rows, 1, -1, -1)
            mean = self._apply(query[:, None, None], points, values, bandwidth).mean
            return torch.autograd.grad(mean.sum(), values)[0].view(rows, keys)

    def _apply(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bandwidth: Tensor,
        exclude_self: bool = False,
        mask: Tensor | None = None,
    ) -> Fit:
        bandwidth = bandwidth if self.kernel == "cosine" else bandwidth.unsqueeze(0)
        if mask is None and self.weights is not None:
            mask = self.weights.log()
        options = {"attn_mask": mask, "exclude_self": exclude_self}
        if self.degree == 1:
            mean, slope, leverage, log_mass = local_linear_attention(
                query, key, value, bandwidth, self.kernel, **options
            )
            return Fit(mean.squeeze(0), leverage.squeeze(0), log_mass.squeeze(0), slope.squeeze(0))
        mean, log_mass = kernel_attention(
            query, key, value, bandwidth, self.kernel, return_mass=True, **options
        )
        leverage = (self._log_kernel_at_zero(query, bandwidth) - log_mass).exp()
        return Fit(mean.squeeze(0), leverage.squeeze(0), log_mass.squeeze(0), None)

    def _log_kernel_at_zero(self, query: Tensor, bandwidth: Tensor) -> Tensor:
        """log K(q, q), which is 0 for every kernel of a distance."""
        if self.kernel == "dot":
            return (query / bandwidth).square().sum(-1)
        if self.kernel == "cosine":
            return query.ne(0).any(-1) / bandwidth.square()
        return query.new_zeros(())
