"""Kernels against distance, with their bandwidths."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor

from mixhead._errors import shape_text
from mixhead._kernels import KERNELS
from mixhead.functional import kernel_attention
from mixhead.layers import KernelMultiheadAttention
from mixhead.plot.frame import check_axes, new_axes


def kernels(
    kernel,
    bandwidth: float | Sequence | Tensor | None = None,
    *,
    ax: Axes | None = None,
    distance: float | None = None,
    points: int = 200,
):
    """Draw kernels K against the distance of query and key, a dot at one bandwidth.

    With a bandwidth for each channel the line is the kernel along the channel of median bandwidth,
    in a band from the narrowest channel to the widest. ``"dot"`` and ``"cosine"`` are no functions
    of the distance: their curves are for query and key of the same length (for ``"cosine"`` 1, so
    that they end at distance 2), over K at distance 0.

    Args:
        kernel: a `mixhead.KernelMultiheadAttention`; or the name of a kernel of
            `mixhead.kernel_attention`, or a list of names, one for each curve.
        bandwidth: of the kernels named: a number, or one for each curve ``(n,)``, or for each curve
            and channel ``(n, D)``. None with a layer, which has its own.
        ax: axes to draw into; a new figure's where None.
        distance: the largest distance drawn, in the units of query and key; three times the largest
            bandwidth where None.
        points: at how many distances K is computed.

    Returns:
        The axes, with a line for each curve.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what came.

    Example:
        >>> layer = mixhead.KernelMultiheadAttention(64, 2, kernel=["gaussian", "epanechnikov"])
        >>> mixhead.plot.kernels(layer)
        >>> mixhead.plot.kernels("gaussian", [0.5, 1.0, 2.0])
    """
    prefix = ""
    if isinstance(kernel, KernelMultiheadAttention):
        if bandwidth is not None:
            raise ValueError("plot.kernels: bandwidth must be None with a layer, which has its own")
        kernel, bandwidth, prefix = kernel.kernel, kernel.bandwidth, "head {}: "
    names, bandwidths = _curves(kernel, bandwidth)
    if points < 2:
        raise ValueError(f"plot.kernels: points must be at least 2, got {points}")
    if distance is None:
        distance = 3 * float(bandwidths.max())
    elif not distance > 0:
        raise ValueError(f"plot.kernels: distance must be positive, got {distance}")
    ax = new_axes() if ax is None else check_axes("kernels", ax)[0]
    for number, (name, channels) in enumerate(zip(names, bandwidths, strict=True)):
        end = min(distance, 2.0) if name == "cosine" else distance
        _draw(ax, name, channels, torch.linspace(0, end, points, dtype=torch.float64))
        ax.lines[-1].set_label(prefix.format(number) + _label(name, channels))
    ax.set(xlabel="distance", ylabel="K", xlim=(0, distance), ylim=(0, 1.05))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    return ax


def _curves(kernel, bandwidth) -> tuple[list[str], Tensor]:
    """The names ``(n,)`` and bandwidths ``(n, D)`` in float64, D = 1 for one of all channels."""
    names = [kernel] if isinstance(kernel, str) else kernel
    if not isinstance(names, (list, tuple)) or not names or not {*names} <= {*KERNELS}:
        raise ValueError(
            f"plot.kernels: kernel must be a KernelMultiheadAttention or of {', '.join(KERNELS)}, "
            f"got {kernel!r}"
        )
    if bandwidth is None:
        raise ValueError("plot.kernels: bandwidth must be given with names of kernels, got None")
    found = torch.as_tensor(bandwidth, dtype=torch.float64).detach().cpu()
    count = len(found) if len(names) == 1 and found.dim() else len(names)
    if found.numel() == 0 or found.dim() > 2 or (found.dim() and len(found) != count):
        raise ValueError(
            f"plot.kernels: bandwidth must be a number, ({count},) or ({count}, D), got "
            f"{shape_text(found)}"
        )
    if not ((found > 0) & found.isfinite()).all():
        raise ValueError(
            f"plot.kernels: bandwidth must be positive and finite, got {found.tolist()}"
        )
    if found.dim() == 0:
        found = found.expand(count)
    return list(names) * (count // len(names)), found.reshape(count, -1)


def _draw(ax: Axes, kernel: str, channels: Tensor, distance: Tensor) -> None:
    narrow, middle, wide = channels.min(), channels.median(), channels.max()
    (line,) = ax.plot(distance, _profile(kernel, middle, distance), linewidth=2)
    if narrow < wide:
        band = (_profile(kernel, bandwidth, distance) for bandwidth in (narrow, wide))
        ax.fill_between(distance, *band, color=line.get_color(), alpha=0.2, linewidth=0)
    if middle <= distance[-1]:
        at = torch.stack([torch.zeros_like(middle), middle])
        ax.scatter(at[1], _profile(kernel, middle, at)[1], s=24, color=line.get_color(), zorder=3)


def _profile(kernel: str, bandwidth: Tensor, distance: Tensor) -> Tensor:
    """K over its value at distance 0, which comes first in `distance`. One key at a time: its mass
    is K, and as a logarithm does not overflow."""
    key, query = _points(kernel, distance)
    _, log_kernel = kernel_attention(
        query[None], key[None], key[None], bandwidth, kernel, return_mass=True
    )
    return (log_kernel[0] - log_kernel[0, 0]).exp()


def _points(kernel: str, distance: Tensor) -> tuple[Tensor, Tensor]:
    """A key ``(1, D)`` and queries ``(n, D)`` at these distances: on a line, or for kernels of the
    direction on a circle around the origin."""
    if kernel not in ("dot", "cosine"):
        return torch.zeros(1, 1, dtype=distance.dtype), distance[:, None]
    radius = 1.0 if kernel == "cosine" else float(distance[-1]) / 2
    angle = 2 * torch.asin((distance / (2 * radius)).clamp(max=1))
    circle = radius * torch.stack([angle.cos(), angle.sin()], -1)
    return circle[:1], circle


def _label(kernel: str, channels: Tensor) -> str:
    narrow, wide = float(channels.min()), float(channels.max())
    to = f" to {wide:.3g}" if wide > narrow else ""
    return f"{kernel}, h = {narrow:.3g}{to}"
