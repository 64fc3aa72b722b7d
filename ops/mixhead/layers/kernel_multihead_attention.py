"""KernelMultiheadAttention: kernel_attention with projections and learned bandwidths around it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixhead._kernels import KERNELS
from mixhead.functional import kernel_attention
from mixhead.layers.multihead_frame import MultiheadFrame


class KernelMultiheadAttention(MultiheadFrame):
    r"""`torch.nn.MultiheadAttention` whose heads are kernel regressions.

    Each head :math:`h` smooths the values with its own kernel and bandwidth (Nadaraya 1964, Watson
    1964; see `mixhead.kernel_attention` for the kernels):

    .. math::
        \text{head}_h = \frac{\sum_j K_h(q_i, k_j)\, v_j}{\sum_j K_h(q_i, k_j)}, \qquad
        \text{bandwidth}_h = D^{1/4} \exp(\texttt{log\_bandwidth}_h)

    Parameters, names and initialisation are those of `torch.nn.MultiheadAttention`, plus
    ``log_bandwidth``, the logarithm of the bandwidth over its default, which keeps a learned
    bandwidth positive; a buffer of that name where it is not learned. A state dict of torch's layer
    loads here and leaves the bandwidth as it is. With ``kernel="dot"`` and the default bandwidth
    the layer computes the same as torch's, and it can stand in for ``self_attn`` in
    `torch.nn.TransformerEncoderLayer` and `torch.nn.TransformerDecoderLayer`. Where it differs: a
    query that may read nothing, or that has no key within a compact kernel's support, gives zeros
    (torch: NaN), ``is_causal=True`` needs no ``attn_mask``, and the weights returned are those
    before dropout.

    Args:
        embed_dim: width ``E`` of the queries and of the output.
        num_heads: query heads ``Hq``; divides ``embed_dim``.
        dropout: probability with which an attention weight is dropped in training.
        bias: whether the projections have biases.
        add_bias_kv: whether a learned key and value, ``bias_k`` and ``bias_v``, stand behind the
            sequence; every query may read them.
        add_zero_attn: whether a key and value of zeros stand behind the sequence.
        kdim, vdim: widths of ``key`` and ``value``; ``embed_dim`` where None.
        batch_first: ``query``, ``key``, ``value`` and the output are ``(B, L, E)``, not
            ``(L, B, E)``.
        num_kv_heads: key/value heads ``H``, a divisor of ``num_heads`` (grouped-query attention);
            ``num_heads`` where None.
        kernel: the name of a kernel, or a list with one for each query head.
        bandwidth: initial bandwidth in the units of the projected queries and keys: a number, or
            one for each head ``(Hq,)``, or one for each head and channel ``(Hq, D)`` (not with
            ``"cosine"``). None means ``D ** 0.25`` for each head.
        learn_bandwidth: whether ``log_bandwidth`` is a parameter.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument of the constructor, or a shape given to `forward`, does not fit.

    Example:
        >>> kernels = ["gaussian"] * 4 + ["laplacian"] * 4
        >>> layer = mixhead.KernelMultiheadAttention(512, 8, batch_first=True, kernel=kernels)
        >>> tokens = torch.randn(2, 128, 512)
        >>> output, weights = layer(tokens, tokens, tokens, need_weights=False)
        >>> layer.bandwidth.shape
        torch.Size([8])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        kernel: str | Sequence[str] = "gaussian",
        bandwidth: float | Sequence | Tensor | None = None,
        learn_bandwidth: bool = True,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            num_kv_heads,
            factory,
        )
        self.kernel = [kernel] if isinstance(kernel, str) else list(kernel)
        self._check_kernel()
        initial = self._checked_bandwidth(bandwidth)
        self.initial_bandwidth = initial.tolist()
        if learn_bandwidth:
            self.log_bandwidth = nn.Parameter(torch.empty(initial.shape, **factory))
        else:
            self.register_buffer("log_bandwidth", torch.empty(initial.shape, **factory))
        self.reset_parameters()

    def _check_kernel(self) -> None:
        if len(self.kernel) not in (1, self.num_heads):
            raise ValueError(
                f"{self._name}: kernel must be one name or one for each of {self.num_heads} heads, "
                f"got {len(self.kernel)}"
            )
        for kernel in self.kernel:
            if kernel not in KERNELS:
                raise ValueError(
                    f"{self._name}: kernel must be one of {', '.join(map(repr, KERNELS))}, got "
                    f"{kernel!r}"
                )

    def _checked_bandwidth(self, bandwidth: float | Sequence | Tensor | None) -> Tensor:
        """The initial bandwidth ``(Hq,)`` or ``(Hq, D)`` in float64."""
        heads, channels = self.num_heads, self.head_dim
        initial = torch.as_tensor(
            channels**0.25 if bandwidth is None else bandwidth, dtype=torch.float64, device="cpu"
        ).detach()
        if initial.shape not in ((), (heads,), (heads, channels)):
            raise ValueError(
                f"{self._name}: bandwidth must be a number, ({heads},) or ({heads}, {channels}), "
                f"got {tuple(initial.shape)}"
            )
        if initial.dim() == 2 and "cosine" in self.kernel:
            raise ValueError(
                f"{self._name}: bandwidth must be a number or ({heads},) with kernel 'cosine', got "
                f"one per channel {tuple(initial.shape)}"
            )
        wrong = initial[~((initial > 0) & initial.isfinite())]
        if wrong.numel():
            raise ValueError(
                f"{self._name}: bandwidth must be positive and finite, got {wrong[0].item()}"
            )
        return initial.expand(heads) if initial.dim() == 0 else initial

    def reset_parameters(self) -> None:
        """Initial values, drawn as `torch.nn.MultiheadAttention` draws them."""
        self._reset_projections()
        initial = torch.tensor(self.initial_bandwidth, dtype=torch.float64)
        with torch.no_grad():
            self.log_bandwidth.copy_(torch.log(initial / self.head_dim**0.25))

    @property
    def bandwidth(self) -> Tensor:
        """The bandwidths ``(Hq,)`` or ``(Hq, D)``, positive."""
        return self.head_dim**0.25 * self.log_bandwidth.exp()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Smooths ``value`` with the kernel between ``query`` and ``key``, projected.

        Args:
            query: ``(L, B, E)``, ``(B, L, E)`` with ``batch_first``, or ``(L, E)``.
            key: ``(S, B, kdim)``, ``(B, S, kdim)`` or ``(S, kdim)``.
            value: ``(S, B, vdim)``, ``(B, S, vdim)`` or ``(S, vdim)``.
            key_padding_mask: ``(B, S)`` or ``(S)``: bool, True where a key is *blocked*, or
                additive float (added to ``log K``).
            need_weights: whether to return the attention weights. They are a dense ``L x S``
                tensor, so leave them away where nobody looks at them.
            attn_mask: ``(L, S)`` or ``(B * Hq, L, S)``: bool, True where a pair is *blocked*, or
                additive float.
            average_attn_weights: whether the weights are averaged over the heads.
            is_causal: query ``i`` reads keys up to ``S - L + i``. Where ``attn_mask`` is given this
                is taken as a hint about it and the mask alone decides.

        Returns:
            The output, shaped like ``query``, and the weights or None: ``(B, L, S)``, or
            ``(B, Hq, L, S)`` where not averaged, without ``B`` for input without batch. The weights
            of a query sum to 1 (to 0 where no key has mass).
        """
        if not torch.jit.is_scripting() and query.is_nested:
            padded, padding = self._padded(
                query, key, value, key_padding_mask, attn_mask, need_weights
            )
            output, _ = self.forward(
                padded, padded, padded, padding, need_weights=False, is_causal=is_causal
            )
            return self._nested_like(query, output), None
        self._check_input(query, key, value)
        batched = query.dim() == 3
        query, key, value = self._batch_first(query, key, value)
        mask = self._mask(query, key, key_padding_mask, attn_mask, batched)
        is_causal = is_causal and attn_mask is None
        enable_gqa = self.num_kv_heads != self.num_heads
        query, key, value = self._project(query, key, value)
        key, value, mask, is_causal = self._extended(key, value, mask, query.size(-2), is_causal)
        bandwidth = self.bandwidth
        output, log_mass = kernel_attention(
            query,
            key,
            value,
            bandwidth,
            self.kernel,
            attn_mask=mask,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=enable_gqa,
            return_mass=True,
        )
        weights: Tensor | None = None
        if need_weights:
            weights = torch.ops.mixhead._kernel_attention_weights(
                query, key, log_mass, bandwidth, self.kernel, mask, is_causal, enable_gqa
            )
            weights = self._returned_weights(weights, batched, average_attn_weights)
        return self._output(output, batched), weights

    def extra_repr(self) -> str:
        kernel = self.kernel[0] if len(self.kernel) == 1 else self.kernel
        learned = isinstance(self.log_bandwidth, nn.Parameter)
        return f"{super().extra_repr()}, kernel={kernel!r}, learn_bandwidth={learned}"
