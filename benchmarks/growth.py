"""How time grows with the number of tokens and of memory slots, and the memory a call takes.

Time must be linear in each; beyond inputs and outputs a call may hold 64 MiB, whatever its size.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mixhead
import torch
from harness import Ceilings, Result, interleaved
from mixed_attention import Inputs, ours

SIZES = [2**k for k in (10, 12, 14, 16, 18, 20)]
LIMIT = 64 * 2**20
MEMORY_SHAPES = [(8, 8, 128, 65536, 64), (2, 8, 1024, 4096, 64), (8, 8, 1, 65536, 64)]


def _curve(inputs_of: Callable[[int], Inputs], backward: bool) -> list[tuple[int, float]]:
    """The least time of each size; sizes take turns, so that a slow minute meets all of them."""

    def call_of(size: int) -> Callable[[], None]:
        x, calls = inputs_of(size), max(2**14 // size, 1)

        def call():
            for _ in range(calls):
                output = mixhead.mixed_attention(*x.all())
                if backward:
                    torch.autograd.grad(output.sum(), x.all())

        return call

    times = interleaved([call_of(size) for size in SIZES], seconds=8.0, repeats=(6, 21))
    return [
        (size, min(found) / max(2**14 // size, 1)) for size, found in zip(SIZES, times, strict=True)
    ]


def _growth(group: str, curve: list[tuple[int, float]]) -> Result:
    """Time per element from 16k on, where a fixed cost no longer shows: largest over smallest."""
    each = [seconds / size for size, seconds in curve if size >= 2**14]
    spread = max(each) / min(each)
    return Result(
        group, f"{SIZES[0]} to {SIZES[-1]}", "float32", "linear", 0.0, curve[-1][1],
        1.0 / spread, 1 / 1.15, note=json.dumps([[size, round(s, 5)] for size, s in curve]),
    )  # fmt: skip


def growth(ceilings: Ceilings) -> Iterator[Result]:
    for backward, name in ((False, "forward"), (True, "forward + backward")):

        def of_slots(size, backward=backward):
            return Inputs.random((1, 1, 64, size, 64), torch.float32, backward)

        def of_rows(size, backward=backward):
            few = Inputs.random((1, 1, 64, 64, 64), torch.float32, backward)
            few.query = torch.randn(1, 1, size, 64).requires_grad_(backward)
            return few

        yield _growth(f"growth in M, {name}", _curve(of_slots, backward))
        yield _growth(f"growth in L, {name}", _curve(of_rows, backward))


def memory(ceilings: Ceilings) -> Iterator[Result]:
    for shape in MEMORY_SHAPES:
        for training in (False, True):
            extra = _extra_bytes(shape, training)
            yield Result(
                "memory above inputs and outputs", str(shape),
                "float32", "64 MiB", 0.0, 0.0, LIMIT / max(extra, 1), 1.0,
                note=f"{extra / 2**20:.1f} MiB, " + ("training" if training else "forward"),
            )  # fmt: skip


def _extra_bytes(shape, training: bool) -> int:
    """Peak resident memory of a call, in a process of its own, above inputs and outputs."""
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(shape), str(int(training))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _measure_one(shape, training: bool) -> None:
    batch, heads, rows, _, depth = shape
    warm = Inputs.random((1, heads, 2, 2, depth), torch.float32, requires_grad=training)
    small = ours(warm, "gate")
    if training:
        small.sum().backward()
    x = Inputs.random(shape, torch.float32, requires_grad=training)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _resident("VmRSS")
    output = ours(x, "gate")
    # beside the output: both log-sum-exps, and both sides' outputs where a backward will read them
    kept = (3 if training else 1) * output.nbytes + 2 * batch * heads * rows * 4
    if training:
        output.backward(torch.ones_like(output))
        kept += output.nbytes + sum(tensor.grad.nbytes for tensor in x.all())
    print(max(_resident("VmHWM") - before - kept, 0))


GROUPS = {"growth": growth, "memory": memory}

if __name__ == "__main__":
    _measure_one(json.loads(sys.argv[1]), sys.argv[2] == "1")
