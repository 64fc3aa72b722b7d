"""Sample inputs of mixed_attention: one row for each thing the contract allows.

A shape is written in the contract's letters, `"B"` standing for every batch dimension:
`("B", 1, "L", "S")`. `make` turns a row into tensors; everything random comes from the row's name.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable

import pytest
import torch


@dataclasses.dataclass(frozen=True)
class Sample:
    """One row of the table."""

    name: str
    batch: tuple[int, ...] = (2,)
    query_heads: int = 2
    heads: int = 2
    L: int = 5
    S: int = 7
    M: int = 6
    D: int = 8
    Dv: int = 8
    shared: bool = True
    mix: tuple = ("Hq", 1, 1)
    attn_mask: tuple | None = None  # ("bool" or "float", *shape)
    memory_mask: tuple | None = None
    index: int | None = None  # K slots a query names, -1 and duplicates among them
    options: dict = dataclasses.field(default_factory=dict)
    magnitude: float = 1.0
    adjust: Callable | None = None  # a last change of the finished (tensors, options)

    def shape(self, letters):
        """The letters' sizes, `"B"` as many of them as there are batch dimensions."""
        sizes = {
            "Hq": (self.query_heads,),
            "H": (self.heads,),
            "B": self.batch,
            **{letter: (getattr(self, letter),) for letter in ("L", "S", "M", "D", "Dv")},
        }
        return [n for part in letters for n in (sizes[part] if isinstance(part, str) else (part,))]

    def make(self, dtype=torch.float64, requires_grad=False, device="cpu"):
        """(query, key, value, memory_key, memory_value, mix), keyword options."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def normal(*letters):
            return torch.randn(self.shape(letters), generator=generator, dtype=torch.float64)

        memory = ("H", "M") if self.shared else ("B", "H", "M")
        tensors = [
            normal("B", "Hq", "L", "D") * self.magnitude,
            normal("B", "H", "S", "D") * self.magnitude,
            normal("B", "H", "S", "Dv"),
            normal(*memory, "D") * self.magnitude,
            normal(*memory, "Dv"),
            normal(*self.mix),
        ]
        options = dict(self.options)
        if self.query_heads != self.heads:
            options["enable_gqa"] = True
        for name in ("attn_mask", "memory_mask"):
            if (spec := getattr(self, name)) is not None:
                mask = normal(*spec[1:])
                options[name] = mask > -0.5 if spec[0] == "bool" else mask
        if self.index is not None:
            shape = [*self.shape(("B", "Hq", "L")), self.index]
            index = torch.randint(-1, max(self.M, 0), shape, generator=generator)
            options["memory_index"] = index
        tensors = [tensor.to(dtype) for tensor in tensors]
        for name, option in options.items():
            if isinstance(option, torch.Tensor) and option.is_floating_point():
                options[name] = option.to(dtype)
        if self.adjust is not None:
            tensors, options = self.adjust(tensors, options)
        tensors = [tensor.to(device) for tensor in tensors]
        for name, option in options.items():
            if isinstance(option, torch.Tensor):
                options[name] = option.to(device)
        if requires_grad:
            for tensor in floating(tensors, options).values():
                tensor.requires_grad_()
        return tuple(tensors), options


NAMES = ("query", "key", "value", "memory_key", "memory_value", "mix")


def floating(tensors, options):
    """Everything that may get a gradient, by argument name."""
    masks = {
        name: options[name]
        for name in ("attn_mask", "memory_mask")
        if options.get(name) is not None and options[name].is_floating_point()
    }
    return dict(zip(NAMES, tensors, strict=True)) | masks


def _transposed(tensors, options):
    """Last two dimensions swapped in memory; of the memory only every second channel."""
    tensors = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    wide = [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in tensors[3:5]]
    return [*tensors[:3], *wide, tensors[5]], options


def _expanded(tensors, options):
    """One batch entry of key, value and memory, one head of the query, expanded over the others."""
    query, key, value, memory_key, memory_value, mix = tensors
    query = query[:, :1].expand(query.shape)
    key, value, memory_key, memory_value = (
        tensor[:1].expand(tensor.shape) for tensor in (key, value, memory_key, memory_value)
    )
    return [query, key, value, memory_key, memory_value, mix], options


def _expanded_masks(tensors, options):
    options = dict(options)
    for name in ("attn_mask", "memory_mask"):
        mask = options[name]
        options[name] = mask[:1].expand(2, *mask.shape[1:])
    return tensors, options


def _close_rows(self_rows=(), memory_rows=()):
    """Masks under which the named rows read nothing of a side."""

    def adjust(tensors, options):
        options = dict(options)
        for name, rows in (("attn_mask", self_rows), ("memory_mask", memory_rows)):
            if not rows:
                continue
            mask = options[name].clone()
            mask[..., list(rows), :] = False if mask.dtype == torch.bool else -math.inf
            options[name] = mask
        return tensors, options

    return adjust


def _some_inf(tensors, options):
    options = dict(options)
    for name in ("attn_mask", "memory_mask"):
        mask = options[name].clone()
        mask[mask > 0.7] = -math.inf
        options[name] = mask
    return tensors, options


def _index_of_nothing(tensors, options):
    index = options["memory_index"].clone()
    index[..., 1, :] = -1
    return tensors, {**options, "memory_index": index}


def _index_twice(tensors, options):
    index = options["memory_index"].clone()
    index[..., 1] = index[..., 0]
    return tensors, {**options, "memory_index": index}


_FULL = ("B", "Hq", "L", "S")
_FULL_MEMORY = ("B", "Hq", "L", "M")

FEATURES = [
    # Gates: per head, token, channel, both, batch, one number.
    Sample("gate of a head"),
    Sample("gate of a token", mix=("B", "Hq", "L", 1)),
    Sample("gate of a channel", mix=("Hq", 1, "Dv")),
    Sample("gate of everything", mix=("B", "Hq", "L", "Dv")),
    Sample("gate of a channel alone", mix=("Dv",)),
    Sample("gate of one number", mix=()),
    Sample("gate of a query position", mix=("L", 1)),
    Sample("gate of a batch entry", mix=("B", 1, 1, 1)),
    # Values wider or narrower than keys; memory of each batch entry; GQA.
    Sample("wider values", Dv=12),
    Sample("narrower values", Dv=3, shared=False),
    Sample("memory of each batch entry", shared=False, mix=("B", "Hq", "L", 1)),
    Sample("grouped heads", query_heads=4, heads=2),
    Sample("grouped heads, memory of each batch entry", query_heads=6, heads=2, shared=False),
    Sample(
        "one key head", query_heads=3, heads=1, mix=("B", "Hq", "L", 1), attn_mask=("bool", *_FULL)
    ),
    Sample("scale", options={"scale": 0.3}),
    Sample("negative scale", options={"scale": -0.3}),
    Sample("scale of zero", options={"scale": 0.0}),
    # Masks of every broadcastable shape.
    Sample("bool mask (B,Hq,L,S)", attn_mask=("bool", *_FULL)),
    Sample("bool mask (L,S)", attn_mask=("bool", "L", "S")),
    Sample("bool mask (B,1,1,S)", attn_mask=("bool", "B", 1, 1, "S")),
    Sample("bool mask (S,)", attn_mask=("bool", "S")),
    Sample("bool mask (Hq,L,1)", attn_mask=("bool", "Hq", "L", 1)),
    Sample("bool masks ()", attn_mask=("bool",), memory_mask=("bool",)),
    Sample("float mask (B,Hq,L,S)", attn_mask=("float", *_FULL)),
    Sample("float mask (L,S)", attn_mask=("float", "L", "S")),
    Sample("float mask (B,1,1,S)", attn_mask=("float", "B", 1, 1, "S")),
    Sample("float mask (1,Hq,1,S)", attn_mask=("float", 1, "Hq", 1, "S")),
    Sample("float mask (S,)", attn_mask=("float", "S")),
    Sample("float mask (L,1)", attn_mask=("float", "L", 1)),
    Sample("float mask of one number", attn_mask=("float",), memory_mask=("float", 1)),
    Sample("bool memory mask (B,Hq,L,M)", memory_mask=("bool", *_FULL_MEMORY)),
    Sample("bool memory mask (1,Hq,1,M)", memory_mask=("bool", 1, "Hq", 1, "M")),
    Sample("float memory mask (B,Hq,L,M)", memory_mask=("float", *_FULL_MEMORY)),
    Sample("float memory mask (1,Hq,1,M)", memory_mask=("float", 1, "Hq", 1, "M")),
    Sample("float memory mask (B,1,L,1)", memory_mask=("float", "B", 1, "L", 1), shared=False),
    Sample(
        "float masks with -inf",
        attn_mask=("float", *_FULL),
        memory_mask=("float", *_FULL_MEMORY),
        adjust=_some_inf,
    ),
    Sample(
        "expanded masks",
        attn_mask=("float", *_FULL),
        memory_mask=("float", *_FULL_MEMORY),
        adjust=_expanded_masks,
    ),
    Sample(
        "masks, grouped heads",
        query_heads=4,
        attn_mask=("float", "Hq", "L", "S"),
        memory_mask=("bool", "Hq", 1, "M"),
    ),
    # Slots that a query names.
    Sample("memory index", index=4),
    Sample("memory index, a slot twice", index=3, adjust=_index_twice, shared=False),
    Sample("memory index of nothing", index=3, adjust=_index_of_nothing),
    Sample("memory index of no columns", index=0),
    Sample("memory index, bool mask", index=4, memory_mask=("bool", *_FULL_MEMORY)),
    Sample("memory index, float mask", index=4, memory_mask=("float", "B", 1, 1, "M")),
    Sample("memory index, float mask (M,)", index=9, memory_mask=("float", "M"), shared=False),
    Sample("memory index, grouped heads", index=4, query_heads=4, mix=("B", "Hq", "L", 1)),
    Sample("memory index into nothing", index=2, M=0),
    # Causal, aligned bottom-right.
    Sample("causal, L < S", options={"is_causal": True}),
    Sample("causal, L = S", S=5, options={"is_causal": True}),
    Sample("causal, L > S", L=9, S=4, options={"is_causal": True}),
    Sample("causal with a bool mask", attn_mask=("bool", "L", "S"), options={"is_causal": True}),
    Sample(
        "causal with a float mask", attn_mask=("float", "B", 1, 1, "S"), options={"is_causal": True}
    ),
    # Nothing to read.
    Sample("no memory", M=0),
    Sample("no memory of each batch entry", M=0, shared=False, Dv=3),
    Sample("no sequence", S=0),
    Sample("nothing at all", S=0, M=0),
    Sample("no sequence, causal", S=0, options={"is_causal": True}),
    Sample("rows that read no sequence", attn_mask=("bool", *_FULL), adjust=_close_rows((1, 4))),
    Sample(
        "rows that read no memory",
        memory_mask=("bool", *_FULL_MEMORY),
        adjust=_close_rows((), (0, 3)),
    ),
    Sample(
        "rows that read nothing",
        attn_mask=("bool", *_FULL),
        memory_mask=("bool", *_FULL_MEMORY),
        adjust=_close_rows((1, 2), (2, 3)),
    ),
    Sample(
        "rows that read nothing, float masks",
        attn_mask=("float", "L", "S"),
        memory_mask=("float", "L", "M"),
        adjust=_close_rows((1, 2), (2, 3)),
    ),
    # Sizes of nothing and of one, batch dimensions of every number.
    Sample("no queries", L=0),
    Sample("batch of nothing", batch=(0,)),
    Sample(
        "batch of nothing, memory of each entry", batch=(0,), shared=False, mix=("B", "Hq", "L", 1)
    ),
    Sample("no batch dimension", batch=()),
    Sample(
        "no batch dimension, masks",
        batch=(),
        attn_mask=("float", "L", "S"),
        memory_mask=("bool", "Hq", "L", "M"),
        mix=("Hq", "L", 1),
    ),
    Sample("two batch dimensions", batch=(2, 3), mix=("B", "Hq", "L", 1)),
    Sample("two batch dimensions, memory of each", batch=(2, 3), shared=False),
    Sample(
        "two batch dimensions, partly broadcast",
        batch=(2, 3),
        mix=(2, 1, "Hq", 1, 1),
        attn_mask=("float", 2, 1, 1, "L", "S"),
        memory_mask=("float", 3, 1, 1, "M"),
    ),
    Sample(
        "two batch dimensions, partly broadcast bool",
        batch=(2, 3),
        shared=False,
        attn_mask=("bool", 3, "Hq", 1, "S"),
        memory_mask=("bool", 2, 1, 1, "L", "M"),
    ),
    Sample(
        "two batch dimensions, memory index",
        batch=(2, 3),
        index=3,
        memory_mask=("float", 2, 1, 1, 1, "M"),
    ),
    Sample("everything one", batch=(1,), query_heads=1, heads=1, L=1, S=1, M=1, D=1, Dv=1),
    # Strides.
    Sample("transposed inputs", shared=False, mix=("B", "Hq", "L", "Dv"), adjust=_transposed),
    Sample("expanded inputs", shared=False, adjust=_expanded),
    # Scores far from zero.
    Sample("large scores", magnitude=8.0),
    Sample("scores to +-500", magnitude=14.0, D=16, L=20, S=33, M=40),
    Sample(
        "far apart sides", options={"scale": 0.5}, magnitude=6.0, M=2, S=2, mix=("B", "Hq", "L", 1)
    ),
]

# Sizes on both sides of the edges of tiles, vectors and blocks.
SIZES = [
    Sample("L 1, S 63, M 513, D 64", L=1, S=63, M=513, D=64, Dv=64),
    Sample(
        "L 67, S 513, M 130, D 20", L=67, S=513, M=130, D=20, Dv=17, options={"is_causal": True}
    ),
    Sample(
        "L 130, S 130, M 63, D 80", L=130, S=130, M=63, D=80, Dv=80, options={"is_causal": True}
    ),
    Sample("L 67, S 1, M 1, D 1", L=67, S=1, M=1, D=1, Dv=33),
    Sample("L 130, S 63, M 1025, D 16", batch=(3,), L=130, S=63, M=1025, D=16, Dv=1, shared=False),
    Sample(
        "L 33, S 257, M 65, grouped",
        L=33,
        S=257,
        M=65,
        D=32,
        Dv=40,
        query_heads=8,
        heads=2,
        attn_mask=("float", "B", "Hq", "L", "S"),
    ),
    Sample(
        "L 70, S 300, M 700, index",
        L=70,
        S=300,
        M=700,
        D=24,
        Dv=24,
        index=77,
        memory_mask=("float", "M"),
    ),
    Sample(
        "L 129, S 600, bool masks",
        L=129,
        S=600,
        M=600,
        D=8,
        Dv=8,
        attn_mask=("bool", "L", "S"),
        memory_mask=("bool", "B", 1, 1, "M"),
        mix=("B", "Hq", "L", "Dv"),
    ),
]


def _joint(sample):
    """The same row under rule "joint"; a gate per channel has no joint counterpart."""
    mix = tuple(1 if letter == "Dv" else letter for letter in sample.mix)
    return dataclasses.replace(
        sample, name=f"joint, {sample.name}", mix=mix, options={**sample.options, "rule": "joint"}
    )


_GATE_ONLY = ("gate of a channel", "gate of everything", "gate of a channel alone")
JOINT = [_joint(sample) for sample in FEATURES + SIZES if sample.name not in _GATE_ONLY]
SAMPLES = FEATURES + SIZES + JOINT

# Small enough for numerical derivatives of everything.
_SMALL_NAMES = (
    "gate of a head",
    "gate of everything",
    "memory of each batch entry",
    "one key head",
    "float mask (B,Hq,L,S)",
    "float mask (B,1,1,S)",
    "float memory mask (1,Hq,1,M)",
    "float masks with -inf",
    "memory index, a slot twice",
    "memory index, float mask",
    "causal, L > S",
    "no memory",
    "no sequence",
    "rows that read nothing",
    "rows that read nothing, float masks",
)


def _small(sample):
    sizes = {
        "L": 3 if sample.L < 9 else 4,
        "S": min(sample.S, 3),
        "M": min(sample.M, 4),
        "D": 2,
        "Dv": 3,
    }
    if sample.adjust is not None and sample.adjust.__qualname__.startswith("_close_rows"):
        sizes["L"] = 5
    if sample.L > sample.S:
        sizes["S"] = min(sample.S, 2)
    return dataclasses.replace(sample, batch=(2,), **sizes)


SMALL = [
    _small(sample) for sample in SAMPLES if sample.name.removeprefix("joint, ") in _SMALL_NAMES
]


def each_sample(samples=SAMPLES):
    return pytest.mark.parametrize("sample", samples, ids=lambda sample: sample.name)


def named(name):
    return next(sample for sample in SAMPLES if sample.name == name)
