"""Jobs to candidates: a softmax over negative costs becomes an assignment once columns count too.

Matches random costs by `mixhead.matching_attention` and compares with the Hungarian answer, then
learns a matching by two criteria from Hungarian answers alone. See README.md.
"""

import argparse
import sys
from pathlib import Path

import mixhead
import torch
from torch import Tensor
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import figures  # noqa: E402
from goals import GOALS  # noqa: E402
from instances import (  # noqa: E402
    LOCATION,
    SKILLS,
    Market,
    as_attention,
    cost_of,
    hungarian,
    margin,
)
from shared.example import argument_parser, run, save_model  # noqa: E402

QUICK = {"instances": 8, "steps": 60, "tests": 200}
CRITERIA = {"skills": slice(0, SKILLS), "location": slice(SKILLS, SKILLS + LOCATION)}


def arguments() -> argparse.Namespace:
    parser = argument_parser(FOLDER, __doc__.splitlines()[0])
    sizes = {
        "size": (64, "jobs, and candidates, of a random cost matrix"),
        "instances": (32, "random cost matrices to match"),
        "softmaxes": (1000, "random cost matrices of the row softmax"),
        "iterations": (3000, "Sinkhorn iterations at most"),
        "jobs": (10, "jobs, and candidates, of an instance of two criteria"),
        "steps": (100, "training steps"),
        "batch": (32, "instances a step"),
        "tests": (600, "instances of the test, before those without a margin are left out"),
    }
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    rates = {
        "epsilon": (0.01, "weight of the entropy, in units of the largest cost"),
        "margin": (0.01, "least advantage of the best matching over the second best in the test"),
        "skill-weight": (1.0, "hidden weight of the squared distance of skills"),
        "location-weight": (3.0, "hidden weight of the squared distance of locations"),
        "lr": (0.05, "learning rate"),
    }
    for name, (default, text) in rates.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=text)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def log_plan_of(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The logarithm of the plan (B, N, N) of costs, from the potentials."""
    query, key = as_attention(cost)
    bandwidth = torch.tensor(epsilon, dtype=cost.dtype).sqrt()
    _, row, column = mixhead.matching_attention(
        query, key, key, bandwidth, "dot", iterations=iterations, tolerance=5e-7
    )
    return row.mT - cost / epsilon + column


def unfilled(plan: Tensor) -> float:
    """The share of candidates that no job gives its largest weight."""
    chosen = torch.zeros(plan.shape[:-2] + plan.shape[-1:])
    return 1.0 - chosen.scatter_(-1, plan.argmax(-1), 1.0).mean().item()


def match_random_costs(args) -> tuple[dict, tuple[Tensor, Tensor, Tensor]]:
    """Figures over random costs; of the first one both plans and the Hungarian answer."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.size, args.size)
    costs = torch.rand(args.instances, *shape, generator=generator, dtype=torch.float64)
    residual, valid, gaps, soft_gaps, lonely = 0.0, 0, [], [], []
    for cost in tqdm(costs.split(8), desc="match", unit="batch"):
        log_plan = log_plan_of(cost, args.epsilon, args.iterations)
        plan = log_plan.exp()
        off = [(plan.sum(dim) - 1).abs().max().item() for dim in (-1, -2)]
        residual = max(residual, *off)
        matched, best = mixhead.assignment(log_plan), hungarian(cost)
        valid += int((matched.sort(-1).values == torch.arange(args.size)).all(-1).sum())
        cheapest = cost_of(cost, best)
        saved = args.size * cost.mean((-1, -2)) - cheapest
        gaps.append((cost_of(cost, matched) - cheapest) / cheapest)
        soft_gaps.append(((plan * cost).sum((-1, -2)) - cheapest) / saved)
        lonely.append(unfilled(plan))
    drawn = [log_plan_of(costs[:1], args.epsilon, n)[0].exp() for n in (0, args.iterations)]
    many = torch.rand(args.softmaxes, *shape, generator=generator)
    return {
        "marginal_residual": residual,
        "valid_permutations": valid / args.instances,
        "cost_gap_to_hungarian": torch.cat(gaps).mean().item(),
        "plan_cost_gap": torch.cat(soft_gaps).mean().item(),
        "row_softmax_unfilled": unfilled(log_plan_of(many, args.epsilon, 0)),
        "matching_unfilled": sum(lonely) / len(lonely),
    }, (*drawn, hungarian(costs[0]))


def train(market: Market, criteria: list[str], args, course: list) -> mixhead.SoftAssignment:
    """A layer that sees these criteria alone learns from the Hungarian answers of the market."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed + 1)
    sizes = [CRITERIA[name].stop - CRITERIA[name].start for name in criteria]
    layer = mixhead.SoftAssignment(sizes, head_dim=SKILLS)
    optimizer = torch.optim.Adam(layer.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps)
    progress = tqdm(range(args.steps), desc=f"learn {' + '.join(criteria)}", unit="step")
    for step in progress:
        jobs, candidates, cost = market.draw(generator, args.batch, args.jobs)
        answer = hungarian(cost)
        log_plan = layer.log_plan(seen(jobs, criteria), seen(candidates, criteria))
        loss = -log_plan.gather(-1, answer.unsqueeze(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        course.append((step, loss.item(), *weights_of(layer)))
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return layer


def weights_of(layer: mixhead.SoftAssignment) -> list[float]:
    """What each criterion counts: its weight times the mean square of its projections."""
    with torch.no_grad():
        return [
            (layer.log_weight[i].exp() * project.weight.square().sum() / project.in_features).item()
            for i, project in enumerate(layer.column_proj)
        ]


def seen(features: Tensor, criteria: list[str]) -> Tensor:
    return torch.cat([features[..., CRITERIA[name]] for name in criteria], -1)


@torch.no_grad()
def matching_of(layer, jobs: Tensor, candidates: Tensor, criteria: list[str]) -> Tensor:
    return mixhead.assignment(layer.log_plan(seen(jobs, criteria), seen(candidates, criteria)))


def follows_features(layer, jobs: Tensor, candidates: Tensor) -> bool:
    """Two candidates exchange their features: their jobs go with them, everyone else's stays.
    And where all are in another order, the same pairs are found."""
    both = list(CRITERIA)
    before = matching_of(layer, jobs, candidates, both)
    size = candidates.shape[-2]
    for order in (torch.tensor([1, 0, *range(2, size)]), torch.randperm(size)):
        after = matching_of(layer, jobs, candidates[..., order, :], both)
        if not torch.equal(order[after], before):
            return False
    return True


def learn_two_criteria(args) -> tuple[dict, mixhead.SoftAssignment, list, dict]:
    generator = torch.Generator().manual_seed(args.seed + 2)
    market = Market.random(generator, args.skill_weight, args.location_weight)
    jobs, candidates, cost = market.draw(generator, args.tests, args.jobs)
    answer = hungarian(cost)
    clear = margin(cost, answer) >= args.margin
    jobs, candidates, answer = jobs[clear], candidates[clear], answer[clear]
    print(f"{len(answer)} of {args.tests} instances have a margin of {args.margin:g}")

    course: list = []
    rows = {}
    for criteria in (["skills", "location"], ["skills"], ["location"]):
        layer = train(market, criteria, args, course if len(criteria) == 2 else [])
        matched = matching_of(layer, jobs, candidates, criteria)
        rows[" + ".join(criteria)] = (matched == answer).float().mean().item()
        if len(criteria) == 2:
            both = layer
    result = {
        "learned_two_criteria_rows": rows["skills + location"],
        "one_criterion_rows": max(rows["skills"], rows["location"]),
        "role_swap_follows_features": follows_features(both, jobs, candidates),
        "learned_weight_ratio": course[-1][3] / course[-1][2],
        "hidden_weight_ratio": args.location_weight / args.skill_weight,
        "clear_instances": len(answer),
    }
    return result, both, course, rows


def main() -> dict:
    args = arguments()
    result, (softmax, plan, best) = match_random_costs(args)
    figures.draw_plans(softmax, plan, best, args.out / "plans.png")
    learned, layer, course, rows = learn_two_criteria(args)
    figures.draw_learning(course, rows, args.out / "learning.png")
    save_model(layer, args.out / "matching.pt")
    print(f"""\
Row softmax and matching side by side:  {args.out / "plans.png"}
How the two criteria were learned:      {args.out / "learning.png"}
The layer as TorchScript:               {args.out / "matching.pt"}
The same in C++, without Python:        {FOLDER / "main.cpp"}""")
    return result | learned


if __name__ == "__main__":
    run(main, GOALS)
