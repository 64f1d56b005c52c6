"""minidisp.ops: the fused and the streamed dispersion loss against the oracle, as accurate as the reference."""

import contextlib
import functools
import itertools
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from test_dispersion import CASES, randn

from minidisp import InputError, dispersion, ops
from minidisp.dispersion import DispersionLoss, dispersion_loss
from minidisp.loss import chunked
from minidisp.ops import build, registered, streamed
from minidisp.ops.__main__ import check, main, self_test
from minidisp.ops.dispersion import FUSED_VARIANTS, STREAMED_VARIANTS
from tests import forked

BUILD = build._build
MISSING = registered("cpu")  # why the extension is not available, or ""
FUSED = not MISSING
needs_fused = pytest.mark.skipif(not FUSED, reason=MISSING)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
HAS_CUDA_OP = torch.cuda.is_available() and not registered("cuda")
needs_cuda_op = pytest.mark.skipif(not HAS_CUDA_OP, reason="no CUDA extension")

RUNS = [
    *(pytest.param("fused", variant, "cpu", marks=needs_fused) for variant in FUSED_VARIANTS),
    *(pytest.param("streamed", variant, "cpu") for variant in STREAMED_VARIANTS),
    *(
        pytest.param("fused", variant, "cuda", marks=pytest.mark.skipif(not HAS_CUDA_OP, reason="no CUDA extension"))
        for variant in FUSED_VARIANTS
    ),
    *(pytest.param("streamed", variant, "cuda", marks=needs_cuda) for variant in STREAMED_VARIANTS),
]
every_run = pytest.mark.parametrize(("impl", "variant", "device"), RUNS)


def value_and_gradient(z, variant, impl, device="cpu", **options):
    z = z.detach().to(device).clone(memory_format=torch.preserve_format).requires_grad_()
    loss = dispersion_loss(z, variant, impl=impl, **options)
    loss.backward()
    return loss.item(), z.grad.cpu()


def errors(z, variant, impl, truth, device="cpu", **options):
    """Errors of the value, relative to 1 + |value|, and of the gradient, relative to the norm of the exact one."""
    value, gradient = value_and_gradient(z, variant, impl, device, **options)
    exact, exact_gradient = truth
    norm = exact_gradient.norm().item() or 1.0
    return abs(value - exact) / (1 + abs(exact)), (gradient.double() - exact_gradient).norm().item() / norm


def assert_as_good_as_reference(z, variant, impl, device, rounding=1e-6, times=2, **options):
    """At most twice the reference's error, both against float64; errors below rounding count as zero."""
    truth = value_and_gradient(z.double(), variant, "reference", **options)
    value, gradient = errors(z, variant, impl, truth, device, **options)
    plain_value, plain_gradient = errors(z, variant, "reference", truth, device, **options)
    assert value <= max(2 * plain_value, 3e-7)
    assert gradient <= max(times * plain_gradient, rounding)


# Values and gradients


@every_run
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tau", [1.0, 0.1, 1e-3])
def test_against_the_oracle(impl, variant, device, case, tau):
    z = CASES[case].float()
    truth = z.double().numpy()
    exact = oracle.loss(truth, variant, tau, 0.1), torch.from_numpy(oracle.gradient(truth, variant, tau, 0.1))
    value, gradient = errors(z, variant, impl, exact, device, tau=tau, clamp=0.1)
    plain_value, plain_gradient = errors(z, variant, "reference", exact, device, tau=tau, clamp=0.1)
    assert value <= max(2 * plain_value, 3e-7)
    if exact[1].norm() > 1e-6 / (0.01 + z.norm(dim=-1).max()):  # otherwise rounding errors of cancelling terms dominate
        assert gradient <= max(2 * plain_gradient, 2e-6)


@pytest.mark.parametrize("variant", STREAMED_VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_streamed_in_float64(variant, case):
    z = CASES[case]
    value, gradient = value_and_gradient(z, variant, "streamed", tau=0.1)
    assert value == pytest.approx(oracle.loss(z.numpy(), variant, 0.1), rel=1e-12, abs=1e-12)
    expected = oracle.gradient(z.numpy(), variant, 0.1)
    assert np.abs(gradient.numpy() - expected).max() <= 1e-8 * np.abs(expected).max() + 1e-13


@every_run
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 129, 33), (1, 300, 70), (5, 31, 257)])
@pytest.mark.parametrize("spread", [1.0, 0.01])  # 0.01: nearly parallel
@pytest.mark.parametrize("number", [1, 2])
def test_odd_sizes(impl, variant, device, shape, spread, number):
    B, _, C = shape
    z = (randn(B, 1, C, seed=1) * (spread < 1) + spread * randn(*shape)).float()
    if impl == "streamed" and number == 2:
        pytest.skip("has no threads of its own")
    with threads(number):
        for tau in (1.0, 1e-3):
            # A GPU rounds differently, and for two nearly parallel tokens mostly rounding errors remain.
            times = 4 if device == "cuda" and shape[1] == 2 else 2
            assert_as_good_as_reference(z, variant, impl, device, times=times, tau=tau)


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@needs_fused
@pytest.mark.parametrize("variant", FUSED_VARIANTS)
@pytest.mark.parametrize(("number", "B"), [(3, 1), (3, 5), (4, 2), (4, 7), (7, 3), (7, 6), (16, 1)])
def test_teams_of_threads(variant, number, B):
    """Sequences that do not divide evenly over threads: teams of two have a gradient each, larger teams share one."""
    for T in (2, 37, 300):
        z = randn(B, T, 40).float()
        with threads(number):
            for tau in (1.0, 1e-3):
                assert_as_good_as_reference(z, variant, "fused", "cpu", rounding=2e-6, tau=tau)
            value, gradient = value_and_gradient(z, variant, "fused")
            again, gradient_again = value_and_gradient(z, variant, "fused")
            assert value == again == dispersion_loss(z, variant, impl="fused").item()
            assert torch.equal(gradient, gradient_again)
            z[-1, 1, 3] = math.nan
            value, gradient = value_and_gradient(z, variant, "fused")
        assert math.isnan(value)
        assert gradient[-1].isnan().all()
        assert gradient[:-1].isfinite().all()


