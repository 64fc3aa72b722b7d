"""The two regressions, standardised by their training part, in float64."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_diabetes, make_friedman1
from torch import Tensor


@dataclass
class Regression:
    name: str
    inputs: Tensor  # (n, E), of training
    targets: Tensor  # (n,)
    test_inputs: Tensor
    test_targets: Tensor

    def error(self, prediction: Tensor) -> float:
        """Mean squared error on the test part, in variances of the training targets."""
        return float((prediction - self.test_targets).square().mean())


def standardised(name: str, inputs: Tensor, targets: Tensor, training: int) -> Regression:
    def scaled(table: Tensor) -> Tensor:
        part = table[:training]
        return (table - part.mean(0)) / part.std(0)

    inputs, targets = scaled(inputs), scaled(targets)
    return Regression(
        name, inputs[:training], targets[:training], inputs[training:], targets[training:]
    )


def friedman(training: int, test: int, seed: int) -> Regression:
    """Friedman 1: ``10 sin(pi x1 x2) + 20 (x3 - 1/2)^2 + 10 x4 + 5 x5 + noise``; x6 to x10 are
    noise (Friedman, "Multivariate adaptive regression splines", Annals of Statistics 19, 1991)."""
    tables = make_friedman1(training + test, n_features=10, noise=1.0, random_state=seed)
    return standardised("Friedman-1", *map(torch.tensor, tables), training)


def diabetes(training: int, seed: int) -> Regression:
    """scikit-learn's 442 patients, ten measurements each; what is not for training is for the
    test."""
    tables = map(torch.tensor, load_diabetes(return_X_y=True, scaled=False))
    inputs, targets = tables
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    return standardised("diabetes", inputs[order], targets[order], training)
