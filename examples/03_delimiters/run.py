"""Delimiters: heads that find commas, full stops and paragraph breaks, and heads that point through
them at the clause, the sentence and the paragraph each word belongs to.

Learns which periods of real English end a sentence, and, from pointers alone, the delimiters of a
small grammar. See README.md.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import english  # noqa: E402
import figures  # noqa: E402
from goals import GOALS  # noqa: E402
from grammar import PARAGRAPH  # noqa: E402
from model import CharacterEncoder, DelimiterHeads  # noqa: E402
from shared.example import argument_parser, run, save_model  # noqa: E402
from training import boundaries, grammar_figures, learn_english, learn_grammar  # noqa: E402

QUICK = {"steps": 100, "batch": 12, "grammar_steps": 120, "grammar_batch": 12, "tests": 5}


def arguments() -> argparse.Namespace:
    parser = argument_parser(FOLDER, __doc__.split("\n\n")[0].replace("\n", " "))
    sizes = {
        "steps": (400, "training steps on English"),
        "batch": (16, "windows a step"),
        "window": (512, "characters of a window"),
        "context": (12, "characters on either side that the English model sees"),
        "width": (48, "channels of the English model"),
        "words": (50, "words of the grammar"),
        "grammar-length": (64, "tokens of a document of the grammar in training"),
        "grammar-batch": (16, "documents a step"),
        "grammar-steps": (200, "training steps on the grammar, of each model"),
        "grammar-width": (16, "channels of a model of the grammar"),
        "tests": (50, "documents of the grammar's test, ten times as long"),
    }
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--lr", type=float, default=4e-3, help="learning rate on English")
    parser.add_argument("--grammar-lr", type=float, default=2e-2, help="... on the grammar")
    parser.add_argument("--held-out", type=float, default=0.25, help="share of the sentences")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def grammar_model(args, pointers: int = 3) -> DelimiterHeads:
    embedding = nn.Embedding(PARAGRAPH + 1 + args.words, args.grammar_width)
    return DelimiterHeads(embedding, args.grammar_width, pointers)


def main() -> dict:
    args = arguments()
    torch.manual_seed(args.seed)
    trained, held_out = english.split(english.documents(), args.seed, args.held_out)
    for name, chosen in (("training", trained), ("held out", held_out)):
        count = sum(document.sentences for document in chosen)
        print(f"{name}: {count} sentences with known ends from {len(chosen)} documents")
    model = DelimiterHeads(CharacterEncoder(args.width, args.context), args.width)
    learn_english(model, english.labelled(trained), args)
    test_text = english.labelled(held_out)
    result = boundaries(model, test_text, args.window)

    pointers = grammar_model(args)
    one_head = grammar_model(args, pointers=1)
    blind = grammar_model(args)
    learn_grammar(pointers, args)
    learn_grammar(one_head, args, name="one head")
    learn_grammar(blind, args, disguise=True, name="random delimiter ids")
    result |= grammar_figures(args, pointers, one_head, blind)

    save_model(model, args.out / "english.pt")
    save_model(pointers, args.out / "grammar.pt")
    figures.draw_clauses(model, test_text, args.out / "clauses.png")
    figures.draw_scores(model, test_text, args.window, args.out / "marks.png")
    return result


if __name__ == "__main__":
    run(main, GOALS)
