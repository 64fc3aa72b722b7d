"""torch.jit.trace of every operator: a trace computes what the operator does, on other input."""

import mixhead
import pytest
import torch

POINTS = [(2, 2, 5, 3), (2, 2, 7, 3), (2, 2, 7, 2)]
H = torch.tensor(1.5, dtype=torch.float64)

FUNCTIONS = {
    "mixed_attention": lambda q, k, v: mixhead.mixed_attention(
        q, k, v, k[0], v[0], torch.zeros(1, dtype=q.dtype), rule="joint"
    ),
    "kernel_attention": lambda q, k, v: mixhead.kernel_attention(q, k, v, H, "gaussian"),
    "kernel_attention, a kernel for each head": lambda q, k, v: mixhead.kernel_attention(
        q, k, v, H, ["cauchy", "tricube"], is_causal=True, return_mass=True
    ),
    "kernel_attention without a bandwidth": lambda q, k, v: mixhead.kernel_attention(
        q, k, v, None, "dot"
    ),
    "local_linear_attention": lambda q, k, v: mixhead.local_linear_attention(
        q, k, v, H, "gaussian"
    ),
    "matching_attention": lambda q, k, v: mixhead.matching_attention(
        q, k[..., :5, :], v[..., :5, :], H, "gaussian"
    ),
    "topk_keys": lambda q, k, v: mixhead.topk_keys(q, k, 3),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_trace_computes_the_same(name, tmp_path):
    function = FUNCTIONS[name]
    example = [torch.randn(shape, dtype=torch.float64) for shape in POINTS]
    traced = torch.jit.trace(function, example, check_trace=False)
    traced.save(str(tmp_path / "traced.pt"))
    loaded = torch.jit.load(str(tmp_path / "traced.pt"))
    other = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in POINTS]
    expected, found = function(*other), loaded(*other)
    if isinstance(expected, torch.Tensor):
        expected, found = [expected], [found]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    gradient = torch.autograd.grad(found[0].sum(), other[0])
    torch.testing.assert_close(gradient, torch.autograd.grad(expected[0].sum(), other[0]))


class Reader(torch.nn.Module):
    def __init__(self):
        super().__init__()
        kernels = ["gaussian", "dot"]
        self.head = mixhead.KernelMultiheadAttention(8, 2, kernel=kernels, batch_first=True)

    def forward(self, x):
        return self.head(x, x, x, need_weights=False)[0]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_kernel_layer():
    layer = Reader()
    x, other = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(other), layer(other))
