"""minidisp.ops.attention: the operator against float64, per instruction set, and the choice between it and torch's."""

import math

import pytest
import torch

from minidisp.ops import registered
from minidisp.ops.attention import causal_attention, choose, torch_attention

MISSING = registered("cpu")  # builds the extension if necessary
needs_operator = pytest.mark.skipif(bool(MISSING), reason=MISSING)
DTYPES = (torch.float32, torch.bfloat16)
INSTRUCTION_SETS = ("amx", "avx512", "avx2", "baseline")  # or the highest that the processor supports


def reference(qkv, n_head, n_kv_head):
    """From the formula, in the dtype of qkv; written for this test."""
    _, T, width = qkv.shape
    D = width // (n_head + 2 * n_kv_head)
    group, outs = n_head // n_kv_head, []
    for h in range(n_head):
        q = qkv[..., h * D : (h + 1) * D]
        k = qkv[..., (n_head + h // group) * D :][..., :D]
        v = qkv[..., (n_head + n_kv_head + h // group) * D :][..., :D]
        scores = q @ k.mT / math.sqrt(D)
        weights = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(dim=-1)
        outs.append(weights @ v)
    return torch.cat(outs, dim=-1)


def inputs(B, T, n_head, n_kv_head, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, (n_head + 2 * n_kv_head) * D, generator=generator) * 1.5
    return qkv.to(dtype), torch.randn(B, T, n_head * D, generator=generator).to(dtype)


def run(function, qkv, grad, *heads):
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, *heads)
    out.backward(grad)
    return out.detach(), qkv.grad


def relative(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


def assert_as_exact_as_torch(qkv, grad, *heads):
    """At most 1.5 times torch's error (plus a rounding), against float64."""
    exact, exact_grad = run(reference, qkv.double(), grad.double(), *heads)
    out, grad_qkv = run(causal_attention, qkv, grad, *heads)
    theirs, their_grad = run(torch_attention, qkv, grad, *heads)
    assert out.dtype == grad_qkv.dtype == qkv.dtype
    rounding = 2e-7 if qkv.dtype == torch.float32 else 2e-3
    assert relative(out, exact) <= 1.5 * relative(theirs, exact) + rounding
    assert relative(grad_qkv, exact_grad) <= 1.5 * relative(their_grad, exact_grad) + rounding


@needs_operator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("T", [1, 2, 37, 70, 330, 1000])
def test_against_float64(monkeypatch, T, instructions, dtype):
    monkeypatch.setenv("MINIDISP_CPU", instructions)
    assert_as_exact_as_torch(*inputs(1 if T > 100 else 2, T, 2, 2, 32, dtype), 2, 2)


@needs_operator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize(
    ("n_head", "n_kv_head", "D"), [(3, 3, 64), (4, 2, 20), (6, 1, 7), (2, 1, 100), (1, 1, 256), (5, 5, 1)]
)
def test_widths_and_groups(monkeypatch, n_head, n_kv_head, D, instructions, dtype):
    monkeypatch.setenv("MINIDISP_CPU", instructions)
    assert_as_exact_as_torch(*inputs(2, 150, n_head, n_kv_head, D, dtype), n_head, n_kv_head)


@needs_operator
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    qkv, grad = inputs(3, 70, 2, 2, 24, dtype)
    expected = run(causal_attention, qkv, grad, 2, 2)
    unaligned = torch.zeros(3, 70, 145, dtype=dtype)[..., 1:].copy_(qkv)
    columns = torch.zeros(3, 70, 288, dtype=dtype)[..., ::2].copy_(qkv)
    transposed = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    grad_transposed = grad.mT.contiguous().mT
    for x, g in ((transposed, grad), (unaligned, grad_transposed), (columns, grad)):
        for ours, theirs in zip(run(causal_attention, x, g, 2, 2), expected, strict=True):
            assert torch.equal(ours, theirs)


@needs_operator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_what_is_not_finite_shows_and_stays_causal(monkeypatch, part, value, instructions, dtype):
    monkeypatch.setenv("MINIDISP_CPU", instructions)
    T, D, token = 70, 16, 37
    qkv, _ = inputs(1, T, 1, 1, D, dtype)
    clean = causal_attention(qkv, 1, 1)
    qkv[0, token, "qkv".index(part) * D + 3] = value
    out = causal_attention(qkv, 1, 1)
    assert torch.allclose(
        out[0, :token].float(), clean[0, :token].float(), atol=2e-2 if dtype == torch.bfloat16 else 1e-6
    )
    assert out[0, :token].isfinite().all()
    later = out[0, token] if part == "q" else out[0, token:, 3]
    if part == "v" or math.isnan(value):
        assert not later.isfinite().any()
    if part == "q":  # of one token only
        assert out[0, token + 1 :].isfinite().all()


@needs_operator
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again_on_one_and_three_threads(dtype):
    threads = torch.get_num_threads()
    qkv, grad = inputs(2, 200, 5, 5, 32, dtype)
    results = []
    try:
        for n in (1, 3, 3, 1):
            torch.set_num_threads(n)
            results.append(run(causal_attention, qkv, grad, 5, 5))
    finally:
        torch.set_num_threads(threads)
    for out, grad_qkv in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad_qkv, results[0][1])


@needs_operator
def test_log_sum_exp():
    qkv, _ = inputs(2, 130, 4, 2, 16)
    _, lse = torch.ops.minidisp.causal_attention(qkv, 4, 2)
    q, k = qkv[..., :64].double().unflatten(2, (4, 16)), qkv[..., 64:96].double().unflatten(2, (2, 16))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, dim=2)) / 4
    exact = scores.masked_fill(torch.ones(130, 130, dtype=torch.bool).triu(1), -math.inf).logsumexp(dim=-1)
    assert (lse - exact).abs().max() < 2e-6


def test_the_reference_in_float64():
    qkv, _ = inputs(1, 4, 2, 1, 2)
    qkv = qkv.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference(x, 2, 1), qkv)
    assert torch.autograd.gradcheck(lambda x: causal_attention(x, 2, 1), qkv)  # torch's, as it is float64
    assert torch.allclose(causal_attention(qkv, 2, 1), reference(qkv, 2, 1))


