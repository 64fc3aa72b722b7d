"""What `import mixhead` loads, and what it refuses to load."""

import os
import shutil
import subprocess
import sys

import mixhead
import pytest
import torch
from mixhead import _library


def import_mixhead(library):
    """What a fresh Python says of `import mixhead` with MIXHEAD_LIBRARY set."""
    return subprocess.run(
        [sys.executable, "-c", "import mixhead"],
        env=os.environ | {"MIXHEAD_LIBRARY": str(library)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def library(tmp_path):
    """A copy of the library at hand, with the record of its torch beside it."""
    path = _library.library_path()
    for name in (path.name, path.with_suffix(".torch-version").name):
        shutil.copy(path.with_name(name), tmp_path)
    return tmp_path / path.name


def test_library_named_by_the_environment_loads(library):
    done = import_mixhead(library)
    assert done.returncode == 0, done.stderr


def test_library_of_another_torch_is_refused(library):
    library.with_suffix(".torch-version").write_text("2.9.1\n")
    done = import_mixhead(library)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    found = f"this Python has torch {torch.__version__}."
    assert error.startswith(f"ImportError: mixhead was built with torch 2.9.1 but {found}")
    assert "pip install --no-build-isolation" in error
    assert "or install torch 2.9." in error


def test_library_that_is_missing_is_named(tmp_path):
    done = import_mixhead(tmp_path / "libmixhead.so")
    assert done.returncode == 1
    assert f"MIXHEAD_LIBRARY names {tmp_path / 'libmixhead.so'}" in done.stderr


def test_library_without_its_record_is_refused(library):
    library.with_suffix(".torch-version").unlink()
    done = import_mixhead(library)
    assert done.returncode == 1
    assert "libmixhead.torch-version is missing" in done.stderr


@pytest.mark.parametrize(
    ("built", "found", "fits"),
    [
        ("2.15.0", "2.15.1+cu132", True),
        ("2.11.0", "2.11.0a0+git123", True),
        ("2.11.0", "2.15.0", False),
        ("2.1.0", "2.11.0", False),
    ],
)
def test_one_minor_version_fits(built, found, fits):
    if fits:
        _library.check_torch_version(built, found)
    else:
        with pytest.raises(ImportError, match=f"torch {built} but this Python has torch {found}"):
            _library.check_torch_version(built, found)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf of binutils")
def test_library_has_no_python_abi():
    listing = subprocess.run(
        ["readelf", "--dynamic", "--wide", _library.library_path()],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    needed = [line.split("[")[1].rstrip("]") for line in listing.splitlines() if "NEEDED" in line]
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name or "cuda" in name]


def test_version():
    assert mixhead.__version__.count(".") == 2
