"""examples/07_matching: its figures, its controls, and the C++ program that trains."""

import re
import subprocess
import sys
from pathlib import Path

import mixhead
import pytest
import torch
from example_runs import ROOT, assert_files, run_example

FOLDER = ROOT / "examples" / "07_matching"
# Outside of the temporary folder, so that a second run of the tests has nothing to compile.
APP_BUILD = ROOT / "build" / "examples" / f"matching_app-{torch.__version__.split('+')[0]}"


@pytest.fixture(scope="module")
def matching(tmp_path_factory):
    out = tmp_path_factory.mktemp("matching")
    return out, run_example(FOLDER, "--out", out)[1]


def test_figures(matching):
    figures = matching[1]
    assert figures["marginal_residual"] <= 1e-6
    assert figures["valid_permutations"] == 1.0
    assert figures["matching_unfilled"] <= 0.2
    assert figures["plan_cost_gap"] <= 0.02
    assert figures["cost_gap_to_hungarian"] <= 0.01
    # A few seconds of training: the full figure is that of the default run.
    assert figures["learned_two_criteria_rows"] >= 0.85
    assert figures["role_swap_follows_features"] is True


def test_controls_fail_as_predicted(matching):
    figures = matching[1]
    assert abs(figures["row_softmax_unfilled"] - (63 / 64) ** 64) <= 0.015
    assert figures["one_criterion_rows"] <= 0.6


def test_files(matching):
    assert_files(matching[0], "plans.png", "learning.png", "matching.pt")


def test_saved_layer_matches(matching):
    layer = torch.jit.load(matching[0] / "matching.pt")
    plan = layer.log_plan(torch.randn(9, 8), torch.randn(9, 8)).exp()
    torch.testing.assert_close(plan.sum(-1), torch.ones(9), rtol=0, atol=1e-4)
    assert mixhead.assignment(plan.detach()).sort().values.tolist() == list(range(9))


@pytest.fixture(scope="module")
def program():
    tools = Path(sys.executable).parent
    configure = [
        tools / "cmake", "-S", FOLDER, "-B", APP_BUILD, "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
        f"-DCMAKE_PREFIX_PATH={mixhead.cmake_prefix_path}", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    for command in (configure, [tools / "ninja", "-C", APP_BUILD]):
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return APP_BUILD / "matching"


def test_cpp_program_trains(program):
    command = [program, "--steps", "100", "--tests", "60", "--jobs", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after = re.search(r"(0\.\d+) before training, (\d\.\d+) after", done.stdout).groups()
    assert float(before) <= 0.4
    assert float(after) >= 0.6


@pytest.mark.parametrize(
    "arguments", [["--jobs"], ["--jobs", "none"], ["--jobs", "0"], ["--what", "1"]]
)
def test_cpp_program_explains_its_usage(program, arguments):
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: matching [--jobs N]")
