"""What each head reads."""

import math
from collections.abc import Sequence
from numbers import Integral

import numpy as np
from matplotlib.axes import Axes

from mixhead.plot.frame import GREY, check_axes, new_axes, set_xticks, ticks, to_array


def reads(
    weights,
    *,
    ax=None,
    head: int | None = None,
    memory: int | Sequence = 0,
    slots: int | None = None,
    tokens: Sequence | None = None,
    keys: Sequence | None = None,
    vmax: float | None = None,
):
    """Draw what each head reads: tokens down, keys across, the memory beside the sequence.

    The number over the memory is the share of the weight that it gets, the mean over the tokens.

    Args:
        weights: attention weights of one sequence, ``(Hq, L, S + M)`` or, averaged, ``(L, S + M)``,
            as `mixhead.MixedMultiheadAttention` returns them over ``[sequence, memory]``, with
            ``average_attn_weights=False`` for the heads. Weights of `KernelMultiheadAttention` and
            of `torch.nn.MultiheadAttention` do as well: they have no memory.
        ax: axes to draw into: one, or for several heads as many; a new figure's where None.
        head: the head to draw; None for all of them, side by side.
        memory: how many of the keys, the last ones, are memory slots; or a label for each.
        slots: draw only so many memory slots, those of most weight, in its order; None for all.
        tokens: a label for each of the L tokens.
        keys: a label for each of the S keys of the sequence; the tokens' where None and S is L.
        vmax: the weight with the darkest color; the largest one drawn where None.

    Returns:
        The axes; of heads side by side an array ``(Hq,)``.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what came.

    Example:
        >>> layer = mixhead.MixedMultiheadAttention(64, 4, batch_first=True)
        >>> x, facts = torch.randn(12, 64), torch.randn(1000, 64)
        >>> _, weights = layer(x, x, x, memory=facts, average_attn_weights=False)
        >>> mixhead.plot.reads(weights, memory=1000, slots=8)
    """
    weights = to_array(
        "reads", "weights", weights, "(Hq, L, S + M) or (L, S + M) of one sequence", (2, 3), 1.0
    )
    panels, titles = _panels(weights, head)
    panels, length, shares, memory_labels = _with_slots(panels, memory, slots)
    rows = ticks("reads", "tokens", tokens, panels.shape[1])
    if keys is None and length == panels.shape[1]:
        keys = tokens
    slots = panels.shape[-1] - length
    in_sequence = math.ceil(10 * length / (length + slots))
    places, names = ticks("reads", "keys", keys, length, in_sequence or 1)
    slot_places, slot_names = ticks("reads", "memory", memory_labels, slots, 11 - in_sequence)
    columns = places + [length + place for place in slot_places], names + slot_names
    scale = panels.max() if vmax is None else vmax
    axes = _grid(*panels.shape) if ax is None else check_axes("reads", ax, len(panels))
    for one, panel, title, share in zip(axes, panels, titles, shares, strict=True):
        _draw(one, panel, length, scale, share, title)
        one.set_yticks(*rows, fontsize=8)
        set_xticks(one, *columns)
    if ax is None:
        for image, side in zip(axes[0].images, ("sequence", "memory")[length == 0 :], strict=False):
            axes[0].figure.colorbar(image, ax=list(axes), shrink=0.8, label=f"weight, {side}")
    return axes if weights.ndim == 3 and head is None else axes[0]


def _panels(weights: np.ndarray, head: int | None) -> tuple[np.ndarray, list[str]]:
    """The heads to draw ``(heads, L, S + M)`` and their titles."""
    if weights.ndim == 2:
        if head is not None:
            raise ValueError(
                f"plot.reads: head needs weights (Hq, L, S + M), got {weights.shape} and "
                f"head={head}"
            )
        return weights[None], [""]
    if head is None:
        return weights, [f"head {number}" for number in range(len(weights))]
    if not 0 <= head < len(weights):
        raise ValueError(f"plot.reads: head must be from 0 to {len(weights) - 1}, got {head}")
    return weights[head : head + 1], [f"head {head}"]


def _with_slots(
    panels: np.ndarray, memory: int | Sequence, slots: int | None
) -> tuple[np.ndarray, int, np.ndarray, list | None]:
    """The panels with the slots to draw, the sequence's length, the memory's share of the weight
    in each panel, and the slots' labels."""
    labels = None if isinstance(memory, Integral) else list(memory)
    size = memory if labels is None else len(labels)
    keys = panels.shape[-1]
    if not 0 <= size <= keys:
        raise ValueError(
            f"plot.reads: memory must be at most the {keys} keys of weights, got {size}"
        )
    length = keys - size
    in_memory = panels[..., length:]
    share = in_memory.sum(-1).mean(-1)
    if slots is not None:
        if slots < 1:
            raise ValueError(f"plot.reads: slots must be at least 1, got {slots}")
        most = np.argsort(-in_memory.sum((0, 1)), kind="stable")[:slots]
        labels = [slot if labels is None else labels[slot] for slot in most]
        panels = np.concatenate([panels[..., :length], in_memory[..., most]], -1)
    return panels, length, share, labels


def _grid(heads: int, length: int, keys: int) -> np.ndarray:
    """Axes of a new figure for so many heads, about as wide as high."""
    columns = math.ceil(math.sqrt(heads))
    rows = math.ceil(heads / columns)
    width, height = min(7, 1.8 + 0.14 * keys), min(6, 1.4 + 0.16 * length)
    axes = np.ravel(new_axes(rows, columns, (columns * width + 1.5, rows * height)))
    for empty in axes[heads:]:
        empty.remove()
    return axes[:heads]


def _draw(ax: Axes, panel: np.ndarray, length: int, vmax: float, share: float, title: str) -> None:
    tokens, keys = panel.shape
    sides = ((0, length, "Blues", "sequence"), (length, keys, "Oranges", f"memory {share:.2f}"))
    for start, end, colors, name in sides:
        if start == end:
            continue
        ax.imshow(
            panel[:, start:end],
            extent=(start - 0.5, end - 0.5, tokens - 0.5, -0.5),
            cmap=colors,
            vmin=0,
            vmax=vmax,
            aspect="auto",
        )
        if length < keys:
            above = ax.get_xaxis_transform()
            middle = (start + end - 1) / 2
            ax.text(middle, 1.02, name, transform=above, ha="center", fontsize=8, color="0.35")
    if 0 < length < keys:
        ax.axvline(length - 0.5, color=GREY, linewidth=1.2)
    ax.set_xlim(-0.5, keys - 0.5)
    ax.set(xlabel="key", ylabel="token")
    ax.set_title(title, loc="left", fontsize=10, pad=16 if length < keys else 6)
