"""The Python steps of bench/gpu.sh: the build, checks against float64, timing by graph replay, and the report.

python bench/gpu.py build | check | small | strips | time | profile | page DIR     [--dry: judge no number]
"""

import os
import sys

# Before other imports: a folder beside this file, such as a corpus named email, must not be imported as a module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minidisp import ops
from minidisp.dispersion import dispersion_loss
from minidisp.loss import IGNORE, chunked, plain
from minidisp.ops import build, registered
from minidisp.ops.__main__ import diagnosis
from minidisp.ops.dispersion import FUSED_VARIANTS, select
from minidisp.ops.streamed import float32_precision

L2_BYTES = 128 << 20  # more than any GPU has, so alternating inputs are read from memory
WAYS = {  # name -> (impl, dtype, float32 matmul precision, whether to use torch.compile)
    "fused, as trained": ("fused", torch.float32, "high", False),
    "fused, bfloat16": ("fused", torch.bfloat16, "high", False),
    "fused, exact": ("fused", torch.float32, "highest", False),
    "streamed": ("streamed", torch.float32, "high", False),
    "torch.compile": ("reference", torch.float32, "high", True),
    "eager": ("reference", torch.float32, "high", False),
}
BARS = {"eager": 5.0, "torch.compile": 2.0}  # required speedup of "fused, as trained" at the first shape


