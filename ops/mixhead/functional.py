"""The operators of mixhead as functions with defaults; each forwards to `torch.ops.mixhead`."""

import torch
from torch import Tensor

from mixhead import _scripted


def _tensor_of(number: Tensor | float | None, query: Tensor) -> Tensor | None:
    """A number where a tensor of one element is meant, on the device of the query."""
    if number is None or isinstance(number, Tensor):
        return number
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.full((), number, dtype=dtype, device=query.device)


def mixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    mix: Tensor | float,
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
    mix = _tensor_of(mix, query)
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


_scripted.pick_by_constant(
    mixed_attention,
    "return_lse",
    if_true=_scripted.mixed_attention_with_lse,
    if_false=_scripted.mixed_attention_alone,
)


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
        enable_gqa: ``Hq`` may be a multiple of ``H``; query head ``h`` reads key/value head
            ``h // (Hq // H)``.
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
    bandwidth = _tensor_of(bandwidth, query)
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


_scripted.pick_by_constant(
    kernel_attention,
    "return_mass",
    if_true=_scripted.kernel_attention_with_mass,
    if_false=_scripted.kernel_attention_alone,
)


# TorchScript knows no keyword-only arguments with defaults: this function and topk_keys, which
# have one return type and are compiled as they stand, take all by position too.
def local_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bandwidth: Tensor | None = None,
    kernel: str | list[str] = "gaussian",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    exclude_self: bool = False,
    ridge: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Local-linear kernel regression: weighted least squares of degree 1 around each query.

    .. math::
        (a_i, b_i) = \arg\min_{a, b} \sum_j K(q_i, k_j)
            \lVert v_j - a - b^\top (k_j - q_i) \rVert^2 + \text{ridge} \lVert b \rVert^2

    (Stone, "Consistent nonparametric regression", 1977; Fan & Gijbels, "Local polynomial modelling
    and its applications", 1996, section 3.1.) The kernels :math:`K` are those of
    `kernel_attention`. Memory use is linear in ``S``; a query holds the moments of its window,
    ``D x (D + Dv)`` numbers.

    Letters: ``B`` batch (any number of leading dimensions, none included), ``H`` heads, ``L``
    queries, ``S`` keys, ``D`` channels of a point, ``Dv`` channels of a value.

    Args:
        query: ``(B, H, L, D)``.
        key: ``(B, H, S, D)``, or ``(H, S, D)``: one set of points shared by the batch.
        value: ``(B, H, S, Dv)`` or ``(H, S, Dv)``, as ``key``.
        bandwidth: ``h > 0`` in the units of query and key: ``()``, ``(H,)`` or ``(H, D)``, one per
            channel (not for ``cosine``). None means ``D ** 0.25``.
        kernel: one name, or one for each head.
        attn_mask: bool (True: may read) or additive float, broadcasts to ``(B, H, L, S)``. A float
            mask adds to log K (the prior weight of a data point) and gets a gradient.
        is_causal: query ``i`` reads keys up to ``S - L + i``.
        exclude_self: key ``i`` is left out for query ``i`` (leave-one-out); needs ``L == S``.
        ridge: penalty, at least 0, of the squared slope, against the plain (not normalized) sum
            over keys, in the squared units of key; the intercept is not penalised.

    Returns:
        output ``(B, H, L, Dv)``, the intercept :math:`a`: the fit at the query.

        slope ``(B, H, L, D, Dv)``, :math:`b`: the marginal effects.

        leverage ``(B, H, L)``, :math:`K(q_i, q_i)\, e_1^\top (X^\top W X +
        \text{ridge})^{-1} e_1` with rows :math:`(1, k_j - q_i)` in :math:`X`: the weight that a
        key placed at the query carries in its own fit. At the fitted points it is the diagonal of
        the smoother matrix, so its sum is the effective degrees of freedom; where `attn_mask` gives
        the point a prior weight, times this weight. With ``exclude_self`` the design is that
        without key ``i``, and a key put there would carry ``leverage / (1 + leverage)``.

        log_mass ``(B, H, L)``, :math:`\log \sum_j K(q_i, k_j)`.

        The last two are in float32 (float64 for float64 input). All are differentiable, twice.

        Where the design is singular (fewer keys in the window than ``D + 1``, duplicated points, a
        constant channel; with channels scaled to spread 1, a direction whose spread is at most
        ``sqrt(32 D eps)`` of the widest one's, ``eps`` that of the dtype of the sums) the
        minimum-norm (intercept, slope) is taken, that of `numpy.linalg.lstsq`, and the
        pseudo-inverse for the leverage. It is what it would be without the missing directions
        wherever the query lies in the affine hull of the keys in its window; elsewhere a small
        ``ridge`` keeps the intercept from shrinking. Derivatives are those at constant rank, the
        second with the null space taken to first order. A row of no mass gives 0, and log_mass
        -inf.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or value. The message names the
            argument, what was expected and what came.

    Example:
        >>> x, y = torch.linspace(0, 1, 50).view(1, 50, 1), torch.randn(1, 50, 1)
        >>> grid = torch.linspace(0, 1, 200).view(1, 200, 1)
        >>> fit, slope, _, _ = mixhead.local_linear_attention(grid, x, y, torch.tensor(0.1))
        >>> fit.shape, slope.shape
        (torch.Size([1, 200, 1]), torch.Size([1, 200, 1, 1]))
    """
    if not torch.jit.is_scripting():
        bandwidth = _tensor_of(bandwidth, query)
    return torch.ops.mixhead.local_linear_attention(
        query,
        key,
        value,
        bandwidth,
        [kernel] if isinstance(kernel, str) else kernel,
        attn_mask=attn_mask,
        is_causal=is_causal,
        exclude_self=exclude_self,
        ridge=ridge,
    )


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


def topk_keys(
    query: Tensor, key: Tensor, k: int, mask: Tensor | None = None, metric: str = "dot"
) -> tuple[Tensor, Tensor]:
    r"""The ``k`` keys of highest score of each query: exact search that streams the keys.

    ================ =====================================================================
    ``dot``          :math:`q \cdot k`
    ``cosine``       :math:`q \cdot k / (\lVert q \rVert \lVert k \rVert)`; 0 of a zero vector
    ``l2``           :math:`-\lVert q - k \rVert^2`, by subtraction: no cancellation
    ================ =====================================================================

    No ``L x M`` tensor is made. Letters: ``B`` batch (any number of leading dimensions, none
    included), ``Hq`` query heads, ``H`` key heads, ``L`` queries, ``M`` keys, ``D`` channels.

    Args:
        query: ``(B, Hq, L, D)``; ``Hq`` is a multiple of ``H``, and query head ``h`` reads key head
            ``h // (Hq // H)``.
        key: ``(H, M, D)`` shared by the batch, or ``(B, H, M, D)``.
        k: number of keys, at least 0.
        mask: bool (True: may read) or additive float, broadcasts to ``(B, Hq, L, M)``. A float mask
            adds to the scores and gets a gradient.
        metric: ``"dot"``, ``"cosine"`` or ``"l2"``.

    Returns:
        scores ``(B, Hq, L, k)``, from high to low, in float32 (float64 for float64), and indices
        ``(B, Hq, L, k)``, int64; of equal scores the lower index comes first, and NaN counts as
        highest. Where fewer than ``k`` keys may be read, score -inf and index -1 fill up. The
        scores are differentiable in query, key and a float mask, twice; ``indices`` are what
        `mixed_attention` takes as ``memory_index``.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or value. The message names the
            argument, what was expected and what came.

    Example:
        >>> query, memory_key = torch.randn(2, 8, 128, 64), torch.randn(8, 4096, 64)
        >>> scores, indices = mixhead.topk_keys(query, memory_key, 32)
        >>> indices.shape
        torch.Size([2, 8, 128, 32])
    """
    return torch.ops.mixhead.topk_keys(query, key, k, mask=mask, metric=metric)


def matching_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bandwidth: Tensor | None = None,
    kernel: str | list[str] = "gaussian",
    row_mass: Tensor | None = None,
    column_mass: Tensor | None = None,
    dustbin: Tensor | None = None,
    iterations: int = 50,
    tolerance: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Attention by entropic optimal transport: a soft matching of queries to keys.

    The plan, whose cost is minus the log of the kernel of :func:`kernel_attention`,

    .. math::
        P_{ij} = \exp(f_i + \log K(q_i, k_j) + g_j), \qquad
        \text{output}_i = \frac{1}{a_i} \sum_j P_{ij} v_j,

    has the row sums ``row_mass`` :math:`a` and the column sums ``column_mass`` :math:`b`. Its
    potentials are found by Sinkhorn's iterations in the log domain (Cuturi, "Sinkhorn Distances",
    2013; Peyré & Cuturi, "Computational Optimal Transport", 2019, section 4.4). An iteration moves
    the rows, then the columns; the rows have the last word, so each row's output is a weighted mean
    of the values. With ``iterations=0`` it is the row softmax of :func:`kernel_attention`.

    With a ``dustbin`` (Sarlin et al., "SuperGlue", 2020) there is one row and one column more,
    whose log-kernel with everything is that score: points may stay unmatched. The dustbin's row
    holds the total of the columns, its column the total of the rows, and its value is 0.

    The plan is never stored: memory use is linear in ``L`` and ``S``. Gradients are those of the
    converged plan, by the implicit function theorem (conjugate gradients on products with the
    plan); where the iterations ended before convergence they are close to it, not exact.

    Letters: ``B`` batch (any number of leading dimensions, none included), ``Hq`` heads, ``L``
    queries, ``S`` keys, ``D`` head size, ``Dv`` value head size.

    Args:
        query: ``(B, Hq, L, D)``.
        key: ``(B, Hq, S, D)``, or ``(Hq, S, D)``: one set of points shared by the batch.
        value: ``(B, Hq, S, Dv)`` or ``(Hq, S, Dv)``, as ``key``.
        bandwidth: as in :func:`kernel_attention`; with kernel ``gaussian`` its square is the weight
            of the entropy.
        kernel: one name, or one for each head.
        row_mass: not negative, broadcasts to ``(B, Hq, L)``. None means 1 each.
        column_mass: not negative, broadcasts to ``(B, Hq, S)``; scaled to the total of the rows,
            so that its proportions count. None means ``L / S`` each. With a dustbin the masses
            count as they are, and None means 1 each.
        dustbin: score of leaving a point unmatched, ``()`` or ``(Hq,)``.
        iterations: Sinkhorn iterations at most. After the first 50, where they crawl, every second
            one is a Newton step (Brauer et al., "A Sinkhorn-Newton method", 2017).
        tolerance: ends the iterations once no column misses its mass by more than this share.

    Returns:
        The output ``(B, Hq, L, Dv)``, the row potentials :math:`f` ``(B, Hq, L)`` and the column
        potentials :math:`g` ``(B, Hq, S)``, in float32 (float64 for float64); -inf for a point
        without mass or without a partner. The column potentials, the dustbin's among them, sum
        to 0. All are differentiable, twice.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or value. The message names the
            argument, what was expected and what came.

    Example:
        >>> jobs, candidates = torch.randn(1, 64, 8), torch.randn(1, 64, 8)
        >>> output, f, g = mixhead.matching_attention(jobs, candidates, candidates, iterations=500)
        >>> cost = torch.cdist(jobs, candidates).square() / 2 / 8**0.5
        >>> plan = (f.unsqueeze(-1) - cost + g.unsqueeze(-2)).exp()
    """
    if not torch.jit.is_scripting():
        bandwidth = _tensor_of(bandwidth, query)
    return torch.ops.mixhead.matching_attention(
        query,
        key,
        value,
        bandwidth,
        [kernel] if isinstance(kernel, str) else kernel,
        row_mass=row_mass,
        column_mass=column_mass,
        dustbin=dustbin,
        iterations=iterations,
        tolerance=tolerance,
    )
