"""Training on short strings, and free running on long ones."""

import torch
import torch.nn.functional as F
from model import AbsoluteTransformer, CopyReverse
from sequences import Alphabet, Batch, draw
from torch import Tensor
from tqdm import tqdm


def surprise(query: Tensor, key: Tensor, lse: Tensor, target: Tensor) -> Tensor:
    """-log of the weight (B, n) that one head gives to the place target (n)."""
    return lse - (query * key[:, target]).sum(-1)


def pointing_loss(reads: list[Tensor], batch: Batch) -> Tensor:
    """How far the heads are from pointing at the last boundary, at the payload's end (which only
    the reverse needs), at the element to say next forwards, and backwards."""
    n = batch.length
    answers = torch.arange(n + 1, 3 * n + 3)
    copying, reversing = answers.chunk(2)
    boundary_reads, pointer_reads = reads[:-3], reads[-3:]
    parts = []
    for layer, head, places, target in (
        (boundary_reads, 0, torch.arange(3 * n + 4), batch.last_boundary),
        (boundary_reads, 1, reversing, torch.full_like(reversing, n + 1)),
        (pointer_reads, 0, copying, batch.pointed[: n + 1]),
        (pointer_reads, 1, reversing, batch.pointed[n + 1 :]),
    ):
        if layer:
            query, key, lse = layer
            chosen = surprise(query[:, head, places], key[:, head], lse[:, head, places], target)
            parts.append(chosen.mean())
    return torch.stack(parts).sum()


def train(
    model: CopyReverse | AbsoluteTransformer,
    alphabet: Alphabet,
    args,
    name: str,
    steps: int,
    lr: float,
) -> None:
    """On the next token and, where the model has pointers, on what they point at."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.15)
    progress = tqdm(range(steps), desc=name, unit="step", mininterval=0.5)
    for _ in progress:
        length = int(torch.randint(1, args.train_length + 1, (), generator=generator))
        batch = draw(alphabet, length, args.batch, generator)
        logits, reads = model(batch.tokens)
        said = logits[:, length + 1 : -1]
        loss = F.cross_entropy(said.flatten(0, 1), batch.answer.flatten())
        if reads:
            loss = loss + pointing_loss(reads, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    model.eval()


@torch.no_grad()
def free_running(model: CopyReverse, alphabet: Alphabet, length: int, args) -> float:
    """The share of strings of that length that it says right from beginning to end, on its own."""
    generator = torch.Generator().manual_seed(args.seed + length)
    right = 0
    for first in tqdm(range(0, args.strings, args.test_batch), desc=f"length {length}"):
        count = min(args.test_batch, args.strings - first)
        batch = draw(alphabet, length, count, generator)
        said = model.generate(batch.prompt, batch.answer.size(1))
        right += int((said == batch.answer).all(1).sum())
    return right / args.strings


@torch.no_grad()
def all_next_right(model, alphabet: Alphabet, length: int, count: int, args, **options) -> float:
    """The same in one pass: where each next token is right after the right ones, so is the free
    run; where one is wrong, so is the free run."""
    generator = torch.Generator().manual_seed(args.seed + length)
    batch = draw(alphabet, length, count, generator)
    logits, _ = model(batch.tokens, **options)
    said = logits[:, length + 1 : -1].argmax(-1)
    return float((said == batch.answer).all(1).float().mean())


@torch.no_grad()
def pointer_argmax(model: CopyReverse, alphabet: Alphabet, length: int, count: int, args) -> float:
    """How often what is read most is the payload element to say next."""
    generator = torch.Generator().manual_seed(args.seed + length)
    batch = draw(alphabet, length, count, generator)
    query, key, _ = model(batch.tokens)[1][-3:]
    right = []
    for head, step in ((0, 0), (1, length + 1)):
        places = torch.arange(length + 1, 2 * length + 2) + step
        scores = query[:, head, places] @ key[:, head].transpose(1, 2)
        scores.masked_fill_(torch.arange(key.size(2)) > places.unsqueeze(1), -float("inf"))
        right.append(scores.argmax(-1) == batch.pointed[step : step + length + 1])
    return float(torch.cat(right, 1).float().mean())
