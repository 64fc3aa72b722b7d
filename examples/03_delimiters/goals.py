"""What the figures of this example are to be, and its picture in the gallery."""

from shared.goals import Goals, at_least, at_most, control, exactly

PICTURE = "clauses.png"
GOALS: Goals = {
    "boundary_f1": at_least(0.985),
    "nonfinal_period_recall": at_least(0.95),
    "detector_mass": at_least(0.9),
    "clause_pointer_10x_length": exactly(1),
    # The clause that opens a sentence has both pointers in one place.
    "one_head_two_pointers": control(at_most(0.6)),
    "random_delimiter_ids": control(at_most(0.1)),
    "detector_off": control(at_most(0.1)),
}
