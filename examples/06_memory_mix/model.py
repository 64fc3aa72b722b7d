"""The model: it reads a citation in a text and looks up, or not, what it needs in a memory."""

import torch
import torch.nn.functional as F
from mixhead import MemoryBank, MixedMultiheadAttention
from torch import Tensor, nn

FORMAT = "mixhead example 06_memory_mix, version 1"


class CharacterEncoder(nn.Module):
    """Bytes to vectors: what stands at a place (5 characters), and its surroundings (65)."""

    def __init__(self, width: int):
        super().__init__()
        self.letters = nn.EmbeddingBag(5 * 128, width, mode="sum")
        self.mix = nn.Linear(width, width)
        self.content_norm = nn.LayerNorm(width)
        # Half the channels: most of a training step is spent here.
        self.narrow = nn.Linear(width, width // 2)
        self.far = nn.ModuleList(
            nn.Conv1d(width // 2, width // 2, 5, padding=2 * step, dilation=step)
            for step in (1, 2, 4, 8)
        )
        self.widen = nn.Linear(width // 2, width)
        self.context_norm = nn.LayerNorm(width)

    def near(self, text: Tensor) -> Tensor:
        """Of the written characters of (B, L), in their order, a vector each (n, E): of the
        character and its neighbours, two on each side, but none beyond a blank. The ends of a text
        and padding read as blanks, so a string has the same vectors alone as among words."""
        blank, written = ord(" "), text > 0
        readable = text.long().clamp(max=127).masked_fill(~written, blank)
        windows = F.pad(readable, [2, 2], value=float(blank)).unfold(1, 5, 1)[written]
        windows[:, 0].masked_fill_(windows[:, 1] == blank, blank)
        windows[:, 4].masked_fill_(windows[:, 3] == blank, blank)
        hidden = self.letters(windows + 128 * torch.arange(5))
        return hidden + F.gelu(self.mix(F.gelu(hidden)))

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, L) to content (B, L, E) and context (B, L, E)."""
        written = text > 0
        near = self.near(text)
        hidden = near.new_zeros([text.size(0), text.size(1), near.size(1)])
        hidden[written] = near
        content = self.content_norm(hidden)
        hidden = self.narrow(hidden).transpose(1, 2)
        for convolution in self.far:
            hidden = (hidden + F.gelu(convolution(hidden))) * written.unsqueeze(1)
        return content, self.context_norm(self.widen(hidden.transpose(1, 2)))

    @torch.jit.export
    def string(self, strings: Tensor) -> Tensor:
        """One vector a string, (N, W) to (N, E): the mean content of its characters."""
        written = strings > 0
        content = self.content_norm(self.near(strings))
        row = written.nonzero()[:, 0]
        total = content.new_zeros([strings.size(0), content.size(1)]).index_add(0, row, content)
        return total / written.sum(1, keepdim=True).clamp(min=1)


def start_as_lookup(layer: MixedMultiheadAttention) -> None:
    """Sets W_Q to W_K: a query then reads the keys most like itself."""
    query, key = layer.in_proj_weight.detach()[: 2 * layer.embed_dim].chunk(2)
    query.copy_(key)


def joined(heads: Tensor) -> Tensor:
    """(H, N, D) to (N, H * D)."""
    return heads.transpose(-2, -3).flatten(-2)


class MemoryMix(nn.Module):
    """Answers three questions about a citation: who is the reporter, which volume, which page.

    `finder`, plain self-attention, finds in the text what a question is about. `mixer` then reads
    the text and the memory, and its gates say how much of each: think or look up. The answer is the
    string, among the names in the memory and the words of the text, whose code is most like the
    mixer's output; a string's code is what the mixer puts out when it reads that string alone.
    """

    names: Tensor
    abbreviations: Tensor
    codes: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        capacity: int,
        name_width: int,
        abbreviation_width: int,
        word_width: int,
    ):
        super().__init__()
        self.format = FORMAT
        self.digest = 0
        self.word_width = word_width
        self.encoder = CharacterEncoder(width)
        self.question = nn.Embedding(3, width)
        self.finder = MixedMultiheadAttention(width, heads, batch_first=True)
        self.found_norm = nn.LayerNorm(width)
        self.mixer = MixedMultiheadAttention(width, heads, batch_first=True, gate="token")
        self.log_sharpness = nn.Parameter(torch.tensor(10.0).log())
        start_as_lookup(self.mixer)

        self.bank = MemoryBank(heads, capacity, width // heads)
        # What the slots of the bank stand for, in bytes, and the codes of the names.
        self.register_buffer("names", torch.zeros(capacity, name_width, dtype=torch.uint8))
        self.register_buffer(
            "abbreviations", torch.zeros(capacity, abbreviation_width, dtype=torch.uint8)
        )
        self.register_buffer("codes", torch.zeros(capacity, width))

    def find(
        self, text: Tensor, need_weights: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the three questions find in texts (B, L): queries of the mixer (B, 3, E), with the
        texts' content and context (B, L, E) and the finder's weights (B, H, 3, L)."""
        content, context = self.encoder(text)
        question = self.question.weight.expand(text.size(0), -1, -1)
        found, weights = self.finder(
            question, context, content, text == 0, need_weights, None, False
        )
        return self.found_norm(found) + question, content, context, weights

    def about(self, abbreviations: Tensor) -> Tensor:
        """What the first question finds (M, E) where the finder reads the characters of an
        abbreviation (M, W), all alike and nothing else."""
        value = self.finder.project_memory(self.encoder.string(abbreviations))[1]
        return self.found_norm(self.finder.out_proj(joined(value))) + self.question.weight[0]

    def key(self, abbreviations: Tensor) -> Tensor:
        """The memory keys (H, M, D) of abbreviations, bytes (M, W): made as the queries are."""
        return self.mixer.project_memory(self.about(abbreviations))[0]

    def value(self, strings: Tensor) -> Tensor:
        """The memory values (H, N, D) of strings, bytes (N, W)."""
        return self.mixer.project_memory(self.encoder.string(strings))[1]

    def code(self, value: Tensor) -> Tensor:
        """The codes (N, E), of length 1: the mixer's outputs where it reads one value alone."""
        return F.normalize(self.mixer.out_proj(joined(value)), dim=-1)

    def read(
        self, text: Tensor, memory_key: Tensor, memory_value: Tensor, need_weights: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The outputs (B, 3, E) to the three questions about texts (B, L), and the weights
        (B, H, 3, L) of the finder and (B, H, 3, L + M) of the mixer."""
        query, content, context, finder_weights = self.find(text, need_weights)
        output, mixer_weights = self.mixer.attend(
            query, context, content, memory_key, memory_value, text == 0, need_weights, None, False
        )
        return F.normalize(output, dim=-1), finder_weights, mixer_weights

    @torch.jit.ignore
    def current_digest(self) -> int:
        """Of every parameter and buffer. PyTorch does not notice a damaged byte in a file, so the
        app compares the digest that was saved with that of what it loaded."""
        digest = 0
        for tensor in [*self.parameters(), *self.buffers()]:
            digest ^= int(torch.hash_tensor(tensor.detach()).view(torch.int64))
        return digest

    @torch.jit.export
    def add(self, abbreviations: Tensor, names: Tensor) -> None:
        """Appends entries to the memory: bytes (n, W) each, padded with 0. No weight changes."""
        room = self.names.size(0) - len(self.bank)
        if abbreviations.size(0) > room:
            raise ValueError(f"the memory has room for {room} more entries")
        first, last = len(self.bank), len(self.bank) + abbreviations.size(0)
        value = self.value(names)
        self.bank.append(self.key(abbreviations), value)
        self.abbreviations[first:last, : abbreviations.size(1)] = abbreviations
        self.names[first:last, : names.size(1)] = names
        self.codes[first:last] = self.code(value).detach()

    @torch.jit.export
    def reset(self) -> None:
        """Forgets every entry."""
        self.bank.reset()
        self.names.zero_()
        self.abbreviations.zero_()

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Outputs (B, 3, E), gates (B, 3), both layers' weights, with the memory in the bank."""
        output, finder_weights, weights = self.read(
            text, self.bank.keys(), self.bank.values(), True
        )
        assert weights is not None
        gate = weights[..., text.size(1) :].sum(-1).mean(1)
        return output, gate, finder_weights, weights

    def words(self, text: Tensor) -> Tensor:
        """The words of one text (L,), bytes (N, word_width)."""
        blank = (text == ord(" ")) | (text == 0)
        follows_blank = F.pad(blank[:-1], [1, 0], value=True)
        place = torch.arange(text.size(0))
        start = torch.where(follows_blank, place, 0).cummax(0)[0]
        word = (follows_blank & ~blank).cumsum(0) - 1
        keep = ~blank & (place - start < self.word_width)
        count = int((follows_blank & ~blank).sum())
        words = torch.zeros((count, self.word_width), dtype=torch.uint8)
        words[word[keep], (place - start)[keep]] = text[keep]
        return words

    @torch.jit.export
    def ask(self, text: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Answers the three questions about one text, bytes (L,).

        Returns the answers in bytes, the gates (3,), the abbreviation of the memory entry read most
        for each question (3, W), and the outputs (3, E)."""
        output, gate, _, weights = self.forward(text.unsqueeze(0))
        assert weights is not None
        words, count = self.words(text), len(self.bank)
        candidates = torch.cat([self.code(self.value(words)), self.codes[:count]])
        best = (output[0] @ candidates.T).argmax(-1)
        answers: list[Tensor] = []
        for question in range(3):
            index = int(best[question])
            chosen = words[index] if index < len(words) else self.names[index - len(words)]
            answers.append(chosen[chosen > 0])
        read = torch.zeros((3, self.abbreviations.size(1)), dtype=torch.uint8)
        if count > 0:
            memory_weights = weights[0, :, :, text.size(0) :].mean(0)
            read = self.abbreviations[memory_weights.argmax(-1)]
        return answers, gate[0], read, output[0]
