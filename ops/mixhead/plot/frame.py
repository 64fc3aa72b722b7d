"""What the pictures share: axes, numbers out of tensors, ticks, colors."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes

#: The sequence is blue in every picture, the memory orange.
SEQUENCE, MEMORY, GREY = "#0369a1", "#c2410c", "0.55"


def new_axes(rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None):
    """Axes of a new figure of pyplot, which is imported where it is asked for a figure, no sooner:
    with axes given, no backend is chosen."""
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained")[1]


def check_axes(function: str, ax, count: int = 1) -> np.ndarray:
    """The axes given, as an array of `count`."""
    axes = np.ravel(np.asarray(ax, dtype=object))
    wrong = [type(one).__name__ for one in axes if not isinstance(one, Axes)]
    if wrong:
        raise ValueError(f"plot.{function}: ax must be matplotlib axes, got {wrong[0]}")
    if len(axes) != count:
        raise ValueError(f"plot.{function}: ax must be {count} axes, got {len(axes)}")
    return axes


def to_array(
    function: str,
    argument: str,
    values,
    expected: str,
    dims: tuple[int, ...],
    upper: float = np.inf,
    cure: str = "",
) -> np.ndarray:
    """`values` in float64, without leading dimensions of size 1 in excess of `dims`, which is how
    many there may be; all of them from 0 to `upper`, or the error ends with `cure`."""
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    values = np.asarray(values, dtype=np.float64)
    shape = values.shape
    while values.ndim > max(dims) and len(values) == 1:
        values = values[0]
    if values.ndim not in dims or values.size == 0:
        raise ValueError(f"plot.{function}: {argument} must be {expected}, got {shape}")
    rounding = 1e-2  # of half precision
    if not (values.min() >= 0 and values.max() <= upper + rounding):
        between = "at least 0" if upper == np.inf else f"between 0 and {upper:g}"
        raise ValueError(
            f"plot.{function}: {argument} must be {between}{cure}, got {values.min():.4g} to "
            f"{values.max():.4g}"
        )
    return values


def ticks(
    function: str, argument: str, labels: Sequence | None, count: int, most: int = 8
) -> tuple[list[int], list[str]]:
    """Where ticks stand and what they say: every label, or `most` numbers."""
    if labels is None:
        places = range(0, count, -(-count // most) or 1)
        return list(places), [str(place) for place in places]
    if len(labels) != count:
        raise ValueError(f"plot.{function}: {argument} must have {count} labels, got {len(labels)}")
    return list(range(count)), [str(label) for label in labels]


def set_xticks(ax: Axes, places: list[int], names: list[str]) -> None:
    """Names that would not fit side by side stand upright."""
    longest = max(map(len, names), default=0)
    upright = longest > 1 and longest * len(names) > 30
    ax.set_xticks(places, names, fontsize=8, rotation=90 if upright else 0)
