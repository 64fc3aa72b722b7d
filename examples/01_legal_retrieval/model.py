"""Two heads that retrieve from a document: what to look for, where, and what to bring back."""

import torch
import torch.nn.functional as F
from mixhead import MixedMultiheadAttention
from torch import Tensor, nn


class StringEncoder(nn.Module):
    """Strings (U, W), bytes padded with 0, to vectors (U, E): the mean over their runs of 1, 2 and
    3 characters, each hashed to a row of a table (Bojanowski et al., "Enriching Word Vectors with
    Subword Information", 2017)."""

    def __init__(self, width: int, buckets: int):
        super().__init__()
        self.buckets = buckets
        self.table = nn.EmbeddingBag(buckets + 1, width, mode="mean", padding_idx=0)
        self.norm = nn.LayerNorm(width)

    def forward(self, strings: Tensor) -> Tensor:
        # A blank before and after, as between words; 0 remains what is not written.
        character = F.pad(strings.long(), [1, 1])
        end = (strings > 0).sum(1, keepdim=True) + 1
        character[:, 0] = ord(" ")
        character = character.scatter(1, end, ord(" "))
        run = torch.zeros_like(character)
        runs: list[Tensor] = []
        for size in range(1, 4):
            last = character[:, size - 1 :]
            run = (run[:, : last.size(1)] * 769 + last) % 1000003
            runs.append((1 + (run * 31 + size) % self.buckets) * (last > 0))
        return self.norm(self.table(torch.cat(runs, 1)))


class Retriever(nn.Module):
    """Brings back the case and the statute that a document cites for a matter.

    One layer of attention reads the document for one question. W_Q says what to look for, from the
    matter asked for; W_K where, from a token and the one before it; W_V what to bring back, the
    token. Nothing tells the heads apart: which looks for what is learned. There is no position in
    it, so a document may have any length.
    """

    def __init__(self, width: int, heads: int, buckets: int):
        super().__init__()
        self.encoder = StringEncoder(width, buckets)
        self.attention = MixedMultiheadAttention(
            width, heads, kdim=2 * width, vdim=width, batch_first=True
        )
        # One reading of what was brought back for each answer, and one of the citations.
        self.answer = nn.Linear(width, 2 * width)
        self.code = nn.Linear(width, width)
        self.log_sharpness = nn.Parameter(torch.tensor(10.0).log())
        self.start_as_lookup()

    @torch.jit.ignore
    def start_as_lookup(self) -> None:
        """A query first reads the tokens after the one most like itself: W_Q is set to the half of
        W_K that sees the token before. From there it is learned which of them are citations, and
        of which type."""
        key = self.attention.k_proj_weight
        query = self.attention.q_proj_weight
        assert key is not None
        assert query is not None
        with torch.no_grad():
            key.mul_(2.0)
            query.copy_(key[:, query.size(1) :])

    def read(self, strings: Tensor, tokens: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """What is brought back (B, 2, E), of length 1, for the two answers, and the heads' weights
        (B, H, T)."""
        encoded = self.encoder(strings)
        token = encoded[tokens]
        before = F.pad(token[:, :-1], [0, 0, 1, 0])
        output, weights = self.attention(
            encoded[question].unsqueeze(1),
            torch.cat([token, before], -1),
            token,
            need_weights=True,
            average_attn_weights=False,
        )
        assert weights is not None
        answers = self.answer(output[:, 0]).unflatten(-1, [2, -1])
        return F.normalize(answers, dim=-1), weights[:, :, 0]

    def codes(self, strings: Tensor) -> Tensor:
        """The codes (N, E), of length 1, by which strings are recognised."""
        return F.normalize(self.code(self.encoder(strings)), dim=-1)

    def forward(
        self, strings: Tensor, tokens: Tensor, question: Tensor, candidates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """strings uint8 (U, W); tokens (B, T), question (B,) and candidates (B, C) are rows of it.
        -> how much each candidate is like each answer, (B, 2, C), and the weights (B, H, T)."""
        answers, weights = self.read(strings, tokens, question)
        codes = self.codes(strings[candidates].flatten(0, 1)).unflatten(0, list(candidates.shape))
        return answers @ codes.transpose(1, 2) * self.log_sharpness.exp(), weights
