"""Show which implementation of the dispersion loss runs here and why, and test that it computes the right values.

    python -m minidisp.ops

Builds the extension if necessary. Exit code 0, or 1 if a self-test failed.
"""

import itertools
import math
import platform
import shlex
import shutil
import sys
from argparse import RawDescriptionHelpFormatter

import torch
from torch import Tensor

from minidisp.dispersion import VARIANTS, DispersionLoss, dispersion_loss
from minidisp.ops import TRY_AGAIN, build, dispersion, registered
from minidisp.ops.streamed import float32_precision
from minidisp.runtime.cli import Parser, exit_code, take_over

# Tolerances: of the loss, relative to 1 + |loss|, and of the gradient, relative to its norm.
EXACT, TENSOR_CORES, STEEP = (1e-5, 1e-5), (1e-4, 2e-3), (1e-5, 3e-4)
SMALL_TAU = 1e-3  # uses STEEP, since 1 / (pi tau) multiplies the error of a cosine
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 6e-3, torch.float16: 8e-4}  # of the gradient, which has z's dtype


def self_test(impl: str, device: str) -> tuple[str, bool]:
    """One line with the errors of fused or streamed per dtype, and whether they are within the tolerances.

    The expected values are computed on the CPU in float64, by the reference, or by the streamed implementation where
    the reference would need too much memory. Fused is tested at two float32 matmul precisions: "highest", and "high",
    which allows tensor cores and AMX tiles, and which train.py uses on a GPU. Running twice on the same input must give
    the same bits. On a GPU, fused includes the cross-entropy operator.
    """
    fused_on_gpu = impl == "fused" and torch.device(device).type == "cuda"
    # Several tiles and groups of features; with features that can and cannot be read 16 bytes at a time.
    cases = [(shape, tau) for shape in ((1, 150, 200), (2, 270, 33)) for tau in (1.0, SMALL_TAU)]
    if fused_on_gpu:
        cases.append(((1, 4200, 96), 1.0))  # computed blockwise
    shares = dict.fromkeys(ROUNDING, 0.0)  # the largest errors, relative to the tolerance
    repeats = True
    for shape, tau in cases:
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()  # exact in all dtypes
        for variant in dispersion.FUSED_VARIANTS if impl == "fused" else dispersion.STREAMED_VARIANTS:
            if tau < 1 and variant not in ("angular_spread", "l2_repel"):
                continue  # has no tau, or a zero gradient at this one
            exact = z.double().requires_grad_()
            truth = dispersion_loss(exact, variant, tau, impl="reference" if shape[1] < 1000 else "streamed")
            (gradient,) = torch.autograd.grad(truth, exact)
            for dtype, precision in itertools.product(
                ROUNDING, ("highest", "high") if impl == "fused" else ("highest",)
            ):
                with float32_precision(precision):
                    loss, grad = _loss_and_gradient(impl, z.to(device, dtype), variant, tau)
                    again = _loss_and_gradient(impl, z.to(device, dtype), variant, tau)
                repeats &= torch.equal(loss, again[0]) and torch.equal(grad, again[1])
                of_loss, of_grad = STEEP if tau < 1 else EXACT
                if precision == "high" and tau == 1 and variant != "l2_repel":
                    of_loss, of_grad = TENSOR_CORES
                errors = (
                    ((loss - truth).abs() / (1 + truth.abs())).item() / of_loss,
                    ((grad - gradient).norm() / gradient.norm()).item() / (of_grad + ROUNDING[dtype]),
                )
                shares[dtype] = max(shares[dtype], *(e if math.isfinite(e) else math.inf for e in errors))
    if fused_on_gpu:
        for dtype, share in cross_entropy_errors(device).items():
            shares[dtype] = max(shares[dtype], share)
    passed = repeats and max(shares.values()) < 1
    found = ", ".join(f"{str(dtype).removeprefix('torch.')} {share:.0%}" for dtype, share in shares.items())
    text = f"self-test of {impl}: largest error relative to the tolerance, {found}"
    text += "" if repeats else "; the same input gives different results"
    return f"{text}: {'passed' if passed else 'FAILED'}", passed


