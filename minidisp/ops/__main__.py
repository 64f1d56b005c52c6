"""Which implementation of the dispersion loss runs here, why, and whether it computes what it should.

    python -m minidisp.ops

Builds the extension, if need be. Exit code 0, or 1 if a self-test failed.
"""

import math
import platform
import shlex
import shutil
import sys
from pathlib import Path

import torch

from minidisp import ops
from minidisp.dispersion import VARIANTS, DispersionLoss, dispersion_loss
from minidisp.ops import build
from minidisp.runtime.cli import make_printable

# The largest error that passes: of the loss, and of the gradient relative to its norm, which z's own type rounds.
SELF_TEST_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def self_test(impl: str, device: str) -> tuple[str, bool]:
    """One line with the errors of fused or streamed per dtype, and whether they are small enough.

    The truth is, in float64, the streamed implementation for fused, and the reference for streamed.
    """
    shapes = [(2, 150, 40), (3, 270, 33)]  # several tiles; features that can be read in place, and that cannot
    if torch.device(device).type == "cuda" and impl == "fused":
        shapes.append((1, 6000, 8))  # in strips
    texts, all_passed = [], True
    for dtype, tolerance in SELF_TEST_TOLERANCE.items():
        found = []
        for shape in shapes:
            z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            for variant in ops.FUSED_VARIANTS if impl == "fused" else ops.STREAMED_VARIANTS:
                exact = z.double().requires_grad_()
                truth = dispersion_loss(exact, variant, impl="streamed" if impl == "fused" else "reference")
                truth.backward()
                x = z.clone().requires_grad_()
                loss = ops.dispersion(impl, x, variant, 1.0, 0.25, 1e-2)
                (2**16 * loss).backward()  # scaled, or float16 would underflow
                found.append((loss - truth).abs().item())
                found.append(((x.grad.double() / 2**16 - exact.grad).norm() / exact.grad.norm()).item())
        passed = all(error < tolerance for error in found)  # NaN does not
        all_passed &= passed
        worst = max(error if error == error else math.inf for error in found)
        texts.append(f"{str(dtype).removeprefix('torch.')} {worst:.0e}")
    return f"self-test of {impl}: errors {', '.join(texts)}: {'passed' if all_passed else 'FAILED'}", all_passed


def diagnosis() -> tuple[str, bool]:
    """What python -m minidisp.ops prints, and whether the self-tests passed. Builds the extension, if need be."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU visible"
    lines = [
        f"torch     {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        f"CUDA      torch {torch.version.cuda or 'without'}, nvcc {shutil.which('nvcc') or 'none'}, {gpu}",
        f"compiler  {shlex.join(build.compiler()) or 'none'}, ninja {build.ninja() or 'none'}",
    ]
    passed = True
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        in_words: dict[str, list[str]] = {}
        for variant in VARIANTS:
            in_words.setdefault(DispersionLoss(variant).prepare(device, torch.float32), []).append(variant)
        in_words.setdefault(DispersionLoss().prepare(device, torch.float64), []).append("any in float64")
        lines += [f"{device:9s} {', '.join(variants)}: {words}" for words, variants in in_words.items()]
        has_fused = not ops.find_or_build(device)
        for impl in ("fused", "streamed") if has_fused else ("streamed",):
            text, good = self_test(impl, device)
            passed &= good
            lines.append(f"{device:9s} {text}")
    found = build.find_or_build("cpu")
    lines.append(f"extension {f'{found.about}: {found.path}' if found.path else 'none'}{found.note}")
    return "\n".join(lines), passed


def main() -> int:
    make_printable()
    if sys.argv[1:2] == ["compile"]:  # in a process of its own, which build.py starts
        build.compile_into(Path(sys.argv[2]))
        return 0
    if sys.argv[1:2] == ["check"]:  # the CUDA kernels; likewise, ops.check_cuda
        torch.cuda.set_device(sys.argv[2])
        build.find()
        ops.register_fused()
        text, good = self_test("fused", sys.argv[2])
    elif sys.argv[1:]:
        print(__doc__)
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    else:
        text, good = diagnosis()
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
