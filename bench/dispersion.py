"""Speed of the dispersion loss, forward and backward: plain, compiled by torch.compile, streamed and fused.

    python bench/dispersion.py --threads 1
    python bench/dispersion.py --variant l2_repel --shapes 16x128x256,4x1024x768 --device cuda --no-compile
    python bench/dispersion.py --precision high                       # as under autocast: uses AMX tiles if available
    python bench/dispersion.py --device cuda --precision highest      # without tensor cores; default: "high", as
    trained

Every implementation is first verified against float64. Timings are interleaved, round by round in one process, since
machines are shared and clock rates vary; ratios are those of medians.
GFLOP/s count 3 T^2 C per sequence (the products over half of the pairs, forward and backward), regardless of what an
implementation computes, and are compared with a product of square matrices timed in the same rounds. "block" is forward
and backward of a GPT-2 style block of the same shape: the share is what the fused loss on the block's output adds to
it. "2 threads" is the speedup of two threads over one, timed in the same rounds (--threads 1 only). The peak memory is
what an implementation needs beyond z and its gradient, measured in a child process (CPU) or by the allocator (CUDA).
Prints a table, then one JSON line.
"""

import os
import sys

# Before other imports: a folder beside this file, such as a corpus named email, must not be imported as a module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from minidisp import InputError
from minidisp.dispersion import DispersionLoss, dispersion_loss
from minidisp.ops import registered
from minidisp.ops.dispersion import FUSED_VARIANTS, STREAMED_VARIANTS
from minidisp.runtime.cli import Parser, exit_code
from minidisp.runtime.device import resident_peak_kib

SHAPES = "16x128x256,8x256x384,4x1024x768,2x2048x768,1x1024x768"


class Block(nn.Module):
    """GPT-2 style: attention and an MLP of four times the width, pre-norm, no dropout."""

    def __init__(self, C: int):
        super().__init__()
        self.heads = C // 64 if C % 64 == 0 else 1
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn, self.attn_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_fc, self.mlp_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


def timed(function, synchronize) -> float:
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return 1000 * (time.perf_counter() - start)


def forms(variant: str, with_compile: bool, device: str) -> dict:
    """The implementations of the loss: name -> function of z."""
    chosen = {
        "eager": lambda z: dispersion_loss(z, variant, impl="reference"),
        "streamed": lambda z: dispersion_loss(z, variant, impl="streamed"),
    }
    if with_compile:
        # The reference form suits the compiler best: clamp and arccos become one kernel between two products.
        chosen["compiled"] = torch.compile(chosen["eager"], dynamic=False)
    if variant in FUSED_VARIANTS and not registered(device):
        chosen["fused"] = lambda z: dispersion_loss(z, variant, impl="fused")
    return chosen


def step(function, z: Tensor) -> Tensor:
    z.grad = None
    loss = function(z)
    loss.backward()
    return loss


def verify(chosen: dict, z: Tensor, variant: str) -> None:
    exact = z.detach()[:1].double().requires_grad_()
    step(lambda z: dispersion_loss(z, variant, impl="reference"), exact)
    for name, function in chosen.items():
        small = z.detach()[:1].clone().requires_grad_()
        step(function, small)
        error = ((small.grad.double() - exact.grad).norm() / exact.grad.norm()).item()
        exact_products = torch.get_float32_matmul_precision() == "highest"
        if not error < (1e-5 if z.dtype == torch.float32 and exact_products else 1e-2):
            raise SystemExit(f"{name} is wrong at {tuple(z.shape)}: relative error of the gradient {error:.1e}")


