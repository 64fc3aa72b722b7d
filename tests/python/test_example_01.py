"""examples/01_legal_retrieval: its figures, its controls, and what is held out."""

import sys

import mixhead  # noqa: F401 (the operators that a saved model calls)
import pytest
import torch
from example_runs import ROOT, assert_files, run_example

FOLDER = ROOT / "examples" / "01_legal_retrieval"


@pytest.fixture(scope="module")
def legal_retrieval(tmp_path_factory):
    out = tmp_path_factory.mktemp("legal_retrieval")
    return out, run_example(FOLDER, "--out", out)[1]


def test_figures(legal_retrieval):
    figures = legal_retrieval[1]
    # A few seconds of training: the full figures are those of the default run.
    assert figures["both_retrieved"] >= 0.7
    assert figures["both_retrieved_8x_length"] >= 0.6
    assert figures["position_spread"] <= 0.25
    assert figures["heldout_typing"] >= 0.85


def test_heads_off(legal_retrieval):
    figures = legal_retrieval[1]
    for wanted, other in (("precedent", "statute"), ("statute", "precedent")):
        assert figures[f"{wanted}_drop_when_head_off"] >= 0.4
        assert figures[f"{other}_drop_when_that_head_off"] <= 0.1


def test_controls_fail(legal_retrieval):
    figures = legal_retrieval[1]
    assert figures["frozen_key_projection"] <= figures["both_retrieved"] - 0.3
    assert figures["single_head_same_width"] == 0.0


def test_files(legal_retrieval):
    assert_files(legal_retrieval[0], "document.png", "retriever.pt")


@pytest.fixture
def documents(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "documents", raising=False)
    import documents

    return documents


def test_nothing_held_out_is_trained_on(documents):
    known, unseen = documents.split(3, 0.2)
    for name in ("reporters", "laws", "matters"):
        trained, held_out = set(getattr(known, name)), set(getattr(unseen, name))
        assert not trained & held_out
        assert len(held_out) == round(0.2 * len(trained | held_out))


def test_documents_are_as_described(documents, legal_retrieval):
    known, _ = documents.split(0, 0.2)
    batch = documents.Documents(known, known.filler, 3, 0).batch(5, 100)
    words = [bytes(row.tolist()).rstrip(b"\0").decode("latin-1") for row in batch.strings]
    for tokens, question, places in zip(batch.tokens, batch.question, batch.places, strict=True):
        text = [words[row] for row in tokens.tolist()]
        asked = words[int(question)]
        assert len(text) == 100
        # The matter asked for stands before the wanted case and the wanted statute, nowhere else.
        wanted = places[:, 0].tolist()
        assert sorted(i for i, word in enumerate(text) if word == asked) == sorted(
            place - 1 for place in wanted
        )
        cases = {text[place] for place in places[0].tolist()}
        assert all(any(f" {name} " in case for name in known.reporters) for case in cases)

    model = torch.jit.load(legal_retrieval[0] / "retriever.pt")
    likeness, weights = model(batch.strings, batch.tokens, batch.question, batch.citations)
    assert likeness.shape == (5, 2, 8)
    assert torch.allclose(weights.sum(-1), torch.ones(5, 2), atol=1e-5)
