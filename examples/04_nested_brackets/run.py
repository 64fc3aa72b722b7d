"""Nested brackets: every layer peels the innermost pairs off; it takes as many layers as the
nesting is deep.

Layers with weights set by hand meet every pair of layers and depth, and every statement of the
standard library; then the layer is learned. See README.md.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import figures  # noqa: E402
from brackets import (  # noqa: E402
    batches,
    corrupted,
    even_length,
    match,
    mistyped,
    nested,
    padded,
    python_statements,
)
from goals import GOALS  # noqa: E402
from peeling import Peeler, PeelLayer, constructed  # noqa: E402
from shared.example import argument_parser, run, save_model  # noqa: E402

QUICK = {"strings": 2, "length": 512, "files": 12, "tests": 100, "steps": 150}
TEXT = "f(a[0], {k: (x, [y]) for k in g()})[(b)]"


def arguments() -> argparse.Namespace:
    parser = argument_parser(FOLDER, __doc__.split("\n\n")[0].replace("\n", " "))
    sizes = {
        "depth": (12, "greatest depth, and layers, of the grid"),
        "length": (2048, "greatest length of a string"),
        "types": (3, "types of brackets; 3 or more, for Python has ( [ {"),
        "strings": (12, "strings of each depth in the grid"),
        "files": (0, "files of the standard library; 0: all"),
        "tests": (1000, "strings of the learned layer's test, and of the controls"),
        "train-depth": (5, "greatest depth in training"),
        "train-length": (64, "greatest length in training"),
        "steps": (400, "training steps"),
        "batch": (32, "strings a step"),
        "width": (16, "channels of a learned bracket"),
    }
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--lr", type=float, default=0.03, help="learning rate")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    if args.types < 3:
        parser.error(f"--types must be at least 3, got {args.types}")
    if args.length < 2 * args.depth or args.train_length < 2 * args.train_depth:
        parser.error("a length must be at least twice its depth")
    return args


@torch.no_grad()
def peel(peeler: Peeler, strings: list[list[int]], layers: int) -> list[tuple[Tensor, Tensor]]:
    """Survivors (layers + 1, L) and partner (L,) of each string."""
    result: list = [None] * len(strings)
    progress = tqdm(total=len(strings), desc="peel", unit="string", mininterval=0.5)
    for indices, tokens in batches(strings):
        survivors, partner = peeler(tokens, layers)
        for row, index in enumerate(indices):
            length = len(strings[index])
            result[index] = survivors[:, row, :length], partner[row, :length]
        progress.update(len(indices))
    progress.close()
    return result


def well_formed(rng: random.Random, args, depth: int, longest: int) -> list[int]:
    length = even_length(rng, 2 * depth, longest // 2 * 2)
    return nested(rng, args.types, depth, length)


def grid(peeler: Peeler, rng: random.Random, args) -> tuple[Tensor, float]:
    """The share accepted (layers, depths), and how often one layer too few leaves exactly the
    outermost pairs of the parts that are as deep as the string."""
    depths = range(1, args.depth + 1)
    strings = [
        nested(rng, args.types, depth, args.length // 2 * 2)
        if number == 0
        else well_formed(rng, args, depth, args.length)
        for depth in depths
        for number in range(args.strings)
    ]
    accepted = torch.zeros(args.depth, len(strings))
    outermost = []
    for number, (survivors, _) in enumerate(peel(peeler, strings, args.depth)):
        accepted[:, number] = ~survivors[1:].any(-1)
        found = match(strings[number], args.types)
        expected = torch.tensor([height == found.depth for height in found.height])
        outermost.append(bool((survivors[found.depth - 1] == expected).all()))
    accepted = accepted.view(args.depth, args.depth, args.strings).mean(-1)
    return accepted, sum(outermost) / len(outermost)


def accepts(peeler: Peeler, strings: list[list[int]], layers: int) -> float:
    peeled = peel(peeler, strings, layers)
    return sum(not survivors[-1].any() for survivors, _ in peeled) / len(strings)


def python_pairs(peeler: Peeler, args) -> dict:
    """Every pair of every statement of the standard library, against a stack over `tokenize`."""
    strings, count, refused = python_statements(args.files, args.types)
    expected = [match(string, args.types) for string in strings]
    deepest = max(found.depth for found in expected)
    right = wrong = 0
    for (_, partner), found in zip(peel(peeler, strings, deepest), expected, strict=True):
        reference = torch.tensor(found.partner)
        involved = (reference >= 0) | (partner >= 0)
        same = int((involved & (partner == reference)).sum())
        right += same
        wrong += int(involved.sum()) - same
    print(
        f"standard library: {count} statements, {len(strings)} with brackets, {right // 2} pairs "
        f"right, {wrong} brackets wrong, nested up to {deepest} deep; {refused} files refused by "
        "Python's tokenizer"
    )
    return {
        "stdlib_pairs_exact": right / (right + wrong),
        "stdlib_pairs": right // 2,
        "stdlib_deepest": deepest,
    }


def mixture(rng: random.Random, args, count: int, depth: int, longest: int) -> list[list[int]]:
    """Strings of every depth up to that one, every second with a bracket exchanged."""
    strings = [well_formed(rng, args, rng.randint(1, depth), longest) for _ in range(count)]
    return [corrupted(rng, s, args.types) if i % 2 else s for i, s in enumerate(strings)]


def train(rng: random.Random, args) -> Peeler:
    """Learns the layer from what is left after each layer of a stack of `--train-depth`."""
    peeler = Peeler(PeelLayer(args.types, args.width))
    optimizer = torch.optim.Adam(peeler.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.15)
    progress = tqdm(range(args.steps), desc="train", unit="step", mininterval=0.5)
    for _ in progress:
        strings = mixture(rng, args, args.batch, args.train_depth, args.train_length)
        tokens = padded(strings)
        height = padded([match(string, args.types).height for string in strings])
        survival = torch.stack(peeler.survival(tokens, args.train_depth))
        layer = torch.arange(1, args.train_depth + 1).view(-1, 1, 1)
        left = ((height == 0) | (height > layer)).to(survival.dtype)
        loss = torch.nn.functional.binary_cross_entropy(survival, left, reduction="none")
        loss = (loss * (tokens != 0)).sum() / ((tokens != 0).sum() * args.train_depth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return peeler.eval()


def pairs_exact(peeler: Peeler, strings: list[list[int]], args) -> float:
    """The share of strings of which every bracket has the partner a stack gives it, or none."""
    peeled = peel(peeler, strings, args.depth)
    right = [
        partner.tolist() == match(string, args.types).partner
        for string, (_, partner) in zip(strings, peeled, strict=True)
    ]
    return sum(right) / len(right)


def main() -> dict:
    args = arguments()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    peeler = Peeler(constructed(args.types))
    accepted, outermost = grid(peeler, rng, args)
    lawful = torch.ones_like(accepted).tril()
    result = {
        "grid_exact": float((accepted == lawful).float().mean()),
        "layers_minus_one_survivors": outermost,
    }

    deep = [
        well_formed(rng, args, 1 + i % args.depth, args.train_length) for i in range(args.tests)
    ]
    swapped = [mistyped(rng, string, args.types) for string in deep]
    untyped = Peeler(constructed(args.types, typed=False))
    result["untyped_accepts_mismatch"] = accepts(untyped, swapped, args.depth)
    result["typed_accepts_mismatch"] = accepts(peeler, swapped, args.depth)
    result |= python_pairs(peeler, args)

    learned = train(rng, args)
    twice = mixture(rng, args, args.tests, args.depth, 2 * args.train_length)
    result["learned_exact"] = pairs_exact(learned, twice, args)
    longest = [
        corrupted(rng, nested(rng, args.types, args.depth, args.length // 2 * 2), args.types)
        for _ in range(args.strings)
    ]
    result["learned_exact_full_length"] = pairs_exact(learned, longest, args)

    save_model(peeler, args.out / "constructed.pt")
    save_model(learned, args.out / "learned.pt")
    figures.draw_peeling(peeler, TEXT, args.types, args.out / "peeling.png")
    figures.draw_grid(accepted, args.out / "grid.png")
    figures.draw_learned(learned.layer, args.types, args.out / "learned.png")
    return result


if __name__ == "__main__":
    run(main, GOALS)