def peak_mem_mib(name: str, variant: str, shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> float:
    """The memory that a step of an implementation needs beyond z and its gradient."""
    if device == "cuda":
        z = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(forms(variant, False, device)[name], z)
        return (torch.cuda.max_memory_allocated() - before - z.nbytes) / 2**20
    command = [sys.executable, __file__, "--peak-of", name, "--variant", variant, "--shapes", "x".join(map(str, shape))]
    command += ["--threads", str(torch.get_num_threads()), "--dtype", str(dtype).removeprefix("torch.")]
    command += ["--precision", torch.get_float32_matmul_precision()]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(name: str, variant: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """In a child process: the growth of the peak resident memory in one step."""
    function = forms(variant, False, "cpu")[name]
    step(function, torch.randn(1, 33, 8, dtype=dtype, requires_grad=True))
    z = torch.randn(shape, dtype=dtype, requires_grad=True)
    before = resident_peak_kib()
    step(function, z)
    print((resident_peak_kib() - before) / 1024 - z.nbytes / 2**20)


def measure(shape: tuple[int, int, int], args) -> dict:
    B, T, C = shape
    dtype = getattr(torch, args.dtype)  # of z
    products = torch.bfloat16 if args.device == "cuda" else torch.float32  # of the block and of the matrix product
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    torch.compiler.reset()
    torch.manual_seed(0)
    z = torch.randn(shape, device=args.device).to(dtype).requires_grad_()
    chosen = forms(args.variant, args.compile, args.device)
    verify(chosen, z, args.variant)
    n = 1024 if args.device == "cpu" else 8192
    left, right = torch.randn(2, n, n, device=args.device, dtype=products)
    product = torch.empty(n, n, device=args.device, dtype=products)
    block = Block(C).to(args.device, products)
    x = torch.randn(shape, device=args.device, dtype=products).requires_grad_()
    runs = {name: (lambda function=function: step(function, z)) for name, function in chosen.items()}
    runs["block"] = lambda: torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    runs["gemm"] = lambda: torch.mm(left, right, out=product)
    best = "fused" if "fused" in chosen else "streamed"
    if args.device == "cpu" and args.threads == 1 and os.cpu_count() > 1:
        runs["2 threads"] = runs[best]

    for run in runs.values():
        run()
    times_ms: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + args.seconds
    while time.monotonic() < end or len(times_ms["gemm"]) < 5:
        for name, run in runs.items():
            if name == "2 threads":
                torch.set_num_threads(2)
                run()  # wakes up the second thread
            times_ms[name].append(timed(run, synchronize))
            torch.set_num_threads(args.threads)
    median_ms = {name: statistics.median(times) for name, times in times_ms.items()}
    quintiles = {name: statistics.quantiles(times, n=5) for name, times in times_ms.items()}

    gflops = {name: 3 * B * T * T * C / median_ms[name] / 1e6 for name in chosen}
    return {
        "shape": shape,
        "rounds": len(times_ms["gemm"]),
        "median_ms": median_ms,
        "p20_ms": {name: q[0] for name, q in quintiles.items()},
        "p80_ms": {name: q[-1] for name, q in quintiles.items()},
        "best": best,
        "gflops": gflops,
        "gemm_gflops": 2 * n**3 / median_ms["gemm"] / 1e6,
        "speedup_2_threads": median_ms[best] / median_ms["2 threads"] if "2 threads" in runs else None,
        "share_of_block": median_ms[best] / median_ms["block"],
        "peak_mem_mib": {
            n: peak_mem_mib(n, args.variant, shape, args.device, dtype) for n in chosen if n != "compiled"
        },
    }


def read_shapes(text: str) -> list[tuple[int, int, int]]:
    try:
        shapes = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    except ValueError:
        shapes = []
    if not shapes or not all(len(shape) == 3 and min(shape) >= 1 and min(shape[1:]) >= 2 for shape in shapes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of shapes (B, T, C) such as 16x128x256,4x1024x768")
    return shapes


def main() -> None:
    parser = Parser(
        prog="bench/dispersion.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", choices=STREAMED_VARIANTS, default="angular_spread")
    parser.add_argument(
        "--shapes", type=read_shapes, default=SHAPES, help="B x T x C, such as 4x1024x768, separated by commas"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of z")
    words = "float32 matmul precision (default: high on CUDA, highest on a CPU)"
    parser.add_argument("--precision", choices=("highest", "high"), help=words)
    parser.add_argument("--seconds", type=float, default=6.0, help="timing per shape")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision or ("high" if args.device == "cuda" else "highest"))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here")
    if args.threads < 1:
        raise InputError(f"--threads must be at least 1, not {args.threads}")
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print_peak(args.peak_of, args.variant, args.shapes[0], getattr(torch, args.dtype))
        return

    where = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU, {args.threads} threads"
    )
    print(f"{args.variant} on {where}, torch {torch.__version__}; {DispersionLoss(args.variant).prepare(args.device)}")
    print("forward and backward in ms (speedup of fused, or of streamed if fused is not available)\n")
    columns = ("(B, T, C)", "eager", "torch.compile", "streamed", "fused", "2 threads", "GFLOP/s")
    columns += ("of the matrix product", "of a block", "MiB")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    results = []
    for shape in args.shapes:
        result = measure(shape, args)
        results.append(result)
        ms, best = result["median_ms"], result["best"]
        cells = [
            f"{ms[name]:.2f}" + (f" ({ms[name] / ms[best]:.1f}x)" if name != best else "") if name in ms else "-"
            for name in ("eager", "compiled", "streamed", "fused")
        ]
        memory = ", ".join(f"{name} {mib:.0f}" for name, mib in result["peak_mem_mib"].items())
        speedup = result["speedup_2_threads"]
        rate, peak = result["gflops"][best], result["gemm_gflops"]
        cells += [f"{speedup:.2f}x" if speedup else "-", f"{rate:.0f}", f"{rate / peak:.0%}"]
        cells += [f"{result['share_of_block']:.1%}", memory]
        print(f"| {', '.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    print(json.dumps({"device": where, "torch": torch.__version__, "commit": git.stdout.strip(), "results": results}))


if __name__ == "__main__":
    sys.exit(exit_code("bench/dispersion.py", main))
