"""csrc/cuda without a GPU: the files compile, and their results, emulated on the CPU, are correct.

The tests that need a GPU are in test_ops.py.
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
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
KERNELS = [*SOURCES, ROOT / "csrc" / "cuda" / "block.h", *sorted((ROOT / "csrc" / "cuda").glob("dispersion_*.h"))]
BINDINGS = ROOT / "csrc" / "cuda" / "bindings.cpp"
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
ROUNDING = {torch.float32: 5e-7, torch.bfloat16: 2**-9, torch.float16: 2**-12}
TILED = ("angular_spread", "orthogonalization", "decorrelation")  # variants with a tensor-core kernel
TENSOR_CORE_LOSS, TENSOR_CORE_GRADIENT = 5e-4, 2e-3  # the largest errors stated in csrc/cuda/dispersion.cu
DEFAULTS = {"tau": 1.0, "clamp": 0.25, "eps": 1e-2}
RUNS = [(variant, dtype) for variant in TILED[:2] for dtype in DTYPES]
RUNS += [
    ("l2_repel", torch.float32),
    ("l2_repel", torch.bfloat16),
    ("decorrelation", torch.float16),
]  # same for all types
every_run = pytest.mark.parametrize(("variant", "dtype"), RUNS)


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")


@needs_nvcc
@pytest.mark.parametrize("architecture", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
@pytest.mark.parametrize(
    ("source", "least"),
    [(SOURCES[0], 3), pytest.param(SOURCES[1], 21, marks=pytest.mark.slow)],
    ids=lambda value: getattr(value, "stem", None),
)
def test_compiles_without_spilling_registers(source, least, architecture, tmp_path):
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
    command += [str(source), "-o", str(tmp_path / "kernels.cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill", result.stderr)
    assert len(spills) >= least
    assert set(spills) == {"0"}


@pytest.mark.slow
@needs_nvcc
def test_the_bindings_compile_as_on_first_use(tmp_path, monkeypatch):
    generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"  # everything that torch without CUDA lacks
    generated.parent.mkdir(parents=True)
    generated.touch()
    monkeypatch.setenv("CPATH", str(tmp_path))
    (unit,) = (unit for unit in ops.build.units(True, "all") if unit.source == BINDINGS)
    result = subprocess.run([*unit.command, "-o", str(tmp_path / "bindings.o")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


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
            extra_cflags=["-O1", "-std=c++20", "-U_FORTIFY_SOURCE"],  # it forbids jumps between stacks
            is_python_module=False,
        )
    finally:
        os.environ["PATH"] = path

    def run(z, variant, need_grad=True, exact=True, workspace=(), schedule=0, without="", fill=True, **options):
        """The loss and the gradient, the latter in float32, so that rounding to z's type hides no errors."""
        torch.use_deterministic_algorithms(fill)  # fills uninitialised memory with NaN
        try:
            options = DEFAULTS | options
            loss, product, state = torch.ops.minidisp_emulator.forward(
                z,
                variant,
                options["tau"],
                options["clamp"],
                options["eps"],
                need_grad,
                exact,
                workspace,
                schedule,
                without,
            )
            if not need_grad:
                assert state.shape == (0,)
                return loss, product
            wide = z if z.dtype == torch.float32 else z.float()
            return loss, torch.ops.minidisp_emulator.backward(torch.ones(()), wide, product, state, variant, schedule)
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def assert_close_to_the_truth(result, z, variant, floor=0.0, **options):
    """Both errors against float64 are at most twice those of plain PyTorch, whose gradient has z's type."""
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
    for tau in (1.0, 1e-3):  # the smaller one needs the search for the shift
        loss, gradient = emulated(z, variant, tau=tau, clamp=0.1)
        exact = torch.from_numpy(oracle.gradient(z.double().numpy(), variant, tau, 0.1))
        plain_value, plain = value_and_gradient(z.float(), variant, "reference", tau=tau, clamp=0.1)
        value = oracle.loss(z.double().numpy(), variant, tau, 0.1)
        assert abs(loss.item() - value) <= max(2 * abs(plain_value - value), 3e-7 * (1 + abs(value)))
        if exact.norm() > 1e-6 / (
            0.01 + z.double().norm(dim=-1).max()
        ):  # otherwise rounding errors of cancelling terms dominate
            error = (gradient.double() - exact).norm() / exact.norm()
            cancels = 4 if case == "antipodal" else 1  # then rounding errors of the weights dominate
            assert error <= 2 * (plain.double() - exact).norm() / exact.norm() + 2 * cancels * ROUNDING[dtype]