@every_run
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision(impl, variant, device, dtype, rounding):
    for z in (randn(2, 70, 24), randn(2, 1, 24) + 0.1 * randn(2, 70, 24, seed=1)):
        assert_as_good_as_reference(z.to(dtype), variant, impl, device, rounding)
        z = z.to(device, dtype).requires_grad_()
        loss = dispersion_loss(z, variant, impl=impl)
        (65536 * loss).backward()  # as a gradient scaler does
        assert loss.dtype == torch.float32
        assert z.grad.dtype == dtype


@every_run
def test_strides(impl, variant, device):
    base = randn(2, 17, 140).float().to(device)
    views = (base.mT[:, ::2], base[:, :, ::3], base.flip(1).transpose(0, 1), base[:, :1].expand(2, 9, 140))
    for z in views:
        value, gradient = value_and_gradient(z.contiguous(), variant, impl, device)
        x = z.detach().requires_grad_()
        loss = dispersion_loss(x, variant, impl=impl)
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=1e-6)
        torch.testing.assert_close(x.grad.cpu(), gradient, rtol=1e-5, atol=1e-7)


@every_run
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_input_gives_nan(impl, variant, device, bad, dtype):
    for T in (5, 150):
        for tau in (1.0, 1e-3):
            z = randn(2, T, 4).to(dtype)
            z[1, T - 2, 3] = bad
            value, gradient = value_and_gradient(z, variant, impl, device, tau=tau)
            assert math.isnan(value)
            assert gradient[1].isnan().any()


@every_run
def test_same_bits_every_time_and_without_gradient(impl, variant, device):
    z = randn(3, 300, 40).float().to(device)
    value, gradient = value_and_gradient(z, variant, impl, device)
    again, gradient_again = value_and_gradient(z, variant, impl, device)
    assert value == again == dispersion_loss(z, variant, impl=impl).item()
    assert torch.equal(gradient, gradient_again)


@every_run
def test_scaled_and_summed_gradients(impl, variant, device):
    z = randn(2, 20, 8).float().to(device).requires_grad_()
    (3 * dispersion_loss(z, variant, impl=impl) + z.sum()).backward()
    expected = 3 * value_and_gradient(z, variant, impl, device)[1] + 1
    torch.testing.assert_close(z.grad.cpu(), expected)


