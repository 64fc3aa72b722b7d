"""Occlusion: a transformer reads the patches that are left, convolutions an image with holes.

Trains both with and without patches dropped, compares them on test images of which a share is
gone, and asks whether two far corners agree. See README.md.
"""

import argparse
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import figures  # noqa: E402
from corners import (  # noqa: E402
    GRID,
    CornerConvolutions,
    Corners,
    OneAttentionLayer,
    corner_accuracy,
    learn_corners,
)
from goals import GOALS  # noqa: E402
from images import Images, digits, fashion  # noqa: E402
from model import (  # noqa: E402
    VisionTransformer,
    convolutional_net_of_size,
    parameters_of,
)
from shared.example import argument_parser, run, save_model  # noqa: E402
from torch import nn  # noqa: E402
from training import interval, right_answers, train  # noqa: E402

QUICK = {"trainings": 1, "epochs": 4, "corner_steps": 160, "corner_tests": 250, "draws": 1}
SHARES = (0.0, 0.25, 0.5, 0.75)


def arguments() -> argparse.Namespace:
    parser = argument_parser(FOLDER, __doc__.splitlines()[0])
    sizes = {
        "patch": (2, "pixels of a patch each way"),
        "trainings": (3, "trainings of each net, with seeds of their own"),
        "epochs": (28, "epochs of every net"),
        "batch": (32, "images a step"),
        "draws": (4, "draws of what is dropped of each test image"),
        "test-batch": (500, "test images read at a time"),
        "width": (68, "channels of the transformer"),
        "heads": (4, "heads of each of its layers"),
        "layers": (4, "its layers"),
        "channels": (32, "channels of the first convolution"),
        "corner-width": (64, "channels of the attention layer of the corners"),
        "corner-channels": (48, "channels of the first convolution of the corners"),
        "corner-steps": (1000, "training steps of the corners"),
        "corner-batch": (128, "images a step of the corners, a multiple of 4"),
        "corner-tests": (1000, "times four test images of the corners"),
        "train-images": (6000, "training images, of Fashion-MNIST"),
    }
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    rates = {
        "drop": (0.5, "share of the patches dropped in the comparison"),
        "most-dropped": (0.6, "largest share dropped in training"),
        "test-share": (0.25, "share of the digits that is the test"),
        "lr": (1.5e-3, "learning rate"),
        "weight-decay": (0.05, "weight decay"),
        "corner-lr": (5e-3, "learning rate of the corners"),
    }
    for name, (default, text) in rates.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=text)
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER",
        help="of Fashion-MNIST's four files (scikit-learn's digits without it)",
    )  # fmt: skip
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    for name in ("drop", "most_dropped"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be in [0, 1), got {getattr(args, name)}")
    return args


def nets(data: Images, seed: int, args) -> dict[str, tuple[nn.Module, float]]:
    """The four contenders, and the largest share of patches that training drops."""

    def transformer() -> nn.Module:
        torch.manual_seed(seed)
        return VisionTransformer(
            data.side, args.patch, data.classes, args.width, args.heads, args.layers
        )

    def convolutions() -> nn.Module:
        torch.manual_seed(seed)
        size = parameters_of(transformer())
        return convolutional_net_of_size(size, args.patch, data.classes, args.channels)

    return {
        "vit": (transformer(), args.most_dropped),
        "cnn": (convolutions(), 0.0),
        "cnn_patchdrop": (convolutions(), args.most_dropped),
        "vit_no_patchdrop": (transformer(), 0.0),
    }


def compare(data: Images, args) -> tuple[dict, dict[str, nn.Module], dict]:
    """Figures, the nets of the first training, and accuracy by net and share dropped."""
    shares = sorted({*SHARES, args.drop})
    right: dict = {}
    first: dict[str, nn.Module] = {}
    for training in range(args.trainings):
        seed = args.seed * args.trainings + training
        for net, (model, most_dropped) in nets(data, seed, args).items():
            label = f"{net}, {training + 1} of {args.trainings}"
            train(model, data, most_dropped, seed, args, label)
            first.setdefault(net, model)
            for share in shares:
                answers = right_answers(model, data, share, args)
                right.setdefault(net, {}).setdefault(share, []).append(answers)
            means = {share: float(answers[-1].mean()) for share, answers in right[net].items()}
            shown = ", ".join(f"{mean:.3f} without {share:.0%}" for share, mean in means.items())
            print(f"{label}: {shown}", flush=True)
    right = {n: {s: torch.stack(r) for s, r in by.items()} for n, by in right.items()}
    curves = {
        net: {share: interval(answers, args.seed) for share, answers in by.items()}
        for net, by in right.items()
    }

    def difference(one: str, other: str, share: float, key: str) -> dict[str, float]:
        found = interval(right[one][share] - right[other][share], args.seed)
        return {key: found.mean, f"{key}_low": found.low, f"{key}_high": found.high}

    percent = f"{100 * args.drop:g}"
    vit, cnn = (parameters_of(first[net]) for net in ("vit", "cnn"))
    result = {
        "vit_parameters": vit,
        "cnn_parameters": cnn,
        "size_difference": abs(vit - cnn) / vit,
        **difference("cnn", "vit", 0.0, "clean_gap"),
        **difference("vit", "cnn", args.drop, f"vit_minus_cnn_{percent}"),
        **difference("vit", "cnn_patchdrop", args.drop, f"vit_minus_cnn_patchdrop_{percent}"),
        **difference("vit_no_patchdrop", "cnn", args.drop, f"both_whole_vit_minus_cnn_{percent}"),
    }
    for net, curve in curves.items():
        result |= {f"{net}_0": curve[0.0].mean, f"{net}_{percent}": curve[args.drop].mean}
    return result, first, curves


def compare_corners(data: Images, args) -> tuple[dict, OneAttentionLayer, Corners]:
    """Figures of the corners, the attention layer, and the test, of glyphs that no net saw."""
    torch.manual_seed(args.seed)
    models = {
        "both_corners_one_layer": OneAttentionLayer(data.side, args.corner_width, args.heads),
        "cnn_small_receptive_field": CornerConvolutions(data.side, args.corner_channels, 1),
        "cnn_full_receptive_field": CornerConvolutions(data.side, args.corner_channels, GRID - 1),
    }
    result = {}
    for key, model in models.items():
        learn_corners(model, Corners(data.images, data.labels, args.seed), args, key)
        unseen = Corners(data.test_images, data.test_labels, args.seed + 1)
        result[key] = corner_accuracy(model, unseen, args.corner_tests)
    return result, models["both_corners_one_layer"], unseen


def main() -> dict:
    args = arguments()
    if args.data:
        data = fashion(args.data, args.train_images, args.seed)
    else:
        data = digits(args.test_share, args.seed)
    if data.side % args.patch:
        sys.exit(f"run.py: --patch must divide the {data.side} pixels of a side, got {args.patch}")
    print(f"{len(data.images)} images for training, {len(data.test_images)} for the test")
    result, models, curves = compare(data, args)
    figures.draw_accuracy(curves, 1 / data.classes, args.out / "accuracy.png")
    figures.draw_images(models, data, args.drop, args, args.out / "images.png")
    corner_result, layer, unseen = compare_corners(data, args)
    figures.draw_corners(layer, unseen, args.out / "corners.png")
    save_model(models["vit"], args.out / "transformer.pt")
    print(f"""\
Accuracy against the share dropped: {args.out / "accuracy.png"}
Images with patches dropped:        {args.out / "images.png"}
What a corner reads:                {args.out / "corners.png"}
The transformer as TorchScript:     {args.out / "transformer.pt"}
Read on:                            {FOLDER / "README.md"}""")
    return result | corner_result


if __name__ == "__main__":
    run(main, GOALS)
