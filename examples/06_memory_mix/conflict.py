"""The conflict: a note and the memory disagree on an abbreviation, a flag says whom to trust.

Of the notes and of the memory the head reads one entry each, both on the abbreviation asked; the
flag is added to the query. So the head's output is (1 - w) note + w memory, and nothing but w can
follow the flag: a gate per token can, one number per head favours the same side for ever. With
more entries to read there is a way around it, so `entries` says how many (see README.md).
"""

import mixhead
import torch
import torch.nn.functional as F
from citations import Library
from model import MemoryMix, joined
from torch import Tensor, nn
from tqdm import tqdm


class ConflictReader(nn.Module):
    """The trained model's mixer with a new gate, and a flag beside the question."""

    def __init__(self, trained: MemoryMix, gate: str):
        super().__init__()
        width, heads = trained.mixer.embed_dim, trained.mixer.num_heads
        self.flag = nn.Embedding(2, width)
        self.mixer = mixhead.MixedMultiheadAttention(width, heads, batch_first=True, gate=gate)
        weights = trained.mixer.state_dict().items()
        self.mixer.load_state_dict({k: v for k, v in weights if not k.startswith("mix")})

    def forward(
        self,
        asked: Tensor,
        flag: Tensor,
        note: tuple[Tensor, Tensor],
        memory: tuple[Tensor, Tensor],
        names: Tensor,
    ) -> Tensor:
        """Scores (B, C) of names (C, E) for abbreviations (B, E) under flags (B,), with the
        abbreviations and names of a note, (B, 1, E) each, and of memory entries, (B, M, E) each."""
        query = (asked + self.flag(flag)).unsqueeze(1)
        memory_key = self.mixer.project_memory(memory[0])[0]
        memory_value = self.mixer.project_memory(memory[1])[1]
        output, _ = self.mixer.attend(query, *note, memory_key, memory_value, need_weights=False)
        code = self.mixer.out_proj(joined(self.mixer.project_memory(names)[1]))
        return F.normalize(output.squeeze(1), dim=-1) @ F.normalize(code, dim=-1).T


def conflict_accuracy(
    model: MemoryMix, library: Library, gate: str, *, steps: int, entries: int, seed: int
) -> float:
    """Trains a reader with that gate, and returns how often it answers with the name of the side
    that the flag says, out of all names, about reporters it was not trained on."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    reader = ConflictReader(model, gate)
    with torch.no_grad():
        keys = model.about(library.abbreviations)
        values = model.encoder.string(library.names)

    def draw(reporters: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Scores (count, names) and the right names of new questions about these reporters."""
        asked = torch.randint(len(reporters), (count, 1), generator=generator)
        others = torch.randint(1, len(reporters), (count, entries - 1), generator=generator)
        read = reporters[torch.cat([asked, (asked + others) % len(reporters)], dim=1)]
        names = torch.randint(len(values), (count, entries + 1), generator=generator)
        flag = torch.randint(2, (count,), generator=generator)
        note = keys[read[:, :1]], values[names[:, :1]]
        memory = keys[read], values[names[:, 1:]]
        scores = reader(keys[read[:, 0]], flag, note, memory, values)
        return scores, names.gather(1, flag.unsqueeze(1)).squeeze(1)

    optimizer = torch.optim.AdamW(mixhead.recommended_parameter_groups(reader, 1e-3))
    sharpness = model.log_sharpness.detach().exp()
    for _ in tqdm(range(steps), desc=f"conflict, a gate per {gate}", unit="step", mininterval=0.5):
        scores, right = draw(library.trained, 64)
        loss = F.cross_entropy(scores * sharpness, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores, right = draw(library.held_out, 2000)
    return float((scores.argmax(-1) == right).float().mean())