@every_run
def test_no_second_derivative(impl, variant, device):
    z = randn(2, 20, 8).float().to(device).requires_grad_()
    with pytest.raises(RuntimeError, match=r"second derivative.*reference"):
        torch.autograd.grad(dispersion_loss(z, variant, impl=impl), z, create_graph=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@needs_cuda_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", FUSED_VARIANTS)
@pytest.mark.parametrize(
    "shape", [(2, 129, 64), (40, 1024, 32), (1, 6000, 16), (1, 5001, 37), (2, 300, 770), (70000, 2, 8)]
)
def test_cuda_crosses_tiles_groups_and_strips(variant, dtype, shape):
    """Compared with the streamed implementation in float64, since the reference would need all pairs at once."""
    for spread in (1.0, 0.1):
        z = (randn(shape[0], 1, shape[2], seed=1) * (spread < 1) + spread * randn(*shape)).to("cuda", dtype)
        results = []
        for x, impl in ((z.double(), "streamed"), (z.float(), "streamed"), (z, "fused")):
            x = x.requires_grad_()
            loss = dispersion_loss(x, variant, impl=impl)
            (grad,) = torch.autograd.grad(2**16 * loss, x)
            results.append((loss.double(), grad.double()))
        (exact, gradient), (plain, plain_gradient), (value, fused_gradient) = results
        assert abs(value - exact) <= max(2 * abs(plain - exact), 2e-6)
        rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        error, plain_error = ((g - gradient).norm() / gradient.norm() for g in (fused_gradient, plain_gradient))
        assert error <= max(2 * plain_error, rounding)


@needs_cuda_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", FUSED_VARIANTS)
@pytest.mark.parametrize("shape", [(32, 1024, 768), (1, 8192, 4096), (1, 20000, 33)])
def test_cuda_memory_stays_small(variant, dtype, shape):
    z = torch.randn(shape, device="cuda", dtype=dtype)
    torch.ops.minidisp.dispersion(z[:1, :9], variant, 1.0, 0.25, 1e-2, True)  # cuBLAS allocates its own workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.ops.minidisp.dispersion(z, variant, 1.0, 0.25, 1e-2, True)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - 4 * z.numel()
    assert extra <= 7 * 2**24 + 64 * shape[0] * shape[1]  # 112 MB, and a few numbers per token


# Instruction sets of the CPU, and AMX tiles

SETS = ["baseline", "avx2", "avx512", "amx"]
BEST = torch.ops.minidisp.instruction_set() if FUSED else "baseline"


def only_here(name):
    return pytest.param(
        name, marks=pytest.mark.skipif(SETS.index(name) > SETS.index(BEST), reason="not this processor")
    )


needs_tiles = pytest.mark.skipif(BEST != "amx", reason="no AMX here")


@needs_fused
@pytest.mark.parametrize("instructions", [only_here(name) for name in SETS])
@pytest.mark.parametrize("T", [2, 37, 130, 1000])
def test_every_instruction_set_is_exact(instructions, T, monkeypatch):
    monkeypatch.setenv("MINIDISP_CPU", instructions)
    wide = (randn(2, 1, 71, seed=1) + randn(2, T, 71)).float()
    for z in (
        wide,
        wide[:, :, 1:65],
        wide[:, :, ::2],
        wide.mT.contiguous().mT,
    ):  # rows not aligned to 64 bytes, strided features
        for variant in FUSED_VARIANTS if z is wide and T < 1000 else ("angular_spread",):
            assert_as_good_as_reference(z, variant, "fused", "cpu")


@contextlib.contextmanager
def rounding_allowed(how):
    """With both of the settings that allow rounded products."""
    with contextlib.ExitStack() as stack:
        if how == "autocast":
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        else:
            stack.enter_context(streamed.float32_precision(how))
        yield


def tokens_of(kind, B, T, C):
    """Hidden states: independent, with a mean, nearly parallel, in groups, or drifting from token to token."""
    noise, centre = randn(B, T, C), randn(B, 1, C, seed=1)
    if kind.startswith("parallel"):
        return centre + float(kind[8:]) * noise
    if kind.startswith("groups"):
        return randn(B, 5, C, seed=2)[:, torch.arange(T) % 5] + float(kind[6:]) * noise
    return noise.cumsum(1) if kind == "drifting" else noise


KINDS = ["independent", "parallel1", "parallel0.3", "parallel0.001", "groups0.3", "groups0.03", "drifting"]


@needs_tiles
@pytest.mark.parametrize("how", ["high", "medium", "autocast"])
@pytest.mark.parametrize("shape", [(2, 37, 16), (1, 130, 40), (3, 256, 192), (1, 1000, 33), (5, 300, 70)])
@pytest.mark.parametrize("number", [1, 3])
def test_matrix_tiles_within_their_tolerance(how, shape, number):
    for kind, (tau, clamp) in itertools.product(KINDS, [(1.0, 0.25), (0.5, 0.2), (3.0, 0.6)]):
        z = tokens_of(kind, *shape).float()
        truth = value_and_gradient(z.double(), "angular_spread", "reference", tau=tau, clamp=clamp)
        with threads(number), rounding_allowed(how):
            value, gradient = errors(z, "angular_spread", "fused", truth, tau=tau, clamp=clamp)
            assert value < 1e-4, kind
            assert gradient < 2e-3, kind
            if kind == "independent":
                assert gradient > 1e-6, "the tiles are not in use"


@needs_tiles
@pytest.mark.parametrize("number", [1, 3])
def test_matrix_tiles_repeat_read_any_strides_and_keep_nan_apart(number):
    wide = tokens_of("parallel1", 4, 330, 141).float()
    with threads(number), rounding_allowed("high"):
        for z in (wide, wide[:, :, 1:129], wide[:, ::3], wide[:, :, ::2], wide.bfloat16(), wide.half()):
            value, gradient = value_and_gradient(z, "angular_spread", "fused")
            again, gradient_again = value_and_gradient(z.contiguous(), "angular_spread", "fused")
            assert value == again == dispersion_loss(z, impl="fused").item()
            assert gradient.dtype == z.dtype
            assert torch.equal(gradient, gradient_again)
        for bad in (math.nan, math.inf):
            z = wide.clone()
            z[1, 329, 140] = bad
            value, gradient = value_and_gradient(z, "angular_spread", "fused")
            assert math.isnan(value)
            assert gradient[1].isnan().all()
            assert gradient[[0, 2, 3]].isfinite().all()
        z = torch.zeros(2, 40, 16)
        z[:, 3:] = wide[:2, 3:40, :16] * 1e20  # zero tokens, and tokens whose squares are no longer finite
        assert value_and_gradient(z, "angular_spread", "fused")[1].isfinite().all()


@needs_tiles
@pytest.mark.parametrize(
    ("variant", "shape", "options"),
    [
        ("angular_spread", (2, 130, 40), {"tau": 0.4}),
        ("angular_spread", (2, 130, 40), {"clamp": 0.1}),
        ("angular_spread", (2, 31, 40), {}),
        ("angular_spread", (2, 130, 12), {}),
        *((variant, (2, 130, 40), {}) for variant in FUSED_VARIANTS[1:]),
    ],
)
def test_what_is_too_steep_or_too_small_for_matrix_tiles_stays_exact(variant, shape, options):
    z = randn(*shape).float()
    gradient = value_and_gradient(z, variant, "fused", **options)[1]
    with rounding_allowed("high"):
        assert torch.equal(value_and_gradient(z, variant, "fused", **options)[1], gradient)


@needs_tiles
def test_without_amx_rounding_changes_nothing(monkeypatch):
    monkeypatch.setenv("MINIDISP_CPU", "avx512")
    z = randn(2, 130, 40).float()
    gradient = value_and_gradient(z, "angular_spread", "fused")[1]
    with rounding_allowed("high"):
        assert torch.equal(value_and_gradient(z, "angular_spread", "fused")[1], gradient)


@every_run
def test_the_gradient_comes_after_that_of_the_layers_above(impl, variant, device):
    """When it can be added to theirs; otherwise the gradients of all layers would be in memory at once."""
    x = randn(2, 40, 16).float().to(device).requires_grad_()
    z = 2 * x
    above = 3 * z
    loss = dispersion_loss(z, variant, impl=impl)
    order = []
    for name, node in (("above", above.grad_fn), ("loss", loss.grad_fn), ("z", z.grad_fn)):
        node.register_hook(lambda *_, name=name: order.append(name))
    (above.sum() + loss).backward()
    assert order == ["above", "loss", "z"]
    torch.testing.assert_close(x.grad.cpu(), 6 + 2 * value_and_gradient(z, variant, impl, device)[1])


@pytest.mark.slow
def test_memory_stays_small():
    """A child process, whose peak memory is known: 4096 tokens, whose matrix of pairs alone would be 64 MiB."""
    script = r"""
import re, sys, torch
from minidisp.ops import registered
from minidisp.dispersion import dispersion_loss
registered("cpu")
torch.set_num_threads(int(sys.argv[3]))
# Not getrusage's peak, which a child takes over from its parent: that of pytest hides everything.
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024
dispersion_loss(torch.randn(1, 300, 64, requires_grad=True), sys.argv[2], impl=sys.argv[1]).backward()
z = torch.randn(1, 4096, 64, requires_grad=True)  # 1 MiB
before = peak()
dispersion_loss(z, sys.argv[2], impl=sys.argv[1]).backward()
print(peak() - before)
"""
    runs = [("streamed", "angular_spread", 1, 16), ("streamed", "perplexity_entropy", 1, 56)]
    runs += [("fused", "angular_spread", 1, 8), ("fused", "l2_repel", 1, 10)] if FUSED else []
    runs += [("fused", "angular_spread", 32, 16)] if FUSED else []  # 1/4 MiB per thread; a gradient per thread is 1 MiB
    runs += [("reference", "angular_spread", 1, None)]
    for impl, variant, number, limit_mib in runs:
        command = [sys.executable, "-c", script, impl, variant, str(number)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        if limit_mib:
            assert float(result.stdout) < limit_mib, (impl, variant)
        else:
            assert float(result.stdout) > 64, "the measurement sees nothing"


# As PyTorch operators


@every_run
@pytest.mark.parametrize("need_grad", [True, False])
def test_opcheck(impl, variant, device, need_grad):
    op = torch.ops.minidisp.dispersion if impl == "fused" else torch.ops.minidisp.dispersion_streamed
    z = randn(2, 9, 5).float().to(device).requires_grad_(need_grad)
    torch.library.opcheck(op.default, (z, variant, 0.5, 0.25, 0.01, need_grad))


@every_run
def test_compile_without_graph_breaks(impl, variant, device):
    torch.compiler.reset()
    compiled = torch.compile(dispersion_loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (6, 9, 130):
        z = randn(2, T, 8).float().to(device).requires_grad_()
        loss = compiled(2 * z, variant, impl=impl)
        loss.backward()
        value, gradient = value_and_gradient(2 * z, variant, impl, device)
        assert loss.item() == value
        torch.testing.assert_close(z.grad.cpu(), 2 * gradient)


@pytest.mark.slow
def test_auto_compiles_before_the_extension_was_ever_used():
    script = r"""
import torch
from minidisp.dispersion import DispersionLoss
z = torch.randn(1, 9, 8, requires_grad=True)
loss = torch.compile(DispersionLoss(), backend="aot_eager", fullgraph=True)([z, 2 * z])
loss.backward()
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@every_run
def test_autocast_and_checkpointing_change_nothing(impl, variant, device):
    z = randn(2, 20, 8).float().to(device).requires_grad_()
    value, gradient = value_and_gradient(z, variant, impl, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = torch.utils.checkpoint.checkpoint(
            lambda z: dispersion_loss(z, variant, impl=impl), z, use_reentrant=False
        )
    loss.backward()
    assert loss.item() == value
    assert torch.equal(z.grad.cpu(), gradient)


# Which implementation


def select(impl, device):
    return ops.dispersion.select(impl, "angular_spread", torch.float32, device)[0]


def describe(device):
    return ops.dispersion.describe("auto", "angular_spread", torch.float32, device)


def test_names():
    with pytest.raises(ValueError, match=r"'eager'.*auto.*streamed"):
        dispersion_loss(CASES["random"], impl="eager")
    with pytest.raises(ValueError, match="eager"):
        DispersionLoss(impl="eager")
    assert select("streamed", "cpu") == "streamed"
    assert select("reference", "cpu") == "reference"
    assert dispersion.DispersionLoss(impl="streamed")([CASES["random"]] * 2).isfinite()


@pytest.mark.parametrize(
    ("impl", "variant", "dtype", "device", "chosen", "words"),
    [
        ("auto", "l2_repel", torch.float16, "cuda", "fused", "fused"),
        ("auto", "angular_spread", torch.float32, "cpu", "fused", "fused"),
        ("fused", "decorrelation", torch.bfloat16, "cpu", "fused", "fused"),
        ("streamed", "angular_spread", torch.float32, "cpu", "streamed", "streamed in PyTorch"),
        ("reference", "angular_spread", torch.float32, "cuda", "reference", "plain PyTorch"),
        ("auto", "orthogonalization", torch.float32, "mps", "streamed", "streamed in PyTorch: .*not run on mps"),
        ("fused", "angular_spread", torch.float32, "xpu", "streamed", "streamed in PyTorch: .*not run on xpu"),
        ("auto", "angular_spread", torch.float64, "cpu", "streamed", "streamed in PyTorch: .*not support float64"),
        (
            "auto",
            "perplexity_entropy",
            torch.float32,
            "cpu",
            "streamed",
            "streamed in PyTorch: .*not support perplexity_entropy",
        ),
        ("fused", "perplexity_entropy", torch.float32, "cuda", "streamed", "streamed .*not support perplexity_entropy"),
        ("auto", "mean_cosine", torch.float32, "cpu", "reference", "closed form"),
        ("fused", "mean_cosine", torch.float32, "mps", "reference", "closed form"),
    ],
)
def test_the_reported_implementation_runs_and_only_it_is_built(
    impl, variant, dtype, device, chosen, words, monkeypatch
):
    """Per variant, dtype and device; calls of the search for the extension and of the operators are recorded."""
    searched, ran = [], []
    monkeypatch.setattr(
        build, "find_or_build", lambda device: searched.append(device) or build.Extension("x", "prebuilt")
    )
    monkeypatch.setattr(ops, "check_cuda", lambda: "")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(ops.dispersion, "run", lambda chosen, z, *_: ran.append(chosen) or z.sum())
    assert ops.dispersion.choose(impl, variant, dtype, device)[0] == chosen
    assert not searched
    module = DispersionLoss(variant, impl=impl)
    assert re.fullmatch(words, module.prepare(device, dtype))
    if device == "cpu":
        module([torch.ones(1, 3, 4, dtype=dtype)] * 2)
        assert ran == ([chosen] if chosen != "reference" else [])
    assert set(searched) == ({device} if chosen == "fused" else set())


@pytest.mark.parametrize(
    ("extension", "words"),
    [
        (build.Extension(None, "no C++ compiler was found"), "streamed in PyTorch: no C++ compiler was found"),
        (build.Extension(None, "why", "; and more"), "streamed in PyTorch: why; and more"),
        (build.Extension("/x/y.so", "cached"), "fused"),
        (
            build.Extension("/x/y.so", "compiled now in 14 s", "; a note"),
            "fused, compiled now in 14 s (/x/y.so); a note",
        ),
    ],
)
def test_the_path_is_reported_after_a_build(extension, words, monkeypatch):
    monkeypatch.setattr(build, "find_or_build", lambda device: extension)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    assert DispersionLoss().prepare("cpu") == words
    if extension.path is None:
        with pytest.raises(InputError, match=extension.about.replace("+", r"\+")):
            DispersionLoss(impl="fused").prepare("cpu")
        with pytest.raises(InputError, match="fused"):
            DispersionLoss(impl="fused")([torch.ones(1, 3, 4)] * 2)


# Finding and building


BUILD = build._build


@pytest.fixture
def unbuilt(tmp_path, monkeypatch):
    """As in a process that has not looked for the extension yet, with nothing built."""
    for function in (build.find, build.find_or_build):
        monkeypatch.setattr(build, function.__name__, functools.cache(function.__wrapped__))
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"loads {path}"))
    monkeypatch.setattr(build, "_build", lambda folder, lock: pytest.fail("builds"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MINIDISP_FUSED", raising=False)
    monkeypatch.delenv("CXX", raising=False)


def put_binary(folder, content=b"some code"):
    """A folder as left by a build."""
    (folder / build.BINARY).write_bytes(content)
    (folder / build.DONE).write_bytes(build.checksum(folder / build.BINARY))
    return folder


def program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux")


@on_linux
def test_the_compiler_is_a_command(tmp_path, monkeypatch):
    first, spaced = program(tmp_path / "a" / "ccache"), program(tmp_path / "with spaces" / "g++ 13")
    monkeypatch.setenv("PATH", str(tmp_path / "a"))
    for value, command in {
        "": [],
        "ccache": [first],
        "ccache g++ -m64": [first, "g++", "-m64"],
        spaced: [spaced],
        f"'{spaced}' -m64 '-DX=a b'": [spaced, "-m64", "-DX=a b"],
        f"  {first}  ": [first],
        "g++-99": [],
        "g++-99 -m64": [],
        "ccache 'g++": [],
    }.items():
        monkeypatch.setenv("CXX", value)
        assert build.compiler() == command
        assert bool(build.missing_tool()) == (not command)
        assert value.strip() in build.missing_tool() or command
    monkeypatch.delenv("CXX")
    for name in ("clang++", "g++", "c++"):  # the last one added is used first
        path = program(tmp_path / "a" / name)
        assert build.compiler() == [path]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "a/g++ -m64")
    assert build.compiler() == [str(tmp_path / "a" / "g++"), "-m64"]  # ninja starts it in another folder


@on_linux
def test_each_compiler_has_a_cache_of_its_own(unbuilt, tmp_path, monkeypatch):
    program(tmp_path / "bin" / "ccache"), program(tmp_path / "bin" / "g++")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    folders = []
    for value in ("", "ccache g++", "g++ -m64", "ccache g++ -m64"):
        monkeypatch.setenv("CXX", value)
        folders += [build.cache_folder(), build.cache_folder()]
    (tmp_path / "bin" / "g++").write_text("#!/bin/sh\n# a newer one\n")
    folders += [build.cache_folder()] * 2
    assert len(set(folders)) == 5


@on_linux
def test_a_missing_compiler_is_reported_in_one_line(unbuilt, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert re.fullmatch("streamed in PyTorch: no C.. compiler was found", describe("cpu"))
    with pytest.raises(InputError):
        select("fused", "cpu")
    assert not (tmp_path / "cache").exists()


@on_linux
def test_a_missing_build_folder_is_reported_in_one_line(unbuilt, tmp_path, monkeypatch):
    import pwd

    (tmp_path / "cache").touch()  # a file, since root can write to read-only folders
    assert re.fullmatch("streamed in PyTorch: .*cache.*: Not a directory; set TORCH_EXTENSIONS_DIR.*", describe("cpu"))
    build.find.cache_clear(), build.find_or_build.cache_clear()

    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert re.fullmatch("streamed in PyTorch: there is no home folder .*; set TORCH_EXTENSIONS_DIR.*", describe("cpu"))
    with pytest.raises(InputError, match="no home folder"):
        select("fused", "cpu")


@on_linux
@pytest.mark.parametrize("how", ["writable by all", "writable by the group", "of another user"])
@pytest.mark.parametrize("built", [True, False])
def test_what_others_could_have_put_there_is_not_run(unbuilt, how, built, monkeypatch):
    before = os.umask(0)
    try:
        folder = build.make_cache_folder()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755
    if built:
        put_binary(folder)
    if how == "of another user":
        if os.getuid() == 0:  # root, whom everyone trusts
            os.chown(folder, 4321, -1)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        folder.chmod(0o707 if how == "writable by all" else 0o770)
    assert re.fullmatch("streamed in PyTorch: other users can write to .*; set TORCH_EXTENSIONS_DIR.*", describe("cpu"))


@on_linux
def test_a_binary_that_others_can_write_is_not_run(unbuilt):
    folder = put_binary(build.make_cache_folder())
    (folder / build.BINARY).chmod(0o775)
    assert re.fullmatch("streamed in PyTorch: other users can write to .*minidisp_fused.so.*", describe("cpu"))


@on_linux
def test_one_built_with_cuda_serves_where_nvcc_is_missing(unbuilt, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.delenv("MINIDISP_CUDA", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build, "builds_cuda", lambda: True)
    folder, stem = put_binary(build.make_cache_folder()), build.file_stem(True)
    monkeypatch.setattr(build, "builds_cuda", lambda: False)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert build.find().path == folder / build.BINARY
    build.find.cache_clear()
    monkeypatch.setattr(build, "PACKAGE", folder)
    (folder / f"{stem}.so").write_bytes(b"some code")
    assert build.find() == build.Extension(folder / f"{stem}.so", "prebuilt")


@on_linux
def test_a_binary_that_does_not_load_is_reported_and_training_continues(unbuilt, monkeypatch):
    put_binary(build.make_cache_folder())

    def refuse(path):
        try:
            raise OSError("undefined symbol: torch_of_tomorrow\nand more")
        except OSError as reason:
            raise OSError(f"Could not load this library: {path}") from reason  # as torch does

    monkeypatch.setattr(torch.ops, "load_library", refuse)
    assert re.fullmatch("streamed in PyTorch: .* does not load: undefined symbol: torch_of_tomorrow", describe("cpu"))


@on_linux
@pytest.mark.parametrize("damage", ["cut off", "empty", "missing", "changed", "no checksum", "checksum damaged"])
def test_a_damaged_binary_in_the_cache_is_built_again(unbuilt, damage, monkeypatch):
    """Loading a truncated shared library would kill the process with SIGBUS."""
    folder = put_binary(build.make_cache_folder(), bytes(range(256)) * 100)
    binary = folder / build.BINARY
    if damage == "missing":
        binary.unlink()
    elif damage == "no checksum":  # from a killed build or a full disk
        (folder / build.DONE).write_text("")
    elif damage == "checksum damaged":
        (folder / build.DONE).write_bytes(b"\xff\0\xfe")
    else:
        content = binary.read_bytes()
        binary.write_bytes({"cut off": content[:-1], "empty": b"", "changed": content[:-1] + b"x"}[damage])
    monkeypatch.setattr(build, "_build", lambda folder, lock: put_binary(folder) and "compiled now in 1 s")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    found = build.find_or_build("cpu")
    assert found.path == binary
    assert found.about == "compiled now in 1 s"
    assert f"{folder} was damaged" in found.note


@on_linux
def test_a_prebuilt_library_that_is_cut_off_is_not_loaded(unbuilt, tmp_path, monkeypatch):
    whole = next(path for path in Path(torch.__file__).parent.glob("lib/libc10.so")).read_bytes()
    prebuilt = tmp_path / f"{build.file_stem(build.builds_cuda())}.so"
    monkeypatch.setenv("CXX", "no-compiler-here")
    for length in (0, 40, 64, len(whole) // 2, len(whole) - 1):
        prebuilt.write_bytes(whole[:length])
        build.find.cache_clear(), build.find_or_build.cache_clear()
        assert f"{prebuilt} does not load: the file is truncated or empty" in describe("cpu")
    prebuilt.write_bytes(whole)
    assert build.is_whole(prebuilt)


@on_linux
@pytest.mark.parametrize(
    ("log", "age", "again"),
    [
        ("error: expected ';'\n\nexit code 1\n", 0, False),
        ("error: expected ';'\n\nexit code 1\n", 25 * 3600, True),
        ("", 0, True),  # a full disk
        ("error: expec", 0, True),  # killed while writing it
        ("fatal error: Killed signal terminated program cc1plus\n\nto be tried again\n", 0, True),
    ],
)
def test_a_failed_build_is_remembered_with_evidence_and_for_a_day(unbuilt, log, age, again, monkeypatch):
    folder = build.make_cache_folder()
    (folder / build.LOG).write_text(log)
    os.utime(folder / build.LOG, (time.time() - age,) * 2)
    monkeypatch.setattr(build, "_build", lambda folder, lock: put_binary(folder) and "compiled now in 1 s")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert bool(build.find_or_build("cpu").path) == again


@on_linux
@pytest.mark.parametrize("how", ["killed", "no space", "an error"])
def test_what_a_compiler_fails_of_decides_whether_it_is_tried_again(unbuilt, how, tmp_path, monkeypatch):
    words = {"killed": "kill -9 $$", "no space": "echo write: No space left on device; exit 1", "an error": "exit 1"}
    program(tmp_path / "bin" / "c++")
    (tmp_path / "bin" / "c++").write_text(f"#!/bin/sh\necho x >> {tmp_path}/calls\n{words[how]}\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("MAX_JOBS", "1")
    monkeypatch.setattr(build, "_build", BUILD)
    for _ in range(2):
        build.find.cache_clear(), build.find_or_build.cache_clear()
        assert re.search("failed to build" if how == "an error" else "not be built this time", describe("cpu"))
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [build.LOG, "minidisp.lock"]  # nothing is left behind
    assert (tmp_path / "calls").read_text().count("x") == (1 if how == "an error" else 2)


@pytest.mark.slow
@on_linux
def test_a_compiler_that_outlives_a_killed_build_keeps_the_lock(tmp_path):
    """Otherwise two builds would write to the same folder."""
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nsleep 2\ntouch {tmp_path}/ended\nexit 1\n")
    compiler.chmod(0o755)
    script = "from minidisp.ops import build; build.find_or_build('cpu')"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "CXX": str(compiler), "MAX_JOBS": "1"}
    child = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "begun").exists():
        assert child.poll() is None
        time.sleep(0.05)
    child.kill()
    child.wait()
    (folder,) = (tmp_path / "cache").iterdir()
    with build.locked(folder / "minidisp.lock"):
        assert (tmp_path / "ended").exists()
    assert not build.has_failed(folder)


@on_linux
@pytest.mark.parametrize("patient", [True, False])
def test_it_compiles_in_the_background(tmp_path, monkeypatch, unbuilt, patient):
    """A compiler that takes a while, and fails: who waits gets its answer, and who leaves stops it."""
    compiler, pids = tmp_path / "c++", tmp_path / "pids"
    wait = f"trap 'kill $!; exit 1' TERM; sleep {1 if patient else 60} & wait; exit 1"
    compiler.write_text(f"#!/bin/sh\necho $$ >> {pids}\n{wait}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "_build", BUILD)
    monkeypatch.setenv("CXX", str(compiler))
    start = time.monotonic()
    with build.ahead("cpu"):
        while not (pids.exists() and pids.read_text().endswith("\n")):
            assert time.monotonic() - start < 30
            time.sleep(0.01)
        assert "cpu" in build.started
        if patient:
            assert "failed to build" in build.find_or_build("cpu").about
    assert time.monotonic() - start < 30
    assert not build.started
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert build.has_failed(build.cache_folder()) == patient  # what was stopped is no failure to remember


@on_linux
def test_an_unknown_instruction_set_is_one_line(unbuilt, monkeypatch):
    monkeypatch.setenv("MINIDISP_CPU", "nonsense")
    with pytest.raises(InputError, match="MINIDISP_CPU is nonsense, but must be baseline, avx2, avx512 or amx"):
        build.find_or_build("cpu")


@on_linux
def test_the_diagnosis_names_an_unknown_instruction_set():
    result = forked.run(
        "-m", "minidisp.ops", cwd=Path(__file__).parents[1], env={**os.environ, "MINIDISP_CPU": "nonsense"}
    )
    assert result.returncode == 2
    assert "MINIDISP_CPU is nonsense" in result.stderr
    assert result.stderr.count("\n") == 1


@on_linux
@pytest.mark.parametrize(("argument", "code", "words"), [("bogus", 2, "unknown argument bogus"), ("--help", 0, "")])
def test_the_diagnosis_takes_no_arguments(monkeypatch, capsys, argument, code, words):
    monkeypatch.setenv("MINIDISP_CPU", "nonsense")
    monkeypatch.setattr(sys, "argv", ["minidisp.ops", argument])
    with pytest.raises(SystemExit) as end:
        sys.exit(main())
    assert end.value.code == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") <= 1


@on_linux
def test_each_instruction_set_has_a_cache_of_its_own(unbuilt, monkeypatch):
    """Machines with different processors may share a home folder."""
    folders = set()
    for asked, processor in (("", "avx2"), ("", "avx512"), ("avx2", "avx512"), ("amx", "avx2")):
        monkeypatch.setenv("MINIDISP_CPU", asked)
        monkeypatch.setattr(build, "processor_instruction_set", lambda found=processor: found)
        folders.add(build.cache_folder())
    assert len(folders) == 3  # compiles all of them on request
    only = [part for part in build.units(False, "avx2")[0].command if "MINIDISP_ONLY" in part]
    assert only == ["-DMINIDISP_ONLY=1"]
    assert not [part for unit in build.units(False, "all") for part in unit.command if "MINIDISP_ONLY" in part]


@on_linux
def test_each_kind_of_gpu_has_a_cache_of_its_own(unbuilt, monkeypatch):
    """A binary for one card holds no code for an older one."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    cards = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: cards[index])
    with_cuda, without = [], set()
    for visible in ([], [(8, 0)], [(9, 0)], [(9, 0), (8, 0)], [(8, 0), (9, 0)], [(8, 0), (8, 0)]):
        cards[:] = visible
        with_cuda.append(build.cache_folder(True))
        without.add(build.cache_folder(False))
    assert len(set(with_cuda)) == 4
    assert with_cuda[3] == with_cuda[4]
    assert with_cuda[1] == with_cuda[5]
    assert len(without) == 1
    cards.clear()
    flags = build.architecture_flags()
    assert "-gencode=arch=compute_90,code=sm_90" in flags
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ
    assert build.cache_folder(True) == with_cuda[0]
    for named in (build.CUDA_ARCHITECTURES, "8.6"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
        flags = build.architecture_flags()
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == named
    assert flags == ["-gencode=arch=compute_86,code=sm_86"]
    assert build.cache_folder(True) not in with_cuda


@on_linux
def test_one_built_before_is_found_without_a_tool_or_a_lock(unbuilt, monkeypatch):
    folder = put_binary(build.make_cache_folder())
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(build, "locked", lambda path: pytest.fail("writes"))
    assert build.find_or_build("cpu") == build.Extension(folder / build.BINARY, "cached")
    assert loaded == [str(folder / build.BINARY)]


def run_child(tmp_path, **environment):
    script = (
        "import torch; from minidisp.ops import dispersion as ops; "
        "arguments = 'auto', 'angular_spread', torch.float32, 'cpu'; "
        "print(ops.select(*arguments)[0]); print(ops.describe(*arguments))"
    )
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), **environment}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    return result.stdout.splitlines(), result.stderr


@pytest.mark.slow
@on_linux
def test_a_failed_build_is_remembered_and_stops_nothing(tmp_path):
    if FUSED and build.find().about == "prebuilt":
        pytest.skip("the prebuilt extension needs no compiler")
    fake = tmp_path / "my tools" / "broken-c++"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho this compiler is broken, called with $1 >&2\nexit 1\n")
    fake.chmod(0o755)
    command = shlex.join([str(fake), "-m64"])
    first, message = run_child(tmp_path / "the cache", CXX=command)
    assert first[0] == "streamed"
    assert "build.log" in first[1]
    assert message.count("compiling the extension") == 1
    (log,) = tmp_path.glob("the cache/*/build.log")
    assert "this compiler is broken, called with -m64" in log.read_text()
    second, message = run_child(tmp_path / "the cache", CXX=command)
    assert second[0] == "streamed"
    assert "delete it to try again" in second[1]
    assert "compiling" not in message


@on_linux
@pytest.mark.parametrize("good", [True, False])
def test_cuda_kernels_are_checked_once(good, tmp_path, monkeypatch, capsys):
    """As on a machine with a GPU and an extension for it; the child process is a script that counts its calls."""
    child = tmp_path / "python"
    child.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/calls\necho errors 1e-01\nexit {0 if good else 1}\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(build, "find_or_build", lambda device: build.Extension(tmp_path / "x.so", "cached"))
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU/40 GB")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for _ in range(2):  # two processes, one after the other
        ops.check_cuda.cache_clear()
        assert select("auto", "cpu") == "fused"
        assert select("auto", "cuda") == ("fused" if good else "streamed")
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "calls").read_text() == "-m minidisp.ops check cuda:1\n"
    log = tmp_path / "cache" / "check-Some-GPU-40-GB.log"
    assert "errors 1e-01" in log.read_text()
    if good:
        assert describe("cuda") == "fused"
    else:
        assert str(log) in describe("cuda")
        assert describe("cpu") == "fused"
        with pytest.raises(ValueError, match="failed their check"):
            select("fused", "cuda")
    ops.check_cuda.cache_clear()


@on_linux
@pytest.mark.parametrize(
    ("script", "reason", "remembered"),
    [
        ("echo CUDA out of memory; exit 75", "this time: CUDA out of memory", False),
        ("kill -9 $$", "stopped by signal 9", False),
        ("kill -11 $$", "failed their check", True),
        ("echo begun; exec sleep 60", "failed their check", True),
    ],
)
def test_a_check_that_could_not_run_is_repeated(script, reason, remembered, tmp_path, monkeypatch):
    child = tmp_path / "python"
    child.write_text(f"#!/bin/sh\necho x >> {tmp_path}/calls\n{script}\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ops, "CHECK_SECONDS", 1)
    for _ in range(2):
        ops.check_cuda.cache_clear()
        assert reason in ops.check_cuda()
    ops.check_cuda.cache_clear()
    assert (tmp_path / "calls").read_text().count("x") == (1 if remembered else 2)
    if "sleep" in script:
        assert "begun\ntimed out after 1 s" in (tmp_path / "cache" / "check-Some-GPU.log").read_text()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ops.TRY_AGAIN),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), ops.TRY_AGAIN),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
)
def test_what_the_check_takes_for_transient(error, code, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(torch.cuda, "set_device", fail)
    if code is None:
        with pytest.raises(RuntimeError, match="illegal"):
            check("cuda:0")
    else:
        assert check("cuda:0") == code
        assert capsys.readouterr().out.startswith("CUDA")


@on_linux
def test_the_cuda_toolkit_is_where_nvcc_says(tmp_path, monkeypatch):
    """torch looks in the parent of nvcc's folder, which is wrong if nvcc is a script that calls another one."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    nvcc = tmp_path / "nvcc"
    for script, toolkit in (
        ("echo '#$ HERE=/x' >&2; echo '#$ TOP=/opt/my cuda/bin/..' >&2", "/opt/my cuda"),
        ("echo no such file >&2; exit 1", None),
    ):
        nvcc.write_text(f"#!/bin/sh\n{script}\n")
        nvcc.chmod(0o755)
        assert build.cuda_toolkit() == toolkit
    nvcc.write_bytes(b"\x7fELF and nothing else")
    assert build.cuda_toolkit() is None
    monkeypatch.setenv("CUDA_HOME", "/named")
    assert build.cuda_toolkit() == "/named"


@on_linux
def test_a_failed_cuda_build_leaves_the_cpu_kernel(unbuilt, tmp_path, monkeypatch, capsys):
    tried = []

    def compile_into(out, cuda, instruction_set, lock):
        tried.append(cuda)
        if cuda:
            return build.Failure(b"no such architecture\n", 1)
        out.write_bytes(b"some code")
        return None

    monkeypatch.setattr(build, "_build", BUILD)
    monkeypatch.setattr(build, "compile_into", compile_into)
    monkeypatch.setattr(build, "missing_tool", lambda: "")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setenv("MINIDISP_CUDA", "1")
    for about in ("compiled now", "cached"):
        build.find.cache_clear(), build.find_or_build.cache_clear()
        found = build.find_or_build("cpu")
        assert found.about.startswith(about)
        assert "its CUDA part failed to build" in found.note
    assert tried == [True, False]
    assert "for the CPU only" in capsys.readouterr().err
    folder = found.path.parent
    assert (folder / build.CUDA_LOG).read_text() == "no such architecture\n"
    assert not (folder / build.LOG).exists()


@pytest.mark.parametrize("variant", ["angular_spread", "orthogonalization", "decorrelation", "mean_cosine"])
def test_the_streamed_value_stays_exact_for_many_tokens(variant):
    """Nearly parallel tokens: rounding errors of millions of almost equal pairs add up."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(1, 12_000, 24, generator=generator) * 0.3 + torch.randn(1, 1, 24, generator=generator) * 2
    exact = dispersion.dispersion_loss(z.double(), variant, impl="streamed")
    assert abs(dispersion.dispersion_loss(z, variant, impl="streamed") - exact) < 3e-7 * max(1, abs(exact))


def test_the_streamed_form_is_exact_at_any_matmul_precision():
    before = torch.get_float32_matmul_precision()
    z = (randn(1, 1, 64, seed=1) + 0.01 * randn(1, 100, 64)).float()
    exact = value_and_gradient(z, "angular_spread", "streamed")[1]
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16 on CPUs that support it
        assert torch.equal(value_and_gradient(z, "angular_spread", "streamed")[1], exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_self_test_notices_wrong_numbers(monkeypatch):
    right = ops.dispersion.run
    for factor, good in ((1, True), (1.02, False), (math.nan, False)):
        # The tested implementation is wrong, and the streamed one that it is compared with is right.
        wrong = lambda chosen, *z, by=factor: right("streamed", *z) * (by if chosen == "fused" else 1)  # noqa: E731
        monkeypatch.setattr(ops.dispersion, "run", wrong)
        text, passed = self_test("fused", "cpu")
        assert passed == good
        assert text.endswith("passed" if good else "FAILED")
    wanders = itertools.count()
    monkeypatch.setattr(ops.dispersion, "run", lambda _, *z: right("streamed", *z) * (1 + 1e-6 * (next(wanders) % 2)))
    text, passed = self_test("fused", "cpu")
    assert not passed
    assert "the same input gives different results" in text


@pytest.mark.slow
def test_the_extension_can_be_switched_off(tmp_path):
    assert run_child(tmp_path, MINIDISP_FUSED="0")[0] == ["streamed", "streamed in PyTorch: MINIDISP_FUSED=0 is set"]
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import torch, minidisp; minidisp.dispersion_loss(torch.ones(1, 2, 2), impl='fused')",
            ],
            env={**os.environ, "MINIDISP_FUSED": "0"},
            capture_output=True,
            check=True,
        )


