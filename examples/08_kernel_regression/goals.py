"""What the figures of this example are to be, and its picture in the gallery."""

from shared.goals import Goals, at_least, at_most, control, within

PICTURE = "fits.png"
GOALS: Goals = {
    "statsmodels_max_error": at_most(1e-12),
    "torchscript_max_error": at_most(1e-12),
    "learned_bandwidth_vs_loo": at_most(0.01),
    "mcycle_lc_loo_h": within(0.9138, 1e-3),
    "faithful_lc_loo_h": within(0.2614, 1e-3),
    "key_bias_max_error": at_most(1e-12),
    "no_key_bias_unequal_norms": control(at_least(0.1)),
    "no_key_bias_unit_norms": at_most(1e-12),
}
