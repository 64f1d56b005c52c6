"""minidisp.ops.layers: each operator against float64, per instruction set, and the choice between it and torch's
form."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minidisp.model import GPT, GPTConfig
from minidisp.ops import layers, registered

MISSING = registered("cpu")  # builds the extension if necessary
needs_operators = pytest.mark.skipif(bool(MISSING), reason=MISSING)
INSTRUCTION_SETS = ("amx", "avx512", "avx2", "baseline")  # or the highest that the processor supports
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
ops = torch.ops.minidisp
ROOT = Path(__file__).resolve().parents[1]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x, weight, bias, eps):
    x = x - x.mean(-1, keepdim=True)
    y = rms_norm(x, weight, eps)
    return y if bias is None else y + bias


def rotated(qkv, q_weight, k_weight, cos, sin, n_head, n_kv_head, eps):
    """From the formula: channels i and i + D/2 of a head are rotated by the angle of their position."""
    D = len(q_weight)
    half, heads = D // 2, []
    for h, x in enumerate(qkv.split(D, dim=-1)):
        if h < n_head + n_kv_head:
            x = rms_norm(x, q_weight if h < n_head else k_weight, eps)
            a, b = x[..., :half], x[..., half:]
            x = torch.cat((a * cos[:, :half] - b * sin[:, :half], b * cos[:, half:] + a * sin[:, half:]), dim=-1)
        heads.append(x)
    return torch.cat(heads, dim=-1)


def angles(T, D):
    table = torch.outer(torch.arange(T), 100.0 ** -(torch.arange(0, D, 2) / D)).repeat(1, 2)
    return table.cos(), table.sin()


def assert_right(fused, exact, inputs, grad, factor=1.0):
    """Output and gradients of `fused` on the inputs, against `exact` on them in float64."""
    ours = [x.detach().requires_grad_() for x in inputs]
    truth = [x.detach().double().requires_grad_() for x in inputs]
    out, want = fused(*ours), exact(*truth)
    out.backward(grad.to(out.dtype))
    want.backward(grad.to(out.dtype).double())
    for x, y in ((out, want), *((a.grad, b.grad) for a, b in zip(ours, truth, strict=True))):
        rounding = factor * max(ROUNDING[x.dtype], ROUNDING[out.dtype] if x is not out else 0)
        assert ((x.double() - y).norm() / y.norm()).item() < rounding


@needs_operators
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]
)
@pytest.mark.parametrize("shape", [(3, 7, 48), (5, 1), (2, 130, 100), (700, 33)])
def test_norms(monkeypatch, shape, dtypes, instructions):
    monkeypatch.setenv("MINIDISP_CPU", instructions)
    x, grad = draw(*shape, dtype=dtypes[0]) + 0.5, draw(*shape, seed=1)
    weight, bias = draw(shape[-1], seed=2) + 1, draw(shape[-1], seed=3)
    assert_right(
        lambda x, w: ops.norm(x, w, None, 1e-2, False, dtypes[1]), lambda x, w: rms_norm(x, w, 1e-2), [x, weight], grad
    )
    if shape[-1] == 1:
        return  # zero after centring
    for b in ([], [bias]):
        assert_right(
            lambda x, w, b=None: ops.norm(x, w, b, 1e-2, True, dtypes[1]),
            lambda x, w, b=None: layer_norm(x, w, b, 1e-2),
            [x, weight, *b],
            grad,
            factor=2,
        )


@needs_operators
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize(
    ("B", "T", "n_head", "n_kv_head", "D"), [(2, 9, 4, 2, 32), (1, 130, 1, 1, 6), (2, 1, 3, 3, 64), (3, 40, 2, 1, 2)]
)
def test_rotated_heads(monkeypatch, B, T, n_head, n_kv_head, D, instructions, dtype):
    monkeypatch.setenv("MINIDISP_CPU", instructions)
    heads, eps = (n_head, n_kv_head), 1e-2
    qkv, grad = (draw(B, T, (n_head + 2 * n_kv_head) * D, dtype=dtype, seed=seed) for seed in (0, 1))
    cos, sin = angles(T, D)
    assert_right(
        lambda x, q, k: layers.rotate_heads(x, q, k, cos, sin, *heads, eps),
        lambda x, q, k: rotated(x, q, k, cos.double(), sin.double(), *heads, eps),
        [qkv, draw(D, seed=2) + 1, draw(D, seed=3) + 1],
        grad,
        factor=2,
    )


def test_the_references_in_float64():
    """And torch's implementations, which are used for float64."""
    x, w = draw(2, 5, 12).double().requires_grad_(), draw(6, seed=1).double().requires_grad_()
    tables = [t.double() for t in angles(5, 6)]
    assert torch.autograd.gradcheck(lambda x, w: rotated(x.repeat(1, 1, 2), w, w, *tables, 2, 1, 1e-3), (x, w))
    qkv = torch.cat((x, x), dim=-1)
    ours = layers.rotate_heads(qkv, w, w, *tables, 2, 1, 1e-3)
    assert torch.allclose(ours, rotated(qkv, w, w, *tables, 2, 1, 1e-3), atol=1e-6)  # rotations are in float32
    assert torch.autograd.gradcheck(lambda x: layer_norm(x, torch.ones(12).double(), None, 1e-3), x)
    assert torch.allclose(layers.rms_norm(x, w.repeat(2), 1e-3), rms_norm(x, w.repeat(2), 1e-3))


