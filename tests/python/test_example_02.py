"""examples/02_copy_reverse: its figures, its controls, other sizes, and its C++ program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mixhead
import pytest
import torch
from example_runs import ROOT, assert_files, assert_goals, run_example

FOLDER = ROOT / "examples" / "02_copy_reverse"
# Outside of the temporary folder, so that a second run of the tests has nothing to compile.
BUILD = ROOT / "build" / "examples" / f"copy_reverse_app-{torch.__version__.split('+')[0]}"


@pytest.fixture(scope="module")
def copy_reverse(tmp_path_factory):
    out = tmp_path_factory.mktemp("copy_reverse")
    return out, run_example(FOLDER, "--out", out)[1]


def test_figures_and_controls(copy_reverse):
    assert_goals(FOLDER, copy_reverse[1])


def test_files(copy_reverse):
    assert_files(copy_reverse[0], "reads.png", "copy_reverse.pt")


def test_saved_model_runs_freely(copy_reverse):
    model = torch.jit.load(copy_reverse[0] / "copy_reverse.pt")
    payload = torch.randint(8, (3, 77))
    start, copy, reverse, end = (torch.full((3, 1), 8 + mark) for mark in range(4))
    said = model.generate(torch.cat([start, payload, copy], 1), 156)
    assert said.equal(torch.cat([payload, reverse, payload.flip(1), end], 1))


def test_another_seed_and_other_sizes(tmp_path):
    _, figures = run_example(
        FOLDER, "--out", tmp_path, "--seed", 12345, "--alphabet", 3, "--lengths", 40, 400,
        "--strings", 4, "--constructed-length", 500, "--control-steps", 2,
    )  # fmt: skip
    assert figures["exact_40"] == figures["exact_400"] == figures["constructed_exact_500"] == 1.0


def run(*command: object) -> subprocess.CompletedProcess:
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PATH": folders},
    )  # fmt: skip


@pytest.fixture(scope="module")
def program() -> Path:
    """The C++ program, built as a user of the package builds it."""
    prefix = f"-DCMAKE_PREFIX_PATH={mixhead.cmake_prefix_path}"
    python = f"-DPython_EXECUTABLE={sys.executable}"
    for command in (
        ("cmake", "-S", FOLDER, "-B", BUILD, "-G", "Ninja", prefix, python),
        ("cmake", "--build", BUILD),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "copy_reverse"


def test_program_trains_and_runs_without_python(program):
    done = run(program, "--quick", "--seed", 12345, "--alphabet", 5, "--lengths", "30,150")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.removeprefix("RESULT ")) == {"exact_30": 1.0, "exact_150": 1.0}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--lengths", "5,x"], "--lengths takes numbers of at least 1, got 'x'"),
        (["--steps", "0"], "--steps takes numbers of at least 1, got '0'"),
        (["--what", "1"], "unknown or incomplete argument --what"),
    ],
)
def test_program_explains_its_usage(program, arguments, complaint):
    done = run(program, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert complaint in done.stderr
    assert "usage: copy_reverse" in done.stderr
