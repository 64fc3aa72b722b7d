"""Two attention layers that copy a string and say it backwards, and two models that can't."""

import math

import mixhead
import torch
from sequences import Alphabet
from torch import Tensor, nn

# Codes of places are unique up to here.
LONGEST = 1 << 15
FASTEST = 2.0  # radians a place


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention without a memory, (B, H, L, Dv), and the log-sum-exp (B, H, L) of its
    scores; the last query reads all the keys."""
    heads = key.size(1)
    output, lse, _ = mixhead.mixed_attention(
        query,
        key,
        value,
        query.new_zeros(heads, 0, key.size(3)),
        query.new_zeros(heads, 0, value.size(3)),
        query.new_zeros(heads, 1, 1),
        is_causal=True,
        scale=1.0,
        return_lse=True,
    )
    return output, lse


def times(a: Tensor, b: Tensor) -> Tensor:
    """The product of complex numbers (..., 2): codes of places whose places add up."""
    real = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
    imaginary = a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]
    return torch.stack([real, imaginary], -1)


def conjugate(a: Tensor) -> Tensor:
    """The code of the negative place."""
    return torch.stack([a[..., 0], -a[..., 1]], -1)


def remembered(cache: list[Tensor] | None, slot: int, new: Tensor, start: int) -> Tensor:
    """What is new (B, H, n, D) from place `start` on, after all that came before it."""
    if cache is None:
        return new
    stop = start + new.size(2)
    cache[slot][:, :, start:stop] = new
    return cache[slot][:, :, :stop]


class CopyReverse(nn.Module):
    """Says the next token of `start x1 ... xn copy x1 ... xn reverse xn ... x1 end`.

    A place p has the code exp(i w p) for a ladder of frequencies w. Layer 1 reads, by content, the
    code of the last boundary (head 1; also which boundary that is) and that of the payload's end
    (head 2). Their products with a place's own code are codes again: `offset`, the places since
    the last boundary, and `mirror`, as many places before the payload's end. Layer 2 points with
    head 1 at the place `offset + displacement`, with head 2 at `mirror + displacement`; the two
    displacements are learned. A gate that sees which boundary was last takes what one of the two
    read. Place 0 is where the payload starts.

    `layers=1` leaves layer 1 out: every place then counts from the beginning.
    """

    def __init__(self, alphabet: Alphabet, width: int, frequencies: int, layers: int = 2):
        super().__init__()
        self.layers = layers
        self.width = width
        self.frequencies = frequencies
        ladder = torch.linspace(0, 1, frequencies, dtype=torch.float64)
        slowest = 2 * math.pi / LONGEST
        self.register_buffer("frequency", FASTEST * (slowest / FASTEST) ** ladder)
        self.embedding = nn.Embedding(alphabet.tokens, width)
        self.query = nn.Linear(width, 2 * width)
        self.key = nn.Linear(width, 2 * width, bias=False)
        self.displacement = nn.Parameter(torch.zeros(2))
        self.log_sharpness = nn.Parameter(torch.full((2,), math.log(2.0)))
        self.gate = nn.Linear(width, 1)
        self.output = nn.Linear(width, alphabet.tokens)

    def code(self, place: Tensor) -> Tensor:
        """(n) -> (n, F, 2). The angles are float64: a turn more or less must not matter."""
        angle = place.to(self.frequency.dtype).unsqueeze(-1) * self.frequency
        return torch.stack([angle.cos(), angle.sin()], -1).to(self.displacement.dtype)

    def find_boundaries(
        self, embedded: Tensor, start: int, cache: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """The queries and keys of layer 1, (B, 2, n, E)."""
        query = self.query(embedded).unflatten(-1, [2, self.width]).transpose(1, 2)
        key = self.key(embedded).unflatten(-1, [2, self.width]).transpose(1, 2)
        # Scores that grow with the logarithm of the keys' number keep attention as sharp among many
        # as it is among few (Chiang and Cholak, "Overcoming a Theoretical Limitation of
        # Self-Attention", 2022).
        visible = torch.arange(start + 2, start + 2 + query.size(2), device=query.device)
        query = query * visible.to(query.dtype).log().unsqueeze(-1)
        return query / self.width**0.5, remembered(cache, 0, key, start)

    def pointers(self, code: Tensor, last: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """The queries and keys of layer 2, (B, 2, n, 2F)."""
        offset = times(code, conjugate(last))
        mirror = times(end, conjugate(offset))
        angle = self.displacement.unsqueeze(-1) * self.frequency.to(code.dtype)
        turn = torch.stack([angle.cos(), angle.sin()], -1)
        turn = turn * self.log_sharpness.exp().view(2, 1, 1)
        query = torch.stack([times(offset, turn[0]), times(mirror, turn[1])], 1)
        return query.flatten(3), code.unsqueeze(1).flatten(3)

    def forward(
        self,
        tokens: Tensor,
        cache: list[Tensor] | None = None,
        start: int = 0,
        boundary_head: bool = True,
    ) -> tuple[Tensor, list[Tensor]]:
        """tokens (B, n) from place `start` on -> the logits (B, n, tokens) of what comes next, and
        the queries, keys and log-sum-exps of both layers. `cache`: of `new_cache`, holds the places
        before `start`, None where there are none. `boundary_head=False` switches head 1
        of layer 1 off."""
        embedded = self.embedding(tokens)
        place = torch.arange(start, start + tokens.size(1), device=tokens.device)
        code = self.code(place).expand(tokens.size(0), -1, -1, -1)
        reads: list[Tensor] = []
        if self.layers == 1:
            last = torch.zeros_like(code)
            last[..., 0] = 1.0
            end, boundary = last, embedded
        else:
            query, key = self.find_boundaries(embedded, start, cache)
            value = torch.cat([code.flatten(2), embedded], -1).unsqueeze(1)
            value = remembered(cache, 1, value, start).expand(-1, 2, -1, -1)
            read, lse = attend(query, key, value)
            reads += [query, key, lse]
            if not boundary_head:
                read = torch.stack([torch.zeros_like(read[:, 0]), read[:, 1]], 1)
            codes = read[..., : 2 * self.frequencies].unflatten(-1, [self.frequencies, 2])
            last, end = codes[:, 0], codes[:, 1]
            boundary = read[:, 0, :, 2 * self.frequencies :]
        query, key = self.pointers(code, last, end)
        key = remembered(cache, 2, key, start).expand(-1, 2, -1, -1)
        value = remembered(cache, 3, embedded.unsqueeze(1), start).expand(-1, 2, -1, -1)
        read, lse = attend(query, key, value)
        reads += [query, key, lse]
        gate = torch.sigmoid(self.gate(boundary))
        return self.output(gate * read[:, 0] + (1 - gate) * read[:, 1]), reads

    @torch.jit.export
    def new_cache(self, batch: int, length: int) -> list[Tensor]:
        """Room for what `length` places are remembered by."""
        code, like = 2 * self.frequencies, self.displacement
        return [
            like.new_zeros(batch, 2, length, self.width),
            like.new_zeros(batch, 1, length, code + self.width),
            like.new_zeros(batch, 1, length, code),
            like.new_zeros(batch, 1, length, self.width),
        ]

    @torch.jit.export
    def generate(self, prompt: Tensor, steps: int) -> Tensor:
        """Runs freely: what it says after the prompt (B, n), (B, steps)."""
        start = prompt.size(1)
        cache = self.new_cache(prompt.size(0), start + steps)
        said: list[Tensor] = []
        logits, _ = self.forward(prompt, cache, 0, True)
        for step in range(steps):
            said.append(logits[:, -1].argmax(-1))
            if step + 1 < steps:
                logits, _ = self.forward(said[step].unsqueeze(1), cache, start + step, True)
        return torch.stack(said, 1)


def constructed(alphabet: Alphabet, frequencies: int) -> CopyReverse:
    """The model with weights set by hand."""
    width = alphabet.tokens
    model = CopyReverse(alphabet, width, frequencies)
    sure = 20.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embedding.weight.copy_(torch.eye(width))
        # Head 1 prefers `reverse` to `copy` to `start` to the rest, head 2 looks for `copy`.
        model.query.bias[0] = model.query.bias[width] = sure * math.sqrt(width)
        for preference, token in enumerate((alphabet.start, alphabet.copy, alphabet.reverse)):
            model.key.weight[0, token] = preference + 1
        model.key.weight[width, alphabet.copy] = 1
        model.displacement.copy_(torch.tensor([1.0, -1.0]))
        model.log_sharpness.fill_(math.log(sure))
        model.gate.weight[0, alphabet.copy] = sure
        model.gate.weight[0, alphabet.reverse] = -sure
        model.output.weight.copy_(torch.eye(width))
        for read, said in ((alphabet.copy, alphabet.reverse), (alphabet.start, alphabet.end)):
            model.output.weight[said, read], model.output.weight[read, read] = 1, 0
    return model


class AbsoluteTransformer(nn.Module):
    """What one would take otherwise: two transformer layers on learned embeddings of places."""

    def __init__(self, alphabet: Alphabet, width: int, heads: int, longest: int):
        super().__init__()
        self.embedding = nn.Embedding(alphabet.tokens, width)
        self.place = nn.Embedding(longest, width)
        self.attention = nn.ModuleList(
            mixhead.MixedMultiheadAttention(width, heads, batch_first=True) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.feed_forward = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(2)
        )
        self.output = nn.Linear(width, alphabet.tokens)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """tokens (B, n) -> the logits (B, n, tokens) of what comes next; no pointers."""
        x = self.embedding(tokens) + self.place(torch.arange(tokens.size(1)))
        for layer, attention in enumerate(self.attention):
            normal = self.norms[2 * layer](x)
            x = x + attention(normal, normal, normal, need_weights=False, is_causal=True)[0]
            x = x + self.feed_forward[layer](self.norms[2 * layer + 1](x))
        return self.output(x), []
