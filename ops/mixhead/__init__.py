"""Attention heads that mix self-attention with attention over an external memory."""

from mixhead import _library, distributed
from mixhead._version import __version__
from mixhead.functional import (
    kernel_attention,
    local_linear_attention,
    merge_attention,
    mixed_attention,
    topk_keys,
)
from mixhead.layers import MixedMultiheadAttention
from mixhead.memory import MemoryBank
from mixhead.optim import recommended_parameter_groups

_library.load()

#: What a CMake project puts in ``CMAKE_PREFIX_PATH`` so that ``find_package(mixhead)`` works.
cmake_prefix_path = str(_library.prefix())

__all__ = [
    "MemoryBank",
    "MixedMultiheadAttention",
    "__version__",
    "cmake_prefix_path",
    "distributed",
    "kernel_attention",
    "local_linear_attention",
    "merge_attention",
    "mixed_attention",
    "recommended_parameter_groups",
    "topk_keys",
]
