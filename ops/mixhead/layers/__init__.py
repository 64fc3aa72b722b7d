"""Attention layers: the operators with projections, gates and masks around them."""

from mixhead.layers.kernel_multihead_attention import KernelMultiheadAttention
from mixhead.layers.mixed_multihead_attention import MixedMultiheadAttention
from mixhead.layers.soft_assignment import SoftAssignment

__all__ = ["KernelMultiheadAttention", "MixedMultiheadAttention", "SoftAssignment"]
