"""What the figures of this example are to be, and its picture in the gallery."""

from shared.goals import Goals, at_least, at_most, control, within

PICTURE = "errors.png"
ROUNDING = 1e-9
GOALS: Goals = {
    "sigma_ratio": at_most(1e-12),
    "wide_heads_exceed_h": control(at_least(0.01)),
    "wide_heads_sigma_ratio_at_h_dk": at_most(1e-12),
    "softmax_exceeds_h": control(at_least(0.001)),
    "over_eckart_young": at_most(1.01),
    "h_minus_one_heads": control(at_least(1 - ROUNDING)),
    "h_heads": at_most(1 - ROUNDING),
    "linearisation_slope": within(2, 0.1),
}
