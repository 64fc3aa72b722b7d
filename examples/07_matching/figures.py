"""The figures: what a matching does that a row softmax does not, and what was learned."""

from pathlib import Path

import mixhead
from matplotlib import pyplot as plt
from shared.figures import save_figure
from torch import Tensor

BLUE, ORANGE = "#0369a1", "#c2410c"


def draw_plans(softmax: Tensor, plan: Tensor, matched: Tensor, path: Path) -> None:
    """Both plans (N, N) over the Hungarian answer (N,), and what each candidate gets of them."""
    figure, axes = plt.subplots(
        2, 2, figsize=(9, 5.6), height_ratios=(4, 1), sharex=True, layout="constrained"
    )
    parts = ((softmax, "row softmax", ORANGE), (plan, "matching_attention", BLUE))
    for (top, bottom), (weights, name, color) in zip(axes.T, parts, strict=True):
        mixhead.plot.assignment(weights, matched=matched, vmax=1, ax=top)
        top.set_title(f"{name}; circles: the Hungarian answer", loc="left", fontsize=10)
        top.set(xlabel=None, ylabel="job")
        bottom.bar(range(len(matched)), weights.sum(0), color=color, width=0.8)
        bottom.axhline(1.0, color="0.5", linewidth=0.8)
        bottom.set(xlabel="candidate", ylabel="sum")
    save_figure(figure, path)


def draw_learning(course: list[tuple], bars: dict[str, float], path: Path) -> None:
    """`course`: rows (step, loss, weight of each criterion); `bars`: share of right rows."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    steps, losses, skills, location = zip(*course, strict=True)
    left.plot(steps, losses, color="0.2")
    left.set(xlabel="step", ylabel="-log P of the Hungarian answer")
    middle.plot(steps, skills, color=BLUE, label="skills")
    middle.plot(steps, location, color=ORANGE, label="location")
    middle.set(xlabel="step", ylabel="learned weight", ylim=(0, None))
    middle.legend(frameon=False)
    colors = [BLUE] + [ORANGE] * (len(bars) - 1)
    right.barh(list(bars), list(bars.values()), color=colors)
    right.invert_yaxis()
    right.set(xlabel="rows equal to the Hungarian answer", xlim=(0, 1))
    for number, value in enumerate(bars.values()):
        right.text(0.02, number, f"{value:.3f}", va="center", fontsize=9, color="white")
    save_figure(figure, path)
