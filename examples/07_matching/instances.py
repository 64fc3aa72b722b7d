"""Jobs and candidates: costs drawn at random, and costs of two hidden criteria."""

from dataclasses import dataclass

import mixhead
import torch
from torch import Tensor

SKILLS, LOCATION = 6, 2


def as_attention(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Points (..., 1, N, N) whose kernel "dot" with bandwidth h is exp(-cost / h^2)."""
    size = cost.shape[-1]
    query = torch.eye(size, dtype=cost.dtype).expand(cost.shape).unsqueeze(-3)
    return query, -cost.mT.unsqueeze(-3)


def hungarian(cost: Tensor) -> Tensor:
    """The candidate of each job (..., N) in the cheapest matching."""
    return mixhead.assignment(-cost)


def cost_of(cost: Tensor, matched: Tensor) -> Tensor:
    return cost.gather(-1, matched.unsqueeze(-1)).squeeze(-1).sum(-1)


def margin(cost: Tensor, best: Tensor) -> Tensor:
    """By what share of its cost the cheapest matching (..., N) beats the second cheapest, which
    must differ from it in some row: the cheapest of those where one pair of it is forbidden."""
    size = cost.shape[-1]
    forbidden = torch.nn.functional.one_hot(best, size).bool().unsqueeze(-3)
    row = torch.eye(size, dtype=torch.bool).unsqueeze(-1)
    others = cost.unsqueeze(-3).masked_fill(forbidden & row, 1e6)
    second = cost_of(others, hungarian(others)).min(-1).values
    return second / cost_of(cost, best) - 1


@dataclass
class Market:
    """Two criteria of hidden weights. A job describes the skills it asks for in other terms than a
    candidate describes the ones it has: `terms` is the dictionary between them, to be learned."""

    terms: Tensor  # (SKILLS, SKILLS), orthogonal
    skill_weight: float
    location_weight: float

    @classmethod
    def random(cls, generator: torch.Generator, skill_weight: float, location_weight: float):
        square = torch.randn(SKILLS, SKILLS, generator=generator)
        return cls(torch.linalg.qr(square).Q, skill_weight, location_weight)

    def draw(self, generator: torch.Generator, count: int, size: int):
        """Features of jobs and candidates (count, size, SKILLS + LOCATION), and their cost."""
        skills, wanted = torch.randn(2, count, size, SKILLS, generator=generator).unbind()
        here, there = torch.randn(2, count, size, LOCATION, generator=generator).unbind()
        cost = self.skill_weight * torch.cdist(wanted, skills).square()
        cost = cost + self.location_weight * torch.cdist(there, here).square()
        jobs = torch.cat([wanted @ self.terms, there], -1)
        return jobs, torch.cat([skills, here], -1), cost
