"""The ops in dense float64 torch, from their definitions alone: slow, obvious, differentiable.

Nothing is shared with the library. Every score is stored; every formula stands as it is stated.
"""

import math

import numpy
import torch


def _readable(scores, mask, allowed=None):
    """Scores with the mask applied, and which of them may be read."""
    readable = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed
    if mask is not None and mask.dtype == torch.bool:
        readable = readable & mask
    elif mask is not None:
        readable = readable & (mask != -math.inf)
        scores = scores + mask.double()
    return scores.masked_fill(~readable, -math.inf), readable


def _softmax(scores, readable):
    """Weights, log-sum-exp and which rows read nothing; such a row has weights 0 and lse -inf."""
    empty = ~readable.any(-1, keepdim=True)
    # A row of nothing gets ordinary scores first, so that autograd meets no inf - inf.
    scores = scores.masked_fill(empty, 0.0)
    if scores.shape[-1] == 0:
        return scores, scores.sum(-1) - math.inf, empty.squeeze(-1)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)
    return weights, lse, empty.squeeze(-1)


def _drop(weights, keep, dropout_p):
    if keep is None or dropout_p == 0.0:
        return weights
    return weights * keep / (1.0 - dropout_p) if dropout_p < 1.0 else weights * 0.0


def _sides(
    query,
    key,
    value,
    memory_key,
    memory_value,
    mix,
    *,
    rule="gate",
    attn_mask=None,
    memory_mask=None,
    memory_index=None,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """(weights, values, lse) of the sequence, of the memory, and w (..., L, 1 or Dv)."""
    query, key, value, memory_key, memory_value, mix = (
        tensor.double() for tensor in (query, key, value, memory_key, memory_value, mix)
    )
    groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    key, value, memory_key, memory_value = (
        tensor.repeat_interleave(groups, -3) for tensor in (key, value, memory_key, memory_value)
    )
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    length, keys, slots = query.shape[-2], key.shape[-2], memory_key.shape[-2]
    rows = query.shape[:-1]

    scores = scale * query @ key.transpose(-1, -2)
    allowed = None
    if is_causal:
        i, j = torch.arange(length)[:, None], torch.arange(keys)
        allowed = (j <= keys - length + i).expand(scores.shape)
    self_weights, self_lse, self_empty = _softmax(*_readable(scores, attn_mask, allowed))

    memory_key = memory_key.expand(*rows[:-1], *memory_key.shape[-2:])
    memory_value = memory_value.expand(*rows[:-1], *memory_value.shape[-2:])
    if memory_index is None:
        scores = scale * query @ memory_key.transpose(-1, -2)
        memory_scores = _readable(scores, memory_mask)
    else:
        named = memory_index >= 0
        index = memory_index.clamp_min(0)
        flat = index.flatten(-2).unsqueeze(-1)
        if slots == 0:
            gathered_key = query.new_zeros(*index.shape, query.shape[-1])
            memory_value = query.new_zeros(*index.shape, memory_value.shape[-1])
        else:
            gathered_key = memory_key.gather(-2, flat.expand(*flat.shape[:-1], query.shape[-1]))
            gathered_key = gathered_key.unflatten(-2, index.shape[-2:])
            memory_value = memory_value.gather(
                -2, flat.expand(*flat.shape[:-1], memory_value.shape[-1])
            ).unflatten(-2, index.shape[-2:])
        scores = scale * (query.unsqueeze(-2) * gathered_key).sum(-1)
        if memory_mask is not None and slots > 0:
            memory_mask = memory_mask.expand(*rows, slots).gather(-1, index)
        elif memory_mask is not None:
            memory_mask = None
        memory_scores = _readable(scores, memory_mask, named)
    memory_weights, memory_lse, memory_empty = _softmax(*memory_scores)

    if rule == "joint":
        finite_self = self_lse.masked_fill(self_empty, 0.0).unsqueeze(-1)
        finite_memory = memory_lse.masked_fill(memory_empty, 0.0).unsqueeze(-1)
        w = torch.sigmoid(mix + finite_memory - finite_self)
    else:
        w = torch.sigmoid(mix)
    zero, one = torch.zeros((), dtype=torch.double), torch.ones((), dtype=torch.double)
    w = torch.where(self_empty.unsqueeze(-1), one, w)
    w = torch.where(memory_empty.unsqueeze(-1), zero, w)
    return (self_weights, value, self_lse), (memory_weights, memory_value, memory_lse), w


def _read(weights, value):
    """weights (..., L, S) times value (..., S, Dv), or gathered values (..., L, S, Dv)."""
    if value.dim() == weights.dim() + 1:
        return (weights.unsqueeze(-2) @ value).squeeze(-2)
    return weights @ value


def mixed_attention(*args, dropout_p=0.0, self_keep=None, memory_keep=None, **options):
    """(output, self_lse, memory_lse) in float64; keep masks (..., L, S or M or K) are explicit."""
    (self_weights, value, self_lse), (memory_weights, memory_value, memory_lse), w = _sides(
        *args, **options
    )
    self_output = _read(_drop(self_weights, self_keep, dropout_p), value)
    memory_output = _read(_drop(memory_weights, memory_keep, dropout_p), memory_value)
    return (1 - w) * self_output + w * memory_output, self_lse, memory_lse


def mixed_attention_weights(*args, **options):
    """Weights over [sequence, memory], (..., L, S + M); sums to 1 wherever something is read."""
    (self_weights, _, _), (memory_weights, _, _), w = _sides(*args, **options)
    return torch.cat([(1 - w) * self_weights, w * memory_weights], -1)


def merge_attention(outputs, lses):
    """lse = log sum_i exp(lses[i]), output = sum_i exp(lses[i] - lse) outputs[i]."""
    lses = torch.stack([lse.double() for lse in lses])
    outputs = torch.stack([output.double() for output in outputs])
    empty = (lses == -math.inf).all(0)
    lse = lses.masked_fill(empty, 0.0).logsumexp(0)
    weights = (lses - lse).exp().masked_fill(empty, 0.0)
    return (weights.unsqueeze(-1) * outputs).sum(0), lse.masked_fill(empty, -math.inf)


def _splitmix64(x):
    x = x + numpy.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return x ^ (x >> numpy.uint64(31))


def dropout_keep(seed, side, shape, dropout_p):
    """The keep mask of csrc/dropout.h in shape (..., L, columns); side 0 sequence, 1 memory."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    with numpy.errstate(over="ignore"):
        seeds = numpy.array([seed], dtype=numpy.int64).astype(numpy.uint64)
        stream = _splitmix64(_splitmix64(seeds) + numpy.uint64(side))
        mixed = _splitmix64(stream ^ numpy.arange(rows, dtype=numpy.uint64))
        first = mixed.astype(numpy.uint32)[:, None]
        second = (mixed >> numpy.uint64(32)).astype(numpy.uint32)[:, None]
        x = numpy.arange(columns, dtype=numpy.uint32)[None, :] * numpy.uint32(0x9E3779B1) + first
        x ^= x >> numpy.uint32(16)
        x *= numpy.uint32(0x7FEB352D)
        x ^= second
        x ^= x >> numpy.uint32(15)
        x *= numpy.uint32(0x846CA68B)
        x ^= x >> numpy.uint32(16)
    return torch.from_numpy(x.astype(numpy.uint64) >= int(dropout_p * 2**32)).view(shape)


def log_kernel(name, query, key, bandwidth):
    """log K (..., L, S) from query (..., L, D), key (..., S, D), bandwidth (..., 1, D or 1)."""
    if name == "dot":
        return (query / bandwidth) @ (key / bandwidth).transpose(-2, -1)
    if name == "cosine":
        unit_query, unit_key = (
            tensor / tensor.norm(dim=-1, keepdim=True).clamp_min(1e-300) for tensor in (query, key)
        )
        return unit_query @ unit_key.transpose(-2, -1) / bandwidth**2
    scaled = (query.unsqueeze(-2) - key.unsqueeze(-3)) / bandwidth.unsqueeze(-2)
    squared = scaled.square().sum(-1)
    at_zero = squared == 0
    u = squared.masked_fill(at_zero, 1.0).sqrt().masked_fill(at_zero, 0.0)
    kernel = {
        "gaussian": lambda: (-squared / 2).exp(),
        "laplacian": lambda: (-u).exp(),
        "matern32": lambda: (1 + math.sqrt(3) * u) * (-math.sqrt(3) * u).exp(),
        "matern52": lambda: (1 + math.sqrt(5) * u + 5 * squared / 3) * (-math.sqrt(5) * u).exp(),
        "cauchy": lambda: 1 / (1 + squared),
        "epanechnikov": lambda: (1 - squared).clamp_min(0),
        "tricube": lambda: (1 - u**3).clamp_min(0) ** 3,
        "boxcar": lambda: (u <= 1).double(),
    }[name]()
    zero = kernel == 0
    return kernel.masked_fill(zero, 1.0).log().masked_fill(zero, -math.inf)


def _kernel_heads(query, key, bandwidth, kernel):
    """query and key in float64, each head's bandwidth (heads, 1, D or 1), and its kernel's name."""
    query, key = query.double(), key.double()
    heads, channels = query.shape[-3], query.shape[-1]
    if bandwidth is None:
        bandwidth = torch.tensor(channels**0.25, dtype=torch.float64)
    bandwidth = bandwidth.double()
    bandwidth = bandwidth.reshape(-1, 1, 1) if bandwidth.dim() < 2 else bandwidth.unsqueeze(1)
    key = key.repeat_interleave(heads // key.shape[-3], -3)
    names = kernel * heads if len(kernel) == 1 else kernel
    return query, key, bandwidth.expand(heads, 1, -1), names


def _kernel_scores(query, key, bandwidth, names, attn_mask, is_causal, exclude_self):
    """log K with the mask added, where it is not -inf, and where the mask lets read."""
    scores = torch.stack(
        [
            log_kernel(name, query[..., h, :, :], key[..., h, :, :], bandwidth[h])
            for h, name in enumerate(names)
        ],
        dim=-3,
    )
    rows, keys = scores.shape[-2:]
    allowed = torch.ones(rows, keys, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril(keys - rows)
    if exclude_self:
        allowed = allowed & ~torch.eye(rows, dtype=torch.bool)
    allowed = allowed.expand(scores.shape)
    readable = _readable(torch.zeros_like(scores), attn_mask, allowed)[1]
    return *_readable(scores, attn_mask, allowed & (scores.detach() != -math.inf)), readable


def kernel_attention(
    query,
    key,
    value,
    bandwidth,
    kernel,
    *,
    attn_mask=None,
    is_causal=False,
    exclude_self=False,
    normalize=True,
    empty="zero",
    enable_gqa=False,
):
    """(output, log_mass) as the table of kernels defines them, every pair stored."""
    query, key, bandwidth, names = _kernel_heads(query, key, bandwidth, kernel)
    value = value.double().repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    keys = key.shape[-2]
    scores, inside, readable = _kernel_scores(
        query, key, bandwidth, names, attn_mask, is_causal, exclude_self
    )
    weights, log_mass, nothing = _softmax(scores, inside)
    output = weights @ value
    if not normalize:
        return output * log_mass.exp().unsqueeze(-1), log_mass
    if empty == "nan":
        output = output.masked_fill(nothing.unsqueeze(-1), math.nan)
    if empty == "nearest" and keys:
        scaled = (query.unsqueeze(-2) - key.unsqueeze(-3)) / bandwidth.unsqueeze(-2)
        distance = scaled.square().sum(-1).masked_fill(~readable, math.inf)
        values = value.expand(*scores.shape[:-2], *value.shape[-2:])
        index = distance.argmin(-1, keepdim=True).expand(*output.shape)
        found = values.gather(-2, index).masked_fill(~readable.any(-1, keepdim=True), 0.0)
        output = torch.where(nothing.unsqueeze(-1), found, output)
    return output, log_mass


def local_linear_attention(
    query,
    key,
    value,
    bandwidth,
    kernel,
    *,
    attn_mask=None,
    is_causal=False,
    exclude_self=False,
    ridge=0.0,
):
    """(output, slope, leverage, log_mass) from the normal equations of every query, stored."""
    query, key, bandwidth, names = _kernel_heads(query, key, bandwidth, kernel)
    value = value.double()
    weights, log_mass, nothing = _softmax(
        *_kernel_scores(query, key, bandwidth, names, attn_mask, is_causal, exclude_self)[:2]
    )
    offset = key.unsqueeze(-3) - query.unsqueeze(-2)  # (..., L, S, D)
    design = torch.cat([torch.ones_like(offset[..., :1]), offset], -1)
    weighted = design * weights.unsqueeze(-1)
    normal = weighted.mT @ design
    if ridge:
        penalty = torch.ones(normal.shape[-1], dtype=torch.float64)
        penalty[0] = 0.0
        mass = log_mass.masked_fill(nothing, 0.0).exp()
        normal = normal + penalty.diag() * ridge / mass[..., None, None]
    inverse = torch.linalg.pinv(normal, rtol=1e-12, hermitian=True)
    solution = inverse @ weighted.mT @ value.unsqueeze(-3)  # (..., L, 1 + D, Dv)
    at_query = torch.stack(
        [
            log_kernel(name, query[..., h, :, None, :], query[..., h, :, None, :], bandwidth[h])
            for h, name in enumerate(names)
        ],
        dim=-4,
    )[..., 0, 0]
    leverage = (at_query - log_mass.masked_fill(nothing, 0.0)).exp() * inverse[..., 0, 0]
    return (
        solution[..., 0, :],
        solution[..., 1:, :],
        leverage.masked_fill(nothing, 0.0),
        log_mass,
    )