@needs_operators
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_gelu_of_every_bfloat16_is_torch_s(monkeypatch, instructions, approximate):
    monkeypatch.setenv("MINIDISP_CPU", instructions)
    x = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    x = torch.cat((x, x[:37])).requires_grad_()
    grad = draw(len(x), dtype=torch.bfloat16)
    ours, theirs = layers.gelu(x, approximate), F.gelu(x, approximate=approximate)
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    assert torch.equal(ours.isnan(), theirs.isnan())
    slopes = [torch.autograd.grad(y, x, grad)[0].nan_to_num(7.0) for y in (ours, theirs)]
    wide = x.detach().float().requires_grad_()
    in_float32 = torch.autograd.grad(F.gelu(wide, approximate=approximate), wide, grad.float())[0].bfloat16()
    # On AVX2, torch's erf differs between its bfloat16 and float32 kernels in the tail below -4.7.
    agrees = in_float32.nan_to_num(7.0) == slopes[1]
    assert torch.equal(slopes[0][agrees], slopes[1][agrees])
    assert agrees.float().mean() > 0.995
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0.05, atol=1e-6)


@needs_operators
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_squared_relu_is_torch_s(monkeypatch, instructions, dtype):
    monkeypatch.setenv("MINIDISP_CPU", instructions)
    x = torch.cat((draw(1003), torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e30, -1e-30]))).to(dtype).requires_grad_()
    grad = draw(1009, dtype=dtype)
    forms = layers.squared_relu(x), F.relu(x).square()
    assert torch.equal(*forms)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in forms))
    assert layers.squared_relu(torch.tensor([math.nan], dtype=dtype)).isnan().all()


@needs_operators
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [((2, 40), 24, 17), ((1,), 3, 2), ((333,), 64, 64), ((3, 70), 130, 70)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(monkeypatch, rows, inputs, outputs, with_bias, instructions):
    monkeypatch.setenv("MINIDISP_CPU", instructions)
    x, weight = draw(*rows, inputs, dtype=torch.bfloat16), draw(outputs, inputs, dtype=torch.bfloat16)
    bias = [draw(outputs, dtype=torch.bfloat16)] if with_bias else []
    assert_right(
        lambda *a: layers.linear(*a, *[None] * (3 - len(a))),
        F.linear,
        [x, weight, *bias],
        draw(*rows, outputs),
        factor=2,
    )


@needs_operators
def test_any_strides():
    x, weight = draw(6, 40, 48), draw(48)
    g = draw(6, 40, 48)
    columns = torch.zeros(6, 40, 96)[..., ::2].copy_(x)
    for y in (columns, x.transpose(0, 1).contiguous().transpose(0, 1)):
        results = []
        for z, grad in ((x, g), (y, g.mT.contiguous().mT)):
            z = z.detach().requires_grad_()
            out = layers.rms_norm(z, weight, 1e-6)
            results.append((out, *torch.autograd.grad(out, z, grad)))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


@needs_operators
def test_the_same_bits_again_on_one_and_three_threads():
    """Equal for any number of threads, except for sums over tokens, which are equal for the same number."""
    threads = torch.get_num_threads()
    x, weight, g = draw(4096, 48).requires_grad_(), draw(48).requires_grad_(), draw(4096, 48)
    results = {1: [], 3: []}
    try:
        for n in (1, 3, 3, 1):
            torch.set_num_threads(n)
            out = layers.rms_norm(x, weight, 1e-6)
            results[n].append((out, *torch.autograd.grad(out, (x, weight), g)))
    finally:
        torch.set_num_threads(threads)
    for first, second in results.values():
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[1][0][:2], results[3][0][:2], strict=True))
    assert torch.allclose(results[1][0][2], results[3][0][2], rtol=1e-5, atol=1e-4)


