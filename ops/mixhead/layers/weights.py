"""The attention weights of mixed_attention, dense: for those who look at them."""

import math

import torch
from torch import Tensor


def mixed_attention_weights(
    query: Tensor,
    key: Tensor,
    memory_key: Tensor,
    mix: Tensor,
    self_lse: Tensor,
    memory_lse: Tensor,
    rule: str,
    attn_mask: Tensor | None,
    memory_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """The weights ``(B, Hq, L, S + M)`` that `mixed_attention` gave to ``[sequence, memory]``.

    They are ``[(1 - w) P_s, w P_m]`` with ``P = exp(score - lse)``, from the inputs of the op and
    the log-sum-exps it returned; a gate per channel is averaged over the channels. Of a row that
    may read nothing all weights are 0.
    """
    self_weights = _softmax_weights(query, key, self_lse, attn_mask, is_causal)
    memory_weights = _softmax_weights(query, memory_key, memory_lse, memory_mask, False)
    share = memory_share(mix, self_lse, memory_lse, rule).mean(dim=-1, keepdim=True)
    weights = torch.cat([(1 - share) * self_weights, share * memory_weights], dim=-1)
    return weights.to(query.dtype)


def _softmax_weights(
    query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    groups = query.size(-3) // key.size(-3)
    grouped = query.unflatten(-3, [key.size(-3), groups])
    scores = torch.matmul(grouped, key.unsqueeze(-3).transpose(-2, -1)).flatten(-4, -3)
    scores = scores.to(lse.dtype) / math.sqrt(query.size(-1))
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(mask.logical_not(), -math.inf)
        else:
            scores = scores + mask
    if is_causal:
        length, keys = scores.size(-2), scores.size(-1)
        future = torch.ones(length, keys, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(future.triu(keys - length + 1), -math.inf)
    # A row that reads nothing has every score and its log-sum-exp at -inf; their difference would
    # be NaN.
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    return torch.exp(scores - finite.unsqueeze(-1))


def memory_share(mix: Tensor, self_lse: Tensor, memory_lse: Tensor, rule: str) -> Tensor:
    """The memory's share ``w`` of a query's attention, ``(B, Hq, L, 1)`` or one per channel; all or
    nothing where the query may read nothing on one side."""
    reads_nothing_self = (self_lse == -math.inf).unsqueeze(-1)
    reads_nothing_memory = (memory_lse == -math.inf).unsqueeze(-1)
    logit = mix.to(self_lse.dtype)
    if rule == "joint":
        logit = logit + memory_lse.unsqueeze(-1).masked_fill(reads_nothing_memory, 0.0)
        logit = logit - self_lse.unsqueeze(-1).masked_fill(reads_nothing_self, 0.0)
    share = torch.sigmoid(logit).masked_fill(reads_nothing_self, 1.0)
    return share.masked_fill(reads_nothing_memory, 0.0)
