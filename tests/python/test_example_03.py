"""examples/03_delimiters: its figures, its controls, and what its labels are made of."""

import sys

import mixhead  # noqa: F401 (the operators that a saved model calls)
import pytest
import torch
from example_runs import ROOT, assert_files, run_example

FOLDER = ROOT / "examples" / "03_delimiters"


@pytest.fixture(scope="module")
def delimiters(tmp_path_factory):
    out = tmp_path_factory.mktemp("delimiters")
    return out, run_example(FOLDER, "--out", out)[1]


def test_figures(delimiters):
    figures = delimiters[1]
    # A few seconds of training: the full figures are those of the default run.
    assert figures["boundary_f1"] >= max(0.95, figures["every_period_f1"] + 0.02)
    assert figures["nonfinal_period_recall"] >= 0.8
    assert figures["detector_mass"] >= 0.9
    assert figures["clause_pointer_10x_length"] == 1.0


def test_controls_fail(delimiters):
    figures = delimiters[1]
    # The clause that opens a sentence has both pointers in one place.
    assert figures["one_head_two_pointers"] <= 0.6
    assert figures["random_delimiter_ids"] <= 0.1
    assert figures["detector_off"] <= 0.1


def test_files(delimiters):
    assert_files(delimiters[0], "clauses.png", "marks.png", "english.pt", "grammar.pt")


def test_saved_model_points_at_what_opened_a_clause(delimiters):
    model = torch.jit.load(delimiters[0] / "grammar.pt")
    paragraph, comma, stop, word = 2, 0, 1, 7
    tokens = torch.tensor([[paragraph, word, comma, word, word, stop, word, stop, paragraph, word]])
    _, pointers = model(tokens)
    assert pointers[0].tolist() == [
        [-1, 0, 0, 2, 2, 2, 5, 5, 7, 8],
        [-1, 0, 0, 0, 0, 0, 5, 5, 7, 8],
        [-1, 0, 0, 0, 0, 0, 0, 0, 0, 8],
    ]


def test_another_seed_and_other_sizes(tmp_path):
    _, figures = run_example(
        FOLDER, "--out", tmp_path, "--seed", 12345, "--words", 200, "--grammar-length", 128,
        "--steps", 10, "--window", 1000, "--batch", 4,
    )  # fmt: skip
    assert figures["clause_pointer_10x_length"] == 1.0


@pytest.fixture
def english(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "english", raising=False)
    import english

    return english


@pytest.mark.parametrize(
    ("block", "sentences"),
    [
        ("One is.  Two is.", ["One is.", "Two is."]),
        ("Use os.path, e.g.\nhere.", []),
        ("Use os.path, e.g. here.  See D. J. Bernstein.", None),
        ("One is. Two is.  Three is.", ["Three is."]),
        ('It says "no."  Then\nit stops.', ['It says "no."', "Then it stops."]),
    ],
)
def test_only_sentences_whose_ends_are_known(english, block, sentences):
    expected = block.split("  ") if sentences is None else sentences
    assert english.known_sentences(block) == expected


def test_the_convention_is_not_in_the_text(english):
    documents = english.documents()
    text = english.labelled(documents)
    characters = bytes(text.characters.tolist()).decode()
    stops = text.delimiters[:, english.STOP]
    assert "  " not in characters
    assert int(stops.sum()) == sum(document.sentences for document in documents) > 1000
    assert set(text.characters[stops].tolist()) <= {ord(mark) for mark in ".?!"}
    trained, held_out = english.split(documents, 0, 0.25)
    assert not {d.name for d in trained} & {d.name for d in held_out}
    sentences = [{s for d in part for p in d.paragraphs for s in p} for part in (trained, held_out)]
    assert not sentences[0] & sentences[1]
