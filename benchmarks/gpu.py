"""The rows of docs/performance-gpu.md: each against what one would use instead, in one run.

    python benchmarks/gpu.py [--device cuda] [--quick] [--out build/gpu]

Times are medians of alternating calls, measured with events on CUDA. A peer with several back ends
is measured with each, and the best counts. With ``--device cpu`` the sizes are tiny: it shows that
the script works, not how fast anything is.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import mixhead
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

BACK_ENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Bench:
    def __init__(self, device, seconds=0.5):
        self.device, self.seconds, self.rows = torch.device(device), seconds, []

    def once(self, function):
        """Seconds of one call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def times(self, functions):
        """Median seconds of each, run alternately; None for one that cannot run."""
        usable = {}
        for name, function in functions.items():
            try:
                for _ in range(3):
                    function()
                usable[name] = self.once(function)
            except (RuntimeError, ImportError) as error:
                print(f"    {name}: {str(error).splitlines()[0][:120]}", flush=True)
        count = int(min(max(self.seconds / sum(usable.values()), 3), 51)) if usable else 0
        found = {name: [] for name in usable}
        for _ in range(count):
            for name in usable:
                found[name].append(self.once(functions[name]))
        return {name: statistics.median(values) for name, values in found.items()}

    def row(self, work, ours, peers, goal, note=""):
        """Prints and keeps one row; `ours` and each peer are functions without arguments."""
        times = self.times({"mixhead": ours, **peers})
        if "mixhead" not in times:
            return
        mine = times.pop("mixhead")
        best = min(times, key=times.get) if times else None
        ratio = times[best] / mine if best else float("nan")
        note = note(mine) if callable(note) else note
        self.rows.append(
            {"work": work, "seconds": mine, "peers": times, "best": best, "ratio": ratio,
             "goal": goal, "note": note}
        )  # fmt: skip
        print(
            f"{work:58} {mine * 1e3:9.3f} ms  {best or '-':10} "
            f"{(times[best] if best else 0) * 1e3:9.3f} ms  {ratio:6.2f} of {goal}  {note}",
            flush=True,
        )


def with_gradients(function, inputs):
    """A step: forward, then the gradients of the first output's sum with random weights."""
    weights = []

    def step():
        output = function()
        if not weights:
            weights.append(torch.randn_like(output))
        return torch.autograd.grad(output, inputs, weights[0])

    return step


def by_back_end(make, names=tuple(BACK_ENDS)):
    """`make` run under each back end of PyTorch."""

    def under(kind):
        def run():
            with sdpa_kernel(kind):
                return make()

        return run

    return {name: under(BACK_ENDS[name]) for name in names}


def tensors(bench, shapes, dtype, gradients):
    return [
        torch.randn(shape, device=bench.device, dtype=dtype).requires_grad_(gradients)
        for shape in shapes
    ]


def inputs_of(bench, shape, dtype, gradients):
    b, h, rows, slots, d = shape
    sizes = [(b, h, rows, d)] * 3 + [(h, slots, d)] * 2 + [(h, 1, 1)]
    return tensors(bench, sizes, dtype, gradients)


def two_sdpa(q, k, v, mk, mv, mix):
    b = q.shape[0]
    w = torch.sigmoid(mix)
    of_memory = sdpa(q, mk.expand(b, *mk.shape), mv.expand(b, *mv.shape))
    return torch.lerp(sdpa(q, k, v), of_memory, w)


def concatenated(q, k, v, mk, mv, mix):
    b, _, rows, _ = q.shape
    keys = torch.cat([k, mk.expand(b, *mk.shape)], 2)
    values = torch.cat([v, mv.expand(b, *mv.shape)], 2)
    mask = torch.cat([mix.new_zeros(1, 1, k.shape[2]).expand(mix.shape[0], 1, -1),
                      mix.expand(-1, 1, mk.shape[1])], 2)  # fmt: skip
    return sdpa(q, keys, values, attn_mask=mask.expand(b, -1, rows, -1))


def flex(q, k, v, mk, mv, mix):
    from torch.nn.attention.flex_attention import flex_attention

    b, split = q.shape[0], k.shape[2]
    keys = torch.cat([k, mk.expand(b, *mk.shape)], 2)
    values = torch.cat([v, mv.expand(b, *mv.shape)], 2)
    logits = mix.flatten()

    def score(s, _batch, head, _row, key):
        return torch.where(key >= split, s + logits[head], s)

    compiled = flex.compiled = getattr(flex, "compiled", None) or torch.compile(flex_attention)
    return compiled(q, keys, values, score_mod=score)


# Rule, what one would write instead, goals of forward and of forward + backward.
RULES = (("gate", two_sdpa, (1.0, 1.05)), ("joint", concatenated, (2, 2.5)))