TILE, MUCH = 128 * 128 * 2, 1 << 20
WORKSPACES = {  # B, T, tau, workspace: all tiny
    "two sequences, then the third": (3, 130, 1.0, (2 * 4 * TILE, MUCH, 4 * 2 * 130 * 128, MUCH, 8192, 65535)),
    "strips of a tile": (1, 300, 1e-3, (6 * TILE, MUCH, 4 * 50 * 300, 4 * 8 * 300, 8192, 65535)),
    "strips of two; rows in two pieces": (1, 300, 1.0, (12 * TILE, MUCH, 4 * 77 * 200, MUCH, 200, 65535)),
    "blocks that copy their tokens": (2, 150, 1e-3, (4 * TILE, MUCH, 4 * 13 * 60, 4 * 8 * 73, 60, 65535)),
    "two matrices at once": (5, 9, 1.0, (MUCH, MUCH, MUCH, MUCH, 8192, 2)),
}


@every_run
@pytest.mark.parametrize("case", WORKSPACES)
def test_groups_strips_and_blocks(emulated, variant, dtype, case):
    B, T, tau, workspace = WORKSPACES[case]
    z = randn(B, T, 8).to(dtype)
    assert_close_to_the_truth(emulated(z, variant, tau=tau, workspace=workspace), z, variant, tau=tau)


# Tensor cores


def assert_within_tolerance(result, z, variant, **options):
    value, gradient = value_and_gradient(z.double(), variant, "reference", **options)
    assert abs(result[0].item() - value) <= TENSOR_CORE_LOSS * (1 + abs(value))
    assert ((result[1] - gradient).norm() / gradient.norm()).item() <= TENSOR_CORE_GRADIENT


