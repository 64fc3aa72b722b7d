"""What an example's figures are to be: the tables in each folder's goals.py.

The example prints it, the gallery puts it beside the figures, and the tests hold README.md to it.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """The interval a figure is to lie in. A control is what must fail; its interval says how."""

    low: float
    high: float
    is_control: bool = False

    def met(self, figure: float | bool | None) -> bool:
        return figure is not None and self.low <= figure <= self.high

    def verdict(self, figure: float | bool | None) -> str:
        if self.is_control:
            return "as predicted" if self.met(figure) else "NOT AS PREDICTED"
        return "met" if self.met(figure) else "MISSED"

    def __str__(self) -> str:
        """The interval as the tables of the READMEs and the gallery have it."""
        interval = self.interval()
        return f"control: {interval}" if self.is_control else interval

    def interval(self) -> str:
        if isinstance(self.low, bool):
            return str(self.low).lower()
        if self.low == self.high:
            return number(self.low)
        if self.high == math.inf:
            return f">= {number(self.low)}"
        if self.low == -math.inf:
            return f"<= {number(self.high)}"
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        return f"{number(middle)} +- {number(half)}"


def number(value: float) -> str:
    return f"{value:.6g}".replace("e-0", "e-")


Goals = dict[str, Goal]


def at_least(low: float) -> Goal:
    return Goal(low, math.inf)


def at_most(high: float) -> Goal:
    return Goal(-math.inf, high)


def exactly(value: float | bool) -> Goal:
    return Goal(value, value)


def within(middle: float, tolerance: float) -> Goal:
    return Goal(middle - tolerance, middle + tolerance)


def control(goal: Goal) -> Goal:
    """The goal of what must fail as predicted."""
    return Goal(goal.low, goal.high, is_control=True)


def missed(goals: Goals, figures: dict) -> list[str]:
    """A line for each goal that the figures miss, and for each control that is not as predicted."""
    return [
        f"{key} is {figures.get(key)}, {'' if goal.is_control else 'goal '}{goal}"
        for key, goal in goals.items()
        if not goal.met(figures.get(key))
    ]