@needs_operator
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    qkv, grad = inputs(2, 9, 2, 1, 4, dtype)
    out, lse = torch.ops.minidisp.causal_attention(qkv, 2, 1)
    torch.library.opcheck(torch.ops.minidisp.causal_attention.default, (qkv.requires_grad_(), 2, 1))
    torch.library.opcheck(torch.ops.minidisp.causal_attention_backward.default, (grad, qkv.detach(), out, lse, 2, 1))


@needs_operator
def test_autocast_computes_in_its_dtype():
    qkv, grad = inputs(2, 40, 2, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out, grad_qkv = run(causal_attention, qkv, grad.bfloat16(), 2, 2)
    assert out.dtype == torch.bfloat16
    assert grad_qkv.dtype == torch.float32
    assert torch.equal(out, causal_attention(qkv.bfloat16(), 2, 2))


@needs_operator
def test_compiled():
    qkv, grad = inputs(2, 40, 2, 2, 16)
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(compiled, qkv, grad, 2, 2), run(causal_attention, qkv, grad, 2, 2), strict=True):
        assert torch.equal(ours, theirs)


@needs_operator
@pytest.mark.parametrize(
    ("qkv", "heads", "words"),
    [
        (torch.zeros(2, 3, 48, dtype=torch.float64), (1, 1), "float32 and bfloat16"),
        (torch.zeros(2, 3, 47), (1, 1), "3 heads in all"),
        (torch.zeros(3, 48), (1, 1), "must be"),
        (torch.zeros(2, 3, 48), (3, 2), "multiple of n_kv_head 2"),
        (torch.zeros(1, 3, 3 * 257), (1, 1), "up to 256 channels, not 257"),
    ],
)
def test_bad_input(qkv, heads, words):
    with pytest.raises(ValueError, match=words):
        torch.ops.minidisp.causal_attention(qkv, *heads)


