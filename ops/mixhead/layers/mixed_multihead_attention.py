"""MixedMultiheadAttention: mixed_attention with projections, gates and masks around it."""

import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixhead._errors import shape_text
from mixhead.functional import mixed_attention
from mixhead.layers.masks import both
from mixhead.layers.multihead_frame import MultiheadFrame
from mixhead.layers.weights import mixed_attention_weights
from mixhead.memory import MemoryBank


def _keyword_only_from(first: str) -> Callable:
    """Makes the arguments from `first` on keyword-only; the decorated source, which TorchScript
    compiles in the names of this file, has them positional."""

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        positional = list(signature.parameters).index(first)
        parameters = [
            parameter.replace(kind=parameter.KEYWORD_ONLY) if index >= positional else parameter
            for index, parameter in enumerate(signature.parameters.values())
        ]

        @functools.wraps(function)
        def checked(*args, **kwargs):
            if len(args) > positional:
                raise TypeError(
                    f"{function.__qualname__} takes {positional} positional arguments, {first} and "
                    f"later ones by keyword, got {len(args)} positional"
                )
            return function(*args, **kwargs)

        checked.__signature__ = signature.replace(parameters=parameters)
        return checked

    return decorate


class MixedMultiheadAttention(MultiheadFrame):
    r"""`torch.nn.MultiheadAttention` whose heads can also read an external memory.

    Each head :math:`h` mixes softmax attention over the sequence, :math:`A_s`, with softmax
    attention over the memory, :math:`A_m`, by a learned gate:

    .. math::
        \text{head}_h = (1 - w_h) A_s + w_h A_m, \qquad
        w_h = \sigma(g_h) \text{ or, with rule "joint", } \sigma(g_h + l_m - l_s)

    where :math:`l_s, l_m` are the log-sum-exps of the two softmaxes
    (see `mixhead.mixed_attention`; gating after Wu et al., "Memorizing Transformers", 2022).
    The logit :math:`g_h` is by ``gate``:

    - ``"head"``: ``mix[h]``, one number per head;
    - ``"token"``: ``mix[h] + <mix_weight[h], x>`` for the query's token ``x``, before projection;
    - ``"channel"``: ``mix[h, 0, c]``, one number per head and channel (rule ``"gate"`` only).

    Parameters, names and initialisation are those of `torch.nn.MultiheadAttention`, plus those of
    the gate and of the memory's own projections, so its state dict loads here: what it lacks keeps
    its value. With ``memory=None`` the layer computes the same, and it can stand in for
    ``self_attn`` in `torch.nn.TransformerEncoderLayer` and `torch.nn.TransformerDecoderLayer`.
    Where it differs: a query that may read nothing gives zeros (torch: NaN), ``is_causal=True``
    needs no ``attn_mask``, and the weights returned are those before dropout.

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
        rule: ``"gate"`` or ``"joint"``.
        gate: ``"head"``, ``"token"`` or ``"channel"``.
        memory_projection: how a memory tensor becomes keys and values: ``"shared"`` by the
            projections of ``key`` and ``value``, ``"own"`` by ``memory_k_proj`` and
            ``memory_v_proj``.
        initial_mix: initial value of ``mix``; 0 opens a gate by half.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument of the constructor, or a shape given to `forward`, does not fit.

    Example:
        >>> layer = mixhead.MixedMultiheadAttention(512, num_heads=8, batch_first=True)
        >>> tokens, memory = torch.randn(2, 128, 512), torch.randn(4096, 512)
        >>> output, weights = layer(tokens, tokens, tokens, need_weights=False, memory=memory)
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
        rule: str = "gate",
        gate: str = "head",
        memory_projection: str = "shared",
        initial_mix: float = 0.0,
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
        self.rule = rule
        self.gate = gate
        self.memory_projection = memory_projection
        self.initial_mix = initial_mix
        self._check_gate()
        self._create_gate(bias, factory)
        self.reset_parameters()

    def _check_gate(self) -> None:
        choices = {
            "rule": ("gate", "joint"),
            "gate": ("head", "token", "channel"),
            "memory_projection": ("shared", "own"),
        }
        for argument, allowed in choices.items():
            if getattr(self, argument) not in allowed:
                raise ValueError(
                    f"{self._name}: {argument} must be one of {', '.join(map(repr, allowed))}, got "
                    f"{getattr(self, argument)!r}"
                )
        if self.rule == "joint" and self.gate == "channel":
            raise ValueError(
                f"{self._name}: gate='channel' needs rule='gate', got rule='joint', whose softmax "
                f"has one weight for all channels"
            )

    def _create_gate(self, bias: bool, factory: dict) -> None:
        mix_width = self.head_dim if self.gate == "channel" else 1
        self.mix = nn.Parameter(torch.empty(self.num_heads, 1, mix_width, **factory))
        mix_weight = None
        if self.gate == "token":
            mix_weight = nn.Parameter(torch.empty(self.num_heads, self.embed_dim, **factory))
        self.register_parameter("mix_weight", mix_weight)
        own = self.memory_projection == "own"
        widths = (self.embed_dim, self.num_kv_heads * self.head_dim)
        self.memory_k_proj = nn.Linear(*widths, bias=bias, **factory) if own else None
        self.memory_v_proj = nn.Linear(*widths, bias=bias, **factory) if own else None

    def reset_parameters(self) -> None:
        """Initial values, drawn as `torch.nn.MultiheadAttention` draws them."""
        self._reset_projections()
        for projection in (self.memory_k_proj, self.memory_v_proj):
            if projection is not None:
                nn.init.xavier_uniform_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        nn.init.constant_(self.mix, self.initial_mix)
        if self.mix_weight is not None:
            nn.init.zeros_(self.mix_weight)

    @_keyword_only_from("memory")
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
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from ``query`` to ``key``/``value`` and to ``memory``.

        **Two meanings of a bool mask.** In ``key_padding_mask`` and ``attn_mask``, as in
        `torch.nn.MultiheadAttention`, True means *blocked*. In ``memory_mask``, as in
        `mixhead.mixed_attention`, True means *may read*.

        Args:
            query: ``(L, B, E)``, ``(B, L, E)`` with ``batch_first``, or ``(L, E)``.
            key: ``(S, B, kdim)``, ``(B, S, kdim)`` or ``(S, kdim)``.
            value: ``(S, B, vdim)``, ``(B, S, vdim)`` or ``(S, vdim)``.
            key_padding_mask: ``(B, S)`` or ``(S)``: bool, True where a key is *blocked*, or
                additive float.
            need_weights: whether to return the attention weights. They are a dense
                ``L x (S + M)`` tensor, so leave them away where nobody looks at them.
            attn_mask: ``(L, S)`` or ``(B * Hq, L, S)``: bool, True where a pair is *blocked*, or
                additive float.
            average_attn_weights: whether the weights are averaged over the heads.
            is_causal: query ``i`` reads keys up to ``S - L + i``. Where ``attn_mask`` is given this
                is taken as a hint about it and the mask alone decides. The memory is never causal.
            memory: ``(M, E)`` shared by the batch or ``(B, M, E)`` (in this order with every
                ``batch_first``), projected here; or a `MemoryBank`, whose entries are keys and
                values already (not under TorchScript: give `attend` its keys and values); or None.
            memory_mask: bool, True where a slot *may be read*, or additive float; broadcasts to
                ``(B, Hq, L, M)``. For a `MemoryBank`, ``M`` is its length or its capacity.

        Returns:
            The output, shaped like ``query``, and the weights over ``[sequence, memory]`` or None:
            ``(B, L, S + M)``, or ``(B, Hq, L, S + M)`` where not averaged, without ``B`` for input
            without batch. The weights of a query sum to 1 (to 0 where it may read nothing); with
            ``gate="channel"`` they are the average over the channels. Under ``torch.compile`` and
            ``torch.export`` ``M`` of a `MemoryBank` is its capacity.
        """
        if not torch.jit.is_scripting() and query.is_nested:
            padded, padding = self._padded(
                query, key, value, key_padding_mask, attn_mask, need_weights
            )
            output, _ = self.forward(
                padded,
                padded,
                padded,
                padding,
                need_weights=False,
                is_causal=is_causal,
                memory=memory,
                memory_mask=memory_mask,
            )
            return self._nested_like(query, output), None
        if memory is None:
            memory_key = memory_value = query.new_zeros(self.num_kv_heads, 0, self.head_dim)
        elif isinstance(memory, Tensor):
            memory_key, memory_value = self.project_memory(memory)
        else:
            memory_key, memory_value, memory_mask = _read_bank(memory, memory_mask)
        return self.attend(
            query,
            key,
            value,
            memory_key,
            memory_value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
            memory_mask,
        )

    @torch.jit.export
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        memory_key: Tensor,
        memory_value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` with a memory that is projected already, as `project_memory` and the methods
        `keys` and `values` of a `MemoryBank` return it. Scripts, so a scripted model calls
        ``self.attention.attend(x, x, x, self.bank.keys(), self.bank.values())``.

        Args:
            memory_key: ``(H, M, D)`` shared by the batch or ``(B, H, M, D)``.
            memory_value: of the same shape.

        The other arguments and what is returned are those of `forward`.
        """
        self._check_input(query, key, value)
        batched = query.dim() == 3
        query, key, value = self._batch_first(query, key, value)
        mask = self._mask(query, key, key_padding_mask, attn_mask, batched)
        is_causal = is_causal and attn_mask is None
        mix = self._mix_logit(query)
        query, key, value = self._project(query, key, value)
        key, value, mask, is_causal = self._extended(key, value, mask, query.size(-2), is_causal)
        output, self_lse, memory_lse = mixed_attention(
            query,
            key,
            value,
            memory_key,
            memory_value,
            mix,
            rule=self.rule,
            attn_mask=mask,
            memory_mask=memory_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            enable_gqa=self.num_kv_heads != self.num_heads,
            return_lse=True,
        )
        weights: Tensor | None = None
        if need_weights:
            weights = mixed_attention_weights(
                query,
                key,
                memory_key,
                mix,
                self_lse,
                memory_lse,
                self.rule,
                mask,
                memory_mask,
                is_causal,
            )
            weights = self._returned_weights(weights, batched, average_attn_weights)
        return self._output(output, batched), weights

    @torch.jit.export
    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of memory tokens, as a `MemoryBank` stores them.

        Args:
            memory: ``(M, E)`` or ``(B, M, E)``.

        Returns:
            Keys and values ``(H, M, D)`` or ``(B, H, M, D)``.
        """
        if memory.dim() != 2 and memory.dim() != 3:
            raise ValueError(
                f"{self._name}: memory must have 2 or 3 dimensions, got {shape_text(memory)}"
            )
        if self.memory_k_proj is not None and self.memory_v_proj is not None:
            self._check_memory_width(memory, self.embed_dim)
            key, value = self.memory_k_proj(memory), self.memory_v_proj(memory)
        else:
            if self.kdim != self.vdim:
                raise ValueError(
                    f"{self._name}: memory_projection='shared' needs one width for "
                    f"keys and values, got kdim={self.kdim} and vdim={self.vdim}"
                )
            self._check_memory_width(memory, self.kdim)
            key, value = self._project_key(memory), self._project_value(memory)
        return self._key_heads(key), self._key_heads(value)

    def _mix_logit(self, query: Tensor) -> Tensor:
        """The gate's logit for the op; ``query`` is ``(B, L, E)``, before projection."""
        mix_weight = self.mix_weight
        if mix_weight is None:
            return self.mix
        return self.mix + F.linear(query, mix_weight).transpose(1, 2).unsqueeze(-1)

    def _check_memory_width(self, memory: Tensor, width: int) -> None:
        if memory.size(-1) != width:
            raise ValueError(
                f"{self._name}: memory must be (M, {width}) or (B, M, {width}), got "
                f"{shape_text(memory)}"
            )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, rule={self.rule!r}, gate={self.gate!r}, "
            f"memory_projection={self.memory_projection!r}"
        )


def _read_bank(bank: MemoryBank, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of a bank: its entries, or where a graph is captured, which must not
    depend on how many there are, all of its slots and which of them hold one."""
    if not isinstance(bank, MemoryBank):
        raise TypeError(
            f"MixedMultiheadAttention: memory must be a tensor, a MemoryBank or None, got "
            f"{type(bank).__name__}"
        )
    if torch.compiler.is_compiling():
        valid = bank.mask()
        if mask is not None:
            valid = both(valid, mask)
        return bank.key_slots, bank.value_slots, valid
    length = len(bank)
    if mask is not None and mask.dim() and mask.size(-1) == bank.capacity:
        mask = mask[..., :length]
    return bank.keys(), bank.values(), mask