def cross_entropy_errors(device: str) -> dict[torch.dtype, float]:
    """The error of the cross-entropy operator per dtype, relative to the tolerance."""
    shares = {}
    for dtype, columns in itertools.product(ROUNDING, (5000, 4999)):  # rows of whole 16-byte units, or not
        logits = 3 * torch.randn(40, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
        targets = torch.arange(-1, 39) * 101 % columns
        targets[3] = -1
        exact = logits[:, :columns].double().requires_grad_()
        truth = torch.nn.functional.cross_entropy(exact, targets, reduction="sum", ignore_index=-1)
        (gradient,) = torch.autograd.grad(truth, exact)
        own = logits.to(device, dtype)[:, :columns]
        loss = torch.ops.minidisp.cross_entropy_(own, targets.to(device), -1, True).cpu().double().sum()
        errors = (
            ((loss - truth).abs() / (1 + truth.abs())).item() / EXACT[0],
            ((own.cpu().double() - gradient).norm() / gradient.norm()).item() / (EXACT[1] + ROUNDING[dtype]),
        )
        shares[dtype] = max(shares.get(dtype, 0.0), *(e if math.isfinite(e) else math.inf for e in errors))
    return shares


def _loss_and_gradient(impl: str, z: Tensor, variant: str, tau: float) -> tuple[Tensor, Tensor]:
    """Both on the CPU, in float64."""
    z.requires_grad_()
    loss = dispersion.run(impl, z, variant, tau, 0.25, 1e-2)
    scale = 2**16 * tau  # otherwise float16 would underflow
    (grad,) = torch.autograd.grad(scale * loss, z)
    return loss.detach().cpu().double(), grad.cpu().double() / scale


def diagnosis() -> tuple[str, bool]:
    """The output of python -m minidisp.ops, and whether the self-tests passed. Builds the extension if necessary."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU visible"
    lines = [
        f"torch     {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        f"CUDA      torch {torch.version.cuda or 'without'}, nvcc {shutil.which('nvcc') or 'none'}, {gpu}",
        f"compiler  {shlex.join(build.compiler()) or 'none'}",
    ]
    passed = True
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        in_words: dict[str, list[str]] = {}
        for variant in VARIANTS:
            in_words.setdefault(DispersionLoss(variant).prepare(device, torch.float32), []).append(variant)
        in_words.setdefault(DispersionLoss().prepare(device, torch.float64), []).append("any in float64")
        lines += [f"{device:9s} {', '.join(variants)}: {words}" for words, variants in in_words.items()]
        has_fused = not registered(device)
        for impl in ("fused", "streamed") if has_fused else ("streamed",):
            text, good = self_test(impl, device)
            passed &= good
            lines.append(f"{device:9s} {text}")
    found = build.find_or_build("cpu")
    lines.append(f"extension {f'{found.about}: {found.path}' if found.path else 'none'}{found.note}")
    return "\n".join(lines), passed


def check(device: str) -> int:
    """Self-test the CUDA kernels; returns the exit code, TRY_AGAIN if the GPU is in use or out of memory."""
    try:
        torch.cuda.set_device(device)
        build.find()
        text, good = self_test("fused", device)
    except (RuntimeError, MemoryError) as error:
        transient = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
            words in str(error).lower()
            for words in ("out of memory", "busy or unavailable", "devices are busy", "in use")
        )
        if not transient:
            raise
        print(build.first_line(error))
        return TRY_AGAIN
    print(text)
    return 0 if good else 1


def main() -> int:
    if sys.argv[1:2] == ["check"]:  # in the child process of ops.check_cuda
        take_over()
        return check(sys.argv[2])
    good = True

    def command() -> None:
        nonlocal good
        Parser(
            "-m minidisp.ops",
            usage="python -m minidisp.ops",
            description=__doc__,
            formatter_class=RawDescriptionHelpFormatter,
        ).parse_args()
        text, good = diagnosis()
        print(text)

    return exit_code("minidisp.ops", command) or (0 if good else 1)


if __name__ == "__main__":
    sys.exit(main())
