"""What the figures of this example are to be, and its picture in the gallery."""

from shared.goals import Goals, at_least, at_most, control, exactly

PICTURE = "gates.png"
GOALS: Goals = {
    "fact_accuracy": at_least(0.99),
    # Chance is 1 in about 1,100 names; a few abbreviations are like the name they stand for.
    "gate_zero_facts": control(at_most(0.02)),
    "empty_memory_facts": control(at_most(0.02)),
    "local_accuracy": at_least(0.99),
    "gate_one_local": control(at_most(0.02)),
    "gate_auc": at_least(0.99),
    "gate_moved": at_least(0.9),
    "swap_follows_new_memory": at_least(0.99),
    "new_entry_found": exactly(1),
    "conflict_token_gate": at_least(0.98),
    "conflict_scalar_gate": control(at_most(0.6)),
    "cpp_max_error": at_most(1e-5),
}
