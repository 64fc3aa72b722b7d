"""Attention heads that mix self-attention with attention over an external memory."""

from pathlib import Path

from mixhead import _library
from mixhead._version import __version__

_library.load()

#: What a CMake project puts in ``CMAKE_PREFIX_PATH`` so that ``find_package(mixhead)`` finds this package.
cmake_prefix_path = str(Path(__file__).parent)

__all__ = ["__version__", "cmake_prefix_path"]
