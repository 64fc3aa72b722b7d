"""Scaled dot-product attention as kernel regression, and what it takes for them to be equal."""

import mixhead
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import Tensor


def questions(held_out: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """diabetes: query (L, D) and key (S, D), standardised; value (S, 1) with deviation 1."""
    X, y = load_diabetes(return_X_y=True)
    X = torch.from_numpy((X - X.mean(0)) / X.std(0))
    y = torch.from_numpy((y - y.mean()) / y.std()).unsqueeze(-1)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(X)))
    asked, known = order[:held_out], order[held_out:]
    return X[asked], X[known], y[known]


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's own, with softmax(q.k / sqrt(d) + bias)."""
    return F.scaled_dot_product_attention(query[None], key[None], value[None], bias)[0]


def regression(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Nadaraya-Watson with a gaussian kernel of h^2 = sqrt(d)."""
    bandwidth = torch.tensor(query.shape[-1] ** 0.25, dtype=query.dtype)
    return mixhead.kernel_attention(query[None], key[None], value[None], bandwidth, "gaussian")[0]


def key_bias(key: Tensor) -> Tensor:
    """What |q - k|^2 has and q.k has not, of the key: -|k|^2 / (2 sqrt(d)); |q|^2 cancels."""
    return -key.square().sum(-1) / (2.0 * key.shape[-1] ** 0.5)


def compare(query: Tensor, key: Tensor, value: Tensor) -> tuple[dict, dict]:
    """The differences, in standard deviations of the response, and the predictions compared."""

    def unit(points: Tensor) -> Tensor:
        return points / points.norm(dim=-1, keepdim=True)

    def largest(first: Tensor, second: Tensor) -> float:
        return float((first - second).abs().max())

    smoothed = regression(query, key, value)
    plain = attention(query, key, value)
    biased = attention(query, key, value, key_bias(key))
    on_sphere = regression(unit(query), unit(key), value)
    figures = {
        "key_bias_max_error": largest(biased, smoothed),
        "no_key_bias_unequal_norms": float((plain - smoothed).square().mean().sqrt()),
        "no_key_bias_unit_norms": largest(attention(unit(query), unit(key), value), on_sphere),
    }
    return figures, {"regression": smoothed, "no key bias": plain, "key bias": biased}
