"""Legal retrieval: in a long document one head learns to find the case cited for a matter, another
the statute.

Trained on real citations in real English, tested on reporters, laws, matters and text it never saw.
See README.md.
"""

import argparse
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import figures  # noqa: E402
from documents import Documents, split  # noqa: E402
from goals import GOALS  # noqa: E402
from model import Retriever  # noqa: E402
from shared.example import argument_parser, run, save_model  # noqa: E402
from training import (  # noqa: E402
    Reading,
    ablation,
    position_spread,
    train,
    typing,
    with_frozen_key,
)

QUICK = {
    "steps": 250,
    "control_steps": 40,
    "tests": 100,
    "long_tests": 10,
    "length": 256,
}


def arguments() -> argparse.Namespace:
    parser = argument_parser(FOLDER, __doc__.split("\n\n")[0].replace("\n", " "))
    sizes = {
        "length": (512, "tokens of a document"),
        "distractors": (8, "distracting citations of each type in a document"),
        "steps": (2000, "training steps"),
        "control-steps": (1000, "training steps of each control"),
        "batch": (16, "documents a step"),
        "tests": (3000, "documents of each test"),
        "long-tests": (600, "documents of the test with documents eight times as long"),
        "test-batch": (20, "documents read at a time in the tests"),
        "width": (48, "channels of the model"),
        "buckets": (8192, "rows of the table of character runs"),
    }
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--lr", type=float, default=8e-3, help="learning rate")
    parser.add_argument(
        "--held-out", type=float, default=0.2, help="share of reporters, laws, matters and text"
    )
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    if args.length < 8 * (args.distractors + 1):
        parser.error("--length must be at least 8 for each distractor and the wanted one")
    return args


def main() -> dict:
    args = arguments()
    torch.manual_seed(args.seed)
    known, unseen = split(args.seed, args.held_out)
    print(
        f"{len(known.reporters)} reporters, {len(known.laws)} laws, {len(known.matters)} matters "
        f"for training; {len(unseen.reporters)}, {len(unseen.laws)}, {len(unseen.matters)} held out"
    )
    training = Documents(known, known.filler, args.distractors, args.seed)
    model = Retriever(args.width, 2, args.buckets)
    train(model, training, args.steps, args, "train")

    def tests() -> Documents:
        """Known reporters, laws and matters in unseen English; each test reads the same."""
        return Documents(known, unseen.filler, args.distractors, args.seed + 1)

    reading = Reading(model, tests(), args.tests, args.length, args)
    long = Reading(model, tests(), args.long_tests, 8 * args.length, args)
    held_out = Documents(unseen, unseen.filler, args.distractors, args.seed + 2)
    held_out_reading = Reading(model, held_out, args.tests, args.length, args)
    result = {
        "both_retrieved": reading.both,
        "both_retrieved_8x_length": long.both,
        "position_spread": position_spread(reading),
        "heldout_typing": typing(held_out_reading),
        "both_retrieved_heldout": held_out_reading.both,
        **ablation(model, tests, args),
    }

    frozen = with_frozen_key(model)
    train(frozen, training, args.control_steps, args, "frozen W_K")
    single = Retriever(args.width, 1, args.buckets)
    train(single, training, args.control_steps, args, "one head")
    single_reading = Reading(single, tests(), args.tests, args.length, args)
    result["frozen_key_projection"] = Reading(frozen, tests(), args.tests, args.length, args).both
    result["single_head_same_width"] = single_reading.both
    result["single_head_both_strings"] = float(single_reading.right.all(1).double().mean())

    save_model(model, args.out / "retriever.pt")
    heads = reading.heads
    figures.draw_document(model, tests(), heads, args.length, args.out / "document.png")
    return result


if __name__ == "__main__":
    run(main, GOALS)
