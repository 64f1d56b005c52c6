"""csrc/dispersion_cuda.cu without a GPU: it compiles, and its kernels and launchers, emulated on the CPU, compute what they should.

What runs on a GPU is in test_ops.py.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from test_dispersion import CASES, randn
from test_ops import value_and_gradient

from minidisp import ops

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "dispersion_cuda.cu"
INCLUDE = Path(torch.__file__).parent / "include"
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
ROUNDING = {torch.float32: 5e-7, torch.bfloat16: 2**-9, torch.float16: 2**-12}
TILED = ("angular_spread", "orthogonalization")  # in 16 bit by the tensor-core kernel
DEFAULTS = {"tau": 1.0, "clamp": 0.25, "eps": 1e-2}
RUNS = [(variant, dtype) for variant in TILED for dtype in DTYPES]
RUNS += [("l2_repel", torch.float32), ("l2_repel", torch.bfloat16), ("decorrelation", torch.float16)]  # all types alike
every_run = pytest.mark.parametrize(("variant", "dtype"), RUNS)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_compiles_without_spilling_registers(architecture, tmp_path):
    generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"  # all that torch without CUDA lacks
    generated.parent.mkdir(parents=True)
    generated.touch()
    command = [
        "nvcc",
        "-cubin",
        f"-arch={architecture}",
        *ops.build.NVCC_FLAGS,
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
    ]
    command += ["-isystem", str(INCLUDE), "-I", str(tmp_path), str(SOURCE), "-o", str(tmp_path / "kernels.cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill", result.stderr)
    assert len(spills) > 20
    assert set(spills) == {"0"}


@pytest.fixture(scope="module")
def emulated():
    if not shutil.which("c++") or sys.platform != "linux":
        pytest.skip("the emulator needs a C++ compiler on Linux")
    from torch.utils import cpp_extension

    path = os.environ["PATH"]
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])  # ninja
    try:
        cpp_extension.load(
            "minidisp_cuda_emulator",
            [str(ROOT / "tests" / "cuda_emulator.cpp")],
            extra_cflags=["-O1", "-std=c++20", "-U_FORTIFY_SOURCE"],  # which forbids to jump between stacks
            is_python_module=False,
        )
    finally:
        os.environ["PATH"] = path

    def run(z, variant, need_grad=True, workspace=(), schedule=0, **options):
        torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
        try:
            options = DEFAULTS | options
            return torch.ops.minidisp_emulator.dispersion(
                z, variant, options["tau"], options["clamp"], options["eps"], need_grad, workspace, schedule
            )
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def assert_close_to_the_truth(result, z, variant, floor=0.0, **options):
    """Both errors against float64 at most twice those of the plain PyTorch version, whose gradient comes in z's type."""
    value, gradient = value_and_gradient(z.double(), variant, "reference", **options)
    plain_value, plain_gradient = value_and_gradient(z, variant, "reference", **options)
    norm = gradient.norm() or 1.0
    assert abs(result[0].item() - value) <= max(2 * abs(plain_value - value), 3e-7 * (1 + abs(value)))
    plain_error = ((plain_gradient.double() - gradient).norm() / norm).item()
    error = ((result[1].to(z.dtype).double() - gradient).norm() / norm).item()
    assert error <= max(2 * plain_error, ROUNDING[z.dtype], floor)


@every_run
@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 129, 40), (1, 260, 17), (1, 31, 200)])
def test_sizes(emulated, variant, dtype, shape):
    B, _, C = shape
    for spread in (1.0, 0.05):  # 0.05: nearly parallel
        z = (randn(B, 1, C, seed=1) * (spread < 1) + spread * randn(*shape)).to(dtype)
        assert_close_to_the_truth(emulated(z, variant), z, variant)


@every_run
@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(emulated, variant, dtype, case):
    z = CASES[case].to(dtype)
    for tau in (1.0, 1e-3):  # with the smaller one the shift has to be found
        loss, gradient = emulated(z, variant, tau=tau, clamp=0.1)
        exact = torch.from_numpy(oracle.gradient(z.double().numpy(), variant, tau, 0.1))
        plain_value, plain = value_and_gradient(z.float(), variant, "reference", tau=tau, clamp=0.1)
        value = oracle.loss(z.double().numpy(), variant, tau, 0.1)
        assert abs(loss.item() - value) <= max(2 * abs(plain_value - value), 3e-7 * (1 + abs(value)))
        if exact.norm() > 1e-6 / (0.01 + z.double().norm(dim=-1).max()):  # else it is the rounding of terms that cancel
            error = (gradient.double() - exact).norm() / exact.norm()
            cancels = 4 if case == "antipodal" else 1  # then the rounding of the weights shows
            assert error <= 2 * (plain.double() - exact).norm() / exact.norm() + 2 * cancels * ROUNDING[dtype]


