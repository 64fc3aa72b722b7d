"""What the figures of this example are to be, and its picture in the gallery."""

from shared.goals import Goals, at_least, control, exactly

PICTURE = "reads.png"
GOALS: Goals = {
    "exact_50": exactly(1),
    "exact_100": exactly(1),
    "exact_200": exactly(1),
    "pointer_argmax": at_least(0.999),
    "constructed_exact_4096": exactly(1),
    "one_layer": control(exactly(0)),
    "boundary_head_off": control(exactly(0)),
    "absolute_positions_50": control(exactly(0)),
}
