"""What the figures of this example are to be, and its picture in the gallery."""

from shared.goals import Goals, at_least, control, exactly

PICTURE = "grid.png"
GOALS: Goals = {
    "grid_exact": exactly(1),
    "stdlib_pairs_exact": exactly(1),
    "learned_exact": at_least(0.99),
    "layers_minus_one_survivors": control(exactly(1)),
    "untyped_accepts_mismatch": control(exactly(1)),
    "typed_accepts_mismatch": exactly(0),
}
