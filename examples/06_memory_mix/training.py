"""Training and evaluation of the model."""

import copy
import math

import mixhead
import torch
import torch.nn.functional as F
from citations import ABBREVIATION_WIDTH, Batch, Library, Texts, to_bytes
from inventor import Inventor
from model import MemoryMix
from torch import Tensor
from tqdm import tqdm


def drawn_neighbours(order: Tensor, count: int, generator: torch.Generator, run: int = 8) -> Tensor:
    """`count` of `order`, in runs of neighbours, each in a random order: what is alike in its
    beginning, or its end."""
    starts = torch.randperm(len(order) // run, generator=generator)[: math.ceil(count / run)]
    shuffled = torch.rand(len(starts), run, generator=generator).argsort(1)
    return order[(starts[:, None] * run + shuffled).flatten()[:count]]


def drawn_abbreviations(
    library: Library, inventor: Inventor, step: int, count: int, generator: torch.Generator
) -> list[str]:
    """About `count`, none of them held out: a half are invented or, every other step, real; the
    others are like those but for a character."""
    if step % 2:
        half = [inventor.abbreviation() for _ in range(count // 2)]
    else:
        order = library.trained if step % 4 else library.trained_backwards
        entries = drawn_neighbours(order, count // 2, generator).tolist()
        half = [library.reporters[entry].abbreviation for entry in entries]
    alike = [inventor.look_alike(abbreviation) for abbreviation in half]
    return [a for a in dict.fromkeys(half + alike) if a not in library.unseen]


def scores(model: MemoryMix, output: Tensor, batch: Batch, name_codes: Tensor) -> Tensor:
    """Cosines (B, 3, W + N) of the outputs with the codes of the text's words and of the names."""
    words = model.code(model.value(batch.words.flatten(0, 1))).view(*batch.words.shape[:2], -1)
    of_words = torch.einsum("bqe,bwe->bqw", output, words)
    of_words = of_words.masked_fill((batch.words[..., 0] == 0).unsqueeze(1), -1.0)
    return torch.cat([of_words, output @ name_codes.T], dim=-1)


def right_answers(batch: Batch, name: Tensor) -> Tensor:
    """Indices (B, 3) into `scores`, where `name` (B,) are those of the reporters' names."""
    volume = torch.zeros_like(name)
    return torch.stack([batch.words.size(1) + name, volume, volume + 1], dim=1)


def train(
    model: MemoryMix, library: Library, inventor: Inventor, texts: Texts, args
) -> list[list[float]]:
    """Trains on memories drawn anew for each step: other entries, and a random name for each
    abbreviation, so that only a head that reads the memory can answer. Returns the gates' course:
    [step, gate for reporter, volume, page]."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(mixhead.recommended_parameter_groups(model, args.lr))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], args.steps, pct_start=0.1
    )
    gates: list[list[float]] = []
    progress = tqdm(range(args.steps), desc="train", unit="step", mininterval=0.5)
    for step in progress:
        # From 4 entries to all of them in the first half: retrieval is learned among few.
        # Texts grow too, from hardly more than a citation: what to find in them is learned there.
        texts.length = round(args.length * min(1.0, 0.4 + 0.8 * step / args.steps))
        growth = (args.memory / 4) ** min(1.0, 2 * step / args.steps)
        size = min(max(4, round(4 * growth)), len(library.trained_names) // 8 * 8)
        abbreviations = drawn_abbreviations(library, inventor, step, size, generator)
        size = len(abbreviations)
        names = library.names[drawn_neighbours(library.trained_names, size, generator)]
        cited = torch.randint(size, (args.batch,), generator=generator)
        batch = texts.batch([(i, abbreviations[i]) for i in cited.tolist()])
        key = model.key(to_bytes(abbreviations, ABBREVIATION_WIDTH))
        value = model.value(names)
        show = step % max(1, args.steps // 100) == 0 or step == args.steps - 1
        output, _, weights = model.read(batch.text, key, value, show)
        cosines = scores(model, output, batch, model.code(value)).flatten(0, 1)
        right = right_answers(batch, cited).flatten()
        loss = F.cross_entropy(cosines * model.log_sharpness.exp(), right)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if weights is not None:
            gate = weights.detach()[..., batch.text.size(1) :].sum(-1).mean((0, 1)).tolist()
            gates.append([step + 1, *gate])
            progress.set_postfix(loss=f"{loss.item():.3f}", memory=size, gate=f"{gate[0]:.2f}")
    return gates


@torch.no_grad()
def answers_right(
    model: MemoryMix, library: Library, batch: Batch, name_of_entry: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of the answers (B, 3) are right with the memory as it is, and the gates (B, 3)."""
    output, gate, _, _ = model(batch.text)
    name_codes = model.code(model.value(library.names))
    chosen = scores(model, output, batch, name_codes).argmax(-1)
    right = chosen == right_answers(batch, name_of_entry[batch.entry])
    # "1 Ga. 1": the volume and the page are one string.
    same = (batch.words[:, 0] == batch.words[:, 1]).all(-1, keepdim=True)
    right[:, 1:] |= same & (chosen[:, 1:] <= 1)
    return right, gate


def fill(model: MemoryMix, library: Library, entries: Tensor, name_of_entry: Tensor) -> None:
    """The memory becomes these entries."""
    model.reset()
    model.add(library.abbreviations[entries], library.names[name_of_entry[entries]])


def with_gate(model: MemoryMix, open_to_memory: bool) -> MemoryMix:
    """The model with every gate held at 1 (memory alone) or 0 (text alone)."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.mixer.mix_weight.zero_()
        model.mixer.mix.fill_(1e4 if open_to_memory else -1e4)
    return model


def area_under_curve(score: Tensor, positive: Tensor) -> float:
    """Of the receiver operating characteristic: how often a positive outscores a negative."""
    above, below = score[positive], score[~positive]
    order = torch.sort(below).values
    wins = torch.searchsorted(order, above) + torch.searchsorted(order, above, right=True)
    return float(wins.double().mean() / (2 * len(below)))
