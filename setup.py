"""Builds the Python package by driving CMakeLists.txt, the same build a C++ developer runs.

The metadata stands here and not in pyproject.toml because this package is built with the
setuptools of an environment that already has torch, whatever its age, and old ones do not read
today's [project].
"""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.build import build

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'"(.+)"', (ROOT / "ops" / "mixhead" / "_version.py").read_text())[1]


def torch_release() -> str:
    """The version of the torch at hand, without its local part (``2.15.0`` of ``2.15.0+cu132``)."""
    try:
        return importlib.metadata.version("torch").split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        sys.exit(
            "mixhead is built with the torch of the environment it is for; none is visible here. "
            "Install torch (2.11 to 2.15), then run `pip install --no-build-isolation .`: without "
            "that flag pip builds in a folder of its own that has no torch."
        )


def build_folder() -> Path:
    """One for each torch, shared with `make` and kept: a second build compiles what changed."""
    return ROOT / "build" / f"torch-{torch_release()}"


class BuildCMake(Command):
    """Configures and builds libmixhead.so; for a wheel also installs it into the package.

    An editable install keeps it in the build folder, where the package looks for it.
    """

    description = "build libmixhead.so with CMake"
    user_options: ClassVar = []
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        folder = build_folder()
        search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=search)
        if cmake is None:
            sys.exit(
                "mixhead is built with CMake 3.18 or newer, which is not here: `pip install cmake`."
            )
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        ninja = shutil.which("ninja", path=search)
        if ninja and not (folder / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.check_call(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")))

        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.check_call([cmake, "--build", str(folder), "--target", "mixhead", "-j", jobs])
        if not self.editable_mode:
            package = Path(self.build_lib) / "mixhead"
            subprocess.check_call(
                [cmake, "--install", str(folder), "--prefix", str(package.resolve())]
            )

    def get_source_files(self):
        return []

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_cmake", None)]

    def initialize_options(self):
        super().initialize_options()
        self.build_base = str(build_folder() / "python")

    def run(self):
        shutil.rmtree(self.build_base, ignore_errors=True)  # no module that was deleted since
        super().run()


class Wheel(bdist_wheel):
    """The library has no Python ABI in it: one wheel serves every Python 3 of a platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(
    name="mixhead",
    version=VERSION,
    description="Attention heads that mix self-attention with attention over an external memory",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="mixhead developers",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    # No torch: the wheel fits one minor version of it, the one it was built with, and a requirement
    # could only make pip replace that. `import mixhead` checks it and names the cure.
    install_requires=[],
    package_dir={"": "ops"},
    packages=find_packages("ops"),
    distclass=BinaryDistribution,
    cmdclass={"build": Build, "build_cmake": BuildCMake, "bdist_wheel": Wheel},
    zip_safe=False,
)
