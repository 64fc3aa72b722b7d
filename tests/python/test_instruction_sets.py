"""The operators' values once more for each instruction set, each with another number of threads.

The set is chosen when the library is first called, hence a process for each. The suite itself runs
with the best set that the processor has.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [
    str(HERE / name)
    for name in (
        "test_accuracy.py",
        "test_mixed_attention.py",
        "test_mixed_attention_meaning.py",
        "test_mixed_attention_dropout.py",
        "test_topk_keys.py",
        "test_local_linear_engine.py",
    )
]
# Values, gradients and their bits; derivatives by finite differences don't depend on the set.
CHOSEN = "float64 or float32 or half or bits or thread or nan or infinity or dropout"


@pytest.mark.parametrize(
    ("isa", "threads"),
    [("default", 4), ("avx2", 1), ("avx512", 2)],
    ids=["default", "avx2", "avx512"],
)
def test_values(isa, threads):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            CHOSEN,
            *FILES,
        ],
        env=os.environ | {"MIXHEAD_ISA": isa, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "MIXHEAD_ISA must be one of" in done.stdout:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout + done.stderr