@needs_operator
def test_instruction_sets(monkeypatch):
    best = torch.ops.minidisp.instruction_set()
    for name in INSTRUCTION_SETS:
        monkeypatch.setenv("MINIDISP_CPU", name)
        expected = max(INSTRUCTION_SETS.index(name), INSTRUCTION_SETS.index(best))
        assert torch.ops.minidisp.instruction_set() == INSTRUCTION_SETS[expected]


@needs_operator
def test_an_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("MINIDISP_CPU", "mmx")
    with pytest.raises(ValueError, match="MINIDISP_CPU is mmx, but must be baseline, avx2, avx512 or amx"):
        causal_attention(torch.zeros(1, 2, 12), 1, 1)


def test_choice():
    assert choose(torch.float32, "cpu", 64) == ("fused", "")
    assert choose(torch.bfloat16, "cpu", 64) == ("fused", "")
    assert choose(torch.bfloat16, "cpu", 256) == ("fused", "")
    for arguments, word in (
        ((torch.float32, "cuda", 64), "cuda"),
        ((torch.float64, "cpu", 64), "float64"),
        ((torch.float16, "cpu", 64), "float16"),
        ((torch.float32, "cpu", 257), "256"),
        ((torch.float32, "cpu", 64, 0.1), "dropout"),
        ((torch.float32, "cpu", 64, 0.0, True), "cache"),
    ):
        chosen, why = choose(*arguments)
        assert chosen == "torch"
        assert word in why


@needs_operator
def test_forward_alone_without_tiles_is_torch_s(monkeypatch):
    monkeypatch.setenv("MINIDISP_CPU", "avx512")
    qkv, _ = inputs(1, 520, 1, 1, 8, torch.bfloat16)
    operator = torch.ops.minidisp.causal_attention(qkv, 1, 1)[0]
    theirs = torch_attention(qkv, 1, 1)
    assert not torch.equal(operator, theirs)
    assert torch.equal(causal_attention(qkv, 1, 1), theirs)
    assert torch.equal(causal_attention(qkv[:, :500], 1, 1), operator[:, :500])
    assert torch.equal(causal_attention(qkv.clone().requires_grad_(), 1, 1).detach(), operator)
    monkeypatch.delenv("MINIDISP_CPU")
    expected = torch.ops.minidisp.causal_attention(qkv, 1, 1)[0]
    if torch.ops.minidisp.instruction_set() == "amx":
        assert torch.equal(causal_attention(qkv, 1, 1), expected)


def test_dropout_and_a_cache_are_torch_s():
    qkv, _ = inputs(2, 12, 2, 1, 8)
    kept = []

    def append(kv):
        kept.append(kv)
        return torch.cat(kept, dim=2)

    whole = reference(qkv, 2, 1)
    first = causal_attention(qkv[:, :11], 2, 1, kept=(append, None))
    last = causal_attention(qkv[:, 11:], 2, 1, kept=(append, None))
    assert torch.allclose(torch.cat((first, last), dim=1), whole, atol=1e-6)
    assert not torch.allclose(causal_attention(qkv, 2, 1, dropout=0.5), whole, atol=1e-2)


@needs_operator
def test_empty():
    assert causal_attention(torch.zeros(0, 5, 12), 1, 1).shape == (0, 5, 4)
    assert causal_attention(torch.zeros(2, 0, 12), 1, 1).shape == (2, 0, 4)


@needs_operator
def test_a_second_derivative_is_refused():
    qkv, _ = inputs(1, 5, 2, 2, 4)
    out = causal_attention(qkv.requires_grad_(), 2, 2)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.square().sum(), qkv, create_graph=True)


@needs_operator
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_graph_serves_any_number_of_tokens(dtype):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: causal_attention(x, 2, 2), backend="eager", fullgraph=True, dynamic=True)
    for T in (33, 40):
        qkv, _ = inputs(2, T, 2, 2, 8, dtype)
        assert compiled(qkv).equal(causal_attention(qkv, 2, 2))
