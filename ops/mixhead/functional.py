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


def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bandwidth: Tensor | None = None,
    kernel: str | list[str] = "gaussian",
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    exclude_self: bool = False,
    normalize: bool = True,
    empty: str = "zero",
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_mass: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention as kernel regression (Nadaraya 1964, Watson 1964).

    .. math::
        \text{output}_i = \frac{\sum_j K(q_i, k_j)\, v_j}{\sum_j K(q_i, k_j)}, \qquad
        \text{log\_mass}_i = \log \sum_j K(q_i, k_j)

    with :math:`u = \lVert (q - k) / h \rVert` and the kernel one of

    ================ ==================================================================
    ``dot``          :math:`\exp((q/h) \cdot (k/h))`
    ``cosine``       :math:`\exp(\cos(q, k) / h^2)` (von Mises-Fisher); cos of 0 is 0
    ``gaussian``     :math:`\exp(-u^2/2)`
    ``laplacian``    :math:`\exp(-u)`
    ``matern32``     :math:`(1 + \sqrt 3 u) \exp(-\sqrt 3 u)`
    ``matern52``     :math:`(1 + \sqrt 5 u + 5 u^2 / 3) \exp(-\sqrt 5 u)`
    ``cauchy``       :math:`1 / (1 + u^2)`
    ``epanechnikov`` :math:`\max(0, 1 - u^2)`
    ``tricube``      :math:`\max(0, 1 - u^3)^3`
    ``boxcar``       1 if :math:`u \le 1` else 0; no gradient to query, key, bandwidth
    ================ ==================================================================

    Every distance kernel is 1 at distance 0, so the leverage of a fitted point is
    ``exp(-log_mass)``. Where q equals k gradients are finite; at the cusp of ``laplacian`` the
    subgradient 0 is taken. Memory use is linear in ``S``.

    Letters: ``B`` batch (any number of leading dimensions, none included), ``Hq`` query heads,
    ``H`` key/value heads, ``L`` queries, ``S`` keys, ``D`` head size, ``Dv`` value head size.

    Args:
        query: ``(B, Hq, L, D)``.
        key: ``(B, H, S, D)``, or ``(H, S, D)``: one set of points shared by the batch.
        value: ``(B, H, S, Dv)`` or ``(H, S, Dv)``, as ``key``.
        bandwidth: ``h > 0`` in the units of query and key: ``()``, ``(Hq,)`` or ``(Hq, D)``, one
            per channel (not for ``cosine``). None means ``D ** 0.25``, with which ``dot`` is
            exactly `torch.nn.functional.scaled_dot_product_attention`.
        kernel: one name, or one for each query head.
        attn_mask: bool (True: may read) or additive float, broadcasts to ``(B, Hq, L, S)``. A
            float mask adds to log K (the prior weight of a data point) and gets a gradient.
        is_causal: query ``i`` reads keys up to ``S - L + i``.
        exclude_self: key ``i`` is left out for query ``i`` (leave-one-out); needs ``L == S``.
        normalize: False gives the plain sum of ``K v``.
        empty: what a normalized row of no mass gives: ``"zero"``, ``"nan"``, or ``"nearest"``, the
            value of the nearest readable key (0 where none is readable).
        dropout_p: probability with which a weight is dropped, in ``[0, 1]``; reproducible under
            ``torch.manual_seed``.
        enable_gqa: ``Hq`` may be a multiple of ``H``.
        return_mass: also return ``log_mass``. A constant under TorchScript.

    Returns:
        The output ``(B, Hq, L, Dv)``; with ``return_mass=True`` also ``log_mass`` ``(B, Hq, L)`` in
        float32 (float64 for float64 input), -inf for a row of no mass. Both are differentiable,
        twice.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or value. The message names the
            argument, what was expected and what came.

    Example:
        >>> x, y = torch.linspace(0, 1, 50).view(1, 50, 1), torch.randn(1, 50, 1)
        >>> grid = torch.linspace(0, 1, 200).view(1, 200, 1)
        >>> mixhead.kernel_attention(grid, x, y, torch.tensor(0.1), "gaussian").shape
        torch.Size([1, 200, 1])
    """
    outputs = torch.ops.mixhead.kernel_attention(
        query,
        key,
        value,
        bandwidth,
        [kernel] if isinstance(kernel, str) else kernel,
        attn_mask=attn_mask,
        is_causal=is_causal,
        exclude_self=exclude_self,
        normalize=normalize,
        empty=empty,
        dropout_p=dropout_p,
        enable_gqa=enable_gqa,
    )
    return outputs if return_mass else outputs[0]


def _kernel_attention_with_mass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bandwidth: Tensor | None = None,
    kernel: str | list[str] = "gaussian",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    exclude_self: bool = False,
    normalize: bool = True,
    empty: str = "zero",
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_mass: bool = False,
) -> tuple[Tensor, Tensor]:
    return torch.ops.mixhead.kernel_attention(
        query,
        key,
        value,
        bandwidth,
        [kernel] if isinstance(kernel, str) else kernel,
        attn_mask=attn_mask,
        is_causal=is_causal,
        exclude_self=exclude_self,
        normalize=normalize,
        empty=empty,
        dropout_p=dropout_p,
        enable_gqa=enable_gqa,
    )


def _kernel_attention_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bandwidth: Tensor | None = None,
    kernel: str | list[str] = "gaussian",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    exclude_self: bool = False,
    normalize: bool = True,
    empty: str = "zero",
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_mass: bool = False,
) -> Tensor:
    return _kernel_attention_with_mass(
        query,
        key,
        value,
        bandwidth,
        kernel,
        attn_mask,
        is_causal,
        exclude_self,
        normalize,
        empty,
        dropout_p,
        enable_gqa,
    )[0]


boolean_dispatched[kernel_attention] = {
    "if_true": _kernel_attention_with_mass,
    "if_false": _kernel_attention_alone,
    "index": 12,
    "default": False,
    "arg_name": "return_mass",
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
