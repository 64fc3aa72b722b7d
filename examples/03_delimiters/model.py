"""Heads that find delimiters, and heads that point at the last one they found."""

import mixhead
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Kinds of characters; the rest are of none.
KINDS = (str.isupper, str.islower, str.isdigit, str.isspace)


class CharacterEncoder(nn.Module):
    """ASCII characters (B, L) to vectors (B, L, E), each made from `context` characters on either
    side.

    A character counts for its kind first and for itself second, and one in ten is dropped in
    training: else the network learns the words around the few periods that end nothing by heart.
    """

    kind_of: Tensor

    def __init__(self, width: int, context: int, channels: int = 12):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(128, channels)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.kind = nn.Embedding(len(KINDS) + 1, channels)
        kinds = [
            next((i for i, kind in enumerate(KINDS) if kind(chr(character))), len(KINDS))
            for character in range(128)
        ]
        self.register_buffer("kind_of", torch.tensor(kinds))
        self.dropout = nn.Dropout1d(0.1)
        self.layers = nn.Sequential(
            nn.Linear((2 * context + 1) * channels, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
            nn.GELU(),
            nn.LayerNorm(width),
        )

    def forward(self, text: Tensor) -> Tensor:
        around = F.pad(text.long(), [self.context, self.context])
        characters = self.embedding(around) + self.kind(self.kind_of[around])
        windows = self.dropout(characters).unfold(1, 2 * self.context + 1, 1)
        return self.layers(windows.flatten(2))


class DelimiterHeads(nn.Module):
    """Three detector heads (comma, full stop, paragraph) and three pointer heads (what opened the
    clause, the sentence, the paragraph).

    A detector's score of a place is attention's own, <query, W_K x> / sqrt(E), and its sigmoid the
    probability of a delimiter. A pointer reads, among the places before it, the last delimiter of
    its kinds: what opens a clause is a delimiter of any kind, what opens a sentence is no comma,
    what opens a paragraph is a paragraph break.

    That place j is the last one, P_j prod (1 - P_k) over j < k < i, is softmax attention over
    j < i with the scores log P_j - sum over k <= j of log(1 - P_k), the same for every query
    (stick-breaking; Tan et al., "Stick-breaking Attention", 2024).
    """

    def __init__(self, encoder: nn.Module, width: int, pointers: int = 3):
        super().__init__()
        self.encoder = encoder
        self.pointers = pointers
        self.key = nn.Linear(width, width)
        self.query = nn.Parameter(torch.randn(3, width))
        self.threshold = nn.Parameter(torch.full((3,), 2.0))
        self.cold = 20.0  # what a place adds to the score of one that is sure to be a delimiter

    def scores(self, tokens: Tensor) -> Tensor:
        """The detectors' logits (B, 3, L)."""
        key = self.key(self.encoder(tokens))
        return self.query @ key.transpose(1, 2) / key.size(2) ** 0.5 - self.threshold.view(3, 1)

    def openers(self, scores: Tensor) -> Tensor:
        """-log(1 - P) (B, P, L) that a place holds a delimiter of a pointer's kinds: 1 - P is the
        product over these kinds of 1 - sigmoid(score)."""
        return F.softplus(scores).flip(1).cumsum(1).flip(1)[:, : self.pointers]

    def point(self, key: Tensor, log_opener: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of every place to those before it, with scores key + log_opener, (B, P, L):
        the mean place read (B, P, L), and the log-sum-exp (B, P, L) of the scores."""
        batch, heads, length = key.shape
        place = torch.arange(length, dtype=key.dtype, device=key.device).view(-1, 1)
        # S = L - 1 keys: the causal rule then lets query i read keys up to i - 1.
        read, lse, _ = mixhead.mixed_attention(
            torch.ones_like(key).unsqueeze(-1),
            key[..., : length - 1].unsqueeze(-1),
            place[: length - 1].expand(batch, heads, -1, -1),
            place.new_zeros(heads, 0, 1),
            place.new_zeros(heads, 0, 1),
            place.new_zeros(heads, 1, 1),
            attn_mask=log_opener[:, :, None, : length - 1],
            is_causal=True,
            scale=1.0,
            return_lse=True,
        )
        return read.squeeze(-1), lse

    def surprise(self, tokens: Tensor, opens: Tensor) -> Tensor:
        """-log of the weight (B, K, L) that the pointers give to the places opens (B, K, L), 0
        where that is -1. One pointer may be asked for several."""
        none = self.openers(self.scores(tokens))
        log_opener = (-torch.expm1(-none)).clamp(min=1e-30).log()
        key = none.cumsum(2)
        _, lse = self.point(key, log_opener)
        target = opens.clamp(min=0)
        score = (key + log_opener).expand(-1, opens.size(1), -1).gather(2, target)
        return (lse - score).masked_fill(opens < 0, 0.0)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, L) -> the detectors' logits (B, 3, L), and int64 (B, P, L): the last place
        that is a delimiter of a pointer's kinds, with probability above 1/2; -1 for none."""
        scores = self.scores(tokens)
        return scores, self.decide(scores)

    def decide(self, scores: Tensor) -> Tensor:
        opener = torch.stack([scores[:, kind:].amax(1) > 0 for kind in range(3)], 1)
        opener = opener[:, : self.pointers]
        log_opener = torch.zeros(opener.shape, dtype=scores.dtype, device=scores.device)
        log_opener = log_opener.masked_fill(~opener, float("-inf"))
        place = torch.arange(scores.size(2), dtype=scores.dtype, device=scores.device)
        read, lse = self.point((self.cold * place).expand_as(log_opener), log_opener)
        return read.round().long().masked_fill(lse == float("-inf"), -1)


def mass_on(model: DelimiterHeads, tokens: Tensor, delimiters: Tensor) -> Tensor:
    """The weight (B, 3) that each detector head, as softmax attention over the window, puts on the
    delimiters (B, 3, L) of its kind; NaN where there is none."""
    key = model.key(model.encoder(tokens)).unsqueeze(1).expand(-1, 3, -1, -1)
    read = mixhead.mixed_attention(
        model.query.unsqueeze(1).expand(len(tokens), -1, -1, -1),
        key,
        delimiters.unsqueeze(-1).to(key.dtype),
        key.new_zeros(3, 0, key.size(-1)),
        key.new_zeros(3, 0, 1),
        key.new_zeros(3, 1, 1),
    )
    return read[..., 0, 0].masked_fill(~delimiters.any(-1), float("nan"))
