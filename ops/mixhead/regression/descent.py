"""BFGS within bounds from several starts at once."""

from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np

#: No step moves a coordinate by more.
_RADIUS = 1.0
_STEPS = 200
#: The least curvature along a step that is believed, as a part of that expected.
_DAMPING = 0.1


class Minimum(NamedTuple):
    value: float  # inf where the start had none
    place: np.ndarray  # (D,)
    inverse_hessian: np.ndarray  # (D, D), positive definite


class Descent(NamedTuple):
    """Where to look, and when to stop: once a step promises to gain less than the tolerance."""

    low: np.ndarray  # (D,)
    high: np.ndarray
    tolerance: float

    def minima(
        self,
        objective: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        starts: list[np.ndarray],
        inverse_hessian: np.ndarray | None = None,
        first_step: float = 1.0,
    ) -> list[Minimum]:
        """The lowest values near each start.

        ``objective`` gives the values ``(R,)`` and gradients ``(R, D)`` of places ``(R, D)``: in
        each round those that all the starts still under way ask for. The first step is Newton's by
        ``inverse_hessian``, or of length ``first_step`` down the gradient.
        """
        runs = [self._run(start, inverse_hessian, first_step) for start in starts]
        asked = {number: next(run) for number, run in enumerate(runs)}
        found: list[Minimum | None] = [None] * len(runs)
        while asked:
            answers = zip(*objective(np.stack(list(asked.values()))), strict=True)
            for number, answer in zip(list(asked), answers, strict=True):
                try:
                    asked[number] = runs[number].send(answer)
                except StopIteration as end:
                    found[number] = end.value
                    del asked[number]
        return found

    def _run(
        self, place: np.ndarray, inverse: np.ndarray | None, first_step: float
    ) -> Generator[np.ndarray, tuple[float, np.ndarray], Minimum]:
        """One descent: yields places, is sent their values and gradients.

        BFGS (Nocedal & Wright, "Numerical Optimization", 2006, section 6.1). A step that does not
        lead down enough is not taken, but its gradient is learned from, and the next is shorter.
        """
        identity = np.eye(len(place))
        value, gradient = yield place
        given = inverse is not None
        if not given:
            inverse = identity * (first_step / max(np.linalg.norm(gradient), 1e-300))
        if not np.isfinite(value):
            return Minimum(np.inf, place, inverse)
        radius = _RADIUS
        for _ in range(_STEPS):
            free, step = self._step(place, gradient, inverse)
            length = radius / max(radius, np.abs(step).max())
            trial = np.clip(place + length * step, self.low, self.high)
            moved = trial - place
            if -gradient @ moved < 2.0 * self.tolerance:
                break
            trial_value, trial_gradient = yield trial
            if np.isfinite(trial_value):
                # What the gradient changed by, and would have if `inverse` were right.
                change = free * (trial_gradient - gradient)
                expected = -length * free * gradient
                if not given and moved @ change > 0.0:  # the unit of length was a guess
                    inverse, given = identity * (moved @ moved / (moved @ change)), True
                if moved @ expected > 0.0:
                    inverse = _updated(inverse, moved, change, expected)
            if trial_value <= value + 1e-4 * gradient @ moved:
                place, value, gradient, radius = trial, trial_value, trial_gradient, _RADIUS
            else:
                radius = 0.3 * np.abs(moved).max()
        return Minimum(value, place, inverse)

    def _step(
        self, place: np.ndarray, gradient: np.ndarray, inverse: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Newton's step, and which coordinates are free: not at a bound that gradient or step
        press them against (Bertsekas, "Projected Newton methods", 1982)."""
        low, high = place <= self.low, place >= self.high
        free = ~(low & (gradient > 0.0) | high & (gradient < 0.0))
        while True:
            step = free * (inverse @ (free * -gradient))
            pressed = low & (step < 0.0) | high & (step > 0.0)
            if not pressed.any():
                return free, step
            free &= ~pressed


def _updated(
    inverse: np.ndarray, moved: np.ndarray, change: np.ndarray, expected: np.ndarray
) -> np.ndarray:
    """The inverse Hessian by BFGS after a move with that change of the gradient.

    Where the curvature along it is less than a part of that expected, least of all below 0, it
    counts as that part (Powell's damping; Nocedal & Wright, procedure 18.2).
    """
    curvature, least = moved @ change, _DAMPING * (moved @ expected)
    if curvature < least:
        share = (moved @ expected - least) / (moved @ expected - curvature)
        change = share * change + (1.0 - share) * expected
        curvature = least
    rest = np.eye(len(moved)) - np.outer(moved, change) / curvature
    return rest @ inverse @ rest.T + np.outer(moved, moved) / curvature
