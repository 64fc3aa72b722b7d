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

        BFGS with backtracking (Nocedal & Wright, "Numerical Optimization", 2006, sections 3.1 and
        6.1). A coordinate at a bound stays there while the gradient presses it on (Bertsekas,
        "Projected Newton methods", 1982).
        """
        identity = np.eye(len(place))
        value, gradient = yield place
        given = inverse is not None
        if not given:
            inverse = identity * (first_step / max(np.linalg.norm(gradient), 1e-300))
        if not np.isfinite(value):
            return Minimum(np.inf, place, inverse)
        for _ in range(_STEPS):
            free = (place > self.low) | (gradient < 0)
            free &= (place < self.high) | (gradient > 0)
            step = free * (inverse @ (free * -gradient))
            if -gradient @ step < 2.0 * self.tolerance:
                break
            length = min(1.0, _RADIUS / np.abs(step).max())
            while True:
                trial = np.clip(place + length * step, self.low, self.high)
                trial_value, trial_gradient = yield trial
                moved = trial - place
                slope = min(gradient @ moved, 0.0)
                if trial_value <= value + 1e-4 * slope:
                    break
                # To the lowest point of the parabola through both values and the slope.
                length *= np.clip(-slope / (2.0 * (trial_value - value - slope)), 0.1, 0.5)
                if -gradient @ step * length < self.tolerance:
                    return Minimum(value, place, inverse)
            # What the gradient changed by, and what it would have if `inverse` were right.
            change, expected = free * (trial_gradient - gradient), -length * free * gradient
            place, value, gradient = trial, trial_value, trial_gradient
            if moved @ expected <= 0.0:
                continue
            if not given and moved @ change > 0.0:  # the unit of length was a guess
                inverse, given = identity * (moved @ moved / (moved @ change)), True
            inverse = _updated(inverse, moved, change, expected)
        return Minimum(value, place, inverse)


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
