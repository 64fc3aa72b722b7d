"""The same glyph in both corners, the centre covered: whether two far places agree.

Images of 4 x 4 cells, each with a glyph drawn at random; the four in the centre are covered, and
the question is about the first and the last. Three nets answer it, each by the mean of linear
votes, one from each place: what compares the corners must do so before the votes.
"""

import torch
import torch.nn.functional as F
from mixhead import MixedMultiheadAttention
from model import to_patches
from torch import Tensor, nn
from tqdm import tqdm

GRID = 4  # cells each way


class Corners:
    """Draws images from glyphs (N, side, side) and their labels (N,)."""

    def __init__(self, glyphs: Tensor, labels: Tensor, seed: int):
        self.glyphs = glyphs
        self.labels = labels
        self.generator = torch.Generator().manual_seed(seed)

    def pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """Indices of glyphs a, b (count,) of different labels."""
        chosen = torch.empty(2, 0, dtype=torch.long)
        while chosen.size(1) < count:
            more = torch.randint(len(self.glyphs), (2, 2 * count), generator=self.generator)
            first, second = self.labels[more]
            chosen = torch.cat([chosen, more[:, first != second]], 1)
        return chosen[0, :count], chosen[1, :count]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Images (4 count, 4 side, 4 side), and 1 where the corners have the same glyph, else 0.
        Corners (a, a), (b, b), (a, b), (b, a) amid the same other glyphs: a sum of what each
        corner says is the same over the first two as over the others."""
        a, b = self.pairs(count)
        cells = torch.randint(len(self.glyphs), (count, GRID**2), generator=self.generator)
        cells = cells.repeat(4, 1)
        cells[:, 0] = torch.cat([a, b, a, b])
        cells[:, -1] = torch.cat([a, b, b, a])
        rows = self.glyphs[cells].unflatten(1, [GRID, GRID]).transpose(2, 3)
        images = rows.flatten(3).flatten(1, 2)
        side = self.glyphs.size(-1)
        images[:, side:-side, side:-side] = 0
        return images, (cells[:, 0] == cells[:, -1]).float()


class OneAttentionLayer(nn.Module):
    """Cells are tokens, the covered ones are none, and one layer of attention compares them."""

    def __init__(self, side: int, width: int, heads: int):
        super().__init__()
        self.side = side
        self.embedding = nn.Linear(side * side, width)
        self.position = nn.Parameter(0.5 * torch.randn(GRID**2, width))
        self.norm = nn.LayerNorm(width)
        self.attention = MixedMultiheadAttention(width, heads, batch_first=True)
        self.vote = nn.Linear(width, 1)
        cell = torch.arange(GRID**2)
        inside = [(x > 0) & (x < GRID - 1) for x in (cell // GRID, cell % GRID)]
        self.register_buffer("visible", (~(inside[0] & inside[1])).nonzero().squeeze(1))

    def read(self, images: Tensor, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """What each visible cell reads (B, T, E), and the heads' weights (B, H, T, T)."""
        patches = to_patches(images, self.side)[:, self.visible]
        tokens = self.norm(self.embedding(patches) + self.position[self.visible])
        return self.attention(
            tokens, tokens, tokens, need_weights=need_weights, average_attn_weights=False
        )

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 4 side, 4 side) -> logits (B,) of the corners being the same."""
        return self.vote(self.read(images, False)[0]).mean([1, 2])


class CornerConvolutions(nn.Module):
    """The same with convolutions, over pixels of a cell, then over 3 x 3 cells `reach` apart. A
    vote sees three cells each way with a reach of 1, never both corners; both with a reach of 3.
    Nothing is pooled or normalised over the image, which would bring far places together."""

    def __init__(self, side: int, channels: int, reach: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, side, stride=side),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=reach, dilation=reach),
            nn.ReLU(),
            nn.Conv2d(2 * channels, channels, 1),
            nn.ReLU(),
            nn.Conv2d(channels, 1, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """As `OneAttentionLayer.forward`."""
        return self.layers(images.unsqueeze(1)).mean([1, 2, 3])


def learn_corners(model: nn.Module, corners: Corners, args, name: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), args.corner_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.corner_lr, args.corner_steps)
    progress = tqdm(range(args.corner_steps), desc=name, unit="step", mininterval=0.5)
    for _ in progress:
        images, same = corners.draw(args.corner_batch // 4)
        loss = F.binary_cross_entropy_with_logits(model(images), same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


@torch.no_grad()
def corner_accuracy(model: nn.Module, corners: Corners, count: int) -> float:
    """Over 4 x `count` images."""
    right = []
    for part in torch.arange(count).split(100):
        images, same = corners.draw(len(part))
        right.append((model(images) > 0) == same.bool())
    return float(torch.cat(right).double().mean())
