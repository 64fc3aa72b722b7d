"""MixedMultiheadAttention: mixed_attention with projections, gates and masks around it."""

import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixhead._errors import shape_text
from mixhead.functional import mixed_attention
from mixhead.layers.masks import both, sequence_mask
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


class MixedMultiheadAttention(nn.Module):
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

    __constants__ = ("batch_first", "_qkv_same_embed_dim")

    # torch's encoder layer would otherwise skip `forward` in inference and compute plain attention
    # from `in_proj_weight`. Its TorchScript also compiles `merge_masks`, for that same way.
    _qkv_same_embed_dim: bool
    merge_masks = nn.MultiheadAttention.merge_masks

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        num_kv_heads: int | None = None,
        rule: str = "gate",
        gate: str = "head",
        memory_projection: str = "shared",
        initial_mix: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.dropout = dropout
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.rule = rule
        self.gate = gate
        self.memory_projection = memory_projection
        self.initial_mix = initial_mix
        self._qkv_same_embed_dim = False
        self._check_options()
        self.head_dim = embed_dim // num_heads
        self._create_parameters(bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def _check_options(self) -> None:
        name = type(self).__name__
        for argument in ("embed_dim", "num_heads", "num_kv_heads", "kdim", "vdim"):
            if getattr(self, argument) <= 0:
                raise ValueError(
                    f"{name}: {argument} must be positive, got {getattr(self, argument)}"
                )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"{name}: embed_dim must be a multiple of num_heads, got {self.embed_dim} and "
                f"{self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{name}: num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}"
            )
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"{name}: dropout must be in [0, 1], got {self.dropout}")
        choices = {
            "rule": ("gate", "joint"),
            "gate": ("head", "token", "channel"),
            "memory_projection": ("shared", "own"),
        }
        for argument, allowed in choices.items():
            if getattr(self, argument) not in allowed:
                raise ValueError(
                    f"{name}: {argument} must be one of {', '.join(map(repr, allowed))}, got "
                    f"{getattr(self, argument)!r}"
                )
        if self.rule == "joint" and self.gate == "channel":
            raise ValueError(
                f"{name}: gate='channel' needs rule='gate', got rule='joint', whose softmax has "
                f"one weight for all channels"
            )

    def _create_parameters(self, bias: bool, factory: dict) -> None:
        embed_dim, kv_dim = self.embed_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(
            ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
        )
        if self.kdim == embed_dim and self.vdim == embed_dim:
            shapes["in_proj_weight"] = (embed_dim + 2 * kv_dim, embed_dim)
        else:
            shapes["q_proj_weight"] = (embed_dim, embed_dim)
            shapes["k_proj_weight"] = (kv_dim, self.kdim)
            shapes["v_proj_weight"] = (kv_dim, self.vdim)
        if bias:
            shapes["in_proj_bias"] = (embed_dim + 2 * kv_dim,)
        shapes["mix"] = (self.num_heads, 1, self.head_dim if self.gate == "channel" else 1)
        shapes["mix_weight"] = (self.num_heads, embed_dim) if self.gate == "token" else None
        for name, shape in shapes.items():
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, **factory))
            self.register_parameter(name, parameter)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        own = self.memory_projection == "own"
        self.memory_k_proj = nn.Linear(embed_dim, kv_dim, bias=bias, **factory) if own else None
        self.memory_v_proj = nn.Linear(embed_dim, kv_dim, bias=bias, **factory) if own else None

    def reset_parameters(self) -> None:
        """Initial values, drawn as `torch.nn.MultiheadAttention` draws them."""
        for weight in (
            self.in_proj_weight,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
        ):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
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
        """
        self._check_input(query, key, value)
        batched = query.dim() == 3
        # Which inputs are one tensor is lost by the transposes below.
        same_key, same_value = key is query, value is key
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        mask = sequence_mask(
            key_padding_mask, attn_mask, query.size(0), self.num_heads, query.size(1), key.size(1)
        )
        is_causal = is_causal and attn_mask is None
        mix = self._mix_logit(query)
        query, key, value = self._project(query, key, value, same_key and same_value)
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
        output = self.out_proj(output.transpose(1, 2).flatten(2))
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
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return output, weights

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
                f"MixedMultiheadAttention: memory must have 2 or 3 dimensions, got "
                f"{shape_text(memory)}"
            )
        if self.memory_k_proj is not None and self.memory_v_proj is not None:
            self._check_memory_width(memory, self.embed_dim)
            key, value = self.memory_k_proj(memory), self.memory_v_proj(memory)
        else:
            if self.kdim != self.vdim:
                raise ValueError(
                    f"MixedMultiheadAttention: memory_projection='shared' needs one width for "
                    f"keys and values, got kdim={self.kdim} and vdim={self.vdim}"
                )
            self._check_memory_width(memory, self.kdim)
            key, value = self._project_key(memory), self._project_value(memory)
        return self._key_heads(key), self._key_heads(value)

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, same: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The heads ``(B, Hq or H, L or S, D)`` of a batch; ``same``: all three are one tensor."""
        in_proj_weight = self.in_proj_weight
        kv_dim = self.num_kv_heads * self.head_dim
        if same and in_proj_weight is not None:
            projected = F.linear(query, in_proj_weight, self.in_proj_bias)
            query, key, value = projected.split([self.embed_dim, kv_dim, kv_dim], dim=-1)
        else:
            query = self._project_query(query)
            key, value = self._project_key(key), self._project_value(value)
        query = query.unflatten(-1, [self.num_heads, self.head_dim]).transpose(-3, -2)
        return query, self._key_heads(key), self._key_heads(value)

    def _key_heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, [self.num_kv_heads, self.head_dim]).transpose(-3, -2)

    def _project_query(self, query: Tensor) -> Tensor:
        return self._project_rows(query, self.q_proj_weight, 0, self.embed_dim)

    def _project_key(self, key: Tensor) -> Tensor:
        kv_dim = self.num_kv_heads * self.head_dim
        return self._project_rows(key, self.k_proj_weight, self.embed_dim, kv_dim)

    def _project_value(self, value: Tensor) -> Tensor:
        kv_dim = self.num_kv_heads * self.head_dim
        return self._project_rows(value, self.v_proj_weight, self.embed_dim + kv_dim, kv_dim)

    def _project_rows(
        self, tokens: Tensor, separate_weight: Tensor | None, start: int, length: int
    ) -> Tensor:
        """Projects by ``separate_weight``, or by these rows of the packed weight."""
        in_proj_weight, bias = self.in_proj_weight, self.in_proj_bias
        weight = separate_weight
        if in_proj_weight is not None:
            weight = in_proj_weight.narrow(0, start, length)
        assert weight is not None
        if bias is not None:
            bias = bias.narrow(0, start, length)
        return F.linear(tokens, weight, bias)

    def _mix_logit(self, query: Tensor) -> Tensor:
        """The gate's logit for the op; ``query`` is ``(B, L, E)``, before projection."""
        mix_weight = self.mix_weight
        if mix_weight is None:
            return self.mix
        return self.mix + F.linear(query, mix_weight).transpose(1, 2).unsqueeze(-1)

    def _check_input(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.dim() != 2 and query.dim() != 3:
            raise ValueError(
                f"MixedMultiheadAttention: query must have 2 or 3 dimensions, got "
                f"{shape_text(query)}"
            )
        for name, tensor, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if tensor.dim() != query.dim() or tensor.size(-1) != width:
                raise ValueError(
                    f"MixedMultiheadAttention: {name} must have {query.dim()} dimensions, the last "
                    f"of {width}, got {shape_text(tensor)}"
                )

    def _check_memory_width(self, memory: Tensor, width: int) -> None:
        if memory.size(-1) != width:
            raise ValueError(
                f"MixedMultiheadAttention: memory must be (M, {width}) or (B, M, {width}), got "
                f"{shape_text(memory)}"
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Lets a state dict of torch.nn.MultiheadAttention load: it has none of our additions."""
        additions = {
            prefix + name: parameter.detach()
            for name, parameter in self.named_parameters()
            if name.startswith(("mix", "memory_"))
        }
        if not additions.keys() & state_dict.keys():
            state_dict.update(additions)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_kv_heads={self.num_kv_heads}, dropout={self.dropout}, kdim={self.kdim}, "
            f"vdim={self.vdim}, batch_first={self.batch_first}, rule={self.rule!r}, "
            f"gate={self.gate!r}, memory_projection={self.memory_projection!r}"
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
