"""Attention over a memory that is sharded over the ranks of a `torch.distributed` group."""

import torch
import torch.distributed as dist
from torch import Tensor

from mixhead import functional
from mixhead._errors import shape_text
from mixhead.layers.weights import memory_share


class _Exchange(torch.autograd.Function):
    """Row ``i`` of ``tensor (ranks, ...)`` goes to rank ``i``; the result's row ``i`` came from it.

    The exchange is a permutation of numbers over ranks and its own inverse, so its gradient is the
    exchange of the gradient.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        received = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        dist.all_to_all_single(received, tensor.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad, ctx.group), None


def mixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    mix: Tensor,
    *,
    rule: str = "gate",
    attn_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    memory_index: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""`mixhead.mixed_attention` over a memory of which each rank holds a shard.

    Every rank calls this with its own queries, keys and values and its own shard; the memory of all
    is the shards in the order of the ranks. The queries of all ranks visit every shard, and the
    parts come back and are merged exactly by their log-sum-exps (`mixhead.merge_attention`):

    .. math::
        l_m = \log \sum_r e^{l_r}, \qquad A_m = \sum_r e^{l_r - l_m} A_r

    A rank sends its queries and receives ``Dv + 1`` numbers per query, head and shard; the memory
    never moves, and the gradient of a shard is whole on its rank. Gradients of the other arguments
    are those of this rank's queries, so average parameters' over the ranks as for any data-parallel
    model. Backward communicates too: all ranks must call it.

    Args:
        query: ``(B, Hq, L, D)``, of one shape on all ranks.
        key: ``(B, H, S, D)`` of this rank.
        value: ``(B, H, S, Dv)`` of this rank.
        memory_key: this rank's shard ``(H, M, D)``; ``M`` may differ between ranks and be 0.
        memory_value: ``(H, M, Dv)``.
        mix: as in `mixhead.mixed_attention`.
        memory_mask: for this rank's slots, the same for all queries: broadcasts to
            ``(Hq, 1, M)``, bool (True: may be read) or additive float.
        memory_index: int64 ``(B, Hq, L, K)`` on every rank or on none: slots counted through all
            shards in the order of the ranks, -1 for none.
        group: the ranks that share the memory; the default group where None.
        rule, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse: as in
            `mixhead.mixed_attention`, the same on all ranks but for ``attn_mask``.

    Returns:
        As `mixhead.mixed_attention`: the output for this rank's queries; with ``return_lse=True``
        also the log-sum-exps over its sequence and over the whole memory.

    Raises:
        RuntimeError: an argument does not fit, or the ranks differ in what must be the same.
    """
    error = _shard_error(rule, memory_key, memory_value, memory_mask)
    slots = _agree(error, query, memory_key, memory_value, memory_index, group)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if memory_index is not None:
        memory_index = _Exchange.apply(_to_all(memory_index, ranks), group)
        first = sum(slots[:rank])
        here = (memory_index >= first) & (memory_index < first + slots[rank])
        memory_index = torch.where(here, memory_index - first, -1)
    queries = _Exchange.apply(_to_all(query, ranks), group)
    no_keys = queries.new_empty((*queries.shape[:-3], memory_key.size(0), 0, queries.size(-1)))
    no_values = queries.new_empty((*no_keys.shape[:-1], memory_value.size(-1)))
    # With no sequence to read, all of the output comes from the memory.
    part, _, part_lse = functional.mixed_attention(
        queries,
        no_keys,
        no_values,
        memory_key,
        memory_value,
        queries.new_zeros(()),
        memory_mask=memory_mask,
        memory_index=memory_index,
        dropout_p=dropout_p,
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=True,
    )
    parts = _Exchange.apply(part, group).unbind()
    part_lses = _Exchange.apply(part_lse, group).unbind()
    memory_output, memory_lse = functional.merge_attention(list(parts), list(part_lses))
    self_output, self_lse, _ = functional.mixed_attention(
        query,
        key,
        value,
        memory_key[:, :0],
        memory_value[:, :0],
        mix.new_zeros(()),
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=True,
    )
    share = memory_share(mix, self_lse, memory_lse, rule)
    output = ((1 - share) * self_output + share * memory_output).to(self_output.dtype)
    return (output, self_lse, memory_lse) if return_lse else output


def _to_all(tensor: Tensor, ranks: int) -> Tensor:
    return tensor.expand(ranks, *tensor.shape)


def _shard_error(
    rule: str, memory_key: Tensor, memory_value: Tensor, memory_mask: Tensor | None
) -> str | None:
    """What is wrong with this rank's arguments, where the operator alone would not notice."""
    if rule not in ("gate", "joint"):
        return f"rule must be 'gate' or 'joint', got '{rule}'"
    for name, tensor in (("memory_key", memory_key), ("memory_value", memory_value)):
        if tensor.dim() != 3:
            return (
                f"{name} must be a shard (H, M, channels) that all batches share, got "
                f"{shape_text(tensor)}"
            )
    if memory_mask is not None:
        sizes = list(memory_mask.shape)
        if len(sizes) > 3 or sizes[-2:-1] not in ([], [1]):
            return (
                f"memory_mask must broadcast to (Hq, 1, M), one for the queries of all ranks, got "
                f"{shape_text(memory_mask)}"
            )
    return None


def _agree(
    error: str | None,
    query: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    memory_index: Tensor | None,
    group: dist.ProcessGroup | None,
) -> list[int]:
    """The number of slots of every rank. All raise where one has an error or where they differ in
    what must be the same: an exchange of unequal sizes would hang."""
    mine = {
        "error": error,
        "slots": memory_key.size(1) if error is None else 0,
        "query": f"{query.dtype} {shape_text(query)}",
        "memory_key": f"{memory_key.size(0)} heads of {memory_key.size(-1)} channels",
        "memory_value": f"{memory_value.size(0)} heads of {memory_value.size(-1)} channels",
        "memory_index": "None" if memory_index is None else shape_text(memory_index),
    }
    every: list[dict] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    for rank, other in enumerate(every):
        if other["error"] is not None:
            raise RuntimeError(f"mixed_attention: {other['error']} on rank {rank}")
    for name in ("query", "memory_key", "memory_value", "memory_index"):
        for rank, other in enumerate(every):
            if other[name] != every[0][name]:
                raise RuntimeError(
                    f"mixed_attention: {name} must be alike on all ranks, got {every[0][name]} on "
                    f"rank 0 and {other[name]} on rank {rank}"
                )
    return [other["slots"] for other in every]
