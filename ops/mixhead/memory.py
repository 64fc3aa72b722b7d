"""MemoryBank: keys and values that attention heads read, kept in a ring buffer."""

import torch
from torch import Tensor, nn

from mixhead._errors import shape_text


class MemoryBank(nn.Module):
    """A memory of keys and values for each head; once full, the newest entries replace the oldest.

    The entries live in buffers, so they are part of the state dict, of a scripted model and of
    `.to(device)`. The bank holds no gradient: what is appended is detached and copied.

    Appending writes in place. Where a gradient flows through attention over the bank, append after
    `backward()`: autograd refuses to use what was overwritten in between.

    Args:
        num_heads: key/value heads ``H``.
        capacity: slots ``C`` per head.
        head_dim: size ``D`` of a key.
        value_dim: size ``Dv`` of a value; ``head_dim`` where None.
        device, dtype: of the buffers.

    Raises:
        ValueError: a size is not positive.

    Example:
        >>> layer = mixhead.MixedMultiheadAttention(512, num_heads=8, batch_first=True)
        >>> bank = mixhead.MemoryBank(num_heads=8, capacity=65536, head_dim=64)
        >>> bank.append(*layer.project_memory(torch.randn(1000, 512)))
        >>> query = torch.randn(2, 10, 512)
        >>> output, weights = layer(query, query, query, memory=bank)
        >>> len(bank), weights.shape
        (1000, torch.Size([2, 10, 1010]))
    """

    key_slots: Tensor
    value_slots: Tensor
    appended: Tensor

    def __init__(
        self,
        num_heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {
            "num_heads": num_heads,
            "capacity": capacity,
            "head_dim": head_dim,
            "value_dim": value_dim,
        }
        for name, size in sizes.items():
            if size <= 0:
                raise ValueError(f"MemoryBank: {name} must be positive, got {size}")
        self.num_heads = num_heads
        self.capacity = capacity
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.register_buffer(
            "key_slots", torch.zeros(num_heads, capacity, head_dim, device=device, dtype=dtype)
        )
        self.register_buffer(
            "value_slots", torch.zeros(num_heads, capacity, value_dim, device=device, dtype=dtype)
        )
        # All entries ever appended; the next slot is this number modulo the capacity.
        self.register_buffer("appended", torch.zeros((), dtype=torch.int64, device=device))

    @torch.jit.export
    def append(self, key: Tensor, value: Tensor) -> None:
        """Stores ``n`` entries, converted to the bank's dtype; of more than ``C`` the last ``C``.

        Args:
            key: ``(H, n, D)``.
            value: ``(H, n, Dv)``.

        Raises:
            ValueError: a shape does not fit the bank, or ``key`` and ``value`` differ in ``n``.
        """
        self._check("key", key, self.head_dim)
        self._check("value", value, self.value_dim)
        if key.size(1) != value.size(1):
            raise ValueError(
                f"MemoryBank: key and value must have the same number of entries, got "
                f"{key.size(1)} and {value.size(1)}"
            )
        count = key.size(1)
        first = max(count - self.capacity, 0)
        entries = torch.arange(first, count, device=self.key_slots.device)
        slots = (self.appended + entries) % self.capacity
        self.key_slots.index_copy_(1, slots, key[:, first:].detach().to(self.key_slots))
        self.value_slots.index_copy_(1, slots, value[:, first:].detach().to(self.value_slots))
        self.appended.add_(count)

    @torch.jit.export
    def reset(self) -> None:
        """Forgets every entry."""
        self.key_slots.zero_()
        self.value_slots.zero_()
        self.appended.zero_()

    @torch.jit.export
    def keys(self) -> Tensor:
        """The keys ``(H, len, D)`` in the order of their slots: a view, so what is appended later
        may show in it. Attention does not depend on the order."""
        return self.key_slots[:, : self.__len__()]

    @torch.jit.export
    def values(self) -> Tensor:
        """The values ``(H, len, Dv)`` in the order of their slots: a view, as `keys`."""
        return self.value_slots[:, : self.__len__()]

    @torch.jit.export
    def mask(self) -> Tensor:
        """bool ``(C,)``: True for the slots that hold an entry. With `key_slots` and `value_slots`
        it says what `keys` and `values` do, in shapes that do not depend on the data."""
        return torch.arange(self.capacity, device=self.appended.device) < self.appended

    @torch.jit.export
    def __len__(self) -> int:
        return min(int(self.appended.item()), self.capacity)

    def __bool__(self) -> bool:
        return True

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, capacity={self.capacity}, head_dim={self.head_dim}, "
            f"value_dim={self.value_dim}"
        )

    def _check(self, name: str, entries: Tensor, size: int) -> None:
        if (
            entries.dim() != 3
            or entries.size(0) != self.num_heads
            or entries.size(2) != size
            or not entries.is_floating_point()
        ):
            raise ValueError(
                f"MemoryBank: {name} must be floating point of shape "
                f"({self.num_heads}, n, {size}), got {entries.dtype} {shape_text(entries)}"
            )
