"""Sharded attention in two processes against the operator over the whole memory in one."""

import datetime

import mixhead
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

RANKS, BATCH, HEADS, KV_HEADS, LENGTH, KEYS, SIZE, VALUE_SIZE = 2, 2, 4, 2, 3, 5, 4, 6
SHARDS = [7, 2]

CASES = {
    "gate": {"rule": "gate"},
    "joint": {"rule": "joint"},
    "causal, masks, scale": {
        "rule": "joint",
        "is_causal": True,
        "scale": 0.3,
        "attn_mask": True,
        "memory_mask": True,
    },
    "index": {"rule": "gate", "memory_index": True},
    "an empty shard": {"rule": "joint", "shards": [0, 9]},
    "no memory at all": {"rule": "gate", "shards": [0, 0]},
    "gate per channel": {"rule": "gate", "mix_shape": (HEADS, 1, VALUE_SIZE)},
}


def problem(case):
    """The same numbers in every process: what each rank has, and the memory as a whole."""
    options = dict(CASES[case])
    shards = options.pop("shards", SHARDS)
    generator = torch.Generator().manual_seed(11)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    ranks = [
        {
            "query": random(BATCH, HEADS, LENGTH, SIZE),
            "key": random(BATCH, KV_HEADS, KEYS, SIZE),
            "value": random(BATCH, KV_HEADS, KEYS, VALUE_SIZE),
        }
        for _ in range(RANKS)
    ]
    slots = sum(shards)
    whole = {
        "memory_key": random(KV_HEADS, slots, SIZE),
        "memory_value": random(KV_HEADS, slots, VALUE_SIZE),
        "mix": random(*options.pop("mix_shape", (HEADS, 1, 1))),
    }
    if options.pop("attn_mask", False):
        for rank in ranks:
            rank["attn_mask"] = random(LENGTH, KEYS)
    if options.pop("memory_mask", False):
        whole["memory_mask"] = random(HEADS, 1, slots) > -0.5
    if options.pop("memory_index", False):
        for rank in ranks:
            index = torch.randint(-1, slots, (BATCH, HEADS, LENGTH, 4), generator=generator)
            rank["memory_index"] = index
    return ranks, whole, {**options, "enable_gqa": True, "return_lse": True}, shards


def loss_of(outputs):
    """A sum that weighs every output, and the log-sum-exps of rows that read something."""
    output, self_lse, memory_lse = outputs
    finite = memory_lse.masked_fill(memory_lse == -torch.inf, 0.0)
    return output.sin().sum() + self_lse.cos().sum() + finite.square().sum()


def leaves(tensors):
    return {
        name: tensor.requires_grad_()
        for name, tensor in tensors.items()
        if tensor.dtype.is_floating_point
    }


def expected_outputs(case):
    """Outputs of every rank; gradients of each rank's inputs and of the whole memory."""
    ranks, whole, options, _ = problem(case)
    memory_leaves = leaves(whole)
    outputs, gradients, total = [], [], 0.0
    for rank in ranks:
        leaves(rank)
        outputs.append(mixhead.mixed_attention(**rank, **whole, **options))
        total = total + loss_of(outputs[-1])
    total.backward()
    for rank in ranks:
        gradients.append({name: t.grad for name, t in rank.items() if t.requires_grad})
    return outputs, gradients, {name: tensor.grad for name, tensor in memory_leaves.items()}


def sharded(rank, case):
    ranks, whole, options, shards = problem(case)
    own = ranks[rank]
    first = sum(shards[:rank])
    shard = {
        name: tensor
        if name == "mix"
        else tensor.narrow(-1 if "mask" in name else 1, first, shards[rank])
        for name, tensor in whole.items()
    }
    shard = {name: tensor.detach().clone() for name, tensor in shard.items()}
    leaves(own)
    leaves(shard)
    outputs = mixhead.distributed.mixed_attention(**own, **shard, **options)
    loss_of(outputs).backward()
    return outputs, own, shard, slice(first, first + shards[rank])


def check(rank, case):
    outputs, own, shard, slots = sharded(rank, case)
    all_outputs, all_gradients, memory_gradients = expected_outputs(case)
    close = {"rtol": 0, "atol": 1e-10}
    for mine, theirs in zip(outputs, all_outputs[rank], strict=True):
        torch.testing.assert_close(mine, theirs, **close)
    for name, gradient in all_gradients[rank].items():
        torch.testing.assert_close(own[name].grad, gradient, **close)
    # The whole gradient of a shard, of every rank's queries, is on its own rank.
    for name in ("memory_key", "memory_value"):
        torch.testing.assert_close(shard[name].grad, memory_gradients[name][:, slots], **close)
    # A parameter that every rank holds gets its share on each: the sum is the whole.
    mix_gradient = shard["mix"].grad.clone()
    dist.all_reduce(mix_gradient)
    torch.testing.assert_close(mix_gradient, memory_gradients["mix"], **close)


def check_errors(rank):
    ranks, whole, _, _ = problem("gate")
    own = ranks[rank]

    def refused(message, **changes):
        with pytest.raises(RuntimeError, match=message):
            mixhead.distributed.mixed_attention(**{**own, **whole, **changes})

    query = own["query"]
    refused(r"query must be alike on all ranks", query=query[: BATCH - rank])
    refused(r"memory_key must be alike", memory_key=whole["memory_key"][..., : SIZE - rank])
    # An error of one rank is raised on both: neither waits for the other.
    bad = {"memory_key": whole["memory_key"][None]} if rank == 1 else {}
    refused(r"memory_key must be a shard .* got \(1, 2, 9, 4\) on rank 1", **bad)
    refused(r"rule must be 'gate' or 'joint', got 'sum' on rank 0", rule="sum")
    per_query = torch.ones(LENGTH, 9, dtype=torch.bool)
    refused(r"memory_mask must broadcast to \(Hq, 1, M\)", memory_mask=per_query)
    index = torch.zeros(BATCH, HEADS, LENGTH, 1, dtype=torch.int64)
    refused(r"memory_index must be alike", memory_index=index if rank else None)


def process(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        for case in CASES:
            try:
                check(rank, case)
            except Exception as error:
                raise AssertionError(f"case '{case}' on rank {rank}") from error
        check_errors(rank)
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    multiprocessing.spawn(process, args=(tmp_path / "store",), nprocs=RANKS)
