"""Mixed attention against what a user would write instead: the rows of the table.

Shapes are (B, H, L, M, D): a causal sequence of L tokens and a memory of M slots that the batch
shares.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mixhead
import torch
import torch.nn.functional as F
from harness import Ceilings, Result, compare, forward_and_backward, name_of

DENSE = (2, 8, 1024, 4096, 64)
OTHER_SHAPES = [
    (8, 8, 128, 4096, 64),
    (4, 4, 100, 2048, 32),
    (2, 4, 512, 2048, 80),
    (2, 4, 512, 2048, 96),
    (1, 4, 1024, 2048, 128),
    (1, 4, 512, 1024, 256),
    (1, 1, 8192, 2048, 64),
]


@dataclass
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    memory_key: torch.Tensor
    memory_value: torch.Tensor
    mix: torch.Tensor

    @classmethod
    def random(cls, shape, dtype, requires_grad=False) -> "Inputs":
        batch, heads, rows, slots, depth = shape
        generator = torch.Generator().manual_seed(0)

        def tensor(*size, dtype=dtype):
            drawn = torch.randn(*size, generator=generator).to(dtype)
            return drawn.requires_grad_(requires_grad)

        sequence = [tensor(batch, heads, rows, depth) for _ in range(3)]
        memory = [tensor(heads, slots, depth) for _ in range(2)]
        return cls(*sequence, *memory, tensor(heads, 1, 1))

    def all(self):
        return (
            self.query,
            self.key,
            self.value,
            self.memory_key,
            self.memory_value,
            self.mix,
        )


def ours(x: Inputs, rule: str):
    return mixhead.mixed_attention(*x.all(), rule=rule, is_causal=True)


def two_sdpa(x: Inputs):
    """Two calls of scaled_dot_product_attention, the memory expanded over the batch, a gate."""
    batch = x.query.shape[0]
    local = F.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=True)
    memory = F.scaled_dot_product_attention(
        x.query, x.memory_key.expand(batch, -1, -1, -1), x.memory_value.expand(batch, -1, -1, -1)
    )
    return torch.lerp(local, memory, torch.sigmoid(x.mix).expand_as(local))


def dense_einsum(x: Inputs):
    """One query against a shared memory by einsum and softmax, and SDPA for the sequence."""
    local = F.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=True)
    scores = torch.einsum("bhld,hmd->bhlm", x.query, x.memory_key) * x.query.shape[-1] ** -0.5
    memory = torch.einsum("bhlm,hmd->bhld", scores.softmax(-1), x.memory_value)
    return torch.lerp(local, memory, torch.sigmoid(x.mix).expand_as(local))


def concat_sdpa(x: Inputs):
    """The joint softmax as a user writes it: concatenated keys and an additive mask."""
    batch, heads, rows, _ = x.query.shape
    slots = x.memory_key.shape[-2]
    keys = torch.cat([x.key, x.memory_key.expand(batch, -1, -1, -1)], -2)
    values = torch.cat([x.value, x.memory_value.expand(batch, -1, -1, -1)], -2)
    causal = torch.full((rows, rows), -torch.inf, dtype=x.query.dtype).triu(1)
    mask = torch.cat([causal.expand(heads, -1, -1), x.mix.expand(-1, rows, slots)], -1)
    return F.scaled_dot_product_attention(x.query, keys, values, attn_mask=mask)


def flex(x: Inputs):
    """FlexAttention compiled, the joint softmax as a score and a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, _, rows, _ = x.query.shape
    slots = x.memory_key.shape[-2]
    mix = x.mix.flatten().float()
    keys = torch.cat([x.key, x.memory_key.expand(batch, -1, -1, -1)], -2)
    values = torch.cat([x.value, x.memory_value.expand(batch, -1, -1, -1)], -2)

    def score(score, b, h, q, k):
        return torch.where(k >= rows, score + mix[h], score)

    def reads(b, h, q, k):
        return (k >= rows) | (k <= q)

    block_mask = create_block_mask(reads, None, None, rows, rows + slots, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(x.query, keys, values, score_mod=score, block_mask=block_mask)


def forward_flops(shape) -> float:
    """Multiply-adds times two of both products; half the sequence is past the diagonal."""
    batch, heads, rows, slots, depth = shape
    return 4.0 * batch * heads * depth * (rows * slots + rows * (rows + 1) / 2)


def forward_bytes(shape, dtype) -> int:
    """Every input once and the output."""
    batch, heads, rows, slots, depth = shape
    return heads * depth * (4 * batch * rows + 2 * slots) * dtype.itemsize


# Products of a step, forward and backward, for each of the forward alone: 2 + 5 for 2.
TRAINING = 3.5


def _row(
    group, shape, dtype, peer_name, ours_call, peer_call, goal, ceilings, training=False, **options
) -> Result:
    mine, theirs, ratio = compare(ours_call, peer_call, **options)
    operations = forward_flops(shape) * (TRAINING if training else 1.0)
    roof = theirs / ceilings.seconds(operations, forward_bytes(shape, dtype), dtype)
    return Result(
        group, str(shape), name_of(dtype), peer_name, theirs, mine, ratio, goal, roof=roof
    )


def _both_rules(shape, dtype, goals, training, ceilings, seconds) -> Iterator[Result]:
    """Gate against two SDPA, joint against concat + SDPA."""
    group = "forward + backward" if training else "forward"
    x = Inputs.random(shape, dtype, requires_grad=training)
    for rule, peer_name, peer in (("gate", "two SDPA", two_sdpa), ("joint", "concat", concat_sdpa)):
        calls = [lambda r=rule: ours(x, r), lambda p=peer: p(x)]
        if training:
            calls = [forward_and_backward(call, x.all()) for call in calls]
        yield _row(
            f"{rule} {group}", shape, dtype, peer_name, *calls, goals[rule], ceilings, training,
            seconds=seconds,
        )  # fmt: skip


def dense(ceilings: Ceilings) -> Iterator[Result]:
    goals = {
        (torch.float32, False): {"gate": 1.2, "joint": 2.4},
        (torch.bfloat16, False): {"gate": 2.2, "joint": 3.0},
        (torch.float32, True): {"gate": 1.3, "joint": 4.5},
        (torch.bfloat16, True): {"gate": 1.8, "joint": 6.0},
    }
    for (dtype, training), goal in goals.items():
        for result in _both_rules(DENSE, dtype, goal, training, ceilings, seconds=12.0):
            yield result
            if result.group == "gate forward":
                yield _share_of_multiply(dtype, ceilings)


def _share_of_multiply(dtype, ceilings: Ceilings) -> Result:
    """Products of the size that mm is fastest at, as many operations as the forward has, run
    alternately with it."""
    x = Inputs.random(DENSE, dtype)
    n = ceilings.fastest[name_of(dtype)]
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    count = max(round(forward_flops(DENSE) / (2 * n**3)), 1)

    def multiply():
        for _ in range(count):
            torch.mm(a, b)

    mine, theirs, ratio = compare(lambda: ours(x, "gate"), multiply, seconds=12.0)
    share = ratio * forward_flops(DENSE) / (2 * n**3 * count)
    speeds = [flops / 1e9 for flops in (forward_flops(DENSE) / mine, 2 * n**3 * count / theirs)]
    return Result(
        "share of mm's peak", str(DENSE), name_of(dtype), "torch.mm", theirs, mine, share,
        0.9 if dtype == torch.float32 else 0.7,
        note=f"{speeds[0]:.0f} of {speeds[1]:.0f} GFLOP/s", roof=1.0,
    )  # fmt: skip


def flex_joint(ceilings: Ceilings) -> Iterator[Result]:
    for dtype in (torch.float32, torch.bfloat16):
        x = Inputs.random(DENSE, dtype)
        with torch.no_grad():
            call = lambda x=x: ours(x, "joint")  # noqa: E731
            yield _row("joint forward", DENSE, dtype, "FlexAttention", call, flex(x), 1.5, ceilings)


def other_shapes(ceilings: Ceilings) -> Iterator[Result]:
    gate = {
        (torch.float32, False): 1.2,
        (torch.bfloat16, False): 2.2,
        (torch.float32, True): 1.3,
        (torch.bfloat16, True): 1.8,
    }
    for shape in OTHER_SHAPES:
        for (dtype, training), goal in gate.items():
            goals = {"gate": goal, "joint": 3.0 if training else 1.5}
            yield from _both_rules(shape, dtype, goals, training, ceilings, seconds=3.0)


def one_query(ceilings: Ceilings) -> Iterator[Result]:
    shape = (8, 8, 1, 65536, 64)
    goals = {torch.float32: (7.0, 3.0), torch.bfloat16: (40.0, 2.0)}
    for dtype, (sdpa_goal, einsum_goal) in goals.items():
        x = Inputs.random(shape, dtype)
        call = lambda x=x: ours(x, "gate")  # noqa: E731
        peers = [("two SDPA", two_sdpa, sdpa_goal), ("einsum", dense_einsum, einsum_goal)]
        for name, peer, goal in peers:
            other = lambda x=x, peer=peer: peer(x)  # noqa: E731
            yield _row("one query", shape, dtype, name, call, other, goal, ceilings)
        yield _share_of_read(x, shape, dtype, ceilings)
    shape = (1, 8, 1, 131072, 64)
    for dtype, goal in ((torch.float32, 1.7), (torch.bfloat16, 6.0)):
        x = Inputs.random(shape, dtype)
        yield _row(
            "one query", shape, dtype, "two SDPA", lambda x=x: ours(x, "gate"),
            lambda x=x: two_sdpa(x), goal, ceilings,
        )  # fmt: skip
        yield _share_of_read(x, shape, dtype, ceilings)


def _share_of_read(x: Inputs, shape, dtype, ceilings: Ceilings) -> Result:
    """A sum over as many bytes as the memory has, run alternately with the query that reads them:
    the bandwidth of a shared machine drifts within seconds."""
    size = x.memory_key.nbytes + x.memory_value.nbytes
    block = torch.ones(size // 4)
    mine, read, share = compare(lambda: ours(x, "gate"), block.sum)
    return Result(
        "share of read bandwidth", str(shape), name_of(dtype), "sum", read, mine, share, 0.85,
        note=f"{size / mine / 1e9:.1f} of {size / read / 1e9:.1f} GB/s",
        roof=read / max(read, ceilings.seconds(forward_flops(shape), 0, dtype)),
    )  # fmt: skip


def one_head(ceilings: Ceilings) -> Iterator[Result]:
    shape = (1, 1, 1024, 16384, 64)
    for dtype in (torch.float32, torch.bfloat16):
        x = Inputs.random(shape, dtype, requires_grad=True)
        calls = [
            forward_and_backward(call, x.all())
            for call in (lambda x=x: ours(x, "gate"), lambda x=x: two_sdpa(x))
        ]
        yield _row(
            "B*H = 1, forward + backward", shape, dtype, "two SDPA", *calls, 2.0, ceilings, True
        )


def small_call(ceilings: Ceilings) -> Iterator[Result]:
    shape = (1, 4, 16, 16, 32)
    for dtype in (torch.float32, torch.bfloat16):
        x = Inputs.random(shape, dtype)
        yield _row(
            "small call", shape, dtype, "two SDPA", lambda x=x: ours(x, "gate"),
            lambda x=x: two_sdpa(x), 1.0, ceilings, calls=200, seconds=2.0,
        )  # fmt: skip


GROUPS = {
    "dense": dense,
    "one_query": one_query,
    "one_head": one_head,
    "small_call": small_call,
    "other_shapes": other_shapes,
    "flex": flex_joint,
}
