"""topk_keys against what a user would search with instead.

Shapes are (queries, keys, k, D). faiss is the exact index, IndexFlatIP; it is given OpenMP threads
that sleep while others work, as both run in one process.
"""

from collections.abc import Iterator

import mixhead
import torch
from harness import Ceilings, Result, compare, name_of

MAIN = (512, 1_000_000, 32, 64)
OTHER_SHAPES = [(1, 1_000_000, 32, 64), (512, 100_000, 8, 128), (4096, 50_000, 32, 64)]


def matmul_topk(query, key, k):
    return torch.topk(query @ key.mT, k)


def faiss_flat(query, key, k):
    """The search of a ready index: adding the keys to it is not measured."""
    import faiss

    index = faiss.IndexFlatIP(key.shape[-1])
    index.add(key[0].numpy())
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = query[0].numpy()
    return lambda: index.search(rows, k)


def rows(shape, dtype, goals, seconds=8.0) -> Iterator[Result]:
    queries, keys, k, depth = shape
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, queries, depth, generator=generator).to(dtype)
    key = torch.randn(1, keys, depth, generator=generator).to(dtype)
    for peer, goal in goals.items():
        search = (
            faiss_flat(query, key, k) if peer == "faiss" else lambda: matmul_topk(query, key, k)
        )
        mine, theirs, ratio = compare(lambda: mixhead.topk_keys(query, key, k), search, 1, seconds)
        speed = 2.0 * queries * keys * depth / mine / 1e9
        yield Result(
            "topk_keys",
            str(shape),
            name_of(dtype),
            peer,
            theirs,
            mine,
            ratio,
            goal,
            note=f"{speed:.0f} GFLOP/s",
        )


def search(ceilings: Ceilings) -> Iterator[Result]:
    yield from rows(MAIN, torch.float32, {"faiss": 2.5, "matmul + topk": 2.5})
    yield from rows(MAIN, torch.bfloat16, {"matmul + topk": 2.5})
    for shape in OTHER_SHAPES:
        yield from rows(shape, torch.float32, {"faiss": None, "matmul + topk": None}, seconds=3.0)


GROUPS = {"topk": search}
