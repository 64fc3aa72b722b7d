"""Training, what is measured, and the controls."""

import copy

import torch
import torch.nn.functional as F
from documents import PRECEDENT, STATUTE, Batch, Documents
from model import Retriever
from torch import Tensor, nn
from tqdm import tqdm


def right_answers(batch: Batch) -> Tensor:
    """Which candidates (B, 2) are wanted: the first of the cases, the first of the statutes."""
    count = batch.places.size(2)
    return torch.tensor([0, count]).expand(len(batch.question), 2)


def train(model: Retriever, documents: Documents, steps: int, args, name: str) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.15)
    progress = tqdm(range(steps), desc=name, unit="step", mininterval=0.5)
    for _ in progress:
        batch = documents.batch(args.batch, args.length)
        likeness, _ = model(batch.strings, batch.tokens, batch.question, batch.citations)
        loss = F.cross_entropy(likeness.flatten(0, 1), right_answers(batch).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


class Reading:
    """What a model does with many documents, each row one document."""

    def __init__(self, model: Retriever, documents: Documents, count: int, length: int, args):
        right, weights, reads, places = [], [], [], []
        with torch.no_grad():
            for first in range(0, count, args.test_batch):
                batch = documents.batch(min(args.test_batch, count - first), length)
                likeness, weight = model(
                    batch.strings, batch.tokens, batch.question, batch.citations
                )
                right.append(likeness.argmax(-1) == right_answers(batch))
                wanted = batch.places[:, None, :, 0].expand(-1, weight.size(1), -1)
                weights.append(weight.gather(2, wanted))
                most = weight.argmax(-1)[:, :, None, None]
                reads.append((most == batch.places.unsqueeze(1)).any(-1))
                places.append(batch.places[:, :, 0] / length)
        self.right = torch.cat(right)  # (N, 2): the string brought back is the wanted one
        self.weight = torch.cat(weights)  # (N, H, 2): of each head, on both wanted citations
        self.reads = torch.cat(reads)  # (N, H, 2): a head reads most a case, a statute
        self.place = torch.cat(places)  # (N, 2): where the wanted citations stand, in [0, 1]

    @property
    def retrieved(self) -> Tensor:
        """(N, 2): the right string comes back, and a head read it: gave it more than half its
        attention. (One softmax can't give that to two.)"""
        return self.right & (self.weight > 0.5).any(1)

    @property
    def both(self) -> float:
        return float(self.retrieved.all(1).double().mean())

    @property
    def heads(self) -> tuple[int, int]:
        """The head that reads the cases, and the other."""
        if self.weight.size(1) == 1:
            return 0, 0
        mean = self.weight.mean(0)
        precedent = int((mean[:, PRECEDENT] - mean[:, STATUTE]).argmax())
        return precedent, 1 - precedent


def position_spread(reading: Reading, parts: int = 4) -> float:
    """The difference between the best and the worst part of the documents, by where a wanted
    citation stands."""
    part = (reading.place * parts).long().clamp(max=parts - 1)
    shares = [float(reading.retrieved[part == i].double().mean()) for i in range(parts)]
    return max(shares) - min(shares)


def typing(reading: Reading) -> float:
    """How often what a head reads most is a citation of the type that head reads."""
    precedent, statute = reading.heads
    right = torch.stack(
        [reading.reads[:, precedent, PRECEDENT], reading.reads[:, statute, STATUTE]]
    )
    return float(right.double().mean())


def without_head(model: Retriever, head: int) -> Retriever:
    """The model with that head's output off."""
    model = copy.deepcopy(model)
    size = model.attention.head_dim
    with torch.no_grad():
        model.attention.out_proj.weight[:, head * size : (head + 1) * size] = 0
    return model


def ablation(model: Retriever, documents, args) -> dict:
    """By how much either answer gets worse without either head. Strings alone are judged: a head
    that is off still reads."""
    whole = Reading(model, documents(), args.tests, args.length, args)
    shares = whole.right.double().mean(0)
    result = {}
    for name, other, answer in (("precedent", "statute", 0), ("statute", "precedent", 1)):
        off = without_head(model, whole.heads[answer])
        left = Reading(off, documents(), args.tests, args.length, args).right.double().mean(0)
        result[f"{name}_with_its_head_off"] = float(left[answer])
        result[f"{name}_drop_when_head_off"] = float(shares[answer] - left[answer])
        result[f"{other}_drop_when_that_head_off"] = float(shares[1 - answer] - left[1 - answer])
    return result


def with_frozen_key(model: Retriever) -> Retriever:
    """The trained model with W_K drawn anew and frozen; the strings' vectors stay as they are, and
    everything else may be learned again."""
    model = copy.deepcopy(model)
    nn.init.xavier_uniform_(model.attention.k_proj_weight)
    model.start_as_lookup()
    model.attention.k_proj_weight.requires_grad_(False)
    model.encoder.requires_grad_(False)
    return model
