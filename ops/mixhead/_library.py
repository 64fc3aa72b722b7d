"""Finds and loads libmixhead.so, which registers the operators of ``torch.ops.mixhead``."""

import os
import re
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent
_NAME = "libmixhead.so"


def _release(version: str) -> str:
    """``2.15.0`` of ``2.15.0+cu132``."""
    return version.split("+")[0]


def prefix() -> Path:
    """The folder CMake finds mixhead in: this package, or its build folder in a source checkout.

    A checkout keeps one build folder for each version of torch, so that installing it as editable
    in two environments overwrites nothing.
    """
    build = _PACKAGE.parents[1] / "build" / f"torch-{_release(torch.__version__)}"
    in_checkout = not (_PACKAGE / "lib" / _NAME).is_file() and (build / _NAME).is_file()
    return build if in_checkout else _PACKAGE


def library_path() -> Path:
    """The library to load: what ``MIXHEAD_LIBRARY`` names, else the one the package came with."""
    named = os.environ.get("MIXHEAD_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise ImportError(f"mixhead: MIXHEAD_LIBRARY names {named}, which is not a file.")
        return Path(named).resolve()
    for path in (prefix() / "lib" / _NAME, prefix() / _NAME):
        if path.is_file():
            return path
    raise ImportError(
        f"mixhead: no {_NAME} for torch {torch.__version__} in {_PACKAGE}: it was not built with "
        "this torch. Run `pip install --no-build-isolation .` in the source folder of mixhead, or "
        "name a built library by the environment variable MIXHEAD_LIBRARY."
    )


def check_torch_version(built: str, found: str) -> None:
    """Raises ImportError unless both versions of torch have the same major and minor number.

    LibTorch keeps its C++ interface within a minor version only.
    """
    built_minor, found_minor = (re.findall(r"\d+", version)[:2] for version in (built, found))
    if built_minor != found_minor:
        raise ImportError(
            f"mixhead was built with torch {built} but this Python has torch {found}. Build it "
            "again with the torch at hand (`pip install --no-build-isolation --force-reinstall "
            f"--no-deps .` in its source folder), or install torch {'.'.join(built_minor)}."
        )


def load() -> None:
    """Loads the library, once the torch at hand is known to fit it."""
    path = library_path()
    record = path.with_suffix(".torch-version")
    if not record.is_file():
        raise ImportError(f"mixhead: {record} is missing; it belongs beside {path.name}.")
    check_torch_version(record.read_text().strip(), torch.__version__)
    torch.ops.load_library(path)
