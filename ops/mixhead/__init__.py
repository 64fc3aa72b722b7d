"""Attention heads that mix self-attention with attention over an external memory."""

from mixhead import _library
from mixhead._version import __version__

_library.load()

#: Goes into ``CMAKE_PREFIX_PATH`` of a CMake project, whose ``find_package(mixhead)`` then finds this.
cmake_prefix_path = str(_library.prefix())

__all__ = ["__version__", "cmake_prefix_path"]
