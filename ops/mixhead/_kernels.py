"""The names of the kernels, as csrc/kernel_attention/kernels.h has them."""

KERNELS = (
    "dot", "cosine", "gaussian", "laplacian", "matern32", "matern52", "cauchy", "epanechnikov",
    "tricube", "boxcar",
)  # fmt: skip
