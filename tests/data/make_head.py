"""Writes head.pt, a scripted model that tests/cpp/mixed_attention_test.cpp loads.

The model holds its own inputs and, for each rule, the output that float64 dense attention
(tests/python/reference.py) gives for them. Written once with the oldest supported torch, so that
every later build proves that it still runs an old model.

    PYTHONPATH=ops:tests/python python tests/data/make_head.py
"""

import pathlib

import mixhead  # noqa: F401  (loads the operators)
import reference
import torch


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Parameter(torch.tensor([0.4, -0.3])[:, None, None])
        for name, shape in {
            "query": (2, 2, 5, 8),
            "key": (2, 2, 7, 8),
            "value": (2, 2, 7, 4),
            "memory_key": (2, 6, 8),
            "memory_value": (2, 6, 4),
            "memory_mask": (6,),
        }.items():
            self.register_buffer(name, torch.randn(shape))
        for rule in ("gate", "joint"):
            output, _, _ = reference.mixed_attention(
                self.query, self.key, self.value, self.memory_key, self.memory_value,
                self.mix.detach(), rule=rule, memory_mask=self.memory_mask, is_causal=True,
            )  # fmt: skip
            self.register_buffer(f"expected_{rule}", output.float())

    @torch.jit.export
    def forward_with_rule(self, rule: str):
        output, _, _ = torch.ops.mixhead.mixed_attention(
            self.query, self.key, self.value, self.memory_key, self.memory_value, self.mix,
            rule=rule, memory_mask=self.memory_mask, is_causal=True,
        )  # fmt: skip
        return output

    def forward(self):
        return self.forward_with_rule("gate")


if __name__ == "__main__":
    torch.jit.script(Head().eval()).save(pathlib.Path(__file__).with_name("head.pt"))
