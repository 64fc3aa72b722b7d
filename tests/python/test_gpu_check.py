"""tools/gpu_check.sh works before a GPU is at hand: the same script on CPU tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_runs_on_a_cpu(tmp_path):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OUT": str(tmp_path),
        "GROUPS_OF_BENCHMARK": "one_query kernels search",
    }
    run = subprocess.run(
        ["tools/gpu_check.sh", "--device", "cpu"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    check = json.loads((tmp_path / "check.json").read_text())
    assert not check["failures"]
    assert check["count"] > 90
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert len(rows) == 7
    assert all(row["seconds"] > 0 for row in rows)
