"""Training on both languages, and what is measured."""

import random

import english
import grammar
import torch
import torch.nn.functional as F
from model import DelimiterHeads, mass_on
from torch import Tensor
from tqdm import tqdm


def optimise(model: DelimiterHeads, steps: int, lr: float, loss_of_step, name: str) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.15)
    progress = tqdm(range(steps), desc=name, unit="step", mininterval=0.5)
    for _ in progress:
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    model.eval()


def learn_english(model: DelimiterHeads, text: english.Text, args) -> None:
    """The detectors learn which characters end a clause, a sentence, a paragraph."""
    generator = torch.Generator().manual_seed(args.seed)
    length = min(args.window, len(text.characters))
    offset = torch.arange(length)

    def loss() -> Tensor:
        starts = torch.randint(
            len(text.characters) - length + 1, (args.batch, 1), generator=generator
        )
        scores = model.scores(text.characters[starts + offset])
        labels = text.delimiters[starts + offset].transpose(1, 2).to(scores.dtype)
        return F.binary_cross_entropy_with_logits(scores, labels, reduction="sum") / args.batch

    optimise(model, args.steps, args.lr, loss, "English")


def learn_grammar(model: DelimiterHeads, args, disguise: bool = False, name: str = "") -> None:
    """Learns from the pointers alone: nobody says which tokens are delimiters. A model with one
    pointer head is asked for what opened the clause and what opened the sentence."""
    rng = random.Random(args.seed)
    kinds = max(2, model.pointers)

    def loss() -> Tensor:
        sample = grammar.draw(args.grammar_batch, args.grammar_length, args.words, rng)
        if disguise:
            sample = grammar.disguised(sample, args.words)
        return model.surprise(sample.tokens, sample.opens[:, :kinds]).mean()

    optimise(model, args.grammar_steps, args.grammar_lr, loss, name or "grammar")


@torch.no_grad()
def boundaries(model: DelimiterHeads, text: english.Text, window: int) -> dict:
    """The held-out documents' sentence ends, and where the detector heads' attention lies."""
    characters, truth = english.windows(text, window)
    found, masses = [], []
    for chosen, delimiters in zip(characters.split(64), truth.split(64), strict=True):
        found.append((model.scores(chosen) > 0).transpose(1, 2))
        masses.append(mass_on(model, chosen, delimiters.transpose(1, 2)))
    stop_found = torch.cat(found)[..., english.STOP]
    stop = truth[..., english.STOP]
    mark = torch.stack([characters == ord(character) for character in ".?!"]).any(0)
    blank = (characters == ord(" ")) | (characters == ord("\n"))
    before_blank = mark & F.pad(blank[:, 1:], [0, 1])
    inside = mark & ~stop
    mass = torch.cat(masses)
    return {
        "boundary_f1": f1(stop_found, stop),
        "every_period_f1": f1(mark, stop),
        "period_and_blank_f1": f1(before_blank, stop),
        "nonfinal_period_recall": float((~stop_found[inside]).double().mean()),
        "nonfinal_periods": int(inside.sum()),
        "detector_mass": float(mass.nanmean(0).min()),
    }


def f1(found: Tensor, truth: Tensor) -> float:
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def words_placed(pointers: Tensor, sample: grammar.Sample, kinds: range) -> float:
    """The share of words of which every pointer reads what it should; one pointer head is asked
    for all kinds."""
    right = torch.stack(
        [pointers[:, min(kind, pointers.size(1) - 1)] == sample.opens[:, kind] for kind in kinds]
    ).all(0)
    return float(right[sample.words].double().mean())


@torch.no_grad()
def grammar_figures(
    args, model: DelimiterHeads, one_head: DelimiterHeads, blind: DelimiterHeads
) -> dict:
    rng = random.Random(args.seed + 1)
    sample = grammar.draw(args.tests, 10 * args.grammar_length, args.words, rng)
    hidden = grammar.disguised(sample, args.words)
    scores, pointers = model(sample.tokens)
    off = model.decide(torch.ones_like(scores))
    return {
        "clause_pointer_10x_length": words_placed(pointers, sample, range(3)),
        "one_head_two_pointers": words_placed(one_head(sample.tokens)[1], sample, range(2)),
        "random_delimiter_ids": words_placed(blind(hidden.tokens)[1], sample, range(3)),
        "detector_off": words_placed(off, sample, range(3)),
    }
