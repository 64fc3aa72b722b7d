"""Images in patches, of which a share is dropped.

scikit-learn's digits (Alpaydin and Kaynak, UCI 1998; in every scikit-learn), or a folder with the
four files of Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017; Debian's dataset-fashion-mnist).
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor


@dataclass
class Images:
    """Grey images (N, side, side) from 0 to 1, their labels (N,), and the same for the test."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def side(self) -> int:
        return self.images.size(-1)

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


def digits(test_share: float, seed: int) -> Images:
    """The 1,797 digits of 8 x 8 pixels, the test drawn at random."""
    data = load_digits()
    images = torch.from_numpy(data.images / 16).float()
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order.tensor_split([round(test_share * len(images))])
    return Images(images[train], labels[train], images[test], labels[test])


def fashion(folder: Path, count: int, seed: int) -> Images:
    """`count` images of 28 x 28 pixels drawn from the 60,000 for training; the test of 10,000."""
    train = torch.randperm(60000, generator=torch.Generator().manual_seed(seed))[:count]
    return Images(
        read_idx(folder / "train-images-idx3-ubyte.gz")[train].float() / 255,
        read_idx(folder / "train-labels-idx1-ubyte.gz")[train].long(),
        read_idx(folder / "t10k-images-idx3-ubyte.gz").float() / 255,
        read_idx(folder / "t10k-labels-idx1-ubyte.gz").long(),
    )


def read_idx(path: Path) -> Tensor:
    """A file of LeCun's IDX format: two zeros, 8 for bytes, the number of dimensions, their sizes
    as big-endian int32, then the bytes."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    dimensions = content[3]
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(sizes)


def draw_kept(
    count: int, patches: int, dropped: float, generator: torch.Generator
) -> Tensor | None:
    """Indices (count, K) of the patches that are left of each image, in their order; None where
    that is all of them."""
    kept = patches - round(dropped * patches)
    if kept == patches:
        return None
    order = torch.rand(count, patches, generator=generator).argsort(1)
    return order[:, :kept].sort(1).values
