"""Kernel regression as a scikit-learn estimator."""

from mixhead.regression.estimator import KernelRegressor

__all__ = ["KernelRegressor"]
