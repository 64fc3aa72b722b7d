"""recommended_parameter_groups: who is in which group, and that an optimizer follows it."""

import pytest
import torch
from mixhead import KernelMultiheadAttention, MixedMultiheadAttention, recommended_parameter_groups
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.attention = MixedMultiheadAttention(8, 2, gate="token", memory_projection="own")
        # Two dimensions, and yet no weight; the fixed one is no parameter.
        self.smoother = KernelMultiheadAttention(8, 2, bias=False, bandwidth=torch.ones(2, 4))
        self.fixed = KernelMultiheadAttention(8, 2, bias=False, learn_bandwidth=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.embedding.weight
        # The name alone makes no gate.
        self.mix = nn.Parameter(torch.zeros(3, 3))


def names_of(groups, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_groups_of_a_model():
    model = Model()
    groups = recommended_parameter_groups(
        model, lr=1e-3, weight_decay=0.1, gate_lr_factor=5, bandwidth_lr_factor=3
    )
    assert names_of(groups, model) == {
        "gates": {"attention.mix", "attention.mix_weight"},
        "bandwidths": {"smoother.log_bandwidth"},
        "weights": {
            "smoother.in_proj_weight",
            "smoother.out_proj.weight",
            "fixed.in_proj_weight",
            "fixed.out_proj.weight",
            "embedding.weight",
            "attention.in_proj_weight",
            "attention.out_proj.weight",
            "attention.memory_k_proj.weight",
            "attention.memory_v_proj.weight",
            "mix",
        },
        "biases and norms": {
            "attention.in_proj_bias",
            "attention.out_proj.bias",
            "attention.memory_k_proj.bias",
            "attention.memory_v_proj.bias",
            "norm.weight",
            "norm.bias",
            "head.bias",
        },
    }
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in groups} == {
        "gates": (5e-3, 0.0),
        "bandwidths": (3e-3, 0.0),
        "weights": (1e-3, 0.1),
        "biases and norms": (1e-3, 0.0),
    }


def test_every_parameter_exactly_once():
    model = nn.Sequential(Model(), Model(), nn.Conv1d(2, 2, 3))
    grouped = [p for group in recommended_parameter_groups(model, 1.0) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}


def test_empty_groups_are_left_out():
    groups = recommended_parameter_groups(nn.Linear(3, 3, bias=False), lr=1.0)
    assert [group["name"] for group in groups] == ["weights"]


def test_optimizer_moves_gates_further_and_does_not_decay_them():
    layer = MixedMultiheadAttention(8, 2, initial_mix=2.0)
    optimizer = torch.optim.SGD(recommended_parameter_groups(layer, 0.01, 0.5, 10.0))
    weight = layer.in_proj_weight.detach().clone()
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.mix, torch.full((2, 1, 1), 2.0 - 0.1))
    torch.testing.assert_close(layer.in_proj_weight, weight - 0.01 * (1 + 0.5 * weight))


@pytest.mark.parametrize(
    "argument", ["lr", "weight_decay", "gate_lr_factor", "bandwidth_lr_factor"]
)
@pytest.mark.parametrize("number", [-1.0, float("nan")])
def test_refuses_negative_numbers(argument, number):
    with pytest.raises(ValueError, match=f"{argument} must not be negative, got {number}"):
        recommended_parameter_groups(nn.Linear(2, 2), **{"lr": 1.0, argument: number})