def operator_inputs():
    cos, sin = angles(5, 4)
    x, weight, w = draw(2, 5, 16).requires_grad_(), draw(16).requires_grad_(), draw(4).requires_grad_()
    half = draw(2, 5, 16, dtype=torch.bfloat16).requires_grad_()
    matrix, bias = draw(6, 16, dtype=torch.bfloat16).requires_grad_(), draw(6, dtype=torch.bfloat16).requires_grad_()
    tables = layers.gelu_tables("none")
    return {
        "norm": (x, weight, None, 1e-5, False, torch.bfloat16),
        "norm_backward": (x.detach(), x.detach(), weight.detach(), 1e-5, True),
        "rotate": (x, w, w.detach(), cos, sin, 2, 1, 1e-5),
        "rotate_backward": (x.detach(), x.detach(), w.detach(), w.detach(), cos, sin, 2, 1, 1e-5),
        "squared_relu": (x,),
        "squared_relu_backward": (x.detach(), x.detach()),
        "lookup": (half, *tables),
        "lookup_backward": (half.detach(), half.detach(), tables[1]),
        "linear": (half, matrix, bias),
        "linear_backward": (draw(2, 5, 6, dtype=torch.bfloat16), half.detach(), matrix.detach()),
    }


@needs_operators
@pytest.mark.parametrize("name", layers.OPERATORS)
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name).default, operator_inputs()[name])


@needs_operators
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.norm(torch.zeros(2, 3).double(), torch.ones(3), None, 1e-5, True, torch.float32), "not Double"),
        (lambda: ops.norm(torch.zeros(2, 3), torch.ones(4), None, 1e-5, True, torch.float32), "weights must be 3"),
        (lambda: ops.rotate(torch.zeros(1, 2, 9), torch.ones(3), torch.ones(3), *angles(2, 4), 1, 1, 1e-5), "even"),
        (
            lambda: ops.rotate(torch.zeros(1, 2, 12), torch.ones(4), torch.ones(4), *angles(3, 4), 1, 1, 1e-5),
            "rotations",
        ),
        (
            lambda: ops.rotate(torch.zeros(1, 2, 13), torch.ones(4), torch.ones(4), *angles(2, 4), 1, 1, 1e-5),
            "qkv must",
        ),
        (lambda: ops.lookup(torch.zeros(3), *layers.gelu_tables("none")), "bfloat16 numbers"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 40}


