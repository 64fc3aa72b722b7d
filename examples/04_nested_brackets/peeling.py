"""The peeling operator: a layer finds every innermost pair of brackets and removes it."""

import math

import mixhead
import torch
from torch import Tensor, nn

SHARPNESS = 20.0


def nearest(features: Tensor, survival: Tensor, sharpness: Tensor) -> Tensor:
    """What the nearest survivors to the left and to the right of each place carry.

    Two heads of linear attention memory: scores are `sharpness * position`, so that the latest key
    wins, and query i reads keys up to i - 1; the second head reads the sequence backwards.

    features (B, L, E), survival (B, L) in [0, 1] -> (2, B, L, E), 0 where there is no survivor.
    """
    batch, length, _ = features.shape
    both = torch.stack([features, features.flip(1)], dim=1)
    gone = survival == 0
    log_survival = survival.masked_fill(gone, 1.0).log().masked_fill(gone, -math.inf)
    prior = torch.stack([log_survival, log_survival.flip(1)], dim=1).unsqueeze(2)
    position = torch.arange(length, dtype=features.dtype, device=features.device).view(-1, 1)
    read = mixhead.mixed_attention(
        sharpness.view(1, 1, 1, 1).expand(batch, 2, length, 1),
        position[: length - 1].expand(batch, 2, -1, -1),
        both[:, :, : length - 1],
        features.new_zeros(2, 0, 1),
        features.new_zeros(2, 0, features.size(2)),
        features.new_zeros(2, 1, 1),
        attn_mask=prior[..., : length - 1],
        is_causal=True,
        scale=1.0,
    )
    return torch.stack([read[:, 0], read[:, 1].flip(1)])


class PeelLayer(nn.Module):
    """Removes each opening bracket whose nearest survivor to the right closes it, and that one.

    Whether `b` closes `a` is the sign of <embedding(a), pair embedding(b)> + bias. Tokens are 0 for
    filler, 1 ... types for opening and types + 1 ... 2 types for closing brackets.
    """

    def __init__(self, types: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(2 * types + 1, width)
        self.pair = nn.Parameter(torch.randn(width, width) / width)
        self.bias = nn.Parameter(torch.zeros(()))
        self.log_sharpness = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, survival: Tensor) -> tuple[Tensor, Tensor]:
        """tokens int64 (B, L), survival (B, L) -> the probabilities that a token pairs with its
        left and with its right neighbour, (2, B, L), and where these neighbours are, (2, B, L)."""
        embedded = self.embedding(tokens)
        place = torch.arange(tokens.size(1), dtype=embedded.dtype, device=tokens.device)
        place = place.view(1, -1, 1).expand(tokens.size(0), -1, -1)
        read = nearest(torch.cat([embedded, place], -1), survival, self.log_sharpness.exp())
        left, right = read[0, ..., :-1], read[1, ..., :-1]
        closes_left = ((left @ self.pair) * embedded).sum(-1)
        closed_by_right = ((embedded @ self.pair) * right).sum(-1)
        pairs = torch.sigmoid(torch.stack([closes_left, closed_by_right]) + self.bias)
        return pairs, read[..., -1]


def constructed(types: int, typed: bool = True) -> PeelLayer:
    """The layer with weights set by hand; not `typed`: any closing bracket closes any opening."""
    layer = PeelLayer(types, 2 * types + 1)
    matches = torch.eye(types) if typed else torch.ones(types, types)
    with torch.no_grad():
        layer.embedding.weight.copy_(torch.eye(2 * types + 1))
        layer.pair.zero_()
        layer.pair[1 : types + 1, types + 1 :] = 2 * SHARPNESS * matches
        layer.bias.fill_(-SHARPNESS)
        layer.log_sharpness.fill_(math.log(SHARPNESS))
    return layer


class Peeler(nn.Module):
    """A stack of peel layers with the same weights."""

    def __init__(self, layer: PeelLayer):
        super().__init__()
        self.layer = layer

    def survival(self, tokens: Tensor, layers: int) -> list[Tensor]:
        """The probability (B, L) that a bracket is left after each of `layers` layers."""
        left = (tokens > 0).to(self.layer.pair.dtype)
        result: list[Tensor] = []
        for _ in range(layers):
            pairs, _ = self.layer(tokens, left)
            left = left * (1 - pairs[0]) * (1 - pairs[1])
            result.append(left)
        return result

    def forward(self, tokens: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        """Peels with hard decisions.

        tokens int64 (B, L), 0 where there is no bracket -> survivors bool (layers + 1, B, L), what
        is left after 0, 1, ... layers; partner int64 (B, L), the place of the bracket that a
        bracket was paired with, -1 for none.
        """
        survivors = torch.zeros(
            (layers + 1, tokens.size(0), tokens.size(1)), dtype=torch.bool, device=tokens.device
        )
        partner = torch.full_like(tokens, -1)
        survivors[0] = tokens > 0
        for number in range(layers):
            left = survivors[number]
            if not bool(left.any()):
                break
            pairs, where = self.layer(tokens, left.to(self.layer.pair.dtype))
            chosen = torch.where(pairs[1] > pairs[0], where[1], where[0])
            removed = left & (pairs.amax(0) > 0.5)
            partner = torch.where(removed, chosen.round().long(), partner)
            survivors[number + 1] = left & ~removed
        return survivors, partner
