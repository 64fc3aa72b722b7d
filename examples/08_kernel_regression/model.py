"""Regressions as modules: what KernelRegressor fits, in a form that scripts and learns."""

import math
from collections.abc import Collection

import mixhead
import torch
from torch import Tensor, nn


class KernelHead(nn.Module):
    """One attention head whose keys are the data points and whose values are their responses.

    Degree 0 is Nadaraya-Watson regression with a gaussian kernel, degree 1 local linear. The
    bandwidth is a parameter, kept positive by its logarithm.
    """

    points: Tensor
    values: Tensor

    def __init__(self, points: Tensor, values: Tensor, bandwidth: float, degree: int = 0) -> None:
        super().__init__()
        self.register_buffer("points", points)
        self.register_buffer("values", values)
        self.log_bandwidth = nn.Parameter(torch.tensor(math.log(bandwidth), dtype=points.dtype))
        self.degree = degree

    def forward(self, query: Tensor, exclude_self: bool = False) -> Tensor:
        """The regression (L, T) at query (L, D)."""
        query, key, value = query.unsqueeze(0), self.points.unsqueeze(0), self.values.unsqueeze(0)
        bandwidth = self.log_bandwidth.exp()
        if self.degree == 1:
            return mixhead.local_linear_attention(
                query, key, value, bandwidth, "gaussian", exclude_self=exclude_self
            )[0].squeeze(0)
        return mixhead.kernel_attention(
            query, key, value, bandwidth, "gaussian", exclude_self=exclude_self
        ).squeeze(0)


def learn_bandwidth(head: KernelHead, steps: Collection, lr: float) -> list[list[float]]:
    """Gradient descent on the leave-one-out error, the loss a head has; rows [h, loss].

    `exclude_self` keeps each point from reading its own answer, so h does not shrink to nothing.
    """
    optimizer = torch.optim.Adam(head.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps), eta_min=lr / 100)
    course = []
    for _ in steps:
        loss = (head(head.points, exclude_self=True) - head.values).square().mean()
        optimizer.zero_grad()
        loss.backward()
        course.append([float(head.log_bandwidth.detach().exp()), float(loss.detach())])
        optimizer.step()
        schedule.step()
    return course
