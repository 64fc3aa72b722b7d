"""An ensemble of kernels: heads that each learn a projection and compare by their own kernel.

Learns eight heads by leave-one-out error on Friedman-1 and on diabetes, against the best single
kernel, draws both, and saves the ensemble as TorchScript. See README.md.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import figures  # noqa: E402
from data import Regression, diabetes, friedman  # noqa: E402
from ensemble import (  # noqa: E402
    KernelEnsemble,
    ard_kernel,
    best_single_kernel,
    diversity_and_gain,
    gain,
    identity_error,
    learn,
    single,
)
from goals import GOALS  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from shared.example import argument_parser, atomic, run  # noqa: E402

MIXED = (
    "gaussian", "laplacian", "matern32", "matern52", "cauchy", "gaussian", "matern32", "cauchy",
)  # fmt: skip
QUICK = {"points": 120, "tests": 300, "steps": 60, "candidates": 9}


def arguments() -> argparse.Namespace:
    parser = argument_parser(FOLDER, __doc__.splitlines()[0])
    sizes = {
        "points": (300, "training points of each regression"),
        "tests": (2000, "test points of Friedman-1 (diabetes: what is left of its 442)"),
        "heads": (8, "heads of the ensemble"),
        "channels": (5, "channels of each head's projection"),
        "steps": (150, "steps of learning"),
        "candidates": (25, "bandwidths tried at a time for a single kernel"),
        "sets": (50, "random sets of projections"),
        "random-channels": (3, "channels of a random projection"),
    }
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument(
        "--penalty", type=float, default=0.003, help="of the squared size of the projections"
    )
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def learned(data: Regression, kernels: list[str], args, name: str) -> KernelEnsemble:
    model = KernelEnsemble(data.inputs, data.targets, kernels, args.channels, args.seed)
    return learn(model, args, f"{data.name}, {name}")


def compare(data: Regression, args) -> tuple[dict[str, float], KernelEnsemble]:
    """Test errors of each contender on one regression, and the ensemble of mixed kernels."""
    kernel, bandwidth = best_single_kernel(data, args.candidates)
    print(f"{data.name}: best single kernel {kernel}, bandwidth {float(bandwidth):.3f}", flush=True)
    relevance = ard_kernel(data, kernel, bandwidth, args)
    mixed = [MIXED[head % len(MIXED)] for head in range(args.heads)]
    ensemble = learned(data, mixed, args, "mixed kernels")
    same = learned(data, args.heads * ["gaussian"], args, "the same kernel")
    errors = {
        "single": data.error(single(data, data.test_inputs, bandwidth, kernel, False)[0]),
        "ard": data.error(single(data, data.test_inputs, relevance, kernel, False)[0]),
        "same": data.error(same.predict(data.test_inputs)),
        "mixed": data.error(ensemble.predict(data.test_inputs)),
    }
    return errors, ensemble


def cloned_heads_gain(model: KernelEnsemble, data: Regression) -> float:
    """The gain of as many copies of the first head."""
    clones = KernelEnsemble(
        data.inputs, data.targets, len(model.kernels) * model.kernels[:1],
        model.projection.size(2), 0,
    ).requires_grad_(False)  # fmt: skip
    clones.projection.copy_(model.projection[:1].expand_as(model.projection))
    return gain(clones(data.test_inputs), data.test_targets)


def main() -> dict:
    # TorchScript is what a C++ app loads without Python; torch 2.15 announces its end, and has it.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
    args = arguments()
    torch.manual_seed(args.seed)
    regressions = [friedman(args.points, args.tests, args.seed), diabetes(args.points, args.seed)]
    errors, ensembles, pairs = {}, {}, {}
    for data in regressions:
        errors[data.name], ensembles[data.name] = compare(data, args)
        pairs[data.name] = diversity_and_gain(data, args, args.heads)
    result: dict = {}
    for data, suffix in zip(regressions, ("", "_diabetes"), strict=True):
        of, model = errors[data.name], ensembles[data.name]
        heads = model(data.test_inputs)
        result |= {
            f"ambiguity_identity_error{suffix}": identity_error(heads, data.test_targets),
            f"ensemble_over_best_single{suffix}": of["mixed"] / of["single"],
            f"ard_single_kernel{suffix}": of["ard"] / of["single"],
            f"mixed_kernels_over_same_kernel{suffix}": of["mixed"] / of["same"],
            f"heads_gain{suffix}": gain(heads, data.test_targets),
            f"cloned_heads_gain{suffix}": cloned_heads_gain(model, data),
            f"diversity_gain_spearman{suffix}": float(spearmanr(pairs[data.name]).statistic),
        }

    path = args.out / "kernel_ensemble.pt"
    with atomic(path) as temporary:
        torch.jit.script(ensembles["Friedman-1"]).save(temporary)
    figures.draw_errors(regressions, errors, ensembles, args.out / "errors.png")
    figures.draw_diversity(pairs, args.out / "diversity.png")
    figures.draw_projections(ensembles["Friedman-1"], args.out / "projections.png")
    print(f"""\
The errors, side by side:    {args.out / "errors.png"}
Diversity and gain:          {args.out / "diversity.png"}
Which inputs a head reads:   {args.out / "projections.png"}
The ensemble as TorchScript: {path}
Read on:                     {FOLDER / "README.md"}""")
    return result


if __name__ == "__main__":
    run(main, GOALS)
