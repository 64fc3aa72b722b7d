"""Entropic matching of two clouds of points against POT, the library of optimal transport."""

import warnings
from collections.abc import Iterator

import mixhead
import torch
from harness import Ceilings, Result, compare, name_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it looks for every array library there is
    import ot

SIZE, CHANNELS, ITERATIONS = 4096, 8, 10
BANDWIDTH = 2.0


def _ours(x: torch.Tensor, y: torch.Tensor):
    h = torch.tensor(BANDWIDTH, dtype=x.dtype)
    options = {"iterations": ITERATIONS, "tolerance": 0.0}
    return mixhead.matching_attention(x, y, y, h, "gaussian", **options)[0]


def _pot(x: torch.Tensor, y: torch.Tensor):
    """The plan in POT's log domain, then the same weighted means."""
    mass = torch.full((SIZE,), 1.0 / SIZE, dtype=x.dtype)
    cost = ot.dist(x[0], y[0]) / 2
    plan = ot.sinkhorn(
        mass, mass, cost, BANDWIDTH**2, method="sinkhorn_log",
        numItermax=ITERATIONS, stopThr=0.0, warn=False,
    )  # fmt: skip
    return SIZE * plan @ y[0]


def matching(ceilings: Ceilings) -> Iterator[Result]:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        x, y = torch.randn(2, 1, SIZE, CHANNELS, generator=generator, dtype=dtype).unbind()
        assert torch.allclose(_ours(x, y)[0], _pot(x, y), atol=1e-3)
        mine, theirs, ratio = compare(lambda x=x, y=y: _ours(x, y), lambda x=x, y=y: _pot(x, y))
        shape = f"({SIZE},{SIZE},{CHANNELS})"
        yield Result(
            f"matching, {ITERATIONS} iterations", shape, name_of(dtype), "POT", theirs, mine, ratio,
            3.0,
        )  # fmt: skip


GROUPS = {"matching": matching}
