"""A language without ambiguity: paragraphs of sentences of clauses of words.

document  = "¶" paragraph ("¶" paragraph)*
paragraph = (clause ("," clause)* ".")+
clause    = word+
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

COMMA, STOP, PARAGRAPH = range(3)


@dataclass
class Sample:
    """Tokens int64 (B, L): delimiters 0, 1, 2, then words. opens (B, 3, L): where the clause, the
    sentence, the paragraph of a token was opened, -1 at the first token."""

    tokens: Tensor
    opens: Tensor

    @property
    def words(self) -> Tensor:
        return self.tokens > PARAGRAPH


def document(length: int, words: int, rng: random.Random) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < length:
        tokens.append(PARAGRAPH)
        for _ in range(rng.randint(1, 3)):
            clauses = rng.randint(1, 3)
            for clause in range(clauses):
                tokens += [PARAGRAPH + rng.randint(1, words) for _ in range(rng.randint(1, 6))]
                tokens.append(COMMA if clause + 1 < clauses else STOP)
    return tokens[:length]


def opened(tokens: list[int]) -> list[list[int]]:
    """What opened the clause, the sentence and the paragraph of each token: the last delimiter
    before it of any kind, that is no comma, that is a paragraph mark."""
    last = [-1, -1, -1]
    places: list[list[int]] = []
    for place, token in enumerate(tokens):
        places.append(list(last))
        if token <= PARAGRAPH:
            last[: token + 1] = [place] * (token + 1)
    return [list(column) for column in zip(*places, strict=True)]


def draw(count: int, length: int, words: int, rng: random.Random) -> Sample:
    documents = [document(length, words, rng) for _ in range(count)]
    return Sample(torch.tensor(documents), torch.tensor([opened(tokens) for tokens in documents]))


def disguised(sample: Sample, words: int) -> Sample:
    """The same with each delimiter written as a word drawn at random."""
    drawn = torch.randint_like(sample.tokens, PARAGRAPH + 1, PARAGRAPH + 1 + words)
    return Sample(torch.where(sample.words, sample.tokens, drawn), sample.opens)
