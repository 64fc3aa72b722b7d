"""Every operator on a device against float64 on the CPU: outputs and gradients.

Run by tools/gpu_check.sh, which puts tests/python on the path: the samples and the reference are
those of the test suite.
"""

import argparse
import collections
import json
import math
import time
from pathlib import Path

import mixhead  # noqa: F401  (loads the operators)
import torch
from against_reference import cotangents, reference_gradients
from samples import SAMPLES, floating

# Largest error over the largest element of what is compared.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 5e-5,
    torch.bfloat16: 3.2e-2,
    torch.float16: 4e-3,
}


def error_of(got, want):
    """The largest error relative to the largest finite element, at least 1; inf where the places of
    what is not finite differ."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if got.shape != want.shape:
        return math.inf
    if got.numel() == 0:
        return 0.0
    same = (got == want) | (got.isnan() & want.isnan())
    finite = want.isfinite()
    if not (same | finite).all():
        return math.inf
    difference = torch.where(same, 0.0, got - want)
    magnitude = want[finite].abs().max().item() if finite.any() else 1.0
    return difference.abs().nan_to_num(math.inf).max().item() / max(1.0, magnitude)


def differentiated(function, inputs, precision):
    """(outputs, gradients) with random gradients that come in as precise as `precision`."""
    outputs = [o for o in function(*inputs) if o.is_floating_point()]
    grads = [
        grad.to(precision).to(output.dtype).to(output.device)
        for grad, output in zip(cotangents(outputs), outputs, strict=True)
    ]
    live = [i for i in inputs if i is not None and i.requires_grad]
    reached = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in reached], live, [g for _, g in reached], allow_unused=True
    )
    return outputs, [
        torch.zeros_like(i) if g is None else g for g, i in zip(found, live, strict=True)
    ]


def mixed_errors(sample, dtype, device):
    tensors, options = sample.make(dtype, requires_grad=True, device=device)
    names, inputs = zip(*floating(tensors, options).items(), strict=True)

    def call(*inputs):
        named = dict(zip(names, inputs, strict=True))
        masks = {n: named[n] for n in named if n.endswith("_mask")}
        ordered = [named[n] for n in names if not n.endswith("_mask")]
        return torch.ops.mixhead.mixed_attention(*ordered, **{**options, **masks})

    outputs, grads = differentiated(call, inputs, dtype)
    cpu_tensors, cpu_options = sample.make(dtype, requires_grad=True)
    expected, expected_grads = reference_gradients(cpu_tensors, cpu_options)
    pairs = [*zip(outputs, expected, strict=True),
             *zip(grads, [expected_grads[n] for n in names], strict=True)]  # fmt: skip
    scale = 30.0 if sample.magnitude > 1 else 1.0
    return max(error_of(got, want) for got, want in pairs) / scale


# Those whose gradient does not vanish; boxcar has none.
SMOOTH_KERNELS = (
    "dot",
    "cosine",
    "gaussian",
    "laplacian",
    "matern32",
    "matern52",
    "cauchy",
    "epanechnikov",
    "tricube",
)


def operators():
    """name, function, shapes of the inputs that have gradients."""
    ops = torch.ops.mixhead
    points = [(2, 2, 33, 3), (2, 2, 47, 3), (2, 2, 47, 2), ()]
    for kernel in SMOOTH_KERNELS:
        yield (
            f"kernel_attention {kernel}",
            lambda q, k, v, h, kernel=kernel: ops.kernel_attention(
                q, k, v, h.exp() + 0.5, [kernel]
            ),
            points,
        )
    yield (
        "local_linear_attention",
        lambda q, k, v, h: ops.local_linear_attention(q, k, v, h.abs() + 2.0, ["gaussian"]),
        points,
    )
    yield "topk_keys", lambda q, k: ops.topk_keys(q, k, 5), [(2, 2, 9, 8), (2, 70, 8)]
    yield (
        "matching_attention",
        lambda q, k, v, h: ops.matching_attention(
            q, k, v, h.abs() + 2.0, ["gaussian"], iterations=400, tolerance=1e-9
        ),
        [(2, 2, 12, 3), (2, 2, 12, 3), (2, 2, 12, 2), ()],
    )
    yield (
        "merge_attention",
        lambda a, b, la, lb: ops.merge_attention([a, b], [la, lb]),
        [(2, 2, 9, 8), (2, 2, 9, 8), (2, 2, 9), (2, 2, 9)],
    )


def operator_errors(function, shapes, dtype, device):
    generator = torch.Generator().manual_seed(1)
    rounded = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    on_device = [t.to(device).requires_grad_() for t in rounded]
    wide = [t.double().requires_grad_() for t in rounded]
    outputs, grads = differentiated(function, on_device, dtype)
    expected, expected_grads = differentiated(function, wide, dtype)
    pairs = zip([*outputs, *grads], [*expected, *expected_grads], strict=True)
    return max(error_of(got, want) for got, want in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    arguments = parser.parse_args()
    device, start = arguments.device, time.perf_counter()
    samples = SAMPLES if device != "cpu" else SAMPLES[::9]
    worst, failures, count = collections.defaultdict(float), [], 0

    def judge(name, group, dtype, compute, *arguments):
        nonlocal count
        count += 1
        try:
            error = compute(*arguments, dtype, device)
        except Exception as failure:
            failures.append(f"{name} {dtype}: {type(failure).__name__}: {failure}".split("\n")[0])
            return
        worst[f"{group} {dtype}"] = max(worst[f"{group} {dtype}"], error)
        if not error <= TOLERANCE[dtype]:
            failures.append(f"{name} {dtype}: error {error:.2e}")

    for dtype in TOLERANCE:
        half = dtype in (torch.bfloat16, torch.float16)
        for sample in samples:
            if half and sample.magnitude > 1:
                continue  # gradients rounded to halves, with scores of hundreds
            judge(sample.name, "mixed_attention", dtype, mixed_errors, sample)
        if half:
            continue  # the other operators widen halves, on every device the same way
        for name, function, shapes in operators():
            judge(name, name, dtype, operator_errors, function, shapes)

    for group, error in worst.items():
        print(f"{group:50} largest error {error:.1e}")
    for failure in failures:
        print("FAILED", failure)
    seconds = time.perf_counter() - start
    print(f"{count - len(failures)} passed, {len(failures)} failed in {seconds:.0f} s on {device}")
    report = {"device": device, "worst": worst, "failures": failures, "count": count}
    (arguments.out / "check.json").write_text(json.dumps(report, indent=1))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
