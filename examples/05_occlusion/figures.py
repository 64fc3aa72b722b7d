"""The figures: accuracy against what is dropped, the images as the nets get them, the corners."""

from pathlib import Path

import torch
from corners import GRID, Corners, OneAttentionLayer
from images import Images, draw_kept
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from model import ConvolutionalNet
from shared.figures import save_figure
from training import Interval

BLUE, ORANGE = "#0369a1", "#c2410c"
LINES = {
    "vit": ("transformer, trained with drops", BLUE, "-"),
    "cnn_patchdrop": ("convolutions, trained with drops", ORANGE, "-"),
    "vit_no_patchdrop": ("transformer, trained on whole images", BLUE, ":"),
    "cnn": ("convolutions, trained on whole images", ORANGE, ":"),
}


def draw_accuracy(curves: dict[str, dict[float, Interval]], chance: float, path: Path) -> None:
    """Of each net its accuracy, and the 95 % interval, for each share dropped."""
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for net, (label, color, style) in LINES.items():
        shares, points = list(curves[net]), list(curves[net].values())
        axis.fill_between(
            shares, [p.low for p in points], [p.high for p in points], color=color, alpha=0.15,
            linewidth=0,
        )  # fmt: skip
        axis.plot(shares, [p.mean for p in points], style, marker=".", color=color, label=label)
    axis.axhline(chance, color="0.6", linewidth=0.8)
    axis.text(0, chance + 0.01, "chance", color="0.5", fontsize=8)
    axis.set(
        xlabel="share of the patches dropped", ylabel="accuracy on test images", ylim=(0, 1.01)
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.15), fontsize=9)
    save_figure(figure, path)


@torch.no_grad()
def draw_images(
    models: dict[str, torch.nn.Module], data: Images, dropped: float, args, path: Path
) -> None:
    """Test images whole and with what is dropped hatched, and what the nets take them for."""
    count = min(8, len(data.test_images))
    images = data.test_images[:count]
    generator = torch.Generator().manual_seed(args.seed)
    kept = draw_kept(count, (data.side // args.patch) ** 2, dropped, generator)
    answers = {net: model(images, kept).argmax(1).tolist() for net, model in models.items()}
    visible = torch.ones_like(images)
    if kept is not None:
        visible = ConvolutionalNet.visible(models["cnn"], images, kept)
    figure, axes = plt.subplots(2, count, figsize=(1.5 * count, 3.6), layout="constrained")
    for number in range(count):
        for axis in axes[:, number]:
            axis.imshow(images[number], cmap="Greys", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        for down in range(0, data.side, args.patch):
            for right in range(0, data.side, args.patch):
                if not visible[number, down, right]:
                    patch = (right - 0.5, down - 0.5), args.patch, args.patch
                    axes[1, number].add_patch(Rectangle(*patch, facecolor="0.75", hatch="///"))
        axes[0, number].set_title(f"label {int(data.test_labels[number])}", fontsize=9)
        lines = [f"{net.replace('_', ' ')}: {answers[net][number]}" for net in LINES]
        axes[1, number].set_xlabel("\n".join(lines), fontsize=7)
    save_figure(figure, path)


@torch.no_grad()
def draw_corners(model: OneAttentionLayer, corners: Corners, path: Path) -> None:
    """An image of either kind, and what the first cell reads: each cell as dark as its weight in
    the head that the answer changes the most."""
    images, same = corners.draw(1)
    images, same = images[[0, 2]], same[[0, 2]]
    weights = model.read(images, True)[1][:, :, 0]
    head = int((weights[0] - weights[1]).abs().sum(-1).argmax())
    side = model.side
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 4.1), layout="constrained")
    for axis, image, equal, read in zip(axes, images, same, weights[:, head], strict=True):
        axis.imshow(image, cmap="Greys", vmin=0, vmax=1)
        axis.add_patch(Rectangle((side - 0.5,) * 2, 2 * side, 2 * side, color="0.85"))
        axis.text(2 * side - 0.5, 2 * side - 0.5, "covered", ha="center", va="center", color="0.4")
        for weight, cell in zip(read.tolist(), model.visible.tolist(), strict=True):
            down, right = (place * side - 0.5 for place in divmod(cell, GRID))
            ground = Rectangle((right, down), side, side, color=BLUE, alpha=0.7 * weight)
            axis.add_patch(ground)
            axis.text(right + 0.3, down + 0.3, f"{weight:.2f}", va="top", fontsize=7, color=BLUE)
        axis.set(xticks=[], yticks=[])
        axis.set_title("the same glyph in both corners" if equal else "two glyphs", fontsize=10)
    figure.supxlabel("blue: what the first corner reads", fontsize=9)
    save_figure(figure, path)
