"""What h heads can smooth: linearised, a matrix whose deviation from uniform has rank h.

Measures that rank on the operator itself, trains heads to be the best smoother of their rank for
the digits, draws both, and saves the heads as TorchScript. See README.md.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import figures  # noqa: E402
from goals import GOALS  # noqa: E402
from shared.example import argument_parser, atomic, run  # noqa: E402
from smoother import (  # noqa: E402
    SmootherHeads,
    derivative_at_zero,
    deviation,
    digits,
    fit,
    gaussian_smoother,
)

QUICK = {"points": 96, "heads": [1, 2, 4], "iterations": 120}


def arguments() -> argparse.Namespace:
    parser = argument_parser(FOLDER, __doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=256, help="digits that are smoothed over")
    parser.add_argument(
        "--heads", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of heads"
    )
    parser.add_argument("--wide", type=int, default=2, help="channels of a wide head")
    parser.add_argument("--iterations", type=int, default=200, help="of training each set of heads")
    parser.add_argument(
        "--bandwidth", type=float, default=0.5, help="of the kernel, in median distances"
    )
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def singular_value_ratio(matrix: Tensor, rank: int) -> float:
    """sigma_{rank+1} / sigma_1: rounding where the matrix has at most that rank."""
    values = torch.linalg.svdvals(matrix)
    return float(values[rank] / values[0])


def ranks(inputs: Tensor, args) -> tuple[dict, dict]:
    """The rank of random heads on the digits' pixels: sigma_{h+1} / sigma_1 of the linear part for
    each h, of that of wide heads (at h, and at h times their channels), and of the softmax."""
    ratios: dict[str, list[float]] = {"linear": [], "wide": [], "wide_at_hd": [], "softmax": []}
    spectra = {}
    for heads in args.heads:
        narrow = SmootherHeads(inputs, heads, 1, args.seed)
        wide = SmootherHeads(inputs, heads, args.wide, args.seed)
        matrices = {
            "linear": derivative_at_zero(narrow),
            "wide": derivative_at_zero(wide),
            # Scores of about 1, where a softmax is not its linear part.
            "softmax": deviation(narrow, float(len(inputs))),
        }
        ratios["linear"].append(singular_value_ratio(matrices["linear"], heads))
        ratios["wide"].append(singular_value_ratio(matrices["wide"], heads))
        ratios["wide_at_hd"].append(singular_value_ratio(matrices["wide"], heads * args.wide))
        ratios["softmax"].append(singular_value_ratio(matrices["softmax"], heads))
        print(
            f"h = {heads:2}: sigma_(h+1) / sigma_1 of the linear part {ratios['linear'][-1]:.1e}, "
            f"with {args.wide} channels a head {ratios['wide'][-1]:.2f}, "
            f"of the softmax {ratios['softmax'][-1]:.1e}",
            flush=True,
        )
        spectra[heads] = {name: torch.linalg.svdvals(m) for name, m in matrices.items()}
    return ratios, spectra


def fitted(inputs: Tensor, target: Tensor, heads: int, args, name: str) -> tuple:
    """Trained heads, and the matrix of their errors."""
    model = SmootherHeads(inputs, heads, 1, args.seed)
    fit(model, target, args.iterations, name)
    with torch.no_grad():
        identity = torch.eye(len(target), dtype=target.dtype)
        return model, model.linearised(identity) - target


def best_of_rank(target: Tensor, pixels: Tensor, args) -> tuple[dict, dict, SmootherHeads]:
    """Trained heads against the Eckart-Young bound of the digits' kernel smoother, h and h - 1 of
    them; and heads that see the pixels instead of having a weight for each digit."""
    one_hot = torch.eye(len(target), dtype=target.dtype)
    values = torch.linalg.svdvals(target - 1 / len(target))
    figures_of: dict[str, list[float]] = {
        "over": [],
        "with_h": [],
        "with_one_less": [],
        "pixels": [],
    }
    errors = {}
    for heads in args.heads:
        model, error = fitted(one_hot, target, heads, args, f"{heads} heads")
        if heads > 1:
            less = fitted(one_hot, target, heads - 1, args, f"{heads - 1} heads")[1]
        else:
            less = target - 1 / len(target)  # no heads: the uniform smoother
        seeing = fitted(pixels, target, heads, args, f"{heads} heads, pixels")[1]
        bound = values[heads:].square().sum().sqrt()
        figures_of["over"].append(float(error.norm() / bound))
        figures_of["pixels"].append(float(seeing.norm() / bound))
        sigma = values[heads - 1]
        figures_of["with_h"].append(float(torch.linalg.matrix_norm(error, 2) / sigma))
        figures_of["with_one_less"].append(float(torch.linalg.matrix_norm(less, 2) / sigma))
        errors[heads] = {
            "trained": float(error.norm()), "bound": float(bound), "pixels": float(seeing.norm())
        }  # fmt: skip
    return figures_of, errors, model


def linearisation(model: SmootherHeads) -> tuple[float, list[tuple[float, float]]]:
    """How the softmax leaves its linear part as the scores shrink: the slope of log error over log
    score, and the points."""
    linear = derivative_at_zero(model)
    with torch.no_grad():
        queries, keys = model.inputs @ model.query_weight, model.inputs @ model.key_weight
        largest = float((queries @ keys.transpose(1, 2)).abs().max())
    points = []
    for exponent in range(3, 11):
        score = 2.0**-exponent
        error = (deviation(model, score / largest) - linear * score / largest).norm()
        points.append((score, float(error)))
    x, y = torch.tensor(points, dtype=torch.float64).log().T
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return slope, points


def main() -> dict:
    # TorchScript is what a C++ app loads without Python; torch 2.15 announces its end, and has it.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
    args = arguments()
    torch.manual_seed(args.seed)
    pixels = digits(args.points, args.seed)
    ratios, spectra = ranks(pixels, args)
    target = gaussian_smoother(pixels, args.bandwidth)
    found, errors, model = best_of_rank(target, pixels, args)
    slope, points = linearisation(model)

    path = args.out / "smoother_rank.pt"
    with atomic(path) as temporary:
        torch.jit.script(model).save(temporary)
    figures.draw_ranks(spectra, args.out / "ranks.png")
    figures.draw_errors(errors, points, slope, args.out / "errors.png")
    print(f"""\
The singular values:            {args.out / "ranks.png"}
Errors against the best of rank: {args.out / "errors.png"}
The heads as TorchScript:       {path}
Read on:                        {FOLDER / "README.md"}""")
    return {
        "sigma_ratio": max(ratios["linear"]),
        "wide_heads_exceed_h": min(ratios["wide"]),
        "wide_heads_sigma_ratio_at_h_dk": max(ratios["wide_at_hd"]),
        "softmax_exceeds_h": min(ratios["softmax"]),
        "over_eckart_young": max(found["over"]),
        "over_eckart_young_pixels": max(found["pixels"]),
        "h_heads": max(found["with_h"]),
        "h_minus_one_heads": min(found["with_one_less"]),
        "linearisation_slope": slope,
    }


if __name__ == "__main__":
    run(main, GOALS)
