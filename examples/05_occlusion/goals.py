"""What the figures of this example are to be, and its picture in the gallery."""

from shared.goals import Goals, at_least, at_most, control, within

PICTURE = "accuracy.png"
GOALS: Goals = {
    "size_difference": at_most(0.02),
    "clean_gap": at_most(0.015),
    "vit_minus_cnn_50": at_least(0.15),
    "both_corners_one_layer": at_least(0.99),
    "cnn_small_receptive_field": control(within(0.5, 0.05)),
    "cnn_full_receptive_field": control(at_least(0.99)),
}
