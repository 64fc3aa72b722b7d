"""Pictures of layers and of what the operators return (needs matplotlib).

Each function takes what it draws and an optional ``ax``, draws into it, and returns it. Where none
is given, the axes are those of a new figure of pyplot; where one is, pyplot is not touched.
Tensors may require gradients and be on any device; arrays do as well. Heads, tokens and memory
slots count from 0.
"""

from mixhead.plot.gating import gates
from mixhead.plot.matching import assignment
from mixhead.plot.profiles import kernels
from mixhead.plot.reading import reads
from mixhead.plot.regression import fit

__all__ = ["assignment", "fit", "gates", "kernels", "reads"]
