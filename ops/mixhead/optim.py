"""Parameter groups for the optimizer of a model with layers of mixhead."""

from typing import Any

from torch import nn

from mixhead.layers import KernelMultiheadAttention, MixedMultiheadAttention


def recommended_parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    gate_lr_factor: float = 10.0,
    bandwidth_lr_factor: float = 10.0,
) -> list[dict[str, Any]]:
    """Groups of a model's parameters for a `torch.optim.Optimizer`: gates and bandwidths
    learn faster.

    A gate is one number whose useful range is several units wide while a weight's is a fraction of
    one, so at the weights' learning rate it hardly moves; and weight decay would pull it towards
    half open. The same holds of the logarithm of a bandwidth, which decay would pull towards
    bandwidth 1. Every parameter is in exactly one group:

    - gates (``mix``, ``mix_weight`` of each `MixedMultiheadAttention`): ``lr * gate_lr_factor``, no
      weight decay;
    - bandwidths (``log_bandwidth`` of each `KernelMultiheadAttention` that learns it):
      ``lr * bandwidth_lr_factor``, no weight decay;
    - tensors with at least two dimensions: ``lr``, ``weight_decay``;
    - the rest (biases, scales of norms): ``lr``, no weight decay.

    Args:
        model: any module.
        lr: learning rate of all but the gates and bandwidths.
        weight_decay: of the weights.
        gate_lr_factor: learning rate of the gates over ``lr``.
        bandwidth_lr_factor: learning rate of the bandwidths over ``lr``.

    Returns:
        Dicts with the keys ``name``, ``params``, ``lr``, ``weight_decay``; without empty groups.

    Raises:
        ValueError: a number is negative.

    Example:
        >>> groups = mixhead.recommended_parameter_groups(model, lr=3e-4)
        >>> optimizer = torch.optim.AdamW(groups)
    """
    numbers = {
        "lr": lr,
        "weight_decay": weight_decay,
        "gate_lr_factor": gate_lr_factor,
        "bandwidth_lr_factor": bandwidth_lr_factor,
    }
    for argument, number in numbers.items():
        if not number >= 0:
            raise ValueError(
                f"recommended_parameter_groups: {argument} must not be negative, got {number}"
            )
    gates = {
        parameter
        for module in model.modules()
        if isinstance(module, MixedMultiheadAttention)
        for parameter in (module.mix, module.mix_weight)
        if parameter is not None
    }
    bandwidths = {
        module.log_bandwidth
        for module in model.modules()
        if isinstance(module, KernelMultiheadAttention)
    }
    special = gates | bandwidths
    others = [parameter for parameter in model.parameters() if parameter not in special]
    groups = [
        {
            "name": "gates",
            "params": [parameter for parameter in model.parameters() if parameter in gates],
            "lr": lr * gate_lr_factor,
            "weight_decay": 0.0,
        },
        {
            "name": "bandwidths",
            "params": [parameter for parameter in model.parameters() if parameter in bandwidths],
            "lr": lr * bandwidth_lr_factor,
            "weight_decay": 0.0,
        },
        {
            "name": "weights",
            "params": [parameter for parameter in others if parameter.dim() >= 2],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "biases and norms",
            "params": [parameter for parameter in others if parameter.dim() < 2],
            "lr": lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
