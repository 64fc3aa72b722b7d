"""Finds and loads libmixhead.so, which registers the operators of ``torch.ops.mixhead``."""

import os
import re
from pathlib import Path

import torch


def library_path() -> Path:
    """The library this package loads: ``MIXHEAD_LIBRARY`` where set, else the one it came with."""
    named = os.environ.get("MIXHEAD_LIBRARY")
    path = Path(named) if named else Path(__file__).parent / "lib" / "libmixhead.so"
    if path.is_file():
        return path.resolve()
    if named:
        raise ImportError(f"mixhead: MIXHEAD_LIBRARY names {path}, which is not a file.")
    raise ImportError(
        f"mixhead: {path} is missing, the package was not built. "
        "Run `pip install --no-build-isolation .` in its source folder, "
        "or name a built library by the environment variable MIXHEAD_LIBRARY."
    )


def check_torch_version(built: str, found: str) -> None:
    """Raises ImportError unless both versions of torch have the same major and minor number.

    LibTorch keeps its C++ interface within a minor version only.
    """
    built_minor, found_minor = (re.findall(r"\d+", version)[:2] for version in (built, found))
    if built_minor != found_minor:
        raise ImportError(
            f"mixhead was built with torch {built} but this Python has torch {found}. "
            "Build it again with the torch at hand (`pip install --no-build-isolation "
            f"--force-reinstall --no-deps .` in its source folder) or install torch "
            f"{'.'.join(built_minor)}."
        )


def load() -> None:
    """Loads the library, once the torch at hand is known to fit it."""
    path = library_path()
    record = path.with_name("libmixhead.torch-version")
    if not record.is_file():
        raise ImportError(f"mixhead: {record} is missing; it belongs beside {path.name}.")
    check_torch_version(record.read_text().strip(), torch.__version__)
    torch.ops.load_library(path)
