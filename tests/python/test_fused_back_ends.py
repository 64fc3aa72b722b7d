"""What each back end of the CUDA composition is handed, on fake CUDA tensors: no GPU is needed.

A dispatch mode answers PyTorch's choice of a back end, records every fused call and checks what the
kernels demand: equal head sizes that are a multiple of 8, channels without gaps, one key head for
each query head where groups are not read in place, the log-sum-exp's dtype and padding.
"""

import pytest
import torch
from samples import NAMES, Sample, floating
from test_fused_composition import backward_op, forward_op, positional
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="fake CUDA tensors need a CUDA build of torch"
)

CUDA = torch._C.DispatchKey.CUDA
MATH, FLASH, EFFICIENT, CUDNN = range(4)
OPERATORS = {
    FLASH: "_scaled_dot_product_flash_attention",
    EFFICIENT: "_efficient_attention_forward",
    CUDNN: "_scaled_dot_product_cudnn_attention",
}
BACKWARDS = {
    FLASH: "_scaled_dot_product_flash_attention_backward",
    EFFICIENT: "_efficient_attention_backward",
    CUDNN: "_scaled_dot_product_cudnn_attention_backward",
}


class Choose(TorchDispatchMode):
    """Answers _fused_sdp_choice with `choice`; keeps (name, arguments) of the fused calls."""

    def __init__(self, choice):
        super().__init__()
        self.choice, self.calls = choice, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name == "_fused_sdp_choice":
            return self.choice
        if name in OPERATORS.values() or name in BACKWARDS.values():
            self.calls.append((name, args))
        return function(*args, **(kwargs or {}))


CASES = [
    Sample("square", L=64, S=64, M=96, D=64, Dv=64),
    Sample("joint", L=64, S=64, M=96, D=64, Dv=64, options={"rule": "joint"}),
    Sample("odd head sizes", L=33, S=70, M=65, D=20, Dv=17),
    Sample("grouped heads", query_heads=6, L=33, S=70, M=65, shared=False),
    Sample("causal, L < S", L=33, S=70, options={"is_causal": True}),
    Sample("causal, L > S", L=70, S=33, options={"is_causal": True}),
    Sample("no batch dimension", batch=(), L=33),
    Sample("two batch dimensions", batch=(2, 3), L=33),
]


def run(sample, choice, dtype, lse_gradients=False, backward=True):
    """(fused calls, forward's results, gradients, tensors) of a forward and a backward."""
    with FakeTensorMode(allow_non_fake_inputs=True), Choose(choice) as mode:
        tensors, options = sample.make(dtype, device="cuda")
        arguments = [*tensors, *positional(options)]
        results = forward_op._op_dk(CUDA, *arguments, True)
        if not backward:
            return mode.calls, results, None, tensors
        sizes = [t.shape if lse_gradients or i == 0 else (0,) for i, t in enumerate(results[:3])]
        grads = [r.new_empty(s) for r, s in zip(results, sizes, strict=False)]
        wanted = [
            name in floating(tensors, options) for name in (*NAMES, "attn_mask", "memory_mask")
        ]
        found = backward_op._op_dk(CUDA, *grads, *arguments, *results, wanted)
    return mode.calls, results, found, tensors


@pytest.mark.parametrize("choice", OPERATORS, ids=OPERATORS.values())
@pytest.mark.parametrize("sample", CASES, ids=lambda sample: sample.name)
@pytest.mark.parametrize("lse_gradients", [False, True], ids=["", "gradients of the lse"])
def test_each_back_end_gets_what_it_takes(sample, choice, lse_gradients):
    calls, results, gradients, tensors = run(sample, choice, torch.bfloat16, lse_gradients)
    causal = bool(sample.options.get("is_causal"))
    # cuDNN aligns its causal mask top-left: what is not square goes to flash.
    expected = FLASH if choice == CUDNN and causal and sample.L < sample.S else choice
    assert [name for name, _ in calls] == [
        OPERATORS[expected], OPERATORS[choice], BACKWARDS[expected], BACKWARDS[choice]
    ]  # fmt: skip
    for name, arguments in calls:
        backward = name in BACKWARDS.values()
        query, key, value = [t for t in arguments if isinstance(t, torch.Tensor)][backward:][:3]
        heads = 2 if "efficient" in name else 1  # its layout is (b, rows, heads, channels)
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        assert query.shape[-1] % 8 == 0
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        if "flash" not in name:
            assert query.shape[heads] == key.shape[heads]
        if backward and "efficient" in name:
            assert arguments[10].shape[-1] % 32 == 0  # the log-sum-exp
    for result, want in zip(results[:3], tensors[:1] + results[1:3], strict=True):
        assert result.device.type == "cuda"
        assert result.dtype == want.dtype
    for name, gradient, tensor in zip(NAMES, gradients, tensors, strict=False):
        assert gradient.shape == tensor.shape, name
        assert gradient.dtype == tensor.dtype, name


def test_a_shared_memory_is_read_once():
    sample = Sample("shared", batch=(16,), L=8, S=8, M=640, D=64, Dv=64)
    calls, *_ = run(sample, FLASH, torch.bfloat16)
    for name, arguments in (calls[1], calls[3]):
        given = [t for t in arguments if isinstance(t, torch.Tensor)]
        query, key = given[1:3] if name in BACKWARDS.values() else given[:2]
        assert query.shape == (1, 2, 16 * 8, 64)
        assert key.shape == (1, 2, 640, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_fused_where_pytorch_chooses_none(dtype):
    # The portable backward runs autograd's engine, which wants a real device.
    calls, results, *_ = run(CASES[0], MATH, dtype, backward=False)
    assert not calls
    assert results[0].dtype == dtype


def table():
    """The back end of each kind of call, as docs/decisions/gpu.md shows it."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for sample in CASES:
            for choice, name in OPERATORS.items():
                calls, *_ = run(sample, choice, dtype)
                rows.append((sample.name, str(dtype), name, " then ".join(n for n, _ in calls[:2])))
    return rows


def test_the_table_prints(capsys):
    for row in table():
        print("{:24} {:16} {:40} {}".format(*row))
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(CASES) * 3 * 2
