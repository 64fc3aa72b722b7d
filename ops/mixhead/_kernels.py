"""The names of the kernels, as csrc/cpu/kernel.h has them."""

KERNELS = (
    "dot", "cosine", "gaussian", "laplacian", "matern32", "matern52", "cauchy", "epanechnikov",
    "tricube", "boxcar",
)  # fmt: skip
