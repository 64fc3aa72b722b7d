"""How every example writes its figures."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from shared.example import atomic

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all, and closes the figure."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
