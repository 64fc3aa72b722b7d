"""What the figures of this example are to be, and its picture in the gallery."""

from shared.goals import Goals, at_least, at_most, control, exactly, within

PICTURE = "plans.png"
GOALS: Goals = {
    "marginal_residual": at_most(1e-6),
    "valid_permutations": exactly(1),
    "cost_gap_to_hungarian": at_most(0.01),
    "row_softmax_unfilled": control(within(0.365, 0.015)),
    "learned_two_criteria_rows": at_least(0.95),
    "one_criterion_rows": control(at_most(0.6)),
    "role_swap_follows_features": exactly(True),
}
