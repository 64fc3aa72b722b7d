"""A stranger's CMake project (tests/consumer) against the package and against `cmake --install`."""

import os
import subprocess
import sys
from pathlib import Path

import mixhead
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parents[2]
TORCH_FOLDER = Path(torch.__file__).parent


def run(*command, check=True):
    """Runs a command without a trace of a CUDA toolkit in its environment."""
    scripts = str(Path(sys.executable).parent)
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if "cuda" not in f]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("CUDA") and name not in ("LIBRARY_PATH", "LD_LIBRARY_PATH")
    } | {"PATH": os.pathsep.join([scripts, *folders])}
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    if check:
        assert done.returncode == 0, done.stdout
    return done


def configure(build, prefix, *options, check=True):
    return run(
        "cmake",
        *("-G", "Ninja"),
        *("-S", ROOT / "tests" / "consumer"),
        *("-B", build),
        f"-DCMAKE_PREFIX_PATH={prefix}",
        # Ubuntu's default: a library whose symbols an app does not use is left out.
        "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed",
        *options,
        check=check,
    )


@pytest.fixture(scope="module")
def installed_prefix(tmp_path_factory):
    """What `cmake --install` of this checkout's build gives."""
    build = ROOT / "build" / f"torch-{torch.__version__.split('+')[0]}"
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", build, "--prefix", prefix)
    return prefix


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A scripted model that calls the operator, with the output it should give."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            shapes = {
                "query": (2, 3, 5, 8),
                "key": (2, 3, 7, 8),
                "value": (2, 3, 7, 4),
                "memory_key": (2, 3, 11, 8),
                "memory_value": (2, 3, 11, 4),
                "mix": (3, 1, 1),
            }
            for name, shape in shapes.items():
                self.register_buffer(name, torch.randn(shape, dtype=torch.float64))
            sequence = scaled_dot_product_attention(self.query, self.key, self.value)
            memory = scaled_dot_product_attention(self.query, self.memory_key, self.memory_value)
            self.register_buffer("expected", torch.lerp(sequence, memory, self.mix.sigmoid()))

        def forward(self) -> torch.Tensor:
            return torch.ops.mixhead.mixed_attention(
                self.query, self.key, self.value, self.memory_key, self.memory_value, self.mix
            )[0]

    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.jit.script(Model()).save(str(path))
    return path


@pytest.mark.parametrize("source", ["package", "cmake --install"])
def test_strangers_project(source, tmp_path, model_file, request):
    if source == "package":
        prefix = mixhead.cmake_prefix_path
    else:
        prefix = request.getfixturevalue("installed_prefix")
    configure(tmp_path, prefix, f"-DPython_EXECUTABLE={sys.executable}")
    run("cmake", "--build", tmp_path)

    versions = f"mixhead {mixhead.__version__}, LibTorch {torch.__version__.split('+')[0]}"
    assert run(tmp_path / "calls_op").stdout.startswith(versions)
    run(tmp_path / "runs_model", model_file)


def test_finds_torch_by_its_own_prefix(tmp_path, installed_prefix):
    prefixes = f"{installed_prefix};{torch.utils.cmake_prefix_path}"
    configure(tmp_path, prefixes, "-DPython_EXECUTABLE=/nowhere/python")


def test_another_torch_is_refused(tmp_path, installed_prefix):
    header = tmp_path / "libtorch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    (tmp_path / "libtorch" / "lib").mkdir()
    header.write_text(
        "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 9\n"
        "#define TORCH_VERSION_PATCH 1\n"
    )
    done = configure(
        tmp_path / "build",
        installed_prefix,
        f"-DLIBTORCH_ROOT={tmp_path / 'libtorch'}",
        check=False,
    )
    message = " ".join(done.stdout.split())
    assert done.returncode != 0
    assert f"was built with LibTorch {torch.__version__.split('+')[0]}" in message
    assert "but LibTorch 2.9.1 was found in" in message
    assert "Build mixhead again with that LibTorch" in message


def test_missing_torch_is_named(tmp_path, installed_prefix):
    done = configure(
        tmp_path / "build", installed_prefix, f"-DLIBTORCH_ROOT={tmp_path}", check=False
    )
    assert done.returncode != 0
    assert f"LIBTORCH_ROOT={tmp_path} holds no LibTorch" in " ".join(done.stdout.split())
