"""examples/04_nested_brackets: its figures, its controls, and sizes nobody tried."""

import itertools
import random
import sys

import mixhead  # noqa: F401 (the operators that a saved model calls)
import pytest
import torch
from example_runs import ROOT, assert_files, assert_goals, run_example

FOLDER = ROOT / "examples" / "04_nested_brackets"


@pytest.fixture(scope="module")
def nested_brackets(tmp_path_factory):
    out = tmp_path_factory.mktemp("nested_brackets")
    return out, run_example(FOLDER, "--out", out)[1]


def test_figures_and_controls(nested_brackets):
    figures = nested_brackets[1]
    assert_goals(FOLDER, figures)
    assert figures["stdlib_pairs"] > 500


def test_files(nested_brackets):
    pictures = ("peeling.png", "grid.png", "learned.png")
    assert_files(nested_brackets[0], *pictures, "constructed.pt", "learned.pt")


def test_saved_model_pairs_brackets_it_never_saw(nested_brackets):
    peeler = torch.jit.load(nested_brackets[0] / "learned.pt")
    opening, closing = "([{", ")]}"
    text = 200 * "{x}" + "([)]" + "([{}])"
    ids = [
        opening.find(c) + 1 or closing.find(c) + 4 if c in opening + closing else 0 for c in text
    ]
    survivors, partner = peeler(torch.tensor([ids]), 4)
    expected = [p for k in range(200) for p in (3 * k + 2, -1, 3 * k)]
    expected += [-1] * 4 + [609, 608, 607, 606, 605, 604]
    assert partner[0].tolist() == expected
    assert survivors.sum(-1)[:, 0].tolist() == [410, 8, 6, 4, 4]


def test_another_seed_and_other_sizes(tmp_path):
    _, figures = run_example(
        FOLDER, "--out", tmp_path, "--seed", 12345, "--types", 5, "--depth", 9, "--length", 300,
        "--files", 2, "--tests", 40,
    )  # fmt: skip
    assert figures["grid_exact"] == figures["stdlib_pairs_exact"] == 1.0
    assert figures["layers_minus_one_survivors"] == figures["untyped_accepts_mismatch"] == 1.0
    assert figures["learned_exact"] >= 0.95


def test_the_stack_agrees_with_rewriting(monkeypatch):
    """The reference against a definition without a stack: drop all adjacent pairs, again and
    again; the round in which a bracket goes is the height of its pair."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "brackets", raising=False)
    from brackets import match

    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randint(0, 4) for _ in range(rng.randint(1, 14))]
        left = [i for i, token in enumerate(tokens) if token]
        height, partner = [0] * len(tokens), [-1] * len(tokens)
        for turn in range(1, len(tokens) + 1):
            pairs = [
                (a, b)
                for a, b in itertools.pairwise(left)
                if tokens[a] <= 2 and tokens[b] == tokens[a] + 2
            ]
            for a, b in pairs:
                height[a] = height[b] = turn
                partner[a], partner[b] = b, a
            left = [i for i in left if not height[i]]
        found = match(tokens, 2)
        assert (found.partner, found.height) == (partner, height)
