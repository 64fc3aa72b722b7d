"""Kernel regression against what a user would write instead.

Shapes are (B, H, L, S, D, Dv); one bandwidth, D ** 0.25. KeOps runs symbolic matrices on all cores;
its formulas are compiled at their first call, seven for each shape, ten to fifteen seconds each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mixhead
import torch
import torch.nn.functional as F
from harness import Ceilings, Result, compare, forward_and_backward, name_of

WIDE = (1, 8, 2048, 2048, 64, 64)
WIDE_KEOPS = (1, 2, 2048, 2048, 64, 64)  # a quarter of the heads: KeOps takes 15 s for all of them
NARROW = (1, 1, 8192, 8192, 3, 1)
ONE_HEAD = (1, 1, 8192, 8192, 64, 64)
GAUSSIAN_GOALS = {"cdist": (16.0, 11.0), "SDPA + bias": (1.2, 2.7)}


@dataclass
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bandwidth: torch.Tensor

    @classmethod
    def random(cls, shape, requires_grad=False) -> "Inputs":
        batch, heads, rows, keys, depth, wide = shape
        generator = torch.Generator().manual_seed(0)
        sizes = [(rows, depth), (keys, depth), (keys, wide)]
        tensors = [
            torch.randn(batch, heads, *size, generator=generator).requires_grad_(requires_grad)
            for size in sizes
        ]
        return cls(*tensors, torch.tensor(depth**0.25))

    def leaves(self):
        return self.query, self.key, self.value


def ours(x: Inputs, kernel: str):
    return mixhead.kernel_attention(x.query, x.key, x.value, x.bandwidth, kernel)


LOG_KERNELS = {
    "gaussian": lambda u: -u.square() / 2,
    "laplacian": lambda u: -u,
    "matern32": lambda u: torch.log1p(3**0.5 * u) - 3**0.5 * u,
    "matern52": lambda u: torch.log1p(5**0.5 * u + 5 * u.square() / 3) - 5**0.5 * u,
}


def cdist(x: Inputs, kernel: str):
    """All distances, then a softmax of the kernel's logarithm."""
    distance = torch.cdist(x.query / x.bandwidth, x.key / x.bandwidth)
    return LOG_KERNELS[kernel](distance).softmax(-1) @ x.value


def sdpa(x: Inputs, kernel: str):
    """A gaussian as scaled_dot_product_attention with a bias for each key."""
    assert kernel == "gaussian"
    query, key = x.query / x.bandwidth, x.key / x.bandwidth
    bias = -key.square().sum(-1, keepdim=True).mT / 2
    return F.scaled_dot_product_attention(query, key, x.value, attn_mask=bias, scale=1.0)


def keops(x: Inputs, kernel: str):
    """Symbolic matrices: never stored, one reduction for the sums and one for the mass."""
    from pykeops.torch import LazyTensor

    query = LazyTensor((x.query / x.bandwidth).unsqueeze(-2))
    key = LazyTensor((x.key / x.bandwidth).unsqueeze(-3))
    square = ((query - key) ** 2).sum(-1)
    weights = {"gaussian": lambda: -square / 2, "laplacian": lambda: -square.sqrt()}[kernel]()
    return weights.exp() @ x.value / weights.exp().sum(x.query.dim() - 1)


PEERS = {"cdist": cdist, "SDPA + bias": sdpa, "KeOps": keops}


# Multiply-adds of an exponential of floats: the reduction of its argument, six steps of Horner's
# rule, and what scales the result.
EXPONENTIAL = 11


def operations(shape, training: bool) -> float:
    """Of the bare products and exponentials, a multiply-add counted as two. A forward has a product
    of each kind; a backward makes the distances and exponentials again, and four products more."""
    batch, heads, rows, keys, depth, wide = shape
    steps = depth + wide + EXPONENTIAL
    if training:
        steps += 3 * depth + 2 * wide + EXPONENTIAL
    return 2.0 * batch * heads * rows * keys * steps


def rows(shape, kernel, goals, ceilings: Ceilings, seconds=4.0) -> Iterator[Result]:
    """Forward, then forward and backward; goals[peer] = (forward, both)."""
    for training in (False, True):
        least = ceilings.seconds(operations(shape, training), 0, torch.float32)
        x = Inputs.random(shape, training)
        work = f"{kernel} {'forward + backward' if training else 'forward'}"
        for peer, goal in goals.items():
            calls = [lambda: ours(x, kernel), lambda p=PEERS[peer]: p(x, kernel)]  # noqa: B023
            if training:
                calls = [forward_and_backward(call, x.leaves()) for call in calls]
            mine, theirs, ratio = compare(*calls, seconds=seconds)
            yield Result(
                work, str(shape), name_of(torch.float32), peer, theirs, mine, ratio,
                goal[training], roof=theirs / least,
            )  # fmt: skip


def wide(ceilings: Ceilings) -> Iterator[Result]:
    yield from rows(WIDE, "gaussian", GAUSSIAN_GOALS, ceilings)
    for kernel in ("laplacian", "matern32", "matern52"):
        yield from rows(WIDE, kernel, {"cdist": (8.0, 4.5)}, ceilings)


def one_head(ceilings: Ceilings) -> Iterator[Result]:
    yield from rows(ONE_HEAD, "gaussian", GAUSSIAN_GOALS, ceilings)


def wide_keops(ceilings: Ceilings) -> Iterator[Result]:
    yield from rows(WIDE_KEOPS, "gaussian", {"KeOps": (26.0, 65.0)}, ceilings, seconds=1.0)


def narrow(ceilings: Ceilings) -> Iterator[Result]:
    goal = (12.0, 15.0)
    peers = {"cdist": goal, "SDPA + bias": goal, "KeOps": goal}
    yield from rows(NARROW, "gaussian", peers, ceilings, seconds=3.0)


def compact(ceilings: Ceilings) -> Iterator[Result]:
    """A compact kernel on sorted points, as a user's sliding window gives them; no goal."""
    shape = (1, 1, 8192, 8192, 1, 1)
    x = Inputs.random(shape)
    x.query, x.key = x.query.sort(-2).values, x.key.sort(-2).values
    x.bandwidth = torch.tensor(0.1)
    for kernel in ("epanechnikov", "tricube", "boxcar"):
        mine, theirs, ratio = compare(
            lambda k=kernel: ours(x, k), lambda k=kernel: dense_compact(x, k), seconds=3.0
        )
        read, skipped = torch.ops.mixhead._kernel_attention_blocks()
        yield Result(
            f"{kernel} forward, sorted", str(shape), "float32", "dense", theirs, mine, ratio, None,
            note=f"{skipped / (read + skipped):.0%} of blocks skipped",
        )  # fmt: skip


def dense_compact(x: Inputs, kernel: str):
    u = torch.cdist(x.query / x.bandwidth, x.key / x.bandwidth)
    weights = {
        "epanechnikov": lambda: (1 - u.square()).clamp_min(0),
        "tricube": lambda: (1 - u**3).clamp_min(0) ** 3,
        "boxcar": lambda: (u <= 1).float(),
    }[kernel]()
    return weights @ x.value / weights.sum(-1, keepdim=True)


GROUPS = {
    "kernel_wide": wide,
    "kernel_one_head": one_head,
    "kernel_keops": wide_keops,
    "kernel_narrow": narrow,
    "kernel_compact": compact,
}
