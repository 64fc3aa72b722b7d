"""How errors print what came."""

from torch import Tensor


def shape_text(tensor: Tensor) -> str:
    return "(" + ", ".join([str(size) for size in tensor.shape]) + ")"
