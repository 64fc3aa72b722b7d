"""Attention heads that mix self-attention with attention over an external memory."""

import importlib

from mixhead import _library, distributed
from mixhead._version import __version__
from mixhead.functional import (
    kernel_attention,
    local_linear_attention,
    matching_attention,
    merge_attention,
    mixed_attention,
    topk_keys,
)
from mixhead.layers import KernelMultiheadAttention, MixedMultiheadAttention, SoftAssignment
from mixhead.memory import MemoryBank
from mixhead.optim import recommended_parameter_groups

_library.load()

#: What a CMake project puts in ``CMAKE_PREFIX_PATH`` so that ``find_package(mixhead)`` works.
cmake_prefix_path = str(_library.prefix())

__all__ = [
    "KernelMultiheadAttention",
    "MemoryBank",
    "MixedMultiheadAttention",
    "SoftAssignment",
    "__version__",
    "cmake_prefix_path",
    "distributed",
    "kernel_attention",
    "local_linear_attention",
    "matching_attention",
    "merge_attention",
    "mixed_attention",
    "recommended_parameter_groups",
    "topk_keys",
]

# What needs more than torch is imported when first asked for.
_OPTIONAL = {
    "KernelRegressor": ("mixhead.regression", "KernelRegressor", "'scikit-learn>=1.6'"),
    "assignment": ("mixhead.matching", "assignment", "scipy"),
    "plot": ("mixhead.plot", None, "matplotlib"),
}


def __getattr__(name):
    if name not in _OPTIONAL:
        raise AttributeError(f"module 'mixhead' has no attribute {name!r}")
    module, attribute, package = _OPTIONAL[name]
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"mixhead.{name} needs {package}: pip install {package}") from error
    return getattr(found, attribute) if attribute else found


def __dir__():
    return sorted({*globals(), *_OPTIONAL})