@every_run
def test_groups_strips_and_blocks(emulated, variant, dtype):
    """Workspaces that hold next to nothing: one sequence, a strip of one tile, blocks of a few rows and columns."""
    tile, much = 128 * 128 * 2, 1 << 20
    for B, T, tau, *workspace in (
        (3, 130, 1.0, 2 * 4 * tile, much, 4 * 2 * 130 * 128, much, much, much, 8192),  # two sequences, then the third
        (1, 300, 1e-3, 6 * tile, much, 4 * 50 * 300, 4 * 8 * 300, 8 * 9 * 300, much, 8192),  # strips of a tile
        (1, 300, 1.0, 12 * tile, much, 4 * 77 * 200, much, much, much, 200),  # strips of two; rows in two pieces
        (
            2,
            150,
            1e-3,
            4 * tile,
            much,
            4 * 13 * 60,
            4 * 8 * 73,
            8 * 9 * 73,
            8 * 9 * 59,
            60,
        ),  # blocks that copy their tokens
    ):
        z = randn(B, T, 8).to(dtype)
        assert_close_to_the_truth(emulated(z, variant, tau=tau, workspace=workspace), z, variant, tau=tau)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("variant", TILED)
def test_any_order_of_warps_and_copies_gives_the_same_bits(emulated, variant, dtype):
    z = randn(2, 140, 104).to(dtype)
    loss, gradient = emulated(z, variant)
    for schedule in range(1, 4):
        again, gradient_again = emulated(z, variant, schedule=schedule)
        assert again == loss
        assert torch.equal(gradient_again, gradient)


@every_run
def test_without_gradient(emulated, variant, dtype):
    z = randn(2, 140, 24).to(dtype)
    loss, gradient = emulated(z, variant, need_grad=False)
    assert loss == emulated(z, variant)[0]
    assert gradient.shape == (0,)


@every_run
def test_strides(emulated, variant, dtype):
    base = randn(2, 34, 144).to(dtype)
    views = (
        base.mT[:, ::2], base[:, :, ::3], base.flip(1).transpose(0, 1), base[:, :1].expand(2, 9, 144),
        base[:1].expand(3, 34, 144), base[:, :, 8:48], base[:, :, 1:41], base[:, ::2],
    )  # fmt: skip
    for z in views:
        loss, gradient = emulated(z, variant)
        plain_loss, plain_gradient = emulated(z.contiguous(), variant)
        assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
        torch.testing.assert_close(gradient, plain_gradient, rtol=1e-5, atol=1e-8)


@every_run
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_gives_nan(emulated, variant, dtype, bad):
    for tau in (1.0, 1e-3):
        z = randn(2, 40, 8).to(dtype)
        z[1, 38, 3] = bad
        loss, gradient = emulated(z, variant, tau=tau)
        assert loss.isnan()
        assert gradient[1].isnan().all()
        assert gradient[0].isfinite().all()


@pytest.mark.parametrize("variant", TILED)
@pytest.mark.parametrize("eps", [1e-2, 1e-8, 0.0])
def test_float16_neither_overflows_nor_vanishes(emulated, variant, eps):
    """Norms from 1e-3 to 1e5, and zero tokens; clamps that let the slope grow."""
    size = torch.logspace(-3, 4, 40, dtype=torch.float64).view(1, 40, 1)
    z = randn(1, 40, 24) * size
    z[0, 7] = 0
    for part in (z, z[:, :10], z[:, 30:]):
        for clamp in (0.25, 0.01, 1e-5):
            options = {"eps": eps, "clamp": clamp}
            half = part.half()
            loss, gradient = emulated(half, variant, **options)
            value, exact = value_and_gradient(half.double(), variant, "reference", **options)
            _, plain = value_and_gradient(half.float(), variant, "reference", **options)
            assert loss.item() == pytest.approx(value, rel=1e-6, abs=1e-6)
            # Token by token, as the gradients differ by the same factor as the norms.
            norm = exact.norm(dim=-1).clamp(min=1e-12)
            assert ((gradient - exact).norm(dim=-1) / norm <= 2 * (plain - exact).norm(dim=-1) / norm + 1e-2).all()


def test_refuses_what_it_cannot_do(emulated):
    for z in (torch.ones(3, 4), torch.ones(1, 1, 4), torch.ones(1, 3, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"dispersion takes|z must be"):
            emulated(z, "angular_spread")
    with pytest.raises(ValueError, match="mean_cosine"):
        emulated(torch.ones(1, 3, 4), "mean_cosine")
