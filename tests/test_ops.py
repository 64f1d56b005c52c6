"""minidisp.ops: the fused and the streamed dispersion loss against the oracle, and as good as the reference in float32."""

import math
import os
import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch
from test_dispersion import CASES, randn

from minidisp import dispersion, ops
from minidisp.dispersion import DispersionLoss, dispersion_loss

FUSED = ops.resolve("auto", "cpu") == "fused"  # builds the extension, if need be
needs_fused = pytest.mark.skipif(not FUSED, reason=ops.explain("cpu"))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
HAS_CUDA_OP = torch.cuda.is_available() and ops.resolve("auto", "cuda") == "fused"

RUNS = [
    *(pytest.param("fused", variant, "cpu", marks=needs_fused) for variant in ops.FUSED_VARIANTS),
    *(pytest.param("streamed", variant, "cpu") for variant in ops.STREAMED_VARIANTS),
    *(
        pytest.param("fused", variant, "cuda", marks=pytest.mark.skipif(not HAS_CUDA_OP, reason="no CUDA extension"))
        for variant in ops.FUSED_VARIANTS
    ),
    *(pytest.param("streamed", variant, "cuda", marks=needs_cuda) for variant in ops.STREAMED_VARIANTS),
]
every_run = pytest.mark.parametrize(("impl", "variant", "device"), RUNS)


def value_and_gradient(z, variant, impl, device="cpu", **options):
    z = z.detach().to(device).clone(memory_format=torch.preserve_format).requires_grad_()
    loss = dispersion_loss(z, variant, impl=impl, **options)
    loss.backward()
    return loss.item(), z.grad.cpu()


def errors(z, variant, impl, truth, device="cpu", **options):
    """Of the value, relative to 1 + |value|, and of the gradient, its norm relative to the true one's."""
    value, gradient = value_and_gradient(z, variant, impl, device, **options)
    exact, exact_gradient = truth
    norm = exact_gradient.norm().item() or 1.0
    return abs(value - exact) / (1 + abs(exact)), (gradient.double() - exact_gradient).norm().item() / norm


def assert_as_good_as_reference(z, variant, impl, device, rounding=1e-6, **options):
    """At most twice the reference's error, both against float64; below rounding both count as exact."""
    truth = value_and_gradient(z.double(), variant, "reference", **options)
    value, gradient = errors(z, variant, impl, truth, device, **options)
    plain_value, plain_gradient = errors(z, variant, "reference", truth, device, **options)
    assert value <= max(2 * plain_value, 3e-7)
    assert gradient <= max(2 * plain_gradient, rounding)


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
    if exact[1].norm() > 1e-6 / (0.01 + z.norm(dim=-1).max()):  # else it is the rounding of terms that cancel
        assert gradient <= max(2 * plain_gradient, 2e-6)


@pytest.mark.parametrize("variant", ops.STREAMED_VARIANTS)
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
@pytest.mark.parametrize("threads", [1, 2])
def test_odd_sizes(impl, variant, device, shape, spread, threads):
    B, _, C = shape
    z = (randn(B, 1, C, seed=1) * (spread < 1) + spread * randn(*shape)).float()
    if impl == "streamed" and threads == 2:
        pytest.skip("has no threads of its own")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tau in (1.0, 1e-3):
            assert_as_good_as_reference(z, variant, impl, device, tau=tau)
    finally:
        torch.set_num_threads(before)


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


def test_memory_stays_small():
    """A child process, whose peak memory is known: 2048 tokens, whose matrix of pairs alone would be 16 MB."""
    script = """
import resource, sys, torch
from minidisp import ops
from minidisp.dispersion import dispersion_loss
ops.resolve("auto", "cpu")
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
dispersion_loss(torch.randn(1, 300, 64, requires_grad=True), sys.argv[2], impl=sys.argv[1]).backward()
z = torch.randn(1, 2048, 64, requires_grad=True)  # 0.5 MB
before = peak()
dispersion_loss(z, sys.argv[2], impl=sys.argv[1]).backward()
print(peak() - before)
"""
    runs = [("streamed", "angular_spread", 14), ("streamed", "perplexity_entropy", 24)]
    runs += [("fused", "angular_spread", 6), ("fused", "l2_repel", 8)] if FUSED else []
    for impl, variant, limit_mib in runs:
        command = [sys.executable, "-c", script, impl, variant]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert float(result.stdout) < limit_mib, (impl, variant)


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


def test_auto_compiles_before_the_extension_was_ever_used():
    script = """
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


def test_names():
    with pytest.raises(ValueError, match=r"'eager'.*auto.*streamed"):
        dispersion_loss(CASES["random"], impl="eager")
    with pytest.raises(ValueError, match="eager"):
        DispersionLoss(impl="eager")
    assert ops.resolve("streamed", "cpu") == "streamed"
    assert ops.resolve("reference", "cpu") == "reference"
    assert dispersion.DispersionLoss(impl="streamed")([CASES["random"]] * 2).isfinite()


def run_child(tmp_path, **environment):
    script = "from minidisp import ops; print(ops.resolve('auto', 'cpu')); print(ops.explain('cpu'))"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), **environment}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    return result.stdout.splitlines(), result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux")
def test_a_failed_build_is_remembered_and_stops_nothing(tmp_path):
    if FUSED and "built ahead" in ops.explain("cpu"):
        pytest.skip("the extension built ahead needs no compiler")
    fake = tmp_path / "broken-c++"
    fake.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    fake.chmod(0o755)
    first, message = run_child(tmp_path / "cache", CXX=str(fake))
    assert first[0] == "streamed"
    assert "build.log" in first[1]
    assert message.count("compiling the extension") == 1
    second, message = run_child(tmp_path / "cache", CXX=str(fake))
    assert second[0] == "streamed"
    assert "delete it to try again" in second[1]
    assert "compiling" not in message


def test_the_extension_can_be_switched_off(tmp_path):
    assert run_child(tmp_path, MINIDISP_FUSED="0")[0] == ["streamed", "streamed in PyTorch: MINIDISP_FUSED=0 is set"]
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(
            [sys.executable, "-c", "from minidisp import ops; ops.resolve('fused', 'cpu')"],
            env={**os.environ, "MINIDISP_FUSED": "0"},
            capture_output=True,
            check=True,
        )


@needs_fused
def test_the_operator_refuses_what_it_cannot_do():
    op = torch.ops.minidisp.dispersion
    for z in (torch.ones(3, 4), torch.ones(1, 1, 4), torch.ones(1, 3, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"dispersion takes|z must be"):
            op(z, "angular_spread", 1.0, 0.25, 0.01, False)
    with pytest.raises(ValueError, match="mean_cosine"):
        op(torch.ones(1, 3, 4), "mean_cosine", 1.0, 0.25, 0.01, False)
