"""Copy, then reverse: heads that point at the last boundary, and heads that point from there at the
element to say next, forwards and then backwards.

Trained on short strings, it is exact on long ones. See README.md.
"""

import argparse
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import figures  # noqa: E402
from goals import GOALS  # noqa: E402
from model import AbsoluteTransformer, CopyReverse, constructed  # noqa: E402
from sequences import Alphabet  # noqa: E402
from shared.example import argument_parser, run, save_model  # noqa: E402
from training import all_next_right, free_running, pointer_argmax, train  # noqa: E402

QUICK = {
    "steps": 200,
    "control_steps": 100,
    "batch": 16,
    "strings": 20,
    "constructed_strings": 1,
    "control_strings": 20,
}


def arguments() -> argparse.Namespace:
    parser = argument_parser(FOLDER, __doc__.split("\n\n")[0].replace("\n", " "))
    sizes = {
        "alphabet": (8, "payload symbols"),
        "train-length": (20, "greatest length in training"),
        "constructed-length": (4096, "length at which the weights set by hand are tried"),
        "strings": (1000, "strings of each length"),
        "constructed-strings": (10, "strings for the weights set by hand"),
        "control-strings": (200, "strings of each control"),
        "test-batch": (250, "strings said at a time"),
        "steps": (400, "training steps"),
        "control-steps": (1500, "training steps of each control"),
        "batch": (32, "strings a step"),
        "width": (16, "channels of a token"),
        "frequencies": (16, "frequencies of the code of a place"),
        "control-width": (64, "channels of the model with learned embeddings of places"),
    }
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[50, 100, 200], help="lengths of the test"
    )
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate")
    parser.add_argument(
        "--control-lr", type=float, default=2e-3, help="... of learned embeddings of places"
    )
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def controls(model: CopyReverse, alphabet: Alphabet, args) -> dict:
    """Models that must fail: one layer; two without the head that finds boundaries; and a
    transformer whose embeddings of places are learned."""
    shortest, count = min(args.lengths), args.control_strings
    one_layer = CopyReverse(alphabet, args.width, args.frequencies, layers=1)
    train(one_layer, alphabet, args, "one layer", args.control_steps, args.lr)
    absolute = AbsoluteTransformer(alphabet, args.control_width, 4, 3 * shortest + 4)
    train(absolute, alphabet, args, "absolute", args.control_steps, args.control_lr)
    return {
        "one_layer": all_next_right(one_layer, alphabet, args.train_length, count, args),
        "boundary_head_off": all_next_right(
            model, alphabet, shortest, count, args, boundary_head=False
        ),
        f"absolute_positions_{shortest}": all_next_right(absolute, alphabet, shortest, count, args),
        "absolute_positions_trained": all_next_right(
            absolute, alphabet, args.train_length, count, args
        ),
    }


def main() -> dict:
    args = arguments()
    torch.manual_seed(args.seed)
    alphabet = Alphabet(args.alphabet)
    model = CopyReverse(alphabet, args.width, args.frequencies)
    train(model, alphabet, args, "train", args.steps, args.lr)
    print("learned displacements:", [round(value, 3) for value in model.displacement.tolist()])
    result = {
        f"exact_{length}": free_running(model, alphabet, length, args) for length in args.lengths
    }
    result["pointer_argmax"] = pointer_argmax(model, alphabet, max(args.lengths), 20, args)
    by_hand = constructed(alphabet, args.frequencies)
    result[f"constructed_exact_{args.constructed_length}"] = (
        sum(
            all_next_right(by_hand, alphabet, args.constructed_length + number, 1, args)
            for number in range(args.constructed_strings)
        )
        / args.constructed_strings
    )

    save_model(model, args.out / "copy_reverse.pt")
    figures.draw_reads(model, alphabet, args.out / "reads.png", args.seed)
    return result | controls(model, alphabet, args)


if __name__ == "__main__":
    run(main, GOALS)
