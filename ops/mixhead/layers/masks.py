"""Masks of torch.nn.MultiheadAttention as one mask of mixhead's operators.

The two mean the opposite by a bool mask: torch.nn.MultiheadAttention blocks what is True, the
operators read it.
"""

import math

import torch
from torch import Tensor

from mixhead._errors import shape_text


def sequence_mask(
    layer: str,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    batch: int,
    num_heads: int,
    length: int,
    keys: int,
) -> Tensor | None:
    """Both masks of torch.nn.MultiheadAttention as the operator's one, not expanded: it broadcasts
    to ``(B, Hq, L, S)``. Errors name ``layer``."""
    if key_padding_mask is not None:
        _check_mask(layer, "key_padding_mask", key_padding_mask, [batch, keys])
        key_padding_mask = _may_read(key_padding_mask).view(batch, 1, 1, keys)
    if attn_mask is not None:
        if attn_mask.dim() == 3:
            _check_mask(layer, "attn_mask", attn_mask, [batch * num_heads, length, keys])
            attn_mask = attn_mask.unflatten(0, [batch, num_heads])
        else:
            _check_mask(layer, "attn_mask", attn_mask, [length, keys])
        attn_mask = _may_read(attn_mask)
    if key_padding_mask is None:
        return attn_mask
    if attn_mask is None:
        return key_padding_mask
    return both(key_padding_mask, attn_mask)


def both(first: Tensor, second: Tensor) -> Tensor:
    """The operator's mask that blocks what either of two blocks."""
    if first.dtype == torch.bool and second.dtype == torch.bool:
        return first.logical_and(second)
    if first.dtype == torch.bool:
        return second.masked_fill(first.logical_not(), -math.inf)
    if second.dtype == torch.bool:
        return first.masked_fill(second.logical_not(), -math.inf)
    return first + second


def _may_read(mask: Tensor) -> Tensor:
    return mask.logical_not() if mask.dtype == torch.bool else mask


def _check_mask(layer: str, name: str, mask: Tensor, shape: list[int]) -> None:
    if list(mask.shape) != shape:
        raise ValueError(f"{layer}: {name} must have shape {shape}, got {shape_text(mask)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{layer}: {name} must be bool or floating point, got {mask.dtype}")