def loss_and_gradient(z: Tensor, impl: str = "fused", variant: str = "angular_spread", tau: float = 1.0):
    z = z.detach().requires_grad_()
    loss = dispersion_loss(z, variant, tau, impl=impl)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def capture(function: Callable) -> tuple[torch.cuda.CUDAGraph, object]:
    """function() as a CUDA graph, and its result, which each replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up: one-time work must not be captured
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def build_it() -> bool:
    """Find the extension for CUDA, or build it, and print which."""
    missing = registered("cuda")
    found = build.find_or_build("cuda")
    print(f"{found.about}: {found.path}{found.note}")
    print(f"missing: {missing}" if missing else f"for {torch.cuda.get_device_name()}")
    return not missing


def diagnose(dry: bool) -> bool:
    """Like python -m minidisp.ops."""
    text, passed = diagnosis()
    print(text)
    return passed or dry


def check(dry: bool) -> bool:
    """Errors against float64 on the CPU; then bit-exact repetition, also on another stream and from a graph."""
    good = True
    print("| T | C | variant | tau | precision, dtype | loss | gradient |\n|---|---|---|---|---|---|---|")
    cases = [(T, C, "angular_spread", 1.0) for T, C in itertools.product((129, 1000, 1024), (768, 770))]
    cases += [(5001, 768, "angular_spread", 1.0), (1000, 770, "angular_spread", 1e-3)]
    cases += [(1000, 770, variant, 1.0) for variant in FUSED_VARIANTS[1:]]
    for T, C, variant, tau in cases:
        z = torch.randn(1, T, C, generator=torch.Generator().manual_seed(T + C)).bfloat16()
        value, exact = loss_and_gradient(z.double(), "streamed", variant, tau)
        for precision, dtype in itertools.product(("high", "highest"), (torch.float32, torch.bfloat16)):
            with float32_precision(precision):
                loss, grad = loss_and_gradient(z.to("cuda", dtype), "fused", variant, tau)
            of_loss = abs(loss.item() - value.item()) / (1 + abs(value.item()))
            of_grad = ((grad.cpu().double() - exact).norm() / exact.norm()).item()
            limit = (2e-3 if precision == "high" else 1e-5 if tau == 1 else 3e-4) + (dtype != torch.float32) * 6e-3
            passed = of_loss <= 1e-4 and of_grad <= limit
            good &= passed or dry
            name = f"{precision}, {str(dtype).removeprefix('torch.')}"
            verdict = "" if passed else " FAILED"
            print(f"| {T} | {C} | {variant} | {tau:g} | {name} | {of_loss:.0e} | {of_grad:.0e}{verdict} |", flush=True)

    print("\n| tokens | vocabulary | dtype | loss | gradient of x | of the weight |\n|---|---|---|---|---|---|")
    for N, V, dtype in itertools.product((100, 5000), (50304, 50257), (torch.float32, torch.bfloat16, torch.float16)):
        errors = cross_entropy_errors(N, V, dtype)
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        passed = errors[0] <= limit / 10 + 1e-6 and max(errors[1:]) <= limit
        good &= passed or dry
        shown = " | ".join(f"{error:.0e}" for error in errors) + ("" if passed else " FAILED")
        print(f"| {N} | {V} | {str(dtype).removeprefix('torch.')} | {shown} |", flush=True)

    for precision, variant in itertools.product(("high", "highest"), FUSED_VARIANTS):
        with float32_precision(precision):
            z = torch.randn(4, 1000, 768, device="cuda")
            once = loss_and_gradient(z, variant=variant)
            results = {"again": loss_and_gradient(z, variant=variant)}
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results["on another stream"] = loss_and_gradient(z, variant=variant)
            torch.cuda.current_stream().wait_stream(stream)
            if not dry:
                graph, results["from a graph"] = capture(
                    lambda z=z, variant=variant: loss_and_gradient(z, variant=variant)
                )
                graph.replay()
            torch.cuda.synchronize()
            for name, result in results.items():
                if not all(torch.equal(a, b) for a, b in zip(once, result, strict=True)):
                    good = dry
                    print(f"FAILED: {variant}, {precision}: different bits {name}")
    print("compared bit for bit: repeated, on another stream and from a graph; differences are reported above")
    return good


def cross_entropy_errors(N: int, V: int, dtype: torch.dtype) -> list[float]:
    """Relative errors of the chunked loss and of its gradients by x and by the weight, with products in dtype."""
    generator = torch.Generator().manual_seed(N + V)
    x, weight = (scale * torch.randn(n, 64, generator=generator) for n, scale in ((N, 1.0), (V, 0.3)))
    targets = torch.randint(V, (N,), generator=generator)
    targets[::7] = IGNORE
    results = []
    for form, wide in ((plain, torch.float64), (chunked, torch.float32)):
        # The inputs are exact in all dtypes, so that only errors of the computation are measured.
        own = [value.to(dtype).to("cuda", wide).requires_grad_() for value in (x, weight)]
        with torch.autocast("cuda", dtype=dtype, enabled=wide != torch.float64 and dtype != torch.float32):
            loss = form(*own, targets.cuda())
        scale = 2**12 if wide == torch.float32 else 1  # otherwise float16 would underflow
        gradients = torch.autograd.grad(scale * loss, own)
        results.append([loss.detach().double(), *(gradient.double() / scale for gradient in gradients)])
    return [((a - b).norm() / a.norm()).item() for a, b in zip(*results, strict=True)]


def small() -> bool:
    """All kernels at small shapes, for compute-sanitizer."""
    select("fused", "angular_spread", torch.float32, "cuda")  # finds the extension, or raises the reason
    for V, dtype in itertools.product((33, 5000, 4999), (torch.float32, torch.bfloat16, torch.float16)):
        logits, targets = torch.randn(20, V, device="cuda").to(dtype), torch.arange(-1, 19, device="cuda")
        torch.ops.minidisp.cross_entropy_(logits, targets, IGNORE, True)
    for precision, variant, C in itertools.product(("high", "highest"), FUSED_VARIANTS, (40, 33)):
        for tau in (1.0, 1e-3):
            with float32_precision(precision):
                loss_and_gradient(torch.randn(1, 150, C, device="cuda"), variant=variant, tau=tau)
    torch.cuda.synchronize()
    return True


def strips() -> bool:
    """A sequence long enough for blockwise computation, for memcheck. Not for initcheck, which does not see what cuBLAS
    writes with the copy engine, nor for racecheck, which would take minutes."""
    for precision, variant in itertools.product(("high", "highest"), ("angular_spread", "l2_repel")):
        with float32_precision(precision):
            loss_and_gradient(torch.randn(1, 4200, 40, device="cuda"), variant=variant)
    torch.cuda.synchronize()
    return True


def profile() -> bool:
    """The kernels of a training step at (16, 1024, 768), for ncu, twice: once to warm up, once to profile."""
    select("fused", "angular_spread", torch.float32, "cuda")
    with float32_precision("high"):
        z = torch.randn(16, 1024, 768, device="cuda")
        logits, targets = torch.randn(2048, 50304, device="cuda").bfloat16(), torch.arange(2048, device="cuda")
        for _ in range(2):
            torch.ops.minidisp.cross_entropy_(logits, targets, IGNORE, True)
            loss_and_gradient(z)
    torch.cuda.synchronize()
    return True


def milliseconds(way: str, shape: tuple[int, int, int], dry: bool) -> tuple[float, float]:
    """Median time of forward and backward, alternating inputs in one graph, and MiB beyond z and its gradient."""
    impl, dtype, precision, compiles = WAYS[way]
    torch.manual_seed(0)
    z = torch.randn(shape, device="cuda").to(dtype)
    inputs = [z] + [torch.randn_like(z) for _ in range(1 if dry else math.ceil(L2_BYTES / z.nbytes))]
    function = loss_and_gradient
    if compiles:
        compiled = torch.compile(dispersion_loss, dynamic=False)

        def function(z: Tensor, impl: str):
            z = z.detach().requires_grad_()
            return torch.autograd.grad(compiled(z, impl=impl), z)

    with float32_precision(precision):
        function(z, impl)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function(z, impl)
        memory = torch.cuda.max_memory_allocated() - before - z.nbytes
        del result
        run = lambda: [function(x, impl) for x in inputs] and None  # noqa: E731
        run = run if dry else capture(run)[0].replay
        times = []
        for _ in range(3 if dry else 12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / len(inputs))
    return statistics.median(times[2:]), memory / 2**20


def time_all(dry: bool) -> bool:
    print(f"forward and backward of angular_spread in ms on {torch.cuda.get_device_name()}, by graph replay\n")
    print(f"| (B, T, C) | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    shapes = [(4, 256, 64)] if dry else [(32, 1024, 768), (16, 1024, 768), (16, 512, 384)]
    results, good = {}, True
    for shape in shapes:
        found = {}
        for way in WAYS:
            torch.compiler.reset()
            found[way] = milliseconds(way, shape, dry)
            torch.cuda.empty_cache()
        results["x".join(map(str, shape))] = found
        cells = " | ".join(f"{ms:.3f} ({mib:.0f} MiB)" for ms, mib in found.values())
        print(f"| {', '.join(map(str, shape))} | {cells} |", flush=True)
        B, T, C = shape
        tera = 3 * B * T * T * C / found["fused, as trained"][0] / 1e9
        print(f"as trained, {shape}: {tera:.0f} TFLOP/s of 3 B T^2 C", flush=True)
    if not dry:
        ours = results["x".join(map(str, shapes[0]))]
        for way, bar in BARS.items():
            ratio = ours[way][0] / ours["fused, as trained"][0]
            good &= ratio >= bar
            verdict = "" if ratio >= bar else f": FAILED, required {bar:g}"
            print(f"{ratio:.1f} times as fast as {way} at {shapes[0]}{verdict}")
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ms_and_mib": results}))
    return good


def page(folder: Path) -> bool:
    """Write folder/gpu.md: the result of each step, and the tables and last lines of the logs."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = [f"# {card}, torch {torch.__version__}", "", "| step | result | seconds |", "|---|---|---|"]
    steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    lines += [f"| {name} | {result.replace('|', '/')} | {seconds} |" for name, result, seconds in steps]
    for name, _, _ in steps:
        log = folder / f"{name}.log"
        if not log.exists():
            continue
        said = [line for line in log.read_text(errors="replace").splitlines()[1:] if line.strip()]
        shown = [line for line in said if line.startswith("|")]
        if shown:
            shown += ["", *(line for line in said[-4:] if not line.startswith(("|", "{")))]
        else:
            shown = ["```", *said[-12:], "```"]
        lines += ["", f"## {name}", "", *shown]
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")
    print(folder / "gpu.md")
    return True


def main() -> int:
    steps = {
        "build": build_it,
        "diagnosis": diagnose,
        "check": check,
        "small": small,
        "strips": strips,
        "time": time_all,
        "profile": profile,
        "page": page,
    }
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=steps)
    parser.add_argument("folder", nargs="?", type=Path, help="for page: the folder with the logs")
    parser.add_argument(
        "--dry", action="store_true", help="check no numbers: for an emulated GPU that computes nothing"
    )
    args = parser.parse_args()
    if (args.step == "page") != (args.folder is not None):
        parser.error("the folder of the logs is required for page, and only for page")
    if args.dry:
        ops.check_cuda = lambda: ""  # it would fail on a GPU that computes nothing
    if args.step != "page" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no GPU here", file=sys.stderr)
        return 2
    arguments = {"check": (args.dry,), "time": (args.dry,), "diagnosis": (args.dry,), "page": (args.folder,)}.get(
        args.step, ()
    )
    return 0 if steps[args.step](*arguments) else 1


if __name__ == "__main__":
    sys.exit(main())
