"""What the attention layers share: projections, masks and shapes of torch.nn.MultiheadAttention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixhead._errors import shape_text
from mixhead.layers.masks import both, sequence_mask

#: What the layers have that torch.nn.MultiheadAttention has not, in their state dicts.
_ADDED_NAMES = {"mix", "mix_weight", "memory_k_proj", "memory_v_proj", "log_bandwidth"}


def _is_added(name: str) -> bool:
    """Whether a parameter is one of ours, also under the names that torch.nn.utils gives it."""
    return any(
        part in _ADDED_NAMES or part.removesuffix("_orig").removesuffix("_mask") in _ADDED_NAMES
        for part in name.split(".")
    )


class MultiheadFrame(nn.Module):
    """The frame of `torch.nn.MultiheadAttention` around an attention operator.

    A layer derives from it, adds its own parameters, and computes in `forward`, between
    `_batch_first` and `_output`, its operator on the heads that `_project` gives. Parameters, names
    and initialisation are torch's, so its state dict loads: what it lacks keeps its value.
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
        dropout: float,
        bias: bool,
        add_bias_kv: bool,
        add_zero_attn: bool,
        kdim: int | None,
        vdim: int | None,
        batch_first: bool,
        num_kv_heads: int | None,
        factory: dict,
    ) -> None:
        super().__init__()
        self._name = type(self).__name__  # of the layer, in errors; TorchScript has no type()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.dropout = dropout
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self._qkv_same_embed_dim = False
        self._check_frame()
        self.head_dim = embed_dim // num_heads
        self.add_zero_attn = add_zero_attn
        self._create_projections(bias, factory)
        for name in ("bias_k", "bias_v"):
            shape = (1, 1, self.num_kv_heads * self.head_dim)
            parameter = nn.Parameter(torch.empty(shape, **factory)) if add_bias_kv else None
            self.register_parameter(name, parameter)

    def _check_frame(self) -> None:
        for argument in ("embed_dim", "num_heads", "num_kv_heads", "kdim", "vdim"):
            if getattr(self, argument) <= 0:
                raise ValueError(
                    f"{self._name}: {argument} must be positive, got {getattr(self, argument)}"
                )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"{self._name}: embed_dim must be a multiple of num_heads, got {self.embed_dim} "
                f"and {self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self._name}: num_heads must be a multiple of num_kv_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}"
            )
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"{self._name}: dropout must be in [0, 1], got {self.dropout}")

    def _create_projections(self, bias: bool, factory: dict) -> None:
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
        for name, shape in shapes.items():
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, **factory))
            self.register_parameter(name, parameter)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)

    def _reset_projections(self) -> None:
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
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def _check_input(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.dim() != 2 and query.dim() != 3:
            raise ValueError(
                f"{self._name}: query must have 2 or 3 dimensions, got {shape_text(query)}"
            )
        for name, tensor, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if tensor.dim() != query.dim() or tensor.size(-1) != width:
                raise ValueError(
                    f"{self._name}: {name} must have {query.dim()} dimensions, the last of "
                    f"{width}, got {shape_text(tensor)}"
                )

    def _batch_first(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs as ``(B, L or S, width)``; what was one tensor stays one."""
        same_key, same_value = key is query, value is key
        query = self._one_batch_first(query)
        key = query if same_key else self._one_batch_first(key)
        value = key if same_value else self._one_batch_first(value)
        return query, key, value

    def _one_batch_first(self, tokens: Tensor) -> Tensor:
        if tokens.dim() == 2:
            return tokens.unsqueeze(0)
        return tokens if self.batch_first else tokens.transpose(0, 1)

    def _mask(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        batched: bool,
    ) -> Tensor | None:
        """The operator's mask for ``query`` and ``key``, which are batch first."""
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        return sequence_mask(
            self._name,
            key_padding_mask,
            attn_mask,
            query.size(0),
            self.num_heads,
            query.size(1),
            key.size(1),
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The heads ``(B, Hq or H, L or S, D)`` of inputs batch first."""
        in_proj_weight = self.in_proj_weight
        kv_dim = self.num_kv_heads * self.head_dim
        if key is query and value is key and in_proj_weight is not None:
            projected = F.linear(query, in_proj_weight, self.in_proj_bias)
            query, key, value = projected.split([self.embed_dim, kv_dim, kv_dim], dim=-1)
        else:
            query = self._project_query(query)
            key, value = self._project_key(key), self._project_value(value)
        query = query.unflatten(-1, [self.num_heads, self.head_dim]).transpose(-3, -2)
        return query, self._key_heads(key), self._key_heads(value)

    def _extended(
        self, key: Tensor, value: Tensor, mask: Tensor | None, length: int, is_causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """The heads of keys and values with those of ``add_bias_kv`` and ``add_zero_attn`` behind
        them, which every query may read, and the mask and causality that go with them."""
        bias_k, bias_v = self.bias_k, self.bias_v
        keys, added = key.size(-2), 0
        if bias_k is not None and bias_v is not None:
            rows = [key.size(0), -1, -1, -1]
            key = torch.cat([key, self._key_heads(bias_k).expand(rows)], dim=-2)
            value = torch.cat([value, self._key_heads(bias_v).expand(rows)], dim=-2)
            added += 1
        if self.add_zero_attn:
            zeros = key.new_zeros(key.size(0), key.size(1), 1, key.size(3))
            key, value = torch.cat([key, zeros], dim=-2), torch.cat([value, zeros], dim=-2)
            added += 1
        if added == 0:
            return key, value, mask, is_causal
        if is_causal:
            past = torch.ones(length, keys, dtype=torch.bool, device=key.device)
            past = past.tril(keys - length)
            mask = past if mask is None else both(past, mask)
        if mask is not None:
            readable = 1.0 if mask.dtype == torch.bool else 0.0
            mask = F.pad(mask, [0, added], value=readable)
        return key, value, mask, False

    @torch.jit.unused
    def _padded(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor]:
        """A nested tensor as a padded one and the mask of its padding."""
        plain = key_padding_mask is None and attn_mask is None and not need_weights
        if key is not query or value is not query or not plain or not self.batch_first:
            raise ValueError(
                f"{self._name}: a nested query must be key and value too, of a layer with "
                f"batch_first=True, without masks and with need_weights=False"
            )
        lengths = torch.tensor([row.size(0) for row in query.unbind()], device=query.device)
        padded = torch.nested.to_padded_tensor(query, 0.0)
        padding = torch.arange(padded.size(1), device=query.device) >= lengths.unsqueeze(1)
        return padded, padding

    @torch.jit.unused
    def _nested_like(self, query: Tensor, padded: Tensor) -> Tensor:
        """The rows of ``padded`` that are not padding, nested as ``query`` is."""
        rows = [out[: row.size(0)] for out, row in zip(padded, query.unbind(), strict=True)]
        if query.layout == torch.jagged:
            return torch.nested.nested_tensor_from_jagged(torch.cat(rows), query.offsets())
        return torch.nested.as_nested_tensor(rows, layout=query.layout)

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

    def _output(self, heads: Tensor, batched: bool) -> Tensor:
        """The layer's output, in the layout of its query, from heads ``(B, Hq, L, D)``."""
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1)

    def _returned_weights(self, weights: Tensor, batched: bool, average: bool) -> Tensor:
        """Weights ``(B, Hq, L, S)`` as torch.nn.MultiheadAttention returns them."""
        weights = weights.mean(dim=1) if average else weights
        return weights if batched else weights.squeeze(0)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Lets a state dict of torch.nn.MultiheadAttention load: our additions, which it lacks,
        keep their values. On the meta device they have none and are missing."""
        additions = {
            prefix + name: tensor.detach()
            for name, tensor in (*self.named_parameters(), *self.named_buffers())
            if _is_added(name)
        }
        if not additions.keys() & state_dict.keys():
            state_dict.update({n: t for n, t in additions.items() if not t.is_meta})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_kv_heads={self.num_kv_heads}, dropout={self.dropout}, kdim={self.kdim}, "
            f"vdim={self.vdim}, batch_first={self.batch_first}"
        )
