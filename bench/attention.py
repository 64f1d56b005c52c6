"""Speed of causal attention on the CPU: minidisp's operator against torch's scaled_dot_product_attention.

    python bench/attention.py [--threads 1] [--shapes 12x4x64x32,...] [--dtypes float32,bfloat16] [--seconds 4]

Shapes are B x H x T x D. Both implementations are first verified against float64, output and gradient. Their timings
are interleaved, round by round in one process, since machines are shared and clock rates vary; both start from one
tensor (B, T, 3 H D) and end with its gradient, as in a model. The speedup of the operator is the ratio of the median
times. GFLOP/s count T (T + 1) D multiply-adds per head in the forward pass, and 2.5 times as many in the backward pass.
The peak memory is what a step needs beyond input, output and gradients, measured in a child process. "instructions" is
the instruction set that the operator used; MINIDISP_CPU=baseline|avx2|avx512|amx limits it. Prints a table, then one
JSON line.
"""

import os
import sys

# Before other imports: a folder beside this file, such as a corpus named email, must not be imported as a module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

from minidisp.ops import attention, registered
from minidisp.runtime.device import cpu_model, resident_peak_kib

SHAPES = "12x4x64x32,8x6x256x32,16x6x256x64,2x12x1024x64,4x12x256x64"
MOST_ERROR = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # relative to the norm
FORMS = ("torch", "operator")


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, H, T, D = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, T, 3 * H * D, generator=generator, dtype=dtype).requires_grad_()
    return qkv, torch.randn(B, T, H * D, generator=generator, dtype=dtype)


def compute(form: str, qkv: Tensor, H: int) -> Tensor:
    if form == "operator":
        return torch.ops.minidisp.causal_attention(qkv, H, H)[0]
    return attention.torch_attention(qkv, H, H)


def verify(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, list[float]]:
    """Errors of output and gradient of each implementation; exits if one is too large."""
    H = shape[1]
    qkv, grad = inputs(shape, dtype)
    exact = qkv.detach().double().requires_grad_()
    truth = compute("torch", exact, H)
    truth.backward(grad.double())
    errors = {}
    for form in FORMS:
        qkv.grad = None
        out = compute(form, qkv, H)
        out.backward(grad)
        pairs = ((out, truth), (qkv.grad, exact.grad))
        errors[form] = [((x.double() - y).norm() / y.norm()).item() for x, y in pairs]
        if not max(errors[form]) < MOST_ERROR[dtype]:
            raise SystemExit(f"{form} is wrong at {shape} in {dtype}: relative error {max(errors[form]):.1e}")
    return errors


def peak_mem_mib(form: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> float:
    command = [sys.executable, __file__, "--peak-of", form, "--shapes", "x".join(map(str, shape))]
    command += ["--dtypes", str(dtype).removeprefix("torch."), "--threads", str(torch.get_num_threads())]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(form: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """In a child process: the growth of the peak resident memory in one step."""
    registered("cpu")
    small, grad = inputs((1, 1, 8, 8), dtype)
    compute(form, small, 1).backward(grad)
    qkv, grad = inputs(shape, dtype)
    before = resident_peak_kib()
    compute(form, qkv, shape[1]).backward(grad)
    print((resident_peak_kib() - before) / 1024 - (qkv.nbytes + grad.nbytes) / 2**20)


def measure(shape: tuple[int, int, int, int], dtype: torch.dtype, seconds: float) -> dict:
    B, H, T, D = shape
    errors = verify(shape, dtype)
    qkv, grad = inputs(shape, dtype)
    times_ms: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times_ms["torch"]) < 7:
        for form in FORMS:
            qkv.grad = None
            start = time.perf_counter()
            out = compute(form, qkv, H)
            middle = time.perf_counter()
            out.backward(grad)
            times_ms[form].append((1000 * (middle - start), 1000 * (time.perf_counter() - middle)))
    median_ms = {}
    for form, times in times_ms.items():
        parts = [*zip(*times[2:], strict=True), [sum(pair) for pair in times[2:]]]  # the first two are warm-up
        median_ms[form] = dict(zip(("forward", "backward", "both"), map(statistics.median, parts), strict=True))
    ours = median_ms["operator"]
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": len(times_ms["torch"]) - 2,
        "median_ms": median_ms,
        "ratio": {part: median_ms["torch"][part] / ours[part] for part in ours},
        "gflops": 7 * B * H * T * (T + 1) * D / ours["both"] / 1e6,
        "errors": errors,
        "peak_mem_mib": {form: peak_mem_mib(form, shape, dtype) for form in FORMS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench/attention.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", default=SHAPES, help="B x H x T x D, such as 8x6x256x32, separated by commas")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--seconds", type=float, default=4.0, help="timing per shape and dtype")
    parser.add_argument("--peak-of", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [tuple(int(n) for n in text.split("x")) for text in args.shapes.split(",")]
    dtypes = [getattr(torch, name) for name in args.dtypes.split(",")]
    if args.peak_of:
        print_peak(args.peak_of, shapes[0], dtypes[0])
        return
    if missing := registered("cpu"):
        raise SystemExit(f"the operator is not available: {missing}")

    instructions = torch.ops.minidisp.instruction_set()
    where = f"{cpu_model()}, {args.threads} threads"
    print(f"causal attention on {where}, torch {torch.__version__}; instructions: {instructions}")
    print("ms with torch -> with the operator (speedup)\n")
    print("| (B, H, T, D) | dtype | forward | backward | both | GFLOP/s | error, torch's | MiB, torch's | used |")
    print("|---|---|---|---|---|---|---|---|---|")
    results = []
    for shape in shapes:
        for dtype in dtypes:
            result = measure(shape, dtype, args.seconds)
            results.append(result)
            theirs, ours, ratio = result["median_ms"]["torch"], result["median_ms"]["operator"], result["ratio"]
            cells = [f"{theirs[part]:.2f} -> {ours[part]:.2f} ({ratio[part]:.2f}x)" for part in ours]
            error, memory = result["errors"], result["peak_mem_mib"]
            taken = {"fused": "operator"}.get(attention.choose(dtype, "cpu", shape[3])[0], "torch")
            print(
                f"| {', '.join(map(str, shape))} | {result['dtype']} | {' | '.join(cells)} | {result['gflops']:.0f} | "
                f"{max(error['operator']):.1e}, {max(error['torch']):.1e} | "
                f"{memory['operator']:.0f}, {memory['torch']:.0f} | {taken} |",
                flush=True,
            )
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    print(
        json.dumps(
            {
                "device": where,
                "instructions": instructions,
                "cpus": os.cpu_count(),
                "torch": torch.__version__,
                "commit": git.stdout.strip(),
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
