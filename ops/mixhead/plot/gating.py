"""The gates between sequence and memory."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from mixhead._errors import shape_text
from mixhead.layers import MixedMultiheadAttention
from mixhead.plot.frame import (
    MEMORY,
    SEQUENCE,
    check_axes,
    new_axes,
    set_xticks,
    ticks,
    to_array,
)

_SIDES = LinearSegmentedColormap.from_list("sides", [SEQUENCE, "white", MEMORY])


def gates(gate, x: Tensor | None = None, *, ax: Axes | None = None, tokens: Sequence | None = None):
    """Draw the gates of each head: 0 reads the sequence alone, 1 the memory alone.

    One gate for each head is a divided bar; gates for each token or channel are an image.

    Args:
        gate: a `mixhead.MixedMultiheadAttention` with ``rule="gate"``; or gates of one sequence,
            ``sigmoid(mix)``: ``(Hq,)`` or ``(Hq, 1, 1)`` for each head, ``(Hq, L)`` or
            ``(Hq, L, 1)`` for each token, ``(Hq, 1, Dv)`` for each channel. With ``rule="joint"``
            the gate depends on what is read: it is what the memory gets of the layer's attention
            weights, ``weights[..., S:].sum(-1)``.
        x: the query's tokens before projection, ``(L, E)``, which a layer with ``gate="token"``
            computes its gates from; without effect on others.
        ax: axes to draw into; a new figure's where None.
        tokens: a label for each of the L tokens.

    Returns:
        The axes.

    Raises:
        ValueError: an argument does not fit; names it, what was expected and what came.

    Example:
        >>> layer = mixhead.MixedMultiheadAttention(64, 4, gate="token")
        >>> mixhead.plot.gates(layer, torch.randn(12, 64))
    """
    if isinstance(gate, MixedMultiheadAttention):
        gate = _layer_gates(gate, x)
    expected = "(Hq,), (Hq, L), (Hq, L, 1) or (Hq, 1, Dv) of one sequence"
    gate = to_array("gates", "gate", gate, expected, (1, 2, 3), 1.0, ", sigmoid(mix)")
    gate = gate[(...,) + (None,) * (3 - gate.ndim)]
    heads, length, channels = gate.shape
    if length > 1 and channels > 1:
        raise ValueError(f"plot.gates: gate must be {expected}, got {gate.shape}")
    by_channel = channels > 1
    if tokens is not None and (by_channel or len(tokens) != length):
        raise ValueError(
            f"plot.gates: tokens must be labels of the tokens of gates (Hq, L, 1), got "
            f"{len(tokens)} with {gate.shape}"
        )
    axes = new_axes() if ax is None else check_axes("gates", ax)[0]
    if gate.size == heads and tokens is None:
        _draw_bars(axes, gate.ravel())
        return axes
    image = axes.imshow(gate.reshape(heads, -1), cmap=_SIDES, vmin=0, vmax=1, aspect="auto")
    axes.set(xlabel="channel" if by_channel else "token", ylabel="head")
    set_xticks(axes, *ticks("gates", "tokens", tokens, gate.size // heads))
    axes.set_yticks(*ticks("gates", "heads", None, heads), fontsize=8)
    if ax is None:
        axes.figure.colorbar(image, label="gate: 0 sequence, 1 memory")
    return axes


def _layer_gates(layer: MixedMultiheadAttention, x: Tensor | None) -> Tensor:
    if layer.rule == "joint":
        raise ValueError(
            "plot.gates: gate must be a layer with rule='gate', or gates, got rule='joint', whose "
            "gate depends on what is read: give weights[..., S:].sum(-1) of its attention weights"
        )
    if layer.gate != "token":
        return layer.mix.sigmoid()
    if x is None or x.dim() != 2 or x.size(-1) != layer.embed_dim:
        raise ValueError(
            f"plot.gates: x must be (L, {layer.embed_dim}) for a layer with gate='token', got "
            f"{None if x is None else shape_text(x)}"
        )
    return layer._mix_logit(x.unsqueeze(0))[0].sigmoid()


def _draw_bars(ax: Axes, gate: np.ndarray) -> None:
    heads = range(len(gate))
    ax.bar(heads, gate, color=MEMORY, label="memory")
    ax.bar(heads, 1 - gate, bottom=gate, color=SEQUENCE, label="sequence")
    ax.set(ylim=(0, 1), xlabel="head", ylabel="gate")
    ax.set_xticks(*ticks("gates", "heads", None, len(gate)))
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    ax.spines[["top", "right"]].set_visible(False)
