"""Attention layers: the operators with projections, gates and masks around them."""

from mixhead.layers.mixed_multihead_attention import MixedMultiheadAttention

__all__ = ["MixedMultiheadAttention"]
