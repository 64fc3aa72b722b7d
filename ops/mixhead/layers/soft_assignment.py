"""Matching of rows to columns by several criteria with learned weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixhead._errors import shape_text
from mixhead.functional import matching_attention


class SoftAssignment(nn.Module):
    r"""A soft assignment of rows to columns: jobs to candidates, tracks to detections.

    Both sides are described by the same list of criteria, their features side by side. Each
    criterion is a head with a projection for rows and one for columns and a learned weight; the
    weighted sum of the heads' scores goes through :func:`mixhead.matching_attention`:

    .. math::
        \log P_{ij} = f_i + g_j + \sum_c w_c\, s(q_i^c, k_j^c), \qquad
        w_c = e^{\text{log\_weight}_c}

    with :math:`s = -\lVert q - k \rVert^2 / 2` for kernel ``"gaussian"`` and :math:`s = q \cdot k`
    for ``"dot"``. Every row of the plan sums to 1 and every column to ``L / S``; with a dustbin
    rows and columns may stay unmatched.

    Args:
        criteria: number of features of each criterion.
        head_dim: features of each criterion after its projections; None compares the features as
            they are, without projections.
        kernel: ``"gaussian"`` or ``"dot"``, whose logarithms add up over the criteria.
        dustbin: whether there is a learned score of staying unmatched.
        iterations: Sinkhorn iterations at most.
        tolerance: as in :func:`mixhead.matching_attention`.
        device, dtype: of the parameters.

    Attributes:
        log_weight: parameter ``(criteria,)``, at first 0.
        dustbin: parameter ``()`` or None.

    Raises:
        ValueError: an argument is out of its range, or rows and columns do not have the features of
            all criteria.

    Example:
        >>> layer = mixhead.SoftAssignment([6, 2])  # skills, location
        >>> jobs, candidates = torch.randn(2, 64, 8).unbind()
        >>> matched = layer(jobs, candidates)  # of each job: its mean candidate, (64, 8)
        >>> best = mixhead.assignment(layer.log_plan(jobs, candidates))
    """

    criteria: list[int]

    def __init__(
        self,
        criteria: Sequence[int],
        head_dim: int | None = None,
        *,
        kernel: str = "gaussian",
        dustbin: bool = False,
        iterations: int = 50,
        tolerance: float = 1e-6,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not criteria or min(criteria) < 1:
            raise ValueError(
                f"SoftAssignment: criteria must be numbers of features, got {list(criteria)}"
            )
        if kernel not in ("gaussian", "dot"):
            raise ValueError(f'SoftAssignment: kernel must be "gaussian" or "dot", got "{kernel}"')
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"SoftAssignment: head_dim must be positive, got {head_dim}")
        factory = {"device": device, "dtype": dtype}
        self.criteria = list(criteria)
        self.kernel = kernel
        self.iterations = iterations
        self.tolerance = tolerance

        def projections():
            if head_dim is None:
                return nn.ModuleList(nn.Identity() for _ in self.criteria)
            return nn.ModuleList(
                nn.Linear(size, head_dim, bias=False, **factory) for size in self.criteria
            )

        self.row_proj = projections()
        self.column_proj = projections()
        self.log_weight = nn.Parameter(torch.zeros(len(self.criteria), **factory))
        self.dustbin = nn.Parameter(torch.zeros((), **factory)) if dustbin else None
        sizes = self.criteria if head_dim is None else [head_dim] * len(self.criteria)
        owner = [criterion for criterion, size in enumerate(sizes) for _ in range(size)]
        self.register_buffer("criterion_of_channel", torch.tensor(owner, device=device), False)

    def extra_repr(self) -> str:
        return f"criteria={self.criteria}, kernel={self.kernel!r}, iterations={self.iterations}"

    def forward(
        self,
        rows: Tensor,
        columns: Tensor,
        value: Tensor | None = None,
        row_mass: Tensor | None = None,
        column_mass: Tensor | None = None,
    ) -> Tensor:
        """The values of the columns matched to each row, in memory linear in rows and columns.

        Args:
            rows: ``(B, L, E)`` with ``E`` the sum of the criteria, any number of batch dimensions.
            columns: ``(B, S, E)``.
            value: ``(B, S, Dv)``; None takes the columns.
            row_mass: as in :func:`mixhead.matching_attention`, ``(B, L)``.
            column_mass: ``(B, S)``.

        Returns:
            ``(B, L, Dv)``.
        """
        query, key = self._project(rows, columns)
        value = columns if value is None else value
        return self._match(query, key, value, row_mass, column_mass)[0].squeeze(-3)

    @torch.jit.export
    def log_plan(
        self,
        rows: Tensor,
        columns: Tensor,
        row_mass: Tensor | None = None,
        column_mass: Tensor | None = None,
    ) -> Tensor:
        """The logarithm of the plan ``(B, L, S)``, every pair stored; arguments as in `forward`."""
        query, key = self._project(rows, columns)
        empty = key[..., :0]
        _, row, column = self._match(query, key, empty, row_mass, column_mass)
        scale = (0.5 * self.log_weight[self.criterion_of_channel]).exp()
        query, key = query * scale, key * scale
        if self.kernel == "dot":
            scores = query @ key.mT
        else:
            scores = -0.5 * (query.unsqueeze(-2) - key.unsqueeze(-3)).square().sum(-1)
        return row.squeeze(-2).unsqueeze(-1) + scores + column

    def _project(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        features = sum(self.criteria)
        if rows.dim() < 2 or rows.shape[-1] != features:
            raise ValueError(
                f"SoftAssignment: rows must be (B, L, {features}), got {shape_text(rows)}"
            )
        if columns.dim() != rows.dim() or columns.shape[-1] != features:
            raise ValueError(
                f"SoftAssignment: columns must be (B, S, {features}), got {shape_text(columns)}"
            )
        of_rows = rows.split(self.criteria, -1)
        of_columns = columns.split(self.criteria, -1)
        query: list[Tensor] = []
        key: list[Tensor] = []
        for i, project in enumerate(self.row_proj):
            query.append(project(of_rows[i]))
        for i, project in enumerate(self.column_proj):
            key.append(project(of_columns[i]))
        return torch.cat(query, -1), torch.cat(key, -1)

    def _match(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row_mass: Tensor | None,
        column_mass: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        bandwidth = (-0.5 * self.log_weight[self.criterion_of_channel]).exp().unsqueeze(0)
        return matching_attention(
            query.unsqueeze(-3),
            key.unsqueeze(-3),
            value.unsqueeze(-3),
            bandwidth,
            self.kernel,
            row_mass=None if row_mass is None else row_mass.unsqueeze(-2),
            column_mass=None if column_mass is None else column_mass.unsqueeze(-2),
            dustbin=self.dustbin,
            iterations=self.iterations,
            tolerance=self.tolerance,
        )