@pytest.mark.parametrize("variant", TILED)
@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 129, 40), (1, 260, 17), (1, 31, 200), (1, 140, 770)])
def test_tensor_cores_stay_within_their_tolerance(emulated, variant, shape):
    B, T, C = shape
    for spread in (1.0, 1e-3, 0.1):  # 1e-3: nearly parallel
        z = (randn(B, 1, C, seed=1) * (spread < 1) + spread * randn(*shape)).float()
        assert_within_tolerance(emulated(z, variant, exact=False), z, variant)
    if T == 2:  # an opposite pair has no gradient
        return
    z[:, ::2] *= -1  # two opposite groups, so that the mean token is almost zero
    z[:, T // 2] = 3 * z[:, 0]
    assert_within_tolerance(emulated(z, variant, exact=False), z, variant)


@pytest.mark.parametrize("variant", TILED)
def test_tensor_cores_and_tight_groups_that_lie_apart(emulated, variant):
    """Groups of spread s, where centring does not help: an error of 2e-4 / s of a gradient that is as small as s."""
    for s in (1e-2, 1e-3):
        z = (randn(1, 1, 200, seed=1) + s * randn(1, 31, 200)).float()
        z[:, ::2] *= -1
        _, exact = value_and_gradient(z.double(), variant, "reference")
        _, gradient = emulated(z, variant, exact=False)
        assert ((gradient - exact).norm() / exact.norm()).item() <= 2e-4 / s


@pytest.mark.parametrize("dtype", HALVES)
def test_tensor_cores_at_the_smallest_tau_and_clamp(emulated, dtype):
    z = randn(1, 140, 64).to(dtype)
    for options in ({"tau": 0.05}, {"tau": 0.1, "clamp": 1e-4}, {"eps": 0.0}):
        assert_within_tolerance(emulated(z, "angular_spread", exact=False, **options), z, "angular_spread", **options)


@pytest.mark.parametrize("variant", TILED)
@pytest.mark.parametrize("case", [*list(WORKSPACES)[:3], "two matrices at once"])
def test_tensor_cores_in_groups_and_strips(emulated, variant, case):
    B, T, _, workspace = WORKSPACES[case]
    z = randn(B, T, 8).float()
    assert_within_tolerance(emulated(z, variant, exact=False, workspace=workspace), z, variant)


def test_what_tensor_cores_leave_to_the_exact_path(emulated):
    """Small tau, which enlarges errors of a cosine; sequences whose copies do not fit; l2_repel; and, of two variants,
    many tokens of few features."""
    z = randn(1, 70, 24).float()
    tight = (1 << 20, 100, 1 << 20, 1 << 20, 8192, 65535)
    for variant, options in (
        ("angular_spread", {"tau": 0.04}),
        ("angular_spread", {"workspace": tight}),
        ("l2_repel", {}),
        ("orthogonalization", {"z": randn(1, 70, 1).float()}),
        ("decorrelation", {"z": randn(1, 140, 2).float()}),
    ):
        z = options.pop("z", z)
        loss, gradient = emulated(z, variant, exact=False, **options)
        exact_loss, exact_gradient = emulated(z, variant, **options)
        assert loss == exact_loss
        assert torch.equal(gradient, exact_gradient)
    z = randn(1, 70, 24).float()
    assert not torch.equal(emulated(z, "angular_spread", exact=False)[1], emulated(z, "angular_spread")[1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", TILED)
def test_tensor_cores_meet_odd_tokens(emulated, variant, case):
    """Zero, equal and opposite tokens: finite, and within the tolerance of the oracle."""
    z = CASES[case].float()
    loss, gradient = emulated(z, variant, exact=False)
    value = oracle.loss(z.double().numpy(), variant, 1.0, 0.25)
    exact = torch.from_numpy(oracle.gradient(z.double().numpy(), variant, 1.0, 0.25))
    assert abs(loss.item() - value) <= TENSOR_CORE_LOSS * (1 + abs(value))
    # If the sum cancels, rounding errors of its terms remain.
    size = max(exact.norm().item(), 1e-2 / (0.01 + z.double().norm(dim=-1).min().item()) * (case != "random"))
    assert (gradient - exact).norm().item() <= TENSOR_CORE_GRADIENT * size
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_backward_rounds_once_and_applies_the_upstream_gradient(emulated, dtype):
    """Any strides, features that can and cannot be read 16 bytes at a time, and scaled upstream gradients."""
    for z in (
        randn(2, 20, 24).to(dtype),
        randn(2, 24, 20).to(dtype).mT,
        randn(2, 20, 13).to(dtype),
        randn(2, 20, 9).float(),
    ):
        for variant in ("angular_spread", "l2_repel", "decorrelation"):
            _, product, state = torch.ops.minidisp_emulator.forward(z, variant, 1.0, 0.25, 1e-2, True, False, [], 0, "")
            upstream = torch.tensor(65536.0)
            wide = torch.ops.minidisp_emulator.backward(upstream, z.float(), product, state, variant, 0)
            narrow = torch.ops.minidisp_emulator.backward(upstream, z, product, state, variant, 0)
            assert narrow.dtype == z.dtype
            torch.testing.assert_close(narrow.float(), wide.to(z.dtype).float(), rtol=1e-2, atol=1e-6)
            _, plain = emulated(z, variant, exact=False)
            torch.testing.assert_close(wide / 65536, plain, rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match="the results of the forward call"):
        torch.ops.minidisp_emulator.backward(upstream, z, product, state[1:], variant, 0)


# Orders of execution, and large offsets

PATHS = [("angular_spread", False), ("angular_spread", True), ("decorrelation", False), ("l2_repel", True)]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("variant", [*TILED, "l2_repel"])
def test_any_order_of_warps_and_copies_gives_the_same_bits(emulated, variant, exact):
    z = randn(2, 140, 104).float()
    loss, gradient = emulated(z, variant, exact=exact)
    for schedule in range(1, 4):
        again, gradient_again = emulated(z, variant, exact=exact, schedule=schedule)
        assert again == loss
        assert torch.equal(gradient_again, gradient)


BARRIERS = [
    f"{path.name}:{number}"
    for path in KERNELS
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if "__syncthreads();" in line
]
# T = 300: more tokens than threads in a block, so that every warp has something to add.
BARRIER_CASES = [
    ((1, 300, 8), "angular_spread", {"tau": 1e-3}),
    ((1, 70, 40), "l2_repel", {}),
    ((1, 140, 200), "angular_spread", {"exact": False}),
]


@pytest.fixture(scope="module")
def with_all_barriers(emulated):
    return [emulated(0.2 * randn(*shape).float(), variant, **options) for shape, variant, options in BARRIER_CASES]


@pytest.mark.parametrize("barrier", [name for name in BARRIERS if not name.startswith("cross_entropy")])
def test_no_barrier_can_be_left_out(emulated, with_all_barriers, barrier):
    """Without it, some order of the warps must give a different result."""
    for (shape, variant, options), (loss, gradient) in zip(BARRIER_CASES, with_all_barriers, strict=True):
        z = 0.2 * randn(*shape).float()
        for schedule in range(4 if "exact" in options else 2):
            found = emulated(z, variant, schedule=schedule, without=barrier, **options)
            if not (torch.equal(found[0], loss) and torch.equal(found[1], gradient)):
                return
    pytest.fail("nothing has changed")


@pytest.mark.parametrize(("variant", "exact"), PATHS)
def test_offsets_beyond_32_bits(emulated, variant, exact):
    """The last of 2^18 sequences of 2^13 numbers, 2^31 in total. Only what it needs is computed and allocated."""
    B, T, C = 2**18 + 1, 8, 1024
    z = randn(1, T, C).float()
    many = (0.02 * z if variant == "l2_repel" else z).expand(B, T, C)
    at_once = (2**31, 2**30, 2**26, 2**26, 8192, 65535)  # few groups
    _, gradient = emulated(many, variant, exact=exact, schedule=4, workspace=at_once, fill=False)
    _, alone = emulated(many[:1], variant, exact=exact)
    torch.testing.assert_close(gradient[-1, :, -64:], alone[0, :, -64:] / B, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("variant", "exact"), PATHS)
@pytest.mark.parametrize("strides", [(2**31 + 64, 8, 1), (64, 2**28, 1), (8, 64, 2**28 + 8)])
def test_strides_beyond_32_bits(emulated, variant, exact, strides):
    B, T, C = 2, 9, 9
    size = 1 + sum((n - 1) * stride for n, stride in zip((B, T, C), strides, strict=True))
    z = torch.empty(size, dtype=torch.bfloat16).as_strided((B, T, C), strides)  # untouched memory costs nothing
    z.copy_(randn(B, T, C))
    loss, gradient = emulated(z, variant, exact=exact)
    plain_loss, plain_gradient = emulated(z.contiguous(), variant, exact=exact)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-5, atol=1e-8)


@every_run
def test_without_gradient(emulated, variant, dtype):
    z = randn(2, 140, 24).to(dtype)
    loss, gradient = emulated(z, variant, need_grad=False)
    assert loss == emulated(z, variant)[0]
    assert gradient.shape == (0,)


@pytest.mark.parametrize("variant", TILED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_gives_nan_on_tensor_cores(emulated, variant, bad):
    z = randn(2, 140, 8).float()
    z[1, 138, 3] = bad
    loss, gradient = emulated(z, variant, exact=False)
    assert loss.isnan()
    assert gradient[1].isnan().all()
    assert gradient[0].isfinite().all()


@every_run
def test_strides(emulated, variant, dtype):
    base = randn(2, 34, 144).to(dtype)
    views = (
        base.mT[:, ::2],
        base[:, :, ::3],
        base.flip(1).transpose(0, 1),
        base[:, :1].expand(2, 9, 144),
        base[:1].expand(3, 34, 144),
        base[:, :, 8:48],
        base[:, :, 1:41],
        base[:, ::2],
    )
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


@pytest.mark.parametrize("variant", TILED[:2])
@pytest.mark.parametrize("eps", [1e-2, 1e-8, 0.0])
def test_float16_neither_overflows_nor_vanishes(emulated, variant, eps):
    """Norms from 1e-3 to 1e5, and zero tokens; clamps with a large slope."""
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
            # Token by token, since the gradients differ by the same factor as the norms.
            norm = exact.norm(dim=-1).clamp(min=1e-12)
            assert ((gradient - exact).norm(dim=-1) / norm <= 2 * (plain - exact).norm(dim=-1) / norm + 1e-2).all()


def test_unsupported_input_is_rejected(emulated):
    for z in (torch.ones(3, 4), torch.ones(1, 1, 4), torch.ones(1, 3, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"dispersion takes|z must be"):
            emulated(z, "angular_spread")
    with pytest.raises(ValueError, match="mean_cosine"):
        emulated(torch.ones(1, 3, 4), "mean_cosine")


# The cross-entropy of the output layer


def cross_entropy(logits, targets, need_grad=True, schedule=0, without=""):
    """The emulator's losses, and a copy of the logits after the call."""
    logits = logits.clone(memory_format=torch.preserve_format)
    losses = torch.ops.minidisp_emulator.cross_entropy_(logits, targets, -1, need_grad, schedule, without)
    return losses, logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 7, 8, 37, 2048, 5003])
def test_cross_entropy_against_float64(emulated, dtype, V):
    padded = (4 * randn(6, -(-V // 8) * 8 + 8)).to(dtype)
    targets = torch.tensor([0, V - 1, -1, V // 2, V // 3, 0])
    for logits in (padded[:, :V], padded[:, :V].contiguous()):  # rows of whole 16-byte units, or not
        exact = logits.double().requires_grad_()
        want = torch.nn.functional.cross_entropy(exact, targets, reduction="none", ignore_index=-1)
        (gradient,) = torch.autograd.grad(want.sum(), exact)
        losses, found = cross_entropy(logits, targets)
        torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(found.double(), gradient, rtol=2 * ROUNDING[dtype], atol=1e-6)
        alone, untouched = cross_entropy(logits, targets, need_grad=False)
        assert torch.equal(alone, losses)
        assert torch.equal(untouched, logits)
    whole = padded.clone()
    torch.ops.minidisp_emulator.cross_entropy_(whole[:, :V], targets, -1, True, 0, "")
    assert torch.equal(whole[:, V:], padded[:, V:])  # the memory between the rows


def test_cross_entropy_of_nan_and_inf(emulated):
    logits = randn(4, 300).float()
    logits[0, 8:280] = -math.inf  # invalid tokens
    logits[1, 5] = math.nan
    logits[2, 5] = math.inf
    logits[3, 5] = math.nan
    exact = logits.double().requires_grad_()
    targets = torch.tensor([3, 3, 3, -1])
    want = torch.nn.functional.cross_entropy(exact, targets, reduction="none", ignore_index=-1)
    (gradient,) = torch.autograd.grad(want[0], exact)
    losses, found = cross_entropy(logits, targets)
    assert losses[0].item() == pytest.approx(want[0].item(), rel=1e-6)
    torch.testing.assert_close(found[0].double(), gradient[0], rtol=1e-5, atol=1e-7)
    assert losses[1:3].isnan().all()
    assert losses[3] == 0
    assert not found[3].any()  # ignored, whatever its value


def test_cross_entropy_of_a_target_outside_the_vocabulary_is_nan(emulated):
    logits = torch.randn(5, 64)
    losses, gradients = cross_entropy(logits.clone(), torch.tensor([5, -100, 64, -1, 63]))
    assert losses.isnan().tolist() == [False, True, True, False, False]
    assert gradients.isnan().all(1).tolist() == gradients.isnan().any(1).tolist() == losses.isnan().tolist()
    assert losses[3] == 0


def test_cross_entropy_in_any_order_and_none_without_its_barrier(emulated):
    logits, targets = randn(2, 5003).float(), torch.tensor([70, 5001])
    losses, found = cross_entropy(logits, targets)
    barriers = [name for name in BARRIERS if name.startswith("cross_entropy")]
    assert len(barriers) == 1
    changed = False
    for schedule in range(2):
        for got, want in zip(cross_entropy(logits, targets, schedule=schedule), (losses, found), strict=True):
            assert torch.equal(got, want)
        changed |= not torch.equal(cross_entropy(logits, targets, schedule=schedule, without=barriers[0])[0], losses)
    assert changed


def test_cross_entropy_offsets_beyond_32_bits(emulated):
    """Rows 2^31 numbers apart; only the memory of two rows is touched."""
    logits = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 64), (2**31, 1))
    logits.copy_(randn(2, 64))
    targets = torch.tensor([3, 60])
    losses, found = cross_entropy(logits.contiguous(), targets)
    assert torch.equal(torch.ops.minidisp_emulator.cross_entropy_(logits, targets, -1, True, 0, ""), losses)
    assert torch.equal(logits, found)


def test_cross_entropy_rejects_unsupported_input(emulated):
    logits, targets = randn(4, 9).float(), torch.zeros(4, dtype=torch.int64)
    for wrong in ((logits.mT, targets), (logits, targets[:3]), (logits, targets.int()), (logits, targets.expand(4, 4))):
        with pytest.raises(ValueError, match="takes logits"):
            cross_entropy(*wrong)
    with pytest.raises(TypeError, match="not Double"):
        cross_entropy(logits.double(), targets)