def loss_and_gradients(config, dtype, forward=lambda model: model):
    torch.manual_seed(0)
    model = GPT(config)
    idx = torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = forward(model)(idx, idx).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@needs_operators
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"gelu": "tanh", "bias": False}, {"arch": "qwen3", "mlp": "relu2"}, {"arch": "qwen3", "n_kv_head": 1}],
)
def test_a_model_by_the_operators_and_by_torch(monkeypatch, changes, dtype):
    config = GPTConfig(**SIZES, **changes)
    ours = loss_and_gradients(config, dtype)
    monkeypatch.setattr(layers, "fuses", lambda *_: False)
    theirs = loss_and_gradients(config, dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() <= tolerance * b.norm()
    if dtype == torch.float32 and config.arch == "gpt2":  # it is computed in the same way
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_hidden_states_stay_in_float32(arch):
    """Including the last one, after the final norm: a matrix product follows, but the dispersion loss reads it."""
    model = GPT(GPTConfig(**SIZES, arch=arch))
    with torch.autocast("cpu", torch.bfloat16):
        hidden_states = model(torch.ones(2, 8, dtype=torch.int64), return_hidden_states=True).hidden_states
    assert {z.dtype for z in hidden_states} == {torch.float32}
    assert not torch.equal(hidden_states[-1], hidden_states[-1].bfloat16().float())


@needs_operators
def test_compiled_models_take_torch_s_forms(monkeypatch):
    """So that the compiler can fuse; and the choice must not break the graph."""
    config = GPTConfig(**SIZES, arch="qwen3", mlp="relu2")
    compiled = loss_and_gradients(
        config, torch.float32, lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)
    )
    for a, b in zip(compiled, loss_and_gradients(config, torch.float32), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_choice(monkeypatch):
    half, x = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    assert not layers.fuses(x)
    assert not layers.fuses(x.double(), layers.EITHER)
    assert not layers.fuses(x.to("meta"), layers.EITHER)
    assert layers.fuses(half) == layers.fuses(x, layers.EITHER) == (not MISSING)
    with torch.autocast("cpu", torch.bfloat16):
        assert layers.fuses(x) == (not MISSING)
        assert not layers.fuses(x.double())
    with torch.autocast("cpu", torch.float16):
        assert not layers.fuses(x)
    monkeypatch.setattr(layers, "registered", lambda device: "there is no compiler")
    assert not layers.fuses(half)


@needs_operators
def test_a_second_derivative_is_refused():
    x, weight = draw(5, 8).requires_grad_(), draw(8).requires_grad_()
    for out in (layers.squared_relu(x), layers.rms_norm(x, weight, 1e-6)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.square().sum(), x, create_graph=True)


@needs_operators
def test_in_autograd_s_graph():
    """What torch's own operators do: backward twice only with retain_graph, saved tensors through hooks, a check of
    what was changed since, no graph where nothing needs gradients; and no silent loss of a forward-mode derivative."""
    x, weight = draw(5, 8).requires_grad_(), draw(8)
    out = layers.rms_norm(x, weight, 1e-6)
    assert not layers.rms_norm(x.detach(), weight, 1e-6).requires_grad
    with torch.no_grad():
        assert not layers.rms_norm(x, weight, 1e-6).requires_grad
    (first,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(out.sum(), x)
    assert first.equal(second)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        out = layers.rms_norm(x, weight, 1e-6)
    assert sorted(map(tuple, saved)) == [(5, 8), (8,)]
    assert torch.autograd.grad(out.sum(), x)[0].equal(first)

    out = layers.rms_norm(x, weight, 1e-6)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(5, 8))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            layers.rms_norm(dual, weight, 1e-6)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_a_model_with_bfloat16_parameters(arch):
    torch.manual_seed(0)
    model, idx = (
        GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=50, arch=arch)),
        torch.arange(16)[None],
    )
    exact = model(idx, idx).loss
    assert model.to(torch.bfloat16)(idx, idx).loss.item() == pytest.approx(exact.item(), rel=1e-2)


@needs_operators
def test_tables_first_made_in_inference_mode_serve_training():
    layers.gelu_tables.cache_clear()
    x = draw(4, 8, dtype=torch.bfloat16)
    with torch.inference_mode():
        first = layers.gelu(x, "none")
    x.requires_grad_()
    layers.gelu(x, "none").sum().backward()
    assert first.equal(layers.gelu(x, "none"))
    assert x.grad.isfinite().all()


@needs_operators
def test_bfloat16_without_onednn_products():
    """As on a processor without AVX-512, where oneDNN has no bfloat16 product and torch's own is used."""
    script = (
        "import torch; from minidisp import GPT, GPTConfig; torch.manual_seed(0); idx = torch.arange(8)[None]\n"
        "model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=50))\n"
        "exact = model(idx, idx).loss\n"
        "with torch.autocast('cpu', torch.bfloat16): loss = model(idx, idx).loss\n"
        "loss.backward(); assert abs(loss - exact) < 0.05, (loss, exact)"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
