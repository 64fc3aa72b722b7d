"""The operators of mixhead as functions with defaults; each forwards to `torch.ops.mixhead`."""

import torch
from torch import Tensor
from torch._jit_internal import boolean_dispatched


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
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Attention over a sequence mixed with attention over an external memory.

    With :math:`A_s, l_s` the softmax attention over the sequence and its log-sum-exp, and
    :math:`A_m, l_m` the same over the memory,

    .. math::
        \text{output} = (1 - w) A_s + w A_m, \qquad
        w = \begin{cases}
            \sigma(\text{mix}) & \text{rule "gate"} \\
            \sigma(\text{mix} + l_m - l_s) & \text{rule "joint"}
        \end{cases}

    Rule ``"gate"`` is the gate of Wu et al., "Memorizing Transformers" (2022). Rule ``"joint"`` is
    exactly one softmax over both key sets, with ``mix`` added to the scores of the memory. A row
    that may read nothing on one side takes everything from the other, under both rules; one that
    may read nothing at all gives output 0. Memory use is linear in ``S`` and ``M``: no ``L x S``
    or ``L x M`` tensor is made, forward or backward.

    Letters: ``B`` batch (any number of leading dimensions, none included), ``Hq`` query heads,
    ``H`` key/value heads, ``L`` queries, ``S`` keys, ``M`` memory slots, ``K`` slots a query names,
    ``D`` head size, ``Dv`` value head size.

    Args:
        query: ``(B, Hq, L, D)``.
        key: ``(B, H, S, D)``.
        value: ``(B, H, S, Dv)``.
        memory_key: ``(H, M, D)`` shared by the batch, or ``(B, H, M, D)``; ``M`` may be 0.
        memory_value: ``(H, M, Dv)`` or ``(B, H, M, Dv)``, as ``memory_key``.
        mix: a logit that broadcasts to ``(B, Hq, L, 1)``, or with rule ``"gate"`` to
            ``(B, Hq, L, Dv)``: a gate per channel.
        rule: ``"gate"`` or ``"joint"``.
        attn_mask: bool (True: may read) or additive float, broadcasts to ``(B, Hq, L, S)``. A
            float mask gets a gradient.
        memory_mask: the same for the memory, broadcasts to ``(B, Hq, L, M)``.
        memory_index: int64 ``(B, Hq, L, K)``, -1 for none: each query reads only these slots. A
            slot named twice counts twice.
        dropout_p: probability with which an attention weight of either side is dropped, in
            ``[0, 1]``; reproducible under ``torch.manual_seed``.
        is_causal: query ``i`` reads keys up to ``S - L + i``; the memory is never causal.
        scale: factor of the scores, ``1 / sqrt(D)`` where None.
        enable_gqa: ``Hq`` may be a multiple of ``H``; query head ``h`` reads key/value head
            ``h // (Hq // H)``.
        return_lse: also return the log-sum-exps. A constant under TorchScript.

    Returns:
        The output ``(B, Hq, L, Dv)``; with ``return_lse=True`` the triple of the output and the
        log-sum-exps over the sequence and over the memory, each ``(B, Hq, L)``, in float32 (float64
        for float64 input) and -inf where a row may read nothing. All are differentiable, twice.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or value. The message names the
            argument, what was expected and what came.

    Example:
        >>> query, key, value = torch.randn(3, 2, 8, 128, 64).unbind()
        >>> memory_key, memory_value = torch.randn(2, 8, 4096, 64).unbind()
        >>> mix = torch.zeros(8, 1, 1)  # one gate per head, half open
        >>> mixhead.mixed_attention(query, key, value, memory_key, memory_value, mix).shape
        torch.Size([2, 8, 128, 64])
    """
    outputs = torch.ops.mixhead.mixed_attention(
        query,
        key,
        value,
        memory_key,
        memory_value,
        mix,
        rule=rule,
        attn_mask=attn_mask,
        memory_mask=memory_mask,
        memory_index=memory_index,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return outputs if return_lse else outputs[0]


def _mixed_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    mix: Tensor,
    rule: str = "gate",
    attn_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    memory_index: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.mixhead.mixed_attention(
        query,
        key,
        value,
        memory_key,
        memory_value,
        mix,
        rule=rule,
        attn_mask=attn_mask,
        memory_mask=memory_mask,
        memory_index=memory_index,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _mixed_attention_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    mix: Tensor,
    rule: str = "gate",
    attn_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    memory_index: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor:
    return torch.ops.mixhead.mixed_attention(
        query,
        key,
        value,
        memory_key,
        memory_value,
        mix,
        rule=rule,
        attn_mask=attn_mask,
        memory_mask=memory_mask,
        memory_index=memory_index,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )[0]


# A function has one return type in TorchScript (and no keyword-only arguments), so its compiler
# picks one of the two above by the constant `return_lse`, as it does for `return_indices` of
# torch.nn.functional.max_pool2d.
boolean_dispatched[mixed_attention] = {
    "if_true": _mixed_attention_with_lse,
    "if_false": _mixed_attention_alone,
    "index": 14,
    "default": False,
    "arg_name": "return_lse",
}


def merge_attention(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    r"""The exact attention over the union of disjoint key sets, from each set's part.

    .. math::
        \text{lse} = \log \sum_i e^{\text{lses}_i}, \qquad
        \text{output} = \sum_i e^{\text{lses}_i - \text{lse}}\, \text{outputs}_i

    (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018.)

    Args:
        outputs: for each key set its attention output ``(..., L, Dv)``, all of one shape.
        lses: for each key set its log-sum-exp ``(..., L)``; -inf where a row read nothing.

    Returns:
        The output ``(..., L, Dv)`` and the log-sum-exp ``(..., L)`` over the union; 0 and -inf for
        a row that read nothing in any set. Differentiable in all inputs, twice.

    Raises:
        RuntimeError: the lists are empty or of different lengths, or a shape, dtype or device
            differs.

    Example:
        >>> outputs = list(torch.randn(2, 8, 128, 64).unbind())
        >>> lses = list(torch.randn(2, 8, 128).unbind())
        >>> output, lse = mixhead.merge_attention(outputs, lses)
    """
    return torch.ops.mixhead.merge_attention(outputs, lses)
