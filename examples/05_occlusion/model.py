"""Two classifiers of images of which patches are missing: a vision transformer, in whose sequence
they are not, and a convolutional net, to which they are zero."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from mixhead import MixedMultiheadAttention
from torch import Tensor, nn


def to_patches(images: Tensor, size: int) -> Tensor:
    """(B, side, side) to (B, patches, size * size), row by row."""
    return F.unfold(images.unsqueeze(1), [size, size], stride=[size, size]).transpose(1, 2)


class Block(nn.Module):
    """A transformer layer with normalisation first."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.attention = MixedMultiheadAttention(width, heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(width)
        self.hidden_norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        read = self.attention_norm(tokens)
        tokens = tokens + self.attention(read, read, read, need_weights=False)[0]
        return tokens + self.output(F.gelu(self.hidden(self.hidden_norm(tokens))))


class VisionTransformer(nn.Module):
    """Patches are tokens (Dosovitskiy et al., "An Image Is Worth 16x16 Words", 2021), the mean over
    the last layer's is classified. A patch that is dropped is no token: nothing stands for it."""

    def __init__(self, side: int, patch: int, classes: int, width: int, heads: int, layers: int):
        super().__init__()
        self.patch = patch
        self.embedding = nn.Linear(patch * patch, width)
        # As large as the embeddings of patches: with the usual 0.02 it learns far more slowly.
        self.position = nn.Parameter(0.5 * torch.randn((side // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, 2 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.answer = nn.Linear(width, classes)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """images (B, side, side); kept (B, K), indices of the patches that are there, or None for
        all. -> logits (B, classes)."""
        tokens = self.embedding(to_patches(images, self.patch)) + self.position
        if kept is not None:
            tokens = tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.size(-1)))
        for block in self.blocks:
            tokens = block(tokens)
        return self.answer(self.norm(tokens).mean(1))


class ConvolutionalNet(nn.Module):
    """Four 3 x 3 convolutions with batch normalisation, a pooling after the second, and the mean
    over the image classified. A patch that is dropped is zero."""

    def __init__(self, patch: int, classes: int, channels: int, last: int):
        super().__init__()
        self.patch = patch
        widths = [1, channels, 2 * channels, 2 * channels, last]
        self.layers = nn.Sequential()
        for number, (before, after) in enumerate(pairwise(widths)):
            self.layers.append(nn.Conv2d(before, after, 3, padding=1, bias=False))
            self.layers.append(nn.BatchNorm2d(after))
            self.layers.append(nn.ReLU())
            if number == 1:
                self.layers.append(nn.MaxPool2d(2))
        self.answer = nn.Linear(last, classes)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """As `VisionTransformer.forward`."""
        if kept is not None:
            images = images * self.visible(images, kept)
        return self.answer(self.layers(images.unsqueeze(1)).mean([2, 3]))

    def visible(self, images: Tensor, kept: Tensor) -> Tensor:
        """1 where a pixel's patch is kept, else 0, (B, side, side)."""
        grid = images.size(1) // self.patch
        there = torch.zeros(images.size(0), grid * grid, device=images.device)
        there = there.scatter(1, kept, 1.0).unflatten(1, [grid, grid])
        return there.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def convolutional_net_of_size(
    parameters: int, patch: int, classes: int, channels: int
) -> ConvolutionalNet:
    """The one whose last layer makes its number of parameters the nearest."""
    one, two = (parameters_of(ConvolutionalNet(patch, classes, channels, n)) for n in (1, 2))
    return ConvolutionalNet(
        patch, classes, channels, max(1, round(1 + (parameters - one) / (two - one)))
    )