def dense(bench, quick):
    for d in (64, 128):
        shape = (2, 2, 64, 128, d) if quick else (8, 16, 2048, 8192, d)
        for gradients in (False, True):
            inputs = inputs_of(bench, shape, torch.bfloat16, gradients)
            for rule, peer, goals in RULES:

                def ours(inputs=inputs, rule=rule):
                    return mixhead.mixed_attention(*inputs, rule=rule)

                def theirs(inputs=inputs, peer=peer):
                    return peer(*inputs)

                def joint_by_flex(inputs=inputs):
                    return flex(*inputs)

                def step(f, inputs=inputs, gradients=gradients):
                    return with_gradients(f, inputs) if gradients else f

                kind = "forward + backward" if gradients else "forward"
                work = f"{rule} {shape} bfloat16 {kind}"
                peers = by_back_end(step(theirs))
                with nullcontext() if gradients else torch.no_grad():
                    bench.row(work, step(ours), peers, goals[gradients])
                    if rule == "joint" and not quick:
                        peers = {"flex": step(joint_by_flex)}
                        bench.row(work + ", FlexAttention", step(ours), peers, 1.1)


def single_precision(bench, quick):
    shape = (1, 2, 64, 128, 64) if quick else (2, 8, 1024, 4096, 64)
    for gradients in (False, True):
        inputs = inputs_of(bench, shape, torch.float32, gradients)

        def ours(inputs=inputs):
            return mixhead.mixed_attention(*inputs)

        def theirs(inputs=inputs):
            return two_sdpa(*inputs)

        step = (lambda f, i=inputs: with_gradients(f, i)) if gradients else (lambda f: f)
        kind = "forward + backward" if gradients else "forward"
        with nullcontext() if gradients else torch.no_grad():
            bench.row(f"gate {shape} float32 {kind}", step(ours),
                      by_back_end(step(theirs), ("efficient",)), 1.0)  # fmt: skip


@torch.no_grad()
def one_query(bench, quick):
    for batch, slots, goal in ((32, 262144, 8), (1, 1048576, 1.5)):
        slots = 4096 if quick else slots
        for dtype in (torch.bfloat16, torch.float32):
            h, d = 8, 64
            inputs = tensors(bench, [(batch, h, 1, d)] * 3 + [(h, slots, d)] * 2 + [(h, 1, 1)],
                             dtype, False)  # fmt: skip
            size = 2 * inputs[3].numel() * inputs[3].element_size()

            def ours(inputs=inputs):
                return mixhead.mixed_attention(*inputs)

            def theirs(inputs=inputs):
                return two_sdpa(*inputs)

            bench.row(
                f"one query, batch {batch}, memory {slots} {str(dtype)[6:]}", ours,
                by_back_end(theirs), goal,
                lambda seconds, size=size: f"reads {size / seconds * 1e-9:.0f} GB/s",
            )  # fmt: skip


def memory(bench, quick):
    if bench.device.type != "cuda" or quick:
        return
    inputs = inputs_of(bench, (32, 16, 1024, 16384, 64), torch.bfloat16, True)
    size = sum(t.numel() * t.element_size() for t in inputs)
    step = with_gradients(lambda: mixhead.mixed_attention(*inputs), inputs)
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    bench.rows.append({"work": "memory of a training step, batch 32", "ratio": extra / size})
    print(
        f"training step, batch 32, shared memory: {extra / size:.2f} times the inputs in addition"
    )


def kernels(bench, quick):
    n = 256 if quick else 16384
    for gradients in (False, True):
        q, k, v = tensors(bench, [(1, 1, n, 64)] * 3, torch.float32, gradients)

        def ours(q=q, k=k, v=v):
            return mixhead.kernel_attention(
                q, k, v, torch.full((), 8.0, device=q.device), "gaussian"
            )

        def theirs(q=q, k=k, v=v):
            return torch.softmax(-torch.cdist(q, k).square() / 128, -1) @ v

        step = (lambda f, i=(q, k, v): with_gradients(f, i)) if gradients else (lambda f: f)
        kind = "forward + backward" if gradients else "forward"
        with nullcontext() if gradients else torch.no_grad():
            bench.row(f"gaussian D=64, S={n} {kind}", step(ours), {"cdist": step(theirs)}, 4)


@torch.no_grad()
def search(bench, quick):
    keys, rows = (4096, 16) if quick else (4 << 20, 512)
    q, k = tensors(bench, [(1, rows, 64), (1, keys, 64)], torch.float32, False)
    chunk = min(keys, 1 << 19)

    def theirs():
        scores, indices = [], []
        for first in range(0, keys, chunk):
            found = (q @ k[:, first : first + chunk].transpose(1, 2)).topk(32)
            scores.append(found.values)
            indices.append(found.indices + first)
        best = torch.cat(scores, -1).topk(32)
        return best.values, torch.cat(indices, -1).gather(-1, best.indices)

    bench.row(f"topk_keys {rows} queries, {keys} keys, k=32",
              lambda: mixhead.topk_keys(q, k, 32), {"matmul": theirs}, 1.2)  # fmt: skip


GROUPS = {f.__name__: f for f in (one_query, single_precision, kernels, search, memory, dense)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--groups", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    arguments = parser.parse_args()
    quick = arguments.quick or arguments.device == "cpu"
    bench = Bench(arguments.device, 0.02 if quick else 0.5)
    card = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.groups:
        try:
            GROUPS[name](bench, quick)
        except torch.OutOfMemoryError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
        report = {"device": card, "torch": torch.__version__, "rows": bench.rows}
        (arguments.out / "benchmark.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