@needs_fused
def test_the_operator_rejects_unsupported_input():
    op = torch.ops.minidisp.dispersion
    for z in (torch.ones(3, 4), torch.ones(1, 1, 4), torch.ones(1, 3, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"dispersion takes|z must be"):
            op(z, "angular_spread", 1.0, 0.25, 0.01, False)
    with pytest.raises(ValueError, match="mean_cosine"):
        op(torch.ones(1, 3, 4), "mean_cosine", 1.0, 0.25, 0.01, False)


# The inputs of backward


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("name", ["fused", "streamed", "attention", "cross-entropy"])
def test_backward_is_handed_no_zeros_and_takes_no_gradient(name):
    """The operators also return tensors without gradient, for which autograd would allocate zeros."""
    x = torch.randn(2, 9, 24, requires_grad=True)

    def value():
        if name == "attention":
            assert not registered("cpu")
            return torch.ops.minidisp.causal_attention(x, 1, 1)[0].sum()
        if name == "cross-entropy":
            return chunked(x.flatten(0, 1), torch.ones(11, 24), torch.arange(18) % 11)
        return dispersion_loss(x, impl=name)

    if name in ("fused", "attention") and not FUSED:
        pytest.skip("no extension")
    loss = value()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    assert not {"aten::zeros", "aten::zeros_like"} & {event.key for event in profile.key_averages()}
    x.grad = None
    (WithoutGradient.apply(value()) + 2 * x.sum()).backward()
    assert (x.grad == 2).all()


def test_a_compiler_that_does_not_exist_is_a_failed_build(tmp_path, monkeypatch):
    """Such as nvcc in a CUDA_HOME of libraries alone: the CPU part is then built without it."""
    missing = build.Unit(Path("x.cpp"), [str(tmp_path / "bin" / "nvcc")], 1.0)
    monkeypatch.setattr(build, "units", lambda *_: [missing])
    failure = build.compile_into(tmp_path / "out.so", True, "baseline")
    assert failure.code == 127
    assert b"bin/nvcc" in failure.log
    assert not failure.transient


@pytest.mark.parametrize("variant", ["angular_spread", "orthogonalization", "decorrelation"])
@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e9, 1e17])
def test_streamed_gradients_of_any_norm(variant, scale):
    z = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))

    def gradient(z, impl):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(dispersion_loss(z, variant, eps=0.0, impl=impl), z)[0]

    found, exact = gradient(scale * z, "streamed").double(), gradient(scale * z.double(), "reference")
    torch.testing.assert_close(scale * found, scale * exact, rtol=1e-3, atol=1e-5)


def test_a_loss_beyond_float32_is_inf_and_no_error():
    z = 1e20 * torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert dispersion_loss(z, "l2_repel", impl="fused").abs() == math.inf


def test_float8_is_streamed():
    z = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    torch.testing.assert_close(dispersion_loss(z), dispersion_loss(z.float(), impl="reference"), rtol=1e-5, atol=1e-6)
