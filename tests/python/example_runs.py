"""Runs an example as a user would, small, and reads the figures of its last line."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from shared.goals import missed  # noqa: E402


def run_example(folder: Path, *arguments: object) -> tuple[str, dict]:
    """Standard output of `run.py --quick`, and the figures of its last line."""
    command = [sys.executable, folder / "run.py", "--quick", *arguments]
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("RESULT ")
    return result.stdout, json.loads(last.removeprefix("RESULT "))


def assert_files(out: Path, *names: str) -> None:
    """These are in the folder and nothing else, and what should be a picture is one."""
    assert {path.name for path in out.iterdir()} == set(names)
    for name in names:
        if name.endswith(".png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")


def goals_of(folder: Path) -> dict:
    """What the example's goals.py says its figures are to be."""
    return runpy.run_path(str(folder / "goals.py"))["GOALS"]


def assert_goals(folder: Path, figures: dict) -> None:
    assert missed(goals_of(folder), figures) == []
