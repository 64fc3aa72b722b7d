"""A plan and the matching it rounds to."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from mixhead.plot.frame import MEMORY, check_axes, new_axes, set_xticks, ticks, to_array


def assignment(
    plan,
    *,
    ax: Axes | None = None,
    matched: Tensor | Sequence | str | None = "rounded",
    rows: Sequence | None = None,
    columns: Sequence | None = None,
    vmax: float | None = None,
):
    """Draw a plan, rows down and columns across, and circle a one-to-one matching.

    Args:
        plan: ``(L, S)``, not negative: of a `mixhead.SoftAssignment` that is
            ``layer.log_plan(rows, columns).exp()``. Attention weights do as well.
        ax: axes to draw into; a new figure's where None.
        matched: the column circled in each row, int64 ``(L,)``, -1 for none; ``"rounded"`` for
            `mixhead.assignment` of the plan (needs SciPy); None for no circles.
        rows: a label for each row.
        columns: a label for each column.
        vmax: the mass with the darkest color; the largest one of the plan where None.

    Returns:
        The axes.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what came.

    Example:
        >>> layer = mixhead.SoftAssignment([6, 2])
        >>> jobs, candidates = torch.randn(2, 20, 8).unbind()
        >>> mixhead.plot.assignment(layer.log_plan(jobs, candidates).exp())
    """
    cure = " (of a log_plan, its exp())"
    plan = to_array("assignment", "plan", plan, "(L, S) of one problem", (2,), cure=cure)
    circled = None if matched is None else _matching(plan, matched)
    row_ticks = ticks("assignment", "rows", rows, plan.shape[0])
    column_ticks = ticks("assignment", "columns", columns, plan.shape[1])
    axes = new_axes() if ax is None else check_axes("assignment", ax)[0]
    image = axes.imshow(plan, cmap="Greys", vmin=0, vmax=vmax, aspect="auto")
    if circled is not None:
        (taken,) = np.nonzero(circled >= 0)
        axes.scatter(
            circled[taken], taken, s=30, linewidths=1.4, facecolors="none", edgecolors=MEMORY
        )
    axes.set(xlabel="column", ylabel="row")
    axes.set_yticks(*row_ticks, fontsize=8)
    set_xticks(axes, *column_ticks)
    if ax is None:
        axes.figure.colorbar(image, label="mass")
    return axes


def _matching(plan: np.ndarray, matched: Tensor | Sequence | str) -> np.ndarray:
    """The column of each row ``(L,)``, -1 for none."""
    if isinstance(matched, str):
        if matched != "rounded":
            raise ValueError(
                f"plot.assignment: matched must be 'rounded', columns or None, got {matched!r}"
            )
        import mixhead  # names what is missing where there is no SciPy

        return mixhead.assignment(torch.from_numpy(plan)).numpy()
    found = torch.as_tensor(matched).cpu().numpy()
    rows, columns = plan.shape
    if found.shape != (rows,) or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            f"plot.assignment: matched must be integers ({rows},), got {found.dtype} {found.shape}"
        )
    if found.min() < -1 or found.max() >= columns:
        raise ValueError(
            f"plot.assignment: matched must be columns from -1 to {columns - 1}, got "
            f"{found.min()} to {found.max()}"
        )
    return found
