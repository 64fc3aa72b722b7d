"""What TorchScript compiles in place of the functions that return one thing or several.

A function has one return type in TorchScript, and no keyword-only arguments. Its compiler can pick
one of two functions by a constant argument, as it does for `return_indices` of
`torch.nn.functional.max_pool2d`.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch._jit_internal import boolean_dispatched


def pick_by_constant(
    function: Callable, argument: str, if_true: Callable, if_false: Callable
) -> None:
    """Has TorchScript compile one of two functions by the bool `argument`, False where absent."""
    boolean_dispatched[function] = {
        "if_true": if_true,
        "if_false": if_false,
        "index": list(inspect.signature(function).parameters).index(argument),
        "default": False,
        "arg_name": argument,
    }


def mixed_attention_with_lse(
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


def mixed_attention_alone(
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
    return mixed_attention_with_lse(
        query,
        key,
        value,
        memory_key,
        memory_value,
        mix,
        rule,
        attn_mask,
        memory_mask,
        memory_index,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
    )[0]


def kernel_attention_with_mass(
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


def kernel_attention_alone(
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
    return kernel_attention_with_mass(
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
