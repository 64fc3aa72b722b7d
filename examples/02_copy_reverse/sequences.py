"""The strings: a payload, its copy, and its reverse, with the marks between them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Alphabet:
    """Payload symbols 0 ... size - 1, then four marks."""

    size: int

    @property
    def start(self) -> int:
        return self.size

    @property
    def copy(self) -> int:
        return self.size + 1

    @property
    def reverse(self) -> int:
        return self.size + 2

    @property
    def end(self) -> int:
        return self.size + 3

    @property
    def tokens(self) -> int:
        return self.size + 4


@dataclass
class Batch:
    """Strings `start x1 ... xn copy x1 ... xn reverse xn ... x1 end`, int64 (B, 3n + 4)."""

    tokens: Tensor
    length: int  # n

    @property
    def prompt(self) -> Tensor:
        """`start x1 ... xn copy`."""
        return self.tokens[:, : self.length + 2]

    @property
    def answer(self) -> Tensor:
        """What is to be said after it, (B, 2n + 2)."""
        return self.tokens[:, self.length + 2 :]

    @property
    def pointed(self) -> Tensor:
        """Where each token of the answer stands in the prompt, (2n + 2): forwards and on to `copy`,
        backwards and on to `start`."""
        steps = torch.arange(self.length + 1)
        return torch.cat([1 + steps, self.length - steps])

    @property
    def last_boundary(self) -> Tensor:
        """Where the last boundary stands, (3n + 4): `start` in the payload, then `copy`, then
        `reverse`."""
        place = torch.arange(self.tokens.size(1))
        n = self.length
        return (place > n) * (n + 1) + (place > 2 * n + 1) * (n + 1)


def draw(alphabet: Alphabet, length: int, count: int, generator: torch.Generator) -> Batch:
    payload = torch.randint(alphabet.size, (count, length), generator=generator)

    def mark(token: int) -> Tensor:
        return torch.full((count, 1), token)

    parts = [mark(alphabet.start), payload, mark(alphabet.copy), payload]
    parts += [mark(alphabet.reverse), payload.flip(1), mark(alphabet.end)]
    return Batch(torch.cat(parts, 1), length)
