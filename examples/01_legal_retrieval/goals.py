"""What the figures of this example are to be, and its picture in the gallery."""

from shared.goals import Goals, at_least, at_most, control, exactly

PICTURE = "document.png"
GOALS: Goals = {
    "both_retrieved": at_least(0.99),
    "both_retrieved_8x_length": at_least(0.98),
    "position_spread": at_most(0.01),
    "heldout_typing": at_least(0.95),
    # To chance, which is 1 in 9.
    "precedent_with_its_head_off": control(at_most(0.2)),
    "precedent_drop_when_head_off": control(at_least(0.8)),
    "statute_drop_when_that_head_off": at_most(0.01),
    "statute_with_its_head_off": control(at_most(0.2)),
    "statute_drop_when_head_off": control(at_least(0.8)),
    "precedent_drop_when_that_head_off": at_most(0.01),
    "frozen_key_projection": control(at_most(0.8)),
    "single_head_same_width": control(exactly(0)),
}
