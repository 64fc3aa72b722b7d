"""How a comparison is measured: both sides in one process, interleaved, medians of repeats.

Machines are shared and their speed drifts, so a time alone says little. Every figure is a ratio
(peer's time / ours) whose two sides were run alternately, and the ceilings of the machine are
measured in the same run.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

# What the measuring time of every comparison is multiplied with.
time_scale = 1.0


@dataclass
class Result:
    """One line of the table. Times in seconds; ``ratio`` is what ``goal`` is compared with."""

    group: str
    work: str
    dtype: str
    peer: str
    peer_seconds: float
    seconds: float
    ratio: float
    goal: float | None
    unit: str = "x"
    note: str = ""
    # The ratio that the machine's own ceilings allow: the peer's time over that of the bare
    # arithmetic at torch.mm's speed, or of the bare reading.
    roof: float | None = None

    @property
    def met(self) -> bool:
        return self.goal is None or self.ratio >= self.goal

    @property
    def failed(self) -> bool:
        """Short of the goal by more than the 10 % that noise may take."""
        return self.goal is not None and self.ratio < 0.9 * self.goal

    def as_dict(self) -> dict:
        return asdict(self) | {"met": self.met}


def interleaved(
    functions: list[Callable[[], object]], seconds: float = 6.0, repeats: tuple[int, int] = (3, 41)
) -> list[list[float]]:
    """Times of each function, run alternately for about ``seconds`` after one warm-up each."""
    once = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        once.append(time.perf_counter() - start)
    count = int(min(max(time_scale * seconds / sum(once), repeats[0]), repeats[1]))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(count):
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return times


def compare(
    ours: Callable[[], object],
    peer: Callable[[], object],
    calls: int = 1,
    seconds: float = 6.0,
) -> tuple[float, float, float]:
    """(our median seconds, the peer's, median of the pairwise ratios); ``calls`` a measurement."""

    def many(function):
        def run():
            for _ in range(calls):
                function()

        return run if calls > 1 else function

    mine, theirs = interleaved([many(ours), many(peer)], seconds)
    ratio = statistics.median(p / o for o, p in zip(mine, theirs, strict=True))
    return statistics.median(mine) / calls, statistics.median(theirs) / calls, ratio


@dataclass
class Ceilings:
    """The machine's own peak in this run: GFLOP/s of ``torch.mm``, GB/s of a streaming read."""

    multiply: dict[str, float] = field(default_factory=dict)
    fastest: dict[str, int] = field(default_factory=dict)  # the size that multiply was seen at
    read: float = 0.0

    @classmethod
    def measure(cls) -> "Ceilings":
        found = cls()
        for dtype in (torch.float32, torch.bfloat16):
            speeds = {_multiply_speed(n, dtype): n for n in (512, 1024, 2048)}
            found.multiply[name_of(dtype)] = max(speeds)
            found.fastest[name_of(dtype)] = speeds[max(speeds)]
        block = torch.ones(256 * 2**20 // 4)
        (times,) = interleaved([block.sum], seconds=1.5)
        found.read = block.nbytes / min(times) / 1e9
        return found

    def seconds(self, operations: float, bytes_read: float, dtype: torch.dtype) -> float:
        """The least time that takes so many operations and bytes."""
        arithmetic = operations / self.multiply[name_of(dtype)] / 1e9
        return max(arithmetic, bytes_read / self.read / 1e9)


def _multiply_speed(n: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    (times,) = interleaved([lambda: torch.mm(a, b)], seconds=0.5, repeats=(5, 200))
    return 2 * n**3 / min(times) / 1e9


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forward_and_backward(function, inputs):
    """A step: forward, a fixed incoming gradient, gradients of every input."""
    grad = torch.randn_like(function())

    def run():
        return torch.autograd.grad(function(), inputs, grad)

    return run
