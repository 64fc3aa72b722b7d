"""Training with patches dropped, the accuracy without them, and intervals of differences."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from images import Images, draw_kept
from torch import Tensor, nn
from tqdm import tqdm


def train(
    model: nn.Module, data: Images, most_dropped: float, seed: int, args, name: str
) -> nn.Module:
    """Of each batch a share of the patches is dropped, drawn from 0 to `most_dropped`. With one
    seed every net gets the same batches, and the same patches of them."""
    generator = torch.Generator().manual_seed(seed)
    patches = (data.side // args.patch) ** 2
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    steps = args.epochs * -(-len(data.images) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.2)
    progress = tqdm(range(args.epochs), desc=name, unit="epoch", mininterval=0.5)
    for _ in progress:
        for rows in torch.randperm(len(data.images), generator=generator).split(args.batch):
            dropped = most_dropped * float(torch.rand((), generator=generator))
            kept = draw_kept(len(rows), patches, dropped, generator)
            loss = F.cross_entropy(model(data.images[rows], kept), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def right_answers(model: nn.Module, data: Images, dropped: float, args) -> Tensor:
    """How often each test image (N,) is classified rightly, in `args.draws` draws of what is
    dropped of it. Every net is asked the same."""
    generator = torch.Generator().manual_seed(args.seed)
    patches = (data.side // args.patch) ** 2
    draws = args.draws if round(dropped * patches) else 1
    right = torch.zeros(len(data.test_images), dtype=torch.float64)
    for _ in range(draws):
        for rows in torch.arange(len(right)).split(args.test_batch):
            kept = draw_kept(len(rows), patches, dropped, generator)
            answer = model(data.test_images[rows], kept).argmax(1)
            right[rows] += answer == data.test_labels[rows]
    return right / draws


@dataclass
class Interval:
    mean: float
    low: float
    high: float


def interval(figure: Tensor, seed: int, resamples: int = 2000) -> Interval:
    """Mean of figure (trainings, test images) and its 95 % interval over both: trainings and images
    are drawn with replacement, independently (Owen, "The Pigeonhole Bootstrap", 2007)."""
    generator = torch.Generator().manual_seed(seed)
    counts = []
    for size in figure.shape:
        drawn = torch.randint(size, (resamples, size), generator=generator)
        ones = torch.ones(resamples, size, dtype=torch.float64)
        counts.append(torch.zeros_like(ones).scatter_add_(1, drawn, ones) / size)
    means = ((counts[0] @ figure) * counts[1]).sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(figure.mean()), low, high)
