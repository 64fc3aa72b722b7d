"""From a soft plan to a one-to-one matching."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mixhead._errors import shape_text


def assignment(plan: Tensor) -> Tensor:
    r"""The one-to-one matching that holds the most of a plan's mass.

    .. math::
        \max_\sigma \sum_i P_{i \sigma(i)}

    over matchings :math:`\sigma` of all rows, or of as many as there are columns, by SciPy's
    ``linear_sum_assignment`` (Crouse, "On implementing 2D rectangular assignment algorithms",
    2016). Any scores serve as a plan: with minus a cost it is the Hungarian solution.

    Args:
        plan: ``(..., L, S)``, finite.

    Returns:
        int64 ``(..., L)``: the column of each row, -1 for a row that stays without. Not
        differentiable.

    Raises:
        ValueError: the plan has fewer than two dimensions, or a number is not finite.

    Example:
        >>> mixhead.assignment(torch.tensor([[0.9, 0.1], [0.6, 0.4]]))
        tensor([0, 1])
    """
    if plan.dim() < 2:
        raise ValueError(f"assignment: plan must be (..., L, S), got {shape_text(plan)}")
    if not plan.isfinite().all():
        raise ValueError("assignment: plan must be finite, got inf or nan")
    rows, columns = plan.shape[-2:]
    matched = torch.full(plan.shape[:-1], -1, dtype=torch.int64)
    if plan.numel() > 0:
        scores = plan.detach().double().cpu().reshape(-1, rows, columns).numpy()
        for one, into in zip(scores, matched.view(-1, rows), strict=True):
            row, column = linear_sum_assignment(one, maximize=True)
            into[torch.from_numpy(row)] = torch.from_numpy(column)
    return matched.to(plan.device)
